"""The scale of guidance as an input of the network: what is learned, and what samples are of."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs import digits
from diffjax.compiling import once
from diffjax.conditions import Classes, Guided
from diffjax.errors import UserError
from diffjax.objectives.base import Progress
from diffjax.objectives.distillation.denoisers import GuidanceDistillation
from diffjax.objectives.few_step.drifting import Drifting
from diffjax.objectives.few_step.mean_flow import MeanFlow
from diffjax.objectives.wrappers import EmbeddedGuidance
from diffjax.process import paths, targets, times, weights
from diffjax.process.precond import Precond, TimeLabel
from diffjax.runs.samples.model import Model, Programs, Request
from diffjax.sampling import guidance
from diffjax.training.sharding import make_mesh
from diffjax.wiring import check_recipe, wire

OF_V = Precond(targets.V(), TimeLabel(1.0))
MEANS = np.array([[1.0, -1.0], [-0.5, 2.0]])
BATCH = {
    "image": np.random.default_rng(0).standard_normal((64, 2)) + MEANS[np.arange(64) % 2],
    "cond": np.arange(64) % 2,
}
UNLIKE, TEACHER = (1.5, 6.0), None
FLAT = weights.Constant(), times.Uniform()


def exact(x, t, cond):
    """v of unit Gaussians on the cosine path, one for each class; their joint mean without."""
    a, s = jnp.cos(0.5 * jnp.pi * t)[:, None], jnp.sin(0.5 * jnp.pi * t)[:, None]
    mean = jnp.mean(MEANS, axis=0)[None] if cond is None else jnp.asarray(MEANS)[cond]
    x0 = a * x + s**2 * mean
    return (a * x - x0) / s


def student(params, x, t, cond):
    """Linear in its parameters: the prediction of a class, and terms of the scale beside it."""
    on, off = (exact(x, t, each) for each in (cond.cond, None))
    w = cond.scale[:, None]
    terms = jnp.stack([w * on, w * off, on, off, w * x])
    return jnp.einsum("k,knd->nd", params, terms)


def network(params, x, t, cond, *, key=None):
    """The student, or the teacher, which takes no scale and has no parameters."""
    del key
    return exact(x, t, cond) if params is TEACHER else student(params, x, t, cond)


@once()
def minimiser(objective):
    """The parameters with no gradient: the loss is quadratic in them."""

    def mean(params):
        progress = Progress(jnp.zeros(()), num_steps=1)
        loss, _ = objective(network, params, TEACHER, jax.random.key(2), BATCH, progress)
        return jnp.mean(loss)

    begin = jnp.zeros(5)
    found = jnp.linalg.solve(jax.hessian(mean)(begin), -jax.grad(mean)(begin))
    return found, mean(found)


def test_the_student_of_a_scale_is_the_teacher_guided_with_it():
    """By least squares over terms among which the guided teacher is: at two unlike scales."""
    distilled = GuidanceDistillation(paths.Cosine(), OF_V, weights.Constant(), times.Uniform())
    with jax.enable_x64(True):
        params, least = minimiser(EmbeddedGuidance(distilled, 1.0, 8.0))
        assert float(least) < 1e-12
        t, x, cond = jnp.linspace(0.2, 0.9, 6), jnp.ones((6, 2)), jnp.arange(6) % 2
        on, off = exact(x, t, cond), exact(x, t, None)
        for scale in UNLIKE:
            guided = student(params, x, t, Guided(cond, jnp.full(6, scale)))
            np.testing.assert_allclose(guided, off + scale * (on - off), atol=1e-6)


def test_a_mean_flow_learns_from_the_velocity_guided_with_the_scale_of_each_example():
    """At the exact guided velocity the target is that velocity, but for the example's noise."""
    on, off = (lambda x: 0.3 * x + 1.0), (lambda x: -0.2 * x)

    def velocity(params, x, labels, cond, *, key=None):
        w = cond.scale[:, None]
        return w * on(x) + (1.0 - w) * off(x) if cond.cond is not None else off(x)

    flow = MeanFlow(paths.Linear(), Precond(targets.Velocity(), TimeLabel(1.0)), *FLAT)
    scale = jnp.linspace(1.0, 6.0, 64)
    t = jnp.full(64, 0.5)
    batch = {"image": jnp.float32(BATCH["image"]), "cond": Guided(BATCH["cond"], scale)}
    noised = flow.noised(t, jax.random.key(0), batch)
    noise = flow.velocity_of(noised) - on(noised.x_t)
    found = flow.guided(velocity, (), noised, t) - noise
    np.testing.assert_allclose(found, velocity((), noised.x_t, None, noised.cond), rtol=1e-4)


def test_the_images_that_a_generator_drifts_from_count_by_the_scale_of_its_sample():
    cond = jnp.arange(6) % 2
    parts = (paths.Linear(), Precond(targets.Clean(), TimeLabel()), *FLAT)
    scale = jnp.where(jnp.arange(6) < 3, *UNLIKE)
    drawn = Drifting(*parts).others(Guided(cond, scale), Guided(cond, scale))
    for rows, each in ((slice(3), UNLIKE[0]), (slice(3, 6), UNLIKE[1])):
        fixed = Drifting(*parts, guidance_scale=each).others(cond, cond)
        for ours, theirs in zip(drawn, fixed, strict=True):
            np.testing.assert_allclose(ours[rows], theirs[rows], rtol=1e-6)


@pytest.mark.parametrize("power", [0.0, 1.0, 3.0])
def test_scales_have_the_density_of_a_power(power):
    """The distance of neighbouring quantiles is inverse to the density between them."""
    wrapper = EmbeddedGuidance(FLAT, 1.0, 4.0, power)  # pyright: ignore[reportArgumentType]
    w = np.asarray(wrapper.scales(jnp.linspace(0.0, 1.0, 65)))
    np.testing.assert_allclose(w[[0, -1]], (1.0, 4.0), rtol=1e-6)
    mass = np.diff(w) * (0.5 * (w[1:] + w[:-1])) ** -power
    np.testing.assert_allclose(mass, mass.mean(), rtol=0.01)


@pytest.fixture(scope="module")
def model():
    config = digits.get_config("objective=guidance,model=dit")
    config.model.update(hidden_size=16, depth=1)
    wired = wire(config, (8, 8, 1), Classes(10))
    params = jax.tree.map(lambda x: x + 0.1, jax.jit(wired.init)(jax.random.key(0)))
    mesh = make_mesh(data=1, devices=jax.devices()[:1])
    return Model(Programs(wired, mesh), params)


def test_samples_are_of_the_network_at_the_scale_of_the_recipe_once(model):
    """In one step: what the network returns with the scale as its last label, not guided again."""
    wired, request = model.wired, Request(np.array([3, 1]), seed=4)
    t = np.float32(wired.path.t_noise)
    x = request.noise((8, 8, 1)) * float(wired.path.sigma(jnp.asarray(t)))
    label = float(wired.precond.noise_label(paths.coeffs(wired.path, jnp.full(1, t), 1))[0])
    a, s = np.cos(0.5 * np.pi * t), np.sin(0.5 * np.pi * t)
    network = once()(wired.apply)
    for scale in (1.0, *UNLIKE):
        recipe = replace(wired.recipe, num_steps=1, guidance_scale=scale)
        assert (recipe.calls, recipe.nfe) == (1, 1)
        assert repr(recipe.against) == "Embedded()"  # as evaluations and files of samples have it
        labels = jnp.tile(jnp.array([[label, scale]]), (2, 1))
        v = network(model.params, x, labels, jnp.array([3, 1]))
        np.testing.assert_allclose(model.sample(recipe, request), a * x - s * v, atol=1e-4)
    again = np.asarray(network(model.params, x, labels.at[:, 1].set(UNLIKE[0]), jnp.array([3, 1])))
    assert np.abs(again - v).max() > 1e-2


@pytest.mark.parametrize(
    ("objective", "against", "message"),
    [
        ("flow", "Embedded", "no network that has the scale of guidance as an input: train with"),
        ("lcm", "NullCondition", "the end of the flow: use against=embedded"),
    ],
)
def test_what_the_network_has_not_is_refused(objective, against, message):
    config = digits.get_config(f"objective={objective},model=dit")
    config.model.update(hidden_size=16, depth=1)
    wired = wire(config, (8, 8, 1), Classes(10))
    recipe = replace(wired.recipe, guidance_scale=4.0, against=getattr(guidance, against)())
    with pytest.raises(UserError, match=message):
        check_recipe(recipe, wired)
