"""RAE against diffusers: outputs of images that are resized, gradients, folders both ways."""

import functools
from typing import Any

import jax
import numpy as np
import pytest

from diffjax.models.families import find_published
from diffjax.models.rae.network import RAE
from diffjax.models.rae.published import FAMILY, OLD
from diffjax.pretrained.folders import write_folder
from tests.references import rae as reference

NETWORK = RAE(**reference.SETTINGS)
CONFIG: Any = FAMILY.config


@functools.cache
def drawn_params():
    nothing = jax.tree.map(lambda leaf: np.zeros(leaf.shape), FAMILY.shapes(NETWORK))
    shapes = {name: x.shape for name, x in FAMILY.to_theirs(nothing, NETWORK).items()}
    return FAMILY.to_ours(reference.parameters(shapes), NETWORK, "theirs")


def outputs(params, images, latents):
    each = (images, "encode"), (latents, "decode")
    return [NETWORK.apply({"params": params}, x, method=method) for x, method in each]


def error(found, expected):
    assert found.shape == expected.shape
    return np.linalg.norm(found - expected) / np.linalg.norm(expected)


PLAIN = NETWORK.clone(normalised=False)


def without_statistics():
    """The parameters of PLAIN, and the mean and the deviation that it lacks."""
    params = dict(drawn_params())
    mean, deviation = params.pop("latents_mean"), params.pop("latents_deviation")
    return params, mean, deviation


@functools.cache
def found_here():
    """Latents, images, and latents without statistics."""

    @jax.jit
    def all_of(params, plain):
        tokens = PLAIN.apply({"params": plain}, reference.IMAGES, method="encode")
        return *outputs(params, reference.IMAGES, reference.LATENTS), tokens

    return jax.device_get(all_of(drawn_params(), without_statistics()[0]))


def test_outputs_are_those_of_diffusers():
    """A rectangle that is resized to a square, on other positions than DINOv2 has."""
    with np.load(reference.FILE, allow_pickle=False) as stored:
        for name, array in zip(("latents", "images"), found_here()[:2], strict=True):
            assert stored[name].std() > 0.1
            assert error(array, stored[name]) < 5e-6


def test_without_statistics_latents_are_the_tokens():
    plain, (params, mean, deviation) = PLAIN, without_statistics()
    assert jax.tree.structure(FAMILY.shapes(plain)) == jax.tree.structure(params)
    entries = CONFIG.entries(plain)
    assert RAE(**CONFIG.settings(entries, "x")) == plain
    assert FAMILY.to_theirs(params, plain)["_latents_std"].tolist() == [1.0]
    with np.load(reference.FILE, allow_pickle=False) as stored:
        expected = stored["latents"] * (deviation + 1e-5) + mean
    assert error(found_here()[2], expected) < 5e-6


def test_names_of_transformers_4_are_read():
    theirs = OLD.to_theirs(drawn_params(), NETWORK)
    name = "encoder.encoder.layer.1.attention.attention.query.weight"
    new = FAMILY.to_theirs(drawn_params(), NETWORK)
    np.testing.assert_array_equal(
        theirs[name], new["encoder.encoder.layer.1.attention.q_proj.weight"]
    )
    assert "encoder.encoder.layer.0.attention.output.dense.bias" in theirs


@pytest.mark.parity
def test_outputs_and_gradients_are_those_of_diffusers():
    """With respect to inputs and parameters, in float64 there."""
    torch = pytest.importorskip("torch", reason="pip install -e '.[parity]'")
    pytest.importorskip("diffusers")
    pytest.importorskip("transformers")
    peer = reference.theirs().double().requires_grad_()
    rng = np.random.default_rng(3)
    images = rng.uniform(0, 1, (2, 48, 36, 3)).astype(np.float32)
    latents = rng.normal(size=(2, 3, 3, 128)).astype(np.float32)
    x, z = (
        torch.tensor(a.transpose(0, 3, 1, 2)).double().requires_grad_() for a in (images, latents)
    )
    outs = peer.encode(x).latent, peer.decode(z).sample
    weights = [rng.normal(size=out.shape).astype(np.float32) for out in outs]
    inner: Any = sum((out * torch.tensor(w)).sum() for out, w in zip(outs, weights, strict=True))
    inner.backward()

    def total(params, x, z):
        found = outputs(params, x, z)
        terms = ((o * w.transpose(0, 2, 3, 1)).sum() for o, w in zip(found, weights, strict=True))
        return sum(terms), found

    gradient = jax.jit(jax.grad(total, (0, 1, 2), has_aux=True))
    (of_params, *of_inputs), found = gradient(drawn_params(), images, latents)
    for ours, out in zip(found, outs, strict=True):
        assert error(ours.transpose(0, 3, 1, 2), out.detach().numpy()) < 1e-5
    for ours, theirs in zip(of_inputs, (x, z), strict=True):
        assert error(ours.transpose(0, 3, 1, 2), theirs.grad.numpy()) < 1e-5
    named = FAMILY.to_theirs(of_params, NETWORK)
    gradients = {name: p.grad.numpy() for name, p in peer.named_parameters() if p.grad is not None}
    largest = max(np.linalg.norm(g) for g in gradients.values())
    assert len(gradients) > 60
    for name, theirs in gradients.items():
        # Those of the keys' biases are zero.
        size = max(np.linalg.norm(theirs), 1e-2 * largest)
        assert np.linalg.norm(named[name] - theirs) < 1e-5 * size, name


@pytest.mark.parity
def test_folders_of_diffusers_are_read_and_written(tmp_path):
    pytest.importorskip("torch", reason="pip install -e '.[parity]'")
    pytest.importorskip("diffusers")
    pytest.importorskip("transformers")
    peer, params = reference.theirs(), drawn_params()
    peer.save_pretrained(tmp_path / "theirs")
    found = find_published(tmp_path / "theirs")
    assert (found.network, found.layout) == (NETWORK, "diffusers")
    jax.tree.map(np.testing.assert_array_equal, found.params(), params)
    write_folder(tmp_path / "ours", FAMILY.to_theirs(params, NETWORK), CONFIG.entries(NETWORK))
    again = type(peer).from_pretrained(tmp_path / "ours").state_dict()
    for name, array in peer.state_dict().items():
        if not name.endswith("mask_token"):
            np.testing.assert_array_equal(again[name].numpy(), array.numpy(), name)
