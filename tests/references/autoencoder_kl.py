"""Outputs of AutoencoderKL of diffusers for drawn parameters, stored as arrays.

    python -m tests.references.autoencoder_kl     # writes AutoencoderKL.npz beside this file

It needs torch and diffusers.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from tests.references.dit import drawn

FILE = Path(__file__).parent / "AutoencoderKL.npz"
SETTINGS = {"channels": (8, 12, 16), "num_res_blocks": 2, "num_groups": 4}
"""Settings of our network; those of diffusers are `theirs`."""
IMAGES = np.random.default_rng(0).uniform(-1, 1, (2, 8, 12, 3)).astype(np.float32)
LATENTS = np.random.default_rng(1).normal(size=(2, 2, 3, 4)).astype(np.float32)


def parameters(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, np.ndarray]:
    """Parameters by the names of diffusers: the norms' epsilon and all of attention matter.

    Convolutions are so weak that variances are small, and attention is far from uniform.
    """
    strong = "norm", "attentions"
    return {
        name: x if any(part in name for part in strong) else 0.1 * x
        for name, x in drawn(shapes).items()
    }


def theirs(latent_channels: int = 4, quant_convs: bool = True) -> Any:
    """The network of diffusers, with drawn parameters."""
    import torch
    from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL

    levels = len(SETTINGS["channels"])
    network = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * levels,
        up_block_types=("UpDecoderBlock2D",) * levels,
        block_out_channels=SETTINGS["channels"],
        layers_per_block=SETTINGS["num_res_blocks"],
        norm_num_groups=SETTINGS["num_groups"],
        latent_channels=latent_channels,
        use_quant_conv=quant_convs,
        use_post_quant_conv=quant_convs,
    ).eval()
    state = parameters({name: tuple(x.shape) for name, x in network.state_dict().items()})
    network.load_state_dict({name: torch.tensor(x) for name, x in state.items()})
    return network


def main() -> None:
    """Evaluates the network of diffusers."""
    import torch

    network = theirs()
    with torch.inference_mode():
        posterior = network.encode(torch.tensor(IMAGES.transpose(0, 3, 1, 2))).latent_dist
        images = network.decode(torch.tensor(LATENTS.transpose(0, 3, 1, 2))).sample
    found = {"mean": posterior.mean, "log_variance": posterior.logvar, "images": images}
    np.savez_compressed(FILE, **{k: x.numpy().transpose(0, 2, 3, 1) for k, x in found.items()})


if __name__ == "__main__":
    main()
