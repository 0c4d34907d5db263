"""nerfstudio's pipeline of stage 1."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
import torch.distributed as dist
from nerfstudio.pipelines.base_pipeline import VanillaPipeline, VanillaPipelineConfig
from nerfstudio.viewer.viewer_elements import ViewerDropdown
from rich.progress import track
from torch.nn.parallel import DistributedDataParallel

from nfldm_ns.autoencoder.model_configs import check_state
from nfldm_ns.errors import BAD_INPUT_EXIT_CODE, UserInputError, exit_on_bad_input
from nfldm_ns.plugin.scene_ae_datamanager import SceneDataManager, SceneDataManagerConfig
from nfldm_ns.plugin.scene_ae_model import SceneAutoencoderModel, SceneAutoencoderModelConfig
from nfldm_ns.plugin.viewer_start import FirstView
from nfldm_ns.scenes.collection import SPLITS, SceneCollection
from nfldm_ns.scenes.views import SceneBatch


@dataclass
class SceneAutoencoderPipelineConfig(VanillaPipelineConfig):
    """Configuration of `SceneAutoencoderPipeline`."""

    _target: type = field(default_factory=lambda: SceneAutoencoderPipeline)
    """target class to instantiate"""
    datamanager: SceneDataManagerConfig = field(default_factory=SceneDataManagerConfig)
    """specifies the datamanager config"""
    model: SceneAutoencoderModelConfig = field(default_factory=SceneAutoencoderModelConfig)
    """specifies the model config"""


class SceneAutoencoderPipeline(VanillaPipeline):
    """Batches of scenes into the model, the chosen scene into the viewer, novel views into numbers."""

    config: SceneAutoencoderPipelineConfig
    datamanager: SceneDataManager
    model: SceneAutoencoderModel  # type: ignore[assignment]
    _model: torch.nn.Module  # the same, wrapped if there are several processes

    @exit_on_bad_input()
    def __init__(
        self,
        config: SceneAutoencoderPipelineConfig,
        device: str,
        test_mode: Literal["test", "val", "inference"] = "val",
        world_size: int = 1,
        local_rank: int = 0,
        grad_scaler: Any = None,
    ) -> None:
        super().__init__(config, device, test_mode, 1, local_rank, grad_scaler)
        self.world_size = world_size
        if world_size > 1:  # not left to nerfstudio, whose way needs CUDA
            cuda = torch.device(device).type == "cuda"
            self._model = DistributedDataParallel(
                self._model, device_ids=[local_rank] if cuda else None, find_unused_parameters=True
            )
        if test_mode == "val":
            self.model.prepare_training()
        labels = scene_labels(self.datamanager.collection)
        shown = self.datamanager.shown_scene_id
        self.viewer_control = FirstView(lambda: self.datamanager.train_dataset.cameras)
        self.scene_dropdown = ViewerDropdown(
            "Scene",
            next(label for label, scene_id in labels.items() if scene_id == shown),
            list(labels),
            cb_hook=lambda dropdown: self.show_scene(labels[dropdown.value]),
            hint="Encoded from its source views",
        )
        self.show_scene(shown)

    @exit_on_bad_input()
    def show_scene(self, scene_id: str) -> None:
        """Encodes a scene for the viewer, and draws its source cameras there."""
        self.model.show(self.datamanager.eval_batch([scene_id]).source)
        if scene_id == self.datamanager.shown_scene_id:
            return
        self.datamanager.show_scene(scene_id)
        viewer = getattr(self.viewer_control, "viewer", None)
        if viewer is not None and hasattr(viewer, "camera_handles"):
            for handle in viewer.camera_handles.values():
                handle.remove()
            viewer.init_scene(self.datamanager.train_dataset, viewer.train_state)

    @exit_on_bad_input()
    def get_train_loss_dict(self, step: int) -> tuple[Any, dict[str, Any], dict[str, Any]]:
        """Losses of a step's batch.

        Ends all processes with a sentence, before the weights have changed, if a loss of one of them is not finite.
        """
        outputs, losses, metrics = super().get_train_loss_dict(step)
        finite = torch.stack(list(losses.values())).isfinite().tolist()
        broken = [name for name, is_finite in zip(losses, finite, strict=True) if not is_finite]
        anywhere = self._on_any_rank(bool(broken))
        if broken:
            raise diverged(broken, step, self.datamanager.train_batches.batch_ids(step))
        if anywhere:
            raise SystemExit(BAD_INPUT_EXIT_CODE)  # the process with that loss says so
        return outputs, losses, metrics

    def _on_any_rank(self, here: bool) -> bool:
        if self.world_size == 1:
            return here
        flag = torch.tensor(float(here), device=self.device)
        dist.all_reduce(flag, dist.ReduceOp.MAX)
        return bool(flag)

    @exit_on_bad_input()
    @torch.no_grad()
    def get_eval_loss_dict(self, step: int) -> tuple[Any, dict[str, Any], dict[str, Any]]:
        return super().get_eval_loss_dict(step)

    @exit_on_bad_input()
    @torch.no_grad()
    def get_eval_image_metrics_and_images(self, step: int) -> tuple[dict[str, float], dict[str, Any]]:
        """PSNR of the next validation scene, and its views."""
        self.eval()
        batch, truth = self.datamanager.next_eval_image(step)
        metrics, images = self.model.get_image_metrics_and_images(self.model(batch), truth)
        metrics["num_rays"] = truth["target"].images[..., 0, :, :].numel()
        self.train()
        return metrics, images

    @exit_on_bad_input()
    def get_average_eval_image_metrics(
        self, step: int | None = None, output_path: Path | None = None, get_std: bool = False
    ) -> dict[str, float]:
        """Novel views of all scenes of the test split (validation split in training), see `evaluate_novel_views`."""
        from nfldm_ns.autoencoder.novel_views import (
            MEAN_IMAGE_SCENES,
            evaluate_novel_views,
            mean_training_image,
            reconstruct,
        )
        from nfldm_ns.pretrained.weights import load_lpips

        lpips = load_lpips("vgg").to(self.device)
        train_ids = self.datamanager.collection.split("train")
        every = -(-len(train_ids) // MEAN_IMAGE_SCENES)
        mean = mean_training_image(self._batches(train_ids[::every], "Mean image"))
        if output_path is not None:
            output_path.mkdir(parents=True, exist_ok=True)
        self.eval()
        results = evaluate_novel_views(
            partial(reconstruct, self.model.autoencoder),
            self._batches(self.datamanager.eval_ids, "Novel views"),
            mean,
            lpips,
            output_path,
        )
        self.train()
        return results

    def _batches(self, scene_ids: list[str], description: str) -> Iterator[SceneBatch]:
        for scene_id in track(scene_ids, description, transient=True):
            yield self.datamanager.eval_batch([scene_id])

    @exit_on_bad_input()
    def load_pipeline(self, loaded_state: dict[str, Any], step: int) -> None:
        """Loads a checkpoint, which must be of this very configuration."""
        prefix = "_model."
        state = {key.removeprefix("module."): value for key, value in loaded_state.items()}
        model_state = {
            key.removeprefix(prefix).removeprefix("module."): value
            for key, value in state.items()
            if key.startswith(prefix)
        }
        check_state(self.model, model_state, f"The checkpoint of step {step}")
        super().load_pipeline(loaded_state, step)


def diverged(what: Sequence[str], step: int, scene_ids: Sequence[str]) -> UserInputError:
    """What to say of values that are not finite."""
    are = "is" if len(what) == 1 else "are"
    return UserInputError(
        f"The training diverged at step {step}: {_listed(what)} {are} not finite for the scenes "
        f"{', '.join(scene_ids)}; look at their images and depths, or resume from the last checkpoint with a smaller "
        "learning rate."
    )


def scene_labels(collection: SceneCollection) -> dict[str, str]:
    """Scene ids by what a list of them shows, held-out scenes first."""
    return {f"{scene_id} ({split})": scene_id for split in reversed(SPLITS) for scene_id in collection.splits[split]}


def _listed(names: Sequence[str]) -> str:
    *most, last = names
    return f"{', '.join(most)} and {last}" if most else last
