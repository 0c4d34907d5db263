"""Points with colours and normals on the surfaces that a scene's cameras see."""

from __future__ import annotations

from pathlib import Path

from nfldm_ns.exports.ply import write_vertices
from nfldm_ns.exports.surface_views import SurfacePoints, join_points, thin, unproject, views_of
from nfldm_ns.generated.scene_files import GeneratedScene


def scene_points(scene: GeneratedScene, *, spacing: float = 0.05, ring_places: int = 0) -> SurfacePoints:
    """Surface points of the renderings of a scene's cameras.

    Args:
        spacing: edge in metres of cells that keep one point each; 0 keeps one for every pixel.
        ring_places: places of further cameras (`further_cameras`).

    Raises:
        UserInputError: if the scene has no cameras, or no surfaces that they see.
    """
    parts = [unproject(views, scene.grid) for views in views_of(scene, ring_places)]
    return thin(join_points(parts), spacing)


def write_points(path: Path, points: SurfacePoints) -> None:
    """Writes a PLY with x, y, z (metres), nx, ny, nz and red, green, blue."""
    positions, normals = points.positions.numpy(), points.normals.numpy()
    colors = points.colors.clamp(0, 1).mul(255).round().byte().numpy()
    properties = {name: positions[:, i] for i, name in enumerate("xyz")}
    properties |= {f"n{name}": normals[:, i] for i, name in enumerate("xyz")}
    properties |= {name: colors[:, i] for i, name in enumerate(("red", "green", "blue"))}
    write_vertices(path, properties)
