"""`nfldm-eval`: how good a trained generator is."""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import tyro

from nfldm_ns.commands.resumable import run_resumable
from nfldm_ns.errors import UserInputError


@dataclass
class Eval:
    """Sample scenes from a trained generator and compare them with real ones.

    Writes eval.json and index.html: FID, KID, precision, recall, density and coverage of images, the distribution of
    depth, density that floats, and the training scenes nearest to generated ones. The same command goes on after an
    interruption. docs/evaluation.md says what the numbers mean. Several processes share the scenes: start them with
    `accelerate launch --num_processes 2 -m nfldm_ns.commands.eval`, torchrun or srun (docs/multi_process.md).
    """

    pipeline: tyro.conf.Positional[Path]
    """A trained generator: the pipeline folder of nfldm-train-diffusion, or vizdoom-rooms, which comes with this
    package."""
    data: Path
    """The scene collection it was trained on; its test split is the reference."""
    output_dir: Path
    """Folder for the report, and for the pictures it is made from."""
    num_images: int = 5000
    """Images in every set. FID depends on it: compare only numbers of the same."""
    views_per_scene: int = 4
    """Images of each generated scene, by cameras of its own sampled trajectory."""
    seed: int = 0
    """Scene i has the seed `--seed` + i."""
    num_inference_steps: int | tuple[int, int, int] | None = None
    """Denoising steps of each of the three latents, or of g, c and f: three numbers; by default the generator's own."""
    batch_size: int = 1
    """Scenes sampled together: faster on a GPU, but their numbers then agree only up to rounding."""
    with_source_views: bool = False
    """Real images may also be source views, which the encoder sees; otherwise only target views."""
    num_train_scenes: int | None = None
    """Training scenes that are searched for copies, evenly chosen; by default all."""
    precision_k: int = 3
    """Neighbours for precision and recall."""
    density_k: int = 5
    """Neighbours for density and coverage."""
    fvd: Literal["auto", "yes", "no"] = "auto"
    """FVD of fly-throughs; auto: where the weights of I3D are (nfldm-weights get i3d-kinetics-400)."""
    device: str | None = None
    """cpu or cuda; by default what is there."""

    def run(self) -> None:
        import diffusers

        from nfldm_ns.diffusion.pipeline import NUM_STEPS, load_pipeline
        from nfldm_ns.evaluation.evaluation import NUMBERS, PAGE, evaluate_pipeline
        from nfldm_ns.evaluation.settings import EvaluationSettings
        from nfldm_ns.pretrained.weights import fetch_weights, load_i3d, load_inception
        from nfldm_ns.processes import join_processes
        from nfldm_ns.scenes.collection import SceneCollection

        processes, device = join_processes(self.device)
        settings = EvaluationSettings(
            self.num_images,
            self.views_per_scene,
            self.seed,
            NUM_STEPS if self.num_inference_steps is None else self.num_inference_steps,
            self.batch_size,
            self.with_source_views,
            self.num_train_scenes,
            self.precision_k,
            self.density_k,
            self.measures_fvd(processes.is_first),
        )
        diffusers.utils.logging.disable_progress_bar()  # of loading, which takes a moment only
        pipeline = load_pipeline(self.pipeline).to(device)
        if self.num_inference_steps is None:
            settings = replace(settings, num_inference_steps=pipeline.default_steps)
        collection = SceneCollection.open(self.data)
        if processes.is_first:
            fetch_weights("fid-inception")
        processes.wait()
        inception = load_inception().to(device)
        i3d = load_i3d().to(device) if settings.fvd else None
        evaluate_pipeline(
            pipeline, collection, self.output_dir, settings, inception, str(self.pipeline), i3d, processes
        )
        processes.leave()
        if processes.is_first:
            print(f"The page: {self.output_dir / PAGE}   the numbers: {self.output_dir / NUMBERS}")

    def measures_fvd(self, is_first: bool = True) -> bool:
        """Whether FVD is asked for, or else possible; the first process says so if it is left out."""
        from nfldm_ns.pretrained.weights import fetch_weights, find_weights

        if self.fvd == "yes":
            fetch_weights("i3d-kinetics-400")
        if self.fvd != "auto":
            return self.fvd == "yes"
        try:
            find_weights("i3d-kinetics-400")
        except UserInputError as error:
            if is_first:
                print(f"FVD is left out: {error}")
            return False
        return True


def main(args: list[str] | None = None) -> None:
    """Entry point."""
    run_resumable(tyro.cli(Eval, prog="nfldm-eval", args=args).run)


if __name__ == "__main__":
    main()
