"""The published autoencoders, by the names of their files (github.com/madebyollin/taesd).

`taesd` is of Stable Diffusion 1 and 2, `taesd3` of 3, `taef1` and `taef2` of FLUX.1 and FLUX.2.
"""

from collections.abc import Mapping
from dataclasses import replace

from diffjax.pretrained.family import Size

ADDRESS = "https://github.com/madebyollin/taesd/raw/main"
"""The start of the URLs of all files, a `path` of the codec `TAESD`."""
_4 = {"latent_channels": 4}
_16 = {"latent_channels": 16}
_32 = {"latent_channels": 32, "pooled": True}

ENCODERS: Mapping[str, Size] = {
    "taesd": Size(_4, 1_222_532, f"{ADDRESS}/taesd_encoder.pth"),
    "taesdxl": Size(_4, 1_222_532, f"{ADDRESS}/taesdxl_encoder.pth"),
    "taesd3": Size(_16, 1_229_456, f"{ADDRESS}/taesd3_encoder.pth"),
    "taef1": Size(_16, 1_229_456, f"{ADDRESS}/taef1_encoder.pth"),
    "taef2": Size(
        _32,
        1_338_528,
        f"{ADDRESS}/taef2_encoder.pth",
        "10a4e1021e89d7551eaf161352da8dbd0b1aa83872ae28b150c1df1ce2f147b6",
    ),
}
DECODERS: Mapping[str, Size] = {
    "taesd": Size(_4, 1_222_531, f"{ADDRESS}/taesd_decoder.pth"),
    "taesdxl": Size(_4, 1_222_531, f"{ADDRESS}/taesdxl_decoder.pth"),
    "taesd3": Size(_16, 1_229_443, f"{ADDRESS}/taesd3_decoder.pth"),
    "taef1": Size(_16, 1_229_443, f"{ADDRESS}/taef1_decoder.pth"),
    "taef2": Size(
        _32,
        1_338_499,
        f"{ADDRESS}/taef2_decoder.pth",
        "0a44a31e1ae59eb9dbf9359d24942fd3ef5928162c1800d97a28c61d51be0ab5",
    ),
}
BOTH: Mapping[str, Size] = {
    name: Size(size.settings, size.num_parameters + DECODERS[name].num_parameters)
    for name, size in ENCODERS.items()
}
"""An encoder with its decoder, of two files."""
_HUB = "https://huggingface.co/madebyollin"
OF_DIFFUSERS: Mapping[str, Size] = {
    name: replace(size, address=f"{_HUB}/{name}/resolve/main/diffusion_pytorch_model.safetensors")
    for name, size in BOTH.items()
    if "pooled" not in size.settings
}
"""The same in one file, without the one of FLUX.2, which diffusers does not have."""
