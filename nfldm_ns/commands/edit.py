"""`nfldm-edit`: resamples a region of a scene, combines scenes, interpolates between them."""

from __future__ import annotations

from dataclasses import dataclass, replace
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import tyro

from nfldm_ns.errors import UserInputError, exit_on_bad_input

if TYPE_CHECKING:
    import numpy as np

    from nfldm_ns.diffusion.pipeline import NFLDMPipeline
    from nfldm_ns.editing.region import Region
    from nfldm_ns.generated.scene_files import GeneratedScene
    from nfldm_ns.scenes.voxel_grid import VoxelGrid

OUTPUT_DIR = Path("outputs/edited")


@dataclass
class Encode:
    """Turn real scenes of a collection, or edited and refined ones, into scene folders with latents, to be edited.

    V of a real scene is what stage 1 sees in its source views; a scene folder keeps its V. The latents are what stage 2
    makes of V.
    """

    source: tyro.conf.Positional[Path]
    """A scene collection, or the folder of a scene."""
    pipeline: Path | None = None
    """A trained generator; by default the one that made the scene."""
    scenes: tuple[str, ...] = ()
    """Scenes of the collection."""
    output_dir: Path = OUTPUT_DIR
    """Scenes go to <scene>/ in here, a scene folder to <name>_encoded/."""
    device: str | None = None
    """cpu or cuda; by default what is there."""

    def run(self) -> None:
        from nfldm_ns.editing.scenes import encode_again, encode_real_scene, load_scene, write_edited_scene
        from nfldm_ns.generated.scene_files import DESCRIPTION
        from nfldm_ns.scenes.collection import SceneCollection

        if (self.source / DESCRIPTION).is_file():
            if self.scenes:
                raise UserInputError(f"{self.source} is one scene: leave out --scenes, or give a collection.")
            scene = load_scene(self.source)
            pipeline, where = _load_pipeline(self.pipeline, scene, self.device)
            record = {"command": "nfldm-edit encode", "pipeline": where, "sources": [scene.provenance]}
            scene = replace(encode_again(pipeline, scene), provenance=record)
            folder = _destination(self.output_dir, f"{_name(self.source)}_encoded")
            write_edited_scene(folder, scene)
            print(folder)
            return
        collection = SceneCollection.open(self.source)
        if not self.scenes:
            raise UserInputError(
                f"{self.source} has {len(collection.scene_ids)} scenes: name some with --scenes, for example "
                f"{collection.scene_ids[0]}."
            )
        pipeline, where = _load_pipeline(self.pipeline, None, self.device)
        for scene_id in self.scenes:
            scene = encode_real_scene(pipeline, collection, scene_id, where)
            folder = _destination(self.output_dir, scene_id)
            write_edited_scene(folder, scene)
            print(folder)


@dataclass
class Resample:
    """Sample a region of a scene anew; elsewhere it stays what it was.

    The region is a box in metres or the white part of a mask image, which shows the scene's box from above, north (the
    largest y) up. With several scenes, scene i has the seed `--seed` + i.
    """

    scene: tyro.conf.Positional[Path]
    """The folder of a generated, encoded or edited scene."""
    box: tuple[float, float, float, float] | None = None
    """Minimum x and y, then maximum x and y, in metres."""
    mask: Path | None = None
    """A greyscale or black-and-white image; white is the region."""
    seed: int = 0
    num_scenes: int = 1
    """How many variants to sample."""
    bev: Path | None = None
    """A map of the scene from above, as for nfldm-sample, that the region is to follow."""
    seam: float = 1.0
    """Width in metres of the soft seam around the region; beyond, the voxels stay as they are."""
    pipeline: Path | None = None
    """A trained generator; by default the one that made the scene."""
    num_inference_steps: int | tuple[int, int, int] | None = None
    """Denoising steps of c and of f, or of g, c and f; by default the generator's own."""
    strength: float = 1.0
    """Share of the steps that the region walks: 1 begins with noise alone, less keeps something of what was there."""
    resamplings: int | None = None
    """How often each stretch of steps is walked, so that the region agrees with what is around it; 1 is fastest. By
    default 3, or 1 for generators trained with --outpainting."""
    jump_length: int = 3
    """Steps of such a stretch."""
    output_dir: Path = OUTPUT_DIR
    """Scenes go to <scene>_resampled_<seed>/ in here."""
    device: str | None = None
    """cpu or cuda; by default what is there."""

    def run(self) -> None:
        from nfldm_ns.editing.resampling import resample_region
        from nfldm_ns.editing.scenes import load_scene, write_edited_scene
        from nfldm_ns.scenes.writing import bev_png

        _check_numbers(self.num_inference_steps, self.seam, self.strength, self.resamplings, self.jump_length)
        if self.num_scenes < 1:
            raise UserInputError("--num-scenes must be at least 1: give a larger number.")
        scene = load_scene(self.scene)
        region = self._region(scene.grid)
        pipeline, where = _load_pipeline(self.pipeline, scene, self.device)
        bev = self._map(pipeline, where)
        drawn = None if bev is None else bev_png(bev, pipeline.bev_classes)
        for seed in range(self.seed, self.seed + self.num_scenes):
            edited = resample_region(
                pipeline,
                scene,
                region,
                seed,
                seam_m=self.seam,
                num_inference_steps=self.num_inference_steps,
                strength=self.strength,
                resamplings=self.resamplings,
                jump_length=self.jump_length,
                source=where,
                bev=bev,
            )
            folder = _destination(self.output_dir, f"{_name(self.scene)}_resampled_{seed:06d}")
            write_edited_scene(folder, edited, region, drawn)
            print(folder)

    def _map(self, pipeline: NFLDMPipeline, where: str) -> np.ndarray | None:
        from nfldm_ns.scenes.bev_maps import read_drawn_map

        if self.bev is None:
            return None
        if pipeline.bev_size is None:
            raise UserInputError(f"{where} was trained without BEV maps: leave out --bev.")
        return read_drawn_map(self.bev, pipeline.bev_classes, pipeline.bev_size)

    def _region(self, grid: VoxelGrid) -> Region:
        from nfldm_ns.editing.region import box_region, mask_region

        if (self.box is None) == (self.mask is None):
            raise UserInputError("The region is either a box or a mask: give one of --box and --mask.")
        return mask_region(grid, self.mask) if self.box is None else box_region(grid, self.box)  # type: ignore[arg-type]


@dataclass
class Combine:
    """Join scenes: the first one, with each further one where `--where` says.

    Each place is one argument in quotes: 'box X0 Y0 X1 Y1', 'mask FILE', 'x > X', 'x < X', 'y > Y', 'y < Y' or
    'half-plane A B C', which is where A x + B y > C; all in metres. Later scenes lie over earlier ones.
    """

    scenes: tyro.conf.Positional[tuple[Path, ...]]
    """Folders of two or more scenes of one box and one decoder: generated, encoded, edited or refined."""
    where: tuple[str, ...]
    """One place for each scene but the first."""
    seam: float = 1.0
    """Width in metres of the soft seams around the places."""
    harmonise: float = 0.0
    """Share of the denoising steps that the seams are noised back and denoised, such as 0.4; 0 only joins voxels."""
    seed: int = 0
    """Of that denoising."""
    pipeline: Path | None = None
    """A trained generator for it; by default the one that made the first scene."""
    num_inference_steps: int | tuple[int, int, int] | None = None
    """Its denoising steps, of which --harmonise is a share; by default the generator's own."""
    output_dir: Path = OUTPUT_DIR
    """The scene goes to <first>_with_<second>.../ in here."""
    device: str | None = None
    """cpu or cuda; by default what is there."""

    def run(self) -> None:
        from nfldm_ns.editing.combining import combine_scenes, harmonise_seams
        from nfldm_ns.editing.region import parse_region, union
        from nfldm_ns.editing.scenes import load_scene, write_edited_scene

        if len(self.scenes) < 2:
            raise UserInputError("Combining needs two scenes or more: give their folders.")
        if len(self.where) != len(self.scenes) - 1:
            raise UserInputError(
                f"{len(self.scenes)} scenes need {len(self.scenes) - 1} places, one for each but the first, but "
                f"--where has {len(self.where)}: put each place in quotes."
            )
        if not 0 <= self.harmonise <= 1:
            raise UserInputError("--harmonise must be from 0 to 1: it is a share of the denoising steps.")
        _check_numbers(self.num_inference_steps, self.seam)
        scenes = [load_scene(folder) for folder in self.scenes]
        regions = [parse_region(scenes[0].grid, text) for text in self.where]
        combined = combine_scenes(scenes, regions, self.seam)
        if self.harmonise > 0:
            pipeline, where = _load_pipeline(self.pipeline, scenes[0], self.device)
            combined = harmonise_seams(
                pipeline,
                combined,
                regions,
                self.seed,
                strength=self.harmonise,
                seam_m=self.seam,
                num_inference_steps=self.num_inference_steps,
                source=where,
            )
        folder = _destination(self.output_dir, "_with_".join(_name(folder) for folder in self.scenes))
        write_edited_scene(folder, combined, union(regions))
        print(folder)


@dataclass
class Interpolate:
    """Show the way from one sampled scene to another through the noise they were sampled from, as a video."""

    first: tyro.conf.Positional[Path]
    second: tyro.conf.Positional[Path]
    """Folders of scenes of nfldm-sample."""
    frames: int = 24
    """Scenes of the way, with both ends; each is sampled."""
    camera: Literal["still", "turn"] = "still"
    """The first view of the first scene, or one turn around."""
    fps: float = 12.0
    """Frames per second of the video."""
    keep_scenes: bool = False
    """Also write each scene of the way as a folder."""
    pipeline: Path | None = None
    """The trained generator that made both; by default the one that the first scene names."""
    num_inference_steps: int | tuple[int, int, int] | None = None
    """As they were sampled with; by default what the first scene's record says."""
    output_dir: Path = OUTPUT_DIR
    """video.mp4 goes to <first>_to_<second>/ in here, and the scenes to frame_0000/ ... beside it."""
    device: str | None = None
    """cpu or cuda; by default what is there."""

    def run(self) -> None:
        from nfldm_ns.editing.interpolation import interpolate_scenes, interpolation_frames
        from nfldm_ns.editing.scenes import cameras_of, load_scene, write_edited_scene
        from nfldm_ns.reports.galleries import write_video

        _check_numbers(self.num_inference_steps)
        if self.fps <= 0:
            raise UserInputError("--fps must be above 0: give frames per second.")
        first, second = load_scene(self.first), load_scene(self.second)
        pipeline, where = _load_pipeline(self.pipeline, first, self.device)
        folder = self.output_dir / f"{_name(self.first)}_to_{_name(self.second)}"
        steps = self.num_inference_steps
        scenes = interpolate_scenes(pipeline, first, second, self.frames, num_inference_steps=steps, source=where)

        def kept():
            for i, scene in enumerate(scenes):
                if self.keep_scenes:
                    write_edited_scene(_destination(folder, f"frame_{i:04d}"), scene)
                yield scene

        images = interpolation_frames(kept(), cameras_of(first), self.frames, self.camera == "turn")
        begun = next(images)  # bad input is found here, before anything is written
        write_video(folder / "video.mp4", chain([begun], images), self.fps)
        print(folder / "video.mp4")


def _load_pipeline(folder: Path | None, scene: GeneratedScene | None, device: str | None) -> tuple[NFLDMPipeline, str]:
    """The pipeline, and where it is from: as given, or as the scene's provenance says."""
    import diffusers

    from nfldm_ns.diffusion.pipeline import load_pipeline
    from nfldm_ns.editing.scenes import pipeline_named_by
    from nfldm_ns.models import resolve_model
    from nfldm_ns.processes import chosen_device

    named = pipeline_named_by(scene.provenance) if scene is not None else None
    found = folder or (Path(named) if named else None)
    if found is None:
        raise UserInputError("No trained generator was given, and the scene names none: give one with --pipeline.")
    if folder is None and not resolve_model(found).is_dir():
        raise UserInputError(f"The scene was made by {found}, which is not there: give the generator with --pipeline.")
    diffusers.utils.logging.disable_progress_bar()  # of loading, which takes a moment only
    pipeline = load_pipeline(found).to(chosen_device(device))
    pipeline.set_progress_bar_config(disable=True)
    return pipeline, str(found)


def _check_numbers(
    num_inference_steps: int | tuple[int, int, int] | None,
    seam: float = 0.0,
    strength: float = 1.0,
    resamplings: int | None = None,
    jump_length: int = 1,
) -> None:
    steps = num_inference_steps if isinstance(num_inference_steps, tuple) else (num_inference_steps,)
    if any(number is not None and number < 1 for number in (*steps, resamplings, jump_length)):
        raise UserInputError(
            "--num-inference-steps, --resamplings and --jump-length must be at least 1: give larger numbers."
        )
    if not 0 <= seam < float("inf"):
        raise UserInputError("--seam must be 0 or more metres: give another number.")
    if not 0 < strength <= 1:
        raise UserInputError("--strength must be above 0 and at most 1: give another number.")


def _name(folder: Path) -> str:
    return folder.resolve().name


def _destination(output_dir: Path, name: str) -> Path:
    """A folder to write; one that is there already must be a scene, as it is replaced."""
    from nfldm_ns.generated.scene_files import DESCRIPTION
    from nfldm_ns.scenes.writing import require_writable

    folder = output_dir / name
    if folder.exists() and not (folder / DESCRIPTION).is_file():
        raise UserInputError(f"{folder} is there already and is no generated scene: choose another --output-dir.")
    require_writable(output_dir)
    return folder


def main(args: list[str] | None = None) -> None:
    """Entry point."""
    command = tyro.extras.subcommand_cli_from_dict(
        {"encode": Encode, "resample": Resample, "combine": Combine, "interpolate": Interpolate},
        prog="nfldm-edit",
        args=args,
    )
    with exit_on_bad_input():
        command.run()


if __name__ == "__main__":
    main()
