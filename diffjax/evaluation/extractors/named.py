"""Names of the extractors for the command line; configs name the functions themselves."""

from collections.abc import Mapping

from ml_collections import ConfigDict

from diffjax import config_files
from diffjax.errors import UserError
from diffjax.evaluation.extractors.clip import clip_features, clip_folder
from diffjax.evaluation.extractors.dinov2 import dinov2_features, dinov2_patches
from diffjax.evaluation.extractors.features import Extractor, classifier_features, pixel_features
from diffjax.evaluation.extractors.inception import inception_features
from diffjax.evaluation.extractors.own_classifier import own_classifier
from diffjax.models.dinov2.sizes import SIZES
from diffjax.spec import TARGET, build, choose, parse_arguments, spec

EXTRACTORS: Mapping[str, ConfigDict] = {
    "pixels": spec(pixel_features),
    "own": spec(own_classifier),
    "digits": spec(classifier_features, name="digits"),
    "fashion_mnist": spec(classifier_features, name="fashion_mnist"),
    "inception": spec(inception_features),
    "inception_spatial": spec(inception_features, layer="spatial"),
    "clip": spec(clip_features),
    "clip_folder": spec(clip_folder),
    **{f"dinov2_{model}": spec(dinov2_features, model=model) for model in SIZES},
}


def extractor_called(name: str, **given: str | None) -> Extractor:
    """Builds the extractor with this name.

    Args:
        name: a key of `EXTRACTORS`.
        **given: `weights` and `sha256` of its file; None keeps the default.

    Raises:
        UserError: the name is unknown, the extractor has no weights, or they can't be read.

    Example:
        >>> extractor_called("pixels").name
        'pixels:8x8'
    """
    config = choose(EXTRACTORS, name, "extractor")
    settings = {key: value for key, value in given.items() if value is not None}
    for key in settings:
        if key not in config:
            raise UserError(f"the extractor {name} has no setting {key}")
    return build(ConfigDict({**config.to_dict(), **settings}))


def patches_called(text: str) -> Extractor:
    """The features of patches that a model of DINOv2 and its settings describe, for REPA.

    Args:
        text: the model and, after a colon, settings of `dinov2_patches`, such as
            `vitb14:weights=dinov2_vitb14_pretrain.pth,patches_per_side=16`.

    Raises:
        UserError: no such model or setting, or as `dinov2_patches`.
    """
    model, _, settings = text.partition(":")
    choose(SIZES, model, "model of DINOv2")
    config = ConfigDict({"features": spec(dinov2_patches, model=model)})
    known = [key for key in config.features if key not in (TARGET, "model")]
    chosen = parse_arguments(settings, *known)
    config_files.override(config, {f"config.features.{key}": x for key, x in chosen.items()})
    return build(config.features, Extractor, "features")
