"""The state that a run starts from: resumed, initialised from weights, or fresh."""

import logging
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import traverse_util

from diffjax.data import DataSet
from diffjax.errors import UserError
from diffjax.runs import workdirs
from diffjax.runs.checkpoints import Checkpoints
from diffjax.runs.extension import Extension, restarts_at
from diffjax.runs.initial import Initial, by_path, find_initial_weights
from diffjax.runs.parts import Parts
from diffjax.runs.setup import Setup
from diffjax.training.state import LIVE, TrainState
from diffjax.training.subset import merged

_LOG = logging.getLogger("diffjax")


class Begin(NamedTuple):
    """What a run starts from besides the files in its folder; see `restore_or_init`.

    Attributes:
        initial: the weights of `config.init_from`, for a run that has not begun.
        extension: the changes of a run that has begun.
    """

    initial: Initial | None = None
    extension: Extension | None = None

    @property
    def restarts(self) -> bool:
        """Whether the schedule of the learning rate starts anew where the run resumes."""
        return self.extension is not None and self.extension.restart


def initial_weights(parts: Parts, workdir: Path) -> Initial | None:
    """The weights of `config.init_from`; None if it names none, or the run has begun already.

    Raises:
        UserError: there are no such weights, or they are of another network; LoRA of none.
    """
    named = parts.config.init_from
    begun = workdirs.checkpoint_steps(workdir)
    if parts.wired.lora.rank and not named:
        raise UserError(
            f"config.lora.rank={parts.wired.lora.rank} trains changes of given weights, and there "
            "are none: set --config.init_from"
        )
    return _find(named, parts) if named and not begun else None


def _find(named: str, parts: Parts) -> Initial:
    like, wired = parts.abstract.weights(LIVE), parts.wired
    names = *wired.own_names, *wired.embedding_names
    return find_initial_weights(named, like, denoiser=parts.denoiser, own_names=names)


def restore_or_init(
    setup: Setup,
    checkpoints: Checkpoints,
    dataset: DataSet,
    initial: Initial | None = None,
    restart: float = -math.inf,
) -> tuple[TrainState, Mapping[str, Any]]:
    """The state that a run starts from, and its meta: at least the step.

    It is resumed, else initialised, else fresh, as `diffjax.loop.loop.train_and_evaluate` explains.

    Args:
        setup: the setup of the run.
        checkpoints: the checkpoints of the run.
        dataset: what it trains on.
        initial: from `initial_weights`, checked before anything was written.
        restart: the schedule of a checkpoint up to this step starts anew.

    Raises:
        UserError: the data are not those that the run began with; as `initial_weights`.
    """
    restored = checkpoints.restore(setup.abstract)
    if restored is None:
        if named := setup.config.init_from:
            params, source = (initial or _find(named, setup.parts))()
            _LOG.info("beginning with the weights of %s", named)
            params = _with_missing(params, setup)
            return setup.begin(params), {"step": 0, "schedule_start": 0, "init_from": source}
        return setup.init(_init_key(setup)), {"step": 0, "schedule_start": 0}
    state, meta = restored
    if meta["data_sha256"] != dataset.train.fingerprint():
        raise UserError(
            f"the training images of {dataset.name} changed since this run began: bring the old "
            "ones back, or start again in another --workdir"
        )
    _LOG.info("resuming at step %d of %d", meta["step"], setup.config.num_steps)
    state, schedule_start = restarts_at(restart, setup, state, meta)
    return state, {**meta, "schedule_start": schedule_start}


def _with_missing(params: Any, setup: Setup) -> Any:
    """Weights with fresh parameters where they have none: LoRA, the embedding of guidance.

    Copies of the network that an objective trains are copies of the weights.
    """
    copies = [name for name in setup.wired.objective.traits.copies if name not in params]
    network = {name: x for name, x in params.items() if name not in setup.wired.own_names}
    params = {**params, **{name: jax.tree.map(jnp.copy, network) for name in copies}}
    like, there = by_path(setup.parts.abstract.weights(LIVE)), by_path(params)
    missing = like.keys() - there.keys()
    if not missing:
        return params

    def fresh(key: jax.Array) -> dict[str, Any]:
        # Of all that is initialised, XLA computes these alone.
        return {name: x for name, x in by_path(setup.wired.init(key)).items() if name in missing}

    places = {name: like[name].sharding for name in missing}
    made = jax.jit(fresh, out_shardings=places)(_init_key(setup))
    return merged(params, traverse_util.unflatten_dict(made, sep="/"))


def _init_key(setup: Setup) -> jax.Array:
    init_key, _ = jax.random.split(jax.random.key(setup.config.seed))
    return init_key
