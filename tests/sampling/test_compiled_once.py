"""Equal calls outside of `jit` are compiled once; closures, which may change, are traced again."""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.tree_util import Partial, register_dataclass

from diffjax import choices
from diffjax.compiling import once
from diffjax.oracle.analytic import Gaussian
from diffjax.process import times
from diffjax.process.paths import Linear, Pair, Scalar, time_of_log_snr
from diffjax.sampling import editing, grids, guidance, sample, solvers, unipc
from diffjax.sampling.sample import with_condition
from diffjax.spec import build

traced: list[str] = []


@register_dataclass
@dataclass(frozen=True)
class Told(Linear):
    """The linear path, which counts how often it is traced or evaluated."""

    t_min: Scalar = 1e-3

    def alpha(self, t):
        traced.append("alpha")
        return 1.0 - t


def told(scale, x, t):
    """Half of x, scaled, as a prediction."""
    traced.append("denoise")
    return Pair(0.5 * scale * x, x)


@pytest.fixture(autouse=True)
def _nothing_traced():
    traced.clear()


X = np.random.default_rng(0).normal(size=(3, 2)).astype(np.float32)
TIMES = np.array([1.0, 0.7, 0.4, 0.0], np.float32)


def walk(function, denoise, make):
    return function(denoise, make(), Linear(), TIMES, jax.random.split(jax.random.key(0), 3), X)


@pytest.mark.parametrize(
    "function", [sample.sample, sample.integrate, sample.trace, sample.sample_padded]
)
def test_a_walk_with_equal_parts_is_traced_once(function):
    ends, calls = [], []
    for scale in (1.0, 1.0, 2.0):
        ends.append(walk(function, Partial(told, jnp.array(scale)), solvers.heun))
        calls.append(len(traced))
    assert len({*calls}) == 1 < calls[0]
    leaves = [np.concatenate([np.ravel(a) for a in jax.tree.leaves(end)]) for end in ends]
    np.testing.assert_array_equal(leaves[0], leaves[1])
    assert np.abs(leaves[0] - leaves[2]).max() > 0.1, "the numbers are arguments"


def test_a_closure_sees_the_numbers_of_today():
    factor = 1.0

    def denoise(x, t):
        return told(factor, x, t)

    before = walk(sample.sample, denoise, solvers.euler)
    factor = 2.0
    after = walk(sample.sample, denoise, solvers.euler)
    assert float(jnp.abs(after - before).max()) > 0.1


def test_arguments_may_be_named():
    denoise, solver = Partial(told, 1.0), solvers.ddim()
    keys = jax.random.split(jax.random.key(0), 3)
    named = {"x": X, "keys": keys, "times": TIMES, "path": Linear(), "denoise": denoise}
    np.testing.assert_array_equal(
        sample.sample(solver=solver, **named), walk(sample.sample, denoise, solvers.ddim)
    )


def test_a_solver_of_equal_options_is_the_same():
    assert unipc.unipc(3, unipc.BH1()) is unipc.unipc(3, unipc.BH1()) is not unipc.unipc(3)
    assert solvers.ddim(eta=0.5) is solvers.ddim(eta=0.5) is not solvers.ddim()
    assert solvers.ddim(eta=jnp.array(0.5)) is not None  # not hashable, and good all the same
    again = {name: build(spec) for name, spec in choices.SOLVERS.items()}
    assert {name for name, spec in choices.SOLVERS.items() if build(spec) != again[name]} == set()


def test_an_exact_model_is_a_value():
    data = Gaussian(jnp.zeros(2), jnp.eye(2))
    for labels in (None, jnp.zeros(3, jnp.int32)):
        denoise = with_condition(data.predict(Linear()), labels)
        leaves = jax.tree.leaves(denoise)
        assert all(isinstance(leaf, jax.Array | float) for leaf in leaves)
        assert jax.eval_shape(denoise, X, jnp.array(0.5)).x0.shape == X.shape


def test_times_of_a_log_snr_and_of_a_quantile_are_compiled_once():
    values = jnp.array([-1.0, 0.5, 2.0])
    first = time_of_log_snr(Told(), values)
    calls = len(traced)
    assert calls > 0
    # log-SNR = 2·log((1 - t)/t), so t = sigmoid(-λ/2).
    np.testing.assert_allclose(first, jax.nn.sigmoid(-0.5 * values), rtol=1e-5)
    np.testing.assert_array_equal(time_of_log_snr(Told(), values), first)
    assert float(time_of_log_snr(Told(t_min=0.4), values)[2]) == pytest.approx(0.4)
    assert len(traced) == calls, "another number is no other program"
    u = jnp.array([0.2, 0.5])
    beta = times.Beta(2.0, 1.0).quantile(u, Linear(t_min=0.0))
    np.testing.assert_allclose(beta, jnp.sqrt(u), rtol=1e-5)  # Beta(2, 1) has the density 2t


def test_classes_with_equally_many_fields_have_programs_of_their_own():
    """`jax.jit` alone takes one for another, now and then: in a sixth of these calls."""

    def of(number):
        fields = {"__annotations__": {"x": float}, "value": lambda self: number + self.x}
        return register_dataclass(dataclass(frozen=True)(type("Some", (), fields)))

    classes = [of(number) for number in range(12)]
    value = once()(lambda values: values[0].value())
    for _ in range(2):
        found = [float(value([one(0.5)])) for one in classes]
        assert found == [number + 0.5 for number in range(12)]


def test_a_path_that_is_no_tree_of_numbers_works():
    class Plain:
        """Not registered with JAX."""

        t_min, t_noise = 1e-3, 1.0
        alpha, sigma = Linear().alpha, Linear().sigma

    assert float(time_of_log_snr(Plain(), jnp.array(0.0))) == pytest.approx(0.5)
    np.testing.assert_array_equal(
        grids.UniformLogSNR()(Plain(), 4), grids.UniformLogSNR()(Linear(), 4)
    )


def test_whether_a_rule_mixes_is_found_once_and_for_closures_too():
    assert guidance.mixes(guidance.ClassifierFree())
    assert not guidance.mixes(lambda x, c, on, off, scale: Pair(on.x0, off.eps))


def test_inversion_of_an_exact_model_is_traced_once():
    first = editing.invert(Partial(told, 1.0), solvers.euler(), Linear(), TIMES, X)
    calls = len(traced)
    again = editing.invert(Partial(told, 1.0), solvers.euler(), Linear(), TIMES, X)
    np.testing.assert_array_equal(first[1], again[1])
    assert len(traced) == calls > 0
