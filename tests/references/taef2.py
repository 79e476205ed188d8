"""Latents and images of the authors' TAEF2 for a picture, stored as arrays.

    git clone https://github.com/madebyollin/taesd /tmp/taesd
    npm pack @lobehub/fluent-emoji-3d@1.1.0 && tar xzf lobehub-fluent-emoji-3d-1.1.0.tgz
    python -m tests.references.taef2 /tmp/taesd package/assets/1f98a.webp   # writes TAEF2.npz

It needs torch. The picture is a crop of an emoji of lobehub/fluent-emoji-3d (MIT licence).
"""

import sys
from pathlib import Path

import numpy as np

from diffjax.data.image_folders.folder import read_image

FILE = Path(__file__).parent / "TAEF2.npz"
CROP = slice(80, 128), slice(88, 168)
"""Of 48×80 pixels."""


def main(clone: str, picture: str) -> None:
    """Evaluates the authors' encoder and decoder, in float64."""
    import torch

    sys.path.insert(0, clone)
    network = __import__("taesd").TAESD(f"{clone}/taef2_encoder.pth", f"{clone}/taef2_decoder.pth")
    network = network.double().eval()
    image = read_image(Path(picture), picture, 256)[CROP]
    with torch.inference_mode():
        x = torch.tensor(image.transpose(2, 0, 1)[None] / 255.0)
        latents = network.encoder(x)
        decoded = network.decoder(latents).clamp(0, 1)
    arrays = {"latents": latents, "decoded": decoded}
    stored = {name: x[0].numpy().transpose(1, 2, 0).astype("f4") for name, x in arrays.items()}
    np.savez_compressed(FILE, image=image, **stored)


if __name__ == "__main__":
    main(*sys.argv[1:])
