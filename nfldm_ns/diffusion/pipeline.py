"""The trained generator: g, then c, then f, then V (paper, Sec. 3.3)."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import diffusers
import torch
from diffusers import DiffusionPipeline, SchedulerMixin
from diffusers.callbacks import MultiPipelineCallbacks, PipelineCallback
from diffusers.utils import BaseOutput
from diffusers.utils.torch_utils import randn_tensor
from jaxtyping import Float, Int, Shaped
from nerfstudio.cameras.cameras import Cameras
from pydantic import Field, PositiveInt
from torch import Tensor, nn

from nfldm_ns.autoencoder.checkpoints import WEIGHTS, read_weights, weights_name
from nfldm_ns.autoencoder.model_configs import build_model, read_scheduler, reason
from nfldm_ns.autoencoder.scene_autoencoder import SceneAutoencoder
from nfldm_ns.diffusion.bev import to_grid_order
from nfldm_ns.diffusion.call_checks import (
    check_count,
    check_factors,
    check_generator,
    check_sampled,
    check_scheduler,
    check_start,
    check_steps,
)
from nfldm_ns.diffusion.denoisers import CoarseDenoiser, FineDenoiser, GlobalDenoiser
from nfldm_ns.diffusion.flow import initial_scale, model_input, samples_flows
from nfldm_ns.diffusion.guiding import Guide, guided_prediction
from nfldm_ns.diffusion.inpainting import Inpainting, inpaint
from nfldm_ns.diffusion.trajectory import trajectory_to_cameras
from nfldm_ns.errors import UserInputError
from nfldm_ns.latents.latent_autoencoder import LatentAutoencoder
from nfldm_ns.latents.scene_latents import SceneLatents
from nfldm_ns.models import GENERATOR, resolve_model, shipped_models
from nfldm_ns.scenes.collection import BevClass, bev_class, read_json
from nfldm_ns.scenes.schema import BevClassEntry, Checked, Finite, validated_json
from nfldm_ns.scenes.voxel_grid import VoxelGrid
from nfldm_ns.scenes.writing import atomic_path, write_json
from nfldm_ns.training.identity import model_hash

STAGES = ("global", "coarse", "fine")
PIPELINE_INDEX = "model_index.json"
"""File of diffusers that a saved pipeline has."""
NUM_STEPS = 30
Generators = torch.Generator | Sequence[torch.Generator] | None
Steps = int | tuple[int, int, int]
"""Of each latent, or of g, c and f."""
StepCallback = Callable[["NFLDMPipeline", int, int, dict[str, Any]], dict[str, Any]]


@dataclass
class NFLDMPipelineOutput(BaseOutput):
    """Generated scenes.

    Attributes:
        grids: voxels of all scenes; None if only latents were asked for.
        latents: g, c and f before quantisation.
        cameras: sampled source cameras, batch shape `[B, N]`.
    """

    grids: VoxelGrid | None
    latents: SceneLatents
    cameras: Cameras


class NFLDMPipeline(DiffusionPipeline):
    """Samples scenes.

    Args:
        scene_autoencoder: stage 1; renders the scenes.
        latent_autoencoder: stage 2; turns latents into voxels.
        global_denoiser, coarse_denoiser, fine_denoiser: stage 3; the last is None where stage 2 has no f.
        scheduler: any scheduler of diffusers whose prediction type is that of the training; for denoisers that were
            trained for flows one of `FLOW_SCHEDULERS` (`flow.py`).
        temperatures: standard deviations of the initial noise of g, c and f that scenes are sampled with by default.
            Below 1 trades variety for quality; with a deterministic scheduler 0 gives the most typical sample. Briefly
            trained models want a low one for f, whose details they can hardly predict.
        contrasts: factors of how far sampled g, c and f lie from their mean. Reduced noise leaves them paler than those
            of training scenes; the ratio of the standard deviations of both makes up for it.
        bev_classes: id, name and color of each class of the semantic maps that the denoisers know, as `collection.json`
            has them; none for denoisers without maps.
        default_steps: denoising steps of each latent where none are asked for: what the scheduler was measured with, or
            the denoisers were distilled to.
    """

    _optional_components: ClassVar[list[str]] = ["fine_denoiser"]
    _callback_tensor_inputs = ("latents", "scene_code", "coarse")
    _stage = "global"
    _num_timesteps = 0
    _guidance_scale = 1.0
    _guide: Guide | None = None

    model_cpu_offload_seq = "global_denoiser->coarse_denoiser->fine_denoiser->latent_autoencoder->scene_autoencoder"

    def __init__(
        self,
        scene_autoencoder: SceneAutoencoder,
        latent_autoencoder: LatentAutoencoder,
        global_denoiser: GlobalDenoiser,
        coarse_denoiser: CoarseDenoiser,
        fine_denoiser: FineDenoiser,
        scheduler: SchedulerMixin,
        temperatures: Sequence = (1.0, 1.0, 1.0),  # diffusers' check of types knows plain classes only
        bev_classes: Sequence = (),
        default_steps: int = NUM_STEPS,
        contrasts: Sequence = (1.0, 1.0, 1.0),
    ) -> None:
        super().__init__()
        classes = [{**entry, "color": list(entry["color"])} for entry in bev_classes]
        self.register_to_config(
            temperatures=check_factors("temperatures", temperatures),
            bev_classes=classes,
            default_steps=check_count("default_steps", default_steps),
            contrasts=check_factors("contrasts", contrasts),
        )
        self.register_modules(
            scene_autoencoder=scene_autoencoder,
            latent_autoencoder=latent_autoencoder,
            global_denoiser=global_denoiser,
            coarse_denoiser=coarse_denoiser,
            fine_denoiser=fine_denoiser,
            scheduler=scheduler,
        )
        for decoder in (scene_autoencoder, latent_autoencoder):  # from_pretrained(torch_dtype=...) casts them, too
            decoder.float()
        for denoiser in (global_denoiser, coarse_denoiser, fine_denoiser):
            if denoiser is not None and _mixes_precisions(denoiser):  # half precision of files beside statistics
                denoiser.float()

    @property
    def components(self) -> dict[str, Any]:
        """What `NFLDMPipeline(**components)` makes the same pipeline of: the models, and what belongs to them."""
        return {
            **super().components,
            "temperatures": self.config.temperatures,
            "bev_classes": self.config.bev_classes,
            "default_steps": self.config.default_steps,
            "contrasts": self.config.contrasts,
        }

    def to(self, *args, dtype: torch.dtype | None = None, **kwargs) -> NFLDMPipeline:
        """Moves all models; the denoisers alone take another precision.

        Stages 1 and 2 stay in single precision, as other pipelines do with decoders that overflow: densities span more
        than half precision holds, and codes and statistics lose what tells them apart.
        """
        dtypes = [arg for arg in args if isinstance(arg, torch.dtype)]
        rest = [arg for arg in args if not isinstance(arg, torch.dtype)]
        if rest or kwargs:
            super().to(*rest, **kwargs)
        chosen = dtype or (dtypes[0] if dtypes else None)
        if chosen is not None:
            for denoiser in (self.global_denoiser, self.coarse_denoiser, self.fine_denoiser):
                if denoiser is not None:
                    denoiser.to(chosen)
        return self

    @property
    def dtype(self) -> torch.dtype:
        """Of the denoisers."""
        return self.coarse_denoiser.dtype  # type: ignore[return-value]

    @property
    def default_steps(self) -> int:
        """Denoising steps of each latent where none are asked for."""
        return int(self.config.default_steps)

    @property
    def bev_classes(self) -> tuple[BevClass, ...]:
        """Classes of the semantic maps that the denoisers know; none where they know no maps."""
        return tuple(bev_class(entry) for entry in self.config.bev_classes)

    @property
    def bev_size(self) -> tuple[int, int] | None:
        """(height, width) of these maps."""
        size = self.global_denoiser.config.bev_size
        return None if size is None else tuple(size)

    @property
    def outpaints(self) -> bool:
        """Whether the denoisers of c and f were trained to be told what is known already (`outpainting.py`)."""
        return bool(self.coarse_denoiser.config.known_share)

    def default_resamplings(self, otherwise: int) -> int:
        """How often inpainting walks each stretch of steps where no number is asked for.

        Args:
            otherwise: for denoisers that are no outpainters; these need to be walked once only.
        """
        return 1 if self.outpaints else otherwise

    @torch.no_grad()
    def __call__(
        self,
        num_scenes: int = 1,
        generator: Generators = None,
        num_inference_steps: int | Sequence[int] | None = None,
        output_type: str = "grid",
        clip: float | None = None,
        temperatures: Sequence[float] | None = None,
        contrasts: Sequence[float] | None = None,
        guidance_scale: float = 1.0,
        noise: Sequence[Tensor] | None = None,
        scene_code: Float[Tensor, "scenes code"] | None = None,
        inpainting: Inpainting | None = None,
        guide: Guide | None = None,
        bev: Shaped[Tensor, "*scenes height width"] | None = None,
        callback_on_step_end: StepCallback | None = None,
        callback_on_step_end_tensor_inputs: Sequence[str] = ("latents",),
        return_dict: bool = True,
    ) -> NFLDMPipelineOutput:
        """Samples `num_scenes` scenes.

        Args:
            generator: one for all, or one per scene; with one per scene a scene does not depend on the others.
            num_inference_steps: denoising steps of each of the three latents, one number for all or one each; None for
                the pipeline's own, see `default_steps`.
            output_type: "grid", or "latent" to skip decoding.
            clip: limits sampled latents to this many standard deviations; None leaves them alone.
            temperatures: of g, c and f, instead of the pipeline's own.
            contrasts: likewise; at other temperatures than the pipeline's own they are 1 by default. A scene that is
                begun from (`inpainting` of a strength below 1) or observed (`guide`) has its own contrast: then they
                are not applied.
            guidance_scale: how much the denoisers follow their conditions: 1 as trained, above 1 the more
                (classifier-free guidance, Ho & Salimans 2022). What they predict is moved away from what they predict
                without the scene code (psi_c and psi_f, if trained with `condition_dropout`) and without the map (all
                three, if there is one and they were trained with `bev_dropout`), both dropped at once. c, which
                guides psi_f, is never dropped. Needs denoisers trained with one of the two.
            noise: standard normal noise of g, c and f to begin with, instead of the generator's; see `draw_noise`.
            scene_code: g and the trajectory, in their own units, if they are given and c and f alone are sampled; c and
                f begin with the noise that they would begin with otherwise.
            inpainting: samples c and f in a region only and keeps those of a given scene elsewhere; then `scene_code`
                is that scene's. Outpainters are told what is kept.
            guide: changes what the denoisers predict at every step (`guiding.py`), such as `RenderingGuide` does for
                given images.
            bev: semantic maps from above, one for all scenes or one each: class ids, whole numbers, the north in the
                first row as in the files of collections. None samples without a map.
            callback_on_step_end: called as `callback(pipeline, step, timestep, kwargs)` after each step, as diffusers'
                pipelines do; `kwargs` holds what was asked for. What it returns under "latents" is gone on with.
                `pipeline.stage` tells which latent is sampled, `pipeline.num_timesteps` how many steps that takes.
            callback_on_step_end_tensor_inputs: names of what the callback gets: "latents" (noisy, in normalised units)
                and "scene_code" and "coarse", the conditions (None for a denoiser without them).
            return_dict: False gives a tuple of the output's attributes.

        Raises:
            ValueError: for arguments that make no sense.
            UserInputError: if the denoisers know no maps, or maps of another size or of other classes.
        """
        if isinstance(callback_on_step_end, (PipelineCallback, MultiPipelineCallbacks)):
            callback_on_step_end_tensor_inputs = callback_on_step_end.tensor_inputs
        steps = self._check_inputs(
            num_scenes, generator, num_inference_steps, output_type, callback_on_step_end_tensor_inputs
        )
        self.require_guidance(guidance_scale, with_map=bev is not None)
        maps = {} if bev is None else {"bev": self.prepare_maps(bev, num_scenes)}
        if inpainting is not None and scene_code is None:
            raise ValueError("inpainting needs the scene_code of the scene whose latents it keeps")
        chosen = self.config.temperatures if temperatures is None else check_factors("temperatures", temperatures)
        warmth = dict(zip(STAGES, chosen, strict=True))
        begun = guide is not None or (inpainting is not None and inpainting.strength < 1)
        contrast = dict(zip(STAGES, self._contrasts(chosen, contrasts, begun), strict=True))
        callback = None
        if callback_on_step_end is not None:
            callback = partial(_call, callback_on_step_end, tuple(callback_on_step_end_tensor_inputs))

        def begin(stage: str, denoiser: Any) -> Tensor:
            if noise is None:
                return self.prepare_noise(num_scenes, denoiser, generator)
            own = noise[STAGES.index(stage)]
            return own.to(self._execution_device, denoiser.dtype) * initial_scale(self.scheduler)

        def sample(stage: str, denoiser: Any, **conditions: Tensor) -> Tensor:
            start = begin(stage, denoiser) * warmth[stage]
            check_start(self.scheduler, start, stage)
            cast = {name: value.to(start.dtype) for name, value in conditions.items()} | maps
            run: Callable[..., Tensor] = self.denoise
            if inpainting is not None:
                if self.outpaints:
                    known, cells = inpainting.known(stage, num_scenes)
                    cast |= {"known": known.to(start), "known_cells": cells.to(start.device)}
                run = partial(inpaint, self, inpainting=inpainting, stage=stage, temperature=warmth[stage])
            with self.sampling(stage, guidance_scale, guide):
                latents = run(denoiser, start, steps[stage], generator, callback, **cast).float() * contrast[stage]
            check_sampled(self.scheduler, latents, stage)
            latents = latents if clip is None else latents.clamp(-clip, clip)
            normaliser = denoiser.code if stage == "global" else denoiser.latent
            latents = normaliser.inverse(latents)
            return latents if inpainting is None else inpainting.merge(stage, latents)

        if scene_code is None:
            scene_code = sample("global", self.global_denoiser)
        else:
            begin("global", self.global_denoiser)
        global_latent, trajectory = self.global_denoiser.split(scene_code)
        coarse = sample("coarse", self.coarse_denoiser, scene_code=scene_code)
        coarse = coarse.unflatten(1, self.latent_autoencoder.coarse_shape[:2])
        codes = self.latent_autoencoder.quantise_coarse(coarse)
        if self.fine_denoiser is None:
            fine = coarse.new_zeros(num_scenes, *self.latent_autoencoder.fine_shape)
        else:
            fine = sample("fine", self.fine_denoiser, scene_code=scene_code, coarse=codes)
        latents = SceneLatents(global_latent, coarse, fine)
        config = self.global_denoiser.config
        cameras = trajectory_to_cameras(
            trajectory, self.latent_autoencoder.aabb, tuple(config.intrinsics), tuple(config.image_size)
        )
        grids = self.latent_autoencoder.decode(latents) if output_type == "grid" else None
        self.maybe_free_model_hooks()
        if not return_dict:
            return grids, latents, cameras  # type: ignore[return-value]
        return NFLDMPipelineOutput(grids=grids, latents=latents, cameras=cameras)

    @contextmanager
    def sampling(self, stage: str, guidance_scale: float = 1.0, guide: Guide | None = None) -> Iterator[None]:
        """What the steps within are told: which latent they are of, and what guides them; afterwards nothing does."""
        self._stage, self._guidance_scale, self._guide = stage, guidance_scale, guide
        try:
            yield
        finally:
            self._guide = None

    @property
    def stage(self) -> str:
        """Which latent is sampled: "global", "coarse" or "fine"."""
        return self._stage

    @property
    def num_timesteps(self) -> int:
        """Steps that this takes."""
        return self._num_timesteps

    @property
    def guidance_scale(self) -> float:
        return self._guidance_scale

    def _check_inputs(
        self,
        num_scenes: int,
        generator: Generators,
        num_inference_steps: int | Sequence[int] | None,
        output_type: str,
        tensor_inputs: Sequence[str],
    ) -> dict[str, int]:
        """Steps by stage, if all arguments make sense."""
        if output_type not in ("grid", "latent"):
            raise ValueError(f"output_type must be 'grid' or 'latent', not {output_type!r}")
        check_count("num_scenes", num_scenes)
        check_generator(generator, num_scenes)
        steps = check_steps(self.default_steps if num_inference_steps is None else num_inference_steps)
        check_scheduler(self.scheduler, flow=self.coarse_denoiser.config.flow)
        unknown = [name for name in tensor_inputs if name not in self._callback_tensor_inputs]
        if unknown:
            raise ValueError(
                f"callback_on_step_end_tensor_inputs has to be in {self._callback_tensor_inputs}, but has {unknown}"
            )
        return dict(zip(STAGES, steps, strict=True))

    def _contrasts(
        self, temperatures: Sequence[float], contrasts: Sequence[float] | None, begun: bool
    ) -> Sequence[float]:
        if contrasts is not None:
            contrasts = check_factors("contrasts", contrasts)
        elif tuple(temperatures) == tuple(self.config.temperatures):
            contrasts = self.config.contrasts
        return (1.0, 1.0, 1.0) if begun or contrasts is None else contrasts

    def own_contrasts(self) -> dict[str, list[float]]:
        """Its contrasts for records of what depends on them; nothing where it has none, as in records before them."""
        contrasts = list(self.config.contrasts)
        return {} if contrasts == [1.0, 1.0, 1.0] else {"contrasts": contrasts}

    def provenance(self) -> dict[str, Any]:
        """What tells its scenes from those of others."""
        fine = None if self.fine_denoiser is None else model_hash(self.fine_denoiser)
        return {"fine_denoiser": fine, "scheduler": type(self.scheduler).__name__}

    def require_guidance(self, guidance_scale: float, with_map: bool = False) -> None:
        """Raises `ValueError` unless psi_c and psi_f can do without something that they see."""
        guided = [d for d in (self.coarse_denoiser, self.fine_denoiser) if d is not None]
        untrained = [d for d in guided if not d.config.condition_dropout and not (with_map and d.config.bev_dropout)]
        if guidance_scale != 1 and untrained:
            raise ValueError(
                f"guidance_scale {guidance_scale} needs denoisers trained with --condition-dropout"
                f"{' or --bev-dropout' if with_map else ''}, but {type(untrained[0]).__name__} always saw "
                f"{'both' if with_map else 'the scene code'}"
            )

    def prepare_maps(
        self, bev: Shaped[Tensor, "*scenes height width"], num_scenes: int
    ) -> Int[Tensor, "scenes height width"]:
        """Maps as a user gives them (north up, one or one per scene) as the denoisers want them.

        Raises:
            ValueError: for another number of maps, or numbers that are not whole.
            UserInputError: if the denoisers know no maps, or maps of another size or of other classes.
        """
        size, ids = self.bev_size, [c.id for c in self.bev_classes]
        if size is None:
            raise UserInputError(
                "The generator was trained without BEV maps: leave the map out, or train one with --condition bev."
            )
        if bev.is_floating_point() or bev.is_complex():
            raise ValueError(f"bev holds class ids, whole numbers, not {bev.dtype}")
        if tuple(bev.shape[-2:]) != size:
            raise UserInputError(
                f"A BEV map is {tuple(bev.shape[-2:])} (height, width), but those of the generator are {size}: resize "
                "it without smoothing."
            )
        unknown = sorted(set(bev.unique().tolist()) - set(ids))
        if unknown:
            raise UserInputError(
                f"A BEV map has the class {unknown[0]}, but the generator knows {ids}: repair the map."
            )
        if bev.ndim == 2:
            bev = bev[None]
        if bev.ndim != 3 or len(bev) not in (1, num_scenes):
            raise ValueError(f"bev is one map or one per scene, not {tuple(bev.shape)} for {num_scenes} scenes")
        return to_grid_order(bev).long().expand(num_scenes, -1, -1).to(self._execution_device)

    def prepare_noise(
        self, num_scenes: int, denoiser: nn.Module, generator: Generators
    ) -> Float[Tensor, " scenes *shape"]:
        """Initial noise for one denoiser, scaled as the scheduler wants it."""
        noise = randn_tensor(
            (num_scenes, *denoiser.sample_shape),  # type: ignore[misc]
            generator=_as_list(generator),
            device=self._execution_device,
            dtype=denoiser.dtype,  # type: ignore[arg-type]
        )
        return noise * initial_scale(self.scheduler)

    def draw_noise(self, num_scenes: int, generator: Generators) -> list[Float[Tensor, " scenes *shape"]]:
        """Standard normal noise of g, c and f, such as a call with this generator begins with.

        That is so for schedulers that add no noise on their way.
        """
        denoisers = [self.global_denoiser, self.coarse_denoiser, self.fine_denoiser]
        sigma = initial_scale(self.scheduler)
        return [self.prepare_noise(num_scenes, d, generator) / sigma for d in denoisers if d is not None]

    def denoise(
        self,
        denoiser: nn.Module,
        latents: Float[Tensor, " scenes *shape"],
        num_inference_steps: int,
        generator: Generators = None,
        callback: Callable[..., Tensor] | None = None,
        **conditions: Tensor,
    ) -> Float[Tensor, " scenes *shape"]:
        """Runs one denoiser from noise to a sample, in normalised units.

        Args:
            callback: called with the pipeline, the step, the timestep, the latents and the conditions; returns the
                latents to go on with.
        """
        self.scheduler.set_timesteps(num_inference_steps, device=latents.device)
        self._num_timesteps = len(self.scheduler.timesteps)
        with self.progress_bar(total=self._num_timesteps) as progress:
            for step, timestep in enumerate(self.scheduler.timesteps):
                latents = self.denoise_step(denoiser, latents, timestep, generator, conditions)
                if callback is not None:
                    latents = callback(self, step, timestep, latents, conditions)
                progress.update()
        return latents

    def denoise_step(
        self,
        denoiser: nn.Module,
        latents: Float[Tensor, " scenes *shape"],
        timestep: Tensor,
        generator: Generators,
        conditions: dict[str, Tensor],
    ) -> Float[Tensor, " scenes *shape"]:
        """One step of the scheduler."""
        batch_time = timestep.to(latents.device).expand(len(latents))

        def predict(noisy: Tensor) -> Tensor:
            return self._predict(denoiser, model_input(self.scheduler, noisy, timestep), batch_time, conditions)

        if self._guide is None:
            predicted = predict(latents)
        else:
            known = self._guide, self.scheduler, self._stage
            predicted = guided_prediction(*known, latents, timestep, predict, conditions)
        extra = self._step_arguments(generator)
        return self.scheduler.step(predicted, timestep, latents, **extra, return_dict=False)[0]

    def _predict(self, denoiser: nn.Module, latents: Tensor, timestep: Tensor, conditions: dict[str, Tensor]) -> Tensor:
        """The prediction, away from what it is without scene code and map where that is wanted."""
        predicted = denoiser(latents, timestep, **conditions)
        dropped = {}
        everywhere = torch.ones(len(latents), dtype=torch.bool, device=latents.device)
        if "scene_code" in conditions and denoiser.config.condition_dropout:  # type: ignore[union-attr]
            dropped["drop_code"] = everywhere
        if "bev" in conditions and denoiser.config.bev_dropout:  # type: ignore[union-attr]
            dropped["drop_bev"] = everywhere
        if not dropped or self._guidance_scale == 1:
            return predicted
        without = denoiser(latents, timestep, **conditions, **dropped)
        return without + self._guidance_scale * (predicted - without)

    def _step_arguments(self, generator: Generators) -> dict[str, Any]:
        accepts = "generator" in inspect.signature(self.scheduler.step).parameters
        if not accepts:
            return {}
        return {"generator": _as_list(generator)}


def _mixes_precisions(module: nn.Module) -> bool:
    tensors = (*module.parameters(), *module.buffers())
    return len({tensor.dtype for tensor in tensors if tensor.is_floating_point()}) > 1


def _as_list(generator: Generators) -> torch.Generator | list[torch.Generator] | None:
    return generator if generator is None or isinstance(generator, torch.Generator) else list(generator)


def _call(
    callback: StepCallback,
    names: tuple[str, ...],
    pipeline: NFLDMPipeline,
    step: int,
    timestep: Tensor,
    latents: Tensor,
    conditions: dict[str, Tensor],
) -> Tensor:
    """Calls a callback as diffusers' pipelines do; returns the latents to go on with."""
    known = {"latents": latents, **conditions}
    result = callback(pipeline, step, int(timestep), {name: known.get(name) for name in names})
    return latents if result is None else result.get("latents", latents)


def scene_generators(seed: int, num_scenes: int, device: torch.device | str = "cpu") -> list[torch.Generator]:
    """One generator per scene, seeded `seed`, `seed + 1`, ...: scene i is the same however many are sampled."""
    return [torch.Generator(device).manual_seed(seed + i) for i in range(num_scenes)]


COMPONENTS = {
    "scene_autoencoder": SceneAutoencoder,
    "latent_autoencoder": LatentAutoencoder,
    "global_denoiser": GlobalDenoiser,
    "coarse_denoiser": CoarseDenoiser,
    "fine_denoiser": FineDenoiser,
}


def load_pipeline(folder: Path | str = GENERATOR, variant: str | None = None) -> NFLDMPipeline:
    """Reads a trained generator from a folder and checks it; its weights become single precision.

    Args:
        folder: of an `NFLDMPipeline`, or the name of a model that comes with this package (`nfldm_ns.models`).
        variant: of its weights, such as "fp16", as it was saved by `save_pretrained(variant=...)`.

    Raises:
        UserInputError: if a component is missing, truncated, or does not fit the others.
    """
    folder = resolve_model(folder)
    if not (folder / PIPELINE_INDEX).is_file():
        names = ", ".join(shipped_models("model_index.json"))
        raise UserInputError(
            f"{folder} has no model_index.json, so it is not a trained generator: fix the path, or name one that comes "
            f"with this package ({names})."
        )
    index = read_json(folder / PIPELINE_INDEX)
    if not isinstance(index, dict) or index.get("_class_name") != "NFLDMPipeline":
        raise UserInputError(f"{folder} holds another kind of pipeline: give the folder of an NFLDMPipeline.")
    validated_json(_Index, index, folder / PIPELINE_INDEX, "save the pipeline again")
    components = {
        name: _load_component(folder / name, cls, variant)
        for name, cls in COMPONENTS.items()
        if name not in NFLDMPipeline._optional_components or index.get(name) != [None, None]
    }
    components["scheduler"] = _load_scheduler(folder, index["scheduler"])
    try:
        pipeline = NFLDMPipeline.from_pretrained(folder, **components)
    except Exception as error:  # diffusers raises many kinds for what it does not expect
        raise UserInputError(f"{folder} cannot be loaded ({reason(error)}): save the pipeline again.") from error
    check_agreement(pipeline, folder)
    return pipeline


class _Index(Checked):
    """What is ours in `model_index.json`; the components' entries are names of a library and of a class in it."""

    scheduler: tuple[str, str]
    temperatures: tuple[Finite, Finite, Finite] = (1.0, 1.0, 1.0)
    contrasts: tuple[Finite, Finite, Finite] = (1.0, 1.0, 1.0)
    bev_classes: list[BevClassEntry] = Field(default_factory=list)
    default_steps: PositiveInt = NUM_STEPS


def _load_scheduler(folder: Path, entry: Sequence[str]) -> SchedulerMixin:
    """Of diffusers: other classes are not imported, whatever a file names."""
    library, name = entry
    cls = getattr(diffusers, name, None) if library == "diffusers" else None
    if not (isinstance(cls, type) and issubclass(cls, SchedulerMixin)):
        raise UserInputError(f"The scheduler of {folder / PIPELINE_INDEX} is no scheduler of diffusers: restore it.")
    path = folder / "scheduler" / "scheduler_config.json"
    if not path.is_file():
        raise UserInputError(f"{folder} lacks scheduler/scheduler_config.json: restore it or save the pipeline again.")
    return read_scheduler(cls, path)


def _load_component(folder: Path, cls: type, variant: str | None) -> nn.Module:
    """A component whose weights are exactly those its configuration asks for."""
    if not (folder / "config.json").is_file():
        raise UserInputError(f"{folder.parent} lacks component {folder.name}: restore it or save the pipeline again.")
    config, weights = folder / "config.json", folder / weights_name(WEIGHTS, variant)
    return build_model(cls, read_json(config), config, read_weights(weights), weights)


def save_in_half_precision(pipeline: Path | str, folder: Path | str) -> None:
    """Saves a trained generator with its parameters in half precision; statistics and codes stay as they are.

    `load_pipeline` and `from_pretrained` make them single precision again, so that only their last digits are lost.

    Args:
        pipeline: the folder of the generator.
        folder: what becomes the folder of the copy; whole or not at all.

    Raises:
        UserInputError: if there is no such generator.
    """
    smaller = load_pipeline(pipeline)
    for name in COMPONENTS:
        for parameter in () if getattr(smaller, name) is None else getattr(smaller, name).parameters():
            parameter.data = parameter.data.half()
    with atomic_path(Path(folder)) as temporary:
        save_without_origin(smaller, temporary)


def save_without_origin(pipeline: DiffusionPipeline, folder: Path) -> None:
    """`save_pretrained` without the path that the pipeline was read from."""
    pipeline.save_pretrained(folder)
    index = folder / pipeline.config_name
    write_json(index, {k: v for k, v in read_json(index).items() if k != "_name_or_path"})


def check_agreement(pipeline: NFLDMPipeline, where: Path | str = "the pipeline") -> None:
    """Raises `UserInputError` unless the components were made for each other, as far as shapes tell."""
    stage1, stage2 = pipeline.scene_autoencoder, pipeline.latent_autoencoder
    global_config = pipeline.global_denoiser.config
    coarse_config, fine = pipeline.coarse_denoiser.config, pipeline.fine_denoiser
    code_dim = pipeline.global_denoiser.sample_shape[0]
    shape_of_f = stage2.fine_shape if stage2.config.use_fine else None
    facts = [
        ("grid shape", "latent_autoencoder", stage2.grid_shape, "scene_autoencoder", stage1.grid_shape),
        ("channels", "latent_autoencoder", stage2.feature_channels, "scene_autoencoder", stage1.feature_channels),
        (
            "number of background channels",
            "latent_autoencoder",
            stage2.background_channels,
            "scene_autoencoder",
            stage1.background_shape[0],
        ),
        ("box", "latent_autoencoder", stage2.aabb.tolist(), "scene_autoencoder", stage1.aabb.tolist()),
        ("size of g", "global_denoiser", global_config.global_dim, "latent_autoencoder", stage2.global_dim),
        ("shape of c", "coarse_denoiser", tuple(coarse_config.coarse_shape), "latent_autoencoder", stage2.coarse_shape),
        ("shape of f", "fine_denoiser", fine.sample_shape if fine else None, "latent_autoencoder", shape_of_f),
        ("size of the scene code", "coarse_denoiser", coarse_config.code_dim, "global_denoiser", code_dim),
    ]
    if fine is not None:
        shape_of_c = tuple(fine.config.coarse_shape)
        facts += [
            ("shape of c", "fine_denoiser", shape_of_c, "latent_autoencoder", stage2.coarse_shape),
            ("size of the scene code", "fine_denoiser", fine.config.code_dim, "global_denoiser", code_dim),
        ]
    kinds = {"coarse_denoiser": coarse_config.flow, "scheduler": samples_flows(pipeline.scheduler)}
    kinds |= {} if fine is None else {"fine_denoiser": fine.config.flow}
    facts += [("flag flow", name, flow, "global_denoiser", global_config.flow) for name, flow in kinds.items()]
    number, size = "number of BEV classes", "size of BEV maps"
    for name, denoiser in (("coarse_denoiser", pipeline.coarse_denoiser), ("fine_denoiser", fine)):
        if denoiser is not None:
            known = denoiser.config
            facts.append((number, name, known.bev_classes, "global_denoiser", global_config.bev_classes))
            facts.append((size, name, _size(known.bev_size), "global_denoiser", pipeline.bev_size))
            told = bool(denoiser.config.known_share)
            facts.append(("flag of outpainters", name, told, "coarse_denoiser", pipeline.outpaints))
    named = 1 + max((c.id for c in pipeline.bev_classes), default=-1)
    facts.append((number, "global_denoiser", global_config.bev_classes, "model_index.json", named))
    for what, name, value, other, expected in facts:
        if value != expected:
            raise UserInputError(
                f"In {where} the {what} of {name} is {value}, but that of {other} is {expected}: "
                "use components of one training."
            )


def _size(size: Sequence[int] | None) -> tuple[int, ...] | None:
    return None if size is None else tuple(size)


def assemble_pipeline(
    scene_autoencoder: SceneAutoencoder,
    latent_autoencoder: LatentAutoencoder,
    global_denoiser: GlobalDenoiser,
    coarse_denoiser: CoarseDenoiser,
    fine_denoiser: FineDenoiser | None,
    scheduler: SchedulerMixin,
    temperatures: tuple[float, float, float] = (1.0, 1.0, 1.0),
    bev_classes: Sequence[BevClass] = (),
    default_steps: int = NUM_STEPS,
    contrasts: tuple[float, float, float] = (1.0, 1.0, 1.0),
) -> NFLDMPipeline:
    """A checked pipeline, all on the CPU in single precision and evaluation mode."""
    for model in (scene_autoencoder, latent_autoencoder, global_denoiser, coarse_denoiser, fine_denoiser):
        if model is not None:
            model.cpu().float().eval()
    pipeline = NFLDMPipeline(
        scene_autoencoder,
        latent_autoencoder,
        global_denoiser,
        coarse_denoiser,
        fine_denoiser,  # type: ignore[arg-type]  # optional, but diffusers' check of types knows plain classes only
        scheduler,
        temperatures,
        [asdict(entry) for entry in bev_classes],
        default_steps,
        contrasts,
    )
    check_agreement(pipeline)
    return pipeline
