"""Real scenes from VizDoom, through the command."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from nfldm_ns.collect.checking import check_collection
from nfldm_ns.collect.doom_geometry import UNITS_PER_METRE, DoomGeometry
from nfldm_ns.collect.doom_renderer import HALF_FOV_TANGENT, DoomRenderer, shrink
from nfldm_ns.commands.collect import main
from nfldm_ns.scenes.collection import SceneCollection
from tests.doom_maps import freedoom

OPTIONS = ["--image-size", "32", "--min-light", "200", "--maps", "freedoom2/MAP08", "freedoom2/MAP04"]


def run(root: Path, *options: str) -> int:
    with pytest.raises(SystemExit) as end:
        main(["vizdoom", str(root), *OPTIONS, *options])
    return int(end.value.code or 0)


@pytest.fixture(scope="module")
def collected(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Six scenes of two maps; one of the maps is held out."""
    root = tmp_path_factory.mktemp("vizdoom") / "scenes"
    assert run(root, "--num-scenes", "6", "--test-fraction", "0.34", "--workers", "2") == 0
    return root


def files(root: Path) -> dict[str, bytes]:
    return {str(path.relative_to(root)): path.read_bytes() for path in sorted(root.rglob("*.png"))}


def test_scenes_are_whole_and_their_depths_agree(collected: Path) -> None:
    collection = SceneCollection.open(collected)
    assert [len(ids) for ids in collection.splits.values()] == [4, 0, 2]
    report = check_collection(collection)
    assert report.ok, report.all_problems
    assert {(s.num_source, s.num_target) for s in report.scenes} == {(8, 4)}
    assert np.median([s.reprojection.median_error for s in report.scenes]) < 0.02
    assert np.median([s.reprojection.consistent for s in report.scenes]) > 0.8
    assert min(s.brightness for s in report.scenes) > 0.1
    assert min(s.inside for s in report.scenes) > 0.5
    assert (collected / "contact_sheet.png").is_file()


def test_splits_share_no_map(collected: Path) -> None:
    collection = SceneCollection.open(collected)
    maps = {name: {collection.places[i]["map"] for i in ids} for name, ids in collection.splits.items()}
    assert len(maps["train"]) == len(maps["test"]) == 1 and not maps["train"] & maps["test"]


def test_cameras_surround_the_origin(collected: Path) -> None:
    collection = SceneCollection.open(collected)
    scene = collection.load_scene(collection.scene_ids[0])
    cameras = scene.source.cameras
    torch.testing.assert_close(cameras.fx, torch.full_like(cameras.fx, 16 / HALF_FOV_TANGENT))
    torch.testing.assert_close(cameras.fx, cameras.fy)
    poses = cameras.camera_to_worlds
    assert poses[:, :, 3].mean(dim=0).abs().max() < 1e-5
    forward = -poses[:, :, 2]
    yaws = torch.rad2deg(torch.atan2(forward[:, 1], forward[:, 0]))
    assert ((torch.diff(yaws) % 360 - 45).abs() < 17).all()
    assert scene.bev is not None and scene.bev.shape == (64, 64)
    assert scene.bev[32, 32] in (1, 2, 3, 4, 5)


@pytest.mark.slow
def test_an_interrupted_run_ends_in_the_same_scenes(collected: Path, tmp_path: Path) -> None:
    root = tmp_path / "again"
    shutil.copytree(collected, root)
    (root / "collection.json").unlink()
    (root / "contact_sheet.png").unlink()
    for folder in sorted((root / "scenes").iterdir())[::2]:
        shutil.rmtree(folder)
    assert run(root, "--num-scenes", "6", "--test-fraction", "0.34", "--workers", "1") == 0
    assert files(root) == files(collected)
    assert (root / "collection.json").read_bytes() == (collected / "collection.json").read_bytes()


def test_other_options_need_another_folder(collected: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(collected, "--num-scenes", "6", "--test-fraction", "0.34", "--seed", "1") == 2
    assert "was begun with other options (scenes)" in capsys.readouterr().err


def test_what_cannot_be_collected_is_one_sentence(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.txt").write_text("mine")
    cases = {
        "is not empty": (tmp_path / "full", []),
        "No map matches": (tmp_path / "a", ["--maps", "doom/E9M9"]),
        "only map": (tmp_path / "b", ["--maps", "freedoom2/MAP08"]),
        "0 scenes": (tmp_path / "c", ["--num-scenes", "0"]),
        "less than one": (tmp_path / "d", ["--test-fraction", "1.5"]),
        "All maps are held out": (tmp_path / "e", ["--test-maps", "freedoom2/MAP0[48]"]),
    }
    for message, (root, options) in cases.items():
        assert run(root, *options) == 2
        error = capsys.readouterr().err
        assert message in error and error.startswith("error: ") and error.count("\n") == 1
        assert not (root / "scenes").exists()
    assert [path.name for path in (tmp_path / "full").iterdir()] == ["thesis.txt"]


def test_the_ray_cast_is_what_the_game_draws() -> None:
    wad = freedoom()
    geometry = DoomGeometry(wad.read_map("MAP08"))
    start = wad.read_map("MAP08").things
    start = start[start["type"] == 1][0]
    with DoomRenderer(wad, ["MAP08"], 64, keep_sprites=False, min_light=0) as renderer:
        renderer.start("MAP08", 0)
        for angle in (10.0, 100.0, 190.0, 280.0):
            frame = renderer.render(float(start["x"]), float(start["y"]), angle)
            assert frame is not None and abs((frame.angle - angle + 180) % 360 - 180) < 0.1
            cast = geometry.cast(frame.eye[None], np.array([frame.angle]), 64, HALF_FOV_TANGENT, 3000.0)[0]
            known = np.isfinite(frame.depth)
            error = np.abs(cast[known] - frame.depth[known])
            assert known.mean() > 0.5 and np.median(error) < 4 and (error < 10).mean() > 0.95
        first = renderer.render(*map(float, frame.eye[:2]), 45.0)
        renderer.start("MAP08", 0)
        second = renderer.render(*map(float, frame.eye[:2]), 45.0)
        assert first is not None and second is not None
        assert np.array_equal(first.image, second.image) and np.array_equal(first.depth, second.depth)
    floor = geometry.floor[geometry.sector_at(frame.eye[None, :2])[0]]
    assert frame.eye[2] - floor == pytest.approx(1.6 * UNITS_PER_METRE, abs=0.05)


def test_renders_are_averaged_but_depths_are_not() -> None:
    screen = np.zeros((480, 640, 3), np.uint8)
    screen[:, 320:] = 200
    buffer = np.full((480, 640), 10, np.uint8)
    buffer[:, 320:] = 100
    buffer[:48] = 255
    image, depth = shrink(screen, buffer, 5)
    assert image[0, :, 0].tolist() == [0, 0, 100, 200, 200]
    near, far = 10 * 7.153 + 15, 100 * 7.153 + 15
    np.testing.assert_allclose(depth[2], [near, near, far, far, far])
    assert np.isfinite(depth[0]).all() and np.isinf(shrink(screen, buffer, 10)[1][0]).all()


def test_depth_files_are_sixteen_bit_millimetres(collected: Path) -> None:
    path = next(collected.glob("scenes/*/depths/*.png"))
    depth = np.asarray(Image.open(path))
    assert depth.dtype == np.uint16 and 300 < np.median(depth[depth > 0]) < 30000
