"""Where nerfstudio's viewer starts, and what it gets beside its own panels."""

from __future__ import annotations

import importlib
import math
from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np
import viser.transforms
from nerfstudio.cameras.cameras import Cameras
from nerfstudio.viewer.viewer_elements import ViewerControl

if TYPE_CHECKING:
    from nerfstudio.pipelines.base_pipeline import Pipeline
    from nerfstudio.viewer.viewer import Viewer
    from viser import ClientHandle


BEHIND, ABOVE = 0.2, 0.1  # metres, so that the drawn camera with its image does not fill the view


class FirstView(ViewerControl):
    """Lets every visitor start at one of the scene's own cameras, that is inside the scene and at eye height.

    Args:
        cameras: gives the cameras of the scene on show; the first is taken.
    """

    def __init__(self, cameras: Callable[[], Cameras]) -> None:
        self._cameras = cameras

    def _setup(self, viewer: Viewer) -> None:
        super()._setup(viewer)
        self.viser_server.on_client_connect(lambda client: place_client(client, self._cameras()))


class LatePanel(ViewerControl):
    """A panel of a module that is imported when there is a viewer: other commands do without it.

    Args:
        module: has a function `build_panel(viewer, pipeline)`, which puts its elements into the viewer.
        pipeline: on show.
    """

    def __init__(self, module: str, pipeline: Pipeline) -> None:
        self._module = module
        self._pipeline = pipeline

    def _setup(self, viewer: Viewer) -> None:
        super()._setup(viewer)
        self.panel = importlib.import_module(self._module).build_panel(viewer, self._pipeline)


def place_client(client: ClientHandle, cameras: Cameras) -> None:
    """Moves a visitor to just behind the first of some cameras."""
    from nerfstudio.viewer.viewer import VISER_NERFSTUDIO_SCALE_RATIO

    pose = cameras.camera_to_worlds[0].cpu().numpy().astype(np.float64)
    half_turn = viser.transforms.SO3.from_x_radians(np.pi)  # viser's cameras look along +z
    position = pose[:, 3] + BEHIND * pose[:, 2] + ABOVE * pose[:, 1]
    with client.atomic():
        client.camera.position = position * VISER_NERFSTUDIO_SCALE_RATIO
        client.camera.wxyz = (viser.transforms.SO3.from_matrix(pose[:, :3]) @ half_turn).wxyz
        client.camera.fov = 2 * math.atan(float(cameras.cy[0] / cameras.fy[0]))
