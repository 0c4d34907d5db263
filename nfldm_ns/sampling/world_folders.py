"""Makes worlds as folders, makes them larger, and goes on where a killed command stopped."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from jaxtyping import UInt8

from nfldm_ns.diffusion.pipeline import NFLDMPipeline
from nfldm_ns.diffusion.windows import Span, WindowGrid, window_starts
from nfldm_ns.errors import UserInputError
from nfldm_ns.generated.scene_files import DESCRIPTION as SCENE
from nfldm_ns.generated.scene_files import renderer_of
from nfldm_ns.generated.world_files import (
    TILES,
    VERSION,
    World,
    WorldDescription,
    load_world,
    read_description,
    tile_revision,
    write_description,
    write_renderer,
    write_tile,
)
from nfldm_ns.generated.world_paths import walk
from nfldm_ns.plugin.world_run import world_from_above, write_world_run
from nfldm_ns.reports.galleries import write_png
from nfldm_ns.sampling.scenes import sampling_record
from nfldm_ns.sampling.worlds import (
    WorldDecoder,
    WorldLatents,
    WorldSampler,
    WorldSettings,
    empty_latents,
    enlarged_latents,
)
from nfldm_ns.scenes.bev_maps import read_drawn_map
from nfldm_ns.scenes.collection import BEV_FILE
from nfldm_ns.scenes.views import index_cameras
from nfldm_ns.scenes.writing import atomic_path, bev_png, clear_unfinished, require_writable

Direction = Literal["north", "east", "south", "west"]
FROM_ABOVE = "from_above.png"
NUM_VIEWS = 16
REACH_BOXES = 2.0  # how far cameras see, unless the generator's `far` is less
Progress = Callable[[str, int, int], None]


@dataclass
class WorldPlan:
    """What is to be in a world's folder when it is finished.

    Attributes:
        description: its layout.
        old: the windows it had before it was made larger; None for a new one.
        bev: semantic map in the order of V.
    """

    description: WorldDescription
    old: WindowGrid | None = None
    bev: UInt8[np.ndarray, "height width"] | None = None


def _nothing(_: str, __: int, ___: int) -> None:
    pass


def make_world(
    pipeline: NFLDMPipeline,
    folder: Path | str,
    size_m: tuple[float, float],
    settings: WorldSettings | None = None,
    *,
    bev: Path | None = None,
    source: str = "",
    progress: Progress = _nothing,
) -> World:
    """Samples a world into a folder; the same call again continues one that was interrupted.

    Args:
        size_m: sizes (x, y) in metres, rounded to whole cells of c.
        bev: an image of a semantic map of the whole, north up, at as many pixels per box as the generator's maps have.
        source: where the pipeline is from, for the record.
        progress: called with what is being done, and how much of it is done of how much.

    Raises:
        UserInputError: for sizes that cannot be, or if the folder holds something else.
    """
    folder, settings = Path(folder), (settings or WorldSettings()).of(pipeline)
    pipeline.set_progress_bar_config(disable=True)
    try:
        pipeline.require_guidance(settings.guidance_scale, with_map=bev is not None)
    except ValueError as error:
        raise UserInputError(f"The guidance scale cannot be other than 1 here: {error}.") from None
    description = new_description(pipeline, size_m, settings, source)
    drawn = None if bev is None else _read_map(pipeline, bev, description.windows.shape)
    description.settings["bev"] = _digest(drawn)
    found = read_description(folder)
    if found is None:
        _require_empty(folder)
        require_writable(folder)
        if drawn is not None:
            _write_map(pipeline, folder, drawn)
        write_description(folder, description)
    else:
        first = {name: value for name, value in found.settings.items() if name != "extensions"}
        _require_same(folder, first, description.settings)
        if found.state == "finished":
            return load_world(folder)
        if found.revision:
            direction = found.settings["extensions"][-1][0]
            raise UserInputError(
                f"{folder} is being made larger: finish that by the --extend {direction} that began it."
            )
        description = found
    return _finish(pipeline, folder, WorldPlan(description, bev=drawn), progress)


def extend_world(
    pipeline: NFLDMPipeline,
    folder: Path | str,
    direction: Direction,
    by_m: float | None = None,
    *,
    bev: Path | None = None,
    progress: Progress = _nothing,
) -> World:
    """Makes a finished world larger; the same call again continues an interrupted one.

    c and f of the world stay as they are, and all V that no new window reaches stays bit for bit.

    Args:
        by_m: metres, rounded to whole cells of c; one box if not given.
        bev: map of the new part, for worlds that were made with one.

    Raises:
        UserInputError: if there is no finished world, or it was made by another pipeline.
    """
    folder = Path(folder)
    pipeline.set_progress_bar_config(disable=True)
    found = read_description(folder)
    if found is None:
        raise UserInputError(f"{folder} is no world yet: make it with --size first.")
    axis = 0 if direction in ("east", "west") else 1
    cells = found.window[1 - axis] if by_m is None else round(by_m / found.cell[axis])
    if cells < 1:
        raise UserInputError(f"--by is {by_m:g} m, but cells are {found.cell[axis]:g} m wide: give at least that.")
    record = sampling_record(pipeline, found.settings["num_inference_steps"])
    _require_same(folder, {"models": found.settings["models"]}, {"models": _models(record)})
    if found.state != "finished":
        asked = [direction, cells]
        extensions = found.settings.get("extensions", [])
        if not found.revision or extensions[-1][:2] != asked:
            raise UserInputError(f"{folder} is not finished: run the nfldm-world command that was interrupted again.")
        _, _, rows, columns = extensions[-1][:4]
        old = WindowGrid(rows, columns, (found.window[0], found.window[1]))
        return _finish(pipeline, folder, WorldPlan(found, old, _known_map(pipeline, folder, found)), progress)
    old = found.windows
    changed = found.model_copy(deep=True)
    setattr(changed, ("x_starts", "y_starts")[axis], _more_starts(found, direction, cells))
    joined = _joined_map(pipeline, folder, found, changed.windows, direction, bev)
    changed.settings.setdefault("extensions", []).append([direction, cells, old.y_starts, old.x_starts])
    changed.revision += 1
    changed.version = VERSION
    changed.state = "unfinished"
    known = WorldLatents.load(_latents_path(folder, found), found, pipeline)
    enlarged_latents(pipeline, known, old, changed.windows).save(_latents_path(folder, changed))
    if joined is not None:
        _write_map(pipeline, folder, joined)
    write_description(folder, changed)
    return _finish(pipeline, folder, WorldPlan(changed, old, joined), progress)


def new_description(
    pipeline: NFLDMPipeline, size_m: tuple[float, float], settings: WorldSettings, source: str = ""
) -> WorldDescription:
    """The layout of a new world, whose middle is where that of the box is.

    Raises:
        UserInputError: if it is smaller than the box, or the settings cannot be.
    """
    stage1, stage2 = pipeline.scene_autoencoder, pipeline.latent_autoencoder
    box = stage1.aabb.cpu().double()
    window = stage2.coarse_shape[2:]
    extent = box[1] - box[0]
    cell = (extent[:2] / torch.tensor(window[::-1])).tolist()
    cells = [round(size / edge) for size, edge in zip(size_m, cell, strict=True)]
    if cells[0] < window[1] or cells[1] < window[0]:
        raise UserInputError(
            f"A world of {size_m[0]:g} x {size_m[1]:g} m is smaller than the generator's box of {extent[0]:g} x "
            f"{extent[1]:g} m: give at least that."
        )
    if not 0.5 <= settings.stride < 1:
        raise UserInputError(f"The stride is {settings.stride:g} of a box: give a number from 0.5 to below 1.")
    strides = [max(1, int(settings.stride * size)) for size in window]
    corner = box[0, :2] + (extent[:2] - torch.tensor(cells) * torch.tensor(cell)) / 2
    record = sampling_record(pipeline, settings.num_inference_steps, source)
    renderer = renderer_of(stage1)
    return WorldDescription(
        settings={"cells": cells, **settings.record(), "models": _models(record)},
        corner=corner.tolist(),
        cell=cell,
        height=box[:, 2].tolist(),
        voxels=stage2.downsampling,
        layers=stage2.grid_shape[0],
        window=list(window),
        y_starts=window_starts(0, cells[1], window[0], strides[0]),
        x_starts=window_starts(0, cells[0], window[1], strides[1]),
        reach=min(float(stage1.config.far), REACH_BOXES * float(extent[:2].max())),
        autoencoder=json.loads(renderer.to_json_string()),
        provenance={"command": "nfldm-world", **record},
    )


def _more_starts(description: WorldDescription, direction: Direction, cells: int) -> list[int]:
    axis = 1 if direction in ("east", "west") else 0
    size = description.window[axis]
    stride = max(1, int(description.settings["stride"] * size))
    starts = description.x_starts if axis else description.y_starts
    if direction in ("east", "north"):
        return [*starts, *window_starts(starts[-1], starts[-1] + size + cells, size, stride)[1:]]
    return [*window_starts(starts[0] - cells, starts[0] + size, size, stride)[:-1], *starts]


def _finish(pipeline: NFLDMPipeline, folder: Path, plan: WorldPlan, progress: Progress) -> World:
    """Does what is left to do."""
    for part in (folder, folder / TILES):
        clear_unfinished(part)
    description, windows = plan.description, plan.description.windows
    path = _latents_path(folder, description)
    latents = WorldLatents.load(path, description, pipeline) if path.is_file() else empty_latents(pipeline, windows)
    new = windows.windows if plan.old is None else [w for w in windows.windows if w not in plan.old.windows]
    with torch.no_grad():
        _sample(pipeline, plan, latents, new, path, progress)
    decoder = WorldDecoder(pipeline, windows, latents)
    write_renderer(folder, pipeline.scene_autoencoder, decoder.backgrounds())
    description.camera_height = _camera_height(pipeline, latents)
    tiles = [tile for tile, cells in description.tiles.items() if _touched(windows, cells, new)]
    for i, tile in enumerate(tiles):
        progress("tiles", i, len(tiles))
        if tile_revision(folder, tile) != description.revision:
            cells = description.tiles[tile]
            if description.settings["fill_floor"]:
                grid = decoder.floored_tile(*cells, description)
            else:
                grid = decoder.tile(*cells, description.box(*cells))
            write_tile(folder, tile, grid, description.revision)
    progress("tiles", len(tiles), len(tiles))
    world = World(folder, description, renderer_of(pipeline.scene_autoencoder), decoder.backgrounds())
    progress("views", 0, 1)
    way = walk(world, seconds=NUM_VIEWS * 3 / 2 * 1.5, fps=1 / 1.5)
    evaluated = torch.arange(way.shape[0]) % 3 == 1
    write_world_run(world, index_cameras(way, ~evaluated), index_cameras(way, evaluated))
    write_png(folder / FROM_ABOVE, world_from_above(world))
    progress("views", 1, 1)
    description.state = "finished"
    write_description(folder, description)
    for old in folder.glob("latents_*.safetensors"):
        if old != path:
            old.unlink()
    return load_world(folder)


def _sample(
    pipeline: NFLDMPipeline,
    plan: WorldPlan,
    latents: WorldLatents,
    new: list[tuple[int, int]],
    path: Path,
    progress: Progress,
) -> None:
    if latents.finished:
        return
    settings = WorldSettings(**{k: plan.description.settings[k] for k in WorldSettings().record()})
    steps = 0

    def count() -> None:
        nonlocal steps
        steps += 1
        progress("denoising steps", steps, 0)

    sampler = WorldSampler(pipeline, plan.description.windows, settings, plan.bev, count)
    try:
        sampler.fill(latents, new, lambda: latents.save(path))
    except ValueError as error:  # what a call must not be, or a scheduler that does not fit
        raise UserInputError(f"No world can be sampled: {error}.") from error


def _touched(windows: WindowGrid, cells: tuple[Span, Span], new: list[tuple[int, int]]) -> bool:
    return bool(set(windows.touching(*cells)) & set(new))


def _camera_height(pipeline: NFLDMPipeline, latents: WorldLatents) -> float:
    """Mean height of the sampled cameras."""
    _, trajectory = pipeline.global_denoiser.split(latents.codes.flatten(0, 1))
    if trajectory.shape[1] == 0:
        return 0.0
    low, high = pipeline.scene_autoencoder.aabb[:, 2].tolist()
    height = float(trajectory.unflatten(-1, (-1, 5))[..., 2].mean())
    return min(max(height, low + 0.05 * (high - low)), high - 0.05 * (high - low))


def _latents_path(folder: Path, description: WorldDescription) -> Path:
    return folder / f"latents_{description.revision}.safetensors"


def _models(record: dict[str, Any]) -> list[Any]:
    return [record["fine_denoiser"], record["scheduler"]]


def _require_empty(folder: Path) -> None:
    if (folder / SCENE).is_file() or (folder.is_dir() and any(not p.name.startswith(".") for p in folder.iterdir())):
        raise UserInputError(f"{folder} is there, but is no world: name a new folder with --output-dir.")


def _require_same(folder: Path, found: dict[str, Any], asked: dict[str, Any]) -> None:
    for name, value in asked.items():
        if found.get(name) != value:
            what = "other models" if name == "models" else f"{name} {found.get(name)}, not {value}"
            raise UserInputError(f"{folder} was made with {what}: repeat its settings, or name a new folder.")


# Maps


def _pixels(pipeline: NFLDMPipeline, cells: tuple[int, int]) -> tuple[int, int]:
    assert pipeline.bev_size is not None
    window = pipeline.latent_autoencoder.coarse_shape[2:]
    return tuple(round(n / size * p) for n, size, p in zip(cells, window, pipeline.bev_size, strict=True))  # type: ignore[return-value]


def _read_map(pipeline: NFLDMPipeline, path: Path, cells: tuple[int, int]) -> UInt8[np.ndarray, "height width"]:
    """A map of so many rows and columns of cells, in the order of V."""
    if pipeline.bev_size is None:
        raise UserInputError("The generator was trained without BEV maps: leave out --bev.")
    drawn = read_drawn_map(path, pipeline.bev_classes, _pixels(pipeline, cells))
    return np.ascontiguousarray(drawn[::-1])


def _write_map(pipeline: NFLDMPipeline, folder: Path, bev: UInt8[np.ndarray, "height width"]) -> None:
    with atomic_path(folder / BEV_FILE) as temporary:
        temporary.write_bytes(bev_png(np.ascontiguousarray(bev[::-1]), pipeline.bev_classes))


def _known_map(
    pipeline: NFLDMPipeline, folder: Path, description: WorldDescription
) -> UInt8[np.ndarray, "height width"] | None:
    if description.settings.get("bev") is None:
        return None
    return _read_map(pipeline, folder / BEV_FILE, description.windows.shape)


def _joined_map(
    pipeline: NFLDMPipeline,
    folder: Path,
    description: WorldDescription,
    new: WindowGrid,
    direction: Direction,
    bev: Path | None,
) -> UInt8[np.ndarray, "height width"] | None:
    """The world's map with that of the new part beside it."""
    has_map = description.settings.get("bev") is not None
    if has_map != (bev is not None):
        raise UserInputError(
            f"{folder} was made with a map: give one of the new part with --bev."
            if has_map
            else f"{folder} was made without a map: leave out --bev."
        )
    if bev is None:
        return None
    rows, columns = (n - o for n, o in zip(new.shape, description.windows.shape, strict=True))
    part = (rows or new.shape[0], columns or new.shape[1])
    own, added = _known_map(pipeline, folder, description), _read_map(pipeline, bev, part)
    assert own is not None
    parts = [own, added] if direction in ("east", "north") else [added, own]
    return np.concatenate(parts, axis=1 if direction in ("east", "west") else 0)


def _digest(bev: UInt8[np.ndarray, "height width"] | None) -> str | None:
    return None if bev is None else hashlib.sha256(bev.tobytes()).hexdigest()[:16]
