"""Renders views of Doom maps headlessly with VizDoom."""

from __future__ import annotations

import contextlib
import os
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import vizdoom
from jaxtyping import Float, UInt8
from PIL import Image

from nfldm_ns.collect.doom_geometry import EYE_HEIGHT
from nfldm_ns.collect.doom_mazes import MazeWad
from nfldm_ns.collect.doom_wad import Wad, write_static_maps

HALF_FOV_TANGENT = 0.625  # of the square crop; 64 degrees
_WIDTH, _HEIGHT = 640, 480
_FOCAL_X, _FOCAL_Y = 320.0, 384.0  # Doom's pixels are 1.2 times as high as wide
_DEPTH_SCALE, _DEPTH_OFFSET = 7.153, 15.0
_DEPTH_UNKNOWN = 255
_SETTLE_TICS = 12
_ARGUMENTS = (
    "+sv_nomonsters 1 -nomonsters +sv_cheats 1 "
    "+con_midtime 0 +con_notifytime 0 +cl_showsecretmessage 0 +show_messages 0"
)
_HIDDEN = ("hud", "minimal_hud", "crosshair", "weapon", "decals", "particles", "effects_sprites", "messages", "corpses")
_VARIABLES = ("POSITION_X", "POSITION_Y", "POSITION_Z", "CAMERA_POSITION_Z", "CAMERA_ANGLE")


@dataclass
class Frame:
    """One rendered view.

    Attributes:
        eye: `[3]` camera position in map units.
        angle: viewing direction in degrees, counter-clockwise from the x axis.
        image: `[S, S, 3]` RGB.
        depth: `[S, S]` planar depth in map units, coarse (steps of 7); infinite where unknown.
    """

    eye: Float[np.ndarray, " 3"]
    angle: float
    image: UInt8[np.ndarray, "size size 3"]
    depth: Float[np.ndarray, "size size"]


class DoomRenderer:
    """One VizDoom instance on the static variants of some maps of one WAD; use it as a context manager."""

    def __init__(
        self, wad: Wad | MazeWad, maps: Sequence[str], image_size: int, *, keep_sprites: bool, min_light: int
    ) -> None:
        self.image_size = image_size
        self._wad, self._maps = wad, list(maps)
        self._keep_sprites, self._min_light = keep_sprites, min_light

    def __enter__(self) -> DoomRenderer:
        self._folder = tempfile.TemporaryDirectory(prefix="nfldm-doom-")
        patch = Path(self._folder.name) / "static.wad"
        write_static_maps(self._wad, self._maps, patch, keep_sprites=self._keep_sprites, min_light=self._min_light)
        self._game = _new_game(self._wad.path, patch, self._maps[0], Path(self._folder.name) / "vizdoom.ini")
        self._map = self._maps[0]
        with _working_in(Path(self._folder.name)):  # it makes a folder where it is started
            self._game.init()
        return self

    def __exit__(self, *_: object) -> None:
        self._game.close()
        self._folder.cleanup()

    def start(self, name: str, seed: int) -> None:
        """Begins the map anew, so that what is seen does not depend on what was rendered before."""
        self._game.set_seed(seed)
        if name != self._map:
            self._map = name
            self._game.set_doom_map(name)
        self._game.new_episode()
        self._game.advance_action(_SETTLE_TICS, False)  # the first tics of an episode take no turn
        self._angle = float(self._game.get_game_variable(vizdoom.GameVariable.CAMERA_ANGLE))

    def render(self, x: float, y: float, angle: float) -> Frame | None:
        """The view of a player standing at (x, y), or None if the game does not let him stand there."""
        game = self._game
        game.send_game_command(f"warp {x:.3f} {y:.3f}")
        game.set_action([float((self._angle - angle + 180) % 360 - 180)])
        game.advance_action(1, False)
        game.set_action([0.0])
        game.advance_action(_SETTLE_TICS, False)
        game.advance_action(1, True)  # the game reports its state only after a tic that is drawn
        state = game.get_state()
        if state is None or state.screen_buffer is None or state.depth_buffer is None:
            return None
        real_x, real_y, z, eye, self._angle = np.asarray(state.game_variables, dtype=np.float64).tolist()
        if abs(real_x - x) > 1 or abs(real_y - y) > 1 or abs(eye - z - EYE_HEIGHT) > 0.01:
            return None
        if abs((self._angle - angle + 180) % 360 - 180) > 1:
            return None
        image, depth = shrink(state.screen_buffer, state.depth_buffer, self.image_size)
        return Frame(np.array([real_x, real_y, eye]), self._angle, image, depth)


@contextlib.contextmanager
def _working_in(folder: Path) -> Iterator[None]:
    before = Path.cwd()
    os.chdir(folder)
    try:
        yield
    finally:
        os.chdir(before)


def _new_game(wad: Path, patch: Path, first_map: str, config: Path) -> vizdoom.DoomGame:
    game = vizdoom.DoomGame()
    game.set_doom_game_path(str(wad))
    game.set_doom_scenario_path(str(patch))
    game.set_doom_config_path(str(config))
    game.set_doom_map(first_map)
    game.set_window_visible(False)
    game.set_screen_resolution(vizdoom.ScreenResolution.RES_640X480)
    game.set_screen_format(vizdoom.ScreenFormat.RGB24)
    game.set_depth_buffer_enabled(True)
    for name in _HIDDEN:
        getattr(game, f"set_render_{name}")(False)
    game.set_render_screen_flashes(False)
    game.set_available_game_variables([getattr(vizdoom.GameVariable, name) for name in _VARIABLES])
    game.set_available_buttons([vizdoom.Button.TURN_LEFT_RIGHT_DELTA])
    game.set_mode(vizdoom.Mode.PLAYER)
    game.set_episode_timeout(0)
    game.set_sound_enabled(False)
    game.add_game_args(_ARGUMENTS)
    return game


def shrink(
    screen: UInt8[np.ndarray, "480 640 3"], depth: UInt8[np.ndarray, "480 640"], size: int
) -> tuple[UInt8[np.ndarray, "size size 3"], Float[np.ndarray, "size size"]]:
    """The square-pixel centre of a render.

    Colours are averaged over each pixel's area. Depth is the render's at each pixel's centre: an average across an edge
    would invent surfaces in mid-air.

    Returns:
        image, and planar depth in map units (infinite where the buffer does not know it).
    """
    half_width = int(_FOCAL_X * HALF_FOV_TANGENT)
    left = _WIDTH // 2 - half_width
    box = (left, 0, left + 2 * half_width, _HEIGHT)
    image = np.asarray(Image.fromarray(screen).resize((size, size), Image.Resampling.BOX, box=box))
    centres = (np.arange(size) + 0.5) / size
    rows = (centres * _HEIGHT).astype(int)
    columns = (left + centres * 2 * half_width).astype(int)
    raw = depth[np.ix_(rows, columns)]
    return image, np.where(raw == _DEPTH_UNKNOWN, np.inf, raw * _DEPTH_SCALE + _DEPTH_OFFSET)
