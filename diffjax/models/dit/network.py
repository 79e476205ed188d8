"""DiT: the diffusion transformer, conditioned by adaptive layer norm (adaLN-zero)."""

import math
from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.nn import initializers
from jaxtyping import Bool, Float

from diffjax.conditions import TokenStates
from diffjax.errors import UserError
from diffjax.kinds import Decay, NotNegative, Positive
from diffjax.models.context import CrossAttention, beside, parts_of
from diffjax.models.layers import (
    HIDDEN,
    STACKED,
    Conditioning,
    Dense,
    SelfAttention,
    Sinusoids,
    compute_type,
)
from diffjax.models.placement import BATCH, constrain, of_whole_groups
from diffjax.models.remat import rematerialised
from diffjax.shapes import Array, Images, NoiseLabels, OneKey, Tokens

TOKENS = (BATCH, "sequence", None)
"""The sharding of tokens `[B, T, D]` between layers: whole vectors, as layer norms need them."""


def patchify(x: Images, patch_size: int) -> Float[Array, " batch tokens numbers"]:
    """Splits images `[B,H,W,C]` into tokens `[B, (H/p)·(W/p), p·p·C]`, row by row.

    Example:
        >>> import jax.numpy as jnp
        >>> patchify(jnp.zeros((1, 8, 8, 3)), 2).shape
        (1, 16, 12)
    """
    batch, height, width, channels = x.shape
    p = patch_size
    x = x.reshape(batch, height // p, p, width // p, p, channels)
    return x.swapaxes(2, 3).reshape(batch, (height // p) * (width // p), p * p * channels)


def unpatchify(
    tokens: Float[Array, " batch tokens numbers"], patch_size: int, height: int, width: int
) -> Float[Array, " batch {height} {width} channels"]:
    """Joins tokens `[B, (H/p)·(W/p), p·p·C]` to images `[B,H,W,C]`: the inverse of `patchify`.

    Example:
        >>> import jax.numpy as jnp
        >>> unpatchify(jnp.zeros((1, 16, 12)), 2, height=8, width=8).shape
        (1, 8, 8, 3)
    """
    p = patch_size
    tokens = tokens.reshape(tokens.shape[0], height // p, width // p, p, p, -1)
    return tokens.swapaxes(2, 3).reshape(tokens.shape[0], height, width, -1)


def positions_2d(height: int, width: int, features: int) -> np.ndarray:
    """Fixed sinusoidal position embeddings of a grid, one row per token, row by row.

        [sin(ω_i x), cos(ω_i x), sin(ω_i y), cos(ω_i y)]        ω_i = 10000^(−i / n),  n = D / 4

    with `x` the column and `y` the row of the token, counted from 0.

    Args:
        height: the number of rows of tokens.
        width: the number of columns of tokens.
        features: the width D of a token, a multiple of 4.

    Returns:
        `[height·width, features]` float32.

    Example:
        >>> positions_2d(1, 1, 8)
        array([[0., 0., 1., 1., 0., 0., 1., 1.]], dtype=float32)

    References:
        Peebles & Xie, "Scalable Diffusion Models with Transformers", 2022, arXiv:2212.09748
    """
    quarter = features // 4
    frequencies = 10_000.0 ** (-np.arange(quarter) / quarter)
    row, column = np.divmod(np.arange(height * width), width)
    waves = [wave(at[:, None] * frequencies) for at in (column, row) for wave in (np.sin, np.cos)]
    return np.concatenate(waves, axis=-1).astype(np.float32)


def _norm(x: jax.Array, dtype: jnp.dtype, epsilon: float = 1e-6) -> jax.Array:
    """Layer norm without parameters; the modulation after it is the affine map."""
    # Flax promotes half precision implicitly, which a user's flags may refuse.
    with jax.numpy_dtype_promotion("standard"):
        return nn.LayerNorm(epsilon=epsilon, use_bias=False, use_scale=False, dtype=dtype)(x)


def _modulate(x: jax.Array, shift: jax.Array, scale: jax.Array) -> jax.Array:
    return x * (1 + scale[:, None]) + shift[:, None]


class DiTBlock(nn.Module):
    """A DiT block: attention and MLP, each with a modulated norm and a gate that is initially 0.

        x ← x + g₁ · attention(norm(x)·(1 + s₁) + b₁)
        x ← x + g₂ · mlp(norm(x)·(1 + s₂) + b₂)        (b₁, s₁, g₁, b₂, s₂, g₂) = W SiLU(c)

    With token states as `context`, cross-attention comes between the two: `x ← x + cross(norm(x))`.

    Call with tokens `[B, T, D]`, conditioning `[B, D]`, a key if there is dropout, for stacked
    blocks the one-hot `place [depth]` of this block, and the context; returns `[B, T, D]`.
    """

    num_heads: int
    mlp_ratio: float
    dropout: float
    dtype: str
    attention: str
    mlp_norm_eps: float = 1e-6

    @nn.compact
    def __call__(
        self,
        x: Tokens,
        c: Float[Array, " batch width"],
        key: OneKey | None = None,
        place: Bool[Array, " depth"] | None = None,
        context: TokenStates | None = None,
    ) -> Tokens:
        dtype = compute_type(self.dtype)
        width = x.shape[-1]
        modulation = of_whole_groups(
            nn.Dense(6 * width, dtype=dtype, kernel_init=initializers.zeros, name="modulation"),
            nn.silu(c),
        )
        shift_1, scale_1, gate_1, shift_2, scale_2, gate_2 = jnp.split(modulation, 6, axis=-1)
        drop = nn.Dropout(self.dropout, deterministic=key is None)
        key_1, key_2 = (None, None) if key is None else jax.random.split(key)

        h = _modulate(_norm(x, dtype), shift_1, scale_1)
        h = SelfAttention(self.num_heads, self.attention, self.dtype, name="attention")(h, place)
        x = x + gate_1[:, None] * drop(h, rng=key_1)
        if context is not None:
            cross = CrossAttention(self.num_heads, self.dtype, name="cross_attention")
            x = x + cross(_norm(x, dtype), context)

        h = _modulate(_norm(x, dtype, self.mlp_norm_eps), shift_2, scale_2)
        h = MLP(int(width * self.mlp_ratio), self.dtype, name="mlp")(h)
        return constrain(x + gate_2[:, None] * drop(h, rng=key_2), *TOKENS)


class MLP(nn.Module):
    """The MLP `down(GELU(up(x)))` on every token, with the tanh approximation of GELU."""

    hidden_size: int
    dtype: str

    @nn.compact
    def __call__(self, x: Tokens) -> Tokens:
        dtype = compute_type(self.dtype)
        xavier = initializers.xavier_uniform()
        h = Dense(self.hidden_size, dtype=dtype, kernel_init=xavier, name="up")(x)
        h = nn.gelu(h, approximate=True)
        return Dense(x.shape[-1], dtype=dtype, kernel_init=xavier, name="down")(h)


class DiT(nn.Module):
    """The diffusion transformer (DiT) with adaLN-zero conditioning.

    A dense layer turns patches into tokens. The tokens get fixed 2-D position embeddings, pass
    `depth` blocks that are modulated by noise label and class, and become patches again. Gates and
    output are initially zero, so an untrained network returns exactly 0. The tokens after a quarter
    of the blocks are sown (`HIDDEN`). Stacked blocks (`scan`) compute the same function and compile
    in the time of one block; `stack_blocks` and `unstack_blocks` convert parameters between the two
    layouts.

    Call with `x [B,H,W,C]`, `noise_label [B]` (floats, of the order 0 … 1000; `[B, 2]` for two
    labels, see `Conditioning`), a condition, and `train=True` with `rngs={"dropout": key}` if there
    is dropout; returns `[B,H,W,C]` float32.

    The condition is labels `[B] int32` (`num_classes` is the null label, which is also used for
    None); token states (`diffjax.conditions.TokenStates`), to which each block attends, and whose
    pooled vector is added to the conditioning; images `[B,H,W,C]`, which are concatenated with `x`
    in the channels; or a dict of these.

    Attributes:
        num_classes: the number of classes; 0 is without labels.
        patch_size: the side of a patch in pixels; divides height and width. 2, 4 or 8 in the paper.
        hidden_size: the width of the tokens; a multiple of 4 and of `num_heads`. 384 (S) to 1152
            (XL) in the paper.
        depth: the number of blocks; 12 (S, B) to 28 (XL).
        num_heads: the number of attention heads; 6 (S) to 16 (L, XL).
        mlp_ratio: the hidden width of the MLP in units of `hidden_size`; 4 in the paper.
        dropout: the fraction of activations dropped after attention and MLP in training; 0 in the
            paper.
        dtype: the compute type, `"float32"` or `"bfloat16"`; parameters are always float32.
        attention: `"auto"` or a name in `diffjax.models.attention.IMPLEMENTATIONS`.
        out_channels: the number of output channels; 0 means that of the input.
        scan: whether the parameters of all blocks are stacked under `blocks`, with first axis
            `depth`, and the program is a loop over one block. Otherwise each block is `block_i` and
            is compiled separately.
        remat: a name in `diffjax.models.remat.REMAT`: which activations a block keeps.
        frequency_endpoint: whether the lowest of the 128 frequencies of the noise label is
            1 / 10,000, as in diffusers, or one step above it, as in the paper.
        mlp_norm_eps: epsilon of the norm before each MLP; 1e-6 in the paper, 1e-5 in diffusers.

    Raises:
        UserError: the patch does not divide the image, the heads do not divide the width, or the
            width is not a multiple of 4.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> net = DiT(num_classes=10, hidden_size=32, depth=1, num_heads=2)
        >>> x, t, label = jnp.ones((2, 8, 8, 1)), jnp.ones(2), jnp.array([3, 10])
        >>> out, variables = jax.jit(net.init_with_output)(jax.random.key(0), x, t, label)
        >>> out.shape
        (2, 8, 8, 1)

    References:
        Peebles & Xie, "Scalable Diffusion Models with Transformers", 2022, arXiv:2212.09748
    """

    num_classes: int
    patch_size: Positive[int] = 2
    hidden_size: Positive[int] = 384
    depth: Positive[int] = 12
    num_heads: Positive[int] = 6
    mlp_ratio: Positive[float] = 4.0
    dropout: Decay[float] = 0.0
    dtype: str = "float32"
    attention: str = "auto"
    out_channels: NotNegative[int] = 0
    scan: bool = False
    remat: str = "none"
    frequency_endpoint: bool = False
    mlp_norm_eps: Positive[float] = 1e-6

    @nn.compact
    def __call__(
        self,
        x: Images,
        noise_label: NoiseLabels,
        cond: Any = None,
        train: bool = False,
    ) -> Float[Array, " batch height width out"]:
        _, height, width, channels = x.shape
        self._check(height, width)
        dtype, p = compute_type(self.dtype), self.patch_size
        xavier = initializers.xavier_uniform()

        labels, tokens, images = parts_of(cond)
        conditioning = Conditioning(
            self.num_classes,
            self.hidden_size,
            frequencies=Sinusoids(endpoint=self.frequency_endpoint),
            dtype=self.dtype,
            name="conditioning",
        )
        c = conditioning(noise_label, labels)
        if tokens is not None and tokens.pooled.shape[-1]:
            # Without a bias, so that the null condition, a vector of zeros, adds nothing.
            pooled = nn.Dense(
                self.hidden_size,
                use_bias=False,
                dtype=dtype,
                kernel_init=initializers.zeros,
                name="pooled",
            )
            c = c + pooled(tokens.pooled)
        patches = patchify(beside(x, images), p)
        h = Dense(self.hidden_size, dtype=dtype, kernel_init=xavier, name="patch_embedding")(
            patches
        )
        h = h + jnp.asarray(positions_2d(height // p, width // p, self.hidden_size), dtype)[None]
        h = constrain(h, *TOKENS)
        keys = None
        if train and self.dropout:
            keys = jax.random.split(self.make_rng("dropout"), self.depth)
        h, hidden = (self._scanned if self.scan else self._unrolled)(h, c, keys, tokens)
        self.sow(*HIDDEN, hidden)

        final = nn.Dense(
            2 * self.hidden_size,
            dtype=dtype,
            kernel_init=initializers.zeros,
            name="final_modulation",
        )
        modulation = of_whole_groups(final, nn.silu(c))
        h = _modulate(_norm(h, dtype), *jnp.split(modulation, 2, axis=-1))
        channels = self.out_channels or channels
        h = Dense(p * p * channels, dtype=dtype, kernel_init=initializers.zeros, name="final_out")(
            h
        )
        return unpatchify(h, p, height, width).astype(jnp.float32)

    def _unrolled(
        self, h: jax.Array, c: jax.Array, keys: jax.Array | None, context: TokenStates | None
    ) -> tuple[jax.Array, jax.Array]:
        """The tokens after all blocks, and after a quarter of them."""
        hidden = h
        for i in range(self.depth):
            h = self._block(f"block_{i}")(h, c, None if keys is None else keys[i], None, context)
            hidden = h if i == self._quarter else hidden
        return h, hidden

    def _scanned(
        self, h: jax.Array, c: jax.Array, keys: jax.Array | None, context: TokenStates | None
    ) -> tuple[jax.Array, jax.Array]:
        """The same as `_unrolled`, as a loop over one block."""
        # Carried through the loop only if it is needed: it is as large as the tokens.
        sown = self.is_mutable_collection(HIDDEN[0])

        def body(
            block: DiTBlock,
            carry: tuple[jax.Array, jax.Array | None],
            c: jax.Array,
            key: jax.Array | None,
            place: jax.Array,
            context: TokenStates | None,
        ) -> tuple[tuple[jax.Array, jax.Array | None], None]:
            h, hidden = carry
            h = block(h, c, key, place, context)
            if hidden is not None:
                hidden = jnp.where(place[self._quarter], h, hidden)
            return (h, hidden), None

        per_block: Any = (nn.broadcast, 0, 0, nn.broadcast)
        loop = nn.scan(
            body,
            variable_axes={"params": 0},
            split_rngs={"params": True},
            in_axes=per_block,
            length=self.depth,
        )
        places = jnp.eye(self.depth, dtype=bool)
        (h, hidden), _ = loop(
            self._block(STACKED), (h, h if sown else None), c, keys, places, context
        )
        return h, h if hidden is None else hidden

    @property
    def _quarter(self) -> int:
        return (self.depth - 1) // 4

    def _block(self, name: str) -> DiTBlock:
        # `prevent_cse` stops XLA from merging the recomputation with the forward pass. In a loop
        # that can't happen, and the barrier would cost memory.
        block = rematerialised(DiTBlock, self.remat, prevent_cse=not self.scan)
        return block(
            self.num_heads,
            self.mlp_ratio,
            self.dropout,
            self.dtype,
            self.attention,
            self.mlp_norm_eps,
            name=name,
        )

    def check_mesh(self, input_shape: tuple[int, int, int], sizes: Mapping[str, int]) -> None:
        """Refuses a mesh whose `tensor` or `sequence` axis does not divide the heads or the tokens.

        Args:
            input_shape: `(H, W, C)` of the network's input.
            sizes: the sizes of the mesh's axes, by name.

        Raises:
            UserError: an axis does not fit; the message has the sizes that do.
        """
        height, width, _ = input_shape
        tokens = (height // self.patch_size) * (width // self.patch_size)
        for axis, what, count in (
            ("tensor", "heads", self.num_heads),
            ("sequence", "tokens", tokens),
        ):
            if count % sizes.get(axis, 1):
                raise UserError(
                    f"DiT: mesh.{axis}={sizes[axis]} does not divide the {count} {what}; sizes "
                    f"that do: {_divisors(count)}"
                )

    def _check(self, height: int, width: int) -> None:
        if self.patch_size < 1 or height % self.patch_size or width % self.patch_size:
            raise UserError(
                f"DiT: patch_size={self.patch_size} does not divide an image of {height}x{width}; "
                f"sizes that do: {_divisors(math.gcd(height, width))}"
            )
        if self.hidden_size < 4 or self.hidden_size % 4:
            raise UserError(f"DiT: hidden_size={self.hidden_size} is not a multiple of 4")
        if not 1 <= self.hidden_size * self.mlp_ratio < 2**31:
            raise UserError(
                f"DiT: mlp_ratio={self.mlp_ratio:g} makes an MLP with a width of "
                f"{self.hidden_size * self.mlp_ratio:g}; 4 is usual"
            )


def stack_blocks(params: dict[str, Any]) -> dict[str, Any]:
    """Converts the parameters of a `DiT` to those of the same network with `scan=True`.

    Example:
        >>> import jax.numpy as jnp
        >>> stack_blocks({"block_0": {"w": jnp.zeros(2)}, "block_1": {"w": jnp.ones(2)}, "end": 1})
        {'end': 1, 'blocks': {'w': Array([[0., 0.], [1., 1.]], dtype=float32)}}
    """
    names = [f"block_{i}" for i in range(sum(name.startswith("block_") for name in params))]
    blocks = jax.tree.map(lambda *leaves: jnp.stack(leaves), *(params[name] for name in names))
    return {**{k: v for k, v in params.items() if k not in names}, STACKED: blocks}


def unstack_blocks(params: dict[str, Any]) -> dict[str, Any]:
    """Converts the parameters of a `DiT` with `scan=True` to those without: inverts `stack_blocks`.

    Example:
        >>> import jax.numpy as jnp
        >>> list(unstack_blocks({"blocks": {"w": jnp.zeros((2, 3))}}))
        ['block_0', 'block_1']
    """
    depth = jax.tree.leaves(params[STACKED])[0].shape[0]
    rest = {name: value for name, value in params.items() if name != STACKED}
    return rest | {
        f"block_{i}": jax.tree.map(lambda leaf, i=i: leaf[i], params[STACKED]) for i in range(depth)
    }


def _divisors(n: int) -> str:
    return ", ".join(str(d) for d in range(1, n + 1) if n % d == 0)
