"""Back to a good checkpoint after a loss that is not finite."""

import dataclasses
import json
import shutil
from contextlib import closing

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffjax import config_files
from diffjax.data import digits
from diffjax.data.randomness import permutation
from diffjax.data.sources import Source
from diffjax.errors import UserError
from diffjax.host.interrupts import Interrupted
from diffjax.host.run_files import read_metrics
from diffjax.loop import loop
from diffjax.loop.pending_metrics import NonFiniteLoss
from diffjax.loop.rollback import ROLLBACKS, Rollbacks, seed_of
from diffjax.loop.training import Training
from diffjax.runs.checkpoints import Checkpoints
from diffjax.runs.setup import Setup, set_up
from diffjax.spec import spec, to_json
from diffjax.training.nonfinite import NonFinite
from tests.support.shared_parts import shared_parts
from tests.support.tiny_network import Tiny
from tests.support.tiny_run import without_pictures
from tests.support.trainer import CONFIG, STEPS

BATCH = 16
POISON = 9  # a label that no other image has


@pytest.fixture(autouse=True)
def _quick(monkeypatch):
    without_pictures(monkeypatch)
    shared_parts(monkeypatch)


class Poisoned(Tiny):
    """Gives NaN for a whole batch in which one image has a certain label."""

    def __call__(self, x, noise_label, cond=None, train=False):
        out = super().__call__(x, noise_label, cond, train)
        return jnp.where(jnp.any(cond == POISON) & train, jnp.nan, out)


@dataclasses.dataclass(frozen=True)
class Labelled(Source):
    """The digits, of which one alone has the label 9."""

    row: int

    def __len__(self):
        return len(digits().train)

    def fingerprint(self):
        return digits().train.fingerprint()

    def __getitem__(self, index):
        return {**digits().train[index], "label": POISON if index == self.row else 0}


def digits_with_one(row: int = 0):
    return dataclasses.replace(digits(), train=Labelled(row))


def rows_of(seed: int, first: int, last: int) -> set[int]:
    """The images of the steps from `first` to `last`, by the permutation itself."""
    order = permutation((seed, 0), len(digits().train))
    return set(order[(first - 1) * BATCH : last * BATCH].tolist())


def row_in_step(step: int) -> int:
    """An image that comes in this step, and not again in another order of data."""
    return min(rows_of(0, step, step) - rows_of(seed_of(0, 1), 1, STEPS))


def config_with(tmp_path, row: int, **changes):
    file = tmp_path / "tiny.py"
    file.write_text(CONFIG)
    config = config_files.load(str(file))
    config.model, config.data = spec(Poisoned), spec(digits_with_one, row=row)
    config.condition_dropout = 0.0
    config.mesh.data, config.mesh.fsdp = 1, 8  # of eight devices
    config.update_from_flattened_dict(changes)
    return config.lock()


_SETUPS: dict[str, Setup] = {}


def setup_of(config) -> Setup:
    """One of each config, so that `shared_parts` compiles its step once."""
    name, data = to_json(config), digits()
    if name not in _SETUPS:
        _SETUPS[name] = set_up(config, data.image_shape, data.condition)
    return _SETUPS[name]


def run_steps_of(config, workdir, should_stop=lambda: False):
    """Training without its evaluation."""
    data = digits_with_one(config.data.row)
    setup = setup_of(config)
    for folder in ("", "samples"):
        (workdir / folder).mkdir(parents=True, exist_ok=True)
    with closing(Checkpoints(workdir / "checkpoints", keep=9)) as store:
        training = Training(setup, data, workdir, store, should_stop)
        return jax.device_get(loop.train_and_evaluate(training))


@pytest.mark.faults
def test_a_batch_that_breaks_a_run_is_not_met_again(tmp_path, caplog):
    """Step 5 is bad: back to 4, on to 8; a run stopped in between ends in the same bits.

    A run that never broke is the same up to there, and has other data and noise from there on.
    """
    config = config_with(tmp_path, row_in_step(5), **{"nonfinite.rollbacks": 1})
    workdir = tmp_path / "run"
    state = run_steps_of(config, workdir)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(state))
    (made,) = json.loads((workdir / ROLLBACKS).read_text())["rollbacks"]
    assert (made["step"], made["to"]) == (5, 4)
    said = [record.getMessage() for record in caplog.records]
    assert any(
        text.startswith("the loss is not finite in step 5 at log-SNR [")
        and text.endswith("back to step 4, and on from there in another order (1 of at most 1)")
        for text in said
    )
    lines = read_metrics(workdir / "metrics.jsonl")
    assert [line["step"] for line in lines] == [3, 6, 8]
    assert all(np.isfinite(line["loss"]) for line in lines)
    run_steps_of(config_with(tmp_path, -1, **{"nonfinite.rollbacks": 1}), tmp_path / "calm")
    calm = read_metrics(tmp_path / "calm" / "metrics.jsonl")
    # The one image has another label, which the network embeds: not in the first window.
    assert calm[0]["loss"] == lines[0]["loss"]
    assert [line["loss"] for line in calm[1:]] != [line["loss"] for line in lines[1:]]

    # Before the first step, after each, and before the first one after the rollback.
    stops = iter([False] * 8 + [True])
    parts = tmp_path / "parts"
    with pytest.raises(Interrupted):
        run_steps_of(config, parts, lambda: next(stops))
    assert len(Rollbacks.read(parts).made) == 1
    jax.tree.map(np.testing.assert_array_equal, run_steps_of(config, parts), state)
    assert len(Rollbacks.read(parts).made) == 1


@pytest.mark.faults
def test_steps_left_out_are_in_a_file_once_wherever_the_run_stopped(tmp_path):
    config = config_with(tmp_path, row_in_step(5), **{"nonfinite.skip_in_a_row": 1})
    for name, stops in (("whole", []), ("parts", [False] * 6 + [True])):
        workdir, asked = tmp_path / name, iter(stops)
        if stops:
            with pytest.raises(Interrupted):
                run_steps_of(config, workdir, lambda asked=asked: next(asked))
            # As if killed after the checkpoint of step 4: step 5 is made again.
            shutil.rmtree(workdir / "checkpoints" / "6")
        run_steps_of(config, workdir)
        (line,) = read_metrics(workdir / "skipped.jsonl")
        assert (line["step"], line["skipped"]) == (5, 1)
        assert np.isnan(line["loss"])
    one, other = (tmp_path / name / "skipped.jsonl" for name in ("whole", "parts"))
    assert one.read_bytes() == other.read_bytes()


@pytest.mark.faults
def test_a_run_that_breaks_wherever_it_goes_back_to_ends(tmp_path):
    """It goes one checkpoint further back each time, and what is good stays good."""
    changes = {
        "nonfinite.rollbacks": 2,
        "optimizer.learning_rate": 1e30,
        "optimizer.clip_norm": 1e30,
    }
    config = config_with(tmp_path, -1, **changes, checkpoint_every_steps=1)
    workdir = tmp_path / "run"
    with pytest.raises(NonFiniteLoss, match=r"not finite in step \d.*rolled back 2 time"):
        run_steps_of(config, workdir)
    assert len(Rollbacks.read(workdir).made) == 2
    store = Checkpoints(workdir / "checkpoints", read_only=True)
    for step in store.steps():
        state, _ = store.read(step, setup_of(config).abstract)
        assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(jax.device_get(state)))
    store.close()
    # Where the settings do not allow it again, the same command ends at once in the same way.
    with pytest.raises(NonFiniteLoss, match="rolled back 2 time"):
        run_steps_of(config, workdir)


def test_which_order_a_step_has():
    """Against the definition, step by step."""
    rollbacks = Rollbacks(({"to": 4}, {"to": 4}, {"to": 2}, {"to": 6}))
    orders = [0, 0, 3, 3, 3, 3, 4, 4]
    assert [rollbacks.order(step) for step in range(1, 9)] == orders
    for start in range(8):
        found = []
        for order, first, last in rollbacks.stretches(start, 8):
            found += [order] * (last - first)
        assert found == orders[start:]


@pytest.mark.parametrize(
    ("made", "saved", "target"),
    [
        ((), [0, 2, 4], 4),
        (({"to": 4},), [0, 2, 4], 2),
        (({"to": 4},), [0, 2, 4, 6], 6),
        (({"to": 0},), [0], 0),
    ],
)
def test_where_to_go_back_to(made, saved, target):
    assert Rollbacks(made).target(saved) == target


@pytest.mark.parametrize("text", ["[]", "{", '{"rollbacks": 3}', '{"rollbacks": [{"to": "x"}]}'])
def test_a_damaged_list_is_named(tmp_path, text):
    (tmp_path / ROLLBACKS).write_text(text)
    with pytest.raises(UserError, match=ROLLBACKS):
        Rollbacks.read(tmp_path)


def test_a_negative_number():
    with pytest.raises(UserError, match="rollbacks=-1 can't be negative"):
        NonFinite(rollbacks=-1)
