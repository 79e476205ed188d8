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
from diffjax.data import DataSet
from diffjax.data.augment import Augmentation
from diffjax.errors import UserError, nearest
from diffjax.models.attention import REVERSE_ONLY
from diffjax.optimizers.base import Optimizer
from diffjax.runs.parts import Parts, build_parts
from diffjax.runs.teacher import teacher_of
from diffjax.settings import check_complete, check_names, check_settings
from diffjax.spec import build
from diffjax.training import sharding
from diffjax.training.accumulation import check_parts
from diffjax.training.averages import Averages
from diffjax.training.nonfinite import NonFinite
from diffjax.training.state import LIVE, TrainState, init_state
from diffjax.training.subset import split
from diffjax.wiring import Wired


@dataclass(frozen=True, eq=False)
class Setup:
    """The parts of a config, and what training them needs.

    Attributes:
        parts: what sampling and evaluation need too.
        optimizer: the update rule.
        nonfinite: how a step that is not finite is handled.
    """

    parts: Parts
    optimizer: Optimizer
    nonfinite: NonFinite

    @classmethod
    def of(cls, parts: Parts) -> "Setup":
        """Builds what training needs from a config; nothing is compiled.

        Raises:
            UserError: a value of another kind or out of its range.
        """
        config = parts.config
        how = {"num_steps": config.num_steps}
        optimizer = build(config.optimizer, Optimizer, "config.optimizer", **how)
        return cls(parts, optimizer, build(config.nonfinite, NonFinite, "config.nonfinite"))

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

    @property
    def teacher(self) -> str:
        """The name of the run's own weights that the objective learns from, as `teacher_of`."""
        return teacher_of(self.parts)

    @property
    def accumulation_steps(self) -> int:
        """Parts of a batch that the network is evaluated on one after the other."""
        return self.config.accumulation_steps

    def _begin(self, params: Any) -> TrainState:
        memory, averages = self.wired.objective.init_memory(), Averages.of(self.config)
        trained, frozen = split(params, self.config.trainable)
        state = init_state(trained, self.optimizer, averages, memory, self.nonfinite.init())
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
        config: resolved.
        image_shape: `(H, W, C)` of the data.
        condition: the kind of condition that the data have.
        mesh: other devices than the config's.
        codec: of the data.

    Raises:
        UserError: whatever does not fit.
    """
    if mesh is None:
        check_names(config)
    check_complete(config)
    check_settings(config)
    check_expected(config, image_shape=image_shape, **condition.network_arguments())
    own_mesh = mesh is None
    if mesh is None:
        mesh = sharding.make_mesh(**config.mesh)
        sharding.check_batch(config.batch_size, mesh)
    check_weights(config)
    build(config.augment, Augmentation, "config.augment")
    setup = Setup.of(build_parts(config, image_shape, condition, mesh, codec))
    if own_mesh:
        rows = mesh.shape["data"] * mesh.shape["fsdp"]
        check_parts(setup.wired.objective, config.accumulation_steps, config.batch_size, rows)
    _ = setup.abstract, setup.teacher
    return setup


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


def check_expected(config: ConfigDict, **found: Any) -> None:
    """Refuses data that differ from `config.expected`, for which a config was written and planned.

    Args:
        config: resolved; its `expected` may have `image_shape`, `num_classes` and `num_images`.
        **found: any of these.

    Raises:
        UserError: the first that differs.
    """
    for name, value in found.items():
        expected = config.get("expected", {}).get(name, value)
        if tuple_or_number(expected) != tuple_or_number(value):
            raise UserError(
                f"the data have {name}={value}, and this config is for {expected}: take its data, "
                f"or set --config.expected.{name}"
            )


def tuple_or_number(value: Any) -> Any:
    """A list, as JSON has it, as a tuple.

    Example:
        >>> tuple_or_number([8, 8, 1]), tuple_or_number(3)
        ((8, 8, 1), 3)
    """
    return tuple(value) if isinstance(value, list | tuple) else value


def check_pairs(parts: Parts, dataset: DataSet) -> None:
    """Refuses a data set without the sources or conditions that training needs, or of another size.

    Raises:
        UserError: training needs one for each image, or sampling starts from one; the config
            expects another number of images, for training or in all.
    """
    in_all = len(dataset.train) + len(dataset.test)
    if parts.config.get("expected", {}).get("num_images") != in_all:
        check_expected(parts.config, num_images=len(dataset.train))
    objective, condition = parts.wired.objective, parts.wired.condition
    if dataset.given is not None and len(dataset.train):
        there = dataset.train.gather([0])
        missing = [name for name in condition.shapes(1) if name not in there]
        if missing:
            raise UserError(
                f"{dataset.name} has the condition {condition.describe()}, and its "
                f"batches have no {', '.join(missing)}: add them with GivenSource (docs/data.md)"
            )
    for needed, source, part in (
        (objective.traits.needs_source, dataset.train, "training"),
        (objective.traits.starts_at_source, dataset.test, "test"),
    ):
        if needed and len(source) and "source" not in source.gather([0]):
            raise UserError(
                f"this objective needs a source for each {part} image, and {dataset.name} has "
                "none: take a data set of pairs (docs/bridges.md), or another objective"
            )


def check_weights(config: ConfigDict) -> None:
    """Refuses to evaluate an average that the config does not keep."""
    kept = [LIVE, *Averages.of(config).names]
    if config.weights not in kept:
        suggestion = nearest(config.weights, kept)
        raise UserError(f"config.weights={config.weights!r} are not kept by the run; {suggestion}")
