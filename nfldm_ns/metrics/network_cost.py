"""What a training step of a network costs, counted without running it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

BYTES_PER_TRAINED_PARAMETER = 16  # the weight, its gradient and AdamW's two moments in single precision


@dataclass(frozen=True)
class NetworkCost:
    """Of one training step.

    Attributes:
        parameters: that are trained.
        flops: multiplications and additions of convolutions, matrix products and attention, forward and backward.
        activation_bytes: what autograd keeps for the backward pass.
    """

    parameters: int = 0
    flops: int = 0
    activation_bytes: int = 0

    @property
    def bytes(self) -> int:
        """Weights, gradients, optimiser and activations."""
        return BYTES_PER_TRAINED_PARAMETER * self.parameters + self.activation_bytes

    def __add__(self, other: NetworkCost) -> NetworkCost:
        return NetworkCost(
            self.parameters + other.parameters,
            self.flops + other.flops,
            self.activation_bytes + other.activation_bytes,
        )


def network_cost(module: torch.nn.Module, run: Callable[[], Tensor], backward: bool = True) -> NetworkCost:
    """Counts one call of a module whose parameters and inputs are on the `meta` device.

    Args:
        run: calls the module, and returns one tensor.
        backward: count the backward pass, too.
    """
    saved: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        if not isinstance(tensor, torch.nn.Parameter):
            storage = tensor.untyped_storage()  # views share theirs
            saved[storage._cdata] = storage.nbytes()
        return tensor

    with FlopCounterMode(display=False) as counter:
        if backward:
            with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
                result = run()
            result.sum().backward()
        else:
            with torch.no_grad():
                run()
    parameters = sum(p.numel() for p in module.parameters() if p.requires_grad)
    return NetworkCost(parameters, counter.get_total_flops(), sum(saved.values()))
