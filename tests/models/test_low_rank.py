"""LoRA on the layers of a network: the changes are those of its kernels."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from diffjax.errors import UserError
from diffjax.models.dit.network import DiT
from diffjax.models.layers.magnitude import MPConv, MPDense
from diffjax.models.low_rank import LoraLayers, lora_layers, without_lora

SHAPE, LABELS = (2, 8, 8, 1), jnp.array([1, 3])
LORA = LoraLayers(rank=3, alpha=6.0)


class Layers(nn.Module):
    """A convolution of stride 2, another without padding, and a dense layer."""

    @nn.compact
    def __call__(self, x, noise_label, cond, train=False):
        x = nn.silu(
            nn.Conv(6, (3, 3), 2, padding=1, name="down")(x) + noise_label[:, None, None, None]
        )
        x = nn.Conv(4, (3, 3), padding="VALID", use_bias=False, name="conv")(x)
        x = nn.Conv(4, (3, 3), feature_group_count=4, name="depthwise")(x)
        return nn.Dense(5, name="out")(x.mean((1, 2)))


class Normalised(nn.Module):
    """Layers as those of EDM2."""

    @nn.compact
    def __call__(self, x, noise_label, cond, train=False):
        x = nn.silu(MPConv(6, name="conv")(x) + noise_label[:, None, None, None])
        return MPDense(5, name="out")(x.mean((1, 2)), 0.7)


def drawn(params, seed=0):
    """Every parameter redrawn, so that no layer is silent."""
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda x: jnp.asarray(0.3 * rng.normal(size=x.shape), x.dtype), params)


def initialised(network, lora):
    def init(key):
        with lora.on():
            return network.init(key, jnp.zeros(SHAPE), jnp.zeros(2), LABELS)["params"]

    return jax.jit(init)(jax.random.key(0))


def evaluated(network, params, lora, x, train=False, key=None):
    with lora.on(train):
        rngs = None if key is None else {"dropout": key}
        labels = jnp.array([0.2, 0.7])
        return network.apply({"params": params}, x, labels, LABELS, train=train, rngs=rngs)


@pytest.mark.parametrize(
    "scan",
    [None, *(pytest.param(scan, marks=pytest.mark.thorough) for scan in (True, False, "mp"))],
)
def test_a_network_with_lora_is_the_one_whose_kernels_have_the_changes(scan):
    """Outputs, and gradients of A and B: the chain rule through `W + scale * B A`."""
    small = {"patch_size": 4, "hidden_size": 8, "depth": 2, "num_heads": 2, "num_classes": 10}
    own = {None: Layers(), "mp": Normalised()}
    network = own[scan] if scan in own else DiT(**small, scan=scan, remat="full")
    params = drawn(jax.eval_shape(lambda: initialised(network, LORA)))
    x = jnp.asarray(np.random.default_rng(1).normal(size=SHAPE), jnp.float32)
    weights = jnp.cos(jnp.arange(2.0))

    def loss(params, lora):
        out: Any = evaluated(network, params, lora, x)
        return (out.reshape(2, -1).mean(1) * weights).sum() * 100, out

    def merged(params):
        return loss(LORA.merged(params), LoraLayers())

    @jax.jit
    def both(params):
        ways = functools.partial(loss, lora=LORA), merged
        return [jax.value_and_grad(way, has_aux=True)(params) for way in ways]

    ((_, found), gradient), ((_, expected), expected_gradient) = both(params)
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)
    jax.tree.map(
        lambda one, other: np.testing.assert_allclose(one, other, rtol=2e-4, atol=1e-4),
        gradient,
        expected_gradient,
    )
    without = jax.jit(evaluated, static_argnums=(0, 2))(network, without_lora(params), LORA, x)
    assert np.abs(without - expected).max() > 0.01


@pytest.mark.thorough(tenth=False)
def test_a_network_begins_as_it_was_with_a_as_torch_draws_it():
    """B is 0, A uniform in ±1/√(inputs): its largest of many is near to that, its mean to 0."""
    network, x = Layers(), np.ones(SHAPE, "f")

    @jax.jit
    def begun():
        """Parameters and output, without and with LoRA."""
        plain, params = (initialised(network, lora) for lora in (LoraLayers(), LORA))
        outputs = evaluated(network, plain, LoraLayers(), x), evaluated(network, params, LORA, x)
        return (plain, params), outputs

    (plain, params), (out, same) = jax.device_get(begun())
    jax.tree.map(np.testing.assert_array_equal, plain, without_lora(params))
    np.testing.assert_array_equal(out, same)
    assert lora_layers(params) == ["conv", "down", "out"]  # no depthwise one
    for name, inputs in (("down", 9), ("conv", 54), ("out", 4)):
        a, b = params[name]["lora_a"], params[name]["lora_b"]
        assert not np.any(b)
        assert 0.8 / np.sqrt(inputs) < np.abs(a).max() <= 1 / np.sqrt(inputs)
        assert a.shape == (*params[name]["kernel"].shape[:-1], 3)


def test_layers_that_normalise_begin_as_they_were_with_a_of_the_size_of_their_kernel():
    params = initialised(Normalised(), LORA)
    assert lora_layers(params) == ["conv", "out"]
    for name, shape in (("conv", (3, 3, 1, 3)), ("out", (6, 3))):
        a, b = params[name]["lora_a"], params[name]["lora_b"]
        assert (a.shape, np.abs(a).max() > 0.7, np.abs(a).max() <= 1) == (shape, True, True)
        assert not np.any(b)


def test_dropout_leaves_out_inputs_of_a_in_training_alone():
    """With W = 0, A = I, B = I and inputs of 1, outputs are 0 or scale / (1 - dropout)."""
    lora = LoraLayers(rank=4, alpha=8.0, dropout=0.25, layers="out")
    shapes = jax.eval_shape(lambda: initialised(Layers(), lora))
    params = jax.tree.map(lambda leaf: np.zeros(leaf.shape, "f"), shapes)
    params["depthwise"]["bias"] = np.ones(4, "f")
    params["out"] |= {"lora_a": np.eye(4, dtype="f"), "lora_b": np.eye(4, 5, dtype="f")}
    keys = jax.random.split(jax.random.key(0), 100)

    @jax.jit
    def both(params, keys):
        def train(key):
            return evaluated(Layers(), params, lora, jnp.zeros(SHAPE), True, key)

        return jax.vmap(train)(keys), evaluated(Layers(), params, lora, jnp.zeros(SHAPE))

    found, still = map(np.asarray, both(params, keys))
    found = found[..., :4]
    kept = found > 0
    np.testing.assert_allclose(found, kept * 2.0 / 0.75, rtol=1e-6)
    # 800 draws: five deviations of a share are 0.077.
    assert abs(kept.mean() - 0.75) < 0.077
    np.testing.assert_allclose(still[:, :4], 2.0, rtol=1e-6)


@pytest.mark.parametrize(
    ("lora", "said"),
    [
        (LoraLayers(2, layers="convv"), "matches 'convv'; did you mean 'conv'"),
        (LoraLayers(2, layers="out,*attn*"), "matches '*attn*'; known: conv, down, out"),
        (LoraLayers(0, alpha=4.0), "config.lora.alpha=4.0 has no effect with rank 0"),
        (LoraLayers(0, layers="out"), "config.lora.layers=out has no effect with rank 0"),
    ],
)
def test_patterns_of_no_layer_and_settings_without_rank_are_refused_in_one_line(lora, said):
    def shapes(lora):
        return jax.eval_shape(lambda: initialised(Layers(), lora))

    with pytest.raises(UserError) as caught:
        lora.check(shapes(lora), shapes)
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)
