"""Random and adaptive searches: which values of a sweep's axes are trained, instead of all."""

from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any

import numpy as np

from diffjax.errors import UserError
from diffjax.sweeps.sweep import Between, Sweep

SEARCHES: Mapping[str, bool] = MappingProxyType({"random": False, "optuna": True})
"""The searches, and whether they are adaptive: results decide which trials come next."""
_SEED = "config.seed"
_MOST_DRAWS = 1_000

Trial = dict[str, Any]
"""The value of each axis but the seed."""


def searched_axes(sweep: Sweep) -> dict[str, Sequence[Any] | Between]:
    """The axes whose values a search chooses: all but the seed.

    Raises:
        UserError: there are none, or the sweep matches another budget than steps.
    """
    axes = {axis: values for axis, values in sweep.axes.items() if axis != _SEED}
    if not axes:
        raise UserError("this sweep has no axis but config.seed: there is nothing to search")
    if sweep.matched != "steps":
        raise UserError(
            f"a search trains each trial for the steps of its config, not matched={sweep.matched!r}"
        )
    return axes


def random_trials(sweep: Sweep, num_trials: int, seed: int = 0) -> list[Trial]:
    """Trials whose values are drawn independently and uniformly (in the logarithm, if `log`).

    More trials begin with the same ones, so that a search can be made longer.

    Args:
        sweep: its axes but the seed are searched.
        num_trials: number of trials; fewer if there are not as many combinations.
        seed: the seed of the search; the runs have their own.

    Example:
        >>> rates = Between(1e-4, 1e-2, log=True)
        >>> sweep = Sweep("c.py", {"config.optimizer.learning_rate": rates, "config.seed": (0,)})
        >>> random_trials(sweep, 3)[:2] == random_trials(sweep, 2)
        True

    References:
        Bergstra & Bengio, "Random Search for Hyper-Parameter Optimization", JMLR 13, 2012
    """
    return _new_trials(searched_axes(sweep), [], num_trials, seed)


def _new_trials(
    axes: Mapping[str, Sequence[Any] | Between], known: Sequence[Trial], number: int, seed: int
) -> list[Trial]:
    """Drawn trials that are neither known nor twice the same."""
    found: list[Trial] = []
    for draw in range(_MOST_DRAWS + 10 * number):
        if len(found) == number:
            break
        shares = np.random.default_rng([seed, draw]).random(len(axes))
        trial = {
            axis: _value(values, float(share))
            for (axis, values), share in zip(axes.items(), shares, strict=True)
        }
        if trial not in found and trial not in known:
            found.append(trial)
    return found


def _value(values: Sequence[Any] | Between, share: float) -> Any:
    if isinstance(values, Between):
        return values.at(share)
    return values[int(share * len(values))]


def adaptive_trials(
    sweep: Sweep, results: Sequence[tuple[Trial, float | None]], number: int, seed: int = 0
) -> list[Trial]:
    """The next trials by Optuna's tree-structured Parzen estimator, from the results so far.

    The first ten are random. Trials of one call run at the same time, and the estimator keeps them
    apart. The same results and seed lead to the same trials.

    Args:
        sweep: its axes but the seed are searched.
        results: all earlier trials with their results, lower is better; None for one that failed.
        number: the number of new trials.
        seed: the seed of the search.

    Raises:
        UserError: Optuna is not installed.

    References:
        Bergstra et al., "Algorithms for Hyper-Parameter Optimization", NeurIPS 2011
    """
    axes = searched_axes(sweep)
    try:
        import optuna  # pyright: ignore[reportMissingImports]
    except ImportError:
        raise UserError("--search=optuna needs Optuna: pip install 'diffjax[search]'") from None
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    state, new = optuna.trial.TrialState, []
    spaces = {axis: _distribution(optuna, values) for axis, values in axes.items()}
    sampler = optuna.samplers.TPESampler(seed=seed + len(results), constant_liar=True)
    study = optuna.create_study(sampler=sampler)
    for trial, value in results:
        study.add_trial(
            optuna.trial.create_trial(
                params={axis: _parameter(values, trial[axis]) for axis, values in axes.items()},
                distributions=spaces,
                value=value,
                state=state.FAIL if value is None else state.COMPLETE,
            )
        )
    known = [trial for trial, _ in results]
    for _ in range(number):
        suggested = study.ask(spaces).params
        trial = {axis: _of_parameter(values, suggested[axis]) for axis, values in axes.items()}
        if trial in known:  # As near as three digits: another one teaches more.
            (trial,) = _new_trials(axes, known, 1, seed + len(known)) or [trial]
        if trial not in known:
            known.append(trial)
            new.append(trial)
    return new


def _distribution(optuna: Any, values: Sequence[Any] | Between) -> Any:
    """Choices are numbers of choices, because Optuna keeps only plain values."""
    if not isinstance(values, Between):
        return optuna.distributions.CategoricalDistribution(range(len(values)))
    if values.whole:
        return optuna.distributions.IntDistribution(
            int(values.low), int(values.high), log=values.log
        )
    return optuna.distributions.FloatDistribution(values.low, values.high, log=values.log)


def _parameter(values: Sequence[Any] | Between, value: Any) -> Any:
    return value if isinstance(values, Between) else list(values).index(value)


def _of_parameter(values: Sequence[Any] | Between, parameter: Any) -> Any:
    return values.rounded(parameter) if isinstance(values, Between) else values[parameter]


def best_trials(results: Sequence[tuple[Trial, float | None]], number: int) -> list[Trial]:
    """The trials with the lowest results, the best first.

    Example:
        >>> best_trials([({"a": 1}, 0.5), ({"a": 2}, None), ({"a": 3}, 0.1)], 2)
        [{'a': 3}, {'a': 1}]
    """
    known = [(value, index) for index, (_, value) in enumerate(results) if value is not None]
    return [results[index][0] for _, index in sorted(known)[:number]]


def fresh_seeds(sweep: Sweep, number: int) -> tuple[int, ...]:
    """Training seeds that a search has not used.

    Example:
        >>> fresh_seeds(Sweep("c.py", {"objective": ("a",), "config.seed": (0, 3)}), 2)
        (4, 5)
    """
    first = max((int(seed) for seed in sweep.values(_SEED)), default=0) + 1
    return tuple(range(first, first + number))
