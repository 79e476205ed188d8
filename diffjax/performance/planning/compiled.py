"""Compiles a run's real program for devices that are not attached, and counts what it needs."""

import re
import time
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any, cast

import jax
import numpy as np
from jax.sharding import Mesh
from ml_collections import ConfigDict

from diffjax.conditions import Condition, of_classes
from diffjax.data import DataSet
from diffjax.errors import UserError
from diffjax.loop.compiled_step import compile_train_step
from diffjax.models.layers.common import is_stacked
from diffjax.performance.hlo import counts, products
from diffjax.performance.hlo.parser import parse
from diffjax.performance.hlo.residuals import residual_bytes
from diffjax.performance.planning.gpus import gpu_mesh
from diffjax.performance.planning.lower_bounds import minimum_wire_bytes, model_flops
from diffjax.performance.planning.topologies import MEGACORE, Topology
from diffjax.runs.checks import check_config
from diffjax.runs.samples.model import Model
from diffjax.runs.setup import Setup, set_up
from diffjax.spec import build
from diffjax.training.sharding import make_mesh, replicated
from diffjax.training.state import LIVE

PROGRAMS = ("training", "sampling")
_UNITS = {"K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40, "": 1}


@dataclass(frozen=True)
class Needs:
    """The memory, FLOPs and traffic that one execution of a program needs on each chip.

    Attributes:
        program: `"training"` (one training step) or `"sampling"` (all solver steps of one batch).
        topology: the name of the topology, for example `v5e:4x4`.
        mesh: number of devices along each mesh axis.
        batch_size: images in one execution, summed over all chips.
        num_params: number of parameters of the network.
        compiled: True if the program was compiled; False for an analytic model.
        fits: whether the peak memory is within the usable memory of a chip. Where the compiler
            ran out of memory, every number except `peak_bytes` is analytic.
        memory: bytes on one chip by kind (parameters, optimizer, activations, …); they add up
            to `peak_bytes`.
        peak_bytes: total bytes on one chip.
        flops: FLOPs of the executed matrix products on one chip, recomputation included.
        model_flops: FLOPs of the model's matrix products on one chip, without recomputation.
        collectives: traffic between chips, by kind of collective and number of devices.
        minimum_wire_bytes: lower bound on the bytes one chip receives because parameters are
            sharded.
        memory_traffic_bytes: bytes read from and written to main memory; None if unknown.
        whole_stacks: arrays that hold an unsharded stack of weights, as text.
        largest: the largest arrays, as text.
        unknown_loops: names of loops counted as one iteration, because their trip count is
            unknown.
        seconds: wall-clock seconds of tracing and compiling.
        cpu_seconds: CPU seconds of tracing and compiling.
        compute_type: dtype in which the network computes.
    """

    program: str
    topology: str
    mesh: Mapping[str, int]
    batch_size: int
    num_params: int
    compiled: bool
    fits: bool
    memory: Mapping[str, int]
    peak_bytes: int
    flops: float
    model_flops: float
    collectives: tuple[counts.Collective, ...]
    minimum_wire_bytes: float
    memory_traffic_bytes: float | None
    whole_stacks: tuple[str, ...] = ()
    largest: tuple[str, ...] = ()
    unknown_loops: tuple[str, ...] = ()
    seconds: float = 0.0
    cpu_seconds: float = 0.0
    compute_type: str = "bfloat16"

    @property
    def state_bytes(self) -> int:
        """Bytes of parameters, optimizer state and weight averages on one chip."""
        return sum(self.memory.get(kind, 0) for kind in ("parameters", "optimizer", "averages"))

    @property
    def wire_bytes(self) -> float:
        """Bytes that one chip receives from other chips."""
        return sum(one.wire_bytes for one in self.collectives)

    @property
    def slow_bytes(self) -> float:
        """Bytes that one chip receives from other slices, over the slow network."""
        return sum(one.slow_bytes for one in self.collectives)


def needs_from(fields: Mapping[str, Any]) -> Needs:
    """Restores a `Needs` from the plain dict that another process returned."""
    exchanges = tuple(counts.Collective(**one) for one in fields["collectives"])
    texts = {name: tuple(fields[name]) for name in ("whole_stacks", "largest", "unknown_loops")}
    return Needs(**{**fields, **texts, "collectives": exchanges})


def expected_data(config: ConfigDict) -> tuple[tuple[int, int, int], Condition]:
    """Image shape and kind of condition from `config.expected`, or else from the data set itself.

    Raises:
        UserError: `config.expected` is not a valid image shape, or the data set can't be loaded.
    """
    if "expected" not in config:
        dataset: DataSet = build(config.data)
        return dataset.image_shape, dataset.condition
    shape = config.expected.image_shape
    if len(shape) != 3 or not all(isinstance(size, int) and size > 0 for size in shape):
        raise UserError(
            f"config.expected.image_shape={shape} must be (height, width, channels), each at "
            "least 1"
        )
    height, width, channels = shape
    if "condition" in config.expected:
        return (height, width, channels), build(config.expected.condition)
    return (height, width, channels), of_classes(config.expected.num_classes)


def compile_for(config: ConfigDict, topology: Topology, program: str = "training") -> Needs:
    """Compiles a run's real program for chips that are not attached, and counts what it needs.

    The process needs the compiler (`libtpu`, or XLA for CUDA) and `JAX_PLATFORMS=cpu`.

    Args:
        config: a resolved config.
        topology: any chips of `CHIPS`.
        program: one of `PROGRAMS`.

    Raises:
        UserError: the mesh or the batch does not fit the chips, or the compiler is missing.
    """
    mesh = _MESHES[topology.chip.platform](config, topology)
    return needs_on(config, mesh, topology, program)


def tpu_mesh(config: ConfigDict, topology: Topology) -> Mesh:
    """A config's mesh over TPU devices that libtpu describes but that are not attached.

    Raises:
        UserError: the mesh does not fit the TPUs, libtpu is missing or does not know the topology.
    """
    from jax.experimental import topologies

    how: dict[str, Any] = {"num_slices": topology.copies} if topology.copies > 1 else {}
    if topology.chip.name in MEGACORE:
        how["chip_config_name"] = "megacore"
    try:
        described = topologies.get_topology_desc(
            platform="tpu", topology_name=topology.slice_name, **how
        )
    except Exception as error:
        reason = " ".join(str(error).split())[:300]
        if find_spec("libtpu") is None:
            reason = (
                "libtpu is missing: pip install 'diffjax[plan]', or pip install --target FOLDER "
                "libtpu and --libtpu=FOLDER, or --analytic"
            )
        raise UserError(f"can't compile for {topology.name}: {reason}") from None
    devices = list(described.devices)
    if len(devices) != topology.num_chips:
        raise UserError(
            f"{topology.name} has {len(devices)} devices instead of {topology.num_chips}: "
            "planning does not support that yet"
        )
    return make_mesh(**config.mesh, devices=devices)


_MESHES = {"tpu": tpu_mesh, "gpu": gpu_mesh}


def set_up_on(config: ConfigDict, mesh: Mesh) -> Setup:
    """Sets up a run on the devices of a mesh, which need not be attached.

    Raises:
        UserError: training would refuse it: the mesh, the batch or its parts do not fit.
    """
    check_config(config)
    return set_up(config, *expected_data(config), mesh)


def needs_on(
    config: ConfigDict, mesh: Mesh, topology: Topology, program: str = "training"
) -> Needs:
    """Compiles a config's program for a mesh and returns what it needs; nothing is executed.

    Args:
        config: resolved.
        mesh: the mesh of devices that need not be attached.
        topology: the topology of these devices, for the memory that a program may use.
        program: `"training"`, one step, or `"sampling"`, one batch.

    Raises:
        UserError: the mesh, the batch or the parts of the config do not fit.
    """
    setup = set_up_on(config, mesh)
    began, cpu_began = time.perf_counter(), time.process_time()
    try:
        executable = _compile(setup, program)
    # JAX has no public name for XLA's error.
    except Exception as error:
        used = used_bytes(str(error))
        if used is None:
            raise
        return too_large(setup, topology, program, used)
    text = executable.as_text()
    seconds = time.perf_counter() - began, time.process_time() - cpu_began
    # The number of steps is an argument of the sampler, so its text does not contain it. The last
    # network evaluation comes after the loop.
    steps = setup.wired.recipe.num_steps - 1 if program == "sampling" else None
    module = parse(text, unknown_trips=steps)
    kept = residual_bytes(module) if program == "training" else 0
    memory = _memory(setup, program, executable.memory_analysis(), kept)
    slice_size = topology.slice_size if topology.num_slices > 1 else 0
    return Needs(
        **described(setup, topology, program),
        compiled=True,
        # XLA for CUDA also compiles programs that do not fit.
        fits=sum(memory.values()) <= topology.usable_bytes,
        memory=memory,
        peak_bytes=sum(memory.values()),
        flops=products.compiled_matrix_flops(module),
        collectives=tuple(counts.collectives(module, slice_size)),
        memory_traffic_bytes=counts.memory_bytes(module),
        whole_stacks=tuple(map(_text, counts.whole_stacks(module, stacked_shapes(setup)))),
        largest=tuple(map(_text, counts.buffers(module, 8))),
        unknown_loops=module.unknown_loops,
        seconds=seconds[0],
        cpu_seconds=seconds[1],
    )


def too_large(setup: Setup, topology: Topology, program: str, used: int) -> Needs:
    """The `Needs` of a program that the compiler rejected because it needs too much memory."""
    memory = state_memory(setup, program)
    memory["temporaries"] = max(0, used - sum(memory.values()))
    about = described(setup, topology, program)
    return Needs(
        **about,
        compiled=True,
        fits=False,
        memory=memory,
        peak_bytes=used,
        flops=about["model_flops"],
        collectives=(),
        memory_traffic_bytes=None,
    )


def used_bytes(message: str) -> int | None:
    """Bytes that a program needs according to the compiler's out-of-memory error; None for others.

    Example:
        >>> used_bytes("RESOURCE_EXHAUSTED: ... Used 20.00G of 15.75G hbm. Exceeded ...") / 2**30
        20.0
    """
    found = re.search(r"(?:Used |HLO temporaries \()([\d.]+)([KMGT]?)", message)
    if "RESOURCE_EXHAUSTED" not in message or found is None:
        return None
    return round(float(found[1]) * _UNITS[found[2]])


def _compile(setup: Setup, program: str) -> Any:
    if program == "sampling":
        model = Model(setup.parts.programs, setup.abstract.weights(LIVE))
        return model.lower(setup.wired.recipe, setup.config.batch_size).compile()
    key = jax.eval_shape(lambda: jax.random.key(0))
    key = jax.ShapeDtypeStruct(key.shape, key.dtype, sharding=replicated(setup.mesh))
    return compile_train_step(setup, cast(jax.Array, key))


def described(setup: Setup, topology: Topology, program: str) -> dict[str, Any]:
    """The fields of `Needs` that are known before the program is compiled."""
    return {
        "program": program,
        "topology": topology.name,
        "mesh": dict(setup.mesh.shape),
        "batch_size": setup.config.batch_size,
        "num_params": setup.wired.num_params,
        "model_flops": model_flops(setup, program) / setup.mesh.size,
        "minimum_wire_bytes": minimum_wire_bytes(setup, program),
        "compute_type": setup.config.model.get("dtype", "float32"),
    }


def bytes_per_device(tree: Any) -> int:
    """Bytes of sharded arrays on one device, without padding."""
    return sum(
        int(np.prod(leaf.sharding.shard_shape(leaf.shape))) * leaf.dtype.itemsize
        for leaf in jax.tree.leaves(tree)
    )


def state_memory(setup: Setup, program: str) -> dict[str, int]:
    """Bytes of a program's arguments on one device, by kind (parameters, optimizer, …)."""
    if program == "sampling":
        return {"parameters": bytes_per_device(setup.abstract.weights(LIVE))}
    state, rows = setup.abstract, setup.mesh.shape["data"] * setup.mesh.shape["fsdp"]
    batch = setup.wired.batch_shapes(setup.config.batch_size)
    return {
        "parameters": bytes_per_device(state.weights(LIVE)),
        "optimizer": bytes_per_device(state.opt_state),
        "averages": bytes_per_device(state.ema),
        "batch": sum(leaf.size * leaf.dtype.itemsize for leaf in batch.values()) // rows,
    }


def _memory(setup: Setup, program: str, analysis: Any, kept: int) -> dict[str, int]:
    """All memory of a compiled program by kind, in bytes on one device.

    Padding is what the arguments occupy beyond their own size. Activations are the temporaries
    that are kept for the backward pass.
    """
    memory = state_memory(setup, program)
    memory["padding"] = analysis.argument_size_in_bytes - sum(memory.values())
    made = analysis.output_size_in_bytes - analysis.alias_size_in_bytes
    activations = min(kept, analysis.temp_size_in_bytes)
    if program == "training":
        memory["activations"] = activations
    return memory | {
        "temporaries": analysis.temp_size_in_bytes - activations,
        "results": max(0, made),
        "code": analysis.generated_code_size_in_bytes,
    }


def stacked_shapes(setup: Setup) -> list[tuple[int, ...]]:
    """Unsharded shapes of the parameters that stack all blocks and are split over devices."""
    leaves = jax.tree_util.tree_leaves_with_path(setup.abstract.weights(LIVE))
    return [
        leaf.shape
        for path, leaf in leaves
        if is_stacked(jax.tree_util.keystr(path, simple=True, separator="/"))
        and leaf.size != int(np.prod(leaf.sharding.shard_shape(leaf.shape)))
    ]


def _text(buffer: counts.Buffer) -> str:
    shape = ",".join(map(str, buffer.shape))
    return f"{buffer.dtype}[{shape}] {buffer.num_bytes / 2**20:.1f} MiB"
