"""Lower bounds on the FLOPs and the traffic of a program, whatever the compiler does."""

import jax
import numpy as np
from jax.sharding import NamedSharding
from ml_collections import ConfigDict

from diffjax.errors import UserError
from diffjax.loop.compiled_step import train_step_of
from diffjax.runs.parts import build_parts
from diffjax.runs.setup import Setup
from diffjax.training.flops import matrix_flops

_OTHER_DATA = (
    "data",
    "fsdp",
    "sequence",
)  # axes along which devices have different images or tokens


def model_flops(setup: Setup, program: str) -> float:
    """Matrix FLOPs of a program summed over all devices, without recomputation.

    Counted in the traced program, with rematerialisation off and attention as matrix products.

    Args:
        setup: the setup of the run.
        program: `"training"`, one step, or `"sampling"`, one batch.
    """
    config = ConfigDict(setup.config.to_dict())
    if "remat" in config.model:
        config.model.remat = "none"
    if "attention" in config.model:
        config.model.attention = "xla"  # FLOPs inside fused kernels can't be counted.
    wired = setup.wired
    plain = Setup.of(build_parts(config, wired.image_shape, wired.condition, setup.mesh))
    key = jax.eval_shape(lambda: jax.random.key(0))
    if program == "sampling":
        return forward_flops(plain)
    batch = plain.wired.batch_shapes(config.batch_size)
    return matrix_flops(train_step_of(plain), plain.abstract, key, batch)


def forward_flops(setup: Setup) -> float:
    """Matrix FLOPs of sampling one batch: those of one network evaluation times the NFE.

    Raises:
        UserError: the solver chooses its own steps, so that its NFE is not known in advance.
    """
    wired, batch_size = setup.wired, setup.config.batch_size
    shape = (batch_size, *wired.image_shape)
    x, t = jax.ShapeDtypeStruct(shape, "float32"), jax.ShapeDtypeStruct((batch_size,), "float32")
    cond = wired.condition.abstract(batch_size)
    once = matrix_flops(
        lambda params, x, t, cond: wired.predict(params)(x, t, cond),
        wired.params_shape, x, t, cond,
    )  # fmt: skip
    if wired.recipe.nfe is None:
        raise UserError(
            "this solver chooses its steps adaptively, so its cost can't be planned; use a solver "
            "with a fixed number of steps"
        )
    return once * wired.recipe.nfe


def minimum_wire_bytes(setup: Setup, program: str) -> float:
    """Lower bound on the bytes one device receives when sharded parameters are gathered (FSDP).

    A parameter has b bytes in the compute type. It is sharded over n devices that process
    different images or tokens, and there are m copies of each shard. The parameter is all-gathered
    before the forward pass and again before the backward pass. Its gradient is reduce-scattered
    over the n devices, and the shards are then all-reduced over the m copies:

        2·b·(n−1)/n + b·(n−1)/n + 2·(b/n)·(m−1)/m

    With gradient accumulation, each part of the batch gathers and scatters, and the all-reduce
    over copies happens once. Sampling gathers once per network evaluation. A compiler can need
    less traffic where activations are smaller than parameters, by moving the activations instead.
    """
    total = 0.0
    mesh = setup.mesh
    rows = int(np.prod([mesh.shape[axis] for axis in _OTHER_DATA]))
    itemsize = np.dtype(jax.numpy.dtype(setup.config.model.get("dtype", "float32"))).itemsize
    passes, parts = 2.0 * setup.accumulation_steps, setup.accumulation_steps
    if program == "sampling":
        passes = float(setup.wired.recipe.nfe or 0)
    state = setup.abstract
    trained = len(jax.tree.leaves(state.params))
    for i, leaf in enumerate(jax.tree.leaves((state.params, state.frozen))):
        split, over_rows = _splits(leaf.sharding)
        held = leaf.size * itemsize / (split // over_rows)
        gathered = held * (over_rows - 1) / over_rows
        copies = rows // over_rows
        reduced = parts * gathered + 2 * held / over_rows * (copies - 1) / copies
        total += passes * gathered + (reduced if program == "training" and i < trained else 0.0)
    return total


def minimum_slow_bytes(setup: Setup, num_slices: int) -> float:
    """Lower bound on the bytes one device receives from other slices in a training step.

    Where the `data` axis crosses slices, gradients are all-reduced: two times the bytes b of all
    parameters. Where `fsdp` crosses them, parameters are gathered twice and gradients scattered
    once for each part of the batch: three times b. A slice receives (s − 1)/s of that for s
    slices, and its devices share it equally.
    """
    if num_slices == 1:
        return 0.0
    itemsize = np.dtype(jax.numpy.dtype(setup.config.model.get("dtype", "float32"))).itemsize
    held = setup.wired.num_params * itemsize
    times = 2 if setup.mesh.shape["data"] % num_slices == 0 else 3 * setup.accumulation_steps
    return times * held * (num_slices - 1) / num_slices / (setup.mesh.size / num_slices)


def _splits(sharding: NamedSharding) -> tuple[int, int]:
    """Number of shards of an array, and how many of them lie along axes with different data."""
    split = over_rows = 1
    for axes in sharding.spec:
        for axis in (axes,) if isinstance(axes, str) else axes or ():
            split *= sharding.mesh.shape[axis]
            if axis in _OTHER_DATA:
                over_rows *= sharding.mesh.shape[axis]
    return split, over_rows
