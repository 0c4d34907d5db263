"""`nfldm-sample`: new scenes from a trained generator."""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import tyro

from nfldm_ns.errors import UserInputError, exit_on_bad_input
from nfldm_ns.models import GENERATOR
from nfldm_ns.processes import is_first_by_environment

if TYPE_CHECKING:
    import numpy as np

    from nfldm_ns.sampling.scenes import ScenePipeline


@dataclass
class Sample:
    """Sample scenes; each becomes a folder that is a nerfstudio run and a nerfstudio dataset.

    Scene i has the seed `--seed` + i and does not depend on how many are sampled. Several processes share the scenes:
    start them with `accelerate launch --num_processes 2 -m nfldm_ns.commands.sample`, torchrun or srun
    (docs/multi_process.md).
    """

    pipeline: tyro.conf.Positional[Path] = Path(GENERATOR)
    """A trained generator: the pipeline folder of nfldm-train-diffusion, the output folder of nfldm-train-gan, or the
    model that comes with this package."""
    num_scenes: int = 8
    seed: int = 0
    output_dir: Path = Path("outputs/generated")
    """Scenes go to scene_<seed>/ in here, and pictures of all of them to contact_sheet.png."""
    num_inference_steps: int | tuple[int, int, int] | None = None
    """Denoising steps of each of the three latents, or of g, c and f: three numbers; by default the generator's own."""
    bev: tuple[Path, ...] = ()
    """A map of the scene from above, north up, or one per scene: images of the size and in the colours of the maps that
    the generator was trained with (bev.png in its collection's scenes). Without, scenes are sampled without a map."""
    guidance_scale: float = 1.0
    """Above 1 scenes follow their code and map more than the training's."""
    batch_size: int = 1
    """Scenes sampled together: faster on a GPU, but their numbers then agree only up to rounding."""
    compact: bool = False
    """Round the features of scenes to 7 bits, and leave out those that no ray reads: files of about half the size."""
    device: str | None = None
    """cpu or cuda; by default what is there."""

    def run(self) -> None:
        if is_first_by_environment():
            print(f"Loading {self.pipeline}", flush=True)
        import diffusers
        from rich.progress import track

        from nfldm_ns.processes import join_processes
        from nfldm_ns.reports.galleries import write_png
        from nfldm_ns.sampling.contact_sheet import contact_sheet
        from nfldm_ns.sampling.scenes import load_generator, sample_scenes, scene_folder
        from nfldm_ns.scenes.writing import clear_unfinished, require_writable

        self._check()
        processes, device = join_processes(self.device)
        diffusers.utils.logging.disable_progress_bar()  # of loading, which takes a moment only
        pipeline = load_generator(self.pipeline).to(device)
        maps = self._maps(pipeline)
        if processes.is_first:
            require_writable(self.output_dir)
            clear_unfinished(self.output_dir)
        processes.wait()
        scenes = sample_scenes(
            pipeline,
            self.output_dir,
            self.num_scenes,
            self.seed,
            num_inference_steps=self.num_inference_steps,
            batch_size=self.batch_size,
            source=str(self.pipeline),
            guidance_scale=self.guidance_scale,
            maps=maps,
            processes=processes,
            compact=self.compact,
        )
        total = len(processes.share(range(0, self.num_scenes, self.batch_size))) * self.batch_size
        title = "Sampling scenes" if processes.count == 1 else f"Sampling scenes (1 of {processes.count} processes)"
        for folder in track(scenes, title, total=min(total, self.num_scenes), disable=not processes.is_first):
            if processes.is_first:
                print(folder)
        processes.wait()
        processes.leave()
        if not processes.is_first:
            return
        folders = [scene_folder(self.output_dir, self.seed + i) for i in range(self.num_scenes)]
        sheet = self.output_dir / "contact_sheet.png"
        write_png(sheet, contact_sheet(folders))
        print(f"Pictures of all: {sheet}")
        print(f"Walk through the first: ns-viewer --load-config {folders[0] / 'config.yml'}")

    def _check(self) -> None:
        """What the pipeline would refuse, by its own checks, and what it cannot know."""
        from nfldm_ns.diffusion.call_checks import check_count, check_seed, check_steps

        try:
            for name in ("num_scenes", "batch_size"):
                check_count(f"--{name.replace('_', '-')}", getattr(self, name))
            if self.num_inference_steps is not None:
                check_steps(self.num_inference_steps, "--num-inference-steps")
            check_seed("--seed", self.seed, self.num_scenes)
        except ValueError as error:
            raise UserInputError(f"{error}: give another number.") from None

    def _maps(self, pipeline: "ScenePipeline") -> "list[np.ndarray]":
        """The maps, read and checked; also checks that the generator can be guided as asked."""
        from nfldm_ns.scenes.bev_maps import read_drawn_map

        if len(self.bev) not in (0, 1, self.num_scenes):
            raise UserInputError(
                f"--bev has {len(self.bev)} maps for {self.num_scenes} scenes: give one for all, or one per scene."
            )
        if self.bev and pipeline.bev_size is None:
            raise UserInputError(
                f"{self.pipeline} was trained without BEV maps: leave out --bev, or train a generator with "
                "'nfldm-train-diffusion --condition bev'."
            )
        try:
            pipeline.require_guidance(self.guidance_scale, with_map=bool(self.bev))
        except ValueError as error:
            raise UserInputError(f"--guidance-scale cannot be other than 1 here: {error}.") from None
        size = pipeline.bev_size or (0, 0)
        return [read_drawn_map(path, pipeline.bev_classes, size) for path in self.bev]


def main(args: list[str] | None = None) -> None:
    """Entry point."""
    command = tyro.cli(Sample, prog="nfldm-sample", args=args)
    with exit_on_bad_input():
        command.run()


if __name__ == "__main__":
    main()
