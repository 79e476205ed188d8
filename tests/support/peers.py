"""What tests against other libraries need to import them."""

import functools


@functools.cache
def name_operators():
    """Lets torchvision be imported, which torchmetrics and pytorch-fid do where they find it.

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
