"""Outputs of FLUX.2's autoencoder and of MOVQ, of diffusers, for drawn parameters, as arrays.

    python -m tests.references.autoencoder_kl_kinds     # writes FLUX2.npz and MOVQ.npz

It needs torch and diffusers.
"""

from pathlib import Path
from typing import Any

import numpy as np

from tests.references.autoencoder_kl import parameters

FOLDER = Path(__file__).parent
FLUX2 = {"channels": (8, 12, 16), "num_groups": 4, "latent_channels": 4, "patch_size": 2}
# Spatial norms have 32 groups in all published code.
MOVQ = {"channels": (32, 64), "num_res_blocks": 1, "num_codes": 24, "attention_levels": (1,)}
"""Settings of our networks."""
IMAGES = np.random.default_rng(0).uniform(-1, 1, (2, 16, 24, 3)).astype(np.float32)
LATENTS = np.random.default_rng(1).normal(size=(2, 4, 6, 4)).astype(np.float32)


def flux2() -> Any:
    """FLUX.2's autoencoder, with drawn parameters and statistics."""
    from diffusers.models.autoencoders.autoencoder_kl_flux2 import AutoencoderKLFlux2

    return with_drawn(
        AutoencoderKLFlux2(
            down_block_types=("DownEncoderBlock2D",) * 3,
            up_block_types=("UpDecoderBlock2D",) * 3,
            block_out_channels=FLUX2["channels"],
            norm_num_groups=FLUX2["num_groups"],
            latent_channels=FLUX2["latent_channels"],
        )
    )


def movq() -> Any:
    """MOVQ with attention in its coarsest level, with drawn parameters."""
    from diffusers.models.autoencoders.vq_model import VQModel

    return with_drawn(
        VQModel(
            down_block_types=("DownEncoderBlock2D", "AttnDownEncoderBlock2D"),
            up_block_types=("AttnUpDecoderBlock2D", "UpDecoderBlock2D"),
            block_out_channels=MOVQ["channels"],
            layers_per_block=MOVQ["num_res_blocks"],
            latent_channels=4,
            num_vq_embeddings=MOVQ["num_codes"],
            norm_type="spatial",
        )
    )


def with_drawn(network: Any) -> Any:
    """The network in evaluation mode, with parameters drawn by their names."""
    import torch

    state = network.state_dict()
    drawn = positive(parameters({name: tuple(x.shape) for name, x in state.items() if x.ndim}))
    network.load_state_dict(state | {name: torch.tensor(x) for name, x in drawn.items()})
    return network.eval()


def positive(state: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The state with variances that are such, and a codebook that is spread as latents are."""
    change = {"bn.running_var": np.exp, "quantize.embedding.weight": lambda x: 10 * x}
    return {name: change.get(name, np.asarray)(x) for name, x in state.items()}


def channels_first(x: np.ndarray) -> Any:
    """As torch has it."""
    import torch

    return torch.tensor(x.transpose(0, 3, 1, 2))


def main() -> None:
    """Evaluates the networks of diffusers."""
    import torch

    with torch.inference_mode():
        one = flux2()
        mean = one.encode(channels_first(IMAGES)).latent_dist.mean
        batch, channels, height, width = mean.shape
        packed = mean.reshape(batch, channels, height // 2, 2, width // 2, 2)
        packed = packed.permute(0, 1, 3, 5, 2, 4).reshape(batch, -1, height // 2, width // 2)
        images = one.decode(channels_first(LATENTS)).sample
        save("FLUX2", latents=one.bn(packed), images=images)
        other = movq()
        z = channels_first(LATENTS)
        save(
            "MOVQ",
            latents=other.encode(channels_first(IMAGES)).latents,
            images=other.decode(z, force_not_quantize=True).sample,
            quantised=other.decode(z).sample,
        )


def save(name: str, **arrays: Any) -> None:
    """Writes arrays with channels last."""
    found = {key: x.numpy().transpose(0, 2, 3, 1) for key, x in arrays.items()}
    np.savez_compressed(FOLDER / f"{name}.npz", **found)


if __name__ == "__main__":
    main()
