"""What refining generated scenes changes: pictures, geometry, agreement of views, and what it costs.

    python benchmarks/refining.py --prior PRIOR --data DATA --output-dir OUT [--num-scenes 32] [--styles A B C]
    ... --guidances none negative --objectives sds csd multistep --priors vizdoom-prior outputs/observing

Samples scenes, and refines each with each of `--guidances`, `--objectives`, `--annealings`, `--priors` and `--lights`,
with the steps, learning rates and draws of `ns-train nfldm-refine` and the same seed; all its options can be
given. Prints for the scenes as they began and for each way

- FID and KID to real views of the test split: of cameras of the scenes' own trajectories, and of cameras drawn where
  refining looks, too (the same ones before and after). The relative change of KID stands beside its standard error (a
  jackknife over ten groups of scenes).
- geometry: distance of the depths of rendered views to those of the test split, change of depth, density that floats.
- agreement of views: colours of neighbours on a fly-through, one moved into the other by depth (`reprojection_error`),
  beside their difference without being moved. Sharper views differ more by either.
- seconds of 100 steps, and peak memory.

Leaves `refining.json`, `before_and_after_<way>.png` (of the first scenes, whatever they look like) and, with
`--styles`, `styles.png` of one scene. What they are made from is kept, too: an interrupted run continues, and more
guidances, objectives, priors, lights or styles add to it. Needs the weights of FID's Inception and of LPIPS
(`nfldm-weights get fid-inception`, `lpips-vgg`).
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from itertools import product
from pathlib import Path
from typing import Any, Literal, get_args

import torch
import tyro
from nerfstudio.cameras.cameras import Cameras
from safetensors.torch import load_file
from sampling import fingerprints, kid_difference
from torch import Tensor

from nfldm_ns.autoencoder.scene_autoencoder import RenderedViews
from nfldm_ns.choice import evenly
from nfldm_ns.diffusion.pipeline import NFLDMPipeline, load_pipeline, scene_generators
from nfldm_ns.errors import UserInputError
from nfldm_ns.evaluation.evaluation import check_fit
from nfldm_ns.evaluation.scenes import SURFACE, PictureFolder, Record, SceneJudge
from nfldm_ns.evaluation.settings import EvaluationSettings
from nfldm_ns.generated.cameras import fly_through
from nfldm_ns.generated.scene_files import GeneratedScene, half_precision, renderer_of
from nfldm_ns.method_configs.refine import LEARNING_RATES, refine_trainer_config
from nfldm_ns.metrics.consistency import reprojection_error
from nfldm_ns.metrics.geometry import DepthHistogram, floating_density
from nfldm_ns.metrics.image_sets import REFERENCE, picture_features, read_picture
from nfldm_ns.models import GENERATOR
from nfldm_ns.plugin.refine import refine_grid
from nfldm_ns.refine.distillation import Guidance, ObjectiveName, TimeAnnealing
from nfldm_ns.refine.images import example_images
from nfldm_ns.refine.loading import load_prior
from nfldm_ns.refine.prior import ImagePrior
from nfldm_ns.refine.refiner import Refiner
from nfldm_ns.refine.settings import RefinementConfig, ShadingConfig
from nfldm_ns.refine.views import ViewSampler
from nfldm_ns.reports.galleries import image_grid, write_png
from nfldm_ns.reports.report import Table
from nfldm_ns.reports.resources import ResourceMeter, device_info
from nfldm_ns.scenes.collection import SceneCollection
from nfldm_ns.scenes.views import Views, index_cameras, resize_cameras
from nfldm_ns.scenes.voxel_grid import VoxelGrid
from nfldm_ns.scenes.writing import write_json
from shared.comparisons import as_json, fingerprint, stored, use_threads
from shared.running import run
from shared.sampled_views import Features, SampleJudge, work_device

BEFORE = "before"
PLACES = ("trajectory", "free")  # cameras of the images for FID and KID
FLIGHT_FRAMES = 24  # of the closed path whose neighbours are compared: 15 degrees from one to the next
RENDERED_AT_ONCE = 8
PICTURED_SCENES, PICTURED_VIEWS = 8, 4
DEFAULTS = refine_trainer_config()
Light = Literal["plain", "shaded", "textureless"]
LIGHTS: dict[Light, ShadingConfig] = {
    "shaded": ShadingConfig(shaded_share=0.5),
    "textureless": ShadingConfig(shaded_share=0.25, textureless_share=0.25),
}
"""What differs from the options given for "plain"."""


@dataclass(kw_only=True)
class LearningRates:
    """Of the method's optimisers."""

    density: float = LEARNING_RATES["density"]
    """of densities before softplus"""
    features: float = LEARNING_RATES["features"]
    """of features, in their standard deviations"""
    background: float = LEARNING_RATES["background"]
    """of the background, in its standard deviations"""

    def optimizers(self) -> dict[str, Any]:
        """The method's optimisers with these rates."""
        groups = copy.deepcopy({name: DEFAULTS.optimizers[name] for name in asdict(self)})
        for name, rate in asdict(self).items():
            groups[name]["optimizer"].lr = rate
        return groups


@dataclass(kw_only=True)
class Options:
    """Measure what refining generated scenes changes."""

    refinement: tyro.conf.OmitArgPrefixes[RefinementConfig] = field(default_factory=RefinementConfig)
    """what scenes are refined to; its guidance gives way to --guidances"""
    data: Path
    """the collection that the pipeline was trained on; its test split is the reference"""
    output_dir: Path
    """folder for the numbers and pictures, and for what they are made from"""
    pipeline: Path = Path(GENERATOR)
    """folder of a trained generator, or the name of one that comes with the package"""
    guidances: tuple[Guidance, ...] = get_args(Guidance)
    """each refines all scenes"""
    objectives: tuple[ObjectiveName, ...] = ()
    """each with each guidance (csd not without any); by default that of --objective"""
    annealings: tuple[TimeAnnealing, ...] = ()
    """each with each guidance and objective; by default that of --time-annealing"""
    priors: tuple[str, ...] = ()
    """each with each guidance and objective; by default that of --prior, which by default is the first of these"""
    lights: tuple[Light, ...] = ("plain",)
    """each with all of these: DreamFusion's shaded, and textureless, views for some of all"""
    styles: tuple[Path, ...] = ()
    """images, or folders of images: the first scene is also refined to each, with the guidance of --guidance"""
    num_scenes: int = 32
    """sampled scenes"""
    views_per_scene: int = 8
    """images of each scene, of either kind of cameras"""
    num_real_images: int | None = None
    """of the test split; by default as many as there are images of scenes"""
    num_inference_steps: int = 30
    """denoising steps of each latent"""
    steps: int = DEFAULTS.max_num_iterations
    """of each refinement"""
    seed: int = 0
    """of the first scene and its refinement; further ones count up"""
    rates: LearningRates = field(default_factory=LearningRates)
    """learning rates"""
    threads: int = 2
    """CPU threads"""

    def __post_init__(self) -> None:
        if self.refinement.prior is None and self.priors:
            self.refinement = replace(self.refinement, prior=self.priors[0])

    def check(self) -> None:
        """Raises `UserInputError` for what cannot be, before anything long begins."""
        use_threads(self.threads)
        self.refinement.check()
        ways(self)
        counts = ("num_scenes", "views_per_scene", "num_inference_steps", "steps")
        for name in counts:
            if getattr(self, name) < 1:
                raise UserInputError(f"--{name.replace('_', '-')} is {getattr(self, name)}: give at least 1.")
        if not self.guidances and not self.styles:
            raise UserInputError("There is nothing to refine with: name some --guidances or --styles.")
        for style in self.styles:
            if not style.exists():
                raise UserInputError(f"There is no {style}: give images or folders of images with --styles.")

    @property
    def num_images(self) -> int:
        """Of scenes, from either kind of cameras."""
        return self.num_scenes * self.views_per_scene

    def evaluation_settings(self) -> EvaluationSettings:
        """Which real images are compared with."""
        return EvaluationSettings(
            num_images=self.num_images if self.num_real_images is None else self.num_real_images,
            views_per_scene=self.views_per_scene,
            seed=self.seed,
            num_inference_steps=self.num_inference_steps,
            precision_k=1,  # of neighbours, which are not measured; few images are enough
            density_k=1,
        )

    def settings(self) -> dict[str, Any]:
        """All that pictures and records depend on but guidance, style, and how many scenes there are."""
        free = (
            "guidances",
            "objectives",
            "annealings",
            "priors",
            "lights",
            "styles",
            "num_scenes",
            "num_real_images",
            "threads",
            "output_dir",
            "data",
        )
        known = {name: value for name, value in asdict(self).items() if name not in free}
        known["refinement"]["distillation"].pop("guidance")
        return known


def ways(options: Options) -> dict[str, RefinementConfig]:
    """How all scenes are refined, by names of what differs: guidance, then whatever else is not as given.

    Raises:
        UserInputError: if two priors have one name.
    """
    given, found = options.refinement, {}
    asked = given.distillation
    choices = product(
        options.priors or (given.prior,),
        options.objectives or (asked.objective,),
        options.annealings or (asked.time_annealing,),
        options.lights,
    )
    for (prior, objective, annealing, light), guidance in product(choices, options.guidances):
        if objective == "csd" and guidance == "none":
            continue
        parts = [guidance, "" if objective == asked.objective else objective]
        parts += ["" if annealing == asked.time_annealing else annealing]
        parts += ["" if prior == given.prior else Path(str(prior)).name, "" if light == "plain" else light]
        name = "-".join(part for part in parts if part)
        if name in found:
            raise UserInputError(f"Two of --priors are called {Path(str(prior)).name}: rename a folder.")
        distillation = replace(asked, guidance=guidance, objective=objective, time_annealing=annealing)
        shading = given.shading if light == "plain" else LIGHTS[light]
        found[name] = replace(given, prior=prior, distillation=distillation, shading=shading)
        found[name].check()
    return found


# Refining and looking


def sample_scene(
    pipeline: NFLDMPipeline, seed: int, num_inference_steps: int, image_size: tuple[int, int]
) -> GeneratedScene:
    """A scene as `nfldm-sample` would write it, with images of this (height, width)."""
    output = pipeline(1, scene_generators(seed, 1), num_inference_steps)
    assert output.grids is not None
    cameras = resize_cameras(index_cameras(output.cameras.to("cpu"), 0), *image_size)
    return GeneratedScene(half_precision(output.grids[0]), renderer_of(pipeline.scene_autoencoder), cameras)


class Eye:
    """Looks at a scene before and after it was refined, by the same cameras.

    Args:
        judge: tells depth and floating density, and has the cameras that all scenes share.
        scene: as it began.
        options: how many views.
        seed: of the cameras that are drawn.
    """

    def __init__(self, judge: SceneJudge, scene: GeneratedScene, options: Options, seed: int) -> None:
        assert scene.cameras is not None
        self.judge, self.scene = judge, scene
        sampler = ViewSampler(options.refinement.views, scene.grid, scene.cameras)
        own = index_cameras(scene.cameras, torch.tensor(evenly(range(len(scene.cameras)), options.views_per_scene)))
        # Another seed than that of refining, or they would be the ones that negative guidance looks through.
        drawn = sampler(options.views_per_scene, torch.Generator().manual_seed(seed + 1_000_000))
        self.cameras = {"trajectory": own, "free": index_cameras(drawn.to("cpu"), 0)}
        self.flight = fly_through(scene.cameras, FLIGHT_FRAMES)
        self.depth = self.render(scene.grid, own).depth

    @torch.inference_mode()
    def render(self, grid: VoxelGrid, cameras: Cameras) -> RenderedViews:
        """Views of cameras `[N]`."""
        return self.judge.pipeline.scene_autoencoder.render(grid, index_cameras(cameras.to(grid.device), None))

    def look(self, grid: VoxelGrid) -> tuple[dict[str, Tensor], Tensor, Record]:
        """Pictures by kind of cameras, those of the shared cameras, and what was measured."""
        grid = half_precision(grid).to(self.judge.device)
        rendered = {place: self.render(grid, cameras) for place, cameras in self.cameras.items()}
        record = {
            "floating": floating_density(grid)[0],
            "depth": self.judge.rendered_depth(rendered["trajectory"]),
            "depth_change": (rendered["trajectory"].depth - self.depth).abs().mean(),
        }
        flight = self.render(grid, self.flight)
        depths = torch.where(flight.accumulation >= SURFACE, flight.depth, 0.0)[0].cpu()
        error = reprojection_error(Views(self.flight.to("cpu"), flight.rgb[0].cpu(), depths))
        record |= {name: torch.tensor(value) for name, value in error.items()}
        images = {place: views.rgb[0] for place, views in rendered.items()}
        with torch.inference_mode():
            return images, self.judge.fixed_views(grid), record


@dataclass
class Bench:
    """Refines and looks; a scene in a state that was looked at is not made again.

    A state is `before`, a way (see `ways`), or `style-<fingerprint>`.
    """

    options: Options
    judge: SceneJudge
    folder: PictureFolder

    def __post_init__(self) -> None:
        self.loaded: dict[str, ImagePrior] = {}

    def priors(self, config: RefinementConfig) -> list[ImagePrior]:
        """Those that a configuration names, each loaded once."""
        names = [told.prior for told, _ in config.of_priors()]
        for name in names:
            assert name is not None
            if name not in self.loaded:
                lora = (config.lora, config.lora_scale) if name == config.prior else ()
                self.loaded[name] = load_prior(name, config.precision, *lora)
        return [self.loaded[name] for name in names if name is not None]

    def configurations(self, index: int) -> dict[str, RefinementConfig]:
        """How a scene is refined, by state."""
        refinement, wanted = self.options.refinement, ways(self.options)
        if index == 0:
            styles = {self.style_state(path): path for path in self.options.styles}
            wanted |= {state: replace(refinement, style=str(path)) for state, path in styles.items()}
        return wanted

    def run(self, index: int) -> str:
        """All that is not there yet of a scene; returns its name."""
        seed = self.options.seed + index
        name = f"{seed:06d}"
        missing = {state: c for state, c in self.configurations(index).items() if not self._is_there(state, name)}
        if self._is_there(BEFORE, name) and not missing:
            return name
        scene = sample_scene(self.judge.pipeline, seed, self.options.num_inference_steps, self.judge.image_size)
        eye = Eye(self.judge, scene, self.options, seed)
        if not self._is_there(BEFORE, name):
            self._keep(BEFORE, name, eye, scene.grid)
        for state, config in missing.items():
            refiner = Refiner(copy.deepcopy(scene), self.priors(config), config, seed, self.judge.device)
            moved = replace(scene, grid=scene.grid.to(self.judge.device), renderer=refiner.start_renderer)
            with ResourceMeter() as meter:
                grid = refine_grid(moved, refiner, self.options.rates.optimizers(), self.options.steps, seed)
            self._keep(state, name, eye, grid, meter.use.as_dict())
            print(f"{name} {state}: {meter.use.seconds:.0f} s", flush=True)
        return name

    def _is_there(self, state: str, name: str) -> bool:
        return self.folder.record(state, name).is_file()

    def _keep(self, state: str, name: str, eye: Eye, grid: VoxelGrid, cost: dict[str, float] | None = None) -> None:
        images, fixed, record = eye.look(grid)
        record |= {key: torch.tensor(value) for key, value in (cost or {}).items()}
        sets = {f"{state}-{place}": views for place, views in images.items()}
        self.folder.write(state, sets, fixed, record, name)

    def pictures(self, state: str, name: str) -> list[Tensor]:
        """Views of the cameras that all scenes share."""
        return [read_picture(self.folder.fixed(state) / f"{name}_{view}.png") for view in range(PICTURED_VIEWS)]

    def style_state(self, path: Path) -> str:
        """The state of a scene in a style."""
        made_with = {"style": path, "guidance": self.options.refinement.distillation.guidance}
        return f"style-{fingerprint(made_with)}"


# Numbers


def real_depth(judge: SceneJudge, real: SampleJudge) -> DepthHistogram | None:
    """Depths of the real images, where these are known."""
    scenes, counts = real.scenes[REFERENCE], []
    for scene_id in scenes.scene_ids:
        views = Views.stack([real.collection.load_scene(scene_id).target[: scenes.num_views]]).to(judge.device)
        found = judge.real_depth(views)
        counts += [] if found is None else [DepthHistogram(found, judge.far)]
    return DepthHistogram.total(counts) if counts else None


class Numbers:
    """Turns what was kept into numbers.

    Args:
        names: of all scenes.
    """

    def __init__(self, bench: Bench, real: SampleJudge, names: Sequence[str]) -> None:
        self.bench, self.real, self.names = bench, real, names
        self.depth = real_depth(bench.judge, real)
        self.before = {place: self.features(BEFORE, place) for place in PLACES}

    def features(self, state: str, place: str) -> Features:
        """Of all images of a state, in the order of the scenes."""
        folder, options = self.bench.folder, self.bench.options
        paths = [
            folder.pictures(f"{state}-{place}") / f"{name}_{view}.png"
            for name in self.names
            for view in range(options.views_per_scene)
        ]
        kept = folder.root / "features" / f"{state}-{place}-{len(self.names)}"
        return picture_features(self.real.inception, paths, kept)

    def of(self, state: str) -> dict[str, Any]:
        """Of one state."""
        found: dict[str, Any] = {}
        for place in PLACES:
            features = self.before[place] if state == BEFORE else self.features(state, place)
            distances = self.real.distances(samples=features)
            found[place] = {metric: values["samples"] for metric, values in distances.items()}
            if state != BEFORE:
                sets = (self.real.real[REFERENCE], features, self.before[place])
                change, error = kid_difference(*sets, self.bench.options.views_per_scene)
                found[place] |= {"kid_change": change, "kid_change_error": error}
        return {**found, **self.geometry(state), **self.cost(state)}

    def geometry(self, state: str) -> dict[str, Any]:
        """Of depth, floating density and the agreement of views."""
        records = self.records(state)
        histogram = DepthHistogram.total([DepthHistogram(r["depth"], self.bench.judge.far) for r in records])
        known = histogram.surface_share > 0
        floating, haze = torch.stack([record["floating"] for record in records]).mean(0).tolist()
        means = {name: _mean(records, name) for name in ("depth_change", "l1", "unmoved_l1", "visible")}
        return {
            "depth": {
                "median_m": histogram.quantile(0.5) if known else None,
                "surface_share": histogram.surface_share,
                "wasserstein_m": histogram.wasserstein(self.depth) if known and self.depth is not None else None,
                "change_m": means.pop("depth_change"),
            },
            "floating_share": floating,
            "haze_share": haze,
            "reprojection": means,
        }

    def cost(self, state: str) -> dict[str, Any]:
        """Of 100 steps; the memory is that of the whole process."""
        records = [record for record in self.records(state) if "seconds" in record]
        if not records:
            return {}
        peaks = {name: max(float(r[name]) for r in records) for name in records[0] if name.startswith("peak_")}
        return {"seconds_per_100_steps": 100 * _mean(records, "seconds") / self.bench.options.steps, **peaks}

    def records(self, state: str) -> list[Record]:
        return [load_file(self.bench.folder.record(state, name)) for name in self.names]


def _mean(records: Sequence[Record], name: str) -> float:
    return float(torch.stack([record[name].double() for record in records]).nanmean())


COLUMNS = (
    "",
    "FID",
    "KID",
    "change of KID (%)",
    "standard error (%)",
    "FID, free",
    "KID, free",
    "change of KID, free (%)",
    "depth to real (m)",
    "change of depth (m)",
    "floating (%)",
    "haze (%)",
    "neighbours differ (1/255)",
    "unmoved (1/255)",
    "s per 100 steps",
    "peak memory (GiB)",
)
DIGITS = (0, 1, 4, 1, 1, 1, 4, 1, 3, 3, 2, 2, 2, 2, 1, 2)


def cells(found: dict[str, Any]) -> list[float | None]:
    """Numbers of a state in the order of the columns."""
    own, free = (found[place] for place in PLACES)
    error = found["reprojection"]

    def times(factor: float, value: float | None) -> float | None:
        return None if value is None else factor * value

    return [
        *(own["fid"], own["kid"], times(100, own.get("kid_change")), times(100, own.get("kid_change_error"))),
        *(free["fid"], free["kid"], times(100, free.get("kid_change"))),
        *(found["depth"]["wasserstein_m"], found["depth"]["change_m"]),
        *(100 * found["floating_share"], 100 * found["haze_share"]),
        *(255 * error["l1"], 255 * error["unmoved_l1"]),
        *(found.get("seconds_per_100_steps"), found.get("peak_gpu_gib", found.get("peak_rss_gib"))),
    ]


def table(numbers: dict[str, Any], options: Options) -> Table:
    """One row per state."""
    floor = numbers["floor"]
    rows: list[list[Any]] = [["real training views", floor["fid"]["train"], floor["kid"]["train"], *[None] * 13]]
    rows += [[state, *cells(found)] for state, found in numbers["states"].items()]
    caption = (
        f"{options.num_scenes} scenes, {options.steps} steps each; {options.num_images} images of either kind of "
        f"cameras to {numbers['protocol']['num_images']} real test views."
    )
    return Table(COLUMNS, rows, caption, digits=DIGITS)


# Pictures


def before_and_after(bench: Bench, names: Sequence[str], way: str) -> None:
    """The first scenes, two rows each: as they began, and refined in a way."""
    rows = [(name, state) for name in names[:PICTURED_SCENES] for state in (BEFORE, way)]
    views = [bench.pictures(state, name) for name, state in rows]
    columns = {f"{90 * i} degrees": [row[i] for row in views] for i in range(PICTURED_VIEWS)}
    labels = [f"{name}\n{state}" for name, state in rows]
    write_png(bench.folder.root / f"before_and_after_{way}.png", image_grid(columns, labels))


def style_sheet(bench: Bench, name: str) -> None:
    """One scene as it began, and beside each style what became of it there."""
    columns = {"original": bench.pictures(BEFORE, name)}
    for number, path in enumerate(bench.options.styles, 1):
        images = example_images(path, bench.judge.pipeline.scene_autoencoder.image_size[0], PICTURED_VIEWS)
        columns[f"{number}: {path.stem}"] = list(images)
        columns[f"in style {number}"] = bench.pictures(bench.style_state(path), name)
    write_png(bench.folder.root / "styles.png", image_grid(columns))


# All of it


def main(options: Options) -> None:
    options.check()
    pipeline = load_pipeline(options.pipeline).to(work_device())
    pipeline.set_progress_bar_config(disable=True)
    collection = SceneCollection.open(options.data)
    settings = options.evaluation_settings()
    check_fit(pipeline, collection, settings)
    real = SampleJudge(collection, options.output_dir, settings)
    stored(options.output_dir / "settings.json", options.settings() | {"components": fingerprints(pipeline)}, dict)
    bench = Bench(options, real.scene_judge(pipeline), PictureFolder(options.output_dir))
    names = [bench.run(index) for index in range(options.num_scenes)]
    for way in ways(options):
        before_and_after(bench, names, way)
    if options.styles:
        style_sheet(bench, names[0])
    numbers = Numbers(bench, real, names)
    found = {
        "protocol": real.protocol,
        "num_scenes": options.num_scenes,
        "num_images": options.num_images,
        "settings": asdict(options),
        "floor": real.floor(),
        "states": {state: numbers.of(state) for state in (BEFORE, *ways(options))},
        "device": device_info(),
    }
    write_json(options.output_dir / "refining.json", as_json(found))
    print("\n" + table(found, options).markdown())


if __name__ == "__main__":
    run(main, Options, __doc__)
