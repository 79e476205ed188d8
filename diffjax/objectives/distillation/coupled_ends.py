"""Distillation of a coupling: one step from each noise to the image that a flow made of it."""

from dataclasses import dataclass, replace
from typing import Any

import jax.numpy as jnp
from jax import Array
from jax.tree_util import register_dataclass

from diffjax.objectives.base import Batch, Progress, Traits
from diffjax.objectives.denoising import Noising, in_training
from diffjax.objectives.distances import MeanSquare, Metric
from diffjax.process.precond import Apply, Meaning, denoiser
from diffjax.shapes import OneKey, PerSample

SQUARE = MeanSquare()


@register_dataclass
@dataclass(frozen=True)
class CoupledEnds(Noising):
    """One step from noise to the image that a trained flow made of it: InstaFlow's second stage.

        loss = d(f(eps, t_noise), x0),     pairs (x0, eps) of a flow that is solved

    with f the clean image that the network predicts from pure noise: with the mean square, on the
    straight path, it is reflow at the one time where one step begins. The straighter the flow of
    the pairs, the less there is to learn. So they are of a flow that was reflowed
    (`objective=reflow`, on pairs of a first one), which training begins with (`config.init_from`).

    Liu et al. 2023 (arXiv:2309.06380), equation 5; Liu et al. 2022 (arXiv:2209.03003), whose code
    has it as `reflow_t_schedule="t0"`, with LPIPS for one step.

    Attributes, beside those of `Noising`, of which times and weight have no effect, and whose
    coupling is `Given` or another one of a data set of pairs:
        metric: d, `MeanSquare`, `PseudoHuber` or `Perceptual`; the last in the papers.
    """

    metric: Metric = SQUARE

    @property
    def traits(self) -> Traits:
        return replace(super().traits, meaning=Meaning.END_OF_FLOW, solver="one_step")

    def __call__(
        self,
        apply: Apply,
        params: Any,
        teacher_params: Any,
        key: OneKey,
        batch: Batch,
        progress: Progress,
    ) -> tuple[PerSample, dict[str, Array]]:
        del teacher_params, progress
        t = jnp.full(len(batch["image"]), self.path.t_noise)
        noised = self.noised(t, key, batch)
        precond = self.precond_for(noised.source)
        predict = denoiser(in_training(apply, noised.key), params, self.path, precond)
        end = predict(self.start(noised.pair.eps, noised.source), t, noised.cond).x0
        return self.metric(end, noised.pair.x0), self.metrics(noised)
