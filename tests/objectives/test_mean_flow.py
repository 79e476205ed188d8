"""Mean flow: its identity, its target, its one step, and what it refuses."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen as nn

from diffjax import choices
from diffjax.errors import UserError
from diffjax.models.attention import resolve
from diffjax.objectives.base import Progress
from diffjax.objectives.denoising import Denoising
from diffjax.objectives.mean_flow import MeanFlow
from diffjax.objectives.verify import verify_objective
from diffjax.process import analytic, paths, targets, times, uniforms, weights
from diffjax.process.paths import coeffs
from diffjax.process.precond import (
    LogSNRLabel,
    Precond,
    TimeLabel,
    denoiser,
    flow_map,
    interval_inputs,
)
from diffjax.process.targets import chord, decode
from diffjax.sampling import grids, sample, solvers
from diffjax.wiring import wire
from tests.objectives.test_objectives import config_for

PATHS = {"linear": paths.Linear(), "cosine": paths.Cosine(), "ddpm": paths.LinearBeta()}
MIXTURE = analytic.GaussianMixture(
    jnp.array([0.3, 0.7]),
    jnp.array([[-0.7, 0.3], [0.6, -0.1]]),
    jnp.array([[[0.03, 0.01], [0.01, 0.02]], [[0.02, 0.0], [0.0, 0.05]]]),
)
GAUSSIAN = analytic.Gaussian(jnp.array([0.4, -0.3]), jnp.array([[0.2, 0.05], [0.05, 0.1]]))
every_path = pytest.mark.parametrize("path", PATHS.values(), ids=PATHS)


def flow_matching(path=PATHS["linear"], label=None, **parts):
    density = parts.pop("times", times.LogitNormal(-0.4))
    precond = Precond(targets.Velocity(), label or TimeLabel(1.0))
    return Denoising(path, precond, weights.Constant(), density, **parts)


def batch_of(n, key=0):
    image = 0.5 * jax.random.normal(jax.random.key(key), (n, 2))
    return {"image": image, "label": jnp.arange(n) % 3}


@every_path
@pytest.mark.parametrize("t_to", [0.0, 0.3, 0.695, 0.7])
def test_a_pair_of_an_average_velocity_mixes_at_both_ends(path, t_to):
    t, t_to = jnp.full(4, 0.7), jnp.full(4, t_to)
    x, u = jax.random.normal(jax.random.key(0), (2, 4, 3))
    here, there = (coeffs(path, time, 2) for time in (t, t_to))
    pair = decode(here, chord(path, t, t_to, 2), u, x)
    np.testing.assert_allclose(here.a * pair.x0 + here.s * pair.eps, x, atol=2e-5)
    at_end = there.a * pair.x0 + there.s * pair.eps
    np.testing.assert_allclose(at_end, x + (t_to - t)[:, None] * u, atol=2e-5)


@every_path
@pytest.mark.parametrize("num_steps", [1, 2, 5])
def test_with_the_exact_flow_map_any_number_of_steps_ends_where_the_flow_does(path, num_steps):
    x = path.sigma(jnp.float32(path.t_noise)) * jax.random.normal(jax.random.key(0), (8, 2))
    predict = MIXTURE.predict(path)

    def denoise(x, t):
        return predict(x, jnp.broadcast_to(t, (len(x), *t.shape)), None)

    keys = jax.random.split(jax.random.key(1), 8)
    grid = grids.Power()(path, num_steps)
    end = sample.sample(denoise, solvers.flow_map(), path, grid, keys, x)
    # A step divides float32 differences by others: 1e-6 becomes 1e-5 where alpha is small.
    np.testing.assert_allclose(end, MIXTURE.flow(path, x, path.t_noise, 0.0), atol=1e-4)


@every_path
@pytest.mark.parametrize("label", [TimeLabel(1.0), LogSNRLabel()])
def test_a_network_is_told_both_times(path, label):
    """Of one that says what its labels say, the pair is known; one time is both."""
    precond = Precond(targets.Velocity(), label)

    def apply(params, x, noise_label, cond, *, train=False, key=None):
        assert noise_label.shape == (len(x), 2)
        return jnp.broadcast_to(noise_label @ params, x.shape[::-1]).T

    predict = flow_map(apply, jnp.array([1.0, -2.0]), path, precond)
    x, t, t_to = jnp.ones((3, 2)), jnp.array([0.2, 0.5, 0.9]), jnp.array([0.1, 0.5, 0.3])
    at, to = (jnp.ravel(label(coeffs(path, time, 1))) for time in (t, t_to))
    u = jnp.broadcast_to((at - 2.0 * (at - to))[:, None], x.shape)
    expected = decode(coeffs(path, t, 2), chord(path, t, t_to, 2), u, x)
    found = predict(x, jnp.stack([t, t_to], axis=1), None)
    np.testing.assert_allclose(found.x0, expected.x0, rtol=1e-5, atol=1e-6)
    alone, both = predict(x, t, None), predict(x, jnp.stack([t, t], axis=1), None)
    np.testing.assert_array_equal(alone.x0, both.x0)


@pytest.mark.parametrize(("path", "label"), [("linear", TimeLabel(1.0)), ("cosine", LogSNRLabel())])
def test_the_exact_average_velocity_is_a_minimum(path, label):
    objective = MeanFlow(flow_matching(PATHS[path], label), between=0.7, power=0.0)
    found = verify_objective(objective, num_batches=24, batch_size=512, limit=0.2)
    assert found.passed, found


@pytest.mark.parametrize(("data", "moved"), [(GAUSSIAN, False), (MIXTURE, True)])
def test_the_adaptive_weight_moves_the_minimum_where_the_targets_noise_is_skewed(data, moved):
    """It counts what is far from the mean for less, as its authors' does: known, and documented."""
    objective = MeanFlow(flow_matching(), between=0.7, power=1.0)
    found = verify_objective(objective, data, num_batches=16, batch_size=512, limit=0.2)
    assert found.passed != moved


@pytest.mark.parametrize("slip", ["sign", "span", "clock"])
def test_a_slip_in_the_identity_is_seen(slip, monkeypatch):
    objective = MeanFlow(flow_matching(), between=0.7, power=0.0)
    jvp = jax.jvp

    def wrong(average, primals, tangents):
        if len(primals) != 2 or average.__name__ != "average":
            return jvp(average, primals, tangents)
        velocity, clock = tangents
        if slip == "clock":
            return jvp(average, primals, (velocity, 0.0 * clock))
        u, change = jvp(average, primals, tangents)
        return u, -change if slip == "sign" else 1.2 * change

    verify = partial(verify_objective, objective, GAUSSIAN, num_batches=16, limit=0.2)
    assert verify().passed
    monkeypatch.setattr(jax, "jvp", wrong)
    assert not verify().passed


def smooth_network(params, x, noise_label, cond, *, train=False, key=None):
    t, span = noise_label[:, :1], noise_label[:, 1:]
    return jnp.sin(params * x + 2.0 * t) * jnp.exp(-span) + 0.3 * x * t


@pytest.mark.parametrize("power", [0.0, 0.5, 1.0])
def test_the_loss_is_the_formula_with_a_numerical_derivative(power):
    with jax.enable_x64(True):
        n, key = 64, jax.random.key(3)
        objective = MeanFlow(flow_matching(), between=0.5, power=power, floor=0.02)
        batch = jax.tree.map(lambda x: x.astype(jnp.float64), batch_of(n))
        loss, _ = objective(smooth_network, 1.3, 1.3, key, batch, Progress(jnp.zeros(())))
        time_key, key = jax.random.split(key)
        t, t_to = objective.intervals(time_key, n)
        noised = objective.objective.noised(t, key, batch)
        velocity = noised.pair.eps - noised.pair.x0

        def u_at(h):
            labels = jnp.stack([t + h, t + h - t_to], axis=1)
            return smooth_network(1.3, noised.x_t + h * velocity, labels, None)

        change = (u_at(1e-5) - u_at(-1e-5)) / 2e-5
        target = velocity - (t - t_to)[:, None] * change
        squares = np.sum(np.square(u_at(0.0) - target), axis=1)
    np.testing.assert_allclose(loss, squares / (squares + 0.02) ** power, rtol=1e-6)


def test_over_no_time_it_is_flow_matching():
    n, key = 32, jax.random.key(4)
    flow = flow_matching()
    objective = MeanFlow(flow, between=0.0, power=0.0)
    loss, metrics = objective(smooth_network, 1.3, 1.3, key, batch_of(n), Progress(jnp.zeros(())))
    time_key, key = jax.random.split(key)
    t, t_to = objective.intervals(time_key, n)
    np.testing.assert_array_equal(t, t_to)
    noised = flow.noised(t, key, batch_of(n))
    output = smooth_network(1.3, noised.x_t, jnp.stack([t, 0.0 * t], axis=1), None)
    np.testing.assert_allclose(loss, 2.0 * flow.loss(noised, output), rtol=1e-5)  # of two pixels
    np.testing.assert_array_equal(metrics["log_snr"], flow.metrics(noised)["log_snr"])


def test_no_gradient_goes_through_the_target():
    batch, key = batch_of(32), jax.random.key(5)
    objective = MeanFlow(flow_matching(), between=1.0, power=0.0, omega=0.5, kappa=0.3)
    time_key, data_key = jax.random.split(key)
    t, t_to = objective.intervals(time_key, 32)
    noised = objective.objective.noised(t, data_key, batch)
    velocity = objective.velocity(smooth_network, 1.3, objective.precond, noised, t)

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

    found, expected = (float(jax.grad(of)(1.3)) for of in (mean_loss, mean_square))
    assert found == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("draws", [uniforms.Independent(), uniforms.LowDiscrepancy()])
def test_both_times_are_of_the_density_and_in_order(draws):
    objective = MeanFlow(flow_matching(times=times.Uniform(), uniforms=draws), between=0.25)
    t, t_to = (np.asarray(each) for each in objective.intervals(jax.random.key(0), 40_000))
    apart = t > t_to
    assert (t >= t_to).all()
    assert apart.mean() == pytest.approx(0.25, abs=0.01)
    # The larger and the smaller of two uniform numbers, independent of one another.
    assert t.mean() == pytest.approx(2 / 3, abs=0.01)
    assert t_to[apart].mean() == pytest.approx(1 / 3, abs=0.02)
    assert np.corrcoef(t[apart], t_to[apart])[0, 1] == pytest.approx(0.5, abs=0.03)


def test_guidance_is_the_papers_mix_below_its_time():
    objective = MeanFlow(flow_matching(), omega=0.2, kappa=0.7, guided_below=0.5)
    batch, t = batch_of(6), jnp.linspace(0.1, 0.9, 6)
    noised = objective.objective.noised(t, jax.random.key(0), batch)
    weak, strong = 3.0, jnp.array([5.0, -1.0, 2.0])

    def apply(params, x, noise_label, cond, **how):
        np.testing.assert_array_equal(noise_label[:, 1], 0.0)
        said = weak if cond is None else strong[cond][:, None]
        return jnp.broadcast_to(said, x.shape)

    found = objective.velocity(apply, None, objective.precond, noised, t)
    plain = noised.pair.eps - noised.pair.x0
    guided = 0.2 * plain + 0.7 * strong[batch["label"]][:, None] + 0.1 * weak
    np.testing.assert_allclose(found, np.where(t[:, None] <= 0.5, guided, plain), rtol=1e-5)


@pytest.mark.parametrize(
    ("axes", "solver", "message"),
    [
        ({"objective": "mean_flow", "target": "v"}, "ddim", "take target=velocity"),
        ({"objective": "flow"}, "flow_map", "train with wrappers=mean_flow"),
    ],
)
def test_what_it_is_not_for_is_refused(axes, solver, message):
    config = config_for(**axes)
    config.sampling.solver = choices.copy(choices.SOLVERS[solver])
    with pytest.raises(UserError, match=message):
        wire(config, (8, 8, 1), 0)


def test_attention_without_a_derivative_is_not_chosen():
    assert resolve("auto", "gpu", "bfloat16", forward_mode=True) == "chunked"
    assert resolve("auto", "tpu", "bfloat16", forward_mode=True) == "xla"
    for name in ("cudnn", "splash"):
        with pytest.raises(UserError, match=f"attention={name} has no derivative in forward mode"):
            resolve(name, "gpu", "bfloat16", forward_mode=True)


@pytest.mark.parametrize("solver", ["flow_map", "heun"])
def test_a_wired_network_samples_by_jumps_and_by_steps(solver):
    config = config_for(objective="mean_flow", wrappers="mean_flow+uncertainty")
    config.sampling.solver = choices.copy(choices.SOLVERS[solver])
    wired = wire(config, (8, 8, 1), 3)
    params = wired.init(jax.random.key(0))
    draw = partial(
        sample.draw, wired.predict(params), wired.path, wired.recipe.solver,
        wired.recipe.times(wired.path), jax.random.split(jax.random.key(1), 2), jnp.arange(2),
        (8, 8, 1),
    )  # fmt: skip
    # A fresh network says 0: noise moves nowhere, and the last step is the same.
    trace = draw(walk=sample.trace)
    np.testing.assert_allclose(trace.x, jnp.broadcast_to(trace.x[0], trace.x.shape), atol=1e-5)


class Net(nn.Module):
    """A network of one number and the labels."""

    @nn.compact
    def __call__(self, x, noise_label):
        h = jnp.concatenate([x, noise_label.reshape(len(x), -1)], axis=-1)
        for width in (64, 64):
            h = nn.silu(nn.Dense(width)(h))
        return nn.Dense(1)(h)


def apply_net(params, x, noise_label, cond, *, train=False, key=None) -> Any:
    return Net().apply(params, x, noise_label)


def trained(objective):
    """Parameters after 2,000 steps on two points, -0.8 and 0.8."""
    labels = jnp.zeros((1, 2)) if objective.flow_map else jnp.zeros(1)
    params = Net().init(jax.random.key(0), jnp.zeros((1, 1)), labels)
    optimizer = optax.adam(5e-3)

    def update(state, key):
        params, opt = state
        data_key, loss_key = jax.random.split(key)
        image = jnp.where(jax.random.bernoulli(data_key, 0.5, (256, 1)), 0.8, -0.8)
        batch = {"image": image, "label": jnp.zeros(256, jnp.int32)}

        def mean_loss(params):
            progress = Progress(jnp.zeros(()))
            return objective(apply_net, params, params, loss_key, batch, progress)[0].mean()

        updates, opt = optimizer.update(jax.grad(mean_loss)(params), opt)
        return (optax.apply_updates(params, updates), opt), None

    keys = jax.random.split(jax.random.key(1), 2_000)
    return jax.jit(partial(jax.lax.scan, update))((params, optimizer.init(params)), keys)[0][0]


def test_one_step_of_a_trained_network_ends_on_the_data():
    """One step of flow matching ends between the points, at their mean."""
    x, ones = jax.random.normal(jax.random.key(2), (500, 1)), jnp.ones(500)
    flow = flow_matching(times=times.Uniform())
    mean_flow = MeanFlow(flow, between=0.5, power=0.0)
    jump = flow_map(apply_net, trained(mean_flow), flow.path, flow.precond)
    step = denoiser(apply_net, trained(flow), flow.path, flow.precond)
    ends = jump(x, jnp.stack([ones, 0.0 * ones], axis=1), None).x0
    assert float(jnp.mean(jnp.abs(jnp.abs(ends) - 0.8) < 0.3)) > 0.85
    assert float(jnp.abs(step(x, ones, None).x0).mean()) < 0.1
