"""GRAF's patches: parts of an image at random scales, each of as many rays (Schwarz et al., NeurIPS 2020)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Float
from nerfstudio.cameras.cameras import Cameras
from torch import Tensor

from nfldm_ns.scenes.views import make_cameras


def smallest_scale(step: int, steps: int, last: float) -> float:
    """Scale of the smallest patches at a training step: `last ** (step / steps)`, and `last` from `steps` on.

    GRAF's annealing: patches cover the whole image at first, so that its coarse structure is learned before its detail,
    then the least scale decays exponentially.
    """
    return last if step >= steps else last ** (step / steps)


@dataclass
class Patches:
    """Parts of images, one of each, of the image's own shape.

    Attributes:
        size: (height, width) of a patch in pixels.
        scale: `[*B]`, share of the image's sides that it covers; 1 is the whole image.
        corner: `[*B, 2]`, its first column and row as shares of the image's width and height.
    """

    size: tuple[int, int]
    scale: Float[Tensor, "*batch"]
    corner: Float[Tensor, "*batch 2"]

    @staticmethod
    def draw(
        size: tuple[int, int], image_size: tuple[int, int], shape: tuple[int, ...], step: int = 0, steps: int = 0
    ) -> Patches:
        """At random, with torch's own random numbers: scales from the smallest, as it is at a training step, up to 1.

        Args:
            steps: in which the smallest scale falls to that at which pixels are the image's own, see `smallest_scale`.
        """
        smallest = smallest_scale(step, steps, min(1.0, size[0] / image_size[0]))
        scale = smallest + (1 - smallest) * torch.rand(shape)
        return Patches(size, scale, (1 - scale)[..., None] * torch.rand(*shape, 2))

    def cameras(self, cameras: Cameras) -> Cameras:
        """Cameras `[*B]` that see the patches alone, with as many pixels as these have."""
        scale, corner = (values.to(cameras.device) for values in (self.scale, self.corner))
        width, height = cameras.width[..., 0].float(), cameras.height[..., 0].float()
        x, y = self.size[1] / (scale * width), self.size[0] / (scale * height)
        return make_cameras(
            cameras.camera_to_worlds,
            cameras.fx[..., 0] * x,
            cameras.fy[..., 0] * y,
            (cameras.cx[..., 0] - corner[..., 0] * width) * x,
            (cameras.cy[..., 0] - corner[..., 1] * height) * y,
            *self.size,
        )

    def cut(self, images: Float[Tensor, "batch channels height width"]) -> Float[Tensor, "batch channels h w"]:
        """The patches of images (batch shape `[B]`): their colours at the places of these rays, bilinear."""
        scale, corner = self.scale.to(images), self.corner.to(images)
        theta = images.new_zeros(len(images), 2, 3)
        theta[:, 0, 0] = theta[:, 1, 1] = scale
        theta[:, :, 2] = 2 * corner + scale[:, None] - 1
        grid = F.affine_grid(theta, [len(images), 1, *self.size], align_corners=False)
        return F.grid_sample(images, grid, padding_mode="border", align_corners=False)
