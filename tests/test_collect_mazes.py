"""Mazes: lines say what tiles say, the game draws them as they are, a name always means the same maze."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from nfldm_ns.collect.checking import check_collection
from nfldm_ns.collect.doom_collection import wad_path
from nfldm_ns.collect.doom_geometry import DoomGeometry
from nfldm_ns.collect.doom_mazes import LOOKS, TILE, MazeWad, plan_maze
from nfldm_ns.collect.doom_wad import Wad
from nfldm_ns.commands.collect import main
from nfldm_ns.errors import UserInputError
from nfldm_ns.scenes.collection import SceneCollection


@pytest.fixture(scope="module")
def wad() -> MazeWad:
    return MazeWad(wad_path("freedoom2"))


@pytest.mark.parametrize("name", ["MAZE0000", "MAZE0007"])
def test_lines_enclose_what_the_tiles_say(wad: MazeWad, name: str) -> None:
    tiles, sectors = plan_maze(name)
    geometry = DoomGeometry(wad.read_map(name))
    rows, columns = np.indices(tiles.shape).reshape(2, -1)
    found = geometry.sector_at(np.stack([columns + 0.5, rows + 0.5], axis=-1) * TILE)
    assert np.array_equal(found, np.maximum(tiles.ravel(), -1))
    assert np.array_equal(geometry.floor, [s.floor for s in sectors])
    assert np.array_equal(geometry.ceiling, [s.ceiling for s in sectors])
    assert geometry.liquid.sum() == sum(s.flat != s.look.floor for s in sectors) > 0


def test_a_name_always_means_the_same_maze(wad: MazeWad) -> None:
    first, again, other = (plan_maze(name)[0] for name in ("MAZE0001", "MAZE0001", "MAZE0002"))
    assert np.array_equal(first, again) and not np.array_equal(first, other)
    assert wad.map_lumps("MAZE0001") == wad.map_lumps("MAZE0001")
    with pytest.raises(UserInputError, match="no maze MAP01: give MAZE0000 to MAZE9999"):
        wad.read_map("MAP01")


def test_textures_are_those_of_the_game() -> None:
    data = Wad(wad_path("freedoom2"))
    flats = {name for look in LOOKS for name in (look.floor, look.ceiling)}
    walls = {name for look in LOOKS for name in (look.wall, look.trim)}
    content = data.path.read_bytes()
    assert all(name.encode().ljust(8, b"\0") in content for name in flats | walls)


def test_the_game_draws_mazes_as_they_are(tmp_path: Path) -> None:
    root = tmp_path / "mazes"
    options = ["--maps", "mazes/MAZE000[01]", "--test-maps", "mazes/MAZE0001", "--snap", "2.5", "--min-distance", "2.5"]
    with pytest.raises(SystemExit) as end:
        main(["vizdoom", str(root), "--num-scenes", "4", "--image-size", "32", "--test-fraction", "0.5", *options])
    assert not end.value.code
    collection = SceneCollection.open(root)
    assert {collection.places[i]["map"] for i in collection.splits["test"]} == {"mazes/MAZE0001"}
    report = check_collection(collection)
    assert report.ok, report.all_problems
    assert np.median([s.reprojection.median_error for s in report.scenes]) < 0.02
