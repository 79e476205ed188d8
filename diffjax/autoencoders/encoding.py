"""Writes the latents of a data set once, shard by shard, so that a stop loses at most one shard.

    FOLDER/latents.npy            [N, h, w, c]: means or samples; training images first
    FOLDER/log_variances.npy      [N, h, w, c], of moments
    FOLDER/latents_flipped.npy    the same of the mirrored images, with flips; and their variances
    FOLDER/features.npy           [N, rows, columns, numbers] of the images, for REPA
    FOLDER/labels.npy, …          what else the data have for each image, such as token states
    FOLDER/text_states.npy, …     states, mask and pooled vector of captions, by a text encoder
    FOLDER/captions.json          the captions themselves, in the same order
    FOLDER/text.json              the hash and settings of the text encoder
    FOLDER/codec.json             the name, hash and settings of the codec
    FOLDER/latents.json           the data, what is stored, and the statistics of each channel

Until all is there, the arrays lie in `FOLDER/unfinished`, with a record of each finished shard.
"""

import json
import logging
import math
import os
import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import NamedSharding

from diffjax.codecs import Codec
from diffjax.codecs.base import images_at_once
from diffjax.compiling import jit
from diffjax.data.features import feature_shape
from diffjax.data.latents import (
    CAPTIONS,
    FACTS,
    FEATURES,
    FLIPPED,
    LABELS,
    LATENTS,
    LOG_VARIANCES,
    TEXT,
    UNFINISHED,
    names_of,
)
from diffjax.data.pipeline import batch_at
from diffjax.data.sources import DataSet, Source
from diffjax.errors import UserError, nearest
from diffjax.host.files import clear_unfinished, write_json
from diffjax.host.processes import all_agree, in_first, part_of_processes
from diffjax.host.run_files import read_json
from diffjax.host.storage import StorageError, cause, make_writable
from diffjax.spec import as_spec, to_json
from diffjax.text import Prompts

_ENCODING, _SHARDS = "encoding.json", "shards"
_FORMAT = 1
_OF_WRITING = ("shard_images",)  # Changes nothing of what is written.
# Threads that read a batch each, and batches that are kept ready.
_READING = (4, 8)
_LOG = logging.getLogger("diffjax")


def _means(codec: Codec, params: Any, images: Any, keys: Any) -> dict[str, Any]:
    del keys
    return {LATENTS: codec.encode(params, images)}


def _samples(codec: Codec, params: Any, images: Any, keys: Any) -> dict[str, Any]:
    return {LATENTS: codec.posterior(params, images).samples(keys)}


def _moments(codec: Codec, params: Any, images: Any, keys: Any) -> dict[str, Any]:
    del keys
    posterior = codec.posterior(params, images)
    return {LATENTS: posterior.mean, LOG_VARIANCES: posterior.log_variance}


KINDS: Mapping[str, Callable[..., dict[str, Any]]] = {
    "means": _means,
    "samples": _samples,
    "moments": _moments,
}
"""What can be stored of a posterior. A codec without one has "means" alone, its latents."""


@dataclass(frozen=True)
class Stored:
    """What is stored of each image.

    Attributes:
        kind: a name of `KINDS`: the mean of the posterior, one sample of it, or mean and logarithm
            of the variance, so that training draws another sample each time.
        flips: whether latents of the mirrored images are stored too; training takes one of the two
            at random. Mirrored latents are not the latents of mirrored images.
        dtype: "float16" or "float32". float16 rounds by 0.05 %, which is little beside the
            posterior's deviation, and halves the file.
        seed: the seed of samples.
        shard_images: images of a shard, which is encoded again if it was not finished.
        extractor: what returns features `[B, rows, columns, numbers]` of images, which are stored
            beside the latents (`diffjax.evaluation.extractors.dinov2.dinov2_patches`); None for
            nothing.
        text: the condition of prompts, whose encoder reads the captions of the images
            (`diffjax.text.prompts`); None where there are none.
    """

    kind: str = "means"
    flips: bool = False
    dtype: str = "float16"
    seed: int = 0
    shard_images: int = 4_096
    extractor: Any = None
    text: Prompts | None = None

    def check(self, codec: Codec) -> None:
        """Refuses what a codec can't do.

        Raises:
            UserError: no such kind or type; the codec has no posterior.
        """
        if self.kind not in KINDS:
            raise UserError(
                f"no kind of latents is called {self.kind!r}; {nearest(self.kind, KINDS)}"
            )
        if self.dtype not in ("float16", "float32"):
            raise UserError(f"latents are float16 or float32, not {self.dtype!r}")
        if KINDS[self.kind] is not _means and not codec.stochastic:
            raise UserError(
                f"{codec.name} has no posterior to store {self.kind} of: its latents are the "
                "kind means"
            )
        if self.text is not None and not hasattr(self.text.encoder, "sha256"):
            raise UserError(
                "a text encoder in memory can't be recorded with the states: read it from its "
                "folder, by diffjax.text.read_text_encoder"
            )


def encode(
    dataset: DataSet,
    codec: Codec,
    folder: str | Path,
    stored: Stored = Stored(),
    *,
    batch_size: int = 0,
    place: NamedSharding | None = None,
) -> bool:
    """Writes the latents of a data set's images, for `diffjax.data.latents`.

    Called again with the same arguments it goes on after the last finished shard. Memory holds some
    batches, however large the data set is. With several processes, process p of P encodes every
    P-th shard; on a restart there may be another number of them.

    Args:
        dataset: a data set of images.
        codec: what encodes them.
        folder: where to write; it may be new, or hold a part of the same latents.
        stored: what is stored of each image.
        batch_size: images that are encoded together; 0 for about a million pixels on each device.
        place: how a batch lies on devices of this process, by rows; None for one device.

    Returns:
        Whether there was anything left to do.

    Raises:
        UserError: the data are latents or pairs, the codec does not fit, or the folder holds other
            latents; a damaged image when it is read.
        StorageError: the folder can't be written any more; finished shards are kept.

    Example:
        >>> import tempfile
        >>> from diffjax.codecs import SpaceToDepth
        >>> from diffjax.data import digits, latents
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     _ = encode(digits(), SpaceToDepth(2), folder)
        ...     data = latents(folder, codec=SpaceToDepth(2))
        ...     len(data.train), data.image_shape, data.num_classes
        (1438, (4, 4, 4), 10)
    """
    folder = Path(folder)
    facts = _facts(dataset, codec, stored)
    finished = read_json(folder / FACTS)
    if finished is not None:
        _check_same(finished, {k: x for k, x in facts.items() if k not in _OF_WRITING}, folder)
        _check_whole(folder, finished)
        shutil.rmtree(folder / UNFINISHED, ignore_errors=True)
        return False
    job = _Job(dataset, codec, folder, stored, facts["latent_shape"], batch_size, place)
    in_first(lambda: job.begin(facts))
    try:
        job.write(part_of_processes())
    except OSError as error:
        reason = cause(error)
        if reason is None:
            raise
        raise StorageError(
            f"{folder} can't be written any more: {reason}; the finished shards are kept: make "
            "room, and run the same command to go on"
        ) from error
    all_agree(True)  # All processes have written their shards.
    in_first(lambda: job.finish(facts))
    return True


def _check_whole(folder: Path, finished: Mapping[str, Any]) -> None:
    """Refuses a finished folder whose files were deleted."""
    files = [folder / "codec.json", *(folder / f"{name}.npy" for name in names_of(finished))]
    for file in files:
        try:
            if file.suffix == ".npy":
                np.lib.format.open_memmap(file, mode="r")
            elif not file.is_file():
                raise ValueError("it is not there")
        except (OSError, ValueError) as error:
            reason = getattr(error, "strerror", None) or error
            raise UserError(
                f"{file} was finished and can't be read any more ({reason}): restore it, or encode "
                "again in another folder"
            ) from error


@dataclass(frozen=True, eq=False)
class _Job:
    """The latents of one data set in one folder; the attributes are arguments of `encode`."""

    dataset: DataSet
    codec: Codec
    folder: Path
    stored: Stored
    latent_shape: Sequence[int]
    batch_size: int
    place: NamedSharding | None

    @property
    def work(self) -> Path:
        return self.folder / UNFINISHED

    @property
    def rows(self) -> tuple[int, int]:
        """The numbers of training and of test images."""
        return len(self.dataset.train), len(self.dataset.test)

    def begin(self, facts: Mapping[str, Any]) -> None:
        """Makes the empty arrays, or finds those of an unfinished encoding.

        Raises:
            UserError: the folder holds something else, or has no room.
        """
        make_writable(self.folder)
        begun = read_json(self.work / _ENCODING)
        if begun is None and (self.folder / f"{LATENTS}.npy").exists():
            raise UserError(
                f"{self.folder} has a {LATENTS}.npy of another origin: choose another folder"
            )
        _check_same(begun, facts, self.folder)
        clear_unfinished(self.folder)
        (self.work / _SHARDS).mkdir(parents=True, exist_ok=True)
        clear_unfinished(self.work / _SHARDS)
        arrays = {
            name: like
            for name, like in self.arrays().items()
            # Those that were moved already lie in the folder itself.
            if not self._file(name).exists() and not (self.folder / f"{name}.npy").exists()
        }
        size = sum(math.prod(like.shape) * like.dtype.itemsize for like in arrays.values())
        free = shutil.disk_usage(self.folder).free
        if size > free:
            raise UserError(
                f"the latents take {size / 1e9:.1f} GB, and {self.folder} has room for "
                f"{free / 1e9:.1f} GB: choose another folder"
            )
        for record in (self.work / _SHARDS).glob("*.json") if arrays else ():
            record.unlink()  # An array is missing, so nothing counts as finished.
        write_json(self.work / _ENCODING, facts)
        for name, like in arrays.items():
            scratch = self.work / f"{name}.new"
            np.lib.format.open_memmap(scratch, "w+", like.dtype, like.shape).flush()
            os.replace(scratch, self._file(name))

    def arrays(self) -> dict[str, jax.ShapeDtypeStruct]:
        """All arrays by name."""
        number = sum(self.rows)
        latents = jax.ShapeDtypeStruct((number, *self.latent_shape), np.dtype(self.stored.dtype))
        names = names_of(vars(self.stored))
        features = self._feature_shapes(number)
        source = next(each for each in (self.dataset.train, self.dataset.test) if len(each))
        given = _given(batch_at(source, np.arange(1)))
        return (
            dict.fromkeys(names, latents)
            | features
            | self._text_shapes(number)
            | {
                name: jax.ShapeDtypeStruct((number, *rows.shape[1:]), rows.dtype)
                for name, rows in given.items()
            }
        )

    def _feature_shapes(self, number: int) -> dict[str, jax.ShapeDtypeStruct]:
        if self.stored.extractor is None:
            return {}
        names = [FEATURES, f"{FEATURES}{FLIPPED}"] if self.stored.flips else [FEATURES]
        shape = number, *feature_shape(self.stored.extractor, self.dataset)
        return dict.fromkeys(names, jax.ShapeDtypeStruct(shape, np.dtype(self.stored.dtype)))

    def _text_shapes(self, number: int) -> dict[str, jax.ShapeDtypeStruct]:
        text, kind = self.stored.text, np.dtype(self.stored.dtype)
        return {
            name: jax.ShapeDtypeStruct(rows.shape, kind if rows.dtype == np.float32 else rows.dtype)
            for name, rows in (text.shapes(number) if text else {}).items()
        }

    def shards(self) -> list[range]:
        """The rows of each shard; none has both training and test images."""
        num_train, num_test = self.rows
        size = self.stored.shard_images
        return [
            range(first, min(first + size, end))
            for begin, end in ((0, num_train), (num_train, num_train + num_test))
            for first in range(begin, end, size)
        ]

    def write(self, part: tuple[int, int]) -> None:
        """Encodes the shards of this process that are not finished."""
        shards = self.shards()
        mine = [i for i in range(part[0], len(shards), part[1]) if not self._shard(i).exists()]
        found, total = len(shards) - len(mine), sum(self.rows)
        if found and part[1] == 1:
            _LOG.info("going on: %d of %d shards are there", found, len(shards))
        size = self._batch_size()
        pieces = [
            (i, shards[i][first : first + size])
            for i in mine
            for first in range(0, len(shards[i]), size)
        ]
        if not pieces:
            return
        with ExitStack() as stack:
            files = {
                name: stack.enter_context(self._file(name).open("r+b")) for name in self.arrays()
            }
            sums, begun, done = _Sums.zero(self.latent_shape[-1]), time.monotonic(), 0
            for (i, rows), batch in zip(pieces, self._encoded(pieces, size), strict=True):
                self._put(files, rows, batch)
                sums = sums.plus(batch)
                done += len(rows)
                if rows[-1] != shards[i][-1]:
                    continue
                for file in files.values():
                    file.flush()
                    os.fsync(file.fileno())  # The record must not be there before the latents.
                trained = shards[i].start < self.rows[0]
                write_json(self._shard(i), asdict(sums) if trained else {})
                sums = _Sums.zero(self.latent_shape[-1])
                speed = done / (time.monotonic() - begun)
                left = sum(len(shards[j]) for j in mine) - done
                _LOG.info(
                    "shard %d of %d: images to %s of %s, %.3g a second, %s left",
                    i + 1, len(shards), f"{shards[i].stop:,}", f"{total:,}", speed,
                    _duration(left / speed),
                )  # fmt: skip

    def finish(self, facts: Mapping[str, Any]) -> None:
        """Moves the arrays to their place and writes the records; the last one is `FACTS`."""
        num_shards = len(self.shards())
        records = [read_json(self._shard(i)) for i in range(num_shards)]
        missing = [i + 1 for i, record in enumerate(records) if record is None]
        if missing:
            raise UserError(
                f"{len(missing)} of {num_shards} shards in {self.folder} are not finished, such as "
                f"{missing[0]}: run the same command again"
            )
        sums = _Sums.zero(self.latent_shape[-1])
        for record in records:
            sums = sums.and_(_Sums(**record)) if record else sums
        for name in self.arrays():
            if self._file(name).exists():
                os.replace(self._file(name), self.folder / f"{name}.npy")
        self.codec.record(self.folder)
        if self.stored.text is not None:
            write_json(self.folder / CAPTIONS, {"captions": captions_of(self.dataset)})
            write_json(self.folder / TEXT, recorded_text(self.stored.text))
        kept = {name: x for name, x in facts.items() if name not in _OF_WRITING}
        write_json(self.folder / FACTS, {**kept, "statistics": sums.statistics()})
        shutil.rmtree(self.work, ignore_errors=True)

    def _batch_size(self) -> int:
        devices = 1 if self.place is None else self.place.num_devices
        wanted = self.batch_size or images_at_once(self.dataset.image_shape) * devices
        return -(-min(wanted, self.stored.shard_images) // devices) * devices

    def _encoded(
        self, pieces: Sequence[tuple[int, Sequence[int]]], size: int
    ) -> Iterator[dict[str, np.ndarray]]:
        """The arrays of each piece; the next one is computed meanwhile."""
        # Grain takes half a second to import.
        import grain

        def read(i: int) -> Any:
            return self._read(np.asarray(pieces[i][1]))

        reading = grain.MapDataset.range(len(pieces)).map(read)
        before: Any = None
        for (_, rows), batch in zip(
            pieces, reading.to_iter_dataset(grain.ReadOptions(*_READING)), strict=True
        ):
            given = _given(batch) | self._texts(rows)
            now = len(rows), given, self._on_device(batch["image"], rows, size)
            if before is not None:
                yield self._on_host(*before)
            before = now
        if before is not None:
            yield self._on_host(*before)

    def _read(self, rows: np.ndarray) -> Any:
        num_train = self.rows[0]
        of_train = rows[0] < num_train
        source: Source = self.dataset.train if of_train else self.dataset.test
        return batch_at(source, rows if of_train else rows - num_train)

    def _texts(self, rows: Sequence[int]) -> dict[str, np.ndarray]:
        """The states of the captions of images."""
        text = self.stored.text
        if text is None:
            return {}
        captions = captions_of(self.dataset)
        with np.errstate(over="ignore"):  # Infinities are refused, with the image.
            arrays = text.arrays(text.parse([captions[row] for row in rows]))
            kinds = self._text_shapes(len(rows))
            return {name: np.asarray(x, kinds[name].dtype) for name, x in arrays.items()}

    def _on_device(self, images: np.ndarray, rows: Sequence[int], size: int) -> dict[str, Any]:
        filled = np.minimum(np.arange(size), len(images) - 1)  # All batches have one shape.
        where = np.asarray(rows)[filled].astype(np.int32)
        both = [("", images)] + [(FLIPPED, images[:, :, ::-1])] * self.stored.flips
        params = self.codec.params_on(self.place)
        encoded = {}
        for flipped, (suffix, some) in enumerate(both):
            placed = jax.device_put((some[filled], where), self.place)
            key = jax.random.fold_in(jax.random.key(self.stored.seed), flipped)
            made = _program()(self.codec, self.stored.kind, params, *placed, key)
            encoded |= {f"{name}{suffix}": rows for name, rows in made.items()}
            if self.stored.extractor is not None:
                encoded[f"{FEATURES}{suffix}"] = self.stored.extractor.features(some)
        return encoded

    def _on_host(self, count: int, given: Mapping[str, Any], made: Any) -> dict[str, np.ndarray]:
        with np.errstate(over="ignore"):  # Infinities are refused, with the image.
            encoded = {
                name: np.asarray(rows)[:count].astype(self.stored.dtype)
                for name, rows in made.items()
            }
        return {**given, **encoded}

    def _put(self, files: Mapping[str, Any], rows: Sequence[int], batch: Mapping[str, Any]) -> None:
        """Writes a batch to its place in the files.

        Raises:
            UserError: a latent is not finite.
        """
        made = dict.fromkeys(names_of(vars(self.stored)), "the latent")
        made |= {f"{FEATURES}{suffix}": "the features" for suffix in ("", FLIPPED)}
        made |= dict.fromkeys(self._text_shapes(1), "the state of the caption")
        for name, file in files.items():
            array = np.ascontiguousarray(batch[name])
            if name in made:
                finite = np.isfinite(array).reshape(len(array), -1).all(1)
                if not finite.all():
                    what = made[name]
                    raise UserError(
                        f"{what} of image {rows[int(np.argmin(finite))]} is not finite in "
                        f"{self.stored.dtype}"
                        + ("; float32 may hold it" if self.stored.dtype == "float16" else "")
                    )
            begin = np.lib.format.open_memmap(self._file(name), mode="r").offset
            file.seek(begin + rows[0] * (array.nbytes // len(array)))
            file.write(array.data)

    def _file(self, name: str) -> Path:
        return self.work / f"{name}.npy"

    def _shard(self, i: int) -> Path:
        return self.work / _SHARDS / f"{i:06d}.json"


@dataclass(frozen=True)
class _Sums:
    """Sums over latents of each channel, for their mean and variance.

    Attributes:
        count: elements of a channel.
        sum: the sum of each channel.
        square: sums of squares, where latents are drawn the expected ones.
    """

    count: int
    sum: list[float]
    square: list[float]

    @classmethod
    def zero(cls, channels: int) -> "_Sums":
        return cls(0, [0.0] * channels, [0.0] * channels)

    def and_(self, other: "_Sums") -> "_Sums":
        return _Sums(
            self.count + other.count,
            [x + y for x, y in zip(self.sum, other.sum, strict=True)],
            [x + y for x, y in zip(self.square, other.square, strict=True)],
        )

    def plus(self, batch: Mapping[str, np.ndarray]) -> "_Sums":
        """With the latents of a batch, of both orientations."""
        new = self
        for suffix in ("", FLIPPED):
            if f"{LATENTS}{suffix}" not in batch:
                continue
            z = batch[f"{LATENTS}{suffix}"].astype(np.float64)
            square = np.square(z)
            if f"{LOG_VARIANCES}{suffix}" in batch:
                square = square + np.exp(batch[f"{LOG_VARIANCES}{suffix}"].astype(np.float64))
            axes = (0, 1, 2)
            one = _Sums(math.prod(z.shape[:3]), z.sum(axes).tolist(), square.sum(axes).tolist())
            new = new.and_(one)
        return new

    def statistics(self) -> dict[str, Any]:
        """Mean and standard deviation of each channel, and the deviation of all elements."""
        if not self.count:
            return {}
        mean, square = np.array(self.sum) / self.count, np.array(self.square) / self.count
        return {
            "mean": mean.tolist(),
            "std": np.sqrt(np.maximum(square - mean**2, 0.0)).tolist(),
            "scalar_std": float(np.sqrt(max(square.mean() - mean.mean() ** 2, 0.0))),
        }


def _facts(dataset: DataSet, codec: Codec, stored: Stored) -> dict[str, Any]:
    """What the folder records, and what a second call is compared with.

    Raises:
        UserError: these data can't be encoded by this codec.
    """
    stored.check(codec)
    if not dataset.codec.pixels:
        raise UserError(f"{dataset.name} are latents already, not images")
    shape = codec.latent_shape(dataset.image_shape)
    if not len(dataset.train) + len(dataset.test):
        raise UserError(f"{dataset.name} has no images")
    for source in (dataset.train, dataset.test):
        if len(source) and "source" in source.gather([0]):
            raise UserError(f"{dataset.name} has pairs of images; latents of pairs are not stored")
    _ = codec.params  # Read, or refused.
    extractor, text, features = stored.extractor, stored.text, {}
    if text is not None:
        _check_captions(dataset)
        features = {"text_sha256": text.encoder.sha256}
    if extractor is not None:
        _ = feature_shape(extractor, dataset)
        features |= {"features": extractor.name, "features_sha256": extractor.sha256}
    return {
        "format": _FORMAT,
        "data": dataset.name,
        "train_sha256": dataset.train.fingerprint(),
        "test_sha256": dataset.test.fingerprint(),
        "num_train": len(dataset.train),
        "num_test": len(dataset.test),
        "num_classes": dataset.num_classes,
        "label_names": list(dataset.label_names),
        "codec": codec.name,
        "codec_sha256": codec.sha256,
        "latent_shape": list(shape),
        **{name: x for name, x in vars(stored).items() if name not in ("extractor", "text")},
        **features,
    }


def captions_of(dataset: DataSet) -> list[str]:
    """The captions of all images, those for training first."""
    return [*dataset.train.captions, *dataset.test.captions]


def _check_captions(dataset: DataSet) -> None:
    number, found = len(dataset.train) + len(dataset.test), len(captions_of(dataset))
    if number != found:
        raise UserError(
            f"{dataset.name} has {found} captions of {number} images: a text encoder reads the "
            "captions of data such as diffjax.data.captioned_folder"
        )


def recorded_text(text: Prompts) -> dict[str, Any]:
    """What a folder of latents records of its text encoder."""
    sha256 = text.encoder.sha256
    spec_of_text = as_spec(replace(text, sha256=sha256))
    return {"sha256": sha256, "spec": json.loads(to_json(spec_of_text))}


def _check_same(found: Mapping[str, Any] | None, facts: Mapping[str, Any], folder: Path) -> None:
    """Refuses a folder of other latents.

    Raises:
        UserError: with the first thing that differs.
    """
    # As JSON, which has no tuples.
    for name, value in json.loads(json.dumps(facts)).items():
        if found is not None and found.get(name) != value:
            there, here = (" ".join(str(x).split())[:70] for x in (found.get(name), value))
            raise UserError(
                f"{folder} holds latents of {name}={there}, not {here}: choose another folder"
            )


def _given(batch: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """What a batch has besides images, by the names of files."""
    return {
        LABELS if name == "label" else name: rows for name, rows in batch.items() if name != "image"
    }


@cache
def _program() -> Any:
    def encoded(
        codec: Codec, kind: str, params: Any, images: Any, rows: Any, key: Any
    ) -> dict[str, Any]:
        keys = jax.vmap(lambda i: jax.random.fold_in(key, i))(rows)
        return KINDS[kind](codec, params, images, keys)

    return jit(encoded, static_argnums=(0, 1))


def _duration(seconds: float) -> str:
    """A duration in words.

    Example:
        >>> _duration(50), _duration(600), _duration(10_000)
        ('50 s', '10 min', '2.8 h')
    """
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7_200 else f"{seconds / 3_600:.1f} h"
