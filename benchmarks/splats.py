"""How much of what is rendered Gaussian splats keep: against real views of held-out places, and of worlds.

    make results NAME=splats ARGS="--data data/mazes --output-dir outputs/splats [--worlds outputs/world]"

Held-out places are encoded by stage 1 from their source views and exported as splats, not fitted and fitted. Of their
target views, which neither saw: PSNR to the real images of what is rendered and of the splats, and of the splats to
what is rendered. Splats of worlds are compared with renderings along a walk.

Writes `splats.json`, `splats.md` and `splats.png`: real views, rendered ones and splats of the first places.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from rich.progress import track
from torch import Tensor

from nfldm_ns.autoencoder.checkpoints import load_scene_autoencoder
from nfldm_ns.choice import evenly
from nfldm_ns.errors import UserInputError
from nfldm_ns.exports.splat_fitting import scene_splats
from nfldm_ns.exports.splat_renderer import splat_images
from nfldm_ns.exports.splats import Splats
from nfldm_ns.exports.worlds import world_splats
from nfldm_ns.generated.scene_files import GeneratedScene, renderer_of
from nfldm_ns.generated.world_files import load_world
from nfldm_ns.generated.world_paths import walk
from nfldm_ns.metrics.images import psnr
from nfldm_ns.models import resolve_model
from nfldm_ns.plugin.world_run import world_views
from nfldm_ns.reports.galleries import image_grid, write_png
from nfldm_ns.reports.report import Table
from nfldm_ns.scenes.collection import SceneCollection
from nfldm_ns.scenes.views import Views, index_cameras
from nfldm_ns.scenes.writing import require_writable, write_json
from shared.comparisons import use_threads
from shared.running import run, write_tables

KEYS = ("count", "rendered_to_real", "splats_to_real", "lost", "splats_to_rendered", "seconds")
COLUMNS = ("splats", "rendered to real (dB)", "splats to real (dB)", "lost (dB)", "splats to rendered (dB)", "s")
WALK_S, WALK_FPS, WORLD_SIZE = 8, 4, (96, 128)
PICTURED = 4


@dataclass
class Options:
    """Measure splats."""

    output_dir: Path
    """folder for the results"""
    data: Path | None = None
    """scene collection with held-out places"""
    model: Path = Path("vizdoom-stage1")
    """stage 1 that encodes them"""
    num_places: int = 8
    """held-out places"""
    worlds: tuple[Path, ...] = ()
    """folders of worlds"""
    fit_steps: tuple[int, ...] = (0, 400)
    """of the splats of a place"""
    world_fit_steps: tuple[int, ...] = (0,)
    """of those of a world"""
    threads: int = 1
    """CPU threads"""
    seed: int = 0
    """of fitting"""

    def check(self) -> None:
        use_threads(self.threads)
        if self.data is None and not self.worlds:
            raise UserInputError("Nothing is to be measured: give --data or --worlds.")
        if self.num_places < 1 or min(*self.fit_steps, *self.world_fit_steps) < 0:
            raise UserInputError("--num-places must be at least 1 and fitting steps at least 0: give larger numbers.")


def timed(make: Callable[[], Splats]) -> tuple[Splats, dict[str, float]]:
    """Splats, how many they are and the CPU seconds that they took."""
    begun = time.process_time()
    splats = make()
    return splats, {"count": len(splats.positions), "seconds": time.process_time() - begun}


def against(images: Tensor, rendered: Tensor, real: Tensor | None = None) -> dict[str, float]:
    """PSNR of splats' images, means over views."""
    found = {"splats_to_rendered": float(psnr(images, rendered).mean())}
    if real is not None:
        found["rendered_to_real"] = float(psnr(rendered, real).mean())
        found["splats_to_real"] = float(psnr(images, real).mean())
        found["lost"] = found["rendered_to_real"] - found["splats_to_real"]
    return found


def measure_places(options: Options) -> tuple[dict[str, list[dict[str, float]]], dict[str, list[Tensor]]]:
    """A row for each number of steps and place, and the first target view of each place as pictures."""
    collection = SceneCollection.open(options.data)
    autoencoder = load_scene_autoencoder(resolve_model(options.model)).eval().requires_grad_(False)
    rows: dict[str, list[dict[str, float]]] = {}
    pictures: dict[str, list[Tensor]] = {}
    for scene_id in track(evenly(collection.splits["test"], options.num_places), "Places"):
        place = collection.load_scene(scene_id)
        with torch.no_grad():
            grid = autoencoder.encode(Views.stack([place.source]))
            targets = index_cameras(place.target.cameras, None)
            rendered = autoencoder.render(grid, targets).rgb[0].clamp(0, 1)
        scene = GeneratedScene(grid, renderer_of(autoencoder), place.source.cameras)
        shown = {"real": place.target.images, "rendered": rendered}
        for steps in options.fit_steps:
            splats, row = timed(lambda scene=scene, n=steps: scene_splats(scene, fit_steps=n, seed=options.seed))
            images = splat_images(splats, place.target.cameras)
            rows.setdefault(f"places, {steps} steps", []).append(row | against(images, rendered, place.target.images))
            shown[f"splats, {steps} steps"] = images
        for name, images in shown.items():
            pictures.setdefault(name, []).append(images[0])
    return rows, pictures


def measure_worlds(options: Options) -> dict[str, list[dict[str, float]]]:
    """A row for each number of steps and world."""
    rows: dict[str, list[dict[str, float]]] = {}
    for folder in options.worlds:
        world = load_world(folder)
        views = world_views(world, walk(world, WALK_S, WALK_FPS, WORLD_SIZE))
        for steps in options.world_fit_steps:
            splats, row = timed(lambda world=world, n=steps: world_splats(world, fit_steps=n, seed=options.seed))
            row |= against(splat_images(splats, views.cameras), views.images)
            rows.setdefault(f"worlds, {steps} steps", []).append(row)
    return rows


def main(options: Options) -> None:
    options.check()
    require_writable(options.output_dir)
    rows, pictures = measure_places(options) if options.data else ({}, {})
    rows |= measure_worlds(options)
    means = {
        name: {key: sum(row[key] for row in found) / len(found) for key in found[0]} for name, found in rows.items()
    }
    write_json(options.output_dir / "splats.json", {"means": means, "rows": rows})
    if pictures:
        first = {name: torch.stack(images[:PICTURED]) for name, images in pictures.items()}
        write_png(options.output_dir / "splats.png", image_grid(first))
    cells = [[name, *(row.get(key) for key in KEYS)] for name, row in means.items()]
    caption = f"Means of {options.num_places} places and {len(options.worlds)} worlds."
    write_tables(
        options.output_dir / "splats.md", [Table(("", *COLUMNS), cells, caption, digits=(0, 0, 2, 2, 2, 2, 1))]
    )


if __name__ == "__main__":
    run(main, Options, __doc__)
