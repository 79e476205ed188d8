"""The train step of a run: its pure function, its program for a mesh, and its FLOPs."""

from collections.abc import Callable
from typing import Any

import jax
from jax import Array

from diffjax.compiling import jit
from diffjax.optimizers.base import Optimizer
from diffjax.runs.setup import Setup, countable
from diffjax.training.averages import Averages
from diffjax.training.flops import flops_if_countable
from diffjax.training.sharding import batch_sharding, replicated
from diffjax.training.step import TrainStep, make_train_step


def train_step_of(setup: Setup, optimizer: Optimizer | None = None) -> TrainStep:
    """The pure train step of a run; its optimizer may be one whose schedule began later."""
    return make_train_step(
        setup.wired.apply,
        setup.wired.objective,
        setup.by_width(optimizer or setup.optimizer),
        num_steps=setup.config.num_steps,
        averages=Averages.of(setup.config),
        condition_dropout=setup.wired.condition_dropout,
        condition=setup.wired.condition,
        teacher=setup.teacher,
        nonfinite=setup.nonfinite,
        accumulation_steps=setup.accumulation_steps,
    )


def compile_train_step(
    setup: Setup, key: Array, optimizer: Optimizer | None = None, frozen_teacher: Any = None
) -> Callable:
    """The train step for this mesh, compiled before the clock starts; it donates its state."""
    config, wired = setup.config, setup.wired
    place = batch_sharding(setup.mesh)
    batch = jax.tree.map(
        lambda rows: jax.ShapeDtypeStruct(rows.shape, rows.dtype, sharding=place),
        wired.batch_shapes(config.batch_size),
    )
    jitted = jit(
        train_step_of(setup, optimizer),
        mesh=setup.mesh,
        donate_argnums=0,
        out_shardings=(setup.shardings, replicated(setup.mesh)),
    )
    if frozen_teacher is None:
        return jitted.lower(setup.abstract, key, batch).compile()
    compiled = jitted.lower(setup.abstract, key, batch, frozen_teacher).compile()
    return lambda state, key, batch: compiled(state, key, batch, frozen_teacher)


def train_flops(setup: Setup) -> float | None:
    """Counted operations of one training step, as `matrix_flops`; None if they can't be counted."""
    setup = countable(setup)
    key = jax.eval_shape(lambda: jax.random.key(0))
    batch = setup.wired.batch_shapes(setup.config.batch_size)
    return flops_if_countable(train_step_of(setup), setup.abstract, key, batch)
