"""iDDPM's hybrid loss: the reverse step, the discretised likelihood, and what trains what."""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats
from jax.tree_util import register_dataclass

from diffjax import choices
from diffjax.objectives.base import Progress
from diffjax.objectives.denoising import Denoising
from diffjax.objectives.learned_variance import (
    LearnedVariance,
    discretised_log_probability,
    reverse_step,
)
from diffjax.process import beta_tables, paths, schedules, targets, times, weights
from diffjax.process.paths import coeffs
from diffjax.process.precond import Precond, TimeLabel
from diffjax.process.targets import encode
from diffjax.spec import build

PROGRESS = Progress(jnp.zeros((), jnp.int32))


@register_dataclass
@dataclass(frozen=True)
class At:
    """All examples at one time."""

    t: float

    def quantile(self, u, path):
        return jnp.full(jnp.shape(u), self.t)

    def log_density(self, t, path):
        return jnp.zeros_like(t)


def hybrid(density, *, path=None, target=None, scale=1e-3, gap=1e-3):
    objective = Denoising(
        path or beta_tables.LinearBetas(),
        Precond(target or targets.Noise(), TimeLabel(1.0)),
        weights.Constant(),
        density,
    )
    return LearnedVariance(objective, scale=scale, gap=gap)


def test_the_reverse_step_of_the_table_is_ddpms():
    """Ho et al. 2020, equations 6 and 7, from the betas in float64, at every step but the first."""
    betas = np.linspace(1e-4, 0.02, 1000)
    kept = np.concatenate([[1.0], np.cumprod(1.0 - betas)])
    k = np.arange(2, 1001)
    beta, now, before = betas[k - 1], kept[k], kept[k - 1]
    t = jnp.asarray(k / 1000.0, jnp.float32)
    c = coeffs(beta_tables.LinearBetas(), t, ndim=1)
    reverse, last = hybrid(times.DiscreteUniform()).reverse(c)
    assert not np.asarray(last).any()
    mean_0 = np.sqrt(before) * beta / (1 - now)
    mean_x = np.sqrt(1 - beta) * (1 - before) / (1 - now)
    np.testing.assert_allclose(reverse.mean_0, mean_0, rtol=2e-3)
    np.testing.assert_allclose(reverse.mean_x, mean_x, rtol=1e-4)
    np.testing.assert_allclose(np.exp(reverse.log_large), beta, rtol=2e-3)
    small = beta * (1 - before) / (1 - now)
    np.testing.assert_allclose(np.exp(reverse.log_small), small, rtol=2e-3)


def test_the_last_step_borrows_the_variance_of_the_one_before():
    """Nichol & Dhariwal 2021, and their code: the posterior's own variance is 0 there."""
    c = coeffs(beta_tables.LinearBetas(), jnp.array([1e-3, 2e-3]), ndim=1)
    reverse, last = hybrid(times.DiscreteUniform()).reverse(c)
    assert np.asarray(last).tolist() == [True, False]
    assert reverse.log_small[0] == pytest.approx(float(reverse.log_small[1]), abs=1e-4)
    assert float(jnp.exp(reverse.log_large[0])) == pytest.approx(1e-4, rel=1e-3)
    assert reverse.mean_0[0] == pytest.approx(1.0, abs=1e-5)  # the mean is the predicted x0
    assert reverse.mean_x[0] == pytest.approx(0.0, abs=1e-5)


@pytest.mark.parametrize("name", ["linear", "cosine_table", "sub_vp", "edm", "ddpm_table_zero_snr"])
def test_the_reverse_step_is_bayes_rule_on_any_path(name):
    """`q(x_next | x_t, x0)`, multiplied out on a grid in float64, for long steps."""
    path = build(choices.PATHS[name])
    low, high = float(path.t_min), float(path.t_noise)
    t, t_next = (np.array([low + share * (high - low)], np.float32) for share in (0.7, 0.4))
    with jax.enable_x64(True):
        here, there = (coeffs(path, jnp.asarray(each, jnp.float64), ndim=1) for each in (t, t_next))
        a, s, a_next, s_next = (float(x[0]) for x in (here.a, here.s, there.a, there.s))
    gap = jnp.asarray(t - t_next)
    reverse = reverse_step(path, jnp.asarray(t), jnp.asarray(t_next), jnp.asarray(t), gap)
    x0, x_t = 0.4, a * 0.4 + 0.7 * s
    # The forward process is Markov: x_t is a/a_next·x_next and noise that makes its variance s².
    forward = s**2 - (a / a_next * s_next) ** 2
    x = np.linspace(a_next * x0 - 12 * s_next, a_next * x0 + 12 * s_next, 40_001)
    density = scipy.stats.norm.pdf(x, a_next * x0, s_next) * scipy.stats.norm.pdf(
        x_t, a / a_next * x, np.sqrt(forward)
    )
    density /= density.sum()
    mean = density @ x
    variance = density @ (x - mean) ** 2
    found = float(reverse.mean_x[0] * x_t + reverse.mean_0[0] * x0)
    assert found == pytest.approx(mean, abs=1e-4 * np.sqrt(variance) + 1e-5 * abs(mean))
    assert float(jnp.exp(reverse.log_small[0])) == pytest.approx(variance, rel=1e-4)
    assert float(jnp.exp(reverse.log_large[0])) == pytest.approx(forward, rel=1e-4)


@pytest.mark.parametrize("mean", [-1.3, -0.61, 0.0, 1.0])
def test_probabilities_of_all_values_sum_to_one(mean):
    values = jnp.arange(256) / 127.5 - 1.0
    for std in (3e-3, 0.02, 0.4, 5.0):
        log_p = discretised_log_probability(values, jnp.full(256, mean), jnp.full(256, np.log(std)))
        assert np.isfinite(log_p).all()
        assert float(jax.nn.logsumexp(log_p)) == pytest.approx(0.0, abs=2e-4)
        # Each is the normal's mass between the middles of the values, in float64.
        ends = (np.arange(257) - 0.5) / 127.5 - 1.0
        ends[0], ends[-1] = -np.inf, np.inf
        normal = scipy.stats.norm(mean, std)
        mass = np.where(
            ends[:-1] > mean,
            normal.sf(ends[:-1]) - normal.sf(ends[1:]),
            normal.cdf(ends[1:]) - normal.cdf(ends[:-1]),
        )
        seen = mass > 1e-12
        np.testing.assert_allclose(np.exp(log_p)[seen], mass[seen], rtol=5e-3)


def test_far_tails_have_gradients():
    log_std = jnp.full(4, np.log(1e-3))
    mean = jnp.array([-0.5, 0.2, 0.5, 0.9])
    slope = jax.grad(lambda m: discretised_log_probability(jnp.zeros(4), m, log_std).sum())(mean)
    assert np.isfinite(slope).all()


def with_outputs(mean_part, fraction):
    """A network of two outputs, from what the target should be and what the variance gets."""

    def apply(params, x, noise_label, cond, *, train=False, key=None):
        return jnp.concatenate([mean_part(x, noise_label) + params[0], fraction + params[1]
                                + jnp.zeros_like(x)], axis=-1)  # fmt: skip

    return apply


def batch(image):
    return {"image": image, "label": jnp.zeros(len(image), jnp.int32)}


def test_the_bound_trains_the_variance_alone():
    objective = hybrid(times.DiscreteUniform(), scale=0.7)
    image = jnp.round(jax.random.uniform(jax.random.key(0), (64, 2, 2, 1)) * 255) / 127.5 - 1.0
    apply = with_outputs(lambda x, t: 0.9 * x, 0.2)

    @jax.jit
    def parts(params):
        loss, metrics = objective(apply, params, None, jax.random.key(1), batch(image), PROGRESS)
        bound = jnp.sum(metrics["bound"])
        return bound, jnp.sum(loss) - 0.7 * 1000.0 * bound

    by_bound, by_rest = np.asarray(jax.jacrev(parts)(jnp.zeros(2)))
    assert by_bound[0] == 0.0
    assert by_bound[1] != 0.0
    assert by_rest[0] != 0.0
    # What is left of the whole loss is the plain one, which has no variance (float32's rounding).
    assert abs(by_rest[1]) < 1e-4 * abs(700 * by_bound[1])


@pytest.mark.parametrize("name", ["noise", "v", "clean"])
def test_nothing_is_lost_where_mean_and_variance_are_right(name):
    """With x0 known and the posterior's own variance the KL is 0; any other variance costs."""
    path, target = beta_tables.LinearBetas(), choices.TARGETS[name]
    objective = hybrid(times.Uniform(), path=path, target=build(target))
    image = jnp.zeros((64, 1))

    # With x0 = 0 the noise is x_t/s, so that the right output is known.
    def right(x, t):
        c = coeffs(path, t, x.ndim)
        return encode(build(target)(c), paths.Pair(jnp.zeros_like(x), x / c.s))

    @jax.jit
    def metrics(fraction):
        apply = with_outputs(right, fraction)
        return objective(apply, jnp.zeros(2), None, jax.random.key(2), batch(image), PROGRESS)[1]

    def bound(fraction):
        found = metrics(fraction)
        inside = np.asarray(found["log_snr"]) < 8.0  # the last step has no KL
        return np.asarray(found["bound"])[inside]

    np.testing.assert_allclose(bound(-1.0), 0.0, atol=2e-4)
    # KL between normals of equal means: ½(log r + 1/r - 1), r from small to large variance.
    assert (bound(1.0) >= 0.0).all()
    assert bound(1.0).max() > 1e-5


@jax.jit
def slopes_of_bound(objective, variance, output):
    """By the second output, where the first is the best denoiser of normal data, `[100]`."""

    def apply(output, x, label, cond, *, train=False, key=None):
        best = variance / (variance + jnp.square(label[:, None])) * x
        return jnp.concatenate([best, output + jnp.zeros_like(x)], axis=-1)

    def bound(output, key):
        data_key, loss_key = jax.random.split(key)
        image = jnp.sqrt(variance) * jax.random.normal(data_key, (512, 1))
        return objective(apply, output, None, loss_key, batch(image), PROGRESS)[1]["bound"].mean()

    keys = jax.random.split(jax.random.key(3), 100)
    return jax.vmap(jax.grad(bound), (None, 0))(output, keys)


@pytest.mark.parametrize("t", [0.02, 0.2, 0.6])
def test_the_best_variance_is_that_of_the_true_reverse_step(t):
    """For Gaussian data: `small + mean_0²·Var[x0 | x_t]`, as Bao et al. 2022 (arXiv:2201.06503).

    At that output the mean gradient vanishes within its error, and the best output lies in [-1, 1].
    """
    variance, path, gap = 0.3**2, schedules.EDM(t_min=1e-3, t_noise=1.0), 0.01
    objective = hybrid(At(t), path=path, target=targets.Clean(), gap=gap)
    # On this path x_t = x0 + t·eps, in float64:
    left = variance * t**2 / (variance + t**2)
    s, s_next = t, t - gap
    forward = s**2 - s_next**2
    small = forward * s_next**2 / s**2
    best = small + (forward / s**2) ** 2 * left
    fraction = (np.log(best) - np.log(small)) / (np.log(forward) - np.log(small))
    assert 0.0 < fraction < 1.0
    output = 2.0 * fraction - 1.0

    def z(output):
        found = np.asarray(slopes_of_bound(objective, variance, output), np.float64)
        return found.mean() / (found.std(ddof=1) / 10.0)

    assert abs(z(output)) < 4.5
    # An output that is 1 off would have shown.
    assert z(output + 1.0) > 4.5
    assert z(output - 1.0) < -4.5


def test_the_last_step_is_a_likelihood_of_8_bit_data():
    """At the first step of the table the bound is -log p of the pixels under the predicted x0."""
    objective = hybrid(At(1e-3))
    image = jnp.array([[0.0], [1.0]]) * 2.0 - 1.0
    apply = with_outputs(lambda x, label: jnp.zeros_like(x), 1.0)
    _, metrics = objective(apply, jnp.zeros(2), None, jax.random.key(4), batch(image), PROGRESS)
    # Predicted noise 0 means x0 = x_t/a; the large variance is β_1 = 1e-4.
    noised = objective.objective.noised(
        jnp.full(2, 1e-3), jax.random.split(jax.random.key(4))[1], batch(image)
    )
    x0 = np.ravel(np.asarray(noised.x_t, np.float64)) / np.sqrt(1 - 1e-4)
    expected = [
        -scipy.stats.norm.logcdf(-1 + 1 / 255, x0[0], 0.01),
        -scipy.stats.norm.logsf(1 - 1 / 255, x0[1], 0.01),
    ]
    np.testing.assert_allclose(metrics["bound"], expected, rtol=5e-3, atol=1e-3)
