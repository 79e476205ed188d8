"""The layout of the authors' files (MCG-NJU/DDT).

A file of their training has the averages as `ema_denoiser.`, beside the network itself and what
aligns it with DINOv2. Patches are channel by channel there. Pairs of neighbours in a head are
rotated, in turns by the column and by the row.

Time is 0 for noise and 1 for data, and is embedded without a scale; the network predicts the
velocity `data - noise`. Their sampling is 250 steps of Euler, guided above time 0.3 alone.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np

from diffjax.models.ddt.network import DDT
from diffjax.models.ddt.sizes import SIZES
from diffjax.models.dit import tables
from diffjax.pretrained.family import Denoiser, Family, Published
from diffjax.pretrained.tables import Row, Table, count
from diffjax.pretrained.transforms import dense, permute, then

_PREFIX = "ema_denoiser."
_UNUSED = ("denoiser.*", "diffusion_trainer.*")


def _table(denoiser: Denoiser) -> Table:
    network = denoiser.network
    order = _pairs_in_turns(network.hidden_size // network.num_heads)
    p = network.patch_size
    embeddings = (("s_embedder.proj", "patch_embedding"), ("x_embedder.proj", "decoder_embedding"))
    patches = permute((-1, p, p), (1, 2, 0), dense, axis=0)
    pixels = permute((-1, p, p), (1, 2, 0))
    block = (
        *tables.dit_block(network, order, modulation="adaLN_modulation.0"),
        *tables.separate_swiglu(),
    )
    rows = (
        *(Row(f"{theirs}.weight", f"{ours}/kernel", patches) for theirs, ours in embeddings),
        *(Row(f"{theirs}.bias", f"{ours}/bias") for theirs, ours in embeddings),
        *tables.conditioning(),
        *tables.layer("final_layer.adaLN_modulation.0", "final_modulation"),
        Row("final_layer.linear.weight", "final_out/kernel", then(dense, pixels)),
        Row("final_layer.linear.bias", "final_out/bias", pixels),
        *tables.blocks(network, block),
    )
    return tables.within(_PREFIX, rows)


def _pairs_in_turns(head_width: int) -> np.ndarray:
    """The published order of the numbers in a head: frequency, column and row, the two of a pair.

    Example:
        >>> _pairs_in_turns(8).tolist()
        [2, 6, 0, 4, 3, 7, 1, 5]
    """
    return np.arange(head_width).reshape(-1, 2, 2)[:, ::-1].transpose(2, 1, 0).ravel()


def ddt(
    image_shape: tuple[int, int, int] = (32, 32, 4), num_classes: int = 1000, **settings: Any
) -> Denoiser:
    """A DDT with the authors' settings: latents of 256 pixels, ImageNet."""
    return Denoiser(DDT(num_classes, **settings), image_shape)


def _recognise(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Any]:
    shapes = {name.removeprefix(_PREFIX): shape for name, shape in shapes.items()}
    hidden_size, numbers = shapes["x_embedder.proj.weight"]
    return {
        "image_shape": (32, 32, numbers // 4),  # All published sizes have patches of 2.
        "hidden_size": hidden_size,
        "depth": count("blocks.{i}.attn.qkv.weight", shapes),
        "num_classes": shapes["y_embedder.embedding_table.weight"][0] - 1,
    }


def _published(denoiser: Denoiser) -> Published:
    del denoiser
    return Published(
        objective="objective=sit,times=logit_normal",
        solver="euler",
        grid="uniform",
        num_steps=250,
        guidance_scale=2.0,
        codec="sd-vae-ft-ema",
    )


FAMILY = Family(
    "DDT",
    ddt,
    SIZES,
    _table,
    _recognise,
    lambda denoiser: denoiser.inputs,
    _UNUSED,
    published=_published,
)
