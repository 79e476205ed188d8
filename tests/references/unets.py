"""Outputs and gradients of published U-Nets for drawn parameters, stored as arrays.

    git clone https://github.com/openai/guided-diffusion /tmp/guided-diffusion
    git clone https://github.com/NVlabs/edm /tmp/edm
    python -m tests.references.unets adm /tmp/guided-diffusion   # writes adm.npz beside this file
    python -m tests.references.unets edm /tmp/edm                # writes edm.npz

It needs torch. Gradients are those of `sum(out·weights)`; of each parameter's gradient a few drawn
entries are stored.
"""

import sys
import zlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

FOLDER = Path(__file__).parent
NUM_CLASSES = 5
ENTRIES = 12
"""Of each gradient."""
IMAGES = np.random.default_rng(0).normal(size=(3, 8, 12, 3)).astype(np.float32)
SMALL = np.random.default_rng(1).normal(size=(3, 2, 3, 3)).astype(np.float32)
TIMESTEPS = np.array([0.0, 17.0, 999.0], np.float32)
LABELS = np.array([0, 3, NUM_CLASSES - 1], np.int32)
NULL_LABELS = np.array([0, 3, NUM_CLASSES], np.int32)
"""The last one is the null label, which ADM has not."""

ADM = {
    "image_size": 8,
    "model_channels": 128,
    "num_res_blocks": 1,
    "attention_resolutions": (2,),
    "channel_mult": (1, 1.5),
    "use_scale_shift_norm": True,
    "resblock_updown": True,
}
"""Settings of the authors that all ADM networks here share."""


def parameters(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, np.ndarray]:
    """Parameters by name: none is as initialised, and layers keep the size of their input."""
    state = {}
    for name, shape in shapes.items():
        random = np.random.default_rng(zlib.crc32(name.encode()))
        scale = np.prod(shape[1:]) ** -0.5 if len(shape) > 1 else 0.3
        state[name] = (scale * random.normal(size=shape)).astype(np.float32)
    return state


EDM = {"img_resolution": 8, "in_channels": 3, "out_channels": 3, "num_blocks": 1, "dropout": 0}
"""Settings of the authors that all networks of EDM here share."""
SONG = {"model_channels": 16, "channel_mult": [1, 2], "attn_resolutions": [4]}
NCSNPP = {
    "embedding_type": "fourier",
    "channel_mult_noise": 2,
    "encoder_type": "residual",
    "resample_filter": [1, 3, 3, 1],
}
NOISE = np.array([-1.6, 0.3, 1.1], np.float32)
"""Of EDM: log(σ)/4."""
AUGMENT = np.random.default_rng(3).normal(size=(3, 9)).astype(np.float32)


def entries(gradients: Mapping[str, np.ndarray]) -> np.ndarray:
    """The stored entries `[parameters, ENTRIES]` of gradients by their published names, sorted."""
    rows = []
    for name, gradient in sorted(gradients.items()):
        random = np.random.default_rng(zlib.crc32(name.encode()))
        rows.append(gradient.ravel()[random.integers(gradient.size, size=ENTRIES)])
    return np.stack(rows)


def weights(shape: tuple[int, ...]) -> np.ndarray:
    """Those of the sum that is differentiated; channels last."""
    return np.random.default_rng(2).normal(size=shape).astype(np.float32)


def _first(array: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(array.transpose(0, 3, 1, 2))


def _last(array: np.ndarray) -> np.ndarray:
    return array.transpose(0, 2, 3, 1) if array.ndim == 4 else array


def _evaluated(network: Any, call: Callable[[Any], Any]) -> dict[str, np.ndarray]:
    """Output, gradient with respect to the images, and entries of those of the parameters."""
    import torch

    state = network.state_dict()
    # Random frequencies are no parameters there; the filters and positions are not drawn.
    names = [name for name, _ in network.named_parameters()]
    names += [name for name in state if name.endswith("freqs")]
    shapes = {name: tuple(state[name].shape) for name in names}
    drawn_state = {name: torch.tensor(value) for name, value in parameters(shapes).items()}
    network.load_state_dict({**state, **drawn_state})
    x: Any = torch.tensor(_first(IMAGES), requires_grad=True)
    out = call(x)
    factors = torch.tensor(weights(_last(out.detach().numpy()).shape))
    (out * (factors.permute(0, 3, 1, 2) if out.ndim == 4 else factors)).sum().backward()
    found = {"out": _last(out.detach().numpy()), "of_images": _last(x.grad.numpy())}
    gradients = {name: value.grad.numpy() for name, value in network.named_parameters()}
    return {**found, "of_parameters": entries(gradients)}


def _adm(clone: str) -> dict[str, dict[str, np.ndarray]]:
    import torch

    sys.path.insert(0, clone)
    unet = __import__("guided_diffusion.unet").unet
    t, labels = torch.tensor(TIMESTEPS), torch.tensor(LABELS).long()
    common = {"in_channels": 3, **ADM}
    cases = {
        "heads": unet.UNetModel(
            **common, out_channels=6, num_classes=NUM_CLASSES, num_head_channels=64
        ),
        "parts": unet.UNetModel(
            **common, out_channels=3, num_heads=2, use_new_attention_order=True
        ),
        "upsampler": unet.SuperResModel(
            **common, out_channels=6, num_classes=NUM_CLASSES, num_heads=2
        ),
        "classifier": unet.EncoderUNetModel(
            **common, out_channels=NUM_CLASSES, num_head_channels=64, pool="attention"
        ),
    }
    # The pooling has positions for a square image.
    pool = cases["classifier"].out[2]
    pool.positional_embedding = torch.nn.Parameter(torch.zeros(192, 4 * 6 + 1))
    calls: Mapping[str, Callable[[Any], Any]] = {
        "heads": lambda x: cases["heads"](x, t, labels),
        "parts": lambda x: cases["parts"](x, t),
        "upsampler": lambda x: cases["upsampler"](
            x, t, low_res=torch.tensor(_first(SMALL)), y=labels
        ),
        "classifier": lambda x: cases["classifier"](x, t),
    }
    return {name: _evaluated(cases[name], calls[name]) for name in cases}


def _edm(clone: str) -> dict[str, dict[str, np.ndarray]]:
    import torch

    sys.path.insert(0, clone)
    networks = __import__("training.networks").networks
    labels = torch.tensor(np.eye(NUM_CLASSES + 1, NUM_CLASSES, dtype=np.float32)[NULL_LABELS])
    augment = torch.tensor(AUGMENT)
    classes, augmented = {"label_dim": NUM_CLASSES}, {"augment_dim": 9}
    song = {**EDM, **SONG}
    cases = {
        "ddpmpp": networks.SongUNet(**song, **classes, **augmented),
        "ncsnpp": networks.SongUNet(**song, **NCSNPP, **augmented),
        "skips": networks.SongUNet(
            **song, **{**NCSNPP, "encoder_type": "skip", "decoder_type": "skip"}
        ),
        "dhariwal": networks.DhariwalUNet(
            **EDM, model_channels=64, channel_mult=[1, 2], attn_resolutions=[4], **classes
        ),
    }
    return {
        name: _evaluated(
            torch.nn.ModuleDict({"model": network}),
            lambda x, network=network: network(
                x, torch.tensor(NOISE), labels, augment if network.map_augment else None
            ),
        )
        for name, network in cases.items()
    }


def main(name: str, clone: str) -> None:
    """Evaluates the networks of a repository."""
    found = {"adm": _adm, "edm": _edm}[name](clone)
    arrays = {f"{case}/{key}": x for case, parts in found.items() for key, x in parts.items()}
    np.savez_compressed(FOLDER / f"{name}.npz", **arrays)


if __name__ == "__main__":
    main(*sys.argv[1:])
