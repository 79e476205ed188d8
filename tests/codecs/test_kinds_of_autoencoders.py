"""FLUX.2, EDM2, MOVQ, DC-AE and RAE as codecs: scales, posteriors, tiles and shapes."""

import hashlib
from typing import Any

import jax
import numpy as np
import pytest

from diffjax.codecs import Tiled
from diffjax.codecs.autoencoder_kl import AutoencoderKL
from diffjax.codecs.dc_ae import DCAE
from diffjax.codecs.movq import MOVQ
from diffjax.codecs.rae import RAE
from diffjax.codecs.scaled import ScaledLatents
from diffjax.errors import UserError
from diffjax.models.autoencoder_kl.network import AutoencoderKL as Network
from diffjax.models.autoencoder_kl.network import AutoencoderKLFlux2
from diffjax.models.autoencoder_kl.published import FLUX2_AUTHORS, LDM
from diffjax.models.autoencoder_kl.sizes import SCALINGS
from diffjax.models.dc_ae.network import DCAE as DCAENetwork
from diffjax.models.dc_ae.published import FAMILY as DC_AE
from diffjax.models.dc_ae.sizes import SCALES, SIZES
from diffjax.models.rae.network import RAE as RAENetwork
from diffjax.models.rae.published import FAMILY as RAE_FAMILY
from diffjax.pretrained.files import write_safetensors

SMALL = {"channels": (8,), "num_res_blocks": 1, "num_groups": 2}
NETWORKS = {
    "edm2": (Network(4, **SMALL), LDM),
    "flux2": (AutoencoderKLFlux2(4, **SMALL), FLUX2_AUTHORS),
}


class Small(AutoencoderKL):
    """The codec with a small network."""

    @property
    def _network(self):
        return NETWORKS[self.size][0]


def codec_of(size, tmp_path):
    network, layout = NETWORKS[size]
    rng = np.random.default_rng(0)
    params = jax.tree.map(lambda x: rng.uniform(0.01, 0.1, x.shape), layout.shapes(network))
    path = tmp_path / "ae.safetensors"
    write_safetensors(path, layout.to_theirs(params, network))
    return Small(str(path), size, hashlib.sha256(path.read_bytes()).hexdigest())


IMAGES = np.random.default_rng(1).uniform(-1, 1, (2, 4, 6, 3)).astype(np.float32)


@pytest.mark.thorough(tenth=False)
def test_latents_of_edm2_are_scaled_by_its_statistics_of_each_channel(tmp_path):
    """(z − mean) · 0.5 / std, as `edm2/training/encoders.py` states it, and their deviations."""
    codec = codec_of("edm2", tmp_path)
    network, params = codec._network, codec.params
    plain: Any = jax.jit(lambda x: network.apply({"params": params}, x, method="encode"))(IMAGES)
    plain = type(plain)(*map(np.asarray, plain))
    mean, std = np.array([5.81, 3.25, 0.12, -2.15]), np.array([4.17, 4.62, 3.71, 3.28])
    expected = (plain.mean - mean) * 0.5 / std
    np.testing.assert_allclose(codec.encoder()(IMAGES), expected, rtol=1e-5, atol=1e-5)
    keys = jax.random.split(jax.random.key(0), 2)
    posterior = jax.jit(codec.posterior)(codec.params, IMAGES)
    noise = (posterior.samples(keys) - posterior.mean) / np.exp(posterior.log_variance / 2)
    each = [jax.random.normal(key, (4, 6, 4)) for key in keys]
    np.testing.assert_allclose(noise, each, rtol=1e-3, atol=1e-3)
    deviation = np.exp(plain.log_variance / 2) * 0.5 / std
    np.testing.assert_allclose(np.exp(posterior.log_variance / 2), deviation, rtol=1e-4)
    assert codec.stochastic
    assert SCALINGS["edm2"].shift == tuple(mean)


def test_latents_of_flux2_are_packed_means_without_a_posterior(tmp_path):
    codec = codec_of("flux2", tmp_path)
    latents = codec.encoder()(IMAGES)
    assert latents.shape == (2, *codec.latent_shape((4, 6, 3))) == (2, 2, 3, 16)
    assert codec.image_shape((2, 3, 16)) == (4, 6, 3)
    network, params = codec._network, codec.params

    @jax.jit
    def apply(images):
        posterior: Any = network.apply({"params": params}, images, method="encode")
        return posterior.mean, network.apply({"params": params}, posterior.mean, method="decode")

    mean, decoded = apply(IMAGES)
    statistics = params["statistics"]
    at = 4 * 3 + 2 * 1 + 0  # channel 3, row 1, column 0 of a square
    expected = mean[:, 1::2, ::2, 3] - statistics["mean"][at]
    expected /= np.sqrt(statistics["variance"][at] + 1e-4)
    np.testing.assert_allclose(latents[..., at], expected, rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(codec.decoder()(latents), np.clip(decoded, -1, 1), atol=1e-4)
    assert not codec.stochastic
    assert not ScaledLatents(codec, 2.0).stochastic


def dc_ae_of(network, tmp_path, largest=1.0):
    """The codec with a small network of drawn parameters."""
    rng = np.random.default_rng(0)
    params = jax.tree.map(
        lambda x: rng.uniform(-largest, largest, x.shape).astype(np.float32), DC_AE.shapes(network)
    )
    path = tmp_path / "w.safetensors"
    write_safetensors(path, DC_AE.to_theirs(params, network))

    class SmallDCAE(DCAE):
        @property
        def _network(self):
            return network

    return SmallDCAE(str(path), file_sha256=hashlib.sha256(path.read_bytes()).hexdigest())


def test_latents_of_dc_ae_are_scaled_and_decoded_images_are_clipped(tmp_path):
    """0.3189·E(x) and D(y / 0.3189), as the authors' application does."""
    network = DCAENetwork(4, (8,), (1,), (1,), (), batch_norm=False)
    codec = dc_ae_of(network, tmp_path)
    params = codec.params

    @jax.jit
    def apply(images):
        latents: Any = network.apply({"params": params}, images, method="encode")
        return latents, network.apply({"params": params}, latents, method="decode")

    latents, images = apply(IMAGES)
    assert codec.latent_shape((4, 6, 3)) == latents.shape[1:] == (4, 6, 4)
    found = codec.encoder()(IMAGES)
    np.testing.assert_allclose(found, 0.3189 * latents, rtol=1e-4, atol=1e-4)
    assert np.abs(images).max() > 1
    np.testing.assert_allclose(codec.decoder()(found), np.clip(images, -1, 1), atol=1e-3)
    assert not codec.stochastic


@pytest.mark.thorough(tenth=False)
@pytest.mark.parametrize("attention", [(), (1,)])
def test_tiles_of_dc_ae_are_the_whole_without_attention_and_not_with_it(attention, tmp_path):
    """An element depends on less than 6 others on each side, which is a quarter of the overlap.

    Encoder, in pixels of level 1: (1 + 2 + 1) / 2 of three layers of level 0, and 2 + 1 of level 1.
    """
    network = DCAENetwork(4, (8, 16), (1, 1), (1, 1), attention, head_width=8, batch_norm=False)
    codec = dc_ae_of(network, tmp_path, 0.3)
    images = np.random.default_rng(1).uniform(-1, 1, (1, 88, 64, 3)).astype(np.float32)
    tiled = Tiled(codec, tile=32, overlap=24)
    latents = codec.encoder()(images)
    unlike = np.abs(tiled.encoder()(images) - latents).max() / np.abs(latents).max()
    decoded = codec.decoder()(latents)
    assert 0.1 < np.abs(decoded).max() < 1  # else clipping would hide a difference
    unlike_images = np.abs(tiled.decoder()(latents) - decoded).max()
    if attention:
        assert min(unlike, unlike_images) > 1e-4
    else:
        assert max(unlike, unlike_images) < 1e-5


@pytest.mark.thorough
def test_rae_takes_images_from_0_to_1_and_is_clipped(tmp_path):
    network = RAENetwork(64, 1, 16, 1, 2, 16, encoder_side=28, grid=3)
    rng = np.random.default_rng(0)
    params = jax.tree.map(
        lambda x: rng.uniform(0.1, 1, x.shape).astype(np.float32), RAE_FAMILY.shapes(network)
    )
    path = tmp_path / "w.safetensors"
    write_safetensors(path, RAE_FAMILY.to_theirs(params, network))

    class SmallRAE(RAE):
        @property
        def _network(self):
            return network

    codec = SmallRAE(str(path), file_sha256=hashlib.sha256(path.read_bytes()).hexdigest())
    images = rng.uniform(-1, 1, (2, *codec.image_shape((2, 2, 64)))).astype(np.float32)
    latents: Any = network.apply({"params": params}, (images + 1) / 2, method="encode")
    decoded: Any = network.apply({"params": params}, latents, method="decode")
    found = codec.encoder()(images)
    np.testing.assert_allclose(found, latents, rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(
        codec.decoder()(found), 2 * np.clip(decoded, 0, 1) - 1, rtol=1e-4, atol=1e-3
    )


@pytest.mark.thorough
def test_tiles_of_a_posterior_are_those_of_its_moments(tmp_path):
    """One tile is the whole."""
    codec = codec_of("edm2", tmp_path)
    whole = jax.jit(codec.posterior)(codec.params, IMAGES)
    tiled = jax.jit(Tiled(codec, tile=8, overlap=2).posterior)(codec.params, IMAGES)
    for one, other in zip(tiled, whole, strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: AutoencoderKL(size="flux2").latent_shape((24, 16, 3)), "multiples of 16, not 24"),
        (lambda: AutoencoderKL(size="flux2").image_shape((4, 4, 32)), "128 channels, not 32"),
        (lambda: MOVQ("w.pt").params, "the codec movq needs its weights"),
        (lambda: MOVQ().image_shape((4, 4, 3)), "movq has latents of 4 channels, not 3"),
        (lambda: DCAE().latent_shape((48, 64, 3)), "multiples of 32, not 48x64 with 3"),
        (lambda: DCAE(size="dc-ae-f64c128"), "no DC-AE network is called 'dc-ae-f64c128'"),
        (lambda: RAE().latent_shape((64, 64, 3)), r"images of \(256, 256, 3\) alone, not \(64, 64"),
        (lambda: RAE().image_shape((16, 16, 4)), r"latents of \(16, 16, 768\) alone"),
        (lambda: MOVQ(size="movq2"), "no MOVQ network is called 'movq2'; did you mean 'movq'"),
    ],
)
def test_what_is_refused(call, message):
    with pytest.raises(UserError, match=message):
        call()


def test_every_published_dc_ae_has_a_scale():
    assert SCALES.keys() == SIZES.keys()
