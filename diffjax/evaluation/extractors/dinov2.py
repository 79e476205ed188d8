"""DINOv2 vision transformers as feature extractors (Oquab et al. 2023, arXiv:2304.07193).

Fréchet distances on their class token agree better with human judgement than those on Inception
features (Stein et al. 2023, arXiv:2306.04675). The networks are only for inference.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from PIL import Image

from diffjax.data import to_uint8
from diffjax.errors import UserError, nearest
from diffjax.evaluation.extractors.features import (
    Extractor,
    as_rgb,
    check_shapes,
    pretrained,
    with_params,
)
from diffjax.models.attention import batched
from diffjax.pretrained.downloads import read_weights
from diffjax.pretrained.torch_files import StateDict, read_state_dict

SIZE = 224
PATCH = 14
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # of ImageNet, for pixels in [0, 1]
_EPSILON = 1e-6


class Dinov2(nn.Module):
    """The DINOv2 transformer, with layer scale and optional registers (arXiv:2309.16588).

    Attributes:
        width: width of a token.
        depth: number of blocks.
        num_heads: number of attention heads.
        num_registers: number of extra tokens that belong to no patch; 0 or 4.
    """

    width: int
    depth: int
    num_heads: int
    num_registers: int = 0

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Computes the class token after the last normalisation.

        Args:
            x: `[B, 14 G, 14 G, 3]`, normalised: `(pixels - MEAN) / STD`.

        Returns:
            `[B, width]`.
        """
        zeros, width = nn.initializers.zeros, self.width
        x = nn.Conv(width, (PATCH, PATCH), (PATCH, PATCH), "VALID", name="patches")(x)
        x = x.reshape(len(x), -1, width)
        first = self.param("class_token", zeros, (1, width))
        x = jnp.concatenate([_repeated(first, len(x)), x], 1)
        x = x + self.param("positions", zeros, x.shape[1:])[None]
        if self.num_registers:
            registers = self.param("registers", zeros, (self.num_registers, width))
            x = jnp.concatenate([x[:, :1], _repeated(registers, len(x)), x[:, 1:]], 1)
        for i in range(self.depth):
            x = Block(self.num_heads, name=f"block_{i}")(x)
        return _norm("norm")(x[:, 0])


class Block(nn.Module):
    """A transformer block: `x + γ₁ attention(norm x)`, then `x + γ₂ mlp(norm x)`."""

    num_heads: int

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        batch, length, width = x.shape
        qkv = nn.Dense(3 * width, name="qkv")(_norm("norm1")(x))
        qkv = qkv.reshape(batch, length, 3, self.num_heads, -1)
        attended = batched(qkv[:, :, 0], qkv[:, :, 1], qkv[:, :, 2]).reshape(x.shape)
        scale = self.param("scale1", nn.initializers.ones, (width,))
        x = x + scale[None, None] * nn.Dense(width, name="proj")(attended)
        hidden = nn.Dense(4 * width, name="fc1")(_norm("norm2")(x))
        hidden = nn.Dense(width, name="fc2")(nn.gelu(hidden, approximate=False))
        scale = self.param("scale2", nn.initializers.ones, (width,))
        return x + scale[None, None] * hidden


@dataclass(frozen=True)
class Variant:
    """A published DINOv2 network.

    Attributes:
        width: width of a token.
        depth: number of blocks.
        num_heads: number of attention heads.
        sha256: hex digest of its file of weights.
        num_registers: number of registers, 0 or 4.
    """

    width: int
    depth: int
    num_heads: int
    sha256: str
    num_registers: int = 0

    @property
    def network(self) -> Dinov2:
        """The Flax module of this variant."""
        return Dinov2(self.width, self.depth, self.num_heads, self.num_registers)


VARIANTS: Mapping[str, Variant] = {
    "vits14": Variant(
        384, 12, 6, "b938bf1bc15cd2ec0feacfe3a1bb553fe8ea9ca46a7e1d8d00217f29aef60cd9"
    ),
    "vitb14": Variant(
        768, 12, 12, "0b8b82f85de91b424aded121c7e1dcc2b7bc6d0adeea651bf73a13307fad8c73"
    ),
    "vitl14": Variant(
        1024, 24, 16, "d5383ea8f4877b2472eb973e0fd72d557c7da5d3611bd527ceeb1d7162cbf428"
    ),
    "vits14_reg4": Variant(
        384, 12, 6, "f433177089a681826f849f194ece3bb48f4d63fb38d32fc837e3dc7a4e5641fb", 4
    ),
    "vitb14_reg4": Variant(
        768, 12, 12, "73182a088cf94833c94b1666d1c99e02fe87e2007bff57b564fb6206e25dba71", 4
    ),
    "vitl14_reg4": Variant(
        1024, 24, 16, "36e4deffbaef061a2576705b0c36f93621e2ae20bf6274694821b0b492551b51", 4
    ),
}


def url(model: str) -> str:
    """The URL of a network's published file of weights.

    Example:
        >>> url("vits14_reg4").rpartition("/")[2]
        'dinov2_vits14_reg4_pretrain.pth'
    """
    folder = model.removesuffix("_reg4")
    return f"https://dl.fbaipublicfiles.com/dinov2/dinov2_{folder}/dinov2_{model}_pretrain.pth"


def resize(images: np.ndarray, size: int = SIZE) -> np.ndarray:
    """Resizes images to 224x224 as dgm-eval does by default: Pillow's bicubic filter on uint8.

    The filter has antialiasing.

    Args:
        images: `[B, H, W, C]` in [-1, 1], rounded to 256 levels first; C is 1 or 3.
        size: side of the result, in pixels.

    Returns:
        `[B, size, size, 3]` uint8.

    Example:
        >>> resize(np.ones((2, 32, 32, 1), np.float32)).shape
        (2, 224, 224, 3)
    """
    levels = np.asarray(as_rgb(to_uint8(np.clip(images, -1.0, 1.0))))
    bicubic = Image.Resampling.BICUBIC
    return np.stack(
        [np.asarray(Image.fromarray(one).resize((size, size), bicubic)) for one in levels]
    )


def resize_positions(positions: np.ndarray, size: int, *, like_registers: bool) -> np.ndarray:
    """Resizes position embeddings to another number of patches, as in the authors' code.

    They were trained on 37x37 patches, and 224 pixels have 16x16. Networks with registers use
    bicubic interpolation with antialiasing (a = -1/2) of the whole grid. Networks without registers
    use bicubic interpolation without antialiasing (a = -3/4), in steps of 37/16.1 instead of 37/16,
    as in the first release. A grid of the right size is not changed.

    Args:
        positions: `[G, G, D]`.
        size: patches per side of the result.
        like_registers: whether to interpolate as in networks with registers.

    Returns:
        `[size, size, D]` float32.
    """
    grid = len(positions)
    if grid == size:
        return positions.astype(np.float32)
    if like_registers:
        shape = (size, size, positions.shape[-1])
        return np.asarray(jax.image.resize(positions.astype(np.float32), shape, "cubic"))
    weights = _cubic_weights(grid, size, step=grid / (size + 0.1))
    return np.einsum("ih,jw,hwd->ijd", weights, weights, positions).astype(np.float32)


def convert(state: StateDict, network: Dinov2, grid: int = SIZE // PATCH) -> Any:
    """Converts the parameters of the authors' published files.

    Args:
        state: tensors of a file such as `dinov2_vitl14_pretrain.pth`.
        network: the network that will use the parameters.
        grid: patches per side of its input images; 16 for 224 pixels.

    Raises:
        UserError: weights are missing, superfluous, or have other shapes.
    """
    first, *rest = state.take("pos_embed")[0]
    side = math.isqrt(len(rest))
    if side * side != len(rest):
        raise UserError(f"{state.name}: {len(rest)} position embeddings do not form a square")
    positions = np.reshape(rest, (side, side, -1))
    positions = resize_positions(positions, grid, like_registers=network.num_registers > 0)
    kernel = state.take("patch_embed.proj.weight").transpose(2, 3, 1, 0)
    params = {
        "class_token": state.take("cls_token")[0],
        "positions": np.concatenate([first[None], positions.reshape(grid**2, -1)]),
        "patches": {"kernel": kernel, "bias": state.take("patch_embed.proj.bias")},
        "norm": _converted(state, "norm", "scale"),
        **{f"block_{i}": _converted_block(state, f"blocks.{i}.") for i in range(network.depth)},
    }
    if network.num_registers:
        params["registers"] = state.take("register_tokens")[0]
    image = jax.ShapeDtypeStruct((1, PATCH * grid, PATCH * grid, 3), jnp.float32)
    expected = jax.eval_shape(network.init, jax.random.key(0), image)["params"]
    params = jax.tree.map(lambda array: array.astype(np.float32), params)
    check_shapes(params, expected, state.name)
    state.check_empty(lambda key: key == "mask_token")
    return params


def dinov2_features(
    weights: str = "", model: str = "vitl14", sha256: str = "", batch_size_images: int = 32
) -> Extractor:
    """Extractor of the class token of a DINOv2 network, `[N, 384]`, `[N, 768]` or `[N, 1024]`.

    Args:
        weights: path of the model's `dinov2_*_pretrain.pth`, or a URL to download it from
            (`diffjax.evaluation.extractors.dinov2.url`).
        model: a name in `VARIANTS`, such as `vitl14`.
        sha256: hex digest of the file; by default that of the published one.
        batch_size_images: images per network evaluation; 32 is typical.

    Raises:
        UserError: no such model or file, another hash, weights of another network.
    """
    if model not in VARIANTS:
        raise UserError(f"no DINOv2 network is called {model!r}; {nearest(model, VARIANTS)}")
    if not weights:
        raise UserError(
            f"dinov2_features needs weights: the path of dinov2_{model}_pretrain.pth, or its "
            f"URL {url(model)}"
        )
    variant = VARIANTS[model]
    sha256 = (sha256 or variant.sha256).lower()
    state = read_state_dict(weights, read_weights(weights, sha256))
    params = convert(state, variant.network)

    @jax.jit
    def evaluate(params: Any, levels: jax.Array) -> tuple[jax.Array, None]:
        mean, std = (jnp.array(each)[None, None, None] for each in (MEAN, STD))
        pixels = (levels.astype(jnp.float32) / 255.0 - mean) / std
        # Lower precision, the default on GPUs and TPUs, would change the features.
        with jax.default_matmul_precision("highest"):
            return variant.network.apply({"params": params}, pixels), None  # pyright: ignore[reportReturnType]

    return pretrained(
        f"dinov2:{model}",
        with_params(evaluate, params),
        batch_size_images,
        resize,
        architecture=f"DINOv2 {model}",
        layer="class token after the last normalisation",
        weights_sha256=sha256,
        resize="Pillow bicubic to 224x224, antialiased, on uint8 (as dgm-eval)",
        scaling="(x/255 - mean) / std of ImageNet",
        positions="bicubic, antialiased, 37x37 to 16x16"
        if variant.num_registers
        else "bicubic, not antialiased, 37x37 to 16x16 in steps of 37/16.1",
        grey="repeated to three channels",
        precision="float32",
    )


def _converted(state: StateDict, name: str, kernel: str) -> dict[str, np.ndarray]:
    """Converts a torch layer; `kernel` is the name of its weight in Flax."""
    return {kernel: state.take(f"{name}.weight").T, "bias": state.take(f"{name}.bias")}


def _converted_block(state: StateDict, path: str) -> dict[str, Any]:
    dense = {"qkv": "attn.qkv", "proj": "attn.proj", "fc1": "mlp.fc1", "fc2": "mlp.fc2"}
    return {
        **{name: _converted(state, path + theirs, "kernel") for name, theirs in dense.items()},
        **{name: _converted(state, path + name, "scale") for name in ("norm1", "norm2")},
        "scale1": state.take(f"{path}ls1.gamma"),
        "scale2": state.take(f"{path}ls2.gamma"),
    }


def _cubic_weights(size: int, new_size: int, step: float) -> np.ndarray:
    """`[new_size, size]`: Keys' cubic with a = -3/4 at `step (i + 1/2) - 1/2`, edges repeated."""
    a = -0.75
    weights = np.zeros((new_size, size))
    for i in range(new_size):
        centre = step * (i + 0.5) - 0.5
        for j in range(math.floor(centre) - 1, math.floor(centre) + 3):
            d = abs(centre - j)
            near = ((a + 2) * d - (a + 3)) * d**2 + 1
            far = a * (((d - 5) * d + 8) * d - 4)
            weights[i, min(max(j, 0), size - 1)] += near if d <= 1 else far
    return weights


def _norm(name: str) -> nn.LayerNorm:
    return nn.LayerNorm(_EPSILON, use_fast_variance=False, name=name)


def _repeated(tokens: jax.Array, batch: int) -> jax.Array:
    """Repeats tokens for each image of a batch, `[B, n, width]`."""
    return jnp.broadcast_to(tokens, (batch, *tokens.shape))
