"""Cameras, voxel grids and scene files, against what must hold for any of them."""

from __future__ import annotations

import errno
import json
import math
import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from nerfstudio.cameras.cameras import Cameras
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor

from nfldm_ns.errors import BAD_INPUT_EXIT_CODE, UserInputError, exit_on_bad_input
from nfldm_ns.scenes.collection import SceneCollection
from nfldm_ns.scenes.views import (
    Views,
    camera_rays,
    evenly_spread_views,
    index_cameras,
    make_cameras,
    project_points,
    resize_cameras,
    rotate_cameras90,
    sparse_depths,
    stack_cameras,
    view_yaws,
)
from nfldm_ns.scenes.voxel_grid import VoxelGrid, voxel_centres
from nfldm_ns.scenes.writing import atomic_path, write_json, write_scene
from tests.synthetic import AABB, BEV_CLASSES, BoxRoom, level_cameras, make_box_room_collection, surround_cameras


def random_cameras(num: int, height: int, width: int) -> Cameras:
    """Cameras with any pose and unequal focal lengths and centres."""
    rotations, _ = torch.linalg.qr(torch.randn(num, 3, 3))
    rotations = rotations * torch.linalg.det(rotations)[:, None, None]
    poses = torch.cat([rotations, torch.randn(num, 3, 1)], dim=-1)
    fx, fy = width * (0.5 + torch.rand(num)), height * (0.5 + torch.rand(num))
    return make_cameras(poses, fx, fy, width * torch.rand(num), height * torch.rand(num), height, width)


def project(cameras: Cameras, points: Tensor) -> tuple[Tensor, Tensor]:
    """Pixel positions `[..., 2]` and planar depths `[...]` of world points in one camera (written independently)."""
    to_world = cameras.camera_to_worlds
    local = (points - to_world[:, 3]) @ to_world[:, :3]
    depth = -local[..., 2]
    x = cameras.fx * local[..., 0] / depth + cameras.cx
    y = -cameras.fy * local[..., 1] / depth + cameras.cy
    return torch.stack([x, y], dim=-1), depth


def grid_of(shape: tuple[int, int, int], channels: int = 3, batch: int = 1) -> VoxelGrid:
    return VoxelGrid(torch.rand(batch, 1, *shape), torch.randn(batch, channels, *shape), torch.tensor(AABB))


# --- cameras -------------------------------------------------------------------------------------------------------


def test_camera_rays_are_those_of_nerfstudio() -> None:
    cameras = random_cameras(4, height=5, width=7)
    origins, directions = camera_rays(cameras, 5, 7)
    for i in range(4):
        rays = cameras.generate_rays(camera_indices=i, keep_shape=True)
        torch.testing.assert_close(F.normalize(directions[i], dim=-1), rays.directions)
        torch.testing.assert_close(origins[i].expand(5, 7, 3), rays.origins)


def test_points_are_projected_to_the_pixels_of_their_rays() -> None:
    cameras = random_cameras(3, height=4, width=6)
    origins, directions = camera_rays(cameras, 4, 6)
    depths = 0.5 + torch.rand(3, 4 * 6)
    points = origins[:, None] + depths[..., None] * directions.flatten(1, 2)
    rows, columns = torch.meshgrid(torch.arange(4) + 0.5, torch.arange(6) + 0.5, indexing="ij")
    each = [project_points(cameras[i], points[i]) for i in range(3)]
    for found in (project_points(cameras, points), zip(*each, strict=True)):
        column, row, depth = (values if isinstance(values, Tensor) else torch.stack(values) for values in found)
        torch.testing.assert_close(depth, depths, atol=1e-4, rtol=0)
        torch.testing.assert_close(column, columns.flatten().expand(3, -1), atol=1e-3, rtol=0)
        torch.testing.assert_close(row, rows.flatten().expand(3, -1), atol=1e-3, rtol=0)
    column, row, depth = project_points(cameras, 2 * origins[:, None] - points)
    torch.testing.assert_close(depth, -depths, atol=1e-4, rtol=0)
    assert bool((column.isfinite() & row.isfinite()).all()), "also behind the cameras"


def test_camera_rays_have_unit_planar_depth_and_hit_pixel_centres() -> None:
    cameras = random_cameras(3, height=4, width=6)
    origins, directions = camera_rays(cameras, 4, 6)
    rows, columns = torch.meshgrid(torch.arange(4) + 0.5, torch.arange(6) + 0.5, indexing="ij")
    for i in range(3):
        pixels, depth = project(cameras[i], origins[i] + 2.5 * directions[i])
        torch.testing.assert_close(depth, torch.full((4, 6), 2.5), atol=1e-4, rtol=0)
        torch.testing.assert_close(pixels, torch.stack([columns, rows], dim=-1), atol=1e-3, rtol=0)


def test_coarser_rays_pass_the_middle_of_each_block_of_pixels() -> None:
    cameras = random_cameras(2, height=4, width=8)
    fine, coarse = camera_rays(cameras, 4, 8)[1], camera_rays(cameras, 2, 4)[1]
    blocks = fine.unflatten(2, (4, 2)).unflatten(1, (2, 2)).mean(dim=(2, 4))
    torch.testing.assert_close(coarse, blocks)
    torch.testing.assert_close(camera_rays(resize_cameras(cameras, 2, 4), 2, 4)[1], coarse)


def test_indexing_undoes_stacking() -> None:
    cameras = [random_cameras(3, 4, 6) for _ in range(2)]
    stacked = stack_cameras(cameras)
    assert stacked.shape == (2, 3)
    for name in ("camera_to_worlds", "fx", "fy", "cx", "cy", "height", "width"):
        torch.testing.assert_close(getattr(index_cameras(stacked, 1), name), getattr(cameras[1], name))


def test_views_without_depth_are_unknown_beside_views_with_depth() -> None:
    cameras = random_cameras(2, 4, 6)
    images = torch.rand(2, 3, 4, 6)
    stacked = Views.stack([Views(cameras, images, torch.ones(2, 1, 4, 6)), Views(cameras, images)])
    assert stacked.depths is not None
    assert stacked.depths[0].eq(1).all() and stacked.depths[1].eq(0).all()


# --- voxel grids ---------------------------------------------------------------------------------------------------


def test_fold_and_unfold_are_inverse() -> None:
    grid = grid_of((4, 6, 6), batch=2)
    folded = grid.fold()
    assert folded.shape == (2, 4 * 4, 6, 6)
    again = VoxelGrid.unfold(folded, 4, grid.aabb)
    assert torch.equal(again.density, grid.density) and torch.equal(again.features, grid.features)


def test_voxel_centres_sample_their_own_voxels() -> None:
    grid = grid_of((3, 5, 4))
    centres = voxel_centres(grid.shape, grid.aabb)
    density, features = grid.sample(centres[None])
    torch.testing.assert_close(density, grid.density.movedim(1, -1))
    torch.testing.assert_close(features, grid.features.movedim(1, -1))


def test_voxel_centres_follow_the_formula_of_the_contract() -> None:
    aabb = torch.tensor([[-1.0, 0.0, 2.0], [1.0, 3.0, 4.0]])
    centre = voxel_centres((2, 3, 4), aabb)[1, 2, 3]
    torch.testing.assert_close(centre, torch.tensor([-1 + 3.5 / 4 * 2, 2.5 / 3 * 3, 2 + 1.5 / 2 * 2]))


def test_samples_outside_the_box_are_zero() -> None:
    grid = grid_of((3, 4, 4))
    outside = grid.aabb[1] + grid.voxel_size
    density, features = grid.sample(outside.reshape(1, 1, 3))
    assert density.eq(0).all() and features.eq(0).all()


@pytest.mark.parametrize("quarter_turns", [-1, 0, 1, 2, 3, 5])
def test_turning_the_grid_and_the_points_changes_nothing(quarter_turns: int) -> None:
    grid = grid_of((3, 8, 8))
    points = (2 * torch.rand(1, 50, 3) - 1) * grid.aabb[1]
    angle = quarter_turns * math.pi / 2
    turn = torch.tensor([[math.cos(angle), -math.sin(angle), 0], [math.sin(angle), math.cos(angle), 0], [0, 0, 1]])
    before, after = grid.sample(points), grid.rotate90(quarter_turns).sample(points @ turn.T)
    torch.testing.assert_close(after[0], before[0], atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(after[1], before[1], atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("quarter_turns", [1, 2, 3])
def test_turned_cameras_see_the_turned_grid_as_before(quarter_turns: int) -> None:
    grid = grid_of((3, 8, 8))
    cameras = surround_cameras(2, 4, torch.Generator().manual_seed(0))
    seen = []
    for scene, eyes in ((grid, cameras), (grid.rotate90(quarter_turns), rotate_cameras90(cameras, quarter_turns))):
        origins, directions = camera_rays(eyes, 4, 4)
        seen.append(scene.sample((origins[:, None, None] + 1.5 * directions)[None])[1])
    torch.testing.assert_close(seen[1], seen[0], atol=1e-5, rtol=1e-4)


def test_only_square_grids_turn() -> None:
    with pytest.raises(ValueError, match="square"):
        grid_of((3, 4, 5)).rotate90(1)


@pytest.mark.parametrize("index", [0, 1, -1, slice(0, 2)])
def test_selecting_scenes_keeps_the_batch_axis(index: int | slice) -> None:
    grid = grid_of((2, 3, 3), batch=3)
    selected = grid[index]
    assert selected.density.ndim == 5
    assert torch.equal(selected.features.squeeze(0), grid.features[index])
    assert torch.equal(VoxelGrid.cat([grid[:1], grid[1:]]).density, grid.density)


# --- files ---------------------------------------------------------------------------------------------------------


def test_scenes_come_back_as_written(tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(1)
    room = BoxRoom.random(generator)
    source = room.render(surround_cameras(3, 8, generator))
    target = room.render(surround_cameras(2, 8, generator))
    collection = make_box_room_collection(tmp_path, num_train=1, num_test=1, num_val=0, image_size=8)
    write_scene(collection.scene_dir("room_000"), source, target, room.bev(), BEV_CLASSES)
    scene = collection.load_scene("room_000")
    for read, written in ((scene.source, source), (scene.target, target)):
        assert read.depths is not None and written.depths is not None
        torch.testing.assert_close(read.images, written.images, atol=0.5 / 255 + 1e-6, rtol=0)
        torch.testing.assert_close(read.depths, written.depths, atol=0.0005 + 1e-6, rtol=0)
        for name in ("camera_to_worlds", "fx", "fy", "cx", "cy", "height", "width"):
            torch.testing.assert_close(getattr(read.cameras, name), getattr(written.cameras, name))
    assert scene.bev is not None and np.array_equal(scene.bev, room.bev())


def test_collections_come_back_as_written(box_room_collection: SceneCollection) -> None:
    collection = SceneCollection.open(box_room_collection.root)
    assert collection.aabb.tolist() == [list(corner) for corner in AABB]
    assert {name: len(ids) for name, ids in collection.splits.items()} == {"train": 3, "val": 1, "test": 2}
    assert tuple(collection.bev_classes) == BEV_CLASSES
    batch = collection.batch([collection.load_scene(i) for i in collection.split("train")])
    assert batch.source.shape == (3, 8) and batch.target.shape == (3, 4)


def test_unknown_and_far_depths_are_unknown_on_disk(tmp_path: Path) -> None:
    views = BoxRoom.random(torch.Generator().manual_seed(0)).render(surround_cameras(1, 4, torch.Generator()))
    assert views.depths is not None
    views.depths[0, 0, 0] = torch.tensor([float("nan"), 70.0, -1.0, 0.0])
    collection = make_box_room_collection(tmp_path, num_train=1, num_test=1, num_val=0, image_size=4)
    write_scene(collection.scene_dir("room_000"), views, views)
    depths = collection.load_scene("room_000").source.depths
    assert depths is not None
    assert depths[0, 0, 0].eq(0).all() and depths[0, 0, 1:].gt(0).all()


def test_two_views_agree_through_depth_and_poses(box_room_collection: SceneCollection) -> None:
    """Points lifted from one view's file land in the other views where those have the same depth."""
    scene = box_room_collection.load_scene("room_000")
    assert scene.source.depths is not None and scene.target.depths is not None
    origins, directions = camera_rays(scene.source.cameras, *scene.source.image_size)
    points = (origins[:, None, None] + scene.source.depths[:, 0, ..., None] * directions).reshape(-1, 3)
    height, width = scene.target.image_size
    for i in range(scene.target.shape[0]):
        pixels, depth = project(scene.target.cameras[i], points)
        seen = (depth > 0.1) & (pixels > 0.5).all(-1) & (pixels < torch.tensor([width - 0.5, height - 0.5])).all(-1)
        where = pixels[seen] / torch.tensor([width, height]) * 2 - 1
        inverse = 1 / scene.target.depths[i : i + 1]  # linear across a plane, so that interpolation is exact
        found = 1 / F.grid_sample(inverse, where[None, None], align_corners=False)[0, 0, 0]
        error = (found - depth[seen]).abs()
        assert seen.sum() > 500
        assert error.median() < 0.002 and error.quantile(0.9) < 0.1  # the rest lies across edges of the room


def test_bev_maps_are_north_up(box_room_collection: SceneCollection) -> None:
    """The floor of the map is where the depth of the views ends."""
    scene = box_room_collection.load_scene("room_000")
    assert scene.bev is not None and scene.source.depths is not None
    origins, directions = camera_rays(scene.source.cameras, *scene.source.image_size)
    points = (origins[:, None, None] + scene.source.depths[:, 0, ..., None] * directions).reshape(-1, 3)
    low, high = box_room_collection.aabb
    cell = (high - low)[:2] / scene.bev.shape[0]
    rows, columns = np.nonzero(scene.bev == 1)
    floor_x = low[0] + (torch.tensor(columns) + 0.5) * cell[0]
    floor_y = high[1] - (torch.tensor(rows) + 0.5) * cell[1]
    for axis, floor in enumerate((floor_x, floor_y)):
        assert abs(floor.min() - points[:, axis].min()) < cell[axis]
        assert abs(floor.max() - points[:, axis].max()) < cell[axis]


def test_a_scene_folder_alone_is_a_nerfstudio_dataset(box_room_collection: SceneCollection) -> None:
    from nerfstudio.data.dataparsers.nerfstudio_dataparser import NerfstudioDataParserConfig

    folder = box_room_collection.scene_dir("room_000")
    config = NerfstudioDataParserConfig(
        data=folder, orientation_method="none", center_method="none", auto_scale_poses=False, load_3D_points=False
    )
    scene = box_room_collection.load_scene("room_000")
    for split, views in (("train", scene.source), ("test", scene.target)):
        outputs = config.setup().get_dataparser_outputs(split)
        assert len(outputs.image_filenames) == views.shape[0]
        torch.testing.assert_close(outputs.cameras.camera_to_worlds, views.cameras.camera_to_worlds)
        torch.testing.assert_close(outputs.cameras.fx, views.cameras.fx)
        assert len(outputs.metadata["depth_filenames"]) == views.shape[0]


def test_the_same_seed_writes_the_same_files(tmp_path: Path) -> None:
    roots = [tmp_path / "a", tmp_path / "b"]
    for root in roots:
        make_box_room_collection(root, num_train=1, num_test=1, num_val=0, image_size=4, seed=3)
    files = [{p.relative_to(root): p.read_bytes() for p in root.rglob("*") if p.is_file()} for root in roots]
    assert files[0] == files[1] and len(files[0]) > 20


# --- nothing half-written ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("as_folder", [False, True])
def test_a_failure_leaves_what_was_there(tmp_path: Path, as_folder: bool) -> None:
    destination = tmp_path / "out"
    write_json(destination / "old.json" if as_folder else destination, [1])
    before = sorted(p.relative_to(tmp_path) for p in tmp_path.rglob("*"))
    with pytest.raises(RuntimeError), atomic_path(destination) as temporary:
        write_json(temporary / "new.json" if as_folder else temporary, [2])
        raise RuntimeError
    assert sorted(p.relative_to(tmp_path) for p in tmp_path.rglob("*")) == before


def test_a_success_replaces_what_was_there(tmp_path: Path) -> None:
    destination = tmp_path / "out"
    for content in ("old", "new"):
        with atomic_path(destination) as temporary:
            write_json(temporary / f"{content}.json", content)
    assert [p.name for p in tmp_path.rglob("*")] == ["out", "new.json"]


def test_a_folder_never_replaces_a_file(tmp_path: Path) -> None:
    (tmp_path / "out").write_text("mine")
    with pytest.raises(NotADirectoryError), atomic_path(tmp_path / "out") as temporary:
        write_json(temporary / "new.json", [2])
    assert [p.name for p in tmp_path.rglob("*")] == ["out"]
    assert (tmp_path / "out").read_text() == "mine"


def test_a_folder_that_cannot_be_put_in_place_leaves_the_old_one(tmp_path: Path, monkeypatch) -> None:
    destination = tmp_path / "out"
    write_json(destination / "old.json", [1])
    rename = Path.replace

    def refuse_the_new_one(path: Path, target: Path) -> Path:
        if path.suffix == ".tmp" and target == destination:
            raise PermissionError(13, "Permission denied", str(target))
        return rename(path, target)

    monkeypatch.setattr(Path, "replace", refuse_the_new_one)
    with pytest.raises(PermissionError), atomic_path(destination) as temporary:
        write_json(temporary / "new.json", [2])
    monkeypatch.undo()
    assert [p.name for p in tmp_path.rglob("*")] == ["out", "old.json"]


def make_collection_and_expect_a_sentence(root: Path, capsys: pytest.CaptureFixture[str]) -> str:
    with pytest.raises(SystemExit) as exit_info, exit_on_bad_input():
        make_box_room_collection(root, num_train=1, num_test=1, num_val=0, image_size=32)
    assert exit_info.value.code == BAD_INPUT_EXIT_CODE
    message = capsys.readouterr().err
    assert message.startswith("error: ") and message.count("\n") == 1
    assert not list(root.parent.rglob("*.tmp")) and not list(root.rglob("transforms.json"))
    return message


def test_a_disk_that_fills_up_is_one_sentence(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    save, saved = Image.Image.save, []

    def save_until_full(image: Image.Image, path: Path, *args, **kwargs) -> None:
        if len(saved) == 5:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))
        saved.append(path)
        save(image, path, *args, **kwargs)

    monkeypatch.setattr(Image.Image, "save", save_until_full)
    message = make_collection_and_expect_a_sentence(tmp_path / "rooms", capsys)
    assert "The disk is full while writing" in message and "free some space" in message


def test_a_disk_that_is_really_full_is_one_sentence(small_disk: Path, capsys: pytest.CaptureFixture[str]) -> None:
    message = make_collection_and_expect_a_sentence(small_disk / "rooms", capsys)
    assert f"The disk is full while writing {small_disk / 'rooms'}" in message


@pytest.mark.parametrize("save", [save_file, torch.save], ids=["safetensors", "torch"])
def test_libraries_that_hide_a_full_disk(
    small_disk: Path, capsys: pytest.CaptureFixture[str], save: Callable[[dict[str, Tensor], Path], None]
) -> None:
    with pytest.raises(SystemExit), exit_on_bad_input(), atomic_path(small_disk / "weights") as temporary:
        save({"weights": torch.zeros(2**16)}, temporary)
    assert f"The disk is full while writing {small_disk / 'weights'}" in capsys.readouterr().err
    assert not list(small_disk.iterdir())


def test_an_unreadable_input_is_not_blamed_on_the_output(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="input"), atomic_path(tmp_path / "output"):
        (tmp_path / "input").read_text()


def test_a_read_only_folder_is_one_sentence(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "read_only"
    folder.mkdir(mode=0o555)
    privileged = os.geteuid() == 0
    if privileged:
        os.seteuid(65534)  # the administrator may write anywhere
    try:
        with pytest.raises(SystemExit) as exit_info, exit_on_bad_input():
            write_json(folder / "rooms" / "collection.json", {})
    finally:
        if privileged:
            os.seteuid(0)
    assert exit_info.value.code == BAD_INPUT_EXIT_CODE
    message = capsys.readouterr().err
    assert str(folder) in message and "is not writable: choose another output folder" in message
    assert not list(folder.iterdir())


def test_a_file_in_the_way_of_a_folder_is_one_sentence(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "rooms").write_text("not a folder")
    with pytest.raises(SystemExit) as exit_info, exit_on_bad_input():
        write_json(tmp_path / "rooms" / "collection.json", {})
    assert exit_info.value.code == BAD_INPUT_EXIT_CODE
    assert "in the way" in capsys.readouterr().err


def test_other_errors_keep_their_traceback() -> None:
    with pytest.raises(ZeroDivisionError), exit_on_bad_input():
        raise ZeroDivisionError
    with pytest.raises(SystemExit), exit_on_bad_input():
        raise UserInputError("x is wrong: repair it.")


def test_numbers_survive_json(tmp_path: Path) -> None:
    numbers = [1 / 3, 1e-300, -0.0, 2**53]
    write_json(tmp_path / "numbers.json", numbers)
    assert json.loads((tmp_path / "numbers.json").read_text()) == numbers


def test_views_evenly_spread_over_a_ring() -> None:
    yaws = torch.arange(8) * (math.pi / 4) + 0.3
    order = torch.tensor([0, 5, 2, 7, 4, 1, 6, 3])
    cameras = level_cameras(torch.zeros(8, 3), yaws[order], 8)
    torch.testing.assert_close(torch.exp(1j * view_yaws(cameras)), torch.exp(1j * yaws[order]))

    def chosen(count: int) -> list[int]:
        return sorted(int(order[i]) for i in evenly_spread_views(cameras, count))

    assert [chosen(count) for count in (1, 2, 4, 8)] == [[0], [0, 4], [0, 2, 4, 6], list(range(8))]
    for count in (3, 5, 6, 7):
        places = chosen(count)
        gaps = [(b - a) % 8 for a, b in zip(places, [*places[1:], places[0]], strict=True)]
        assert 0 in places and len(set(places)) == count and max(gaps) <= 8 // count + 1
    with pytest.raises(ValueError, match="9 views"):
        evenly_spread_views(cameras, 9)


def test_sparse_depth_keeps_known_values_and_nothing_else() -> None:
    depths = torch.rand(2, 3, 1, 16, 20) + 1
    depths[..., :4, :] = 0
    depths[1, 2] = 0
    depths[1, 2, 0, 7, :5] = 2.5
    sparse = sparse_depths(depths, 30, torch.Generator().manual_seed(1))
    kept = sparse > 0
    assert torch.equal(sparse[kept], depths[kept])
    counts = kept.flatten(2).sum(-1)
    assert counts.tolist() == [[30, 30, 30], [30, 30, 5]]  # all there are of the last
    assert torch.equal(sparse, sparse_depths(depths, 30, torch.Generator().manual_seed(1)))
    assert not torch.equal(sparse, sparse_depths(depths, 30, torch.Generator().manual_seed(2)))
    assert torch.equal(sparse_depths(depths, 10_000, torch.Generator()), depths)
