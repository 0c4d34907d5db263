"""Records a scene collection from a running CARLA server: six cameras all around, as in the paper, and target views.

All views of a scene are of one moment: all cameras of its rig exist at once, and the server takes synchronous steps.
"""

from __future__ import annotations

import contextlib
import math
import queue
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float

from nfldm_ns.collect.carla_geometry import depth_of_bgra, focal_length, pose_of_transform, rgb_of_bgra, unreal_yaw
from nfldm_ns.collect.doom_places import hold_out_regions, in_split
from nfldm_ns.collect.resuming import claim_folder
from nfldm_ns.errors import UserInputError
from nfldm_ns.scenes.collection import SPLITS, read_json
from nfldm_ns.scenes.views import Views, make_cameras
from nfldm_ns.scenes.writing import write_collection, write_scene

LICENCE = "rendered from CARLA, assets CC-BY 4.0, https://carla.org"
_STEP_S = 0.05
_TIMEOUT_S = 20.0
WEATHERS = (
    "ClearNoon",
    "CloudyNoon",
    "WetNoon",
    "WetCloudyNoon",
    "SoftRainNoon",
    "MidRainyNoon",
    "ClearSunset",
    "CloudySunset",
    "WetSunset",
    "WetCloudySunset",
    "SoftRainSunset",
)


@dataclass(frozen=True)
class CarlaOptions:
    """All that decides what a collection holds; lengths in metres, angles in degrees.

    Attributes:
        towns: maps of the server; none for the one that is loaded.
        test_towns: those of them that are held out; without any, a part of each town is, further than the box from all
            else.
        image_size: width and height.
        num_source_views: cameras all around at each place; six in the paper.
        fov: horizontal field of view; 90 with six cameras lets neighbours overlap by 30.
        height: of the cameras above the road.
        vehicles: parked and driven by the server's autopilot, in each town.
        weathers: names of CARLA's presets; each scene draws one.
        warm_up: steps of the server before each picture, for its exposure and shadows.
    """

    num_scenes: int
    towns: tuple[str, ...] = ()
    test_towns: tuple[str, ...] = ()
    test_fraction: float = 0.1
    seed: int = 0
    image_size: tuple[int, int] = (128, 128)
    num_source_views: int = 6
    num_target_views: int = 4
    fov: float = 90.0
    height: float = 1.8
    target_distance: float = 4.0
    place_jitter: float = 2.0
    aabb: tuple[tuple[float, ...], tuple[float, ...]] = ((-40.0, -40.0, -3.0), (40.0, 40.0, 17.0))
    near: float = 0.5
    far: float = 60.0
    vehicles: int = 30
    weathers: tuple[str, ...] = WEATHERS
    warm_up: int = 8


@dataclass(frozen=True)
class CarlaReport:
    """Scenes per split, and how many are new."""

    num_scenes: dict[str, int]
    new_scenes: int


@dataclass(frozen=True)
class _Place:
    """A spot of a town, in CARLA's own axes, and what it is for."""

    town: str
    number: int
    split: str
    location: Float[np.ndarray, " 3"]
    yaw: float

    @property
    def scene_id(self) -> str:
        return f"{self.town.rpartition('/')[2].lower()}-{self.number:05d}"


@dataclass
class _Rig:
    """Pairs of a colour and a depth camera, and where their pictures arrive."""

    cameras: list[tuple[Any, Any]] = field(default_factory=list)
    inboxes: list[tuple[queue.Queue, queue.Queue]] = field(default_factory=list)


def collect_carla(
    root: Path,
    options: CarlaOptions,
    host: str = "localhost",
    port: int = 2000,
    on_progress: Callable[[int], None] = lambda done: None,
) -> CarlaReport:
    """Records a collection, or completes one that was interrupted.

    The server is set to synchronous steps, and back when the recording ends, however it ends; what was spawned is
    destroyed. The same seed gives the same places, cameras and weathers; the cars are the server's.

    Raises:
        UserInputError: if CARLA's package is missing, the server does not answer or lacks what is asked for, or the
            folder holds something else.
    """
    _check(options)
    carla = _package()
    client = _connect(carla, host, port)
    claim_folder(root, {key: value for key, value in asdict(options).items() if key != "num_scenes"})
    splits: dict[str, list[str]] = {name: [] for name in SPLITS}
    made = 0
    towns = options.towns or (_current_town(client),)
    unknown = [t for t in (*towns, *options.test_towns) if t not in _names(client) and options.towns]
    if unknown:
        raise UserInputError(f"The server has no town {unknown[0]}: choose of {', '.join(sorted(_names(client)))}.")
    for town, quota in zip(towns, _shares(options.num_scenes, len(towns)), strict=True):
        with _recording(carla, client, town, options) as (world, rig):
            for place in _places(world, town, options, quota):
                folder = root / "scenes" / place.scene_id
                if not (folder / "transforms.json").exists():
                    _record(carla, world, rig, place, folder, options)
                    made += 1
                splits[place.split].append(place.scene_id)
                on_progress(sum(map(len, splits.values())))
    for name in ("train", "test"):
        if not splits[name]:
            raise UserInputError(f"There is no scene for {name}: ask for more scenes, or give --test-towns.")
    _describe(root, options, splits)
    return CarlaReport({name: len(ids) for name, ids in splits.items()}, made)


def _check(options: CarlaOptions) -> None:
    if options.num_scenes < 2 or min(options.num_source_views, options.num_target_views) < 1:
        raise UserInputError("Ask for at least 2 scenes, with at least 1 source and 1 target view each.")
    if not 0 < options.fov < 170 or min(options.image_size) < 8:
        raise UserInputError("The field of view must be between 0 and 170 degrees, and images at least 8 pixels wide.")
    if not 0 <= options.test_fraction < 1 or (options.test_fraction == 0 and not options.test_towns):
        raise UserInputError("Hold something out: --test-fraction between 0 and 1, or --test-towns.")
    if [t for t in options.test_towns if t not in options.towns] or set(options.test_towns) >= set(
        options.towns or ("",)
    ):
        raise UserInputError("The test towns must be some of --towns, and not all of them.")


def _package() -> Any:
    try:
        import carla
    except ImportError as error:
        raise UserInputError(
            f"CARLA's Python package cannot be imported ({error}): 'pip install carla' of the server's own version "
            "brings it."
        ) from None
    return carla


def _connect(carla: Any, host: str, port: int) -> Any:
    client = carla.Client(host, port)
    client.set_timeout(_TIMEOUT_S)
    try:
        versions = client.get_client_version(), client.get_server_version()
    except RuntimeError as error:
        raise UserInputError(
            f"No CARLA server answers at {host}:{port} ({error}): start one (CarlaUE4.sh -RenderOffScreen), or give "
            "--host and --port."
        ) from None
    if versions[0].split("-")[0] != versions[1].split("-")[0]:
        raise UserInputError(
            f"CARLA's package is of version {versions[0]}, but the server of {versions[1]}: install the package of the "
            "server's version."
        )
    return client


def _names(client: Any) -> set[str]:
    return {name.rpartition("/")[2] for name in client.get_available_maps()}


def _current_town(client: Any) -> str:
    return client.get_world().get_map().name.rpartition("/")[2]


def _shares(total: int, count: int) -> list[int]:
    return [total // count + (i < total % count) for i in range(count)]


@contextlib.contextmanager
def _recording(carla: Any, client: Any, town: str, options: CarlaOptions) -> Iterator[tuple[Any, _Rig]]:
    """A town in synchronous steps, with traffic and a rig; all of it is undone at the end."""
    world = client.get_world()
    if world.get_map().name.rpartition("/")[2] != town:
        world = client.load_world(town)
    before = world.get_settings()
    rig, actors = _Rig(), []
    try:
        settings = world.get_settings()
        settings.synchronous_mode, settings.fixed_delta_seconds = True, _STEP_S
        world.apply_settings(settings)
        manager = client.get_trafficmanager()
        manager.set_synchronous_mode(True)
        manager.set_random_device_seed(options.seed)
        actors += _spawn_traffic(world, options)
        for _ in range(options.num_source_views + options.num_target_views):
            rig.cameras.append((_camera(carla, world, "rgb", options), _camera(carla, world, "depth", options)))
            rig.inboxes.append((queue.Queue(), queue.Queue()))
            for sensor, inbox in zip(rig.cameras[-1], rig.inboxes[-1], strict=True):
                sensor.listen(inbox.put)
        yield world, rig
    finally:
        for sensor in (sensor for pair in rig.cameras for sensor in pair):
            sensor.stop()
            sensor.destroy()
        for actor in actors:
            actor.destroy()
        with contextlib.suppress(RuntimeError):
            client.get_trafficmanager().set_synchronous_mode(False)
        world.apply_settings(before)


def _spawn_traffic(world: Any, options: CarlaOptions) -> list[Any]:
    rng = np.random.default_rng([options.seed, 1])
    spots = world.get_map().get_spawn_points()
    kinds = sorted(world.get_blueprint_library().filter("vehicle.*"), key=lambda kind: kind.id)
    actors = []
    for at in rng.permutation(len(spots))[: options.vehicles] if kinds else ():
        actor = world.try_spawn_actor(kinds[int(rng.integers(len(kinds)))], spots[int(at)])
        if actor is not None:
            actor.set_autopilot(True)
            actors.append(actor)
    return actors


def _camera(carla: Any, world: Any, kind: str, options: CarlaOptions) -> Any:
    blueprint = world.get_blueprint_library().find(f"sensor.camera.{kind}")
    wanted: dict[str, object] = {
        "image_size_x": options.image_size[0],
        "image_size_y": options.image_size[1],
        "fov": options.fov,
        "motion_blur_intensity": 0.0,  # cameras jump from place to place
        "lens_k": 0.0,  # by default pictures are bent a little at their corners
        "lens_kcube": 0.0,
    }
    for key, value in wanted.items():
        if blueprint.has_attribute(key):  # cameras of depth and versions of CARLA lack some
            blueprint.set_attribute(key, str(value))
    return world.spawn_actor(blueprint, carla.Transform())


def _places(world: Any, town: str, options: CarlaOptions, quota: int) -> list[_Place]:
    """Spots on roads where vehicles may start: the first of a random order that are for something.

    Raises:
        UserInputError: if there are too few.
    """
    spots = world.get_map().get_spawn_points()
    points = np.array([[s.location.x, s.location.y] for s in spots], dtype=np.float64).reshape(-1, 2)
    order = np.random.default_rng([options.seed, 0]).permutation(len(spots))
    if options.test_towns:
        wanted = {"test" if town in options.test_towns else "train": quota}
        allowed = {name: np.ones(len(spots), bool) for name in wanted}
    else:
        held_out = max(1, round(quota * options.test_fraction))
        wanted = {"train": quota - held_out, "test": held_out}
        extent = max(options.aabb[1][axis] - options.aabb[0][axis] for axis in (0, 1))
        gap = extent + 2 * options.place_jitter
        regions = hold_out_regions(points, {"test": options.test_fraction}, gap)
        allowed = {name: in_split(points, name, regions, gap) for name in wanted}
    found = []
    for split, count in wanted.items():
        chosen = [int(i) for i in order if allowed[split][i]][:count]
        if len(chosen) < count:
            raise UserInputError(
                f"{town} has only {len(chosen)} places for {split}, not {count}: ask for fewer scenes, or more --towns."
            )
        for i in chosen:
            where = spots[i]
            location = np.array([where.location.x, where.location.y, where.location.z])
            found.append(_Place(town, i, split, location, float(where.rotation.yaw)))
    return found


def _record(carla: Any, world: Any, rig: _Rig, place: _Place, folder: Path, options: CarlaOptions) -> None:
    rng = np.random.default_rng([options.seed, 2, place.number])
    weather = options.weathers[int(rng.integers(len(options.weathers)))] if options.weathers else None
    if weather is not None:
        preset = getattr(carla.WeatherParameters, weather, None)
        if preset is None:
            raise UserInputError(f"CARLA has no weather {weather}: choose of its presets, such as ClearNoon.")
        world.set_weather(preset)
    transforms = plan_rig(place.location, place.yaw, rng, options)
    for pair, (x, y, z, yaw) in zip(rig.cameras, transforms, strict=True):
        for sensor in pair:
            sensor.set_transform(carla.Transform(carla.Location(x, y, z), carla.Rotation(yaw=yaw)))
    step = 0
    for _ in range(max(1, options.warm_up)):
        step = world.tick()
    images, depths, poses = [], [], []
    for colours, planes in rig.inboxes:
        picture, plane = _of_step(colours, step), _of_step(planes, step)
        images.append(rgb_of_bgra(_pixels(picture)))
        depths.append(depth_of_bgra(_pixels(plane)))
        poses.append(pose_of_transform(np.array(picture.transform.get_matrix())))
    place_record = {"map": place.town, "weather": weather}
    _write(folder, np.stack(images), np.stack(depths), np.stack(poses), place_record, options)


def plan_rig(
    location: Float[np.ndarray, " 3"], yaw: float, rng: np.random.Generator, options: CarlaOptions
) -> list[tuple[float, float, float, float]]:
    """x, y, z and yaw, in CARLA's axes, of each camera: sources all around one spot, then targets near it.

    The spot lies on the lane, up to `place_jitter` from where a vehicle would start; sources look to all sides, evenly,
    as those of the paper's rig. Targets stand along the lane, so that they are in no wall.
    """
    along = np.array([math.cos(math.radians(yaw)), math.sin(math.radians(yaw))])
    spot = location[:2] + rng.uniform(-1, 1) * options.place_jitter * along
    z = float(location[2]) + options.height
    turn = yaw + rng.uniform(0, 360 / options.num_source_views)
    rig = [
        (float(spot[0]), float(spot[1]), z, float(turn + unreal_yaw(360 * i / options.num_source_views)))
        for i in range(options.num_source_views)
    ]
    for _ in range(options.num_target_views):
        away = spot + rng.uniform(0.25, 1) * options.target_distance * (1 if rng.random() < 0.5 else -1) * along
        rig.append((float(away[0]), float(away[1]), z, float(rng.uniform(0, 360))))
    return rig


def _of_step(inbox: queue.Queue, step: int) -> Any:
    """The picture of one step of the server; earlier ones are thrown away."""
    while True:
        try:
            picture = inbox.get(timeout=_TIMEOUT_S)
        except queue.Empty:
            raise UserInputError(
                f"CARLA sent no picture within {_TIMEOUT_S:.0f} s: is the server overloaded, or without a GPU? "
                "The same command continues."
            ) from None
        if picture.frame >= step:
            return picture


def _pixels(picture: Any) -> np.ndarray:
    return np.frombuffer(picture.raw_data, np.uint8).reshape(picture.height, picture.width, 4)


def _write(
    folder: Path,
    images: np.ndarray,
    depths: Float[np.ndarray, "views height width"],
    poses: Float[np.ndarray, "views 3 4"],
    place: dict[str, Any],
    options: CarlaOptions,
) -> None:
    width, height = options.image_size
    origin = poses[: options.num_source_views, :, 3].mean(axis=0)
    poses = poses.copy()
    poses[:, :, 3] -= origin
    focal = focal_length(options.fov, width)
    known = np.where((depths >= options.near) & (depths <= options.far), depths, 0)
    views = Views(
        make_cameras(torch.from_numpy(poses), focal, focal, width / 2, height / 2, height, width),
        torch.from_numpy(images).permute(0, 3, 1, 2).float() / 255,
        torch.from_numpy(known).float()[:, None],
    )
    count = options.num_source_views
    write_scene(folder, views[:count], views[count:], extra={"place": {**place, "origin": origin.tolist()}})


def _describe(root: Path, options: CarlaOptions, splits: Mapping[str, list[str]]) -> None:
    ids = [scene for name in SPLITS for scene in splits[name]]
    write_collection(
        root,
        name="CARLA streets",
        licence=LICENCE,
        aabb=options.aabb,
        near=options.near,
        far=options.far,
        image_size=options.image_size,
        splits=dict(splits),
        places={i: read_json(root / "scenes" / i / "transforms.json")["place"] for i in ids},
        bev_classes=(),
        made_by={"command": "nfldm-collect carla", **asdict(options)},
    )
