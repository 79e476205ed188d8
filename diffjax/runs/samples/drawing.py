"""Draws images from a model, as `run.sample` does; the model needs no run's folder."""

from dataclasses import replace
from typing import Any

import jax
import numpy as np

from diffjax.conditions import Condition
from diffjax.conditions.base import len_of
from diffjax.errors import UserError
from diffjax.runs.samples.model import Model, Request
from diffjax.runs.samples.recipes import Chosen
from diffjax.sampling.guidance import Against, NegativeCondition
from diffjax.settings import LARGEST, check_whole
from diffjax.spec import check_arguments


def draw_images(
    model: Model,
    condition: Any,
    chosen: Chosen = Chosen(),
    *,
    source: np.ndarray | None = None,
    seed: int = 0,
    batch_size: int = 256,
) -> np.ndarray:
    """Draws one image for each row of a condition, as `Run.sample` explains.

    Args:
        model: the network with its weights and its own recipe.
        condition: the conditions of the samples: their number, a text, a list to parse, or arrays.
        chosen: parts of the recipe; `against` may also be a negative condition.
        source: `[n, H, W, C]` in [-1, 1], the source images, for models between two data sets.
        seed: the seed of the noise, an integer between -2³¹ and 2³¹.
        batch_size: images at a time.

    Returns:
        `[n, H, W, C]` float32, nominally in [-1, 1]: decoded images.

    Raises:
        UserError: no such condition or name; a number out of range; a recipe that does not suit
            this model.
    """
    check_whole("seed", seed, -LARGEST)
    check_whole("batch_size", batch_size, 1)
    check_arguments(draw_images, source=source)
    kind, negative, against = model.wired.condition, None, chosen.against
    cond = conditions_of(kind, condition)
    if against is not None and not isinstance(against, str | Against):
        negative = _negative(kind, against, len_of(cond))
        chosen = replace(chosen, against=NegativeCondition())
    source = None if source is None else model.encoded(source)
    request = Request(cond, seed, source, negative=negative)
    return model.sample(chosen.of(model.wired.recipe), request, batch_size=batch_size)


def one_condition(kind: Condition, named: dict[str, Any], num_samples: int | None) -> Any:
    """The condition that was passed by one of several names, repeated for `num_samples`.

    Args:
        kind: the kind of the model's condition.
        named: the arguments by name, of which one has a value (`labels`, `prompts`, …).
        num_samples: the number of samples; the rows of the condition are used in turn.

    Raises:
        UserError: no argument has a value, or several have; `num_samples` is not a number.
    """
    given = {name: value for name, value in named.items() if value is not None}
    if len(given) > 1:
        raise UserError(
            f"{' and '.join(f'{name}=' for name in given)} are one thing: leave one out"
        )
    if num_samples is not None:
        check_whole("num_samples", num_samples, 1)
    if not given and num_samples is None:
        raise UserError("pass what samples are to show, as labels=[3, 7], or how many, num_samples")
    if not given:
        return num_samples
    ((name, condition),) = given.items()
    if name != "condition" and np.ndim(condition) == 0 and not isinstance(condition, dict):
        condition = [condition]  # labels=3 is the label 3, as --labels=3 is
    if num_samples is None:
        return condition
    if isinstance(condition, int | np.integer):
        raise UserError(f"{name}={condition} is a number of samples too: leave num_samples= out")
    rows = conditions_of(kind, condition)
    if not len_of(rows):
        raise UserError(f"{name}= is empty: there are no samples to draw")
    return kind.take(rows, np.arange(num_samples) % len_of(rows))


def conditions_of(kind: Condition, given: Any) -> Any:
    """Arrays of conditions from a number of samples, a list to parse, or arrays.

    Raises:
        UserError: a value can't be parsed, or a number is given and the conditions can't be listed.
    """
    if isinstance(given, str):
        return kind.of([given])
    if not isinstance(given, int | float | np.number | bool):
        return kind.of(given)
    number: Any = given
    check_whole("the number of samples", number, 1)
    listed = kind.in_turn(int(number))
    if listed is None:
        raise UserError(
            f"this run is conditioned on {kind.describe()}, which can't be listed: pass the "
            "condition of each sample"
        )
    return listed


def _negative(kind: Condition, given: Any, n: int) -> Any:
    """The negative condition with n rows; a single row is repeated for all samples."""
    if isinstance(given, int | float | np.number | bool):
        raise UserError(f"against={given!r}: a label is written as 'label:{given}' or [{given}]")
    try:
        cond = kind.negative.of(given)
    except UserError as error:
        raise UserError(f"against=, a negative condition: {error}") from None
    if len_of(cond) not in (1, n):
        raise UserError(
            f"against= has {len_of(cond)} rows: pass one for all samples, or {n}, one for each"
        )
    return cond if len_of(cond) == n else jax.tree.map(lambda row: row.repeat(n, 0), cond)
