"""The smallest network that takes labels and dropout, under a name that a saved config can have."""

from flax import linen as nn


class Tiny(nn.Module):
    """Two dense layers over the channels of each pixel."""

    num_classes: int

    @nn.compact
    def __call__(self, x, noise_label, cond=None, train=False):
        h = nn.Dense(16, name="conv_in")(x) + noise_label[:, None, None, None]
        h = h + nn.Embed(self.num_classes + 1, 16, name="embed")(cond)[:, None, None]
        h = nn.Dropout(0.1, deterministic=not train)(nn.silu(h))
        return nn.Dense(x.shape[-1], name="final_conv")(h)


class Plain(nn.Module):
    """The same without dropout, and with as many outputs as an objective asks for."""

    num_classes: int
    out_channels: int | None = None

    @nn.compact
    def __call__(self, x, noise_label, cond=None, train=False):
        h = nn.Dense(16)(x) + 1e-3 * noise_label[:, None, None, None]
        h = nn.silu(h + nn.Embed(self.num_classes + 1, 16)(cond)[:, None, None])
        return nn.Dense(self.out_channels or x.shape[-1])(h)
