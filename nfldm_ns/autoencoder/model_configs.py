"""Models and schedulers of the configurations that diffusers saved, which may be damaged or of other weights."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping
from functools import cache
from inspect import signature
from pathlib import Path
from typing import Any, TypeVar, get_type_hints

import torch
from diffusers import FlowMatchEulerDiscreteScheduler, FlowMatchHeunDiscreteScheduler, SchedulerMixin
from pydantic import BaseModel, ConfigDict, create_model
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from nfldm_ns.errors import UserInputError
from nfldm_ns.scenes.collection import read_json
from nfldm_ns.scenes.schema import shown, validated_json

LARGEST_SIZE = 2**20  # of any whole number in a configuration
MOST_LAYERS = 1000
COUNTS = ("layers", "blocks", "refinement_steps")  # what keys end with whose numbers are of layers
FLOW_SCHEDULERS = (FlowMatchEulerDiscreteScheduler, FlowMatchHeunDiscreteScheduler)
INITIALISERS = "torch.nn.init"
RANDOM = ("rand", "randn")
SCALED = ("add", "div", "mul", "neg", "sub", "__mul__", "__radd__", "__rmul__", "rmul", "__truediv__")
FIRST_VALUES = ("fill_", "normal_", "uniform_", "zero_")
PREDICTIONS = ("epsilon", "sample", "v_prediction")
Model = TypeVar("Model", bound=nn.Module)
Scheduler = TypeVar("Scheduler", bound=SchedulerMixin)


def build_model(
    cls: type[Model],
    config: Any,
    path: Path,
    state: Mapping[str, Tensor],
    weights: Path,
    part: Callable[[Model], Model] = lambda model: model,
) -> Model:
    """A model of a configuration with weights that must be exactly those it asks for; on the CPU, in evaluation mode.

    It is built without memory first: a damaged configuration can ask for more than there is.

    Args:
        path: the file of `config`.
        weights: the file of `state`.
        part: what of the model the weights are of.

    Raises:
        UserInputError: if a value is of a wrong kind, sizes do not go together, or the weights are those of others.
    """
    if not isinstance(config, dict) or config.get("_class_name") != cls.__name__:
        raise UserInputError(f"{path} does not describe a {cls.__name__}: restore it, or give another folder.")
    values = known_values(cls, config, path)
    try:
        with torch.device("meta"), _WithoutValues():
            check_state(part(cls(**values)), state, weights)
        model = part(cls(**values))
    except UserInputError:
        raise
    except Exception as error:  # layers whose sizes do not go together fail in many ways
        raise UserInputError(f"{path} does not describe a {cls.__name__} ({reason(error)}): restore it.") from None
    wrong = next((name for name, value in state.items() if not bool(value.isfinite().all())), None)
    if wrong is not None:
        raise UserInputError(f"{weights} is damaged ({wrong} has NaN or infinity): restore it or make it again.")
    model.load_state_dict(dict(state))
    return model.eval()


class _WithoutValues(TorchFunctionMode):
    """Leaves out what gives tensors without memory their first values, for which torch would import its compiler."""

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        name = getattr(func, "__name__", "")
        if name in RANDOM:
            return torch.empty(*args, **{key: value for key, value in kwargs.items() if key != "generator"})
        tensor = kwargs.get("out", args[0] if args else kwargs.get("tensor"))
        if not (isinstance(tensor, Tensor) and tensor.is_meta):
            return func(*args, **kwargs)
        if name in FIRST_VALUES or getattr(func, "__module__", "") == INITIALISERS or "out" in kwargs:
            return tensor
        if name in SCALED and not any(isinstance(value, Tensor) for value in args[1:]):
            return torch.empty(tensor.shape, dtype=tensor.dtype)
        return func(*args, **kwargs)


def check_state(module: torch.nn.Module, state: Mapping[str, Tensor], where: Path | str) -> None:
    """Raises `UserInputError` unless the tensors are exactly those of the module, by name and shape."""
    expected = {key: tuple(value.shape) for key, value in module.state_dict().items()}
    found = {key: tuple(value.shape) for key, value in state.items()}
    for key in [*expected, *found]:
        if expected.get(key) != found.get(key):
            here, there = (str(list(shapes[key])) if key in shapes else "missing" for shapes in (expected, found))
            raise UserInputError(
                f"{where} is of another preset or version ({key} is {there} there, but {here} in this configuration): "
                "choose the method and sizes it was trained with."
            )


def read_scheduler(cls: type[Scheduler], path: Path) -> Scheduler:
    """A scheduler of diffusers.

    Raises:
        UserInputError: if its file is missing or damaged, or what it says makes no schedule.
    """
    config = read_json(path)
    if not isinstance(config, dict):
        raise UserInputError(f"{path} does not describe a scheduler: restore it or make it again.")
    _check_sizes(config, path)
    try:
        scheduler = cls.from_config(config)
        flow = isinstance(scheduler, FLOW_SCHEDULERS)
        noise = torch.as_tensor(scheduler.sigmas if flow else scheduler.alphas_cumprod)
        copy.deepcopy(scheduler).set_timesteps(10)  # some values count only then
    except Exception as error:  # whatever kinds of values diffusers stumbles over
        raise UserInputError(f"{path} does not describe a {cls.__name__} ({reason(error)}): restore it.") from None
    if not len(noise) or not bool(((noise >= 0) & (noise <= 1)).all()):
        raise UserInputError(f"The noise that {path} describes cannot be: restore it.")
    prediction = scheduler.config.get("prediction_type")
    if not flow and prediction not in PREDICTIONS:
        known = ", ".join(PREDICTIONS)
        raise UserInputError(f"prediction_type in {path} is {shown(prediction)}, not one of {known}: restore it.")
    return scheduler


def known_values(cls: type, config: Any, path: Path) -> dict[str, Any]:
    """What a configuration says of a model's arguments.

    Raises:
        UserInputError: for values of another kind than the model's constructor says, and for sizes that cannot be.
    """
    values = validated_json(_schema(cls), config, path, "restore it or make it again").model_dump(exclude_unset=True)
    _check_sizes(values, path)
    return values


def _check_sizes(values: dict[str, Any], path: Path) -> None:
    for key, number in _numbers(values):
        if abs(number) > (MOST_LAYERS if key.endswith(COUNTS) else LARGEST_SIZE):
            raise UserInputError(f"{key} in {path} is {shown(number)}, which cannot be: restore it.")


@cache
def _schema(cls: type) -> type[BaseModel]:
    init = cls.__init__  # type: ignore[misc]
    hints = get_type_hints(init)
    fields: dict[str, Any] = {
        name: (hints[name], ... if parameter.default is parameter.empty else parameter.default)
        for name, parameter in signature(init).parameters.items()
        if name in hints
    }
    config = ConfigDict(extra="ignore", strict=True, allow_inf_nan=False, protected_namespaces=())
    return create_model(cls.__name__, __config__=config, **fields)


def _numbers(values: Any, key: str = "") -> Iterator[tuple[str, int]]:
    """All whole numbers, with the keys that they stand under."""
    if isinstance(values, dict):
        for name, value in values.items():
            yield from _numbers(value, name)
    elif isinstance(values, (list, tuple)):
        for value in values:
            yield from _numbers(value, key)
    elif isinstance(values, int):
        yield key, values


def reason(error: Exception) -> str:
    """The first line of what a library said."""
    return next(iter(str(error).strip().splitlines()), type(error).__name__)
