"""The train step of a run: its pure function, its program for a mesh, and its FLOPs."""

from collections.abc import Callable, Sequence
from typing import Any

import jax
from jax import Array

from diffjax.compiling import jit
from diffjax.data.sources import Bucket
from diffjax.host.interrupts import interruptible
from diffjax.optimizers.base import Optimizer
from diffjax.runs.setup import Setup, countable
from diffjax.training.flops import flops_if_countable
from diffjax.training.sharding import batch_sharding, replicated
from diffjax.training.step import TrainStep, make_train_step


def train_step_of(setup: Setup, optimizer: Optimizer | None = None) -> TrainStep:
    """The pure train step of a run; its optimizer may be one whose schedule began later."""
    return make_train_step(
        setup.wired.apply,
        setup.wired.objective,
        setup.fitted(optimizer or setup.optimizer),
        setup.step_settings,
    )


def compile_train_step(
    setup: Setup,
    key: Array,
    optimizer: Optimizer | None = None,
    frozen_teacher: Any = None,
    buckets: Sequence[Bucket] = (),
) -> Callable:
    """The train step for this mesh, compiled before the clock starts; it donates its state.

    Of data in buckets there is a program for each shape of images.
    """
    config, place = setup.config, batch_sharding(setup.mesh)
    shapes = list(dict.fromkeys(bucket.image_shape for bucket in buckets))
    wired = [setup.wired._replace(image_shape=shape) for shape in shapes] or [setup.wired]
    batches = [
        jax.tree.map(
            lambda rows: jax.ShapeDtypeStruct(rows.shape, rows.dtype, sharding=place),
            each.batch_shapes(config.batch_size),
        )
        for each in wired
    ]
    jitted = jit(
        train_step_of(setup, optimizer),
        mesh=setup.mesh,
        donate_argnums=0,
        out_shardings=(setup.shardings, replicated(setup.mesh)),
    )
    further = () if frozen_teacher is None else (frozen_teacher,)
    programs = {}
    for batch in batches:
        lowered = jitted.lower(setup.abstract, key, batch, *further)
        programs[batch["image"].shape] = interruptible(lowered.compile)
    if len(programs) == 1 and not further:
        return next(iter(programs.values()))
    return lambda state, key, batch: programs[batch["image"].shape](state, key, batch, *further)


def train_flops(setup: Setup) -> float | None:
    """Counted operations of one training step, as `matrix_flops`; None if they can't be counted."""
    setup = countable(setup)
    key = jax.eval_shape(lambda: jax.random.key(0))
    batch = setup.wired.batch_shapes(setup.config.batch_size)
    return flops_if_countable(train_step_of(setup), setup.abstract, key, batch)
