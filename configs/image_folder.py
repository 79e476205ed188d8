"""Any folder of images: a subfolder a class, `train` and `val`, a table of labels, or none.

    python -m experiments.train --config=configs/image_folder.py --config.data.path=FOLDER

The folder decides what no flag sets: the size of the images (the side that nine of ten have, in
steps of 8, at most 64), the U-Net (smaller for fewer than 2,000 images), the number of steps (each
image 2,000 times, at most 100,000), guidance (none without classes) and the number of samples that
are evaluated. `--dry_run` reports what was chosen and why, and reads some of the images. `dit` is
`DiT-S/2`.

The Fréchet distance is on averaged pixels, which is a weak measure, until `python -m
experiments.train_classifier` with the same flags has trained a classifier of the classes; then it
is on its features, and there is an accuracy. `experiments.evaluate --extractor=inception` has
others (docs/evaluation.md).
"""

from typing import Any

from ml_collections import ConfigDict

from diffjax.choices import Table
from diffjax.data import image_folder
from diffjax.data.image_folders.headers import Headers
from diffjax.data.image_folders.listing import LABEL, Listing, list_images
from diffjax.defaults import experiment, suiting_steps
from diffjax.errors import whole_number
from diffjax.evaluation.extractors.own_classifier import own_classifier
from diffjax.host.files import place_of
from diffjax.models import ADM, DiT, UNet, adm, dit
from diffjax.models.ddpm import DDPMUNet
from diffjax.optimizers.descent import descent
from diffjax.spec import spec

IMAGE_SIZE, BATCH_SIZE, MOST_STEPS = 64, 64, 100_000
FEW_IMAGES = 2_000


def unet(image_size: int, num_images: int, buckets: bool) -> ConfigDict:
    """A U-Net down to maps of 8 to 16 pixels, with attention there.

    In buckets maps of one level have several heights, so attention is in the middle alone.
    """
    sides = [image_size]
    while sides[-1] % 2 == 0 and (
        len(sides) == 1 or sides[-1] > 16 or (sides[-1] > 8 and len(sides) < 3)
    ):
        sides.append(sides[-1] // 2)
    channels = 32 if num_images < FEW_IMAGES else 64
    return spec(
        UNet,
        channels=channels,
        channel_multipliers=(1, *[2] * (len(sides) - 1)),
        num_res_blocks=2,
        attention_resolutions=() if buckets else tuple(side for side in sides if side <= 16),
        head_channels=channels,
    )


def models(
    image_size: int = IMAGE_SIZE, num_images: int = FEW_IMAGES, buckets: bool = False
) -> Table:
    """The networks by name."""
    return {
        "unet": unet(image_size, num_images, buckets),
        "dit": spec(DiT, **dit.SIZES["DiT-S/2"].settings),
        "DDPM-256": spec(DDPMUNet, channel_multipliers=(1, 1, 2, 2, 4, 4), dropout=0.0),
        **{name: spec(ADM, **size.of_network) for name, size in adm.SIZES.items()},
        **{name: spec(DiT, **size.settings) for name, size in dit.SIZES.items()},
    }


def get_config(
    arguments: str = "",
    *,
    data_path: str = "",
    data_image_size: Any = "",
    data_labels: str = "",
    data_label_column: str = LABEL,
    data_buckets: Any = "",
) -> ConfigDict:
    """Axes: objective, path, target, weight, times, model, optimizer, schedule.

    Models: unet, dit, DDPM-256, ADM-64 … ADM-512, DiT-S/2 … DiT-XL/8.
    """
    data = spec(image_folder)
    data.update(path=data_path or data.path, labels=data_labels, label_column=data_label_column)
    root = place_of(data.path)
    pictures: Listing | None = None
    if root.is_dir() and "latents=" not in arguments:
        pictures = list_images(root, data_labels, data_label_column)
        data.image_size = Headers.of(root, pictures.files).suited_size
    # What is no number is refused as a flag.
    data.image_size = whole_number(str(data_image_size)) or data.image_size
    num_images = len(pictures.files) if pictures else FEW_IMAGES
    config = experiment(
        f"image_folder-{root.resolve().name}" if data_path else "image_folder",
        arguments,
        data=data,
        extractor=spec(own_classifier),
        models=models(data.image_size, num_images, str(data_buckets) not in ("", "0")),
        model="unet",
        optimizer=spec(descent, learning_rate=2e-4),
        guidance_scale=2.0 if pictures is None or len(pictures.names) > 1 else 1.0,
    )
    config.num_steps, config.batch_size = MOST_STEPS, BATCH_SIZE
    config.augment.flip_probability = 0.5
    if pictures:
        num_train = pictures.num_train or round(num_images * (1 - data.get("test_fraction", 0.0)))
        config.num_steps = min(suiting_steps(num_train, BATCH_SIZE), MOST_STEPS)
        config.evaluation.num_samples = min(max(num_train, 100), config.evaluation.num_samples)
    return config
