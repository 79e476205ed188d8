"""Final loss over the learning rate, for several widths of a transformer, with and without muP."""

import io
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import matplotlib as mpl
import numpy as np
from jax import Array
from matplotlib.figure import Figure
from ml_collections import ConfigDict

from diffjax.compiling import jit
from diffjax.data import DataSet, all_images
from diffjax.errors import UserError
from diffjax.optimizers.base import Optimizer
from diffjax.optimizers.mup import by_width
from diffjax.spec import build
from diffjax.training.averages import Averages
from diffjax.training.state import init_state
from diffjax.training.step import StepSettings, make_train_step
from diffjax.wiring import Wired, wire

_STYLE = {"font.size": 9, "axes.spines.top": False, "axes.spines.right": False}


@dataclass(frozen=True)
class Losses:
    """Final losses of one network at several learning rates.

    Attributes:
        width: the width of its tokens.
        mup: whether its rates are muP's.
        rates: learning rates, ascending.
        losses: `[rates, seeds]`, means over the last tenth of the steps; NaN where training
            diverged.
    """

    width: int
    mup: bool
    rates: tuple[float, ...]
    losses: np.ndarray

    @property
    def best_rate(self) -> float:
        """The rate with the lowest mean loss; NaN where all diverged."""
        means = np.where(np.isfinite(self.losses).all(1), self.losses.mean(1), np.inf)
        return self.rates[int(np.argmin(means))] if np.isfinite(means).any() else float("nan")


def of_width(config: ConfigDict, width: int, base_width: int) -> ConfigDict:
    """A config with another width of its transformer, whose heads grow with it.

    Args:
        config: the config of a `DiT` or one of its kind.
        width: `hidden_size`.
        base_width: that for muP; 0 without.

    Raises:
        UserError: the network is no such transformer.

    Example:
        >>> from configs import digits
        >>> model = of_width(digits.get_config(), 128, 32).model
        >>> model.hidden_size, model.num_heads, model.base_width, model.base_head_width
        (128, 2, 32, 16)
    """
    changed = ConfigDict(config.to_dict())
    if "base_width" not in changed.model:
        raise UserError(f"{config.model._target_} is no transformer with muP: take model=dit")
    heads = changed.model.num_heads
    changed.model.update(
        hidden_size=width, base_width=base_width, base_head_width=base_width // heads
    )
    return changed


def final_losses(
    config: ConfigDict, dataset: DataSet, rates: Sequence[float], num_seeds: int
) -> np.ndarray:
    """Trains a network once for each learning rate and seed.

    All trainings of a seed have the same initial weights, batches and noise. Weights are not
    averaged, and nothing is stored.

    Args:
        config: the config of the training, whose `optimizer.learning_rate` is replaced.
        dataset: that of the config, small enough for memory.
        rates: learning rates.
        num_seeds: seeds 0, 1, ….

    Returns:
        `[rates, seeds]`: means of the training loss over the last tenth of the steps.

    Raises:
        UserError: parts that do not fit together, or that take more than images and classes.
    """
    wired = wire(config, dataset.image_shape, dataset.condition)
    further = sorted(wired.batch_shapes(1).keys() - {"image", "label"})
    if further:
        raise UserError(
            "this study trains on images and their classes alone, and this config takes "
            f"{', '.join(further)} too"
        )
    images, labels = all_images(dataset.train)
    # One program for all rates and seeds; data are arguments, so that they are no constants of it.
    program = jit(_training(config, wired))
    found = [
        [
            program(jax.random.key(seed), jnp.float32(rate), images, labels)
            for seed in range(num_seeds)
        ]
        for rate in rates
    ]
    return np.asarray(found, np.float64)


def _training(config: ConfigDict, wired: Wired) -> Callable[..., Array]:
    num_steps, factors = config.num_steps, wired.rate_factors

    def optimizer_of(rate: Array) -> Optimizer:
        settings = {**config.optimizer.to_dict(), "learning_rate": rate}
        optimizer = build(settings, Optimizer, "config.optimizer", num_steps=num_steps)
        return optimizer if factors is None else by_width(optimizer, factors)

    def train(key: Array, rate: Array, images: Array, labels: Array) -> Array:
        optimizer, (init_key, batch_key) = optimizer_of(rate), jax.random.split(key)
        step = make_train_step(
            wired.apply,
            wired.objective,
            optimizer,
            StepSettings(
                num_steps=num_steps,
                condition=wired.condition,
                condition_dropout=wired.condition_dropout,
            ),
        )

        def one(state: Any, number: Array) -> tuple[Any, Array]:
            rows = jax.random.randint(
                jax.random.fold_in(batch_key, number), (config.batch_size,), 0, len(images)
            )
            state, metrics = step(state, key, {"image": images[rows], "label": labels[rows]})
            return state, metrics["loss"]

        memory = wired.objective.init_memory()
        state = init_state(wired.init(init_key), optimizer, Averages(), memory)
        _, losses = jax.lax.scan(one, state, jnp.arange(num_steps))
        return jnp.mean(losses[-max(num_steps // 10, 1) :])

    return train


def table(found: Sequence[Losses]) -> str:
    """The best rate and its loss of each network, as Markdown."""
    rows = [
        "| width | parametrisation | best rate | its loss, mean of seeds |",
        "|---|---|---|---|",
    ]
    for one in found:
        best = one.best_rate
        loss = np.nan if np.isnan(best) else one.losses[one.rates.index(best)].mean()
        name = "muP" if one.mup else "standard"
        rows.append(f"| {one.width} | {name} | {best:.3g} | {loss:.4f} |")
    return "\n".join(rows) + "\n"


def plot(found: Sequence[Losses]) -> bytes:
    """Final loss over learning rate as a PNG, the standard parametrisation beside muP.

    A line is the mean over seeds, a band their range, and a dot the lowest mean.
    """
    panels: Mapping[str, bool] = {"standard parametrisation": False, "muP": True}
    widths = sorted({one.width for one in found})
    with mpl.rc_context(_STYLE):  # pyright: ignore[reportArgumentType]
        figure = Figure(figsize=(10.0, 4.2), layout="constrained")
        columns = figure.subplots(1, len(panels), sharey=True)
        for axes, (title, mup) in zip(columns, panels.items(), strict=True):
            for one in (one for one in found if one.mup is mup):
                color = mpl.colormaps["viridis"](widths.index(one.width) / max(len(widths), 1))
                means = one.losses.mean(1)
                axes.plot(one.rates, means, color=color, label=f"width {one.width}")
                axes.fill_between(
                    one.rates, one.losses.min(1), one.losses.max(1), color=color, alpha=0.2
                )
                if one.best_rate in one.rates:
                    axes.plot(one.best_rate, means[one.rates.index(one.best_rate)], "o", c=color)
            axes.set(xscale="log", yscale="log", title=title, xlabel="learning rate")
            axes.grid(True, which="both", alpha=0.2)
            axes.legend(frameon=False)
        lowest = min(np.nanmin(one.losses) for one in found)
        columns[0].set_ylim(0.97 * lowest, 3 * lowest)
        columns[0].set_ylabel("training loss, mean of the last tenth of the steps")
        buffer = io.BytesIO()
        figure.savefig(buffer, format="png", dpi=120)
    return buffer.getvalue()
