"""Every named optimizer against its own recursion, written down in NumPy in double precision."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from diffjax import choices
from diffjax.conditions import Classes, Unconditional
from diffjax.errors import UserError
from diffjax.lookup import set_axes
from diffjax.optimizers.adam import Adam, AdamW
from diffjax.optimizers.descent import descent
from diffjax.optimizers.lion import Lion
from diffjax.optimizers.muon import Muon, is_axes, matrices
from diffjax.optimizers.normalised import NormalisedAdam
from diffjax.optimizers.radam import RAdam
from diffjax.optimizers.schedule_free import ScheduleFreeAdamW
from diffjax.optimizers.schedules import Cosine
from diffjax.spec import build, spec
from diffjax.training.averages import Averages
from diffjax.training.state import init_state
from diffjax.training.step import StepSettings, make_train_step
from diffjax.wiring import wire
from tests.support.power_profiles import weights_of_steps
from tests.support.tiny_run import MODELS, tiny_config

START = np.array([1.0, -2.0, 0.5])
TARGET = np.array([0.3, 0.1, -0.4])


def gradient_at(w):
    """Of a bowl that is steeper in some directions."""
    return np.array([1.0, 4.0, 0.5]) * (w - TARGET)


def followed(optimizer, steps):
    """Parameters after each of some steps, and where each gradient was taken."""
    params = jnp.asarray(START, jnp.float32)
    state = optimizer.transform.init(params)
    point_of, seen, points = jax.jit(optimizer.gradient_point), [], []

    @jax.jit
    def step(gradient, state, params):
        updates, state = optimizer.transform.update(gradient, state, params)
        return optax.apply_updates(params, updates), state

    for _ in range(steps):
        point = np.asarray(point_of(state, params), np.float64)
        params, state = step(gradient_at(point).astype(np.float32), state, params)
        seen.append(np.asarray(params))
        points.append(point)
    return np.array(seen), np.array(points)


def assert_follows(optimizer, rule, steps=12):
    seen, points = followed(optimizer, steps)
    np.testing.assert_allclose(seen, rule(steps), rtol=2e-5, atol=1e-5)
    before = np.concatenate([START[None], seen[:-1]])
    np.testing.assert_allclose(points, before, rtol=1e-6)


PLAIN = {"learning_rate": 0.1, "warmup_steps": 4, "clip_norm": np.inf}


def rate(n):
    return 0.1 * min((n + 1) / 4, 1.0)


@pytest.mark.parametrize("decay", [0.0, 0.3])
def test_adamw_is_its_recursion(decay):
    def rule(steps, b1=0.9, b2=0.999, eps=1e-8):
        w, m, v, seen = START, 0.0, 0.0, []
        for n in range(steps):
            g = gradient_at(w)
            m, v = b1 * m + (1 - b1) * g, b2 * v + (1 - b2) * g * g
            unbiased = (m / (1 - b1 ** (n + 1))) / (np.sqrt(v / (1 - b2 ** (n + 1))) + eps)
            w = w - rate(n) * (unbiased + decay * w)
            seen.append(w)
        return np.array(seen)

    assert_follows(descent(12, AdamW(weight_decay=decay), **PLAIN), rule)
    if not decay:
        assert_follows(descent(12, Adam(), **PLAIN), rule)


def test_radam_is_its_recursion_momentum_at_first():
    def rule(steps, b1=0.9, b2=0.9, eps=1e-8):
        w, m, v, seen, last = START, np.zeros(3), np.zeros(3), [], 2 / (1 - b2) - 1
        for n in range(1, steps + 1):
            g = gradient_at(w)
            m, v = b1 * m + (1 - b1) * g, b2 * v + (1 - b2) * g * g
            mean, rho = m / (1 - b1**n), last - 2 * n * b2**n / (1 - b2**n)
            if rho >= 5:
                square = (rho - 4) * (rho - 2) * last / ((last - 4) * (last - 2) * rho)
                mean = np.sqrt(square) * mean / (np.sqrt(v / (1 - b2**n)) + eps)
            w = w - rate(n - 1) * mean
            seen.append(w)
        return np.array(seen)

    assert_follows(descent(12, RAdam(b2=0.9), **PLAIN), rule)


def test_lion_is_its_recursion():
    def rule(steps, b1=0.9, b2=0.99, decay=0.3):
        w, m, seen = START, np.zeros(3), []
        for n in range(steps):
            g = gradient_at(w)
            w = w - rate(n) * (np.sign(b1 * m + (1 - b1) * g) + decay * w)
            m = b2 * m + (1 - b2) * g
            seen.append(w)
        return np.array(seen)

    assert_follows(descent(12, Lion(weight_decay=0.3), **PLAIN), rule)


@pytest.mark.parametrize("decay", [0.0, 0.3])
def test_the_weights_of_schedule_free_are_the_average_of_its_steps(decay):
    """x is the mean of all z, weighted by the squares of their rates; y lies between the two."""
    b1, b2, eps, steps = 0.9, 0.999, 1e-8, 12
    x, z, v, xs, ys, zs = START, START, 0.0, [], [], []
    for n in range(steps):
        y = b1 * x + (1 - b1) * z
        g = gradient_at(y)
        v = b2 * v + (1 - b2) * g * g
        z = z - rate(n) * (g / (np.sqrt(v / (1 - b2 ** (n + 1))) + eps) + decay * y)
        zs.append(z)
        x = np.average(zs, axis=0, weights=[rate(i) ** 2 for i in range(n + 1)])
        xs.append(x)
        ys.append(y)
    seen, points = followed(descent(12, ScheduleFreeAdamW(weight_decay=decay), **PLAIN), steps)
    np.testing.assert_allclose(seen, xs, rtol=2e-5, atol=1e-5)
    np.testing.assert_allclose(points, ys, rtol=2e-5, atol=1e-5)


def test_normalised_adam_is_adam_with_filters_of_one_length_after_each_step():
    """The recursion of `Adam`, and then each column of a kernel over its root mean square."""
    rng = np.random.default_rng(0)
    shapes = {"dense": (5, 3), "conv": (3, 3, 4, 2), "blocks": (2, 6, 4)}
    params = {
        name: {"kernel": rng.normal(size=shape).astype(np.float32), "gain": np.float32(0.5)}
        for name, shape in shapes.items()
    }
    rule, plain = (descent(3, make(b2=0.99), **PLAIN).transform for make in (NormalisedAdam, Adam))
    steps = jax.jit(lambda state, w, of: of.update(w, state, w), static_argnums=2)
    state, plain_state = rule.init(params), plain.init(params)
    for _ in range(3):
        updates, state = steps(state, params, rule)
        moves, plain_state = steps(plain_state, params, plain)
        moved: Any = jax.tree.map(np.add, params, updates)
        for name, shape in shapes.items():
            inputs = (1,) if name == "blocks" else tuple(range(len(shape) - 1))
            expected = np.asarray(params[name]["kernel"] + moves[name]["kernel"], np.float64)
            size = np.sqrt(np.mean(expected**2, inputs, keepdims=True))
            found = moved[name]["kernel"]
            np.testing.assert_allclose(found, expected / (size + 1e-4), rtol=1e-5, atol=1e-6)
            lengths = np.sqrt(np.sum(np.square(found), inputs))
            fan_in = np.prod([shape[axis] for axis in inputs])
            np.testing.assert_allclose(lengths, np.sqrt(fan_in), rtol=3e-4)
            gain = params[name]["gain"] + moves[name]["gain"]
            np.testing.assert_allclose(moved[name]["gain"], gain, rtol=1e-6)
        params = moved


def first_updates(rule, gradient, params):
    return jax.jit(lambda g, w: rule.update(g, rule.init(w), w)[0])(gradient, params)


def test_one_step_of_muon_has_all_singular_values_alike_and_the_scale_of_its_shape():
    """Five Newton-Schulz iterations leave singular values of 0.7 to 1.2 (Jordan 2024)."""
    rng = np.random.default_rng(0)
    shapes = {"tall": (32, 8), "wide": (8, 32), "conv_7": (3, 3, 4, 8), "final_conv": (3, 3, 8, 2)}
    params = {
        name: {"kernel": rng.normal(size=shape).astype(np.float32), "bias": np.ones(2, np.float32)}
        for name, shape in shapes.items()
    }
    gradient = jax.tree.map(lambda w: 3.0 * w, params)
    rule = descent(1, Muon(adamw_share=0.5), learning_rate=0.5, warmup_steps=0).transform
    updates: Any = first_updates(rule, gradient, params)
    for name in ("tall", "wide", "conv_7"):
        matrix = np.asarray(updates[name]["kernel"]).reshape(-1, shapes[name][-1])
        singular = np.linalg.svd(matrix / (0.5 * np.sqrt(max(1.0, matrix.shape[1] / len(matrix)))))
        assert singular.S.min() > 0.6
        assert singular.S.max() < 1.3
    # Adam's first step is the rate, against the gradient's sign.
    expected = -0.25 * np.sign(gradient["final_conv"]["kernel"])
    np.testing.assert_allclose(updates["final_conv"]["kernel"], expected, rtol=1e-3)
    np.testing.assert_allclose(updates["tall"]["bias"], [-0.25, -0.25], rtol=1e-4)


class Bowl:
    """Half the squared distance of the parameters from the target, for each example."""

    def __call__(self, apply, params, teacher_params, key, batch, progress):
        del apply, teacher_params, key, progress
        steep = jnp.asarray([1.0, 4.0, 0.5])
        loss = 0.5 * jnp.sum(steep * (params["w"] - jnp.asarray(TARGET, jnp.float32)) ** 2)
        return loss + jnp.zeros_like(batch["image"]), {"log_snr": batch["image"]}

    def update_memory(self, memory, seen):
        del seen
        return memory


def test_a_run_of_schedule_free_keeps_the_average_as_its_weights_and_averages_of_it():
    """The training step takes the gradient at y, and all names of weights are of x."""
    optimizer, averages = descent(12, ScheduleFreeAdamW(), **PLAIN), Averages((0.5,), (0.1,))
    objective: Any = Bowl()
    network: Any = None
    step = jax.jit(
        make_train_step(
            network,
            objective,
            optimizer,
            StepSettings(
                num_steps=12, averages=averages, condition_dropout=0.0, condition=Unconditional()
            ),
        )
    )
    state = init_state({"w": jnp.asarray(START, jnp.float32)}, optimizer, averages)
    batch = {"image": jnp.ones(2), "label": jnp.zeros(2, jnp.int32)}
    expected, _ = followed(optimizer, 12)
    for x in expected:
        state, _ = step(state, jax.random.key(0), batch)
        np.testing.assert_allclose(state.weights("live")["w"], x, rtol=1e-4, atol=1e-6)
    profile = weights_of_steps(0.1, 12)
    np.testing.assert_allclose(state.weights("power-0.1")["w"], profile @ expected, rtol=1e-3)


@pytest.mark.parametrize("model", ["dit", "unet"])
def test_muon_takes_the_matrices_inside_of_a_network(model):
    shapes = wire(tiny_config(f"model={model}"), (8, 8, 1), Classes(10)).params_shape
    found = jax.tree_util.tree_leaves_with_path(matrices(shapes), is_leaf=is_axes)
    names = {jax.tree_util.keystr(p, simple=True, separator="/"): leaf for p, leaf in found}
    assert len(names) == len(jax.tree.leaves(shapes))
    by_adamw = {name for name, leaf in names.items() if leaf is None}
    ends = {"dit": ("patch_embedding", "final_out"), "unet": ("conv_in", "final_conv")}[model]
    kernels = {name for name in by_adamw if name.endswith("/kernel")}
    assert kernels == {f"{end}/kernel" for end in ends}
    assert {name.rpartition("/")[2] for name in by_adamw - kernels} <= {
        "bias",
        "scale",
        "embedding",
    }
    assert "conditioning/label/embedding" in by_adamw


def test_stacked_blocks_are_a_matrix_each_to_muon():
    """The same network with its blocks in one array is moved by the same step."""
    rng = np.random.default_rng(0)
    two = rng.normal(size=(2, 6, 4)).astype(np.float32)
    stacked, apart = {"blocks": {"kernel": two}}, {"a": {"kernel": two[0]}, "b": {"kernel": two[1]}}
    rule = descent(1, Muon(), warmup_steps=0, clip_norm=np.inf).transform
    one: Any = first_updates(rule, stacked, stacked)
    other: Any = first_updates(rule, apart, apart)
    np.testing.assert_allclose(
        one["blocks"]["kernel"], [other["a"]["kernel"], other["b"]["kernel"]], rtol=1e-5
    )


@pytest.mark.parametrize("name", choices.OPTIMIZERS)
def test_every_optimizer_clips_the_gradient_by_its_norm(name):
    """A gradient above the bound moves parameters as one on the bound does; over two steps, since
    a first step of most of them does not depend on the gradient's size.
    """
    optimizer = build(choices.copy(choices.OPTIMIZERS[name]), num_steps=9)
    params = {"up": {"kernel": jnp.arange(6.0).reshape(2, 3), "bias": jnp.ones(3)}}

    @jax.jit
    def moved(scale):
        current, state = params, optimizer.transform.init(params)
        for n in range(2):
            gradient = optax.tree.add(params, jax.tree.map(jnp.ones_like, params)) if n else params
            gradient = optax.tree.scale(scale[n] / optax.tree.norm(gradient), gradient)
            updates, state = optimizer.transform.update(gradient, state, current)
            current = optax.apply_updates(current, updates)
        return current

    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-7),
        moved(np.array([1.0, 70.0], np.float32)),
        moved(np.array([1.0, 1.0], np.float32)),
    )


@pytest.mark.parametrize("name", choices.OPTIMIZERS)
def test_every_optimizer_starts_where_a_training_state_does(name):
    optimizer = build(choices.copy(choices.OPTIMIZERS[name]), num_steps=9)
    params = {"up": {"kernel": jnp.ones((2, 3)), "bias": jnp.ones(3)}}
    state = init_state(params, optimizer, Averages((0.9,)))
    point = optimizer.gradient_point(state.opt_state, state.params)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), point, params)
    # A step donates its state, and no buffer can be donated twice.
    pointers = [leaf.unsafe_buffer_pointer() for leaf in jax.tree.leaves(state)]
    assert len(set(pointers)) == len(pointers)


def without_schedule(num_steps):
    return descent(num_steps)


def chosen(arguments, own=None):
    config = tiny_config().copy_and_resolve_references()
    config.unlock()
    config.name = "tiny"
    if own is not None:
        config.optimizer = own
    set_axes(config, arguments, MODELS, model="dit")
    return config


def test_an_optimizer_by_name_has_its_papers_numbers_and_the_configs_warmup_and_schedule():
    own = spec(descent, learning_rate=7.0, warmup_steps=3, schedule=spec(Cosine))
    config = chosen("optimizer=lion", own)
    assert config.name == "tiny-lion"
    assert config.optimizer.rule["_target_"] == "diffjax.optimizers.lion:Lion"
    assert config.optimizer.learning_rate == 1e-4
    assert config.optimizer.warmup_steps == 3
    assert config.optimizer.schedule["_target_"] == "diffjax.optimizers.schedules:Cosine"


def test_the_configs_own_optimizer_and_schedule_by_name_stay_as_they_are():
    own = spec(descent, learning_rate=7.0, schedule=spec(Cosine))
    own.schedule.final_fraction = 0.3
    config = chosen("optimizer=adamw,schedule=cosine", own)
    assert config.optimizer.to_dict() == own.to_dict()
    assert config.name == "tiny"


def test_schedule_free_comes_with_a_constant_rate_unless_another_is_chosen():
    own = spec(descent, schedule=spec(Cosine))
    free = chosen("optimizer=schedule_free", own)
    assert free.optimizer.schedule["_target_"] == "diffjax.optimizers.schedules:Constant"
    falling = chosen("optimizer=schedule_free,schedule=inverse_sqrt", own)
    assert falling.optimizer.schedule["_target_"] == "diffjax.optimizers.schedules:InverseSqrt"
    assert falling.name == "tiny-schedule_free-inverse_sqrt"


def test_unknown_optimizers_and_schedules_are_refused_with_the_nearest():
    with pytest.raises(UserError, match="no optimizer is called 'muoon'; did you mean 'muon'"):
        chosen("optimizer=muoon")
    with pytest.raises(UserError, match="no schedule is called 'cosin'; did you mean 'cosine'"):
        chosen("schedule=cosin")
    config = spec(without_schedule)
    with pytest.raises(UserError, match=r"schedule=cosine: .*without_schedule takes no schedule"):
        chosen("schedule=cosine", config)
