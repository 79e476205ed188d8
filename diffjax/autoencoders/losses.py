"""The losses of an autoencoder and of its adversary, as functions of images, posteriors, logits.

The recipe is that of latent diffusion (Rombach et al. 2022, arXiv:2112.10752, appendix G), after
VQGAN (Esser et al. 2021, arXiv:2012.09841).
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import jax
import jax.numpy as jnp

from diffjax.autoencoders.perceptual import OFF, Perceptual
from diffjax.errors import UserError, nearest
from diffjax.kinds import NotNegative
from diffjax.models.autoencoder_kl.network import Posterior
from diffjax.models.patchgan import PatchGAN
from diffjax.shapes import Array, Images, OneNumber, PerSample

ERRORS: Mapping[str, Callable[[Array], Array]] = {"l1": jnp.abs, "l2": jnp.square}
"""The error of a pixel, of its difference."""
_MOST_ADAPTIVE = 1e4
_EPSILON = 1e-4


@dataclass(frozen=True)
class Reconstruction:
    """The loss of an image, a sum over its N numbers, as in latent diffusion:

        loss = Σ (|x − x̂| + perceptual.weight·d(x, x̂)) / exp(log_variance) + N·log_variance
               + kl_weight·KL(q(z | x), N(0, 1))

    A Laplace distribution of pixels, whose scale is fixed. Sums and not means, so that published
    weights keep their meaning: with `kl_weight=1e-6` the KL divergence in nats is some 1e-6 of the
    sum of errors.

    Args:
        error: the error of a pixel, `l1` (latent diffusion) or `l2`.
        kl_weight: weight of the KL divergence; 1e-6 in latent diffusion. Larger ones make latents
            more like noise, and images less sharp. It has no effect where latents have no
            posterior.
        log_variance: the logarithm of the scale of the errors; 0 in latent diffusion.
        perceptual: a distance of images by features, off without its weights.
    """

    error: str = "l1"
    kl_weight: NotNegative[float] = 1e-6
    log_variance: float = 0.0
    perceptual: Perceptual = OFF

    def __post_init__(self) -> None:
        if self.error not in ERRORS:
            raise UserError(f"config.loss.error={self.error!r}: {nearest(self.error, ERRORS)}")

    def negative_log_likelihood(self, images: Images, error: Images, distance: PerSample) -> Array:
        """The first line of the loss, `[B]`, of reconstructions with this error and distance.

        Args:
            images: `[B, H, W, C]`.
            error: reconstruction less image, `[B, H, W, C]`.
            distance: the perceptual distance, `[B]`.
        """
        size = images[0].size
        pixels = jnp.sum(ERRORS[self.error](error), axis=(1, 2, 3))
        perceived = size * self.perceptual.weight * distance
        return (pixels + perceived) / jnp.exp(self.log_variance) + size * self.log_variance


@dataclass(frozen=True)
class Adversary:
    """A discriminator that is trained to tell reconstructions from images.

    The autoencoder's loss has the further term `weight·w·(−mean D(x̂))`, with the adaptive weight
    `w` of `adaptive_weight`. Up to `start_step` neither learns from the other.

    Args:
        network: the discriminator.
        weight: 0, the default, leaves it out; latent diffusion has 0.5.
        start_step: steps before it begins; 50,000 in latent diffusion.
    """

    network: PatchGAN
    weight: NotNegative[float] = 0.0
    start_step: NotNegative[int] = 50_000


def kl_divergence(posterior: Posterior) -> PerSample:
    """The KL divergence of posteriors from N(0, 1) in nats, `[B]`.

        KL = ½·Σ (mean² + variance − 1 − log variance)

    Example:
        >>> shape = (1, 1, 1, 2)
        >>> kl_divergence(Posterior(jnp.ones(shape), jnp.zeros(shape))).tolist()
        [1.0]
    """
    mean, log_variance = posterior
    terms = jnp.square(mean) + jnp.exp(log_variance) - 1.0 - log_variance
    return 0.5 * jnp.sum(terms, axis=(1, 2, 3))


def hinge_loss(real: Array, fake: Array) -> OneNumber:
    """The loss of a discriminator with these logits of images and of reconstructions.

        ½·mean max(0, 1 − real) + ½·mean max(0, 1 + fake)

    Example:
        >>> float(hinge_loss(jnp.array([0.5, 2.0]), jnp.array([-2.0, 1.0])))
        0.625
    """
    return 0.5 * (jnp.mean(jax.nn.relu(1.0 - real)) + jnp.mean(jax.nn.relu(1.0 + fake)))


def adaptive_weight(reconstruction: Array, adversarial: Array) -> OneNumber:
    """The weight that makes two gradients of the decoder's last layer equally long.

        |reconstruction| / (|adversarial| + 1e-4), at most 1e4

    Args:
        reconstruction: the gradient of the negative log-likelihood.
        adversarial: the gradient of the adversarial term.

    Example:
        >>> float(adaptive_weight(jnp.array([3.0, 4.0]), jnp.array([0.0, 0.9999])))
        5.0

    References:
        Esser et al., "Taming Transformers for High-Resolution Image Synthesis", 2021,
        arXiv:2012.09841, equation 7
    """
    ratio = jnp.linalg.norm(reconstruction) / (jnp.linalg.norm(adversarial) + _EPSILON)
    return jnp.clip(ratio, 0.0, _MOST_ADAPTIVE)


def psnr(images: Images, reconstructions: Images) -> PerSample:
    """The peak signal-to-noise ratio of reconstructions in dB, `[B]`, of images in [-1, 1].

        PSNR = 10·log₁₀(2² / mean (x − clip(x̂))²)

    Example:
        >>> x = jnp.zeros((1, 2, 2, 1))
        >>> psnr(x, x + 0.2).round(3).tolist()
        [20.0]
    """
    squares = jnp.square(images - jnp.clip(reconstructions, -1.0, 1.0))
    # An equal image has 10 more decibels than 8 bits can show, not infinitely many.
    error = jnp.maximum(jnp.mean(squares, axis=(1, 2, 3)), 1e-10)
    return 10.0 * jnp.log10(4.0 / error)
