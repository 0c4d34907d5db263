"""Edits a scene from Python: a corner sampled anew, and a second scene put into another part of it.

    python examples/edit_room.py SCENE OTHER [--seed 1]

SCENE and OTHER are folders that `nfldm-sample` wrote with one generator. Leaves two folders like them.
"""

from __future__ import annotations

from pathlib import Path

import tyro

from nfldm_ns.diffusion.pipeline import load_pipeline
from nfldm_ns.editing.combining import combine_scenes
from nfldm_ns.editing.region import box_region
from nfldm_ns.editing.resampling import resample_region
from nfldm_ns.editing.scenes import load_scene, write_edited_scene
from nfldm_ns.models import GENERATOR


def main(
    scene: tyro.conf.Positional[Path],
    other: tyro.conf.Positional[Path],
    seed: int = 1,
    num_inference_steps: int = 30,
    pipeline: str = GENERATOR,
    output_dir: Path = Path("outputs/examples/edited"),
) -> None:
    generator = load_pipeline(pipeline)
    generator.set_progress_bar_config(disable=True)
    room, second = load_scene(scene), load_scene(other)
    low, high = room.grid.aabb.tolist()
    corner = box_region(room.grid, (0.0, 0.0, high[0], high[1]))  # metres; what lies north-east of the middle
    resampled = resample_region(generator, room, corner, seed, num_inference_steps=num_inference_steps)
    write_edited_scene(output_dir / "resampled", resampled, corner)
    west = box_region(room.grid, (low[0], low[1], 0.0, high[1]))
    write_edited_scene(output_dir / "combined", combine_scenes([room, second], [west]), west)
    for name in ("resampled", "combined"):
        print(f"ns-viewer --load-config {output_dir / name / 'config.yml'}")


if __name__ == "__main__":
    tyro.cli(main, description=__doc__)
