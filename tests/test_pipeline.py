"""The trained generator as one folder, and the commands of stages 2 and 3."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys

import pytest
import torch
from diffusers import DDIMScheduler, DiffusionPipeline
from diffusers.callbacks import PipelineCallback
from diffusers.utils import PushToHubMixin
from safetensors.torch import load_file

from nfldm_ns.commands import encode, sample, train_diffusion, train_latent_ae
from nfldm_ns.diffusion.inpainting import Inpainting
from nfldm_ns.diffusion.pipeline import NFLDMPipeline, load_pipeline, save_in_half_precision, scene_generators
from nfldm_ns.errors import UserInputError
from nfldm_ns.sampling.scenes import sample_scenes
from tests.small_models import small_latent_autoencoder, small_pipeline, small_scene_autoencoder
from tests.synthetic import make_box_room_collection


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pipeline") / "rooms"
    small_pipeline().save_pretrained(folder)
    return folder


@pytest.fixture
def broken(folder, tmp_path):
    """A copy to break."""
    return shutil.copytree(folder, tmp_path / "pipeline")


def test_saved_and_loaded_pipeline_samples_the_same(folder):
    expected = small_pipeline()(2, scene_generators(5, 2), num_inference_steps=3)
    for pipeline in (load_pipeline(folder), NFLDMPipeline.from_pretrained(folder)):
        output = pipeline(2, scene_generators(5, 2), num_inference_steps=3)
        assert torch.equal(output.grids.density, expected.grids.density)
        assert torch.equal(output.grids.features, expected.grids.features)
        assert torch.equal(output.grids.background, expected.grids.background)
        assert torch.equal(output.cameras.camera_to_worlds, expected.cameras.camera_to_worlds)
    assert output.grids.density.shape == (2, 1, 4, 16, 16) and output.cameras.shape == (2, 2)
    assert output.grids.background.shape == (2, 2, 4)
    assert not torch.allclose(output.grids.background[0], output.grids.background[1]), "it comes from g"
    assert bool((output.grids.density >= 0).all())


@pytest.mark.parametrize(("use_fine", "use_global"), [(False, False), (True, False), (False, True)])
def test_pipeline_of_fewer_latents_still_samples_cameras(tmp_path, use_fine, use_global):
    expected = small_pipeline(use_fine=use_fine, use_global=use_global)
    expected.save_pretrained(tmp_path)
    assert (tmp_path / "fine_denoiser").exists() == use_fine
    output = expected(2, scene_generators(5, 2), num_inference_steps=2)
    assert output.latents.global_latent.shape == (2, 8 * use_global)
    assert output.latents.fine.shape == (2, 4 * use_fine, 16, 16)
    assert output.cameras.shape == (2, 2)
    assert not torch.allclose(output.cameras.camera_to_worlds[0], output.cameras.camera_to_worlds[1])
    for pipeline in (load_pipeline(tmp_path), NFLDMPipeline.from_pretrained(tmp_path)):
        again = pipeline(2, scene_generators(5, 2), num_inference_steps=2)
        assert torch.equal(again.grids.features, output.grids.features)
        assert torch.equal(again.cameras.camera_to_worlds, output.cameras.camera_to_worlds)
    half = expected.to(torch.bfloat16)
    assert half.dtype == torch.bfloat16 and half(1, num_inference_steps=1).grids.density.isfinite().all()
    other = small_latent_autoencoder(use_fine=not use_fine, use_global=use_global)
    other.save_pretrained(tmp_path / "latent_autoencoder")
    with pytest.raises(UserInputError, match="shape of f of fine_denoiser"):
        load_pipeline(tmp_path)


def test_folder_loads_in_a_fresh_process_without_remote_code(folder):
    code = f"""
from nfldm_ns.diffusion.pipeline import NFLDMPipeline
pipeline = NFLDMPipeline.from_pretrained({str(folder)!r})
print(type(pipeline.coarse_denoiser).__module__)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr
    assert "nfldm_ns.diffusion.denoisers" in done.stdout


def test_a_scene_depends_on_its_own_seed_only():
    pipeline = small_pipeline()
    together = pipeline(3, scene_generators(10, 3), num_inference_steps=3)
    alone = pipeline(1, scene_generators(12, 1), num_inference_steps=3)
    torch.testing.assert_close(together.latents.coarse[2:], alone.latents.coarse, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(together.latents.global_latent[2:], alone.latents.global_latent, atol=1e-4, rtol=1e-4)
    assert not torch.allclose(together.latents.coarse[:1], alone.latents.coarse)


def test_latents_only_and_other_schedulers():
    pipeline = small_pipeline()
    pipeline.scheduler = DDIMScheduler.from_config(pipeline.scheduler.config)
    output = pipeline(1, torch.Generator().manual_seed(0), num_inference_steps=3, output_type="latent")
    assert output.grids is None and output.latents.fine.shape == (1, 4, 16, 16)
    with pytest.raises(ValueError, match="output_type"):
        pipeline(1, output_type="pil")
    with pytest.raises(ValueError, match="2 generators"):
        pipeline(3, scene_generators(0, 2))


def test_callback_sees_every_step_and_may_change_latents():
    seen = []

    def callback(pipeline, step, timestep, values):
        seen.append((pipeline.stage, step))
        return {"latents": torch.zeros_like(values["latents"])} if step == 2 else {}

    output = small_pipeline()(1, scene_generators(0, 1), num_inference_steps=3, callback_on_step_end=callback)
    assert seen == [(stage, step) for stage in ("global", "coarse", "fine") for step in range(3)]
    assert float(output.latents.fine.abs().max()) == 0, "the untrained denoisers' statistics are zero and one"


def test_callback_gets_what_it_asks_for_as_in_diffusers():
    seen = []

    class Watcher(PipelineCallback):
        @property
        def tensor_inputs(self):
            return ["latents", "scene_code"]

        def callback_fn(self, pipeline, step, timestep, kwargs):
            seen.append(
                (pipeline.stage, pipeline.num_timesteps, timestep, sorted(kwargs), kwargs["scene_code"] is None)
            )
            return kwargs

    pipeline = small_pipeline()
    pipeline(
        1, num_inference_steps=(1, 2, 1), callback_on_step_end=Watcher(cutoff_step_ratio=None, cutoff_step_index=0)
    )
    assert [entry[:2] for entry in seen] == [("global", 1), ("coarse", 2), ("coarse", 2), ("fine", 1)]
    assert all(entry[3] == ["latents", "scene_code"] for entry in seen)
    assert [entry[4] for entry in seen] == [True, False, False, False]
    assert [entry[2] for entry in seen if entry[0] == "coarse"] == [999, 499]
    with pytest.raises(ValueError, match="callback_on_step_end_tensor_inputs"):
        pipeline(1, callback_on_step_end=print, callback_on_step_end_tensor_inputs=["fine"])
    for steps in (0, (1, 2), (1, 0, 2)):
        with pytest.raises(ValueError, match="num_inference_steps"):
            pipeline(1, num_inference_steps=steps)


def test_a_tuple_is_what_the_output_holds():
    pipeline = small_pipeline()
    pipeline.set_progress_bar_config(disable=True)
    grids, latents, cameras = pipeline(1, scene_generators(3, 1), num_inference_steps=2, return_dict=False)
    output = pipeline(1, scene_generators(3, 1), num_inference_steps=2)
    assert torch.equal(grids.density, output.grids.density) and torch.equal(latents.fine, output.latents.fine)
    assert torch.equal(cameras.camera_to_worlds, output.cameras.camera_to_worlds)


def test_progress_bars_are_diffusers_own(capsys):
    pipeline = small_pipeline()
    pipeline(1, num_inference_steps=2)
    assert capsys.readouterr().err.count("\n") == 3, "one bar per latent"
    pipeline.set_progress_bar_config(disable=True)
    pipeline(1, num_inference_steps=2)
    assert capsys.readouterr().err == ""


def guided_pipeline():
    """A pipeline whose denoisers know scenes without their code, with weights that are not zero."""
    torch.manual_seed(0)
    pipeline = small_pipeline()
    for name in ("coarse_denoiser", "fine_denoiser"):
        denoiser = getattr(pipeline, name)
        denoiser.register_to_config(condition_dropout=0.1)
        torch.nn.init.normal_(denoiser.unet.conv_out.weight, std=0.1)
    return pipeline


def test_guidance_goes_away_from_what_the_denoisers_say_without_the_code():
    pipeline = guided_pipeline()
    plain, none, same = (
        pipeline(1, scene_generators(0, 1), num_inference_steps=1, guidance_scale=scale).latents.coarse
        for scale in (1.0, 0.0, 1.0)
    )
    strong = pipeline(1, scene_generators(0, 1), num_inference_steps=1, guidance_scale=3.0).latents.coarse
    assert torch.equal(plain, same) and not torch.allclose(plain, none)
    torch.testing.assert_close(strong, none + 3 * (plain - none), atol=1e-4, rtol=1e-3)
    with pytest.raises(ValueError, match="--condition-dropout"):
        small_pipeline()(1, guidance_scale=2.0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_denoisers_in_half_precision_give_scenes_close_to_those_in_single(dtype, tmp_path):
    pipeline = guided_pipeline()
    expected = pipeline(2, num_inference_steps=3, temperatures=(0, 0, 0))
    pipeline.save_pretrained(tmp_path)
    for half in (pipeline.to(dtype), NFLDMPipeline.from_pretrained(tmp_path, torch_dtype=dtype)):
        assert half.dtype == half.coarse_denoiser.dtype == dtype and half.latent_autoencoder.dtype == torch.float32
        output = half(2, num_inference_steps=3, temperatures=(0, 0, 0))
        assert all(value.isfinite().all() for value in (output.grids.density, output.grids.features))
        torch.testing.assert_close(output.latents.coarse, expected.latents.coarse, atol=0.1, rtol=0.1)
        rendered = half.scene_autoencoder.render(output.grids, output.cameras).rgb
        assert bool(rendered.isfinite().all())
    single = pipeline.to(torch.float32, "cpu")
    assert single.dtype == torch.float32


@pytest.mark.gpu
def test_what_is_saved_on_a_gpu_loads_on_a_cpu_and_the_other_way_round(folder, tmp_path):
    on_gpu = load_pipeline(folder).to("cuda", torch.bfloat16)
    output = on_gpu(1, scene_generators(0, 1), num_inference_steps=2)
    assert output.grids.density.is_cuda and bool(output.grids.density.isfinite().all())
    on_gpu.to(torch.float32).save_pretrained(tmp_path)
    again = load_pipeline(tmp_path)
    assert again.device.type == "cpu"
    for name in ("fine_denoiser", "latent_autoencoder", "scene_autoencoder"):
        ours, theirs = getattr(again, name).state_dict(), getattr(on_gpu, name).state_dict()
        assert all(torch.equal(value, theirs[key].cpu()) for key, value in ours.items())


def test_the_hub_is_reached_by_the_mixin_and_only_when_asked(tmp_path, monkeypatch):
    assert issubclass(NFLDMPipeline, PushToHubMixin) and callable(NFLDMPipeline.push_to_hub)
    monkeypatch.setattr(NFLDMPipeline, "_upload_folder", lambda *args, **kwargs: pytest.fail("no upload was asked for"))
    small_pipeline().save_pretrained(tmp_path, push_to_hub=False)
    assert (tmp_path / "model_index.json").is_file()


def test_clip_limits_the_latents():
    output = small_pipeline()(1, scene_generators(0, 1), num_inference_steps=3, clip=0.5)
    assert float(output.latents.fine.abs().max()) <= 0.5


def test_temperatures_scale_the_noise_and_belong_to_the_pipeline(tmp_path):
    pipeline = small_pipeline()
    cold = pipeline(2, scene_generators(0, 2), num_inference_steps=3, temperatures=(1.0, 1.0, 0.0))
    warm = pipeline(2, scene_generators(0, 2), num_inference_steps=3)
    assert torch.equal(cold.latents.coarse, warm.latents.coarse)
    assert float(cold.latents.fine.std()) < float(warm.latents.fine.std())
    pipeline.register_to_config(temperatures=(1.0, 1.0, 0.0))
    pipeline.save_pretrained(tmp_path)
    again = load_pipeline(tmp_path)(2, scene_generators(0, 2), num_inference_steps=3)
    assert torch.equal(again.latents.fine, cold.latents.fine)


def test_contrasts_spread_latents_about_their_mean_and_belong_to_the_pipeline(tmp_path):
    pipeline = small_pipeline()

    def coarse(model=pipeline, **changes):
        return model(1, scene_generators(0, 1), num_inference_steps=3, **changes).latents.coarse

    plain, mean = (
        coarse(),
        pipeline.coarse_denoiser.latent.mean.unflatten(0, pipeline.latent_autoencoder.coarse_shape[:2]),
    )
    twice = coarse(contrasts=(1.0, 2.0, 1.0))
    torch.testing.assert_close(twice - mean, 2 * (plain - mean))
    pipeline.register_to_config(contrasts=(1.0, 2.0, 1.0))
    pipeline.save_pretrained(tmp_path)
    again = load_pipeline(tmp_path)
    assert torch.equal(coarse(again), twice)
    # They belong to the pipeline's own temperatures.
    warm, own = (1.0, 0.5, 1.0), tuple(pipeline.config.temperatures)
    assert torch.equal(coarse(temperatures=own), twice)
    assert torch.equal(coarse(temperatures=warm), coarse(temperatures=warm, contrasts=(1.0, 1.0, 1.0)))


def test_what_is_begun_from_or_observed_has_its_own_contrast():
    pipeline = small_pipeline()
    output = pipeline(1, scene_generators(0, 1), num_inference_steps=4)
    code = torch.zeros(1, pipeline.global_denoiser.sample_shape[0])
    regions = [torch.ones(part.shape[-2:], dtype=torch.bool) for part in (output.latents.coarse, output.latents.fine)]

    def coarse(strength: float, contrast: float):
        begun = Inpainting(output.latents, *regions, strength=strength, resamplings=1, jump_length=4)
        call = {"num_inference_steps": 4, "scene_code": code, "inpainting": begun}
        return pipeline(1, scene_generators(1, 1), **call, contrasts=(1.0, contrast, 1.0)).latents.coarse

    assert torch.equal(coarse(0.5, 2.0), coarse(0.5, 1.0))
    assert not torch.equal(coarse(1.0, 2.0), coarse(1.0, 1.0))


# Broken folders


def test_missing_folder_and_missing_components(broken, tmp_path):
    with pytest.raises(UserInputError, match="model_index.json"):
        load_pipeline(tmp_path / "nowhere")
    shutil.rmtree(broken / "coarse_denoiser")
    with pytest.raises(UserInputError, match="lacks component coarse_denoiser"):
        load_pipeline(broken)


@pytest.mark.parametrize(
    "component", ["scene_autoencoder", "latent_autoencoder", "global_denoiser", "coarse_denoiser", "fine_denoiser"]
)
def test_truncated_or_missing_weights(broken, component):
    weights = broken / component / "diffusion_pytorch_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(UserInputError, match=component):
        load_pipeline(broken)
    weights.unlink()
    with pytest.raises(UserInputError, match=component):
        load_pipeline(broken)


def test_truncated_json(broken):
    for path in (broken / "fine_denoiser" / "config.json", broken / "scheduler" / "scheduler_config.json"):
        whole = path.read_text()
        path.write_text(whole[: len(whole) // 2])
        with pytest.raises(UserInputError, match=path.parent.name if path.name == "config.json" else "scheduler"):
            load_pipeline(broken)
        path.write_text(whole)
    (broken / "scheduler" / "scheduler_config.json").unlink()
    with pytest.raises(UserInputError, match="scheduler_config.json"):
        load_pipeline(broken)
    (broken / "model_index.json").write_text("{")
    with pytest.raises(UserInputError, match="model_index.json"):
        load_pipeline(broken)


def test_components_of_different_sizes(broken):
    small_latent_autoencoder(fine_channels=8).save_pretrained(broken / "latent_autoencoder")
    with pytest.raises(UserInputError, match="shape of f of fine_denoiser is .4, 16, 16., but that of latent_auto"):
        load_pipeline(broken)
    small_latent_autoencoder(background_channels=3).save_pretrained(broken / "latent_autoencoder")
    with pytest.raises(UserInputError, match="background channels of latent_autoencoder is 3, but that of scene_"):
        load_pipeline(broken)


def test_weights_of_another_size_than_the_config(broken):
    config = json.loads((broken / "global_denoiser" / "config.json").read_text())
    config["width"] = 64
    (broken / "global_denoiser" / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserInputError, match="global_denoiser"):
        load_pipeline(broken)


def test_another_kind_of_pipeline(broken):
    index = json.loads((broken / "model_index.json").read_text())
    index["_class_name"] = "StableDiffusionPipeline"
    (broken / "model_index.json").write_text(json.dumps(index))
    with pytest.raises(UserInputError, match="another kind of pipeline"):
        load_pipeline(broken)


def test_half_precision_on_disk_is_single_precision_in_use(folder, tmp_path):
    save_in_half_precision(folder, tmp_path / "half")
    assert str(tmp_path) not in (tmp_path / "half" / "model_index.json").read_text(), "not where it was made"
    whole, half = load_pipeline(folder), load_pipeline(tmp_path / "half")
    for name in ("scene_autoencoder", "latent_autoencoder", "global_denoiser", "coarse_denoiser", "fine_denoiser"):
        expected, found = getattr(whole, name).state_dict(), getattr(half, name).state_dict()
        parameters = {key for key, _ in getattr(whole, name).named_parameters()}
        for key, value in expected.items():
            assert found[key].dtype == value.dtype
            assert torch.equal(found[key], value.half().float() if key in parameters else value)


def test_pipeline_is_a_diffusers_pipeline(folder):
    assert issubclass(NFLDMPipeline, DiffusionPipeline)
    index = json.loads((folder / "model_index.json").read_text())
    assert index["coarse_denoiser"] == ["nfldm_ns.diffusion.denoisers", "CoarseDenoiser"]


# Commands


def test_same_seed_gives_the_same_files_whatever_the_number(folder, tmp_path):
    for name, num_scenes, seed in (("a", 2, 7), ("b", 1, 8)):
        command = f"--num-scenes {num_scenes} --seed {seed} --num-inference-steps 2 --device cpu --output-dir"
        sample.main([str(folder), *command.split(), str(tmp_path / name)])
    assert sorted(p.name for p in (tmp_path / "a").iterdir()) == [
        "contact_sheet.png",
        "scene_000007",
        "scene_000008",
    ]
    a, b = (tmp_path / name / "scene_000008" for name in ("a", "b"))
    first, second = (load_file(scene / "scene.safetensors") for scene in (a, b))
    assert all(torch.equal(value, second[name]) for name, value in first.items())
    assert (a / "scene.json").read_text() == (b / "scene.json").read_text()
    assert json.loads((a / "scene.json").read_text())["provenance"]["seed"] == 8
    assert (a / "transforms.json").read_text() == (b / "transforms.json").read_text()


def test_sampling_in_batches_writes_every_scene(tmp_path):
    folders = list(sample_scenes(small_pipeline(), tmp_path, 3, seed=1, num_inference_steps=2, batch_size=2))
    assert [folder.name for folder in folders] == ["scene_000001", "scene_000002", "scene_000003"]


def expect_one_sentence(main, args, capsys, *words):
    with pytest.raises(SystemExit) as exit_info:
        main(args)
    error = capsys.readouterr().err
    assert exit_info.value.code == 2 and error.startswith("error: ") and "Traceback" not in error
    assert all(word in error for word in words), error


def test_commands_explain_bad_input(folder, tmp_path, capsys):
    nowhere = str(tmp_path / "nowhere")
    expect_one_sentence(sample.main, [nowhere], capsys, "model_index.json")
    expect_one_sentence(sample.main, [str(folder), "--num-scenes", "0"], capsys, "at least 1")
    expect_one_sentence(encode.main, ["--load-config", nowhere, "--output-dir", str(tmp_path / "v")], capsys, "nowhere")
    small_scene_autoencoder().save_pretrained(tmp_path / "scene_autoencoder")
    arguments = ["--load-config", str(tmp_path / "scene_autoencoder"), "--output-dir", str(tmp_path / "v")]
    expect_one_sentence(encode.main, arguments, capsys, "--data")
    expect_one_sentence(encode.main, [*arguments, "--data", nowhere], capsys, "no data folder")
    arguments = ["--voxels", nowhere, "--output-dir", str(tmp_path / "run")]
    expect_one_sentence(train_latent_ae.main, arguments, capsys, "nfldm-encode")
    arguments = ["all", *arguments, "--latent-autoencoder", nowhere]
    expect_one_sentence(train_diffusion.main, arguments, capsys, "nfldm-encode")
    assert not (tmp_path / "run").exists() and not (tmp_path / "v").exists(), "nothing half-written"


@pytest.mark.slow
def test_commands_from_stage_1_to_samples_at_the_tiny_preset(tmp_path):
    """Untrained stage 1, a few steps of everything else, through the commands as a user runs them."""
    torch.manual_seed(0)
    collection = make_box_room_collection(tmp_path / "rooms", num_train=3, num_test=1)
    small_scene_autoencoder().save_pretrained(tmp_path / "scene_autoencoder")
    paths = {name: str(tmp_path / name) for name in ("voxels", "stage2", "stage3", "generated")}
    stage1 = ["--load-config", str(tmp_path / "scene_autoencoder")]
    encode.main([*stage1, "--output-dir", paths["voxels"], "--data", str(collection.root)])
    train_latent_ae.main(["--voxels", paths["voxels"], "--output-dir", paths["stage2"], "--max-steps", "3"])
    evaluation = json.loads((tmp_path / "stage2" / "evaluation.json").read_text())
    assert set(evaluation) >= {"stage1", "stage2", "without_fine"}
    common = ["--voxels", paths["voxels"], "--latent-autoencoder", paths["stage2"], "--output-dir", paths["stage3"]]
    train_diffusion.main(["all", *common, "--max-steps", "2", "--batch-size", "2"])
    command = "--num-scenes 1 --num-inference-steps 2 --output-dir"
    sample.main([str(tmp_path / "stage3" / "pipeline"), *command.split(), paths["generated"]])
    assert (tmp_path / "generated" / "scene_000000" / "config.yml").is_file()
