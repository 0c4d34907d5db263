"""Whether processes can talk through the device's library of collectives, with one process."""

from __future__ import annotations

import tempfile
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from gpu.findings import Findings
from gpu.sizes import Sizes

TIMEOUT = timedelta(seconds=20)
TOLERANCE = 1e-6
"""Largest difference of gradients of a network that is wrapped for several processes, of which there is one, from those
of the network itself: a mean over one process changes nothing."""


def communicate(findings: Findings, device: str, sizes: Sizes) -> None:
    """NCCL on CUDA, Gloo on a CPU: sums, copies and gathers of one process, and gradients as DDP means them."""
    backend = "nccl" if device == "cuda" else "gloo"
    findings.numbers["backend"] = backend
    with tempfile.TemporaryDirectory() as folder:
        with findings.attempt("start"):
            meeting = f"file://{Path(folder) / 'meeting'}"
            dist.init_process_group(backend, init_method=meeting, rank=0, world_size=1, timeout=TIMEOUT)
        if "start" in findings.failures:
            return
        try:
            with findings.attempt("collectives"):
                error = collective_error(device)
                findings.require("collectives", error == 0, f"What one process sums and copies is off by {error}.")
            with findings.attempt("gradients"):
                error = gradient_error(device)
                findings.numbers["gradient_error"] = error
                said = f"Gradients by {backend} with one process are off by {error:.1e}."
                findings.require("gradients", error <= TOLERANCE, said)
        finally:
            dist.destroy_process_group()


def collective_error(device: str) -> float:
    """Of a sum, a copy and a gathering by one process, which leave a tensor as it is."""
    values = torch.arange(1000, device=device, dtype=torch.float32)
    summed, copied, gathered = values.clone(), values.clone(), [torch.zeros_like(values)]
    dist.all_reduce(summed)
    dist.broadcast(copied, 0)
    dist.all_gather(gathered, values)
    dist.barrier()
    return max(float((found - values).abs().max()) for found in (summed, copied, *gathered))


def gradient_error(device: str) -> float:
    """Largest difference of a gradient by `DistributedDataParallel` from the network's own."""
    torch.manual_seed(0)
    network = nn.Sequential(nn.Linear(64, 64), nn.SiLU(), nn.Linear(64, 8)).to(device)
    inputs = torch.randn(16, 64, device=device)
    network(inputs).square().mean().backward()
    expected = [p.grad.clone() for p in network.parameters() if p.grad is not None]
    network.zero_grad()
    DistributedDataParallel(network)(inputs).square().mean().backward()
    found = [p.grad for p in network.parameters() if p.grad is not None]
    return max(float((a - b).abs().max()) for a, b in zip(found, expected, strict=True))
