"""`nfldm-demo`: from nothing to generated scenes, on one page of pictures and numbers."""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import tyro

from nfldm_ns.commands.resumable import run_resumable, sleep_idle_threads
from nfldm_ns.errors import UserInputError

if TYPE_CHECKING:
    from nfldm_ns.demo.settings import DemoSettings


@dataclass
class Demo:
    """Collect scenes, train all three stages, sample new scenes, judge them: about 20 minutes on two CPU cores.

    On slow machines the trainings are shortened to end in time; it says so, and --length 1 prevents it. Ends with
    <output-dir>/index.html (pictures, videos, numbers) and <output-dir>/report.json. Interrupted and run again it
    continues; finished stages are not repeated unless settings before them change.
    """

    output_dir: Path = Path("outputs/demo")
    """Folder for everything the demo makes."""
    seed: int = 0
    preset: Literal["demo", "smoke"] = "demo"
    """smoke only shows that everything runs: a few scenes and steps."""
    num_scenes: int | None = None
    """How many scenes to sample into folders; by default the preset's (8)."""
    length: float | None = None
    """Share of the preset's training steps; by default as many as end in time on this machine."""
    redo: (
        Literal["collect", "stage1", "encode", "stage2", "stage3", "sample", "shipped", "evaluate", "report"] | None
    ) = None
    """Repeat this stage and all later ones."""

    def run(self) -> None:
        import diffusers
        import torch

        from nfldm_ns.demo.console import StageConsole
        from nfldm_ns.demo.runner import claim_folder, run_stages
        from nfldm_ns.demo.stages import Demo as DemoStages
        from nfldm_ns.method_configs.demo_presets import DEMO_PRESETS
        from nfldm_ns.pretrained.weights import fetch_weights

        settings = DEMO_PRESETS[self.preset].with_seed(self.seed)
        if self.num_scenes is not None:
            if self.num_scenes < 1:
                raise UserInputError(
                    f"--num-scenes is {self.num_scenes}, but at least one must be sampled: give 1 or more."
                )
            settings = replace(settings, num_scenes=self.num_scenes)
        diffusers.utils.logging.disable_progress_bar()  # it would tear ours
        claim_folder(self.output_dir)
        device = "cuda" if torch.cuda.is_available() else "cpu"
        length = self.training_length(settings, device)
        settings = settings.with_length(length)
        stages = DemoStages(self.output_dir, settings, self.seed, device).stages()
        console = StageConsole([s.name for s in stages], [s.title for s in stages], settings.expected_seconds)
        console.say(f"nfldm-demo in {self.output_dir}, seed {self.seed}, on {device}")
        if length < 1:
            console.say(
                f"Trainings have {length:.0%} of their steps, to end in time here (--length 1 for all of them)."
            )
        for name in ("lpips-vgg", "fid-inception"):
            fetch_weights(name)
        run_stages(self.output_dir, stages, console, self.redo)
        console.say(f"The page: {self.output_dir / 'index.html'}   the numbers: {self.output_dir / 'report.json'}")

    def training_length(self, settings: "DemoSettings", device: str) -> float:
        """What was asked for, else what this demo began with, else what suits the machine."""
        from nfldm_ns.demo import pace

        if self.length is not None and not 0 < self.length <= 1:
            raise UserInputError(f"--length is {self.length}, but it is a share of the training: give 0.01 to 1.")
        length = self.length or pace.kept_length(self.output_dir)
        if length is None:
            slow = device == "cpu" and self.preset == "demo"
            slowness = settings.reference_gflops / pace.measure_gflops() if slow else 0.0
            length = pace.choose_length(settings.expected_seconds, slowness)
        pace.keep_length(self.output_dir, length)
        return length


def main(args: list[str] | None = None) -> None:
    """Entry point."""
    sleep_idle_threads()
    run_resumable(tyro.cli(Demo, prog="nfldm-demo", args=args).run)


if __name__ == "__main__":
    main()
