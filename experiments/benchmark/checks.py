"""What a later part of the benchmark would refuse, looked for before anything is measured.

Both run in a process of their own: the one that prints must not touch the devices.
"""

from collections.abc import Sequence

import jax

from diffjax.errors import UserError
from diffjax.performance.throughput import set_up_on
from diffjax.runs.setup import set_up
from diffjax.spec import build
from experiments.benchmark.against_torch import torch_device, twin
from experiments.benchmark.cases import Case


def check_cases(cases: Sequence[Case], split: bool, against: str | None) -> None:
    """Sets up what is to be measured on the devices that there are, and compiles nothing.

    Args:
        cases: the configs.
        split: whether each trains on its own data too, which then has to be there.
        against: `torch` or `torch.compile`, where each is compared with it.

    Raises:
        UserError: a config or its data does not do, PyTorch is missing, or a network's twin.
    """
    for case in cases:
        config = case.config()
        set_up(config, *case.data(config))
        if split:
            dataset = build(config.data)
            set_up(config, dataset.image_shape, dataset.num_classes)
    if against:
        torch_device()
        for case in cases:
            twin(case)


def check_devices(cases: Sequence[Case], counts: Sequence[int]) -> None:
    """Refuses numbers of devices that there are not, or that a mesh or a batch does not fit.

    Raises:
        UserError: what `set_up_on` would refuse.
    """
    # CPUs have as many as the measurement that takes most will ask for.
    jax.config.update("jax_num_cpu_devices", max(counts))
    devices = jax.devices()
    for number in counts:
        if number > len(devices):
            raise UserError(f"--devices={number}: there are {len(devices)} devices")
        for case in cases:
            config = case.config()
            try:
                set_up_on(config, *case.data(config), number)
            except UserError as error:
                raise UserError(f"--devices={number}, {case.name}: {error}") from None
