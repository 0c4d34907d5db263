"""`nfldm-demo`: from nothing to generated scenes, on one page of pictures and numbers."""

import os
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import tyro

from nfldm_ns.commands.resumable import run_resumable
from nfldm_ns.errors import UserInputError

if TYPE_CHECKING:
    from nfldm_ns.demo.settings import DemoSettings


@dataclass
class Demo:
    """Collect scenes, train all three stages, sample new scenes, judge them: about 20 minutes on two CPU cores.

    On slow machines the trainings are shortened to end in time; it says so, and --length 1 prevents it. Ends with
    <output-dir>/index.html (pictures, videos, numbers) and <output-dir>/report.json. Interrupted and run again it
    continues; finished stages are not repeated unless settings before them change.

    On a GPU, --preset gpu --time-budget 1h trains the kind of model that comes with the package, from nothing, and
    leaves it in <output-dir>/model.
    """

    output_dir: Path = Path("outputs/demo")
    """Folder for everything the demo makes."""
    seed: int = 0
    preset: Literal["demo", "gpu", "smoke", "gpu-smoke"] = "demo"
    """gpu trains the kind of model that comes with the package, in an hour or in --time-budget; smoke and gpu-smoke
    only show that everything runs: a few scenes and steps."""
    time_budget: str | None = None
    """With --preset gpu, how long all of it may take: seconds, or such as 8m or 1h30m."""
    device: Literal["cpu", "cuda"] | None = None
    """By default what is there; --preset gpu wants a GPU unless it is told cpu."""
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

        from nfldm_ns.demo.console import StageConsole
        from nfldm_ns.demo.runner import claim_folder, run_stages
        from nfldm_ns.demo.stages import Demo as DemoStages
        from nfldm_ns.method_configs.demo_presets import DEMO_PRESETS
        from nfldm_ns.pretrained.weights import fetch_weights

        settings = self._in_time(DEMO_PRESETS[self.preset].with_seed(self.seed))
        if self.num_scenes is not None:
            if self.num_scenes < 1:
                raise UserInputError(
                    f"--num-scenes is {self.num_scenes}, but at least one must be sampled: give 1 or more."
                )
            settings = replace(settings, num_scenes=self.num_scenes)
        diffusers.utils.logging.disable_progress_bar()  # it would tear ours
        device = self._device(settings)
        settings = settings.on_device(device, _gpu_memory_gib(device))
        claim_folder(self.output_dir)
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
        if settings.half_precision:
            console.say(f"The generator in half precision, as models are shipped: {self.output_dir / 'model'}")
        console.say(f"The page: {self.output_dir / 'index.html'}   the numbers: {self.output_dir / 'report.json'}")

    def _in_time(self, settings: "DemoSettings") -> "DemoSettings":
        from nfldm_ns.demo.budget import parse_duration

        if self.time_budget is None:
            if self.length is not None and settings.time_budget_s is not None:
                raise UserInputError(
                    f"--length does not go with --preset {self.preset}, whose trainings the clock ends: give "
                    "--time-budget instead."
                )
            return settings
        seconds = parse_duration(self.time_budget)
        if settings.time_budget_s is None:
            raise UserInputError(
                f"--time-budget does not go with --preset {self.preset}, whose steps are counted: add --preset gpu, or "
                "give --length instead."
            )
        return settings.within(seconds)

    def _device(self, settings: "DemoSettings") -> str:
        """The device that was asked for, or the one that is there."""
        import torch

        available = torch.cuda.is_available()
        if self.device == "cuda" and not available:
            raise UserInputError("--device is cuda, but there is no CUDA device here: give --device cpu.")
        if self.device is None and settings.for_gpu and not available:
            raise UserInputError(
                f"--preset {self.preset} is meant for a GPU, but there is no CUDA device here: leave it out, or add "
                "--device cpu."
            )
        if self.device == "cpu" and available:
            os.environ["ACCELERATE_USE_CPU"] = "true"  # for the trainings, in their own processes too
        return self.device or ("cuda" if available else "cpu")

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


def _gpu_memory_gib(device: str) -> float:
    import torch

    return torch.cuda.get_device_properties(0).total_memory / 2**30 if device == "cuda" else 0.0


def main(args: list[str] | None = None) -> None:
    """Entry point."""
    run_resumable(tyro.cli(Demo, prog="nfldm-demo", args=args).run)


if __name__ == "__main__":
    main()
