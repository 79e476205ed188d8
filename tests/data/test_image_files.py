"""Properties of an image file: its depth, and its transparent pixels."""

import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from diffjax.data.image_folders.folder import image_folder, read_image
from diffjax.errors import UserError

# Deeper than 8 bits: written by hand, because Pillow writes none of them.

CHANNELS = {"grey": 1, "LA": 2, "RGB": 3, "RGBA": 4}
_PNG_KINDS = {1: 0, 2: 4, 3: 2, 4: 6}


def deep_png(pixels: np.ndarray) -> bytes:
    """A PNG of 16 bits a channel of uint16 `[H, W, C]`."""
    height, width, channels = pixels.shape
    header = struct.pack(">IIBBBBB", width, height, 16, _PNG_KINDS[channels], 0, 0, 0)
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in pixels)

    def chunk(name: bytes, content: bytes) -> bytes:
        check = struct.pack(">I", zlib.crc32(name + content))
        return struct.pack(">I", len(content)) + name + content + check

    parts = [(b"IHDR", header), (b"IDAT", zlib.compress(rows)), (b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunk(*part) for part in parts)


def deep_tiff(pixels: np.ndarray) -> bytes:
    """A TIFF of 16 bits a channel of uint16 `[H, W, C]`, C 1, 3 or 4."""
    height, width, channels = pixels.shape
    content = pixels.astype("<u2").tobytes()
    depths = struct.pack(f"<{channels}H", *[16] * channels)
    first = 8 + len(content)  # where the depths are, and then the tags
    short, long = 3, 4
    depth = (258, short, 1, 16) if channels == 1 else (258, short, channels, first)
    tags = [
        (256, short, 1, width), (257, short, 1, height), depth, (259, short, 1, 1),
        (262, short, 1, 1 if channels == 1 else 2), (273, long, 1, 8),
        (277, short, 1, channels), (278, short, 1, height), (279, long, 1, len(content)),
        *([(338, short, 1, 2)] if channels == 4 else []),
    ]  # fmt: skip
    entries = b"".join(struct.pack("<HHII", *tag) for tag in tags)
    directory = struct.pack("<H", len(tags)) + entries + bytes(4)
    start = struct.pack("<2sHI", b"II", 42, first + len(depths))
    return start + content + depths + directory


def deep_ppm(pixels: np.ndarray) -> bytes:
    """A PGM or PPM of 16 bits of uint16 `[H, W, 1 or 3]`."""
    height, width, channels = pixels.shape
    kind = {1: "P5", 3: "P6"}[channels]
    return f"{kind} {width} {height} 65535\n".encode() + pixels.astype(">u2").tobytes()


DEEP = [
    *((deep_png, name) for name in CHANNELS),
    *((deep_tiff, name) for name in ("grey", "RGB", "RGBA")),
    *((deep_ppm, name) for name in ("grey", "RGB")),
]


@pytest.mark.parametrize(("write", "kind"), DEEP)
@pytest.mark.parametrize("channels", [1, 3])
def test_files_of_16_bits_are_refused_in_colour_as_in_grey(tmp_path, write, kind, channels):
    pixels = np.full((4, 6, CHANNELS[kind]), 3000, np.uint16)
    file = tmp_path / "deep.png"  # the content tells, and not the name
    file.write_bytes(write(pixels))
    with Image.open(file) as image:
        assert image.size == (6, 4)
        image.load()  # it is a whole file, and no other fault of it is refused
    with pytest.raises(UserError, match="has more than 8 bits per channel: convert it to 8 first"):
        read_image(file, str(file), channels=channels)


@pytest.mark.parametrize(("write", "kind"), DEEP)
def test_files_of_16_bits_are_scaled_where_the_setting_says_so(tmp_path, write, kind):
    """3000·255/65535 = 11.7, which Pillow rounds or cuts in colours."""
    pixels = np.full((4, 6, CHANNELS[kind]), 3000, np.uint16)
    if kind in ("LA", "RGBA"):
        pixels[..., -1] = 65535
    (tmp_path / "deep.png").write_bytes(write(pixels))
    found = read_image(tmp_path / "deep.png", "x", sixteen_bits="scaled")
    assert found.shape == (4, 6, 3)
    assert np.isin(found, 12 if kind == "grey" else (11, 12)).all()


@pytest.mark.parametrize("mode", ["F", "I"])
def test_deeper_than_16_bits_is_refused_by_either_setting(tmp_path, mode):
    Image.new(mode, (2, 2)).save(tmp_path / "deep.tiff")
    for sixteen_bits in ("refused", "scaled"):
        with pytest.raises(UserError, match="bits per channel: convert it"):
            read_image(tmp_path / "deep.tiff", "x", sixteen_bits=sixteen_bits)


def test_a_folder_scales_16_bits_and_knows_the_setting(tmp_path):
    for i in range(2):
        (tmp_path / f"{i}.png").write_bytes(deep_png(np.full((2, 2, 1), 65535, np.uint16)))
    data = image_folder(str(tmp_path), 2, test_fraction=0, sixteen_bits="scaled")
    assert (data.train[0]["image"] == 255).all()
    assert data.facts["depth"] == "2 of them have over 8 bits per channel"
    refusing = image_folder(str(tmp_path), 2, test_fraction=0)
    assert data.train.fingerprint() != refusing.train.fingerprint()
    with pytest.raises(UserError, match=r"data\.sixteen_bits='scale': did you mean 'scaled'"):
        image_folder(str(tmp_path), sixteen_bits="scale")


@pytest.mark.parametrize("depth", [1, 15, 255])
def test_ppm_files_of_8_bits_and_fewer_are_read(tmp_path, depth):
    file = tmp_path / "flat.ppm"
    file.write_bytes(f"P6 2 2 {depth}\n".encode() + bytes([depth]) * 12)
    assert (read_image(file, "x") == 255).all()


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGB", "RGBA"])
@pytest.mark.parametrize("kind", ["PNG", "TIFF"])
def test_files_of_8_bits_and_fewer_are_read(tmp_path, mode, kind):
    file = tmp_path / "flat.png"
    white = Image.new("RGBA", (4, 3), "white").convert(mode)
    white.save(file, kind)
    assert (read_image(file, "x") == 255).all()


# Transparency: the share α of each channel is the image's, the rest the background's.

ALPHAS = np.array([[0, 64], [191, 255]], np.uint8)
RED = (200, 30, 60)


def shown(file: Path, **how) -> np.ndarray:
    return read_image(file, "x", **how).astype(float)


def composed(colour, background) -> np.ndarray:
    """`α c + (1 − α) b` by the definition, `[2, 2, C]`."""
    share = ALPHAS[..., None] / 255
    return share * np.array(colour) + (1 - share) * np.array(background)


def save_rgba(file: Path, kind: str = "PNG") -> Path:
    pixels = np.concatenate([np.full((2, 2, 3), RED, np.uint8), ALPHAS[..., None]], axis=2)
    Image.fromarray(pixels).save(
        file, kind, **({"lossless": True, "exact": True} if kind == "WEBP" else {})
    )
    return file


@pytest.mark.parametrize("kind", ["PNG", "TIFF", "WEBP"])
@pytest.mark.parametrize(
    ("background", "rgb"), [("white", 255), ("black", 0), ("#10f080", (16, 240, 128))]
)
def test_transparent_colours_are_laid_over_the_background(tmp_path, kind, background, rgb):
    file = save_rgba(tmp_path / "a.png", kind)
    found = shown(file, background=background)
    np.testing.assert_allclose(found, composed(RED, rgb), atol=1)
    np.testing.assert_array_equal(found[0, 0], np.broadcast_to(rgb, 3))  # nothing below shows
    np.testing.assert_array_equal(found[1, 1], RED)


def test_grey_with_alpha_is_laid_over_the_background(tmp_path):
    file = tmp_path / "a.png"
    Image.fromarray(np.stack([np.full((2, 2), 40, np.uint8), ALPHAS], axis=2)).save(file)
    for channels in (1, 3):
        found = shown(file, channels=channels)
        np.testing.assert_allclose(found, np.broadcast_to(composed([40], 255), found.shape), atol=1)


@pytest.mark.parametrize("kind", ["PNG", "GIF"])
def test_a_palettes_transparent_entry_is_the_background(tmp_path, kind):
    file = tmp_path / "a.png"
    image = Image.new("P", (2, 1))
    image.putpalette([*RED, 1, 2, 3])
    image.putdata([0, 1])
    image.save(file, kind, transparency=0)
    np.testing.assert_array_equal(shown(file), [[[255] * 3, [1, 2, 3]]])


@pytest.mark.parametrize(("mode", "key", "other"), [("RGB", RED, (1, 2, 3)), ("L", 9, 8)])
def test_a_pngs_transparent_key_colour_is_the_background(tmp_path, mode, key, other):
    file = tmp_path / "a.png"
    image = Image.new(mode, (2, 1), other)
    image.putpixel((0, 0), key)
    image.save(file, transparency=key)
    np.testing.assert_array_equal(shown(file), [[[255] * 3, np.broadcast_to(other, 3)]])


@pytest.mark.parametrize("channels", [1, 3])
def test_opaque_images_are_what_they_were(tmp_path, channels):
    """An alpha channel that hides nothing changes no bit."""
    pixels = np.random.default_rng(0).integers(0, 256, (8, 8, 3), np.uint8)
    plain = Image.fromarray(pixels)
    plain.save(tmp_path / "plain.png")
    opaque = plain.copy()
    opaque.putalpha(255)
    opaque.save(tmp_path / "opaque.png")
    first, second = (
        shown(tmp_path / f"{name}.png", channels=channels) for name in ("plain", "opaque")
    )
    np.testing.assert_array_equal(first, second)


def test_the_background_is_a_setting_of_the_folder_and_of_its_fingerprint(tmp_path):
    for i in range(10):
        save_rgba(tmp_path / f"{i}.png")
    sources = {
        colour: image_folder(str(tmp_path), image_size=2, background=colour).train
        for colour in ("white", "black")
    }
    for colour, level in (("white", 255), ("black", 0)):
        np.testing.assert_array_equal(sources[colour][0]["image"][0, 0], [level] * 3)
    assert sources["white"].fingerprint() != sources["black"].fingerprint()
    assert sources["white"].fingerprint() == image_folder(str(tmp_path), 2).train.fingerprint()


@pytest.mark.parametrize("background", ["whitish", "#12", "", 3])
def test_what_is_no_colour_is_refused(tmp_path, background):
    with pytest.raises(UserError, match=r"background=.* is not a colour"):
        image_folder(str(tmp_path), background=background)
