"""Reconstruction by the prior: guidance, visibility, poses, and the command."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, EulerDiscreteScheduler
from PIL import Image

from nfldm_ns.autoencoder.losses import StageOneLossConfig
from nfldm_ns.commands import reconstruct
from nfldm_ns.diffusion.guiding import GuidedStep, guided_prediction
from nfldm_ns.diffusion.pipeline import NFLDMPipeline, scene_generators
from nfldm_ns.editing.blending import blend_voxels
from nfldm_ns.errors import UserInputError
from nfldm_ns.generated.cameras import look_along
from nfldm_ns.generated.scene_files import load_generated_scene
from nfldm_ns.reconstruction.fine_tuning import FineTuningConfig, fine_tune
from nfldm_ns.reconstruction.given_views import PlaceOptions, fit_to, photo, posed, views_of_images, views_of_scene
from nfldm_ns.reconstruction.poses import (
    PoseConfig,
    estimate_pose,
    exponential,
    moved_pose,
    pose_error,
    start_poses,
)
from nfldm_ns.reconstruction.reconstruction import (
    ReconstructionConfig,
    SeenPlace,
    reconstruct_scene,
    reconstruct_seen,
)
from nfldm_ns.reconstruction.rendering_guide import GuidanceConfig, RenderingGuide, RenderingLoss
from nfldm_ns.reconstruction.scene_code import cameras_around, sample_scene_code, scene_code_of_views
from nfldm_ns.reconstruction.visibility import Visibility, cameras_inside, seen_voxels
from nfldm_ns.scenes.collection import SceneCollection
from nfldm_ns.scenes.views import Views, resize_cameras, view_yaws
from nfldm_ns.scenes.voxel_grid import voxel_centres
from tests.small_models import random_grid, small_pipeline
from tests.synthetic import AABB, level_cameras

STEPS = 3
STEP = 1e-3  # of finite differences
QUICK = ReconstructionConfig(
    num_inference_steps=STEPS, resamplings=1, fine_tuning=FineTuningConfig(steps=2, prior_every=1), code_strength=0.7
)


def lively_pipeline(flow: bool = False, **changes) -> NFLDMPipeline:
    """Denoisers that answer to what they see: untrained ones begin with zeros as their last weights."""
    pipeline = small_pipeline(flow=flow, **changes)
    for name in ("coarse_denoiser", "fine_denoiser"):
        if getattr(pipeline, name) is not None:
            torch.nn.init.normal_(getattr(pipeline, name).unet.conv_out.weight, std=0.1)
    torch.nn.init.normal_(pipeline.global_denoiser.linear_out.weight, std=0.1)
    torch.nn.init.normal_(pipeline.latent_autoencoder.decoder.conv_out.weight, std=0.1)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


@pytest.fixture(scope="module")
def pipeline() -> NFLDMPipeline:
    torch.manual_seed(0)
    return lively_pipeline()


@pytest.fixture(scope="module")
def given(box_room_collection: SceneCollection) -> Views:
    """Two posed images with depth."""
    scene = box_room_collection.load_scene(box_room_collection.split("test")[0])
    return Views.stack([scene.source[[0, 3]]])


def same(first: torch.Tensor, second: torch.Tensor) -> bool:
    return bool(torch.equal(first, second))


# Guidance


@pytest.mark.parametrize("kind", ["epsilon", "sample", "v_prediction", "flow"])
def test_estimates_and_predictions_are_inverse_and_true(kind):
    clean, noise = torch.randn(1, 3, 4, 4), torch.randn(1, 3, 4, 4)
    signal, sigma = (0.7, 0.3) if kind == "flow" else (0.6, 0.8)
    predictions = {
        "epsilon": noise,
        "sample": clean,
        "v_prediction": signal * noise - sigma * clean,
        "flow": noise - clean,
    }
    step = GuidedStep("coarse", signal * clean + sigma * noise, lambda x: x, signal, sigma, kind)
    assert torch.allclose(step.estimate(predictions[kind]), clean, atol=1e-5)
    assert torch.allclose(step.prediction(clean), predictions[kind], atol=1e-5)


@pytest.mark.parametrize("scheduler", [DDIMScheduler, EulerDiscreteScheduler])
def test_guides_see_unit_variance_whatever_a_scheduler_scales_by(scheduler):
    """The estimate that a guide sees is the one that the scheduler makes its step of."""
    made = scheduler(prediction_type="epsilon")
    made.set_timesteps(5)
    sample = torch.randn(1, 2, 3, 3) * made.init_noise_sigma
    seen: list[GuidedStep] = []

    def guide(step: GuidedStep) -> torch.Tensor:
        seen.append(step)
        return step.predict(step.latents)

    timestep = made.timesteps[2]
    if scheduler is EulerDiscreteScheduler:
        made._step_index = 2
    predicted = guided_prediction(guide, made, "coarse", sample, timestep, lambda x: 0.1 * x, {})
    assert torch.allclose(predicted, 0.1 * sample, atol=1e-4)
    (step,) = seen
    assert step.signal**2 + step.noise**2 == pytest.approx(1, abs=1e-5)
    made.scale_model_input(sample, timestep)
    expected = made.step(predicted, timestep, sample).pred_original_sample
    if scheduler is DDIMScheduler and made.config.clip_sample:
        expected, estimate = expected, step.estimate(predicted).clamp(-1, 1)
    else:
        estimate = step.estimate(predicted)
    assert torch.allclose(estimate, expected, atol=1e-3, rtol=1e-3)


def smooth_loss(pipeline: NFLDMPipeline, given: Views):
    """Squared errors, whose finite differences are not troubled by kinks."""

    def loss(grid):
        return (pipeline.scene_autoencoder.render(grid, given.cameras).rgb - given.images).double().square().mean()

    return loss


@pytest.mark.parametrize("stage", ["global", "coarse", "fine"])
def test_the_gradient_of_the_guidance_is_that_of_finite_differences(given, stage):
    """Through decoder, renderer and image decoder, and for x_t through the denoiser, too; codes would make steps."""
    pipeline = lively_pipeline(quantize=False)
    pipeline.scene_autoencoder.register_to_config(num_feature_samples=16)  # all: which are the largest changes by steps
    latents = pipeline.latent_autoencoder.encode(random_grid(1))
    guide = RenderingGuide(pipeline, smooth_loss(pipeline, given), latents, GuidanceConfig())
    denoiser = getattr(pipeline, f"{stage}_denoiser")
    code = scene_code_of_views(pipeline, latents.global_latent, given[0].cameras)
    conditions = {} if stage == "global" else {"scene_code": code}
    if stage == "fine":
        conditions["coarse"] = latents.coarse
    noisy = 0.5 * torch.randn(1, *denoiser.sample_shape)

    def predict(x: torch.Tensor) -> torch.Tensor:
        return denoiser(x, torch.full((1,), 300.0), **conditions)

    step = GuidedStep(stage, noisy, predict, 0.8, 0.6, "v_prediction", conditions)
    _, _, through = guide.gradient(step)
    with torch.no_grad():
        estimate = step.estimate(predict(noisy))
    _, direct = guide.estimate_gradient(step, estimate)
    for gradient, point, decoded in (
        (through, noisy, lambda x: guide.decode(step, step.estimate(predict(x), x))),
        (direct, estimate, lambda x: guide.decode(step, x)),
    ):
        assert float(gradient.norm()) > 0
        direction = gradient / gradient.norm()
        with torch.no_grad():
            high, low = (float(guide.loss(decoded(point + sign * STEP * direction))) for sign in (1, -1))
        assert (high - low) / (2 * STEP) == pytest.approx(float(gradient.norm()), rel=0.1)


def test_guidance_of_no_weight_is_plain_sampling_to_the_bit(pipeline, given):
    latents = pipeline.latent_autoencoder.encode(random_grid(1))

    def sampled(**arguments):
        return pipeline(1, scene_generators(3, 1), STEPS, "latent", **arguments).latents

    def fails(grid):
        raise AssertionError("no loss is asked for")

    plain = sampled()
    guided = sampled(guide=RenderingGuide(pipeline, fails, latents, GuidanceConfig(scale=0)))
    assert all(same(a, b) for a, b in zip(plain.state_dict().values(), guided.state_dict().values(), strict=True))
    assert pipeline._guide is None


@pytest.mark.parametrize("gradient_of", ["estimate", "noisy"])
@pytest.mark.parametrize("flow", [False, True])
def test_guided_samples_show_the_images_better(given, gradient_of, flow):
    pipeline = lively_pipeline(flow=flow)
    latents = pipeline.latent_autoencoder.encode(random_grid(1))
    loss = RenderingLoss(pipeline.scene_autoencoder, given, StageOneLossConfig(lpips_mult=0, depth_mult=0))

    def final(scale: float) -> float:
        guide = RenderingGuide(
            pipeline, loss, latents, GuidanceConfig(scale=scale, omega=0.25, gradient_of=gradient_of)
        )
        grids = pipeline(1, scene_generators(3, 1), 5, guide=guide).grids
        with torch.no_grad():
            return float(loss(grids))

    assert final(1.0) < final(0.0)


def test_guidance_that_makes_no_sense_is_refused():
    with pytest.raises(ValueError, match="at least"):
        GuidanceConfig(scale=-1)
    with pytest.raises(ValueError, match="gradient_of='estimate'"):
        GuidanceConfig(gradient_of="noisy", steps=2)
    with pytest.raises(ValueError, match="no range"):
        FineTuningConfig(min_time=0.5, max_time=0.1)


# Visibility


def wall_view(distance: float = 1.0, size: int = 64):
    """A camera at the origin that looks along x at a wall across the whole image."""
    cameras = level_cameras(torch.zeros(1, 3), torch.zeros(1), size)
    return cameras, torch.full((1, 1, size, size), distance)


def test_a_wall_hides_what_is_behind_it():
    aabb, shape = torch.tensor(AABB), (8, 24, 24)
    cameras, depths = wall_view(1.0)
    seen = seen_voxels(cameras, depths, shape, aabb)
    x, y, z = voxel_centres(shape, aabb).unbind(-1)
    voxel = float(((aabb[1] - aabb[0]) / torch.tensor([24.0, 24.0, 8.0])).norm())
    frustum = (x > 0) & (y.abs() < x - 1e-4) & (z.abs() < x - 1e-4)  # 90 degrees
    assert bool(seen[frustum & (x < 1)].all())
    assert not bool(seen[x > 1 + voxel].any()) and not bool(seen[x < 0].any())
    outside = (y.abs() > x + 1e-4) | (z.abs() > x + 1e-4)
    assert not bool(seen[outside].any())


def test_masked_pixels_show_nothing():
    aabb, shape = torch.tensor(AABB), (8, 24, 24)
    cameras, depths = wall_view(2.0)
    masks = torch.ones(1, 1, 64, 64, dtype=torch.bool)
    masks[..., :32] = False  # the left half, which is y > 0
    seen = seen_voxels(cameras, depths, shape, aabb, masks)
    _, y, _ = voxel_centres(shape, aabb).unbind(-1)
    assert not bool(seen[y > 0.1].any()) and bool(seen[y < 0].any())


def test_known_cells_are_those_of_known_columns():
    voxels = torch.zeros(4, 8, 8, dtype=torch.bool)
    voxels[:2, :4, :4] = True  # half of the height of one cell's columns
    voxels[:, 5, 5] = True  # one column of another cell
    visibility = Visibility(voxels, column_share=0.5, cell_share=0.5)
    assert visibility.known_cells(4).tolist() == [[True, False], [False, False]]
    coarse, fine = visibility.unknown(4)
    assert coarse.tolist() == [[False, True], [True, True]]
    assert int((~fine).sum()) == 16 and not bool((~fine)[5, 5])


def test_mixed_voxels_are_those_of_either_where_weights_say_so():
    first, second = random_grid(1, 0), random_grid(1, 1)
    weights = torch.zeros(1, 1, *first.shape)
    weights[..., :8] = 1
    mixed = blend_voxels(first, second, weights)
    for name in ("density", "features"):
        assert same(getattr(mixed, name)[..., :8], getattr(second, name)[..., :8])
        assert same(getattr(mixed, name)[..., 8:], getattr(first, name)[..., 8:])
    assert same(mixed.background, first.background)


# Scene codes


def test_cameras_around_have_the_given_ones_among_them():
    given = level_cameras(torch.tensor([[0.2, 0.0, 0.1], [-0.2, 0.1, 0.1]]), torch.tensor([0.3, 0.3 + math.pi]), 32)
    around = cameras_around(given, 8)
    yaws = view_yaws(around)
    assert torch.allclose((yaws.diff()).remainder(2 * math.pi), torch.full((7,), math.pi / 4), atol=1e-4)
    assert torch.allclose(around.camera_to_worlds[[0, 4]], given.camera_to_worlds)
    assert torch.allclose(around.camera_to_worlds[1, :, 3], given.camera_to_worlds[:, :, 3].mean(0))


def test_given_cameras_keep_their_own_lenses():
    given = level_cameras(torch.tensor([[0.2, 0.0, 0.1], [-0.2, 0.1, 0.1]]), torch.tensor([0.3, 0.3 + math.pi]), 32)
    for name, values in (("fx", (16.0, 24.0)), ("fy", (17.0, 25.0)), ("cx", (16.0, 15.0)), ("cy", (14.0, 16.5))):
        setattr(given, name, torch.tensor(values)[:, None])
    around = cameras_around(given, 8)
    for name in ("fx", "fy", "cx", "cy"):
        own, found = getattr(given, name), getattr(around, name)
        assert torch.equal(found[[0, 4]], own) and torch.equal(found[[1, 2, 3, 5, 6, 7]], own[:1].expand(6, 1))


def test_scene_codes_are_kept_without_strength_and_new_with_all(pipeline, given):
    code = scene_code_of_views(pipeline, torch.randn(1, pipeline.latent_autoencoder.global_dim), given[0].cameras)
    sampled = [
        sample_scene_code(pipeline, code + shift, strength, STEPS, torch.Generator().manual_seed(1))
        for strength in (0.0, 0.4, 1.0)
        for shift in (0.0, 1.0)
    ]
    assert same(sampled[0], code)
    assert not torch.allclose(sampled[2], sampled[3]) and same(sampled[4], sampled[5])


# Reconstruction


def test_known_cells_are_kept_and_others_differ_by_seed(pipeline, given):
    config = replace(QUICK, fine_tuning=FineTuningConfig(steps=0), column_share=0.1, cell_share=0.2)
    seen = SeenPlace.of(pipeline, given, config)
    first, second = (reconstruct_seen(pipeline, seen, seed, config).latents for seed in (0, 1))
    unknown, _ = seen.visibility.unknown(pipeline.latent_autoencoder.downsampling)
    assert bool(unknown.any()) and not bool(unknown.all())
    for answer in (first, second):
        assert same(answer.coarse[..., ~unknown], seen.latents.coarse[..., ~unknown])
    assert not torch.allclose(first.coarse[..., unknown], second.coarse[..., unknown])


def test_the_same_seed_gives_the_same_scene(pipeline, given):
    first, second = (reconstruct_scene(pipeline, given, 5, QUICK) for _ in range(2))
    assert same(first.grid.density, second.grid.density) and same(first.grid.features, second.grid.features)
    assert all(parameter.requires_grad for parameter in pipeline.coarse_denoiser.parameters())


def test_seen_voxels_are_those_of_stage_1(pipeline, given):
    seen = SeenPlace.of(pipeline, given, QUICK)
    answer = reconstruct_seen(pipeline, seen, 0, QUICK)
    sure = (seen.visibility.weights() == 1)[0, 0]
    assert bool(sure.any())
    assert same(answer.grid.density[..., sure], seen.grid.density[..., sure])


def test_without_f_or_with_flows_it_works_alike(given):
    for pipeline in (lively_pipeline(use_fine=False), lively_pipeline(flow=True)):
        answer = reconstruct_scene(pipeline, given, 0, QUICK)
        assert bool(answer.grid.density.isfinite().all())


def test_fine_tuning_shows_the_images_better_and_the_prior_pulls(pipeline, given):
    latents = pipeline.latent_autoencoder.encode(random_grid(1))
    code = scene_code_of_views(pipeline, latents.global_latent, given[0].cameras)
    loss = RenderingLoss(pipeline.scene_autoencoder, given, StageOneLossConfig(lpips_mult=0, depth_mult=0))

    def tuned(prior_mult: float):
        config = FineTuningConfig(steps=8, prior_mult=prior_mult, learning_rate=0.05)
        return fine_tune(pipeline, latents, code, loss, config, torch.Generator().manual_seed(0))

    free = tuned(0.0)
    with torch.no_grad():
        before, after = (float(loss(pipeline.latent_autoencoder.decode(part))) for part in (latents, free))
    assert after < before
    assert not torch.allclose(tuned(10.0).coarse, free.coarse)


# Poses


def test_pose_errors_of_known_motions():
    aabb = torch.tensor(AABB)  # 6 m along its longest edge
    true = look_along(torch.tensor([[0.5, 0.2, 0.1]]), torch.tensor([0.4]), torch.zeros(1))[0]
    turned = look_along(torch.tensor([[0.5, 0.5, 0.1]]), torch.tensor([0.4 + math.radians(7)]), torch.zeros(1))[0]
    error = pose_error(turned, true, aabb)
    assert error.degrees == pytest.approx(7, abs=0.01)
    assert error.metres == pytest.approx(0.3, abs=1e-5) and error.box_share == pytest.approx(0.05, abs=1e-5)
    quarter = torch.tensor([[0.0, -1, 0], [1, 0, 0], [0, 0, 1]]) @ true
    assert pose_error(quarter, true, aabb).degrees == pytest.approx(90, abs=0.01)
    assert pose_error(quarter, true, aabb, any_quarter=True).degrees == pytest.approx(0, abs=0.1)


def test_se3_moves_rigidly_and_back():
    tangent = torch.tensor([0.1, -0.2, 0.3, 0.4, 0.5, -0.6])
    motion = exponential(tangent)
    assert torch.allclose(motion[:3, :3] @ motion[:3, :3].T, torch.eye(3), atol=1e-5)
    assert torch.allclose(motion @ exponential(-tangent), torch.eye(4), atol=1e-5)
    turn = exponential(torch.tensor([0, 0, 0.3, 0, 0, 0]))
    assert float(turn[1, 0]) == pytest.approx(math.sin(0.3), abs=1e-5)


def test_renderings_tell_where_a_camera_should_go(pipeline, given):
    """The gradient with respect to a pose is that of finite differences."""
    grid = random_grid(1)
    view = given[:, :1]
    start = view.cameras.camera_to_worlds[0, 0]

    def loss(tangent: torch.Tensor) -> torch.Tensor:
        cameras = posed(view, moved_pose(start, tangent)).cameras
        return pipeline.scene_autoencoder.feature_maps(grid, cameras, 16, 16, None).accumulation.square().mean()

    tangent = torch.zeros(6, requires_grad=True)
    (gradient,) = torch.autograd.grad(loss(tangent), tangent)
    assert float(gradient.norm()) > 0
    direction = gradient / gradient.norm()
    with torch.no_grad():
        difference = float(loss(1e-2 * direction) - loss(-1e-2 * direction)) / 2e-2
    assert difference == pytest.approx(float(gradient.norm()), rel=0.2)


def test_poses_are_looked_for_from_all_starts(pipeline, given):
    config = PoseConfig(num_yaws=4, grid=1, kept=1, noise_shares=(0.3,), code=FineTuningConfig(steps=2))
    assert start_poses(replace(config, grid=3)).shape == (36, 3, 4)
    found = estimate_pose(pipeline, given[:, :1], 0, config)
    assert len(found) == 2 and found[0].score <= found[1].score
    rotation = found[0].pose[:, :3]
    assert torch.allclose(rotation @ rotation.T, torch.eye(3), atol=1e-4)
    again = estimate_pose(pipeline, given[:, :1], 0, config)
    assert same(again[0].pose, found[0].pose)


# Input


@pytest.fixture(scope="module")
def scene_folder(box_room_collection: SceneCollection) -> Path:
    return box_room_collection.scene_dir(box_room_collection.split("test")[0])


def frames_of(folder: Path) -> list[str]:
    return [frame["file_path"] for frame in json.loads((folder / "transforms.json").read_text())["frames"]]


def test_images_get_their_poses_and_depths(pipeline, scene_folder, box_room_collection):
    stage1 = pipeline.scene_autoencoder
    names = frames_of(scene_folder)
    views = views_of_images([scene_folder / names[2]], scene_folder / "transforms.json", stage1, PlaceOptions())
    same_view = views_of_scene(scene_folder, [2], stage1, PlaceOptions())
    expected = box_room_collection.load_scene(scene_folder.name).source[2:3]
    for found in (views, same_view):
        assert found.shape == (1, 1) and same(found.images[0], expected.images)
        assert torch.allclose(found.depths[0], expected.depths) and found.cameras.shape == (1, 1)
        assert torch.allclose(found.cameras.camera_to_worlds[0], expected.cameras.camera_to_worlds)
    assert views_of_scene(scene_folder, [2], stage1, PlaceOptions(use_depth=False)).depths is None


def moved_scene(folder: Path, tmp_path: Path, change) -> Path:
    content = json.loads((folder / "transforms.json").read_text())
    for frame in content["frames"]:
        change(frame)
        for key in ("file_path", "depth_file_path"):
            if key in frame:
                frame[key] = str(folder / frame[key])
    for key in ("train_filenames", "val_filenames", "test_filenames"):
        content.pop(key, None)
    (tmp_path / "transforms.json").write_text(json.dumps(content))
    return tmp_path


def test_cameras_outside_of_the_box_are_refused_and_can_be_centred(pipeline, scene_folder, tmp_path):
    stage1 = pipeline.scene_autoencoder

    def away(frame):
        frame["transform_matrix"][0][3] += 50

    folder = moved_scene(scene_folder, tmp_path, away)
    with pytest.raises(UserInputError, match="outside of the generator's box .* add --centre"):
        views_of_scene(folder, [0, 1], stage1, PlaceOptions())
    views = views_of_scene(folder, [0, 1], stage1, PlaceOptions(centre=True))
    assert bool(cameras_inside(views[0].cameras, stage1.aabb).all())
    assert torch.allclose(views.cameras.camera_to_worlds[0, :, :, 3].mean(0), torch.zeros(3), atol=1e-4)


def test_lenses_far_from_those_of_the_training_are_refused(pipeline, scene_folder, tmp_path):
    folder = moved_scene(scene_folder, tmp_path, lambda frame: frame.update(fl_x=300.0, fl_y=300.0))
    with pytest.raises(UserInputError, match="focal length .* trained with 16"):
        views_of_scene(folder, [0], pipeline.scene_autoencoder, PlaceOptions())


def test_generators_with_an_upsampler_look_at_views_of_the_size_before_it(pipeline, scene_folder, given):
    stage1 = small_pipeline().scene_autoencoder
    stage1.grow_decoder(upsampling_channels=8)
    expected = views_of_scene(scene_folder, [0], pipeline.scene_autoencoder, PlaceOptions())
    found = views_of_scene(scene_folder, [0], stage1, PlaceOptions())
    assert same(found.images, expected.images) and found.image_size == stage1.encoded_size == (32, 32)
    cameras = resize_cameras(given.cameras, 64, 64)[0]
    large = Views(cameras, given.images[0].repeat_interleave(2, -1).repeat_interleave(2, -2))
    assert torch.allclose(fit_to(large, stage1, "here").images, given.images, atol=1e-6)


def test_a_photo_wants_its_lens(pipeline, tmp_path):
    path = tmp_path / "photo.png"
    Image.fromarray(np.full((48, 64, 3), 90, np.uint8)).save(path)
    views = photo(path, pipeline.scene_autoencoder, field_of_view=90.0)
    assert views.shape == (1, 1) and views.image_size == (32, 32)
    assert float(views.cameras.fx) == pytest.approx(32 * 32 / 48, abs=1e-3)  # cropped to the middle 48 x 48 pixels
    for wrong, message in (
        ({}, "give one of --focal-length and --field-of-view"),
        ({"focal_length": -3.0}, "--focal-length is -3"),
        ({"field_of_view": 500.0}, "--field-of-view is 500"),
    ):
        with pytest.raises(UserInputError, match=message):
            photo(path, pipeline.scene_autoencoder, **wrong)


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("generator") / "pipeline"
    torch.manual_seed(0)
    lively_pipeline().save_pretrained(folder)
    return folder


def refused(args: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    with pytest.raises(SystemExit) as stopped:
        reconstruct.main(args)
    assert stopped.value.code == 2
    return capsys.readouterr().err


def test_what_cannot_be_reconstructed_is_said(saved, scene_folder, tmp_path, capsys):
    given = ["--pipeline", str(saved), "--output-dir", str(tmp_path / "out")]
    images = [str(scene_folder / name) for name in frames_of(scene_folder)]
    poses = ["--transforms", str(scene_folder / "transforms.json")]
    stranger = tmp_path / "stranger.png"
    Image.new("RGB", (32, 32)).save(stranger)
    scene = ["--scene", str(scene_folder)]
    for args, message in (
        ([], "from 1 to 4 images, not 0"),
        ([*images[:5], *poses], "from 1 to 4 images, not 5"),
        ([images[0]], "have no poses: name their transforms.json"),
        ([str(stranger), *poses], "has no pose of"),
        ([images[0], "--transforms", str(tmp_path / "none")], "There is no"),
        (scene, "from 1 to 4 images, not 0"),
        ([*scene, "--views", "99"], "but --views has 99"),
        ([*scene, "--views", "1", "1"], "names a view twice"),
        (["--scene", str(scene_folder.parent.parent), "--views", "0"], "is a collection"),
        ([images[0], *scene], "already has images"),
        ([images[0], "--no-pose"], "give one of --focal-length"),
        ([*images[:2], "--no-pose", "--field-of-view", "90"], "takes one photo, not 2"),
        ([*scene, "--views", "0", "--guidance", "-1"], "--guidance is -1"),
        ([*scene, "--views", "0", "--num-answers", "0"], "must be at least 1"),
    ):
        error = refused([*args, *given], capsys)
        assert message in error and error.startswith("error: ") and error.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_the_command_writes_scenes_that_open(saved, scene_folder, tmp_path, capsys):
    quick = ["--pipeline", str(saved), "--steps", "2", "--fine-tuning", "1", "--output-dir", str(tmp_path)]
    reconstruct.main(["--scene", str(scene_folder), "--views", "0", "3", "--num-answers", "2", "--seed", "4", *quick])
    assert "answer_000004" in capsys.readouterr().out
    scene = load_generated_scene(tmp_path / "answer_000005")
    assert scene.provenance["command"] == "nfldm-reconstruct" and scene.provenance["views"] == [0, 3]
    assert scene.provenance["seed"] == 5 and {"coarse", "fine", "global_latent"} <= set(scene.latents)
    assert scene.cameras is not None and scene.cameras.shape == (2,)
