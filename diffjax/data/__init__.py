"""Data sets, sources of images, and the input pipeline."""

from diffjax.data.augment import Augment
from diffjax.data.features import featured
from diffjax.data.given import GivenSource
from diffjax.data.idx import fashion_mnist, idx_images, mnist
from diffjax.data.image_folders.captions import captioned_folder
from diffjax.data.image_folders.folder import image_folder
from diffjax.data.latents import LatentSource, latents
from diffjax.data.pairs import Coarse, PairSource, TranslatedSource, pairs, translation
from diffjax.data.pipeline import (
    all_captions,
    all_examples,
    all_images,
    batches,
    eval_batches,
    to_float,
    to_uint8,
)
from diffjax.data.resolutions import downscaled, upscaling
from diffjax.data.sources import ArraySource, Batch, DataSet, Example, Source, digits
from diffjax.data.tfds import tfds_images
from diffjax.data.toys import colours, colours_distance

__all__ = [
    "ArraySource",
    "Augment",
    "Batch",
    "Coarse",
    "DataSet",
    "Example",
    "GivenSource",
    "LatentSource",
    "PairSource",
    "Source",
    "TranslatedSource",
    "all_captions",
    "all_examples",
    "all_images",
    "batches",
    "captioned_folder",
    "colours",
    "colours_distance",
    "digits",
    "downscaled",
    "eval_batches",
    "fashion_mnist",
    "featured",
    "idx_images",
    "image_folder",
    "latents",
    "mnist",
    "pairs",
    "tfds_images",
    "to_float",
    "to_uint8",
    "translation",
    "upscaling",
]
