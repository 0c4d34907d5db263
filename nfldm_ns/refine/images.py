"""Images that priors learn from, or that say what a refined scene shall look like."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float, UInt8
from PIL import Image
from rich.progress import track
from torch import Tensor

from nfldm_ns.choice import evenly
from nfldm_ns.errors import UserInputError
from nfldm_ns.generated.scene_files import DESCRIPTION, frame_cameras, load_generated_scene
from nfldm_ns.refine.views import judged_cameras
from nfldm_ns.reports.galleries import to_uint8
from nfldm_ns.scenes.collection import MASK_FOLDER, SceneCollection, read_json, read_transforms
from nfldm_ns.scenes.image_files import open_image, rgb_image
from nfldm_ns.scenes.views import index_cameras
from nfldm_ns.training.options import is_first_process

IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp")
WORTH_A_BAR = 1000  # images, which take seconds to read


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
    silent = len(paths) < WORTH_A_BAR or not is_first_process()
    shown = track(paths, "Reading images", transient=True, disable=silent)
    return torch.stack([_square(rgb_image(open_image(path, "give another one"), path), size) for path in shown])


def _square(image: Image.Image, size: int) -> UInt8[Tensor, "3 size size"]:
    side = min(image.size)
    left, top = (image.width - side) // 2, (image.height - side) // 2
    image = image.crop((left, top, left + side, top + side))
    if side != size:
        image = image.resize((size, size), Image.Resampling.LANCZOS)
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)


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


def chosen_paths(collection: SceneCollection, split: str, most: int | None, whole_scenes: bool = False) -> list[Path]:
    """At most so many images of a split, evenly chosen; see `collection_paths`.

    Args:
        most: None for all.
        whole_scenes: scenes are chosen, at least one, and all images of these taken: for what is worked out by scene.
    """
    paths = collection_paths(collection, split)
    if most is None or most >= len(paths):
        return paths
    if not whole_scenes:
        return evenly(paths, most)
    scene_ids = list(collection.split(split))
    kept = set(evenly(scene_ids, max(1, most * len(scene_ids) // len(paths))))
    root = collection.root / "scenes"
    return [path for path in paths if path.relative_to(root).parts[0] in kept]


def _masked(scene: Path) -> UserInputError:
    return UserInputError(
        f"The scene {scene} has masks, but here masked pixels would count as if they were of it: give a folder of "
        "images, or scenes without masks."
    )


def render_images(folders: Sequence[Path], size: int) -> UInt8[Tensor, "images 3 size size"]:
    """The images of generated scenes, as refining shows them to a prior: without what an upsampler adds that it would
    not see.

    Args:
        folders: scenes, or folders of scenes as `nfldm-sample` leaves them.
        size: side of the images that the prior looks at.

    Raises:
        UserInputError: if one has none, or a scene cannot be read.
    """
    images: list[UInt8[Tensor, "views 3 size size"]] = []
    for folder in folders:
        scenes = (
            [folder] if (folder / DESCRIPTION).is_file() else sorted(p.parent for p in folder.glob(f"*/{DESCRIPTION}"))
        )
        found = [scene for scene in scenes if _images_in(scene / "images")]
        if not found:
            raise UserInputError(f"There are no images of generated scenes in {folder}: make some with 'nfldm-sample'.")
        images += [_scene_images(scene, size) for scene in found]
    return torch.cat(images)


def _scene_images(folder: Path, size: int) -> UInt8[Tensor, "views 3 size size"]:
    """Those on disk, or rendered again where they are larger than a prior is shown."""
    if read_json(folder / DESCRIPTION).get("autoencoder", {}).get("decoder_upsampling_channels"):
        scene, cameras = load_generated_scene(folder), frame_cameras(folder, with_targets=True)
        judged = judged_cameras(cameras, scene.renderer, size)
        if judged is not cameras:
            with torch.inference_mode():
                rgb = scene.renderer.render(scene.grid, index_cameras(judged, (None,))).rgb[0]
            return torch.stack([_square(Image.fromarray(to_uint8(image)), size) for image in rgb])
    return read_square_images(_images_in(folder / "images"), size)


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
    """At most `most` images in [0, 1] of what `example_paths` takes, of scenes as `render_images` has them."""
    paths = example_paths(path)
    if (Path(path) / DESCRIPTION).is_file():
        return torch.stack(evenly(list(_scene_images(Path(path), size)), most)).float() / 255
    return read_square_images(evenly(paths, most), size).float() / 255
