"""Writes the table of published networks in docs/planning.md, by the analytic model.

python -m tests.pages.plans
"""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

from configs import published
from diffjax.performance.hlo.counts import Collective
from diffjax.performance.planning.analytic import model_of
from diffjax.performance.planning.compiled import Needs
from diffjax.performance.planning.roofline import estimate
from diffjax.performance.planning.topologies import (
    CHIPS,
    GIB,
    Topology,
    slices,
    topology_called,
)

PAGE = Path(__file__).parents[2] / "docs" / "planning.md"
BEGIN, END = "<!-- published networks -->\n", "<!-- end -->\n"
NETWORKS = ("SD3.5-Large", "FLUX.1-dev", "FLUX.2-dev", "SDXL")
_COMPUTED = 2  # bytes of a parameter in bfloat16
_TRACED = topology_called("v5p:2x2x2")


class Program(NamedTuple):
    """What is planned.

    Attributes:
        name: in the table.
        traced: the program that is traced for it, `training` or `sampling`.
        images: the images of a chip.
        chips: the kinds of chips.
        kinds: the kinds of memory, and the bytes of each parameter in them.
        trains_weights: whether products have gradients of the weights, and chips exchange them.
    """

    name: str
    traced: str
    images: int
    chips: tuple[str, ...]
    kinds: dict[str, int]
    trains_weights: bool = False


PROGRAMS = (
    Program("sampling", "sampling", 1, ("v5e", "h100"), {"parameters": 4}),
    Program("LoRA", "training", 4, ("v5p", "h100"), {"parameters": 4}),
    Program(
        "full tuning",
        "training",
        4,
        ("v5p", "h100"),
        {"parameters": 4, "optimizer": 8, "gradients": 4},
        trains_weights=True,
    ),
)


def traced(name: str, program: Program) -> Needs:
    """The FLOPs and activations of a chip, which do not depend on the number of chips."""
    config = published.get_config(f"model={name}")
    config.batch_size = program.images * _TRACED.num_chips
    return model_of(config, _TRACED, program.traced)


def on(topology: Topology, needs: Needs, program: Program, nfe: int) -> Needs:
    """The plan on other chips, all of them one group of FSDP.

    Weights that LoRA leaves as they are have no moments and no gradients, which are a third of the
    model's products and of the traffic. Its factors, some 1 % of the weights, are left out.
    """
    n, slices_ = topology.num_chips, topology.num_slices
    memory = {kind: each * needs.num_params // n for kind, each in program.kinds.items()}
    passes = nfe if program.traced == "sampling" else 2 + program.trains_weights
    flops, held = needs.flops, _COMPUTED * needs.num_params
    if program.traced == "training":
        memory["activations"] = needs.memory["activations"]
        flops -= 0.0 if program.trains_weights else needs.model_flops / 3
    traffic = passes * held * (n - 1) / n
    slow = passes * held * (slices_ - 1) / slices_ / (n / slices_)
    gathers = Collective("all-gather", n, 0, traffic, min(slow, traffic))
    peak = sum(memory.values())
    return replace(
        needs,
        topology=topology.name,
        mesh={"fsdp": n},
        batch_size=program.images * n,
        memory=memory,
        peak_bytes=peak,
        fits=peak <= topology.usable_bytes,
        flops=flops,
        collectives=(gathers,) if n > 1 else (),
    )


def fewest(chip: str, needs: Needs, program: Program, nfe: int) -> Needs:
    """The plan on the fewest chips that fit."""
    plans = (on(topology, needs, program, nfe) for topology in slices(CHIPS[chip]))
    return next(plan for plan in plans if plan.fits)


def row(name: str, what: str, needs: Needs) -> str:
    """A line of the table."""
    topology = topology_called(needs.topology)
    roofline = estimate(needs, topology)
    cells = (
        f"`{name}`",
        what,
        f"`{needs.topology}`",
        f"fsdp={needs.mesh['fsdp']}",
        f"{needs.state_bytes / GIB:.1f}",
        f"{needs.peak_bytes / GIB:.1f} of {topology.usable_bytes / GIB:.1f}",
        f"{needs.flops / 1e12:,.0f}",
        f"{roofline.seconds:.3g}",
        f"{needs.batch_size / roofline.seconds:.3g}",
        roofline.bound_by,
    )
    return f"| {' | '.join(cells)} |"


def rows(name: str) -> Iterator[str]:
    """The lines of a network, which take a minute or two."""
    config = published.get_config(f"model={name}")
    nfe = config.sampling.num_steps * (1 + (config.sampling.guidance_scale != 1.0))
    found: dict[str, Needs] = {}
    for program in PROGRAMS:
        needs = found.get(program.traced) or traced(name, program)
        found[program.traced] = needs
        for chip in program.chips:
            yield row(name, program.name, fewest(chip, needs, program, nfe))


def main() -> None:
    """Writes the table between its two marks, network by network."""
    head = (
        "| network | program | fewest chips | sharding | state GiB | peak GiB | TFLOP a chip "
        "| least s | images/s | bound by |\n" + "|---" * 10 + "|\n"
    )
    lines = ""
    for name in NETWORKS:
        lines += "".join(f"{line}\n" for line in rows(name))
        before, _, rest = PAGE.read_text(encoding="utf-8").partition(BEGIN)
        after = rest.partition(END)[2]
        PAGE.write_text(f"{before}{BEGIN}{head}{lines}{END}{after}", encoding="utf-8")


if __name__ == "__main__":
    main()
