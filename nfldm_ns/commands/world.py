"""`nfldm-world`: worlds larger than the box that a generator was trained on."""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import tyro

from nfldm_ns.commands.resumable import run_resumable
from nfldm_ns.errors import UserInputError
from nfldm_ns.models import GENERATOR

if TYPE_CHECKING:
    from nfldm_ns.diffusion.pipeline import NFLDMPipeline
    from nfldm_ns.generated.world_files import World
    from nfldm_ns.sampling.world_folders import Progress


@dataclass
class WorldCommand:
    """Sample a world of any size into a folder that opens in nerfstudio, or make one larger.

    The same command again goes on where it was interrupted.
    """

    pipeline: tyro.conf.Positional[Path] = Path(GENERATOR)
    """A trained generator: the pipeline folder of nfldm-train-diffusion, or the model that comes with this package."""
    size: tuple[float, float] = (60.0, 60.0)
    """Metres from west to east and from south to north, rounded to whole cells of c."""
    seed: int = 0
    output_dir: Path = Path("outputs/world")
    """The folder of the world."""
    extend: Literal["north", "east", "south", "west"] | None = None
    """Make the world in --output-dir larger on this side, with the settings that it was made with."""
    by: float | None = None
    """Metres to add with --extend; by default one box."""
    bev: Path | None = None
    """A map of the whole from above (with --extend of the new part), north up, in the colours of the maps that the
    generator was trained with, and with as many pixels per box as these have."""
    method: Literal["joint", "outpaint"] = "joint"
    """joint: all overlapping windows together, their predictions averaged at each step. outpaint: one window after the
    other, each given what its neighbours have."""
    variety: float = 0.0
    """Distance, in boxes, of places with a g of their own, between which it changes slowly; 0: one g everywhere."""
    stride: float = 0.75
    """Largest distance of neighbouring windows, as a share of a window, from 0.5 to below 1."""
    resamplings: int | None = None
    """How often each stretch of steps is walked where neighbours are known (outpaint and --extend); by default 2, or 1
    for generators trained with --outpainting, which are told what these have."""
    num_inference_steps: int | None = None
    """Denoising steps of each of the latents; by default the generator's own: 30, or fewer if it was distilled."""
    guidance_scale: float = 1.0
    """Above 1 the world follows its code and map more than the training's scenes."""
    fill_floor: bool = True
    """Fill holes in the floor, where no camera of the generator's collection saw it, with the floor around."""
    fly_through: float = 30.0
    """Seconds of a video of a walk through the world, fly_through.mp4; 0 for none."""
    fps: float = 12.0
    """Its frames per second."""
    device: str | None = None
    """cpu or cuda; by default what is there."""

    def run(self) -> None:
        import diffusers
        from rich.progress import Progress as Bars

        from nfldm_ns.diffusion.pipeline import load_pipeline
        from nfldm_ns.processes import chosen_device

        self._check()
        device = chosen_device(self.device)
        diffusers.utils.logging.disable_progress_bar()  # of loading, which takes a moment only
        pipeline = load_pipeline(self.pipeline).to(device)
        with Bars() as bars:
            world = self._world(pipeline, _shown(bars))
            extent = (world.aabb[1] - world.aabb[0]).tolist()
            if self.fly_through > 0:
                self._film(world, bars)
        print(f"{self.output_dir}: {extent[0]:g} x {extent[1]:g} m in {len(world.description.tiles)} tiles")
        print(f"From above: {self.output_dir / 'from_above.png'}")
        print(f"Walk through it: ns-viewer --load-config {self.output_dir / 'config.yml'}")

    def _world(self, pipeline: "NFLDMPipeline", progress: "Progress") -> "World":
        from nfldm_ns.sampling.world_folders import extend_world, make_world
        from nfldm_ns.sampling.worlds import WorldSettings

        if self.extend is not None:
            return extend_world(pipeline, self.output_dir, self.extend, self.by, bev=self.bev, progress=progress)
        settings = WorldSettings(
            seed=self.seed,
            num_inference_steps=self.num_inference_steps,
            method=self.method,
            stride=self.stride,
            variety=self.variety,
            resamplings=self.resamplings,
            guidance_scale=self.guidance_scale,
            fill_floor=self.fill_floor,
        )
        return make_world(
            pipeline, self.output_dir, self.size, settings, bev=self.bev, source=str(self.pipeline), progress=progress
        )

    def _film(self, world: "World", bars) -> None:
        from nfldm_ns.generated.world_paths import walk
        from nfldm_ns.plugin.world_run import world_frames
        from nfldm_ns.reports.galleries import write_video

        path, described = self.output_dir / "fly_through.mp4", self.output_dir / "world.json"
        if path.is_file() and path.stat().st_mtime >= described.stat().st_mtime:
            bars.console.print(f"Fly-through: {path} is there; delete it for another.")
            return
        height, width = (2 * size for size in world.base_renderer.image_size)
        cameras = walk(world, self.fly_through, self.fps, (height, width * 3 // 2 // 2 * 2))
        frames = bars.track(world_frames(world, cameras), total=cameras.shape[0], description="Fly-through")
        write_video(path, frames, self.fps)
        bars.console.print(f"Fly-through: {path}")

    def _check(self) -> None:
        from nfldm_ns.diffusion.call_checks import check_count, check_seed

        try:
            for name in ("num_inference_steps", "resamplings"):
                if getattr(self, name) is not None:
                    check_count(f"--{name.replace('_', '-')}", getattr(self, name))
            check_seed("--seed", self.seed, 1)
        except ValueError as error:
            raise UserInputError(f"{error}: give another number.") from None
        finite = {"--size": min(self.size), "--by": 1.0 if self.by is None else self.by, "--fps": self.fps}
        for name, value in finite.items():
            if not 0 < value < float("inf") or max(self.size) == float("inf"):
                raise UserInputError(f"{name} is {value:g}: give finite numbers above 0.")
        for name, value in {"--variety": self.variety, "--fly-through": self.fly_through}.items():
            if not 0 <= value < float("inf"):
                raise UserInputError(f"{name} is {value:g}: give a finite number of at least 0.")
        if self.by is not None and self.extend is None:
            raise UserInputError("--by says how much --extend adds: give --extend, or leave --by out.")


def _shown(bars) -> "Progress":
    """Shows progress as bars, one for each kind of work."""
    tasks: dict[str, int] = {}

    def progress(what: str, done: int, total: int) -> None:
        if what not in tasks:
            tasks[what] = bars.add_task(what.capitalize(), total=total or None)
        bars.update(tasks[what], completed=done)

    return progress


def main(args: list[str] | None = None) -> None:
    """Entry point."""
    command = tyro.cli(WorldCommand, prog="nfldm-world", args=args)
    run_resumable(command.run)


if __name__ == "__main__":
    main()
