"""Images with features of their places beside them, to which networks are aligned."""

from dataclasses import replace
from typing import Any

import numpy as np

from diffjax.data.given import GivenSource
from diffjax.data.latents import FEATURES
from diffjax.data.pipeline import all_images
from diffjax.data.sources import DataSet, Source
from diffjax.errors import UserError


def featured(data: DataSet, extractor: Any) -> DataSet:
    """A data set of images whose batches have `features [B, rows, columns, numbers]` too, for REPA.

    They are computed once, when the data are read, and lie in memory as float32, with the images:
    16x16x768 numbers are 0.8 MB an image. Of larger data sets `experiments.encode_latents` stores
    them. They are of the images as they are, so that training takes no augmentation.

    Args:
        data: a data set of images.
        extractor: what returns features of places
            (`diffjax.evaluation.extractors.dinov2.dinov2_patches`).

    Raises:
        UserError: the features are not of places, or the data are latents, whose features are to be
            stored with them.
    """
    if not data.codec.pixels:
        raise UserError(
            f"{data.name} are latents: their features are stored with them, by python -m "
            "experiments.encode_latents --features"
        )
    _ = feature_shape(extractor, data)

    def with_features(source: Source) -> Source:
        if not len(source):
            return source
        return GivenSource(source, {FEATURES: extractor.features(all_images(source)[0])})

    return replace(data, train=with_features(data.train), test=with_features(data.test))


def feature_shape(extractor: Any, data: DataSet) -> tuple[int, int, int]:
    """Rows, columns and numbers of the features of an image.

    Raises:
        UserError: these are no features of places in an image.
    """
    one = extractor.features(np.zeros((1, *data.image_shape), np.float32))
    if one.ndim != 4:
        raise UserError(
            f"{extractor.name} returns {list(one.shape[1:])} for an image, and features to align "
            "with are [rows, columns, numbers]: take those of patches, as dinov2_patches"
        )
    return one.shape[1:]
