"""A sweep: one config, and the axes along which its cells differ."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import product
from typing import Any

_OVERRIDE = "config."
_SEED = "config.seed"


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


@dataclass(frozen=True)
class Sweep:
    """What a sweep's file returns from `get_sweep()`.

    Attributes:
        config: the config file.
        axes: values by axis. `config.seed` and other dotted names are settings; what has no dot,
            as `objective`, is an argument of the config file.
        overrides: settings that all cells share.

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

    def cells(self) -> list[Cell]:
        """All combinations of the axes' values, the last axis changing fastest."""
        return [
            self._cell(dict(zip(self.axes, values, strict=True)))
            for values in product(*self.axes.values())
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
