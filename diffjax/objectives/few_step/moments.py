"""Inductive moment matching: a flow map whose groups of particles match one another."""

from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jax.tree_util import register_dataclass
from jaxtyping import Float

from diffjax.errors import UserError
from diffjax.kinds import AtLeastOne, NotNegative, Positive
from diffjax.objectives.base import Batch, Progress
from diffjax.objectives.few_step.consistency import level_of, time_of_level
from diffjax.objectives.few_step.flow_maps import AverageVelocity, span_of
from diffjax.process.paths import Coeffs, Scalar, coeffs, log_snr_of, mix
from diffjax.process.precond import Apply
from diffjax.shapes import OneKey, PerSample

Group = Float[Array, "groups particles numbers"]


@register_dataclass
@dataclass(frozen=True)
class InductiveMomentMatching(AverageVelocity):
    """Images from time t and from an earlier time r have one distribution at time s, and all match.

    Both are carried to s by the network, `f(x_t, t, s) = x_t - (t - s)·u(x_t, t, s)`, the earlier
    ones without gradient, with `s ≤ r < t` the same for a group of examples and `x_r` of the same
    noise as `x_t`. The loss of a group is the squared maximum mean discrepancy,

        w(t)·mean_ij (k(y_i, y_j) + k(y'_i, y'_j) - 2·k(y_i, y'_j))
        y = f(x_t, t, s),   y' = f(x_r, r, s)
        k(y, y') = exp(-‖y - y'‖/(D·(t - s)))
        w(t) = sigmoid(bias - λ)·(-½·dλ/dt)·a^power/(a² + s²)

    with D numbers in an image. The pair `i = j` is of one image, and pulls as a consistency loss
    does; with one particle it is that alone, and with many the distributions count. Time r is that
    of a level `η = s/a` which is lower by 1/2^halvings of the range up to 160, at least s.

    Zhou, Ermon & Song 2025 (arXiv:2503.07565), algorithm 1, with the parametrisation "Euler-FM",
    whose kernel is scaled by the factor of the network's output. Their data and noise have a
    standard deviation of ½, here the noise has 1, so data of unit variance are theirs. Their
    repository has no training code.

    Attributes, beside those of `Noising`, whose weight multiplies the loss and whose times are t:
        particles: examples in a group; 4 in the paper. They divide the batch.
        halvings: 12 in the paper for ImageNet-256, 15 for CIFAR-10.
        shortest: the smallest difference of t and r, for the digits of float32.
        power: 2 in the paper for the network of t and t - s on ImageNet-256, 1 for CIFAR-10.
        bias: 4 in the paper for ImageNet-256, 5 for CIFAR-10.
    """

    particles: AtLeastOne[int] = field(default=4, metadata={"static": True})
    halvings: AtLeastOne[Scalar] = 12.0
    shortest: Positive[Scalar] = 1e-4
    power: AtLeastOne[Scalar] = 2.0
    bias: NotNegative[Scalar] = 4.0

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
        self.check_target("inductive_moment_matching")
        n = len(batch["image"])
        if n % self.particles:
            raise UserError(
                f"batch_size {n} is no multiple of {self.particles} particles: take another "
                "batch_size or --config.objective.particles"
            )
        time_key, key = jax.random.split(key)
        t, r, s = (
            jnp.repeat(each, self.particles)
            for each in self.three_times(time_key, n // self.particles)
        )
        noised = self.noised(t, key, batch)
        average = self.average(apply, params, noised)
        x_r = mix(coeffs(self.path, r, noised.x_t.ndim), noised.pair)
        there = noised.x_t - span_of(t, s, x_r) * average(noised.x_t, t, s)
        other = jax.lax.stop_gradient(x_r - span_of(r, s, x_r) * average(x_r, r, s))
        reach = (t - s)[:: self.particles]
        loss = squared_discrepancy(self.grouped(there), self.grouped(other), reach)
        scale = jnp.ravel(self.weight(noised.c, noised.k)) * self.time_weight(noised.c)
        return scale * jnp.repeat(loss, self.particles), self.metrics(noised, s)

    def three_times(self, key: OneKey, n: int) -> tuple[PerSample, PerSample, PerSample]:
        """Times `t > r ≥ s` of `n` groups, `[n]` each; s is uniform under t."""
        time_key, share_key = jax.random.split(key)
        t = self.times.quantile(self.uniforms(time_key, n), self.path)
        low = jnp.asarray(self.path.t_min, t.dtype)
        s = low + jax.random.uniform(share_key, (n,)) * (t - low)
        level = level_of(self.path, t) - HIGHEST / 2.0**self.halvings
        earlier = time_of_level(self.path, jnp.maximum(level, level_of(self.path, low)))
        return t, jnp.maximum(jnp.minimum(earlier, t - self.shortest), s), s

    def time_weight(self, c: Coeffs) -> PerSample:
        """`w(t)`, `[B]`."""
        fall = (c.a * c.ds - c.s * c.da) * c.a ** (self.power - 1.0)  # of -½·λ, times s·a^power
        norm = c.s * (jnp.square(c.a) + jnp.square(c.s))
        return jnp.ravel(jax.nn.sigmoid(self.bias - log_snr_of(c)) * fall / norm)

    def grouped(self, x: Array) -> Group:
        """The images as vectors, `[groups, particles, D]`."""
        return jnp.reshape(x, (-1, self.particles, x[0].size))


HIGHEST = 160.0  # The level of which `halvings` make a step.


def squared_discrepancy(one: Group, other: Group, reach: PerSample) -> PerSample:
    """The squared maximum mean discrepancy of two sets of each group, for a Laplace kernel.

    It is the average over all pairs, those of one index included.

    Args:
        one: `[groups, particles, numbers]`.
        other: an array of the same shape.
        reach: `[groups]`, the scale of the kernel `exp(-‖x - y‖/(numbers·reach))`.

    Example:
        >>> one = jnp.array([[[0.0], [1.0]]])
        >>> squared_discrepancy(one, one, jnp.ones(1)).tolist()
        [0.0]
    """

    def mean_kernel(x: Group, y: Group) -> PerSample:
        squares = jnp.sum(jnp.square(x[:, :, None] - y[:, None]), axis=-1)
        # Under the root, so that the gradient at equal images is 0 and not 0/0.
        distances = jnp.sqrt(jnp.maximum(squares, 1e-8)) / x.shape[-1]
        return jnp.mean(jnp.exp(-distances / reach[:, None, None]), axis=(1, 2))

    return mean_kernel(one, one) + mean_kernel(other, other) - 2.0 * mean_kernel(one, other)
