"""The last stage of training: an image decoder that knows generated voxels."""

from __future__ import annotations

import copy
import math
import multiprocessing
import os
import signal
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.multiprocessing import start_processes

from nfldm_ns.autoencoder.checkpoints import load_scene_autoencoder, read_training_record
from nfldm_ns.autoencoder.perceptual import PerceptualNetwork
from nfldm_ns.autoencoder.scene_autoencoder import SceneAutoencoder, shrink_views
from nfldm_ns.autoencoder.scene_sampler import SceneCache
from nfldm_ns.commands import train_decoder as command
from nfldm_ns.diffusion import decoder_examples
from nfldm_ns.diffusion.decoder_examples import (
    ENCODED,
    GENERATED,
    DecoderExample,
    DecoderExamples,
    EncodedVoxels,
    ExampleConfig,
    GeneratedVoxels,
    Neighbours,
    quantised_share,
    require_same_places,
    require_same_voxels,
)
from nfldm_ns.diffusion.decoder_training import (
    DecoderBatch,
    DecoderLossConfig,
    DecoderTrainingConfig,
    DecoderTuning,
    _latent_rendering,
    train_decoder,
    train_stage1_decoder,
)
from nfldm_ns.diffusion.pipeline import COMPONENTS, NFLDMPipeline, load_pipeline
from nfldm_ns.errors import UserInputError
from nfldm_ns.generated.cameras import look_along
from nfldm_ns.latents.scene_latents import SceneLatents
from nfldm_ns.latents.voxel_store import VoxelStore, encode_collection
from nfldm_ns.method_configs.latent_presets import DECODER_PRESETS, DIFFUSION_PRESETS
from nfldm_ns.scenes.collection import SceneCollection, read_json
from nfldm_ns.scenes.views import Views, camera_rays, index_cameras, make_cameras, resize_cameras, with_poses
from nfldm_ns.training import loop
from nfldm_ns.training.run import read_metrics
from nfldm_ns.training.schedule import Schedule
from tests.interruption import Interrupted, interrupt
from tests.small_models import small_pipeline, small_scene_autoencoder
from tests.synthetic import make_box_room_collection, surround_cameras

EXAMPLES = ExampleConfig(num_scenes=4, num_views=3, num_inference_steps=4, max_noise=0.8)
SCHEDULE = Schedule(max_steps=6, batch_size=2, warmup_steps=1, log_every=2, checkpoint_every=2, report_to="none")
CONFIG = DecoderTrainingConfig(SCHEDULE, DecoderLossConfig(adversarial_levels=(0, 1)), EXAMPLES, num_views=1)
PLAIN = replace(CONFIG, losses=DecoderLossConfig(lpips_mult=0, denoised_lpips_mult=0, adversarial_mult=0))


@pytest.fixture(scope="module")
def perceptual() -> PerceptualNetwork:
    return new_perceptual()


def new_perceptual() -> PerceptualNetwork:
    from lpips import LPIPS

    torch.manual_seed(0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        metric = LPIPS(net="vgg", pretrained=False, pnet_rand=True, verbose=False)
    return PerceptualNetwork(metric.eval().requires_grad_(False))


@pytest.fixture(scope="module")
def pipeline_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("generator") / "pipeline"
    small_pipeline().save_pretrained(folder)
    return folder


def make_examples(store: VoxelStore, folder: Path, pipeline: NFLDMPipeline, **changes) -> DecoderExamples:
    examples = DecoderExamples(folder, store, SceneCache(store.load_collection(), 1.0), replace(EXAMPLES, **changes))
    examples.make(GeneratedVoxels(pipeline), on_progress=lambda share: None)
    return examples


def weights(pipeline: NFLDMPipeline) -> dict[str, Tensor]:
    found = {}
    for name in COMPONENTS:
        model = getattr(pipeline, name)
        if model is not None:
            found |= {f"{name}.{key}": value.clone() for key, value in model.state_dict().items()}
    return found


def assert_equal(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> None:
    assert ours.keys() == theirs.keys()
    assert not [name for name, value in ours.items() if not torch.equal(value, theirs[name])]


def silent(share: float, losses: dict[str, float]) -> None:
    pass


# Examples


def test_examples_made_twice_or_in_two_parts_are_equal(store, tmp_path):
    first = make_examples(store, tmp_path / "a", small_pipeline())
    again = DecoderExamples(tmp_path / "b", store, first.cache, EXAMPLES)
    again.make(GeneratedVoxels(small_pipeline()), [3, 1], on_progress=lambda share: None)
    again.path(1).write_bytes(b"cut off")
    again.make(GeneratedVoxels(small_pipeline()), on_progress=lambda share: None)
    for place in range(len(first)):
        assert_equal(load_file(first.path(place)), load_file(again.path(place)))
    assert {first.scene_id(place) for place in range(3)} == set(store.splits["train"]), "each comes once"


def test_finished_examples_are_not_made_again(store, tmp_path, monkeypatch):
    examples = make_examples(store, tmp_path, small_pipeline())
    monkeypatch.setattr(decoder_examples, "encode_latents", None)
    source = GeneratedVoxels(small_pipeline())
    examples.make(source, on_progress=lambda share: None)
    examples.path(0).unlink()
    examples.make(source, [], on_progress=lambda share: None)  # a process without a share in them
    assert not examples.path(0).exists()


@pytest.mark.parametrize("flow", [False, True])
def test_little_noise_gives_the_round_trip_and_more_does_not(store, tmp_path, flow):
    little = make_examples(store, tmp_path / "little", small_pipeline(flow=flow), max_noise=1e-4)
    much = make_examples(store, tmp_path / "much", small_pipeline(flow=flow), max_noise=1.0)
    for place in range(len(little)):
        example = little.load(place)
        assert float(example.share) == 0
        for part in (example.features, example.accumulation):
            assert torch.equal(part["round_trip"], part["denoised"])
    noisy = [much.load(place) for place in range(len(much))]
    shares = [float(example.share) for example in noisy]
    assert len(set(shares)) > 1 and max(shares) > 0
    for example in noisy:
        same = torch.equal(example.features["round_trip"], example.features["denoised"])
        assert same == (float(example.share) == 0)


def test_examples_see_what_rendering_the_round_trip_sees(store, tmp_path):
    pipeline = small_pipeline()
    examples = make_examples(store, tmp_path, pipeline)
    example, real = examples.load(0), examples.real_views(0)
    grid = store.grid([examples.scene_id(0)])
    stage2 = pipeline.latent_autoencoder
    with torch.no_grad():
        shown = pipeline.scene_autoencoder.render(
            stage2.decode(stage2.encode(grid)), Views.stack([real[example.views]]).cameras
        )
    torch.testing.assert_close(example.features["round_trip"], shown.maps.features[0], atol=1e-2, rtol=1e-2)
    torch.testing.assert_close(example.accumulation["round_trip"], shown.maps.accumulation[0], atol=1e-2, rtol=1e-2)


def test_latents_of_examples_decode_to_what_was_rendered(store, tmp_path):
    pipeline = small_pipeline()
    examples = make_examples(store, tmp_path, pipeline, max_noise=1.0)
    example, real = examples.load(1), examples.real_views(1)
    cameras = Views.stack([real[example.views]]).cameras
    for kind in GENERATED:
        with torch.no_grad():
            grid = pipeline.latent_autoencoder.decode(example.latents[kind])
            maps = pipeline.scene_autoencoder.render_maps(grid, cameras)
        torch.testing.assert_close(maps.features[0], example.features[kind], atol=2e-2, rtol=2e-2)


def test_f_is_sampled_given_the_true_rest_and_everything_else_stays(store, tmp_path):
    pipeline = small_pipeline()
    plain = make_examples(store, tmp_path / "plain", pipeline)
    sampled = make_examples(store, tmp_path / "sampled", pipeline, sampled_fine=1.0)
    some = make_examples(store, tmp_path / "some", pipeline, sampled_fine=0.5, num_scenes=12)
    for place in range(len(plain)):
        ours, theirs = sampled.load(place), plain.load(place)
        assert torch.equal(ours.features["denoised"], theirs.features["denoised"])
        found, true = ours.latents["round_trip"], theirs.latents["round_trip"]
        assert torch.equal(found.global_latent, true.global_latent) and torch.equal(found.coarse, true.coarse)
        assert not torch.isclose(found.fine, true.fine).any(dim=1).all(), "f is another"
        assert not torch.equal(ours.features["round_trip"], theirs.features["round_trip"])
    again = make_examples(store, tmp_path / "whole", pipeline, num_scenes=12)
    same = [
        torch.equal(some.load(place).latents["round_trip"].fine, again.load(place).latents["round_trip"].fine)
        for place in range(12)
    ]
    assert 0 < sum(same) < 12, "a share of them"
    with pytest.raises(UserInputError, match="has not: leave it"):
        config = replace(PLAIN, examples=replace(EXAMPLES, sampled_fine=0.5))
        train_decoder(small_pipeline(use_fine=False), store, tmp_path / "run", config, on_progress=silent)


def test_neighbours_are_a_step_beside_and_see_the_denoised_voxels(store, tmp_path):
    pipeline = small_pipeline()
    plain = make_examples(store, tmp_path / "plain", pipeline)
    examples = make_examples(store, tmp_path / "beside", pipeline, neighbours=True)
    for place in range(len(examples)):
        example, without = examples.load(place), plain.load(place)
        assert without.neighbours is None
        torch.testing.assert_close(example.features["denoised"], without.features["denoised"])
        beside = example.neighbours
        cameras = examples.real_views(place)[example.views].cameras
        moved = beside.camera_to_worlds[..., 3] - cameras.camera_to_worlds[..., 3]
        assert float(moved[:, :2].abs().max()) <= 0.13 + 1e-6 and float(moved[:, 2].abs().max()) < 1e-6
        turn = beside.camera_to_worlds[..., :3] @ cameras.camera_to_worlds[..., :3].transpose(-1, -2)
        angle = torch.atan2(turn[:, 1, 0], turn[:, 0, 0]).abs()
        assert 0 < float(angle.max()) <= math.radians(15) + 1e-4
        grid = pipeline.latent_autoencoder.decode(example.latents["denoised"])
        theirs = index_cameras(with_poses(cameras, beside.camera_to_worlds), None)
        expected = pipeline.scene_autoencoder.render_maps(grid, theirs)
        torch.testing.assert_close(beside.features, expected.features[0], atol=0.02, rtol=0.02)
    # Examples without neighbours are made again where they are asked for.
    again = make_examples(store, tmp_path / "plain", pipeline, neighbours=True)
    assert again.load(0).neighbours is not None


def test_shares_are_whole_steps_of_the_schedule():
    pipeline, config = small_pipeline(), replace(EXAMPLES, num_inference_steps=10)
    assert [quantised_share(pipeline, share, config) for share in (0.0, 0.04, 0.26, 1.0)] == [0, 0, 0.3, 1]


def test_a_pipeline_without_f_and_one_with_maps_make_examples(store, tmp_path):
    make_examples(store, tmp_path / "c", small_pipeline(use_fine=False), num_scenes=2)
    maps = {"bev_classes": 2, "bev_size": (16, 16), "bev_dropout": 0.1}
    make_examples(store, tmp_path / "bev", small_pipeline(maps=maps), num_scenes=2)


def test_examples_of_encoded_voxels_are_what_stage_1_renders(store, tmp_path):
    stage1, chosen = small_scene_autoencoder(), replace(EXAMPLES, kinds=ENCODED, neighbours=True)
    examples = DecoderExamples(tmp_path, store, SceneCache(store.load_collection(), 1.0), chosen)
    examples.make(EncodedVoxels(stage1), on_progress=lambda share: None)
    names = {name for name in load_file(examples.path(0)) if not name.startswith("neighbours.")}
    assert names == {"views", "share", "encoded.features", "encoded.accumulation"}
    example, real = examples.load(0), examples.real_views(0)
    assert example.latents == {} and float(example.share) == 0
    grid, cameras = store.grid([examples.scene_id(0)]), Views.stack([real[example.views]]).cameras
    beside = example.neighbours
    seen = [(example.features["encoded"], example.accumulation["encoded"]), (beside.features, beside.accumulation)]
    for found, theirs in zip(seen, (cameras, with_poses(cameras, beside.camera_to_worlds[None])), strict=True):
        with torch.no_grad():
            maps = stage1.render_maps(grid, theirs)
        for part, expected in zip(found, (maps.features, maps.accumulation), strict=True):
            torch.testing.assert_close(part, expected[0], atol=1e-2, rtol=1e-2)


def test_example_files_made_before_there_were_other_kinds_are_read(tmp_path):
    path, kinds = tmp_path / "000000.safetensors", ("round_trip", "denoised")
    shapes = {"features": (3, 4, 16, 16), "accumulation": (3, 1, 16, 16)}
    shapes |= {"global_latent": (1, 8), "coarse": (1, 4, 2, 8, 8), "fine": (1, 4, 8, 8)}
    tensors = {f"{kind}.{name}": torch.rand(shape).half() for kind in kinds for name, shape in shapes.items()}
    save_file({**tensors, "views": torch.arange(3), "share": torch.tensor(0.5)}, path)
    example = DecoderExample.load(path)
    assert tuple(example.features) == tuple(example.accumulation) == tuple(example.latents) == kinds
    assert torch.equal(example.features["denoised"], tensors["denoised.features"].float())
    with pytest.raises(UserInputError, match="is no example for a decoder"):
        DecoderExample.load(path, ENCODED)


# Losses


def random_batch(masked: bool = False) -> DecoderBatch:
    cameras = surround_cameras(2, 32, torch.Generator().manual_seed(0))
    masks = None
    if masked:
        masks = torch.ones(2, 1, 32, 32, dtype=torch.bool)
        masks[..., 8:20, 4:30] = False
    maps = ({kind: torch.rand(2, c, 16, 16) for kind in GENERATED} for c in (4, 1))
    stage2 = small_pipeline().latent_autoencoder
    shapes = ((stage2.global_dim,), stage2.coarse_shape, stage2.fine_shape)
    latents = {kind: SceneLatents(*(torch.randn(1, *shape) for shape in shapes)) for kind in GENERATED}
    real = Views(cameras, torch.rand(2, 3, 32, 32), torch.rand(2, 1, 32, 32) + 0.5, masks)
    return DecoderBatch(*maps, real, torch.tensor([0.0, 0.5]), latents)


def new_model(perceptual: PerceptualNetwork, **changes) -> DecoderTuning:
    return DecoderTuning(small_scene_autoencoder().decoder, replace(CONFIG.losses, **changes), perceptual)


def test_gradients_of_decoder_and_discriminator_do_not_mix(perceptual):
    model = new_model(perceptual)
    losses = model(random_batch())
    assert set(losses) == {
        *("rgb_loss", "lpips_loss", "denoised_lpips_loss", "adversarial_loss", "discriminator_loss"),
    }
    for name, loss in losses.items():
        model.zero_grad()
        loss.backward(retain_graph=True)
        moved = {
            part: any(p.grad is not None and p.grad.any() for p in getattr(model, part).parameters())
            for part in ("decoder", "discriminator")
        }
        of_discriminator = name == "discriminator_loss"
        assert moved == {"decoder": not of_discriminator, "discriminator": of_discriminator}, name
    assert not [name for name, _ in model.named_parameters() if "perceptual" in name]


def test_a_tuned_latent_decoder_learns_and_what_encodes_and_renders_does_not(perceptual):
    pipeline, batch = small_pipeline(), random_batch()
    rendering = _latent_rendering(pipeline.latent_autoencoder, pipeline.scene_autoencoder, torch.device("cpu"))
    model = DecoderTuning(pipeline.scene_autoencoder.decoder, CONFIG.losses, perceptual, rendering)
    batch.features = batch.accumulation = {}  # which are made anew
    losses = model(batch)
    assert "depth_loss" in losses
    sum(losses.values()).backward()
    stage2 = rendering.latent_autoencoder
    encoding = {id(p) for part in stage2.encoding.values() for p in part.parameters()}
    moved = [p for p in stage2.parameters() if p.grad is not None and p.grad.any()]
    assert moved and not [p for p in moved if id(p) in encoding]
    model.zero_grad()
    model(batch)["discriminator_loss"].backward()
    assert all(p.grad is None or not p.grad.any() for p in rendering.parameters())
    assert not [name for name, _ in model.named_parameters() if "scene_autoencoder" in name]


class Plane(torch.nn.Module):
    """Decodes features that are colours already."""

    def forward(self, features: Tensor, accumulation: Tensor, height: int | None = None) -> Tensor:
        return features[:, :3] * 2 - 1


def test_encoded_voxels_have_all_losses_but_those_of_denoised_ones(perceptual):
    model, batch = new_model(perceptual), random_batch()
    maps = ({"encoded": group["round_trip"]} for group in (batch.features, batch.accumulation))
    losses, expected = model(DecoderBatch(*maps, batch.real, batch.share, {})), model(batch)
    assert set(losses) == {"rgb_loss", "lpips_loss", "adversarial_loss", "discriminator_loss"}
    for name in ("rgb_loss", "lpips_loss"):
        assert torch.equal(losses[name], expected[name])


@pytest.mark.parametrize("swimming", [0.0, 0.3])
def test_consistency_is_what_swims_and_not_what_stays(swimming, perceptual):
    """A wall 2 m ahead with stripes, seen from two places: stripes that stay with the wall cost nothing."""
    poses = look_along(torch.tensor([[0.0, 0.0, 1.0], [0.1, 0.0, 1.0]]), torch.full((2,), math.pi / 2), torch.zeros(2))
    size = 64
    cameras = make_cameras(poses, 32.0, 32.0, 32.0, 32.0, size, size)

    def stripes(camera: int) -> Tensor:
        origins, directions = camera_rays(cameras, size, size)
        x = origins[camera, 0] + 2 * directions[camera, ..., 0]
        return (0.5 + 0.3 * torch.sin(3 * x)).expand(1, 3, size, size)

    depth = torch.full((1, 1, size, size), 2.0)
    beside = Neighbours(poses[1:], stripes(1) + swimming, torch.ones_like(depth), depth, depth)
    real = Views(index_cameras(cameras, torch.tensor([0])), stripes(0))
    maps = (dict.fromkeys(GENERATED, value) for value in (stripes(0), torch.ones_like(depth)))
    batch = DecoderBatch(*maps, real, torch.zeros(1), {}, beside)
    model = DecoderTuning(Plane(), replace(PLAIN.losses, consistency_mult=2.0), None)
    losses = model(batch)
    assert float(losses["consistency_loss"]) == pytest.approx(2 * swimming, abs=2e-3)
    assert "consistency_loss" not in model(replace(batch, neighbours=None))


def test_nothing_pulls_at_masked_pixels(perceptual):
    model, batch = new_model(perceptual), random_batch(masked=True)
    shown = {}

    def decode(batch: DecoderBatch, kind: str) -> Tensor:
        shown[kind] = torch.rand(2, 3, 32, 32).requires_grad_()
        return shown[kind]

    model.decode = decode
    sum(model(batch).values()).backward()
    for images in shown.values():
        assert float(torch.where(batch.real.masks, 0, images.grad).abs().max()) == 0
        assert float(images.grad.abs().max()) > 0


def test_the_noisier_the_latents_the_less_counts_the_distance(perceptual):
    model, batch = new_model(perceptual, denoised_lpips_mult=1.0, lpips_mult=1.0), random_batch()
    batch.features["denoised"], batch.accumulation["denoised"] = (
        batch.features["round_trip"],
        batch.accumulation["round_trip"],
    )
    for share in (0.0, 0.25, 1.0):
        losses = model(replace(batch, share=torch.full((2,), share)))
        torch.testing.assert_close(losses["denoised_lpips_loss"], (1 - share) * losses["lpips_loss"])


# Training


def test_only_the_decoder_changes_and_the_pipeline_samples(store, pipeline_folder, perceptual, tmp_path):
    before = weights(load_pipeline(pipeline_folder))
    tuned = train_decoder(
        load_pipeline(pipeline_folder), store, tmp_path, CONFIG, perceptual=perceptual, on_progress=silent
    )
    saved = load_pipeline(tmp_path / "pipeline")
    after = weights(saved)
    assert_equal(weights(tuned), after)
    changed = {name for name, value in before.items() if not torch.equal(value, after[name])}
    assert changed == {name for name in before if name.startswith("scene_autoencoder.decoder.")}
    assert saved.config.temperatures == load_pipeline(pipeline_folder).config.temperatures
    assert str(tmp_path) not in (tmp_path / "pipeline" / "model_index.json").read_text()
    output = saved(1, torch.Generator().manual_seed(0), num_inference_steps=2)
    assert bool(saved.scene_autoencoder.render(output.grids, output.cameras).rgb.isfinite().all())
    assert read_metrics(tmp_path)[-1]["step"] == 6
    # Tuned on the same voxels again: another decoder does not make them strange.
    require_same_voxels(store, saved.scene_autoencoder)


def test_both_decoders_are_tuned_and_latents_stay(store, pipeline_folder, perceptual, tmp_path):
    before = weights(load_pipeline(pipeline_folder))

    def run(folder: Path, on_progress=silent) -> dict[str, Tensor]:
        config = replace(CONFIG, tune_latent_decoder=True)
        pipeline = load_pipeline(pipeline_folder)
        return weights(train_decoder(pipeline, store, folder, config, perceptual=perceptual, on_progress=on_progress))

    after = run(tmp_path / "whole")
    assert_equal(weights(load_pipeline(tmp_path / "whole" / "pipeline")), after)
    changed = {name for name, value in before.items() if not torch.equal(value, after[name])}
    stage2 = load_pipeline(pipeline_folder).latent_autoencoder
    encoding = {id(p) for part in stage2.encoding.values() for p in part.parameters()}
    decoding = {f"latent_autoencoder.{name}" for name, p in stage2.named_parameters() if id(p) not in encoding}
    assert changed == decoding | {name for name in before if name.startswith("scene_autoencoder.decoder.")}
    with pytest.raises(Interrupted):
        run(tmp_path / "parts", interrupt)
    assert_equal(run(tmp_path / "parts"), after)


@pytest.mark.parametrize("both", [False, True])
def test_a_decoder_is_tuned_for_consistency_and_resumes(store, pipeline_folder, tmp_path, both):
    config = replace(PLAIN, losses=replace(PLAIN.losses, consistency_mult=1.0), tune_latent_decoder=both)
    whole = train_decoder(load_pipeline(pipeline_folder), store, tmp_path / "whole", config, on_progress=silent)
    assert read_metrics(tmp_path / "whole")[-1]["consistency_loss"] > 0
    with pytest.raises(Interrupted):
        train_decoder(load_pipeline(pipeline_folder), store, tmp_path / "cut", config, on_progress=interrupt)
    resumed = train_decoder(load_pipeline(pipeline_folder), store, tmp_path / "cut", config, on_progress=silent)
    assert_equal(weights(whole), weights(resumed))


def tune_stage1(store: VoxelStore, folder: Path, config=PLAIN, on_progress=silent, **options) -> SceneAutoencoder:
    begun_from = options.pop("begun_from", None) or store.load_autoencoder()
    return train_stage1_decoder(begun_from, store, folder, config, on_progress=on_progress, **options)


def test_only_the_image_decoder_of_stage_1_changes_and_it_resumes(store, perceptual, tmp_path):
    config = replace(CONFIG, losses=replace(CONFIG.losses, consistency_mult=1.0))
    tuned = tune_stage1(store, tmp_path / "whole", config, perceptual=perceptual)
    before, after = store.load_autoencoder().state_dict(), load_scene_autoencoder(tmp_path / "whole").state_dict()
    assert_equal(tuned.state_dict(), after)
    changed = {name for name, value in before.items() if not torch.equal(value, after[name])}
    assert changed == {name for name in before if name.startswith("decoder.")}
    last = read_metrics(tmp_path / "whole")[-1]
    assert last["step"] == 6 and last["consistency_loss"] > 0 and "denoised_lpips_loss" not in last
    with pytest.raises(Interrupted):
        tune_stage1(store, tmp_path / "parts", config, interrupt, perceptual=perceptual)
    assert not (tmp_path / "parts" / "scene_autoencoder").exists()
    (tmp_path / "parts" / "examples" / "000002.safetensors").unlink()
    assert_equal(tune_stage1(store, tmp_path / "parts", config, perceptual=perceptual).state_dict(), after)


def test_a_tuned_stage_1_encodes_the_same_voxels_and_is_tuned_again(store, tmp_path):
    tune_stage1(store, tmp_path / "first", replace(PLAIN, decoder_blocks=2))
    begun_from = load_scene_autoencoder(tmp_path / "first")
    assert begun_from.config.decoder_blocks == 2
    record = read_training_record(tmp_path / "first")
    assert record["step"] == 5 and record["data"] == store.description["collection"]
    again = encode_collection(store.load_collection(), begun_from, tmp_path / "voxels")
    for scene_id in store.scene_ids:
        assert_equal(load_file(store.path(scene_id)), load_file(again.path(scene_id)))
    first = {name: value.clone() for name, value in begun_from.state_dict().items()}
    second = tune_stage1(store, tmp_path / "second", begun_from=begun_from).state_dict()
    assert all(torch.equal(value, second[name]) != name.startswith("decoder.") for name, value in first.items())


def test_images_of_encoded_voxels_become_like_the_real_ones(store, tmp_path):
    schedule = replace(SCHEDULE, max_steps=100, learning_rate=5e-3, log_every=20)
    tune_stage1(store, tmp_path, replace(PLAIN, schedule=schedule))
    losses = [entry["rgb_loss"] for entry in read_metrics(tmp_path)]
    assert losses[-1] < 0.9 * losses[0], losses


def test_runs_are_told_apart_by_what_has_a_say_in_them(store, pipeline_folder, tmp_path):
    train_decoder(load_pipeline(pipeline_folder), store, tmp_path / "generator", PLAIN, on_progress=silent)
    tune_stage1(store, tmp_path / "stage1")
    generator, stage1 = (read_json(tmp_path / name / "run.json") for name in ("generator", "stage1"))
    shared = {"kind", "voxels", "seed", "batch_size", "num_views", "discriminator_rate", "examples", "losses"}
    assert set(generator) == shared | {"pipeline", "temperatures", "scheduler"}, "as of runs begun before"
    assert generator["kind"] == "image decoder"
    assert set(generator["examples"]) == {"num_scenes", "num_views", "max_noise", "num_inference_steps", "seed"}
    losses = {"rgb_mult", "lpips_mult", "adversarial_mult", "adversarial_levels"}
    assert set(generator["losses"]) == losses | {"denoised_lpips_mult"}
    assert set(stage1) == shared | {"scene_autoencoder"}
    assert set(stage1["examples"]) == {"num_scenes", "num_views", "seed"} and set(stage1["losses"]) == losses
    tune_stage1(store, tmp_path / "stage1", replace(PLAIN, examples=replace(EXAMPLES, max_noise=0.5)))
    with pytest.raises(UserInputError, match="holds a training run"):
        tune_stage1(store, tmp_path / "generator")


def test_a_grown_decoder_shows_the_same_until_it_is_tuned(store, pipeline_folder):
    before, grown = load_pipeline(pipeline_folder), load_pipeline(pipeline_folder)
    autoencoder = grown.scene_autoencoder
    blocks = autoencoder.config.decoder_blocks + 2
    autoencoder.grow_decoder(blocks)
    grid = store.grid(store.splits["train"][:1])
    cameras = surround_cameras(2, 32, torch.Generator().manual_seed(0)).reshape((1, 2))
    assert torch.equal(autoencoder.render(grid, cameras).rgb, before.scene_autoencoder.render(grid, cameras).rgb)
    assert [len(level) for level in autoencoder.decoder.levels] == [blocks] * len(autoencoder.decoder.levels)
    with pytest.raises(ValueError, match="only grows"):
        autoencoder.grow_decoder(blocks - 1)


def test_a_decoder_grows_is_tuned_and_keeps_its_size(store, pipeline_folder, tmp_path):
    before = load_pipeline(pipeline_folder)
    blocks = before.scene_autoencoder.config.decoder_blocks + 1

    def run(folder: Path, on_progress=silent) -> dict[str, Tensor]:
        config = replace(PLAIN, decoder_blocks=blocks)
        pipeline = load_pipeline(pipeline_folder)
        return weights(train_decoder(pipeline, store, folder, config, on_progress=on_progress))

    expected = run(tmp_path / "whole")
    saved = load_pipeline(tmp_path / "whole" / "pipeline")
    assert saved.scene_autoencoder.config.decoder_blocks == blocks
    assert_equal(weights(saved), expected)
    new = [name for name in expected if name not in weights(before)]
    assert new and all(name.startswith("scene_autoencoder.decoder.levels.") for name in new)
    assert all(bool(expected[name].any()) for name in new if name.endswith("conv2.weight"))  # zeros before
    with pytest.raises(Interrupted):
        run(tmp_path / "resumed", interrupt)
    assert_equal(run(tmp_path / "resumed"), expected)
    require_same_voxels(store, saved.scene_autoencoder)  # a larger image decoder does not make voxels strange
    with pytest.raises(UserInputError, match="--decoder-blocks is 0"):
        train_decoder(saved, store, tmp_path / "less", replace(PLAIN, decoder_blocks=0))


@pytest.fixture(scope="module")
def larger(store, tmp_path_factory) -> SceneCollection:
    """The rooms of the store, seen by the same cameras at twice their size."""
    folder = tmp_path_factory.mktemp("larger") / "rooms"
    return make_box_room_collection(folder, num_train=3, num_test=1, image_size=64)


UPSAMPLING = replace(CONFIG, upsampling_channels=8, losses=replace(CONFIG.losses, window=32))


def test_a_new_upsampler_makes_the_same_pictures_larger(store):
    before, grown = small_scene_autoencoder(), small_scene_autoencoder()
    grown.grow_decoder(upsampling_channels=8)
    torch.nn.init.zeros_(grown.decoder.upsampler.out.weight)
    assert grown.image_size == (64, 64) and grown.config.focal_length == 32.0 and grown.upsampling == 2
    grid = store.grid(store.splits["train"][:1])
    small, large = (surround_cameras(2, size, torch.Generator().manual_seed(0)).reshape((1, 2)) for size in (32, 64))
    expected = before.render(grid, small).rgb
    assert torch.equal(grown.render(grid, small).rgb, expected)
    assert grown.render(grid, large).maps.features.shape == before.render(grid, small).maps.features.shape
    enlarged = torch.nn.functional.interpolate(expected[0], scale_factor=2.0, mode="bilinear")
    assert torch.allclose(grown.render(grid, large).rgb[0], enlarged, atol=1e-5)
    with pytest.raises(ValueError, match="upsampler of width 8"):
        grown.grow_decoder(upsampling_channels=16)


def test_larger_views_are_encoded_as_the_smaller_ones(store):
    before, grown = small_scene_autoencoder(), small_scene_autoencoder()
    grown.grow_decoder(upsampling_channels=8)
    scene = store.load_collection().load_scene(store.splits["train"][0])
    small = Views.stack([scene.source])
    mask = torch.ones_like(small.depths, dtype=torch.bool)
    mask[..., :5, :] = False
    small = replace(small, masks=mask)

    def larger(values: Tensor) -> Tensor:
        return values.repeat_interleave(2, -1).repeat_interleave(2, -2)

    cameras = resize_cameras(small.cameras, 64, 64)
    large = Views(cameras, larger(small.images), larger(small.depths), larger(mask))
    expected, ours = before.encode(small), grown.encode(large)
    assert torch.allclose(ours.density, expected.density, atol=1e-5)
    assert torch.allclose(ours.features, expected.features, atol=1e-5)
    assert torch.equal(grown.encode(small).features, expected.features)
    with pytest.raises(ValueError, match="cannot be shrunk"):
        shrink_views(small, 3)


def test_an_upsampler_alone_is_tuned_on_larger_views(store, larger, pipeline_folder, perceptual, tmp_path):
    before = load_pipeline(pipeline_folder)
    options = {"perceptual": perceptual, "collection": larger, "on_progress": silent}

    def run(folder: Path, **changes) -> NFLDMPipeline:
        return train_decoder(load_pipeline(pipeline_folder), store, folder, UPSAMPLING, **{**options, **changes})

    tuned = run(tmp_path / "whole")
    saved, expected = load_pipeline(tmp_path / "whole" / "pipeline"), weights(tuned)
    assert_equal(weights(saved), expected)
    old = weights(before)
    assert all(torch.equal(expected[name], value) for name, value in old.items())
    assert all(".decoder.upsampler." in name for name in expected if name not in old)
    assert expected["scene_autoencoder.decoder.upsampler.out.bias"].any()  # zeros before
    output = saved(1, generator=torch.Generator().manual_seed(0), num_inference_steps=2)
    assert int(output.cameras.height.reshape(-1)[0]) == 64 and float(output.cameras.fx.reshape(-1)[0]) == 32.0
    rgb = saved.scene_autoencoder.render(output.grids, output.cameras).rgb
    assert rgb.shape[-2:] == (64, 64)
    require_same_voxels(store, saved.scene_autoencoder)  # what makes pictures larger does not make voxels strange
    with pytest.raises(Interrupted):
        run(tmp_path / "resumed", on_progress=interrupt)
    assert_equal(weights(run(tmp_path / "resumed")), expected)
    with pytest.raises(UserInputError, match="those of .* have 32 x 32: give the same places at that size with --data"):
        run(tmp_path / "small", collection=None)

    # How much of the detail counts is chosen afterwards.
    for detail in (0.5, 0.25):
        config = replace(UPSAMPLING, upsampling_detail=detail)
        train_decoder(load_pipeline(pipeline_folder), store, tmp_path / "whole", config, **options)
        scaled = weights(load_pipeline(tmp_path / "whole" / "pipeline"))
        for name, value in expected.items():
            assert torch.equal(scaled[name], detail * value if ".upsampler.out." in name else value)
    with pytest.raises(UserInputError, match="--upsampling-detail is -1: give a finite number of at least 0"):
        config = replace(UPSAMPLING, upsampling_detail=-1)
        train_decoder(load_pipeline(pipeline_folder), store, tmp_path / "none", config, **options)


def test_larger_views_are_of_the_same_places(store, larger, tmp_path):
    require_same_places(store, larger)
    with pytest.raises(UserInputError, match=r"lacks .* and 0 more of the scenes"):
        few = make_box_room_collection(tmp_path / "few", num_train=1, num_val=0, num_test=1, image_size=64)
        require_same_places(store, few)
    others = make_box_room_collection(tmp_path / "others", num_train=3, num_test=1, image_size=64, seed=5)
    with pytest.raises(UserInputError, match="has other cameras in"):
        require_same_places(store, others)


def test_a_resumed_run_gives_equal_weights(store, pipeline_folder, perceptual, tmp_path):
    def run(folder: Path, on_progress=silent) -> dict[str, Tensor]:
        pipeline = load_pipeline(pipeline_folder)
        return weights(train_decoder(pipeline, store, folder, CONFIG, perceptual=perceptual, on_progress=on_progress))

    whole = run(tmp_path / "whole")
    with pytest.raises(Interrupted):
        run(tmp_path / "parts", interrupt)
    assert not (tmp_path / "parts" / "pipeline").exists()
    (tmp_path / "parts" / "examples" / "000002.safetensors").unlink()
    assert_equal(run(tmp_path / "parts"), whole)


def test_a_step_is_the_same_however_it_is_split(store, pipeline_folder, tmp_path):
    parts = replace(SCHEDULE, batch_size=1, gradient_accumulation_steps=2)
    runs = [
        weights(train_decoder(load_pipeline(pipeline_folder), store, folder, config, on_progress=silent))
        for folder, config in ((tmp_path / "joint", PLAIN), (tmp_path / "parts", replace(PLAIN, schedule=parts)))
    ]
    difference = [(runs[0][name] - value).abs().mean() for name, value in runs[1].items() if ".decoder." in name]
    assert float(torch.stack(difference).max()) < 0.01 * SCHEDULE.learning_rate * SCHEDULE.max_steps


def test_pictures_do_not_change_the_weights(store, pipeline_folder, tmp_path):
    seen = replace(SCHEDULE, validation_steps=3, report_to="tensorboard")
    runs = [
        weights(train_decoder(load_pipeline(pipeline_folder), store, folder, config, on_progress=silent))
        for folder, config in ((tmp_path / "blind", PLAIN), (tmp_path / "seen", replace(PLAIN, schedule=seen)))
    ]
    assert_equal(*runs)


def test_pictures_of_encoded_voxels_do_not_change_the_weights_either(store, tmp_path):
    seen = replace(PLAIN, schedule=replace(SCHEDULE, validation_steps=3, report_to="tensorboard"))
    runs = [tune_stage1(store, tmp_path / name, config) for name, config in (("blind", PLAIN), ("seen", seen))]
    assert_equal(*(stage1.state_dict() for stage1 in runs))


def test_another_run_in_the_folder_is_refused(store, pipeline_folder, tmp_path):
    train_decoder(load_pipeline(pipeline_folder), store, tmp_path, PLAIN, on_progress=silent)
    other = replace(PLAIN, examples=replace(EXAMPLES, max_noise=0.5))
    with pytest.raises(UserInputError, match="max_noise 0.8 there, max_noise 0.5 here"):
        train_decoder(load_pipeline(pipeline_folder), store, tmp_path, other, on_progress=silent)


def _tune(folder: Path, pipeline_folder: Path, root: Path, schedule: Schedule) -> dict[str, Tensor]:
    pipeline, store = load_pipeline(pipeline_folder), VoxelStore.open(root)
    config = replace(CONFIG, schedule=schedule)
    return weights(train_decoder(pipeline, store, folder, config, perceptual=new_perceptual(), on_progress=silent))


def _work(rank: int, folder: Path, pipeline_folder: Path, root: Path) -> None:
    """One of two processes, as `accelerate launch --cpu` starts them."""
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE="2", LOCAL_WORLD_SIZE="2")
    os.environ["ACCELERATE_USE_CPU"] = "true"
    dist.init_process_group("gloo", init_method=f"file://{folder / 'meeting'}", world_size=2, rank=rank)
    found = _tune(folder / "joint", pipeline_folder, root, replace(SCHEDULE, batch_size=1))
    torch.save(found, folder / f"{rank}.pt")
    dist.destroy_process_group()


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_two_processes_do_what_one_does(store, pipeline_folder, tmp_path):
    start_processes(_work, (tmp_path, pipeline_folder, store.root), nprocs=2, start_method="forkserver")
    first, second = (torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(2))
    assert_equal(first, second)
    alone = _tune(tmp_path / "alone", pipeline_folder, store.root, SCHEDULE)
    for place in range(EXAMPLES.num_scenes):
        name = f"examples/{place:06d}.safetensors"
        assert_equal(load_file(tmp_path / "joint" / name), load_file(tmp_path / "alone" / name))
    difference = torch.cat([(first[name] - value).flatten().float() for name, value in alone.items()])
    assert float(difference.abs().mean()) < 0.01 * SCHEDULE.learning_rate * SCHEDULE.max_steps


def _killed(what: str, folder: Path, pipeline_folder: Path, root: Path) -> None:
    """A process that is killed in its third example, or its fourth step."""
    calls = iter(range(100))
    owner, name, last = (DecoderExamples, "_make", 2) if what == "examples" else (loop, "take_step", 3)
    before = getattr(owner, name)

    def die(*args: Any) -> Any:
        return os.kill(os.getpid(), signal.SIGKILL) if next(calls) == last else before(*args)

    setattr(owner, name, die)
    _tune(folder, pipeline_folder, root, SCHEDULE)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_killed_run_gives_equal_weights(store, pipeline_folder, tmp_path):
    whole = _tune(tmp_path / "whole", pipeline_folder, store.root, SCHEDULE)
    for what in ("examples", "steps"):
        folder = tmp_path / what
        process = multiprocessing.get_context("forkserver").Process(
            target=_killed, args=(what, folder, pipeline_folder, store.root)
        )
        process.start()
        process.join()
        assert process.exitcode == -signal.SIGKILL
        assert len(list((folder / "examples").glob("*.safetensors"))) == (2 if what == "examples" else 4)
        assert_equal(_tune(folder, pipeline_folder, store.root, SCHEDULE), whole)


# Bad input


@pytest.mark.parametrize("max_noise", [0.0, -0.1, 1.1, float("nan")])
def test_shares_that_are_none_are_refused(store, max_noise, tmp_path):
    with pytest.raises(UserInputError, match="--max-noise is .* above 0 and at most 1"):
        make_examples(store, tmp_path, small_pipeline(), max_noise=max_noise)


def test_voxels_of_another_stage_1_are_refused(store, tmp_path):
    pipeline = small_pipeline()
    with torch.no_grad():
        pipeline.scene_autoencoder.density_bias += 1
    with pytest.raises(UserInputError, match="another scene auto-encoder than the pipeline's"):
        train_decoder(pipeline, store, tmp_path / "run", PLAIN, on_progress=silent)
    assert not (tmp_path / "run").exists()


def test_a_stage_1_that_did_not_encode_the_voxels_is_refused(store, tmp_path):
    other = small_scene_autoencoder()
    with torch.no_grad():
        other.density_bias += 1
    with pytest.raises(UserInputError, match="another scene auto-encoder than the one given"):
        tune_stage1(store, tmp_path / "run", begun_from=other)
    with pytest.raises(ValueError, match="come from no latents"):
        tune_stage1(store, tmp_path / "run", replace(PLAIN, tune_latent_decoder=True))
    assert not (tmp_path / "run").exists()


def test_a_store_without_training_scenes_is_refused(store, tmp_path):
    description = copy.deepcopy(store.description)
    description["splits"]["train"] = []
    with pytest.raises(UserInputError, match="has no training scenes"):
        train_decoder(small_pipeline(), VoxelStore(store.root, description), tmp_path / "run", PLAIN)
    assert not (tmp_path / "run").exists()


# The command


def test_presets_are_those_of_the_other_stages():
    assert set(DECODER_PRESETS) == set(DIFFUSION_PRESETS)


def shared_options(store: VoxelStore, output: Path) -> list[str]:
    return [
        *("--voxels", str(store.root), "--output-dir", str(output), "--num-scenes", "2", "--num-views", "2"),
        *("--max-steps", "2", "--batch-size", "1", "--report-to", "none"),
    ]


def options(store: VoxelStore, pipeline: Path, output: Path) -> list[str]:
    own = ["--pipeline", str(pipeline), "--num-inference-steps", "3", "--max-noise", "0.9"]
    return [*shared_options(store, output), *own]


def stage1_options(store: VoxelStore, output: Path) -> list[str]:
    return [*shared_options(store, output), "--of-stage1"]


def test_command(store, pipeline_folder, perceptual, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("nfldm_ns.pretrained.weights.load_lpips", lambda net: perceptual.metric)
    command.main(options(store, pipeline_folder, tmp_path / "run"))
    assert f"The pipeline is in {tmp_path / 'run' / 'pipeline'}" in capsys.readouterr().out
    before, after = weights(load_pipeline(pipeline_folder)), weights(load_pipeline(tmp_path / "run" / "pipeline"))
    assert any(not torch.equal(value, after[name]) for name, value in before.items())


def test_command_makes_pictures_larger(store, larger, pipeline_folder, perceptual, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("nfldm_ns.pretrained.weights.load_lpips", lambda net: perceptual.metric)
    given = [*options(store, pipeline_folder, tmp_path / "run"), "--preset", "rooms128"]
    with pytest.raises(SystemExit):
        command.main(given)
    assert "give the same places at that size with --data" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()
    command.main([*given, "--data", str(larger.root), "--window", "32"])
    assert load_pipeline(tmp_path / "run" / "pipeline").scene_autoencoder.image_size == (64, 64)
    command.main([*stage1_options(store, tmp_path / "one"), "--upsampling-channels", "8", "--data", str(larger.root)])
    assert load_scene_autoencoder(tmp_path / "one").config.decoder_upsampling_channels == 8


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        (["--max-noise", "2"], "--max-noise is 2.0"),
        (["--sampled-fine", "-1"], "--sampled-fine is -1.0"),
        (["--num-views", "0"], "--num-views is 0"),
        (["--batch-size", "0"], "--batch-size"),
    ],
)
def test_command_says_what_is_wrong(
    store, pipeline_folder, perceptual, tmp_path, monkeypatch, capsys, changes, sentence
):
    monkeypatch.setattr("nfldm_ns.pretrained.weights.load_lpips", lambda net: perceptual.metric)
    with pytest.raises(SystemExit) as exit_info:
        command.main([*options(store, pipeline_folder, tmp_path / "run"), *changes])
    assert exit_info.value.code == 2
    assert sentence in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_command_does_not_write_over_the_generator_it_began_from(store, pipeline_folder, capsys):
    with pytest.raises(SystemExit):
        command.main(options(store, pipeline_folder, pipeline_folder.parent))
    assert "choose another output folder" in capsys.readouterr().err


def test_command_tunes_stage_1_and_again_from_the_result(store, perceptual, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("nfldm_ns.pretrained.weights.load_lpips", lambda net: perceptual.metric)
    command.main(stage1_options(store, tmp_path / "run"))
    assert f"The scene auto-encoder is in {tmp_path / 'run' / 'scene_autoencoder'}" in capsys.readouterr().out
    command.main([*stage1_options(store, tmp_path / "again"), "--initial-weights", str(tmp_path / "run")])
    tuned = [load_scene_autoencoder(tmp_path / name) for name in ("run", "again")]
    assert len({model.decoder.out.bias[0].item() for model in (store.load_autoencoder(), *tuned)}) == 3


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        (["--pipeline", "vizdoom-rooms"], "--pipeline does not go with --of-stage1"),
        (["--max-noise", "0.4"], "--max-noise does not go with --of-stage1"),
        (["--sampled-fine", "0.4"], "--sampled-fine does not go with --of-stage1"),
        (["--num-inference-steps", "20"], "--num-inference-steps does not go with --of-stage1"),
        (["--tune-latent-decoder"], "--tune-latent-decoder does not go with --of-stage1"),
        (["--no-of-stage1", "--initial-weights", "vizdoom-stage1"], "with --of-stage1: add that"),
        (["--initial-weights", "nowhere"], "There is no trained scene auto-encoder at nowhere"),
    ],
)
def test_command_says_what_does_not_go_with_stage_1(
    store, perceptual, tmp_path, monkeypatch, capsys, changes, sentence
):
    monkeypatch.setattr("nfldm_ns.pretrained.weights.load_lpips", lambda net: perceptual.metric)
    with pytest.raises(SystemExit) as exit_info:
        command.main([*stage1_options(store, tmp_path / "run"), *changes])
    assert exit_info.value.code == 2
    assert sentence in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_command_does_not_write_over_the_stage_1_it_began_from(store, perceptual, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("nfldm_ns.pretrained.weights.load_lpips", lambda net: perceptual.metric)
    store.load_autoencoder().save_pretrained(tmp_path / "scene_autoencoder")
    given = ["--initial-weights", str(tmp_path / "scene_autoencoder")]
    for arguments in (stage1_options(store, store.root), [*stage1_options(store, tmp_path), *given]):
        with pytest.raises(SystemExit):
            command.main(arguments)
        assert "choose another output folder" in capsys.readouterr().err
