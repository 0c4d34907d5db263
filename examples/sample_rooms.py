"""Samples scenes with the generator that comes with the package, and shows them.

    python examples/sample_rooms.py [--num-scenes 4] [--seed 0]

Leaves `rooms.png` (views of each scene's own cameras) and one folder per scene, which `ns-viewer` opens.
"""

from __future__ import annotations

from pathlib import Path

import torch
import tyro

from nfldm_ns.diffusion.pipeline import load_pipeline, scene_generators
from nfldm_ns.models import GENERATOR
from nfldm_ns.plugin.generated_run import write_generated_scene
from nfldm_ns.reports.galleries import image_grid, write_png
from nfldm_ns.scenes.views import index_cameras


def main(
    num_scenes: int = 4,
    seed: int = 0,
    num_inference_steps: int = 30,
    output_dir: Path = Path("outputs/examples/rooms"),
    pipeline: str = GENERATOR,
) -> None:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    generator = load_pipeline(pipeline).to(device)
    # One generator of random numbers per scene: scene i is the same however many are sampled beside it.
    scenes = generator(num_scenes, scene_generators(seed, num_scenes), num_inference_steps=num_inference_steps)
    with torch.inference_mode():
        views = generator.scene_autoencoder.render(scenes.grids, scenes.cameras).rgb.clamp(0, 1).cpu()
    columns = {f"camera {i}": views[:, i] for i in range(views.shape[1])}
    write_png(output_dir / "rooms.png", image_grid(columns, [f"seed {seed + i}" for i in range(num_scenes)]))
    for i in range(num_scenes):
        folder = output_dir / f"scene_{seed + i:06d}"
        cameras = index_cameras(scenes.cameras.to("cpu"), i)
        latents = {name: value[i] for name, value in scenes.latents.to("cpu").state_dict().items()}
        grid = scenes.grids[i].to("cpu")
        write_generated_scene(folder, grid, generator.scene_autoencoder, cameras, latents, {"seed": seed + i})
        print(f"ns-viewer --load-config {folder / 'config.yml'}")


if __name__ == "__main__":
    tyro.cli(main, description=__doc__)
