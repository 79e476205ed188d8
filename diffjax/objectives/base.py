"""The interface of objectives, which the training step and sampling use."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import Array

from diffjax.conditions import Condition
from diffjax.errors import UserError
from diffjax.process.paths import Path
from diffjax.process.precond import Apply, Meaning, Precond
from diffjax.shapes import AnyShape, OneKey, OneNumber, PerSample, Samples

Batch = Mapping[str, Any]


def conditioned_batch(batch: Batch, condition: Condition) -> Batch:
    """A batch of a data set as objectives see it: with the condition of its examples as `cond`."""
    return {**batch, "cond": condition.of_batch(batch)}


def check_others(batch: Batch, what: str) -> None:
    """Refuses a batch of one example where examples of a batch are compared.

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
        num_steps: updates of the whole training, `config.num_steps`; 1 where there is no training.

    Example:
        >>> float(Progress(jnp.array(250), num_steps=1_000).fraction)
        0.25
    """

    step: Array
    memory: Any = ()
    num_steps: int = 1

    @property
    def fraction(self) -> Array:
        """The fraction of training that is done, `[]` in [0, 1], for curricula."""
        return self.step / self.num_steps


@dataclass(frozen=True)
class Traits:
    """The properties of an objective that other code needs; nothing else depends on its class.

    Attributes:
        inputs: the number of images at the network's input, concatenated along the channels.
        outputs: the number of the network's outputs per channel of an image; samplers use the
            first.
        needs_source: whether a batch must have a `source` image for each image.
        starts_at_source: whether sampling starts from a source image instead of noise.
        independent_noise: whether the noise in `x_t` is `s·eps` with eps independent of the data.
        learned_variance: whether the second output is the variance of a reverse step.
        has_teacher: whether the loss depends on the weights of `config.teacher`.
        distils: whether the teacher must be another run, a denoiser with the same path and
            preconditioning.
        copies: names of further networks that the objective trains. Each starts as a copy of the
            network's parameters, and is stored in the same tree under its name.
        network_every: the number of steps between two updates of the network. The objective's own
            parameters are updated in every step, by an optimizer of their own. 0 is one optimizer
            for all parameters.
        own_rate: the factor of the learning rate of the objective's own parameters.
        scales: the lowest and the highest scale of guidance that the network has as an input; None
            if it has no such input.
        guides_teacher: whether the loss guides its teacher, a network without that input.
        forward_mode: whether the loss has derivatives of the network in forward mode (`jax.jvp`).
        features: rows, columns and numbers of what a batch holds as `features` beside each image;
            None for nothing.
        hidden_depths: numbers of blocks of the network after which the loss takes hidden tokens,
            if it takes any; none is the network's own choice, one depth.
        meaning: what a decoded prediction is; with `AVERAGE_VELOCITY` the network has two times as
            input, otherwise one.
        solver: the default solver, a name in `diffjax.choices.SOLVERS`.
    """

    inputs: int = 1
    outputs: int = 1
    needs_source: bool = False
    starts_at_source: bool = False
    independent_noise: bool = True
    learned_variance: bool = False
    has_teacher: bool = False
    distils: bool = False
    copies: tuple[str, ...] = ()
    network_every: int = 0
    own_rate: float = 1.0
    scales: tuple[float, float] | None = None
    guides_teacher: bool = False
    forward_mode: bool = False
    features: tuple[int, int, int] | None = None
    hidden_depths: tuple[int, ...] = ()
    meaning: Meaning = Meaning.POSTERIOR_MEAN
    solver: str = "heun"


def own_params(
    objective: "Objective", key: OneKey, network: Any, hidden_size: int = 1
) -> dict[str, Any]:
    """The parameters that an objective adds to the network's, by name, and its copies.

    Args:
        objective: any.
        key: the random key of the draw.
        network: the parameters of the network, of which `Traits.copies` are copies.
        hidden_size: the width of its tokens.
    """
    copies = dict.fromkeys(objective.traits.copies, network)
    return {**objective.init_params(key, hidden_size), **copies}


def hidden_of(output: Samples, traits: Traits) -> tuple[Array, ...]:
    """Hidden tokens `[B, rows, columns, 1]` of a stand-in for a network, from its output."""
    rows, columns, _ = traits.features or (1, 1, 1)
    means = jnp.mean(output, axis=tuple(range(1, output.ndim)))
    tokens = jnp.broadcast_to(means[:, None, None, None], (len(output), rows, columns, 1))
    return (tokens,) * max(len(traits.hidden_depths), 1)


class Objective:
    """A loss per example, a function of the network, its parameters, the teacher's and a batch.

    A subclass is a frozen dataclass with `path` and `precond` (shared with sampling) and a
    `__call__`. The rest has defaults, for objectives that learn or remember nothing of their own.

    Attributes:
        path: from data to noise.
        precond: what the network predicts, and its inputs.
    """

    path: Path
    precond: Precond

    @property
    def traits(self) -> Traits:
        """The properties of this objective; by default those of a denoiser of independent noise."""
        return Traits()

    def init_params(self, key: OneKey, hidden_size: int = 1) -> dict[str, Any]:
        """Further parameters that are trained with those of the network, by name.

        Args:
            key: the random key of the draw.
            hidden_size: the width of the network's tokens, for what takes these.
        """
        del key, hidden_size
        return {}

    def init_memory(self) -> Any:
        """The memory before the first step: numbers that are kept between steps but not trained."""
        return ()

    def __call__(
        self,
        apply: Apply,
        params: Any,
        teacher_params: Any,
        key: OneKey,
        batch: Batch,
        progress: Progress,
    ) -> tuple[PerSample, dict[str, Array]]:
        """Returns the loss `[B]` and metrics `[B]`, `log_snr` among them.

        Args:
            apply: the network.
            params: live, those that the loss is differentiated by.
            teacher_params: the weights of `config.teacher`: an average, live, or those of another
                run. An objective whose loss depends on them has `Traits.has_teacher`.
            key: the random key of this step.
            batch: `image` `[B, …]`, `cond`, the condition of the examples (a tree of arrays with B
                rows), and `source` where it is needed.
            progress: how far training is.
        """
        raise NotImplementedError

    def precond_for(self, source: Samples | None) -> Precond:
        """The network's inputs for images with these sources `[B, …]`, if it has them as input."""
        del source
        return self.precond

    def noise_scale(self, t: OneNumber) -> OneNumber:
        """The standard deviation of the noise in `x_t = a·x0 + …` at `t[]`: `s`."""
        return self.path.sigma(t)

    def start(self, noise: Samples, source: Samples | None) -> Samples:
        """Where samples start, `x` at `t_noise`, from standard normal noise `[B, …]`.

        Args:
            noise: `[B, …]`.
            source: the sources, `[B, …]`, if samples start from a source.
        """
        end = noise if source is None else source
        return self.path.sigma(jnp.asarray(self.path.t_noise)) * end

    def effective_weight(self, log_snr: AnyShape) -> AnyShape:
        """The weight of the squared error of the noise per unit of log-SNR, if it is defined."""
        raise NotImplementedError(f"{type(self).__name__} is no squared error at random times")

    def update_memory(self, memory: Any, metrics: dict[str, Array]) -> Any:
        """The memory after a step, from the metrics of that step."""
        del metrics
        return memory
