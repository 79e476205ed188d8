"""Writes weights in another layout: of diffusers, of a network's authors, or of this library."""

import dataclasses
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import jax
from ml_collections import ConfigDict

from diffjax.codecs.autoencoders import FOLDER as VAE
from diffjax.errors import UserError, nearest
from diffjax.exchange.own_folders import is_own, read_own, write_own
from diffjax.exchange.pipelines import (
    DENOISERS,
    NETWORKS,
    part_names,
    part_of,
    reads_prompts,
    texts_of,
)
from diffjax.exchange.pretrained import recognised
from diffjax.exchange.schedulers import prediction_of, schedule_of
from diffjax.host.files import place_of, write_json
from diffjax.host.processes import to_host
from diffjax.host.run_files import read_json
from diffjax.models.families import AUTHORS, DIFFUSERS, LAYOUTS
from diffjax.models.loras import published_changes
from diffjax.models.unet import UNet
from diffjax.pretrained.family import Denoiser, Family
from diffjax.pretrained.files import write_safetensors
from diffjax.pretrained.folders import (
    CONFIG,
    PIPELINE,
    WEIGHTS,
    read_object,
    read_weights,
    write_folder,
)
from diffjax.pretrained.lora_writer import DIALECTS, FILE, write_lora
from diffjax.pretrained.torch_writer import write_torch
from diffjax.runs.initial import by_path, check_same, is_run
from diffjax.runs.load import Run, load
from diffjax.spec import TARGET, to_json

OWN = "diffjax"
SCHEDULER, SCHEDULER_FILE = "scheduler", "scheduler_config.json"
TARGETS = (DIFFUSERS, AUTHORS, OWN, *DIALECTS)
"""The names of the layouts that can be written."""
FORMATS: Mapping[str, tuple[str, Callable[[Path, Mapping[str, Any]], None]]] = {
    "torch": ("pt", write_torch),
    "safetensors": ("safetensors", write_safetensors),
}
"""How a file of the authors' layout may be written: the end of its name, and what writes it."""
_WITHOUT_EFFECT = frozenset(
    {
        "parent",
        "name",
        "dtype",
        "attention",
        "scan",
        "remat",
        "dropout",
        "hidden_depths",
        "base_width",
    }
)
_NOT_SHOWN = frozenset({"num_heads", "num_groups", "head_channels", "attention_resolutions"})
"""Settings that tensors do not show, and that whoever reads them knows from the published size."""


class Given(NamedTuple):
    """Weights to be written in another layout.

    Attributes:
        network: a Flax module, or a `Denoiser`.
        params: nested dicts of arrays.
        origin: what they were read from, in words.
        config: the entries of `config.json` of a folder of diffusers.
        left_out: the names of parameters that are not the network's.
        run: the config of the run that they are of.
    """

    network: Any
    params: Any
    origin: str
    config: Mapping[str, Any] = {}
    left_out: tuple[str, ...] = ()
    run: ConfigDict | None = None


def convert(
    source: str,
    to: str,
    out: str | Path,
    *,
    family: str | None = None,
    part: str = "",
    settings: Mapping[str, Any] = MappingProxyType({}),
    file_format: str = "torch",
    allowed_packages: tuple[str, ...] = ("diffjax",),
) -> list[str]:
    """Writes the weights of a file, a folder or a run in another layout; numbers stay as they are.

    | `to` | what is written to `out` |
    |---|---|
    | `diffusers` | `config.json` and `diffusion_pytorch_model.safetensors`, or shards of 10 GB |
    | `authors` | `weights.pt` as `torch.save` writes it, or `weights.safetensors`; of TAESD two |
    | `diffjax` | `config.json` and `weights.safetensors`, with the names of the parameters here |
    | `lora` | `pytorch_lora_weights.safetensors`, the LoRA of a run in the dialect of peft |
    | `lora_old` | the same in the dialect of older diffusers, whose scale is in its numbers |
    | `lora_kohya` | the same in the dialect of kohya, of Flux and SD 3 with the authors' names |

    Of a pipeline that reads prompts, or of a run that began with one (`config.init_from`),
    `diffusers` is the whole pipeline; the network of the run takes the place of the pipeline's.
    Other layouts than those of LoRA have the changes of a run with LoRA in its weights.

    Args:
        source: a file of torch or safetensors, a folder of diffusers or a pipeline, a folder that
            this function wrote, or a run, `runs/x`, or `runs/x:ema-0.999`.
        to: the layout, one of `TARGETS`.
        out: a folder, which must not have files; the one above it must exist.
        family: `DiT` or `SiT`, whose tensors are the same, where the name of a file does not tell.
        settings: settings of the network, such as `num_heads` of one of no published size.
        part: the part of a torch file that has several, such as `model`; by default the averages.
        file_format: the format of the authors' layout, `torch` or `safetensors`.
        allowed_packages: whose callables the config of a run may name.

    Returns:
        Lines on what was read, what was written, and what is unlike in the layout.

    Raises:
        UserError: there are no such weights, they are damaged, `out` can't be written, or the
            layout has no place for the network.

    References:
        docs/models.md has the layouts of each network.
    """
    if to not in TARGETS:
        raise UserError(f"no layout is called {to!r}; {nearest(to, TARGETS)}")
    if file_format not in FORMATS:
        raise UserError(f"no format is called {file_format!r}; {nearest(file_format, FORMATS)}")
    place = place_of(str(out))
    if place.exists() and (not place.is_dir() or any(place.iterdir())):
        raise UserError(f"{out} has files already: name a new folder")
    if not place.absolute().parent.is_dir():
        raise UserError(f"can't write {out}: there is no folder {place.absolute().parent}")
    if to == DIFFUSERS and reads_prompts(place_of(source)):
        return _whole_pipeline(place_of(source), place)
    if to in DIALECTS:
        return _lora(source, to, place, allowed_packages)
    given = _of_folder(source, allowed_packages) or _of_file(source, family, settings, part)
    if to == DIFFUSERS and given.run and texts_of(place_of(given.run.init_from)):
        return _whole_pipeline(place_of(given.run.init_from), place, given)
    return _written(given, to, place, file_format)


def _written(given: Given, to: str, place: Path, file_format: str = "torch") -> list[str]:
    """Writes weights in a layout; returns the lines of `convert`."""
    module = _module(given.network)
    count = sum(leaf.size for leaf in jax.tree.leaves(given.params))
    lines = [f"{type(module).__name__}, {count:,} parameters, of {given.origin}"]
    if given.left_out:
        lines.append(f"left out, since the network has none: {', '.join(given.left_out)}")
    if to == OWN:
        write_own(place, given.network, given.params)
    else:
        layout = _layout(module, to)
        state, entries = _theirs(layout, given, to)
        lines += _unlike(layout, given, state, entries)
        if to == DIFFUSERS:
            name = layout.config.weights if layout.config else WEIGHTS
            write_folder(place, state, entries, name=name)
            lines += _unknown(entries, layout)
        else:
            place.mkdir(exist_ok=True)
            suffix, write = FORMATS[file_format]
            for name, tensors in _by_file(layout, state).items():
                write(place / f"{name}.{suffix}", tensors)
    names = ", ".join(sorted(file.name for file in place.iterdir()))
    return [*lines, f"{to}: {names} in {place}"]


def _whole_pipeline(pipeline: Path, out: Path, tuned: Given | None = None) -> list[str]:
    """Writes all parts of a pipeline: networks through the parameters here, other files as copies.

    Args:
        pipeline: the folder.
        out: where to write.
        tuned: the weights of a run in the place of its network.

    Raises:
        UserError: a part is missing, can't be read, or `out` can't be written.
    """
    entries, lines = read_object(pipeline / PIPELINE), []
    try:
        out.mkdir(exist_ok=True)
        for name in part_names(entries):
            folder = part_of(pipeline, name)
            if tuned and name in DENOISERS:
                known = read_weights(folder).config
                there = _written(tuned._replace(config=known), DIFFUSERS, out / name)
                lines += [f"{name}: {line}" for line in there]
            elif tuned and tuned.run and name == SCHEDULER:
                shutil.copytree(folder, out / name)
                lines += _scheduled(out / name / SCHEDULER_FILE, tuned.run)
            elif name in NETWORKS:
                lines += [f"{name}: {line}" for line in convert(str(folder), DIFFUSERS, out / name)]
            else:
                shutil.copytree(folder, out / name)
                lines.append(f"{name}: copied")
        write_json(out / PIPELINE, entries)
    except OSError as error:
        raise UserError(f"can't write {out}: {error.strerror}") from error
    return [*lines, f"{DIFFUSERS}: a pipeline in {out}"]


def _scheduled(file: Path, config: ConfigDict) -> list[str]:
    """Writes what a run's network predicts to a scheduler's config, and returns lines on that."""
    entries = read_object(file)
    there = schedule_of(entries, str(file))
    path, target = config.path, config.precond.target
    if to_json(path) != to_json(there.path):
        return [f"unlike: the {SCHEDULER} has another path than the {path[TARGET]} of the run"]
    if to_json(target) == to_json(there.target):
        return [f"{SCHEDULER}: copied"]
    if not (kind := prediction_of(target)):
        return [f"unlike: the {SCHEDULER} has no name for the target {target[TARGET]} of the run"]
    write_json(file, {**entries, "prediction_type": kind})
    return [f"{SCHEDULER}: copied, with prediction_type={kind}"]


def layout_of_lora(module: Any, dialect: str) -> tuple[Family, str]:
    """The layout whose names a dialect has for the layers of a network, and its folder's name.

    Raises:
        UserError: the network has no such layout.
    """
    if isinstance(module, UNet):
        return _layout(module, DIFFUSERS), "unet"
    # Kohya's trainer has the networks of the authors, but for the U-Net.
    return _layout(module, AUTHORS if dialect == "lora_kohya" else DIFFUSERS), "transformer"


def _by_file(layout: Family, state: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """The tensors of each file by its name, without that of a part that has a file of its own."""
    if not layout.files:
        return {"weights": dict(state)}
    return {
        f"weights_{part}": {
            name.removeprefix(f"{part}."): array
            for name, array in state.items()
            if name.startswith(f"{part}.")
        }
        for part in layout.files
    }


def _of_folder(source: str, allowed_packages: tuple[str, ...]) -> Given | None:
    """The weights of a run or of a folder of this library; None if it is neither.

    Raises:
        UserError: it is the run of an autoencoder, which writes its weights at its end.
    """
    place = place_of(source)
    if (place / VAE / CONFIG).is_file() and not (place / PIPELINE).is_file():
        return _of_file(str(place / VAE), None, {}, "")  # Of a run that trained an autoencoder.
    if is_run(place) and "autoencoder" in (read_json(place / CONFIG) or {}):
        raise UserError(
            f"{source} has no autoencoder yet: experiments.train_autoencoder writes {VAE} at its "
            "end; the same command goes on"
        )
    if run := _run(source, allowed_packages):
        return _of_run(run)
    return _of_own(place, allowed_packages) if is_own(place) else None


def _run(source: str, allowed_packages: tuple[str, ...]) -> Run | None:
    """The run of a folder, with the weights after a colon; None of another place."""
    place, (folder, colon, weights) = place_of(source), source.rpartition(":")
    if is_run(place):
        return load(place, allowed_packages=allowed_packages)
    if colon and not place.exists() and is_run(place_of(folder)):
        return load(place_of(folder), weights=weights, allowed_packages=allowed_packages)
    return None


def _lora(source: str, to: str, out: Path, allowed_packages: tuple[str, ...]) -> list[str]:
    """Writes the LoRA of a run as a file.

    Raises:
        UserError: it is no run with LoRA, or the names of its layers are not known elsewhere.
    """
    run = _run(source, allowed_packages)
    if run is None or not run.parts.wired.lora.rank:
        raise UserError(f"{source} is no run with LoRA (config.lora.rank), so it has none for {to}")
    denoiser, lora = run.parts.denoiser, run.parts.wired.lora
    layout, folder = layout_of_lora(denoiser.network, to)
    changes = published_changes(to_host(run.weights()), lora.scale, layout, denoiser)
    out.mkdir(exist_ok=True)
    write_lora(out / FILE, changes, DIALECTS[to], folder)
    return [
        f"LoRA of {len(changes)} layers, rank {lora.rank}, of {source}, weights "
        f"{run.config.weights} of step {run.step}",
        f"{to}: {FILE} in {out}",
    ]


def _of_file(source: str, family: str | None, settings: Mapping[str, Any], part: str) -> Given:
    """The weights of a file, or of a folder of diffusers."""
    place = place_of(source)
    found = recognised(place, family, settings, part)
    config = read_weights(place).config if place.is_dir() else {}
    origin = f"{found.source} (layout: {found.layout})"
    return Given(found.network, found.params(), origin, config)


def _of_run(run: Run) -> Given:
    params = to_host(run.merged())
    learned = tuple(run.parts.wired.objective.init_params(jax.random.key(0)))
    merged = ", LoRA merged" if run.parts.wired.lora.rank else ""
    origin = f"{run.workdir}, weights {run.config.weights} of step {run.step}{merged}"
    own = {name: value for name, value in params.items() if name not in learned}
    return Given(run.parts.denoiser, own, origin, left_out=learned, run=run.config)


def _of_own(folder: Path, allowed_packages: tuple[str, ...]) -> Given:
    network, params = read_own(folder, allowed_packages)
    return Given(network, params, f"{folder} (layout: {OWN})")


def _module(network: Any) -> Any:
    return network.network if isinstance(network, Denoiser) else network


def _layout(module: Any, to: str) -> Family:
    name = type(module).__name__
    layouts = LAYOUTS.get(type(module), {})
    if to not in layouts:
        known = ", ".join([*(known for known in TARGETS if known in layouts), OWN])
        raise UserError(f"{name} has no layout {to!r} here; it has {known}")
    return layouts[to]


def _theirs(family: Family, given: Given, to: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """The tensors of a layout, and the entries of its `config.json`."""
    shapes = family.shapes(given.network)
    if more := sorted({*by_path(given.params)} - {*by_path(shapes)}):
        raise UserError(
            f"the layout {to!r} has no place for {', '.join(more[:3])} of {given.origin}"
        )
    check_same(given.origin, given.params, shapes)
    entries = {}
    if family.config and to == DIFFUSERS:
        # What the tensors do not depend on, such as the scale of latents, stays as it was.
        entries = {**given.config, **family.config.entries(given.network)}
    return family.to_theirs(given.params, given.network), entries


def _unlike(
    family: Family, given: Given, state: Mapping[str, Any], entries: Mapping[str, Any]
) -> list[str]:
    """Settings of the network that readers of a layout do not find in it, and take as others."""
    shown = family.recognise({name: tuple(x.shape) for name, x in state.items()})
    settings = family.config.settings(entries, given.origin) if family.config and entries else {}
    module = _module(given.network)
    of_sizes = {name for size in family.sizes.values() for name in size.settings} | _NOT_SHOWN
    known = {name: getattr(module, name) for name in of_sizes if hasattr(module, name)}
    if "image_shape" in of_sizes and isinstance(given.network, Denoiser):
        known["image_shape"] = given.network.image_shape
    there = family.network(**{**(settings or known), **shown})
    family.check(state, there, f"the layout of {given.origin} for {family.name}")
    hidden = _WITHOUT_EFFECT | shown.keys() | (set() if settings else known.keys())
    unlike = [
        f"{field.name}={theirs} instead of {ours}"
        for field in dataclasses.fields(_module(there))
        if field.name not in hidden
        and (ours := getattr(module, field.name)) != (theirs := getattr(_module(there), field.name))
    ]
    if not unlike:
        return []
    return [f"unlike: whoever reads this layout evaluates the network with {', '.join(unlike)}"]


def _unknown(entries: Mapping[str, Any], family: Family) -> list[str]:
    needed = family.config.beside if family.config else {}
    missing = [f"{name} ({value})" for name, value in needed.items() if name not in entries]
    if not missing:
        return []
    return [
        f"unknown: {', '.join(missing)}, which weights do not show; add it to {CONFIG} if it is "
        "not this default of diffusers"
    ]
