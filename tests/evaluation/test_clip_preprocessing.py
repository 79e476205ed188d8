"""What a folder of CLIP says of its images: sizes, numbers, and what is not known here."""

import json

import numpy as np
import pytest

from diffjax.errors import UserError
from diffjax.evaluation.extractors.clip import MEAN, STD, _preprocessing, _sha256_of, clip_folder
from diffjax.pretrained.downloads import sha256_of_file


def written(folder, **entries):
    (folder / "preprocessor_config.json").write_text(json.dumps(entries))
    return folder


def test_without_a_file_images_are_those_of_openais_clip(tmp_path):
    how = _preprocessing(tmp_path, 8)
    assert (how.shortest, how.side, how.mean, how.std) == (8, 8, MEAN, STD)


@pytest.mark.parametrize("size", [12, {"shortest_edge": 12}])
def test_the_shortest_side_is_resized_and_the_middle_is_cut(tmp_path, size):
    given = {"size": size, "crop_size": {"height": 8, "width": 8}, "image_mean": [0.5, 0.4, 0.3]}
    how = _preprocessing(written(tmp_path, **given), 8)
    assert how.mean == (0.5, 0.4, 0.3)
    assert how.describe().startswith("shortest side to 12, Pillow bicubic")
    # Of images whose shortest side has 12 already nothing is resized: the middle of 12 x 20.
    images = np.random.default_rng(0).uniform(-1, 1, (2, 12, 20, 3))
    expected = np.clip(np.floor((images[:, 2:10, 6:14] + 1) * 127.5 + 0.5), 0, 255)
    assert np.abs(how.resize(images).astype(int) - expected).max() <= 1


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        ({"size": 4, "crop_size": 8}, "makes images of 8 pixels from 4, and the network reads 8"),
        ({"size": 8, "crop_size": 6}, "makes images of 6 pixels from 8, and the network reads 8"),
        ({"size": 8, "resample": 0}, "has resample=0: only bicubic resizing with all steps"),
        ({"size": 8, "do_normalize": False}, "has do_normalize=false: only bicubic resizing"),
    ],
)
def test_another_preprocessing_is_refused(tmp_path, entries, message):
    with pytest.raises(UserError) as refused:
        _preprocessing(written(tmp_path, **entries), 8)
    assert message in str(refused.value)


def test_the_hash_of_one_file_is_its_own_and_of_several_depends_on_all(tmp_path):
    (tmp_path / "a.bin").write_bytes(b"1")
    one = _sha256_of(tmp_path, ["*.bin"])
    assert one == sha256_of_file(tmp_path / "a.bin")
    (tmp_path / "b.bin").write_bytes(b"2")
    both = _sha256_of(tmp_path, ["*.bin"])
    (tmp_path / "b.bin").write_bytes(b"3")
    assert len({one, both, _sha256_of(tmp_path, ["*.bin"])}) == 3


def test_a_folder_and_a_place_for_the_text_are_needed():
    with pytest.raises(UserError, match="clip_folder needs weights: the folder of a CLIP"):
        clip_folder()
    with pytest.raises(UserError, match=r"caption='A photo' needs one \{\}, where the text is"):
        clip_folder("folder", caption="A photo")
