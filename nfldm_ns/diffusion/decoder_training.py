"""Tunes the image decoder of stage 1, and if wanted the decoder of stage 2, on generated voxels; or the former alone on
voxels as they were encoded. All else stays."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from jaxtyping import Float
from nerfstudio.cameras.cameras import Cameras
from torch import Tensor, nn

from nfldm_ns.autoencoder.checkpoints import FOLDER, write_scene_autoencoder
from nfldm_ns.autoencoder.decoder import ImageDecoder
from nfldm_ns.autoencoder.discriminator import ProjectedDiscriminator, discriminator_loss, generator_loss
from nfldm_ns.autoencoder.losses import depth_loss
from nfldm_ns.autoencoder.perceptual import PERCEPTUAL_CHANNELS, PerceptualNetwork
from nfldm_ns.autoencoder.renderer import FeatureMaps
from nfldm_ns.autoencoder.scene_autoencoder import SceneAutoencoder, decode_images
from nfldm_ns.autoencoder.scene_sampler import SceneCache
from nfldm_ns.diffusion.decoder_examples import (
    DecoderExamples,
    EncodedVoxels,
    ExampleConfig,
    GeneratedVoxels,
    Neighbours,
    VoxelSource,
    require_same_places,
    require_same_voxels,
)
from nfldm_ns.diffusion.pipeline import NFLDMPipeline, save_without_origin
from nfldm_ns.errors import UserInputError
from nfldm_ns.latents.latent_autoencoder import LatentAutoencoder
from nfldm_ns.latents.scene_latents import SceneLatents
from nfldm_ns.latents.voxel_store import VoxelStore
from nfldm_ns.metrics.consistency import reproject
from nfldm_ns.reports.galleries import image_grid
from nfldm_ns.scenes.collection import SceneCollection
from nfldm_ns.scenes.views import Views, with_poses
from nfldm_ns.scenes.writing import clear_unfinished
from nfldm_ns.training.loop import ProgressCallback, keep_result, moving_averages, train
from nfldm_ns.training.run import RunFolder
from nfldm_ns.training.schedule import Schedule, batch_share, joint_batch_size, new_accelerator
from nfldm_ns.training.trackers import Pictures

EXAMPLES_FOLDER = "examples"
PIPELINE_FOLDER = "pipeline"
NUM_PICTURES = 4


@dataclass
class DecoderLossConfig:
    """Weights of the losses."""

    rgb_mult: float = 1.0
    """|i - i_hat| of images of V after its own latents, or as it was encoded."""
    lpips_mult: float = 1.0
    """Their perceptual distance."""
    denoised_lpips_mult: float = 0.3
    """Perceptual distance of images of denoised V, times 1 - t at the share t of the schedule: the noisier the latents
    were, the less is the scene still the real one."""
    adversarial_mult: float = 0.1
    """Of the loss that the projected discriminator gives all of them; 0 trains without one."""
    adversarial_levels: tuple[int, ...] = (1, 2, 3, 4)
    """Levels of the perceptual network that it looks at, 0 the finest; coarse ones see how rooms hang together."""
    consistency_mult: float = 0.0
    """Of the mean difference between images of denoised (or encoded) V from a camera and from one a step beside it,
    where both see the same surface; 0 makes no such images. What swims from view to view costs, what is sharp and stays
    does not."""
    depth_mult: float = 0.05
    """Squared error (m^2) of the depth of V after its own latents, where the latent decoder is tuned, too: what a
    discriminator makes of single views must not bend the room."""

    window: int | None = None
    """Side in pixels of a square of every image, drawn anew in each step, that the perceptual network looks at, and the
    discriminator with it: an upsampler's detail is small, and windows cost less than whole images. None: all of it."""

    @property
    def needs_perceptual_network(self) -> bool:
        """Whether a loss looks at its features."""
        return bool(self.lpips_mult or self.denoised_lpips_mult or self.adversarial_mult)


@dataclass
class DecoderTrainingConfig:
    """Tuning of the image decoder."""

    schedule: Schedule = field(default_factory=Schedule)
    losses: DecoderLossConfig = field(default_factory=DecoderLossConfig)
    examples: ExampleConfig = field(default_factory=ExampleConfig)
    num_views: int = 2
    """Views of an example that a step looks at."""
    discriminator_rate: float = 2.0
    """Learning rate of the discriminator, as a multiple of the decoder's."""
    ema_decay: float = 0.999
    """Of the moving averages of the weights, which are what is kept."""
    tune_latent_decoder: bool = False
    """Also tune what stage 2 decodes latents with. Latents and codes stay as they are: the denoisers still fit."""
    decoder_blocks: int | None = None
    """Residual blocks per level that the image decoder grows to before it is tuned; None leaves it as it is."""
    upsampling_channels: int | None = None
    """Width of an `ImageUpsampler` behind the image decoder, which is the only part that is tuned then: images of the
    size before it stay as they are. None tunes what there is."""
    upsampling_detail: float = 1.0
    """How many times what such an upsampler learned to add counts in the result. What sharpens single views also swims
    between them; other values give other results of the same finished training."""


@dataclass
class DecoderBatch:
    """Views of some examples, B of them in all, each in all kinds.

    Attributes:
        features, accumulation: by kind, at the resolution of the rays.
        real: `[B]`, the real views of the same cameras.
        share: of the schedule, of each view.
        latents: by kind, of the S scenes, each with B / S views one after the other; none of encoded V.
        neighbours: of all B views of the last kind, where examples have them.
    """

    features: dict[str, Float[Tensor, "batch channels h w"]]
    accumulation: dict[str, Float[Tensor, "batch 1 h w"]]
    real: Views
    share: Float[Tensor, " batch"]
    latents: dict[str, SceneLatents]
    neighbours: Neighbours | None = None

    def real_by_scene(self) -> Views:
        """The real views as `[S, B / S]`."""
        latents = next(iter(self.latents.values()))
        return self.real[torch.arange(len(self.share)).view(latents.batch_size, -1)]


class LatentRendering(nn.Module):
    """From latents to what cameras see of V: stage 2's decoder, which is trained, and stage 1's frozen renderer."""

    def __init__(self, latent_autoencoder: LatentAutoencoder, scene_autoencoder: SceneAutoencoder) -> None:
        super().__init__()
        self.latent_autoencoder = latent_autoencoder
        self._renderer = (scene_autoencoder,)  # a tuple keeps its weights out of checkpoints

    def forward(
        self, latents: dict[str, SceneLatents], cameras: Cameras, beside: Cameras | None = None
    ) -> tuple[dict[str, FeatureMaps], FeatureMaps | None]:
        """Feature maps by kind, of cameras of batch shape `[S, M]`, and of denoised V of those beside them."""
        (renderer,) = self._renderer
        grids = {kind: self.latent_autoencoder.decode(codes) for kind, codes in latents.items()}
        maps = {kind: renderer.render_maps(grid, cameras) for kind, grid in grids.items()}
        return maps, None if beside is None else renderer.render_maps(grids["denoised"], beside)


class DecoderTuning(nn.Module):
    """The decoders and the discriminator beside them, and the losses of all.

    One backward pass of their sum trains them: the gradients of decoders and discriminator do not mix.

    Args:
        perceptual: frozen; not a part of this module's parameters.
        latent_rendering: where stage 2's decoder is tuned, too; else the examples' own feature maps are decoded.
    """

    def __init__(
        self,
        decoder: ImageDecoder,
        config: DecoderLossConfig,
        perceptual: PerceptualNetwork | None,
        latent_rendering: LatentRendering | None = None,
    ) -> None:
        super().__init__()
        if config.needs_perceptual_network and perceptual is None:
            raise ValueError("lpips_mult, denoised_lpips_mult or adversarial_mult is set, but no perceptual network")
        self.decoder = decoder
        self.latent_rendering = latent_rendering
        self.discriminator: ProjectedDiscriminator | None = None
        if config.adversarial_mult:
            self.discriminator = ProjectedDiscriminator([PERCEPTUAL_CHANNELS[i] for i in config.adversarial_levels])
        self.config = config
        self._perceptual = (perceptual,)  # a tuple keeps its weights out of checkpoints

    def decode(self, batch: DecoderBatch, kind: str) -> Float[Tensor, "batch 3 height width"]:
        """Images of one kind, in [0, 1] but not clamped."""
        return decode_images(self.decoder, batch.features[kind], batch.accumulation[kind], *batch.real.image_size)

    def render(self, batch: DecoderBatch) -> tuple[DecoderBatch, dict[str, Float[Tensor, ""]]]:
        """The batch with feature maps as a tuned decoder of stage 2 makes them now, and the loss of their depth."""
        if self.latent_rendering is None:
            return batch, {}
        real, beside = batch.real_by_scene(), None
        if batch.neighbours is not None:
            beside = with_poses(real.cameras, batch.neighbours.camera_to_worlds.unflatten(0, real.shape))
        maps, seen_beside = self.latent_rendering(batch.latents, real.cameras, beside)
        features = {kind: found.features.flatten(0, 1) for kind, found in maps.items()}
        accumulation = {kind: found.accumulation.flatten(0, 1) for kind, found in maps.items()}
        depth = maps["round_trip"].depth.new_zeros(())
        if real.depths is not None:
            depth = depth_loss(maps["round_trip"], real)
        losses = {"depth_loss": self.config.depth_mult * depth}
        neighbours = None
        if beside is not None and seen_beside is not None:
            neighbours = Neighbours.of_maps(beside, maps["denoised"], seen_beside)
        return replace(batch, features=features, accumulation=accumulation, neighbours=neighbours), losses

    def forward(self, batch: DecoderBatch) -> dict[str, Float[Tensor, ""]]:
        """Weighted losses by name, all means over the views."""
        batch, losses = self.render(batch)
        images = {kind: batch.real.covered(self.decode(batch, kind)) for kind in batch.features}
        paired, last = next(iter(images)), next(reversed(images))
        losses["rgb_loss"] = self.config.rgb_mult * F.l1_loss(images[paired], batch.real.images)
        if batch.neighbours is not None:
            losses["consistency_loss"] = self.config.consistency_mult * self._consistency(batch, images[last])
        (perceptual,) = self._perceptual
        if perceptual is None:
            return losses
        window = self._window(batch.real.image_size)
        real = perceptual.features(batch.real.images[window] * 2 - 1)
        seen = {kind: perceptual.features(image[window] * 2 - 1) for kind, image in images.items()}
        losses["lpips_loss"] = self.config.lpips_mult * perceptual.distance(seen[paired], real).mean()
        if "denoised" in seen:
            weight = self.config.denoised_lpips_mult * (1 - batch.share)
            losses["denoised_lpips_loss"] = (weight * perceptual.distance(seen["denoised"], real)).mean()
        if self.discriminator is not None:
            losses |= self._adversarial_losses(list(seen.values()), real)
        return losses

    def _window(self, size: tuple[int, int]) -> tuple[Any, ...]:
        """Where the perceptual network looks in images of a size."""
        if self.config.window is None:
            return (...,)
        sides = [min(self.config.window, side) for side in size]
        first = [int(torch.randint(whole - side + 1, ())) for whole, side in zip(size, sides, strict=True)]
        return (..., *(slice(start, start + side) for start, side in zip(first, sides, strict=True)))

    def _consistency(self, batch: DecoderBatch, images: Float[Tensor, "batch 3 height width"]) -> Float[Tensor, ""]:
        """Mean absolute difference of views moved into those beside them, over the pixels that both see."""
        assert batch.neighbours is not None
        beside = batch.neighbours
        height, width = size = batch.real.image_size
        depths = (beside.seen_depth.detach(), beside.depth.detach())  # colours have to agree, not what is moved away
        seen_depth, depth = (F.interpolate(depth, size, mode="bilinear") for depth in depths)
        cameras = with_poses(batch.real.cameras, beside.camera_to_worlds)
        moved, visible = reproject(Views(batch.real.cameras, images, seen_depth), cameras, depth)
        theirs = decode_images(self.decoder, beside.features, beside.accumulation, height, width)
        error = (moved - theirs).abs().mean(dim=1, keepdim=True)
        return torch.where(visible, error, 0).sum() / visible.sum().clamp(min=1)

    def _adversarial_losses(self, rendered: list[list[Tensor]], real: list[Tensor]) -> dict[str, Float[Tensor, ""]]:
        assert self.discriminator is not None
        levels = self.config.adversarial_levels
        fake = [torch.cat([kind[level] for kind in rendered]) for level in levels]
        return {
            "adversarial_loss": self.config.adversarial_mult * generator_loss(self.discriminator, fake),
            "discriminator_loss": discriminator_loss(self.discriminator, fake, [real[level] for level in levels]),
        }


class DecoderLosses:
    """Losses of one pass; which examples and views it sees depends on the seed and their places.

    Args:
        wrapped: the `DecoderTuning`, possibly wrapped for several processes.
    """

    def __init__(
        self, wrapped: nn.Module, examples: DecoderExamples, config: DecoderTrainingConfig, accelerator: Accelerator
    ) -> None:
        self.wrapped, self.examples, self.config = wrapped, examples, config
        self.device = accelerator.device
        self.share = batch_share(config.schedule, accelerator)

    def __call__(self, number: int) -> dict[str, Tensor]:
        return self.wrapped(self.batch(number))

    def batch(self, number: int) -> DecoderBatch:
        """What a pass looks at."""
        draws = self.share.draws(number)
        places = self.share.items(len(self.examples), number)

        def choose(item: int, count: int) -> Tensor:
            return draws.permutation(item, count)[: self.config.num_views]

        return load_batch(self.examples, places, choose, self.device)


def load_batch(
    examples: DecoderExamples, places: list[int], choose: Callable[[int, int], Tensor], device: torch.device | str
) -> DecoderBatch:
    """Views of examples.

    Args:
        choose: given the place of an example in the batch and the number of its views, which of them.
    """
    features: dict[str, list[Tensor]] = {kind: [] for kind in examples.config.kinds}
    accumulation: dict[str, list[Tensor]] = {kind: [] for kind in examples.config.kinds}
    latents: dict[str, list[SceneLatents]] = {}
    real, shares, neighbours = [], [], []
    for item, place in enumerate(places):
        example = examples.load(place)
        views = choose(item, len(example.views))
        for kind, seen in example.features.items():
            features[kind].append(seen[views])
            accumulation[kind].append(example.accumulation[kind][views])
        for kind, codes_of_scene in example.latents.items():
            latents.setdefault(kind, []).append(codes_of_scene)
        real.append(examples.real_views(place)[example.views[views]])
        shares.append(example.share.expand(len(views)))
        if example.neighbours is not None:
            neighbours.append(example.neighbours[views])
    joined, opacity = (
        {kind: torch.cat(parts).to(device) for kind, parts in group.items()} for group in (features, accumulation)
    )
    codes = {kind: SceneLatents.cat(parts).to(device) for kind, parts in latents.items()}
    beside = Neighbours.cat(neighbours).to(device) if neighbours else None
    return DecoderBatch(joined, opacity, Views.cat(real).to(device), torch.cat(shares).to(device), codes, beside)


def train_decoder(
    pipeline: NFLDMPipeline,
    store: VoxelStore,
    output_dir: Path | str,
    config: DecoderTrainingConfig,
    *,
    perceptual: PerceptualNetwork | None = None,
    collection: SceneCollection | None = None,
    cache_gib: float = 2.0,
    on_progress: ProgressCallback | None = None,
) -> NFLDMPipeline:
    """Tunes the image decoder of a pipeline, and if wanted stage 2's decoder, continuing an interrupted run.

    Args:
        pipeline: its decoders are changed in place, all else stays to the bit.
        store: scenes encoded by its stage 1; their collection must be where it was when they were encoded.
        output_dir: becomes a run folder (see `RunFolder`) with the examples in `examples/` and the result in
            `pipeline/`.
        perceptual: needed if the losses look at its features; moved to where it trains.
        collection: the same places with other views of the same cameras, such as larger ones, to compare with; by
            default the one that was encoded.

    Returns:
        the pipeline with the averaged weights of the tuned decoders, on the CPU.

    Raises:
        UserInputError: if the settings, the pipeline and the store do not fit together.
    """
    if config.examples.sampled_fine and pipeline.fine_denoiser is None:
        raise UserInputError("--sampled-fine is of generators that have f, which this one has not: leave it.")
    tuned_too = pipeline.latent_autoencoder if config.tune_latent_decoder else None
    require_same_voxels(store, pipeline.scene_autoencoder)
    source, height = GeneratedVoxels(pipeline), pipeline.scene_autoencoder.image_size[0]
    run, accelerator = _tune(
        source, store, output_dir, config, tuned_too, perceptual, collection, cache_gib, on_progress
    )
    enlarge_cameras(pipeline, pipeline.scene_autoencoder.image_size[0] / height)

    def save(path: Path) -> None:
        save_without_origin(pipeline, path)

    keep_result(run.root / PIPELINE_FOLDER, accelerator, save)
    return pipeline


def train_stage1_decoder(
    scene_autoencoder: SceneAutoencoder,
    store: VoxelStore,
    output_dir: Path | str,
    config: DecoderTrainingConfig,
    *,
    perceptual: PerceptualNetwork | None = None,
    collection: SceneCollection | None = None,
    cache_gib: float = 2.0,
    on_progress: ProgressCallback | None = None,
) -> SceneAutoencoder:
    """Tunes the image decoder of stage 1 on V as it was encoded, continuing an interrupted run.

    Args:
        scene_autoencoder: its image decoder is changed in place, all else stays to the bit.
        store: scenes that it encoded, with whatever image decoder; their collection must be where it was then.
        output_dir: becomes a run folder (see `RunFolder`) with the examples in `examples/` and the result in
            `scene_autoencoder/`.
        perceptual: needed if the losses look at its features; moved to where it trains.
        collection: the same places with other views of the same cameras, such as larger ones, to compare with; by
            default the one that was encoded.

    Returns:
        the scene auto-encoder with the averaged weights of the tuned decoder, on the CPU.

    Raises:
        UserInputError: if the settings, the scene auto-encoder and the store do not fit together.
        ValueError: if stage 2's decoder is to be tuned, too.
    """
    if config.tune_latent_decoder:
        raise ValueError("tune_latent_decoder is set, but encoded voxels come from no latents")
    require_same_voxels(store, scene_autoencoder, "the one given")
    source = EncodedVoxels(scene_autoencoder)
    run, accelerator = _tune(source, store, output_dir, config, None, perceptual, collection, cache_gib, on_progress)
    record = {
        "method": "nfldm-train-decoder",
        "data": store.description["collection"],
        "step": run.steps - 1,
        "scenes_per_step": joint_batch_size(config.schedule, accelerator),
        "device": str(accelerator.device),
        "seed": config.schedule.seed,
    }

    def save(path: Path) -> None:
        write_scene_autoencoder(scene_autoencoder, path, record)

    keep_result(run.root / FOLDER, accelerator, save)
    return scene_autoencoder


def _tune(
    source: VoxelSource,
    store: VoxelStore,
    output_dir: Path | str,
    config: DecoderTrainingConfig,
    latent_autoencoder: LatentAutoencoder | None,
    perceptual: PerceptualNetwork | None,
    collection: SceneCollection | None,
    cache_gib: float,
    on_progress: ProgressCallback | None,
) -> tuple[RunFolder, Accelerator]:
    """Makes examples and tunes on them; at the end the source's models, on the CPU, have the averaged weights.

    Args:
        latent_autoencoder: the source's, if its decoder is tuned, too.
    """
    output_dir = Path(output_dir)
    if not 0 <= config.upsampling_detail < float("inf"):
        raise UserInputError(
            f"--upsampling-detail is {config.upsampling_detail:g}: give a finite number of at least 0."
        )
    cache = SceneCache(collection or store.load_collection(), cache_gib)
    chosen = replace(config.examples, neighbours=bool(config.losses.consistency_mult), kinds=source.kinds)
    config = replace(config, examples=chosen)
    examples = DecoderExamples(output_dir / EXAMPLES_FOLDER, store, cache, config.examples)
    if collection is not None:
        require_same_places(store, collection)
    accelerator = new_accelerator(config.schedule, output_dir)
    torch.manual_seed(config.schedule.seed)
    stage1 = source.scene_autoencoder
    _grow(stage1, config)
    _require_size(stage1, examples, config)
    decoder = copy.deepcopy(stage1.decoder).float().requires_grad_(config.upsampling_channels is None)
    if decoder.upsampler is not None:
        height, width = stage1.encoded_size
        decoder.upsampler.requires_grad_(examples.cache.collection.image_size != (width, height))
    if perceptual is not None:
        perceptual.to(accelerator.device)
    rendering = None
    if latent_autoencoder is not None:
        rendering = _latent_rendering(latent_autoencoder, stage1, accelerator.device)
    model = DecoderTuning(decoder, config.losses, perceptual, rendering).to(accelerator.device)
    folder = RunFolder(output_dir, _identity(source, store, config, accelerator), accelerator)
    _make_examples(examples, source, accelerator, on_progress is not None)

    def make_losses(wrapped: nn.Module) -> DecoderLosses:
        return DecoderLosses(wrapped, examples, config, accelerator)

    ema = moving_averages(model, config.ema_decay)
    rates = {"decoder": 1.0} | ({} if model.discriminator is None else {"discriminator": config.discriminator_rate})
    rates |= {} if rendering is None else {"latent_rendering": 1.0}
    train(
        folder,
        model,
        make_losses,
        config.schedule,
        accelerator,
        rates=rates,
        ema=ema,
        render=DecoderPictures(model, examples, accelerator.device) if config.schedule.validation_steps else None,
        description="Image decoder" if rendering is None else "Both decoders",
        on_progress=on_progress,
    )
    ema.copy_to(model.parameters())
    stage1.decoder.load_state_dict(decoder.state_dict())
    if config.upsampling_channels is not None and stage1.decoder.upsampler is not None:
        stage1.decoder.upsampler.scale_detail(config.upsampling_detail)
    if rendering is not None and latent_autoencoder is not None:
        latent_autoencoder.load_state_dict(rendering.latent_autoencoder.state_dict())
    return folder, accelerator


class DecoderPictures:
    """A view of each of the first examples: real, and of each kind of V."""

    def __init__(self, model: DecoderTuning, examples: DecoderExamples, device: torch.device) -> None:
        self.model = model
        self.places = list(range(min(NUM_PICTURES, len(examples))))
        self.batch = load_batch(examples, self.places, lambda item, count: torch.zeros(1).long(), device)

    @torch.no_grad()
    def __call__(self) -> Pictures:
        """One picture with a row per example."""
        batch, _ = self.model.render(self.batch)
        shown = {kind.replace("_", " "): self.model.decode(batch, kind).clamp(0, 1) for kind in batch.features}
        names = [f"t = {share:.2f}" for share in self.batch.share.tolist()] if "denoised" in shown else []
        return {"decoder": image_grid({"real": self.batch.real.images, **shown}, names)}


def _grow(scene_autoencoder: SceneAutoencoder, config: DecoderTrainingConfig) -> None:
    sizes = (config.decoder_blocks, config.upsampling_channels)
    if sizes == (None, None):
        return
    try:
        scene_autoencoder.grow_decoder(*sizes)
    except ValueError as error:
        options = zip(("--decoder-blocks", "--upsampling-channels"), sizes, strict=True)
        named = " and ".join(f"{option} is {size}" for option, size in options if size is not None)
        raise UserInputError(f"{named}, but {error}: give at least as many, or nothing.") from None


def enlarge_cameras(pipeline: NFLDMPipeline, scale: float) -> None:
    """Has sampled scenes' cameras take images of so many times the size."""
    config = pipeline.global_denoiser.config
    size = tuple(round(scale * side) for side in config.image_size)
    pipeline.global_denoiser.register_to_config(
        image_size=size, intrinsics=tuple(scale * value for value in config.intrinsics)
    )


def _require_size(
    scene_autoencoder: SceneAutoencoder, examples: DecoderExamples, config: DecoderTrainingConfig
) -> None:
    """Raises `UserInputError` where an upsampler is to be tuned, but the real views are no larger than without it."""
    collection, (height, width) = examples.cache.collection, scene_autoencoder.image_size
    if config.upsampling_channels is not None and collection.image_size != (width, height):
        have = " x ".join(map(str, collection.image_size))
        raise UserInputError(
            f"--upsampling-channels makes images of {width} x {height} pixels, but those of {collection.root} have "
            f"{have}: give the same places at that size with --data."
        )


def _latent_rendering(
    latent_autoencoder: LatentAutoencoder, scene_autoencoder: SceneAutoencoder, device: torch.device
) -> LatentRendering:
    """Copies of what is trained and what renders it, in single precision; all but stage 2's decoder is frozen."""
    latent_autoencoder = copy.deepcopy(latent_autoencoder).float().requires_grad_(True)
    latent_autoencoder.freeze_encoding()
    renderer = copy.deepcopy(scene_autoencoder).float().requires_grad_(False)
    return LatentRendering(latent_autoencoder.to(memory_format=torch.channels_last), renderer.to(device))


def _make_examples(examples: DecoderExamples, source: VoxelSource, accelerator: Accelerator, silent: bool) -> None:
    """Each process makes a part of what is missing; afterwards the source's models leave the device."""
    if accelerator.is_main_process:
        clear_unfinished(examples.folder)
    accelerator.wait_for_everyone()
    source.to(accelerator.device)
    quiet = silent or not accelerator.is_main_process
    places = range(accelerator.process_index, len(examples), accelerator.num_processes)
    examples.make(source, places, (lambda share: None) if quiet else None)
    source.to("cpu")
    accelerator.wait_for_everyone()


def _identity(
    source: VoxelSource, store: VoxelStore, config: DecoderTrainingConfig, accelerator: Accelerator
) -> dict[str, Any]:
    """What a run is, without settings that have no say in it: runs that were begun before there were any know none."""
    losses, chosen = asdict(config.losses), asdict(config.examples)
    tuned: dict[str, Any] = {"tune_latent_decoder": True} if config.tune_latent_decoder else {}
    del chosen["kinds"]  # which are the source's
    if not config.examples.sampled_fine:
        del chosen["sampled_fine"]
    if not config.tune_latent_decoder:
        del losses["depth_mult"]
    if config.losses.window is None:
        del losses["window"]
    if config.upsampling_channels is not None:
        tuned |= {"upsampling_channels": config.upsampling_channels}
    if not config.losses.consistency_mult:
        del losses["consistency_mult"], chosen["neighbours"]
    if "denoised" not in source.kinds:
        del losses["denoised_lpips_mult"], chosen["max_noise"], chosen["num_inference_steps"]
    return {
        **source.identity(),
        **tuned,
        "voxels": {
            "scenes": store.splits["train"],
            "optimised": store.description.get("optimised"),
            "all_views": store.description.get("all_views", False),
        },
        "seed": config.schedule.seed,
        "batch_size": joint_batch_size(config.schedule, accelerator),
        "num_views": config.num_views,
        "discriminator_rate": config.discriminator_rate,
        "examples": chosen,
        "losses": losses,
    }
