"""The least that a run's program computes and receives, whatever a compiler makes of it."""

import jax
import numpy as np
from jax.sharding import NamedSharding
from ml_collections import ConfigDict

from diffjax.errors import UserError
from diffjax.loop.loop import train_step_of
from diffjax.runs.setup import Setup, set_up
from diffjax.training.flops import matrix_flops

_OTHER_DATA = ("data", "fsdp", "sequence")  # axes along which devices see other images or tokens


def model_flops(setup: Setup, program: str) -> float:
    """Matrix FLOPs of a program over all devices, with nothing computed twice."""
    config = ConfigDict(setup.config.to_dict())
    if "remat" in config.model:
        config.model.remat = "none"
    if "attention" in config.model:
        config.model.attention = "xla"  # Kernels of their own can't be looked into.
    wired = setup.wired
    plain = set_up(config, wired.image_shape, wired.num_classes, setup.mesh)
    key = jax.eval_shape(lambda: jax.random.key(0))
    if program == "sampling":
        return forward_flops(plain)
    batch = plain.wired.batch_shapes(config.batch_size)
    return matrix_flops(train_step_of(plain), plain.abstract, key, batch)


def forward_flops(setup: Setup) -> float:
    """Matrix FLOPs of drawing a batch of samples: one evaluation, times their number."""
    wired, batch_size = setup.wired, setup.config.batch_size
    shape = (batch_size, *wired.image_shape)
    x, t = jax.ShapeDtypeStruct(shape, "float32"), jax.ShapeDtypeStruct((batch_size,), "float32")
    labels = jax.ShapeDtypeStruct((batch_size,), "int32")
    once = matrix_flops(
        lambda params, x, t, labels: wired.predict(params)(x, t, labels),
        wired.params_shape, x, t, labels,
    )  # fmt: skip
    if wired.recipe.nfe is None:
        raise UserError("this solver chooses its steps: its cost can't be planned")
    return once * wired.recipe.nfe


def minimum_wire_bytes(setup: Setup, program: str) -> float:
    """What one device receives at least where split parameters are gathered to be used (FSDP).

    Of each parameter of b bytes in the compute type, split over n devices that see other images or
    tokens, with m copies of it: it is gathered before the forward pass and again before the
    backward one, its gradient is scattered over the n, and what remains is summed over the copies.

        2·b·(n−1)/n + b·(n−1)/n + 2·(b/n)·(m−1)/m

    A batch in parts gathers and scatters for each of them, and sums over copies once. Sampling
    gathers once an evaluation. A compiler can do with less where activations are smaller than
    parameters, and moves those.
    """
    total = 0.0
    mesh = setup.mesh
    rows = int(np.prod([mesh.shape[axis] for axis in _OTHER_DATA]))
    itemsize = np.dtype(jax.numpy.dtype(setup.config.model.get("dtype", "float32"))).itemsize
    passes, parts = 2.0 * setup.accumulation_steps, setup.accumulation_steps
    if program == "sampling":
        passes = float(setup.wired.recipe.nfe or 0)
    for leaf in jax.tree.leaves(setup.abstract.params):
        split, over_rows = _splits(leaf.sharding)
        held = leaf.size * itemsize / (split // over_rows)
        gathered = held * (over_rows - 1) / over_rows
        copies = rows // over_rows
        reduced = parts * gathered + 2 * held / over_rows * (copies - 1) / copies
        total += passes * gathered + (reduced if program == "training" else 0.0)
    return total


def minimum_slow_bytes(setup: Setup, num_slices: int) -> float:
    """What one device receives at least from other slices, of the same traffic in training.

    Each slice receives what the others have of all gradients, and of all parameters: once where
    `data` goes across slices, and twice where `fsdp` does; its devices share that.
    """
    if num_slices == 1:
        return 0.0
    itemsize = np.dtype(jax.numpy.dtype(setup.config.model.get("dtype", "float32"))).itemsize
    held = setup.wired.num_params * itemsize
    times = 2 if setup.mesh.shape["data"] % num_slices == 0 else 3 * setup.accumulation_steps
    return times * held * (num_slices - 1) / num_slices / (setup.mesh.size / num_slices)


def _splits(sharding: NamedSharding) -> tuple[int, int]:
    """Over how many devices an array is split, and over how many of those that see other data."""
    split = over_rows = 1
    for axes in sharding.spec:
        for axis in (axes,) if isinstance(axes, str) else axes or ():
            split *= sharding.mesh.shape[axis]
            if axis in _OTHER_DATA:
                over_rows *= sharding.mesh.shape[axis]
    return split, over_rows
