r"""Write a run's sampler as one file that JAX alone runs: on CPU, GPU and TPU, at any batch size.

  python -m experiments.export --workdir=runs/digits --out=sampler.bin
  python -m experiments.export --workdir=runs/digits --out=sampler.bin --solver=heun --num_steps=9 \
      --guidance_scale=2 --input=noise

What is not given is as in the run's config. docs/export.md has the lines that load it.
"""

import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jax.numpy as jnp
from absl import flags

import diffjax
from diffjax import choices
from diffjax.errors import UserError
from diffjax.runs.portable import portable_model, portable_sampler
from diffjax.runs.recipes import Guided, named_recipe
from diffjax.sampling.export import PLATFORMS, serialise
from experiments import cli

FLAGS = flags.FlagValues()
flags.DEFINE_string("workdir", None, "folder of the run", flag_values=FLAGS)
flags.DEFINE_string("out", None, "the file to write", flag_values=FLAGS)
flags.DEFINE_enum(
    "input", "seed", ["seed", "noise"], "what the sampler takes beside the labels",
    flag_values=FLAGS,
)  # fmt: skip
flags.DEFINE_list("platforms", list(PLATFORMS), "where it is to run", flag_values=FLAGS)
flags.DEFINE_string("solver", None, "how to step", flag_values=FLAGS)
flags.DEFINE_string("grid", None, "where to step", flag_values=FLAGS)
flags.DEFINE_integer("num_steps", None, "steps", lower_bound=1, flag_values=FLAGS)
flags.DEFINE_float("guidance_scale", None, "1 is off", flag_values=FLAGS)
flags.DEFINE_string("guidance", None, "parts joined by +", flag_values=FLAGS)
flags.DEFINE_string("against", None, "what guidance leads away from", flag_values=FLAGS)
flags.DEFINE_string("weights", None, "live, or an average such as ema-0.999", flag_values=FLAGS)
flags.DEFINE_enum(
    "weights_dtype", "float32", ["float32", "bfloat16"],
    "how weights are kept in the file; bfloat16 halves it", flag_values=FLAGS,
)  # fmt: skip
flags.DEFINE_list(
    "allowed_packages", [], "of your own, that the saved config may name", flag_values=FLAGS
)


def main(args: SimpleNamespace) -> None:
    """Exports, and says how the file is called."""
    cli.require(args, "workdir")
    cli.require(args, "out")
    out = Path(args.out)
    if not out.parent.is_dir():
        raise UserError(f"can't write {out}: there is no folder {out.parent}")
    if not args.platforms:
        raise UserError(f"--platforms= names none: give some of {','.join(PLATFORMS)}")
    allowed = ("diffjax", *args.allowed_packages)
    run = diffjax.load(args.workdir, weights=args.weights, allowed_packages=allowed)
    guided = Guided(args.guidance_scale, args.guidance, args.against)
    named = named_recipe(run, args.solver, args.grid, args.num_steps, guided)
    recipe, wired = named.recipe, run.setup.wired
    noise, source = args.input == "noise", wired.objective.starts_at_source
    # In the file alone: layers cast their weights to the type that they compute in.
    model = portable_model(run, args.weights).map(in_type(args.weights_dtype))
    sampler = portable_sampler(model, recipe, noise=noise)
    content = serialise(
        sampler, wired.image_shape, source=source, noise=noise, platforms=args.platforms
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
        "nfe": recipe.nfe or "as the solver decides",
        "guidance_scale": recipe.guidance_scale,
    }
    shape = ", ".join(map(str, wired.image_shape))
    first = f"noise float32[b, {shape}]" if noise else "seed uint32[]"
    arguments = f"{first}, labels int32[b]" + (f", source float32[b, {shape}]" if source else "")
    print(", ".join(f"{name}={value}" for name, value in how.items()))
    print(f"call({arguments}) -> float32[b, {shape}] on {', '.join(args.platforms)}")
    print(f"{len(content):,} bytes in {out}")


def in_type(dtype: str) -> Callable[[Any], Any]:
    """A function that rounds an array of float32 to another type, and leaves others as they are."""
    return lambda leaf: leaf.astype(jnp.dtype(dtype)) if leaf.dtype == jnp.float32 else leaf


USAGE = f"""{__doc__}
Solvers:
{cli.describe_solvers()}
Grids: {", ".join(choices.GRIDS)}; found, by experiments.find_grid
Guidance: {", ".join(choices.GUIDANCE)}; joined by +, the innermost first"""

if __name__ == "__main__":
    sys.exit(cli.run(main, FLAGS, usage=USAGE))
