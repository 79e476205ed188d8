"""Stable Diffusion's U-Nets: against diffusers where it is installed, and round trips."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffjax.conditions import Tokens, TokenStates
from diffjax.errors import UserError
from diffjax.exchange import pretrained
from diffjax.models import families
from diffjax.models.stable_diffusion.published import FAMILY, LDM
from diffjax.models.unet import Embedding, Transformers, UNet
from diffjax.pretrained import folders
from diffjax.pretrained.files import write_safetensors
from tests.references import unets as reference
from tests.support.witnesses import witnesses

SMALL: dict[str, Any] = {
    "image_shape": (8, 12, 4),
    "context_width": 12,
    "channels": 32,
    "channel_multipliers": (1, 2),
    "num_res_blocks": 1,
    "num_groups": 8,
    "transformers": Transformers((2, 0), 2),
    "num_heads": 4,
}
"""Two levels; heads of 8 channels on the first, of 16 on the second."""
WIDE = {
    **SMALL,
    "num_heads": 0,
    "head_channels": 16,
    "linear_projection": True,
}
CASES = {
    "SD1": SMALL,
    "SD1 inpainting": {**SMALL, "given_channels": 5},
    "SD2": {**WIDE, "transformers": Transformers((1, 2), 2)},
    "SDXL": {
        **WIDE,
        "transformers": Transformers((0, 3), 3),
        "added_features": 10 + 6 * 8,
        "num_numbers": 6,
        "number_width": 8,
    },
    "SDXL refiner": {
        **WIDE,
        "channel_multipliers": (1, 2, 2),
        "transformers": Transformers((0, 2, 0), 2),
        "added_features": 12 + 5 * 8,
        "num_numbers": 5,
        "number_width": 8,
    },
    "labels": {**SMALL, "num_classes": 9},
    "LCM": {**SMALL, "guidance_width": 16},
}
TIMES = np.array([999.0, 0.0, 320.0], np.float32)
LENGTH = 7


def random(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def drawn(denoiser):
    """Parameters, none as it is initialised; scales of norms are near 1, so that pixels differ."""
    nothing = jax.tree.map(lambda leaf: np.zeros(leaf.shape), FAMILY.shapes(denoiser))
    shapes = {name: x.shape for name, x in FAMILY.to_theirs(nothing, denoiser).items()}
    state = {
        name: x + 1 if "norm" in name and name.endswith("weight") else x
        for name, x in reference.parameters(shapes).items()
    }
    return FAMILY.to_ours(state, denoiser, "theirs")


def condition_of(denoiser):
    """A condition of three examples with unlike numbers of tokens, numbers of the order 100."""
    condition = denoiser.condition
    parts = getattr(condition, "parts", {"text": condition})
    tokens = parts["text"]
    mask = np.arange(LENGTH)[None] < np.array([[7], [4], [1]])
    found: dict[str, Any] = {
        "text": TokenStates(
            random(3, LENGTH, tokens.width, seed=1), mask, random(3, tokens.pooled_width, seed=2)
        )
    }
    if "size" in parts:
        found["size"] = 100 + 50 * random(3, len(parts["size"].names), seed=3)
    if "image" in parts:
        found["image"] = random(3, *parts["image"].shape, seed=4)
    if "label" in parts:
        found["label"] = np.array([0, 8, 3], np.int32)
    return found if len(found) > 1 else found["text"]


def guidance_of(scale):
    """A scale of guidance as diffusers' pipelines embed it, of 16 features for three examples."""
    import torch
    from diffusers import StableDiffusionPipeline as Pipe  # pyright: ignore

    return Pipe.get_guidance_scale_embedding(None, torch.full((3,), scale - 1), 16).double()


def error(found, expected):
    return np.linalg.norm(np.asarray(found) - expected) / np.linalg.norm(expected)


@pytest.mark.parity
@pytest.mark.parametrize("name", witnesses(CASES, ["SDXL", "SD1 inpainting"]))
def test_outputs_and_gradients_are_those_of_diffusers(name, tmp_path):
    """In training mode, with respect to images, states and parameters; diffusers in float64."""
    torch = pytest.importorskip("torch")
    diffusers = pytest.importorskip("diffusers", reason="pip install -e '.[parity]'")
    ours = FAMILY.network(**CASES[name])
    params, cond = drawn(ours), condition_of(ours)
    assert FAMILY.config is not None
    folders.write_folder(tmp_path, FAMILY.to_theirs(params, ours), FAMILY.config.entries(ours))
    found = families.find_published(tmp_path)
    assert (found.network, found.layout) == (ours, "diffusers")
    peer = diffusers.UNet2DConditionModel.from_pretrained(tmp_path).train().double()

    images, factors = random(3, *ours.image_shape, seed=5), random(3, *ours.image_shape, seed=6)
    parts = cond if isinstance(cond, dict) else {"text": cond}

    def theirs(x, axes=()):
        tensor = torch.tensor(np.transpose(x, axes) if axes else x).double()
        return tensor.requires_grad_()

    x, states = theirs(images, (0, 3, 1, 2)), theirs(parts["text"].states)
    given = [theirs(parts["image"], (0, 3, 1, 2))] if "image" in parts else []
    added = None
    if "size" in parts:
        added = {"text_embeds": theirs(parts["text"].pooled), "time_ids": theirs(parts["size"])}
    expected = peer(
        torch.cat([x, *given], 1),
        torch.tensor(TIMES),
        states,
        class_labels=torch.tensor(parts["label"]) if "label" in parts else None,
        encoder_attention_mask=torch.tensor(parts["text"].mask),
        timestep_cond=guidance_of(8.0) if "guidance_width" in CASES[name] else None,
        added_cond_kwargs=added,
    ).sample
    (expected * torch.tensor(factors.transpose(0, 3, 1, 2))).sum().backward()

    def total(params, x, states):
        text = parts["text"]._replace(states=states)
        whole = {**parts, "text": text} if isinstance(cond, dict) else text
        out = ours.network.apply({"params": params}, x, jnp.asarray(TIMES), whole, train=True)
        return (out * factors).sum(), out

    gradient = jax.jit(jax.grad(total, (0, 1, 2), has_aux=True))
    (of_params, *of_inputs), out = gradient(params, images, parts["text"].states)
    assert expected.std() > 0.1
    assert error(out, expected.detach().numpy().transpose(0, 2, 3, 1)) < 1e-5
    assert error(of_inputs[0], x.grad.numpy().transpose(0, 2, 3, 1)) < 1e-5
    assert error(of_inputs[1], states.grad.numpy()) < 1e-5
    named = FAMILY.to_theirs(of_params, ours)
    # Gradients of queries are small differences where a softmax is nearly even.
    gradients = {parameter: value.grad.numpy() for parameter, value in peer.named_parameters()}
    for parameter, value in gradients.items():
        assert error(named[parameter], value) < 3e-5, parameter
    flat = [np.concatenate([tree[key].ravel() for key in gradients]) for tree in (named, gradients)]
    assert error(*flat) < 1e-5


@pytest.mark.parity
@pytest.mark.parametrize("name", FAMILY.sizes)
def test_diffusers_has_as_many_parameters_of_each_size(name):
    torch = pytest.importorskip("torch")
    diffusers = pytest.importorskip("diffusers", reason="pip install -e '.[parity]'")
    assert FAMILY.config is not None
    entries = FAMILY.config.entries(FAMILY.size(name))
    with torch.device("meta"):
        peer = diffusers.UNet2DConditionModel.from_config(entries)
    assert sum(x.numel() for x in peer.parameters()) == FAMILY.sizes[name].num_parameters


@pytest.mark.parity
def test_a_file_of_ldm_is_converted_by_diffusers_to_the_same_tensors(tmp_path):
    """Through diffusers' own converter of single files, of SD 1 and of SDXL."""
    pytest.importorskip("diffusers", reason="pip install -e '.[parity]'")
    from diffusers.loaders.single_file_utils import convert_ldm_unet_checkpoint

    for name in ("SD1", "SDXL"):
        ours = FAMILY.network(**CASES[name])
        params = drawn(ours)
        whole = {f"model.diffusion_model.{k}": x for k, x in LDM.to_theirs(params, ours).items()}
        assert FAMILY.config is not None
        converted = convert_ldm_unet_checkpoint(whole, dict(FAMILY.config.entries(ours)))
        expected = FAMILY.to_theirs(params, ours)
        assert converted.keys() == expected.keys()
        for key, value in converted.items():
            np.testing.assert_array_equal(value, expected[key], key)


def shapes_of(network, cond):
    x, t = np.zeros((2, 8, 8, 4), np.float32), np.zeros(2, np.float32)
    return jax.eval_shape(network.init, jax.random.key(0), x, t, cond)


def test_conditions_that_a_u_net_has_no_place_for_are_refused():
    text, numbers = Tokens(5, 6, 3).example(2), np.zeros((2, 6), np.float32)
    plain = UNet(0, channels=8, channel_multipliers=(1, 2), head_channels=8)
    levels = Transformers((1, 0))
    for network, cond, said in (
        (plain, text, "UNet attends to no tokens"),
        (plain, {"text": text, "size": numbers}, "embeds no numbers"),
        (plain.clone(transformers=levels), None, "its condition has none"),
        (plain.clone(transformers=Transformers((1,))), text, "needs a number for each of the 2"),
        (
            plain.clone(transformers=levels, embedding=Embedding(added_width=4)),
            text,
            "its condition lacks them",
        ),
    ):
        with pytest.raises(UserError, match=said):
            shapes_of(network, cond)


def test_what_diffusers_has_no_entry_for_is_refused():
    assert FAMILY.config is not None
    for settings, said in (
        ({"num_groups": 0, "channels": 96}, "one number of groups, and this network has"),
        ({"transformers": Transformers((1, 2), 3)}, "this network has 3 and 2"),
    ):
        with pytest.raises(UserError, match=said):
            FAMILY.config.entries(FAMILY.network(**{**SMALL, **settings}))
    entries = FAMILY.config.entries(FAMILY.network(**SMALL))
    for change, said in (
        ({"only_cross_attention": True}, "has only_cross_attention=True, and only False is known"),
        ({"attention_head_dim": [4, 4, 4]}, "has 3 numbers for 2 levels"),
        ({"attention_head_dim": [2, 8]}, "heads on all levels are to have one width"),
        ({"up_block_types": ["UpBlock2D"] * 2}, "do not mirror down_block_types"),
        ({"addition_embed_type": "text_image"}, "addition_embed_type='text_image' is not known"),
        ({"down_block_types": ["AttnDownBlock2D"] * 2}, "config.json lacks 'AttnDownBlock2D'"),
    ):
        with pytest.raises(UserError, match=said):
            FAMILY.config.settings({**entries, **change}, "x")


@pytest.mark.thorough(tenth=False)
def test_a_file_of_a_whole_model_is_recognised(tmp_path):
    ours = FAMILY.network(**SMALL)
    params = drawn(ours)
    state = {f"model.diffusion_model.{k}": x for k, x in LDM.to_theirs(params, ours).items()}
    state |= {"first_stage_model.decoder.conv_in.bias": np.zeros(4, np.float32)}
    write_safetensors(tmp_path / "v1-5.safetensors", state)
    settings = {name: SMALL[name] for name in ("image_shape", "num_heads", "num_groups")}
    settings |= {"num_numbers": 0, "added_features": 0}
    found = families.find_published(tmp_path / "v1-5.safetensors", **settings)
    assert (found.network, found.layout) == (ours, "authors")
    jax.tree.map(np.testing.assert_array_equal, found.params(), params)
    # Its autoencoder is read from the same file, which has no more than a bias of it.
    with pytest.raises(UserError, match="it lacks quant_conv"):
        pretrained.from_pretrained(tmp_path / "v1-5.safetensors", **settings)
