"""FVD of sampled scenes to real test scenes, as the comparison of generators with renderers of their own has it."""

from __future__ import annotations

from collections.abc import Callable
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from nfldm_ns.autoencoder.scene_autoencoder import SceneAutoencoder
from nfldm_ns.choice import evenly
from nfldm_ns.errors import UserInputError
from nfldm_ns.evaluation.evaluation import progress_bars
from nfldm_ns.evaluation.scenes import flight_features
from nfldm_ns.generated.scene_files import GeneratedScene
from nfldm_ns.metrics.image_sets import REFERENCE
from nfldm_ns.metrics.images import frechet_distance
from nfldm_ns.pretrained.weights import fetch_weights, load_i3d
from nfldm_ns.scenes.collection import SceneCollection
from nfldm_ns.scenes.views import Views, index_cameras
from nfldm_ns.scenes.writing import atomic_path
from nfldm_ns.training.identity import model_hash
from shared.sampled_views import work_device

FEWEST = 2  # of which there is a covariance

Logits = Float[Tensor, "clips 400"]


class FlightJudge:
    """Fly-throughs of sampled scenes, each by its own renderer, beside those of real scenes, as a stage 1 shows them.

    Args:
        collection: of the real scenes.
        stage1: encodes and renders them; on the device to work on.
        scene_ids: of real scenes by split, `test` and `train`.
        num_scenes: of each set; less where a split has fewer.
        folder: for the logits of the real ones.

    Raises:
        UserInputError: for less than two scenes.
    """

    def __init__(
        self,
        collection: SceneCollection,
        stage1: SceneAutoencoder,
        scene_ids: dict[str, list[str]],
        num_scenes: int,
        folder: Path,
    ) -> None:
        self.collection, self.stage1, self.folder = collection, stage1, folder
        self.num_scenes = min(num_scenes, *map(len, scene_ids.values()))
        if self.num_scenes < FEWEST:
            raise UserInputError(
                f"FVD would be of {self.num_scenes} scenes, and needs {FEWEST}: sample more and give a higher "
                "--fvd-scenes, or --fvd-scenes 0."
            )
        self.scene_ids = {split: evenly(ids, self.num_scenes) for split, ids in scene_ids.items()}
        fetch_weights("i3d-kinetics-400")

    @property
    def protocol(self) -> dict[str, Any]:
        """What the distances depend on besides the collection and the generators."""
        return {"scenes": self.num_scenes, "stage1": model_hash(self.stage1)}

    @cached_property
    def i3d(self) -> nn.Module:
        return load_i3d().to(work_device())

    @cached_property
    def real(self) -> dict[str, Logits]:
        """Of real scenes by split."""
        return {
            split: kept_logits(self.folder / f"{split}.safetensors", partial(self._encoded, split))
            for split in self.scene_ids
        }

    @torch.no_grad()
    def _encoded(self, split: str) -> Logits:
        found = []
        with progress_bars() as show:
            done = show(f"Fly-throughs of {self.num_scenes} {split} scenes")
            for scene_id in self.scene_ids[split]:
                source = Views.stack([self.collection.load_scene(scene_id).source]).to(work_device())
                grid = self.stage1.encode(source)
                found.append(flight_features(self.i3d, self.stage1, grid, index_cameras(source.cameras, 0)))
                done(len(found) / self.num_scenes)
        return torch.stack(found)

    def sampled(self, scene: GeneratedScene) -> Float[Tensor, " 400"]:
        """Logits of a sampled scene, along its own cameras."""
        assert scene.cameras is not None
        if scene.cameras.shape[0] < FEWEST:
            raise UserInputError("Sampled scenes have one camera, which is no path for FVD: add --fvd-scenes 0.")
        return flight_features(self.i3d, scene.renderer, scene.grid, scene.cameras)

    def distance(self, logits: Logits) -> float:
        """FVD to the real test scenes."""
        return frechet_distance(self.real[REFERENCE], logits)

    def floor(self) -> float:
        """FVD of real training scenes: about the best there can be."""
        return self.distance(self.real["train"])


def kept_logits(path: Path, make: Callable[[], Logits]) -> Logits:
    """What lies at a path, or what `make()` gives, which is written there."""
    if not path.is_file():
        with atomic_path(path) as temporary:
            save_file({"logits": make().contiguous()}, temporary)
    return load_file(path)["logits"]
