"""Kandinsky 2's decoders and unCLIP's priors: against diffusers, where it is installed."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffjax.conditions import Tokens, TokenStates
from diffjax.errors import UserError
from diffjax.models import families
from diffjax.models.bert.published import MCLIP
from diffjax.models.kandinsky.published import FAMILY as DECODER
from diffjax.models.layers.common import SelfAttention
from diffjax.models.layers.context import AttentionWithTokens
from diffjax.models.unclip.network import UnclipPrior
from diffjax.models.unclip.published import FAMILY as PRIOR
from diffjax.pretrained import folders
from tests.references import unets as reference

_DECODER: dict[str, Any] = {
    "image_shape": (8, 12, 4),
    "channels": 32,
    "channel_multipliers": (1, 2),
    "num_res_blocks": 1,
    "num_groups": 8,
    "token_levels": (1,),
    "head_channels": 16,
    "image_width": 10,
    "num_image_tokens": 32,
    "context_width": 12,
}
_WITH_TEXT = {
    **_DECODER,
    "image_width": 12,
    "num_image_tokens": 10,
    "text_width": 14,
    "pooled_width": 12,
}
_PRIOR = {"features": 10, "width": 24, "depth": 3, "num_heads": 2, "length": 7}
CASES: dict[str, tuple[Any, dict[str, Any]]] = {
    "2.2": (DECODER, _DECODER),
    "2.2 inpainting": (DECODER, {**_DECODER, "given_channels": 5, "token_levels": (0, 1)}),
    "2.1": (DECODER, _WITH_TEXT),
    "prior": (PRIOR, _PRIOR),
}
TIMES = np.array([999.0, 0.0, 320.0], np.float32)


def random(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def drawn(family, denoiser):
    """Parameters, none as it is initialised; scales of norms are near 1, so that pixels differ."""
    nothing = jax.tree.map(lambda leaf: np.zeros(leaf.shape), family.shapes(denoiser))
    shapes = {name: x.shape for name, x in family.to_theirs(nothing, denoiser).items()}
    state = {
        name: x + 1 if "norm" in name and name.endswith("weight") else x
        for name, x in reference.parameters(shapes).items()
    }
    return family.to_ours(state, denoiser, "theirs")


def condition_of(denoiser):
    """Three examples; a prior's texts have unlike numbers of tokens."""
    condition = denoiser.condition
    parts = getattr(condition, "parts", {"text": condition})
    tokens = parts["text"]
    many = np.array([7, 4, 1]) if isinstance(denoiser.network, UnclipPrior) else tokens.length
    mask = np.arange(tokens.length)[None] < np.broadcast_to(many, 3)[:, None]
    states = random(3, tokens.length, tokens.width, seed=1)
    text = TokenStates(states, mask, random(3, tokens.pooled_width, seed=2))
    if "image" not in parts:
        return text
    return {"text": text, "image": random(3, *parts["image"].shape, seed=4)}


def of_diffusers(peer, ours, x, text, given):
    """The output of diffusers' network, whose condition is in several arguments."""
    import torch

    times = torch.tensor(TIMES)
    states, network = text["states"], ours.network
    if isinstance(network, UnclipPrior):
        mask = torch.tensor(text["mask"])
        out = peer(x[:, :, 0, 0], times, text["pooled"], states, mask).predicted_image_embedding
        return out[:, :, None, None]
    added = {"image_embeds": states[:, 0, : network.image_width]}
    rest = None
    if network.text_width:
        added["text_embeds"] = text["pooled"]
        rest = states[:, 1:, : network.text_width]
    return peer(torch.cat([x, *given], 1), times, rest, added_cond_kwargs=added).sample


def error(found, expected):
    return np.linalg.norm(np.asarray(found) - expected) / np.linalg.norm(expected)


@pytest.mark.parity
@pytest.mark.parametrize(
    ("name", "train"),
    [
        pytest.param(name, train, marks=[] if quick else pytest.mark.thorough(tenth=False))
        for name in CASES
        for train in (True, False)
        for quick in [(name, train) in (("2.1", True), ("prior", False))]
    ],
)
def test_outputs_and_gradients_are_those_of_diffusers(name, train, tmp_path):
    """With respect to images, states and parameters; diffusers in float64."""
    torch = pytest.importorskip("torch")
    diffusers = pytest.importorskip("diffusers", reason="pip install -e '.[parity]'")
    family, settings = CASES[name]
    ours = family.network(**settings)
    params, cond = drawn(family, ours), condition_of(ours)
    folders.write_folder(tmp_path, family.to_theirs(params, ours), family.config.entries(ours))
    found = families.find_published(tmp_path)
    assert (found.network, found.layout) == (ours, "diffusers")
    peer = getattr(diffusers, family.config.class_name).from_pretrained(tmp_path)
    peer = peer.train(train).double()
    parts = cond if isinstance(cond, dict) else {"text": cond}

    def theirs(x, axes=()):
        return torch.tensor(np.transpose(x, axes) if axes else x).double().requires_grad_()

    x = theirs(random(3, *ours.image_shape, seed=5), (0, 3, 1, 2))
    given = [theirs(parts["image"], (0, 3, 1, 2))] if "image" in parts else []
    text = {"states": theirs(parts["text"].states), "pooled": theirs(parts["text"].pooled)}
    expected = of_diffusers(peer, ours, x, {**text, "mask": parts["text"].mask}, given)
    factors = random(*expected.shape, seed=6)
    (expected * torch.tensor(factors)).sum().backward()
    factors = factors.transpose(0, 2, 3, 1)

    def total(params, x, states, pooled):
        tokens = parts["text"]._replace(states=states, pooled=pooled)
        whole = {**parts, "text": tokens} if isinstance(cond, dict) else tokens
        out = ours.network.apply({"params": params}, x, jnp.asarray(TIMES), whole, train=train)
        return (out * factors).sum(), out

    gradient = jax.jit(jax.grad(total, (0, 1, 2, 3), has_aux=True))
    images = random(3, *ours.image_shape, seed=5)
    (of_params, *of_inputs), out = gradient(params, images, *parts["text"][::2])
    assert expected.std() > 0.1
    assert error(out, expected.detach().numpy().transpose(0, 2, 3, 1)) < 1e-5
    assert error(of_inputs[0], x.grad.numpy().transpose(0, 2, 3, 1)) < 1e-5
    for ours_, theirs_ in zip(of_inputs[1:], (text["states"], text["pooled"]), strict=True):
        if theirs_.grad is not None:
            assert error(ours_, theirs_.grad.numpy()) < 1e-5
    named = family.to_theirs(of_params, ours)
    unused = "clip_mean", "clip_std"
    grads = {k: v.grad.numpy() for k, v in peer.named_parameters() if k not in unused}
    for parameter, value in grads.items():
        # Keys' biases have no influence; gradients of queries are small differences.
        if np.linalg.norm(value) > 1e-9:
            assert error(named[parameter], value) < 5e-5, parameter
    flat = [np.concatenate([tree[key].ravel() for key in grads]) for tree in (named, grads)]
    assert error(*flat) < 1e-5


@pytest.mark.parity
@pytest.mark.thorough
@pytest.mark.parametrize("name", [*DECODER.sizes, *PRIOR.sizes])
def test_diffusers_has_as_many_parameters_of_each_size(name):
    torch = pytest.importorskip("torch")
    diffusers = pytest.importorskip("diffusers", reason="pip install -e '.[parity]'")
    family: Any = DECODER if name in DECODER.sizes else PRIOR
    with torch.device("meta"):
        peer = getattr(diffusers, family.config.class_name).from_config(
            family.config.entries(family.size(name))
        )
    assert sum(x.numel() for x in peer.parameters()) == family.sizes[name].num_parameters


def test_attention_to_tokens_is_self_attention_where_all_tokens_are_hidden():
    """One softmax: tokens that a mask hides change nothing, and shown ones do."""
    layer, alone = AttentionWithTokens(2), SelfAttention(2)
    x, masks = random(2, 7, 8), np.stack([np.zeros((2, 5), bool), np.ones((2, 5), bool)])
    text = TokenStates(random(2, 5, 6), masks[0], np.zeros((2, 0), np.float32))
    shapes: Any = jax.eval_shape(layer.init, jax.random.key(0), x, text)["params"]
    params = jax.tree.map(lambda leaf: 0.3 * random(*leaf.shape, seed=leaf.size), shapes)
    without = {name: part for name, part in params.items() if name != "context_kv"}

    @jax.jit
    def evaluated(params, without):
        found = [layer.apply({"params": params}, x, text._replace(mask=mask)) for mask in masks]
        return *found, alone.apply({"params": without}, x)

    hidden, shown, expected = map(np.asarray, evaluated(params, without))
    np.testing.assert_allclose(hidden, expected, rtol=1e-4, atol=1e-5)
    assert np.abs(shown - hidden).max() > 1e-3


def test_a_prior_refuses_what_is_no_text():
    network = UnclipPrior(0, width=8, depth=1, num_heads=2, length=7)
    x, t = np.zeros((2, 1, 1, 6), np.float32), np.zeros(2, np.float32)
    for cond in (None, Tokens(5, 6, 6).example(2)):
        with pytest.raises(UserError, match="takes the states of a text of 7 tokens"):
            jax.eval_shape(network.init, jax.random.key(0), x, t, cond)


@pytest.mark.parity
def test_states_of_the_multilingual_encoder_are_those_of_diffusers(tmp_path):
    """Positions of RoBERTa: they count from 2, and padding has position 1."""
    torch = pytest.importorskip("torch")
    pytest.importorskip("diffusers", reason="pip install -e '.[parity]'")
    from diffusers.pipelines.kandinsky.text_encoder import MCLIPConfig
    from diffusers.pipelines.kandinsky.text_encoder import MultilingualCLIP as Peer

    sizes = {"width": 24, "depth": 2, "num_heads": 4, "vocabulary": 40, "length": 12}
    ours = MCLIP.network(**sizes, mlp_width=36, num_features=10)
    params = drawn(MCLIP, ours)
    assert MCLIP.config is not None
    entries = MCLIP.config.entries(ours)
    folders.write_folder(tmp_path, MCLIP.to_theirs(params, ours), entries, name="model")
    assert families.find_published(tmp_path).network == ours
    peer = Peer(MCLIPConfig(**entries)).eval()
    state = {name: torch.tensor(x) for name, x in MCLIP.to_theirs(params, ours).items()}
    missing = peer.load_state_dict(state, strict=False)
    assert all("pooler" in name for name in missing.missing_keys)
    ids = np.array([[0, 7, 9, 2, 1, 1], [0, 2, 1, 1, 1, 1], [0, 5, 5, 30, 39, 2]])
    mask = ids != 1
    found = jax.jit(ours.apply)({"params": params}, ids.astype(np.int32), mask)
    with torch.no_grad():
        pooled, states = peer(torch.tensor(ids), torch.tensor(mask.astype(np.int64)))
    assert error(found.hidden[-1], states.numpy()) < 1e-5
    assert error(found.pooled, pooled.numpy()) < 1e-5
