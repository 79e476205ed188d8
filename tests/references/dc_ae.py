"""Outputs of DC-AE of diffusers, of both kinds, for drawn parameters, stored as arrays.

    python -m tests.references.dc_ae     # writes DCAE.npz beside this file

It needs torch and diffusers.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from tests.references.dit import drawn

FILE = Path(__file__).parent / "DCAE.npz"
_BOTH = {"latent_channels": 4, "attention_levels": (2,), "head_width": 8}
SETTINGS: Mapping[str, dict[str, Any]] = {
    "shuffled": {
        **_BOTH,
        "channels": (8, 16, 32),
        "encoder_blocks": (0, 2, 2),
        "decoder_blocks": (0, 1, 2),
    },
    "strided": {
        **_BOTH,
        "channels": (8, 16, 16),
        "encoder_blocks": (1, 2, 2),
        "decoder_blocks": (2, 1, 1),
        "kernel_sizes": (5,),
        "batch_norm": False,
        "shuffle": False,
    },
}
"""Settings of our networks: those of the authors' ImageNet, and of Sana."""
IMAGES = np.random.default_rng(0).uniform(-1, 1, (2, 16, 24, 3)).astype(np.float32)
LATENTS = np.random.default_rng(1).normal(size=(2, 4, 6, 4)).astype(np.float32)


def theirs(kind: str) -> Any:
    """The network of diffusers in evaluation mode, with drawn parameters and statistics."""
    import torch
    from diffusers.models.autoencoders.autoencoder_dc import AutoencoderDC

    ours = SETTINGS[kind]
    scales = ((), (), ours.get("kernel_sizes", ()))
    blocks = "ResBlock", "ResBlock", "EfficientViTBlock"
    published = {
        "shuffled": {
            "decoder_norm_types": ("batch_norm", "batch_norm", "rms_norm"),
            "decoder_act_fns": ("relu", "relu", "silu"),
        },
        "strided": {"upsample_block_type": "interpolate", "downsample_block_type": "Conv"},
    }
    network = AutoencoderDC(
        latent_channels=ours["latent_channels"],
        attention_head_dim=ours["head_width"],
        encoder_block_types=blocks,
        decoder_block_types=blocks,
        encoder_block_out_channels=ours["channels"],
        decoder_block_out_channels=ours["channels"],
        encoder_layers_per_block=ours["encoder_blocks"],
        decoder_layers_per_block=ours["decoder_blocks"],
        encoder_qkv_multiscales=scales,
        decoder_qkv_multiscales=scales,
        **published[kind],
    ).eval()
    state = network.state_dict()
    new = parameters({name: tuple(x.shape) for name, x in state.items() if x.ndim})
    network.load_state_dict(state | {name: torch.tensor(x) for name, x in new.items()})
    return network


def parameters(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, np.ndarray]:
    """By the names of diffusers: convolutions are so weak that the norms' epsilon matters."""

    def changed(name: str, x: np.ndarray) -> np.ndarray:
        if name.endswith("running_var"):
            return np.exp(x)
        return 0.1 * x if x.ndim == 4 and ".attn." not in name else x

    return {name: changed(name, x) for name, x in drawn(shapes).items()}


def main() -> None:
    """Evaluates the networks of diffusers."""
    import torch

    arrays = {}
    with torch.inference_mode():
        for kind in SETTINGS:
            network = theirs(kind)
            x, z = (torch.tensor(a.transpose(0, 3, 1, 2)) for a in (IMAGES, LATENTS))
            arrays[f"{kind}/latents"] = network.encode(x).latent
            arrays[f"{kind}/images"] = network.decode(z).sample
    found = {name: x.numpy().transpose(0, 2, 3, 1) for name, x in arrays.items()}
    np.savez_compressed(FILE, **found)


if __name__ == "__main__":
    main()
