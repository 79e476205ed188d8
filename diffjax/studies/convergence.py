"""Measures the convergence of solvers on data whose exact flow is known."""

import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import jax
import jax.numpy as jnp
import matplotlib as mpl
import numpy as np
from jax import Array
from matplotlib.figure import Figure

from diffjax.errors import UserError
from diffjax.evaluation.tables import three_digits
from diffjax.oracle.analytic import GaussianMixture, with_variance
from diffjax.process.paths import Pair, Path, coeffs, mix
from diffjax.sampling.grids import Grid
from diffjax.sampling.sample import Recipe, sample, with_condition
from diffjax.sampling.solvers import Solver

# For the moments of stochastic solvers; the standard error of a variance of 1 is √(2/n) = 0.4 %.
_NUM_DRAWS = 100_000
_MARKERS = "os^vD<>ph*XPd8+x"
_STYLE = {"font.size": 9, "axes.spines.top": False, "axes.spines.right": False}


@dataclass(frozen=True)
class Convergence:
    """The error of a solver for several numbers of network evaluations.

    Attributes:
        solver: the solver.
        nfe: network evaluations per sample, ascending.
        errors: median over samples of the distance from the end of the exact flow. Stochastic
            solvers have no exact trajectory; their error is the largest error of the samples' mean
            and covariance.
    """

    solver: Solver
    nfe: tuple[int, ...]
    errors: tuple[float, ...]

    def error_at(self, nfe: int) -> float | None:
        """The error with the most steps that cost at most `nfe` evaluations; None if none does."""
        within = [i for i, cost in enumerate(self.nfe) if cost <= nfe]
        return self.errors[within[-1]] if within else None


def mixture_of_four() -> GaussianMixture:
    """The data of the comparison: four Gaussians in the plane with different weights and shapes."""
    return GaussianMixture(
        jnp.array([0.4, 0.3, 0.2, 0.1]),
        jnp.array([[0.9, 0.6], [-0.8, 0.7], [-0.5, -0.9], [0.7, -0.8]]),
        jnp.array([[[0.04, 0.0], [0.0, 0.02]]]) * jnp.array([1.0, 0.5, 0.8, 2.0])[:, None, None],
    )


def convergence(
    data: GaussianMixture,
    path: Path,
    solvers: Mapping[str, Solver],
    grid: Grid,
    budgets: Sequence[int],
    num_samples: int = 256,
) -> dict[str, Convergence]:
    """Samples with each solver and each budget of evaluations, and measures the error.

    Args:
        data: a mixture, whose exact denoiser is the model and whose flow is known.
        path: the path from data to noise.
        solvers: solvers by name.
        grid: the time grid.
        budgets: network evaluations per sample; each solver takes as many steps as fit.
        num_samples: number of trajectories for deterministic solvers; 256 is typical.

    Example:
        >>> from diffjax.process.paths import Linear
        >>> from diffjax.sampling.grids import Power
        >>> from diffjax.sampling.solvers import heun
        >>> found = convergence(
        ...     mixture_of_four(), Linear(), {"heun": heun()}, Power(), (9, 41), num_samples=16
        ... )["heun"]
        >>> found.nfe, found.errors[1] < found.errors[0] / 8
        ((9, 41), True)
    """
    # With a variance, for the solver that needs a learned one.
    denoise = with_condition(with_variance(data.predict(path)), None)
    noise = jax.random.normal(jax.random.key(0), (num_samples, 2))
    x = path.sigma(jnp.asarray(path.t_noise)) * noise
    exact = data.flow(path, x, path.t_noise, 0.0)
    # Starts from the exact distribution, so that only the solver contributes to the error.
    start = coeffs(path, jnp.full(_NUM_DRAWS, path.t_noise), 2)
    eps = jax.random.normal(jax.random.key(3), (_NUM_DRAWS, 2))
    many = Pair(data.draw(jax.random.key(2), _NUM_DRAWS), eps)
    moments = _moments(data)

    def ends(solver: Solver, num_steps: int, x: Array) -> Array:
        times = Recipe(solver, grid, num_steps).times(path)
        walk = jax.jit(partial(sample, denoise, solver, path, times))
        return walk(jax.random.split(jax.random.key(1), len(x)), x)

    def error(solver: Solver, num_steps: int) -> float:
        if not solver.fresh_noise:
            wrong = np.linalg.norm(ends(solver, num_steps, x) - exact, axis=1)
            # The median, because a few samples that end in another mode would dominate a mean.
            return float(np.median(wrong))
        drawn = np.asarray(ends(solver, num_steps, mix(start, many)), np.float64)
        found = np.concatenate([drawn.mean(0), np.cov(drawn.T).ravel()])
        return float(np.abs(found - moments).max())

    def one(solver: Solver) -> Convergence:
        if solver.nfe is None:
            raise UserError(
                "a solver that chooses its own steps has no error for a given number of steps"
            )
        # The last step costs one evaluation with every solver.
        steps = sorted({1 + (budget - 1) // solver.nfe for budget in budgets})
        nfe = tuple(solver.steps(n - 1) * solver.nfe + 1 for n in steps)
        return Convergence(solver, nfe, tuple(error(solver, n) for n in steps))

    return {name: one(solver) for name, solver in solvers.items()}


def _moments(data: GaussianMixture) -> np.ndarray:
    """Mean and covariance of a mixture, concatenated."""
    weights, means = np.asarray(data.weights, np.float64), np.asarray(data.means, np.float64)
    mean = weights @ means
    centred = means - mean
    covariance = np.einsum("k,kij->ij", weights, np.asarray(data.covariances, np.float64))
    covariance += np.einsum("k,ki,kj->ij", weights, centred, centred)
    return np.concatenate([mean, covariance.ravel()])


def convergence_table(found: Mapping[str, Convergence], budgets: Sequence[int]) -> str:
    """Formats a Markdown table: order, cost, and the error within each budget of evaluations."""
    heads = ["solver", "order", "evaluations a step", *(f"error at NFE {b}" for b in budgets)]
    lines = [heads, ["---"] * len(heads)]
    for name, one in found.items():
        kind = f"{one.solver.order}{' (weak)' if one.solver.fresh_noise else ''}"
        errors = [three_digits(one.error_at(budget)) for budget in budgets]
        lines.append([f"`{name}`", kind, str(one.solver.nfe), *errors])
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def convergence_plot(found: Mapping[str, Convergence]) -> bytes:
    """Plots error against evaluations as a PNG: single-step, multi-stage and stochastic solvers."""
    panels = {
        "one evaluation a step": lambda solver: not solver.fresh_noise and solver.nfe == 1,
        "several evaluations a step": lambda solver: not solver.fresh_noise and solver.nfe > 1,
        "fresh noise": lambda solver: solver.fresh_noise,
    }
    with mpl.rc_context(_STYLE):  # pyright: ignore[reportArgumentType]
        figure = Figure(figsize=(13.5, 6.0), layout="constrained")
        columns = figure.subplots(1, len(panels))
        columns[1].sharey(columns[0])
        for axes, (title, belongs) in zip(columns, panels.items(), strict=True):
            drawn = {name: one for name, one in found.items() if belongs(one.solver)}
            for index, (name, one) in enumerate(drawn.items()):
                axes.plot(
                    one.nfe, one.errors, color=mpl.colormaps["tab20"](index % 20),
                    marker=_MARKERS[index % len(_MARKERS)], markersize=4, linewidth=1.2,
                    label=f"{name}, order {one.solver.order}",
                )  # fmt: skip
            axes.set(xscale="log", yscale="log", title=title, xlabel="evaluations per sample")
            axes.grid(True, which="both", alpha=0.2)
            axes.legend(
                frameon=False, fontsize=8, ncol=2, loc="upper center", bbox_to_anchor=(0.5, -0.12)
            )
        columns[0].set_ylabel("median distance from the exact end")
        columns[2].set_ylabel("largest error of mean and covariance")
        buffer = io.BytesIO()
        figure.savefig(buffer, format="png", dpi=120)
    return buffer.getvalue()
