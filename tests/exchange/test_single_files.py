"""Files of whole models: the picture of the folder of diffusers with the same weights."""

import shutil
from typing import Any

import numpy as np
import pytest

import diffjax
from diffjax.errors import UserError
from diffjax.models.autoencoder_kl import published as autoencoder
from diffjax.models.autoencoder_kl.sizes import SIZES as AUTOENCODERS
from diffjax.models.clip_text.sizes import SIZES as ENCODERS
from diffjax.models.families import find_published
from diffjax.models.stable_diffusion.published import LDM
from diffjax.models.stable_diffusion.sizes import SIZES as NETWORKS
from diffjax.models.unet import Transformers
from diffjax.pretrained.family import Size
from diffjax.pretrained.files import write_safetensors
from diffjax.runs.samples.model import Request
from tests.exchange import test_pipelines as pipelines
from tests.exchange.test_pipelines import NEGATIVE, NUM_STEPS, PROMPT, SIDE, needed
from tests.exchange.test_schedulers import SD1
from tests.support.witnesses import witnesses

_UNET = {"image_shape": (SIDE // 8, SIDE // 8, 4), "num_heads": 4, "num_groups": 32}
_TINY: dict[str, tuple[dict[str, Any], list[dict[str, Any]]]] = {
    "SD 1": (
        {**_UNET, "context_width": 24, "transformers": Transformers((1, 0), 1)},
        [{"width": 24, "depth": 3, "num_heads": 4}],
    ),
    "SD 2": (
        {**_UNET, "context_width": 24, "transformers": Transformers((1, 0), 1)},
        [{"width": 24, "depth": 4, "num_heads": 4, "activation": "gelu"}],
    ),
    "SDXL": (
        {
            **_UNET,
            "context_width": 56,
            "transformers": Transformers((2, 0), 1),
            "num_numbers": 6,
            "number_width": 8,
        },
        [
            {"width": 24, "depth": 3, "num_heads": 4},
            {"width": 32, "depth": 3, "num_heads": 4, "activation": "gelu"},
        ],
    ),
}
"""Settings of network and text encoders that a file does not show, as published sizes have them."""


def sd2(scheduler, entries):
    """As Stable Diffusion 2: its folder has the text encoder without the last layer."""
    _, _, transformers = needed()
    pipe = pipelines.stable_diffusion(scheduler, entries)
    words = pipelines.tokenizer_of(transformers, padding="!")
    config = pipelines.text_encoder_of(transformers, words, 24).config
    config.hidden_act = "gelu"
    encoder = pipelines.redrawn(transformers.CLIPTextModel(config), 1)
    pipe.register_modules(text_encoder=encoder, tokenizer=words)
    return pipe


def state_of(module):
    return {name: x.detach().numpy() for name, x in module.state_dict().items()}


def as_open_clip(module, more_layers=0):
    """The tensors of a text encoder of transformers by the names of OpenCLIP."""
    state = {name.removeprefix("text_model."): x for name, x in state_of(module).items()}
    found = {
        "token_embedding.weight": state["embeddings.token_embedding.weight"],
        "positional_embedding": state["embeddings.position_embedding.weight"],
        "ln_final.weight": state["final_layer_norm.weight"],
        "ln_final.bias": state["final_layer_norm.bias"],
        "logit_scale": np.float32([4.6]),
    }
    projection = state.get("text_projection.weight", np.eye(24, dtype=np.float32))
    found["text_projection"] = np.ascontiguousarray(projection.T)
    depth = len({name.split(".")[2] for name in state if name.startswith("encoder.layers.")})
    names = {
        "layer_norm1": "ln_1",
        "layer_norm2": "ln_2",
        "self_attn.out_proj": "attn.out_proj",
        "mlp.fc1": "mlp.c_fc",
        "mlp.fc2": "mlp.c_proj",
    }
    for i in range(depth + more_layers):
        theirs, ours = f"encoder.layers.{i % depth}", f"transformer.resblocks.{i}"
        for kind in ("weight", "bias"):
            for name, other in names.items():
                found[f"{ours}.{other}.{kind}"] = state[f"{theirs}.{name}.{kind}"]
            qkv = [state[f"{theirs}.self_attn.{part}_proj.{kind}"] for part in "qkv"]
            found[f"{ours}.attn.in_proj_{kind}"] = np.concatenate(qkv)
    return found


def of_ldm(folder, family):
    """The tensors of a network of diffusers by the names of LDM."""
    found = find_published(folder)
    return family.to_theirs(found.params(), found.network)


def write_whole(pipe, folder, file):
    """Writes what is in a folder of diffusers as one file."""
    state: dict[str, Any] = {}

    def add(prefix, tensors):
        state.update({f"{prefix}.{name}": np.asarray(x) for name, x in tensors.items()})

    add("model.diffusion_model", of_ldm(folder / "unet", LDM))
    add("first_stage_model", of_ldm(folder / "vae", autoencoder.LDM))
    clip = {
        name if name.startswith("text_model.") else f"text_model.{name}": x
        for name, x in state_of(pipe.text_encoder).items()
    }
    clip["text_model.embeddings.position_ids"] = np.arange(pipelines.LENGTH)[None]
    if getattr(pipe, "text_encoder_2", None) is not None:
        add("conditioner.embedders.0.transformer", clip)
        add("conditioner.embedders.1.model", as_open_clip(pipe.text_encoder_2))
    elif pipe.text_encoder.config.hidden_act == "gelu":
        add("cond_stage_model.model", as_open_clip(pipe.text_encoder, more_layers=1))
    else:
        add("cond_stage_model.transformer", clip)
    write_safetensors(file, state)


@pytest.fixture
def tiny(request, monkeypatch):
    """Makes the sizes of a tiny pipeline published ones, whose other settings are known."""
    network, encoders = _TINY[request.param]
    monkeypatch.setitem(NETWORKS, "tiny", Size(network, 0))
    for i, settings in enumerate(encoders):
        monkeypatch.setitem(ENCODERS, f"tiny {i}", Size(settings, 0))
    small = {"channels": (32,) * 4, "num_res_blocks": 1}
    for name in ("sd-vae", "sdxl"):
        settings = {**AUTOENCODERS[name].settings, **small}
        monkeypatch.setitem(AUTOENCODERS, name, Size(settings, 0))
    return request.param


@pytest.mark.parity
@pytest.mark.parametrize("tiny", witnesses(_TINY, ["SDXL"]), indirect=True)
def test_a_single_file_draws_the_picture_of_its_folder(tiny, tmp_path):
    """With the tokenizer of Stable Diffusion 1 for all; the text of null is that of the folder."""
    make = {"SD 1": pipelines.stable_diffusion, "SD 2": sd2, "SDXL": pipelines.sdxl}[tiny]
    how: tuple[str, dict[str, Any]] = ("DDIMScheduler", SD1)
    if tiny == "SDXL":
        how = ("EulerDiscreteScheduler", pipelines.LEADING)
    pipe = make(*how)
    folder, file = tmp_path / "pipe", tmp_path / "whole.safetensors"
    pipe.save_pretrained(folder)
    write_whole(pipe, folder, file)
    words = tmp_path / "words"
    pipelines.tokenizer_of(needed()[2]).save_pretrained(words)
    shutil.rmtree(folder)
    noise = Request(np.zeros(1), seed=3).noise((SIDE // 8, SIDE // 8, 4))
    model = diffjax.from_pretrained(file, components={"tokenizer": words})
    for negative in (None, NEGATIVE):
        expected = pipelines.picture_of(pipe, noise, negative, NUM_STEPS)
        found = model.sample(
            PROMPT, negative=negative, seed=3, num_steps=NUM_STEPS, guidance_scale=4.0
        )
        assert 0.1 < expected.std() < 0.95
        assert np.abs(found - expected).max() < 2 / 255  # of a range of 2


@pytest.mark.parity
@pytest.mark.parametrize("tiny", ["SD 1"], indirect=True)
def test_what_a_single_file_lacks_is_one_line(tiny, tmp_path):
    del tiny
    pipe = pipelines.stable_diffusion("DDIMScheduler", SD1)
    folder, file = tmp_path / "pipe", tmp_path / "whole.safetensors"
    pipe.save_pretrained(folder)
    write_whole(pipe, folder, file)
    model = diffjax.from_pretrained(file)
    with pytest.raises(UserError, match=r"needs a tokenizer, which .* lacks: name the folder"):
        model.sample(PROMPT)
    for components, said in (
        ({"tokenizer": folder / "vae"}, "has no tokenizer: one of"),
        ({"tokenizer": tmp_path / "none"}, "does not exist: name its path"),
        ({"network": file}, "has no place for a component 'network'"),
        ({"tokenizer_2": folder / "tokenizer"}, "has no place for a component 'tokenizer_2'"),
        ({"scheduler": {"_class_name": "Euler"}}, "no scheduler is called 'Euler'"),
    ):
        with pytest.raises(UserError, match=said) as caught:
            diffjax.from_pretrained(file, components=components)
        assert "\n" not in str(caught.value)
    v = {"tokenizer": folder / "tokenizer", "scheduler": {"prediction_type": "v_prediction"}}
    target = diffjax.from_pretrained(file, components=v).parts.wired.precond.target
    assert type(target).__name__ == "V"
