"""Prepared TensorFlow Datasets, read without TensorFlow."""

import hashlib
import io
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from diffjax.data.damaged import passing_over
from diffjax.data.fingerprints import evenly, hash_parts
from diffjax.data.folder import read_image
from diffjax.data.sources import DataSet, Example, Source
from diffjax.errors import UserError
from diffjax.host.files import place_of
from diffjax.kinds import NotNegative

_FEATURES = "features.json"
_CLASS_KEYS = ("pythonClassName", "python_class_name", "type")  # the last as TFDS before 4.5 had it


def tfds_images(
    name: str = "cifar10",
    path: str = "~/tensorflow_datasets",
    train_split: str = "train",
    test_split: str = "test",
    image_size: NotNegative[int] = 0,
    max_damaged: NotNegative[int] = 0,
) -> DataSet:
    """Any image set of TFDS that was prepared in its `array_record` format.

    Preparing needs TensorFlow and the network, once, on any machine; reading needs neither.

    Args:
        name: as TFDS says it, with a configuration where there are several
            (`"imagenet_resized/64x64"`), and with a version where several are prepared.
        path: TFDS's `data_dir`.
        train_split: `"train"`, `"train[:90%]"`, `"train+validation"` …
        test_split: likewise.
        image_size: side in pixels after the central square was cut out and resized; 0 keeps the
            images as they are, if they are all of one size.
        max_damaged: images of each split that may be unreadable or of another size than the set
            says (`PassingOver`); 0: none.

    Raises:
        UserError: the set is not prepared (the message says how), is in another format, has no
            such split or no feature `image`; a damaged image when it is read, or one more than
            `max_damaged`.
    """
    # TFDS takes most of a second to import, and other data do without it.
    import tensorflow_datasets as tfds

    folder = _prepared_folder(name, place_of(path))
    _check_features(folder)
    try:
        builder: Any = tfds.builder_from_directory(folder)
    # Whatever TFDS makes of damaged metadata.
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
    names = tuple(label.names) if isinstance(label, tfds.features.ClassLabel) else ()
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
    """Refuses a set that names classes of its own: TFDS would import the modules they are in."""

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
    """Reads these features of a record, images still encoded.

    TFDS would decode all that a set has, images of any format among them, for which Pillow starts
    programs; `read_image` treats them as it does files in a folder.
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
    """One split of a prepared set.

    Args:
        records: TFDS's data source, of bytes.
        parse: from such bytes to `image`, still encoded, and `label`.
        where: what to call it in an error.
        files: the parts of files that it consists of: path, first record, number of records.
        has_labels: whether the examples have a `label`.
        image_size: side of what comes out in pixels; 0: as it is.
        image_shape: height, width and channels of what comes out.
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
                f"image {where} is {list(image.shape)}, and the set says {list(self.image_shape)}"
            )
        return {"image": image, "label": int(example["label"]) if self.has_labels else 0}

    def fingerprint(self) -> str:
        """SHA-256 of names and sizes of the files, the records used, how they are resized, and of a
        sample of the files' bytes (`hash_parts`).
        """
        digest = self._listed()
        hash_parts(digest, [self.files[row][0] for row in evenly(len(self.files))])
        return digest.hexdigest()

    def earlier_fingerprint(self) -> str:
        """The fingerprint of versions that looked into no file."""
        return self._listed().hexdigest()

    def _listed(self) -> Any:
        digest = hashlib.sha256(f"{self.image_size} {self.image_shape[2]}\n".encode())
        for file, skip, take in self.files:
            digest.update(f"{file.name}\t{file.stat().st_size}\t{skip}\t{take}\n".encode())
        return digest
