"""The layout of the authors' files (hustvl/LightningDiT): DiT's, with a fused gated MLP.

Pairs of neighbours in a head are rotated there, by the row in the first half of the pairs and by
the column in the second. Files hold the cosines and sines of the angles.

Time is 0 for noise and 1 for data, is embedded without a scale, and the network predicts the
velocity `data - noise`, as SiT does. Its latents are those of VA-VAE, normalised by their mean and
standard deviation of each channel; that codec is not here. Their sampling is 250 steps of Euler on
a shifted grid, and guides the first three of 32 channels, above time 0.11 alone.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np

from diffjax.models.dit import tables
from diffjax.models.dit.published import recognise
from diffjax.models.layers.rotary import rotation_2d
from diffjax.models.lightningdit.network import LightningDiT
from diffjax.models.lightningdit.sizes import SIZES
from diffjax.pretrained.family import Denoiser, Family, Published
from diffjax.pretrained.tables import Row, Table
from diffjax.pretrained.transforms import constant


def _table(denoiser: Denoiser) -> Table:
    network = denoiser.network
    height, width, _ = denoiser.image_shape
    head_width = network.hidden_size // network.num_heads
    grid = height // network.patch_size, width // network.patch_size
    order = tables.pairs_of_neighbours(head_width)
    block = (*tables.dit_block(network, order), *tables.fused_swiglu())
    patches = tables.patches_by_conv(network.hidden_size, network.patch_size)
    return (
        tables.fixed_positions(denoiser),
        Row("feat_rope.freqs_cos", (), constant(lambda: _both(rotation_2d(*grid, head_width).cos))),
        Row("feat_rope.freqs_sin", (), constant(lambda: _both(rotation_2d(*grid, head_width).sin))),
        Row("x_embedder.proj.weight", "patch_embedding/kernel", patches),
        Row("x_embedder.proj.bias", "patch_embedding/bias"),
        *tables.conditioning(),
        *tables.final_layers(),
        *tables.blocks(network, block),
    )


def _both(angles: Any) -> np.ndarray:
    """One number for each of a pair of neighbours."""
    return np.repeat(angles, 2, axis=-1)


def lightningdit(
    image_shape: tuple[int, int, int] = (16, 16, 32), num_classes: int = 1000, **settings: Any
) -> Denoiser:
    """A LightningDiT with the authors' settings: 32 channels of VA-VAE at 256 pixels, ImageNet."""
    return Denoiser(LightningDiT(num_classes, **settings), image_shape)


def _recognise(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Any]:
    shapes["blocks.0.mlp.w12.bias"]  # Those of DiT have other MLPs, and lack it.
    found = recognise(shapes)
    channels = found["image_shape"][-1]
    if found["out_channels"] == channels:
        found.pop("out_channels")
    return found | {"qk_norm": "blocks.0.attn.q_norm.weight" in shapes}


def _published(denoiser: Denoiser) -> Published:
    del denoiser
    return Published(
        objective="objective=sit,times=logit_normal",
        solver="euler",
        grid="uniform",
        num_steps=250,
        guidance_scale=10.0,
        guidance="cfg+first_channels",
    )


FAMILY = Family(
    "LightningDiT",
    lightningdit,
    SIZES,
    _table,
    _recognise,
    lambda denoiser: denoiser.inputs,
    published=_published,
)
