"""Captioned pictures as a pipeline's network sees them: latents and token states, encoded once.

They lie in a folder of their own for each set of pictures, captions, codec, text encoder and
settings, whose name is the hash of these, so that what was encoded otherwise is never used.
`diffjax.autoencoders.encoding` writes the files. After that, codec and text encoder take no memory.
"""

import hashlib
import json
import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar

import jax
import numpy as np

from diffjax.autoencoders.encoding import Stored, encode
from diffjax.codecs import Codec
from diffjax.conditions import Condition, Several
from diffjax.conditions.numbers import Numbers
from diffjax.data import captioned_folder
from diffjax.data.captions import CAPTION
from diffjax.data.folder import BACKGROUND, size_of
from diffjax.data.latents import FACTS, latents
from diffjax.data.sources import Batch, DataSet, Example, Source, SplitSeed, TestFraction
from diffjax.errors import UserError
from diffjax.host.files import place_of
from diffjax.host.lock import locked
from diffjax.host.processes import in_first
from diffjax.host.run_files import read_json
from diffjax.host.storage import make_writable
from diffjax.kinds import AtLeastOne
from diffjax.training.sharding import local_rows

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
    cache: str = CACHE,
    codec: Codec | None = None,
    given: Condition | None = None,
) -> DataSet:
    """A data set of captioned pictures for a network of latents and texts.

    Pictures are encoded when the first of them is needed, and found again in later runs. Where the
    codec has a posterior, its moments are stored, and training draws other latents each time.

    Args:
        path: the folder of pictures and captions (`diffjax.data.captions`).
        image_size: the side of the pictures in pixels.
        caption: of pictures that have none.
        test_fraction: the fraction of pictures for testing; with 0 there are none.
        split_seed: the seed of the split.
        background: the colour behind transparent pixels.
        flips: whether pictures are mirrored at random. Captions with "left" or "right" are then
            wrong.
        cache: the folder of folders of what was encoded.
        codec: of the pipeline.
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
    pictures = captioned_folder(
        path, image_size, test_fraction, split_seed, background=background, caption=caption
    )
    shape = codec.latent_shape(pictures.image_shape)
    given = sized(given, image_size)

    def conditioned(source: Source) -> Source:
        return ConditionedSource(source, given)

    pictures = replace(pictures, train=conditioned(pictures.train), test=conditioned(pictures.test))
    kind = "moments" if codec.stochastic else "means"
    cached = Cached(pictures, codec, given, place_of(cache), Stored(kind, flips))
    return replace(
        pictures,
        train=CachedSource(cached, True),
        test=CachedSource(cached, False),
        image_shape=shape,
        codec=codec,
        given=given,
    )


def sized(given: Condition, image_size: int) -> Condition:
    """The condition of pictures of a size: what it states of a size where nothing else is known."""
    if not isinstance(given, Several):
        return given
    parts = {
        name: replace(
            part, usual=tuple(_numbers(part, (image_size, image_size), image_size, part.usual))
        )
        if isinstance(part, Numbers)
        else part
        for name, part in given.parts.items()
    }
    return replace(given, parts=parts)


def _main(given: Condition) -> Any:
    """The prompts of a condition."""
    return given.parts[given.main] if isinstance(given, Several) else given


def _numbers(
    kind: Numbers, original: tuple[int, int], image_size: int, usual: Sequence[float]
) -> list[float]:
    """What SDXL knows of a picture: original size, corner of the crop after resizing, size.

    Podell et al. 2023 (arXiv:2307.01952), section 2.2.
    """
    scale = image_size / max(min(original), 1)
    top, left = (round((side * scale - image_size) / 2) for side in original)
    known = {
        "original_height": original[0],
        "original_width": original[1],
        "crop_top": top,
        "crop_left": left,
        "height": image_size,
        "width": image_size,
    }
    return [float(known.get(n, x)) for n, x in zip(kind.names, usual, strict=True)]


@dataclass(frozen=True, eq=False, repr=False)
class ConditionedSource(Source):
    """Captioned pictures with the condition that a pipeline's network takes.

    Args:
        pictures: a `CaptionedSource` of a folder.
        condition: prompts, alone or beside the numbers of a picture's size.
    """

    pictures: Any
    condition: Condition

    def __len__(self) -> int:
        return len(self.pictures)

    def __getitem__(self, index: int) -> Example:
        return self.pictures[index]

    def gather(self, rows: Sequence[int] | np.ndarray) -> Batch:
        batch: Any = self.pictures.gather(rows)
        captions = batch.pop(CAPTION).tolist()
        kind = self.condition
        if isinstance(kind, Several):
            captions = [
                {kind.main: text, **self._size(kind, int(row))}
                for text, row in zip(captions, rows, strict=True)
            ]
        return batch | kind.arrays(kind.parse(captions))

    def fingerprint(self) -> str:
        """SHA-256 of the pictures' and captions' fingerprint."""
        return self.pictures.fingerprint()

    def _size(self, kind: Several, row: int) -> dict[str, Any]:
        folder = self.pictures.pictures
        original = size_of(folder.root / folder.files[row])
        return {
            name: _numbers(part, original, folder.image_size, part.usual)
            for name, part in kind.parts.items()
            if isinstance(part, Numbers)
        }


@dataclass(frozen=True, eq=False)
class Cached:
    """The latents and token states of pictures, encoded when they are first needed.

    Attributes:
        pictures: of `ConditionedSource`s.
        codec: what encodes the pictures.
        condition: what encodes the captions.
        cache: the folder of folders.
        stored: what is stored of each picture.
    """

    pictures: DataSet
    codec: Codec
    condition: Condition
    cache: Path
    stored: Stored

    @cached_property
    def key(self) -> str:
        """A hash of all that latents and token states depend on."""
        facts = {
            "train": self.pictures.train.fingerprint(),
            "test": self.pictures.test.fingerprint(),
            "codec": self.codec.sha256,
            "texts": _main(self.condition).encoder.sha256,
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
        in_first(lambda: make_writable(folder))
        part = jax.process_index(), jax.process_count()
        with locked(folder, "written", "--config.data.cache"):
            encode(self.pictures, self.codec, folder, self.stored, place=local_rows(), part=part)
        self.codec.release()
        self.condition.release()


@dataclass(frozen=True, eq=False, repr=False)
class CachedSource(Source):
    """The training or the test pictures of `Cached`, as latents."""

    pixels: ClassVar[bool] = False
    cached: Cached
    train: bool

    @property
    def _whole(self) -> DataSet:
        return self.cached.pictures

    def __len__(self) -> int:
        return len(self._whole.train if self.train else self._whole.test)

    def __getitem__(self, index: int) -> Example:
        return self._latents[index]

    def gather(self, rows: Sequence[int] | np.ndarray) -> Batch:
        return self._latents.gather(rows)

    def draw(self, rows: Sequence[int] | np.ndarray, uniforms: np.ndarray) -> Batch:
        return self._latents.draw(rows, uniforms)

    def fingerprint(self) -> str:
        """A hash of pictures, captions, codec, text encoder and settings, and of which half."""
        return hashlib.sha256(f"{self.cached.key} {self.train}".encode()).hexdigest()

    @property
    def _latents(self) -> Source:
        encoded = self.cached.encoded
        return encoded.train if self.train else encoded.test
