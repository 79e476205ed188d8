"""The published sizes of Flux.2 (Black Forest Labs 2025).

Numbers of parameters are of latents of 128 channels, which are patches of 32 channels, and of
states of Mistral or Qwen3: three layers of these side by side.
"""

from collections.abc import Mapping

from diffjax.pretrained.family import Size

SIZES: Mapping[str, Size] = {
    "FLUX.2-dev": Size(
        {
            "hidden_size": 6144,
            "depth": 8,
            "single_depth": 48,
            "num_heads": 48,
            "context_width": 15_360,
            "embedded_guidance": 4.0,
            "rotary_axes": (32, 32, 32, 32),
        },
        32_223_281_152,
    ),
    "FLUX.2-klein-4B": Size(
        {
            "hidden_size": 3072,
            "depth": 5,
            "single_depth": 20,
            "num_heads": 24,
            "context_width": 7680,
            "embedded_guidance": 0.0,
            "rotary_axes": (32, 32, 32, 32),
        },
        3_875_544_576,
    ),
    "FLUX.2-klein-9B": Size(
        {
            "hidden_size": 4096,
            "depth": 8,
            "single_depth": 24,
            "num_heads": 32,
            "context_width": 12_288,
            "embedded_guidance": 0.0,
            "rotary_axes": (32, 32, 32, 32),
        },
        9_078_581_248,
    ),
}
