"""Embeddings of images, standardised by the statistics of a prior."""

import numpy as np
import pytest

from diffjax.codecs.embeddings import Embeddings
from diffjax.conditions import ImageEmbeddings
from diffjax.errors import UserError
from diffjax.pretrained.files import write_safetensors

MEAN, STD = np.array([[1.0, -2.0, 0.5]], np.float32), np.array([[2.0, 0.5, 4.0]], np.float32)


def test_embeddings_are_standardised_and_back(tmp_path):
    path = tmp_path / "prior.safetensors"
    write_safetensors(path, {"clip_mean": MEAN, "clip_std": STD})
    codec = Embeddings(str(path))
    given = np.array([[3.0, -2.0, -3.5], [1.0, -1.5, 0.5]], np.float32)[:, None, None]
    latents = codec.encoder()(given)
    np.testing.assert_array_equal(latents[:, 0, 0], [[1, 0, -1], [0, 1, 0]])
    np.testing.assert_array_equal(codec.decoder()(latents), given)
    assert len(codec.sha256) == 64
    with pytest.raises(UserError, match=r"images of one pixel, \[1, 1, D\], not \(8, 8, 3\)"):
        codec.latent_shape((8, 8, 3))
    with pytest.raises(UserError, match="needs the folder of a prior"):
        _ = Embeddings().params
    write_safetensors(path, {"clip_mean": MEAN})
    with pytest.raises(UserError, match="is no prior: it has no tensor clip_std"):
        Embeddings(str(path))


def test_embeddings_are_conditions_of_one_token():
    kind = ImageEmbeddings(1, 3, embedding_width=3)
    rows = np.arange(6, dtype=np.float32).reshape(2, 3)
    for given in (rows, rows[:, None, None]):
        found = kind.of(given)
        np.testing.assert_array_equal(found.states[:, 0], rows)
        assert found.mask.all()
    for given, said in (
        (rows[:, :2], r"embeddings of images of width 3, \[n, 3\], not on an array of shape"),
        (["a cat"], "the prompt 'a cat' needs a prior"),
        (rows * np.nan, "not finite"),
    ):
        with pytest.raises(UserError, match=said):
            kind.of(given)
