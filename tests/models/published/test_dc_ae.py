"""DC-AE against diffusers, of both kinds: outputs, gradients, folders both ways."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffjax.errors import UserError
from diffjax.models.dc_ae.network import DCAE, averaged, repeated, shuffled, unshuffled
from diffjax.models.dc_ae.published import FAMILY
from diffjax.models.families import find_published
from diffjax.pretrained.folders import write_folder
from tests.references import dc_ae as reference
from tests.support.witnesses import witnesses

CONFIG: Any = FAMILY.config
NETWORKS = {kind: DCAE(**settings) for kind, settings in reference.SETTINGS.items()}


@functools.cache
def drawn_params(kind):
    network = NETWORKS[kind]
    nothing = jax.tree.map(lambda leaf: np.zeros(leaf.shape), FAMILY.shapes(network))
    shapes = {name: x.shape for name, x in FAMILY.to_theirs(nothing, network).items()}
    return FAMILY.to_ours(reference.parameters(shapes), network, "theirs")


def outputs(network, params, images, latents):
    each = (images, "encode"), (latents, "decode")
    return [network.apply({"params": params}, x, method=method) for x, method in each]


def error(found, expected):
    assert found.shape == expected.shape
    return np.linalg.norm(found - expected) / np.linalg.norm(expected)


@pytest.mark.parametrize("kind", [pytest.param("shuffled", marks=pytest.mark.thorough), "strided"])
def test_outputs_are_those_of_diffusers(kind):
    compute = jax.jit(functools.partial(outputs, NETWORKS[kind]))
    found = compute(drawn_params(kind), reference.IMAGES, reference.LATENTS)
    with np.load(reference.FILE, allow_pickle=False) as stored:
        for name, array in zip(("latents", "images"), found, strict=True):
            assert stored[f"{kind}/{name}"].std() > 0.05
            assert error(array, stored[f"{kind}/{name}"]) < 1e-6


def test_shortcuts_are_means_of_pixels_and_channels_and_their_copies():
    """Channel 4c + 2i + j is pixel (i, j) of channel c; means are of neighbouring channels."""
    x = np.arange(48.0, dtype=np.float32).reshape(1, 4, 6, 2)
    squares = np.asarray(unshuffled(x))
    assert squares.shape == (1, 2, 3, 8)
    for c, i, j in ((0, 0, 1), (1, 1, 0)):
        np.testing.assert_array_equal(squares[..., 4 * c + 2 * i + j], x[:, i::2, j::2, c])
    np.testing.assert_array_equal(shuffled(squares), x)
    means = averaged(squares, 2)
    for c in range(2):
        box = x[..., c].reshape(1, 2, 2, 3, 2).mean((2, 4))
        np.testing.assert_allclose(means[..., c], box)
    np.testing.assert_array_equal(averaged(repeated(x, 6), 2), x)
    np.testing.assert_array_equal(repeated(x, 4)[0, 0, 0], [0, 0, 1, 1])


def test_a_config_and_the_tensors_describe_one_network():
    """A level without blocks has channels in diffusers' config, which nothing depends on."""
    for name in ("dc-ae-f64c128-in-1.0", "dc-ae-f32c32-sana-1.0"):
        network = FAMILY.size(name)
        entries = CONFIG.entries(network)
        assert entries["encoder_block_out_channels"][:2] == [128, 256]
        assert DCAE(**CONFIG.settings(entries, "x")) == network
    entries["encoder_layers_per_block"] = entries["decoder_layers_per_block"] = [0, 2, 2, 2, 2, 2]
    entries["encoder_block_out_channels"] = entries["decoder_block_out_channels"] = [
        100, 256, 512, 512, 1024, 1024,
    ]  # fmt: skip
    assert CONFIG.settings(entries, "x")["channels"][0] == 128


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"decoder_block_types": "ResBlock"}, "other types than the decoder's"),
        ({"decoder_norm_types": "layer_norm"}, "residual blocks of the decoder have"),
        ({"decoder_act_fns": "silu"}, "residual blocks of the decoder have"),
        ({"upsample_block_type": "interpolate"}, "halved and doubled in unlike ways"),
        ({"decoder_block_out_channels": [8]}, "encoder_block_out_channels is not decoder_bl"),
        ({"encoder_out_shortcut": False}, "encoder_out_shortcut=False, and only True is known"),
    ],
)
def test_configs_that_describe_no_network_here_are_refused(change, message):
    entries = CONFIG.entries(FAMILY.size("dc-ae-f32c32-in-1.0"))
    with pytest.raises(UserError, match=message):
        CONFIG.settings(entries | change, "x")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"encoder_blocks": (0, 1, 0)}, "only the first level may have no blocks"),
        ({"decoder_blocks": (1, 1, 1)}, "only the first level may have no blocks"),
        ({"channels": (8, 16, 24)}, r"not channels=\(16, 24\)"),
        ({"latent_channels": 5}, "latent_channels=5"),
    ],
)
def test_networks_that_do_not_fit_are_refused(settings, message):
    network = DCAE(**{**reference.SETTINGS["shuffled"], **settings})
    with pytest.raises(UserError, match=message):
        FAMILY.shapes(network)


@pytest.mark.thorough
def test_bfloat16_is_close_and_parameters_stay_float32():
    network = NETWORKS["strided"]
    args = drawn_params("strided"), reference.IMAGES, reference.LATENTS
    exact: Any
    half: Any
    exact, half = (outputs(net, *args) for net in (network, network.clone(dtype="bfloat16")))
    for one, other in zip(half, exact, strict=True):
        assert one.dtype == jnp.float32
        assert error(one, other) < 2e-2


@pytest.mark.parity
@pytest.mark.parametrize("kind", witnesses(NETWORKS, [next(iter(NETWORKS))]))
def test_outputs_and_gradients_are_those_of_diffusers(kind):
    """With respect to inputs and parameters, in float64 there; tiny gradients by the largest."""
    torch = pytest.importorskip("torch", reason="pip install -e '.[parity]'")
    pytest.importorskip("diffusers")
    network, peer = NETWORKS[kind], reference.theirs(kind).double()
    rng = np.random.default_rng(3)
    images = rng.uniform(-1, 1, (2, 24, 16, 3)).astype(np.float32)
    latents = rng.normal(size=(2, 6, 4, 4)).astype(np.float32)
    x, z = (
        torch.tensor(a.transpose(0, 3, 1, 2)).double().requires_grad_() for a in (images, latents)
    )
    outs = peer.encode(x).latent, peer.decode(z).sample
    weights = [rng.normal(size=out.shape).astype(np.float32) for out in outs]
    inner: Any = sum((out * torch.tensor(w)).sum() for out, w in zip(outs, weights, strict=True))
    inner.backward()

    def total(params, x, z):
        found = outputs(network, params, x, z)
        terms = ((o * w.transpose(0, 2, 3, 1)).sum() for o, w in zip(found, weights, strict=True))
        return sum(terms), found

    gradient = jax.jit(jax.grad(total, (0, 1, 2), has_aux=True))
    (of_params, *of_inputs), found = gradient(drawn_params(kind), images, latents)
    for ours, out in zip(found, outs, strict=True):
        assert error(ours.transpose(0, 3, 1, 2), out.detach().numpy()) < 1e-5
    for ours, theirs in zip(of_inputs, (x, z), strict=True):
        assert error(ours.transpose(0, 3, 1, 2), theirs.grad.numpy()) < 1e-5
    named = FAMILY.to_theirs(of_params, network)
    gradients = {name: p.grad.numpy() for name, p in peer.named_parameters()}
    largest = max(np.linalg.norm(g) for g in gradients.values())
    assert set(gradients) <= set(named)
    for name, theirs in gradients.items():
        size = max(np.linalg.norm(theirs), 1e-3 * largest)
        assert np.linalg.norm(named[name] - theirs) < 1e-5 * size, name


@pytest.mark.parity
@pytest.mark.parametrize("kind", [*NETWORKS])
def test_folders_of_diffusers_are_read_and_written(kind, tmp_path):
    pytest.importorskip("torch", reason="pip install -e '.[parity]'")
    pytest.importorskip("diffusers")
    network, params, peer = NETWORKS[kind], drawn_params(kind), reference.theirs(kind)
    peer.save_pretrained(tmp_path / "theirs")
    found = find_published(tmp_path / "theirs")
    assert (found.network, found.layout) == (network, "diffusers")
    jax.tree.map(np.testing.assert_array_equal, found.params(), params)
    write_folder(tmp_path / "ours", FAMILY.to_theirs(params, network), CONFIG.entries(network))
    again = type(peer).from_pretrained(tmp_path / "ours").state_dict()
    for name, array in peer.state_dict().items():
        np.testing.assert_array_equal(again[name].numpy(), array.numpy())
