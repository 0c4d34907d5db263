"""Renders in a random light, and words that say where views look."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor

from nfldm_ns.errors import UserInputError
from nfldm_ns.generated.cameras import look_along
from nfldm_ns.refine.prior import Condition
from nfldm_ns.refine.refiner import Refiner
from nfldm_ns.refine.settings import RefinementConfig, ShadingConfig
from nfldm_ns.refine.shading import Shading, density_normals, lambertian, seen_normals
from nfldm_ns.refine.view_prompts import DIRECTIONS, view_directions
from nfldm_ns.refine.views import ViewSamplingConfig
from nfldm_ns.scenes.views import make_cameras
from nfldm_ns.scenes.voxel_grid import VoxelGrid, voxel_centres
from tests.small_models import small_scene_autoencoder
from tests.synthetic import AABB
from tests.test_distillation import GaussianPrior
from tests.test_refine import room_grid, room_scene


def camera(yaw: float = 0.0, pitch: float = 0.0, place: tuple[float, float, float] = (0.0, 0.0, 0.0)):
    pose = look_along(torch.tensor([place]), torch.tensor([yaw]), torch.tensor([pitch]))
    return make_cameras(pose[None], 16.0, 16.0, 16.0, 16.0, 32, 32)


def wall_grid() -> VoxelGrid:
    """All of x > 1.5 m is dense."""
    centres = voxel_centres((4, 16, 16), torch.tensor(AABB))
    density = 50.0 * (centres[..., 0] > 1.5).float()[None, None]
    generator = torch.Generator().manual_seed(0)
    features = torch.rand(1, 4, 4, 16, 16, generator=generator)
    return VoxelGrid(density, features, torch.tensor(AABB), torch.randn(1, 2, 4, generator=generator))


def test_normals_are_the_negative_gradient_of_density():
    x, y, z = voxel_centres((4, 6, 8), torch.tensor(AABB)).unbind(-1)
    grid = VoxelGrid((40 + 3 * x + 2 * y - z)[None, None], torch.zeros(1, 1, 4, 6, 8), torch.tensor(AABB))
    inner = density_normals(grid)[:, :, 1:-1, 1:-1, 1:-1]
    assert torch.allclose(inner, torch.tensor([-3.0, -2.0, 1.0]).view(1, 3, 1, 1, 1).expand_as(inner), atol=1e-4)


def test_a_wall_faces_who_looks_at_it():
    normals = seen_normals(wall_grid(), camera(yaw=0.3), 8, 8, 0.1, 64)
    assert torch.allclose(normals, torch.tensor([-1.0, 0, 0]).view(1, 1, 3, 1, 1).expand_as(normals), atol=1e-4)


def test_light_falls_as_the_cosine():
    """At 0, 60 and more than 90 degrees."""
    normals = torch.tensor([-1.0, 0, 0]).view(3, 1, 1)
    for angle, expected in ((0.0, 1.0), (math.pi / 3, 0.2 + 0.8 * 0.5), (2.0, 0.2)):
        lamp = 3.0 * torch.tensor([-math.cos(angle), math.sin(angle), 0.0]) + 1
        light = lambertian(normals, torch.ones(3, 1, 1), lamp, 0.2)
        assert float(light) == pytest.approx(expected, abs=1e-5)


def rendered(grid: VoxelGrid, shading: Shading) -> tuple[Tensor, Any]:
    model = small_scene_autoencoder().requires_grad_(False)
    views = model.render(grid, camera())
    return shading(views, grid, camera(), model.config.near, 64), views


def shading_of(lit: bool, textureless: bool, lamp: tuple[float, float, float] = (0.0, 0.0, 0.0)) -> Shading:
    return Shading(torch.tensor([lit]), torch.tensor([textureless]), torch.tensor([lamp]), 0.1)


def test_a_textureless_wall_is_white_as_the_lamp_has_it():
    images, views = rendered(wall_grid(), shading_of(True, True))
    assert torch.allclose(images[0, 0], images[0, 1]) and float(views.maps.accumulation.min()) > 0.99
    middle = images[0, 0, 15:17, 15:17]  # the lamp is the camera, which looks straight at it
    assert torch.allclose(middle, torch.ones(2, 2), atol=0.01)
    corner = views.maps.directions[0, 0, :, 0, 0]
    expected = 0.1 + 0.9 * float(corner[0] / corner.norm())
    assert float(images[0, 0, 0, 0]) == pytest.approx(expected, abs=0.02)


def test_lit_views_are_the_render_times_the_light():
    lamp = (0.2, 0.5, -0.1)
    plain, views = rendered(wall_grid(), shading_of(False, False, lamp))
    assert torch.equal(plain, views.rgb[0])
    white, _ = rendered(wall_grid(), shading_of(True, True, lamp))
    lit, _ = rendered(wall_grid(), shading_of(True, False, lamp))
    assert torch.allclose(lit, views.rgb[0] * white, atol=1e-5)


@pytest.mark.parametrize("textureless", [True, False])
def test_colours_have_no_say_without_texture(textureless):
    grid = wall_grid()
    learned = [grid.density.requires_grad_(), grid.features.requires_grad_(), grid.background.requires_grad_()]
    images, _ = rendered(grid, shading_of(True, textureless, (0.3, 0.4, 0.5)))
    gradients = torch.autograd.grad(images.square().sum(), learned, allow_unused=True)
    sizes = [0.0 if gradient is None else float(gradient.abs().sum()) for gradient in gradients]
    assert sizes[0] > 0
    assert sizes[1:] == [0, 0] if textureless else sizes[1] > 0


def test_shares_are_those_that_were_asked_for():
    config = ShadingConfig(shaded_share=0.5, textureless_share=0.2, lamp_distance=2.0)
    drawn = Shading.draw(config, 4000, torch.Generator().manual_seed(0))
    assert float(drawn.lit.float().mean()) == pytest.approx(0.7, abs=0.03)
    assert float(drawn.textureless.float().mean()) == pytest.approx(0.2, abs=0.03)
    assert (drawn.lit | ~drawn.textureless).all() and float(drawn.lamps.std()) == pytest.approx(2.0, rel=0.05)
    generator = torch.Generator().manual_seed(0)
    before = generator.get_state()
    assert Shading.draw(ShadingConfig(), 4, generator) is None
    assert torch.equal(generator.get_state(), before), "runs without are what they were"


class Words(GaussianPrior):
    """y of a text is how many it was told before."""

    def __init__(self, size: int = 16) -> None:
        super().__init__(size)
        self.texts: list[str] = []

    def condition(self, images: Tensor | None = None, text: str | None = None) -> Condition:
        assert images is None and text is not None
        self.texts.append(text)
        return {"mean": torch.full((1, 3, 16, 16), float(len(self.texts) - 1))}


def test_cameras_look_to_the_front_the_sides_the_back_or_down():
    yaw = torch.tensor([0.0, 40, 50, 130, 140, 180, -50, -140, 0, 0])
    pitch = torch.tensor([0.0] * 8 + [-70, -50])
    poses = look_along(torch.zeros(10, 3), torch.deg2rad(yaw + 90), torch.deg2rad(pitch))
    cameras = make_cameras(poses, 16.0, 16.0, 16.0, 16.0, 32, 32)
    found = [DIRECTIONS[i] for i in view_directions(cameras, torch.tensor([0.0, 1, 0])).tolist()]
    expected = ["front"] * 2 + ["side"] * 2 + ["back"] * 2 + ["side", "back", "overhead", "front"]
    assert found == expected
    assert DIRECTIONS[int(view_directions(cameras)[0])] == "side", "the front is x where none is given"


@pytest.mark.parametrize("share", [1.0, 0.5])
def test_words_say_where_each_view_looks(share):
    config = RefinementConfig(style="a hall", view_prompt_share=share, views=ViewSamplingConfig(60, pitch=80))
    config.distillation = replace(config.distillation, guidance="none")
    (term,) = Refiner(room_scene(), Words(), config).terms
    assert term.prior.texts == ["a hall", *(f"a hall, {name} view" for name in DIRECTIONS)]
    refiner = Refiner(room_scene(), Words(), config)
    cameras = refiner.views(60, torch.Generator().manual_seed(0))
    told = term.conditions(cameras, {}, torch.Generator().manual_seed(1))[0]["mean"][:, 0, 0, 0]
    looks = view_directions(cameras)[0] + 1.0
    named = told > 0
    assert torch.equal(told[named], looks[named]) and looks.unique().numel() == 4
    assert float(named.float().mean()) == pytest.approx(share, abs=0.2 * (share < 1))


def test_refining_in_random_light_moves_geometry_alone():
    """Without texture in all views nothing reaches the features, whatever the prior says."""
    config = RefinementConfig(style="a hall", shading=ShadingConfig(textureless_share=1.0))
    config.distillation = replace(config.distillation, guidance="none")
    grid = room_grid()
    grid.density.requires_grad_(), grid.features.requires_grad_()
    refiner = Refiner(room_scene(), Words(), config)
    losses, _ = refiner.losses(grid, room_scene().renderer, 0.0, torch.Generator().manual_seed(0))
    losses["distillation_loss"].backward()
    assert float(grid.density.grad.abs().sum()) > 0
    assert grid.features.grad is None or float(grid.features.grad.abs().sum()) == 0


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"shading": ShadingConfig(shaded_share=0.7, textureless_share=0.4)}, "together at most 1"),
        ({"shading": ShadingConfig(ambient=1.5)}, "--ambient"),
        ({"view_prompt_share": 1.5}, "--view-prompt-share"),
    ],
)
def test_shares_that_cannot_be_are_refused(changes, sentence):
    with pytest.raises(UserInputError, match=sentence):
        RefinementConfig(prior="x", **changes).check()


def test_prompts_by_view_want_words(tmp_path):
    Image.new("RGB", (16, 16)).save(tmp_path / "clean.png")
    config = RefinementConfig(prior="x", view_prompt_share=0.5, clean_images=tmp_path / "clean.png")
    config.distillation = replace(config.distillation, guidance="none")
    with pytest.raises(UserInputError, match="want words"):
        Refiner(room_scene(), GaussianPrior(16), config)
