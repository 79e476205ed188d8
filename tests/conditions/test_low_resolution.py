"""Small images with noise of a level that the network sees, against closed forms of Gaussians."""

from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from diffjax.codecs import Identity
from diffjax.conditions import Augmented, Classes, LowResolution, Several
from diffjax.data import digits, downscaled, upscaling
from diffjax.errors import UserError
from diffjax.models.layers.context import parts_of
from diffjax.process.paths import Cosine
from diffjax.runs.samples.cascade import Cascade, Stage, enlarging
from diffjax.runs.samples.condition_files import read
from diffjax.spec import as_spec, build

SMALL = LowResolution((1, 1, 1), path=Cosine(), most_level=0.8)
BOTH = Several({"digit": Classes(10), "small": SMALL}, kept=("small",))
MANY = 20_000


def shrunk(level):
    """a and σ of the augmentation, in NumPy."""
    return np.cos(np.pi / 2 * level), np.sin(np.pi / 2 * level)


def gaussian_images(n):
    """2x2 pixels: the mean m ~ N(0, 1), and differences d that sum to 0, of variance 0.3."""
    rng = np.random.default_rng(0)
    d = np.sqrt(0.3) * rng.normal(size=(n, 4))
    m = rng.normal(size=(n, 1))
    return (m + d - d.mean(1, keepdims=True)).reshape(n, 2, 2, 1).astype("f")


def test_training_shows_the_mean_of_squares_at_levels_that_the_network_is_told_of():
    """The posterior mean by image and level has the error of the closed form; by another level a
    larger one.
    """
    x0, a, s = gaussian_images(MANY), 0.6, 0.8
    batch = {"image": x0, "label": np.arange(MANY) % 10}
    cond = jax.jit(lambda key, x: BOTH.as_trained(key, x, 0.5))(
        jax.random.key(1), BOTH.of_batch(batch)
    )
    assert 0.45 < np.mean(cond["digit"] == 10) < 0.55  # the class is dropped, the image never
    z, level = (np.asarray(images).ravel() for images in parts_of(cond).images)
    assert (level.min(), level.max()) == pytest.approx((0, 0.8), abs=0.01)
    np.testing.assert_array_equal(level, cond["small"].level)

    x = a * x0 + s * np.random.default_rng(3).normal(size=x0.shape)
    x, x0 = x.reshape(-1, 4), x0.reshape(-1, 4)
    middle = x.mean(1)

    def error(level):
        of_z, sigma = shrunk(level)
        precision = 1 + 4 * a**2 / s**2 + of_z**2 / sigma**2
        m = (4 * a / s**2 * middle + of_z / sigma**2 * z) / precision
        d = 0.3 * a / (0.3 * a**2 + s**2) * (x - middle[:, None])
        variances = 1 / precision + 3 / 4 * 0.3 * s**2 / (0.3 * a**2 + s**2)
        return np.mean((m[:, None] + d - x0) ** 2), np.mean(variances)

    found, expected = error(np.maximum(level, 1e-3))
    assert found == pytest.approx(expected, rel=0.03)
    assert error(np.full(MANY, 0.4))[0] > 1.1 * expected


def test_a_level_has_the_mean_and_variance_of_the_path_and_none_is_the_clean_image():
    clean = SMALL.of(np.full((MANY, 1, 1, 1), 0.5, "f"))
    np.testing.assert_array_equal(clean.level, 0)
    keys = jax.random.split(jax.random.key(0), MANY)
    found = jax.jit(lambda level: SMALL.at_level(keys, clean, level))
    noised, a_sigma = found(0.3), shrunk(0.3)
    assert np.mean(noised.images) == pytest.approx(0.5 * a_sigma[0], abs=0.02)
    assert np.std(noised.images) == pytest.approx(a_sigma[1], rel=0.02)
    np.testing.assert_allclose(noised.level, 0.3)
    np.testing.assert_array_equal(found(0.0).images, clean.images)


def stage(kind: Any, shape: tuple[int, int, int], level: float = 0.0, name: str = "up") -> Stage:
    wired = SimpleNamespace(condition=kind, image_shape=shape)
    model: Any = SimpleNamespace(wired=wired, codec=Identity())
    recipe: Any = None
    return Stage(model, recipe, level, name)


def test_an_exact_model_of_small_images_keeps_the_variance_and_mends_a_wrong_base():
    """m ~ N(0, v), and the second model samples m given z_s exactly. Of a base of variance w,

        Var m = g²·(w + σ²/a²) + v·(1 − g),    g = a²v/(a²v + σ²),

    which is v for w = v, and else nearer to v the higher the level.
    """
    rng = np.random.default_rng(1)
    eps, posterior = rng.normal(size=(2, MANY, 1, 1, 1))
    for deviation in (1.0, 0.5):
        for level in (0.0, 0.3, 0.6):
            base = 0.2 * deviation * eps
            request = enlarging(stage(BOTH, (2, 2, 1), level), base, {"digit": np.zeros(MANY)})
            seen: Augmented = request.condition["small"]
            a, sigma = shrunk(level)
            scale = 0.2**2  # v: samples lie in [-1, 1]
            precision = 1 / scale + (a / sigma) ** 2 if level else np.inf
            mean = seen.images if not level else (a / sigma**2 * seen.images) / precision
            m = mean + posterior / np.sqrt(precision)
            gain = a**2 * scale / (a**2 * scale + sigma**2)
            expected = gain**2 * (deviation**2 * scale + (sigma / a) ** 2) + scale * (1 - gain)
            assert np.var(m) == pytest.approx(expected, rel=0.04)
            if deviation == 1.0:
                assert expected == pytest.approx(scale)


def test_what_does_not_fit_is_refused_and_what_is_missing_is_null():
    base = stage(Classes(10), (1, 1, 1), name="base")
    Cascade([base, stage(BOTH, (2, 2, 1), 0.5)])
    with pytest.raises(UserError, match="up enlarges images of 1x1x1, and those are of 2x2x1"):
        Cascade([stage(Classes(10), (2, 2, 1)), stage(BOTH, (2, 2, 1))])
    with pytest.raises(UserError, match="up enlarges no images: it is conditioned on 10 classes"):
        Cascade([base, stage(Classes(10), (2, 2, 1))])
    with pytest.raises(UserError, match=r"level=0.9: this network was trained .* from 0 to 0.8"):
        Cascade([base, stage(BOTH, (2, 2, 1), 0.9)])
    with pytest.raises(UserError, match=r"level=0.1: no noise is added to 10 classes"):
        Classes(10).check_level(0.1)
    needed = Several({"size": Classes(3), "small": SMALL}, kept=("size", "small"))
    with pytest.raises(UserError, match=r"conditioned on size .* and the base model is not"):
        Cascade([base, stage(needed, (2, 2, 1))])


def test_a_condition_is_recorded_written_and_read(tmp_path):
    assert build(as_spec(SMALL), LowResolution) == SMALL
    Image.fromarray(np.full((1, 1), 255, np.uint8)).save(tmp_path / "a.png")
    cond = read(BOTH, [f"digit=3;small={tmp_path / 'a.png'}"])
    np.testing.assert_array_equal(cond["small"].images, 1)
    np.savez(tmp_path / "some.npz", **BOTH.arrays(cond))
    again = read(BOTH, [f"@{tmp_path / 'some.npz'}"])
    assert jax.tree.structure(again) == jax.tree.structure(cond)
    jax.tree.map(np.testing.assert_array_equal, again, cond)
    with pytest.raises(UserError, match=r"the part 'small' of the condition .* is missing"):
        BOTH.of({"digit": [3]})


def test_small_images_of_a_data_set_are_its_means():
    small, large = downscaled(digits()), upscaling(digits(), most_level=0.5)
    assert (small.image_shape, large.image_shape) == ((4, 4, 1), (8, 8, 1))
    batch: Any = large.test.gather([3, 5])
    images = {"image": batch["image"] / np.float32(127.5) - 1, "label": batch["label"]}
    cond: Any = large.condition.of_batch(images)
    expected = small.test.gather([3, 5])["image"] / 127.5 - 1
    np.testing.assert_allclose(cond["small"].images, expected, atol=0.5 / 127.5 + 1e-6)
    assert small.train.fingerprint() != digits().train.fingerprint()
    with pytest.raises(UserError, match="factor=3 does not divide images of 8x8"):
        upscaling(digits(), 3)
    with pytest.raises(UserError, match="most_level=2 is beyond t_noise"):
        upscaling(digits(), most_level=2.0)
    with pytest.raises(UserError, match="has small images in its condition already"):
        upscaling(large)


def test_a_smaller_image_of_a_condition_is_enlarged_linearly():
    """Half-way values between neighbours, and the edge's own beyond."""
    from diffjax.models.layers.context import Enlarged

    found = jax.jit(Enlarged((1, 2)).apply)({}, jnp.array([0.0, 4.0]).reshape(1, 1, 2, 1))
    np.testing.assert_allclose(found.ravel(), [0, 1, 3, 4])
