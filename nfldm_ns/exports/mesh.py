"""A coloured mesh of a scene: the surface that renderings show, or an isosurface, in the colours of renderings."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal, TypeAlias

import numpy as np
import torch
import torch.nn.functional as F
import trimesh
from jaxtyping import Bool, Float
from nerfstudio.cameras.cameras import Cameras
from scipy.spatial import cKDTree
from torch import Tensor

from nfldm_ns.errors import UserInputError
from nfldm_ns.exports.depth_fusion import fuse_depth
from nfldm_ns.exports.isosurface import (
    Triangles,
    drop_small_components,
    extract_isosurface,
    keep_faces,
    surface_level,
    vertex_normals,
)
from nfldm_ns.exports.surface_views import SurfaceViews, views_of
from nfldm_ns.generated.scene_files import GeneratedScene
from nfldm_ns.scenes.views import project_points
from nfldm_ns.scenes.voxel_grid import VoxelGrid
from nfldm_ns.scenes.writing import atomic_path

Method: TypeAlias = Literal["depth", "density"]
RESOLUTION_FACTORS: dict[Method, int] = {"depth": 4, "density": 2}
OPACITY = 0.3  # of a voxel at an isosurface
FORMATS = ("ply", "obj", "glb")
Y_UP = np.array([[1.0, 0, 0, 0], [0, 0, 1, 0], [0, -1, 0, 0], [0, 0, 0, 1]])  # glTF's own axes


@dataclass
class ColoredMesh:
    """A mesh with a colour per vertex.

    Attributes:
        triangles: metres, z up.
        colors: `[V, 3]` in [0, 1].
        seen: `[V]`, true where a view saw the vertex; others have the colour of the nearest that one saw.
    """

    triangles: Triangles
    colors: Float[np.ndarray, "vertices 3"]
    seen: Bool[np.ndarray, " vertices"]


def scene_mesh(
    scene: GeneratedScene,
    *,
    method: Method = "depth",
    resolution_factor: int | None = None,
    opacity: float | None = None,
    level: float | None = None,
    min_component: float = 0.0,
    ring_places: int = 4,
    only_seen: bool = False,
) -> ColoredMesh:
    """The surfaces of a scene in the colours of its renderings.

    Args:
        method: "depth" fuses the depth of renderings (`fuse_depth`): what they show, and nothing where none looks;
            "density" is a closed isosurface of all of V (`extract_isosurface`).
        resolution_factor: cells per voxel and axis; by default 4 by depth, 2 by density.
        opacity: of one voxel at an isosurface, which fixes the density there (`surface_level`); 0.3 by default.
        level: that density itself, in 1/m.
        min_component: smallest surface of a connected part in square metres.
        ring_places: places from where views look at the scene beside its own cameras (`further_cameras`).
        only_seen: leaves out faces that no view sees, such as the backs of walls.

    Raises:
        UserInputError: if there are no surfaces or no cameras, or a density is given for the method "depth".
    """
    return mesh_of_views(
        scene.grid,
        views_of(scene, ring_places),
        method=method,
        resolution_factor=resolution_factor,
        opacity=opacity,
        level=level,
        min_component=min_component,
        only_seen=only_seen,
    )


def mesh_of_views(
    grid: VoxelGrid,
    views: list[SurfaceViews],
    *,
    method: Method = "depth",
    resolution_factor: int | None = None,
    opacity: float | None = None,
    level: float | None = None,
    min_component: float = 0.0,
    only_seen: bool = False,
) -> ColoredMesh:
    """The surfaces of a grid in the colours of some renderings; arguments as `scene_mesh` has them."""
    check_method(method, opacity, level)
    factor = RESOLUTION_FACTORS[method] if resolution_factor is None else resolution_factor
    if method == "depth":
        triangles = fuse_depth(grid, views, factor)
    else:
        level = surface_level(grid, OPACITY if opacity is None else opacity) if level is None else level
        triangles = extract_isosurface(grid, level, factor)
    mesh = color_mesh(drop_small_components(triangles, min_component), views, grid)
    return without_unseen(mesh) if only_seen else mesh


def check_method(method: Method, opacity: float | None, level: float | None) -> None:
    """Raises `UserInputError` where a density is given and none is asked for."""
    if method == "depth" and (opacity is not None or level is not None):
        name = "--level" if opacity is None else "--opacity"
        raise UserInputError(f"{name} says at which density a surface lies: add --method density.")


def color_mesh(triangles: Triangles, views: list[SurfaceViews], grid: VoxelGrid) -> ColoredMesh:
    """Colours of vertices: means over the views that see them, weighted by how much the surface faces the view.

    Raises:
        UserInputError: if no view sees any vertex.
    """
    vertices = torch.from_numpy(triangles.vertices).float()
    normals = torch.from_numpy(vertex_normals(triangles)).float()
    tolerance = 1.5 * float(grid.voxel_size.max())
    total, weight = torch.zeros(len(vertices), 3), torch.zeros(len(vertices))
    for batch in views:
        for i in range(batch.cameras.shape[0]):
            colors, facing = _colors_in_view(vertices, normals, batch, i, tolerance)
            total += facing[:, None] * colors
            weight += facing
    seen = (weight > 0).numpy()
    if not seen.any():
        raise UserInputError(
            "No camera sees the mesh, its surfaces lie too far from where rays end: give --method density with another "
            "--opacity or --level."
        )
    mean = (total / weight.clamp(min=1e-9)[:, None]).numpy()
    _, nearest = cKDTree(triangles.vertices[seen]).query(triangles.vertices[~seen])
    mean[~seen] = mean[seen][nearest]
    return ColoredMesh(triangles, mean, seen)


def _colors_in_view(
    vertices: Float[Tensor, "vertices 3"],
    normals: Float[Tensor, "vertices 3"],
    views: SurfaceViews,
    index: int,
    tolerance: float,
) -> tuple[Float[Tensor, "vertices 3"], Float[Tensor, " vertices"]]:
    """Colours of vertices in one view, and the cosines at which it sees them: 0 where it does not."""
    places, depth = project(views.cameras[index], vertices)
    inside = (places.abs() < 1).all(-1) & (depth > 1e-3)
    maps = torch.cat([views.images[index], views.depth[index], views.seen[index].float()])[None]
    red, green, blue = _look_up(maps[:, :3], places, "bilinear")
    surface, hit = _look_up(maps[:, 3:], places, "nearest")
    visible = inside & (hit > 0.5) & ((surface - depth).abs() < tolerance)
    toward = F.normalize(views.cameras.camera_to_worlds[index, :, 3] - vertices, dim=-1)
    facing = (normals * toward).sum(-1).clamp(min=0)
    return torch.stack([red, green, blue], dim=-1), torch.where(visible, facing, torch.zeros_like(facing))


def _look_up(
    maps: Float[Tensor, "1 channels height width"], places: Float[Tensor, "points 2"], mode: str
) -> Float[Tensor, "channels points"]:
    return F.grid_sample(maps, places[None, None], mode=mode, padding_mode="border", align_corners=False)[0, :, 0]


def project(
    camera: Cameras, points: Float[Tensor, "points 3"]
) -> tuple[Float[Tensor, "points 2"], Float[Tensor, " points"]]:
    """Where a camera of batch shape `[]` sees points, in an image of [-1, 1]^2 (x right, y down), and planar depths."""
    x, y, depth = project_points(camera, points)
    return torch.stack([x / camera.width * 2 - 1, y / camera.height * 2 - 1], dim=-1), depth


def without_unseen(mesh: ColoredMesh) -> ColoredMesh:
    """Without the faces none of whose corners a view saw."""
    kept = mesh.seen[mesh.triangles.faces].any(-1)
    used = np.unique(mesh.triangles.faces[kept])
    return ColoredMesh(keep_faces(mesh.triangles, kept), mesh.colors[used], mesh.seen[used])


def write_mesh(path: Path, mesh: ColoredMesh) -> None:
    """Writes PLY, OBJ or GLB, by the file's extension, whole or not at all.

    Vertices are metres with z up. A GLB has them below a node that turns z up into y up, as glTF wants it.
    """
    colors = (mesh.colors.clip(0, 1) * 255).round().astype(np.uint8)
    file_type = path.suffix[1:].lower()
    solid = trimesh.Trimesh(mesh.triangles.vertices, mesh.triangles.faces, vertex_colors=colors, process=False)
    shown = trimesh.Scene()
    shown.add_geometry(solid, node_name="scene", transform=Y_UP)
    content = (shown if file_type == "glb" else solid).export(file_type=file_type)
    with atomic_path(path) as temporary:
        temporary.write_bytes(content.encode() if isinstance(content, str) else bytes(content))
