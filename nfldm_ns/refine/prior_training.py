"""Trains the in-domain prior on the images of a scene collection."""

from __future__ import annotations

from collections.abc import Sequence
from copy import copy
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int, UInt8
from torch import Tensor, nn

from nfldm_ns.autoencoder.scene_autoencoder import SceneAutoencoder
from nfldm_ns.choice import evenly
from nfldm_ns.diffusion.solver import sample_latents
from nfldm_ns.diffusion.training import (
    DiffusionTrainingConfig,
    diffusion_target,
    make_scheduler,
    spread_timesteps,
    training_scheduler,
)
from nfldm_ns.errors import UserInputError
from nfldm_ns.refine.domain_prior import (
    CLEAN,
    RENDERED,
    UNKNOWN,
    DomainPrior,
    EmbeddingNetwork,
    ImageEmbedder,
    PriorDenoiser,
    PriorDescription,
    colour_moments,
    save_domain_prior,
)
from nfldm_ns.refine.images import chosen_paths, read_square_images, render_images
from nfldm_ns.refine.observed_views import ObservedViews, map_channels, observed_in
from nfldm_ns.refine.seen_maps import NOT_SEEN, MapDescription, SeenMaps, maps_seen_in
from nfldm_ns.refine.spaces import FeatureSpace, PixelSpace, make_space
from nfldm_ns.reports.galleries import image_grid
from nfldm_ns.scenes.collection import SceneCollection
from nfldm_ns.training.draws import BatchShare, ItemDraws
from nfldm_ns.training.identity import model_hash, public_config
from nfldm_ns.training.loop import ProgressCallback, held_out_split, moving_averages, train
from nfldm_ns.training.run import RunFolder
from nfldm_ns.training.schedule import Schedule, batch_share, joint_batch_size, new_accelerator
from nfldm_ns.training.trackers import Pictures

PRIOR_FOLDER = "prior"
NUM_STATISTICS = 1024  # images that features and embeddings have their statistics of
NUM_CLEAN = 256  # of which the prior keeps embeddings
NUM_HELD_OUT = 256
NUM_PICTURES, PICTURE_STEPS = 6, 30
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


@dataclass(frozen=True)
class Personalisation:
    """A trained prior that learns a few further images, as DreamBooth (Ruiz et al. 2023) and DreamBooth3D have it.

    What it knows already is kept by learning on from the collection's images at the same time (prior preservation);
    the embeddings of the few images are what tells them from these, in the place of a rare word. Its judge stays.

    Attributes:
        start: the prior; it is changed.
        images: the few images.
        preservation_share: of the collection's images among those it learns from.

    Raises:
        UserInputError: for a prior that observes views of an image's place, which further images lack.
    """

    start: DomainPrior
    images: Sequence[Path]
    preservation_share: float = 0.5

    def __post_init__(self) -> None:
        if self.start.observes:
            raise UserInputError(
                "A prior that observes views would forget to: personalise one that was trained without --condition "
                "views."
            )
        if not 0 <= self.preservation_share < 1:
            raise UserInputError(f"--preservation-share is {self.preservation_share}: give a share from 0 to below 1.")


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
        pixels = self.images[indices].to(self.device).float() / 255
        origin = torch.full((len(indices),), CLEAN, device=self.device)
        seen = None if self.seen is None else self.seen[indices].to(self.device)
        if augment and len(self.renders):
            rendered = draws.uniform().to(self.device) < self.config.render_share
            renders = self.renders[draws.integers(len(self.renders))].to(self.device).float() / 255
            pixels = torch.where(rendered.view(-1, 1, 1, 1), renders, pixels)
            origin = origin.masked_fill(rendered, RENDERED)
        if augment and self.preserved is not None:
            others, share = self.preserved
            kept = draws.uniform().to(self.device) < share
            numbers = draws.integers(len(others.images))
            known = others.images[numbers].to(self.device).float() / 255
            pixels = torch.where(kept.view(-1, 1, 1, 1), known, pixels)
            if others.seen is not None:
                seen = others.seen[numbers].to(self.device).masked_fill(~kept.view(-1, 1, 1), NOT_SEEN)
        if augment and self.config.mirror and self.observed is None:
            mirrored = draws.integers(2).bool().to(self.device)
            pixels = torch.where(mirrored.view(-1, 1, 1, 1), pixels.flip(-1), pixels)
            seen = None if seen is None else torch.where(mirrored.view(-1, 1, 1), seen.flip(-1), seen)
        embedding, drop = self.embedder(pixels), None
        with torch.no_grad():
            clean, timestep = self.space(pixels), timestep.to(self.device)
        rendered = (origin == RENDERED).float()
        noise = draws.normal(clean)
        if augment:
            shown = self.denoiser.describe(embedding, colour_moments(pixels))
        views = None
        if self.observed is not None:
            views = self.observed.maps[indices].to(self.device).float()
            told = self.observed.embeddings[indices].to(self.device)
            embedding = torch.where(rendered[:, None] > 0, embedding, told)
        if augment:
            spread = self.config.embedding_noise * self.denoiser.embedding.std
            embedding = embedding + spread * draws.normal(embedding)
            drop = draws.uniform().to(self.device) < self.config.condition_dropout
            origin = origin.masked_fill(draws.uniform().to(self.device) < self.config.condition_dropout, UNKNOWN)
            if seen is not None:
                hidden = (draws.uniform().to(self.device) < self.config.bev_dropout) | (rendered > 0)
                seen = seen.masked_fill(hidden.view(-1, 1, 1), NOT_SEEN)
            if views is not None:
                hidden = (draws.uniform().to(self.device) < self.config.view_dropout) | (rendered > 0)
                views = views.masked_fill(hidden.view(-1, 1, 1, 1), 0.0)
        noisy = self.scheduler.add_noise(clean, noise, timestep)
        target = diffusion_target(self.scheduler, clean, noise, timestep)
        if not augment or self.preserved is not None:
            predicted = self.wrapped(noisy, timestep, embedding, drop, origin, seen=seen, views=views).float()
            return {"denoising_loss": F.mse_loss(predicted, target)}
        predicted, judgement = self.wrapped(
            noisy, timestep, embedding, drop, origin, judge=True, seen=seen, views=views
        )
        losses = {
            "denoising_loss": F.mse_loss(predicted.float(), target),
            "judge_loss": -judgement.log_likelihood(shown).mean(),
        }
        if judgement.odds is not None:
            truth = (1 - rendered).view(-1, 1, 1).expand_as(judgement.odds)
            losses["origin_loss"] = F.binary_cross_entropy_with_logits(judgement.odds.float(), truth)
        return losses


class PriorPictures:
    """What the prior samples for the embeddings of held-out images, with the same noise every time."""

    def __init__(
        self,
        denoiser: PriorDenoiser,
        space: PixelSpace | FeatureSpace,
        embedder: ImageEmbedder,
        images: UInt8[Tensor, "images 3 size size"],
        seen: SeenMaps | None = None,
        observed: ObservedViews | None = None,
    ) -> None:
        self.denoiser, self.space, self.scheduler = denoiser, space, make_scheduler()
        self.images, self.seen, self.observed = images.float() / 255, seen, observed
        device = next(denoiser.parameters()).device
        self.embedding = embedder(self.images.to(device))
        if observed is not None:
            self.embedding = observed.embeddings[: len(images)].to(device)
        like = torch.empty(len(images), *denoiser.sample_shape, device=device)
        self.noise = ItemDraws(0, range(len(images)), device).normal(like)

    def __call__(self) -> Pictures:
        device = self.embedding.device
        shared = {"origin": torch.full((len(self.embedding),), CLEAN, device=device)}
        if self.seen is not None:
            shared["seen"] = self.seen.to(device)
        if self.observed is not None:
            shared["views"] = self.observed.maps[: len(self.images)].to(device).float()
        conditioned, free = (
            sample_latents(self.denoiser, self.scheduler, self.noise, PICTURE_STEPS, embedding=embedding, **shared)
            for embedding in (self.embedding, self.denoiser.embedding.mean.expand_as(self.embedding))
        )
        columns = {
            "held-out image": self.images,
            ("sample for its embedding" if self.observed is None else "sample for observed views"): self.space.preview(
                conditioned
            ).cpu(),
            "without embedding": self.space.preview(free).cpu(),
        }
        return {"prior_samples": image_grid(columns)}


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


def train_prior(
    collection: SceneCollection,
    output_dir: Path | str,
    model_config: dict[str, Any],
    config: PriorTrainingConfig,
    *,
    max_images: int | None = None,
    generated: Sequence[Path] = (),
    with_maps: bool = False,
    stage1: SceneAutoencoder | None = None,
    personal: Personalisation | None = None,
    on_progress: ProgressCallback | None = None,
) -> Path:
    """Trains a prior on the training scenes' images, continuing an interrupted run.

    Args:
        output_dir: becomes a run folder (see `RunFolder`) with the averaged weights in `prior/`.
        model_config: sizes and space of `PriorDenoiser`.
        max_images: kept in memory, evenly chosen from all scenes, with `stage1` all images of some; None for all.
        generated: scenes, or folders of scenes, whose images it learns to tell from clean ones.
        with_maps: it is also conditioned on what an image sees of its scene's semantic map.
        stage1: it is conditioned on what this makes of other views of the place, see `observed_views.py`.
        personal: a trained prior learns further images; `model_config`, `generated`, `with_maps`, `stage1` and the
            network of embeddings are then of no concern.

    Returns:
        the prior's folder; its `prior.json` tells the loss on held-out images.

    Raises:
        UserInputError: if the images are too small, or maps are wanted and missing.
    """
    accelerator = new_accelerator(config.schedule, output_dir)
    torch.manual_seed(config.schedule.seed)
    if personal is not None:
        config = replace(config, embedding=personal.start.embedder.network)
        model_config = {"image_size": personal.start.image_size}
    size = int(model_config.get("image_size", 64))
    embedder = ImageEmbedder(config.embedding, size).to(accelerator.device)
    if personal is None:
        maps = MapDescription.of_collection(collection) if with_maps else None
        denoiser = _new_denoiser(model_config, embedder, bool(generated), maps, stage1)
    else:
        maps = _known_maps(personal.start, collection)
        denoiser = _free(personal.start.denoiser)
    denoiser.to(accelerator.device)
    stage1 = None if stage1 is None else stage1.to(accelerator.device)

    def read(paths: Sequence[Path]) -> LearnedImages:
        return LearnedImages.read(collection, paths, denoiser, embedder, maps, stage1, config.schedule.seed)

    observes = stage1 is not None
    learned = read(chosen_paths(collection, "train", max_images, observes))
    renders = render_images(generated, size) if generated else learned.images[:0]
    split = held_out_split(collection.splits)
    held_out = read(chosen_paths(collection, split, NUM_HELD_OUT, observes))
    preserved = None
    if personal is None:
        space = make_space(denoiser.config.space, size).to(accelerator.device)
        _fit(denoiser, space, embedder, learned)
    else:
        space = personal.start.space.to(accelerator.device)
        preserved = (learned, personal.preservation_share)
        learned = LearnedImages(read_square_images(personal.images, size))
    identity = {
        "kind": "image prior",
        "collection": {
            "name": collection.name,
            "scenes": len(collection.splits["train"]),
            "images": len(learned.images),
        },
        "renders": len(renders),
        "model": public_config(denoiser),
        "embedding": config.embedding,
        "seed": config.schedule.seed,
        "batch_size": joint_batch_size(config.schedule, accelerator),
        **_further_identity(denoiser, stage1, personal),
    }
    if stage1 is None:
        identity["model"].pop("view_channels", None)  # which runs of earlier versions do not have
    folder = RunFolder(output_dir, identity, accelerator)
    ema = moving_averages(denoiser, config.ema_decay)

    def losses_of(wrapped: nn.Module, found: LearnedImages, **changes: Any) -> PriorLosses:
        told = {"seen": found.seen, "observed": found.observed, **changes}
        return PriorLosses(wrapped, denoiser, space, embedder, found.images, config, accelerator.device, **told)

    def make_losses(wrapped: nn.Module) -> PriorLosses:
        share = batch_share(config.schedule, accelerator)
        return losses_of(wrapped, learned, share=share, renders=renders, preserved=preserved)

    judged = losses_of(denoiser, held_out)
    before = {} if personal is None else _personal_losses(judged, learned.images, "_before")
    pictures = None
    if config.schedule.validation_steps:
        pictures = PriorPictures(denoiser, space, embedder, *held_out.first(NUM_PICTURES))
    train(
        folder,
        denoiser,
        make_losses,
        config.schedule,
        accelerator,
        ema=ema,
        render=pictures,
        description="Prior of the collection's images",
        on_progress=on_progress,
    )
    ema.copy_to(denoiser.parameters())
    destination = Path(output_dir) / PRIOR_FOLDER
    if accelerator.is_main_process:
        made_by: dict[str, Any] = {
            "command": "nfldm-train-prior" + ("" if personal is None else " --personalise"),
            "collection": collection.name,
            "licence": collection.licence,
            "images": len(learned.images),
            "renders": len(renders),
            "steps": folder.steps,
            "seed": config.schedule.seed,
            "held_out_split": split,
            **(held_out_losses(judged) if personal is None else _personal_losses(judged, learned.images)),
            **before,
        }
        save_domain_prior(
            destination,
            denoiser,
            space,
            judged.scheduler,
            _embed(embedder, evenly_chosen(learned.images, NUM_CLEAN)),
            PriorDescription(config.embedding, made_by, maps),
            stage1,
        )
    accelerator.wait_for_everyone()
    return destination


def _new_denoiser(
    model_config: dict[str, Any],
    embedder: ImageEmbedder,
    knows_renders: bool,
    maps: MapDescription | None,
    stage1: SceneAutoencoder | None,
) -> PriorDenoiser:
    try:
        return PriorDenoiser(
            **model_config,
            embedding_dim=embedder.dim,
            knows_renders=knows_renders,
            bev_classes=0 if maps is None else maps.outside,
            view_channels=0 if stage1 is None else map_channels(stage1),
        )
    except ValueError as error:
        raise UserInputError(f"The prior cannot be built ({error}): choose another --image-size.") from None


def _fit(
    denoiser: PriorDenoiser, space: PixelSpace | FeatureSpace, embedder: ImageEmbedder, learned: LearnedImages
) -> None:
    """Takes on the statistics of what is learned."""
    examples = evenly_chosen(learned.images, NUM_STATISTICS)
    space.fit(examples)
    denoiser.fit(_embed(embedder, examples), colour_moments(examples.float() / 255))
    if learned.observed is not None and denoiser.view_encoder is not None:
        denoiser.view_encoder.fit(evenly_chosen(learned.observed.maps, NUM_STATISTICS))


def _further_identity(
    denoiser: PriorDenoiser, stage1: SceneAutoencoder | None, personal: Personalisation | None
) -> dict[str, Any]:
    """What a run that observes, or personalises, is told apart by."""
    found: dict[str, Any] = {} if stage1 is None else {"stage1": model_hash(stage1)}
    if personal is not None:
        found["personalised"] = {"start": model_hash(denoiser), "share": personal.preservation_share}
    return found


def _free(denoiser: PriorDenoiser) -> PriorDenoiser:
    """Learns again, but its judge does not."""
    denoiser.requires_grad_(True)
    denoiser.judge.requires_grad_(False)
    return denoiser.train()


def _known_maps(start: DomainPrior, collection: SceneCollection) -> MapDescription | None:
    """The maps of a prior that is personalised; raises `UserInputError` if the collection has others, or none."""
    if start.maps is not None and MapDescription.of_collection(collection) != start.maps:
        raise UserInputError(
            f"{collection.root} has other maps than the prior knows (classes, size or box): personalise it beside the "
            "collection that it was trained on."
        )
    return start.maps


def _personal_losses(
    judged: PriorLosses, images: UInt8[Tensor, "images 3 size size"], when: str = ""
) -> dict[str, float]:
    """On held-out images of the collection and on the few that a prior is personalised to."""
    few = copy(judged)
    few.images, few.seen = images, None
    losses = {"held_out_loss": evaluate_prior(judged), "personal_loss": evaluate_prior(few)}
    return {f"{name}{when}": round(value, 5) for name, value in losses.items()}


def evenly_chosen(rows: Tensor, count: int) -> Tensor:
    """At most `count` rows, evenly spaced."""
    return rows[evenly(range(len(rows)), count)]


def _embed(embedder: ImageEmbedder, images: UInt8[Tensor, "images 3 size size"]) -> Float[Tensor, "images dim"]:
    device = next(embedder.parameters()).device
    return torch.cat([embedder(part.to(device).float() / 255) for part in images.split(EVALUATION_BATCH)])
