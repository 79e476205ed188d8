"""FLUX.2's autoencoder and MOVQ against diffusers, in the layouts of both and of their authors."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffjax.models.autoencoder_kl.network import AutoencoderKL, AutoencoderKLFlux2
from diffjax.models.autoencoder_kl.published import FLUX2, FLUX2_AUTHORS, LDM, read
from diffjax.models.families import find_published
from diffjax.models.movq import published as movq
from diffjax.models.movq.network import MOVQ
from diffjax.pretrained.files import write_safetensors
from tests.references import autoencoder_kl_kinds as reference
from tests.references.autoencoder_kl import parameters

FLUX2_NETWORK = AutoencoderKLFlux2(**reference.FLUX2)
MOVQ_NETWORK = MOVQ(**reference.MOVQ)
FAMILIES = {"FLUX2": (FLUX2, FLUX2_NETWORK), "MOVQ": (movq.FAMILY, MOVQ_NETWORK)}


@functools.cache
def drawn_params(name):
    family, network = FAMILIES[name]
    nothing = jax.tree.map(lambda leaf: np.zeros(leaf.shape), family.shapes(network))
    shapes = {name: x.shape for name, x in family.to_theirs(nothing, network).items()}
    return family.to_ours(reference.positive(parameters(shapes)), network, "theirs")


def outputs(network, params, images, latents):
    """By the names of the stored arrays."""

    def apply(x, method):
        return network.apply({"params": params}, x, method=method)

    if isinstance(network, MOVQ):
        both = jnp.concatenate([latents, apply(latents, "quantise")])
        plain, quantised = jnp.split(apply(both, "decode"), 2)
        return {"latents": apply(images, "encode"), "images": plain, "quantised": quantised}
    packed = apply(apply(images, "encode").mean, "pack")
    again = apply(packed, "unpack")
    return {"latents": packed, "images": apply(latents, "decode"), "unpacked": again}


def assert_close(found, expected, least=0.01):
    found, expected = np.asarray(found), np.asarray(expected)
    assert found.shape == expected.shape
    assert expected.std() > least
    error = np.linalg.norm(found - expected) / np.linalg.norm(expected)
    assert error < 1e-5, error


# FLUX.2's is the network of test_autoencoder_kl.py, but for what is packed, which has a test below.
@pytest.mark.parametrize(
    "name", [pytest.param("FLUX2", marks=pytest.mark.thorough(tenth=False)), "MOVQ"]
)
def test_outputs_are_those_of_diffusers(name):
    """FLUX.2's latents are packed to 2x2 and normalised by its batch norm, in evaluation mode."""
    _, network = FAMILIES[name]
    compute = jax.jit(functools.partial(outputs, network))
    found = compute(drawn_params(name), reference.IMAGES, reference.LATENTS)
    with np.load(reference.FOLDER / f"{name}.npz", allow_pickle=False) as stored:
        for key in stored.files:
            assert_close(found[key], stored[key])
        if name == "MOVQ":
            assert np.abs(stored["images"] - stored["quantised"]).max() > 0.01


def test_codes_are_the_nearest_and_their_gradient_is_that_of_the_identity():
    codes = jnp.asarray([[0.0, 0.0], [3.0, 0.0], [0.0, 5.0]])
    network = MOVQ(2, 3, (8,), 1, num_groups=2)
    z = jnp.asarray([[0.9, 1.0], [1.6, -1.0], [-7.0, 4.0]]).reshape(1, 1, 3, 2)

    @jax.jit
    def quantised(z):
        return network.apply({"params": {"codebook": codes}}, z, method="quantise")

    np.testing.assert_allclose(quantised(z)[0, 0], codes)
    gradient = jax.grad(lambda z: jnp.sum(jnp.square(quantised(z))))(z)
    np.testing.assert_allclose(gradient[0, 0], 2 * codes)  # 2 q · 1


def test_packed_latents_are_squares_by_channel_row_and_column():
    """(c, row, column), unlike space to depth; mean 1 and variance 4 - 1e-4 make (z - 1) / 2."""
    network = AutoencoderKLFlux2(3, channels=(8, 8), num_groups=2)
    z = np.random.default_rng(0).normal(size=(2, 4, 6, 3)).astype(np.float32)
    statistics = {"mean": np.ones(12, np.float32), "variance": np.full(12, 4 - 1e-4, np.float32)}
    variables = {"params": {"statistics": statistics}}
    packed: Any = network.apply(variables, z, method="pack")
    assert (packed.shape, network.scale, network.packed_channels) == ((2, 2, 3, 12), 4, 12)
    for c, i, j in ((0, 0, 1), (2, 1, 0)):
        expected = (z[:, i::2, j::2, c] - 1) / 2
        np.testing.assert_allclose(packed[..., 4 * c + 2 * i + j], expected, rtol=1e-5, atol=1e-6)
    back = network.apply(variables, packed, method="unpack")
    np.testing.assert_allclose(back, z, rtol=1e-5, atol=1e-6)


@pytest.mark.thorough
@pytest.mark.parametrize(
    ("layout", "layouts", "network"),
    [
        (FLUX2, None, AutoencoderKLFlux2(channels=(32, 64), num_res_blocks=1)),
        (FLUX2_AUTHORS, None, AutoencoderKLFlux2(channels=(32, 64), num_res_blocks=1)),
        (LDM, None, AutoencoderKL(4, channels=(32, 64), attention_levels=(1,))),
        (movq.FAMILY, movq.LAYOUTS, MOVQ_NETWORK),
        (movq.KANDINSKY, movq.LAYOUTS, MOVQ_NETWORK),
    ],
)
def test_files_of_all_layouts_are_recognised_and_read(layout, layouts, network, tmp_path):
    """With the count of batches that FLUX.2's batch norm keeps."""
    rng = np.random.default_rng(0)
    params = jax.tree.map(lambda x: rng.random(x.shape, np.float32), layout.shapes(network))
    state = layout.to_theirs(params, network)
    if "bn.running_mean" in state:
        state["bn.num_batches_tracked"] = np.array(3)
    write_safetensors(tmp_path / "w.safetensors", state)
    found, back = read(tmp_path / "w.safetensors", None, *([layouts] if layouts else []))
    assert found == network
    jax.tree.map(np.testing.assert_array_equal, back, params)


@pytest.mark.thorough(tenth=False)
def test_names_are_those_of_the_authors():
    """FLUX.2's affine maps within encoder and decoder; MOVQ's norms and attention of its level."""
    nothing = jax.tree.map(lambda x: np.zeros(x.shape), FLUX2_AUTHORS.shapes(FLUX2_NETWORK))
    flux2 = FLUX2_AUTHORS.to_theirs(nothing, FLUX2_NETWORK)
    assert flux2["encoder.quant_conv.weight"].shape == (8, 8, 1, 1)
    assert flux2["decoder.post_quant_conv.weight"].shape == (4, 4, 1, 1)
    assert flux2["bn.running_var"].shape == (16,)
    nothing = jax.tree.map(lambda x: np.zeros(x.shape), movq.KANDINSKY.shapes(MOVQ_NETWORK))
    names = movq.KANDINSKY.to_theirs(nothing, MOVQ_NETWORK)
    assert names["decoder.up.1.attn.1.norm.norm_layer.weight"].shape == (64,)
    assert names["decoder.up.0.block.0.norm1.conv_y.weight"].shape == (64, 4, 1, 1)
    assert names["decoder.norm_out.conv_b.bias"].shape == (32,)
    assert names["encoder.down.1.attn.0.norm.weight"].shape == (64,)


@pytest.mark.parity
@pytest.mark.parametrize("name", [*FAMILIES])
def test_outputs_and_gradients_are_those_of_diffusers(name):
    """On other images than the stored ones; diffusers computes in float64."""
    torch = pytest.importorskip("torch", reason="pip install -e '.[parity]'")
    pytest.importorskip("diffusers")
    family, network = FAMILIES[name]
    peer = {"FLUX2": reference.flux2, "MOVQ": reference.movq}[name]().double()
    state = {key: x.numpy().astype(np.float32) for key, x in peer.state_dict().items() if x.ndim}
    params = family.to_ours(state, network, "theirs")
    rng = np.random.default_rng(3)
    images = rng.uniform(-1, 1, (2, 24, 16, 3)).astype(np.float32)
    latents = rng.normal(size=(2, 6, 4, 4)).astype(np.float32)
    x, z = (reference.channels_first(a).double().requires_grad_() for a in (images, latents))
    if name == "MOVQ":
        quantised = peer.decode(z).sample
        outs = peer.encode(x).latents, peer.decode(z, force_not_quantize=True).sample, quantised
    else:
        mean = peer.encode(x).latent_dist.mean
        packed = mean.reshape(2, 4, 3, 2, 2, 2).permute(0, 1, 3, 5, 2, 4).reshape(2, 16, 3, 2)
        outs = peer.bn(packed), peer.decode(z).sample, mean
    weights = [rng.normal(size=out.shape).astype(np.float32) for out in outs]
    inner: Any = sum((out * torch.tensor(w)).sum() for out, w in zip(outs, weights, strict=True))
    inner.backward()

    def total(params, x, z):
        found = [*outputs(network, params, x, z).values()]
        terms = ((o * w.transpose(0, 2, 3, 1)).sum() for o, w in zip(found, weights, strict=True))
        return sum(terms), found

    gradient = jax.jit(jax.grad(total, (0, 1, 2), has_aux=True))
    (of_params, of_x, of_z), found = gradient(params, images, latents)
    for ours, out in zip(found, outs, strict=True):
        assert_close(ours, out.detach().numpy().transpose(0, 2, 3, 1))
    for ours, theirs in ((of_x, x), (of_z, z)):
        assert_close(np.asarray(ours).transpose(0, 3, 1, 2), theirs.grad.numpy(), least=0.0)
    named = family.to_theirs(of_params, network)
    gradients = {key: x.grad.numpy() for key, x in peer.named_parameters() if x.grad is not None}
    largest = max(np.linalg.norm(x) for x in gradients.values())
    assert len(gradients) > 60
    for key, theirs in gradients.items():
        # Small ones are differences of large terms.
        size = max(np.linalg.norm(theirs), 1e-4 * largest)
        if np.linalg.norm(theirs) < 1e-10 * largest:
            # Zero: a softmax ignores constants, norms of single channels their biases.
            size = largest
        # Two sums of float32, each with its own rounding: 1.1e-5 on an Intel Xeon.
        assert np.linalg.norm(named[key] - theirs) < 2e-5 * size, key


@pytest.mark.parity
@pytest.mark.parametrize("name", [*FAMILIES])
def test_diffusers_reads_what_is_written(name, tmp_path):
    pytest.importorskip("diffusers", reason="pip install -e '.[parity]'")
    family, network = FAMILIES[name]
    peer = {"FLUX2": reference.flux2, "MOVQ": reference.movq}[name]()
    peer.save_pretrained(tmp_path)
    rng = np.random.default_rng(0)
    params = jax.tree.map(lambda x: rng.random(x.shape, np.float32), family.shapes(network))
    expected = family.to_theirs(params, network)
    write_safetensors(tmp_path / "diffusion_pytorch_model.safetensors", expected)
    again = find_published(tmp_path)
    assert (again.network, again.layout) == (network, "diffusers")
    jax.tree.map(np.testing.assert_array_equal, again.params(), params)
    described = type(peer).from_config(family.config.entries(network)).state_dict()
    found = type(peer).from_pretrained(tmp_path).state_dict()
    assert {key: x.shape for key, x in described.items()} == {k: x.shape for k, x in found.items()}
    assert set(found) - set(expected) <= {"bn.num_batches_tracked"}
    for key, array in expected.items():
        np.testing.assert_array_equal(found[key].numpy(), array, key)
