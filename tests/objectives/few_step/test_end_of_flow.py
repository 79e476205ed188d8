"""An objective whose prediction is the end of the flow: what it is refused, and what it can do."""

from dataclasses import replace
from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs import digits
from diffjax import choices, lookup
from diffjax.conditions import Classes
from diffjax.errors import UserError
from diffjax.objectives.distillation.distilled import Distilled
from diffjax.objectives.wrappers import Uncertainty
from diffjax.runs.measuring.likelihoods import check_likelihood
from diffjax.sampling.consistency import consistency
from diffjax.sampling.sample import starting_noise, with_condition
from diffjax.sampling.solvers import Interval
from diffjax.spec import build, spec
from diffjax.wiring import build_objective, check_recipe, check_wired, traits_of, wire

SHAPE, CLASSES = (8, 8, 1), Classes(10)


def config_of_ends(wrappers="none"):
    config = digits.get_config(f"wrappers={wrappers}")
    config.model.update(hidden_size=16, depth=1)
    loss = {name: part for name, part in config.objective.items() if name != "_target_"}
    config.objective = spec(Distilled, **loss)
    config.sampling.solver = choices.copy(choices.SOLVERS["consistency"])
    config.sampling.guidance_scale = 1.0
    config.sampling.num_steps = 3
    return config


@cache
def wired():
    return wire(config_of_ends(), SHAPE, CLASSES)


@pytest.mark.parametrize("name", ["ddim", "ddpm", "heun", "unipc", "restart", "adaptive"])
def test_a_solver_of_posterior_means_is_refused_in_one_line_with_what_would_do(name):
    recipe = replace(wired().recipe, solver=lookup.solver_called(name))
    with pytest.raises(UserError) as refused:
        check_recipe(recipe, wired())
    assert str(refused.value) == (
        "this solver needs a model of the posterior mean, and Distilled trains one of the end of "
        "the flow: take the solver consistency, or train another loss"
    )


def test_of_all_solvers_only_those_of_ends_fit():
    fits = []
    for name in choices.SOLVERS:
        try:
            check_recipe(replace(wired().recipe, solver=lookup.solver_called(name)), wired())
        except UserError:
            continue
        fits.append(name)
    assert fits == ["consistency", "one_step"]


def test_a_solver_of_ends_is_refused_for_a_denoiser():
    config = digits.get_config()
    config.model.update(hidden_size=16, depth=1)
    config.sampling.solver = choices.copy(choices.SOLVERS["consistency"])
    message = r"needs a model of the end of the flow, and Denoising .* take the solver heun"
    with pytest.raises(UserError, match=message):
        check_wired(wire(config, SHAPE, CLASSES), 16, 6)


def test_guidance_combines_posterior_means_and_is_refused():
    said = r"combines posterior means, and Distilled .* guidance_scale=1"
    with pytest.raises(UserError, match=said):
        check_recipe(replace(wired().recipe, guidance_scale=2.0), wired())


@pytest.mark.parametrize("method", ["ode", "vlb", "discrete_vlb"])
def test_it_has_no_likelihood(method):
    with pytest.raises(UserError, match="a likelihood needs the posterior mean at each time"):
        check_likelihood(wired().objective, method)


def test_average_velocities_have_one_because_over_no_time_they_are_velocities():
    check_likelihood(build_objective(digits.get_config("objective=mean_flow")), "ode")


def test_a_wrapper_has_the_meaning_and_the_default_solver_of_what_it_wraps():
    traits = traits_of(config_of_ends("uncertainty"))
    assert traits == wired().objective.traits == Uncertainty(wired().objective).traits
    assert lookup.solver_called(traits.solver) is consistency()


def test_a_config_of_its_loss_needs_no_more_than_the_row(monkeypatch):
    """Solver, guidance and evaluation are those that fit."""
    row = {"denoising": spec(Distilled)}
    monkeypatch.setattr(choices, "AXES", {**choices.AXES, "loss": row})
    config = digits.get_config()
    assert build(config.sampling).solver is consistency()
    assert config.evaluation.solvers == ("consistency",)


@pytest.mark.parametrize("num_steps", [1, 3])
def test_it_samples_by_jumps_to_the_end_and_fresh_noise(num_steps):
    """A network of one end: it is where all samples are, after one evaluation a step."""
    end, path, evaluated = 0.25, wired().path, []

    def apply(params, x, noise_label, cond, **how):
        evaluated.append(x)
        return (x - params) / noise_label[:, None, None, None] * 1_000.0  # the velocity to there

    model = wired()._replace(apply=apply).predict(end)
    times = replace(wired().recipe, num_steps=num_steps).times(path)
    keys = jax.random.split(jax.random.key(0), 4)

    @jax.jit
    def walk(times, keys):
        levels, denoise = [], with_condition(model, None)
        noise, keys = starting_noise(keys, SHAPE)
        x = path.sigma(times[0]) * noise
        for i in range(num_steps - 1):
            interval = Interval(path, times[i], times[i + 1], keys)
            x, _ = wired().recipe.solver.step(denoise, interval, (), x)
            levels.append(jnp.std(x - path.alpha(times[i + 1]) * end))
        return denoise(x, times[-2]).x0, levels, path.sigma(times[1:-1])

    found, levels, expected = walk(times, keys)
    assert len(times) == num_steps + 1
    np.testing.assert_allclose(found, end, atol=1e-4)
    assert len(evaluated) == num_steps
    # In between there is noise of the path's own level, fresh each time.
    np.testing.assert_allclose(levels, expected, rtol=0.15)
