r"""Train an autoencoder on images, measure it, and write it for latent diffusion and for diffusers.

  python -m experiments.train_autoencoder --config=configs/autoencoder.py \
      --config.data.path=PICTURES --workdir=runs/ae
  python -m experiments.train_autoencoder --config=configs/autoencoder.py:model=kl-f8 \
      --config.data.path=PICTURES --config.adversary.weight=0.5 \
      --config.loss.perceptual.path=vgg16-397923af.pth --config.loss.perceptual.heads=vgg.pth

The same command resumes an interrupted run. What comes next:

  python -m experiments.encode_latents --config=configs/image_folder.py \
      --config.data.path=PICTURES --codec=autoencoder:path=runs/ae --out=latents
  python -m experiments.convert --from=runs/ae --to=diffusers --out=FOLDER
"""

import shlex
import sys
from pathlib import Path
from types import SimpleNamespace

from absl import flags

from diffjax.autoencoders.loop import RESULT, notes, set_up, train_autoencoder
from diffjax.codecs.autoencoders import latent_shape
from diffjax.errors import UserError
from diffjax.host.processes import is_first
from diffjax.host.run_files import read_json
from diffjax.spec import to_json
from experiments.flags import cli, shared

FLAGS = flags.FlagValues()
cli.define_config(FLAGS)
flags.DEFINE_string("workdir", None, "folder of the run; runs/NAME by default", flag_values=FLAGS)
flags.DEFINE_bool("print_config", False, "print the resolved config and stop", flag_values=FLAGS)
flags.DEFINE_bool(
    "dry_run", False, "build and check everything, print a summary, and stop", flag_values=FLAGS
)
shared.define_processes(FLAGS)
shared.define_watchdog(FLAGS)


def main(args: SimpleNamespace) -> None:
    """Trains an autoencoder, or prints its config or a summary."""
    if args.print_config:
        print(to_json(args.config), end="")
        return
    if args.dry_run:
        setup = set_up(args.config)
        sizes = latent_shape(setup.parts.autoencoder, setup.dataset.image_shape)
        images, latents = ("x".join(map(str, s)) for s in (setup.dataset.image_shape, sizes))
        print("\n".join([f"images of {images}, latents of {latents}", *notes(setup)]))
        print("all parts fit together; nothing was trained or written")
        return
    workdir = Path(args.workdir or Path("runs") / args.config.name)
    command = shlex.join(["python", "-m", "experiments.train_autoencoder", *sys.argv[1:]])
    page = train_autoencoder(args.config, workdir, command, watchdog=shared.watchdog(args))
    if is_first():
        print(f"{headline(workdir)}\nopen {page}")


def headline(workdir: Path) -> str:
    """What an autoencoder reaches, as one line.

    Raises:
        UserError: its record is damaged.
    """
    found = read_json(workdir / RESULT) or {}
    try:
        rate = f", rate {found['rate']:.3g} bits per dimension" if found["rate"] else ""
        sizes = "x".join(map(str, found["latent_shape"]))
        return (
            f"{found['num_images']:,} {found['split']} images: PSNR {found['psnr']:.2f} dB, median "
            f"{found['median_psnr']:.2f}{rate}; latents {sizes} "
            f"of mean {found['shift']:.3g} and standard deviation {1 / found['scale']:.3g}"
        )
    except (ArithmeticError, LookupError, TypeError, ValueError) as error:
        raise UserError(
            f"{workdir / RESULT} is damaged ({error}): move it away, and run the same command again"
        ) from error


if __name__ == "__main__":
    sys.exit(cli.run(main, FLAGS, usage=__doc__ or ""))
