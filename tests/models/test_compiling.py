"""XLA's options change how a program is computed, not its result."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffjax import compiling
from diffjax.models.layers.common import rows_as_one
from tests.support.compiling import FAST


@pytest.fixture
def asked(monkeypatch):
    """Asks XLA afresh in this test, and not again after it."""
    compiling._options.cache_clear()
    yield monkeypatch
    compiling._options.cache_clear()


def _convolution(x, w):
    layout = ("NHWC", "HWIO", "NHWC")
    y = jax.lax.conv_general_dilated(x, w, (1, 1), "SAME", dimension_numbers=layout)
    return jnp.sum(y**2)


def _product(x, w):
    return jnp.sum((x.reshape(-1, 64) @ w[0, 0]) ** 2)


def _inputs():
    rng = np.random.default_rng(0)
    shapes = (8, 16, 16, 64), (3, 3, 64, 64)
    return [rng.standard_normal(shape, np.float32) for shape in shapes]


def _text(function):
    return str(function.lower(*_inputs()).compile().as_text())


@pytest.mark.parametrize("function", [_convolution, _product])
def test_products_and_their_gradients_are_xlas_own_and_the_same(asked, function):
    gradient = jax.grad(function, (0, 1))
    asked.setattr(compiling, "_CPU", compiling._CPU | FAST)
    ours, plain = compiling.jit(gradient), jax.jit(gradient, compiler_options=FAST)
    # Without the library there is nothing to switch off, and the option can go.
    assert _text(plain).count("__ynn_fusion") > _text(ours).count("__ynn_fusion") == 0
    for a, b in zip(ours(*_inputs()), plain(*_inputs()), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-2)


def test_a_kernels_gradient_is_summed_without_transposed_copies():
    def gradient(product):
        layout = (((3,), (0,)), ((), ()))
        return compiling.jit(jax.grad(lambda x, w: jnp.sum(product(x, w[0, 0], layout) ** 2), 1))

    # XLA writes such a copy as a copy to another layout. Where it makes none, the function can go.
    ours, plain = gradient(rows_as_one), gradient(jax.lax.dot_general)
    assert _text(plain).count(" copy(") > _text(ours).count(" copy(") == 0
    np.testing.assert_allclose(ours(*_inputs()), plain(*_inputs()), rtol=1e-4)


def test_other_platforms_and_an_xla_without_the_options_get_none(asked):
    assert compiling._options("gpu") is None
    asked.setattr(compiling, "_CPU", {"xla_cpu_no_such_option": "true"})
    assert compiling._options("cpu") is None
    assert compiling.jit(lambda x: 2 * x)(3) == 6
