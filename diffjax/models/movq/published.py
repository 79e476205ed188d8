"""The layouts of MOVQ's files: that of diffusers (`VQModel`) and that of Kandinsky's authors."""

from collections.abc import Mapping
from typing import Any

from diffjax.models.autoencoder_kl.published import (
    AUTHORS,
    DIFFUSERS,
    Layout,
    inputs,
    recognised,
    rows,
)
from diffjax.models.movq.network import MOVQ
from diffjax.models.movq.sizes import SIZES
from diffjax.pretrained.family import Family
from diffjax.pretrained.tables import Row, Table

_CODEBOOK = "quantize.embedding.weight"


def _family(name: str, names: Layout) -> Family:
    def table(network: MOVQ) -> Table:
        return (*rows(names, network), Row(_CODEBOOK, "codebook"))

    def recognise(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Any]:
        return {**recognised(names, shapes), "num_codes": shapes[_CODEBOOK][0]}

    return Family(name, MOVQ, SIZES, table, recognise, inputs, unused=("loss.*", "ema.*"))


FAMILY = _family("MOVQ", DIFFUSERS)
KANDINSKY = _family("MOVQ of Kandinsky", AUTHORS)
LAYOUTS: Mapping[str, Family] = {
    "encoder.mid.attn_1.q": KANDINSKY,
    "encoder.mid_block.attentions.0.to_q": FAMILY,
}
"""As of `AutoencoderKL`."""
