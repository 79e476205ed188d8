"""Describes a sweep: one config file and the axes along which its cells differ."""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import product
from typing import Any, NamedTuple

from diffjax.errors import UserError, nearest

_OVERRIDE = "config."
_SEED = "config.seed"
STEPS = "config.num_steps"
MATCHED = ("steps", "images", "flops")


@dataclass(frozen=True)
class Between:
    """The numbers of an axis between two ends, for a search.

    Attributes:
        low: the lowest number.
        high: the highest number.
        log: whether a search draws its logarithm; for learning rates and widths.
        whole: whether it is a whole number.

    Raises:
        UserError: the ends are not in order, or not positive although `log` is set.

    Example:
        >>> Between(1e-4, 1e-2, log=True).at(0.5), Between(1, 4, whole=True).at(0.99)
        (0.001, 4)
    """

    low: float
    high: float
    log: bool = False
    whole: bool = False

    def __post_init__(self):
        if not self.low < self.high or not math.isfinite(self.low + self.high):
            raise UserError(f"{self}: low has to be below high")
        if self.log and self.low <= 0:
            raise UserError(f"{self}: log needs positive numbers")

    def at(self, share: float) -> float | int:
        """The number at a share, in [0, 1), of the way from `low` to `high`."""
        if self.whole and not self.log:
            return int(self.low) + math.floor(share * (int(self.high) - int(self.low) + 1))
        if self.log:
            return self.rounded(math.exp(_mix(math.log(self.low), math.log(self.high), share)))
        return self.rounded(_mix(self.low, self.high, share))

    def rounded(self, value: float) -> float | int:
        """A number as cells have it: whole, or of three digits, for short names."""
        near = round(value) if self.whole else float(f"{value:.3g}")
        return min(max(near, self.low), self.high)


def _mix(low: float, high: float, share: float) -> float:
    return low + share * (high - low)


@dataclass(frozen=True)
class Cell:
    """One run of a sweep.

    Attributes:
        name: its values on axes with several values, for example `ddpm-unet`; also its folder.
        axes: its value on every axis.
        location: the config file with its arguments, as the value of `--config`.
        overrides: settings by dotted name, with their values as text.
        arm: the name without the seed; cells of one arm differ only in their seed.
    """

    name: str
    axes: Mapping[str, Any]
    location: str
    overrides: Mapping[str, str]
    arm: str

    def flags(self) -> list[str]:
        """Command-line flags for `experiments.train` or another program with `--config`."""
        return [
            f"--config={self.location}",
            *(f"--{name}={text}" for name, text in self.overrides.items()),
        ]


class Cost(NamedTuple):
    """The training cost of a cell.

    Attributes:
        num_steps: training steps of its config.
        batch_size: images per step.
        flops_per_step: FLOPs of a training step; None if they can't be counted.
    """

    num_steps: int
    batch_size: int
    flops_per_step: float | None

    def of(self, what: str) -> Any:
        """The cost of one step in a unit: `images` or `flops`."""
        return {"images": self.batch_size, "flops": self.flops_per_step}[what]


@dataclass(frozen=True)
class Sweep:
    """A config file and the axes to vary; the result of `get_sweep()` in a sweep's file.

    Attributes:
        config: path of the config file.
        axes: values by axis. A name that begins with `config.`, such as `config.seed`, is a
            setting; a name without a dot, such as `objective`, is an argument of the config file.
            `Between` is a range, for a search.
        overrides: settings that all cells share.
        question: the question that the sweep answers, for its report.
        matched: the budget that is equal in all cells. `steps` keeps the steps of each config;
            `images` and `flops` set the steps so that each cell trains on as many images, or with
            as many counted FLOPs, as the first cell.

    Raises:
        UserError: steps are both an axis and matched, an axis belongs to sampling or evaluation,
            has no values, or has a value twice.

    Example:
        >>> sweep = Sweep("configs/digits.py", {"objective": ("flow", "ddpm"), "config.seed": (0,)})
        >>> [cell.name for cell in sweep.cells()]
        ['flow', 'ddpm']
        >>> sweep.cells()[1].flags()
        ['--config=configs/digits.py:objective=ddpm', '--config.seed=0']
    """

    config: str
    axes: Mapping[str, Sequence[Any] | Between]
    overrides: Mapping[str, Any] = field(default_factory=dict)
    question: str = ""
    matched: str = "steps"
    trials: Sequence[Mapping[str, Any]] = ()

    def __post_init__(self):
        if self.matched not in MATCHED:
            raise UserError(f"matched={self.matched!r}: {nearest(self.matched, MATCHED)}")
        for axis, values in self.axes.items():
            names = [""] if isinstance(values, Between) else [str(value) for value in values]
            twice = [name for name in names if names.count(name) > 1]
            if not names or twice:
                what = f"{twice[0]} twice" if twice else "no values"
                raise UserError(f"the axis {axis} has {what}")
            if axis == "config.weights" or axis.startswith(
                ("config.sampling.", "config.evaluation.")
            ):
                raise UserError(
                    f"{axis} can't be an axis, since it needs no new training: list its values in "
                    "config.evaluation (docs/sweeps.md), or set it for all cells"
                )
        if self.matched != "steps" and STEPS in self.axes:
            raise UserError(f"a sweep matched in {self.matched} sets {STEPS}: it can't be an axis")

    def cells(self) -> list[Cell]:
        """All combinations of the axes' values, or all trials; the last axis changes fastest.

        Raises:
            UserError: an axis is a range, and there are no trials.
        """
        if self.trials:
            seeds = [{_SEED: seed} for seed in self.values(_SEED)] or [{}]
            chosen = [{**trial, **seed} for trial in self.trials for seed in seeds]
            return [self._cell({axis: each[axis] for axis in self.axes}) for each in chosen]
        values = [self.values(axis) for axis in self.axes]
        return [self._cell(dict(zip(self.axes, each, strict=True))) for each in product(*values)]

    def values(self, axis: str) -> Sequence[Any]:
        """The values of an axis; none if there is no such axis.

        Raises:
            UserError: the axis is a range.
        """
        values = self.axes.get(axis, ())
        if isinstance(values, Between):
            raise UserError(f"the axis {axis} is a range: add --search=random --trials=20")
        return values

    def matched_cells(self, costs: Mapping[str, Cost]) -> list[Cell]:
        """The cells, with numbers of steps such that their cost equals that of the first cell.

        Args:
            costs: training costs by cell name; the first is the reference. Other cells are left
                out.

        Raises:
            UserError: `matched` is `flops`, and those of a cell can't be counted.

        Example:
            >>> sweep = Sweep("c.py", {"objective": ("a", "b")}, matched="flops")
            >>> costs = {"a": Cost(900, 8, 2e9), "b": Cost(900, 8, 3e9)}
            >>> [cell.overrides for cell in sweep.matched_cells(costs)]
            [{}, {'config.num_steps': '600'}]
        """
        cells = [cell for cell in self.cells() if cell.name in costs]
        if self.matched == "steps" or not cells:
            return cells
        units = {name: cost.of(self.matched) for name, cost in costs.items()}
        uncounted = [name for name, unit in units.items() if unit is None]
        if uncounted:
            raise UserError(
                f"{self.matched} of {uncounted[0]} can't be counted: use matched='images'"
            )
        first = next(iter(costs))
        total = costs[first].num_steps * units[first]
        steps = {name: max(1, round(total / unit)) for name, unit in units.items()}
        return [
            cell
            if steps[cell.name] == costs[cell.name].num_steps
            else replace(cell, overrides={**cell.overrides, STEPS: str(steps[cell.name])})
            for cell in cells
        ]

    def _cell(self, axes: dict[str, Any]) -> Cell:
        parts = {
            axis: f"{axis.rpartition('.')[2]}={value}" if axis.startswith(_OVERRIDE) else str(value)
            for axis, value in axes.items()
            if isinstance(values := self.axes[axis], Between) or len(values) > 1
        }
        arguments = [f"{a}={value}" for a, value in axes.items() if not a.startswith(_OVERRIDE)]
        settings = {a: value for a, value in axes.items() if a.startswith(_OVERRIDE)}
        return Cell(
            _joined(parts.values()),
            axes,
            self.config + (":" + ",".join(arguments) if arguments else ""),
            {name: str(value) for name, value in {**self.overrides, **settings}.items()},
            _joined(part for axis, part in parts.items() if axis != _SEED),
        )


def _joined(parts: Iterable[str]) -> str:
    return "-".join(parts).replace("/", "-") or "run"
