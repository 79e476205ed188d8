"""What training needs beside the parts of a config: optimizer, state, and how it is made."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import jax
from jax.sharding import Mesh
from ml_collections import ConfigDict

from diffjax.codecs import Codec, Identity
from diffjax.conditions import Condition
from diffjax.data.augment import Augmentation
from diffjax.models.layers.attention import REVERSE_ONLY
from diffjax.optimizers.base import Optimizer
from diffjax.optimizers.mup import by_width
from diffjax.optimizers.turns import in_turns
from diffjax.runs.parts import Parts, build_parts
from diffjax.runs.teacher import teacher_of
from diffjax.spec import build
from diffjax.training.accumulation import check_parts
from diffjax.training.averages import Averages
from diffjax.training.nonfinite import NonFinite
from diffjax.training.sharding import check_batch, make_mesh
from diffjax.training.state import TrainState, init_state
from diffjax.training.step import StepSettings
from diffjax.training.subset import split
from diffjax.wiring import Wired, check_wired


@dataclass(frozen=True, eq=False)
class Setup:
    """The parts of a config, and what training them needs.

    Attributes:
        parts: what sampling and evaluation need too.
        optimizer: the update rule.
        nonfinite: how a step that is not finite is handled.
        augment: how images of a batch are changed.
    """

    parts: Parts
    optimizer: Optimizer
    nonfinite: NonFinite
    augment: Augmentation

    @classmethod
    def of(cls, parts: Parts) -> "Setup":
        """Builds what training needs from a config; nothing is compiled.

        Raises:
            UserError: a value of another kind or out of its range.
        """
        config = parts.config
        return cls(
            parts,
            optimizer=build(
                config.optimizer, Optimizer, "config.optimizer", num_steps=config.num_steps
            ),
            nonfinite=build(config.nonfinite, NonFinite, "config.nonfinite"),
            augment=build(config.augment, Augmentation, "config.augment"),
        )

    @property
    def config(self) -> ConfigDict:
        """That of the parts."""
        return self.parts.config

    @property
    def wired(self) -> Wired:
        """That of the parts."""
        return self.parts.wired

    @property
    def mesh(self) -> Mesh:
        """That of the parts."""
        return self.parts.mesh

    @cached_property
    def abstract(self) -> TrainState:
        """The training state as `ShapeDtypeStruct` with shardings.

        Raises:
            UserError: a pattern of `config.trainable` matches nothing.
        """
        return self.parts.placed(jax.eval_shape(self._begin, self.wired.params_shape))

    @property
    def shardings(self) -> TrainState:
        """Where each array of the state lives."""
        return jax.tree.map(lambda leaf: leaf.sharding, self.abstract)

    @cached_property
    def init(self) -> Callable[[jax.Array], TrainState]:
        """`key -> a fresh state`, made in place on the mesh; compiled once."""
        return self._placing(lambda key: self._begin(self.wired.init(key)))

    @cached_property
    def begin(self) -> Callable[[Any], TrainState]:
        """`params -> a state at step 0` with these parameters, which it donates."""
        return self._placing(self._begin, donate_argnums=0)

    def fitted(self, optimizer: Optimizer) -> Optimizer:
        """An optimizer as network and objective need it.

        It has muP's factors of the rate where the network has a base width, and a state for each
        part of the parameters where the objective updates them in turns.

        Raises:
            UserError: as in `diffjax.optimizers.mup.by_width` and `diffjax.optimizers.turns`.
        """
        traits = self.wired.objective.traits
        optimizer = in_turns(optimizer, traits.network_every, self.wired.own_names, traits.own_rate)
        factors = self.wired.rate_factors
        if factors is None:
            return optimizer
        return by_width(optimizer, split(factors, self.wired.trainable)[0])

    @property
    def teacher(self) -> str:
        """The name of the run's own weights that the objective learns from, as `teacher_of`."""
        return teacher_of(self.parts)

    @property
    def accumulation_steps(self) -> int:
        """Parts of a batch that the network is evaluated on one after the other."""
        return self.config.accumulation_steps

    @property
    def step_settings(self) -> StepSettings:
        """Those of the train step."""
        return StepSettings(
            num_steps=self.config.num_steps,
            condition=self.wired.condition,
            condition_dropout=self.wired.condition_dropout,
            averages=Averages.of(self.config),
            teacher=self.teacher,
            nonfinite=self.nonfinite,
            accumulation_steps=self.accumulation_steps,
        )

    def _begin(self, params: Any) -> TrainState:
        memory, averages = self.wired.objective.init_memory(), Averages.of(self.config)
        trained, frozen = split(params, self.wired.trainable)
        optimizer = self.fitted(self.optimizer)
        state = init_state(trained, optimizer, averages, memory, self.nonfinite.init())
        return state._replace(frozen=frozen)

    def _placing(self, function: Callable, **how: Any) -> Callable:
        """A program that runs once: on a CPU, optimising it takes three times as long as
        everything else about it, and computes the same bits.
        """
        on_cpu = self.mesh.devices.flat[0].platform == "cpu"
        options = {"xla_backend_optimization_level": 0} if on_cpu else {}
        return jax.jit(function, out_shardings=self.shardings, compiler_options=options, **how)


def set_up(
    config: ConfigDict,
    image_shape: tuple[int, int, int],
    condition: Condition,
    mesh: Mesh | None = None,
    codec: Codec = Identity(),
) -> Setup:
    """Builds the parts of a config and what training them needs; nothing is compiled.

    Args:
        config: resolved, with settings that `check_config` let pass.
        image_shape: `(H, W, C)` of the data.
        condition: the kind of condition that the data have.
        mesh: the devices; by default those of `config.mesh`.
        codec: the codec of the data.

    Raises:
        UserError: parts that do not fit together, or that can't be trained on this mesh
            (`check_setup`).
    """
    mesh = mesh or make_mesh(**config.mesh)
    setup = Setup.of(build_parts(config, image_shape, condition, mesh, codec))
    check_setup(setup)
    return setup


def check_setup(setup: Setup) -> None:
    """Refuses what can't be trained, whatever the data: all that a config and its mesh show.

    Raises:
        UserError: the first thing that does not fit.
    """
    config, mesh = setup.config, setup.mesh
    check_wired(setup.wired, config.batch_size, config.num_steps)
    check_batch(config.batch_size, mesh)
    rows = mesh.shape["data"] * mesh.shape["fsdp"]
    check_parts(setup.wired.objective, config.accumulation_steps, config.batch_size, rows)
    _ = setup.fitted(setup.optimizer)
    _ = setup.teacher, setup.abstract  # An average that is not kept; patterns that match nothing.


def countable(setup: Setup) -> Setup:
    """The same run, with attention of matrix products where it is a kernel that hides them.

    `diffjax.training.flops.matrix_flops` looks into nothing else.
    """
    parts = setup.parts
    if parts.attention not in REVERSE_ONLY:
        return setup
    plain = ConfigDict(parts.config.to_dict())
    plain.model.attention = "xla"
    return Setup.of(build_parts(plain, parts.wired.image_shape, parts.wired.condition, parts.mesh))
