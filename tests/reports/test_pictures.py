"""Pictures of samples: of any number of channels, nearly square, with classes over the columns."""

import numpy as np
import pytest
from PIL import Image

from configs import digits
from diffjax.errors import UserError
from diffjax.reports import pictures
from diffjax.runs.checks import check_config


def read(path) -> np.ndarray:
    return np.asarray(Image.open(path)).astype(int)


def columns_with_ink(band: np.ndarray) -> np.ndarray:
    """Whether anything dark is in a column of pixels, `[W]`."""
    return np.asarray(band.reshape(*band.shape[:2], -1).min(axis=(0, 2)) < 128)


def test_two_channels_are_shown_side_by_side_in_grey():
    """Each channel at its own place: the first on the left, magnified as one channel would be."""
    fields = np.zeros((2, 24, 16, 2), np.uint8)
    fields[0, ..., 0], fields[0, ..., 1], fields[1, ..., 0], fields[1, ..., 1] = 10, 20, 30, 40
    grid = pictures.image_grid(fields, columns=1)
    assert grid.shape == (2 * 48 + 2, 2 * 32, 1)
    expected = {(0, 0): 10, (0, 1): 20, (1, 0): 30, (1, 1): 40}
    for (row, channel), value in expected.items():
        part = grid[row * 50 : row * 50 + 48, channel * 32 : channel * 32 + 32]
        assert (part == value).all()


@pytest.mark.parametrize("channels", [1, 2, 3, 4, 5, 16, 32])
def test_any_number_of_channels_gives_a_picture(tmp_path, channels):
    images = np.random.default_rng(0).uniform(-1, 1, (3, 8, 8, channels))
    path = pictures.save_png(tmp_path / "a.png", images)
    width = 48 * (2 if channels == 2 else 1)
    assert read(path).shape[:2] == (2 * 50 - 2, 2 * (width + 2) - 2)


@pytest.mark.parametrize("shape", [(8, 8, 1), (0, 8, 8, 1), (4, 8, 8, 0)])
def test_what_is_no_picture_is_refused(shape):
    with pytest.raises(UserError, match="at least one image of shape"):
        pictures.image_grid(np.zeros(shape), columns=2)


@pytest.mark.parametrize("num_images", [36, 64])
@pytest.mark.parametrize("num_classes", [0, *range(1, 21), 100, 1000])
def test_pictures_of_samples_are_nearly_square(num_images, num_classes):
    """The rule: nearly square, 36 to 64 of them, each column of one class."""
    fitting = min(num_classes, pictures.most_classes(num_images))
    columns = pictures.columns_by_class(num_images, fitting)
    rows = num_images // columns
    assert 0.85 * num_images <= rows * columns <= num_images
    assert max(rows / columns, columns / rows) <= 2
    if fitting:
        assert columns % fitting == 0
        assert fitting == num_classes or fitting >= np.sqrt(num_images)


def test_three_classes_are_no_tower():
    """Of 3 classes 100 samples once were 3 columns and 34 rows."""
    columns = pictures.columns_by_class(64, 3)
    assert (columns, 64 // columns) == (9, 7)


def test_columns_are_named_where_each_is_of_one_class():
    names = ("ant", "bee", "cat", "dog")
    titles = names * 5
    assert pictures.captions(titles, 4) == names
    assert pictures.captions(titles, 8) == names * 2
    assert pictures.captions(titles, 5) == tuple(titles)
    assert pictures.captions(titles, 6) == tuple(titles)
    assert pictures.captions(["cat"] * 20, 3) == ("cat",) * 3
    assert pictures.captions(None, 3) == ()
    assert pictures.captions(titles[:3], 4) == tuple(titles[:3])  # of test images there may be few


@pytest.mark.parametrize("channels", [1, 2, 3])
def test_names_stand_above_their_columns_and_change_no_pixel_below(tmp_path, channels):
    images = np.random.default_rng(0).uniform(-1, 1, (6, 8, 8, channels))
    plain = read(pictures.save_png(tmp_path / "a.png", images, 3))
    named = read(pictures.save_png(tmp_path / "b.png", images, 3, ["a", "", "a name far too long"]))
    np.testing.assert_array_equal(named[16:], plain)
    pitch = (plain.shape[1] + 2) // 3
    ink = columns_with_ink(named[:16])
    assert ink[:pitch].any()
    assert not ink[pitch : 2 * pitch].any()
    assert ink[2 * pitch :].any()
    where = np.flatnonzero(ink[:pitch])
    assert abs(where.mean() - (pitch - 2) / 2) < 3  # in the middle


def test_names_of_images_stand_above_each_row_and_others_beside_their_own(tmp_path):
    images = np.random.default_rng(0).uniform(-1, 1, (5, 8, 8, 1))
    plain = read(pictures.save_png(tmp_path / "a.png", images, 3))
    named = read(pictures.save_png(tmp_path / "b.png", images, 3, ["a", "", "b", "", "c"]))
    pitch = (len(plain) + 2) // 2
    np.testing.assert_array_equal(named[16 : 16 + pitch], plain[:pitch])
    np.testing.assert_array_equal(named[32 + pitch :], plain[pitch:])
    for band, written in ((named[:16], (0, 2)), (named[16 + pitch : 32 + pitch], (1,))):
        ink = columns_with_ink(band)
        for column in range(3):
            assert ink[column * pitch : (column + 1) * pitch].any() == (column in written)
    both = read(pictures.save_png(tmp_path / "c.png", images, 3, (), -images))
    np.testing.assert_array_equal(both[:, 50:98], plain[:, :48])
    np.testing.assert_array_equal(
        both[:98, :48], read(pictures.save_png(tmp_path / "d.png", -images, 3))[:98, :48]
    )


def test_names_too_long_stay_in_their_columns(tmp_path):
    images = np.zeros((3, 8, 8, 1))
    path = pictures.save_png(tmp_path / "a.png", images, 3, ["", "a name far too long", ""])
    ink = columns_with_ink(read(path)[:16])
    assert not ink[:50].any()
    assert ink[50:98].any()
    assert not ink[98:].any()


def test_the_number_of_pictures_is_a_setting_that_is_checked_at_the_start():
    config = digits.get_config()
    assert config.sample_images == 64
    config.sample_images = 0
    with pytest.raises(UserError, match=r"config\.sample_images=0 must be at least 1"):
        check_config(config)


def test_a_small_grey_picture_is_shown_beside_its_image_at_its_size(tmp_path):
    small = np.array([[0, 90], [160, 250]], np.uint8).reshape(1, 2, 2, 1)
    image = np.random.default_rng(0).integers(0, 256, (1, 64, 48, 3), np.uint8)
    seen = read(pictures.save_png(tmp_path / "a.png", image, columns=1, beside=small))
    assert seen.shape == (64, 2 * 48 + 2, 3)
    assert np.array_equal(seen[:, 50:], image[0])
    large = small[0].repeat(32, axis=0).repeat(24, axis=1)
    assert np.array_equal(seen[:, :48], large.repeat(3, axis=-1))
