"""Semantic maps of a scene seen from above, as a condition of the denoisers (paper, Sec. 3.3 and 4).

Maps of files and of users have rows from north to south, V and its latents from south to north. `to_grid_order` is the
one border between the two: all other code here and in the denoisers has maps in the order of V.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int, Shaped
from torch import Tensor, nn

PATCH = 4  # the map is read at so many times the rows and columns of the tokens


def to_grid_order(maps: Shaped[Tensor, "*batch height width"]) -> Shaped[Tensor, "*batch height width"]:
    """Maps with the north up, as files have them, in the order of V, whose rows grow with y; its own inverse."""
    return maps.flip(-2)


def turn_map(maps: Shaped[Tensor, "*batch size size"], quarter_turns: int) -> Shaped[Tensor, "*batch size size"]:
    """Square maps in the order of V, turned with the scene, counter-clockwise (see `VoxelGrid.rotate90`)."""
    return torch.rot90(maps, -quarter_turns, (-2, -1))


class MapEncoder(nn.Module):
    """A grid of tokens of a class map: its classes one-hot, resampled, in patches of one cell, and a small network.

    Args:
        num_classes: K; class ids are below.
        grid: (rows, columns) of the tokens.
        dim: size of a token.
        width: channels of the network.
    """

    def __init__(self, num_classes: int, grid: tuple[int, int], dim: int, width: int) -> None:
        super().__init__()
        self.num_classes, self.grid = num_classes, (int(grid[0]), int(grid[1]))
        self.layers = nn.Sequential(
            nn.Conv2d(num_classes, width, PATCH, stride=PATCH),
            nn.SiLU(),
            nn.Conv2d(width, width, 3, padding=1),
            nn.SiLU(),
            nn.Conv2d(width, dim, 1),
        )
        self.position = nn.Parameter(0.02 * torch.randn(dim, *self.grid))
        self.no_map = nn.Parameter(0.02 * torch.randn(dim, 1, 1))

    def forward(
        self, maps: Int[Tensor, "batch height width"] | None, drop: Bool[Tensor, " batch"] | None, batch_size: int
    ) -> Float[Tensor, "batch dim rows columns"]:
        """Tokens of maps in the order of V.

        Args:
            maps: None for scenes without.
            drop: scenes whose map is not looked at: they get a learned token in all places, as those without a map.
            batch_size: how many scenes there are.
        """
        if maps is None:
            return (self.no_map + self.position).expand(batch_size, -1, -1, -1)
        rows, columns = (size * PATCH for size in self.grid)
        drop = _nowhere(maps) if drop is None else drop
        tokens = self.layers(self.areas(maps, (rows, columns)))
        return torch.where(drop[:, None, None, None], self.no_map.to(tokens.dtype), tokens) + self.position

    def areas(
        self,
        maps: Int[Tensor, "batch height width"] | None,
        size: tuple[int, int],
        drop: Bool[Tensor, " batch"] | None = None,
        batch_size: int = 0,
    ) -> Float[Tensor, "batch classes rows columns"]:
        """Share of each class in the cells of a grid of another size; zeros for scenes without a map."""
        if maps is None:
            return self.position.new_zeros(batch_size, self.num_classes, *size)
        one_hot = F.one_hot(maps.long(), self.num_classes).movedim(-1, 1).to(self.position.dtype)
        shares = F.adaptive_avg_pool2d(one_hot, size)
        return shares if drop is None else shares * ~drop[:, None, None, None]


def _nowhere(maps: Int[Tensor, "batch height width"]) -> Bool[Tensor, " batch"]:
    return torch.zeros(len(maps), dtype=torch.bool, device=maps.device)
