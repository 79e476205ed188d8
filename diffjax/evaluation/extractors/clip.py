"""CLIP's image embeddings as features (Radford et al. 2021, arXiv:2103.00020).

A kernel distance on them is CMMD (Jayasumana et al. 2024, arXiv:2401.09603), which uses the
vision transformer L/14 at 336 pixels. This file contains only the image encoder of CLIP, for
inference.
"""

from dataclasses import replace
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from diffjax.errors import UserError
from diffjax.evaluation.extractors import dinov2
from diffjax.evaluation.extractors.features import Extractor, check_shapes, pretrained, with_params
from diffjax.models.attention import batched
from diffjax.pretrained.downloads import read_weights
from diffjax.pretrained.torch_files import StateDict, read_state_dict

URL = "https://huggingface.co/openai/clip-vit-large-patch14-336/resolve/main/pytorch_model.bin"
SHA256 = "c6032c2e0caae3dc2d4fba35535fa6307dbb49df59c7e182b1bc4b3329b81801"
SIZE = 336
MEAN = (0.48145466, 0.4578275, 0.40821073)  # of CLIP's training images, for pixels in [0, 1]
STD = (0.26862954, 0.26130258, 0.27577711)
_EPSILON = 1e-5


class Clip(nn.Module):
    """The vision transformer of CLIP and its projection.

    Attributes:
        width: width of a token.
        depth: number of blocks.
        num_heads: number of attention heads.
        num_features: width of an embedding.
        patch: side of a patch, in pixels.
    """

    width: int = 1024
    depth: int = 24
    num_heads: int = 16
    num_features: int = 768
    patch: int = 14

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Computes image embeddings of length 1.

        Args:
            x: `[B, P G, P G, 3]` for patches of P pixels, normalised: `(pixels - MEAN) / STD`.

        Returns:
            `[B, num_features]`.
        """
        zeros, side = nn.initializers.zeros, (self.patch, self.patch)
        x = nn.Conv(self.width, side, side, "VALID", use_bias=False, name="patches")(x)
        x = x.reshape(len(x), -1, self.width)
        first = self.param("class_token", zeros, (self.width,))
        x = jnp.concatenate([jnp.broadcast_to(first, (len(x), 1, self.width)), x], 1)
        x = _norm("norm_before")(x + self.param("positions", zeros, x.shape[1:])[None])
        for i in range(self.depth):
            x = Block(self.num_heads, name=f"block_{i}")(x)
        x = _norm("norm_after")(x[:, 0])
        x = nn.Dense(self.num_features, use_bias=False, name="projection")(x)
        return x / jnp.linalg.norm(x, axis=-1, keepdims=True)


class Block(nn.Module):
    """A transformer block: `x + attention(norm x)`, then `x + mlp(norm x)`.

    The nonlinearity of the MLP is `h sigmoid(1.702 h)`, an approximation of GELU.
    """

    num_heads: int

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        batch, length, width = x.shape
        normed = _norm("norm1")(x)
        heads = (batch, length, self.num_heads, -1)
        q, k, v = (nn.Dense(width, name=name)(normed).reshape(heads) for name in "qkv")
        x = x + nn.Dense(width, name="proj")(batched(q, k, v).reshape(x.shape))
        hidden = nn.Dense(4 * width, name="fc1")(_norm("norm2")(x))
        hidden = hidden * jax.nn.sigmoid(1.702 * hidden)
        return x + nn.Dense(width, name="fc2")(hidden)


def resize(images: np.ndarray) -> np.ndarray:
    """Resizes images to 336x336 as in CMMD's own code.

    It crops the central square and applies Pillow's bicubic filter with antialiasing, on uint8.

    Args:
        images: `[B, H, W, C]` in [-1, 1], rounded to 256 levels first; C is 1 or 3.

    Returns:
        `[B, 336, 336, 3]` uint8.

    Example:
        >>> resize(np.ones((2, 32, 40, 1), np.float32)).shape
        (2, 336, 336, 3)
    """
    _, height, width, _ = images.shape
    side = min(height, width)
    top, left = (height - side) // 2, (width - side) // 2
    return dinov2.resize(images[:, top : top + side, left : left + side], SIZE)


def convert(state: StateDict, network: Clip, size: int = SIZE) -> Any:
    """Converts the parameters of transformers' `CLIPModel`; the text encoder is left out.

    Args:
        state: tensors of the `pytorch_model.bin` of `openai/clip-vit-large-patch14-336`.
        network: the network that will use the parameters.
        size: side of its input images, in pixels.

    Raises:
        UserError: weights are missing, superfluous, or have other shapes.
    """
    path = "vision_model."
    patches = state.take(f"{path}embeddings.patch_embedding.weight").transpose(2, 3, 1, 0)
    params = {
        "class_token": state.take(f"{path}embeddings.class_embedding"),
        "positions": state.take(f"{path}embeddings.position_embedding.weight"),
        "patches": {"kernel": patches},
        "norm_before": _layer(state, f"{path}pre_layrnorm", "scale"),
        "norm_after": _layer(state, f"{path}post_layernorm", "scale"),
        "projection": {"kernel": state.take("visual_projection.weight").T},
        **{f"block_{i}": _block(state, f"{path}encoder.layers.{i}.") for i in range(network.depth)},
    }
    image = jax.ShapeDtypeStruct((1, size, size, 3), jnp.float32)
    expected = jax.eval_shape(network.init, jax.random.key(0), image)["params"]
    params = jax.tree.map(lambda array: array.astype(np.float32), params)
    check_shapes(params, expected, state.name)
    state.check_empty(
        lambda key: (
            key.startswith(("text_model.", "text_projection."))
            or key in ("logit_scale", f"{path}embeddings.position_ids")
        )
    )
    return params


def clip_features(
    weights: str = "", sha256: str = SHA256, batch_size_images: int = 32
) -> Extractor:
    """Extractor of image embeddings of CLIP ViT-L/14 at 336 pixels, `[N, 768]`, for CMMD.

    The embeddings have length 1.

    Args:
        weights: path of the `pytorch_model.bin` of `openai/clip-vit-large-patch14-336`, or of its
            weights as safetensors, or a URL to download one from (`URL`).
        sha256: hex digest of that file; change it to use another file.
        batch_size_images: images per network evaluation; 32 is typical.

    Raises:
        UserError: no such file, another hash, weights of another network.
    """
    if not weights:
        raise UserError(
            "clip_features needs weights: the path of the pytorch_model.bin of "
            f"openai/clip-vit-large-patch14-336, or its URL {URL}"
        )
    network = Clip()
    params = convert(read_state_dict(weights, read_weights(weights, sha256)), network)

    @jax.jit
    def encode(params: Any, levels: jax.Array) -> tuple[jax.Array, None]:
        mean, std = (jnp.array(each)[None, None, None] for each in (MEAN, STD))
        pixels = (levels.astype(jnp.float32) / 255.0 - mean) / std
        # Lower precision, the default on GPUs and TPUs, would change the features.
        with jax.default_matmul_precision("highest"):
            return network.apply({"params": params}, pixels), None  # pyright: ignore[reportReturnType]

    extractor = pretrained(
        "clip:vitl14_336",
        with_params(encode, params),
        batch_size_images,
        resize,
        architecture="CLIP ViT-L/14 at 336 pixels",
        layer="image embedding, divided by its length",
        weights_sha256=sha256.lower(),
        resize="middle square, Pillow bicubic to 336x336, antialiased, on uint8 (as cmmd)",
        scaling="(x/255 - mean) / std of CLIP",
        grey="repeated to three channels",
        precision="float32",
    )
    return replace(extractor, for_cmmd=True)


def _layer(state: StateDict, name: str, kernel: str) -> dict[str, np.ndarray]:
    """Converts a torch layer; `kernel` is the name of its weight in Flax."""
    return {kernel: state.take(f"{name}.weight").T, "bias": state.take(f"{name}.bias")}


def _block(state: StateDict, path: str) -> dict[str, Any]:
    dense = {name: f"self_attn.{name}_proj" for name in "qkv"}
    dense |= {"proj": "self_attn.out_proj", "fc1": "mlp.fc1", "fc2": "mlp.fc2"}
    norms = {"norm1": "layer_norm1", "norm2": "layer_norm2"}
    return {
        **{name: _layer(state, path + theirs, "kernel") for name, theirs in dense.items()},
        **{name: _layer(state, path + theirs, "scale") for name, theirs in norms.items()},
    }


def _norm(name: str) -> nn.LayerNorm:
    return nn.LayerNorm(_EPSILON, use_fast_variance=False, name=name)
