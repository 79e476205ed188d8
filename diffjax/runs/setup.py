"""The parts of a run, wired and laid out over devices, for training and for loading."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any

import jax
from jax.sharding import Mesh
from ml_collections import ConfigDict

from diffjax.codecs import Codec, Identity
from diffjax.conditions import Condition
from diffjax.data import DataSet
from diffjax.data.augment import Augmentation
from diffjax.errors import UserError, nearest
from diffjax.models.attention import REVERSE_ONLY, resolve
from diffjax.optimizers.base import Optimizer
from diffjax.pretrained.family import Denoiser
from diffjax.runs.model import Programs
from diffjax.settings import check_complete, check_names, check_settings
from diffjax.spec import build
from diffjax.training import sharding
from diffjax.training.accumulation import check_parts
from diffjax.training.averages import Averages
from diffjax.training.nonfinite import NonFinite
from diffjax.training.state import (
    FIRST_AVERAGE,
    LIVE,
    TrainState,
    init_state,
    is_kept,
    teacher_name,
)
from diffjax.training.subset import split
from diffjax.wiring import Wired, build_objective, wire


@dataclass(frozen=True, eq=False)
class Setup:
    """A config, wired and placed.

    Attributes:
        config: resolved.
        wired: its parts.
        optimizer: the update rule.
        mesh: the devices.
        abstract: the training state as `ShapeDtypeStruct` with shardings.
        nonfinite: how a step that is not finite is handled.
        init: `key -> a fresh state`, made in place on the mesh; compiled once.
        begin: `params -> a state at step 0` with these parameters, which it donates.
        attention: the implementation of `config.model.attention` on this mesh; None for
            a network without such a choice.
        codec: of the data: what decodes samples.
    """

    config: ConfigDict
    wired: Wired
    optimizer: Optimizer
    mesh: Mesh
    abstract: TrainState
    nonfinite: NonFinite
    init: Callable[[jax.Array], TrainState]
    begin: Callable[[Any], TrainState]
    attention: str | None = None
    codec: Codec = Identity()

    @cached_property
    def programs(self) -> Programs:
        """What samples are drawn with, compiled once for pictures, evaluation and `run.sample`."""
        return Programs(self.wired, self.mesh, self.codec)

    @property
    def denoiser(self) -> Denoiser:
        """The network and the shape of its input, for the names of published weights."""
        return Denoiser(self.wired.network, self.wired.input_shape)

    @property
    def shardings(self) -> TrainState:
        """Where each array of the state lives."""
        return jax.tree.map(lambda leaf: leaf.sharding, self.abstract)

    @property
    def teacher(self) -> str:
        """The name of the run's own weights that the objective learns from, as `teacher_of`."""
        return teacher_of(self.config)

    @property
    def accumulation_steps(self) -> int:
        """Parts of a batch that the network is evaluated on one after the other."""
        return self.config.accumulation_steps


def set_up(
    config: ConfigDict,
    image_shape: tuple[int, int, int],
    condition: Condition,
    mesh: Mesh | None = None,
    codec: Codec = Identity(),
) -> Setup:
    """Wires a config and lays its state out over the devices; nothing is compiled.

    Args:
        config: resolved.
        image_shape: `(H, W, C)` of the data.
        condition: the kind of condition that the data have.
        mesh: other devices than the config's, to load a run that was trained elsewhere.
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
    teacher_of(config)
    optimizer = build(config.optimizer, Optimizer, "config.optimizer", num_steps=config.num_steps)
    nonfinite = build(config.nonfinite, NonFinite, "config.nonfinite")
    build(config.augment, Augmentation, "config.augment")
    attention = attention_for_mesh(config, mesh)
    wired = wire(with_attention(config, attention), image_shape, condition)
    check_mesh(wired, mesh)
    # A config made by hand may leave it out.
    rules = sharding.check_rules(config.get("sharding_rules") or sharding.RULES)
    wired = wired._replace(apply=sharding.on_mesh(wired.apply, mesh, rules))
    if own_mesh:
        rows = mesh.shape["data"] * mesh.shape["fsdp"]
        check_parts(wired.objective, config.accumulation_steps, config.batch_size, rows)

    def begin(params: Any) -> TrainState:
        memory = wired.objective.init_memory()
        trained, frozen = split(params, config.trainable)
        state = init_state(trained, optimizer, Averages.of(config), memory, nonfinite.init())
        return state._replace(frozen=frozen)

    shapes = jax.eval_shape(begin, wired.params_shape)
    places = sharding.state_shardings(shapes, mesh, rules)
    abstract = jax.tree.map(
        lambda leaf, place: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=place),
        shapes,
        places,
    )
    placed = partial(jax.jit, out_shardings=places, compiler_options=_quick_compilation(mesh))
    init = placed(lambda key: begin(wired.init(key)))
    at = placed(begin, donate_argnums=0)
    return Setup(config, wired, optimizer, mesh, abstract, nonfinite, init, at, attention, codec)


def _quick_compilation(mesh: Mesh) -> dict[str, Any]:
    """Options for a program that runs once: on a CPU, optimising it takes three times as long
    as everything else about it, and computes the same bits.
    """
    on_cpu = mesh.devices.flat[0].platform == "cpu"
    return {"xla_backend_optimization_level": 0} if on_cpu else {}


def attention_for_mesh(config: ConfigDict, mesh: Mesh) -> str | None:
    """The implementation of attention for a config's choice on a mesh.

    It is the mesh that decides, not the machine: a program may be compiled elsewhere than it runs.

    Raises:
        UserError: an unknown name, or one that the objective has no use for.
    """
    if not isinstance(config.model, ConfigDict) or "attention" not in config.model:
        return None
    platform, dtype = mesh.devices.flat[0].platform, config.model.get("dtype", "float32")
    forward_mode = build_objective(config).traits.forward_mode
    return resolve(config.model.attention, platform, dtype, mesh.shape["sequence"], forward_mode)


def with_attention(config: ConfigDict, attention: str | None) -> ConfigDict:
    """The same config with this implementation of attention, for `wire`."""
    if attention is None:
        return config
    chosen = ConfigDict(config.to_dict(), convert_dict=True)
    chosen.model.attention = attention
    return chosen


def countable(setup: Setup) -> Setup:
    """The same run, with attention of matrix products where it is a kernel that hides them.

    `diffjax.training.flops.matrix_flops` looks into nothing else.
    """
    if setup.attention not in REVERSE_ONLY:
        return setup
    wired = setup.wired
    plain = with_attention(setup.config, "xla")
    return set_up(plain, wired.image_shape, wired.condition, setup.mesh)


def check_mesh(wired: Wired, mesh: Mesh) -> None:
    """Refuses a mesh that the network can't be split over, if the network can check that.

    Raises:
        UserError: it does not divide, with what would.
    """
    check = getattr(wired.network, "check_mesh", None)
    if check is not None:
        check(wired.input_shape, dict(mesh.shape))


def teacher_of(config: ConfigDict) -> str:
    """The name of the run's own weights that the objective learns from; `live` for a frozen one.

    Raises:
        UserError: an average that is not kept, or an objective without a teacher.
    """
    # A config made by hand may leave it out.
    named = config.teacher
    name = teacher_name(named, Averages.of(config)) if is_kept(named) else LIVE
    if named != FIRST_AVERAGE and not build_objective(config).traits.has_teacher:
        raise UserError(
            f"config.teacher={named!r}: this objective learns from no teacher; leave it at "
            f"{FIRST_AVERAGE!r}"
        )
    return name


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


def check_pairs(setup: Setup, dataset: DataSet) -> None:
    """Refuses a data set without the sources or conditions that training needs, or of another size.

    Raises:
        UserError: training needs one for each image, or sampling starts from one; the config
            expects another number of images, for training or in all.
    """
    in_all = len(dataset.train) + len(dataset.test)
    if setup.config.get("expected", {}).get("num_images") != in_all:
        check_expected(setup.config, num_images=len(dataset.train))
    objective, condition = setup.wired.objective, setup.wired.condition
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
