"""3D Gaussian splats of a scene, in the PLY of 3D Gaussian splatting (Kerbl et al. 2023)."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from nfldm_ns.errors import UserInputError
from nfldm_ns.exports.ply import read_vertices, write_vertices
from nfldm_ns.exports.surface_views import SurfacePoints

SH_DC = 0.28209479177387814  # the constant spherical harmonic
THICKNESS = 0.15  # of a splat along its normal, as a share of its width
COVERAGE = 0.7  # standard deviation of a splat by the distance of splats
FIRST_OPACITY = 0.9
SCALES, ROTATIONS = [f"scale_{i}" for i in range(3)], [f"rot_{i}" for i in range(4)]
COLORS, NORMALS = [f"f_dc_{i}" for i in range(3)], ["nx", "ny", "nz"]


@dataclass
class Splats:
    """Gaussians with a colour that is the same from all sides.

    Attributes:
        positions: `[N, 3]`, metres.
        log_scales: `[N, 3]`, natural logarithms of standard deviations in metres, along the Gaussian's own axes.
        rotations: `[N, 4]`, unit quaternions (w, x, y, z) that turn its axes to the world's.
        opacity_logits: `[N]`, before the sigmoid.
        sh_dc: `[N, 3]`, coefficients of the constant spherical harmonic: colour = 0.5 + SH_DC * coefficient.
    """

    positions: Float[Tensor, "splats 3"]
    log_scales: Float[Tensor, "splats 3"]
    rotations: Float[Tensor, "splats 4"]
    opacity_logits: Float[Tensor, " splats"]
    sh_dc: Float[Tensor, "splats 3"]

    @property
    def colors(self) -> Float[Tensor, "splats 3"]:
        """RGB, not clamped."""
        return 0.5 + SH_DC * self.sh_dc


def splats_from_points(points: SurfacePoints, spacing: float) -> Splats:
    """One flat Gaussian per point, in the plane across its normal.

    Its width is what a pixel or, if that is more, `spacing` metres between points asks for.
    """
    width = COVERAGE * points.footprints.clamp(min=spacing)
    scales = torch.stack([width, width, THICKNESS * width], dim=-1)
    opacity = torch.full_like(width, FIRST_OPACITY)
    sh_dc = (points.colors - 0.5) / SH_DC
    return Splats(points.positions, scales.log(), rotations_to(points.normals), opacity.logit(), sh_dc)


def rotations_to(normals: Float[Tensor, "splats 3"]) -> Float[Tensor, "splats 4"]:
    """Unit quaternions (w, x, y, z) of the shortest turns from the z axis to unit normals."""
    x, y, z = normals.unbind(-1)
    turn = torch.stack([1 + z, -y, x, torch.zeros_like(x)], dim=-1)
    about_x = torch.tensor([0.0, 1.0, 0.0, 0.0]).expand_as(turn)
    return torch.where((z < -1 + 1e-6)[:, None], about_x, F.normalize(turn, dim=-1))


def rotation_matrices(quaternions: Float[Tensor, "splats 4"]) -> Float[Tensor, "splats 3 3"]:
    """Of quaternions (w, x, y, z) of any length."""
    w, x, y, z = F.normalize(quaternions, dim=-1).unbind(-1)
    rows = [
        torch.stack([1 - 2 * (y * y + z * z), 2 * (x * y - w * z), 2 * (x * z + w * y)], dim=-1),
        torch.stack([2 * (x * y + w * z), 1 - 2 * (x * x + z * z), 2 * (y * z - w * x)], dim=-1),
        torch.stack([2 * (x * z - w * y), 2 * (y * z + w * x), 1 - 2 * (x * x + y * y)], dim=-1),
    ]
    return torch.stack(rows, dim=-2)


def write_splats(path: Path, splats: Splats) -> None:
    """Writes the PLY of 3D Gaussian splatting, without harmonics above the constant one."""
    properties = {name: splats.positions[:, i] for i, name in enumerate("xyz")}
    normals = rotation_matrices(splats.rotations)[..., 2]
    groups = ((NORMALS, normals), (COLORS, splats.sh_dc), (["opacity"], splats.opacity_logits[:, None]))
    for names, values in (*groups, (SCALES, splats.log_scales), (ROTATIONS, splats.rotations)):
        properties |= {name: values[:, i] for i, name in enumerate(names)}
    write_vertices(path, {name: values.detach().cpu().float().numpy() for name, values in properties.items()})


def read_splats(path: Path) -> Splats:
    """The splats that `write_splats` wrote.

    Raises:
        UserInputError: if it is another PLY, or damaged.
    """
    properties = read_vertices(path)

    def columns(names: list[str]) -> Tensor:
        return torch.from_numpy(np.stack([properties[name] for name in names], axis=-1))

    try:
        opacity = columns(["opacity"])[:, 0]
        return Splats(columns(list("xyz")), columns(SCALES), columns(ROTATIONS), opacity, columns(COLORS))
    except KeyError as error:
        raise UserInputError(f"{path} has no splats, it lacks {error}: export them again.") from None
