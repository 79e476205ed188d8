"""Networks on pictures without edges, which continue at the opposite side: textures that tile."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import Array

from diffjax.models.layers.context import Enlarged
from diffjax.models.layers.magnitude import MPConv

AXES: Mapping[str, tuple[int, ...]] = {"both": (1, 2), "x": (2,), "y": (1,)}
"""The axes of `[B, H, W, C]` along which a picture has no edge: `x` is from left to right."""


@contextmanager
def circular(axes: str) -> Iterator[None]:
    """Convolutions of networks that are evaluated in this context see maps that wrap around.

    What a layer pads is the opposite side of its map in the place of zeros. A network of
    convolutions, norms over the whole map and attention without positions then commutes with rolls
    of its input, `f(roll(x)) = roll(f(x))`, by whole elements of its smallest map. Each map is
    evaluated with its margin, so a map of n×n costs as one of (n+2)×(n+2) for a layer of 3×3.

    Args:
        axes: a name in `AXES`.

    Example:
        >>> layer, x = nn.Conv(1, (3, 3)), jnp.arange(16.0).reshape(1, 4, 4, 1)
        >>> params = layer.init(jax.random.key(0), x)
        >>> with circular("both"):
        ...     y, rolled = layer.apply(params, x), layer.apply(params, jnp.roll(x, 1, 2))
        >>> bool(jnp.allclose(jnp.roll(y, 1, 2), rolled, atol=1e-5))
        True
    """

    def wrapped(
        call: Callable[..., Any], args: tuple, kwargs: dict, context: nn.module.InterceptorContext
    ) -> Any:
        layer = context.module
        if context.method_name != "__call__" or not isinstance(layer, nn.Conv | MPConv | Enlarged):
            return call(*args, **kwargs)
        x, *others = args
        reach = _reach(layer, x)
        margins = [
            _whole_steps(pads, step) if axis in AXES[axes] else (0, 0)
            for axis, (pads, step, _) in enumerate(reach, start=1)
        ]
        if not any(map(any, margins)):
            return call(*args, **kwargs)
        out = call(jnp.pad(x, [(0, 0), *margins, (0, 0)], mode="wrap"), *others, **kwargs)
        for axis, (margin, (_, step, factor)) in enumerate(zip(margins, reach, strict=True), 1):
            first, rest = (n * factor // step for n in margin)
            out = jax.lax.slice_in_dim(out, first, out.shape[axis] - rest, axis=axis)
        return out

    with nn.intercept_methods(wrapped):
        yield


def seamless(apply: Callable[..., Any], axes: str, shift_equivariant: bool) -> Callable[..., Any]:
    """A network as a function of pictures that wrap around.

    Its convolutions are `circular`. A network that depends on positions, as transformers do, is
    also evaluated on its input rolled by a random distance, and its output is rolled back:

        f(x, t) = roll⁻¹(network(roll(x), t)),    the distance a random function of the noise label

    So the edge is elsewhere in each evaluation, and the next one removes what it left. That costs
    nothing but the rolls. Images of the condition are rolled with the input.

    Args:
        apply: `(params, x[B, H, W, C], noise_label, condition) -> ` an array like x.
        axes: a name in `AXES`.
        shift_equivariant: whether the network commutes with rolls if its convolutions are circular,
            so that none are needed.
    """

    def wrapped(params: Any, x: Array, noise_label: Array, cond: Any, **how: Any) -> Array:
        with circular(axes):
            if shift_equivariant:
                return apply(params, x, noise_label, cond, **how)
            cells = _cells(x, cond)
            shifts = _shifts(noise_label, cells, axes)

            def moved(leaf: Any) -> Any:
                if jnp.ndim(leaf) != 4:
                    return leaf
                steps = [leaf.shape[axis] // n for axis, n in enumerate(cells, start=1)]
                return _rolled(leaf, shifts * jnp.array(steps)[None])

            out = apply(params, moved(x), noise_label, jax.tree.map(moved, cond), **how)
            steps = [out.shape[axis] // n for axis, n in enumerate(cells, start=1)]
            return _rolled(out, -shifts * jnp.array(steps)[None])

    inner = getattr(apply, "__wrapped__", None)
    if inner is not None:  # So that `inspect.unwrap` returns the seamless network without a mesh.
        wrapped.__wrapped__ = seamless(inner, axes, shift_equivariant)
    return wrapped


def _cells(x: Array, cond: Any) -> tuple[int, int]:
    """Rows and columns of the smallest image that is to be rolled by whole pixels."""
    images = [x, *(leaf for leaf in jax.tree.leaves(cond) if jnp.ndim(leaf) == 4)]
    return min(image.shape[1] for image in images), min(image.shape[2] for image in images)


def _shifts(noise_label: Array, cells: tuple[int, int], axes: str) -> Array:
    """How far each example is rolled, `[B, 2]`, in pixels of the smallest image."""
    label = noise_label.reshape(noise_label.shape[0], -1)[:, 0].astype(jnp.float32)
    bits = jax.lax.bitcast_convert_type(label, jnp.uint32)
    keys = jax.vmap(jax.random.fold_in, (None, 0))(jax.random.key(0), bits)
    most = jnp.array([n if axis in AXES[axes] else 1 for axis, n in enumerate(cells, start=1)])
    return jax.vmap(lambda key: jax.random.randint(key, (2,), 0, most))(keys)


def _rolled(images: Array, shifts: Array) -> Array:
    return jax.vmap(lambda image, shift: jnp.roll(image, shift, (0, 1)))(images, shifts)


def _reach(layer: Any, x: Array) -> list[tuple[tuple[int, int], int, int]]:
    """What a layer pads before and after, its stride and its enlargement, by height and width."""
    if isinstance(layer, Enlarged):
        return [((1, 1), 1, factor) for factor in layer.factors]
    if isinstance(layer, MPConv):
        return [((1, 1), 1, 1)] * 2
    strides, padding = _of_both(layer.strides or 1), layer.padding
    if isinstance(padding, str):
        dilations = _of_both(layer.kernel_dilation or 1)
        sizes = zip(_of_both(layer.kernel_size), dilations, strict=True)
        kernel = [(size - 1) * dilation + 1 for size, dilation in sizes]
        padding = "VALID" if padding == "CIRCULAR" else padding  # Flax wraps that itself.
        padding = jax.lax.padtype_to_pads(x.shape[1:3], kernel, strides, padding)
    pads = [_of_both(side) for side in _of_both(padding)]
    return [((pad[0], pad[1]), step, 1) for pad, step in zip(pads, strides, strict=True)]


def _of_both(given: Any) -> tuple:
    return (given, given) if isinstance(given, int) else tuple(given)


def _whole_steps(pads: tuple[int, int], step: int) -> tuple[int, int]:
    before, after = (-(-pad // step) * step for pad in pads)
    return before, after
