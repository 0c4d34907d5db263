"""How well places are reconstructed from a few images by the prior (docs/reconstruction.md).

    python benchmarks/reconstruction.py --data DATA --output-dir OUT [--what views poses pictures] [--counts 1 2 4]
    ... --priors vizdoom-prior outputs/observing

- `views`: of held-out places reconstructed from 1, 2, 4 of their images: PSNR, LPIPS, FID and KID of views that were
  not given, target views and further source views, beside stage 1 given the same images, and stages 1 and 2. With
  `--priors` answers are also refined by priors of images, as `nfldm-reconstruct --prior` does it. Of views whose
  surfaces the given images hardly show, KID beside that of views of sampled scenes; the real views that both are
  compared with are of other held-out places. PSNR also of the pixels that the given images show and of all others: a
  room sampled where nothing was seen has at best twice the squared error of the mean of all rooms, 3 dB.
- `poses`: unposed photos, one of each place: the share of poses within 5 and 10 degrees and within 5 % of the box, raw
  and for the best of the four quarter turns of the scene, beside a camera that always stands at the origin and looks
  along x.
- `pictures`: real views above those of every method, for the first places, not selected.

Views of a place are made once and kept in `--output-dir`. Needs the weights of FID's Inception and of LPIPS
(`nfldm-weights get fid-inception lpips-vgg`).
"""

from __future__ import annotations

import math
import time
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any, Literal

import torch
from jaxtyping import Bool, Float
from sampling import fingerprints
from torch import Tensor

from nfldm_ns.choice import evenly
from nfldm_ns.diffusion.pipeline import load_pipeline, scene_generators
from nfldm_ns.errors import UserInputError
from nfldm_ns.generated.cameras import look_along, surround_cameras
from nfldm_ns.method_configs.refine import refine_trainer_config
from nfldm_ns.metrics.images import extract_features, frechet_distance, kernel_distance, lpips_distance, psnr
from nfldm_ns.models import GENERATOR
from nfldm_ns.pretrained.weights import fetch_weights, load_inception, load_lpips
from nfldm_ns.reconstruction.poses import PoseConfig, estimate_pose, pose_error
from nfldm_ns.reconstruction.prior_refinement import PriorRefinement
from nfldm_ns.reconstruction.reconstruction import ReconstructionConfig, SeenPlace, reconstruct_seen, refine_unseen
from nfldm_ns.reconstruction.visibility import seen_points
from nfldm_ns.refine.loading import load_prior
from nfldm_ns.reports.galleries import write_png
from nfldm_ns.reports.report import Table
from nfldm_ns.scenes.collection import SceneCollection
from nfldm_ns.scenes.views import Views, camera_rays, evenly_spread_views, resize_cameras, stack_cameras
from nfldm_ns.scenes.writing import require_writable
from shared.comparisons import stored, use_threads
from shared.edited_views import fingerprint_of
from shared.running import run
from shared.sampled_views import work_device

What = Literal["views", "poses", "pictures"]
UNSEEN = 0.1  # of a view's pixels: fewer that the given images show make it a view of what no image shows
MARGIN_M = 0.2  # of surfaces that count as shown
METHODS = {"stage1": "stage 1", "stage2": "stages 1 and 2", "prior": "with the prior"}
PICTURED = 6


@dataclass
class Options:
    """What is measured."""

    data: Path
    """scene collection"""
    output_dir: Path
    pipeline: Path = Path(GENERATOR)
    """trained generator"""
    what: tuple[What, ...] = ("views", "poses", "pictures")
    split: Literal["train", "val", "test"] = "test"
    """places that are reconstructed"""
    counts: tuple[int, ...] = (1, 2, 4)
    """given images, looking around as evenly as they can"""
    num_scenes: int = 16
    """places; as many others give the real views that distances are to"""
    num_views: int = 8
    """judged views of each place, of those that were not given, and views of each sampled scene"""
    use_depth: bool = True
    """whether given images come with depth"""
    config: ReconstructionConfig = field(default_factory=ReconstructionConfig)
    """of the reconstruction"""
    priors: tuple[str, ...] = ()
    """priors of images that answers are also refined by, each by itself"""
    prior_steps: int = 40
    """of these refinements"""
    num_photos: int = 16
    """unposed photos"""
    poses: PoseConfig = field(default_factory=PoseConfig)
    """of the poses' estimation"""
    seed: int = 0
    threads: int = 2
    """CPU threads"""

    def check(self) -> None:
        use_threads(self.threads)
        if min(self.num_scenes, self.num_photos, *self.counts) < 1 or not self.counts:
            raise UserInputError("--num-scenes, --num-photos and --counts must be at least 1: give larger numbers.")
        if self.prior_steps < 1:
            raise UserInputError(f"--prior-steps is {self.prior_steps}: give at least 1.")
        if self.num_views < 2:
            raise UserInputError(f"--num-views is {self.num_views}: give at least 2.")


def methods(options: Options) -> dict[str, str]:
    """Titles of all methods by name."""
    return METHODS | {f"refined-{prior}": f"refined by {Path(prior).name}" for prior in options.priors}


class Places:
    """The places, the generator, and what judges."""

    def __init__(self, options: Options) -> None:
        self.options, self.device = options, work_device()
        self.collection = SceneCollection.open(options.data)
        self.pipeline = load_pipeline(options.pipeline).to(self.device)
        self.pipeline.set_progress_bar_config(disable=True)
        chosen = evenly(self.collection.split(options.split), 2 * options.num_scenes)
        if len(chosen) < 2 * options.num_scenes:
            raise UserInputError(
                f"{options.data} has {len(chosen)} places in its {options.split} split, too few for twice "
                f"--num-scenes {options.num_scenes}: ask for fewer."
            )
        self.scene_ids, self.others = chosen[::2], chosen[1::2]

    @cached_property
    def inception(self) -> torch.nn.Module:
        fetch_weights("fid-inception")
        return load_inception().to(self.device)

    @cached_property
    def lpips(self) -> torch.nn.Module:
        return load_lpips("vgg").to(self.device)

    @cached_property
    def refinements(self) -> dict[str, PriorRefinement]:
        """By the names of their methods."""
        optimizers, steps = refine_trainer_config().optimizers, self.options.prior_steps
        priors = {prior: load_prior(prior).to(self.device) for prior in self.options.priors}
        return {f"refined-{name}": PriorRefinement(prior, optimizers, steps) for name, prior in priors.items()}

    def split_views(self, scene_id: str, count: int) -> tuple[Views, Views]:
        """Given views, and all others, `[N]` and `[M]`."""
        scene = self.collection.load_scene(scene_id)
        given = evenly_spread_views(scene.source.cameras, count)
        rest = [i for i in range(scene.source.shape[0]) if i not in given]
        others = Views.cat([scene.target, scene.source[rest]])
        return scene.source[given], others[evenly(range(others.shape[0]), self.options.num_views)]

    def features(self, images: Float[Tensor, "count 3 height width"]) -> Float[Tensor, "count features"]:
        return extract_features(self.inception, [images.to(self.device)]).cpu()

    @torch.no_grad()
    def show(self, grid: Any, views: Views) -> Float[Tensor, "views 3 height width"]:
        cameras = Views.stack([views]).cameras.to(self.device)
        return self.pipeline.scene_autoencoder.render(grid.to(self.device), cameras).rgb[0].clamp(0, 1).cpu()


def seen_pixels(given: Views, others: Views) -> tuple[Bool[Tensor, "views h w"], Bool[Tensor, "views h w"]]:
    """Pixels of each view whose surfaces the given views show, and those of which depth tells."""
    assert given.depths is not None and others.depths is not None
    origins, directions = camera_rays(others.cameras, *others.image_size)
    points = origins[:, None, None] + others.depths[:, 0, ..., None] * directions
    seen = seen_points(points, given.cameras, given.depths, MARGIN_M)
    known = others.depths[:, 0] > 0
    return seen & known, known


def error_sums(shown: Tensor, real: Tensor, pixels: Bool[Tensor, "views h w"]) -> Float[Tensor, " 2"]:
    """Sum of the mean squared errors of some pixels, and their number."""
    error = (shown - real).square().mean(1)
    return torch.stack([error[pixels].sum(), pixels.sum()]).cpu()


def pooled_psnr(sums: Float[Tensor, "places 2"]) -> float | None:
    """PSNR of all pixels together, from `error_sums`; None if there are none."""
    error, count = sums.sum(0).tolist()
    return -10 * math.log10(max(error / count, 1e-12)) if count else None


def made_views(places: Places, scene_id: str, count: int) -> dict[str, Any]:
    """Views of one place by every method, and how they score; made once."""
    options = places.options
    folder = options.output_dir / "places"
    path = folder / f"{scene_id}-{count}.pt"
    settings = {**_settings(places), "count": count, "errors": "by pixels"}
    if path.is_file():
        found = torch.load(path, weights_only=True)
        if found["settings"] != str(settings):
            raise UserInputError(f"{path} was made with other settings: choose another --output-dir or delete it.")
        return found
    given, others = places.split_views(scene_id, count)
    pixels, known = seen_pixels(given, others)
    shares = pixels.flatten(1).sum(1) / known.flatten(1).sum(1).clamp(min=1)
    if not options.use_depth:
        given = replace(given, depths=None)
    begun = time.perf_counter()
    seen = SeenPlace.of(places.pipeline, Views.stack([given]), options.config)
    answer = reconstruct_seen(places.pipeline, seen, options.seed, options.config)
    seconds = time.perf_counter() - begun
    with torch.no_grad():
        decoded = places.pipeline.latent_autoencoder.decode(seen.latents)
    grids = {"stage1": seen.grid, "stage2": decoded, "prior": answer.grid}
    for name, refinement in places.refinements.items():
        config = options.config
        grids[name] = refine_unseen(places.pipeline, seen, answer.grid, config, refinement, options.seed)
    images = {name: places.show(grid, others) for name, grid in grids.items()}
    scores = {}
    for name, shown in images.items():
        with torch.no_grad():
            distance = lpips_distance(places.lpips, shown.to(places.device), others.images.to(places.device))
        back = psnr(places.show(grids[name], given), given.images)
        scores[name] = {"psnr": psnr(shown, others.images), "lpips": distance.cpu().flatten(), "given_psnr": back}
        scores[name]["seen_error"] = error_sums(shown, others.images, pixels)
        scores[name]["other_error"] = error_sums(shown, others.images, known & ~pixels)
    found = {
        "settings": str(settings),
        "seconds": seconds,
        "seen": shares,
        "real": others.images.half(),
        "images": {name: shown.half() for name, shown in images.items()},
        "scores": scores,
    }
    folder.mkdir(parents=True, exist_ok=True)
    torch.save(found, path)
    return found


def _settings(places: Places) -> dict[str, Any]:
    """All that views depend on."""
    options = asdict(places.options)
    chosen = {
        name: options[name]
        for name in ("split", "num_views", "use_depth", "config", "seed", *_of_priors(places.options))
    }
    return {"components": fingerprints(places.pipeline), "collection": fingerprint_of(places.collection), **chosen}


def _of_priors(options: Options) -> tuple[str, ...]:
    """Options that views depend on where answers are refined by priors."""
    return ("priors", "prior_steps") if options.priors else ()


def measure_views(places: Places) -> dict[str, Any]:
    """Scores and distances of all methods by the number of images."""
    real = places.features(torch.cat([_all_views(places, scene_id) for scene_id in places.others]))
    result: dict[str, Any] = {"num_real": len(real), "counts": {}}
    sampled = places.features(_sampled_views(places))
    result["samples"] = {**_distances(real, sampled), "num_images": len(sampled)}
    for count in places.options.counts:
        made = []
        for i, scene_id in enumerate(places.scene_ids):
            made.append(made_views(places, scene_id, count))
            print(f"{count} images: {i + 1} of {len(places.scene_ids)}, {made[-1]['seconds']:.0f} s", flush=True)
        unseen = torch.cat([found["seen"] for found in made]) < UNSEEN
        rows = {}
        for name in methods(places.options):
            features = places.features(torch.cat([found["images"][name].float() for found in made]))
            row = {
                score: float(torch.stack([found["scores"][name][score].mean() for found in made]).mean())
                for score in ("psnr", "lpips", "given_psnr")
            }
            for kind in ("seen", "other"):
                sums = torch.stack([found["scores"][name][f"{kind}_error"] for found in made])
                if (pooled := pooled_psnr(sums)) is not None:
                    row[f"{kind}_pixels_psnr"] = pooled
            row |= _distances(real, features)
            if int(unseen.sum()) >= 2:
                row["unseen_kid"] = kernel_distance(real, features[unseen]).mean
                kept = [found["seen"] < UNSEEN for found in made]
                for score in ("psnr", "lpips"):
                    values = [found["scores"][name][score][k] for found, k in zip(made, kept, strict=True)]
                    row[f"unseen_{score}"] = float(torch.cat(values).mean())
            rows[name] = row
        seconds = sorted(found["seconds"] for found in made)[len(made) // 2]
        total = {"views": int(unseen.numel()), "unseen_views": int(unseen.sum()), "seconds": seconds}
        result["counts"][str(count)] = {**total, "rows": rows}
    return result


def _distances(real: Tensor, fake: Tensor) -> dict[str, float]:
    return {"fid": frechet_distance(real, fake), "kid": kernel_distance(real, fake).mean}


def _all_views(places: Places, scene_id: str) -> Tensor:
    scene = places.collection.load_scene(scene_id)
    images = torch.cat([scene.source.images, scene.target.images])
    return images[evenly(range(len(images)), places.options.num_views)]


def _sampled_views(places: Places) -> Tensor:
    """As many sampled scenes as places, each seen all around."""
    stage1 = places.pipeline.scene_autoencoder
    images = []
    for i in range(places.options.num_scenes):
        steps = places.options.config.num_inference_steps
        grid = places.pipeline(1, scene_generators(places.options.seed + i, 1), steps).grids
        cameras = surround_cameras(places.options.num_views, stage1.image_size, float(stage1.config.focal_length))
        cameras = resize_cameras(cameras, *places.collection.image_size[::-1])
        with torch.no_grad():
            rendered = stage1.render(grid, stack_cameras([cameras]).to(places.device))
        images.append(rendered.rgb[0].clamp(0, 1).cpu())
    return torch.cat(images)


def views_tables(found: dict[str, Any], options: Options) -> list[Table]:
    rows = []
    for count, part in found["counts"].items():
        for name, title in methods(options).items():
            row = part["rows"][name]
            cells = [row[key] for key in ("psnr", "lpips", "fid", "kid")]
            pixels = [row.get("seen_pixels_psnr"), row.get("other_pixels_psnr")]
            unseen = [row.get("unseen_lpips"), row.get("unseen_kid")]
            rows.append([count, title, *cells, row["given_psnr"], *pixels, *unseen])
    samples = found["samples"]
    nothing = [None] * 4
    rows.append(["0", "sampled scenes", None, None, samples["fid"], samples["kid"], *nothing, samples["kid"]])
    depth = "with" if options.use_depth else "without"
    caption = (
        f"{options.num_scenes} places of the {options.split} split, {depth} depth; views that were not given, and of "
        f"these the ones of which less than {100 * UNSEEN:.0f} % was shown; distances to {found['num_real']} real "
        "views of other places."
    )
    columns = ["images", "", "PSNR (dB)", "LPIPS", "FID", "KID", "PSNR of given"]
    columns += ["PSNR, seen pixels", "PSNR, other pixels", "LPIPS, unseen", "KID, unseen"]
    return [Table(columns, rows, caption, digits=(0, 0, 2, 3, 1, 4, 1, 2, 2, 3, 4))]


def measure_poses(places: Places) -> dict[str, Any]:
    """Errors of estimated poses of one view of each place, as the world and as the best quarter turn have them."""
    options = places.options
    ids = evenly(places.collection.split(options.split), options.num_photos)
    aabb = places.pipeline.scene_autoencoder.aabb.cpu()
    origin = look_along(torch.zeros(1, 3), torch.zeros(1), torch.zeros(1))[0]
    errors: dict[str, list[list[float]]] = {}
    for i, scene_id in enumerate(ids):
        photo = replace(places.collection.load_scene(scene_id).target[:1], depths=None)
        true = photo.cameras.camera_to_worlds[0]
        estimate = estimate_pose(places.pipeline, Views.stack([photo]), options.seed, options.poses)[0].pose
        for name, pose in (("estimated", estimate), ("at the origin", origin)):
            for kind, any_quarter in (("", False), (", any quarter turn", True)):
                error = pose_error(pose, true, aabb, any_quarter)
                errors.setdefault(name + kind, []).append([error.degrees, error.metres, error.box_share])
        print(f"poses: {i + 1} of {len(ids)}, {errors['estimated'][-1]}", flush=True)
    return {"num_photos": len(ids), "errors": errors}


def poses_tables(found: dict[str, Any], options: Options) -> list[Table]:
    rows = []
    for name, values in found["errors"].items():
        degrees, metres, share = torch.tensor(values).unbind(1)
        close = [100 * float((degrees <= limit).float().mean()) for limit in (5, 10)]
        near = 100 * float((share <= 0.05).float().mean())
        rows.append([name, *close, near, float(degrees.median()), float(metres.median())])
    columns = ["", "within 5 degrees (%)", "10 degrees (%)", "5 % of the box (%)", "median degrees", "median metres"]
    caption = f"{found['num_photos']} photos without pose or depth, one of each place of the {options.split} split."
    return [Table(columns, rows, caption, digits=(0, 0, 0, 0, 1, 2))]


def draw(places: Places) -> None:
    """Rows of real and made views for each of the first places."""
    for count in places.options.counts:
        for scene_id in places.scene_ids[:PICTURED]:
            found = made_views(places, scene_id, count)
            given, _ = places.split_views(scene_id, count)
            images = [found["real"], *(found["images"][name] for name in methods(places.options))]
            rows = [torch.cat(list(row.float()), dim=-1) for row in images]
            rows.insert(0, _padded(torch.cat(list(given.images), dim=-1), rows[0].shape[-1]))
            write_png(places.options.output_dir / f"{scene_id}-{count}.png", torch.cat(rows, dim=-2))


def _padded(row: Tensor, width: int) -> Tensor:
    return torch.nn.functional.pad(row, (0, width - row.shape[-1]), value=1.0)


MEASURE = {"views": measure_views, "poses": measure_poses}
TABLES = {"views": views_tables, "poses": poses_tables}
DEPENDS = {"views": ("counts", "num_scenes", "num_views", "use_depth", "config"), "poses": ("num_photos", "poses")}


def main(options: Options) -> None:
    options.check()
    require_writable(options.output_dir)
    places = Places(options)
    for part in MEASURE:
        if part not in options.what:
            continue
        chosen = asdict(options)
        further = _of_priors(options) if part == "views" else ()
        settings = {name: chosen[name] for name in ("split", "seed", *DEPENDS[part], *further)}
        settings |= {"components": fingerprints(places.pipeline), "collection": fingerprint_of(places.collection)}
        found = stored(options.output_dir / f"{part}.json", settings, partial(MEASURE[part], places))
        for table in TABLES[part](found, options):
            print("\n" + table.markdown(), flush=True)
    if "pictures" in options.what:
        draw(places)


if __name__ == "__main__":
    run(main, Options, __doc__)
