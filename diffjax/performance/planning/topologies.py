"""Published peak rates of TPUs and GPUs, and the topologies in which they are available."""

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

from diffjax.errors import UserError, nearest, whole_number

GIB = 2**30


@dataclass(frozen=True)
class Chip:
    """One accelerator with the figures that its manufacturer publishes.

    Attributes:
        name: its name in topologies, for example `v5e`.
        platform: `"tpu"` or `"gpu"`.
        flops: peak dense bfloat16 FLOP/s.
        memory_bytes: size of the main memory (HBM).
        memory_bytes_per_second: bandwidth of the main memory.
        link_bytes_per_second: bytes per second that one chip receives over all its fast links
            together, while it sends equally many.
        slow_bytes_per_second: bytes per second that one chip receives from other slices, or one
            GPU from other machines; 0 if unknown.
        source: where these figures are published.
    """

    name: str
    platform: str
    flops: float
    memory_bytes: int
    memory_bytes_per_second: float
    link_bytes_per_second: float
    slow_bytes_per_second: float
    source: str


def _tpu(
    name: str, tflops: float, gib: int, gb_per_second: float, gbit: float, slow_gbit: float
) -> Chip:
    """A TPU; `gbit` is the published bandwidth of all its links in one direction, in Gbit/s.

    `slow_gbit` is a chip's share of the bandwidth from a pod or host to the data centre's network.
    """
    source = f"cloud.google.com/tpu/docs/{name}"
    fast, slow = gbit / 8 * 1e9, slow_gbit / 8 * 1e9
    return Chip(name, "tpu", tflops * 1e12, gib * GIB, gb_per_second * 1e9, fast, slow, source)


def _gpu(
    name: str, tflops: float, gb: int, gb_per_second: float, nvlink: float, slow_gbit: float
) -> Chip:
    """A GPU; `nvlink` is the published bandwidth of both directions together, in GB/s.

    `slow_gbit` is the bandwidth of the network adapter that a DGX machine has for each GPU.
    """
    source = f"nvidia.com/en-us/data-center/{_PAGES.get(name, name)}"
    speeds = gb_per_second * 1e9, nvlink / 2 * 1e9, slow_gbit / 8 * 1e9
    return Chip(name, "gpu", tflops * 1e12, int(gb * 1e9), *speeds, source)


def _geforce(name: str, tflops: float, gib: int, gb_per_second: float, pcie: float) -> Chip:
    """A GPU without NVLink; `pcie` is the bandwidth of its slot in one direction, in GB/s.

    FLOP/s are those of dense bfloat16 with sums in float32: half of what is advertised for sums in
    float16.
    """
    source = "images.nvidia.com/aem-dam/Solutions/geforce/ada/nvidia-ada-gpu-architecture.pdf"
    return Chip(name, "gpu", tflops * 1e12, gib * GIB, gb_per_second * 1e9, pcie * 1e9, 0.0, source)


_PAGES = {"b200": "dgx-b200"}
"""Addresses of GPUs that differ from their names."""
CHIPS: Mapping[str, Chip] = MappingProxyType(
    {
        chip.name: chip
        for chip in (
            _tpu("v4", 275, 32, 1_228, 2_400, 0),
            _tpu("v5e", 197, 16, 819, 1_600, 25),
            _tpu("v5p", 459, 95, 2_765, 4_800, 50),
            _tpu("v6e", 918, 32, 1_640, 3_584, 100),
            _gpu("a100", 312, 80, 2_039, 600, 200),
            _gpu("h100", 989, 80, 3_350, 900, 400),
            _gpu("h200", 989, 141, 4_800, 900, 400),
            _gpu("b200", 2_250, 180, 8_000, 1_800, 400),
            _geforce("rtx4060", 30, 8, 272, 16),
            _geforce("rtx4090", 165, 24, 1_008, 32),
        )
    }
)

_FLAT = ("1x1", "2x2", "2x4", "4x4", "4x8", "8x8", "8x16", "16x16")
_CUBES = (
    "2x2x1", "2x2x2", "2x2x4", "2x4x4", "4x4x4", "4x4x8", "4x8x8", "8x8x8", "8x8x16", "8x16x16",
    "16x16x16",
)  # fmt: skip
_GPUS = ("1", "2", "4", "8", "2x8", "4x8", "8x8", "16x8", "32x8", "64x8", "128x8")
SHAPES: Mapping[str, tuple[str, ...]] = MappingProxyType(
    {"v4": _CUBES, "v5e": _FLAT, "v5p": _CUBES, "v6e": _FLAT}
    | dict.fromkeys(("a100", "h100", "h200", "b200"), _GPUS)
    | dict.fromkeys(("rtx4060", "rtx4090"), ("1", "2", "4", "8"))
)
"""Available slice shapes of each chip, smallest first; for GPUs, machines x GPUs per machine."""


USABLE: Mapping[str, float] = MappingProxyType({"tpu": 0.984, "gpu": 0.75})
"""Share of a chip's memory that programs can use: 15.75 of the 16 GiB of a v5e; on a GPU the part
that JAX allocates at its start, by the default of XLA_CLIENT_MEM_FRACTION."""
MEGACORE = ("v4", "v5p")
"""Chips whose two cores are one device."""


@dataclass(frozen=True)
class Topology:
    """A machine: chips of one kind, connected in a shape, in one or several slices.

    Attributes:
        chip: the kind of all chips.
        shape: chips along each direction; for GPUs, (machines, GPUs per machine).
        copies: number of slices of this shape, with slow links between them; 1 for one slice.
    """

    chip: Chip
    shape: tuple[int, ...]
    copies: int = 1

    @property
    def slice_name(self) -> str:
        """Name of one slice, for example `v5e:4x4`."""
        return f"{self.chip.name}:{'x'.join(map(str, self.shape))}"

    @property
    def name(self) -> str:
        """Name of the whole topology, as `topology_called` reads it."""
        return f"{self.copies}x{self.slice_name}" if self.copies > 1 else self.slice_name

    @property
    def num_chips(self) -> int:
        """Number of chips in all slices together."""
        return self.copies * math.prod(self.shape)

    @property
    def num_slices(self) -> int:
        """Number of groups of chips with fast links: TPU slices, or GPU machines."""
        machines = self.shape[0] if self.chip.platform == "gpu" and len(self.shape) > 1 else 1
        return self.copies * machines

    @property
    def slice_size(self) -> int:
        """Number of chips in one slice, with fast links between them."""
        return self.num_chips // self.num_slices

    @property
    def usable_bytes(self) -> int:
        """Bytes of memory on one chip that programs can use."""
        return int(USABLE[self.chip.platform] * self.chip.memory_bytes)


def topology_called(name: str) -> Topology:
    """The topology with this name: `chip:shape`, or `2xchip:shape` for several slices.

    Raises:
        UserError: no chip or shape has this name; the error lists the valid ones.

    Example:
        >>> topology_called("v5e:4x4").num_chips, topology_called("2xv5e:16x16").num_chips
        (16, 512)
    """
    several = re.fullmatch(r"([1-9]\d*)x(.+)", name)
    copies, one = (int(several[1]), several[2]) if several else (1, name)
    kind, _, shape = one.partition(":")
    if kind not in CHIPS:
        raise UserError(f"--topology={name}: no chip is called {kind!r}; {nearest(kind, CHIPS)}")
    if shape not in SHAPES[kind]:
        raise UserError(
            f"--topology={name}: shapes of {kind} are {', '.join(SHAPES[kind])}; the nearest is "
            f"{kind}:{_nearest_shape(kind, shape)}"
        )
    if copies > 1 and CHIPS[kind].platform == "gpu":
        raise UserError(
            f"--topology={name}: write several GPU machines as one shape, for example {kind}:2x8"
        )
    return Topology(CHIPS[kind], tuple(int(size) for size in shape.split("x")), copies)


def _nearest_shape(kind: str, shape: str) -> str:
    """The available shape whose number of chips is nearest."""
    sizes = [whole_number(size) or 1 for size in shape.split("x")]
    wanted = max(math.prod(sizes), 1)
    return min(SHAPES[kind], key=lambda other: abs(math.log(_chips(other) / wanted)))


def _chips(shape: str) -> int:
    return math.prod(int(size) for size in shape.split("x"))


def slices(chip: Chip) -> list[Topology]:
    """All single-slice topologies of a chip, smallest first."""
    return [topology_called(f"{chip.name}:{shape}") for shape in SHAPES[chip.name]]
