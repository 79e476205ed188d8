"""What a trained autoencoder does: PSNR and rate of test images, and statistics of its latents."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding

from diffjax.autoencoders.losses import kl_divergence, psnr
from diffjax.codecs.autoencoders import Autoencoder
from diffjax.compiling import jit
from diffjax.data import Source, eval_batches
from diffjax.shapes import Images


class Quality(NamedTuple):
    """Means over images.

    Attributes:
        psnr: the PSNR of the images decoded from the means of posteriors, in dB.
        median_psnr: its median.
        rate: bits of KL divergence for each number of an image; 0 without posteriors.
        num_images: the number of images.
    """

    psnr: float
    median_psnr: float
    rate: float
    num_images: int


class Scaling(NamedTuple):
    """Over all images, positions and channels, of samples of the posteriors.

    Attributes:
        mean: the mean of latents; a codec subtracts it.
        std: the standard deviation; a codec divides by it.
        channel_mean: the mean of each channel.
        channel_std: the standard deviation of each channel.
        num_images: the number of images.
    """

    mean: float
    std: float
    channel_mean: tuple[float, ...]
    channel_std: tuple[float, ...]
    num_images: int


@dataclass(frozen=True, eq=False)
class Measure:
    """Measures one autoencoder, on the devices of this process.

    Args:
        autoencoder: the network.
        batch_size: images at a time.
        place: how a batch lies on the devices, by rows; None for one.
    """

    autoencoder: Autoencoder
    batch_size: int
    place: NamedSharding | None = None

    def reconstruct(self, params: Any, images: np.ndarray) -> np.ndarray:
        """The images that are decoded from the means of posteriors."""
        return self._made(params, images)["found"]

    def quality(
        self, params: Any, source: Source, limit: int = 0, begun: Callable[[int], Any] = lambda n: 0
    ) -> Quality:
        """PSNR and rate of the images of a source, or of `limit` of them, evenly spaced."""
        decibels, kl = self._of_images(("psnr", "kl"), params, source, limit, begun)
        size = np.log(2.0) * source.gather([0])["image"][0].size
        rate = float(kl.mean() / size) if self.autoencoder.stochastic else 0.0
        return Quality(float(decibels.mean()), float(np.median(decibels)), rate, len(decibels))

    def scaling(
        self, params: Any, source: Source, limit: int = 0, begun: Callable[[int], Any] = lambda n: 0
    ) -> Scaling:
        """Mean and standard deviation of the latents of a source's images."""
        first, second = self._of_images(("first", "second"), params, source, limit, begun)
        mean, square = first.mean(axis=0), second.mean(axis=0)
        deviation = np.sqrt(np.maximum(square - mean**2, 0.0))
        overall = float(np.sqrt(max(square.mean() - mean.mean() ** 2, 0.0)))
        return Scaling(
            float(mean.mean()), overall, tuple(mean.tolist()), tuple(deviation.tolist()), len(first)
        )

    def _of_images(
        self,
        names: Sequence[str],
        params: Any,
        source: Source,
        limit: int,
        begun: Callable[[int], Any],
    ) -> list[np.ndarray]:
        """What is measured of each image, by name, in float64."""
        parts = []
        batches = eval_batches(source, batch_size=self._size, limit_images=limit)
        for number, batch in enumerate(batches):
            begun(number)
            made = self._made(params, batch["image"])
            parts.append([made[name] for name in names])
        return [np.concatenate(part).astype(np.float64) for part in zip(*parts, strict=True)]

    @property
    def _size(self) -> int:
        devices = 1 if self.place is None else self.place.num_devices
        return -(-self.batch_size // devices) * devices

    def _made(self, params: Any, images: np.ndarray) -> dict[str, np.ndarray]:
        """Of at most a batch; it is filled up, so that all have one shape."""
        rows = np.minimum(np.arange(self._size), len(images) - 1)
        made = jax.device_get(self._program(params, jax.device_put(images[rows], self.place)))
        return {name: array[: len(images)] for name, array in made.items()}

    @cached_property
    def _program(self) -> Callable[[Any, Any], dict[str, Any]]:
        return jit(self._of_batch)

    def _of_batch(self, params: Any, images: Images) -> dict[str, Any]:
        posterior = self.autoencoder.encode(params, images)
        found = self.autoencoder.decode(params, posterior.mean)
        noise = jnp.exp(posterior.log_variance) if self.autoencoder.stochastic else 0.0
        return {
            "found": jnp.clip(found, -1.0, 1.0),
            "psnr": psnr(images, found),
            "kl": kl_divergence(posterior),
            "first": jnp.mean(posterior.mean, axis=(1, 2)),
            "second": jnp.mean(jnp.square(posterior.mean) + noise, axis=(1, 2)),
        }
