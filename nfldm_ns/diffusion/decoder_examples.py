"""Rendered feature maps of voxels, and their latents, on which decoders are tuned; made once and kept."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Protocol

import torch
from jaxtyping import Float, Int
from nerfstudio.cameras.cameras import Cameras
from rich.progress import track
from safetensors.torch import save_file
from torch import Tensor

from nfldm_ns.autoencoder.checkpoints import holds_tensors, read_safetensors, stored_half
from nfldm_ns.autoencoder.renderer import FeatureMaps
from nfldm_ns.autoencoder.scene_autoencoder import SceneAutoencoder
from nfldm_ns.autoencoder.scene_sampler import SceneCache
from nfldm_ns.choice import evenly
from nfldm_ns.diffusion.inpainting import Inpainting
from nfldm_ns.diffusion.latent_memory import encode_latents
from nfldm_ns.diffusion.pipeline import COMPONENTS, NFLDMPipeline
from nfldm_ns.errors import UserInputError
from nfldm_ns.latents.scene_latents import SceneLatents
from nfldm_ns.latents.voxel_store import VoxelStore
from nfldm_ns.scenes.collection import SceneCollection, read_transforms
from nfldm_ns.scenes.views import Views, index_cameras, step_aside
from nfldm_ns.scenes.voxel_grid import VoxelGrid
from nfldm_ns.scenes.writing import atomic_path
from nfldm_ns.training.draws import ItemDraws, batch_indices
from nfldm_ns.training.identity import model_hash, public_config

ENCODED = ("encoded",)
GENERATED = ("round_trip", "denoised")
MAPS = ("features", "accumulation")
LATENTS = tuple(part.name for part in fields(SceneLatents))
POSES = "camera_to_worlds"
COMPARED_PLACES = 8  # of two collections that should show the same
NEIGHBOUR_TURN = math.radians(15)  # a step of a flight of 24 views, in which a camera moves about as far as the next
NEIGHBOUR_DISTANCE = 0.13  # metres, along each axis of the plane
DECODER = "decoder."  # begins the names of the weights that are tuned
DECODER_SIZES = "decoder_"  # begins the options that say how large the image decoder is


@dataclass(frozen=True)
class ExampleConfig:
    """Which examples a decoder is tuned on.

    Attributes:
        num_scenes: examples, each of one training scene; all scenes come once before any comes again.
        num_views: views of each, or all that a scene has.
        max_noise: largest share of the schedule that latents are noised to, in (0, 1].
        num_inference_steps: of the whole schedule; an example walks its share of them.
        sampled_fine: share of examples whose V after its own latents has its true g and c, but f as the denoiser
            samples it given those. Things are where they are in the real views, so that these can be asked for.
        seed: of scenes, views and noise.
        neighbours: whether each view of the last kind has one beside it, which a loss of consistency looks at.
        kinds: of V, as the source of the examples makes them; the first looks like the real views.
    """

    num_scenes: int = 256
    num_views: int = 4
    max_noise: float = 0.4
    num_inference_steps: int = 20
    sampled_fine: float = 0.0
    seed: int = 0
    neighbours: bool = False
    kinds: tuple[str, ...] = GENERATED

    def check(self) -> None:
        """Raises `UserInputError` for settings that make no sense."""
        if not 0 < self.max_noise <= 1:
            raise UserInputError(
                f"--max-noise is {self.max_noise}, but must be above 0 and at most 1: it is a share of the schedule."
            )
        if not 0 <= self.sampled_fine <= 1:
            raise UserInputError(f"--sampled-fine is {self.sampled_fine}, but is a share of the examples: 0 to 1.")
        for name in ("num_scenes", "num_views", "num_inference_steps"):
            if getattr(self, name) < 1:
                option = name.replace("_", "-")
                raise UserInputError(f"--{option} is {getattr(self, name)}: give at least 1.")


@dataclass
class Neighbours:
    """What a camera a step beside each of N cameras sees of the same V, as on a flight through it.

    Attributes:
        camera_to_worlds: `[N, 3, 4]`, of the cameras beside; all else they share with those they are beside.
        features: `[N, C, h, w]`.
        accumulation: `[N, 1, h, w]`.
        depth: `[N, 1, h, w]`, planar and in metres, 0 where rays end nowhere.
        seen_depth: likewise, of the cameras that they are beside.
    """

    camera_to_worlds: Float[Tensor, "views 3 4"]
    features: Float[Tensor, "views channels h w"]
    accumulation: Float[Tensor, "views 1 h w"]
    depth: Float[Tensor, "views 1 h w"]
    seen_depth: Float[Tensor, "views 1 h w"]

    def state_dict(self) -> dict[str, Tensor]:
        """Its tensors by name."""
        return {part.name: getattr(self, part.name) for part in fields(self)}

    def __getitem__(self, index: Tensor) -> Neighbours:
        return Neighbours(*(part[index] for part in self.state_dict().values()))

    def to(self, device: torch.device | str) -> Neighbours:
        return Neighbours(*(part.to(device) for part in self.state_dict().values()))

    @staticmethod
    def cat(several: list[Neighbours]) -> Neighbours:
        """Those of several scenes one after the other."""
        return Neighbours(
            *(torch.cat(parts) for parts in zip(*(n.state_dict().values() for n in several), strict=True))
        )

    @staticmethod
    def of_maps(cameras: Cameras, seen: FeatureMaps, beside: FeatureMaps) -> Neighbours:
        """Of what cameras `[S, M]` and those beside them see, `cameras` being the latter; N is S times M."""
        depths = (torch.where(maps.accumulation >= 0.5, maps.depth, 0.0) for maps in (beside, seen))
        parts = (cameras.camera_to_worlds, beside.features, beside.accumulation, *depths)
        return Neighbours(*(part.flatten(0, 1) for part in parts))


@dataclass
class DecoderExample:
    """One scene as its views see it, N views.

    Attributes:
        views: indices into the source views and then the target views of the scene.
        share: of the schedule, that the latents of the denoised V were noised to; 0 where there are none.
        features: by kind, `[N, C, h, w]`: `encoded` of V as it was encoded, `round_trip` of V after its own latents,
            `denoised` of V of latents that were noised and denoised.
        accumulation: likewise, `[N, 1, h, w]`.
        latents: likewise, g, c and f that V was decoded from, of batch size 1; none of encoded V.
        neighbours: of the views of the last kind, where they were asked for.
    """

    views: Int[Tensor, " views"]
    share: Float[Tensor, ""]
    features: dict[str, Float[Tensor, "views channels h w"]]
    accumulation: dict[str, Float[Tensor, "views 1 h w"]]
    latents: dict[str, SceneLatents]
    neighbours: Neighbours | None = None

    def save(self, path: Path) -> None:
        """Writes it whole or not at all, in half precision."""
        tensors = {"views": self.views.cpu(), "share": self.share.cpu()}
        for kind, features in self.features.items():
            tensors |= {f"{kind}.features": stored_half(features)}
            tensors |= {f"{kind}.accumulation": stored_half(self.accumulation[kind])}
        for kind, latents in self.latents.items():
            tensors |= {f"{kind}.{name}": stored_half(part) for name, part in latents.state_dict().items()}
        if self.neighbours is not None:
            for name, part in self.neighbours.state_dict().items():
                tensors[f"neighbours.{name}"] = part.cpu().contiguous() if name == POSES else stored_half(part)
        with atomic_path(path) as temporary:
            save_file(tensors, temporary)

    @staticmethod
    def load(path: Path, kinds: tuple[str, ...] = GENERATED) -> DecoderExample:
        """Reads what `save` wrote, in single precision; `UserInputError` if it is damaged."""
        tensors = read_safetensors(path)
        if not set(_names(kinds)) <= set(tensors):
            raise UserInputError(f"{path} is no example for a decoder: delete it to have it made again.")
        features, accumulation = ({kind: tensors[f"{kind}.{part}"].float() for kind in kinds} for part in MAPS)
        decoded = [kind for kind in kinds if kind not in ENCODED]
        latents = {kind: SceneLatents(*(tensors[f"{kind}.{name}"].float() for name in LATENTS)) for kind in decoded}
        neighbours = None
        if set(_names(kinds, neighbours=True)) <= set(tensors):
            neighbours = Neighbours(*(tensors[f"neighbours.{part.name}"].float() for part in fields(Neighbours)))
        return DecoderExample(tensors["views"], tensors["share"], features, accumulation, latents, neighbours)


class DecoderExamples:
    """All examples of a tuning, each a function of the seed and of its place.

    Args:
        folder: of the files, `<place>.safetensors`.
        store: encoded scenes, of which those for training are taken.
        cache: views of their collection.
    """

    def __init__(self, folder: Path, store: VoxelStore, cache: SceneCache, config: ExampleConfig) -> None:
        config.check()
        if not store.splits["train"]:
            raise UserInputError(f"{store.root} has no training scenes: encode a collection that has some.")
        self.folder, self.store, self.cache, self.config = folder, store, cache, config

    def __len__(self) -> int:
        return self.config.num_scenes

    def path(self, place: int) -> Path:
        return self.folder / f"{place:06d}.safetensors"

    def scene_id(self, place: int) -> str:
        """The scene of an example."""
        scenes = self.store.splits["train"]
        return scenes[batch_indices(len(scenes), 1, place, self.config.seed)[0]]

    def load(self, place: int) -> DecoderExample:
        return DecoderExample.load(self.path(place), self.config.kinds)

    def real_views(self, place: int) -> Views:
        """All views of its scene, first the source views."""
        scene = self.cache.load(self.scene_id(place))
        return Views.cat([scene.source, scene.target])

    def make(
        self,
        source: VoxelSource,
        places: Iterable[int] | None = None,
        on_progress: Callable[[float], None] | None = None,
    ) -> None:
        """Makes those that are not there yet.

        Args:
            source: its models on the device that is worked on.
            places: of these; by default all.
            on_progress: called with the share that is done, instead of a progress bar.
        """
        places = range(len(self)) if places is None else places
        names = _names(self.config.kinds, self.config.neighbours)
        missing = [place for place in places if not holds_tensors(self.path(place), names)]
        for done, place in enumerate(track(missing, "Making examples", disable=on_progress is not None)):
            self._make(source, place).save(self.path(place))
            if on_progress is not None:
                on_progress((done + 1) / len(missing))

    @torch.no_grad()
    def _make(self, source: VoxelSource, place: int) -> DecoderExample:
        renderer = source.scene_autoencoder
        device = next(renderer.parameters()).device
        draws = ItemDraws(self.config.seed, [place], device)
        share = source.nearest_share(float(draws.uniform()) * self.config.max_noise, self.config)
        real = self.real_views(place)
        views = draws.permutation(0, real.shape[0])[: self.config.num_views].sort().values
        cameras = index_cameras(real.cameras, views[None]).to(device)
        grids, latents = source.voxels(self, place, share, draws)
        maps = {kind: renderer.render_maps(grid, cameras) for kind, grid in grids.items()}
        features = {kind: found.features[0] for kind, found in maps.items()}
        accumulation = {kind: found.accumulation[0] for kind, found in maps.items()}
        neighbours = None
        if self.config.neighbours:
            last = self.config.kinds[-1]
            beside = _cameras_beside(cameras, draws)
            neighbours = Neighbours.of_maps(beside, maps[last], renderer.render_maps(grids[last], beside))
        return DecoderExample(views, torch.tensor(share), features, accumulation, latents, neighbours)


class VoxelSource(Protocol):
    """What makes the V of examples, from the scenes of a store.

    Attributes:
        kinds: of V that it makes.
        scene_autoencoder: what renders them, whose image decoder is tuned.
    """

    kinds: tuple[str, ...]
    scene_autoencoder: SceneAutoencoder

    def to(self, device: torch.device | str) -> None:
        """Moves its models."""

    def identity(self) -> dict[str, Any]:
        """What tells its examples and what is tuned on them from others'."""

    def nearest_share(self, share: float, config: ExampleConfig) -> float:
        """The share of the schedule, next to the one given, that it can noise latents to; 0 if to none."""

    def voxels(
        self, examples: DecoderExamples, place: int, share: float, draws: ItemDraws
    ) -> tuple[dict[str, VoxelGrid], dict[str, SceneLatents]]:
        """V of an example by kind, and the latents of those that were decoded from some."""


class EncodedVoxels:
    """V as stage 1 encoded it."""

    kinds: tuple[str, ...] = ENCODED

    def __init__(self, scene_autoencoder: SceneAutoencoder) -> None:
        self.scene_autoencoder = scene_autoencoder

    def to(self, device: torch.device | str) -> None:
        self.scene_autoencoder.to(device)

    def identity(self) -> dict[str, Any]:
        return {"kind": "image decoder of stage 1", "scene_autoencoder": model_hash(self.scene_autoencoder)}

    def nearest_share(self, share: float, config: ExampleConfig) -> float:
        return 0.0

    def voxels(
        self, examples: DecoderExamples, place: int, share: float, draws: ItemDraws
    ) -> tuple[dict[str, VoxelGrid], dict[str, SceneLatents]]:
        grid = examples.store.grid([examples.scene_id(place)]).to(draws.device)
        return dict.fromkeys(self.kinds, grid), {}


class GeneratedVoxels:
    """V after its own latents, and of latents that the denoisers of a generator were given noised."""

    kinds: tuple[str, ...] = GENERATED

    def __init__(self, pipeline: NFLDMPipeline) -> None:
        pipeline.set_progress_bar_config(disable=True)
        self.pipeline = pipeline
        self.scene_autoencoder = pipeline.scene_autoencoder

    def to(self, device: torch.device | str) -> None:
        self.pipeline.to(device)

    def identity(self) -> dict[str, Any]:
        pipeline = self.pipeline
        components = {name: getattr(pipeline, name) for name in COMPONENTS}
        return {
            "kind": "image decoder",
            "pipeline": {name: model_hash(model) for name, model in components.items() if model is not None},
            "temperatures": pipeline.config.temperatures,
            **pipeline.own_contrasts(),
            "scheduler": {"class": type(pipeline.scheduler).__name__, **public_config(pipeline.scheduler)},
        }

    def nearest_share(self, share: float, config: ExampleConfig) -> float:
        return quantised_share(self.pipeline, share, config)

    def voxels(
        self, examples: DecoderExamples, place: int, share: float, draws: ItemDraws
    ) -> tuple[dict[str, VoxelGrid], dict[str, SceneLatents]]:
        code, encoded = self._encode(examples, place, draws.device)
        latents = dict.fromkeys(self.kinds, encoded)
        grids = dict.fromkeys(self.kinds, self.pipeline.latent_autoencoder.decode(encoded))
        if share > 0:
            latents["denoised"], grids["denoised"] = self._denoise(examples, place, code, encoded, share, draws)
        wanted = examples.config.sampled_fine
        if wanted and float(draws.uniform()) < wanted:
            again = self._denoise(examples, place, code, encoded, 1.0, draws, keep_coarse=True)
            latents["round_trip"], grids["round_trip"] = again
        return grids, latents

    def _encode(
        self, examples: DecoderExamples, place: int, device: torch.device
    ) -> tuple[Float[Tensor, "1 code"], SceneLatents]:
        """The scene code and the latents of the true V, as denoisers are trained on them."""
        global_denoiser = self.pipeline.global_denoiser
        memory = encode_latents(
            examples.store,
            self.pipeline.latent_autoencoder,
            [examples.scene_id(place)],
            quarter_turns=False,
            num_cameras=global_denoiser.config.num_cameras,
            on_progress=lambda share: None,
        )
        turns = torch.zeros(1, dtype=torch.long)
        code, coarse, fine = (memory.pick(name, [0], turns, device) for name in ("scene_code", "coarse", "fine"))
        return code, SceneLatents(global_denoiser.split(code)[0], coarse, fine)

    def _denoise(
        self,
        examples: DecoderExamples,
        place: int,
        code: Float[Tensor, "1 code"],
        latents: SceneLatents,
        share: float,
        draws: ItemDraws,
        keep_coarse: bool = False,
    ) -> tuple[SceneLatents, VoxelGrid]:
        """c and f, or f alone, noised to a share of the schedule and denoised (SDEdit, Meng et al. 2022), and V."""
        coarse = torch.full(latents.coarse.shape[-2:], not keep_coarse)
        fine = torch.ones(latents.fine.shape[-2:], dtype=torch.bool)
        steps = examples.config.num_inference_steps
        groups = pipeline_steps(self.pipeline, steps)
        everywhere = Inpainting(latents, coarse, fine, strength=share, resamplings=1, jump_length=groups)
        bev = None
        if self.pipeline.bev_size is not None:
            bev = torch.from_numpy(examples.cache.collection.load_bev(examples.scene_id(place)).astype("int64"))
        output = self.pipeline(1, draws.generators, steps, scene_code=code, inpainting=everywhere, bev=bev)
        assert output.grids is not None
        return output.latents, output.grids


def pipeline_steps(pipeline: NFLDMPipeline, num_inference_steps: int) -> int:
    """Groups of steps that the scheduler takes for the whole schedule."""
    pipeline.scheduler.set_timesteps(num_inference_steps)
    return -(-len(pipeline.scheduler.timesteps) // pipeline.scheduler.order)


def quantised_share(pipeline: NFLDMPipeline, share: float, config: ExampleConfig) -> float:
    """The share of the schedule that whole steps of the scheduler come nearest to; 0 where that is none."""
    groups = pipeline_steps(pipeline, config.num_inference_steps)
    return round(share * groups) / groups


def require_same_voxels(store: VoxelStore, scene_autoencoder: SceneAutoencoder, whose: str = "the pipeline's") -> None:
    """Raises `UserInputError` unless the scenes were encoded by this stage 1; another image decoder does not matter."""
    theirs, ours = store.load_autoencoder(), scene_autoencoder
    configs = [_encoding_config(model) for model in (theirs, ours)]
    weights = [{k: v for k, v in m.state_dict().items() if not k.startswith(DECODER)} for m in (theirs, ours)]
    if configs[0] != configs[1] or not all(
        torch.equal(value, weights[1][name].cpu()) for name, value in weights[0].items()
    ):
        raise UserInputError(
            f"The scenes in {store.root} were encoded by another scene auto-encoder than {whose}: give the voxels that "
            "it encoded."
        )


def _encoding_config(model: SceneAutoencoder) -> dict[str, Any]:
    """What says how views become V, whatever shows it: sizes are those before an upsampler."""
    config = {name: value for name, value in public_config(model).items() if not name.startswith(DECODER_SIZES)}
    for name in ("feature_stride", "focal_length", "max_focal_length"):
        value = getattr(model.config, name)
        config[name] = value and value / model.upsampling
    config["image_size"] = [size / model.upsampling for size in model.image_size]
    return config


def require_same_places(store: VoxelStore, collection: SceneCollection) -> None:
    """Raises `UserInputError` unless a collection has the training scenes of a store, seen by the same cameras."""
    scenes, known = store.splits["train"], set(collection.scene_ids)
    missing = [scene for scene in scenes if scene not in known]
    if missing:
        raise UserInputError(
            f"{collection.root} lacks {missing[0]} and {len(missing) - 1} more of the scenes in {store.root}: collect "
            "it by the command of those that were encoded, with another image size."
        )
    encoded = store.load_collection()
    for scene in evenly(scenes, COMPARED_PLACES):
        if not _same_cameras(encoded, collection, scene):
            raise UserInputError(
                f"Scene {scene} has other cameras in {collection.root} than in {encoded.root}: collect it by the "
                "command of those that were encoded, with another image size."
            )


def _same_cameras(first: SceneCollection, second: SceneCollection, scene: str) -> bool:
    ours, theirs = (read_transforms(found.scene_dir(scene)) for found in (first, second))
    names = [*ours.source_names, *ours.target_names]
    if names != [*theirs.source_names, *theirs.target_names]:
        return False
    poses = [found.cameras(names, second.image_size).camera_to_worlds for found in (ours, theirs)]
    return torch.allclose(poses[0], poses[1], atol=1e-4)


def _cameras_beside(cameras: Cameras, draws: ItemDraws) -> Cameras:
    """Cameras `[1, N]` a small turn and a small way in the plane from others, drawn evenly within the limits."""
    yaw, x, y = draws.each(lambda generator: 2 * torch.rand(3, *cameras.shape[1:], generator=generator) - 1).unbind(1)
    offset = torch.stack([x, y, torch.zeros_like(x)], dim=-1) * NEIGHBOUR_DISTANCE
    yaw, offset = (part.to(cameras.camera_to_worlds.device) for part in (yaw * NEIGHBOUR_TURN, offset))
    return step_aside(cameras, yaw, offset)


def _names(kinds: tuple[str, ...], neighbours: bool = False) -> list[str]:
    """Of the tensors that an example's file must have."""
    beside = [f"neighbours.{part.name}" for part in fields(Neighbours)] if neighbours else []
    maps = [f"{kind}.{part}" for kind in kinds for part in MAPS]
    latents = [f"{kind}.{part}" for kind in kinds if kind not in ENCODED for part in LATENTS]
    return ["views", "share", *maps, *latents, *beside]
