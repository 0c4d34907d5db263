"""A scene's semantic map as a view sees it: what lies in the direction of each column of the image, by distance."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float, Int, Int16, UInt8
from nerfstudio.cameras.cameras import Cameras
from nerfstudio.utils.rich_utils import CONSOLE
from torch import Tensor, nn

from nfldm_ns.diffusion.bev import to_grid_order
from nfldm_ns.errors import UserInputError
from nfldm_ns.scenes.bev_maps import read_drawn_map
from nfldm_ns.scenes.collection import BEV_FILE, BevClass, SceneCollection, bev_class, read_transforms

COLUMNS, DISTANCES = 16, 16
NOT_SEEN = -1  # in all places of a view of a scene without a map
MAP_FEATURES = 16  # channels of what the denoiser sees of a map

SeenMaps = Int16[Tensor, "views distances columns"]


@dataclass(frozen=True)
class MapDescription:
    """The maps that a prior knows.

    Attributes:
        classes: of the collection.
        size: (height, width) of its maps.
        reach: how far from a camera they are looked at, in metres: half the longer horizontal side of its box.
    """

    classes: tuple[BevClass, ...]
    size: tuple[int, int]
    reach: float

    @property
    def outside(self) -> int:
        """The class of what the map does not show."""
        return max(c.id for c in self.classes) + 1

    @staticmethod
    def of_collection(collection: SceneCollection) -> MapDescription:
        """Of its training scenes.

        Raises:
            UserInputError: if they have no maps.
        """
        height, width = collection.load_bev(collection.split("train")[0]).shape
        reach = float((collection.aabb[1, :2] - collection.aabb[0, :2]).max()) / 2
        return MapDescription(tuple(collection.bev_classes), (height, width), reach)

    @staticmethod
    def from_json(entry: Mapping[str, Any]) -> MapDescription:
        """As `to_json` wrote it; raises KeyError, TypeError or ValueError for anything else."""
        height, width = (int(side) for side in entry["size"])
        return MapDescription(tuple(bev_class(c) for c in entry["classes"]), (height, width), float(entry["reach"]))

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True)
class SceneMap:
    """The map of one scene.

    Attributes:
        classes: `[height, width]`, class ids in the order of V.
        aabb: `[2, 3]` in metres; the map covers it.
        description: what the classes mean.
    """

    classes: Int[Tensor, "height width"]
    aabb: Float[Tensor, "2 3"]
    description: MapDescription

    @staticmethod
    def read(path: Path | str, aabb: Float[Tensor, "2 3"], description: MapDescription) -> SceneMap:
        """A map of a file, which a user may have drawn; raises `UserInputError` as `read_drawn_map`."""
        return SceneMap.of_file_order(read_drawn_map(path, description.classes, description.size), aabb, description)

    @staticmethod
    def of_file_order(
        bev: UInt8[np.ndarray, "height width"], aabb: Float[Tensor, "2 3"], description: MapDescription
    ) -> SceneMap:
        """Of class ids with the north up."""
        return SceneMap(to_grid_order(torch.from_numpy(np.array(bev))).long(), aabb, description)

    def to(self, device: torch.device | str) -> SceneMap:
        return SceneMap(self.classes.to(device), self.aabb.to(device), self.description)

    def seen_by(self, cameras: Cameras) -> SeenMaps:
        """What is seen in the middle square of each view, on the map's device.

        Columns go from left to right; distances, along the optical axis, are in the middle of equal parts of the reach.
        Cameras may look up or down a little, but are taken as if they were level.

        Args:
            cameras: of any batch shape, which is flattened.
        """
        cameras = cameras.flatten().to(self.classes.device)
        rays = self._column_rays(cameras)
        distance = (torch.arange(DISTANCES, device=rays.device) + 0.5) / DISTANCES * self.description.reach
        position = cameras.camera_to_worlds[:, None, None, :2, 3]
        places = position + distance[:, None, None] * rays[:, None]
        low, high = self.aabb.to(places)[:, :2]
        height, width = self.classes.shape
        x, y = ((places - low) / (high - low) * places.new_tensor([width, height])).floor().long().unbind(-1)
        inside = (x >= 0) & (x < width) & (y >= 0) & (y < height)
        found = self.classes[y.clamp(0, height - 1), x.clamp(0, width - 1)]
        return torch.where(inside, found, self.description.outside).to(torch.int16)

    @staticmethod
    def _column_rays(cameras: Cameras) -> Float[Tensor, "views columns 2"]:
        """Horizontal directions of the columns, one metre long along the optical axis."""
        width, height = cameras.width.float(), cameras.height.float()
        side = torch.minimum(width, height)
        centres = (torch.arange(COLUMNS, device=side.device) + 0.5) / COLUMNS * side + ((width - side) / 2).floor()
        across = (centres - cameras.cx) / cameras.fx
        right, back = cameras.camera_to_worlds[:, :2, 0], cameras.camera_to_worlds[:, :2, 2]
        ahead = F.normalize(-back, dim=-1)
        return ahead[:, None] + across[..., None] * F.normalize(right, dim=-1)[:, None]


def map_of_scene(
    known: MapDescription | None, folder: Path, drawn: Path | None, aabb: Float[Tensor, "2 3"]
) -> SceneMap | None:
    """The map that a prior is told when it refines a generated scene; says so if there is none.

    Args:
        known: the maps that the prior knows.
        folder: of the scene; its own map is the default.
        drawn: a file of the user.
        aabb: of the scene.

    Raises:
        UserInputError: if a map is given to a prior that knows none, or it does not fit.
    """
    if known is None:
        if drawn is not None:
            raise UserInputError(
                "This prior knows no maps: leave out --bev, or train one with 'nfldm-train-prior --condition bev'."
            )
        return None
    if drawn is None and not (folder / BEV_FILE).is_file():
        CONSOLE.print(f"The scene has no map ({BEV_FILE}), so the prior is asked without; --bev gives it one.")
        return None
    return SceneMap.read(drawn or folder / BEV_FILE, aabb, known)


def maps_seen_in(collection: SceneCollection, description: MapDescription, images: Sequence[Path]) -> SeenMaps:
    """What images of a collection see of the maps of their scenes; images of one scene follow each other.

    Raises:
        UserInputError: if a scene has no map, or one of another size.
    """
    root, parts = collection.root / "scenes", []
    for scene_id, paths in groupby(images, lambda path: path.relative_to(root).parts[0]):
        folder = collection.scene_dir(scene_id)
        names = [path.relative_to(folder).as_posix() for path in paths]
        bev = collection.load_bev(scene_id, description.size)
        scene_map = SceneMap.of_file_order(bev, collection.aabb, description)
        parts.append(scene_map.seen_by(read_transforms(folder).cameras(names, collection.image_size)))
    return torch.cat(parts)


class SeenMapEncoder(nn.Module):
    """Maps as views see them to channels of the image: each column learns what its distances mean for its rows.

    Args:
        num_classes: K; ids are below, and K is what lies outside of the map.
        width: of the network.
    """

    def __init__(self, num_classes: int, width: int = 48) -> None:
        super().__init__()
        self.num_classes = num_classes
        self.layers = nn.Sequential(
            nn.Conv2d(num_classes + 1, width, 3, padding=1),
            nn.GroupNorm(1, width),
            nn.SiLU(),
            nn.Conv2d(width, width, 3, stride=(2, 1), padding=1),
            nn.GroupNorm(1, width),
            nn.SiLU(),
            nn.Conv2d(width, width, 3, stride=(2, 1), padding=1),
            nn.GroupNorm(1, width),
            nn.SiLU(),
        )
        self.to_rows = nn.Conv2d(width, MAP_FEATURES * COLUMNS, (DISTANCES // 4, 1))
        self.norm = nn.GroupNorm(1, MAP_FEATURES)

    def forward(
        self, seen: Int[Tensor, "batch distances columns"] | None, sample: Float[Tensor, "batch _ height width"]
    ) -> Float[Tensor, "batch features height width"]:
        """Of the size of `sample`; zeros for views without a map, or all of them if `seen` is None."""
        if seen is None:
            return sample.new_zeros(len(sample), MAP_FEATURES, *sample.shape[2:])
        known = (seen != NOT_SEEN).flatten(1).any(1)
        one_hot = F.one_hot(seen.long().clamp(min=0), self.num_classes + 1).movedim(-1, 1).to(sample.dtype)
        rows = self.to_rows(self.layers(one_hot)).reshape(len(seen), MAP_FEATURES, COLUMNS, COLUMNS)
        features = F.interpolate(self.norm(rows), sample.shape[2:], mode="bilinear", align_corners=False)
        return features * known[:, None, None, None]
