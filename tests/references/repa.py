"""Losses and gradients of the authors' REPA for drawn parameters, stored as arrays.

    git clone https://github.com/sihyun-yu/REPA /tmp/REPA
    python -m tests.references.repa /tmp/REPA     # writes REPA.npz beside this file

It needs torch and timm.
"""

import sys
from pathlib import Path
from typing import Any

import numpy as np

from tests.references.dit import IMAGES, LABELS, NUM_CLASSES, SETTINGS, SIDE, drawn
from tests.references.transformers import projections

FOLDER = Path(__file__).parent
DEPTH, HIDDEN_SIZE, NUMBERS, SCALE = 1, 12, 6, 0.5
CHANNELS = IMAGES.shape[-1]
TIMES = np.array([0.1, 0.45, 0.97], np.float32)
NOISE = np.random.default_rng(1).normal(size=IMAGES.shape).astype(np.float32)
PATCHES = SIDE // SETTINGS["patch_size"]
FEATURES = (
    np.random.default_rng(2)
    .normal(size=(len(IMAGES), PATCHES, PATCHES, NUMBERS))
    .astype(np.float32)
)


def main(clone: str) -> None:
    """Differentiates the authors' loss, at given times and with given noise."""
    import torch

    sys.path.insert(0, clone)
    models: Any = __import__("models.sit", fromlist=["SiT"])
    loss_of: Any = __import__("loss").SILoss()
    network = models.SiT(
        input_size=SIDE,
        in_channels=CHANNELS,
        num_classes=NUM_CLASSES,
        encoder_depth=DEPTH,
        z_dims=[NUMBERS],
        projector_dim=HIDDEN_SIZE,
        decoder_hidden_size=SETTINGS["hidden_size"],
        qk_norm=False,
        **SETTINGS,
    ).eval()
    trained = {name: x for name, x in network.named_parameters() if name != "pos_embed"}
    state = drawn({name: tuple(x.shape) for name, x in trained.items()})
    network.load_state_dict(
        {name: torch.tensor(x) for name, x in state.items()} | {"pos_embed": network.pos_embed.data}
    )
    torch.rand = lambda shape: torch.tensor(TIMES).reshape(shape)
    torch.randn_like = lambda like: torch.tensor(NOISE.transpose(0, 3, 1, 2))
    features = torch.tensor(FEATURES.reshape(len(IMAGES), -1, NUMBERS))
    denoising, alignment = loss_of(
        network, torch.tensor(IMAGES.transpose(0, 3, 1, 2)), {"y": torch.tensor(LABELS)}, [features]
    )
    (denoising.mean() + SCALE * alignment).backward()
    gradients = {name: np.asarray(x.grad) for name, x in trained.items()}
    np.savez_compressed(
        FOLDER / "REPA.npz",
        denoising=denoising.detach().numpy(),
        alignment=alignment.detach().numpy(),
        projections=projections(gradients),
    )


if __name__ == "__main__":
    main(*sys.argv[1:])
