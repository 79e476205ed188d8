"""Determines which targets, paths and solvers can be combined, by trying each pair."""

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from diffjax.errors import UserError
from diffjax.oracle.analytic import Gaussian, with_variance
from diffjax.process.paths import Path, Scalar
from diffjax.process.targets import Target, undecodable
from diffjax.sampling.grids import Power
from diffjax.sampling.sample import with_condition
from diffjax.sampling.solvers import Interval, Solver


@dataclass(frozen=True)
class Legality:
    """Legality of pairs: None for a legal pair, otherwise the reason why it is not legal.

    A triple of target, path and solver is legal if both pairs are.

    Attributes:
        targets: None or the reason, by `(path, target)`.
        solvers: None or the reason, by `(path, solver)`.
    """

    targets: Mapping[tuple[str, str], str | None]
    solvers: Mapping[tuple[str, str], str | None]

    def triples(self) -> list[tuple[str, str, str, str | None]]:
        """All triples as (path, target, solver, reason); the reason of a legal triple is None."""
        return [
            (path, target, solver, "; ".join(filter(None, (no_target, no_solver))) or None)
            for (path, target), no_target in self.targets.items()
            for (other, solver), no_solver in self.solvers.items()
            if path == other
        ]


def legality(
    paths: Mapping[str, Path], targets: Mapping[str, Target], solvers: Mapping[str, Solver]
) -> Legality:
    """Tries every target and every solver on every path, and returns the legality of each pair.

    Example:
        >>> from diffjax.process.paths import Linear
        >>> from diffjax.process.targets import Clean, Noise
        >>> from diffjax.sampling.solvers import euler
        >>> found = legality(
        ...     {"linear": Linear()}, {"clean": Clean(), "noise": Noise()}, {"euler": euler()}
        ... )
        >>> [(target, reason is None) for _, target, _, reason in found.triples()]
        [('clean', True), ('noise', False)]
    """
    compiled = {name: _compile(path) for name, path in paths.items()}
    return Legality(
        {
            (name, target): undecodable(path, how)
            for name, path in compiled.items()
            for target, how in targets.items()
        },
        {
            (name, solver): unwalkable(path, how)
            for name, path in compiled.items()
            for solver, how in solvers.items()
        },
    )


def unwalkable(path: Path, solver: Solver, num_steps: int = 8) -> str | None:
    """The reason why a solver can't integrate a path from `t_noise`; None if it can.

    The steps are computed with the optimal denoiser of a Gaussian on a grid that is uniform in
    time. A solver fails if a number is not finite, for example because it divides by `a = 0` at
    pure noise. Accuracy is not tested.

    Args:
        path: any path.
        solver: any solver.
        num_steps: intervals of the grid; 8 is enough.
    """
    predict = Gaussian(jnp.full(1, 0.3), jnp.full((1, 1), 0.25)).predict(path)
    # With a variance, because a learned variance depends on the network, not on the path.
    denoise = with_condition(with_variance(predict), None)
    keys = jax.random.split(jax.random.key(0), 1)
    try:
        times = solver.route(path, Power()(path, num_steps))
    except UserError as error:
        return str(error)
    x = jnp.full((1, 1), path.sigma(times[:1]))
    memory = solver.init(x)
    # A Python loop instead of `lax.scan`, so that the first bad step is known, and compiled
    # operations are shared by all paths and solvers.
    for t, t_next in pairwise(times[:-1]):
        x, memory = solver.step(denoise, Interval(path, t, t_next, keys), memory, x)
        if not np.isfinite(x).all():
            return _failed(path, t, f"the step from t={t:.4g} to t={t_next:.4g}")
    if not np.isfinite(denoise(x, times[-2]).x0).all():
        return _failed(path, times[-2], f"the last step from t={times[-2]:.4g}")
    return None


def _failed(path: Path, t: Array, step: str) -> str:
    a, s = (float(of(t[None])[0]) for of in (path.alpha, path.sigma))
    return f"{step} is not finite (alpha={a:.4g} and sigma={s:.4g} at its start)"


@dataclass(frozen=True)
class _Compiled:
    """A path with both scales in one compiled program, which saves most of the study's time."""

    both: jax.stages.Wrapped
    t_min: Scalar
    t_noise: Scalar

    def alpha(self, t: Array) -> Array:
        return self.both(t)[0]

    def sigma(self, t: Array) -> Array:
        return self.both(t)[1]


def _compile(path: Path) -> _Compiled:
    return _Compiled(jax.jit(lambda t: (path.alpha(t), path.sigma(t))), path.t_min, path.t_noise)
