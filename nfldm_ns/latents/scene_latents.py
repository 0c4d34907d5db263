"""The three latents of a scene."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from jaxtyping import Float
from safetensors.torch import save_file
from torch import Tensor

from nfldm_ns.autoencoder.checkpoints import read_safetensors
from nfldm_ns.errors import UserInputError
from nfldm_ns.scenes.writing import atomic_path

_FIELDS = ("global_latent", "coarse", "fine")


@dataclass
class SceneLatents:
    """Latents of a batch of scenes (the paper's g, c and f), before quantisation.

    Attributes:
        global_latent: g, `[B, G]`.
        coarse: c, `[B, Cc, Zc, Yc, Xc]`.
        fine: f, `[B, Cf, Y, X]`.
    """

    global_latent: Float[Tensor, "batch global_dim"]
    coarse: Float[Tensor, "batch coarse_channels zc yc xc"]
    fine: Float[Tensor, "batch fine_channels y x"]

    @property
    def batch_size(self) -> int:
        return self.global_latent.shape[0]

    def to(self, *args, **kwargs) -> SceneLatents:
        """Moves or converts all three as `Tensor.to` does."""
        return SceneLatents(*(getattr(self, name).to(*args, **kwargs) for name in _FIELDS))

    def __getitem__(self, index: int | slice | Tensor) -> SceneLatents:
        """Selects scenes; an integer keeps the batch axis."""
        if isinstance(index, int):
            index = slice(index, index + 1) if index != -1 else slice(-1, None)
        return SceneLatents(*(getattr(self, name)[index] for name in _FIELDS))

    @staticmethod
    def cat(latents: list[SceneLatents]) -> SceneLatents:
        """Joins along the batch axis."""
        return SceneLatents(*(torch.cat([getattr(item, name) for item in latents]) for name in _FIELDS))

    def state_dict(self) -> dict[str, Tensor]:
        """The three tensors by name, contiguous, for safetensors."""
        return {name: getattr(self, name).contiguous() for name in _FIELDS}

    def save(self, path: Path | str) -> None:
        """Writes one safetensors file in one step."""
        with atomic_path(Path(path)) as temporary:
            save_file(self.state_dict(), temporary)

    @staticmethod
    def load(path: Path | str) -> SceneLatents:
        """Reads what `save` wrote.

        Raises:
            UserInputError: if the file is missing, truncated or holds something else.
        """
        tensors = read_safetensors(Path(path))
        if set(tensors) != set(_FIELDS):
            raise UserInputError(f"{path} does not hold the latents of scenes: give a file with {', '.join(_FIELDS)}.")
        return SceneLatents(*(tensors[name] for name in _FIELDS))
