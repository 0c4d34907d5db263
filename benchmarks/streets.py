"""How well streets are held by each stage, how sampled ones follow their maps, and what they look like all around.

    python benchmarks/streets.py --data data/streets --output-dir OUT --stage1 RUN [--latent-autoencoder RUN]
    python benchmarks/streets.py --data data/streets --output-dir OUT --pipeline outputs/street_model/pipeline

Of held-out scenes, evenly chosen and not selected:

- novel views after stage 1, and after the latents where there are any, beside the nearest source view and the mean of
  the source views' colours; and by what light a scene has: the colour of its sky;
- maps: IoU of free ground and of buildings as level rays from the origin find them above the cars, in V and in the
  map (`nfldm_ns.metrics.layout`), beside the same with all other maps; with a pipeline also in scenes sampled with the
  maps. Columns from the first tree on are not judged: crowns begin at any height;
- `panoramas.png`: the six source cameras, real, after each stage, and of the scene sampled with its map. Stage 1 sees
  these views. `drive.png`: views ahead, from places along the street, where no camera was.

Writes `streets.json` and `streets.md` beside them. Needs the weights of LPIPS (`nfldm-weights get lpips-vgg`).
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from editing import compare_with_maps, way
from jaxtyping import Float
from nerfstudio.cameras.cameras import Cameras
from torch import Tensor

from nfldm_ns.autoencoder.checkpoints import load_scene_autoencoder
from nfldm_ns.autoencoder.scene_autoencoder import SceneAutoencoder
from nfldm_ns.collect.contact_sheet import colour_bev, image_grid, panorama_order, to_uint8
from nfldm_ns.diffusion.pipeline import NFLDMPipeline, load_pipeline, scene_generators
from nfldm_ns.errors import UserInputError
from nfldm_ns.generated.cameras import look_along
from nfldm_ns.latents.latent_autoencoder import LatentAutoencoder, load_latent_autoencoder
from nfldm_ns.metrics.images import ImageMetrics, nearest_source_view
from nfldm_ns.metrics.layout import Layout, LayoutSettings, map_layout, voxel_layout
from nfldm_ns.pretrained.weights import load_lpips
from nfldm_ns.reports.galleries import write_png
from nfldm_ns.reports.report import Table
from nfldm_ns.scenes.collection import SceneCollection
from nfldm_ns.scenes.views import SceneBatch, index_cameras, make_cameras, view_yaws
from nfldm_ns.scenes.voxel_grid import VoxelGrid
from nfldm_ns.scenes.writing import require_writable, write_json
from shared.comparisons import use_threads
from shared.edited_views import Maps, takes_maps
from shared.running import run, write_tables

STAGE1, STAGE2, SAMPLED = "stage 1", "after the latents", "sampled with the map"
NEAREST, MEAN = "nearest source view", "mean colour of the source views"
STREET_LAYOUT = LayoutSettings(
    radius_m=35.0, wall_m=2.5, floor_z=-1.8, band_m=(2.0, 4.0), solid=("building",), unknown=("vegetation",)
)
"""Above cars, below the roofs of single-storey houses; walls as thick as a voxel and a half."""
DRIVE_M = (-12.0, -8.0, -4.0, 0.0, 4.0, 8.0, 12.0)
SKY_ROWS = 8  # of a picture, from the top


@dataclass(kw_only=True)
class Options:
    """Measure the stages of a model of streets."""

    data: Path
    """the collection it was trained on"""
    output_dir: Path
    pipeline: Path | None = None
    """the pipeline folder of nfldm-train-diffusion --condition bev, which has all stages"""
    stage1: Path | None = None
    """without a pipeline: a run of stage 1"""
    latent_autoencoder: Path | None = None
    """likewise a run of nfldm-train-latent-ae"""
    num_scenes: int = 24
    """held-out scenes"""
    num_shown: int = 8
    """of these, in the pictures"""
    num_inference_steps: int = 30
    """denoising steps of each latent"""
    guidance_scale: float = 1.0
    seed: int = 0
    """of the scene that is sampled for the first map; further ones count up"""
    layout: LayoutSettings = field(default_factory=lambda: STREET_LAYOUT)
    """how maps and scenes are compared"""
    threads: int = 1
    """CPU threads"""


@dataclass
class Model:
    """What there is of the stages."""

    stage1: SceneAutoencoder
    latents: LatentAutoencoder | None = None
    pipeline: NFLDMPipeline | None = None

    @staticmethod
    def load(options: Options) -> Model:
        """The model that the options name.

        Raises:
            UserInputError: if they name none, or one that does not take maps.
        """
        if options.pipeline is not None:
            pipeline = load_pipeline(options.pipeline)
            if not takes_maps(pipeline):
                raise UserInputError(f"{options.pipeline} does not take maps: train it with --condition bev.")
            pipeline.set_progress_bar_config(disable=True)
            return Model(pipeline.scene_autoencoder, pipeline.latent_autoencoder, pipeline)
        if options.stage1 is None:
            raise UserInputError("Give a trained model: --pipeline, or --stage1.")
        folder = options.latent_autoencoder
        return Model(
            load_scene_autoencoder(options.stage1), None if folder is None else load_latent_autoencoder(folder)
        )

    @torch.no_grad()
    def grids(self, batch: SceneBatch, bev: Any, seed: int, options: Options) -> dict[str, VoxelGrid]:
        """V of one scene by stage."""
        found = {STAGE1: self.stage1.encode(batch.source)}
        if self.latents is not None:
            found[STAGE2] = self.latents.decode(self.latents.encode(found[STAGE1]))
        if self.pipeline is not None:
            output = self.pipeline(
                1,
                scene_generators(seed, 1),
                num_inference_steps=options.num_inference_steps,
                bev=torch.tensor(bev).long()[None],
                guidance_scale=options.guidance_scale,
            )
            assert output.grids is not None
            found[SAMPLED] = output.grids
        return found


# Numbers


class Judge:
    """Collects what the tables say."""

    def __init__(self, settings: LayoutSettings) -> None:
        self._settings = settings
        self._lpips = load_lpips()
        self._views: dict[str, ImageMetrics] = {}
        self._skies: dict[str, dict[str, list[float]]] = {}
        self._layouts: dict[str, list[Layout]] = {}

    def add_views(self, batch: SceneBatch, images: dict[str, Float[Tensor, "1 views 3 h w"]], light: str) -> None:
        """Target views of one scene, by what gave them."""
        real = batch.target.images
        mean = batch.source.images.mean(dim=(1, 3, 4), keepdim=True).expand_as(real)
        for name, views in {NEAREST: nearest_source_view(batch), MEAN: mean, **images}.items():
            self._views.setdefault(name, ImageMetrics(self._lpips)).update(views, real, batch.target.masks)
        for name, views in images.items():
            skies = [one[..., :SKY_ROWS, :].mean(dim=(0, 1, 3, 4)) for one in (views, real)]
            error = float((skies[0] - skies[1]).abs().mean())
            self._skies.setdefault(light, {}).setdefault(name, []).append(255 * error)

    def add_layout(self, name: str, grid: VoxelGrid) -> None:
        self._layouts.setdefault(name, []).append(voxel_layout(grid, self._settings))

    def results(self, given: Layout) -> dict[str, Any]:
        """All numbers; `given` are the maps' layouts."""
        skies = {
            light: {name: sum(v) / len(v) for name, v in found.items()} | {"scenes": len(next(iter(found.values())))}
            for light, found in sorted(self._skies.items())
        }
        maps = {name: compare_with_maps(Layout.cat(found), given) for name, found in self._layouts.items()}
        views = {name: judge.compute() for name, judge in self._views.items()}
        return {"views": views, "skies": skies, "maps": maps, "layout": asdict(self._settings)}


def tables(found: dict[str, Any], num_scenes: int) -> list[Table]:
    """Of `Judge.results`."""
    views = [[name, *(values[key] for key in ("psnr", "ssim", "lpips"))] for name, values in found["views"].items()]
    names = [name for name in (STAGE1, STAGE2) if name in found["views"]]
    skies = [[light, values["scenes"], *(values[name] for name in names)] for light, values in found["skies"].items()]
    keys = [f"{a}{kind}{b}" for kind in ("floor", "wall") for a, b in (("", ""), ("", "_error"), ("shuffled_", ""))]
    maps: list[list[Any]] = [[name, *(values[key] for key in keys)] for name, values in found["maps"].items()]
    if SAMPLED in found["maps"]:
        share = way(found["maps"][SAMPLED], found["maps"][STAGE2])
        maps.append(["on the way from shuffled to real", share["floor"], None, None, share["wall"], None, None])
    low, high = found["layout"]["band_m"]
    return [
        Table(
            ["", "PSNR (dB)", "SSIM", "LPIPS (VGG)"],
            views,
            f"Target views of {num_scenes} held-out scenes.",
            digits=(0, 2, 3, 3),
        ),
        Table(["light", "scenes", *names], skies, "Error of the sky's mean colour, of 255.", digits=1),
        Table(
            ["", "free", "standard error", "other maps", "buildings", "standard error", "other maps"],
            maps,
            f"IoU of what level rays {low:g} to {high:g} m above the ground find within "
            f"{found['layout']['radius_m']:g} m of the origin and what the map has there. Higher is better.",
        ),
    ]


# Pictures


def drive_cameras(cameras: Cameras) -> Cameras:
    """Level cameras that look ahead, along the direction of the first of a scene's cameras, at places along it."""
    yaw = view_yaws(cameras)[:1].expand(len(DRIVE_M))
    along = torch.tensor(DRIVE_M)[:, None] * torch.stack([yaw.cos(), yaw.sin(), torch.zeros_like(yaw)], dim=-1)
    first = cameras[0]
    fx, fy, cx, cy = (float(v) for v in (first.fx, first.fy, first.cx, first.cy))
    poses = look_along(along, yaw, torch.zeros_like(yaw))
    return make_cameras(poses, fx, fy, cx, cy, int(first.height.item()), int(first.width.item()))


class Pictures:
    """Rows of the two sheets."""

    def __init__(self, model: Model, collection: SceneCollection) -> None:
        self._model, self._collection = model, collection
        self._panoramas: list[list[Any]] = []
        self._labels: list[str] = []
        self._drives: list[list[Any]] = []
        self._drive_labels: list[str] = []

    def _look(self, grid: VoxelGrid, cameras: Cameras) -> list[Any]:
        with torch.no_grad():
            views = self._model.stage1.render(grid, index_cameras(cameras, None)).rgb[0]
        return [to_uint8(view.numpy()) for view in views]

    def add(self, batch: SceneBatch, bev: Any, grids: dict[str, VoxelGrid]) -> None:
        """Of one scene."""
        source, drawn = batch.source[0], colour_bev(bev, self._collection.bev_classes)
        order = panorama_order(source.cameras)
        rows = {"real": [to_uint8(image.numpy()) for image in source.images]}
        rows |= {name: self._look(grid, source.cameras) for name, grid in grids.items()}
        for name, row in rows.items():
            self._panoramas.append([*(row[k] for k in order), *([drawn] if name == "real" else [])])
            self._labels.append(f"{batch.scene_ids[0]}\n{name}" if name == "real" else name)
        for name, grid in grids.items():
            self._drives.append(self._look(grid, drive_cameras(source.cameras)))
            self._drive_labels.append(f"{batch.scene_ids[0]}\n{name}")

    def write(self, folder: Path) -> None:
        places = [f"{metres:+g} m" for metres in DRIVE_M]
        for name, sheet in (
            ("panoramas.png", image_grid(self._panoramas, self._labels)),
            ("drive.png", image_grid(self._drives, self._drive_labels, places)),
        ):
            write_png(folder / name, sheet)


def main(options: Options) -> None:
    use_threads(options.threads)
    require_writable(options.output_dir)
    collection = SceneCollection.open(options.data)
    model = Model.load(options)
    maps = Maps.of(collection, options.num_scenes)
    shape = (model.stage1.grid_shape[1], model.stage1.grid_shape[2])
    given = map_layout(maps.bev, collection.bev_classes, shape, model.stage1.aabb, options.layout)
    judge, pictures = Judge(options.layout), Pictures(model, collection)
    every = max(1, len(maps.scene_ids) // options.num_shown)
    for i, scene_id in enumerate(maps.scene_ids):
        batch = collection.batch([collection.load_scene(scene_id)])
        grids = model.grids(batch, maps.bev[i], options.seed + i, options)
        with torch.no_grad():
            seen = {k: model.stage1.render(g, batch.target.cameras).rgb for k, g in grids.items() if k != SAMPLED}
        judge.add_views(batch, seen, str(collection.places[scene_id].get("light", "any")))
        for name, grid in grids.items():
            judge.add_layout(name, grid)
        if i % every == 0 and i // every < options.num_shown:
            pictures.add(batch, maps.bev[i], grids)
        print(f"scenes: {i + 1} of {len(maps.scene_ids)}", flush=True)
    pictures.write(options.output_dir)
    found = judge.results(given)
    write_json(options.output_dir / "streets.json", found)
    write_tables(options.output_dir / "streets.md", tables(found, len(maps.scene_ids)))


if __name__ == "__main__":
    run(main, Options, __doc__)
