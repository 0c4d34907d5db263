"""Posed images in memory."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from nerfstudio.cameras.cameras import Cameras, CameraType
from torch import Tensor

from nfldm_ns.scenes.rotations import quarter_turn, turn_about

MIN_DEPTH = 1e-6  # in metres, by which points are divided that lie behind a camera


@dataclass
class Views:
    """Images with cameras and, where known, depth and masks; `*B` is any batch shape.

    Attributes:
        cameras: nerfstudio cameras of batch shape `[*B]`, intrinsics in pixels of `images`.
        images: `[*B, 3, H, W]`, sRGB in [0, 1].
        depths: `[*B, 1, H, W]`, planar z in metres, 0 is unknown; None if no view has depth. Unknown under a mask,
            whatever was given.
        masks: `[*B, 1, H, W]`, False for pixels that are not of the scene; None if all are.
    """

    cameras: Cameras
    images: Float[Tensor, "*batch 3 height width"]
    depths: Float[Tensor, "*batch 1 height width"] | None = None
    masks: Bool[Tensor, "*batch 1 height width"] | None = None

    def __post_init__(self) -> None:
        if self.masks is not None and self.depths is not None:
            self.depths = torch.where(self.masks, self.depths, 0)

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.images.shape[:-3])

    @property
    def image_size(self) -> tuple[int, int]:
        """(height, width)."""
        return self.images.shape[-2], self.images.shape[-1]

    def __getitem__(self, index) -> Views:
        return Views(
            index_cameras(self.cameras, index),
            self.images[index],
            None if self.depths is None else self.depths[index],
            None if self.masks is None else self.masks[index],
        )

    def to(self, device: torch.device | str) -> Views:
        return Views(
            self.cameras.to(device),
            self.images.to(device),
            None if self.depths is None else self.depths.to(device),
            None if self.masks is None else self.masks.to(device),
        )

    def covered(self, rgb: Float[Tensor, "*batch 3 height width"]) -> Float[Tensor, "*batch 3 height width"]:
        """Renderings of these views with the views' own colours where they are masked: nothing differs there."""
        return rgb if self.masks is None else torch.where(self.masks, rgb, self.images)

    @staticmethod
    def stack(views: list[Views]) -> Views:
        """Adds a leading batch axis. Depth and masks are kept if any has them; else unknown (0), and all valid."""
        cameras = stack_cameras([view.cameras for view in views])
        return Views(cameras, torch.stack([view.images for view in views]), *_joined_maps(views, torch.stack))

    @staticmethod
    def cat(views: list[Views]) -> Views:
        """Joins views of one image size along the first batch axis; depth and masks as `stack` keeps them."""
        fields = {name: torch.cat([getattr(view.cameras, name) for view in views]) for name in _FIELDS}
        cameras = _rebuild(views[0].cameras, fields)
        return Views(cameras, torch.cat([view.images for view in views]), *_joined_maps(views, torch.cat))

    @staticmethod
    def join(parts: Sequence[Views]) -> Views:
        """Views of the same B scenes, `[B, N]` and `[B, M]`, as `[B, N + M]`."""
        return Views.stack([Views.cat([part[i] for part in parts]) for i in range(parts[0].shape[0])])


@dataclass
class SceneBatch:
    """A batch of B scenes.

    Attributes:
        scene_ids: B names.
        source: views the encoder sees, batch shape `[B, N]`.
        target: views to be rendered, batch shape `[B, M]`.
        aabb: `[2, 3]` in metres, shared by all.
    """

    scene_ids: list[str]
    source: Views
    target: Views
    aabb: Float[Tensor, "2 3"]

    def to(self, device: torch.device | str) -> SceneBatch:
        return SceneBatch(self.scene_ids, self.source.to(device), self.target.to(device), self.aabb.to(device))


def _joined_maps(
    views: list[Views], join: Callable[[list[Tensor]], Tensor]
) -> tuple[Float[Tensor, "*batch 1 height width"] | None, Bool[Tensor, "*batch 1 height width"] | None]:
    """Depths and masks of all views, each None if no view has any."""
    depths = masks = None
    if any(view.depths is not None for view in views):
        depths = join([_depths_or_unknown(view) for view in views])
    if any(view.masks is not None for view in views):
        masks = join([masks_or_valid(view) for view in views])
    return depths, masks


def _depths_or_unknown(views: Views) -> Tensor:
    if views.depths is not None:
        return views.depths
    return torch.zeros_like(views.images[..., :1, :, :])


def masks_or_valid(views: Views) -> Bool[Tensor, "*batch 1 height width"]:
    """The masks of views, all True where there are none."""
    if views.masks is not None:
        return views.masks
    return torch.ones_like(views.images[..., :1, :, :], dtype=torch.bool)


def valid_cells(masks: Bool[Tensor, "*batch 1 height width"], h: int, w: int) -> Bool[Tensor, "*batch 1 h w"]:
    """Which of `h` x `w` cells of each image have no masked pixel, not even at their edges."""
    masked = (~masks).flatten(0, -4).float()
    return F.adaptive_max_pool2d(masked, (h, w)).reshape(*masks.shape[:-2], h, w) == 0


def make_cameras(
    camera_to_worlds: Float[Tensor, "*batch 3 4"],
    fx: Float[Tensor, "*batch"] | float,
    fy: Float[Tensor, "*batch"] | float,
    cx: Float[Tensor, "*batch"] | float,
    cy: Float[Tensor, "*batch"] | float,
    height: int,
    width: int,
) -> Cameras:
    """Perspective nerfstudio cameras of any batch shape; intrinsics in pixels."""
    shape = camera_to_worlds.shape[:-2]
    device = camera_to_worlds.device

    def full(value: Tensor | float) -> Tensor:
        value = torch.as_tensor(value, dtype=torch.float32, device=device)
        return value.expand(shape).reshape(*shape, 1).contiguous()

    size = {"height": height, "width": width}
    sizes = {name: torch.full((*shape, 1), value, dtype=torch.int64, device=device) for name, value in size.items()}
    return Cameras(
        camera_to_worlds=camera_to_worlds.float().contiguous(),
        fx=full(fx),
        fy=full(fy),
        cx=full(cx),
        cy=full(cy),
        camera_type=torch.full((*shape, 1), CameraType.PERSPECTIVE.value, device=device),
        **sizes,
    )


def _rebuild(cameras: Cameras, fields: dict[str, Tensor]) -> Cameras:
    """Cameras with the given fields and one size for all, as `Views` needs."""
    return make_cameras(
        fields["camera_to_worlds"],
        fields["fx"][..., 0],
        fields["fy"][..., 0],
        fields["cx"][..., 0],
        fields["cy"][..., 0],
        int(cameras.height.reshape(-1)[0]),
        int(cameras.width.reshape(-1)[0]),
    )


_FIELDS = ("camera_to_worlds", "fx", "fy", "cx", "cy")


def index_cameras(cameras: Cameras, index) -> Cameras:
    """Cameras of a plain tensor index into the batch axes."""
    return _rebuild(cameras, {name: getattr(cameras, name)[index] for name in _FIELDS})


def stack_cameras(cameras: list[Cameras]) -> Cameras:
    """Adds a leading batch axis; all must have one image size."""
    sizes = {(int(c.height.reshape(-1)[0]), int(c.width.reshape(-1)[0])) for c in cameras}
    if len(sizes) > 1:
        raise ValueError(f"cameras of one batch must have one image size, not {sorted(sizes)}")
    return _rebuild(cameras[0], {name: torch.stack([getattr(c, name) for c in cameras]) for name in _FIELDS})


def resize_cameras(cameras: Cameras, height: int, width: int) -> Cameras:
    """The same cameras with another number of pixels over the same field of view."""
    scale_y = height / float(cameras.height.reshape(-1)[0])
    scale_x = width / float(cameras.width.reshape(-1)[0])
    return make_cameras(
        cameras.camera_to_worlds,
        cameras.fx[..., 0] * scale_x,
        cameras.fy[..., 0] * scale_y,
        cameras.cx[..., 0] * scale_x,
        cameras.cy[..., 0] * scale_y,
        height,
        width,
    )


def rotate_cameras90(cameras: Cameras, quarter_turns: int) -> Cameras:
    """Cameras turned with the scene, counter-clockwise about the z axis (see `VoxelGrid.rotate90`)."""
    return with_poses(cameras, quarter_turn(quarter_turns).to(cameras.camera_to_worlds) @ cameras.camera_to_worlds)


def with_poses(cameras: Cameras, camera_to_worlds: Float[Tensor, "*batch 3 4"]) -> Cameras:
    """The same cameras elsewhere."""
    return _rebuild(
        cameras, {**{name: getattr(cameras, name) for name in _FIELDS}, "camera_to_worlds": camera_to_worlds}
    )


def step_aside(cameras: Cameras, yaw: Float[Tensor, "*batch"], offset: Float[Tensor, "*batch 3"]) -> Cameras:
    """Cameras turned about the vertical through themselves (radians, counter-clockwise) and then moved (metres)."""
    turned = turn_about(yaw, 2) @ cameras.camera_to_worlds[..., :3]
    return with_poses(cameras, torch.cat([turned, (cameras.camera_to_worlds[..., 3] + offset)[..., None]], dim=-1))


def view_yaws(cameras: Cameras) -> Float[Tensor, "*batch"]:
    """Directions in which cameras look in the horizontal plane: radians, counter-clockwise from x."""
    back = cameras.camera_to_worlds[..., :3, 2]
    return torch.atan2(-back[..., 1], -back[..., 0])


def evenly_spread_views(cameras: Cameras, count: int) -> list[int]:
    """Indices, in rising order, of `count` of the cameras `[N]` that look around as evenly as they can.

    The first camera is one of them. The others are those closest to the yaws that divide the circle from there into
    `count` equal parts; each camera is taken once.
    """
    yaws = view_yaws(cameras)
    if not 1 <= count <= len(yaws):
        raise ValueError(f"{count} views cannot be chosen from {len(yaws)}")
    chosen = [0]
    for part in range(1, count):
        difference = (yaws - yaws[0] - 2 * math.pi * part / count).remainder(2 * math.pi)
        distance = torch.minimum(difference, 2 * math.pi - difference)
        distance[chosen] = torch.inf
        chosen.append(int(distance.argmin()))
    return sorted(chosen)


def sparse_depths(
    depths: Float[Tensor, "*batch 1 height width"], num_points: int, generator: torch.Generator
) -> Float[Tensor, "*batch 1 height width"]:
    """Depth maps as of a Lidar: `num_points` known pixels of each view, drawn at random, the others unknown (0).

    Views with fewer known pixels keep them all.
    """
    flat = depths.flatten(-3)
    order = torch.rand(flat.shape, generator=generator).to(flat.device).masked_fill(flat == 0, -1)
    kept = order.topk(min(num_points, flat.shape[-1]), dim=-1).indices
    sparse = torch.zeros_like(flat).scatter(-1, kept, flat.gather(-1, kept))
    return sparse.reshape(depths.shape)


def project_points(
    cameras: Cameras, points: Float[Tensor, "*batch points 3"]
) -> tuple[Float[Tensor, "*batch points"], Float[Tensor, "*batch points"], Float[Tensor, "*batch points"]]:
    """Where cameras of batch shape `*B` see points in world space: `camera_rays` the other way round.

    Returns:
        columns and rows in pixels of the cameras' images, 0 at their left and upper borders, and planar depths in
        metres. Of points that are not in front of a camera the depth says so, and columns and rows say nothing.
    """
    pose = cameras.camera_to_worlds
    with torch.autocast(points.device.type, enabled=False):
        local = torch.einsum("...ji,...pj->...pi", pose[..., :3], points - pose[..., None, :, 3])
    x, y, back = local.unbind(-1)
    before = (-back).clamp(min=MIN_DEPTH)
    return cameras.cx + cameras.fx * x / before, cameras.cy - cameras.fy * y / before, -back


def camera_rays(
    cameras: Cameras, height: int, width: int
) -> tuple[Float[Tensor, "*batch 3"], Float[Tensor, "*batch height width 3"]]:
    """Origins and directions of rays through the centres of `height` x `width` cells of each image.

    Directions are scaled to unit planar depth: `origin + z * direction` lies at planar depth z.

    Returns:
        origins `[*B, 3]` and directions `[*B, height, width, 3]`, in world space.
    """
    device = cameras.device
    # By tensors, because a GPU would have to be waited for to know the sizes.
    scale_y, scale_x = height / cameras.height.float(), width / cameras.width.float()
    rows = torch.arange(height, device=device, dtype=torch.float32) + 0.5
    columns = torch.arange(width, device=device, dtype=torch.float32) + 0.5
    x = (columns - cameras.cx * scale_x) / (cameras.fx * scale_x)
    y = (rows - cameras.cy * scale_y) / (cameras.fy * scale_y)
    shape = (*cameras.shape, height, width)
    local = torch.stack(
        [x[..., None, :].expand(shape), -y[..., :, None].expand(shape), -torch.ones(shape, device=device)], dim=-1
    )
    rotation = cameras.camera_to_worlds[..., :3, :3]
    with torch.autocast(device.type, enabled=False):  # half precision is off by centimetres at ten metres
        directions = torch.einsum("...ij,...hwj->...hwi", rotation, local)
    return cameras.camera_to_worlds[..., :3, 3], directions
