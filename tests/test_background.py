"""What lies beyond the box: it turns with the scene, is rendered where nothing else is, and goes through g."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from nfldm_ns.latents.background_path import BackgroundPath, background_loss
from nfldm_ns.latents.training import LatentLossConfig, LatentTrainingConfig, train_latent_autoencoder
from nfldm_ns.latents.voxel_store import encode_collection
from nfldm_ns.scenes.views import rotate_cameras90
from nfldm_ns.training.schedule import Schedule
from tests.small_models import LATENT_SIZES, random_grid, small_latent_autoencoder, small_scene_autoencoder
from tests.synthetic import make_box_room_collection, surround_cameras

# Rendering


def empty_grid():
    grid = random_grid(1)
    return replace(grid, density=torch.zeros_like(grid.density))


@torch.no_grad()
@pytest.mark.parametrize("turns", range(4))
def test_a_turned_scene_looks_the_same_to_turned_cameras(turns):
    model, cameras = small_scene_autoencoder(), surround_cameras(3, 32, torch.Generator().manual_seed(0))[None, ...]
    for grid in (random_grid(1), empty_grid()):
        expected = model.render(grid, cameras).rgb
        turned = model.render(grid.rotate90(turns), rotate_cameras90(cameras, turns)).rgb
        torch.testing.assert_close(turned, expected, atol=1e-4, rtol=0)
    if turns:
        only_cameras = model.render(empty_grid(), rotate_cameras90(cameras, turns)).rgb
        assert float((only_cameras - expected).abs().max()) > 1e-2


@torch.no_grad()
def test_an_empty_scene_shows_the_background_of_its_code():
    model, cameras = small_scene_autoencoder(), surround_cameras(2, 32, torch.Generator().manual_seed(0))[None, ...]
    grid = empty_grid()
    rendered = model.render(grid, cameras)
    background = model.background(rendered.maps.directions, grid.background)
    torch.testing.assert_close(rendered.maps.features, background)
    torch.testing.assert_close(rendered.maps.background, background)
    other = model.render(replace(grid, background=-grid.background), cameras)
    assert float((other.rgb - rendered.rgb).abs().max()) > 1e-2
    without = model.render(replace(grid, background=None), cameras)
    zero = model.render(replace(grid, background=torch.zeros_like(grid.background)), cameras)
    torch.testing.assert_close(without.rgb, zero.rgb)


# Through g


def test_statistics_are_the_same_in_all_quarter_turns():
    grid = random_grid(64)
    offset = torch.tensor([3.0, 0.0, 0.0, -2.0])
    grid.background = grid.background * torch.tensor([1.0, 2.0, 4.0, 0.0]) + offset
    path = BackgroundPath(2, 8)
    path.fit([grid[:40], grid[40:]])
    turned = BackgroundPath(2, 8)
    turned.fit([grid.rotate90(1)])
    torch.testing.assert_close(path.mean, turned.mean)
    torch.testing.assert_close(path.std, turned.std)
    torch.testing.assert_close(path.mean[:, 1:3], torch.zeros(2, 2), atol=0, rtol=0)
    code = path.normalise(grid)
    torch.testing.assert_close(code[..., [0, 3]].mean(0), torch.zeros(2, 2), atol=1e-5, rtol=0)
    torch.testing.assert_close(code[..., 0].square().mean(0), torch.ones(2), atol=1e-4, rtol=0)
    torch.testing.assert_close(code[..., 1:3].square().mean((0, 2)), torch.ones(2), atol=1e-4, rtol=0)
    assert float(code[..., 3].abs().max()) < 1e-2, "a constant is not blown up"
    torch.testing.assert_close(path.denormalise(code), grid.background)


@torch.no_grad()
def test_a_fitted_model_starts_with_the_background_in_g():
    grid = random_grid(4)
    model = small_latent_autoencoder(global_dim=16)
    model.fit([grid])
    latents = model.encode(grid)
    torch.testing.assert_close(model.decode(latents).background, grid.background, atol=1e-5, rtol=0)
    torch.testing.assert_close(model(grid).grid.background, grid.background, atol=0.5, rtol=0)
    blank = model.decode(replace(latents, global_latent=torch.zeros_like(latents.global_latent))).background
    torch.testing.assert_close(blank, model.background_path.mean.expand_as(blank))
    assert float(latents.global_latent[:, 8:].abs().max()) > 0, "the rest of g is left to the voxels"
    without = model.decode(model.encode(replace(grid, background=None))).background
    torch.testing.assert_close(without, torch.zeros_like(without), atol=1e-5, rtol=0)


def test_a_background_of_another_size_is_refused():
    with pytest.raises(ValueError, match=r"backgrounds must be \(2, 4\), not \(3, 4\)"):
        small_latent_autoencoder().encode(random_grid(background_channels=3))


def test_a_model_without_background_channels_works():
    with pytest.warns(UserWarning, match="zero-element"):
        model = small_latent_autoencoder(background_channels=0)
    with torch.no_grad():
        result = model(random_grid(background_channels=0))
    assert result.grid.background.shape == (2, 0, 4)
    assert float(background_loss(result.background, result.background_target)) == 0


@torch.no_grad()
@pytest.mark.parametrize("global_dim", [16, 6])
def test_training_overfits_the_backgrounds_of_two_scenes(tmp_path, global_dim):
    """Of the codes' eight values g can hold all, or must hold what tells the scenes apart."""
    collection = make_box_room_collection(tmp_path / "rooms", num_train=2, num_test=1)
    stage1 = small_scene_autoencoder()
    torch.nn.init.normal_(stage1.encoder.out.weight, std=0.3)
    store = encode_collection(collection, stage1, tmp_path / "voxels")
    config = LatentTrainingConfig(
        schedule=Schedule(max_steps=60, batch_size=2, learning_rate=1e-2),
        losses=LatentLossConfig(rgb_mult=0, depth_mult=0),
        quarter_turns=False,
    )
    sizes = {**LATENT_SIZES, "global_dim": global_dim}
    with torch.enable_grad():
        model = train_latent_autoencoder(store, tmp_path / "run", sizes, config, on_progress=lambda *_: None)
    grid = store.grid(store.splits["train"])
    code = model.background_path.normalise(grid)

    def error(latents):
        return float((model.background_path.normalise(model.decode(latents)) - code).abs().mean())

    latents = model.encode(grid)
    assert error(latents) < 0.15
    assert error(replace(latents, global_latent=torch.zeros_like(latents.global_latent))) > 0.5
    assert error(replace(latents, global_latent=latents.global_latent.flip(0))) > 0.5, "of the other scene"
    fine = torch.zeros_like(latents.fine)
    assert error(replace(latents, coarse=torch.zeros_like(latents.coarse), fine=fine)) < 0.15
