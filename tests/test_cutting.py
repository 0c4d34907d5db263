"""Long captures are cut into scenes of places along their paths."""

from __future__ import annotations

import json
import pickle
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from nerfstudio.cameras.cameras import Cameras
from PIL import Image
from transformers import DPTImageProcessor

from nfldm_ns.collect import cut_collection, monocular_depth
from nfldm_ns.collect.capture_import import ImportOptions, resolved_size, world_poses
from nfldm_ns.collect.checking import check_collection
from nfldm_ns.collect.cut_collection import CutOptions, CutReport, cut_captures
from nfldm_ns.collect.cutting import (
    Place,
    Survey,
    Walls,
    assign_splits,
    coarse_depth,
    found_box,
    places_along,
    views_of_place,
)
from nfldm_ns.collect.formats.nerfstudio import read_capture
from nfldm_ns.collect.monocular_depth import aligned_depth, completed_depth
from nfldm_ns.collect.orientation import floor_drop, upright
from nfldm_ns.commands.collect import main
from nfldm_ns.errors import UserInputError
from nfldm_ns.scenes.collection import SceneCollection
from nfldm_ns.scenes.views import Views
from nfldm_ns.scenes.writing import write_depth
from tests import more_formats
from tests import rgbd_formats as formats
from tests.corridors import CEILING, EYE, L_CORNERS, L_SHAPED, PARALLEL, PARALLEL_CORNERS, walk, write_capture
from tests.synthetic import BoxRoom

SIZE = 24
HALF = 1.6
BOX = ((-HALF, -HALF, -1.7), (HALF, HALF, 1.5))
OPTIONS = ImportOptions(image_size=(SIZE, SIZE), num_source_views=5, num_target_views=2, test_fraction=0.2)
CUT = CutOptions(box=BOX, spacing=0.8, min_inside=0.3)


@pytest.fixture(scope="module")
def views() -> Views:
    return L_SHAPED.render(walk(L_CORNERS, 0.2, SIZE))


@pytest.fixture(scope="module")
def capture(views: Views, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_capture(tmp_path_factory.mktemp("captures") / "hall", views)


@pytest.fixture(scope="module")
def cut(capture: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, CutReport]:
    root = tmp_path_factory.mktemp("cut") / "out"
    return root, cut_captures(root, [capture], OPTIONS, CUT, read_capture, {"command": "test"})


def survey_of(views: Views) -> Survey:
    assert views.depths is not None
    cameras = views.cameras
    intrinsics = torch.cat([cameras.fx, cameras.fy, cameras.cx, cameras.cy], dim=-1)
    return Survey(
        cameras.camera_to_worlds.double().numpy(), views.depths[:, 0].double().numpy(), intrinsics.double().numpy()
    )


def files(root: Path) -> dict[str, bytes]:
    return {str(p.relative_to(root)): p.read_bytes() for p in sorted(root.rglob("*")) if p.is_file()}


def random_rotation(seed: int) -> np.ndarray:
    rotation = np.linalg.qr(np.random.default_rng(seed).normal(size=(3, 3)))[0]
    return rotation * np.sign(np.linalg.det(rotation))


class TestOrientation:
    @pytest.mark.parametrize("up", ["cameras", "path"])
    def test_up_of_a_tilted_capture_is_found(self, up, views: Views) -> None:
        poses = views.cameras.camera_to_worlds.double().numpy()
        for seed in range(4):
            tilt = random_rotation(seed)
            found = upright(tilt @ poses, up, "x")
            assert np.allclose(found @ found.T, np.eye(3), atol=1e-9) and np.linalg.det(found) > 0
            assert np.allclose(found @ tilt @ [0, 0, 1], [0, 0, 1], atol=1e-4)

    def test_up_of_cameras_that_look_down(self) -> None:
        cameras = walk(L_CORNERS, 0.5, 8).camera_to_worlds.double().numpy()
        down = np.array([[1.0, 0, 0], [0, np.cos(0.6), np.sin(0.6)], [0, -np.sin(0.6), np.cos(0.6)]])
        pitched = cameras.copy()
        pitched[:, :, :3] = cameras[:, :, :3] @ down
        assert np.allclose(upright(pitched, "cameras", "x"), np.eye(3), atol=1e-6)

    def test_up_of_cameras_that_do_not_turn(self) -> None:
        poses = np.tile(walk(L_CORNERS, 0.5, 8).camera_to_worlds[0].double().numpy(), (9, 1, 1))
        poses[:, 0, 3] += np.arange(9)
        assert np.allclose(upright(poses, "cameras", "x"), np.eye(3), atol=1e-6)
        with pytest.raises(UserInputError, match="cameras of x stand in a line, .*: use --up cameras"):
            upright(poses, "path", "x")

    def test_axes(self) -> None:
        poses = np.zeros((1, 3, 4))
        for up, axis in (("z", (0, 0, 1)), ("y", (0, 1, 0)), ("-y", (0, -1, 0))):
            assert np.allclose(upright(poses, up, "x") @ axis, (0, 0, 1))

    def test_floor_is_found_below_a_table_and_not_in_walls(self) -> None:
        rng = np.random.default_rng(0)
        walls = rng.uniform(-1, 1.6, 4000)
        floor, table = 1.6 + rng.normal(0, 0.01, 3000), 0.8 + rng.normal(0, 0.01, 2000)
        found = floor_drop(np.concatenate([walls, floor, table]))
        assert found == pytest.approx(1.6, abs=0.02)
        assert floor_drop(walls) is None and floor_drop(floor[:20]) is None

    def test_floor_of_the_corridor(self, views: Views) -> None:
        assert survey_of(views).camera_height() == pytest.approx(EYE, abs=0.03)


class TestPlaces:
    def test_path_of_several_cameras_leaves_out_what_is_between_them(self) -> None:
        """Three cameras, 1 m apart, that drive 10 m together, at nine moments."""
        eyes = np.zeros((9, 3, 3))
        eyes[..., 0] = np.linspace(0, 10, 9)[:, None]
        eyes[..., 1] = (-1, 0, 1)
        poses = np.concatenate([np.tile(np.eye(3), (27, 1, 1)), eyes.reshape(27, 3, 1)], axis=2)
        survey = Survey(poses, np.zeros((27, 2, 2)), np.ones((27, 4)), ["left", "middle", "right"] * 9)
        assert survey.path_length[::3] == pytest.approx(np.linspace(0, 10, 9))
        assert (np.diff(survey.path_length) >= 0).all() and survey.path_length[-1] == pytest.approx(10)
        assert survey.scaled(2.0).path_length[-1] == pytest.approx(20)
        assert replace(survey, cameras=None).path_length[-1] > 30

    def test_points_lie_on_the_corridor(self, views: Views) -> None:
        points = survey_of(views).points.reshape(-1, 3)
        in_l = ((points[:, :2] <= 14.01).all(-1)) & ((points[:, 1] <= 3.01) | (points[:, 0] >= 10.99))
        assert in_l.all() and points[:, 2].min() > -0.01 and points[:, 2].max() < CEILING + 0.01

    def test_coarse_depth_keeps_single_points(self) -> None:
        depth = np.zeros((96, 64))
        depth[5, 7], depth[6, 6], depth[90, 60] = 3.0, 2.0, 4.0
        coarse = coarse_depth(depth)
        assert coarse.shape == (24, 16)
        assert coarse[1, 1] == 2.0 and coarse[22, 15] == 4.0 and (coarse > 0).sum() == 2

    def test_coarse_surveys_see_the_same_points(self) -> None:
        for size in (48, 72):
            cameras = walk(L_CORNERS, 2.0, size)
            views = L_SHAPED.render(cameras)
            full = survey_of(views)
            grids = np.stack([coarse_depth(depth) for depth in full.depths])
            lens = np.stack([cut_collection.coarse_intrinsics(row, (size, size)) for row in full.intrinsics])
            drops = EYE - Survey(full.poses, grids, lens).points[..., 2]
            assert grids.shape[1:] == (24, 24)
            assert drops.max() < EYE + 1e-4 and (np.abs(drops - EYE) < 1e-4).mean() > 0.1

    def test_places_are_spaced_along_the_path_and_not_twice(self, views: Views) -> None:
        survey = survey_of(views)
        frames = places_along(survey, 1.0)
        gaps = np.diff(survey.path_length[frames])
        assert frames[0] == 0 and survey.path_length[-1] - survey.path_length[frames[-1]] < 1.3
        assert gaps.min() >= 1.0 - 1e-4 and gaps.max() < 1.3
        there_and_back = Survey(
            np.concatenate([survey.poses, survey.poses[::-1]]),
            np.concatenate([survey.depths, survey.depths[::-1]]),
            np.concatenate([survey.intrinsics, survey.intrinsics[::-1]]),
        )
        assert len(places_along(there_and_back, 1.0)) <= len(frames) + 1

    def test_a_view_behind_a_wall_is_not_counted(self) -> None:
        survey = survey_of(PARALLEL.render(walk(PARALLEL_CORNERS, 0.25, SIZE)))
        box = ((-6.0, -6.0, -1.7), (6.0, 6.0, 1.5))
        place = np.array([4.0, 1.0, EYE])
        walls = Walls(survey, 0.15)
        seeing = views_of_place(survey, walls, place, box, reach=3.0, min_inside=0.3)
        near = np.linalg.norm(survey.eyes - place, axis=1) <= 3.0
        assert (survey.eyes[near, 1] > 2.2).sum() > 5, "there are views to be left out"
        assert len(seeing) > 15 and (survey.eyes[seeing, 1] < 2.2).all()
        assert walls.between(survey.eyes[:1], survey.eyes[-1]).all()
        assert not walls.between(survey.eyes[:10], survey.eyes[20]).any()

    def test_views_see_points_before_surfaces_and_not_behind(self, views: Views) -> None:
        survey = survey_of(views)
        for frame in (0, 40, 90):
            points = survey.points[frame]
            eye = survey.eyes[frame]
            assert survey.sees(frame, points).all()
            assert survey.sees(frame, eye + 0.5 * (points - eye)).all()
            assert not survey.sees(frame, eye + 1.3 * (points - eye)).any()
            assert not survey.sees(frame, eye - (points - eye)).any()

    def test_boxes_are_found_by_depth_and_path(self, views: Views) -> None:
        survey = survey_of(views)
        (x0, y0, z0), (x1, y1, z1) = found_box([survey], held_out=False)
        assert -x0 == -y0 == x1 == y1 and -1.8 <= z0 <= -EYE and 0.8 < z1 < 2
        inside = np.hypot(*(survey.points - survey.eyes[:, None])[..., :2].reshape(-1, 2).T) < x1
        assert 0.6 < inside.mean() <= 0.85
        short = found_box([survey], held_out=True)
        assert short[1][0] <= np.ptp(survey.eyes[:, :2], axis=0).max() / 6
        larger = found_box([survey.scaled(10)], held_out=False)
        assert larger[1][0] == 10.0
        assert found_box([replace(survey, depths=0 * survey.depths)], held_out=False) is None


def places(*xs: float) -> list[Place]:
    return [Place(i, x, np.array([x, 0.0, 0.0])) for i, x in enumerate(xs)]


class TestSplits:
    def test_held_out_stretches_are_far_from_the_rest(self) -> None:
        row = places(*np.arange(0, 40, 1.0))
        assign_splits(row, 4.0, {"test": 0.2, "val": 0.1})
        used = [place for place in row if place.split]
        assert {place.split for place in used} == {"train", "val", "test"}
        for a in used:
            for b in used:
                assert a.split == b.split or abs(a.along - b.along) >= 4.0
        tests = [place.frame for place in row if place.split == "test"]
        assert tests == list(range(tests[0], tests[0] + 8)), "one stretch"
        assert all(bool(place.split) != bool(place.dropped) for place in row)
        assert tests[0] == 0 or tests[-1] == 39, "an end leaves the most for training"

    def test_a_path_that_comes_back_is_no_other_place(self) -> None:
        there = np.arange(0, 20, 1.0)
        row = places(*there, *there[::-1])
        assign_splits(row, 3.0, {"test": 0.2})
        held_out = [place.origin[0] for place in row if place.split == "test"]
        trained = [place.origin[0] for place in row if place.split == "train"]
        assert held_out and trained
        assert min(abs(a - b) for a in held_out for b in trained) >= 3.0

    def test_a_short_path_is_all_for_training(self) -> None:
        row = places(0.0, 1.0, 2.0)
        assign_splits(row, 4.0, {"test": 0.5})
        assert [place.split for place in row] == ["train"] * 3


class TestCollection:
    def test_boxes_lie_along_the_path(self, cut: tuple[Path, CutReport], views: Views) -> None:
        root, report = cut
        collection = SceneCollection.open(root)
        assert collection.splits == report.splits and len(collection.scene_ids) > 10
        assert np.allclose(collection.aabb, BOX)
        eyes = views.cameras.camera_to_worlds[:, :, 3].numpy()
        for place in collection.places.values():
            assert np.linalg.norm(eyes - place["origin"], axis=1).min() < 0.5
            assert place["map"] == "hall"
        floors = [place["floor"] for place in collection.places.values() if "floor" in place]
        assert len(floors) > 0.7 * len(collection.places) and np.allclose(floors, -EYE, atol=0.05)
        checked = check_collection(collection)
        assert checked.ok, checked.all_problems
        assert all((s.num_source, s.num_target) == (5, 2) for s in checked.scenes)

    def test_splits_share_neither_places_nor_frames(self, cut: tuple[Path, CutReport]) -> None:
        used = {split: [p for p in cut[1].captures[0].places if p.split == split] for split in ("train", "test")}
        frames = {split: {i for p in row for i in (*p.sources, *p.targets)} for split, row in used.items()}
        assert frames["train"] and frames["test"] and not frames["train"] & frames["test"]
        for a in used["train"]:
            assert all(np.abs(a.origin - b.origin)[:2].max() >= 2 * HALF for b in used["test"])
            assert not set(a.sources) & set(a.targets)

    def test_scenes_are_the_captured_views(self, cut: tuple[Path, CutReport], views: Views) -> None:
        found = cut[1].captures[0]
        place = next(place for place in found.places if place.split)
        scene = SceneCollection.open(cut[0]).load_scene(found.scene_id(place))
        expected = views[place.targets]
        assert scene.target.depths is not None and expected.depths is not None
        torch.testing.assert_close(scene.target.images, expected.images, atol=1 / 255, rtol=0)
        torch.testing.assert_close(scene.target.depths, expected.depths, atol=1e-3, rtol=0)
        poses = scene.target.cameras.camera_to_worlds[..., 3].double().numpy() + place.origin
        assert np.allclose(poses, expected.cameras.camera_to_worlds[..., 3].numpy(), atol=1e-5)

    def test_report_and_picture(self, cut: tuple[Path, CutReport]) -> None:
        root, _report = cut
        told = json.loads((root / "cutting" / "report.json").read_text())["captures"]["hall"]
        assert told["camera_height"] == pytest.approx(EYE, abs=0.05) and told["scale"] == 1
        assert told["path_length"] == pytest.approx(22.8, abs=0.3)
        assert {place["split"] for place in told["places"]} == {"train", "test", None}
        assert all(bool(place["split"]) != bool(place["dropped"]) for place in told["places"])
        pixels = np.asarray(Image.open(root / "cutting" / "hall.png").convert("RGB")).reshape(-1, 3).astype(int)
        for colour in ((31, 119, 180), (214, 39, 40), (0, 0, 0)):  # training boxes, test boxes, the path
            assert (np.abs(pixels - colour).max(axis=-1) < 12).sum() > 30, colour

    def test_an_interrupted_run_and_two_workers_give_the_same_files(
        self, capture: Path, cut: tuple[Path, CutReport], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        root, written = tmp_path / "out", []

        def stop(*args, **kwargs) -> None:
            if len(written) == 3:
                raise KeyboardInterrupt
            written.append(args[0])
            original(*args, **kwargs)

        original = cut_collection.write_scene
        monkeypatch.setattr(cut_collection, "write_scene", stop)
        run = partial(cut_captures, root, [capture], OPTIONS, CUT, read_capture, {"command": "test"})
        with pytest.raises(KeyboardInterrupt):
            run()
        assert len(list((root / "scenes").iterdir())) == 3 and not (root / "collection.json").exists()
        monkeypatch.undo()
        told = []
        run(workers=2, on_progress=lambda *values: told.append(values))
        assert files(root) == files(cut[0])
        count = len(SceneCollection.open(root).scene_ids)
        assert told == [("scenes", i, count) for i in range(4, count + 1)], "neither surveyed nor written twice"

    def test_camera_height_gives_the_scale(self, views: Views, cut: tuple[Path, CutReport], tmp_path: Path) -> None:
        small = replace(views, depths=views.depths * 0.3)
        poses = views.cameras.camera_to_worlds.clone()
        poses[..., 3] *= 0.3
        small.cameras = replace(views.cameras, camera_to_worlds=poses)
        folder = write_capture(tmp_path / "hall", small)
        root = tmp_path / "out"
        options = replace(CUT, camera_height=EYE)
        report = cut_captures(root, [folder], OPTIONS, options, read_capture, {"command": "test"})
        assert report.captures[0].scale == pytest.approx(1 / 0.3, rel=0.02)
        assert report.captures[0].camera_height == pytest.approx(EYE)
        assert check_collection(SceneCollection.open(root)).ok
        ours, theirs = (r.captures[0].survey.path_length[-1] for r in (report, cut[1]))
        assert ours == pytest.approx(theirs, rel=0.02)

    def test_masked_pixels_stay_masked_and_see_nothing(self, views: Views, tmp_path: Path) -> None:
        masks = torch.ones_like(views.depths, dtype=torch.bool)
        masks[..., SIZE // 2 :, :] = False  # the floor, as by the bonnet of a car
        folder = write_capture(tmp_path / "hall", replace(views, masks=masks))
        root = tmp_path / "out"
        report = cut_captures(root, [folder], OPTIONS, replace(CUT, min_inside=0.1), read_capture, {})
        assert report.captures[0].camera_height is None
        assert not report.captures[0].survey.depths[:, 12:].any()
        scene = SceneCollection.open(root).load_scene(report.splits["train"][0])
        assert scene.source.masks is not None and torch.equal(scene.source.masks, masks[:5])

    def test_own_aspect_is_kept(self, capture: Path, tmp_path: Path) -> None:
        found = read_capture(capture)
        for wanted, result in {(0, 0): (16, 16), (48, 0): (48, 48), (0, 30): (32, 30), (64, 48): (64, 48)}.items():
            assert resolved_size(found, wanted) == result
        with pytest.raises(UserInputError, match="-1 x 0 is negative"):
            resolved_size(found, (-1, 0))
        wide = Image.new("RGB", (100, 60))
        for frame in found.frames:
            assert frame.image.exists()
        wide.save(tmp_path / "wide.png")
        frames = [replace(found.frames[0], image=tmp_path / "wide.png")]
        assert resolved_size(replace(found, frames=frames), (0, 0)) == (96, 48)
        assert resolved_size(replace(found, frames=frames), (128, 0)) == (128, 80)

    def test_whole_captures_are_held_out(self, views: Views, tmp_path: Path) -> None:
        folders = [write_capture(tmp_path / name, views[begin : begin + 40]) for name, begin in (("a", 0), ("b", 60))]
        for name, options, cut_options in (
            ("named", replace(OPTIONS, test_scenes=("b",)), CUT),
            ("drawn", OPTIONS, replace(CUT, hold_out="captures")),
        ):
            report = cut_captures(tmp_path / name, folders, options, cut_options, read_capture, {})
            (test,) = {scene_id[0] for scene_id in report.splits["test"]}
            assert {scene_id[0] for scene_id in report.splits["train"]} == {"a", "b"} - {test}
            assert name == "drawn" or test == "b"


@pytest.fixture
def pickled(monkeypatch: pytest.MonkeyPatch) -> None:
    """What tasks are given has been through pickle, as if other processes did them."""
    original = cut_collection.run_tasks

    def run_tasks(start, state, task, arguments, workers, on_done) -> None:
        original(start, *pickle.loads(pickle.dumps((state, task, arguments))), workers, on_done)

    monkeypatch.setattr(cut_collection, "run_tasks", run_tasks)


def cut_room(kind: str, root: Path, write, *options: str) -> SceneCollection:
    """The cut of a walk of 44 frames in one room, written by `write` for cameras, which gives the capture's folder."""
    cameras = walk(((-1.2, -1.0), (1.2, -1.0), (1.2, 1.0)), 0.1, SIZE)
    room = BoxRoom(torch.tensor([[-2.5, -2.5, -0.2], [2.5, 2.5, 2.9]]), torch.rand(2, 3, 3))
    box = ["--box", "-4", "-4", "-2", "4", "4", "2"]
    command = [kind, str(write(room, cameras)), str(root), "--image-size", "24", "24", *box]
    with pytest.raises(SystemExit) as end:
        main([*command, "--cut", "--test-fraction", "0", "--spacing", "0.5", *options])
    assert not end.value.code
    return SceneCollection.open(root)


@pytest.mark.usefixtures("pickled")
@pytest.mark.parametrize("kind", [*formats.WRITERS, *more_formats.WRITERS])
def test_every_format_can_be_cut(kind: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "data_2d_raw" / "room" if kind == "kitti360" else tmp_path / "room"

    def write(room: BoxRoom, cameras: Cameras) -> Path:
        {**formats.WRITERS, **more_formats.WRITERS}[kind](folder, room, cameras)
        return folder

    focal = float(walk(((0.0, 0.0), (1.0, 0.0)), 0.5, SIZE).fx[0])
    options = formats.options_of(kind, SIZE, focal) if kind in formats.WRITERS else more_formats.OPTIONS.get(kind, [])
    collection = cut_room(kind, tmp_path / "out", write, *options)
    printed = capsys.readouterr().out
    assert len(collection.scene_ids) >= 6
    assert "No place was held out for testing" in printed and "of path, 44 frames" in printed
    scene = collection.load_scene(collection.scene_ids[0])
    assert scene.source.depths is not None and scene.source.shape == (8,) and scene.target.shape == (4,)
    assert scene.bev is None


@pytest.mark.usefixtures("pickled")
@pytest.mark.parametrize("scale", [1.0, 0.8])
def test_scenes_cut_of_nuscenes_have_the_map_of_their_box(scale: float, tmp_path: Path) -> None:
    """All that is drivable lies north of the line y = 0.5 and east of x = -1, in units of the poses."""

    def write(room: BoxRoom, cameras: Cameras) -> Path:
        more_formats.write_nuscenes(tmp_path / "in", {"room": (room, cameras)})
        more_formats.write_map_expansion(tmp_path / "in", [(-1, 0.5), (50, 0.5), (50, 50), (-1, 50)])
        return tmp_path / "in"

    masks = tmp_path / "masks"
    for channel in more_formats.NUSCENES_CAMERAS:
        (masks / channel).mkdir(parents=True)
        for i in range(22):
            Image.fromarray(np.full((SIZE, SIZE), 255, np.uint8)).save(masks / channel / f"room-{i}.png")
    height = ["--camera-height", str(scale * (EYE + 0.2))]
    options = [*more_formats.OPTIONS["nuscenes"], "--masks", str(masks), *(height if scale != 1 else [])]
    collection = cut_room("nuscenes", tmp_path / "out", write, *options)
    assert [c.name for c in collection.bev_classes][1] == "drivable area" and len(collection.scene_ids) >= 4
    report = json.loads((tmp_path / "out" / "cutting" / "report.json").read_text())["captures"]["room"]
    assert report["scale"] == pytest.approx(scale, rel=0.03)
    low, high = (np.array(corner[:2]) for corner in collection.aabb)
    steps = (np.arange(64) + 0.5) / 64
    for scene_id in collection.scene_ids:
        place = collection.places[scene_id]["origin"]
        x, y = low[0] + steps * (high[0] - low[0]) + place[0], high[1] - steps * (high[1] - low[1]) + place[1]
        expected = (y > 0.5 * scale)[:, None] & (x > -scale)[None]
        assert np.mean((collection.load_bev(scene_id, (64, 64)) == 1) != expected) < 0.04
        assert 0.1 < expected.mean() < 0.9
    made_by = json.loads((tmp_path / "out" / "collection.json").read_text())["made_by"]
    assert made_by["masks"] == str(masks), "a path, as JSON has it"
    problems = check_collection(collection).all_problems
    assert len(problems) == 1 and "has no test split" in problems[0]


def run(root: Path, captures: list[Path], *options: str) -> int:
    with pytest.raises(SystemExit) as end:
        main(["nerfstudio", *map(str, captures), str(root), "--image-size", "24", "24", *options])
    return int(end.value.code or 0)


def test_what_cannot_be_cut_is_one_sentence(
    capture: Path, views: Views, cut: tuple[Path, CutReport], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    short = write_capture(tmp_path / "short", views[:6])
    blind = write_capture(tmp_path / "blind", replace(views[:20], depths=None))
    small_box = ["--box", "-0.1", "-0.1", "-0.1", "0.1", "0.1", "0.1"]
    cases: list[tuple[str, list[Path], list[str]]] = [
        ("short has 6 frames, too few for scenes of 8 source and 4 target views", [short], ["--cut"]),
        ("blind has no depth, without which nothing says", [blind], ["--cut"]),
        ("--spacing is for captures that are cut: add --cut", [capture], ["--spacing", "2"]),
        ("--hold-out is for captures that are cut", [capture], ["--hold-out", "captures"]),
        ("--spacing is 0, but must be a number of metres above 0", [capture], ["--cut", "--spacing", "0"]),
        ("--camera-height is -1", [capture], ["--cut", "--camera-height", "-1"]),
        ("--min-inside is 1.5, but must be a share", [capture], ["--cut", "--min-inside", "1.5"]),
        ("workers must be at least one", [capture], ["--cut", "--workers", "0"]),
        ("The fractions of held-out scenes", [capture], ["--cut", "--test-fraction", "1"]),
        ("The box must hold its place", [capture], ["--cut", "--box", "1", "-1", "-1", "2", "1", "1"]),
        ("no capture folder", [tmp_path / "none"], ["--cut"]),
        ("not among the captures", [capture], ["--cut", "--test-scenes", "other"]),
    ]
    for message, given, options in cases:
        assert run(tmp_path / "out", given, *options) == 2, message
        error = capsys.readouterr().err
        assert message in error and error.count("error: ") == 1
        assert not (tmp_path / "out").exists(), message
    assert run(tmp_path / "few", [capture], "--cut", *small_box) == 2
    assert "became a training scene (too few views see the box): ask for fewer" in capsys.readouterr().err
    assert run(cut[0], [capture], "--cut") == 2
    assert "was begun with other options" in capsys.readouterr().err
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").write_text("")
    assert run(tmp_path / "mine", [capture], "--cut") == 2
    assert "is not empty and was not begun by this command" in capsys.readouterr().err


def test_cameras_without_a_floor_have_no_scale_by_height(views: Views, tmp_path: Path) -> None:
    masks = torch.ones_like(views.depths, dtype=torch.bool)
    masks[..., SIZE // 2 :, :] = False
    folder = write_capture(tmp_path / "hall", replace(views, masks=masks)[:40])
    with pytest.raises(UserInputError, match="No floor is seen below the cameras of .*hall, so that --camera-height"):
        cut_captures(tmp_path / "out", [folder], OPTIONS, replace(CUT, camera_height=1.5), read_capture, {})


def test_depth_of_another_unit_is_told_before_scenes_are_made(views: Views, tmp_path: Path) -> None:
    folder = write_capture(tmp_path / "hall", views[:30])
    for path in (folder / "depths").iterdir():
        write_depth(path, np.asarray(Image.open(path)) / 1000 * 20)
    with pytest.raises(UserInputError, match="have a median of .* m, not between 0.1 and 30 m: set --depth-unit-scale"):
        cut_captures(tmp_path / "out", [folder], OPTIONS, CUT, read_capture, {})
    assert not (tmp_path / "out" / "scenes").exists()


def test_tilted_captures_are_cut_upright(views: Views, tmp_path: Path) -> None:
    tilt = torch.from_numpy(random_rotation(3)).float()
    tilted = replace(views, cameras=replace(views.cameras, camera_to_worlds=tilt @ views.cameras.camera_to_worlds))
    folder = write_capture(tmp_path / "hall", tilted)
    options = replace(OPTIONS, up="cameras")
    report = cut_captures(tmp_path / "out", [folder], options, CUT, read_capture, {})
    assert report.captures[0].camera_height == pytest.approx(EYE, abs=0.05)
    scene = SceneCollection.open(tmp_path / "out").load_scene(report.splits["train"][0])
    assert torch.allclose(scene.source.cameras.camera_to_worlds[:, 2, 1], torch.ones(5), atol=1e-4)
    assert np.allclose(world_poses(read_capture(folder), options)[:, 2, 1], 1, atol=1e-4)


class TestMonocularDepth:
    @pytest.mark.parametrize("inverse", [False, True])
    def test_scale_and_shift_are_found_among_wrong_points(self, inverse: bool) -> None:
        rng = np.random.default_rng(0)
        depth = np.linspace(1, 6, 400).reshape(20, 20)
        guess = (1 / depth if inverse else depth) * 0.37 - 0.05
        sparse = np.where(rng.random(depth.shape) < 0.2, depth, 0)
        wrong = (sparse > 0) & (rng.random(depth.shape) < 0.2)
        sparse[wrong] = rng.uniform(1, 6, wrong.sum())
        found = aligned_depth(guess, sparse)
        assert found is not None
        assert np.abs(found - depth).max() < 0.02

    def test_what_has_nothing_in_common_is_left(self) -> None:
        depth = np.linspace(1, 6, 100).reshape(10, 10)
        assert aligned_depth(np.ones((10, 10)), depth) is None
        assert aligned_depth(-depth, depth) is not None, "inverse depth falls where depth rises"

    def test_a_model_of_transformers_fills_in(self, tmp_path: Path) -> None:
        model = tiny_depth_model(tmp_path / "model")
        image = Image.fromarray(np.random.default_rng(0).integers(0, 255, (40, 60, 3), np.uint8))
        sparse = np.zeros((20, 30))
        sparse[::4, ::3] = np.random.default_rng(1).uniform(2, 4, (5, 10))
        dense = completed_depth(image, sparse, model)
        assert (dense > 0).mean() > 0.9 and np.isfinite(dense).all()
        assert np.array_equal(dense[sparse > 0], sparse[sparse > 0]) and dense.max() <= 6.0
        assert np.array_equal(completed_depth(image, sparse, model), dense)
        few = np.where(np.arange(600).reshape(20, 30) < 20, sparse, 0)
        assert completed_depth(image, few, model) is few

    def test_it_fills_in_between_a_reconstruction_s_points(self, tmp_path: Path) -> None:
        cameras = walk(((-1.2, -1.0), (1.2, -1.0)), 0.1, SIZE)
        room = BoxRoom(torch.tensor([[-2.5, -2.5, -0.2], [2.5, 2.5, 2.9]]), torch.rand(2, 3, 3))
        formats.write_colmap(tmp_path / "room", room, cameras)
        model = tiny_depth_model(tmp_path / "model")
        known = {}
        for name, options in (("sparse", []), ("dense", ["--monocular-depth", model])):
            command = ["colmap", str(tmp_path / name), "--scenes", str(tmp_path / "room"), "--image-size", "24", "24"]
            with pytest.raises(SystemExit) as end:
                main([*command, "--test-fraction", "0", *options])
            assert not end.value.code
            depths = SceneCollection.open(tmp_path / name).load_scene("room").source.depths
            assert depths is not None
            known[name] = float((depths > 0).float().mean())
        assert known["dense"] > 2 * known["sparse"] > 0

    def test_a_missing_model_is_a_sentence(self, tmp_path: Path) -> None:
        sparse = np.ones((8, 8))
        with pytest.raises(UserInputError, match="The depth model .*none cannot be loaded .*: give the folder"):
            completed_depth(Image.new("RGB", (8, 8)), sparse, str(tmp_path / "none"))
        (tmp_path / "other").mkdir()
        (tmp_path / "other" / "config.json").write_text('{"model_type": "bert"}')
        with pytest.raises(UserInputError, match="The depth model .*other cannot be loaded"):
            completed_depth(Image.new("RGB", (8, 8)), sparse, str(tmp_path / "other"))


def tiny_depth_model(folder: Path) -> str:
    """A randomly initialised depth network with its image processor."""
    from transformers import GLPNConfig, GLPNForDepthEstimation

    monocular_depth.load_predictor.cache_clear()
    torch.manual_seed(0)
    config = GLPNConfig(
        num_encoder_blocks=2,
        depths=[1, 1],
        sr_ratios=[2, 1],
        hidden_sizes=[8, 8],
        patch_sizes=[3, 3],
        strides=[2, 2],
        num_attention_heads=[1, 1],
        mlp_ratios=[2, 2],
        decoder_hidden_size=8,
    )
    GLPNForDepthEstimation(config).save_pretrained(folder)
    DPTImageProcessor(size={"height": 32, "width": 32}).save_pretrained(folder)
    return str(folder)
