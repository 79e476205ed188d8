"""The layout of the authors' files (NVlabs/edm2): tensors of `Precond` by their modules.

Levels are named by the size of their maps, as `64x64`, which depends on the size of the images.
Queries, keys and values alternate in the outputs of one convolution. Beside the network (`unet`) a
file has the uncertainty of the loss (`logvar_*`), which `objectives.wrappers.FourierUncertainty`
learns. Files are pickles (`pretrained.persistent_pickles`), whose settings make the network.
"""

import math
import re
from collections.abc import Iterator, Mapping
from typing import Any

from diffjax.models.edm2.network import EDM2
from diffjax.models.edm2.sizes import SIZES
from diffjax.pretrained.family import Config, Denoiser, Family, Published
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
_OF_THE_REST = "use_fp16", "sigma_data"
"""Settings of the preconditioning, which is not in the network."""
_ONLY = {"channel_mult_noise": None, "channel_mult_emb": None, "resample_filter": [1, 1]}
"""Settings that have one value in all published networks."""


def _settings(entries: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments of `edm2` for those of the authors' `Precond`."""
    rest = {name: x for name, x in entries.items() if name not in (*_ONLY, *_OF_THE_REST)}
    side, channels = rest.pop("img_resolution"), rest.pop("img_channels")
    maps = rest.pop("attn_resolutions", [16, 8])
    if unknown := rest.keys() - _NAMES.keys():
        raise ValueError(f"EDM2 has no {', '.join(sorted(unknown))} here")
    ours = {_NAMES[name]: x for name, x in rest.items()}
    if ours.get("clip", 0) is None:
        ours["clip"] = math.inf
    widths = [ours.get("channels", 192) * n for n in ours.get("channel_multipliers", (1, 2, 3, 4))]
    return ours | {
        "image_shape": (side, side, channels),
        "channels": math.gcd(*widths),
        "channel_multipliers": tuple(width // math.gcd(*widths) for width in widths),
        "attention_levels": tuple(i for i in range(len(widths)) if side >> i in maps),
    }


def _entries(denoiser: Denoiser) -> dict[str, Any]:
    """The arguments of the authors' `Precond` for a network."""
    side, _, channels = denoiser.image_shape
    network = denoiser.network
    theirs = {name: getattr(network, ours) for name, ours in _NAMES.items()}
    return theirs | {
        "img_resolution": side,
        "img_channels": channels,
        "attn_resolutions": [side >> level for level in network.attention_levels],
        "channel_mult": list(network.channel_multipliers),
        "clip_act": None if math.isinf(network.clip) else network.clip,
        "sigma_data": 0.5,
    }


def _published(denoiser: Denoiser) -> Published:
    pixels = denoiser.image_shape[-1] == 3
    # The wrapper of `edm2` has as many terms as all published networks.
    usual = denoiser.network.uncertainty_terms == 128
    return Published(
        objective="objective=edm2" if usual else "objective=edm2,wrappers=none",
        solver="heun",
        grid="karras",
        num_steps=32,
        guidance_scale=1.0,
        codec="" if pixels else "sd-vae-ft-mse-edm2",
    )


FAMILY = Family(
    "EDM2",
    edm2,
    SIZES,
    _table,
    _recognise,
    lambda denoiser: denoiser.inputs,
    config=Config("Precond", _ONLY, _settings, _entries, where="the pickle"),
    published=_published,
)
