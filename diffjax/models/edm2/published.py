"""The layout of the authors' files (NVlabs/edm2): tensors of `Precond` by their modules.

Levels are named by the size of their maps, as `64x64`, which depends on the size of the images.
Queries, keys and values alternate in the outputs of one convolution. Beside the network (`unet`) a
file has the uncertainty of the loss (`logvar_*`), which `objectives.wrappers.FourierUncertainty`
learns. Files are pickles (`pretrained.persistent_pickles`), whose settings make the network.
"""

import math
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from diffjax.errors import UserError
from diffjax.models.edm2.network import EDM2
from diffjax.models.edm2.sizes import SIZES
from diffjax.pretrained.family import Denoiser, Family
from diffjax.pretrained.persistent_pickles import is_persistent_pickle, read_persistent_pickle
from diffjax.pretrained.tables import Row, Table, count
from diffjax.pretrained.transforms import conv, dense, permute, squeeze, then

_pointwise = then(squeeze(2, 3), dense)
_CONV = re.compile(r"unet\.enc\.(\d+)x\1_conv\.weight")


def edm2(
    image_shape: tuple[int, int, int] = (64, 64, 4), num_classes: int = 1000, **settings: Any
) -> Denoiser:
    """An EDM2 with the authors' settings: latents of 512 pixels, ImageNet, with its uncertainty."""
    return Denoiser(EDM2(num_classes, **settings), image_shape)


def _table(denoiser: Denoiser) -> Table:
    return tuple(_rows(denoiser))


def _rows(denoiser: Denoiser) -> Iterator[Row]:
    network, side = denoiser.network, denoiser.image_shape[0]
    levels = len(network.channel_multipliers)
    for theirs, ours in (("unet.emb", "conditioning"), ("logvar", "uncertainty")):
        yield Row(f"{theirs}_fourier.freqs", f"{ours}/fourier/frequencies")
        yield Row(f"{theirs}_fourier.phases", f"{ours}/fourier/phases")
    yield Row("logvar_linear.weight", "uncertainty/linear/kernel", dense)
    yield Row("unet.emb_noise.weight", "conditioning/noise/kernel", dense)
    yield Row("unet.emb_label.weight", "conditioning/label/kernel", dense)
    yield Row(f"unet.enc.{side}x{side}_conv.weight", "conv_in/kernel", conv)
    yield Row("unet.out_conv.weight", "final_conv/kernel", conv)
    yield Row("unet.out_gain", "final_gain")
    for i in range(levels):
        maps = f"{side >> i}x{side >> i}"
        yield from _block(network, f"unet.enc.{maps}_block{{j}}", f"down_{i}_{{j}}")
        yield from _block(network, f"unet.enc.{maps}_down", f"down_{i}_resample")
        yield from _block(network, f"unet.dec.{maps}_block{{j}}", f"up_{i}_{{j}}")
        yield from _block(network, f"unet.dec.{maps}_up", f"up_{i}_resample")
    for j in range(2):
        yield from _block(network, f"unet.dec.{maps}_in{j}", f"middle_{j}")


def _block(network: EDM2, theirs: str, ours: str) -> Iterator[Row]:
    qkv = permute((-1, network.head_channels, 3), (2, 0, 1), _pointwise)
    yield Row(f"{theirs}.emb_gain", f"{ours}/gain")
    for name, layer, how in (
        ("conv_res0", "conv_1", conv),
        ("emb_linear", "modulation", dense),
        ("conv_res1", "conv_2", conv),
        ("conv_skip", "skip", _pointwise),
        ("attn_qkv", "attention/qkv", qkv),
        ("attn_proj", "attention/out", _pointwise),
    ):
        yield Row(f"{theirs}.{name}.weight", f"{ours}/{layer}/kernel", how)


def _recognise(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Any]:
    found = [match for name in shapes if (match := _CONV.fullmatch(name))]
    if not found:
        raise KeyError("unet.enc.64x64_conv.weight")
    side = int(found[0][1])
    maps = [f"{side >> i}x{side >> i}" for i in range(side.bit_length())]
    levels = [name for name in maps if f"unet.enc.{name}_block0.emb_gain" in shapes]
    widths = [shapes[f"unet.enc.{name}_block0.conv_res1.weight"][0] for name in levels]
    channels = math.gcd(*widths)
    blocks = f"unet.enc.{levels[0]}_block{{i}}.emb_gain"
    return {
        "image_shape": (side, side, shapes["unet.out_conv.weight"][0]),
        "num_classes": shapes.get("unet.emb_label.weight", (0, 0))[1],
        "channels": channels,
        "channel_multipliers": tuple(width // channels for width in widths),
        "num_res_blocks": count(blocks, shapes),
        "attention_levels": tuple(
            i
            for i, name in enumerate(levels)
            if f"unet.enc.{name}_block0.attn_qkv.weight" in shapes
        ),
        "uncertainty_terms": shapes["logvar_fourier.freqs"][0],
    }


FAMILY = Family("EDM2", edm2, SIZES, _table, _recognise, lambda denoiser: denoiser.inputs)

_NAMES = {
    "label_dim": "num_classes",
    "model_channels": "channels",
    "channel_mult": "channel_multipliers",
    "num_blocks": "num_res_blocks",
    "channels_per_head": "head_channels",
    "label_balance": "label_balance",
    "concat_balance": "skip_balance",
    "res_balance": "residual_balance",
    "attn_balance": "attention_balance",
    "dropout": "dropout",
    "clip_act": "clip",
    "logvar_channels": "uncertainty_terms",
}
_OF_THE_REST = ("use_fp16", "sigma_data")
"""Settings of the preconditioning, which is not in the network."""
_ONLY = {"channel_mult_noise": None, "channel_mult_emb": None, "resample_filter": [1, 1]}
"""Settings whose one value here is that of all published networks."""


def read(path: str | Path, network: Any = None) -> tuple[Any, Any]:
    """Reads a published file; see `Family.read`.

    Args:
        path: of the file: a pickle of the authors, or their tensors by torch or safetensors.
        network: a `Denoiser`; by default the settings in a pickle, or what the shapes show.

    Returns:
        The denoiser and its parameters.

    Raises:
        UserError: the file can't be read, or is of another network.
    """
    if network is not None or not is_persistent_pickle(path):
        return FAMILY.read(path, network)
    found = read_persistent_pickle(path)
    denoiser = denoiser_of(found.settings, str(path))
    return denoiser, FAMILY.to_ours(found.tensors, denoiser, str(path))


def denoiser_of(settings: Mapping[str, Any], source: str) -> Denoiser:
    """The network of the authors' settings, those of `training.networks_edm2.Precond`.

    Args:
        settings: by their names; what is not there is as they have it by default.
        source: name of the file, for errors.

    Raises:
        UserError: the size of the images is not among them, or a setting has no like here.

    Example:
        >>> their = {"img_resolution": 64, "img_channels": 4, "label_dim": 1000}
        >>> denoiser_of({**their, "model_channels": 128}, "x.pkl") == FAMILY.size("EDM2-XS")
        True
    """
    rest = {name: value for name, value in settings.items() if name not in _OF_THE_REST}
    ours = {}
    try:
        side, channels = rest.pop("img_resolution"), rest.pop("img_channels")
        for theirs in _NAMES.keys() & rest.keys():
            value = rest.pop(theirs)
            ours[_NAMES[theirs]] = tuple(value) if isinstance(value, list) else value
        maps = rest.pop("attn_resolutions", [16, 8])
        levels = range(len(ours.get("channel_multipliers", (1, 2, 3, 4))))
        attention_levels = tuple(level for level in levels if side >> level in maps)
    except (KeyError, TypeError) as error:
        raise UserError(f"{source} is not of EDM2: {error} is not among its settings") from error
    for name, value in rest.items():
        if name not in _ONLY or value != _ONLY[name]:
            raise UserError(f"{source} has {name}={value!r}, which EDM2 does not have here")
    if ours.get("clip", 256.0) is None:
        ours["clip"] = math.inf
    return edm2((side, side, channels), attention_levels=attention_levels, **ours)
