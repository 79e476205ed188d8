"""What the headers of image files say: sizes, transparency, depth."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, NamedTuple, cast

import numpy as np
from PIL import Image, ImageFile, TiffImagePlugin

from diffjax.data.fingerprints import evenly

# Pillow chooses a decoder by the content, not by the name, and would start Ghostscript for EPS.
# JPEG includes the files of some cameras (MPO), and PPM includes PGM.
FORMATS = ("BMP", "GIF", "JPEG", "PNG", "PPM", "TIFF", "WEBP")
_PNG_DEPTH = 24  # the position of the bit depth in a PNG file, in bytes
_ORIENTATION, _ON_ITS_SIDE = 274, (5, 6, 7, 8)  # the tag of cameras, and values for such pictures
_BITS_PER_SAMPLE = 258  # the tag of the bit depth in a TIFF file
_MOST = 64
"""The largest side that is proposed: a network of pixels of larger images takes days."""
_STEP = 8
"""Networks halve an image up to three times."""


class Header(NamedTuple):
    """Height and width in pixels, upright; whether pixels may be transparent; bits per channel."""

    height: int
    width: int
    transparent: bool
    bits: int


def header_of(file: Path) -> Header:
    """The header of an image; its sides are 0 where it can't be read."""
    try:
        with Image.open(file, formats=FORMATS) as image:
            transparent, bits = image.has_transparency_data, bits_of(image)
            # This decodes a PNG, whose tags may lie behind its pixels.
            turned = image.getexif().get(_ORIENTATION, 1) in _ON_ITS_SIDE
            width, height = reversed(image.size) if turned else image.size
            return Header(height, width, transparent, bits)
    # As in `read_image`.
    except Exception:
        return Header(0, 0, False, 8)


def size_of(file: Path) -> tuple[int, int]:
    """Height and width in pixels, upright; 0 where it can't be read."""
    return header_of(file)[:2]


def bits_of(image: ImageFile.ImageFile) -> int:
    """Bits per channel as stored in the file; Pillow reduces deeper colours to 8 silently."""
    if isinstance(image, TiffImagePlugin.TiffImageFile):
        return max(image.tag_v2.get(_BITS_PER_SAMPLE, (1,)))
    if image.format == "PNG":
        stream = cast(BinaryIO, image.fp)
        here = stream.tell()
        stream.seek(_PNG_DEPTH)
        depth = stream.read(1)[0]
        stream.seek(here)
        return depth
    if image.format == "PPM" and isinstance(args := image.tile[0].args, tuple):
        _, *most = args
        return max([1, *most]).bit_length()
    return 8


@dataclass(frozen=True, eq=False)
class Headers:
    """The headers of some images of a folder, those that could be read.

    Attributes:
        sides: heights and widths, int `[n, 2]`.
        num_transparent: how many of them have transparent pixels, or might.
        num_deep: how many have more than 8 bits per channel.
    """

    sides: np.ndarray
    num_transparent: int
    num_deep: int

    @classmethod
    def of(cls, root: Path, files: Sequence[str]) -> "Headers":
        """Those of at most 256 images, evenly spaced."""
        looked_at = [header_of(root / files[int(row)]) for row in evenly(len(files))]
        found = [header for header in looked_at if header.height and header.width]
        sides = np.array([header[:2] for header in found], int).reshape(-1, 2)
        deep = sum(header.bits > 8 for header in found)
        return cls(sides, sum(header.transparent for header in found), deep)

    @property
    def shorter(self) -> np.ndarray:
        """The shorter side of each image."""
        return self.sides.min(axis=1)

    @property
    def usual_side(self) -> int:
        """Nine images of ten have no shorter side than this."""
        return int(np.quantile(self.shorter, 0.1, method="lower"))

    @property
    def suited_size(self) -> int:
        """The side of square images that suits them: a multiple of 8, and no more than 64.

        Nine of ten are then not enlarged.

        Example:
            >>> Headers(np.array([[30, 40], [100, 28]] * 9), 0, 0).suited_size
            24
        """
        if not len(self.sides):
            return _MOST
        return min(max(self.usual_side // _STEP * _STEP, _STEP), _MOST)

    def facts(self, image_size: int, background: str, step: int) -> dict[str, str]:
        """What was seen, and what becomes of it, in words.

        Args:
            image_size: the side of the square that images become.
            background: the colour behind transparent pixels.
            step: the step of the sizes of buckets; 0 without them.
        """
        if not len(self.sides):
            return {}
        low, high = (
            "×".join(map(str, sides)) for sides in (self.sides.min(axis=0), self.sides.max(axis=0))
        )
        size = low if low == high else f"{low} to {high}"
        usual = f"9 of 10 have sides of at least {self.usual_side}"
        why = (
            f"{usual}; a multiple of {_STEP}, at most {_MOST}"
            if image_size == self.suited_size
            else f"{usual}; {self.suited_size} suits them"
        )
        facts = {
            "sizes": f"{size} pixels (height×width) in {len(self.sides):,} looked at",
            "image_size": f"{image_size}: {why}",
        }
        kept = float(np.mean(self.shorter / self.sides.max(axis=1)))
        if kept < 1 and step:
            facts["shape"] = f"as nearly their own as buckets={step} has it; tests are of squares"
        elif kept < 1:
            facts["shape"] = (
                f"the central square, {kept:.0%} of an image in the mean; buckets={_STEP} keeps "
                "their shape"
            )
        if self.num_transparent:
            facts["transparency"] = f"{self.num_transparent:,} of them: laid over {background}"
        if self.num_deep:
            facts["depth"] = f"{self.num_deep:,} of them have over 8 bits per channel"
        return facts
