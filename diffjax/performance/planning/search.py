"""Searches over meshes, rematerialisation, scan and batch size for the best plan that fits."""

from collections.abc import Callable, Iterator, Sequence

from ml_collections import ConfigDict

from diffjax.models.layers.remat import REMAT
from diffjax.performance.planning.compiled import Needs
from diffjax.performance.planning.roofline import estimate
from diffjax.performance.planning.topologies import GIB, Topology, slices, topology_called
from diffjax.training.sharding import filled

Row = tuple[str, ConfigDict, Needs]
AXES = ("mesh", "remat", "scan")
"""The settings that a search varies."""


def changed(config: ConfigDict, **values: object) -> ConfigDict:
    """Returns a copy of a config with new values; `model__scan=True` sets `model.scan`.

    Example:
        >>> changed(ConfigDict({"model": {"scan": False}}), model__scan=True).model.scan
        True
    """
    copy = ConfigDict(config.to_dict())
    for name, value in values.items():
        *groups, key = name.split("__")
        group = copy
        for part in groups:
            group = group[part]
        group[key] = value
    return copy


def meshes(
    num_chips: int, batch_size: int, num_slices: int = 1, *, tensor: int = 1, sequence: int = 1
) -> list[dict[str, int]]:
    """Candidate meshes for a number of chips, with different sizes of the `fsdp` axis.

    They shard parameters over all chips of a slice, over groups whose size is at least the number
    of groups in a slice, or not at all (pure data parallelism). No `fsdp` group crosses slices.

    Args:
        num_chips: the number of chips of the whole machine.
        batch_size: images per step. If the data-parallel devices do not divide it, only the
            largest `fsdp` is returned.
        num_slices: groups of chips with fast links.
        tensor: size of the tensor-parallel axis; 1 is off.
        sequence: size of the sequence-parallel axis; 1 is off.

    Example:
        >>> [mesh["fsdp"] for mesh in meshes(256, 256)]
        [256, 128, 64, 32, 16, 1]
        >>> [(mesh["data"], mesh["fsdp"]) for mesh in meshes(16, 16, num_slices=2, tensor=2)]
        [(2, 4), (4, 2), (8, 1)]
    """
    rows = num_chips // (tensor * sequence)
    within = rows // num_slices
    divisors = [n for n in range(1, within + 1) if within % n == 0]
    sizes = {within} if batch_size % rows else {1, *(n for n in divisors if n * n >= within)}
    return [
        {"data": rows // fsdp, "fsdp": fsdp, "tensor": tensor, "sequence": sequence}
        for fsdp in sorted(sizes, reverse=True)
    ]


def candidate_plans(
    config: ConfigDict, topology: Topology, over: Sequence[str] = AXES
) -> Iterator[tuple[str, ConfigDict]]:
    """Generates all combinations of mesh, rematerialisation policy and scan.

    `tensor` and `sequence` keep the config's sizes. If both are 1, one mesh with `tensor=2` is
    added.

    Args:
        config: a resolved config.
        topology: the chips.
        over: the `AXES` to vary; the others keep the config's values.

    Yields:
        A label, for example `data=1 fsdp=16 remat=full scan=True`, and the config.
    """
    model = config.model
    policies = tuple(REMAT) if "remat" in over and "remat" in model else (model.get("remat"),)
    scans = (True, False) if "scan" in over and "scan" in model else (model.get("scan"),)
    own = _filled(config, topology)
    for mesh in _meshes_of(config, own, topology) if "mesh" in over else [own]:
        for policy in policies:
            for scan in scans:
                others = [axis for axis in ("tensor", "sequence") if mesh[axis] > 1]
                parts = [f"{axis}={mesh[axis]}" for axis in ("data", "fsdp", *others)]
                values: dict[str, object] = {f"mesh__{axis}": size for axis, size in mesh.items()}
                if policy is not None:
                    values["model__remat"] = policy
                    parts.append(f"remat={policy}")
                if scan is not None:
                    values["model__scan"] = scan
                    parts.append(f"scan={scan}")
                yield " ".join(parts), changed(config, **values)


def _meshes_of(config: ConfigDict, own: dict[str, int], topology: Topology) -> list[dict[str, int]]:
    chips, slices, batch = topology.num_chips, topology.copies, config.batch_size
    found = meshes(chips, batch, slices, tensor=own["tensor"], sequence=own["sequence"])
    if own["tensor"] == own["sequence"] == 1 and topology.slice_size % 2 == 0:
        found += meshes(chips, batch, slices, tensor=2)[:1]
    return found


def _filled(config: ConfigDict, topology: Topology) -> dict[str, int]:
    """The config's own mesh, with -1 replaced by the size that it means."""
    return filled(config.mesh, topology.num_chips, topology.num_slices)


def best(rows: Sequence[Row]) -> Row | None:
    """The plan that fits with the most images per second; ties go to the least memory.

    Returns None if no plan fits.
    """
    fitting = [row for row in rows if row[2].fits]
    if not fitting:
        return None

    def cost(row: Row) -> tuple[float, int]:
        _, _, needs = row
        seconds = estimate(needs, topology_called(needs.topology)).seconds
        # Rounded, so that tiny differences count as ties.
        return round(1e3 * seconds / needs.batch_size, 6), needs.peak_bytes

    return min(fitting, key=cost)


def largest_batch(
    config: ConfigDict,
    topology: Topology,
    plan: Callable[[ConfigDict], Needs],
    most_plans: int = 6,
) -> Iterator[tuple[ConfigDict, Needs]]:
    """Searches for the largest batch that fits by planning several batch sizes.

    Memory is almost linear in the batch size. Two plans determine the line and where it reaches
    the chip's memory; further plans confirm the result.

    Args:
        config: a resolved config; the search starts at its batch size.
        topology: the chips.
        plan: a function that returns the `Needs` of a config.
        most_plans: the largest number of plans; the search ends after that many. Each compiled
            plan takes minutes.

    Yields:
        Each planned config and its needs.
    """
    step = _rows(config, topology)
    first = max(step, config.batch_size // step * step)
    tried: dict[int, Needs] = {}
    following = first
    while following not in tried and len(tried) < most_plans:
        candidate = changed(config, batch_size=following)
        tried[following] = plan(candidate)
        yield candidate, tried[following]
        following = _next(tried, step, topology.usable_bytes)


def _next(tried: dict[int, Needs], step: int, memory: int) -> int:
    """The next batch size to plan; one that is already planned ends the search."""
    peaks = {batch: needs.peak_bytes for batch, needs in tried.items()}
    fitting = [batch for batch, needs in tried.items() if needs.fits]
    too_large = [batch for batch, needs in tried.items() if not needs.fits]
    lowest = max(fitting, default=0)
    highest = min(too_large, default=0)
    if len(peaks) == 1:
        (batch,) = tried
        other = batch / 2 if too_large else 2 * batch
        return max(step, round(other / step) * step)
    low, *_, high = sorted(peaks)
    slope = max((peaks[high] - peaks[low]) / (high - low), 1e-9)
    guess = int((memory - peaks[low]) / slope + low) // step * step
    if highest:
        guess = min(guess, highest - step)
    # A batch that fits is not planned again: the next larger one is, to confirm the limit.
    guess = max(guess, lowest + step)
    return guess if not highest or guess < highest else lowest


def largest(rows: Sequence[Row]) -> Row | None:
    """The plan with the largest batch that fits; None if none fits."""
    fitting = [row for row in rows if row[2].fits]
    return max(fitting, key=lambda row: row[2].batch_size, default=None)


def about_largest(rows: Sequence[Row], topology: Topology) -> str:
    """One line that reports the largest batch that fits, and whether a larger one may fit."""
    found = largest(rows)
    too_large = min((n.batch_size for _, _, n in rows if not n.fits), default=None)
    if found is None:
        return f"largest batch that fits: none; {too_large} does not fit"
    _, config, needs = found
    line = f"largest batch that fits: {needs.batch_size}"
    if too_large is None:
        return f"{line}, or more: the search ended after {len(rows)} plans, all of which fit"
    if too_large - needs.batch_size > _rows(config, topology):
        return (
            f"{line}, or more: {too_large} does not fit; the search ended after {len(rows)} plans"
        )
    return f"{line}; {too_large} does not fit"


def _rows(config: ConfigDict, topology: Topology) -> int:
    """The number that must divide the batch size: data-parallel devices × accumulation steps."""
    sizes = _filled(config, topology)
    return sizes["data"] * sizes["fsdp"] * config.accumulation_steps


def what_would_fit(config: ConfigDict, needs: Needs) -> str:
    """One line about a program that does not fit, with settings that would probably fit."""
    topology = topology_called(needs.topology)
    have, fixed = topology.usable_bytes, needs.state_bytes
    line = (
        f"{config.name} at batch {needs.batch_size} needs {needs.peak_bytes / GIB:.2f} GiB a chip "
        f"of {needs.topology}, which has {have / GIB:.2f}: "
    )
    would = []
    rest = needs.peak_bytes - fixed
    rows = _rows(config, topology)
    batch = int(needs.batch_size * (have - fixed) / rest) // rows * rows if rest > 0 else 0
    if 0 < batch < needs.batch_size:
        would.append(f"--config.batch_size={batch}")
    for larger in slices(topology.chip):
        if needs.peak_bytes * topology.num_chips <= have * larger.num_chips:
            would.append(f"--topology={larger.name}")
            break
    if config.model.get("remat", "full") != "full":
        would.append("--config.model.remat=full")
    others = needs.mesh.get("tensor", 1) * needs.mesh.get("sequence", 1) * topology.copies
    if needs.mesh["fsdp"] < topology.num_chips // others:
        would.append(
            f"--config.mesh.data={topology.copies} "
            f"--config.mesh.fsdp={topology.num_chips // others}"
        )
    return line + (f"try {', or '.join(would)}" if would else "it needs chips with more memory")
