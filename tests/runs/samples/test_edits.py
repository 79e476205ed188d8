"""What is edited, and where: borders, masks, and what is refused before anything is drawn."""

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from diffjax.errors import UserError
from diffjax.runs.samples import edits


def model_of(height: int, width: int, square: int = 1) -> Any:
    """Of images, or of latents each of which is a square of pixels."""
    codec = SimpleNamespace(image_shape=lambda shape: (height, width, 1), bounded=True)
    wired = SimpleNamespace(image_shape=(height // square, width // square, 1))
    return SimpleNamespace(codec=codec, wired=wired)


def test_outpainting_adds_a_border_of_the_edge_which_is_made_anew():
    image = np.arange(6, dtype=np.float32).reshape(1, 2, 3, 1) / 10
    pixels, anew = edits.pixels_of(model_of(6, 6), image, "outpaint")
    np.testing.assert_array_equal(pixels[0, 2:4, 1:4], image[0])  # 2 rows above, 1 column before
    np.testing.assert_array_equal(pixels[0, :2, 1:4, 0], [image[0, 0, :, 0]] * 2)
    assert anew is not None
    np.testing.assert_array_equal(np.argwhere(anew[0, ..., 0] == 0)[[0, -1]], [[2, 1], [3, 3]])
    # Whole squares of pixels, one for a latent: before are 2 rows of the 3.
    _, anew = edits.pixels_of(model_of(8, 8, square=2), np.zeros((1, 2, 4, 1), "f"), "outpaint")
    assert anew is not None
    np.testing.assert_array_equal(np.argwhere(anew[0, ..., 0] == 0)[[0, -1]], [[2, 2], [3, 5]])


@pytest.mark.parametrize("shape", [(6, 4), (6, 4, 1), (1, 6, 4, 1)])
def test_a_mask_of_any_form_is_the_same(shape):
    mask = np.zeros((6, 4), np.uint8)
    mask[1, 2] = 255
    found = edits.anew_of(mask.reshape(shape), "inpaint", (6, 4, 3))
    np.testing.assert_array_equal(found, (mask > 0).astype("f").reshape(1, 6, 4, 1))


def test_without_a_mask_it_is_the_lower_half_or_the_border():
    lower = edits.anew_of(None, "inpaint", (4, 4, 1))
    border = edits.anew_of(None, "outpaint", (8, 8, 1))
    assert lower is not None
    assert border is not None
    np.testing.assert_array_equal(lower[0, :, 0, 0], [0, 0, 1, 1])
    np.testing.assert_array_equal(np.argwhere(border[0, ..., 0] == 0)[[0, -1]], [[2, 2], [5, 5]])
    assert edits.anew_of(None, "vary", (4, 4, 1)) is None


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            lambda: edits.pixels_of(model_of(4, 4), np.zeros((1, 5, 4, 1), "f"), "outpaint"),
            "the image has 5x4 pixels: outpainting makes a border",
        ),
        (lambda: edits.How("upscale", factor=1), "factor"),
    ],
)
def test_what_can_not_be_is_refused(make, message):
    with pytest.raises(UserError, match=message):
        make()


def test_of_a_test_image_the_upper_half_stays_and_the_lower_one_is_made_anew(loaded_run):
    made = loaded_run.edit(
        task="inpaint", method="replace", solver="ddim", num_steps=2, num_images=1
    )
    assert made.images.shape == made.original.shape == (1, 8, 8, 1)
    np.testing.assert_allclose(made.images[:, :4], made.original[:, :4], atol=1e-6)
    assert np.abs(made.images[:, 4:] - made.original[:, 4:]).max() > 0.01
    np.testing.assert_array_equal(made.observed[:, 4:], 0)
    error = np.sqrt(np.mean((made.images - made.original) ** 2))
    assert made.difference == pytest.approx(error)
