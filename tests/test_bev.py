"""Semantic maps from above as a condition of the denoisers."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest
import torch

from nfldm_ns.diffusion.bev import MapEncoder, to_grid_order, turn_map
from nfldm_ns.diffusion.denoisers import CoarseDenoiser, FineDenoiser, GlobalDenoiser
from nfldm_ns.diffusion.latent_memory import encode_latents
from nfldm_ns.diffusion.training import (
    STAGES,
    DiffusionLosses,
    DiffusionTrainingConfig,
    evaluate_denoiser,
    held_out_errors,
    train_denoiser,
)
from nfldm_ns.errors import UserInputError
from nfldm_ns.latents.voxel_store import encode_collection, model_hash
from nfldm_ns.scenes.voxel_grid import VoxelGrid, voxel_centres
from nfldm_ns.training import ItemDraws, Schedule
from tests.small_models import DENOISER_SIZES, small_latent_autoencoder, small_scene_autoencoder
from tests.synthetic import AABB, BEV_CLASSES, BEV_SIZE, make_box_room_collection

SCHEDULE = Schedule(max_steps=6, batch_size=2, log_every=2, checkpoint_every=3)
TRAINING = DiffusionTrainingConfig(schedule=SCHEDULE, condition="bev", bev_dropout=0.5, condition_dropout=0.2)
MAPS = {"bev_classes": 2, "bev_size": (BEV_SIZE, BEV_SIZE), "bev_dropout": 0.1}


@pytest.fixture(scope="module")
def latent_autoencoder():
    return small_latent_autoencoder()


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    root = tmp_path_factory.mktemp("scenes")
    collection = make_box_room_collection(root / "rooms", num_train=3, num_test=1)
    return encode_collection(collection, small_scene_autoencoder(), root / "voxels")


@pytest.fixture(scope="module")
def memory(store, latent_autoencoder):
    return encode_latents(store, latent_autoencoder, store.splits["train"], with_maps=True)


def denoisers(**maps):
    """The three denoisers of 4 x 2 x 4 x 4 and 4 x 16 x 16 latents."""
    torch.manual_seed(0)
    return {
        "global": GlobalDenoiser(8, 2, **DENOISER_SIZES["global"], **maps).eval(),
        "coarse": CoarseDenoiser((4, 2, 4, 4), 18, **DENOISER_SIZES["coarse"], **maps).eval(),
        "fine": FineDenoiser((4, 16, 16), (4, 2, 4, 4), code_dim=18, **DENOISER_SIZES["fine"], **maps).eval(),
    }


def learned(denoiser):
    """With weights that are not zero anywhere, so that all that enters counts."""
    generator = torch.Generator().manual_seed(0)
    for parameter in denoiser.parameters():
        if not bool(parameter.any()) or parameter.ndim > 1:
            parameter.data += 0.1 * torch.randn(parameter.shape, generator=generator)
    return denoiser


def inputs(stage, batch=2):
    generator = torch.Generator().manual_seed(1)

    def draw(*shape):
        return torch.randn(batch, *shape, generator=generator)

    time = torch.full((batch,), 500)
    if stage == "global":
        return draw(18), time
    return (draw(8, 4, 4), time, draw(18)) if stage == "coarse" else (draw(4, 16, 16), time, draw(18), draw(4, 2, 4, 4))


def random_maps(batch=2, seed=0, size=BEV_SIZE):
    return torch.randint(2, (batch, size, size), generator=torch.Generator().manual_seed(seed))


# Geometry


def test_a_map_lies_on_the_voxels_it_is_of():
    """A wall north-east of the origin: in the first row and last column of a file, the last ones of V."""
    centres = voxel_centres((4, 16, 16), torch.tensor(AABB))
    walls = ((centres[..., 0] > 2) & (centres[..., 1] > 1)).float()
    bev = torch.zeros(16, 16, dtype=torch.uint8)
    cells = (torch.arange(16) + 0.5) / 16
    x, y = -3 + 6 * cells, 3 - 6 * cells  # docs/architecture.md: row 0 is the north
    bev[(y[:, None] > 1) & (x[None] > 2)] = 1
    assert torch.equal(to_grid_order(bev).float(), walls[0])
    assert torch.equal(to_grid_order(to_grid_order(bev)), bev)


@pytest.mark.parametrize("turn", range(4))
def test_a_map_turns_with_its_voxels(turn):
    walls = random_maps(3, seed=5, size=8)
    density = walls[:, None, None].expand(-1, 1, 2, -1, -1).float()
    grid = VoxelGrid(density, torch.zeros(3, 1, 2, 8, 8), torch.tensor(AABB))
    turned = turn_map(walls, turn)
    assert torch.equal(grid.rotate90(turn).density[:, 0, 0], turned.float())
    encoder = MapEncoder(2, (2, 2), 4, 4)
    areas = encoder.areas(walls, (3, 3))
    torch.testing.assert_close(encoder.areas(turned, (3, 3)), torch.rot90(areas, -turn, (-2, -1)))


def test_maps_of_latents_are_those_of_the_turned_scenes(store, latent_autoencoder, memory):
    collection, scene_id = store.load_collection(), store.splits["train"][1]
    bev = torch.from_numpy(np.flipud(collection.load_scene(scene_id).bev).copy())
    assert memory.maps.shape == (3, 4, BEV_SIZE, BEV_SIZE) and memory.maps.dtype == torch.uint8
    assert memory.bev_classes == BEV_CLASSES
    for turn in range(4):
        assert torch.equal(memory.maps[1, turn], turn_map(bev, turn))
    picked = memory.pick_maps([1, 0], torch.tensor([2, 3]), "cpu")
    assert torch.equal(picked, torch.stack([memory.maps[1, 2], memory.maps[0, 3]]).long())


# Denoisers


@pytest.mark.parametrize("stage", STAGES)
def test_without_maps_nothing_changes(stage):
    plain, conditioned = denoisers()[stage], denoisers(**MAPS)[stage]
    added = set(conditioned.state_dict()) - set(plain.state_dict())
    assert added and all(name.startswith(("map_encoder.", "project_")) for name in added)
    assert not any("map" in name or "classes" in name for name in plain.state_dict())
    values = inputs(stage)
    with pytest.raises(ValueError, match="maps of"):
        plain(*values, bev=random_maps())
    before = {k: v for k, v in plain.config.items() if not k.startswith(("bev_", "_"))}
    old = type(plain).from_config(before)
    assert old.config.bev_classes == 0 and model_hash(plain) != model_hash(conditioned)
    old.load_state_dict(plain.state_dict())
    assert model_hash(old) == model_hash(plain) and torch.equal(old.eval()(*values), plain(*values))


@pytest.mark.parametrize("stage", STAGES)
def test_a_dropped_map_is_no_map_and_others_count(stage):
    psi = learned(denoisers(**MAPS)[stage])
    values, maps = inputs(stage), random_maps()
    with torch.no_grad():
        none, seen = psi(*values), psi(*values, bev=maps)
        everywhere = torch.ones(2, dtype=torch.bool)
        torch.testing.assert_close(psi(*values, bev=maps, drop_bev=everywhere), none)
        torch.testing.assert_close(psi(*values, bev=1 - maps, drop_bev=everywhere), none)
        torch.testing.assert_close(psi(*values, bev=maps, drop_bev=~everywhere), seen)
        half = psi(*values, bev=maps, drop_bev=torch.tensor([True, False]))
        torch.testing.assert_close(half, torch.stack([none[0], seen[1]]), atol=1e-5, rtol=1e-4)
        assert not torch.allclose(seen, none) and not torch.allclose(psi(*values, bev=1 - maps), seen)
        assert psi(*values, bev=maps.byte()).equal(seen), "whatever the kind of integers"


def test_the_map_enters_where_it_lies():
    """Nothing but the aligned inputs: what changes in one corner of the map changes the corner of the prediction."""
    psi = learned(denoisers(**MAPS)["fine"])
    maps = random_maps(1)
    other = maps.clone()
    other[:, :4, :4] = 1 - other[:, :4, :4]
    areas = [psi.project_classes(psi.map_encoder.areas(m, (16, 16))) for m in (maps, other)]
    moved = (areas[0] - areas[1]).abs().sum(1)[0] > 1e-6
    assert bool(moved[:4, :4].any()) and not bool(moved[6:, :].any()) and not bool(moved[:, 6:].any())


# Training


def train(stage, memory, latent_autoencoder, folder, config=TRAINING, on_progress=lambda share, losses: None):
    sizes = DENOISER_SIZES[stage]
    return train_denoiser(stage, memory, latent_autoencoder, folder, sizes, config, on_progress=on_progress)


@pytest.mark.parametrize("stage", STAGES)
def test_resumed_training_with_maps_is_equal_to_the_bit(stage, memory, latent_autoencoder, tmp_path):
    whole = train(stage, memory, latent_autoencoder, tmp_path / "whole")

    class Interrupted(Exception):
        pass

    def interrupt(share, losses):
        if share > 0.6:
            raise Interrupted

    with pytest.raises(Interrupted):
        train(stage, memory, latent_autoencoder, tmp_path / "parts", on_progress=interrupt)
    resumed = train(stage, memory, latent_autoencoder, tmp_path / "parts")
    for name, value in whole.state_dict().items():
        assert torch.equal(value, resumed.state_dict()[name]), name
    run = json.loads((tmp_path / "parts" / "run.json").read_text())
    assert run["model"]["bev_classes"] == 2 and run["model"]["bev_size"] == [BEV_SIZE, BEV_SIZE]
    assert run["model"]["bev_dropout"] == 0.5
    assert [c["name"] for c in run["bev_classes"]] == ["void", "floor"]
    with pytest.raises(UserInputError, match="bev_dropout|model"):
        train(stage, memory, latent_autoencoder, tmp_path / "parts", replace(TRAINING, bev_dropout=0.1))


def test_the_map_is_dropped_apart_from_the_code(memory, latent_autoencoder, tmp_path):
    psi = train("coarse", memory, latent_autoencoder, tmp_path)
    losses = DiffusionLosses("coarse", psi, psi, memory, TRAINING, torch.device("cpu"))
    count = 400
    _, conditions = losses.sample_and_conditions([0] * count, ItemDraws(0, range(count)))
    code, bev = conditions["drop_code"].float(), conditions["drop_bev"].float()
    assert float(code.mean()) == pytest.approx(0.2, abs=0.07) and float(bev.mean()) == pytest.approx(0.5, abs=0.08)
    assert float((code * bev).mean()) == pytest.approx(0.1, abs=0.05), "independent"
    _, conditions = losses.sample_and_conditions([0, 1], ItemDraws(0, range(2)), augment=False)
    assert "drop_bev" not in conditions and conditions["bev"].shape == (2, BEV_SIZE, BEV_SIZE)
    with_map = evaluate_denoiser("coarse", psi, memory, TRAINING)
    assert with_map != evaluate_denoiser("coarse", psi, memory, TRAINING, with_map=False)
    errors = held_out_errors("coarse", psi, memory, TRAINING)
    assert errors["with_map"]["mean"] != errors["without_map"]["mean"] and errors["scenes"] == 3


def test_maps_that_are_missing_are_named(store, memory, latent_autoencoder, tmp_path):
    with pytest.raises(UserInputError, match="without BEV maps: encode them again"):
        train("coarse", replace(memory, maps=None), latent_autoencoder, tmp_path / "run")
    assert not (tmp_path / "run").exists()
    collection = store.load_collection()
    (collection.scene_dir("room_001") / "bev.png").rename(tmp_path / "bev.png")
    try:
        with pytest.raises(UserInputError, match=r"rooms has no BEV maps \(the scene room_001 has no bev.png\)"):
            encode_latents(store, latent_autoencoder, store.splits["train"], with_maps=True)
    finally:
        (tmp_path / "bev.png").rename(collection.scene_dir("room_001") / "bev.png")
    collection.bev_classes = [BEV_CLASSES[0]]
    with pytest.raises(UserInputError, match="has the class 1, which collection.json does not name"):
        collection.load_bev("room_001")
    collection.bev_classes = []
    with pytest.raises(UserInputError, match="collection.json names no bev_classes"):
        collection.load_bev("room_001")
