"""Editing: exact posteriors of Gaussian data, round trips, and the command."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats

from diffjax.errors import UserError
from diffjax.oracle import analytic
from diffjax.process.paths import Cosine, Linear
from diffjax.sampling import editing, runge_kutta, solvers
from diffjax.sampling.grids import Power
from diffjax.sampling.restart import resampled
from diffjax.sampling.sample import Recipe, draw, sample_padded, starting_noise, with_condition
from experiments import edit, train
from experiments.flags import cli
from tests.support.normals import Normals

STANDARD = Normals(np.zeros(2), np.ones(2))
MASK = jnp.array([1.0, 0.0])


def standard(path):
    """The best denoiser of standard normal data, as a model."""
    return lambda x, t, cond: STANDARD.pair(path, x, t[:, None])


def drawn(predict, path, solver, n=8_000, num_steps=60):
    keys = jax.random.split(jax.random.key(0), n)
    times = Recipe(solver, Power(), num_steps).times(path)
    denoise = with_condition(predict, None)
    walk = jax.jit(lambda keys: draw(denoise, solver, path, times, keys, (2,)))
    return np.asarray(walk(keys), np.float64)


def test_pseudoinverse_guidance_draws_from_the_posterior():
    """Standard normal data, of which the first number is seen with noise: Bayes' rule."""
    path, keys = Cosine(), jax.random.split(jax.random.key(0), 8_000)

    @jax.jit
    def walk(std, times):
        seen = editing.Observed(lambda x: MASK[None] * x, jnp.array([1.2, 0.0]), std=std)
        predict = editing.pseudoinverse_guidance(standard(path), path, seen)
        return draw(with_condition(predict, None), solvers.heun(), path, times, keys, (2,))

    for std in (0.0, 0.5):
        samples = np.asarray(walk(std, Power()(path, 60)), np.float64)
        variance, says = std**2 / (1.0 + std**2), str(std)
        mean = [1.2 / (1.0 + std**2), 0.0]
        np.testing.assert_allclose(samples.mean(0), mean, atol=0.03, err_msg=says)
        np.testing.assert_allclose(samples.var(0), [variance, 1.0], atol=0.03, err_msg=says)


def test_a_mean_of_pixels_has_the_gain_that_is_said():
    """With `A` the mean of both, the posterior's sum is known and its difference is free."""
    path, y = Linear(), 0.8

    def mean(x):
        return jnp.mean(x, axis=1, keepdims=True)

    seen = editing.Observed(mean, jnp.full((1, 1), y), gain=0.5)
    samples = drawn(
        editing.pseudoinverse_guidance(standard(path), path, seen), path, solvers.heun()
    )
    np.testing.assert_allclose(samples.mean(1), y, atol=0.02)
    assert np.var(samples[:, 0] - samples[:, 1]) == pytest.approx(2.0, rel=0.05)


def test_posterior_sampling_comes_nearer_to_what_was_seen():
    path = Linear()
    seen = editing.Observed(lambda x: MASK[None] * x, jnp.array([1.2, 0.0]))
    predict = editing.posterior_sampling(standard(path), path, seen)
    near = drawn(predict, path, solvers.ddim(), n=2_000)
    # Without it the first number is standard normal: E|z - c| = 2·φ(c) + c·(2·Φ(c) - 1).
    normal = scipy.stats.norm
    plain = 2.0 * normal.pdf(1.2) + 1.2 * (2.0 * normal.cdf(1.2) - 1.0)
    assert np.abs(near[:, 0] - 1.2).mean() < 0.2 * plain
    assert near[:, 1].var() == pytest.approx(1.0, rel=0.15)


def test_the_known_part_stays_and_the_rest_follows_it():
    """Of two numbers that are almost equal one is known; without it the other has mean 0.

    Replacement is no draw from the posterior, whose mean is 1.49: it lags behind.
    """
    path, n = Cosine(), 600
    twins = analytic.Gaussian(np.zeros(2, "f"), np.float32([[1.0, 0.995], [0.995, 1.0]]))
    image = np.tile(np.float32([1.5, 9.9]), (n, 1))
    kept = editing.keep_known(solvers.ddpm(), image, MASK)
    again = resampled(kept, 10, 5)
    once = Power()(path, 120)
    often = again.route(path, once)

    @jax.jit
    def walk(times):
        """Where no time rises, that is `kept` itself."""
        noise, keys = starting_noise(jax.random.split(jax.random.key(0), n), (2,))
        denoise, x = with_condition(twins.predict(path), None), path.sigma(times[0]) * noise
        return sample_padded(denoise, again, path, times, keys, x)

    ends = [
        np.asarray(walk(np.pad(t, (0, len(often) - len(t)))), np.float64) for t in (once, often)
    ]
    made, more = (end[:, 1].mean() for end in ends)
    assert 1.2 < made < 1.4
    # Resampling harmonises the two: the mean of their differences is nearer to the posterior's.
    assert abs(more - 0.995 * 1.5) < 0.5 * abs(made - 0.995 * 1.5)


def test_a_blur_goes_round_and_its_gain_is_that_of_the_operator():
    """By the dense matrix, column by column; a Gaussian's weights fall with the distance."""

    @jax.jit
    def blurred(images):
        seen = editing.blurred(images, width=0.7)
        return seen.y, seen.gain

    y, gain = jax.device_get(blurred(np.eye(24, dtype="f").reshape(24, 4, 6, 1)))
    matrix = y.reshape(24, 24)
    np.testing.assert_allclose(matrix.sum(1), 1.0, rtol=1e-5)
    np.testing.assert_allclose(matrix, matrix.T, atol=1e-6)
    first = matrix[0].reshape(4, 6)
    assert first[0, 0] > first[0, 1] > first[0, 2]
    assert first[0, 1] == pytest.approx(first[0, 5])
    assert first[1, 0] == pytest.approx(first[3, 0])
    gains = np.sort(np.linalg.eigvalsh(matrix @ matrix.T))
    np.testing.assert_allclose(np.sort(np.ravel(gain)), gains, atol=1e-6)


@pytest.mark.thorough
def test_deblurring_draws_from_the_posterior():
    """Standard normal images: the posterior's mean is the Wiener filter of what was seen."""
    path, noisy = Linear(), 0.3
    images = jax.random.normal(jax.random.key(3), (1, 4, 4, 1))
    seen = editing.blurred(images, width=0.8, std=noisy)
    blur = np.asarray(editing.blurred(jnp.eye(16).reshape(16, 4, 4, 1), 0.8).y).reshape(16, 16)
    pixels = Normals(np.zeros(16), np.ones(16))

    def predict(x, t, cond):
        pair = pixels.pair(path, x.reshape(len(x), 16), t[:, None])
        return jax.tree.map(lambda part: part.reshape(x.shape), pair)

    n, times = 4_000, Power()(path, 40)
    guided = editing.pseudoinverse_guidance(predict, path, seen)
    denoise = with_condition(guided, None)
    walk = jax.jit(lambda k: draw(denoise, solvers.heun(), path, times, k, (4, 4, 1)))
    samples = np.asarray(walk(jax.random.split(jax.random.key(0), n))).reshape(n, 16)
    precision = np.eye(16) + blur.T @ blur / noisy**2
    mean = np.linalg.solve(precision, blur.T @ np.ravel(seen.y) / noisy**2)
    np.testing.assert_allclose(samples.mean(0), mean, atol=0.08)
    np.testing.assert_allclose(samples.var(0), np.diag(np.linalg.inv(precision)), atol=0.08)


def test_inversion_is_the_flow_and_leads_back():
    mean, covariance = np.float32([0.4, -0.2]), np.float32([[0.3, 0.1], [0.1, 0.2]])
    data, path, solver = analytic.Gaussian(mean, covariance), Cosine(), runge_kutta.rk4()
    x0 = np.random.default_rng(0).multivariate_normal(mean, covariance, 8).astype("f")

    @jax.jit
    def inverted(times):
        predict = data.predict(path)
        found = editing.invert(
            lambda x, t: predict(x, jnp.full(len(x), t), None), solver, path, times, x0
        )
        start = path.alpha(path.t_min) * x0
        return *found, data.flow(path, start, path.t_min, path.t_noise)

    noise, again, exact = inverted(Power()(path, 60))
    np.testing.assert_allclose(noise, exact, atol=2e-3)
    np.testing.assert_allclose(again, x0, atol=2e-3)


def test_a_variation_walks_the_last_steps():
    times = Power()(Linear(), 10)
    np.testing.assert_allclose(editing.later_times(times, 0.3), times[-4:])
    np.testing.assert_allclose(editing.later_times(times, 1.0), times)
    with pytest.raises(UserError, match="leaves none; use"):
        editing.later_times(times, 0.01)


def run(script, *arguments):
    return cli.run(script.main, script.FLAGS, usage=script.USAGE, argv=arguments)


@pytest.mark.thorough
def test_the_command_on_a_run(tmp_path, capsys):
    workdir = f"--workdir={tmp_path / 'run'}"
    assert run(
        train, "--config=configs/digits.py", workdir, "--config.num_steps=2",
        "--config.batch_size=16", "--config.model.hidden_size=16", "--config.model.depth=1",
        "--config.evaluation.num_samples=20", "--config.evaluation.solvers=()",
        "--config.evaluation.batch_size=104", "--config.sampling.num_steps=2",
    ) == 0  # fmt: skip
    small = [workdir, "--num_images=2", "--num_steps=3"]
    for task in ("vary", "inpaint", "outpaint", "upscale", "deblur", "invert"):
        assert run(edit, *small, f"--task={task}", "--solver=ddim") == 0
        assert (tmp_path / "run" / "samples" / f"{task}.png").exists()
    again = ["--task=outpaint", "--method=repaint", "--solver=ddpm", "--jump=1", "--times=2"]
    assert run(edit, *small, *again) == 0
    for wrong, message in {
        "--task=colour": "needs a run on colour images",
        "--task=deblur --blur=0": "must be above 0",
        "--task=inpant": "did you mean 'inpaint'",
        "--task=inpaint --method=exact": "no method is called 'exact'",
        "--task=upscale --factor=3": "does not divide images of 8x8",
        "--task=vary --strength=0": "leaves none",
        "--task=invert --solver=unipc": "is not finite: this solver can't integrate these times",
    }.items():
        capsys.readouterr()
        assert run(edit, *small, *wrong.split()) == 2
        assert message in capsys.readouterr().err
