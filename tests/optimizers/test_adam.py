"""The update rule: what it is, and how often it goes over the memory."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from diffjax.optimizers.base import clip_by_norm
from diffjax.optimizers.descent import descent
from diffjax.training.averages import Averages
from diffjax.training.state import init_state


def test_clipping_is_that_of_optax():
    rng = np.random.default_rng(0)
    plain = {"a": rng.normal(size=(3, 4)), "b": rng.normal(size=5)}
    one, other = clip_by_norm(0.7), optax.clip_by_global_norm(0.7)
    assert jax.tree.structure(one.init(plain)) == jax.tree.structure(other.init(plain))
    clipped = jax.jit(lambda g: [rule.update(g, rule.init(g))[0] for rule in (one, other)])
    for scale in (0.0, 1e-3, 1.0, 1e3, np.inf, np.nan):
        here, there = clipped({name: np.float32(x * scale) for name, x in plain.items()})
        for name in plain:
            np.testing.assert_allclose(here[name], there[name], rtol=1e-6, err_msg=str(scale))


def test_the_update_does_not_write_what_nobody_keeps():
    """Counted by XLA, in arrays as large as the parameters: four moments and parameters read and
    written each on its way, and the gradient for its norm and for each of them; no array between.
    """
    optimizer, size, number = descent(100), 256, 3
    params = {str(i): jnp.ones((size, size)) for i in range(number)}
    state = init_state(params, optimizer, Averages((0.9,)))

    def update(state, gradient):
        updates, opt_state = optimizer.transform.update(gradient, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        return params, opt_state, Averages((0.9,)).update(state.ema, params, state.step)

    compiled: Any = jax.jit(update).lower(state, params).compile()
    array = 4 * size * size
    assert compiled.memory_analysis().temp_size_in_bytes < array
    assert compiled.cost_analysis()["bytes accessed"] < 14.5 * array * number
