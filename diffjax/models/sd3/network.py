"""MMDiT: a transformer over the tokens of an image and of a text, each with its own weights."""

from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.nn import initializers
from jaxtyping import Float

from diffjax.conditions import TokenStates
from diffjax.errors import UserError
from diffjax.kinds import NotNegative, Positive
from diffjax.models.dit.block import TOKENS, modulate, modulation_of
from diffjax.models.dit.patches import patchify, positions_2d, unpatchify
from diffjax.models.dit.stages import Stage, sown_blocks, stages_of
from diffjax.models.layers.common import HIDDEN, Conditioning, Dense, compute_type
from diffjax.models.layers.context import beside, parts_of
from diffjax.models.layers.placement import constrain
from diffjax.models.layers.remat import rematerialised
from diffjax.models.layers.rotary import Rotation, rotation_of
from diffjax.models.sd3.block import Given, Joint, JointBlock, Layers, SingleBlock
from diffjax.shapes import Array, Images, NoiseLabels, Tokens

_SPAN = 64.0
"""Stored positions begin as those of a grid of 64x64 tokens, which is 1024 pixels in SD3."""


class MMDiT(nn.Module):
    """The multimodal diffusion transformer of Stable Diffusion 3.

    Patches of the image and states of a text become tokens of one width. In each of `depth` blocks
    both have dense layers and modulations of their own, and attend to all tokens of both. The
    conditioning is the sum of the embedded noise label, the text's pooled vector, and the class if
    there are classes. Gates and output are initially zero, so an untrained network returns exactly
    0. The image's tokens after a quarter of the blocks with two sequences, or `hidden_depths`, are
    sown (`HIDDEN`) by rows and columns.

    The defaults are those of a network that is trained from scratch; the options are those of
    published ones: `dual_blocks` and `stored_positions` of Stable Diffusion 3.5, the others of
    Flux, which have a class each with other defaults (`diffjax.models.flux`).

    Call with `x [B,H,W,C]`, `noise_label [B]` (floats, of the order 0 … 1000; `[B, 2]` for two
    labels), and a condition; returns `[B,H,W,C]` float32. The condition is token states
    (`diffjax.conditions.TokenStates`), or a dict of these with labels `[B]`, images that are
    concatenated with `x` in the channels, or numbers `[B, 1]`, the guidance scale to be embedded.

    Attributes:
        num_classes: the number of classes; 0 is without labels.
        patch_size: the side of a patch; divides height and width. 2 in SD3 and Flux.
        hidden_size: the width of the tokens; a multiple of `num_heads`. 64 for each block in SD3.
        depth: the number of blocks with two sequences; 24 (SD3, 3.5 Medium), 38 (3.5 Large).
        num_heads: the number of attention heads; as many as blocks in SD3.
        mlp_ratio: the hidden width of the MLPs in units of `hidden_size`; 4.
        dtype: the compute type, `"float32"` or `"bfloat16"`.
        attention: `"auto"` or a name in `diffjax.models.layers.attention.IMPLEMENTATIONS`.
        out_channels: the number of output channels; 0 means that of the input.
        scan: whether blocks of one kind are stacked, each kind with a first axis of blocks, and
            compiled once.
        remat: a name in `diffjax.models.layers.remat.REMAT`.
        qk_norm: whether queries and keys are normalised, as in 3.5 and Flux.
        dual_blocks: in how many of the first blocks the image attends to itself as well; 13 in 3.5
            Medium.
        stored_positions: the side of a grid of positions that are parameters without a gradient,
            from the middle of which an image takes its own: 192 (SD3, 3.5 Large), 384 (3.5 Medium).
            0 computes them (`positions_2d`).
        masked: whether tokens that the condition's mask excludes are attended to by none. Published
            networks were trained to attend to padding, and do not use the mask.
        single_depth: the number of blocks over both sequences as one, after the others; 38 in Flux.
        rotary_axes: the part of a head that is rotated by each axis of positions, whose sum is the
            width of a head: `(16, 56, 56)` in Flux. The axes are time, row and column, and the
            fourth, if there is one, counts the text's tokens. Without axes nothing is rotated, and
            with them there are no other positions.
        max_period: the longest period of the rotation, over 2π; 10,000, and 2,000 in Flux.2.
        embedded_guidance: the guidance scale that is embedded where the condition has no number;
            3.5 in Flux.1 Dev. 0 is a network without this embedding.
        shared_modulation: whether all blocks of one kind have the same modulations, as in Flux.2.
        bias: whether dense layers have biases.
        mlp: a name in `diffjax.models.layers.mlps.MLPS`.
        hidden_depths: numbers of blocks after which tokens are sown; () is a quarter of them.

    Raises:
        UserError: the patch does not divide the image, the heads do not divide the width, the axes
            of rotation are not the width of a head, or the condition has no token states.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> net = MMDiT(hidden_size=32, depth=2, num_heads=2)
        >>> text = TokenStates(jnp.ones((2, 3, 8)), jnp.ones((2, 3), bool), jnp.ones((2, 5)))
        >>> x, t = jnp.ones((2, 8, 8, 4)), jnp.ones(2)
        >>> jax.jit(net.init_with_output)(jax.random.key(0), x, t, text)[0].shape
        (2, 8, 8, 4)

    References:
        Esser et al., "Scaling Rectified Flow Transformers for High-Resolution Image Synthesis",
        2024, arXiv:2403.03206
    """

    num_classes: int = 0
    patch_size: Positive[int] = 2
    hidden_size: Positive[int] = 384
    depth: Positive[int] = 6
    num_heads: Positive[int] = 6
    mlp_ratio: Positive[float] = 4.0
    dtype: str = "float32"
    attention: str = "auto"
    out_channels: NotNegative[int] = 0
    scan: bool = False
    remat: str = "none"
    qk_norm: bool = False
    dual_blocks: NotNegative[int] = 0
    stored_positions: NotNegative[int] = 0
    masked: bool = False
    single_depth: NotNegative[int] = 0
    rotary_axes: tuple[Positive[int], ...] = ()
    max_period: Positive[float] = 10_000.0
    embedded_guidance: NotNegative[float] = 0.0
    shared_modulation: bool = False
    bias: bool = True
    mlp: str = "gelu"
    hidden_depths: tuple[Positive[int], ...] = ()

    @nn.compact
    def __call__(
        self,
        x: Images,
        noise_label: NoiseLabels,
        cond: Any = None,
        train: bool = False,
    ) -> Float[Array, " batch height width out"]:
        del train
        _, height, width, channels = x.shape
        labels, text, images, numbers = parts_of(cond, takes_numbers=True)
        if text is None:
            raise UserError("MMDiT takes token states, and this condition has none")
        self._check(height, width)
        p = self.patch_size
        grid = height // p, width // p
        c = self._conditioned(noise_label, labels, text, numbers)
        h = self._dense(self.hidden_size, "patch_embedding")(patchify(beside(x, images), p))
        if not self.rotary_axes:
            h = h + self._positions(*grid).astype(h.dtype)[None]
        context = self._dense(self.hidden_size, "context_embedding")(text.states)
        length = context.shape[1]
        given = Given(c, self._rotation(*grid, length), self._mask(text, h))

        tokens = Joint(constrain(h, *TOKENS), constrain(context, *TOKENS))
        names = {name: name for name in ("modulation", "context_modulation")}
        given = self._with_shared(given, 6, **names)
        for stage in self.joint_stages:
            tokens = self._run(stage, tokens, given, grid)
        h = tokens.image
        for stage in self.single_stages:
            both = jnp.concatenate([tokens.context, tokens.image], axis=1)
            given = self._with_shared(given, 3, modulation="single_modulation")
            h = self._run(stage, constrain(both, *TOKENS), given, grid)[:, length:]

        layers, name = self._layers, "final_modulation"
        h = modulate(layers.normed(h), *layers.modulations(given, 2, self.hidden_size, name))
        channels = self.out_channels or channels
        h = self._dense(p * p * channels, "final_out", initializers.zeros)(h)
        return unpatchify(h, p, height, width).astype(jnp.float32)

    @property
    def joint_stages(self) -> list[Stage]:
        """The blocks with two sequences, by kind: dual ones, others, and the last of a text."""
        starts = [self.dual_blocks] + ([] if self.single_depth else [self.depth - 1])
        return stages_of(self.depth, *starts)

    @property
    def single_stages(self) -> list[Stage]:
        """The blocks over both sequences as one, which are numbered on."""
        end = self.depth + self.single_depth
        return [Stage(self.depth, end)] if self.single_depth else []

    @property
    def _layers(self) -> Layers:
        return Layers(
            num_heads=self.num_heads,
            mlp_ratio=self.mlp_ratio,
            dtype=self.dtype,
            attention=self.attention,
            mlp=self.mlp,
            qk_norm=self.qk_norm,
            bias=self.bias,
        )

    def _dense(self, features: int, name: str, init: Any = None) -> nn.Dense:
        return Dense(
            features,
            use_bias=self.bias,
            dtype=compute_type(self.dtype),
            kernel_init=init or initializers.xavier_uniform(),
            name=name,
        )

    def _conditioned(
        self,
        noise_label: jax.Array,
        labels: jax.Array | None,
        text: TokenStates,
        numbers: jax.Array | None,
    ) -> Float[Array, " batch width"]:
        """The sum of the embedded noise label, class, pooled vector and guidance scale."""
        width = self.hidden_size
        how: Any = {"dtype": self.dtype, "bias": self.bias}
        embed = Conditioning(self.num_classes, width, **how, name="conditioning")
        c = embed(noise_label, labels).vector
        if self.embedded_guidance:
            scale = jnp.full(len(c), self.embedded_guidance) if numbers is None else numbers[:, 0]
            c = c + Conditioning(0, width, **how, name="guidance")(1000.0 * scale, None).vector
        elif numbers is not None:
            raise UserError("MMDiT: a network without embedded_guidance takes no numbers")
        if text.pooled.shape[-1]:
            hidden = nn.silu(self._dense(width, "pooled_hidden")(text.pooled))
            c = c + self._dense(width, "pooled_out")(hidden)
        return c

    def _positions(self, height: int, width: int) -> jax.Array:
        """Positions of the tokens, `[height·width, D]`."""
        side = self.stored_positions
        if not side:
            return jnp.asarray(positions_2d(height, width, self.hidden_size))

        def init(key: Any, shape: tuple[int, int], dtype: Any) -> jax.Array:
            del key
            return jnp.asarray(positions_2d(side, side, shape[1], spacing=_SPAN / side), dtype)

        stored = self.param("positions", init, (side**2, self.hidden_size), jnp.float32)
        table = jax.lax.stop_gradient(stored).reshape(side, side, -1)
        top, left = (side - height) // 2, (side - width) // 2
        return table[top : top + height, left : left + width].reshape(height * width, -1)

    def _rotation(self, height: int, width: int, length: int) -> Rotation | None:
        axes = len(self.rotary_axes)
        if not axes:
            return None
        positions = np.zeros((length + height * width, axes))
        positions[length:, 1], positions[length:, 2] = np.divmod(np.arange(height * width), width)
        if axes > 3:
            positions[:length, 3] = np.arange(length)
        return rotation_of(positions, self.rotary_axes, self.max_period)

    def _mask(self, text: TokenStates, h: Tokens) -> jax.Array | None:
        if not self.masked:
            return None
        both = jnp.concatenate([text.mask, jnp.ones(h.shape[:2], bool)], axis=1)
        return both[:, None, None, :]

    def _with_shared(self, given: Given, parts: int, **names: str) -> Given:
        """Modulations that all following blocks share, if they do, by the names in a block."""
        if not self.shared_modulation:
            return given
        layers = {
            own: self._layers.modulation(parts, self.hidden_size, name)
            for own, name in names.items()
        }
        c = given.conditioning
        return given._replace(shared={own: modulation_of(x, c) for own, x in layers.items()})

    def _sow(self, image: jax.Array, grid: tuple[int, int]) -> None:
        self.sow(*HIDDEN, image.reshape(-1, *grid, self.hidden_size))

    def _run(self, stage: Stage, tokens: Any, given: Given, grid: tuple[int, int]) -> Any:
        """The tokens after the blocks of a stage, one after the other or in a loop."""
        if not self.scan:
            for i, name in enumerate(stage.blocks, stage.start):
                tokens = self._block(stage, name)(tokens, given)
                if i in sown_blocks(self.depth, self.hidden_depths):
                    self._sow(tokens.image, grid)
            return tokens
        # Carried through the loop only if they are needed: each is as large as the tokens.
        sown = [
            i for i in sown_blocks(self.depth, self.hidden_depths) if stage.start <= i < stage.stop
        ]
        if not self.is_mutable_collection(HIDDEN[0]):
            sown = []

        def body(block: Any, carry: Any, given: Given, place: jax.Array) -> tuple[Any, None]:
            tokens, hidden = carry
            tokens = block(tokens, given, place)
            here = [place[i - stage.start] for i in sown]
            hidden = [jnp.where(at, tokens.image, x) for at, x in zip(here, hidden, strict=True)]
            return (tokens, hidden), None

        given_and_place: Any = (nn.broadcast, 0)
        count = stage.stop - stage.start
        loop = nn.scan(
            body,
            variable_axes={"params": 0},
            split_rngs={"params": True, "dropout": True},
            in_axes=given_and_place,
            length=count,
        )
        places = jnp.eye(count, dtype=bool)
        carry = tokens, [tokens.image for _ in sown]
        (tokens, hidden), _ = loop(self._block(stage, stage.stack), carry, given, places)
        for each in hidden:
            self._sow(each, grid)
        return tokens

    def _block(self, stage: Stage, name: str) -> Any:
        how: Any = {"prevent_cse": not self.scan}
        if stage.start >= self.depth:
            return rematerialised(SingleBlock, self.remat, **how)(self._layers, name=name)
        return rematerialised(JointBlock, self.remat, **how)(
            self._layers,
            dual=stage.stop <= self.dual_blocks,
            context_ends=stage.stop == self.depth and not self.single_depth,
            name=name,
        )

    def check_mesh(self, input_shape: tuple[int, int, int], sizes: Mapping[str, int]) -> None:
        """Refuses a mesh whose `tensor` axis does not divide the heads.

        Args:
            input_shape: `(H, W, C)` of the network's input.
            sizes: the sizes of the mesh's axes, by name.

        Raises:
            UserError: it does not divide them.
        """
        del input_shape
        if self.num_heads % sizes.get("tensor", 1):
            raise UserError(
                f"MMDiT: mesh.tensor={sizes['tensor']} does not divide the {self.num_heads} heads"
            )

    def _check(self, height: int, width: int) -> None:
        p, side = self.patch_size, self.stored_positions
        if p < 1 or height % p or width % p:
            raise UserError(f"MMDiT: patch_size={p} does not divide an image of {height}x{width}")
        if self.hidden_size % self.num_heads or self.hidden_size % 4:
            raise UserError(
                f"MMDiT: hidden_size={self.hidden_size} has to be a multiple of 4 and of "
                f"num_heads={self.num_heads}"
            )
        if side and max(height, width) > p * side:
            raise UserError(
                f"MMDiT: an image of {height}x{width} is larger than its stored positions: the "
                f"longest side is {p * side}"
            )
        if self.dual_blocks > self.depth:
            raise UserError(
                f"MMDiT: dual_blocks={self.dual_blocks} is more than depth={self.depth}"
            )
        if max(self.hidden_depths, default=0) > self.depth:
            raise UserError(
                f"MMDiT: hidden_depths={tuple(self.hidden_depths)} is more than depth={self.depth}"
            )
        axes, head = self.rotary_axes, self.hidden_size // self.num_heads
        if axes and (len(axes) not in (3, 4) or sum(axes) != head):
            raise UserError(
                f"MMDiT: rotary_axes={tuple(axes)} have to be three or four numbers whose sum is "
                f"the width of a head, {head}"
            )
