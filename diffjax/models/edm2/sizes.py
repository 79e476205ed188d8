"""The published sizes of EDM2 (Karras et al. 2024, tables 2 and 3), and what their latents are.

Numbers of parameters are for 1,000 classes, with those of the uncertainty, and with frequencies and
phases, which are constants. Files are those of the best FID without guidance
(NVlabs/edm2, `generate_images.py`); beside them are files of other averages and of networks without
classes.
"""

from collections.abc import Mapping

from diffjax.pretrained.family import Size

_HUB = "https://nvlabs-fi-cdn.nvidia.com/edm2/posthoc-reconstructions"
_PIXELS = {"image_shape": (64, 64, 3)}


def _settings(channels: int, dropout: float = 0.0) -> dict[str, float]:
    return {"channels": channels, "dropout": dropout}


SIZES: Mapping[str, Size] = {
    "EDM2-XXS": Size(_settings(64), 31_309_413),
    "EDM2-XS": Size(_settings(128), 124_713_765, f"{_HUB}/edm2-img512-xs-2147483-0.135.pkl"),
    "EDM2-S": Size(_settings(192), 280_213_477, f"{_HUB}/edm2-img512-s-2147483-0.130.pkl"),
    "EDM2-M": Size(_settings(256, 0.1), 497_808_549, f"{_HUB}/edm2-img512-m-2147483-0.100.pkl"),
    "EDM2-L": Size(_settings(320, 0.1), 777_498_981, f"{_HUB}/edm2-img512-l-1879048-0.085.pkl"),
    "EDM2-XL": Size(_settings(384, 0.1), 1_119_284_773, f"{_HUB}/edm2-img512-xl-1342177-0.085.pkl"),
    "EDM2-XXL": Size(
        _settings(448, 0.1), 1_523_165_925, f"{_HUB}/edm2-img512-xxl-0939524-0.070.pkl"
    ),
}
"""By their settings, for latents `[64, 64, 4]` of 512 pixels."""
