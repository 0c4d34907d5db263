"""Images that priors learn from, or that say what a refined scene shall look like."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float, UInt8
from PIL import Image
from torch import Tensor

from nfldm_ns.choice import evenly
from nfldm_ns.errors import UserInputError
from nfldm_ns.generated.scene_files import DESCRIPTION
from nfldm_ns.scenes.collection import MASK_FOLDER, SceneCollection, read_transforms
from nfldm_ns.scenes.image_files import open_image, rgb_image

IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp")


def centre_square(image: Float[Tensor, "*batch height width"]) -> Float[Tensor, "*batch side side"]:
    """The largest square in the middle of images."""
    height, width = image.shape[-2:]
    side = min(height, width)
    top, left = (height - side) // 2, (width - side) // 2
    return image[..., top : top + side, left : left + side]


def read_square_images(paths: Sequence[Path], size: int) -> UInt8[Tensor, "images 3 size size"]:
    """The middle squares of image files, brought to one size.

    Raises:
        UserInputError: if a file is no readable image.
    """
    images = []
    for path in paths:
        image = rgb_image(open_image(path, "give another one"), path)
        side = min(image.size)
        left, top = (image.width - side) // 2, (image.height - side) // 2
        image = image.crop((left, top, left + side, top + side))
        if side != size:
            image = image.resize((size, size), Image.Resampling.LANCZOS)
        images.append(torch.from_numpy(np.array(image)).permute(2, 0, 1))
    return torch.stack(images)


def collection_paths(collection: SceneCollection, split: str) -> list[Path]:
    """All images of one split, source and target views, scene by scene.

    Raises:
        UserInputError: if one has a mask, for what lies under it would count, too.
    """
    paths = []
    for scene_id in collection.split(split):
        folder = collection.scene_dir(scene_id)
        transforms = read_transforms(folder)
        if any("mask_path" in frame for frame in transforms.frames.values()):
            raise _masked(folder)
        paths += [folder / name for name in dict.fromkeys([*transforms.source_names, *transforms.target_names])]
    return paths


def _masked(scene: Path) -> UserInputError:
    return UserInputError(
        f"The scene {scene} has masks, but here masked pixels would count as if they were of it: give a folder of "
        "images, or scenes without masks."
    )


def render_paths(folders: Sequence[Path]) -> list[Path]:
    """The images of generated scenes.

    Args:
        folders: scenes, or folders of scenes as `nfldm-sample` leaves them.

    Raises:
        UserInputError: if one has none.
    """
    paths: list[Path] = []
    for folder in folders:
        scenes = (
            [folder] if (folder / DESCRIPTION).is_file() else sorted(p.parent for p in folder.glob(f"*/{DESCRIPTION}"))
        )
        found = [path for scene in scenes for path in _images_in(scene / "images")]
        if not found:
            raise UserInputError(f"There are no images of generated scenes in {folder}: make some with 'nfldm-sample'.")
        paths += found
    return paths


def _images_in(folder: Path) -> list[Path]:
    if not folder.is_dir():
        return []
    return sorted(file for file in folder.iterdir() if file.suffix.lower() in IMAGE_SUFFIXES)


def example_paths(path: Path | str) -> list[Path]:
    """The images of an image file, a folder of images, a scene collection or a scene.

    A scene (generated or of a collection) gives its `images/`, a collection those of its training scenes.

    Raises:
        UserInputError: if there are none, or one has a mask.
    """
    path = Path(path)
    if path.is_file():
        paths = [path]
    elif (path / "collection.json").is_file():
        paths = collection_paths(SceneCollection.open(path), "train")
    elif path.is_dir():
        is_scene = (path / "transforms.json").is_file()
        if is_scene and (path / MASK_FOLDER).is_dir():
            raise _masked(path)
        paths = _images_in(path / "images" if is_scene else path)
    else:
        raise UserInputError(f"There is no {path}: give an image, a folder of images, a scene or a scene collection.")
    if not paths:
        raise UserInputError(f"There are no images in {path}: give an image, a folder of images or a scene collection.")
    return paths


def example_images(path: Path | str, size: int, most: int = 256) -> Float[Tensor, "images 3 size size"]:
    """At most `most` images in [0, 1] of what `example_paths` takes."""
    return read_square_images(evenly(example_paths(path), most), size).float() / 255
