"""Saves grids of images as PNG, and trajectories of samples as a film strip and animation."""

import io
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from diffjax.errors import UserError
from diffjax.host.files import write_whole
from diffjax.sampling.sample import Trace

_MIN_IMAGE_PIXELS = 48
_GAP_PIXELS = 2
_GAP_VALUE = 128
_BAND_PIXELS, _NAME_SIZE = 16, 11  # above the columns, and of the letters in it


def image_grid(images: Any, columns: int) -> np.ndarray:
    """Arranges images in a grid; small images are magnified by an integer factor.

    Images whose longer side is below 48 pixels are magnified by repeating pixels. A grey line of 2
    pixels separates neighbours, and the rest of the last row is grey.

    Args:
        images: `[N, H, W, C]`, float in [-1, 1] or uint8; C is 1 (grey) or 3 (RGB). Two channels
            are shown side by side in grey; of four or more, the first three are shown as RGB.
        columns: images per row.

    Returns:
        uint8 `[rows·(H·k + 2) − 2, columns·(W·k + 2) − 2, C]` with the factor `k`; for two
        channels, C is 1 and W is doubled.

    Raises:
        UserError: the images have another shape, or the array is empty.

    Example:
        >>> image_grid(np.zeros((5, 8, 8, 1), np.float32), columns=3).shape
        (98, 148, 1)
    """
    images = np.asarray(images)
    if images.ndim != 4 or not images.size:
        raise UserError(
            f"a picture needs at least one image of shape [H, W, C], not an array of shape "
            f"{list(images.shape)}"
        )
    scale = math.ceil(_MIN_IMAGE_PIXELS / max(images.shape[1:3]))
    images = _seen(images)
    images = images.repeat(scale, axis=1).repeat(scale, axis=2)
    number, height, width, channels = images.shape
    rows = math.ceil(number / columns)
    pitch = (height + _GAP_PIXELS, width + _GAP_PIXELS)
    grid = np.full((rows * pitch[0], columns * pitch[1], channels), _GAP_VALUE, np.uint8)
    for index, image in enumerate(images):
        top, left = index // columns * pitch[0], index % columns * pitch[1]
        grid[top : top + height, left : left + width] = image
    return grid[:-_GAP_PIXELS, :-_GAP_PIXELS]


def _seen(images: np.ndarray) -> np.ndarray:
    """Images as they are shown: uint8, of one channel or three."""
    if images.shape[-1] == 2:
        images = np.concatenate([images[..., :1], images[..., 1:]], axis=2)
    images = images[..., :3]
    if images.dtype == np.uint8:
        return images
    return np.rint((np.clip(np.nan_to_num(images), -1, 1) + 1) * 127.5).astype(np.uint8)


def _beside(left: np.ndarray, right: np.ndarray) -> np.ndarray:
    """Pairs of images in turn; the left ones get the size of the right ones by nearest pixels."""
    left, right = _seen(left), _seen(right)
    rows, columns = (
        np.arange(wanted) * found // wanted
        for wanted, found in zip(right.shape[1:3], left.shape[1:3], strict=True)
    )
    left = left[:, rows][:, :, columns]
    channels = max(left.shape[-1], right.shape[-1])
    pair = [each.repeat(channels // each.shape[-1], axis=-1) for each in (left, right)]
    return np.stack(pair, axis=1).reshape(-1, *pair[1].shape[1:])


def columns_by_class(num_images: int, num_classes: int) -> int:
    """Number of columns of a nearly square grid, with one class per column if the classes fit.

    Labels are 0 … num_classes − 1 in turn, so a column has one class if the number of columns is
    a multiple of `num_classes`. At most 5/4 of a square's side fit.

    Example:
        >>> [columns_by_class(64, num_classes) for num_classes in (0, 2, 3, 5, 10, 1000)]
        [8, 8, 9, 10, 10, 8]
    """
    side = math.ceil(math.sqrt(num_images))
    if not 1 <= num_classes <= most_classes(num_images):
        return side
    return num_classes * max(1, round(side / num_classes))


def most_classes(num_images: int) -> int:
    """Largest number of classes that have their own columns in a nearly square grid.

    Example:
        >>> most_classes(64)
        10
    """
    return max(1, math.ceil(math.sqrt(num_images)) * 5 // 4)


def captions(titles: Sequence[str] | None, columns: int) -> tuple[str, ...]:
    """The title of each column, or of each image if those of a column differ in it.

    Example:
        >>> captions(["cat", "dog", "cat", "dog", "cat"], 2)
        ('cat', 'dog')
        >>> captions(["cat", "dog", "cat"], 3), captions(None, 3)
        (('cat', 'dog', 'cat'), ())
    """
    titles = tuple(titles or ())
    alike = all(title == titles[i % columns] for i, title in enumerate(titles))
    return titles[:columns] if len(titles) >= columns and alike else titles


def save_png(
    path: str | Path,
    images: Any,
    columns: int | None = None,
    names: Sequence[str] = (),
    beside: Any = None,
) -> Path:
    """Writes images as one PNG in the layout of `image_grid`, atomically.

    Args:
        path: the path of the file; its folder is created if it does not exist.
        images: as in `image_grid`.
        columns: images per row; None makes the grid square.
        names: the names of the columns, or of the images, written above them in a band of 16
            pixels.
        beside: images `[N, h, w, c]`, each of which is shown to the left of its own, at its size.

    Returns:
        `path`.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    columns = columns or columns_by_class(len(images), 0)
    images, each = np.asarray(images), 1
    if beside is not None:
        images, each = _beside(np.asarray(beside), images), 2
    grid = image_grid(images, each * columns)
    if names:
        grid = _with_bands(grid, names, columns)
    picture = Image.fromarray(grid[..., 0] if grid.shape[-1] == 1 else grid)
    file = io.BytesIO()
    picture.save(file, format="PNG", optimize=True)
    write_whole(path, file.getvalue())
    return path


def _with_bands(grid: np.ndarray, names: Sequence[str], columns: int) -> np.ndarray:
    """A grid with the names above its columns, or above the images of each row."""
    rows = math.ceil(len(names) / columns)
    parts = []
    for row, below in enumerate(np.array_split(grid, _row_starts(grid, rows))):
        here = [*names[row * columns : (row + 1) * columns], *[""] * columns][:columns]
        band = _band(here, grid.shape[1])[..., None].repeat(grid.shape[2], axis=2)
        parts += [band, below]
    return np.concatenate(parts)


def _row_starts(grid: np.ndarray, rows: int) -> list[int]:
    """Where all rows but the first begin in a grid of so many."""
    pitch = (len(grid) + _GAP_PIXELS) // rows
    return [row * pitch for row in range(1, rows)]


def _band(names: Sequence[str], width: int) -> np.ndarray:
    """Draws names above equal columns, uint8 `[16, width]`; long names are shortened."""
    font = ImageFont.load_default(size=_NAME_SIZE)
    band = Image.new("L", (width, _BAND_PIXELS), 255)
    draw = ImageDraw.Draw(band)
    pitch = (width + _GAP_PIXELS) // len(names)
    for column, name in enumerate(names):
        text = name
        while text and font.getlength(text) > pitch - 3 * _GAP_PIXELS:
            text = text.removesuffix("…")[:-1] + "…" if text != "…" else ""
        middle = column * pitch + (pitch - _GAP_PIXELS) / 2, _BAND_PIXELS / 2
        draw.text(middle, text, fill=0, font=font, anchor="mm")
    return np.asarray(band)


def save_film(path: str | Path, trace: Trace) -> Path:
    """Writes trajectories of samples as a film strip (PNG) and as an animation (GIF).

    Each sample has two rows, with noise on the left: `x`, and below it the predicted x0.

    Args:
        path: the path of the strip, `.png`; the animation has the same name with `.gif`.
        trace: trajectories of a few samples.

    Returns:
        The path of the animation.
    """
    x, x0 = np.asarray(trace.x), np.asarray(trace.x0)
    x0 = np.concatenate([x0, x[-1:]])  # at the end both are the sample
    rows = np.stack([x, x0], axis=1).transpose(2, 1, 0, *range(3, x.ndim + 1))
    path = save_png(path, np.clip(rows, -1, 1).reshape(-1, *x.shape[2:]), columns=len(x))
    frames = []
    for both in np.stack([x, x0], axis=2):
        grid = image_grid(np.clip(both, -1, 1).reshape(-1, *x.shape[2:]), columns=2)
        frames.append(Image.fromarray(grid[..., 0] if grid.shape[-1] == 1 else grid))
    durations = [80] * (len(frames) - 1) + [1500]
    gif = path.with_suffix(".gif")
    frames[0].save(gif, save_all=True, append_images=frames[1:], duration=durations, loop=0)
    return gif
