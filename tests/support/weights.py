"""Reads files of weights from bytes."""

import tempfile
from pathlib import Path

import numpy as np

from diffjax.pretrained.files import read_state_dict


def read_bytes(data: bytes, part: str = "") -> dict[str, np.ndarray]:
    """All tensors of a file with this content."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "x.pth"
        path.write_bytes(data)
        return {key: np.asarray(tensor) for key, tensor in read_state_dict(path, part).items()}
