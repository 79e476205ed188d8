"""Arrays with their channels first, as PyTorch has them, are refused where the shape shows it."""

import numpy as np
import pytest

from diffjax.data import ArraySource, PairSource, latents
from diffjax.data.sources import check_channels_last
from diffjax.errors import UserError

# What autoencoders of images make (Stable Diffusion 4 or 16 channels, DC-AE 32 or 128), pictures
# of 1 and 3 channels, fields of 2; as (channels, height, width).
SHAPES = [
    (4, 32, 32), (16, 32, 32), (16, 128, 128), (32, 8, 8), (128, 8, 8), (4, 8, 8), (4, 32, 48),
    (4, 48, 32), (3, 64, 64), (2, 16, 16), (2, 7, 5), (3, 40, 30),
]  # fmt: skip
# A single grey channel first is [N, 1, H, W].
GREY = [(1, 28, 28), (1, 8, 8), (1, 28, 20)]


@pytest.mark.parametrize("channels_first", SHAPES + GREY)
def test_channels_first_are_refused_and_channels_last_are_not(channels_first):
    channels, height, width = channels_first
    with pytest.raises(UserError) as refusal:
        check_channels_last((10, *channels_first), "latents")
    assert f"[10, {channels}, {height}, {width}]" in str(refusal.value)
    assert str(refusal.value).endswith("save their .transpose(0, 2, 3, 1)")
    check_channels_last((10, height, width, channels), "latents")


@pytest.mark.parametrize(
    "shape", [(1, 1, 3), (1, 2, 1), (5, 3, 3), (8, 4, 4), (8, 8, 128), (16, 16, 16)]
)
def test_shapes_that_may_be_either_are_taken_as_they_are_documented(shape):
    check_channels_last((10, *shape), "latents")


def test_the_transpose_that_it_asks_for_is_the_right_one(tmp_path):
    """A latent whose value is its place comes back at that place."""
    first = np.arange(6 * 4 * 8 * 8, dtype=np.float32).reshape(6, 4, 8, 8)
    for suffix, save in ((".npz", np.savez), ("", None)):
        path = tmp_path / f"wrong{suffix}"
        if save:
            save(path, latents=first)
        else:
            path.mkdir()
            np.save(path / "latents.npy", first)
        with pytest.raises(UserError, match=r"transpose\(0, 2, 3, 1\)") as refusal:
            latents(str(path), num_classes=0)
        assert str(path) in str(refusal.value)
    np.savez(tmp_path / "right.npz", latents=first.transpose(0, 2, 3, 1))
    data = latents(str(tmp_path / "right.npz"), num_classes=0, test_fraction=0.5)
    assert data.image_shape == (8, 8, 4)
    for source in (data.train, data.test):
        for i in range(len(source)):
            image = source[i]["image"]
            np.testing.assert_array_equal(image[1, 2] - image[0, 0], 8 + 2)
            np.testing.assert_array_equal(np.diff(image[0, 0]), 64)


def test_images_and_pairs_are_held_to_the_same():
    labels = np.zeros(5, np.int32)
    images = np.zeros((5, 3, 16, 16), np.uint8)
    with pytest.raises(UserError, match=r"images of shape \[5, 3, 16, 16\]"):
        ArraySource(images, labels)
    with pytest.raises(UserError, match=r"images of pairs of shape \[5, 3, 16, 16\]"):
        PairSource(images, images, labels)
