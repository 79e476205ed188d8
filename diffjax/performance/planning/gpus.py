"""Descriptions of NVIDIA GPUs, so that XLA compiles for GPUs that are not attached."""

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import numpy as np
from jax.sharding import Mesh
from ml_collections import ConfigDict

from diffjax.errors import UserError
from diffjax.performance.planning.topologies import Chip, Topology
from diffjax.training.sharding import make_mesh

# Autotuning measures kernels on a GPU, which is not available, and Triton's matrix products are
# selected by autotuning only.
XLA_FLAGS = "--xla_gpu_autotune_level=0 --xla_gpu_enable_triton_gemm=false"


@dataclass(frozen=True)
class Described:
    """The properties of a GPU that XLA needs besides its memory, as in XLA's own target files.

    Attributes:
        name: device name that the driver reports.
        capability: CUDA compute capability, (major, minor).
        own_instructions: whether it has instructions that later GPUs lack (`sm_90a`).
        cores: number of streaming multiprocessors.
        core_units: float32 units of each multiprocessor.
        shared_memory: bytes of shared memory of each multiprocessor.
        block_memory: bytes of it that one block may allocate.
        l2_cache: bytes of L2 cache.
        clock_ghz: highest clock rate, GHz.
    """

    name: str
    capability: tuple[int, int]
    own_instructions: bool
    cores: int
    core_units: int
    shared_memory: int
    block_memory: int
    l2_cache: int
    clock_ghz: float


_HOPPER = (9, 0), True, 132, 128, 233_472, 232_448, 52_428_800, 1.98
GPUS: Mapping[str, Described] = MappingProxyType(
    {
        "a100": Described(
            "NVIDIA A100-SXM4-80GB", (8, 0), False, 108, 64, 167_936, 166_912, 41_943_040, 1.41
        ),
        "h100": Described("NVIDIA H100 80GB HBM3", *_HOPPER),
        "h200": Described("NVIDIA H200", *_HOPPER),
        "b200": Described(
            "NVIDIA B200", (10, 0), True, 148, 128, 233_472, 232_448, 132_644_864, 1.965
        ),
    }
)

_TARGET = """
gpu_device_info {{
  threads_per_block_limit: 1024
  threads_per_warp: 32
  threads_per_core_limit: 2048
  shared_memory_per_block: 49152
  shared_memory_per_core: {gpu.shared_memory}
  shared_memory_per_block_optin: {gpu.block_memory}
  core_count: {gpu.cores}
  fpus_per_core: {gpu.core_units}
  block_dim_limit_x: 2147483647
  block_dim_limit_y: 65535
  block_dim_limit_z: 65535
  thread_dim_limit_x: 1024
  thread_dim_limit_y: 1024
  thread_dim_limit_z: 64
  registers_per_core_limit: 65536
  registers_per_block_limit: 65536
  memory_bandwidth: {chip.memory_bytes_per_second:.0f}
  device_memory_size: {chip.memory_bytes}
  l2_cache_size: {gpu.l2_cache}
  clock_rate_ghz: {gpu.clock_ghz}
  cuda_compute_capability {{
    major: {gpu.capability[0]}
    minor: {gpu.capability[1]}
    feature_extension: {extension}
  }}
  name: "{gpu.name}"
  dnn_version: "9.10.0"
}}
platform_name: "CUDA"
dnn_version_info {{
  major: 9
  minor: 10
}}
device_description_str: "{gpu.name}"
"""


def target_of(chip: Chip) -> str:
    """Describes a GPU as the text of XLA's `GpuTargetConfigProto`.

    Example:
        >>> from diffjax.performance.planning.topologies import CHIPS
        >>> "core_count: 132" in target_of(CHIPS["h100"])
        True
    """
    gpu = GPUS[chip.name]
    extension = "ACCELERATED_FEATURES" if gpu.own_instructions else "NONE"
    return _TARGET.format(chip=chip, gpu=gpu, extension=extension)


@dataclass(frozen=True)
class Absent:
    """A device that is not attached: only its number, its platform and its slice are known."""

    id: int
    platform: str
    process_index: int = 0
    slice_index: int = 0
    device_kind: str = ""


def absent_mesh(config: ConfigDict, topology: Topology) -> Mesh:
    """A config's mesh over `Absent` devices, of which only the number and the slice are known.

    Raises:
        UserError: the mesh does not fit the chips.
    """
    devices = [
        Absent(i, topology.chip.platform, slice_index=i // topology.slice_size)
        for i in range(topology.num_chips)
    ]
    return make_mesh(**config.mesh, devices=devices)


def gpu_mesh(config: ConfigDict, topology: Topology) -> Mesh:
    """A config's mesh over GPUs that XLA for CUDA compiles for, and that are not attached.

    The process needs `jax-cuda13-plugin` and `jax-cuda13-pjrt` in the same version as JAX,
    `JAX_PLATFORMS=cpu`, and this module's `XLA_FLAGS` in its environment.

    Raises:
        UserError: the mesh does not fit the GPUs, or the compiler is missing.
    """
    from jax.experimental import topologies

    # On real GPUs, JAX reports each machine as a slice. Described devices do not report it.
    mesh = absent_mesh(config, topology)
    shape = f"1x{topology.num_slices}x{topology.slice_size}"
    try:
        described: Any = topologies.get_topology_desc(
            platform="cuda", target_config=target_of(topology.chip), topology=shape
        )
    except Exception as error:
        reason = " ".join(str(error).split())[:300]
        raise UserError(
            f"can't compile for {topology.name}: {reason}; this needs jax-cuda13-plugin and "
            "jax-cuda13-pjrt in the version of jaxlib, installed or in --cuda=FOLDER"
        ) from None
    places = np.vectorize(lambda device: described.devices[device.id], otypes=[object])
    return Mesh(places(mesh.devices), mesh.axis_names, axis_types=mesh.axis_types)
