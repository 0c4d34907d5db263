"""Streets: roads, maps, lights, rigs and splits by themselves; and all of it where MetaDrive's environment is."""

from __future__ import annotations

import hashlib
import json
import os
import stat
import subprocess
import sys
import threading
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch

from nfldm_ns.collect import street_collection as streets
from nfldm_ns.collect import street_roads as roads
from nfldm_ns.collect.checking import check_collection
from nfldm_ns.collect.contact_sheet import panorama_order
from nfldm_ns.collect.street_collection import StreetOptions, collect_streets, plan_layouts, plan_rig
from nfldm_ns.collect.street_light import SUN_ELEVATIONS, street_light
from nfldm_ns.collect.street_roads import BROKEN, BUILDING, CONTINUOUS, KERB, LINE, ROAD, VEGETATION, VEHICLE, Lane
from nfldm_ns.collect.street_scenery import PARKING, WALK, make_scenery
from nfldm_ns.collect.street_simulator import StreetSimulator, default_environment, make_environment, ready_environment
from nfldm_ns.commands.collect import main
from nfldm_ns.errors import UserInputError
from nfldm_ns.scenes.collection import SceneCollection
from nfldm_ns.scenes.views import make_cameras

VARIABLE = "NFLDM_METADRIVE"


@pytest.fixture
def environment() -> Path:
    folder = Path(os.environ.get(VARIABLE) or default_environment())
    if not ready_environment(folder):
        pytest.skip(
            f"MetaDrive's environment is not in {folder}: 'nfldm-collect metadrive' makes it, or set {VARIABLE}"
        )
    return folder


def straight_road(length: float = 60.0, width: float = 3.5) -> list[Lane]:
    """A road along x with a lane in each direction, around y = 0."""
    x = np.arange(0.0, length + 1)
    there = np.stack([x, np.full_like(x, -width / 2)], axis=1)
    back = np.stack([x[::-1], np.full_like(x, width / 2)], axis=1)
    return [Lane(points, width, (CONTINUOUS, KERB), (True, False)) for points in (there, back)]


def circle(radius: float, count: int = 200) -> np.ndarray:
    turn = np.linspace(0, 2 * np.pi, count)
    return radius * np.stack([np.cos(turn), np.sin(turn)], axis=1)


def test_lines_beside_a_bend_keep_their_distance() -> None:
    inner = roads.offset(circle(20.0), 3.0)[1:-1]  # counter-clockwise: the middle is at the left
    assert np.allclose(np.linalg.norm(inner, axis=1), 17.0, atol=0.02)
    lane = Lane(circle(20.0), 3.0, (BROKEN, KERB), (False, False))
    assert lane.length == pytest.approx(2 * np.pi * 20, rel=1e-3)
    spot, heading = lane.at(np.pi * 10)
    assert np.allclose(spot, (0, 20), atol=0.1) and heading == pytest.approx(np.pi, abs=0.04)
    assert np.allclose(np.linalg.norm(roads.kerbs([lane])[0][1:-1], axis=1), 21.5, atol=0.02)


def test_broken_lines_are_dashes_and_continuous_ones_are_whole() -> None:
    x = np.arange(0.0, 50.0)
    points = np.stack([x, np.zeros_like(x)], axis=1)
    dashes = list(roads.painted_lines(Lane(points, 3.0, (BROKEN, KERB), (False, False))))
    lengths = [float(roads.arc_lengths(dash)[-1]) for dash, _ in dashes]
    assert lengths == pytest.approx([3.0] * 7)
    assert all(np.allclose(dash[:, 1], 1.5) for dash, _ in dashes)
    (line, yellow), *others = roads.painted_lines(Lane(points, 3.0, (roads.NO_LINE, CONTINUOUS), (False, True)))
    assert yellow and not others and float(roads.arc_lengths(line)[-1]) == pytest.approx(49.0)


def test_roads_end_where_no_lane_goes_on() -> None:
    first, second = straight_road(30.0)
    on = Lane(first.points + np.array([30.0, 0.0]), first.width, first.lines, first.yellow)
    ends = roads.dead_ends([first, second, on])
    assert sorted(map(tuple, ends.tolist())) == [(0.0, -1.75), (0.0, 1.75), (30.0, 1.75), (60.0, -1.75)]


def test_a_map_has_the_north_on_top_and_later_layers_above() -> None:
    square = np.array([(0.0, 0.0), (10.0, 0.0), (10.0, 10.0), (0.0, 10.0)])
    corners = np.array([(-20.0, -20.0), (20.0, 20.0)])
    layers = [(ROAD, [square]), (VEHICLE, [square[:, :] * 0.5])]
    found = roads.street_map(np.zeros(2), corners, 80, layers)
    rows, columns = np.nonzero(found == VEHICLE)
    within_a_cell = [rows.min() - 30, rows.max() - 39, columns.min() - 40, columns.max() - 49]
    assert np.abs(within_a_cell).max() <= 1
    assert abs((found != roads.GROUND).sum() - 400) <= 82  # cells along edges count, too
    moved = roads.street_map(np.array([5.0, 0.0]), corners, 80, layers)
    assert np.array_equal(moved[:, :70], found[:, 10:])  # the place is 5 m further east: all lies further west


def test_footprints_know_what_is_taken() -> None:
    taken = roads.Footprints(np.array([(0.0, 0.0), (40.0, 40.0)]), margin=5.0)
    house = roads.rectangle(np.array([20.0, 20.0]), 0.3, 10.0, 6.0)
    assert taken.is_free(house)
    taken.take(house)
    assert not taken.is_free(roads.rectangle(np.array([24.0, 20.0]), 1.0, 4.0, 4.0))
    assert taken.is_free(roads.rectangle(np.array([30.0, 30.0]), 0.0, 6.0, 6.0))
    assert not taken.is_free(roads.rectangle(np.array([60.0, 20.0]), 0.0, 4.0, 4.0)), "beyond the grid"
    assert taken.taken(np.array([(20.0, 20.0), (20.0, 28.0), (900.0, 0.0)])).tolist() == [True, False, False]


def test_scenery_stands_beside_the_road_and_is_the_seed_s() -> None:
    lanes = straight_road()
    scenery = make_scenery(lanes, [3, 1])
    again, other = make_scenery(lanes, [3, 1]), make_scenery(lanes, [4, 1])

    def signature(found) -> str:
        return hashlib.sha256(b"".join(mesh["vertices"].tobytes() for mesh in found.meshes)).hexdigest()

    assert signature(scenery) == signature(again) != signature(other)
    assert scenery.parked == again.parked
    assert {ROAD, LINE, BUILDING, VEGETATION} <= set(scenery.layers)
    houses = np.concatenate(scenery.layers[BUILDING])
    beside = np.abs(houses[(houses[:, 0] > 0) & (houses[:, 0] < 60), 1])
    assert beside.min() > 3.5 + PARKING + WALK - 0.6  # cells of half a metre
    for car in scenery.parked:
        assert 3.5 < abs(car["y"]) < 3.5 + PARKING
        assert abs(np.sin(car["heading"])) < 0.1 and np.sign(np.cos(car["heading"])) == -np.sign(car["y"])


def test_walls_look_outwards_and_reach_their_roofs() -> None:
    meshes = make_scenery(straight_road(), [5, 1]).meshes
    walls = [mesh for mesh in meshes if mesh["texture"].startswith("facade")]
    assert walls
    for mesh in meshes:
        corners = mesh["vertices"][mesh["triangles"]].astype(np.float64)
        normal = np.cross(corners[:, 1] - corners[:, 0], corners[:, 2] - corners[:, 0])
        agree = (normal * mesh["normals"][mesh["triangles"]].mean(axis=1)).sum(axis=-1)
        area = np.linalg.norm(normal, axis=-1)
        assert (agree[area > 1e-3] > 0).mean() > 0.97, mesh["texture"]
        assert set(map(len, (mesh["normals"], mesh["uv"], mesh["colours"]))) == {len(mesh["vertices"])}
    vertical = np.concatenate([mesh["normals"][:, 2] for mesh in walls])
    assert np.abs(vertical).max() < 1e-6


def test_light_is_the_seed_s_and_varies() -> None:
    lights = [street_light(np.random.default_rng([1, k])) for k in range(300)]
    assert lights[0] == street_light(np.random.default_rng([1, 0]))
    kinds = Counter(light.kind for light in lights)
    assert set(kinds) == set(SUN_ELEVATIONS) and min(kinds.values()) > 10
    for light in lights:
        low, high = SUN_ELEVATIONS[light.kind]
        assert np.linalg.norm(light.sun) == pytest.approx(1, abs=1e-4)
        assert low - 0.1 <= np.degrees(np.arcsin(light.sun[2])) <= high + 0.1
        colours = np.array([light.sun_colour, light.sky_light, light.fog_colour, light.zenith])
        assert (colours >= 0).all() and light.fog_density > 0
    azimuths = np.array([np.arctan2(light.sun[1], light.sun[0]) for light in lights])
    assert np.histogram(azimuths, 6, (-np.pi, np.pi))[0].min() > 25


def test_the_rig_looks_all_around_at_each_moment() -> None:
    options = StreetOptions(
        num_scenes=2, time_steps=4, source_steps=2, num_target_views=5, fov=(70, 90, 90, 110, 90, 90)
    )
    lane = straight_road()[0]
    rig = plan_rig(lane, 10.0, 6.0, np.random.default_rng(0), options)
    assert rig.num_source == 12 and rig.poses.shape == (17, 3, 4)
    assert rig.moments.tolist() == [1] * 6 + [2] * 6 + [0, 3, 0, 3, 0]
    assert np.allclose(rig.poses[:, :, 3], [(10 + 3.0 * t, -1.75, 1.8) for t in rig.moments])
    ahead = -rig.poses[:6, :, 2]
    yaws = np.degrees(np.arctan2(ahead[:, 1], ahead[:, 0])) % 360
    assert np.allclose((yaws + 1e-6) % 360, [0, 60, 120, 180, 240, 300], atol=1e-3)
    fov = 2 * np.degrees(np.arctan(options.image_size[0] / 2 / rig.focal_lengths))
    assert np.allclose(fov[:6], options.fov) and np.allclose(fov[6:12], options.fov)
    assert np.allclose(np.linalg.det(rig.poses[:, :, :3]), 1)
    around = make_cameras(torch.from_numpy(rig.poses[:6]), 60.0, 60.0, 64.0, 64.0, 128, 128)
    assert panorama_order(around) == [3, 2, 1, 0, 5, 4], "from behind over the left to the front, and on"


def test_cars_must_not_be_where_cameras_are() -> None:
    rig = plan_rig(straight_road()[0], 10.0, 6.0, np.random.default_rng(0), StreetOptions(num_scenes=2))
    car = {"x": 10.0, "y": -1.75, "heading": 0.3, "length": 4.5, "width": 1.9}
    assert not streets.is_clear(rig, 0, [car])
    assert not streets.is_clear(rig, 0, [{**car, "x": 13.5}])
    assert streets.is_clear(rig, 0, [{**car, "x": 14.5}]) and streets.is_clear(rig, 2, [car])
    corner = {"x": 0.0, "y": 0.0, "heading": np.pi / 2, "length": 4.0, "width": 2.0}
    points = np.array([(4.0, 6.0), (0.5, 1.5), (-3.0, 0.0)])
    assert streets._distance(points, corner) == pytest.approx([5.0, 0.0, 2.0])


def test_masks_hold_the_pixels_beside_them() -> None:
    mask = np.zeros((1, 5, 6), bool)
    mask[0, 0, 3] = True
    assert streets.dilated(mask)[0].sum() == 6 and streets.dilated(mask)[0, 1, 4]


def test_layouts_are_for_the_same_whatever_is_asked_for() -> None:
    few = plan_layouts(StreetOptions(num_scenes=20, places=4))
    many = plan_layouts(StreetOptions(num_scenes=400, places=4))
    assert [layout.split for layout in few] == [layout.split for layout in many[:5]]
    assert sum(layout.count for layout in many) == 400 and few[-1].count == 4
    assert plan_layouts(StreetOptions(num_scenes=22, places=4))[-1].count == 2
    assert sum(layout.split == "test" for layout in many) == 10


def test_what_cannot_be_collected_is_one_sentence(tmp_path: Path) -> None:
    def refused(message: str, **options) -> None:
        with pytest.raises(UserInputError, match=message):
            collect_streets(tmp_path / "out", StreetOptions(**{"num_scenes": 20, **options}), tmp_path / "none")

    refused("Ask for at least 2 scenes", num_scenes=1)
    refused("must add up to less than one", fractions={"test": 1.0})
    refused("--fov takes one angle, or six", fov=(90.0, 80.0))
    refused("--fov takes one angle, or six, from 20", fov=(10.0,))
    refused("at least 16 pixels a side", image_size=(128, 8))
    refused("at least one must be for source views", source_steps=3)
    refused("--cars must be between", cars=0.9)
    refused("leave none for test: ask for more", num_scenes=4)
    assert not (tmp_path / "out").exists()


def fake_environment(folder: Path, script: str) -> Path:
    """An environment whose Python is a script of this one."""
    python = folder / "bin" / "python"
    python.parent.mkdir(parents=True)
    python.write_text(f"#!{sys.executable}\n{script}")
    python.chmod(python.stat().st_mode | stat.S_IXUSR)
    return folder


def test_an_environment_that_cannot_be_made_or_used_is_one_sentence(tmp_path: Path, monkeypatch) -> None:
    (tmp_path / "other").mkdir()
    with pytest.raises(UserInputError, match="has no Python in it: remove it, or give another --environment"):
        make_environment(tmp_path / "other")
    steps = []

    def run(step, **_):
        steps.append(step)
        Path(step[-1] if "venv" in step else tmp_path / "half").mkdir()
        said = "WARNING: slow\nERROR: No matching distribution found\nWARNING: old"
        return subprocess.CompletedProcess(step, int("install" in step), "", said)

    with monkeypatch.context() as context:
        context.setattr(subprocess, "run", run)
        with pytest.raises(UserInputError, match="could not be made \\(ERROR: No matching.*: install metadrive-simul"):
            make_environment(tmp_path / "made")
    assert len(steps) == 2 and steps[1][0].startswith(steps[0][-1]), "it is pip of the new environment"
    assert not (tmp_path / "made").exists() and not list(tmp_path.glob(".made*.tmp"))
    dead = fake_environment(tmp_path / "dead", "import sys\nsys.exit('no such library')")
    with pytest.raises(UserInputError, match="ended while asked to 'hello' \\(no such library\\): it needs OpenGL"):
        StreetSimulator(dead, (32, 32))
    mute = "import json\ninput()\nprint(json.dumps({'ok': False, 'error': 'RuntimeError: no pipe'}))\ninput()"
    with pytest.raises(UserInputError, match="cannot be drawn here \\(RuntimeError: no pipe\\): it needs OpenGL"):
        StreetSimulator(fake_environment(tmp_path / "mute", mute), (32, 32))


def test_an_install_clears_what_a_killed_one_left_but_not_one_that_runs(tmp_path: Path, monkeypatch) -> None:
    made, steps, others = tmp_path / "made", [], []
    for name in (".made.0123abcd.tmp", ".another.0123abcd.tmp"):
        (tmp_path / name / "lib").mkdir(parents=True)

    def run(step: list[str], **_: object) -> subprocess.CompletedProcess:
        steps.append(step)
        if "venv" in step:
            fake_environment(Path(step[-1]), "")
            others.append(threading.Thread(target=make_environment, args=(made,)))
            others[-1].start()
        else:
            others[-1].join(0.2)
            assert others[-1].is_alive(), "it waits"
            assert Path(step[0]).is_file(), "and leaves alone what is being made"
        return subprocess.CompletedProcess(step, 0, "", "")

    monkeypatch.setattr(subprocess, "run", run)
    make_environment(made)
    others[0].join(30)
    assert not others[0].is_alive() and len(steps) == 2, "there is nothing left to do for the second one"
    assert ready_environment(made)
    assert sorted(path.name for path in tmp_path.iterdir()) == [".another.0123abcd.tmp", ".made.lock", "made"]


class FakeSimulator:
    """Straight roads, cars that stand or drive along them, and pictures of a flat ground."""

    drawn: list[str] = []  # noqa: RUF012  (shared by all)

    def __init__(self, environment: Path, size: tuple[int, int]) -> None:
        self.size = size
        self.time = 0

    def close(self) -> None:
        pass

    def open_layout(self, seed: int, blocks: int) -> list[Lane]:
        self.time, self.seed = 0, seed
        return straight_road(100.0)

    def set_scenery(self, scenery) -> None:
        pass

    def set_traffic(self, seed: int, cars: float) -> int:
        return 1

    def step(self, steps: int) -> list[dict]:
        self.time += steps
        x = (self.seed + 0.8 * self.time) % 100
        return [{"kind": "s", "number": 0, "x": x, "y": -1.75, "heading": 0.0, "length": 4.0, "width": 1.7}]

    def draw(self, light, vehicles, poses, focal_lengths):
        FakeSimulator.drawn.append(f"{self.seed} {vehicles[-1]['x']} {light.kind}")
        width, height = self.size
        below = (np.arange(height) + 0.5 - height / 2)[None, :, None] / np.array(focal_lengths)[:, None, None]
        with np.errstate(divide="ignore"):
            depth = np.where(below > 0, poses[:, 2, 3][:, None, None] / below, 0)
        depth = np.broadcast_to(depth, (len(poses), height, width))
        grey = int(255 * min(1.0, sum(light.sky_light)))
        images = np.full((len(poses), height, width, 3), grey, np.uint8)
        labels = np.where(np.arange(width) < 3, streets.MOVING, ROAD).astype(np.uint8)
        return images, np.where(depth < 900, depth, 0), np.broadcast_to(labels, depth.shape)


@pytest.fixture
def fake(monkeypatch, tmp_path: Path) -> Path:
    monkeypatch.setattr(streets, "StreetSimulator", FakeSimulator)
    FakeSimulator.drawn = []
    return fake_environment(tmp_path / "environment", "")


def files(root: Path) -> dict[str, str]:
    found = [path for path in root.rglob("*") if path.is_file() and path.name != "contact_sheet.png"]
    return {str(path.relative_to(root)): hashlib.sha256(path.read_bytes()).hexdigest() for path in found}


SMALL = {
    "image_size": (24, 16),
    "places": 2,
    "min_distance": 5.0,
    "fractions": {"test": 0.3, "val": 0.0},
    "bev_size": 32,
}


def test_an_interrupted_run_goes_on_to_the_same_files(tmp_path: Path, fake: Path, monkeypatch) -> None:
    options = StreetOptions(num_scenes=5, **SMALL)
    report = collect_streets(tmp_path / "whole", options, fake)
    assert report.num_scenes == {"train": 3, "val": 0, "test": 2} and report.new_scenes == 5
    with monkeypatch.context() as context:
        write, calls = streets.write_scene, []

        def fail(*args) -> None:
            calls.append(args)
            if len(calls) == 4:
                raise KeyboardInterrupt
            write(*args)

        context.setattr(streets, "write_scene", fail)
        with pytest.raises(KeyboardInterrupt):
            collect_streets(tmp_path / "again", options, fake)
    assert not (tmp_path / "again" / "collection.json").exists()
    assert collect_streets(tmp_path / "again", options, fake).new_scenes == 2
    assert files(tmp_path / "again") == files(tmp_path / "whole")
    more = StreetOptions(num_scenes=8, **SMALL)
    collect_streets(tmp_path / "again", more, fake)
    collect_streets(tmp_path / "more", more, fake)
    assert files(tmp_path / "again") == files(tmp_path / "more")
    FakeSimulator.drawn = []
    assert collect_streets(tmp_path / "more", more, fake).new_scenes == 0 and not FakeSimulator.drawn
    with pytest.raises(UserInputError, match="begun with other options \\(moving\\)"):
        collect_streets(tmp_path / "more", StreetOptions(num_scenes=8, moving="keep", **SMALL), fake)


def test_what_is_written_is_a_good_collection_with_unequal_cameras(tmp_path: Path, fake: Path) -> None:
    options = StreetOptions(num_scenes=4, fov=(80, 90, 90, 100, 90, 90), **{**SMALL, "image_size": (64, 64)})
    collect_streets(tmp_path / "a", options, fake)
    collection = SceneCollection.open(tmp_path / "a")
    report = check_collection(collection)
    assert report.ok, report.all_problems
    layouts = {split: {i.split("-")[0] for i in ids} for split, ids in collection.splits.items()}
    assert layouts["train"] and layouts["test"] and not layouts["train"] & layouts["test"]
    scene = collection.load_scene(collection.splits["train"][0])
    assert scene.source.shape == (6,) and scene.target.shape == (4,) and scene.source.masks is None
    assert scene.source.cameras.fx.unique().numel() == 3
    assert scene.bev is not None and set(np.unique(scene.bev)) >= {ROAD, LINE}
    place = json.loads((collection.scene_dir(scene.scene_id) / "transforms.json").read_text())["place"]
    assert place["light"] in SUN_ELEVATIONS and place["map"] == "street00000"


def test_cars_that_drive_are_kept_or_masked(tmp_path: Path, fake: Path) -> None:
    for moving in ("still", "keep", "mask"):
        collect_streets(tmp_path / moving, StreetOptions(num_scenes=4, moving=moving, **SMALL), fake)
        collection = SceneCollection.open(tmp_path / moving)
        scene = collection.load_scene("street00000-00")
        times = {line.split()[1] for line in FakeSimulator.drawn[:3]}
        assert len(times) == (1 if moving == "still" else 3)
        if moving == "mask":
            assert scene.source.masks is not None
            assert not scene.source.masks[..., :4].any() and scene.source.masks[..., 4:].all()
        else:
            assert scene.source.masks is None
        FakeSimulator.drawn = []


def test_streets_of_metadrive(tmp_path: Path, environment: Path, capsys) -> None:
    """The whole way, where MetaDrive is: depths agree, roads lie under the cameras, and a run repeats itself."""
    arguments = ["--num-scenes", "2", "--places", "1", "--image-size", "32", "32", "--test-fraction", "0.5"]
    arguments += ["--environment", str(environment), "--moving", "keep", "--seed", "4"]
    for name in ("a", "b"):
        with pytest.raises(SystemExit) as end:
            main(["metadrive", str(tmp_path / name), *arguments])
        assert not end.value.code
    assert "1 train, 1 test scenes, 2 of them new" in capsys.readouterr().out
    assert files(tmp_path / "a") == files(tmp_path / "b")
    collection = SceneCollection.open(tmp_path / "a")
    report = check_collection(collection)
    assert report.ok, report.all_problems
    for split in ("train", "test"):
        scene = collection.load_scene(collection.splits[split][0])
        assert np.isin(scene.bev[60:68, 60:68], (ROAD, LINE)).mean() > 0.9
        below = scene.source.depths[:, 0, -1]  # the lowest row shows the ground, 1.8 m below
        tangent = (32 - 0.5 - 16) / float(scene.source.cameras.fx[0])
        near = (below - 1.8 / tangent).abs() < 0.05
        assert float(near.float().mean()) > 0.5
