"""What a run is, at any step: arrays, nothing else."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from diffjax.errors import UserError, nearest
from diffjax.training.optimizer import Optimizer
from diffjax.training.subset import merged

LIVE = "live"


class TrainState(NamedTuple):
    """The whole state of training; randomness and data position follow from `step`.

    Attributes:
        step: `[]` int32, updates made so far.
        params: the live parameters.
        opt_state: the optimizer's.
        ema: averages of the parameters, by the name of their decay.
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

    def only(self, name: str) -> "TrainState":
        """The step, the weights of that name and what is frozen; `...` for every other array.

        Raises:
            UserError: the run keeps no average of that name.
        """
        self.weights(name)
        rest = jax.tree.map(lambda _: ..., self)
        live = {"params": self.params} if name == LIVE else {}
        averaged = {} if name == LIVE else {"ema": {**rest.ema, name: self.ema[name]}}
        return rest._replace(step=self.step, frozen=self.frozen, **live, **averaged)


def init_state(
    params: Any,
    optimizer: Optimizer,
    decays: Sequence[float],
    memory: Any = (),
    skipped: Any = (),
) -> TrainState:
    """The state before the first step; averages start at the parameters."""
    # Copies: the step donates its state, and two names of one buffer can't both be donated.
    ema = {ema_name(decay): jax.tree.map(jnp.copy, params) for decay in decays}
    return TrainState(
        jnp.zeros((), jnp.int32), params, optimizer.transform.init(params), ema, memory, skipped
    )


def ema_name(decay: float) -> str:
    """The name of an average.

    Example:
        >>> ema_name(0.999)
        'ema-0.999'
    """
    return f"ema-{decay:g}"


def update_ema(ema: dict[str, Any], params: Any, decays: Sequence[float], step: Array) -> dict:
    """`ema = d·ema + (1 - d)·params` with `d = min(decay, (1 + step)/(10 + step))`.

    The second term keeps the first steps, when parameters move fast, out of the average.
    """
    step = step.astype(jnp.float32)

    def one(decay: float) -> Any:
        d = jnp.minimum(decay, (1.0 + step) / (10.0 + step))
        return jax.tree.map(
            lambda old, new: old + (1.0 - d) * (new - old), ema[ema_name(decay)], params
        )

    return {ema_name(decay): one(decay) for decay in decays}


def is_kept(teacher: str) -> bool:
    """Whether `config.teacher` names weights of the run itself, and not a run or a file.

    Example:
        >>> is_kept("live"), is_kept("ema"), is_kept("ema-0.999"), is_kept("runs/digits")
        (True, True, True, False)
    """
    return teacher in (LIVE, "ema") or teacher.startswith("ema-")


def teacher_name(teacher: str, decays: Sequence[float]) -> str:
    """The name of the weights that an objective learns from, for `TrainState.weights`.

    Args:
        teacher: `config.teacher`: `live`, the name of an average, or `ema`, which is the average of
            the first decay, and live without averages.
        decays: of the averages, in the user's order. A state's own order is by name.

    Raises:
        UserError: no such average is kept.

    Example:
        >>> teacher_name("ema", (0.999, 0.99)), teacher_name("ema", ()), teacher_name("live", ())
        ('ema-0.999', 'live', 'live')
    """
    kept = [*map(ema_name, decays), LIVE]
    if teacher == "ema":
        return kept[0]
    if teacher not in kept:
        raise UserError(f"config.teacher={teacher!r} is not kept; {nearest(teacher, kept)}")
    return teacher
