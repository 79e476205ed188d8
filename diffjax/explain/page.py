"""Writes the page that explains a run, self-contained, for a reader without mathematics."""

import base64
import io
from collections.abc import Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from jinja2 import Environment, StrictUndefined
from markupsafe import Markup
from PIL import Image

from diffjax.errors import UserError
from diffjax.evaluation.tables import duration, number, three_digits
from diffjax.explain.drawing import draw_network, plain
from diffjax.explain.facts import Facts, gathered
from diffjax.explain.levels import NUM_LEVELS
from diffjax.explain.network_parts import Part
from diffjax.host.files import place_of, write_whole
from diffjax.host.progress import progress
from diffjax.host.run_files import read_json, read_metrics
from diffjax.host.storage import make_writable
from diffjax.process.precond import Meaning
from diffjax.reports import plots
from diffjax.reports.pictures import image_grid

PAGE = "explain.html"
"""The name of the page in the folder of a run."""
MINUS = "\N{MINUS SIGN}"
_LARGEST_PNG = 40  # pixels of the longer side; larger pictures are lossy, or noise takes megabytes
_QUALITY = 80
_GAP = 1 / 8  # between pictures, of their width
_NEAR = 0.5  # of the distance of training pictures: pictures of one step are nearly their mean
_ROWS = 4  # of samples of each condition on the dial

KINDS = {
    "transformer": "A transformer cuts the picture into squares, and lets all squares exchange "
    "what they have found, again and again.",
    "U-Net": "A U-Net makes the picture smaller and smaller, to see the whole, and then larger "
    "again, to draw the details: down and up, like the letter U.",
    "network": "It is a chain of simple calculations.",
}
PARTS = {
    "conditioning": "turns the noise level, and the class if there is one, into numbers that all "
    "other parts receive",
    "patch": "cuts the picture into small squares and turns each into a list of numbers",
    "block": "lets all squares exchange what they have found (this is called attention), and then "
    "works on each of them",
    "conv": "looks at each pixel together with its neighbours",
    "down": "looks for shapes while the picture gets smaller",
    "halve": "makes the picture half as wide and half as high",
    "middle": "works on the smallest picture, where every place sees all others",
    "up": "builds the large picture again from the small one, and from what the way down had found",
    "double": "makes the picture twice as wide and twice as high",
    "final": "turns the numbers back into a picture",
}
"""What parts do, by the beginning of their names."""


def write_explanation(
    workdir: str | Path,
    out: str | Path | None = None,
    *,
    weights: str | None = None,
    data_path: str | None = None,
    num_steps: int = NUM_LEVELS,
    allowed_packages: tuple[str, ...] = ("diffjax",),
) -> Path:
    """Writes the page of a run.

    Args:
        workdir: the folder of the run.
        out: the file; by default `explain.html` in the run's folder.
        weights: `live` or the name of an average.
        data_path: where the data lie now, if they have moved.
        num_steps: the number of steps of the long way back.
        allowed_packages: whose callables the saved config may name.

    Returns:
        The path of the page.

    Raises:
        UserError: no trained run there, or the page can't be written.
    """
    workdir = place_of(str(workdir))
    if not workdir.is_dir():
        raise UserError(f"there is no run in {workdir}: python -m experiments.train makes one")
    path = workdir / PAGE if out is None else place_of(str(out))
    if path.is_dir():
        raise UserError(f"{path} is a folder: name a file in it, as {path / PAGE}")
    make_writable(path.parent)
    facts = gathered(
        workdir,
        weights=weights,
        data_path=data_path,
        num_steps=num_steps,
        allowed_packages=allowed_packages,
    )
    with progress("writing the page"):
        write_whole(path, page(facts))
    return path


def page(facts: Facts) -> str:
    """The page as HTML; equal facts and files of the run make equal pages."""
    environment = Environment(
        autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters |= {
        "number": number,
        "share": lambda x: f"{100 * x:.0f} %",
        "three": three_digits,
        "two": lambda x: f"{x:.2f}".replace("-", MINUS),
        "five": lambda x: f"{x:.5f}".replace("-", MINUS),
        "apart": apart,
        "signed": lambda x: f"{'+' if x >= 0 else MINUS} {abs(x):.2f}",
        "listed": listed,
        "row": row,
    }
    folder = resources.files("diffjax.explain").joinpath("templates")
    source = folder.joinpath("explain.html.jinja").read_text(encoding="utf-8")
    script = folder.joinpath("explain.js").read_text(encoding="utf-8")
    return environment.from_string(source).render(_content(facts) | {"script": Markup(script)})


def _content(facts: Facts) -> dict[str, Any]:
    run, config = facts.run, facts.run.config
    record = read_json(run.workdir / "run.json") or {}
    records = read_metrics(run.workdir / "metrics.jsonl")
    losses = [entry["loss"] for entry in records if "loss" in entry]
    height, width, channels = facts.picture_shape
    return {
        "facts": facts,
        "run": {
            "name": run.workdir.resolve().name,
            "step": run.step,
            "num_steps": config.num_steps,
            "batch_size": config.batch_size,
            "weights": config.weights,
            "own_steps": run.recipe.num_steps,
            "num_params": run.parts.wired.num_params,
            "seconds": duration(record.get("train_seconds")),
            "device": record.get("device", ""),
            "shape": f"{width} × {height}",
            "numbers": height * width * channels,
            "channels": channels,
            "dropped": 0.0 if not facts.kind else _rate(run.parts.wired.condition_dropout),
        },
        "few": facts.meaning is not Meaning.POSTERIOR_MEAN,
        "loss_curve": Markup(plots.loss_curve(records)),
        "losses": (losses[0], losses[-1]) if len(losses) > 1 else None,
        "num_levels": NUM_LEVELS,
        "levels": _levels(facts),
        "lesson": _lesson(facts),
        "way": _way(facts),
        "means": _means(facts),
        "dial": _dial(facts),
        "network": _network(facts),
        "latents": _latents(facts),
    }


def _rate(rate: Any) -> float:
    return float(max(rate.values())) if isinstance(rate, Mapping) else float(rate)


def picture(images: np.ndarray, columns: int) -> dict[str, Any]:
    """A grid of images for an `<img>`: PNG, or WebP where pictures are large.

    Args:
        images: `[n, H, W, C]` in [-1, 1].
        columns: images per row.

    Example:
        >>> found = picture(np.zeros((2, 8, 8, 1)), 2)
        >>> found["width"], found["height"], found["source"][:22]
        (102, 48, 'data:image/png;base64,')
    """
    tiles = [image_grid(one[None], 1) for one in images]
    height, width, channels = tiles[0].shape
    rows, gap = -(-len(tiles) // columns), round(_GAP * width)
    shape = rows * (height + gap) - gap, columns * (width + gap) - gap
    grid = np.zeros((*shape, channels + 1), np.uint8)  # Between them it is transparent.
    for i, tile in enumerate(tiles):
        top, left = i // columns * (height + gap), i % columns * (width + gap)
        grid[top : top + height, left : left + width] = np.pad(
            tile, ((0, 0), (0, 0), (0, 1)), constant_values=255
        )
    image, file = Image.fromarray(grid, "LA" if channels == 1 else "RGBA"), io.BytesIO()
    kind = "png" if max(images.shape[1:3]) <= _LARGEST_PNG else "webp"
    image.save(file, kind, optimize=True, quality=_QUALITY)
    data = base64.b64encode(file.getvalue()).decode("ascii")
    return {
        "source": f"data:image/{kind};base64,{data}",
        "width": image.width,
        "height": image.height,
    }


def row(images: np.ndarray) -> dict[str, Any]:
    """Images side by side."""
    return picture(images, len(images))


def listed(names: Sequence[str] | None, what: str = "") -> str:
    """Names from left to right, for a caption or an alternative text.

    Example:
        >>> listed(["3", "", "5"]), listed(None)
        ('from left: 3, not told, 5', '')
    """
    if names is None or not any(names):
        return what
    return "from left: " + ", ".join(name or "not told" for name in names)


def apart(before: float, after: float) -> tuple[str, str]:
    """Two numbers with as many decimals as it takes to see that they differ, from four to nine.

    Example:
        >>> apart(-0.0421611, -0.0421605), apart(0.5, 0.5)
        (('−0.0421611', '−0.0421605'), ('0.500000000', '0.500000000'))
    """
    for decimals in range(4, 10):
        one, other = (f"{x:.{decimals}f}".replace("-", MINUS) for x in (before, after))
        if one != other and abs(before - after) > 2 * 10.0**-decimals:
            break
    return one, other


def _levels(facts: Facts) -> list[dict[str, Any]]:
    found = facts.levels
    errors = np.sqrt(np.mean(np.square(found.guess - facts.clean[None]), axis=(1, 2, 3, 4)))
    return [
        {
            "number": int(found.numbers[i]),
            "a": float(found.a[i]),
            "s": float(found.s[i]),
            "noisy": row(found.noisy[i]),
            "guess": row(found.guess[i]),
            "error": float(errors[i]),
        }
        for i in range(len(found.numbers))
    ]


def _lesson(facts: Facts) -> dict[str, Any]:
    found, n = facts.lesson, len(facts.lesson_levels)
    path, t = facts.run.parts.wired.path, jnp.float32(found.t[0])
    return {
        "number": found.step,
        "clean": row(found.clean),
        "noisy": row(found.noisy),
        "guess": row(found.guess),
        "a": float(path.alpha(t)),
        "s": float(path.sigma(t)),
        "rows": [
            {
                "title": None if facts.lesson_titles is None else facts.lesson_titles[i],
                "level": int(facts.lesson_levels[i]),
                "loss": float(found.losses[i]),
            }
            for i in range(n)
        ],
        "answer": [float(k) for k in found.answer[0]],
        "weight": found.weight._replace(name=found.weight.name.replace("/", ", ")),
    }


def _way(facts: Facts) -> dict[str, Any]:
    found = facts.way
    frames = [
        {
            "done": int(found.steps[i]),
            "left": found.num_steps - int(found.steps[i]),
            "x": row(found.x[i]),
            "x0": row(found.x0[i]),
        }
        for i in range(len(found.steps))
    ]
    end = {**frames[-1], "done": found.num_steps, "left": 0, "x": row(found.x0[-1])}
    return {
        "num_steps": found.num_steps,
        "frames": [*frames, end],
        "end": row(found.x0[-1]),
        "in_one": row(found.in_one),
    }


def _means(facts: Facts) -> dict[str, Any]:
    found = facts.means
    right = None
    if found.titles is not None and facts.way_titles is not None:
        pairs = zip(found.titles, facts.way_titles, strict=True)
        right = sum(one == other for one, other in pairs)
    few = facts.meaning is not Meaning.POSTERIOR_MEAN
    return {
        "blurs": not few and found.to_mean < _NEAR * found.of_examples,
        "nearest": row(found.nearest),
        "examples": row(found.examples),
        "right": right,
        "number": len(found.nearest),
        "name": None if found.titles is None else found.titles[0],
    }


def _dial(facts: Facts) -> dict[str, Any] | None:
    found = facts.dial
    if found is None:
        return None
    columns = found.pictures.shape[1]
    rows = []
    for i, scale in enumerate(found.scales):
        shown = found.pictures[i, :, :_ROWS].swapaxes(0, 1)
        rows.append(
            {
                "scale": f"{scale:g}",
                "picture": picture(shown.reshape(-1, *shown.shape[2:]), columns),
                "variety": found.variety[i],
                "of_real": facts.real_variety and found.variety[i] / facts.real_variety,
                "accuracy": None if found.accuracy is None else found.accuracy[i],
            }
        )
    one = found.scales.index(1.0)
    return {
        "rows": rows,
        "start": one,
        "one": rows[one],
        "last": rows[-1],
        "own": f"{facts.run.recipe.guidance_scale:g}",
        "each": found.pictures.shape[2],
        "columns": columns,
        "share": found.variety[-1] / found.variety[one] if found.variety[one] else 1.0,
    }


def _network(facts: Facts) -> dict[str, Any]:
    parts = [part for part in facts.parts if part.places > 1 or part.num_params]
    sides = {part.side for part in parts if part.places > 1}
    blocks = sum(part.name.startswith("block") for part in parts)
    what = "transformer" if blocks else "U-Net" if len(sides) > 1 else "network"
    title = (
        f"a {what} of {len(parts)} parts, drawn to scale; "
        "the table below the drawing has the same numbers"
    )
    most = max(part.num_params for part in parts)
    return {
        "what": f"a {what}",
        "how": KINDS[what],
        "svg": Markup(draw_network(parts, title)),
        "rows": [(plain(part.name), part.places, part.width, part.num_params) for part in parts],
        "explained": {name: text for name, text in PARTS.items() if _occurs(name, parts)},
        "largest": [part for part in parts if part.num_params == most],
    }


def _occurs(name: str, parts: Sequence[Part]) -> bool:
    return any(part.name.startswith(name) for part in parts)


def _latents(facts: Facts) -> dict[str, Any] | None:
    found = facts.latents
    if found is None:
        return None
    values = found.values
    low, high = values.min(axis=(0, 1, 2)), values.max(axis=(0, 1, 2))
    # Each channel from its darkest to its brightest value, one row for each of the first four.
    scaled = 2.0 * (values - low) / np.maximum(high - low, 1e-6) - 1.0
    rows = np.moveaxis(scaled[..., :4], -1, 0).reshape(-1, *values.shape[1:3], 1)
    height, width, channels = values.shape[1:]
    return {
        "codec": found.codec,
        "pictures": row(found.pictures),
        "channels": picture(rows, len(values)),
        "shown": min(channels, 4),
        "shape": f"{width} × {height} × {channels}",
        "numbers": height * width * channels,
        "ratio": int(np.prod(facts.picture_shape)) / (height * width * channels),
    }
