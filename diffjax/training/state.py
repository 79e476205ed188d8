"""What a run is, at any step: arrays, nothing else."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from diffjax.errors import UserError, nearest
from diffjax.optimizers.base import Optimizer
from diffjax.training.averages import Averages
from diffjax.training.subset import merged

LIVE = "live"


class TrainState(NamedTuple):
    """The whole state of training; randomness and data position follow from `step`.

    Attributes:
        step: `[]` int32, updates made so far.
        params: the live parameters.
        opt_state: the optimizer's.
        ema: averages of the parameters, by name (`diffjax.training.averages`).
        memory: what the objective remembers; nothing for most.
        skipped: `[2]` int32, steps left out in a row and in all; nothing if none may be.
        frozen: the parameters that are not trained (`diffjax.training.subset`), most often none;
            `params`, `opt_state` and `ema` are of the others alone.
    """

    step: Array
    params: Any
    opt_state: Any
    ema: dict[str, Any]
    memory: Any = ()
    skipped: Any = ()
    frozen: Any = ()

    def weights(self, name: str) -> Any:
        """Live or averaged parameters by name (`live`, `ema-0.999`, …), the frozen ones among them.

        Raises:
            UserError: the run keeps no average of that name.
        """
        kept = {**self.ema, LIVE: self.params}
        if name not in kept:
            raise UserError(f"this run has no weights {name!r}; {nearest(name, kept)}")
        return merged(kept[name], self.frozen)

    def only(self, name: str | None) -> "TrainState":
        """The step, the weights of that name and what is frozen; `...` for every other array.

        Args:
            name: `live` or that of an average; None for the step and what is frozen.

        Raises:
            UserError: the run keeps no average of that name.
        """
        rest = jax.tree.map(lambda _: ..., self)
        if name is None:
            return rest._replace(step=self.step, frozen=self.frozen)
        self.weights(name)
        live = {"params": self.params} if name == LIVE else {}
        averaged = {} if name == LIVE else {"ema": {**rest.ema, name: self.ema[name]}}
        return rest._replace(step=self.step, frozen=self.frozen, **live, **averaged)


def init_state(
    params: Any,
    optimizer: Optimizer,
    averages: Averages,
    memory: Any = (),
    skipped: Any = (),
) -> TrainState:
    """The state before the first step; averages start at the parameters."""
    step, opt_state = jnp.zeros((), jnp.int32), optimizer.transform.init(params)
    return TrainState(step, params, opt_state, averages.init(params), memory, skipped)


def teacher(state: TrainState, averages: Averages) -> Any:
    """The parameters that an objective may learn from: the first average, or live where none is.

    Args:
        state: of training.
        averages: that it keeps, in the user's order. The state's own is no order: what comes out of
            a compiled step or a checkpoint is sorted by name.

    Example:
        >>> state = TrainState(jnp.array(0), 1.0, (), {"ema-0.99": 2.0, "ema-0.999": 3.0})
        >>> teacher(state, Averages((0.999, 0.99))), teacher(state, Averages())
        (3.0, 1.0)
    """
    return state.weights(averages.names[0] if averages.names else LIVE)
