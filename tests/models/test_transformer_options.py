"""The options of DiT: rotary positions, registers, class tokens, stages, and what excludes what."""

import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffjax.conditions import Tokens
from diffjax.errors import UserError
from diffjax.models import DiT
from diffjax.models.dit.stages import stack_blocks, stages_of
from diffjax.models.layers import common as layers
from diffjax.models.layers.context import CrossAttention
from diffjax.models.layers.rotary import rotate, rotation_2d
from tests.models.test_models import random_like

X = np.random.default_rng(1).standard_normal((2, 8, 4, 3), np.float32)
NOISE, COND = np.array([3.0, 700.0], np.float32), np.array([1, 5], np.int32)
ALL = {
    "norm": "rms",
    "mlp": "swiglu",
    "qk_norm": True,
    "rotary": True,
    "num_registers": 2,
    "num_class_tokens": 3,
    "class_tokens_from": 1,
    "encoder_depth": 2,
    "bottleneck": 5,
}


def small(num_classes=5, **settings):
    return DiT(num_classes, **{"hidden_size": 16, "depth": 4, "num_heads": 2, **settings})


def shapes(net):
    return jax.eval_shape(net.init, jax.random.key(0), X, NOISE, COND)["params"]


def evaluated(net, params, noise=NOISE):
    def run(params, noise):
        collection, name = layers.HIDDEN
        out, sown = net.apply({"params": params}, X, noise, COND, mutable=[collection])
        return out, sown[collection][name][0]

    return jax.device_get(jax.jit(run)(params, noise))


def test_products_of_rotated_vectors_know_the_offset_of_their_positions_alone():
    # With pairs as complex numbers, Re(q conj(k) exp(iω(a - b))), summed over pairs and axes.
    height, width, before = 3, 5, 2
    rng = np.random.default_rng(0)
    q, k = rng.standard_normal((2, 8))
    tokens = before + height * width
    turned = [
        rotate(
            jnp.asarray(np.tile(x, (1, tokens, 1, 1)), jnp.float32),
            rotation_2d(height, width, 8, span, before),
        )
        for span in (0.0, 7.0)
        for x in (q, k)
    ]
    rows, columns = np.divmod(np.arange(height * width), width)
    a = [np.concatenate([np.zeros(before), at]) for at in (rows, columns)]
    pairs = (q[:4] + 1j * q[4:]) * np.conj(k[:4] + 1j * k[4:])
    for found, scales in ((turned[:2], (1.0, 1.0)), (turned[2:], (3.5, 1.75))):
        offsets = [s * (at[:, None] - at[None]) for s, at in zip(scales, a, strict=True)]
        angles = [offset[..., None] * np.array([1.0, 0.01]) for offset in offsets]
        expected = (pairs * np.exp(1j * np.concatenate(angles, -1))).real.sum(-1)
        one, other = (np.asarray(x)[0, :, 0] for x in found)
        np.testing.assert_allclose(one @ other.T, expected, atol=1e-4)


def test_without_registers_and_class_tokens_it_is_the_same_network():
    net, plain = small(num_registers=0, num_class_tokens=0, class_tokens_from=2), small()
    assert net.stages == plain.stages == stages_of(4)
    assert shapes(net) == shapes(plain)


def test_registers_have_no_order_and_are_class_tokens_without_classes():
    params = random_like(shapes(small(0, depth=1, num_registers=3)))
    out, _ = evaluated(small(0, depth=1, num_registers=3), params)
    turned = params | {"registers": params["registers"][::-1]}
    again, _ = evaluated(small(0, depth=1, num_registers=3), turned)
    np.testing.assert_allclose(again, out, atol=1e-5)
    of_classes = {"class_tokens" if k == "registers" else k: v for k, v in params.items()}
    same, _ = evaluated(small(0, depth=1, num_class_tokens=3), of_classes)
    np.testing.assert_allclose(same, out, atol=1e-5)
    others, _ = evaluated(small(0, depth=1, num_registers=3), params | {"registers": X[0, :3, :, 0]
                          .repeat(4, 1)})  # fmt: skip
    assert np.abs(others - out).max() > 1e-2


@pytest.mark.thorough
@pytest.mark.parametrize("scan", [False, True])
def test_dropout_of_the_middle_half_leaves_the_other_blocks(scan):
    net = small(dropout=0.5, dropout_middle=True)
    params = random_like(shapes(net))
    closed = {  # Blocks 1 and 2 of 4 add nothing: their gates are 0.
        name: {**block, "modulation": jax.tree.map(np.zeros_like, block["modulation"])}
        for name, block in params.items()
        if name in ("block_1", "block_2")
    }
    net = small(dropout=0.5, dropout_middle=True, scan=scan)
    stacked = [stack_blocks(p, 1, 3) if scan else p for p in (params, params | closed)]

    @jax.jit
    def both(params):
        how = {"train": True, "rngs": {"dropout": jax.random.key(0)}}
        return [net.apply({"params": params}, X, NOISE, COND, **more) for more in ({}, how)]

    still, dropped = both(stacked[1])
    np.testing.assert_allclose(dropped, still, atol=1e-5)
    still, dropped = both(stacked[0])
    assert np.abs(np.asarray(dropped) - np.asarray(still)).max() > 1e-2


@pytest.mark.thorough
@pytest.mark.parametrize(
    "settings",
    [ALL, {"depth": 5, "conditioning": "tokens", "long_skips": True, "num_registers": 2}],
    ids=["encoder", "skips"],
)
def test_stacks_of_all_stages_are_the_same_function_and_every_parameter_is_used(settings):
    net, loop = small(**settings), small(**settings, scan=True)
    params = random_like(shapes(net))
    starts = [stage.start for stage in net.stages[1:]]
    stack = jax.tree.map(np.asarray, stack_blocks(params, *starts))
    assert jax.tree.map(jnp.shape, stack) == jax.tree.map(jnp.shape, shapes(loop))
    assert layers.attention_layers(stack) == layers.attention_layers(params)
    two = np.stack([NOISE, NOISE / 2], axis=1)
    both = random_like(jax.eval_shape(net.init, jax.random.key(0), X, two, COND)["params"])
    for found, expected in (
        (evaluated(loop, stack), evaluated(net, params)),
        (evaluated(loop, stack_blocks(both, *starts), two), evaluated(net, both, two)),
    ):
        for one, other in zip(found, expected, strict=True):
            np.testing.assert_allclose(one, other, atol=1e-4)
    assert evaluated(net, params)[1].shape == (2, 8, 16)
    gradients = jax.jit(
        jax.grad(lambda p: jnp.square(net.apply({"params": p}, X, NOISE, COND)).sum())
    )(params)
    for path, gradient in jax.tree_util.tree_leaves_with_path(gradients):
        assert np.abs(gradient).max() > 0, jax.tree_util.keystr(path)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"norm": "rsm"}, "norm: no norm 'rsm'; did you mean 'rms'"),
        ({"mlp": "swigl"}, "mlp: no MLP 'swigl'; did you mean 'swiglu'"),
        ({"positions": "lerned"}, "positions='lerned' is unknown; did you mean 'learned'"),
        ({"conditioning": "token"}, "conditioning='token' is unknown; did you mean 'tokens'"),
        ({"hidden_size": 12, "rotary": True}, "heads of the width 6, which is no multiple of 4"),
        ({"long_skips": True}, "an odd number of blocks, not depth=4: 5 has one in the middle"),
        ({"long_skips": True, "depth": 5, "encoder_depth": 2}, "long_skips join blocks of"),
        ({"encoder_depth": 4}, "encoder_depth=4 is not below depth=4"),
        ({"encoder_depth": 1, "num_class_tokens": 2, "class_tokens_from": 1}, "encoder_depth=1"),
    ],
)  # fmt: skip
def test_options_that_exclude_each_other_end_in_one_line(settings, message):
    with pytest.raises(UserError) as caught:
        shapes(small(**settings))
    assert re.search(message, str(caught.value))
    assert "\n" not in str(caught.value)


def test_a_mesh_splits_the_tokens_before_and_after_class_tokens_come():
    net = small(num_class_tokens=3, class_tokens_from=1)
    net.check_mesh((8, 4, 3), {"sequence": 1})
    with pytest.raises(UserError, match="does not divide the 11 tokens"):
        net.check_mesh((8, 4, 3), {"sequence": 4})


def test_attention_to_tokens_in_bfloat16_promotes_no_types():
    """Users may set `jax_numpy_dtype_promotion` to "strict"."""
    layer, x = CrossAttention(2, "bfloat16", null_token=False), jnp.ones((1, 4, 8), jnp.bfloat16)
    with jax.numpy_dtype_promotion("strict"):
        out, _ = jax.eval_shape(
            layer.init_with_output, jax.random.key(0), x, Tokens(3, 6).example(1)
        )
    assert (out.shape, out.dtype) == ((1, 4, 8), jnp.bfloat16)


def test_attention_that_is_off_is_off_behind_a_mask_too():
    """Each token then has its own values, whatever a mask would show it."""
    layer: Any = layers.SelfAttention(2)
    mask = jnp.tri(4, dtype=bool)[None, None]
    x = np.random.default_rng(0).normal(size=(1, 4, 8)).astype("f")
    params = random_like(jax.eval_shape(layer.init, jax.random.key(0), x)["params"])

    @jax.jit
    def both(params):
        with layers.attention_off(""):
            found = layer.apply({"params": params}, x, mask=mask)
        return found, layer.apply({"params": params}, x, mask=mask)

    found, other = map(np.asarray, both(params))
    qkv, out = params["qkv"], params["out"]
    values = x @ qkv["kernel"][:, 16:] + qkv.get("bias", np.zeros(24))[16:]
    np.testing.assert_allclose(found, values @ out["kernel"] + out.get("bias", 0), atol=1e-5)
    assert np.abs(other - found).max() > 0.01
