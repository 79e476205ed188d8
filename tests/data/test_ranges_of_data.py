"""Numbers of data sets have ranges, as those of all other parts."""

import pytest

from diffjax.data import (
    Coarse,
    colours,
    digits,
    image_folder,
    latents,
    mnist,
    tfds_images,
)
from diffjax.errors import UserError
from diffjax.host.files import place_of
from diffjax.spec import build, spec


@pytest.mark.parametrize(
    ("part", "name", "value", "said"),
    [
        (digits, "test_fraction", 1.0, "must be at least 0 and below 1"),
        (digits, "test_fraction", -0.1, "must be at least 0 and below 1"),
        (digits, "split_seed", -1, "must be at least 0"),
        (digits, "split_seed", 2**64, "must be at least 0 and below 1.84"),
        (digits, "split_seed", 0.5, "must be a whole number"),
        (image_folder, "image_size", 0, "must be at least 1"),
        (image_folder, "channels", 4, "must be at least 1 and at most 3"),
        (image_folder, "max_damaged", -1, "must be at least 0"),
        (image_folder, "test_fraction", 2.0, "must be at least 0 and below 1"),
        (latents, "num_classes", -1, "must be at least 0"),
        (latents, "scale", 0.0, "must be above 0"),
        (latents, "scale", -0.2, "must be above 0"),
        (latents, "test_fraction", 1.0, "must be at least 0 and below 1"),
        (latents, "split_seed", -3, "must be at least 0"),
        (tfds_images, "image_size", -1, "must be at least 0"),
        (tfds_images, "max_damaged", -1, "must be at least 0"),
        (Coarse, "factor", 0, "must be at least 1"),
        (colours, "blur", 0.3, "must be at least 0 and at most 0.25"),
        (colours, "along", 2, "must be at least 0 and at most 1"),
        (colours, "num_images", 7, "must be at least 8"),
        (colours, "num_images", 10**12, "must be at least 8 and at most 10000000"),
        (colours, "seed", -1, "must be at least 0"),
    ],
)
def test_a_number_out_of_range_is_refused_by_name(part, name, value, said):
    with pytest.raises(UserError, match=rf"{part.__name__}\.{name}={value} {said}"):
        build(spec(part, **{name: value}))


def test_what_is_at_the_ends_is_taken():
    assert len(build(spec(digits, test_fraction=0.0, split_seed=2**64 - 1)).test) == 0
    assert len(build(spec(colours, blur=0.25, along=1, num_images=8)).train) == 8


def test_python_is_refused_too():
    with pytest.raises(UserError, match="split_seed=-1 is not between 0 and"):
        digits(split_seed=-1)


@pytest.mark.parametrize("path", ["~nobody-of-that-name", "1" * 400])
def test_a_path_that_none_can_have(path):
    with pytest.raises(UserError, match="no path"):
        place_of(path)
    for part in (image_folder, latents, mnist, tfds_images):
        with pytest.raises(UserError, match="no path"):
            build(spec(part, path=path))
