"""CLIP's image network against transformers, with random weights, and what is read around it.

A small network in NumPy is in tests/models/published/test_feature_networks.py.
"""

import hashlib
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from diffjax.data import to_float
from diffjax.errors import UserError
from diffjax.evaluation.extractors import clip
from diffjax.evaluation.extractors.clip import clip_features
from diffjax.evaluation.extractors.named import extractor_called
from diffjax.models.clip.network import clip_vision
from diffjax.models.clip.published import FAMILY
from diffjax.pretrained.family import Size

TINY = {"hidden_size": 32, "intermediate_size": 128, "num_hidden_layers": 2} | {
    "num_attention_heads": 4, "projection_dim": 24, "patch_size": 14, "image_size": 56,
}  # fmt: skip
# As in the config.json of openai/clip-vit-large-patch14-336.
REAL = {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24} | {
    "num_attention_heads": 16, "projection_dim": 768, "patch_size": 14, "image_size": 336,
}  # fmt: skip


def transformers_network(sizes, whole=False):
    """One of Hugging Face's with random weights; skips where it is not installed."""
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers", reason="pip install transformers")
    torch.manual_seed(0)
    if whole:
        text = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1}
        text |= {"num_attention_heads": 2, "vocab_size": 30, "bos_token_id": 1, "eos_token_id": 2}
        config = transformers.CLIPConfig(
            text_config=text, vision_config=sizes, projection_dim=sizes["projection_dim"]
        )
        network = transformers.CLIPModel(config)
    else:
        network = transformers.CLIPVisionModelWithProjection(transformers.CLIPVisionConfig(**sizes))
    # As they start, norms and biases would not matter, nor images differ.
    scale = 0.5 / np.sqrt(sizes["hidden_size"])
    for parameter in network.parameters():
        parameter.data += scale * torch.randn(parameter.shape)
    return network.eval()


def embeddings(network, pixels):
    """Of length 1, as CMMD takes them; `pixels` `[B, H, W, 3]`, normalised."""
    torch = pytest.importorskip("torch")
    with torch.inference_mode():
        found = network(torch.tensor(pixels.transpose(0, 3, 1, 2))).image_embeds
    return (found / found.norm(dim=-1, keepdim=True)).numpy()


def state_of(network):
    return {key: value.numpy() for key, value in network.state_dict().items()}


def error(found, expected):
    """Relative to the differences between images, which are all that a distance sees."""
    assert found.shape == expected.shape
    return np.linalg.norm(found - expected) / np.linalg.norm(expected - expected.mean(0))


def settings(sizes):
    """The settings of the same network here."""
    return {
        "width": sizes["hidden_size"],
        "depth": sizes["num_hidden_layers"],
        "num_heads": sizes["num_attention_heads"],
        "num_features": sizes["projection_dim"],
        "grid": sizes["image_size"] // sizes["patch_size"],
        "patch": sizes["patch_size"],
    }


def levels(num, height, width, channels=3):
    """Images of 8x8 patches of one colour each."""
    shape = (num, -(-height // 8), -(-width // 8), channels)
    coarse = np.random.default_rng(0).integers(0, 256, shape).astype(np.uint8)
    return coarse.repeat(8, 1).repeat(8, 2)[:, :height, :width]


@pytest.mark.parity
class TestNetwork:
    @pytest.mark.parametrize(
        ("sizes", "most"),
        [(TINY, 1e-5), pytest.param(REAL, 1e-4, marks=pytest.mark.thorough(tenth=False))],
    )
    def test_embeddings_are_as_in_transformers(self, sizes, most):
        theirs, network = transformers_network(sizes), clip_vision(**settings(sizes))
        size = sizes["image_size"]
        pixels = np.random.default_rng(0).normal(size=(2, size, size, 3)).astype(np.float32)
        params = FAMILY.to_ours(state_of(theirs), network, "theirs")
        found = np.asarray(jax.jit(network.apply)({"params": params}, jnp.asarray(pixels)))
        assert error(found, embeddings(theirs, pixels)) < most
        np.testing.assert_allclose(np.linalg.norm(found, axis=1), 1.0, rtol=1e-5)

    def test_the_published_size_is_that_of_its_config(self):
        assert settings(REAL) == FAMILY.sizes["vitl14_336"].settings

    def test_the_half_that_reads_text_is_left_out(self):
        both = transformers_network(TINY, whole=True)
        params = FAMILY.to_ours(state_of(both), clip_vision(**settings(TINY)), "both")
        assert params["projection"]["kernel"].shape == (32, 24)


class TestExtractor:
    @pytest.mark.parity
    @pytest.mark.parametrize("kind", ["torch", "safetensors"])
    def test_from_a_file_and_pixels_it_is_as_in_transformers(self, kind, tmp_path, monkeypatch):
        sizes = TINY | {"image_size": clip.SIZE}
        theirs = transformers_network(sizes)
        path = tmp_path / "weights"
        if kind == "torch":
            pytest.importorskip("torch").save(theirs.state_dict(), path)
        else:
            safetensors = pytest.importorskip("safetensors.torch")
            safetensors.save_file(theirs.state_dict(), path, {"format": "pt"})
        sha256 = hashlib.sha256(path.read_bytes()).hexdigest()
        tiny = {"vitl14_336": Size(settings(sizes), 0)}
        monkeypatch.setattr(clip, "FAMILY", replace(FAMILY, sizes=tiny))
        extractor = clip_features(str(path), sha256, batch_size_images=2)
        images = levels(3, 40, 40)
        pixels = np.stack([pillow(image) for image in images]) / 255.0
        pixels = (pixels - np.array(clip.MEAN)) / np.array(clip.STD)
        expected = embeddings(theirs, pixels.astype(np.float32))
        assert error(extractor.features(to_float(images)), expected) < 1e-4
        assert extractor.provenance["weights_sha256"] == sha256
        assert extractor.for_cmmd
        with pytest.raises(UserError, match="has sha256"):
            clip_features(str(path))

    @pytest.mark.parity
    def test_the_normalisation_is_that_of_transformers(self):
        name = "transformers.utils.constants"
        constants = pytest.importorskip(name, reason="pip install transformers")
        assert list(clip.MEAN) == constants.OPENAI_CLIP_MEAN
        assert list(clip.STD) == constants.OPENAI_CLIP_STD

    @pytest.mark.parametrize("channels", [1, 3])
    @pytest.mark.parametrize("shape", [(40, 40), (33, 50), (400, 350)])
    def test_the_middle_square_is_resized_by_pillow(self, shape, channels):
        images = levels(2, shape[0], shape[1], channels)
        found = clip.resize(to_float(images))
        expected = [np.broadcast_to(pillow(image), (336, 336, 3)) for image in images]
        np.testing.assert_array_equal(found, expected)

    def test_what_is_missing_is_said(self):
        with pytest.raises(UserError, match=r"clip_features needs weights: .*https://"):
            extractor_called("clip")


def pillow(image):
    """The middle square of one image `[H, W, C]` of uint8, resized as an image file would be."""
    picture = Image.fromarray(image[..., 0] if image.shape[-1] == 1 else image)
    width, height = picture.size
    side = min(width, height)
    left, top = (width - side) // 2, (height - side) // 2
    picture = picture.crop((left, top, left + side, top + side))
    resized = np.asarray(picture.resize((336, 336), Image.Resampling.BICUBIC))
    return resized.reshape(336, 336, -1)
