"""Outputs, gradients and samples of the authors' EDM2 for drawn parameters, stored as arrays.

    git clone https://github.com/NVlabs/edm2 /tmp/edm2
    python -m tests.references.edm2 /tmp/edm2     # writes EDM2.npz beside this file

It needs torch, and what their `generate_images.py` imports.

A gradient is stored by its norm and inner products with drawn arrays of its shape (`seen`).
"""

import sys
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from tests.references.dit import drawn

FOLDER = Path(__file__).parent
HEIGHT, WIDTH, CHANNELS, NUM_CLASSES = 8, 12, 3, 5
SIGMAS = np.array([0.02, 0.7, 40.0], np.float32)
LABELS = np.array([0, 3, NUM_CLASSES], np.int32)  # the last one is none: zeros there
RNG = np.random.default_rng(0)
IMAGES = RNG.normal(size=(3, HEIGHT, WIDTH, CHANNELS)) * np.hypot(SIGMAS, 0.5)[:, None, None, None]
IMAGES = IMAGES.astype(np.float32)
COTANGENT = RNG.normal(size=IMAGES.shape).astype(np.float32)
THEIRS = {
    "model_channels": 8,
    "channel_mult": [1, 2],
    "num_blocks": 1,
    "attn_resolutions": [4],
    "channels_per_head": 4,
    "label_balance": 0.4,
    "concat_balance": 0.6,
    "res_balance": 0.35,
    "attn_balance": 0.25,
    "clip_act": 1.5,
    "logvar_channels": 16,
}
RATE, STEPS = 0.01, 3
NOISE = RNG.normal(size=(3, HEIGHT, HEIGHT, CHANNELS)).astype(np.float32)
SAMPLED_LABELS, NUM_STEPS = np.array([0, 3, 4], np.int32), 5


def parameters(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, np.ndarray]:
    """Parameters and buffers by their names: frequencies are large, and gains are not zero."""
    return {
        name: x * (np.float32(10.0) if "fourier" in name else np.float32(1.0))
        for name, x in drawn(shapes).items()
    }


def seen(arrays: Mapping[str, np.ndarray]) -> np.ndarray:
    """The norm of each array, and its inner products with three drawn ones, by names in order."""
    rows = []
    for name in sorted(arrays):
        random = np.random.default_rng(zlib.crc32(name.encode()) + 1)
        wide = np.asarray(arrays[name], np.float64)
        products = [np.sum(wide * random.normal(size=wide.shape)) for _ in range(3)]
        rows.append([np.linalg.norm(wide), *products])
    return np.array(rows)


def main(clone: str) -> None:
    """Evaluates, differentiates and trains the authors' network."""
    import torch

    sys.path.insert(0, clone)
    networks = __import__("training.networks_edm2", fromlist=["Precond"])
    network = networks.Precond(
        HEIGHT, CHANNELS, label_dim=NUM_CLASSES, use_fp16=False, sigma_data=0.5, **THEIRS
    )
    shapes = {name: tuple(value.shape) for name, value in network.state_dict().items()}
    state = {name: torch.tensor(value) for name, value in parameters(shapes).items()}
    sigmas = torch.tensor(SIGMAS)
    labels = torch.nn.functional.one_hot(torch.tensor(LABELS).long(), NUM_CLASSES + 1)[:, :-1]
    cotangent = torch.tensor(COTANGENT.transpose(0, 3, 1, 2))
    outputs = []
    network.unet.register_forward_hook(lambda _, inputs, out: outputs.append(out))

    def loss(x):
        """A function of the output of the network, of the denoiser, and of the uncertainty."""
        denoised, logvar = network(x, sigmas, labels, return_logvar=True)
        total = (outputs[-1] * cotangent).sum() + (logvar.flatten() * sigmas).sum()
        return total, denoised, logvar

    found = {}
    for mode in ("eval", "train"):
        network.load_state_dict(state)
        network.train(mode == "train")
        network.zero_grad()
        x: Any = torch.tensor(IMAGES.transpose(0, 3, 1, 2)).requires_grad_()
        total, denoised, logvar = loss(x)
        total.backward()
        found[f"{mode}/out"] = outputs[-1].detach().numpy().transpose(0, 2, 3, 1)
        found[f"{mode}/denoised"] = denoised.detach().numpy().transpose(0, 2, 3, 1)
        found[f"{mode}/logvar"] = logvar.detach().numpy().flatten()
        found[f"{mode}/of_images"] = x.grad.numpy().transpose(0, 2, 3, 1)
        gradients = {name: weight.grad.numpy() for name, weight in network.named_parameters()}
        found[f"{mode}/of_parameters"] = seen(gradients)

    network.load_state_dict(state)
    optimizer = torch.optim.Adam(network.parameters(), lr=RATE, betas=(0.9, 0.99))
    for _ in range(STEPS):
        optimizer.zero_grad()
        loss(torch.tensor(IMAGES.transpose(0, 3, 1, 2)))[0].backward()
        optimizer.step()
    with torch.no_grad():
        loss(torch.tensor(IMAGES.transpose(0, 3, 1, 2)))  # This normalises the weights.
    trained = {name: weight.detach().numpy() for name, weight in network.named_parameters()}
    found["trained"] = seen(trained)

    # With numbers that a file in half precision holds.
    network.load_state_dict({name: value.half().float() for name, value in state.items()})
    sampler = __import__("generate_images").edm_sampler
    labels = torch.nn.functional.one_hot(torch.tensor(SAMPLED_LABELS).long(), NUM_CLASSES)
    with torch.no_grad():
        noise = torch.tensor(NOISE.transpose(0, 3, 1, 2))
        samples = sampler(network.eval(), noise, labels, num_steps=NUM_STEPS)
    found["samples"] = samples.numpy().transpose(0, 2, 3, 1)
    np.savez_compressed(FOLDER / "EDM2.npz", **found)


if __name__ == "__main__":
    main(*sys.argv[1:])
