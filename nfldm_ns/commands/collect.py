"""`nfldm-collect`: makes, imports and judges scene collections."""

import statistics
import sys
from dataclasses import MISSING, dataclass, fields
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import tyro
from rich.box import SIMPLE
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Column, Table

from nfldm_ns.errors import UserInputError, exit_on_bad_input

if TYPE_CHECKING:
    from nfldm_ns.collect.capture_import import ImportOptions, ReadCapture
    from nfldm_ns.collect.captures import Capture
    from nfldm_ns.collect.checking import CollectionCheck, SceneCheck
    from nfldm_ns.collect.cut_collection import CutCapture, CutReport

_MAX_PROBLEMS = 20
_CapturesAndOut = tyro.conf.Positional[Annotated[tuple[Path, ...], tyro.conf.arg(metavar="CAPTURES... OUT")]]
Up = Literal["z", "y", "-y", "cameras", "path"]
Box = tuple[float, float, float, float, float, float]
"""Minimum x, y, z, then maximum x, y, z, in metres."""


@dataclass
class Vizdoom:
    """Makes a collection of posed RGB-D scenes from Freedoom's 68 maps, or from mazes; run again, it continues."""

    out: tyro.conf.Positional[Path]
    """Folder of the collection."""
    num_scenes: int = 500
    image_size: int = 64
    """Width and height of the images in pixels."""
    workers: int = 1
    seed: int = 0
    maps: tuple[str, ...] = ("*",)
    """Names or globs, such as freedoom1/E1M1 or 'freedoom2/MAP0*'; 'mazes/MAZE00*' are made-up maps, 10,000 in all."""
    test_maps: tuple[str, ...] = ()
    """Names or globs of maps held out for testing; by default a share of the maps, chosen by the seed."""
    test_fraction: float = 0.1
    """Share of the scenes in the test split."""
    val_fraction: float = 0.0
    """Share of the scenes in the val split."""
    hold_out: Literal["maps", "places"] = "maps"
    """What the test split has to itself: whole maps, or a part of every map, further than the box from all the rest."""
    box: Box = (-10, -10, -2.5, 10, 10, 4)
    """The box around each place: minimum x, y, z, then maximum x, y, z, in metres relative to the eye."""
    near: float = 0.1
    far: float = 30.0
    """Depth beyond this many metres is unknown, like the sky's."""
    num_target_views: int = 4
    """Held-back views per scene."""
    target_distance: float = 1.5
    """Greatest distance of a target view from the place, in metres."""
    min_distance: float = 1.5
    """Least distance between two places, in metres."""
    snap: float = 0.0
    """Moves places to the centres of squares of this side, in metres: 2.5 fits the lattice of the mazes."""
    min_brightness: float = 0.12
    """Least mean brightness of a place's views, from 0 to 1."""
    min_depth: float = 2.0
    """Least median depth of a place's views, in metres."""
    min_view_depth: float = 0.7
    """Least median depth of each view, in metres: less means that it faces a wall."""
    min_inside: float = 0.6
    """Least share of pixels whose surface lies inside the box."""
    min_light: int = 0
    """Raises darker rooms to this light level (0-255)."""
    keep_sprites: bool = False
    """Keeps items and decorations, which always turn towards the camera and so are no part of a static scene."""

    def run(self) -> int:
        from nfldm_ns.collect import doom_collection as doom

        known = doom.known_maps([*self.maps, *self.test_maps])
        test_maps = doom.choose_maps(self.test_maps, known) if self.test_maps else []
        maps = sorted({*doom.choose_maps(self.maps, known), *test_maps}, key=known.index)
        options = doom.CollectionOptions(
            num_scenes=self.num_scenes,
            maps=tuple(maps),
            test_maps=tuple(test_maps),
            fractions={"test": self.test_fraction, "val": self.val_fraction},
            hold_out=self.hold_out,
            scenes=self._scene_options(),
        )
        with _progress() as progress:
            task = progress.add_task("scenes", total=self.num_scenes)
            report = doom.collect(self.out, options, self.workers, lambda done: progress.update(task, completed=done))
        counts = ", ".join(f"{count} {name}" for name, count in report.num_scenes.items() if count)
        print(f"{self.out}: {counts} scenes; {report.new_frames} new frames in {report.seconds:.0f} s", end="")
        print(f" ({report.frames_per_second_per_worker:.1f} per second and worker)")
        _write_sheet(self.out)
        found = sum(report.num_scenes.values())
        if found < self.num_scenes:
            print(
                f"These maps have only {found} places that pass: give more maps, or lower --min-distance or a filter."
            )
        return 0

    def _scene_options(self):
        from nfldm_ns.collect.doom_places import RigOptions
        from nfldm_ns.collect.doom_scenes import PlaceFilter, SceneOptions

        return SceneOptions(
            seed=self.seed,
            image_size=self.image_size,
            aabb=(self.box[:3], self.box[3:]),
            near=self.near,
            far=self.far,
            min_distance=self.min_distance,
            snap=self.snap,
            min_light=self.min_light,
            keep_sprites=self.keep_sprites,
            rig=RigOptions(num_target_views=self.num_target_views, target_distance=self.target_distance),
            accept=PlaceFilter(
                min_brightness=self.min_brightness,
                min_depth=self.min_depth,
                min_view_depth=self.min_view_depth,
                min_inside=self.min_inside,
            ),
        )


@dataclass
class Miniworld:
    """Makes a collection of posed RGB-D scenes from MiniWorld's houses, made up by a seed; run again, it continues."""

    out: tyro.conf.Positional[Path]
    """Folder of the collection."""
    num_scenes: int = 500
    image_size: int = 64
    """Width and height of the images in pixels."""
    seed: int = 0
    places: int = 4
    """Scenes of each house, at most; all of a house are in one split."""
    test_fraction: float = 0.1
    """Share of the houses held out for testing."""
    val_fraction: float = 0.0
    box: Box = (-6, -6, -1.8, 6, 6, 1.4)
    """The box around each place: minimum x, y, z, then maximum x, y, z, in metres relative to the eye."""
    near: float = 0.1
    far: float = 30.0
    num_target_views: int = 4
    """Held-back views per scene."""
    target_distance: float = 1.5
    """Greatest distance of a target view from the place, in metres."""
    min_distance: float = 1.5
    """Least distance between two places of a house, in metres."""
    min_depth: float = 1.5
    """Least median depth of a place's views, in metres."""
    min_view_depth: float = 0.6
    """Least median depth of each view, in metres: less means that it faces a wall."""
    min_inside: float = 0.6
    """Least share of pixels whose surface lies inside the box."""

    def run(self) -> int:
        from nfldm_ns.collect.miniworld_collection import MiniworldOptions, collect_miniworld

        own = {
            key: value
            for key, value in vars(self).items()
            if key not in ("out", "test_fraction", "val_fraction", "box")
        }
        fractions = {"test": self.test_fraction, "val": self.val_fraction}
        options = MiniworldOptions(**own, fractions=fractions, aabb=(self.box[:3], self.box[3:]))
        with _progress() as progress:
            task = progress.add_task("scenes", total=self.num_scenes)
            report = collect_miniworld(self.out, options, lambda done: progress.update(task, completed=done))
        counts = ", ".join(f"{count} {name}" for name, count in report.num_scenes.items() if count)
        print(f"{self.out}: {counts} scenes; {report.new_frames} new frames in {report.seconds:.0f} s")
        _write_sheet(self.out)
        return 0


@dataclass
class Carla:
    """Records a collection from a running CARLA server: six cameras all around, as in the paper; it continues, too."""

    out: tyro.conf.Positional[Path]
    """Folder of the collection."""
    host: str = "localhost"
    port: int = 2000
    num_scenes: int = 1000
    towns: tuple[str, ...] = ()
    """Maps of the server, such as Town01 Town02; by default the one that is loaded."""
    test_towns: tuple[str, ...] = ()
    """Those of them that are held out; without any, a part of each town is, further than the box from all the rest."""
    test_fraction: float = 0.1
    """Share of the scenes in the test split, without --test-towns."""
    image_size: tuple[int, int] = (128, 128)
    """Width and height of the images in pixels."""
    num_source_views: int = 6
    """Cameras all around at each place."""
    num_target_views: int = 4
    """Held-back views, along the lane."""
    fov: float = 90.0
    """Horizontal field of view in degrees."""
    height: float = 1.8
    """Of the cameras above the road, in metres."""
    target_distance: float = 4.0
    """Greatest distance of a target view from the place, in metres."""
    place_jitter: float = 2.0
    """Greatest distance of a place from where the server would start a vehicle, along its lane, in metres."""
    box: Box = (-40, -40, -3, 40, 40, 17)
    """The box around each place: minimum x, y, z, then maximum x, y, z, in metres relative to the cameras."""
    near: float = 0.5
    far: float = 60.0
    """Depth beyond this many metres is unknown, like the sky's."""
    vehicles: int = 30
    """Driven by the server's autopilot, in each town."""
    weathers: tuple[str, ...] = ()
    """Names of CARLA's presets, such as ClearNoon, of which each scene draws one; by default eleven of them."""
    warm_up: int = 8
    """Steps of the server before each picture, for its exposure and shadows."""
    seed: int = 0

    def run(self) -> int:
        from nfldm_ns.collect.carla_collection import CarlaOptions, collect_carla

        own = {key: value for key, value in vars(self).items() if key not in ("out", "host", "port", "box")}
        if not self.weathers:
            del own["weathers"]
        options = CarlaOptions(**own, aabb=(self.box[:3], self.box[3:]))
        with _progress() as progress:
            task = progress.add_task("scenes", total=self.num_scenes)
            report = collect_carla(
                self.out, options, self.host, self.port, lambda done: progress.update(task, completed=done)
            )
        counts = ", ".join(f"{count} {name}" for name, count in report.num_scenes.items() if count)
        print(f"{self.out}: {counts} scenes, {report.new_scenes} of them new")
        _write_sheet(self.out)
        return 0


@dataclass
class Metadrive:
    """Makes a collection of streets: MetaDrive's roads and traffic, six cameras all around; run again, it continues.

    The first run installs MetaDrive into a virtual environment of its own. No display or GPU is needed.
    """

    out: tyro.conf.Positional[Path]
    """Folder of the collection."""
    num_scenes: int = 500
    image_size: tuple[int, int] = (128, 128)
    """Width and height of the images in pixels."""
    workers: int = 1
    seed: int = 0
    places: int = 6
    """Scenes of each layout of roads; all of a layout are in one split."""
    test_fraction: float = 0.1
    """Share of the layouts held out for testing."""
    val_fraction: float = 0.0
    blocks: int = 4
    """Parts of a layout: straights, bends, crossings, roundabouts, ramps."""
    moving: Literal["still", "keep", "mask"] = "still"
    """Cars that drive: stand still within a scene, drive on between its time steps, or do so and are masked."""
    cars: float = 0.12
    """Share of the places on lanes, 9 m apart, that have a car that drives; others are parked."""
    fov: tuple[float, ...] = (90.0,)
    """Horizontal field of view in degrees; or six, from the front counter-clockwise."""
    height: float = 1.8
    """Of the cameras above the road, in metres."""
    time_steps: int = 3
    """Moments of a scene, while the cameras drive along a lane."""
    time_step: float = 0.5
    """Seconds between them."""
    source_steps: int = 1
    """Moments, in the middle, whose six cameras are source views; target views are of the others."""
    num_target_views: int = 4
    """Held-back views per scene, between the directions of the six cameras."""
    min_distance: float = 15.0
    """Least distance between two places of a layout, in metres."""
    box: Box = (-40, -40, -3, 40, 40, 13)
    """The box around each place: minimum x, y, z, then maximum x, y, z, in metres relative to the cameras."""
    near: float = 1.5
    far: float = 60.0
    """Depth beyond this many metres is unknown, like the sky's."""
    bev_size: int = 128
    """Width and height of the semantic maps in pixels."""
    environment: Path | None = None
    """Folder of the virtual environment with MetaDrive, made if it isn't there; by default in the user's cache."""

    def run(self) -> int:
        from nfldm_ns.collect import street_simulator
        from nfldm_ns.collect.contact_sheet import write_panoramas
        from nfldm_ns.collect.street_collection import StreetOptions, check_options, collect_streets, plan_layouts
        from nfldm_ns.scenes.collection import SceneCollection

        values = vars(self) | {
            "fractions": {"test": self.test_fraction, "val": self.val_fraction},
            "aabb": (self.box[:3], self.box[3:]),
        }
        names = {field.name for field in fields(StreetOptions)}
        options = StreetOptions(**{key: value for key, value in values.items() if key in names})
        check_options(options)
        plan_layouts(options)
        environment = self.environment or street_simulator.default_environment()
        if not street_simulator.ready_environment(environment):
            print(f"MetaDrive is installed into {environment} first, which takes minutes.")
            street_simulator.make_environment(environment)
        with _progress() as progress:
            task = progress.add_task("scenes", total=self.num_scenes)
            report = collect_streets(
                self.out, options, environment, self.workers, lambda done: progress.update(task, completed=done)
            )
        counts = ", ".join(f"{count} {name}" for name, count in report.num_scenes.items() if count)
        print(f"{self.out}: {counts} scenes, {report.new_scenes} of them new, in {report.seconds:.0f} s")
        _write_sheet(self.out)
        write_panoramas(SceneCollection.open(self.out), self.out / "panoramas.png")
        print(f"{self.out / 'panoramas.png'} shows a few of them all around")
        return 0


@dataclass
class Check:
    """Judges a collection; exit code 1 if something is wrong with it."""

    folder: tyro.conf.Positional[Path]
    worst: int = 8
    """How many scenes to list, those whose depths agree least first."""

    def run(self) -> int:
        import torch

        from nfldm_ns.collect.checking import check_collection
        from nfldm_ns.scenes.collection import SceneCollection

        torch.set_num_threads(1)  # the tensors of one scene are too small to share out
        collection = SceneCollection.open(self.folder)
        with _progress() as progress:
            task = progress.add_task("scenes", total=len(collection.scene_ids))
            report = check_collection(collection, lambda _: progress.advance(task))
        console = Console()
        console.print(_summary_table(report))
        console.print(_scene_table(report, self.worst))
        for problem in report.all_problems[:_MAX_PROBLEMS]:
            console.print(f"- {problem}", markup=False, highlight=False, soft_wrap=True)
        if report.ok:
            console.print(f"{self.folder} is a good collection.", soft_wrap=True)
            return 0
        count, hidden = len(report.all_problems), max(0, len(report.all_problems) - _MAX_PROBLEMS)
        more = f" ({hidden} of them not shown)" if hidden else ""
        console.print(f"{self.folder} has {count} problem{'s' if count > 1 else ''}{more}.", soft_wrap=True)
        return 1


@dataclass
class _Captures:
    """What all that makes scenes of captures has in common."""

    paths: _CapturesAndOut
    """Folders of the captures; last the folder of the new collection."""
    scenes: tuple[Path, ...] = ()
    """The captures as an option, after OUT instead of before it."""
    image_size: tuple[int, int] = (64, 64)
    """Width and height of the images in pixels; a 0 keeps the captures' aspect, 0 0 their size, in multiples of 16."""
    num_source_views: int = 8
    """What the encoder sees: evenly spaced frames of each capture, or as different ones as see a box."""
    num_target_views: int = 4
    """Held-back views: evenly spaced between them, or apart from them in the same box."""
    metres_per_unit: float = 1.0
    """Scale of the captures' poses."""
    depth_unit_scale: float | None = None
    """Metres per unit of the depth files; by default what the format or the capture says."""
    up: Up = "z"
    """The captures' axis that points up; cameras: as the cameras were held; path: across the plane of the path."""
    box: Box | None = None
    """Minimum x, y, z, then maximum, in metres around each place; by default -10 -10 -2.5 10 10 4, found with --cut."""
    near: float = 0.1
    far: float = 30.0
    test_fraction: float = 0.1
    """Share held out for testing, of the captures, or with --cut of each one's places."""
    val_fraction: float = 0.0
    test_scenes: tuple[str, ...] = ()
    """Names of capture folders held out for testing, instead of a share."""
    seed: int = 0
    name: str = "imported captures"
    licence: str = "unknown"
    monocular_depth: str | None = None
    """Depth model of transformers, a name or a folder, that fills in between the points of frames with sparse depth."""
    cut: bool = False
    """Makes a scene of each place along a capture's path that enough views see, instead of one; resumable."""
    spacing: float | None = None
    """With --cut: metres between places along the path; by default an eighth of the box's width."""
    camera_height: float | None = None
    """With --cut: metres between the floor and the cameras, which give each capture its scale."""
    min_inside: float = 0.4
    """With --cut: least share of a view's surfaces inside the box."""
    min_overlap: float = 0.5
    """With --cut: least share of a target view's surfaces that some source view sees, too."""
    hold_out: Literal["stretches", "captures"] = "stretches"
    """With --cut: held out are stretches of each capture's path, or whole captures."""
    workers: int = 1
    """With --cut: processes."""

    @property
    def out(self) -> Path:
        """Folder of the new collection."""
        return self.paths[-1]

    def _captures(self) -> tuple[Path, ...]:
        """Folders of the captures.

        Raises:
            UserInputError: if they or OUT are missing, or captures are given in both ways.
        """
        before = self.paths[:-1]
        if before and self.scenes:
            raise UserInputError("Captures are given both before OUT and with --scenes: name all of them before OUT.")
        if not self.paths or not (before or self.scenes):
            raise UserInputError("Name the folders of the captures, and last the folder of the new collection.")
        return before or self.scenes

    def _import(self, command: str, read: "ReadCapture", captures: tuple[Path, ...] | None = None) -> int:
        """Makes the collection; `read` must be something that other processes can be given.

        Args:
            captures: what it reads, where that is not the folders that were given.
        """
        from nfldm_ns.collect.capture_import import DEFAULT_AABB, ImportOptions

        captures = self._captures() if captures is None else captures
        made_by = {"command": f"nfldm-collect {command}", **_recorded(self)}
        values = {field.name: getattr(self, field.name) for field in fields(_Captures)}
        names = {field.name for field in fields(ImportOptions)}
        box = None if self.box is None else (self.box[:3], self.box[3:])
        options = ImportOptions(**{k: v for k, v in values.items() if k in names}, aabb=box or DEFAULT_AABB)
        if self.cut:
            return self._cut(captures, options, box, read, made_by)
        self._refuse_options_of_cuts()
        return self._import_whole(captures, options, read, made_by)

    def _refuse_options_of_cuts(self) -> None:
        for field in fields(_Captures):
            if field.name in _OF_CUTS and field.default is not MISSING and getattr(self, field.name) != field.default:
                raise UserInputError(f"--{field.name.replace('_', '-')} is for captures that are cut: add --cut.")

    def _cut(
        self, captures: tuple[Path, ...], options: "ImportOptions", box, read: "ReadCapture", made_by: dict
    ) -> int:
        from nfldm_ns.collect.cut_collection import CutOptions, cut_captures

        cut = CutOptions(box, self.spacing, self.camera_height, self.min_inside, self.min_overlap, self.hold_out)
        with _progress() as progress:
            tasks = {what: progress.add_task(what, total=None) for what in ("frames", "scenes")}

            def tell(what: str, done: int, total: int) -> None:
                progress.update(tasks[what], completed=done, total=total)

            report = cut_captures(self.out, captures, options, cut, read, made_by, self.workers, tell)
        _tell_of_cuts(self.out, report)
        _tell_of_what_was_left_out([cut.capture for cut in report.captures])
        _write_sheet(self.out)
        return 0

    def _import_whole(
        self, folders: tuple[Path, ...], options: "ImportOptions", read: "ReadCapture", made_by: dict
    ) -> int:
        from nfldm_ns.collect.capture_import import import_captures

        out = self.out
        captures: list[Capture] = []
        with _progress() as progress:
            task = progress.add_task("scenes", total=len(folders))

            def tell(capture: "Capture") -> None:
                captures.append(capture)
                progress.advance(task)

            splits = import_captures(out, folders, options, read, made_by, tell)
        counts = ", ".join(f"{len(ids)} {name}" for name, ids in splits.items() if ids)
        print(f"{out}: {counts} scenes; 'nfldm-collect check {out}' judges them")
        _tell_of_what_was_left_out(captures)
        _write_sheet(out)
        return 0


_OF_CUTS = ("spacing", "camera_height", "min_inside", "min_overlap", "hold_out", "workers")


@dataclass
class Import(_Captures):
    """Turns one's own captures, folders with nerfstudio's transforms.json, into a collection of one scene each.

    With --cut of many each. nfldm-collect import and nfldm-collect nerfstudio are the same.
    """

    depth_unit_scale: float | None = None
    """Metres per unit of the depth files; by default what the capture's depth_unit_scale_factor says, else 0.001."""

    def run(self) -> int:
        from nfldm_ns.collect.formats.nerfstudio import read_capture

        return self._import("import", read_capture)


@dataclass
class Gsn(_Captures):
    """Makes a collection of the trajectories that GSN published, of VizDoom or Replica (cameras.json, 000_rgb.png)."""

    up: Up = "y"
    """The trajectories' axis that points up; y in GSN's."""
    camera_axes: Literal["opengl", "opencv"] = "opengl"
    """The cameras' axes: GSN's look along -z (opengl)."""

    def run(self) -> int:
        from nfldm_ns.collect.formats.gsn import read_gsn

        return self._import("gsn", partial(read_gsn, axes=self.camera_axes))


@dataclass
class Tum(_Captures):
    """Makes a collection of sequences of the RGB-D benchmark of TUM (rgb.txt, depth.txt, groundtruth.txt)."""

    camera: Literal["auto", "freiburg1", "freiburg2", "freiburg3"] = "auto"
    """Whose published intrinsics count; auto looks for the name in that of the folder."""
    intrinsics: tuple[float, float, float, float] | None = None
    """fx, fy, cx and cy in pixels from the middle of the first one, without distortion, instead of the published."""

    def run(self) -> int:
        from nfldm_ns.collect.formats.tum import read_tum

        return self._import("tum", partial(read_tum, camera=self.camera, intrinsics=self.intrinsics))


@dataclass
class Replica(_Captures):
    """Makes a collection of Replica's rooms in NICE-SLAM's layout (results/, traj.txt, cam_params.json)."""

    def run(self) -> int:
        from nfldm_ns.collect.formats.replica import read_replica

        return self._import("replica", read_replica)


@dataclass
class Scannet(_Captures):
    """Makes a collection of ScanNet's scans, exported from their .sens files (color/, depth/, pose/, intrinsic/)."""

    def run(self) -> int:
        from nfldm_ns.collect.formats.scannet import read_scannet

        return self._import("scannet", read_scannet)


@dataclass
class Colmap(_Captures):
    """Makes a collection of COLMAP's reconstructions, with depth where the points that an image observes are."""

    up: Up = "-y"
    """The reconstructions' axis that points up; -y where the first camera, and so the world, was level."""
    model: str = "sparse/0"
    """Folder of cameras, images and points3D (.bin or .txt) in each capture."""
    images: str = "images"
    """Folder of the images in each capture."""

    def run(self) -> int:
        from nfldm_ns.collect.formats.colmap import read_colmap

        return self._import("colmap", partial(read_colmap, model=self.model, images=self.images))


@dataclass
class Record3d(_Captures):
    """Makes a collection of recordings of Record3D: unpacked .r3d files, or exports EXR + RGB."""

    up: Up = "y"
    """The recordings' axis that points up: ARKit's is y."""

    def run(self) -> int:
        from nfldm_ns.collect.formats.record3d import read_record3d

        return self._import("record3d", read_record3d)


@dataclass
class Polycam(_Captures):
    """Makes a collection of Polycam's raw data (keyframes/ with images, cameras, depth; corrected ones come first)."""

    up: Up = "y"
    """The captures' axis that points up: ARKit's is y."""
    min_blur_score: float = 0.0
    """Leaves out pictures whose blur_score is less; it is large for sharp ones."""

    def run(self) -> int:
        from nfldm_ns.collect.formats.polycam import read_polycam

        return self._import("polycam", partial(read_polycam, min_blur_score=self.min_blur_score))


@dataclass
class Arkitscenes(_Captures):
    """Makes a collection of ARKitScenes' videos (lowres_wide, lowres_depth, their intrinsics, lowres_wide.traj)."""

    def run(self) -> int:
        from nfldm_ns.collect.formats.arkitscenes import read_arkitscenes

        return self._import("arkitscenes", read_arkitscenes)


@dataclass
class Scannetpp(_Captures):
    """Makes a collection of ScanNet++'s scenes: the iPhone's frames with depth, or the DSLR's without."""

    camera: Literal["iphone", "dslr"] = "iphone"
    """iphone/ (rgb, depth, pose_intrinsic_imu.json) or dslr/ (resized_images, nerfstudio/transforms.json)."""

    def run(self) -> int:
        from nfldm_ns.collect.formats.scannetpp import read_scannetpp

        return self._import("scannetpp", partial(read_scannetpp, camera=self.camera))


@dataclass
class Kitti360(_Captures):
    """Makes a collection of KITTI-360's drives (data_2d_raw/<drive>), with the Velodyne as sparse depth."""

    cameras: Literal["both", "left", "right"] = "both"
    """Of the rectified stereo pair."""

    def run(self) -> int:
        from nfldm_ns.collect.formats.kitti360 import read_kitti360

        return self._import("kitti360", partial(read_kitti360, cameras=self.cameras))


@dataclass
class Nuscenes(_Captures):
    """Makes a collection of nuScenes' scenes: six cameras, the Lidar as sparse depth, and maps where there are any."""

    version: str = "v1.0-trainval"
    """Folder of the tables, such as v1.0-mini; the capture is the folder that it is in."""
    scene_names: tuple[str, ...] = ()
    """Such as scene-0061; by default all."""
    cameras: tuple[str, ...] = (
        "CAM_FRONT",
        "CAM_FRONT_RIGHT",
        "CAM_BACK_RIGHT",
        "CAM_BACK",
        "CAM_BACK_LEFT",
        "CAM_FRONT_LEFT",
    )
    masks: Path | None = None
    """Folder of <camera>/<picture's name>.png, black where masked, as of moving things."""

    def run(self) -> int:
        from nfldm_ns.collect.formats.nuscenes import NuscenesReader

        read = NuscenesReader(self.version, self.cameras, self.masks)
        scenes = tuple(root / n for root in self._captures() for n in self.scene_names or read.scene_names(root))
        return self._import("nuscenes", read, scenes)


def _recorded(command: _Captures) -> dict[str, Any]:
    """The format's own options, as JSON can hold them."""
    own = {key: value for key, value in vars(command).items() if key in _own(command)}
    return {key: str(value) if isinstance(value, Path) else value for key, value in own.items()}


def _own(command: _Captures) -> set[str]:
    """Options that a format has beside those of all."""
    return {field.name for field in fields(command)} - {field.name for field in fields(_Captures)}


def _tell_of_what_was_left_out(captures: "list[Capture]") -> None:
    for note in (note for capture in captures for note in capture.notes):
        print(f"{note}.")
    unread = {key: capture.file for capture in reversed(captures) for key in capture.unread}
    if unread:
        keys = dict.fromkeys(key for capture in captures for key in capture.unread)
        first = unread[next(iter(keys))]
        print(f"Not read, for nothing is known of such keys: {', '.join(map(repr, keys))} (in {first}).")


def _tell_of_cuts(root: Path, report: "CutReport") -> None:
    """What became of each capture, and why stretches of its path did not become scenes."""
    low, high = report.aabb
    box = " x ".join(f"{b - a:.3g}" for a, b in zip(low, high, strict=True))
    counts = ", ".join(f"{len(ids)} {split}" for split, ids in report.splits.items() if ids)
    width, height = report.image_size
    print(f"{root}: {counts} scenes of {width} x {height} pixels in boxes of {box} m, {report.spacing:.3g} m apart")
    for cut in report.captures:
        print(f"{cut.name}: {_measures(cut)}")
        for reason, begin, end, count in cut.dropped():
            print(f"  no scene from {begin:.1f} to {end:.1f} m ({count} places): {reason}")
    if not report.splits["test"]:
        print("No place was held out for testing: give longer captures, a smaller --box, or --hold-out captures.")
    print(
        f"{root / 'cutting'} has a picture of each capture from above; 'nfldm-collect check {root}' judges the scenes"
    )


def _measures(cut: "CutCapture") -> str:
    used = sum(not place.dropped for place in cut.places)
    length = cut.survey.path_length[-1]
    parts = [f"{used} scenes along {length:.1f} m of path, {len(cut.capture.frames)} frames"]
    without = int((~cut.survey.known.any(axis=1)).sum())
    if without:
        parts.append(f"{without} of them without depth, which see nothing")
    if cut.camera_height is None:
        parts.append("no floor found")
    else:
        parts.append(f"the floor is {cut.camera_height:.2f} m below the cameras")
    if cut.scale != 1:
        parts.append(f"scaled by {cut.scale:.4g}")
    return "; ".join(parts)


def _progress() -> Progress:
    console = Console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    return Progress(*columns, TimeRemainingColumn(), console=console, disable=not console.is_terminal)


def _write_sheet(root: Path) -> None:
    from nfldm_ns.collect.contact_sheet import write_contact_sheet
    from nfldm_ns.scenes.collection import SceneCollection

    write_contact_sheet(SceneCollection.open(root), root / "contact_sheet.png")
    print(f"{root / 'contact_sheet.png'} shows some of them")


_COLUMNS = ("views", "light", "depth", "known", "in box", "error", "agree")
_CAPTION = (
    "Medians over scenes. light: mean brightness; depth: median; known: pixels with depth; in box: surfaces inside the "
    "box; error and agree: depths of one point in two views, median relative difference and share within {:.0%}."
)


def _summary_table(report: "CollectionCheck") -> Table:
    """One row per split, and one for all."""
    table = Table("split", "scenes", *_COLUMNS, box=SIMPLE, pad_edge=False)
    for split in (*dict.fromkeys(scene.split for scene in report.scenes), "all"):
        scenes = [s for s in report.scenes if split in ("all", s.split)]
        views = sum(s.num_source + s.num_target for s in scenes)
        table.add_row(split, str(len(scenes)), str(views), *_numbers(scenes))
    return table


def _scene_table(report: "CollectionCheck", count: int) -> Table:
    """The scenes whose depths agree least."""
    from nfldm_ns.collect.checking import CONSISTENT

    table = Table(
        Column("least agreement", overflow="fold"),
        *_COLUMNS,
        box=SIMPLE,
        pad_edge=False,
        caption=_CAPTION.format(CONSISTENT),
    )
    for scene in sorted(report.scenes, key=lambda s: s.reprojection.consistent)[:count]:
        table.add_row(scene.scene_id, f"{scene.num_source}+{scene.num_target}", *_numbers([scene]))
    return table


def _numbers(scenes: "list[SceneCheck]") -> list[str]:
    def median(values: list[float], text: str) -> str:
        values = [value for value in values if value == value]
        return text.format(statistics.median(values)) if values else "-"

    return [
        median([s.brightness for s in scenes], "{:.2f}"),
        median([s.median_depth for s in scenes], "{:.1f} m"),
        median([s.known_depth for s in scenes], "{:.0%}"),
        median([s.inside for s in scenes], "{:.0%}"),
        median([s.reprojection.median_error for s in scenes], "{:.1%}"),
        median([s.reprojection.consistent for s in scenes], "{:.0%}"),
    ]


def main(args: list[str] | None = None) -> None:
    """Entry point of `nfldm-collect`."""
    command = tyro.extras.subcommand_cli_from_dict(
        {
            "vizdoom": Vizdoom,
            "miniworld": Miniworld,
            "carla": Carla,
            "metadrive": Metadrive,
            "check": Check,
            "import": Import,
            "nerfstudio": Import,
            "gsn": Gsn,
            "tum": Tum,
            "replica": Replica,
            "scannet": Scannet,
            "colmap": Colmap,
            "record3d": Record3d,
            "polycam": Polycam,
            "arkitscenes": Arkitscenes,
            "scannetpp": Scannetpp,
            "kitti360": Kitti360,
            "nuscenes": Nuscenes,
        },
        args=args,
    )
    try:
        with exit_on_bad_input():
            raise SystemExit(command.run())
    except KeyboardInterrupt:
        print("Interrupted: the same command continues where it stopped.", file=sys.stderr)
        raise SystemExit(130) from None


if __name__ == "__main__":
    main()
