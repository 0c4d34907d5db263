"""Sizes and lengths of the demo: `demo` and `gpu` for people, `smoke` and `gpu-smoke` for tests."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, replace

from nfldm_ns.collect.doom_collection import CollectionOptions
from nfldm_ns.collect.doom_scenes import PlaceFilter, SceneOptions
from nfldm_ns.demo.settings import DemoSettings
from nfldm_ns.demo.shares import DENOISER_SHARES
from nfldm_ns.diffusion.training import DiffusionTrainingConfig, Stage
from nfldm_ns.latents.training import LatentTrainingConfig
from nfldm_ns.method_configs.latent_presets import DIFFUSION_PRESETS, LATENT_PRESETS
from nfldm_ns.method_configs.presets import SCENE_AUTOENCODER
from nfldm_ns.training.schedule import Schedule

# Rooms of tan brick with grey floors: the most uniform of Freedoom's maps, brightened.
ONE_LOOK = SceneOptions(
    image_size=64,
    aabb=((-8.0, -8.0, -2.5), (8.0, 8.0, 4.0)),
    min_distance=1.0,
    min_light=240,
    accept=PlaceFilter(min_view_depth=1.0, min_depth=2.2, min_inside=0.85),
)
HELD_OUT_PLACES = CollectionOptions(num_scenes=420, maps=("freedoom2/MAP08",), hold_out="places", scenes=ONE_LOOK)

# Mazes, as of the generator that comes with the package: a share of them, if the time ends before all are made.
MAZE_NAMES = tuple(f"mazes/MAZE{number:04d}" for number in range(70))
MAZE_ROOMS = CollectionOptions(
    num_scenes=4480,
    maps=MAZE_NAMES,
    test_maps=MAZE_NAMES[60:],
    fractions={"test": 0.1},
    scenes=SceneOptions(
        image_size=64,
        aabb=((-7.5, -7.5, -2.2), (7.5, 7.5, 3.9)),
        min_distance=2.5,
        snap=2.5,
        accept=PlaceFilter(min_depth=1.2, min_view_depth=0.4),
    ),
)

_ROOMS_LATENT = LATENT_PRESETS["rooms"]
_ROOMS_DIFFUSION = DIFFUSION_PRESETS["rooms"]
BEV_DROPOUT = 0.3
_NO_END = 1_000_000  # steps: the clock ends these trainings
_LATENT = LATENT_PRESETS["tiny"]
_DIFFUSION = DIFFUSION_PRESETS["tiny"]


DEMO_PRESETS: dict[str, DemoSettings] = {
    "demo": DemoSettings(
        collection=HELD_OUT_PLACES,
        scene_autoencoder_steps=SCENE_AUTOENCODER["tiny"].max_num_iterations,
        scene_autoencoder_preset=asdict(SCENE_AUTOENCODER["tiny"]),
        latent_model=_LATENT.model,
        latent_training=_LATENT.training,
        denoiser_models=_DIFFUSION.models,
        denoiser_training=_DIFFUSION.training,
        quarter_turns=_DIFFUSION.quarter_turns,
        temperatures=_DIFFUSION.temperatures,
        num_images=168,
        expected_seconds={
            "collect": 40,
            "stage1": 325,
            "encode": 17,
            "stage2": 108,
            "stage3": 295,
            "sample": 35,
            "shipped": 15,
            "evaluate": 90,
            "report": 30,
        },
    ),
    "smoke": DemoSettings(
        collection=replace(
            HELD_OUT_PLACES,
            num_scenes=10,
            fractions={"test": 0.2},
            scenes=replace(ONE_LOOK, image_size=32, bev_size=16),
        ),
        scene_autoencoder_steps=4,
        scene_autoencoder_preset=asdict(SCENE_AUTOENCODER["tiny"]),
        scene_autoencoder_options=(
            *("--pipeline.model.network.grid-shape", "4", "16", "16"),
            *("--pipeline.model.network.feature-channels", "4"),
            *("--pipeline.model.network.num-depth-bins", "12"),
            *("--pipeline.model.network.num-samples", "16"),
            *("--pipeline.model.network.encoder-channels", "8", "8"),
            *("--pipeline.model.network.decoder-channels", "8", "8"),
            *("--pipeline.model.loss.lpips-mult", "0"),
            *("--pipeline.model.loss.adversarial-mult", "0"),
            *("--steps-per-save", "2"),
        ),
        latent_model={
            "coarse_channels": 4,
            "coarse_height": 2,
            "fine_channels": 4,
            "encoder_channels": (8, 8, 8),
            "fine_encoder_channels": 8,
            "decoder_channels": (8, 8, 8),
            "fusion_channels": 8,
        },
        latent_training=LatentTrainingConfig(
            schedule=Schedule(max_steps=4, batch_size=2, warmup_steps=1, log_every=1, checkpoint_every=2), num_views=1
        ),
        denoiser_models={
            "global": {"width": 16, "num_layers": 2},
            "coarse": {"channels": (16, 16), "attention": (False, False), "layers": 1},
            "fine": {"channels": (16, 16), "attention": (False, False), "layers": 1},
        },
        denoiser_training={
            stage: DiffusionTrainingConfig(
                schedule=Schedule(max_steps=4, batch_size=2, warmup_steps=1, log_every=1, checkpoint_every=2)
            )
            for stage in ("global", "coarse", "fine")
        },
        expected_seconds={
            "collect": 12,
            "stage1": 25,
            "encode": 1,
            "stage2": 2,
            "stage3": 20,
            "sample": 2,
            "shipped": 5,
            "evaluate": 8,
            "report": 5,
        },
        num_scenes=2,
        num_shipped_scenes=1,
        num_inference_steps=2,
        num_images=8,
        views_per_scene=2,
        video_frames=8,
    ),
}


def _until_time_is_over(schedule: Schedule) -> Schedule:
    return replace(schedule, max_steps=_NO_END, log_every=50, checkpoint_every=1000)


def _with_maps_until_time_is_over(
    trainings: Mapping[Stage, DiffusionTrainingConfig],
) -> dict[Stage, DiffusionTrainingConfig]:
    return {
        stage: replace(
            training, schedule=_until_time_is_over(training.schedule), condition="bev", bev_dropout=BEV_DROPOUT
        )
        for stage, training in trainings.items()
    }


# The kind of model that comes with the package, from nothing, with the refinement of voxels that vizdoom-stage1 has.
DEMO_PRESETS["gpu"] = DemoSettings(
    collection=MAZE_ROOMS,
    scene_autoencoder_method="nfldm-scene-ae-rooms",
    scene_autoencoder_steps=_NO_END,
    scene_autoencoder_preset=asdict(SCENE_AUTOENCODER["rooms"]),
    scene_autoencoder_options=(
        *("--pipeline.model.network.refinement-channels", "32"),
        *("--pipeline.model.network.refinement-steps", "2"),
        *("--pipeline.model.loss.lpips-views", "4"),
        *("--pipeline.model.loss.lpips-mult", "1.5"),
        *("--steps-per-save", "500"),
    ),
    latent_model=_ROOMS_LATENT.model,
    latent_training=replace(
        _ROOMS_LATENT.training,
        schedule=_until_time_is_over(_ROOMS_LATENT.training.schedule),
        losses=replace(_ROOMS_LATENT.training.losses, lpips_mult=2.0),
    ),
    denoiser_models=_ROOMS_DIFFUSION.models,
    denoiser_training=_with_maps_until_time_is_over(_ROOMS_DIFFUSION.training),
    denoiser_shares=DENOISER_SHARES,
    denoiser_processes=1,
    quarter_turns=_ROOMS_DIFFUSION.quarter_turns,
    temperatures=(1.0, 0.7, 0.3),
    encode_all_views=True,
    all_cores=True,
    half_precision=True,
    for_gpu=True,
    num_scenes=16,
    num_images=448,
).within(3600.0)

_SMOKE = DEMO_PRESETS["smoke"]
DEMO_PRESETS["gpu-smoke"] = replace(
    DEMO_PRESETS["gpu"],
    collection=replace(
        MAZE_ROOMS,
        num_scenes=8,
        maps=MAZE_NAMES[59:61],
        test_maps=MAZE_NAMES[60:61],
        fractions={"test": 0.25},
        scenes=replace(MAZE_ROOMS.scenes, image_size=32, bev_size=16),
    ),
    scene_autoencoder_options=(
        *_SMOKE.scene_autoencoder_options,
        *("--pipeline.model.network.refinement-channels", "8"),
        *("--pipeline.model.network.refinement-steps", "1"),
    ),
    latent_model=_SMOKE.latent_model,
    latent_training=replace(_SMOKE.latent_training, schedule=_until_time_is_over(_SMOKE.latent_training.schedule)),
    denoiser_models=_SMOKE.denoiser_models,
    denoiser_training=_with_maps_until_time_is_over(_SMOKE.denoiser_training),
    all_cores=False,
    num_scenes=2,
    num_shipped_scenes=1,
    num_inference_steps=2,
    num_images=8,
    views_per_scene=2,
    video_frames=8,
).within(20.0)
