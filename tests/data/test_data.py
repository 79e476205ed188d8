"""The data sets and the training stream: what is promised about order, and every message."""

import contextlib
import gzip
import hashlib
import io
import itertools
import json
import os
import shutil
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import EpsImagePlugin, Image

from diffjax.data import (
    ArraySource,
    Augment,
    Source,
    all_images,
    batches,
    colours,
    colours_distance,
    digits,
    eval_batches,
    fashion_mnist,
    idx_images,
    image_folder,
    mnist,
    pipeline,
    tfds_images,
    to_float,
    to_uint8,
)
from diffjax.data.augment import UNIFORMS_PER_IMAGE
from diffjax.data.fingerprints import evenly, hash_parts
from diffjax.data.image_folders.damaged import PassingOver
from diffjax.data.image_folders.folder import read_image
from diffjax.data.randomness import permutation, random_bits, uniforms
from diffjax.errors import UserError
from diffjax.evaluation.scores.distances import frechet_distance, statistics


def numbered(num_images: int) -> ArraySource:
    """Images that contain their row number, in two pixels and in the label."""
    rows = np.arange(num_images)
    images = np.stack([rows // 256, rows % 256], axis=-1).astype(np.uint8)
    return ArraySource(images.reshape(num_images, 1, 2, 1), rows.astype(np.int32))


def steps(source, first, last, **options: Any):
    """Batches `first` … `last − 1`, as a list."""
    options = {"batch_size": 8, "seed": 0, **options}
    return list(itertools.islice(batches(source, start_step=first, **options), last - first))


def assert_same(actual, expected):
    assert len(actual) == len(expected)
    for one, other in zip(actual, expected, strict=True):
        np.testing.assert_array_equal(one["image"], other["image"])
        np.testing.assert_array_equal(one["label"], other["label"])


def gathered(source, rows=None):
    """Images and labels at `rows`, or all."""
    batch = source.gather(range(len(source)) if rows is None else rows)
    return batch["image"], batch["label"]


def message(call, *args, **kwargs) -> str:
    """The one line of a `UserError`."""
    with pytest.raises(UserError) as caught:
        call(*args, **kwargs)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def outcome(call):
    """The result of `call` and "", or None and the message of its `UserError`."""
    try:
        return call(), ""
    except UserError as error:
        return None, str(error)


# The stream.


def test_images_stay_with_their_labels_and_types():
    batch = steps(numbered(300), 0, 1)[0]
    assert batch["image"].shape == (8, 1, 2, 1)
    assert batch["image"].dtype == np.float32
    assert batch["label"].dtype == np.int32
    pixels = np.rint((batch["image"].reshape(8, 2) + 1) * 127.5)
    np.testing.assert_array_equal(pixels @ [256, 1], batch["label"])


@pytest.mark.parametrize("num_images", [3, 8, 30])  # smaller than, equal to, larger than a batch
@pytest.mark.parametrize("threads", [0, 1, 4])
def test_a_restart_continues(num_images, threads, monkeypatch):
    source, options = numbered(num_images), {"augment": Augment(0.5, 1)}
    whole = steps(source, 0, 12, **options)
    parts = steps(source, 0, 5, **options)
    monkeypatch.setattr(pipeline, "_READING", (threads, 4))
    assert_same(parts + steps(source, 5, 12, **options), whole)


@pytest.mark.parametrize("process_count", [2, 4])
def test_the_global_batch_does_not_depend_on_the_number_of_processes(process_count):
    options = {"augment": Augment(0.5, 1), "batch_size": 12, "seed": 3}
    whole = steps(numbered(30), 2, 9, **options)
    per_process = [
        steps(numbered(30), 2, 9, part=(p, process_count), **options) for p in range(process_count)
    ]
    joined = [
        {key: np.concatenate([part[key] for part in parts]) for key in ("image", "label")}
        for parts in zip(*per_process, strict=True)
    ]
    assert_same(joined, whole)


@pytest.mark.parametrize(("num_images", "batch_size"), [(30, 8), (8, 8), (3, 8), (64, 16)])
def test_each_epoch_has_every_image_once_in_a_new_order(num_images, batch_size):
    num_steps = -(-4 * num_images // batch_size)
    stream = steps(numbered(num_images), 0, num_steps, batch_size=batch_size)
    labels = np.concatenate([batch["label"] for batch in stream])[: 4 * num_images]
    epochs = labels.reshape(4, num_images)
    np.testing.assert_array_equal(np.sort(epochs), np.tile(np.arange(num_images), (4, 1)))
    if num_images > 3:  # of 3 images, epochs repeat by chance
        assert len({tuple(epoch) for epoch in epochs}) == 4


def test_the_order_is_random():
    """Position and image are uncorrelated, and consecutive seeds give unrelated orders."""
    num = 10_000
    orders = np.array([permutation((seed, 0), num) for seed in range(4)] + [np.arange(num)])
    correlations = np.corrcoef(orders)[~np.eye(5, dtype=bool)]
    assert np.abs(correlations).max() < 5 / np.sqrt(num)


def test_seeds_and_epochs_differ():
    one, other = (np.concatenate([b["label"] for b in steps(numbered(64), 0, 8, seed=s)])
                  for s in (0, 1))  # fmt: skip
    assert not np.array_equal(one, other)
    next_epoch = np.concatenate([b["label"] for b in steps(numbered(64), 8, 16, seed=0)])
    assert not np.array_equal(other, next_epoch)


def test_the_stream_does_not_change_between_versions():
    """Philox4x64-10 of the Random123 paper: its known answer for key 0 and counter 0."""
    known = [0x16554D9ECA36314C, 0xDB20FE9D672D0FDC, 0xD7E772CEE186176B, 0x7E68B68AEC7BA23B]
    # NumPy counts up before the first block: the block of counter 0 is the one before.
    philox = np.random.Philox(key=0, counter=2**256 - 1)
    assert [int(word) for word in philox.random_raw(4)] == known
    following = [int(word) for word in philox.random_raw(4)]
    assert [int(word) for word in random_bits((0, 0), 0, 4)] == following


def test_starting_late_costs_nothing():
    """Were the steps before it computed, this would take years."""
    late = steps(numbered(1000), 10**12, 10**12 + 1)
    assert late[0]["label"].shape == (8,)


def test_sources_one_by_one_and_by_arrays_are_the_same_stream():
    class OneByOne(Source):
        def __len__(self):
            return 30

        def __getitem__(self, index):
            return numbered(30)[index]

        def fingerprint(self):
            return "numbered"

    assert_same(steps(OneByOne(), 3, 9), steps(numbered(30), 3, 9))


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"part": (0, 3)}, "batch_size=8 does not divide into 3 parts"),
        ({"batch_size": 0}, "batch_size=0"),
        ({"part": (2, 2)}, "part=(2, 2): 2 is not one of 2 parts"),
        ({"seed": -1}, "seed=-1"),
        ({"start_step": -1}, "start_step=-1"),
    ],
)
def test_impossible_streams(options, says):
    assert says in message(batches, numbered(9), **({"batch_size": 8, "seed": 0} | options))


def test_an_empty_source():
    assert "no training images" in message(batches, numbered(0), batch_size=1, seed=0)
    assert "no images" in message(all_images, numbered(0))


# Augmentation.


def test_uniforms_depend_on_the_place_in_the_stream_only():
    table = uniforms((7, 1), 0, (100, UNIFORMS_PER_IMAGE))
    np.testing.assert_array_equal(uniforms((7, 1), 40, (9, UNIFORMS_PER_IMAGE)), table[40:49])
    assert table.min() >= 0
    assert table.max() < 1
    assert len(np.unique(table)) == table.size


def test_uniforms_are_uniform():
    table = uniforms((0, 0), 0, (20_000, UNIFORMS_PER_IMAGE))
    counts = np.apply_along_axis(lambda column: np.histogram(column, 10, (0, 1))[0], 0, table)
    chi2 = ((counts - 2000) ** 2 / 2000).sum(0)  # 9 degrees of freedom: 99.9999 % below 45
    assert chi2.max() < 45
    assert np.abs(np.corrcoef(table.T) - np.eye(UNIFORMS_PER_IMAGE)).max() < 5 / np.sqrt(20_000)


def random_images(shape=(64, 5, 6, 3)):
    return np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)


def table(num_images=64):
    return uniforms((1, 0), 0, (num_images, UNIFORMS_PER_IMAGE))


def test_no_augmentation_is_the_identity():
    np.testing.assert_array_equal(Augment()(random_images(), table()), random_images())


def test_flips():
    images = random_images()
    np.testing.assert_array_equal(Augment(1.0)(images, table()), images[:, :, ::-1])
    some = Augment(0.25)(random_images((4000, 1, 2, 1)), table(4000))
    flipped = (some != random_images((4000, 1, 2, 1))).any((1, 2, 3)).mean()
    assert abs(flipped - 0.25) < 0.04  # 5 standard errors, and 1 in 256 is symmetric


def test_shifts_by_hand():
    """Uniforms 0 and just below 1 are the extremes: up and left, down and right, by two."""
    image = np.arange(12, dtype=np.uint8).reshape(1, 3, 4, 1)
    lowest = Augment(max_shift_pixels=2)(image, np.zeros((1, 8)))[0, :, :, 0]
    np.testing.assert_array_equal(lowest, [[10, 11, 11, 11]] * 3)
    highest = Augment(max_shift_pixels=2)(image, np.full((1, 8), 1 - 2.0**-53))[0, :, :, 0]
    np.testing.assert_array_equal(highest, [[0, 0, 0, 1]] * 3)


def test_shifts_are_uniform_and_independent():
    """A single bright pixel shows where its image went."""
    images = np.zeros((18_000, 5, 5, 1), np.uint8)
    images[:, 2, 2] = 255
    shifted = Augment(max_shift_pixels=1)(images, table(18_000))
    counts = (shifted[..., 0] == 255).sum(0)
    assert counts.sum() == 18_000
    assert np.abs(counts[1:4, 1:4] - 2000).max() < 5 * np.sqrt(2000)


def test_augmenting_leaves_the_source_alone():
    source = numbered(16)
    before = source.images.copy()
    steps(source, 0, 4, augment=Augment(1.0, 1))
    np.testing.assert_array_equal(source.images, before)


def test_any_callable_augments():
    negative = steps(numbered(30), 0, 3, augment=lambda images, uniforms: 255 - images)
    for one, other in zip(negative, steps(numbered(30), 0, 3), strict=True):
        np.testing.assert_allclose(one["image"], -other["image"], atol=1e-6)


@pytest.mark.parametrize("options", [{"flip_probability": 1.5}, {"max_shift_pixels": -1}])
def test_impossible_augmentations(options):
    (name,) = options
    assert name in message(Augment, **options)


# Evaluation and conversion.


def test_all_values_survive_the_round_trip():
    values = np.arange(256, dtype=np.uint8)
    floats = to_float(values)
    assert floats.dtype == np.float32
    np.testing.assert_allclose(floats, np.arange(256) / 127.5 - 1, atol=1e-7)
    np.testing.assert_array_equal(to_uint8(floats), values)


def test_to_uint8_rounds_to_the_nearest_and_clips():
    x = np.linspace(-1, 1, 10_001, dtype=np.float32)
    assert np.abs(to_float(to_uint8(x)) - x).max() <= 1 / 255 + 1e-6
    np.testing.assert_array_equal(to_uint8(np.array([-9.0, 9.0])), [0, 255])


@pytest.mark.parametrize("batch_size", [1, 7, 100])
def test_evaluation_sees_every_image_once_in_order(batch_size):
    labels = [b["label"] for b in eval_batches(numbered(30), batch_size=batch_size)]
    np.testing.assert_array_equal(np.concatenate(labels), np.arange(30))


def test_a_limit_spreads_over_the_set():
    images, labels = all_images(numbered(30), limit_images=10)
    assert images.shape == (10, 1, 2, 1)
    np.testing.assert_array_equal(labels, np.arange(0, 30, 3))
    assert len(all_images(numbered(30), limit_images=99)[1]) == 30


# Sources in memory.


def test_fingerprints_notice_a_pixel_a_label_and_a_shape():
    def source(pixel=0, label=0, shape=(4, 2, 3, 1)):
        images, labels = np.zeros(shape, np.uint8), np.zeros(shape[0], np.int32)
        images.flat[-1], labels[-1] = pixel, label
        return ArraySource(images, labels)

    changed = [source(), source(1), source(label=1), source(shape=(4, 3, 2, 1))]
    assert len({s.fingerprint() for s in changed}) == 4
    assert source().fingerprint() == source().fingerprint()


@pytest.mark.parametrize(
    ("images", "labels"),
    [
        (np.zeros((3, 2, 2, 1)), np.zeros(3, np.int32)),
        (np.zeros((3, 2, 2), np.uint8), np.zeros(3, np.int32)),
        (np.zeros((3, 2, 2, 1), np.uint8), np.zeros(4, np.int32)),
        (np.zeros((3, 2, 2, 1), np.uint8), np.zeros(3)),
    ],
)
def test_impossible_arrays(images, labels):
    assert "must be" in message(ArraySource, images, labels)


def test_digits():
    """Against scikit-learn's own array: nothing lost, nothing twice, labels kept."""
    from sklearn.datasets import load_digits

    data = digits()
    loaded: Any = load_digits()
    parts = zip(gathered(data.train), gathered(data.test), strict=True)
    images, labels = (np.concatenate(part) for part in parts)
    values = images.reshape(-1, 64) * (16 / 255)
    restored = np.rint(values)
    assert np.abs(values - restored).max() <= 16 / 255 / 2 + 1e-9

    def as_set(pixels, labels):
        return sorted((*row, label) for row, label in zip(pixels.tolist(), labels, strict=True))

    assert as_set(restored, labels.tolist()) == as_set(loaded.data, loaded.target.tolist())
    counts = np.bincount(gathered(data.test)[1])
    np.testing.assert_allclose(counts, np.bincount(loaded.target) * 0.2, atol=0.5)
    assert data.describe() == digits().describe()
    assert data.test.fingerprint() != digits(split_seed=1).test.fingerprint()


@pytest.mark.parametrize("fraction", [1.0, -1.0])
def test_impossible_fractions(fraction):
    assert "test_fraction" in message(digits, test_fraction=fraction)


# idx files.


def write_idx(file: Path, array: np.ndarray, header: bytes | None = None, extra: bytes = b""):
    usual = bytes((0, 0, 8, array.ndim)) + struct.pack(f">{array.ndim}I", *array.shape)
    content = (usual if header is None else header) + array.tobytes() + extra
    file.write_bytes(gzip.compress(content) if file.suffix == ".gz" else content)


@pytest.fixture(params=["", ".gz"])
def idx_folder(tmp_path, request):
    """Four idx files: 6 training and 3 test images of 2×3 pixels."""
    for prefix, num in (("train", 6), ("t10k", 3)):
        images = np.arange(num * 6, dtype=np.uint8).reshape(num, 2, 3)
        write_idx(tmp_path / f"{prefix}-images-idx3-ubyte{request.param}", images)
        labels = (np.arange(num) % 3).astype(np.uint8)
        write_idx(tmp_path / f"{prefix}-labels-idx1-ubyte{request.param}", labels)
    return tmp_path


def test_idx_files_come_back(idx_folder):
    data = idx_images(str(idx_folder), "abc", ("a", "b", "c"))
    assert (data.image_shape, data.num_classes, len(data.train)) == ((2, 3, 1), 3, 6)
    images, labels = gathered(data.train, range(6))
    np.testing.assert_array_equal(images, np.arange(36).reshape(6, 2, 3, 1))
    np.testing.assert_array_equal(labels, [0, 1, 2, 0, 1, 2])
    assert mnist(str(idx_folder)).num_classes == 10


def damage(file: Path, how: str):
    """Spoils a file of labels."""
    content, labels = file.read_bytes(), np.zeros(6, np.uint8)
    if how == "cut":
        file.write_bytes(content[:-4])
    elif how == "cut in the header":
        write_idx(file, labels[:0], header=bytes((0, 0, 8, 1, 0)))
    elif how == "longer":
        write_idx(file, labels, extra=b"xx")
    elif how == "of another kind":
        write_idx(file, labels, header=bytes((0, 0, 13, 1)))
    elif how == "empty":
        file.write_bytes(b"")
    elif how == "huge":
        write_idx(file, labels, header=bytes((0, 0, 8, 1)) + struct.pack(">I", 2**32 - 1))
    elif how == "fewer":
        write_idx(file, labels[:5])
    elif how == "of too many classes":
        write_idx(file, np.full(6, 3, np.uint8))
    elif how == "flipped":
        file.write_bytes(content[:12] + bytes([content[12] ^ 255]) + content[13:])


@pytest.mark.parametrize(
    ("how", "says"),
    [
        ("cut", ""),
        ("cut in the header", "ends within its header"),
        ("longer", "announces 6 bytes and has more"),
        ("of another kind", "starts with 00 00 0d 01"),
        ("empty", ""),
        ("huge", "announces 4294967295 bytes"),
        ("fewer", "6 images"),
        ("of too many classes", "label 3, but there are 3 classes"),
        ("flipped", ""),
    ],
)
def test_damaged_idx_files(idx_folder, how, says):
    (file,) = idx_folder.glob("train-labels*")
    damage(file, how)
    said = message(idx_images, str(idx_folder), "abc", ("a", "b", "c"))
    assert str(file) in said
    assert says in said


@pytest.mark.parametrize("position", range(0, 60, 4))
def test_a_flipped_bit_in_gzip_never_ends_in_a_traceback(tmp_path, position):
    labels = np.random.default_rng(0).integers(0, 3, 40, dtype=np.uint8)
    for prefix in ("train", "t10k"):
        write_idx(tmp_path / f"{prefix}-images-idx3-ubyte.gz", np.zeros((40, 2, 2), np.uint8))
        write_idx(tmp_path / f"{prefix}-labels-idx1-ubyte.gz", labels)
    file = tmp_path / "train-labels-idx1-ubyte.gz"
    content = bytearray(file.read_bytes())
    content[position % len(content)] ^= 4
    file.write_bytes(content)
    data, said = outcome(lambda: idx_images(str(tmp_path), "abc", ("a", "b", "c")))
    if data is None:
        assert str(file) in said
    else:  # the time stamp in gzip's header means nothing
        np.testing.assert_array_equal(gathered(data.train)[1], labels)


def test_missing_fashion_mnist_says_how_to_get_it(tmp_path):
    said = message(fashion_mnist, str(tmp_path))
    for part in (tmp_path, "dataset-fashion-mnist", "/usr/share/datasets/fashion-mnist", "TFDS"):
        assert str(part) in said


def fashion_mnist_folder() -> Path:
    candidates = [
        Path(os.environ.get("DIFFJAX_FASHION_MNIST", "no such folder")),
        Path(__file__).parents[3] / "shared/data/fashion-mnist",
        Path("/usr/share/datasets/fashion-mnist"),
    ]
    found = [folder for folder in candidates if folder.is_dir()]
    if not found:
        pytest.skip("no Fashion-MNIST here: set DIFFJAX_FASHION_MNIST to its folder")
    return found[0]


def test_the_real_fashion_mnist():
    """Counts per class and the mean pixel as published with the data (0.2860 of 255)."""
    data = fashion_mnist(str(fashion_mnist_folder()))
    assert (len(data.train), len(data.test), data.image_shape) == (60_000, 10_000, (28, 28, 1))
    images, labels = gathered(data.train, np.arange(60_000))
    np.testing.assert_array_equal(np.bincount(labels), [6000] * 10)
    np.testing.assert_array_equal(
        np.bincount(data.test.gather(range(10_000))["label"]), [1000] * 10
    )
    assert abs(images.mean() / 255 - 0.2860) < 5e-5
    assert data.label_names[labels[0]] == "Ankle boot"


# Folders.


def save(file: Path, array: np.ndarray, **options):
    file.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(array).save(file, **options)


@pytest.fixture
def folder(tmp_path):
    """Two classes; each image has its own grey, written as RGB."""
    for name, greys in (("dog", range(100, 110)), ("cat", range(10))):
        for grey in greys:
            save(tmp_path / name / f"{grey}.png", np.full((6, 9, 3), grey, np.uint8))
    (tmp_path / "cat/notes.txt").write_text("no image")
    (tmp_path / ".hidden").mkdir()
    save(tmp_path / "cat/.hidden.png", np.zeros((2, 2), np.uint8))
    return tmp_path


@pytest.mark.parametrize("channels", [1, 3])
def test_a_folder_of_classes(folder, channels):
    data = image_folder(str(folder), image_size=4, channels=channels, test_fraction=0.2)
    assert data.label_names == ("cat", "dog")
    assert (data.image_shape, data.num_classes) == ((4, 4, channels), 2)
    seen = []
    for source, num in ((data.train, 16), (data.test, 4)):
        images, labels = gathered(source)
        assert images.shape == (num, 4, 4, channels)
        np.testing.assert_array_equal(labels, images[:, 0, 0, 0] >= 100)
        assert (images == images[:, :1, :1, :1]).all()
        np.testing.assert_array_equal(np.bincount(labels), [num // 2] * 2)
        seen += images[:, 0, 0, 0].tolist()
    assert sorted(seen) == [*range(10), *range(100, 110)]


def test_loose_images_have_no_labels(tmp_path):
    for i in range(5):
        save(tmp_path / f"{i}.png", np.zeros((4, 4), np.uint8))
    data = image_folder(str(tmp_path), image_size=4)
    assert (data.num_classes, data.label_names, len(data.train)) == (0, (), 4)
    assert data.train[0]["label"] == 0


def folder_image(folder: Path, array: np.ndarray, name="0.png", **options) -> np.ndarray:
    """What an image becomes at 2×2 pixels."""
    save(folder / name, array, **options)
    save(folder / "z.png", array)
    data = image_folder(str(folder), image_size=2, channels=1, test_fraction=0.5)
    (source,) = (s for s in (data.train, data.test) if s.files == (name,))  # type: ignore
    return source[0]["image"][..., 0]


def test_the_central_square_is_averaged_over_areas(tmp_path):
    image = np.full((4, 8), 255, np.uint8)  # the sides must not show
    image[:, 2:6] = [[0, 4, 8, 12]] * 2 + [[40, 44, 48, 52]] * 2
    np.testing.assert_array_equal(folder_image(tmp_path, image), [[2, 10], [42, 50]])
    np.testing.assert_array_equal(folder_image(tmp_path, image.T), [[2, 42], [10, 50]])


def test_images_of_the_right_size_are_not_touched(tmp_path):
    image = np.array([[1, 200], [30, 4]], np.uint8)
    np.testing.assert_array_equal(folder_image(tmp_path, image), image)


def test_enlarging_keeps_a_flat_image_flat(tmp_path):
    np.testing.assert_array_equal(folder_image(tmp_path, np.full((1, 1), 77, np.uint8)), 77)


def test_a_cameras_orientation_is_obeyed(tmp_path):
    image = np.array([[1, 2], [3, 4]], np.uint8)
    exif = Image.Exif()
    exif[0x0112] = 3  # upside down
    rotated = folder_image(tmp_path, image, exif=exif.tobytes())
    np.testing.assert_array_equal(rotated, [[4, 3], [2, 1]])


def test_fingerprints_notice_files_sizes_and_classes(folder):
    def fingerprint(**options):
        return image_folder(str(folder), **options).train.fingerprint()

    original = fingerprint()
    assert fingerprint() == original
    assert fingerprint(image_size=32) != original
    (folder / "cat").rename(folder / "zebra")
    renamed = fingerprint()
    save(folder / "dog/new.png", np.zeros((2, 2), np.uint8))
    assert len({original, renamed, fingerprint()}) == 3


def rewrite(file: Path, position: int):
    """Changes a byte and nothing else: neither the size nor when the file was written."""
    times = file.stat()
    content = bytearray(file.read_bytes())
    content[position] ^= 1
    file.write_bytes(content)
    os.utime(file, ns=(times.st_atime_ns, times.st_mtime_ns))


def test_fingerprints_of_folders_notice_other_bytes_and_no_other_place(folder, tmp_path_factory):
    copy = tmp_path_factory.mktemp("elsewhere") / "copy"
    shutil.copytree(folder, copy, copy_function=shutil.copyfile)
    one, same = (image_folder(str(path)).train for path in (folder, copy))
    before = one.fingerprint()
    assert same.fingerprint() == before
    for name in one.files:  # type: ignore
        rewrite(folder / name, 60)
        assert one.fingerprint() != before
        rewrite(folder / name, 60)
    assert one.fingerprint() == before
    (copy / same.files[0]).unlink()  # type: ignore
    assert message(same.fingerprint).startswith(f"can't read {copy}")


def test_fingerprints_look_into_no_more_than_2_mb(tmp_path, monkeypatch):
    """256 of 600 files, at both ends, and at 512 places of a single one."""
    files = [tmp_path / f"{i:03}" for i in range(600)]
    for file in files:
        file.write_bytes(bytes(20_000))
    (tmp_path / "large").write_bytes(bytes(8_000_000))
    (tmp_path / "small").write_bytes(bytes(1_000_000))
    (tmp_path / "empty").write_bytes(b"")
    seen = []

    class Digest:
        def update(self, part):
            seen.append(len(part))

    def changes(chosen, file, position):
        digests = []
        for _ in range(2):
            digests.append(hashlib.sha256())
            hash_parts(digests[-1], chosen)
            rewrite(file, position)
        return digests[0].digest() != digests[1].digest()

    some = [files[row] for row in evenly(len(files))]
    assert (len(set(some)), some[0], some[-1]) == (256, files[0], files[-1])
    for chosen in (some, some[:3], [tmp_path / "large"], [tmp_path / "small"]):
        seen.clear()
        hash_parts(Digest(), chosen)
        assert sum(seen) <= 2**21
    assert changes(some, some[100], 4095)
    assert not changes(some, some[100], 4096)
    assert changes(some, some[100], 16_000)
    assert all(
        changes([tmp_path / "small"], tmp_path / "small", i) for i in range(0, 10**6, 77_777)
    )
    ends = (0, 8_000_000 - 1)
    assert all(changes([tmp_path / "large"], tmp_path / "large", i) for i in ends)
    hash_parts(hashlib.sha256(), [tmp_path / "empty"])
    hash_parts(hashlib.sha256(), [])


def test_missing_and_empty_folders(tmp_path):
    missing = str(tmp_path / "nothing")
    assert missing in message(image_folder, missing)
    assert f"{tmp_path} holds no images" in message(image_folder, str(tmp_path))
    (tmp_path / "cat").mkdir()
    assert f"{tmp_path / 'cat'} holds no images" in message(image_folder, str(tmp_path))
    save(tmp_path / "cat/0.png", np.zeros((2, 2), np.uint8))
    assert "none to test on" in message(image_folder, str(tmp_path))
    save(tmp_path / "1.png", np.zeros((2, 2), np.uint8))
    said = message(image_folder, str(tmp_path))
    assert str(tmp_path) in said
    assert "subfolders" in said


def test_unreadable_folders(folder, monkeypatch):
    """As for a user without the right (root has every right, so the refusal is played)."""

    def refuse(path):
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(Path, "iterdir", refuse)
    assert message(image_folder, str(folder)) == f"can't read {folder}: Permission denied"


@pytest.mark.parametrize("options", [{"image_size": 0}, {"channels": 2}])
def test_impossible_sizes(folder, options):
    (name,) = options
    assert name in message(image_folder, str(folder), **options)


def corrupt(file: Path, how: str):
    if how == "cut":
        save(file, random_images((64, 64, 3)))
        file.write_bytes(file.read_bytes()[:500])
    elif how == "empty":
        file.write_bytes(b"")
    elif how == "text":
        file.write_text("no image")
    elif how == "bomb":
        Image.new("1", (10_000, 10_000)).save(file)
    elif how == "deep":
        save(file, np.zeros((4, 4), np.uint16))
    elif how == "gone":
        file.unlink()


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
@pytest.mark.parametrize(
    ("how", "says"),
    [
        ("cut", ""),
        ("empty", ""),
        ("text", ""),
        ("bomb", "10000×10000 pixels"),
        ("deep", "more than 8 bits"),
        ("gone", "No such file"),
    ],
)
def test_damaged_images_are_named_through_the_stream(folder, how, says):
    data = image_folder(str(folder), image_size=4)
    file = folder / data.train.files[5]  # type: ignore
    corrupt(file, how)
    said = message(steps, data.train, 0, 3)
    assert str(file) in said
    assert says in said


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
@pytest.mark.parametrize(
    "how",
    ["cut", "empty", "text", pytest.param("bomb", marks=pytest.mark.thorough), "deep", "gone"],
)
def test_a_few_damaged_images_are_passed_over(folder, how, caplog):
    names = list(image_folder(str(folder), image_size=4).train.files)  # type: ignore
    where = (2, 3, len(names) - 1)
    whole: Any = image_folder(str(folder), image_size=4).train
    expected = [whole[row] for row in range(len(names))]
    # The next whole one in the order, which begins anew at its end.
    for row, instead in zip(where, (4, 4, 0), strict=True):
        expected[row] = expected[instead]
        corrupt(folder / names[row], how)
    for order in (range(len(names)), reversed(range(len(names)))):
        caplog.clear()
        source = PassingOver(whole, 3, "here")
        found = {row: source[row] for row in order}
        for row, example in enumerate(expected):
            np.testing.assert_array_equal(found[row]["image"], example["image"])
            assert found[row]["label"] == example["label"]
        assert len(caplog.records) == 3
        for row in where:
            assert sum(names[row] in record.getMessage() for record in caplog.records) == 1
    said = message(steps, PassingOver(whole, 2, "here"), 0, 2 * len(names))
    assert "2 others can't be read either, and data.max_damaged=2" in said
    assert sum(names[row] in said for row in where) == 1


def test_no_image_starts_a_program(folder, tmp_path_factory, monkeypatch):
    """Pillow has EPS drawn by the first `gs` in the path: here one that leaves a trace."""
    programs = tmp_path_factory.mktemp("programs")
    (programs / "gs").write_text(f"#!/bin/sh\necho started >> {programs}/trace\n")
    (programs / "gs").chmod(0o755)
    monkeypatch.setenv("PATH", str(programs), prepend=os.pathsep)
    monkeypatch.setattr(EpsImagePlugin, "gs_binary", None)  # it remembers what it found
    data = image_folder(str(folder), image_size=4)
    file = folder / data.train.files[0]  # type: ignore
    Image.new("RGB", (4, 4)).save(file, "EPS")
    with contextlib.suppress(OSError), Image.open(file) as image:
        image.load()
    (programs / "trace").unlink()
    assert f"can't read image {file}: cannot identify" in message(data.train.__getitem__, 0)
    with file.open("rb") as stream:  # as TFDS passes it
        assert "cannot identify" in message(read_image, stream, "x")
    assert not (programs / "trace").exists()


@pytest.mark.parametrize("kind", ["BMP", "GIF", "JPEG", "MPO", "PNG", "PPM", "TIFF", "WEBP"])
def test_the_content_tells_the_format_and_not_the_name(tmp_path, kind):
    save(tmp_path / "a.png", np.full((8, 8), 77, np.uint8), format=kind)
    image = read_image(tmp_path / "a.png", "x", channels=1)
    np.testing.assert_allclose(image, np.full((8, 8, 1), 77), atol=1)


def test_when_no_image_can_be_read_it_says_so(folder):
    for file in folder.rglob("*.png"):
        file.write_bytes(b"")
    source = image_folder(str(folder), image_size=4, max_damaged=10**6).train
    assert "images in" in message(source.__getitem__, 0)


# Pillow warns of some damage; what counts is what comes out.
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("suffix", ["png", "jpg", "gif", "bmp", "webp", "tiff"])
def test_flipped_bytes_in_images_never_end_in_a_traceback(tmp_path, suffix):
    rng = np.random.default_rng(0)
    for i in range(40):
        file = tmp_path / f"{i}.{suffix}"
        save(file, random_images((16, 16, 3)))
        content = bytearray(file.read_bytes())
        for position in rng.integers(0, min(len(content), 400), 3):
            content[position] ^= rng.integers(1, 256)
        file.write_bytes(content)
    source = image_folder(str(tmp_path), image_size=8).train
    for i in range(len(source)):
        example, said = outcome(lambda i=i: source[i])
        if example is None:
            assert source.files[i] in said  # type: ignore
        else:
            assert example["image"].shape == (8, 8, 3)


# TFDS.


def write_tfds(path: Path, num_images: int = 6, shape=("8", "6", "3"), file_format="array_record"):
    """A set as TFDS prepares it, written without TFDS's preparation, which needs TensorFlow."""
    from array_record.python.array_record_module import ArrayRecordWriter
    from tensorflow_datasets.proto import tf_example_pb2  # type: ignore

    path.mkdir(parents=True)
    splits = []
    for split, first in (("train", 0), ("test", 100)):
        file = path / f"tiny-{split}.array_record-00000-of-00001"
        writer = ArrayRecordWriter(str(file), "group_size:1")
        for i in range(first, first + num_images):
            buffer = io.BytesIO()
            Image.fromarray(np.full((8, 6, 3), i, np.uint8)).save(buffer, "png")
            example = tf_example_pb2.Example()  # type: ignore
            example.features.feature["image"].bytes_list.value.append(buffer.getvalue())
            example.features.feature["label"].int64_list.value.append(i % 2)
            writer.write(example.SerializeToString())
        writer.close()
        splits.append(
            {
                "name": split,
                "filepathTemplate": "{DATASET}-{SPLIT}.{FILEFORMAT}-{SHARD_X_OF_Y}",
                "numBytes": "1000",
                "shardLengths": [str(num_images)],
            }
        )
    info = {"fileFormat": file_format, "name": "tiny", "version": "1.0.0", "splits": splits}
    (path / "dataset_info.json").write_text(json.dumps(info))
    module = "tensorflow_datasets.core.features"
    image = {"shape": {"dimensions": shape}, "dtype": "uint8", "encodingFormat": "png"}
    features = {
        "image": {"pythonClassName": f"{module}.image_feature.Image", "image": image},
        "label": {
            "pythonClassName": f"{module}.class_label_feature.ClassLabel",
            "classLabel": {"numClasses": "2"},
        },
    }
    described = {
        "pythonClassName": f"{module}.features_dict.FeaturesDict",
        "featuresDict": {"features": features},
    }
    (path / "features.json").write_text(json.dumps(described))
    (path / "label.labels.txt").write_text("cat\ndog\n")


def test_a_prepared_set_is_read_without_tensorflow(tmp_path):
    write_tfds(tmp_path / "tiny/1.0.0")
    data = tfds_images("tiny", str(tmp_path))
    assert (data.image_shape, data.label_names) == ((8, 6, 3), ("cat", "dog"))
    for source, first in ((data.train, 0), (data.test, 100)):
        images, labels = gathered(source, range(6))
        np.testing.assert_array_equal(images[:, 0, 0, 0], first + np.arange(6))
        np.testing.assert_array_equal(labels, np.arange(6) % 2)
    whole = steps(data.train, 0, 6, batch_size=3)
    assert_same(whole[2:], steps(data.train, 2, 6, batch_size=3))
    assert sorted(to_uint8(np.concatenate([b["image"] for b in whole[:2]]))[:, 0, 0, 0]) == [
        *range(6)
    ]
    alone = tfds_images("tiny", str(tmp_path), labelled=False)
    assert (alone.num_classes, alone.label_names, alone.train[1]["label"]) == (0, (), 0)
    part = tfds_images("tiny", str(tmp_path), train_split="train[:50%]", image_size=4)
    assert (len(part.train), part.image_shape) == (3, (4, 4, 3))
    assert part.train[2]["image"].shape == (4, 4, 3)
    assert part.train.fingerprint() != data.train.fingerprint() != data.test.fingerprint()


def test_a_missing_set_says_how_to_prepare_it(tmp_path):
    said = message(tfds_images, "cifar10", str(tmp_path))
    assert str(tmp_path) in said
    assert "pip install 'diffjax[prepare]'" in said
    command = said.split('"')[1]
    compile(command, "the command in the message", "exec")
    assert "'cifar10'" in command
    assert "array_record" in command


def test_tfds_sets_that_do_not_fit(tmp_path):
    write_tfds(tmp_path / "a/tiny/1.0.0", shape=("-1", "-1", "3"))
    assert "image_size" in message(tfds_images, "tiny", str(tmp_path / "a"))
    assert tfds_images("tiny", str(tmp_path / "a"), image_size=4).image_shape == (4, 4, 3)
    said = message(tfds_images, "tiny", str(tmp_path / "a"), train_split="nope", image_size=4)
    assert "'nope'" in said
    write_tfds(tmp_path / "a/tiny/2.0.0")
    said = message(tfds_images, "tiny", str(tmp_path / "a"))
    assert "tiny/1.0.0, tiny/2.0.0" in said
    assert len(tfds_images("tiny/2.0.0", str(tmp_path / "a")).train) == 6
    write_tfds(tmp_path / "b/tiny/1.0.0", file_format="tfrecord")
    assert "tfrecord" in message(tfds_images, "tiny", str(tmp_path / "b"))
    (tmp_path / "b/tiny/1.0.0/dataset_info.json").write_text("{")
    assert str(tmp_path / "b/tiny/1.0.0") in message(tfds_images, "tiny", str(tmp_path / "b"))


def test_fingerprints_of_tfds_notice_other_bytes(tmp_path):
    write_tfds(tmp_path / "a/tiny/1.0.0")
    shutil.copytree(tmp_path / "a", tmp_path / "b", copy_function=shutil.copyfile)
    one, same = (tfds_images("tiny", str(tmp_path / name)).train for name in ("a", "b"))
    (file, *_), *_ = one.files  # type: ignore
    before = one.fingerprint()
    assert same.fingerprint() == before
    rewrite(file, 100)
    assert one.fingerprint() != before


def test_a_damaged_tfds_file(tmp_path):
    write_tfds(tmp_path / "tiny/1.0.0")
    data = tfds_images("tiny", str(tmp_path))
    assert data.train[0]["label"] == 0
    file = tmp_path / "tiny/1.0.0/tiny-train.array_record-00000-of-00001"
    file.write_bytes(bytes(len(file.read_bytes())))
    damaged = tfds_images("tiny", str(tmp_path)).train
    assert "tiny[train]" in message(damaged.__getitem__, 0)


def write_records(path: Path, encoded: list[bytes], **others: bytes) -> None:
    """Other images in the place of those of a set, whatever they are, and other features."""
    from array_record.python.array_record_module import ArrayRecordWriter
    from tensorflow_datasets.proto import tf_example_pb2  # type: ignore

    writer = ArrayRecordWriter(str(path / "tiny-train.array_record-00000-of-00001"), "group_size:1")
    for label, image in enumerate(encoded):
        example = tf_example_pb2.Example()  # type: ignore
        for key, value in ({"image": image} | others).items():
            example.features.feature[key].bytes_list.value.append(value)
        example.features.feature["label"].int64_list.value.append(label % 2)
        writer.write(example.SerializeToString())
    writer.close()


def test_of_other_features_of_a_set_nothing_is_decoded(tmp_path):
    """TFDS would open a second image by Pillow, whatever program that takes."""
    path = tmp_path / "tiny/1.0.0"
    write_tfds(path)
    described = json.loads((path / "features.json").read_text())
    features = described["featuresDict"]["features"]
    features["mask"] = features["image"]
    (path / "features.json").write_text(json.dumps(described))
    buffer = io.BytesIO()
    Image.fromarray(np.full((8, 6, 3), 7, np.uint8)).save(buffer, "png")
    write_records(path, [buffer.getvalue()] * 6, mask=b"%!PS-Adobe-3.0 EPSF-3.0")
    assert (tfds_images("tiny", str(tmp_path)).train[0]["image"] == 7).all()


def test_tfds_images_of_another_size_are_named_or_passed_over(tmp_path, caplog):
    write_tfds(tmp_path / "tiny/1.0.0")
    encoded = []
    for i, shape in enumerate([(8, 6, 3), (8, 7, 3), (8, 6, 3), (8, 6, 3), (8, 6, 3), (8, 6, 3)]):
        buffer = io.BytesIO()
        Image.fromarray(np.full(shape, i, np.uint8)).save(buffer, "png")
        encoded.append(buffer.getvalue())
    encoded[4] = b"no image"
    write_records(tmp_path / "tiny/1.0.0", encoded)
    train = tfds_images("tiny", str(tmp_path)).train
    said = message(train.gather, range(3))
    assert said == "image 1 of tiny[train] is [8, 7, 3], but its metadata have [8, 6, 3]"
    assert "4 of tiny[train]" in message(train.gather, range(2, 6))

    some = tfds_images("tiny", str(tmp_path), max_damaged=2).train
    assert some.fingerprint() == train.fingerprint()
    images, labels = gathered(some, range(6))
    np.testing.assert_array_equal(images[:, 0, 0, 0], [0, 2, 2, 3, 5, 5])
    np.testing.assert_array_equal(labels, [0, 0, 0, 1, 1, 1])
    assert len(caplog.records) == 2
    few = tfds_images("tiny", str(tmp_path), max_damaged=1).train
    assert "1 others can't be read either" in message(few.gather, range(6))
    assert "can't be negative" in message(
        lambda: tfds_images("tiny", str(tmp_path), max_damaged=-1)
    )


class TestColours:
    @pytest.mark.thorough(tenth=False)
    def test_perfect_training_would_end_in_the_stated_distance(self):
        """Real draws of each, against the formula, and the two ways to spoil them are equal."""
        for blur in (0.0, 0.15, 0.25):
            found = []
            for along in (0, 1):
                data = colours(blur, along, num_images=200_000)
                spoilt, real = (all_images(s)[0][:, 0, 0] for s in (data.train, data.reference))
                one, other = statistics(spoilt), statistics(real)
                found.append(frechet_distance(one.mean, one.cov, other.mean, other.cov))
            assert found[0] == pytest.approx(colours_distance(blur), abs=3e-4)
            assert found[0] == pytest.approx(found[1], abs=1e-9)

    def test_one_way_to_spoil_is_the_other_with_channels_swapped(self):
        one, other = (all_images(colours(0.2, along).train)[0] for along in (0, 1))
        np.testing.assert_array_equal(one[..., [1, 0, 2]], other)
        assert not np.array_equal(one, other)

    def test_too_much_is_refused(self):
        with pytest.raises(UserError, match=r"blur in \[0, 0.25\], along 0 or 1"):
            colours(blur=0.5)
