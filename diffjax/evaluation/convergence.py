"""How fast solvers converge, where the exact solution is known."""

import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import matplotlib as mpl
import numpy as np
from jax import Array
from matplotlib.figure import Figure

from diffjax.errors import UserError
from diffjax.evaluation.tables import measure
from diffjax.process.analytic import GaussianMixture
from diffjax.process.paths import Pair, Path
from diffjax.sampling.grids import Grid
from diffjax.sampling.sample import Recipe, sample
from diffjax.sampling.solvers import Solver

_MARKERS = "os^vD<>ph*XPd8+x"
_STYLE = {"font.size": 9, "axes.spines.top": False, "axes.spines.right": False}


@dataclass(frozen=True)
class Convergence:
    """The error of a solver, from noise to data.

    Attributes:
        solver: that it is of.
        nfe: network evaluations per sample, rising.
        errors: median distance from where the exact flow ends, over samples; None for solvers
            with fresh noise, which have no trajectory to compare.
    """

    solver: Solver
    nfe: tuple[int, ...]
    errors: tuple[float, ...] | None

    def error_at(self, nfe: int) -> float | None:
        """With the most steps that cost no more than so many evaluations, if there are any."""
        within = [i for i, cost in enumerate(self.nfe) if cost <= nfe]
        return self.errors[within[-1]] if self.errors and within else None


def mixture_of_four() -> GaussianMixture:
    """Four Gaussians in the plane, unlike in weight and shape: the data of the comparison."""
    return GaussianMixture(
        jnp.array([0.4, 0.3, 0.2, 0.1]),
        jnp.array([[0.9, 0.6], [-0.8, 0.7], [-0.5, -0.9], [0.7, -0.8]]),
        jnp.array([[0.04, 0.0], [0.0, 0.02]]) * jnp.array([1.0, 0.5, 0.8, 2.0])[:, None, None],
    )


def convergence(
    data: GaussianMixture,
    path: Path,
    solvers: Mapping[str, Solver],
    grid: Grid,
    budgets: Sequence[int],
    num_samples: int = 256,
) -> dict[str, Convergence]:
    """Walks from noise to data with each solver and each budget of evaluations.

    Args:
        data: whose best denoiser is the model, and whose flow is known.
        path: from data to noise.
        solvers: by name.
        grid: where they step.
        budgets: network evaluations per sample; each solver takes as many steps as they allow.
        num_samples: trajectories.

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
    predict = data.predict(path)

    def denoise(x: Array, t: Array) -> Pair:
        return predict(x, jnp.full(len(x), t), None)

    noise = jax.random.normal(jax.random.key(0), (num_samples, 2))
    x = path.sigma(jnp.asarray(path.t_noise)) * noise
    exact = data.flow(path, x, path.t_noise, 0.0)

    keys = jax.random.split(jax.random.key(1), num_samples)

    def ends(solver: Solver, num_steps: int) -> Array:
        times = Recipe(solver, grid, num_steps).times(path)
        return jax.jit(lambda keys: sample(denoise, solver, path, times, keys, x))(keys)

    def one(solver: Solver) -> Convergence:
        if solver.nfe is None:
            raise UserError("a solver that chooses its own steps has no error for a given number")
        # The last step costs one evaluation, whatever the solver.
        steps = sorted({1 + (budget - 1) // solver.nfe for budget in budgets})
        nfe = tuple(solver.steps(n - 1) * solver.nfe + 1 for n in steps)
        if solver.fresh_noise:
            return Convergence(solver, nfe, None)
        # The median: a few trajectories that end in another mode would be all there is to a mean.
        wrong = (np.linalg.norm(ends(solver, n) - exact, axis=1) for n in steps)
        return Convergence(solver, nfe, tuple(float(np.median(distance)) for distance in wrong))

    return {name: one(solver) for name, solver in solvers.items()}


def convergence_table(found: Mapping[str, Convergence], budgets: Sequence[int]) -> str:
    """A Markdown table: order, cost, and the error within each budget of evaluations."""
    heads = ["solver", "order", "evaluations a step", *(f"error at NFE {b}" for b in budgets)]
    lines = [heads, ["---"] * len(heads)]
    for name, one in found.items():
        kind = f"{one.solver.order}" if one.errors else f"{one.solver.order} (weak)"
        errors = [measure(one.error_at(budget)) for budget in budgets]
        lines.append([f"`{name}`", kind, str(one.solver.nfe), *errors])
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def convergence_plot(found: Mapping[str, Convergence]) -> bytes:
    """Error against evaluations as a PNG: solvers of one evaluation a step, and the others."""
    panels = {
        "one evaluation a step": lambda solver: solver.nfe == 1,
        "several evaluations a step": lambda solver: solver.nfe > 1,
    }
    with mpl.rc_context(_STYLE):  # pyright: ignore[reportArgumentType]
        figure = Figure(figsize=(10.5, 4.6), layout="constrained")
        for axes, (title, belongs) in zip(
            figure.subplots(1, 2, sharey=True), panels.items(), strict=True
        ):
            drawn = {n: one for n, one in found.items() if one.errors and belongs(one.solver)}
            for index, (name, one) in enumerate(drawn.items()):
                axes.plot(
                    one.nfe, one.errors, color=mpl.colormaps["tab20"](index % 20),
                    marker=_MARKERS[index % len(_MARKERS)], markersize=4, linewidth=1.2,
                    label=f"{name}, order {one.solver.order}",
                )  # fmt: skip
            axes.set(xscale="log", yscale="log", title=title, xlabel="evaluations per sample")
            axes.grid(True, which="both", alpha=0.2)
            axes.legend(frameon=False, fontsize=7.5, loc="lower left")
        figure.axes[0].set_ylabel("median distance from the exact end")
        buffer = io.BytesIO()
        figure.savefig(buffer, format="png", dpi=120)
    return buffer.getvalue()
