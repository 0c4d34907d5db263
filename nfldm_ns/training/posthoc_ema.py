"""Averages of weights whose length is chosen after the training (EDM2; Karras et al. 2024, arXiv 2312.02696, Sec. 3).

While a model trains, averages of its weights by power functions are kept: after step t, with a profile's gamma,

    theta_hat(t) = (gamma + 1) / t^(gamma + 1) * integral of tau^gamma theta(tau) from 0 to t,

which `theta_hat(t) = beta theta_hat(t - 1) + (1 - beta) theta(t)` with `beta = (1 - 1 / t)^(gamma + 1)` keeps up. A
profile is named by its relative length sigma_rel, the standard deviation of that density of tau as a share of t.
Snapshots of the averages span a space; the average of any other length is the combination of snapshots whose density is
nearest to its own in the least-squares sense (their Algorithm 3).
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeAlias

import numpy as np
import torch
from jaxtyping import Float
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from nfldm_ns.errors import UserInputError
from nfldm_ns.scenes.writing import atomic_path

Numbers: TypeAlias = np.ndarray | np.float64
LONGEST = 12**-0.5  # the relative length of a plain mean, gamma = 0


def relative_length(gamma: float) -> float:
    """sigma_rel of gamma: `sqrt(gamma + 1) / ((gamma + 2) sqrt(gamma + 3))`."""
    return math.sqrt(gamma + 1) / ((gamma + 2) * math.sqrt(gamma + 3))


def power_of(length: float) -> float:
    """gamma of sigma_rel, the inverse of `relative_length` (their Algorithm 2)."""
    t = length**-2
    return float(np.roots([1, 7, 16 - t, 12 - t]).real.max())


def check_length(option: str, length: float) -> None:
    """Raises `UserInputError` for relative lengths that no power function with gamma > 0 has."""
    if not 0 < length < LONGEST:
        raise UserInputError(
            f"{option} has {length}, but relative lengths are above 0 and below {LONGEST:.3f}: give, say, 0.05."
        )


def check_profiles(lengths: Sequence[float], snapshot_every: int) -> None:
    """Raises `UserInputError` for profiles that cannot be kept."""
    for length in lengths:
        check_length("--ema-profiles", length)
    if len(set(lengths)) < len(lengths):
        raise UserInputError("--ema-profiles names a length twice: leave one of them out.")
    if snapshot_every < 0:
        raise UserInputError(f"--ema-snapshot-every is {snapshot_every}, but must be at least 0.")
    if snapshot_every and not lengths:
        raise UserInputError("--ema-snapshot-every needs averages to take snapshots of: add --ema-profiles 0.05 0.1.")


class PowerAverages:
    """Averages of a model's parameters by power functions.

    Args:
        lengths: sigma_rel of each.

    Attributes:
        averages: the averaged parameters by name, for each length.
    """

    def __init__(self, model: nn.Module, lengths: Sequence[float]) -> None:
        self.lengths = tuple(lengths)
        self.powers = [power_of(length) for length in lengths]
        self.averages = [{name: p.detach().clone() for name, p in model.named_parameters()} for _ in lengths]

    @torch.no_grad()
    def step(self, model: nn.Module, step: int) -> None:
        """Takes in the weights after a step, counted from 1."""
        parameters = dict(model.named_parameters())
        for power, average in zip(self.powers, self.averages, strict=True):
            weight = 1 - (1 - 1 / step) ** (power + 1)
            for name, value in average.items():
                value.lerp_(parameters[name].detach().to(value), weight)

    def state_dict(self) -> dict[str, Tensor]:
        """All averages, as `<index>.<parameter>`."""
        return {f"{i}.{k}": v.contiguous() for i, average in enumerate(self.averages) for k, v in average.items()}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Takes over what `state_dict` gave; KeyError if something is missing."""
        for i, average in enumerate(self.averages):
            for name, value in average.items():
                value.copy_(state[f"{i}.{name}"])

    def save_snapshot(self, folder: Path, step: int) -> None:
        """Writes what `synthesise` reads, `ema-<step>.safetensors`, whole or not at all."""
        metadata = {"step": str(step), "lengths": json.dumps(self.lengths)}
        with atomic_path(_path(folder, step)) as temporary:
            save_file(self.state_dict(), temporary, metadata)


def _path(folder: Path, step: int) -> Path:
    return folder / f"ema-{step:08d}.safetensors"


def forget_snapshots(folder: Path, step: int) -> None:
    """Removes snapshots of steps after `step`, which will be made again."""
    for path in folder.glob("ema-*.safetensors"):
        if path > _path(folder, step):
            path.unlink()


@dataclass(frozen=True)
class _Snapshot:
    """One average at one step."""

    path: Path
    index: int
    step: int
    power: float


def synthesise(folder: Path | str, length: float) -> dict[str, Float[Tensor, "*shape"]]:
    """The average of any relative length at the last snapshot, from all snapshots in a run folder.

    Args:
        length: its sigma_rel.

    Returns:
        parameters by name, in single precision.

    Raises:
        UserInputError: for a length that none has, and if there are no snapshots, or broken ones.
    """
    check_length("--ema-length", length)
    snapshots = [snapshot for path in sorted(Path(folder).glob("ema-*.safetensors")) for snapshot in _read_head(path)]
    if not snapshots:
        raise UserInputError(f"{folder} has no snapshots of averages: train with --ema-profiles 0.05 0.1.")
    weights = solve_weights(
        [s.step for s in snapshots], [s.power for s in snapshots], snapshots[-1].step, power_of(length)
    )
    return _combine(snapshots, weights)


def solve_weights(
    steps: Sequence[float], powers: Sequence[float], step: float, power: float
) -> Float[np.ndarray, " averages"]:
    """How much of each average makes the one at `step` with gamma `power` (Algorithm 3).

    Args:
        steps, powers: of the averages there are.
    """
    t, gamma = np.asarray(steps, np.float64), np.asarray(powers, np.float64)
    products = inner_product(t[:, None], gamma[:, None], t[None], gamma[None])
    wanted = inner_product(t, gamma, np.float64(step), np.float64(power))
    return np.linalg.lstsq(products, wanted, rcond=None)[0]


def inner_product(t_a: Numbers, gamma_a: Numbers, t_b: Numbers, gamma_b: Numbers) -> Numbers:
    """Inner product of two profiles' densities over the time of training; arrays that broadcast."""
    exponent = np.where(t_a < t_b, gamma_b, -gamma_a)
    numerator = (gamma_a + 1) * (gamma_b + 1) * (t_a / t_b) ** exponent
    return numerator / ((gamma_a + gamma_b + 1) * np.maximum(t_a, t_b))


def _read_head(path: Path) -> list[_Snapshot]:
    try:
        with safe_open(path, "pt") as file:
            metadata = file.metadata()
        step, lengths = int(metadata["step"]), json.loads(metadata["lengths"])
        return [_Snapshot(path, i, step, power_of(length)) for i, length in enumerate(lengths)]
    except (SafetensorError, OSError, KeyError, TypeError, ValueError) as error:
        raise _broken(path, error) from error


def _combine(snapshots: Sequence[_Snapshot], weights: Float[np.ndarray, " averages"]) -> dict[str, Tensor]:
    """Weighted sum of snapshots, one in memory at a time."""
    total: dict[str, Tensor] = {}
    for snapshot, weight in zip(snapshots, weights, strict=True):
        prefix = f"{snapshot.index}."
        try:
            with safe_open(snapshot.path, "pt") as file:
                for key in file.keys():  # noqa: SIM118  # it is no dictionary
                    if key.startswith(prefix):
                        part, name = float(weight) * file.get_tensor(key).double(), key.removeprefix(prefix)
                        total[name] = total[name] + part if name in total else part
        except (SafetensorError, OSError, RuntimeError) as error:
            raise _broken(snapshot.path, error) from error
    return {name: value.float() for name, value in total.items()}


def _broken(path: Path, error: Exception) -> UserInputError:
    why = str(error).splitlines()[0] if str(error) else type(error).__name__
    return UserInputError(f"The snapshot {path} cannot be used ({why}): delete it.")
