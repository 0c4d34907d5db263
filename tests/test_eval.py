"""The evaluation of a generator: its measures against references, and all of it on small models."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from nfldm_ns.choice import evenly
from nfldm_ns.commands import eval as command
from nfldm_ns.diffusion.decoder_training import enlarge_cameras
from nfldm_ns.diffusion.pipeline import NFLDMPipeline, scene_generators
from nfldm_ns.errors import UserInputError
from nfldm_ns.evaluation import evaluation
from nfldm_ns.evaluation.evaluation import evaluate_pipeline
from nfldm_ns.evaluation.numbers import _turned
from nfldm_ns.evaluation.scenes import SceneJudge, render_sampled_views
from nfldm_ns.evaluation.settings import EvaluationSettings, choose_real_scenes
from nfldm_ns.metrics import image_sets
from nfldm_ns.metrics.geometry import BINS, DepthHistogram, floating_density
from nfldm_ns.metrics.image_sets import picture_features, set_distances, write_pictures
from nfldm_ns.metrics.images import frechet_distance
from nfldm_ns.metrics.neighbours import (
    Nearest,
    compare_nearest,
    copy_rate,
    density_coverage,
    nearest,
    neighbour_radii,
    precision_recall,
    quantiles,
)
from nfldm_ns.pretrained.inception import resize_clean
from nfldm_ns.scenes.collection import SceneCollection
from nfldm_ns.scenes.views import Views, index_cameras
from nfldm_ns.scenes.voxel_grid import VoxelGrid
from tests.pretrained import require_weights
from tests.small_models import MeanColor, random_grid, small_pipeline
from tests.synthetic import make_box_room_collection

# Resizing


@pytest.mark.parametrize("shape", [(64, 64), (128, 96), (400, 512), (299, 640)])
def test_resizing_is_that_of_pil_in_floating_point(shape: tuple[int, int]) -> None:
    pixels = (255 * torch.rand(1, 3, *shape)).round()
    ours = resize_clean(pixels, 299, 299)[0]
    for channel, found in zip(pixels[0], ours, strict=True):
        image = Image.fromarray(channel.numpy(), mode="F").resize((299, 299), Image.Resampling.BICUBIC)
        np.testing.assert_allclose(found.numpy(), np.asarray(image).clip(0, 255), atol=0.01)


# Fidelity and variety


def slow_measures(real: np.ndarray, fake: np.ndarray, k: int) -> dict[str, float]:
    """The definitions of both papers, point by point."""

    def radius(points: np.ndarray, i: int) -> float:
        return sorted(np.linalg.norm(points[i] - p) for j, p in enumerate(points) if j != i)[k - 1]

    def inside(point: np.ndarray, points: np.ndarray, radii: list[float]) -> list[bool]:
        return [bool(np.linalg.norm(point - p) <= r) for p, r in zip(points, radii, strict=True)]

    real_radii = [radius(real, i) for i in range(len(real))]
    fake_radii = [radius(fake, i) for i in range(len(fake))]
    hits = np.array([inside(point, real, real_radii) for point in fake])
    recalled = [any(inside(point, fake, fake_radii)) for point in real]
    return {
        "precision": float(hits.any(axis=1).mean()),
        "recall": float(np.mean(recalled)),
        "density": float(hits.sum() / (k * len(fake))),
        "coverage": float(hits.any(axis=0).mean()),
    }


@pytest.mark.parametrize("k", [1, 3, 5])
def test_neighbour_measures_are_those_of_the_papers(k: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("nfldm_ns.metrics.neighbours.ROWS_AT_ONCE", 7)
    real = torch.randn(40, 3, dtype=torch.float64)
    fake = 0.7 * torch.randn(31, 3, dtype=torch.float64) + 0.8
    expected = slow_measures(real.numpy(), fake.numpy(), k)
    found = {**precision_recall(real, fake, k), **density_coverage(real, fake, k)}
    assert found == pytest.approx(expected)
    assert 0 < found["recall"] < 1 and 0 < found["coverage"] < 1


def test_neighbour_measures_of_equal_and_of_distant_sets() -> None:
    real = torch.randn(50, 4, dtype=torch.float64)
    same = {**precision_recall(real, real, 3), **density_coverage(real, real, 5)}
    # A ball holds the k neighbours that define it, and its own centre.
    assert same == pytest.approx({"precision": 1, "recall": 1, "density": 6 / 5, "coverage": 1})
    far = {**precision_recall(real, real + 100, 3), **density_coverage(real, real + 100, 5)}
    assert far == pytest.approx({"precision": 0, "recall": 0, "density": 0, "coverage": 0})
    point = real[:1].expand(50, -1)  # one real image over and over: all samples are real, but there is no variety
    collapsed = {**precision_recall(real, point, 3), **density_coverage(real, point, 5)}
    assert collapsed["precision"] == 1
    assert collapsed["recall"] <= 1 / 50
    assert collapsed["coverage"] < 0.5


def test_density_and_coverage_of_one_distribution_have_their_expectations() -> None:
    found = [density_coverage(*torch.randn(2, 300, 8, dtype=torch.float64), 5) for _ in range(8)]
    assert np.mean([f["density"] for f in found]) == pytest.approx(1, abs=0.1)
    assert np.mean([f["coverage"] for f in found]) == pytest.approx(1 - 2**-5, abs=0.02)


def test_more_neighbours_than_images_are_refused() -> None:
    with pytest.raises(ValueError, match="from 1 to 4"):
        neighbour_radii(torch.randn(5, 2), 5)


# Pictures on disk


def test_features_of_pictures_go_on_after_an_interruption(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(image_sets, "PIECE", 4)
    images = torch.rand(10, 3, 8, 8)
    write_pictures(tmp_path, "a", images)
    paths = [tmp_path / f"a_{i}.png" for i in range(10)]
    whole = picture_features(MeanColor(), paths)
    torch.testing.assert_close(whole, MeanColor()(images).double(), atol=3e-3, rtol=0)
    shares: list[float] = []

    def interrupt(share: float) -> None:
        shares.append(share)
        if share > 0.6:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        picture_features(MeanColor(), paths, tmp_path / "features", interrupt)
    assert len(list((tmp_path / "features").iterdir())) == 1
    paths[0].unlink()  # not read again
    again = picture_features(MeanColor(), paths, tmp_path / "features")
    torch.testing.assert_close(again, whole, atol=1e-7, rtol=1e-6)
    assert shares == sorted(shares)


def test_set_distances_are_to_the_test_set() -> None:
    features = {
        name: torch.randn(20, 4, dtype=torch.float64) + i for i, name in enumerate(("test", "train", "samples"))
    }
    found = set_distances(features)
    assert set(found["fid"]) == set(found["kid"]) == {"train", "samples", "samples_to_train"}
    assert found["fid"]["samples"] == frechet_distance(features["test"], features["samples"])
    assert found["fid"]["samples_to_train"] < found["fid"]["samples"]


# Geometry


def test_depth_histograms_have_closed_forms() -> None:
    near = torch.full((1, 1, 4, 8), 2.0)
    surface = torch.ones_like(near, dtype=torch.bool)
    surface[..., :2] = False
    one = DepthHistogram.of(near, surface, 10.0)
    other = DepthHistogram.of(near + 3, torch.ones_like(surface), 10.0)
    assert one.surface_share == pytest.approx(0.75)
    assert other.surface_share == 1
    assert one.wasserstein(other) == pytest.approx(3, abs=10 / BINS)
    assert one.wasserstein(one) == 0
    assert other.quantile(0.5) == pytest.approx(5, abs=10 / BINS)
    together = DepthHistogram.total([one, other])
    assert together.num_pixels == 64
    # 24 pixels at 2 m and 32 at 5 m
    assert together.wasserstein(one) == pytest.approx(3 * 32 / 56, abs=10 / BINS)
    middles, density = one.density()
    assert sum(density) * (middles[1] - middles[0]) == pytest.approx(1)
    with pytest.raises(ValueError, match="no pixel"):
        _ = DepthHistogram.of(near, torch.zeros_like(surface), 10.0).cumulative


def test_wasserstein_distance_is_scipys() -> None:
    from scipy.stats import wasserstein_distance

    a, b = 10 * torch.rand(500) ** 2, 10 * torch.rand(400)
    everywhere = torch.ones(500, dtype=torch.bool)
    found = DepthHistogram.of(a, everywhere, 10.0).wasserstein(DepthHistogram.of(b, everywhere[:400], 10.0))
    assert found == pytest.approx(wasserstein_distance(a.numpy(), b.numpy()), abs=2 * 10 / BINS)


def test_floating_density_of_a_room_with_a_block_in_the_air() -> None:
    density = torch.zeros(3, 1, 8, 8, 8)
    density[:, 0, 0] = 1e6  # a floor of 64 voxels
    density[:2, 0, 7, 3:5, 3:5] = 1e6  # a lamp at the ceiling, 4 voxels, held from beyond the box
    density[1, 0, 3:5, 3:5, 3:5] = 1e6  # a block of 8 voxels in the air
    density[2, 0, 1, 2, 2] = 1e6  # a step on the floor
    density[2, 0, 2, 3, 3] = 1e6  # held by a corner alone
    density[2, 0, 5, 4, 4] = 0.1  # and haze, of opacity 1 - exp(-0.1)
    grid = VoxelGrid(density, torch.zeros(3, 2, 8, 8, 8), torch.tensor([[0.0] * 3, [8.0] * 3]))
    haze = 1 - np.exp(-0.1)
    expected = torch.tensor([[0, 0], [8 / 76, 0], [0, haze / (66 + haze)]], dtype=torch.float64)
    torch.testing.assert_close(floating_density(grid), expected, atol=1e-7, rtol=0)
    empty = VoxelGrid(0 * density[:1], grid.features[:1], grid.aabb)
    assert floating_density(empty).tolist() == [[0, 0]]


# Copies


def test_nearest_neighbours_are_those_of_a_plain_search() -> None:
    queries, points = torch.randn(9, 4, 5), torch.randn(23, 5)
    queries[3, 2] = points[17]
    found = nearest(queries, points, queries_at_once=4, points_at_once=6)
    distances = (queries[:, :, None] - points).double().norm(dim=-1).amin(dim=1)
    order = distances.sort(dim=1)
    torch.testing.assert_close(found.distance, order.values[:, 0])
    torch.testing.assert_close(found.second, order.values[:, 1])
    assert torch.equal(found.index, order.indices[:, 0])
    assert found.distance[3] == 0  # exactly, though far from the origin
    assert torch.equal(nearest(queries.half() * 0 + 100, points[:1].half() * 0 + 100).distance, torch.zeros(9).double())
    alone = nearest(queries, points[:1])
    assert bool(alone.second.isinf().all()) and copy_rate(alone) == pytest.approx(0)


def test_copies_are_told_from_scenes_that_are_close_to_all() -> None:
    def found(distance: list[float], second: list[float]) -> Nearest:
        return Nearest(torch.tensor(distance), torch.tensor(second), torch.zeros(len(distance), dtype=torch.int64))

    held_out = found([1.0 + 0.01 * i for i in range(100)], [2.0] * 100)
    copied = compare_nearest(found([0.01, 0.02, 1.5, 1.6], [1.5, 1.5, 1.6, 1.7]), held_out)
    assert copied["generated_closer_than_q05"] == 0.5
    assert copied["generated_copies"] == 0.5
    blurred = compare_nearest(found([0.8] * 4, [0.81] * 4), held_out)
    assert blurred["generated_closer_than_q05"] == 1
    assert blurred["generated_copies"] == 0
    assert blurred["held_out_copies"] == 0
    assert quantiles(torch.arange(101.0))["q05"] == pytest.approx(5)


def test_a_turned_scene_is_recognised_in_latents_and_in_renders() -> None:
    judge = SceneJudge(small_pipeline())
    assert judge.turns == 4
    with torch.no_grad():
        scene, other = random_grid(2)[0], random_grid(2)[1]
        turned = scene.rotate90(3)
        points = torch.stack([judge.latent_vectors(grid, 1)[0] for grid in (other, scene)])
        found = nearest(judge.latent_vectors(turned, 4)[None], points)
        assert int(found.index) == 1
        assert float(found.distance) == pytest.approx(0, abs=1e-5)
        views = [MeanColor()(judge.fixed_views(grid)) for grid in (other, scene, turned)]
        vectors = _turned(torch.stack(views), 4)
        found = nearest(vectors[2:], vectors[:2, 0])
        assert int(found.index) == 1
        assert float(found.distance) == pytest.approx(0, abs=1e-4)
        assert float(found.second) > 1e-2


# All of it


SETTINGS = EvaluationSettings(num_images=6, views_per_scene=2, num_inference_steps=2)


def evaluate(folder: Path, collection: SceneCollection, settings: EvaluationSettings = SETTINGS) -> dict:
    return evaluate_pipeline(small_pipeline(), collection, folder, settings, MeanColor(), "small")


@pytest.fixture(scope="module")
def rooms(tmp_path_factory: pytest.TempPathFactory) -> SceneCollection:
    return make_box_room_collection(tmp_path_factory.mktemp("rooms"), num_train=4, num_test=3)


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory, rooms: SceneCollection) -> Path:
    folder = tmp_path_factory.mktemp("evaluation") / "out"
    evaluate(folder, rooms)
    return folder


def files(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_report_holds_all_numbers_and_says_of_how_many_images(report: Path) -> None:
    numbers = json.loads((report / "eval.json").read_text())
    sets = {"samples", "stage1", "stage2", "mean_image", "train"}
    assert numbers["distances"]["num_images"] == numbers["neighbours"]["num_images"] == 6
    assert set(numbers["distances"]["fid"]) == set(numbers["distances"]["kid"]) == {*sets, "samples_to_train"}
    assert set(numbers["neighbours"]["sets"]) == sets
    assert "Inception" in numbers["distances"]["features"]
    assert set(numbers["depth"]["sets"]) == {"samples", "stage1", "stage2", "train", "test"}
    assert numbers["depth"]["sets"]["test"]["num_pixels"] == 6 * 32 * 32
    assert numbers["depth"]["sets"]["stage1"]["wasserstein_m"] > 0
    assert numbers["copies"]["num_scenes"] == {"generated": 3, "test": 3, "train": 4}
    assert [scene["scene"] for scene in numbers["copies"]["scenes"]] == ["000000", "000001", "000002"]
    assert all(s["renders"]["distance"] <= s["renders"]["second"] for s in numbers["copies"]["scenes"])
    assert {name: values["num_scenes"] for name, values in numbers["floating"].items()} == {
        "generated": 3,
        "test_stage1": 3,
        "test_stage2": 3,
        "train_stage1": 4,
        "train_stage2": 4,
    }
    page = (report / "index.html").read_text()
    assert page.count("<table>") == 5
    assert page.count("<img") >= 3 + 3 + 3 + 3 + 3
    assert 'src="http' not in page


def test_samples_are_those_of_their_seeds(report: Path) -> None:
    pipeline = small_pipeline()
    pipeline.set_progress_bar_config(disable=True)
    output = pipeline(1, scene_generators(1, 1), num_inference_steps=2)
    image = render_sampled_views(pipeline, output, 2)[0].rgb[0, 1]
    write_pictures(report.parent, "expected", image[None])
    found = report / "pictures" / "samples" / "000001_1.png"
    assert (report.parent / "expected_0.png").read_bytes() == found.read_bytes()


def test_a_generator_with_an_upsampler_is_judged_at_either_size(
    report: Path, rooms: SceneCollection, tmp_path: Path
) -> None:
    def grown() -> NFLDMPipeline:
        pipeline = small_pipeline()
        pipeline.scene_autoencoder.grow_decoder(upsampling_channels=8)
        enlarge_cameras(pipeline, 2.0)
        return pipeline

    for size, collection in ((32, rooms), (64, make_box_room_collection(tmp_path / "64", 4, 3, 64))):
        evaluate_pipeline(grown(), collection, tmp_path / f"out{size}", SETTINGS, MeanColor())
        for name in ("samples", "stage1", "stage2", "test"):
            pictures = sorted((tmp_path / f"out{size}" / "pictures" / name).glob("*.png"))
            assert pictures and {Image.open(path).size for path in pictures} == {(size, size)}
            before = report / "pictures" / name
            assert size == 64 or all(path.read_bytes() == (before / path.name).read_bytes() for path in pictures)
    tiny = make_box_room_collection(tmp_path / "16", 4, 3, 16)
    with pytest.raises(UserInputError, match="have 32 x 32 or 64 x 64 pixels, but those of .* 16 x 16"):
        evaluate_pipeline(grown(), tiny, tmp_path / "no", SETTINGS, MeanColor())


def test_an_interrupted_evaluation_goes_on_to_the_same_numbers(
    report: Path, rooms: SceneCollection, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "out"
    write = evaluation.PictureFolder.write

    def fail_at_the_second_test_scene(self, name, images, fixed, record, scene):
        if name == "test" and len(list(self.fixed(name).glob("*_0.png"))) == 1:
            raise KeyboardInterrupt
        write(self, name, images, fixed, record, scene)

    monkeypatch.setattr(evaluation.PictureFolder, "write", fail_at_the_second_test_scene)
    with pytest.raises(KeyboardInterrupt):
        evaluate(folder, rooms)
    monkeypatch.undo()
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*.png")}
    assert len(before) == 3 * (2 + 4) + 3 * 2 + 4
    evaluate(folder, rooms)
    assert before == {path: path.stat().st_mtime_ns for path in before}
    expected, found = files(report), files(folder)
    assert expected.keys() == found.keys()
    assert [name for name in expected if expected[name] != found[name] and name != "index.html"] == []


def test_a_folder_of_something_else_is_refused(report: Path, rooms: SceneCollection, tmp_path: Path) -> None:
    before = files(report)
    for settings, said in (
        (EvaluationSettings(8, 2, num_inference_steps=2), "num_images: 6 there, 8 here"),
        (EvaluationSettings(6, 2, seed=1, num_inference_steps=2), "seed: 0 there, 1 here"),
    ):
        with pytest.raises(UserInputError, match=said):
            evaluate(report, rooms, settings)
    with pytest.raises(UserInputError, match="scene_autoencoder: [0-9a-f]{16} there, [0-9a-f]{16} here"):
        evaluate_pipeline(small_pipeline(seed=1), rooms, report, SETTINGS, MeanColor())
    assert files(report) == before
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(UserInputError, match="not empty"):
        evaluate(tmp_path, rooms)
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]


def test_fewer_images_than_asked_for_are_refused(rooms: SceneCollection, tmp_path: Path) -> None:
    with pytest.raises(UserInputError, match="3 scenes with 4 target views.*--num-images 12 or less"):
        evaluate(tmp_path / "out", rooms, EvaluationSettings(13, 2, num_inference_steps=2))
    assert not (tmp_path / "out").exists()
    chosen = choose_real_scenes(rooms, "test", EvaluationSettings(36, 2, with_source_views=True))
    assert (len(chosen.shown), chosen.num_views) == (3, 12)
    assert choose_real_scenes(rooms, "test", EvaluationSettings(6, 2)).num_views == 2
    with pytest.raises(UserInputError, match="trajectories have 2 cameras"):
        evaluate(tmp_path / "out", rooms, EvaluationSettings(9, 3))
    with pytest.raises(UserInputError, match="--num-images is 5"):
        EvaluationSettings(5)


def test_a_copied_scene_shows(rooms: SceneCollection, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A "generator" that gives the latents of a training scene is found out at distance zero."""
    pipeline = small_pipeline()
    source = Views.stack([rooms.load_scene(rooms.split("train")[2]).source])
    with torch.no_grad():
        latents = pipeline.latent_autoencoder.encode(pipeline.scene_autoencoder.encode(source))
        copied = pipeline.latent_autoencoder.decode(latents)
    plain = type(pipeline).__call__

    def copy(self, *arguments, **options):
        output = plain(self, *arguments, **options)
        output.grids = copied
        return output

    monkeypatch.setattr(type(pipeline), "__call__", copy)
    numbers = evaluate_pipeline(pipeline, rooms, tmp_path / "out", SETTINGS, MeanColor())
    for scene in numbers["copies"]["scenes"]:
        for kind in ("latents", "renders"):
            assert scene[kind]["nearest"] == rooms.split("train")[2]
            assert scene[kind]["distance"] == pytest.approx(0, abs=1e-6)
            assert scene[kind]["second"] > 1e-3
    assert numbers["copies"]["latents"]["generated_copies"] == numbers["copies"]["renders"]["generated_copies"] == 1
    assert numbers["copies"]["latents"]["generated_closer_than_q05"] == 1


class Motion(nn.Module):
    """Stands for I3D: the colours of the first frame, and how much frames differ from it."""

    def forward(self, clips: torch.Tensor) -> torch.Tensor:
        small = nn.functional.adaptive_avg_pool3d(clips, (clips.shape[2], 2, 2))
        return torch.cat([small[:, :, 0].flatten(1), (small - small[:, :, :1]).abs().mean(2).flatten(1)], dim=1)


def test_fvd_compares_equally_many_videos_of_each_set(rooms: SceneCollection, tmp_path: Path) -> None:
    settings = replace(SETTINGS, fvd=True)
    with pytest.raises(ValueError, match="no I3D"):
        evaluate_pipeline(small_pipeline(), rooms, tmp_path / "out", settings, MeanColor())
    numbers = evaluate_pipeline(small_pipeline(), rooms, tmp_path / "out", settings, MeanColor(), i3d=Motion())
    assert numbers["distances"]["num_videos"] == 3  # the scenes of the smallest set
    assert set(numbers["distances"]["fvd"]) == {"samples", "stage2", "train", "samples_to_train"}
    assert all(value > 0 for value in numbers["distances"]["fvd"].values())
    assert "fly-throughs of 3 scenes" in (tmp_path / "out" / "index.html").read_text()


def test_a_video_follows_the_cameras(rooms: SceneCollection) -> None:
    pipeline = small_pipeline()
    judge, still = SceneJudge(pipeline, Motion()), SceneJudge(pipeline)
    source = Views.stack([rooms.load_scene(rooms.split("test")[0]).source])
    with torch.no_grad():
        grid = pipeline.scene_autoencoder.encode(source)
    cameras = index_cameras(source.cameras, 0)
    moving = judge.video(grid, cameras)["video"]
    standing = judge.video(grid, index_cameras(cameras, torch.zeros(3, dtype=torch.long)))["video"]
    torch.testing.assert_close(moving[:12], standing[:12])
    assert float(standing[12:].abs().max()) < 1e-6 < float(moving[12:].abs().max())
    assert still.video(grid, cameras) == {}


def test_a_generator_without_f_and_g_is_judged(rooms: SceneCollection, tmp_path: Path) -> None:
    pipeline = small_pipeline(use_fine=False, use_global=False)
    numbers = evaluate_pipeline(pipeline, rooms, tmp_path / "out", SETTINGS, MeanColor())
    assert numbers["copies"]["num_scenes"]["generated"] == 3


def test_rooms_without_depth_are_judged_without_it(tmp_path: Path) -> None:
    collection = make_box_room_collection(tmp_path / "rooms", num_train=3, num_test=3, with_depth=False)
    numbers = evaluate(tmp_path / "out", collection)
    assert numbers["depth"]["reference"] is None
    assert "test" not in numbers["depth"]["sets"]
    assert "no depth" in (tmp_path / "out" / "index.html").read_text()


def test_real_depth_of_surfaces_beyond_the_box_counts_at_its_border() -> None:
    judge = SceneJudge(small_pipeline())
    cameras = index_cameras(judge.cameras, None)
    depths = torch.full((1, 4, 1, 32, 32), 1000.0)
    depths[..., 0, :] = 0
    counts = judge.real_depth(Views(cameras, torch.zeros(1, 4, 3, 32, 32), depths))
    histogram = DepthHistogram(counts, judge.far)
    assert histogram.surface_share == pytest.approx(31 / 32)
    assert histogram.quantile(1.0) <= judge.far
    assert judge.real_depth(Views(cameras, torch.zeros(1, 4, 3, 32, 32))) is None


@pytest.mark.slow
def test_command_makes_a_report_and_refuses_bad_options(
    rooms: SceneCollection, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    require_weights("fid-inception")
    small_pipeline().save_pretrained(tmp_path / "pipeline")
    options = [str(tmp_path / "pipeline"), "--data", str(rooms.root), "--output-dir", str(tmp_path / "out")]
    options += ["--views-per-scene", "2", "--num-inference-steps", "1", "2", "1", "--device", "cpu", "--fvd", "no"]
    command.main([*options, "--num-images", "6", "--num-train-scenes", "2"])
    assert "index.html" in capfd.readouterr().out
    numbers = json.loads((tmp_path / "out" / "eval.json").read_text())
    assert numbers["num_images"] == 6 and numbers["num_inference_steps"] == [1, 2, 1]
    assert "1, 2 and 1 denoising steps of g, c and f" in (tmp_path / "out" / "index.html").read_text()
    assert numbers["distances"]["fid"]["samples"] > numbers["distances"]["fid"]["train"]
    for more in (["--num-images", "8"], ["--num-images", "6", "--seed", "3"], ["--num-images", "5000"]):
        with pytest.raises(SystemExit) as exit_info:
            command.main([*options, *more])
        assert exit_info.value.code == 2
        error = capfd.readouterr().err.strip().splitlines()[-1]
        assert error.startswith("error: ")


def test_command_says_that_fvd_is_left_out(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.delenv("NFLDM_WEIGHTS", raising=False)
    options = command.Eval(tmp_path, tmp_path, tmp_path)
    assert not options.measures_fvd()
    assert "FVD is left out" in (printed := capsys.readouterr().out) and "nfldm-weights get i3d" in printed
    assert not replace(options, fvd="no").measures_fvd()


def test_evenly_takes_all_there_is() -> None:
    assert evenly(range(10), 5) == [0, 2, 4, 6, 8]
    assert evenly(range(3), 5) == [0, 1, 2]
