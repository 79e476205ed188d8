"""One step of training an autoencoder and its adversary, for every network, loss and mesh."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import Array

from diffjax.autoencoders.losses import (
    Adversary,
    Reconstruction,
    adaptive_weight,
    hinge_loss,
    kl_divergence,
    psnr,
)
from diffjax.codecs.autoencoders import Autoencoder
from diffjax.codecs.base import Shape
from diffjax.compiling import implicit_promotion
from diffjax.models.autoencoder_kl.network import Posterior
from diffjax.optimizers.base import Optimizer
from diffjax.shapes import Images
from diffjax.training.averages import Averages
from diffjax.training.state import TrainState, init_state

Step = Callable[[TrainState, Array, Images, Any], tuple[TrainState, dict[str, Array]]]
"""`(state, key, images, weights of the perceptual distance) -> (state, metrics)`."""


class AdversaryState(NamedTuple):
    """What is trained beside the autoencoder: the `memory` of its `TrainState`.

    Attributes:
        params: the parameters of the discriminator.
        opt_state: the state of its optimizer.
    """

    params: Any
    opt_state: Any


@dataclass(frozen=True)
class Parts:
    """What a training step is made of.

    Attributes:
        autoencoder: the network.
        loss: the loss of the autoencoder.
        adversary: the discriminator.
        optimizer: the optimizer of the autoencoder.
        adversary_optimizer: the optimizer of the discriminator.
        averages: the averages of the autoencoder's parameters.
        image_shape: the shape of the images.
    """

    autoencoder: Autoencoder
    loss: Reconstruction
    adversary: Adversary
    optimizer: Optimizer
    adversary_optimizer: Optimizer
    averages: Averages
    image_shape: Shape

    def init(self, key: Array) -> TrainState:
        """The state before the first step."""
        own_key, adversary_key = jax.random.split(key)
        images = jnp.zeros((1, *self.image_shape))
        params = self.autoencoder.network.init(own_key, images)["params"]
        memory: Any = ()
        if self.adversary.weight:
            theirs = self.adversary.network.init(adversary_key, images)["params"]
            memory = AdversaryState(theirs, self.adversary_optimizer.transform.init(theirs))
        return init_state(params, self.optimizer, self.averages, memory)


def make_step(parts: Parts) -> Step:
    """The step as a pure function, to be jitted by the caller.

    The gradient of the loss with respect to the reconstruction is the sum of those of its terms,
    each with its weight; then the network is differentiated once. The weight of the adversarial
    term follows from the gradients of the decoder's last layer alone. The adversary learns from the
    same reconstructions, before the update, without a gradient to the autoencoder.

    Returns:
        `(state, key, images, perceptual_params) -> (state, metrics)`; the number of the step is
        folded into the key. Metrics are means over the batch: `loss`, `error` (of a pixel),
        `perceptual`, `psnr` (dB, of sampled latents), `rate` (bits of KL divergence for each number
        of an image), `latent_mean`, `latent_std`, `grad_norm`, `learning_rate`; with an adversary
        `adversary_loss`, `adversary_weight` and its mean logits, `logits_real`, `logits_fake`.
    """
    autoencoder, loss = parts.autoencoder, parts.loss

    def step(
        state: TrainState, key: Array, images: Images, perceptual_params: Any
    ) -> tuple[TrainState, dict[str, Array]]:
        key = jax.random.fold_in(key, state.step)

        def reconstruct(params: Any) -> tuple[Images, Posterior]:
            posterior = autoencoder.encode(params, images)
            latents = posterior.sample(key) if autoencoder.stochastic else posterior.mean
            return autoencoder.decode(params, latents), posterior

        def likelihood_term(x: Images) -> tuple[Array, tuple[Array, Array]]:
            distance = loss.perceptual(perceptual_params, images, x)
            losses = loss.negative_log_likelihood(images, x - images, distance)
            return jnp.mean(losses), (jnp.mean(jnp.abs(x - images)), jnp.mean(distance))

        def kl_term(posterior: Posterior) -> tuple[Array, Array]:
            kl = jnp.mean(kl_divergence(posterior)) * autoencoder.stochastic
            return loss.kl_weight * kl, kl

        point = parts.optimizer.gradient_point(state.opt_state, state.params)
        (found, posterior), pull = jax.vjp(reconstruct, point)
        (likelihood, (error, distance)), to_image = jax.value_and_grad(
            likelihood_term, has_aux=True
        )(found)
        (kl_loss, kl), to_posterior = jax.value_and_grad(kl_term, has_aux=True)(posterior)
        total = likelihood + kl_loss
        memory, seen = state.memory, {}
        if parts.adversary.weight:
            nothing = jax.tree.map(jnp.zeros_like, posterior)

            def last_layer(to_image: Images) -> Array:
                gradient: Any = pull((to_image, nothing))[0]
                for name in autoencoder.last_layer:
                    gradient = gradient[name]
                return gradient

            started = (state.step >= parts.adversary.start_step).astype(jnp.float32)
            term, against = jax.value_and_grad(
                lambda x: -jnp.mean(_logits(parts, memory.params, x))
            )(found)
            weight = adaptive_weight(last_layer(to_image), last_layer(against))
            weight = started * parts.adversary.weight * weight
            to_image, total = to_image + weight * against, total + weight * term
            memory, seen = _adversary_step(parts, memory, started, images, found)
            seen["adversary_weight"] = weight
        (gradient,) = pull((to_image, to_posterior))
        params, opt_state = _updated(parts.optimizer, gradient, state.opt_state, state.params)
        ema = parts.averages.update(state.ema, params, state.step)
        with implicit_promotion():
            rate = jnp.asarray(parts.optimizer.schedule(state.step))
        metrics = {
            "loss": total,
            "error": error,
            "psnr": jnp.mean(psnr(images, found)),
            "latent_mean": jnp.mean(posterior.mean),
            "latent_std": jnp.std(posterior.mean),
            "grad_norm": optax.tree.norm(gradient),
            "learning_rate": rate,
            **seen,
        }
        if autoencoder.stochastic:
            metrics["rate"] = kl / (jnp.log(2.0) * images[0].size)
        if loss.perceptual.on:
            metrics["perceptual"] = distance
        return TrainState(state.step + 1, params, opt_state, ema, memory), metrics

    return step


def _logits(parts: Parts, params: Any, images: Images) -> Array:
    logits: Any = parts.adversary.network.apply({"params": params}, images)
    return logits


def _adversary_step(
    parts: Parts, state: AdversaryState, started: Array, images: Images, found: Images
) -> tuple[AdversaryState, dict[str, Array]]:
    """The adversary after a step on images and their reconstructions, and its metrics."""

    def loss_of(params: Any) -> tuple[Array, tuple[Array, Array]]:
        # Each with batch norm of its own.
        real, fake = (_logits(parts, params, x) for x in (images, found))
        return started * hinge_loss(real, fake), (jnp.mean(real), jnp.mean(fake))

    optimizer = parts.adversary_optimizer
    point = optimizer.gradient_point(state.opt_state, state.params)
    (loss, (real, fake)), gradient = jax.value_and_grad(loss_of, has_aux=True)(point)
    new = _updated(optimizer, gradient, state.opt_state, state.params)
    return AdversaryState(*new), {
        "adversary_loss": loss,
        "logits_real": real,
        "logits_fake": fake,
    }


def _updated(optimizer: Optimizer, gradient: Any, opt_state: Any, params: Any) -> tuple[Any, Any]:
    """Parameters and the optimizer's state after an update."""
    with implicit_promotion():
        updates, opt_state = optimizer.transform.update(gradient, opt_state, params)
    return optax.apply_updates(params, updates), opt_state
