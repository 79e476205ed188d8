"""One step of a run's training, made again, with its numbers and pictures."""

from dataclasses import replace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.tree_util import keystr, tree_flatten_with_path

from diffjax.compiling import jit
from diffjax.data import DataSet
from diffjax.loop.compiled_step import train_step_of
from diffjax.loop.device_batches import device_batches
from diffjax.objectives.base import Objective, Progress
from diffjax.objectives.denoising import Noising
from diffjax.optimizers.base import Optimizer
from diffjax.process.paths import Pair, coeffs, mix, time_of_log_snr
from diffjax.runs.load import Run
from diffjax.runs.setup import Setup
from diffjax.runs.teacher import find_teacher
from diffjax.training.averages import Averages
from diffjax.training.state import LIVE, TrainState
from diffjax.training.subset import merged


class OneWeight(NamedTuple):
    """One of the network's numbers in a step: that with the largest gradient.

    Attributes:
        name: the name of the array that it is in.
        before: its value.
        slope: the derivative of the mean loss with respect to it.
        after: its value after the step.
        average_before: that of the averaged weights; NaN where the run keeps none.
        average_after: after the step.
    """

    name: str
    before: float
    slope: float
    after: float
    average_before: float
    average_after: float


class Lesson(NamedTuple):
    """One training step; B pictures, in the order of the batch.

    Attributes:
        step: its number, from 1.
        clean: `[B, h, w, c]`, the pictures of the batch.
        condition: B rows, as the network had it: some are dropped.
        t: `[B]`, the drawn times.
        noisy: `[B, h, w, c]`, the pictures with noise.
        own_noise: whether that is the noise of the step itself, or else drawn in the same way.
        guess: `[B, h, w, c]`, the clean pictures that the network predicted.
        answer: `[B, 2]`, what the right answer is of the clean picture and of the noise, added.
        losses: `[B]`.
        loss: their mean.
        loss_after: the same on the same pictures, times and noise, after the step.
        gradient_norm: over all weights.
        learning_rate: the learning rate of this step.
        weight: one of the weights.
        average: the name of the averaged weights; "" without.
    """

    step: int
    clean: np.ndarray
    condition: Any
    t: np.ndarray
    noisy: np.ndarray
    own_noise: bool
    guess: np.ndarray
    answer: np.ndarray
    losses: np.ndarray
    loss: float
    loss_after: float
    gradient_norm: float
    learning_rate: float
    weight: OneWeight
    average: str


def lesson(run: Run, dataset: DataSet) -> Lesson:
    """The step that follows a checkpoint of a run, on the batch that belongs to it.

    It is the run's own train step, with the same key; nothing is written.

    Args:
        run: at the checkpoint.
        dataset: that it is trained on.
    """
    setup, state = Setup.of(run.parts), run.state
    batch = next(device_batches(_longer(setup, run.step), dataset, run.step))
    _, key = jax.random.split(jax.random.key(run.config.seed))
    frozen = find_teacher(run.parts)
    teacher = frozen()[0] if frozen else None
    optimizer = _keeping_the_gradient(setup.optimizer)
    nothing = jax.tree.map(jnp.zeros_like, state.params)
    state = state._replace(opt_state=(state.opt_state, nothing))
    program = jit(lambda *given: _taken(setup, optimizer, *given), run.parts.mesh)
    found, new = program(state, key, batch, teacher)
    average = next(iter(reversed(Averages.of(run.config).names)), "")
    return Lesson(
        step=run.step + 1,
        clean=np.asarray(batch["image"]),
        weight=_largest(state, new, average),
        average=average,
        **jax.tree.map(lambda x: np.asarray(x) if np.ndim(x) else np.asarray(x).item(), found),
    )


def _taken(
    setup: Setup, optimizer: Optimizer, state: TrainState, key: Any, batch: Any, teacher: Any
) -> tuple[dict[str, Any], TrainState]:
    """What a step does, and the state after it, whose optimizer keeps the gradient."""
    wired, step = setup.wired, train_step_of(setup, optimizer)
    new, metrics = step(state, key, batch, teacher)
    # The same step from the new weights has the loss that these have on the same batch.
    _, after = step(new._replace(step=state.step), key, batch, teacher)

    # What the step draws inside, drawn again from the same keys.
    drop_key, loss_key = jax.random.split(jax.random.fold_in(key, state.step))
    kind = wired.condition
    cond = kind.as_trained(drop_key, kind.of_batch(batch), wired.condition_dropout)
    batch = {**batch, "cond": cond}
    point = optimizer.gradient_point(state.opt_state, state.params)
    params = merged(point, state.frozen)
    taught = state.weights(setup.teacher) if teacher is None else teacher
    progress = Progress(state.step, state.memory, setup.config.num_steps)
    losses, seen = wired.objective(wired.apply, params, taught, loss_key, batch, progress)
    t, x, own_noise = _noised(wired.objective, loss_key, batch, seen["log_snr"])
    answer = wired.precond.target(coeffs(wired.path, t, 1))
    return {
        "condition": cond,
        "t": t,
        "noisy": x,
        "own_noise": own_noise,
        "guess": wired.predict(params)(x, t, cond).x0,
        "answer": jnp.stack(jnp.broadcast_arrays(answer.k_x, answer.k_e, t)[:2], axis=-1),
        "losses": losses,
        "loss": metrics["loss"],
        "loss_after": after["loss"],
        "gradient_norm": metrics["grad_norm"],
        "learning_rate": metrics["learning_rate"],
    }, new


def _noised(objective: Objective, key: Any, batch: Any, log_snr: Any) -> tuple[Any, Any, Any]:
    """The times and noisy pictures of a loss, and whether the noise is its own.

    An objective draws its noise inside. That of `Noising` can be drawn again; where the times that
    come with it are others, the objective has split its key in another way.
    """
    t, images = time_of_log_snr(objective.path, log_snr), batch["image"]
    inner = objective
    while not isinstance(inner, Noising) and isinstance(
        further := getattr(inner, "objective", None), Objective
    ):
        inner = further
    c = coeffs(objective.path, t, images.ndim)
    if not isinstance(inner, Noising):
        return t, mix(c, Pair(images, jax.random.normal(key, images.shape))), False
    noised = inner.at_random_times(key, batch)
    own = jnp.allclose(inner.metrics(noised)["log_snr"], log_snr, rtol=1e-4, atol=1e-4)
    return (
        jnp.where(own, jnp.ravel(noised.c.t), t),
        jnp.where(own, noised.x_t, mix(c, noised.pair)),
        own,
    )


def _keeping_the_gradient(optimizer: Optimizer) -> Optimizer:
    """The optimizer with the last gradient beside its state."""

    def update(updates: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
        changes, inner = optimizer.transform.update(updates, state[0], params)
        return changes, (inner, updates)

    def init(params: Any) -> Any:
        return optimizer.transform.init(params), jax.tree.map(jnp.zeros_like, params)

    return optimizer._replace(
        transform=optax.GradientTransformation(init, update),
        gradient_point=lambda state, params: optimizer.gradient_point(state[0], params),
    )


def _largest(before: TrainState, after: TrainState, average: str) -> OneWeight:
    """The weight whose gradient is largest."""
    slopes, _ = tree_flatten_with_path(after.opt_state[1])
    sizes = [float(jnp.max(jnp.abs(slope))) for _, slope in slopes]
    which = int(np.argmax(sizes))
    path, slope = slopes[which]
    place = int(jnp.argmax(jnp.abs(slope)))

    def of(state: TrainState, name: str) -> float:
        if not name:
            return float("nan")
        tree = state.params if name == LIVE else state.ema[name]
        return float(np.ravel(jax.tree.leaves(tree)[which])[place])

    return OneWeight(
        name=keystr(path, simple=True, separator="/"),
        before=of(before, LIVE),
        slope=float(np.ravel(slope)[place]),
        after=of(after, LIVE),
        average_before=of(before, average),
        average_after=of(after, average),
    )


def _longer(setup: Setup, step: int) -> Any:
    """The setup of a run that makes one more step, for the batch of a step after its last."""
    config = setup.config.copy_and_resolve_references()
    with config.unlocked():
        config.num_steps = max(config.num_steps, step + 1)
    return replace(setup, parts=replace(setup.parts, config=config))
