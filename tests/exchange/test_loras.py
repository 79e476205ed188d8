"""LoRA files of pipelines: the network and the texts are those of diffusers with peft."""

import json
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import diffjax
from diffjax.conditions import TokenStates
from diffjax.errors import UserError
from diffjax.pretrained.files import write_safetensors
from diffjax.runs.initial import weights_sha256
from experiments import evaluate, sample
from tests.exchange.test_pipelines import SIDE, needed, run, stable_diffusion
from tests.exchange.test_schedulers import SD1
from tests.support.messages import error_line
from tests.support.witnesses import witnesses

LAYERS = (
    "down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q",
    "down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_v",
    "down_blocks.0.attentions.0.transformer_blocks.0.ff.net.0.proj",
    "up_blocks.1.attentions.1.transformer_blocks.0.attn1.to_out.0",
    "mid_block.attentions.0.proj_in",
    "down_blocks.1.resnets.0.conv1",
    "down_blocks.0.resnets.0.time_emb_proj",
    "up_blocks.1.resnets.0.conv_shortcut",
)
ATTENTION = tuple(name for name in LAYERS if "attn" in name)
TEXT = (
    "encoder.layers.0.self_attn.q_proj",
    "encoder.layers.0.self_attn.out_proj",
    "encoder.layers.1.mlp.fc2",
)
ALPHA = 2.5
"""Of all layers: diffusers 0.42 loses those of attention layers in kohya's files where they differ.
They may differ in `tests/pretrained/test_lora.py`, where NumPy computes the changes."""


@pytest.fixture(scope="module")
def pipe():
    pytest.importorskip("peft", reason="pip install -e '.[parity]'")
    return stable_diffusion("DDIMScheduler", SD1)


@pytest.fixture(scope="module")
def folder(pipe, tmp_path_factory):
    """The pipeline as diffusers saves it, before it has any LoRA."""
    place = tmp_path_factory.mktemp("loras") / "pipe"
    pipe.save_pretrained(place)
    return place


def matrices(pipe, names, part, seed):
    """A and B of each layer, of ranks from 1 on."""
    random, found = np.random.default_rng(seed), {}
    for rank, name in enumerate(names, 1):
        out, *rest = getattr(pipe, part).get_submodule(name).weight.shape
        down = random.normal(size=(rank, *rest)) / np.sqrt(np.prod(rest))
        up = random.normal(size=(out, rank, *(1 for _ in rest[1:]))) / np.sqrt(rank)
        found[name] = down.astype(np.float32), up.astype(np.float32)
    return found


def written(file, pipe, dialect, seed=0):
    """A file of a dialect, with layers of the text encoder too but for the oldest."""
    state = {}
    old = dialect == "older diffusers"
    parts = {"unet": ATTENTION if old else LAYERS, "text_encoder": () if old else TEXT}
    for part, names in parts.items():
        for name, (down, up) in matrices(pipe, names, part, seed).items():
            # As files have it; a version of transformers left this level out.
            layer = f"text_model.{name}" if part == "text_encoder" else name
            if dialect == "kohya":
                begin = f"lora_{'te' if part == 'text_encoder' else 'unet'}_{layer}"
                begin = begin.replace(".", "_")
                state[f"{begin}.alpha"] = np.asarray(ALPHA, np.float32)
                names = f"{begin}.lora_down.weight", f"{begin}.lora_up.weight"
            elif old:
                stem, _, last = name.removesuffix(".0").rpartition(".")
                begin = f"{part}.{stem}.processor.{last}_lora"
                names = f"{begin}.down.weight", f"{begin}.up.weight"
            elif dialect == "diffusers":
                kind = "lora_linear_layer" if part == "text_encoder" else "lora"
                begin = f"{part}.{layer}.{kind}"
                names = f"{begin}.down.weight", f"{begin}.up.weight"
            else:
                names = f"{part}.{layer}.lora_A.weight", f"{part}.{layer}.lora_B.weight"
            state |= dict(zip(names, (down, up), strict=True))
    write_safetensors(file, state)
    return str(file)


def outputs(pipe, model, seed=0):
    """Of the U-Net on a batch of unlike times, and token states: theirs in float64, and ours."""
    import torch

    random = np.random.default_rng(seed)
    x = random.normal(size=(2, SIDE // 8, SIDE // 8, 4)).astype(np.float32)
    texts, times = ["a red apple", "blurry"], np.array([999.0, 320.0], np.float32)
    states = random.normal(size=(2, 7, 24)).astype(np.float32)
    tokens = pipe.tokenizer(
        texts, padding="max_length", max_length=pipe.tokenizer.model_max_length, return_tensors="pt"
    )
    with torch.no_grad():
        theirs = pipe.unet.double()(
            torch.tensor(x.transpose(0, 3, 1, 2)).double(),
            torch.tensor(times),
            torch.tensor(states).double(),
        ).sample.numpy()
        theirs_of_text = pipe.text_encoder.double()(tokens.input_ids).last_hidden_state.numpy()
    cond = TokenStates(states, np.ones((2, 7), bool), np.zeros((2, 0), np.float32))
    network = model.parts.wired.network
    ours = jax.jit(partial(network.apply, train=False))(
        {"params": model.params}, x, jnp.asarray(times), cond
    )
    encoded = model.parts.wired.condition.parse(texts).states
    return (theirs.transpose(0, 2, 3, 1), theirs_of_text), (ours, encoded)


def error(found, expected):
    return np.linalg.norm(np.asarray(found) - expected) / np.linalg.norm(expected)


@pytest.mark.parity
@pytest.mark.parametrize(
    "dialect", witnesses(["peft", "diffusers", "older diffusers", "kohya"], ["kohya"])
)
def test_networks_and_texts_with_two_files_are_those_of_diffusers(dialect, pipe, folder, tmp_path):
    """Unmerged there, by peft; ranks differ, and layers are dense ones and convolutions."""
    needed()
    files = [written(tmp_path / f"{i}.safetensors", pipe, dialect, seed=i) for i in (1, 2)]
    weights = dict(zip(files, (0.8, -0.5), strict=True))
    plain = diffjax.from_pretrained(folder)
    model = diffjax.from_pretrained(folder, loras=weights)
    for i, file in enumerate(files):
        pipe.load_lora_weights(file, adapter_name=f"n{i}")
    try:
        pipe.set_adapters(["n0", "n1"], list(weights.values()))
        theirs, ours = outputs(pipe, model)
    finally:
        pipe.unload_lora_weights()
    _, before = outputs(pipe, plain)
    of_text = dialect != "older diffusers"
    for found, expected, without, moved in zip(ours, theirs, before, (True, of_text), strict=True):
        assert error(found, expected) < 1e-5
        assert (error(without, expected) > 0.05) == moved
    assert [x["weight"] for x in model.facts["loras"]] == [0.8, -0.5]


@pytest.mark.parity
def test_weight_0_and_the_lack_of_files_are_the_same_bits(pipe, folder, tmp_path):
    file = written(tmp_path / "x.safetensors", pipe, "kohya")
    plain, zero, one = (
        diffjax.from_pretrained(folder, loras=loras) for loras in (None, {file: 0}, {file: 1.0})
    )
    assert weights_sha256(plain.params) == weights_sha256(zero.params)
    assert weights_sha256(plain.params) != weights_sha256(one.params)
    encoded = [x.parts.wired.condition.parse(["a red apple"]).states for x in (plain, zero)]
    np.testing.assert_array_equal(*encoded)


@pytest.mark.parity
def test_lora_on_the_command_line(pipe, folder, tmp_path, capsys):
    file, out = written(tmp_path / "x.safetensors", pipe, "kohya"), tmp_path / "apple.png"
    flags: list[Any] = [f"--pretrained={folder}", "--num_steps=1", "--prompts=x", f"--out={out}"]
    assert run(sample, *flags, f"--lora={file}:0.8") == 0
    with np.load(out.with_suffix(".npz")) as arrays:
        (recorded,) = json.loads(str(arrays["loras"]))
    assert (recorded["file"], recorded["weight"]) == (file, 0.8)
    assert len(recorded["sha256"]) == 64
    capsys.readouterr()
    for lora, said in (
        (f"{file}:much", "'much' is no weight, as in FILE:0.8"),
        (f"{file}:1,{file}:2", "twice: give it one weight"),
        (f"{tmp_path}/y.safetensors:1", "No such file"),
    ):
        assert run(sample, *flags, f"--lora={lora}") == 2
        message = capsys.readouterr().err
        assert said in error_line(message)
    assert run(evaluate, f"--workdir={tmp_path}", f"--lora={file}") == 2
    assert "--lora goes with --pretrained" in capsys.readouterr().err


@pytest.mark.parity
def test_a_lora_of_another_model_is_refused_in_one_line(pipe, folder, tmp_path):
    one = np.ones((1, 3), np.float32)
    for name, said in (
        (
            "lora_unet_mid_block_attentions_0_proj_inn",
            "did you mean mid_block.attentions.0.proj_in",
        ),
        (
            "lora_te_text_model_encoder_layers_9_mlp_fc1",
            r"did you mean .*encoder.layers.\d.mlp.fc1",
        ),
        (
            "lora_te2_text_model_encoder_layers_0_mlp_fc1",
            "is of text_encoder_2 too, which .* lacks",
        ),
    ):
        state = {f"{name}.lora_down.weight": one, f"{name}.lora_up.weight": one.T}
        write_safetensors(tmp_path / "x.safetensors", state)
        with pytest.raises(UserError, match=said) as caught:
            diffjax.from_pretrained(folder, loras={str(tmp_path / "x.safetensors"): 1.0})
        assert "\n" not in str(caught.value)
    with pytest.raises(UserError, match="is to be files and weights"):
        diffjax.from_pretrained(folder, loras=["x.safetensors"])  # type: ignore[arg-type]
