"""Probes of a trained model without samples: loss by log-SNR, effective weight, gradient noise."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from diffjax.conditions import Condition, Rate
from diffjax.objectives.base import Objective, Progress
from diffjax.objectives.wrappers import Contrastive, Dispersive
from diffjax.process import targets
from diffjax.process.precond import Apply, Predict
from diffjax.studies.effective_weights import weight_curve
from diffjax.studies.gradient_noise import LossOf, noise_by_log_snr
from diffjax.studies.validation import loss_by_log_snr, losses_as_json, paired, unfit

SPACES = {"noise": targets.Noise(), "clean": targets.Clean(), "v": targets.V()}
"""Spaces in which the loss is measured: squared errors of the noise, of clean data and of v."""
_CURVE_STEP = 0.25
_JOINED = "its loss couples the examples of a batch, so a single example has no gradient"


class Probed(NamedTuple):
    """The parts of a trained model that probes need.

    Attributes:
        objective: the training objective.
        apply: the network.
        predict: the model's prediction with the weights for sampling.
        params: live parameters, at which gradients are computed.
        teacher_params: those that the objective learns from.
        progress: the training progress.
        condition: the kind of condition of the examples.
        condition_dropout: probability of replacing a condition by the null condition in training.
    """

    objective: Objective
    apply: Apply
    predict: Predict
    params: Any
    teacher_params: Any
    progress: Progress
    condition: Condition
    condition_dropout: Rate


def probe(
    model: Probed,
    images: np.ndarray,
    cond: Any,
    *,
    seed: int = 0,
    num_batches: int = 16,
    batch_size: int = 16,
) -> dict[str, Any]:
    """Measures loss by log-SNR in common spaces, effective weight and gradient noise.

    Returns plain data; a probe that does not apply is `{"left_out": reason}`.

    Args:
        model: the trained model.
        images: held-out images, `[N, H, W, C]` in [-1, 1].
        cond: their condition, N rows.
        seed: seed of noise, log-SNRs and examples; use equal seeds to compare models.
        num_batches: small batches per bin for the gradient noise; 16 is typical.
        batch_size: examples in each of them; 16 is typical.

    Raises:
        UserError: the model's predictions or gradients are not finite.
    """
    loss_key, noise_key = jax.random.split(jax.random.key(seed))
    return {
        "loss_by_log_snr": (
            _left_out(f"it {reason}")
            if (reason := unfit(model.objective.traits))
            else _loss(model, images, cond, loss_key)
        ),
        "effective_weight": effective_weight(model.objective),
        "gradient_noise": (
            _left_out(reason)
            if (reason := _no_gradient_each(model.objective))
            else _noise(model, images, cond, noise_key, num_batches, batch_size)
        ),
    }


def effective_weight(objective: Objective) -> dict[str, Any]:
    """The curve of `weight_curve` in steps of 0.25 in log-SNR, as plain data."""
    try:
        curve = weight_curve(objective)
    except NotImplementedError as error:
        return _left_out(str(error))
    first, last = (np.round(curve.log_snr[i] / _CURVE_STEP) for i in (0, -1))
    levels = np.arange(first, last + 1) * _CURVE_STEP
    return {
        "log_snr": levels.tolist(),
        "weight": np.interp(levels, curve.log_snr, curve.weight).tolist(),
        "quartiles": [curve.quantile(u) for u in (0.25, 0.5, 0.75)],
    }


def _loss(model: Probed, images: np.ndarray, cond: Any, key: Array) -> dict[str, Any]:
    losses = loss_by_log_snr(
        model.predict, model.objective.path, images, cond, key,
        spaces=SPACES,
    )  # fmt: skip
    return {**losses_as_json(losses), "space_path": "cosine"}


def _noise(
    model: Probed,
    images: np.ndarray,
    cond: Any,
    key: Array,
    num_batches: int,
    batch_size: int,
) -> dict[str, Any]:
    found = noise_by_log_snr(
        _loss_of(model, images, cond),
        model.params, key, num_batches=num_batches, batch_size=batch_size,
    )  # fmt: skip
    return {
        "log_snr_edges": list(found.edges),
        "num_batches": num_batches,
        "batch_size": batch_size,
        "weights": "live",
        "share": list(found.share),
        "bins": [None if scale is None else scale._asdict() for scale in found.bins],
    }


def _loss_of(model: Probed, images: np.ndarray, cond: Any) -> LossOf:
    """The training loss of one random example, with an image drawn from the held-out ones."""
    all_images, all_cond = jnp.asarray(images), jax.tree.map(jnp.asarray, cond)

    def loss_of(params: Any, key: Array) -> tuple[Array, Array]:
        image_key, drop_key, loss_key = jax.random.split(key, 3)
        row = jax.random.randint(image_key, (1,), 0, len(images))
        own = model.condition.take(all_cond, row)
        batch = {
            "image": all_images[row],
            "cond": model.condition.as_trained(drop_key, own, model.condition_dropout),
        }
        loss, metrics = model.objective(
            model.apply, params, model.teacher_params, loss_key, batch, model.progress
        )
        return loss[0], metrics["log_snr"][0]

    return loss_of


def _no_gradient_each(objective: Objective) -> str | None:
    """The reason why an objective has no loss of a single example; None if it has one."""
    if reason := paired(objective.traits):
        return f"it {reason}"
    if objective.traits.features is not None:
        return "it aligns with features of each image, which this study does not read"
    part: Any = objective
    while part is not None:
        if isinstance(part, Contrastive | Dispersive):
            return _JOINED
        part = getattr(part, "objective", None)
    return None


def _left_out(reason: str) -> dict[str, str]:
    return {"left_out": reason}
