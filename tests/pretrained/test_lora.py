"""Files of LoRA in three dialects: `W + weight * alpha / rank * B A`, computed by NumPy."""

import json
import math
import re

import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy

from diffjax.errors import UserError
from diffjax.pretrained.files import write_safetensors
from diffjax.pretrained.lora import NETWORK, merged, of_another_network, read_lora

SHAPES = {
    "mid_block.attentions.0.transformer_blocks.0.attn1.to_q": (6, 6),
    "mid_block.attentions.0.transformer_blocks.0.attn2.to_k": (6, 5),
    "mid_block.attentions.0.transformer_blocks.0.attn1.to_out.0": (6, 6),
    "down_blocks.0.resnets.0.conv1": (4, 3, 3, 3),
    "mid_block.attentions.0.proj_in": (6, 6, 1, 1),
}
RANKS = (2, 3, 1, 4, 2)
ALPHAS = (1.0, 6.0, 0.5, 4.0, 3.0)


def state_of(shapes=SHAPES):
    random = np.random.default_rng(0)
    arrays = {
        f"{name}.weight": random.normal(size=shape).astype(np.float32)
        for name, shape in shapes.items()
    }
    return arrays | {"down_blocks.0.resnets.0.conv1.bias": np.ones(4, np.float32)}


def changes_of(shapes=SHAPES, seed=1):
    """A, B and alpha of each layer; those of a convolution have its window, and B one pixel."""
    random = np.random.default_rng(seed)
    found = {}
    for (name, (out, *rest)), rank, alpha in zip(shapes.items(), RANKS, ALPHAS, strict=True):
        ones = (1,) * len(rest[1:])
        down, up = random.normal(size=(rank, *rest)), random.normal(size=(out, rank, *ones))
        found[name] = down.astype(np.float32), up.astype(np.float32), alpha
    return found


def in_dialect(dialect, changes):
    """The tensors of a file, and the scale of each layer that they mean."""
    state, scales = {}, {}
    for layer, (down, up, alpha) in changes.items():
        scales[layer] = 1.0
        if dialect == "peft":
            names = f"unet.{layer}.lora_A.weight", f"unet.{layer}.lora_B.weight"
        elif dialect == "old":
            names = f"unet.{layer}.lora.down.weight", f"unet.{layer}.lora.up.weight"
        elif dialect == "older":
            stem, _, last = layer.removesuffix(".0").rpartition(".")
            begin = f"{stem}.processor.{last}_lora" if "attn" in stem else f"{layer}.lora"
            names = f"{begin}.down.weight", f"{begin}.up.weight"
        else:
            begin = f"lora_unet_{layer.replace('.', '_')}"
            names = f"{begin}.lora_down.weight", f"{begin}.lora_up.weight"
            state[f"{begin}.alpha"] = np.asarray(alpha, np.float32)
            scales[layer] = alpha / len(down)
        state |= dict(zip(names, (down, up), strict=True))
    return state, scales


def expected_of(before, changes, scales, weight):
    """Entry by entry of the equation, in float64."""
    after = dict(before)
    for layer, (down, up, _) in changes.items():
        product = np.einsum("or,ri->oi", up.reshape(len(up), -1), down.reshape(len(down), -1))
        whole = before[f"{layer}.weight"].astype(np.float64)
        after[f"{layer}.weight"] = whole + weight * scales[layer] * product.reshape(whole.shape)
    return after


@pytest.mark.parametrize("dialect", ["peft", "old", "older", "kohya"])
def test_each_dialect_adds_the_product_of_its_matrices(dialect, tmp_path):
    before, changes = state_of(), changes_of()
    state, scales = in_dialect(dialect, changes)
    write_safetensors(tmp_path / "x.safetensors", state)
    lora = read_lora(tmp_path / "x.safetensors", 0.7)
    assert list(lora.parts) == [NETWORK]
    after = merged(before, lora, NETWORK, "net")
    expected = expected_of(before, changes, scales, 0.7)
    assert after.keys() == expected.keys()
    for name, array in expected.items():
        np.testing.assert_allclose(np.asarray(after[name]), array, rtol=1e-5, atol=1e-6)
    bias = "down_blocks.0.resnets.0.conv1.bias"
    assert after[bias] is before[bias]


def test_several_files_add_up_and_weights_in_half_precision_are_changed_in_single(tmp_path):
    before = {name: x.astype(jnp.bfloat16) for name, x in state_of().items()}
    after, expected = before, before
    for seed, weight in ((1, 0.7), (2, -1.5)):
        changes = changes_of(seed=seed)
        state, scales = in_dialect("kohya", changes)
        write_safetensors(tmp_path / f"{seed}.safetensors", state)
        after = merged(after, read_lora(tmp_path / f"{seed}.safetensors", weight), NETWORK, "net")
        expected = expected_of(expected, changes, scales, weight)
    for name in (f"{layer}.weight" for layer in SHAPES):
        assert after[name].dtype == np.float32
        np.testing.assert_allclose(np.asarray(after[name]), expected[name], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("stabilised", [False, True])
@pytest.mark.parametrize("place", ["header", "beside"])
def test_alpha_is_that_of_the_settings_of_peft(place, stabilised, tmp_path):
    """In the header of a file of diffusers, or in `adapter_config.json` of peft."""
    layer = "mid_block.attentions.0.transformer_blocks.0.attn2.to_k"
    settings = {"lora_alpha": 5, "alpha_pattern": {"attn2.to_k": 7}, "use_rslora": stabilised}
    state, _ = in_dialect("peft", changes_of())
    header = None
    if place == "header":
        named = {f"unet.{name}": value for name, value in settings.items()}
        header = {"lora_adapter_metadata": json.dumps(named)}
    else:
        state = {name.replace("unet.", "base_model.model."): x for name, x in state.items()}
        (tmp_path / "adapter_config.json").write_text(json.dumps(settings))
    write_safetensors(tmp_path / "x.safetensors", state, header)
    found = {x.layer: x.scale for x in read_lora(tmp_path / "x.safetensors").parts[NETWORK]}
    assert found == {
        name: (7 if name == layer else 5) / (math.sqrt(rank) if stabilised else rank)
        for name, rank in zip(SHAPES, RANKS, strict=True)
    }


def test_parts_are_told_apart_by_the_beginning_of_names(tmp_path):
    pair = {"down": np.ones((1, 2), np.float32), "up": np.ones((2, 1), np.float32)}
    layer = "text_model_encoder_layers_0_self_attn_q_proj"
    for prefix, part in (
        ("lora_te_", "text_encoder"),
        ("lora_te1_", "text_encoder"),
        ("lora_te2_", "text_encoder_2"),
        ("lora_unet_", NETWORK),
    ):
        state = {f"{prefix}{layer}.lora_{which}.weight": x for which, x in pair.items()}
        write_safetensors(tmp_path / "x.safetensors", state)
        parts = read_lora(tmp_path / "x.safetensors").parts
        assert [(part, [x.layer for x in found]) for part, found in parts.items()] == [
            (part, [layer])
        ]
    name = "text_encoder.text_model.encoder.layers.0.self_attn"
    for last in ("q_proj.lora_linear_layer", "to_q_lora", "q_proj.lora"):
        state = {f"{name}.{last}.{which}.weight": x for which, x in pair.items()}
        write_safetensors(tmp_path / "x.safetensors", state)
        (found,) = read_lora(tmp_path / "x.safetensors").parts["text_encoder"]
        assert found.layer == "text_model.encoder.layers.0.self_attn.q_proj"


def test_bad_files_and_weights_are_refused_in_one_line(tmp_path):
    good, _ = in_dialect("kohya", changes_of())
    name = next(iter(name for name in good if "lora_up" in name))
    for weight in ("0.8", float("nan"), None, True):
        with pytest.raises(UserError, match="is to be a number"):
            read_lora(tmp_path / "x.safetensors", weight)  # type: ignore[arg-type]
    with pytest.raises(UserError, match="is a folder: name a file of LoRA; it has none"):
        read_lora(tmp_path)
    for state, said in (
        ({k: x for k, x in good.items() if k != name}, "its up matrix is missing"),
        (good | {"x.dora_scale": np.ones(2)}, "the tensor x.dora_scale is of no LoRA"),
        (good | {"x.alpha": np.ones(())}, "has an alpha of x without its matrices"),
        ({"unet.x.lora_A.weight": np.ones(2)}, "is [2], which is no matrix"),
        ({}, "has no LoRA"),
    ):
        safetensors.numpy.save_file(state, tmp_path / "x.safetensors")
        with pytest.raises(UserError, match=re.escape(said)) as caught:
            read_lora(tmp_path / "x.safetensors")
        assert "\n" not in str(caught.value)
    write_safetensors(tmp_path / "x.safetensors", {"base_model.model.x.lora_A.weight": np.ones(2)})
    for text in ("{", "[]"):
        write_safetensors(tmp_path / "x.safetensors", good, {"lora_adapter_metadata": text})
        with pytest.raises(UserError, match="in its header is no JSON object"):
            read_lora(tmp_path / "x.safetensors")


def test_a_matrix_that_is_not_finite_is_named_with_its_file(tmp_path):
    state, _ = in_dialect("kohya", changes_of())
    name = next(name for name in state if "lora_up" in name)
    write_safetensors(tmp_path / "x.safetensors", state | {name: np.full_like(state[name], np.nan)})
    after = merged(state_of(), read_lora(tmp_path / "x.safetensors"), NETWORK, "net")
    with pytest.raises(UserError, match=re.escape(f"x.safetensors: {name} has ")):
        [np.asarray(x) for x in after.values()]


def test_a_lora_of_another_network_names_the_first_unknown_layer_and_the_nearest(tmp_path):
    state, _ = in_dialect("kohya", changes_of())
    write_safetensors(tmp_path / "x.safetensors", state)
    lora = read_lora(tmp_path / "x.safetensors")
    short = {name.replace("attn2", "attn3"): x for name, x in state_of().items()}
    assert str(of_another_network(lora, NETWORK, short, "net")).endswith(
        "is of another network than net, which has no layer mid_block_attentions_0_transformer_"
        "blocks_0_attn2_to_k; did you mean mid_block.attentions.0.transformer_blocks.0.attn3.to_k?"
    )
    wide = dict.fromkeys(state_of(), np.zeros((6, 12)))
    with pytest.raises(UserError, match=r" is \[6, 12\], and its matrices are "):
        merged(wide, lora, NETWORK, "net")
