"""Photos as people have them, of telephones, cameras and scanners: read as they are meant.

    photo = read_photo("cat.jpg")           # a PIL image, RGB, upright, in sRGB

What a photo says of itself is often damaged or missing. It is used as far as it can be understood,
and a photo is refused only where its pixels cannot be read.
"""

import contextlib
import errno
import io
import warnings
from pathlib import Path

import numpy as np
from PIL import Image, ImageCms, UnidentifiedImageError

ORIENTATION = 0x0112  # EXIF's tag for how the camera was held, and what undoes it
TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
BITS, PHOTOMETRIC = 0x0102, 0x0106  # TIFF's tags
# What telephones write and PIL may lack, by the brand in the first bytes of a file.
BRANDS = dict.fromkeys((b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx"), "HEIC")
BRANDS |= {b"mif1": "HEIF", b"msf1": "HEIF", b"avif": "AVIF", b"avis": "AVIF"}


def read_photo(path):
    """Return the image in a file, upright, in sRGB and over white: a PIL image of mode RGB.
    Of an animation it is the first frame. ValueError says why there is none, and what helps."""
    path = Path(path)
    try:
        if not path.is_file():  # PIL would wait for what comes out of a pipe
            raise FileNotFoundError(errno.ENOENT, "there is no such file")
        with warnings.catch_warnings():
            # PIL warns of damaged tags, and of many pixels: twice as many are an error.
            warnings.simplefilter("ignore")
            with Image.open(path) as image:
                image.load()
                turn, profile = None, image.info.get("icc_profile")
                with contextlib.suppress(Exception):  # damaged: the photo is used as it lies
                    turn = TURNS.get(image.getexif().get(ORIENTATION))
                if image.mode.startswith(("I", "F")):  # PIL would clip it
                    image = to_8_bits(image)
                image = to_srgb(image, profile)
        photo = Image.new("RGB", image.size, "white")
        photo.paste(image, mask=image)
        return photo if turn is None else photo.transpose(turn)
    except Exception as error:  # a damaged file can make PIL's decoders raise nearly anything
        raise ValueError(f"{path}: {explain_refusal(path, error)}") from error


def to_8_bits(image):
    """Return a grey image of 16 or 32 bits a pixel as one of 8. White is the end of the smallest of
    the usual ranges that holds all pixels; if none does, the darkest is black, the lightest white.
    """
    pixels, tags = np.asarray(image), getattr(image, "tag_v2", {})
    low, high = float(pixels.min()), float(pixels.max())
    if not np.isfinite(high - low) or (low < 0 and image.mode == "I"):  # 2**31 wraps around
        raise ValueError("a pixel is negative, NaN or infinite")
    bits = tags.get(BITS, (16,))[0]
    usual = {"I": (255, 65535), "F": (1, 255, 65535)}.get(image.mode, (2**bits - 1,))
    if low >= 0 and high <= usual[-1]:
        low, high = 0, min(top for top in usual if high <= top)
    share = (pixels.astype(float) - low) / (high - low or 1)
    if tags.get(PHOTOMETRIC) == 0:  # white is zero
        share = 1 - share
    share[pixels == image.info.get("transparency")] = 1  # over white
    return Image.fromarray((255 * share).round().astype(np.uint8))


def to_srgb(image, profile):
    """Return an image as RGBA, in the colours that its ICC profile means. A profile that is damaged
    or of another kind of image does not matter, nor does a PIL without LittleCMS."""
    plain = image.convert("RGBA")
    if profile:
        mode = {"L": "L", "LA": "L", "CMYK": "CMYK"}.get(image.mode, "RGBA")
        with contextlib.suppress(Exception):
            profiles = io.BytesIO(profile), ImageCms.createProfile("sRGB")
            colours = ImageCms.profileToProfile(image.convert(mode), *profiles, outputMode="RGBA")
            colours.putalpha(plain.getchannel("A"))
            return colours
    return plain


def explain_refusal(path, error):
    """Return why a photo was not read, and what helps."""
    if isinstance(error, Image.DecompressionBombError):
        return f"it has more than {2 * Image.MAX_IMAGE_PIXELS:,} pixels: make it smaller"
    if isinstance(error, MemoryError):
        return "it is too large for this computer's memory: make it smaller"
    if isinstance(error, UnidentifiedImageError):
        with path.open("rb") as file:
            start = file.read(12)
        if start[4:8] == b"ftyp" and start[8:] in BRANDS:
            return f"it is {BRANDS[start[8:]]}, which PIL cannot read here: convert it to JPEG"
        return "no image that PIL can read: convert it to JPEG"
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return f"not a whole image ({' '.join(str(error).split())}): convert it to JPEG"
