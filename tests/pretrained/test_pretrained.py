"""Pretrained networks as features, without torch: in NumPy, by their names, and what is refused.

Against torch, with the published sizes: test_extractors.py and test_clip.py.
"""

from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image
from scipy.special import erf, expit, softmax

from diffjax.data import to_float
from diffjax.errors import UserError
from diffjax.evaluation.extractors import clip, dinov2, inception
from diffjax.evaluation.extractors.clip import Clip
from diffjax.evaluation.extractors.dinov2 import Dinov2, dinov2_features
from diffjax.evaluation.extractors.inception import inception_features
from diffjax.evaluation.extractors.named import EXTRACTORS, extractor_called
from diffjax.pretrained.torch_files import StateDict
from diffjax.spec import build, spec
from experiments.evaluate import chosen_extractors

WIDTH, HEADS = 8, 2


class Drawn(dict):
    """Weights of torch by their names, drawn when they are first asked for."""

    rng = np.random.default_rng(0)

    def __call__(self, name, *shape, scale=0.3):
        if name not in self:
            self[name] = scale * self.rng.normal(size=shape)
        return self[name]

    def dense(self, x, name, width):
        kernel = self(f"{name}.weight", width, x.shape[-1], scale=x.shape[-1] ** -0.5)
        return x @ kernel.T + self(f"{name}.bias", width)

    def norm(self, x, name, epsilon):
        centred = x - x.mean(-1, keepdims=True)
        unit = centred / np.sqrt(x.var(-1, keepdims=True) + epsilon)
        shape = x.shape[-1:]
        return unit * self(f"{name}.weight", *shape, scale=1.0) + self(f"{name}.bias", *shape)

    def patches(self, x, name):
        """Squares of 14 pixels as tokens; torch's kernel is `[out, in, height, width]`."""
        kernel = self(name, WIDTH, 3, 14, 14, scale=588**-0.5)
        side = x.shape[1] // 14
        squares = x.reshape(len(x), side, 14, side, 14, 3)
        return np.einsum("bihjwc,dchw->bijd", squares, kernel).reshape(len(x), -1, WIDTH)


def attention(q, k, v):
    """One head after another."""
    heads = []
    for head in range(HEADS):
        part = slice(head * WIDTH // HEADS, (head + 1) * WIDTH // HEADS)
        logits = np.einsum("bqd,bkd->bqk", q[..., part], k[..., part]) / np.sqrt(WIDTH / HEADS)
        heads.append(softmax(logits, axis=-1) @ v[..., part])
    return np.concatenate(heads, -1)


def dino_network(w, x, depth, registers):
    """As the authors' code, of images of 2x2 patches."""
    tokens = w.patches(x, "patch_embed.proj.weight") + w("patch_embed.proj.bias", WIDTH)
    first = np.broadcast_to(w("cls_token", 1, 1, WIDTH), (len(x), 1, WIDTH))
    tokens = np.concatenate([first, tokens], 1) + w("pos_embed", 1, 5, WIDTH)
    if registers:
        more = np.broadcast_to(
            w("register_tokens", 1, registers, WIDTH), (len(x), registers, WIDTH)
        )
        tokens = np.concatenate([tokens[:, :1], more, tokens[:, 1:]], 1)
    w("mask_token", 1, WIDTH)
    for i in range(depth):
        n = f"blocks.{i}."
        qkv = w.dense(w.norm(tokens, f"{n}norm1", 1e-6), f"{n}attn.qkv", 3 * WIDTH)
        seen = w.dense(attention(*np.split(qkv, 3, -1)), f"{n}attn.proj", WIDTH)
        tokens = tokens + seen * w(f"{n}ls1.gamma", WIDTH)
        hidden = w.dense(w.norm(tokens, f"{n}norm2", 1e-6), f"{n}mlp.fc1", 4 * WIDTH)
        hidden = hidden * (1 + erf(hidden / np.sqrt(2))) / 2
        tokens = tokens + w.dense(hidden, f"{n}mlp.fc2", WIDTH) * w(f"{n}ls2.gamma", WIDTH)
    return w.norm(tokens[:, 0], "norm", 1e-6)


def clip_network(w, x, depth, features):
    """As transformers' CLIP, of images of 2x2 patches."""
    path = "vision_model."
    tokens = w.patches(x, f"{path}embeddings.patch_embedding.weight")
    first = np.broadcast_to(w(f"{path}embeddings.class_embedding", WIDTH), (len(x), 1, WIDTH))
    tokens = np.concatenate([first, tokens], 1)
    tokens = tokens + w(f"{path}embeddings.position_embedding.weight", 5, WIDTH)
    tokens = w.norm(tokens, f"{path}pre_layrnorm", 1e-5)
    for i in range(depth):
        n = f"{path}encoder.layers.{i}."
        normed = w.norm(tokens, f"{n}layer_norm1", 1e-5)
        q, k, v = (w.dense(normed, f"{n}self_attn.{name}_proj", WIDTH) for name in "qkv")
        tokens = tokens + w.dense(attention(q, k, v), f"{n}self_attn.out_proj", WIDTH)
        hidden = w.dense(w.norm(tokens, f"{n}layer_norm2", 1e-5), f"{n}mlp.fc1", 4 * WIDTH)
        tokens = tokens + w.dense(hidden * expit(1.702 * hidden), f"{n}mlp.fc2", WIDTH)
    normed = w.norm(tokens[:, 0], f"{path}post_layernorm", 1e-5)
    found = normed @ w("visual_projection.weight", features, WIDTH).T
    return found / np.linalg.norm(found, axis=-1, keepdims=True)


PIXELS = np.random.default_rng(1).normal(size=(3, 28, 28, 3))


@pytest.mark.parametrize("registers", [pytest.param(0, marks=pytest.mark.thorough), 3])
def test_dinov2_is_its_formula(registers):
    w = Drawn()
    expected = dino_network(w, PIXELS, 2, registers)
    network = Dinov2(WIDTH, 2, HEADS, registers)
    params = dinov2.convert(StateDict("w.pth", dict(w)), network, grid=2)
    found = jax.jit(network.apply)({"params": params}, jnp.asarray(PIXELS, jnp.float32))
    np.testing.assert_allclose(np.asarray(found), expected, rtol=2e-4, atol=2e-5)


def test_clip_is_its_formula():
    w = Drawn()
    expected = clip_network(w, PIXELS, 2, 5)
    network = Clip(WIDTH, 2, HEADS, 5)
    params = clip.convert(StateDict("w.bin", dict(w)), network, 28)
    found = jax.jit(network.apply)({"params": params}, jnp.asarray(PIXELS, jnp.float32))
    np.testing.assert_allclose(np.asarray(found), expected, rtol=2e-4, atol=2e-5)
    arrays = {**w, "text_model.x": np.zeros(1), "logit_scale": np.zeros(())}
    clip.convert(StateDict("w.bin", arrays), network, 28)  # the half that reads text is left out
    del arrays["visual_projection.weight"]
    with pytest.raises(UserError, match=r"has no weights 'visual_projection\.weight'"):
        clip.convert(StateDict("w.bin", arrays), network, 28)
    for change, message in (
        ({"more": np.zeros(1)}, "1 weights too many, such as 'more'"),
        (
            {"visual_projection.weight": np.zeros((7, WIDTH))},
            r"projection.kernel is \(8, 7\) and should be \(8, 5\)",
        ),
    ):
        with pytest.raises(UserError, match=message):
            clip.convert(StateDict("w.bin", {**w, **change}), network, 28)


def test_positions_of_the_right_number_stay():
    grid = np.random.default_rng(0).normal(size=(37, 37, 2)).astype(np.float32)
    for registers in (False, True):
        np.testing.assert_array_equal(
            dinov2.resize_positions(grid, 37, like_registers=registers), grid
        )


def test_positions_of_networks_with_registers_go_whole_grid_on_whole_grid():
    """A plane stays one away from the edges, at `37/16 (i + 1/2) - 1/2`."""
    y, x = np.mgrid[:37, :37]
    found = dinov2.resize_positions(np.stack([y, 2 * x - y], -1), 16, like_registers=True)
    places = 37 / 16 * (np.arange(16) + 0.5) - 0.5
    y, x = np.meshgrid(places, places, indexing="ij")
    expected = np.stack([y, 2 * x - y], -1)
    np.testing.assert_allclose(found[2:-2, 2:-2], expected[2:-2, 2:-2], atol=0.02)


def test_positions_of_an_impulse_are_keys_cubic():
    """With a = -3/4, at `37/16.1 (i + 1/2) - 1/2`, without antialiasing."""
    grid = np.zeros((37, 37, 1))
    grid[18, 18] = 1.0
    d = np.abs(37 / 16.1 * (np.arange(16) + 0.5) - 0.5 - 18)
    cubic = np.where(
        d <= 1,
        1.25 * d**3 - 2.25 * d**2 + 1,
        np.where(d < 2, -0.75 * (d**3 - 5 * d**2 + 8 * d - 4), 0.0),
    )
    found = dinov2.resize_positions(grid, 16, like_registers=False)[..., 0]
    np.testing.assert_allclose(found, np.outer(cubic, cubic), atol=1e-6)


class TestInceptionsParts:
    def test_a_unit_is_convolution_and_batch_normalisation(self):
        """Folded into one, held against both by hand, at each of the ways to pad."""
        rng = np.random.default_rng(0)
        kernel = rng.normal(size=(4, 3, 3, 3))
        mean, bias, gamma = rng.normal(size=(3, 4))
        variance = rng.uniform(0.5, 2.0, 4)
        arrays = {"x.conv.weight": kernel, "x.bn.weight": gamma, "x.bn.bias": bias}
        arrays |= {"x.bn.running_mean": mean, "x.bn.running_var": variance}
        images = rng.normal(size=(2, 7, 7, 3))
        folded = inception._folded(StateDict("w.pth", arrays), "x.")
        for stride, padding in ((1, "SAME"), (1, "VALID"), (2, "VALID")):
            edge = int(padding == "SAME")
            padded = np.pad(images, ((0, 0), (edge, edge), (edge, edge), (0, 0)))
            windows = np.lib.stride_tricks.sliding_window_view(padded, (3, 3), (1, 2))
            windows = windows[:, ::stride, ::stride]
            plain = np.einsum("bijchw,dchw->bijd", windows, kernel)
            expected = gamma * (plain - mean) / np.sqrt(variance + 1e-3) + bias
            unit = inception._Unit(4, (3, 3), stride, padding)
            params = {"conv": folded}
            found = unit.apply({"params": params}, jnp.asarray(images, jnp.float32))
            np.testing.assert_allclose(found, np.maximum(expected, 0.0), atol=1e-4)

    def test_averages_leave_out_the_padding(self):
        x = np.random.default_rng(0).normal(size=(1, 4, 5, 2)).astype(np.float32)
        for found, of in ((inception._average(jnp.asarray(x)), np.mean),
                          (inception._maximum(jnp.asarray(x)), np.max)):  # fmt: skip
            for i, j in np.ndindex(4, 5):
                around = x[0, max(i - 1, 0) : i + 2, max(j - 1, 0) : j + 2]
                np.testing.assert_allclose(found[0, i, j], of(around, axis=(0, 1)), rtol=1e-5)

    @pytest.mark.parametrize("size", [32, 400])
    def test_the_resize_is_bilinear_between_centres_of_pixels(self, size):
        image = np.random.default_rng(0).normal(size=(size, size))
        places = np.clip((np.arange(299) + 0.5) * size / 299 - 0.5, 0, size - 1)
        rows = np.stack([np.interp(places, np.arange(size), row) for row in image])
        expected = np.stack([np.interp(places, np.arange(size), row) for row in rows.T], 1)
        found = inception.resize(jnp.asarray(image[None, :, :, None], jnp.float32))
        np.testing.assert_allclose(found[0, :, :, 0], expected, atol=2e-4)

    @pytest.mark.thorough
    def test_layers_are_as_wide_as_published(self):
        image = jax.ShapeDtypeStruct((2, 299, 299, 3), jnp.float32)
        layers, _ = jax.eval_shape(
            inception.InceptionV3().init_with_output, jax.random.key(0), image
        )
        assert [layer.shape for layer in layers] == [(2, n) for n in (2048, 2023, 768, 1008)]


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


class TestNames:
    def test_each_can_be_named_on_the_command_line(self):
        assert extractor_called("digits").name == "classifier:digits"
        for name in set(EXTRACTORS) - {"pixels", "digits", "fashion_mnist"}:
            with pytest.raises(UserError, match="needs weights"):
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
