"""AutoencoderKL as a codec: the scale of its latents, its hash, and what it refuses."""

import hashlib
from typing import Any

import jax
import numpy as np
import pytest

from diffjax import choices
from diffjax.codecs.autoencoder_kl import AutoencoderKL, autoencoder_at
from diffjax.errors import UserError
from diffjax.models.autoencoder_kl.network import AutoencoderKL as Network
from diffjax.models.autoencoder_kl.published import FAMILY, LDM
from diffjax.models.autoencoder_kl.sizes import SCALINGS, SIZES
from diffjax.pretrained.downloads import sha256_of_file
from diffjax.pretrained.family import Size
from diffjax.pretrained.files import write_safetensors
from diffjax.pretrained.folders import write_folder

SMALL = Network(16, quant_convs=False, channels=(8,), num_res_blocks=1, num_groups=2)


class Small(AutoencoderKL):
    """The codec with a small network."""

    @property
    def _network(self):
        return SMALL


@pytest.fixture(scope="module")
def params():
    rng = np.random.default_rng(0)
    return jax.tree.map(lambda x: rng.normal(0, 0.1, x.shape).astype(np.float32), LDM.shapes(SMALL))


def test_latents_are_shifted_and_scaled_means(params, tmp_path):
    """FLUX.1: 0.3611·(mean − 0.1159), and images from a file in the layout of its authors."""
    path = tmp_path / "ae.safetensors"
    write_safetensors(path, LDM.to_theirs(params, SMALL))
    codec = Small(str(path), "flux", hashlib.sha256(path.read_bytes()).hexdigest())
    images = np.random.default_rng(1).uniform(-1, 1, (3, 4, 6, 3)).astype(np.float32)
    latents = codec.encoder()(images)

    @jax.jit
    def apply(params, images):
        posterior: Any = SMALL.apply({"params": params}, images, method="encode")
        return posterior.mean, SMALL.apply({"params": params}, posterior.mean, method="decode")

    mean, decoded = apply(params, images)
    assert latents.shape == (3, *codec.latent_shape((4, 6, 3))) == (3, 4, 6, 16)
    np.testing.assert_allclose(latents, 0.3611 * (mean - 0.1159), atol=1e-6)
    assert np.abs(decoded).max() < 1  # else clipping would hide it
    np.testing.assert_allclose(codec.decoder()(latents), decoded, atol=1e-5)


def test_hashes_are_of_the_file_and_of_the_scale():
    one, other = AutoencoderKL("a", "sd-vae", "12ab"), AutoencoderKL("b", "sd-vae", "12AB")
    assert one.sha256 == other.sha256
    assert one.sha256 != AutoencoderKL("a", "sdxl", "12ab").sha256
    assert one.sha256 != AutoencoderKL("a", "sd-vae", "34cd").sha256


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: AutoencoderKL(size="sd-xl"), "no AutoencoderKL network is called 'sd-xl'; did"),
        (lambda: AutoencoderKL().latent_shape((12, 8, 3)), "multiples of 8, not 12x8 with 3"),
        (lambda: AutoencoderKL().latent_shape((8, 8, 1)), "3 channels .*, not 8x8 with 1"),
        (lambda: AutoencoderKL().image_shape((4, 4, 16)), "latents of 4 channels, not 16"),
        (lambda: AutoencoderKL("w.pt").params, "set path to their file and file_sha256"),
        (lambda: AutoencoderKL("no.pt", "flux", "12").params, "can't read the weights no.pt"),
    ],
)
def test_what_is_refused(call, message):
    with pytest.raises(UserError, match=message):
        call()


def small_folder(place, scale, monkeypatch):
    """A folder of diffusers with a small autoencoder in the place of SDXL's."""
    settings = {"channels": (8, 8, 8, 8), "num_res_blocks": 1, "num_groups": 4}
    monkeypatch.setitem(SIZES, "sdxl", Size({**SIZES["sdxl"].settings, **settings}, 0))
    network = FAMILY.size("sdxl")
    params = jax.tree.map(lambda leaf: np.ones(leaf.shape, np.float32), FAMILY.shapes(network))
    config = {"_class_name": "AutoencoderKL", "scaling_factor": scale}
    write_folder(place, FAMILY.to_theirs(params, network), config)


def test_a_folder_of_diffusers_has_its_scale_and_a_file_that_of_the_size(tmp_path, monkeypatch):
    small_folder(tmp_path / "vae", 0.13025, monkeypatch)
    file = tmp_path / "vae" / "diffusion_pytorch_model.safetensors"
    codec = autoencoder_at(tmp_path)  # a pipeline, of which it is a part
    assert codec == AutoencoderKL(str(file), "sdxl", sha256_of_file(file))
    assert autoencoder_at(file, "sdxl") == codec
    with pytest.raises(UserError, match="is of another network"):
        autoencoder_at(file, "flux")
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=r"it has no config\.json"):
        autoencoder_at(tmp_path / "empty")
    small_folder(tmp_path / "vae", 0.5, monkeypatch)
    with pytest.raises(UserError, match=r"no autoencoder here has Scaling\(scale=0.5, shift=0.0\)"):
        autoencoder_at(tmp_path / "vae")


def test_latents_of_edm2_have_a_deviation_of_a_half_in_each_channel():
    """Of latents with the mean and the deviation of NVlabs/edm2, `training/encoders.py`."""
    mean, std = np.array([5.81, 3.25, 0.12, -2.15]), np.array([4.17, 4.62, 3.71, 3.28])
    scale, shift = map(np.array, SCALINGS["edm2"])
    np.testing.assert_allclose(scale * (mean - shift), 0.0, atol=1e-12)
    np.testing.assert_allclose(scale * (mean + std - shift), 0.5, rtol=1e-12)
    of_size = choices.CODECS["sd-vae-ft-mse-edm2"]
    other = choices.CODECS["sd-vae-ft-mse"]
    assert (of_size.path, of_size.file_sha256) == (other.path, other.file_sha256)
    assert (of_size.size, other.size) == ("edm2", "sd-vae")
