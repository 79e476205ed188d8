"""The first 200 steps of training by EDM's code: losses and averaged weights, stored as arrays.

    git clone https://github.com/NVlabs/edm /tmp/edm
    python -m tests.references.edm_training /tmp/edm   # writes edm_training.npz beside this file

It needs torch. Loss, augmentation and network are EDM's; the lines of the loop that make an update
are repeated here, since the loop itself needs GPUs. All that is random is drawn by NumPy, in the
order in which EDM's code draws it, so that another program can take the same numbers.
"""

import sys
import zlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

FILE = Path(__file__).with_suffix(".npz")
NUM_STEPS, BATCH, SIDE, NUM_CLASSES = 200, 8, 8, 10
RATE, RAMP_STEPS, HALF_LIFE_STEPS, RAMPUP_RATIO, DROPOUT, CHANGED = 1e-3, 100, 5, 0.05, 0.13, 0.12
"""As published, but for the lengths of the ramp and of the average, of which both ends are seen."""
NETWORK = {
    "model_type": "SongUNet",
    "model_channels": 16,
    "channel_mult": [1, 2],
    "attn_resolutions": [4],
    "num_blocks": 1,
    "dropout": DROPOUT,
    "augment_dim": 9,
}
ENTRIES = 12
"""Stored of each averaged parameter."""


def drawn(name: str, shape: tuple[int, ...]) -> np.ndarray:
    """The initial parameter of a name: layers keep the size of their input."""
    random = np.random.default_rng(zlib.crc32(name.encode()))
    scale = np.prod(shape[1:]) ** -0.5 if len(shape) > 1 else 0.3
    return (scale * random.normal(size=shape)).astype(np.float32)


def images_and_labels() -> tuple[np.ndarray, np.ndarray]:
    """Smooth images uint8 `[NUM_STEPS, BATCH, SIDE, SIDE, 3]`, and their classes."""
    random = np.random.default_rng(1)
    wave = np.sin(
        np.linspace(0, 3, SIDE) + random.uniform(0, 6, size=(NUM_STEPS, BATCH, 3, SIDE, 1))
    )
    images = 127.5 + 60 * (wave + wave.swapaxes(-1, -2))
    labels = random.integers(NUM_CLASSES, size=(NUM_STEPS, BATCH))
    return images.clip(0, 255).astype(np.uint8).transpose(0, 1, 3, 4, 2), labels


def numbers(step: int) -> np.random.Generator:
    """The source of all random numbers of a step but those of dropout."""
    return np.random.default_rng((2, step))


def kept(step: int, layer: int, shape: tuple[int, ...]) -> np.ndarray:
    """Which entries `[B, H, W, C]` a layer of dropout keeps."""
    return np.random.default_rng((3, step, layer)).uniform(size=shape) >= DROPOUT


def rate(step: int) -> float:
    """EDM's learning rate in a step, from 0."""
    return RATE * min(step / RAMP_STEPS, 1.0)


class _Draws:
    """What `torch.rand` and its like are replaced by, and which images are dropped where."""

    def __init__(self) -> None:
        self.step, self.layer, self.random = 0, 0, numbers(0)

    def begin(self, step: int) -> None:
        self.step, self.layer, self.random = step, 0, numbers(step)

    def replaced(self, torch: Any) -> Iterator[tuple[Any, str, Any]]:
        def of(array: Any) -> Any:
            return torch.tensor(np.asarray(array, np.float32))

        def dropout(x: Any, p: float, training: bool) -> Any:
            assert training
            assert p == DROPOUT
            batch, channels, height, width = x.shape
            mask = kept(self.step, self.layer, (batch, height, width, channels))
            self.layer += 1
            return x * of(mask.transpose(0, 3, 1, 2)) / (1 - p)

        yield torch, "randn", lambda shape, device=None: of(self.random.normal(size=shape))
        yield torch, "randn_like", lambda x: of(self.random.normal(size=x.shape))
        yield torch, "rand", lambda shape, device=None: of(self.random.uniform(size=shape))
        integers = lambda high, shape, device=None: torch.tensor(  # noqa: E731
            self.random.integers(high, size=shape)
        )
        yield torch, "randint", integers
        yield torch.nn.functional, "dropout", dropout


def trained(clone: str) -> Mapping[str, np.ndarray]:
    """Losses `[NUM_STEPS]` (means over the images' pixels), entries of averaged parameters."""
    import torch

    sys.path.insert(0, clone)
    networks = __import__("training.networks").networks
    loss_of = __import__("training.loss").loss.EDMLoss()
    pipe = __import__("training.augment").augment.AugmentPipe(
        p=CHANGED, xflip=1e8, yflip=1, scale=1, rotate_frac=1, aniso=1, translate_frac=1
    )
    net = networks.EDMPrecond(SIDE, 3, NUM_CLASSES, **NETWORK).train()
    state = {name: torch.tensor(drawn(name, x.shape)) for name, x in net.named_parameters()}
    net.load_state_dict({**net.state_dict(), **state})
    averaged = {name: x.detach().clone() for name, x in net.named_parameters()}
    optimizer = torch.optim.Adam(net.parameters(), lr=RATE, betas=(0.9, 0.999), eps=1e-8)
    draws = _Draws()
    for where, name, function in draws.replaced(torch):
        setattr(where, name, function)
    losses = []
    for step, (images, labels) in enumerate(zip(*images_and_labels(), strict=True)):
        draws.begin(step)
        x = torch.tensor(images.transpose(0, 3, 1, 2)).to(torch.float32) / 127.5 - 1
        one_hot = torch.tensor(np.eye(NUM_CLASSES, dtype=np.float32)[labels])
        optimizer.zero_grad(set_to_none=True)
        loss = loss_of(net=net, images=x, labels=one_hot, augment_pipe=pipe)
        loss.sum().mul(1 / BATCH).backward()
        losses.append(loss.mean().item())
        for group in optimizer.param_groups:
            group["lr"] = rate(step)
        optimizer.step()
        half_life = min(HALF_LIFE_STEPS, step * RAMPUP_RATIO)
        beta = 0.5 ** (1 / max(half_life, 1e-8))
        for name, parameter in net.named_parameters():
            averaged[name] = parameter.detach().lerp(averaged[name], beta)
    return {
        "losses": np.array(losses, np.float32),
        "averaged": entries({name: x.numpy() for name, x in averaged.items()}),
        "trained": entries({name: x.detach().numpy() for name, x in net.named_parameters()}),
    }


def entries(parameters: Mapping[str, np.ndarray]) -> np.ndarray:
    """A few drawn entries `[parameters, ENTRIES]` of parameters by published names, sorted."""
    rows = []
    for name, array in sorted(parameters.items()):
        random = np.random.default_rng(zlib.crc32(name.encode()))
        rows.append(array.ravel()[random.integers(array.size, size=ENTRIES)])
    return np.stack(rows)


if __name__ == "__main__":
    np.savez_compressed(FILE, **trained(sys.argv[1]))
