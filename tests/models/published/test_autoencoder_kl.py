"""AutoencoderKL against diffusers: stored outputs, and the library itself where it is installed."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffjax.models.autoencoder_kl.network import AutoencoderKL, Posterior
from diffjax.models.autoencoder_kl.published import FAMILY, LDM, OLD_DIFFUSERS, read
from diffjax.models.unet import GroupNorm
from diffjax.pretrained.files import write_safetensors
from tests.references import autoencoder_kl as reference
from tests.support.witnesses import witnesses

NETWORK = AutoencoderKL(**reference.SETTINGS)


@functools.cache
def shapes_of(network):
    return FAMILY.shapes(network)


@functools.cache
def drawn_params(network):
    """The parameters that the reference drew by the names of diffusers."""
    nothing = jax.tree.map(lambda leaf: np.zeros(leaf.shape), shapes_of(network))
    shapes = {name: x.shape for name, x in FAMILY.to_theirs(nothing, network).items()}
    return FAMILY.to_ours(reference.parameters(shapes), network, "theirs")


def apply(network, params, x, method):
    return jax.jit(lambda params, x: network.apply({"params": params}, x, method=method))(params, x)


def assert_close(found, expected, least=0.01):
    """To 1e-5; deviations of at least `least` show that not all numbers are those of a bias."""
    found, expected = np.asarray(found), np.asarray(expected)
    assert found.shape == expected.shape
    assert expected.std() > least
    error = np.linalg.norm(found - expected) / np.linalg.norm(expected)
    assert error < 1e-5, error


def test_outputs_are_those_of_diffusers():
    params = drawn_params(NETWORK)
    with np.load(reference.FILE, allow_pickle=False) as stored:
        posterior = apply(NETWORK, params, jnp.asarray(reference.IMAGES), "encode")
        assert_close(posterior.mean, stored["mean"])
        assert_close(posterior.log_variance, stored["log_variance"])
        images = apply(NETWORK, params, jnp.asarray(reference.LATENTS), "decode")
        assert_close(images, stored["images"])


@pytest.mark.thorough
def test_half_precision_is_close():
    """To 2e-2 in bfloat16, with outputs in float32."""
    params = drawn_params(NETWORK)
    half = NETWORK.clone(dtype="bfloat16")
    with np.load(reference.FILE, allow_pickle=False) as stored:
        posterior = apply(half, params, jnp.asarray(reference.IMAGES), "encode")
        images = apply(half, params, jnp.asarray(reference.LATENTS), "decode")
        for found, name in ((posterior.mean, "mean"), (images, "images")):
            assert found.dtype == jnp.float32
            error = np.linalg.norm(found - stored[name]) / np.linalg.norm(stored[name])
            assert error < 2e-2, name


def test_norms_of_two_passes_are_exact_where_the_mean_is_large():
    """Of 3000 + N(0, 1) in float32; a difference of squares has no correct digit there."""
    x = (3000 + np.random.default_rng(0).normal(size=(1, 8, 8, 4))).astype(np.float32)
    groups = x.astype(np.float64).reshape(1, 64, 2, 2)
    center = groups - groups.mean((1, 3), keepdims=True)
    expected = center / np.sqrt((center**2).mean((1, 3), keepdims=True) + 1e-6)
    params = {"scale": np.ones(4, np.float32), "bias": np.zeros(4, np.float32)}
    norm = GroupNorm(2, jnp.dtype("float32"), 1e-6, two_pass=True)
    found = jax.jit(norm.apply)({"params": params}, x)
    np.testing.assert_allclose(found, expected.reshape(x.shape), atol=1e-3)


def test_samples_of_the_posterior_have_its_moments():
    """Over 40,000 samples: mean and deviation to five standard errors; exp(-6/2) is 0.0498."""
    posterior = Posterior(jnp.full((1, 200, 200, 1), 2.0), jnp.full((1, 200, 200, 1), -6.0))
    samples = np.asarray(posterior.sample(jax.random.key(0)), np.float64)
    assert samples.mean() == pytest.approx(2.0, abs=5 * np.exp(-3) / 200)
    assert samples.std() == pytest.approx(np.exp(-3), rel=5 / np.sqrt(80_000))


@pytest.mark.parametrize(
    ("layout", "prefix"), [(FAMILY, ""), (OLD_DIFFUSERS, "vae."), (LDM, "first_stage_model.")]
)
def test_files_of_all_layouts_are_read_alone_and_within_whole_models(layout, prefix, tmp_path):
    network = AutoencoderKL(channels=(32, 64), num_res_blocks=1)
    rng = np.random.default_rng(0)
    params = jax.tree.map(lambda x: rng.random(x.shape, np.float32), shapes_of(network))
    state = {prefix + name: x for name, x in layout.to_theirs(params, network).items()}
    others = {"model.diffusion_model.out.2.bias": np.zeros(4, np.float32)} if prefix else {}
    if layout is LDM:
        others[f"{prefix}loss.logvar"] = np.zeros((), np.float32)
    write_safetensors(tmp_path / "w.safetensors", state | others)
    found, back = read(tmp_path / "w.safetensors")
    assert found == network
    jax.tree.map(np.testing.assert_array_equal, back, params)


def test_layouts_differ_as_published():
    """Levels of the decoder are numbered from both ends; attention is convolutions in LDM."""
    nothing = jax.tree.map(lambda x: np.zeros(x.shape, np.float32), shapes_of(NETWORK))
    states = [family.to_theirs(nothing, NETWORK) for family in (FAMILY, OLD_DIFFUSERS, LDM)]
    for state, first, query, shape in zip(
        states,
        ("up_blocks.0.resnets.0", "up_blocks.0.resnets.0", "up.2.block.0"),
        ("mid_block.attentions.0.to_q", "mid_block.attentions.0.query", "mid.attn_1.q"),
        ((16, 16), (16, 16), (16, 16, 1, 1)),
        strict=True,
    ):
        assert state[f"decoder.{first}.conv1.weight"].shape == (16, 16, 3, 3)
        assert state[f"decoder.{query}.weight"].shape == shape
    assert "decoder.up_blocks.2.upsamplers.0.conv.weight" not in states[0]
    assert "decoder.up.0.upsample.conv.weight" not in states[2]
    assert states[2]["decoder.up.0.block.0.nin_shortcut.weight"].shape == (8, 12, 1, 1)


@pytest.fixture(scope="module")
def diffusers():
    return pytest.importorskip("diffusers", reason="pip install -e '.[parity]'")


def channels_first(x):
    return np.asarray(x).transpose(0, 3, 1, 2)


@pytest.mark.parity
@pytest.mark.usefixtures("diffusers")
class TestAgainstDiffusers:
    @pytest.mark.parametrize(
        ("channels", "quant_convs"), witnesses([(4, True), (16, False)], [(4, True)])
    )
    def test_outputs_and_gradients_are_equal(self, channels, quant_convs):
        """On larger images than the stored ones; gradients with respect to inputs and weights.

        Diffusers computes in float64: its float32 has errors up to 2e-5 in gradients of attention.
        """
        torch = pytest.importorskip("torch")
        peer = reference.theirs(channels, quant_convs).double()
        network = AutoencoderKL(channels, quant_convs, **reference.SETTINGS)
        state = {name: x.numpy().astype(np.float32) for name, x in peer.state_dict().items()}
        params = FAMILY.to_ours(state, network, "theirs")
        assert_trees_equal(FAMILY.to_theirs(params, network), state)

        rng = np.random.default_rng(3)
        images = rng.uniform(-1, 1, (2, 24, 16, 3)).astype(np.float32)
        latents = rng.normal(size=(2, 6, 4, channels)).astype(np.float32)
        x = torch.tensor(channels_first(images), dtype=torch.float64, requires_grad=True)
        z = torch.tensor(channels_first(latents), dtype=torch.float64, requires_grad=True)
        posterior, decoded = peer.encode(x).latent_dist, peer.decode(z).sample
        weights = [
            rng.normal(size=out.shape).astype(np.float32)
            for out in (posterior.mean, posterior.logvar, decoded)
        ]
        outs = posterior.mean, posterior.logvar, decoded
        inner: Any = sum(
            (out * torch.tensor(w)).sum() for out, w in zip(outs, weights, strict=True)
        )
        inner.backward()

        def total(params, x, z):
            found: Any = network.apply({"params": params}, x, method="encode")
            outs = *found, network.apply({"params": params}, z, method="decode")
            inner = (
                (out * w.transpose(0, 2, 3, 1)).sum() for out, w in zip(outs, weights, strict=True)
            )
            return sum(inner), outs

        gradient = jax.jit(jax.grad(total, (0, 1, 2), has_aux=True))
        (of_params, of_x, of_z), found = gradient(params, images, latents)
        for ours, out in zip(found, outs, strict=True):
            assert_close(channels_first(ours), out.detach().numpy())
        assert_close(channels_first(of_x), x.grad.numpy(), least=0.0)
        assert_close(channels_first(of_z), z.grad.numpy(), least=0.0)
        named = FAMILY.to_theirs(of_params, network)
        for name, weight in peer.named_parameters():
            if not name.endswith("to_k.bias"):  # zero up to rounding: a softmax ignores constants
                assert_close(named[name], weight.grad.numpy(), least=0.0)

    def test_ldm_files_are_converted_as_diffusers_does(self):
        torch, utils = map(pytest.importorskip, ("torch", "diffusers.loaders.single_file_utils"))
        params = drawn_params(NETWORK)
        state = {k: torch.tensor(x.copy()) for k, x in LDM.to_theirs(params, NETWORK).items()}
        blocks = {"down_block_types": ["D"] * 3, "up_block_types": ["U"] * 3}
        converted = utils.convert_ldm_vae_checkpoint(state, blocks)
        found = {name: x.numpy() for name, x in converted.items()}
        assert_trees_equal(found, FAMILY.to_theirs(params, NETWORK))

    def test_old_names_are_read_by_diffusers_too(self, tmp_path):
        peer = reference.theirs()
        peer.save_pretrained(tmp_path)
        params = drawn_params(NETWORK)
        write_safetensors(
            tmp_path / "diffusion_pytorch_model.safetensors",
            OLD_DIFFUSERS.to_theirs(params, NETWORK),
        )
        read_again = type(peer).from_pretrained(tmp_path)
        found = {name: x.numpy() for name, x in read_again.state_dict().items()}
        assert_trees_equal(found, FAMILY.to_theirs(params, NETWORK))


def assert_trees_equal(found, expected):
    assert found.keys() == expected.keys()
    for name, array in expected.items():
        np.testing.assert_array_equal(found[name], array, name)
