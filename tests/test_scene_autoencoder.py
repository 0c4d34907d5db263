"""Truths of stage 1: occupancy, lifting, fusion, rendering, and the auto-encoder around them."""

from __future__ import annotations

import math
from dataclasses import replace
from itertools import product
from unittest import mock

import nerfacc
import pytest
import torch
from nerfstudio.cameras.rays import Frustums, RaySamples

from nfldm_ns.autoencoder import lifting
from nfldm_ns.autoencoder.background import Background, background_code
from nfldm_ns.autoencoder.lifting import (
    EPS,
    SEEN,
    box_exit_depth,
    depth_bins,
    fill_holes,
    fuse_frustums,
    occupancy_along_rays,
)
from nfldm_ns.autoencoder.losses import StageOneLossConfig, depth_loss, hidden_background_loss, stage_one_losses
from nfldm_ns.autoencoder.renderer import FeatureMaps, render_feature_maps
from nfldm_ns.autoencoder.scene_autoencoder import RenderedViews, SceneAutoencoder, downsample_depth
from nfldm_ns.scenes.collection import SceneCollection
from nfldm_ns.scenes.views import Views, camera_rays, make_cameras, rotate_cameras90
from nfldm_ns.scenes.voxel_grid import VoxelGrid, voxel_centres

AABB = torch.tensor([[-4.0, -4.0, -2.0], [4.0, 4.0, 2.0]])
SHAPE = (8, 16, 16)


def level_camera(yaw: float, size: int = 16, position: tuple[float, float, float] = (0.0, 0.0, 0.0)):
    """One camera `[1, 1]` looking along `yaw` (degrees) with a field of view of 64 degrees."""
    angle = math.radians(yaw)
    forward = torch.tensor([math.cos(angle), math.sin(angle), 0.0])
    right = torch.tensor([math.sin(angle), -math.cos(angle), 0.0])
    up = torch.tensor([0.0, 0.0, 1.0])
    pose = torch.stack([right, up, -forward, torch.tensor(position)], dim=1)
    focal = size / 2 / 0.625
    return make_cameras(pose[None, None], focal, focal, size / 2, size / 2, size, size)


def small_autoencoder(**options) -> SceneAutoencoder:
    torch.manual_seed(0)
    sizes = {"grid_shape": SHAPE, "feature_channels": 5, "image_size": (32, 32), "focal_length": 25.6}
    box = tuple(map(tuple, AABB.tolist()))
    return SceneAutoencoder(**{**sizes, "aabb": box, "num_depth_bins": 24, "num_samples": 24, **options})


class TestOccupancy:
    def test_agrees_with_nerfacc_and_nerfstudio(self):
        torch.manual_seed(0)
        density = torch.rand(7, 12) * 3
        edges = torch.cat([torch.zeros(7, 1), torch.rand(7, 12).cumsum(-1)], dim=-1)
        starts, ends = edges[:, :-1], edges[:, 1:]
        occupancy, transmittance = occupancy_along_rays(density, ends - starts)
        weights, reference, _ = nerfacc.render_weight_from_density(starts, ends, density)
        torch.testing.assert_close(occupancy, weights)
        torch.testing.assert_close(transmittance, reference)
        frustums = Frustums(torch.zeros(7, 12, 3), torch.ones(7, 12, 3), starts[..., None], ends[..., None], None)
        samples = RaySamples(frustums=frustums, deltas=(ends - starts)[..., None])
        torch.testing.assert_close(occupancy, samples.get_weights(density[..., None])[..., 0])

    def test_sums_to_the_probability_of_ending(self):
        density, delta = torch.rand(5, 9), torch.rand(9)
        occupancy, _ = occupancy_along_rays(density, delta)
        torch.testing.assert_close(occupancy.sum(-1), 1 - torch.exp(-(density * delta).sum(-1)))


@pytest.mark.parametrize("spacing", ["linear", "inverse", "log"])
def test_depth_bins_cover_the_range(spacing):
    centres, widths = depth_bins(0.5, 20, 13, spacing)
    assert float(widths.sum()) == pytest.approx(19.5, rel=1e-5)
    assert bool((centres.diff() > 0).all()) and float(centres[0]) > 0.5 and float(centres[-1]) < 20
    if spacing == "linear":
        torch.testing.assert_close(widths, widths[:1].expand(13))
    elif spacing == "inverse":
        edges = torch.cat([centres - widths / 2, centres[-1:] + widths[-1:] / 2])
        torch.testing.assert_close((1 / edges).diff(), (1 / edges).diff()[:1].expand(13), rtol=1e-3, atol=0)
    else:
        torch.testing.assert_close(widths[1:] / widths[:-1], torch.full((12,), (20 / 0.5) ** (1 / 13)))


def test_rays_leave_the_box_on_its_border():
    torch.manual_seed(0)
    origins = (torch.rand(100, 3) - 0.5) * (AABB[1] - AABB[0])
    directions = torch.randn(100, 3)
    enter, leave = box_exit_depth(origins, directions, AABB)
    points = origins + leave[:, None] * directions
    assert bool((enter == 0).all())
    assert float((points.abs() / AABB[1]).amax(-1).sub(1).abs().max()) < 1e-4


def three_views() -> dict:
    """Random densities, features and attention of three views of 4 x 4 pixels with six depth bins."""
    torch.manual_seed(0)
    poses = torch.cat([level_camera(yaw, 4).camera_to_worlds for yaw in (0, 40, 200)], dim=1)
    centres, widths = depth_bins(0.3, 5.0, 6)
    return {
        "density": torch.rand(1, 3, 6, 4, 4) * 2,
        "features": torch.randn(1, 3, 2, 4, 4),
        "cameras": make_cameras(poses, 3.2, 3.2, 2.0, 2.0, 4, 4),
        "centres": centres,
        "widths": widths,
        "attention": torch.randn(1, 3, 4, 4),
    }


def slow_entries(views: dict, trilinear: bool):
    """Every frustum entry in plain Python: its voxel, share, transmittance, occupancy, sigma, features, attention."""
    origins, directions = camera_rays(views["cameras"], 4, 4)
    for view, row, column in product(range(3), range(4), range(4)):
        transmittance = 1.0
        ray = directions[0, view, row, column]
        for d in range(6):
            sigma = float(views["density"][0, view, d, row, column])
            opacity = 1 - math.exp(-sigma * float(views["widths"][d] * ray.norm()))
            point = origins[0, view] + ray * views["centres"][d]
            place = ((point - AABB[0]) / (AABB[1] - AABB[0]) * torch.tensor([16.0, 16.0, 8.0])).tolist()
            values = (transmittance, transmittance * opacity, sigma, views["features"][0, view, :, row, column])
            for cell, share in voxel_shares(place, trilinear):
                if all(0 <= index < size for index, size in zip(cell, (16, 16, 8), strict=True)):
                    yield cell[::-1], share, *values, math.exp(float(views["attention"][0, view, row, column]))
            transmittance *= 1 - opacity


def voxel_shares(place: list[float], trilinear: bool):
    if not trilinear:
        return [(tuple(math.floor(x) for x in place), 1.0)]
    corners = product(*((math.floor(x - 0.5), math.floor(x - 0.5) + 1) for x in place))
    return [(cell, math.prod(1 - abs(x - 0.5 - i) for x, i in zip(place, cell, strict=True))) for cell in corners]


@pytest.mark.parametrize("splatting", ["nearest", "trilinear"])
@pytest.mark.parametrize("fusion", ["mean", "occupancy", "attention"])
def test_fusion_is_exact_against_a_slow_loop(fusion, splatting):
    views = three_views()
    given = {**views, "attention": views["attention"] if fusion == "attention" else None}
    grid = fuse_frustums(**given, aabb=AABB, shape=SHAPE, fusion=fusion, splatting=splatting)

    sums: dict[tuple, list[float]] = {}
    features: dict[tuple, torch.Tensor] = {}
    for cell, share, reached, occupancy, sigma, phi, attention in slow_entries(views, splatting == "trilinear"):
        occupancy = occupancy if occupancy > SEEN else 0.0  # carries no features, as documented
        entry = share * (attention if fusion == "attention" else 1.0)
        weight = entry * (1.0 if fusion == "mean" else reached)
        row = sums.setdefault(cell, [0.0, 0.0, 0.0])
        for k, value in enumerate((weight * sigma, weight, entry * occupancy)):
            row[k] += value
        features[cell] = features.get(cell, torch.zeros(2)) + entry * occupancy * phi
    expected_density, expected_features = torch.zeros(SHAPE), torch.zeros(2, *SHAPE)
    for cell, (density, weight, occupancy) in sums.items():
        expected_density[cell] = density / (weight + EPS)
        norm = weight + EPS if fusion == "mean" else occupancy + SEEN
        expected_features[(slice(None), *cell)] = features[cell] / norm
    torch.testing.assert_close(grid.density[0, 0], expected_density, atol=1e-4, rtol=1e-3)
    torch.testing.assert_close(grid.features[0], expected_features, atol=1e-4, rtol=2e-3)


@pytest.mark.parametrize("splatting", ["filled", "nearest", "trilinear"])
@pytest.mark.parametrize("fusion", ["mean", "occupancy", "attention"])
def test_entries_of_weight_0_change_nothing(fusion, splatting):
    """A GPU adds up all entries, where a CPU selects those that count: values and gradients are the same."""
    views = {**three_views(), "valid": torch.rand(1, 3, 4, 4) > 0.2}
    given = {**views, "attention": views["attention"] if fusion == "attention" else None}
    results = []
    for selects in (True, False):
        leaves = {name: given[name].clone().requires_grad_() for name in ("density", "features")}
        splat = lifting._splat
        with mock.patch.object(
            lifting, "_splat", lambda *args, splat=splat, selects=selects: splat(*args[:-1], selects)
        ):
            grid = fuse_frustums(**{**given, **leaves}, aabb=AABB, shape=SHAPE, fusion=fusion, splatting=splatting)
        (grid.density.square().sum() + grid.features.square().sum()).backward()
        results.append([grid.density, grid.features, *(leaf.grad for leaf in leaves.values())])
    for selected, added in zip(*results, strict=True):
        torch.testing.assert_close(added, selected)
    assert float(results[0][1].abs().max()) > 0


def test_attention_without_differences_is_the_occupancy_weighted_mean():
    views = {**three_views(), "attention": torch.zeros(1, 3, 4, 4)}
    attended = fuse_frustums(**views, aabb=AABB, shape=SHAPE, fusion="attention")
    plain = fuse_frustums(**{**views, "attention": None}, aabb=AABB, shape=SHAPE, fusion="occupancy")
    torch.testing.assert_close(attended.features, plain.features)
    with pytest.raises(ValueError, match="attention"):
        fuse_frustums(**views, aabb=AABB, shape=SHAPE, fusion="mean")


def test_only_voxels_between_rays_are_filled():
    """Two entries in one corner of a block: the block's other voxels take their mean, other blocks stay empty."""
    sums = torch.zeros(1, 4, 4, 4, 2)
    sums[0, 0, 0, 0] = torch.tensor([6.0, 2.0])
    filled = fill_holes(sums)
    means = filled[..., 0] / filled[..., 1].clamp(min=1e-9)
    torch.testing.assert_close(means[0, :2, :2, :2], torch.full((2, 2, 2), 3.0))
    assert float(filled[0, 2:].abs().max()) == 0 and float(filled[0, :, 2:].abs().max()) == 0
    sums[0, 0, 0, 1] = torch.tensor([100.0, 10.0])
    own = fill_holes(sums)[0, 0, 0, 0]
    assert float(own[0] / own[1]) == pytest.approx(3.0, rel=0.35)  # a voxel with entries of its own nearly keeps them
    odd = fill_holes(torch.rand(2, 3, 5, 7, 4))
    assert odd.shape == (2, 3, 5, 7, 4)


def test_a_plane_comes_back_where_it_was():
    """A wall at planar depth 3 m, measured and lifted by the depth prior, is rendered at 3 m."""
    model = small_autoencoder(grid_shape=(16, 32, 32), num_depth_bins=40, num_samples=64, num_feature_samples=None)
    cameras = level_camera(0, 32)
    views = Views(cameras, torch.rand(1, 1, 3, 32, 32), torch.full((1, 1, 1, 32, 32), 3.0))
    with torch.no_grad():
        grid = model.encode(views)
        rendered = model.render(grid, cameras)
    occupied = voxel_centres((16, 32, 32), AABB)[grid.density[0, 0] > 1]
    assert len(occupied) > 50
    assert float((occupied[:, 0] - 3).abs().max()) < 0.4  # voxels are 0.25 m, bins 0.24 m
    assert float((rendered.depth - 3).abs().median()) < 0.2


class TestRendering:
    def test_constant_density_has_the_analytic_accumulation(self):
        grid = VoxelGrid(torch.full((1, 1, *SHAPE), 0.3), torch.ones(1, 2, *SHAPE), AABB)
        cameras = level_camera(20)
        maps = render_feature_maps(grid, cameras, 6, 6, near=0.01, num_samples=512)
        directions = maps.directions.norm(dim=2, keepdim=True)
        inner = (maps.exit_depth - 0.01) * directions
        torch.testing.assert_close(maps.accumulation, 1 - torch.exp(-0.3 * inner), atol=0.02, rtol=0)
        torch.testing.assert_close(maps.features, maps.accumulation.expand_as(maps.features), atol=0.02, rtol=0)

    def test_few_feature_samples_equal_all_of_them_at_a_surface(self):
        torch.manual_seed(0)
        density = torch.zeros(1, 1, *SHAPE)
        density[..., 13:] = 40.0
        grid = VoxelGrid(density, torch.randn(1, 3, *SHAPE), AABB)
        options = {"height": 8, "width": 8, "near": 0.1, "num_samples": 48}
        full = render_feature_maps(grid, level_camera(0), **options)
        few = render_feature_maps(grid, level_camera(0), **options, num_feature_samples=6)
        same = render_feature_maps(grid, level_camera(0), **options, num_feature_samples=48)
        torch.testing.assert_close(full.features, same.features)
        torch.testing.assert_close(full.features, few.features, atol=2e-2, rtol=0)
        torch.testing.assert_close(full.depth, few.depth)

    def test_an_empty_scene_shows_its_background_at_the_border(self):
        model = small_autoencoder()
        grid = VoxelGrid(torch.zeros(1, 1, *SHAPE), torch.randn(1, 5, *SHAPE), AABB)
        rendered = model.render(grid, level_camera(0, 32))
        assert float(rendered.accumulation.abs().max()) == 0
        torch.testing.assert_close(rendered.maps.depth, rendered.maps.exit_depth)

    def test_voxels_receive_gradients(self):
        model = small_autoencoder()
        density = torch.rand(1, 1, *SHAPE, requires_grad=True)
        features = torch.randn(1, 5, *SHAPE, requires_grad=True)
        rendered = model.render(VoxelGrid(density, features, AABB), level_camera(0, 32))
        rendered.rgb.square().sum().backward()
        assert float(density.grad.abs().sum()) > 0 and float(features.grad.abs().sum()) > 0

    @pytest.mark.parametrize("size", [16, 64, 100])
    def test_the_size_of_the_image_does_not_change_the_ray_density(self, size):
        model = small_autoencoder()
        grid = VoxelGrid(torch.rand(1, 1, *SHAPE), torch.randn(1, 5, *SHAPE), AABB)
        rendered = model.render(grid, level_camera(0, size))
        reference = model.render(grid, level_camera(0, 32))
        assert rendered.rgb.shape == (1, 1, 3, size, size) and rendered.depth.shape == (1, 1, 1, size, size)
        torch.testing.assert_close(rendered.maps.features, reference.maps.features)


class TestSceneAutoencoder:
    @pytest.fixture(scope="class")
    def batch(self, box_room_collection: SceneCollection):
        collection = box_room_collection
        return collection.batch([collection.load_scene(name) for name in collection.splits["train"][:2]])

    @pytest.mark.parametrize("encoder_input", ["rgb", "rgbd"])
    def test_shapes_and_gradients(self, batch, encoder_input):
        model = small_autoencoder(encoder_input=encoder_input)
        grid = model.encode(batch.source)
        assert grid.density.shape == (2, 1, *SHAPE) and grid.features.shape == (2, 5, *SHAPE)
        assert bool((grid.density >= 0).all())
        rendered = model.render(grid, batch.target.cameras)
        losses = stage_one_losses(StageOneLossConfig(lpips_mult=0), rendered, batch.target, grid, None)
        sum(losses.values()).backward()
        without = [name for name, p in model.named_parameters() if p.grad is None and "prior" not in name]
        assert not without

    @pytest.mark.parametrize(
        "options",
        [
            {"fusion": "attention"},
            {"fusion": "mean", "splatting": "trilinear"},
            {"density_from": "voxels"},
            {"density_from": "voxels", "encoder_input": "rgb", "fusion": "mean"},
            {"depth_spacing": "inverse", "splatting": "nearest"},
        ],
    )
    def test_every_choice_trains_all_its_parameters(self, batch, options):
        model = small_autoencoder(**options).to(memory_format=torch.channels_last)  # as the trainer has it
        for parameter in model.parameters():  # away from the zeros that some layers start with
            parameter.data.add_(0.05 * torch.randn_like(parameter))
        depths = batch.source.depths.clone()
        depths[:, :2, :, :8] = 0  # a sky
        grid = model.encode(replace(batch.source, depths=depths))
        rendered = model.render(grid, batch.target.cameras)
        losses = stage_one_losses(StageOneLossConfig(lpips_mult=0), rendered, batch.target, grid, None)
        sum(losses.values()).backward()
        still = [name for name, p in model.named_parameters() if p.grad is None or float(p.grad.abs().max()) == 0]
        assert not still

    @pytest.mark.parametrize("name", ["encoder_input", "density_from", "depth_spacing", "fusion", "splatting"])
    def test_unknown_choices_are_refused(self, name):
        with pytest.raises(ValueError, match=f"{name} must be one of .*, not 'median'"):
            small_autoencoder(**{name: "median"})

    def test_any_number_of_views(self, batch):
        model = small_autoencoder()
        grids = [model.encode(batch.source[:, :count]) for count in (1, 3, batch.source.shape[1])]
        seen = [float((grid.features.abs().sum(1) > 0).float().mean()) for grid in grids]
        assert seen[0] < seen[1] < seen[2]

    def test_densities_from_voxels_follow_the_features(self, batch):
        model = small_autoencoder(density_from="voxels", splatting="nearest")
        grid = model.encode(batch.source)
        unseen = grid.features.abs().sum(1, keepdim=True) == 0
        assert bool(unseen.any()) and float(grid.density[unseen].detach().std()) < 1e-6
        assert float(grid.density[~unseen].detach().std()) > 1e-6

    def test_a_turned_scene_has_a_turned_code_and_looks_the_same(self, batch):
        model = small_autoencoder()
        for parameter in model.parameters():
            parameter.data.add_(0.05 * torch.randn_like(parameter))
        source = batch.source
        turned = Views(rotate_cameras90(source.cameras, 1), source.images, source.depths)
        with torch.no_grad():
            grid, other = model.encode(source), model.encode(turned)
            assert float(grid.background.abs().max()) > 1e-3
            torch.testing.assert_close(other.background, grid.rotate90(1).background, atol=1e-5, rtol=1e-4)
            empty = VoxelGrid(torch.zeros_like(grid.density), grid.features, grid.aabb, grid.background)
            image = model.render(empty, batch.target.cameras).rgb
            same = model.render(empty.rotate90(1), rotate_cameras90(batch.target.cameras, 1)).rgb
        torch.testing.assert_close(image, same, atol=1e-5, rtol=1e-4)
        assert float(image.std()) > 1e-3

    def test_views_without_depth_are_encoded_too(self, batch):
        model = small_autoencoder()
        colours = Views(batch.source.cameras, batch.source.images)
        unknown = Views(batch.source.cameras, batch.source.images, torch.zeros_like(batch.source.depths))
        torch.testing.assert_close(model.encode(colours).features, model.encode(unknown).features)

    def test_scenes_of_a_batch_do_not_mix(self, batch):
        model = small_autoencoder()
        both, second = model.encode(batch.source), model.encode(batch.source[1:])
        torch.testing.assert_close(both.features[1:], second.features, atol=1e-5, rtol=1e-4)

    def test_saved_and_loaded_it_renders_the_same(self, batch, tmp_path):
        model = small_autoencoder().eval()
        model.save_pretrained(tmp_path)
        loaded = SceneAutoencoder.from_pretrained(tmp_path).eval()
        with torch.no_grad():
            views = [m.render(m.encode(batch.source), batch.target.cameras).rgb for m in (model, loaded)]
        torch.testing.assert_close(*views, atol=0, rtol=0)

    def test_measured_depth_makes_better_geometry_than_none(self, batch):
        model = small_autoencoder(grid_shape=(16, 32, 32))
        errors = []
        with torch.no_grad():
            for source in (batch.source, Views(batch.source.cameras, batch.source.images)):
                maps = model.render(model.encode(source), batch.target.cameras).maps
                errors.append(float(depth_loss(maps, batch.target, "l1")))
        assert errors[0] < 0.5 * errors[1]


class TestBackground:
    def test_rays_that_leave_the_box_alone_make_the_code(self):
        torch.manual_seed(0)
        values, directions = torch.randn(2, 3, 5, 4, 4), torch.randn(2, 3, 4, 4, 3)
        leaves = torch.zeros(2, 3, 4, 4)
        assert float(background_code(values, leaves, directions).abs().max()) == 0
        leaves[:, 1] = 1.0
        code = background_code(values, leaves, directions)
        unit = directions[:, 1] / directions[:, 1].norm(dim=-1, keepdim=True)
        torch.testing.assert_close(code[..., 0], values[:, 1].sum((2, 3)) / 17)
        torch.testing.assert_close(code[..., 3], (values[:, 1] * unit[:, None, ..., 2]).sum((2, 3)) / 17)

    def test_no_code_is_a_code_of_zeros_and_length_of_directions_does_not_matter(self):
        torch.manual_seed(0)
        background, directions = Background(4, 6), torch.randn(2, 3, 3, 5, 5)
        features = background(directions, None)
        assert features.shape == (2, 3, 6, 5, 5)
        torch.testing.assert_close(features, background(3 * directions, torch.zeros(2, 4, 4)))
        assert float((features - background(directions, torch.ones(2, 4, 4))).abs().max().detach()) > 1e-4


def test_unknown_depth_never_supervises(box_room_collection):
    scene = box_room_collection.load_scene(box_room_collection.splits["train"][0])
    batch = box_room_collection.batch([scene])
    model = small_autoencoder()
    maps = model.render(model.encode(batch.source), batch.target.cameras).maps
    assert batch.target.depths is not None
    half = batch.target.depths.clone()
    half[..., :16, :] = 0
    views = Views(batch.target.cameras, batch.target.images, half)
    (gradient,) = torch.autograd.grad(depth_loss(maps, views), maps.depth)
    assert float(gradient[..., :8, :].abs().max()) == 0 and float(gradient[..., 8:, :].abs().max()) > 0


def test_pixels_without_a_reading_begin_empty_where_others_have_one():
    """A camera sees a wall in the lower half of its picture; above it a depth is known, or not, or nowhere at all."""
    model = small_autoencoder()
    depths = torch.full((1, 1, 1, 32, 32), 3.0)
    views = Views(level_camera(0.0, 32), torch.rand(1, 1, 3, 32, 32), depths)

    def above() -> float:
        maps = model.render(model.encode(views), views.cameras).maps
        assert not bool((depths > 0).any()) or float(maps.accumulation[..., 12:, :].mean()) > 0.9
        return float(maps.accumulation[..., :6, :].mean())

    with torch.no_grad():
        wall = above()
        depths[..., :16, :] = 0
        sky = above()
        depths.zero_()
        unknown = above()
    assert wall > 0.9 and sky < 0.1 and unknown > 2 * sky


def test_opacity_loss_clears_the_sky_and_leaves_walls():
    """One camera sees a wall in the lower half of its picture, and nothing above it; both begin as the same fog."""
    camera = level_camera(0.0)
    depths = torch.zeros(1, 1, 1, 16, 16)
    depths[..., 8:, :] = 3.0
    target = Views(camera, torch.zeros(1, 1, 3, 16, 16), depths)

    def fitted(opacity_mult: float) -> FeatureMaps:
        config = StageOneLossConfig(0, rgb_mult=0, depth_mult=0.1, depth_norm="l1", opacity_mult=opacity_mult)
        density = torch.full((1, 1, *SHAPE), -1.0, requires_grad=True)
        optimiser = torch.optim.Adam([density], lr=0.2)
        for _ in range(60):
            grid = VoxelGrid(torch.nn.functional.softplus(density), torch.zeros(1, 2, *SHAPE), AABB)
            maps = render_feature_maps(grid, camera, 16, 16, 0.1, 64)
            images = maps.features.new_zeros(1, 1, 3, 16, 16)
            rendered = RenderedViews(images, maps.depth, maps.accumulation, maps)
            losses = stage_one_losses(config, rendered, target, grid, None)
            optimiser.zero_grad()
            sum(losses.values()).backward()
            optimiser.step()
        if opacity_mult:
            # half of the rays, in a view of which half was measured
            torch.testing.assert_close(losses["opacity_loss"], opacity_mult * maps.accumulation[..., :8, :].mean() / 4)
        return maps

    without, cleared = fitted(0.0), fitted(0.2)
    assert float(without.accumulation[..., :6, :].mean().detach()) > 0.5
    assert float(cleared.accumulation[..., :6, :].mean().detach()) < 0.05
    for maps in (without, cleared):
        torch.testing.assert_close(
            maps.depth[..., 11:, :].detach(), torch.full((1, 1, 1, 5, 16), 3.0), atol=0.1, rtol=0
        )
    walls = [float(maps.accumulation[..., 11:, :].mean().detach()) for maps in (without, cleared)]
    assert walls[1] > walls[0] - 0.05


def test_the_background_learns_from_what_hides_it():
    """And nothing else does: each ray pulls by the share of it that is hidden."""
    features, background = torch.rand(1, 2, 3, 4, 4, requires_grad=True), torch.rand(1, 2, 3, 4, 4, requires_grad=True)
    opacity = torch.rand(1, 2, 1, 4, 4, requires_grad=True)
    maps = FeatureMaps(features, opacity, opacity, opacity, torch.rand(1, 2, 3, 4, 4), background)
    loss = hidden_background_loss(maps)
    loss.backward()
    torch.testing.assert_close(loss, (opacity * (background - features).abs()).mean())
    torch.testing.assert_close(
        background.grad, (opacity * (background - features).sign()).detach() / background.numel()
    )
    assert features.grad is None and opacity.grad is None


def test_depth_is_never_averaged_across_edges():
    depth = torch.tensor([[2.0, 0.0, 5.0, 9.0], [0.0, 0.0, 9.0, 5.0]])[None, None]
    torch.testing.assert_close(downsample_depth(depth, 1, 2), torch.tensor([[[[2.0, 5.0]]]]))
