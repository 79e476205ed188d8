"""Families of published networks: sizes, exact round trips, and sizes that files show."""

import importlib
from pathlib import Path

import jax
import numpy as np
import pytest

import diffjax.models
from diffjax.errors import UserError
from diffjax.models.unet import Transformers
from diffjax.pretrained.family import Family
from diffjax.pretrained.files import write_safetensors

FOLDERS = sorted(path.parent.name for path in Path(diffjax.models.__path__[0]).glob("*/sizes.py"))
FAMILIES = {
    family.name: family
    for name in FOLDERS
    for family in vars(importlib.import_module(f"diffjax.models.{name}.published")).values()
    if isinstance(family, Family)
}
LAYOUTS = [name for name in FAMILIES if " of " in name]
"""Further layouts of a network, whose first layout is in the default tests."""
_TRANSFORMERS = ["DDT", "JiT", "LightningDiT", "U-ViT", "SD3", "Flux.1", "Flux.2", "unCLIP prior"]
_U_NETS = [
    "ADM",
    "ADM upsampler",
    "ADM classifier",
    "DDPM",
    "EDM",
    "Stable Diffusion",
    "Kandinsky 2",
]
_OTHERS = ["AutoencoderKL", "AutoencoderKLFlux2", "CLIP", "CLIP text", "DC-AE", "EDM2", "Inception"]
_OTHERS += ["LPIPS", "M-CLIP", "MOVQ", "Qwen3", "RAE", "SiT", "T5 encoder", "TAESD"]
LARGE = [*_U_NETS, *_OTHERS, *_TRANSFORMERS]
MORE = ["ADM upsampler", "ADM classifier", "Inception", "LPIPS", "M-CLIP"]
"""Of another's network, or of one size, which is large."""
_U_NET = {
    "image_shape": (8, 12, 3),
    "channels": 8,
    "channel_multipliers": (1, 2),
    "num_res_blocks": 1,
    "attention_resolutions": (4,),
    "head_channels": 4,
}
_BERT = {"width": 8, "depth": 2, "num_heads": 2, "vocabulary": 9}
_FLUX = {
    "hidden_size": 16,
    "depth": 2,
    "single_depth": 2,
    "num_heads": 2,
    "rotary_axes": (2, 2, 4),
    "embedded_guidance": 3.5,
}
_FLUX2 = {
    "hidden_size": 16,
    "depth": 2,
    "single_depth": 2,
    "num_heads": 2,
    "rotary_axes": (2, 2, 2, 2),
    "embedded_guidance": 4.0,
}
_SD3 = {
    "hidden_size": 16,
    "depth": 3,
    "num_heads": 2,
    "qk_norm": True,
    "dual_blocks": 1,
    "stored_positions": 64,
}
SMALL = {
    **dict.fromkeys(("ADM", "ADM upsampler", "ADM classifier", "EDM", "EDM of ADM"), _U_NET),
    **{
        name: {"channels": (8, 16), "num_res_blocks": 2, "num_groups": 4}
        for name in FAMILIES
        if name.startswith("AutoencoderKL")
    },
    **{
        name: {
            "channels": (8, 16),
            "num_res_blocks": 1,
            "num_groups": 4,
            "attention_levels": (1,),
            "num_codes": 8,
        }
        for name in FAMILIES
        if name.startswith("MOVQ")
    },
    "CLIP": {"width": 8, "depth": 2, "num_heads": 2, "num_features": 5, "grid": 2},
    **{
        name: {"width": 8, "depth": 2, "num_heads": 2, "num_features": 5, "vocabulary": 9}
        for name in ("CLIP text", "CLIP text of OpenCLIP")
    },
    **dict.fromkeys(("BERT", "M-CLIP"), _BERT),
    "T5 encoder": {"width": 8, "depth": 2, "num_heads": 2, "mlp_width": 12, "vocabulary": 9},
    "CLIP text of transformers 5": {"width": 8, "depth": 2, "num_heads": 2, "vocabulary": 9},
    **{
        name: {"side": 8, "channels": 8, "channel_multipliers": (1, 2), "num_res_blocks": 1}
        for name in ("DDPM", "DDPM of old diffusers")
    },
    "DC-AE": {
        "channels": (8, 16, 32),
        "encoder_blocks": (0, 1, 1),
        "decoder_blocks": (0, 2, 1),
        "attention_levels": (2,),
        "head_width": 8,
    },
    "DINOv2": {"width": 8, "depth": 2, "num_heads": 2, "num_registers": 3, "grid": 2},
    "DDT": {"hidden_size": 16, "depth": 2, "num_heads": 2, "encoder_depth": 1},
    "DiT": {"image_shape": (8, 8, 3), "hidden_size": 16, "depth": 2, "num_heads": 2},
    "DiT of diffusers": {"side": 8, "hidden_size": 16, "depth": 2, "num_heads": 2},
    "EDM2": {
        "image_shape": (8, 8, 3),
        "channels": 8,
        "channel_multipliers": (1, 2),
        "num_res_blocks": 1,
        "attention_levels": (1,),
        "head_channels": 8,
    },
    **dict.fromkeys(("Flux.1", "Flux.1 of diffusers"), _FLUX),
    **dict.fromkeys(("Flux.2", "Flux.2 of diffusers"), _FLUX2),
    "Kandinsky 2": {
        "image_shape": (8, 12, 4),
        "channels": 8,
        "channel_multipliers": (1, 2),
        "num_res_blocks": 1,
        "token_levels": (1,),
        "head_channels": 4,
        "image_width": 6,
        "text_width": 5,
        "pooled_width": 6,
        "num_image_tokens": 2,
        "context_width": 6,
    },
    "LPIPS": {"width": 2},
    "JiT": {"hidden_size": 16, "depth": 2, "num_heads": 2, "class_tokens_from": 1},
    "LightningDiT": {"hidden_size": 16, "depth": 2, "num_heads": 2},
    **{
        name: {
            "encoder_width": 64,
            "encoder_depth": 1,
            "width": 16,
            "depth": 1,
            "num_heads": 2,
            "mlp_width": 24,
            "encoder_side": 28,
            "grid": 3,
        }
        for name in ("RAE", "RAE of transformers 4")
    },
    "Qwen3": {
        "width": 8,
        "depth": 2,
        "num_heads": 2,
        "num_key_heads": 1,
        "head_width": 4,
        "mlp_width": 12,
        "vocabulary": 9,
    },
    **dict.fromkeys(("SD3", "SD3 of diffusers"), _SD3),
    "SiT": {"image_shape": (8, 8, 3), "hidden_size": 16, "depth": 2, "num_heads": 2},
    "U-ViT": {"hidden_size": 16, "depth": 3, "num_heads": 2},
    "unCLIP prior": {"features": 6, "width": 8, "depth": 2, "num_heads": 2, "length": 5},
    **{
        name: {
            "image_shape": (8, 12, 4),
            "context_width": 6,
            "channels": 8,
            "channel_multipliers": (1, 2, 2),
            "num_res_blocks": 1,
            "transformers": Transformers((0, 2, 1), 1),
            "num_heads": 2,
            "added_features": 5 + 6 * 4,
            "num_numbers": 6,
            "number_width": 4,
        }
        for name in ("Stable Diffusion", "Stable Diffusion of LDM")
    },
}
"""Settings of a small one where the default is large, or has no default."""


def drawn(family, network, seed=0):
    """All parameters, none as it is initialised."""
    rng = np.random.default_rng(seed)
    return jax.tree.map(
        lambda leaf: rng.random(leaf.shape, np.float32) - 0.5, family.shapes(network)
    )


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=pytest.mark.thorough if name in (*MORE, *LAYOUTS) else [])
        for name in FAMILIES
    ],
)
def test_there_and_back_parameters_are_the_same(name, tmp_path):
    family = FAMILIES[name]
    network = family.network(**SMALL.get(name, {}))
    count = sum(leaf.size for leaf in jax.tree.leaves(family.shapes(network)))
    assert count < 1e8, "add settings of a small one to SMALL"
    params = drawn(family, network)
    path = tmp_path / "w.safetensors"
    state = family.to_theirs(params, network)
    write_safetensors(path, state)
    _, found = family.read(path, network)
    jax.tree.map(np.testing.assert_array_equal, found, params)
    # What the shapes show of the network is so, whatever its size; of images some show one side.
    given = SMALL.get(name, {})
    shown = family.recognise({key: x.shape for key, x in state.items()})
    sides = {key: value for key, value in given.items() if key == "image_shape"}
    assert repr(family.network(**{**given, **shown, **sides})) == repr(network)


@pytest.mark.parametrize(
    ("name", "size"),
    [
        pytest.param(
            name,
            size,
            marks=[]
            if i == 0 and name not in (*LARGE, *LAYOUTS)
            else pytest.mark.thorough(tenth=False),
        )
        for name in FAMILIES
        for i, size in enumerate(FAMILIES[name].sizes)
    ],
)
def test_sizes_have_as_many_parameters_as_published_and_are_recognised(name, size):
    family = FAMILIES[name]
    network = family.size(size)
    shapes = family.shapes(network)
    assert sum(leaf.size for leaf in jax.tree.leaves(shapes)) == family.sizes[size].num_parameters
    nothing = jax.tree.map(lambda leaf: np.broadcast_to(np.float32(0), leaf.shape), shapes)
    state = family.to_theirs(nothing, network)
    assert repr(family.network_of(state, "x")) == repr(network)


def test_what_is_not_recognised():
    dinov2 = FAMILIES["DINOv2"]
    network = dinov2.network(**SMALL["DINOv2"])
    state = dinov2.to_theirs(drawn(dinov2, network), network)
    with pytest.raises(UserError, match="x is of no published size of DINOv2: it has width=8, dep"):
        dinov2.network_of(state, "x")
    with pytest.raises(UserError, match="x is not of the family CLIP: no tensor 'vision_model"):
        FAMILIES["CLIP"].network_of(state, "x")
    positions = "vision_model.embeddings.position_embedding.weight"
    with pytest.raises(UserError, match="x is not of the family CLIP: tensors of its names have"):
        FAMILIES["CLIP"].network_of({positions: np.zeros((1, 50, 768))}, "x")
    with pytest.raises(UserError, match="no DINOv2 network is called 'vitl'; did you mean"):
        dinov2.size("vitl")
    with pytest.raises(
        UserError, match=r"x is of another network: it lacks .* and .* more; it has"
    ):
        dinov2.to_ours(state, dinov2.size("vits14"), "x")


def test_halves_of_clip_that_read_texts_are_left_out():
    clip = FAMILIES["CLIP"]
    network = clip.network(**SMALL["CLIP"])
    state = clip.to_theirs(drawn(clip, network), network)
    more = {"text_model.x": np.zeros(1), "logit_scale": np.zeros(())}
    clip.to_ours(state | more, network, "x")
    with pytest.raises(UserError, match="it has more too many"):
        clip.to_ours(state | {"more": np.zeros(1)}, network, "x")
