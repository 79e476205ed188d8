"""Flags of a published network in the place of a run, and what they open."""

import ast
import shlex
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from absl import flags

import diffjax
from diffjax.data import DataSet
from diffjax.errors import UserError, whole_number
from diffjax.exchange.pipelines import SCHEDULER
from diffjax.exchange.pretrained import Pretrained
from diffjax.exchange.priors import ImagePrior
from diffjax.host.processes import in_first, is_first
from diffjax.host.progress import progress
from diffjax.runs import workdirs
from diffjax.runs.initial import is_run
from diffjax.runs.load import Run
from diffjax.runs.samples.loras import with_loras

_OF_FILE = ("codec", "component", "family", "image_size", "lora", "network", "prior")


def define(flag_values: flags.FlagValues) -> None:
    """Defines `--pretrained` and what a published network needs."""
    for name, about in (
        ("pretrained", "published file, or folder of diffusers, in the place of a run"),
        ("codec", "of a published network, as sd-vae-ft-mse"),
        ("family", "of a published file: DiT or SiT"),
        ("prior", "folder of a prior, for a decoder of image embeddings as Kandinsky's"),
    ):
        flags.DEFINE_string(name, None, about, flag_values=flag_values)
    about = "files of LoRA, FILE:0.8,FILE: merged, or beside a run's weights"
    flags.DEFINE_list("lora", None, about, flag_values=flag_values)
    flags.DEFINE_list(
        "image_size", None, "height,width in pixels, of a published network of texts",
        flag_values=flag_values,
    )  # fmt: skip
    flags.DEFINE_multi_string(
        "component",
        [],
        "in the place of a pipeline's: network:FILE or scheduler:ENTRY=VALUE; repeatable",
        flag_values=flag_values,
    )
    define_network(flag_values)


def define_network(flag_values: flags.FlagValues) -> None:
    """Defines `--network=num_heads=4`, settings that a published file does not show."""
    flags.DEFINE_multi_string(
        "network",
        [],
        "setting of a published network, as dtype=bfloat16; repeatable",
        flag_values=flag_values,
    )


def define_states(flag_values: flags.FlagValues) -> None:
    """Defines `--states=FILE`, in the place of prompts and text encoders."""
    flags.DEFINE_string(
        "states",
        None,
        "with --pretrained: a file of prompt_embeds, in the place of --prompts and text encoders",
        flag_values=flag_values,
    )


def settings_of(given: Sequence[str]) -> dict[str, Any]:
    """The settings of a network by name, of texts such as `num_heads=4`.

    Raises:
        UserError: one has no name or no value, or a name occurs twice.

    Example:
        >>> settings_of(["num_heads=4", "dtype=bfloat16", "image_shape=(8, 8, 3)"])
        {'num_heads': 4, 'dtype': 'bfloat16', 'image_shape': (8, 8, 3)}
    """
    found: dict[str, Any] = {}
    for text in given:
        name, _, value = text.partition("=")
        if not name or not value:
            raise UserError(f"--network={text} is not of the form setting=value, as num_heads=4")
        if name in found:
            raise UserError(f"--network has the setting {name!r} twice")
        found[name] = _value(value)
    return found


def components_of(given: Sequence[str]) -> dict[str, Any]:
    """Components of a pipeline by name, of texts such as `tokenizer:FOLDER`.

    Raises:
        UserError: one has no name or no value, or a name occurs twice.

    Example:
        >>> components_of(["network:unet.safetensors", "scheduler:timestep_spacing=trailing"])
        {'network': 'unet.safetensors', 'scheduler': {'timestep_spacing': 'trailing'}}
    """
    found: dict[str, Any] = {}
    for text in given:
        name, _, value = text.partition(":")
        entry, _, of_entry = value.partition("=")
        if not name or not value or (name == SCHEDULER and not of_entry):
            raise UserError(
                f"--component={text} is not of the form network:FILE or "
                "scheduler:timestep_spacing=trailing"
            )
        place = found.setdefault(SCHEDULER, {}) if name == SCHEDULER else found
        key, value = (entry, _value(of_entry)) if name == SCHEDULER else (name, value)
        if key in place:
            raise UserError(f"--component has {key!r} twice: give it one value")
        place[key] = value
    return found


def _value(text: str) -> Any:
    """A number, a truth value or a tuple that is written as in Python; else the text itself."""
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError, MemoryError, RecursionError):
        return text


def opened(args: SimpleNamespace, weights: str | None) -> Run:
    """The run of `--workdir`, or the network of `--pretrained`, whose results go to `--workdir`.

    Files of LoRA are added to the weights of a published network, and evaluated beside a run's.

    Raises:
        UserError: neither is given, flags of the one with the other, or nothing can be read.
    """
    for name in ("pretrained", *_OF_FILE):
        if getattr(args, name) == "":
            raise UserError(f"--{name}= is empty: leave it out, or name a file")
    if args.pretrained is None:
        if args.workdir is None:
            raise UserError("--workdir is missing, or --pretrained=FILE; --help describes them")
        if Path(args.workdir).is_file():
            raise UserError(f"--workdir={args.workdir} is a file: name it by --pretrained")
        for name in _OF_FILE:
            if getattr(args, name) not in (None, []) and name != "lora":
                raise UserError(f"--{name} goes with --pretrained: a run has its own, leave it out")
        allowed = ("diffjax", *args.allowed_packages)
        run = diffjax.load(args.workdir, step=args.step, weights=weights, allowed_packages=allowed)
        return with_loras(run, _loras(args.lora)) if args.lora else run
    if args.step is not None:
        raise UserError(f"--step={args.step}: a published file has one set of weights")
    place = None if args.workdir is None else Path(args.workdir)
    # Results of a published network have an empty folder of checkpoints.
    if place is not None and is_run(place) and any((place / "checkpoints").iterdir()):
        raise UserError(
            f"--workdir={args.workdir} has a run of its own: name another folder for the results "
            f"of {args.pretrained}"
        )
    settings = settings_of(args.network)
    known = ("path", "mesh", "codec", "family", "image_size", "loras", "components", "texts")
    for name in (*known, "prior"):
        if name in settings:
            raise UserError(f"--network={name}=…: that is no setting of a network")
    with progress(f"reading {args.pretrained}"):
        run = diffjax.from_pretrained(
            args.pretrained,
            codec=args.codec,
            family=args.family,
            image_size=_size(args.image_size),
            loras=_loras(args.lora or []),
            components=components_of(args.component),
            texts=getattr(args, "states", None) is None,
            prior=_prior(args.prior, args.seed),
            **settings,
        )
    return run if args.workdir is None else replace(run, workdir=Path(args.workdir))


def _prior(folder: str | None, seed: Any) -> ImagePrior | None:
    """The prior of `--prior`, whose noise has the seed of the samples, where they have one."""
    if folder is None:
        return None
    return ImagePrior(diffjax.from_pretrained(folder), seed=seed if isinstance(seed, int) else 0)


def _size(sides: list[str] | None) -> tuple[int, int] | None:
    """Height and width of `--image_size`; one number is both."""
    if sides is None:
        return None
    pixels = [pixel for side in sides if (pixel := whole_number(side))]
    if len(sides) not in (1, 2) or len(pixels) < len(sides):
        raise UserError(f"--image_size={','.join(sides)} is to be height,width in pixels")
    return pixels[0], pixels[-1]


def _loras(given: list[str]) -> dict[str, float]:
    """The files and weights of `--lora=FILE:0.8,FILE`; without a weight it is 1."""
    found = {}
    for text in given:
        file, colon, weight = text.rpartition(":")
        if not colon or Path(text).exists():
            file, weight = text, "1"
        try:
            number = float(weight)
        except ValueError:
            raise UserError(f"--lora={text}: {weight!r} is no weight, as in FILE:0.8") from None
        if file in found:
            raise UserError(f"--lora names {file} twice: give it one weight")
        found[file] = number
    return found


def record(run: Run, dataset: DataSet) -> None:
    """Writes what a published network is, and its quirks, to the folder of its results.

    Raises:
        UserError: the folder has another run.
    """
    if not isinstance(run, Pretrained):
        return
    in_first(lambda: workdirs.claim(run.workdir, run.config))
    command = shlex.join(["python", "-m", "experiments.evaluate", *sys.argv[1:]])
    workdirs.record_run(run.workdir, run.parts, dataset, command)
    if is_first():
        workdirs.record(run.workdir, published=run.facts)
