"""Data sets prepared by TensorFlow Datasets (TFDS), read without TensorFlow."""

import hashlib
import io
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from diffjax.data.fingerprints import evenly, hash_parts
from diffjax.data.image_folders.damaged import passing_over
from diffjax.data.image_folders.folder import read_image
from diffjax.data.sources import DataSet, Example, Source
from diffjax.errors import UserError
from diffjax.host.files import place_of
from diffjax.kinds import NotNegative

_FEATURES = "features.json"
_CLASS_KEYS = ("pythonClassName", "python_class_name", "type")  # the last in TFDS before 4.5


def tfds_images(
    name: str = "cifar10",
    path: str = "~/tensorflow_datasets",
    train_split: str = "train",
    test_split: str = "test",
    image_size: NotNegative[int] = 0,
    max_damaged: NotNegative[int] = 0,
    labelled: bool = True,
) -> DataSet:
    """An image data set of TFDS that was prepared in the format `array_record`.

    Preparing a data set needs TensorFlow and a download, once, on any machine; reading needs
    neither.

    Args:
        name: the name in TFDS, with the configuration if there are several
            (`"imagenet_resized/64x64"`), and with the version if several are prepared.
        path: TFDS's `data_dir`.
        train_split: in TFDS's syntax: `"train"`, `"train[:90%]"`, `"train+validation"` …
        test_split: in the same syntax.
        image_size: the side of the images in pixels: the central square is cropped and resized. 0
            keeps the images as they are, if all have one size.
        max_damaged: how many images of each split may be unreadable, or of another size than the
            metadata state (`PassingOver`).
        labelled: whether images have the labels of the set. Without them networks have no classes,
            as published unconditional ones.

    Raises:
        UserError: the data set is not prepared (the message shows the command), is in another
            format, or has no such split or no feature `image`; when it is read, a damaged image,
            beyond `max_damaged` of them.
    """
    # TFDS takes most of a second to import, and other data do not need it.
    import tensorflow_datasets as tfds

    folder = _prepared_folder(name, place_of(path))
    _check_features(folder)
    try:
        builder: Any = tfds.builder_from_directory(folder)
    # TFDS raises various exceptions for damaged metadata.
    except Exception as error:
        raise UserError(f"can't read the TFDS metadata in {folder}: {_line(error)}") from None
    if builder.info.file_format is not tfds.core.FileFormat.ARRAY_RECORD:
        raise UserError(
            f"{folder} is in the format {builder.info.file_format.value}; "
            f"move it away and {_how_to_prepare(name, path)}"
        )
    features = dict(builder.info.features.items())
    if not isinstance(features.get("image"), tfds.features.Image):
        raise UserError(f"TFDS set {name!r} has no image, only {', '.join(features)}")
    shape = _image_shape(name, features["image"].shape, image_size)
    label = features.get("label")
    names = tuple(label.names) if labelled and isinstance(label, tfds.features.ClassLabel) else ()
    keys = ("image", "label") if names else ("image",)
    parse = _parser({key: features[key] for key in keys})

    def source(split: str) -> Source:
        try:
            raw = tfds.decode.DeserializeMethod.RAW_BYTES
            records = builder.as_data_source(split=split, deserialize_method=raw)
            instructions = builder.info.splits[split].file_instructions
        except Exception as error:
            raise UserError(f"can't read split {split!r} in {folder}: {_line(error)}") from None
        files = tuple((Path(i.filename), i.skip, i.take) for i in instructions)
        where = f"{name}[{split}]"
        whole = TfdsSource(records, parse, where, files, bool(names), image_size, shape)
        return passing_over(whole, max_damaged, where)

    return DataSet(name, source(train_split), source(test_split), shape, len(names), names)


def _prepared_folder(name: str, path: Path) -> Path:
    found = sorted(file.parent for file in (path / name).rglob("dataset_info.json"))
    if not found:
        raise UserError(f"no TFDS set {name!r} in {path}: {_how_to_prepare(name, str(path))}")
    if len(found) > 1:
        names = ", ".join(folder.relative_to(path).as_posix() for folder in found)
        raise UserError(f"several TFDS sets {name!r} in {path}: choose one of {names}")
    return found[0]


def _check_features(folder: Path) -> None:
    """Refuses metadata that name classes outside of TFDS: TFDS would import their modules."""

    def check(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        for key, value in pairs:
            named = key in _CLASS_KEYS and isinstance(value, str) and "." in value
            if named and not value.startswith("tensorflow_datasets."):
                raise UserError(
                    f"{folder / _FEATURES} names {value!r}, and only classes of TFDS are loaded"
                )
        return dict(pairs)

    try:
        text = (folder / _FEATURES).read_text(encoding="utf-8")
        json.loads(text, object_pairs_hook=check)
    except FileNotFoundError:
        return
    except UserError:
        raise
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"can't read the TFDS metadata in {folder}: {_line(error)}") from None


def _parser(features: Mapping[str, Any]) -> Callable[[bytes], Any]:
    """A parser of these features of a record, which leaves images encoded.

    TFDS would decode all features, also images of formats for which Pillow starts other programs.
    `read_image` decodes the images as it does those of a folder.
    """
    import tensorflow_datasets as tfds

    skip = {"image": tfds.decode.SkipDecoding()}
    return partial(tfds.features.FeaturesDict(features).deserialize_example_np, decoders=skip)


def _how_to_prepare(name: str, path: str) -> str:
    return (
        "pip install 'diffjax[prepare]' and run python -c \"import tensorflow_datasets as tfds; "
        f"tfds.builder({name!r}, data_dir={path!r}, file_format='array_record')"
        '.download_and_prepare()"'
    )


def _image_shape(name: str, shape: tuple, image_size: int) -> tuple[int, int, int]:
    height, width, channels = shape
    if channels not in (1, 3):
        raise UserError(f"images of TFDS set {name!r} have {channels} channels, not 1 or 3")
    if image_size:
        return (image_size, image_size, channels)
    if height is None or width is None:
        raise UserError(f"images of TFDS set {name!r} differ in size: set data.image_size")
    return (height, width, channels)


def _line(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__


@dataclass(frozen=True, eq=False, repr=False)
class TfdsSource(Source):
    """One split of a prepared TFDS data set.

    Args:
        records: TFDS's data source, of bytes.
        parse: from a record's bytes to `image`, still encoded, and `label`.
        where: the name of the split in errors.
        files: the parts of files of which it consists: path, first record, number of records.
        has_labels: whether the examples have a `label`.
        image_size: the side of the resized images in pixels; 0 keeps their size.
        image_shape: height, width and channels of the images after resizing.
    """

    records: Any
    parse: Callable[[bytes], Any]
    where: str
    files: tuple[tuple[Path, int, int], ...]
    has_labels: bool
    image_size: int
    image_shape: tuple[int, int, int]

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, index: int) -> Example:
        where = f"{index} of {self.where}"
        try:
            example = self.parse(self.records[index])
        # array_record and TFDS have no common exception for damaged files.
        except Exception as error:
            raise UserError(f"can't read example {where}: {_line(error)}") from None
        *_, channels = self.image_shape
        image = read_image(io.BytesIO(example["image"]), where, self.image_size, channels)
        if image.shape != self.image_shape:
            raise UserError(
                f"image {where} is {list(image.shape)}, but its metadata have "
                f"{list(self.image_shape)}"
            )
        return {"image": image, "label": int(example["label"]) if self.has_labels else 0}

    def fingerprint(self) -> str:
        """SHA-256 of the files' names and sizes, the records used, and a sample of their bytes.

        It also depends on how images are resized. The sample is that of `hash_parts`.
        """
        digest = hashlib.sha256(f"{self.image_size} {self.image_shape[2]}\n".encode())
        for file, skip, take in self.files:
            digest.update(f"{file.name}\t{file.stat().st_size}\t{skip}\t{take}\n".encode())
        hash_parts(digest, [self.files[row][0] for row in evenly(len(self.files))])
        return digest.hexdigest()
