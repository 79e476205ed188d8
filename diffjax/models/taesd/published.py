"""The names of `NAME_encoder.pth` and `NAME_decoder.pth`: places in `torch.nn.Sequential`s."""

from collections.abc import Callable

import numpy as np

TAEF2_ENCODER = "10a4e1021e89d7551eaf161352da8dbd0b1aa83872ae28b150c1df1ce2f147b6"
TAEF2_DECODER = "0a44a31e1ae59eb9dbf9359d24942fd3ef5928162c1800d97a28c61d51be0ab5"
ADDRESS = "https://github.com/madebyollin/taesd/raw/main"


def conv(weights: np.ndarray) -> np.ndarray:
    """`[out, in, height, width]` there, `[height, width, in, out]` here."""
    return weights.transpose(2, 3, 1, 0)


def keep(array: np.ndarray) -> np.ndarray:
    """The same there and here."""
    return array


TABLE: tuple[tuple[str, str, Callable[[np.ndarray], np.ndarray]], ...] = (
    ("{i}.weight", "layer_{i}/kernel", conv),
    ("{i}.bias", "layer_{i}/bias", keep),
    ("{i}.conv.{j}.weight", "layer_{i}/conv_{j}/kernel", conv),
    ("{i}.conv.{j}.bias", "layer_{i}/conv_{j}/bias", keep),
    ("{i}.pool.0.weight", "layer_{i}/pool_in/kernel", conv),
    ("{i}.pool.1.weight", "layer_{i}/norm/scale", keep),
    ("{i}.pool.1.bias", "layer_{i}/norm/bias", keep),
    ("{i}.pool.3.weight", "layer_{i}/pool_out/kernel", conv),
)
"""Their names, ours, and what becomes of the array."""
