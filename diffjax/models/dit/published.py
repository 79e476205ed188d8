"""The layouts of the published files: that of the authors (facebookresearch/DiT) and of diffusers.

Modulations are shift, scale and gate, and the numbers of an output patch are ordered by row, column
and channel, all as here. Twice the channels come out: the predicted noise, and the learned
variance.

- The authors' queries, keys and values are thirds of one matrix, as here. Files hold the fixed
  positions too, which depend on the size of the images. Their sampling guides three of four
  channels, and evaluates the network at whole timesteps 0 to 999. They trained on latents of
  `sd-vae-ft-ema`; `sample.py` decodes by `sd-vae-ft-mse`, whose encoder is the same.
- diffusers (`DiTTransformer2DModel`) repeats the embeddings of timestep and class in each block,
  and splits queries, keys and values. It is another function: the frequencies of timesteps end at
  1 / 10,000, and the epsilon of the norms before the MLPs is 1e-5. Its sampling guides all
  channels. Its training drops labels in each block by another draw, which no network here does.
"""

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np

from diffjax.errors import UserError
from diffjax.models.dit import tables
from diffjax.models.dit.network import DiT
from diffjax.models.dit.sizes import SIZES
from diffjax.pretrained.family import Config, Denoiser, Family, Published
from diffjax.pretrained.tables import Row, Table, count
from diffjax.pretrained.tensors import Tensor
from diffjax.pretrained.transforms import copies, dense, keep, merge


def _table(denoiser: Denoiser) -> Table:
    network = denoiser.network
    patches = tables.patches_by_conv(network.hidden_size, network.patch_size)
    return (
        tables.fixed_positions(denoiser),
        Row("x_embedder.proj.weight", "patch_embedding/kernel", patches),
        Row("x_embedder.proj.bias", "patch_embedding/bias"),
        *tables.conditioning(),
        *tables.final_layers(),
        *tables.blocks(network, (*tables.dit_block(network), *tables.gelu_mlp())),
    )


def dit(
    image_shape: tuple[int, int, int] = (32, 32, 4),
    num_classes: int = 1000,
    out_channels: int = 8,
    **settings: Any,
) -> Denoiser:
    """A DiT with the authors' settings: latents of 256 pixels, ImageNet, learned variance."""
    return Denoiser(DiT(num_classes, out_channels=out_channels, **settings), image_shape)


def recognise(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Any]:
    """The settings of a network with DiT's names that follow from the shapes of its tensors."""
    hidden_size, channels, patch, _ = shapes["x_embedder.proj.weight"]
    side = patch * math.isqrt(shapes["pos_embed"][1])
    return {
        "patch_size": patch,
        "hidden_size": hidden_size,
        "depth": count("blocks.{i}.attn.qkv.bias", shapes),
        "num_classes": shapes["y_embedder.embedding_table.weight"][0] - 1,
        "out_channels": shapes["final_layer.linear.bias"][0] // patch**2,
        "image_shape": (side, side, channels),
    }


def _without_variance(state: Mapping[str, Any], denoiser: Denoiser) -> Mapping[str, Any]:
    """Tensors of a network with twice the channels, without the second half of them."""
    network, channels = denoiser.network, denoiser.image_shape[-1]
    pixels = network.patch_size**2
    names = [f"final_layer.linear.{kind}" for kind in ("weight", "bias")]
    twice = all(name in state and state[name].shape[0] == 2 * pixels * channels for name in names)
    if not twice or network.out_channels not in (0, channels):
        return state

    def first(tensor: Any) -> Tensor:
        rest = tensor.shape[1:]

        def read() -> np.ndarray:
            numbers = np.asarray(tensor).reshape(pixels, 2, channels, *rest)
            return numbers[:, 0].reshape(-1, *rest)

        return Tensor((pixels * channels, *rest), tensor.dtype, read)

    return {**state, **{name: first(state[name]) for name in names}}


def _published(denoiser: Denoiser) -> Published:
    learned = denoiser.network.out_channels == 2 * denoiser.image_shape[-1]
    return Published(
        objective="objective=dit" if learned else "objective=dit,wrappers=none",
        solver="ddpm_learned" if learned else "ddpm_large",
        grid="linspace",
        num_steps=250,
        guidance_scale=4.0,
        guidance="cfg+first_channels",
        codec="sd-vae-ft-mse",
    )


FAMILY = Family(
    "DiT",
    dit,
    SIZES,
    _table,
    recognise,
    lambda denoiser: denoiser.inputs,
    published=_published,
    without_variance=_without_variance,
)

_EMBEDDINGS_OF_DIFFUSERS = (
    ("timestep_embedder.linear_1.weight", "conditioning/hidden/kernel", dense),
    ("timestep_embedder.linear_1.bias", "conditioning/hidden/bias", keep),
    ("timestep_embedder.linear_2.weight", "conditioning/out/kernel", dense),
    ("timestep_embedder.linear_2.bias", "conditioning/out/bias", keep),
    ("class_embedder.embedding_table.weight", "conditioning/label/embedding", keep),
)
_OF_DIFFUSERS = {"frequency_endpoint": True, "mlp_norm_eps": 1e-5}
"""What makes it another function than the authors' network."""
_LARGEST_SIDE = 4096
"""Of latents; the positions of a side that a damaged file states would fill the memory."""


def _block_of_diffusers() -> tuple[Row, ...]:
    parts = ("weight", "kernel", dense), ("bias", "bias", keep)
    attention = (
        Row(
            tuple(f"attn1.to_{part}.{theirs}" for part in "qkv"),
            f"attention/qkv/{ours}",
            merge(3, how),
        )
        for theirs, ours, how in parts
    )
    return (
        *tables.layer("norm1.linear", "modulation"),
        *attention,
        *tables.layer("attn1.to_out.0", "attention/out"),
        *tables.layer("ff.net.0.proj", "mlp/up"),
        *tables.layer("ff.net.2", "mlp/down"),
    )


def _table_of_diffusers(denoiser: Denoiser) -> Table:
    network, block = denoiser.network, "transformer_blocks"
    patches = tables.patches_by_conv(network.hidden_size, network.patch_size)
    return (
        Row("pos_embed.proj.weight", "patch_embedding/kernel", patches),
        Row("pos_embed.proj.bias", "patch_embedding/bias"),
        *(
            Row(
                tuple(f"{block}.{i}.norm1.emb.{theirs}" for i in range(network.depth)),
                ours,
                copies(network.depth, how),
            )
            for theirs, ours, how in _EMBEDDINGS_OF_DIFFUSERS
        ),
        *tables.blocks(network, _block_of_diffusers(), "transformer_blocks.{}".format),
        *tables.layer("proj_out_1", "final_modulation"),
        *tables.layer("proj_out_2", "final_out"),
    )


def _recognise_diffusers(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Any]:
    hidden_size, channels, patch, _ = shapes["pos_embed.proj.weight"]
    classes = "transformer_blocks.0.norm1.emb.class_embedder.embedding_table.weight"
    return {
        "patch_size": patch,
        "hidden_size": hidden_size,
        "depth": count("transformer_blocks.{i}.attn1.to_q.bias", shapes),
        "num_classes": shapes[classes][0] - 1,
        "out_channels": shapes["proj_out_2.bias"][0] // patch**2,
        "channels": channels,
    }


def dit_of_diffusers(
    side: int = 32,
    channels: int = 4,
    num_classes: int = 1000,
    out_channels: int = 8,
    **settings: Any,
) -> Denoiser:
    """A DiT as diffusers evaluates it, with square latents of this side."""
    network = DiT(num_classes, out_channels=out_channels, **{**_OF_DIFFUSERS, **settings})
    return Denoiser(network, (side, side, channels))


def _settings(config: Mapping[str, Any]) -> dict[str, Any]:
    heads, width = int(config["num_attention_heads"]), int(config["attention_head_dim"])
    channels, out_channels = int(config["in_channels"]), config.get("out_channels")
    side, patch = int(config["sample_size"]), int(config["patch_size"])
    if not 0 < patch <= side <= _LARGEST_SIDE or side % patch:
        raise ValueError(f"patches of {patch} in images of {side}")
    return {
        "side": side,
        "channels": channels,
        "num_classes": int(config["num_embeds_ada_norm"]),
        "out_channels": channels if out_channels is None else int(out_channels),
        "patch_size": patch,
        "hidden_size": heads * width,
        "depth": int(config["num_layers"]),
        "num_heads": heads,
        "dropout": float(config["dropout"]),
        "mlp_norm_eps": float(config["norm_eps"]),
    }


def _config(denoiser: Denoiser) -> dict[str, Any]:
    network, (height, width, channels) = denoiser.network, denoiser.image_shape
    if height != width or not network.num_classes:
        raise UserError(
            "DiTTransformer2DModel has classes and square images, not "
            f"{network.num_classes} classes and {height}x{width}"
        )
    return {
        "sample_size": height,
        "in_channels": channels,
        "num_embeds_ada_norm": network.num_classes,
        "out_channels": network.out_channels or channels,
        "patch_size": network.patch_size,
        "num_attention_heads": network.num_heads,
        "attention_head_dim": network.hidden_size // network.num_heads,
        "num_layers": network.depth,
        "dropout": network.dropout,
        "norm_eps": network.mlp_norm_eps or network.norm_eps,
    }


_FIXED = {
    "activation_fn": "gelu-approximate",
    "attention_bias": True,
    "norm_elementwise_affine": False,
    "norm_num_groups": 32,
    "norm_type": "ada_norm_zero",
    "upcast_attention": False,
}


def _published_by_diffusers(denoiser: Denoiser) -> Published:
    """Its pipeline guides all channels; its grid, "leading", has no equal here."""
    own = _published(denoiser)
    return replace(own, solver="ddim", num_steps=50, guidance="cfg", codec="sd-vae-ft-ema")


DIFFUSERS = replace(
    FAMILY,
    name="DiT of diffusers",
    network=dit_of_diffusers,
    table=_table_of_diffusers,
    recognise=_recognise_diffusers,
    config=Config("DiTTransformer2DModel", _FIXED, _settings, _config),
    published=_published_by_diffusers,
)
"""The layout of `DiTTransformer2DModel`, and its function."""
