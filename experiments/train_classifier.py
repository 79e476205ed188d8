r"""Train the small classifier that evaluation uses, and write it as one .npz file.

    python -m experiments.train_classifier --config=configs/image_folder.py \
        --config.data.path=FOLDER

trains it on one's own classes. Its file goes to ~/.cache/diffjax/classifiers, where evaluations of
these data find it (`diffjax.evaluation.extractors.own_classifier`). The shipped ones are made by

    python -m experiments.train_classifier --dataset=digits --out=digits.npz
    python -m experiments.train_classifier --dataset=fashion_mnist --path=FOLDER

The test split is used once, at the end: training selects nothing on it. A file to ship belongs in
diffjax/evaluation/extractors/weights/, and its sha256 in classifier.py.
"""

import hashlib
import math
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from absl import flags
from tqdm import tqdm

from diffjax.data import DataSet, all_images, digits, fashion_mnist
from diffjax.errors import UserError, nearest
from diffjax.evaluation.extractors.classifier import Classifier, classifier_to_npz, decode
from diffjax.evaluation.extractors.own_classifier import CACHE, file_for
from diffjax.host.files import write_whole
from diffjax.host.storage import make_writable
from diffjax.spec import build
from experiments.flags import cli

FLAGS = flags.FlagValues()
cli.define_config(FLAGS, optional=True)
flags.DEFINE_string(
    "dataset", "digits", "digits or fashion_mnist, if there is no --config", flag_values=FLAGS
)
flags.DEFINE_string("path", "", "folder of the data set's files, if any", flag_values=FLAGS)
flags.DEFINE_string(
    "out", "", "file to write; by default <dataset>.npz, and with --config where evaluation looks",
    flag_values=FLAGS,
)  # fmt: skip
flags.DEFINE_integer("seed", 0, "seed of initialisation, order, augmentation", flag_values=FLAGS)


@dataclass(frozen=True)
class Recipe:
    """The training recipe of a classifier.

    Attributes:
        widths, patches, num_features: settings of the `Classifier`.
        num_epochs: passes over the train split.
        batch_size_images: images per step.
        learning_rate: peak of a one-cycle cosine schedule (AdamW).
        max_shift_pixels, max_rotation_degrees, max_scale, max_noise: bounds of the augmentation;
            shift in pixels, scale as a share, noise as standard deviation on the [-1, 1] range.
        max_erased_pixels: longest side of a rectangle that is replaced by a uniform grey, in half
            of the images (random erasing, Zhong et al. 2017); 0 disables it.
        flip: whether to mirror half of the images.
    """

    widths: tuple[int, ...]
    patches: tuple[int, ...]
    num_features: int
    num_epochs: int
    batch_size_images: int
    learning_rate: float
    max_shift_pixels: float
    max_rotation_degrees: float
    max_scale: float
    max_noise: float
    max_erased_pixels: int
    flip: bool


RECIPES = {
    "digits": Recipe(
        widths=(24, 48),
        patches=(1, 2),
        num_features=64,
        num_epochs=80,
        batch_size_images=64,
        learning_rate=3e-3,
        max_shift_pixels=0.75,
        max_rotation_degrees=12.0,
        max_scale=0.1,
        max_noise=0.15,
        max_erased_pixels=0,
        flip=False,
    ),
    "fashion_mnist": Recipe(
        widths=(32, 64, 128),
        patches=(2, 2, 2),
        num_features=128,
        num_epochs=14,
        batch_size_images=128,
        learning_rate=2e-3,
        max_shift_pixels=1.5,
        max_rotation_degrees=5.0,
        max_scale=0.06,
        max_noise=0.1,
        max_erased_pixels=12,
        flip=True,
    ),
}
IMAGES_SEEN = 96_000  # the fewest in the training of one's own classifier
_LARGEST_BYTES = 2**30  # of images in memory
DATASETS: dict[str, Callable[[str], DataSet]] = {
    "digits": lambda path: digits(),
    "fashion_mnist": lambda path: fashion_mnist(path=path) if path else fashion_mnist(),
}


def own_recipe(image_shape: tuple[int, int, int], num_images: int, flip: bool) -> Recipe:
    """The recipe for any images: stages down to maps of 4 to 6 pixels, bounds by the side.

    Example:
        >>> own_recipe((28, 28, 1), 60_000, flip=True).patches
        (2, 2, 2)
        >>> own_recipe((8, 8, 3), 900, flip=True).patches
        (1, 2)
    """
    side = max(image_shape[:2])
    patches = [1 if side <= 16 else 2 if side <= 64 else 4]
    left = -(-side // patches[0])
    while left > 6:
        patches.append(2)
        left = -(-left // 2)
    return Recipe(
        widths=tuple(min(32 * 2**stage, 128) for stage in range(len(patches))),
        patches=tuple(patches),
        num_features=128,
        num_epochs=max(14, -(-IMAGES_SEEN // num_images)),
        batch_size_images=min(64, num_images),
        learning_rate=2e-3,
        max_shift_pixels=side / 16,
        max_rotation_degrees=8.0,
        max_scale=0.08,
        max_noise=0.1,
        max_erased_pixels=side // 4,
        flip=flip,
    )


def augment(key: jax.Array, images: jax.Array | np.ndarray, recipe: Recipe) -> jax.Array:
    """Shifts, rotates, scales and mirrors images at random, and adds noise.

    Args:
        key: random key.
        images: `[B, H, W, C]` in [-1, 1].
        recipe: the recipe with the bounds.
    """
    batch, height, width, _ = images.shape
    keys = jax.random.split(key, 8)
    # Interpolation blurs; half of the images are not moved, so that training includes sharp ones.
    moves = jax.random.bernoulli(keys[0], shape=(batch,)).astype(jnp.float32)
    uniform = partial(jax.random.uniform, minval=-1.0, maxval=1.0)
    shift = recipe.max_shift_pixels * moves[:, None] * uniform(keys[1], (batch, 2))
    angle = jnp.deg2rad(recipe.max_rotation_degrees) * moves * uniform(keys[2], (batch,))
    scale = 1.0 + recipe.max_scale * moves * uniform(keys[3], (batch,))
    mirror = jnp.where(recipe.flip & jax.random.bernoulli(keys[4], shape=(batch,)), -1.0, 1.0)
    rows, columns = jnp.meshgrid(
        jnp.arange(height) - (height - 1) / 2, jnp.arange(width) - (width - 1) / 2, indexing="ij"
    )

    def move(image, shift, angle, scale, mirror):
        y = (jnp.cos(angle) * rows - jnp.sin(angle) * columns) * scale + shift[0]
        x = (jnp.sin(angle) * rows + jnp.cos(angle) * columns) * scale * mirror + shift[1]
        where = [y + (height - 1) / 2, x + (width - 1) / 2]
        sample = partial(
            jax.scipy.ndimage.map_coordinates, coordinates=where, order=1, mode="nearest"
        )
        return jax.vmap(sample, in_axes=-1, out_axes=-1)(image)

    level = recipe.max_noise * jax.random.uniform(keys[5], (batch, 1, 1, 1))
    moved = jax.vmap(move)(images, shift, angle, scale, mirror)
    if recipe.max_erased_pixels:
        moved = erase(keys[7], moved, recipe.max_erased_pixels)
    return jnp.clip(moved + level * jax.random.normal(keys[6], images.shape), -1.0, 1.0)


def erase(key: jax.Array, images: jax.Array | np.ndarray, max_pixels: int) -> jax.Array:
    """Replaces a random rectangle by a random grey in half of the images `[B, H, W, C]`."""
    batch, height, width, _ = images.shape
    chosen_key, side_key, place_key, grey_key = jax.random.split(key, 4)
    chosen = jax.random.bernoulli(chosen_key, shape=(batch, 1))
    sides = jax.random.randint(side_key, (batch, 2), 1, max_pixels + 1)
    corners = jax.random.uniform(place_key, (batch, 2)) * (jnp.array([[height, width]]) - sides + 1)
    corners = corners.astype(jnp.int32)

    def inside(length, axis):
        place = jnp.arange(length)[None] - corners[:, axis, None]
        return (place >= 0) & (place < sides[:, axis, None])

    rows, columns = inside(height, 0) & chosen, inside(width, 1)
    grey = jax.random.uniform(grey_key, (batch, 1, 1, 1), minval=-1.0, maxval=1.0)
    return jnp.where((rows[:, :, None] & columns[:, None, :])[..., None], grey, images)


def fit(images: np.ndarray, labels: np.ndarray, recipe: Recipe, num_classes: int, seed: int):
    """Trains on images `[N, H, W, C]` in [-1, 1]; returns the network and averaged parameters."""
    network = Classifier(num_classes, recipe.widths, recipe.patches, recipe.num_features)
    init_key, order_key, augment_key = jax.random.split(jax.random.key(seed), 3)
    params = jax.jit(network.init)(init_key, images[:1])["params"]
    steps_per_epoch = len(images) // recipe.batch_size_images
    num_steps = recipe.num_epochs * steps_per_epoch
    schedule = optax.cosine_onecycle_schedule(num_steps, recipe.learning_rate, pct_start=0.15)
    optimizer = optax.adamw(schedule, weight_decay=0.02)
    # An average over about the last tenth of the training.
    decay = 1.0 - 10.0 / num_steps

    def loss_of(params, batch, labels):
        logits, _ = network.apply({"params": params}, batch)
        return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()

    @partial(jax.jit, donate_argnums=0)
    def step(state, key, batch, labels):
        params, average, opt_state = state
        loss, gradient = jax.value_and_grad(loss_of)(params, augment(key, batch, recipe), labels)
        updates, opt_state = optimizer.update(gradient, opt_state, params)
        params = optax.apply_updates(params, updates)
        average = optax.incremental_update(params, average, 1.0 - decay)
        return (params, average, opt_state), loss

    state = (params, jax.tree.map(jnp.copy, params), optimizer.init(params))
    progress = tqdm(total=num_steps, unit=" steps")
    for epoch in range(recipe.num_epochs):
        epoch_key = jax.random.fold_in(order_key, epoch)
        order = np.asarray(jax.random.permutation(epoch_key, len(images)))
        loss = jnp.zeros(())
        for start in range(steps_per_epoch):
            rows = order[start * recipe.batch_size_images :][: recipe.batch_size_images]
            key = jax.random.fold_in(augment_key, epoch * steps_per_epoch + start)
            state, loss = step(state, key, images[rows], labels[rows])
            progress.update()
        progress.set_postfix(epoch=epoch + 1, loss=f"{float(loss):.4f}")
    progress.close()
    return network, state[1]


def rescale(network: Classifier, params: Any, images: np.ndarray) -> Any:
    """Rescales the features to a mean square near 1, so that distances have a usual magnitude.

    ReLU is homogeneous: the hidden layer is divided by a factor and the output layer multiplied by
    it, so the logits do not change. The factor is a power of two, so nothing is rounded.
    """
    _, features = outputs(network, params, images)
    scale = 2.0 ** np.round(0.5 * np.log2(np.mean(features**2)))
    hidden, output = (f"Dense_{len(network.widths) + layer}" for layer in (0, 1))
    smaller = jax.tree.map(lambda leaf: leaf / scale, params[hidden])
    larger = params[output] | {"kernel": params[output]["kernel"] * scale}
    return params | {hidden: smaller, output: larger}


def outputs(network: Classifier, params: Any, images: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Logits and features of any number of images, in batches of about a thousand."""
    apply = jax.jit(lambda batch: network.apply({"params": params}, batch))
    blocks = np.array_split(images, max(1, len(images) // 1000))
    logits, features = zip(*(jax.device_get(apply(block)) for block in blocks), strict=True)
    return np.concatenate(logits), np.concatenate(features)


def accuracy(network: Classifier, params: Any, images: np.ndarray, labels: np.ndarray) -> float:
    """Accuracy: the share of images whose largest logit is their label."""
    return float((outputs(network, params, images)[0].argmax(-1) == labels).mean())


def wanted(args: SimpleNamespace) -> tuple[DataSet, Recipe, Path, str]:
    """The data set, the recipe, the file to write, and the command that makes it again.

    Raises:
        UserError: there is no such data set or recipe, or its images have no classes.
    """
    command = "python -m experiments.train_classifier"
    if not args.config:
        name = args.dataset
        if name not in RECIPES:
            raise UserError(
                f"no recipe for the data set {name!r}; {nearest(name, RECIPES)}, or set --config"
            )
        dataset, out = DATASETS[name](args.path), Path(args.out or f"{name}.npz")
        return dataset, RECIPES[name], out, f"{command} --dataset={name} --seed={args.seed}"
    dataset = build(args.config.data, DataSet, "config.data")
    if not dataset.codec.pixels:
        raise UserError(f"{dataset.name} are latents: name the config of their images")
    if dataset.num_classes < 2:
        raise UserError(
            f"{dataset.name} has {dataset.condition.describe()}: a classifier needs classes"
        )
    if not len(dataset.test):
        raise UserError(
            f"{dataset.name} has no test images, on which accuracy is measured: set test_fraction"
        )
    cache = args.config.evaluation.extractor.get("cache", CACHE)
    out = Path(args.out) if args.out else file_for(dataset, cache)
    flip = args.config.augment.get("flip_probability", 0) > 0
    recipe = own_recipe(dataset.image_shape, len(dataset.reference), flip)
    return dataset, recipe, out, f"{command} --config=configs/{args.config_name}.py"


def main(args: SimpleNamespace) -> None:
    """Trains a classifier, measures its accuracy, writes its file, and prints its hash."""
    dataset, recipe, out, command = wanted(args)
    make_writable(out.parent)
    real = dataset.reference
    most = _LARGEST_BYTES // (4 * math.prod(dataset.image_shape))
    images, labels = all_images(real, limit_images=most)
    test_images, test_labels = all_images(dataset.test, limit_images=most)
    print(f"training on {len(images):,} images of {dataset.name}, {dataset.num_classes} classes")
    start = time.monotonic()
    network, params = fit(images, labels, recipe, dataset.num_classes, args.seed)
    params = rescale(network, params, images)
    metadata = {
        "dataset": dataset.name,
        "train_sha256": real.fingerprint(),
        "num_train_images": len(images),
        "test_sha256": dataset.test.fingerprint(),
        "num_test_images": len(test_images),
        "image_shape": list(dataset.image_shape),
        "recipe": asdict(recipe),
        "seed": args.seed,
        "command": command,
    }
    # Measured with the parameters of the file, which are float16.
    stored = decode(str(out), classifier_to_npz(network, params, metadata)).params
    metadata["test_accuracy"] = accuracy(network, stored, test_images, test_labels)
    in_float32 = accuracy(network, params, test_images, test_labels)
    data = classifier_to_npz(network, params, metadata)
    write_whole(out, data)
    print(
        f"test accuracy {metadata['test_accuracy']:.4f} on {len(test_images)} images"
        f" ({in_float32:.4f} before rounding to float16)"
    )
    print(f"wrote {out}: {len(data)} bytes, {time.monotonic() - start:.0f} s of training")
    print(f"sha256 {hashlib.sha256(data).hexdigest()}")
    if args.config and not args.out:
        print(
            "evaluations of these data use it where the extractor is own_classifier, as in "
            "configs/image_folder.py, or by --extractor=own"
        )


if __name__ == "__main__":
    sys.exit(cli.run(main, FLAGS, usage=__doc__ or ""))
