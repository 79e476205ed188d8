"""A smaller image, of which a network makes the large one: super-resolution and cascades."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from diffjax.conditions.base import Condition, Shapes
from diffjax.conditions.images import Images
from diffjax.errors import UserError
from diffjax.kinds import AtLeastOne, Positive
from diffjax.shapes import Array, Keys, OneKey


class Augmented(NamedTuple):
    """Images with noise in them, and how much of it.

    Attributes:
        images: `[n, h, w, C]`.
        level: `[n]`, a time on the path of the augmentation; 0 is clean.
    """

    images: Any
    level: Any


@dataclass(frozen=True)
class LowResolution(Images):
    """Images `[n, h, w, C]` at a fraction of the size, with noise of a level that the network sees.

        z_s = a(s)·z + σ(s)·eps        z the small image,  s ~ U[0, most_level] in training

    In training z is the mean of squares of pixels of the image itself. Noise conditioning
    augmentation makes the network rely less on what is fine in z, where samples of another model
    differ from data; s is chosen when sampling. The network has z_s, enlarged, and s in further
    channels. It is never dropped.

    Attributes:
        shape: `(h, w, C)` of the small images.
        name: the name of their array in files; that of the levels is `NAME_level`.
        path: the path of the noise, a path of `diffjax.process.paths`, whose times are the levels.
        most_level: the largest level in training; 0.3 to 0.999 on the cosine path. Up to noise
            alone, as in Imagen, a network has more to learn.
        factor: how many pixels of the image, in each direction, are one of the small image.

    Example:
        >>> from diffjax.process.paths import Cosine
        >>> kind = LowResolution((4, 4, 1), path=Cosine(), factor=2)
        >>> kind.of_batch({"image": np.ones((3, 8, 8, 1))}).images.shape
        (3, 4, 4, 1)

    References:
        Ho et al., "Cascaded Diffusion Models for High Fidelity Image Generation", 2021,
        arXiv:2106.15282, section 4
        Saharia et al., "Photorealistic Text-to-Image Diffusion Models with Deep Language
        Understanding" (Imagen), 2022, arXiv:2205.11487, section 2.3
    """

    shape: tuple[int, int, int]
    name: str = "small"
    path: Any = None
    most_level: Positive[float] = 0.5
    factor: AtLeastOne[int] = 2

    can_be_dropped: ClassVar[bool] = False
    takes_level: ClassVar[bool] = True

    def shapes(self, n: Any) -> Shapes:
        del n
        return {}  # The images themselves are enough.

    def of_batch(self, batch: Mapping[str, Any]) -> Augmented:
        if self.name in batch:
            return Augmented(batch[self.name], batch[f"{self.name}_level"])
        images = batch["image"]
        n, height, width, channels = images.shape
        f = self.factor
        squares = images.reshape(n, height // f, f, width // f, f, channels)
        return self._clean(squares.mean(axis=(2, 4)))

    def abstract(self, n: Any) -> Augmented:
        images = jax.ShapeDtypeStruct((n, *self.shape), jnp.float32)
        return Augmented(images, jax.ShapeDtypeStruct((n,), jnp.float32))

    def nulled(self, cond: Any) -> Any:
        return cond

    def drop(self, key: Any, cond: Any, rate: Any) -> Any:
        del key, rate
        return cond

    def of(self, given: Any) -> Any:
        """As `Images.of`: images without noise; or `Augmented`, with the level of their noise."""
        if isinstance(given, Augmented) or np.ndim(given) != 4:
            return Condition.of(self, given)
        given = np.asarray(given)
        if given.dtype == np.uint8:
            given = np.asarray(given, np.float32) / 127.5 - 1.0
        return Condition.of(self, self._clean(given))

    def augmented(self, key: OneKey, cond: Augmented) -> Augmented:
        n = len(cond.level)
        of_levels, of_noise = jax.random.split(key)
        levels = self.most_level * jax.random.uniform(of_levels, (n,))
        return self.at_level(jax.random.split(of_noise, n), cond, levels)

    def at_level(self, keys: Keys, cond: Augmented, level: Array) -> Augmented:
        levels = jnp.broadcast_to(jnp.asarray(level, jnp.float32), (len(cond.level),))

        def noised(key: OneKey, image: Array, s: Array) -> Array:
            eps = jax.random.normal(key, image.shape)
            return self.path.alpha(s) * image + self.path.sigma(s) * eps

        return Augmented(jax.vmap(noised)(keys, jnp.asarray(cond.images), levels), levels)

    def check_level(self, level: float) -> None:
        if not 0 <= level <= self.most_level:
            raise UserError(
                f"level={level:g}: this network was trained with noise of levels from 0 to "
                f"{self.most_level:g}"
            )

    def array_names(self) -> Augmented:
        return Augmented(self.name, f"{self.name}_level")

    def pictures(self, cond: Augmented) -> np.ndarray:
        """The small images, each pixel as a square."""
        return np.asarray(cond.images).repeat(self.factor, 1).repeat(self.factor, 2)

    def describe(self) -> str:
        return f"smaller {super().describe()}"

    def _clean(self, images: Any) -> Augmented:
        return Augmented(images, np.zeros(len(images), np.float32))
