"""Checks of the benchmark that run before anything is measured.

They run in their own process, because the main process must not use the devices.
"""

from collections.abc import Sequence

import jax

from diffjax.errors import UserError
from diffjax.performance.throughput import set_up_on_devices
from diffjax.runs.checks import check_config
from diffjax.runs.setup import set_up
from diffjax.spec import build
from experiments.benchmark.against_torch import torch_device, twin
from experiments.benchmark.cases import Case


def check_cases(cases: Sequence[Case], split: bool, against: str | None) -> None:
    """Sets up all configs on the available devices, without compiling.

    Args:
        cases: the configs.
        split: whether their real data are needed.
        against: `torch` or `torch.compile` for a comparison with PyTorch; else None.

    Raises:
        UserError: a config or its data are invalid, PyTorch is missing, or it has no such network.
    """
    for case in cases:
        config = case.config()
        check_config(config)
        set_up(config, *case.data(config))
        if split:
            dataset = build(config.data)
            set_up(config, dataset.image_shape, dataset.condition)
    if against:
        torch_device()
        for case in cases:
            twin(case)


def check_devices(cases: Sequence[Case], counts: Sequence[int]) -> None:
    """Checks that the numbers of devices are available and fit the meshes and batches.

    Raises:
        UserError: `measure_scaled` would refuse one of them.
    """
    # CPUs have as many fake devices as the largest measurement needs.
    jax.config.update("jax_num_cpu_devices", max(counts))
    devices = jax.devices()
    for number in counts:
        if number > len(devices):
            raise UserError(f"--devices={number}: there are {len(devices)} devices")
        for case in cases:
            config = case.config()
            try:
                set_up_on_devices(config, *case.data(config), number)
            except UserError as error:
                raise UserError(f"--devices={number}, {case.name}: {error}") from None
