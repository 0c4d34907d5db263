"""What the in-domain prior learns from images of a scene collection, and how well it has learned it."""

from __future__ import annotations

from collections.abc import Sequence
from copy import copy
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int, UInt8
from torch import Tensor, nn

from nfldm_ns.autoencoder.scene_autoencoder import SceneAutoencoder
from nfldm_ns.diffusion.training import (
    DiffusionTrainingConfig,
    diffusion_target,
    spread_timesteps,
    training_scheduler,
)
from nfldm_ns.refine.domain_prior import (
    CLEAN,
    RENDERED,
    UNKNOWN,
    EmbeddingNetwork,
    ImageEmbedder,
    PriorDenoiser,
    colour_moments,
)
from nfldm_ns.refine.images import read_square_images
from nfldm_ns.refine.observed_views import ObservedViews, observed_in
from nfldm_ns.refine.seen_maps import NOT_SEEN, MapDescription, SeenMaps, maps_seen_in
from nfldm_ns.refine.spaces import FeatureSpace, PixelSpace
from nfldm_ns.scenes.collection import SceneCollection
from nfldm_ns.training.draws import BatchShare, ItemDraws
from nfldm_ns.training.schedule import Schedule, batch_share

EVALUATION_BATCH = 16


@dataclass
class PriorTrainingConfig:
    """Training of an in-domain prior."""

    schedule: Schedule = field(default_factory=Schedule)
    embedding: EmbeddingNetwork = "vgg"
    """The network of LPIPS whose activations condition the prior."""
    embedding_noise: float = 0.1
    """Standard deviation of noise on embeddings, relative to theirs: those of renders are never exact."""
    condition_dropout: float = 0.1
    """Share of images whose embedding is hidden, and share of those whose origin is, for guidance."""
    render_share: float = 0.35
    """Share of renders among the images it learns from, where there are some."""
    bev_dropout: float = 0.15
    """Share of images whose scene's map is not looked at, where the prior knows maps."""
    view_dropout: float = 0.1
    """Share of images whose observed views it is not told of, where the prior observes any."""
    mirror: bool = True
    """Also learn from mirrored images (not where the prior observes views: features have no mirror image)."""
    ema_decay: float = 0.999
    """Of the moving averages of the weights, which are what is kept; it rises to this value while training."""


@dataclass
class LearnedImages:
    """Images, and what is known of each.

    Attributes:
        images: `[N, 3, S, S]`, 8 bits.
        seen: what they see of their scenes' maps; None for a prior without.
        observed: what was observed of their places; None for a prior that observes nothing.
    """

    images: UInt8[Tensor, "images 3 size size"]
    seen: SeenMaps | None = None
    observed: ObservedViews | None = None

    @staticmethod
    def read(
        collection: SceneCollection,
        paths: Sequence[Path],
        denoiser: PriorDenoiser,
        embedder: ImageEmbedder,
        maps: MapDescription | None,
        stage1: SceneAutoencoder | None,
        seed: int,
    ) -> LearnedImages:
        """Images of a collection, with what the denoiser is to be told of them."""
        images = read_square_images(paths, denoiser.config.image_size)
        seen = None if maps is None else maps_seen_in(collection, maps, paths)
        if stage1 is None:
            return LearnedImages(images, seen)
        return LearnedImages(images, seen, observed_in(collection, stage1, embedder, paths, denoiser.view_side, seed))

    def first(self, count: int) -> tuple[Tensor, SeenMaps | None, ObservedViews | None]:
        """Of the first images; what was observed is that of all."""
        return self.images[:count], None if self.seen is None else self.seen[:count], self.observed


@dataclass
class _Shown:
    """What a pass looks at.

    Attributes:
        pixels: `[B, 3, S, S]` in [0, 1].
        rendered: which are renders.
        seen: of the maps.
    """

    pixels: Float[Tensor, "batch 3 size size"]
    rendered: Bool[Tensor, " batch"]
    seen: SeenMaps | None


class PriorLosses:
    """Mean squared errors of velocities; what is drawn depends on an image's place in the sequence of all images.

    Args:
        wrapped: the denoiser, as the accelerator wraps it.
        images: `[N, 3, S, S]`, 8 bits.
        share: what this process works on; by default everything.
        renders: `[R, 3, S, S]`, 8 bits: what it learns to tell from them; there may be none.
        seen: what the images see of their scenes' maps; None for a prior without. Renders are learned without a map.
        observed: what was observed of the images' places; None for a prior that observes nothing. The denoiser is then
            told the embedding of the observed views in the place of the image's own; of renders nothing is observed.
        preserved: images of the collection, and the share of these among what is learned, where a prior is
            personalised; its judge then learns nothing, and images that are not of the collection have no map.
    """

    def __init__(
        self,
        wrapped: nn.Module,
        denoiser: PriorDenoiser,
        space: PixelSpace | FeatureSpace,
        embedder: ImageEmbedder,
        images: UInt8[Tensor, "images 3 size size"],
        config: PriorTrainingConfig,
        device: torch.device,
        share: BatchShare | None = None,
        renders: UInt8[Tensor, "renders 3 size size"] | None = None,
        seen: SeenMaps | None = None,
        observed: ObservedViews | None = None,
        preserved: tuple[LearnedImages, float] | None = None,
    ) -> None:
        self.seen, self.observed, self.preserved = seen, observed, preserved
        self.renders = images[:0] if renders is None else renders
        self.wrapped, self.denoiser, self.space, self.embedder = wrapped, denoiser, space, embedder
        self.images, self.config, self.device = images, config, device
        self.share = share or batch_share(config.schedule)
        self.scheduler = training_scheduler(DiffusionTrainingConfig())

    def __call__(self, number: int) -> dict[str, Tensor]:
        share = self.share
        step, part = share.place(number)
        timestep = self.timesteps(share.joint_batch_size, share.seed + step)[part]
        losses = self.losses(share.items(len(self.images), number), timestep, share.draws(number, self.device))
        return {"loss": torch.stack(list(losses.values())).sum(), **{k: v.detach() for k, v in losses.items()}}

    def timesteps(self, count: int, seed: int) -> Int[Tensor, " count"]:
        return spread_timesteps(count, self.scheduler.config.num_train_timesteps, seed)

    def losses(
        self, indices: list[int], timestep: Int[Tensor, " batch"], draws: ItemDraws, augment: bool = True
    ) -> dict[str, Float[Tensor, ""]]:
        """Of some images: of velocities and, of augmented images, of the judge.

        Of what images show these are negative log-likelihoods, of where images are from binary cross-entropies.
        """
        shown = self._shown(indices, draws, augment)
        embedding = self.embedder(shown.pixels)
        with torch.no_grad():
            clean, timestep = self.space(shown.pixels), timestep.to(self.device)
        noise = draws.normal(clean)
        truth = self.denoiser.describe(embedding, colour_moments(shown.pixels)) if augment else None
        told = self._told(shown, embedding, indices, draws, augment)
        noisy = self.scheduler.add_noise(clean, noise, timestep)
        target = diffusion_target(self.scheduler, clean, noise, timestep)
        if truth is None or self.preserved is not None:
            return {"denoising_loss": F.mse_loss(self.wrapped(noisy, timestep, **told).float(), target)}
        predicted, judgement = self.wrapped(noisy, timestep, judge=True, **told)
        losses = {
            "denoising_loss": F.mse_loss(predicted.float(), target),
            "judge_loss": -judgement.log_likelihood(truth).mean(),
        }
        if judgement.odds is not None:
            clean_ones = (~shown.rendered).float().view(-1, 1, 1).expand_as(judgement.odds)
            losses["origin_loss"] = F.binary_cross_entropy_with_logits(judgement.odds.float(), clean_ones)
        return losses

    def _shown(self, indices: list[int], draws: ItemDraws, augment: bool) -> _Shown:
        """Some images, or in training what is learned in their places: renders, images that are preserved, mirrored."""
        pixels = self.images[indices].to(self.device).float() / 255
        rendered = torch.zeros(len(indices), dtype=torch.bool, device=self.device)
        seen = None if self.seen is None else self.seen[indices].to(self.device)
        if augment and len(self.renders):
            rendered = self._chance(draws, self.config.render_share)
            renders = self.renders[draws.integers(len(self.renders))].to(self.device).float() / 255
            pixels = torch.where(rendered.view(-1, 1, 1, 1), renders, pixels)
        if augment and self.preserved is not None:
            others, share = self.preserved
            kept = self._chance(draws, share)
            numbers = draws.integers(len(others.images))
            known = others.images[numbers].to(self.device).float() / 255
            pixels = torch.where(kept.view(-1, 1, 1, 1), known, pixels)
            if others.seen is not None:
                seen = others.seen[numbers].to(self.device).masked_fill(~kept.view(-1, 1, 1), NOT_SEEN)
        if augment and self.config.mirror and self.observed is None:
            mirrored = draws.integers(2).bool().to(self.device)
            pixels = torch.where(mirrored.view(-1, 1, 1, 1), pixels.flip(-1), pixels)
            seen = None if seen is None else torch.where(mirrored.view(-1, 1, 1), seen.flip(-1), seen)
        return _Shown(pixels, rendered, seen)

    def _told(
        self, shown: _Shown, embedding: Tensor, indices: list[int], draws: ItemDraws, augment: bool
    ) -> dict[str, Tensor | None]:
        """What the denoiser is told of images, in training with noise, and a share of it not."""
        views, seen, drop = None, shown.seen, None
        if self.observed is not None:
            views = self.observed.maps[indices].to(self.device).float()
            observed = self.observed.embeddings[indices].to(self.device)
            embedding = torch.where(shown.rendered[:, None], embedding, observed)
        origin = torch.full((len(indices),), CLEAN, device=self.device).masked_fill(shown.rendered, RENDERED)
        if augment:
            config = self.config
            spread = config.embedding_noise * self.denoiser.embedding.std
            embedding = embedding + spread * draws.normal(embedding)
            drop = self._chance(draws, config.condition_dropout)
            origin = origin.masked_fill(self._chance(draws, config.condition_dropout), UNKNOWN)
            if seen is not None:
                hidden = self._chance(draws, config.bev_dropout) | shown.rendered
                seen = seen.masked_fill(hidden.view(-1, 1, 1), NOT_SEEN)
            if views is not None:
                hidden = self._chance(draws, config.view_dropout) | shown.rendered
                views = views.masked_fill(hidden.view(-1, 1, 1, 1), 0.0)
        return {"embedding": embedding, "drop": drop, "origin": origin, "seen": seen, "views": views}

    def _chance(self, draws: ItemDraws, share: float) -> Bool[Tensor, " batch"]:
        """True for so large a share of the images."""
        return draws.uniform().to(self.device) < share


@torch.no_grad()
def evaluate_prior(losses: PriorLosses, seed: int = 0) -> float:
    """Mean loss on the images of `losses`, with fixed noise and times."""
    count, total = len(losses.images), 0.0
    for first in range(0, count, EVALUATION_BATCH):
        numbers = range(first, min(first + EVALUATION_BATCH, count))
        timestep = losses.timesteps(len(numbers), seed + first)
        draws = ItemDraws(seed, numbers, losses.device)
        total += len(numbers) * float(losses.losses(list(numbers), timestep, draws, augment=False)["denoising_loss"])
    return total / count


def held_out_losses(judged: PriorLosses) -> dict[str, float]:
    """`held_out_loss`, and the same without maps and without observed views, where the prior knows any."""
    losses = {"held_out_loss": judged}
    if judged.seen is not None:
        losses["held_out_loss_without_maps"] = copy(judged)
        losses["held_out_loss_without_maps"].seen = None
    if judged.observed is not None:
        hidden = replace(judged.observed, maps=torch.zeros_like(judged.observed.maps))
        losses["held_out_loss_without_views"] = copy(judged)
        losses["held_out_loss_without_views"].observed = hidden
    return {name: round(evaluate_prior(value), 5) for name, value in losses.items()}


def personal_losses(
    judged: PriorLosses, images: UInt8[Tensor, "images 3 size size"], when: str = ""
) -> dict[str, float]:
    """On held-out images of the collection and on the few that a prior is personalised to."""
    few = copy(judged)
    few.images, few.seen = images, None
    losses = {"held_out_loss": evaluate_prior(judged), "personal_loss": evaluate_prior(few)}
    return {f"{name}{when}": round(value, 5) for name, value in losses.items()}
