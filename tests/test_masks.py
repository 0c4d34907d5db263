"""Masked pixels: files keep them, nothing is learned from them, and nothing is encoded of them."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from lpips import LPIPS
from PIL import Image
from torch import Tensor

from nfldm_ns.autoencoder.grid_optimisation import GridOptimiserConfig, optimise_grid
from nfldm_ns.autoencoder.losses import StageOneLossConfig, make_discriminator, opacity_loss, stage_one_losses
from nfldm_ns.autoencoder.novel_views import EncoderInput, ViewJudge, evaluate_novel_views
from nfldm_ns.autoencoder.perceptual import PerceptualNetwork
from nfldm_ns.autoencoder.scene_autoencoder import RenderedViews, SceneAutoencoder, measured_share
from nfldm_ns.autoencoder.scene_sampler import SceneCache, SceneSampler, SceneSamplerConfig
from nfldm_ns.collect.checking import check_collection
from nfldm_ns.errors import UserInputError
from nfldm_ns.latents.training import LatentLossConfig, LatentLosses, LatentTrainingConfig
from nfldm_ns.metrics.images import psnr
from nfldm_ns.refine.images import collection_paths, example_images
from nfldm_ns.scenes.collection import SceneCollection
from nfldm_ns.scenes.views import SceneBatch, Views, valid_cells
from nfldm_ns.scenes.voxel_grid import VoxelGrid
from nfldm_ns.scenes.writing import write_scene
from tests.small_models import small_scene_autoencoder
from tests.synthetic import make_box_room_collection

SIZE = 32


def random_masks(views: Views, seed: int = 0) -> Tensor:
    """A rectangle of each view, and some single pixels, are masked."""
    generator = torch.Generator().manual_seed(seed)
    masks = torch.rand(*views.shape, 1, SIZE, SIZE, generator=generator) > 0.02
    masks[..., 4:19, 7:22] = False
    return masks


def masked(views: Views, seed: int = 0) -> Views:
    return replace(views, masks=random_masks(views, seed))


def under_the_mask(views: Views) -> Views:
    """The same views with other colours and depths under their masks."""
    assert views.masks is not None and views.depths is not None
    other = torch.rand(views.images.shape, generator=torch.Generator().manual_seed(9))
    return replace(
        views,
        images=torch.where(views.masks, views.images, other),
        depths=torch.where(views.masks, views.depths, 1 + other[..., :1, :, :]),
    )


@pytest.fixture
def collection(tmp_path: Path) -> SceneCollection:
    """Two scenes, the views of the first with masks."""
    collection = make_box_room_collection(tmp_path / "rooms", num_train=2, num_val=0, num_test=1, image_size=SIZE)
    scene = collection.load_scene("room_000")
    write_scene(collection.scene_dir("room_000"), masked(scene.source), masked(scene.target, 1))
    return collection


@pytest.fixture
def batch(collection: SceneCollection) -> SceneBatch:
    return collection.batch([collection.load_scene(scene_id) for scene_id in collection.splits["train"]])


class TestFiles:
    def test_masks_come_back_as_written(self, collection: SceneCollection) -> None:
        scene = collection.load_scene("room_000")
        for views, seed in ((scene.source, 0), (scene.target, 1)):
            assert views.masks is not None and views.depths is not None
            assert torch.equal(views.masks, random_masks(views, seed))
            assert torch.equal(views.depths > 0, views.masks)
        assert json.loads((collection.root / "collection.json").read_text())["version"] == 2
        assert collection.load_scene("room_001").source.masks is None

    def test_masks_of_some_views_are_written_for_all(self, collection: SceneCollection) -> None:
        """As nerfstudio's own dataparser wants it, which reads the scene as well."""
        from nerfstudio.data.dataparsers.nerfstudio_dataparser import NerfstudioDataParserConfig

        scene = collection.load_scene("room_001")
        folder = collection.scene_dir("room_001")
        write_scene(folder, masked(scene.source), scene.target)
        target = collection.load_scene("room_001").target
        assert target.masks is not None and bool(target.masks.all())
        outputs = NerfstudioDataParserConfig(data=folder, load_3D_points=False).setup().get_dataparser_outputs("train")
        assert len(outputs.mask_filenames) == len(outputs.image_filenames) == 8

    def test_version_1_is_read_and_3_is_not(self, collection: SceneCollection) -> None:
        path = collection.root / "collection.json"
        content = json.loads(path.read_text())
        path.write_text(json.dumps({**content, "version": 1}))
        assert SceneCollection.open(collection.root).load_scene("room_001").source.masks is None
        path.write_text(json.dumps({**content, "version": 3}))
        with pytest.raises(UserInputError, match="has version 3, but this release reads versions up to 2: collect"):
            SceneCollection.open(collection.root)

    @pytest.mark.parametrize(
        ("damage", "message"),
        [
            (lambda path: path.unlink(), "source_02.png is missing: restore it or remove mask_path"),
            (lambda path: Image.new("RGB", (SIZE, SIZE)).save(path), "source_02.png has mode RGB, but a mask must be"),
            (lambda path: Image.new("L", (SIZE, 8), 255).save(path), "source_02.png is 32 x 8, but collection.json"),
            (lambda path: Image.new("L", (SIZE, SIZE)).save(path), "source_02.png masks every pixel of its view"),
            (lambda path: path.write_text("no"), "source_02.png is not a readable image .*: restore it"),
        ],
    )
    def test_check_names_the_file_that_is_wrong(self, collection: SceneCollection, damage, message: str) -> None:
        assert not check_collection(collection).scenes[0].problems
        damage(collection.scene_dir("room_000") / "masks" / "source_02.png")
        (problem,) = check_collection(collection).scenes[0].problems
        assert re.search(f"/masks/{message}", problem), problem

    def test_a_prior_of_images_refuses_them(self, collection: SceneCollection) -> None:
        with pytest.raises(UserInputError, match="room_000 has masks, but here masked pixels would"):
            collection_paths(collection, "train")
        with pytest.raises(UserInputError, match="room_000 has masks"):
            example_images(collection.scene_dir("room_000"), 16)
        assert len(example_images(collection.scene_dir("room_001"), 16)) == 12


class TestViews:
    def test_none_beside_masks_is_all_valid(self, batch: SceneBatch) -> None:
        masks = batch.source.masks
        assert masks is not None and masks.shape == (2, 8, 1, SIZE, SIZE)
        assert not bool(masks[0].all()) and bool(masks[1].all())
        joined = Views.cat([batch.source[1], batch.source[0]])
        assert joined.masks is not None and torch.equal(joined.masks, torch.cat([masks[1], masks[0]]))
        assert torch.equal(batch.source[:, 2:4].to("cpu").masks, masks[:, 2:4])

    def test_depth_under_a_mask_is_unknown(self, batch: SceneBatch) -> None:
        views = replace(batch.source, depths=torch.ones_like(batch.source.depths))
        assert torch.equal(views.depths > 0, views.masks)
        torch.testing.assert_close(measured_share(views), torch.ones(2, 8, 1, 1, 1))

    def test_a_cell_is_valid_if_all_of_its_pixels_are(self) -> None:
        masks = torch.ones(2, 1, 6, 9, dtype=torch.bool)
        masks[1, 0, 3, 5] = False
        assert bool(valid_cells(masks[:1], 3, 3).all())
        assert valid_cells(masks, 3, 3)[1, 0].tolist() == [[True] * 3, [True, False, True], [True] * 3]
        overlapping = (~valid_cells(masks, 4, 2)).nonzero().tolist()
        assert overlapping == [[1, 0, 2, 1]]  # rows 3 and 4, columns 4 to 8

    def test_the_sampler_keeps_them_with_their_images(self, collection: SceneCollection) -> None:
        cache = SceneCache(collection, 1.0)
        config = SceneSamplerConfig(2, num_source_views=5, num_extra_targets=3, sparse_depth=0.5, missing_depth=0.3)
        given = {scene_id: collection.load_scene(scene_id) for scene_id in collection.splits["train"]}
        for step in (0, 1, 2):  # from the disk, then from memory
            drawn = SceneSampler(cache, collection.splits["train"], config).batch(step)
            first = drawn.scene_ids.index("room_000")
            known = Views.cat([given["room_000"].source, given["room_000"].target])
            for views in (drawn.source[first], drawn.target[first]):
                difference = (views.images[:, None] - known.images[None]).abs().flatten(2).amax(2)
                same = difference.argmin(1)
                assert float(difference.amin(1).max()) < 1e-6
                assert torch.equal(views.masks, known.masks[same])
                assert not bool((views.depths[~views.masks] > 0).any())
            assert bool(drawn.target[1 - first].masks.all())

    def test_encoder_inputs_keep_them(self, collection: SceneCollection) -> None:
        scene = collection.load_scene("room_000")
        for kind in ("dense", "sparse", "none"):
            masks = EncoderInput(kind, num_views=4).of(scene).source.masks
            assert masks is not None and torch.equal(masks, scene.source.masks[::2])


def moved_autoencoder(**options) -> SceneAutoencoder:
    """All of whose parameters matter."""
    torch.manual_seed(0)
    model = SceneAutoencoder.from_config(small_scene_autoencoder().config, **options).eval()
    for parameter in model.parameters():
        parameter.data.add_(0.05 * torch.randn_like(parameter))
    return model


TENSORS = ("density", "features", "background")


class TestEncoder:
    @pytest.mark.parametrize(
        "options",
        [
            {},
            {"fusion": "mean", "splatting": "trilinear", "encoder_input": "rgb"},
            {"density_from": "voxels", "fusion": "occupancy", "splatting": "nearest"},
            {"refinement_channels": 8, "refinement_steps": 2},
        ],
    )
    def test_what_is_under_the_mask_does_not_matter_to_the_bit(self, batch: SceneBatch, options) -> None:
        model = moved_autoencoder(**options)
        views = (batch.source, under_the_mask(batch.source), replace(batch.source, masks=None))
        with torch.no_grad():
            first, second, without = (model.encode(v) for v in views)
        for name in TENSORS:
            assert torch.equal(getattr(first, name), getattr(second, name)), name
            assert not torch.equal(getattr(first, name), getattr(without, name)), name

    @pytest.mark.parametrize("fusion", ["attention", "mean"])
    def test_masks_that_mask_nothing_change_nothing(self, batch: SceneBatch, fusion: str) -> None:
        model = moved_autoencoder(fusion=fusion, refinement_channels=8)
        views = replace(batch.source, masks=None)
        with torch.no_grad():
            grids = [model.encode(v) for v in (views, replace(views, masks=torch.ones_like(batch.source.masks)))]
        for name in TENSORS:
            assert torch.equal(*(getattr(grid, name) for grid in grids)), name

    def test_rays_of_masked_cells_put_nothing_into_voxels(self, batch: SceneBatch) -> None:
        model = moved_autoencoder(splatting="nearest")
        view = batch.source[1:, :1]
        few = torch.zeros_like(view.masks)
        few[..., :2, :2] = True
        with torch.no_grad():
            grids = [model.encode(replace(view, masks=masks)) for masks in (~torch.zeros_like(few), few, few & False)]
        reached = [int((grid.features != 0).any(1).sum()) for grid in grids]
        assert 0 < reached[1] < 0.1 * reached[0] and reached[2] == 0
        assert float(grids[1].background.abs().max()) > 0
        for name in TENSORS:
            assert float(getattr(grids[2], name).abs().max()) == 0


def leaves(batch: SceneBatch) -> tuple[RenderedViews, VoxelGrid, list[Tensor]]:
    """Renderings, and of them colours, depths and accumulations, which are leaves of the graph."""
    model = moved_autoencoder()
    with torch.no_grad():
        grid = model.encode(batch.source)
        rendered = model.render(grid, batch.target.cameras)
    maps = rendered.maps
    found = [tensor.clone().requires_grad_() for tensor in (rendered.rgb, maps.depth, maps.accumulation)]
    maps = replace(maps, depth=found[1], accumulation=found[2])
    return replace(rendered, rgb=found[0], maps=maps), grid, found


def check_gradients(losses: dict[str, Tensor], found: list[Tensor], target: Views) -> set[str]:
    """That no loss pulls at what is masked, and each that has gradients at something else; names of those."""
    assert target.masks is not None
    rays = ~valid_cells(~target.masks, *found[1].shape[-2:])  # of which any pixel is valid
    names = set()
    for name, loss in losses.items():
        if not loss.requires_grad:
            continue
        gradients = torch.autograd.grad(loss, found, retain_graph=True, allow_unused=True)
        for gradient, valid in zip(gradients, (target.masks, rays, rays), strict=True):
            if gradient is not None:
                assert float(torch.where(valid, 0, gradient).abs().max()) == 0, name
                assert float(gradient[0].abs().max()) > 0, name
                names.add(name)
    return names


class TestLosses:
    @pytest.fixture(scope="class")
    def perceptual(self) -> PerceptualNetwork:
        torch.manual_seed(0)
        return PerceptualNetwork(LPIPS(net="vgg", pretrained=False, pnet_rand=True, verbose=False))

    @pytest.mark.parametrize("discriminator", ["projected", "stylegan2"])
    def test_nothing_pulls_at_masked_pixels(self, batch, perceptual, discriminator) -> None:
        pixels = discriminator == "stylegan2"
        config = StageOneLossConfig(
            adversarial_mult=1.0,
            discriminator=discriminator,
            discriminator_channel_base=64,
            augment=("color", "translation", "cutout") if pixels else (),
            r1_gamma=1.0 if pixels else 0.0,
            opacity_mult=1.0,
        )
        depths = batch.target.depths.clone()
        depths[..., :12, :] = 0  # a sky, partly behind the mask
        target = replace(batch.target, depths=depths)
        rendered, grid, found = leaves(batch)
        losses = stage_one_losses(
            config, rendered, target, grid, perceptual, make_discriminator(config, (SIZE, SIZE)), step=0
        )
        names = check_gradients(losses, found, target)
        assert names == {"rgb_loss", "lpips_loss", "adversarial_loss", "depth_loss", "opacity_loss"}

    def test_those_of_stage_2_neither(self, batch, perceptual) -> None:
        rendered, grid, found = leaves(batch)
        config = LatentTrainingConfig(losses=LatentLossConfig(lpips_mult=1.0))
        renderer = SimpleNamespace(render=lambda grid, cameras: rendered)
        trainer = SimpleNamespace(config=config, renderer=renderer, lpips=perceptual.metric)
        losses = LatentLosses.image_losses(trainer, grid, batch.target)  # type: ignore[arg-type]
        assert check_gradients(losses, found, batch.target) == {"rgb_loss", "lpips_loss", "depth_loss"}

    def test_opacity_leaves_masked_rays_out(self, batch) -> None:
        rendered, _, (_, _, accumulation) = leaves(batch)
        depths = batch.target.depths.clone()
        depths[..., :12, :] = 0
        target = replace(batch.target, depths=depths)
        (gradient,) = torch.autograd.grad(opacity_loss(rendered.maps, target), accumulation)
        sky = torch.zeros_like(accumulation, dtype=torch.bool)
        sky[..., :6, :] = True
        assert torch.equal(gradient > 0, sky & valid_cells(target.masks, 16, 16))

    def test_masks_that_mask_nothing_change_nothing(self, batch) -> None:
        rendered, grid, _ = leaves(batch)
        config = StageOneLossConfig(lpips_mult=0.0, opacity_mult=1.0)
        views = replace(batch.target, masks=None)
        plain, masks = (
            stage_one_losses(config, rendered, target, grid, None)
            for target in (views, replace(views, masks=torch.ones_like(batch.target.masks)))
        )
        assert {name: float(loss.detach()) for name, loss in plain.items()} == {
            name: pytest.approx(float(loss.detach()), rel=1e-6) for name, loss in masks.items()
        }

    def test_optimised_voxels_do_not_depend_on_masked_pixels(self, batch) -> None:
        model = moved_autoencoder()
        with torch.no_grad():
            start = model.encode(batch.source)
        config = StageOneLossConfig(lpips_mult=0.0, opacity_mult=0.1)
        grids = [
            optimise_grid(model, start, views, config, None, GridOptimiserConfig(max_steps=3, check_every=1)).grid
            for views in (batch.source, under_the_mask(batch.source))
        ]
        assert not torch.equal(grids[0].features, start.features)
        for name in TENSORS:
            assert torch.equal(*(getattr(grid, name) for grid in grids)), name

    def test_refinement_does_not_look_at_masked_pixels(self, batch) -> None:
        model = moved_autoencoder(refinement_channels=8)
        grid = model.encode(batch.source)
        with torch.no_grad():
            errors = [model._view_error(grid, views) for views in (batch.source, under_the_mask(batch.source))]
        assert torch.equal(*errors)


class TestScores:
    def test_psnr_is_of_valid_pixels(self) -> None:
        true, predicted = torch.full((2, 3, 4, 4), 0.5), torch.full((2, 3, 4, 4), 0.6)
        masks = torch.ones(2, 1, 4, 4, dtype=torch.bool)
        masks[..., :2] = False
        predicted[..., :2] = 1.0
        torch.testing.assert_close(psnr(predicted, true, masks), torch.full((2,), 20.0))

    def test_what_is_rendered_under_a_mask_is_not_judged(self, batch: SceneBatch) -> None:
        rendered, _, _ = leaves(batch)
        other = torch.where(batch.target.masks, rendered.rgb, torch.rand_like(rendered.rgb)).detach()
        mean = torch.full((3, SIZE, SIZE), 0.5)
        scores = [
            evaluate_novel_views(lambda given, rgb=rgb: replace(rendered, rgb=rgb), [batch], mean, None)
            for rgb in (rendered.rgb.detach(), other)
        ]
        assert scores[0] == scores[1]
        judge = ViewJudge(batch.target, batch.aabb, None)
        assert judge.score_images(rendered.rgb)["psnr"].equal(judge.score_images(other)["psnr"])
        valid = judge.score(rendered)
        count = valid["accumulation_known"][..., 1] + valid["accumulation_unknown"][..., 1]
        assert torch.equal(count, batch.target.masks.flatten(2).sum(2).double())
