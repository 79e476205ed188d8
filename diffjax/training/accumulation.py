"""The gradient of a batch whose activations are in memory a part at a time.

An objective sees its whole batch in every part: times, noise, couplings and dropped labels are
drawn for all of it, from keys that know nothing of parts. Only the network is evaluated on some
rows at a time, and only their losses count. So what an objective draws does not depend on the
number of parts; what the network draws by itself (dropout) has a key of its own in each part.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from diffjax.errors import UserError
from diffjax.objectives.base import Objective, Progress, hidden_of, own_params
from diffjax.process.precond import Apply

Losses = Callable[[Apply, Any], tuple[Array, dict[str, Array]]]
"""`(apply, params) -> (loss[B], metrics[B])`: an objective on a batch."""
Gradient = tuple[tuple[Array, tuple[Array, dict[str, Array]]], Any]
"""`((mean loss, (loss[B], metrics[B])), gradient)`."""


def loss_and_gradient(losses_of: Losses, apply: Apply, params: Any, parts: int = 1) -> Gradient:
    """The mean loss over a batch and its gradient, in `parts` one after the other.

    Part i are the rows i, i + parts, i + 2·parts, …, so that each device has rows of each part.

    Args:
        losses_of: an objective on its batch. The loss of an example may depend on the whole batch's
            data and draws, but only on the network's output for that example.
        apply: the network.
        params: the gradient is with respect to these.
        parts: their number must divide the batch; 1 adds nothing to the program.

    Example:
        >>> x = jnp.arange(4.0)
        >>> def losses_of(apply, w):
        ...     return apply(w, x, x, None) ** 2, {"log_snr": x}
        >>> multiply = lambda w, x, *_, key: w * x
        >>> (loss, _), gradient = loss_and_gradient(losses_of, multiply, jnp.array(2.0), parts=2)
        >>> float(loss), float(gradient)
        (14.0, 14.0)
    """
    if parts == 1:
        return jax.value_and_grad(_mean_of(losses_of, apply), has_aux=True)(params)

    def add_part(total: Any, i: Array) -> tuple[Any, Any]:
        def part_of_mean(params: Any) -> tuple[Array, Any]:
            seen = losses_of(_on_part(apply, i, parts), params)
            losses, metrics = jax.tree.map(lambda rows: _rows(rows, i, parts), seen)
            return jnp.mean(losses) / parts, (losses, metrics)

        gradient, seen = jax.grad(part_of_mean, has_aux=True)(params)
        return jax.tree.map(jnp.add, total, gradient), seen

    nothing = jax.tree.map(jnp.zeros_like, params)
    gradient, seen = jax.lax.scan(add_part, nothing, jnp.arange(parts))
    losses, metrics = jax.tree.map(_in_order, seen)
    return (jnp.mean(losses), (losses, metrics)), gradient


def _mean_of(losses_of: Losses, apply: Apply) -> Callable[[Any], tuple[Array, Any]]:
    def mean_loss(params: Any) -> tuple[Array, Any]:
        losses, metrics = losses_of(apply, params)
        return jnp.mean(losses), (losses, metrics)

    return mean_loss


def _on_part(apply: Apply, i: Array, parts: int) -> Apply:
    """The network evaluated on part i alone, with zeros as its output for the other rows."""

    def evaluate(
        params: Any,
        x: Array,
        noise_label: Array,
        cond: Any,
        *,
        key: Array | None = None,
        **how: Any,
    ) -> Any:
        inputs = jax.tree.map(lambda rows: _rows(rows, i, parts), (x, noise_label, cond))
        own_key = None if key is None else jax.random.fold_in(key, i)
        output = apply(params, *inputs, key=own_key, **how)
        return jax.tree.map(lambda rows: _among_zeros(rows, i, parts), output)

    return evaluate


def _rows(x: Array, i: Array, parts: int) -> Array:
    """Rows i, i + parts, … of `[B, …]`, `[B/parts, …]`."""
    split = jnp.reshape(x, (-1, parts, *x.shape[1:]))
    return jax.lax.dynamic_index_in_dim(split, i, axis=1, keepdims=False)


def _among_zeros(x: Array, i: Array, parts: int) -> Array:
    """The inverse of `_rows`, `[B, …]`, with zeros in the other rows."""
    here = jnp.reshape(jnp.arange(parts) == i, (1, parts) + (1,) * (x.ndim - 1))
    return jnp.reshape(jnp.where(here, x[:, None], 0), (-1, *x.shape[1:]))


def _in_order(x: Array) -> Array:
    """What each part gave, `[parts, B/parts, …]`, in the order of the batch, `[B, …]`."""
    return jnp.reshape(jnp.swapaxes(x, 0, 1), (-1, *x.shape[2:]))


def check_parts(objective: Objective, parts: int, batch_size: int, device_rows: int) -> None:
    """Refuses parts that are no equal ones, or that the objective can't be taken apart into.

    Args:
        objective: to be trained.
        parts: `config.accumulation_steps`.
        batch_size: images a step.
        device_rows: over how many devices the mesh splits a batch.

    Raises:
        UserError: with the nearest sizes that fit, or what the objective does.
    """
    if parts == 1:
        return
    unit = parts * device_rows
    if batch_size % unit:
        near = batch_size // unit * unit
        fitting = " or ".join(str(size) for size in (near, near + unit) if size)
        raise UserError(
            f"batch_size={batch_size} does not divide into accumulation_steps={parts} equal parts "
            f"over the mesh's data x fsdp = {device_rows} device rows; {fitting} would"
        )
    if compares_outputs(objective):
        raise UserError(
            f"config.accumulation_steps={parts}: {type(objective).__name__} compares the "
            "network's outputs for different examples, and these are computed one after the other; "
            "use 1, or leave that part of the objective out"
        )


def compares_outputs(objective: Objective) -> bool:
    """Whether an example's loss depends on the network's output for another one.

    It is tested by a derivative: the output for one of four examples changes, and the losses of
    the others must not.
    """
    outputs = jnp.zeros(4)

    def losses(outputs: Array) -> Array:
        def apply(params: Any, x: Array, *_: Any, hidden: bool = False, **how: Any) -> Any:
            del params, how
            moved = x[..., :1] + jnp.resize(outputs, (len(x),))[:, None, None, None]
            output = jnp.repeat(moved, objective.traits.outputs, axis=-1)
            return (output, hidden_of(output, traits)) if hidden else output

        key, traits = jax.random.key(0), objective.traits
        params = own_params(objective, key, {})
        images = jax.random.uniform(key, (4, 8, 8, 1), minval=-1.0)
        batch = {"image": images, "cond": jnp.zeros(4, jnp.int32), "source": images[::-1]}
        if traits.features:
            batch["features"] = jnp.ones((4, *traits.features))
        progress = Progress(jnp.zeros((), jnp.int32), objective.init_memory())
        return objective(apply, params, params, key, batch, progress)[0]

    _, change = jax.jit(lambda outputs, by: jax.jvp(losses, (outputs,), (by,)))(
        outputs, outputs.at[0].set(1.0)
    )
    return bool(jnp.any(change[1:] != 0.0))
