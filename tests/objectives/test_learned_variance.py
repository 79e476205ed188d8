"""iDDPM's hybrid loss: the reverse step, the discretised likelihood, and what trains what."""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats
from jax.tree_util import register_dataclass

from diffjax import choices
from diffjax.compiling import once
from diffjax.objectives.base import Progress
from diffjax.objectives.denoising import Denoising
from diffjax.objectives.learned_variance import (
    LearnedVariance,
    Reverse,
    discretised_log_probability,
    reverse_step,
)
from diffjax.process import beta_tables, paths, schedules, targets, times, weights
from diffjax.process.paths import coeffs
from diffjax.process.precond import Precond, TimeLabel
from diffjax.process.targets import encode
from diffjax.spec import build
from tests.support.any_path import numbered

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


@jax.jit
def reverse_of_the_table(t):
    c = coeffs(beta_tables.LinearBetas(), t, ndim=1)
    return hybrid(times.DiscreteUniform()).reverse(c)


def reverse_at(steps):
    """The reverse step of DDPM's table at some of its 1,000 steps."""
    reverse, last = jax.device_get(
        reverse_of_the_table(np.arange(1, 1001, dtype=np.float32) / 1000)
    )
    return Reverse(*(part[steps - 1] for part in reverse)), last[steps - 1]


def test_the_reverse_step_of_the_table_is_ddpms():
    """Ho et al. 2020, equations 6 and 7, from the betas in float64, at every step but the first."""
    betas = np.linspace(1e-4, 0.02, 1000)
    kept = np.concatenate([[1.0], np.cumprod(1.0 - betas)])
    k = np.arange(2, 1001)
    beta, now, before = betas[k - 1], kept[k], kept[k - 1]
    reverse, last = reverse_at(k)
    assert not last.any()
    mean_0 = np.sqrt(before) * beta / (1 - now)
    mean_x = np.sqrt(1 - beta) * (1 - before) / (1 - now)
    np.testing.assert_allclose(reverse.mean_0, mean_0, rtol=2e-3)
    np.testing.assert_allclose(reverse.mean_x, mean_x, rtol=1e-4)
    np.testing.assert_allclose(np.exp(reverse.log_large), beta, rtol=2e-3)
    small = beta * (1 - before) / (1 - now)
    np.testing.assert_allclose(np.exp(reverse.log_small), small, rtol=2e-3)


def test_the_last_step_borrows_the_variance_of_the_one_before():
    """Nichol & Dhariwal 2021, and their code: the posterior's own variance is 0 there."""
    reverse, last = reverse_at(np.array([1, 2]))
    assert last.tolist() == [True, False]
    assert reverse.log_small[0] == pytest.approx(float(reverse.log_small[1]), abs=1e-4)
    assert np.exp(reverse.log_large[0]) == pytest.approx(1e-4, rel=1e-3)
    assert reverse.mean_0[0] == pytest.approx(1.0, abs=1e-5)  # the mean is the predicted x0
    assert reverse.mean_x[0] == pytest.approx(0.0, abs=1e-5)


PATHS = numbered(
    {
        name: build(choices.PATHS[name])
        for name in ("linear", "cosine_table", "sub_vp", "edm", "ddpm_table_zero_snr")
    }
)


@once()
def scales(path, t):
    return coeffs(path, t, ndim=1)[1:3]


reverse_step_of = once()(reverse_step)


@pytest.mark.parametrize("name", PATHS)
def test_the_reverse_step_is_bayes_rule_on_any_path(name):
    """`q(x_next | x_t, x0)`, multiplied out on a grid in float64, for long steps."""
    path = PATHS[name]
    low, high = path.t_min, path.t_noise
    t, t_next = (np.array([low + share * (high - low)], np.float32) for share in (0.7, 0.4))
    with jax.enable_x64(True):
        (a, s), (a_next, s_next) = (
            map(float, np.ravel(scales(path, np.float64(each)))) for each in (t, t_next)
        )
    reverse = reverse_step_of(path, t, t_next, t, t - t_next)
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
    assert float(np.exp(reverse.log_small[0])) == pytest.approx(variance, rel=1e-4)
    assert float(np.exp(reverse.log_large[0])) == pytest.approx(forward, rel=1e-4)


log_probability = jax.jit(discretised_log_probability)


@pytest.mark.parametrize("mean", [-1.3, -0.61, 0.0, 1.0])
def test_probabilities_of_all_values_sum_to_one(mean):
    values = (np.arange(256) / 127.5 - 1.0).astype(np.float32)
    for std in (3e-3, 0.02, 0.4, 5.0):
        inputs = (np.full(256, each, np.float32) for each in (mean, np.log(std)))
        log_p = np.asarray(log_probability(values, *inputs), np.float64)
        assert np.isfinite(log_p).all()
        assert scipy.special.logsumexp(log_p) == pytest.approx(0.0, abs=2e-4)
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
    log_std = np.full(4, np.log(1e-3), np.float32)
    mean = np.array([-0.5, 0.2, 0.5, 0.9], np.float32)

    @jax.jit
    @jax.grad
    def slope(mean):
        return discretised_log_probability(jnp.zeros(4), mean, log_std).sum()

    assert np.isfinite(slope(mean)).all()


def with_outputs(mean_part, fraction):
    """A network of two outputs, from what the target should be and what the variance gets."""

    def apply(params, x, noise_label, cond, *, key=None):
        return jnp.concatenate([mean_part(x, noise_label) + params[0], fraction + params[1]
                                + jnp.zeros_like(x)], axis=-1)  # fmt: skip

    return apply


def batch(image):
    return {"image": image, "cond": np.zeros(len(image), np.int32)}


@pytest.mark.thorough(tenth=False)
def test_the_bound_trains_the_variance_alone():
    objective = hybrid(times.DiscreteUniform(), scale=0.7)
    image = np.random.default_rng(0).integers(0, 256, (64, 2, 2, 1)) / 127.5 - 1.0
    image = image.astype(np.float32)
    apply = with_outputs(lambda x, t: 0.9 * x, 0.2)

    @jax.jit
    @jax.jacrev
    def slopes(params):
        loss, metrics = objective(apply, params, None, jax.random.key(1), batch(image), PROGRESS)
        bound = jnp.sum(metrics["bound"])
        return bound, jnp.sum(loss) - 0.7 * 1000.0 * bound

    by_bound, by_rest = np.asarray(slopes(np.zeros(2, np.float32)))
    assert by_bound[0] == 0.0
    assert by_bound[1] != 0.0
    assert by_rest[0] != 0.0
    # What is left of the whole loss is the plain one, which has no variance (float32's rounding).
    assert abs(by_rest[1]) < 1e-4 * abs(700 * by_bound[1])


@pytest.mark.parametrize(
    "name",
    [
        "noise",
        pytest.param("v", marks=pytest.mark.thorough),
        pytest.param("clean", marks=pytest.mark.thorough),
    ],
)
def test_nothing_is_lost_where_mean_and_variance_are_right(name):
    """With x0 known and the posterior's own variance the KL is 0; any other variance costs."""
    path, target = beta_tables.LinearBetas(), choices.TARGETS[name]
    objective = hybrid(times.Uniform(), path=path, target=build(target))
    image = np.zeros((64, 1), np.float32)

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


@once()
def slopes_of_bound(objective, variance, output):
    """By the second output, where the first is the best denoiser of normal data, `[100]`."""

    def apply(output, x, label, cond, *, key=None):
        best = variance / (variance + jnp.square(label[:, None])) * x
        return jnp.concatenate([best, output + jnp.zeros_like(x)], axis=-1)

    def bound(output, key):
        data_key, loss_key = jax.random.split(key)
        image = jnp.sqrt(variance) * jax.random.normal(data_key, (512, 1))
        return objective(apply, output, None, loss_key, batch(image), PROGRESS)[1]["bound"].mean()

    keys = jax.random.split(jax.random.key(3), 100)
    return jax.vmap(jax.grad(bound), (None, 0))(output, keys)


@pytest.mark.thorough(tenth=False)
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
    image = np.array([[-1.0], [1.0]], np.float32)
    apply = with_outputs(lambda x, label: jnp.zeros_like(x), 1.0)

    @jax.jit
    def program(key, batch):
        _, metrics = objective(apply, jnp.zeros(2), None, key, batch, PROGRESS)
        noised = objective.objective.noised(jnp.full(2, 1e-3), jax.random.split(key)[1], batch)
        return metrics["bound"], noised.x_t

    bound, x_t = program(jax.random.key(4), batch(image))
    # Predicted noise 0 means x0 = x_t/a; the large variance is β_1 = 1e-4.
    x0 = np.ravel(np.asarray(x_t, np.float64)) / np.sqrt(1 - 1e-4)
    expected = [
        -scipy.stats.norm.logcdf(-1 + 1 / 255, x0[0], 0.01),
        -scipy.stats.norm.logsf(1 - 1 / 255, x0[1], 0.01),
    ]
    np.testing.assert_allclose(bound, expected, rtol=5e-3, atol=1e-3)
