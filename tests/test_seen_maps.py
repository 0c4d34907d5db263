"""What views see of a scene's semantic map, and priors that know maps."""

from __future__ import annotations

import json
import math
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from nerfstudio.cameras.cameras import Cameras
from PIL import Image

from nfldm_ns.errors import UserInputError
from nfldm_ns.generated.cameras import look_along
from nfldm_ns.refine.domain_prior import DomainPrior, load_domain_prior
from nfldm_ns.refine.images import collection_paths
from nfldm_ns.refine.prior import repeat
from nfldm_ns.refine.prior_training import train_prior
from nfldm_ns.refine.seen_maps import (
    COLUMNS,
    DISTANCES,
    MapDescription,
    SceneMap,
    SeenMapEncoder,
    map_of_scene,
    maps_seen_in,
)
from nfldm_ns.scenes.collection import BEV_FILE, BevClass, SceneCollection
from nfldm_ns.scenes.views import make_cameras
from nfldm_ns.scenes.writing import bev_png
from tests.pretrained import require_weights
from tests.test_domain_prior import MODEL, TRAINING

FLOOR, WALL, OUTSIDE = 0, 1, 2
CLASSES = (BevClass(FLOOR, "floor", (200, 200, 200)), BevClass(WALL, "wall", (60, 60, 60)))
AABB = torch.tensor([[-8.0, -8.0, -2.0], [8.0, 8.0, 2.0]])
DESCRIPTION = MapDescription(CLASSES, (16, 16), 8.0)


def cameras(yaw: float, position: tuple[float, float] = (0.0, 0.0), width: int = 32, pitch: float = 0.0) -> Cameras:
    """One camera that sees 90 degrees of its middle square."""
    pose = look_along(torch.tensor([[*position, 0.0]]), torch.tensor([yaw]), torch.tensor([pitch]))
    return make_cameras(pose, 16.0, 16.0, width / 2, 16.0, 32, width)


def north_wall() -> SceneMap:
    """Walls where y is above 4 m, drawn with the north up; a metre per cell."""
    drawn = np.full((16, 16), FLOOR, np.uint8)
    drawn[:4] = WALL
    return SceneMap.of_file_order(drawn, AABB, DESCRIPTION)


def test_a_camera_that_looks_north_sees_the_wall_at_its_distance():
    (seen,) = north_wall().seen_by(cameras(math.pi / 2))
    distance = (torch.arange(DISTANCES) + 0.5) / DISTANCES * 8
    assert seen.shape == (DISTANCES, COLUMNS)
    middle = seen[:, COLUMNS // 2]
    assert (middle[distance < 4] == FLOOR).all() and (middle[distance > 4] == WALL).all()
    assert (seen[distance > 4] == WALL).all(), "planar distances: a wall across is straight"


def test_other_directions_and_places():
    distance = (torch.arange(DISTANCES) + 0.5) / DISTANCES * 8
    (south,) = north_wall().seen_by(cameras(-math.pi / 2))
    assert (south == FLOOR).all()
    (closer,) = north_wall().seen_by(cameras(math.pi / 2, (0.0, 3.0)))
    middle = closer[:, COLUMNS // 2]
    assert (middle[distance < 1] == FLOOR).all() and (middle[(distance > 1) & (distance < 5)] == WALL).all()
    assert (middle[distance > 5] == OUTSIDE).all(), "behind the map's edge"
    (east,) = north_wall().seen_by(cameras(0.0))
    left, right = east[:, 0], east[:, -1]
    assert WALL in left and WALL not in right, "the north is to the left of who looks east"


def test_a_turned_map_is_seen_alike_by_turned_cameras():
    drawn = np.random.default_rng(0).integers(0, 2, (16, 16)).astype(np.uint8)
    straight = SceneMap.of_file_order(drawn, AABB, DESCRIPTION)
    turned = SceneMap.of_file_order(np.rot90(drawn).copy(), AABB, DESCRIPTION)  # counter-clockwise, the north up
    seen, turned_seen = (
        scene_map.seen_by(cameras(yaw, place))
        for scene_map, yaw, place in ((straight, 0.3, (1.0, 2.0)), (turned, 0.3 + math.pi / 2, (-2.0, 1.0)))
    )
    assert (seen == turned_seen).float().mean() > 0.98, "but for rounding at the edges of cells"


def test_wide_views_are_seen_in_their_middle_square_and_tilted_ones_as_level():
    square = north_wall().seen_by(cameras(0.4))
    assert torch.equal(north_wall().seen_by(cameras(0.4, width=48)), square)
    assert torch.equal(north_wall().seen_by(cameras(0.4, pitch=0.2)), square)


def test_a_mirrored_map_is_seen_as_the_mirrored_image_would():
    """What training relies on when it mirrors images."""
    drawn = np.random.default_rng(1).integers(0, 2, (16, 16)).astype(np.uint8)
    straight, mirrored = (SceneMap.of_file_order(d, AABB, DESCRIPTION) for d in (drawn, drawn[:, ::-1].copy()))
    north = cameras(math.pi / 2)
    agree = straight.seen_by(north).flip(-1) == mirrored.seen_by(north)
    assert agree.float().mean() > 0.98, "but for rounding at the edges of cells"


def test_views_of_scenes_without_a_map_see_zeros():
    encoder = SeenMapEncoder(2)
    sample = torch.zeros(2, 3, 8, 8)
    seen = north_wall().seen_by(cameras(0.4))
    both = torch.cat([seen, torch.full_like(seen, -1)])
    features = encoder(both, sample)
    assert features.shape[2:] == (8, 8) and features[0].abs().max() > 0
    assert not features[1].any() and not encoder(None, sample).any()


def test_maps_of_a_collection_are_seen_image_by_image(box_room_collection):
    description = MapDescription.of_collection(box_room_collection)
    assert description == MapDescription.from_json(json.loads(json.dumps(description.to_json())))
    paths = collection_paths(box_room_collection, "train")
    seen = maps_seen_in(box_room_collection, description, paths)
    assert seen.shape == (len(paths), DISTANCES, COLUMNS)
    scene = box_room_collection.load_scene(box_room_collection.splits["train"][1])
    assert scene.bev is not None
    expected = SceneMap.of_file_order(scene.bev, box_room_collection.aabb, description).seen_by(scene.source.cameras)
    start = len(paths) // len(box_room_collection.splits["train"])
    assert torch.equal(seen[start : start + len(expected)], expected)


def test_maps_of_two_sizes_are_refused(box_room_collection, tmp_path):
    shutil.copytree(box_room_collection.root, tmp_path / "rooms")
    collection = SceneCollection.open(tmp_path / "rooms")
    path = collection.scene_dir(collection.splits["train"][2]) / BEV_FILE
    path.write_bytes(bev_png(np.zeros((3, 5), np.uint8), collection.bev_classes))
    description = MapDescription.of_collection(collection)
    with pytest.raises(UserInputError, match="is 5 x 3, but others are .*: give all maps one size"):
        maps_seen_in(collection, description, collection_paths(collection, "train"))


@pytest.fixture(scope="module")
def folder(box_room_collection, tmp_path_factory: pytest.TempPathFactory) -> Path:
    require_weights("lpips-alex")
    return train_prior(box_room_collection, tmp_path_factory.mktemp("prior"), MODEL, TRAINING, with_maps=True)


def test_a_prior_with_maps_comes_back_and_looks_at_them(folder, box_room_collection):
    prior = load_domain_prior(folder)
    assert prior.maps == MapDescription.of_collection(box_room_collection)
    assert "held_out_loss_without_maps" in json.loads((folder / "prior.json").read_text())["made_by"]
    paths = collection_paths(box_room_collection, "train")[:2]
    seen = maps_seen_in(box_room_collection, prior.maps, paths)
    noisy, timestep, nothing = torch.randn(2, 3, 16, 16), torch.tensor([3, 900]), repeat(prior.unconditional(), 2)
    without = prior.denoise(noisy, timestep, nothing)
    assert not torch.allclose(prior.denoise(noisy, timestep, {**nothing, "seen": seen}), without)
    hidden = {**nothing, "seen": torch.full_like(seen, -1)}
    assert torch.allclose(prior.denoise(noisy, timestep, hidden), without, atol=1e-6)


def test_a_resumed_training_with_maps_gives_the_same_weights(folder, box_room_collection, tmp_path):
    def stop(share: float, losses: dict[str, float]) -> None:
        if list(tmp_path.glob("checkpoint-00000002")):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train_prior(box_room_collection, tmp_path, MODEL, TRAINING, with_maps=True, on_progress=stop)
    again = train_prior(box_room_collection, tmp_path, MODEL, TRAINING, with_maps=True)
    weights = "denoiser/diffusion_pytorch_model.safetensors"
    assert (again / weights).read_bytes() == (folder / weights).read_bytes()


def in_two_greys(collection: SceneCollection, root: Path) -> SceneCollection:
    """A copy whose training scenes are dark where the map is all floor, and bright where it is all wall, in turns."""
    shutil.copytree(collection.root, root)
    for number, scene_id in enumerate(collection.splits["train"]):
        scene, wall = root / "scenes" / scene_id, number % 2
        shape = np.asarray(Image.open(scene / BEV_FILE)).shape
        (scene / BEV_FILE).write_bytes(bev_png(np.full(shape, wall, np.uint8), collection.bev_classes))
        for path in scene.glob("images/*.png"):
            Image.fromarray(np.full((32, 32, 3), 200 if wall else 60, np.uint8)).save(path)
    return SceneCollection.open(root)


def test_a_prior_learns_what_maps_mean(tmp_path, box_room_collection):
    require_weights("lpips-alex")
    greys = in_two_greys(box_room_collection, tmp_path / "greys")
    longer = replace(TRAINING.schedule, max_steps=180, batch_size=8, learning_rate=1e-2, warmup_steps=5, log_every=40)
    training = replace(TRAINING, schedule=longer, condition_dropout=1.0)  # the map alone says what is to be seen
    prior = load_domain_prior(train_prior(greys, tmp_path / "run", MODEL, training, with_maps=True))
    noisy, timestep, nothing = torch.zeros(1, 3, 16, 16), torch.tensor([900]), prior.unconditional()
    signal, sigma = prior.signal_and_noise(timestep)

    def clean(kind: int) -> float:
        seen = torch.full((1, DISTANCES, COLUMNS), kind, dtype=torch.int16)
        predicted = prior.predict_noise(noisy, timestep, {**nothing, "seen": seen})
        return float(((noisy - sigma * predicted) / signal).mean())

    assert clean(0) < 0 < clean(1) and clean(1) - clean(0) > 0.4


def test_which_map_a_scene_is_refined_with(tmp_path, capsys):
    scene = tmp_path / "scene"
    scene.mkdir()
    assert map_of_scene(None, scene, None, AABB) is None and not capsys.readouterr().out
    assert map_of_scene(DESCRIPTION, scene, None, AABB) is None
    assert "has no map" in capsys.readouterr().out
    with pytest.raises(UserInputError, match="knows no maps: leave out --bev"):
        map_of_scene(None, scene, tmp_path / "drawn.png", AABB)
    with pytest.raises(UserInputError, match="There is no map"):
        map_of_scene(DESCRIPTION, scene, tmp_path / "drawn.png", AABB)
    (scene / BEV_FILE).write_bytes(bev_png(np.full((16, 16), WALL, np.uint8), CLASSES))
    found = map_of_scene(DESCRIPTION, scene, None, AABB)
    assert found is not None and (found.classes == WALL).all()


def test_maps_for_priors_without_are_refused(folder, tmp_path, box_room_collection):
    plain = train_prior(box_room_collection, tmp_path / "plain", MODEL, TRAINING)
    prior = load_domain_prior(plain)
    assert isinstance(prior, DomainPrior) and prior.maps is None
    seen = torch.zeros(1, DISTANCES, COLUMNS, dtype=torch.int16)
    with pytest.raises(ValueError, match="without maps"):
        prior.denoise(torch.zeros(1, 3, 16, 16), torch.tensor([5]), {**prior.unconditional(), "seen": seen})
