"""Vector quantisation with codebooks kept by moving averages."""

from __future__ import annotations

from collections import deque
from contextlib import nullcontext

import torch
import torch.distributed as dist
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

KMEANS_ITERATIONS = 10
KMEANS_SAMPLES_PER_CODE = 32
DEAD_CODE_SHARE = 0.02  # a code used less than this share of its fair part is moved to where data is


class VectorQuantizer(nn.Module):
    """A codebook shared by all groups of `code_dim` channels of a latent.

    The codes are moving averages of the vectors nearest to them, and gradients pass straight through (VQ-VAE with
    exponential moving averages). Codes that fall out of use are moved to random vectors of the batch. Distances are one
    matrix product and sums one scatter, without one-hot matrices; both are computed in single precision, also under
    autocast.

    Args:
        code_dim: channels per code; with several groups this is product quantisation.
        num_codes: size of the codebook.
        decay: of the moving averages.

    Attributes:
        frozen: whether the codes stay as they are in training, too.
    """

    codes: Float[Tensor, "codes dim"]
    usage: Float[Tensor, " codes"]
    sums: Float[Tensor, "codes dim"]

    def __init__(self, code_dim: int, num_codes: int, decay: float = 0.95) -> None:
        super().__init__()
        self.code_dim = code_dim
        self.num_codes = num_codes
        self.decay = decay
        self.frozen = False
        self.register_buffer("codes", torch.randn(num_codes, code_dim))
        self.register_buffer("usage", torch.ones(num_codes))
        self.register_buffer("sums", self.codes.clone())

    def forward(
        self, latent: Float[Tensor, "batch channels *space"], move: bool = True
    ) -> tuple[Float[Tensor, "batch channels *space"], Int[Tensor, "batch groups *space"], Float[Tensor, ""]]:
        """Quantises each group of channels; in training mode also moves the codes.

        Args:
            move: False leaves the codes where they are.

        Returns:
            the quantised latent, the codes' indices, and the commitment loss: the mean squared distance to the codes.
        """
        device = latent.device.type
        with torch.autocast(device, enabled=False) if torch.amp.is_autocast_available(device) else nullcontext():
            return self._quantise(latent.float(), move)

    def _quantise(self, latent: Tensor, move: bool) -> tuple[Tensor, Tensor, Tensor]:
        groups = latent.unflatten(1, (-1, self.code_dim)).movedim(2, -1)
        vectors = groups.reshape(-1, self.code_dim)
        indices = self.nearest(vectors.detach())
        quantised = F.embedding(indices, self.codes)
        loss = F.mse_loss(vectors, quantised)
        if move and self.training and not self.frozen and torch.is_grad_enabled():
            self._update(vectors.detach(), indices)
        passed = vectors + (quantised - vectors).detach()
        passed = passed.reshape(groups.shape).movedim(-1, 2).flatten(1, 2)
        return passed, indices.reshape(groups.shape[:-1]), loss

    def nearest(self, vectors: Float[Tensor, "count dim"]) -> Int[Tensor, " count"]:
        """Index of the nearest code of each vector."""
        half_squares = 0.5 * self.codes.square().sum(dim=1)
        return torch.addmm(half_squares, vectors, self.codes.T, alpha=-1).argmin(dim=1)

    def count(self, indices: Int[Tensor, "*shape"]) -> Int[Tensor, " codes"]:
        """How often each code occurs."""
        return torch.bincount(indices.flatten(), minlength=self.num_codes)

    def fit(self, latent: Float[Tensor, "batch channels *space"]) -> None:
        """Sets the codes to k-means centres of a latent's groups (of a random share of them, if there are many)."""
        vectors = latent.unflatten(1, (-1, self.code_dim)).movedim(2, -1).reshape(-1, self.code_dim)
        if len(vectors) > KMEANS_SAMPLES_PER_CODE * self.num_codes:
            vectors = vectors[
                torch.randperm(len(vectors))[: KMEANS_SAMPLES_PER_CODE * self.num_codes].to(vectors.device)
            ]
        pick = torch.randint(len(vectors), (self.num_codes,), device=vectors.device)
        self.codes.copy_(vectors[pick])
        for _ in range(KMEANS_ITERATIONS):
            usage, sums = self._assign(vectors, self.nearest(vectors))
            self.codes.copy_(torch.where(usage[:, None] > 0, sums / usage.clamp(min=1)[:, None], self.codes))
        self.usage.copy_(usage)
        self.sums.copy_(self.codes * usage[:, None])

    def _assign(self, vectors: Tensor, indices: Tensor) -> tuple[Float[Tensor, " codes"], Float[Tensor, "codes dim"]]:
        """Number and sum of the vectors of each code."""
        usage = self.count(indices).to(vectors.dtype)
        return usage, torch.zeros_like(self.codes).index_add_(0, indices, vectors)

    @torch.no_grad()
    def _update(self, vectors: Float[Tensor, "count dim"], indices: Int[Tensor, " count"]) -> None:
        usage, sums = self._assign(vectors, indices)
        if dist.is_initialized():  # unlike in `fit`, where all processes have the same vectors
            dist.all_reduce(usage)
            dist.all_reduce(sums)
        self.usage.lerp_(usage, 1 - self.decay)
        self.sums.lerp_(sums, 1 - self.decay)
        self.codes.copy_(self.sums / self.usage.clamp(min=1e-5)[:, None])
        self._revive(vectors)

    def _revive(self, vectors: Float[Tensor, "count dim"]) -> None:
        fair = self.usage.sum() / self.num_codes
        dead = self.usage < DEAD_CODE_SHARE * fair
        replacements = vectors[torch.randint(len(vectors), (self.num_codes,), device=vectors.device)]
        if dist.is_initialized():
            dist.broadcast(replacements, 0)
        self.codes.copy_(torch.where(dead[:, None], replacements, self.codes))
        self.usage.copy_(torch.where(dead, fair, self.usage))
        self.sums.copy_(torch.where(dead[:, None], replacements * fair, self.sums))


class CodebookUsage:
    """How many codes of a codebook occur, and how evenly, over the last batches.

    Args:
        window: how many batches; None takes all.
    """

    def __init__(self, window: int | None = None) -> None:
        self._batches: deque[Int[Tensor, " codes"]] = deque(maxlen=window)

    def add(self, counts: Int[Tensor, " codes"]) -> None:
        """Adds what `VectorQuantizer.count` gives for a batch."""
        self._batches.append(counts)

    @property
    def counts(self) -> Int[Tensor, " codes"]:
        """How often each code occurred."""
        return torch.stack(list(self._batches)).sum(0)

    @property
    def share(self) -> Float[Tensor, ""]:
        """Share of the codes that occurred at all, in [0, 1]."""
        return (self.counts > 0).float().mean()

    @property
    def perplexity(self) -> Float[Tensor, ""]:
        """Exponential of the entropy of the codes' frequencies: the number of codes if all occurred equally often."""
        counts = self.counts.double()
        return torch.special.entr(counts / counts.sum()).sum().exp().float()
