"""Voxels of single scenes optimised through the frozen renderer and decoder: how good V can be."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields, replace

import torch
from torch import Tensor
from torch.optim.lr_scheduler import ReduceLROnPlateau

from nfldm_ns.autoencoder.losses import StageOneLossConfig, stage_one_losses
from nfldm_ns.autoencoder.perceptual import PerceptualNetwork
from nfldm_ns.autoencoder.refinement import density_logits
from nfldm_ns.autoencoder.scene_autoencoder import SceneAutoencoder
from nfldm_ns.scenes.views import Views
from nfldm_ns.scenes.voxel_grid import VoxelGrid

REDUCTION = 0.3  # of the learning rates at a standstill


@dataclass(frozen=True)
class GridOptimiserConfig:
    """How V is optimised.

    Attributes:
        density_learning_rate: of Adam, for densities (1/m) before softplus.
        feature_learning_rate: of Adam, for all other tensors of V, relative to their standard deviations.
        views_per_step: drawn at random in each step.
        check_every: steps after which the loss over all views is looked at.
        patience: looks without improvement after which the learning rates fall to a third.
        reductions: how often they fall; the next standstill ends it.
        tolerance: relative improvement of the loss that counts.
        max_steps: ends it in any case.
        seed: of the random numbers.
    """

    density_learning_rate: float = 0.2
    feature_learning_rate: float = 0.02
    views_per_step: int = 4
    check_every: int = 20
    patience: int = 2
    reductions: int = 1
    tolerance: float = 1e-2
    max_steps: int = 200
    seed: int = 0


@dataclass
class OptimisedGrid:
    """What came of it.

    Attributes:
        grid: V of the smallest loss seen.
        losses: over all views, every `check_every` steps; the first is that of the V it began with.
        steps: taken.
        converged: the loss stood still before `max_steps`.
    """

    grid: VoxelGrid
    losses: list[float]
    steps: int
    converged: bool


def optimise_grid(
    autoencoder: SceneAutoencoder,
    grid: VoxelGrid,
    views: Views,
    loss: StageOneLossConfig,
    perceptual: PerceptualNetwork | None,
    config: GridOptimiserConfig | None = None,
    anchor: Callable[[VoxelGrid], Tensor] | None = None,
) -> OptimisedGrid:
    """Optimises all tensors of V for views, by the losses of training, for as long as the loss over all views falls.

    Args:
        autoencoder: renders and decodes, and stays as it is.
        grid: where it starts, usually the encoder's V; of B scenes.
        views: that V is to show, batch shape `[B, N]`.
        loss: weights of the losses; there is no discriminator.
        perceptual: needed unless `loss.lpips_mult` is 0.
        anchor: a further loss of V itself, added to those of its views.
    """
    config = config or GridOptimiserConfig()
    devices = [grid.device] if grid.device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices), torch.enable_grad():
        torch.manual_seed(config.seed)
        return _optimise(autoencoder, grid, views, loss, perceptual, config, anchor)


def _optimise(
    autoencoder: SceneAutoencoder,
    grid: VoxelGrid,
    views: Views,
    loss: StageOneLossConfig,
    perceptual: PerceptualNetwork | None,
    config: GridOptimiserConfig,
    anchor: Callable[[VoxelGrid], Tensor] | None,
) -> OptimisedGrid:
    parameters = _parameters(grid)
    optimiser = torch.optim.Adam(
        {"params": [parameter], "lr": _learning_rate(name, parameter, config)} for name, parameter in parameters.items()
    )
    smallest = min(group["lr"] for group in optimiser.param_groups) * REDUCTION**config.reductions
    schedule = ReduceLROnPlateau(
        optimiser, factor=REDUCTION, patience=config.patience - 1, threshold=config.tolerance, eps=0.0
    )
    whole = replace(loss, lpips_views=None)

    def total(chosen: Views, weights: StageOneLossConfig) -> Tensor:
        shown = _grid(grid, parameters)
        rendered = autoencoder.render(shown, chosen.cameras)
        losses = list(stage_one_losses(weights, rendered, chosen, shown, perceptual).values())
        return torch.stack(losses if anchor is None else [*losses, anchor(shown)]).sum()

    def look() -> float:
        with torch.no_grad():
            return float(total(views, whole))

    losses, best = [look()], _detached(grid, parameters)
    schedule.step(losses[0])
    converged = False
    step = 0
    while step < config.max_steps and not converged:
        drawn = torch.randperm(views.shape[1])[: config.views_per_step]
        gradients = torch.autograd.grad(total(views[:, drawn], loss), list(parameters.values()))
        for parameter, gradient in zip(parameters.values(), gradients, strict=True):
            parameter.grad = gradient
        optimiser.step()
        step += 1
        if step % config.check_every == 0 or step == config.max_steps:
            value = look()
            if value < min(losses):
                best = _detached(grid, parameters)
            losses.append(value)
            schedule.step(value)
            converged = min(group["lr"] for group in optimiser.param_groups) < 0.99 * smallest
    return OptimisedGrid(best, losses, step, converged)


def _parameters(grid: VoxelGrid) -> dict[str, Tensor]:
    """Free parameters of all tensors of V by name; density before softplus, so that it never becomes negative."""
    tensors = {field.name: getattr(grid, field.name) for field in fields(grid) if field.name != "aabb"}
    parameters = {name: tensor.detach().float().clone() for name, tensor in tensors.items() if tensor is not None}
    parameters["density"] = density_logits(parameters["density"])
    return {name: parameter.requires_grad_() for name, parameter in parameters.items()}


def _learning_rate(name: str, parameter: Tensor, config: GridOptimiserConfig) -> float:
    if name == "density":
        return config.density_learning_rate
    used = parameter.detach()[parameter.detach() != 0]
    return config.feature_learning_rate * (float(used.std()) if used.numel() > 1 else 1.0)


def _grid(grid: VoxelGrid, parameters: dict[str, Tensor]) -> VoxelGrid:
    """V with these tensors."""
    return replace(grid, **{**parameters, "density": torch.nn.functional.softplus(parameters["density"])})


def _detached(grid: VoxelGrid, parameters: dict[str, Tensor]) -> VoxelGrid:
    return _grid(grid, {name: parameter.detach().clone() for name, parameter in parameters.items()})
