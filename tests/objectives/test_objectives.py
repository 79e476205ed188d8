"""Every objective is smallest at the best denoiser: all crosses, random ones, and by training."""

import itertools
import math
from dataclasses import replace
from functools import cache
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import scipy.stats
from ml_collections import ConfigDict

from diffjax import choices, lookup
from diffjax.compiling import once
from diffjax.conditions import of_classes
from diffjax.errors import UserError
from diffjax.models.dit import DiT
from diffjax.models.low_rank import LoraLayers
from diffjax.objectives.base import Objective, Progress
from diffjax.objectives.denoising import Denoising
from diffjax.oracle.analytic import GaussianMixture
from diffjax.oracle.verify import verify_objective
from diffjax.process.paths import Coeffs, coeffs, time_of_log_snr
from diffjax.process.precond import LogSNRLabel, Precond
from diffjax.process.targets import undecodable
from diffjax.sampling.sample import Recipe
from diffjax.spec import build, spec
from diffjax.wiring import check_wired, wire
from tests.support.any_path import AnyPath, numbered
from tests.support.crosses import ILLEGAL

PATHS = {name: build(spec) for name, spec in choices.PATHS.items()}
TARGETS = {name: build(spec) for name, spec in choices.TARGETS.items()}
WEIGHTS = {name: build(spec) for name, spec in choices.WEIGHTS.items()}
TIMES = {name: build(spec) for name, spec in choices.TIMES.items()}
NUMBERED = numbered(PATHS)  # one program for all
every_path = pytest.mark.parametrize("path_name", PATHS)

# Three Gaussians on the line, of the size of images and without symmetry.
SHARES, MEANS, VARIANCES = np.array([[0.3, 0.5, 0.2], [-0.7, 0.1, 0.6], [0.03, 0.01, 0.05]])
MEAN_SQUARE = float(SHARES @ (MEANS**2 + VARIANCES))
SIGMA_DATA = 0.5


def data_quantile(u: np.ndarray) -> np.ndarray:
    grid = np.linspace(-3.0, 3.0, 20_001)
    below = scipy.stats.norm.cdf(grid[:, None], MEANS, np.sqrt(VARIANCES)) @ SHARES
    return np.interp(u, below, grid)


def posterior_means(a: np.ndarray, s: np.ndarray, x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """`E[x0 | x]` and `E[eps | x]` in float64, `[B]` each."""
    a, s, x = a[:, None], s[:, None], x[:, None]
    spread = a**2 * VARIANCES + s**2
    centred = x - a * MEANS
    r = scipy.special.softmax(np.log(SHARES) - 0.5 * (np.log(spread) + centred**2 / spread), axis=1)
    x0 = MEANS + a * VARIANCES / spread * centred
    return np.sum(r * x0, axis=1), np.sum(r * s / spread * centred, axis=1)


# What each paper's best network returns, from the path's numbers and the two posterior means.
BEST = {
    "noise": lambda c, x, x0, eps: eps,
    "clean": lambda c, x, x0, eps: x0,
    "v": lambda c, x, x0, eps: c.a * eps - c.s * x0,
    "velocity": lambda c, x, x0, eps: c.da * x0 + c.ds * eps,
    "velocity_to_data": lambda c, x, x0, eps: -c.da * x0 - c.ds * eps,
    "scaled_score": lambda c, x, x0, eps: -eps,
    "score": lambda c, x, x0, eps: -eps / c.s,
    # (x0 - c_skip·x)/c_out with Karras et al.'s factors for x/a, at the noise level s/a.
    "f": lambda c, x, x0, eps: (
        (x0 * (c.s**2 + (c.a * SIGMA_DATA) ** 2) - c.a * SIGMA_DATA**2 * x)
        / (c.s * SIGMA_DATA * (c.s**2 + (c.a * SIGMA_DATA) ** 2) ** 0.5)
    ),
}


REPEATS, EXAMPLES = 32, 2048


@jax.jit
def gradients(c: Coeffs, slopes: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Means of `weight·slope` in each repeat, `[T, W, R, K]`, and the least weight of all.

    `slopes[T, R·n, K]` are the unweighted gradients. One program serves all crosses, because
    targets and weights know of the path only by its coefficients.
    """
    repeats = slopes.reshape(len(TARGETS), REPEATS, -1, slopes.shape[-1])
    factors = jnp.asarray(
        [[weight(c, target(c)) for weight in WEIGHTS.values()] for target in TARGETS.values()]
    )
    means = jnp.einsum("twrn,trnk->twrk", factors.reshape(*factors.shape[:2], REPEATS, -1), repeats)
    return means / repeats.shape[2], jnp.min(factors, axis=2)


@cache
def random_numbers(examples: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """For `u`, the data and the noise: independent scrambled Sobol sets, `[R·n]` each."""
    rng = np.random.default_rng(0)
    sets = [scipy.stats.qmc.Sobol(3, rng=rng).random(examples) for _ in range(REPEATS)]
    u, data, noise = np.clip(np.concatenate(sets), 1e-9, 1.0 - 1e-9).T
    return u, data_quantile(data), scipy.stats.norm.ppf(noise)


def spread(u: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Uniform numbers made to lie near the ends of the unit interval, and what each counts then.

    A third each is uniform, log-uniform above 0 and log-uniform below 1. Some weights grow so fast
    that uniform numbers would send one or two examples to where the loss is.
    """
    smallest = 1e-6
    size = -math.log(smallest)
    kind, share = np.divmod(3.0 * u, 1.0)
    u = np.select([kind == 0, kind == 1], [share, np.exp(-size * share)], 1 - np.exp(-size * share))
    u = np.clip(u.astype(np.float32), 0.0, 1.0 - 2.0**-24).astype(np.float64)
    ends = [np.where(v >= smallest, 1.0 / np.maximum(v, smallest) / size, 0.0) for v in (u, 1 - u)]
    return u, 3.0 / (1.0 + ends[0] + ends[1])


# One that ends in pure noise, one that does not, one in steps, and one that ends where it began.
KINDS_OF_PATHS = ("linear", "edm", "ddpm_table_zero_snr", "brownian_bridge")

# Five deviations in each legal pair of path and target, with each weight and each density.
NUM_COMPARISONS = 5 * (len(PATHS) * len(TARGETS) - len(ILLEGAL)) * len(WEIGHTS) * len(TIMES)


class Found(NamedTuple):
    """Gradients in units of their standard errors."""

    z: np.ndarray  # [times, T, W, deviations], at the truth
    z_of_wrong: np.ndarray  # [times, T, W], along a constant, where the truth is off by 2 %


def found(path_name: str, density_names: tuple[str, ...], examples: int = EXAMPLES) -> Found:
    path = PATHS[path_name]
    u, x0, eps = random_numbers(examples)
    u, count = spread(u)
    results = []
    for name in density_names:
        density = TIMES[name]
        c = jax.jit(lambda u, density=density: coeffs(path, density.quantile(u, path), ndim=1))(
            np.float32(u)
        )
        legal = [(path_name, name) not in ILLEGAL for name in TARGETS]
        with np.errstate(divide="ignore", invalid="ignore"):  # the illegal ones are left out
            slopes = np.stack(list(slopes_at_truth(c, x0, eps).values()))
        slopes = np.where(np.reshape(legal, (-1, 1, 1)), count[:, None] * slopes, 0.0)
        means, least = gradients(c, slopes.astype(np.float32))
        assert (np.asarray(least)[legal] >= 0.0).all()
        means = np.asarray(means, np.float64)[legal]
        results.append(means.mean(axis=2) / (means.std(axis=2, ddof=1) / math.sqrt(REPEATS)))
    z = np.stack(results)
    return Found(z[..., :5], z[..., 5])


def slopes_at_truth(c32: Coeffs, x0: np.ndarray, eps: np.ndarray) -> dict[str, np.ndarray]:
    """`½·d/dp (truth + p·deviation - target)²` at `p = 0` for each target, `[B, 6]`.

    The last is of a truth that is wrong by 2 % of the target's size.
    """
    c: Any = jax.tree.map(lambda each: np.asarray(each, np.float64), c32)
    x = c.a * x0 + c.s * eps
    means = posterior_means(c.a, c.s, x)
    image = x / np.sqrt(c.a**2 * MEAN_SQUARE + c.s**2)
    lean = np.tanh(0.5 * np.log(np.maximum(c.a, 1e-9) / c.s))
    features = np.stack([np.ones_like(x), image, image * lean, np.tanh(2.0 * image)], axis=1)
    slopes = {}
    for name, best in BEST.items():
        truth = best(c, x, *means)
        k_x, k_e = (np.asarray(each, np.float64) for each in TARGETS[name](c32))
        target = k_x * x0 + k_e * eps
        size = np.sqrt(k_x**2 * MEAN_SQUARE + k_e**2)
        deviations = np.column_stack([truth, size[:, None] * features, size])
        wrong = np.column_stack([np.zeros((len(x), 5)), 0.02 * size])
        slopes[name] = ((truth - target)[:, None] + wrong) * deviations
    return slopes


@pytest.mark.parametrize(
    "path_name",
    [
        pytest.param(
            name, marks=() if name in KINDS_OF_PATHS else pytest.mark.thorough(tenth=False)
        )
        for name in PATHS
    ],
)
def test_the_truth_is_the_minimiser_for_every_target_and_weight(path_name):
    """At times of one density for each path; those of all are below.

    The gradient at the exact prediction is zero within its own Monte-Carlo error.

    Gradients along five deviations, each of the target's size, are averaged over random Sobol sets;
    the error is that over 32 of them, so z is Student's t with 31 degrees of freedom.
    """
    assert_smallest_at_the_truth(found(path_name, (DENSITY_OF[path_name],)), path_name)


@pytest.mark.thorough
def test_the_truth_is_the_minimiser_for_every_target_weight_and_times():
    """On a path that ends in pure noise, one that does not, and one in steps."""
    for path_name in ("linear", "edm", "ddpm_table_zero_snr"):
        # Twice as many: a constant weight on scores counts the least noise alone, and few beta
        # times of EDM's path have that little.
        result = found(path_name, tuple(TIMES), 2 * EXAMPLES)
        assert_smallest_at_the_truth(result, path_name)
        assert np.mean(np.abs(result.z_of_wrong) > MOST) > 0.995, path_name


# Šidák: with right objectives the largest of all |z| exceeds this in 1 of 100 runs (it is 6.7).
MOST = scipy.stats.t.isf(-0.5 * math.expm1(math.log(0.99) / NUM_COMPARISONS), REPEATS - 1)
DENSITY_OF = {name: list(TIMES)[i % len(TIMES)] for i, name in enumerate(PATHS)}


def assert_smallest_at_the_truth(result: Found, path_name: str) -> None:
    assert np.abs(result.z).max() < MOST, path_name
    # A truth that is off by 2 % of the target's size would have failed.
    assert np.mean(np.abs(result.z_of_wrong) > MOST) > 0.95, path_name
    assert np.abs(result.z_of_wrong).min() > 5.0, path_name


def config_for(**axes: str) -> ConfigDict:
    """A tiny experiment, its axes named as on the command line."""
    config = ConfigDict({"name": "tiny", "condition_dropout": 0.0, "trainable": ""})
    config.lora = spec(LoraLayers)
    model = spec(DiT, patch_size=4, hidden_size=8, depth=1, num_heads=1)
    arguments = ",".join(f"{axis}={choice}" for axis, choice in axes.items())
    lookup.set_axes(config, arguments, {"dit": model}, model="dit")
    config.sampling = spec(
        Recipe,
        solver=choices.copy(choices.SOLVERS["ddim"]),
        grid=choices.copy(choices.GRIDS["uniform"]),
        num_steps=2,
        guidance_scale=1.0,
    )
    return config


# What is illegal, by each path and target once; the one that is worst among the legal, and one that
# ends without a signal.
FEW_CROSSES = {
    ("linear", "noise"),
    ("linear_shifted", "score"),
    ("ddpm_table_zero_snr", "scaled_score"),
    ("sub_vp", "clean"),
    ("cosine", "noise"),
    ("linear_shifted", "f"),
}


def assert_legality_is_known(crosses):
    for path_name, target_name in sorted(crosses):
        reason = undecodable(PATHS[path_name], TARGETS[target_name])
        known = (path_name, target_name) in ILLEGAL
        assert (reason is not None) == known, (path_name, target_name)
        assert reason is None or "alpha=" in reason


def test_legality_is_known_before_compiling():
    assert_legality_is_known(FEW_CROSSES)


@pytest.mark.thorough
def test_legality_of_each_cross_is_known_before_compiling():
    """What is illegal somewhere, on each path, and all targets on the paths that it is so on."""
    paths, targets = zip(*ILLEGAL, strict=True)
    crosses = {*itertools.product(PATHS, targets), *itertools.product(paths, TARGETS)}
    assert_legality_is_known(crosses - FEW_CROSSES)


@pytest.mark.parametrize(
    ("path_name", "target_name", "why"),
    [
        ("linear_shifted", "score", "at t=1 alpha=0"),
        pytest.param("ddpm_table_zero_snr", "noise", "at t=1 alpha=0", marks=pytest.mark.thorough),
        pytest.param("sub_vp", "clean", "at t=0.001", marks=pytest.mark.thorough),
    ],
)
def test_an_illegal_cross_is_refused_with_those_that_are_legal(path_name, target_name, why):
    legal = [name for name in TARGETS if (path_name, name) not in ILLEGAL]
    wired = wire(config_for(path=path_name, target=target_name), (8, 8, 1), of_classes(0))
    with pytest.raises(UserError, match=f"{why}.*a target of {', '.join(legal)}$"):
        check_wired(wired, 16, 6)


def test_samples_start_at_the_size_that_noise_has_at_the_end():
    objective = Denoising(
        PATHS["edm"], Precond(TARGETS["f"], LogSNRLabel()), WEIGHTS["constant"], TIMES["uniform"]
    )
    noise, source = np.float32([[1.0, -2.0]]), np.float32([[0.5, 3.0]])
    np.testing.assert_allclose(objective.start(noise, None), 80.0 * noise)
    np.testing.assert_allclose(objective.start(noise, source), 80.0 * source)


class Cross(NamedTuple):
    """Names on each axis of an objective without wrappers."""

    path: str
    target: str
    weight: str
    times: str
    uniforms: str
    coupling: str
    noise_label: str
    input_scale: str

    def build(self) -> Denoising:
        parts = {axis: build(choices.AXES[axis][name]) for axis, name in self._asdict().items()}
        precond = Precond(*(parts.pop(name) for name in ("target", "noise_label", "input_scale")))
        return Denoising(precond=precond, **parts)


def random_cross(seed: int, **fixed: str) -> Cross:
    rng = np.random.default_rng(seed)
    while True:
        drawn = {axis: str(rng.choice(sorted(choices.AXES[axis]))) for axis in Cross._fields}
        cross = Cross(**(drawn | fixed))
        if (cross.path, cross.target) not in ILLEGAL:
            return cross


@pytest.mark.thorough
@pytest.mark.parametrize("seed", range(20))
def test_a_random_cross_gives_finite_losses_and_gradients(seed):
    objective = random_cross(seed).build()
    rng = np.random.default_rng(seed)
    batch = {
        "image": rng.uniform(-1.0, 1.0, (16, 2, 2, 1)).astype(np.float32),
        "label": rng.integers(0, 3, 16, np.int32),
        "cond": np.zeros(16, np.int32),
        "source": rng.standard_normal((16, 2, 2, 1), np.float32),
    }

    def apply(params, x, noise_label, cond, *, key=None):
        assert x.shape == batch["image"].shape
        assert noise_label.shape == cond.shape == (16,)
        assert key is not None
        return params[0] * x + params[1] * jnp.tanh(0.01 * noise_label)[:, None, None, None]

    @jax.jit
    def program(params, key, batch):
        def mean_loss(params):
            loss, metrics = objective(apply, params, params, key, batch, Progress(jnp.zeros(())))
            return loss.mean(), (loss, metrics)

        return jax.grad(mean_loss, has_aux=True)(params)

    gradient, (loss, metrics) = program(jnp.array([0.3, 0.1]), jax.random.key(seed), batch)
    assert loss.shape == metrics["log_snr"].shape == (16,)
    assert (np.asarray(loss) >= 0.0).all()
    assert np.isfinite(loss).all()
    assert np.isfinite(gradient).all()


@once()
def costs_of_an_error(path: AnyPath, t: jax.Array) -> jax.Array:
    """What the same wrong x0 costs, by each target and weight, `[T, W, N]`."""
    c, costs = coeffs(path, t, ndim=1), []
    for target in TARGETS.values():
        k = target(c)
        seen = k.k_x - k.k_e * c.a / c.s  # an error 1 of x0 is one of -a/s of the noise
        costs.append(jnp.stack([weight(c, k) * seen**2 for weight in WEIGHTS.values()]))
    return jnp.stack(costs)


@every_path
def test_an_error_costs_the_same_whatever_the_target(path_name):
    """The same wrong x0 at the same x_t has one loss, whatever the network predicts."""
    path = NUMBERED[path_name]
    t = np.linspace(path.t_min, path.t_noise, 64).astype(np.float32)
    costs = np.asarray(costs_of_an_error(path, t))
    # The plain loss is the one that is meant to depend on the target.
    others = [i for i, name in enumerate(WEIGHTS) if name != "constant"]
    legal = [i for i, name in enumerate(TARGETS) if (path_name, name) not in ILLEGAL]
    for one in legal[1:]:
        np.testing.assert_allclose(costs[one, others], costs[legal[0], others], rtol=2e-4)


@pytest.mark.thorough
def test_a_random_cross_passes_the_public_check():
    for seed in range(4):
        assert_it_passes_the_public_check(random_cross(seed, coupling="independent"))


def assert_it_passes_the_public_check(cross):
    # Only a gradient that does not vanish fails here; how finely it is seen depends on the cross.
    found = verify_objective(cross.build(), num_batches=16, batch_size=256)
    assert max(abs(z) for z in found.z.values()) < 8.0  # of Student's t with 15 degrees of freedom


# One of each kind of coupling, bridge, wrapper and label; tests/experiments wires all of them.
KINDS = ("edm2", "vdm_plus", "dispersive", "interpolant")


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=() if name in KINDS else pytest.mark.thorough)
        for name in choices.OBJECTIVES
    ],
)
def test_a_named_objective_can_be_wired(name):
    wired = wire(config_for(objective=name), (8, 8, 1), of_classes(3))
    assert wired.num_params > 0


MIXTURE = GaussianMixture(*map(jnp.asarray, (SHARES, MEANS[:, None], VARIANCES[:, None, None])))
TIME_OF_LABEL = {
    "time": lambda path, label: label / 1000.0,
    "time_to_data": lambda path, label: 1.0 - label,
    "log_snr": lambda path, label: time_of_log_snr(path, label / -25.0),
}


def named(name: str) -> Objective:
    """A named objective, without the terms that move its optimum on purpose."""
    config = config_for(objective=name)
    path, precond = build(config.path), build(config.precond)
    objective = build(config.objective, path=path, precond=precond)
    for wrapper in config.wrappers:
        objective = build(wrapper, objective=objective)
    moved = name in ("contrastive", "dispersive")
    return replace(objective, scale=0.0) if moved else objective


def trained(objective: Objective, apply: Any, draw: Any, num_steps: int) -> jax.Array:
    """The parameters at the end, of which there were three, each 0.5 away from the truth."""
    start: Any = {"theta": jnp.array([0.5, -0.5, 0.5]), **objective.init_params(jax.random.key(0))}
    optimizer = optax.adam(optax.cosine_decay_schedule(0.03, num_steps))

    def step(carry, inputs):
        params, state, memory = carry
        number, key = inputs
        data_key, loss_key = jax.random.split(key)
        image = draw(data_key, 256)
        batch = {"image": image, "cond": jnp.zeros(len(image), jnp.int32)}

        def mean_loss(params):
            progress = Progress(number, memory)
            loss, metrics = objective(apply, params, params, loss_key, batch, progress)
            return loss.mean(), metrics

        gradient, metrics = jax.grad(mean_loss, has_aux=True)(params)
        update, state = optimizer.update(gradient, state)
        memory = objective.update_memory(memory, metrics)
        return (optax.apply_updates(params, update), state, memory), None

    @jax.jit
    def run(keys) -> Any:
        carry = (start, optimizer.init(start), objective.init_memory())
        (params, _, _), _ = jax.lax.scan(step, carry, (jnp.arange(num_steps), keys))
        return params

    return run(jax.random.split(jax.random.key(1), num_steps))["theta"]


# Those of one time whose noise is independent of the data; tests/objectives/test_bridges.py and
# tests/objectives/few_step/test_mean_flow.py have the others.
INDEPENDENT = [
    name
    for name, parts in choices.OBJECTIVES.items()
    if (parts["coupling"], parts["loss"]) == ("independent", "denoising")
]


# One with parameters beside the network's, one with a memory, whose mean loss and what it learns
# are in test_wrappers.py. The other tests here are of a Denoising alone, those of
# test_learned_variance.py of the other wrapper that keeps its optimum.
TRAINED = ("edm2", "vdm_plus")


@pytest.mark.thorough(tenth=False)
@pytest.mark.parametrize("name", TRAINED)
def test_training_reaches_the_truth(name):
    assert_training_reaches_the_truth(name)


@pytest.mark.thorough
def test_training_reaches_the_truth_by_objectives_of_each_kind():
    """One for each of the other targets, wrappers and densities that have no other here."""
    seen = {axis: {choices.OBJECTIVES[name][axis] for name in TRAINED} for axis in NEW}
    for name in INDEPENDENT:
        if any(choices.OBJECTIVES[name][axis] not in seen[axis] for axis in NEW):
            for axis in NEW:
                seen[axis].add(choices.OBJECTIVES[name][axis])
            assert_training_reaches_the_truth(name)


NEW = ("target", "wrappers", "times")


def assert_training_reaches_the_truth(name):
    """The network is the truth plus three deviations of the target's size."""
    axes = choices.OBJECTIVES[name]
    objective = named(name)
    path, precond = objective.path, objective.precond
    predict = MIXTURE.predict(path)

    def apply(params, x, noise_label, cond, *, key=None, hidden=False):
        t = TIME_OF_LABEL[axes["noise_label"]](path, noise_label)
        c = coeffs(path, t, x.ndim)
        x_t = x / precond.input_scale(c)
        k, (x0, eps, _) = precond.target(c), predict(x_t, t, None)
        image = x_t / jnp.sqrt(c.a**2 * MEAN_SQUARE + c.s**2)
        features = jnp.stack([jnp.ones_like(x), image, jnp.tanh(2.0 * image)])
        size = jnp.sqrt(k.k_x**2 * MEAN_SQUARE + k.k_e**2)
        output = BEST[axes["target"]](c, x_t, x0, eps)
        output += size * jnp.tensordot(params["theta"], features, 1)
        # A variance is not what is looked at here.
        output = jnp.concatenate(
            [output, *[jnp.zeros_like(x)] * (objective.traits.outputs - 1)], axis=-1
        )
        return (output, (output,)) if hidden else output

    theta = trained(objective, apply, MIXTURE.draw, 600)
    assert np.abs(theta).max() < 0.03, name


@pytest.mark.thorough
def test_training_with_optimal_transport_reaches_the_monotone_map():
    """On a line the best coupling of N(m, v²) and N(0, 1) is `x0 = m + v·eps`.

    So `x_t` tells both, and the velocity is known; batches of 256 come near that.
    """
    mean, deviation = 0.3, 0.4

    def apply(params, x, noise_label, cond, *, key=None):
        t = (noise_label / 1000.0)[:, None]
        eps = (x - (1.0 - t) * mean) / ((1.0 - t) * deviation + t)
        features = jnp.stack([jnp.ones_like(x), x, jnp.tanh(2.0 * x)])
        truth = eps - (mean + deviation * eps)
        return truth + jnp.tensordot(params["theta"], features, 1)

    def draw(key, n):
        return mean + deviation * jax.random.normal(key, (n, 1))

    theta = trained(named("otcfm"), apply, draw, 200)
    assert np.abs(theta).max() < 0.03
