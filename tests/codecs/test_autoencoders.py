"""The codec of a folder with an autoencoder; its numbers are compared in tests/autoencoders."""

import json

import jax
import numpy as np
import pytest

from diffjax import lookup
from diffjax.codecs.autoencoders import AutoencoderFolder, Variational, latent_shape
from diffjax.codecs.autoencoders import write_autoencoder as write
from diffjax.errors import UserError
from diffjax.models.autoencoder_kl.network import AutoencoderKL
from diffjax.models.autoencoder_kl.published import FAMILY
from diffjax.spec import as_spec, build

SMALL = AutoencoderKL(channels=(4, 8, 8), num_res_blocks=1, num_groups=2, latent_channels=3)


@pytest.fixture
def run(tmp_path):
    """A folder with a folder `vae`, as a run that trained one."""
    params = jax.tree.map(lambda leaf: np.zeros(leaf.shape, leaf.dtype), FAMILY.shapes(SMALL))
    write(tmp_path / "vae", Variational(SMALL), params, scale=0.5, shift=0.25)
    return tmp_path


def test_shapes_and_scale_are_those_of_the_folder(run):
    codec = AutoencoderFolder(str(run))
    assert codec.latent_shape((16, 24, 3)) == (4, 6, 3)
    assert codec.image_shape((4, 6, 3)) == (16, 24, 3)
    assert codec.stochastic
    assert codec == lookup.codec_called(f"autoencoder:path={run}")
    entries = json.loads((run / "vae" / "config.json").read_text())
    assert (entries["scaling_factor"], entries["shift_factor"]) == (0.5, 0.25)
    with pytest.raises(UserError, match=r"multiples of 4, not 16x22 with 3 channel"):
        codec.latent_shape((16, 22, 3))
    with pytest.raises(UserError, match="has latents of 3 channels, not 4"):
        codec.image_shape((4, 4, 4))


def test_its_spec_has_the_hash_of_weights_and_scale(run):
    """So a config that was saved refuses another autoencoder in the same place."""
    codec = AutoencoderFolder(str(run))
    assert len(codec.sha256) == 64
    saved = as_spec(codec)
    assert saved.sha256 == codec.sha256
    path = run / "vae" / "config.json"
    path.write_text(path.read_text().replace("0.25", "0.125"))
    assert AutoencoderFolder(str(run)).sha256 != codec.sha256
    with pytest.raises(UserError, match="has another autoencoder than this config was written for"):
        _ = build(saved).params


def test_folders_that_have_none(run):
    nowhere = AutoencoderFolder(str(run / "other"))
    with pytest.raises(UserError, match=r"has no autoencoder: neither config\.json of diffusers"):
        nowhere.latent_shape((8, 8, 3))
    with pytest.raises(UserError, match="needs the folder of an autoencoder: set path to a run of"):
        _ = lookup.codec_called("autoencoder").params
    (run / "vae" / "config.json").write_text('{"_class_name": "ConsistencyDecoderVAE"}')
    with pytest.raises(UserError, match="is no autoencoder here: known: AutoencoderKL"):
        AutoencoderFolder(str(run)).latent_shape((8, 8, 3))
    (run / "vae" / "diffusion_pytorch_model.safetensors").unlink()
    with pytest.raises(UserError, match=r"can't read .*safetensors: No such file"):
        AutoencoderFolder(str(run))


def test_images_that_do_not_divide():
    with pytest.raises(UserError, match=r"images of 3 channel\(s\) .* 4, not 18x16 with 1 channel"):
        latent_shape(Variational(SMALL), (18, 16, 1))
