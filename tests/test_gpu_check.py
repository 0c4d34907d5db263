"""The comparison of a GPU with the CPU (benchmarks/gpu/agreement.py), and what else only a GPU can show."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from gpu import agreement
from torch import nn

from nfldm_ns.diffusion.pipeline import NFLDMPipeline
from nfldm_ns.latents.round_trip import evaluate_round_trip
from nfldm_ns.latents.training import LatentLossConfig, LatentTrainingConfig, train_latent_autoencoder
from nfldm_ns.latents.voxel_store import encode_collection
from nfldm_ns.scenes.collection import SceneCollection
from nfldm_ns.scenes.views import SceneBatch, camera_rays
from nfldm_ns.training.schedule import Schedule
from tests.small_models import LATENT_SIZES, small_pipeline, small_scene_autoencoder


@pytest.fixture
def batch(box_room_collection: SceneCollection) -> SceneBatch:
    return box_room_collection.batch([box_room_collection.load_scene(box_room_collection.split("test")[0])])


class WeightedDistance(nn.Module):
    """Stands for LPIPS: it has weights, which must be where the images are."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(1), requires_grad=False)

    def forward(self, a: torch.Tensor, b: torch.Tensor, normalize: bool = False) -> torch.Tensor:
        return (self.weight * (a - b)).abs().mean(dim=(1, 2, 3))


def test_a_device_agrees_with_itself(batch: SceneBatch) -> None:
    found = agreement.compare(small_pipeline(), batch, "cpu")
    assert len({comparison.name for comparison in found}) == 10
    assert all(comparison.error == 0 and comparison.agrees for comparison in found)
    assert all(comparison.cpu_s > 0 and comparison.gpu_s > 0 for comparison in found)


def test_other_results_are_noticed(batch: SceneBatch) -> None:
    here, there = small_pipeline(), small_pipeline(seed=1)
    for pipeline in (here, there):
        pipeline.set_progress_bar_config(disable=True)
    with torch.no_grad():
        there.register_modules(latent_autoencoder=here.latent_autoencoder)
        computations = agreement.computations(here, batch)
        found = [agreement._compare(name, work, tolerance, here, there, 1) for name, work, tolerance in computations]
    differing = {comparison.name for comparison in found if not comparison.agrees}
    assert {"stage 1: encode", "stage 1: gradient", "a scene, sampled and rendered"} <= differing, found
    assert not differing & {"stage 2: encode", "stage 2: decode"}
    assert agreement.relative_error(torch.tensor([float("nan")]), torch.ones(1)) == float("inf")


def test_rays_are_exact_under_autocast(batch: SceneBatch) -> None:
    expected = camera_rays(batch.source.cameras, 8, 8)
    with torch.autocast("cpu", torch.bfloat16):
        found = camera_rays(batch.source.cameras, 8, 8)
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


@pytest.mark.gpu
def test_the_gpu_agrees_with_the_cpu(batch: SceneBatch) -> None:
    found = agreement.compare(small_pipeline(), batch, "cuda")
    assert not [comparison for comparison in found if not comparison.agrees]


@pytest.mark.gpu
def test_stage_2_trains_on_a_gpu_with_a_perceptual_distance_given_on_the_cpu(
    box_room_collection: SceneCollection, tmp_path: Path
) -> None:
    store = encode_collection(box_room_collection, small_scene_autoencoder(), tmp_path / "voxels", "cuda")
    schedule = Schedule(max_steps=2, batch_size=2, mixed_precision="bf16", report_to="none")
    config = LatentTrainingConfig(schedule=schedule, losses=LatentLossConfig(lpips_mult=1.0))
    distance = WeightedDistance()
    model = train_latent_autoencoder(store, tmp_path / "stage2", LATENT_SIZES, config, lpips=distance)
    assert next(model.parameters()).is_cuda
    scenes = store.splits["test"]
    found = evaluate_round_trip(
        store.load_autoencoder(), model, store, box_room_collection, scenes, lpips=WeightedDistance()
    )
    assert found["stage2"]["psnr"] > 0


@pytest.mark.gpu
def test_noise_of_cpu_generators_gives_the_same_scene_on_a_gpu() -> None:
    here, there = small_pipeline(), NFLDMPipeline(**small_pipeline().components).to("cuda")
    noise = [pipeline.draw_noise(1, torch.Generator().manual_seed(0)) for pipeline in (here, there)]
    assert all(torch.equal(a, b.cpu()) for a, b in zip(*noise, strict=True))
