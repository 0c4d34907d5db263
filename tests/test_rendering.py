"""Truths of pictures of any size, field of view and kind of camera."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from nerfstudio.cameras.cameras import Cameras, CameraType
from nerfstudio.data.scene_box import SceneBox
from nerfstudio.models.base_model import ModelConfig
from torch import Tensor, nn

from nfldm_ns.autoencoder.scene_autoencoder import SceneAutoencoder
from nfldm_ns.errors import UserInputError
from nfldm_ns.plugin.panorama import face_rotations
from nfldm_ns.plugin.pictures import render_perspective, render_steadily, resampling_weights
from nfldm_ns.plugin.voxel_model import VoxelModel, is_plane, picture_dict, ray_features, single_camera
from nfldm_ns.scenes.views import make_cameras
from nfldm_ns.scenes.voxel_grid import VoxelGrid, voxel_centres
from tests.small_models import small_scene_autoencoder
from tests.synthetic import AABB, NEAR, level_cameras

REACH = 3.0  # metres; colours are positions divided by it


def painting_autoencoder(upsampled: bool = False) -> SceneAutoencoder:
    """One whose decoder shows the first three features and nothing else, at 32 x 32 pixels and 90 degrees, or twice as
    many."""
    torch.manual_seed(0)
    box = {"grid_shape": (32, 48, 48), "aabb": AABB, "near": NEAR}
    sizes = {"feature_channels": 4, "image_size": (32, 32), "focal_length": 16.0, "num_samples": 192}
    model = SceneAutoencoder(**box, **sizes, encoder_channels=(8, 8), decoder_channels=(8, 8)).eval()
    last_of_background = [layer for layer in model.background.modules() if isinstance(layer, nn.Linear)][-1]
    for layer in (model.decoder.out, last_of_background):
        nn.init.zeros_(layer.weight)
        nn.init.zeros_(layer.bias)
    if upsampled:
        model.grow_decoder(upsampling_channels=8)
        nn.init.zeros_(model.decoder.upsampler.out.weight)
    return model


def room_of_positions() -> VoxelGrid:
    """A closed room with walls 0.5 m thick whose colours tell where they are: features are x, y, z over `REACH`."""
    shape, aabb = (32, 48, 48), torch.tensor(AABB)
    centres = voxel_centres(shape, aabb)
    inside = (centres.abs() < torch.tensor([2.5, 2.5, 1.5])).all(-1)
    density = torch.where(inside, 0.0, 200.0)[None, None]
    features = torch.cat([centres / REACH, torch.ones(*shape, 1)], dim=-1).permute(3, 0, 1, 2)[None]
    return VoxelGrid(density, features, aabb)


def smooth_grid() -> VoxelGrid:
    """Soft noise for the models of `small_scene_autoencoder`."""
    generator = torch.Generator().manual_seed(0)
    noise = F.interpolate(torch.randn(1, 5, 2, 6, 6, generator=generator), size=(4, 16, 16), mode="trilinear")
    return VoxelGrid((3 * noise[:, :1]).clamp(min=0), noise[:, 1:], torch.tensor(AABB))


def lively_autoencoder(upsampled: bool = False) -> SceneAutoencoder:
    """A small one whose untrained decoder adds detail that can be seen."""
    model = small_scene_autoencoder()
    if upsampled:
        model.grow_decoder(upsampling_channels=8)
    with torch.no_grad():
        for name, parameter in model.decoder.named_parameters():
            if name.endswith(("conv2.weight", "out.weight")):
                parameter.normal_(std=0.1)
    return model


class ShownModel(VoxelModel):
    """nerfstudio's model of one grid."""

    def __init__(self, autoencoder: SceneAutoencoder, grid: VoxelGrid) -> None:
        super().__init__(ModelConfig(enable_collider=False), SceneBox(aabb=grid.aabb), num_train_data=1)
        self.parts = (autoencoder, grid)

    def renderer(self) -> SceneAutoencoder:
        return self.parts[0]

    def shown_grid(self) -> VoxelGrid:
        return self.parts[1]


@pytest.fixture(scope="module")
def room() -> ShownModel:
    return ShownModel(painting_autoencoder(), room_of_positions())


def upright(yaw: float = 0.3, position: tuple[float, float, float] = (0.4, -0.3, 0.2)) -> Tensor:
    return level_cameras(torch.tensor([position]), torch.tensor([yaw]), 32).camera_to_worlds


def tilted() -> Tensor:
    """A pose `[1, 3, 4]` with pitch and roll."""
    pose = upright(2.0)
    turn = torch.linalg.matrix_exp(torch.tensor([[0, -0.3, 0.2], [0.3, 0, -0.4], [-0.2, 0.4, 0.0]]))
    pose[..., :3] = pose[..., :3] @ turn
    return pose


def perspective(size: tuple[int, int], field_of_view: float = 90, pose: Tensor | None = None, **options) -> Cameras:
    """Batch shape `[1]`, as the viewer asks; `size` is (height, width), the field of view vertical, in degrees."""
    height, width = size
    focal = height / 2 / math.tan(math.radians(field_of_view / 2))
    pose = upright() if pose is None else pose
    return Cameras(pose, focal, focal, width / 2, height / 2, width, height, **options)


def equirectangular(width: int, pose: Tensor) -> Cameras:
    kind = CameraType.EQUIRECTANGULAR
    return Cameras(pose, width / 2, float(width // 2), width / 2, width / 4, width, width // 2, camera_type=kind)


CAMERAS = {
    "trained": perspective((32, 32)),
    "large": perspective((90, 130)),
    "off centre": Cameras(upright(), 90.0, 70.0, 20.0, 110.0, 101, 77),
    "zoomed in": perspective((64, 64), 12),
    "wide": perspective((48, 64), 100),
    "very wide": perspective((63, 90), 140),
    "distorted": perspective((64, 64), distortion_params=torch.tensor([[0.1, 0.02, 0, 0, 0.01, -0.01]])),
    "fisheye": Cameras(tilted(), 25.0, 25.0, 32.5, 32.5, 65, 65, camera_type=CameraType.FISHEYE),
    "equirectangular": equirectangular(128, tilted()),
    "small panorama": equirectangular(32, tilted()),
}


@pytest.fixture(scope="module")
def larger_room() -> ShownModel:
    return ShownModel(painting_autoencoder(upsampled=True), room_of_positions())


@pytest.mark.parametrize("kind", ["trained", "large", "off centre", "wide", "equirectangular"])
def test_an_upsampler_shows_every_ray_where_it_was(room, larger_room, kind):
    before, after = (shown.get_outputs_for_camera(CAMERAS[kind])["rgb"] for shown in (room, larger_room))
    assert after.shape == before.shape
    assert float((after - before).abs().mean()) < 0.01
    if kind == "trained":
        assert torch.equal(after, before), "it has no say in pictures of the size before it"


@pytest.mark.parametrize("kind", CAMERAS)
def test_every_pixel_shows_what_its_ray_meets(room, kind):
    """Colours tell positions; nerfstudio's own rays, followed through the voxels, tell where they must be."""
    camera = CAMERAS[kind]
    outputs = room.get_outputs_for_camera(camera)
    rays = camera.generate_rays(camera_indices=0)
    height, width = rays.shape
    known = rays.directions.isfinite().all(-1)  # nerfstudio's fisheye has no ray at its very centre
    truth = ray_features(room.shown_grid(), rays.flatten(), 256)["depth"].reshape(height, width, 1)
    assert outputs["rgb"].shape == (height, width, 3)
    assert all(bool(image.isfinite().all()) for image in outputs.values())
    assert float(outputs["accumulation"].min()) > 0.98
    depth_error = (outputs["depth"] - truth).abs()[known]
    assert float(depth_error.mean()) < 0.04  # metres; voxels are 0.125 m
    assert float(depth_error.quantile(0.99)) < 0.25
    points = rays.origins + rays.directions * truth
    colour_error = (outputs["rgb"] * 2 - 1 - points / REACH).abs()[known]
    assert float(colour_error.mean()) < 0.012
    assert float(colour_error.quantile(0.99)) < 0.05


@pytest.mark.parametrize("size", [(64, 64), (1024, 512), (33, 47), (200, 300)])
@pytest.mark.parametrize("field_of_view", [60, 100])
def test_edges_lie_exactly_where_they_must(size, field_of_view):
    """A wall fades to red left of y = 0 and to green above z = 0: half of the change lies at the principal point."""
    model, grid = painting_autoencoder(), room_of_positions()
    centres = voxel_centres(grid.shape, grid.aabb)
    grid.features[0, :2] = (centres[..., 1:] / 0.5).clamp(-1, 1).movedim(-1, 0)
    height, width = size
    focal = max(size) / 2 / math.tan(math.radians(field_of_view / 2))
    cx, cy = 0.45 * width, 0.6 * height
    pose = level_cameras(torch.zeros(1, 3), torch.zeros(1), 32).camera_to_worlds
    camera = make_cameras(pose[None], focal, focal * 1.1, cx, cy, height, width)
    with torch.no_grad():
        red, green, _ = render_perspective(model, grid, camera)["rgb"].unbind(-1)
    tolerance = 0.05 * focal / model.config.focal_length  # a twentieth of a decoded pixel
    assert float(red[height // 2].sum()) == pytest.approx(cx, abs=tolerance)
    assert float(green[:, width // 2].sum()) == pytest.approx(cy, abs=tolerance)


@pytest.mark.parametrize("field_of_view", [20, 90, 105])
def test_the_look_does_not_change_with_the_size(field_of_view):
    model = ShownModel(lively_autoencoder(), smooth_grid())
    large = model.get_outputs_for_camera(perspective((1024, 1024), field_of_view))
    for size in (512, 256, 128, 64):
        small = model.get_outputs_for_camera(perspective((size, size), field_of_view))
        for name, tolerance in (("rgb", 0.01), ("depth", 0.03), ("accumulation", 0.01)):
            shrunk = F.avg_pool2d(large[name].movedim(-1, 0), 1024 // size).movedim(0, -1)
            assert float((shrunk - small[name]).abs().mean()) < tolerance, (size, name)
    assert float(large["rgb"].std()) > 0.05  # there is something to see


@pytest.mark.parametrize("size", [(1, 1), (1, 64), (13, 5), (3, 1000), (270, 481)])
def test_any_size_the_viewer_asks_for(size):
    model = ShownModel(lively_autoencoder(), smooth_grid())
    for camera in (perspective(size), perspective(size)[0], perspective(size, 150)):
        outputs = model.get_outputs_for_camera(camera)
        assert outputs["rgb"].shape == (*size, 3) and outputs["density_from_above"].shape == (*size, 1)
        assert all(bool(image.isfinite().all()) for image in outputs.values())


def test_a_crop_shows_the_same_as_the_whole(room):
    whole, crop = perspective((120, 160)), perspective((120, 160))
    crop.cx, crop.cy, crop.width, crop.height = crop.cx - 90, crop.cy - 30, crop.width * 0 + 41, crop.height * 0 + 23
    outputs, part = (room.get_outputs_for_camera(camera) for camera in (whole, crop))
    difference = (outputs["rgb"][30:53, 90:131] - part["rgb"]).abs()
    assert float(difference.max()) < 0.02


@pytest.mark.parametrize("cubic", [False, True])
@pytest.mark.parametrize("count", [16, 40, 64, 150])
def test_resampling_is_that_of_torch(cubic, count):
    image = torch.rand(1, 1, 64, 64)
    weights = resampling_weights(count, 64 / count, 0.0, 64, cubic=cubic)
    mode = "bicubic" if cubic else "bilinear"
    expected = F.interpolate(image, size=(count, count), mode=mode, align_corners=False, antialias=True)
    torch.testing.assert_close(weights @ image[0, 0] @ weights.T, expected[0, 0], atol=1e-5, rtol=0)


@pytest.mark.parametrize(("upsampled", "scale"), [(False, 1), (True, 1), (True, 2)])
def test_pictures_do_not_depend_on_where_their_borders_lie(upsampled, scale):
    """Away from borders the decoder is the same everywhere; its normalisation, which sees all, is left out here."""
    model = lively_autoencoder(upsampled)
    for module in list(model.decoder.modules()):
        for name, child in list(module.named_children()):
            if isinstance(child, nn.GroupNorm):
                setattr(module, name, nn.Identity())
    pose = upright()[None]

    def cameras(*sizes: int) -> Cameras:
        return make_cameras(pose, scale * 16.0, scale * 16.0, *(scale * size for size in sizes))

    small = render_steadily(model, smooth_grid(), cameras(8, 8, 16, 16))
    large = render_steadily(model, smooth_grid(), cameras(14, 12, 24, 28))
    rows, columns = slice(4 * scale, 20 * scale), slice(6 * scale, 22 * scale)
    torch.testing.assert_close(small, large[:, :, rows, columns], atol=1e-4, rtol=0)


def test_the_decoders_pattern_does_not_stick_to_the_screen():
    """Decoded pixels of one feature cell differ; the mean over the cells' positions shows each position alike."""
    model, grid = lively_autoencoder(), smooth_grid()
    camera = make_cameras(upright()[None], 16.0, 16.0, 32, 32, 64, 64)
    pattern = []
    for phases in (1, None):
        with torch.no_grad():
            rgb = render_steadily(model, grid, camera, phases=phases)[0, :3]
        steps = rgb.diff(dim=-1)
        within, between = steps[..., 0::2].abs().mean(), steps[..., 1::2].abs().mean()
        pattern.append(abs(float(within / between) - 1))
    assert pattern[1] < 0.2 * pattern[0]


def test_nothing_jumps_as_the_camera_moves():
    model, grid = small_scene_autoencoder(), smooth_grid()
    grid.features *= 3
    poses = [upright(position=(0.01 * i, 0, 0))[None] for i in range(12)]

    def jitter(num_feature_samples: int | None) -> float:
        cameras = [make_cameras(pose, 16.0, 16.0, 16, 16, 32, 32) for pose in poses]
        with torch.no_grad():
            frames = [
                render_perspective(model, grid, camera, num_feature_samples=num_feature_samples)["rgb"]
                for camera in cameras
            ]
        return float(torch.stack(frames).diff(n=2, dim=0).abs().mean())

    assert jitter(None) < 0.5 * jitter(4)


def test_evaluation_renders_exactly_as_training():
    model = ShownModel(lively_autoencoder(), smooth_grid())
    camera = perspective((32, 32))
    with model.as_trained():
        outputs = model.get_outputs_for_camera(camera)
    cameras = single_camera(camera)
    expected = picture_dict(model.renderer().render(model.shown_grid(), cameras), cameras)
    for name, image in expected.items():
        assert torch.equal(outputs[name], image)
    assert not torch.equal(model.get_outputs_for_camera(camera)["rgb"], expected["rgb"])


class TestPanoramas:
    def test_the_faces_of_the_cube_are_turned_cameras(self):
        rotations = face_rotations()
        torch.testing.assert_close(rotations @ rotations.transpose(1, 2), torch.eye(3).expand(6, 3, 3))
        torch.testing.assert_close(torch.linalg.det(rotations), torch.ones(6))
        assert len({tuple(forward.tolist()) for forward in rotations[:, :, 2]}) == 6

    def test_turning_the_camera_only_shifts_a_panorama(self):
        """So nothing happens at the border of +-180 degrees, nor at the edges of the cube."""
        model = ShownModel(lively_autoencoder(), smooth_grid())
        turned = [model.get_outputs_for_camera(equirectangular(96, upright(yaw)))["rgb"] for yaw in (0.0, math.pi / 6)]
        torch.testing.assert_close(turned[0].roll(8, dims=1), turned[1], atol=1e-4, rtol=0)

    @pytest.mark.parametrize("pose", [upright(), tilted()])
    def test_neither_seam_nor_poles_can_be_seen(self, pose):
        model = ShownModel(lively_autoencoder(), smooth_grid())
        rgb = model.get_outputs_for_camera(equirectangular(256, pose))["rgb"]
        steps = (rgb - rgb.roll(1, dims=1)).abs().amax(-1)
        assert float(steps[:, 0].mean()) < 1.5 * float(steps.mean(0).quantile(0.9))
        for pole in (rgb[0], rgb[-1]):
            assert float((pole - pole.mean(0)).abs().max()) < 0.05

    @pytest.mark.parametrize("kind", [CameraType.VR180_L, CameraType.OMNIDIRECTIONALSTEREO_R, CameraType.ORTHOPHOTO])
    def test_cameras_of_many_origins_are_refused(self, room, kind, capfd):
        camera = Cameras(upright(), 32.0, 32.0, 16.0, 16.0, 32, 32, camera_type=kind)
        with pytest.raises(UserInputError, match=f"{kind.name} look from more than one point"):
            is_plane(camera)
        with pytest.raises(SystemExit) as ending:
            room.get_outputs_for_camera(camera)
        assert ending.value.code == 2
        assert capfd.readouterr().err.startswith(f"error: Cameras of type {kind.name} ")

    def test_fisheye624_is_looked_up_as_well(self, room):
        camera = Cameras(
            tilted(), 30.0, 30.0, 20.0, 20.0, 40, 40, torch.zeros(1, 12), camera_type=CameraType.FISHEYE624
        )
        plain = Cameras(tilted(), 30.0, 30.0, 20.0, 20.0, 40, 40, camera_type=CameraType.FISHEYE)
        first, second = (room.get_outputs_for_camera(c)["rgb"] for c in (camera, plain))
        torch.testing.assert_close(first, second, atol=0.02, rtol=0)
