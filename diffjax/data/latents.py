"""Data sets of latents: arrays that a codec computed from images, read on demand."""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from diffjax.codecs import Codec, ScaledLatents, Unstated
from diffjax.codecs.base import RECORD
from diffjax.data import imagenet
from diffjax.data.archives import read_npz
from diffjax.data.fingerprints import evenly
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

_LATENTS, _LABELS, _CODEC = "latents", "labels", "codec"


@dataclass(frozen=True, eq=False, repr=False)
class LatentSource(Source):
    """A source of rows of an array that may be larger than memory, multiplied by `scale`.

    Args:
        latents: float `[N,H,W,C]`; it may be a memory map.
        labels: int32 `[N]`.
        rows: the rows of this source, in increasing order.
        scale: the factor of the latents.
        stamp: for an array in memory its hash, for a memory map its size, shape and type.

    Example:
        >>> latents = np.ones((3, 4, 4, 2), np.float16)
        >>> source = LatentSource(latents, np.arange(3, dtype=np.int32), np.array([0, 2]), 0.5, "")
        >>> len(source), source[1]["label"], source.gather([0])["image"].max().item()
        (2, 2, 0.5)
    """

    latents: np.ndarray
    labels: np.ndarray
    rows: np.ndarray
    scale: float
    stamp: str

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> Example:
        batch = self.gather([index])
        return {"image": batch["image"][0], "label": int(batch["label"][0])}

    def gather(self, rows: Sequence[int] | np.ndarray) -> Batch:
        """The latents at `rows`, as float32.

        Raises:
            UserError: a latent contains a number that is not finite.
        """
        where = self.rows[np.asarray(rows)]
        images = np.asarray(self.latents[where], np.float32) * np.float32(self.scale)
        finite = np.isfinite(images).all(axis=(1, 2, 3))
        if not finite.all():
            raise UserError(f"latent {where[~finite][0]} holds numbers that are not finite")
        return {"image": images, "label": self.labels[where]}

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

    def _described(self) -> Any:
        digest = hashlib.sha256(f"{self.stamp} {self.scale!r}\n".encode())
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
    label_names: str = "",
) -> DataSet:
    """A data set of latents of one shape, from a folder or an `.npz` file.

    A folder has `latents.npy`, float16 or float32 `[N,H,W,C]`, of which only the rows of a batch
    are read, `labels.npy`, integers `[N]`, if there are classes, and `codec.json`, if it is known
    what encoded them (`Codec.record`). An `.npz` file has the same, `codec` as the text of that
    file, and is read into memory as a whole.

    Args:
        path: the folder or the file.
        num_classes: the number of classes; 0 without labels.
        scale: the factor of the latents, which brings their standard deviation to about 1: 0.18215
            for unscaled latents of Stable Diffusion 1 and 2, 1 for those of a codec that scales
            them (`codecs.autoencoder_kl`). Samples are divided by it before they are decoded.
        test_fraction: the fraction of latents for testing, in each class as near to it as whole
            latents allow. With 0 there are none, and no metrics that need test images.
        split_seed: the seed of the split.
        name: the name in reports.
        codec: what encoded them; pictures and distances are then of decoded images. With None they
            are of the latents as they are.
        label_names: of the classes: `imagenet`, or "" for their numbers.

    Raises:
        UserError: the files are missing; their arrays have other names, types or shapes, such as
            channels before the pixels (`check_channels_last`); or another codec encoded them.
    """
    if not path:
        raise UserError(
            "this config needs latents: --config.data.path=FOLDER with latents.npy and labels.npy, "
            "or an .npz of the two (docs/data.md)"
        )
    arrays, stamp = _read(place_of(path), bool(num_classes))
    array = arrays[_LATENTS]
    if array.dtype not in (np.float16, np.float32) or array.ndim != 4:
        raise UserError(
            f"latents in {path} must be float16 or float32 [N,H,W,C], not {array.dtype} "
            f"{array.shape}"
        )
    check_channels_last(array.shape, f"latents in {path}")
    labels = arrays.get(_LABELS, np.zeros(len(array), np.int32))
    if not np.issubdtype(labels.dtype, np.integer) or labels.shape != array.shape[:1]:
        raise UserError(
            f"labels of {len(array)} latents in {path} must be integers [{len(array)}], not "
            f"{labels.dtype} {labels.shape}"
        )
    if num_classes and len(labels) and not 0 <= labels.min() <= labels.max() < num_classes:
        raise UserError(
            f"labels in {path} go from {labels.min()} to {labels.max()}, not from 0 to "
            f"{num_classes - 1}: set data.num_classes"
        )
    labels = labels.astype(np.int32)
    height, width, channels = array.shape[1:]
    train, test = (
        LatentSource(array, labels, rows, scale, stamp)
        for rows in stratified_split(labels, test_fraction, split_seed)
    )
    recorded = _recorded_codec(arrays.get(_CODEC), path)
    data = DataSet(
        name,
        train,
        test,
        (height, width, channels),
        num_classes,
        label_names=_label_names(label_names, num_classes),
        notes=_check_codec(codec, recorded, path),
        codec=Unstated() if codec is None else ScaledLatents(codec, scale),
    )
    _ = data.picture_shape  # Refuses latents of a shape that the codec does not have.
    return data


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


def _read(path: Path, with_labels: bool) -> tuple[dict[str, Any], str]:
    """The arrays by name, and the stamp of a `LatentSource`."""
    names = [_LATENTS, _LABELS] if with_labels else [_LATENTS]
    if path.suffix == ".npz":
        arrays = read_npz(path, str(path))
        if missing := [name for name in names if name not in arrays]:
            raise UserError(f"{path} has no array {missing[0]!r}, only {', '.join(arrays)}")
        digest = hashlib.sha256(np.ascontiguousarray(arrays[_LATENTS]).data).hexdigest()
        names += [_CODEC] if _CODEC in arrays else []
        return {name: arrays[name] for name in names}, digest
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
    array = arrays[_LATENTS]
    size = files[_LATENTS].stat().st_size
    if (recorded := read_json(path / RECORD)) is not None:
        arrays[_CODEC] = recorded
    return arrays, f"{size} {array.shape} {array.dtype}"
