"""DiT and U-Net in PyTorch, for `experiments.benchmark --against=torch`.

Parameters have the same names and, except for their layout, the same shapes as in Flax, so that
`load_flax` makes both networks compute the same function, and only the libraries differ.
"""

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from diffjax.models.dit.patches import positions_2d
from diffjax.models.unet import num_groups


def frequency_embedding(noise_label: Tensor, features: int) -> Tensor:
    """Embeds noise labels `[B]` as cosines and sines `[B, features]`."""
    half = features // 2
    frequencies = torch.exp(-math.log(10_000.0) / half * torch.arange(half))
    angles = noise_label[:, None] * frequencies
    return torch.cat([torch.cos(angles), torch.sin(angles)], dim=-1)


class Conditioning(nn.Module):
    """One vector per example from its noise label and its class."""

    def __init__(self, num_classes: int, features: int, num_frequencies: int):
        super().__init__()
        self.num_frequencies = num_frequencies
        self.hidden = nn.Linear(num_frequencies, features)
        self.out = nn.Linear(features, features)
        self.label = nn.Embedding(num_classes + 1, features) if num_classes else None

    def forward(self, noise_label: Tensor, cond: Tensor) -> Tensor:
        h = self.hidden(frequency_embedding(noise_label, self.num_frequencies))
        h = self.out(functional.silu(h))
        return h if self.label is None else h + self.label(cond)


class SelfAttention(nn.Module):
    """Multi-head self-attention over `[B, T, D]`."""

    def __init__(self, width: int, num_heads: int):
        super().__init__()
        self.num_heads = num_heads
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        batch, length, width = x.shape
        qkv = self.qkv(x).view(batch, length, 3, self.num_heads, width // self.num_heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)
        out = functional.scaled_dot_product_attention(q, k, v)
        return self.out(out.transpose(1, 2).reshape(batch, length, width))


class MLP(nn.Module):
    """MLP: `down(GELU(up(x)))`."""

    def __init__(self, width: int, hidden: int):
        super().__init__()
        self.up, self.down = nn.Linear(width, hidden), nn.Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(functional.gelu(self.up(x), approximate="tanh"))


class DiTBlock(nn.Module):
    """Attention and MLP between modulated norms and gates."""

    def __init__(self, width: int, num_heads: int, mlp_ratio: float):
        super().__init__()
        self.modulation = nn.Linear(width, 6 * width)
        self.attention = SelfAttention(width, num_heads)
        self.mlp = MLP(width, int(width * mlp_ratio))

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        shift_1, scale_1, gate_1, shift_2, scale_2, gate_2 = self.modulation(functional.silu(c))[
            :, None
        ].chunk(6, dim=-1)
        x = x + gate_1 * self.attention(_layer_norm(x) * (1 + scale_1) + shift_1)
        return x + gate_2 * self.mlp(_layer_norm(x) * (1 + scale_2) + shift_2)


class DiT(nn.Module):
    """PyTorch version of `diffjax.models.DiT`; images are `[B, H, W, C]`."""

    def __init__(self, image_shape: tuple[int, int, int], num_classes: int, **settings: Any):
        super().__init__()
        height, width, channels = image_shape
        self.p, size = settings["patch_size"], settings["hidden_size"]
        positions = positions_2d(height // self.p, width // self.p, size)
        self.register_buffer("positions", torch.from_numpy(positions))
        self.conditioning = Conditioning(num_classes, size, 256)
        self.patch_embedding = nn.Linear(self.p**2 * channels, size)
        self.blocks = [f"block_{i}" for i in range(settings["depth"])]
        for name in self.blocks:
            block = DiTBlock(size, settings["num_heads"], settings["mlp_ratio"])
            self.add_module(name, block)
        self.final_modulation = nn.Linear(size, 2 * size)
        self.final_out = nn.Linear(size, self.p**2 * channels)

    def forward(self, x: Tensor, noise_label: Tensor, cond: Tensor) -> Tensor:
        batch, height, width, channels = x.shape
        p, c = self.p, self.conditioning(noise_label, cond)
        x = x.view(batch, height // p, p, width // p, p, channels).transpose(2, 3)
        h = self.patch_embedding(x.reshape(batch, -1, p * p * channels)) + self.positions
        for name in self.blocks:
            h = self.get_submodule(name)(h, c)
        shift, scale = self.final_modulation(functional.silu(c))[:, None].chunk(2, dim=-1)
        h = self.final_out(_layer_norm(h) * (1 + scale) + shift)
        h = h.view(batch, height // p, width // p, p, p, channels).transpose(2, 3)
        return h.reshape(batch, height, width, channels)


def _layer_norm(x: Tensor) -> Tensor:
    return functional.layer_norm(x, x.shape[-1:], eps=1e-6)


class ResidualBlock(nn.Module):
    """Residual block with two convolutions, `[B, C, H, W]`."""

    def __init__(self, inputs: int, features: int, conditioning: int, scale_shift: bool):
        super().__init__()
        self.scale_shift = scale_shift
        self.norm_1 = nn.GroupNorm(num_groups(inputs), inputs)
        self.conv_1 = nn.Conv2d(inputs, features, 3, padding=1)
        self.modulation = nn.Linear(conditioning, (1 + scale_shift) * features)
        self.norm_2 = nn.GroupNorm(num_groups(features), features)
        self.conv_2 = nn.Conv2d(features, features, 3, padding=1)
        self.skip = None if inputs == features else nn.Linear(inputs, features)

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        h = self.conv_1(functional.silu(self.norm_1(x)))
        modulation = self.modulation(functional.silu(c))[:, :, None, None]
        if self.scale_shift:
            scale, shift = modulation.chunk(2, dim=1)
            h = self.norm_2(h) * (1 + scale) + shift
        else:
            h = self.norm_2(h + modulation)
        h = self.conv_2(functional.silu(h))
        if self.skip is not None:  # a matrix over the channels, which is a convolution of 1x1
            x = functional.conv2d(x, self.skip.weight[:, :, None, None], self.skip.bias)
        return x + h


class AttentionBlock(nn.Module):
    """Residual self-attention over the pixels."""

    def __init__(self, channels: int, head_channels: int):
        super().__init__()
        self.norm = nn.GroupNorm(num_groups(channels), channels)
        self.attention = SelfAttention(channels, channels // head_channels)

    def forward(self, x: Tensor) -> Tensor:
        h = self.attention(self.norm(x).flatten(2).transpose(1, 2))
        return x + h.transpose(1, 2).reshape(x.shape)


class UNet(nn.Module):
    """PyTorch version of `diffjax.models.UNet` with convolutional resampling; `[B, H, W, C]`."""

    def __init__(self, image_shape: tuple[int, int, int], num_classes: int, **settings: Any):
        super().__init__()
        size, _, image_channels = image_shape
        channels, self.num_res = settings["channels"], settings["num_res_blocks"]
        widths = [channels * factor for factor in settings["channel_multipliers"]]
        self.last, self.attends = len(widths) - 1, settings["attention_resolutions"]
        head, shifts = settings["head_channels"], settings["scale_shift"]

        def residual(name: str, inputs: int, level: int, at: int) -> int:
            self.add_module(name, ResidualBlock(inputs, widths[level], 4 * channels, shifts))
            if at in self.attends:
                self.add_module(f"{name}_attention", AttentionBlock(widths[level], head))
            return widths[level]

        self.conditioning = Conditioning(num_classes, 4 * channels, channels)
        self.conv_in = nn.Conv2d(image_channels, channels, 3, padding=1)
        now, skips = channels, [channels]
        for level in range(self.last + 1):
            for i in range(self.num_res):
                now = residual(f"down_{level}_{i}", now, level, size >> level)
                skips.append(now)
            if level < self.last:
                convolution = nn.Conv2d(now, now, 3, stride=2, padding=1)
                self.add_module(f"down_{level}_resample", convolution)
                skips.append(now)
        residual("middle_0", now, self.last, 0)
        self.middle_attention = AttentionBlock(now, head)
        residual("middle_1", now, self.last, 0)
        for level in reversed(range(self.last + 1)):
            for i in range(self.num_res + 1):
                now = residual(f"up_{level}_{i}", now + skips.pop(), level, size >> level)
            if level > 0:
                self.add_module(f"up_{level}_resample", nn.Conv2d(now, now, 3, padding=1))
        self.final_norm = nn.GroupNorm(num_groups(now), now)
        self.final_conv = nn.Conv2d(now, image_channels, 3, padding=1)

    def forward(self, x: Tensor, noise_label: Tensor, cond: Tensor) -> Tensor:
        c = self.conditioning(noise_label, cond)

        def block(h: Tensor, name: str) -> Tensor:
            h = self.get_submodule(name)(h, c)
            return self.get_submodule(f"{name}_attention")(h) if h.shape[2] in self.attends else h

        h = self.conv_in(x.permute(0, 3, 1, 2))
        skips = [h]
        for level in range(self.last + 1):
            for i in range(self.num_res):
                h = block(h, f"down_{level}_{i}")
                skips.append(h)
            if level < self.last:
                h = self.get_submodule(f"down_{level}_resample")(h)
                skips.append(h)
        h = self.middle_attention(self.get_submodule("middle_0")(h, c))
        h = self.get_submodule("middle_1")(h, c)
        for level in reversed(range(self.last + 1)):
            for i in range(self.num_res + 1):
                h = block(torch.cat([h, skips.pop()], dim=1), f"up_{level}_{i}")
            if level > 0:
                h = h.repeat_interleave(2, dim=2).repeat_interleave(2, dim=3)
                h = self.get_submodule(f"up_{level}_resample")(h)
        h = self.final_conv(functional.silu(self.final_norm(h)))
        return h.permute(0, 2, 3, 1)


def load_flax(network: nn.Module, params: Mapping[str, Any]) -> None:
    """Copies a Flax network's parameters to the PyTorch version; all names must agree."""
    state = {}
    for path, leaf in _flat(params):
        *names, kind = path
        array = np.asarray(leaf)
        if kind == "kernel":  # [in, out] to [out, in], [h, w, in, out] to [out, in, h, w]
            array = array.T if array.ndim == 2 else array.transpose(3, 2, 0, 1)
        kind = "bias" if kind == "bias" else "weight"
        state[".".join([*names, kind])] = torch.from_numpy(array.copy())
    missing = network.load_state_dict(state, strict=False)
    absent = [name for name in missing.missing_keys if name != "positions"]
    if absent or missing.unexpected_keys:
        raise ValueError(f"missing {absent}, unexpected {missing.unexpected_keys}")


def _flat(tree: Mapping[str, Any], path: tuple[str, ...] = ()) -> list[tuple[tuple[str, ...], Any]]:
    found = []
    for name, value in tree.items():
        at = (*path, name)
        found += _flat(value, at) if isinstance(value, Mapping) else [(at, value)]
    return found
