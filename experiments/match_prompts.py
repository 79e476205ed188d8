r"""Measure whether samples of a text-to-image run match their prompts.

    python -m experiments.match_prompts --workdir=runs/emoji --pictures=data/emoji/pictures

Classifiers are trained on the real pictures alone, and no text encoder is in them: one of captions,
and one of each attribute in `metadata.jsonl`. The prompts are of training pictures (seen) and of
test pictures (held out). Figures and a page are written to WORKDIR/match: shares by guidance scale,
the same of real pictures, and samples beside the nearest training pictures.
"""

import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
from absl import flags

from diffjax.data import all_images, captioned_folder
from diffjax.data.captions import attributes_in
from diffjax.errors import UserError
from diffjax.evaluation.neighbours import COPY_RATIO, nearest_neighbours
from diffjax.evaluation.prompt_match import Judge, features_of, judge_of, with_copies
from diffjax.host.files import write_json
from diffjax.host.storage import make_writable
from diffjax.reports.match_page import write_match_page
from diffjax.reports.pictures import save_png
from diffjax.runs.load import load
from diffjax.runs.model import Request
from diffjax.runs.recipes import Chosen, named_recipe
from experiments import cli

FLAGS = flags.FlagValues()
flags.DEFINE_string("workdir", None, "folder of the run", flag_values=FLAGS)
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


def main(args: SimpleNamespace) -> None:
    """Trains the classifiers, draws samples, and writes figures and a page."""
    cli.require(args, "workdir")
    scales = [_scale(text) for text in args.guidance_scales]
    run = load(
        args.workdir, weights=args.weights, allowed_packages=("diffjax", *args.allowed_packages)
    )
    size = run.parts.codec.image_shape(run.parts.wired.image_shape)[0]
    dataset = captioned_folder(args.pictures, size)
    attributes = attributes_in(args.pictures)
    out = Path(args.workdir) / "match"
    make_writable(out)
    real = {SEEN: all_images(dataset.train)[0], HELD_OUT: all_images(dataset.test)[0]}
    texts = {SEEN: dataset.train.captions, HELD_OUT: dataset.test.captions}
    number = len(real[SEEN])
    values = {SEEN: attributes[:number], HELD_OUT: attributes[number:]}
    judge = judge_of(real[SEEN], texts[SEEN], values[SEEN])
    rows = {part: chosen(values[part], args.num_prompts) for part in (SEEN, HELD_OUT)}

    begun, found, counts, drawn = time.process_time(), [], {}, {}
    for scale in scales:
        how = Chosen(args.solver, None, args.num_steps, scale)
        recipe = named_recipe(run, how).recipe
        for part in (SEEN, HELD_OUT):
            prompts = [texts[part][row] for row in rows[part]]
            condition = run.parts.wired.condition.of(prompts)
            request = Request(condition, args.seed)
            images = np.concatenate([*run.model().batches(recipe, request, args.batch_size)])
            some = [values[part][row] for row in rows[part]]
            shares, numbers = judged(
                judge, part, features_of(images), prompts, some, args.num_prompts, args.of
            )
            counts |= {f"{name}, {part}": n for name, n in numbers.items()}
            found.append({"guidance_scale": scale, "part": part, "shares": shares})
            drawn[scale, part] = images
            print(f"scale {scale:g}, {part}: {_percents(shares)}", flush=True)
    best = max(scales, key=lambda scale: _caption_share(found, scale))
    nearest = {}
    for part in (SEEN, HELD_OUT):
        images, own = drawn[best, part], real[part][rows[part]]
        references = features_of(real[SEEN])
        indices, distances = nearest_neighbours(features_of(images), references, k=2)
        nearest[part] = float((distances[:, 0] < COPY_RATIO * distances[:, 1]).mean())
        shown = np.linspace(0, len(images) - 1, min(_SHOWN, len(images))).round().astype(int)
        beside = [images[shown], real[SEEN][indices[shown, 0]], own[shown]]
        titles = [texts[part][rows[part][i]] for i in shown]
        file = out / f"{part.replace(' ', '_')}.png"
        save_png(file, np.concatenate(beside, 2), columns=3, names=titles)
    result: dict[str, Any] = {
        "rows": found,
        "counts": counts,
        "real": real_shares(judge, real, texts, values, args.of),
        "how": {
            "run": args.workdir,
            "step": run.step,
            "weights": args.weights or run.config.weights,
            "num_steps": named_recipe(run, Chosen(num_steps=args.num_steps)).recipe.num_steps,
            "seed": args.seed,
            "of": args.of,
            "training pictures": number,
            "scale of the pictures": best,
            "copies": ", ".join(f"{share:.1%} {part}" for part, share in nearest.items()),
            "processor seconds of sampling": round(time.process_time() - begun),
        },
    }
    write_json(out / "match.json", result)
    print(f"wrote {write_match_page(out, result)} and {out / 'match.json'}")


def _scale(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise UserError(f"--guidance_scales: {text!r} is no number") from None


def chosen(attributes: list[dict[str, str]], number: int) -> np.ndarray:
    """Rows of prompts: evenly spaced ones, and then some more with each attribute."""
    rows = list(np.linspace(0, len(attributes) - 1, min(number, len(attributes))).round())
    for name in sorted({name for each in attributes for name in each}):
        there = [row for row, each in enumerate(attributes) if name in each]
        places = np.linspace(0, len(there) - 1, min(_OF_ATTRIBUTE, len(there))).round().astype(int)
        rows += [there[place] for place in places]
    return np.array(list(dict.fromkeys(int(row) for row in rows)))


def judged(
    judge: Judge,
    part: str,
    features: np.ndarray,
    prompts: list[str],
    attributes: list[dict[str, str]],
    number: int,
    of: int,
) -> tuple[dict[str, float], dict[str, int]]:
    """The shares of samples that are right, by what is judged, and the numbers of these samples."""
    shares, numbers = {}, {}
    if part == SEEN:
        first = slice(min(number, len(features)))
        shares[_CAPTION] = float(judge.matched(features[first], prompts[first], of).mean())
        numbers[_CAPTION] = len(prompts[first])
    for name in judge.of_attributes:
        there = [row for row, each in enumerate(attributes) if name in each]
        if there:
            right = judge.has(features[there], name, [attributes[row][name] for row in there])
            shares[name], numbers[name] = float(right.mean()), len(there)
    return shares, numbers


def real_shares(judge: Judge, real: Any, texts: Any, values: Any, of: int) -> dict[str, float]:
    """The same shares of real pictures: changed copies of seen ones, and those held out."""
    found = {}
    some = np.linspace(0, len(real[SEEN]) - 1, min(200, len(real[SEEN]))).round().astype(int)
    copies = with_copies(real[SEEN][some], 1, seed=1)[len(some) :]
    captions = [texts[SEEN][row] for row in some]
    found[f"{_CAPTION}, {SEEN}"] = float(judge.matched(copies, captions, of).mean())
    features = features_of(real[HELD_OUT])
    shares, _ = judged(judge, HELD_OUT, features, [], values[HELD_OUT], len(features), of)
    return found | {f"{name}, {HELD_OUT}": share for name, share in shares.items()}


def _caption_share(found: list[dict[str, Any]], scale: float) -> float:
    rows = [row for row in found if row["guidance_scale"] == scale and row["part"] == SEEN]
    return rows[0]["shares"][_CAPTION]


def _percents(shares: dict[str, float]) -> str:
    return ", ".join(f"{name} {share:.1%}" for name, share in shares.items())


if __name__ == "__main__":
    sys.exit(cli.run(main, FLAGS, usage=__doc__ or ""))
