import struct
import zlib
from unittest.mock import Mock

import numpy as np
import pytest
from PIL import Image, ImageColor, ImageOps

import data
from photos import read_photo

RED, BLUE = (Image.new("RGB", (40, 30), colour) for colour in ("red", "blue"))
SHAPE = data.draw_shapes(1, seed=0)
PHOTO = Image.fromarray(SHAPE.images[0].permute(1, 2, 0).numpy())
RED_16 = (0xFF00, 0, 0)


def write_png(path, kind, *samples, **chunks):
    """Write a PNG of one pixel of 16 bits a sample, a kind that PIL reads and does not write."""
    parts = {"IHDR": struct.pack(">IIBBBBB", 1, 1, 16, kind, 0, 0, 0)} | chunks
    parts |= {"IDAT": zlib.compress(struct.pack(f">x{len(samples)}H", *samples)), "IEND": b""}
    parts = [(name.encode() + part, len(part)) for name, part in parts.items()]
    parts = [struct.pack(">I", n) + p + struct.pack(">I", zlib.crc32(p)) for p, n in parts]
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + b"".join(parts))


def write_tiff(path, bits, white_is_zero, pixels):
    """Write a grey TIFF of one row of two pixels, of any number of bits."""
    tags = {256: 2, 257: 1, 258: bits, 259: 1, 262: 1 - white_is_zero, 273: 8, 277: 1, 278: 1}
    tags |= {279: len(pixels)}
    entries = b"".join(struct.pack("<HHIHH", tag, 3, 1, tags[tag], 0) for tag in tags)
    pixels = pixels.ljust(8, b"\0")
    path.write_bytes(b"II*\0" + struct.pack("<I8sH", 16, pixels, len(tags)) + entries + bytes(4))


def read_colour(path):
    """The colour of the middle of a photo."""
    photo = read_photo(path)
    assert photo.mode == "RGB"
    return photo.getpixel((photo.width // 2, photo.height // 2))


@pytest.mark.parametrize(
    "name, photo, options, colour",
    [
        ("palette.png", RED.convert("P"), {}, "red"),
        ("palette.gif", Image.new("P", (5, 5), 3), {"transparency": 3}, "white"),
        ("cmyk.tif", RED.convert("CMYK"), {}, "red"),
        ("cmyk.jpg", RED.convert("CMYK"), {"quality": 100}, "red"),
        ("l.png", RED.convert("L"), {}, "#4c4c4c"),
        ("la.png", RED.convert("LA"), {}, "#4c4c4c"),
        ("16 bits.png", Image.fromarray(np.full((5, 5), 0x8080, np.uint16)), {}, "#808080"),
        ("dark.png", Image.fromarray(np.full((5, 5), 0x0101, np.uint16)), {}, "#010101"),
        ("one pixel.png", Image.new("1", (1, 1), 1), {}, "white"),
        ("transparent.png", Image.new("RGBA", (5, 5), (255, 0, 0, 0)), {}, "white"),
        ("half.png", Image.new("RGBA", (5, 5), (255, 0, 0, 128)), {}, "#ff7f7f"),
        ("animation.gif", RED, {"save_all": True, "append_images": [BLUE]}, "red"),
    ],
)
def test_photos_of_every_kind_are_read(tmp_path, name, photo, options, colour):
    photo.save(tmp_path / name, **options)
    assert read_colour(tmp_path / name) == ImageColor.getrgb(colour)
    assert read_photo(tmp_path / name).size == photo.size


@pytest.mark.parametrize(
    "kind, samples, chunks, colour",
    [
        (0, [0x8080], {}, "#808080"),
        (0, [0x8080], {"tRNS": struct.pack(">H", 0x8080)}, "white"),
        (2, RED_16, {}, "red"),
        (4, [0, 0xFFFF], {}, "black"),
        (4, [0, 0], {}, "white"),
        (6, [*RED_16, 0xFFFF], {}, "red"),
        (6, [*RED_16, 0], {}, "white"),
    ],
)
def test_photos_of_16_bits_with_and_without_alpha_are_read(tmp_path, kind, samples, chunks, colour):
    write_png(tmp_path / "photo.png", kind, *samples, **chunks)
    assert read_colour(tmp_path / "photo.png") == ImageColor.getrgb(colour)


@pytest.mark.parametrize(
    "pixels",
    [
        (np.arange(256) * 257).astype("<u2"),
        (np.arange(256) * 257).astype(">u2"),
        np.arange(256, dtype=np.int32),
        np.arange(256, dtype=np.int32) * 257,
        np.arange(256, dtype=np.int32) * 2**23,
        np.linspace(0, 1, 256, dtype=np.float32),
        np.arange(256, dtype=np.float32),
        np.linspace(-7, 9e6, 256, dtype=np.float32),
    ],
    ids=lambda pixels: f"{pixels.dtype.str} to {pixels.max():g}",
)
def test_grey_photos_of_many_bits_keep_their_gradient(tmp_path, pixels):
    Image.fromarray(np.tile(pixels, (3, 1))).save(tmp_path / "grey.tif")
    read = np.asarray(read_photo(tmp_path / "grey.tif"))
    assert np.array_equal(read[1, :, 0], np.arange(256))


@pytest.mark.parametrize(
    "bits, white_is_zero, pixels, colour",
    [
        (12, False, b"\0\x0f\xff", 255),
        (16, False, struct.pack("<2H", 0, 0x8080), 128),
        (16, True, struct.pack("<2H", 0, 0x4040), 191),
    ],
)
def test_the_white_of_a_tiff_is_what_its_tags_say(tmp_path, bits, white_is_zero, pixels, colour):
    write_tiff(tmp_path / "grey.tif", bits, white_is_zero, pixels)
    assert read_colour(tmp_path / "grey.tif") == (colour, colour, colour)


@pytest.mark.parametrize("pixel", [np.float32("nan"), np.float32("inf"), np.int32(-1)])
def test_a_photo_of_no_numbers_of_light_is_refused(tmp_path, pixel):
    Image.fromarray(np.full((5, 5), pixel)).save(tmp_path / "grey.tif")
    with pytest.raises(ValueError, match="a pixel is negative, NaN or infinite.: convert it"):
        read_photo(tmp_path / "grey.tif")


def write_exif(path, *entries):
    """Write PHOTO, of 32x32 pixels, with EXIF tags: (tag, type, count, four bytes), ..."""
    body = b"".join(struct.pack("<HHI", *entry[:3]) + entry[3] for entry in sorted(entries))
    PHOTO.save(path, exif=b"II*\0" + struct.pack("<IH", 8, len(entries)) + body + bytes(4))


SIDEWAYS = (0x0112, 3, 1, struct.pack("<HH", 6, 0))


@pytest.mark.parametrize("orientation", range(1, 9))
def test_photos_are_turned_upright(tmp_path, orientation):
    write_exif(tmp_path / "side.png", (0x0112, 3, 1, struct.pack("<HH", orientation, 0)))
    with Image.open(tmp_path / "side.png") as image:
        expected = ImageOps.exif_transpose(image)
    read = read_photo(tmp_path / "side.png")
    assert np.array_equal(np.asarray(read), np.asarray(expected))


@pytest.mark.parametrize("kind", [*range(15), 99])
def test_a_damaged_tag_does_not_keep_a_photo_from_being_turned(tmp_path, kind):
    upright = np.rot90(PHOTO, -1)
    for tag in (0x011A, 0x0213, 0x8769, 0x8825, 0x9000):  # resolution, the camera's, GPS ...
        for count, value in ((4, b"abc\0"), (1, b"\xff\0\0\0"), (0, bytes(4)), (2**31, bytes(4))):
            write_exif(tmp_path / "side.png", SIDEWAYS, (tag, kind, count, value))
            read = read_photo(tmp_path / "side.png")
            assert np.array_equal(np.asarray(read), upright), (tag, count)


@pytest.mark.parametrize(
    "orientation",
    [(3, 1, b"\0\0\0\0"), (3, 1, b"\x09\0\0\0"), (2, 4, b"six\0"), (7, 4, b"\6\0\0\0")]
    + [(5, 1, bytes(4)), (12, 1, b"\xff" * 4), (3, 0, bytes(4)), (3, 2**31, b"\xff" * 4)],
)
def test_a_photo_whose_orientation_cannot_be_read_is_used_as_it_lies(tmp_path, orientation):
    write_exif(tmp_path / "photo.png", (0x0112, *orientation))
    assert np.array_equal(read_photo(tmp_path / "photo.png"), PHOTO)


@pytest.mark.parametrize("length", range(24))
def test_a_photo_whose_tags_are_cut_off_is_read(tmp_path, length):
    write_exif(tmp_path / "whole.png", SIDEWAYS)
    with Image.open(tmp_path / "whole.png") as image:
        PHOTO.save(tmp_path / "cut.png", exif=image.info["exif"][:length])
    read = read_photo(tmp_path / "cut.png")
    assert np.array_equal(read, PHOTO) or np.array_equal(read, np.rot90(PHOTO, -1))


def test_a_photo_is_read_in_silence_though_pil_warns_of_its_size(tmp_path, monkeypatch, recwarn):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 800)
    RED.save(tmp_path / "large.png")  # of 1,200 pixels
    assert read_photo(tmp_path / "large.png").size == (40, 30)
    assert not recwarn.list


# Of each colour space: the D50 colours of its red, green and blue, the curve of its numbers.
SRGB = [[0.43607, 0.38515, 0.14307], [0.22249, 0.71687, 0.06061], [0.01392, 0.09708, 0.71410]]
P3 = [[0.51512, 0.29198, 0.15710], [0.24120, 0.69225, 0.06657], [-0.00105, 0.04189, 0.78407]]
ADOBE = [[0.60974, 0.20528, 0.14919], [0.31111, 0.62567, 0.06322], [0.01947, 0.06087, 0.74457]]
GAMMA = {"sRGB": [2.4, 1 / 1.055, 0.055 / 1.055, 1 / 12.92, 0.04045], "2.2": [563 / 256]}


def make_profile(space, tags, kind="mntr", connection="XYZ "):
    """The bytes of an ICC profile."""
    table, data, start = b"", b"", 132 + 12 * len(tags)
    for name, tag in tags.items():
        table += name.encode() + struct.pack(">II", start + len(data), len(tag))
        data += tag.ljust(-(-len(tag) // 4) * 4, b"\0")
    names = [text.encode() for text in (kind, space, connection)]
    head = struct.pack(">I4xI4s4s4s12x4s", start + len(data), 0x04000000, *names, b"acsp")
    light = struct.pack(">3i", 63190, 65536, 54061)  # D50
    head = head.ljust(68, b"\0") + light
    return head.ljust(128, b"\0") + struct.pack(">I", len(tags)) + table + data


def fixed(*numbers):
    return b"".join(struct.pack(">i", round(65536 * number)) for number in numbers)


def make_curve(gamma):
    kind = {1: 0, 5: 3}[len(GAMMA[gamma])]
    return b"para" + struct.pack(">4xHxx", kind) + fixed(*GAMMA[gamma])


def make_rgb_profile(primaries, gamma):
    colours = {f"{c}XYZ": b"XYZ \0\0\0\0" + fixed(*p) for c, p in zip("rgb", zip(*primaries))}
    return make_profile("RGB ", colours | {f"{c}TRC": make_curve(gamma) for c in "rgb"})


def to_light(values, gamma):
    if gamma == "2.2":
        return values ** (563 / 256)
    return np.where(values <= 0.04045, values / 12.92, ((values + 0.055) / 1.055) ** 2.4)


def to_numbers(light):
    """Light from 0 to 1 as sRGB's numbers."""
    light = light.clip(0, 1)
    return 255 * np.where(light < 0.0031308, 12.92 * light, 1.055 * light ** (1 / 2.4) - 0.055)


@pytest.mark.parametrize("primaries, gamma", [(SRGB, "sRGB"), (P3, "sRGB"), (ADOBE, "2.2")])
@pytest.mark.parametrize("name", ["photo.png", "photo.tif", "photo.webp"])
def test_the_colours_are_those_of_the_profile(tmp_path, primaries, gamma, name):
    pixels = np.random.default_rng(0).integers(0, 256, (16, 16, 3), dtype=np.uint8)
    profile, lossless = make_rgb_profile(primaries, gamma), {"lossless": True}
    Image.fromarray(pixels).save(tmp_path / name, icc_profile=profile, **lossless)
    light = to_light(pixels / 255, gamma) @ np.transpose(primaries) @ np.linalg.inv(SRGB).T
    read = np.asarray(read_photo(tmp_path / name))
    assert np.abs(read - to_numbers(light)).max() < 1.5
    assert (np.abs(read - pixels.astype(int)).max() > 20) == (primaries is not SRGB)


GREY = make_profile("GRAY", {"kTRC": make_curve("2.2")})


@pytest.mark.parametrize("mode", ["L", "LA", "I;16"])
def test_the_greys_are_those_of_the_profile(tmp_path, mode):
    grey = Image.new("L", (5, 5), 128)
    if mode == "I;16":
        grey = Image.fromarray(np.full((5, 5), 0x8080, np.uint16))
    elif mode == "LA":
        grey = grey.convert("LA")
    grey.save(tmp_path / "grey.png", icc_profile=GREY)
    expected = to_numbers(to_light(np.array(128 / 255), "2.2"))
    assert read_colour(tmp_path / "grey.png") == pytest.approx([expected] * 3, abs=1)


def test_inks_are_those_of_the_profile(tmp_path):
    paper, black = bytes([255, 128, 128]), bytes([0, 128, 128])  # in Lab
    straight = bytes(range(256))
    table = b"mft1" + struct.pack(">4x4B", 4, 3, 2, 0) + fixed(1, 0, 0, 0, 1, 0, 0, 0, 1)
    table += 4 * straight + paper + 15 * black + 3 * straight
    profile = make_profile("CMYK", {"A2B0": table}, "prtr", "Lab ")
    for inks, colour in ((0, 0, 0, 0), "white"), ((0, 255, 255, 0), "black"):
        Image.new("CMYK", (5, 5), inks).save(tmp_path / "inks.tif", icc_profile=profile)
        assert read_colour(tmp_path / "inks.tif") == ImageColor.getrgb(colour)


def test_a_profile_leaves_the_transparency(tmp_path):
    photo = Image.new("RGBA", (10, 5), (0, 0, 255, 0))
    photo.paste((0, 0, 255, 255), (5, 0, 10, 5))
    photo.save(tmp_path / "photo.png", icc_profile=make_rgb_profile(P3, "sRGB"))
    read = read_photo(tmp_path / "photo.png")
    assert (read.getpixel((0, 0)), read.getpixel((9, 0))) == ((255, 255, 255), (0, 0, 255))


@pytest.mark.parametrize("profile", [b"x", bytes(500), make_rgb_profile(P3, "sRGB")[:200], GREY])
def test_a_profile_that_is_damaged_or_of_other_images_does_not_matter(tmp_path, profile):
    PHOTO.save(tmp_path / "photo.png", icc_profile=profile)
    assert np.array_equal(read_photo(tmp_path / "photo.png"), PHOTO)


def test_a_pil_without_colour_profiles_reads_photos(tmp_path, monkeypatch):
    monkeypatch.setattr("PIL.ImageCms.core", None)
    PHOTO.save(tmp_path / "photo.png", icc_profile=make_rgb_profile(P3, "sRGB"))
    assert np.array_equal(read_photo(tmp_path / "photo.png"), PHOTO)


@pytest.mark.parametrize("brand, kind", [(b"heic", "HEIC"), (b"mif1", "HEIF"), (b"avis", "AVIF")])
def test_photos_of_telephones_that_pil_does_not_read_are_called_by_name(tmp_path, brand, kind):
    (tmp_path / "photo").write_bytes(struct.pack(">I", 24) + b"ftyp" + brand + bytes(500))
    with pytest.raises(ValueError, match=f"it is {kind}, .*: convert it to JPEG"):
        read_photo(tmp_path / "photo")


def test_a_photo_that_is_too_large_for_the_memory_is_named(tmp_path, monkeypatch):
    PHOTO.save(tmp_path / "photo.png")
    monkeypatch.setattr(Image, "open", Mock(side_effect=MemoryError))
    with pytest.raises(ValueError, match="photo.png: it is too large .*: make it smaller"):
        read_photo(tmp_path / "photo.png")
