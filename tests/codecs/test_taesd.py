"""The tiny autoencoders: their layers against NumPy, and their published weights."""

import os
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from sklearn.datasets import load_sample_image

from diffjax.codecs import Tiled
from diffjax.codecs.taesd import TAESD
from diffjax.data import eval_batches, image_folder
from diffjax.errors import UserError
from diffjax.models.families import find_published
from diffjax.models.taesd.network import TAESD as Network
from diffjax.models.taesd.published import DECODER, DIFFUSERS, ENCODER
from diffjax.pretrained.files import read_state_dict
from diffjax.pretrained.folders import write_folder
from tests.references import taef2
from tests.references.dit import drawn


def weights_folder() -> Path:
    candidates = [
        Path(os.environ.get("DIFFJAX_TAEF2", "no such folder")),
        Path(__file__).parents[3] / "shared/data/taef2",
    ]
    found = [folder for folder in candidates if folder.is_dir()]
    if not found:
        pytest.skip("no TAEF2 here: set DIFFJAX_TAEF2 to the folder of taef2_{encoder,decoder}.pth")
    return found[0]


def conv(x: np.ndarray, weights: np.ndarray, bias: Any = None, stride: int = 1) -> np.ndarray:
    """A convolution of `x [C, H, W]` in PyTorch's layout, padded by zeros to the kernel's half."""
    half = weights.shape[-1] // 2
    x = np.pad(x, [(0, 0), (half, half), (half, half)])
    windows = np.lib.stride_tricks.sliding_window_view(x, weights.shape[2:], axis=(1, 2))
    out = np.einsum("chwij,ocij->ohw", windows[:, ::stride, ::stride], weights, optimize=True)
    return out if bias is None else out + bias[:, None, None]


def relu(x: np.ndarray) -> np.ndarray:
    return np.maximum(x, 0)


def block(x: np.ndarray, state: Any, name: str) -> np.ndarray:
    if f"{name}.pool.0.weight" in state:
        h = conv(x, state[f"{name}.pool.0.weight"])
        groups = h.reshape(4, -1)
        mean, variance = groups.mean(1, keepdims=True), groups.var(1, keepdims=True)
        h = ((groups - mean) / np.sqrt(variance + 1e-5)).reshape(h.shape)
        scale, shift = (
            state[f"{name}.pool.1.{part}"][:, None, None] for part in ("weight", "bias")
        )
        x = x + conv(relu(h * scale + shift), state[f"{name}.pool.3.weight"])
    h = x
    for place in (0, 2, 4):
        h = conv(h, state[f"{name}.conv.{place}.weight"], state[f"{name}.conv.{place}.bias"])
        h = relu(h) if place < 4 else h
    return relu(h + x)


def run(layers: list, x: np.ndarray, state: Any) -> np.ndarray:
    """The published sequence; a layer is its kind."""
    for place, kind in enumerate(layers):
        if kind == "block":
            x = block(x, state, str(place))
        elif kind == "up":
            x = x.repeat(2, axis=1).repeat(2, axis=2)
        elif kind == "relu":
            x = relu(x)
        elif kind == "clamp":
            x = 3 * np.tanh(x / 3)
        else:
            bias = state.get(f"{place}.bias")
            x = conv(x, state[f"{place}.weight"], bias, 2 if kind == "down" else 1)
    return x


ENCODER_LAYERS = ["conv", "block", *(["down", *["block"] * 3] * 3), "conv"]
DECODER_LAYERS = ["clamp", "conv", "relu", *([*["block"] * 3, "up", "conv"] * 3), "block", "conv"]


def test_the_number_of_parameters_is_the_published_one():
    """1,222,532 and 1,222,531, as in the README of the weights; those of 16 channels have 12 more.

    Each channel of a latent has 9·64 weights in both, and a bias in the encoder alone.
    """
    more = 1_222_532 + 12 * (9 * 64 + 1), 1_222_531 + 12 * 9 * 64
    for size, numbers in {"taesd": (1_222_532, 1_222_531), "taef1": more}.items():
        for family, number in zip((ENCODER, DECODER), numbers, strict=True):
            assert family.sizes[size].num_parameters == number
    for family in (ENCODER, DECODER):
        for size in ("taesd", "taef2"):
            leaves = jax.tree.leaves(family.shapes(family.size(size)))
            assert sum(leaf.size for leaf in leaves) == family.sizes[size].num_parameters


def test_published_files_are_recognised_and_written_again():
    rng = np.random.default_rng(0)
    for family in (ENCODER, DECODER):
        network = family.size("taef2")
        params = jax.tree.map(lambda leaf: rng.normal(size=leaf.shape), family.shapes(network))
        state = family.to_theirs(params, network)
        assert family.network_of(state, "it") == network
        back = family.to_ours(state, network, "it")
        jax.tree.map(lambda one, other: np.testing.assert_allclose(one, other, 1e-6), back, params)


@pytest.mark.parity
def test_taef2_computes_what_its_layers_in_numpy_do():
    folder, rng = weights_folder(), np.random.default_rng(0)
    codec = TAESD(str(folder))
    images = rng.uniform(-1, 1, (2, 24, 32, 3)).astype(np.float32)
    latents = codec.encoder()(images)
    assert latents.shape == (2, 3, 4, 32)
    decoded = codec.decoder()(latents)
    states = {}
    for part in ("encoder", "decoder"):
        file = folder / f"taef2_{part}.pth"
        read = read_state_dict(file)
        states[part] = {name: np.asarray(array, np.float64) for name, array in read.items()}
    for image, latent, again in zip(images, latents, decoded, strict=True):
        x = (image.transpose(2, 0, 1).astype(np.float64) + 1) / 2
        np.testing.assert_allclose(
            latent.transpose(2, 0, 1), run(ENCODER_LAYERS, x, states["encoder"]), atol=1e-4
        )
        y = run(DECODER_LAYERS, latent.transpose(2, 0, 1).astype(np.float64), states["decoder"])
        np.testing.assert_allclose(again.transpose(2, 0, 1), 2 * np.clip(y, 0, 1) - 1, atol=1e-4)


@pytest.mark.parity
def test_taef2_reconstructs_a_photograph_and_tiles_are_the_whole():
    """By more than 28 dB; tiles by less than a level of 8 bits: blocks that normalise see all."""
    codec = TAESD(str(weights_folder()))
    image = load_sample_image("flower.jpg")[None, 80:336, 160:416].astype(np.float32) / 127.5 - 1
    latents = codec.encoder()(image)
    made = codec.decoder()(latents)
    assert psnr(made, image) > 28
    tiled = Tiled(codec, tile=24, overlap=16)
    assert np.abs(tiled.decoder()(latents) - made).max() < 2 / 255
    assert np.abs(codec.decoder()(tiled.encoder()(image)) - made).max() < 2 / 255


@pytest.mark.parity
def test_taef2_computes_what_the_authors_code_does():
    """In float64: an emoji of 48x80 pixels, stored by tests/references/taef2.py."""
    codec = TAESD(str(weights_folder()))
    with np.load(taef2.FILE, allow_pickle=False) as stored:
        image, latents, decoded = (stored[name] for name in ("image", "latents", "decoded"))
    assert image.std() > 50
    assert latents.shape == (6, 10, 32)
    found = codec.encoder()(image[None].astype(np.float32) / 127.5 - 1)[0]
    np.testing.assert_allclose(found, latents, atol=1e-4)
    made = codec.decoder()(latents[None])[0]
    np.testing.assert_allclose((made + 1) / 2, decoded, atol=1e-4)


@pytest.mark.parity
@pytest.mark.thorough
def test_emoji_come_back_at_32_db_and_tiles_are_the_whole():
    """Half of @lobehub/fluent-emoji-3d, of 256x256 pixels on white, or 20 of them."""
    folder = Path(os.environ.get("DIFFJAX_FLUENT_EMOJI", "no such folder"))
    if not folder.is_dir():
        pytest.skip("no emoji: set DIFFJAX_FLUENT_EMOJI to assets/ of @lobehub/fluent-emoji-3d")
    number = int(os.environ.get("DIFFJAX_NUM_EMOJI", "20"))
    data = image_folder(str(folder), image_size=256, test_fraction=0)
    codec = TAESD(str(weights_folder()))
    tiled = Tiled(codec, tile=24, overlap=16)
    qualities = []
    for batch in eval_batches(data.train, batch_size=10, limit_images=number):
        images = batch["image"]
        latents = codec.encoder()(images)
        made = codec.decoder()(latents)
        qualities += [psnr(one, image) for one, image in zip(made, images, strict=True)]
        again = codec.decoder()(tiled.encoder()(images[:2]))
        assert np.abs(again - made[:2]).max() < 2 / 255
        assert np.abs(tiled.decoder()(latents[:2]) - made[:2]).max() < 2 / 255
    assert np.median(qualities) > 32
    assert len(qualities) == number


@pytest.mark.parity
@pytest.mark.parametrize("channels", [4, 16])
def test_the_file_of_diffusers_is_read_and_computes_what_diffusers_does(channels, tmp_path):
    """`AutoencoderTiny`, with gradients; torch computes in float64."""
    torch = pytest.importorskip("torch", reason="pip install -e '.[parity]'")
    diffusers = pytest.importorskip("diffusers")
    peer = diffusers.AutoencoderTiny(latent_channels=channels)
    shapes = {name: tuple(x.shape) for name, x in peer.state_dict().items()}
    # Kernels so weak that what is rectified is neither all nor nothing.
    state = {name: x * (0.1 if x.ndim == 4 else 1.0) for name, x in drawn(shapes).items()}
    peer.load_state_dict({name: torch.tensor(x) for name, x in state.items()})
    peer.save_pretrained(tmp_path)
    found = find_published(tmp_path)
    network, params = found.network, found.params()
    assert (network, found.layout) == (Network(channels), "diffusers")
    config: Any = DIFFUSERS.config
    write_folder(tmp_path / "ours", DIFFUSERS.to_theirs(params, network), config.entries(network))
    peer = diffusers.AutoencoderTiny.from_pretrained(tmp_path / "ours")
    for name, array in peer.state_dict().items():
        np.testing.assert_array_equal(array.numpy(), state[name])

    rng = np.random.default_rng(0)
    images = rng.uniform(-1, 1, (2, 16, 24, 3)).astype(np.float32)
    latents = rng.normal(size=(2, 2, 3, channels)).astype(np.float32)
    x, z = (
        torch.tensor(a.transpose(0, 3, 1, 2)).double().requires_grad_() for a in (images, latents)
    )
    peer = peer.double()
    outs = peer.encode(x).latents, peer.decode(z).sample
    inner: Any = sum((out * out).sum() for out in outs)
    inner.backward()

    def total(params, x, z):
        found = [
            network.apply({"params": params}, (x + 1) / 2, method="encode"),
            2 * network.apply({"params": params}, z, method="decode") - 1,
        ]
        return sum((out * out).sum() for out in found), found

    (of_params, *of_inputs), made = jax.jit(jax.grad(total, (0, 1, 2), has_aux=True))(
        params, images, latents
    )
    named = DIFFUSERS.to_theirs(of_params, network)
    theirs = {name: weight.grad for name, weight in peer.named_parameters()}
    pairs = [
        (ours.transpose(0, 3, 1, 2), out.detach()) for ours, out in zip(made, outs, strict=True)
    ]
    pairs += [(a.transpose(0, 3, 1, 2), b.grad) for a, b in zip(of_inputs, (x, z), strict=True)]
    pairs += [(named[name], gradient) for name, gradient in theirs.items()]
    for ours, expected in pairs:
        expected = expected.numpy()
        error = np.linalg.norm(ours - expected) / np.linalg.norm(expected)
        assert error < 1e-5


def psnr(one: np.ndarray, other: np.ndarray) -> float:
    return float(20 * np.log10(2 / np.sqrt(np.mean((one - other) ** 2))))


def test_weights_are_read_when_they_are_needed_and_checked(tmp_path):
    codec = TAESD(str(tmp_path))
    assert codec.image_shape((2, 2, 32)) == (16, 16, 3)
    with pytest.raises(UserError, match=r"can't read the weights .*taef2_encoder\.pth"):
        codec.decoder()(np.zeros((1, 2, 2, 32), np.float32))
    (tmp_path / "taef2_encoder.pth").write_bytes(b"other")
    with pytest.raises(UserError, match="has sha256"):
        _ = codec.params
    with pytest.raises(UserError, match="needs its weights: set path"):
        _ = TAESD().params


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: TAESD(size="taesd2"), "no TAESD encoder network is called 'taesd2'"),
        (lambda: TAESD().latent_shape((12, 8, 3)), "multiples of 8, not 12x8 with 3"),
        (lambda: TAESD().latent_shape((8, 8, 1)), "8x8 with 1 channels"),
        (lambda: TAESD().image_shape((4, 4, 16)), "latents of 32 channels, not 16"),
    ],
)
def test_other_shapes_and_sizes_are_refused(call, message):
    with pytest.raises(UserError, match=message):
        call()
