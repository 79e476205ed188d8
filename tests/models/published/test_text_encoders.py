"""Text encoders against transformers: stored outputs, and the library itself where installed."""

import functools
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffjax.errors import UserError
from diffjax.models.clip_text.network import ClipText
from diffjax.models.clip_text.published import BARE, FAMILY, OPENCLIP
from diffjax.models.families import find_published, found_in
from diffjax.models.t5.network import T5Encoder, bucket
from diffjax.models.t5.published import FAMILY as T5
from diffjax.pretrained.files import read_state_dict
from diffjax.pretrained.folders import Contents, write_folder
from tests.models.published.test_families import drawn as drawn_params
from tests.references.text_encoders import CASES, FILE, parameters
from tests.support.witnesses import witnesses

NAMES = list(CASES)


@functools.cache
def params_of(name):
    """The parameters that the reference drew by the names of transformers."""
    case = CASES[name]
    nothing = jax.tree.map(lambda leaf: np.zeros(leaf.shape), case.family.shapes(case.network))
    shapes = {key: x.shape for key, x in case.family.to_theirs(nothing, case.network).items()}
    return case.family.to_ours(parameters(shapes), case.network, "theirs")


def evaluated(name, **changes):
    case, network = CASES[name], CASES[name].network.clone(**changes)
    mask = case.mask if case.has_mask else None
    return jax.jit(network.apply)({"params": params_of(name)}, case.ids, mask)


def named(states):
    """Our states by the names of the reference, of which `last` is after the final norm."""
    found = {f"hidden_{i}": x for i, x in enumerate(states.hidden)}
    return found | {"pooled": states.pooled, "last": states.normed[-1]}


def assert_close(found, expected, where, tolerance=1e-5):
    found, expected = np.asarray(found), np.asarray(expected)
    assert found.shape == expected.shape, where
    error = np.linalg.norm(found - expected) / np.linalg.norm(expected)
    assert error < tolerance, (where, error)


# OpenCLIP's sizes are CLIP's network with another activation.
@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=pytest.mark.thorough(tenth=False) if name == "clip-bigg" else [])
        for name in NAMES
    ],
)
def test_states_are_those_of_transformers(name):
    states = named(evaluated(name))
    with np.load(FILE, allow_pickle=False) as stored:
        keys = [key for key in stored if key.startswith(f"{name}/")]
        assert len(keys) >= 3
        for key in keys:
            # States of padding are finite and have no meaning.
            assert_close(states[key.partition("/")[2]], stored[key], key)


@pytest.mark.thorough
@pytest.mark.parametrize("name", NAMES)
def test_half_precision_is_close(name):
    whole = named(evaluated(name))
    for key, x in named(evaluated(name, dtype="bfloat16")).items():
        assert x.dtype == jnp.float32, key
        if x.size:
            assert_close(x, whole[key], key, tolerance=3e-2)


class TestT5:
    def test_padding_has_no_influence_and_distances_have(self):
        case, params = CASES["t5"], {"params": params_of("t5")}
        apply = jax.jit(case.network.apply)
        states = evaluated("t5").normed[-1]
        other = np.where(case.mask, case.ids, 9)
        found = apply(params, other, case.mask).normed[-1]
        np.testing.assert_allclose(found[case.mask], states[case.mask], atol=1e-6)
        apart = case.ids[:, ::-1].copy()
        mirrored = apply(params, apart, case.mask[:, ::-1].copy()).normed[-1][:, ::-1]
        assert np.abs(mirrored - states)[case.mask].max() > 0.01

    def test_buckets_grow_as_in_the_paper(self):
        """Raffel et al. 2020, section 2.1: logarithmic up to 128, beyond which all share one."""
        distances = np.arange(0, 300)
        found = bucket(-distances)
        np.testing.assert_array_equal(found[:8], np.arange(8))
        # The bucket of 8·2^(k/2) begins there, rounded up.
        starts = np.ceil(8 * 2 ** (np.arange(8) / 2)).astype(int)
        np.testing.assert_array_equal(np.searchsorted(found, np.arange(8, 16)), starts)
        assert found.max() == 15
        np.testing.assert_array_equal(bucket(distances)[1:], found[1:] + 16)

    def test_sums_of_branches_are_not_rounded_in_half_precision(self):
        """Of states of 10⁴, bfloat16 would keep multiples of 64."""
        network = T5Encoder(8, 1, 2, 12, vocabulary=9, head_width=4, dtype="bfloat16")
        params = drawn_params(T5, network)
        params["tokens"]["embedding"] = params["tokens"]["embedding"] + 1e4
        before, after = jax.jit(network.apply)({"params": params}, np.arange(4)[None]).hidden
        assert 0 < np.abs(after - before).max() < 32


class TestBert:
    def test_padding_has_no_influence(self):
        case, params = CASES["bert"], {"params": params_of("bert")}
        found = jax.jit(case.network.apply)(params, np.where(case.mask, case.ids, 9), case.mask)
        np.testing.assert_allclose(found.pooled, evaluated("bert").pooled, atol=1e-6)

    def test_texts_without_tokens_have_a_vector_of_zeros(self):
        case, params = CASES["bert"], {"params": params_of("bert")}
        found = jax.jit(case.network.apply)(params, case.ids, np.zeros_like(case.mask))
        np.testing.assert_array_equal(found.pooled, np.zeros_like(found.pooled))
        assert np.isfinite(found.normed[-1]).all()


def entries_of(family, network):
    assert family.config.weights == "model"
    return family.config.entries(network)


class TestClip:
    def test_a_token_depends_on_those_before_it_alone(self):
        network, ids = CASES["clip-l"].network, CASES["clip-l"].ids
        found = evaluated("clip-l").normed[-1]
        apply = jax.jit(network.apply)
        other = apply({"params": params_of("clip-l")}, ids[:, ::-1].copy()).normed[-1]
        shorter = apply({"params": params_of("clip-l")}, ids[:, :4]).normed[-1]
        np.testing.assert_allclose(shorter, found[:, :4], atol=1e-6)
        assert np.abs(other - found).max() > 0.1

    def test_the_first_end_is_pooled(self):
        """By the largest id, and by the id of the end where a larger one was added."""
        network, params = CASES["clip-l"].network, {"params": params_of("clip-l")}
        ids = np.array([[3, 12, 7, 12, 12]], np.int32)
        largest = jax.jit(network.apply)(params, ids)
        by_id = jax.jit(network.clone(end=7).apply)(params, ids)
        np.testing.assert_array_equal(largest.pooled, largest.normed[-1][:, 1])
        np.testing.assert_array_equal(by_id.pooled, largest.normed[-1][:, 2])

    @pytest.mark.parametrize(
        ("family", "prefix"),
        [
            (FAMILY, "cond_stage_model.transformer."),
            (BARE, ""),
            (OPENCLIP, "conditioner.embedders.1.model."),
        ],
        ids=lambda x: getattr(x, "name", x),
    )
    def test_all_layouts_are_read_alone_and_within_whole_models(self, family, prefix):
        features = 0 if family is BARE else 5
        untraced = {"num_heads": 2, "activation": "gelu"}
        network = ClipText(
            8, 2, num_features=features, mlp_width=12, vocabulary=9, length=4, **untraced
        )
        params = drawn_params(family, network)
        state = {prefix + name: x for name, x in family.to_theirs(params, network).items()}
        others = {"model.out.2.bias": np.zeros(4)} if prefix else {}
        whole = Contents(state | others, {}, Path("x.safetensors"))
        found = found_in(whole.part(prefix), **untraced)
        assert (found.network, found.family.name) == (network, family.name)
        jax.tree.map(np.testing.assert_array_equal, found.params(), params)

    def test_openclip_has_queries_keys_and_values_in_one_and_the_projection_transposed(self):
        network = ClipText(8, 1, 2, num_features=5, vocabulary=9)
        params = drawn_params(FAMILY, network)
        theirs, of_openclip = (x.to_theirs(params, network) for x in (FAMILY, OPENCLIP))
        qkv = [
            theirs[f"text_model.encoder.layers.0.self_attn.{part}_proj.weight"] for part in "qkv"
        ]
        block = "transformer.resblocks.0.attn.in_proj_weight"
        np.testing.assert_array_equal(of_openclip[block], np.concatenate(qkv))
        projection = theirs["text_projection.weight"]
        np.testing.assert_array_equal(of_openclip["text_projection"], projection.T)

    def test_wrong_settings_end_in_one_line(self, tmp_path):
        network = ClipText(8, 1, 2, vocabulary=9, length=4)
        with pytest.raises(UserError, match="activation: none is called 'gleu'; did you mean"):
            FAMILY.shapes(network.clone(activation="gleu"))
        with pytest.raises(UserError, match="a text has 5 tokens, and this encoder reads 4"):
            network.init(jax.random.key(0), np.zeros((1, 5), np.int32))
        entries = entries_of(FAMILY, network)
        state = FAMILY.to_theirs(drawn_params(FAMILY, network), network)
        write_folder(tmp_path, state, entries | {"hidden_act": "relu"}, name="model")
        with pytest.raises(UserError, match="hidden_act is 'relu', not quick_gelu or gelu"):
            find_published(tmp_path)


@pytest.fixture(scope="module")
def peers():
    pytest.importorskip("torch")
    return pytest.importorskip("transformers", reason="pip install -e '.[parity]'")


@pytest.mark.parity
@pytest.mark.usefixtures("peers")
@pytest.mark.parametrize("name", witnesses(NAMES, ["clip-bigg", "t5-v1.1", "bert", "qwen3"]))
class TestAgainstTransformers:
    def test_outputs_and_gradients_are_equal(self, name):
        """Gradients with respect to all parameters, those of the embedded tokens among them.

        transformers computes in float64.
        """
        torch = pytest.importorskip("torch")
        case = CASES[name]
        peer, network = case.theirs().double(), case.network
        found = case.outputs(peer)
        random = np.random.default_rng(3)
        kept = case.mask[..., None]
        weights = {key: random.normal(size=x.shape) for key, x in found.items()}
        weights = {key: w if key == "pooled" else w * kept for key, w in weights.items()}
        total: Any = sum((x * torch.tensor(weights[key])).sum() for key, x in found.items())
        total.backward()

        def inner(params):
            states = network.apply(
                {"params": params}, case.ids, case.mask if case.has_mask else None
            )
            ours = named(states)
            return sum((ours[key] * w.astype(np.float32)).sum() for key, w in weights.items()), ours

        gradients, ours = jax.jit(jax.grad(inner, has_aux=True))(params_of(name))
        for key, x in found.items():
            expected = x.detach().numpy()
            mask = 1.0 if key == "pooled" else kept
            assert_close(np.asarray(ours[key]) * mask, expected * mask, key)
        of_names = case.family.to_theirs(gradients, network)
        for key, weight in peer.named_parameters():
            # Of keys they are zero up to rounding: a softmax ignores constants.
            if not key.endswith(("k_proj.bias", "key.bias")) and weight.grad is not None:
                assert_close(of_names[key], weight.grad.numpy(), key)

    def test_folders_are_read_and_written(self, name, tmp_path):
        case = CASES[name]
        peer = case.theirs()
        peer.save_pretrained(tmp_path / "theirs")
        found = find_published(tmp_path / "theirs")
        assert found.network == case.network
        jax.tree.map(np.testing.assert_array_equal, found.params(), params_of(name))
        family = FAMILY if case.family is BARE else case.family
        state = family.to_theirs(params_of(name), case.network)
        write_folder(tmp_path / "ours", state, entries_of(family, case.network), name="model")
        again = type(peer).from_pretrained(tmp_path / "ours").state_dict()
        assert again.keys() == peer.state_dict().keys()
        for key, x in peer.state_dict().items():
            if "pooler" not in key:
                np.testing.assert_array_equal(again[key].numpy(), x.numpy(), key)
        assert find_published(tmp_path / "ours").network == case.network


@pytest.mark.parity
def test_states_are_those_of_open_clip(tmp_path):
    """Each layer and the projected vector, of a file with both halves of the model.

    pip install open-clip-torch
    """
    torch = pytest.importorskip("torch")
    open_clip = pytest.importorskip("open_clip")
    of_images = open_clip.CLIPVisionCfg(layers=1, width=8, head_width=4, image_size=8, patch_size=4)
    of_texts = open_clip.CLIPTextCfg(context_length=7, vocab_size=13, width=16, heads=2, layers=3)
    theirs = open_clip.CLIP(6, of_images, of_texts).eval()
    generator, hidden = torch.Generator().manual_seed(0), []
    for x in theirs.parameters():
        x.data = x[0].numel() ** -0.5 * torch.randn(x.shape, generator=generator) if x.ndim else x
    for block in theirs.transformer.resblocks:
        block.register_forward_hook(lambda _, inputs, out: hidden.append(out.detach().numpy()))
    ids = np.array([[11, 3, 12, 0, 0, 0, 0], [11, 1, 2, 3, 4, 5, 12]], np.int32)
    with torch.no_grad():
        pooled = theirs.encode_text(torch.tensor(ids)).numpy()
    torch.save(theirs.state_dict(), tmp_path / "open_clip.pt")
    state = read_state_dict(tmp_path / "open_clip.pt")
    network = OPENCLIP.network_of(state, "it", num_heads=2, activation="gelu")
    params = OPENCLIP.to_ours(state, network, "it")
    states = jax.jit(network.apply)({"params": params}, ids)
    assert_close(states.pooled, pooled, "pooled")
    assert len(hidden) == len(states.hidden) - 1 == 3
    for i, expected in enumerate(hidden, 1):
        assert_close(states.hidden[i], expected, i)
