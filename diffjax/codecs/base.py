"""The interface of codecs, codecs around other codecs, and the identity."""

import hashlib
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import cache, cached_property
from pathlib import Path
from typing import Any, ClassVar

import jax
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec
from ml_collections import ConfigDict

from diffjax.compiling import jit
from diffjax.errors import UserError
from diffjax.host.files import write_whole
from diffjax.models.autoencoder_kl.network import Posterior
from diffjax.models.layers.seamless import circular
from diffjax.shapes import Array, Images, Latents
from diffjax.spec import as_spec, to_json

Shape = tuple[int, int, int]
"""`(H, W, C)` of an image, or `(h, w, c)` of its latent."""
RECORD = "codec.json"
"""The file beside latents that records the codec that encoded them."""
_PIXELS_AT_ONCE = 2**20  # 256 channels of so many pixels take 1 GiB in float32


class Codec:
    """A map from images to latents and back; a subclass is a frozen dataclass.

        latents = encode(params, images)        [B, H, W, C] in [-1, 1] -> [B, h, w, c]
        images = decode(params, latents)        [B, h, w, c] -> [B, H, W, C]

    Both are pure functions of arrays that JAX can trace. `encoder` and `decoder` return the
    compiled ones, for any number of images.

    Attributes:
        name: its name in the provenance of every metric, such as `"taef2"`.
        sha256: hex digest of what defines it: the hashes of its weights, or the text of its
            definition (`sha256_of`). Latents of a codec with another hash are refused.
        bounded: whether images lie in [-1, 1] and come from 8-bit files, so that evaluation clips
            and rounds them. False for values that are not images.
        pixels: whether latents are the pixels themselves, so that they have 256 levels.
        stochastic: whether it has a `posterior`, of which `encode` returns the mean.
    """

    bounded: ClassVar[bool] = True
    pixels: ClassVar[bool] = False
    stochastic: ClassVar[bool] = False
    name: Any
    sha256: Any

    @property
    def params(self) -> Any:
        """The weights, a tree of NumPy arrays, read when they are first needed; none by default.

        Raises:
            UserError: the files are missing, or have other hashes.
        """
        return ()

    def latent_shape(self, image_shape: Shape) -> Shape:
        """The shape of the latents of images of a shape.

        Raises:
            UserError: it encodes no such images.
        """
        raise NotImplementedError

    def image_shape(self, latent_shape: Shape) -> Shape:
        """The shape of the images of latents of a shape.

        Raises:
            UserError: these are no latents of this codec.
        """
        raise NotImplementedError

    def encode(self, params: Any, images: Images) -> Latents:
        raise NotImplementedError

    def decode(self, params: Any, latents: Latents) -> Images:
        raise NotImplementedError

    def encode_local(self, params: Any, images: Images) -> Array:
        """The part of `encode` that `Tiled` evaluates in tiles: by default all of it.

            encode(x) = encode_whole(encode_local(x)),    decode(z) = decode_local(decode_whole(z))

        A codec that normalises over a whole image does so in `encode_whole` and `decode_whole`, at
        the resolution of a latent.
        """
        return self.encode(params, images)

    def encode_whole(self, params: Any, x: Array) -> Latents:
        """The rest of `encode`, of the whole image."""
        del params
        return x

    def decode_whole(self, params: Any, latents: Latents) -> Array:
        """The first part of `decode`, of the whole latent."""
        del params
        return latents

    def decode_local(self, params: Any, x: Array) -> Images:
        """The part of `decode` that `Tiled` evaluates in tiles."""
        return self.decode(params, x)

    def posterior(self, params: Any, images: Images) -> Posterior:
        """The distribution of the latents of images, of a `stochastic` codec."""
        raise NotImplementedError

    def seamless(self, axes: str) -> "Codec":
        """The same codec for images that continue at their opposite side (`models.seamless`).

        Args:
            axes: a name in `diffjax.models.layers.seamless.AXES`.
        """
        return Seamless(self, axes)

    @property
    def facts(self) -> dict[str, str]:
        """The name and hash, for the provenance of metrics."""
        return {"codec": self.name, "codec_sha256": self.sha256}

    @property
    def latents(self) -> str:
        """An identifier of its latents, equal for codecs whose latents are interchangeable."""
        return f"{self.name} {self.sha256[:12]}".strip()

    def describe(self, latent_shape: Shape) -> str:
        """The images of latents of a shape, in a few words.

        Example:
            >>> from diffjax.codecs import SpaceToDepth
            >>> Identity().describe((8, 8, 1)), SpaceToDepth(2).describe((4, 4, 4))
            ('images of 8x8x1', 'images of 8x8x1 as latents of 4x4x4 (space_to_depth:2)')
        """
        images, latents = (
            "x".join(map(str, shape)) for shape in (self.image_shape(latent_shape), latent_shape)
        )
        encoded = "" if self.pixels else f" as latents of {latents} ({self.name})"
        return f"images of {images}{encoded}"

    def record(self, folder: str | Path) -> None:
        """Writes the name, hash and settings into `codec.json`, beside latents that it encoded."""
        facts = {"name": self.name, "sha256": self.sha256}
        with suppress(UserError):  # A class that can't be imported by name.
            facts["spec"] = as_spec(self)
        write_whole(Path(folder) / RECORD, to_json(ConfigDict(facts)))

    def encoder(self, place: NamedSharding | None = None) -> Callable[[Any], np.ndarray]:
        """`images -> latents`, float32, compiled; as many images at a time as memory allows.

        Args:
            place: how a batch lies on devices of this process, by rows; None for one device.

        Example:
            >>> from diffjax.codecs import SpaceToDepth
            >>> SpaceToDepth(2).encoder()(np.zeros((3, 8, 8, 1), np.float32)).shape
            (3, 4, 4, 4)
        """

        def encoded(images: Any) -> np.ndarray:
            shape = _shape_of(images)
            at_once = images_at_once(shape)
            return self._in_batches("encode", images, self.latent_shape(shape), at_once, place)

        return encoded

    def decoder(self, place: NamedSharding | None = None) -> Callable[[Any], np.ndarray]:
        """`latents -> images`, as `encoder`."""

        def decoded(latents: Any) -> np.ndarray:
            shape = self.image_shape(_shape_of(latents))
            return self._in_batches("decode", latents, shape, images_at_once(shape), place)

        return decoded

    @cached_property
    def params_on(self) -> Callable[[NamedSharding | None], Any]:
        """The weights on the devices of a batch, copied there once."""

        def copied(place: NamedSharding | None) -> Any:
            where = None if place is None else NamedSharding(place.mesh, PartitionSpec())
            return jax.device_put(self.params, where)

        return cache(copied)

    def release(self) -> None:
        """Frees the weights, here and on devices; the next use reads them again."""
        for name in ("params", "params_on"):
            self.__dict__.pop(name, None)

    def _in_batches(
        self, which: str, x: Any, shape: Shape, at_once: int, place: NamedSharding | None
    ) -> np.ndarray:
        """`encode` or `decode`; the last batch is filled up, so that all have one shape."""
        devices = 1 if place is None else place.num_devices
        enough = 1 << (max(len(x), 1) - 1).bit_length()  # so that few sizes are compiled
        size = -(-min(at_once, enough) // devices) * devices
        parts = [np.zeros((0, *shape), np.float32)]
        for first in range(0, len(x), size):
            batch = np.asarray(x[first : first + size], np.float32)
            filled = batch[np.minimum(np.arange(size), len(batch) - 1)]
            placed = jax.device_put(filled, place)
            parts.append(np.asarray(_program(which)(self, self.params_on(place), placed)))
            parts[-1] = parts[-1][: len(batch)]
        return np.concatenate(parts)


class Around(Codec):
    """A codec around another one, `codec`, which does all that a subclass does not change."""

    codec: Codec

    @property
    def name(self) -> str:  # pyright: ignore[reportIncompatibleVariableOverride]
        return self.codec.name

    @property
    def sha256(self) -> str:  # pyright: ignore[reportIncompatibleVariableOverride]
        return self.codec.sha256

    @property
    def bounded(self) -> bool:  # pyright: ignore[reportIncompatibleVariableOverride]
        return self.codec.bounded

    @property
    def stochastic(self) -> bool:  # pyright: ignore[reportIncompatibleVariableOverride]
        return self.codec.stochastic

    @property
    def latents(self) -> str:
        return self.codec.latents

    @property
    def params(self) -> Any:
        return self.codec.params

    def release(self) -> None:
        super().release()
        self.codec.release()

    def latent_shape(self, image_shape: Shape) -> Shape:
        return self.codec.latent_shape(image_shape)

    def image_shape(self, latent_shape: Shape) -> Shape:
        return self.codec.image_shape(latent_shape)

    def seamless(self, axes: str) -> Codec:
        return replace(self, codec=self.codec.seamless(axes))  # pyright: ignore


@dataclass(frozen=True)
class Seamless(Around):
    """A codec whose convolutions wrap around.

    Attributes:
        codec: the codec.
        axes: a name in `diffjax.models.layers.seamless.AXES`.
    """

    codec: Codec
    axes: str = "both"

    def encode(self, params: Any, images: Images) -> Latents:
        with circular(self.axes):
            return self.codec.encode(params, images)

    def decode(self, params: Any, latents: Latents) -> Images:
        with circular(self.axes):
            return self.codec.decode(params, latents)

    def posterior(self, params: Any, images: Images) -> Posterior:
        with circular(self.axes):
            return self.codec.posterior(params, images)


class _Unchanged(Codec):
    """Latents that are the images."""

    def latent_shape(self, image_shape: Shape) -> Shape:
        return image_shape

    def image_shape(self, latent_shape: Shape) -> Shape:
        return latent_shape

    def encode(self, params: Any, images: Images) -> Latents:
        return images

    def decode(self, params: Any, latents: Latents) -> Images:
        return latents

    def encoder(self, place: NamedSharding | None = None) -> Callable[[Any], np.ndarray]:
        return lambda images: images

    decoder = encoder

    def seamless(self, axes: str) -> Codec:
        return self


@dataclass(frozen=True)
class Identity(_Unchanged):
    """No codec: models are trained on the pixels.

    Example:
        >>> Identity().decoder()(np.ones((1, 2, 2, 3))).shape, Identity().image_shape((2, 2, 3))
        ((1, 2, 2, 3), (2, 2, 3))
    """

    pixels: ClassVar[bool] = True
    name: ClassVar[str] = "none"
    sha256: ClassVar[str] = ""


@dataclass(frozen=True)
class Unstated(_Unchanged):
    """Latents whose codec is unknown: they are shown and compared without decoding."""

    bounded: ClassVar[bool] = False
    name: ClassVar[str] = "not stated"
    sha256: ClassVar[str] = ""


def sha256_of(definition: str) -> str:
    """SHA-256 of the text that defines a codec.

    Example:
        >>> sha256_of("space_to_depth block=2")[:12]
        '18f261e7ce9d'
    """
    return hashlib.sha256(definition.encode()).hexdigest()


def scale_of(codec: Codec, latent_shape: Shape) -> tuple[int, int]:
    """Height and width, in pixels, of one element of a latent.

    Example:
        >>> from diffjax.codecs import SpaceToDepth
        >>> scale_of(SpaceToDepth(4), (8, 8, 48))
        (4, 4)
    """
    (height, width, _), (rows, columns, _) = codec.image_shape(latent_shape), latent_shape
    return height // rows, width // columns


def _shape_of(x: Any) -> Shape:
    """The shape of each row.

    Raises:
        UserError: they are not `[H, W, C]`.
    """
    if np.ndim(x) != 4:
        raise UserError(f"a codec takes arrays [N, H, W, C], not {list(np.shape(x))}")
    _, height, width, channels = np.shape(x)
    return height, width, channels


def images_at_once(image_shape: Shape) -> int:
    """Images that are encoded or decoded together: about a million pixels."""
    height, width, _ = image_shape
    return max(_PIXELS_AT_ONCE // (height * width), 1)


@cache
def _program(which: str) -> Any:
    """`encode` or `decode` of any codec, compiled once for equal codecs."""
    return jit(lambda codec, params, x: getattr(codec, which)(params, x), static_argnums=0)
