"""The measures of stage 1: what the encoder gets, scores view by view, and V optimised for one scene."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from functools import partial

import pytest
import torch
from jaxtyping import Float
from torch import Tensor

from nfldm_ns.autoencoder.checkpoints import read_run_config, save_scene_autoencoder
from nfldm_ns.autoencoder.grid_optimisation import GridOptimiserConfig, optimise_grid
from nfldm_ns.autoencoder.losses import StageOneLossConfig
from nfldm_ns.autoencoder.novel_views import (
    EncoderInput,
    SceneScores,
    ViewJudge,
    evaluate_novel_views,
    mean_training_image,
    reconstruct,
)
from nfldm_ns.autoencoder.perceptual import PerceptualNetwork
from nfldm_ns.autoencoder.scene_autoencoder import RenderedViews
from nfldm_ns.errors import UserInputError
from nfldm_ns.metrics.images import nearest_source_view
from nfldm_ns.pretrained.weights import load_lpips
from nfldm_ns.scenes.collection import Scene, SceneCollection
from nfldm_ns.scenes.views import SceneBatch, Views
from nfldm_ns.scenes.voxel_grid import VoxelGrid
from tests.pretrained import require_weights
from tests.small_models import random_grid, small_scene_autoencoder

COLOURS = StageOneLossConfig(lpips_mult=0.0, depth_mult=0.1, depth_norm="l1")


@pytest.fixture
def scene(box_room_collection: SceneCollection) -> Scene:
    return box_room_collection.load_scene(box_room_collection.split("test")[0])


@pytest.fixture
def batch(box_room_collection: SceneCollection, scene: Scene) -> SceneBatch:
    return box_room_collection.batch([scene])


class TestEncoderInput:
    def test_kinds_of_depth(self, scene: Scene) -> None:
        assert torch.equal(EncoderInput("dense").of(scene).source.depths, scene.source.depths)
        assert EncoderInput("none").of(scene).source.depths is None
        sparse = EncoderInput("sparse", num_points=20).of(scene).source.depths
        assert bool(((sparse > 0).flatten(1).sum(1) == 20).all())

    def test_sparse_points_depend_on_scene_and_seed_alone(self, scene: Scene) -> None:
        def points(name: str, seed: int) -> Tensor:
            return EncoderInput("sparse", None, 20, seed).of(replace(scene, scene_id=name)).source.depths

        assert torch.equal(points("a", 0), points("a", 0))
        assert not torch.equal(points("a", 0), points("b", 0))
        assert not torch.equal(points("a", 0), points("a", 1))

    def test_fewer_views_are_some_of_the_views(self, scene: Scene) -> None:
        fewer = EncoderInput("dense", 4).of(scene)
        assert torch.equal(fewer.source.images, scene.source.images[::2])  # the rooms' cameras stand in a ring
        assert torch.equal(fewer.target.images, scene.target.images)


class TestScores:
    def test_agree_with_the_evaluation_of_a_run(self, box_room_collection: SceneCollection) -> None:
        require_weights("lpips-vgg")
        collection, model, lpips = box_room_collection, small_scene_autoencoder(), load_lpips("vgg")
        batches = [collection.batch([collection.load_scene(i)]) for i in collection.split("test")]
        mean = mean_training_image(batches)
        expected = evaluate_novel_views(partial(reconstruct, model), batches, mean, lpips)
        ours, nearest = SceneScores(), SceneScores()
        for batch in batches:
            judge = ViewJudge(batch.target, batch.aabb, PerceptualNetwork(lpips))
            with torch.no_grad():
                ours.add(batch.scene_ids, judge.score(reconstruct(model, batch)))
            nearest.add(batch.scene_ids, judge.score_images(nearest_source_view(batch)))
        found = {**ours.mean(), **{f"nearest_view_{name}": value for name, value in nearest.mean().items()}}
        assert ours.num_images == expected["num_images"] == 8
        for name in ("psnr", "ssim", "lpips", "depth_mae_m", "depth_mae_in_box_m", "nearest_view_lpips"):
            assert found[name] == pytest.approx(expected[name], rel=1e-4)

    def test_rays_into_the_sky_are_counted_apart(self, batch: SceneBatch) -> None:
        depths = batch.target.depths.clone()
        depths[..., :8, :] = 0
        target = Views(batch.target.cameras, batch.target.images, depths)
        accumulation = torch.where(depths > 0, 0.75, 0.25)
        rendered = RenderedViews(target.images, depths + 0.5, accumulation, None)
        scores = SceneScores()
        scores.add(batch.scene_ids, ViewJudge(target, batch.aabb, None).score(rendered))
        means = scores.mean()
        assert means["accumulation_known"] == 0.75 and means["accumulation_unknown"] == 0.25
        assert means["depth_mae_m"] == pytest.approx(0.5, abs=1e-5)
        nothing = Views(target.cameras, target.images, torch.zeros_like(depths))
        assert ViewJudge(nothing, batch.aabb, None).score(rendered)["accumulation_unknown"][..., 1].sum() == 0

    def test_means_over_some_scenes(self) -> None:
        scores = SceneScores()
        pairs = torch.tensor([[[10.0, 1.0], [20.0, 1.0]], [[30.0, 1.0], [50.0, 1.0]]])
        pixels = torch.tensor([[[8.0, 4.0], [0.0, 0.0]], [[30.0, 10.0], [0.0, 0.0]]])
        scores.add(["a", "b"], {"psnr": pairs, "depth_mae_m": pixels, "unseen": torch.zeros(2, 2, 2)})
        assert scores.mean() == {"psnr": 27.5, "depth_mae_m": pytest.approx(38 / 14)}
        assert scores.mean(["a"]) == {"psnr": 15.0, "depth_mae_m": 2.0}
        assert scores.views("b", "psnr").tolist() == [30.0, 50.0]
        with pytest.raises(ValueError, match="do not join"):
            scores.add(["c"], {"psnr": pairs[:1]})


class TestUpperBound:
    def test_optimised_voxels_show_their_views_better(self, batch: SceneBatch) -> None:
        model = small_scene_autoencoder()
        with torch.no_grad():
            grid = model.encode(batch.source)
        before = {name: value.clone() for name, value in model.state_dict().items()}
        config = GridOptimiserConfig(max_steps=30, check_every=10)
        result = optimise_grid(model, grid, batch.source, COLOURS, None, config)
        assert len(result.losses) == 4 and result.steps == 30
        assert min(result.losses) < 0.9 * result.losses[0]
        assert bool((result.grid.density >= 0).all()) and not result.grid.features.requires_grad
        for name, value in model.state_dict().items():
            assert torch.equal(value, before[name])
        assert all(parameter.grad is None for parameter in model.parameters())
        again = optimise_grid(model, grid, batch.source, COLOURS, None, config)
        assert torch.equal(again.grid.features, result.grid.features)

    def test_it_starts_from_the_voxels_it_is_given(self, batch: SceneBatch) -> None:
        grid = random_grid(1)
        config = GridOptimiserConfig(max_steps=0)
        result = optimise_grid(small_scene_autoencoder(), grid, batch.source, COLOURS, None, config)
        torch.testing.assert_close(result.grid.density, grid.density, atol=2e-4, rtol=1e-4)
        torch.testing.assert_close(result.grid.features, grid.features)

    def test_it_ends_when_nothing_improves(self, batch: SceneBatch) -> None:
        config = GridOptimiserConfig(
            density_learning_rate=1e-12,
            feature_learning_rate=1e-12,
            check_every=2,
            patience=2,
            reductions=1,
            max_steps=100,
        )
        result = optimise_grid(small_scene_autoencoder(), random_grid(1), batch.source, COLOURS, None, config)
        assert result.converged and result.steps == 8  # two looks before each of two reductions

    def test_every_tensor_of_the_voxels_is_optimised(self, batch: SceneBatch) -> None:
        @dataclass
        class WithBackground(VoxelGrid):
            background: Float[Tensor, "batch codes 4"] | None = None

        model = small_scene_autoencoder()
        render = model.render
        # A code that shifts all colours stands for whatever the renderer makes of it.
        model.render = lambda grid, cameras: replace(  # type: ignore[method-assign]
            (shown := render(grid, cameras)), rgb=shown.rgb + grid.background.mean()
        )
        grid = random_grid(1)
        grid = WithBackground(grid.density, grid.features, grid.aabb, torch.zeros(1, 2, 4))
        config = GridOptimiserConfig(max_steps=4, check_every=2)
        result = optimise_grid(model, grid, batch.source, COLOURS, None, config)
        assert {field.name for field in fields(result.grid)} == {"density", "features", "aabb", "background"}
        assert float(result.grid.background.abs().sum()) > 0
        without = replace(grid, background=None)
        model.render = render  # type: ignore[method-assign]
        assert optimise_grid(model, without, batch.source, COLOURS, None, config).grid.background is None


def test_a_run_is_described_without_importing_what_it_names(tmp_path) -> None:
    save_scene_autoencoder(small_scene_autoencoder(), tmp_path, {})
    with pytest.raises(UserInputError, match="config.yml is missing"):
        read_run_config(tmp_path)
    text = "!!python/object:no.such.Class\nsize: !!python/tuple [1, 2]\nkind: !!python/name:no.such.name ''\n"
    (tmp_path / "config.yml").write_text(text + "loss: !!python/object/apply:os.system [{rgb_mult: 2.0}]\n")
    assert read_run_config(tmp_path) == {"size": [1, 2], "kind": "", "loss": [{"rgb_mult": 2.0}]}
    (tmp_path / "config.yml").write_text("a: [1")
    with pytest.raises(UserInputError, match="damaged"):
        read_run_config(tmp_path / "config.yml")
