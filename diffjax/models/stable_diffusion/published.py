"""The layouts of Stable Diffusion's U-Nets: of diffusers (`UNet2DConditionModel`), and of LDM.

LDM is the layout of the authors' single files, `model.diffusion_model.input_blocks…`, which number
blocks on the way down and on the way up, as ADM's do. Queries, keys and values of transformers are
layers without biases in both; the dense layers around transformers are convolutions of one pixel,
or dense layers (`linear_projection`).
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

from diffjax.conditions import Classes, Condition, Images, MaskedImages, Numbers, Several, Tokens
from diffjax.errors import UserError
from diffjax.models.stable_diffusion.network import StableDiffusionUNet
from diffjax.models.stable_diffusion.sizes import SIZES
from diffjax.models.unet import WITHOUT_NULL_ROW, Transformers, UNet, multipliers_of, num_groups
from diffjax.pretrained.family import Config, Denoiser, Family, Published
from diffjax.pretrained.tables import Row, Table, count, layer, norm, within
from diffjax.pretrained.transforms import conv, dense, merge, split, squeeze, then

PREFIXES = ("model.diffusion_model.",)
"""What names of the U-Net begin with in files of whole models."""

SIZE_NUMBERS = {
    "original_height": 1024.0,
    "original_width": 1024.0,
    "crop_top": 0.0,
    "crop_left": 0.0,
    "height": 1024.0,
    "width": 1024.0,
}
"""The numbers that SDXL knows an image by, and their usual values at its size."""
SCORE_NUMBERS = {**dict(list(SIZE_NUMBERS.items())[:4]), "aesthetic_score": 6.0}
"""Those of SDXL's refiner, which leads away from pictures of a lower score."""
_LOW_SCORE = (("aesthetic_score", 2.5),)

_pixelwise = then(squeeze(2, 3), dense)
"""A dense layer of each pixel, `[out, in, 1, 1]` there."""

_BLOCK: Table = (
    *(row for i in (1, 2, 3) for row in norm(f"norm{i}", f"norm_{i}")),
    Row(
        ("attn1.to_q.weight", "attn1.to_k.weight", "attn1.to_v.weight"),
        "attention/qkv/kernel",
        merge(3, dense),
    ),
    *layer("attn1.to_out.0", "attention/out"),
    Row("attn2.to_q.weight", "cross_attention/q/kernel", dense),
    Row(("attn2.to_k.weight", "attn2.to_v.weight"), "cross_attention/kv/kernel", merge(2, dense)),
    *layer("attn2.to_out.0", "cross_attention/out"),
    Row("ff.net.0.proj.weight", ("mlp/up/kernel", "mlp/gate/kernel"), split(2, dense)),
    Row("ff.net.0.proj.bias", ("mlp/up/bias", "mlp/gate/bias"), split(2)),
    *layer("ff.net.2", "mlp/down"),
)
RESIDUAL: Table = (
    *norm("norm1", "norm_1"),
    *layer("conv1", "conv_1", conv),
    *layer("time_emb_proj", "modulation"),
    *norm("norm2", "norm_2"),
    *layer("conv2", "conv_2", conv),
    *layer("conv_shortcut", "skip", _pixelwise),
)
"""The rows of a residual block of diffusers."""
REST: Table = (
    *layer("time_embedding.linear_1", "conditioning/hidden"),
    *layer("time_embedding.linear_2", "conditioning/out"),
    Row("time_embedding.cond_proj.weight", "conditioning/augmentation/kernel", dense),
    Row("class_embedding.weight", "conditioning/label/embedding"),
    *layer("add_embedding.linear_1", "added_hidden"),
    *layer("add_embedding.linear_2", "added_out"),
    *layer("conv_in", "conv_in", conv),
    *norm("conv_norm_out", "final_norm"),
    *layer("conv_out", "final_conv", conv),
)
"""The rows of a network of diffusers outside of its blocks."""
_RESIDUALS: Mapping[str, Table] = {
    "diffusers": RESIDUAL,
    "ldm": (
        *norm("in_layers.0", "norm_1"),
        *layer("in_layers.2", "conv_1", conv),
        *layer("emb_layers.1", "modulation"),
        *norm("out_layers.0", "norm_2"),
        *layer("out_layers.3", "conv_2", conv),
        *layer("skip_connection", "skip", _pixelwise),
    ),
}
_RESTS: Mapping[str, Table] = {
    "diffusers": REST,
    "ldm": (
        *layer("time_embed.0", "conditioning/hidden"),
        *layer("time_embed.2", "conditioning/out"),
        Row("label_emb.weight", "conditioning/label/embedding"),
        *layer("label_emb.0.0", "added_hidden"),
        *layer("label_emb.0.2", "added_out"),
        *layer("input_blocks.0.0", "conv_in", conv),
        *norm("out.0", "final_norm"),
        *layer("out.2", "final_conv", conv),
    ),
}


def _places_of_diffusers(network: UNet) -> Iterator[tuple[str, str, str]]:
    """The kind of each block, its published name and ours. Levels count from both ends there."""
    levels, blocks = len(network.channel_multipliers), network.num_res_blocks
    for level in range(levels):
        there, up = f"down_blocks.{level}", f"up_blocks.{levels - 1 - level}"
        for i in range(blocks):
            yield "residual", f"{there}.resnets.{i}", f"down_{level}_{i}"
            yield "transformer", f"{there}.attentions.{i}", f"down_{level}_{i}_transformer"
        yield "conv", f"{there}.downsamplers.0.conv", f"down_{level}_resample"
        for i in range(blocks + 1):
            yield "residual", f"{up}.resnets.{i}", f"up_{level}_{i}"
            yield "transformer", f"{up}.attentions.{i}", f"up_{level}_{i}_transformer"
        yield "conv", f"{up}.upsamplers.0.conv", f"up_{level}_resample"
    yield "residual", "mid_block.resnets.0", "middle_0"
    yield "transformer", "mid_block.attentions.0", "middle_transformer"
    yield "residual", "mid_block.resnets.1", "middle_1"


def _places_of_ldm(network: UNet) -> Iterator[tuple[str, str, str]]:
    """As above, where blocks are numbered along the way, also those that halve."""
    assert network.transformers is not None
    levels, blocks = len(network.channel_multipliers), network.num_res_blocks
    number = 0
    for level in range(levels):
        for i in range(blocks):
            number += 1
            yield "residual", f"input_blocks.{number}.0", f"down_{level}_{i}"
            yield "transformer", f"input_blocks.{number}.1", f"down_{level}_{i}_transformer"
        if level < levels - 1:
            number += 1
            yield "conv", f"input_blocks.{number}.0.op", f"down_{level}_resample"
    yield "residual", "middle_block.0", "middle_0"
    yield "transformer", "middle_block.1", "middle_transformer"
    yield "residual", "middle_block.2", "middle_1"
    number = -1
    for level in reversed(range(levels)):
        for i in range(blocks + 1):
            number += 1
            yield "residual", f"output_blocks.{number}.0", f"up_{level}_{i}"
            yield "transformer", f"output_blocks.{number}.1", f"up_{level}_{i}_transformer"
        place = 1 + (network.transformers.levels[level] > 0)
        yield "conv", f"output_blocks.{number}.{place}.conv", f"up_{level}_resample"


def _table(denoiser: Denoiser, layout: str, places: Iterator[tuple[str, str, str]]) -> Table:
    projection = dense if denoiser.network.linear_projection else _pixelwise
    kinds: Mapping[str, Sequence[Row]] = {
        "residual": _RESIDUALS[layout],
        "transformer": (
            *norm("norm", "norm"),
            *layer("proj_in", "in", projection),
            *layer("proj_out", "out", projection),
            *within(_BLOCK, "transformer_blocks.{j}", "block_{j}"),
        ),
        "conv": (Row("weight", "kernel", conv), Row("bias", "bias")),
    }
    rows = list(_RESTS[layout])
    for kind, theirs, ours in places:
        rows += within(kinds[kind], theirs, ours)
    return rows


def _table_of_diffusers(denoiser: Denoiser) -> Table:
    return _table(denoiser, "diffusers", _places_of_diffusers(denoiser.network))


def _table_of_ldm(denoiser: Denoiser) -> Table:
    return _table(denoiser, "ldm", _places_of_ldm(denoiser.network))


def stable_diffusion(
    image_shape: tuple[int, int, int] = (64, 64, 4),
    context_width: int = 768,
    given_channels: int = 0,
    added_features: int = 0,
    num_numbers: int = 0,
    num_classes: int = 0,
    number_width: int = 256,
    guidance_width: int = 0,
    embedded_guidance: float | None = None,
    **settings: Any,
) -> Denoiser:
    """A U-Net of Stable Diffusion with the kind of its condition.

    Args:
        image_shape: the shape of its latents.
        context_width: the width of the condition's token states.
        given_channels: the number of channels of images beside the latents; 5 for inpainting, a
            mask and the latents of the image that is kept.
        added_features: the width of the pooled vector and all embedded numbers; 2816 in SDXL.
        num_numbers: the number of numbers, 6 in SDXL.
        num_classes: the number of labels.
        number_width: the width of an embedded number, where there are some.
        guidance_width: the width of the embedding of a scale of guidance; 256 in LCM.
        embedded_guidance: that scale, where it is embedded; 8 by default.
        **settings: settings of the network.

    Raises:
        UserError: a scale for a network that embeds none.
    """
    embedding = replace(WITHOUT_NULL_ROW, added_width=number_width if num_numbers else 0)
    if guidance_width:
        embedding = replace(embedding, guidance_width=guidance_width)
    if embedded_guidance is not None:
        if not guidance_width:
            raise UserError(
                f"embedded_guidance={embedded_guidance}: this network embeds no scale of guidance, "
                "take guidance_scale"
            )
        embedding = replace(embedding, embedded_guidance=embedded_guidance)
    settings = {"embedding": embedding, **settings}
    network = StableDiffusionUNet(num_classes, **settings)
    pooled = added_features - num_numbers * number_width
    parts: dict[str, Condition] = {"text": Tokens(77, context_width, pooled)}
    if num_numbers:
        parts["size"] = _numbers(num_numbers)
    if given_channels:
        kind = MaskedImages if given_channels == image_shape[2] + 1 else Images
        parts["image"] = kind((*image_shape[:2], given_channels))
    if num_classes:
        parts["label"] = Classes(num_classes)
    kept = tuple(name for name in parts if name != "text")
    return Denoiser(network, image_shape, with_parts(parts, kept))


def with_parts(parts: Mapping[str, Condition], kept: tuple[str, ...]) -> Condition:
    """The text alone, or the text beside other parts."""
    return Several(parts, kept, main="text") if len(parts) > 1 else parts["text"]


def _numbers(count: int) -> Numbers:
    for known, away in ((SIZE_NUMBERS, ()), (SCORE_NUMBERS, _LOW_SCORE)):
        if len(known) == count:
            return Numbers(tuple(known), tuple(known.values()), negative_values=away)
    return Numbers(tuple(f"number_{i}" for i in range(count)), (0.0,) * count)


def _recognised(shapes: Mapping[str, tuple[int, ...]], names: Mapping[str, str]) -> dict[str, Any]:
    """What all layouts show in the same way, by the names of the layers."""
    channels, image_channels, _, _ = shapes[f"{names['conv_in']}.weight"]
    out_channels = shapes[f"{names['conv_out']}.bias"][0]
    middle = f"{names['middle']}.transformer_blocks"
    added = shapes.get(f"{names['added']}.weight", (0, 0))[1]
    guided = shapes.get("time_embedding.cond_proj.weight", (0, 0))[1]
    return {
        "channels": channels,
        "out_channels": out_channels,
        "given_channels": image_channels - out_channels,
        "num_classes": shapes.get(f"{names['label']}.weight", (0,))[0],
        "context_width": shapes[f"{middle}.0.attn2.to_k.weight"][1],
        "linear_projection": len(shapes[f"{names['middle']}.proj_in.weight"]) == 2,
        **({"added_features": added} if added else {}),
        **({"guidance_width": guided} if guided else {}),
    }


_NAMES = {
    "conv_in": "conv_in",
    "conv_out": "conv_out",
    "middle": "mid_block.attentions.0",
    "label": "class_embedding",
    "added": "add_embedding.linear_1",
}
_NAMES_OF_LDM = {
    "conv_in": "input_blocks.0.0",
    "conv_out": "out.2",
    "middle": "middle_block.1",
    "label": "label_emb",
    "added": "label_emb.0.0",
}


def _recognise(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Any]:
    found = _recognised(shapes, _NAMES)
    levels = count("down_blocks.{i}.resnets.0.conv1.bias", shapes)
    widths = [shapes[f"down_blocks.{i}.resnets.0.conv1.bias"][0] for i in range(levels)]
    block = "transformer_blocks.{j}.norm1.bias"
    depths = [count(f"down_blocks.{i}.attentions.0.{block}", shapes) for i in range(levels)]
    return found | {
        "channel_multipliers": multipliers_of(found["channels"], widths),
        "num_res_blocks": count("down_blocks.0.resnets.{i}.conv1.bias", shapes),
        "transformers": Transformers(
            tuple(depths), count(f"mid_block.attentions.0.{block}", shapes)
        ),
    }


def _recognise_ldm(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Any]:
    found = _recognised(shapes, _NAMES_OF_LDM)
    # A level ends with a block that halves.
    halvings = count("input_blocks.{i}.0.op.bias", shapes)
    blocks = count("input_blocks.{i}.0.in_layers.2.bias", shapes) // (halvings + 1)
    firsts = [1 + level * (blocks + 1) for level in range(halvings + 1)]
    block = "transformer_blocks.{j}.norm1.bias"
    return found | {
        "channel_multipliers": multipliers_of(
            found["channels"], [shapes[f"input_blocks.{i}.0.in_layers.2.bias"][0] for i in firsts]
        ),
        "num_res_blocks": blocks,
        "transformers": Transformers(
            tuple(count(f"input_blocks.{i}.1.{block}", shapes) for i in firsts),
            count(f"middle_block.1.{block}", shapes),
        ),
    }


_FIXED: Mapping[str, Any] = {
    "act_fn": "silu",
    "attention_type": "default",
    "center_input_sample": False,
    "class_embed_type": None,
    "class_embeddings_concat": False,
    "conv_in_kernel": 3,
    "conv_out_kernel": 3,
    "cross_attention_norm": None,
    "downsample_padding": 1,
    "dual_cross_attention": False,
    "encoder_hid_dim": None,
    "encoder_hid_dim_type": None,
    "flip_sin_to_cos": True,
    "freq_shift": 0,
    "mid_block_only_cross_attention": None,
    "mid_block_scale_factor": 1,
    "mid_block_type": "UNetMidBlock2DCrossAttn",
    "num_attention_heads": None,
    "only_cross_attention": False,
    "resnet_out_scale_factor": 1.0,
    "resnet_skip_time_act": False,
    "resnet_time_scale_shift": "default",
    "reverse_transformer_layers_per_block": None,
    "time_embedding_act_fn": None,
    "time_embedding_dim": None,
    "time_embedding_type": "positional",
    "timestep_post_act": None,
}
_KINDS = {"DownBlock2D": False, "CrossAttnDownBlock2D": True}
_UP = {False: "UpBlock2D", True: "CrossAttnUpBlock2D"}
_DEFAULTS: Mapping[str, Any] = {
    "sample_size": 64,
    "out_channels": 4,
    "block_out_channels": (320, 640, 1280, 1280),
    "down_block_types": (*("CrossAttnDownBlock2D",) * 3, "DownBlock2D"),
    "layers_per_block": 2,
    "cross_attention_dim": 1280,
    "attention_head_dim": 8,
    "norm_num_groups": 32,
    "norm_eps": 1e-5,
    "transformer_layers_per_block": 1,
    "use_linear_projection": False,
    "in_channels": 4,
}
"""What diffusers takes where an entry is missing."""


def _settings(config: Mapping[str, Any]) -> dict[str, Any]:
    given = {name: config.get(name, value) for name, value in _DEFAULTS.items()}
    widths = [int(width) for width in given["block_out_channels"]]
    attends = [_KINDS[kind] for kind in given["down_block_types"]]
    ups = config.get("up_block_types", [_UP[here] for here in attends[::-1]])
    if list(ups) != [_UP[here] for here in attends[::-1]]:
        raise ValueError(f"up_block_types={ups} do not mirror down_block_types")
    side = given["sample_size"]
    height, width = (side, side) if isinstance(side, int) else side
    depths = _each(given["transformer_layers_per_block"], len(widths))
    channels, out_channels = int(given["in_channels"]), int(given["out_channels"])
    added: dict[str, Any] = {}
    if (kind := config.get("addition_embed_type")) is not None:
        if kind != "text_time":
            raise ValueError(f"addition_embed_type={kind!r} is not known here")
        features = int(config["projection_class_embeddings_input_dim"])
        number_width = int(config["addition_time_embed_dim"])
        added = {
            "added_features": features,
            "number_width": number_width,
            "num_numbers": _count_numbers(features, number_width, config),
        }
    return {
        "image_shape": (int(height), int(width), out_channels),
        "context_width": int(given["cross_attention_dim"]),
        "given_channels": channels - out_channels,
        "num_classes": int(config.get("num_class_embeds") or 0),
        "guidance_width": int(config.get("time_cond_proj_dim") or 0),
        "channels": widths[0],
        "channel_multipliers": multipliers_of(widths[0], widths),
        "num_res_blocks": int(given["layers_per_block"]),
        "out_channels": out_channels,
        "transformers": Transformers(
            tuple(depth if here else 0 for depth, here in zip(depths, attends, strict=True)),
            depths[-1],
        ),
        "linear_projection": bool(given["use_linear_projection"]),
        "norm_epsilon": float(given["norm_eps"]),
        "dropout": float(config.get("dropout", 0.0)),
        "num_groups": groups_of(int(given["norm_num_groups"]), widths),
        **_heads(given["attention_head_dim"], widths),
        **added,
    }


def _count_numbers(features: int, width: int, config: Mapping[str, Any]) -> int:
    """How many numbers there are beside the pooled vector: six, or five in the refiner.

    The refiner's text has one encoder, so its pooled vector is as wide as its states.
    """
    states = int(config["cross_attention_dim"])
    return next((n for n in (5, 6) if features - n * width == states), 6)


def _each(value: Any, length: int) -> list[int]:
    """A number for each level, from one for all or from a list."""
    values = [int(value)] * length if isinstance(value, int) else [int(x) for x in value]
    if len(values) != length:
        raise ValueError(f"{value} has {len(values)} numbers for {length} levels")
    return values


def _heads(given: Any, widths: Sequence[int]) -> dict[str, int]:
    """The numbers of heads, which `attention_head_dim` is: the same for all, or of equal widths."""
    heads = _each(given, len(widths))
    if len(set(heads)) == 1:
        return {"num_heads": heads[0]}
    sizes = {width // n if not width % n else 0 for width, n in zip(widths, heads, strict=True)}
    if len(sizes) > 1 or 0 in sizes:
        raise ValueError(f"attention_head_dim={given}: heads on all levels are to have one width")
    return {"num_heads": 0, "head_channels": sizes.pop()}


def groups_of(given: int, widths: Sequence[int]) -> int:
    """The setting `num_groups`: 0 where the rule of `UNet` returns the same number."""
    same = all(num_groups(width) == given for width in widths)
    return 0 if same else given


def _config(denoiser: Denoiser) -> dict[str, Any]:
    network, (height, width, _) = denoiser.network, denoiser.image_shape
    depths, widths = network.transformers.levels, widths_of(network)
    parts = parts_of_condition(denoiser.condition)
    tokens, size = parts["text"], parts.get("size")
    heads = [network.num_heads or width // network.head_channels for width in widths]
    middle = network.transformers.middle
    layers = [depth or middle for depth in depths]
    given = parts["image"].shape[-1] if "image" in parts else 0
    if layers[-1] != middle:
        raise UserError(
            f"UNet2DConditionModel has as many transformer blocks in the middle as on the last "
            f"level, and this network has {middle} and {layers[-1]}"
        )
    added: dict[str, Any] = {}
    if size is not None and network.embedding.added_width:
        features = tokens.pooled_width + len(size.names) * network.embedding.added_width
        added = {
            "addition_embed_type": "text_time",
            "addition_time_embed_dim": network.embedding.added_width,
            "projection_class_embeddings_input_dim": features,
        }
    return {
        "sample_size": height if height == width else [height, width],
        "in_channels": network.out_channels + given,
        "out_channels": network.out_channels,
        "num_class_embeds": network.num_classes or None,
        "time_cond_proj_dim": network.embedding.guidance_width or None,
        "block_out_channels": widths,
        "layers_per_block": network.num_res_blocks,
        "down_block_types": [list(_KINDS)[depth > 0] for depth in depths],
        "up_block_types": [_UP[depth > 0] for depth in depths[::-1]],
        "cross_attention_dim": tokens.width,
        "transformer_layers_per_block": layers[0] if len(set(layers)) == 1 else layers,
        "attention_head_dim": heads[0] if len(set(heads)) == 1 else heads,
        "use_linear_projection": network.linear_projection,
        "norm_eps": network.norm_epsilon,
        "norm_num_groups": one_number_of_groups(network),
        "dropout": network.dropout,
        **added,
    }


def one_number_of_groups(network: UNet) -> int:
    """The number of groups of all norms.

    Raises:
        UserError: there are several.
    """
    groups = {network.num_groups or num_groups(width) for width in widths_of(network)}
    if len(groups) > 1:
        raise UserError(
            f"UNet2DConditionModel has one number of groups, and this network has "
            f"{sorted(groups)}: set num_groups"
        )
    return groups.pop()


def parts_of_condition(condition: Condition) -> dict[str, Any]:
    """The kinds of the parts of a condition by name; of a text alone, the text."""
    return dict(condition.parts) if isinstance(condition, Several) else {"text": condition}


def widths_of(network: UNet) -> list[int]:
    """The widths of levels."""
    return [int(m * network.channels) for m in network.channel_multipliers]


def _published(denoiser: Denoiser) -> Published:
    """Predicted noise, as most files; a pipeline has its own in `scheduler_config.json`."""
    xl = denoiser.network.embedding.added_width > 0
    return Published(
        objective="objective=ddpm_table,path=scaled_linear_table,noise_label=step",
        solver="ddim",
        grid="leading",
        num_steps=50,
        guidance_scale=5.0 if xl else 7.5,
        codec="sdxl-vae" if xl else "sd-vae-ft-mse",
    )


FAMILY = Family(
    "Stable Diffusion",
    stable_diffusion,
    SIZES,
    _table_of_diffusers,
    _recognise,
    lambda denoiser: denoiser.inputs,
    config=Config("UNet2DConditionModel", _FIXED, _settings, _config),
    published=_published,
)
LDM = Family(
    "Stable Diffusion of LDM",
    stable_diffusion,
    SIZES,
    _table_of_ldm,
    _recognise_ldm,
    lambda denoiser: denoiser.inputs,
    published=_published,
)
