"""Distribution matching: samples of few steps whose noisy distribution is a teacher's."""

from dataclasses import dataclass, field, replace
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jax.tree_util import register_dataclass

from diffjax.kinds import AtLeastOne, NotNegative, Probability
from diffjax.objectives.base import Batch, Progress, Traits
from diffjax.objectives.denoising import Denoising, Noised, in_training, pixel_mean
from diffjax.objectives.distillation.discriminator import DISCRIMINATOR, init_head, logits
from diffjax.objectives.few_step.consistency import TEACHER, FromTeacher
from diffjax.process.paths import Pair, Scalar, coeffs, mix
from diffjax.process.precond import Apply, Meaning, Predict, denoiser
from diffjax.sampling import grids
from diffjax.sampling.grids import Grid
from diffjax.shapes import OneKey, PerSample, Samples

FAKE_SCORE = "fake_score"
KARRAS = grids.Karras()


@register_dataclass
@dataclass(frozen=True)
class DistributionMatching(Denoising):
    """DMD2: a network of few steps, moved by the difference of two scores of its samples.

        x = f(noise, t_noise),   x_t = a·x + s·eps
        generator:   ½·mean |x - sg(x - g)|²,   g = (x0_fake(x_t) - x0_T(x_t))/mean |x - x0_T(x_t)|
        fake score:  the loss of a denoiser on sg(x)

    So a sample moves to where the teacher's data are denser, and from where its own are. The fake
    score is a copy of the network (`Traits.copies`), trained beside it on its samples, and updated
    in each step where the generator is in every few (`network_every`). With `config.init_from` both
    begin with the teacher's weights. Yin et al. 2024 (arXiv:2405.14867), sections 4.1 to 4.5, whose
    settings for ImageNet-64 are those here.

    Of several steps, a sample is made from that of the step before and fresh noise, as samples are
    (solver `consistency`); each example has one of the steps, with a gradient through this one.

    With `adversarial`, a discriminator of hidden tokens of the fake score tells noisy images from
    noisy samples: `softplus(-D(x_t))` is added to the generator's loss, and `softplus(D(x_t)) +
    softplus(-D(real_t))` with `discriminator_weight` to the fake score's. (The authors' head is a
    convolution of the U-Net's middle to one number; here D is the mean over places, `Head`.)

    The images of a batch are the discriminator's alone; without it they give their shape and
    conditions.

    Attributes, beside those of `Noising`, whose weight and times are the fake score's:
        prediction: the teacher's, with its scale of guidance.
        lowest: the share of times, from clean, at which scores are not compared; 0.02 in the paper.
        highest: the share up to which they are; 0.98 there.
        num_steps: steps of a sample; 1 there for ImageNet, 4 for SDXL.
        grid: the times of these steps.
        every: updates of the fake score for one of the generator; 5 there.
        scale: the weight of the generator's loss; 1.
        adversarial: the weight of the discriminator in the generator's loss; 0.003 there, 0 is off.
        discriminator_weight: its weight in the other loss; 0.01 there.
    """

    prediction: FromTeacher = TEACHER
    lowest: Probability[Scalar] = 0.02
    highest: Probability[Scalar] = 0.98
    num_steps: AtLeastOne[int] = field(default=1, metadata={"static": True})
    grid: Grid = KARRAS
    every: AtLeastOne[int] = field(default=5, metadata={"static": True})
    scale: NotNegative[Scalar] = 1.0
    adversarial: NotNegative[float] = field(default=0.0, metadata={"static": True})
    discriminator_weight: NotNegative[Scalar] = 0.01

    @property
    def traits(self) -> Traits:
        return replace(
            super().traits,
            meaning=Meaning.END_OF_FLOW,
            solver="consistency",
            has_teacher=True,
            distils=True,
            guides_teacher=True,
            copies=(FAKE_SCORE,),
            network_every=self.every,
        )

    def init_params(self, key: OneKey, hidden_size: int = 1) -> dict[str, Any]:
        if not self.adversarial:
            return {}
        return {DISCRIMINATOR: init_head(key, hidden_size)}

    def __call__(
        self,
        apply: Apply,
        params: Any,
        teacher_params: Any,
        key: OneKey,
        batch: Batch,
        progress: Progress,
    ) -> tuple[PerSample, dict[str, Array]]:
        del progress
        sample_key, score_key, fake_key, real_key = jax.random.split(key, 4)
        x = self.samples(apply, params, sample_key, batch)
        fixed = {**batch, "image": jax.lax.stop_gradient(x)}
        fake = params[FAKE_SCORE]
        direction = self.direction(apply, fake, teacher_params, score_key, fixed)
        target = jax.lax.stop_gradient(x - direction)
        loss = self.scale * 0.5 * pixel_mean(jnp.square(x - target))

        noised = self.at_random_times(fake_key, fixed)
        if not self.adversarial:
            output = self.evaluate(apply, fake, noised)
            return loss + self.loss(noised, output), self.metrics(noised)
        output, (hidden, *_) = self.evaluate(apply, fake, noised, hidden=True)
        loss = loss + self.loss(noised, output)
        head = params[DISCRIMINATOR]
        # The same noise on the sample itself, through which the gradient reaches the generator.
        seen = noised._replace(x_t=mix(noised.c, noised.pair._replace(x0=x)))
        frozen = jax.lax.stop_gradient((fake, head))
        fooled = self.realism(apply, *frozen, seen)
        real = self.realism(apply, fake, head, self.at_random_times(real_key, batch))
        wrong = jax.nn.softplus(_mean_logit(head, hidden)) + jax.nn.softplus(-real)
        loss = loss + self.adversarial * jax.nn.softplus(-fooled)
        return loss + self.discriminator_weight * wrong, self.metrics(noised)

    def samples(self, apply: Apply, params: Any, key: OneKey, batch: Batch) -> Samples:
        """Samples `[B, …]` after a random number of the steps, with the gradient of the last."""
        step_key, dropout_key, *keys = jax.random.split(key, 2 + self.num_steps)
        shape, n = batch["image"].shape, len(batch["image"])
        times = self.grid(self.path, self.num_steps)
        steps = jax.random.randint(step_key, (n,), 0, self.num_steps)
        end = self.ends(apply, params, dropout_key)
        x = self.start(jax.random.normal(keys[0], shape), batch.get("source"))
        t = jnp.full(n, times[0])
        for i in range(1, self.num_steps):
            t_to = jnp.full(n, times[i])
            pair = Pair(end(x, t, batch["cond"]).x0, jax.random.normal(keys[i], shape))
            later = jax.lax.stop_gradient(mix(coeffs(self.path, t_to, x.ndim), pair))
            goes_on = steps >= i
            x = jnp.where(jnp.reshape(goes_on, (-1,) + (1,) * (x.ndim - 1)), later, x)
            t = jnp.where(goes_on, t_to, t)
        return end(x, t, batch["cond"]).x0

    def ends(self, apply: Apply, params: Any, key: OneKey) -> Predict:
        """`(x, t, cond) ->` the pair of the end of the flow, in training mode."""
        return denoiser(in_training(apply, key), params, self.path, self.precond)

    def direction(
        self, apply: Apply, fake: Any, teacher_params: Any, key: OneKey, batch: Batch
    ) -> Samples:
        """`g`, from the teacher's prediction to the fake score's, `[B, …]`; 0 if not finite."""
        time_key, key = jax.random.split(key)
        u = self.uniforms(time_key, len(batch["image"]))
        within = self.lowest + (self.highest - self.lowest) * u
        noised = self.noised(self.times.quantile(within, self.path), key, batch)
        x_t, t = noised.x_t, jnp.ravel(noised.c.t)
        real, fakes = (
            denoiser(apply, weights, self.path, self.precond) for weights in (teacher_params, fake)
        )
        end = self.prediction(real, noised, x_t, t).x0
        axes = tuple(range(1, x_t.ndim))
        size = jnp.mean(jnp.abs(batch["image"] - end), axis=axes, keepdims=True)
        return jnp.nan_to_num((fakes(x_t, t, noised.cond).x0 - end) / size)

    def realism(self, apply: Apply, fake: Any, head: Any, noised: Noised) -> PerSample:
        """The discriminator's logits of noisy images, `[B]`."""
        return _mean_logit(head, self.evaluate(apply, fake, noised, hidden=True)[1][0])


def _mean_logit(head: Any, hidden: Array) -> PerSample:
    return jnp.mean(logits(head, hidden), axis=(1, 2))
