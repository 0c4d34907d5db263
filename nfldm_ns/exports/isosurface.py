"""The isosurface of a grid's density as triangles: multi-resolution extraction and marching cubes.

As MISE of Occupancy Networks (Mescheder et al., CVPR 2019, section 3.3) cells that the surface crosses are halved
again and again, and density is read in them alone. V is trilinear between the centres of voxels, so that its extremes
in a cell are at the cell's corners: no cell that the surface crosses is missed.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import product

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from scipy.sparse import coo_matrix
from scipy.sparse.csgraph import connected_components
from skimage.measure import marching_cubes
from torch import Tensor

from nfldm_ns.errors import UserInputError
from nfldm_ns.scenes.voxel_grid import VoxelGrid, sample_voxels

FACTORS = (1, 2, 4, 8)


@dataclass
class Triangles:
    """A mesh.

    Attributes:
        vertices: `[V, 3]`, metres.
        faces: `[F, 3]`, indices of vertices, counter-clockwise seen from where there is no density.
    """

    vertices: Float[np.ndarray, "vertices 3"]
    faces: Int[np.ndarray, "faces 3"]


def surface_level(grid: VoxelGrid, opacity: float = 0.3) -> float:
    """The density, in 1/m, of which one voxel stops the share `opacity` of light: `-ln(1 - opacity) / edge`.

    `edge` is the geometric mean of a voxel's edges.
    """
    edge = float(grid.voxel_size.double().log().mean().exp())
    return -math.log1p(-opacity) / edge


def extract_isosurface(grid: VoxelGrid, level: float, resolution_factor: int = 2) -> Triangles:
    """The closed surface on which density is `level`, between what is denser and what is not.

    Outside the box there is no density; the surface is closed at its border.

    Args:
        grid: of one scene.
        level: in 1/m, positive.
        resolution_factor: cells of marching cubes per voxel and axis: 1, 2, 4 or 8.

    Raises:
        UserInputError: if density is nowhere above the level.
        ValueError: for another factor.
    """
    if resolution_factor not in FACTORS:
        raise ValueError(f"the resolution factor must be one of {FACTORS}, not {resolution_factor}")
    if not level < float(grid.density.max()):
        raise UserInputError(
            f"The scene has no surfaces at density {level:.3g} per metre, its densest voxel has "
            f"{float(grid.density.max()):.3g}: lower --opacity or --level, or sample another."
        )
    values = refined_density(grid, level, resolution_factor)
    vertices, faces, _, _ = marching_cubes(values.numpy(), level, allow_degenerate=False)
    low, voxel = grid.aabb[0].double().numpy(), grid.voxel_size.double().numpy()
    # The lattice begins at the centre of the voxel before the first.
    positions = low + (vertices[:, ::-1].astype(np.float64) / resolution_factor - 0.5) * voxel
    return Triangles(positions.clip(low, grid.aabb[1].double().numpy()), faces.astype(np.int64))


def refined_density(grid: VoxelGrid, level: float, resolution_factor: int) -> Float[Tensor, "z y x"]:
    """Density at the corners of the finest cells, from the centres of an empty layer of voxels to those opposite.

    Exact where the surface passes; elsewhere a corner has the density of another one on its side of the surface.
    """
    values = torch.nn.functional.pad(grid.density[0, 0].detach().cpu().float(), (1,) * 6)
    factor = 1
    while factor < resolution_factor:
        factor *= 2
        cells = crossed_cells(values, level).nonzero()
        values = _repeat_twice(values)
        corners = torch.cat([2 * cells + torch.tensor(offset) for offset in product(range(3), repeat=3)])
        corners = torch.unique(corners, dim=0)
        values[corners.unbind(-1)] = _density_at(grid, corners, factor)
    return values


def crossed_cells(values: Float[Tensor, "z y x"], level: float) -> Bool[Tensor, "z-1 y-1 x-1"]:
    """Cells of eight neighbouring values that lie on both sides of the level."""
    above = values > level
    corners = [
        above[tuple(slice(o, n - 1 + o) for o, n in zip(offset, above.shape, strict=True))]
        for offset in product(range(2), repeat=3)
    ]
    stacked = torch.stack(corners)
    return stacked.any(0) & ~stacked.all(0)


def _repeat_twice(values: Float[Tensor, "z y x"]) -> Float[Tensor, "z2 y2 x2"]:
    """Twice as many cells: each corner between takes the value of the one before it."""
    for axis, size in enumerate(values.shape):
        values = values.repeat_interleave(2, dim=axis).narrow(axis, 0, 2 * size - 1)
    return values.contiguous()


def _density_at(grid: VoxelGrid, corners: Int[Tensor, "corners 3"], factor: int) -> Float[Tensor, " corners"]:
    """Trilinear density at corners (k, j, i) of cells, `factor` per voxel, of the padded lattice."""
    sizes = torch.tensor(grid.shape[::-1])
    points = (corners.flip(-1) / factor - 0.5) / sizes * 2 - 1
    return sample_voxels(grid.density.detach().cpu().float(), points[None])[0, :, 0]


def drop_small_components(mesh: Triangles, min_area: float) -> Triangles:
    """Without the connected parts whose surface is smaller than `min_area` square metres.

    Raises:
        UserInputError: if nothing is left.
    """
    if min_area == 0:
        return mesh
    edges = np.concatenate([mesh.faces[:, [0, 1]], mesh.faces[:, [1, 2]]])
    count = len(mesh.vertices)
    graph = coo_matrix((np.ones(len(edges), dtype=bool), edges.T), shape=(count, count))
    _, labels = connected_components(graph, directed=False)
    part = labels[mesh.faces[:, 0]]
    areas = np.bincount(part, weights=face_areas(mesh))
    kept = keep_faces(mesh, areas[part] >= min_area)
    if len(kept.faces) == 0:
        raise UserInputError(
            f"No part of the mesh has {min_area:g} square metres, the largest {areas.max():.3g}: lower --min-component."
        )
    return kept


def face_areas(mesh: Triangles) -> Float[np.ndarray, " faces"]:
    """In square metres."""
    a, b, c = (mesh.vertices[mesh.faces[:, i]] for i in range(3))
    return np.linalg.norm(np.cross(b - a, c - a), axis=-1) / 2


def keep_faces(mesh: Triangles, kept: Bool[np.ndarray, " faces"]) -> Triangles:
    """Some of the faces, and the vertices that they have."""
    used, faces = np.unique(mesh.faces[kept], return_inverse=True)
    return Triangles(mesh.vertices[used], faces.reshape(-1, 3))


def vertex_normals(mesh: Triangles) -> Float[np.ndarray, "vertices 3"]:
    """Unit normals, means of those of the faces around weighted by area; they point away from density."""
    a, b, c = (mesh.vertices[mesh.faces[:, i]] for i in range(3))
    of_faces = np.cross(b - a, c - a)
    normals = np.zeros_like(mesh.vertices)
    for corner in range(3):
        np.add.at(normals, mesh.faces[:, corner], of_faces)
    return normals / np.linalg.norm(normals, axis=-1, keepdims=True).clip(1e-12)
