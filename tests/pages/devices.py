"""Writes the table of common devices in docs/devices.md, by the analytic model.

python -m tests.pages.devices
"""

import shlex
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

from ml_collections import ConfigDict

from diffjax import config_files
from diffjax.performance.planning.analytic import model_of
from diffjax.performance.planning.compiled import Needs
from diffjax.performance.planning.fitting import Fitted, fitted
from diffjax.performance.planning.roofline import estimate
from diffjax.performance.planning.search import changed
from diffjax.performance.planning.topologies import GIB, Topology, topology_called
from diffjax.spec import to_json
from diffjax.training.sharding import filled

PAGE = Path(__file__).parents[2] / "docs" / "devices.md"
BEGIN, END = "<!-- devices -->\n", "<!-- end of devices -->\n"
HEAD = (
    "| device | trains | parameters | by plan | images/s, at most | command |\n"
    + "|---" * 6
    + "|\n"
)


class Device(NamedTuple):
    """A device of the table, and what it trains.

    Attributes:
        name: in the table.
        topology: as plans have it.
        configs: as `--config` has them.
    """

    name: str
    topology: str
    configs: tuple[str, ...]


DEVICES = (
    Device(
        "a GPU of 8 GB (RTX 4060)",
        "rtx4060:1",
        ("cifar10", "imagenet64:model=DiT-B/4", "imagenet256:model=DiT-B/2"),
    ),
    Device(
        "a GPU of 24 GB (RTX 4090)",
        "rtx4090:1",
        ("cifar10", "imagenet64:model=ADM-64", "imagenet256:model=DiT-XL/2"),
    ),
    Device(
        "a GPU of 80 GB (H100)",
        "h100:1",
        ("cifar10", "imagenet64:model=ADM-64", "imagenet256:model=DiT-XL/2"),
    ),
    Device(
        "v5e-8",
        "v5e:2x4",
        ("cifar10", "imagenet64:model=ADM-64", "imagenet256:model=DiT-XL/2"),
    ),
)


_PLANNED: dict[tuple[str, int], Needs] = {}


def planned(config: ConfigDict, topology: Topology) -> Needs:
    """What a config needs, which on equally many chips does not depend on their kind.

    Parts of a batch are left out of the plan: they change what is kept, which `fitted` knows.
    """
    mesh = filled(config.mesh, topology.num_chips)
    config = changed(config, mesh=ConfigDict(mesh), accumulation_steps=1)
    key = to_json(config), topology.num_chips
    if key not in _PLANNED:
        _PLANNED[key] = model_of(config, topology)
    return replace(_PLANNED[key], topology=topology.name)


def command(location: str, found: Fitted) -> str:
    """The command that trains with the chosen settings, without `--auto`."""
    own, flags = config_files.load(location), [f"--config={location}"]
    for name, setting in config_files.settings(found.config).items():
        group, _, key = name.rpartition(".")
        before = own if group == "config" else own.get(group.removeprefix("config."), {})
        if name.startswith("config.mesh.") or name in _CHOSEN:
            value = setting.default
            if before.get(key) != value and not (name.startswith("config.mesh.") and value == 1):
                flags.append(f"--{name}={value}")
    return shlex.join(["diffjax", "train", *flags])


_CHOSEN = ("config.model.dtype", "config.model.remat", "config.accumulation_steps")


def row(device: Device, location: str) -> str:
    """A line of the table."""
    topology = topology_called(device.topology)
    found = fitted(config_files.load(location), topology, plan=planned)
    needs = planned(found.config, topology)
    seconds = estimate(needs, topology).seconds
    assert found.peak_bytes is not None
    cells = (
        device.name,
        f"`{location}`",
        f"{needs.num_params / 1e6:,.0f} M",
        f"{found.peak_bytes / GIB:.1f} of {topology.usable_bytes / GIB:.1f} GiB",
        f"{needs.batch_size / seconds:,.0f}",
        f"`{command(location, found)}`",
    )
    return f"| {' | '.join(cells)} |"


def rows() -> Iterator[str]:
    """All lines, which take some minutes."""
    for device in DEVICES:
        for location in device.configs:
            print(device.name, location, file=sys.stderr, flush=True)
            yield row(device, location)


def main() -> None:
    """Writes the table between its two marks."""
    table = HEAD + "".join(f"{line}\n" for line in rows())
    before, _, rest = PAGE.read_text("utf-8").partition(BEGIN)
    PAGE.write_text(f"{before}{BEGIN}{table}{END}{rest.partition(END)[2]}", "utf-8")


if __name__ == "__main__":
    main()
