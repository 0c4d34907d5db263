"""What lies beyond the box of a scene: sky and far surfaces, by direction."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from jaxtyping import Float
from nerfstudio.field_components.mlp import MLP
from torch import Tensor, nn

BACKGROUND_MOMENTS = 4  # of each channel: a mean, and a mean times the direction's x, y and z


class Background(nn.Module):
    """Features of rays that leave the box, by their direction and the scene.

    A scene has a code of K functions on the sphere, `a_k + b_k . d` for a direction d, which turns with the scene as
    its voxels do (`VoxelGrid.rotate90`). A small network, nerfstudio's MLP, makes features of their values and of the
    direction's elevation.

    Args:
        num_channels: K.
        feature_channels: C of the voxels.
        implementation: "torch", or "tcnn" where tiny-cuda-nn is there.
    """

    def __init__(self, num_channels: int, feature_channels: int, implementation: str = "torch") -> None:
        super().__init__()
        self.num_channels = num_channels
        self.mlp = MLP(
            in_dim=num_channels + 1,
            num_layers=3,
            layer_width=32,
            out_dim=feature_channels,
            activation=nn.ReLU(),
            implementation=implementation,  # type: ignore[arg-type]
        )

    def forward(
        self,
        directions: Float[Tensor, "batch views 3 h w"],
        code: Float[Tensor, "batch channels 4"] | None,
    ) -> Float[Tensor, "batch views features h w"]:
        """Features in the directions given (of any length); without a code those of an average scene."""
        directions = F.normalize(directions.float(), dim=2)
        if code is None:
            code = directions.new_zeros(len(directions), self.num_channels, BACKGROUND_MOMENTS)
        values = code[:, None, :, :1, None] + torch.einsum("bkc,bnchw->bnkhw", code[..., 1:], directions)
        inputs = torch.cat([values, directions[:, :, 2:]], dim=2).movedim(2, -1)
        return self.mlp(inputs.reshape(-1, inputs.shape[-1])).reshape(*inputs.shape[:-1], -1).movedim(-1, 2)


def background_code(
    values: Float[Tensor, "batch views channels h w"],
    leaves: Float[Tensor, "batch views h w"],
    directions: Float[Tensor, "batch views h w 3"],
) -> Float[Tensor, "batch channels 4"]:
    """A scene's code: moments of values over the rays that leave the box, zero where none does.

    Args:
        values: what the image encoder says of each pixel.
        leaves: the probability that its ray leaves the box.
        directions: of the rays, of any length.
    """
    unit = F.normalize(directions, dim=-1)
    moments = torch.cat([torch.ones_like(unit[..., :1]), unit], dim=-1)
    sums = torch.einsum("bnkhw,bnhw,bnhwm->bkm", values, leaves, moments)
    return sums / (leaves.sum(dim=(1, 2, 3)) + 1)[:, None, None]
