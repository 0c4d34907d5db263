"""`nfldm-export`: a generated scene as a mesh, points, Gaussian splats or plain voxels."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import tyro

from nfldm_ns.errors import UserInputError, exit_on_bad_input


@dataclass
class Mesh:
    """Write a coloured mesh: the surfaces that rendered views show, in their colours.

    Metres, z up. A GLB says so in glTF's way, so that viewers show it upright.
    """

    scene: tyro.conf.Positional[Path]
    """The folder of a generated, edited or refined scene, or of a world."""
    output: Path
    """A .ply, .obj or .glb; replaced if it is there."""
    method: Literal["depth", "density"] | None = None
    """depth: the depth of rendered views, fused; nothing is where none looks. density: the closed surface at which
    density reaches a level, also behind walls. By default depth for scenes and density for worlds."""
    resolution_factor: int | None = None
    """Cells of the mesh per voxel and axis: 1, 2, 4 or 8; by default 4 by depth, 2 by density."""
    opacity: float | None = None
    """By density: share of light that one voxel stops at the surface (0.3 by default); it gives the level,
    -ln(1 - opacity) / edge of a voxel."""
    level: float | None = None
    """By density: the level itself, in 1/m."""
    min_component: float = 0.1
    """Connected parts with less surface than this, in square metres, are dropped; 0 keeps all."""
    ring_places: int = 4
    """Places around the scene's cameras from where 12 further views each see the mesh; a world has one per tile."""
    only_seen: bool = False
    """Leave out what no view sees, such as the backs of walls."""

    def run(self) -> None:
        from nfldm_ns.exports.isosurface import FACTORS
        from nfldm_ns.exports.mesh import FORMATS, check_method, scene_mesh, write_mesh
        from nfldm_ns.exports.worlds import world_mesh
        from nfldm_ns.generated.scene_files import load_generated_scene
        from nfldm_ns.generated.world_files import is_world, load_world

        _check_output(self.output, FORMATS)
        _check_at_least("--min-component", self.min_component, 0)
        _check_at_least("--ring-places", self.ring_places, 0)
        if self.resolution_factor is not None and self.resolution_factor not in FACTORS:
            raise UserInputError(f"--resolution-factor is {self.resolution_factor}: give 1, 2, 4 or 8.")
        if self.opacity is not None and not 0 < self.opacity < 1:
            raise UserInputError(f"--opacity is {self.opacity:g}: give a number between 0 and 1.")
        if self.level is not None and not 0 < self.level < float("inf"):
            raise UserInputError(f"--level is {self.level:g}: give a density above 0, in 1/m.")
        world = is_world(self.scene)
        method = self.method or ("density" if world else "depth")
        check_method(method, self.opacity, self.level)
        settings: dict[str, Any] = {
            "method": method,
            "resolution_factor": self.resolution_factor,
            "opacity": self.opacity,
            "level": self.level,
            "min_component": self.min_component,
            "only_seen": self.only_seen,
        }
        if world:
            mesh = world_mesh(load_world(self.scene), **settings)
        else:
            mesh = scene_mesh(load_generated_scene(self.scene), ring_places=self.ring_places, **settings)
        write_mesh(self.output, mesh)
        triangles = mesh.triangles
        print(f"{self.output}: {len(triangles.vertices)} vertices ({mesh.seen.mean():.0%} seen), ", end="")
        print(f"{len(triangles.faces)} faces")


@dataclass
class Points:
    """Write points with colours and normals on the surfaces that the scene's cameras see.

    A pixel gives a point if its ray stops at least half of the light, where it has stopped half.
    """

    scene: tyro.conf.Positional[Path]
    """The folder of a generated, edited or refined scene, or of a world."""
    output: Path
    """A .ply; replaced if it is there."""
    spacing: float = 0.05
    """Edge in metres of cells that keep one point each; 0 keeps all."""
    ring_places: int = 0
    """Places around the scene's cameras from where 12 further views each give points, too."""

    def run(self) -> None:
        from nfldm_ns.exports.points import scene_points, write_points
        from nfldm_ns.exports.worlds import world_points
        from nfldm_ns.generated.scene_files import load_generated_scene
        from nfldm_ns.generated.world_files import is_world, load_world

        _check_output(self.output, ("ply",))
        _check_at_least("--spacing", self.spacing, 0)
        _check_at_least("--ring-places", self.ring_places, 0)
        if is_world(self.scene):
            points = world_points(load_world(self.scene), self.spacing)
        else:
            scene = load_generated_scene(self.scene)
            points = scene_points(scene, spacing=self.spacing, ring_places=self.ring_places)
        write_points(self.output, points)
        print(f"{self.output}: {len(points.positions)} points")


@dataclass
class SplatFile:
    """Write Gaussian splats on the surfaces that the scene's cameras see, in the PLY that splat viewers open.

    What shows beyond the box becomes splats on its border.
    """

    scene: tyro.conf.Positional[Path]
    """The folder of a generated, edited or refined scene, or of a world."""
    output: Path
    """A .ply; replaced if it is there."""
    spacing: float = 0.1
    """Edge in metres of cells that get one splat each; 0 makes one of every pixel."""
    fit_steps: int = 0
    """Steps that fit colours, sizes and opacities to the renderings: some hundred sharpen them."""
    ring_places: int = 2
    """Places around the scene's cameras, or around those of each tile of a world, from where 12 further views each give
    splats, too."""
    seed: int = 0
    """Of the order in which fitting takes the views."""
    device: Literal["cpu", "cuda"] | None = None
    """Where fitting runs; by default on CUDA if that and gsplat are there. Results differ a little."""

    def run(self) -> None:
        from rich.progress import Progress

        from nfldm_ns.exports.splat_fitting import scene_splats
        from nfldm_ns.exports.splat_renderer import gsplat_works
        from nfldm_ns.exports.splats import write_splats
        from nfldm_ns.exports.worlds import world_splats
        from nfldm_ns.generated.scene_files import load_generated_scene
        from nfldm_ns.generated.world_files import is_world, load_world

        _check_output(self.output, ("ply",))
        _check_at_least("--spacing", self.spacing, 0)
        _check_at_least("--fit-steps", self.fit_steps, 0)
        if self.device == "cuda" and not gsplat_works():
            raise UserInputError("--device cuda needs a CUDA device, gsplat and nvcc, and one is missing: give cpu.")
        _check_at_least("--ring-places", self.ring_places, 0)
        with Progress(disable=self.fit_steps == 0) as bar:
            task = bar.add_task("Fitting splats", total=self.fit_steps)
            settings: dict[str, Any] = {
                "spacing": self.spacing,
                "ring_places": self.ring_places,
                "fit_steps": self.fit_steps,
                "seed": self.seed,
                "device": self.device,
                "progress": lambda done: bar.update(task, completed=done),
            }
            if is_world(self.scene):
                splats = world_splats(load_world(self.scene), **settings)
            else:
                splats = scene_splats(load_generated_scene(self.scene), **settings)
        write_splats(self.output, splats)
        print(f"{self.output}: {len(splats.positions)} splats")


@dataclass
class Voxels:
    """Write density, features, background and box as arrays, exactly as the scene has them."""

    scene: tyro.conf.Positional[Path]
    """The folder of a generated, edited or refined scene, or of a world."""
    output: Path
    """A .npz or .safetensors; replaced if it is there."""

    def run(self) -> None:
        from nfldm_ns.exports.voxels import FORMATS, write_voxels
        from nfldm_ns.generated.scene_files import load_generated_scene
        from nfldm_ns.generated.world_files import is_world, load_world

        _check_output(self.output, FORMATS)
        grid = load_world(self.scene).whole() if is_world(self.scene) else load_generated_scene(self.scene).grid
        write_voxels(self.output, grid)
        print(
            f"{self.output}: {' x '.join(map(str, grid.shape))} voxels (z, y, x) of {grid.features.shape[1]} features"
        )


def _check_output(output: Path, formats: Sequence[str]) -> None:
    """That the file can be written, before long work."""
    from nfldm_ns.scenes.writing import require_writable

    if output.suffix[1:].lower() not in formats:
        names = [f".{name}" for name in formats]
        raise UserInputError(f"--output {output} ends in none of what can be written: name it {' or '.join(names)}.")
    if output.is_dir():
        raise UserInputError(f"--output {output} is a folder: name a file.")
    require_writable(output.parent)


def _check_at_least(name: str, value: float, smallest: float) -> None:
    if not smallest <= value < float("inf"):
        raise UserInputError(f"{name} is {value:g}: give a number of at least {smallest:g}.")


def main(args: list[str] | None = None) -> None:
    """Entry point."""
    command = tyro.extras.subcommand_cli_from_dict(
        {"mesh": Mesh, "points": Points, "splats": SplatFile, "voxels": Voxels}, prog="nfldm-export", args=args
    )
    with exit_on_bad_input():
        command.run()


if __name__ == "__main__":
    main()
