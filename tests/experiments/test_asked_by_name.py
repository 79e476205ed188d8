"""What samples are asked for is handed on by name, and editing starts where the objective does."""

from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffjax import choices, config_files
from diffjax.errors import UserError
from diffjax.process.paths import Pair
from diffjax.runs.generate import Asked, sample_keys, starting_noise
from diffjax.sampling import grids, solvers
from diffjax.sampling.sample import Recipe
from diffjax.spec import spec
from diffjax.wiring import wire
from experiments import edit
from tests.support.tiny_network import Plain

SHAPE = (8, 8, 1)


def test_each_part_of_what_is_asked_arrives_by_its_name():
    asked = Asked(
        wired="wired",  # type: ignore
        params="params",
        recipe="recipe",  # type: ignore
        labels=np.arange(5),
        seed=7,
        source=np.arange(5) * 10.0,
        weaker="weaker",  # type: ignore
    )
    calls: list[dict[str, Any]] = []

    def generate(params, recipe, labels, seed, source=None, weaker=None, first=0):
        calls.append(dict(locals()))
        return labels

    made = [some.drawn_by(generate) for some in asked.batches(2)]
    np.testing.assert_array_equal(np.concatenate(made), asked.labels)
    assert [call["first"] for call in calls] == [0, 2, 4]
    assert [len(call["labels"]) for call in calls] == [2, 2, 1]
    for call in calls:
        np.testing.assert_array_equal(call["source"], call["labels"] * 10.0)
        parts = {name: call[name] for name in ("params", "recipe", "seed", "weaker")}
        assert parts == {"params": "params", "recipe": "recipe", "seed": 7, "weaker": "weaker"}
    calls.clear()
    asked.only(np.arange(3, 5)).drawn_by(generate)
    assert calls[0]["first"] == 3
    asked.drawn_by(generate)
    assert calls[1]["first"] == 0


@pytest.fixture(scope="module")
def interpolant():
    """Noise in between, `γ² = t(1 - t)`, on a path that ends at t = 0.9, where `γ` is 0.3."""
    config = config_files.load("configs/digits.py:objective=interpolant")
    config.objective.gamma = choices.copy(choices.BRIDGES["brownian"].gamma)
    config.path.t_noise = 0.9
    config.model = spec(Plain)
    return wire(config, SHAPE, 10)


def model(wired, num_steps):
    """A model that predicts its own input, so that what a walk starts from is what it gives."""
    recipe = Recipe(solvers.euler(), grids.Power(), num_steps)

    def predict(x, t, cond):
        return Pair(x, jnp.zeros_like(x))

    labels = jnp.zeros(4, jnp.int32)
    return edit.Model(predict, wired, recipe, recipe.times(wired.path), labels)


def test_editing_starts_at_the_noise_of_the_objective(interpolant):
    """`x` at t = 0.9 is `0.9·x1 + 0.3·z`, of variance 0.81 + 0.09."""
    keys = sample_keys(3, np.arange(4))
    made = model(interpolant, 1).draw(solvers.euler(), None, keys)
    noise = starting_noise(3, np.arange(4), SHAPE)
    np.testing.assert_allclose(made, np.sqrt(0.9) * noise, rtol=1e-5)


def test_variations_start_at_the_noise_of_the_objective(interpolant):
    """Half-way down, at t = 0.45: `0.55·x0` and noise of variance 0.45² + 0.45·0.55."""
    keys = sample_keys(3, np.arange(4))
    images = jnp.asarray(np.random.default_rng(0).uniform(-1, 1, (4, *SHAPE)), jnp.float32)
    args = SimpleNamespace(strength=0.5)
    start, _ = edit.vary(args, model(interpolant, 2), images, keys)
    noise = starting_noise(3, np.arange(4), SHAPE)
    np.testing.assert_allclose(start, 0.55 * images + np.sqrt(0.45) * noise, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("method", ["replace", "repaint"])
def test_putting_fresh_noise_on_what_is_known_is_refused_as_a_solver_that_adds_it(
    interpolant, method
):
    args = SimpleNamespace(method=method, jump=2, times=2)
    images = jnp.zeros((4, *SHAPE))
    with pytest.raises(UserError, match="a solver that adds fresh noise does not suit it"):
        edit.inpaint(args, model(interpolant, 2), images, jax.random.split(jax.random.key(0), 4))
