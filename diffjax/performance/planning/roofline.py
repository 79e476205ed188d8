"""A roofline model: lower bounds on the time of a program from its FLOPs and bytes."""

from collections.abc import Mapping
from dataclasses import dataclass

from diffjax.performance.planning.compiled import Needs
from diffjax.performance.planning.topologies import Topology


@dataclass(frozen=True)
class Estimate:
    """Lower bounds on the seconds of one execution of a program.

    Attributes:
        parts: seconds by resource: `matrix products`, `memory`, `links`, and `links between
            slices` if there are several slices. Unknown parts are left out.
    """

    parts: Mapping[str, float]

    @property
    def seconds(self) -> float:
        """The longest part: a lower bound even if all parts overlap completely."""
        return max(self.parts.values())

    @property
    def bound_by(self) -> str:
        """Name of the longest part."""
        return max(self.parts, key=lambda part: self.parts[part])


def estimate(needs: Needs, topology: Topology) -> Estimate:
    """Roofline estimate: each amount of work divided by the chip's published peak rate.

        matrix products   executed FLOPs / peak in bfloat16, half of it for float32 on GPUs (TF32)
        memory            bytes read and written / memory bandwidth
        links             bytes received / bandwidth of all links together; between slices (or
                          GPU machines), bytes received from others / network bandwidth

    No program is that fast. The model ignores small matrices, latency, rings that use only some of
    the links, and parts that can't overlap with others. Good training programs reach 40 % to 60 %
    of the first line.

    Example:
        >>> from diffjax.performance.planning.topologies import topology_called
        >>> needs = Needs(
        ...     "training", "v5e:2x2", {}, 8, 1, True, True, {}, 0, 197e12, 197e12, (), 0.0, 0.0
        ... )
        >>> estimate(needs, topology_called("v5e:2x2"))
        Estimate(parts={'matrix products': 1.0, 'links': 0.0, 'memory': 0.0})
    """
    chip = topology.chip
    half = chip.platform == "gpu" and needs.compute_type == "float32"
    parts = {
        "matrix products": needs.flops / (chip.flops / 2 if half else chip.flops),
        "links": (needs.wire_bytes - needs.slow_bytes) / chip.link_bytes_per_second,
    }
    if topology.num_slices > 1 and chip.slow_bytes_per_second:
        parts["links between slices"] = needs.slow_bytes / chip.slow_bytes_per_second
    if needs.memory_traffic_bytes is not None:
        parts["memory"] = needs.memory_traffic_bytes / chip.memory_bytes_per_second
    return Estimate(parts)


def device_hours(seconds: float, num_steps: int, num_chips: int) -> float:
    """Device hours of a whole run: seconds per step × steps × chips / 3600.

    Example:
        >>> device_hours(0.36, 10_000, 16)
        16.0
    """
    return seconds * num_steps * num_chips / 3_600
