"""What a call of the pipeline must not be."""

from __future__ import annotations

import math
from collections.abc import Sequence
from numbers import Integral, Real
from typing import Any

import torch
from diffusers import DPMSolverMultistepScheduler, FlowMatchEulerDiscreteScheduler
from torch import Tensor

from nfldm_ns.diffusion.flow import FLOW_SCHEDULERS, initial_scale, samples_flows

LATENTS = ("g", "c", "f")
SPREAD_LIMIT = 5.0  # of sampled latents, whose standard deviation is about 1 in the units that are diffused
OWN_SCHEDULERS = (DPMSolverMultistepScheduler, FlowMatchEulerDiscreteScheduler)  # that generators come with
OTHER_FLOWS = ("invert_sigmas", "use_dynamic_shifting")  # what flows of other models ask of their schedulers
SCHEDULER_PARTS = ("set_timesteps", "step", "scale_model_input", "add_noise", "init_noise_sigma")


def check_count(name: str, value: Any) -> int:
    """A whole number of at least 1.

    Raises:
        TypeError: if it is no whole number.
        ValueError: if it is less than 1.
    """
    if isinstance(value, bool) or not isinstance(value, Integral):
        raise TypeError(f"{name} is {value!r}, but must be a whole number")
    if value < 1:
        raise ValueError(f"{name} is {value}, but must be at least 1")
    return int(value)


def check_seed(name: str, seed: int, count: int = 1) -> None:
    """Raises `ValueError` unless torch's generators take `count` seeds from `seed` on."""
    if not 0 <= seed < 2**64 - count:
        raise ValueError(f"{name} is {seed}, but must be at least 0 and below 2**64")


def check_steps(num_inference_steps: Any, name: str = "num_inference_steps") -> list[int]:
    """Denoising steps of g, c and f, given as one number or as three; errors as of `check_count`."""
    if isinstance(num_inference_steps, Sequence) and not isinstance(num_inference_steps, str):
        if len(num_inference_steps) != len(LATENTS):
            raise ValueError(
                f"{name} must be one number for all or one each of {', '.join(LATENTS)}, not {len(num_inference_steps)}"
            )
        return [check_count(name, value) for value in num_inference_steps]
    return [check_count(name, num_inference_steps)] * len(LATENTS)


def check_generator(generator: Any, num_scenes: int) -> None:
    """None, one generator for all scenes, or one each.

    Raises:
        TypeError: for anything else, such as a seed.
        ValueError: for another number of generators.
    """
    if generator is None or isinstance(generator, torch.Generator):
        return
    several = isinstance(generator, Sequence) and all(isinstance(each, torch.Generator) for each in generator)
    if not several:
        raise TypeError(
            f"generator is {generator!r}, but must be a torch.Generator, or a list of one per scene: seed one by "
            "torch.Generator().manual_seed(seed)"
        )
    if len(generator) != num_scenes:
        raise ValueError(f"{len(generator)} generators were given for {num_scenes} scenes")


def check_factors(name: str, factors: Any) -> tuple[float, ...]:
    """Factors of g, c and f.

    Args:
        name: of the argument.

    Raises:
        TypeError: if they are no numbers.
        ValueError: if they are not three, or negative or not finite.
    """
    if not isinstance(factors, Sequence) or isinstance(factors, str):
        raise TypeError(f"{name} are {factors!r}, but must be three numbers, of {', '.join(LATENTS)}")
    if len(factors) != len(LATENTS):
        raise ValueError(f"{name} must be three, of {', '.join(LATENTS)}, not {len(factors)}")
    if not all(isinstance(value, Real) for value in factors):
        raise TypeError(f"{name} are {list(factors)}, but must be numbers")
    if not all(math.isfinite(value) and value >= 0 for value in factors):
        raise ValueError(f"{name} are {list(factors)}, but must be finite and at least 0")
    return tuple(float(value) for value in factors)


def check_scheduler(scheduler: Any, flow: bool = False) -> None:
    """Raises `ValueError` for schedulers of another kind of diffusion than the denoisers learned.

    Args:
        flow: whether they were trained for flows.
    """
    missing = [name for name in SCHEDULER_PARTS if not hasattr(scheduler, name)]
    of_sigmas = "sigma_data" in scheduler.config
    if flow and not samples_flows(scheduler):
        raise ValueError(
            f"{type(scheduler).__name__} samples no flow, but the denoisers were trained for flows: {_FLOW_REMEDY}"
        )
    other = next((name for name in OTHER_FLOWS if flow and scheduler.config.get(name)), None)
    if other is not None:
        raise ValueError(
            f"{type(scheduler).__name__} has {other}, so its times are not those that the denoisers learned: make it "
            "from_config of the scheduler that the pipeline was saved with"
        )
    if not flow and (missing or of_sigmas):
        why = f"has no {missing[0]}" if missing else "has noise levels instead of timesteps"
        raise ValueError(
            f"{type(scheduler).__name__} {why}, so it samples another kind of diffusion than the denoisers learned: "
            f"{_REMEDY}"
        )


_REMEDY = "take DPMSolverMultistepScheduler, UniPCMultistepScheduler, DDIMScheduler or EulerDiscreteScheduler"
_FLOW_REMEDY = f"take {' or '.join(cls.__name__ for cls in FLOW_SCHEDULERS)}"


def _remedy(scheduler: Any) -> str:
    return _FLOW_REMEDY if samples_flows(scheduler) else _REMEDY


def check_start(scheduler: Any, noise: Tensor, latent: str) -> None:
    """Raises `ValueError` unless the noise that one latent begins with is finite."""
    if not bool(noise.isfinite().all()):
        raise ValueError(
            f"{type(scheduler).__name__} begins {latent} with noise of scale {float(initial_scale(scheduler)):g}, "
            f"which is more than {noise.dtype} holds: {_remedy(scheduler)}, or sample in single precision"
        )


def check_sampled(scheduler: Any, latents: Tensor, latent: str) -> None:
    """Raises `ValueError` if what was sampled is not finite, or is noise.

    The samplers that generators come with may end at any spread: then denoisers that are hardly trained are the reason.

    Args:
        latents: in the units that are diffused, in which trained ones have a standard deviation of about 1.
    """
    spread = float(latents.detach().float().square().mean().sqrt()) if latents.numel() else 0.0
    own = isinstance(scheduler, OWN_SCHEDULERS)
    if not spread <= (math.inf if own else SPREAD_LIMIT) or math.isinf(spread):
        raise ValueError(
            f"{type(scheduler).__name__} ended {latent} at a spread of {spread:.3g}, where scenes have about 1: it "
            f"does not fit the denoisers' noise schedule; {_remedy(scheduler)}"
        )
