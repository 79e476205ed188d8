"""Latent consistency distillation: a guided denoiser to the end of its flow, in steps of a grid."""

from dataclasses import dataclass, field, replace
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jax.tree_util import register_dataclass

from diffjax.kinds import AtLeastOne, NotNegative, Positive
from diffjax.objectives.base import Batch, Progress, Traits
from diffjax.objectives.denoising import Noising, in_training, pixel_mean
from diffjax.objectives.few_step.consistency import TEACHER, FromTeacher
from diffjax.process.paths import Scalar, coeffs, mix
from diffjax.process.precond import Apply, Meaning, denoiser
from diffjax.shapes import OneKey, PerSample, Samples


@register_dataclass
@dataclass(frozen=True)
class LatentConsistency(Noising):
    """The end of the guided flow from `x_t`, the same before and after a long step of DDIM.

        loss = mean (√((f(x_t, t) - sg f(x_t', t'))² + c²) - c)
        f(x, t) = c_skip·x + c_out·x0(x, t),      h = boundary·(t - t_min)
        c_skip = sigma_data²/(h² + sigma_data²),  c_out = h/√(h² + sigma_data²)

    with t one of the last steps of `num_steps` equal parts of the path, t' one part earlier, and
    x_t' the teacher's DDIM step from x_t with guidance. So a table of 1,000 steps with 50 parts
    skips k = 20 of them. Luo et al. 2023 (arXiv:2310.04378), algorithm 1; the settings are those of
    their code for Stable Diffusion.

    The scale of guidance is drawn, and is an input of the network, by the wrapper
    `EmbeddedGuidance`; without it the scale is fixed. The authors' target is of an average of the
    student (0.95). Here it is of the student itself, as in their training of LoRA.

    Attributes, beside those of `Noising`, whose times are not used:
        num_steps: parts of the path; 50 in the authors' code.
        prediction: the teacher's, with the scale of its guidance where none is drawn; there scales
            are drawn from 3 to 15.
        huber: c; 0.001 there. With 0 it is the absolute difference.
        boundary: how fast f leaves x as time begins; 10 per step of 1,000 there.
        sigma_data: 0.5 there.
    """

    num_steps: AtLeastOne[int] = field(default=50, metadata={"static": True})
    prediction: FromTeacher = TEACHER
    huber: NotNegative[Scalar] = 0.001
    boundary: Positive[Scalar] = 10_000.0
    sigma_data: Positive[Scalar] = 0.5

    @property
    def traits(self) -> Traits:
        return replace(
            super().traits,
            meaning=Meaning.END_OF_FLOW,
            solver="consistency",
            has_teacher=True,
            distils=True,
            guides_teacher=True,
        )

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
        time_key, key = jax.random.split(key)
        u = self.uniforms(time_key, len(batch["image"]))
        part = jnp.floor(u * self.num_steps) + 1.0
        t = self.path.t_noise * part / self.num_steps
        t_to = jnp.maximum(self.path.t_noise * (part - 1.0) / self.num_steps, self.path.t_min)
        noised = self.noised(t, key, batch)
        precond = self.precond_for(noised.source)
        teacher = denoiser(apply, teacher_params, self.path, precond)
        pair = self.prediction(teacher, noised, noised.x_t, t)
        x_to = mix(coeffs(self.path, t_to, noised.x_t.ndim), pair)

        predict = denoiser(in_training(apply, noised.key), params, self.path, precond)

        def end(x: Samples, t: PerSample) -> Samples:
            return self.bounded(x, predict(x, t, noised.cond).x0, t)

        difference = end(noised.x_t, t) - jax.lax.stop_gradient(end(x_to, t_to))
        # At least 1e-6, so that the gradient at equal images is 0 and not 0/0.
        c = jnp.maximum(self.huber, 1e-6)
        weight = self.weight(noised.c, noised.k)
        huber = weight * (jnp.sqrt(jnp.square(difference) + jnp.square(c)) - c)
        return pixel_mean(huber), self.metrics(noised, t_to)

    def bounded(self, x: Samples, x0: Samples, t: PerSample) -> Samples:
        """f from the predicted x0, which is x itself at the least time."""
        h = jnp.reshape(self.boundary * (t - self.path.t_min), (-1,) + (1,) * (x.ndim - 1))
        size = jnp.square(h) + jnp.square(self.sigma_data)
        return jnp.square(self.sigma_data) / size * x + h / jnp.sqrt(size) * x0
