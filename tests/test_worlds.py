"""Worlds larger than the box: windows, joint sampling, the folder, nerfstudio, ways, exports and the command."""

from __future__ import annotations

import json
import shutil
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from nerfstudio.utils.eval_utils import eval_setup
from PIL import Image
from safetensors.torch import load_file, save_file

from nfldm_ns.commands import export, world
from nfldm_ns.diffusion.joint import JointSampler
from nfldm_ns.diffusion.pipeline import NFLDMPipeline, scene_generators
from nfldm_ns.diffusion.windows import WindowGrid, axis_weights, seed_of_place, window_starts
from nfldm_ns.errors import UserInputError
from nfldm_ns.exports.splat_fitting import splat_psnr
from nfldm_ns.exports.splats import read_splats
from nfldm_ns.exports.surface_views import SurfacePoints
from nfldm_ns.exports.voxels import read_voxels
from nfldm_ns.exports.worlds import tile_views, without_inner_borders, world_mesh, world_points, world_splats
from nfldm_ns.generated.floors import fill_floor
from nfldm_ns.generated.scene_files import half_precision
from nfldm_ns.generated.tensor_coding import read_coded
from nfldm_ns.generated.world_files import World, load_world, tile_path
from nfldm_ns.generated.world_paths import FreeSpace, walk, way_through
from nfldm_ns.sampling import world_folders
from nfldm_ns.sampling.world_folders import extend_world, make_world
from nfldm_ns.sampling.worlds import WorldDecoder, WorldLatents, WorldSampler, WorldSettings, empty_latents
from nfldm_ns.scenes.views import index_cameras
from nfldm_ns.scenes.voxel_grid import VoxelGrid
from tests.small_models import small_pipeline
from tests.synthetic import BEV_CLASSES

STEPS = 3
SETTINGS = WorldSettings(seed=5, num_inference_steps=STEPS, fill_floor=False)
SIZE = (12.0, 9.0)  # the box is 6 x 6 m, c has 4 x 4 cells of 1.5 m, V 16 x 16 columns


def lively(pipeline: NFLDMPipeline) -> NFLDMPipeline:
    """Denoisers that answer to what they see, with means that depend on the place, as trained ones have."""
    torch.manual_seed(0)
    for name in ("coarse_denoiser", "fine_denoiser"):
        denoiser = getattr(pipeline, name)
        torch.nn.init.normal_(denoiser.unet.conv_out.weight, std=0.1)
        denoiser.latent.mean.copy_(0.5 * torch.randn_like(denoiser.latent.mean))
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


@pytest.fixture(scope="module")
def pipeline() -> NFLDMPipeline:
    return lively(small_pipeline())


@pytest.fixture(scope="module")
def folder(pipeline, tmp_path_factory) -> Path:
    """A finished world; read only."""
    path = tmp_path_factory.mktemp("worlds") / "world"
    make_world(pipeline, path, SIZE, SETTINGS, source="small")
    return path


def files(folder: Path) -> dict[str, bytes]:
    """Everything that a world is made of, but pictures of it."""
    names = ("world.json", "renderer.safetensors", "tiles/*", "latents_*")
    return {str(p.relative_to(folder)): p.read_bytes() for name in names for p in folder.glob(name)}


# Windows


@pytest.mark.parametrize(
    ("low", "high", "size", "stride"), [(0, 12, 12, 9), (0, 48, 12, 9), (-7, 41, 12, 9), (3, 20, 4, 3)]
)
def test_windows_cover_all_and_their_weights_sum_to_one(low, high, size, stride):
    starts = window_starts(low, high, size, stride)
    assert starts[0] == low and starts[-1] == high - size
    assert all(0 < b - a <= stride for a, b in pairwise(starts))
    weights = axis_weights(starts, size, 4)
    torch.testing.assert_close(weights.sum(0), torch.ones((high - low) * 4))
    assert bool((weights >= 0).all())
    for start, weight in zip(starts, weights, strict=True):
        inside = torch.zeros(len(weight), dtype=torch.bool)
        inside[(start - low) * 4 : (start - low + size) * 4] = True
        assert not weight[~inside].any()
        if start > low:
            assert weight[inside][0] == 0, "the edge of a window has no say where there is another"


def test_windows_that_cannot_be():
    with pytest.raises(ValueError, match="do not cover"):
        window_starts(0, 8, 12, 9)
    with pytest.raises(ValueError, match="do not cover"):
        window_starts(0, 48, 12, 13)


def test_seeds_belong_to_places():
    seeds = {seed_of_place(3, y, x) for y in range(-3, 4) for x in range(-3, 4)}
    assert len(seeds) == 49 and seed_of_place(3, 0, 0) == 3


# Joint sampling


@pytest.mark.parametrize("flow", [False, True])
def test_a_world_of_one_box_is_the_scene_of_that_seed(tmp_path, flow):
    pipeline = lively(small_pipeline(flow=flow))
    pipeline.register_to_config(contrasts=(1.1, 1.2, 0.9))
    output = pipeline(1, scene_generators(5, 1), num_inference_steps=STEPS)
    made = make_world(pipeline, tmp_path / "world", (6, 6), SETTINGS)
    expected, found = half_precision(output.grids), made.whole()
    assert torch.equal(found.density, expected.density) and torch.equal(found.features, expected.features)
    torch.testing.assert_close(found.background, output.grids.background)
    assert torch.equal(found.aabb, expected.aabb)


class Ideal(torch.nn.Module):
    """Knows that all data have one value, and so the exact velocity at every noise level.

    Args:
        wrapped: the denoiser whose statistics it has.
        value: of the latent, in its own units.
    """

    def __init__(self, wrapped: torch.nn.Module, scheduler, value: float) -> None:
        super().__init__()
        self.latent, self.config = wrapped.latent, wrapped.config
        self.scheduler, self.value = scheduler, value

    def forward(self, sample: torch.Tensor, timestep: torch.Tensor, scene_code: torch.Tensor) -> torch.Tensor:
        cumulative = self.scheduler.alphas_cumprod[timestep[0].long()]
        a, s = cumulative.sqrt(), (1 - cumulative).sqrt()
        clean = (self.value - self.latent.mean) / self.latent.std
        return a * (sample - a * clean) / s.clamp(min=1e-6) - s * clean


@pytest.mark.parametrize("scheduler", ["DPMSolverMultistepScheduler", "EulerDiscreteScheduler", "DDIMScheduler"])
def test_windows_agree_where_the_denoiser_knows_the_data(pipeline, scheduler):
    """Exact predictions, in windows of different means, give the data wherever windows lie and however they overlap."""
    import diffusers

    windows = WindowGrid(window_starts(0, 7, 4, 3), window_starts(0, 10, 4, 3), (4, 4))
    trained, denoiser = pipeline.scheduler, pipeline.coarse_denoiser
    pipeline.scheduler = getattr(diffusers, scheduler).from_config(trained.config, clip_sample=False)
    sampler = JointSampler(
        pipeline, "coarse", windows, windows.windows, {"scene_code": torch.zeros(len(windows.windows), 18)}
    )
    sampler.denoiser = Ideal(denoiser, trained, 0.7)
    noise = torch.randn(1, denoiser.sample_shape[0], *windows.shape)
    try:
        found = sampler(noise, 8, torch.Generator())
    finally:
        pipeline.scheduler = trained
    torch.testing.assert_close(found, torch.full_like(found, 0.7), atol=2e-3, rtol=0)


def test_seams_are_as_smooth_as_windows_are(pipeline, folder):
    """Where windows say the same of V nothing shows; the weights' steps leave none in V."""
    made = load_world(folder)
    latents = WorldLatents.load(folder / "latents_0.safetensors", made.description, pipeline)
    windows = made.description.windows
    decoder = WorldDecoder(pipeline, windows, latents)
    one = decoder._decode(windows.windows[0])
    decoder._decoded = lambda window: one  # type: ignore[assignment,method-assign]
    constant = one.density.new_full(one.density.shape, 2.0)
    one.density, one.features = constant, torch.full_like(one.features, -1.5)
    tile = decoder.tile(windows.y, windows.x, made.aabb)
    torch.testing.assert_close(tile.density, torch.full_like(tile.density, 2.0))
    torch.testing.assert_close(tile.features, torch.full_like(tile.features, -1.5))


def test_tiles_are_parts_of_one_whole(pipeline, folder):
    made = load_world(folder)
    latents = WorldLatents.load(folder / "latents_0.safetensors", made.description, pipeline)
    windows = made.description.windows
    whole = half_precision(WorldDecoder(pipeline, windows, latents).tile(windows.y, windows.x, made.aabb))
    found = made.whole()
    torch.testing.assert_close(found.density, whole.density, atol=1e-3, rtol=2e-3)
    torch.testing.assert_close(found.features, whole.features, atol=1e-3, rtol=2e-3)
    assert found.shape == (4, 24, 32) and torch.equal(found.aabb, torch.tensor([[-6, -4.5, -2], [6, 4.5, 2.0]]))


def test_noise_and_codes_belong_to_places(pipeline):
    small = WindowGrid(window_starts(0, 6, 4, 3), window_starts(0, 8, 4, 3), (4, 4))
    large = WindowGrid(window_starts(-2, 6, 4, 3), window_starts(0, 11, 4, 3), (4, 4))
    first, second = (WorldSampler(pipeline, grid, SETTINGS).canvas_noise() for grid in (small, large))
    for a, b, scale in zip(first, second, (1, 4), strict=True):
        assert torch.equal(a, b[..., 2 * scale :, : 8 * scale])
        torch.testing.assert_close(b.std(), torch.tensor(1.0), atol=0.1, rtol=0)
    varied = WorldSampler(pipeline, large, WorldSettings(seed=5, num_inference_steps=STEPS, variety=2))
    noises = [varied.code_noise((0, x)) for x in (0, 1, 8)]
    assert torch.equal(noises[0], varied.place_noise(0, 0)[0][0]) and torch.equal(
        noises[2], varied.place_noise(0, 1)[0][0]
    )
    assert (noises[1] - noises[0]).norm() < (noises[2] - noises[0]).norm() / 2
    codes = varied.sample_codes([(0, 0), (0, 8)])
    assert not torch.equal(codes[0], codes[1])


def test_told_windows_leave_their_rims_to_their_neighbours(pipeline):
    windows = WindowGrid([0, 9, 18], [0, 9], (12, 12))
    sampler = WorldSampler(pipeline, windows, WorldSettings(method="outpaint"), None)
    corner, middle = sampler._kept((0, 0)), sampler._kept((9, 9))
    assert corner[:11, :11].all() and not corner[11].any() and not corner[:, 11].any()
    assert middle[1:11, 1:].all() and not middle[[0, 11]].any() and not middle[:, 0].any()
    covered = torch.zeros(windows.shape, dtype=torch.int)
    for window in windows.windows:
        covered[windows.place(window)] += sampler._kept(window)
    assert (covered > 0).all(), "all cells are some window's own"
    lone = WorldSampler(pipeline, WindowGrid([0], [0], (12, 12)), WorldSettings(method="outpaint"), None)
    assert lone._kept((0, 0)).all()


# The folder


@pytest.mark.parametrize("method", ["joint", "outpaint"])
def test_a_killed_world_becomes_the_same_to_the_bit(pipeline, tmp_path, method, monkeypatch):
    settings = WorldSettings(seed=5, num_inference_steps=STEPS, method=method)
    make_world(pipeline, tmp_path / "whole", SIZE, settings)
    expected = files(tmp_path / "whole")
    real = (WorldLatents.save, world_folders.write_tile)
    left = [0]

    def killed(run):
        def wrapped(*args, **kwargs):
            if left[0] == 0:
                raise KeyboardInterrupt
            left[0] -= 1
            return run(*args, **kwargs)

        return wrapped

    for survives in (0, 1, 1, 1):  # the code, c, f of a joint world, or of windows; then a tile
        left[0] = survives
        monkeypatch.setattr(WorldLatents, "save", killed(real[0]))
        monkeypatch.setattr(world_folders, "write_tile", killed(real[1]))
        with pytest.raises(KeyboardInterrupt):
            make_world(pipeline, tmp_path / "killed", SIZE, settings)
        with pytest.raises(UserInputError, match="not finished"):
            load_world(tmp_path / "killed")
    monkeypatch.setattr(WorldLatents, "save", real[0])
    monkeypatch.setattr(world_folders, "write_tile", real[1])
    make_world(pipeline, tmp_path / "killed", SIZE, settings)
    assert files(tmp_path / "killed") == expected
    for picture in ("from_above.png", "views/images/source_00.png"):
        assert (tmp_path / "killed" / picture).read_bytes() == (tmp_path / "whole" / picture).read_bytes()


def test_other_settings_and_other_folders_are_refused(pipeline, folder, tmp_path):
    before = files(folder)
    for settings, size, words in (
        (WorldSettings(seed=6, num_inference_steps=STEPS, fill_floor=False), SIZE, "was made with seed 5, not 6"),
        (SETTINGS, (12.0, 12.0), "was made with cells"),
        (WorldSettings(5, STEPS, "outpaint", fill_floor=False), SIZE, "was made with method joint, not outpaint"),
    ):
        with pytest.raises(UserInputError, match=words):
            make_world(pipeline, folder, size, settings)
    make_world(pipeline, folder, SIZE, SETTINGS)
    assert files(folder) == before
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(UserInputError, match="is no world"):
        make_world(pipeline, tmp_path, SIZE, SETTINGS)
    with pytest.raises(UserInputError, match="smaller than the generator's box of 6 x 6 m"):
        make_world(pipeline, tmp_path / "new", (5, 6), SETTINGS)
    with pytest.raises(UserInputError, match="The stride"):
        make_world(pipeline, tmp_path / "new", SIZE, WorldSettings(stride=1.0))
    assert [p.name for p in tmp_path.iterdir()] == ["notes.txt"]


@pytest.mark.parametrize("direction", ["east", "north", "west", "south"])
def test_a_larger_world_keeps_what_it_had(pipeline, folder, tmp_path, direction, monkeypatch):
    old = load_world(folder).whole()
    known = load_file(folder / "latents_0.safetensors")
    shutil.copytree(folder, tmp_path / "world")
    made = extend_world(pipeline, tmp_path / "world", direction, 4.5)
    new = made.whole()
    axis, sign = (0 if direction in ("east", "west") else 1), (1 if direction in ("east", "north") else -1)
    grown = old.aabb.clone()
    grown[1 if sign > 0 else 0, axis] += sign * 4.5
    assert torch.allclose(new.aabb, grown)
    # V beyond the reach of new windows, which begin at most a window before the old border
    points = torch.rand(1, 200, 3) * (old.aabb[1] - old.aabb[0]) + old.aabb[0]
    border = old.aabb[1 if sign > 0 else 0, axis]
    points = points[:, (points[0, :, axis] - border).abs() > 4.5 + 0.4]
    assert points.shape[1] > 20
    for a, b in zip(old.sample(points), new.sample(points), strict=True):
        torch.testing.assert_close(a, b, atol=1e-4, rtol=1e-4)
    latents = load_file(tmp_path / "world" / "latents_1.safetensors")
    rows, columns = known["fine"].shape[-2:]
    part = (slice(None, rows), slice(None, columns)) if sign > 0 else (slice(-rows, None), slice(-columns, None))
    assert torch.equal(latents["fine"][..., part[0], part[1]], known["fine"]), "f of the old part stays to the bit"
    assert not (tmp_path / "world" / "latents_0.safetensors").exists()

    if direction != "west":
        return
    # The same, killed on its way and with another extension asked for in between.
    shutil.copytree(folder, tmp_path / "killed")
    monkeypatch.setattr(world_folders, "write_tile", _stop)
    with pytest.raises(KeyboardInterrupt):
        extend_world(pipeline, tmp_path / "killed", direction, 4.5)
    monkeypatch.undo()
    with pytest.raises(UserInputError, match="is not finished"):
        extend_world(pipeline, tmp_path / "killed", "east", 4.5)
    with pytest.raises(UserInputError, match="finish that by the --extend west"):
        make_world(pipeline, tmp_path / "killed", SIZE, SETTINGS)
    extend_world(pipeline, tmp_path / "killed", direction, 4.5)
    assert files(tmp_path / "killed") == files(tmp_path / "world")


def _stop(*_):
    raise KeyboardInterrupt


def test_an_extension_that_cannot_be(pipeline, folder, tmp_path):
    with pytest.raises(UserInputError, match="is no world yet"):
        extend_world(pipeline, tmp_path / "none", "east")
    with pytest.raises(UserInputError, match="cells are 1.5 m wide"):
        extend_world(pipeline, folder, "east", 0.2)
    with pytest.raises(UserInputError, match="made with other models"):
        extend_world(lively(small_pipeline(seed=3)), folder, "east")


def test_one_map_for_the_whole(tmp_path):
    pipeline = lively(small_pipeline(maps={"bev_classes": 2, "bev_size": (16, 16), "bev_dropout": 0.1}))
    ids = np.zeros((24, 32), np.uint8)
    ids[:6, :10] = 1  # the north-west
    colours = np.array([c.color for c in BEV_CLASSES], np.uint8)
    Image.fromarray(colours[ids]).save(tmp_path / "map.png")
    made = make_world(pipeline, tmp_path / "world", SIZE, SETTINGS, bev=tmp_path / "map.png")
    assert np.array_equal(np.asarray(Image.open(tmp_path / "world" / "bev.png")), ids)
    windows = made.description.windows
    sampler = WorldSampler(pipeline, windows, SETTINGS, np.ascontiguousarray(ids[::-1]))
    maps = sampler.maps(windows.windows)["bev"]
    assert maps.shape == (6, 16, 16) and not maps[0].any(), "the first window is in the south-west"
    north_west = maps[3]
    assert north_west[-6:, :10].all() and north_west.sum() == 60, "rows go north, as those of V"
    with pytest.raises(UserInputError, match="bev"):
        make_world(pipeline, tmp_path / "world", SIZE, SETTINGS)
    Image.fromarray(colours[ids[:, :12]]).save(tmp_path / "part.png")
    with pytest.raises(UserInputError, match="give one of the new part"):
        extend_world(pipeline, tmp_path / "world", "east", 4.5)
    extend_world(pipeline, tmp_path / "world", "east", 4.5, bev=tmp_path / "part.png")
    joined = np.asarray(Image.open(tmp_path / "world" / "bev.png"))
    assert np.array_equal(joined, np.concatenate([ids, ids[:, :12]], axis=1))
    Image.fromarray(colours[ids]).resize((20, 20)).save(tmp_path / "map.png")
    with pytest.raises(UserInputError, match="32 x 24"):
        make_world(pipeline, tmp_path / "other", SIZE, SETTINGS, bev=tmp_path / "map.png")


# Floors


def floored_grid() -> VoxelGrid:
    """A floor at the lowest layer with a hole, a wall, and a pillar in the hole; features say where a column is."""
    density = torch.zeros(1, 1, 8, 12, 12)
    density[:, :, 0] = 10.0
    density[:, :, 0, 4:8, 4:8] = 0.0
    density[:, :, :, :, 10] = 10.0
    density[:, :, 3:6, 5, 5] = 10.0
    features = torch.arange(144.0).view(1, 1, 1, 12, 12).expand(1, 1, 8, 12, 12).clone()
    return VoxelGrid(density, features, torch.tensor([[-3.0, -3, -2], [3, 3, 2]]))


def test_holes_in_the_floor_are_filled_with_the_floor_beside_them():
    grid = floored_grid()
    filled = fill_floor(grid, 0.0)
    hole = torch.zeros(12, 12, dtype=torch.bool)
    hole[4:8, 4:8] = True
    hole[5, 5] = False  # nobody can stand in the pillar
    assert bool((filled.density[0, 0, 0, hole] == 10).all()) and filled.density[0, 0, 0, 5, 5] == 0
    assert torch.equal(filled.density[..., ~hole], grid.density[..., ~hole])
    assert torch.equal(filled.features[..., ~hole], grid.features[..., ~hole])
    assert torch.equal(filled.density[:, :, 3:], grid.density[:, :, 3:]), "above the floor all stays"
    assert filled.features[0, 0, 0, 4, 6] == 3 * 12 + 6, "of the nearest column"
    assert fill_floor(filled, 0.0) is filled


def test_tiles_fill_their_floor_as_the_whole_does(pipeline, folder):
    made = load_world(folder)
    latents = WorldLatents.load(folder / "latents_0.safetensors", made.description, pipeline)
    windows, described = made.description.windows, made.description.model_copy(update={"camera_height": 1.0})
    decoder = WorldDecoder(pipeline, windows, latents)
    seen = []
    whole = decoder.floored_tile(windows.y, windows.x, described)
    for y, x in described.tiles.values():
        tile = decoder.floored_tile(y, x, described)
        rows, columns = (slice(4 * (a[0] - o[0]), 4 * (a[1] - o[0])) for a, o in ((y, windows.y), (x, windows.x)))
        seen.append(torch.isclose(tile.density, whole.density[..., rows, columns], atol=1e-4).float().mean())
    assert min(seen) > 0.99, "but for columns with several nearest ones"


# Reading


def test_only_tiles_near_a_camera_are_read(folder):
    made = load_world(folder)
    assert made.tiles_in_memory == 0
    grid = made.near(torch.tensor([-5.0, -3.5, 0.0]), reach=1.0)
    assert made.tiles_in_memory == 1 and grid.shape[1:] == (8, 8)
    whole = load_world(folder).whole()
    points = torch.tensor([[[-5.0, -3.5, 0.0], [-4.2, -3.1, 0.5], [-5.9, -4.4, -1.0]]])
    for a, b in zip(grid.sample(points), whole.sample(points), strict=True):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-5)


def test_what_is_near_is_rendered_as_the_whole_is(folder):
    made = load_world(folder)
    camera = index_cameras(walk(made, 2, 1), slice(0, 1))
    position = camera.camera_to_worlds[0, :, 3]
    near, whole = made.scene_near(position), made.whole()
    assert torch.equal(near.grid.density, whole.density), "the reach is larger than this world"
    renderer = made.renderer_for(whole)
    assert renderer.config.num_samples == 2 * made.base_renderer.config.num_samples
    assert next(renderer.parameters()) is next(made.base_renderer.parameters())
    with torch.inference_mode():
        views = [
            r.render(g, index_cameras(camera, (None, slice(0, 1)))).rgb
            for r, g in ((near.renderer, near.grid), (renderer, whole))
        ]
    assert torch.equal(*views)


def test_damaged_worlds_end_in_a_sentence(folder, tmp_path):
    copy = tmp_path / "world"

    def fresh() -> Path:
        shutil.rmtree(copy, ignore_errors=True)
        shutil.copytree(folder, copy)
        return copy

    tile_path(fresh(), (0, 0)).unlink()
    with pytest.raises(UserInputError, match="is missing"):
        load_world(copy).whole()
    tile_path(fresh(), (0, 1)).write_bytes(tile_path(copy, (0, 1)).read_bytes()[:-9])
    with pytest.raises(UserInputError, match="is damaged"):
        load_world(copy).whole()
    shutil.copy(tile_path(fresh(), (0, 0)), tile_path(copy, (1, 0)))
    with pytest.raises(UserInputError, match="voxels"):
        load_world(copy).whole()
    (fresh() / "renderer.safetensors").unlink()
    with pytest.raises(UserInputError, match="renderer.safetensors is missing"):
        load_world(copy)
    described = json.loads((fresh() / "world.json").read_text())
    for change, words in (
        ({"version": 9}, "version 2"),
        ({"x_starts": [0, 9]}, "leave gaps"),
        ({"x_starts": [0, 2]}, "backgrounds"),
        ({"reach": -1}, "reach"),
        ({"voxels": "4"}, "voxels"),
    ):
        (copy / "world.json").write_text(json.dumps({**described, **change}))
        with pytest.raises(UserInputError, match=words):
            load_world(copy)
    with pytest.raises(UserInputError, match="is no world"):
        load_world(tmp_path / "nothing")


def as_of_version_1(folder: Path) -> None:
    """Makes the files of a world those that were written before there were compressed ones."""
    for path in (*folder.glob("tiles/*"), folder / "renderer.safetensors"):
        plain = read_coded(path)
        if path.parent != folder:
            save_file(plain, path, {"revision": "0"})
        else:
            save_file(
                {name: value.float() if value.is_floating_point() else value for name, value in plain.items()}, path
            )
    described = json.loads((folder / "world.json").read_text())
    (folder / "world.json").write_text(json.dumps({**described, "version": 1}))


def test_worlds_of_plain_files_open_and_grow(pipeline, folder, tmp_path):
    old = Path(shutil.copytree(folder, tmp_path / "world"))
    sizes = [sum(path.stat().st_size for path in folder.glob("tiles/*"))]
    as_of_version_1(old)
    sizes.append(sum(path.stat().st_size for path in old.glob("tiles/*")))
    assert sizes[0] < 0.95 * sizes[1], "even voxels of random weights are smaller"
    expected, found = load_world(folder), load_world(old)
    assert torch.equal(found.whole().density, expected.whole().density)
    assert torch.equal(found.whole().features, expected.whole().features)
    assert torch.equal(found.backgrounds, expected.backgrounds)
    for name, value in expected.base_renderer.state_dict().items():
        assert torch.equal(found.base_renderer.state_dict()[name], value), name
    grown = extend_world(pipeline, old, "east", 1.5)
    assert json.loads((old / "world.json").read_text())["version"] == 2
    assert torch.equal(grown.whole().density[..., :8], expected.whole().density[..., :8]), "old tiles beside new ones"


def test_a_tile_that_is_not_what_it_says(folder, tmp_path):
    damaged = Path(shutil.copytree(folder, tmp_path / "world"))
    path = tile_path(damaged, (0, 0))
    tensors = load_file(path)
    for description, words in (
        ({"revision": 0, "tensors": {"density": {"dtype": "float16", "shape": [1]}}}, "features"),
        ({"revision": 0, "tensors": 3}, "does not say what its tensors are"),
        ([], "no object"),
    ):
        save_file(tensors, path, {"description": json.dumps(description)})
        with pytest.raises(UserInputError, match=words):
            load_world(damaged).tile((0, 0))


def test_backgrounds_change_slowly(folder):
    made = load_world(folder)
    rows, columns = len(made.description.y_starts), len(made.description.x_starts)
    ramp = torch.arange(columns).float().view(1, -1, 1, 1).expand(rows, columns, 2, 4)
    varied = World(folder, made.description, made.base_renderer, ramp)
    values = [float(varied.background_at(torch.tensor([x, 0.0, 0.0]))[0, 0, 0]) for x in np.linspace(-6, 6, 40)]
    assert values[0] == 0 and values[-1] == columns - 1
    assert all(0 <= b - a + 1e-6 <= 0.7 for a, b in pairwise(values))


# In nerfstudio


def test_a_world_opens_in_nerfstudio(folder, tmp_path):
    moved = tmp_path / "moved"
    shutil.copytree(folder, moved)
    config = (moved / "config.yml").read_text().replace(str(folder), str(moved))
    (moved / "config.yml").write_text(config)
    _, pipeline, _, _ = eval_setup(moved / "config.yml")
    made = load_world(folder)
    views = pipeline.datamanager.eval_dataset
    camera = views.cameras[0:1]
    with pipeline.model.as_trained():
        outputs = pipeline.model.get_outputs_for_camera(camera)
    scene = made.scene_near(camera.camera_to_worlds[0, :, 3])
    with torch.inference_mode():
        expected = (
            scene.renderer.render(scene.grid, index_cameras(camera, (None, slice(0, 1))))
            .rgb[0, 0]
            .clamp(0, 1)
            .permute(1, 2, 0)
        )
    torch.testing.assert_close(outputs["rgb"].cpu(), expected, atol=1e-4, rtol=1e-4)
    assert (outputs["rgb"].cpu() - views[0]["image"]).abs().max() < 2 / 255, "its views are pictures of it"
    assert torch.equal(pipeline.model.scene_box.aabb, made.aabb)
    with pytest.raises(SystemExit):
        pipeline.get_train_loss_dict(0)


# Ways


def test_a_way_goes_through_the_opening():
    """Two rooms with one door: the way takes it, though it is a detour."""
    density = np.zeros((40, 60), np.float32)
    density[:, 29:31] = 20.0
    density[30:36, 29:31] = 0.0
    from scipy.ndimage import distance_transform_edt

    clearance = distance_transform_edt(density < 0.5) * 0.25
    space = FreeSpace(density, clearance.astype(np.float32), (0.0, 0.0), (0.25, 0.25), 0.0)
    way = way_through(space, [(8, 10), (8, 50)], 100.0)
    crossing = way[np.abs(way[:, 0] - 7.5) < 0.3]
    assert len(crossing) and (crossing[:, 1] > 30 * 0.25).all() and (crossing[:, 1] < 36 * 0.25).all()
    assert np.allclose(way[0], [10.5 * 0.25, 8.5 * 0.25]) and np.allclose(way[-1], [50.5 * 0.25, 8.5 * 0.25])


def test_a_walk_is_smooth_level_and_inside(folder):
    made = load_world(folder)
    cameras = walk(made, 6, 10, (32, 48))
    poses = cameras.camera_to_worlds
    assert cameras.shape == (60,) and int(cameras.width[0]) == 48
    positions, forward = poses[:, :, 3], -poses[:, :, 2]
    assert bool(((positions > made.aabb[0]) & (positions < made.aabb[1])).all())
    assert torch.allclose(positions[:, 2], torch.full((60,), made.description.camera_height))
    assert forward[:, 2].abs().max() < 1e-5
    assert (positions[1:] - positions[:-1]).norm(dim=-1).max() < 0.25, "1.4 m/s at 10 frames per second"


# Exports


def test_exports_of_a_world(folder, tmp_path):
    made = load_world(folder)
    mesh = world_mesh(made, opacity=0.05, resolution_factor=1)
    low, high = mesh.triangles.vertices.min(0), mesh.triangles.vertices.max(0)
    assert (low >= made.aabb[0].numpy() - 1e-4).all() and (high <= made.aabb[1].numpy() + 1e-4).all()
    assert (high - low)[0] > 7, "it reaches over more than one box"
    with pytest.raises(UserInputError, match="add --method density"):
        world_mesh(made, method="depth", opacity=0.05)
    points = world_points(made, 0.2)
    assert (points.positions[:, 0].max() - points.positions[:, 0].min()) > 7
    export.main(["voxels", str(folder), "--output", str(tmp_path / "w.npz")])
    assert torch.equal(read_voxels(tmp_path / "w.npz").density, made.whole().density)


def test_splats_of_a_world(folder, tmp_path):
    made = load_world(folder)
    first = world_splats(made, spacing=0.3, ring_places=0)
    assert (first.positions[:, 0].max() - first.positions[:, 0].min()) > 7, "they reach over more than one box"
    assert bool(((first.positions > made.aabb[0] - 1e-3) & (first.positions < made.aabb[1] + 1e-3)).all())
    views = [part for _, part in tile_views(made)]
    options = ["--spacing", "0.3", "--fit-steps", "60", "--ring-places", "0"]
    export.main(["splats", str(folder), "--output", str(tmp_path / "w.ply"), *options])
    fitted = read_splats(tmp_path / "w.ply")
    assert torch.equal(fitted.positions, first.positions)
    before, after = (
        sum(splat_psnr(each, part.cameras, part.images) for part in views) / len(views) for each in (first, fitted)
    )
    assert after > before + 1
    assert len(world_splats(made, spacing=0.3, ring_places=1).positions) > 1.2 * len(first.positions)


def test_what_ends_within_a_world_has_no_splats():
    whole = torch.tensor([[0.0, 0, 0], [40, 20, 4]])
    near = torch.tensor([[10.0, 0, 0], [30, 20, 4]])
    positions = torch.tensor([[10.0, 5, 2], [30, 5, 2], [20, 0, 2], [20, 20, 2], [20, 5, 0], [20, 5, 2]])
    points = SurfacePoints(positions, torch.rand(6, 3), torch.rand(6, 3), torch.rand(6))
    kept = without_inner_borders(points, near, whole)
    assert torch.equal(kept.positions, positions[2:]) and torch.equal(kept.colors, points.colors[2:])


# The command


@pytest.fixture(scope="module")
def saved(pipeline, tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("pipelines") / "small"
    pipeline.save_pretrained(path)
    return path


def test_the_command_makes_a_world_and_its_video(saved, tmp_path, capsys):
    base = [str(saved), "--output-dir", str(tmp_path / "w"), "--num-inference-steps", "2", "--fps", "2"]
    world.main([*base, "--size", "9", "6", "--fly-through", "2"])
    printed = capsys.readouterr().out
    assert "9 x 6 m in 2 tiles" in printed and "ns-viewer --load-config" in printed
    assert (tmp_path / "w" / "fly_through.mp4").stat().st_size > 1000
    world.main(
        [str(saved), "--output-dir", str(tmp_path / "w"), "--extend", "north", "--by", "3", "--fly-through", "0"]
    )
    assert "9 x 9 m in 4 tiles" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--size", "nan", "6"], "--size is nan"),
        (["--size", "3", "6"], "smaller than the generator's box"),
        (["--by", "3"], "give --extend"),
        (["--seed", "-1"], "--seed"),
        (["--extend", "east"], "is no world yet"),
        (["--stride", "0.2"], "The stride is 0.2"),
        (["--bev", "map.png"], "without BEV maps"),
        (["--guidance-scale", "2"], "guidance scale cannot be other than 1"),
    ],
)
def test_commands_that_cannot_be_meant(saved, tmp_path, capsys, arguments, words):
    with pytest.raises(SystemExit) as ended:
        world.main([str(saved), "--output-dir", str(tmp_path / "w"), *arguments])
    assert ended.value.code == 2 and words in " ".join(capsys.readouterr().err.split())
    assert not (tmp_path / "w").exists()


def test_an_empty_canvas_is_not_finished(pipeline):
    assert not empty_latents(pipeline, WindowGrid([0], [0], (4, 4))).finished
