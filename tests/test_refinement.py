"""Voxels refined by learned steps, and optimised further when they are encoded."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from nfldm_ns.autoencoder.checkpoints import load_initial_weights, load_scene_autoencoder
from nfldm_ns.autoencoder.losses import StageOneLossConfig
from nfldm_ns.autoencoder.novel_views import evaluate_novel_views, reconstruct
from nfldm_ns.autoencoder.perceptual import convolution_dtype
from nfldm_ns.autoencoder.refinement import GridRefiner, density_logits, edge_error, refine_grid, unit_gradients
from nfldm_ns.autoencoder.scene_autoencoder import SceneAutoencoder
from nfldm_ns.commands.encode import main as encode
from nfldm_ns.editing.scenes import require_pipeline_of
from nfldm_ns.errors import UserInputError
from nfldm_ns.generated.scene_files import GeneratedScene, renderer_of
from nfldm_ns.latents.voxel_optimiser import VoxelOptimiser, reconstruction_distance
from nfldm_ns.latents.voxel_store import VoxelStore, encode_collection
from nfldm_ns.scenes.collection import SceneCollection
from nfldm_ns.scenes.views import SceneBatch, Views
from nfldm_ns.scenes.voxel_grid import VoxelGrid
from nfldm_ns.training.identity import model_hash
from tests.small_models import random_grid, small_latent_autoencoder, small_pipeline, small_scene_autoencoder

COLOURS = StageOneLossConfig(lpips_mult=0.0, depth_mult=0.1, depth_norm="l1")


@pytest.fixture
def batch(box_room_collection: SceneCollection) -> SceneBatch:
    return box_room_collection.batch(
        [box_room_collection.load_scene(i) for i in box_room_collection.split("train")[:2]]
    )


def refining_autoencoder(**changes) -> SceneAutoencoder:
    """The small stage 1 with a refinement that begins as plain gradient steps."""
    before = small_scene_autoencoder()
    config = {key: value for key, value in before.config.items() if not key.startswith("_")}
    model = SceneAutoencoder(**{**config, "refinement_channels": 8, **changes}).eval()
    load_initial_weights(model, before.state_dict(), "a test")
    return model


class TestSteps:
    def test_softplus_is_the_inverse_of_density_logits(self) -> None:
        density = torch.tensor([1e-3, 0.1, 1.0, 40.0])
        assert torch.allclose(torch.nn.functional.softplus(density_logits(density)), density, rtol=1e-4)

    def test_unit_gradients_have_the_same_size_in_every_scene(self) -> None:
        gradient = torch.randn(2, 3, 4, 4, 4)
        scaled = gradient * torch.tensor([1e-6, 1e3]).view(2, 1, 1, 1, 1)
        assert torch.allclose(unit_gradients(scaled)[0], unit_gradients(gradient)[0], atol=1e-3)
        assert torch.allclose(unit_gradients(scaled)[1], unit_gradients(gradient)[1], atol=1e-3)
        assert torch.equal(unit_gradients(torch.zeros(1, 2)), torch.zeros(1, 2))

    def test_steps_go_down_the_error_before_anything_is_learned(self) -> None:
        grid = random_grid()
        torch.manual_seed(1)
        wanted = grid.features + 0.1 * torch.randn_like(grid.features)

        def error(shown: VoxelGrid) -> torch.Tensor:
            return (shown.features - wanted).square().sum() + shown.background.square().sum()

        refiner = GridRefiner(grid.features.shape[1], 8)
        errors = [float(error(refine_grid(refiner, grid, steps, error))) for steps in (0, 1, 3)]
        assert errors[2] < errors[1] < errors[0]

    def test_what_no_ray_reaches_stays_to_the_bit(self) -> None:
        grid = random_grid()
        grid.density[..., 0] = 0
        refiner = GridRefiner(grid.features.shape[1], 8)
        for parameter in refiner.parameters():
            parameter.data.add_(0.1 * torch.randn_like(parameter))

        def error(shown: VoxelGrid) -> torch.Tensor:  # looks at half of the voxels
            return shown.features[..., 4:].square().sum() + shown.density[..., 4:].square().sum()

        refined = refine_grid(refiner, grid, 2, lambda shown: error(shown) + shown.background.sum())
        assert torch.equal(refined.density[..., :4], grid.density[..., :4])
        assert torch.equal(refined.features[..., :4], grid.features[..., :4])
        assert not torch.equal(refined.features[..., 4:], grid.features[..., 4:])

    def test_edges_count(self) -> None:
        flat, real = torch.full((1, 3, 4, 4), 0.5), torch.zeros(1, 3, 4, 4)
        real[..., ::2] = 1
        assert float(edge_error(flat, real)) == pytest.approx(0.5 + 1.0)
        assert float(edge_error(real, real)) == 0


class TestAutoencoder:
    def test_views_given_are_shown_better(self, batch: SceneBatch) -> None:
        model = refining_autoencoder()

        def error(steps: int) -> float:
            with torch.no_grad():
                rendered = model.render(model.encode(batch.source, steps), batch.source.cameras)
            return float((rendered.rgb - batch.source.images).abs().mean())

        assert error(4) < error(1) < error(0)

    def test_no_step_is_the_encoder_alone(self, batch: SceneBatch) -> None:
        with torch.no_grad():
            refined = refining_autoencoder().encode(batch.source, 0)
            plain = small_scene_autoencoder().encode(batch.source)
        assert torch.allclose(refined.density, plain.density, atol=2e-4)  # softplus has no inverse at 0
        assert torch.equal(refined.features, plain.features)

    def test_scenes_do_not_see_each_other(self, batch: SceneBatch) -> None:
        model = refining_autoencoder()
        with torch.no_grad():
            both, one = model.encode(batch.source), model.encode(batch.source[:1])
        assert torch.allclose(both.features[:1], one.features, atol=1e-5)
        assert torch.allclose(both.density[:1], one.density, rtol=1e-3, atol=1e-5)

    def test_trains_all_its_parameters(self, batch: SceneBatch) -> None:
        model = refining_autoencoder()
        for parameter in model.parameters():
            parameter.data.add_(0.05 * torch.randn_like(parameter))
        grid = model.encode(batch.source)
        rendered = model.render(grid, batch.target.cameras)
        (rendered.rgb - batch.target.images).abs().mean().backward()
        still = [n for n, p in model.refiner.named_parameters() if p.grad is None or float(p.grad.abs().max()) == 0]
        assert not still

    def test_saved_and_loaded(self, batch: SceneBatch, tmp_path) -> None:
        model = refining_autoencoder(refinement_steps=3)
        model.save_pretrained(tmp_path)
        again = load_scene_autoencoder(tmp_path)
        with torch.no_grad():
            assert torch.equal(again.encode(batch.source).features, model.encode(batch.source, 3).features)

    def test_without_a_refinement_steps_are_refused(self, batch: SceneBatch) -> None:
        with pytest.raises(ValueError, match="has no refinement"):
            small_scene_autoencoder().encode(batch.source, 1)

    def test_initial_weights_may_lack_the_refinement_alone(self) -> None:
        state = small_scene_autoencoder().state_dict()
        del state["density_bias"]
        with pytest.raises(UserInputError, match="density_bias is missing"):
            load_initial_weights(refining_autoencoder(), state, "here")


def test_frozen_networks_convolve_in_bfloat16_where_that_is_fast_alone(monkeypatch) -> None:
    for tiles, dtype in ((True, torch.bfloat16), (False, torch.float32)):
        monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda tiles=tiles: tiles)
        assert convolution_dtype("cpu") == dtype
        assert convolution_dtype("cuda") == torch.float32


class TestOptimisedVoxels:
    def optimiser(self, **changes) -> VoxelOptimiser:
        return replace(VoxelOptimiser(None, 6, loss=COLOURS), **changes)

    def test_all_views_of_training_places_are_shown_better(self, box_room_collection, tmp_path) -> None:
        model = small_scene_autoencoder()
        plain = encode_collection(box_room_collection, model, tmp_path / "plain")
        optimised = encode_collection(
            box_room_collection, model, tmp_path / "optimised", optimiser=self.optimiser(), batch_size=2
        )
        ids = plain.splits["train"]
        batch = box_room_collection.batch([box_room_collection.load_scene(i) for i in ids])

        def error(store: VoxelStore) -> float:
            with torch.no_grad():
                rendered = model.render(store.grid(ids), batch.target.cameras)
            return float((rendered.rgb - batch.target.images).abs().mean())

        assert error(optimised) < error(plain)

    def test_target_views_of_other_places_are_never_looked_at(self, box_room_collection, tmp_path) -> None:
        class Watched(VoxelOptimiser):
            def __call__(self, autoencoder, grid, views):
                seen.append([part.shape[1] for part in views])
                return grid

        seen: list[list[int]] = []
        encode_collection(box_room_collection, small_scene_autoencoder(), tmp_path / "v", optimiser=Watched(None, 1))
        scene = box_room_collection.load_scene(box_room_collection.split("train")[0])
        sources, targets = scene.source.shape[0], scene.target.shape[0]
        counts = {split: len(box_room_collection.splits[split]) for split in ("train", "val", "test")}
        assert seen.count([sources, targets]) == counts["train"]
        assert seen.count([sources]) == counts["val"] + counts["test"]

    def test_training_places_may_be_encoded_from_all_their_views(self, box_room_collection, tmp_path) -> None:
        model = small_scene_autoencoder()
        stores = {
            name: encode_collection(box_room_collection, model, tmp_path / name, all_views=name == "all")
            for name in ("all", "source")
        }
        train, test = (box_room_collection.split(split)[0] for split in ("train", "test"))
        scene = box_room_collection.load_scene(train)
        expected = model.encode(Views.stack([Views.cat([scene.source, scene.target])]))
        found = stores["all"].grid([train])
        assert torch.allclose(found.features, expected.features, atol=2e-3)
        assert not torch.allclose(found.features, stores["source"].grid([train]).features, atol=2e-3)
        assert torch.equal(stores["all"].grid([test]).features, stores["source"].grid([test]).features)
        with pytest.raises(UserInputError, match="training views were all encoded: repeat the options"):
            encode_collection(box_room_collection, model, tmp_path / "all")

    def test_interrupted_it_goes_on_to_the_same_voxels(self, box_room_collection, tmp_path) -> None:
        model, options = small_scene_autoencoder(), {"optimiser": self.optimiser(), "batch_size": 2}
        whole = encode_collection(box_room_collection, model, tmp_path / "whole", **options)
        again = encode_collection(box_room_collection, model, tmp_path / "again", **options)
        lost = whole.splits["train"][1]
        again.path(lost).unlink()
        again = encode_collection(box_room_collection, model, tmp_path / "again", **options)
        for name, tensor in whole.load(lost).items():
            assert torch.equal(again.load(lost)[name], tensor)

    def test_another_number_of_steps_is_refused(self, box_room_collection, tmp_path) -> None:
        model = small_scene_autoencoder()
        encode_collection(box_room_collection, model, tmp_path / "v", optimiser=self.optimiser())
        for other in (None, self.optimiser(num_steps=7)):
            with pytest.raises(UserInputError, match="optimised otherwise .*'steps': 6"):
                encode_collection(box_room_collection, model, tmp_path / "v", optimiser=other)

    def test_near_a_stage_2_is_nearer_to_it(self, batch: SceneBatch) -> None:
        model, stage2 = small_scene_autoencoder(), small_latent_autoencoder().requires_grad_(False)
        with torch.no_grad():
            grid = model.encode(batch.source)
        free = self.optimiser(num_steps=20)(model, grid, [batch.source, batch.target])
        near = self.optimiser(num_steps=20, latent_autoencoder=stage2, latent_mult=5.0)
        held = near(model, grid, [batch.source, batch.target])
        own = {"latent_autoencoder": model_hash(stage2), "latent_mult": 5.0}
        assert near.describe() == {"steps": 20, "learning_rate": 0.4, **own}
        assert float(reconstruction_distance(stage2, held)) < float(reconstruction_distance(stage2, free))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--refine-steps", "-1"], "--refine-steps is -1"),
        (["--batch-size", "0"], "--batch-size 0"),
        (["--near", "stage2"], "add --refine-steps"),
    ],
)
def test_options_that_do_not_fit_are_refused(options, message, tmp_path, capsys) -> None:
    with pytest.raises(SystemExit) as stopped:
        encode(["--load-config", str(tmp_path), "--output-dir", str(tmp_path / "out"), *options])
    assert stopped.value.code == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_novel_views_of_refined_voxels_are_judged(batch: SceneBatch) -> None:
    """Refinement takes gradients, which inference mode does not have."""
    model = refining_autoencoder()
    found = evaluate_novel_views(lambda seen: reconstruct(model, seen), [batch], torch.full((3, 32, 32), 0.5), None)
    assert found["psnr"] > 0


def test_encoding_in_inference_mode_says_what_to_use(batch: SceneBatch) -> None:
    model = refining_autoencoder()
    with torch.inference_mode(), pytest.raises(RuntimeError, match="use no_grad"):
        model.encode(batch.source)


def test_scenes_of_a_generator_with_refinement_are_known_by_its_decoder() -> None:
    model = refining_autoencoder()
    scene = GeneratedScene(random_grid(), renderer_of(model), None, {}, {})
    pipeline = small_pipeline()
    pipeline.register_modules(scene_autoencoder=model)
    require_pipeline_of(pipeline, scene)
    with torch.no_grad():
        next(model.decoder.parameters()).add_(1)
    with pytest.raises(UserInputError, match="another decoder"):
        require_pipeline_of(pipeline, scene)
