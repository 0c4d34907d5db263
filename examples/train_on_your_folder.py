"""All three stages on a scene collection, from Python, and a first new scene.

    nfldm-collect import captures/* data/mine ...        # docs/data.md: how a folder becomes a collection
    python examples/train_on_your_folder.py data/mine [--steps 1000]

What `ns-train`, `nfldm-encode`, `nfldm-train-latent-ae`, `nfldm-train-diffusion` and `nfldm-sample` do, at the size
`tiny`. The steps of the presets make something to look at; the default here only shows that all fits together.
"""

from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path

import tyro

from nfldm_ns.autoencoder.checkpoints import load_scene_autoencoder
from nfldm_ns.diffusion.latent_memory import encode_latents
from nfldm_ns.diffusion.pipeline import load_pipeline
from nfldm_ns.diffusion.training import save_pipeline, stages_of, train_denoiser
from nfldm_ns.latents.training import train_latent_autoencoder
from nfldm_ns.latents.voxel_store import encode_collection
from nfldm_ns.method_configs.latent_presets import DIFFUSION_PRESETS, LATENT_PRESETS
from nfldm_ns.method_configs.scene_ae import nfldm_scene_ae_tiny
from nfldm_ns.sampling.scenes import sample_scenes
from nfldm_ns.scenes.collection import SceneCollection


def train_stage_1(data: Path, output_dir: Path, steps: int) -> Path:
    """What `ns-train nfldm-scene-ae-tiny` does; returns the run's folder."""
    config = copy.deepcopy(nfldm_scene_ae_tiny.config)
    config.data = config.pipeline.datamanager.data = data
    config.output_dir, config.experiment_name, config.timestamp = output_dir, "stage1", "run"
    config.max_num_iterations, config.vis = steps, "tensorboard"
    config.save_config()
    trainer = config.setup(local_rank=0, world_size=1)
    trainer.setup()
    trainer.train()
    return config.get_base_dir()


def main(
    data: tyro.conf.Positional[Path], output_dir: Path = Path("outputs/examples/training"), steps: int = 20
) -> None:
    collection = SceneCollection.open(data)
    stage1 = load_scene_autoencoder(train_stage_1(data, output_dir, steps))
    store = encode_collection(collection, stage1, output_dir / "voxels", all_views=True)

    latent, diffusion = LATENT_PRESETS["tiny"], DIFFUSION_PRESETS["tiny"]
    schedule = {"max_steps": steps, "report_to": "none"}
    losses = replace(latent.training.losses, lpips_mult=0.0)  # LPIPS here would need its network, too
    training = replace(latent.training, losses=losses, schedule=replace(latent.training.schedule, **schedule))
    stage2 = train_latent_autoencoder(store, output_dir / "stage2", latent.model, training)

    memory = encode_latents(store, stage2, store.splits["train"], diffusion.quarter_turns)
    for stage in stages_of(stage2):
        training = diffusion.training[stage]
        training = replace(training, schedule=replace(training.schedule, **schedule))
        train_denoiser(stage, memory, stage2, output_dir / "stage3" / stage, diffusion.models[stage], training)
    saved = save_pipeline(output_dir / "stage3", stage1, stage2, diffusion.temperatures)
    assert saved is not None
    for folder in sample_scenes(load_pipeline(saved), output_dir / "rooms", 1, num_inference_steps=10):
        print(f"ns-viewer --load-config {folder / 'config.yml'}")


if __name__ == "__main__":
    tyro.cli(main, description=__doc__)
