"""Data sets of latents: arrays that a codec computed from images, read on demand."""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from ml_collections import ConfigDict

from diffjax.codecs import Codec, ScaledLatents, Unstated
from diffjax.codecs.base import RECORD
from diffjax.codecs.scaled import PerChannel, row
from diffjax.conditions import Condition
from diffjax.data import imagenet
from diffjax.data.archives import read_npz
from diffjax.data.fingerprints import evenly
from diffjax.data.given import GivenSource
from diffjax.data.sources import (
    Batch,
    DataSet,
    Example,
    Source,
    SplitSeed,
    TestFraction,
    check_channels_last,
    stratified_split,
)
from diffjax.errors import UserError, nearest
from diffjax.host.files import place_of
from diffjax.host.run_files import read_json
from diffjax.kinds import NotNegative, Positive
from diffjax.spec import from_json, spec

FACTS, UNFINISHED = "latents.json", "unfinished"
CAPTIONS, TEXT = "captions.json", "text.json"
"""The files of captions, and of the text encoder that has read them."""
LATENTS, LOG_VARIANCES, LABELS, FLIPPED = "latents", "log_variances", "labels", "_flipped"
FEATURES = "features"
"""The name of files and, in a batch, of features of the images, `[B, rows, columns, numbers]`."""

_CODEC = "codec"
_ALL_LATENTS = tuple(
    f"{name}{suffix}" for name in (LATENTS, LOG_VARIANCES) for suffix in ("", FLIPPED)
)
_ALL_FEATURES = FEATURES, f"{FEATURES}{FLIPPED}"
LOG_VARIANCE = "log_variance"
"""The name of the posterior's log-variances in a training batch; their means are its images."""
NORMALISATIONS: Mapping[str, tuple[str | None, str | None]] = {
    "none": (None, None),
    "scalar": (None, "scalar_std"),
    "channels": ("mean", "std"),
}
"""Names of the statistics that latents are shifted by and divided by."""


@dataclass(frozen=True, eq=False, repr=False)
class LatentSource(Source):
    """A source of rows of arrays that may be larger than memory: `scale · (latents − shift)`.

    Args:
        latents: float `[N,H,W,C]`; it may be a memory map.
        labels: int32 `[N]`.
        rows: the rows of this source, in increasing order.
        scale: the factor of the latents, one or one for each channel.
        stamp: for an array in memory its hash, for a memory map its size, shape and type.
        shift: the mean of the latents, one or one for each channel.
        drawn: what training draws from besides, by the names of files: `log_variances` of the
            posteriors, whose means the latents are, and `latents_flipped` (and
            `log_variances_flipped`) of the mirrored images. `features` of the images, and of the
            mirrored ones, are in all batches.

    Example:
        >>> latents = np.ones((3, 4, 4, 2), np.float16)
        >>> source = LatentSource(latents, np.arange(3, dtype=np.int32), np.array([0, 2]), 0.5, "")
        >>> len(source), source[1]["label"], source.gather([0])["image"].max().item()
        (2, 2, 0.5)
    """

    pixels: ClassVar[bool] = False
    latents: np.ndarray
    labels: np.ndarray
    rows: np.ndarray
    scale: PerChannel
    stamp: str
    shift: PerChannel = 0.0
    drawn: Mapping[str, np.ndarray] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> Example:
        batch = self.gather([index])
        return {"image": batch["image"][0], "label": int(batch["label"][0])}

    def gather(self, rows: Sequence[int] | np.ndarray) -> Batch:
        """The latents at `rows`, as float32; of moments the means.

        Raises:
            UserError: a latent contains a number that is not finite.
        """
        where = self.rows[np.asarray(rows)]
        batch: Any = {"image": self._scaled(self.latents[where], where)}
        batch["label"] = self.labels[where]
        return batch | self._features(where, np.zeros(len(where), bool))

    def draw(self, rows: Sequence[int] | np.ndarray, uniforms: np.ndarray) -> Batch:
        """The batch for training: one of both orientations, and log-variances where there are any.

        The latents themselves are drawn on the device (`diffjax.training.posterior`).
        """
        where = self.rows[np.asarray(rows)]
        mirrored = (uniforms < 0.5) & (f"{LATENTS}{FLIPPED}" in self.drawn)
        means = self._chosen(LATENTS, where, mirrored)
        batch: Any = {"image": self._scaled(means, where), "label": self.labels[where]}
        if LOG_VARIANCES in self.drawn:
            found = self._chosen(LOG_VARIANCES, where, mirrored)
            batch[LOG_VARIANCE] = found + 2 * np.log(row(self.scale))
        return batch | self._features(where, mirrored)

    def fingerprint(self) -> str:
        """SHA-256 of the file's size, shape and type, labels, rows, scale, and 256 latents.

        The latents are evenly spaced; an array in memory is hashed as a whole.
        """
        digest = self._described()
        # The stamp of an array in memory is a hash of all of it.
        if isinstance(self.latents, np.memmap):
            for row in self.rows[evenly(len(self.rows))]:
                digest.update(np.ascontiguousarray(self.latents[row]).data)
        return digest.hexdigest()

    def _features(self, where: np.ndarray, mirrored: np.ndarray) -> dict[str, np.ndarray]:
        there = FEATURES in self.drawn
        return {FEATURES: self._chosen(FEATURES, where, mirrored)} if there else {}

    def _chosen(self, name: str, where: np.ndarray, mirrored: np.ndarray) -> np.ndarray:
        """Rows of an array, or where `mirrored` of that of the mirrored images."""
        arrays = {LATENTS: self.latents, **self.drawn}
        out = np.empty((len(where), *arrays[name].shape[1:]), np.float32)
        out[~mirrored] = arrays[name][where[~mirrored]]
        if mirrored.any():
            out[mirrored] = arrays[f"{name}{FLIPPED}"][where[mirrored]]
        return out

    def _scaled(self, rows: np.ndarray, where: np.ndarray) -> np.ndarray:
        images = (np.asarray(rows, np.float32) - row(self.shift)) * row(self.scale)
        finite = np.isfinite(images).all(axis=(1, 2, 3))
        if not finite.all():
            raise UserError(f"latent {where[~finite][0]} holds numbers that are not finite")
        return images

    def _described(self) -> Any:
        how = f"{self.stamp} {self.scale!r} {self.shift!r} {sorted(self.drawn)}\n"
        digest = hashlib.sha256(how.encode())
        digest.update(np.ascontiguousarray(self.labels, "<i4").data)
        digest.update(np.ascontiguousarray(self.rows, "<i8").data)
        return digest


def latents(
    path: str = "",
    num_classes: NotNegative[int] = 1_000,
    scale: Positive[float] = 1.0,
    test_fraction: TestFraction = 0.01,
    split_seed: SplitSeed = 0,
    name: str = "latents",
    codec: Codec | None = None,
    normalisation: str = "none",
    sample: bool = True,
    given: Condition | None = None,
    label_names: str = "",
) -> DataSet:
    """A data set of latents of one shape, from a folder or an `.npz` file.

    A folder has `latents.npy`, float16 or float32 `[N,H,W,C]`, of which only the rows of a batch
    are read, `labels.npy`, integers `[N]`, if there are classes, and `codec.json`, if it is known
    what encoded them (`Codec.record`). `experiments.encode_latents` writes such a folder, with more
    files (`diffjax.autoencoders.encoding`). An `.npz` file has the first two and `codec`, the text
    of `codec.json`; it is read into memory as a whole.

    Args:
        path: the folder or the file.
        num_classes: the number of classes; 0 without labels. A folder that
            `experiments.encode_latents` wrote has its own number.
        scale: the factor of the latents, which brings their standard deviation to about 1: 0.18215
            for unscaled latents of Stable Diffusion 1 and 2, 1 for those of a codec that scales
            them (`codecs.autoencoder_kl`). Samples are divided by it before they are decoded.
        test_fraction: the fraction of latents for testing, in each class as near to it as whole
            latents allow. With 0 the test set is empty, and metrics that need test images are left
            out. Latents of `experiments.encode_latents` are split as the images were.
        split_seed: the seed of the split.
        name: the name in reports.
        codec: what encoded them; pictures and distances are then of decoded images. With None they
            are of the latents as they are.
        normalisation: by the recorded statistics, before `scale`: `none`; `scalar` divides by the
            standard deviation of all elements (Rombach et al. 2022); `channels` subtracts each
            channel's mean and divides by its standard deviation (Karras et al. 2024, with
            `scale=0.5`).
        sample: whether training draws latents from their posteriors, where moments are stored; else
            it takes the means.
        given: the condition of the images, where it is not their classes, such as `Prompts`; its
            arrays lie in the folder, by their names in a batch.
        label_names: the names of the classes, where the folder has none: `imagenet`, or "" for
            their numbers.

    Raises:
        UserError: the files are missing; their arrays have other names, types or shapes, such as
            channels before the pixels (`check_channels_last`); or another codec, or another text
            encoder than that of the condition, encoded them.

    References:
        Rombach et al. 2022, arXiv:2112.10752, appendix G; Karras et al. 2024, arXiv:2312.02696,
        appendix B
    """
    if not path:
        raise UserError(
            "this config needs latents: --config.data.path=FOLDER, written by python -m "
            "experiments.encode_latents, or latents.npy and labels.npy (docs/data.md)"
        )
    facts = _facts(place_of(path))
    text_notes = _check_text(given, place_of(path))
    num_classes = facts.get("num_classes", num_classes)
    further = [] if given is None else [key for key in given.shapes(1) if key != "label"]
    arrays, stamp = _read(place_of(path), bool(num_classes), further)
    array = arrays[LATENTS]
    if array.dtype not in (np.float16, np.float32) or array.ndim != 4:
        raise UserError(
            f"latents in {path} must be float16 or float32 [N,H,W,C], not {array.dtype} "
            f"{array.shape}"
        )
    if not facts:  # Of a shape that is known, it would be a false alarm.
        check_channels_last(array.shape, f"latents in {path}")
    labels = _labels(arrays, path, num_classes)
    height, width, channels = array.shape[1:]
    shift, factor = _normalisation(normalisation, facts, scale, path)
    split = _recorded_split(facts, arrays, path)
    drawn = {key: arrays[key] for key in (*_ALL_LATENTS[1:], *_ALL_FEATURES) if key in arrays}
    if not sample:
        drawn.pop(LOG_VARIANCES, None)

    captions = _captions(place_of(path), len(array)) if further else []

    def source(rows: np.ndarray) -> Source:
        own = LatentSource(array, labels, rows, factor, stamp, shift, drawn)
        if not further:
            return own
        texts = tuple(captions[row] for row in rows) if captions else ()
        return GivenSource(own, {k: _rows(arrays[k], rows) for k in further}, texts)

    train, test = stratified_split(labels, test_fraction, split_seed) if split is None else split
    recorded = _recorded_codec(arrays.get(_CODEC), path)
    data = DataSet(
        name,
        source(train),
        source(test),
        (height, width, channels),
        num_classes,
        label_names=tuple(facts.get("label_names") or _label_names(label_names, num_classes)),
        notes=(*_check_codec(codec, recorded, path), *text_notes),
        codec=Unstated() if codec is None else ScaledLatents(codec, factor, shift),
        given=given,
    )
    _ = data.picture_shape  # Refuses latents of a shape that the codec does not have.
    return data


def latents_in(folder: str) -> ConfigDict:
    """The config of the data in a folder that `experiments.encode_latents` wrote.

    It has their codec and, where captions were encoded, the condition of prompts with its encoder.

    Raises:
        UserError: it is no such folder, or its parts are not diffjax's.

    Example:
        >>> import tempfile
        >>> from diffjax.codecs import SpaceToDepth
        >>> from diffjax.data import digits
        >>> from diffjax.autoencoders.encoding import encode
        >>> with tempfile.TemporaryDirectory() as path:
        ...     _ = encode(digits(), SpaceToDepth(2), path)
        ...     latents_in(path).codec.block
        2
    """
    place = place_of(folder)
    recorded = read_json(place / RECORD)
    if recorded is None:
        raise UserError(
            f"there is no {place / RECORD}: write latents by python -m experiments.encode_latents"
        )
    codec = from_json(json.dumps(recorded.get("spec")))
    text = read_json(place / TEXT)
    given = None if text is None else from_json(json.dumps(text.get("spec")))
    with codec.unlocked():
        return spec(latents, path=folder, codec=codec, given=given)


def _rows(array: np.ndarray, rows: np.ndarray) -> np.ndarray:
    """Rows of an array; those that lie together are not copied, so that they stay on disk."""
    together = len(rows) and rows[-1] - rows[0] + 1 == len(rows)
    return array[rows[0] : rows[-1] + 1] if together else array[rows]


def _labels(arrays: Mapping[str, Any], path: str, num_classes: int) -> np.ndarray:
    """int32 `[N]`; zeros for data without labels.

    Raises:
        UserError: they have another type, number or range.
    """
    number = len(arrays[LATENTS])
    labels = arrays.get(LABELS, np.zeros(number, np.int32))
    if not np.issubdtype(labels.dtype, np.integer) or labels.shape != (number,):
        raise UserError(
            f"labels of {number} latents in {path} must be integers [{number}], not "
            f"{labels.dtype} {labels.shape}"
        )
    if num_classes and len(labels) and not 0 <= labels.min() <= labels.max() < num_classes:
        raise UserError(
            f"labels in {path} go from {labels.min()} to {labels.max()}, not from 0 to "
            f"{num_classes - 1}: set data.num_classes"
        )
    return labels.astype(np.int32)


def _facts(path: Path) -> dict[str, Any]:
    """What `experiments.encode_latents` recorded; empty where it did not write the folder.

    Raises:
        UserError: it has not finished.
    """
    facts = read_json(path / FACTS) if path.is_dir() else None
    if facts is None and (path / UNFINISHED).is_dir():
        raise UserError(
            f"the latents in {path} are not finished: run the same experiments.encode_latents again"
        )
    return facts or {}


def _recorded_split(
    facts: Mapping[str, Any], arrays: Mapping[str, Any], path: str
) -> tuple[np.ndarray, np.ndarray] | None:
    if not facts:
        return None
    numbers: Any = (facts.get("num_train"), facts.get("num_test"))
    number = len(arrays[LATENTS])
    if any(type(n) is not int or n < 0 for n in numbers) or sum(numbers) != number:
        raise UserError(
            f"{FACTS} in {path} has {numbers[0]} training and {numbers[1]} test images, and there "
            f"are {number} latents: encode them again"
        )
    return np.arange(numbers[0]), np.arange(numbers[0], number)


def _normalisation(
    name: str, facts: Mapping[str, Any], scale: float, path: str
) -> tuple[PerChannel, PerChannel]:
    """The shift and the factor of the latents.

    Raises:
        UserError: no such normalisation, or no statistics.
    """
    if name not in NORMALISATIONS:
        raise UserError(
            f"no normalisation of latents is called {name!r}; {nearest(name, NORMALISATIONS)}"
        )
    found = facts.get("statistics", {})

    def statistic(key: str | None, otherwise: float) -> PerChannel:
        if key is None:
            return otherwise
        try:
            numbers = np.asarray(found[key], np.float64)
        except (KeyError, TypeError, ValueError):
            raise UserError(
                f"{path} has no statistics for normalisation={name}: python -m "
                "experiments.encode_latents records them"
            ) from None
        return tuple(numbers.tolist()) if numbers.ndim else float(numbers)

    of_shift, of_scale = NORMALISATIONS[name]
    shift, std = statistic(of_shift, 0.0), statistic(of_scale, 1.0)
    if np.min(std) <= 0:
        raise UserError(f"a channel of the latents in {path} is constant: normalisation=none")
    factor = scale / np.asarray(std)
    return shift, tuple(factor.tolist()) if factor.ndim else float(factor)


def _label_names(called: str, num_classes: int) -> tuple[str, ...]:
    tables = {"": lambda: tuple(map(str, range(num_classes))), "imagenet": imagenet.label_names}
    if called not in tables:
        raise UserError(f"data.label_names={called!r}; {nearest(called, tables)}")
    names = tables[called]()
    if len(names) != num_classes:
        raise UserError(
            f"data.label_names={called!r} are of {len(names)} classes, and there are {num_classes}"
        )
    return names


def _recorded_codec(found: Any, path: str) -> dict[str, str] | None:
    """What is recorded of the codec beside latents; None where nothing is."""
    if found is None:
        return None
    try:
        facts = json.loads(str(found)) if isinstance(found, np.ndarray) else found
        # A file is untrusted, and errors are one line.
        return {key: " ".join(str(facts[key]).split())[:80] for key in ("name", "sha256")}
    except (KeyError, TypeError, ValueError, RecursionError):
        raise UserError(
            f"the codec of the latents in {path} is no JSON with name and sha256: encode them "
            "again, or remove it"
        ) from None


def _check_codec(
    codec: Codec | None, recorded: dict[str, str] | None, path: str
) -> tuple[str, ...]:
    """Refuses a codec that did not encode the latents; returns notes about unknown facts."""
    if codec is None:
        known = "" if recorded is None else f" ({recorded['name']} encoded them)"
        return (
            f"latents in {path} have no data.codec{known}: pictures and metrics are of latents",
        )
    if recorded is None:
        return (f"nothing states what encoded the latents in {path}; {codec.name} decodes them",)
    if recorded["sha256"] != codec.sha256:
        raise UserError(
            f"{recorded['name']} ({recorded['sha256'][:12]}) encoded the latents in {path}, not "
            f"data.codec {codec.name} ({codec.sha256[:12]}): take the codec that encoded them"
        )
    return ()


def _check_text(given: Condition | None, path: Path) -> tuple[str, ...]:
    """Refuses a text encoder that did not encode the captions; returns notes."""
    recorded = read_json(path / TEXT) if path.is_dir() else None
    if recorded is None:
        return ()
    if given is None:
        return (f"the captions in {path} are not used: data.given is not set",)
    needed = getattr(given, "sha256", "")
    if needed and needed != recorded.get("sha256"):
        raise UserError(
            f"a text encoder of sha256 {str(recorded.get('sha256'))[:12]} has read the captions in "
            f"{path}, and data.given is of {needed[:12]}: encode them again elsewhere"
        )
    return ()


def _captions(path: Path, number: int) -> list[str]:
    """The captions in a folder of latents, if there are any."""
    recorded = read_json(path / CAPTIONS) if path.is_dir() else None
    if recorded is None:
        return []
    found = recorded.get("captions")
    if not isinstance(found, list) or len(found) != number or {*map(type, found)} - {str}:
        raise UserError(f"{path / CAPTIONS} is damaged: it has a list of {number} texts")
    return found


def names_of(facts: Mapping[str, Any]) -> list[str]:
    """The names of the arrays of latents that a record of them, `latents.json`, speaks of.

    Example:
        >>> names_of({"kind": "means", "flips": True})
        ['latents', 'latents_flipped']
    """
    names = [LATENTS, LOG_VARIANCES] if facts.get("kind") == "moments" else [LATENTS]
    return names + [f"{name}{FLIPPED}" for name in names if facts.get("flips") is True]


def _read(path: Path, with_labels: bool, further: Sequence[str]) -> tuple[dict[str, Any], str]:
    """The arrays by name, and the stamp of a `LatentSource`."""
    names = [LATENTS, LABELS] if with_labels else [LATENTS]
    names += further
    if path.suffix == ".npz":
        arrays = read_npz(path, str(path))
        if missing := [name for name in names if name not in arrays]:
            raise UserError(f"{path} has no array {missing[0]!r}, only {', '.join(arrays)}")
        digest = hashlib.sha256(np.ascontiguousarray(arrays[LATENTS]).data).hexdigest()
        names += [_CODEC] if _CODEC in arrays else []
        return {name: arrays[name] for name in names}, digest
    others = *_ALL_LATENTS[1:], *_ALL_FEATURES
    recorded = names_of(read_json(path / FACTS) or {}) if path.is_dir() else []
    names += [name for name in others if (path / f"{name}.npy").exists() or name in recorded]
    files = {name: path / f"{name}.npy" for name in names}
    try:
        arrays: dict[str, Any] = {
            # Mapped, so that a header with a wrong size takes no memory; objects are refused.
            name: np.lib.format.open_memmap(file, mode="r")
            for name, file in files.items()
        }
    except FileNotFoundError as error:
        raise UserError(f"there is no {error.filename}: a folder of latents needs it") from None
    except (OSError, ValueError) as error:
        reason = " ".join(str(error).split())[:200]
        raise UserError(f"can't read arrays in {path}: {reason}") from None
    array = arrays[LATENTS]
    for name in _ALL_LATENTS[1:]:
        other = arrays.get(name, array)
        if (other.shape, other.dtype) != (array.shape, array.dtype):
            raise UserError(
                f"{name}.npy in {path} is {other.dtype} {other.shape}, and latents.npy is "
                f"{array.dtype} {array.shape}"
            )
    for name in _ALL_FEATURES:
        other = arrays.get(name)
        if other is not None and (other.ndim != 4 or len(other) != len(array)):
            raise UserError(
                f"{name}.npy in {path} is {list(other.shape)}, and features of {len(array)} images "
                f"are [{len(array)}, rows, columns, numbers]"
            )
    for name in (LOG_VARIANCES, FEATURES):
        if f"{LATENTS}{FLIPPED}" in arrays and name in arrays and f"{name}{FLIPPED}" not in arrays:
            raise UserError(
                f"{path} has {LATENTS}{FLIPPED}.npy and {name}.npy, but no {name}{FLIPPED}.npy of "
                "the mirrored images: store them too, or remove the flipped latents"
            )
    size = files[LATENTS].stat().st_size
    if (recorded := read_json(path / RECORD)) is not None:
        arrays[_CODEC] = recorded
    return arrays, f"{size} {array.shape} {array.dtype}"
