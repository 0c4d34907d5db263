"""The pipeline as users of diffusers call it: documented idioms, and calls that make no sense."""

from __future__ import annotations

import diffusers
import numpy as np
import pytest
import torch
from accelerate import cpu_offload_with_hook
from diffusers import DiffusionPipeline

from nfldm_ns.autoencoder.checkpoints import weights_name
from nfldm_ns.diffusion.call_checks import check_sampled
from nfldm_ns.diffusion.pipeline import NFLDMPipeline, load_pipeline, save_in_half_precision, scene_generators
from nfldm_ns.errors import UserInputError
from nfldm_ns.models import resolve_model
from nfldm_ns.sampling.scenes import sample_scenes
from tests.small_models import small_pipeline

STEPS = {"num_inference_steps": 2}


@pytest.fixture(scope="module")
def pipeline() -> NFLDMPipeline:
    pipeline = small_pipeline()
    pipeline.set_progress_bar_config(disable=True)
    pipeline.register_to_config(temperatures=(1.0, 0.5, 0.25), default_steps=2, contrasts=(1.0, 1.5, 1.0))
    return pipeline


def same(first: NFLDMPipeline, second: NFLDMPipeline) -> bool:
    made = [p(1, scene_generators(3, 1), **STEPS).grids for p in (first, second)]
    return all(  # up to the rounding of other memory formats
        torch.allclose(getattr(made[0], name), getattr(made[1], name), atol=1e-4) for name in ("density", "features")
    )


@pytest.mark.parametrize(
    ("call", "kind", "message"),
    [
        ({"num_scenes": 0}, ValueError, "num_scenes is 0, but must be at least 1"),
        ({"num_scenes": -2}, ValueError, "num_scenes is -2"),
        ({"num_scenes": 1.5}, TypeError, "num_scenes is 1.5, but must be a whole number"),
        ({"num_scenes": True}, TypeError, "num_scenes is True"),
        ({"num_inference_steps": 2.0}, TypeError, "num_inference_steps is 2.0"),
        ({"num_inference_steps": 0}, ValueError, "num_inference_steps is 0"),
        ({"num_inference_steps": (3, 3)}, ValueError, "one each of g, c, f, not 2"),
        ({"num_inference_steps": (3, 3, 0)}, ValueError, "num_inference_steps is 0"),
        ({"num_inference_steps": "10"}, TypeError, "num_inference_steps is '10'"),
        ({"generator": 3}, TypeError, "manual_seed"),
        ({"generator": [3]}, TypeError, "manual_seed"),
        ({"generator": []}, ValueError, "0 generators were given for 1 scenes"),
        ({"temperatures": (1, 1)}, ValueError, "must be three, of g, c, f, not 2"),
        ({"temperatures": 1.0}, TypeError, "must be three numbers"),
        ({"contrasts": (1, -1, 1)}, ValueError, "contrasts .* finite and at least 0"),
        ({"temperatures": ("a", 1, 1)}, TypeError, "must be numbers"),
        ({"temperatures": (1, -1, 1)}, ValueError, "finite and at least 0"),
        ({"temperatures": (1, float("nan"), 1)}, ValueError, "finite and at least 0"),
    ],
)
def test_calls_that_make_no_sense_are_refused(pipeline, call, kind, message):
    with pytest.raises(kind, match=message):
        pipeline(**call)


def test_numpy_numbers_are_numbers(pipeline):
    assert pipeline(np.int64(1), num_inference_steps=np.int32(2)).grids.batch_size == 1


@pytest.mark.parametrize("name", ["FlowMatchEulerDiscreteScheduler", "EDMEulerScheduler"])
def test_schedulers_of_another_diffusion_are_refused(pipeline, name):
    other = NFLDMPipeline(**pipeline.components)
    other.scheduler = getattr(diffusers, name).from_config(pipeline.scheduler.config)
    with pytest.raises(ValueError, match=f"{name} has .* another kind of diffusion"):
        other(1, **STEPS)


def test_sampling_into_folders_tells_what_the_pipeline_refuses(tmp_path):
    refusing = NFLDMPipeline(**small_pipeline().components)
    refusing.scheduler = diffusers.EDMEulerScheduler()
    with pytest.raises(
        UserInputError, match=r"^mine samples no scenes from seed 4 on: EDMEulerScheduler has noise levels"
    ):
        next(sample_scenes(refusing, tmp_path, 2, seed=4, source="mine"))
    assert not list(tmp_path.iterdir())


def test_schedulers_that_sample_noise_are_refused_and_others_work():
    """With the trained generator: what small models without training predict tells nothing."""
    pipeline = load_pipeline()
    pipeline.set_progress_bar_config(disable=True)
    trained = pipeline.scheduler.config

    def sample(name: str) -> torch.Tensor:
        pipeline.scheduler = getattr(diffusers, name).from_config(trained)
        noise = pipeline.prepare_noise(2, pipeline.global_denoiser, scene_generators(0, 2))
        sampled = pipeline.denoise(pipeline.global_denoiser, noise, 8, scene_generators(0, 2))
        check_sampled(pipeline.scheduler, sampled, "g")
        return sampled

    for name in ("HeunDiscreteScheduler", "KDPM2AncestralDiscreteScheduler"):
        with pytest.raises(ValueError, match=f"{name} ended g at a spread of"):
            sample(name)
    good = ("DPMSolverMultistepScheduler", "DDIMScheduler", "UniPCMultistepScheduler", "EulerDiscreteScheduler")
    for name in (*good, "EulerAncestralDiscreteScheduler", "DEISMultistepScheduler", "DDPMScheduler"):
        assert 0.3 < float(sample(name).std()) < 1.5, name


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_latents_that_are_not_finite_are_refused(pipeline, bad):
    with pytest.raises(ValueError, match="ended c at a spread of (nan|inf)"):
        check_sampled(pipeline.scheduler, torch.tensor([[bad, 0.0]]), "c")


def test_components_make_the_same_pipeline(pipeline):
    again = NFLDMPipeline(**pipeline.components)
    assert tuple(again.config.temperatures) == (1.0, 0.5, 0.25) and again.default_steps == 2
    assert tuple(again.config.contrasts) == (1.0, 1.5, 1.0)
    assert again.coarse_denoiser is pipeline.coarse_denoiser
    assert same(again, pipeline)


def test_steps_by_default_are_the_pipeline_s_own(pipeline, tmp_path, caplog):
    pipeline.save_pretrained(tmp_path)
    again = load_pipeline(tmp_path)
    again.set_progress_bar_config(disable=True)
    assert not caplog.records
    taken = [again(1, generator=torch.Generator().manual_seed(0), **steps).latents.coarse for steps in ({}, STEPS)]
    assert torch.equal(*taken)
    index = tmp_path / "model_index.json"
    index.write_text(index.read_text().replace('"default_steps": 2', '"default_steps": 0'))
    with pytest.raises(UserInputError, match="default_steps"):
        load_pipeline(tmp_path)


def test_from_pipe_makes_the_same_pipeline(pipeline):
    again = NFLDMPipeline.from_pipe(pipeline)
    assert tuple(again.config.temperatures) == (1.0, 0.5, 0.25) and again.default_steps == 2
    assert tuple(again.config.contrasts) == (1.0, 1.5, 1.0)
    assert same(again, pipeline)


@pytest.mark.parametrize("low_cpu_mem_usage", [True, False])
def test_half_precision_files_sample_however_they_are_loaded(pipeline, tmp_path, low_cpu_mem_usage):
    pipeline.save_pretrained(tmp_path / "whole")
    save_in_half_precision(tmp_path / "whole", tmp_path / "half")
    loaded = NFLDMPipeline.from_pretrained(tmp_path / "half", low_cpu_mem_usage=low_cpu_mem_usage)
    loaded.set_progress_bar_config(disable=True)
    assert loaded.dtype == torch.float32
    assert same(loaded, load_pipeline(tmp_path / "half"))


def test_variants_and_shards_load_as_from_pretrained_loads_them(pipeline, tmp_path):
    pipeline.save_pretrained(tmp_path / "variant", variant="fp16")
    assert (tmp_path / "variant" / "coarse_denoiser" / "diffusion_pytorch_model.fp16.safetensors").is_file()
    assert same(load_pipeline(tmp_path / "variant", variant="fp16"), pipeline)
    assert same(NFLDMPipeline.from_pretrained(tmp_path / "variant", variant="fp16"), pipeline)
    with pytest.raises(UserInputError, match="diffusion_pytorch_model.safetensors is missing"):
        load_pipeline(tmp_path / "variant")
    pipeline.save_pretrained(tmp_path / "shards", max_shard_size="5KB")
    folder = tmp_path / "shards" / "coarse_denoiser"
    assert len(list(folder.glob("*.safetensors"))) > 1
    assert same(load_pipeline(tmp_path / "shards"), pipeline)
    next(folder.glob("*-00002-*.safetensors")).unlink()
    with pytest.raises(UserInputError, match="00002.* is missing"):
        load_pipeline(tmp_path / "shards")


def test_names_of_variants_are_those_of_diffusers():
    assert weights_name("diffusion_pytorch_model.safetensors", "fp16") == "diffusion_pytorch_model.fp16.safetensors"
    assert weights_name("diffusion_pytorch_model.safetensors", None) == "diffusion_pytorch_model.safetensors"


def test_precision_is_that_of_the_denoisers(pipeline):
    half = NFLDMPipeline.from_pretrained(resolve_model("vizdoom-rooms")).to(dtype=torch.bfloat16)
    assert {half.global_denoiser.dtype, half.coarse_denoiser.dtype, half.fine_denoiser.dtype} == {torch.bfloat16}
    assert {half.scene_autoencoder.dtype, half.latent_autoencoder.dtype} == {torch.float32}


def test_a_pipeline_is_found_by_its_own_name(pipeline, tmp_path):
    pipeline.save_pretrained(tmp_path)
    assert set(NFLDMPipeline.from_pretrained(tmp_path).components) == set(pipeline.components)
    assert issubclass(NFLDMPipeline, DiffusionPipeline)


def test_offloaded_models_are_moved_before_they_are_used():
    """What `enable_model_cpu_offload` hooks on, with the CPU in the place of a GPU."""
    order = NFLDMPipeline.model_cpu_offload_seq.split("->")
    offloaded = NFLDMPipeline(**small_pipeline().components)
    assert set(order) == {name for name, part in offloaded.components.items() if isinstance(part, torch.nn.Module)}
    moved: list[str] = []
    for name in order:
        model, _ = cpu_offload_with_hook(getattr(offloaded, name), execution_device="cpu")
        before = model._hf_hook.pre_forward

        def noted(module, *args, name=name, before=before, **kwargs):
            moved.append(name) if not moved or moved[-1] != name else None
            return before(module, *args, **kwargs)

        model._hf_hook.pre_forward = noted
    output = offloaded(1, scene_generators(3, 1), **STEPS)
    assert moved == ["global_denoiser", "coarse_denoiser", "latent_autoencoder", "fine_denoiser", "latent_autoencoder"]
    offloaded.scene_autoencoder.render(output.grids, output.cameras)
    assert moved[-1] == "scene_autoencoder", "it is used without its forward"
    expected = small_pipeline()(1, scene_generators(3, 1), **STEPS)
    assert torch.equal(output.grids.density, expected.grids.density)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="offloading models needs a CUDA device")
def test_models_take_turns_on_the_device(pipeline):
    offloaded = NFLDMPipeline(**pipeline.components)
    offloaded.enable_model_cpu_offload()
    assert offloaded(1, scene_generators(3, 1, "cpu"), **STEPS).grids.density.isfinite().all()
    assert offloaded.coarse_denoiser.device.type == "cpu"
