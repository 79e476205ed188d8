"""Flow maps learned from themselves: their identities with one another, and the exact map."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.tree_util import Partial

from diffjax.compiling import once
from diffjax.errors import UserError
from diffjax.objectives.base import Progress
from diffjax.objectives.denoising import Denoising
from diffjax.objectives.few_step.flow_maps import (
    AlphaFlow,
    Eulerian,
    FlowMap,
    Lagrangian,
    Progressive,
    SelfDistilled,
    Shortcut,
)
from diffjax.objectives.few_step.mean_flow import MeanFlow
from diffjax.oracle import analytic
from diffjax.oracle.verify import verify_objective
from diffjax.process import paths, targets, times, weights
from diffjax.process.precond import Precond, TimeLabel, flow_map_predictor

GAUSSIAN = analytic.Gaussian(jnp.array([0.4, -0.3]), jnp.array([[0.2, 0.05], [0.05, 0.1]]))
BATCH = {
    "image": 0.5 * np.random.default_rng(0).standard_normal((32, 2)),
    "cond": np.arange(32) % 3,
}


def of(kind, **parts):
    precond = Precond(targets.Velocity(), TimeLabel(1.0))
    return kind(paths.Linear(), precond, weights.Constant(), times.Uniform(), **parts)


def u_in_numpy(params, x, t, r):
    t, r = t[:, None], r[:, None]
    return np.sin(params * x + 2.0 * t) * np.exp(r - t) + 0.3 * x * t


def smooth_network(params, x, noise_label, cond, *, key=None):
    t, span = noise_label[:, :1], noise_label[:, 1:]
    return jnp.sin(params * x + 2.0 * t) * jnp.exp(-span) + 0.3 * x * t


def with_slope(loss, params):
    """The losses and their derivatives by the only parameter, in one pass."""
    return jax.jvp(loss, (params,), (jnp.ones_like(params),))


@once()
def loss_slope_and_parts(objective, params, teacher_params, fraction, keys):
    """In training, with the times and the noise that the keys of each objective give."""
    loss_key, time_key, noise_key = keys

    def loss(params):
        progress = Progress(fraction, num_steps=1)
        return objective(smooth_network, params, teacher_params, loss_key, BATCH, progress)[0]

    if isinstance(objective, Shortcut):
        t, r = objective.steps(time_key, 32, int(32 * objective.between))
    else:
        t, r = objective.intervals(time_key, 32)
    noised = objective.noised(t, noise_key, BATCH)
    return *with_slope(loss, params), t, r, noised.x_t, noised.pair.eps - noised.pair.x0


def found(objective, fraction=0.0, own=1.3, averages=0.9):
    key = jax.random.key(3)
    if isinstance(objective, SelfDistilled):
        time_key, _, noise_key = jax.random.split(key, 3)
    else:
        time_key, noise_key = jax.random.split(key)
    with jax.enable_x64(True):
        keys = key, time_key, noise_key
        return jax.device_get(loss_slope_and_parts(objective, own, averages, fraction, keys))


def by_parameter(x, t, r, own=1.3):
    return (u_in_numpy(own + 1e-6, x, t, r) - u_in_numpy(own - 1e-6, x, t, r)) / 2e-6


def test_two_short_steps_are_the_target_of_a_shortcut():
    objective = of(Shortcut, sections=8)
    loss, _, t, r, x, v = found(objective)
    length = (t - r)[:8]
    # Steps of 1, ½ and ¼ that begin at their multiples; the halves of ¼ are instants.
    assert set(np.round(length, 6)) <= {1.0, 0.5, 0.25}
    np.testing.assert_allclose(np.round((1.0 - t[:8]) / length), (1.0 - t[:8]) / length, atol=1e-6)
    np.testing.assert_array_equal(t[8:], r[8:])
    middle, short = t[:8] - length / 2, length < 0.3
    one = u_in_numpy(0.9, x[:8], t[:8], np.where(short, t[:8], middle))
    there = x[:8] - (length / 2)[:, None] * one
    two = u_in_numpy(0.9, there, middle, np.where(short, middle, r[:8]))
    target = np.concatenate([(one + two) / 2, v[8:]])
    expected = np.square(u_in_numpy(1.3, x, t, r) - target).mean(axis=1)
    np.testing.assert_allclose(loss, expected, rtol=1e-6)


KINDS = {
    "shortcut": of(Shortcut, between=0.0),
    "lagrangian": of(SelfDistilled, between=0.0),
    "eulerian": of(SelfDistilled, between=0.0, rule=Eulerian()),
    "progressive": of(SelfDistilled, between=0.0, rule=Progressive()),
}


@pytest.mark.parametrize("name", [pytest.param(n, marks=pytest.mark.thorough) for n in KINDS])
def test_over_no_time_each_is_flow_matching(name):
    loss, _, t, r, x, v = found(KINDS[name])
    np.testing.assert_array_equal(t, r)
    expected = np.square(u_in_numpy(1.3, x, t, t) - v).mean(axis=1)
    np.testing.assert_allclose(loss, expected, rtol=1e-6)


def test_at_one_alpha_flow_is_flow_matching_along_the_interval():
    objective = of(AlphaFlow, between=0.7, power=0.0, smallest=1.0)
    loss, _, t, r, x, v = found(objective)
    assert (t > r).any()
    expected = np.square(u_in_numpy(1.3, x, t, r) - v).sum(axis=1)
    np.testing.assert_allclose(loss, expected, rtol=1e-6)


def test_the_velocity_of_alpha_flow_can_be_guided():
    objective = of(AlphaFlow, between=0.7, power=0.0, smallest=1.0, omega=2.0)
    loss, _, t, r, x, v = found(objective)
    guided = 2.0 * v - u_in_numpy(1.3, x, t, t)
    expected = np.square(u_in_numpy(1.3, x, t, r) - guided).sum(axis=1)
    np.testing.assert_allclose(loss, expected, rtol=1e-6)


def test_at_a_half_alpha_flow_is_a_shortcut_along_the_velocity_of_the_example():
    loss, _, t, r, x, v = found(of(AlphaFlow, between=0.7, power=0.0, steepness=0.0))
    middle = 0.5 * (t + r)
    two = u_in_numpy(1.3, x - (t - middle)[:, None] * v, middle, r)
    expected = np.square(u_in_numpy(1.3, x, t, r) - (v + two) / 2).sum(axis=1) / 0.5
    np.testing.assert_allclose(loss, expected, rtol=1e-6)


@pytest.mark.parametrize("power", [0.0, 1.0])
def test_as_alpha_vanishes_its_gradient_is_mean_flows(power):
    """Of first order in α."""
    exact = found(of(MeanFlow, between=0.7, power=power))[1].sum()
    errors = [
        found(of(AlphaFlow, between=0.7, power=power, smallest=a), fraction=1.0)[1].sum() - exact
        for a in (0.02, 0.01, 0.005)
    ]
    np.testing.assert_allclose(np.array(errors[:2]) / errors[1:], 2.0, rtol=0.1)


def test_the_curriculum_goes_from_flow_matching_to_its_floor():
    assert float(of(AlphaFlow, middle=0.7).alpha(jnp.array(0.7))) == pytest.approx(0.5)
    alpha = of(AlphaFlow).alpha
    values = [float(alpha(jnp.array(x))) for x in (0.0, 0.5, 1.0)]
    assert values == pytest.approx([1.0, 0.5, 0.005], abs=1e-5)


def test_improved_mean_flow_has_the_networks_velocity_in_the_derivative_alone():
    loss, slope, t, r, x, v = found(of(MeanFlow, between=0.7, power=0.0, own_velocity=True))
    own = u_in_numpy(1.3, x, t, t)

    def along(h):
        return u_in_numpy(1.3, x + h * own, t + h, r)

    change = (along(1e-5) - along(-1e-5)) / 2e-5
    error = along(0.0) - (v - (t - r)[:, None] * change)
    np.testing.assert_allclose(loss, np.square(error).sum(axis=1), rtol=1e-6)
    by_hand = np.sum(2.0 * error * by_parameter(x, t, r), axis=1)
    np.testing.assert_allclose(slope, by_hand, rtol=1e-4, atol=1e-6)


def of_x0(kind, **parts):
    """The same with a network of x0, and a weight that is 1 on velocities."""
    weight = weights.ConstantIn(targets.Velocity())
    precond = Precond(targets.Clean(), TimeLabel(1.0))
    return replace(of(kind, **parts), precond=precond, weight=weight)


def network_of_x0(params, x, noise_label, cond, *, key=None):
    """`x_t - t·u`: the average velocity of `smooth_network`."""
    return x - noise_label[:, :1] * smooth_network(params, x, noise_label, cond)


@once()
def loss_and_slope_of(objective, network, key, params):
    def loss(params):
        progress = Progress(jnp.array(0.6), num_steps=1)
        return objective(network, params, params, key, BATCH, progress)[0]

    return with_slope(loss, params)


PREDICTING_X0 = {
    "improved mean flow": (MeanFlow, {"own_velocity": True, "between": 0.7}),
    "guided mean flow": (MeanFlow, {"omega": 0.8, "kappa": 0.4}),
    "shortcut": (Shortcut, {}),
    "alpha flow": (AlphaFlow, {"between": 0.7}),
    "eulerian": (SelfDistilled, {"between": 0.7, "rule": Eulerian()}),
}


@pytest.mark.parametrize(
    "name",
    [
        "improved mean flow",
        *(
            pytest.param(n, marks=pytest.mark.thorough(tenth=False))
            for n in PREDICTING_X0
            if n != "improved mean flow"
        ),
    ],
)
def test_a_network_of_x0_has_the_loss_of_its_average_velocity(name):
    kind, parts = PREDICTING_X0[name]
    key = jax.random.key(3)
    with jax.enable_x64(True):
        found = loss_and_slope_of(of_x0(kind, **parts), Partial(network_of_x0), key, 1.3)
        expected = loss_and_slope_of(of(kind, **parts), Partial(smooth_network), key, 1.3)
    for one, other in zip(found, expected, strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-6, atol=1e-9)


def test_samplers_step_along_the_average_velocity_of_a_network_of_x0():
    x, t = jnp.array([[0.5, -0.2], [1.0, 0.3]]), jnp.array([[0.8, 0.1], [0.4, 0.4]])
    path = paths.Linear()
    pairs = [
        flow_map_predictor(network, 1.3, path, Precond(target, TimeLabel(1.0)))(x, t, None)
        for network, target in (
            (network_of_x0, targets.Clean()),
            (smooth_network, targets.Velocity()),
        )
    ]
    for one, other in zip(*pairs, strict=True):
        if one is not None:
            np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-6)


def test_samplers_take_the_first_output():
    def both(*inputs):
        return jnp.concatenate([smooth_network(*inputs), inputs[1]], axis=-1)

    x, t = jnp.array([[0.5, -0.2], [1.0, 0.3]]), jnp.array([[0.8, 0.1], [0.4, 0.4]])
    precond = Precond(targets.Velocity(), TimeLabel(1.0))
    one, other = (
        flow_map_predictor(network, 1.3, paths.Linear(), precond)(x, t, None)
        for network in (both, smooth_network)
    )
    np.testing.assert_array_equal(one.x0, other.x0)
    assert of(MeanFlow, velocity_head=True).traits.outputs == 2


def test_a_network_of_x0_needs_the_straight_path():
    objective = replace(of_x0(Shortcut), path=paths.Cosine())
    with pytest.raises(UserError, match="shortcut with target=clean needs the straight path"):
        objective(smooth_network, 1.0, 1.0, jax.random.key(0), BATCH, Progress(jnp.zeros(())))


def test_the_lagrangian_rule_is_the_velocity_at_the_end_of_a_step():
    loss, slope, t, r, x, v = found(of(SelfDistilled, between=0.7))

    def end(params, r):
        return x - (t - r)[:, None] * u_in_numpy(params, x, t, r)

    def moves(params):
        return (end(params, r + 1e-5) - end(params, r - 1e-5)) / 2e-5

    there = u_in_numpy(1.3, end(1.3, r), r, r)
    error = moves(1.3) - np.where((t == r)[:, None], v, there)
    np.testing.assert_allclose(loss, np.square(error).mean(axis=1), rtol=1e-5)
    by_hand = np.mean(2.0 * error * (moves(1.3 + 1e-4) - moves(1.3 - 1e-4)) / 2e-4, axis=1)
    np.testing.assert_allclose(slope, by_hand, rtol=1e-3, atol=1e-5)


def test_the_eulerian_rule_is_improved_mean_flow_without_the_examples_noise():
    """Between two times its target has the network's velocity where that has the example's."""
    loss, _, t, r, x, _ = found(of(SelfDistilled, between=1.0, rule=Eulerian()))
    own = u_in_numpy(1.3, x, t, t)

    def along(h):
        return u_in_numpy(1.3, x + h * own, t + h, r)

    change = (along(1e-5) - along(-1e-5)) / 2e-5
    error = along(0.0) - (own - (t - r)[:, None] * change)
    np.testing.assert_allclose(loss, np.square(error).mean(axis=1), rtol=1e-5)


def exact(x, t, r):
    """The average velocity of the flow `dx/dt = x`, whose step is `x·e^{r - t}`."""
    span = (t - r)[:, None]
    return x * jnp.where(span == 0.0, 1.0, -jnp.expm1(-span) / jnp.where(span == 0.0, 1.0, span))


@pytest.mark.parametrize("rule", [Lagrangian(), Eulerian(), Progressive()])
def test_each_rule_holds_for_an_exact_average_velocity_and_for_no_other(rule):
    x = jnp.array([[0.5, -0.2], [1.0, 0.3], [-0.7, 0.4]])
    t, r = jnp.array([0.9, 0.6, 0.8]), jnp.array([0.1, 0.3, 0.05])

    def sides(average):
        return jax.jit(lambda: rule(average, x, t, r, jax.random.key(0)))()

    np.testing.assert_allclose(*sides(exact), rtol=1e-5)
    value, target = sides(lambda x, t, r: exact(x, t, r) * (1.0 + 0.5 * (t - r)[:, None]))
    assert (np.abs(value - target) > 0.001).all()


AT_THE_END = {
    "improved mean flow": of(MeanFlow, own_velocity=True, power=0.0, between=0.5),
    "lagrangian": of(SelfDistilled, between=0.5),
    "eulerian": of(SelfDistilled, between=0.5, rule=Eulerian()),
    "progressive": of(SelfDistilled, between=0.5, rule=Progressive()),
    "shortcut": of(Shortcut),
    "alpha flow": of(AlphaFlow, between=0.5, power=0.0),
    "pixel mean flow": of_x0(MeanFlow, own_velocity=True, power=0.0, between=0.5),
}


@pytest.mark.thorough
@pytest.mark.parametrize("name", AT_THE_END)
def test_the_exact_average_velocity_is_a_minimum(name):
    found = verify_objective(AT_THE_END[name], GAUSSIAN, num_batches=16, limit=0.2, fraction=1.0)
    assert found.passed, found


class Halved(Lagrangian):
    """With a slip: the end moves at half its speed."""

    def __call__(self, average, x, t, t_to, key):
        value, target = super().__call__(average, x, t, t_to, key)
        return value, 0.5 * target


@pytest.mark.thorough
def test_a_slip_in_a_rule_is_seen():
    wrong = of(SelfDistilled, between=0.5, rule=Halved())
    assert not verify_objective(wrong, GAUSSIAN, num_batches=16, limit=0.2).passed


def test_the_times_of_each_example_are_among_its_metrics():
    objective = of(AlphaFlow, between=0.7)

    @jax.jit
    def drawn(key):
        _, metrics = objective(smooth_network, 1.0, 1.0, key, BATCH, Progress(jnp.zeros(())))
        return metrics, objective.intervals(jax.random.split(key)[0], 32)

    with jax.enable_x64(True):
        metrics, (t, r) = jax.device_get(drawn(jax.random.key(3)))
    np.testing.assert_allclose(metrics["interval"], np.stack([t, r], axis=1), rtol=1e-6)


def test_a_rule_without_derivatives_says_so():
    forward = [
        of(SelfDistilled, rule=rule()).traits.forward_mode for rule in (Lagrangian, Progressive)
    ]
    assert forward == [True, False]
    assert not of(Shortcut).traits.forward_mode


@pytest.mark.parametrize("kind", [Shortcut, AlphaFlow, SelfDistilled])
def test_another_target_than_the_velocity_is_refused(kind):
    objective = replace(of(kind), precond=Precond(targets.V(), TimeLabel(1.0)))
    with pytest.raises(UserError, match="learns average velocities, not V: take target=velocity"):
        objective(smooth_network, 1.0, 1.0, jax.random.key(0), BATCH, Progress(jnp.zeros(())))


def test_they_have_the_meaning_of_a_flow_map():
    assert {of(kind).traits.solver for kind in (FlowMap, Shortcut, AlphaFlow)} == {"flow_map"}
    assert of(Denoising).traits.solver == "heun"
