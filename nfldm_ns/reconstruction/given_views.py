"""The images that a place is reconstructed from: read, checked, and brought to the size of stage 1."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import numpy as np
from jaxtyping import Float
from nerfstudio.cameras.cameras import Cameras
from torch import Tensor

from nfldm_ns.autoencoder.scene_autoencoder import SceneAutoencoder
from nfldm_ns.collect.capture_import import ImportOptions, load_frames
from nfldm_ns.collect.captures import Capture, CapturedFrame, Lens
from nfldm_ns.collect.formats.nerfstudio import read_capture
from nfldm_ns.errors import UserInputError
from nfldm_ns.reconstruction.visibility import cameras_inside
from nfldm_ns.scenes.views import Views, make_cameras

MAX_VIEWS = 4
FILE = "transforms.json"


@dataclass(frozen=True)
class PlaceOptions:
    """How poses of files become those of the generator's box.

    Attributes:
        metres_per_unit: scale of the poses.
        up: their axis that points up.
        depth_unit_scale: metres per unit of depth files; None as the file says, else millimetres.
        centre: moves the box so that the mean of the given cameras is its origin.
        use_depth: whether depth files are read.
    """

    metres_per_unit: float = 1.0
    up: Literal["z", "y", "-y"] = "z"
    depth_unit_scale: float | None = None
    centre: bool = False
    use_depth: bool = True


def check_count(count: int) -> None:
    """Raises `UserInputError` for no image and for more than `MAX_VIEWS`."""
    if not 1 <= count <= MAX_VIEWS:
        raise UserInputError(
            f"A place is reconstructed from 1 to {MAX_VIEWS} images, not {count}: "
            f"{'give some' if count == 0 else 'leave some out, or encode them with nfldm-edit encode'}."
        )


def views_of_images(
    images: Sequence[Path], transforms: Path, autoencoder: SceneAutoencoder, options: PlaceOptions
) -> Views:
    """Given images with the poses that a `transforms.json` of nerfstudio has for them, batch shape `[1, N]`.

    Raises:
        UserInputError: for another number of images, images that the file does not name, and what `fit_to` refuses.
    """
    check_count(len(images))
    capture = _read(transforms)
    places = {frame.image.resolve(): i for i, frame in enumerate(capture.frames)}
    missing = [image for image in images if image.resolve() not in places]
    if missing:
        raise UserInputError(
            f"{capture.file} has no pose of {missing[0]}: add its frame, or give one photo with --no-pose."
        )
    return _load(capture, [places[image.resolve()] for image in images], autoencoder, options)


def views_of_scene(scene: Path, numbers: Sequence[int], autoencoder: SceneAutoencoder, options: PlaceOptions) -> Views:
    """Some views of a scene of a collection or of a nerfstudio capture, by their places among its frames.

    Args:
        scene: the folder with `transforms.json`, or that file.
        numbers: the first frame is 0; of a scene with listed splits, frames of `train_filenames` come first.

    Raises:
        UserInputError: for numbers that there are not, and what `fit_to` refuses.
    """
    check_count(len(numbers))
    capture = _read(scene)
    order = list(dict.fromkeys([*capture.splits["train"], *range(len(capture.frames))]))
    wrong = [number for number in numbers if not 0 <= number < len(order)]
    if wrong:
        raise UserInputError(
            f"{capture.file} has {len(order)} frames, but --views has {wrong[0]}: give numbers from 0 to "
            f"{len(order) - 1}."
        )
    if len(set(numbers)) < len(numbers):
        raise UserInputError(f"--views {' '.join(map(str, numbers))} names a view twice: give each once.")
    return _load(capture, [order[number] for number in numbers], autoencoder, options)


def photo(
    image: Path,
    autoencoder: SceneAutoencoder,
    focal_length: float | None = None,
    field_of_view: float | None = None,
) -> Views:
    """One photo without a pose, batch shape `[1, 1]`, whose camera stands level at the origin until it is estimated.

    Args:
        focal_length: in pixels of the photo.
        field_of_view: horizontal, in degrees; one of the two is needed.

    Raises:
        UserInputError: if not exactly one of the two is given, or it cannot be.
    """
    if (focal_length is None) == (field_of_view is None):
        raise UserInputError("An unposed photo needs its lens: give one of --focal-length and --field-of-view.")
    if focal_length is not None and not 0 < focal_length < 1e6:
        raise UserInputError(f"--focal-length is {focal_length}: give pixels of the photo, above 0.")
    if field_of_view is not None and not 1 <= field_of_view <= 170:
        raise UserInputError(f"--field-of-view is {field_of_view}: give degrees from 1 to 170.")
    focal = None if focal_length is None else (focal_length, focal_length)
    angle = None if field_of_view is None else math.radians(field_of_view)
    lens = Lens(False, (0.0,) * 6, None, focal, None, (angle, None))
    pose = np.array([[0.0, 0, -1, 0], [-1, 0, 0, 0], [0, 1, 0, 0]])
    frame = CapturedFrame(image.name, image, None, None, pose, lens)
    return _load(Capture(image.parent, [frame], image), [0], autoencoder, PlaceOptions(use_depth=False))


def _read(path: Path) -> Capture:
    folder = path.parent if path.name == FILE else path
    if folder.is_dir() and not (folder / FILE).is_file() and (folder / "collection.json").is_file():
        raise UserInputError(f"{folder} is a collection: give one of its scenes, such as {folder}/scenes/ID.")
    if not (folder / FILE).is_file():
        raise UserInputError(f"There is no {folder / FILE}: give a transforms.json, or the folder that has one.")
    return read_capture(folder)


def _load(capture: Capture, chosen: Sequence[int], autoencoder: SceneAutoencoder, options: PlaceOptions) -> Views:
    height, width = autoencoder.encoded_size
    low, high = autoencoder.aabb.tolist()
    settings = ImportOptions(
        image_size=(width, height),
        metres_per_unit=options.metres_per_unit,
        depth_unit_scale=options.depth_unit_scale,
        up=options.up,
        aabb=(tuple(low), tuple(high)),
        near=autoencoder.config.near,
        far=autoencoder.config.far,
    )
    if not options.use_depth:
        frames = [replace(frame, depth=None, points=None) for frame in capture.frames]
        capture = replace(capture, frames=frames)
    return fit_to(load_frames(capture, chosen, settings), autoencoder, str(capture.file), options.centre)


def fit_to(views: Views, autoencoder: SceneAutoencoder, where: str, centre: bool = False) -> Views:
    """Views of batch shape `[N]` as `[1, N]`, if a generator with this stage 1 can do with them.

    Raises:
        UserInputError: for cameras outside of the box, and for fields of view far from those of the training.
    """
    if centre:
        poses = views.cameras.camera_to_worlds.clone()
        poses[:, :, 3] -= poses[:, :, 3].mean(0)
        views = replace(views, cameras=_moved(views, poses))
    aabb = autoencoder.aabb.cpu()
    outside = (~cameras_inside(views.cameras, aabb)).nonzero().flatten().tolist()
    if outside:
        place = views.cameras.camera_to_worlds[outside[0], :, 3].tolist()
        raise UserInputError(
            f"Camera {outside[0]} of {where} stands at {', '.join(f'{value:.3g}' for value in place)} m, outside of "
            f"the generator's box {[[round(v, 2) for v in corner] for corner in aabb.tolist()]}: add --centre, or set "
            "--metres-per-unit or --up."
        )
    views = autoencoder.as_encoded(views)
    trained = float(autoencoder.config.focal_length) / autoencoder.upsampling
    focal = views.cameras.fx.flatten()
    if bool(((focal / trained).log().abs() > math.log(2)).any()):
        raise UserInputError(
            f"The focal length of {where} is {float(focal[0]):.4g} pixels at {views.image_size[1]} pixels of width, "
            f"but the generator was trained with {trained:.4g}: crop them, or give images of another lens."
        )
    return Views.stack([views])


def _moved(views: Views, poses: Float[Tensor, "*views 3 4"]) -> Cameras:
    cameras, (height, width) = views.cameras, views.image_size
    fx, fy, cx, cy = (getattr(cameras, name)[..., 0] for name in ("fx", "fy", "cx", "cy"))
    return make_cameras(poses, fx, fy, cx, cy, height, width)


def posed(views: Views, pose: Float[Tensor, "3 4"]) -> Views:
    """One photo, batch shape `[1, 1]`, seen from another pose."""
    poses = pose.to(views.images).reshape(1, 1, 3, 4)
    return replace(views, cameras=_moved(views, poses))
