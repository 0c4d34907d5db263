"""What the measurements of editing share: their options, scenes by seed, cameras, maps, and distances of views."""

from __future__ import annotations

import hashlib
import inspect
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import cached_property
from itertools import combinations
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from jaxtyping import Bool, Float, UInt8
from nerfstudio.cameras.cameras import Cameras
from torch import Tensor, nn

from nfldm_ns.choice import evenly
from nfldm_ns.diffusion.pipeline import NFLDMPipeline, load_pipeline, scene_generators
from nfldm_ns.editing.combining import combine_scenes, harmonise_seams
from nfldm_ns.editing.interpolation import interpolate_scenes
from nfldm_ns.editing.region import Region, parse_region
from nfldm_ns.editing.resampling import resample_region
from nfldm_ns.editing.scenes import with_latents
from nfldm_ns.errors import UserInputError
from nfldm_ns.generated.cameras import look_along
from nfldm_ns.generated.scene_files import GeneratedScene, half_precision, renderer_of
from nfldm_ns.metrics.images import extract_features, kernel_distance, lpips_distance
from nfldm_ns.metrics.layout import Layout, LayoutSettings
from nfldm_ns.models import GENERATOR
from nfldm_ns.pretrained.weights import load_inception, load_lpips
from nfldm_ns.scenes.collection import BevClass, SceneCollection
from nfldm_ns.scenes.views import camera_rays, index_cameras, make_cameras
from nfldm_ns.scenes.voxel_grid import VoxelGrid, voxel_centres
from shared.comparisons import use_threads
from shared.sampled_views import jackknife, work_device

Part = Literal["bev", "resample", "combine", "interpolate", "time", "pictures"]
PARTS: tuple[Part, ...] = ("bev", "resample", "combine", "interpolate", "time", "pictures")
AROUND = 8  # views that show all of a scene
INTO = (-20.0, 0.0, 20.0)  # degrees from the middle of a region: views that show little besides
ACROSS = (-45.0, 0.0, 45.0)  # likewise: views that show its border and what lies beside it, too
BLOCK_M = 2.0  # edge of the wall that is painted into maps
BLOCK_AT_M = 3.0  # from the origin
EDIT_SEEDS = 10_000  # from the seeds of scenes, so that no edit begins with the noise of its scene

Images = Float[Tensor, "views 3 height width"]
Features = Float[Tensor, "scenes views features"]


@dataclass(kw_only=True)
class Options:
    """Measure the editing of scenes."""

    pipeline: Path = Path(GENERATOR)
    """a trained generator: a folder of nfldm-train-diffusion, or the name of one that comes with this package"""
    data: Path | None = None
    """the collection it was trained on, for bev, the time of encoding and the pictures of real scenes"""
    output_dir: Path
    """folder for the JSON files and the pictures"""
    what: tuple[Part, ...] = PARTS
    """what to measure"""
    num_scenes: int = 32
    """sampled scenes that are edited, and as many others that they are compared with"""
    num_maps: int = 64
    """held-out scenes whose maps are given"""
    num_variants: int = 8
    """seeds of each resampled region"""
    num_pairs: int = 4
    """pairs of scenes that are interpolated"""
    num_frames: int = 9
    """scenes of each way, with both ends"""
    num_inference_steps: int = 30
    """denoising steps of each latent"""
    first_scene: int = 0
    """seed of the first sampled scene; further ones count up"""
    region: str = "box 2 -4 7 4"
    """what is resampled, in the words of nfldm-edit combine --where"""
    place: str = "x > 1.5"
    """where the second of two combined scenes is seen"""
    seam: float = 1.0
    """width of soft seams in metres"""
    harmonise: float = 0.5
    """share of the denoising steps that harmonising walks"""
    guidance_scale: float = 1.0
    """of scenes that are sampled for maps"""
    layout: LayoutSettings = field(default_factory=LayoutSettings)
    """how maps and scenes are compared"""
    repeats: int = 3
    """measurements of each time, after one that does not count"""
    picture_rows: int = 3
    """scenes in each picture, the first ones"""
    threads: int = 2
    """CPU threads"""

    def check(self) -> None:
        """Raises `UserInputError` for what cannot be, before anything long begins."""
        use_threads(self.threads)
        least = {"num_scenes": 2, "num_maps": 2, "num_variants": 2, "num_frames": 3, "num_pairs": 1, "repeats": 1}
        for name, smallest in {**least, "num_inference_steps": 1, "picture_rows": 1}.items():
            if getattr(self, name) < smallest:
                option = name.replace("_", "-")
                raise UserInputError(f"--{option} is {getattr(self, name)}: give at least {smallest}.")
        if "bev" in self.what and self.data is None:
            raise UserInputError("bev needs held-out maps: give --data, or leave bev out of --what.")


def takes_maps(pipeline: NFLDMPipeline) -> bool:
    """Whether a generator samples scenes for semantic maps."""
    known = "bev" in inspect.signature(pipeline.__call__).parameters
    return known and bool(getattr(pipeline.coarse_denoiser.config, "bev_classes", 0))


class Editor:
    """A generator, the scenes of its seeds, and the networks that judge views of them."""

    def __init__(self, options: Options) -> None:
        self.options = options
        self.pipeline = load_pipeline(options.pipeline).to(work_device())
        self.pipeline.set_progress_bar_config(disable=True)
        self.stage1, self.device = self.pipeline.scene_autoencoder, self.pipeline.scene_autoencoder.device
        self.renderer = renderer_of(self.stage1)
        self.steps = options.num_inference_steps
        self._scenes: dict[int, GeneratedScene] = {}

    @cached_property
    def inception(self) -> nn.Module:
        return load_inception().to(self.device)

    @cached_property
    def lpips(self) -> nn.Module:
        return load_lpips().to(self.device)

    @cached_property
    def collection(self) -> SceneCollection:
        """The collection.

        Raises:
            UserInputError: if it is of another box than the generator.
        """
        assert self.options.data is not None
        collection = SceneCollection.open(self.options.data)
        if not torch.allclose(collection.aabb, self.stage1.aabb.cpu(), atol=1e-4):
            raise UserInputError(f"{collection.root} is of another box than the pipeline: give what it was trained on.")
        return collection

    # Scenes

    def scene(self, index: int) -> GeneratedScene:
        """The scene of the seed `first_scene + index`."""
        if index not in self._scenes:
            self._scenes[index] = self.sample(self.options.first_scene + index)
        return self._scenes[index]

    def sample(self, seed: int, bev: UInt8[np.ndarray, "rows columns"] | None = None) -> GeneratedScene:
        """A scene with its latents; with a map (north up) as the generator makes it for this map."""
        conditions: dict[str, Any] = {}
        if bev is not None:
            maps = torch.tensor(bev, device=self.device).long()[None]
            conditions = {"bev": maps, "guidance_scale": self.options.guidance_scale}
        output = self.pipeline(1, scene_generators(seed, 1), num_inference_steps=self.steps, **conditions)
        assert output.grids is not None
        scene = GeneratedScene(
            half_precision(output.grids),
            self.renderer,
            index_cameras(output.cameras.to("cpu"), 0),
            provenance={"command": "nfldm-sample", "seed": seed},
        )
        return with_latents(scene, output.latents)

    def edit_seed(self, index: int) -> int:
        """A seed of an edit."""
        return self.options.first_scene + EDIT_SEEDS + index

    @cached_property
    def grid(self) -> VoxelGrid:
        """An empty grid, for regions."""
        density = torch.zeros(1, 1, *self.stage1.grid_shape)
        return VoxelGrid(density, density, self.stage1.aabb.cpu())

    @cached_property
    def region(self) -> Region:
        return parse_region(self.grid, self.options.region)

    @cached_property
    def place(self) -> Region:
        return parse_region(self.grid, self.options.place)

    # Views

    def cameras(self, yaws: list[float]) -> Cameras:
        """Level cameras at the origin; yaws in degrees, counter-clockwise from the east."""
        height, width = self.stage1.encoded_size
        focal = float(self.stage1.config.focal_length) / self.stage1.upsampling
        turn = torch.tensor(yaws).deg2rad()
        poses = look_along(torch.zeros(len(yaws), 3), turn, torch.zeros(len(yaws)))
        return make_cameras(poses, focal, focal, width / 2, height / 2, height, width)

    def toward(self, region: Region, offsets: tuple[float, ...]) -> Cameras:
        """Cameras that look to the middle of a region, and some degrees beside it."""
        yaw = math.degrees(math.atan2(*middle(region, self.grid)[::-1]))
        return self.cameras([yaw + offset for offset in offsets])

    @cached_property
    def around(self) -> Cameras:
        return self.cameras([360 * i / AROUND for i in range(AROUND)])

    @torch.inference_mode()
    def look(self, grid: VoxelGrid, cameras: Cameras) -> tuple[Images, Float[Tensor, "views 1 height width"]]:
        """Images in [0, 1] and planar depths in metres, on the CPU."""
        rendered = self.stage1.render(grid.to(self.device), index_cameras(cameras, None).to(self.device))
        return rendered.rgb[0].clamp(0, 1).cpu(), rendered.depth[0].cpu()

    def views(self, scene: GeneratedScene, cameras: Cameras) -> Images:
        return self.look(scene.grid, cameras)[0]

    # Numbers

    def features(self, views: list[Images]) -> Features:
        """Inception features of views of some scenes."""
        return torch.stack([extract_features(self.inception, [images]) for images in views])

    def distance(self, first: Images, second: Images) -> float:
        """Mean LPIPS."""
        return float(lpips_distance(self.lpips, first.to(self.device), second.to(self.device)).mean())

    def diversity(self, sets: list[Images]) -> float:
        """Mean LPIPS between the same views of each two scenes."""
        return mean([self.distance(a, b) for a, b in combinations(sets, 2)])


# Edits


def resample(editor: Editor, index: int, seed: int, **settings: Any) -> GeneratedScene:
    """The region of a scene sampled anew."""
    options = editor.options
    settings = {"seam_m": options.seam, "num_inference_steps": editor.steps, **settings}
    return resample_region(editor.pipeline, editor.scene(index), editor.region, seed, **settings)


def combine(editor: Editor, index: int) -> GeneratedScene:
    """A scene with the next one in the place."""
    second = (index + 1) % editor.options.num_scenes
    return combine_scenes([editor.scene(index), editor.scene(second)], [editor.place], editor.options.seam)


def harmonise(editor: Editor, joined: GeneratedScene, seed: int) -> GeneratedScene:
    """Such scenes grown together at the seam."""
    options = editor.options
    return harmonise_seams(
        editor.pipeline,
        joined,
        [editor.place],
        seed,
        strength=options.harmonise,
        seam_m=options.seam,
        num_inference_steps=editor.steps,
    )


def interpolate(editor: Editor, index: int, frames: int) -> Iterator[GeneratedScene]:
    """The way from a scene to the next one."""
    ends = editor.scene(index), editor.scene(index + 1)
    return interpolate_scenes(editor.pipeline, *ends, frames, num_inference_steps=editor.steps)


# Numbers


def middle(region: Region, grid: VoxelGrid) -> tuple[float, float]:
    """x and y of the middle of a region in metres."""
    rows, columns = region.columns.nonzero().double().mean(dim=0).add(0.5).tolist()
    low, size = grid.aabb[0], grid.voxel_size
    return float(low[0] + columns * size[0]), float(low[1] + rows * size[1])


def mean(values: list[float]) -> float:
    """Of all that are numbers."""
    return float(torch.tensor(values, dtype=torch.float64).nanmean())


def kid(reference: Features, fake: Features) -> dict[str, float | None]:
    """KID of views of scenes, and its standard error by a jackknife over groups of scenes (None for few)."""

    def distance(mask: Callable[[int], Tensor]) -> float:
        kept = (features[mask(len(features))].flatten(0, 1) for features in (reference, fake))
        return kernel_distance(*kept).mean

    value, error = jackknife(distance, min(len(reference), len(fake)))
    return {"kid": value, "kid_error": error}


def kid_cells(found: dict[str, float | None]) -> list[float | None]:
    """Of a table: KID and its standard error, which few scenes do not have."""
    return [found["kid"], found["kid_error"]]


def seen_outside(
    depth: Float[Tensor, "views 1 height width"], cameras: Cameras, grid: VoxelGrid, changed: Bool[Tensor, "y x"]
) -> tuple[Bool[Tensor, "views height width"], Bool[Tensor, "views height width"]]:
    """Pixels that show what lies outside of some columns.

    Args:
        depth: planar depth in metres.
        changed: columns that an edit may change, with the seam.

    Returns:
        whether a pixel's ray meets its surface before it enters any of these columns, and whether it never does.
    """
    size = depth.shape[-2:]
    origins, directions = camera_rays(cameras, *size)
    reach = float((grid.aabb[1] - grid.aabb[0]).norm())
    along = torch.arange(0, reach, float(grid.voxel_size[:2].min()) / 4)
    points = origins[:, None, None, None, :2] + along[:, None] * directions[..., None, :2]
    low, high = grid.aabb[:, :2]
    index = ((points - low) / grid.voxel_size[:2]).floor().long()
    inside_box = ((points >= low) & (points < high)).all(dim=-1)
    limit = torch.tensor(changed.shape).flip(0) - 1
    column, row = index.clamp(min=torch.zeros(2, dtype=torch.long), max=limit).unbind(-1)
    entered = changed[row, column] & inside_box
    before = along <= depth[:, 0, ..., None]
    return ~(entered & before).any(dim=-1), ~entered.any(dim=-1)


# Maps


@dataclass(frozen=True)
class Maps:
    """Semantic maps of held-out scenes.

    Attributes:
        scene_ids: the scenes.
        bev: class ids, north up.
    """

    scene_ids: list[str]
    bev: UInt8[np.ndarray, "maps rows columns"]

    @staticmethod
    def of(collection: SceneCollection, count: int) -> Maps:
        """Evenly chosen ones of the test split.

        Raises:
            UserInputError: if scenes have no maps, or maps of different sizes, or there are fewer than 2.
        """
        ids = evenly(collection.split("test"), count)
        maps = [collection.load_scene(scene_id).bev for scene_id in ids]
        sizes = {None if bev is None else bev.shape for bev in maps}
        if None in sizes or len(sizes) > 1 or len(ids) < 2:
            raise UserInputError(
                f"{collection.root} does not have 2 or more test scenes with maps (bev.png) of one size: collect some."
            )
        return Maps(ids, np.stack([bev for bev in maps if bev is not None]))


def fingerprint_of(collection: SceneCollection) -> str:
    return hashlib.sha256((collection.root / "collection.json").read_bytes()).hexdigest()


def paint_block(
    bev: UInt8[np.ndarray, "rows columns"],
    layout: Layout,
    classes: list[BevClass],
    aabb: Tensor,
    solid: tuple[str, ...],
) -> tuple[UInt8[np.ndarray, "rows columns"], float, Bool[Tensor, "y x"]] | None:
    """A map with a block of wall where most floor is seen, of eight places around the origin.

    Args:
        layout: of this map (batch size 1).

    Returns:
        the map, the block's direction in degrees, and its columns; None if no place is floor by half.
    """
    columns = voxel_centres((1, *layout.floor.shape[1:]), aabb)[0, :, :, :2]
    cells = voxel_centres((1, *bev.shape), aabb)[0, :, :, :2]
    best = (0.5, 0.0)
    for yaw in range(0, 360, 45):
        share = float(layout.floor[0][_in_block(columns, yaw)].float().mean())
        best = max(best, (share, float(yaw)), key=lambda trial: trial[0])
    if best[0] <= 0.5:
        return None
    wall = next(c.id for name in solid for c in classes if c.name == name)
    painted = bev.copy()
    painted[_in_block(cells, best[1]).flip(0).numpy()] = wall
    return painted, best[1], _in_block(columns, best[1])


def _in_block(points: Tensor, yaw: float) -> Tensor:
    turn = math.radians(yaw)
    centre = BLOCK_AT_M * points.new_tensor([math.cos(turn), math.sin(turn)])
    return ((points - centre).abs() <= BLOCK_M / 2).all(dim=-1)
