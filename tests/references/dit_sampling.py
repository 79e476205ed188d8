"""Samples of the authors' DiT and SiT by the authors' samplers, stored as arrays.

    git clone https://github.com/facebookresearch/DiT /tmp/DiT
    git clone https://github.com/willisma/SiT /tmp/SiT
    python -m tests.references.dit_sampling DiT /tmp/DiT    # writes DiT_sampling.npz here
    python -m tests.references.dit_sampling SiT /tmp/SiT

It needs torch, timm and, for SiT, torchdiffeq. Parameters are drawn as in `dit.py`, for latents of
four channels, of which the samplers guide three.
"""

import sys
from importlib import import_module
from typing import Any

import numpy as np

from tests.references.dit import FOLDER, NUM_CLASSES, SETTINGS, SIDE, drawn

CHANNELS = 4
SCALE = 4.0
NUM_STEPS = 10
LABELS = np.array([0, 3], np.int32)
NOISE = np.random.default_rng(0).normal(size=(2, SIDE, SIDE, CHANNELS)).astype(np.float32)
FRESH = np.random.default_rng(1).normal(size=(NUM_STEPS, *NOISE.shape)).astype(np.float32)
"""The noise that DDPM's steps add."""


def main(name: str, clone: str) -> None:
    """Evaluates and samples the authors' network of this name."""
    import torch

    sys.path.insert(0, clone)
    network = getattr(__import__("models"), name)(
        input_size=SIDE, in_channels=CHANNELS, num_classes=NUM_CLASSES, learn_sigma=True, **SETTINGS
    ).eval()
    shapes = {name: tuple(value.shape) for name, value in network.named_parameters()}
    shapes.pop("pos_embed")
    state = {name: torch.tensor(value) for name, value in drawn(shapes).items()}
    network.load_state_dict(state | {"pos_embed": network.pos_embed.data})
    with torch.inference_mode():
        found = {"DiT": _dit, "SiT": _sit}[name](network)
    arrays = {key: _images(value) for key, value in found.items()}
    positions = network.pos_embed.data.numpy()
    np.savez_compressed(FOLDER / f"{name}_sampling.npz", pos_embed=positions, **arrays)


def _inputs() -> tuple[Any, dict[str, Any]]:
    """The noise and the arguments of guidance, each twice: with the labels and without."""
    import torch

    noise = torch.tensor(np.concatenate([NOISE, NOISE]).transpose(0, 3, 1, 2))
    labels = torch.tensor(np.concatenate([LABELS, np.full_like(LABELS, NUM_CLASSES)]))
    return noise, {"y": labels, "cfg_scale": SCALE}


def _images(tensor: Any) -> np.ndarray:
    """The rows with labels, as images `[B,H,W,C]`."""
    return tensor[: len(LABELS)].numpy().transpose(0, 2, 3, 1)


def _dit(network: Any) -> dict[str, Any]:
    import torch

    diffusion_package: Any = import_module("diffusion")
    gaussian_diffusion: Any = import_module("diffusion.gaussian_diffusion")
    noise, arguments = _inputs()
    fresh = iter(torch.tensor(np.concatenate([FRESH, FRESH], axis=1).transpose(0, 1, 4, 2, 3)))
    gaussian_diffusion.th.randn_like = lambda x: next(fresh)
    diffusion = diffusion_package.create_diffusion(str(NUM_STEPS))
    how = {"clip_denoised": False, "model_kwargs": arguments}
    model = network.forward_with_cfg
    sampled = diffusion.p_sample_loop(model, noise.shape, noise, device="cpu", **how)
    gaussian_diffusion.th.randn_like = torch.zeros_like  # of DDIM without noise
    return {
        "guided": model(noise, torch.full((len(noise),), 321.0), **arguments),
        "ddpm": sampled,
        "ddim": diffusion.ddim_sample_loop(model, noise.shape, noise, device="cpu", **how),
    }


def _sit(network: Any) -> dict[str, Any]:
    import torch

    transport: Any = import_module("transport")
    noise, arguments = _inputs()
    model = network.forward_with_cfg
    # Times are the ends of its steps: one more than there are steps.
    sampler = transport.Sampler(transport.create_transport())
    euler = sampler.sample_ode(sampling_method="euler", num_steps=NUM_STEPS + 1)
    return {
        "guided": model(noise, torch.full((len(noise),), 0.321), **arguments),
        "euler": euler(noise, model, **arguments)[-1],
    }


if __name__ == "__main__":
    main(*sys.argv[1:])
