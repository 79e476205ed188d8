"""The networks of FID and DINOv2 against torch, with random weights read from a file of torch.

Without torch (`pip install -e '.[parity]'`) these tests are skipped. Those against pytorch-fid and
transformers run where these are installed. What needs no torch is in
tests/models/published/test_feature_networks.py and test_named_extractors.py.
"""

import hashlib
import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from diffjax.data import ArraySource, DataSet, to_float
from diffjax.errors import UserError
from diffjax.evaluation.extractors import dinov2, inception
from diffjax.evaluation.extractors.dinov2 import dinov2_features, dinov2_patches
from diffjax.evaluation.extractors.inception import inception_features
from diffjax.evaluation.metrics import compare, reference
from diffjax.models.dinov2.network import dinov2 as dinov2_network
from diffjax.models.dinov2.network import resize_positions
from diffjax.models.dinov2.published import FAMILY as DINOV2
from diffjax.models.inception.published import FAMILY as INCEPTION
from diffjax.pretrained.family import Size

pytestmark = pytest.mark.parity
torch: Any = None
F: Any = None


@pytest.fixture(autouse=True, scope="module")
def _torch():
    """Imported by the first test that runs: where these are left out, its seconds are too."""
    global torch, F
    torch = pytest.importorskip("torch")
    F = torch.nn.functional


class Weights(dict):
    """Draws the weights of a layer when it is first used, under their name in torch."""

    def __init__(self, seed):
        self.generator = torch.Generator().manual_seed(seed)

    def normal(self, name, *shape, scale=1.0, shift=0.0):
        if name not in self:
            self[name] = shift + scale * torch.randn(shape, generator=self.generator)
        return self[name]

    def uniform(self, name, *shape):
        if name not in self:
            self[name] = 0.5 + 1.5 * torch.rand(shape, generator=self.generator)
        return self[name]

    def save(self, path):
        torch.save(dict(self), path)
        return str(path), hashlib.sha256(Path(path).read_bytes()).hexdigest()


def unit(w, x, name, features, kernel=(1, 1), stride=1, padding=None):
    """Convolution, batch normalisation with statistics that matter, ReLU."""
    inputs = x.shape[1]
    scale = (2.0 / (inputs * kernel[0] * kernel[1])) ** 0.5
    weight = w.normal(f"{name}.conv.weight", features, inputs, *kernel, scale=scale)
    if padding is None:
        padding = tuple(k // 2 for k in kernel) if stride == 1 else 0
    x = F.conv2d(x, weight, stride=stride, padding=padding)
    names = ("running_mean", "bias")
    mean, bias = (w.normal(f"{name}.bn.{n}", features, scale=0.3) for n in names)
    variance, gamma = (w.uniform(f"{name}.bn.{n}", features) for n in ("running_var", "weight"))
    w.setdefault(f"{name}.bn.num_batches_tracked", torch.tensor(7))
    return F.relu(F.batch_norm(x, mean, variance, gamma, bias, eps=1e-3))


def chain(w, x, name, *steps):
    """Units `name_1`, `name_2`, … of `(features, kernel)`, or with a stride."""
    for i, step in enumerate(steps, start=1):
        x = unit(w, x, f"{name}_{i}", *step)
    return x


def mean(x):
    return F.avg_pool2d(x, 3, 1, 1, count_include_pad=False)


def fid_network(w, x):
    """The FID network in torch's functions: its layers by the names of `Layers`."""
    x = unit(w, x, "Conv2d_1a_3x3", 32, (3, 3), 2)
    x = unit(w, x, "Conv2d_2a_3x3", 32, (3, 3), padding=0)
    x = F.max_pool2d(unit(w, x, "Conv2d_2b_3x3", 64, (3, 3)), 3, 2)
    x = unit(w, x, "Conv2d_3b_1x1", 80)
    x = F.max_pool2d(unit(w, x, "Conv2d_4a_3x3", 192, (3, 3), padding=0), 3, 2)
    found = {}
    for n, features in (("5b", 32), ("5c", 64), ("5d", 64)):
        n = f"Mixed_{n}.branch"
        parts = [
            unit(w, x, f"{n}1x1", 64),
            chain(w, x, f"{n}5x5", (48,), (64, (5, 5))),
            chain(w, x, f"{n}3x3dbl", (64,), (96, (3, 3)), (96, (3, 3))),
            unit(w, mean(x), f"{n}_pool", features),
        ]
        x = torch.cat(parts, 1)
    three = unit(w, x, "Mixed_6a.branch3x3", 384, (3, 3), 2)
    double = chain(w, x, "Mixed_6a.branch3x3dbl", (64,), (96, (3, 3)), (96, (3, 3), 2))
    x = torch.cat([three, double, F.max_pool2d(x, 3, 2)], 1)
    for n, c in (("6b", 128), ("6c", 160), ("6d", 160), ("6e", 192)):
        n, wide, high = f"Mixed_{n}.branch", (1, 7), (7, 1)
        steps = (c,), (c, high), (c, wide), (c, high), (192, wide)
        parts = [
            unit(w, x, f"{n}1x1", 192),
            chain(w, x, f"{n}7x7", (c,), (c, wide), (192, high)),
            chain(w, x, f"{n}7x7dbl", *steps),
            unit(w, mean(x), f"{n}_pool", 192),
        ]
        if "6d" in n:
            # mixed_6/conv of the TensorFlow graph, positions first.
            found["spatial"] = parts[0][:, :7].permute(0, 2, 3, 1).flatten(1)
        x = torch.cat(parts, 1)
    found["middle"] = x.mean((2, 3))
    three = chain(w, x, "Mixed_7a.branch3x3", (192,), (320, (3, 3), 2))
    steps = (192,), (192, (1, 7)), (192, (7, 1)), (192, (3, 3), 2)
    seven = chain(w, x, "Mixed_7a.branch7x7x3", *steps)
    x = torch.cat([three, seven, F.max_pool2d(x, 3, 2)], 1)
    for n, pool in (("7b", mean), ("7c", lambda x: F.max_pool2d(x, 3, 1, 1))):
        n = f"Mixed_{n}.branch"
        three = unit(w, x, f"{n}3x3_1", 384)
        double = chain(w, x, f"{n}3x3dbl", (448,), (384, (3, 3)))
        parts = [
            unit(w, x, f"{n}1x1", 320),
            unit(w, three, f"{n}3x3_2a", 384, (1, 3)),
            unit(w, three, f"{n}3x3_2b", 384, (3, 1)),
            unit(w, double, f"{n}3x3dbl_3a", 384, (1, 3)),
            unit(w, double, f"{n}3x3dbl_3b", 384, (3, 1)),
            unit(w, pool(x), f"{n}_pool", 192),
        ]
        x = torch.cat(parts, 1)
    found["pool"] = x.mean((2, 3))
    weight = w.normal("fc.weight", 1008, 2048, scale=0.02)
    w.normal("fc.bias", 1008)
    found["logits"] = found["pool"] @ weight.T
    return found


def levels(num, size, channels=3, seed=0):
    """Images of 8x8 patches of one colour each: as unlike one another as photographs are."""
    side = -(-size // 8)
    coarse = np.random.default_rng(seed).integers(0, 256, (num, side, side, channels))
    return coarse.repeat(8, 1).repeat(8, 2)[:, :size, :size].astype(np.uint8)


def to_torch(images):
    """`[B, 3, H, W]` in [0, 1]."""
    return torch.tensor(images).expand(*images.shape[:3], 3).permute(0, 3, 1, 2).float() / 255


def error(found, expected):
    """Relative to the differences between images, which are all that a distance sees."""
    found, expected = np.asarray(found, np.float64), np.asarray(expected, np.float64)
    assert found.shape == expected.shape
    return np.linalg.norm(found - expected) / np.linalg.norm(expected - expected.mean(0))


IMAGES = levels(3, 32)


def of_first_pixels(images):
    return images.reshape(len(images), -1)[:, :5], jnp.zeros((len(images), 1008))


@pytest.fixture(scope="module")
def fid(tmp_path_factory):
    """Features in torch of `IMAGES`, and the file of the weights."""
    w = Weights(0)
    with torch.inference_mode():
        x = F.interpolate(to_torch(IMAGES), (299, 299), mode="bilinear", align_corners=False)
        expected = {name: value.numpy() for name, value in fid_network(w, 2 * x - 1).items()}
    path, sha256 = w.save(tmp_path_factory.mktemp("fid") / "w.pth")
    return SimpleNamespace(expected=expected, path=path, sha256=sha256)


@pytest.fixture(scope="module")
def fid_extractor(fid):
    return inception_features(fid.path, sha256=fid.sha256, batch_size_images=3)


class TestInception:
    def test_every_layer_is_as_in_torch(self, fid):
        network, params = INCEPTION.read(fid.path)
        images = inception.resize(jnp.asarray(to_float(IMAGES)))
        layers = jax.jit(network.apply)({"params": params}, images)
        assert set(layers._fields) == set(fid.expected)
        for name, found in zip(layers._fields, layers, strict=True):
            assert error(np.asarray(found), fid.expected[name]) < 1e-4

    @pytest.mark.thorough(tenth=False)
    def test_the_extractor_is_as_pytorch_fid(self, fid, fid_extractor):
        theirs = pytorch_fid_network(fid.path)
        with torch.inference_mode():
            (expected,) = theirs(to_torch(IMAGES))
        assert error(fid_extractor.features(to_float(IMAGES)), expected[:, :, 0, 0].numpy()) < 1e-4

    def test_an_evaluation_says_what_it_was_measured_on(self, fid, fid_extractor):
        features, logits = fid_extractor.extract(to_float(IMAGES))
        assert error(features, fid.expected["pool"]) < 1e-4
        assert error(logits, fid.expected["logits"]) < 1e-4
        labels = np.zeros(3, np.int32)
        train, test = (ArraySource(levels(3, 32, 3, seed), labels) for seed in (1, 2))
        data = DataSet("noise", train, test, (32, 32, 3), 1, ("all",))
        # In stead of the network, which takes seconds an image: as many logits, and few features.
        stand_in = replace(fid_extractor, apply=of_first_pixels)
        found = compare(to_float(IMAGES), labels, reference(data, stand_in))
        assert found["accuracy"] is None  # logits of ImageNet's classes do not predict these labels
        said = found["frechet_distance"]["provenance"]
        assert json.loads(json.dumps(said)) == said
        assert said["extractor"] == "inception:pool"
        assert said["weights_sha256"] == fid.sha256
        assert said["num_features"] == 5
        assert said["rounding"] == "uint8"
        assert {"architecture", "layer", "resize", "scaling", "grey", "precision"} <= set(said)
        assert found["frechet_distance"]["value"] > 0

    @pytest.mark.parametrize("size", [32, 299, 400])
    def test_the_resize_is_torchs(self, size):
        images = levels(2, size)
        expected = F.interpolate(
            to_torch(images), (299, 299), mode="bilinear", align_corners=False
        ).permute(0, 2, 3, 1)
        found = inception.resize(jnp.asarray(images / 255.0, jnp.float32))
        np.testing.assert_allclose(found, expected.numpy(), atol=1e-5)

    def test_a_file_of_another_hash_is_refused(self, fid):
        with pytest.raises(UserError, match=f"has sha256 {fid.sha256}, not 6726825d"):
            inception_features(fid.path)

    def test_the_hash_stands_for_all_that_features_depend_on(self, fid, fid_extractor):
        other = inception_features(fid.path, layer="spatial", sha256=fid.sha256)
        assert other.sha256 != fid_extractor.sha256
        assert other.provenance["weights_sha256"] == fid_extractor.provenance["weights_sha256"]

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            (lambda w: w.pop("fc.weight"), "it lacks fc.weight"),
            (
                lambda w: w.update({"fc.weight": torch.zeros(1000, 2048)}),
                r"fc.weight is \[1000, 2048\], not \[1008, 2048\]",
            ),
            (
                lambda w: w.update({"Mixed_5b.branch1x1.bn.weight": torch.zeros(3)}),
                r"Mixed_5b.branch1x1.bn.weight is \[3\], not \[64\]",
            ),
        ],
    )
    def test_weights_of_another_network_are_refused(self, fid, change, message, tmp_path):
        w = Weights(0)
        w.update(torch.load(fid.path))
        change(w)
        path, sha256 = w.save(tmp_path / "w.pth")
        with pytest.raises(UserError, match=message):
            inception_features(path, sha256=sha256)


def pytorch_fid_network(path):
    """pytorch-fid's module with the weights of a file; skips where it is not installed."""
    pytest.importorskip("pytorch_fid", reason="pip install pytorch-fid torchvision")
    module = pytest.importorskip("pytorch_fid.inception", reason="torchvision is not installed")
    with pytest.MonkeyPatch.context() as patch:
        # It would fetch its own.
        patch.setattr(module, "load_state_dict_from_url", lambda *args, **kwargs: torch.load(path))
        return module.InceptionV3().eval()


def dino_network(w, x, variant, positions):
    """A DINOv2 network in torch's functions; `positions` maps the learnt ones to those used."""
    d = variant.width

    def dense(x, name, out):
        weight = w.normal(f"{name}.weight", out, x.shape[-1], scale=x.shape[-1] ** -0.5)
        return F.linear(x, weight, w.normal(f"{name}.bias", out, scale=0.1))

    def norm(x, name):
        weight = w.normal(f"{name}.weight", d, scale=0.2, shift=1.0)
        return F.layer_norm(x, (d,), weight, w.normal(f"{name}.bias", d, scale=0.1), eps=1e-6)

    kernel = w.normal("patch_embed.proj.weight", d, 3, 14, 14, scale=588**-0.5)
    x = F.conv2d(x, kernel, w.normal("patch_embed.proj.bias", d), stride=14)
    x = torch.cat([w.normal("cls_token", 1, 1, d).expand(len(x), 1, d), x.flatten(2).mT], 1)
    x = x + positions(w.normal("pos_embed", 1, 1 + 37**2, d, scale=0.5))
    if variant.num_registers:
        registers = w.normal("register_tokens", 1, variant.num_registers, d)
        x = torch.cat([x[:, :1], registers.expand(len(x), -1, d), x[:, 1:]], 1)
    w.normal("mask_token", 1, d)
    for i in range(variant.depth):
        n = f"blocks.{i}."
        qkv = dense(norm(x, f"{n}norm1"), f"{n}attn.qkv", 3 * d)
        q, k, v = qkv.reshape(len(x), -1, 3, variant.num_heads, d // variant.num_heads).unbind(2)
        seen = F.scaled_dot_product_attention(*(part.transpose(1, 2) for part in (q, k, v)))
        seen = dense(seen.transpose(1, 2).flatten(2), f"{n}attn.proj", d)
        x = x + seen * w.normal(f"{n}ls1.gamma", d, scale=0.3, shift=0.5)
        hidden = F.gelu(dense(norm(x, f"{n}norm2"), f"{n}mlp.fc1", 4 * d))
        x = x + dense(hidden, f"{n}mlp.fc2", d) * w.normal(f"{n}ls2.gamma", d, shift=0.5, scale=0.3)
    return norm(x, "norm")


def authors_positions(learnt, *, registers):
    """37x37 to 16x16 with torch's own interpolation, called as in the authors' repository."""
    d = learnt.shape[-1]
    patches = learnt[:, 1:].reshape(1, 37, 37, d).permute(0, 3, 1, 2)
    how = {"size": (16, 16)} if registers else {"scale_factor": (16.1 / 37, 16.1 / 37)}
    patches = F.interpolate(patches, mode="bicubic", antialias=registers, **how)
    return torch.cat([learnt[:, :1], patches.permute(0, 2, 3, 1).reshape(1, 256, d)], 1)


class TestDinov2:
    @pytest.mark.parametrize(("registers", "channels"), [(0, 1), (4, 3)])
    def test_features_are_as_in_torch(self, registers, channels, tmp_path, monkeypatch):
        """Of a network with the published grid of 37 x 37 positions, and narrow blocks."""
        model = "tiny"
        sizes = {"width": 32, "depth": 2, "num_heads": 4, "num_registers": registers}
        monkeypatch.setitem(DINOV2.sizes, model, Size(sizes, 0, sha256="0" * 64))  # type: ignore
        images, w, variant = levels(3, 40, channels), Weights(0), DINOV2.size(model)
        with torch.inference_mode():
            pixels = np.stack([pillow(image) for image in images])
            pixels = (to_torch(pixels) - torch.tensor(dinov2.MEAN)[:, None, None]) / (
                torch.tensor(dinov2.STD)[:, None, None]
            )
            expected = dino_network(
                w, pixels, variant, lambda p: authors_positions(p, registers=registers > 0)
            )
        path, sha256 = w.save(tmp_path / "w.pth")
        extractor = dinov2_features(path, model, sha256, batch_size_images=3)
        assert error(extractor.features(to_float(images)), expected[:, 0].numpy()) < 1e-4
        of_patches = dinov2_patches(path, model, sha256, batch_size_images=3)
        grid = expected[:, 1 + variant.num_registers :].reshape(3, 16, 16, variant.width).numpy()
        assert error(of_patches.features(to_float(images)), grid) < 1e-4
        assert extractor.provenance["weights_sha256"] == sha256
        with pytest.raises(UserError, match="has sha256"):
            dinov2_features(path, model)

    @pytest.mark.parametrize("registers", [False, True])
    def test_positions_are_interpolated_as_by_the_authors(self, registers):
        torch.manual_seed(0)
        learnt = torch.randn(1, 1 + 37**2, 5)
        expected = authors_positions(learnt, registers=registers)[0, 1:].reshape(16, 16, 5)
        grid = learnt[0, 1:].reshape(37, 37, 5).numpy()
        found = resize_positions(jnp.asarray(grid), 16, like_registers=registers)
        np.testing.assert_allclose(found, expected.numpy(), atol=2e-5)

    @pytest.mark.parametrize("registers", [0, 4])
    def test_features_are_as_in_transformers(self, registers):
        theirs = transformers_network(registers)
        state, network = hub_names(theirs.state_dict()), dinov2_network(32, 2, 4, registers, grid=5)
        pixels = torch.randn(3, 3, 70, 70, generator=torch.Generator().manual_seed(0))
        with torch.inference_mode():
            expected = theirs(pixels).last_hidden_state[:, 0].numpy()
        params = DINOV2.to_ours(state, network, "transformers")
        found = network.apply({"params": params}, jnp.asarray(pixels.permute(0, 2, 3, 1).numpy()))
        assert error(np.asarray(found)[:, 0], expected) < 1e-4


def transformers_network(registers):
    """A small one of Hugging Face's with random weights; skips where it is not installed."""
    transformers = pytest.importorskip("transformers", reason="pip install transformers")
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "patch_size": 14}
    torch.manual_seed(0)
    if registers:
        config = transformers.Dinov2WithRegistersConfig(
            **sizes, image_size=70, num_register_tokens=registers
        )
        network = transformers.Dinov2WithRegistersModel(config)
    else:
        network = transformers.Dinov2Model(transformers.Dinov2Config(**sizes, image_size=70))
    for parameter in network.parameters():
        parameter.data += 0.2 * torch.randn(parameter.shape)
    return network.eval()


def hub_names(theirs):
    """Weights of transformers by the names of the authors' files."""
    names = {
        "embeddings.cls_token": "cls_token",
        "embeddings.mask_token": "mask_token",
        "embeddings.position_embeddings": "pos_embed",
        "embeddings.register_tokens": "register_tokens",
        "embeddings.patch_embeddings.projection": "patch_embed.proj",
        "encoder.layer": "blocks",
        "layernorm": "norm",
        "attention.output.dense": "attn.proj",
        "attention.o_proj": "attn.proj",
        "layer_scale": "ls",
        "lambda1": "gamma",
        "attention.attention.": "attention.",
        "query": "q_proj",
        "key": "k_proj",
        "value": "v_proj",
    }
    arrays = {}
    for name, value in theirs.items():
        for old, new in names.items():
            name = name.replace(old, new)
        arrays[name] = value.numpy()
    for name in [name for name in arrays if "attention.q_proj" in name]:
        parts = [arrays.pop(name.replace("q_proj", f"{part}_proj")) for part in "qkv"]
        arrays[name.replace("attention.q_proj", "attn.qkv")] = np.concatenate(parts)
    return arrays


def pillow(image):
    """One image `[H, W, C]` of uint8, resized as an image file would be."""
    mode = image[..., 0] if image.shape[-1] == 1 else image
    resized = np.asarray(Image.fromarray(mode).resize((224, 224), Image.Resampling.BICUBIC))
    return resized.reshape(224, 224, -1)
