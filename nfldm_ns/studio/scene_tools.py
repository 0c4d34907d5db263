"""What the panel puts into the viewer's scene: a box to mark, and a map to draw on."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np
from jaxtyping import Float
from nerfstudio.viewer.viewer import VISER_NERFSTUDIO_SCALE_RATIO as SCALE
from viser import ClientHandle, ScenePointerEvent, ViserServer
from viser.transforms import SO3

from nfldm_ns.studio.drawn_map import DrawnMap, Rectangle

if TYPE_CHECKING:
    from nfldm_ns.editing.region import Box

BOX_COLOR = (255, 211, 105)  # nerfstudio's own
EDGES = (0, 1, 2, 3, 0, 4, 5, 1, 5, 6, 2, 6, 7, 3, 7, 4)  # one way along all edges of a box
BEFORE = 2.0  # metres
ABOVE_BOX = 0.05  # metres: the map lies so far above the scene, so that nothing hides it
FILL = 0.98  # share of the window that the map fills
FACE_UP = SO3.from_x_radians(
    np.pi
)  # images in viser look along -z with their tops at -y; also a camera that looks down


class MarkedBox:
    """A box on the ground plane, as high as the scene, that a visitor moves by a gizmo.

    Args:
        server: of the viewer.
        aabb: of the scene, `[2, 3]` in metres.
        moved: called when a visitor moved it.
    """

    def __init__(
        self, server: ViserServer, aabb: Float[np.ndarray, "corner axis"], moved: Callable[[], None] = lambda: None
    ) -> None:
        self._server, self._aabb = server, aabb
        extent = aabb[1] - aabb[0]
        self.size = (float(extent[0]) / 4, float(extent[1]) / 4)
        height = 0.0 if aabb[0, 2] < 0 < aabb[1, 2] else float(aabb[:, 2].mean())
        self._gizmo = server.scene.add_transform_controls(
            "/studio_box",
            scale=SCALE * float(extent[:2].max()) / 12,
            active_axes=(True, True, False),
            disable_rotations=True,
            depth_test=False,
            position=(0.0, SCALE * float(extent[1]) / 4, SCALE * height),
            visible=False,
        )
        self._gizmo.on_update(lambda _: moved())
        self._height = height
        self._draw()

    @property
    def centre(self) -> tuple[float, float]:
        """In metres."""
        x, y, _ = self._gizmo.position / SCALE
        return (float(x), float(y))

    @property
    def box(self) -> Box:
        """Minimum x and y, then maximum x and y, in metres; it may reach beyond the scene."""
        (x, y), (width, depth) = self.centre, self.size
        return (x - width / 2, y - depth / 2, x + width / 2, y + depth / 2)

    def show(self, visible: bool) -> None:
        self._gizmo.visible = visible

    def move(self, centre: tuple[float, float]) -> None:
        self._gizmo.position = np.array([SCALE * centre[0], SCALE * centre[1], SCALE * self._height])

    def bring_before(self, client: ClientHandle) -> None:
        """Moves it to where a visitor looks, so that its near side is `BEFORE` metres away; its middle stays inside."""
        position = np.asarray(client.camera.position) / SCALE
        ahead = SO3(client.camera.wxyz).as_matrix()[:2, 2]
        ahead = ahead / max(float(np.linalg.norm(ahead)), 1e-6)
        middle = position[:2] + ahead * (BEFORE + float(np.dot(np.abs(ahead), self.size)) / 2)
        x, y = np.clip(middle, self._aabb[0, :2], self._aabb[1, :2])
        self.move((float(x), float(y)))

    def resize(self, size: tuple[float, float]) -> None:
        self.size = size
        self._draw()

    def _draw(self) -> None:
        """The edges and pale sides, which move with the gizmo."""
        low, high = (float(z) - self._height for z in self._aabb[:, 2])
        half_x, half_y = self.size[0] / 2, self.size[1] / 2
        square = [(-half_x, -half_y), (half_x, -half_y), (half_x, half_y), (-half_x, half_y)]
        corners = SCALE * np.array([(x, y, z) for z in (low, high) for x, y in square])
        path = corners[list(EDGES)]
        thirds = [(2 * path[:-1] + path[1:]) / 3, (path[:-1] + 2 * path[1:]) / 3]
        controls = np.stack(thirds, axis=1).reshape(-1, 3)
        self._server.scene.add_spline_cubic_bezier(
            "/studio_box/edges", path, controls, line_width=3.0, color=BOX_COLOR, segments=6 * (len(path) - 1)
        )
        sides = [(i, (i + 1) % 4, 4 + (i + 1) % 4, 4 + i) for i in range(4)]
        faces = np.array([face for a, b, c, d in sides for face in ((a, b, c), (a, c, d))])
        self._server.scene.add_mesh_simple(
            "/studio_box/sides", corners, faces, color=BOX_COLOR, opacity=0.15, side="double"
        )


class MapCanvas:
    """A map that lies over the scene, and takes the pointer of those who draw on it.

    Args:
        server: of the viewer.
        drawn: the map.
        paint: called with what a visitor drew, two corners in metres; the map is shown anew afterwards.
    """

    def __init__(self, server: ViserServer, drawn: DrawnMap, paint: Callable[[Rectangle], None]) -> None:
        self._server, self._drawn, self._paint = server, drawn, paint
        self.visible = False
        self._from: dict[int, tuple[np.ndarray, np.ndarray]] = {}

    @property
    def height(self) -> float:
        """z of the map in metres."""
        return float(self._drawn.aabb[1, 2]) + ABOVE_BOX

    def refresh(self) -> None:
        """Shows the map as it is now."""
        (x_min, y_min), (x_max, y_max) = self._drawn.aabb[:, :2]
        self._server.scene.add_image(
            "/studio_map",
            self._drawn.picture(),
            SCALE * (x_max - x_min),
            SCALE * (y_max - y_min),
            format="png",
            wxyz=FACE_UP.wxyz,
            position=(SCALE * (x_min + x_max) / 2, SCALE * (y_min + y_max) / 2, SCALE * self.height),
            visible=self.visible,
        )

    def open(self, client: ClientHandle, rectangles: bool) -> None:
        """Shows the map from above to a visitor and listens to the pointer: to clicks, or to rectangles."""
        self.visible = True
        self.refresh()
        self._look_down(client)
        self.listen(rectangles)

    def listen(self, rectangles: bool) -> None:
        self._server.scene.on_pointer_event("rect-select" if rectangles else "click")(self._on_pointer)

    def close(self) -> None:
        """Hides the map, and takes visitors back to where they were."""
        if not self.visible:
            return
        self.visible = False
        self._server.scene.remove_pointer_callback()
        self.refresh()
        for number, client in self._server.get_clients().items():
            if number in self._from:
                position, wxyz = self._from.pop(number)
                with client.atomic():
                    client.camera.position, client.camera.wxyz = position, wxyz

    def _look_down(self, client: ClientHandle) -> None:
        camera, aabb = client.camera, self._drawn.aabb
        self._from[client.client_id] = (camera.position, camera.wxyz)
        extent = aabb[1, :2] - aabb[0, :2]
        span = max(float(extent[1]), float(extent[0]) / camera.aspect) / FILL
        away = span / 2 / np.tan(camera.fov / 2)
        centre = aabb[:, :2].mean(axis=0)
        with client.atomic():
            camera.position = SCALE * np.array([centre[0], centre[1], self.height + away])
            camera.wxyz = FACE_UP.wxyz

    def _on_pointer(self, event: ScenePointerEvent) -> None:
        ends = [self._on_the_plane(event.client, place) for place in event.screen_pos]
        corners = [end for end in ends if end is not None]
        if corners:
            self._paint((*corners[0], *corners[-1]))
            self.refresh()

    def _on_the_plane(self, client: ClientHandle, place: tuple[float, float]) -> tuple[float, float] | None:
        """Where the ray through a place of the window (0 to 1, from the top left) meets the map's plane."""
        camera = client.camera
        slope = np.tan(camera.fov / 2)
        ray = np.array([(2 * place[0] - 1) * slope * camera.aspect, (2 * place[1] - 1) * slope, 1.0])
        direction = SO3(camera.wxyz).as_matrix() @ ray
        origin = camera.position / SCALE
        along = (self.height - origin[2]) / direction[2] if direction[2] != 0 else -1.0
        if along <= 0:
            return None
        x, y, _ = origin + along * direction
        return (float(x), float(y))
