"""`nfldm-train-gan`: the field's other generators of scenes, over the same voxels and the same renderer."""

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

import tyro

from nfldm_ns.errors import UserInputError, exit_on_bad_input
from nfldm_ns.training.options import ScheduleOptions, is_first_process


@dataclass
class TrainGan:
    """Train a baseline on the images of a scene collection; an interrupted run continues.

    A method is a set of the choices below it, each of which may be made otherwise (None: as the method has it).
    `nfldm-sample OUTPUT_DIR` then samples scenes, which open, render and export as all others. docs/baselines.md says
    how each differs from the method it is named after. Projected critics and gaudi look at features of the network of
    LPIPS (`nfldm-weights get lpips-vgg`; of the preset tiny lpips-alex). On several GPUs start it with
    `accelerate launch -m nfldm_ns.commands.train_gan`.
    """

    collection: tyro.conf.Positional[Path]
    """The scene collection; images of its training scenes are learned, no depths."""
    output_dir: Path
    """The run folder; the generator is written to pipeline/ in it."""
    method: Literal["gsn", "graf", "platonic-gan", "hologan", "campari", "eg3d", "gaudi"] = "gsn"
    """What the choices are by default."""
    preset: Literal["tiny", "rooms", "base"] = "rooms"
    generator: Literal["voxels", "triplane"] | None = None
    """What makes voxels of a latent: a floor plan of columns, or three planes."""
    rendering: Literal["features", "colours", "projection"] | None = None
    """What makes images of voxels: volume rendering of features and an image decoder; of colours alone; or features
    whose depth a network collapses."""
    critic: Literal["projected", "stylegan2"] | None = None
    """What tells rendered from real images: small heads on features of LPIPS's network, or StyleGAN2's."""
    patches: bool | None = None
    """The critic sees parts of images at random scales (GRAF)."""
    patch_steps: int | None = None
    """Steps in which the smallest of these parts shrink from the whole image to its pixels; by default the preset's, 0
    for all scales from the beginning."""
    dual: bool | None = None
    """The critic also sees the rendered colours before the image decoder (EG3D)."""
    camera_prior: Literal["collection", "level"] | None = None
    """Where cameras come from: the training scenes, or a guess that knows none of them."""
    learned_cameras: bool | None = None
    """Cameras move by learned residuals (CAMPARI)."""
    schedule: tyro.conf.OmitArgPrefixes[ScheduleOptions] = field(default_factory=ScheduleOptions)

    def run(self) -> None:
        from nfldm_ns.baselines.options import METHODS
        from nfldm_ns.baselines.training import train_baseline
        from nfldm_ns.method_configs.gan_presets import GAN_PRESETS
        from nfldm_ns.scenes.collection import SceneCollection

        names = ("generator", "rendering", "critic", "patches", "dual", "camera_prior", "learned_cameras")
        chosen = {name: value for name in names if (value := getattr(self, name)) is not None}
        options = replace(METHODS[self.method], **chosen)
        options.check()
        if self.patch_steps is not None and (self.patch_steps < 0 or not options.patches):
            raise UserInputError(
                f"--patch-steps is {self.patch_steps}, but it is a number of steps for patches: give 0 or more, and "
                "--patches True where the method has none."
            )
        preset, given = GAN_PRESETS[self.preset], self.schedule.given()
        of_prior = {name: value for name, value in given.items() if name not in ("learning_rate", "batch_size")}
        training = replace(
            preset.training,
            schedule=replace(preset.training.schedule, **given),
            prior_schedule=replace(preset.training.prior_schedule, **of_prior),
            patch_steps=preset.training.patch_steps if self.patch_steps is None else self.patch_steps,
        )
        collection = SceneCollection.open(self.collection)
        folder = train_baseline(collection, self.output_dir, options, preset.sizes, training)
        if is_first_process():
            print(f"The generator is in {folder}; sample scenes with: nfldm-sample {folder}")


def main(args: list[str] | None = None) -> None:
    """Entry point."""
    command = tyro.cli(TrainGan, prog="nfldm-train-gan", args=args)
    with exit_on_bad_input():
        command.run()


if __name__ == "__main__":
    main()
