"""docs/devices.md: its table of common devices has a command for each, which a config takes."""

import shlex

import pytest

from diffjax import config_files
from tests.pages.devices import BEGIN, DEVICES, END, HEAD, PAGE, row


def lines():
    table = PAGE.read_text("utf-8").partition(BEGIN)[2].partition(END)[0]
    assert table.startswith(HEAD)
    return table.removeprefix(HEAD).splitlines()


def test_each_device_has_the_lines_of_its_configs():
    found = [tuple(line.split(" | "))[:2] for line in lines()]
    wanted = [(f"| {one.name}", f"`{config}`") for one in DEVICES for config in one.configs]
    assert found == wanted, "run python -m tests.pages.devices"


def test_each_command_is_one_that_trains():
    for line in lines():
        program, command, location, *flags = shlex.split(line.split(" | ")[-1].strip(" |`"))
        assert (program, command) == ("diffjax", "train")
        config = config_files.load(location.removeprefix("--config="))
        texts = dict(flag.removeprefix("--").split("=") for flag in flags)
        assert config_files.override(config, texts)
        assert config.batch_size % config.accumulation_steps == 0


@pytest.mark.thorough(tenth=False)
@pytest.mark.parametrize("index", range(len(DEVICES)))
def test_the_table_is_that_of_the_planner(index):
    device = DEVICES[index]
    assert [row(device, config) for config in device.configs] == [
        line for line in lines() if line.startswith(f"| {device.name} ")
    ]
