"""`nfldm-train-latent-ae`: stage 2."""

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import tyro

from nfldm_ns.errors import UserInputError, exit_on_bad_input
from nfldm_ns.training.options import ScheduleOptions, is_first_process

if TYPE_CHECKING:
    from torch import nn

    from nfldm_ns.latents.latent_autoencoder import LatentAutoencoder
    from nfldm_ns.latents.voxel_store import VoxelStore


@dataclass
class TrainLatentAutoencoder:
    """Train the latent auto-encoder on encoded scenes; an interrupted run continues where it stopped.

    The same command trains on a CPU or one GPU; on several GPUs or machines start it with `accelerate launch -m
    nfldm_ns.commands.train_latent_ae`.
    """

    voxels: Path
    """Encoded scenes, from nfldm-encode."""
    output_dir: Path
    """Folder of the run; the model goes to its latent_autoencoder folder."""
    preset: Literal["tiny", "rooms", "rooms128", "base", "paper", "streets-tiny", "streets", "streets-paper"] = "tiny"
    quantize: bool = True
    """Vector-quantise c and f, as the paper does."""
    use_fine: bool = True
    """Off for the paper's ablation without f."""
    use_global: bool = True
    """Off for the paper's ablation without g; all scenes then have one mean background."""
    quarter_turns: bool | None = None
    """Turn scenes by random multiples of 90 degrees."""
    initial_weights: Path | None = None
    """The run of a trained latent auto-encoder to begin from, a pipeline folder, or the name of a generator that comes
    with this package; sizes, latents and codebooks are then its own."""
    decoder_only: bool = False
    """With `--initial-weights`: leave latents and codes as they are; denoisers that were trained on them still fit."""
    lpips_mult: float | None = None
    """Weight of the perceptual distance of rendered images."""
    equivariance_mult: float | None = None
    """Weight of the error of what turned, mirrored or halved c and f decode to (EQ-VAE), so that latents change with
    their scenes; off by default."""
    evaluate: bool = True
    """At the end render novel views of held-out scenes, before and after the latents."""
    schedule: tyro.conf.OmitArgPrefixes[ScheduleOptions] = field(default_factory=ScheduleOptions)

    def run(self) -> None:
        from nfldm_ns.latents.training import public_config, train_latent_autoencoder
        from nfldm_ns.latents.voxel_store import VoxelStore
        from nfldm_ns.method_configs.latent_presets import LATENT_PRESETS
        from nfldm_ns.pretrained.weights import load_lpips

        self._require_own_sizes()
        store = VoxelStore.open(self.voxels)
        preset = LATENT_PRESETS[self.preset]
        given = self.schedule.given()
        training = replace(preset.training, schedule=replace(preset.training.schedule, **given))
        if self.quarter_turns is not None:
            training = replace(training, quarter_turns=self.quarter_turns)
        weights = {name: getattr(self, name) for name in ("lpips_mult", "equivariance_mult")}
        given_weights = {name: value for name, value in weights.items() if value is not None}
        training = replace(training, losses=replace(training.losses, **given_weights))
        training = replace(training, decoder_only=self.decoder_only)
        initial = self._initial()
        lpips = load_lpips("vgg") if training.losses.lpips_mult else None
        model_config = {
            **preset.model,
            "quantize": self.quantize,
            "use_fine": self.use_fine,
            "use_global": self.use_global,
        }
        if initial is not None:
            model_config = public_config(initial)
        model = train_latent_autoencoder(store, self.output_dir, model_config, training, lpips=lpips, initial=initial)
        if not is_first_process():
            return
        print(f"The latent auto-encoder is in {self.output_dir / 'latent_autoencoder'}")
        if self.evaluate and store.splits["test"]:
            self.report(store, model, lpips)

    def _initial(self) -> "LatentAutoencoder | None":
        from nfldm_ns.latents.latent_autoencoder import load_latent_autoencoder
        from nfldm_ns.models import resolve_model

        return load_latent_autoencoder(resolve_model(self.initial_weights)) if self.initial_weights else None

    def _require_own_sizes(self) -> None:
        off = [name for name in ("quantize", "use_fine", "use_global") if not getattr(self, name)]
        if self.initial_weights is not None and off:
            raise UserInputError(
                f"--no-{off[0].replace('_', '-')} does not go with --initial-weights, whose sizes and latents stay: "
                "leave one of them out."
            )

    def report(self, store: "VoxelStore", model: "LatentAutoencoder", lpips: "nn.Module | None") -> None:
        from nfldm_ns.latents.round_trip import evaluate_round_trip
        from nfldm_ns.scenes.writing import write_json

        metrics = evaluate_round_trip(
            store.load_autoencoder(), model, store, store.load_collection(), store.splits["test"], lpips=lpips
        )
        write_json(self.output_dir / "evaluation.json", metrics)
        print(f"Novel views of {len(store.splits['test'])} held-out scenes:")
        for name, values in metrics.items():
            print(f"  {name:15s} " + "  ".join(f"{key} {value:.3f}" for key, value in values.items()))


def main(args: list[str] | None = None) -> None:
    """Entry point."""
    command = tyro.cli(TrainLatentAutoencoder, prog="nfldm-train-latent-ae", args=args)
    with exit_on_bad_input():
        command.run()


if __name__ == "__main__":
    main()
