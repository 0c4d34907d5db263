"""nerfstudio's datamanager of stage 1: batches of scenes instead of rays."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
import torch.distributed
from nerfstudio.data.datamanagers.base_datamanager import DataManager, DataManagerConfig
from nerfstudio.data.dataparsers.base_dataparser import DataParserConfig
from nerfstudio.data.datasets.base_dataset import InputDataset

from nfldm_ns.autoencoder.scene_sampler import SceneCache, SceneSampler, SceneSamplerConfig
from nfldm_ns.scenes.collection import SceneCollection
from nfldm_ns.scenes.views import SceneBatch


@dataclass
class SceneDataManagerConfig(DataManagerConfig):
    """Configuration of `SceneDataManager`."""

    _target: type = field(default_factory=lambda: SceneDataManager)
    """target class to instantiate"""
    dataparser: DataParserConfig = field(default_factory=DataParserConfig)
    """the scene collection, and which of its scenes to show"""
    sampling: SceneSamplerConfig = field(default_factory=SceneSamplerConfig)
    """what a training batch consists of"""
    cache_gib: float = 8.0
    """memory for scenes; what does not fit is read from disk again when its turn comes"""
    num_threads: int = 4
    """threads that read scenes before training starts"""


class SceneDataManager(DataManager):
    """Gives `SceneBatch`es for training and evaluation.

    `train_dataset` and `eval_dataset` hold the source and the target views of the one scene that the viewer shows.

    Args:
        test_mode: "val" trains and validates on the splits of that name; "test" and "inference" use the test split.
        world_size, local_rank: of the processes that share each batch, unless torch.distributed knows them.
    """

    config: SceneDataManagerConfig
    collection: SceneCollection

    def __init__(
        self,
        config: SceneDataManagerConfig,
        device: torch.device | str = "cpu",
        test_mode: Literal["test", "val", "inference"] = "val",
        world_size: int = 1,
        local_rank: int = 0,
        **kwargs: Any,
    ) -> None:
        self.config = config
        self.device = device
        self.test_mode = test_mode
        self.world_size, self.rank = world_size, local_rank
        if torch.distributed.is_initialized():
            self.world_size, self.rank = torch.distributed.get_world_size(), torch.distributed.get_rank()
        if config.data is not None:
            config.dataparser.data = Path(config.data)
        else:
            config.data = config.dataparser.data
        self.dataparser = config.dataparser.setup()
        self.collection = self.dataparser.collection()
        self.collection.require_train_and_test()
        self.scenes = SceneCache(self.collection, config.cache_gib)
        self.eval_ids = self.collection.splits["val" if test_mode == "val" else "test"]
        self.show_scene(self.dataparser.scene_id(self.collection))
        super().__init__()

    def show_scene(self, scene_id: str) -> None:
        """Makes a scene the one that the viewer shows."""
        self.shown_scene_id = scene_id
        self.train_dataparser_outputs = self.dataparser.get_dataparser_outputs("train", scene_id=scene_id)
        self.train_dataset = InputDataset(self.train_dataparser_outputs)
        if self.eval_ids:  # without validation scenes the trainer skips validation
            self.eval_dataset = InputDataset(self.dataparser.get_dataparser_outputs("test", scene_id=scene_id))

    def setup_train(self) -> None:
        """Reads the training scenes; nothing where nothing is trained."""
        if self.test_mode != "val":
            return
        scene_ids = self.collection.split("train")
        self.train_batches = SceneSampler(self.scenes, scene_ids, self.config.sampling, self.world_size, self.rank)
        self.scenes.preload(scene_ids, self.config.num_threads)

    def setup_eval(self) -> None:
        """Nothing to prepare: scenes are read when they are asked for."""

    def next_train(self, step: int) -> tuple[SceneBatch, dict[str, Any]]:
        """The batch of a training step, and its target views as ground truth."""
        self.train_count += 1
        batch = self.train_batches.batch(step).to(self.device)
        return batch, {"target": batch.target}

    def next_eval(self, step: int) -> tuple[SceneBatch, dict[str, Any]]:
        """The next scenes of the validation or test split, in turn, with all their views."""
        size = min(self.config.sampling.scenes_per_batch, len(self.eval_ids))
        batch = self.eval_batch([self.eval_ids[(self.eval_count + i) % len(self.eval_ids)] for i in range(size)])
        self.eval_count += size
        return batch, {"target": batch.target}

    def next_eval_image(self, step: int) -> tuple[SceneBatch, dict[str, Any]]:
        """The next scene of the validation or test split, in turn."""
        batch = self.eval_batch([self.eval_ids[self.eval_count % len(self.eval_ids)]])
        self.eval_count += 1
        return batch, {"target": batch.target}

    def eval_batch(self, scene_ids: list[str]) -> SceneBatch:
        """Scenes with all their views, as they are on disk."""
        return self.collection.batch([self.scenes.load(scene_id) for scene_id in scene_ids]).to(self.device)

    def get_train_rays_per_batch(self) -> int:
        """Pixels rendered per training step."""
        sampling = self.config.sampling
        width, height = self.collection.image_size
        views = (sampling.num_target_views or 4) + sampling.num_extra_targets
        return sampling.scenes_per_batch * views * height * width

    def get_eval_rays_per_batch(self) -> int:
        return self.get_train_rays_per_batch()

    def get_datapath(self) -> Path:
        return self.collection.root

    def get_param_groups(self) -> dict[str, list[torch.nn.Parameter]]:
        return {}
