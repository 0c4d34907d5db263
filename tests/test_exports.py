"""Exports: surfaces lie where they are known to lie, files say to other programs what they should."""

from __future__ import annotations

import math
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
import trimesh
from jaxtyping import Float
from nerfstudio.cameras.cameras import Cameras
from safetensors.numpy import load_file
from scipy.spatial import cKDTree
from torch import Tensor

from nfldm_ns.commands.export import main
from nfldm_ns.errors import UserInputError
from nfldm_ns.exports.depth_fusion import fuse_depth, plane_maps
from nfldm_ns.exports.isosurface import (
    Triangles,
    crossed_cells,
    drop_small_components,
    extract_isosurface,
    refined_density,
    surface_level,
    vertex_normals,
)
from nfldm_ns.exports.mesh import project, scene_mesh, without_unseen
from nfldm_ns.exports.points import scene_points
from nfldm_ns.exports.splat_fitting import fit_splats, scene_splats, splat_psnr
from nfldm_ns.exports.splat_renderer import gsplat_works, render_splats, render_with_gsplat
from nfldm_ns.exports.splats import SH_DC, Splats, read_splats, rotation_matrices, rotations_to, write_splats
from nfldm_ns.exports.surface_views import SurfaceViews, further_cameras, scene_cameras, surface_views, views_of
from nfldm_ns.exports.voxels import read_voxels, write_voxels
from nfldm_ns.generated.cameras import look_along, surround_cameras
from nfldm_ns.generated.scene_files import GeneratedScene, load_generated_scene
from nfldm_ns.plugin.generated_run import write_generated_scene
from nfldm_ns.scenes.views import camera_rays, make_cameras
from nfldm_ns.scenes.voxel_grid import VoxelGrid, voxel_centres
from tests.small_models import random_grid, small_scene_autoencoder
from tests.synthetic import AABB

SHAPE = (20, 24, 24)  # voxels of 0.2, 0.25 and 0.25 m
VOXEL = 0.25
OPACITY = 0.5  # of a voxel on the surfaces of these scenes
ROOM = ((-2.1, -1.9, -1.3), (2.2, 1.8, 1.4))
COLORS = torch.tensor(
    [[[0.9, 0.2, 0.2], [0.2, 0.9, 0.2], [0.3, 0.3, 0.3]], [[0.2, 0.2, 0.9], [0.9, 0.9, 0.2], [0.8] * 3]]
)


def grid_of(inside: Float[Tensor, "z y x"], colors: Float[Tensor, "z y x 3"], steepness: float = 40.0) -> VoxelGrid:
    """Voxels whose density is `steepness` times a distance (metres inside of a body), up to a voxel deep."""
    density = (inside * steepness + surface_density()).clamp(0, 2 * surface_density() + 10)
    features = torch.cat([colors.movedim(-1, 0) * 2 - 1, torch.zeros(1, *SHAPE)])
    return VoxelGrid(density[None, None], features[None], torch.tensor(AABB), torch.zeros(1, 2, 4))


def surface_density() -> float:
    empty = torch.zeros(1, 1, *SHAPE)
    return surface_level(VoxelGrid(empty, empty, torch.tensor(AABB)), OPACITY)


def ball(radius: float = 1.2, centre: tuple[float, float, float] = (0.3, -0.2, 0.1)) -> VoxelGrid:
    """A red ball whose isosurface, at `OPACITY`, is a sphere."""
    distance = (voxel_centres(SHAPE, torch.tensor(AABB)) - torch.tensor(centre)).norm(dim=-1)
    return grid_of(radius - distance, torch.tensor([0.8, 0.2, 0.2]).expand(*SHAPE, 3), steepness=4.0)


def room() -> VoxelGrid:
    """A box-shaped room, seen from inside, with one colour for each of its faces."""
    places = voxel_centres(SHAPE, torch.tensor(AABB))
    corners = torch.tensor(ROOM)
    beyond = torch.stack([corners[0] - places, places - corners[1]])
    flat = beyond.movedim(-1, 1).flatten(0, 1)
    nearest = flat.argmax(0)
    return grid_of(flat.amax(0), COLORS.reshape(6, 3)[nearest])


def plain_scene(grid: VoxelGrid, cameras: Cameras | None = None) -> GeneratedScene:
    """A scene whose renderer shows the first three features as colours, without detail."""
    renderer = small_scene_autoencoder()
    torch.nn.init.zeros_(renderer.decoder.out.weight)
    cameras = surround_cameras(8, (32, 32), 16.0) if cameras is None else cameras
    return GeneratedScene(grid, renderer.requires_grad_(False), cameras)


def outside_cameras(distance: float = 2.6) -> Cameras:
    """Six cameras around the ball, level, that look at the origin."""
    yaw = torch.arange(6) / 6 * 2 * math.pi
    positions = -distance * torch.stack([yaw.cos(), yaw.sin(), torch.zeros(6)], dim=-1)
    return make_cameras(look_along(positions, yaw, torch.zeros(6)), 24.0, 24.0, 16.0, 16.0, 32, 32)


def solid(triangles: Triangles) -> trimesh.Trimesh:
    return trimesh.Trimesh(triangles.vertices, triangles.faces, process=False)


def distance_to_room(points: np.ndarray) -> np.ndarray:
    """Metres from points to the nearest face of the room, or its plane."""
    return np.stack([np.abs(points - np.array(corner)) for corner in ROOM]).min((0, 2))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The room, as `nfldm-sample` writes scenes."""
    folder = tmp_path_factory.mktemp("exports") / "room"
    scene = plain_scene(room())
    write_generated_scene(folder, scene.grid, scene.renderer, scene.cameras)
    return folder


# Isosurfaces


@pytest.mark.parametrize("factor", [1, 2, 4])
def test_a_ball_becomes_a_closed_sphere_that_faces_outwards(factor):
    mesh = extract_isosurface(ball(), surface_density(), factor)
    radii = np.linalg.norm(mesh.vertices - [0.3, -0.2, 0.1], axis=-1)
    assert np.abs(radii - 1.2).max() < 0.1 * VOXEL
    assert solid(mesh).is_watertight and solid(mesh).is_winding_consistent
    assert solid(mesh).volume == pytest.approx(4 / 3 * math.pi * 1.2**3, rel=0.05)
    outwards = (mesh.vertices - [0.3, -0.2, 0.1]) / radii[:, None]
    assert (vertex_normals(mesh) * outwards).sum(-1).min() > 0.9


def test_walls_at_the_border_of_the_box_are_closed_there():
    mesh = extract_isosurface(room(), surface_density(), 2)
    assert solid(mesh).is_watertight
    assert (mesh.vertices >= np.array(AABB[0]) - 1e-6).all() and (mesh.vertices <= np.array(AABB[1]) + 1e-6).all()
    inside = np.prod(np.array(ROOM[1]) - np.array(ROOM[0]))
    whole = np.prod(np.array(AABB[1]) - np.array(AABB[0]))
    assert solid(mesh).volume == pytest.approx(whole - inside, rel=0.02)


@pytest.mark.parametrize("factor", [2, 4])
def test_refinement_finds_what_reading_density_everywhere_finds(factor):
    grid = random_grid(1)
    level = 1.0
    refined = refined_density(grid, level, factor)
    sizes = [n * factor + factor + 1 for n in grid.shape]
    lattice = torch.stack(torch.meshgrid(*(torch.arange(n) for n in sizes), indexing="ij"), dim=-1)
    points = grid.aabb[0] + (lattice.flip(-1) / factor - 0.5) * grid.voxel_size
    everywhere = grid.sample(points.reshape(1, -1, 3))[0].reshape(sizes)
    crossed = crossed_cells(everywhere, level)
    assert torch.equal(crossed_cells(refined, level), crossed) and 0.05 < crossed.float().mean() < 0.9
    corner = crossed.nonzero()
    assert torch.allclose(refined[corner.unbind(-1)], everywhere[corner.unbind(-1)], atol=1e-4)


def test_one_voxel_of_the_level_stops_the_share_of_light():
    grid = VoxelGrid(torch.zeros(1, 1, *SHAPE), torch.zeros(1, 1, *SHAPE), torch.tensor(AABB))
    edge = (0.2 * 0.25 * 0.25) ** (1 / 3)
    for opacity in (0.1, 0.5, 0.9):
        assert 1 - math.exp(-surface_level(grid, opacity) * edge) == pytest.approx(opacity, abs=1e-6)


def test_small_parts_are_dropped():
    grid = ball()
    grid.density[0, 0, 16:18, 2:4, 2:4] = 20.0
    mesh = extract_isosurface(grid, surface_density(), 1)
    assert solid(mesh).body_count == 2
    kept = drop_small_components(mesh, 4.0)
    assert solid(kept).body_count == 1 and solid(kept).is_watertight
    assert np.abs(np.linalg.norm(kept.vertices - [0.3, -0.2, 0.1], axis=-1) - 1.2).max() < 0.1 * VOXEL
    with pytest.raises(UserInputError, match="lower --min-component"):
        drop_small_components(mesh, 1e4)


# Fused depth


def seen_depth(cameras: Cameras, depth: Float[Tensor, "views height width"]) -> SurfaceViews:
    """Views of which nothing but depth is known; no surface where it is infinite."""
    seen = depth.isfinite()[:, None]
    depth = torch.where(seen, depth[:, None], torch.full_like(depth[:, None], 5.0))
    return SurfaceViews(cameras, torch.zeros(len(depth), 3, *depth.shape[2:]), depth, depth, seen)


def empty_grid() -> VoxelGrid:
    return VoxelGrid(torch.zeros(1, 1, *SHAPE), torch.zeros(1, 1, *SHAPE), torch.tensor(AABB))


@pytest.mark.parametrize("factor", [1, 4])
def test_depth_of_a_ball_gives_the_ball(factor):
    cameras = outside_cameras()
    origins, directions = camera_rays(cameras, 32, 32)
    a = directions.square().sum(-1)
    b = (directions * origins[:, None, None]).sum(-1)
    depth = (-b - (b.square() - a * (origins.square().sum(-1) - 1.2**2)[:, None, None]).sqrt()) / a
    mesh = fuse_depth(empty_grid(), [seen_depth(cameras, depth.nan_to_num(math.inf))], factor)
    radius = np.linalg.norm(mesh.vertices, axis=-1)
    assert len(mesh.faces) > 200 and np.median(np.abs(radius - 1.2)) < 0.02 and np.abs(radius - 1.2).max() < 0.12
    assert ((vertex_normals(mesh) * mesh.vertices).sum(-1) > 0).mean() > 0.99, "they face what sees them"


def test_a_floor_seen_from_low_above_is_flat():
    """Rays graze it, so that along them its depth grows by far more than a truncation from pixel to pixel."""
    poses = look_along(torch.tensor([[0.0, 0.0, -1.2]]).expand(8, 3), torch.arange(8) * math.pi / 4, torch.zeros(8))
    cameras = make_cameras(poses, 24.0, 24.0, 16.0, 16.0, 32, 32)
    down = camera_rays(cameras, 32, 32)[1][..., 2]
    depth = torch.where(down < -0.05, -0.4 / down, torch.full_like(down, math.inf))
    mesh = fuse_depth(empty_grid(), [seen_depth(cameras, depth)], 2)
    assert np.abs(mesh.vertices[:, 2] + 1.6).max() < 0.01
    assert solid(mesh).area > 10 and (vertex_normals(mesh)[:, 2] > 0.99).all()


def test_pixels_know_the_distance_to_their_plane():
    normal, offset = torch.tensor([0.3, -0.5, 0.8]), 2.0  # in a camera that looks along z
    normal = normal / normal.norm()
    camera = outside_cameras()[0]
    grid = torch.stack(torch.meshgrid((torch.arange(32) - 15.5) / 24, (torch.arange(32) - 15.5) / 24, indexing="xy"))
    slope = grid[0] * normal[0] + grid[1] * normal[1] + normal[2]
    inverse, cosine, whole, nearest = plane_maps(camera, offset / slope, torch.ones(32, 32, dtype=torch.bool))
    within = (slice(1, -1), slice(1, -1))
    assert torch.allclose(cosine[within], slope[within], atol=1e-4) and bool(whole.all())
    assert torch.allclose(1 / inverse, offset / slope) and bool((nearest <= offset / slope + 1e-5).all())


def test_what_lies_at_an_edge_of_depth_is_on_no_surface():
    depth = torch.full((1, 32, 32), 1.0)
    depth[:, :, 16:] = 3.0
    whole = plane_maps(outside_cameras()[0], depth[0], torch.ones(32, 32, dtype=torch.bool))[2]
    assert not whole[:, 15:17].any() and bool(whole[:, :15].all()) and bool(whole[:, 17:].all())


def test_views_that_see_nothing_make_no_surface():
    cameras = outside_cameras()
    with pytest.raises(UserInputError, match="see no surfaces"):
        fuse_depth(empty_grid(), [seen_depth(cameras, torch.full((6, 32, 32), math.inf))])
    with pytest.raises(ValueError, match="resolution factor"):
        fuse_depth(empty_grid(), [], 3)


def test_expected_depth_is_the_renderers():
    scene = plain_scene(room())
    expected = views_of(scene)[0].expected
    with torch.no_grad():
        rendered = scene.renderer.render(scene.grid, scene_cameras(scene)[None, ...]).depth[0]
    rendered = torch.nn.functional.interpolate(rendered, expected.shape[-2:])
    assert (expected - rendered).abs().median() < 0.05


# Meshes


def test_projection_is_that_of_the_rays():
    cameras = outside_cameras()
    origins, directions = camera_rays(cameras, 32, 32)
    points = origins[2] + 1.7 * directions[2]
    places, depth = project(cameras[2], points.reshape(-1, 3))
    assert torch.allclose(depth, torch.full_like(depth, 1.7), atol=1e-5)
    pixel = (torch.arange(32) + 0.5) / 16 - 1
    expected = torch.stack(torch.meshgrid(pixel, pixel, indexing="xy"), dim=-1).reshape(-1, 2)
    assert torch.allclose(places, expected, atol=1e-5)


def test_a_red_ball_is_red_where_it_is_seen_and_where_not():
    mesh = scene_mesh(plain_scene(ball(), outside_cameras()), method="density", opacity=OPACITY, ring_places=0)
    assert 0.3 < mesh.seen.mean() < 1.0  # level cameras see neither pole
    assert np.abs(mesh.colors - [0.8, 0.2, 0.2]).max() < 0.25  # a pixel of the rim is half background
    assert np.abs(mesh.colors - [0.8, 0.2, 0.2]).mean() < 0.05


METHODS = [{"method": "density", "opacity": OPACITY}, {"method": "depth"}]


@pytest.mark.parametrize("how", METHODS, ids=["density", "depth"])
def test_faces_of_a_room_have_their_colours(how):
    mesh = without_unseen(scene_mesh(plain_scene(room()), ring_places=2, **how))
    vertices = mesh.triangles.vertices
    reach = 0.1 if how["method"] == "density" else 0.4  # of a voxel: light goes some way into walls
    assert np.median(distance_to_room(vertices)) < reach * VOXEL
    for side in range(2):
        for axis in range(3):
            others = [i for i in range(3) if i != axis]
            middle = (np.abs(vertices[:, others]) < 0.8).all(-1)
            face = middle & (np.abs(vertices[:, axis] - ROOM[side][axis]) < (0.2 + reach) * VOXEL)
            assert face.sum() > 20
            assert np.abs(mesh.colors[face] - COLORS[side, axis].numpy()).mean() < 0.06, (side, axis)


@pytest.mark.parametrize("how", METHODS, ids=["density", "depth"])
def test_the_mesh_agrees_with_rendered_depth(how):
    """Median distances both ways, on a room whose walls are of uneven density."""
    grid = room()
    grid.density *= 0.5 + torch.rand(grid.density.shape, generator=torch.Generator().manual_seed(0))
    scene = plain_scene(grid)
    mesh = scene_mesh(scene, ring_places=2, only_seen=True, **how)
    with torch.no_grad():
        rendered = scene.renderer.render(grid, scene.cameras[None, ...])
    origins, directions = camera_rays(scene.cameras, 32, 32)
    points = (origins[:, None, None] + directions * rendered.depth[0, :, 0, ..., None])[
        rendered.accumulation[0, :, 0] > 0.5
    ]
    surface = trimesh.sample.sample_surface(solid(mesh.triangles), 20000, seed=0)[0]
    assert np.median(cKDTree(surface).query(points.numpy())[0]) < 0.15
    assert np.median(cKDTree(points.numpy()).query(surface)[0]) < 0.15


def test_further_cameras_stand_in_the_room():
    scene = plain_scene(room())
    cameras = further_cameras(scene, 5)
    positions = cameras.camera_to_worlds[:, :, 3]
    assert cameras.shape == (60,) and further_cameras(scene, 0) is None
    assert (positions > torch.tensor(ROOM[0])).all() and (positions < torch.tensor(ROOM[1])).all()
    assert positions[:, :2].norm(dim=-1).min() > 0.5


@pytest.mark.parametrize("name", ["room.ply", "room.obj", "room.glb", "ROOM.PLY"])
def test_meshes_are_read_by_trimesh(name, folder, tmp_path, capsys):
    main(["mesh", str(folder), "--output", str(tmp_path / name), "--ring-places", "1", "--resolution-factor", "1"])
    assert [path.name for path in tmp_path.iterdir()] == [name]
    scene = load_generated_scene(folder)
    expected = scene_mesh(scene, ring_places=1, resolution_factor=1, min_component=0.1)
    assert f"{len(expected.triangles.faces)} faces" in capsys.readouterr().out
    read = trimesh.load(tmp_path / name, process=False)
    if name.endswith("glb"):
        upright = read.to_geometry()
        (read,) = read.geometry.values()
        turned = read.vertices[:, [0, 2, 1]] * [1, 1, -1]  # y up
        assert np.allclose(upright.vertices, turned, atol=1e-5)
    assert np.allclose(read.vertices, expected.triangles.vertices, atol=1e-5)
    assert np.array_equal(read.faces, expected.triangles.faces)
    assert np.abs(read.visual.vertex_colors[:, :3] / 255 - expected.colors.clip(0, 1)).max() < 0.003


# Points


def vertices_of(path: Path) -> np.ndarray:
    """The table of vertices as trimesh reads it."""
    return trimesh.load(path).metadata["_ply_raw"]["vertex"]["data"]


def test_points_lie_on_the_room_and_look_into_it(folder, tmp_path):
    main(["points", str(folder), "--output", str(tmp_path / "points.ply"), "--spacing", "0.1"])
    data = vertices_of(tmp_path / "points.ply")
    points = np.stack([data[name] for name in "xyz"], axis=-1)
    normals = np.stack([data[name] for name in ("nx", "ny", "nz")], axis=-1)
    colors = np.stack([data[name] for name in ("red", "green", "blue")], axis=-1) / 255
    assert np.quantile(distance_to_room(points), 0.95) < 0.5 * VOXEL
    wall = (np.abs(points[:, 0] - ROOM[1][0]) < 0.1) & (np.abs(points[:, 1:]) < 1).all(-1)
    assert wall.sum() > 50
    assert np.allclose(normals[wall], [-1, 0, 0], atol=0.1)
    assert np.abs(colors[wall] - COLORS[1, 0].numpy()).mean() < 0.05


def test_thinning_keeps_one_point_per_cell_and_side():
    scene = plain_scene(room())
    everything, few = scene_points(scene, spacing=0), scene_points(scene, spacing=0.4)
    assert len(everything.positions) == 8 * 32 * 32 > 10 * len(few.positions)
    distances, _ = cKDTree(few.positions).query(everything.positions)
    assert distances.max() < 0.4 * math.sqrt(3)
    assert torch.allclose(few.normals.norm(dim=-1), torch.ones(len(few.normals)), atol=1e-5)


# Splats


def test_rotations_turn_the_z_axis_to_the_normal():
    normals = torch.nn.functional.normalize(torch.randn(50, 3), dim=-1)
    normals = torch.cat([normals, torch.tensor([[0.0, 0, 1], [0, 0, -1], [1, 0, 0]])])
    matrices = rotation_matrices(rotations_to(normals))
    assert torch.allclose(matrices[..., 2], normals, atol=1e-4)
    assert torch.allclose(matrices @ matrices.transpose(1, 2), torch.eye(3).expand_as(matrices), atol=1e-5)
    assert torch.allclose(torch.det(matrices), torch.ones(53), atol=1e-5)


def few_splats(count: int = 40) -> Splats:
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int) -> Tensor:
        return torch.rand(*shape, generator=generator)

    positions = random(count, 3) * 2 - 1
    rotations = torch.nn.functional.normalize(random(count, 4) - 0.5, dim=-1)
    return Splats(positions, random(count, 3) - 3, rotations, random(count) * 4 - 1, random(count, 3) * 2 - 1)


def test_one_round_splat_is_a_gaussian_in_the_image():
    camera = outside_cameras()[0]
    splat = Splats(
        torch.zeros(1, 3),
        torch.full((1, 3), math.log(0.2)),
        torch.tensor([[1.0, 0, 0, 0]]),
        torch.zeros(1),
        torch.zeros(1, 3),
    )
    image = render_splats(splat, camera)
    offset = torch.arange(32) + 0.5 - 16
    variance = (24.0 * 0.2 / 2.6) ** 2 + 0.3
    squared = offset[:, None].square() + offset[None].square()
    expected = 0.5 * 0.5 * (-squared / (2 * variance)).exp()
    assert torch.allclose(image[0], expected, atol=0.003)


def test_tiles_compose_as_one_loop_over_sorted_splats_does():
    splats, camera = few_splats(), outside_cameras()[1]
    image = render_splats(splats, camera)
    _, depth = project(camera, splats.positions)
    expected, through = torch.zeros(3, 32, 32), torch.ones(32, 32)
    white = Splats(*(value.clone() for value in vars(splats).values()))
    white.sh_dc = torch.full_like(white.sh_dc, 0.5 / SH_DC)
    for i in depth.argsort():
        alone = Splats(*(value[i : i + 1] for value in vars(white).values()))
        alpha = render_splats(alone, camera)[0]
        expected += through * alpha * splats.colors[i].clamp(min=0)[:, None, None]
        through = through * (1 - alpha)
    assert torch.allclose(image, expected, atol=2e-2)  # tiles draw the tails of their splats further


def test_the_file_of_splats_is_the_usual_one(tmp_path):
    splats = few_splats()
    write_splats(tmp_path / "splats.ply", splats)
    header = (tmp_path / "splats.ply").read_bytes().partition(b"end_header")[0].decode().splitlines()
    names = ["x", "y", "z", "nx", "ny", "nz", "f_dc_0", "f_dc_1", "f_dc_2", "opacity"]
    names += [*(f"scale_{i}" for i in range(3)), *(f"rot_{i}" for i in range(4))]
    assert header == [
        "ply",
        "format binary_little_endian 1.0",
        "element vertex 40",
        *(f"property float {n}" for n in names),
    ]
    data = vertices_of(tmp_path / "splats.ply")
    assert np.array_equal(data["opacity"], splats.opacity_logits.numpy())
    assert np.array_equal(data["rot_0"], splats.rotations[:, 0].numpy())
    assert np.array_equal(data["scale_2"], splats.log_scales[:, 2].numpy())
    again = read_splats(tmp_path / "splats.ply")
    assert all(torch.equal(getattr(again, name), value) for name, value in vars(splats).items())
    (tmp_path / "splats.ply").write_bytes(b"ply\nformat ascii 1.0\n")
    with pytest.raises(UserInputError, match="export it again"):
        read_splats(tmp_path / "splats.ply")


def test_splats_of_a_room_look_like_it_and_fitting_helps(tmp_path):
    scene = plain_scene(room())
    views = surface_views(scene, scene_cameras(scene))
    first = scene_splats(scene, ring_places=0, spacing=0.1)
    write_splats(tmp_path / "splats.ply", scene_splats(scene, ring_places=0, spacing=0.1, fit_steps=60))
    before = splat_psnr(first, views.cameras, views.images)
    after = splat_psnr(read_splats(tmp_path / "splats.ply"), views.cameras, views.images)
    assert before > 22 and after > max(27, before + 2), (before, after)
    normals = rotation_matrices(first.rotations)[..., 2]
    wall = (first.positions - torch.tensor([ROOM[1][0], 0, 0])).abs() < torch.tensor([0.1, 1, 1])
    assert (normals[wall.all(-1)] - torch.tensor([-1.0, 0, 0])).abs().max() < 0.1
    assert (first.log_scales[:, 2] < first.log_scales[:, 0] - 1).all()


def test_fitting_is_the_same_for_the_same_seed():
    scene = plain_scene(room())
    views = [surface_views(scene, scene_cameras(scene))]
    first = scene_splats(scene, ring_places=0, spacing=0.3)
    results = [fit_splats(first, views, 3, seed, "cpu").sh_dc for seed in (0, 0, 1)]
    assert torch.equal(results[0], results[1]) and not torch.equal(results[0], results[2])
    assert torch.equal(fit_splats(first, views, 0).sh_dc, first.sh_dc)


def test_what_lies_beyond_an_opening_is_on_the_border_of_the_box():
    grid = room()
    grid.density[..., 14:] = 0.0  # no wall in the east
    splats = scene_splats(plain_scene(grid), spacing=0.2)
    assert (splats.positions[:, 0] - AABB[1][0]).abs().min() < 0.02


@pytest.mark.gpu
def test_gsplat_draws_what_the_cpu_draws():
    if not gsplat_works():
        pytest.skip("needs gsplat and nvcc")
    splats, camera = few_splats(), outside_cameras()[1]
    moved = Splats(*(value.cuda() for value in vars(splats).values()))
    image = render_with_gsplat(moved, camera.to("cuda")).cpu()
    assert (image - render_splats(splats, camera)).abs().mean() < 0.01


# Voxels


@pytest.mark.parametrize("name", ["voxels.npz", "voxels.safetensors"])
@pytest.mark.parametrize("with_background", [True, False])
def test_voxels_survive_exactly(name, with_background, tmp_path):
    grid = random_grid(1)
    grid.background = grid.background if with_background else None
    write_voxels(tmp_path / name, grid)
    arrays = dict(np.load(tmp_path / name)) if name.endswith("npz") else load_file(tmp_path / name)
    assert set(arrays) == {"density", "features", "aabb"} | ({"background"} if with_background else set())
    assert np.array_equal(arrays["density"], grid.density[0].numpy())
    again = read_voxels(tmp_path / name)
    for field in ("density", "features", "aabb", "background"):
        a, b = getattr(again, field), getattr(grid, field)
        assert (a is None and b is None) or torch.equal(a, b), field
    (tmp_path / name).write_bytes(b"PK\x03\x04 nothing")
    with pytest.raises(UserInputError, match="export them again"):
        read_voxels(tmp_path / name)


def test_the_command_writes_the_voxels_of_the_scene(folder, tmp_path, capsys):
    main(["voxels", str(folder), "--output", str(tmp_path / "new" / "voxels.npz")])
    assert "20 x 24 x 24 voxels" in capsys.readouterr().out
    again, scene = read_voxels(tmp_path / "new" / "voxels.npz"), load_generated_scene(folder)
    assert torch.equal(again.density, scene.grid.density) and torch.equal(again.background, scene.grid.background)


def test_the_command_writes_splats(folder, tmp_path, capsys):
    main(["splats", str(folder), "--output", str(tmp_path / "s.ply"), "--spacing", "0.3", "--fit-steps", "2"])
    assert "splats" in capsys.readouterr().out and len(read_splats(tmp_path / "s.ply").positions) > 100


# What cannot be exported


def refused(capfd, *arguments: str | Path) -> str:
    """The one sentence of a command that ends with exit code 2."""
    with pytest.raises(SystemExit) as ending:
        main([str(argument) for argument in arguments])
    lines = capfd.readouterr().err.strip().splitlines()
    assert ending.value.code == 2 and len(lines) == 1 and lines[0].startswith("error: "), lines
    return lines[0]


@pytest.mark.parametrize(
    ("kind", "arguments", "sentence"),
    [
        ("mesh", ["--output", "room.stl"], "name it .ply or .obj or .glb"),
        ("mesh", ["--output", "room"], "ends in none of what can be written"),
        ("points", ["--output", "room.obj"], "name it .ply"),
        ("splats", ["--output", "room.splat"], "name it .ply"),
        ("voxels", ["--output", "room.pt"], "name it .npz or .safetensors"),
        ("mesh", ["--output", "room.ply", "--resolution-factor", "3"], "give 1, 2, 4 or 8"),
        ("mesh", ["--output", "room.ply", "--opacity", "1"], "between 0 and 1"),
        ("mesh", ["--output", "room.ply", "--level", "-2"], "a density above 0"),
        ("mesh", ["--output", "room.ply", "--opacity", "0.4"], "--opacity says at which density"),
        ("mesh", ["--output", "room.ply", "--level", "4"], "add --method density"),
        (
            "mesh",
            ["--output", "room.ply", "--method", "density", "--level", "900"],
            "no surfaces at density 900 per metre",
        ),
        ("mesh", ["--output", "room.ply", "--min-component", "nan"], "--min-component is nan"),
        ("points", ["--output", "room.ply", "--spacing", "-1"], "--spacing is -1"),
        ("splats", ["--output", "room.ply", "--fit-steps", "-1"], "--fit-steps is -1"),
        ("points", ["--output", "folder.ply"], "is a folder"),
        pytest.param(
            *("splats", ["--output", "s.ply", "--device", "cuda"], "give cpu"),
            marks=pytest.mark.skipif(torch.cuda.is_available(), reason="there is CUDA"),
        ),
        ("voxels", ["--output", "file/room.npz"], "is in the way"),
    ],
)
def test_what_cannot_be_is_refused_in_a_sentence(kind, arguments, sentence, folder, tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "folder.ply").mkdir()
    (tmp_path / "file").touch()
    assert sentence in refused(capfd, kind, folder, *arguments)
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["file", "folder.ply"]


@pytest.mark.parametrize("kind", ["mesh", "points", "splats"])
def test_a_scene_without_surfaces_is_refused(kind, folder, tmp_path, capfd):
    scene = plain_scene(room())
    scene.grid.density *= 0
    write_generated_scene(tmp_path / "empty", scene.grid, scene.renderer, scene.cameras)
    assert "no surfaces" in refused(capfd, kind, tmp_path / "empty", "--output", tmp_path / "out.ply")
    assert not (tmp_path / "out.ply").exists()


def test_a_scene_without_cameras_is_refused(folder, tmp_path, capfd):
    shutil.copytree(folder, tmp_path / "scene")
    (tmp_path / "scene" / "transforms.json").unlink()
    assert "has no transforms.json" in refused(capfd, "points", tmp_path / "scene", "--output", tmp_path / "out.ply")
    assert "no generated scene" in refused(capfd, "points", tmp_path, "--output", tmp_path / "out.ply")


def test_a_full_disk_leaves_the_old_file(folder, small_disk, capfd):
    output = small_disk / "room.ply"
    output.write_bytes(b"old")
    assert "The disk is full" in refused(capfd, "points", folder, "--output", output)
    assert [path.name for path in small_disk.iterdir()] == ["room.ply"] and output.read_bytes() == b"old"
