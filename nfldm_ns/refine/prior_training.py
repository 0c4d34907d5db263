"""Trains the in-domain prior on the images of a scene collection."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from jaxtyping import Float, UInt8
from torch import Tensor, nn

from nfldm_ns.autoencoder.scene_autoencoder import SceneAutoencoder
from nfldm_ns.choice import evenly
from nfldm_ns.diffusion.solver import sample_latents
from nfldm_ns.diffusion.training import make_scheduler
from nfldm_ns.errors import UserInputError
from nfldm_ns.refine.domain_prior import (
    CLEAN,
    DomainPrior,
    ImageEmbedder,
    PriorDenoiser,
    PriorDescription,
    colour_moments,
    save_domain_prior,
)
from nfldm_ns.refine.images import chosen_paths, read_square_images, render_images
from nfldm_ns.refine.observed_views import ObservedViews, map_channels
from nfldm_ns.refine.prior_losses import (
    EVALUATION_BATCH,
    LearnedImages,
    PriorLosses,
    PriorTrainingConfig,
    held_out_losses,
    personal_losses,
)
from nfldm_ns.refine.seen_maps import MapDescription, SeenMaps
from nfldm_ns.refine.spaces import FeatureSpace, PixelSpace, make_space
from nfldm_ns.reports.galleries import image_grid
from nfldm_ns.scenes.collection import SceneCollection
from nfldm_ns.training.draws import ItemDraws
from nfldm_ns.training.identity import model_hash, public_config
from nfldm_ns.training.loop import ProgressCallback, held_out_split, moving_averages, train
from nfldm_ns.training.run import RunFolder
from nfldm_ns.training.schedule import batch_share, joint_batch_size, new_accelerator
from nfldm_ns.training.trackers import Pictures

PRIOR_FOLDER = "prior"
NUM_STATISTICS = 1024  # images that features and embeddings have their statistics of
NUM_CLEAN = 256  # of which the prior keeps embeddings
NUM_HELD_OUT = 256
NUM_PICTURES, PICTURE_STEPS = 6, 30


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
    size = int(model_config.get("image_size", 64)) if personal is None else personal.start.image_size
    if personal is not None:
        config = replace(config, embedding=personal.start.embedder.network)
    embedder = ImageEmbedder(config.embedding, size).to(accelerator.device)
    if personal is None:
        maps = MapDescription.of_collection(collection) if with_maps else None
        denoiser = _new_denoiser(model_config, embedder, bool(generated), maps, stage1)
    else:
        maps = _known_maps(personal.start, collection)
        denoiser = _free(personal.start.denoiser)
    pupil = _Pupil(denoiser.to(accelerator.device), embedder, maps, stage1, personal)
    task = pupil.read(collection, config.schedule.seed, max_images, generated)
    folder = RunFolder(output_dir, pupil.identity(task, config, accelerator), accelerator)
    ema = moving_averages(denoiser, config.ema_decay)

    def losses_of(wrapped: nn.Module, found: LearnedImages, **changes: Any) -> PriorLosses:
        told = {"seen": found.seen, "observed": found.observed, **changes}
        return PriorLosses(wrapped, denoiser, task.space, embedder, found.images, config, accelerator.device, **told)

    def make_losses(wrapped: nn.Module) -> PriorLosses:
        share = batch_share(config.schedule, accelerator)
        return losses_of(wrapped, task.learned, share=share, renders=task.renders, preserved=task.preserved)

    judged = losses_of(denoiser, task.held_out)
    before = {} if personal is None else personal_losses(judged, task.learned.images, "_before")
    pictures = None
    if config.schedule.validation_steps:
        pictures = PriorPictures(denoiser, task.space, embedder, *task.held_out.first(NUM_PICTURES))
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
        images = task.learned.images
        losses = held_out_losses(judged) if personal is None else personal_losses(judged, images)
        made_by = {**pupil.made_by(task), "steps": folder.steps, "seed": config.schedule.seed, **losses, **before}
        clean = _embed(embedder, evenly_chosen(images, NUM_CLEAN))
        description = PriorDescription(config.embedding, made_by, maps)
        save_domain_prior(destination, denoiser, task.space, judged.scheduler, clean, description, pupil.stage1)
    accelerator.wait_for_everyone()
    return destination


@dataclass
class _Task:
    """What a prior learns, and from what.

    Attributes:
        collection, held_out_split: where images are from.
        space: what it diffuses.
        learned, held_out, renders, preserved: see `PriorLosses`.
    """

    collection: SceneCollection
    held_out_split: str
    space: PixelSpace | FeatureSpace
    learned: LearnedImages
    held_out: LearnedImages
    renders: UInt8[Tensor, "renders 3 size size"]
    preserved: tuple[LearnedImages, float] | None = None


@dataclass
class _Pupil:
    """A prior that is to learn: new, or trained before if it is personalised."""

    denoiser: PriorDenoiser
    embedder: ImageEmbedder
    maps: MapDescription | None
    stage1: SceneAutoencoder | None
    personal: Personalisation | None

    def __post_init__(self) -> None:
        self.device = next(self.denoiser.parameters()).device
        if self.stage1 is not None:
            self.stage1.to(self.device)

    def read(self, collection: SceneCollection, seed: int, max_images: int | None, generated: Sequence[Path]) -> _Task:
        """Reads all images; a new prior takes on their statistics."""
        split, whole = held_out_split(collection.splits), self.stage1 is not None
        known = (self.denoiser, self.embedder, self.maps, self.stage1, seed)
        learned = LearnedImages.read(collection, chosen_paths(collection, "train", max_images, whole), *known)
        size = self.denoiser.config.image_size
        renders = render_images(generated, size) if generated else learned.images[:0]
        held_out = LearnedImages.read(collection, chosen_paths(collection, split, NUM_HELD_OUT, whole), *known)
        if self.personal is not None:
            few = LearnedImages(read_square_images(self.personal.images, size))
            preserved = (learned, self.personal.preservation_share)
            space = self.personal.start.space.to(self.device)
            return _Task(collection, split, space, few, held_out, renders, preserved)
        space = make_space(self.denoiser.config.space, size).to(self.device)
        _fit(self.denoiser, space, self.embedder, learned)
        return _Task(collection, split, space, learned, held_out, renders)

    def identity(self, task: _Task, config: PriorTrainingConfig, accelerator: Accelerator) -> dict[str, Any]:
        """What must be the same in a run that goes on."""
        found: dict[str, Any] = {
            "kind": "image prior",
            "collection": {
                "name": task.collection.name,
                "scenes": len(task.collection.splits["train"]),
                "images": len(task.learned.images),
            },
            "renders": len(task.renders),
            "model": public_config(self.denoiser),
            "embedding": config.embedding,
            "seed": config.schedule.seed,
            "batch_size": joint_batch_size(config.schedule, accelerator),
        }
        if self.stage1 is None:
            found["model"].pop("view_channels", None)  # which runs of earlier versions do not have
        else:
            found["stage1"] = model_hash(self.stage1)
        if self.personal is not None:
            share = self.personal.preservation_share
            found["personalised"] = {"start": model_hash(self.denoiser), "share": share}
        return found

    def made_by(self, task: _Task) -> dict[str, Any]:
        """What a finished prior says of its data."""
        return {
            "command": "nfldm-train-prior" + ("" if self.personal is None else " --personalise"),
            "collection": task.collection.name,
            "licence": task.collection.licence,
            "images": len(task.learned.images),
            "renders": len(task.renders),
            "held_out_split": task.held_out_split,
        }


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


def evenly_chosen(rows: Tensor, count: int) -> Tensor:
    """At most `count` rows, evenly spaced."""
    return rows[evenly(range(len(rows)), count)]


def _embed(embedder: ImageEmbedder, images: UInt8[Tensor, "images 3 size size"]) -> Float[Tensor, "images dim"]:
    device = next(embedder.parameters()).device
    return torch.cat([embedder(part.to(device).float() / 255) for part in images.split(EVALUATION_BATCH)])
