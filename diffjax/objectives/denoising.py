"""The objective that diffusion and flow matching share: predict a mix of data and noise."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

import jax
import jax.numpy as jnp
from jax import Array
from jax.tree_util import register_dataclass

from diffjax.process.paths import Pair, Path, coeffs, log_snr, mix
from diffjax.process.precond import Apply, Precond
from diffjax.process.targets import encode
from diffjax.process.times import Times
from diffjax.process.weights import Weight

Batch = Mapping[str, Array]


class Objective(Protocol):
    """A loss per example; everything that an objective may need is handed to it."""

    def __call__(
        self,
        apply: Apply,
        params: object,
        ema_params: object,
        key: Array,
        batch: Batch,
        step: Array,
    ) -> tuple[Array, dict[str, Array]]:
        """Returns the loss `[B]` and metrics `[B]`, `log_snr` among them."""
        ...


@register_dataclass
@dataclass(frozen=True)
class Denoising:
    """Weighted squared error of the prediction at a random time.

    `loss = w(t)·mean_pixels (network(x_t, t) - (k_x·x0 + k_e·eps))²` with `t ~ times`. DDPM,
    v-prediction and flow matching are this with other values (Kingma & Gao 2023,
    arXiv:2303.00848).

    Attributes:
        path: shared with sampling.
        precond: the target and the noise label, shared with sampling.
        weight: `(Coeffs, Mix) -> [B, 1, …]`, in the target's own space.
        times: the density of `t`.
    """

    path: Path
    precond: Precond
    weight: Weight
    times: Times

    def __call__(
        self,
        apply: Apply,
        params: object,
        ema_params: object,
        key: Array,
        batch: Batch,
        step: Array,
    ) -> tuple[Array, dict[str, Array]]:
        del ema_params, step
        x0 = batch["image"]
        time_key, noise_key, dropout_key = jax.random.split(key, 3)
        t = self.times(time_key, len(x0), self.path)
        c = coeffs(self.path, t, x0.ndim)
        pair = Pair(x0, jax.random.normal(noise_key, x0.shape))
        k = self.precond.target(c)
        label = jnp.ravel(self.precond.noise_label(c))
        output = apply(params, mix(c, pair), label, batch["label"], train=True, key=dropout_key)
        error = self.weight(c, k) * jnp.square(output - encode(k, pair))
        loss = jnp.mean(error, axis=tuple(range(1, x0.ndim)))
        return loss, {"log_snr": log_snr(self.path, t)}
