"""Where nerfstudio's viewer starts."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np
import viser.transforms
from nerfstudio.cameras.cameras import Cameras
from nerfstudio.viewer.viewer_elements import ViewerControl

if TYPE_CHECKING:
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
