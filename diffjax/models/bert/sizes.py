"""The sizes of published encoders; the layer of BERT's own pooled vector is not counted."""

from collections.abc import Mapping

from diffjax.pretrained.family import Size

SIZES: Mapping[str, Size] = {
    "minilm-l6": Size({"width": 384, "depth": 6, "num_heads": 12}, 22_565_376),
    "minilm-l12": Size({"width": 384, "depth": 12, "num_heads": 12}, 33_212_160),
    "bert-base": Size({"width": 768, "depth": 12, "num_heads": 12}, 108_891_648),
    "bert-large": Size({"width": 1024, "depth": 24, "num_heads": 16}, 334_092_288),
}
MCLIP_SIZES: Mapping[str, Size] = {
    "mclip-xlm-roberta-large": Size(
        {"width": 1024, "depth": 24, "num_heads": 16, "vocabulary": 250_002, "num_segments": 1},
        559_628_032,
    ),
}
"""The text encoder of Kandinsky 2.1."""
