"""Outputs and gradients of the authors' diffusion transformers for drawn parameters, as arrays.

    git clone https://github.com/hustvl/LightningDiT /tmp/LightningDiT
    git clone https://github.com/LTH14/JiT /tmp/JiT
    git clone https://github.com/MCG-NJU/DDT /tmp/DDT
    git clone https://github.com/baofff/U-ViT /tmp/U-ViT
    python -m tests.references.transformers LightningDiT /tmp/LightningDiT
    python -m tests.references.transformers JiT /tmp/JiT
    python -m tests.references.transformers DDT /tmp/DDT
    python -m tests.references.transformers UViT /tmp/U-ViT
    python -m tests.references.transformers counts LightningDiT /tmp/LightningDiT

Each writes an npz beside this file; the last one prints the number of parameters of each size. It
needs torch, einops, and for LightningDiT timm.
"""

import sys
import zlib
from collections.abc import Callable, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np

from tests.references.dit import LABELS, NUM_CLASSES, drawn

FOLDER = Path(__file__).parent
NOISE_LABELS = np.array([0.0, 0.37, 1.0], np.float32)
CHANNELS = 3
SHAPES = {"LightningDiT": (8, 8), "JiT": (16, 16), "DDT": (8, 12), "UViT": (8, 8)}
"""Height and width; the code of the others takes squares alone."""
SETTINGS: Mapping[str, Mapping[str, Any]] = {
    "LightningDiT": {"hidden_size": 16, "depth": 3, "num_heads": 2, "patch_size": 2},
    "JiT": {"hidden_size": 16, "depth": 4, "num_heads": 2, "patch_size": 4},
    "DDT": {"hidden_size": 16, "depth": 5, "num_heads": 2, "patch_size": 2},
    "UViT": {"hidden_size": 16, "depth": 5, "num_heads": 2, "patch_size": 2},
}
"""Settings that ours has; the authors' names for them are below."""
IN_CONTEXT = {"bottleneck": 5, "num_class_tokens": 3, "class_tokens_from": 2}
ENCODER_DEPTH = 3


def images(name: str) -> np.ndarray:
    """The input, `[B, H, W, C]`."""
    shape = (len(LABELS), *SHAPES[name], CHANNELS)
    return np.random.default_rng(0).normal(size=shape).astype(np.float32)


def directions(name: str, shape: tuple[int, ...]) -> np.ndarray:
    """Two arrays `[2, …]`, drawn by name, along which gradients are projected."""
    random = np.random.default_rng(zlib.crc32(f"direction of {name}".encode()))
    return random.normal(size=(2, *shape)).astype(np.float32)


def projections(gradients: Mapping[str, np.ndarray]) -> np.ndarray:
    """Each gradient as two numbers, its products with `directions`, in the order of the names."""
    found = []
    for name in sorted(gradients):
        gradient = np.asarray(gradients[name])
        found.append([np.vdot(x, gradient) for x in directions(name, gradient.shape)])
    return np.array(found, np.float32)


def _without_compiler() -> None:
    import torch

    # Their decorators would compile each function, and their buffers go to a GPU.
    torch.compile = lambda function, **how: function
    torch.Tensor.cuda = lambda tensor, *args, **how: tensor
    torch.cuda.amp.autocast = lambda **how: torch.autocast("cpu", **how)


def _lightningdit(clone: str) -> Any:
    sys.path.insert(0, clone)
    # Beside its RMS norm, `rmsnorm.py` has a language model, whose imports are not needed here.
    for name in ("", ".nn", ".nn.model_parallel", ".nn.model_parallel.initialize"):
        sys.modules[f"fairscale{name}"] = ModuleType(f"fairscale{name}")
    layers: Any = ModuleType("fairscale.nn.model_parallel.layers")
    layers.ColumnParallelLinear = layers.ParallelEmbedding = layers.RowParallelLinear = None
    sys.modules["fairscale.nn.model_parallel.layers"] = layers
    # The package of the folder imports data sets too.
    package = ModuleType("models")
    package.__path__ = [f"{clone}/models"]
    sys.modules["models"] = package
    return __import__("models.lightningdit", fromlist=["LightningDiT"])


def _of_file(path: str, package: str = "") -> Any:
    import importlib.util

    name = f"{package}.network" if package else "network"
    if package:
        parent = ModuleType(package)
        parent.__path__ = [str(Path(path).parent)]
        sys.modules[package] = parent
    spec: Any = importlib.util.spec_from_file_location(name, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _jit(clone: str) -> Any:
    sys.path.insert(0, clone)
    return _of_file(f"{clone}/model_jit.py")


def _ddt(clone: str) -> Any:
    return _of_file(f"{clone}/src/models/denoiser/decoupled_improved_dit.py")


def _uvit(clone: str) -> Any:
    return _of_file(f"{clone}/libs/uvit.py", "libs")


MODULES: Mapping[str, Callable[[str], Any]] = {
    "LightningDiT": _lightningdit,
    "JiT": _jit,
    "DDT": _ddt,
    "UViT": _uvit,
}


def network_of(name: str, module: Any) -> Any:
    """The authors' network with our settings."""
    sizes = dict(SETTINGS[name])
    side = SHAPES[name][0]
    if name == "LightningDiT":
        advanced = ("use_qknorm", "use_swiglu", "use_rope", "use_rmsnorm")
        return module.LightningDiT(
            input_size=side,
            in_channels=CHANNELS,
            num_classes=NUM_CLASSES,
            **dict.fromkeys(advanced, True),
            **sizes,
        )
    if name == "JiT":
        return module.JiT(
            input_size=side,
            in_channels=CHANNELS,
            num_classes=NUM_CLASSES,
            bottleneck_dim=IN_CONTEXT["bottleneck"],
            in_context_len=IN_CONTEXT["num_class_tokens"],
            in_context_start=IN_CONTEXT["class_tokens_from"],
            **sizes,
        )
    if name == "DDT":
        return module.DDT(
            in_channels=CHANNELS,
            num_groups=sizes["num_heads"],
            hidden_size=sizes["hidden_size"],
            num_blocks=sizes["depth"],
            num_encoder_blocks=ENCODER_DEPTH,
            patch_size=sizes["patch_size"],
            num_classes=NUM_CLASSES,
        )
    return module.UViT(
        img_size=side,
        patch_size=sizes["patch_size"],
        in_chans=CHANNELS,
        embed_dim=sizes["hidden_size"],
        depth=sizes["depth"],
        num_heads=sizes["num_heads"],
        num_classes=NUM_CLASSES + 1,
    )


def main(name: str, clone: str) -> None:
    """Evaluates and differentiates the authors' network of this name, in both modes."""
    import torch

    _without_compiler()
    network = network_of(name, MODULES[name](clone))
    trained = {key: x for key, x in network.named_parameters() if x.requires_grad}
    state = drawn({key: tuple(x.shape) for key, x in trained.items()})
    fixed = {key: x for key, x in network.state_dict().items() if key not in state}
    network.load_state_dict({key: torch.tensor(x) for key, x in state.items()} | fixed)
    x = torch.tensor(images(name).transpose(0, 3, 1, 2), requires_grad=True)
    times, labels = torch.tensor(NOISE_LABELS), torch.tensor(LABELS)

    def evaluated() -> Any:
        out = network(x, times, labels)
        return out[0] if name == "DDT" else out

    network.eval()
    with torch.no_grad():
        still = evaluated()
    network.train()
    if name == "LightningDiT":
        network.y_embedder.eval()  # It would drop labels by its own draw.
    out = evaluated()
    (out * torch.tensor(directions("out", tuple(out.shape))[0])).sum().backward()
    gradients = {key: value.grad.numpy() for key, value in trained.items()}
    np.savez_compressed(
        FOLDER / f"{name}.npz",
        out=still.numpy().transpose(0, 2, 3, 1),
        out_in_training=out.detach().numpy().transpose(0, 2, 3, 1),
        gradient=x.grad.numpy().transpose(0, 2, 3, 1),
        projections=projections(gradients),
        **{f"fixed/{key}": value.numpy() for key, value in fixed.items()},
    )


def counts(name: str, clone: str) -> None:
    """Prints the number of trained parameters of each size in the authors' code."""
    import torch

    _without_compiler()
    module = MODULES[name](clone)
    sizes: dict[str, Callable[[], Any]] = {}
    if name == "LightningDiT":
        how = dict.fromkeys(("use_swiglu", "use_rope", "use_rmsnorm"), True)
        for key, make in module.LightningDiT_models.items():
            sizes[key] = lambda make=make: make(input_size=16, in_channels=32, **how)
    if name == "JiT":
        for key, make in module.JiT_models.items():
            sizes[key] = lambda make=make, key=key: make(input_size=16 * int(key[-2:]))
    for key, make in sizes.items():
        with torch.device("meta"):
            network = make()
        number = sum(x.numel() for x in network.parameters() if x.requires_grad)
        sys.stdout.write(f"{key} {number}\n")


if __name__ == "__main__":
    if sys.argv[1] == "counts":
        counts(*sys.argv[2:])
    else:
        main(*sys.argv[1:])
