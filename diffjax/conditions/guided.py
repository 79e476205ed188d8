"""A condition with a scale of guidance, for networks that have the scale as an input."""

from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import Array

from diffjax.shapes import OneNumber, PerSample


class Guided(NamedTuple):
    """The condition of n examples, and the scale of guidance of each.

    The data have no scale: in training an objective draws it
    (`diffjax.objectives.wrappers.EmbeddedGuidance`), and in sampling it is that of the recipe. The
    network embeds it as it does a further noise label. A teacher that is guided in the usual way is
    evaluated without it (`split`).

    Attributes:
        cond: the condition itself, n rows; None for the null condition.
        scale: `[n]`; 1 is no guidance.
    """

    cond: Any
    scale: Array


def split(cond: Any) -> tuple[Any, PerSample | None]:
    """A condition without its scale, and the scale `[n]`; None if it has none.

    Example:
        >>> split(Guided("a row", jnp.ones(1)))[0], split("a row")
        ('a row', ('a row', None))
    """
    return (cond.cond, cond.scale) if isinstance(cond, Guided) else (cond, None)


def null_of(cond: Any) -> Any:
    """The null condition in the place of a condition; with a scale, that of no guidance.

    Example:
        >>> null_of(Guided("a row", jnp.full(1, 4.0))).scale.tolist(), null_of("a row")
        ([1.0], None)
    """
    _, scale = split(cond)
    return None if scale is None else Guided(None, jnp.ones_like(scale))


def with_label(noise_label: Array, cond: Any) -> tuple[Array, Any]:
    """A network's noise labels and condition: the scale, where there is one, is the last label.

    Args:
        noise_label: `[B]` or `[B, n]`.
        cond: a condition, with a scale or without.

    Returns:
        The labels, `[B, n + 1]` with a scale and unchanged without one, and the condition itself.

    Example:
        >>> labels, cond = with_label(jnp.zeros(2), Guided(None, jnp.array([1.0, 4.0])))
        >>> labels.tolist(), cond
        ([[0.0, 1.0], [0.0, 4.0]], None)
    """
    cond, scale = split(cond)
    if scale is None:
        return noise_label, cond
    labels = jnp.reshape(noise_label, (len(noise_label), -1))
    return jnp.concatenate([labels, scale[:, None].astype(labels.dtype)], axis=1), cond


def at_scale(predict: Any, scale: OneNumber | float) -> Any:
    """A model of any number of samples, all at one scale of guidance.

    Args:
        predict: `(x[B, …], t, cond) -> Pair` that takes `Guided` conditions.
        scale: the scale.
    """

    def at(x: Array, t: Array, cond: Any) -> Any:
        return predict(x, t, Guided(cond, jnp.full(len(x), scale, jnp.float32)))

    return at
