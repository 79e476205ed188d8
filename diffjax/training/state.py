"""The training state: the arrays of a run at a step."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from diffjax.errors import UserError, nearest
from diffjax.optimizers.base import Optimizer
from diffjax.training.averages import Averages
from diffjax.training.subset import merged

LIVE = "live"
FIRST_AVERAGE = "ema"
"""The name of the first average as a teacher, the default of `config.teacher`."""


class TrainState(NamedTuple):
    """The whole state of training; randomness and data position follow from `step`.

    Attributes:
        step: `[]` int32, the number of updates so far.
        params: the live parameters.
        opt_state: the state of the optimizer.
        ema: averages of the parameters, by name (`diffjax.training.averages`).
        memory: the memory of the objective; `()` for most objectives.
        skipped: `[2]` int32, the numbers of skipped steps in a row and in total; `()` if no step
            may be skipped.
        frozen: the parameters that are not trained (`diffjax.training.subset`); `()` if all are
            trained. `params`, `opt_state` and `ema` do not contain them.
    """

    step: Array
    params: Any
    opt_state: Any
    ema: dict[str, Any]
    memory: Any = ()
    skipped: Any = ()
    frozen: Any = ()

    def __repr__(self) -> str:
        kept = ", ".join((LIVE, *self.ema)) if isinstance(self.ema, dict) else LIVE
        return f"TrainState(step {self.step}, weights {kept})"

    def weights(self, name: str) -> Any:
        """Live or averaged parameters by name (`live`, `ema-0.999`, …), with the frozen ones.

        Raises:
            UserError: the run keeps no average of that name.
        """
        kept = {**self.ema, LIVE: self.params}
        if name not in kept:
            raise UserError(f"this run has no weights {name!r}; {nearest(name, kept)}")
        return merged(kept[name], self.frozen)

    def only(self, name: str | None) -> "TrainState":
        """The state with `...` for all arrays but the step, the named and the frozen weights.

        Args:
            name: `live` or the name of an average; None for the step and the frozen weights alone.

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


def is_kept(teacher: str) -> bool:
    """Whether `config.teacher` names weights of the run itself, and not a run or a file.

    Example:
        >>> is_kept("live"), is_kept("ema"), is_kept("ema-0.999"), is_kept("runs/digits")
        (True, True, True, False)
    """
    return teacher in (LIVE, FIRST_AVERAGE) or teacher.startswith(("ema-", "power-"))


def teacher_name(teacher: str, averages: Averages) -> str:
    """The name of the weights that an objective learns from, for `TrainState.weights`.

    Args:
        teacher: `config.teacher`: `live`, the name of an average, or `ema`, which is the first
            average, and live without averages.
        averages: those that are kept, in the user's order. A state's own order is by name.

    Raises:
        UserError: no such average is kept.

    Example:
        >>> kept = Averages((0.999, 0.99))
        >>> teacher_name("ema", kept), teacher_name("ema", Averages()), teacher_name("live", kept)
        ('ema-0.999', 'live', 'live')
    """
    kept = [*averages.names, LIVE]
    if teacher == FIRST_AVERAGE:
        return kept[0]
    if teacher not in kept:
        raise UserError(f"config.teacher={teacher!r} is not kept; {nearest(teacher, kept)}")
    return teacher
