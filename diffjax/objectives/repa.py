"""REPA: hidden tokens of a transformer are aligned with features of the clean image."""

from dataclasses import dataclass, field, replace
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import Array
from jax.nn import initializers
from jax.tree_util import register_dataclass
from jaxtyping import Float

from diffjax.errors import UserError
from diffjax.kinds import NotNegative, Positive
from diffjax.objectives.base import Batch, Objective, Progress, Traits
from diffjax.objectives.wrappers import Wrapper
from diffjax.process.paths import Scalar
from diffjax.process.precond import Apply
from diffjax.shapes import OneKey, PerSample

PROJECTOR = "projector"
"""The name of the projector's parameters, which training alone uses."""
_SMALLEST = 1e-12  # of a length, as in the authors' code

Grid = Float[Array, " batch rows columns numbers"]


class Projector(nn.Module):
    """What hidden tokens pass before they are compared: `W₃ SiLU(W₂ SiLU(W₁ x))`, with biases.

    Call with tokens `[B, rows, columns, D]`; returns `[B, rows, columns, numbers]`.

    Attributes:
        numbers: the length of a feature vector.
        hidden_size: the width of the layers between; 2,048 in REPA.
        spatial: whether it is one convolution of 3x3 tokens instead, as in iREPA.
    """

    numbers: int
    hidden_size: int
    spatial: bool

    @nn.compact
    def __call__(self, x: Array) -> Array:
        if self.spatial:
            return nn.Conv(self.numbers, (3, 3), dtype=x.dtype, name="conv")(x)
        for name in ("in", "middle"):
            x = nn.silu(self._dense(self.hidden_size, name, x.dtype)(x))
        return self._dense(self.numbers, "out", x.dtype)(x)

    def _dense(self, features: int, name: str, dtype: Any) -> nn.Dense:
        return nn.Dense(features, dtype=dtype, kernel_init=initializers.xavier_uniform(), name=name)


@register_dataclass
@dataclass(frozen=True)
class REPA(Wrapper):
    """Representation alignment: hidden tokens resemble features of the clean image.

        loss - scale·mean_tokens cos(f, projector(h))

    with tokens h after some blocks, from the noisy image, and features f of the same places in the
    clean one, from a network that is not trained, such as DINOv2. They come with the data, as
    `features [B, rows, columns, numbers]` (`experiments.encode_latents --features`, or
    `diffjax.data.featured`). The projector is trained with the network; samples do without it. Yu
    et al. 2024 (arXiv:2410.06940), equation 8.

    It goes around any objective that evaluates the network outside of a derivative in forward mode;
    of several evaluations the first one counts.

    Attributes:
        objective: the first term.
        scale: the weight of the second term; 0.5 in the paper.
        features: rows, columns and numbers of the features of an image. The rows and columns are
            those of the network's patches: 16x16 for ImageNet at 256 pixels. DINOv2 has 384 (S),
            768 (B, as in the paper) or 1,024 (L) numbers.
        depth: the number of blocks before h; 8 for L and XL and 4 for B in the paper. 0 is a
            quarter of them.
        hidden_size: the width of the projector's hidden layers.
        spatial: iREPA: the projector is one convolution of 3x3 tokens, and each number of the
            features is standardised over the tokens of its image, so that they tell places apart
            and not images. Singh et al. 2025 (arXiv:2512.10794).

    Raises:
        UserError: the features do not lie on the network's tokens, or the objective can't be
            wrapped.
    """

    objective: Objective
    scale: NotNegative[Scalar] = 0.5
    features: tuple[Positive[int], Positive[int], Positive[int]] = field(
        default=(16, 16, 768), metadata={"static": True}
    )
    depth: NotNegative[int] = field(default=0, metadata={"static": True})
    hidden_size: Positive[int] = field(default=2048, metadata={"static": True})
    spatial: bool = field(default=False, metadata={"static": True})

    @property
    def traits(self) -> Traits:
        shape: Any = tuple(self.features)
        depths = (self.depth,) if self.depth else ()
        return replace(self.objective.traits, features=shape, hidden_depths=depths)

    @property
    def projector(self) -> Projector:
        """The network between hidden tokens and features."""
        return Projector(self.features[-1], self.hidden_size, self.spatial)

    def init_params(self, key: OneKey, hidden_size: int = 1) -> dict[str, Any]:
        own = self.projector.init(key, jnp.zeros((1, 1, 1, hidden_size)))["params"]
        others = self.objective.init_params(jax.random.fold_in(key, 1), hidden_size)
        return {**others, PROJECTOR: own}

    def __call__(
        self,
        apply: Apply,
        params: Any,
        teacher_params: Any,
        key: OneKey,
        batch: Batch,
        progress: Progress,
    ) -> tuple[PerSample, dict[str, Array]]:
        if self.objective.traits.forward_mode:
            raise UserError(
                f"REPA takes hidden tokens of an evaluation, and {type(self.objective).__name__} "
                "evaluates the network within a derivative: wrap another objective"
            )
        seen = []

        def watched(*inputs: Any, **how: Any) -> Any:
            output, hidden = apply(*inputs, **{**how, "hidden": True})
            seen.append(hidden[0])
            return (output, hidden) if how.get("hidden") else output

        loss, metrics = self.objective(watched, params, teacher_params, key, batch, progress)
        return loss - self.scale * self.alignment(params[PROJECTOR], seen[0], batch), metrics

    def alignment(self, projector_params: Any, hidden: Grid, batch: Batch) -> PerSample:
        """The mean cosine between features and projected tokens, `[B]` in [-1, 1].

        Args:
            projector_params: those of the projector.
            hidden: tokens `[B, rows, columns, D]`.
            batch: with `features [B, rows, columns, numbers]`.

        Raises:
            UserError: the tokens have other rows and columns.
        """
        rows, columns, numbers = self.features
        if hidden.shape[1:3] != (rows, columns):
            there = "x".join(map(str, hidden.shape[1:3]))
            raise UserError(
                f"REPA: features={rows}x{columns}x{numbers} do not lie on the {there} tokens of "
                f"the network: take features of {there}, and say so in this wrapper's features"
            )
        found: Any = self.projector.apply({"params": projector_params}, hidden)
        target = jnp.asarray(batch["features"], jnp.float32)
        if self.spatial:
            mean = jnp.mean(target, (1, 2), keepdims=True)
            deviation = jnp.std(target, (1, 2), keepdims=True, ddof=1)
            target = (target - mean) / (deviation + 1e-6)
        cosines = jnp.sum(_unit(found.astype(jnp.float32)) * _unit(target), axis=-1)
        return jnp.mean(cosines, axis=(1, 2))


def _unit(x: Grid) -> Grid:
    """Vectors of length 1, with a gradient of 0 at a vector of zeros."""
    square = jnp.sum(jnp.square(x), axis=-1, keepdims=True)
    return x * jax.lax.rsqrt(jnp.maximum(square, _SMALLEST**2))
