"""Image metrics of novel views, distances between sets of images, and the baselines they stand beside."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from nfldm_ns.scenes.views import SceneBatch, Views, camera_rays
from nfldm_ns.scenes.voxel_grid import normalise_points

MAX_PSNR = 100.0
SAME_DIRECTION_RAD = 1e-3


# Images one by one


def psnr(
    predicted: Float[Tensor, "*batch 3 height width"],
    true: Float[Tensor, "*batch 3 height width"],
    masks: Bool[Tensor, "*batch 1 height width"] | None = None,
) -> Float[Tensor, "*batch"]:
    """Peak signal-to-noise ratio of each image in dB, for values in [0, 1]; equal images give 100 dB.

    Args:
        masks: False for pixels that do not count.
    """
    errors = (predicted.float().clamp(0, 1) - true.float()).square()
    if masks is None:
        error = errors.mean(dim=(-3, -2, -1))
    else:
        count = 3 * masks.sum(dim=(-3, -2, -1)).clamp(min=1)
        error = torch.where(masks, errors, 0).sum(dim=(-3, -2, -1)) / count
    return -10 * torch.log10(error.clamp(min=10 ** (-MAX_PSNR / 10)))


def ssim(
    predicted: Float[Tensor, "*batch 3 height width"], true: Float[Tensor, "*batch 3 height width"]
) -> Float[Tensor, "*batch"]:
    """Structural similarity of each image (Gaussian window of 11 pixels, sigma 1.5), for values in [0, 1]."""
    from torchmetrics.functional.image import structural_similarity_index_measure  # takes a second

    shape = predicted.shape[:-3]
    values = structural_similarity_index_measure(
        predicted.float().clamp(0, 1).reshape(-1, *predicted.shape[-3:]),
        true.float().reshape(-1, *true.shape[-3:]),
        data_range=1.0,
        reduction="none",
    )
    assert isinstance(values, Tensor)
    return values.reshape(shape)


def lpips_distance(
    metric: nn.Module,
    predicted: Float[Tensor, "*batch 3 height width"],
    true: Float[Tensor, "*batch 3 height width"],
    batch_size: int = 32,
) -> Float[Tensor, "*batch"]:
    """LPIPS of each image, for values in [0, 1]; `metric` is from `weights.load_lpips`."""
    shape = predicted.shape[:-3]
    pairs = zip(
        predicted.float().clamp(0, 1).reshape(-1, *predicted.shape[-3:]).split(batch_size),
        true.float().reshape(-1, *true.shape[-3:]).split(batch_size),
        strict=True,
    )
    with torch.inference_mode():
        return torch.cat([metric(a, b, normalize=True).flatten() for a, b in pairs]).reshape(shape)


def depth_mae(
    predicted: Float[Tensor, "*batch 1 height width"],
    true: Float[Tensor, "*batch 1 height width"],
    mask: Bool[Tensor, "*batch 1 height width"] | None = None,
) -> tuple[Tensor, Tensor]:
    """Sum of absolute depth errors in metres and number of pixels, over pixels with known depth.

    Args:
        predicted: planar depth in metres.
        true: likewise; 0 is unknown.
        mask: further restricts the pixels, for example `surface_inside_box`.
    """
    known = true > 0 if mask is None else (true > 0) & mask
    error = (predicted - true).abs().double()
    return torch.where(known, error, 0).sum(), known.sum()


def surface_inside_box(views: Views, aabb: Float[Tensor, "2 3"]) -> Bool[Tensor, "*batch 1 height width"]:
    """Pixels whose known surface lies inside the box, so that voxels can represent it at all."""
    if views.depths is None:
        raise ValueError("these views have no depth")
    origins, directions = camera_rays(views.cameras, *views.image_size)
    depth = views.depths.movedim(-3, -1)
    points = origins[..., None, None, :] + depth * directions
    inside = (normalise_points(points, aabb).abs() <= 1).all(dim=-1)
    return inside.unsqueeze(-3) & (views.depths > 0)


@dataclass
class ImageMetrics:
    """Collects metrics of views over many batches.

    PSNR, SSIM and LPIPS are means over images, the depth errors over pixels.

    Attributes:
        lpips: from `weights.load_lpips`; None leaves LPIPS out.
    """

    lpips: nn.Module | None = None
    num_images: int = 0
    _sums: dict[str, float] = field(default_factory=dict)
    _pixels: dict[str, int] = field(default_factory=dict)

    def update(
        self,
        predicted: Float[Tensor, "*batch 3 height width"],
        true: Float[Tensor, "*batch 3 height width"],
        masks: Bool[Tensor, "*batch 1 height width"] | None = None,
    ) -> None:
        """Adds images in [0, 1]; where a mask is False, PSNR does not count, and SSIM and LPIPS see no difference."""
        if predicted.shape != true.shape:
            raise ValueError(f"images {tuple(predicted.shape)} and {tuple(true.shape)} differ in shape")
        if masks is not None:
            predicted = torch.where(masks, predicted, true)
        values = {"psnr": psnr(predicted, true, masks), "ssim": ssim(predicted, true)}
        if self.lpips is not None:
            values["lpips"] = lpips_distance(self.lpips, predicted, true)
        for name, value in values.items():
            self._sums[name] = self._sums.get(name, 0.0) + float(value.double().sum())
        self.num_images += math.prod(predicted.shape[:-3])

    def update_depth(
        self,
        predicted: Float[Tensor, "*batch 1 height width"],
        views: Views,
        aabb: Float[Tensor, "2 3"] | None = None,
    ) -> None:
        """Adds planar depths in metres of views; with a box also the error over surfaces inside it."""
        if views.depths is None:
            return
        self._add_depth("depth_mae_m", *depth_mae(predicted, views.depths))
        if aabb is not None:
            mask = surface_inside_box(views, aabb)
            self._add_depth("depth_mae_in_box_m", *depth_mae(predicted, views.depths, mask))

    def _add_depth(self, name: str, error: Tensor, pixels: Tensor) -> None:
        self._sums[name] = self._sums.get(name, 0.0) + float(error)
        self._pixels[name] = self._pixels.get(name, 0) + int(pixels)

    def compute(self) -> dict[str, float]:
        """Means by name: `psnr` (dB), `ssim`, `lpips`, `depth_mae_m`, `depth_mae_in_box_m`; only those measured."""
        counts = {name: self._pixels.get(name, self.num_images) for name in self._sums}
        return {name: total / counts[name] for name, total in self._sums.items() if counts[name] > 0}


# Sets of images


def _chunks(batches: Iterable[Tensor], batch_size: int) -> Iterator[Tensor]:
    """Images `[n <= batch_size, 3, H, W]` of one size each, from batches of any batch shape."""
    waiting: list[Tensor] = []
    for batch in batches:
        for image in batch.reshape(-1, *batch.shape[-3:]):
            if len(waiting) == batch_size or (waiting and image.shape != waiting[0].shape):
                yield torch.stack(waiting)
                waiting = []
            waiting.append(image)
    if waiting:
        yield torch.stack(waiting)


@torch.inference_mode()
def extract_features(
    network: nn.Module, batches: Iterable[Float[Tensor, "*batch 3 height width"]], batch_size: int = 8
) -> Float[Tensor, "images features"]:
    """Inception features of all images, on the CPU in float64 (0.1-0.2 s per image and CPU core).

    Args:
        network: from `weights.load_inception`; images are moved to its device.
        batches: images in [0, 1], of any batch shape; an iterator keeps memory small.
        batch_size: images that pass through the network at once.
    """
    device = next((parameter.device for parameter in network.parameters()), torch.device("cpu"))
    features = [network(images.to(device)).cpu().double() for images in _chunks(batches, batch_size)]
    if not features:
        raise ValueError("there are no images to extract features from")
    return torch.cat(features)


def _covariance_factor(features: Tensor) -> Tensor:
    """A with A^T A = covariance, with no more rows than it needs."""
    centred = (features - features.mean(dim=0)) / math.sqrt(len(features) - 1)
    return torch.linalg.qr(centred, mode="r").R if len(centred) > centred.shape[1] else centred


def frechet_distance(real: Float[Tensor, "images features"], fake: Float[Tensor, "other_images features"]) -> float:
    """Frechet distance of the Gaussians fitted to two sets of features (Heusel et al. 2017); FID on Inception's.

    |m1 - m2|^2 + tr(S1 + S2 - 2 (S1 S2)^(1/2)). With S1 = A^T A and S2 = B^T B the last trace is the sum of the
    singular values of A B^T: exact and symmetric also where the covariances have no full rank (fewer images than
    features). FID falls with the number of images, so state the number and compare only sets of equal sizes.
    """
    for features in (real, fake):
        if features.ndim != 2 or len(features) < 2:
            raise ValueError(f"FID needs features [N >= 2, D], not {tuple(features.shape)}")
    a, b = _covariance_factor(real.double()), _covariance_factor(fake.double())
    mean_term = (real.double().mean(dim=0) - fake.double().mean(dim=0)).square().sum()
    cross_term = torch.linalg.svdvals(a @ b.T).sum()
    distance = mean_term + a.square().sum() + b.square().sum() - 2 * cross_term
    return max(float(distance), 0.0)


@dataclass(frozen=True)
class KernelDistance:
    """KID, and its standard deviation over subsets (None if all images were used at once)."""

    mean: float
    std: float | None
    subset_size: int


def kernel_distance(
    real: Float[Tensor, "images features"],
    fake: Float[Tensor, "other_images features"],
    subset_size: int | None = None,
    num_subsets: int = 100,
    seed: int = 0,
) -> KernelDistance:
    """Squared maximum mean discrepancy with the kernel (x.y / D + 1)^3 (Binkowski et al. 2018); KID on Inception's.

    The estimate is unbiased, so it may be slightly negative, and does not depend on the number of images.

    Args:
        real: features of one set.
        fake: features of the other; exchanging them changes nothing.
        subset_size: images per random subset; default: all images, one estimate.
        num_subsets: how many subsets to average.
        seed: of the choice of subsets.
    """
    real, fake = real.double(), fake.double()
    largest = min(len(real), len(fake))
    if largest < 2:
        raise ValueError(f"KID needs at least 2 images per set, not {len(real)} and {len(fake)}")
    if subset_size is None:
        return KernelDistance(float(_unbiased_mmd2(real, fake)), None, largest)
    if not 2 <= subset_size <= largest:
        raise ValueError(f"subset_size must be from 2 to {largest}, not {subset_size}")
    generator = torch.Generator().manual_seed(seed)
    values = []
    for _ in range(num_subsets):
        i, j = (torch.randperm(len(features), generator=generator)[:subset_size] for features in (real, fake))
        values.append(_unbiased_mmd2(real[i], fake[j]))
    estimates = torch.stack(values)
    return KernelDistance(float(estimates.mean()), float(estimates.std(correction=0)), subset_size)


def _unbiased_mmd2(x: Tensor, y: Tensor) -> Tensor:
    def kernel(a: Tensor, b: Tensor) -> Tensor:
        return (a @ b.T / a.shape[1] + 1) ** 3

    def mean_off_diagonal(k: Tensor) -> Tensor:
        return (k.sum() - k.trace()) / (len(k) * (len(k) - 1))

    return mean_off_diagonal(kernel(x, x)) + mean_off_diagonal(kernel(y, y)) - 2 * kernel(x, y).mean()


# Baselines


def mean_image(batches: Iterable[Float[Tensor, "*batch 3 height width"]]) -> Float[Tensor, "3 height width"]:
    """The mean of all images: what one would show knowing nothing of the scene."""
    total, count = None, 0
    for batch in batches:
        images = batch.reshape(-1, *batch.shape[-3:]).double()
        total = images.sum(dim=0) + (0 if total is None else total)
        count += len(images)
    if total is None or count == 0:
        raise ValueError("there are no images to average")
    return (total / count).float()


def nearest_source_index(batch: SceneBatch) -> Int[Tensor, "batch targets"]:
    """For each target view, the source view that looks in the most similar direction; ties go to the closer one."""
    source, target = batch.source.cameras.camera_to_worlds, batch.target.cameras.camera_to_worlds
    cos = torch.einsum("bmc,bnc->bmn", target[..., 2], source[..., 2]).clamp(-1, 1)
    angle = torch.arccos(cos)
    distance = torch.cdist(target[..., 3], source[..., 3])
    tied = angle <= angle.amin(dim=-1, keepdim=True) + SAME_DIRECTION_RAD
    return torch.where(tied, distance, torch.inf).argmin(dim=-1)


def nearest_source_view(batch: SceneBatch) -> Float[Tensor, "batch targets 3 height width"]:
    """For each target view the image of the nearest source view (see `nearest_source_index`)."""
    index = nearest_source_index(batch)
    scenes = torch.arange(len(index), device=index.device)[:, None]
    return batch.source.images[scenes, index]
