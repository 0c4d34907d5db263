"""`nfldm-train-decoder`: the decoders, tuned on generated or encoded voxels."""

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import tyro

from nfldm_ns.errors import UserInputError, exit_on_bad_input
from nfldm_ns.models import GENERATOR
from nfldm_ns.training.options import ScheduleOptions, is_first_process

if TYPE_CHECKING:
    from nfldm_ns.autoencoder.perceptual import PerceptualNetwork
    from nfldm_ns.diffusion.decoder_training import DecoderTrainingConfig
    from nfldm_ns.latents.voxel_store import VoxelStore
    from nfldm_ns.scenes.collection import SceneCollection


@dataclass
class TrainDecoder:
    """Tune the image decoder of a trained generator on voxels as it generates them, or with `--of-stage1` that of a
    stage 1 on voxels as it encodes them; all else stays as it is.

    First the feature maps of such voxels are made and kept in the output folder, then the decoder is trained on them
    and on the real views of the same cameras. An interrupted run continues where it stopped. On several GPUs or
    machines start it with `accelerate launch -m nfldm_ns.commands.train_decoder`.
    """

    voxels: Path
    """Encoded scenes, from nfldm-encode, by the stage 1 of the generator."""
    output_dir: Path
    """The run folder; the generator with the tuned decoder goes to pipeline/ in it, with `--of-stage1` stage 1 to
    scene_autoencoder/."""
    pipeline: Path | None = None
    """A trained generator: the pipeline folder of nfldm-train-diffusion; by default the model that comes with this
    package."""
    of_stage1: bool = False
    """Tune the image decoder of the stage 1 that encoded the voxels, on them as they are; no generator takes part.
    Voxels encoded from source views alone show it V as it will meet it at novel views, those of `nfldm-encode
    --all-views` are sharper."""
    initial_weights: Path | None = None
    """With `--of-stage1`: another stage 1 to begin from, of the same encoder, as an earlier result of this command."""
    preset: Literal["tiny", "rooms", "rooms128", "base", "paper", "streets-tiny", "streets", "streets-paper"] = "tiny"
    num_scenes: int | None = None
    """Scenes to make feature maps of: training scenes, each after its latents, and with c and f noised and denoised; or
    with `--of-stage1` each as it was encoded."""
    num_views: int | None = None
    """Views of each."""
    max_noise: float | None = None
    """Largest share of the noise schedule that c and f are noised to, above 0 and at most 1 (0.4 by default)."""
    num_inference_steps: int | None = None
    """Denoising steps of the whole schedule, of which an example walks its share."""
    sampled_fine: float | None = None
    """Share of scenes that are compared with their real views not after their own latents, but with f sampled given
    their true g and c: what the fine denoiser leaves out has to be made up for."""
    adversarial_mult: float | None = None
    """Weight of the loss by the discriminator; 0 for none."""
    consistency_mult: float | None = None
    """Weight of the difference between images of a camera and of one a step beside it, where both see the same
    surface: keeps pictures from swimming as one flies. 0 for none."""
    tune_latent_decoder: bool = False
    """Also tune what latents are decoded to voxels with, through rendering: sharper voxels, not only pictures. Steps
    take several times as long; the denoisers still fit."""
    decoder_blocks: int | None = None
    """Residual blocks per level that the image decoder grows to before it is tuned (the new ones change nothing at
    first); by default it stays as large as it is."""
    upsampling_channels: int | None = None
    """Width of an upsampler that makes pictures twice as large as the image decoder does, and learns alone: smaller
    pictures stay what they are. The preset rooms128 has one. It needs --data."""
    upsampling_detail: float | None = None
    """How many times what the new upsampler adds counts in the result: less is softer and swims less. A finished
    command run again with another number changes its result."""
    data: Path | None = None
    """A collection of the same places with larger images to compare with, from nfldm-collect with the same options but
    --image-size; by default the one that was encoded."""
    window: int | None = None
    """Side in pixels of a square of every picture that the perceptual network and the discriminator look at, drawn anew
    in each step; by default all of it."""
    schedule: tyro.conf.OmitArgPrefixes[ScheduleOptions] = field(default_factory=ScheduleOptions)

    def run(self) -> None:
        from nfldm_ns.latents.voxel_store import VoxelStore

        self._check()
        config, store = self._config(), VoxelStore.open(self.voxels)
        result = self._tune_stage1(store, config) if self.of_stage1 else self._tune_generator(store, config)
        if is_first_process():
            print(result)

    def _check(self) -> None:
        if not self.of_stage1:
            if self.initial_weights is not None:
                raise UserInputError(
                    "--initial-weights is a stage 1 to begin from with --of-stage1: add that, or give a --pipeline."
                )
            return
        names = ("pipeline", "max_noise", "num_inference_steps", "sampled_fine")
        given = [name for name in names if getattr(self, name) is not None]
        given += ["tune_latent_decoder"] if self.tune_latent_decoder else []
        if given:
            raise UserInputError(
                f"--{given[0].replace('_', '-')} does not go with --of-stage1, which tunes on voxels as they were "
                "encoded and needs no generator: leave one of them out."
            )

    def _config(self) -> "DecoderTrainingConfig":
        """The preset with what was given."""
        from nfldm_ns.method_configs.latent_presets import DECODER_PRESETS

        config = DECODER_PRESETS[self.preset]
        names = ("num_scenes", "num_views", "max_noise", "num_inference_steps", "sampled_fine")
        given = {name: getattr(self, name) for name in names if getattr(self, name) is not None}
        examples = replace(config.examples, **given, seed=self.schedule.seed)
        examples.check()
        weights = {name: getattr(self, name) for name in ("adversarial_mult", "consistency_mult", "window")}
        losses = replace(config.losses, **{name: value for name, value in weights.items() if value is not None})
        schedule = replace(config.schedule, **self.schedule.given())
        of_decoder = ("decoder_blocks", "upsampling_channels", "upsampling_detail")
        sizes = {name: getattr(self, name) for name in of_decoder}
        return replace(
            config,
            examples=examples,
            losses=losses,
            schedule=schedule,
            tune_latent_decoder=self.tune_latent_decoder,
            **{name: value for name, value in sizes.items() if value is not None},
        )

    def _collection(self) -> "SceneCollection | None":
        from nfldm_ns.scenes.collection import SceneCollection

        return None if self.data is None else SceneCollection.open(self.data)

    def _tune_generator(self, store: "VoxelStore", config: "DecoderTrainingConfig") -> str:
        from nfldm_ns.diffusion.decoder_training import PIPELINE_FOLDER, train_decoder
        from nfldm_ns.diffusion.pipeline import load_pipeline

        begun_from, saved = self.pipeline or Path(GENERATOR), self.output_dir / PIPELINE_FOLDER
        if saved.resolve() == begun_from.resolve():
            raise UserInputError(f"{saved} is the generator to begin from: choose another output folder.")
        pipeline = load_pipeline(begun_from)
        perceptual = _perceptual_network(config)
        train_decoder(pipeline, store, self.output_dir, config, perceptual=perceptual, collection=self._collection())
        return f"The pipeline is in {saved}"

    def _tune_stage1(self, store: "VoxelStore", config: "DecoderTrainingConfig") -> str:
        from nfldm_ns.autoencoder.checkpoints import FOLDER, load_scene_autoencoder, scene_autoencoder_folder
        from nfldm_ns.diffusion.decoder_training import train_stage1_decoder

        saved = self.output_dir / FOLDER
        theirs = [store.root] if self.initial_weights is None else [store.root, self.initial_weights]
        if saved.resolve() in [scene_autoencoder_folder(path).resolve() for path in theirs]:
            raise UserInputError(f"{saved} is a scene auto-encoder to begin from: choose another output folder.")
        stage1 = load_scene_autoencoder(self.initial_weights) if self.initial_weights else store.load_autoencoder()
        perceptual = _perceptual_network(config)
        train_stage1_decoder(
            stage1, store, self.output_dir, config, perceptual=perceptual, collection=self._collection()
        )
        return f"The scene auto-encoder is in {saved}"


def _perceptual_network(config: "DecoderTrainingConfig") -> "PerceptualNetwork | None":
    import torch

    from nfldm_ns.autoencoder.perceptual import PerceptualNetwork, convolution_dtype
    from nfldm_ns.pretrained.weights import load_lpips

    if not config.losses.needs_perceptual_network:
        return None
    return PerceptualNetwork(load_lpips("vgg"), convolution_dtype("cuda" if torch.cuda.is_available() else "cpu"))


def main(args: list[str] | None = None) -> None:
    """Entry point."""
    command = tyro.cli(TrainDecoder, prog="nfldm-train-decoder", args=args)
    with exit_on_bad_input():
        command.run()


if __name__ == "__main__":
    main()
