"""Adversarial distillation: images of one step that a teacher's features can't tell from data."""

from dataclasses import dataclass, field, replace
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jax.tree_util import register_dataclass

from diffjax.errors import UserError
from diffjax.kinds import AtLeastOne, NotNegative, Positive, Probability
from diffjax.objectives.base import Batch, Progress, Traits
from diffjax.objectives.denoising import Noising, in_training
from diffjax.objectives.distillation.discriminator import (
    DISCRIMINATOR,
    gradient_penalty,
    hinge,
    init_head,
    logits,
)
from diffjax.process.paths import Scalar
from diffjax.process.precond import Apply, Meaning, denoiser
from diffjax.sampling import grids
from diffjax.sampling.grids import Grid
from diffjax.shapes import OneKey, OneNumber, PerSample

UNIFORM = grids.Power()


@register_dataclass
@dataclass(frozen=True)
class LatentAdversarial(Noising):
    """LADD: a discriminator of a frozen denoiser's hidden tokens judges the ends of one step.

        x = f(x_t, t),     x_t = a·x0 + s·eps with t one of the steps of a sample
        network:  -mean_k D_k(h_k(x_u)),     x_u = a·x + s·eps' with u ~ times
        heads:    mean_k [max(0, 1 - D_k(h_k(y_u))) + max(0, 1 + D_k(h_k(sg x_u)))
                          + penalty·‖∂D_k/∂h_k(y_u)‖²],     y_u of the image x0 likewise

    with the teacher's tokens h_k after some of its blocks, and a head D_k on each. The noise level
    u decides what is judged: the composition at high noise, the texture at low. Nothing else ties
    an end to the teacher; the weights that training begins with (`config.init_from`) are its own.
    Samples of several steps add fresh noise to each end (solver `consistency`).

    Each example has one of the steps. The heads are trained beside the network, by an optimizer of
    their own. The value of the loss, a sum of both, says little.

    Sauer et al. 2024 (arXiv:2403.12015), the recipe of SD3-Turbo, whose data are samples of the
    teacher with guidance (as `experiments.reflow` draws them), and hinge loss and penalty those of
    Sauer et al. 2023 (arXiv:2311.17042), equations 2 and 3. The authors have published no code.
    Their heads also take the noise level and a pooled text; the tokens have seen both.

    Attributes, beside those of `Noising`, whose times are u and whose weight has no effect here:
        depths: numbers of blocks of the teacher after which a head is; each of them in the paper,
            whose network has 24 or 38. Without any, there is one head, where the network has it.
        penalty: 1e-5 in the papers.
        num_steps: steps of a sample; 4 in the paper.
        grid: the times of these steps; evenly from noise to data there.
        first: the share of examples that have the first step, from pure noise; the others are
            shared evenly. 0.7 there.
        warmup: the fraction of training before which only the less noisy half of the steps is
            drawn; 500 steps there, 0 draws all from the start.
        every: updates of the heads for one of the network; 1 there.
        head_rate: the learning rate of the heads in units of the network's (two time scales, Heusel
            et al. 2017, arXiv:1706.08500). Heads that begin with drawn weights have to be faster
            than a trained network in short trainings: 20 on digits (docs/objectives.md).
    """

    depths: tuple[Positive[int], ...] = field(default=(), metadata={"static": True})
    penalty: NotNegative[Scalar] = 1e-5
    num_steps: AtLeastOne[int] = field(default=4, metadata={"static": True})
    grid: Grid = UNIFORM
    first: Probability[Scalar] = 0.7
    warmup: Probability[Scalar] = 0.0
    every: AtLeastOne[int] = field(default=1, metadata={"static": True})
    head_rate: Positive[float] = field(default=1.0, metadata={"static": True})

    @property
    def traits(self) -> Traits:
        return replace(
            super().traits,
            meaning=Meaning.END_OF_FLOW,
            solver="consistency",
            has_teacher=True,
            distils=True,
            network_every=self.every,
            own_rate=self.head_rate,
            hidden_depths=tuple(self.depths),
        )

    def init_params(self, key: OneKey, hidden_size: int = 1) -> dict[str, Any]:
        keys = jax.random.split(key, len(self.depths) or 1)
        heads = {f"head_{i}": init_head(each, hidden_size) for i, each in enumerate(keys)}
        return {DISCRIMINATOR: heads}

    def __call__(
        self,
        apply: Apply,
        params: Any,
        teacher_params: Any,
        key: OneKey,
        batch: Batch,
        progress: Progress,
    ) -> tuple[PerSample, dict[str, Array]]:
        step_key, key, fake_key, real_key = jax.random.split(key, 4)
        t = self.steps(step_key, len(batch["image"]), progress.fraction)
        noised = self.noised(t, key, batch)
        precond = self.precond_for(noised.source)
        predict = denoiser(in_training(apply, noised.key), params, self.path, precond)
        x = predict(noised.x_t, t, noised.cond).x0

        fake = self.tokens(apply, teacher_params, fake_key, {**batch, "image": x})
        real = self.tokens(apply, teacher_params, real_key, batch)
        heads = [params[DISCRIMINATOR][f"head_{i}"] for i in range(len(self.depths) or 1)]
        if len(heads) != len(real):
            raise UserError(
                f"ladd has {len(heads)} heads, and the network returns hidden tokens after "
                f"{len(real)} of its blocks: leave out what wraps the loss"
            )
        losses = [self.of_head(*each) for each in zip(heads, real, fake, strict=True)]
        return jnp.mean(jnp.stack(losses), axis=0), self.metrics(noised)

    def steps(self, key: OneKey, n: int, fraction: OneNumber) -> PerSample:
        """Times `[n]`, each that of a step of a sample, when this fraction of training is done."""
        place = jnp.arange(self.num_steps)
        usual = jnp.where(place == 0, self.first, (1.0 - self.first) / max(self.num_steps - 1, 1))
        late = jnp.where(place >= self.num_steps // 2, 1.0, 0.0)
        shares = jnp.where(fraction < self.warmup, late, usual)
        drawn = jax.random.categorical(key, jnp.log(shares), shape=(n,))
        return jnp.asarray(self.grid(self.path, self.num_steps))[drawn]

    def tokens(self, apply: Any, teacher_params: Any, key: OneKey, batch: Batch) -> list[Array]:
        """The teacher's hidden tokens `[B, rows, columns, D]` of the images at random times."""
        noised = self.at_random_times(key, batch)
        inputs = self.precond_for(noised.source).inputs(noised.c, noised.x_t)
        return list(apply(teacher_params, *inputs, noised.cond, hidden=True)[1])

    def of_head(self, head: Any, real: Array, fake: Array) -> PerSample:
        """The loss of one head, and of the network by it."""
        fooled = jnp.mean(logits(jax.lax.stop_gradient(head), fake), axis=(1, 2))
        wrong = hinge(logits(head, real), logits(head, jax.lax.stop_gradient(fake)))
        return wrong + self.penalty * gradient_penalty(head, real) - fooled
