"""DiT and SiT against outputs of the authors' code (tests/references/dit.py) and of diffusers."""

import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffjax.errors import UserError
from diffjax.models.dit.published import DIFFUSERS, FAMILY
from diffjax.models.sit.published import FAMILY as SIT
from tests.models.published.test_families import drawn
from tests.references import dit
from tests.support.witnesses import witnesses

SMALL: Any = {"side": 8, "channels": 3, "num_classes": 5, "out_channels": 6, **dit.SETTINGS}


def config_of(denoiser: Any) -> dict[str, Any]:
    assert DIFFUSERS.config
    return DIFFUSERS.config.entries(denoiser)


# SiT's network is DiT's; its names are in test_families.py.
@pytest.mark.parametrize(
    "family",
    [FAMILY, pytest.param(SIT, marks=pytest.mark.thorough(tenth=False))],
    ids=lambda family: family.name,
)
def test_outputs_are_those_of_the_authors_code(family):
    with np.load(dit.FOLDER / f"{family.name}.npz", allow_pickle=False) as stored:
        expected, positions = stored["out"], stored["pos_embed"]
    denoiser = family.network(
        (dit.SIDE, dit.SIDE, dit.CHANNELS),
        dit.NUM_CLASSES,
        out_channels=2 * dit.CHANNELS,
        **dit.SETTINGS,
    )
    nothing = jax.tree.map(lambda leaf: np.zeros(leaf.shape), family.shapes(denoiser))
    shapes = {name: array.shape for name, array in family.to_theirs(nothing, denoiser).items()}
    shapes.pop("pos_embed")
    state = dit.drawn(shapes) | {"pos_embed": positions}
    params = family.to_ours(state, denoiser, "theirs")
    out = jax.jit(denoiser.network.apply)(
        {"params": params},
        jnp.asarray(dit.IMAGES),
        jnp.asarray(dit.NOISE_LABELS),
        jnp.asarray(dit.LABELS),
    )
    error = np.linalg.norm(np.asarray(out) - expected) / np.linalg.norm(expected)
    assert expected.std() > 0.1
    assert error < 1e-5


def test_a_file_for_larger_images_is_recognised():
    denoiser = FAMILY.network((64, 64, 4), **FAMILY.sizes["DiT-S/8"].settings)
    nothing = jax.tree.map(
        lambda leaf: np.broadcast_to(np.float32(0), leaf.shape), FAMILY.shapes(denoiser)
    )
    state = FAMILY.to_theirs(nothing, denoiser)
    assert state["pos_embed"].shape == (1, 64, 384)
    assert FAMILY.network_of(state, "x") == denoiser


@pytest.mark.parametrize("scan", [False, True])
def test_embeddings_of_diffusers_are_repeated_in_each_block(scan):
    denoiser = DIFFUSERS.network(**SMALL, scan=scan)
    params = drawn(DIFFUSERS, denoiser)
    state = DIFFUSERS.to_theirs(params, denoiser)
    name = "transformer_blocks.{}.norm1.emb.timestep_embedder.linear_1.bias"
    np.testing.assert_array_equal(state[name.format(0)], state[name.format(1)])
    jax.tree.map(np.testing.assert_array_equal, DIFFUSERS.to_ours(state, denoiser, "x"), params)
    state[name.format(1)] = state[name.format(0)] + 1
    with pytest.raises(UserError, match=r"x: trans.*0\..*1\..*bias differ, and here one parameter"):
        DIFFUSERS.to_ours(state, denoiser, "x")


def test_what_config_json_has_and_tensors_contradict():
    """Settings without a trace in the shapes come from it: heads, epsilon, the side of images."""
    denoiser = DIFFUSERS.network(**SMALL)
    config = config_of(denoiser)
    state = DIFFUSERS.to_theirs(drawn(DIFFUSERS, denoiser), denoiser)
    assert DIFFUSERS.network_of(state, "x", config) == denoiser
    for change, said in (
        ({"num_layers": 3}, "x: config.json has depth=3, but its tensors are of depth=2"),
        ({"activation_fn": "gelu"}, "has activation_fn='gelu', and only 'gelu-approximate' is"),
        ({"_class_name": "UNet2DModel"}, "has _class_name='UNet2DModel', and only 'DiTTransfor"),
        ({"num_attention_heads": 4}, "has hidden_size=32, but its tensors are of hidden_size=16"),
        ({"num_attention_heads": None}, "x: config.json can't be used: int.. argument must be"),
        ({"sample_size": 10**9}, "can't be used: patches of 2 in images of 1000000000"),
        ({"norm_eps": "small"}, "can't be used: could not convert string to float: 'small'"),
    ):
        with pytest.raises(UserError, match=said):
            DIFFUSERS.network_of(state, "x", config | change)
    with pytest.raises(UserError, match=r"x: config\.json lacks 'norm_eps'"):
        DIFFUSERS.network_of(state, "x", {k: v for k, v in config.items() if k != "norm_eps"})
    with pytest.raises(UserError, match="has classes and square images, not 5 classes and 8x12"):
        config_of(FAMILY.network((8, 12, 3), 5, **dit.SETTINGS))


def of_block_0(name):
    """The name of the first copy of an embedding."""
    return re.sub(r"s\.\d+\.norm1\.emb\.", "s.0.norm1.emb.", name)


@pytest.mark.parity
@pytest.mark.parametrize("mlp_norm_eps", witnesses([1e-5, 1e-2], [1e-2]))
def test_outputs_and_gradients_are_those_of_diffusers(mlp_norm_eps):
    """Of unlike times, in float64 there; gradients with respect to inputs and parameters.

    Times are the authors' too, so an embedding over 128 frequencies is seen to differ.
    """
    torch = pytest.importorskip("torch")
    diffusers = pytest.importorskip("diffusers", reason="pip install -e '.[parity]'")
    ours = DIFFUSERS.network(**SMALL, mlp_norm_eps=mlp_norm_eps)
    peer = diffusers.DiTTransformer2DModel.from_config(config_of(ours)).eval().double()
    state = dit.drawn({name: tuple(x.shape) for name, x in peer.state_dict().items()})
    state |= {name: state[of_block_0(name)] for name in state}
    peer.load_state_dict({name: torch.tensor(x) for name, x in state.items()})
    params = DIFFUSERS.to_ours(state, ours, "theirs")

    images = torch.tensor(dit.IMAGES.transpose(0, 3, 1, 2)).double().requires_grad_()
    times, labels = torch.tensor(dit.NOISE_LABELS), torch.tensor(dit.LABELS)
    expected = peer(images, times, labels).sample
    weights = np.random.default_rng(1).normal(size=expected.shape)
    (expected * torch.tensor(weights)).sum().backward()

    def total(params, images, network):
        out = network.apply({"params": params}, images, dit.NOISE_LABELS, dit.LABELS)
        return (out * weights.transpose(0, 2, 3, 1).astype(np.float32)).sum(), out

    gradient = jax.jit(jax.grad(total, (0, 1), has_aux=True), static_argnums=2)
    (of_params, of_images), out = gradient(params, dit.IMAGES, ours.network)

    def error(found, expected):
        found, expected = np.asarray(found), expected.detach().numpy()
        assert expected.std() > 0
        return np.linalg.norm(found - expected) / np.linalg.norm(expected)

    assert error(out.transpose(0, 3, 1, 2), expected) < 1e-5
    assert error(of_images.transpose(0, 3, 1, 2), images.grad) < 1e-5
    # One parameter here has the sum of the gradients of its copies there.
    grads: Any = dict.fromkeys(state, 0.0)
    for name, parameter in peer.named_parameters():
        grads[of_block_0(name)] = grads[of_block_0(name)] + parameter.grad
    for name, found in DIFFUSERS.to_theirs(of_params, ours).items():
        if "to_k.bias" not in name:  # Its gradient is 0: a softmax ignores constants.
            assert error(found, grads[of_block_0(name)]) < 1e-5, name
    over_128 = ours.network.clone(frequency_endpoint=False)
    assert error(gradient(params, dit.IMAGES, over_128)[1].transpose(0, 3, 1, 2), expected) > 1e-3
