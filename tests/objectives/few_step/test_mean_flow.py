"""Mean flow: its identity, its target, its one step, and what it refuses."""

from dataclasses import replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen as nn

from diffjax import choices
from diffjax.compiling import once
from diffjax.conditions import of_classes
from diffjax.errors import UserError
from diffjax.models.layers.attention import resolve
from diffjax.objectives.base import Progress
from diffjax.objectives.denoising import Denoising
from diffjax.objectives.few_step.mean_flow import MeanFlow
from diffjax.oracle import analytic
from diffjax.oracle.verify import verify_objective
from diffjax.process import paths, targets, times, uniforms, weights
from diffjax.process.paths import coeffs
from diffjax.process.precond import (
    LogSNRLabel,
    Meaning,
    Precond,
    TimeLabel,
    denoiser,
    flow_map_predictor,
    interval_inputs,
)
from diffjax.process.targets import chord, decode
from diffjax.sampling import grids, sample, solvers
from diffjax.wiring import check_wired, wire
from tests.objectives.test_objectives import config_for
from tests.support.any_path import numbered

PATHS = {"linear": paths.Linear(), "cosine": paths.Cosine(), "ddpm": paths.LinearBeta()}
NUMBERED = numbered(PATHS)  # one program for all
MIXTURE = analytic.GaussianMixture(
    jnp.array([0.3, 0.7]),
    jnp.array([[-0.7, 0.3], [0.6, -0.1]]),
    jnp.array([[[0.03, 0.01], [0.01, 0.02]], [[0.02, 0.0], [0.0, 0.05]]]),
)
GAUSSIAN = analytic.Gaussian(jnp.array([0.4, -0.3]), jnp.array([[0.2, 0.05], [0.05, 0.1]]))
every_path = pytest.mark.parametrize("path", NUMBERED.values(), ids=NUMBERED)


def flow_matching(path=PATHS["linear"], label=None, **parts):
    density = parts.pop("times", times.LogitNormal(-0.4))
    precond = Precond(targets.Velocity(), label or TimeLabel(1.0))
    return Denoising(path, precond, weights.Constant(), density, **parts)


def mean_flow(path=PATHS["linear"], label=None, **parts):
    density = parts.pop("times", times.LogitNormal(-0.4))
    precond = Precond(targets.Velocity(), label or TimeLabel(1.0))
    weight = parts.pop("weight", weights.Constant())
    return MeanFlow(path, precond, weight, density, **parts)


def batch_in_numpy(*shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


@once()
def pair_of_an_average_velocity(path, x, u, t, t_to):
    here, there = (coeffs(path, time, 2) for time in (t, t_to))
    return here, there, decode(here, chord(path, t, t_to, 2), u, x)


@every_path
@pytest.mark.parametrize("t_to", [0.0, 0.3, 0.62, 0.695, 0.7])
def test_a_pair_of_an_average_velocity_mixes_at_both_ends(path, t_to):
    t, t_to = np.full(4, 0.7, np.float32), np.full(4, t_to, np.float32)
    x, u = batch_in_numpy(2, 4, 3)
    here, there, pair = jax.device_get(pair_of_an_average_velocity(path, x, u, t, t_to))
    np.testing.assert_allclose(here.a * pair.x0 + here.s * pair.eps, x, atol=2e-5)
    at_end = there.a * pair.x0 + there.s * pair.eps
    np.testing.assert_allclose(at_end, x + (t_to - t)[:, None] * u, atol=2e-5)


def test_a_short_chord_loses_no_digits():
    """The difference of float32s over 0.001 would be wrong by 1e-4."""
    t, t_to = np.array([0.7], np.float32), np.array([0.699], np.float32)
    k_x, k_e = jax.jit(lambda t, t_to: chord(paths.Cosine(), t, t_to, 1))(t, t_to)
    span = t.astype(float) - t_to.astype(float)
    first, second = 0.5 * np.pi * t.astype(float), 0.5 * np.pi * t_to.astype(float)
    np.testing.assert_allclose(k_x, (np.cos(first) - np.cos(second)) / span, rtol=3e-6)
    np.testing.assert_allclose(k_e, (np.sin(first) - np.sin(second)) / span, rtol=3e-6)


@once(2)
def sampled_and_carried(path, x, num_steps):
    predict = MIXTURE.predict(path)

    def denoise(x, t):
        return predict(x, jnp.broadcast_to(t, (len(x), *t.shape)), None)

    keys = jax.random.split(jax.random.key(1), len(x))
    grid = grids.Power()(path, num_steps)
    end = sample.sample(denoise, solvers.flow_map(), path, grid, keys, x)
    return end, MIXTURE.flow(path, x, path.t_noise, 0.0)


@pytest.mark.thorough(tenth=False)
@every_path
@pytest.mark.parametrize("num_steps", [1, 5])
def test_with_the_exact_flow_map_any_number_of_steps_ends_where_the_flow_does(path, num_steps):
    end, carried = sampled_and_carried(path, batch_in_numpy(8, 2), num_steps)
    # A step divides float32 differences by others: 1e-6 becomes 1e-5 where alpha is small.
    np.testing.assert_allclose(end, carried, atol=1e-4)


@once(1)
def said_and_expected(path, label):
    """The prediction of a network that returns its labels, and the prediction expected of it."""
    precond = Precond(targets.Velocity(), label)

    def apply(params, x, noise_label, cond, *, key=None):
        assert noise_label.shape == (len(x), 2)
        return jnp.broadcast_to(noise_label @ params, x.shape[::-1]).T

    predict = flow_map_predictor(apply, jnp.array([1.0, -2.0]), path, precond)
    x, t, t_to = jnp.ones((3, 2)), jnp.array([0.2, 0.5, 0.9]), jnp.array([0.1, 0.5, 0.3])
    at, to = (jnp.ravel(label(coeffs(path, time, 1))) for time in (t, t_to))
    u = jnp.broadcast_to((at - 2.0 * (at - to))[:, None], x.shape)
    expected = decode(coeffs(path, t, 2), chord(path, t, t_to, 2), u, x)
    found = predict(x, jnp.stack([t, t_to], axis=1), None)
    return found, expected, predict(x, t, None), predict(x, jnp.stack([t, t], axis=1), None)


@every_path
@pytest.mark.parametrize(
    "label", [TimeLabel(1.0), pytest.param(LogSNRLabel(), marks=pytest.mark.thorough(tenth=False))]
)
def test_a_network_is_told_both_times(path, label):
    """One time is both."""
    found, expected, alone, both = said_and_expected(path, label)
    np.testing.assert_allclose(found.x0, expected.x0, rtol=1e-5, atol=1e-6)
    np.testing.assert_array_equal(alone.x0, both.x0)


verify = partial(verify_objective, num_batches=16, batch_size=512, limit=0.2)


BY_TIME = mean_flow(between=0.7, power=0.0)
BY_LOG_SNR = mean_flow(PATHS["cosine"], LogSNRLabel(), between=0.7, power=0.0)
WEIGHED = replace(BY_TIME, power=1.0)


@pytest.mark.thorough(tenth=False)
@pytest.mark.parametrize("objective", [BY_TIME, BY_LOG_SNR], ids=["time", "log-SNR"])
def test_the_exact_average_velocity_of_a_gaussian_is_a_minimum(objective):
    """Its flow is known in closed form, where that of a mixture has to be integrated."""
    found = verify(objective, GAUSSIAN)
    assert found.passed, found


@pytest.mark.thorough
def test_the_adaptive_weight_leaves_the_minimum_where_the_targets_noise_is_not_skewed():
    assert verify(WEIGHED, GAUSSIAN).passed


@pytest.mark.thorough
def test_the_exact_average_velocity_of_a_mixture_is_a_minimum_but_for_the_adaptive_weight():
    """It counts what is far from the mean for less, as its authors' does: known, and documented."""
    found = verify(BY_TIME, MIXTURE, num_batches=24)
    assert found.passed, found
    assert not verify(WEIGHED, MIXTURE).passed


@pytest.mark.thorough
@pytest.mark.parametrize("slip", ["clock", "sign", "span"])
def test_a_slip_in_the_identity_is_seen(slip, monkeypatch):
    """That it passes without one is seen above."""
    jvp = jax.jvp
    # A size of its own compiles a program of its own, with the slip in it.
    batch_size = 500 + ["clock", "sign", "span"].index(slip)

    def wrong(average, primals, tangents):
        if len(primals) != 2 or average.__name__ != "average":
            return jvp(average, primals, tangents)
        velocity, clock = tangents
        if slip == "clock":
            return jvp(average, primals, (velocity, 0.0 * clock))
        u, change = jvp(average, primals, tangents)
        return u, -change if slip == "sign" else 1.2 * change

    monkeypatch.setattr(jax, "jvp", wrong)
    assert not verify(BY_TIME, GAUSSIAN, batch_size=batch_size).passed


def smooth_network(params, x, noise_label, cond, *, key=None):
    t, span = noise_label[:, :1], noise_label[:, 1:]
    return jnp.sin(params * x + 2.0 * t) * jnp.exp(-span) + 0.3 * x * t


@once()
def loss_and_what_it_is_of(objective, batch):
    key = jax.random.key(3)
    loss, metrics = objective(smooth_network, 1.3, 1.3, key, batch, Progress(jnp.zeros(())))
    time_key, key = jax.random.split(key)
    t, t_to = objective.intervals(time_key, len(batch["image"]))
    noised = objective.noised(t, key, batch)
    log_snr = objective.metrics(noised)["log_snr"]
    return loss, metrics["log_snr"], (t, t_to, noised.x_t, *noised.pair[:2], log_snr)


def in_64_bits(objective):
    """By one program for all of these objectives."""
    with jax.enable_x64(True):
        batch = {"image": 0.5 * np.float64(batch_in_numpy(64, 2)), "cond": np.arange(64) % 3}
        return jax.device_get(loss_and_what_it_is_of(objective, batch))


@pytest.mark.parametrize("power", [0.0, 0.5, 1.0])
def test_the_loss_is_the_formula_with_a_numerical_derivative(power):
    objective = mean_flow(between=0.5, power=power, floor=0.02)
    loss, log_snr, parts = in_64_bits(objective)
    t, t_to, x_t, x0, eps, expected_log_snr = parts
    assert (t > t_to).any()
    velocity = eps - x0

    def u_at(h):
        at = (t + h)[:, None]
        x, span = x_t + h * velocity, at - t_to[:, None]
        return np.sin(1.3 * x + 2.0 * at) * np.exp(-span) + 0.3 * x * at

    change = (u_at(1e-5) - u_at(-1e-5)) / 2e-5
    target = velocity - (t - t_to)[:, None] * change
    squares = np.sum(np.square(u_at(0.0) - target), axis=1)
    np.testing.assert_allclose(loss, squares / (squares + 0.02) ** power, rtol=1e-6)
    np.testing.assert_array_equal(log_snr, expected_log_snr)


def test_over_no_time_it_is_flow_matching():
    objective = mean_flow(between=0.0, power=0.0)
    loss, _, parts = in_64_bits(objective)
    t, t_to, x_t, x0, eps, _ = parts
    np.testing.assert_array_equal(t, t_to)
    output = np.sin(1.3 * x_t + 2.0 * t[:, None]) + 0.3 * x_t * t[:, None]
    np.testing.assert_allclose(loss, np.square(output - (eps - x0)).sum(axis=1), rtol=1e-5)


def test_a_weight_counts_the_error_of_an_average_velocity():
    plain, weighted = (
        mean_flow(weight=weight, between=0.5, power=0.0)
        for weight in (weights.Constant(), weights.SNR())
    )
    by_one, _, parts = in_64_bits(plain)
    by_other, _, _ = in_64_bits(weighted)
    t = parts[0]
    # SNR times (s/D)², where D of the velocity is 1 on the linear path.
    np.testing.assert_allclose(by_other, ((1.0 - t) / t * t) ** 2 * by_one, rtol=1e-4)


def test_no_gradient_goes_through_the_target():
    objective = mean_flow(between=1.0, power=0.0, omega=0.5, kappa=0.3)

    @jax.jit
    def slopes(key, batch):
        time_key, data_key = jax.random.split(key)
        t, t_to = objective.intervals(time_key, 32)
        noised = objective.noised(t, data_key, batch)
        velocity = objective.guided(smooth_network, 1.3, noised, t)

        def average(params, x, t):
            inputs = interval_inputs(objective.path, objective.precond, x, t, t_to)
            return smooth_network(params, *inputs, None)

        _, change = jax.jvp(partial(average, 1.3), (noised.x_t, t), (velocity, jnp.ones_like(t)))
        target = velocity - (t - t_to)[:, None] * change

        def mean_square(params):
            return jnp.square(average(params, noised.x_t, t) - target).sum(axis=1).mean()

        def mean_loss(params):
            progress = Progress(jnp.zeros(()))
            return objective(smooth_network, params, params, key, batch, progress)[0].mean()

        return [jax.grad(of)(1.3) for of in (mean_loss, mean_square)]

    batch = {"image": 0.5 * batch_in_numpy(32, 2), "cond": np.arange(32) % 3}
    found, expected = map(float, slopes(jax.random.key(5), batch))
    assert found == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize(
    "draws",
    [
        # Spread out, and still the two times of an interval are independent.
        uniforms.LowDiscrepancy(),
        pytest.param(uniforms.Independent(), marks=pytest.mark.thorough(tenth=False)),
    ],
)
def test_both_times_are_of_the_density_and_in_order(draws):
    objective = mean_flow(times=times.Uniform(), uniforms=draws, between=0.25)
    intervals = jax.jit(objective.intervals, static_argnums=1)
    t, t_to = (np.asarray(each) for each in intervals(jax.random.key(0), 40_000))
    apart = t > t_to
    assert (t >= t_to).all()
    assert apart.mean() == pytest.approx(0.25, abs=0.01)
    # The larger and the smaller of two uniform numbers, independent of one another.
    assert t.mean() == pytest.approx(2 / 3, abs=0.01)
    assert t_to[apart].mean() == pytest.approx(1 / 3, abs=0.02)
    assert np.corrcoef(t[apart], t_to[apart])[0, 1] == pytest.approx(0.5, abs=0.03)


def test_guidance_is_the_papers_mix_between_its_times():
    objective = mean_flow(omega=0.2, kappa=0.7, guided_below=0.5, guided_above=0.2)
    batch = {"image": batch_in_numpy(6, 2), "cond": np.arange(6) % 3}
    t = np.linspace(0.1, 0.9, 6).astype(np.float32)
    weak, strong, spans = 3.0, np.array([5.0, -1.0, 2.0], np.float32), []

    def apply(params, x, noise_label, cond, **how):
        spans.append(noise_label[:, 1])
        said = weak if cond is None else jnp.asarray(strong)[cond][:, None]
        return jnp.broadcast_to(said, x.shape)

    @jax.jit
    def program(t, batch):
        noised = objective.noised(t, jax.random.key(0), batch)
        return noised.pair[:2], objective.guided(apply, None, noised, t), spans

    (x0, eps), found, asked = jax.device_get(program(t, batch))
    assert len(asked) == 2
    np.testing.assert_array_equal(asked, 0.0)
    guided = 0.2 * (eps - x0) + 0.7 * strong[batch["cond"]][:, None] + 0.1 * weak
    inside = ((t >= 0.2) & (t <= 0.5))[:, None]
    np.testing.assert_allclose(found, np.where(inside, guided, eps - x0), rtol=1e-5)


@pytest.mark.parametrize(
    ("axes", "solver", "message"),
    [
        ({"objective": "mean_flow", "target": "v"}, "ddim", "take target=velocity"),
        (
            {"objective": "flow"},
            "flow_map",
            "needs a model of the average velocity, and Denoising .* heun",
        ),
    ],
)
def test_what_it_is_not_for_is_refused(axes, solver, message):
    config = config_for(**axes)
    config.sampling.solver = choices.copy(choices.SOLVERS[solver])
    with pytest.raises(UserError, match=message):
        check_wired(wire(config, (8, 8, 1), of_classes(0)), 16, 6)


def test_it_has_no_effective_weight():
    with pytest.raises(NotImplementedError, match="MeanFlow is no squared error at random times"):
        BY_TIME.effective_weight(jnp.zeros(1))


def test_attention_without_a_derivative_is_not_chosen():
    assert resolve("auto", "gpu", "bfloat16", forward_mode=True) == "chunked"
    assert resolve("auto", "tpu", "bfloat16", forward_mode=True) == "xla"
    for name in ("cudnn", "splash"):
        with pytest.raises(UserError, match=f"attention={name} has no derivative in forward mode"):
            resolve(name, "gpu", "bfloat16", forward_mode=True)


@pytest.mark.thorough(tenth=False)
@pytest.mark.parametrize("solver", ["flow_map", "heun"])
def test_a_wired_network_samples_by_jumps_and_by_steps(solver):
    config = config_for(objective="mean_flow", wrappers="uncertainty")
    config.sampling.solver = choices.copy(choices.SOLVERS[solver])
    wired = wire(config, (8, 8, 1), of_classes(3))

    @jax.jit
    def walked(keys):
        params = wired.init(jax.random.key(0))
        times = wired.recipe.times(wired.path)
        denoise = sample.with_condition(wired.predict(params), jnp.arange(2))
        noise, keys = sample.starting_noise(keys, (8, 8, 1))
        return sample.trace(denoise, wired.recipe.solver, wired.path, times, keys, noise).x

    # A fresh network returns 0: noise moves nowhere, and the last step is the same.
    x = np.asarray(walked(jax.random.split(jax.random.key(1), 2)))
    np.testing.assert_allclose(x, np.broadcast_to(x[0], x.shape), atol=1e-5)


class Net(nn.Module):
    """A network of one number and the labels."""

    @nn.compact
    def __call__(self, x, noise_label):
        h = jnp.concatenate([x, noise_label.reshape(len(x), -1)], axis=-1)
        for width in (64, 64):
            h = nn.silu(nn.Dense(width)(h))
        return nn.Dense(1)(h)


def apply_net(params, x, noise_label, cond, *, key=None) -> Any:
    return Net().apply(params, x, noise_label)


def trained(objective):
    """Parameters after 2,000 steps on two points, -0.8 and 0.8."""
    labels = (
        jnp.zeros((1, 2)) if objective.traits.meaning is Meaning.AVERAGE_VELOCITY else jnp.zeros(1)
    )
    params = Net().init(jax.random.key(0), jnp.zeros((1, 1)), labels)
    optimizer = optax.adam(5e-3)

    def update(state, key):
        params, opt = state
        data_key, loss_key = jax.random.split(key)
        image = jnp.where(jax.random.bernoulli(data_key, 0.5, (256, 1)), 0.8, -0.8)
        batch = {"image": image, "cond": jnp.zeros(256, jnp.int32)}

        def mean_loss(params):
            progress = Progress(jnp.zeros(()))
            return objective(apply_net, params, params, loss_key, batch, progress)[0].mean()

        updates, opt = optimizer.update(jax.grad(mean_loss)(params), opt)
        return (optax.apply_updates(params, updates), opt), None

    keys = jax.random.split(jax.random.key(1), 2_000)
    return jax.jit(partial(jax.lax.scan, update))((params, optimizer.init(params)), keys)[0][0]


@pytest.mark.thorough
def test_one_step_of_a_trained_network_ends_on_the_data():
    """One step of flow matching ends between the points, at their mean."""
    x, ones = jax.random.normal(jax.random.key(2), (500, 1)), jnp.ones(500)
    flow = flow_matching(times=times.Uniform())
    average = mean_flow(times=times.Uniform(), between=0.5, power=0.0)
    jump = flow_map_predictor(apply_net, trained(average), flow.path, flow.precond)
    step = denoiser(apply_net, trained(flow), flow.path, flow.precond)
    ends = jump(x, jnp.stack([ones, 0.0 * ones], axis=1), None).x0
    assert float(jnp.mean(jnp.abs(jnp.abs(ends) - 0.8) < 0.3)) > 0.85
    assert float(jnp.abs(step(x, ones, None).x0).mean()) < 0.1
