"""Rendering that skips empty and hidden space: it agrees with the dense way, and leaves out nothing that weighs."""

from __future__ import annotations

import math
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from nerfacc.estimators import occ_grid
from torch import Tensor

from nfldm_ns.autoencoder import compiled_march, packed_samples, renderer, skipping
from nfldm_ns.autoencoder.lifting import occupancy_along_rays
from nfldm_ns.autoencoder.renderer import FeatureMaps, render_feature_maps
from nfldm_ns.autoencoder.skipping import WEIGHT_BOUND, SampledRays, empty_space, feature_table, march, sampled_rays
from nfldm_ns.plugin.voxel_model import VoxelGridField
from nfldm_ns.scenes.empty_space import FARTHEST, cell_maximum, find_empty_space
from nfldm_ns.scenes.views import make_cameras
from nfldm_ns.scenes.voxel_grid import VoxelGrid, sample_voxels, voxel_centres

AABB = torch.tensor([[-4.0, -4.0, -2.0], [4.0, 4.0, 2.0]])
SHAPE = (12, 24, 24)
SAMPLES = 48
SIZE = 24
WAYS = ("torch", "compiled")


def scene(density: Tensor) -> VoxelGrid:
    generator = torch.Generator().manual_seed(0)
    return VoxelGrid(density[None, None], torch.randn(1, 5, *SHAPE, generator=generator), AABB)


def scenes() -> dict[str, VoxelGrid]:
    centres = voxel_centres(SHAPE, AABB)
    far = centres[..., 1] > 2
    generator = torch.Generator().manual_seed(1)
    noise = F.interpolate(torch.randn(1, 1, 3, 6, 6, generator=generator), size=SHAPE, mode="trilinear")[0, 0]
    return {
        "empty": scene(torch.zeros(SHAPE)),
        "solid wall": scene(torch.where(far, 200.0, 0.0)),
        "thin wall": scene(torch.where((centres[..., 1] - 2.2).abs() < 0.2, 3.0, 0.0)),
        "in density": scene(torch.full(SHAPE, 0.4)),
        "clouds": scene((4 * noise).clamp(min=0)),
        "thin fog": scene(torch.where(far, 5.0, 2e-3)),
    }


def camera(origin: tuple[float, float, float] = (0.1, -0.3, 0.2)):
    """Looks north (along y), 100 degrees wide."""
    pose = torch.tensor([[1.0, 0, 0, 0], [0, 0, -1, 0], [0, 1, 0, 0]])
    pose[:, 3] = torch.tensor(origin)
    focal = SIZE / 2 / math.tan(math.radians(50))
    return make_cameras(pose[None, None], focal, focal, SIZE / 2, SIZE / 2, SIZE, SIZE)


def render(grid: VoxelGrid, cameras, features: int | None, skipping: bool) -> FeatureMaps:
    return render_feature_maps(grid, cameras, SIZE, SIZE, 0.1, SAMPLES, features, skipping)


@pytest.fixture(params=WAYS)
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    if request.param == "torch":
        monkeypatch.setattr(renderer, "compiled", lambda: None)
    elif compiled_march.compiled() is None:
        pytest.skip("there is no C++ compiler")
    return request.param


@pytest.mark.parametrize("name", list(scenes()))
@pytest.mark.parametrize("features", [None, 8])
@pytest.mark.parametrize("origin", [(0.1, -0.3, 0.2), (0.0, -7.0, 0.5), (0.0, 3.0, 0.0), (30.0, 0.0, 0.0)])
def test_it_agrees_with_the_dense_way(way, name, features, origin):
    grid, cameras = scenes()[name], camera(origin)
    with torch.no_grad():
        dense, skipped = (render(grid, cameras, features, skips) for skips in (False, True))
    allowed = SAMPLES * WEIGHT_BOUND if name == "thin fog" else 2e-3
    assert (dense.accumulation - skipped.accumulation).abs().max() <= allowed
    assert (dense.features - skipped.features).abs().max() <= 10 * allowed
    assert (dense.depth - skipped.depth).abs().max() <= 20 * allowed
    assert torch.equal(dense.exit_depth, skipped.exit_depth)
    if name == "empty" or origin[0] == 30:
        assert not skipped.accumulation.any() and not skipped.features.any()
        assert torch.equal(skipped.depth, dense.depth)


def rays_through(grid: VoxelGrid, count: int = 500) -> tuple[SampledRays, Tensor, Tensor]:
    """Rays all around from within the box, and their samples in normalised coordinates."""
    generator = torch.Generator().manual_seed(2)
    directions = F.normalize(torch.randn(count, 3, generator=generator), dim=-1)
    start = torch.full((count,), 0.1)
    leave = torch.where(directions > 0, AABB[1] / directions, AABB[0] / directions).amin(-1)
    step = (leave - start) / SAMPLES
    slopes = directions * (2 / (AABB[1] - AABB[0]))
    origins = grid.normalise(torch.zeros(count, 3))
    rays = sampled_rays(grid, origins, slopes, start, step, step, SAMPLES)
    depth = start[:, None] + step[:, None] * (torch.arange(SAMPLES) + 0.5)
    return rays, origins[:, None] + slopes[:, None] * depth[..., None], step


@pytest.mark.parametrize("name", ["thin wall", "clouds", "thin fog", "in density"])
def test_no_sample_of_a_weight_above_the_bound_is_left_out(name):
    grid = scenes()[name]
    rays, points, step = rays_through(grid)
    weights, _ = occupancy_along_rays(sample_voxels(grid.density, points[None])[0, ..., 0], step[:, None])
    found = march(grid.density, empty_space(grid, SAMPLES), rays)
    read = torch.zeros(rays.count, SAMPLES)
    read[found.ray, found.number.long()] = found.weight
    left_out = weights[read == 0]
    assert (left_out <= WEIGHT_BOUND * 1.01).all()
    assert torch.allclose(read[read > 0], weights[read > 0], rtol=SAMPLES * WEIGHT_BOUND, atol=1e-5)
    assert (found.ray.diff() >= 0).all() and (found.number.diff()[found.ray.diff() == 0] > 0).all()
    if name == "clouds":
        assert len(found.ray) < 0.8 * weights.numel()


def test_distances_are_those_of_a_search_by_hand():
    density = torch.zeros(SHAPE)
    density[3, 5, 7], density[9, 20, 2] = 1.0, 1e-4
    space = find_empty_space(density, 1e-3)
    cells = torch.stack(torch.meshgrid(*(torch.arange(n + 1) for n in SHAPE), indexing="ij"), dim=-1)
    nearest = torch.stack([(cells - c).abs().amax(-1) for c in (cells[3:5, 5:7, 7:9].reshape(-1, 3))]).amin(0)
    assert torch.equal(space.distance.long(), nearest.clamp(max=FARTHEST))
    assert torch.equal(space.occupied, cell_maximum(density) > 1e-3)


def test_everything_is_made_anew_when_a_scene_changes(way):
    grid, cameras = scenes()["thin wall"], camera()
    with torch.no_grad():
        before = render(grid, cameras, None, True)
        assert empty_space(grid, SAMPLES) is empty_space(grid, SAMPLES)
        assert feature_table(grid) is feature_table(grid)
        grid.density[..., :8, :] = 9.0  # into what was seen through
        grid.features.mul_(2)
        after, expected = (render(grid, cameras, None, skips) for skips in (True, False))
    assert (after.features - before.features).abs().max() > 0.1
    assert torch.allclose(after.features, expected.features, atol=2e-2)
    edited = replace(grid, density=torch.zeros_like(grid.density))
    with torch.no_grad():
        assert not render(edited, cameras, None, True).accumulation.any()


def test_a_field_shows_the_same_grid_until_it_changes():
    field = VoxelGridField(scenes()["clouds"], trainable=True)
    with torch.no_grad():
        shown = field.grid()
        assert field.grid() is shown
        field.density.fill_(3.0)
        assert field.grid() is not shown and float(field.grid().density.min()) == 3.0
        field.load_state_dict(VoxelGridField(scenes()["thin wall"], trainable=True).state_dict())
        assert float(field.grid().density.max()) == 3.0 and float(field.grid().density.min()) == 0.0
    assert field.grid().features.requires_grad and field.grid() is not field.grid()


def test_with_gradients_and_in_small_images_the_cpu_renders_densely(monkeypatch):
    grid = scenes()["clouds"]
    assert not renderer.skips(grid, 100) and renderer.skips(grid, 10**7)
    learning = replace(grid, features=grid.features.clone().requires_grad_())
    assert not renderer.skips(learning, 10**7)
    with torch.no_grad():
        assert renderer.skips(learning, 10**7)


# As on CUDA


class WalkedOnTheCPU:
    """What nerfacc's CUDA traversal gives, by testing every step: intervals whose middle lies in an occupied cell."""

    def __init__(self, values: Tensor, ray_indices: Tensor, left: bool | None = None) -> None:
        self.vals, self.ray_indices, self.packed_info = values, ray_indices, None
        half = torch.arange(len(values)) % 2 == 0
        self.is_left, self.is_right = half, ~half


def walk(rays_o, rays_d, binaries, aabbs, near_planes, far_planes, step_size, cone_angle):
    steps = torch.arange(int(far_planes.max()))
    starts = near_planes[:, None] + step_size * steps
    middle = starts + step_size / 2
    cell = (rays_o[:, None] + rays_d[:, None] * middle[..., None]).floor().long()
    x, y, z = (cell[..., axis].clamp(0, binaries.shape[axis + 1] - 1) for axis in range(3))
    ray, number = (binaries[0, x, y, z] & (middle < far_planes[:, None])).nonzero(as_tuple=True)
    values = torch.stack([starts[ray, number], starts[ray, number] + step_size], dim=1).flatten()
    return WalkedOnTheCPU(values, ray), WalkedOnTheCPU(values, ray)


@pytest.mark.parametrize("name", ["empty", "thin wall", "clouds", "thin fog"])
def test_nerfstudios_sampler_finds_the_samples_that_marching_finds(name, monkeypatch):
    monkeypatch.setattr(occ_grid, "traverse_grids", walk)
    grid = scenes()[name]
    rays, _, _ = rays_through(grid)
    space = empty_space(grid, SAMPLES)
    expected, found = march(grid.density, space, rays), packed_samples.traversed_samples(grid.density, space, rays)
    dense = [torch.zeros(rays.count, SAMPLES) for _ in range(2)]
    for weights, samples in zip(dense, (expected, found), strict=True):
        weights[samples.ray, samples.number.long()] = samples.weight
    assert torch.allclose(*dense, atol=1e-5)


def test_gradients_of_packed_samples_are_those_of_the_dense_way(monkeypatch):
    monkeypatch.setattr(occ_grid, "traverse_grids", walk)
    monkeypatch.setattr(renderer, "march", packed_samples.traversed_samples)
    monkeypatch.setattr(renderer, "compiled", lambda: None)
    gradients = []
    for skips in (False, True):
        grid = scenes()["clouds"]
        grid.density.requires_grad_(), grid.features.requires_grad_()
        maps = render(grid, camera(), None, skips)
        (maps.features.square().mean() + maps.depth.mean()).backward()
        gradients.append((grid.features.grad, grid.density.grad * (grid.density > 0.05)))
    for expected, found in zip(*gradients, strict=True):
        assert (found - expected).norm() <= 0.02 * expected.norm()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("name", list(scenes()))
def test_on_cuda_it_agrees_with_the_dense_way(name):
    grid, cameras = scenes()[name].to("cuda"), camera().to("cuda")
    with torch.no_grad():
        dense, skipped = (render(grid, cameras, None, skips) for skips in (False, True))
    allowed = SAMPLES * WEIGHT_BOUND if name == "thin fog" else 2e-3
    assert (dense.accumulation - skipped.accumulation).abs().max() <= allowed
    assert (dense.features - skipped.features).abs().max() <= 10 * allowed


# The compiled function


@pytest.mark.parametrize("channels", [1, 8, 21, 61])
@pytest.mark.parametrize("features", [None, 6])
def test_the_compiled_function_sums_any_number_of_channels(monkeypatch, channels, features):
    if compiled_march.compiled() is None:
        pytest.skip("there is no C++ compiler")
    generator = torch.Generator().manual_seed(3)
    grid = replace(scenes()["clouds"], features=torch.randn(1, channels, *SHAPE, generator=generator))
    with torch.no_grad():
        found = render(grid, camera(), features, True)
        monkeypatch.setattr(renderer, "compiled", lambda: None)
        expected = render(grid, camera(), features, True)
    assert torch.allclose(found.features, expected.features, atol=1e-4)
    assert torch.allclose(found.accumulation, expected.accumulation, atol=1e-5)
    assert torch.allclose(found.depth, expected.depth, atol=1e-4)


def test_the_compiled_code_leaves_the_processs_arithmetic_alone():
    """Linked with -ffast-math it had all of the process flush denormal numbers to zero, which NumPy warned of."""
    code = """
import warnings
from nfldm_ns.autoencoder.compiled_march import compiled
compiled()
import numpy as np
import torch
warnings.simplefilter("error")
assert np.finfo(np.float32).smallest_subnormal > 0
assert float(torch.tensor(1e-40) * 0.5) > 0
"""
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)


def test_a_compiler_that_fails_is_told_and_done_without(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv("CXX", "false")
    with pytest.warns(UserWarning, match="could not be compiled by false"):
        assert compiled_march.compiled.__wrapped__() is None
    assert not list(tmp_path.rglob("*.so"))
    monkeypatch.setenv("NFLDM_COMPILED", "0")
    assert compiled_march.compiled.__wrapped__() is None


def test_a_cache_that_cannot_be_written_is_told_and_nothing_printed(monkeypatch, tmp_path, capfd):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    monkeypatch.setenv("CXX", "c++")
    with pytest.warns(UserWarning, match="Not a directory.*: scenes are rendered by PyTorch alone"):
        assert compiled_march.compiled.__wrapped__() is None
    assert capfd.readouterr().out == ""


def test_without_a_compiler_nothing_is_said(monkeypatch, recwarn):
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setattr(compiled_march.shutil, "which", lambda name: None)
    assert compiled_march.compiled.__wrapped__() is None
    assert not recwarn.list


def test_largest_weights_stand_for_the_whole_ray():
    samples = skipping.RaySamples(torch.tensor([0, 0, 0, 2]), torch.arange(4.0), torch.tensor([0.1, 0.5, 0.2, 0.3]))
    chosen = skipping.largest(samples, 3, 2)
    assert torch.equal(chosen.number[:2], torch.tensor([1.0, 2.0]))
    assert torch.equal(chosen.ray, torch.tensor([0, 0, 2]))
    assert torch.allclose(chosen.weight, torch.tensor([0.5, 0.2, 0.3]) * torch.tensor([8 / 7, 8 / 7, 1]))
