"""`index.html`: what the demo made, on one self-contained page."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from nerfstudio.cameras.cameras import Cameras
from torch import Tensor

from nfldm_ns.autoencoder.checkpoints import load_scene_autoencoder
from nfldm_ns.autoencoder.scene_autoencoder import SceneAutoencoder
from nfldm_ns.choice import evenly
from nfldm_ns.demo.console import clock
from nfldm_ns.demo.folder import DemoFolder
from nfldm_ns.demo.runner import Report as Progress
from nfldm_ns.demo.settings import DemoSettings
from nfldm_ns.generated.cameras import fly_through
from nfldm_ns.generated.scene_files import load_generated_scene
from nfldm_ns.latents.latent_autoencoder import LatentAutoencoder, load_latent_autoencoder
from nfldm_ns.latents.round_trip import round_trip_variants
from nfldm_ns.metrics.images import nearest_source_view
from nfldm_ns.models import GENERATOR
from nfldm_ns.plugin.generated_run import render_views
from nfldm_ns.reports.galleries import bev_colors, density_from_above, depth_colors, encode_video, image_grid
from nfldm_ns.reports.report import Curves, Gallery, Picture, Plots, Report, Section, Table, Video, Wide
from nfldm_ns.scenes.collection import SceneCollection
from nfldm_ns.scenes.views import index_cameras
from nfldm_ns.scenes.voxel_grid import VoxelGrid
from nfldm_ns.training.run import read_metrics

PAGE = "index.html"
REAL_SCENES = 6
HELD_OUT_SCENES = 4
VIEWS_OF_REAL_SCENES = 4
VIEWS_OF_SAMPLES = 5
TILE = 160
FRAMES_PER_SECOND = 16.0
NEAREST, FARTHEST = 0.5, 12.0
"""Range of depth that is shown in colours, in metres."""

Image = Float[Tensor, "3 height width"]


def write_page(folder: DemoFolder, sections: Sequence[Section], summary: Mapping[str, Any]) -> None:
    """Writes the page.

    Args:
        sections: of pictures, from `picture_sections`.
        summary: the content of `report.json`.
    """
    generated, shipped, data, held_out = sections
    parts = [generated, shipped, numbers(summary), held_out, data, curves(folder), cost(summary), next_steps(folder)]
    page = Report("NeuralField-LDM: scenes that never were", introduction(summary), parts, footer(summary))
    page.write(folder.root / PAGE)


# Text and numbers


def introduction(summary: Mapping[str, Any]) -> str:
    """What was done, and what came out."""
    data, samples = summary["data"], summary["samples"]
    scenes, (width, height) = data["scenes"], data["image_size"]
    return (
        f"`nfldm-demo` made this page in {summary['total_seconds'] / 60:.0f} minutes on {_machine(summary)}. It "
        f"collected {scenes['train']} training places and {scenes['test']} held-out places of "
        f"{', '.join(data['maps'])} (VizDoom), trained the three stages of NeuralField-LDM on them from scratch, and "
        "sampled new scenes: grids of densities and features that can be seen from anywhere.\n\n"
        f"Nothing is selected: the generated scenes are the first ones of seed {summary['seed']}, the real ones are "
        f"evenly spaced in the collection. Views have {width} x {height} pixels and are shown enlarged. FID of the "
        f"generated views {samples['fid']:.0f}, of the mean image {samples['mean_image_fid']:.0f}, of real views of "
        f"other places {samples['train_vs_test_fid']:.0f} ({samples['num_images']} images each, lower is better)."
    )


def numbers(summary: Mapping[str, Any]) -> Section:
    """All numbers of quality, beside their baselines."""
    stage1, stage2, samples = summary["stage1"], summary["stage2"], summary["samples"]
    keys = ("psnr", "ssim", "lpips", "depth_mae_m", "depth_mae_all_m")

    def row(name: str, values: Mapping[str, Any]) -> list[Any]:
        return [name, *(values.get(key) for key in keys)]

    novel_views = Table(
        ["method", "PSNR (dB)", "SSIM", "LPIPS", "depth error in the box (m)", "depth error, all (m)"],
        [
            row("stage 1: encode, render", stage1),
            row("stage 2: the same through the latents", stage2),
            row("stage 2 without f", {"psnr": stage2.get("psnr_without_fine")}),
            row("stage 2 without c", {"psnr": stage2.get("psnr_without_coarse")}),
            row("stage 2 without g", {"psnr": stage2.get("psnr_without_global")}),
            row("stage 2, c and f not quantised", {"psnr": stage2.get("psnr_not_quantised")}),
            row("nearest source view", stage1["nearest_view"]),
            row("mean training image", stage1["mean_image"]),
        ],
        caption=f"Novel views of held-out places ({stage1['num_images']} views of {stage1['num_scenes']} places). "
        "PSNR and SSIM: higher is better; LPIPS (VGG) and depth error: lower is better.",
        emphasis=(0, 1),
        digits=(0, 2, 3, 3, 2, 2),
    )
    sets = [
        ("generated scenes", samples["fid"], samples["kid"]),
        ("stage 2 reconstructions", samples["stage2_fid"], samples["stage2_kid"]),
        ("stage 1 reconstructions", samples["stage1_fid"], samples["stage1_kid"]),
        ("mean training image", samples["mean_image_fid"], samples["mean_image_kid"]),
        ("real views of training places", samples["train_vs_test_fid"], samples["train_vs_test_kid"]),
    ]
    distances = Table(
        ["set of images", "FID", "KID x 1000"],
        [[name, fid, 1000 * kid] for name, fid, kid in sets],
        caption=f"Distance to real views of held-out places, {samples['num_images']} images in each set (FID depends "
        "on that number: compare within the table only). Lower is better; the last row is what real views reach.",
        emphasis=(0,),
        digits=(0, 1, 1),
    )
    text = "The baselines say what the numbers are worth: in a domain of similar images even trivial answers score."
    return Section("Numbers", text, [novel_views, distances])


def cost(summary: Mapping[str, Any]) -> Section:
    """What each stage took, and on what."""
    rows = [[name, clock(c["seconds"]), c["peak_rss_gib"]] for name, c in summary["stages"].items()]
    table = Table(
        ["stage", "time (min:s)", "peak memory (GiB)"],
        [*rows, ["all", clock(summary["total_seconds"]), summary["peak_rss_gib"]]],
        caption="Wall time, and the largest resident memory of the process and its children.",
        emphasis=(len(rows),),
        digits=2,
    )
    return Section("What it cost", f"On {_machine(summary)}.", [table])


def next_steps(folder: DemoFolder) -> Section:
    """What to do with the results."""
    scene = next(iter(sorted(folder.generated.glob("scene_*"))), folder.generated / "scene_000000") / "config.yml"
    generator = folder.model if folder.model.is_dir() else folder.stage3 / "pipeline"
    text = "\n\n".join(
        (
            f"Every generated scene is a nerfstudio run. Walk through one: `ns-viewer --load-config {scene}`",
            f"Render a video: `ns-render interpolate --load-config {scene} --output-path video.mp4`",
            f"Sample more: `nfldm-sample {generator} --num-scenes 16 --seed 100`, or, from the model "
            "that comes with the package, `nfldm-sample --num-scenes 16`",
            f"See any place as stage 1 does: `ns-viewer --load-config {folder.stage1 / 'config.yml'}`",
            "All numbers are in `report.json` beside this page, with what each of them means.",
        )
    )
    return Section("Go on from here", text)


def footer(summary: Mapping[str, Any]) -> str:
    versions = ", ".join(f"{name} {version}" for name, version in summary["versions"].items())
    data = summary["data"]
    length = summary["length"]
    shortened = f" Trainings had {length:.0%} of the preset's steps." if length < 1 else ""
    return f"Seed {summary['seed']}.{shortened} {versions}. Data: {data['name']}, {data['licence']}."


def _machine(summary: Mapping[str, Any]) -> str:
    device = summary["device"]
    cores = f"{device['cores']} cores of {device['processor']}"
    return f"{device['gpu']} ({cores})" if device.get("used") == "cuda" else cores


# Curves


def curves(folder: DemoFolder) -> Section:
    """Losses of all trainings."""
    plots = [
        Curves(series, title=title, log_y=True)
        for title, series in (
            ("Stage 1: scene auto-encoder", scene_autoencoder_losses(folder.stage1)),
            ("Stage 2: latent auto-encoder", run_losses(folder.stage2)),
            ("Stage 3: denoisers", denoiser_losses(folder.stage3)),
        )
        if series
    ]
    return Section(
        "Losses", "Weighted losses over training steps; long curves are shown with their running mean.", [Plots(plots)]
    )


Series = dict[str, tuple[list[float], list[float]]]


def scene_autoencoder_losses(run: Path) -> Series:
    """Training losses that nerfstudio wrote for TensorBoard, by name."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(run), size_guidance={"scalars": 0})
    events.Reload()
    series: Series = {}
    for tag in sorted(events.Tags()["scalars"]):
        if "loss" in tag.lower() and "eval" not in tag.lower():
            points = sorted({event.step: event.value for event in events.Scalars(tag)}.items())
            series[_loss_name(tag.rsplit("/", 1)[-1])] = ([s for s, _ in points], [v for _, v in points])
    return _positive(series)


def run_losses(run: Path) -> Series:
    """Losses of a run of stage 2 or 3, by name."""
    lines = read_metrics(run)
    names = [name for name in (lines[-1] if lines else {}) if name == "loss" or name.endswith("_loss")]
    return _positive(
        {
            _loss_name(name): (
                [line["step"] for line in lines if name in line],
                [line[name] for line in lines if name in line],
            )
            for name in names
        }
    )


def denoiser_losses(folder: Path) -> Series:
    """The loss of each denoiser."""
    found = {name: run_losses(folder / name) for name in ("global", "coarse", "fine")}
    letters = {"global": "g", "coarse": "c", "fine": "f"}
    return {letters[name]: next(iter(series.values())) for name, series in found.items() if series}


def _loss_name(name: str) -> str:
    return "all" if name == "Train Loss" else name.removesuffix("_loss").replace("_", " ")


def _positive(series: Series) -> Series:
    """What a logarithmic axis can show."""
    return {name: (x, y) for name, (x, y) in series.items() if any(value > 0 for value in y)}


# Pictures


@torch.no_grad()
def picture_sections(folder: DemoFolder, settings: DemoSettings, progress: Progress) -> list[Section]:
    """Sections of generated scenes (own, shipped), of the data, and of held-out scenes before and after each stage."""
    collection = SceneCollection.open(folder.data)
    scene_autoencoder = load_scene_autoencoder(folder.stage1)
    latent_autoencoder = load_latent_autoencoder(folder.stage2)
    data = data_section(collection)
    progress(0.1, "pictures of held-out places")
    held_out = held_out_section(collection, scene_autoencoder, latent_autoencoder, settings.video_frames)
    progress(0.4, "fly-throughs of generated scenes")
    own, shipped = (sorted(path.glob("scene_*")) for path in (folder.generated, folder.shipped))
    looks = []
    for path in (*own, *shipped):
        looks.append(look_at_sample(path, settings.video_frames))
        progress(0.4 + 0.5 * len(looks) / len(own + shipped), "fly-throughs of generated scenes")
    return [generated_section(looks[: len(own)]), shipped_section(looks[len(own) :]), data, held_out]


@dataclass
class SampleLook:
    """Pictures of one generated scene."""

    name: str
    video: bytes
    views: list[Image]
    depths: list[Image]
    above: Image


def look_at_sample(folder: Path, num_frames: int) -> SampleLook:
    """Renders a generated scene from its folder."""
    scene = load_generated_scene(folder)
    assert scene.cameras is not None
    path = render_views(scene, fly_through(scene.cameras, num_frames))
    assert path.depths is not None
    colors = depth_colors(path.depths, NEAREST, FARTHEST)
    chosen = evenly(range(num_frames), VIEWS_OF_SAMPLES)
    video = encode_video(_beside(smooth(path.images), smooth(colors)), FRAMES_PER_SECOND)
    return SampleLook(
        f"seed {scene.provenance.get('seed', '?')}",
        video,
        list(smooth(path.images[chosen])),
        list(smooth(colors[chosen])),
        density_from_above(scene.grid)[0],
    )


def generated_section(looks: Sequence[SampleLook]) -> Section:
    """Scenes of the model that was just trained."""
    text = (
        "Sampled from noise: first g with the cameras, then c (coarse structure), then f (detail). Below, each row is "
        f"one scene: views all around, depth ({NEAREST:g} m blue to {FARTHEST:g} m red), and its voxels from above "
        "(north up; dark is low, bright is high, white is empty)."
    )
    return Section("Generated scenes", text, _pictures_of(looks))


def shipped_section(looks: Sequence[SampleLook]) -> Section:
    """Scenes of the model that comes with the package."""
    text = (
        f"`{GENERATOR}` comes with this package: the same method, trained for hours on rooms of made-up mazes. This "
        "is what `nfldm-sample` shows without any training; nothing is selected here either."
    )
    return Section("From the model that comes with the package", text, _pictures_of(looks))


def _pictures_of(looks: Sequence[SampleLook]) -> list[Any]:
    """Videos, then views, depth and a plan of each generated scene."""
    videos = [Video(look.video, f"{look.name}: turning around once; right: depth") for look in looks]
    columns: dict[str, list[Image]] = {}
    for i in range(VIEWS_OF_SAMPLES):
        columns[f"{round(360 * i / VIEWS_OF_SAMPLES)}°"] = [look.views[i] for look in looks]
    columns["depth at 0°"] = [look.depths[0] for look in looks]
    columns["from above"] = [look.above for look in looks]
    return [Gallery(videos, tile_width=250), _grid(columns, [look.name for look in looks])]


def data_section(collection: SceneCollection) -> Section:
    """Real places, evenly spaced in the training split."""
    scenes = [collection.load_scene(i) for i in evenly(collection.split("train"), REAL_SCENES)]
    columns: dict[str, list[Image]] = {}
    num_views = min(VIEWS_OF_REAL_SCENES, *(scene.source.shape[0] for scene in scenes))
    for i in range(num_views):
        columns[f"source {i + 1}"] = [
            smooth(scene.source.images[evenly(range(scene.source.shape[0]), num_views)[i]]) for scene in scenes
        ]
    columns["target"] = [smooth(scene.target.images[0]) for scene in scenes]
    depths = [scene.target.depths[0] for scene in scenes if scene.target.depths is not None]
    if len(depths) == len(scenes):
        columns["its depth"] = [smooth(depth_colors(depth, NEAREST, FARTHEST)) for depth in depths]
    maps = [scene.bev for scene in scenes if scene.bev is not None]
    if len(maps) == len(scenes):
        columns["BEV map"] = [bev_colors(bev, collection.bev_classes) for bev in maps]
    classes = ", ".join(f"{c.name}" for c in collection.bev_classes)
    text = (
        "What the models learn from: 8 source views around a place, target views from other positions nearby, exact "
        "depth, and a semantic bird's-eye-view map"
        + (f" (classes: {classes})" if classes else "")
        + ". Held-out places lie further from all training places than the box is wide."
    )
    return Section("The data", text, [_grid(columns)])


def held_out_section(
    collection: SceneCollection,
    scene_autoencoder: SceneAutoencoder,
    latent_autoencoder: LatentAutoencoder,
    num_frames: int,
) -> Section:
    """Held-out places: real, nearest source view, stage 1, after the latents, and without f."""
    columns: dict[str, list[Image]] = {}
    videos: list[Video] = []
    labels: list[str] = []

    def add(name: str, image: Image) -> None:
        columns.setdefault(name, []).append(smooth(image))

    for number, scene_id in enumerate(evenly(collection.split("test"), HELD_OUT_SCENES)):
        scene = collection.load_scene(scene_id)
        batch = collection.batch([scene])
        grids = round_trip_variants(latent_autoencoder, scene_autoencoder.encode(batch.source))
        renders = {name: scene_autoencoder.render(grid, batch.target.cameras) for name, grid in grids.items()}
        nearest = nearest_source_view(batch)[0]
        for view in evenly(range(scene.target.shape[0]), 2):
            labels.append(f"place {number + 1}")
            add("real", scene.target.images[view])
            add("nearest source", nearest[view])
            for name, title in (("stage1", "stage 1"), ("stage2", "after latents"), ("without_fine", "without f")):
                add(title, renders[name].rgb[0, view].clamp(0, 1))
            if scene.target.depths is not None:
                add("real depth", depth_colors(scene.target.depths[view], NEAREST, FARTHEST))
            for name, title in (("stage1", "stage 1"), ("stage2", "latents")):
                add(f"depth {title}", depth_colors(renders[name].depth[0, view], NEAREST, FARTHEST))
        videos += _reconstruction_videos(scene_autoencoder, grids, batch.source.cameras, number, num_frames)[
            : 2 - len(videos)
        ]
    text = (
        "Places that no stage was trained on, from positions that no source view has. Stage 1 encodes the 8 source "
        "views into voxels and renders the target view; `after latents` sends the voxels through g, c and f first; "
        "`without f` zeroes the fine latent."
    )
    return Section(
        "Held-out places, reconstructed", text, [_grid(columns, labels, tile=112), Gallery(videos, tile_width=360)]
    )


def _reconstruction_videos(
    scene_autoencoder: SceneAutoencoder, grids: Mapping[str, VoxelGrid], cameras: Cameras, number: int, num_frames: int
) -> list[Video]:
    """A fly-through of stage 1 beside the one after the latents."""
    path = fly_through(index_cameras(cameras, 0), num_frames)
    both = []
    for name in ("stage1", "stage2"):
        frames = [
            scene_autoencoder.render(grids[name], index_cameras(path, (None, slice(i, i + 8)))).rgb[0].clamp(0, 1)
            for i in range(0, num_frames, 8)
        ]
        both.append(smooth(torch.cat(frames)))
    return [
        Video(encode_video(_beside(*both), FRAMES_PER_SECOND), f"place {number + 1}: stage 1, and after the latents")
    ]


def smooth(images: Float[Tensor, "*batch 3 height width"]) -> Float[Tensor, "*batch 3 larger_height larger_width"]:
    """Images enlarged without visible pixels."""
    flat = images.reshape(-1, *images.shape[-3:])
    factor = max(1, -(-TILE // flat.shape[-1]))
    larger = F.interpolate(flat, scale_factor=factor, mode="bicubic", align_corners=False).clamp(0, 1)
    return larger.reshape(*images.shape[:-2], *larger.shape[-2:])


def _beside(left: Float[Tensor, "n 3 height width"], right: Float[Tensor, "n 3 height width"]) -> Tensor:
    return torch.cat([left, right], dim=-1)


def _grid(columns: Mapping[str, Sequence[Image]], row_labels: Sequence[str] = (), tile: int = TILE) -> Wide:
    return Wide(Picture(image_grid(columns, row_labels, tile), alt=f"Rows of {', '.join(columns)}"))
