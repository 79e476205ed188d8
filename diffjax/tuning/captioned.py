"""Captioned pictures as latents and token states, which are encoded once and cached.

The name of the cache's folder contains a hash of pictures, captions, codec, text encoder and
settings, so a change of any of them encodes anew. `diffjax.autoencoders.encoding` writes the files.
Afterwards codec and text encoder take no memory.
"""

import hashlib
import json
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from diffjax.autoencoders.encoding import Stored, encode
from diffjax.codecs import Codec
from diffjax.conditions import Condition, Several
from diffjax.conditions.numbers import Numbers
from diffjax.data import captioned_folder
from diffjax.data.image_folders.buckets import BucketedSource, bucket_of, bucket_sizes
from diffjax.data.image_folders.folder import BACKGROUND, FolderSource
from diffjax.data.image_folders.headers import size_of
from diffjax.data.latents import FACTS, latents
from diffjax.data.sources import Batch, DataSet, Example, Source, SplitSeed, TestFraction
from diffjax.errors import UserError
from diffjax.host.files import place_of
from diffjax.host.lock import locked
from diffjax.host.processes import in_first
from diffjax.host.run_files import read_json
from diffjax.host.storage import make_writable
from diffjax.kinds import AtLeastOne, NotNegative
from diffjax.training.sharding import local_rows
from diffjax.tuning.prior import Prior, PriorSource

CACHE = "~/.cache/diffjax/latents"
_LOG = logging.getLogger("diffjax")


def captioned_latents(
    path: str = "",
    image_size: AtLeastOne[int] = 512,
    caption: str = "",
    test_fraction: TestFraction = 0.0,
    split_seed: SplitSeed = 0,
    background: str = BACKGROUND,
    flips: bool = False,
    buckets: NotNegative[int] = 0,
    dtype: str = "float16",
    cache: str = CACHE,
    prior: Prior | None = None,
    codec: Codec | None = None,
    given: Condition | None = None,
) -> DataSet:
    """A data set of captioned pictures for a network of latents and texts.

    Pictures are encoded when the first of them is needed, and reused in later runs. If the codec
    has a posterior, its moments are stored, and training draws new latents at each use.

    Args:
        path: the folder of pictures and captions (`diffjax.data.image_folders.captions`).
        image_size: the side of the pictures in pixels.
        caption: the caption of pictures that have none.
        test_fraction: the fraction of pictures for testing; with 0 there are none.
        split_seed: the seed of the split.
        background: the colour behind transparent pixels.
        flips: whether pictures are mirrored at random. Captions with "left" or "right" are then
            wrong.
        buckets: the step of sizes of buckets in pixels, 64 in SDXL: pictures keep their aspect
            ratio as nearly as a bucket has it, and each batch is of one; 0 for squares alone.
        dtype: the type of what is stored, "float16" or "float32".
        cache: the folder of all caches.
        prior: pictures of the class of a subject, which training draws too.
        codec: the codec of the pipeline.
        given: the condition of the pipeline: prompts, perhaps with the numbers of a picture's size.

    Raises:
        UserError: as `captioned_folder`; the size does not divide; there is no codec or condition,
            as in a config that begins with no pipeline.
    """
    if codec is None or given is None:
        raise UserError(
            "this config tunes a pipeline: --config.init_from=FOLDER, as diffusers saves it"
        )
    if not path:
        raise UserError("this config needs pictures with captions: --config.data.path=FOLDER")
    pictures = captioned_folder(path, image_size, 3, test_fraction, split_seed, background, caption)
    shape, place = codec.latent_shape(pictures.image_shape), place_of(cache)
    given = sized(given, image_size)
    kind = "moments" if codec.stochastic else "means"
    stored = Stored(kind, flips, dtype, text=main_of(given))
    stored.check(codec)
    cached = Cached(pictures, codec, given, place, stored)
    around: Callable[[Cached], Source] = _alone
    if prior is not None and (prior.prompt or prior.path):
        around = partial(_with_class, prior.pictures(image_size, place), prior.weight)
    if buckets:
        train = _in_buckets(cached, bucket_sizes(image_size, buckets), around)
    else:
        train = around(cached)
    test = CachedSource(cached, False)
    return replace(
        pictures,
        train=train,
        test=test,
        image_shape=shape,
        real=CachedSource(cached, True),
        codec=codec,
        given=given,
    )


def _alone(subject: "Cached") -> Source:
    return CachedSource(subject, True)


def _with_class(of_class: DataSet, weight: float, subject: "Cached") -> Source:
    """Training pictures with those of the class, which are cropped to the same size."""
    folder: Any = subject.pictures.train
    train: Any = replace(of_class.train, image_size=folder.image_size)  # pyright: ignore
    shape = subject.pictures.image_shape
    pictures = replace(of_class, train=train, test=_none_of(train), image_shape=shape)
    return PriorSource(_alone(subject), _alone(replace(subject, pictures=pictures)), weight)


def _none_of(folder: FolderSource) -> FolderSource:
    return replace(folder, files=(), labels=folder.labels[:0], captions=())


def _in_buckets(
    squares: "Cached",
    sizes: Sequence[tuple[int, int]],
    around: Callable[["Cached"], Source],
) -> BucketedSource:
    """The training pictures in the sizes of buckets, without those that have no picture."""
    folder: Any = squares.pictures.train
    which = np.array([bucket_of(size_of(folder.root / file), sizes) for file in folder.files])
    sources, shapes = [], []
    for number in np.unique(which):
        rows = np.flatnonzero(which == number)
        size = sizes[number]
        own = replace(
            folder,
            files=tuple(folder.files[row] for row in rows),
            labels=folder.labels[rows],
            captions=tuple(folder.captions[row] for row in rows),
            image_size=size,
        )
        shape = (*size, 3)
        pictures = replace(squares.pictures, train=own, test=_none_of(own), image_shape=shape)
        sources.append(around(replace(squares, pictures=pictures)))
        shapes.append(squares.codec.latent_shape((*size, 3)))
    return BucketedSource(tuple(sources), tuple(shapes))


def main_of(given: Condition) -> Any:
    """The prompts of a condition."""
    return given.parts[given.main] if isinstance(given, Several) else given


def sized(given: Condition, image_size: int) -> Condition:
    """The condition of pictures of a size: what it states of a size where nothing else is known."""
    if not isinstance(given, Several):
        return given

    def changed(part: Condition) -> Condition:
        if not isinstance(part, Numbers):
            return part
        square = image_size, image_size
        return replace(part, usual=tuple(_numbers(part, square, square)))

    return replace(given, parts={name: changed(part) for name, part in given.parts.items()})


def _numbers(kind: Numbers, original: tuple[int, int], size: tuple[int, int]) -> list[float]:
    """SDXL's size condition of a picture: original size, corner of the crop, size.

    Podell et al. 2023 (arXiv:2307.01952), section 2.2.
    """
    scale = max(side / max(of, 1) for side, of in zip(size, original, strict=True))
    top, left = (round((of * scale - side) / 2) for side, of in zip(size, original, strict=True))
    known = {
        "original_height": original[0],
        "original_width": original[1],
        "crop_top": top,
        "crop_left": left,
        "height": size[0],
        "width": size[1],
    }
    return [float(known.get(n, x)) for n, x in zip(kind.names, kind.usual, strict=True)]


@dataclass(frozen=True, eq=False, repr=False)
class SizedSource(Source):
    """Pictures of a folder with the numbers of their sizes, as arrays of a batch.

    Args:
        pictures: a `FolderSource`.
        condition: which of them a network takes.
    """

    pictures: FolderSource
    condition: Several

    def __len__(self) -> int:
        return len(self.pictures)

    def __getitem__(self, index: int) -> Example:
        return self.pictures[index]

    @property
    def captions(self) -> Sequence[str]:  # pyright: ignore[reportIncompatibleVariableOverride]
        return self.pictures.captions

    def gather(self, rows: Sequence[int] | np.ndarray) -> Batch:
        batch: Any = self.pictures.gather(rows)
        folder, wanted = self.pictures, self.pictures.image_size
        wanted = (wanted, wanted) if isinstance(wanted, int) else wanted
        sizes = [size_of(folder.root / folder.files[int(row)]) for row in rows]
        for part in self.condition.parts.values():
            if isinstance(part, Numbers):
                numbers = [_numbers(part, size, wanted) for size in sizes]
                batch[part.name] = np.asarray(numbers, np.float32)
        return batch

    def fingerprint(self) -> str:
        """SHA-256 of the pictures' and captions' fingerprint."""
        return self.pictures.fingerprint()


@dataclass(frozen=True, eq=False)
class Cached:
    """The latents and token states of pictures, encoded when they are first needed.

    Attributes:
        pictures: with captions.
        codec: what encodes the pictures.
        condition: the condition of the pictures.
        cache: the folder of folders.
        stored: what is stored of each picture, with the prompts that encode captions.
    """

    pictures: DataSet
    codec: Codec
    condition: Condition
    cache: Path
    stored: Stored

    @cached_property
    def key(self) -> str:
        """A hash of all that latents and token states depend on."""
        text: Any = self.stored.text
        facts = {
            "train": self.pictures.train.fingerprint(),
            "test": self.pictures.test.fingerprint(),
            "codec": self.codec.sha256,
            "texts": text.encoder.sha256,
            "stored": [self.stored.kind, self.stored.flips, self.stored.dtype],
        }
        return hashlib.sha256(json.dumps(facts).encode()).hexdigest()

    @cached_property
    def encoded(self) -> DataSet:
        """The latents, from the cache or encoded now.

        Raises:
            UserError: a picture is damaged, or the folder can't be written.
        """
        folder = self.cache / f"{self.pictures.name}-{self.key[:16]}"
        if read_json(folder / FACTS) is None:
            self._encode(folder)
        return latents(str(folder), codec=self.codec, given=self.condition)

    def _encode(self, folder: Path) -> None:
        number = len(self.pictures.train) + len(self.pictures.test)
        _LOG.info("encoding %d pictures and their captions to %s", number, folder)
        pictures, kind = self.pictures, self.condition
        if isinstance(kind, Several):
            train, test = (SizedSource(x, kind) for x in (pictures.train, pictures.test))  # pyright: ignore
            pictures = replace(pictures, train=train, test=test)
        in_first(lambda: make_writable(folder))
        with locked(folder, "written", "--config.data.cache"):
            encode(pictures, self.codec, folder, self.stored, place=local_rows())
        self.codec.release()
        self.condition.release()


@dataclass(frozen=True, eq=False, repr=False)
class CachedSource(Source):
    """The training or the test pictures of `Cached`, as latents."""

    pixels: ClassVar[bool] = False
    cached: Cached
    train: bool

    @property
    def captions(self) -> Sequence[str]:  # pyright: ignore[reportIncompatibleVariableOverride]
        return self._of(self.cached.pictures).captions

    def __len__(self) -> int:
        return len(self._of(self.cached.pictures))

    def __getitem__(self, index: int) -> Example:
        return self._of(self.cached.encoded)[index]

    def gather(self, rows: Sequence[int] | np.ndarray) -> Batch:
        return self._of(self.cached.encoded).gather(rows)

    def draw(self, rows: Sequence[int] | np.ndarray, uniforms: np.ndarray) -> Batch:
        return self._of(self.cached.encoded).draw(rows, uniforms)

    def fingerprint(self) -> str:
        """A hash of pictures, captions, codec, text encoder and settings, and of which half."""
        return hashlib.sha256(f"{self.cached.key} {self.train}".encode()).hexdigest()

    def _of(self, dataset: DataSet) -> Source:
        return dataset.train if self.train else dataset.test
