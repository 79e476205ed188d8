r"""Draw samples from a trained run: a picture and an array. Unset flags are as in its config.

python -m experiments.sample --workdir=runs/digits --num_samples=64 --num_steps=18 --out=grid.png
python -m experiments.sample --pretrained=FOLDER --prompts="a red apple" --out=apple.png
python -m experiments.sample --pretrained=SDXL --refiner=FOLDER --prompts="a red apple"
"""

import json
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
from absl import flags

import diffjax
from diffjax.conditions import Classes
from diffjax.conditions.base import len_of
from diffjax.errors import UserError
from diffjax.evaluation.sample_files import check_place, write_samples
from diffjax.evaluation.scores.seams import jump_at_edges
from diffjax.host.files import write_npz
from diffjax.host.processes import in_first, is_first
from diffjax.host.progress import progress
from diffjax.host.storage import make_writable
from diffjax.host.watchdog import watched
from diffjax.models.layers.seamless import AXES
from diffjax.reports.pictures import (
    captions,
    columns_by_class,
    save_film,
    save_png,
)
from diffjax.runs.load import Run
from diffjax.runs.measuring.evaluated_samples import conditions_to_show
from diffjax.runs.samples.cascade import Cascade, Stage, at_level
from diffjax.runs.samples.condition_files import read, read_states
from diffjax.runs.samples.experts import Expert, batches_of_two
from diffjax.runs.samples.model import Model, Request
from diffjax.runs.samples.recipes import Chosen, named_recipe
from diffjax.runs.workdirs import RUN
from diffjax.sampling.guidance import NegativeCondition
from diffjax.sampling.sample import Recipe, Trace
from diffjax.wiring import check_recipe
from experiments.cascade import THEN, stage_of
from experiments.flags import cli, published, shared

FLAGS = flags.FlagValues()
flags.DEFINE_string("workdir", None, "folder of the run", flag_values=FLAGS)
published.define(FLAGS)
cli.define_step(FLAGS)
flags.DEFINE_integer(
    "num_samples", None, "number of samples; 64, or that of --prompts", lower_bound=1,
    flag_values=FLAGS,
)  # fmt: skip
flags.DEFINE_list(
    "labels",
    None,
    "labels, prompts, part=TEXT;…, or @FILE, as above",
    flag_values=FLAGS,
)
flags.DEFINE_string("prompts", None, "one text, or @FILE of texts", flag_values=FLAGS)
published.define_states(FLAGS)
flags.DEFINE_integer("seed", 0, "seed of the noise", flag_values=FLAGS)
flags.DEFINE_string("solver", None, "name of the solver", flag_values=FLAGS)
flags.DEFINE_string("grid", None, "name of the time grid", flag_values=FLAGS)
flags.DEFINE_integer("num_steps", None, "solver steps", lower_bound=1, flag_values=FLAGS)
flags.DEFINE_float("guidance_scale", None, "guidance scale; 1 is off", flag_values=FLAGS)
flags.DEFINE_string("guidance", None, "guidance rules, joined by +", flag_values=FLAGS)
flags.DEFINE_string("against", None, "weaker model of the guidance", flag_values=FLAGS)
flags.DEFINE_enum(
    "seamless", None, [*AXES], "images that tile a plane: in both directions, or in one",
    flag_values=FLAGS,
)  # fmt: skip
flags.DEFINE_multi_string("then", [], THEN, flag_values=FLAGS)
flags.DEFINE_float(
    "level", 0.0, "noise in the small image of a run that enlarges", lower_bound=0.0,
    flag_values=FLAGS,
)  # fmt: skip
flags.DEFINE_string("weights", None, "live, or an average such as ema-0.999", flag_values=FLAGS)
flags.DEFINE_integer("batch_size", 256, "images per batch", lower_bound=1, flag_values=FLAGS)
flags.DEFINE_integer(
    "parallel", None, "sample this many steps in parallel", lower_bound=1,
    flag_values=FLAGS,
)  # fmt: skip
flags.DEFINE_float("tolerance", 1e-2, "--parallel: convergence threshold", flag_values=FLAGS)
flags.DEFINE_string(
    "refiner", None, "published network that takes the last steps, as SDXL's refiner",
    flag_values=FLAGS,
)  # fmt: skip
flags.DEFINE_float(
    "refiner_share", 0.2, "--refiner: share of the time from which on it takes the steps",
    flag_values=FLAGS,
)  # fmt: skip
flags.DEFINE_string("data_path", None, "new path of the data, if moved", flag_values=FLAGS)
flags.DEFINE_list(
    "allowed_packages", [], "your packages that the saved config may name", flag_values=FLAGS
)
flags.DEFINE_string(
    "film", None, "write trajectories to this .png and a .gif",
    flag_values=FLAGS,
)  # fmt: skip
flags.DEFINE_string(
    "out", None, "picture; or x.npz with arr_0; or FOLDER/ of PNGs",
    flag_values=FLAGS,
)  # fmt: skip
shared.define_processes(FLAGS)
shared.define_watchdog(FLAGS)

_PAIRS_IN_A_ROW = 5
_NUM_SAMPLES = 64
_FILMED = 6


def main(args: SimpleNamespace) -> None:
    """Draws samples, saves them, and prints their recipe."""
    _settle(args)
    run = published.opened(args, args.weights)
    how = (args.solver, args.grid, args.num_steps, args.guidance_scale, args.guidance, args.against)
    named = named_recipe(run, Chosen(*how))
    recipe = named.recipe
    stages = [stage_of(text, args.allowed_packages)[1] for text in args.then]
    stages = [replace(x, model=x.model.seamless(args.seamless or False)) for x in stages]
    negative = None
    if args.states is None:
        condition, source, texts = wanted(run, args.labels, args.num_samples, args.data_path)
    else:
        source = texts = None
        condition, negative = read_states(run.parts.wired.condition, args.states)
    if args.against is not None:
        negative = None  # which the file may have beside what the flag names
    if negative is not None:
        recipe = replace(recipe, against=NegativeCondition())
    if args.level:
        kind, rows = run.parts.wired.condition, np.arange(len_of(condition))
        condition = at_level(kind, condition, args.level, args.seed, rows)
    refiner = None if args.refiner is None else refined_by(args, run, Chosen(*how))
    folder = run.workdir.with_suffix("") if run.workdir.is_file() else run.workdir
    out = Path(args.out or folder / "samples" / f"seed_{args.seed}.png")
    if args.film is not None and Path(args.film).suffix != ".png":
        raise UserError(f"--film={args.film} should end in .png; the GIF is written next to it")
    if _is_for_others(args.out):
        _check_for_others(run, args, out)
    elif out.suffix != ".png":
        raise UserError(
            f"--out={out} should end in .png (a picture, with arrays beside it), .npz (arr_0, as "
            "uint8), or / (a folder with a PNG for each sample)"
        )
    in_first(lambda: make_writable(out.parent))  # Fails before the work, if it does.

    stacks = run.workdir if (run.workdir / RUN).exists() else out.parent
    model = run.model(args.weights).seamless(args.seamless or False)
    request = Request(condition, args.seed, source, negative=negative)
    cascade = Cascade([Stage(model, recipe), *stages]) if stages else None
    if refiner is None:
        images, cost = images_and_cost(args, model, recipe, request, stacks)
    else:
        first, share = Expert(model, recipe, request), args.refiner_share
        images = np.concatenate([*batches_of_two(first, refiner, share, args.batch_size)])
        cost = {"refiner": args.refiner, "refiner_share": share}
    kind = run.parts.wired.condition
    if cascade is not None:
        *_, images = cascade.enlarged(images, request, args.batch_size)
        cost |= {"then": " ".join(args.then)}
    if args.seamless is not None:
        cost |= {"seamless": args.seamless, "jump": jump_at_edges(images, args.seamless)}
    source = None if source is None else model.decoded(source)
    arrays = {"images": images, **kind.arrays(request.condition)}
    arrays |= {} if source is None else {"source": source}
    how = {
        "step": run.step,
        "weights": args.weights or run.config.weights,
        "solver": named.solver,
        "grid": named.grid,
        "num_steps": recipe.num_steps,
        **cost,
        "guidance_scale": recipe.guidance_scale,
        "guidance": repr(recipe.guidance),
        "against": repr(recipe.against),
        "seed": args.seed,
    }
    if run.loras:
        how["loras"] = json.dumps([lora.facts for lora in run.loras])
    filmed = request.only(np.arange(min(len(request), _FILMED)))
    traced: Any = None if args.film is None else decoded_trace(model, recipe, filmed)
    if not is_first():
        return
    try:
        if _is_for_others(args.out):
            label = {"labels": arrays["labels"]} if _has_labels(run) else {}
            write_samples(out, images, **label, **how)
            print(", ".join(f"{name}={value}" for name, value in how.items()))
            print(f"{len(images)} samples in {out}")
            return
        write_npz(out.with_suffix(".npz"), **arrays, **how)
        titles = kind.titles(request.condition) or texts
        columns = columns_by_class(len(images), len(set(titles or ())))
        beside = kind.pictures(request.condition) if source is None else source
        if beside is not None:
            columns = _PAIRS_IN_A_ROW
        save_png(out, images, columns, captions(titles, columns), beside)
        if args.film is not None:
            gif = save_film(args.film, traced)
    except OSError as error:
        raise UserError(f"can't write {out}: {error.strerror}") from error
    print(", ".join(f"{name}={value}" for name, value in how.items()))
    print(f"{len(images)} samples in {out} and {out.with_suffix('.npz')}")
    if args.film is not None:
        print(f"film of {min(len(images), _FILMED)} in {args.film} and {gif}")


def _is_for_others(out: str | None) -> bool:
    """Whether samples are written as other programs read them: uint8 in an `.npz`, or PNGs."""
    return out is not None and (out.endswith(("/", ".npz")) or Path(out).is_dir())


def _check_for_others(run: Run, args: SimpleNamespace, out: Path) -> None:
    """Refuses what other programs can't read, before samples are drawn."""
    codec = run.parts.codec
    if not codec.bounded:
        raise UserError(f"--out={out}: samples of this run are latents, not images: name a .png")
    if args.film is not None:
        raise UserError("--film goes with a picture: let --out end in .png")
    check_place(out, codec.image_shape(run.parts.wired.image_shape)[2])


def _has_labels(run: Run) -> bool:
    return isinstance(run.parts.wired.condition, Classes)


def _settle(args: SimpleNamespace) -> None:
    """Sets the flags that have two names."""
    if args.prompts is not None and args.labels is not None:
        raise UserError("--prompts and --labels are both given: leave one out")
    if args.states is not None and (args.labels or args.prompts or args.num_samples):
        raise UserError("--states has all conditions: leave out --prompts, --labels, --num_samples")
    if args.states is not None and args.pretrained is None:
        raise UserError("--states goes with --pretrained")
    args.labels = args.labels if args.prompts is None else [args.prompts]
    if args.num_samples is None and args.prompts is None:
        args.num_samples = _NUM_SAMPLES


def refined_by(args: SimpleNamespace, run: Run, chosen: Chosen) -> Expert:
    """The model of `--refiner`, which shares steps and size with the other one.

    Raises:
        UserError: it can't be read, or flags do not go with it.
    """
    if args.refiner == "" or args.labels is None or not 0 < args.refiner_share < 1:
        raise UserError(
            "--refiner is a published network that goes on with --prompts from --refiner_share, "
            f"between 0 and 1, of the time: not {args.refiner!r}, {args.labels}, "
            f"{args.refiner_share:g}"
        )
    if args.parallel or args.film or (args.workdir is not None and args.pretrained is None):
        raise UserError("--refiner goes with --pretrained, and without --parallel and --film")
    height, width, _ = run.parts.codec.image_shape(run.parts.wired.image_shape)
    with progress(f"reading {args.refiner}"):
        other = diffjax.from_pretrained(args.refiner, image_size=(height, width))
    condition, _, _ = wanted(other, args.labels, args.num_samples, None)
    recipe = named_recipe(other, chosen).recipe
    check_recipe(recipe, other.parts.wired)
    return Expert(other.model(), recipe, Request(condition, args.seed))


def images_and_cost(
    args: SimpleNamespace, model: Model, recipe: Recipe, request: Request, folder: Path
) -> tuple[np.ndarray, dict[str, float]]:
    """Draws samples; returns them with their cost: evaluations per sample, or sequential rounds."""
    n = args.batch_size
    with watched(shared.watchdog(args), folder, what="batch") as begun:
        if args.parallel:
            begun(1)
            found = model.in_parallel(recipe, request, args.parallel, args.tolerance)
            cost = {"parallel": args.parallel, "tolerance": args.tolerance}
            return np.asarray(found.x), {**cost, "rounds": int(found.rounds)}
        what, total = f"drawing {len(request)} samples, {recipe.num_steps} steps", len(request)
        with progress(what, total) as drawing:

            def begins(number: int) -> None:
                begun(number)
                drawing.at((number - 1) * n)

            images = np.concatenate([*model.batches(recipe, request, n, begins)])
    return images, {"nfe": model.nfe(recipe, next(request.batches(n)))}


def decoded_trace(model: Model, recipe: Recipe, request: Request) -> Trace:
    """The images on the way from noise to samples."""
    trace = model.trace(recipe, request)
    x, x0 = (np.stack([*map(model.decoded, each)]) for each in (trace.x, trace.x0))
    return trace._replace(x=x, x0=x0)


def wanted(
    run: Run, given: list[str] | None, n: int | None, data_path: str | None
) -> tuple[Any, np.ndarray | None, list[str] | None]:
    """The condition and the sources of n samples: what `--labels` parses to, in turn, or else all
    labels in turn, or those of test images; and the texts of `--labels`, where it has them.
    """
    wired = run.parts.wired
    condition = wired.condition
    if given is not None and wired.objective.traits.starts_at_source:
        raise UserError(
            "this run starts at test images, which have their own labels: leave out --labels"
        )
    if given is not None:
        cond = read(condition, given)
        rows = np.arange(len_of(cond) if n is None else n) % len_of(cond)
        texts = None if given[0].startswith("@") else [given[row] for row in rows]
        return condition.take(cond, rows), None, texts
    shown = conditions_to_show(wired, lambda: run.dataset(data_path), n or _NUM_SAMPLES)
    return *shown, None


USAGE = f"""{__doc__}
Labels: 3,7; a prompt; digit=3;text=PROMPT; @FILE with a text in each line or, as .npz, with arrays
{cli.describe_sampling()}
{cli.AGAINST}"""

if __name__ == "__main__":
    sys.exit(cli.run(main, FLAGS, usage=USAGE))
