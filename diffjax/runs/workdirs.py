"""The files of a run's folder, and the check that a folder belongs to a config."""

import importlib.metadata
import json
import logging
import os
import platform
import subprocess
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import jax
from jax.sharding import Mesh
from ml_collections import ConfigDict

import diffjax
from diffjax.codecs import Codec, Identity
from diffjax.conditions import Condition, of_classes
from diffjax.config_upgrade import upgrade
from diffjax.data import DataSet
from diffjax.errors import UserError, nearest
from diffjax.evaluation.tables import is_number
from diffjax.host.files import clear_unfinished, write_whole
from diffjax.host.processes import is_first
from diffjax.host.run_files import read_json, read_metrics
from diffjax.host.storage import make_writable
from diffjax.runs.changes import Changes, differences, refusal
from diffjax.runs.checkpoints import config_kept
from diffjax.runs.parts import Parts, build_parts
from diffjax.settings import check_complete, check_settings
from diffjax.spec import TARGET, as_spec, build, defaults, from_json, to_json
from diffjax.training.sharding import make_mesh

_LOG = logging.getLogger("diffjax")
CONFIG, RUN = "config.json", "run.json"
METRICS, EVALUATION, REPORT = "metrics.jsonl", "evaluation.json", "report.html"
SKIPPED = "skipped.jsonl"
_FOLDERS = ("checkpoints", "samples", "tensorboard")
_PACKAGES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "numpy")
# What `record` puts into run.json for good.
_KEPT = ("init_from", "teacher", "changes", "best")
_PLACE = ("mesh", "sharding_rules")
_DATA_PLACE = "path"


def claim(workdir: Path, config: ConfigDict, *, extended: bool = False) -> None:
    """Claims a folder for a config, or checks that it is this config's; it must be `locked`.

    Of several processes the first calls it.

    Args:
        workdir: the run's folder.
        config: resolved.
        extended: leave a config that differs as it is: `diffjax.runs.extension` replaces it.

    Raises:
        UserError: it has another run, which stays unchanged, or it can't be written to.
    """
    saved = _mended_config(workdir)
    if not extended:
        _check_same(workdir, saved, config)
    if saved is None:
        write_whole(workdir / CONFIG, to_json(config))
    # A folder that can't be written to fails now, not after an hour.
    for name in _FOLDERS:
        make_writable(workdir / name)
    for name in ("", *_FOLDERS):
        clear_unfinished(workdir / name)


def check_claim(workdir: Path, config: ConfigDict) -> None:
    """Refuses a folder that `claim` would refuse as another run's; nothing is written.

    Raises:
        UserError: it holds a run with another config, or one without any.
    """
    _check_same(workdir, saved_config(workdir), config)


def saved_config(workdir: Path) -> dict[str, Any] | None:
    """The config of a run, from a checkpoint if its file is damaged or gone; nothing is written."""
    try:
        saved = read_json(workdir / CONFIG)
    except UserError:
        saved = None  # `claim` mends it from a checkpoint, if it can.
    return saved or config_kept(workdir / "checkpoints")


def changes(saved: Mapping[str, Any], config: ConfigDict) -> Changes:
    """Differences of a config from a saved one, except where it is computed."""
    here = json.loads(to_json(config))
    return differences(_without_place(_with_defaults(saved, here)), _without_place(here))


def checkpoint_steps(workdir: Path) -> list[int]:
    """The steps of the checkpoints in a run's folder, in no order; none is opened."""
    folders = (workdir / "checkpoints").glob("*")
    return [int(folder.name) for folder in folders if folder.name.isdecimal()]


def _check_same(workdir: Path, saved: Mapping[str, Any] | None, config: ConfigDict) -> None:
    """Refuses a folder whose saved config is another, or missing."""
    if saved is not None:
        if found := changes(upgrade(saved), config):
            listed = _listed(found)
            extend = "" if refusal(found) else ", or --extend this run"
            raise UserError(
                f"{workdir} holds a run with another config ({'; '.join(listed[:3])}"
                f"{'; …' if len(listed) > 3 else ''}): choose another --workdir{extend}"
            )
    elif (workdir / "checkpoints").exists() or (workdir / METRICS).exists():
        raise UserError(
            f"{workdir} holds a run, but its {CONFIG} is missing: restore it, or choose another "
            "--workdir"
        )


def _mended_config(workdir: Path) -> dict[str, Any] | None:
    """The config in a run's folder; one that is damaged or gone is mended from a checkpoint.

    Raises:
        UserError: it is damaged, and no checkpoint has it.
    """
    path, damage = workdir / CONFIG, None
    try:
        saved = read_json(path)
    except UserError as error:
        saved, damage = None, error
    if saved is not None:
        return saved
    kept = config_kept(workdir / "checkpoints")
    if kept is None:
        if damage is not None:
            raise damage
        return None
    if damage is not None:
        path.replace(path.with_name(f"{CONFIG}.damaged"))
    write_whole(path, json.dumps(kept, indent=2) + "\n")
    _LOG.warning("%s was %s: mended from a checkpoint", path, "damaged" if damage else "missing")
    return kept


def _without_place(config: Mapping[str, Any]) -> dict[str, Any]:
    """A config without its devices and the paths of its data, which may change when it resumes.

    Fingerprints show whether the data are the same.
    """
    kept = {key: value for key, value in config.items() if key not in _PLACE}
    if isinstance(kept.get("data"), Mapping):
        kept["data"] = _with_paths_of({}, kept["data"])
    return kept


def _with_paths_of(other: Any, data: Mapping[str, Any]) -> dict[str, Any]:
    """A spec of data with the paths of another one, without those that this one lacks."""
    other = other if isinstance(other, Mapping) else {}
    moved = {
        key: _with_paths_of(other.get(key), value) if isinstance(value, Mapping) else value
        for key, value in data.items()
        if key != _DATA_PLACE or not isinstance(value, str)
    }
    there = other.get(_DATA_PLACE)
    known = _DATA_PLACE in data and isinstance(there, str)
    return moved | ({_DATA_PLACE: there} if known else {})


def check_kept(workdir: Path, steps: Sequence[int], config: ConfigDict) -> None:
    """Refuses to start from step 0 if a run has lost all of its checkpoints.

    Args:
        workdir: the run's folder.
        steps: the steps that have a checkpoint.
        config: the config of the run.

    Raises:
        UserError: there are no checkpoints, although its metrics go beyond the first one.
    """
    if steps:
        return
    metrics = workdir / METRICS
    made = max((record["step"] for record in read_metrics(metrics)), default=0)
    # Saving the second checkpoint begins only when the first is on disk.
    if made > config.checkpoint_every_steps:
        raise UserError(
            f"{workdir / 'checkpoints'} is empty, and {metrics} has steps up to {made}: bring the "
            "checkpoints back (is the disk mounted?), or start again in another --workdir"
        )


def _with_defaults(saved: Any, here: Any) -> Any:
    """Adds the arguments that specs have since a config was saved, with their defaults.

    Only what this config names is looked up: the saved one may be a stranger's.
    """
    if isinstance(saved, list) and isinstance(here, list) and len(saved) == len(here):
        return [_with_defaults(*pair) for pair in zip(saved, here, strict=True)]
    if not (isinstance(saved, Mapping) and isinstance(here, Mapping)):
        return saved
    same = TARGET in here and saved.get(TARGET) == here[TARGET]
    known = defaults(here[TARGET]) if same else {}
    added = {name: value for name, value in known.items() if name in here and name not in saved}
    return added | {name: _with_defaults(value, here.get(name)) for name, value in saved.items()}


def differing_keys(saved: Mapping[str, Any], here: Mapping[str, Any]) -> list[str]:
    """The differences of two configs, each as `key: there, here`.

    Example:
        >>> differing_keys({"a": "", "b": {"c": 2}}, {"a": "x", "b": {"c": 3}})
        ["a: '' there, x here", 'b.c: 2 there, 3 here']
    """
    return _listed(differences(saved, here))


def _listed(found: Mapping[str, tuple[Any, Any]]) -> list[str]:
    texts = {
        key: ["''" if value == "" else str(value) for value in two] for key, two in found.items()
    }
    return [f"{key}: {there} there, {here} here" for key, (there, here) in texts.items()]


def record_run(
    workdir: Path,
    parts: Parts,
    dataset: DataSet,
    command: str,
    ensemble: Mapping[str, Any] | None = None,
) -> None:
    """Writes the run's machine, versions, data and command to `run.json`; keeps earlier times.

    Args:
        workdir: the run's folder.
        parts: the parts of the run.
        dataset: what it trains on.
        command: how to make the run again.
        ensemble: with which others it trains in one program, if it does.
    """
    before = read_json(workdir / RUN) or {}
    content = {
        **provenance(before, parts.mesh, command),
        "num_params": parts.wired.num_params,
        "num_trained_params": sum(leaf.size for leaf in jax.tree.leaves(parts.abstract.params)),
        "data": described(dataset),
        **{name: before.get(name, 0.0) for name in ("compile_seconds", "train_seconds")},
        "train_flops_per_step": before.get("train_flops_per_step"),
    }
    content |= {name: before[name] for name in _KEPT if name in before}
    if ensemble or "ensemble" in before:
        content["ensemble"] = ensemble or before["ensemble"]
    if is_first():
        write_whole(workdir / RUN, json.dumps(content, indent=2) + "\n")
        _keep_paths(workdir, parts.config)


def provenance(before: Mapping[str, Any], mesh: Mesh, command: str) -> dict[str, Any]:
    """When, how and where a run was made, for its `run.json`.

    Args:
        before: what `run.json` has so far.
        mesh: the devices.
        command: how to make the run again.
    """
    device = mesh.devices.flat[0]
    return {
        "started": before.get("started", datetime.now(UTC).isoformat(timespec="seconds")),
        "command": command,
        "versions": {"diffjax": diffjax.__version__, "python": platform.python_version()}
        | {name: _version(name) for name in _PACKAGES},
        "git_revision": git_revision(Path(__file__).parent),
        "device": f"{mesh.size} x {device.device_kind} ({device.platform})",
        "host": f"{os.cpu_count()} cores, {platform.machine()}, {platform.system()}",
        "mesh": dict(mesh.shape),
    }


def described(dataset: DataSet) -> dict[str, Any]:
    """A data set, for the `run.json` of a run that is trained on it."""
    return {
        "name": dataset.name,
        "image_shape": list(dataset.image_shape),
        "num_classes": dataset.num_classes,
        "label_names": list(dataset.label_names),
        **({} if dataset.given is None else {"condition": _spec_of(dataset.given)}),
        "codec": _spec_of(dataset.codec),
        "num_train_images": len(dataset.train),
        "num_test_images": len(dataset.test),
        "train_sha256": dataset.train.fingerprint(),
        "test_sha256": dataset.test.fingerprint(),
    }


def _keep_paths(workdir: Path, config: ConfigDict) -> None:
    """Writes the new paths of a run's data, whose fingerprints agree, to its config."""
    saved, here = upgrade(read_json(workdir / CONFIG) or {}), json.loads(to_json(config))
    if isinstance(saved.get("data"), Mapping):
        moved = saved | {"data": {**saved["data"], **_with_paths_of(here["data"], saved["data"])}}
        if moved != saved:
            write_whole(workdir / CONFIG, json.dumps(moved, indent=2) + "\n")


def data_of(workdir: Path, data: ConfigDict, path: str | None = None) -> DataSet:
    """The data set that a run was trained on, from its path or a new one.

    Args:
        workdir: the run's folder, which has the fingerprints of its images.
        data: the spec of its config.
        path: in the place of the spec's, or of that of the first spec within it that has one.

    Raises:
        UserError: it is not there, it has no path, or it has other images.
    """
    data = data.copy_and_resolve_references()
    place = _with_a_path(data)
    if path is not None:
        if place is None:
            raise UserError(f"{data[TARGET]} reads no path: leave --data_path out")
        with place.unlocked():
            place[_DATA_PLACE] = path
    try:
        dataset: DataSet = build(data)
    except UserError as error:
        if place is None or path is not None:
            raise
        raise UserError(f"{error}; if the data have moved, set --data_path") from error
    known = (read_json(workdir / RUN) or {}).get("data", {})
    for part, source in (("train", dataset.train), ("test", dataset.test)):
        sha256 = known.get(f"{part}_sha256")
        if sha256 is not None and sha256 != source.fingerprint():
            there = dataset.name if place is None else place[_DATA_PLACE]
            raise UserError(
                f"the {part}ing images of {there} are not those of {workdir}: bring the old ones "
                "back, or set --data_path to their folder"
            )
    return dataset


def _with_a_path(data: ConfigDict) -> ConfigDict | None:
    """The outermost spec that has a path."""
    if isinstance(data.get(_DATA_PLACE), str):
        return data
    within = (_with_a_path(value) for value in data.values() if isinstance(value, ConfigDict))
    return next((found for found in within if found is not None), None)


def add_seconds(workdir: Path, **seconds: float) -> None:
    """Adds to the times in `run.json`, over all the stretches of an interrupted run."""
    content = read_json(workdir / RUN) or {}
    before = {name: content.get(name, 0.0) for name in seconds}
    record(
        workdir,
        **{
            # Somebody may have edited the file.
            name: value + (before[name] if is_number(before[name]) else 0.0)
            for name, value in seconds.items()
        },
    )


@contextmanager
def timed(workdir: Path, name: str) -> Iterator[None]:
    """Adds the seconds of the block to a time in `run.json`, as `add_seconds`."""
    began = time.perf_counter()
    try:
        yield
    finally:
        add_seconds(workdir, **{name: time.perf_counter() - began})


def record(workdir: Path, **facts: Any) -> None:
    """Adds facts to `run.json`."""
    if is_first():
        content = {**(read_json(workdir / RUN) or {}), **facts}
        write_whole(workdir / RUN, json.dumps(content, indent=2) + "\n")


def read_parts(
    workdir: Path, allowed_packages: tuple[str, ...] = ("diffjax",), mesh: Mesh | None = None
) -> Parts:
    """The parts of a run, built from its config and the description of its data.

    Args:
        workdir: the run's folder.
        allowed_packages: whose callables the saved config may name.
        mesh: the devices; by default all, which split the batch.

    Raises:
        UserError: there is no run in that folder, its files are damaged, or its parts can't be
            built.
    """
    if workdir.is_file():
        raise UserError(
            f"{workdir} is a file, not the folder of a run: diffjax.from_pretrained reads "
            "published ones, and --pretrained of experiments.sample and .evaluate"
        )
    try:
        text = (workdir / CONFIG).read_text(encoding="utf-8")
    except OSError as error:
        raise UserError(
            f"there is no run in {workdir}: {CONFIG}: {error.strerror}{_runs_near(workdir)}"
        ) from error
    except ValueError as error:
        raise UserError(f"{workdir / CONFIG} is no text ({error}): restore it") from error
    written = read_json(workdir / CONFIG) or {}
    if "autoencoder" in written:
        raise UserError(
            f"{workdir} is the run of an autoencoder, which draws no samples: its folder vae is a "
            f"codec, autoencoder:path={workdir}"
        )
    if "_class_name" in written:
        raise UserError(
            f"{workdir} is a folder of diffusers, not a run: diffjax.from_pretrained reads it, and "
            "--pretrained of experiments.sample and .evaluate"
        )
    run = read_json(workdir / RUN)
    if run is None or "data" not in run:
        raise UserError(f"{workdir / RUN} is missing or incomplete: run the training command again")
    data = run["data"]
    if not _describes_data(data):
        raise UserError(f"{workdir / RUN} does not describe images: restore it")
    config = from_json(text, allowed_packages, upgrade)

    def described(name: str, kind: type) -> Any:
        return build(from_json(json.dumps(data[name]), allowed_packages), kind)

    condition = (
        described("condition", Condition)
        if "condition" in data
        else of_classes(data["num_classes"], data["label_names"])
    )
    codec: Codec = described("codec", Codec) if "codec" in data else Identity()
    with version_told(workdir):
        check_complete(config)
        check_settings(config)
        return build_parts(
            config, tuple(data["image_shape"]), condition, mesh or make_mesh(), codec
        )


def _runs_near(workdir: Path) -> str:
    """The end of an error: the runs inside a folder, or the nearest one beside it."""
    inside = workdir.is_dir()
    folder = workdir if inside else workdir.parent
    runs = [file.parent.name for file in folder.glob(f"*/{CONFIG}")]
    return f"; {nearest('' if inside else workdir.name, runs)}" if runs else ""


def _spec_of(part: Condition | Codec) -> dict[str, Any]:
    """A part of the data as the spec that `build` makes it from again, as plain JSON.

    Raises:
        UserError: it has parts that are no plain values, such as arrays.
    """
    try:
        return json.loads(to_json(as_spec(part)))
    except (TypeError, UserError) as error:
        raise UserError(f"a run can't record its {type(part).__name__}: {error}") from error


@contextmanager
def version_told(workdir: Path) -> Iterator[None]:
    """Adds to errors of reading a run the version that wrote it, if that is not this one.

    Raises:
        UserError: the one that was raised inside, with the version.
    """
    try:
        yield
    except UserError as error:
        run = read_json(workdir / RUN) or {}
        versions, revision = run.get("versions"), str(run.get("git_revision", ""))
        version = versions.get("diffjax") if isinstance(versions, dict) else None
        if version == diffjax.__version__ and revision == git_revision(Path(__file__).parent):
            raise
        at = f" at {revision[:12]}" if revision else ""
        raise UserError(f"{error}; diffjax {version}{at} wrote it, and reads it") from error


def _describes_data(data: Any) -> bool:
    if not isinstance(data, dict):
        return False
    shape, names = data.get("image_shape"), data.get("label_names")
    return (
        isinstance(shape, list)
        and len(shape) == 3
        and all(type(size) is int and size > 0 for size in shape)
        and type(data.get("num_classes")) is int
        and data["num_classes"] >= 0
        and isinstance(names, list)
    )


def git_revision(folder: Path) -> str:
    """The commit that the code is at, with a `+` if files were changed; "" outside a checkout."""

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(folder), *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()

    try:
        changed = git("status", "--porcelain", "--untracked-files=no")
        return git("rev-parse", "HEAD") + ("+" if changed else "")
    except (OSError, subprocess.CalledProcessError):
        return ""


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"
