"""Data distributions whose best denoiser, score and flow are known exactly.

The three distributions `Gaussian`, `GaussianMixture` and `FiniteData` have the same methods, which
work on any path. With `p_t` the density of `x_t = a·x0 + s·eps`:

    predict               E[x0 | x_t] and E[eps | x_t], the best denoiser; for two times, the flow
    score                 ∇ log p_t(x) = -E[eps | x_t] / s
    velocity              E[a'·x0 + s'·eps | x_t], the velocity of the probability-flow ODE
    posterior_covariance  Cov[x0 | x_t]
    log_density           log p_t(x)
    flow                  the solution of the probability-flow ODE from one time to another
    average_velocity      (flow - x) / (t_to - t_from)

All follow from one fact: a path turns `Σ w_i N(m_i, C_i)` into `p_t = Σ w_i N(a·m_i, S_i)` with
`S_i = a²·C_i + s²·I`. Data may have any shape `[B, …]`; they are flattened to `d` numbers inside.
Times have to be in `[t_min, t_noise]`. `flow` also goes down to 0, and up from 0 where the data
have a density. Derivatives with respect to covariances need distinct eigenvalues.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.tree_util import Partial, register_dataclass
from jaxtyping import Float

from diffjax.oracle import flow_maps
from diffjax.oracle.flow_maps import TimeOrTimes
from diffjax.process.paths import Coeffs, Pair, Path, coeffs
from diffjax.process.precond import Predict
from diffjax.process.targets import chord, decode
from diffjax.shapes import Array, OneKey, PerSample, Samples


class Posterior(NamedTuple):
    """The posterior mean of the data, the score and the log-density at `x_t`.

    `E[eps | x_t]` is `-s·score`.
    """

    x0: Array  # E[x0 | x_t], [B, d]
    score: Array  # [B, d]
    log_density: Array  # nats, [B]


Infer = Callable[[Coeffs, Array], Posterior]
"""`(coefficients, x[B, d]) -> Posterior`."""


class _Known:
    """What follows from the posterior: the denoiser, the score, the density and the flow."""

    def infer(self) -> Infer:
        """The posterior `(Coeffs, x[B, d]) -> Posterior`."""
        raise NotImplementedError

    def predict(self, path: Path) -> Predict:
        """The best denoiser `(x[B, …], t[B], cond) -> Pair`; for `t[B, 2]` the flow map."""
        return _predict(self, path)

    def score(self, path: Path, x: Samples, t: PerSample) -> Samples:
        """The score `∇ log p_t(x)`, of the shape of `x`."""
        return _posterior(self.infer(), path, x, t).score.reshape(x.shape)

    def velocity(self, path: Path, x: Samples, t: PerSample) -> Samples:
        """The velocity `E[a'·x0 + s'·eps | x_t = x]`, of the shape of `x`."""
        return _velocity(self.infer(), path, x, t)

    def log_density(self, path: Path, x: Samples, t: PerSample) -> PerSample:
        """The log-density `log p_t(x)` in nats, `[B]`; of single points at `t > 0` alone."""
        return _posterior(self.infer(), path, x, t).log_density

    def flow(self, path: Path, x: Samples, t_from: TimeOrTimes, t_to: TimeOrTimes) -> Samples:
        """Solves the probability-flow ODE from `x` at `t_from` to `t_to`, each `[]` or `[B]`."""
        return flow_maps.integrated(self, path, x, t_from, t_to)

    def average_velocity(
        self, path: Path, x: Samples, t_from: TimeOrTimes, t_to: TimeOrTimes
    ) -> Samples:
        """The average velocity `(flow - x)/(t_to - t_from)`; for equal times the velocity."""
        return flow_maps.average_velocity(self, path, x, t_from, t_to)


@register_dataclass
@dataclass(frozen=True)
class GaussianMixture(_Known):
    """A mixture of `K` Gaussians, `p(x0) = Σ w_i N(m_i, C_i)`.

        E[x0 | x] = Σ r_i·(m_i + a·C_i·S_i⁻¹·(x - a·m_i)),    r_i ∝ w_i·N(x; a·m_i, S_i)

    The flow is integrated in float64, to a relative and absolute tolerance of 1e-11 per step.

    Attributes:
        weights: `[K]`, positive, with sum 1.
        means: `[K, …]`, each of the data's shape, of `d` numbers.
        covariances: `[K, d, d]`, symmetric and positive semi-definite.

    Example:
        >>> from diffjax.process.paths import Linear
        >>> data = GaussianMixture(
        ...     jnp.array([0.5, 0.5]), jnp.array([[-1.0], [1.0]]), jnp.full((2, 1, 1), 0.01)
        ... )
        >>> pair = data.predict(Linear())(jnp.array([[0.4]]), jnp.array([0.5]), None)
        >>> round(float(pair.x0.item()), 3)
        0.661
    """

    weights: Array
    means: Array
    covariances: Array

    def draw(self, key: OneKey, n: int) -> Float[Array, " {n} *event"]:
        """Samples from the data distribution, `[n, …]`."""
        which, noise = jax.random.split(key)
        component = jax.random.choice(which, len(self.weights), (n,), p=self.weights)
        c = self._components()
        # The symmetric root is unique; eigenvectors are determined up to their sign only.
        roots = jnp.einsum("kie,ke,kje->kij", c.vectors, jnp.sqrt(c.variances), c.vectors)
        white = jax.random.normal(noise, (n, c.means.shape[1]))
        x = c.means[component] + jnp.einsum("nij,nj->ni", roots[component], white)
        return x.reshape(n, *self.means.shape[1:])

    def infer(self) -> Infer:
        """The posterior `(Coeffs, x[B, d]) -> Posterior`; the covariances are decomposed here."""
        return Partial(_infer_from_components, self._components())

    def responsibilities(
        self, path: Path, x: Samples, t: PerSample
    ) -> Float[Array, " batch components"]:
        """The responsibilities `P(component i | x_t = x)`, `[B, K]`.

        At `t = 0` the covariances must not be singular.
        """
        post = _component_posteriors(self._components(), coeffs(path, t, ndim=2), _flat(x))
        return jax.nn.softmax(post.log_joint, axis=1)

    def posterior_covariance(
        self, path: Path, x: Samples, t: PerSample
    ) -> Float[Array, " batch d d"]:
        """The posterior covariance `Cov[x0 | x_t = x]`, `[B, d, d]`.

        It is the mean covariance within the components plus the covariance of their means.
        """
        components, c, x = self._components(), coeffs(path, t, ndim=2), _flat(x)
        post = _component_posteriors(components, c, x)
        shares = jax.nn.softmax(post.log_joint, axis=1)[..., None]
        centred = post.x0 - jnp.sum(shares * post.x0, axis=1, keepdims=True)
        between = jnp.einsum("bki,bkj->bij", shares * centred, centred)
        left = components.variances[None] * c.s[..., None] ** 2 / post.marginal * shares
        within = jnp.einsum("kie,bke,kje->bij", components.vectors, left, components.vectors)
        return within + between

    def _components(self) -> "_Components":
        variances, vectors = jnp.linalg.eigh(self.covariances)
        # Rounding may turn a variance of 0 into a small negative one.
        return _Components(
            jnp.log(self.weights), _flat(self.means), jnp.maximum(variances, 0.0), vectors
        )


@register_dataclass
@dataclass(frozen=True)
class Gaussian(_Known):
    """A Gaussian `N(m, C)`, with everything in closed form, also the flow (`gaussian_flow`).

        E[x0 | x] = m + a·C·S⁻¹·(x - a·m),    Cov[x0 | x] = s²·C·S⁻¹,    S = a²·C + s²·I

    Attributes:
        mean: `[…]`, of the data's shape, of `d` numbers.
        covariance: `[d, d]`, symmetric and positive semi-definite.

    Example:
        >>> from diffjax.process.paths import Linear
        >>> data = Gaussian(jnp.zeros(1), jnp.eye(1))
        >>> data.flow(Linear(), jnp.array([[3.0]]), 0.0, 1.0).tolist()
        [[3.0]]
    """

    mean: Array
    covariance: Array

    def draw(self, key: OneKey, n: int) -> Float[Array, " {n} *event"]:
        """Samples from the data distribution, `[n, …]`."""
        return self._alone().draw(key, n)

    def infer(self) -> Infer:
        """The posterior `(Coeffs, x[B, d]) -> Posterior`; the covariance is decomposed here."""
        return self._alone().infer()

    def posterior_covariance(
        self, path: Path, x: Samples, t: PerSample
    ) -> Float[Array, " batch d d"]:
        """The posterior covariance `Cov[x0 | x_t = x]`, `[B, d, d]`; the same at every `x`."""
        return self._alone().posterior_covariance(path, x, t)

    def flow(self, path: Path, x: Samples, t_from: TimeOrTimes, t_to: TimeOrTimes) -> Samples:
        """Solves the probability-flow ODE from `x` at `t_from` to `t_to`, each `[]` or `[B]`."""
        moved = gaussian_flow(self.mean.ravel(), self.covariance, path, _flat(x), t_from, t_to)
        return moved.reshape(x.shape)

    def _alone(self) -> GaussianMixture:
        return GaussianMixture(jnp.ones(1), self.mean[None], self.covariance[None])


@register_dataclass
@dataclass(frozen=True)
class FiniteData(_Known):
    """The uniform distribution over `N` points, such as the images of a training set.

        E[x0 | x] = Σ r_i·x_i,    r = softmax(-|x - a·x_i|² / 2s²)

    A network of unlimited capacity learns this denoiser, which has memorised the data. Its loss is
    a lower bound on the loss of every network on these points. One call needs memory for `B·N`
    numbers under `jax.jit`, and no more.
    The flow is integrated in float64, to a relative and absolute tolerance of 1e-11 per step. At
    `t = 0` it ends on one of the points; a flow can't start from there.

    Attributes:
        points: `[N, …]`, each of `d` numbers.

    Example:
        >>> from diffjax.process.paths import Linear
        >>> data = FiniteData(jnp.array([[-1.0], [1.0]]))
        >>> round(float(data.flow(Linear(), jnp.array([[0.1]]), 1.0, 0.0).item()), 6)
        1.0
    """

    points: Array

    def draw(self, key: OneKey, n: int) -> Float[Array, " {n} *event"]:
        """Points sampled with replacement, `[n, …]`."""
        return self.points[jax.random.randint(key, (n,), 0, len(self.points))]

    def infer(self) -> Infer:
        """The posterior `(Coeffs, x[B, d]) -> Posterior`."""
        return Partial(_infer_from_points, _flat(self.points))

    def posterior_covariance(
        self, path: Path, x: Samples, t: PerSample
    ) -> Float[Array, " batch d d"]:
        """The posterior covariance `Σ r_i·(x_i - E[x0|x])(x_i - E[x0|x])ᵀ`, `[B, d, d]`."""
        points, c = _flat(self.points), coeffs(path, t, ndim=2)
        shares = jax.nn.softmax(_log_kernel(points, c, _flat(x)), axis=1)

        def one(share: Array) -> Array:
            centred = points - (share @ points)[None]
            return (share[:, None] * centred).T @ centred

        return jax.lax.map(one, shares)  # one after the other: [B, N, d] may not fit in memory


def gaussian_flow(
    mean: Float[Array, " d"],
    covariance: Float[Array, " d d"],
    path: Path,
    x: Float[Array, " batch d"],
    t_from: TimeOrTimes,
    t_to: TimeOrTimes,
) -> Float[Array, " batch d"]:
    """The exact solution of the probability-flow ODE for Gaussian data `N(m, C)`.

    All marginal covariances `S_t = a²·C + s²·I` commute, so
    `x(t) - a(t)·m = S_t^½ · S_from^-½ · (x - a(t_from)·m)`.

    Args:
        mean: `m`, `[d]`.
        covariance: `C`, `[d, d]`.
        path: any path.
        x: the points at `t_from`, `[B, d]`.
        t_from: the time of `x`, `[]` or `[B]`.
        t_to: the time of the result, earlier or later, `[]` or `[B]`.

    Returns:
        The points at `t_to`, `[B, d]`.
    """
    variances, vectors = jnp.linalg.eigh(covariance)
    variances, mean = variances[None], mean[None]
    here, there = (
        coeffs(path, jnp.broadcast_to(jnp.asarray(t), len(x)), ndim=2) for t in (t_from, t_to)
    )
    scale = jnp.sqrt((there.a**2 * variances + there.s**2) / (here.a**2 * variances + here.s**2))
    return there.a * mean + ((x - here.a * mean) @ vectors * scale) @ vectors.T


def with_variance(predict: Predict, share: float = 0.5) -> Predict:
    """A predictor with a given variance of reverse steps, for solvers that need a learned one.

    Args:
        predict: a predictor without a variance.
        share: `Pair.share` of every prediction: 0 is the posterior's variance, 1 that of the
            forward step.
    """
    return Partial(_with_variance, predict, share)


def _with_variance(predict: Predict, share: float, x: Array, t: Array, cond: Array | None) -> Pair:
    return predict(x, t, cond)._replace(share=jnp.full_like(x, share))


def _flat(x: Array) -> Array:
    return jnp.reshape(x, (len(x), -1))


def _posterior(infer: Infer, path: Path, x: Array, t: Array) -> Posterior:
    return infer(coeffs(path, t, ndim=2), _flat(x))


def _predict(data: "flow_maps.KnownFlow", path: Path) -> Predict:
    return Partial(_best_pair, data, path, data.infer())


def _best_pair(
    data: "flow_maps.KnownFlow", path: Path, infer: Infer, x: Array, t: Array, cond: Array | None
) -> Pair:
    del cond
    if t.ndim == 2:
        start, end = t[:, 0], t[:, 1]
        average = flow_maps.average_velocity(data, path, x, start, end)
        return decode(coeffs(path, start, x.ndim), chord(path, start, end, x.ndim), average, x)
    c = coeffs(path, t, ndim=2)
    posterior = infer(c, _flat(x))
    eps = -c.s * posterior.score
    return Pair(posterior.x0.reshape(x.shape), eps.reshape(x.shape))


def _velocity(infer: Infer, path: Path, x: Array, t: Array) -> Array:
    c = coeffs(path, t, x.ndim)
    posterior = infer(coeffs(path, t, ndim=2), _flat(x))
    x0, score = posterior.x0.reshape(x.shape), posterior.score.reshape(x.shape)
    return c.da * x0 - c.ds * c.s * score


class _Components(NamedTuple):
    """A mixture with decomposed covariances, `C_i = V_i·diag(variances_i)·V_iᵀ`."""

    log_weights: Array  # [K]
    means: Array  # [K, d]
    variances: Array  # [K, d]
    vectors: Array  # [K, d, d], eigenvectors in columns


class _ComponentPosteriors(NamedTuple):
    """The posterior of each component by itself."""

    log_joint: Array  # [B, K], log of weight times density
    x0: Array  # [B, K, d]
    score: Array  # [B, K, d]
    marginal: Array  # [B, K, d], variances of x_t along the eigenvectors


def _component_posteriors(p: _Components, c: Coeffs, x: Array) -> _ComponentPosteriors:
    """The formulas with `S⁻¹`, without a division by `a` or `s`, which may be 0."""
    a, s = c.a[..., None], c.s[..., None]
    marginal = a**2 * p.variances[None] + s**2
    centred = jnp.einsum("kie,bki->bke", p.vectors, x[:, None] - a * p.means[None])
    whitened = centred / marginal
    log_normal = -0.5 * jnp.sum(
        centred * whitened + jnp.log(marginal) + jnp.log(2.0 * jnp.pi), axis=-1
    )
    moved = a * p.variances[None] * whitened
    x0 = p.means[None] + jnp.einsum("kie,bke->bki", p.vectors, moved)
    score = -jnp.einsum("kie,bke->bki", p.vectors, whitened)
    return _ComponentPosteriors(p.log_weights[None] + log_normal, x0, score, marginal)


def _infer_from_components(p: _Components, c: Coeffs, x: Array) -> Posterior:
    post = _component_posteriors(p, c, x)
    shares = jax.nn.softmax(post.log_joint, axis=1)[..., None]
    return Posterior(
        x0=jnp.sum(shares * post.x0, axis=1),
        score=jnp.sum(shares * post.score, axis=1),
        log_density=jax.nn.logsumexp(post.log_joint, axis=1),
    )


@jax.jit
def _log_kernel(points: Array, c: Coeffs, x: Array) -> Array:
    """`-|x - a·x_i|² / 2s²`, `[B, N]`; under jit the differences `[B, N, d]` are never stored.

    The distance is the norm of the difference. A product of matrices would be faster, but inexact
    where `s` is small.
    """
    distances = jnp.sum(jnp.square(x[:, None] - c.a[..., None] * points[None]), axis=-1)
    return -0.5 * distances / jnp.square(c.s)


def _infer_from_points(points: Array, c: Coeffs, x: Array) -> Posterior:
    log_kernel = _log_kernel(points, c, x)
    x0 = jax.nn.softmax(log_kernel, axis=1) @ points
    n, d = points.shape
    log_density = jax.nn.logsumexp(log_kernel, axis=1) - jnp.log(n)
    log_density = log_density - 0.5 * d * jnp.log(2.0 * jnp.pi * c.s[:, 0] ** 2)
    return Posterior(x0, (c.a * x0 - x) / jnp.square(c.s), log_density)
