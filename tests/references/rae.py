"""Outputs of RAE of diffusers for drawn parameters, stored as arrays.

    python -m tests.references.rae     # writes RAE.npz beside this file

It needs torch, diffusers and transformers.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from diffjax.models.rae.network import DEVIATION, MEAN
from tests.references.dit import drawn

FILE = Path(__file__).parent / "RAE.npz"
SETTINGS = {
    "encoder_width": 128,
    "encoder_depth": 2,
    "width": 24,
    "depth": 2,
    "num_heads": 4,
    "mlp_width": 40,
    "patch_size": 4,
    "encoder_side": 42,
}
IMAGES = np.random.default_rng(0).uniform(0, 1, (2, 28, 50, 3)).astype(np.float32)
LATENTS = np.random.default_rng(1).normal(size=(2, 3, 3, 128)).astype(np.float32)


def theirs() -> Any:
    """The network of diffusers in evaluation mode, with drawn parameters and statistics."""
    import torch
    from diffusers.models.autoencoders.autoencoder_rae import AutoencoderRAE

    names = {
        "encoder_width": "encoder_hidden_size",
        "encoder_depth": "encoder_num_hidden_layers",
        "width": "decoder_hidden_size",
        "depth": "decoder_num_hidden_layers",
        "num_heads": "decoder_num_attention_heads",
        "mlp_width": "decoder_intermediate_size",
        "patch_size": "patch_size",
        "encoder_side": "encoder_input_size",
    }
    nothing = np.zeros((128, 3, 3)).tolist()
    network = AutoencoderRAE(
        **{names[key]: value for key, value in SETTINGS.items()},
        latents_mean=nothing,
        latents_std=nothing,
    ).eval()
    state = parameters({name: tuple(x.shape) for name, x in network.state_dict().items()})
    network.load_state_dict({name: torch.tensor(x) for name, x in state.items()})
    return network


def parameters(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, np.ndarray]:
    """By the names of diffusers; deviations are positive, images are normalised as published."""
    new = drawn(shapes)
    new["_latents_std"] = np.exp(new["_latents_std"])
    images = {"encoder_mean": MEAN, "encoder_std": DEVIATION}
    new |= {name: x.reshape(1, 3, 1, 1) for name, x in images.items()}
    # DINOv2's are small beside the patches.
    positions = "encoder.embeddings.position_embeddings"
    return new | {positions: 5 * new[positions]}


def main() -> None:
    """Evaluates the network of diffusers."""
    import torch

    network = theirs()
    with torch.inference_mode():
        x, z = (torch.tensor(a.transpose(0, 3, 1, 2)) for a in (IMAGES, LATENTS))
        found = {"latents": network.encode(x).latent, "images": network.decode(z).sample}
    arrays = {name: x.numpy().transpose(0, 2, 3, 1) for name, x in found.items()}
    np.savez_compressed(FILE, **arrays)


if __name__ == "__main__":
    main()
