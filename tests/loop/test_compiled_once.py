"""What is done again is not compiled again, and nothing is compiled for each array."""

from contextlib import closing
from typing import Any, NamedTuple

import jax
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from diffjax.conditions import of_classes
from diffjax.data import digits
from diffjax.ensemble import members
from diffjax.evaluation.evaluate import NamedRecipe
from diffjax.loop.recorder import grid_drawer
from diffjax.runs.checkpoints import Checkpoints
from diffjax.runs.load import Run
from diffjax.runs.measuring.evaluated_samples import wanted_samples
from diffjax.runs.measuring.measure import drawer
from diffjax.runs.setup import set_up
from diffjax.training import sharding
from tests.support.compilations import compilations
from tests.support.tiny_run import tiny_config


class State(NamedTuple):
    params: Any


def on_all_devices(array: np.ndarray) -> jax.Array:
    return jax.device_put(array, NamedSharding(sharding.make_mesh(), P()))


def saved(folder, params: Any) -> Any:
    """What comes back, and how many programs saving compiled."""
    state = State(params)
    with closing(Checkpoints(folder)) as store:
        with compilations() as programs:
            store.save(0, state, {})
            store.wait()
        restored, _ = store.read(0, jax.eval_shape(lambda: state)._replace(params=params))
    jax.tree.map(np.testing.assert_array_equal, restored.params, params)
    return len(programs)


@pytest.mark.thorough(tenth=False)
def test_saving_compiles_no_program_for_each_small_array(tmp_path):
    small = {str(i): on_all_devices(np.arange(8.0 * i)) for i in range(1, 21)}
    assert saved(tmp_path / "small", small) <= 1, "that of the digests"


@pytest.mark.thorough(tenth=False)
def test_a_large_array_is_written_by_all_devices_that_have_it(tmp_path):
    """Each writes an eighth of the 8 MiB, and slices that off by a program of its own."""
    large = {"x": on_all_devices(np.zeros((8, 2**18), np.float32))}
    assert saved(tmp_path / "large", large) >= 8


def test_a_second_state_of_a_setup_compiles_nothing():
    setup = set_up(tiny_config("model=tiny"), (8, 8, 1), of_classes(10))
    first, key = setup.init(jax.random.key(0)), jax.random.key(1)
    with compilations() as programs:
        second = setup.init(key)
    assert programs == []
    kernels = [state.params["conv_in"]["kernel"] for state in (first, second)]
    assert not np.array_equal(*kernels)


def test_pictures_evaluation_and_samples_of_a_run_share_one_program(tmp_path):
    setup = set_up(tiny_config("model=tiny", sample_images=20), (8, 8, 1), of_classes(10))
    states = [setup.init(jax.random.key(i)) for i in range(2)]
    draw_picture = grid_drawer(setup.parts, digits(), tmp_path)
    draw_picture(states[0])
    assert (tmp_path / "samples" / "step_00000000.png").exists()
    run = Run(setup.parts, states[1], tmp_path)
    named = NamedRecipe("heun", "uniform", run.recipe, weights=run.config.weights)
    asked = wanted_samples(setup.wired, digits, np.arange(20) % 10)
    with compilations() as programs:
        draw_picture(states[1])
        drawn: Any = drawer(run, [named], asked)(named)[0]
        evaluated = np.concatenate(list(drawn.batches))
        np.testing.assert_array_equal(run.sample(20), evaluated)
        assert np.abs(run.sample(20, weights="live", seed=1) - evaluated).max() > 0.01
    assert programs == []


def test_stacking_and_unstacking_again_compiles_nothing():
    setup = set_up(tiny_config("model=tiny"), (8, 8, 1), of_classes(10))
    states = [setup.init(jax.random.key(i)) for i in range(2)]
    all_of_them, one = members.members_of([setup] * 2), np.int32(1)

    def there_and_back():
        return members.unstacker(all_of_them)(members.stack(all_of_them, states), one)

    there_and_back()
    with compilations() as programs:
        back = there_and_back()
    assert programs == []
    jax.tree.map(np.testing.assert_array_equal, back, states[1])
    assert back.step.sharding == states[1].step.sharding
