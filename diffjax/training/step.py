"""The one training step, for every objective, network and mesh."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax import Array

from diffjax.compiling import implicit_promotion
from diffjax.conditions import Condition, Rate
from diffjax.objectives.base import Objective, Progress
from diffjax.optimizers.base import Optimizer
from diffjax.process.precond import Apply
from diffjax.training.accumulation import loss_and_gradient
from diffjax.training.averages import Averages
from diffjax.training.nonfinite import NonFinite
from diffjax.training.state import LIVE, TrainState
from diffjax.training.subset import merged

LOG_SNR_EDGES = (-8.0, -6.0, -4.0, -2.0, 0.0, 2.0, 4.0, 6.0, 8.0)
"""Edges of the log-SNR bins in which the loss is logged; the outer bins are open."""

TrainStep = Callable[..., tuple[TrainState, dict[str, Array]]]
"""`(state, key, batch[, frozen_teacher]) -> (state, metrics)`."""


@dataclass(frozen=True)
class StepSettings:
    """Settings of the training step that do not depend on network, objective or optimizer.

    Args:
        num_steps: steps of the whole training; objectives receive it in `Progress`.
        condition: the kind of condition of the examples.
        condition_dropout: the probability with which a condition is replaced by the null condition,
            for classifier-free guidance; typically 0.1. For conditions of several parts, a dict of
            probabilities by part.
        averages: the averages of the parameters that are kept.
        teacher: the name of the run's weights that the objective learns from (`teacher_name`); not
            used if the step is called with a frozen teacher.
        nonfinite: what is done with a step whose loss, gradient or update is not finite.
        accumulation_steps: the number of parts of a batch that are evaluated one after the other;
            1 is the whole batch at once.
    """

    num_steps: int
    condition: Condition
    condition_dropout: Rate = 0.0
    averages: Averages = Averages()
    teacher: str = LIVE
    nonfinite: NonFinite = NonFinite()
    accumulation_steps: int = 1


def make_train_step(
    apply: Apply, objective: Objective, optimizer: Optimizer, settings: StepSettings
) -> TrainStep:
    """The step as a pure function `(state, key, batch[, frozen_teacher]) -> (state, metrics)`.

    Args:
        apply: the network.
        objective: the loss per example.
        optimizer: the update rule and its learning rate.
        settings: averages, condition dropout, teacher, accumulation.

    Returns:
        A function to be jitted by the caller. `key` is the run's and the same in every step; the
        step number is folded in. Metrics are `loss`, `grad_norm`, `learning_rate` and, by log-SNR
        bin, `bin_loss` (sums) and `bin_count`, and those of `settings.nonfinite`; of losses that
        compare two times also `worst_interval` `[2]`, the times of the example with the largest
        loss.
    """
    nonfinite = settings.nonfinite

    def train_step(
        state: TrainState, key: Array, batch: Mapping[str, Array], frozen_teacher: Any = None
    ) -> tuple[TrainState, dict[str, Array]]:
        drop_key, loss_key = jax.random.split(jax.random.fold_in(key, state.step))
        given = settings.condition.of_batch(batch)
        cond = settings.condition.as_trained(drop_key, given, settings.condition_dropout)
        seen_batch = {**batch, "cond": cond}
        progress = Progress(state.step, state.memory, settings.num_steps)
        teacher_params = frozen_teacher
        if frozen_teacher is None:
            teacher_params = state.weights(settings.teacher)
        point = optimizer.gradient_point(state.opt_state, state.params)

        def losses_of(apply: Apply, params: Any) -> tuple[Array, dict[str, Array]]:
            whole = merged(params, state.frozen)
            return objective(apply, whole, teacher_params, loss_key, seen_batch, progress)

        (loss, (losses, seen)), gradient = loss_and_gradient(
            losses_of, apply, point, settings.accumulation_steps
        )
        memory = objective.update_memory(state.memory, seen)
        with implicit_promotion():
            updates, opt_state = optimizer.transform.update(gradient, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        ema = settings.averages.update(state.ema, params, state.step)
        bin_loss, bin_count = by_log_snr(losses, seen["log_snr"])
        metrics = {
            "loss": loss,
            "grad_norm": optax.tree.norm(gradient),
            "bin_loss": bin_loss,
            "bin_count": bin_count,
        }
        if "interval" in seen:
            metrics["worst_interval"] = seen["interval"][worst_of(losses)]
        with implicit_promotion():
            metrics["learning_rate"] = jnp.asarray(
                optimizer.schedule(nonfinite.updates_made(state))
            )
        new = TrainState(state.step + 1, params, opt_state, ema, memory, state.skipped)
        new = new._replace(frozen=state.frozen)
        new = nonfinite.settle(state, new, (loss, gradient, updates))
        return new, metrics | nonfinite.metrics(new)

    return train_step


def worst_of(losses: Array) -> Array:
    """The index of the example whose loss is not finite, or else largest, `[]`.

    Example:
        >>> worst_of(jnp.array([1.0, 3.0, 2.0])).item(), worst_of(jnp.array([9.0, jnp.nan])).item()
        (1, 1)
    """
    return jnp.argmax(jnp.where(jnp.isfinite(losses), losses, jnp.inf))


def by_log_snr(losses: Array, log_snr: Array) -> tuple[Array, Array]:
    """Sums losses `[B]` and counts examples in the bins of `LOG_SNR_EDGES`.

    Example:
        >>> sums, counts = by_log_snr(jnp.array([1.0, 2.0]), jnp.array([-9.0, 9.0]))
        >>> sums.tolist()[0], sums.tolist()[-1], counts.sum().item()
        (1.0, 2.0, 2.0)
    """
    bins = len(LOG_SNR_EDGES) + 1
    which = jnp.searchsorted(jnp.asarray(LOG_SNR_EDGES), log_snr, side="right")
    member = jax.nn.one_hot(which, bins)
    # A sum over a mask, not a product: a loss of NaN must stay in its own bin.
    return jnp.sum(jnp.where(member > 0, losses[:, None], 0.0), axis=0), jnp.sum(member, axis=0)
