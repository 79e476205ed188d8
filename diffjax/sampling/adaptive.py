"""Adaptive solvers, by diffrax: the length of a step depends on its error, not on the grid."""

from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from diffjax.compiling import implicit_promotion
from diffjax.errors import UserError
from diffjax.kinds import Positive
from diffjax.process.paths import Path, coeffs_at
from diffjax.sampling import sde
from diffjax.sampling.solvers import (
    Denoise,
    Interval,
    Solver,
    same_for_equal,
    velocity,
)
from diffjax.shapes import Samples


@same_for_equal
def adaptive(tolerance: Positive[float] = 1e-4, max_steps: Positive[int] = 4096) -> Solver:
    """Dormand and Prince's pair of orders 5 and 4 on the velocity, in the path's own time.

    From the grid's first time to `t_min`; the number of steps of the grid is not used. All samples
    of a batch have the same steps, which the sample with the largest error determines. So each is
    within the tolerance, and varies within it when the others change. A batch that needs more than
    `max_steps` returns NaN.
    Dormand & Prince 1980, "A family of embedded Runge–Kutta formulae"; Chen et al. 2018
    (arXiv:1806.07366).

    Args:
        tolerance: relative and absolute, per step, of a sample's root mean square; typically 1e-3
            to 1e-5. Below about 1e-6 it can't be reached in float32.
        max_steps: the largest number of steps, rejected ones included.
    """

    def step(
        denoise: Denoise, interval: Interval, memory: Array, x: Samples
    ) -> tuple[Samples, Array]:
        path, t, dt = interval.path, interval.t, interval.dt
        diffrax = import_diffrax()
        with implicit_promotion():
            solution = diffrax.diffeqsolve(
                diffrax.ODETerm(lambda t, x, _: velocity(denoise, path, x, t)),
                diffrax.Dopri5(),
                t0=t,
                t1=interval.t_next,
                dt0=0.05 * dt,
                y0=x,
                stepsize_controller=_controller(diffrax, tolerance),
                max_steps=max_steps,
                throw=False,
            )
        # Seven stages, the last of which is the first of the next step, also after a rejection.
        return _end(diffrax, solution), memory + 6 * solution.stats["num_steps"] + 1

    return Solver(_no_calls, step, nfe=None, order=5, route=_in_one)


@same_for_equal
def adaptive_sde(
    diffusion: sde.Diffusion = sde.NoiseScale(),
    tolerance: Positive[float] = 1e-2,
    max_steps: Positive[int] = 4096,
) -> Solver:
    """The reverse SDE by diffrax's ShARK, a pair for noise that does not depend on x.

    The steps are chosen as in `adaptive`. Each sample has its own Brownian path, which is the same
    for a repeated step. Foster et al. 2023 (arXiv:2305.17216);
    Jolicoeur-Martineau et al. 2021 (arXiv:2105.14080) for the idea.

    Args:
        diffusion: as in `sde.euler_maruyama`.
        tolerance: as in `adaptive`; typically 1e-2.
        max_steps: the largest number of steps, rejected ones included.
    """

    def step(
        denoise: Denoise, interval: Interval, memory: Array, x: Samples
    ) -> tuple[Samples, Array]:
        import lineax  # of diffrax's own dependencies

        diffrax = import_diffrax()
        path, t = interval.path, interval.t
        # Diffrax's Brownian motion runs forward: its time is the time since t.
        span = t - interval.t_next

        def drift(passed: Array, x: Array, _: Any) -> Array:
            return -sde.drift(denoise, path, diffusion, x, t - passed)

        def spread(passed: Array, x: Array, _: Any) -> Any:
            w = diffusion(coeffs_at(path, t - passed))
            return lineax.DiagonalLinearOperator(jnp.sqrt(w) * jnp.ones_like(x))

        motion = _brownian(diffrax, span, x, interval.keys)
        with implicit_promotion():
            solution = diffrax.diffeqsolve(
                diffrax.MultiTerm(diffrax.ODETerm(drift), diffrax.ControlTerm(spread, motion)),
                diffrax.ShARK(),
                t0=0.0,
                t1=span,
                dt0=0.05 * span,
                y0=x,
                stepsize_controller=_controller(diffrax, tolerance),
                max_steps=max_steps,
                throw=False,
            )
        return _end(diffrax, solution), memory + 2 * solution.stats["num_steps"]

    return Solver(_no_calls, step, nfe=None, order=1, fresh_noise=True, route=_in_one)


def import_diffrax() -> Any:
    """The library, or an error that names the command that installs it.

    Raises:
        UserError: it is not installed.
    """
    try:
        import diffrax  # an extra: only adaptive steps need it
    except ImportError as error:
        raise UserError(
            "adaptive steps need diffrax: pip install 'diffjax[adaptive]', or use a fixed number"
        ) from error
    return diffrax


def largest_root_mean_square(x: Array) -> Array:
    """The largest root mean square of the samples `[B, …]`: each is within the tolerance then."""
    return jnp.sqrt(jnp.max(jnp.mean(jnp.square(x.reshape(len(x), -1)), axis=1)))


def _controller(diffrax: Any, tolerance: float) -> Any:
    return diffrax.PIDController(rtol=tolerance, atol=tolerance, norm=largest_root_mean_square)


def _end(diffrax: Any, solution: Any) -> Array:
    done = solution.result == diffrax.RESULTS.successful
    return jnp.where(done, solution.ys[-1], jnp.nan)


def _no_calls(x: Array) -> Array:
    del x
    return jnp.zeros((), jnp.int32)


def _in_one(path: Path, times: Array) -> Array:
    import_diffrax()  # an error before anything is compiled, if it is missing
    return jnp.stack([times[0], jnp.asarray(path.t_min, times.dtype), times[-1]])


def _brownian(diffrax: Any, span: Array, x: Array, keys: Array) -> Any:
    """Motions of `[B, …]` over the time `span`, each row from its own key."""

    class PerSample(diffrax.AbstractBrownianPath):
        keys: Array
        t0: Array
        t1: Array
        levy_area: Any = diffrax.SpaceTimeLevyArea

        def evaluate(
            self, t0: Any, t1: Any = None, left: bool = True, use_levy: bool = False
        ) -> Any:
            def one(key: Array) -> Any:
                tree = diffrax.VirtualBrownianTree(
                    self.t0, self.t1, tol=1e-4 * self.t1, shape=x.shape[1:], key=key,
                    levy_area=diffrax.SpaceTimeLevyArea,
                )  # fmt: skip
                return tree.evaluate(t0, t1, left, use_levy)

            return jax.vmap(one, out_axes=0)(self.keys)

    return PerSample(keys, jnp.zeros_like(span), span)
