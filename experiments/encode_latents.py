r"""Encode the images of a data set once, to train on their latents.

  python -m experiments.encode_latents --config=configs/image_folder.py --config.data.path=IMAGES \
      --codec=taef2:path=WEIGHTS --out=latents
  python -m experiments.train --config=configs/image_folder.py:latents=latents

  python -m experiments.encode_latents --config=configs/image_folder.py --config.data.path=IMAGES \
      --codec=autoencoder_kl:path=vae.safetensors,size=sd-vae,file_sha256=HASH --store=moments \
      --flips --out=latents

  python -m experiments.encode_latents --config=configs/captions.py --config.data.path=IMAGES \
      --codec=taef2:path=WEIGHTS --text=ENCODER:length=32 --out=latents

Of the config the data alone matter. With `--text` the states of the captions are stored too, and
networks are trained on them. The same command goes on after a stop: what is encoded again is
one shard. Several processes, on one machine or on many, share the work. docs/data.md describes the
files.
"""

import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from absl import flags

from diffjax import choices
from diffjax.autoencoders.encoding import FACTS, KINDS, Stored, encode
from diffjax.data import DataSet
from diffjax.errors import UserError
from diffjax.evaluation.extractors.named import patches_called
from diffjax.exchange.pipelines import is_pipeline
from diffjax.exchange.pretrained import from_pretrained
from diffjax.host.files import place_of
from diffjax.host.lock import locked
from diffjax.host.processes import in_first, is_first
from diffjax.host.run_files import read_json
from diffjax.host.storage import make_writable
from diffjax.lookup import codec_called, encoder_called
from diffjax.spec import build
from diffjax.text import Prompts, prompts
from diffjax.training.sharding import local_rows
from experiments.flags import cli, shared

FLAGS = flags.FlagValues()
cli.define_config(FLAGS)
flags.DEFINE_string(
    "codec", None, "what encodes them, with its settings: NAME:setting=value,…", flag_values=FLAGS
)
flags.DEFINE_string("out", None, "folder to write", flag_values=FLAGS)
flags.DEFINE_enum(
    "store", "means", list(KINDS), "of the posterior: its means, one sample of it, or its moments, "
    "of which training draws another sample each time", flag_values=FLAGS,
)  # fmt: skip
flags.DEFINE_bool(
    "flips", False, "encode mirrored images too; training takes either at random",
    flag_values=FLAGS,
)  # fmt: skip
flags.DEFINE_enum(
    "dtype", "float16", ["float16", "float32"], "type of the files", flag_values=FLAGS
)
flags.DEFINE_string(
    "features", "", "store features of patches too, for REPA: a model of DINOv2 with its settings, "
    "vitb14:weights=FILE[,patches_per_side=16]", flag_values=FLAGS,
)  # fmt: skip
flags.DEFINE_string(
    "text", "", "text encoder of the captions: its folder with settings, FOLDER:length=32, or the "
    "folder of a pipeline", flag_values=FLAGS,
)  # fmt: skip
flags.DEFINE_integer("seed", 0, "seed of samples", lower_bound=0, flag_values=FLAGS)
flags.DEFINE_integer(
    "shard_images", Stored.shard_images, "images of a shard", lower_bound=1, flag_values=FLAGS
)
flags.DEFINE_integer(
    "batch_size", 0, "images that are encoded together; 0 for a million pixels on each device",
    lower_bound=0, flag_values=FLAGS,
)  # fmt: skip
shared.define_processes(FLAGS)


def main(args: SimpleNamespace) -> None:
    """Encodes a data set, and prints what was written and how to train on it."""
    for name in ("codec", "out"):
        cli.require(args, name)
    codec, out = codec_called(args.codec), Path(args.out)
    dataset: DataSet = build(args.config.data, DataSet, "config.data")
    extractor = patches_called(args.features) if args.features else None
    stored = Stored(
        args.store,
        args.flips,
        args.dtype,
        args.seed,
        args.shard_images,
        extractor,
        prompts_called(args.text) if args.text else None,
    )
    in_first(lambda: make_writable(out))
    shape = codec.latent_shape(dataset.image_shape)
    if is_first():
        number = len(dataset.train) + len(dataset.test)
        print(f"{dataset.name}: {number:,} {codec.describe(shape)}, {stored.kind}, in {out}")
    with locked(out, "written", "--out"):
        new = encode(
            dataset,
            codec,
            out,
            stored,
            batch_size=args.batch_size,
            place=local_rows(),
        )
    if is_first():
        print(summary(out, new))
        print(f"train on them by --config=configs/{args.config_name}.py:latents={out}")
        if dataset.train.captions and not args.text:
            print("the captions are left out: --text=FOLDER stores their states")


def prompts_called(text: str) -> Prompts:
    """The condition of prompts whose encoder `--text` names.

    That of a pipeline is as its network takes it. An encoder alone has no token as null condition.

    Raises:
        UserError: there is no such encoder, or it has no such setting.
    """
    if not is_pipeline(place_of(text)):
        return prompts(encoder_called(text), null=None)
    condition = from_pretrained(text).parts.wired.condition
    found = getattr(condition, "parts", {}).get("text", condition)
    if not isinstance(found, Prompts):
        raise UserError(f"--text={text}: this pipeline has no text encoder")
    return found


def summary(folder: Path, new: bool) -> str:
    """What a folder of latents holds, with its statistics.

    Raises:
        UserError: its record is damaged.
    """
    facts: Any = read_json(folder / FACTS) or {}
    try:
        size = sum(file.stat().st_size for file in folder.glob("*.npy"))
        latents = "x".join(map(str, facts["latent_shape"]))
        lines = [
            f"{'wrote' if new else 'complete already:'} {facts['num_train']:,} training and "
            f"{facts['num_test']:,} test images as {facts['kind']} of {latents}, {facts['dtype']}"
            f"{', both orientations' if facts['flips'] else ''}: {size / 1e6:,.1f} MB in {folder}"
        ]
        found = facts["statistics"]
        if found:
            lines += [
                f"standard deviation {found['scalar_std']:.4g}; of each channel "
                + ", ".join(f"{x:.3g}" for x in found["std"]),
                "mean of each channel " + ", ".join(f"{x:.3g}" for x in found["mean"]),
            ]
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(f"{folder / FACTS} is damaged ({error}): encode again elsewhere") from error
    return "\n".join(lines)


USAGE = f"""{__doc__}
Configs (--config=configs/NAME.py): {", ".join(cli.config_names())}
Codecs: {", ".join(choices.CODECS)}"""

if __name__ == "__main__":
    sys.exit(cli.run(main, FLAGS, usage=USAGE))
