"""DiT: the diffusion transformer, and the options of those that followed it."""

import math
from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.nn import initializers
from jaxtyping import Float

from diffjax.conditions import TokenStates
from diffjax.errors import UserError, nearest
from diffjax.kinds import Decay, NotNegative, Positive
from diffjax.models.dit.block import TOKENS, DiTBlock, Given, Own, modulate, modulation_of
from diffjax.models.dit.patches import patchify, positions_2d, unpatchify
from diffjax.models.dit.stages import Stage, sown_blocks, stages_of
from diffjax.models.layers.common import (
    HIDDEN,
    Conditioning,
    Dense,
    Embeddings,
    Sinusoids,
    compute_type,
)
from diffjax.models.layers.context import beside, parts_of
from diffjax.models.layers.norms import norm
from diffjax.models.layers.placement import BATCH, constrain
from diffjax.models.layers.remat import rematerialised
from diffjax.models.layers.rotary import rotation_2d
from diffjax.shapes import Array, Images, NoiseLabels, Tokens

POSITIONS = ("fixed", "learned", "none")
"""Absolute positions, which are added to the patches: sines and cosines (`positions_2d`), learned
for one size of images, or none."""


class DiT(nn.Module):
    """The diffusion transformer (DiT) with adaLN-zero conditioning.

    A dense layer turns patches into tokens. The tokens get fixed 2-D position embeddings, pass
    `depth` blocks that are modulated by noise label and class, and become patches again. Gates and
    output are initially zero, so an untrained network returns exactly 0. The tokens after a quarter
    of the blocks, or after `hidden_depths`, are sown (`HIDDEN`) by rows and columns. Stacked blocks
    (`scan`) compute the same function and compile in the time of one block; `stack_blocks` and
    `unstack_blocks` convert parameters between the two layouts.

    The defaults are DiT's. The options are those of later networks, which have a class each with
    other defaults: `LightningDiT`, `JiT`, `DDT`, `UViT`. They combine freely, but for the errors
    below.

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
        attention: `"auto"` or a name in `diffjax.models.layers.attention.IMPLEMENTATIONS`.
        out_channels: the number of output channels; 0 means that of the input.
        scan: whether the parameters of all blocks are stacked under `blocks`, with first axis
            `depth`, and the program is a loop over one block. Otherwise each block is `block_i` and
            is compiled separately. A network with several `stages` has a stack for each.
        remat: a name in `diffjax.models.layers.remat.REMAT`: which activations a block keeps.
        frequency_endpoint: whether the lowest frequency of the noise label is 1 / `max_period`, as
            in diffusers, or one step above it, as in the paper.
        mlp_norm_eps: the `ε` of the norm before each MLP; 1e-6, or 1e-5 in diffusers and U-ViT.
        norm: a name in `diffjax.models.layers.norms.NORMS`, of the norms of the blocks.
        final_norm: that of the norm after them; "" is the same.
        norm_eps: the `ε` of the other norms; 1e-6, or 1e-5 in U-ViT.
        mlp: a name in `diffjax.models.layers.mlps.MLPS`.
        mlp_bias: whether the MLPs have biases.
        qkv_bias: whether queries, keys and values have biases.
        qk_norm: whether queries and keys are normalised.
        positions: absolute positions, a name in `POSITIONS`.
        rotary: whether queries and keys are rotated by row and column
            (`diffjax.models.layers.rotary`).
        rotary_span: rows and columns are counted 0, 1, 2, …, or from 0 to this; 16 in DDT.
        null_row: whether the null label has an embedding of its own, or none. Published networks
            that were trained with the class alone have none, and can't be guided by it.
        max_period: the longest period of the embedding of noise labels, over 2π.
        bottleneck: the width between the two dense layers that embed a patch; 0 is one layer.
        num_registers: learned tokens before the patches, which belong to none of them (Darcet et
            al. 2023, arXiv:2309.16588); 4 is usual.
        num_class_tokens: in-context class tokens before the patches: copies of the embedded class,
            each with a learned vector added to it; 32 in JiT. The conditioning has the class too.
        class_tokens_from: the number of the block before which they come; 4 (B) to 10 (H) in JiT.
        encoder_depth: the number of blocks that encode the condition, of a decoupled network; with
            0 the network is not decoupled. The tokens `z` after them condition the others: these
            begin with patches that are embedded again, and are modulated by `c = time + z` for each
            token. 22 of 28 in DDT.
        conditioning: what the noise label and the class are: `"modulation"` of all blocks, or
            `"tokens"` before the patches, as in U-ViT. Then blocks have no gates, and attend to no
            token states.
        long_skips: whether each block of the second half takes what the block opposite to it
            returned; of an odd number of blocks.
        final_conv: whether the output passes a last convolution of 3x3 pixels.
        dropout_middle: whether `dropout` is in the middle half of the blocks alone, as in JiT.
        hidden_depths: numbers of blocks after which tokens are sown; () is a quarter of them.
        base_width: the width of the network for which the learning rate was found, from which muP
            transfers it (`diffjax.optimizers.mup`); 0 is the standard parametrisation. At
            `hidden_size` both are the same.
        base_head_width: with muP, the width of a head of that network where it grows with the
            network's; 0 where wider networks have more heads of the same width.

    Raises:
        UserError: the patch does not divide the image, the heads do not divide the width, the
            width is not a multiple of 4, or two options exclude each other: long skips take an odd
            number of blocks, one length of tokens and no encoder; class tokens come within the
            encoder.

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
    norm: str = "layer"
    final_norm: str = ""
    norm_eps: Positive[float] = 1e-6
    mlp: str = "gelu"
    mlp_bias: bool = True
    qkv_bias: bool = True
    qk_norm: bool = False
    positions: str = "fixed"
    rotary: bool = False
    rotary_span: NotNegative[float] = 0.0
    null_row: bool = True
    max_period: Positive[float] = 10_000.0
    bottleneck: NotNegative[int] = 0
    num_registers: NotNegative[int] = 0
    num_class_tokens: NotNegative[int] = 0
    class_tokens_from: NotNegative[int] = 0
    encoder_depth: NotNegative[int] = 0
    conditioning: str = "modulation"
    long_skips: bool = False
    final_conv: bool = False
    dropout_middle: bool = False
    hidden_depths: tuple[Positive[int], ...] = ()
    base_width: NotNegative[int] = 0
    base_head_width: NotNegative[int] = 0

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

        labels, context, images, _ = parts_of(cond)
        embedded = Conditioning(
            self.num_classes,
            self.hidden_size,
            dtype=self.dtype,
            frequencies=Sinusoids(self.frequency_endpoint, max_period=self.max_period),
            null_row=self.null_row,
            layers=self._modulated,
            out_init=initializers.normal(0.02 * self._hidden_scale),
            name="conditioning",
        )(noise_label, labels)
        c = self._conditioned(embedded, context)
        patches = patchify(beside(x, images), p)
        grid = (height // p, width // p)
        h = self._embedded(patches, "patch_embedding", grid)
        before = self._tokens_before(embedded)
        h, count = _after(before, h)
        keys = None
        if train and self.dropout:
            keys = jax.random.split(self.make_rng("dropout"), self.depth)
        skips: list[jax.Array] = []
        for stage in self.stages:
            if stage.start == self.encoder_depth and self.encoder_depth:
                c = embedded.time[:, None] + h[:, count:]
                h, count = self._embedded(patches, "decoder_embedding", grid), 0
            if stage.start == self.class_tokens_from and self.num_class_tokens:
                h, new = _after([self._class_tokens(embedded, len(h))], h)
                count += new
            rotation = None
            if self.rotary:
                head_width = self.hidden_size // self.num_heads
                rotation = rotation_2d(*grid, head_width, self.rotary_span, count)
            run = self._scanned if self.scan else self._unrolled
            own_keys = keys if self._drops(stage) else None
            h, hidden = run(stage, h, Given(c, context, rotation), own_keys, skips)
            for tokens in hidden:
                tokens = tokens[:, count:] if count else tokens
                self.sow(*HIDDEN, tokens.reshape(-1, *grid, self.hidden_size))
        h = h[:, count:] if count else h

        kind = self.final_norm or self.norm
        h = norm(kind, dtype, self.norm_eps, not self._modulated, "final_norm")(h)
        if c is not None:
            final = nn.Dense(
                2 * self.hidden_size,
                dtype=dtype,
                kernel_init=initializers.zeros,
                name="final_modulation",
            )
            h = modulate(h, *jnp.split(modulation_of(final, c), 2, axis=-1))
        channels = self.out_channels or channels
        h = Dense(p * p * channels, dtype=dtype, kernel_init=initializers.zeros, name="final_out")(
            h
        )
        out = unpatchify(h, p, height, width)
        if self.final_conv:
            # Of images split by rows and columns XLA returned the kernel's gradient twice.
            out = constrain(out, BATCH, None, None, None)
            out = nn.Conv(channels, (3, 3), dtype=dtype, name="final_conv")(out)
            out = constrain(out, BATCH, None, None, None)
        return out.astype(jnp.float32)

    @property
    def stages(self) -> list[Stage]:
        """The stages of the network: where one begins, tokens, conditioning or dropout change."""
        starts = [self.encoder_depth]
        if self.dropout_middle:
            starts += self._middle
        if self.num_class_tokens:
            starts.append(self.class_tokens_from)
        if self.long_skips:
            starts += [self.depth // 2, self.depth // 2 + 1]
        return stages_of(self.depth, *starts)

    @property
    def _middle(self) -> list[int]:
        """The first block of the middle half, and the first one after it."""
        return [self.depth // 4, self.depth // 4 * 3]

    def _drops(self, stage: Stage) -> bool:
        first, end = self._middle
        return not self.dropout_middle or first <= stage.start < end

    @property
    def _modulated(self) -> bool:
        return self.conditioning == "modulation"

    def _conditioned(
        self, embedded: Embeddings, context: TokenStates | None
    ) -> Float[Array, " batch width"] | None:
        """What modulates the blocks: noise label, class and pooled token states."""
        if not self._modulated:
            return None
        c = embedded.vector
        if context is not None and context.pooled.shape[-1]:
            # Without a bias, so that the null condition, a vector of zeros, adds nothing.
            pooled = nn.Dense(
                self.hidden_size,
                use_bias=False,
                dtype=compute_type(self.dtype),
                kernel_init=initializers.zeros,
                name="pooled",
            )
            c = c + pooled(context.pooled)
        return c

    def _embedded(
        self, patches: Float[Array, " batch tokens numbers"], name: str, grid: tuple[int, int]
    ) -> Tokens:
        """Patches as tokens, with absolute positions."""
        dtype, h = compute_type(self.dtype), patches
        init = initializers.xavier_uniform() if self._modulated else initializers.normal(0.02)
        narrow_init = init
        if self._modulated and self.base_width:
            # As wide as the first layer of the base network: what a pixel adds does not shrink.
            init = xavier_of(self.base_width)
        if self.bottleneck:
            narrow = name.replace("embedding", "bottleneck")
            h = Dense(
                self.bottleneck, use_bias=False, dtype=dtype, kernel_init=narrow_init, name=narrow
            )(h)
        h = Dense(self.hidden_size, dtype=dtype, kernel_init=init, name=name)(h)
        if self.positions == "fixed":
            h = h + jnp.asarray(positions_2d(*grid, self.hidden_size), dtype)[None]
        if self.positions == "learned":
            h = h + self._learned(name.replace("embedding", "positions"), grid[0] * grid[1])
        return constrain(h, *TOKENS)

    def _tokens_before(self, embedded: Embeddings) -> list[jax.Array]:
        """The tokens before the patches in the first block, `[B, n, D]` each."""
        before = []
        if not self._modulated:
            label = [] if embedded.label is None else [embedded.label]
            tokens = jnp.stack([*label, *embedded.times], axis=1)
            before.append(tokens + self._learned("conditioning_positions", tokens.shape[1]))
        if self.num_registers:
            registers = self._learned("registers", self.num_registers)
            shape = (len(embedded.times[0]), *registers.shape[1:])
            before.append(jnp.broadcast_to(registers, shape))
        return before

    def _class_tokens(self, embedded: Embeddings, batch: int) -> Tokens:
        own = self._learned("class_tokens", self.num_class_tokens)
        if embedded.label is None:
            return jnp.broadcast_to(own, (batch, *own.shape[1:]))
        return embedded.label[:, None] + own

    def _learned(self, name: str, count: int) -> Float[Array, " one tokens width"]:
        """Learned vectors, `[1, count, D]`."""
        shape = (count, self.hidden_size)
        vectors = self.param(name, initializers.normal(0.02), shape, jnp.float32)
        return vectors.astype(compute_type(self.dtype))[None]

    def _unrolled(
        self,
        stage: Stage,
        h: Tokens,
        given: Given,
        keys: jax.Array | None,
        skips: list[jax.Array],
    ) -> tuple[Tokens, list[Tokens]]:
        """The tokens after a stage, and after those of its blocks that are sown."""
        hidden = []
        for i in range(stage.start, stage.stop):
            key = None if keys is None else keys[i]
            skip = skips.pop() if self._takes_skips(stage) else None
            h = self._block(f"block_{i}")(h, given, Own(key, None, skip))
            if self._leaves_skips(stage):
                skips.append(h)
            if i in sown_blocks(self.depth, self.hidden_depths):
                hidden.append(h)
        return h, hidden

    def _scanned(
        self,
        stage: Stage,
        h: Tokens,
        given: Given,
        keys: jax.Array | None,
        skips: list[jax.Array],
    ) -> tuple[Tokens, list[Tokens]]:
        """The same as `_unrolled`, as a loop over one block."""
        # Carried through the loop only if they are needed: each is as large as the tokens.
        sown = [
            i for i in sown_blocks(self.depth, self.hidden_depths) if stage.start <= i < stage.stop
        ]
        if not self.is_mutable_collection(HIDDEN[0]):
            sown = []

        def body(
            block: DiTBlock, carry: tuple[Tokens, list[Tokens]], given: Given, own: Own
        ) -> tuple[tuple[Tokens, list[Tokens]], Tokens | None]:
            h, hidden = carry
            h = block(h, given, own)
            if own.place is not None:
                here = [own.place[i - stage.start] for i in sown]
                hidden = [jnp.where(at, h, x) for at, x in zip(here, hidden, strict=True)]
            return (h, hidden), h if self._leaves_skips(stage) else None

        given_and_own: Any = (nn.broadcast, 0)
        loop = nn.scan(
            body,
            variable_axes={"params": 0},
            split_rngs={"params": True, "dropout": True},
            in_axes=given_and_own,
            length=stage.stop - stage.start,
        )
        places = jnp.eye(stage.stop - stage.start, dtype=bool)
        own = Own(
            None if keys is None else keys[stage.start : stage.stop],
            places,
            jnp.flip(skips.pop(), axis=0) if self._takes_skips(stage) else None,
        )
        (h, hidden), left = loop(self._block(stage.stack), (h, [h] * len(sown)), given, own)
        if left is not None:
            skips.append(left)
        return h, hidden

    def _leaves_skips(self, stage: Stage) -> bool:
        return self.long_skips and stage.stop <= self.depth // 2

    def _takes_skips(self, stage: Stage) -> bool:
        return self.long_skips and stage.start > self.depth // 2

    def _block(self, name: str) -> DiTBlock:
        # `prevent_cse` stops XLA from merging the recomputation with the forward pass. In a loop
        # that can't happen, and the barrier would cost memory.
        block = rematerialised(DiTBlock, self.remat, prevent_cse=not self.scan)
        return block(
            mlp_norm_eps=self.mlp_norm_eps,
            num_heads=self.num_heads,
            mlp_ratio=self.mlp_ratio,
            dropout=self.dropout,
            dtype=self.dtype,
            attention=self.attention,
            norm=self.norm,
            norm_eps=self.norm_eps,
            mlp=self.mlp,
            mlp_bias=self.mlp_bias,
            qkv_bias=self.qkv_bias,
            qk_norm=self.qk_norm,
            base_head_width=self.base_head_width if self.base_width else 0,
            hidden_scale=self._hidden_scale,
            name=name,
        )

    @property
    def base(self) -> "DiT | None":
        """The network of `base_width`, whose shapes muP compares; None without muP.

        Raises:
            UserError: `base_width` is no multiple of the width of a head.
        """
        if not self.base_width:
            return None
        head_width = self.base_head_width or self.hidden_size // self.num_heads
        if self.base_width % head_width:
            raise UserError(
                f"DiT: base_width={self.base_width} is no multiple of the {head_width} numbers of "
                "a head: set num_heads, or base_head_width where heads grow with the width"
            )
        heads = self.base_width // head_width
        return self.clone(hidden_size=self.base_width, num_heads=heads)

    @property
    def _hidden_scale(self) -> float:
        """The factor of the initial deviation of a hidden layer that does not have it by itself."""
        return math.sqrt(self.base_width / self.hidden_size) if self.base_width else 1.0

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
        tokens += self.num_registers
        if not self._modulated:
            tokens += 1 + bool(self.num_classes)
        counts = [("tensor", "heads", self.num_heads), ("sequence", "tokens", tokens)]
        if self.num_class_tokens:
            counts.append(("sequence", "tokens", tokens + self.num_class_tokens))
        for axis, what, count in counts:
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
        for name, value, known in (
            ("positions", self.positions, POSITIONS),
            ("conditioning", self.conditioning, ("modulation", "tokens")),
        ):
            if value not in known:
                raise UserError(f"DiT: {name}={value!r} is unknown; {nearest(value, known)}")
        self._check_stages()

    def _check_stages(self) -> None:
        """Refuses options that exclude each other, and numbers of blocks that are not there."""
        late = self.class_tokens_from if self.num_class_tokens else 0
        if max(self.hidden_depths, default=0) > self.depth:
            raise UserError(
                f"DiT: there are no tokens after {max(self.hidden_depths)} blocks in a network of "
                f"depth={self.depth}"
            )
        for name, number in (("encoder_depth", self.encoder_depth), ("class_tokens_from", late)):
            if number >= self.depth:
                raise UserError(f"DiT: {name}={number} is not below depth={self.depth}")
        if self.long_skips and not self.depth % 2:
            raise UserError(
                f"DiT: long_skips take an odd number of blocks, not depth={self.depth}: "
                f"{self.depth + 1} has one in the middle"
            )
        if self.long_skips and (late or self.encoder_depth):
            raise UserError(
                "DiT: long_skips join blocks of the same tokens, so class_tokens_from and "
                "encoder_depth have to be 0"
            )
        if self.encoder_depth and (late >= self.encoder_depth or not self._modulated):
            raise UserError(
                f"DiT: a network with encoder_depth={self.encoder_depth} takes "
                "conditioning='modulation', and class_tokens_from below that"
            )


def xavier_of(fan_out: int) -> initializers.Initializer:
    """Xavier's uniform initializer as for a layer of `fan_out` outputs, whatever it has.

        W ~ U(-√(6/(fan_in + fan_out)), √(6/(fan_in + fan_out)))

    Args:
        fan_out: the outputs of the layer that it is scaled for.
    """
    xavier = initializers.xavier_uniform()

    def init(key: Any, shape: Any, *how: Any, **further: Any) -> jax.Array:
        own, wanted = shape[-2] + shape[-1], shape[-2] + fan_out
        return xavier(key, shape, *how, **further) * math.sqrt(own / wanted)

    return init


def _after(before: list[jax.Array], h: jax.Array) -> tuple[jax.Array, int]:
    """Tokens after others, and the number of those."""
    if not before:
        return h, 0
    count = sum(tokens.shape[1] for tokens in before)
    return constrain(jnp.concatenate([*before, h], axis=1), *TOKENS), count


def _divisors(n: int) -> str:
    return ", ".join(str(d) for d in range(1, n + 1) if n % d == 0)
