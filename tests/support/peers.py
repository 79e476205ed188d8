"""What tests against other libraries need to import them."""

import functools
import sys
import types
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from unittest.mock import MagicMock

import pytest


@functools.cache
def name_operators():
    """Lets torchvision be imported, which transformers, torchmetrics and others do if they find it.

    PyPI's is built for CUDA. Beside a torch for CPUs its operators do not load, and its import
    fails for want of their names, which are all that is used here.
    """
    import torch

    library = torch.library.Library("torchvision", "FRAGMENT")
    if torch.version.cuda is None:
        for name in ("nms", "qnms"):
            if not hasattr(torch.ops.torchvision, name):
                library.define(f"{name}(Tensor a, Tensor b, float c) -> Tensor")
    return library  # the names last as long as it does


@contextmanager
def k_diffusion() -> Iterator[None]:
    """Lets `k_diffusion.sampling` be imported alone: its other modules need more libraries.

    Those that its samplers never call are stand-ins meanwhile. It skips where there is none.
    """
    found = find_spec("k_diffusion")
    if found is None:
        pytest.skip("k-diffusion is not installed (pip install --no-deps k-diffusion)")
    package = types.ModuleType("k_diffusion")
    package.__path__ = list(found.submodule_search_locations or ())
    unused = ("torchdiffeq", "torchsde", "torchvision", "torchvision.transforms")
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, "k_diffusion", package)
        for name in unused:
            patch.setitem(sys.modules, name, MagicMock())
        yield
