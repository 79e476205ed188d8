"""Networks: Flax linen modules that do not depend on paths, objectives or samplers.

Each is evaluated as `module.apply({"params": params}, x, noise_label, cond, train=..., rngs=...)`
with `x [B,H,W,C]`, `noise_label [B]` (floats, of the order 0 … 1000) and a condition (labels `[B]`
with `num_classes` as the null label, token states, images, or a dict of these; None is the null
label), and returns float32 of the shape of `x`.
"""

from diffjax.models.adm import ADM as ADM
from diffjax.models.dit import DiT as DiT
from diffjax.models.edm2 import EDM2 as EDM2
from diffjax.models.unet import UNet as UNet
