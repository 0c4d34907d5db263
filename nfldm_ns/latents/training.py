"""Trains the latent auto-encoder (paper, Sec. 3.2)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from jaxtyping import Float, Int
from torch import Tensor, nn

from nfldm_ns.autoencoder.checkpoints import load_exactly
from nfldm_ns.autoencoder.losses import depth_loss
from nfldm_ns.autoencoder.scene_autoencoder import SceneAutoencoder
from nfldm_ns.autoencoder.scene_sampler import SceneCache
from nfldm_ns.errors import UserInputError
from nfldm_ns.latents.background_path import background_loss
from nfldm_ns.latents.equivariance import (
    SMALLER,
    PlaneChange,
    change_grid,
    change_items,
    draw_changes,
    equal_sizes,
)
from nfldm_ns.latents.latent_autoencoder import MODEL_FOLDER, LatentAutoencoder, LatentReconstruction
from nfldm_ns.latents.quantizer import CodebookUsage
from nfldm_ns.latents.validation import RoundTripPictures
from nfldm_ns.latents.voxel_code import VoxelCode
from nfldm_ns.latents.voxel_store import VoxelMemory, VoxelStore
from nfldm_ns.scenes.views import Views, rotate_cameras90
from nfldm_ns.scenes.voxel_grid import VoxelGrid
from nfldm_ns.training.draws import ItemDraws
from nfldm_ns.training.identity import model_hash, public_config
from nfldm_ns.training.loop import ProgressCallback, keep_result, train
from nfldm_ns.training.run import RunFolder
from nfldm_ns.training.schedule import Schedule, batch_share, joint_batch_size, new_accelerator

FIT_SCENES = 96  # scenes that statistics and the linear code are fitted to
LATER_LOSSES = ("equivariance_mult",)  # which runs know nothing of that were begun before there were any
USAGE_WINDOW = 50  # steps over which the use of the codebooks is counted


@dataclass
class LatentLossConfig:
    """Weights of the losses of stage 2."""

    voxel_mult: float = 1.0
    """|V - V_hat| of normalised voxels."""
    density_weight: float = 2.5
    """The paper's weight of a density's error against the mean error of the features."""
    empty_weight: float = 0.1
    """Weight of a voxel that stops no light against one that stops all."""
    background_mult: float = 1.0
    """Absolute error of the normalised code of what lies beyond the box."""
    rgb_mult: float = 8.0
    """|i - i_hat| of images rendered from V_hat by the frozen stage 1."""
    depth_mult: float = 0.05
    """Squared error of the rendered depth in m^2."""
    lpips_mult: float = 0.0
    """Perceptual distance of the rendered images; needs the LPIPS weights."""
    kl_mult: float = 1e-5
    """KL divergence of g from the unit Gaussian, in nats per scene."""
    commitment_mult: float = 0.25
    """Squared distance of c and f from their codes."""
    equivariance_mult: float = 0.0
    """`voxel_loss` of what turned, mirrored or halved c and f decode to (see `equivariance.py`)."""


@dataclass
class LatentTrainingConfig:
    """Training of the latent auto-encoder."""

    schedule: Schedule = field(default_factory=Schedule)
    losses: LatentLossConfig = field(default_factory=LatentLossConfig)
    num_views: int = 3
    """Views rendered per scene."""
    fine_dropout: float = 0.1
    """Share of scenes whose f is zeroed, so that c learns to stand alone."""
    quarter_turns: bool = True
    """Turn scenes by random multiples of 90 degrees."""
    decoder_only: bool = False
    """Keep latents and codes as given models make them: denoisers that were trained on them still fit."""


def voxel_loss(
    reconstruction: Float[Tensor, "batch folded y x"],
    target: Float[Tensor, "batch folded y x"],
    grid: VoxelGrid,
    code: VoxelCode,
    config: LatentLossConfig,
) -> Float[Tensor, ""]:
    """Weighted mean of |V - V_hat| of normalised voxels, density counting `density_weight` times.

    A voxel's weight grows with its opacity, for features with the opacity around it: what stops no light is not seen.
    Where the target is empty, estimates below zero are as good as zero. Each scene counts alike, so that the loss of a
    batch is the mean of the losses of its parts.
    """
    z = code.num_z
    density, features = reconstruction.split([z, reconstruction.shape[1] - z], dim=1)
    true_density, true_features = target.split([z, target.shape[1] - z], dim=1)
    density = torch.where(true_density <= 0, density.clamp(min=0), density)
    density_error = (density - true_density).abs()
    feature_error = (features - true_features).abs().unflatten(1, (-1, z)).mean(dim=1)

    def weigh(error: Tensor, opacity: Tensor) -> Tensor:
        weight = config.empty_weight + (1 - config.empty_weight) * opacity[:, 0]
        return ((error * weight).flatten(1).sum(1) / weight.flatten(1).sum(1)).mean()

    return config.density_weight * weigh(density_error, code.gate(grid.density)) + weigh(
        feature_error, code.gate(grid.density, dilate=True)
    )


def equivariance_loss(
    result: LatentReconstruction,
    grid: VoxelGrid,
    changes: Sequence[PlaneChange],
    code: VoxelCode,
    config: LatentLossConfig,
) -> Float[Tensor, ""]:
    """`voxel_loss` between what changed latents decode to and equally changed voxels: |D(tau(c), tau(f), g) - tau(V)|.

    tau is applied to normalised voxels; what weighs a voxel is the opacity of the changed density. Each scene counts
    alike.
    """
    total = result.target.new_zeros(())
    for items, decoded in zip(equal_sizes(changes), result.changed, strict=True):
        target = change_items(result.target, changes, items)
        changed = change_grid(grid, changes, items)
        total = total + len(items) * voxel_loss(decoded, target, changed, code, config)
    return total / len(changes)


class LatentLosses:
    """Losses of one step.

    Logged beside them is how well each codebook is used (see `CodebookUsage`) by the scenes of all processes over the
    last `USAGE_WINDOW` steps since the training was started or resumed.

    Args:
        model: the latent auto-encoder, possibly wrapped for several processes.
        renderer: the frozen stage 1.
        memory, cache: voxels and views of the training scenes.
    """

    def __init__(
        self,
        model: nn.Module,
        code: VoxelCode,
        renderer: SceneAutoencoder,
        memory: VoxelMemory,
        cache: SceneCache,
        config: LatentTrainingConfig,
        accelerator: Accelerator,
        lpips: Callable[[Tensor, Tensor], Tensor] | None,
    ) -> None:
        self.model, self.code, self.renderer = model, code, renderer
        self.memory, self.cache, self.config = memory, cache, config
        self.share = batch_share(config.schedule, accelerator)
        self.device = accelerator.device
        self.lpips = lpips
        self.sum_over_processes = partial(accelerator.reduce, reduction="sum")
        self.usage: dict[str, CodebookUsage] = {}

    def __call__(self, number: int) -> dict[str, Tensor]:
        with torch.autocast(self.device.type, enabled=False):  # which cannot stack the voxels, stored in half precision
            grid, views, draws = self.batch(number)
        weights = self.config.losses
        changes = draw_changes(draws, _is_square(grid)) if weights.equivariance_mult else []
        result: LatentReconstruction = self.model(
            grid, fine_dropout=self.config.fine_dropout, generators=draws.generators, changes=changes
        )
        losses = {
            "voxel_loss": weights.voxel_mult
            * voxel_loss(result.reconstruction, result.target, grid, self.code, weights),
            "background_loss": weights.background_mult * background_loss(result.background, result.background_target),
            "kl_loss": weights.kl_mult * result.kl,
            "commitment_loss": weights.commitment_mult * result.commitment,
        }
        if changes:
            changed = equivariance_loss(result, grid, changes, self.code, weights)
            losses["equivariance_loss"] = weights.equivariance_mult * changed
        if weights.rgb_mult or weights.depth_mult or weights.lpips_mult:
            losses.update(self.image_losses(result.grid, views))
        return {**losses, **self.codebook_metrics(result.code_counts)}

    def codebook_metrics(self, code_counts: dict[str, Int[Tensor, " codes"]]) -> dict[str, Tensor]:
        """Share of the codes in use, and perplexity, of each codebook; names begin with `_`: logged only."""
        metrics = {}
        for name, counts in code_counts.items():
            usage = self.usage.setdefault(name, CodebookUsage(USAGE_WINDOW))
            usage.add(self.sum_over_processes(counts))
            metrics[f"_{name}_codebook_usage"] = usage.share
            metrics[f"_{name}_codebook_perplexity"] = usage.perplexity
        return metrics

    def image_losses(self, grid: VoxelGrid, views: Views) -> dict[str, Tensor]:
        """Losses of views rendered by the frozen stage 1."""
        weights = self.config.losses
        rendered = self.renderer.render(grid, views.cameras)
        rgb = views.covered(rendered.rgb)
        losses = {"rgb_loss": weights.rgb_mult * F.l1_loss(rgb, views.images)}
        known = views.depths is not None  # on every process the same losses, as their means are logged
        depth = depth_loss(rendered.maps, views) if known else rendered.depth.new_zeros(())
        losses["depth_loss"] = weights.depth_mult * depth
        if weights.lpips_mult:
            assert self.lpips is not None
            images = (rgb.flatten(0, 1) * 2 - 1, views.images.flatten(0, 1) * 2 - 1)
            losses["lpips_loss"] = weights.lpips_mult * self.lpips(*images).mean()
        return losses

    def batch(self, number: int) -> tuple[VoxelGrid, Views, ItemDraws]:
        """Voxels of a pass's scenes and views to compare their renderings with, turned together, and further draws."""
        indices, draws = self.share.items(len(self.memory), number), self.share.draws(number, self.device)
        views = [self._load_views(self.memory.scene_ids[i]) for i in indices]
        views = [v[draws.permutation(i, v.shape[0])[: self.config.num_views]] for i, v in enumerate(views)]
        grid = self.memory.grid(indices, self.device)
        if self.config.quarter_turns:
            turns = draws.integers(4).tolist()
            grid = VoxelGrid.cat([grid[i].rotate90(turn) for i, turn in enumerate(turns)])
            views = [
                replace(v, cameras=rotate_cameras90(v.cameras, turn)) for v, turn in zip(views, turns, strict=True)
            ]
        return grid, Views.stack(views).to(self.device), draws

    def _load_views(self, scene_id: str) -> Views:
        scene = self.cache.load(scene_id)
        return Views.cat([scene.source, scene.target])


def train_latent_autoencoder(
    store: VoxelStore,
    output_dir: Path | str,
    model_config: dict[str, Any],
    config: LatentTrainingConfig,
    *,
    lpips: Callable[[Tensor, Tensor], Tensor] | None = None,
    initial: LatentAutoencoder | None = None,
    cache_gib: float = 2.0,
    on_progress: ProgressCallback | None = None,
) -> LatentAutoencoder:
    """Trains stage 2 on the training scenes of a store, continuing an interrupted run.

    Args:
        store: encoded scenes; their collection must be where it was when they were encoded.
        output_dir: becomes a run folder (see `RunFolder`) with the model in `latent_autoencoder/`.
        model_config: arguments of `LatentAutoencoder`; the scenes' shapes and box come from the store.
        lpips: a perceptual distance of images in [-1, 1], needed if `lpips_mult` is set; moved to where it trains.
        initial: a model to begin from, of the same configuration (the box may differ, unless only the decoder is
            trained); by default one fitted to the scenes.

    Returns:
        the trained model, on the device it was trained on, in evaluation mode.

    Raises:
        UserInputError: if the store, the sizes, the settings or the initial model do not fit together.
    """
    if config.decoder_only and initial is None:
        raise UserInputError("Only a decoder of a trained latent auto-encoder can be trained alone: add its run.")
    accelerator = new_accelerator(config.schedule, output_dir)
    torch.manual_seed(config.schedule.seed)
    renderer = store.load_autoencoder().to(accelerator.device)
    if isinstance(lpips, nn.Module):
        lpips.to(accelerator.device)
    memory = store.load_all("train")
    if not len(memory):
        raise UserInputError(f"{store.root} has no training scenes: encode a collection that has some.")
    _require_turnable(store, config)
    _require_weight(config.losses.equivariance_mult)
    model = new_latent_autoencoder(store, model_config).to(accelerator.device, memory_format=torch.channels_last)
    if config.losses.equivariance_mult:
        _require_halvable(model)
    identity = {
        "kind": "latent auto-encoder",
        "scene_autoencoder": store.autoencoder_hash,
        "model": public_config(model),
        "seed": config.schedule.seed,
        "batch_size": joint_batch_size(config.schedule, accelerator),
        "losses": {name: value for name, value in asdict(config.losses).items() if value or name not in LATER_LOSSES},
    }
    if initial is not None:
        identity |= {"initial_weights": model_hash(initial), "decoder_only": config.decoder_only}
        _require_same_sizes(initial, model, store, same_box=config.decoder_only)
        load_exactly(model, initial.state_dict(), "the initial latent auto-encoder")
    folder = RunFolder(output_dir, identity, accelerator)
    if config.decoder_only:
        model.freeze_encoding()
    elif folder.checkpoint is None and initial is None:
        fit_memory = VoxelMemory(memory.voxels[:FIT_SCENES], memory.scene_ids[:FIT_SCENES], memory.aabb)
        model.fit(fit_memory.batches(8, accelerator.device))
    cache = SceneCache(store.load_collection(), cache_gib)

    def make_losses(wrapped: nn.Module) -> LatentLosses:
        return LatentLosses(wrapped, model.voxel_code, renderer, memory, cache, config, accelerator, lpips)

    train(
        folder,
        model,
        make_losses,
        config.schedule,
        accelerator,
        render=RoundTripPictures(store, model, renderer) if config.schedule.validation_steps else None,
        description="Latent auto-encoder",
        on_progress=on_progress,
    )
    keep_result(Path(output_dir) / MODEL_FOLDER, accelerator, model.save_pretrained)
    return model.eval()


def new_latent_autoencoder(store: VoxelStore, model_config: dict[str, Any]) -> LatentAutoencoder:
    """An untrained model for the voxels of a store.

    Raises:
        UserInputError: if the sizes do not fit them.
    """
    low, high = store.aabb.tolist()
    try:
        return LatentAutoencoder(
            **{
                **model_config,
                "grid_shape": store.grid_shape,
                "feature_channels": store.feature_channels,
                "background_channels": store.background_channels,
                "aabb": (tuple(low), tuple(high)),
            }
        )
    except ValueError as error:
        raise UserInputError(
            f"This preset does not fit the voxels in {store.root} ({error}): choose another."
        ) from None


def _require_same_sizes(
    initial: LatentAutoencoder, model: LatentAutoencoder, store: VoxelStore, same_box: bool
) -> None:
    given, wanted = public_config(initial), public_config(model)
    if not same_box:
        given, wanted = given | {"aabb": None}, wanted | {"aabb": None}
    if given != wanted:
        raise UserInputError(
            f"The initial latent auto-encoder does not fit the voxels in {store.root} or the sizes that are asked "
            "for: give the voxels it was trained on, and no other sizes."
        )


def _is_square(grid: VoxelGrid) -> bool:
    """Whether turned voxels fill the same box."""
    edges = grid.aabb[1] - grid.aabb[0]
    return grid.shape[1] == grid.shape[2] and abs(float(edges[0] - edges[1])) < 1e-4


def _require_weight(equivariance_mult: float) -> None:
    if not 0 <= equivariance_mult < float("inf"):
        raise UserInputError(f"--equivariance-mult is {equivariance_mult}, but must be a finite number of at least 0.")


def _require_halvable(model: LatentAutoencoder) -> None:
    y, x = model.coarse_shape[-2:]
    if y % SMALLER or x % SMALLER:
        raise UserInputError(
            f"c has {y} x {x} cells, which --equivariance-mult cannot halve: leave it out, or choose another preset."
        )


def _require_turnable(store: VoxelStore, config: LatentTrainingConfig) -> None:
    if not config.quarter_turns:
        return
    low, high = store.aabb[0, :2], store.aabb[1, :2]
    square = store.grid_shape[1] == store.grid_shape[2] and torch.allclose(low, -high, atol=1e-4)
    if not square or abs(float(high[0] - high[1])) > 1e-4:
        raise UserInputError(
            f"The box of {store.root} is not square around the origin, so its scenes cannot be turned: "
            "add --quarter-turns False."
        )
