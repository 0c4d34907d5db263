"""One long capture in somebody else's format, cut into scenes, checked, and trained on for some hundred steps.

    python benchmarks/long_capture.py --output-dir OUT [--frames 480 --steps 300]
    ... --base rooms --initial-weights vizdoom-stage1 --box -7.5 -7.5 -2.2 7.5 7.5 3.9

There is no capture to download, so one is recorded: a walk through the rooms of a maze, looking left and right, which
VizDoom renders with exact depth, in ScanNet's layout. From there on nothing knows of Doom: a collection is made of it
as by `nfldm-collect scannet --cut` and judged as by `nfldm-collect check`, and a preset of stage 1 is trained, from
random weights or those of `--initial-weights`. Held-out places, a stretch of the walk of its own, are judged beside
the nearest source view, and beside the initial weights as they are.

Writes `capture/`, `collection/`, `long_capture.json`, `long_capture.md` and `long_capture.png`. Needs the weights of
LPIPS (`nfldm-weights get lpips-vgg`). Recording, cutting and training each take some minutes on two cores.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from ablations import Variant, begun, score, score_baselines, train
from jaxtyping import Float
from PIL import Image
from rich.progress import track

from nfldm_ns.autoencoder.novel_views import SceneScores, ViewJudge, reconstruct
from nfldm_ns.autoencoder.perceptual import PerceptualNetwork
from nfldm_ns.autoencoder.scene_autoencoder import SceneAutoencoder
from nfldm_ns.choice import evenly
from nfldm_ns.collect.capture_import import ImportOptions
from nfldm_ns.collect.checking import check_collection
from nfldm_ns.collect.cut_collection import CutOptions, cut_captures
from nfldm_ns.collect.doom_collection import wad_path
from nfldm_ns.collect.doom_geometry import UNITS_PER_METRE, DoomGeometry
from nfldm_ns.collect.doom_mazes import TILE, MazeWad
from nfldm_ns.collect.doom_places import can_stand
from nfldm_ns.collect.doom_renderer import HALF_FOV_TANGENT, DoomRenderer
from nfldm_ns.collect.doom_scenes import refine_depth
from nfldm_ns.collect.formats.scannet import read_scannet
from nfldm_ns.collect.level_cameras import level_poses
from nfldm_ns.errors import UserInputError
from nfldm_ns.method_configs.presets import SCENE_AUTOENCODER
from nfldm_ns.metrics.images import nearest_source_view
from nfldm_ns.pretrained.weights import load_lpips
from nfldm_ns.reports.galleries import image_grid, write_png
from nfldm_ns.reports.report import Table
from nfldm_ns.scenes.collection import SceneCollection
from nfldm_ns.scenes.writing import atomic_path, require_writable, write_depth, write_json
from shared.comparisons import require_choice, use_threads
from shared.running import run, write_tables

SWING = 110.0  # degrees that the walker looks to either side
SWING_FRAMES = 23
METRICS = ("psnr", "ssim", "lpips", "depth_mae_in_box_m")
SHOWN = 8


@dataclass
class Options:
    """Record, cut, check and train."""

    output_dir: Path
    """folder for all that is made"""
    maze: str = "MAZE7001"
    """whose rooms are walked through"""
    frames: int = 480
    """of the walk"""
    step: float = 0.3
    """metres between frames"""
    recorded_size: int = 128
    """width and height of the recorded images in pixels"""
    image_size: int = 64
    """of the scenes"""
    box: tuple[float, float, float, float, float, float] | None = None
    """minimum x, y, z, then maximum, in metres; found if there is none"""
    test_fraction: float = 0.15
    """share of the places in the held-out stretch"""
    base: str = "tiny"
    """preset of stage 1"""
    initial_weights: Path | None = None
    """a trained auto-encoder of the preset's sizes to begin from, or the name of one that comes with the package"""
    steps: int = 300
    """of training"""
    threads: int = 2
    """CPU threads"""
    seed: int = 0
    """of the walk's beginning, the cut and the training"""


# The walk


def walk(geometry: DoomGeometry, step: float, frames: int, seed: int) -> Float[np.ndarray, "frames 2"]:
    """A walk from room to room, each time to the nearest that was not visited; positions in map units."""
    low, high = geometry.bounds
    columns, rows = ((high - low) // TILE).astype(int)
    at = np.stack(np.meshgrid(np.arange(columns), np.arange(rows), indexing="ij"), axis=-1)
    centres = low + at * TILE  # corners of tiles, as doorways are two tiles wide
    standing = can_stand(geometry, centres.reshape(-1, 2)).reshape(columns, rows)
    rooms = np.where(standing, geometry.sector_at(centres.reshape(-1, 2)).reshape(columns, rows), -1)
    spots = np.argwhere(standing)
    here = tuple(spots[np.random.default_rng(seed).integers(len(spots))].tolist())
    visited, path = {int(rooms[here])}, [here]
    while len(path) * TILE < 1.5 * frames * step * UNITS_PER_METRE:
        way = _way_to_another_room(rooms, here, visited)
        if way is None:
            break
        here = way[-1]
        visited.add(int(rooms[here]))
        path += way[1:]
    line = centres[tuple(np.array(path).T)]
    smooth = np.stack([np.convolve(np.pad(axis, 2, mode="edge"), np.ones(5) / 5, mode="valid") for axis in line.T], -1)
    smooth = np.where(can_stand(geometry, smooth)[:, None], smooth, line)
    along = np.concatenate([[0], np.cumsum(np.linalg.norm(np.diff(smooth, axis=0), axis=1))])
    wanted = np.arange(frames) * step * UNITS_PER_METRE
    wanted = wanted[wanted <= along[-1]]
    return np.stack([np.interp(wanted, along, axis) for axis in smooth.T], axis=-1)


def _way_to_another_room(rooms: np.ndarray, begin: tuple[int, int], visited: set[int]) -> list[tuple[int, int]] | None:
    """The shortest way over tiles into the nearest room that was not visited, beyond its doorway (breadth first)."""
    came: dict[tuple[int, int], tuple[int, int] | None] = {begin: None}
    queue = deque([begin])
    while queue:
        here = queue.popleft()
        around = rooms[max(0, here[0] - 1) : here[0] + 2, max(0, here[1] - 1) : here[1] + 2]
        if rooms[here] not in visited and (around == rooms[here]).all():
            way: list[tuple[int, int]] = []
            at: tuple[int, int] | None = here
            while at is not None:
                way.append(at)
                at = came[at]
            return way[::-1]
        for x, y in ((1, 0), (0, 1), (-1, 0), (0, -1)):
            there = (here[0] + x, here[1] + y)
            inside = 0 <= there[0] < rooms.shape[0] and 0 <= there[1] < rooms.shape[1]
            if inside and rooms[there] >= 0 and there not in came:
                came[there] = here
                queue.append(there)
    return None


def record(folder: Path, options: Options) -> int:
    """Writes the walk in ScanNet's layout, unless it is there; returns the number of its frames."""
    if folder.is_dir():
        return len(list((folder / "pose").iterdir()))
    wad = MazeWad(wad_path("freedoom2"))
    geometry = DoomGeometry(wad.read_map(options.maze))
    spots = walk(geometry, options.step, options.frames, options.seed)
    headings = np.degrees(np.unwrap(np.arctan2(*np.gradient(spots, axis=0).T[::-1])))
    angles = (headings + SWING * np.sin(2 * np.pi * np.arange(len(spots)) / SWING_FRAMES)) % 360
    size, written = options.recorded_size, 0
    with atomic_path(folder) as temporary:
        for name in ("color", "depth", "pose", "intrinsic"):
            (temporary / name).mkdir(parents=True)
        focal, centre = size / 2 / HALF_FOV_TANGENT, (size - 1) / 2
        matrix = np.array([[focal, 0, centre, 0], [0, focal, centre, 0], [0, 0, 1, 0], [0, 0, 0, 1]])
        np.savetxt(temporary / "intrinsic" / "intrinsic_color.txt", matrix)
        np.savetxt(temporary / "intrinsic" / "intrinsic_depth.txt", matrix)
        with DoomRenderer(wad, [options.maze], size, keep_sprites=False, min_light=240) as renderer:
            renderer.start(options.maze, options.seed)
            for spot, angle in track(list(zip(spots, angles, strict=True)), "Walking", transient=True):
                frame = renderer.render(*spot, angle)
                if frame is None:
                    continue
                far = 60 * UNITS_PER_METRE
                exact = geometry.cast(frame.eye[None], np.array([frame.angle]), size, HALF_FOV_TANGENT, far)[0]
                depth = refine_depth(exact / UNITS_PER_METRE, frame.depth / UNITS_PER_METRE)
                pose = np.eye(4)
                pose[:3] = level_poses(frame.eye[None] / UNITS_PER_METRE, np.array([frame.angle]))[0]
                Image.fromarray(frame.image).save(temporary / "color" / f"{written}.jpg", quality=95)
                write_depth(temporary / "depth" / f"{written}.png", np.where(np.isfinite(depth), depth, 0))
                np.savetxt(temporary / "pose" / f"{written}.txt", pose @ np.diag([1.0, -1, -1, 1]))
                written += 1
    return written


# What becomes of it


def cut(options: Options) -> dict[str, Any]:
    """Makes and checks the collection; what there is to say of it."""
    size = (options.image_size, options.image_size)
    box = None if options.box is None else (options.box[:3], options.box[3:])
    imported = ImportOptions(
        image_size=size, test_fraction=options.test_fraction, seed=options.seed, name="a walk through a maze"
    )
    made_by = {"command": "benchmarks/long_capture.py"}
    report = cut_captures(
        options.output_dir / "collection",
        [options.output_dir / "capture"],
        imported,
        CutOptions(box=box),
        read_scannet,
        made_by,
    )
    checked = check_collection(SceneCollection.open(options.output_dir / "collection"))
    if not checked.ok:
        raise UserInputError(f"The collection has a problem: {checked.all_problems[0]}")
    agreement = [scene.reprojection.consistent for scene in checked.scenes]
    found = report.captures[0]
    return {
        "box": report.aabb,
        "spacing": report.spacing,
        "scenes": {split: len(ids) for split, ids in report.splits.items()},
        "path_m": float(found.survey.path_length[-1]),
        "camera_height_m": found.camera_height,
        "dropped": [list(stretch) for stretch in found.dropped()],
        "depths_agree": float(np.median(agreement)),
    }


def judged(collection: SceneCollection, options: Options, perceptual: PerceptualNetwork) -> dict[str, Any]:
    """Scores of held-out places by row of the table; the trained model renders the picture."""
    preset = SCENE_AUTOENCODER[options.base]
    rows: dict[str, Any] = score_baselines(collection, None, perceptual)
    if options.initial_weights is not None:
        as_it_is = begun(collection, preset.network, options.seed, options.initial_weights).eval()
        rows[f"{options.initial_weights.name} as it is"] = score(as_it_is, collection, None, perceptual).mean()
    for name, scores in rows.items():
        print(name, {key: round(scores[key], 3) for key in METRICS if key in scores}, flush=True)
    model, training = train(
        collection, preset, Variant(), options.steps, options.seed, perceptual, options.initial_weights
    )
    rows[f"{options.base}, {options.steps} steps"] = score(model, collection, None, perceptual).mean()
    draw(model, collection, options.output_dir / "long_capture.png")
    return {"scores": rows, "training": training, "better": better_views(model, collection, perceptual)}


@torch.no_grad()
def better_views(
    model: SceneAutoencoder, collection: SceneCollection, perceptual: PerceptualNetwork
) -> dict[str, float]:
    """Share of the held-out views whose rendering is better than the nearest source view."""
    ours, theirs = SceneScores(), SceneScores()
    for scene_id in collection.split("test"):
        batch = collection.batch([collection.load_scene(scene_id)])
        judge = ViewJudge(batch.target, batch.aabb, perceptual)
        ours.add([scene_id], judge.score(reconstruct(model, batch)))
        theirs.add([scene_id], judge.score_images(nearest_source_view(batch)))

    def share(name: str, sign: int) -> float:
        views = [sign * (ours.views(i, name) - theirs.views(i, name)) > 0 for i in ours.scene_ids]
        return float(torch.cat(views).float().mean())

    return {"psnr": share("psnr", 1), "lpips": share("lpips", -1)}


@torch.no_grad()
def draw(model: SceneAutoencoder, collection: SceneCollection, path: Path) -> None:
    """Held-out views: real, rendered, and the nearest source view."""
    columns: dict[str, list[torch.Tensor]] = {"real": [], "rendered": [], "nearest view": []}
    for scene_id in evenly(collection.split("test"), SHOWN):
        batch = collection.batch([collection.load_scene(scene_id)])
        columns["real"].append(batch.target.images[0, 0])
        columns["rendered"].append(reconstruct(model, batch).rgb[0, 0].clamp(0, 1))
        columns["nearest view"].append(nearest_source_view(batch)[0, 0])
    write_png(path, image_grid(columns, ["" for _ in columns["real"]]))


def main(options: Options) -> None:
    require_choice("preset", options.base, SCENE_AUTOENCODER)
    use_threads(options.threads)
    require_writable(options.output_dir)
    frames = record(options.output_dir / "capture", options)
    print(f"{frames} frames were recorded", flush=True)
    collection_facts = cut(options)
    print(collection_facts, flush=True)
    collection = SceneCollection.open(options.output_dir / "collection")
    collection.require_train_and_test()
    result = judged(collection, options, PerceptualNetwork(load_lpips("vgg")))
    cells = [[name, *(scores.get(key) for key in METRICS)] for name, scores in result["scores"].items()]
    views = len(collection.split("test")) * collection.load_scene(collection.split("test")[0]).target.shape[0]
    caption = f"{views} views of {len(collection.split('test'))} held-out places of one capture of {frames} frames."
    table = Table(
        ["", "PSNR (dB)", "SSIM", "LPIPS (VGG)", "depth error in the box (m)"], cells, caption, [0, 2, 3, 3, 2]
    )
    write_json(options.output_dir / "long_capture.json", {"frames": frames, "cut": collection_facts, **result})
    write_tables(options.output_dir / "long_capture.md", [table])


if __name__ == "__main__":
    run(main, Options, __doc__)
