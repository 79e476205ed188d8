"""MLPs on every token, by name."""

from collections.abc import Mapping

import flax.linen as nn
import jax
from jax.nn import initializers
from jax.nn.initializers import Initializer
from jaxtyping import Float

from diffjax.models.layers.common import Dense, compute_type
from diffjax.shapes import Array, Tokens


class MLP(nn.Module):
    """The MLP `down(GELU(up(x)))`, with the tanh approximation of GELU.

    Attributes:
        hidden_size: the number of hidden units.
        dtype: the compute type.
        bias: whether its layers have biases.
        kernel_init: the initializer of its layers.
        down: whether there is the layer down; otherwise the hidden units are returned.
    """

    hidden_size: int
    dtype: str = "float32"
    bias: bool = True
    kernel_init: Initializer = initializers.xavier_uniform()
    down: bool = True

    @nn.compact
    def __call__(self, x: Tokens) -> Float[Array, " batch tokens features"]:
        h = self.activation(self._dense(self.hidden_size, "up")(x))
        return self._dense(x.shape[-1], "down")(h) if self.down else h

    def activation(self, x: jax.Array) -> jax.Array:
        """The nonlinearity of the hidden units."""
        return nn.gelu(x, approximate=True)

    def _dense(self, features: int, name: str) -> nn.Module:
        dtype = compute_type(self.dtype)
        return Dense(
            features, use_bias=self.bias, dtype=dtype, kernel_init=self.kernel_init, name=name
        )


class ExactMLP(MLP):
    """The MLP `down(GELU(up(x)))`, with the exact GELU, by the error function."""

    def activation(self, x: jax.Array) -> jax.Array:
        return nn.gelu(x, approximate=False)


class SwiGLU(MLP):
    """The gated MLP `down(SiLU(gate(x)) · up(x))` (Shazeer 2020, arXiv:2002.05202).

    It has two thirds of `hidden_size` hidden units, and so about as many parameters as an MLP.
    """

    @nn.compact
    def __call__(self, x: Tokens) -> Float[Array, " batch tokens features"]:
        hidden_size = self.hidden_size * 2 // 3
        gate, up = self._dense(hidden_size, "gate")(x), self._dense(hidden_size, "up")(x)
        h = nn.silu(gate) * up
        return self._dense(x.shape[-1], "down")(h) if self.down else h


class GEGLU(MLP):
    """The gated MLP `down(GELU(gate(x)) · up(x))`, with the exact GELU (Shazeer 2020)."""

    @nn.compact
    def __call__(self, x: Tokens) -> Tokens:
        up, gate = (self._dense(self.hidden_size, name)(x) for name in ("up", "gate"))
        return self._dense(x.shape[-1], "down")(nn.gelu(gate, approximate=False) * up)


MLPS: Mapping[str, type[MLP]] = {
    "gelu": MLP,
    "gelu_exact": ExactMLP,
    "swiglu": SwiGLU,
    "geglu": GEGLU,
}
"""MLPs by name."""
