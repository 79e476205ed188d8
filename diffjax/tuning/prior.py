"""Prior preservation: pictures of the class of a subject, beside those of the subject itself.

A network that is tuned on "a photo of sks dog" alone draws every dog as that one. Training on
pictures of "a photo of a dog" that it drew itself before keeps what it knows.

Ruiz et al., "DreamBooth: Fine Tuning Text-to-Image Diffusion Models for Subject-Driven Generation",
2022, arXiv:2208.12242, section 3.2
"""

import hashlib
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import jax
import numpy as np
from PIL import Image

from diffjax.data import to_uint8
from diffjax.data.image_folders.captions import captioned_folder
from diffjax.data.sources import Batch, DataSet, Example, Source
from diffjax.errors import UserError
from diffjax.exchange.pretrained import from_pretrained
from diffjax.host.files import place_of
from diffjax.host.processes import all_agree, is_first
from diffjax.host.storage import make_writable
from diffjax.kinds import AtLeastOne, Positive

_LOG = logging.getLogger("diffjax")


@dataclass(frozen=True)
class Prior:
    """Pictures of a class: those in a folder, or else drawn by the pipeline before it is tuned.

    Attributes:
        prompt: the prompt of the class, such as "a photo of a dog"; "" for no prior preservation.
        path: the folder of pictures, whose captions, if there are any, count in place of the
            prompt; "" for pictures that the pipeline draws.
        num_images: how many it draws; about 100 for each picture of the subject, or 200 in all.
        weight: the weight of their mean loss beside that of the subject's pictures, 1 in the paper.
        pipeline: the folder of the pipeline.
    """

    prompt: str = ""
    path: str = ""
    num_images: AtLeastOne[int] = 200
    weight: Positive[float] = 1.0
    pipeline: str = ""

    def pictures(self, image_size: int, cache: Path) -> DataSet:
        """The pictures with their captions; drawn, unless they are there.

        Args:
            image_size: the side of the pictures in pixels.
            cache: the folder of folders for those that are drawn.

        Raises:
            UserError: as `captioned_folder`, and as `from_pretrained`.
        """
        folder = place_of(self.path) if self.path else self._drawn(image_size, cache)
        return captioned_folder(str(folder), image_size, test_fraction=0.0, caption=self.prompt)

    def _drawn(self, image_size: int, cache: Path) -> Path:
        how = repr((self.prompt, str(place_of(self.pipeline).resolve()), image_size))
        folder = cache / f"class-{hashlib.sha256(how.encode()).hexdigest()[:16]}"
        missing = [i for i in range(self.num_images) if not (folder / _name(i)).exists()]
        if missing:
            _LOG.info("drawing %d pictures of %r to %s", len(missing), self.prompt, folder)
            model = from_pretrained(self.pipeline, image_size=image_size)
            make_writable(folder)
            at_once = 4 * jax.device_count()
            for first in range(0, len(missing), at_once):
                rows = missing[first : first + at_once]
                # The seed is that of the first, so that a stop changes no picture of the others.
                images = model.sample([self.prompt] * len(rows), seed=rows[0], batch_size=at_once)
                for row, image in zip(rows, images, strict=True):
                    if is_first():
                        Image.fromarray(to_uint8(image)).save(folder / _name(row))
            all_agree(True)  # All processes go on when the pictures are there.
        return folder


def _name(i: int) -> str:
    return f"{i:06d}.png"


@dataclass(frozen=True, eq=False, repr=False)
class PriorSource(Source):
    """Pictures of a subject, in whose place training draws pictures of its class at random.

    With the probability `w/(1 + w)`, so that the expected loss is, but for the factor 1/(1 + w),

        L = E[loss of the subject] + w·E[loss of the class]

    Args:
        subject: its pictures, alone those of `gather`.
        prior: those of the class, each as likely as the others.
        weight: w.

    Example:
        >>> from diffjax.data import ArraySource
        >>> def of(value, n):
        ...     return ArraySource(
        ...         np.full((n, 1, 1, 1), value, np.uint8), np.zeros(n, np.int32)
        ...     )
        >>> source = PriorSource(of(1, 3), of(2, 100), weight=1.0)
        >>> source.draw([0, 1, 2], np.array([0.1, 0.7, 0.49]))["image"].ravel().tolist()
        [2, 1, 2]
    """

    pixels: ClassVar[bool] = False
    subject: Source
    prior: Source
    weight: float

    def __post_init__(self) -> None:
        if not len(self.prior):
            raise UserError("there are no pictures of the class")

    def __len__(self) -> int:
        return len(self.subject)

    def __getitem__(self, index: int) -> Example:
        return self.subject[index]

    @property
    def captions(self) -> Sequence[str]:  # pyright: ignore[reportIncompatibleVariableOverride]
        return self.subject.captions

    def gather(self, rows: Sequence[int] | np.ndarray) -> Batch:
        return self.subject.gather(rows)

    def draw(self, rows: Sequence[int] | np.ndarray, uniforms: np.ndarray) -> Batch:
        share, number = self.weight / (1.0 + self.weight), len(self.prior)
        of_class = uniforms < share
        # What is left of a uniform number is another one.
        place = np.where(of_class, uniforms / share * number, 0.0)
        chosen = np.minimum(place.astype(int), number - 1)
        rest = np.where(of_class, place - chosen, (uniforms - share) / (1.0 - share))
        one: Any = self.subject.draw(np.asarray(rows), rest)
        other: Any = self.prior.draw(chosen, rest)

        def either(name: str) -> np.ndarray:
            where = of_class.reshape(-1, *(1,) * (one[name].ndim - 1))
            return np.where(where, other[name], one[name])

        return {name: either(name) for name in one}  # pyright: ignore[reportReturnType]

    def fingerprint(self) -> str:
        """SHA-256 of the fingerprints of both, and of the weight."""
        facts = f"{self.subject.fingerprint()} {self.prior.fingerprint()} {self.weight!r}"
        return hashlib.sha256(facts.encode()).hexdigest()
