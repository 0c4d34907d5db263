"""Joint training: codes of the training scenes learn under rendering and diffusion losses together with the denoiser.

SSDNeRF (Chen et al. 2023) trains codes and denoiser in one stage instead of two: what is rendered pulls codes towards
the images, what the denoiser knows of other scenes pulls them towards what can be sampled. Here the codes are c, or f,
of the training scenes, whichever latent is trained, in normalised units; they begin as the encoder makes them. Stages 1
and 2, g and the other latent stay as they are.

In each pass the denoiser's prediction for its noisy codes x_t gives its own loss, and at no further cost the gradient
of the prior at some of these codes,

    grad_x = w(t) (x - x_0(x_t)) / n,    w(t) = min(1, alpha / sigma),

of `w(t) |x_0(x_t) - x|^2 / 2n` with x_0(x_t) taken as constant, n numbers in a code. It is kept (the cached prior
gradient) while these codes make a few steps of Adam under it and the loss of freshly drawn views. In the next epoch the
denoiser sees them where they are by then.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, Int
from safetensors.torch import save_file
from torch import Tensor, nn

from nfldm_ns.autoencoder.checkpoints import read_safetensors
from nfldm_ns.diffusion.denoisers import CoarseDenoiser, FineDenoiser
from nfldm_ns.diffusion.latent_memory import LatentMemory
from nfldm_ns.errors import UserInputError
from nfldm_ns.latents.latent_autoencoder import LatentAutoencoder

CODES = "codes.safetensors"
DECAYS = (0.9, 0.999)  # of Adam's moments
EPSILON = 1e-8
QUANTISED_AT_ONCE = 64

CodeLoss = Callable[[Float[Tensor, " scenes *shape"]], Tensor]


@dataclass(frozen=True)
class JointConfig:
    """How codes are optimised.

    Attributes:
        learning_rate: of Adam, in standard deviations of the latent.
        num_scenes: of a pass, its first ones, whose codes move.
        steps: of Adam in a pass, with one gradient of the prior.
        num_views: of each scene and step.
        rendering_mult: weight of the mean absolute error of these views' colours.
        prior_mult: weight of the prior.
    """

    learning_rate: float = 0.01
    num_scenes: int = 1
    steps: int = 2
    num_views: int = 2
    rendering_mult: float = 1.0
    prior_mult: float = 0.3

    def check(self) -> None:
        """Raises `UserInputError` for settings that cannot be."""
        if not 0 < self.learning_rate < float("inf"):
            raise UserInputError(f"--joint-learning-rate is {self.learning_rate}: give a finite number above 0.")
        if not 0 <= self.prior_mult < float("inf") or not 0 <= self.rendering_mult < float("inf"):
            raise UserInputError(
                f"--joint-prior-mult is {self.prior_mult}, the weight of views {self.rendering_mult}: give finite "
                "numbers of at least 0."
            )
        if min(self.num_scenes, self.steps, self.num_views) < 1:
            raise UserInputError(
                f"--joint-steps is {self.steps}, with {self.num_views} views of {self.num_scenes} scenes: give at "
                "least 1."
            )


class CodeTable(nn.Module):
    """Codes of all scenes in all turns, and the moments of Adam, as buffers: a checkpoint has them with the denoiser.

    Args:
        values: `[S, T, *shape]`, in normalised units.
    """

    values: Tensor
    first: Tensor
    second: Tensor
    count: Tensor

    def __init__(self, values: Float[Tensor, " scenes turns *shape"]) -> None:
        super().__init__()
        self.register_buffer("values", values.float().clone())
        self.register_buffer("first", torch.zeros_like(self.values))
        self.register_buffer("second", torch.zeros_like(self.values))
        self.register_buffer("count", torch.zeros(values.shape[:2], dtype=torch.int64, device=values.device))

    def step(self, index: int, turn: int, gradient: Float[Tensor, " *shape"], learning_rate: float) -> None:
        """One step of Adam (Kingma & Ba 2015) of one code, with the count of its own steps."""
        row = (index, turn)
        self.count[row] += 1
        steps = int(self.count[row])
        for moment, decay, value in ((self.first, DECAYS[0], gradient), (self.second, DECAYS[1], gradient.square())):
            moment[row] = decay * moment[row] + (1 - decay) * value
        mean, variance = (
            moment[row] / (1 - decay**steps) for moment, decay in zip((self.first, self.second), DECAYS, strict=True)
        )
        self.values[row] -= learning_rate * mean / (variance.sqrt() + EPSILON)


class DenoiserWithCodes(nn.Module):
    """What a joint training trains: its parameters are the denoiser's."""

    def __init__(self, denoiser: CoarseDenoiser | FineDenoiser, codes: CodeTable) -> None:
        super().__init__()
        self.denoiser, self.codes = denoiser, codes

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        return self.denoiser(*args, **kwargs)


def code_name(denoiser: CoarseDenoiser | FineDenoiser) -> str:
    """The attribute of `LatentMemory` that has the denoiser's latent."""
    return "coarse" if isinstance(denoiser, CoarseDenoiser) else "fine"


def new_codes(denoiser: CoarseDenoiser | FineDenoiser, memory: LatentMemory) -> CodeTable:
    """The codes of a memory, as they begin."""
    own = getattr(memory, code_name(denoiser))
    folded = own.flatten(2, 3) if own.ndim == 6 else own
    device = next(denoiser.parameters()).device
    values = [denoiser.latent(scene.to(device).float()) for scene in folded]  # one by one: half as much memory
    return CodeTable(torch.stack(values))


class CodeOptimiser:
    """Moves codes of a table, and keeps the memory that the denoiser learns from up to date.

    Args:
        denoiser: whose latent is coded.
        codes: what moves.
        memory: gets the moved codes, in half precision as it has all; its own tensor is changed.
        config: how.
    """

    def __init__(
        self,
        denoiser: CoarseDenoiser | FineDenoiser,
        codes: CodeTable,
        memory: LatentMemory,
        config: JointConfig,
    ) -> None:
        self.denoiser, self.codes, self.memory, self.config = denoiser, codes, memory, config
        for index, turn in codes.count.nonzero().tolist():
            self._remember(index, turn)

    def _remember(self, index: int, turn: int) -> None:
        target = getattr(self.memory, code_name(self.denoiser))[index, turn]
        own = self.denoiser.latent.inverse(self.codes.values[index, turn])
        target.copy_(own.reshape(target.shape))

    def rows(self, indices: Sequence[int], turns: Int[Tensor, " batch"]) -> list[tuple[int, int]]:
        """Which codes of a pass move: those of its first scenes, each once."""
        pairs = list(zip(indices, turns.tolist(), strict=True))[: self.config.num_scenes]
        return list(dict.fromkeys(pairs))

    def __call__(
        self,
        rows: list[tuple[int, int]],
        prior: Float[Tensor, " scenes *shape"],
        loss: CodeLoss,
    ) -> Float[Tensor, ""]:
        """Some steps of the codes at `rows`.

        Args:
            prior: its gradients at them.
            loss: mean over the scenes of what their views lose; of the codes in normalised units.

        Returns:
            that loss before the first step.
        """
        began = None
        for _ in range(self.config.steps):
            index, turn = (torch.tensor(part) for part in zip(*rows, strict=True))
            with torch.enable_grad():
                values = self.codes.values[index, turn].requires_grad_()
                lost = loss(values)
                (gradient,) = torch.autograd.grad(lost, values)
            began = lost.detach() if began is None else began
            gradient = self.config.rendering_mult * len(rows) * gradient + self.config.prior_mult * prior
            for row, own in zip(rows, gradient, strict=True):
                self.codes.step(*row, own, self.config.learning_rate)
        for row in rows:
            self._remember(*row)
        assert began is not None
        return began


def prior_gradient(
    clean: Float[Tensor, " scenes *shape"],
    estimate: Float[Tensor, " scenes *shape"],
    signal: Float[Tensor, " scenes"],
    noise: Float[Tensor, " scenes"],
) -> Float[Tensor, " scenes *shape"]:
    """`min(1, alpha / sigma) (x - x_0(x_t)) / n` of each code."""
    weight = (signal / noise.clamp(min=1e-6)).clamp(max=1).view(-1, *[1] * (clean.ndim - 1))
    return weight * (clean - estimate) / clean[0].numel()


def with_own_codes(memory: LatentMemory, name: str) -> LatentMemory:
    """A memory whose codes may be changed without changing the given one."""
    return replace(memory, **{name: getattr(memory, name).clone()})  # type: ignore[arg-type]


def save_codes(path: Path, name: str, memory: LatentMemory) -> None:
    """Writes the codes that a training ended with, in their own units."""
    save_file({name: getattr(memory, name).contiguous()}, path)


@torch.no_grad()
def with_codes_of_run(memory: LatentMemory, run_folder: Path, latent_autoencoder: LatentAutoencoder) -> LatentMemory:
    """A memory with the c that the joint training of psi_c left, quantised, too, for that of psi_f.

    Args:
        run_folder: of the former.

    Raises:
        UserInputError: if there is none, or it is of other scenes.
    """
    path = run_folder / CODES
    if not path.is_file():
        raise UserInputError(
            f"{path} is missing: joint training of f goes on with the codes that that of c leaves: train coarse first."
        )
    tensors: Mapping[str, Tensor] = read_safetensors(path)
    coarse = tensors.get("coarse")
    if coarse is None or coarse.shape != memory.coarse.shape:
        raise UserInputError(f"{path} is of other scenes or turns: train c again, on the same voxels and options.")
    device = next(latent_autoencoder.parameters()).device
    parts = [
        latent_autoencoder.quantise_coarse(part.to(device).float()).half().cpu()
        for part in coarse.flatten(0, 1).split(QUANTISED_AT_ONCE)
    ]
    return replace(memory, coarse=coarse, coarse_codes=torch.cat(parts).view_as(memory.coarse_codes))
