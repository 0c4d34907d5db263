"""`nfldm-encode`: V of every scene of a collection, with a trained scene auto-encoder."""

from dataclasses import dataclass
from pathlib import Path

import tyro

from nfldm_ns.errors import UserInputError, exit_on_bad_input


@dataclass
class Encode:
    """Encode every scene of a collection; an interrupted run continues where it stopped."""

    load_config: Path
    """The config.yml of a stage 1 run, its folder, or its scene_autoencoder folder."""
    output_dir: Path
    """Folder for the voxels."""
    data: Path | None = None
    """The scene collection; by default the one stage 1 was trained on."""
    device: str | None = None
    """cpu or cuda; by default what is there."""

    def run(self) -> None:
        import torch

        from nfldm_ns.autoencoder.checkpoints import load_scene_autoencoder, read_training_record
        from nfldm_ns.latents.voxel_store import encode_collection
        from nfldm_ns.scenes.collection import SceneCollection

        scene_autoencoder = load_scene_autoencoder(self.load_config)
        data = self.data or read_training_record(self.load_config).get("data")
        if data is None:
            raise UserInputError(
                f"{self.load_config} does not say what it was trained on: add --data with the scene collection."
            )
        device = self.device or ("cuda" if torch.cuda.is_available() else "cpu")
        collection = SceneCollection.open(data)
        collection.require_train_and_test()
        store = encode_collection(collection, scene_autoencoder, self.output_dir, device)
        print(f"{len(store.scene_ids)} encoded scenes in {store.root}")


def main(args: list[str] | None = None) -> None:
    """Entry point."""
    command = tyro.cli(Encode, prog="nfldm-encode", args=args)
    with exit_on_bad_input():
        command.run()


if __name__ == "__main__":
    main()
