"""How well exported meshes and splats show a generated scene.

    python benchmarks/exports.py --scenes outputs/generated/scene_000000 --output-dir OUT

Meshes, of fused depth and of density at several opacities of a voxel: median distances between the mesh and what the
renderer shows, both ways, of the part of the mesh that the scene's own cameras see; share of their rays that meet it;
PSNR of its colours. What is shown are the points of the renderer's expected depth, and those where half of a pixel's
light is stopped. Where density rises slowly the two are apart, which is reported, too.

Splats, unfitted and fitted: PSNR. PSNR is against the renderer, from the scene's cameras and from a fly-through that
nothing was fitted to; pixels that no mesh meets are black. Times are of one core.

Writes `exports.json`, `exports.md` and, of the first scene, `exports.png`.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import trimesh
from jaxtyping import Float
from nerfstudio.cameras.cameras import Cameras
from scipy.spatial import cKDTree
from torch import Tensor

from nfldm_ns.exports.mesh import ColoredMesh, color_mesh, scene_mesh
from nfldm_ns.exports.splat_fitting import scene_splats, splat_psnr
from nfldm_ns.exports.splat_renderer import splat_images
from nfldm_ns.exports.splats import Splats
from nfldm_ns.exports.surface_views import scene_cameras, surface_views, unproject, views_of
from nfldm_ns.generated.cameras import fly_through
from nfldm_ns.generated.scene_files import GeneratedScene, load_generated_scene
from nfldm_ns.reports.galleries import image_grid, write_png
from nfldm_ns.reports.report import Table
from nfldm_ns.scenes.views import camera_rays
from nfldm_ns.scenes.writing import require_writable, write_json
from shared.running import run, write_tables

SAMPLES = 100_000
KEYS = (
    *("count", "points_to_mesh", "mesh_to_points", "halves_to_mesh", "mesh_to_halves"),
    *("met", "psnr", "psnr_flight", "seconds"),
)
COLUMNS = (
    *(
        "faces, splats",
        "expected depth to mesh (m)",
        "mesh to it (m)",
        "half of the light to mesh (m)",
        "mesh to it (m)",
    ),
    *("rays met", "PSNR (dB)", "in flight (dB)", "s"),
)


@dataclass
class Options:
    """Measure exports."""

    scenes: tuple[Path, ...]
    """folders of generated scenes"""
    output_dir: Path
    """folder for the results"""
    opacities: tuple[float, ...] = (0.3, 0.4)
    """of one voxel, where the surface of a mesh by density lies"""
    resolution_factors: tuple[int, ...] = (2, 4)
    """of meshes by depth; those by density have their default"""
    fit_steps: tuple[int, ...] = (0, 400)
    """of splats"""
    ring_places: int = 2
    """places of further views for splats; meshes have their default"""
    threads: int = 1
    """CPU threads"""
    seed: int = 0
    """of fitting, and of the points drawn on meshes"""


def flight_of(scene: GeneratedScene) -> Cameras:
    """Views that nothing was fitted to."""
    return fly_through(scene_cameras(scene), 8, radius=0.5)


@torch.no_grad()
def rendered_points(scene: GeneratedScene) -> Float[np.ndarray, "points 3"]:
    """Points at the renderer's own expected depth, where accumulation is at least 0.5."""
    cameras = scene_cameras(scene)
    maps = scene.renderer.render(scene.grid, cameras[None, ...]).maps
    origins, directions = camera_rays(cameras, *maps.depth.shape[-2:])
    points = origins[:, None, None] + directions * maps.depth[0, :, 0, ..., None]
    return points[maps.accumulation[0, :, 0] >= 0.5].numpy()


def mesh_images(mesh: ColoredMesh, cameras: Cameras) -> tuple[Float[Tensor, "views 3 height width"], float]:
    """The mesh as cameras see it, black where there is none, and the share of rays that meet it."""
    solid = trimesh.Trimesh(mesh.triangles.vertices, mesh.triangles.faces, process=False)
    height, width = int(cameras.height[0]), int(cameras.width[0])
    origins, directions = camera_rays(cameras, height, width)
    starts = origins[:, None, None].expand_as(directions).reshape(-1, 3).double().numpy()
    places, rays, faces = solid.ray.intersects_location(
        starts, directions.reshape(-1, 3).double().numpy(), multiple_hits=False
    )
    shares = trimesh.triangles.points_to_barycentric(solid.triangles[faces], places)
    colors = np.zeros((len(starts), 3), dtype=np.float32)
    colors[rays] = (mesh.colors[mesh.triangles.faces[faces]] * shares[..., None]).sum(1)
    images = torch.from_numpy(colors).reshape(-1, height, width, 3).movedim(-1, 1)
    return images.clamp(0, 1), len(rays) / len(starts)


def median_distance(points: Float[np.ndarray, "points 3"], others: Float[np.ndarray, "others 3"]) -> float:
    """From points to the nearest of others, in metres."""
    return float(np.median(cKDTree(others).query(points)[0]))


def psnr(images: Tensor, truth: Tensor) -> float:
    """Over all pixels, in dB."""
    return float(-10 * (images - truth).square().mean().log10())


def meshes_of(options: Options) -> dict[str, dict[str, Any]]:
    """Settings of the meshes, by name."""
    fused = {f"mesh by depth, {n} per voxel": {"resolution_factor": n} for n in options.resolution_factors}
    return fused | {f"mesh by density, {o:g}": {"method": "density", "opacity": o} for o in options.opacities}


def measure_mesh(
    scene: GeneratedScene, settings: dict[str, Any], options: Options
) -> tuple[dict[str, float], ColoredMesh]:
    """A mesh with all of its surface for what it shows, and the part that the scene's cameras see for distances."""
    begun = time.process_time()
    mesh = scene_mesh(scene, min_component=0.1, **settings)
    seconds = time.process_time() - begun
    solid = trimesh.Trimesh(mesh.triangles.vertices, mesh.triangles.faces, process=False)
    own = views_of(scene)
    seen = color_mesh(mesh.triangles, own, scene.grid).seen[mesh.triangles.faces].all(-1)
    areas = np.where(seen, solid.area_faces, 0)
    drawn = trimesh.sample.sample_surface(solid, SAMPLES, face_weight=areas, seed=options.seed)[0]
    points, halves = rendered_points(scene), unproject(own[0], scene.grid).positions.numpy()
    row = {
        "count": len(mesh.triangles.faces),
        "points_to_mesh": median_distance(points, drawn),
        "mesh_to_points": median_distance(drawn, points),
        "halves_to_mesh": median_distance(halves, drawn),
        "mesh_to_halves": median_distance(drawn, halves),
        "halves_to_points": median_distance(halves, points),
        "seconds": seconds,
    }
    for key, cameras in {"psnr": scene_cameras(scene), "psnr_flight": flight_of(scene)}.items():
        images, met = mesh_images(mesh, cameras)
        row[key] = psnr(images, surface_views(scene, cameras).images)
        row.setdefault("met", met)
    return row, mesh


def measure_splats(scene: GeneratedScene, steps: int, options: Options) -> tuple[dict[str, float], Splats]:
    """Splats, fitted for some steps."""
    begun = time.process_time()
    splats = scene_splats(scene, fit_steps=steps, ring_places=options.ring_places, seed=options.seed)
    row = {"count": len(splats.positions), "seconds": time.process_time() - begun}
    for key, cameras in {"psnr": scene_cameras(scene), "psnr_flight": flight_of(scene)}.items():
        row[key] = splat_psnr(splats, cameras, surface_views(scene, cameras).images)
    return row, splats


def main(options: Options) -> None:
    torch.set_num_threads(options.threads)
    require_writable(options.output_dir)
    rows: dict[str, list[dict[str, float]]] = {}
    for number, folder in enumerate(options.scenes):
        scene = load_generated_scene(folder)
        flight = flight_of(scene)
        shown = {"rendered": surface_views(scene, flight).images}
        for name, settings in meshes_of(options).items():
            row, mesh = measure_mesh(scene, settings, options)
            rows.setdefault(name, []).append(row)
            shown[name] = mesh_images(mesh, flight)[0]
        for steps in options.fit_steps:
            name = f"splats, {steps} steps"
            row, splats = measure_splats(scene, steps, options)
            rows.setdefault(name, []).append(row)
            shown[name] = splat_images(splats, flight)
        if number == 0:
            write_png(options.output_dir / "exports.png", image_grid(shown))
    means = {name: {key: float(np.mean([r[key] for r in found])) for key in found[0]} for name, found in rows.items()}
    write_json(options.output_dir / "exports.json", {"means": means, "rows": rows})
    cells = [[name, int(row["count"]), *(row.get(key) for key in KEYS[1:])] for name, row in means.items()]
    caption = f"Means of {len(options.scenes)} scenes."
    apart = [row["halves_to_points"] for found in rows.values() for row in found if "halves_to_points" in row]
    if apart:
        caption += f" The two rendered depths are {np.mean(apart):.3f} m apart."
    table = Table(["", *COLUMNS], cells, caption, digits=[0, 0, 3, 3, 3, 3, 3, 2, 2, 1])
    write_tables(options.output_dir / "exports.md", [table])


if __name__ == "__main__":
    run(main, Options, __doc__)
