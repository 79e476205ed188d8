r"""Measure whether samples of a text-to-image run match their prompts.

    python -m experiments.match_prompts --workdir=runs/emoji --pictures=data/emoji/pictures

Classifiers are trained on the real pictures alone, and no text encoder is in them: one of captions,
and one of each attribute in `metadata.jsonl`. The prompts are of training pictures (seen) and of
test pictures (held out). Figures and a page are written to WORKDIR/match: shares by guidance scale,
the same of real pictures, and samples beside the nearest training pictures.
"""

import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import numpy as np
from absl import flags

from diffjax.data import all_images, captioned_folder
from diffjax.data.image_folders.captions import attributes_in
from diffjax.errors import UserError
from diffjax.evaluation.scores.neighbours import COPY_RATIO, nearest_neighbours
from diffjax.evaluation.scores.prompt_match import Judge, features_of, judge_of, with_copies
from diffjax.host.files import write_json
from diffjax.host.progress import progress
from diffjax.host.storage import make_writable
from diffjax.reports.match_page import write_match_page
from diffjax.reports.pictures import save_png
from diffjax.runs.load import Run, load
from diffjax.runs.samples.model import Request
from diffjax.runs.samples.recipes import Chosen, named_recipe
from experiments.flags import cli

FLAGS = flags.FlagValues()
flags.DEFINE_string("workdir", None, "folder of the run", flag_values=FLAGS)
cli.define_step(FLAGS)
flags.DEFINE_string("pictures", "data/emoji/pictures", "captioned pictures", flag_values=FLAGS)
flags.DEFINE_integer(
    "num_prompts", 200, "prompts of training pictures, and at most as many of test pictures",
    lower_bound=2, flag_values=FLAGS,
)  # fmt: skip
flags.DEFINE_integer(
    "of", 50, "captions that the right one is among", lower_bound=2, flag_values=FLAGS
)
flags.DEFINE_list("guidance_scales", ["1", "2", "3", "5"], "scales", flag_values=FLAGS)
flags.DEFINE_string("solver", None, "name of the solver", flag_values=FLAGS)
flags.DEFINE_integer("num_steps", None, "solver steps", lower_bound=1, flag_values=FLAGS)
flags.DEFINE_string("weights", None, "live, or an average such as ema-0.998", flag_values=FLAGS)
flags.DEFINE_integer("seed", 0, "seed of the noise", flag_values=FLAGS)
flags.DEFINE_integer("batch_size", 64, "images per batch", lower_bound=1, flag_values=FLAGS)
flags.DEFINE_list(
    "allowed_packages", [], "your packages that the saved config may name", flag_values=FLAGS
)

SEEN, HELD_OUT = "seen", "held out"
_CAPTION = "caption"
_OF_ATTRIBUTE = 24  # The most seen prompts that are added for each attribute.
_SHOWN = 24
_COPIES = 200  # real pictures whose changed copies are judged


class Part(NamedTuple):
    """A part of the pictures, and the prompts that are taken of it.

    Attributes:
        images: real pictures, `[N, H, W, C]` in [-1, 1].
        captions: the caption of each picture.
        attributes: the attributes of each picture.
        rows: the rows of those whose captions are prompts.
    """

    images: np.ndarray
    captions: Sequence[str]
    attributes: Sequence[Mapping[str, str]]
    rows: np.ndarray

    @property
    def prompts(self) -> list[str]:
        return [str(self.captions[row]) for row in self.rows.tolist()]


def main(args: SimpleNamespace) -> None:
    """Trains the classifiers, draws samples, and writes figures and a page."""
    cli.require(args, "workdir")
    scales = [_scale(text) for text in args.guidance_scales]
    packages = ("diffjax", *args.allowed_packages)
    run = load(args.workdir, step=args.step, weights=args.weights, allowed_packages=packages)
    out = Path(args.workdir) / "match"
    make_writable(out)
    with progress(f"reading {args.pictures}"):
        parts = parts_of(args, run.parts.codec.image_shape(run.parts.wired.image_shape)[0])
    seen = parts[SEEN]
    with progress("training the classifiers of real pictures"):
        judge = judge_of(seen.images, seen.captions, seen.attributes)

    begun, rows, counts, drawn = time.process_time(), [], {}, {}
    for scale in scales:
        for name, part in parts.items():
            drawn[scale, name] = images = samples(args, run, part, scale)
            attributes = [part.attributes[row] for row in part.rows]
            known = part.prompts[: args.num_prompts] if name == SEEN else []
            shares, numbers = judged(judge, features_of(images), known, attributes, args.of)
            counts |= {f"{what}, {name}": n for what, n in numbers.items()}
            rows.append({"guidance_scale": scale, "part": name, "shares": shares})
            print(f"scale {scale:g}, {name}: {_percents(shares)}", flush=True)
    best = max(scales, key=lambda scale: _shares(rows, scale, SEEN)[_CAPTION])
    with progress("finding the nearest training pictures"):
        copied = {
            name: shown(out, name, part, drawn[best, name], seen.images)
            for name, part in parts.items()
        }
    with progress("judging real pictures"):
        real = real_shares(judge, parts, args.of)
    result: dict[str, Any] = {
        "rows": rows,
        "counts": counts,
        "real": real,
        "how": {
            "run": args.workdir,
            "step": run.step,
            "weights": args.weights or run.config.weights,
            "solver steps": named_recipe(run, Chosen(num_steps=args.num_steps)).recipe.num_steps,
            "seed": args.seed,
            "of": args.of,
            "training pictures": len(seen.images),
            "scale of the pictures": best,
            "copies": ", ".join(f"{share:.1%} {name}" for name, share in copied.items()),
            "processor seconds of sampling": round(time.process_time() - begun),
        },
    }
    write_json(out / "match.json", result)
    print(f"wrote {write_match_page(out, result)} and {out / 'match.json'}")


def parts_of(args: SimpleNamespace, size: int) -> dict[str, Part]:
    """Training pictures, which a run has seen, and test pictures, which are held out."""
    dataset, attributes = captioned_folder(args.pictures, size), attributes_in(args.pictures)
    number = len(dataset.train)
    each = {
        SEEN: (dataset.train, attributes[:number]),
        HELD_OUT: (dataset.test, attributes[number:]),
    }
    return {
        name: Part(all_images(source)[0], source.captions, some, chosen(some, args.num_prompts))
        for name, (source, some) in each.items()
    }


def samples(args: SimpleNamespace, run: Run, part: Part, scale: float) -> np.ndarray:
    """A sample for each prompt of a part."""
    recipe = named_recipe(run, Chosen(args.solver, None, args.num_steps, scale)).recipe
    with progress("encoding the prompts"):
        request = Request(run.parts.wired.condition.of(part.prompts), args.seed)
    what = f"drawing {len(request)} samples at scale {scale:g}"
    with progress(what, total=-(-len(request) // args.batch_size)) as drawing:
        model = run.model(args.weights)
        begun = lambda number: drawing.at(number - 1)  # noqa: E731
        return np.concatenate([*model.batches(recipe, request, args.batch_size, begun)])


def shown(out: Path, name: str, part: Part, images: np.ndarray, train: np.ndarray) -> float:
    """Writes samples beside the nearest training picture and the real one.

    Returns:
        The share of samples that are copies: their nearest training picture is at less than a third
        of the distance of the next one.
    """
    indices, distances = nearest_neighbours(features_of(images), features_of(train), k=2)
    some = np.linspace(0, len(images) - 1, min(_SHOWN, len(images))).round().astype(int)
    beside = [images[some], train[indices[some, 0]], part.images[part.rows[some]]]
    titles = [part.prompts[i] for i in some]
    save_png(out / f"{name.replace(' ', '_')}.png", np.concatenate(beside, 2), 3, titles)
    return float((distances[:, 0] < COPY_RATIO * distances[:, 1]).mean())


def _scale(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise UserError(f"--guidance_scales: {text!r} is no number") from None


def chosen(attributes: Sequence[Mapping[str, str]], number: int) -> np.ndarray:
    """Rows of prompts: evenly spaced ones, and then some more with each attribute."""
    rows = list(np.linspace(0, len(attributes) - 1, min(number, len(attributes))).round())
    for name in sorted({name for each in attributes for name in each}):
        there = [row for row, each in enumerate(attributes) if name in each]
        places = np.linspace(0, len(there) - 1, min(_OF_ATTRIBUTE, len(there))).round().astype(int)
        rows += [there[place] for place in places]
    return np.array(list(dict.fromkeys(int(row) for row in rows)))


def judged(
    judge: Judge,
    features: np.ndarray,
    captions: Sequence[str],
    attributes: Sequence[Mapping[str, str]],
    of: int,
) -> tuple[dict[str, float], dict[str, int]]:
    """The shares of pictures that are right, by what is judged, and the numbers of these pictures.

    Args:
        judge: the classifiers.
        features: the features of the pictures.
        captions: the captions of the first of them, by which they are judged; none of held-out
            ones.
        attributes: the attributes of all pictures.
        of: the number of captions that the right one is among.
    """
    shares, numbers = {}, {}
    if captions:
        numbers[_CAPTION] = len(captions)
        shares[_CAPTION] = float(judge.matched(features[: len(captions)], captions, of).mean())
    for name in judge.of_attributes:
        there = [row for row, each in enumerate(attributes) if name in each]
        if there:
            right = judge.has(features[there], name, [attributes[row][name] for row in there])
            shares[name], numbers[name] = float(right.mean()), len(there)
    return shares, numbers


def real_shares(judge: Judge, parts: Mapping[str, Part], of: int) -> dict[str, float]:
    """The same shares of real pictures: changed copies of seen ones, and those held out."""
    seen, held_out = parts[SEEN], parts[HELD_OUT]
    number = len(seen.images)
    some = np.linspace(0, number - 1, min(_COPIES, number)).round().astype(int)
    copies = with_copies(seen.images[some], 1, seed=1)[len(some) :]
    captions = [str(seen.captions[row]) for row in some.tolist()]
    of_seen, _ = judged(judge, copies, captions, [], of)
    of_others, _ = judged(judge, features_of(held_out.images), [], held_out.attributes, of)
    named = {f"{name}, {SEEN}": share for name, share in of_seen.items()}
    return named | {f"{name}, {HELD_OUT}": share for name, share in of_others.items()}


def _shares(rows: list[dict[str, Any]], scale: float, part: str) -> dict[str, float]:
    wanted = scale, part
    return next(row["shares"] for row in rows if (row["guidance_scale"], row["part"]) == wanted)


def _percents(shares: Mapping[str, float]) -> str:
    return ", ".join(f"{name} {share:.1%}" for name, share in shares.items())


if __name__ == "__main__":
    sys.exit(cli.run(main, FLAGS, usage=__doc__ or ""))
