"""The sizes of JiT (Li & He 2025, table 9): patches of 16 at 256 pixels, of 32 at 512.

Numbers of parameters are for 3 channels and 1,000 classes: 131 M (B/16), 459 M, 953 M and 2 B
(G/16) in table 7, 133 M, 462 M, 956 M and 2 B with patches of 32 in table 8. The authors' code
counts the fixed position embeddings too.
"""

from collections.abc import Mapping

from diffjax.pretrained.family import Size

_WIDTHS = {
    "B": {"hidden_size": 768, "depth": 12, "num_heads": 12},
    "L": {"hidden_size": 1024, "depth": 24, "num_heads": 16},
    "H": {"hidden_size": 1280, "depth": 32, "num_heads": 16},
    "G": {"hidden_size": 1664, "depth": 40, "num_heads": 16},
}
_CONTEXT = {
    "B": {"bottleneck": 128, "class_tokens_from": 4},
    "L": {"bottleneck": 128, "class_tokens_from": 8},
    "H": {"bottleneck": 256, "class_tokens_from": 10},
    "G": {"bottleneck": 256, "class_tokens_from": 10},
}
_NUM_PARAMETERS = {
    "B": {16: 131_123_712, 32: 133_190_400},
    "L": {16: 458_877_664, 32: 461_534_176},
    "H": {16: 952_514_368, 32: 956_055_616},
    "G": {16: 2_007_130_000, 32: 2_011_555_984},
}

SIZES: Mapping[str, Size] = {
    f"JiT-{name}/{patch_size}": Size(
        {"patch_size": patch_size, **widths, **_CONTEXT[name], "num_class_tokens": 32},
        _NUM_PARAMETERS[name][patch_size],
    )
    for name, widths in _WIDTHS.items()
    for patch_size in (16, 32)
}
