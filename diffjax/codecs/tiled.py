"""Encoding and decoding in overlapping tiles, for images that are too large for memory."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from diffjax.codecs.base import Around, Codec, Posterior, scale_of
from diffjax.errors import UserError
from diffjax.kinds import AtLeastOne, NotNegative
from diffjax.models.layers.seamless import AXES, circular
from diffjax.shapes import Images, Latents


@dataclass(frozen=True)
class Tiled(Around):
    """Another codec on tiles of the latent, one after the other, blended where they overlap.

    Neighbouring tiles share `overlap` elements. Next to a cut, an element lacks what lies beyond
    it; so the quarter of the overlap at the cut is left out, and the half in the middle is blended
    linearly. **Where no element of the result depends on elements farther away than `overlap // 4`,
    the result is that of the whole image.** Where each depends on all (group normalisation,
    attention) it is close to it, unless the codec evaluates that part on the whole
    (`Codec.encode_whole`, `decode_whole`). The name in the provenance includes the tiles.

    Args:
        codec: any codec.
        tile: rows and columns of a tile, in elements of the latent; 64 is typical. Smaller latents
            are decoded as a whole.
        overlap: the overlap of neighbouring tiles, in the same unit; 16 is typical, and less than
            `tile`.

    Raises:
        UserError: tiles that overlap as a whole.

    Example:
        >>> from diffjax.codecs import SpaceToDepth
        >>> codec = Tiled(SpaceToDepth(2), tile=4, overlap=2)
        >>> images = np.random.default_rng(0).normal(size=(1, 14, 20, 3)).astype(np.float32)
        >>> bool(np.allclose(codec.encoder()(images), SpaceToDepth(2).encoder()(images)))
        True
    """

    codec: Codec
    tile: AtLeastOne[int] = 64
    overlap: NotNegative[int] = 16

    def __post_init__(self) -> None:
        if self.overlap >= self.tile:
            raise UserError(f"overlap={self.overlap} must be less than tile={self.tile}")

    @property
    def name(self) -> str:
        return f"{self.codec.name}, tiles of {self.tile} with {self.overlap} shared"

    def encode(self, params: Any, images: Images) -> Latents:
        scale = self._scale_of_images(images)
        return self.codec.encode_whole(params, self.tiles_encoded(params, images, scale))

    def posterior(self, params: Any, images: Images) -> Posterior:
        """Means and log-variances, blended each."""
        _, height, width, channels = images.shape
        shape = self.latent_shape((height, width, channels))

        def moments(tile: Array) -> Array:
            return jnp.concatenate(self.codec.posterior(params, tile), -1)

        blended = self._blended(moments, images, shape[:2], scale_of(self.codec, shape), (1, 1))
        return Posterior(*jnp.split(blended, 2, -1))

    def decode(self, params: Any, latents: Latents) -> Images:
        scale = self._scale_of_latents(latents)
        return self.tiles_decoded(params, self.codec.decode_whole(params, latents), scale)

    def tiles_encoded(self, params: Any, images: Images, scale: tuple[int, int]) -> Array:
        """`encode_local` in tiles; an element of the latent has the scale in pixels."""
        height, width = images.shape[1] // scale[0], images.shape[2] // scale[1]
        return self._blended(
            lambda tile: self.codec.encode_local(params, tile),
            images,
            (height, width),
            scale,
            (1, 1),
        )

    def tiles_decoded(self, params: Any, whole: Array, scale: tuple[int, int]) -> Images:
        """`decode_local` in tiles, of what `decode_whole` returned."""
        shape: Any = whole.shape[1:3]
        return self._blended(
            lambda tile: self.codec.decode_local(params, tile), whole, shape, (1, 1), scale
        )

    def seamless(self, axes: str) -> Codec:
        return SeamlessTiles(self, axes)

    def _scale_of_images(self, images: Images) -> tuple[int, int]:
        _, height, width, channels = images.shape
        return scale_of(self.codec, self.latent_shape((height, width, channels)))

    def _scale_of_latents(self, latents: Latents) -> tuple[int, int]:
        _, height, width, channels = latents.shape
        return scale_of(self.codec, (height, width, channels))

    def _blended(
        self,
        function: Callable[[Array], Array],
        x: Any,
        sides: tuple[int, int],
        scale_in: tuple[int, int],
        scale_out: tuple[int, int],
    ) -> Array:
        """`function` of all tiles of `x`, blended; sides are those of the latent, times a scale."""
        starts = [_cut(n, self.tile, self.overlap) for n in sides]
        tile = [min(n, self.tile) for n in sides]
        vertical, horizontal = (
            jnp.asarray(_weights(first, n, self.tile, self.overlap, k), x.dtype)
            for first, n, k in zip(starts, sides, scale_out, strict=True)
        )
        rows, columns = map(jnp.asarray, starts)

        def corner(i: Array, j: Array, scale: tuple[int, int]) -> list[Any]:
            return [0, rows[i] * scale[0], columns[j] * scale[1], 0]

        def piece(i: Array, j: Array) -> Array:
            size = (x.shape[0], tile[0] * scale_in[0], tile[1] * scale_in[1], x.shape[-1])
            return function(jax.lax.dynamic_slice(x, corner(i, j, scale_in), size))

        def add(total: Array, place: Array) -> tuple[Array, None]:
            i, j = place
            weight = vertical[i][:, None] * horizontal[j][None, :]
            new = weight[None, :, :, None] * piece(i, j)
            first = corner(i, j, scale_out)
            new += jax.lax.dynamic_slice(total, first, new.shape)
            return jax.lax.dynamic_update_slice(total, new, first), None

        channels = jax.eval_shape(piece, jnp.int32(0), jnp.int32(0)).shape[-1]
        height, width = (n * k for n, k in zip(sides, scale_out, strict=True))
        places = np.stack(np.meshgrid(*map(np.arange, (len(rows), len(columns)))), -1)
        begin = jnp.zeros((x.shape[0], height, width, channels), x.dtype)
        return jax.lax.scan(add, begin, jnp.asarray(places.reshape(-1, 2)))[0]


@dataclass(frozen=True)
class SeamlessTiles(Around):
    """Tiles of an image without edges: those at its sides go on at the opposite side.

    As many elements of the latent as tiles share are repeated around it, and left out of the
    result. What the codec evaluates on the whole wraps around (`Seamless`).

    Attributes:
        codec: the codec in tiles.
        axes: a name in `diffjax.models.layers.seamless.AXES`.
    """

    codec: Tiled
    axes: str = "both"

    def encode(self, params: Any, images: Images) -> Latents:
        scale = self.codec._scale_of_images(images)
        wide = self.codec.tiles_encoded(params, self._wrapped(images, scale), scale)
        with circular(self.axes):
            return self.codec.codec.encode_whole(params, self._inner(wide, (1, 1)))

    def decode(self, params: Any, latents: Latents) -> Images:
        scale = self.codec._scale_of_latents(latents)
        with circular(self.axes):
            whole = self.codec.codec.decode_whole(params, latents)
        wide = self._wrapped(whole, (1, 1))
        return self._inner(self.codec.tiles_decoded(params, wide, scale), scale)

    def posterior(self, params: Any, images: Images) -> Posterior:
        wide = self._wrapped(images, self.codec._scale_of_images(images))
        return Posterior(*(self._inner(x, (1, 1)) for x in self.codec.posterior(params, wide)))

    def _margins(self, scale: tuple[int, int]) -> list[int]:
        shared = self.codec.overlap
        both = enumerate(scale, start=1)
        return [0, *(shared * n if axis in AXES[self.axes] else 0 for axis, n in both), 0]

    def _wrapped(self, x: Array, scale: tuple[int, int]) -> Array:
        return jnp.pad(x, [(n, n) for n in self._margins(scale)], mode="wrap")

    def _inner(self, x: Array, scale: tuple[int, int]) -> Array:
        margins = self._margins(scale)
        return x[tuple(slice(n, size - n) for n, size in zip(margins, x.shape, strict=True))]


def _cut(n: int, tile: int, overlap: int) -> np.ndarray:
    """Where tiles of a line of n elements start; the last ends with the line.

    Example:
        >>> _cut(10, 4, 1).tolist(), _cut(11, 4, 1).tolist(), _cut(3, 4, 1).tolist()
        ([0, 3, 6], [0, 3, 6, 7], [0])
    """
    last = max(n - tile, 0)
    return np.append(np.arange(0, last, tile - overlap), last)


def _weights(starts: np.ndarray, n: int, tile: int, overlap: int, scale: int) -> np.ndarray:
    """What each tile counts for at each of its elements, `[tiles, tile·scale]`; they sum to 1.

    Example:
        >>> _weights(np.array([0, 4]), 12, 8, 4, 1)
        array([[1.  , 1.  , 1.  , 1.  , 1.  , 0.75, 0.25, 0.  ],
               [0.  , 0.25, 0.75, 1.  , 1.  , 1.  , 1.  , 1.  ]])
    """
    size, margin = min(n, tile) * scale, overlap // 4 * scale
    ramp = max(overlap * scale - 2 * margin, 1)
    rising = np.clip((np.arange(size) + 0.5 - margin) / ramp, 0.0, 1.0)
    raw = np.ones((len(starts), size))
    raw[starts > 0] *= rising
    raw[starts + min(n, tile) < n] *= rising[::-1]
    total = np.zeros(n * scale)
    where = starts[:, None] * scale + np.arange(size)
    np.add.at(total, where, raw)
    return raw / total[where]
