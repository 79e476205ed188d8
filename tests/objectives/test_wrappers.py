"""Wrappers of objectives: unbiased if they claim it, and equal to loops and closed forms."""

from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffjax.objectives.base import Objective, Progress
from diffjax.objectives.denoising import Denoising
from diffjax.objectives.wrappers import (
    Adaptive,
    Contrastive,
    Dispersive,
    FourierUncertainty,
    Importance,
    Uncertainty,
)
from diffjax.process import paths, targets, times, uniforms, weights
from diffjax.process.paths import Pair
from diffjax.process.precond import Precond, TimeLabel
from diffjax.process.targets import encode
from experiments import sample, train
from experiments.flags import cli

FLOW = Denoising(
    paths.Linear(), Precond(targets.Velocity(), TimeLabel(1.0)), weights.Constant(), times.Uniform()
)
BATCH, REPEATS = 256, 200


def network(params, x, noise_label, cond, *, key=None, hidden=False) -> Any:
    """Right nowhere, and most wrong around t = 0.3."""
    bump = jnp.exp(-0.5 * jnp.square((noise_label - 0.3) / 0.05))
    output = 0.2 * x - 1.5 * params * bump[:, None]
    return (output, (jnp.tanh(x),)) if hidden else output


def batch(key):
    image = 0.5 * jax.random.normal(key, (BATCH, 2))
    return {"image": image, "cond": jnp.zeros(BATCH, jnp.int32)}


def _mean_losses(objective, memory):
    """Of independent batches, `[R]`."""

    def one(key):
        data_key, loss_key = jax.random.split(key)
        progress = Progress(jnp.zeros((), jnp.int32), memory)
        loss, _ = objective(network, 1.0, 1.0, loss_key, batch(data_key), progress)
        return loss.mean()

    return jax.vmap(one)(jax.random.split(jax.random.key(0), REPEATS))


def mean_losses(objective, memory=()):
    """Not a program of an objective: see test_times.py."""
    program = jax.jit(lambda memory: _mean_losses(objective, memory))
    return np.asarray(program(memory), np.float64)


@jax.jit
def _of_adaptive(power, memory):
    return _mean_losses(Adaptive(FLOW, power), memory)


def mean_losses_of_adaptive(memory, power=2.0):
    return np.asarray(_of_adaptive(power, memory), np.float64)


def random_memory(seed, spread=1.0):
    return np.exp(spread * np.random.default_rng(seed).standard_normal(32)).astype(np.float32)


@pytest.fixture(scope="module")
def plain():
    return mean_losses(FLOW)


def assert_same_mean(one, other):
    """Within 4.5 standard errors, though with other keys they would be independent."""
    error = np.sqrt((one.var(ddof=1) + other.var(ddof=1)) / REPEATS)
    assert error < 0.02 * other.mean()
    assert abs(one.mean() - other.mean()) < 4.5 * error


@pytest.mark.parametrize(
    "proposal",
    [times.CosMap(), pytest.param(times.Mode(-0.8), marks=pytest.mark.thorough)],
    ids=str,
)
def test_importance_leaves_the_mean_loss(plain, proposal):
    assert_same_mean(mean_losses(Importance(FLOW, proposal)), plain)


@pytest.mark.thorough
def test_a_proposal_without_its_weights_would_show(plain):
    moved = mean_losses(replace(FLOW, times=times.LogitNormal(-0.8, 1.0)))
    error = np.sqrt((moved.var(ddof=1) + plain.var(ddof=1)) / REPEATS)
    assert abs(moved.mean() - plain.mean()) > 10 * error


@pytest.mark.thorough(tenth=False)
@pytest.mark.parametrize("seed", [0, 1])
def test_any_memory_of_adaptive_leaves_the_mean_loss(plain, seed):
    assert_same_mean(mean_losses_of_adaptive(random_memory(seed, spread=2.0)), plain)


def loss_by_bin(power, n=64):
    """`E[loss^power]^(1/power)` in 32 bins of time, from the normals' moments in float64.

    With normal data the residual `network - (eps - x0)` is normal for each t, in two dimensions.
    """
    t = (np.arange(32 * n) + 0.5) / (32 * n)
    t = 1e-3 + t * 0.999
    # residual = 0.2·((1 - t)·x0 + t·eps) - bump - eps + x0, with Var x0 = 0.25
    mean = -1.5 * np.exp(-0.5 * ((t - 0.3) / 0.05) ** 2)
    variance = (0.2 * (1 - t) + 1) ** 2 * 0.25 + (0.2 * t - 1) ** 2
    first = mean**2 + variance
    # The loss is the mean of two independent squares.
    second = first**2 + 0.5 * (2 * variance**2 + 4 * mean**2 * variance)
    moment = {1: first, 2: second}[power].reshape(32, n).mean(axis=1)
    return moment ** (1 / power)


@jax.jit
def learned(power, keys):
    """The memory after a step with each key, and its density."""
    objective = Adaptive(FLOW, power=power, decay=0.99)

    def step(memory, key):
        data_key, loss_key = jax.random.split(key)
        progress = Progress(jnp.zeros((), jnp.int32), memory)
        _, metrics = objective(network, 1.0, 1.0, loss_key, batch(data_key), progress)
        return objective.update_memory(memory, metrics), None

    memory, _ = jax.lax.scan(step, objective.init_memory(), keys)
    return memory, objective.density(memory)


@pytest.mark.parametrize("power", [pytest.param(1, marks=pytest.mark.thorough(tenth=False)), 2])
def test_adaptive_follows_the_loss_and_lowers_the_variance(plain, power):
    memory, density = learned(float(power), jax.random.split(jax.random.key(3), 1000))
    density = np.asarray(density, np.float64)
    size = loss_by_bin(power)
    expected = 0.1 + 0.9 * size / size.mean()
    assert density.mean() == pytest.approx(1.0, abs=1e-5)
    np.testing.assert_allclose(density, expected, rtol=0.12)
    losses = mean_losses_of_adaptive(memory, float(power))
    assert_same_mean(losses, plain)
    # That only times drawn by the second moment have the least variance is iDDPM's claim.
    assert losses.var() < plain.var()


def test_adaptive_starts_uniform_and_keeps_bins_without_examples():
    objective = Adaptive(FLOW, num_bins=4, decay=0.5)

    @jax.jit
    def program(bins, losses):
        start = objective.init_memory()
        metrics = {"time_bin": bins, "unweighted_loss": losses}
        return objective.density(start), objective.update_memory(start, metrics)

    density, memory = program(np.array([0, 0, 3], np.int32), np.array([1.0, 3.0, 2.0], np.float32))
    np.testing.assert_allclose(density, 1.0)
    # Bin 0: halfway from 1 to (1² + 3²)/2; bin 3: halfway to 2².
    np.testing.assert_allclose(memory, [3.0, 1.0, 1.0, 2.5])


@pytest.mark.parametrize(
    "name", ["stratified", pytest.param("low_discrepancy", marks=pytest.mark.thorough)]
)
def test_adaptive_keeps_the_strata(name):
    draw = {"stratified": uniforms.Stratified(), "low_discrepancy": uniforms.LowDiscrepancy()}[name]
    memory = random_memory(0)
    spread = mean_losses(Adaptive(replace(FLOW, uniforms=draw)), memory)
    alone = mean_losses_of_adaptive(memory)
    assert_same_mean(spread, alone)
    assert spread.var() < 0.8 * alone.var()


# Learned uncertainty.


@dataclass(frozen=True)
class Known(Objective):
    """A loss whose mean at each log-SNR is known: `exp(log_mean(λ))` times a unit exponential."""

    log_mean: Any

    def __call__(self, apply, params, teacher_params, key, batch, progress):
        level_key, loss_key = jax.random.split(key)
        log_snr = jax.random.uniform(level_key, (BATCH,), minval=-25.0, maxval=25.0)
        loss = jnp.exp(self.log_mean(log_snr)) * jax.random.exponential(loss_key, (BATCH,))
        return loss, {"log_snr": log_snr}


def test_the_best_uncertainty_is_the_log_of_the_mean_loss():
    series = jnp.array([0.3, -1.0, 0.5, 0.2])

    def log_mean(log_snr):  # the same cosines, written out
        angle = jnp.pi * (jnp.clip(log_snr, -20.0, 20.0) + 20.0) / 40.0
        return 0.3 - jnp.cos(angle) + 0.5 * jnp.cos(2 * angle) + 0.2 * jnp.cos(3 * angle)

    objective = Uncertainty(Known(log_mean), num_terms=4)
    assert objective.init_params(jax.random.key(0))["uncertainty"].shape == (4,)
    progress = Progress(jnp.zeros((), jnp.int32))

    def mean_loss(series, key):
        return objective(network, {"uncertainty": series}, None, key, {}, progress)[0].mean()

    @jax.jit
    def gradients(at):
        keys = jax.random.split(jax.random.key(1), REPEATS)
        return jax.vmap(jax.grad(mean_loss), (None, 0))(at, keys)

    def z(at):
        found = np.asarray(gradients(at), np.float64)
        return found.mean(0) / (found.std(0, ddof=1) / np.sqrt(REPEATS))

    assert np.abs(z(series)).max() < 4.5
    for term in range(4):  # and at no other series
        assert np.abs(z(series.at[term].add(0.05))).max() > 4.5


@pytest.mark.thorough
def test_the_best_uncertainty_of_fourier_features_is_the_log_of_the_mean_loss():
    """Of a loss whose log is a function that the features can represent, written out in NumPy."""
    objective = FourierUncertainty(Known(None), num_terms=8)
    drawn: Any = objective.init_params(jax.random.key(0))["uncertainty"]
    rng = np.random.default_rng(0)
    kernel = 3.0 * rng.normal(size=(8, 1)).astype(np.float32)  # of any length
    f, phi = (np.asarray(drawn["fourier"][name]) for name in ("frequencies", "phases"))

    def log_mean(log_snr):
        angles = jnp.multiply.outer(-jnp.clip(log_snr, -20.0, 20.0) / 8.0, f) + phi[None]
        return jnp.sqrt(2.0) * jnp.cos(angles) @ kernel[:, 0] / np.linalg.norm(kernel)

    objective = FourierUncertainty(Known(log_mean), num_terms=8)
    progress = Progress(jnp.zeros((), jnp.int32))

    def mean_loss(kernel, key):
        params = {"uncertainty": {**drawn, "linear": {"kernel": kernel}}}
        return objective(network, params, None, key, {}, progress)[0].mean()

    @jax.jit
    def gradients(at):
        keys = jax.random.split(jax.random.key(1), REPEATS)
        return jax.vmap(jax.grad(mean_loss), (None, 0))(at, keys)

    def z(at):
        found = np.asarray(gradients(at), np.float64)[..., 0]
        return found.mean(0) / (found.std(0, ddof=1) / np.sqrt(REPEATS))

    assert np.abs(z(kernel)).max() < 4.5
    assert np.abs(z(2.0 * kernel)).max() < 4.5  # the same function
    for term in range(8):  # and at no other one
        other = kernel.copy()
        other[term] += 0.2 * np.linalg.norm(kernel)
        assert np.abs(z(other)).max() > 4.5


def test_uncertainty_leaves_the_minimiser_of_the_network():
    """The gradient by the network's parameters is that of the loss, at each level by a factor."""
    objective = Uncertainty(FLOW)
    key, progress = jax.random.key(0), Progress(jnp.zeros((), jnp.int32))
    series = {"uncertainty": 0.1 * jnp.arange(16.0)}
    # Wrappers hand all parameters on; this network reads one number.
    apply = lambda params, *inputs, **options: network(params["x"], *inputs, **options)  # noqa: E731

    def losses(objective):
        return lambda x: objective(
            apply, {"x": x, **series}, None, key, batch(jax.random.key(1)), progress
        )

    @jax.jit
    def program(x):
        return [jax.jvp(losses(each), (x,), (jnp.ones_like(x),)) for each in (objective, FLOW)]

    found, of_flow = jax.device_get(program(1.0))
    (wrapped, metrics), (slope, _) = found
    (loss, _), (plain_slope, _) = of_flow
    share = (np.clip(metrics["log_snr"], -20, 20) + 20) / 40
    u = sum(0.1 * i * np.cos(np.pi * i * share) for i in range(16))
    np.testing.assert_allclose(wrapped, loss * np.exp(-u) + u, rtol=2e-4, atol=1e-4)
    np.testing.assert_allclose(slope, plain_slope * np.exp(-u), rtol=1e-3, atol=1e-5)


# Terms that are added.


def test_contrastive_is_the_loop_of_its_paper():
    scale = 0.3

    @jax.jit
    def program(key, data_key):
        data, progress = batch(data_key), Progress(jnp.zeros((), jnp.int32))
        loss, _ = Contrastive(FLOW, scale)(network, 1.0, None, key, data, progress)
        # The same draws, by the objective that is wrapped.
        time_key, rest = jax.random.split(key)
        u = uniforms.Independent()(time_key, BATCH)
        noised = FLOW.noised(times.Uniform().quantile(u, FLOW.path), rest, data)
        return loss, jnp.ravel(noised.c.t), *noised.pair[:2]

    loss, t, x0, eps = jax.device_get(program(jax.random.key(2), jax.random.key(3)))
    x0, eps = (each.astype(np.float64) for each in (x0, eps))
    for i in range(0, BATCH, 17):
        x_t = (1 - t[i]) * x0[i] + t[i] * eps[i]
        output = 0.2 * x_t - 1.5 * np.exp(-0.5 * ((t[i] - 0.3) / 0.05) ** 2)
        own = np.mean((output - (eps[i] - x0[i])) ** 2)
        other = np.mean((output - (eps[i - 1] - x0[i - 1])) ** 2)
        assert float(loss[i]) == pytest.approx(own - scale * other, rel=1e-4, abs=1e-5)


def test_dispersive_is_the_loop_of_its_paper():
    objective = Dispersive(FLOW, scale=0.7, temperature=0.4)

    @jax.jit
    def program(key, data_key):
        data, progress = batch(data_key), Progress(jnp.zeros((), jnp.int32))
        loss, plain = (
            each(network, 1.0, None, key, data, progress)[0] for each in (objective, FLOW)
        )
        time_key, rest = jax.random.split(key)
        t = times.Uniform().quantile(uniforms.Independent()(time_key, BATCH), FLOW.path)
        return loss, plain, FLOW.noised(t, rest, data).x_t

    loss, plain, x_t = jax.device_get(program(jax.random.key(4), jax.random.key(5)))
    z = np.tanh(x_t.astype(np.float64))
    kernel = np.exp(-np.mean((z[:, None] - z[None]) ** 2, axis=-1) / 0.4)
    np.testing.assert_allclose(loss - plain, 0.7 * np.log(np.mean(kernel)), rtol=1e-4, atol=1e-5)


def test_activations_that_are_all_alike_disperse_to_nothing():
    dispersion = jax.jit(Dispersive(FLOW).dispersion)
    far = np.zeros((8, 2, 2, 1), np.float32)
    assert float(dispersion(far + 1.0)) == pytest.approx(0.0, abs=1e-5)
    far[:, 0, 0, 0] = 200.0 * np.arange(8)
    assert float(dispersion(far)) == pytest.approx(-np.log(8.0), rel=1e-5)


@pytest.mark.parametrize(
    "wrapped",
    [
        Importance(FLOW, times.LogitNormal()),
        Adaptive(FLOW),
        Contrastive(FLOW),
        Dispersive(FLOW),
        Uncertainty(Adaptive(FLOW)),
    ],
    ids=lambda wrapped: type(wrapped).__name__,
)
def test_wrappers_share_what_they_wrap(wrapped):
    assert wrapped.path is FLOW.path
    assert wrapped.precond is FLOW.precond
    assert wrapped.traits.outputs == 1
    at = np.array([0.5], np.float32)
    found, expected = jax.jit(lambda at: (wrapped.effective_weight(at), FLOW.effective_weight(at)))(
        at
    )
    np.testing.assert_allclose(found, expected)


def test_the_effective_weight_is_what_the_loss_pays():
    """With every noise wrong by 1, the mean loss is the integral of the effective weight."""
    t = np.linspace(0.1, 0.9, 2001).astype(np.float32)
    levels = np.linspace(-2.0 * np.log(9.0), 2.0 * np.log(9.0), 2001)

    @jax.jit
    def program(t, levels):
        images = jnp.zeros((len(t), 1))
        noised = FLOW.noised(t, jax.random.key(0), {"image": images, "cond": images})
        # Where the noise is wrong by 1 and x_t is what it is, x0 is wrong by -s/a.
        wrong = Pair(noised.pair.x0 - noised.c.s / noised.c.a, noised.pair.eps + 1.0)
        density = jnp.exp(FLOW.times.log_density(t, FLOW.path))
        return FLOW.loss(noised, encode(noised.k, wrong)), density, FLOW.effective_weight(levels)

    found = jax.device_get(program(t, np.float32(levels)))
    loss, density, weight = (each.astype(np.float64) for each in found)
    assert np.trapezoid(weight, levels) == pytest.approx(
        np.trapezoid(loss * density, np.asarray(t, np.float64)), rel=1e-3
    )


def run(script, *arguments):
    return cli.run(script.main, script.FLAGS, usage=script.USAGE, argv=arguments)


@pytest.mark.thorough
def test_a_wrapped_objective_from_training_to_samples(tmp_path):
    """Two outputs, and parameters beside the network's."""
    tiny = [
        "--config.num_steps=2", "--config.batch_size=16", "--config.model.hidden_size=16",
        "--config.model.depth=1", "--config.sampling.num_steps=2",
        "--config.evaluation.num_samples=20", "--config.evaluation.batch_size=104",
        "--config.evaluation.solvers=()", f"--workdir={tmp_path / 'run'}",
    ]  # fmt: skip
    choices = "objective=iddpm,model=dit,wrappers=learned_variance+uncertainty"
    config = f"--config=configs/digits.py:{choices}"
    assert run(train, config, *tiny) == 0
    assert run(train, config, *tiny) == 0, "the saved config must be the same config"
    assert run(sample, f"--workdir={tmp_path / 'run'}", "--num_samples=4") == 0


def test_wrappers_that_know_nothing_of_each_other_are_refused(capsys):
    config = "--config=configs/digits.py:objective=iddpm,wrappers=learned_variance+second_moment"
    assert run(train, config, "--dry_run") == 2
    assert "Adaptive goes around a Denoising alone" in capsys.readouterr().err
