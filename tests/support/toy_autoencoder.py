"""An autoencoder of two numbers, whose gradients can be written down, and an adversary of one.

z = a·x,  x̂ = w·z,  D(x) = v·x        for images of one channel
"""

from dataclasses import dataclass
from typing import Any, ClassVar

import flax.linen as nn
import jax.numpy as jnp
from flax.linen import initializers

from diffjax.codecs.base import Posterior
from diffjax.models.patchgan import PatchGAN


class Factor(nn.Module):
    """A factor of all numbers, a parameter."""

    value: float

    @nn.compact
    def __call__(self, x: Any) -> Any:
        return self.param("kernel", initializers.constant(self.value), ()) * x


class Factors(nn.Module):
    """Two factors, one after the other."""

    a: float = 0.5
    w: float = 0.8

    @nn.compact
    def __call__(self, x: Any) -> Any:
        return Factor(self.w, name="decoder")(Factor(self.a, name="encoder")(x))


class Logits(PatchGAN):
    """`D(x) = v·x`; it takes any image."""

    v: float = 0.3

    @nn.compact
    def __call__(self, x: Any) -> Any:
        return Factor(self.v, name="factor")(x)

    def check(self, height: int, width: int) -> None:
        """All sizes will do."""


FACTORS = Factors()


@dataclass(frozen=True)
class Toy:
    """As `diffjax.codecs.autoencoders.Variational`; its posteriors have one variance."""

    network: Factors = FACTORS
    stochastic: bool = False
    log_variance: float = -2.0

    last_layer: ClassVar[tuple[str, ...]] = ("decoder", "kernel")
    scale: ClassVar[int] = 1
    image_channels: ClassVar[int] = 1
    latent_channels: ClassVar[int] = 1

    def check(self) -> None:
        """Nothing to refuse."""

    def encode(self, params: Any, images: Any) -> Posterior:
        mean = params["encoder"]["kernel"] * images
        return Posterior(mean, jnp.full_like(mean, self.log_variance))

    def decode(self, params: Any, latents: Any) -> Any:
        return params["decoder"]["kernel"] * latents
