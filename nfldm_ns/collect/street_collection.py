"""Makes a scene collection of streets: layouts and traffic by MetaDrive, six cameras all around at several moments."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from itertools import islice
from multiprocessing.util import Finalize
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from jaxtyping import Bool, Float, UInt8

from nfldm_ns.collect.level_cameras import level_poses
from nfldm_ns.collect.resuming import claim_folder, numbered_splits
from nfldm_ns.collect.street_light import StreetLight, street_light
from nfldm_ns.collect.street_roads import (
    BEV_CLASSES,
    BUILDING,
    LINE,
    PAVEMENT,
    ROAD,
    VEGETATION,
    VEHICLE,
    Lane,
    dead_ends,
    rectangle,
    street_map,
)
from nfldm_ns.collect.street_scenery import PAINTS, Scenery, make_scenery
from nfldm_ns.collect.street_simulator import PACKAGES, StreetSimulator, make_environment
from nfldm_ns.collect.workers import run_tasks
from nfldm_ns.errors import UserInputError
from nfldm_ns.scenes.collection import SPLITS, read_json
from nfldm_ns.scenes.views import Views, make_cameras
from nfldm_ns.scenes.writing import clear_unfinished, write_collection, write_scene

LICENCE = "made with MetaDrive and its vehicles' models, Apache-2.0, https://github.com/metadriverse/metadrive"
Moving = Literal["still", "keep", "mask"]
MOVING = 100
"""Class, in pictures, of vehicles that drive."""
_CLEARANCE = 1.5  # metres between a camera and a vehicle's outline
_WARM_UP, _BETWEEN = 20, 4  # steps of 0.1 s before the first place of a layout, and before each
_FROM_ENDS = 20.0  # metres between a place and where a road ends in nothing
_ATTEMPTS = 400
_LAYOUTS = 1_000_000


@dataclass(frozen=True)
class StreetOptions:
    """All that decides what a collection holds; lengths in metres, angles in degrees.

    Attributes:
        places: scenes of each layout; all of a layout are in one split.
        fractions: share of the layouts by held-out split.
        blocks: parts (straights, bends, crossings, roundabouts, ramps) of a layout.
        image_size: width and height.
        fov: horizontal field of view of the six cameras, first the one that looks ahead, then counter-clockwise; one
            number for all.
        height: of the cameras above the road.
        time_steps: moments of a scene, from one to the next `time_step` seconds of driving; the six cameras of
            `source_steps` of them, in their middle, are source views.
        num_target_views: cameras of the rig, turned by a random angle, at the other moments.
        moving: "still": traffic stands while the cameras drive on; "keep": it drives, too; "mask": it drives, and is
            masked.
        cars: share of the places on lanes, 9 m apart, that have one.
    """

    num_scenes: int
    seed: int = 0
    places: int = 6
    fractions: Mapping[str, float] = field(default_factory=lambda: {"test": 0.1, "val": 0.0})
    blocks: int = 4
    image_size: tuple[int, int] = (128, 128)
    fov: tuple[float, ...] = (90.0,)
    height: float = 1.8
    time_steps: int = 3
    time_step: float = 0.5
    source_steps: int = 1
    num_target_views: int = 4
    moving: Moving = "still"
    cars: float = 0.12
    min_distance: float = 15.0
    aabb: tuple[tuple[float, ...], tuple[float, ...]] = ((-40.0, -40.0, -3.0), (40.0, 40.0, 13.0))
    near: float = 1.5
    far: float = 60.0
    bev_size: int = 128


@dataclass(frozen=True)
class StreetReport:
    """Scenes per split, how many are new, and the seconds that took."""

    num_scenes: dict[str, int]
    new_scenes: int
    seconds: float


@dataclass(frozen=True)
class Rig:
    """Cameras of a scene, source views first.

    Attributes:
        poses: `[V, 3, 4]`, OpenGL camera-to-world in the layout's world.
        focal_lengths: `[V]`, in pixels.
        moments: `[V]`, at which of the scene's moments each is.
        num_source: how many are source views.
    """

    poses: Float[np.ndarray, "views 3 4"]
    focal_lengths: Float[np.ndarray, " views"]
    moments: np.ndarray
    num_source: int


@dataclass(frozen=True)
class _Layout:
    number: int
    split: str
    count: int

    def scene_ids(self) -> list[str]:
        return [scene_id(self.number, k) for k in range(self.count)]


def collect_streets(
    root: Path,
    options: StreetOptions,
    environment: Path,
    workers: int = 1,
    on_progress: Callable[[int], None] = lambda done: None,
) -> StreetReport:
    """Makes a collection, or completes one that was interrupted; more scenes may be asked for later.

    Args:
        environment: of MetaDrive (`make_environment`).
        workers: processes, of which each has a MetaDrive of its own.
        on_progress: called with the number of scenes done so far.

    Raises:
        UserInputError: if the options cannot be met, the folder holds something else, or nothing can be drawn here.
    """
    begun = time.monotonic()
    check_options(options)
    layouts = plan_layouts(options)
    make_environment(environment)
    claim_folder(root, {key: value for key, value in asdict(options).items() if key != "num_scenes"})
    clear_unfinished(root / "scenes")
    missing = [layout for layout in layouts if not all(_finished(root, i) for i in layout.scene_ids())]
    before = sum(_finished(root, i) for layout in layouts for i in layout.scene_ids())
    state = {"root": root, "options": options, "environment": environment}

    def tell() -> None:
        on_progress(sum(_finished(root, i) for layout in layouts for i in layout.scene_ids()))

    tell()
    try:
        if missing:
            run_tasks(_start, state, _make_layout, [(layout,) for layout in missing], workers, tell)
    finally:
        _stop()
    splits: dict[str, list[str]] = {name: [] for name in SPLITS}
    for layout in layouts:
        splits[layout.split] += layout.scene_ids()
    _describe(root, options, splits)
    counts = {name: len(ids) for name, ids in splits.items()}
    return StreetReport(counts, sum(counts.values()) - before, time.monotonic() - begun)


def check_options(options: StreetOptions) -> None:
    """Refuses what cannot be collected, in one sentence each."""
    if options.num_scenes < 2 or options.places < 1 or options.blocks < 1:
        raise UserInputError("Ask for at least 2 scenes, 1 place and 1 block of each layout.")
    if min(options.fractions.values()) < 0 or sum(options.fractions.values()) >= 1:
        raise UserInputError("The fractions of held-out layouts must not be negative and must add up to less than one.")
    if len(options.fov) not in (1, 6) or not all(20 <= angle <= 150 for angle in options.fov):
        raise UserInputError("--fov takes one angle, or six, from 20 to 150 degrees each.")
    if min(options.image_size) < 16 or options.num_target_views < 1:
        raise UserInputError("Images need at least 16 pixels a side, and scenes at least 1 target view.")
    if not 1 <= options.source_steps < options.time_steps or options.time_step <= 0:
        raise UserInputError("Of the time steps at least one must be for source views and one for target views.")
    if not 0 <= options.cars <= 0.5:
        raise UserInputError("--cars must be between 0 and 0.5.")


def scene_id(layout: int, place: int) -> str:
    """Names a scene after its layout and its number among the layout's places."""
    return f"street{layout:05d}-{place:02d}"


def plan_layouts(options: StreetOptions) -> list[_Layout]:
    """Which layouts there are, what each is for, and how many scenes it gives.

    Raises:
        UserInputError: if a split would be empty.
    """
    count = math.ceil(options.num_scenes / options.places)
    layouts = [
        _Layout(number, split, min(options.places, options.num_scenes - number * options.places))
        for number, split in islice(numbered_splits(options.fractions), count)
    ]
    for name, fraction in {"train": 1.0, **options.fractions}.items():
        if fraction > 0 and not any(layout.split == name for layout in layouts):
            raise UserInputError(
                f"{options.num_scenes} scenes of {options.places} a layout leave none for {name}: ask for more scenes, "
                "or fewer of each layout."
            )
    return layouts


def plan_rig(lane: Lane, distance: float, speed: float, rng: np.random.Generator, options: StreetOptions) -> Rig:
    """Six cameras all around, as of a car that drives along the middle of a lane, at each of a scene's moments.

    Args:
        distance: from the lane's beginning to the first moment's place; the last one's must lie on the lane, too.
        speed: m/s.
    """
    steps, sources = options.time_steps, options.source_steps
    first = (steps - sources) // 2
    source_moments = list(range(first, first + sources))
    others = [k for k in range(steps) if k not in source_moments]
    fov = np.array(options.fov if len(options.fov) == 6 else options.fov * 6)
    cameras = [(moment, i, 0.0) for moment in source_moments for i in range(6)]
    order = rng.permutation(6)
    turns = rng.uniform(0, 60, len(others))
    for k in range(options.num_target_views):
        moment = k % len(others)
        cameras.append((others[moment], int(order[k % 6]), float(turns[moment])))
    eyes, angles = [], []
    for moment, i, turn in cameras:
        spot, heading = lane.at(distance + moment * speed * options.time_step)
        eyes.append([*spot, options.height])
        angles.append(math.degrees(heading) + 60 * i + turn)
    focal = options.image_size[0] / 2 / np.tan(np.radians(fov[[i for _, i, _ in cameras]]) / 2)
    moments = np.array([moment for moment, _, _ in cameras])
    return Rig(level_poses(np.array(eyes), np.array(angles)), focal, moments, 6 * sources)


def is_clear(rig: Rig, moment: int, vehicles: Sequence[Mapping[str, Any]]) -> bool:
    """Whether no vehicle is at, or too near to, the cameras of a moment."""
    eyes = rig.poses[rig.moments == moment][:, :2, 3]
    return not any(_distance(eyes, vehicle).min() < _CLEARANCE for vehicle in vehicles)


def _distance(points: Float[np.ndarray, "points 2"], vehicle: Mapping[str, Any]) -> Float[np.ndarray, " points"]:
    """From points to a vehicle's outline; 0 within it."""
    away = points - np.array([vehicle["x"], vehicle["y"]])
    cos, sin = math.cos(vehicle["heading"]), math.sin(vehicle["heading"])
    along, across = np.abs(away @ [cos, sin]), np.abs(away @ [-sin, cos])
    return np.hypot((along - vehicle["length"] / 2).clip(0), (across - vehicle["width"] / 2).clip(0))


_state: dict[str, Any] = {}


def _start(state: dict[str, Any]) -> None:
    _state.update(state)
    simulator = _state["simulator"] = StreetSimulator(state["environment"], state["options"].image_size)
    Finalize(None, simulator.close, exitpriority=1)  # workers run no other code at their end


def _stop() -> None:
    simulator = _state.pop("simulator", None)
    if simulator is not None:
        simulator.close()


def _finished(root: Path, scene: str) -> bool:
    return (root / "scenes" / scene / "transforms.json").exists()


def _make_layout(layout: _Layout) -> None:
    """Writes the scenes of one layout that are missing; those before them are driven through, but not drawn."""
    root, options, simulator = _state["root"], _state["options"], _state["simulator"]
    network = int(np.random.default_rng([options.seed, layout.number]).integers(_LAYOUTS))
    lanes = simulator.open_layout(network, options.blocks)
    scenery = make_scenery(lanes, [options.seed, layout.number, 1])
    simulator.set_scenery(scenery)
    simulator.set_traffic(network, options.cars)
    rng = np.random.default_rng([options.seed, layout.number, 2])
    vehicles = simulator.step(_WARM_UP)
    taken: list[Float[np.ndarray, " 2"]] = []
    for k, scene in enumerate(layout.scene_ids()):
        vehicles = simulator.step(_BETWEEN)
        rig, moments = _find_place(simulator, lanes, scenery, vehicles, rng, taken, options)
        taken.append(_origin(rig)[:2])
        if _finished(root, scene):
            continue
        light = street_light(np.random.default_rng([options.seed, layout.number, 3, k]))
        _draw_scene(root / "scenes" / scene, simulator, scenery, rig, moments, light, layout, options)


def _find_place(
    simulator: StreetSimulator,
    lanes: Sequence[Lane],
    scenery: Scenery,
    vehicles: list[dict[str, Any]],
    rng: np.random.Generator,
    taken: Sequence[Float[np.ndarray, " 2"]],
    options: StreetOptions,
) -> tuple[Rig, list[list[dict[str, Any]]]]:
    """Cameras at a random place of the roads that no vehicle is at, and the vehicles of each moment."""
    moments: list[list[dict[str, Any]]] = [vehicles]
    for _ in range(options.time_steps - 1):
        moving = options.moving != "still"
        moments.append(simulator.step(round(10 * options.time_step)) if moving else vehicles)
    lengths, ends = np.array([lane.length for lane in lanes]), dead_ends(lanes)
    for _ in range(_ATTEMPTS):
        lane = lanes[int(rng.choice(len(lanes), p=lengths / lengths.sum()))]
        speed = float(rng.uniform(3, 8))
        drive = speed * options.time_step * (options.time_steps - 1)
        start = float(rng.uniform(0, 1)) * (lane.length - drive)
        rig = plan_rig(lane, start, speed, rng, options)
        spot = _origin(rig)[:2]
        if start < 0 or any(np.hypot(*(spot - other)) < options.min_distance for other in taken):
            continue
        if len(ends) and np.linalg.norm(ends - spot, axis=1).min() < _FROM_ENDS:
            continue
        if all(is_clear(rig, t, [*moment, *scenery.parked]) for t, moment in enumerate(moments)):
            return rig, moments
    raise UserInputError(
        f"A layout of {options.blocks} blocks has only {len(taken)} places that are {options.min_distance:g} m apart "
        "and free of cars: lower --places, --min-distance or --cars, or give more --blocks."
    )


def _origin(rig: Rig) -> Float[np.ndarray, " 3"]:
    return rig.poses[: rig.num_source, :, 3].mean(axis=0)


def _draw_scene(
    folder: Path,
    simulator: StreetSimulator,
    scenery: Scenery,
    rig: Rig,
    moments: Sequence[Sequence[dict[str, Any]]],
    light: StreetLight,
    layout: _Layout,
    options: StreetOptions,
) -> None:
    width, height = options.image_size
    count = len(rig.poses)
    images = np.zeros((count, height, width, 3), np.uint8)
    depths, labels = np.zeros((count, height, width)), np.zeros((count, height, width), np.uint8)
    for t in sorted(set(rig.moments.tolist())):
        here = rig.moments == t
        drawn = simulator.draw(light, _dressed(scenery, moments[t]), rig.poses[here], list(rig.focal_lengths[here]))
        images[here], depths[here], labels[here] = drawn
    masks = ~dilated(labels == MOVING) if options.moving == "mask" else None
    middle = int(rig.moments[: rig.num_source][rig.num_source // 2])
    shown = [] if options.moving == "mask" else moments[middle]
    bev = scene_map(scenery, shown, _origin(rig)[:2], options)
    where = {
        "map": f"street{layout.number:05d}",
        "origin": _origin(rig).tolist(),
        "style": scenery.style,
        "light": light.kind,
    }
    source, target = _views(rig, images, depths, masks, options)
    write_scene(folder, source, target, bev, BEV_CLASSES, {"place": where})


def _dressed(scenery: Scenery, moving: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """All vehicles as they are drawn; those that drive keep their paint by their number."""
    keys = ("kind", "x", "y", "heading")
    parked = [{**{key: v[key] for key in keys}, "paint": v["paint"], "label": VEHICLE} for v in scenery.parked]
    driving = [
        {**{key: v[key] for key in keys}, "paint": list(PAINTS[v["number"] % len(PAINTS)]), "label": MOVING}
        for v in moving
    ]
    return parked + driving


def _views(
    rig: Rig,
    images: UInt8[np.ndarray, "views height width 3"],
    depths: Float[np.ndarray, "views height width"],
    masks: Bool[np.ndarray, "views height width"] | None,
    options: StreetOptions,
) -> tuple[Views, Views]:
    width, height = options.image_size
    known = np.where((depths >= options.near) & (depths <= options.far), depths, 0)
    poses = rig.poses.copy()
    poses[:, :, 3] -= _origin(rig)
    focal = torch.from_numpy(rig.focal_lengths).float()
    views = Views(
        make_cameras(torch.from_numpy(poses), focal, focal, width / 2, height / 2, height, width),
        torch.from_numpy(images).permute(0, 3, 1, 2).float() / 255,
        torch.from_numpy(known).float()[:, None],
        None if masks is None else torch.from_numpy(masks)[:, None],
    )
    return views[: rig.num_source], views[rig.num_source :]


def dilated(mask: Bool[np.ndarray, "views height width"]) -> Bool[np.ndarray, "views height width"]:
    """Pixels of a mask and their eight neighbours, which share its colours."""
    padded = np.pad(mask, ((0, 0), (1, 1), (1, 1)))
    height, width = mask.shape[1:]
    return np.any([padded[:, i : i + height, j : j + width] for i in range(3) for j in range(3)], axis=0)


def scene_map(
    scenery: Scenery, vehicles: Sequence[Mapping[str, Any]], centre: Float[np.ndarray, " 2"], options: StreetOptions
) -> UInt8[np.ndarray, "size size"]:
    """The semantic map of the box around a place; vehicles beside those that are parked as given."""
    corners = np.array(options.aabb)[:, :2]
    outlines = [
        rectangle(np.array([v["x"], v["y"]]), v["heading"], v["length"], v["width"])
        for v in [*scenery.parked, *vehicles]
    ]
    layers = [(label, scenery.layers[label]) for label in (PAVEMENT, ROAD, LINE, BUILDING)]
    return street_map(
        centre, corners, options.bev_size, [*layers, (VEHICLE, outlines), (VEGETATION, scenery.layers[VEGETATION])]
    )


def _describe(root: Path, options: StreetOptions, splits: dict[str, list[str]]) -> None:
    ids = [scene for name in SPLITS for scene in splits[name]]
    write_collection(
        root,
        name="MetaDrive streets",
        licence=LICENCE,
        aabb=options.aabb,
        near=options.near,
        far=options.far,
        image_size=options.image_size,
        splits=splits,
        places={i: read_json(root / "scenes" / i / "transforms.json")["place"] for i in ids},
        bev_classes=BEV_CLASSES,
        made_by={"command": "nfldm-collect metadrive", "packages": list(PACKAGES), **asdict(options)},
    )
