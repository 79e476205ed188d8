"""Editing with a trained model: variations, inversion, inpainting, linear inverse problems.

Nothing is trained, and any solver, grid and guidance can be used.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace

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
from diffjax.sampling.solvers import Denoise, Interval, Solver
from diffjax.shapes import Samples, WalkTimes


def later_times(times: WalkTimes, strength: float) -> Float[Array, " left"]:
    """The part of a grid that SDEdit walks: a share `strength` of its steps, the last ones.

    Start from `x = a·x0 + s·noise` with `a` and `s` at the first of them. Meng et al. 2022
    (arXiv:2108.01073).

    Args:
        times: `[n+1]` from a grid, ending in 0.
        strength: in (0, 1]: small values change the image little, at 1 nothing of it is left;
            typically 0.3 to 0.8.

    Raises:
        UserError: no step is left, or `strength` is above 1.

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
    """The noise that the flow maps images to, and the images that it maps this noise to.

    A deterministic solver walks the grid, with its last time before 0 moved to `t_min`, up to
    `t_noise` and down again. The difference of the two images measures the error of the inversion.
    Song et al. 2021 (arXiv:2010.02502), section 5.4.

    Args:
        denoise: the model.
        solver: without fresh noise, and not one for flow maps, which only lead to the data.
        path: the path it was trained on.
        times: `[n+1]` from a grid, ending in 0.
        x0: `[B, …]` images.

    Returns:
        `x` at `t_noise`, and the images again, `[B, …]` each.

    Raises:
        UserError: the solver adds noise, or is for flow maps.
    """
    if solver.fresh_noise or solver.needs is not Meaning.POSTERIOR_MEAN:
        raise UserError(
            "inversion walks the flow up and down again: use a solver that adds no noise and "
            "evaluates one time at once, such as ddim or heun"
        )
    keys = jax.random.split(jax.random.key(0), len(x0))  # of solvers that use none
    start = jnp.asarray(path.t_min)
    up = jnp.asarray(times[:-1])[::-1].at[0].set(start)
    noise = integrate(denoise, solver, path, up, keys, path.alpha(start) * x0)
    x = integrate(denoise, solver, path, up[::-1], keys, noise)
    return noise, x / path.alpha(start)


def keep_known(solver: Solver, image: Samples, mask: Array, noise: Samples | None = None) -> Solver:
    """A solver that replaces the known part of an image after each step, with matching noise.

        x' ← mask·(a'·image + s'·z) + (1 - mask)·x'

    Lugmayr et al. 2022 (RePaint, arXiv:2201.09865), equation 8; `restart.resampled` around it is
    the paper's resampling. The last step, to clean data, is not one of the solver's: replace the
    known part once more after it.

    Args:
        solver: any.
        image: `[B, …]`, with the known part.
        mask: 1 where it is known, 0 where it is generated; broadcasts against `image`.
        noise: z, `[B, …]`, the same in each step; None for fresh noise. In diffusers it is the
            noise that sampling starts from, so the known part moves on a straight line to the
            image.
    """
    mask = jnp.broadcast_to(mask, image.shape)

    def step(
        denoise: Denoise, interval: Interval, memory: object, x: Samples
    ) -> tuple[Samples, object]:
        z = noise
        if z is None:
            both = jax.vmap(jax.random.split)(interval.keys)
            interval = replace(interval, keys=both[:, 0])
            z = solvers.normal(both[:, 1], image.shape[1:])
        x, memory = solver.step(denoise, interval, memory, x)
        known = interval.end.mix(Pair(image, z))
        return mask * known + (1.0 - mask) * x, memory

    return solver._replace(step=step, fresh_noise=solver.fresh_noise or noise is None)


@dataclass(frozen=True)
class Observed:
    """The observation of a linear inverse problem, `y = A·x0 + noise`.

    Attributes:
        apply: `A`, `[B, …] -> [B, …]`, linear.
        y: the observation, `[B, …]`, or one for all samples.
        gain: κ, with `A·Aᵀ = κ·I` in the basis: 1 for a mask, `1/k²` for means over `k × k` pixels.
        std: the standard deviation of the noise in `y`.
        basis: the transform of observations to an orthonormal basis in which `A·Aᵀ` is diagonal,
            and its inverse; the identity by default.
    """

    apply: Callable[[Array], Array]
    y: Array
    gain: float | Array = 1.0
    std: float = 0.0
    basis: tuple[Callable[[Array], Array], Callable[[Array], Array]] = (jnp.asarray, jnp.asarray)


def blurred(
    image: Float[Array, " batch height width channels"], width: float, std: float = 0.02
) -> Observed:
    """Images observed through a Gaussian blur that is periodic at the edges.

    `A` is diagonal in the Fourier basis, with the transform of the Gaussian, `exp(-½·width²·ω²)`.

    Args:
        image: `[B, H, W, C]`; `y` is this image blurred, without noise.
        width: the Gaussian's standard deviation, in pixels.
        std: the standard deviation that the noise in `y` is assumed to have; not 0, since the blur
            removes the highest frequencies.

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
    """ΠGDM: the prediction given that `A·x0 + noise = y`.

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
    """DPS: moves x0 down the gradient of the distance `|y - A·x0|`.

        score ← score - scale/s·∇|y - A·x0|

    for any operator. Chung et al. 2023 (arXiv:2209.14687), algorithm 1, with its step size in units
    of the noise.

    Args:
        predict: the model, guided or not.
        path: the path it was trained on.
        seen: the observation.
        scale: the step size; typically 0.3 to 1.
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
