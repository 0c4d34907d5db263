"""Small priors of words and of poses, trained on a collection where no model hub can be reached.

    python benchmarks/hub_priors.py --data DATA --output-dir OUT [--minutes 6 12 10 3 --few IMAGES]
    python benchmarks/refining.py --prior OUT/text --style "a room" --view-prompt-share 1 ...
    python benchmarks/refining.py --prior OUT/views --second-prior OUT/text --second-style "a room" ...
    python benchmarks/refining.py --prior OUT/text --lora OUT/lora --style "a sks room" ...

What `nfldm-refine` does with Stable Diffusion, Zero-1-to-3, LoRA weights and two priors can only be measured with
trained ones. Their classes are trained here from nothing: an auto-encoder of images; a Stable Diffusion pipeline in
`text/`, told a room's brightness, colour and where the view looks; a Zero-1-to-3 in `views/`, which begins from it;
LoRA weights in `lora/` for a few images, if given (by peft, which is not installed with this package). Interrupted
trainings continue. Leaves losses on held-out images in `hub_priors.json` and `hub_priors.md`, and `samples.png`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import StableDiffusionPipeline
from diffusers.utils import is_peft_available
from jaxtyping import Float
from torch import Tensor, nn

from nfldm_ns.autoencoder.perceptual import PerceptualNetwork
from nfldm_ns.errors import UserInputError
from nfldm_ns.metrics.images import psnr
from nfldm_ns.pretrained.weights import load_lpips
from nfldm_ns.refine.images import example_paths, read_square_images
from nfldm_ns.refine.view_prompts import prompts_by_direction
from nfldm_ns.reports.galleries import image_grid, write_png
from nfldm_ns.reports.report import Table
from nfldm_ns.scenes.collection import SceneCollection
from nfldm_ns.scenes.writing import require_writable, write_json
from nfldm_ns.training.draws import BatchShare
from nfldm_ns.training.loop import held_out_split, moving_averages, train
from nfldm_ns.training.run import RunFolder
from nfldm_ns.training.schedule import Schedule, batch_share, new_accelerator
from shared.comparisons import use_threads
from shared.running import run, write_tables
from shared.small_pipelines import (
    ROOM,
    ImageAutoencoder,
    Noise,
    Photos,
    ViewDenoiser,
    WordDenoiser,
    autoencoder_losses,
    encode_images,
    make_autoencoder,
    make_text,
    make_unet,
    save_text,
    save_views,
    view_losses,
    word_losses,
)

PARTS = ("autoencoder", "text", "views", "lora")
RARE = "a sks room"
LORA_RANK, LORA_LAYERS = 4, ["to_q", "to_k", "to_v", "to_out.0"]
HELD_OUT_PLACES, JUDGED_PASSES, SAMPLED, SAMPLING_STEPS, GUIDANCE_SCALE = 16, 12, 6, 30, 4.0
EMA_DECAY = 0.999

Losses = Callable[[int], dict[str, Tensor]]


@dataclass
class Options:
    """Train small pipelines of diffusers' classes on a collection's images."""

    data: Path
    """the collection"""
    output_dir: Path
    """folder for the pipelines, their trainings and the numbers"""
    few: Path | None = None
    """an image, or a folder of images, that LoRA weights are trained for"""
    places: int = 500
    """of the training split, evenly chosen, whose images are learned"""
    minutes: tuple[float, float, float, float] = (6.0, 12.0, 10.0, 3.0)
    """at most, of the auto-encoder, words, views and LoRA weights"""
    steps: int = 100_000
    """at most, of each"""
    batch_size: int = 16
    """images"""
    learning_rate: float = 1e-3
    """of the auto-encoder and of words; of the other two a third"""
    mixed_precision: str | None = None
    """"bf16" for CPUs and GPUs that have it"""
    seed: int = 0
    """of weights, order and noise"""
    threads: int = 2
    """CPU threads"""


class Trainings:
    """Each a run folder of the training loop that priors and denoisers have, too."""

    def __init__(self, options: Options) -> None:
        self.options = options
        self.collection = SceneCollection.open(options.data)
        split = held_out_split(self.collection.splits)
        self.learned = Photos.read(self.collection, "train", options.places)
        self.held_out = Photos.read(self.collection, split, HELD_OUT_PLACES)
        self.numbers: dict[str, Any] = {}

    def schedule(self, part: str, pace: float = 1.0) -> Schedule:
        """Of one of `PARTS`."""
        options = self.options
        return Schedule(
            max_steps=options.steps,
            time_budget_s=60 * options.minutes[PARTS.index(part)],
            batch_size=options.batch_size,
            learning_rate=options.learning_rate * pace,
            warmup_steps=100,
            mixed_precision=options.mixed_precision,
            seed=options.seed,
        )

    def run(
        self, part: str, model: nn.Module, losses: Callable[[nn.Module, BatchShare], Losses], pace: float = 1.0
    ) -> None:
        """Trains a model to the end, and leaves averages of its weights in it."""
        schedule = self.schedule(part, pace)
        folder = self.options.output_dir / "trainings" / part
        accelerator = new_accelerator(schedule, folder)
        ema = moving_averages(model, EMA_DECAY)
        identity = {"part": part, "collection": self.collection.name, "images": len(self.learned.images)}
        identity |= {"seed": schedule.seed, "batch_size": schedule.batch_size}
        kept = RunFolder(folder, identity, accelerator)
        share = batch_share(schedule, accelerator)
        train(kept, model, lambda wrapped: losses(wrapped, share), schedule, accelerator, ema=ema, description=part)
        ema.copy_to(model.parameters())
        model.eval().requires_grad_(False)
        self.numbers[part] = {"steps": kept.steps}

    def judge(self, losses: Losses) -> float:
        """The mean denoising loss over some passes, always the same."""
        with torch.no_grad():
            return sum(float(losses(number)["denoising_loss"]) for number in range(JUDGED_PASSES)) / JUDGED_PASSES

    def judged_share(self) -> BatchShare:
        size = self.options.batch_size
        return BatchShare(self.options.seed + 1, size, size)


def train_autoencoder(trainings: Trainings) -> Any:
    """Images to latents of unit variance and back."""
    vae = make_autoencoder()
    perceptual = PerceptualNetwork(load_lpips("alex"))

    def losses(wrapped: nn.Module, share: BatchShare) -> Losses:
        return autoencoder_losses(wrapped, trainings.learned, share, perceptual)

    trainings.run("autoencoder", ImageAutoencoder(vae), losses)
    vae.register_to_config(scaling_factor=1 / float(encode_images(vae, trainings.learned.images[:1024]).std()))
    shown = decoded(vae, encode_images(vae, trainings.held_out.images))
    trainings.numbers["autoencoder"]["psnr"] = float(psnr(shown, trainings.held_out.images.float() / 255).mean())
    return vae


@torch.no_grad()
def decoded(vae: Any, latents: Float[Tensor, "images channels h w"]) -> Float[Tensor, "images 3 height width"]:
    """Images in [0, 1]."""
    return torch.cat([((vae.decode(part).sample + 1) / 2).clamp(0, 1) for part in latents.split(64)])


def train_text(trainings: Trainings, vae: Any) -> tuple[WordDenoiser, dict[str, Any]]:
    """Stable Diffusion's parts."""
    text = make_text(trainings.options.output_dir / "trainings" / "words")
    denoiser = WordDenoiser(make_unet(), text["text_encoder"])
    learned, held_out = (scaled_latents(vae, photos) for photos in (trainings.learned, trainings.held_out))

    def losses(wrapped: nn.Module, share: BatchShare) -> Losses:
        return word_losses(wrapped, trainings.learned, Noise(learned, share), text["tokenizer"])

    trainings.run("text", denoiser, losses)
    judged = word_losses(denoiser, trainings.held_out, Noise(held_out, trainings.judged_share()), text["tokenizer"])
    trainings.numbers["text"]["held_out_loss"] = trainings.judge(judged)
    save_text(trainings.options.output_dir / "text", vae, denoiser.unet, text)
    return denoiser, text


def scaled_latents(vae: Any, photos: Photos) -> Float[Tensor, "images channels h w"]:
    """In the units of the U-Nets."""
    return encode_images(vae, photos.images) * vae.config.scaling_factor


def train_views(trainings: Trainings, vae: Any, unet: Any) -> ViewDenoiser:
    """Zero-1-to-3's parts."""
    denoiser = ViewDenoiser(unet)
    learned, held_out = (encode_images(vae, photos.images) for photos in (trainings.learned, trainings.held_out))
    factor = vae.config.scaling_factor

    def losses(wrapped: nn.Module, share: BatchShare) -> Losses:
        return view_losses(wrapped, trainings.learned, Noise(factor * learned, share), learned)

    trainings.run("views", denoiser, losses, 1 / 3)
    noise = Noise(factor * held_out, trainings.judged_share())
    judged = view_losses(denoiser, trainings.held_out, noise, held_out)
    trainings.numbers["views"]["held_out_loss"] = trainings.judge(judged)
    save_views(trainings.options.output_dir / "views", vae, denoiser)
    return denoiser


def train_lora(trainings: Trainings, vae: Any, denoiser: WordDenoiser, tokenizer: Any, few: Path) -> None:
    """LoRA weights of the U-Net's attention, for a few images among those of the collection (DreamBooth)."""
    from peft import LoraConfig
    from peft.utils import get_peft_model_state_dict

    images = read_square_images(example_paths(few), trainings.learned.images.shape[-1])
    first = len(trainings.learned.images)
    photos = trainings.learned
    photos = Photos(
        torch.cat([photos.images, images]),
        [*photos.words, *[RARE] * len(images)],
        torch.cat([photos.directions, torch.zeros(len(images), dtype=torch.long)]),
        photos.poses,
        photos.near,
    )
    latents = scaled_latents(vae, photos)
    own = (list(range(first, first + len(images))), RARE)
    torch.manual_seed(trainings.options.seed)
    denoiser.unet.add_adapter(LoraConfig(r=LORA_RANK, lora_alpha=LORA_RANK, target_modules=LORA_LAYERS))

    def losses(wrapped: nn.Module, share: BatchShare) -> Losses:
        return word_losses(wrapped, photos, Noise(latents, share), tokenizer, own)

    judged = word_losses(denoiser, photos, Noise(latents, trainings.judged_share()), tokenizer, own)
    before = trainings.judge(judged)
    trainings.run("lora", denoiser, losses, 1 / 3)
    trainings.numbers["lora"] |= {"few_loss_before": before, "few_loss": trainings.judge(judged)}
    weights = get_peft_model_state_dict(denoiser.unet)
    StableDiffusionPipeline.save_lora_weights(trainings.options.output_dir / "lora", unet_lora_layers=weights)


def sample_words(options: Options) -> dict[str, Tensor]:
    """What the pipeline makes of words, by diffusers' own sampling."""
    pipeline = StableDiffusionPipeline.from_pretrained(options.output_dir / "text", safety_checker=None)
    pipeline.set_progress_bar_config(disable=True)
    columns = {}
    for words in (ROOM, "a dark brown room", "a bright grey room", prompts_by_direction(ROOM)[-1]):
        made = pipeline(
            [words] * SAMPLED,
            num_inference_steps=SAMPLING_STEPS,
            guidance_scale=GUIDANCE_SCALE,
            generator=[torch.Generator().manual_seed(options.seed + i) for i in range(SAMPLED)],
            output_type="pt",
        )
        columns[words] = made.images.float()
    return columns


def main(options: Options) -> None:
    """Trains all parts one after another, and looks at them."""
    use_threads(options.threads)
    if options.few is not None and not is_peft_available():
        raise UserInputError("LoRA weights are trained by peft, which is not installed: 'pip install peft'.")
    require_writable(options.output_dir)
    torch.manual_seed(options.seed)
    trainings = Trainings(options)
    vae = train_autoencoder(trainings)
    denoiser, text = train_text(trainings, vae)
    train_views(trainings, vae, denoiser.unet)
    if options.few is not None:
        train_lora(trainings, vae, denoiser, text["tokenizer"], options.few)
    images = trainings.held_out.images[:: len(trainings.held_out.images) // SAMPLED][:SAMPLED]
    columns = {"held-out image": images.float() / 255, "decoded": decoded(vae, encode_images(vae, images))}
    write_png(options.output_dir / "samples.png", image_grid({**columns, **sample_words(options)}))
    write_json(options.output_dir / "hub_priors.json", trainings.numbers)
    rows = [
        [part, found["steps"], *(found.get(name) for name in ("psnr", "held_out_loss", "few_loss_before", "few_loss"))]
        for part, found in trainings.numbers.items()
    ]
    header = ["", "steps", "PSNR (dB)", "loss, held out", "half on the few, before", "after"]
    write_tables(options.output_dir / "hub_priors.md", [Table(header, rows)])


if __name__ == "__main__":
    run(main, Options, __doc__)
