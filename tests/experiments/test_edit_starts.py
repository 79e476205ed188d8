"""Editing draws by the route of all samples, and starts where the objective does."""

import jax.numpy as jnp
import numpy as np
import pytest
from jax.tree_util import Partial

from diffjax import choices, config_files
from diffjax.conditions import of_classes
from diffjax.errors import UserError
from diffjax.process.paths import Pair
from diffjax.runs.samples import edits
from diffjax.runs.samples.model import Model, Programs, Request
from diffjax.sampling import grids, solvers
from diffjax.sampling.editing import keep_known
from diffjax.sampling.sample import Recipe
from diffjax.training.sharding import make_mesh
from diffjax.wiring import wire

SHAPE = (8, 8, 1)


@pytest.fixture(scope="module")
def interpolant():
    """Noise in between, `γ² = t(1 - t)`, on a path that ends at t = 0.9, where `γ` is 0.3."""
    config = config_files.load("configs/digits.py:objective=interpolant")
    config.objective.gamma = choices.copy(choices.LOSSES["interpolant_brownian"].gamma)
    config.path.t_noise = 0.9
    config.model.update(hidden_size=16, depth=1, num_heads=2)
    return wire(config, SHAPE, of_classes(10))


def edit_of(wired, num_steps, images=None):
    """By a model that predicts its own input: what a walk starts from is what it returns."""
    recipe = Recipe(solvers.euler(), grids.Power(), num_steps)
    model = Model(Programs(wired, make_mesh()), {}).through(
        lambda guided: lambda x, t, cond: Pair(x, jnp.zeros_like(x))
    )
    images = jnp.zeros((4, *SHAPE)) if images is None else images
    return edits.Edit(model, recipe, Request(np.zeros(4, np.int32), seed=3), images)


def test_editing_starts_at_the_noise_of_the_objective(interpolant):
    """`x` at t = 0.9 is `0.9·x1 + 0.3·z`, of variance 0.81 + 0.09."""
    edited = edit_of(interpolant, 1)
    noise = edited.request.noise(SHAPE)
    np.testing.assert_allclose(edited.draw(), np.sqrt(0.9) * noise, rtol=1e-5)


def test_another_solver_walks_its_own_route(interpolant):
    """A step from 0.9 to 0.45 that the grid does not have: `x - 0.45·dx/dt`, and that is -x."""
    solver = solvers.euler()._replace(route=lambda path, times: jnp.array([0.9, 0.45, 0.0]))
    edited = edit_of(interpolant, 1)
    noise = edited.request.noise(SHAPE)
    made = edited.draw(solver=solver)
    np.testing.assert_allclose(made, 1.45 * np.sqrt(0.9) * noise, rtol=1e-5)


def test_variations_start_at_the_noise_of_the_objective(interpolant):
    """Half-way down, at t = 0.45: `0.55·x0` and noise of variance 0.45² + 0.45·0.55."""
    images = jnp.asarray(np.random.default_rng(0).uniform(-1, 1, (4, *SHAPE)), jnp.float32)
    edited = edit_of(interpolant, 2, images)
    start, made = edits.vary(edits.How(strength=0.5), edited)
    noise = edited.request.noise(SHAPE)
    np.testing.assert_allclose(start, 0.55 * images + np.sqrt(0.45) * noise, rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(made, start, atol=1e-6)


@pytest.mark.parametrize("method", ["replace", "repaint"])
def test_putting_fresh_noise_on_what_is_known_is_refused_as_a_solver_that_adds_it(
    interpolant, method
):
    how = edits.How("inpaint", method=method, jump=2, times=2)
    edited = edit_of(interpolant, 2)._replace(anew=np.ones((1, *SHAPE)))
    with pytest.raises(UserError, match="a solver that adds fresh noise does not suit it"):
        edits.complete(how, edited)


def test_and_so_it_is_step_by_step(interpolant):
    edited = edit_of(interpolant, 2)
    around = Partial(keep_known, image=edited.images, mask=jnp.zeros((1, 8, 8, 1)))
    with pytest.raises(UserError, match="a solver that adds fresh noise does not suit it"):
        next(edited.model.steps(edited.recipe, edited.request, around))


def test_known_pixels_with_the_noise_of_the_start_move_on_a_straight_line(interpolant):
    """Fixed noise makes no solver stochastic; what is known ends as it was."""
    images = jnp.asarray(np.random.default_rng(0).uniform(-1, 1, (4, *SHAPE)), jnp.float32)
    anew = np.zeros((1, *SHAPE))
    anew[:, 5:] = 1
    how = edits.How("inpaint", method="fixed_noise")
    seen, made = edits.complete(how, edit_of(interpolant, 3, images)._replace(anew=anew))
    np.testing.assert_array_equal(made[:, :5], images[:, :5])
    np.testing.assert_array_equal(seen[:, 5:], 0.0)
    assert float(jnp.abs(made[:, 5:] - images[:, 5:]).min()) > 0
