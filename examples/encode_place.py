"""Encodes a place of a scene collection from its source views, and judges views that the encoder did not see.

    python examples/encode_place.py data/mazes [--scene-id ID] [--refinement-steps 2]

Leaves `place.png`: real target views above rendered ones, and the error of depth.
"""

from __future__ import annotations

from pathlib import Path

import torch
import tyro

from nfldm_ns.autoencoder.checkpoints import load_scene_autoencoder
from nfldm_ns.metrics.images import psnr
from nfldm_ns.models import resolve_model
from nfldm_ns.reports.galleries import image_grid, write_png
from nfldm_ns.scenes.collection import SceneCollection


def main(
    data: tyro.conf.Positional[Path],
    scene_id: str | None = None,
    scene_autoencoder: Path = Path("vizdoom-stage1"),
    refinement_steps: int | None = None,
    output: Path = Path("outputs/examples/place.png"),
) -> None:
    collection = SceneCollection.open(data)
    scene = collection.load_scene(scene_id or collection.split("test")[0])
    batch = collection.batch([scene])
    autoencoder = load_scene_autoencoder(resolve_model(scene_autoencoder))
    with torch.no_grad():  # the refinement of voxels looks at gradients
        voxels = autoencoder.encode(batch.source, refinement_steps)
        rendered = autoencoder.render(voxels, batch.target.cameras)
    print(f"{scene.scene_id}: V {tuple(voxels.features.shape)} of {batch.source.shape[1]} views")
    print(
        f"PSNR of {batch.target.shape[1]} other views: {float(psnr(rendered.rgb, batch.target.images).mean()):.2f} dB"
    )
    if batch.target.depths is not None:
        known = batch.target.depths > 0
        print(f"error of depth: {float((rendered.depth - batch.target.depths).abs()[known].mean()):.2f} m")
    pictures = {"real": batch.target.images[0], "rendered": rendered.rgb[0].clamp(0, 1)}
    write_png(output, image_grid(pictures))


if __name__ == "__main__":
    tyro.cli(main, description=__doc__)
