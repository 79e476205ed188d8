r"""Write weights in another layout: of diffusers, of a network's authors, or of diffjax.

  python -m experiments.convert --from=DiT-XL-2-256x256.pt --to=diffusers --out=DiT-XL-2
  python -m experiments.convert --from=sdxl-vae --to=authors --out=sdxl-vae-ldm
  python -m experiments.convert --from=runs/x:ema-0.999 --to=diffjax --out=weights
  python -m experiments.convert --from=runs/tuned --to=lora --out=style

--from is a file of torch or safetensors, a folder of diffusers (config.json with one file or
shards), a pipeline of it (its transformer), a folder that this program wrote, or the folder of a
run, whose weights are named after a colon. Numbers are not changed. What whoever reads the layout
evaluates in another way is printed. docs/models.md has the layouts of each network. lora, lora_old
and lora_kohya are the LoRA of a run (config.lora) in the dialects of peft and diffusers, of older
diffusers and of kohya; other layouts have its changes in the weights.
"""

import sys
from types import SimpleNamespace

from absl import flags

from diffjax.exchange import convert
from diffjax.host.progress import progress
from experiments.flags import cli, published

FLAGS = flags.FlagValues()
flags.DEFINE_string("from", None, "file, folder or run; runs/x:ema-0.999", flag_values=FLAGS)
flags.DEFINE_string("to", None, f"layout: {', '.join(convert.TARGETS)}", flag_values=FLAGS)
flags.DEFINE_string("out", None, "folder to write, new or empty", flag_values=FLAGS)
flags.DEFINE_string(
    "family", None, "DiT or SiT, where the name of a file does not tell", flag_values=FLAGS
)
flags.DEFINE_integer(
    "num_heads", None, "attention heads of a network of no published size", lower_bound=1,
    flag_values=FLAGS,
)  # fmt: skip
published.define_network(FLAGS)
flags.DEFINE_string(
    "format", "torch", f"of the authors' layout: {', '.join(convert.FORMATS)}", flag_values=FLAGS
)
flags.DEFINE_string(
    "part", "", "of a file of a training: ema, model, ...; by default its averages",
    flag_values=FLAGS,
)  # fmt: skip
flags.DEFINE_list(
    "allowed_packages", [], "your packages that the saved config may name", flag_values=FLAGS
)


def main(args: SimpleNamespace) -> None:
    """Writes the weights, and prints what was read and written."""
    for name in ("from", "to", "out"):
        cli.require(args, name)
    heads = {} if args.num_heads is None else {"num_heads": args.num_heads}
    with progress(f"converting {vars(args)['from']}"):
        lines = convert.convert(
            vars(args)["from"],
            args.to,
            args.out,
            family=args.family,
            settings={**published.settings_of(args.network), **heads},
            part=args.part,
            file_format=args.format,
            allowed_packages=("diffjax", *args.allowed_packages),
        )
    print("\n".join(lines))


if __name__ == "__main__":
    sys.exit(cli.run(main, FLAGS, usage=__doc__ or ""))
