"""Distillation of a denoiser to a denoiser: of its guidance, and of two of its steps to one."""

from dataclasses import dataclass, field, replace
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jax.tree_util import register_dataclass

from diffjax.kinds import AtLeastOne
from diffjax.objectives.base import Batch, Progress, Traits
from diffjax.objectives.denoising import Denoising, Noised
from diffjax.objectives.few_step.consistency import TEACHER, FromTeacher
from diffjax.process.paths import Coeffs, Pair, coeffs, mix
from diffjax.process.precond import Apply, denoiser
from diffjax.sampling import grids
from diffjax.sampling.grids import Grid
from diffjax.shapes import OneKey, PerSample, Samples


@register_dataclass
@dataclass(frozen=True)
class GuidanceDistillation(Denoising):
    """A denoiser that predicts what a teacher predicts with guidance, in one evaluation.

        loss = w(t)·mean |net(x_t, t, c) - target(x0, eps)|²
        x0 = x0_T(c) + (scale - 1)·(x0_T(c) - x0_T(no condition)),      and eps likewise

    With the wrapper `EmbeddedGuidance`, as in the paper, each example has a scale of its own, which
    the network has as an input; without it the scale is fixed. What is distilled is a denoiser like
    any other, and the teacher of `ProgressiveDistillation`, with the same wrapper. Meng et al. 2023
    (arXiv:2210.03142), section 3.1.

    Attributes, beside those of `Noising`:
        prediction: the teacher's, with its scale of guidance.
    """

    prediction: FromTeacher = TEACHER

    @property
    def traits(self) -> Traits:
        return replace(super().traits, has_teacher=True, distils=True, guides_teacher=True)

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
        noised = self.at_random_times(key, batch)
        teacher = denoiser(apply, teacher_params, self.path, self.precond_for(noised.source))
        pair = self.prediction(teacher, noised, noised.x_t, jnp.ravel(noised.c.t))
        output = self.evaluate(apply, params, noised)
        return self.loss(noised._replace(pair=pair), output), self.metrics(noised)


@register_dataclass
@dataclass(frozen=True)
class ProgressiveDistillation(Denoising):
    """A step of DDIM that ends where two steps of a teacher do.

        z' = a'·x0_T(x_t, t) + s'·eps_T(x_t, t)             the teacher's first step, to t'
        z" = a"·x0_T(z', t') + s"·eps_T(z', t')             and its second one, to t"
        x0 = (z" - (s"/s)·x_t)/(a" - (s"/s)·a)              whose DDIM step from t ends in z"

    and `loss = w(t)·mean |net(x_t, t) - target(x0, eps)|²` with the eps that mixes with x0 to x_t.
    The times t are those of the grid that samples of `num_steps` steps take, and t' lies between
    them on the grid of twice as many. Each halving is a run: its teacher, and the weights that it
    begins with (`config.init_from`), are of the run of twice as many steps, at first of any
    denoiser. Salimans & Ho 2022 (arXiv:2202.00512), algorithm 2, with the weight
    `max(SNR, 1)` of section 4 and a network of v or x0.

    Attributes, beside those of `Noising`, whose times are not used:
        num_steps: the steps of the student's samples, by DDIM; 1 to half of the teacher's.
        grid: the times of its samples; uniform in the paper.
    """

    num_steps: AtLeastOne[int] = field(default=4, metadata={"static": True})
    grid: Grid = grids.Power()

    @property
    def traits(self) -> Traits:
        return replace(super().traits, has_teacher=True, distils=True, solver="ddim")

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
        first = 2 * jnp.floor(u * self.num_steps).astype(jnp.int32)
        times = self.grid(self.path, 2 * self.num_steps)
        t, middle, end = (times[first + i] for i in range(3))
        noised = self.noised(t, key, batch)
        teacher = denoiser(apply, teacher_params, self.path, self.precond_for(noised.source))
        x = noised.x_t
        for begin, t_to in ((t, middle), (middle, end)):
            pair = teacher(x, begin, noised.cond)
            x = mix(self._at(t_to, x), pair)
        target = jax.lax.stop_gradient(self.through(noised, self._at(end, x), x))
        output = self.evaluate(apply, params, noised)
        return self.loss(noised._replace(pair=target), output), self.metrics(noised, end)

    def through(self, noised: Noised, end: Coeffs, x: Samples) -> Pair:
        """The pair that mixes to `x_t` at its time, and to `x` at the end of the step."""
        c, ratio = noised.c, end.s / noised.c.s
        x0 = (x - ratio * noised.x_t) / (end.a - ratio * c.a)
        return Pair(x0, (noised.x_t - c.a * x0) / c.s)

    def _at(self, t: PerSample, x: Samples) -> Coeffs:
        return coeffs(self.path, t, x.ndim)
