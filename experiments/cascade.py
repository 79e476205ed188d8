r"""Compare a cascade with its base model's enlarged images, and with one model of the full size.

  python -m experiments.cascade --base=runs/digits_small \
      --then=runs/digits_upscale,level=0.2 --single=runs/digits

Prints the Fréchet distance and the accuracy of each by the data and the extractor of the last run,
and the FLOPs of a sample, counted. The single model has as many steps as cost the same; another
number is set by --single=RUN,num_steps=5.
"""

import itertools
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags

import diffjax
from diffjax.errors import UserError, nearest
from diffjax.evaluation import metrics
from diffjax.evaluation.image_statistics import Batches
from diffjax.host.progress import progress
from diffjax.runs.initial import is_run
from diffjax.runs.load import Run
from diffjax.runs.measuring.evaluated_samples import labels_in_mix
from diffjax.runs.measuring.measure import own_extractors, reference_of
from diffjax.runs.samples.cascade import Cascade, Stage, check_level
from diffjax.runs.samples.model import Model, Request
from diffjax.runs.samples.recipes import Chosen, named_recipe
from diffjax.sampling.sample import Recipe
from diffjax.training.flops import matrix_flops
from diffjax.wiring import check_recipe
from experiments.flags import cli

FLAGS = flags.FlagValues()
flags.DEFINE_string("base", None, "RUN, perhaps with settings as in --then", flag_values=FLAGS)
THEN = "RUN that enlarges, as RUN,level=0.2,num_steps=5; repeatable"
flags.DEFINE_multi_string("then", [], THEN, flag_values=FLAGS)
flags.DEFINE_string("single", None, "RUN of the full size, to compare with", flag_values=FLAGS)
flags.DEFINE_integer("num_samples", 1000, "of each", lower_bound=3, flag_values=FLAGS)
flags.DEFINE_integer("seed", 0, "seed of the noise", flag_values=FLAGS)
flags.DEFINE_string("data_path", None, "new path of the data, if moved", flag_values=FLAGS)
flags.DEFINE_list(
    "allowed_packages", [], "your packages that the saved configs may name", flag_values=FLAGS
)

_BATCH = 256
_SETTINGS = {
    "level": float,
    "solver": str,
    "grid": str,
    "num_steps": int,
    "guidance_scale": float,
    "guidance": str,
    "against": str,
    "weights": str,
}


def main(args: SimpleNamespace) -> None:
    """Draws the samples, measures them, and prints a row for each way."""
    cli.require(args, "base")
    if not args.then:
        raise UserError("--then is missing: the run that enlarges the samples of --base")
    opened = [stage_of(text, args.allowed_packages) for text in (args.base, *args.then)]
    (base, _), (last, _) = opened[0], opened[-1]
    cascade = Cascade([stage for _, stage in opened])
    labels = labels_in_mix(base, args.num_samples)
    cond = base.parts.wired.condition.of_labels(labels)
    if cond is None:
        raise UserError("cascades are compared on classes, and --base has another condition")
    with progress("reading the data"):
        dataset = last.dataset(args.data_path)
    with progress("extracting features of the real images"):
        reference = reference_of(dataset, own_extractors(last.config, dataset)[0], lambda: None)
    with progress("counting the FLOPs of a sample"):
        flops = sum(sample_flops(stage) for stage in cascade.stages)
    single = None if args.single is None else _single(args, dataset.picture_shape, flops)

    def show(name: str, images: np.ndarray, cost: float, steps: str) -> None:
        batches = Batches.of(np.clip(images, -1, 1))
        real = labels if dataset.num_classes else None
        with progress(f"measuring {name}"):
            found = metrics.compare_each(batches, real, [reference], all_metrics=False)[0]
        accuracy = "" if found["accuracy"] is None else f"{found['accuracy']:8.1%}"
        distance = found["frechet_distance"]["value"]
        print(f"{name:<28} {steps:>8} {cost / 1e6:12.2f} {accuracy:>9} {distance:10.3f}")

    print(f"{'':<28} {'steps':>8} {'MFLOPs':>12} {'accuracy':>9} {'Fréchet':>10}")
    batches = len(cascade.stages) * -(-args.num_samples // _BATCH)
    with progress(f"drawing {args.num_samples} samples of each stage", batches) as drawing:
        done = itertools.count()
        images = cascade.sample(Request(cond, args.seed), _BATCH, lambda _: drawing.at(next(done)))
    steps = [stage.recipe.num_steps for stage in cascade.stages]
    shape = (args.num_samples, *images[-1].shape[1:])
    cubic = np.asarray(jax.image.resize(images[0], shape, "cubic"))
    show("base, enlarged (bicubic)", cubic, sample_flops(cascade.stages[0]), str(steps[0]))
    show("cascade", images[-1], flops, " + ".join(map(str, steps)))
    if single is not None:
        condition = single.model.wired.condition.of_labels(labels)
        with progress(f"drawing {args.num_samples} samples of one model"):
            found = single.model.sample(single.recipe, Request(condition, args.seed))
        show("one model", found, sample_flops(single), str(single.recipe.num_steps))
    facts = reference.test_features, args.num_samples, reference.extractor.name
    print(f"{len(facts[0])} test images, {facts[1]} samples, features of {facts[2]}")


def stage_of(text: str, allowed_packages: list[str]) -> tuple[Run, Stage]:
    """The run and the stage of a cascade that a flag describes, as `RUN,level=0.2,num_steps=5`.

    Raises:
        UserError: there is no such run or setting.
    """
    place, *settings = text.split(",")
    found: dict[str, Any] = {}
    for setting in settings:
        name, _, value = setting.partition("=")
        if name not in _SETTINGS:
            raise UserError(f"{text}: no setting {name!r} of a run; {nearest(name, _SETTINGS)}")
        try:
            found[name] = _SETTINGS[name](value)
        except ValueError:
            raise UserError(f"{text}: {setting} needs a number") from None
    weights, level = found.pop("weights", None), found.pop("level", 0.0)
    if is_run(Path(place)):
        allowed = ("diffjax", *allowed_packages)
        run = diffjax.load(place, weights=weights, allowed_packages=allowed)
    else:
        with progress(f"reading {place}"):
            run = diffjax.from_pretrained(place)
    recipe = named_recipe(run, Chosen(**found)).recipe
    stage = Stage(run.model(weights), recipe, level, place)
    check_recipe(recipe, run.parts.wired)
    check_level(stage)
    return run, stage


def _single(args: SimpleNamespace, shape: tuple[int, int, int], flops: float) -> Stage:
    """The single model, with as many steps as cost about the same as the cascade."""
    run, stage = stage_of(args.single, args.allowed_packages)
    if run.parts.codec.image_shape(run.parts.wired.image_shape) != shape:
        raise UserError(f"--single={args.single} makes images of another size than the cascade's")
    if run.parts.wired.condition.of_labels(np.zeros(1, np.int32)) is None:
        raise UserError(f"--single={args.single} is to be a run that makes images of labels alone")
    if "num_steps=" in args.single:
        return stage
    wanted = max(1, round(flops / evaluation_flops(stage.model)))
    tried = [replace(stage.recipe, num_steps=n) for n in range(1, wanted + 1)]
    best = min(tried, key=lambda recipe: abs((recipe.nfe or 0) - wanted))
    return replace(stage, recipe=best)


def sample_flops(stage: Stage) -> float:
    """FLOPs of matrix products and convolutions for one sample."""
    return evaluation_flops(stage.model) * _nfe(stage.model, stage.recipe)


def evaluation_flops(model: Model) -> float:
    """FLOPs of one evaluation of the network for one sample, as `matrix_flops` counts them."""
    wired = model.wired
    x = jax.ShapeDtypeStruct((1, *wired.image_shape), jnp.float32)
    t = jax.ShapeDtypeStruct((1,), jnp.float32)
    predict = wired.predict
    return matrix_flops(
        lambda params, x, t, cond: predict(params)(x, t, cond),
        wired.params_shape, x, t, wired.condition.abstract(1),
    )  # fmt: skip


def _nfe(model: Model, recipe: Recipe) -> int:
    return model.nfe(recipe, Request(model.wired.condition.null(1)))


USAGE = f"""{__doc__}
Settings of a run: {", ".join(_SETTINGS)}
{cli.describe_sampling()}"""

if __name__ == "__main__":
    sys.exit(cli.run(main, FLAGS, usage=USAGE))
