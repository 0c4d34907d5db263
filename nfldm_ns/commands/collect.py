"""`nfldm-collect`: makes and judges scene collections."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import tyro
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from nfldm_ns.errors import exit_on_bad_input


@dataclass
class Vizdoom:
    """Makes a collection of posed RGB-D scenes from Freedoom's maps."""

    out: tyro.conf.Positional[Path]
    """Folder of the collection; an interrupted run continues there."""
    num_scenes: int = 500
    image_size: int = 64
    workers: int = 1
    seed: int = 0
    maps: tuple[str, ...] = ("*",)
    """Names or globs: freedoom1/E1M1, 'freedoom2/MAP0*'."""
    test_maps: tuple[str, ...] = ()
    """Maps held out for testing; by default a share of the maps chosen by the seed."""
    test_fraction: float = 0.1
    hold_out: Literal["maps", "places"] = "maps"
    """What the test split keeps for itself: whole maps, or places of every map, further than the box from all others."""
    val_fraction: float = 0.0
    aabb: tuple[float, float, float, float, float, float] = (-10, -10, -2.5, 10, 10, 4)
    """The box around each place in metres: minimum x y z, maximum x y z."""
    far: float = 30.0
    num_target_views: int = 4
    min_distance: float = 1.5
    min_brightness: float = 0.12
    min_depth: float = 2.0
    min_inside: float = 0.6
    min_view_depth: float = 0.7
    min_light: int = 0
    keep_sprites: bool = False

    def run(self) -> int:
        from nfldm_ns.collect import doom_collection as doom
        from nfldm_ns.collect.doom_places import RigOptions

        options = doom.SceneOptions(
            seed=self.seed,
            image_size=self.image_size,
            aabb=(self.aabb[:3], self.aabb[3:]),
            far=self.far,
            min_distance=self.min_distance,
            min_light=self.min_light,
            keep_sprites=self.keep_sprites,
            rig=RigOptions(num_target_views=self.num_target_views),
            accept=doom.PlaceFilter(
                min_brightness=self.min_brightness, min_depth=self.min_depth, min_inside=self.min_inside, min_view_depth=self.min_view_depth
            ),
        )
        known = doom.all_maps()
        test_maps = doom.choose_maps(self.test_maps, known) if self.test_maps else []
        maps = sorted(set(doom.choose_maps(self.maps, known)) | set(test_maps), key=known.index)
        fractions = {"test": self.test_fraction, "val": self.val_fraction}
        columns = (TextColumn("scenes"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
        with Progress(*columns, console=Console(stderr=True)) as progress:
            task = progress.add_task("scenes", total=self.num_scenes)
            report = doom.collect(
                self.out, self.num_scenes, maps, test_maps, fractions, options, self.workers,
                hold_out=self.hold_out, on_scene=lambda _: progress.advance(task),
            )
        counts = ", ".join(f"{count} {name}" for name, count in report.num_scenes.items() if count)
        print(f"{self.out}: {counts} scenes")
        print(f"{report.new_frames} new frames in {report.seconds:.0f} s: {report.frames_per_second_per_worker:.1f}/s per worker")
        return 0


def main() -> None:
    command = tyro.extras.subcommand_cli_from_dict({"vizdoom": Vizdoom, "check": Vizdoom})
    with exit_on_bad_input():
        code = command.run()
    raise SystemExit(code)


if __name__ == "__main__":
    main()
