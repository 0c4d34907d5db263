"""Metrics against closed forms and torchmetrics, and the baselines on cases with known answers."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn
from torchmetrics.functional.image import peak_signal_noise_ratio
from torchmetrics.image.fid import _compute_fid
from torchmetrics.image.kid import poly_mmd

from nfldm_ns.metrics import images as metrics
from nfldm_ns.pretrained.weights import load_inception, load_lpips
from nfldm_ns.scenes.views import SceneBatch, Views, make_cameras
from tests.pretrained import require_weights


def level_views(yaws_deg: list[float], positions: list[tuple[float, float, float]], size: int = 8) -> Views:
    """One scene's level cameras, batch shape [1, N]; image n has the constant value n / 10."""
    poses = torch.zeros(len(yaws_deg), 3, 4)
    for pose, yaw, position in zip(poses, yaws_deg, positions, strict=True):
        a = math.radians(yaw)
        pose[:, 0] = torch.tensor([math.sin(a), -math.cos(a), 0.0])
        pose[2, 1] = 1
        pose[:, 2] = -torch.tensor([math.cos(a), math.sin(a), 0.0])
        pose[:, 3] = torch.tensor(position)
    cameras = make_cameras(poses[None], size / 2, size / 2, size / 2, size / 2, size, size)
    values = torch.arange(len(yaws_deg)) / 10
    return Views(cameras, values[None, :, None, None, None].expand(1, -1, 3, size, size).clone())


# Images one by one


def test_psnr_closed_form_and_torchmetrics() -> None:
    true = torch.full((2, 3, 3, 16, 16), 0.5)
    torch.testing.assert_close(metrics.psnr(true + 0.1, true), torch.full((2, 3), 20.0))
    torch.testing.assert_close(metrics.psnr(true, true), torch.full((2, 3), metrics.MAX_PSNR))
    a, b = torch.rand(2, 3, 16, 16)
    torch.testing.assert_close(metrics.psnr(a, b), peak_signal_noise_ratio(a[None], b[None], data_range=1.0))


def test_psnr_clamps_what_a_display_would() -> None:
    white = torch.ones(3, 8, 8)
    assert float(metrics.psnr(white * 1.5, white)) == metrics.MAX_PSNR


def test_ssim_orders_and_keeps_batch_shape() -> None:
    true = torch.rand(2, 2, 3, 24, 24)
    noisy = true + 0.1 * torch.randn_like(true)
    torch.testing.assert_close(metrics.ssim(true, true), torch.ones(2, 2))
    assert bool((metrics.ssim(noisy, true) < 0.99).all())
    # The luminance term alone, for constants x and y: (2xy + C1) / (x^2 + y^2 + C1).
    x, y, c1 = 0.2, 0.8, 0.01**2
    flat = metrics.ssim(torch.full((1, 3, 24, 24), x), torch.full((1, 3, 24, 24), y))
    assert float(flat) == pytest.approx((2 * x * y + c1) / (x**2 + y**2 + c1), abs=1e-4)


def test_depth_mae_ignores_unknown_pixels() -> None:
    true = torch.tensor([[0.0, 1.0], [2.0, 4.0]])[None]
    predicted = torch.tensor([[9.0, 1.5], [2.0, 3.0]])[None]
    error, pixels = metrics.depth_mae(predicted, true)
    assert (float(error), int(pixels)) == (1.5, 3)
    error, pixels = metrics.depth_mae(predicted, true, true < 3)
    assert (float(error), int(pixels)) == (0.5, 2)


def test_surface_inside_box_of_a_wall_ahead() -> None:
    views = level_views([0.0, 0.0], [(0, 0, 0), (1, 0, 0)])
    views.depths = torch.full((1, 2, 1, 8, 8), 2.0)
    views.depths[0, 0, 0, 0, 0] = 0
    aabb = torch.tensor([[-2.5, -5.0, -5.0], [2.5, 5.0, 5.0]])
    inside = metrics.surface_inside_box(views, aabb)
    assert inside.shape == (1, 2, 1, 8, 8)
    assert not bool(inside[0, 0, 0, 0, 0])  # unknown
    assert int(inside[0, 0].sum()) == 63  # the wall at x = 2
    assert not bool(inside[0, 1].any())  # the wall at x = 3


def test_image_metrics_are_means_over_all_images_and_pixels() -> None:
    views = level_views([0.0], [(0, 0, 0)])
    views.depths = torch.full((1, 1, 1, 8, 8), 2.0)
    aabb = torch.tensor([[-1.0, -1.0, -1.0], [1.0, 1.0, 1.0]])
    collected = metrics.ImageMetrics()
    true = torch.full((3, 3, 16, 16), 0.5)
    collected.update(true[:1] + 0.1, true[:1])
    collected.update(true[1:] + 0.01, true[1:])
    collected.update_depth(views.depths + 0.5, views, aabb)
    result = collected.compute()
    assert collected.num_images == 3
    assert result["psnr"] == pytest.approx((20 + 40 + 40) / 3, abs=1e-3)
    assert result["depth_mae_m"] == pytest.approx(0.5)
    assert "depth_mae_in_box_m" not in result  # no surface is inside: unknown rather than zero
    assert "lpips" not in result
    with pytest.raises(ValueError, match="differ in shape"):
        collected.update(true, true[:1])


def test_lpips_in_image_metrics() -> None:
    require_weights("lpips-alex")
    collected = metrics.ImageMetrics(load_lpips("alex"))
    images = torch.rand(1, 2, 3, 32, 32)
    collected.update(images, images)
    assert collected.compute()["lpips"] == pytest.approx(0, abs=1e-6)
    collected.update(images.flip(-1), images)
    assert collected.compute()["lpips"] > 0.01


# Sets of images


def gaussian_features(mean: torch.Tensor, scales: torch.Tensor, num: int) -> torch.Tensor:
    """Samples whose empirical mean and covariance are exactly the given ones."""
    x = torch.randn(num, len(mean), dtype=torch.float64)
    x = x - x.mean(dim=0)
    q = torch.linalg.qr(x).Q * math.sqrt(num - 1)
    return q * scales + mean


def test_fid_of_gaussians_is_the_closed_form() -> None:
    d = 6
    m1, m2 = torch.zeros(d, dtype=torch.float64), torch.arange(d, dtype=torch.float64)
    s1, s2 = torch.full((d,), 2.0, dtype=torch.float64), torch.linspace(1, 3, d, dtype=torch.float64)
    a, b = gaussian_features(m1, s1, 40), gaussian_features(m2, s2, 50)
    expected = float((m1 - m2).square().sum() + (s1 - s2).square().sum())  # commuting covariances
    assert metrics.frechet_distance(a, b) == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize(("num_a", "num_b", "d"), [(40, 50, 6), (12, 9, 30), (40, 10, 20)])
def test_fid_agrees_with_torchmetrics_and_is_symmetric(num_a: int, num_b: int, d: int) -> None:
    mixing = torch.randn(d, d, dtype=torch.float64)
    a = torch.randn(num_a, d, dtype=torch.float64) @ mixing
    b = torch.randn(num_b, d, dtype=torch.float64) @ mixing.T + 0.3
    expected = float(_compute_fid(a.mean(dim=0), a.T.cov(), b.mean(dim=0), b.T.cov()))
    ours = metrics.frechet_distance(a, b)
    # torchmetrics takes roots of eigenvalues that are zero up to rounding, so at low rank it is the less exact
    assert ours == pytest.approx(expected, rel=1e-4)
    assert metrics.frechet_distance(b, a) == pytest.approx(ours, rel=1e-9)
    assert metrics.frechet_distance(a, a) == pytest.approx(0, abs=1e-9 * float(a.square().sum()))
    assert metrics.frechet_distance(a, a + 1) == pytest.approx(d, rel=1e-6)


def test_kid_agrees_with_torchmetrics() -> None:
    a, b = torch.randn(20, 8, dtype=torch.float64), torch.randn(20, 8, dtype=torch.float64) + 0.5
    assert metrics.kernel_distance(a, b).mean == pytest.approx(float(poly_mmd(a, b)), rel=1e-9)
    assert metrics.kernel_distance(a, b).std is None
    subsets = metrics.kernel_distance(a, b, subset_size=10, num_subsets=200)
    assert subsets.mean == pytest.approx(metrics.kernel_distance(a, b).mean, rel=0.1)
    assert subsets == metrics.kernel_distance(a, b, subset_size=10, num_subsets=200)


def test_kid_is_unbiased_where_fid_is_not() -> None:
    """Two draws from one distribution: KID averages to zero at any number of images, FID only falls towards it."""
    draws = [torch.randn(2, num, 16, dtype=torch.float64) for num in (10, 40) for _ in range(200)]
    kid = torch.tensor([metrics.kernel_distance(*draw).mean for draw in draws]).view(2, 200)
    fid = torch.tensor([metrics.frechet_distance(*draw) for draw in draws[::4]]).view(2, 50)
    assert bool((kid.mean(dim=1).abs() < 4 * kid.std(dim=1) / math.sqrt(200)).all())
    assert float(fid[0].mean()) > 2 * float(fid[1].mean()) > 1


def test_set_distances_refuse_what_has_no_answer() -> None:
    one, many = torch.randn(1, 4), torch.randn(5, 4)
    with pytest.raises(ValueError, match="N >= 2"):
        metrics.frechet_distance(one, many)
    with pytest.raises(ValueError, match="at least 2"):
        metrics.kernel_distance(one, many)
    with pytest.raises(ValueError, match="subset_size"):
        metrics.kernel_distance(many, many, subset_size=6)
    with pytest.raises(ValueError, match="no images"):
        metrics.extract_features(nn.Flatten(), iter([]))


def test_extract_features_takes_batches_of_any_shape_in_order() -> None:
    images = torch.rand(11, 3, 4, 4)
    batches = iter([images[:4].view(2, 2, 3, 4, 4), images[4], images[5:]])
    features = metrics.extract_features(nn.Flatten(), batches, batch_size=3)
    torch.testing.assert_close(features, images.flatten(1).double())


def test_inception_tells_textures_apart() -> None:
    require_weights("fid-inception")
    network = load_inception()
    smooth = nn.functional.interpolate(torch.rand(6, 3, 4, 4), (32, 32), mode="bilinear")
    features = metrics.extract_features(network, [smooth, torch.rand(3, 3, 48, 40)])
    assert features.shape == (9, 2048)
    within = metrics.frechet_distance(features[:3], features[3:6])
    assert metrics.frechet_distance(features[:3], features[6:]) > 1.2 * within


# Baselines


def test_mean_image() -> None:
    images = torch.rand(5, 3, 4, 4)
    torch.testing.assert_close(metrics.mean_image([images[:2], images[None, 2:]]), images.mean(dim=0))
    torch.testing.assert_close(metrics.mean_image(images), images.mean(dim=0))
    with pytest.raises(ValueError, match="no images"):
        metrics.mean_image([])


def test_nearest_source_view_by_direction_then_position() -> None:
    source = level_views([0, 90, 180, 270, 90], [(0, 0, 0)] * 4 + [(5, 5, 0)])
    target = level_views([350, 80, 92, 184, -80], [(0, 0, 0), (0, 1, 0), (4, 4, 0), (9, 0, 0), (0, 0, 0)])
    batch = SceneBatch(["a"], source, target, torch.tensor([[-1.0] * 3, [1.0] * 3]))
    assert metrics.nearest_source_index(batch).tolist() == [[0, 1, 4, 2, 3]]
    views = metrics.nearest_source_view(batch)
    assert views.shape == target.images.shape
    torch.testing.assert_close(views[0, :, 0, 0, 0], torch.tensor([0.0, 0.1, 0.4, 0.2, 0.3]))
