"""Extractors of published networks without torch: resizing, their names, and what is refused."""

from types import SimpleNamespace

import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from diffjax.data import to_float
from diffjax.errors import UserError
from diffjax.evaluation.extractors import dinov2, inception
from diffjax.evaluation.extractors.dinov2 import dinov2_features
from diffjax.evaluation.extractors.inception import inception_features
from diffjax.evaluation.extractors.named import EXTRACTORS, extractor_called, patches_called
from diffjax.spec import build, spec
from experiments.evaluate import chosen_extractors


@pytest.mark.parametrize("size", [32, 400])
def test_the_resize_is_bilinear_between_centres_of_pixels(size):
    image = np.random.default_rng(0).normal(size=(size, size))
    places = np.clip((np.arange(299) + 0.5) * size / 299 - 0.5, 0, size - 1)
    rows = np.stack([np.interp(places, np.arange(size), row) for row in image])
    expected = np.stack([np.interp(places, np.arange(size), row) for row in rows.T], 1)
    found = inception.resize(jnp.asarray(image[None, :, :, None], jnp.float32))
    np.testing.assert_allclose(found[0, :, :, 0], expected, atol=2e-4)


@pytest.mark.parametrize("channels", [1, 3])
def test_colours_and_grey_are_resized_by_pillow(channels):
    images = np.random.default_rng(0).integers(0, 256, (2, 40, 40, channels)).astype(np.uint8)
    expected = []
    for image in images:
        mode = image[..., 0] if channels == 1 else image
        resized = Image.fromarray(mode).resize((224, 224), Image.Resampling.BICUBIC)
        expected.append(np.broadcast_to(np.asarray(resized).reshape(224, 224, -1), (224, 224, 3)))
    np.testing.assert_array_equal(dinov2.resize(to_float(images)), expected)


def test_what_is_missing_is_said():
    with pytest.raises(UserError, match=r"needs weights: .*https://"):
        build(spec(inception_features))
    with pytest.raises(UserError, match="no layer 'pol'; did you mean 'pool'"):
        inception_features("x.pth", layer="pol")
    with pytest.raises(UserError, match=r"dinov2_vitl14_pretrain.pth, or its URL https://"):
        build(spec(dinov2_features))
    with pytest.raises(UserError, match="'vitl'; did you mean 'vitl14'"):
        dinov2_features("x.pth", model="vitl")


def test_features_of_patches_are_named_with_their_settings():
    for text, said in (
        ("vitb14", "features of DINOv2 need weights: the path of dinov2_vitb14_pretrain.pth"),
        ("vitb", "'vitb'; did you mean 'vitb14'"),
        ("vitb14:weight=x", "no axis 'weight'; did you mean 'weights'"),
        ("vitb14:weights=x,patches_per_side=0", "patches_per_side=0 must be"),
    ):
        with pytest.raises(UserError, match=said):
            patches_called(text)


class TestNames:
    def test_each_can_be_named_on_the_command_line(self):
        assert extractor_called("digits").name == "classifier:digits"
        for name in set(EXTRACTORS) - {"pixels", "own", "digits", "fashion_mnist"}:
            with pytest.raises(UserError, match=r"needs? weights"):
                extractor_called(name)

    def test_weights_reach_the_file(self, tmp_path):
        with pytest.raises(UserError, match=r"no\.pth: No such file"):
            extractor_called("dinov2_vits14", weights=str(tmp_path / "no.pth"))

    @pytest.mark.parametrize(
        ("name", "weights", "message"),
        [
            ("pixels", "x.pth", "pixels has no setting weights"),
            ("inseption", None, "did you mean 'inception'"),
            (None, "x.pth", "need --extractor=NAME"),
        ],
    )
    def test_wrong_flags(self, name, weights, message):
        args = SimpleNamespace(
            extractor=name and [name],
            extractor_weights=weights and [weights],
            extractor_sha256=None,
        )
        with pytest.raises(UserError, match=message):
            chosen_extractors(args)

    def test_of_several_each_has_its_own_file_or_all_have_one(self, tmp_path):
        for weights, missing in ((["a.pth"], "a"), (["a.pth", "b.pth"], "a"), (["", "b.pth"], "b")):
            names = ["pixels" if not weights[0] else "inception", "inception_spatial"]
            files = [str(tmp_path / name) if name else "" for name in weights]
            args = SimpleNamespace(extractor=names, extractor_weights=files, extractor_sha256=None)
            with pytest.raises(UserError, match=rf"{missing}\.pth: No such file"):
                chosen_extractors(args)
