"""`nfldm-studio`: sampling, editing and looking at scenes in nerfstudio's viewer."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import tyro

from nfldm_ns.errors import UserInputError, exit_on_bad_input
from nfldm_ns.models import GENERATOR

if TYPE_CHECKING:
    from nfldm_ns.studio.generator import Generator


@dataclass
class Studio:
    """Open nerfstudio's viewer with a panel that samples and edits scenes; Ctrl-C closes it.

    Without --scene a first one is sampled, which takes some seconds.
    """

    pipeline: Path | None = None
    """A trained generator; by default the one that made the scene, or the model that comes with this package."""
    scene: tuple[Path, ...] = ()
    """Folders of scenes to open, all of one generator."""
    seed: int = 0
    """Of the first scene, where none is opened."""
    num_inference_steps: int | None = None
    """Denoising steps of each of its latents; by default the generator's own: 30, or fewer if it was distilled."""
    output_dir: Path = Path("outputs/studio")
    """The first scene, and what is saved, exported and photographed, goes here."""
    port: int | None = None
    """Of the page; by default the first that is free, from 7007 on."""
    host: str = "127.0.0.1"
    """Address to listen at; 0.0.0.0 lets other machines in, which then may use all of the panel."""
    open: bool = False
    """Open the page in a browser."""
    device: str | None = None
    """cpu or cuda; by default what is there."""

    def run(self) -> None:
        self._check()
        print("Reading the generator ..." if not self.scene else "Opening the viewer ...", flush=True)
        from nfldm_ns.processes import chosen_device
        from nfldm_ns.studio.launch import open_port, open_studio

        device = chosen_device(self.device)
        port = open_port(self.port, self.host)
        generator, folders = self._generator(device), self.scene
        if not folders:
            assert generator is not None
            folders = (self._first_scene(generator),)
        browser = None
        if self.open:
            import webbrowser

            browser = webbrowser.open
        studio = open_studio(folders, self.output_dir, port, self.host, generator, device, browser)
        print(f"The studio is open: {studio.url}    (Ctrl-C closes it)", flush=True)
        studio.stay_open()

    def _check(self) -> None:
        """What takes no long imports to find."""
        from nfldm_ns.diffusion.call_checks import check_count, check_seed
        from nfldm_ns.generated.scene_files import DESCRIPTION

        try:
            if self.num_inference_steps is not None:
                check_count("--num-inference-steps", self.num_inference_steps)
            check_seed("--seed", self.seed)
        except ValueError as error:
            raise UserInputError(f"{error}: give another number.") from None
        for folder in self.scene:
            if not (folder / DESCRIPTION).is_file():
                raise UserInputError(f"{folder} is no generated scene: make some with 'nfldm-sample'.")

    def _generator(self, device: str) -> Generator | None:
        """What was asked for, read; None leaves it to the scene, and reading to the panel."""
        import diffusers

        from nfldm_ns.diffusion.pipeline import load_pipeline
        from nfldm_ns.studio.generator import Generator

        if self.pipeline is None and self.scene:
            return None
        diffusers.utils.logging.disable_progress_bar()  # of loading, which takes a moment only
        source = self.pipeline or Path(GENERATOR)
        return Generator(str(source), device, load_pipeline(source).to(device))

    def _first_scene(self, generator: Generator) -> Path:
        from rich.progress import Progress

        from nfldm_ns.diffusion.pipeline import STAGES
        from nfldm_ns.studio.launch import first_scene

        with Progress() as bar:
            task = bar.add_task("Sampling the first scene", total=len(STAGES))

            def report(pipeline, step, timestep, kwargs):
                done = STAGES.index(pipeline.stage) + (step + 1) / max(1, pipeline.num_timesteps)
                bar.update(task, completed=done)
                return {}

            folder = first_scene(
                generator.pipeline,
                generator.source or "",
                self.output_dir,
                self.seed,
                self.num_inference_steps,
                report,
            )
            bar.update(task, completed=len(STAGES))
        print(folder)
        return folder


def main(args: list[str] | None = None) -> None:
    """Entry point."""
    command = tyro.cli(Studio, prog="nfldm-studio", args=args)
    try:
        with exit_on_bad_input():
            command.run()
    except KeyboardInterrupt:
        print("\nStopped.")
        raise SystemExit(130) from None


if __name__ == "__main__":
    main()
