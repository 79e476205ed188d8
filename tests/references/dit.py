"""Outputs of the authors' DiT and SiT for drawn parameters, stored as arrays.

    git clone https://github.com/facebookresearch/DiT /tmp/DiT
    git clone https://github.com/willisma/SiT /tmp/SiT
    python -m tests.references.dit DiT /tmp/DiT     # writes DiT.npz beside this file
    python -m tests.references.dit SiT /tmp/SiT

It needs torch and timm.
"""

import sys
import zlib
from collections.abc import Mapping
from pathlib import Path

import numpy as np

FOLDER = Path(__file__).parent
SETTINGS = {"hidden_size": 16, "depth": 2, "num_heads": 2, "patch_size": 2}
SIDE, CHANNELS, NUM_CLASSES = 8, 3, 5
NOISE_LABELS = np.array([0.0, 17.0, 999.0], np.float32)
LABELS = np.array([0, 3, NUM_CLASSES], np.int32)
IMAGES = np.random.default_rng(0).normal(size=(3, SIDE, SIDE, CHANNELS)).astype(np.float32)


def drawn(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, np.ndarray]:
    """Parameters by name: none is as initialised, and all matter."""
    state = {}
    for name, shape in shapes.items():
        random = np.random.default_rng(zlib.crc32(name.encode()))
        scale = shape[-1] ** -0.5 if len(shape) > 1 else 0.3
        state[name] = (scale * random.normal(size=shape)).astype(np.float32)
    return state


def main(name: str, clone: str) -> None:
    """Evaluates the authors' network of this name."""
    import torch

    sys.path.insert(0, clone)
    models = __import__("models")
    network = getattr(models, name)(
        input_size=SIDE, in_channels=CHANNELS, num_classes=NUM_CLASSES, learn_sigma=True, **SETTINGS
    ).eval()
    shapes = {name: tuple(value.shape) for name, value in network.named_parameters()}
    shapes.pop("pos_embed")
    state = {name: torch.tensor(value) for name, value in drawn(shapes).items()}
    network.load_state_dict(state | {"pos_embed": network.pos_embed.data})
    with torch.inference_mode():
        out = network(
            torch.tensor(IMAGES.transpose(0, 3, 1, 2)),
            torch.tensor(NOISE_LABELS),
            torch.tensor(LABELS),
        )
    np.savez_compressed(
        FOLDER / f"{name}.npz",
        out=out.numpy().transpose(0, 2, 3, 1),
        pos_embed=network.pos_embed.data.numpy(),
    )


if __name__ == "__main__":
    main(*sys.argv[1:])
