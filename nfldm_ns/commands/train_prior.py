"""`nfldm-train-prior`: a 2D diffusion prior of a collection's images, to refine scenes with."""

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import tyro

from nfldm_ns.errors import UserInputError, exit_on_bad_input
from nfldm_ns.models import PRIOR, SCENE_AUTOENCODER
from nfldm_ns.training.options import ScheduleOptions, is_first_process, looks_at_maps

if TYPE_CHECKING:
    from nfldm_ns.refine.prior_training import Personalisation


@dataclass
class TrainPrior:
    """Train a small image diffusion model on the images of a scene collection; an interrupted run continues.

    `ns-train nfldm-refine --prior OUTPUT_DIR` refines generated scenes with it. It is conditioned on embeddings by the
    network of LPIPS (`nfldm-weights get lpips-vgg`). On several GPUs start it with
    `accelerate launch -m nfldm_ns.commands.train_prior`.
    """

    collection: tyro.conf.Positional[Path]
    """The scene collection; images of its training scenes are learned."""
    output_dir: Path
    """The run folder; the prior is written to prior/ in it."""
    preset: Literal["tiny", "small"] = "small"
    image_size: int = 64
    """Side of the images in pixels: middle squares, resized where they are larger or smaller."""
    renders: tuple[Path, ...] = ()
    """Generated scenes, or folders of them: the prior also learns their images, and to tell them from clean ones, so
    that negative guidance knows what to move away from."""
    max_images: int | None = None
    """Learn from this many images, evenly chosen; with --condition views, from all images of evenly chosen places. All
    are kept in memory (12 KB each at 64 x 64, and about as much for what was observed of their places)."""
    condition_dropout: float | None = None
    """Share of images whose embedding is hidden, for classifier-free guidance."""
    condition: Literal["none", "bev", "views"] = "none"
    """bev: the prior also sees the collection's semantic maps; scenes with a map are then refined by it, too. views: it
    also sees what --stage1 makes of 1 to 4 other views of the place, at the image's pose."""
    stage1: Path = Path(SCENE_AUTOENCODER)
    """For --condition views: a trained stage 1 of such places (a run's folder), or the one that comes with this
    package. It is kept with the prior."""
    view_dropout: float | None = None
    """Share of images of whose place nothing was observed (0.1 by default), for classifier-free guidance."""
    bev_dropout: float | None = None
    """Share of images whose map it does not see (0.15 by default), so that scenes without one can be refined."""
    personalise: Path | None = None
    """A few further images (a file or a folder) that --initial-prior learns, while it keeps what it knows by learning
    on from the collection (DreamBooth). The result refines scenes to these images."""
    initial_prior: str = PRIOR
    """What is personalised: a prior that was trained without --condition views, or the one that comes with this
    package."""
    preservation_share: float = 0.5
    """Share of the collection's images among those that it then learns from."""
    schedule: tyro.conf.OmitArgPrefixes[ScheduleOptions] = field(default_factory=ScheduleOptions)

    def run(self) -> None:
        from nfldm_ns.autoencoder.checkpoints import load_scene_autoencoder
        from nfldm_ns.method_configs.prior_presets import PERSONALISED, PRIOR_PRESETS
        from nfldm_ns.refine.prior_training import train_prior
        from nfldm_ns.scenes.collection import SceneCollection, read_json

        if self.image_size < 8 or (self.max_images is not None and self.max_images < 1):
            raise UserInputError("--image-size must be at least 8 and --max-images at least 1: give larger numbers.")
        with_maps = looks_at_maps(self.condition, self.bev_dropout)
        if self.condition != "views" and self.view_dropout is not None:
            raise UserInputError("--view-dropout drops views, which --condition views alone observes: add it.")
        if self.personalise is not None and (self.condition != "none" or self.renders):
            raise UserInputError("A prior is personalised as it is: leave out --condition and --renders.")
        collection = SceneCollection.open(self.collection)
        preset = PRIOR_PRESETS[self.preset]
        chosen = preset.training if self.personalise is None else PERSONALISED
        training = replace(chosen, schedule=replace(chosen.schedule, **self.schedule.given()))
        shares = {name: getattr(self, name) for name in ("condition_dropout", "bev_dropout", "view_dropout")}
        training = replace(training, **{name: share for name, share in shares.items() if share is not None})
        model = {**preset.model, "image_size": self.image_size}
        folder = train_prior(
            collection,
            self.output_dir,
            model,
            training,
            max_images=self.max_images,
            generated=self.renders,
            with_maps=with_maps,
            stage1=load_scene_autoencoder(self.stage1) if self.condition == "views" else None,
            personal=self._personalisation(),
        )
        if is_first_process():
            loss = read_json(folder / "prior.json")["made_by"]["held_out_loss"]
            print(f"The prior is in {folder}; its loss on held-out images is {loss}")

    def _personalisation(self) -> "Personalisation | None":
        from nfldm_ns.models import resolve_model
        from nfldm_ns.refine.domain_prior import load_domain_prior
        from nfldm_ns.refine.images import example_paths
        from nfldm_ns.refine.prior_training import Personalisation

        if self.personalise is None:
            return None
        prior = load_domain_prior(resolve_model(self.initial_prior))
        return Personalisation(prior, example_paths(self.personalise), self.preservation_share)


def main(args: list[str] | None = None) -> None:
    """Entry point."""
    command = tyro.cli(TrainPrior, prog="nfldm-train-prior", args=args)
    with exit_on_bad_input():
        command.run()


if __name__ == "__main__":
    main()
