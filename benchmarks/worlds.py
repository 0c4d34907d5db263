"""Whether the seams of worlds show, and what worlds cost beside rooms.

    python benchmarks/worlds.py --output-dir OUT [--pipeline PIPELINE] [--size 60 60]

- Seams: views from free places of some worlds, in random directions. A view crosses a seam if at least a quarter of
  its pixels end where another window has the most weight than at the camera; it crosses none if fewer than a twentieth
  do. KID of both kinds to views of rooms that the same generator samples, and of halves of these rooms to each other.
- Views that cross a seam see farther than others, and what is far looks worse, seam or none. So the same kinds are
  taken by lines half a stride away from the seams, where nothing begins or ends. What seams cost is how much farther
  from rooms views across them are than those across these lines.
- Cost: processor seconds of a tile of the world and of a room of `nfldm-sample`, sampled in the same process.

Worlds and rooms are kept in `--output-dir`, so that a repeated run measures at once. Writes `worlds.json`,
`worlds.md` and `worlds.png`: views that cross seams, and views that do not. Needs the weights of FID's Inception.
"""

from __future__ import annotations

import json
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from nfldm_ns.diffusion.pipeline import NFLDMPipeline, load_pipeline
from nfldm_ns.errors import UserInputError
from nfldm_ns.generated.world_files import World, load_world
from nfldm_ns.generated.world_paths import free_space, level_cameras
from nfldm_ns.metrics.image_sets import read_picture
from nfldm_ns.metrics.images import extract_features, kernel_distance
from nfldm_ns.models import GENERATOR
from nfldm_ns.pretrained.weights import load_inception
from nfldm_ns.reports.galleries import stack, strip, write_png
from nfldm_ns.reports.report import Table
from nfldm_ns.sampling.scenes import sample_scenes
from nfldm_ns.sampling.world_folders import make_world
from nfldm_ns.sampling.worlds import Method, WorldSettings
from nfldm_ns.scenes.views import camera_rays, index_cameras
from nfldm_ns.scenes.writing import require_writable, write_json
from shared.comparisons import use_threads
from shared.running import run, write_tables

CROSSES, CROSSES_NOT = 0.25, 0.05
KINDS = ("across seams", "within a window")
CONTROL = ("across lines between seams", "within these lines")
ROOM = 0.5  # metres from what is solid to where views are taken from


@dataclass
class Options:
    """Measure a world."""

    output_dir: Path
    """folder for the results, the world and the rooms"""
    pipeline: Path = Path(GENERATOR)
    """a trained generator"""
    size: tuple[float, float] = (60.0, 60.0)
    """of the world in metres"""
    method: Method = "joint"
    """of the world"""
    stride: float = 0.75
    """largest distance of windows, as a share of a window"""
    num_inference_steps: int = 30
    """of world and rooms"""
    worlds: int = 1
    """how many, of seeds one after the other"""
    views: int = 128
    """of each kind, in all worlds"""
    rooms: int = 16
    """that views are compared with"""
    seed: int = 0
    """of the world and of the views; rooms have the seeds after 1000"""
    threads: int = 1
    """CPU threads"""


@torch.inference_mode()
def crossing_shares(
    world: World, position: Float[np.ndarray, " 2"], yaw: float
) -> tuple[Float[Tensor, "3 height width"], list[float]]:
    """A view and the shares of its pixels that end beyond a seam, and beyond a line between seams."""
    camera = level_cameras(world, position[None], np.array([yaw]))
    origin = camera.camera_to_worlds[0, :, 3]
    scene = world.scene_near(origin)
    rendered = scene.renderer.render(scene.grid, index_cameras(camera, (None, slice(0, 1))))
    height, width = rendered.rgb.shape[-2:]
    _, directions = camera_rays(camera, height, width)
    ends = origin + directions[0] * rendered.depth[0, 0, 0][..., None]
    half = torch.tensor(half_strides(world))
    shares = []
    for offset in (torch.zeros(2), half):
        theirs, own = (strongest_window(world, points[..., :2] + offset) for points in (ends, origin[None, None]))
        shares.append(float((theirs != own).any(-1).float().mean()))
    return rendered.rgb[0, 0].clamp(0, 1), shares


def strongest_window(world: World, points: Float[Tensor, "h w 2"]) -> Int[Tensor, "h w 2"]:
    """Row and column among windows of the one with the most weight."""
    windows, described = world.description.windows, world.description
    found = []
    for axis, span, weights in ((1, windows.y, windows.axes(4)[0]), (0, windows.x, windows.axes(4)[1])):
        place = ((points[..., axis] - described.corner[axis]) / described.cell[axis] - span[0]) * 4
        found.append(weights.argmax(0)[place.long().clamp(0, weights.shape[1] - 1)])
    return torch.stack(found, dim=-1)


def half_strides(world: World) -> tuple[float, float]:
    """Half of how far windows are apart along x and y, in metres; `UserInputError` if there is one window alone."""
    windows, cell = world.description.windows, world.description.cell
    if len(windows.windows) == 1:
        raise UserInputError("The world is one window, which has no seam: make it larger.")
    apart = [(s[1] - s[0]) / 2 if len(s) > 1 else 0.0 for s in (windows.x_starts, windows.y_starts)]
    return apart[0] * cell[0], apart[1] * cell[1]


def views_by_seam(world: World, count: int, seed: int) -> dict[str, Float[Tensor, "views 3 h w"]]:
    """So many views of each kind, from random free places."""
    generator, space = np.random.default_rng(seed), free_space(world)
    free = np.argwhere(space.clearance >= ROOM)
    if len(free) == 0:
        raise UserInputError("The world has no free places to look from: make another.")
    views: dict[str, list[Tensor]] = {kind: [] for kind in (*KINDS, *CONTROL)}
    for _ in range(40 * count):
        place = space.points(free[generator.integers(len(free))][None].astype(np.float64))[0]
        picture, shares = crossing_shares(world, place, generator.uniform(0, 2 * np.pi))
        for kinds, share in zip((KINDS, CONTROL), shares, strict=True):
            kind = kinds[0] if share >= CROSSES else kinds[1] if share < CROSSES_NOT else None
            if kind is not None and len(views[kind]) < count:
                views[kind].append(picture)
        if all(len(found) == count for found in views.values()):
            return {kind: torch.stack(found) for kind, found in views.items()}
    raise UserInputError(f"The world has too few views of a kind ({ {k: len(v) for k, v in views.items()} }).")


def room_views(pipeline: NFLDMPipeline, options: Options) -> tuple[Float[Tensor, "views 3 h w"], list[float]]:
    """Views of rooms, and the processor seconds of each that is sampled now."""
    folder, pictures, seconds = options.output_dir / "rooms", [], []
    for i in range(options.rooms):
        scene = folder / f"scene_{1001 + i:06d}"
        if not scene.is_dir():
            begun = time.process_time()
            list(sample_scenes(pipeline, folder, 1, 1001 + i, num_inference_steps=options.num_inference_steps))
            seconds.append(time.process_time() - begun)
        pictures += [read_picture(path) for path in sorted((scene / "images").glob("source_*.png"))]
    return torch.stack(pictures), seconds


def measured_cost(path: Path, name: str, values: list[float]) -> list[float]:
    """Seconds that were measured when something was made, kept beside it."""
    known = json.loads(path.read_text()) if path.is_file() else {}
    known[name] = [*known.get(name, []), *values]
    write_json(path, known)
    return known[name]


def made_world(pipeline: NFLDMPipeline, options: Options, name: str, size: tuple[float, float], seed: int) -> World:
    """A world, made unless it is there; the processor seconds of that are kept with those of its kind."""
    folder = options.output_dir / f"{name}_{seed}"
    if (folder / "config.yml").is_file():
        return load_world(folder)
    settings = WorldSettings(seed, options.num_inference_steps, options.method, options.stride)
    begun = time.process_time()
    world = make_world(pipeline, folder, size, settings)
    measured_cost(options.output_dir / "seconds.json", name, [time.process_time() - begun])
    return world


def joined(several: list[dict[str, Tensor]]) -> dict[str, Float[Tensor, "views 3 h w"]]:
    """Views of each kind, of all worlds."""
    return {kind: torch.cat([views[kind] for views in several]) for kind in several[0]}


def area(world: World) -> float:
    """Of the ground, in square metres."""
    return float((world.aabb[1] - world.aabb[0])[:2].prod())


def main(options: Options) -> None:
    use_threads(options.threads)
    require_writable(options.output_dir)
    pipeline = load_pipeline(options.pipeline)
    rooms, seconds = room_views(pipeline, options)
    seconds = measured_cost(options.output_dir / "seconds.json", "room", seconds)
    name, seeds = f"world_{options.method}_{options.stride:g}", range(options.seed, options.seed + options.worlds)
    worlds = [made_world(pipeline, options, name, options.size, seed) for seed in seeds]
    spent = measured_cost(options.output_dir / "seconds.json", name, [])
    sides = (worlds[0].base_renderer.aabb[1] - worlds[0].base_renderer.aabb[0])[:2].tolist()
    boxes = area(worlds[0]) / (sides[0] * sides[1])
    count = options.views // options.worlds
    views = joined([views_by_seam(world, count, seed) for world, seed in zip(worlds, seeds, strict=True)])
    found = measured(rooms, views, options.worlds)
    found |= {"boxes": boxes, "cpu_seconds": {"room": float(np.median(seconds)), "tile": float(np.mean(spent)) / boxes}}
    found["cost_ratio"] = found["cpu_seconds"]["tile"] / found["cpu_seconds"]["room"]
    caption = (
        f"KID of views to {len(rooms)} views of {options.rooms} rooms. A tile takes "
        f"{found['cpu_seconds']['tile']:.1f} s of a processor, a room {found['cpu_seconds']['room']:.1f} s. Views "
        f"across seams have {found['kid_ratio_of_seams']:.2f} times the KID of those across lines between seams"
    )
    error = found["kid_ratio_of_seams_error"]
    caption += "." if error is None else f" (standard error {error:.2f}, of {options.worlds} worlds)."
    rows = [[name, len(views.get(name, rooms)), value] for name, value in found["kid"].items()]
    table = Table(("", "views", "KID"), rows, caption, digits=(0, 0, 4))
    write_json(options.output_dir / "worlds.json", found)
    write_png(options.output_dir / "worlds.png", stack([strip(list(pictures[:12])) for pictures in views.values()]))
    write_tables(options.output_dir / "worlds.md", [table])


def measured(
    rooms: Float[Tensor, "views 3 h w"], views: dict[str, Float[Tensor, "views 3 h w"]], worlds: int = 1
) -> dict[str, Any]:
    """KIDs of all views to those of rooms, and what they say of seams.

    Args:
        views: of each kind, of one world after the other.
        worlds: how many. Of three and more the cost of seams has a standard error, by leaving out one after the other.
    """
    network = load_inception()
    features = {name: extract_features(network, [pictures]) for name, pictures in {"rooms": rooms, **views}.items()}
    half = len(rooms) // 2
    kids = {name: kernel_distance(features["rooms"], found).mean for name, found in features.items() if name != "rooms"}
    kids["other rooms"] = kernel_distance(features["rooms"][:half], features["rooms"][half:]).mean
    return {
        "kid": kids,
        "kid_ratio": kids[KINDS[0]] / kids[KINDS[1]],
        "kid_ratio_of_seams": kids[KINDS[0]] / kids[CONTROL[0]],
        "kid_ratio_of_seams_error": None if worlds < 3 else _error_of_seam_cost(features, worlds),
    }


def _error_of_seam_cost(features: dict[str, Tensor], worlds: int) -> float:
    world_of = torch.arange(len(features[KINDS[0]])) * worlds // len(features[KINDS[0]])
    parts = []
    for left_out in range(worlds):
        kept = world_of != left_out
        kids = [kernel_distance(features["rooms"], features[kind][kept]).mean for kind in (KINDS[0], CONTROL[0])]
        parts.append(kids[0] / kids[1])
    return float(np.sqrt((worlds - 1) * np.var(parts)))


if __name__ == "__main__":
    run(main, Options, __doc__)
