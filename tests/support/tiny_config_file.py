"""A config file for commands that train in processes of their own: the digits, a tiny network.

Most of a run's time is tracing and compiling, and the network needs little of either.
"""

from pathlib import Path

TEXT = """
from flax import linen as nn
from configs import digits
from diffjax.spec import spec

class Tiny(nn.Module):
    num_classes: int

    @nn.compact
    def __call__(self, x, noise_label, cond=None, train=False):
        h = nn.Dense(16, name="conv_in")(x) + noise_label[:, None, None, None]
        h = h + nn.Embed(self.num_classes + 1, 16, name="embed")(cond)[:, None, None]
        return nn.Dense(x.shape[-1], name="final_conv")(nn.silu(h))

def get_config(arguments=""):
    config = digits.get_config(arguments)
    config.model = spec(Tiny)
    return config
"""


def write(folder: Path) -> Path:
    """The file, in a folder."""
    path = folder / "tiny.py"
    path.write_text(TEXT)
    return path
