"""What nerfstudio's exporter and its crops ask of a scene: colours of single rays, and a background of one's own."""

from __future__ import annotations

import pytest
import torch
from nerfstudio.data.scene_box import OrientedBox
from nerfstudio.model_components import renderers
from torch.nn.functional import avg_pool2d

from nfldm_ns.diffusion.pipeline import load_pipeline, scene_generators
from nfldm_ns.plugin.voxel_model import VoxelModel, ray_pictures
from nfldm_ns.scenes.views import index_cameras


@pytest.fixture(scope="module")
def room():
    """A room of the shipped generator, its renderer, and its cameras."""
    pipeline = load_pipeline()
    pipeline.set_progress_bar_config(disable=True)
    output = pipeline(1, scene_generators(0, 1), num_inference_steps=12)
    return output.grids, pipeline.scene_autoencoder, output.cameras


def test_a_rays_colour_is_that_of_its_pixel_up_to_detail(room) -> None:
    """How much detail a decoder makes of a ray's neighbours is its own affair; coarse colours are those of the view."""
    grid, renderer, cameras = room
    views, coarse = range(0, cameras.shape[1], 3), {"rays": [], "image": []}
    height, width = renderer.image_size
    for view in views:
        camera = index_cameras(cameras, (slice(None), slice(view, view + 1)))
        with torch.no_grad():
            image = renderer.render(grid, camera)
        seen = ray_pictures(renderer, grid, index_cameras(cameras, (0, view)).reshape((1,)).generate_rays(0))
        assert seen["rgb"].shape == (height, width, 3)
        assert seen["depth"].shape == seen["accumulation"].shape == (height, width, 1)
        assert bool(((seen["rgb"] >= 0) & (seen["rgb"] <= 1)).all())
        assert torch.allclose(seen["accumulation"].mean(), image.accumulation.mean(), atol=0.02)
        true = image.rgb[0, 0].permute(1, 2, 0).clamp(0, 1)
        assert torch.allclose(seen["rgb"].mean(), true.mean(), atol=0.03)
        for name, rgb in (("rays", seen["rgb"]), ("image", true)):
            coarse[name].append(avg_pool2d(rgb.movedim(-1, 0), height // 16).flatten())
    rays, images = (torch.stack(coarse[name]) for name in ("rays", "image"))
    own = torch.cdist(rays, images, p=1).argmin(dim=1)
    assert own.tolist() == list(range(len(views))), "each view's rays are nearest to its own image"
    assert float((rays - images).abs().mean(dim=1).max()) < 0.05
    together = torch.corrcoef(torch.stack([rays.flatten(), images.flatten()]))[0, 1]
    assert float(together) > 0.85  # of single views it says little: some are of one flat wall


def test_the_number_of_rays_does_not_matter_to_their_geometry(room) -> None:
    grid, renderer, cameras = room
    rays = index_cameras(cameras, (0, 0)).reshape((1,)).generate_rays(0).flatten()
    whole, one = ray_pictures(renderer, grid, rays), ray_pictures(renderer, grid, rays[100:101])
    assert torch.allclose(whole["depth"][100:101], one["depth"], atol=1e-4) and one["rgb"].shape == (1, 3)


class Room(VoxelModel):
    def __init__(self, grid, renderer) -> None:  # nerfstudio's own needs a whole run
        torch.nn.Module.__init__(self)
        self.kept = (grid, renderer)
        self.device_indicator_param = torch.nn.Parameter(torch.empty(0))
        for name, value in {"steady": True, "slab_low": -1.0, "slab_high": 0.5}.items():
            setattr(self, name, type("Element", (), {"value": value})())

    def shown_grid(self):
        return self.kept[0]

    def renderer(self):
        return self.kept[1]


def test_a_crop_stands_before_the_background_that_was_asked_for(room) -> None:
    grid, renderer, cameras = room
    model = Room(grid, renderer)
    camera = index_cameras(cameras, (0, 0))
    nothing = OrientedBox.from_params((100.0, 0.0, 0.0), (0.0, 0.0, 0.0), (1.0, 1.0, 1.0))
    with renderers.background_color_override_context(torch.tensor([1.0, 0.0, 0.5])):
        cropped = model.get_outputs_for_camera(camera, nothing)
        whole = model.get_outputs_for_camera(camera)
    assert torch.allclose(cropped["rgb"], torch.tensor([1.0, 0.0, 0.5]).expand_as(cropped["rgb"]), atol=1e-5)
    assert torch.equal(whole["rgb"], model.get_outputs_for_camera(camera)["rgb"]), (
        "without a crop it is the scene's own"
    )
