"""Formats plans as text tables and as plain numbers for JSON."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

from ml_collections import ConfigDict

from diffjax.evaluation.tables import MISSING, duration, number, percent, table, three_digits
from diffjax.performance.planning.compiled import Needs
from diffjax.performance.planning.roofline import device_hours, estimate
from diffjax.performance.planning.search import Row
from diffjax.performance.planning.topologies import GIB, topology_called
from diffjax.training.averages import Averages

_BYTES_PER_PARAMETER = 4


def plans_as_json(rows: Sequence[Row], best: Row | None) -> dict[str, Any]:
    """All numbers of all plans as plain values for JSON, with the label of the best plan."""
    return {
        "plans": [
            {"label": label, **asdict(needs), "derived": derived(config, needs)}
            for label, config, needs in rows
        ],
        "best": None if best is None else best[0],
    }


def derived(config: ConfigDict, needs: Needs) -> dict[str, Any]:
    """Numbers derived from a program's needs and the chip's published figures.

    These are ratios to the lower bounds, roofline seconds, images per second and device hours.
    """
    topology = topology_called(needs.topology)
    roofline = estimate(needs, topology)
    chips, minimum = topology.num_chips, needs.minimum_wire_bytes
    whole = {}
    if needs.program == "training":
        whole = {
            "run_seconds": roofline.seconds * config.num_steps,
            "device_hours": device_hours(roofline.seconds, config.num_steps, chips),
        }
    copies = 3 + len(Averages.of(config).names)
    ideal = needs.num_params * _BYTES_PER_PARAMETER * copies / chips
    return {
        "chip": asdict(topology.chip),
        "usable_bytes": topology.usable_bytes,
        "state_bytes": needs.state_bytes,
        "state_over_ideal": needs.state_bytes / ideal if needs.program == "training" else None,
        "flops_over_model": needs.flops / needs.model_flops,
        "wire_bytes": needs.wire_bytes,
        "wire_over_minimum": needs.wire_bytes / minimum if minimum else None,
        "seconds_by_part": dict(roofline.parts),
        "seconds": roofline.seconds,
        "bound_by": roofline.bound_by,
        "images_per_second": needs.batch_size / roofline.seconds,
        **whole,
    }


def details(config: ConfigDict, needs: Needs) -> str:
    """One plan as text: tables of memory, work, traffic and time, then notes."""
    about = derived(config, needs)
    parts = [
        _title(config, needs),
        table(["memory of a chip", "GiB", "share"], memory_rows(needs, about)),
        table(["work of a chip", "", "/ lower bound"], work_rows(needs, about)),
        table(["traffic between chips", "devices", "count", "MB received"], wire_rows(needs)),
        table(["lower bound on the time", "ms", ""], time_rows(about)),
        *_notes(needs),
    ]
    return "\n\n".join(parts)


def _title(config: ConfigDict, needs: Needs) -> str:
    mesh = " ".join(f"{axis}={size}" for axis, size in needs.mesh.items() if size > 1) or "one chip"
    how = (
        f"compiled in {duration(needs.seconds)} ({duration(needs.cpu_seconds)} of a processor)"
        if needs.compiled
        else "an ANALYTIC MODEL: nothing was compiled for these chips"
    )
    return (
        f"{config.name}, {needs.program}: {needs.num_params:,} parameters, batch "
        f"{needs.batch_size}, on {needs.topology} ({mesh}); {how}"
    )


def memory_rows(needs: Needs, about: Mapping[str, Any]) -> list[list[str]]:
    """Rows of the memory table: kind, GiB, and share of a chip's usable memory."""
    usable = about["usable_bytes"]
    kinds = [[kind, _gib(size), percent(size / usable)] for kind, size in needs.memory.items()]
    total = ["total", _gib(needs.peak_bytes), percent(needs.peak_bytes / usable)]
    return [*kinds, total, ["usable by a program", _gib(usable), ""]]


def work_rows(needs: Needs, about: Mapping[str, Any]) -> list[list[str]]:
    """Rows of the work table: kind of work, its amount, and its ratio to the lower bound."""
    traffic = needs.memory_traffic_bytes
    rows = [
        ["matrix TFLOP", three_digits(needs.flops / 1e12), f"{about['flops_over_model']:.4f}"],
        [
            "GB from other chips",
            three_digits(needs.wire_bytes / 1e9),
            MISSING if about["wire_over_minimum"] is None else f"{about['wire_over_minimum']:.3f}",
        ],
        ["GB from and to memory", MISSING if traffic is None else three_digits(traffic / 1e9), ""],
    ]
    if about["state_over_ideal"] is not None:
        ratio = f"{about['state_over_ideal']:.4f}"
        rows.append(["GB of state", three_digits(needs.state_bytes / 1e9), ratio])
    return rows


def wire_rows(needs: Needs) -> list[list[str]]:
    """Rows of the traffic table: kind, participating devices, count, and MB received."""
    return [
        [one.kind, str(one.devices), number(one.count or None), three_digits(one.wire_bytes / 1e6)]
        for one in needs.collectives
    ] or [["none", "", "", ""]]


def time_rows(about: Mapping[str, Any]) -> list[list[str]]:
    """Rows of the time table: the roofline parts in ms, then the cost of the whole run."""
    rows = [
        [part, three_digits(1e3 * seconds), "longest" if part == about["bound_by"] else ""]
        for part, seconds in about["seconds_by_part"].items()
    ]
    rows.append(["images per second", number(about["images_per_second"]), "at most"])
    if "device_hours" in about:
        rows.append(["the whole run", duration(about["run_seconds"]), "at least"])
        rows.append(["device hours", number(about["device_hours"]), "at least"])
    return rows


def _notes(needs: Needs) -> list[str]:
    notes = []
    if not needs.fits:
        notes.append("IT DOES NOT FIT; FLOPs are those of the model, and traffic is unknown.")
    if needs.whole_stacks:
        notes.append(f"whole unsharded weight stacks: {', '.join(needs.whole_stacks)}")
    elif needs.compiled and needs.fits:
        notes.append("no array holds a whole stack of weights unsharded")
    if needs.largest:
        notes.append(f"largest arrays: {', '.join(needs.largest)}")
    if needs.unknown_loops:
        count = len(needs.unknown_loops)
        notes.append(f"loops counted as one iteration, because their length is unknown: {count}")
    return notes


def plan_summary(rows: Sequence[Row]) -> str:
    """A table with one line for each plan."""
    lines = []
    for label, config, needs in rows:
        about = derived(config, needs)
        wire = about["wire_over_minimum"]
        lines.append(
            [
                label,
                str(needs.batch_size),
                _gib(needs.state_bytes),
                _gib(needs.peak_bytes) + ("" if needs.fits else " (too much)"),
                three_digits(needs.flops / 1e12),
                f"{about['flops_over_model']:.4f}",
                three_digits(needs.wire_bytes / 1e9),
                MISSING if wire is None else f"{wire:.2f}",
                three_digits(1e3 * about["seconds"]),
                about["bound_by"],
                number(about["images_per_second"]),
                number(about.get("device_hours")),
                three_digits(needs.seconds) if needs.compiled else "analytic",
            ]
        )
    headings = [
        "per chip", "batch", "state GiB", "peak GiB", "TFLOP", "/ model", "GB received",
        "/ minimum", "min ms", "bound by", "images/s", "device hours", "compile s",
    ]  # fmt: skip
    return table(headings, lines)


def _gib(size: int) -> str:
    return f"{size / GIB:.3f}"
