"""A sweep: one config, and the axes along which its cells differ."""

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
class Cell:
    """One run of a sweep.

    Attributes:
        name: its values on the axes that have several, as `ddpm-unet`; the folder it runs in.
        axes: all its values.
        location: the config file with its arguments, as `--config` takes it.
        overrides: dotted settings and their texts, as flags take them.
        arm: the name without the seed; what is compared.
    """

    name: str
    axes: Mapping[str, Any]
    location: str
    overrides: Mapping[str, str]
    arm: str

    def flags(self) -> list[str]:
        """The command-line flags of a program that takes `--config`."""
        return [
            f"--config={self.location}",
            *(f"--{name}={text}" for name, text in self.overrides.items()),
        ]


class Cost(NamedTuple):
    """What training a cell costs.

    Attributes:
        num_steps: as its config says.
        batch_size: images a step.
        flops_per_step: counted; None if they can't be.
    """

    num_steps: int
    batch_size: int
    flops_per_step: float | None

    def of(self, what: str) -> Any:
        """Of one step: of `images` or `flops`."""
        return {"images": self.batch_size, "flops": self.flops_per_step}[what]


@dataclass(frozen=True)
class Sweep:
    """What a sweep's file returns from `get_sweep()`.

    Attributes:
        config: the config file.
        axes: values by axis. `config.seed` and other dotted names are settings; what has no dot,
            as `objective`, is an argument of the config file.
        overrides: settings that all cells share.
        question: what the sweep is to answer, for its page.
        matched: what cells get alike of: `steps` of training, as their configs say; or `images`, or
            `flops`, counted operations of training, each as many as the first cell.

    Raises:
        UserError: steps are an axis and matched, an axis is of sampling or evaluation, or has no
            values or one of them twice.

    Example:
        >>> sweep = Sweep("configs/digits.py", {"objective": ("flow", "ddpm"), "config.seed": (0,)})
        >>> [cell.name for cell in sweep.cells()]
        ['flow', 'ddpm']
        >>> sweep.cells()[1].flags()
        ['--config=configs/digits.py:objective=ddpm', '--config.seed=0']
    """

    config: str
    axes: Mapping[str, Sequence[Any]]
    overrides: Mapping[str, Any] = field(default_factory=dict)
    question: str = ""
    matched: str = "steps"

    def __post_init__(self):
        if self.matched not in MATCHED:
            raise UserError(f"matched={self.matched!r}: {nearest(self.matched, MATCHED)}")
        for axis, values in self.axes.items():
            names = [str(value) for value in values]
            twice = [name for name in names if names.count(name) > 1]
            if not names or twice:
                what = f"{twice[0]} twice" if twice else "no values"
                raise UserError(f"the axis {axis} has {what}")
            if axis == "config.weights" or axis.startswith(
                ("config.sampling.", "config.evaluation.")
            ):
                raise UserError(
                    f"{axis} can be no axis, since it needs no new training: list its values in "
                    "config.evaluation (docs/sweeps.md), or set it for all cells"
                )
        if self.matched != "steps" and STEPS in self.axes:
            raise UserError(f"a sweep matched in {self.matched} sets {STEPS}: it can be no axis")

    def cells(self) -> list[Cell]:
        """All combinations of the axes' values, the last axis changing fastest."""
        return [
            self._cell(dict(zip(self.axes, values, strict=True)))
            for values in product(*self.axes.values())
        ]

    def matched_cells(self, costs: Mapping[str, Cost]) -> list[Cell]:
        """The cells with these costs, with as many steps as make them cost what the first does.

        Args:
            costs: by the cells' names, the first to be matched first.

        Raises:
            UserError: flops are to be matched, and some can't be counted.

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
            raise UserError(f"{self.matched} of {uncounted[0]} can't be counted: match in images")
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
            if len(self.axes[axis]) > 1
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
