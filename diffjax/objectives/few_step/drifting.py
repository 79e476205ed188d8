"""Drifting: a generator in one step, whose samples move towards data and away from one another."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jax.tree_util import register_dataclass
from jaxtyping import Float

from diffjax.conditions.guided import split
from diffjax.errors import UserError
from diffjax.kinds import AtLeastOne
from diffjax.objectives.base import Batch, Progress, Traits, check_others
from diffjax.objectives.denoising import Noising, in_training
from diffjax.process.precond import Apply, Meaning, denoiser
from diffjax.shapes import OneKey, PerSample, Samples

Features = Callable[[Samples], Sequence[Float[Array, "images places numbers"]]]
"""`images[n, …] -> [features[n, F, D], …]`: D numbers at each of F places, of several kinds."""

Rows = Float[Array, "places rows numbers"]
Targets = Float[Array, "places others numbers"]
Pairs = Float[Array, "rows others"]


@register_dataclass
@dataclass(frozen=True)
class Pixels:
    """The image itself, as one place with all its numbers."""

    def __call__(self, images: Samples) -> Sequence[Float[Array, "images places numbers"]]:
        return [jnp.reshape(images, (len(images), 1, -1))]


@register_dataclass
@dataclass(frozen=True)
class Drifting(Noising):
    """Generated samples move along a field that vanishes where they are distributed as the data.

        loss = mean |φ(x) - sg(φ(x) + V)|²,    x = f(eps)
        V ∝ Σ_ij k(x, y⁺_i)·k(x, y⁻_j)·(y⁺_i - y⁻_j),    k(x, y) ∝ exp(-‖x - y‖/(temperature·scale))

    with features φ, images y⁺ of the batch with the same condition, and y⁻ the other generated
    samples with that condition; k is the geometric mean of its normalisations over both arguments
    (`drift`). The network is evaluated at pure noise alone, and is a sampler in one step. All
    conditions of a batch are compared within themselves: it takes several images of each.

    With guidance images of all conditions are among y⁻, with the weight `guidance_scale - 1` of
    the generated ones, so that the samples are distributed as `scale·p(x | cond) - (scale -
    1)·p(x)`.

    Deng et al. 2026 (arXiv:2602.04770) and their code, for each image of whose batch 64 samples are
    generated, 64 images of its class and 32 of all classes come from a memory of earlier batches.
    Here images and samples are those of the batch. As there, each example can have a scale of
    guidance of its own, which the network has as an input (the wrapper `EmbeddedGuidance`). Their
    best features are a masked autoencoder's, at several depths and places.

    Attributes, beside those of `Noising`, of which `times` and `weight` have no effect here:
        features: φ, `Pixels` or any differentiable function.
        temperatures: the temperatures of the kernel; the fields are normalised and added.
        generated: samples for each example of the batch.
        guidance_scale: 1 is no guidance; without effect where each example has its own.
    """

    features: Features = Pixels()
    temperatures: tuple[float, ...] = field(default=(0.02, 0.05, 0.2), metadata={"static": True})
    generated: AtLeastOne[int] = field(default=1, metadata={"static": True})
    guidance_scale: AtLeastOne[float] = field(default=1.0, metadata={"static": True})

    @property
    def traits(self) -> Traits:
        return replace(super().traits, meaning=Meaning.END_OF_FLOW, solver="one_step")

    def __call__(
        self,
        apply: Apply,
        params: Any,
        teacher_params: Any,
        key: OneKey,
        batch: Batch,
        progress: Progress,
    ) -> tuple[PerSample, dict[str, Array]]:
        del teacher_params, progress
        check_others(batch, "drifting")
        if not self.temperatures:
            raise UserError("drifting needs a temperature: take temperatures=0.02,0.05,0.2")
        noise_key, dropout_key = jax.random.split(key)
        images = batch["image"]

        def copies(x: Array) -> Array:
            return jnp.repeat(x, self.generated, axis=0)

        noise = jax.random.normal(noise_key, copies(images).shape)
        t = jnp.full(len(noise), self.path.t_noise)
        cond = jax.tree.map(copies, batch["cond"])

        predict = denoiser(in_training(apply, dropout_key), params, self.path, self.precond)
        samples = predict(self.start(noise, None), t, cond).x0
        others = self.others(cond, batch["cond"])
        losses = [
            drift_loss(one, real, others, self.temperatures)
            for one, real in zip(self.features(samples), self.features(images), strict=True)
        ]
        loss = jnp.sum(jnp.stack(losses), axis=0)
        loss = jnp.mean(jnp.reshape(loss, (len(images), self.generated)), axis=1)
        return loss, {"log_snr": jnp.full(len(images), -20.0)}

    def others(self, cond: Any, of_images: Any) -> "Others":
        """Which generated samples and images each sample drifts from and to."""
        (cond, drawn), (of_images, _) = split(cond), split(of_images)
        samples, images = same_rows(cond, cond), same_rows(cond, of_images)
        scale = self.guidance_scale if drawn is None else drawn[:, None]
        share = (scale - 1.0) / images.shape[1]
        among_away = share * (jnp.sum(samples, axis=1, keepdims=True) - 1.0)
        return Others(samples, jnp.broadcast_to(among_away, images.shape), images)


class Others(NamedTuple):
    """The weights of what each of n samples drifts from and to; 0 is what is not there.

    Attributes:
        samples: `[n, n]`, away from other samples.
        negatives: `[n, m]`, away from images.
        positives: `[n, m]`, to images.
    """

    samples: Pairs
    negatives: Pairs
    positives: Pairs


def same_rows(one: Any, other: Any) -> Pairs:
    """Where two conditions are equal, as 1 and 0, `[n, m]`; they are trees of arrays of rows.

    Example:
        >>> same_rows(jnp.array([0, 1]), jnp.array([1, 1, 0])).tolist()
        [[0.0, 0.0, 1.0], [1.0, 1.0, 0.0]]
    """
    pairs = [
        jnp.all(jnp.reshape(x, (len(x), 1, -1)) == jnp.reshape(y, (1, len(y), -1)), axis=-1)
        for x, y in zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True)
    ]
    return jnp.all(jnp.stack(pairs), axis=0).astype(jnp.float32)


FAR = 100.0  # Added to the distances of pairs that are not there, in units of their mean.


def drift_loss(
    samples: Float[Array, "rows places numbers"],
    images: Float[Array, "images places numbers"],
    others: Others,
    temperatures: Sequence[float],
) -> PerSample:
    """The mean square of the drift of features, `[n]`, with the gradient of moving along it.

    Features are divided by the mean distance of pairs over √D, and the field of each temperature by
    its root mean square, so the value says little: its gradient counts.

    Args:
        samples: features of generated samples, `[n, F, D]`.
        images: of images, `[m, F, D]`.
        others: which of them count for which sample.
        temperatures: the temperatures of the kernel.
    """
    here, real = (jnp.swapaxes(x, 0, 1) for x in (samples, images))
    fixed = jax.lax.stop_gradient(here)
    targets = jax.lax.stop_gradient(jnp.concatenate([fixed, real, real], axis=1))
    weights = jnp.concatenate(others, axis=1)
    distances = distances_of(fixed, targets)
    scale = jnp.sum(distances * weights[None]) / (len(distances) * jnp.sum(weights))
    unit = jnp.maximum(scale / jnp.sqrt(float(fixed.shape[-1])), 1e-3)
    absent = jnp.eye(len(weights), weights.shape[1], dtype=bool) | (weights == 0.0)
    apart = distances / jnp.maximum(scale, 1e-3) + FAR * absent[None].astype(distances.dtype)
    fields = [drift(fixed / unit, targets / unit, apart / r, weights) for r in temperatures]
    goal = jax.lax.stop_gradient(fixed / unit + jnp.sum(jnp.stack(fields), axis=0))
    moved = here / unit - goal
    return jnp.mean(jnp.square(moved), axis=(0, 2))


def drift(here: Rows, targets: Targets, distances: Array, weights: Pairs) -> Rows:
    """The field of one temperature, `[F, n, D]`, of unit mean square.

        V = Σ_ij K_i·K_j·(y⁺_i - y⁻_j),    K = √(softmax_y(-d)·softmax_x(-d))

    Args:
        here: x, `[F, n, D]`.
        targets: samples and negatives, then as many positives as negatives, `[F, n + 2m, D]`.
        distances: d, `[F, n, n + 2m]`.
        weights: `[n, n + 2m]`, multiplied with K.
    """
    both = jax.nn.softmax(-distances, axis=-1) * jax.nn.softmax(-distances, axis=-2)
    kernel = weights[None] * jnp.sqrt(jnp.maximum(both, 1e-6))
    num_positive = (weights.shape[1] - weights.shape[0]) // 2
    away, to = kernel[..., :-num_positive], kernel[..., -num_positive:]
    pull = to * jnp.sum(away, axis=-1, keepdims=True)
    push = away * jnp.sum(to, axis=-1, keepdims=True)
    pairs = jnp.concatenate([-push, pull], axis=-1)
    field = jnp.einsum("fny,fyd->fnd", pairs, targets)
    field = field - jnp.sum(pairs, axis=-1, keepdims=True) * here
    return field / jnp.sqrt(jnp.maximum(jnp.mean(jnp.square(field)), 1e-8))


def distances_of(x: Rows, y: Targets) -> Array:
    """Distances of all rows, `[F, n, m]`, at least 1e-4."""
    squares = [jnp.sum(jnp.square(each), axis=-1) for each in (x, y)]
    products = jnp.einsum("fnd,fmd->fnm", x, y)
    apart = squares[0][:, :, None] + squares[1][:, None, :] - 2.0 * products
    return jnp.sqrt(jnp.maximum(apart, 1e-8))
