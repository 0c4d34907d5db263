"""The parts of baselines: what each is by its own definition."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from nfldm_ns.autoencoder.scene_autoencoder import SceneAutoencoder
from nfldm_ns.baselines.adversarial import AdversarialObjective, render_rays
from nfldm_ns.baselines.assembly import make_objective, make_parts
from nfldm_ns.baselines.autodecoder import AutodecoderObjective
from nfldm_ns.baselines.cameras import CameraBank, PoseDecoder, collection_poses, level_poses
from nfldm_ns.baselines.critics import ProjectedCritic, StyleGAN2Critic, low_resolution
from nfldm_ns.baselines.options import METHODS, BaselineOptions
from nfldm_ns.baselines.patches import Patches, smallest_scale
from nfldm_ns.baselines.registry import GENERATORS
from nfldm_ns.baselines.triplane_generator import look_up_planes
from nfldm_ns.errors import UserInputError
from nfldm_ns.scenes.views import camera_rays, index_cameras, view_yaws
from nfldm_ns.scenes.voxel_grid import VoxelGrid, normalise_points, sample_voxels, voxel_centres
from tests.small_baselines import RENDERER, SCENE, SIZES, MeanLevels, small_renderer
from tests.small_models import random_grid
from tests.synthetic import AABB, level_cameras, surround_cameras

BOX = torch.tensor(AABB)


def surrounding(batch: int = 2, views: int = 3, image_size: int = 32):
    cameras = surround_cameras(batch * views, image_size, torch.Generator().manual_seed(1))
    return index_cameras(cameras, torch.arange(batch * views).view(batch, views))


# Renderers


def test_the_renderer_of_features_is_that_of_stage_1():
    renderer = small_renderer()
    sizes = {**SCENE, **RENDERER, "aabb": AABB, "near": 0.1, "far": 10.0, "image_size": (32, 32)}
    stage1 = SceneAutoencoder(**sizes, focal_length=16.0).eval()
    missing = stage1.load_state_dict(renderer.state_dict(), strict=False)
    assert not missing.unexpected_keys
    grid, cameras = random_grid(2), surrounding()
    with torch.no_grad():
        assert torch.equal(renderer.render(grid, cameras).rgb, stage1.render(grid, cameras).rgb)


@pytest.mark.parametrize("rendering", ["features", "colours", "projection"])
def test_every_parameter_of_a_renderer_takes_part(rendering):
    renderer = small_renderer(rendering)
    grid = random_grid(2, channels=renderer.feature_channels)
    for parameter in renderer.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    renderer.render(grid, surrounding()).rgb.square().sum().backward()
    assert all(p.grad is not None and bool(p.grad.any()) for p in renderer.parameters())


@pytest.mark.parametrize("density", [0.1, 0.5, 2.0])
def test_colours_of_a_constant_grid_are_those_of_absorption_and_emission(density):
    """(1 - exp(-s L)) c + exp(-s L) b along the axis, up to the half voxel at the border, where density fades out."""
    changes = {"num_samples": 256, "num_feature_samples": None, "feature_stride": 1, "decoder_channels": (8,)}
    renderer = small_renderer("colours", grid_shape=(32, 64, 64), image_size=(5, 5), focal_length=2.5, **changes)
    colour = torch.tensor([0.8, -0.2, 0.4])
    ones = torch.ones(1, 1, 32, 64, 64)
    grid = VoxelGrid(density * ones, colour.view(1, 3, 1, 1, 1) * ones, BOX, torch.randn(1, 2, 4))
    camera = index_cameras(level_cameras(torch.zeros(1, 3), torch.zeros(1), 5), (None, slice(None)))
    with torch.no_grad():
        rendered = renderer.render(grid, camera)
        behind = renderer.background(rendered.maps.directions, grid.background)[0, 0, :, 2, 2]
    left = math.exp(-density * (3.0 - 0.1 - 6 / 64 / 8))
    expected = (1 - left) * colour + left * behind
    torch.testing.assert_close(2 * rendered.rgb[0, 0, :, 2, 2] - 1, expected, atol=6e-3, rtol=0)
    assert float(rendered.accumulation[0, 0, 0, 2, 2]) == pytest.approx(1 - left, abs=3e-3)


def test_a_projection_can_look_at_one_depth_alone():
    """With weights that pick sample 5, an image shows V at the places of that sample."""
    renderer, grid, cameras = small_renderer("projection"), random_grid(2), surrounding()
    grid.features = grid.features.abs()
    chosen, channels = 5, 4
    first, last = renderer.projection[0], renderer.projection[2]
    for layer in (first, last):
        for parameter in layer.parameters():
            torch.nn.init.zeros_(parameter)
    for channel in range(channels):
        first.weight.data[channel, chosen * (1 + channels) + 1 + channel] = 1
        last.weight.data[channel, channel] = 1
    with torch.no_grad():
        maps = renderer.feature_maps(grid, cameras, 6, 6, None)
        places = renderer._frustum(grid, cameras, 6, 6)[:, :, chosen]
        expected = sample_voxels(grid.features, places).unflatten(1, (3, 6, 6)).permute(0, 1, 4, 2, 3)
    torch.testing.assert_close(maps.features - maps.background, expected, atol=1e-5, rtol=1e-5)


def test_colours_need_three_channels():
    with pytest.raises(ValueError, match="colours have 3 channels, not 4"):
        small_renderer("colours", feature_channels=4)


# Generators


@pytest.mark.parametrize("name", GENERATORS)
def test_a_generator_makes_scenes_of_its_latents(name):
    generator = GENERATORS[name](**SCENE, aabb=AABB, **SIZES.generators[name])
    latents = torch.randn(3, generator.latent_dim)
    grid = generator(latents)
    assert grid.features.shape == (3, 4, 4, 16, 16) and grid.background.shape == (3, 2, 4)
    assert bool((grid.density > 0).all()) and torch.equal(grid.aabb, BOX)
    assert not torch.allclose(grid.density[0], grid.density[1])
    torch.testing.assert_close(generator(5 * latents).features, grid.features)
    torch.testing.assert_close(generator(latents[1:2]).features, grid.features[1:2], atol=1e-5, rtol=1e-4)
    (grid.density.sum() + grid.features.sum() + grid.background.sum()).backward()
    assert all(p.grad is not None for p in generator.parameters())


def test_triplane_lookups_are_those_of_grid_sample():
    shape = (3, 5, 7)
    planes = torch.randn(2, 3, 4, 6, 9)
    points = normalise_points(voxel_centres(shape, BOX), BOX).flatten(0, 2)
    expected = 0
    for plane, axes in enumerate([(0, 1), (0, 2), (1, 2)]):
        places = points[None, :, None, list(axes)].expand(2, -1, -1, -1)
        expected = expected + F.grid_sample(planes[:, plane], places, padding_mode="border", align_corners=False)
    found = look_up_planes(planes, shape)
    torch.testing.assert_close(found, expected[..., 0].unflatten(2, shape), atol=1e-5, rtol=1e-5)


# Cameras


def bank(learned: bool = False) -> CameraBank:
    cameras = CameraBank(4, 3, (16.0, 16.0, 16.0, 16.0), (32, 32), AABB, learned)
    cameras.poses.copy_(surrounding(4, 3).camera_to_worlds)
    return cameras


def test_a_bank_gives_every_example_equally_often():
    cameras = bank()
    quantiles = torch.special.ndtri((torch.arange(40) + 0.5) / 40)[:, None]
    found = cameras(quantiles).camera_to_worlds
    assert torch.equal(found, cameras.poses.repeat_interleave(10, dim=0))
    assert torch.equal(cameras(torch.tensor([[-40.0], [40.0]])).camera_to_worlds, cameras.poses[[0, 3]])


def test_residuals_begin_as_nothing_and_some_views_are_those_of_all():
    latents, views = torch.randn(5, 1), torch.tensor([[2, 0]] * 5)
    prior, moved = bank(), bank(learned=True)
    assert torch.equal(moved(latents).camera_to_worlds, prior(latents).camera_to_worlds)
    assert torch.equal(prior(latents, views).camera_to_worlds, prior(latents).camera_to_worlds[:, [2, 0]])


def test_residuals_turn_about_the_vertical_and_about_the_cameras_side():
    cameras = bank(learned=True)
    cameras.residual[-1].bias.data = torch.tensor([0.1, 0.0, -0.2, 0.3, 0.4])
    yaw, pitch = (math.pi / 4 * math.tanh(angle) for angle in (0.3, 0.4))
    with torch.no_grad():
        moved = cameras.moved(cameras.poses)
    shift = 0.25 * torch.tanh(torch.tensor([0.1, 0.0, -0.2])) * torch.tensor([6.0, 6.0, 4.0])
    torch.testing.assert_close(moved[..., 3], cameras.poses[..., 3] + shift)
    forward = -moved[..., 2]
    torch.testing.assert_close(forward[..., 2], torch.full((4, 3), math.sin(pitch)))
    before = bank()(torch.zeros(1, 1))
    after = torch.atan2(forward[2, :, 1], forward[2, :, 0])
    turned = (after - view_yaws(before)[0] - yaw + math.pi).remainder(2 * math.pi) - math.pi
    torch.testing.assert_close(turned, torch.zeros(3), atol=1e-5, rtol=0)
    rotation = moved[..., :3]
    torch.testing.assert_close(rotation.mT @ rotation, torch.eye(3).expand(4, 3, 3, 3), atol=1e-5, rtol=0)


def test_a_prior_without_data_looks_around():
    poses = level_poses(50, 4, (6.0, 6.0, 4.0), torch.Generator().manual_seed(0))
    assert torch.equal(poses[..., 2, 2], torch.zeros(50, 4)), "level"
    headings = torch.atan2(-poses[..., 1, 2], -poses[..., 0, 2])
    torch.testing.assert_close((headings[:, 1] - headings[:, 0]).remainder(2 * math.pi), torch.full((50,), math.pi / 2))
    assert float(poses[..., 3].std(dim=(0, 1))[0]) == pytest.approx(0.3, rel=0.2)


def test_poses_of_a_collection_are_those_of_its_source_views(box_room_collection):
    ids = box_room_collection.split("train")
    poses = collection_poses(box_room_collection, ids)
    scene = box_room_collection.load_scene(ids[1])
    assert torch.equal(poses[1], scene.source.cameras.camera_to_worlds)


def test_decoded_cameras_are_level_and_in_the_box():
    decoder = PoseDecoder(3, (16.0, 16.0, 16.0, 16.0), (32, 32), AABB, latent_dim=4, width=8)
    latents = 10 * torch.randn(6, 4)
    poses = decoder(latents).camera_to_worlds
    assert poses.shape == (6, 3, 3, 4) and bool((poses[..., 2, 2] == 0).all())
    assert bool(((poses[..., 3] > BOX[0]) & (poses[..., 3] < BOX[1])).all())
    assert torch.equal(decoder(latents, torch.tensor([[1]] * 6)).camera_to_worlds, poses[:, 1:2])


# Patches


def test_a_patch_of_the_whole_image_is_the_image():
    cameras, images = surrounding(), torch.rand(6, 3, 32, 32)
    whole = Patches((32, 32), torch.ones(2, 3), torch.zeros(2, 3, 2))
    rays, expected = (camera_rays(each, 32, 32)[1] for each in (whole.cameras(cameras), cameras))
    torch.testing.assert_close(rays, expected)
    flat = Patches((32, 32), torch.ones(6), torch.zeros(6, 2))
    torch.testing.assert_close(flat.cut(images), images, atol=1e-5, rtol=0)
    renderer, grid = small_renderer(), random_grid(2)
    with torch.no_grad():
        patch = render_rays(renderer, grid, whole.cameras(cameras), 32, 32).rgb
        torch.testing.assert_close(patch, renderer.render(grid, cameras).rgb, atol=1e-4, rtol=0)


def test_rays_of_patches_are_where_real_patches_are_cut():
    """Directions are linear in the pixels, so that cut from an image of them they must be the patch's own."""
    cameras = surrounding()
    patches = Patches.draw((8, 8), (32, 32), (2, 3))
    assert bool(((patches.scale >= 0.25) & (patches.scale <= 1)).all())
    ends = patches.corner + patches.scale[..., None]
    assert bool(((patches.corner >= 0) & (ends <= 1 + 1e-6)).all())
    image = camera_rays(cameras, 32, 32)[1].permute(0, 1, 4, 2, 3).flatten(0, 1)
    flat = Patches(patches.size, patches.scale.flatten(), patches.corner.flatten(0, 1))
    rays = camera_rays(patches.cameras(cameras), 8, 8)[1].permute(0, 1, 4, 2, 3).flatten(0, 1)
    torch.testing.assert_close(flat.cut(image), rays, atol=1e-5, rtol=1e-5)


def test_the_smallest_patches_shrink_exponentially():
    scales = [smallest_scale(step, 100, 0.25) for step in range(0, 150, 25)]
    assert scales == pytest.approx([1, 2**-0.5, 0.5, 2**-1.5, 0.25, 0.25])
    assert smallest_scale(0, 0, 0.25) == 0.25, "without annealing all scales are there from the beginning"
    for step, least in ((0, 1.0), (50, 0.5), (100, 0.25)):
        scale = Patches.draw((8, 8), (32, 32), (1000,), step, 100).scale
        assert least <= float(scale.min()) <= least + 0.01 and float(scale.max()) <= 1


def test_a_step_says_how_small_patches_may_be(box_room_collection, monkeypatch):
    objective = make_objective(box_room_collection, METHODS["graf"], SIZES, MeanLevels(), patch_steps=100)
    drawn, draw = [], Patches.draw
    monkeypatch.setattr(Patches, "draw", staticmethod(lambda *given: drawn.append(draw(*given)) or drawn[-1]))
    views = torch.arange(2).expand(2, 2)
    for step in (0, 100):
        objective(torch.randn(2, sum(objective.parts.latent_dims)), views, torch.rand(4, 3, 32, 32), 1, step)
    assert all(bool((patches.scale == 1).all()) for patches in drawn[:2]), "rendered and real ones"
    assert all(0.5 <= float(patches.scale.min()) < 1 for patches in drawn[2:]) and len(drawn) == 4


def test_patches_have_a_pixels_size_at_the_smallest_scale():
    images = torch.rand(1, 3, 32, 32)
    patch = Patches((8, 8), torch.tensor([0.25]), torch.tensor([[0.5, 0.25]]))
    torch.testing.assert_close(patch.cut(images), images[..., 8:16, 16:24], atol=1e-5, rtol=0)


# What tells images apart


def test_low_resolution_keeps_means_and_loses_detail():
    flat = torch.full((1, 3, 16, 16), 0.3)
    torch.testing.assert_close(low_resolution(flat, 8, 8), flat)
    checks = (torch.arange(16)[:, None] + torch.arange(16)).remainder(2).float().expand(1, 3, 16, 16)
    inside = low_resolution(checks, 8, 8)[..., 4:-4, 4:-4]
    torch.testing.assert_close(inside, torch.full_like(inside, 0.5))


@pytest.mark.parametrize("kind", ["projected", "stylegan2"])
@pytest.mark.parametrize("dual", [False, True])
def test_critics_look_at_raw_colours_only_if_dual(kind, dual):
    critic = (
        ProjectedCritic(MeanLevels(), (0, 1), dual)
        if kind == "projected"
        else StyleGAN2Critic((16, 16), dual, channel_base=64, channel_max=8)
    )
    images, real, raw = (torch.rand(4, 3, 16, 16, requires_grad=True) for _ in range(3))
    losses = critic(images, real, (raw, real) if dual else None, 1)
    assert set(losses) == {"adversarial_loss", "discriminator_loss"}
    losses["adversarial_loss"].backward()
    assert bool(images.grad.any()) and (raw.grad is not None and bool(raw.grad.any())) == dual
    assert all(parameter.grad is None for parameter in critic.parameters())
    assert not any(name.startswith("_perceptual") for name in critic.state_dict())


def test_the_penalty_is_lazy():
    critic = StyleGAN2Critic((16, 16), channel_base=64, channel_max=8)
    images = torch.rand(4, 3, 16, 16)
    assert ["r1_loss" in critic(images, images, None, number) for number in (0, 1, 15, 16, 32)] == [
        *(True, False, False, True, True)
    ]


# Objectives


def objective_of(collection, options: BaselineOptions):
    torch.manual_seed(0)
    return make_objective(collection, options, SIZES, MeanLevels())


def gradients(objective, losses, name: str) -> dict[str, bool]:
    """Which parts a loss reaches."""
    objective.zero_grad()
    losses[name].backward(retain_graph=True)
    return {
        part: any(p.grad is not None and bool(p.grad.any()) for p in module.parameters())
        for part, module in objective.named_children()
    }


@pytest.mark.parametrize("method", ["gsn", "graf", "platonic-gan", "hologan", "campari", "eg3d"])
def test_gradients_of_the_two_sides_do_not_mix(box_room_collection, method):
    objective = objective_of(box_room_collection, METHODS[method])
    assert isinstance(objective, AdversarialObjective)
    views = torch.tensor([[0, 3], [1, 2]])
    real = torch.rand(4, 3, 32, 32)
    losses = objective(torch.randn(2, sum(objective.parts.latent_dims)), views, real, 1, 1)
    reached = gradients(objective, losses, "adversarial_loss")
    learns = METHODS[method].learned_cameras
    assert reached == {"generator": True, "renderer": True, "cameras": learns, "critic": False}
    reached = gradients(objective, losses, "discriminator_loss")
    assert reached == {"generator": False, "renderer": False, "cameras": False, "critic": True}
    sum(losses.values()).backward()
    assert set(objective.rates) == {"generator", "renderer", "critic", *(["cameras"] if learns else [])}
    assert all(p.grad is not None for p in objective.parameters()), "every parameter has a gradient"


@pytest.mark.parametrize("critic", ["projected", "stylegan2"])
def test_a_critic_tells_scenes_that_stand_still(box_room_collection, critic):
    objective = objective_of(box_room_collection, replace(METHODS["gsn"], critic=critic))
    optimizer = torch.optim.Adam(objective.critic.parameters(), 1e-2, betas=objective.betas)
    real = box_room_collection.load_scene(box_room_collection.split("train")[0]).source.images[:4]
    latents, views = torch.randn(2, sum(objective.parts.latent_dims)), torch.tensor([[0, 3], [1, 2]])
    told = []
    for _ in range(30):
        loss = objective(latents, views, real, 1, 1)["discriminator_loss"]
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        told.append(float(loss.detach()))
    assert told[0] == pytest.approx(2 * math.log(2), rel=0.3) and sum(told[-5:]) / 5 < 0.8 * told[0]


def test_gaudis_latents_are_disentangled(box_room_collection):
    objective = objective_of(box_room_collection, METHODS["gaudi"])
    assert isinstance(objective, AutodecoderObjective)
    scene = box_room_collection.load_scene(box_room_collection.split("train")[1])
    cameras = index_cameras(scene.source.cameras, (None, slice(0, 2)))
    losses = objective(torch.tensor([1]), torch.zeros(1, 12), scene.source.images[None, :2], cameras)
    of_scene, of_pose = slice(0, 8), slice(8, 12)
    reached = gradients(objective, losses, "pose_loss")
    assert reached == {"generator": False, "renderer": False, "cameras": True, "latents": True}
    rows = objective.latents.weight.grad
    assert bool(rows[1, of_pose].any()) and not bool(rows[1, of_scene].any())
    for name in ("rgb_loss", "lpips_loss"):
        reached = gradients(objective, losses, name)
        assert reached == {"generator": True, "renderer": True, "cameras": False, "latents": True}
        rows = objective.latents.weight.grad
        assert bool(rows[1, of_scene].any()) and not bool(rows[1, of_pose].any())
    assert not bool(objective.latents.weight.grad[[0, 2]].any()), "other scenes have no part in it"


def test_gaudi_fits_the_cameras_of_its_scenes(box_room_collection):
    objective = objective_of(box_room_collection, METHODS["gaudi"])
    optimizer = torch.optim.Adam([*objective.cameras.parameters(), *objective.latents.parameters()], 1e-2)
    for _ in range(300):
        pose = objective.latents.weight[:, 8:]
        loss = F.mse_loss(objective.cameras.trajectory(pose), objective.trajectories)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    ids = box_room_collection.split("train")
    found = objective.cameras(objective.latents.weight[:, 8:]).camera_to_worlds
    torch.testing.assert_close(found, collection_poses(box_room_collection, ids), atol=0.05, rtol=0)


# Choices


def test_choices_that_do_not_go_together_are_refused(box_room_collection):
    with pytest.raises(UserInputError, match="--rendering colours has none"):
        replace(METHODS["platonic-gan"], dual=True).check()
    with pytest.raises(UserInputError, match="--learned-cameras says nothing there"):
        replace(METHODS["gaudi"], learned_cameras=True).check()
    odd = replace(SIZES, scene={**SCENE, "grid_shape": (4, 15, 15)})
    with pytest.raises(UserInputError, match="15 cells cannot be halved"):
        make_parts(box_room_collection, METHODS["gsn"], odd)
    wide = replace(SIZES, renderer={**RENDERER, "feature_stride": 64, "decoder_channels": (8,) * 7})
    with pytest.raises(UserInputError, match="64 does not divide"):
        make_parts(box_room_collection, METHODS["gsn"], wide)
