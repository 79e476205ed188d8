"""Writes the table of published networks in docs/planning.md, by the analytic model.

python -m tests.support.plans_page
"""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from configs import published
from diffjax.performance.hlo.counts import Collective
from diffjax.performance.planning.analytic import model_of
from diffjax.performance.planning.compiled import Needs
from diffjax.performance.planning.roofline import estimate
from diffjax.performance.planning.topologies import CHIPS, GIB, Topology, slices, topology_called

PAGE = Path(__file__).parents[2] / "docs" / "planning.md"
BEGIN, END = "<!-- published networks -->\n", "<!-- end -->\n"
NETWORKS = ("SDXL", "SD3.5-Large", "FLUX.1-dev", "FLUX.2-dev")
SAMPLED, TUNED = ("v5e", "h100"), ("v5p", "h100")
"""The chips of the plans."""
IMAGES_A_CHIP = {"sampling": 1, "training": 4}
_BYTES = {"sampling": 4, "training": 16}  # a parameter: of weights, and gradient and two moments
_COMPUTED = 2  # bytes of a parameter in bfloat16


def smallest(name: str, chip: str, program: str) -> Needs:
    """The plan on the fewest chips that fit, all of them one group of FSDP."""
    num_parameters = published.FAMILIES[name].sizes[name].num_parameters
    needs = None
    for topology in slices(CHIPS[chip]):
        if _BYTES[program] * num_parameters > topology.num_chips * topology.usable_bytes:
            continue  # without a trace
        config = published.get_config(f"model={name}")
        config.batch_size = IMAGES_A_CHIP[program] * topology.num_chips
        needs = model_of(config, topology, program)
        if needs.fits:
            return needs
    raise ValueError(f"{name} fits no {chip}: {needs}")


def with_lora(full: Needs, chip: str) -> Needs:
    """The plan of LoRA on the fewest chips that fit, from that of full tuning.

    Weights stay as they are: without moments, without their gradients, which are a third of the
    model's products, and without the traffic of these. The factors, some 1 % of the weights, are
    left out.
    """
    chips = topology_called(full.topology).num_chips
    weights = 4 * full.num_params
    activations = full.memory["activations"]  # of as many images a chip
    for topology in slices(CHIPS[chip]):
        n = topology.num_chips
        memory = {"parameters": weights // n, "activations": activations}
        if sum(memory.values()) > topology.usable_bytes:
            continue
        traffic = 2.0 * _COMPUTED * full.num_params * (n - 1) / n
        gathers = Collective("all-gather", n, 0, traffic, _slow(traffic, topology))
        return replace(
            full,
            topology=topology.name,
            mesh={"fsdp": n},
            batch_size=full.batch_size * n // chips,
            memory=memory,
            peak_bytes=sum(memory.values()),
            flops=full.flops - full.model_flops / 3,
            collectives=(gathers,) if n > 1 else (),
        )
    raise ValueError(f"LoRA fits no {chip}")


def _slow(traffic: float, topology: Topology) -> float:
    return traffic * (1.0 - 1.0 / topology.num_slices) if topology.num_slices > 1 else 0.0


def row(name: str, what: str, needs: Needs) -> str:
    """A line of the table."""
    topology = topology_called(needs.topology)
    roofline = estimate(needs, topology)
    sharding = f"fsdp={needs.mesh['fsdp']}"
    cells = (
        f"`{name}`",
        what,
        f"`{needs.topology}`",
        sharding,
        f"{needs.state_bytes / GIB:.2f}",
        f"{needs.peak_bytes / GIB:.1f} of {topology.usable_bytes / GIB:.1f}",
        f"{needs.flops / 1e12:,.0f}",
        f"{roofline.seconds:.3g}",
        f"{needs.batch_size / roofline.seconds:.3g}",
        roofline.bound_by,
    )
    return f"| {' | '.join(cells)} |"


def rows() -> Iterator[str]:
    """All lines, which take some minutes."""
    for name in NETWORKS:
        for chip in SAMPLED:
            yield row(name, "sampling", smallest(name, chip, "sampling"))
        for chip in TUNED:
            full = smallest(name, chip, "training")
            yield row(name, "LoRA", with_lora(full, chip))
            yield row(name, "full tuning", full)


def main() -> None:
    """Writes the table between its two marks."""
    head = (
        "| network | program | fewest chips | sharding | state GiB | peak GiB | TFLOP a chip "
        "| least s | images/s | bound by |\n" + "|---" * 10 + "|\n"
    )
    lines = [f"{line}\n" for line in rows()]
    text = PAGE.read_text(encoding="utf-8")
    before, _, rest = text.partition(BEGIN)
    after = rest.partition(END)[2]
    PAGE.write_text(f"{before}{BEGIN}{head}{''.join(lines)}{END}{after}", encoding="utf-8")


if __name__ == "__main__":
    main()
