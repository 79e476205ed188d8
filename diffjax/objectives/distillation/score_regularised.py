"""rCM: a distilled consistency model whose samples have the teacher's distribution too."""

from dataclasses import dataclass, field, replace
from typing import Any

import jax
from jax import Array
from jax.tree_util import register_dataclass

from diffjax.kinds import AtLeastOne, NotNegative
from diffjax.objectives.base import Batch, Progress, Traits
from diffjax.objectives.distillation.distribution_matching import DistributionMatching
from diffjax.objectives.few_step.consistency import TEACHER, FromData, FromTeacher
from diffjax.objectives.few_step.continuous_consistency import ContinuousConsistency
from diffjax.process import times
from diffjax.process.paths import Scalar
from diffjax.process.precond import Apply
from diffjax.process.times import Times
from diffjax.sampling import grids
from diffjax.sampling.grids import Grid
from diffjax.shapes import OneKey, PerSample

UNIFORM, SCORE_TIMES = grids.Power(), times.LogNormal(0.0, 1.6)


@register_dataclass
@dataclass(frozen=True)
class ScoreRegularised(ContinuousConsistency):
    """sCD and distribution matching in one loss: `loss of sCD + scale·(generator's loss)`.

    Consistency follows the teacher from one image to the next and keeps what differs between
    them; distribution matching of its samples sharpens what consistency blurs. The fake score is
    trained beside (`DistributionMatching`), and the network is updated in every few steps.

    Zheng et al. 2025 (arXiv:2510.08431), with the settings of the authors' code: there the loss of
    sCD counts 100 times as a sum over pixels, and the other one once, without the half of this one.
    Their network has its samples at random times; here the times are those of `grid`, which they
    have as an option. (In warm-up their tangent has `a·√(1 - r²s²)` where this one has a².)

    Attributes, beside those of `ContinuousConsistency`, whose prediction is the teacher's:
        scale: the weight of the generator's loss; 0.02 is the authors' 1 to 100.
        score_times: the density of times at which scores are compared; log σ ~ N(0, 1.6²) there.
        num_steps: steps of a sample; 4 there.
        grid: the times of these steps.
        every: steps from one update of the network to the next; 5 there.
    """

    prediction: FromData | FromTeacher = TEACHER
    scale: NotNegative[Scalar] = 0.02
    score_times: Times = SCORE_TIMES
    num_steps: AtLeastOne[int] = field(default=4, metadata={"static": True})
    grid: Grid = UNIFORM
    every: AtLeastOne[int] = field(default=5, metadata={"static": True})

    @property
    def traits(self) -> Traits:
        other = self.matching.traits
        return replace(
            super().traits,
            has_teacher=True,
            distils=True,
            guides_teacher=True,
            copies=other.copies,
            network_every=other.network_every,
        )

    @property
    def matching(self) -> DistributionMatching:
        """The distribution matching, at all times of its density."""
        return DistributionMatching(
            self.path,
            self.precond,
            self.weight,
            self.score_times,
            self.uniforms,
            self.coupling,
            prediction=self.prediction,  # pyright: ignore[reportArgumentType]
            lowest=0.0,
            highest=1.0,
            num_steps=self.num_steps,
            grid=self.grid,
            every=self.every,
            scale=self.scale,
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
        own, other = jax.random.split(key)
        loss, metrics = super().__call__(apply, params, teacher_params, own, batch, progress)
        matched, _ = self.matching(apply, params, teacher_params, other, batch, progress)
        return loss + matched, metrics
