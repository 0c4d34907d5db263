"""What stage 1 makes of a few observed views of a place, seen from other poses: the conditions of ReconFusion's prior.

There (Wu et al. 2024) PixelNeRF renders a feature map at the target pose from the observed views, which a denoiser sees
beside an embedding of these. Here stage 1 lifts the observed views to V, and renders V's features.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float
from nerfstudio.cameras.cameras import Cameras
from rich.progress import track
from torch import Tensor, nn

from nfldm_ns.autoencoder.scene_autoencoder import SceneAutoencoder
from nfldm_ns.choice import evenly
from nfldm_ns.diffusion.denoisers import Normaliser
from nfldm_ns.errors import UserInputError
from nfldm_ns.refine.prior import ImageEmbedding
from nfldm_ns.scenes.collection import SceneCollection, read_transforms
from nfldm_ns.scenes.views import Views, camera_rays, index_cameras, make_cameras, project_points
from nfldm_ns.scenes.voxel_grid import VoxelGrid
from nfldm_ns.training.options import is_first_process

MAX_OBSERVED = 4
SUBSETS = 2  # of the source views of each training place: with depth, and without
DRAWS = 8  # of them, of which the one counts in whose views training images have most to see
SIGHT_CELLS, SIGHT_DEPTHS = 6, (1 / 8, 1 / 4, 1 / 2)  # points of a view: along each side, and shares of the box's reach
BESIDE_FEATURES = 2  # channels: accumulation, and depth as a share of the box's reach
VIEW_FEATURES = 32  # channels of what the denoiser sees of a map
RENDERED_AT_ONCE = 8
SIMILAR_AMONG = 64  # training places, evenly chosen
CODE_CELLS = (2, 4, 4)  # (z, y, x) of the box, of which a place's code has means


def map_channels(stage1: SceneAutoencoder) -> int:
    """Of `observed_maps`."""
    return stage1.feature_channels + BESIDE_FEATURES


def middle_squares(cameras: Cameras) -> Cameras:
    """The cameras of the largest squares in the middle of images, as `images.read_square_images` cuts them."""
    height, width = (int(size.reshape(-1)[0]) for size in (cameras.height, cameras.width))
    side = min(height, width)
    cx, cy = cameras.cx[..., 0] - (width - side) // 2, cameras.cy[..., 0] - (height - side) // 2
    return make_cameras(cameras.camera_to_worlds, cameras.fx[..., 0], cameras.fy[..., 0], cx, cy, side, side)


@torch.no_grad()
def observed_maps(
    stage1: SceneAutoencoder, grid: VoxelGrid, cameras: Cameras, side: int
) -> Float[Tensor, "views channels side side"]:
    """Features, accumulation and depth of V at square poses, as means of `side` x `side` cells.

    Args:
        grid: of one place, from the observed views of it.
        cameras: of batch shape `[N]`.
    """
    cameras = cameras.to(grid.device)
    reach = (grid.aabb[1] - grid.aabb[0]).norm() / 2
    parts = []
    for first in range(0, len(cameras), RENDERED_AT_ONCE):
        some = index_cameras(cameras, slice(first, first + RENDERED_AT_ONCE))
        maps = stage1.render(grid, index_cameras(some, None)).maps
        parts.append(torch.cat([maps.features, maps.accumulation, maps.depth / reach], dim=2)[0])
    return F.adaptive_avg_pool2d(torch.cat(parts).float(), side)


def place_code(grid: VoxelGrid) -> Float[Tensor, "batch code"]:
    """What a place is like: share of opaque space and mean opaque features in each of a few cells of its box."""
    opacity = 1 - torch.exp(-grid.density * grid.voxel_size.min())
    parts = torch.cat([opacity, opacity * grid.features], dim=1)
    return F.adaptive_avg_pool3d(parts.float(), CODE_CELLS).flatten(1)


@torch.no_grad()
def most_similar_place(
    collection: SceneCollection, stage1: SceneAutoencoder, grid: VoxelGrid, among: int = SIMILAR_AMONG
) -> tuple[str, Views]:
    """The training place whose code is nearest to that of V, and at most `MAX_OBSERVED` of its source views, `[1, N]`.

    Entries of codes count by their standard deviation over the places.

    Args:
        grid: of one place, by this stage 1.
        among: so many training places, evenly chosen.
    """
    names = evenly(list(collection.split("train")), min(among, len(collection.split("train"))))
    places, codes = [], []
    for name in names:
        source = collection.load_scene(name).source
        places.append(Views.stack([source[evenly(range(source.shape[0]), min(MAX_OBSERVED, source.shape[0]))]]))
        codes.append(place_code(stage1.encode(places[-1].to(stage1.device))))
    rows = torch.cat(codes)
    spread = rows.std(0, unbiased=False).clamp(min=1e-6)
    nearest = int(((rows - place_code(grid).to(rows)) / spread).square().sum(1).argmin())
    return names[nearest], places[nearest]


@dataclass
class ObservedViews:
    """What training images are learned with.

    Attributes:
        maps: `[N, C, S, S]`, half precision, of some views of each image's place, at the image's own pose.
        embeddings: `[N, E]`, means of these views' embeddings.
        observed: `[N]`, names of these views, none of which is the image.
    """

    maps: Float[Tensor, "images channels side side"]
    embeddings: Float[Tensor, "images dim"]
    observed: list[tuple[str, ...]]


@torch.no_grad()
def observed_in(
    collection: SceneCollection,
    stage1: SceneAutoencoder,
    embed: ImageEmbedding,
    images: Sequence[Path],
    side: int,
    seed: int = 0,
) -> ObservedViews:
    """What 1 to `MAX_OBSERVED` source views of the places of images say at the poses of these images.

    Each place has two sets of observed views, one of them without depth, and each image takes that which looks more at
    the same and which it is not in itself. Of several draws of the two sets that counts in which the place's source
    views see most of each other: where nothing is seen there is nothing to learn. What is drawn depends on the seed and
    the place alone.

    Args:
        embed: images in [0, 1] to embeddings.
        images: those of one place follow each other.

    Raises:
        UserInputError: if the box is not that of stage 1, or a place has fewer than two source views.
    """
    require_box(collection.aabb, stage1, str(collection.root))
    root = collection.root / "scenes"
    maps, embeddings, observed = [], [], []
    places = [(name, list(paths)) for name, paths in groupby(images, lambda path: path.relative_to(root).parts[0])]
    for scene_id, paths in track(places, "Observing places", transient=True, disable=not is_first_process()):
        folder = collection.scene_dir(scene_id)
        transforms = read_transforms(folder)
        names = [path.relative_to(folder).as_posix() for path in paths]
        source = collection.load_scene(scene_id).source.to(stage1.device)
        cameras = middle_squares(transforms.cameras(names, collection.image_size))
        sources = transforms.cameras(transforms.source_names, collection.image_size)
        box = collection.aabb
        subsets = draw_observed(shared_sight(sources, sources, box), scene_id, seed, str(folder))
        numbers = [transforms.source_names.index(name) if name in transforms.source_names else None for name in names]
        chosen = most_seen(shared_sight(cameras, sources, box), subsets, numbers)[1]
        told = embed(source.images)
        found = torch.empty(len(names), map_channels(stage1), side, side, dtype=torch.float16)
        for number, subset in enumerate(subsets):
            mine = [i for i, choice in enumerate(chosen) if choice == number]
            if mine:
                views = Views.stack([source[subset]])
                grid = stage1.encode(without_depth(views) if number % 2 else views)
                found[mine] = observed_maps(stage1, grid, index_cameras(cameras, mine), side).cpu().half()
        maps.append(found)
        embeddings.append(torch.stack([told[subsets[choice]].mean(0) for choice in chosen]).cpu())
        observed += [tuple(transforms.source_names[i] for i in subsets[choice]) for choice in chosen]
    return ObservedViews(torch.cat(maps), torch.cat(embeddings), observed)


def shared_sight(cameras: Cameras, others: Cameras, aabb: Float[Tensor, "2 3"]) -> Float[Tensor, "cameras others"]:
    """How much of what cameras may see others have in their images, too: shares of points of the box, walls or not.

    Args:
        cameras, others: of batch shapes `[N]` and `[M]`.
    """
    reach = float((aabb[1] - aabb[0]).norm()) / 2
    origins, directions = camera_rays(cameras, SIGHT_CELLS, SIGHT_CELLS)
    depths = reach * origins.new_tensor(SIGHT_DEPTHS)
    points = origins[:, None, None, None] + depths[:, None, None, None] * directions[:, None]
    points = points.reshape(-1, 3)
    inside = ((points > aabb[0]) & (points < aabb[1])).all(-1).view(len(cameras), -1)
    columns, rows, ahead = project_points(others, points.expand(len(others), -1, -1))
    seen = (ahead > 0) & (columns >= 0) & (columns < others.width) & (rows >= 0) & (rows < others.height)
    shared = seen.view(len(others), len(cameras), -1) & inside
    return (shared.sum(-1).T / inside.sum(-1, keepdim=True).clamp(min=1)).float()


def draw_observed(shared: Float[Tensor, "source source"], scene_id: str, seed: int, where: str) -> list[list[int]]:
    """The draw of observed views in which source views see most of each other; each is left out by one set at least.

    Args:
        shared: what source views see of each other, see `shared_sight`.
    """
    if len(shared) < 2:
        raise UserInputError(
            f"{where} has {len(shared)} source view, but others than the observed are learned: leave out --condition "
            "views, or give places with more."
        )
    draw = np.random.default_rng([seed, *scene_id.encode()])
    drawn = []
    for _ in range(DRAWS):
        halves = np.array_split(draw.permutation(len(shared)), SUBSETS)
        drawn.append([sorted(half[: draw.integers(1, MAX_OBSERVED + 1)].tolist()) for half in halves])
    return max(drawn, key=lambda subsets: most_seen(shared, subsets, range(len(shared)))[0])


def most_seen(
    shared: Float[Tensor, "images source"], subsets: Sequence[Sequence[int]], numbers: Sequence[int | None]
) -> tuple[float, list[int]]:
    """The set of views that each image shares most with, of those that it is not in; and how much that is, as a mean.

    Args:
        numbers: of the images among the source views; None for others. Equals take the sets in turns.
    """
    total, chosen = 0.0, []
    for row, number in enumerate(numbers):
        turn = [(row + i) % len(subsets) for i in range(len(subsets))]
        free = {i: float(shared[row, list(subsets[i])].max()) for i in turn if number not in subsets[i]}
        chosen.append(max(free, key=lambda i: free[i]))
        total += free[chosen[-1]]
    return total / max(len(chosen), 1), chosen


def without_depth(views: Views) -> Views:
    """The same views as photos."""
    return Views(views.cameras, views.images, None, views.masks)


def require_box(aabb: Float[Tensor, "2 3"], stage1: SceneAutoencoder, where: str) -> None:
    """Raises `UserInputError` unless stage 1 knows places of this box."""
    if not torch.allclose(aabb.cpu().float(), stage1.aabb.cpu(), atol=1e-4):
        raise UserInputError(
            f"The box of {where} is {aabb.tolist()} m, but the stage 1 that observes views has "
            f"{stage1.aabb.tolist()}: use one that was trained on such places."
        )


class ObservedViewEncoder(nn.Module):
    """`observed_maps` to channels beside a noisy sample; zeros where nothing was observed.

    Args:
        channels: of the maps.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.scale = Normaliser(channels)
        self.layers = nn.Sequential(
            nn.Conv2d(channels, VIEW_FEATURES, 1),
            nn.SiLU(),
            nn.Conv2d(VIEW_FEATURES, VIEW_FEATURES, 3, padding=1),
        )

    def fit(self, maps: Float[Tensor, "images channels side side"]) -> None:
        """Takes on their statistics."""
        self.scale.fit(maps.float().movedim(1, -1).flatten(0, 2))

    def forward(
        self, maps: Float[Tensor, "batch channels side side"] | None, sample: Float[Tensor, "batch _ height width"]
    ) -> Float[Tensor, "batch features height width"]:
        """Of the size of `sample`; zeros for images whose map is all zeros, or all of them if `maps` is None."""
        if maps is None:
            return sample.new_zeros(len(sample), VIEW_FEATURES, *sample.shape[2:])
        known = (maps != 0).flatten(1).any(1)
        scaled = self.scale(maps.float().movedim(1, -1)).movedim(-1, 1)
        features = F.interpolate(self.layers(scaled), sample.shape[2:], mode="bilinear", align_corners=False)
        return (features * known[:, None, None, None]).to(sample)
