"""nerfstudio's own tools on a generated scene: a spiral, the viewer's camera path, exports, two viewers at once."""

from __future__ import annotations

import contextlib
import json
import math
import os
import re
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import pytest
import torch
from nerfstudio.scripts.render import RenderCameraPath, SpiralRender
from PIL import Image

from nfldm_ns.generated.cameras import surround_cameras
from nfldm_ns.plugin.generated_run import write_generated_scene
from tests.small_models import random_grid, small_scene_autoencoder

COMMANDS = Path(sys.executable).parent
PATIENCE_S = 240.0


@pytest.fixture(scope="module")
def scenes(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Two scenes."""
    root = tmp_path_factory.mktemp("scenes")
    for i in range(2):
        cameras = surround_cameras(4, (32, 32), 16.0)
        write_generated_scene(root / f"scene_{i:06d}", random_grid(1, seed=i), small_scene_autoencoder(), cameras)
    return sorted(root.iterdir())


@pytest.fixture(autouse=True)
def commands_on_the_path(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where ffmpeg is, which nerfstudio looks for even where it writes images."""
    monkeypatch.setenv("PATH", f"{COMMANDS}{os.pathsep}{os.environ['PATH']}")


def pictures(folder: Path) -> list[tuple[int, int]]:
    found = []
    for path in sorted(folder.glob("*.png")):
        with Image.open(path) as picture:
            found.append(picture.size)
            assert picture.getextrema() != ((0, 0),) * 3, f"{path} is black"
    return found


def test_a_spiral(scenes, tmp_path):
    render = SpiralRender(load_config=scenes[0] / "config.yml", output_path=tmp_path / "frames", seconds=0.25)
    render.output_format, render.image_format, render.rendered_output_names = "images", "png", ["rgb"]
    render.main()
    assert pictures(tmp_path / "frames") == [(32, 32)] * 6


def viewer_path(**changes) -> dict:
    """A camera path with all that nerfstudio's viewer writes, of two key frames and three cameras."""
    poses = []
    for i in range(3):
        yaw = 0.2 * i
        pose = torch.eye(4)
        pose[:3, 0] = torch.tensor([math.cos(yaw), math.sin(yaw), 0.0])
        pose[:3, 1] = torch.tensor([0.0, 0.0, 1.0])
        pose[:3, 2] = torch.tensor([math.sin(yaw), -math.cos(yaw), 0.0])
        poses.append(pose.flatten().tolist())
    keyframes = [{"matrix": poses[i], "fov": 75.0, "aspect": 1.5, "override_transition_enabled": False} for i in (0, 2)]
    path = {
        "default_fov": 75.0,
        "default_transition_sec": 2.0,
        "keyframes": keyframes,
        "camera_type": "perspective",
        "render_height": 32,
        "render_width": 48,
        "fps": 24,
        "seconds": 0.125,
        "is_cycle": False,
        "smoothness_value": 0.0,
        "camera_path": [{"camera_to_world": pose, "fov": 75.0, "aspect": 1.5} for pose in poses],
    }
    return {**path, **changes}


def render_path(scene: Path, path: Path, output: Path) -> None:
    render = RenderCameraPath(load_config=scene / "config.yml", output_path=output, camera_path_filename=path)
    render.output_format, render.image_format, render.rendered_output_names = "images", "png", ["rgb"]
    render.main()


def test_the_path_that_the_viewer_writes(scenes, tmp_path):
    (tmp_path / "path.json").write_text(json.dumps(viewer_path()))
    render_path(scenes[0], tmp_path / "path.json", tmp_path / "frames")
    assert pictures(tmp_path / "frames") == [(48, 32)] * 3


USELESS = {
    "no cameras": (viewer_path(camera_path=[]), "has no cameras: add some in the viewer"),
    "no list": (viewer_path(camera_path=None), "camera_path in .* is None"),
    "a pose too short": (viewer_path(camera_path=[{"camera_to_world": [1.0], "fov": 75.0}]), "camera_to_world in"),
    "no field of view": (viewer_path(camera_path=[{"camera_to_world": [0.0] * 16}]), "lacks 'camera_path.fov'"),
    "no size": (viewer_path(render_height=0), "render_height in .* is 0"),
    "a list": ([], "path.json"),
    "no file": (None, "There is no camera path"),
}


@pytest.mark.parametrize("case", USELESS)
def test_a_useless_path_ends_in_a_sentence(case, scenes, tmp_path, monkeypatch, capfd):
    content, sentence = USELESS[case]
    path = tmp_path / "path.json"
    if content is not None:
        path.write_text(json.dumps(content))
    monkeypatch.setattr(sys, "argv", ["ns-render", "camera-path", "--camera-path-filename", str(path)])
    with pytest.raises(SystemExit) as ending:
        render_path(scenes[0], path, tmp_path / "frames")
    lines = [line for line in capfd.readouterr().err.splitlines() if line.startswith("error: ")]
    assert ending.value.code == 2 and len(lines) == 1 and re.search(sentence, lines[0])
    assert not (tmp_path / "frames").exists()


EXPORTS = {
    "pointcloud": ["--num-points", "400", "--normal-method", "open3d", "--remove-outliers", "False"],
    "tsdf": ["--resolution", "24", "--texture-method", "tsdf", "--target-num-faces", "500"],
}
WRITTEN = {"pointcloud": "point_cloud.ply", "tsdf": "tsdf_mesh.ply"}


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("kind", EXPORTS)
def test_exports(kind, scenes, tmp_path):
    try:
        import open3d  # noqa: F401
    except (ImportError, OSError) as error:
        pytest.skip(f"ns-export needs open3d, which lacks a library of the system here: {error}")
    command = [COMMANDS / "ns-export", kind, "--load-config", scenes[0] / "config.yml", "--output-dir", tmp_path]
    done = subprocess.run([*command, *EXPORTS[kind]], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert (tmp_path / WRITTEN[kind]).stat().st_size > 1000


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def wait_for(port: int, viewer: subprocess.Popen) -> str:
    """The page of a viewer once it answers."""
    end = time.monotonic() + PATIENCE_S
    while time.monotonic() < end and viewer.poll() is None:
        with contextlib.suppress(OSError), urllib.request.urlopen(f"http://127.0.0.1:{port}", timeout=5) as page:
            return page.read().decode()
        time.sleep(0.5)
    raise AssertionError(f"no viewer at port {port}: {viewer.poll()}")


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_two_scenes_in_two_viewers(scenes, tmp_path):
    ports = [free_port() for _ in scenes]
    viewers = []
    try:
        for scene, port in zip(scenes, ports, strict=True):
            options = ["--load-config", scene / "config.yml", "--viewer.websocket-port", str(port)]
            log = (tmp_path / f"{port}.log").open("w")
            viewers.append(subprocess.Popen([COMMANDS / "ns-viewer", *options], stdout=log, stderr=log))
        for port, viewer in zip(ports, viewers, strict=True):
            assert "<html" in wait_for(port, viewer)
        assert all(viewer.poll() is None for viewer in viewers)
    finally:
        for viewer in viewers:
            viewer.kill()
            viewer.wait()
