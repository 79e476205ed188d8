"""Editing with a trained model: variations, inversion, inpainting, linear inverse problems.

None of it trains anything; all of it takes any solver, grid and guidance.
"""

from collections.abc import Callable
from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Float

from diffjax.errors import UserError
from diffjax.process.paths import Pair, Path, coeffs
from diffjax.process.precond import Meaning, Predict, time_of
from diffjax.sampling import solvers
from diffjax.sampling.guidance import moved
from diffjax.sampling.sample import integrate
from diffjax.sampling.solvers import Denoise, Solver
from diffjax.shapes import OneNumber, Samples, WalkTimes


def later_times(times: WalkTimes, strength: float) -> Float[Array, " left"]:
    """The part of a grid that SDEdit walks: the last `strength` of its steps.

    Start at `x = a·x0 + s·noise` with `a` and `s` at the first of them. Meng et al. 2022
    (arXiv:2108.01073).

    Args:
        times: `[n+1]` from a grid, ending in 0.
        strength: from above 0 (hardly anything changes) to 1 (nothing of the image is left).

    Raises:
        UserError: no step is left, or there are not as many.

    Example:
        >>> later_times(jnp.array([1.0, 0.75, 0.5, 0.25, 0.0]), 0.5).tolist()
        [0.5, 0.25, 0.0]
    """
    n = len(times) - 1
    if not strength <= 1.0:
        raise UserError(f"strength={strength:g} is a share of the steps: at most 1, which is all")
    kept = round(strength * n) if strength > 0 else 0
    if kept < 1:
        raise UserError(f"strength={strength:g} of {n} steps leaves none; use {1 / n:g} or more")
    return times[n - kept :]


def invert(
    denoise: Denoise, solver: Solver, path: Path, times: WalkTimes, x0: Samples
) -> tuple[Samples, Samples]:
    """The noise that the flow makes of images, and the images that it makes of that noise.

    The grid, its last step before 0 moved to `t_min`, is walked up to `t_noise` and down again by a
    deterministic solver; how far the second image is from the first says how exact that was. Song
    et al. 2021 (arXiv:2010.02502), section 5.4.

    Args:
        denoise: the model.
        solver: without fresh noise, and not one of flow maps, which lead to the data alone.
        path: the path it was trained on.
        times: `[n+1]` from a grid, ending in 0.
        x0: `[B, …]` images.

    Returns:
        `x` at `t_noise`, and the images again, `[B, …]` each.

    Raises:
        UserError: another solver.
    """
    if solver.fresh_noise or solver.needs is not Meaning.POSTERIOR_MEAN:
        raise UserError(
            "inversion walks the flow up and down again: take a solver that adds no noise and "
            "evaluates one time at once, as ddim or heun"
        )
    keys = jax.random.split(jax.random.key(0), len(x0))  # of solvers that use none
    start = jnp.asarray(path.t_min)
    up = jnp.asarray(times[:-1])[::-1].at[0].set(start)
    noise = integrate(denoise, solver, path, up, keys, path.alpha(start) * x0)
    x = integrate(denoise, solver, path, up[::-1], keys, noise)
    return noise, x / path.alpha(start)


def keep_known(solver: Solver, image: Samples, mask: Array) -> Solver:
    """A solver that puts the known part of an image back after each step, with noise to match.

    Lugmayr et al. 2022 (RePaint, arXiv:2201.09865), equation 8; `restart.resampled` around it is
    the paper's resampling. The last step, to clean data, is not the solver's: put the known part
    back once more.

    Args:
        solver: any.
        image: `[B, …]`, whose known part stays.
        mask: 1 where it is known, 0 where it is made; broadcasts against `image`.
    """
    mask = jnp.broadcast_to(mask, image.shape)

    def step(
        denoise: Denoise,
        path: Path,
        memory: object,
        x: Samples,
        t: OneNumber,
        t_next: OneNumber,
        keys: Array,
    ) -> tuple[Samples, object]:
        both = jax.vmap(jax.random.split)(keys)
        own, fresh = both[:, 0], both[:, 1]
        x, memory = solver.step(denoise, path, memory, x, t, t_next, own)
        z = solvers.normal(fresh, image.shape[1:])
        known = path.alpha(t_next) * image + path.sigma(t_next) * z
        return mask * known + (1.0 - mask) * x, memory

    return solver._replace(step=step, fresh_noise=True)


@dataclass(frozen=True)
class Observed:
    """Images that were observed through a linear operator, `y = A·x0 + noise`.

    Attributes:
        apply: `A`, `[B, …] -> [B, …]`, linear.
        y: what was observed, `[B, …]`, or one for all samples.
        gain: κ, with `A·Aᵀ = κ·I` in the basis: 1 for a mask, `1/k²` for means over `k × k` pixels.
        std: of the noise in `y`.
        basis: an orthonormal change of what was observed, and back, after which `A·Aᵀ` is diagonal.
    """

    apply: Callable[[Array], Array]
    y: Array
    gain: float | Array = 1.0
    std: float = 0.0
    basis: tuple[Callable[[Array], Array], Callable[[Array], Array]] = (jnp.asarray, jnp.asarray)


def blurred(
    image: Float[Array, " batch height width channels"], width: float, std: float = 0.02
) -> Observed:
    """Images seen through a Gaussian blur that goes round at the edges.

    `A` is diagonal in the Fourier basis, with the transform of the Gaussian, `exp(-½·width²·ω²)`.

    Args:
        image: `[B, H, W, C]`; what is seen of it is in `y`, without the noise.
        width: the Gaussian's standard deviation, in pixels.
        std: of the noise that `y` is taken to have; not 0, since the blur leaves nothing of the
            highest frequencies.

    Example:
        >>> seen = blurred(jnp.ones((1, 8, 8, 1)), width=1.0)
        >>> bool(jnp.allclose(seen.y, 1.0))
        True
    """
    frequencies = (2.0 * jnp.pi * jnp.fft.fftfreq(n) for n in image.shape[1:3])
    row, column = (jnp.exp(-0.5 * (width * omega) ** 2) for omega in frequencies)
    gaussian = (row[:, None] * column[None])[None, :, :, None]

    def to(x: Array) -> Array:
        return jnp.fft.fft2(x, axes=(1, 2), norm="ortho")

    def back(z: Array) -> Array:
        return jnp.fft.ifft2(z, axes=(1, 2), norm="ortho").real

    def apply(x: Array) -> Array:
        z = to(x)
        return back(gaussian.astype(z.dtype) * z)

    return Observed(apply, apply(image), gaussian**2, std, (to, back))


def pseudoinverse_guidance(predict: Predict, path: Path, seen: Observed) -> Predict:
    """ΠGDM: x0 and eps as they are given that `A·x0 + noise = y`.

    `∇ log p(y | x) ≈ Jᵀ·Aᵀ·(y - A·x0)/(r²·κ + std²)` with J the derivative of x0 with respect to x
    and `r² = s²/(a² + s²)`: exact where the data are standard normal. It costs a derivative through
    the network, about as much as two more evaluations. Song et al. 2023, "Pseudoinverse-guided
    diffusion models for inverse problems", equation 7.

    Args:
        predict: the model, guided or not.
        path: the path it was trained on.
        seen: the observation.
    """

    def guided(x: Array, t: Array, cond: Array | None) -> Pair:
        c = coeffs(path, time_of(t), x.ndim)
        x0, pull = jax.vjp(lambda x: predict(x, t, cond).x0, x)
        observed, transpose = jax.vjp(seen.apply, x0)
        to, back = seen.basis
        variance = c.s**2 / (c.a**2 + c.s**2) * seen.gain + seen.std**2
        missed = to(jnp.broadcast_to(seen.y, observed.shape) - observed)
        (back,) = transpose(back(missed / variance.astype(missed.dtype)))
        (score,) = pull(back)
        return moved(x, c, x0, score)

    return guided


def posterior_sampling(predict: Predict, path: Path, seen: Observed, scale: float = 1.0) -> Predict:
    """DPS: moves x0 down the gradient of the distance `|y - A·x0|`, `scale` times the noise's size.

    `score += -scale/s·∇|y - A·x0|`, whatever the operator. Chung et al. 2023 (arXiv:2209.14687),
    algorithm 1, with its step size in units of the noise.
    """

    def guided(x: Array, t: Array, cond: Array | None) -> Pair:
        c = coeffs(path, time_of(t), x.ndim)

        def distance(x: Array) -> tuple[Array, Array]:
            x0 = predict(x, t, cond).x0
            observed = seen.apply(x0)
            missed = jnp.broadcast_to(seen.y, observed.shape) - observed
            square = jnp.sum(missed**2, axis=tuple(range(1, x.ndim)))
            return jnp.sum(jnp.sqrt(square + 1e-12)), x0

        slope, x0 = jax.grad(distance, has_aux=True)(x)
        return moved(x, c, x0, -scale / c.s * slope)

    return guided
