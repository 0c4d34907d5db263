"""Writing scenes to disk so that nothing is ever left half-written."""

from __future__ import annotations

import contextlib
import errno
import io
import json
import os
import re
import shutil
import tempfile
import uuid
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Bool, Float, UInt8
from PIL import Image

from nfldm_ns.errors import UserInputError
from nfldm_ns.scenes.collection import BEV_FILE, DEPTH_UNIT_M, FORMAT, MASK_FOLDER, VERSION, BevClass
from nfldm_ns.scenes.views import Views, masks_or_valid

FULL_DISK_BYTES = 2**16
_UNFINISHED = re.compile(r"\.(?P<name>.+)\.[0-9a-f]{8}\.(tmp|folder|old)")


@contextlib.contextmanager
def atomic_path(destination: Path, folder: Path | None = None) -> Iterator[Path]:
    """A temporary path beside `destination`, renamed to it when the block ends well and removed when it fails.

    Works for files and folders; an existing folder at the destination is replaced.

    Args:
        folder: where the temporary path lies instead, on the same file system.

    Raises:
        OSError: naming `destination`, if the system could not write, also where a library reports that in its own way.
    """
    destination.parent.mkdir(parents=True, exist_ok=True)
    temporary = (folder or destination.parent) / f".{destination.name}.{uuid.uuid4().hex[:8]}.tmp"
    try:
        yield temporary
        if temporary.is_dir() and destination.is_dir():
            _replace_folder(temporary, destination)
        else:
            temporary.replace(destination)
    except UserInputError:
        raise
    except Exception as error:
        number = _write_error(error, temporary)
        if number is None:
            raise
        raise OSError(number, os.strerror(number), str(destination)) from error
    finally:
        if temporary.is_dir():
            shutil.rmtree(temporary, ignore_errors=True)
        else:
            temporary.unlink(missing_ok=True)


def clear_unfinished(folder: Path, name: str | None = None) -> None:
    """Removes what a killed process left of `atomic_path` in a folder that nobody else writes to now.

    A folder that was to be replaced, but was not yet, goes back to its place.

    Args:
        name: of the only destination in the folder whose leftovers are removed; others may be written to.
    """
    for path in folder.glob(".*") if folder.is_dir() else ():
        found = _UNFINISHED.fullmatch(path.name)
        if found is None or (name is not None and found["name"] != name):
            continue
        destination = folder / found["name"]
        if path.suffix == ".old" and not destination.exists():
            path.replace(destination)
        elif path.is_dir():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)


def require_writable(folder: Path) -> None:
    """Makes a folder and writes to it for a moment, before long work; `OSError` if it cannot."""
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryFile(dir=folder):
        pass


def _replace_folder(new: Path, destination: Path) -> None:
    """Puts a new folder in the place of an old one, which stays if that fails."""
    old = new.with_suffix(".old")
    destination.replace(old)
    try:
        new.replace(destination)
    except OSError:
        old.replace(destination)
        raise
    shutil.rmtree(old, ignore_errors=True)


def _write_error(error: Exception, temporary: Path) -> int | None:
    """The `errno` of a failed write to `temporary`, None for any other error.

    safetensors tells the number in words; torch.save and some image codecs hide it, so the disk itself is asked.
    """
    if isinstance(error, OSError) and error.errno is not None:
        own = error.filename is None or Path(os.fsdecode(error.filename)).is_relative_to(temporary)
        return error.errno if own else None
    told = re.search(r"\(os error (\d+)\)", str(error))
    if told:
        return int(told[1])
    return errno.ENOSPC if shutil.disk_usage(temporary.parent).free < FULL_DISK_BYTES else None


def write_json(path: Path, content: Any) -> None:
    """Writes JSON in one step."""
    with atomic_path(path) as temporary:
        temporary.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


def write_image(path: Path, image: UInt8[np.ndarray, "height width 3"]) -> None:
    """Writes an RGB PNG."""
    Image.fromarray(image).save(path)


def write_depth(path: Path, depth: Float[np.ndarray, "height width"]) -> None:
    """Writes planar depth in metres as a 16-bit PNG in millimetres; values beyond 65.535 m become unknown (0)."""
    millimetres = np.round(np.nan_to_num(depth) / DEPTH_UNIT_M)
    millimetres[(millimetres < 0) | (millimetres > 65535)] = 0
    Image.fromarray(millimetres.astype(np.uint16)).save(path)


def write_mask(path: Path, mask: Bool[np.ndarray, "height width"]) -> None:
    """Writes which pixels are of the scene as an 8-bit PNG: 255, and 0 where masked."""
    Image.fromarray(mask.astype(np.uint8) * 255).save(path)


def write_bev(path: Path, bev: UInt8[np.ndarray, "height width"], classes: Sequence[BevClass]) -> None:
    """Writes class ids as a palette PNG in the colours of the classes."""
    path.write_bytes(bev_png(bev, classes))


def bev_png(bev: UInt8[np.ndarray, "height width"], classes: Sequence[BevClass]) -> bytes:
    """Class ids as a palette PNG in the colours of the classes."""
    image = Image.fromarray(bev)
    palette = [0] * 768
    for bev_class in classes:
        palette[3 * bev_class.id : 3 * bev_class.id + 3] = bev_class.color
    image.putpalette(palette)
    buffer = io.BytesIO()
    image.save(buffer, format="PNG")
    return buffer.getvalue()


def write_scene(
    folder: Path,
    source: Views,
    target: Views,
    bev: UInt8[np.ndarray, "height width"] | None = None,
    bev_classes: Sequence[BevClass] = (),
    extra: dict[str, Any] | None = None,
) -> None:
    """Writes one scene as a nerfstudio dataset, whole or not at all.

    Args:
        folder: the scene's folder; replaced if it exists.
        source: views for the encoder, batch shape `[N]`; they become `train_filenames`.
        target: held-back views, batch shape `[M]`; they become `val_filenames` and `test_filenames`.
        extra: further keys for `transforms.json`.
    """
    if source.masks is not None or target.masks is not None:  # nerfstudio wants masks of all frames, or of none
        source, target = (replace(views, masks=masks_or_valid(views)) for views in (source, target))
    with atomic_path(folder) as temporary:
        frames = [*_write_views(temporary, "source", source), *_write_views(temporary, "target", target)]
        names = [frame["file_path"] for frame in frames]
        num_source = len(names) - target.shape[0]
        content = {
            "camera_model": "OPENCV",
            "frames": frames,
            "train_filenames": names[:num_source],
            "val_filenames": names[num_source:],
            "test_filenames": names[num_source:],
            **(extra or {}),
        }
        write_json(temporary / "transforms.json", content)
        if bev is not None:
            write_bev(temporary / BEV_FILE, bev, bev_classes)


def _write_views(folder: Path, role: str, views: Views) -> list[dict[str, Any]]:
    height, width = views.image_size
    (folder / "images").mkdir(parents=True, exist_ok=True)
    frames = []
    for i in range(views.shape[0]):
        name = f"{role}_{i:02d}.png"
        image = views.images[i].clamp(0, 1).mul(255).round().byte().permute(1, 2, 0).cpu().numpy()
        write_image(folder / "images" / name, image)
        pose = np.eye(4)
        pose[:3] = views.cameras.camera_to_worlds[i].double().cpu().numpy()
        frame = {"file_path": f"images/{name}", "w": width, "h": height, "transform_matrix": pose.tolist()}
        for key, value in (("fl_x", "fx"), ("fl_y", "fy"), ("cx", "cx"), ("cy", "cy")):
            frame[key] = float(getattr(views.cameras, value)[i])
        if views.depths is not None:
            (folder / "depths").mkdir(exist_ok=True)
            write_depth(folder / "depths" / name, views.depths[i, 0].float().cpu().numpy())
            frame["depth_file_path"] = f"depths/{name}"
        if views.masks is not None:
            (folder / MASK_FOLDER).mkdir(exist_ok=True)
            write_mask(folder / MASK_FOLDER / name, views.masks[i, 0].cpu().numpy())
            frame["mask_path"] = f"{MASK_FOLDER}/{name}"
        frames.append(frame)
    return frames


def write_collection(
    root: Path,
    *,
    name: str,
    licence: str,
    aabb: Sequence[Sequence[float]],
    near: float,
    far: float,
    image_size: tuple[int, int],
    splits: dict[str, list[str]],
    places: dict[str, dict[str, Any]],
    bev_classes: Sequence[BevClass],
    made_by: dict[str, Any],
) -> None:
    """Writes `collection.json`; arguments as the attributes of `SceneCollection`, `image_size` is (width, height)."""
    write_json(
        root / "collection.json",
        {
            "format": FORMAT,
            "version": VERSION,
            "name": name,
            "licence": licence,
            "aabb": [list(corner) for corner in aabb],
            "near": near,
            "far": far,
            "image_size": list(image_size),
            "splits": splits,
            "scenes": places,
            "bev_classes": [{"id": c.id, "name": c.name, "color": list(c.color)} for c in bev_classes],
            "made_by": made_by,
        },
    )
