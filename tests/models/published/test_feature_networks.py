"""Published networks of features against their formulas in NumPy.

Against torch, with the published sizes: tests/evaluation/test_extractors.py and test_clip.py.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.special import erf, expit, softmax

from diffjax.models.clip.network import clip_vision
from diffjax.models.clip.published import FAMILY as CLIP
from diffjax.models.dinov2.network import dinov2, resize_positions
from diffjax.models.dinov2.published import FAMILY as DINOV2
from diffjax.models.inception import network as inception

WIDTH, HEADS = 8, 2


class Drawn(dict):
    """Weights of torch by their names, drawn at their first use."""

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


@pytest.mark.parametrize("registers", [pytest.param(0, marks=pytest.mark.thorough(tenth=False)), 3])
def test_dinov2_is_its_formula(registers):
    w = Drawn()
    expected = dino_network(w, PIXELS, 2, registers)
    network = dinov2(WIDTH, 2, HEADS, registers, grid=2)
    params = DINOV2.to_ours(w, network, "w.pth")
    found = jax.jit(network.apply)({"params": params}, jnp.asarray(PIXELS, jnp.float32))
    np.testing.assert_allclose(np.asarray(found)[:, 0], expected, rtol=2e-4, atol=2e-5)


def test_clip_is_its_formula():
    w = Drawn()
    expected = clip_network(w, PIXELS, 2, 5)
    network = clip_vision(WIDTH, 2, HEADS, 5, grid=2)
    params = CLIP.to_ours(w, network, "w.bin")
    found = jax.jit(network.apply)({"params": params}, jnp.asarray(PIXELS, jnp.float32))
    np.testing.assert_allclose(np.asarray(found), expected, rtol=2e-4, atol=2e-5)


def test_positions_of_the_right_number_stay():
    grid = np.random.default_rng(0).normal(size=(37, 37, 2)).astype(np.float32)
    for registers in (False, True):
        np.testing.assert_array_equal(resize_positions(grid, 37, like_registers=registers), grid)


def test_positions_of_networks_with_registers_go_whole_grid_on_whole_grid():
    """A plane stays one away from the edges, at `37/16 (i + 1/2) - 1/2`."""
    y, x = np.mgrid[:37, :37]
    found = resize_positions(np.stack([y, 2 * x - y], -1), 16, like_registers=True)
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
    found = resize_positions(jnp.asarray(grid), 16, like_registers=False)[..., 0]
    np.testing.assert_allclose(found, np.outer(cubic, cubic), atol=1e-6)


class TestInceptionsParts:
    def test_a_unit_is_convolution_and_batch_normalisation(self):
        """Compared with both by hand, at each of the ways to pad."""
        rng = np.random.default_rng(0)
        kernel = rng.normal(size=(4, 3, 3, 3))
        mean, bias, gamma = rng.normal(size=(3, 4))
        variance = rng.uniform(0.5, 2.0, 4)
        norm = {"scale": gamma, "bias": bias, "mean": mean, "variance": variance}
        images = rng.normal(size=(2, 7, 7, 3))
        for stride, padding in ((1, "SAME"), (1, "VALID"), (2, "VALID")):
            edge = int(padding == "SAME")
            padded = np.pad(images, ((0, 0), (edge, edge), (edge, edge), (0, 0)))
            windows = np.lib.stride_tricks.sliding_window_view(padded, (3, 3), (1, 2))
            windows = windows[:, ::stride, ::stride]
            plain = np.einsum("bijchw,dchw->bijd", windows, kernel)
            expected = gamma * (plain - mean) / np.sqrt(variance + 1e-3) + bias
            unit = inception._Unit(4, (3, 3), stride, padding)
            params = {"conv": {"kernel": kernel.transpose(2, 3, 1, 0)}, "norm": norm}
            params = jax.tree.map(np.float32, params)
            found = unit.apply({"params": params}, jnp.asarray(images, jnp.float32))
            np.testing.assert_allclose(found, np.maximum(expected, 0.0), atol=1e-4)

    def test_averages_leave_out_the_padding(self):
        x = np.random.default_rng(0).normal(size=(1, 4, 5, 2)).astype(np.float32)
        for found, of in ((inception._average(jnp.asarray(x)), np.mean),
                          (inception._maximum(jnp.asarray(x)), np.max)):  # fmt: skip
            for i, j in np.ndindex(4, 5):
                around = x[0, max(i - 1, 0) : i + 2, max(j - 1, 0) : j + 2]
                np.testing.assert_allclose(found[0, i, j], of(around, axis=(0, 1)), rtol=1e-5)

    def test_layers_are_as_wide_as_published(self):
        image = jax.ShapeDtypeStruct((2, 299, 299, 3), jnp.float32)
        layers, _ = jax.eval_shape(
            inception.InceptionV3().init_with_output, jax.random.key(0), image
        )
        assert [layer.shape for layer in layers] == [(2, n) for n in (2048, 2023, 768, 1008)]
