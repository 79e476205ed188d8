"""U-Nets in the authors' layouts, against what their code returned (tests/references/unets.py)."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffjax.models.adm.published import CLASSIFIER, FAMILY, UPSAMPLER
from diffjax.models.layers import QKV_ORDERS, SelfAttention
from tests.references import unets as reference

ADM = {
    "image_shape": reference.IMAGES.shape[1:],
    "channels": 128,
    "channel_multipliers": (1, 1.5),
    "num_res_blocks": 1,
    "attention_resolutions": (4,),
}
NUM_CLASSES = reference.NUM_CLASSES
WITH_CLASSES = {**ADM, "num_classes": NUM_CLASSES}
SMALL = {"label": reference.LABELS, "small": reference.SMALL}
ORDER = {"num_classes": 0, "out_channels": 3, "num_heads": 2, "qkv_order": "parts"}
CASES = {
    "adm/heads": (FAMILY, WITH_CLASSES, reference.LABELS),
    "adm/parts": (FAMILY, {**ADM, **ORDER}, None),
    "adm/upsampler": (UPSAMPLER, {**WITH_CLASSES, "num_heads": 2}, SMALL),
    "adm/classifier": (CLASSIFIER, WITH_CLASSES, None),
}


@functools.cache
def stored(name):
    file, case = name.split("/")
    with np.load(reference.FOLDER / f"{file}.npz", allow_pickle=False) as arrays:
        return {key.removeprefix(f"{case}/"): arrays[key] for key in arrays if case in key}


def network_of(name):
    """The network of a case, with the parameters that the reference drew by published names."""
    family, settings, cond = CASES[name]
    denoiser = family.network(**settings)
    nothing = jax.tree.map(lambda leaf: np.zeros(leaf.shape), family.shapes(denoiser))
    shapes = {name: array.shape for name, array in family.to_theirs(nothing, denoiser).items()}
    params = family.to_ours(reference.parameters(shapes), denoiser, "theirs")
    return denoiser.network, params, jax.tree.map(jnp.asarray, cond)


def error(found, expected):
    return np.linalg.norm(np.asarray(found) - expected) / np.linalg.norm(expected)


@pytest.mark.thorough
@pytest.mark.parametrize("name", CASES)
def test_outputs_and_gradients_are_those_of_the_authors_code(name):
    """In training mode, with respect to images and parameters; entries of those as stored."""
    network, params, cond = network_of(name)
    expected = stored(name)
    factors = reference.weights(expected["out"].shape)

    def total(params, x):
        variables, times = {"params": params}, jnp.asarray(reference.TIMESTEPS)
        out = network.apply(variables, x, times, cond, train=True)
        return (out * factors).sum(), out

    gradient = jax.jit(jax.grad(total, (0, 1), has_aux=True))
    (of_params, of_images), out = gradient(params, jnp.asarray(reference.IMAGES))
    assert expected["out"].std() > 0.1
    assert error(out, expected["out"]) < 1e-5
    assert error(of_images, expected["of_images"]) < 1e-5
    family, settings, _ = CASES[name]
    named = family.to_theirs(of_params, family.network(**settings))
    found, known = reference.entries(named), expected["of_parameters"]
    sizes = np.linalg.norm(known, axis=1, keepdims=True)
    assert sizes.min() > 0
    assert error(found / sizes, known / sizes) < 1e-5


@pytest.mark.thorough
@pytest.mark.parametrize("name", CASES)
def test_half_precision_is_close(name):
    network, params, cond = network_of(name)
    half = network.clone(dtype="bfloat16")
    times = jnp.asarray(reference.TIMESTEPS)
    run = jax.jit(lambda params, x: half.apply({"params": params}, x, times, cond))
    out = run(params, jnp.asarray(reference.IMAGES))
    assert out.dtype == jnp.float32
    assert error(out, stored(name)["out"]) < 2e-2


def test_columns_of_attention_in_any_order_are_one_function():
    """NumPy permutes the columns; all queries, keys and values differ."""
    random = np.random.default_rng(0)
    heads, channels = 3, 4
    x = random.normal(size=(1, 5, heads * channels)).astype(np.float32)
    shapes = jax.eval_shape(SelfAttention(heads).init, jax.random.key(0), x)["params"]
    params = jax.tree.map(lambda leaf: random.normal(size=leaf.shape).astype(np.float32), shapes)
    evaluate = jax.jit(
        lambda order, params: SelfAttention(heads, qkv_order=order).apply({"params": params}, x),
        static_argnums=0,
    )
    expected = evaluate("parts", params)
    for order, axes in QKV_ORDERS.items():
        places = np.arange(3 * heads * channels).reshape(3, heads, channels).transpose(axes)
        moved = jax.tree.map(lambda leaf, p=places: leaf[..., p.ravel()], params["qkv"])
        np.testing.assert_allclose(
            evaluate(order, {**params, "qkv": moved}), expected, rtol=1e-4, atol=1e-5
        )
