"""What bf16 and torch.compile do to losses and gradients, against single precision, and what they gain."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from gpu.findings import Findings
from gpu.measuring import median_seconds
from gpu.sizes import Sizes
from gpu.trainings import Training, diffusion_training, latent_training, stage1_losses

LOSS_TOLERANCE = 0.02
"""Of a loss in bf16, relative to single precision, with the same weights and draws. bf16 has 8 bits, so a number is off
by up to 0.4 %; a mean over a batch averages most of it away, and what is left is a bias of a percent at most."""
GRADIENT_COSINE = 0.95
"""Least cosine between the gradients by all weights, as vectors: below it, bf16 would train something else."""
Loss = Callable[[], tuple[float, Tensor]]


def compare_bf16(findings: Findings, device: str, sizes: Sizes) -> None:
    """Loss and gradient of each stage in bf16 and in single precision, after a few steps in the latter.

    Numbers by network: `fp32` and `bf16` (losses), `error` (`LOSS_TOLERANCE`), `cosine` (`GRADIENT_COSINE`), and
    `fp32_s`, `bf16_s` and `gain`, the seconds of a pass forward and backward, and how many times as fast bf16 is.
    """
    with findings.attempt("stage 1"):
        exact, rounded = (stage1_losses(device, sizes, precision) for precision in ("fp32", "bf16"))
        _compare(findings, "stage 1", {"fp32": exact, "bf16": rounded}, device, sizes, LOSS_TOLERANCE, GRADIENT_COSINE)
    for name, make in _networks(sizes).items():
        with findings.attempt(name):
            exact, rounded = _pair(make("fp32", None), lambda make=make: make("bf16", None), sizes)
            _compare(findings, name, {"fp32": exact, "bf16": rounded}, device, sizes, LOSS_TOLERANCE, GRADIENT_COSINE)


def compare_compiled(findings: Findings, device: str, sizes: Sizes) -> None:
    """The same of torch.compile: loss and gradient in bf16 and compiled, against single precision without a compiler.

    A compiler changes the order of sums alone, so that what is allowed is what bf16 is allowed. Numbers by network as
    in `compare_bf16` (`compiled` in the place of `bf16`), and `gain_over_bf16`: how many times as fast a pass is as one
    in bf16 without a compiler.
    """
    for name, make in _networks(sizes).items():
        with findings.attempt(name):
            exact, compiled = _pair(make("fp32", None), lambda make=make: make("bf16", sizes.backend), sizes)
            ways = {"fp32": exact, "compiled": compiled}
            _compare(findings, name, ways, device, sizes, LOSS_TOLERANCE, GRADIENT_COSINE)
            del exact, compiled, ways
            plain = make("bf16", None)
            slow = _pass_seconds(lambda plain=plain: plain.loss(0), device, sizes)
            findings.numbers[name]["gain_over_bf16"] = slow / findings.numbers[name]["compiled_s"]


def _networks(sizes: Sizes) -> dict[str, Callable[[str, str | None], Training]]:
    """What makes the trainings of stages 2 and 3, given a precision and a compiler's backend."""
    return {
        "coarse": lambda precision, backend: diffusion_training("coarse", sizes, precision, backend),
        "stage 2": lambda precision, backend: latent_training(sizes, precision, backend),
        "fine": lambda precision, backend: diffusion_training("fine", sizes, precision, backend),
    }


def _pair(first: Training, make_second: Callable[[], Training], sizes: Sizes) -> tuple[Loss, Loss]:
    """The losses of two trainings with the same weights, those of the first after a few steps."""
    for _ in range(sizes.warm_steps):
        first.step()
    second = make_second()
    second.model.load_state_dict(first.model.state_dict())
    number = sizes.warm_steps
    return lambda: first.loss(number), lambda: second.loss(number)


def _compare(
    findings: Findings,
    name: str,
    ways: dict[str, Loss],
    device: str,
    sizes: Sizes,
    tolerance: float,
    least_cosine: float,
) -> None:
    (first, exact), (second, other) = ways.items()
    expected, direction = _seeded(exact)
    found, turned = _seeded(other)
    error = abs(found - expected) / max(abs(expected), 1e-12)
    cosine = float(torch.nn.functional.cosine_similarity(direction.double(), turned.double(), dim=0))
    del direction, turned
    slow, fast = (_pass_seconds(way, device, sizes) for way in (exact, other))
    findings.numbers[name] = {
        first: expected,
        second: found,
        "error": error,
        "cosine": cosine,
        f"{first}_s": slow,
        f"{second}_s": fast,
        "gain": slow / fast,
    }
    findings.require(
        name,
        error <= tolerance,  # false of what is not finite
        f"The loss is {found:.5g} ({second}) instead of {expected:.5g} ({first}): {error:.1%} apart, {tolerance:.1%} "
        "are allowed.",
    )
    findings.require(
        f"{name}, gradient",
        cosine >= least_cosine,
        f"The gradients have a cosine of {cosine:.4f} ({second} to {first}), less than {least_cosine}.",
    )


def _seeded(loss: Loss) -> tuple[float, Tensor]:
    """With the same random numbers for whatever draws them from torch's own state."""
    torch.manual_seed(0)
    return loss()


def _pass_seconds(loss: Loss, device: str, sizes: Sizes) -> float:
    return median_seconds(loss, device, sizes.repeats, sizes.budget_s / 2)
