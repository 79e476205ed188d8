"""The layouts of MOVQ's files: that of diffusers (`VQModel`) and that of Kandinsky's authors."""

from collections.abc import Mapping
from typing import Any

from diffjax.models.autoencoder_kl.published import (
    AUTHORS,
    DIFFUSERS,
    FIXED,
    Layout,
    entries_of_levels,
    inputs,
    recognised,
    rows,
    settings_of_levels,
)
from diffjax.models.movq.network import MOVQ
from diffjax.models.movq.sizes import SIZES
from diffjax.pretrained.family import Config, Family
from diffjax.pretrained.tables import Row, Table

_CODEBOOK = "quantize.embedding.weight"


def _family(name: str, names: Layout, config: Config | None = None) -> Family:
    def table(network: MOVQ) -> Table:
        return (*rows(names, network), Row(_CODEBOOK, "codebook"))

    def recognise(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Any]:
        return {**recognised(names, shapes), "num_codes": shapes[_CODEBOOK][0]}

    unused = ("loss.*", "ema.*")
    return Family(name, MOVQ, SIZES, table, recognise, inputs, unused, config=config)


def _settings(config: Mapping[str, Any]) -> dict[str, Any]:
    return {**settings_of_levels(config), "num_codes": int(config["num_vq_embeddings"])}


def _config(network: MOVQ) -> dict[str, Any]:
    return {
        **entries_of_levels(network),
        "num_vq_embeddings": network.num_codes,
        "vq_embed_dim": network.latent_channels,
    }


_OF_DIFFUSERS = Config("VQModel", {**FIXED, "norm_type": "spatial"}, _settings, _config)
FAMILY = _family("MOVQ", DIFFUSERS, _OF_DIFFUSERS)
KANDINSKY = _family("MOVQ of Kandinsky", AUTHORS)
LAYOUTS: Mapping[str, Family] = {
    "encoder.mid.attn_1.q.weight": KANDINSKY,
    "encoder.mid_block.attentions.0.to_q.weight": FAMILY,
}
"""The families of all layouts, by a tensor that is in the files of each alone."""
