r"""Export a run's sampler to one file that needs only JAX, on CPU, GPU and TPU, for any batch size.

  python -m experiments.export --workdir=runs/digits --out=sampler.bin
  python -m experiments.export --workdir=runs/digits --out=sampler.bin --solver=heun --num_steps=9 \
      --guidance_scale=2 --input=noise

Flags that are not set have the values of the run's config. docs/export.md shows how to load the
file.
"""

import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jax.numpy as jnp
from absl import flags

import diffjax
from diffjax.errors import UserError
from diffjax.exchange.portable import portable_model, portable_sampler
from diffjax.host.progress import progress
from diffjax.runs.samples.recipes import Chosen, named_recipe
from diffjax.sampling.export import PLATFORMS, serialise
from experiments.flags import cli

FLAGS = flags.FlagValues()
flags.DEFINE_string("workdir", None, "folder of the run", flag_values=FLAGS)
cli.define_step(FLAGS)
flags.DEFINE_string("out", None, "the file to write", flag_values=FLAGS)
flags.DEFINE_enum(
    "input", "seed", ["seed", "noise"], "input of the sampler besides the labels",
    flag_values=FLAGS,
)  # fmt: skip
flags.DEFINE_list("platforms", list(PLATFORMS), "platforms to run on", flag_values=FLAGS)
flags.DEFINE_string("solver", None, "name of the solver", flag_values=FLAGS)
flags.DEFINE_string("grid", None, "name of the time grid", flag_values=FLAGS)
flags.DEFINE_integer("num_steps", None, "solver steps", lower_bound=1, flag_values=FLAGS)
flags.DEFINE_float("guidance_scale", None, "guidance scale; 1 is off", flag_values=FLAGS)
flags.DEFINE_string("guidance", None, "guidance rules, joined by +", flag_values=FLAGS)
flags.DEFINE_string("against", None, "weaker model of the guidance", flag_values=FLAGS)
flags.DEFINE_string("weights", None, "live, or an average such as ema-0.999", flag_values=FLAGS)
flags.DEFINE_enum(
    "weights_dtype", "float32", ["float32", "bfloat16"],
    "dtype of the weights in the file; bfloat16 halves its size", flag_values=FLAGS,
)  # fmt: skip
flags.DEFINE_list(
    "allowed_packages", [], "your packages that the saved config may name", flag_values=FLAGS
)


def main(args: SimpleNamespace) -> None:
    """Exports the sampler, and prints its recipe and signature."""
    cli.require(args, "workdir")
    cli.require(args, "out")
    out = Path(args.out)
    if not out.parent.is_dir():
        raise UserError(f"can't write {out}: there is no folder {out.parent}")
    if not args.platforms:
        raise UserError(f"--platforms= is empty: choose from {','.join(PLATFORMS)}")
    allowed = ("diffjax", *args.allowed_packages)
    run = diffjax.load(args.workdir, step=args.step, weights=args.weights, allowed_packages=allowed)
    how = (args.solver, args.grid, args.num_steps, args.guidance_scale, args.guidance, args.against)
    named = named_recipe(run, Chosen(*how))
    recipe, wired = named.recipe, run.parts.wired
    noise, picture_shape = args.input == "noise", run.parts.codec.image_shape(wired.image_shape)
    source = picture_shape if wired.objective.traits.starts_at_source else None
    # In the file alone: layers cast their weights to the type that they compute in.
    model = portable_model(run, args.weights).map(in_type(args.weights_dtype))
    sampler = portable_sampler(model, recipe, noise=noise)
    with progress("tracing the sampler"):
        content = serialise(
            sampler,
            wired.image_shape,
            wired.condition,
            source=source,
            noise=noise,
            platforms=args.platforms,
        )
    try:
        out.write_bytes(content)
    except OSError as error:
        raise UserError(f"can't write {out}: {error.strerror}") from error
    how = {
        "step": run.step,
        "weights": args.weights or run.config.weights,
        "weights_dtype": args.weights_dtype,
        "solver": named.solver,
        "grid": named.grid,
        "num_steps": recipe.num_steps,
        "nfe": recipe.nfe or "adaptive",
        "guidance_scale": recipe.guidance_scale,
    }
    latent, shape = (", ".join(map(str, each)) for each in (wired.image_shape, picture_shape))
    first = f"noise float32[b, {latent}]" if noise else "seed uint32[]"
    arrays = wired.condition.arrays(wired.condition.abstract(1)).items()
    rows = [
        f"{name} {leaf.dtype}[{', '.join(['b', *map(str, leaf.shape[1:])])}]"
        for name, leaf in arrays
    ]
    arguments = ", ".join([first, *rows, *([f"source float32[b, {shape}]"] if source else [])])
    print(", ".join(f"{name}={value}" for name, value in how.items()))
    print(f"call({arguments}) -> float32[b, {shape}] on {', '.join(args.platforms)}")
    print(f"{len(content):,} bytes in {out}")


def in_type(dtype: str) -> Callable[[Any], Any]:
    """A function that rounds an array of float32 to another type, and leaves others as they are."""
    return lambda leaf: leaf.astype(jnp.dtype(dtype)) if leaf.dtype == jnp.float32 else leaf


USAGE = f"""{__doc__}
{cli.describe_sampling()}"""

if __name__ == "__main__":
    sys.exit(cli.run(main, FLAGS, usage=USAGE))
