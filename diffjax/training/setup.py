"""Everything that a run needs before its first step, and that loading it needs again."""

from typing import Any, NamedTuple

import jax
from jax.sharding import Mesh
from ml_collections import ConfigDict

from diffjax.data import DataSet
from diffjax.errors import UserError, nearest
from diffjax.spec import build
from diffjax.training import sharding
from diffjax.training.nonfinite import NonFinite
from diffjax.training.optimizer import Optimizer
from diffjax.training.state import LIVE, TrainState, ema_name, init_state
from diffjax.wiring import Wired, wire


class Setup(NamedTuple):
    """A config, wired and placed.

    Attributes:
        config: resolved.
        wired: its parts.
        optimizer: the update rule.
        mesh: the devices.
        abstract: the training state as `ShapeDtypeStruct` with shardings.
        nonfinite: what becomes of a step that is not finite.
    """

    config: ConfigDict
    wired: Wired
    optimizer: Optimizer
    mesh: Mesh
    abstract: TrainState
    nonfinite: NonFinite = NonFinite()

    @property
    def shardings(self) -> TrainState:
        """Where each array of the state lives."""
        return jax.tree.map(lambda leaf: leaf.sharding, self.abstract)

    def init(self, key: jax.Array) -> TrainState:
        """A fresh state, made in place on the mesh."""
        init = jax.jit(self._init, out_shardings=self.shardings)
        return init.lower(key).compile(self._quick_compilation())(key)

    def _quick_compilation(self) -> dict[str, Any]:
        """Options for a program that runs once: on a CPU, optimising it takes three times as long
        as everything else about it, and gives the same bits.
        """
        on_cpu = self.mesh.devices.flat[0].platform == "cpu"
        return {"xla_backend_optimization_level": 0} if on_cpu else {}

    def _init(self, key: jax.Array) -> TrainState:
        memory = self.wired.objective.init_memory()
        return init_state(
            self.wired.init(key),
            self.optimizer,
            self.config.ema_decays,
            memory,
            self.nonfinite.init(),
        )


def set_up(
    config: ConfigDict,
    image_shape: tuple[int, int, int],
    num_classes: int,
    mesh: Mesh | None = None,
) -> Setup:
    """Wires a config and lays its state out over the devices; nothing is compiled.

    Args:
        config: resolved.
        image_shape: `(H, W, C)` of the data.
        num_classes: of the data; 0 is unconditional.
        mesh: other devices than the config's, to load a run that was trained elsewhere.

    Raises:
        UserError: whatever does not fit.
    """
    check_counts(config)
    if mesh is None:
        mesh = sharding.make_mesh(**config.mesh)
        sharding.check_batch(config.batch_size, mesh)
    check_weights(config)
    wired = wire(config, image_shape, num_classes)
    optimizer = build(config.optimizer, num_steps=config.num_steps)
    # Configs of before there was a choice have none.
    nonfinite = build(config.nonfinite) if "nonfinite" in config else NonFinite()
    shapes = jax.eval_shape(
        lambda params: init_state(
            params,
            optimizer,
            config.ema_decays,
            wired.objective.init_memory(),
            nonfinite.init(),
        ),
        wired.params_shape,
    )
    places = sharding.state_shardings(shapes, mesh)
    abstract = jax.tree.map(
        lambda leaf, place: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=place),
        shapes,
        places,
    )
    return Setup(config, wired, optimizer, mesh, abstract, nonfinite)


def check_counts(config: ConfigDict) -> None:
    """Refuses counts below 1, which would end in a division by zero long after the start."""
    counts = {
        name: config[name]
        for name in (
            "num_steps",
            "log_every_steps",
            "sample_every_steps",
            "checkpoint_every_steps",
            "checkpoints_to_keep",
            "checkpoints_kept_every_steps",
        )
    }
    counts["sampling.num_steps"] = config.sampling.num_steps
    for i, steps in enumerate(config.evaluation.num_steps):
        counts[f"evaluation.num_steps[{i}]"] = steps
    for name, count in counts.items():
        if count < 1:
            raise UserError(f"config.{name}={count} must be at least 1")


def check_pairs(setup: Setup, dataset: DataSet) -> None:
    """Refuses a data set without the sources that the objective needs.

    Raises:
        UserError: training needs one for each image, or sampling starts from one.
    """
    objective = setup.wired.objective
    for needed, source, part in (
        (objective.needs_source, dataset.train, "training"),
        (objective.starts_at_source, dataset.test, "test"),
    ):
        if needed and len(source) and "source" not in source.gather([0]):
            raise UserError(
                f"this objective needs a source for each {part} image, and {dataset.name} has "
                "none: take a data set of pairs (docs/bridges.md), or another objective"
            )


def check_weights(config: ConfigDict) -> None:
    """Refuses to evaluate an average that the config does not keep."""
    kept = [LIVE, *map(ema_name, config.ema_decays)]
    if config.weights not in kept:
        suggestion = nearest(config.weights, kept)
        raise UserError(f"config.weights={config.weights!r} is none of the run's; {suggestion}")
