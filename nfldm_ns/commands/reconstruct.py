"""`nfldm-reconstruct`: scenes of one to four images of a place."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import tyro

from nfldm_ns.errors import UserInputError, exit_on_bad_input
from nfldm_ns.models import GENERATOR

if TYPE_CHECKING:
    from nfldm_ns.diffusion.pipeline import NFLDMPipeline
    from nfldm_ns.reconstruction.prior_refinement import PriorRefinement
    from nfldm_ns.reconstruction.reconstruction import ReconstructionConfig
    from nfldm_ns.scenes.views import Views

MAX_ANSWERS = 1000


@dataclass
class Reconstruct:
    """Reconstruct a place from 1 to 4 images: what they show as they show it, the rest as the generator imagines it.

    Give images with --transforms, a scene with --scene and --views, or one photo with --no-pose. Each answer becomes a
    folder that is a nerfstudio run and a nerfstudio dataset, like those of nfldm-sample.
    """

    images: tyro.conf.Positional[tuple[Path, ...]] = ()
    """1 to 4 images of one place."""
    transforms: Path | None = None
    """nerfstudio's transforms.json that has the poses of the images, and their depths if it names some."""
    scene: Path | None = None
    """In place of images: a scene folder of a collection, or a nerfstudio capture."""
    views: tuple[int, ...] = ()
    """Which of its frames, counted from 0."""
    pose: bool = True
    """--no-pose: the image is one photo whose pose is not known; it is estimated together with the place."""
    focal_length: float | None = None
    """Of such a photo, in its pixels."""
    field_of_view: float | None = None
    """Or its horizontal field of view in degrees."""
    pipeline: Path = Path(GENERATOR)
    """A trained generator: a pipeline folder, or the model that comes with this package."""
    seed: int = 0
    num_answers: int = 1
    """Answers of the seeds --seed, --seed + 1, ...: they agree in what the images show."""
    steps: int = 10
    """Denoising steps of each latent."""
    guidance: float = 0.0
    """How much the images guide the denoising, such as 0.5; 0 not at all, which is four times as fast."""
    fine_tuning: int = 20
    """Steps in which the latents are fine-tuned for the images and under the generator."""
    prior: str | None = None
    """A prior of images that refines what no image shows: the folder of one of 'nfldm-train-prior --condition views',
    which is told what the images show; any other of nfldm-refine, which is not."""
    prior_steps: int = 40
    """Steps of that refinement."""
    use_depth: bool = True
    """--no-use-depth: leave out depths that the images have."""
    centre: bool = False
    """Puts the origin of the generator's box where the images were taken, in the mean."""
    metres_per_unit: float = 1.0
    """Scale of the poses."""
    up: Literal["z", "y", "-y"] = "z"
    """The axis of the poses that points up."""
    output_dir: Path = Path("outputs/reconstructed")
    """Answers go to answer_<seed>/ in here."""
    device: str | None = None
    """cpu or cuda; by default what is there."""

    def run(self) -> None:
        import diffusers

        from nfldm_ns.diffusion.pipeline import load_pipeline
        from nfldm_ns.processes import chosen_device
        from nfldm_ns.reconstruction.answers import write_answers
        from nfldm_ns.scenes.writing import require_writable

        self._check()
        diffusers.utils.logging.disable_progress_bar()  # of loading, which takes a moment only
        pipeline = load_pipeline(self.pipeline).to(chosen_device(self.device))
        pipeline.set_progress_bar_config(disable=True)
        views, record = self._views(pipeline)
        require_writable(self.output_dir)
        record |= {"pipeline": str(self.pipeline), "guidance": self.guidance, "fine_tuning": self.fine_tuning}
        if self.prior is not None:
            record |= {"prior": self.prior, "prior_steps": self.prior_steps}
        folders = []
        settings, refinement = self._config(), self._refinement()
        for folder in write_answers(
            pipeline,
            views,
            self.output_dir,
            self.num_answers,
            self.seed,
            settings,
            record=record,
            refinement=refinement,
        ):
            print(folder)
            folders.append(folder)
        print(f"Walk through the first: ns-viewer --load-config {folders[0] / 'config.yml'}")

    def _config(self) -> ReconstructionConfig:
        from nfldm_ns.reconstruction.fine_tuning import FineTuningConfig
        from nfldm_ns.reconstruction.reconstruction import ReconstructionConfig
        from nfldm_ns.reconstruction.rendering_guide import GuidanceConfig

        return ReconstructionConfig(
            num_inference_steps=self.steps,
            guidance=GuidanceConfig(scale=self.guidance),
            fine_tuning=FineTuningConfig(steps=self.fine_tuning),
        )

    def _refinement(self) -> PriorRefinement | None:
        from nfldm_ns.method_configs.refine import refine_trainer_config
        from nfldm_ns.reconstruction.prior_refinement import PriorRefinement
        from nfldm_ns.refine.loading import load_prior

        if self.prior is None:
            return None
        return PriorRefinement(load_prior(self.prior), refine_trainer_config().optimizers, self.prior_steps)

    def _check(self) -> None:
        from nfldm_ns.diffusion.call_checks import check_count, check_seed
        from nfldm_ns.reconstruction.given_views import check_count as check_image_count

        if self.scene is not None and (self.images or self.transforms is not None):
            raise UserInputError("--scene already has images and poses: leave out the images and --transforms.")
        if self.views and self.scene is None:
            raise UserInputError("--views counts the frames of a scene: name it with --scene.")
        if not self.pose and (self.scene is not None or self.transforms is not None):
            raise UserInputError("--no-pose is for a photo without one: leave out --scene and --transforms.")
        if not self.pose and len(self.images) != 1:
            raise UserInputError(f"--no-pose takes one photo, not {len(self.images)}: give one image.")
        if self.pose and (self.focal_length is not None or self.field_of_view is not None):
            raise UserInputError("Posed images bring their lenses: leave out --focal-length and --field-of-view.")
        if self.pose:
            check_image_count(len(self.images) if self.scene is None else len(self.views))
        if self.pose and self.images and self.transforms is None:
            raise UserInputError(
                "The images have no poses: name their transforms.json with --transforms, or give one photo with "
                "--no-pose."
            )
        if not 0 <= self.guidance < float("inf"):
            raise UserInputError(f"--guidance is {self.guidance}: give 0 or more.")
        if self.fine_tuning < 0:
            raise UserInputError(f"--fine-tuning is {self.fine_tuning}: give 0 or more steps.")
        if self.prior_steps < 1:
            raise UserInputError(f"--prior-steps is {self.prior_steps}: give at least 1.")
        if not 0 < self.metres_per_unit < float("inf"):
            raise UserInputError(f"--metres-per-unit is {self.metres_per_unit}: give metres, above 0.")
        try:
            check_count("--steps", self.steps)
            check_count("--num-answers", self.num_answers)
            check_seed("--seed", self.seed, self.num_answers)
        except ValueError as error:
            raise UserInputError(f"{error}: give another number.") from None

    def _views(self, pipeline: NFLDMPipeline) -> tuple[Views, dict[str, Any]]:
        """The images, batch shape `[1, N]`, and what the record says of them."""
        from nfldm_ns.reconstruction.given_views import PlaceOptions, photo, views_of_images, views_of_scene

        stage1 = pipeline.scene_autoencoder
        options = PlaceOptions(self.metres_per_unit, self.up, None, self.centre, self.use_depth)
        if self.scene is not None:
            views = views_of_scene(self.scene, self.views, stage1, options)
            return views, {"scene": str(self.scene), "views": list(self.views)}
        names = {"image_files": [str(image) for image in self.images]}
        if not self.pose:
            return self._estimated(
                pipeline, photo(self.images[0], stage1, self.focal_length, self.field_of_view), names
            )
        assert self.transforms is not None
        return views_of_images(self.images, self.transforms, stage1, options), names

    def _estimated(
        self, pipeline: NFLDMPipeline, unposed: Views, names: dict[str, Any]
    ) -> tuple[Views, dict[str, Any]]:
        from nfldm_ns.reconstruction.given_views import posed
        from nfldm_ns.reconstruction.poses import estimate_pose

        best = estimate_pose(pipeline, unposed, self.seed)[0]
        x, y, z = best.pose[:, 3].tolist()
        print(f"Estimated place of the camera: {x:.2f}, {y:.2f}, {z:.2f} m")
        return posed(unposed, best.pose), {**names, "estimated_pose": best.pose.tolist(), "pose_score": best.score}


def main(args: list[str] | None = None) -> None:
    """Entry point."""
    command = tyro.cli(Reconstruct, prog="nfldm-reconstruct", args=args)
    with exit_on_bad_input():
        command.run()


if __name__ == "__main__":
    main()
