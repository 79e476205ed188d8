"""Guidance turns a predictor into another one."""

import jax.numpy as jnp
from jax import Array

from diffjax.process.paths import Pair, Scalar
from diffjax.process.precond import Predict


def classifier_free(predict: Predict, scale: Scalar, null_label: int) -> Predict:
    """Classifier-free guidance: `pair = null + scale·(cond - null)`.

    Scale 1 is plain conditional prediction; callers leave the wrapper out there, so that off costs
    one evaluation. Both halves go through the network as one batch of `2B`; that counts as two
    evaluations. Ho & Salimans 2022 (arXiv:2207.12598), with `scale = 1 + w`.

    Args:
        predict: a conditional predictor that also knows the null label.
        scale: how far to go from unconditional (0) through conditional (1) and beyond.
        null_label: the label that means "none".
    """

    def guided(x: Array, t: Array, cond: Array | None) -> Pair:
        assert cond is not None
        null = jnp.full_like(cond, null_label)
        both = predict(
            jnp.concatenate([x, x]), jnp.concatenate([t, t]), jnp.concatenate([cond, null])
        )
        parts = (jnp.split(part, 2) for part in both)
        return Pair(*(off + scale * (on - off) for on, off in parts))

    return guided
