"""`nfldm-encode`: V of every scene of a collection, with a trained scene auto-encoder."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import tyro

from nfldm_ns.errors import UserInputError, exit_on_bad_input

if TYPE_CHECKING:
    from nfldm_ns.latents.voxel_optimiser import VoxelOptimiser


@dataclass
class Encode:
    """Encode every scene of a collection; an interrupted run continues where it stopped.

    Several processes share the scenes: start them with
    `accelerate launch --num_processes 2 -m nfldm_ns.commands.encode`, torchrun or srun (docs/multi_process.md).
    """

    load_config: Path
    """The config.yml of a stage 1 run, its folder, or its scene_autoencoder folder."""
    output_dir: Path
    """Folder for the voxels."""
    data: Path | None = None
    """The scene collection; by default the one stage 1 was trained on."""
    device: str | None = None
    """cpu or cuda; by default what is there."""
    all_views: bool = False
    """Encode training places from all of their views: sharper voxels to learn from. Others are judged by their target
    views, and always encoded from their source views."""
    refine_steps: int = 0
    """Steps of gradient descent by which the voxels are optimised further: those of training places for all of their
    views, others for their source views. Needs the weights of LPIPS."""
    near: Path | None = None
    """A trained stage 2, whose reconstructions the refined voxels stay near to."""
    near_mult: float = 0.1
    """Weight of the distance to them."""
    batch_size: int = 1
    """Scenes encoded, and refined, at once."""

    def run(self) -> None:
        from nfldm_ns.autoencoder.checkpoints import load_scene_autoencoder, read_training_record
        from nfldm_ns.latents.voxel_store import encode_collection
        from nfldm_ns.processes import join_processes
        from nfldm_ns.scenes.collection import SceneCollection

        self._check()
        processes, device = join_processes(self.device)
        scene_autoencoder = load_scene_autoencoder(self.load_config)
        data = self.data or read_training_record(self.load_config).get("data")
        if data is None:
            raise UserInputError(
                f"{self.load_config} does not say what it was trained on: add --data with the scene collection."
            )
        collection = SceneCollection.open(data)
        collection.require_train_and_test()
        optimiser = self._optimiser(device)
        store = encode_collection(
            collection,
            scene_autoencoder,
            self.output_dir,
            device,
            optimiser=optimiser,
            batch_size=self.batch_size,
            all_views=self.all_views,
            processes=processes,
        )
        processes.leave()
        if processes.is_first:
            print(f"{len(store.scene_ids)} encoded scenes in {store.root}")

    def _check(self) -> None:
        if self.refine_steps < 0 or self.batch_size < 1 or self.near_mult < 0:
            raise UserInputError(
                f"--refine-steps is {self.refine_steps}, --batch-size {self.batch_size} and --near-mult "
                f"{self.near_mult}: give at least 0, 1 and 0."
            )
        if self.near is not None and not self.refine_steps:
            raise UserInputError(
                "--near holds refined voxels near a stage 2, but none are refined: add --refine-steps."
            )

    def _optimiser(self, device: str) -> VoxelOptimiser | None:
        if not self.refine_steps:
            return None
        from nfldm_ns.autoencoder.perceptual import PerceptualNetwork, convolution_dtype
        from nfldm_ns.latents.latent_autoencoder import load_latent_autoencoder
        from nfldm_ns.latents.voxel_optimiser import VoxelOptimiser
        from nfldm_ns.pretrained.weights import load_lpips

        near = None if self.near is None else load_latent_autoencoder(self.near).to(device).eval().requires_grad_(False)
        perceptual = PerceptualNetwork(load_lpips("vgg"), convolution_dtype(device)).to(device)
        return VoxelOptimiser(perceptual, self.refine_steps, near, self.near_mult)


def main(args: list[str] | None = None) -> None:
    """Entry point."""
    command = tyro.cli(Encode, prog="nfldm-encode", args=args)
    with exit_on_bad_input():
        command.run()


if __name__ == "__main__":
    main()
