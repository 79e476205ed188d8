"""Sampling promotes types by hand, so it runs under its users' strict flags.

JAX refuses what is implicit while a function is traced, so nothing here is compiled.
"""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffjax import choices
from diffjax.compiling import implicit_promotion
from diffjax.conditions import Classes
from diffjax.lookup import against_called, guidance_called, solver_called
from diffjax.oracle import analytic
from diffjax.process.paths import Linear, Pair, coeffs
from diffjax.sampling.guidance import GuidanceModels, guide
from diffjax.sampling.sample import Recipe, draw, with_condition
from diffjax.spec import build


@pytest.fixture(autouse=True)
def _strict():
    with jax.numpy_dtype_promotion("strict"):
        yield


def predict(path, x, t, cond):
    """Of standard normal data, whatever the label."""
    c = coeffs(path, t[:, 0] if t.ndim == 2 else t, x.ndim)
    size = c.a**2 + c.s**2
    shift = 0.01 * jnp.reshape(cond.astype(x.dtype), (-1, 1, 1, 1))
    return Pair(c.a * x / size + shift, c.s * x / size, jnp.full_like(x, 0.5))


def trace(path="linear", solver="heun", grid="uniform", rule="cfg", against="null"):
    path = build(choices.PATHS[path])
    model = partial(predict, path)
    models = GuidanceModels(model, Classes(10), model, lambda layers: model)
    guided = guide(models, path, build(guidance_called(rule)), 2.0, build(against_called(against)))
    recipe = Recipe(solver_called(solver), build(choices.GRIDS[grid]), 4)

    def samples(key):
        keys, labels = jax.random.split(key, 2), jnp.array([3, 4])
        denoise = with_condition(guided, labels)
        return draw(denoise, recipe.solver, path, recipe.times(path), keys, (4, 4, 1))

    found = jax.eval_shape(samples, jax.random.key(0))
    assert (found.shape, found.dtype) == ((2, 4, 4, 1), jnp.float32)


def test_the_flag_is_seen():
    with pytest.raises(jax.dtypes.TypePromotionError):
        jnp.multiply(jnp.arange(3), 0.5)
    with implicit_promotion():
        assert (jnp.ones((2, 3)) + jnp.arange(3)).shape == (2, 3)


def some(names, quick):
    return [
        pytest.param(name, marks=[] if name in quick else pytest.mark.thorough) for name in names
    ]


SOLVERS = some(
    [name for name in choices.SOLVERS if name != "restart"], {"ddpm", "dpmpp_3m", "unipc", "exp_ab"}
)


@pytest.mark.parametrize("solver", SOLVERS)
def test_solvers(solver):
    trace(solver=solver)


def test_solvers_that_go_back_up():
    """The way of Restart depends on numbers, so its times are made before the trace."""
    path, solver = Linear(), solver_called("restart")
    recipe = Recipe(solver, build(choices.GRIDS["uniform"]), 4)
    times = recipe.times(path)
    assert len(times) > 5
    jax.eval_shape(
        lambda keys: draw(
            with_condition(partial(predict, path), jnp.zeros(2, jnp.int32)),
            solver,
            path,
            times,
            keys,
            (4, 4, 1),
        ),
        jax.random.split(jax.random.key(0), 2),
    )


@pytest.mark.parametrize("path", some(choices.PATHS, {"ddpm_table"}))
def test_paths(path):
    trace(path, "dpmpp_2s")


@pytest.mark.parametrize("grid", some(choices.GRIDS, {"cosine", "karras"}))
def test_grids(grid):
    trace("ddpm_table", "ddim", grid)


@pytest.mark.parametrize(
    "rule", some([*choices.GUIDANCE, "projected+limited"], {"projected+limited", "zero_star"})
)
def test_guidance(rule):
    trace(solver="ddim", rule=rule)


@pytest.mark.parametrize("against", ["null", "label:3", "weights:ema-0.9", "attention"])
def test_second_predictions(against):
    trace(solver="ddim", against=against)


def test_the_oracle():
    """A mixture, its flow and its density; and points. The flow is in the average velocity."""
    means = jnp.array([[0.5, 0.0, 1.0], [-1.0, 0.3, 0.0]])
    mixture = analytic.GaussianMixture(jnp.array([0.4, 0.6]), means, jnp.stack([jnp.eye(3)] * 2))
    points = analytic.FiniteData(mixture.means)
    gaussian = analytic.Gaussian(mixture.means[0], mixture.covariances[0])

    def answers(x, t):
        of_all = [
            (
                data.predict(Linear())(x, t, None),
                data.score(Linear(), x, t),
                data.log_density(Linear(), x, t),
                data.posterior_covariance(Linear(), x, t),
            )
            for data in (mixture, points, gaussian)
        ]
        return of_all, (
            mixture.average_velocity(Linear(), x, 0.9, 0.2),
            mixture.responsibilities(Linear(), x, t),
            mixture.draw(jax.random.key(0), 5),
        )

    x, t = np.ones((4, 3), np.float32), np.full(4, 0.5, np.float32)
    for leaf in jax.tree.leaves(jax.eval_shape(answers, x, t)):
        assert leaf.dtype == jnp.float32
