"""A small image diffusion model of one domain: a prior that needs no hub, trained on a collection's own images.

It is conditioned on an embedding of an image by the network of LPIPS, which training stage 1 needs anyway: the means of
its activations at all levels, so both what an image shows and its colours and textures. (Not by the Inception of FID,
which results are measured with.)
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from diffusers import ConfigMixin, DDPMScheduler, ModelMixin, UNet2DConditionModel
from diffusers.configuration_utils import register_to_config
from diffusers.models.embeddings import get_timestep_embedding
from jaxtyping import Bool, Float, Int
from nerfstudio.cameras.cameras import Cameras
from pydantic import Field
from safetensors.torch import save_file
from torch import Tensor, nn

from nfldm_ns.autoencoder.checkpoints import WEIGHTS, load_exactly, load_scene_autoencoder, read_safetensors
from nfldm_ns.autoencoder.model_configs import build_model, read_scheduler
from nfldm_ns.autoencoder.perceptual import PerceptualNetwork
from nfldm_ns.autoencoder.scene_autoencoder import SceneAutoencoder
from nfldm_ns.diffusion.denoisers import Normaliser
from nfldm_ns.errors import UserInputError
from nfldm_ns.pretrained.weights import load_lpips
from nfldm_ns.refine.observed_views import VIEW_FEATURES, ObservedViewEncoder, map_channels, observed_maps
from nfldm_ns.refine.prior import Condition, ImagePrior, resize_square
from nfldm_ns.refine.seen_maps import MAP_FEATURES, MapDescription, SeenMapEncoder, SeenMaps
from nfldm_ns.refine.spaces import (
    MEAN_COLOURS,
    REDUCTION,
    FeatureSpace,
    PixelSpace,
    Space,
    make_space,
    principal_components,
    space_shape,
)
from nfldm_ns.scenes.collection import read_json
from nfldm_ns.scenes.schema import BevClassEntry, Checked, Positive, validated_json
from nfldm_ns.scenes.views import Views, index_cameras
from nfldm_ns.scenes.writing import atomic_path, write_json

FORMAT = "nfldm-image-prior"
VERSION = 3
DESCRIPTION = "prior.json"
DENOISER, SCHEDULER, STAGE1 = "denoiser", "scheduler", "scene_autoencoder"
EMBEDDINGS, SPACE = "clean_images.safetensors", "space.safetensors"
EMBEDDED_AT_ONCE = 32
CLEAN, RENDERED, UNKNOWN = range(3)  # where an image is from, for priors that know renders
TIME_DIM = 64
COLOUR_MOMENTS = 9  # three means, six variances and covariances
COLOUR_WEIGHT = 10.0  # of what the judge says of colours: it moves 3 of many channels
LEAST_SHARE = 1e-5  # of the largest variance, of a component that counts
LARGEST_COMPONENT = 4.0  # standard deviations: images unlike all of the domain are as its most extreme ones
LEAST_LOG_VARIANCE = -2.0  # of what the judge says: nothing is certain
LARGEST_VIEW_SIDE = 16  # of maps of observed views, which are kept for all images of a training
SMALLEST_EMBEDDED = 64  # pixels; AlexNet has nothing left of much smaller images

EmbeddingNetwork = Literal["vgg", "alex"]


class Judgement(NamedTuple):
    """What a judge says of noisy samples, place by place.

    Attributes:
        odds: `[B, h, w]`, log p(clean | x_t) - log p(rendered | x_t); None if it does not know renders.
        mean: `[B, K, h, w]`, of the components of what an image shows (`PriorDenoiser.describe`).
        log_variance: `[B, K, 1, 1]`, of the components given the noisy sample.
    """

    odds: Tensor | None
    mean: Tensor
    log_variance: Tensor

    def log_likelihood(self, components: Float[Tensor, "batch components"]) -> Float[Tensor, "batch components h w"]:
        """log p(components | x_t) of normal distributions, up to a constant."""
        error = (components[:, :, None, None] - self.mean.float()).square()
        log_variance = self.log_variance.float()
        return -0.5 * (error * torch.exp(-log_variance) + log_variance)


class Whitening(nn.Module):
    """Rows of numbers to their principal components, each with mean 0 and variance 1 in the rows it was fitted to.

    Args:
        dim: of the rows.
        count: components.
    """

    mean: Tensor
    components: Tensor

    def __init__(self, dim: int, count: int) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(dim))
        self.register_buffer("components", torch.zeros(count, dim))

    def fit(self, rows: Float[Tensor, "rows dim"]) -> None:
        """Finds them; directions that hardly vary become zeros."""
        rows = rows.to(self.mean.device).double()
        centred = rows - rows.mean(0)
        squares, directions = principal_components(centred, len(self.components))
        variances = squares[:, None] / len(rows)
        known = variances > LEAST_SHARE * variances[0]  # few rows span few directions
        self.components.copy_(torch.where(known, directions / variances.clamp(min=1e-12).sqrt(), 0.0))
        self.mean.copy_(rows.mean(0))

    def forward(self, rows: Float[Tensor, "batch dim"]) -> Float[Tensor, "batch count"]:
        return (rows - self.mean) @ self.components.T


def colour_moments(images: Float[Tensor, "batch 3 height width"]) -> Float[Tensor, "batch 9"]:
    """Means, variances and covariances of the colours in images, after 2 x 2 pixels were averaged."""
    colours = F.avg_pool2d(images.float(), 2).flatten(2)
    mean = colours.mean(2)
    centred = colours - mean[:, :, None]
    covariance = centred @ centred.mT / colours.shape[2]
    rows, columns = torch.triu_indices(3, 3)
    return torch.cat([mean, covariance[:, rows, columns]], dim=1)


class PriorDenoiser(ModelMixin, ConfigMixin):
    """A U-Net on images or their features, conditioned on an embedding of an image.

    A small network beside it, the judge, tells of noisy images what their embedding and colours are. One that knows
    renders is conditioned on where an image is from, too, and its judge tells that as well.

    Args:
        image_size: side of the images in pixels; samples must be divisible by `patch_size * 2 ** (len(channels) - 1)`.
        embedding_dim: size of the embedding.
        channels: widths at each resolution, finest first.
        attention: where self-attention is used; the lowest resolution always has it in the middle.
        layers: residual layers per resolution.
        head_dim: channels per attention head.
        patch_size: side of the patches that the U-Net sees as one place.
        space: what it diffuses.
        knows_renders: it learns to tell renders from clean images; without, `origin` changes nothing.
        judge_width: channels of the judge.
        judged_components: principal components of embeddings that the judge tells, at most as many as these have.
        bev_classes: how many classes the scenes' semantic maps have (the largest id + 1); 0 for a prior without maps.
        view_channels: of `observed_maps`; 0 for a prior that observes nothing.
    """

    config_name = "config.json"

    @register_to_config
    def __init__(
        self,
        image_size: int = 64,
        embedding_dim: int = 1472,
        channels: tuple[int, ...] = (32, 64, 96, 128),
        attention: tuple[bool, ...] = (False, False, True, True),
        layers: int = 1,
        head_dim: int = 32,
        patch_size: int = 1,
        space: Space = "pixels",
        knows_renders: bool = False,
        judge_width: int = 128,
        judged_components: int = 64,
        bev_classes: int = 0,
        view_channels: int = 0,
    ) -> None:
        super().__init__()
        sample_channels, size = space_shape(space, image_size)
        if size % (patch_size * 2 ** (len(channels) - 1)) or (space == "features" and image_size % REDUCTION):
            what = f"images of {image_size} pixels" if size == image_size else f"features of {image_size} pixels"
            patches = "" if patch_size == 1 else f"cut into patches of {patch_size} and "
            raise ValueError(f"{what} cannot be {patches}halved {len(channels) - 1} times")
        self.embedding = Normaliser(embedding_dim)
        self.origin = nn.Embedding(3, embedding_dim, padding_idx=UNKNOWN) if knows_renders else None
        count = min(judged_components, embedding_dim)
        self.judged_embedding = Whitening(embedding_dim, count)
        self.judged_colours = Whitening(COLOUR_MOMENTS, COLOUR_MOMENTS)
        self.judge = Judge(sample_channels, judge_width, count + COLOUR_MOMENTS, knows_renders)
        self.map_encoder = SeenMapEncoder(bev_classes) if bev_classes else None
        self.view_encoder = ObservedViewEncoder(view_channels) if view_channels else None
        told = MAP_FEATURES * bool(bev_classes) + VIEW_FEATURES * bool(view_channels)
        self.unet = UNet2DConditionModel(
            sample_size=size // patch_size,
            in_channels=sample_channels * patch_size**2 + told,
            out_channels=sample_channels * patch_size**2,
            block_out_channels=tuple(channels),
            down_block_types=tuple("AttnDownBlock2D" if flag else "DownBlock2D" for flag in attention),
            mid_block_type="UNetMidBlock2D",
            up_block_types=tuple("AttnUpBlock2D" if flag else "UpBlock2D" for flag in reversed(attention)),
            layers_per_block=layers,
            attention_head_dim=head_dim,
            norm_num_groups=8,
            class_embed_type="projection",
            projection_class_embeddings_input_dim=embedding_dim,
            resnet_time_scale_shift="scale_shift",
        )

    @property
    def sample_shape(self) -> tuple[int, int, int]:
        channels, size = space_shape(self.config.space, self.config.image_size)
        return channels, size, size

    @property
    def view_side(self) -> int:
        """Of the maps that it sees of observed views; larger samples see them interpolated."""
        return min(self.sample_shape[-1] // self.config.patch_size, LARGEST_VIEW_SIDE)

    def fit(self, embeddings: Float[Tensor, "images dim"], moments: Float[Tensor, "images 9"]) -> None:
        """Takes on the statistics of embeddings and `colour_moments`."""
        self.embedding.fit(embeddings)
        self.judged_embedding.fit(self.embedding(embeddings.to(self.embedding.mean)))
        self.judged_colours.fit(moments)

    def describe(
        self, embedding: Float[Tensor, "batch dim"], moments: Float[Tensor, "batch 9"]
    ) -> Float[Tensor, "batch components"]:
        """What the judge tells of images: whitened components of their embedding, then of their colours' moments."""
        parts = [self.judged_embedding(self.embedding(embedding)), self.judged_colours(moments)]
        return torch.cat(parts, dim=1).clamp(-LARGEST_COMPONENT, LARGEST_COMPONENT)

    def forward(
        self,
        sample: Float[Tensor, "batch channels size size"],
        timestep: Int[Tensor, " batch"],
        embedding: Float[Tensor, "batch dim"],
        drop: Bool[Tensor, " batch"] | None = None,
        origin: Int[Tensor, " batch"] | None = None,
        judge: bool = False,
        seen: SeenMaps | None = None,
        views: Float[Tensor, "batch view_channels side side"] | None = None,
    ) -> Any:
        """Predicts from noisy samples.

        Args:
            embedding: in its own units.
            drop: images that are to be predicted without their embedding: with the mean embedding, as those of scene
                codes (`CoarseDenoiser`).
            origin: CLEAN, RENDERED or UNKNOWN; by default the last.
            judge: also returns what `judge` says.
            seen: what the images see of their scenes' maps; None for scenes without.
            views: `observed_maps` of the images' poses; zeros, or None for all of them, where nothing was observed.

        Raises:
            ValueError: if maps, or what was observed, are given to a prior without.
        """
        if seen is not None and self.map_encoder is None:
            raise ValueError("this prior was trained without maps")
        if views is not None and self.view_encoder is None:
            raise ValueError("this prior was trained without observed views")
        code = self.embedding(embedding)
        if drop is not None:
            code = code.masked_fill(drop[:, None], 0.0)
        if self.origin is not None and origin is not None:
            code = code + self.origin(origin)
        patches = F.pixel_unshuffle(sample, self.config.patch_size)
        if self.map_encoder is not None:
            patches = torch.cat([patches, self.map_encoder(seen, patches)], dim=1)
        if self.view_encoder is not None:
            patches = torch.cat([patches, self.view_encoder(views, patches)], dim=1)
        predicted = F.pixel_shuffle(
            self.unet(patches, timestep, None, class_labels=code).sample, self.config.patch_size
        )
        return (predicted, self.judge(sample, timestep)) if judge else predicted


class Judge(nn.Module):
    """Tells of noisy samples, place by place, what their image shows, and whether it is clean or rendered.

    Args:
        in_channels: of noisy samples.
        width: of its layers.
        components: of what images show.
        knows_renders: it tells where images are from.
    """

    def __init__(self, in_channels: int, width: int, components: int, knows_renders: bool) -> None:
        super().__init__()
        self.num_components = components
        self.first = nn.Conv2d(in_channels, width, 1)
        self.time = nn.Sequential(nn.Linear(TIME_DIM, width), nn.SiLU(), nn.Linear(width, width))
        self.layers = nn.ModuleList(
            nn.Sequential(nn.GroupNorm(8, width), nn.SiLU(), nn.Conv2d(width, width, 3, padding=1)) for _ in range(3)
        )
        self.odds = nn.Sequential(nn.GroupNorm(8, width), nn.SiLU(), nn.Conv2d(width, 1, 1)) if knows_renders else None
        self.mean = nn.Sequential(nn.GroupNorm(8, width), nn.SiLU(), nn.Conv2d(width, components, 1))
        self.log_variance = nn.Sequential(nn.Linear(TIME_DIM, TIME_DIM), nn.SiLU(), nn.Linear(TIME_DIM, components))

    def forward(self, sample: Float[Tensor, "batch channels size size"], timestep: Int[Tensor, " batch"]) -> Judgement:
        time = get_timestep_embedding(timestep, TIME_DIM)
        hidden = self.first(sample) + self.time(time)[:, :, None, None]
        for layer in self.layers:
            hidden = hidden + layer(hidden)
        log_variance = self.log_variance(time)[:, :, None, None].clamp(min=LEAST_LOG_VARIANCE)
        return Judgement(None if self.odds is None else self.odds(hidden)[:, 0], self.mean(hidden), log_variance)


class ImageEmbedder(nn.Module):
    """Images to the means of the activations of all levels of the frozen network of LPIPS.

    Args:
        network: "vgg" (1472 numbers) or "alex" (1152, quicker).
        size: side in pixels at which images are looked at; at least 64 in any case.

    Raises:
        UserInputError: if the network's weights are not on this machine.
    """

    def __init__(self, network: EmbeddingNetwork, size: int) -> None:
        super().__init__()
        self.network, self.size = network, max(size, SMALLEST_EMBEDDED)
        self.perceptual = PerceptualNetwork(load_lpips(network)).requires_grad_(False).eval()

    @property
    def dim(self) -> int:
        return sum(self.perceptual.channels)

    @torch.no_grad()
    def forward(self, images: Float[Tensor, "batch 3 height width"]) -> Float[Tensor, "batch dim"]:
        """Embeddings of square images in [0, 1]."""
        parts = []
        for chunk in images.split(EMBEDDED_AT_ONCE):
            levels = self.perceptual.features(2 * resize_square(chunk.float().clamp(0, 1), self.size) - 1)
            parts.append(torch.cat([level.mean((2, 3)) for level in levels], dim=1))
        return torch.cat(parts)


class DomainPrior(ImagePrior):
    """A trained `PriorDenoiser` with what it needs.

    Args:
        denoiser: of images or their features.
        space: that it diffuses.
        scheduler: the noise it was trained with.
        embedder: makes its conditions.
        clean_embeddings: `[K, E]`, of images of its collection: what a refined scene is to look like by default.
        maps: that it was trained with; None if it knows none.
        stage1: that lifted the observed views it was trained with; None if it observes none.
    """

    clean_embeddings: Tensor

    def __init__(
        self,
        denoiser: PriorDenoiser,
        space: PixelSpace | FeatureSpace,
        scheduler: DDPMScheduler,
        embedder: ImageEmbedder,
        clean_embeddings: Float[Tensor, "images dim"],
        maps: MapDescription | None = None,
        stage1: SceneAutoencoder | None = None,
    ) -> None:
        super().__init__(denoiser.config.image_size, scheduler.alphas_cumprod, scheduler.config.prediction_type)
        self.denoiser, self.space, self.embedder, self.maps = denoiser, space, embedder, maps
        self.stage1, self.observes = stage1, stage1 is not None
        self.register_buffer("clean_embeddings", clean_embeddings, persistent=False)
        self.eval().requires_grad_(False)

    def encode(self, images: Tensor) -> Tensor:
        return self.space(images)

    def decode(self, encoded: Tensor) -> Tensor | None:
        return (encoded + 1) / 2 if isinstance(self.space, PixelSpace) else None

    def condition(self, images: Tensor | None = None, text: str | None = None) -> Condition:
        if text is not None or images is None:
            raise UserInputError(
                "This prior knows the images of one domain and no words: give an image or a folder of images as style."
            )
        return self._exact(images, CLEAN)

    def render_condition(self, images: Tensor) -> Condition:
        return self._exact(images, RENDERED)

    def clean_condition(self) -> Condition:
        """Of the images of its collection that it keeps embeddings of: examples of how clean images look."""
        return self._condition(self.clean_embeddings, CLEAN)

    def unconditional(self) -> Condition:
        return self._condition(self.denoiser.embedding.mean[None], UNKNOWN)

    def denoise(self, noisy: Tensor, timestep: Tensor, condition: Condition) -> Tensor:
        told = {name: condition.get(name) for name in ("seen", "views")}
        return self.denoiser(noisy, timestep, condition["embedding"], origin=condition["origin"], **told)

    def observing(self, views: Views) -> Callable[[Cameras], Condition]:
        assert self.stage1 is not None
        stage1, side = self.stage1, self.denoiser.view_side
        with torch.no_grad():
            grid = stage1.encode(views.to(self.device))
        return lambda cameras: {"views": observed_maps(stage1, grid, index_cameras(cameras, 0), side)}

    def contrast(
        self, noisy: Tensor, timestep: Tensor, condition: Condition, opposite: Condition
    ) -> Float[Tensor, "batch channels size size"] | None:
        """What its judge says, by Bayes' rule: -sigma times the gradient of log p(y | x_t) - log p(y' | x_t).

        The scores of two conditions differ by little, and the errors of two denoisings by much. Where y is of clean
        images and y' of renders, y and y' are these; where y is a style, they are what the images show, too.
        What the judge says of the places of an image is added up, as if they were independent. None for conditions
        that it cannot tell apart.

        What it says of colours moves the mean colours alone: pulled back through a network's other features, "darker"
        becomes "greener".
        """
        origins = bool((condition["origin"] == CLEAN).all() and (opposite["origin"] == RENDERED).all())
        origins = origins and self.denoiser.config.knows_renders
        style = bool(condition["exact"].all())
        if not (origins or style):
            return None
        with torch.enable_grad():
            sample = noisy.detach().requires_grad_()
            judgement = self.denoiser.judge(sample, timestep)
            evidence = judgement.odds.sum() if origins else sample.new_zeros(())
            if style:
                told = judgement.log_likelihood(condition["shown"])
                if bool(opposite["exact"].all()):
                    told = told - judgement.log_likelihood(opposite["shown"])
                evidence = evidence + told[:, :-COLOUR_MOMENTS].sum()
                (by_colours,) = torch.autograd.grad(told[:, -COLOUR_MOMENTS:].sum(), sample, retain_graph=True)
            (gradient,) = torch.autograd.grad(evidence, sample)
        if style:
            moved = torch.arange(sample.shape[1], device=sample.device) < MEAN_COLOURS
            gradient = gradient + COLOUR_WEIGHT * moved[:, None, None] * by_colours
        return -self.signal_and_noise(timestep)[1] * gradient

    def _exact(self, images: Float[Tensor, "rows 3 height width"], origin: int) -> Condition:
        """Of images that are meant themselves, not others of their kind."""
        images = resize_square(images.to(self.device).float(), self.image_size).clamp(0, 1)
        embedding = self.embedder(images)
        return self._condition(embedding, origin, self.denoiser.describe(embedding, colour_moments(images)))

    def _condition(
        self, embedding: Float[Tensor, "rows dim"], origin: int, shown: Float[Tensor, "rows components"] | None = None
    ) -> Condition:
        """`shown`: what the judge is to tell; by default nothing."""
        exact, count = shown is not None, len(embedding)
        nothing = embedding.new_zeros(count, self.denoiser.judge.num_components)
        return {
            "embedding": embedding,
            "origin": torch.full((count,), origin, device=self.device),
            "shown": nothing if shown is None else shown,
            "exact": torch.full((count,), exact, device=self.device),
        }


@dataclass
class PriorDescription:
    """`prior.json`.

    Attributes:
        embedding: the network of LPIPS whose activations are the embedding.
        made_by: collection, licence, steps: whatever its maker wrote down.
        maps: that it knows.
    """

    embedding: EmbeddingNetwork
    made_by: dict[str, Any] = field(default_factory=dict)
    maps: MapDescription | None = None


def save_domain_prior(
    folder: Path,
    denoiser: PriorDenoiser,
    space: PixelSpace | FeatureSpace,
    scheduler: DDPMScheduler,
    clean_embeddings: Float[Tensor, "images dim"],
    description: PriorDescription,
    stage1: SceneAutoencoder | None = None,
) -> None:
    """Writes a prior in half precision, whole or not at all; an existing folder is replaced."""
    with atomic_path(folder) as temporary:
        (temporary / DENOISER).mkdir(parents=True)
        denoiser.save_config(temporary / DENOISER)
        state = {name: value.detach().cpu().half().contiguous() for name, value in denoiser.state_dict().items()}
        save_file(state, temporary / DENOISER / WEIGHTS)
        if isinstance(space, FeatureSpace):
            save_file({k: v.cpu().contiguous() for k, v in space.statistics().items()}, temporary / SPACE)
        scheduler.save_config(temporary / SCHEDULER)
        if stage1 is not None:
            stage1.save_pretrained(temporary / STAGE1)
        save_file({"embeddings": clean_embeddings.cpu().half().contiguous()}, temporary / EMBEDDINGS)
        content: dict[str, Any] = {"format": FORMAT, "version": VERSION, "embedding": description.embedding}
        if description.maps is not None:
            content["maps"] = description.maps.to_json()
        write_json(temporary / DESCRIPTION, {**content, "made_by": description.made_by})


class _MapsEntry(Checked):
    classes: Annotated[list[BevClassEntry], Field(min_length=1)]
    size: tuple[Annotated[int, Field(ge=1, le=2**14)], Annotated[int, Field(ge=1, le=2**14)]]
    reach: Positive


class _PriorFile(Checked):
    """`prior.json`; further keys of `made_by` are for people."""

    embedding: EmbeddingNetwork
    maps: _MapsEntry | None = None
    made_by: dict[str, Any] | None = None


def _maps(folder: Path, bev_classes: int, told: _PriorFile) -> MapDescription | None:
    """What a prior's description says of its maps, which must be those of its denoiser."""
    if not bev_classes:
        return None
    if told.maps is None or max(entry.id for entry in told.maps.classes) + 1 != bev_classes:
        raise UserInputError(f"{folder / DESCRIPTION} names other maps than its denoiser knows: train it again.")
    return MapDescription.from_json(told.maps.model_dump())


def load_domain_prior(folder: Path | str) -> DomainPrior:
    """A prior of `nfldm-train-prior`, on the CPU, in single precision.

    Args:
        folder: the prior, or the run that made it.

    Raises:
        UserInputError: if a file is missing, damaged or does not fit the others, or the network of its embeddings is
            not on this machine.
    """
    folder = Path(folder)
    if not (folder / DESCRIPTION).is_file() and (folder / "prior" / DESCRIPTION).is_file():
        folder = folder / "prior"
    description = read_json(folder / DESCRIPTION)
    known = isinstance(description, dict) and description.get("embedding") in ("vgg", "alex")
    if not known or (description.get("format"), description.get("version")) != (FORMAT, VERSION):
        raise UserInputError(f"{folder / DESCRIPTION} is not of format {FORMAT}, version {VERSION}: train it again.")
    told = validated_json(_PriorFile, description, folder / DESCRIPTION, "train it again")
    config, weights = folder / DENOISER / "config.json", folder / DENOISER / WEIGHTS
    state = {name: value.float() for name, value in read_safetensors(weights).items()}
    denoiser = build_model(PriorDenoiser, read_json(config), config, state, weights)
    scheduler = read_scheduler(DDPMScheduler, folder / SCHEDULER / "scheduler_config.json")
    maps = _maps(folder, denoiser.config.bev_classes, told)
    embeddings = read_safetensors(folder / EMBEDDINGS).get("embeddings")
    if embeddings is None or embeddings.ndim != 2 or embeddings.shape[1] != denoiser.config.embedding_dim:
        raise UserInputError(f"{folder / EMBEDDINGS} does not fit the prior's denoiser: train it again.")
    embedder = ImageEmbedder(description["embedding"], denoiser.config.image_size)
    if embedder.dim != denoiser.config.embedding_dim:
        raise UserInputError(f"{folder / DESCRIPTION} names another embedding than its denoiser has: train it again.")
    space = make_space(denoiser.config.space, denoiser.config.image_size)
    if isinstance(space, FeatureSpace):
        network = {name: value for name, value in space.state_dict().items() if name.startswith("network.")}
        load_exactly(space, {**network, **read_safetensors(folder / SPACE)}, folder / SPACE)
    stage1 = _stage1(folder, denoiser.config.view_channels)
    return DomainPrior(denoiser, space, scheduler, embedder, embeddings.float(), maps, stage1)


def _stage1(folder: Path, view_channels: int) -> SceneAutoencoder | None:
    """What a prior lifts observed views with, which must be what its denoiser has learned from."""
    if not view_channels:
        return None
    stage1 = load_scene_autoencoder(folder / STAGE1)
    if map_channels(stage1) != view_channels:
        raise UserInputError(f"{folder / STAGE1} is another stage 1 than its denoiser knows: train it again.")
    return stage1
