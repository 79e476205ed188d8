"""Validation loss by log-SNR in common spaces, which can be compared between objectives.

Training losses of runs with different targets, weights or paths can't be compared, because they
weight errors differently. Squared errors at equal log-SNR can: there `x_t` of any two paths is the
same mixture of image and noise up to a factor, so the optimal prediction of x0 and its error are
equal.
"""

import io
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.sharding import NamedSharding

from diffjax.compiling import jit
from diffjax.errors import UserError
from diffjax.evaluation.tables import MISSING, three_digits
from diffjax.host.processes import to_host
from diffjax.objectives.base import Traits
from diffjax.process.paths import Cosine, Pair, Path, coeffs, log_snr, mix, time_of_log_snr
from diffjax.process.precond import Meaning, Predict
from diffjax.process.targets import Target
from diffjax.process.weights import x0_factor
from diffjax.training.sharding import spread

EDGES = tuple(float(edge) for edge in range(-10, 11))
"""Edges of bins of log-SNR, of width 1, from almost pure noise to less than a grey level of it."""
_VARIANCE_PRESERVING = Cosine()
_STYLE = {"font.size": 9, "axes.spines.top": False, "axes.spines.right": False}


class MeanError(NamedTuple):
    """A mean over images and its standard error."""

    mean: float
    standard_error: float


@dataclass(frozen=True)
class ValidationLoss:
    """Squared errors of one model, each image at each noise level.

    Attributes:
        edges: `[K+1]`, edges of the bins of log-SNR, ascending.
        errors: errors `[N, K]` by the name of the space; NaN in bins that the path does not cover
            completely, where the model was not evaluated.
    """

    edges: np.ndarray
    errors: Mapping[str, np.ndarray]

    @property
    def covered(self) -> np.ndarray:
        """Which bins the path covers, bool `[K]`."""
        return np.any(np.isfinite(next(iter(self.errors.values()))), axis=0)

    def by_bin(self, space: str) -> list[MeanError | None]:
        """The mean error in each bin; None for bins that the path does not cover."""
        columns = zip(self.errors[space].T, self.covered, strict=True)
        return [_estimate(column) if inside else None for column, inside in columns]

    def total(self, space: str, bins: np.ndarray | None = None) -> MeanError:
        """The mean error over log-SNR, with equal weight for each unit of log-SNR.

        In the space of the noise, this is the integrand of the variational bound (Kingma et al.
        2021, arXiv:2107.00630).

        Args:
            space: name of the space of the error.
            bins: bool `[K]`, the bins to average over. To compare models on different paths, use
                the bins that all cover. By default all bins that this model's path covers.

        Raises:
            UserError: none of the bins is covered.
        """
        bins = self.covered if bins is None else bins & self.covered
        if not bins.any():
            raise UserError(
                "no bin of log-SNR is covered by every path: choose other bins, or fewer runs"
            )
        widths = np.diff(self.edges)[bins]
        return _estimate(self.errors[space][:, bins] @ (widths / np.sum(widths)))


@dataclass(frozen=True, eq=False)
class LossByLogSNR:
    """The error of a model on held-out images, at log-SNRs from every bin; compiled once.

        error = (D_space/s)²·mean_pixels (x0_predicted - x0)²

    The noise of image i, and its log-SNR within the bin, depend only on `key`, i and the bin. So
    all models are evaluated on the same inputs, and their differences have smaller standard errors
    than the errors themselves.

    Attributes:
        model: `weights -> Predict`; the prediction is evaluated with the condition.
        path: the path on which the model was trained.
        key: random key of noise and log-SNRs.
        spaces: targets by name; errors are reported in their spaces.
        edges: edges of the bins of log-SNR, ascending.
        space_path: the path that defines the targets' coefficients at each log-SNR, the same for
            all models. Errors of noise and clean data do not depend on it; those of v and the
            velocity depend on its scale and time.
        place: how a batch lies on the devices that have the weights, by rows; None for one device.
    """

    model: Callable[[Any], Predict]
    path: Path
    key: Array
    spaces: Mapping[str, Target]
    edges: Sequence[float] = EDGES
    space_path: Path = _VARIANCE_PRESERVING
    place: NamedSharding | None = None

    def __call__(
        self,
        weights: Any,
        images: np.ndarray,
        cond: Any,
        *,
        batch_size: int = 128,
        begun: Callable[[int], Any] = lambda batch: None,
    ) -> ValidationLoss:
        """Measures the error with these weights.

        Args:
            weights: what `model` takes.
            images: `[N, H, W, C]` in [-1, 1], N at least 2.
            cond: the condition of the images, N rows.
            batch_size: largest number of images in a batch; 128 is typical.
            begun: called with the number of each batch, from 1; what it raises ends it all.

        Raises:
            UserError: no bin is within the log-SNRs of both paths, or an error is not finite.
        """
        bounds = np.asarray(self.edges, np.float64)
        covered = _covered(self.path, bounds) & _covered(self.space_path, bounds)
        if not covered.any():
            raise UserError(
                f"no bin between log-SNR {bounds[0]:g} and {bounds[-1]:g} is within the path's "
                "range"
            )
        errors = {name: np.full((len(images), len(covered)), np.nan) for name in self.spaces}
        devices = 1 if self.place is None else self.place.num_devices
        batch_size = -(-min(batch_size, max(len(images), 1)) // devices) * devices
        for number, start in enumerate(range(0, len(images), batch_size), start=1):
            begun(number)
            # The last batch is padded, so that every batch has the shape that was compiled.
            rows = np.arange(start, start + batch_size)
            x0, own, rows = jax.tree.map(
                lambda part, rows=rows: np.take(part, rows, axis=0, mode="clip"),
                (images, cond, np.arange(len(images))),
            )
            if self.place is not None:
                x0, own, rows = spread((x0, own, rows), self.place)
            here = slice(start, min(start + batch_size, len(images)))
            for index in np.flatnonzero(covered):
                ends = bounds[index : index + 2].astype(np.float32)
                batch = to_host(self._one_bin(weights, x0, own, rows, (index, *ends)))
                for name, part in batch.items():
                    errors[name][here, index] = part[: here.stop - start]
        for name, part in errors.items():
            if not np.isfinite(part[:, covered]).all():
                raise UserError(
                    f"the model's {name} error is not finite: has its training diverged?"
                )
        return ValidationLoss(bounds, errors)

    @cached_property
    def _one_bin(self) -> Callable[..., dict[str, Array]]:
        """`(weights, x0[B, …], cond, rows[B], (number of the bin, low, high)) -> errors[B]`."""

        def draw(row: Array, index: Array, shape: tuple[int, ...]) -> tuple[Array, Array]:
            own = jax.random.fold_in(jax.random.fold_in(self.key, row), index)
            level_key, noise_key = jax.random.split(own)
            return jax.random.uniform(level_key), jax.random.normal(noise_key, shape)

        @jit
        def one_bin(
            weights: Any, x0: Array, cond: Any, rows: Array, which: tuple[Array, Array, Array]
        ) -> dict[str, Array]:
            index, low, high = which
            u, eps = jax.vmap(lambda row: draw(row, index, x0.shape[1:]))(rows)
            level = low + u * (high - low)
            t = time_of_log_snr(self.path, level)
            x_t = mix(coeffs(self.path, t, x0.ndim), Pair(x0, eps))
            wrong = jnp.square(self.model(weights)(x_t, t, cond).x0 - x0)
            error = jnp.mean(wrong, axis=tuple(range(1, x0.ndim)))
            there = coeffs(self.space_path, time_of_log_snr(self.space_path, level), ndim=1)
            factors = {name: x0_factor(there, space(there)) for name, space in self.spaces.items()}
            return {name: error / factor for name, factor in factors.items()}

        return one_bin


def loss_by_log_snr(
    predict: Predict,
    path: Path,
    images: np.ndarray,
    cond: Any,
    key: Array,
    *,
    batch_size: int = 128,
    **how: Any,
) -> ValidationLoss:
    """Measures the error of one model, as `LossByLogSNR`, whose other arguments `how` has.

    Example:
        >>> from diffjax.oracle import analytic
        >>> from diffjax.process import paths, targets
        >>> data = analytic.Gaussian(jnp.zeros(4), 0.25 * jnp.eye(4))
        >>> loss = loss_by_log_snr(
        ...     data.predict(paths.Linear()), paths.Linear(), data.draw(jax.random.key(0), 9000),
        ...     np.zeros(9000, np.int32), jax.random.key(1), spaces={"clean": targets.Clean()},
        ...     edges=(-0.01, 0.01), batch_size=9000,
        ... )
        >>> round(loss.by_bin("clean")[0].mean, 2)  # 0.25/(1 + 0.25) at log-SNR 0
        0.2
    """
    measured = LossByLogSNR(lambda _: predict, path, key, **how)
    return measured(None, images, cond, batch_size=batch_size)


def unfit(traits: Traits) -> str:
    """Why errors by log-SNR of an objective's model can't be measured; "" if they can."""
    if not traits.meaning.serves(Meaning.POSTERIOR_MEAN):
        return f"has a model of {traits.meaning}; errors by log-SNR are those of the posterior mean"
    return paired(traits)


def paired(traits: Traits) -> str:
    """Why an image and its noise can't be drawn independently of each other; "" if they can."""
    if traits.needs_source or not traits.independent_noise:
        return (
            "was trained on images paired with their noise, or with noise in between; here each "
            "image is mixed with independent noise"
        )
    return ""


def _covered(path: Path, edges: np.ndarray) -> np.ndarray:
    """Which bins are completely within a path's log-SNRs, bool `[K]`."""
    low, high = np.asarray(log_snr(path, jnp.stack([path.t_noise, path.t_min])))
    slack = 1e-3  # Rounding must not exclude a bin whose edge is the end of the path.
    return (edges[:-1] >= low - slack) & (edges[1:] <= high + slack)


def _estimate(values: np.ndarray) -> MeanError:
    return MeanError(float(np.mean(values)), float(np.std(values, ddof=1)) / math.sqrt(len(values)))


def losses_as_json(loss: ValidationLoss) -> dict[str, Any]:
    """The losses as plain data for a run's folder: bins, and for each space errors and total."""
    return {
        "log_snr_edges": loss.edges.tolist(),
        "num_images": len(next(iter(loss.errors.values()))),
        "covered": loss.covered.tolist(),
        "spaces": {
            space: {
                "by_log_snr": [one and one._asdict() for one in loss.by_bin(space)],
                "total": loss.total(space)._asdict(),
            }
            for space in loss.errors
        },
    }


def loss_table(losses: Mapping[str, ValidationLoss], space: str) -> str:
    """Formats the errors of several models in one space as text: a row per bin, a column per model.

    The last line is the mean over the bins that all models cover. Each cell is
    `mean ± standard error`.

    Args:
        losses: losses by the model's name, with the same bins.
        space: name of the space of the errors.

    Raises:
        UserError: no bin is covered by all models.
    """
    edges = next(iter(losses.values())).edges
    columns = [loss.by_bin(space) for loss in losses.values()]
    common = np.logical_and.reduce([loss.covered for loss in losses.values()])
    lines = [[f"{space} error at log-SNR", *losses]]
    for index, (low, high) in enumerate(pairwise(edges)):
        lines.append([f"{low:g} … {high:g}", *(_written(column[index]) for column in columns)])
    totals = [loss.total(space, common) for loss in losses.values()]
    lines.append([f"mean of {log_snr_range(edges, common)}", *map(_written, totals)])
    widths = [max(len(line[i]) for line in lines) for i in range(len(lines[0]))]
    return "\n".join(
        "  ".join(cell.rjust(width) for cell, width in zip(line, widths, strict=True))
        for line in lines
    )


def log_snr_range(edges: np.ndarray, bins: np.ndarray) -> str:
    """The range of adjacent bins as text.

    Example:
        >>> log_snr_range(np.array([-2.0, -1.0, 0.0, 1.0]), np.array([False, True, True]))
        '-1 … 1'
    """
    return f"{edges[:-1][bins][0]:g} … {edges[1:][bins][-1]:g}" if bins.any() else MISSING


def plot_losses(losses: Mapping[str, ValidationLoss]) -> bytes:
    """Plots the errors of several models by log-SNR as a PNG, with one panel for each space.

    Each line is a model; its band is ± two standard errors.
    """
    spaces = list(next(iter(losses.values())).errors)
    # Here, because it takes a second, and training evaluates losses without plotting them.
    import matplotlib as mpl
    from matplotlib.figure import Figure

    with mpl.rc_context(_STYLE):  # pyright: ignore[reportArgumentType]
        figure = Figure(figsize=(1.0 + 4.0 * len(spaces), 3.6), layout="constrained")
        panels = figure.subplots(1, len(spaces), squeeze=False)[0]
        for axes, space in zip(panels, spaces, strict=True):
            for name, loss in losses.items():
                inside = loss.covered
                middles = 0.5 * (loss.edges[:-1] + loss.edges[1:])[inside]
                means, errors = np.array([one for one in loss.by_bin(space) if one]).T
                (line,) = axes.plot(middles, means, marker="o", markersize=3, label=name)
                axes.fill_between(
                    middles, np.maximum(means - 2 * errors, 1e-3 * means), means + 2 * errors,
                    color=line.get_color(), alpha=0.2, linewidth=0,
                )  # fmt: skip
            axes.set(yscale="log", xlabel="log-SNR: noisy to clean", ylabel=f"{space} error")
            axes.grid(True, alpha=0.25)
        panels[0].legend(frameon=False)
        buffer = io.BytesIO()
        figure.savefig(buffer, format="png", dpi=110)
    return buffer.getvalue()


def _written(estimate: MeanError | None) -> str:
    if estimate is None:
        return MISSING
    return f"{three_digits(estimate.mean)} ± {three_digits(estimate.standard_error)}"
