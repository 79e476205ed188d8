"""The config that tunes a published pipeline on pictures with captions."""

from dataclasses import replace

from ml_collections import ConfigDict

from diffjax.conditions import Condition, Several
from diffjax.errors import UserError
from diffjax.exchange.pipelines import is_pipeline, part_of, texts_of
from diffjax.exchange.pretrained import described
from diffjax.host.files import place_of
from diffjax.spec import as_spec, spec
from diffjax.text import Prompts
from diffjax.tuning.captioned import captioned_latents
from diffjax.tuning.prior import Prior


def tuning_config(folder: str, arguments: str = "") -> ConfigDict:
    """A config that goes on training the network of a pipeline.

    Network, path, target, training times, text encoders, codec and how samples are drawn are those
    of the folder: of its networks' configs, and of its scheduler's. Training goes on with its
    weights.

    Args:
        folder: the folder of a pipeline, as diffusers saves it.
        arguments: choices on the axes of a config, in the place of the folder's: `target=v` keeps
            its path, and `objective=flow` keeps nothing of its scheduler.

    Returns:
        The config, which is not locked.

    Raises:
        UserError: there is no such folder, a part of it is missing or not known here, it has no
            text encoder, or there is no such choice.

    Example:
        `config = tuning_config("stable-diffusion-v1-5", "objective=v")`
    """
    if not folder:
        raise UserError(
            "this config begins with a published pipeline: --config.init_from=FOLDER, a folder "
            "as diffusers saves it"
        )
    place = place_of(folder)
    if not is_pipeline(place):
        raise UserError(
            f"config.init_from={folder} is no pipeline: a folder with model_index.json, as "
            "diffusers saves it"
        )
    if not texts_of(place):
        raise UserError(f"config.init_from={folder} has no text encoder, which captions need")
    for name in ("vae", "scheduler"):
        part_of(place, name)
    there = described(place, arguments=arguments)
    config = there.config
    height, _, _ = there.codec.image_shape(there.denoiser.image_shape)
    config.data = spec(
        captioned_latents,
        image_size=height,
        prior=spec(Prior, pipeline=folder),
        codec=as_spec(there.codec),
        given=as_spec(_checked(there.condition)),
    )
    config.name = "-".join(["finetune", place.resolve().name, *_names(arguments)])
    config.init_from = folder
    return config


def _checked(condition: Condition) -> Condition:
    """The condition with the hash of its text encoders, by which sampling checks them."""
    if isinstance(condition, Several):
        return replace(condition, parts={n: _checked(x) for n, x in condition.parts.items()})
    if not isinstance(condition, Prompts):
        return condition
    return replace(condition, sha256=condition.encoder.sha256)


def _names(arguments: str) -> list[str]:
    """The choices of arguments, for the name of the run's folder."""
    return [pair.partition("=")[2].replace("/", "-") for pair in arguments.split(",") if pair]
