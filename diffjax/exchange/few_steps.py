"""Files of few steps: what their names say of how they are sampled, which nothing in them does.

| name | steps | scheduler |
|---|---|---|
| `sdxl_lightning_4step_unet`, `sdxl_lightning_4step_lora` | 2, 4, 8 | Euler, `trailing` |
| `sdxl_lightning_1step_unet_x0` | 1 | the same, and the network predicts x0 |
| `lcm-lora-sdxl` | 4 | LCM |
| `Hyper-SDXL-4steps-lora` | 2, 4, 8 | DDIM, `trailing` |
| `sdxl-turbo`, `stable-diffusion-3.5-large-turbo` | 4 | that of the folder, `trailing` |

None is guided.
"""

import re
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple


class FewSteps(NamedTuple):
    """How a network of few steps is sampled.

    Attributes:
        num_steps: the number of steps.
        scheduler: the entries of `scheduler_config.json` that it needs, in the place of others.
    """

    num_steps: int
    scheduler: Mapping[str, Any]


_TRAILING = {"timestep_spacing": "trailing"}
_EULER = {"_class_name": "EulerDiscreteScheduler", **_TRAILING}
_DDIM = {"_class_name": "DDIMScheduler", **_TRAILING, "clip_sample": False}
_NAMES: Mapping[str, Mapping[str, Any]] = {
    r"sdxl_lightning_1step_unet_x0": {**_EULER, "prediction_type": "sample"},
    r"sdxl_lightning_\d+step_(unet|lora)": _EULER,
    r"lcm[-_]lora": {"_class_name": "LCMScheduler"},
    r"hyper-sd(15|xl)-[248]steps?-lora": _DDIM,
    r"(^|[-_])turbo($|[-_.])": _TRAILING,
}
_STEPS = re.compile(r"(\d+)[-_]?step")


def few_steps(names: Iterable[str]) -> FewSteps | None:
    """How a network of few steps is sampled, by the last name that says so; None if none does.

    Args:
        names: the names of a folder or file and of what is added to it: a network's file, files of
            LoRA.

    Example:
        >>> few_steps(["sdxl-base", "sdxl_lightning_8step_lora.safetensors"]).num_steps
        8
        >>> few_steps(["stable-diffusion-3.5-large-turbo"])
        FewSteps(num_steps=4, scheduler={'timestep_spacing': 'trailing'})
    """
    found = None
    for name in map(str.lower, names):
        for pattern, scheduler in _NAMES.items():
            if re.search(pattern, name):
                steps = _STEPS.search(name)
                found = FewSteps(int(steps[1]) if steps else 4, scheduler)
                break
    return found
