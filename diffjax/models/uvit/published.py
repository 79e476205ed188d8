"""The layout of the authors' files (baofff/U-ViT).

The positions of the tokens of class and noise label and those of the patches are one tensor. Blocks
are `in_blocks`, `mid_block` and `out_blocks`. The network predicts the noise: of images with noise
labels from 0 to 999, on the path of DDPM, and of latents with those from 1 to 1,000, on the betas
of Stable Diffusion. Their sampling is DPM-Solver's, with a scale of guidance that is 1 less.
"""

import math
from collections.abc import Mapping
from typing import Any

from diffjax.models.dit import tables
from diffjax.models.uvit.network import UViT
from diffjax.models.uvit.sizes import SIZES
from diffjax.pretrained.family import Denoiser, Family, Published
from diffjax.pretrained.tables import Row, Table, count, layer, norm
from diffjax.pretrained.transforms import conv, split, squeeze


def _table(denoiser: Denoiser) -> Table:
    network = denoiser.network
    height, width, _ = denoiser.image_shape
    tokens = 1 + bool(network.num_classes)
    num_patches = (height // network.patch_size) * (width // network.patch_size)
    half = network.depth // 2

    def name_of(block: int) -> str:
        if block < half:
            return f"in_blocks.{block}"
        return "mid_block" if block == half else f"out_blocks.{block - half - 1}"

    patches = tables.patches_by_conv(network.hidden_size, network.patch_size)
    return (
        Row(
            "pos_embed",
            ("conditioning_positions", "patch_positions"),
            split((tokens, num_patches), squeeze(0), axis=0),
        ),
        Row("patch_embed.proj.weight", "patch_embedding/kernel", patches),
        Row("patch_embed.proj.bias", "patch_embedding/bias"),
        Row("label_emb.weight", "conditioning/label/embedding"),
        *norm("norm", "final_norm"),
        *layer("decoder_pred", "final_out"),
        Row("final_layer.weight", "final_conv/kernel", conv),
        Row("final_layer.bias", "final_conv/bias"),
        *tables.blocks(
            network,
            (
                *norm("norm1", "norm_1"),
                *layer("attn.qkv", "attention/qkv"),
                *layer("attn.proj", "attention/out"),
                *norm("norm2", "norm_2"),
                *tables.gelu_mlp(),
                *layer("skip_linear", "skip"),
            ),
            name_of,
        ),
    )


def uvit(
    image_shape: tuple[int, int, int] = (32, 32, 4), num_classes: int = 1000, **settings: Any
) -> Denoiser:
    """A U-ViT with the authors' settings: latents of 256 pixels, ImageNet."""
    return Denoiser(UViT(num_classes, **settings), image_shape)


def _recognise(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Any]:
    hidden_size, channels, patch, _ = shapes["patch_embed.proj.weight"]
    _ = shapes["decoder_pred.weight"]  # Other ViTs have the names of the first layer too.
    rows = shapes.get("label_emb.weight", (0,))[0]
    side = patch * math.isqrt(shapes["pos_embed"][1] - 1 - bool(rows))
    # Of the two data sets of ImageNet, that of images has no null label.
    null_row = channels != 3
    return {
        "patch_size": patch,
        "hidden_size": hidden_size,
        "depth": 1 + 2 * count("in_blocks.{i}.attn.qkv.weight", shapes),
        "final_conv": "final_layer.weight" in shapes,
        "null_row": null_row,
        "num_classes": max(0, rows - null_row),
        "image_shape": (side, side, channels),
    }


def _published(denoiser: Denoiser) -> Published:
    latents = denoiser.image_shape[-1] != 3
    return Published(
        objective="objective=ddpm_table,path=scaled_linear_table" if latents else "objective=ddpm",
        solver="dpmpp_2m",
        grid="uniform",
        num_steps=50,
        guidance_scale=1.4 if latents else 1.0,
        codec="sd-vae-ft-ema" if latents else "",
    )


FAMILY = Family(
    "U-ViT",
    uvit,
    SIZES,
    _table,
    _recognise,
    lambda denoiser: denoiser.inputs,
    published=_published,
)
