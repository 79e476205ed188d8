"""The least time that a chip can take for what a program does."""

from collections.abc import Mapping
from dataclasses import dataclass

from diffjax.performance.planning.compiled import Needs
from diffjax.performance.planning.topologies import Topology


@dataclass(frozen=True)
class Estimate:
    """Seconds that one run of a program takes at least.

    Attributes:
        parts: seconds by what takes them: `matrix products`, `memory`, `links`, and `links between
            slices` where there are several. Those that are unknown are left out.
    """

    parts: Mapping[str, float]

    @property
    def seconds(self) -> float:
        """The longest part, as if all of them ran at once."""
        return max(self.parts.values())

    @property
    def bound_by(self) -> str:
        """Which part that is."""
        return max(self.parts, key=lambda part: self.parts[part])


def estimate(needs: Needs, topology: Topology) -> Estimate:
    """A roofline: work by the most that the chip does of it in a second.

        matrix products   executed FLOPs / peak in bfloat16, half of it for float32 on GPUs (TF32)
        memory            bytes read and written / bandwidth
        links             bytes received / bandwidth of all links together; between slices, or
                          machines of GPUs, those received from others / bandwidth of the network

    No program runs that fast: products of small sides, latency, and rings that use some links alone
    are left out, as is any part that can't be done while others are. Good training programs reach
    40 % to 60 % of the first line.

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
    """Of a whole run: steps, by their time, by chips.

    Example:
        >>> device_hours(0.36, 10_000, 16)
        16.0
    """
    return seconds * num_steps * num_chips / 3_600
