"""Distillation of a coupling: the map of an exact teacher, and distances of images."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs import digits_instaflow
from diffjax.compiling import once
from diffjax.conditions import Classes
from diffjax.errors import UserError
from diffjax.models.lpips.network import LPIPS
from diffjax.objectives import couplings
from diffjax.objectives.base import Progress
from diffjax.objectives.distances import MeanSquare, Perceptual, PseudoHuber
from diffjax.objectives.distillation.coupled_ends import CoupledEnds
from diffjax.oracle.analytic import GaussianMixture, gaussian_flow
from diffjax.process import paths, targets, times, weights
from diffjax.process.precond import Precond, TimeLabel
from diffjax.wiring import check_recipe, wire

GAUSSIAN = GaussianMixture(jnp.ones(1), jnp.array([[0.8]]), jnp.array([[[0.09]]]))
KEY = jax.random.key(0)


def of(path, **parts):
    precond = Precond(targets.Velocity(), TimeLabel(1.0))
    coupling = couplings.Given()
    parts = {"coupling": coupling, **parts}
    return CoupledEnds(path, precond, weights.Constant(), times.Uniform(), **parts)


def affine(params, x, noise_label, cond, *, key=None):
    """A velocity `w·x + b`, which is exact for a Gaussian at one time."""
    return params["w"] * x + params["b"]


@once()
def pairs_and_slopes(objective, params):
    """Losses, and the gradient and the Hessian of their mean, on pairs of the exact flow."""
    path = objective.path
    noise = jax.random.normal(KEY, (64, 1))
    mean, covariance = GAUSSIAN.means[0], GAUSSIAN.covariances[0]
    ends = gaussian_flow(
        mean, covariance, path, path.sigma(path.t_noise) * noise, path.t_noise, 0.0
    )
    batch = {"image": ends, "source": noise, "cond": jnp.zeros(64, jnp.int32)}

    def loss(params):
        return objective(affine, params, None, KEY, batch, Progress(jnp.zeros(())))[0]

    def mean_loss(flat):
        return jnp.mean(loss({"w": flat[0], "b": flat[1]}))

    flat = jnp.stack([params["w"], params["b"]])
    slope, curve = jax.grad(mean_loss)(flat), jax.hessian(mean_loss)(flat)
    return loss(params), slope, curve, noise, ends


@pytest.mark.parametrize("path", [paths.Linear(), paths.Cosine()], ids=["linear", "cosine"])
def test_one_step_of_an_exact_teacher_is_its_map(path):
    """The mean square is quadratic in an affine network, so one Newton step ends at the minimum."""
    objective = of(path)
    start = {"w": jnp.float32(0.2), "b": jnp.float32(-0.1)}
    loss, slope, curve, noise, ends = pairs_and_slopes(objective, start)
    assert np.mean(loss) > 0.01
    w, b = np.asarray([0.2, -0.1]) - np.linalg.solve(np.float64(curve), np.float64(slope))
    found = {"w": jnp.float32(w), "b": jnp.float32(b)}
    loss, slope, *_ = pairs_and_slopes(objective, found)
    assert np.max(loss) < 1e-9
    assert np.abs(slope).max() < 1e-4
    if isinstance(path, paths.Linear):
        # Of the straight path in one dimension: from eps to 0.8 + 0.3·eps.
        np.testing.assert_allclose([w, b], [0.7, -0.8], atol=1e-4)
        np.testing.assert_allclose(ends, 0.8 + 0.3 * np.asarray(noise), atol=1e-5)


def test_it_is_reflow_at_the_one_time():
    """On the straight path the error of the end is that of the velocity at t = 1."""
    params = {"w": jnp.float32(0.2), "b": jnp.float32(-0.1)}
    loss, *_, noise, ends = pairs_and_slopes(of(paths.Linear()), params)
    velocity = np.asarray(noise - ends)
    np.testing.assert_allclose(loss, np.square(0.2 * noise - 0.1 - velocity)[:, 0], rtol=1e-4)


def test_the_named_one_has_a_config_of_pairs():
    config = digits_instaflow.get_config()
    config.model.update(hidden_size=16, depth=1)
    wired = wire(config, (8, 8, 1), Classes(10))
    traits = wired.objective.traits
    assert (traits.needs_source, traits.starts_at_source, traits.distils) == (True, False, False)
    assert wired.recipe.nfe == 1
    check_recipe(wired.recipe, wired)


def test_the_perceptual_distance_of_grey_and_small_images():
    """By LPIPS of images in colour, and of larger ones of one colour, which are not blurred."""
    network = LPIPS(width=1)
    x, y = jax.random.uniform(KEY, (2, 2, 16, 16, 1), minval=-1.0)

    @jax.jit
    def found_and_expected(x, y):
        large = [jnp.broadcast_to(image[:, :1, :1], (2, 32, 32, 3)) for image in (x, y)]
        same = [jnp.broadcast_to(image, (2, 16, 16, 3)) for image in (x, y)]
        params = network.init(KEY, *same)["params"]
        even = [jnp.broadcast_to(image[:, :1, :1], image.shape) for image in (x, y)]
        found = [
            Perceptual(side=side).between(network, params, *images)
            for side, images in ((0, (x, y)), (32, even))
        ]
        return found, [network.apply({"params": params}, *pair) for pair in (same, large)]

    for found, expected in zip(*found_and_expected(x, y), strict=True):
        np.testing.assert_allclose(found, expected, rtol=1e-5)
        assert np.min(found) > 0.0


def test_distances_by_hand_and_what_the_perceptual_one_needs():
    x, y = jnp.array([[3.0, 0.0], [1.0, 1.0]]), jnp.array([[0.0, 4.0], [1.0, 1.0]])
    np.testing.assert_allclose(MeanSquare()(x, y), [12.5, 0.0])
    c = 0.1 * np.sqrt(2.0)
    np.testing.assert_allclose(PseudoHuber(0.1)(x, y), [np.hypot(5.0, c) - c, 0.0], rtol=1e-5)
    with pytest.raises(UserError, match="the perceptual distance needs weights: set its path"):
        Perceptual()(x, y)
    small = jnp.zeros((1, 8, 8, 1))
    with pytest.raises(UserError, match="images of 16x16 pixels, not 8x8: set its side"):
        Perceptual("vgg.pth").between(LPIPS(), {}, small, small)
