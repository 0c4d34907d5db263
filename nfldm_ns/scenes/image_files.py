"""The one place that opens pictures: whatever a file holds becomes upright 8-bit RGB, or a sentence says why not."""

from __future__ import annotations

import io
import os
from pathlib import Path

import numpy as np
from jaxtyping import Bool, Float, UInt8
from PIL import Image, ImageOps

from nfldm_ns.errors import UserInputError

ALPHA_BACKGROUND = (255, 255, 255)  # what transparent pixels show, as in nerfstudio's blender data
SIXTEEN_BITS = ("I;16", "I;16B", "I;16L", "I;16N")
COLOUR_MODES = ("1", "L", "LA", "P", "PA", "RGB", "RGBA", "RGBa", "RGBX", "CMYK", "YCbCr", "LAB", "HSV")
DEPTH_ARRAYS = (".npy", ".npz")
RAW_DEPTH = ".depth"  # of Record3D: single precision, compressed by LZFSE, without a size
FIRST_IS_MEANT = ("MPO",)  # photos of phones: smaller ones, or the other eye's, follow the photo itself


def open_image(path: Path, remedy: str, missing: str | None = None, content: bytes | None = None) -> Image.Image:
    """A picture with all of its pixels read, as the file holds them.

    Args:
        remedy: what to do when it cannot be read, to end the sentence with.
        missing: what to do when there is no such file; by default the same.
        content: of the file, if it is not on this disk; then `path` is its name in messages.

    Raises:
        UserInputError: if it is missing, damaged, no picture, or holds several of which none is the one that is meant.
    """
    try:
        image = Image.open(path if content is None else io.BytesIO(content))
        count = getattr(image, "n_frames", 1)
        image.load()
    except FileNotFoundError:
        raise UserInputError(f"{path} is missing: {missing or remedy}.") from None
    except Exception as error:  # Pillow raises many kinds for damaged files
        raise UserInputError(f"{path} is not a readable image ({error}): {remedy}.") from None
    if count > 1 and image.format not in FIRST_IS_MEANT:
        raise UserInputError(f"{path} holds {count} pictures, as an animation does: save the one that is meant.")
    return image


def rgb_image(image: Image.Image, path: Path) -> Image.Image:
    """A picture as 8-bit RGB, upright by its EXIF orientation, transparent parts over `ALPHA_BACKGROUND`.

    Raises:
        UserInputError: if its values have no fixed meaning as colours.
    """
    image = _upright(image, path)
    if image.mode in (*SIXTEEN_BITS, "I"):
        values = np.asarray(image).astype(np.int64)
        if values.min() < 0 or values.max() > 65535:
            raise UserInputError(f"{path} has grey values beyond 16 bits: save it with 8 or 16 bits.")
        return Image.fromarray(np.round(values / 257).astype(np.uint8)).convert("RGB")
    if image.mode not in COLOUR_MODES:
        raise UserInputError(
            f"{path} has pixels of mode {image.mode}, which are no colours: save it with 8 or 16 bits."
        )
    if "A" in image.getbands() or "a" in image.getbands() or "transparency" in image.info:
        image = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", image.size, (*ALPHA_BACKGROUND, 255)), image).convert("RGB")
    return image.convert("RGB")


def read_rgb(path: Path, remedy: str, missing: str | None = None) -> UInt8[np.ndarray, "height width 3"]:
    """A file's picture as upright 8-bit RGB, see `open_image` and `rgb_image`."""
    return np.asarray(rgb_image(open_image(path, remedy, missing), path))


def read_depth_file(
    path: Path, eight_bits: bool = False, size: tuple[int, int] | None = None
) -> Float[np.ndarray, "height width"]:
    """Depth in the units of its file; 0 is unknown, and so is what is not finite or negative.

    Files are npy, npz with one array, or pictures of one channel with 16 bits or floating point numbers (PNG, TIFF,
    OpenEXR); `[H, W, 1]` will do, and colours that are all equal.

    Args:
        eight_bits: whether 8 bits will do, as of a game's depth buffer.
        size: (width, height), of files that do not say it themselves.

    Raises:
        UserInputError: if it is missing, damaged, or of another shape or type.
    """
    if path.suffix.lower() == RAW_DEPTH and size is not None:
        depth = _read_raw_depth(path, size)
    elif path.suffix.lower() in DEPTH_ARRAYS:
        depth = _read_array(path)
    else:
        depth = _read_depth_picture(path, eight_bits)
    if depth.ndim == 3 and depth.shape[-1] == 1:
        depth = depth[..., 0]
    usable = depth.dtype.kind in "uif" and (eight_bits or depth.dtype != np.uint8)
    if depth.ndim != 2 or not usable or 0 in depth.shape:
        raise UserInputError(
            f"{path} is no depth of one channel with 16 bits or more ({depth.dtype}, {list(depth.shape)}): convert it."
        )
    depth = depth.astype(np.float64)
    return np.where(np.isfinite(depth) & (depth > 0), depth, 0)


def read_mask_file(path: Path) -> Bool[np.ndarray, "height width"]:
    """Which pixels are of the scene, upright by EXIF orientation: 0 is masked, all else valid.

    Raises:
        UserInputError: if it is missing, damaged, or has colours or transparency.
    """
    image = open_image(path, "restore it", "restore it or remove mask_path from its frame")
    if image.mode not in (*SIXTEEN_BITS, "1", "L", "I"):
        raise UserInputError(
            f"{path} has mode {image.mode}, but a mask must be grey or black and white, black where masked: convert it."
        )
    return np.asarray(ImageOps.exif_transpose(image)) != 0


def _read_array(path: Path) -> np.ndarray:
    try:
        content = np.load(path, allow_pickle=False)
        if isinstance(content, np.ndarray):
            return content
        with content:
            names = list(content.files)
            if len(names) == 1:
                return content[names[0]]
    except FileNotFoundError:
        raise UserInputError(f"{path} is missing: restore it or remove depth_file_path from all frames.") from None
    except Exception as error:  # numpy and zipfile raise many kinds for damaged files
        raise UserInputError(f"{path} is no readable array of depths ({error}): restore it.") from None
    raise UserInputError(f"{path} holds {len(names)} arrays ({', '.join(names)}): keep the depth alone.")


def _read_raw_depth(path: Path, size: tuple[int, int]) -> np.ndarray:
    try:
        import liblzfse
    except ModuleNotFoundError:
        raise UserInputError(
            f"{path} is compressed by LZFSE: 'pip install pyliblzfse' brings what reads it, or export depth as EXR."
        ) from None
    try:
        content = liblzfse.decompress(path.read_bytes())
    except FileNotFoundError:
        raise UserInputError(f"{path} is missing: restore it, or remove what belongs to it.") from None
    except Exception as error:  # the library raises its own kind
        raise UserInputError(f"{path} cannot be decompressed ({error}): restore it.") from None
    if len(content) != 4 * size[0] * size[1]:
        raise UserInputError(f"{path} holds {len(content)} bytes, not {size[0]} x {size[1]} depths: restore it.")
    return np.frombuffer(content, np.float32).reshape(size[1], size[0])


def _read_depth_picture(path: Path, eight_bits: bool) -> np.ndarray:
    if path.suffix.lower() == ".exr":
        return _read_exr(path)
    image = open_image(path, "restore it", "restore it or remove depth_file_path from all frames")
    if image.mode not in (*SIXTEEN_BITS, "I", "F", *(["L"] if eight_bits else [])):
        raise UserInputError(
            f"{path} has mode {image.mode}, but depth must be a single-channel 16-bit depth image: convert it."
        )
    return np.asarray(_upright(image, path))


def _read_exr(path: Path) -> np.ndarray:
    """The one channel of an OpenEXR file, or what its three colours have in common."""
    import cv2

    if not path.is_file():
        raise UserInputError(f"{path} is missing: restore it or remove depth_file_path from all frames.")
    os.environ.setdefault("OPENCV_IO_ENABLE_OPENEXR", "1")  # OpenCV reads it when it first meets such a file
    try:
        depth = cv2.imread(str(path), cv2.IMREAD_UNCHANGED)
    except cv2.error:
        depth = None
    if depth is None:
        raise UserInputError(f"{path} is no readable OpenEXR file: restore it, or save its depth as npy or TIFF.")
    if depth.ndim == 3 and (depth == depth[..., :1]).all():
        return depth[..., 0]
    return depth


def _upright(image: Image.Image, path: Path) -> Image.Image:
    try:
        return ImageOps.exif_transpose(image)
    except Exception as error:  # EXIF data may hold anything
        raise UserInputError(f"The EXIF data of {path} are damaged ({error}): remove or repair them.") from None
