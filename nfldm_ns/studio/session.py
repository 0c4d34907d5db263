"""What one does with scenes in the viewer, without the viewer: sampling, editing, choosing, keeping them."""

from __future__ import annotations

import io
import re
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from jaxtyping import Float, UInt8
from PIL import Image
from torch import Tensor

from nfldm_ns.diffusion.call_checks import check_count, check_seed
from nfldm_ns.diffusion.pipeline import STAGES, NFLDMPipeline
from nfldm_ns.editing.combining import combine_scenes, harmonise_seams
from nfldm_ns.editing.region import Box, Region, box_region, half_plane_region
from nfldm_ns.editing.resampling import SEAM_M, resample_region
from nfldm_ns.editing.scenes import cameras_of, encode_again, load_scene, require_joinable, write_edited_scene
from nfldm_ns.errors import UserInputError
from nfldm_ns.exports.mesh import scene_mesh, write_mesh
from nfldm_ns.exports.points import scene_points, write_points
from nfldm_ns.exports.splat_fitting import scene_splats
from nfldm_ns.exports.splats import write_splats
from nfldm_ns.exports.voxels import write_voxels
from nfldm_ns.generated.scene_files import GeneratedScene
from nfldm_ns.plugin.generated_run import render_views
from nfldm_ns.sampling.scenes import draw_scenes
from nfldm_ns.scenes.writing import atomic_path, bev_png, require_writable
from nfldm_ns.studio.drawn_map import DrawnMap
from nfldm_ns.studio.generator import DEFAULTS, Generator, Settings, step_reporter
from nfldm_ns.studio.jobs import Job, Worker

SIDES: dict[str, tuple[float, float]] = {
    "east of": (1.0, 0.0),
    "west of": (-1.0, 0.0),
    "north of": (0.0, 1.0),
    "south of": (0.0, -1.0),
}
IN_THE_BOX = "in the box"
PREPARED = 0.08  # share of the work of an edit that is done before its first step


@dataclass(frozen=True)
class StudioScene:
    """A scene and what belongs to it.

    Attributes:
        name: also of its folder, once it is kept.
        images: what its cameras see, `[N, 3, H, W]` in [0, 1].
        region: that was edited last.
        bev: the map that it follows, north up.
        folder: where it is kept.
    """

    name: str
    scene: GeneratedScene
    images: Float[Tensor, "views 3 height width"] | None = None
    region: Region | None = None
    bev: UInt8[np.ndarray, "height width"] | None = None
    folder: Path | None = None


def _mesh(scene: GeneratedScene, job: Job, path: Path) -> None:
    mesh = scene_mesh(scene, min_component=0.1)
    job.check()
    write_mesh(path, mesh)


def _points(scene: GeneratedScene, job: Job, path: Path) -> None:
    points = scene_points(scene)
    job.check()
    write_points(path, points)


def _splats(scene: GeneratedScene, job: Job, path: Path) -> None:
    splats = scene_splats(scene)
    job.check()
    write_splats(path, splats)


def _voxels(scene: GeneratedScene, job: Job, path: Path) -> None:
    write_voxels(path, scene.grid)


EXPORTS: dict[str, tuple[str, Callable[[GeneratedScene, Job, Path], None]]] = {
    "mesh (GLB)": ("mesh.glb", _mesh),
    "mesh (PLY)": ("mesh.ply", _mesh),
    "points (PLY)": ("points.ply", _points),
    "splats (PLY)": ("splats.ply", _splats),
    "voxels (npz)": ("voxels.npz", _voxels),
}
"""What scenes can be exported as: the end of the file's name, and what writes it."""


class StudioSession:
    """Scenes of one generator, of which one is on show, and one job at a time that makes further ones.

    What takes long returns at once and goes on in the worker's thread; `worker.status` tells how far it is.

    Args:
        scene: the first one.
        name: of it.
        output_dir: what is kept goes here.
        generator: samples; by default the one that the scene's record names.
        folder: of the scene, if it is kept in one.
        show: called when another scene is on show, from the thread in which that happened.
        changed: called when the worker's status or the list of scenes changed, likewise.
    """

    def __init__(
        self,
        scene: GeneratedScene,
        name: str,
        output_dir: Path,
        generator: Generator | None = None,
        folder: Path | None = None,
        show: Callable[[StudioScene], None] = lambda scene: None,
        changed: Callable[[], None] = lambda: None,
    ) -> None:
        self.scenes = [StudioScene(name, scene, folder=folder)]
        self.current = 0
        self.output_dir = output_dir
        self.generator = generator or Generator.of_scene(scene)
        self._map: DrawnMap | None = None
        self._map_lock = threading.Lock()
        self.follow_map = False
        self._show, self._changed = show, changed
        self._lock = threading.Lock()
        self.worker = Worker(changed)

    @property
    def on_show(self) -> StudioScene:
        """The scene that is looked at, and that is edited."""
        return self.scenes[self.current]

    @property
    def grid_box(self) -> Box:
        """The scenes' ground plane: minimum x and y, then maximum x and y, in metres."""
        low, high = self.on_show.scene.grid.aabb.tolist()
        return (low[0], low[1], high[0], high[1])

    def add_folders(self, folders: Sequence[Path]) -> None:
        """Adds scenes from folders, to go through.

        Raises:
            UserInputError: if one is no scene, or does not fit the first one.
        """
        for folder in folders:
            scene = load_scene(folder)
            require_joinable([self.scenes[0].scene, scene])
            images = render_views(scene, cameras_of(scene)).images
            self.scenes.append(StudioScene(folder.resolve().name, scene, images, folder=folder))

    def choose(self, index: int) -> None:
        """Shows one of the scenes.

        Raises:
            UserInputError: if there is no such scene.
        """
        if not 0 <= index < len(self.scenes):
            raise UserInputError(f"There is no scene {index + 1}: there are {len(self.scenes)}.")
        with self._lock:
            self.current = index
        self._show(self.on_show)
        self._changed()

    def open_generator(self) -> None:
        """Reads the generator, so that the first scene comes sooner, and that it is known what maps have."""

        def work(job: Job) -> str:
            self._pipeline()
            return "Ready."

        self.worker.start("Reading the generator", work)

    def sample(self, seed: int, settings: Settings = DEFAULTS) -> None:
        """Samples a new scene and shows it; by the map, if that is to be followed.

        Raises:
            UserInputError: for numbers that make no sense, and where nothing can be sampled now.
        """
        self._check(seed, settings)

        def work(job: Job) -> str:
            bev = self._map_to_follow()
            what = f"Sampling seed {seed}"
            pipeline = self._pipeline()
            with self.generator.with_solver(settings.solver):
                scene = draw_scenes(
                    pipeline,
                    1,
                    seed,
                    num_inference_steps=settings.num_inference_steps,
                    source=self.generator.source or "",
                    guidance_scale=settings.guidance_scale,
                    temperatures=settings.temperatures,
                    maps=[] if bev is None else [bev],
                    callback_on_step_end=step_reporter(job, what, _stages(pipeline)),
                    command="nfldm-studio",
                )[0]
            name = f"scene_{seed:06d}" + ("" if bev is None else "_map")
            return self._add(StudioScene(name, scene, bev=bev), job)

        self.worker.start(f"Sampling seed {seed}", work)

    def resample(
        self,
        box: Box,
        seed: int,
        settings: Settings = DEFAULTS,
        *,
        strength: float = 1.0,
        resamplings: int | None = None,
        seam_m: float = SEAM_M,
    ) -> None:
        """Samples a box of the scene on show anew and shows the result; by the map, if that is to be followed.

        Args:
            box: is cut to the scene.
            strength, resamplings, seam_m: see `resample_region`.

        Raises:
            UserInputError: likewise, and if the box holds no column of voxels.
        """
        self._check(seed, settings)
        if not 0 < strength <= 1 or seam_m < 0:
            raise UserInputError("The strength is above 0 and at most 1, the seam at least 0 m: give other numbers.")
        entry = self.on_show
        region = box_region(entry.scene.grid, self.cut(box))

        def work(job: Job) -> str:
            bev = self._map_to_follow()
            what = f"Resampling the box, seed {seed}"
            pipeline = self._pipeline()
            scene = entry.scene if entry.scene.latents else encode_again(pipeline, entry.scene)
            job.progress(PREPARED, what)
            with self.generator.with_solver(settings.solver):
                edited = resample_region(
                    pipeline,
                    scene,
                    region,
                    seed,
                    seam_m=seam_m,
                    num_inference_steps=settings.num_inference_steps,
                    strength=strength,
                    resamplings=resamplings,
                    source=self.generator.source or "",
                    bev=bev,
                    temperatures=settings.temperatures,
                    callback_on_step_end=step_reporter(job, what, _stages(pipeline)[1:], PREPARED),
                )
            return self._add(StudioScene(f"{_stem(entry.name)}_box_{seed:06d}", edited, region=region, bev=bev), job)

        self.worker.start(f"Resampling the box, seed {seed}", work)

    def combine(
        self,
        other: int,
        side: str,
        at: float,
        box: Box,
        seed: int = 0,
        settings: Settings = DEFAULTS,
        *,
        harmonise: float = 0.0,
        seam_m: float = SEAM_M,
    ) -> None:
        """Puts a part of another scene into the one on show, and shows the result.

        Args:
            other: index of the scene that the part is from.
            side: one of `SIDES`, of the line at `at` metres, or `IN_THE_BOX`, of `box`.
            harmonise: share of the denoising steps that the seam walks; 0 joins alone, which needs no generator.

        Raises:
            UserInputError: if the two scenes are one, or cannot be joined there.
        """
        self._check(seed, settings, generator=harmonise > 0)
        if not 0 <= other < len(self.scenes) or other == self.current:
            raise UserInputError("Combining needs another scene than the one on show: sample one, and choose it.")
        entry, further = self.on_show, self.scenes[other]
        grid = entry.scene.grid
        if side == IN_THE_BOX:
            region = box_region(grid, self.cut(box))
        else:
            a, b = SIDES[side]
            region = half_plane_region(grid, a, b, (a + b) * at)

        def work(job: Job) -> str:
            what = "Combining"
            combined = combine_scenes([entry.scene, further.scene], [region], seam_m)
            if harmonise > 0:
                pipeline = self._pipeline()
                job.progress(PREPARED, what)
                with self.generator.with_solver(settings.solver):
                    combined = harmonise_seams(
                        pipeline,
                        combined,
                        [region],
                        seed,
                        strength=harmonise,
                        seam_m=seam_m,
                        num_inference_steps=settings.num_inference_steps,
                        source=self.generator.source or "",
                        temperatures=settings.temperatures,
                        callback_on_step_end=step_reporter(job, what, _stages(pipeline)[1:], PREPARED),
                    )
            name = f"{_stem(entry.name)}_with_{_stem(further.name)}"
            return self._add(StudioScene(name, combined, region=region), job)

        self.worker.start("Combining", work)

    def open_scene(self, folder: Path) -> None:
        """Adds a scene from a folder and shows it, if it is of the same box and renderer."""

        def work(job: Job) -> str:
            scene = load_scene(folder)
            require_joinable([self.scenes[0].scene, scene])
            return self._add(StudioScene(folder.resolve().name, scene, folder=folder), job)

        self.worker.start(f"Opening {folder}", work)

    def save(self) -> None:
        """Writes the scene on show as a folder, as `nfldm-sample` does; never over another one."""
        index, entry = self.current, self.on_show

        def work(job: Job) -> str:
            if entry.folder is not None:
                return f"It is kept already: {entry.folder}"
            require_writable(self.output_dir)
            folder = free_path(self.output_dir / entry.name)
            classes = () if self.map is None else self.map.classes
            drawn = None if entry.bev is None else bev_png(entry.bev, classes)
            cameras_of(entry.scene)
            job.check()
            write_edited_scene(folder, entry.scene, entry.region, drawn)
            with self._lock:
                self.scenes[index] = replace(entry, folder=folder)
            return f"Kept as {folder}"

        self.worker.start(f"Saving {entry.name}", work)

    def export(self, kind: str) -> None:
        """Writes the scene on show as one of `EXPORTS`; never over another file."""
        entry, (ending, write) = self.on_show, EXPORTS[kind]

        def work(job: Job) -> str:
            require_writable(self.output_dir)
            path = free_path(self.output_dir / f"{entry.name}_{ending}")
            write(entry.scene, job, path)
            return f"Written: {path}"

        self.worker.start(f"Exporting the {kind}", work)

    def take_picture(
        self,
        render: Callable[[], Float[Tensor, "height width 3"]],
        deliver: Callable[[str, bytes], None] = lambda name, content: None,
    ) -> None:
        """Writes what a camera sees as a PNG, and gives it to whoever asked.

        Args:
            render: gives colours in [0, 1].
            deliver: gets the file's name and content.
        """
        entry = self.on_show

        def work(job: Job) -> str:
            colours = render().mul(255).round().byte().cpu().numpy()
            job.check()
            buffer = io.BytesIO()
            Image.fromarray(colours).save(buffer, format="PNG")
            path = free_path(self.output_dir / f"{entry.name}_picture.png")
            with atomic_path(path) as temporary:
                temporary.write_bytes(buffer.getvalue())
            deliver(path.name, buffer.getvalue())
            return f"Written: {path}"

        self.worker.start("Taking a picture", work)

    def cut(self, box: Box) -> Box:
        """A box without what lies beside the scene."""
        x0, y0, x1, y1 = self.grid_box
        return (max(box[0], x0), max(box[1], y0), min(box[2], x1), min(box[3], y1))

    def _check(self, seed: int, settings: Settings, generator: bool = True) -> None:
        if generator and self.generator.why_not:
            raise UserInputError(self.generator.why_not)
        try:
            check_seed("The seed", seed, 1)
            if settings.num_inference_steps is not None:
                check_count("The number of steps", settings.num_inference_steps)
        except ValueError as error:
            raise UserInputError(f"{error}: give another number.") from None

    def _pipeline(self) -> NFLDMPipeline:
        """The generator, read."""
        return self.generator.read(self.on_show.scene)

    @property
    def map(self) -> DrawnMap | None:
        """The map that is drawn, empty at first; None as long as the generator is not read, or if it knows none."""
        with self._map_lock:  # whoever asks first makes it: the panel, or a job
            pipeline = self.generator.pipeline if self.generator.ready else None
            size = None if pipeline is None else pipeline.bev_size
            if self._map is None and pipeline is not None and size is not None:
                self._map = DrawnMap(pipeline.bev_classes, size, pipeline.scene_autoencoder.aabb.cpu().numpy())
            return self._map

    def _map_to_follow(self) -> UInt8[np.ndarray, "height width"] | None:
        drawn = self.map
        return drawn.cells.copy() if drawn is not None and self.follow_map else None

    def _add(self, entry: StudioScene, job: Job) -> str:
        """Adds a scene that is ready, and shows it; the last moment to cancel."""
        images = render_views(entry.scene, cameras_of(entry.scene)).images
        job.check()
        with self._lock:
            self.scenes.append(replace(entry, images=images))
            last = len(self.scenes) - 1
        self.choose(last)
        return f"{entry.name} is ready."


def _stages(pipeline: NFLDMPipeline) -> tuple[str, ...]:
    return STAGES if pipeline.fine_denoiser is not None else STAGES[:-1]


def _stem(name: str) -> str:
    """A name without what edits added to it, so that it does not grow with each."""
    return re.sub(r"_(box_\d+|with_.*)$", "", name)


def free_path(path: Path) -> Path:
    """The path itself if nothing is there, else with a number that makes it new."""
    number, free = 2, path
    while free.exists():
        free, number = path.with_name(f"{path.stem}_{number}{path.suffix}"), number + 1
    return free
