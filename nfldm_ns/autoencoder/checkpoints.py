"""Trained auto-encoders on disk, as the later stages read them: safetensors and JSON."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
import yaml
from safetensors import SafetensorError, safe_open
from torch import Tensor

from nfldm_ns.autoencoder.model_configs import build_model, check_state, reason
from nfldm_ns.autoencoder.scene_autoencoder import SceneAutoencoder
from nfldm_ns.errors import UserInputError
from nfldm_ns.models import resolve_model
from nfldm_ns.scenes.collection import read_json
from nfldm_ns.scenes.writing import atomic_path

FOLDER = "scene_autoencoder"
REFINEMENT = ("refinement_channels", "refinement_steps")
WEIGHTS = "diffusion_pytorch_model.safetensors"
RECORD = "training.json"


def save_scene_autoencoder(autoencoder: SceneAutoencoder, run: Path, record: Mapping[str, Any]) -> Path:
    """Writes `<run>/scene_autoencoder/` in one step.

    Args:
        run: the folder of a nerfstudio run.
        record: what is to be known about the training, as JSON.
    """
    folder = run / FOLDER
    with atomic_path(folder) as temporary:
        write_scene_autoencoder(autoencoder, temporary, record)
    return folder


def write_scene_autoencoder(autoencoder: SceneAutoencoder, folder: Path, record: Mapping[str, Any]) -> None:
    """Fills a new folder as `save_scene_autoencoder` does, file by file."""
    autoencoder.save_pretrained(folder)
    (folder / RECORD).write_text(json.dumps(dict(record), indent=1) + "\n", encoding="utf-8")


def scene_autoencoder_folder(path: Path | str) -> Path:
    """The folder with the weights, from that folder, a run's folder or config.yml, or a shipped model's name.

    Raises:
        UserInputError: if there is none.
    """
    path = resolve_model(path)
    if not path.exists():
        raise UserInputError(f"There is no trained scene auto-encoder at {path}: give the config.yml of its run.")
    run = path.parent if path.is_file() else path
    for folder in (run / FOLDER, run):
        if (folder / "config.json").is_file():
            return folder
    raise UserInputError(
        f"{run} has no {FOLDER} folder, so no checkpoint was saved there: train with 'ns-train nfldm-scene-ae' first."
    )


def load_scene_autoencoder(path: Path | str) -> SceneAutoencoder:
    """A trained auto-encoder, in evaluation mode on the CPU.

    Args:
        path: a run's `config.yml`, its folder, or its `scene_autoencoder` folder.

    Raises:
        UserInputError: if it is missing, truncated, or its weights are not those of its config.
    """
    folder = scene_autoencoder_folder(path)
    config, weights = folder / "config.json", folder / WEIGHTS
    return build_model(SceneAutoencoder, read_json(config), config, read_safetensors(weights), weights)


def read_training_record(path: Path | str) -> dict[str, Any]:
    """What the training of an auto-encoder wrote down: `data`, `method`, `step`, `seconds`, ... (empty if nothing)."""
    record = scene_autoencoder_folder(path) / RECORD
    return read_json(record) if record.is_file() else {}


def read_run_config(path: Path | str) -> dict[str, Any]:
    """The `config.yml` of an auto-encoder's run as plain values: nothing it names is imported or called.

    Raises:
        UserInputError: if it is missing or not YAML.
    """
    folder = scene_autoencoder_folder(path)
    config = (folder.parent if folder.name == FOLDER else folder) / "config.yml"
    try:
        content = yaml.load(config.read_text(encoding="utf-8"), Loader=_PlainValues)
    except FileNotFoundError:
        raise UserInputError(f"{config} is missing: give the folder of a whole run.") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserInputError(f"{config} is damaged ({error}): restore it or train again.") from None
    if not isinstance(content, dict):
        raise UserInputError(f"{config} does not describe a run: restore it or train again.")
    return content


class _PlainValues(yaml.SafeLoader):
    """Reads objects of any class as dicts, lists and strings."""

    def construct_object_of_any_class(self, _: str, node: yaml.Node) -> Any:
        if isinstance(node, yaml.MappingNode):
            return self.construct_mapping(node, deep=True)
        if isinstance(node, yaml.SequenceNode):
            return self.construct_sequence(node, deep=True)
        return self.construct_scalar(node)


_PlainValues.add_multi_constructor("tag:yaml.org,2002:python/", _PlainValues.construct_object_of_any_class)


def read_safetensors(path: Path) -> dict[str, Tensor]:
    """All tensors of a file; `UserInputError` if it is missing or truncated."""
    if not path.is_file():
        raise UserInputError(f"{path} is missing: restore it or make it again.")
    try:
        with safe_open(path, framework="pt") as file:
            return {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 (not a dict)
    except (SafetensorError, OSError, ValueError, RuntimeError) as error:
        raise UserInputError(f"{path} is damaged ({reason(error)}): restore it or make it again.") from None


def holds_tensors(path: Path, names: Iterable[str]) -> bool:
    """Whether there is a whole safetensors file with tensors of these names."""
    try:
        with safe_open(path, framework="pt") as file:
            return set(names) <= set(file.keys())
    except (SafetensorError, OSError):
        return False


def stored_half(values: Tensor) -> Tensor:
    """Values as files keep them in half precision, those beyond its range at its ends; on the CPU."""
    largest = torch.finfo(torch.float16).max
    return values.clamp(-largest, largest).half().cpu().contiguous()


def weights_name(name: str, variant: str | None) -> str:
    """As diffusers names the weights of a variant: `diffusion_pytorch_model.fp16.safetensors`."""
    return name if variant is None else f".{variant}.".join(name.rsplit(".", 1))


def read_weights(path: Path) -> dict[str, Tensor]:
    """All tensors of a model that diffusers saved, in one file or in several with an index beside them.

    Raises:
        UserInputError: if a file is missing, truncated, or not of this folder.
    """
    stem, *variant = path.name.removesuffix(".safetensors").split(".", 1)
    index = path.with_name(".".join([stem, "safetensors.index", *variant, "json"]))
    if path.is_file() or not index.is_file():
        return read_safetensors(path)
    content = read_json(index)
    parts = content.get("weight_map") if isinstance(content, dict) else None
    if not isinstance(parts, dict) or not all(isinstance(n, str) and Path(n).name == n for n in parts.values()):
        raise UserInputError(f"{index} does not say which file has which weights: save the model again.")
    tensors: dict[str, Tensor] = {}
    for name in sorted(set(parts.values())):
        tensors |= read_safetensors(index.with_name(name))
    return tensors


def load_exactly(module: torch.nn.Module, state: Mapping[str, Tensor], where: Path | str) -> None:
    """Loads tensors that must be exactly those of the module; `UserInputError` otherwise."""
    check_state(module, state, where)
    module.load_state_dict(dict(state))


def learned_refinement(path: Path | str) -> dict[str, Any]:
    """The options of `SceneAutoencoder` that say which refinement a trained one has: for what begins from it.

    Args:
        path: as `scene_autoencoder_folder` takes it.

    Raises:
        UserInputError: if there is none.
    """
    config = read_json(scene_autoencoder_folder(path) / "config.json")
    return {name: int(config[name]) for name in REFINEMENT} if config.get(REFINEMENT[0]) else {}


def load_initial_weights(autoencoder: SceneAutoencoder, state: Mapping[str, Tensor], where: Path | str) -> None:
    """Loads the weights of an auto-encoder of the same sizes, which may lack the refinement that this one has.

    Raises:
        UserInputError: if any other tensor is missing or of another shape.
    """
    state = dict(state)
    if autoencoder.refiner is not None and not any(key.startswith("refiner.") for key in state):
        state.update({f"refiner.{key}": value for key, value in autoencoder.refiner.state_dict().items()})
    load_exactly(autoencoder, state, where)
