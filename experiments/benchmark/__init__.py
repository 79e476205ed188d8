r"""Benchmark training and sampling, relative to the machine's own peak of matrix products.

  python -m experiments.benchmark
  python -m experiments.benchmark --configs=digits,fashion_mnist:model=unet --data_path=FOLDER
  python -m experiments.benchmark --startup --split --devices=1,2,4,8 --json=benchmark.json
  python -m experiments.benchmark --configs=cifar10:model=DiT-S/2,cifar10:model=unet-64 \
      --batch_size=16 --against=torch

This is a benchmark, not a test: compare only numbers of one run, on a machine without other load.
docs/performance.md explains each number.
"""

import contextlib
import importlib.metadata
import json
import os
import platform
import re
import sys
from collections.abc import Sequence
from dataclasses import asdict
from datetime import datetime
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from absl import flags

import diffjax
from diffjax.errors import UserError, whole_number
from diffjax.runs.workdirs import git_revision
from experiments.benchmark.against_torch import Pair, measure_pairs
from experiments.benchmark.autoencoders import check_autoencoder, measure_autoencoder
from experiments.benchmark.cases import (
    Case,
    import_seconds,
    in_new_process,
    measure_case,
    measure_devices,
    measure_loop,
    measure_start,
)
from experiments.benchmark.checks import check_cases, check_devices
from experiments.benchmark.tables import (
    against_table,
    headline,
    loop_time_table,
    scaling_table,
    startup_tables,
    throughput_table,
)
from experiments.flags import cli

FLAGS = flags.FlagValues()
flags.DEFINE_string(
    "configs", "digits,digits:model=unet", "files in configs/, with choices after a colon",
    flag_values=FLAGS,
)  # fmt: skip
flags.DEFINE_integer(
    "batch_size", None, "images per training step; by default that of each config", lower_bound=1,
    flag_values=FLAGS,
)  # fmt: skip
flags.DEFINE_string(
    "data_path", None, "folder of the images, for configs that read a folder", flag_values=FLAGS
)
flags.DEFINE_multi_string(
    "override", [], "config.NAME=VALUE for all configs; can be repeated", flag_values=FLAGS
)
flags.DEFINE_integer("steps", 8, "training steps per round", lower_bound=1, flag_values=FLAGS)
flags.DEFINE_integer("num_samples", 64, "samples per round", lower_bound=1, flag_values=FLAGS)
flags.DEFINE_integer("rounds", 5, "number of rounds for medians", lower_bound=1, flag_values=FLAGS)
flags.DEFINE_bool(
    "startup", False, "also time imports, and starts with and without JAX's compilation cache",
    flag_values=FLAGS,
)  # fmt: skip
flags.DEFINE_enum(
    "against", None, ["torch", "torch.compile"],
    "also measure the same networks in PyTorch, in turns; eager or compiled",
    flag_values=FLAGS,
)  # fmt: skip
flags.DEFINE_bool(
    "split", False, "also time the training loop and its parts: input, compute, host",
    flag_values=FLAGS,
)  # fmt: skip
flags.DEFINE_list(
    "devices", [], "also train on these numbers of devices: 1,2,4,8; fake ones on CPUs",
    flag_values=FLAGS,
)  # fmt: skip
flags.DEFINE_list(
    "autoencoders", [], "with --against: also encode and decode with these sizes: sd-vae,flux",
    flag_values=FLAGS,
)  # fmt: skip
flags.DEFINE_integer(
    "autoencoder_pixels", 256, "height and width of their images, one at a time", lower_bound=8,
    flag_values=FLAGS,
)  # fmt: skip
flags.DEFINE_string("out", None, "also write the tables to this file", flag_values=FLAGS)
flags.DEFINE_string("json", None, "write all numbers to this file", flag_values=FLAGS)

_VERSIONS = ("jax", "jaxlib", "flax", "numpy")
_IMPORTS = ("diffjax", "diffjax.loop.loop")


def split_configs(text: str) -> list[str]:
    """Splits a list of configs; commas separate both configs and their arguments.

    Example:
        >>> split_configs("digits,digits:objective=ddpm,model=unet,fashion_mnist")
        ['digits', 'digits:objective=ddpm,model=unet', 'fashion_mnist']
    """
    names: list[str] = []
    for part in text.split(","):
        if names and "=" in part.partition(":")[0]:
            names[-1] += f",{part}"
        else:
            names.append(part.strip())
    return names


def describe_machine() -> dict[str, Any]:
    """The machine and versions; not the device, which only the measuring processes may use."""
    processor, vector = platform.processor() or platform.machine(), ""
    with contextlib.suppress(OSError):  # Linux only.
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8")
        fields = dict(re.findall(r"^(model name|flags)\s*: (.*)$", text, re.MULTILINE))
        processor = fields.get("model name", processor)
        vector = next((f" ({v})" for v in ("avx512f", "avx2") if v in fields.get("flags", "")), "")
    return {
        "machine": f"{os.cpu_count()} cores of {processor}{vector}, {platform.system()}",
        "load_average": round(os.getloadavg()[0], 1),
        "date": datetime.now().isoformat(" ", timespec="minutes"),
        "versions": {"diffjax": diffjax.__version__, "python": platform.python_version()}
        | {name: importlib.metadata.version(name) for name in _VERSIONS},
        "git_revision": git_revision(Path(__file__).parent),
    }


def main(args: SimpleNamespace) -> None:
    """Measures each config in turn, prints the tables, and saves them."""
    for path in (args.out, args.json):
        if path is not None and not Path(path).parent.is_dir():
            raise UserError(f"can't write {path}: there is no folder {Path(path).parent}")
    devices = device_counts(args.devices)
    cases = [
        Case(name, args.batch_size, args.data_path, tuple(args.override))
        for name in split_configs(args.configs)
    ]
    if args.autoencoders and not args.against:
        raise UserError("--autoencoders are compared with diffusers': add --against=torch")
    for size in args.autoencoders:
        in_new_process(check_autoencoder, size)
    # Checks all configs first, so that errors do not appear after minutes.
    in_new_process(check_cases, cases, args.split, args.against)
    if devices:
        in_new_process(check_devices, cases, devices)

    machine = describe_machine()
    rounds = {"steps": args.steps, "rounds": args.rounds}
    sizes = rounds | {"num_samples": args.num_samples}
    results = []
    for case in cases:
        _tell(f"measuring {case.name}")
        results += in_new_process(measure_case, case, sizes)
    tables = [headline(machine, results), throughput_table(results)]
    numbers = machine | {"results": [asdict(row) for row in results]}
    if devices:
        _tell("measuring training over devices")
        scaled = [
            in_new_process(measure_devices, case, number, rounds)
            for case in cases
            for number in devices
        ]
        tables.append(scaling_table(scaled))
        numbers["devices"] = [asdict(row) for row in scaled]
    if args.split:
        _tell("measuring the training loop")
        splits = [in_new_process(measure_loop, case, rounds) for case in cases]
        tables.append(loop_time_table(splits))
        numbers["split"] = [asdict(split) for split in splits]
    if args.startup:
        _tell("measuring imports and starts")
        imports = {module: import_seconds(module) for module in _IMPORTS}
        starts = [measure_start(case) for case in cases]
        tables.append(startup_tables(imports, starts))
        numbers["startup"] = {"imports": imports, "starts": [asdict(start) for start in starts]}
    if args.against:
        pairs: list[Pair] = []
        for case in cases:
            _tell(f"measuring {case.name} against {args.against}")
            pairs += measure_pairs(case, compiled=args.against == "torch.compile", **sizes)
        for size in args.autoencoders:
            _tell(f"measuring {size} against {args.against}")
            how = {"pixels": args.autoencoder_pixels, "num_images": 1, "rounds": args.rounds}
            pairs += measure_autoencoder(size, **how)
        tables.append(against_table(pairs, args.against))
        numbers["against"] = [asdict(pair) for pair in pairs]
    text = "\n\n".join(tables)
    print(text)
    for path, content in ((args.out, text), (args.json, json.dumps(numbers, indent=2))):
        if path is not None:
            cli.save(path, content + "\n")


def device_counts(texts: Sequence[str]) -> list[int]:
    """Parses the numbers of devices of a flag.

    Raises:
        UserError: one is not a positive integer.

    Example:
        >>> device_counts(["1", "8"])
        [1, 8]
    """
    counts = [whole_number(text) for text in texts]
    if not all(counts):
        raise UserError(f"--devices={','.join(texts)} should be numbers from 1, such as 1,2,4,8")
    return [count for count in counts if count]


def _tell(text: str) -> None:
    print(text, file=sys.stderr)


USAGE = f"""{__doc__}
Configs: {", ".join(cli.config_names())}"""
