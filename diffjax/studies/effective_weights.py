"""Effective weights of objectives over log-SNR, on one scale, so that they can be compared."""

import csv
import io
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import jax.numpy as jnp
import matplotlib as mpl
import numpy as np
from jax import Array
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from PIL import Image

from diffjax.compiling import once
from diffjax.evaluation.tables import percent
from diffjax.objectives.base import Objective
from diffjax.process.paths import log_snr

LIMIT = 20.0  # log-SNRs beyond ± this are left out
NOISY, CLEAN = -4.0, 4.0  # where the table divides log-SNR
COLUMNS = (
    "objective", "path", "target", "weight", "times", "log-SNR",
    "25 %", "median", "75 %", f"below {NOISY:g}", "between", f"above {CLEAN:g}", "besides",
)  # fmt: skip

_NUM_POINTS = 2000
_INK, _FAINT, _LINE = "#1f2430", "#8b93a1", "#2f6fde"
_STYLE = {
    "font.size": 8,
    "axes.edgecolor": _FAINT,
    "axes.labelcolor": _INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.titlesize": 8.5,
    "axes.titlelocation": "left",
    "xtick.color": _INK,
    "ytick.color": _INK,
    "text.color": _INK,
    "legend.frameon": False,
}


@dataclass(frozen=True)
class WeightCurve:
    """An objective's effective weight over the log-SNRs of its path, from noisy to clean.

    Attributes:
        log_snr: `[n]`, equally spaced, within ±20.
        weight: `[n]`, the effective weight of the squared error of the noise, per unit of log-SNR.
        share: `[n]`, weight times the smallest possible error at that log-SNR. The weight is scaled
            so that its integral is 1. The error is that of the optimal denoiser of Gaussian data,
            `sigmoid(λ + 2·log sigma_data)`.
    """

    log_snr: np.ndarray
    weight: np.ndarray
    share: np.ndarray

    @property
    def spacing(self) -> float:
        """Distance between two adjacent log-SNRs."""
        return float(self.log_snr[1] - self.log_snr[0])

    def quantile(self, u: float) -> float:
        """The log-SNR below which a share `u` in [0, 1] of the loss lies."""
        # The cumulative sum up to a cell belongs to the cell's upper end.
        below = np.cumsum(self.share) * self.spacing
        return float(np.interp(u, below, self.log_snr + 0.5 * self.spacing))

    def between(self, low: float, high: float) -> float:
        """The share of the loss between the log-SNRs `low` and `high`."""
        inside = (self.log_snr >= low) & (self.log_snr < high)
        return float(np.sum(self.share[inside]) * self.spacing)


def weight_curve(objective: Objective, *, sigma_data: float = 0.5) -> WeightCurve:
    """Computes the effective weight of an objective over all log-SNRs at which it trains.

    Multiplied by the smallest possible error, it is the contribution of each log-SNR to the loss of
    a trained model. That error depends on the data; here the data are Gaussian,
    `N(0, sigma_data²)`.

    Args:
        objective: a weighted denoising objective, or a wrapper around one.
        sigma_data: standard deviation of the Gaussian data; 0.5 is typical of images.

    Raises:
        NotImplementedError: the objective has no effective weight.

    Example:
        >>> from diffjax.objectives.denoising import Denoising
        >>> from diffjax.process import paths, precond, targets, times, weights
        >>> edm_times = times.LogNormal()  # log(s/a) ~ N(-1.2, 1.2²), and log-SNR is -2 times that
        >>> objective = Denoising(
        ...     paths.Cosine(), precond.Precond(targets.F(), precond.TimeLabel()),
        ...     weights.Constant(), edm_times,
        ... )
        >>> round(weight_curve(objective).quantile(0.5), 2)
        2.4
    """
    path = objective.path
    ends = _log_snr(path, jnp.stack([path.t_noise, path.t_min]))
    low, high = np.clip(np.asarray(ends, np.float64), -LIMIT, LIMIT)
    # Midpoints of cells, because at the ends some densities of time are 0 times infinity.
    levels = low + (np.arange(_NUM_POINTS) + 0.5) * (high - low) / _NUM_POINTS
    weight = np.asarray(_weight(objective, jnp.asarray(levels, jnp.float32)), np.float64)
    share = weight / (1.0 + np.exp(-levels) / sigma_data**2)
    total = np.sum(share) * (levels[1] - levels[0])
    return WeightCurve(levels, weight / total, share / total)


_log_snr = once()(log_snr)


@once()
def _weight(objective: Objective, levels: Array) -> Array:
    return objective.effective_weight(levels)


def effective_weights_table(
    curves: Mapping[str, WeightCurve], parts: Mapping[str, Mapping[str, str]]
) -> list[list[str]]:
    """Formats the rows of a table with `COLUMNS`, one row for each curve.

    Args:
        curves: curves by the objective's name.
        parts: the parts of each objective by its name: `path`, `target`, `weight`, `times`, and
            `besides`.
    """
    rows = []
    for name, curve in curves.items():
        ends = curve.log_snr[0], curve.log_snr[-1]
        shares = (
            curve.between(-math.inf, NOISY),
            curve.between(NOISY, CLEAN),
            curve.between(CLEAN, math.inf),
        )
        rows.append(
            [
                name,
                *(parts[name][axis] for axis in ("path", "target", "weight", "times")),
                f"{ends[0]:.1f} … {ends[1]:.1f}",
                # Adding 0 turns -0.0 into 0.0.
                *(f"{round(curve.quantile(u), 1) + 0.0:.1f}" for u in (0.25, 0.5, 0.75)),
                *map(percent, shares),
                parts[name]["besides"],
            ]
        )
    return rows


def weights_csv(curves: Mapping[str, WeightCurve], step: float = 0.25) -> str:
    """Effective weights as CSV, one column for each curve; empty outside the path's log-SNRs."""
    levels = np.arange(-LIMIT, LIMIT + step / 2, step)
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(["log_snr", *curves])
    for level in levels:
        row = [
            f"{np.interp(level, curve.log_snr, curve.weight):.6g}"
            if curve.log_snr[0] <= level <= curve.log_snr[-1]
            else ""
            for curve in curves.values()
        ]
        writer.writerow([f"{level:g}", *row])
    return out.getvalue()


def group_equal(curves: Mapping[str, WeightCurve]) -> list[list[str]]:
    """Groups the names of objectives with equal effective weights, in the order of first names."""
    groups: list[list[str]] = []
    for name, curve in curves.items():
        for group in groups:
            first = curves[group[0]]
            if np.allclose(curve.log_snr, first.log_snr, atol=1e-3) and np.allclose(
                curve.weight, first.weight, rtol=1e-3
            ):
                group.append(name)
                break
        else:
            groups.append([name])
    return groups


def plot_effective_weights(curves: Mapping[str, WeightCurve]) -> bytes:
    """Plots all curves as a PNG with common axes, one panel for each different curve."""
    groups = group_equal(curves)
    columns = 4
    rows = math.ceil(len(groups) / columns)
    with mpl.rc_context(_STYLE):  # pyright: ignore[reportArgumentType]
        figure = Figure(figsize=(10.5, 0.55 + 1.55 * rows), layout="constrained")
        panels = figure.subplots(rows, columns, sharex=True, sharey=True, squeeze=False)
        for axes, group in zip(panels.flat, groups, strict=False):
            _panel(axes, group, curves[group[0]], groups[0][0], curves[groups[0][0]])
        for index, axes in enumerate(panels.flat):
            # Tick labels are below the last panel of each column.
            axes.tick_params(labelbottom=len(groups) - columns <= index < len(groups))
        for axes in panels.flat[len(groups) :]:
            axes.set_axis_off()
        handles, labels = panels[0, 0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside upper center", ncols=len(labels))
        figure.supxlabel("log-SNR: noisy to clean", fontsize=8)
        buffer = io.BytesIO()
        figure.savefig(buffer, format="png", dpi=110)
    small = io.BytesIO()
    with Image.open(buffer) as image:  # Few colours take a third of the bytes.
        image.convert("RGB").quantize(64).save(small, format="PNG", optimize=True)
    return small.getvalue()


def _panel(
    axes: Axes, group: Sequence[str], curve: WeightCurve, first_name: str, first: WeightCurve
) -> None:
    axes.plot(
        first.log_snr, first.weight, color=_FAINT, linestyle=":", linewidth=1,
        label=f"effective weight of {first_name}",
    )  # fmt: skip
    axes.fill_between(
        curve.log_snr, curve.share, 1e-9, color=_LINE, alpha=0.2, linewidth=0,
        label="loss of Gaussian data (area 1) with its quartiles",
    )  # fmt: skip
    axes.plot(
        curve.log_snr, curve.weight, color=_LINE, linewidth=1.4,
        label="effective weight of the noise's squared error",
    )  # fmt: skip
    for u, width in ((0.25, 0.8), (0.5, 1.6), (0.75, 0.8)):
        level = curve.quantile(u)
        height = float(np.interp(level, curve.log_snr, curve.share))
        axes.vlines(level, 1e-9, height, color=_LINE, linewidth=width)
    axes.set(yscale="log", ylim=(1e-4, 10.0), xlim=(-15.0, 15.0), xticks=(-12, -6, 0, 6, 12))
    axes.set_yticks([1e-4, 1e-2, 1], ["0.0001", "0.01", "1"])
    axes.minorticks_off()
    axes.grid(True, color=_FAINT, alpha=0.25)
    text = ", ".join(group)
    middle = math.ceil(len(group) / 2)
    if len(text) > 34:
        text = ", ".join(group[:middle]) + ",\n" + ", ".join(group[middle:])
    axes.set_title(text)
