"""Estimates the memory, FLOPs and traffic of a run analytically, without compiling it."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from diffjax.loop.compiled_step import train_step_of
from diffjax.objectives.base import Progress, conditioned_batch
from diffjax.performance.hlo.counts import Collective
from diffjax.performance.planning.compiled import (
    Needs,
    bytes_per_device,
    described,
    set_up_on,
    state_memory,
)
from diffjax.performance.planning.gpus import absent_mesh
from diffjax.performance.planning.lower_bounds import minimum_slow_bytes
from diffjax.performance.planning.topologies import Topology
from diffjax.runs.setup import Setup
from diffjax.training.flops import matrix_flops


def model_of(config: ConfigDict, topology: Topology, program: str = "training") -> Needs:
    """Estimates what a program needs on each chip with an analytic model; nothing is compiled.

        state         exact, from the shardings of parameters, optimizer state and averages
        activations   the residuals that JAX saves for the backward pass before any compiler
                      optimisation, divided by the data-parallel devices (data x fsdp)
        gradients     as many bytes as the parameters that are trained
        FLOPs         counted in the traced program, divided by the number of chips
        traffic       the lower bound for sharded parameters (`minimum_wire_bytes`); traffic of
                      activations is not included

    Args:
        config: a resolved config.
        topology: any chips of `CHIPS`.
        program: `"training"` or `"sampling"`.

    Raises:
        UserError: the mesh or the batch does not fit the chips.
    """
    mesh = absent_mesh(config, topology)
    config = ConfigDict(config.to_dict())
    if "attention" in config.model:
        config.model.attention = "xla"  # The residuals of fused kernels can't be traced.
    setup = set_up_on(config, mesh)
    about = described(setup, topology, program)
    memory, flops = state_memory(setup, program), about["model_flops"]
    if program == "training":
        memory["gradients"] = bytes_per_device(setup.abstract.params)
        memory["activations"] = activation_bytes(setup)
        flops = _executed(setup) / mesh.size
    traffic = about["minimum_wire_bytes"]
    slow = minimum_slow_bytes(setup, topology.num_slices) if program == "training" else 0.0
    least = Collective("all-gather and reduce-scatter", mesh.size, 0, traffic, min(slow, traffic))
    return Needs(
        **about,
        compiled=False,
        fits=sum(memory.values()) <= topology.usable_bytes,
        memory=memory,
        peak_bytes=sum(memory.values()),
        flops=flops,
        collectives=(least,) if traffic else (),
        memory_traffic_bytes=None,
    )


def _executed(setup: Setup) -> float:
    key = jax.eval_shape(lambda: jax.random.key(0))
    batch = setup.wired.batch_shapes(setup.config.batch_size)
    return matrix_flops(train_step_of(setup), setup.abstract, key, batch)


def activation_bytes(setup: Setup) -> int:
    """Bytes of the activations that one device saves for the backward pass, without parameters.

    A compiler may save fewer, because it recomputes what is cheap.
    """
    wired, objective = setup.wired, setup.wired.objective

    def backward(params: Any, key: Any, batch: Any) -> Any:
        progress = Progress(
            jnp.zeros((), jnp.int32), objective.init_memory(), setup.config.num_steps
        )

        def loss(params: Any) -> jax.Array:
            seen = conditioned_batch(batch, wired.condition)
            return jnp.mean(objective(wired.apply, params, params, key, seen, progress)[0])

        return jax.vjp(loss, params)[1]

    key = jax.eval_shape(lambda: jax.random.key(0))
    batch = wired.batch_shapes(setup.config.batch_size)
    kept = jax.tree.leaves(jax.eval_shape(backward, wired.params_shape, key, batch))
    weights = {leaf.shape for leaf in jax.tree.leaves(wired.params_shape) if leaf.ndim > 1}
    rows = setup.mesh.shape["data"] * setup.mesh.shape["fsdp"]
    return sum(_bytes(leaf) for leaf in kept if leaf.shape not in weights) // rows


def _bytes(leaf: Any) -> int:
    if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
        return 0
    return int(np.prod(leaf.shape)) * leaf.dtype.itemsize
