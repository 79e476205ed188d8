"""The training step by NumPy: what goes into the loss, and what becomes of it."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from diffjax.conditions import Classes
from diffjax.optimizers.base import Optimizer
from diffjax.training.averages import Averages
from diffjax.training.nonfinite import NonFinite
from diffjax.training.state import init_state, teacher_name
from diffjax.training.step import StepSettings, by_log_snr, make_train_step

NULL, DROPPED, BATCH = 7, 0.4, 8
IMAGES = np.linspace(-2.0, 1.5, BATCH).astype(np.float32)
LABELS = (np.arange(BATCH) % 5).astype(np.int32)


class Linear:
    """A loss that is linear in the one parameter, by whatever a loss may look at.

    Each has a factor of its own, so that none can stand for another.
    """

    def __call__(self, apply, params, teacher, key, batch, progress):
        slope = batch["image"] + 0.1 * batch["cond"] + 0.01 * jax.random.uniform(key, (BATCH,))
        slope += 0.3 * teacher["w"] + 0.1 * progress.fraction + 0.05 * progress.memory
        return params["w"] * slope, {"log_snr": 4.0 * batch["image"]}

    def update_memory(self, memory, seen):
        return memory + jnp.max(seen["log_snr"])


def descent() -> Optimizer:
    schedule = optax.linear_schedule(0.5, 0.1, 4)
    return Optimizer(
        optax.chain(optax.trace(0.9), optax.scale_by_learning_rate(schedule)), schedule
    )


@pytest.mark.parametrize(
    "decays",
    [(0.9, 0.5), pytest.param((), marks=pytest.mark.thorough(tenth=False))],
    ids=["averages", "none"],
)
def test_three_steps_are_those_of_the_definition(decays):
    objective: Any = Linear()
    network: Any = None  # this loss asks none
    step = make_train_step(
        network,
        objective,
        descent(),
        StepSettings(
            num_steps=5,
            averages=Averages(decays),
            condition_dropout=DROPPED,
            condition=Classes(NULL),
            teacher=teacher_name("ema", Averages(decays)),
        ),
    )
    batch = {"image": jnp.asarray(IMAGES), "label": jnp.asarray(LABELS)}
    state = init_state({"w": jnp.array(2.0)}, descent(), Averages(decays), jnp.array(0.5))
    key, jitted = jax.random.key(3), jax.jit(step)
    w, velocity, memory, averages = 2.0, 0.0, 0.5, dict.fromkeys(decays, 2.0)
    for k in range(3):
        state, metrics = jitted(state, key, batch)

        label_key, loss_key = jax.random.split(jax.random.fold_in(key, k))
        dropped = np.asarray(jax.random.bernoulli(label_key, DROPPED, (BATCH,)))
        assert 0 < dropped.sum() < BATCH
        drawn = np.asarray(jax.random.uniform(loss_key, (BATCH,)))
        teacher = averages[decays[0]] if decays else w
        labels = np.where(dropped, NULL, LABELS)
        slope = IMAGES + 0.1 * labels + 0.01 * drawn + 0.3 * teacher + 0.02 * k + 0.05 * memory
        losses, gradient, rate = w * slope, slope.mean(), 0.5 + (0.1 - 0.5) * k / 4
        velocity = 0.9 * velocity + gradient
        w, memory = w - rate * velocity, memory + 4.0 * 1.5
        for decay in decays:
            kept = min(decay, (1 + k) / (10 + k))
            averages[decay] = kept * averages[decay] + (1 - kept) * w

        bins = [np.digitize(4.0 * IMAGES, np.arange(-8, 9, 2)) == i for i in range(10)]
        close = {"rtol": 2e-5, "atol": 1e-6}
        np.testing.assert_allclose(metrics["loss"], losses.mean(), **close)
        np.testing.assert_allclose(metrics["grad_norm"], abs(gradient), **close)
        np.testing.assert_allclose(metrics["learning_rate"], rate, **close)
        np.testing.assert_allclose(metrics["bin_loss"], [losses[b].sum() for b in bins], **close)
        assert metrics["bin_count"].tolist() == [b.sum() for b in bins]
        np.testing.assert_allclose(state.params["w"], w, **close)
        np.testing.assert_allclose(state.memory, memory, **close)
        for decay in decays:
            np.testing.assert_allclose(state.ema[f"ema-{decay}"]["w"], averages[decay], **close)
        assert int(state.step) == k + 1
        assert state.skipped == ()
    assert set(metrics) == {"loss", "grad_norm", "learning_rate", "bin_loss", "bin_count"}


def test_parts_and_steps_left_out_are_passed_on():
    """Two parts ask the network about four rows each; a bad step leaves all but its number."""
    asked = []

    def apply(params, x, noise_label, cond, *, key=None):
        asked.append(x.shape)
        return params["w"] * x

    class Asking(Linear):
        def __call__(self, apply, params, teacher, key, batch, progress):
            said = apply(params, batch["image"], batch["image"], None)
            return (said - 1.0) ** 2, {"log_snr": batch["image"]}

    objective: Any = Asking()
    network: Any = apply
    nonfinite = NonFinite(2)
    settings = StepSettings(5, Classes(NULL), nonfinite=nonfinite, accumulation_steps=2)
    step = make_train_step(network, objective, descent(), settings)
    state = init_state(
        {"w": jnp.array(2.0)}, descent(), Averages(()), jnp.array(0.5), nonfinite.init()
    )
    batch = {"image": jnp.asarray(IMAGES), "label": jnp.asarray(LABELS)}
    jitted = jax.jit(step)
    good, metrics = jitted(state, jax.random.key(0), batch)
    assert set(asked) == {(BATCH // 2,)}
    gradient = np.mean(2 * (2.0 * IMAGES - 1.0) * IMAGES)
    np.testing.assert_allclose(metrics["loss"], np.mean((2.0 * IMAGES - 1.0) ** 2), rtol=1e-5)
    np.testing.assert_allclose(good.params["w"], 2.0 - 0.5 * gradient, rtol=1e-5)
    bad, metrics = jitted(good, jax.random.key(0), {**batch, "image": batch["image"] * jnp.nan})
    assert float(bad.params["w"]) == float(good.params["w"])
    assert float(bad.memory) == float(good.memory)
    assert (int(bad.step), int(metrics["skipped"])) == (2, 1)
    # The rate of the next update is that of one update made, of two steps.
    _, metrics = jitted(bad, jax.random.key(0), batch)
    np.testing.assert_allclose(metrics["learning_rate"], 0.4, rtol=1e-6)


def test_bins_are_closed_below_and_a_loss_of_nan_stays_in_its_own():
    edges = np.arange(-8.0, 9.0, 2.0)
    log_snr = np.concatenate([edges, edges - 0.1, [-np.inf, np.inf, -100.0, 100.0]])
    losses = np.arange(1.0, len(log_snr) + 1)
    losses[3] = np.nan  # at -2, the lower edge of the fifth
    sums, counts = map(np.asarray, by_log_snr(jnp.asarray(losses), jnp.asarray(log_snr)))
    which = np.array([sum(value >= edges) for value in log_snr])
    assert counts.tolist() == [float((which == i).sum()) for i in range(10)]
    np.testing.assert_allclose(sums, [losses[which == i].sum() for i in range(10)], rtol=1e-6)
    assert np.flatnonzero(np.isnan(sums)).tolist() == [4]
