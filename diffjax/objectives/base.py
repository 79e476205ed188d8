"""What every objective offers, so that one training step serves them all."""

from collections.abc import Mapping
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import Array

from diffjax.conditions import Condition
from diffjax.errors import UserError
from diffjax.process.paths import Path
from diffjax.process.precond import Apply, Precond
from diffjax.shapes import AnyShape, OneKey, OneNumber, PerSample, Samples

Batch = Mapping[str, Any]


def with_condition(batch: Batch, condition: Condition) -> Batch:
    """A batch of a data set as objectives see it: with the condition of its examples as `cond`."""
    return {**batch, "cond": condition.of_batch(batch)}


def check_others(batch: Batch, what: str) -> None:
    """Refuses a batch of one for what compares or joins the examples of a batch.

    Raises:
        UserError: there is no other example.
    """
    if len(batch["image"]) < 2:
        raise UserError(f"{what} needs other examples of the batch: batch_size must be at least 2")


class Progress(NamedTuple):
    """How far training is.

    Attributes:
        step: `[]`, updates made so far.
        memory: what the objective remembers of earlier steps.
    """

    step: Array
    memory: Any = ()


class Objective:
    """A loss per example; everything that an objective may need is handed to it.

    A subclass is a frozen dataclass with `path` and `precond` (shared with sampling) and a
    `__call__`. The rest has defaults, for objectives that learn or remember nothing of their own.

    Attributes:
        path: from data to noise.
        precond: what the network predicts and how it is asked.
        inputs: images that the network sees, one after the other in the channels.
        outputs: outputs of the network for each channel of an image; samplers use the first.
        needs_source: whether a batch must hold the other end of each image, its `source`.
        starts_at_source: whether samples too are made from a source, and not from noise.
        independent_noise: whether the noise in `x_t` is `s·eps` with eps drawn for each image by
            itself.
        learned_variance: whether the second output says the variance of a reverse step.
        flow_map: whether the network is asked about the way between two times, and not about one.
        forward_mode: whether the loss has derivatives of the network in forward mode (`jax.jvp`).
    """

    path: Path
    precond: Precond
    inputs: int = 1
    outputs: int = 1
    needs_source: bool = False
    starts_at_source: bool = False
    independent_noise: bool = True
    learned_variance: bool = False
    flow_map: bool = False
    forward_mode: bool = False

    def init_params(self, key: OneKey) -> dict[str, Any]:
        """Parameters that are trained beside the network's, under names of their own."""
        del key
        return {}

    def init_memory(self) -> Any:
        """What is remembered from step to step without being trained, before the first step."""
        return ()

    def __call__(
        self,
        apply: Apply,
        params: Any,
        ema_params: Any,
        key: OneKey,
        batch: Batch,
        progress: Progress,
    ) -> tuple[PerSample, dict[str, Array]]:
        """Returns the loss `[B]` and metrics `[B]`, `log_snr` among them.

        Args:
            apply: the network.
            params: live, those that the loss is differentiated by.
            ema_params: averaged by the first of `config.ema_decays`; live where none is kept.
            key: of this step.
            batch: `image` `[B, …]`, `cond`, the condition of the examples (a tree of arrays with B
                rows), and `source` where it is needed.
            progress: how far training is.
        """
        raise NotImplementedError

    def precond_for(self, source: Samples | None) -> Precond:
        """How the network is asked about images with these sources `[B, …]`, if it sees them."""
        del source
        return self.precond

    def noise_scale(self, t: OneNumber) -> OneNumber:
        """What standard normal noise is multiplied by in `x_t = a·x0 + …` at `t[]`: `s`."""
        return self.path.sigma(t)

    def start(self, noise: Samples, source: Samples | None) -> Samples:
        """Where samples start, `x` at `t_noise`, from standard normal noise `[B, …]`.

        Args:
            noise: `[B, …]`.
            source: what samples are made from, `[B, …]`, where they start at a source.
        """
        end = noise if source is None else source
        return self.path.sigma(jnp.asarray(self.path.t_noise)) * end

    def effective_weight(self, log_snr: AnyShape) -> AnyShape:
        """What a unit of log-SNR pays for each squared error of the noise, if that is defined."""
        raise NotImplementedError(f"{type(self).__name__} is no squared error at random times")

    def update_memory(self, memory: Any, metrics: dict[str, Array]) -> Any:
        """The memory after a step, from the metrics of that step."""
        del metrics
        return memory
