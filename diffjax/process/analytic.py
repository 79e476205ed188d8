"""Data whose best denoiser is known: the judge of everything else.

For a mixture of Gaussians `p(x0) = Σ w_i N(m_i, C_i)` every marginal of a path is again a mixture,
`p_t(x) = Σ w_i N(a·m_i, S_i)` with `S_i = a²·C_i + s²·I`, and the posterior mean of x0 is exact:

    E[x0 | x] = Σ r_i(x)·(m_i + a·C_i·S_i⁻¹·(x - a·m_i)),      r_i ∝ w_i·N(x; a·m_i, S_i)
"""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jax import Array
from jax.tree_util import register_dataclass

from diffjax.process.paths import Coeffs, Pair, Path, coeffs
from diffjax.process.precond import Predict


@register_dataclass
@dataclass(frozen=True)
class GaussianMixture:
    """A mixture of `K` Gaussians in `d` dimensions; `K = 1` is a Gaussian.

    Attributes:
        weights: `[K]`, positive, summing to 1.
        means: `[K, d]`.
        covariances: `[K, d, d]`, symmetric positive definite.
    """

    weights: Array
    means: Array
    covariances: Array

    def draw(self, key: Array, n: int) -> Array:
        """Samples of the data, `[n, d]`."""
        which, noise = jax.random.split(key)
        component = jax.random.choice(which, len(self.weights), (n,), p=self.weights)
        white = jax.random.normal(noise, (n, self.means.shape[1]))
        factors = jnp.linalg.cholesky(self.covariances)
        return self.means[component] + jnp.einsum("nij,nj->ni", factors[component], white)

    def predict(self, path: Path) -> Predict:
        """The best denoiser on a path, `x[B, d] -> (E[x0|x_t], E[eps|x_t])`; labels are ignored."""

        def predict(x: Array, t: Array, cond: Array | None) -> Pair:
            del cond
            c = coeffs(path, t, ndim=2)
            log_joint, residual = self._components(c, x)
            shrunk = jnp.einsum("kij,bkj->bki", self.covariances, residual)
            posterior_means = self.means + c.a[..., None] * shrunk
            responsibility = jax.nn.softmax(log_joint, axis=1)[..., None]
            x0 = jnp.sum(responsibility * posterior_means, axis=1)
            # The same sum for eps: E[eps | x, i] = s·S⁻¹·(x - a·m); no division by s.
            eps = jnp.sum(responsibility * c.s[..., None] * residual, axis=1)
            return Pair(x0, eps)

        return predict

    def log_density(self, path: Path, x: Array, t: Array) -> Array:
        """Exact `log p_t(x)`, `[B]`, for `x[B, d]` and `t[B]`."""
        log_joint, _ = self._components(coeffs(path, t, ndim=2), x)
        return jax.nn.logsumexp(log_joint, axis=1)

    def _components(self, c: Coeffs, x: Array) -> tuple[Array, Array]:
        """Log of weight times density, `[B, K]`, and `S⁻¹·(x - a·m)`, `[B, K, d]`."""
        d = x.shape[1]
        a, s = c.a[..., None, None], c.s[..., None, None]
        marginal = a**2 * self.covariances + s**2 * jnp.eye(d)
        centred = x[:, None] - c.a[..., None] * self.means
        residual = jnp.linalg.solve(marginal, centred[..., None])[..., 0]
        mahalanobis = jnp.sum(centred * residual, axis=-1)
        _, log_det = jnp.linalg.slogdet(marginal)
        log_normal = -0.5 * (mahalanobis + log_det + d * jnp.log(2 * jnp.pi))
        return jnp.log(self.weights) + log_normal, residual


def gaussian_flow(
    mean: Array, covariance: Array, path: Path, x: Array, t_from: float, t_to: float
) -> Array:
    """Where the probability-flow ODE carries points of a Gaussian's path, exactly.

    All marginal covariances `S_t = a²·C + s²·I` commute, so
    `x(t) - a(t)·m = S_t^½ · S_from^-½ · (x - a(t_from)·m)`.

    Args:
        mean: `[d]`.
        covariance: `[d, d]`.
        path: any path.
        x: `[B, d]`, at `t_from`.
        t_from: where the points are.
        t_to: where they go, before or after.

    Returns:
        `[B, d]`.
    """
    eigenvalues, vectors = jnp.linalg.eigh(covariance)
    here, there = (coeffs(path, jnp.array([t]), ndim=2) for t in (t_from, t_to))
    scale = jnp.sqrt(
        (there.a**2 * eigenvalues + there.s**2) / (here.a**2 * eigenvalues + here.s**2)
    )
    return there.a * mean + ((x - here.a * mean) @ vectors * scale) @ vectors.T
