"""Stage 2: the latent auto-encoder (paper, Sec. 3.2 and Table 8)."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
import torch.nn.functional as F
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from diffusers.utils.accelerate_utils import apply_forward_hook
from diffusers.utils.torch_utils import randn_tensor
from jaxtyping import Float, Int
from torch import Tensor, nn

from nfldm_ns.autoencoder.checkpoints import WEIGHTS, read_safetensors
from nfldm_ns.autoencoder.model_configs import build_model
from nfldm_ns.errors import UserInputError
from nfldm_ns.latents.background_path import BackgroundPath
from nfldm_ns.latents.blocks import (
    ConditionalGroupNorm,
    DownsamplingEncoder,
    MidBlock,
    ResBlock,
    Upsample,
    pack_channels_last,
)
from nfldm_ns.latents.equivariance import PlaneChange, change_items, equal_sizes
from nfldm_ns.latents.quantizer import VectorQuantizer
from nfldm_ns.latents.scene_latents import SceneLatents
from nfldm_ns.latents.voxel_code import VoxelCode, linear_code
from nfldm_ns.scenes.collection import read_json
from nfldm_ns.scenes.voxel_grid import VoxelGrid

MODEL_FOLDER = "latent_autoencoder"
CODEBOOK_BATCHES = 4
MAX_FIT_VALUES = 1 << 25  # of the samples that linear codes are fitted to
Box = tuple[tuple[float, float, float], tuple[float, float, float]]


@dataclass
class LatentReconstruction:
    """What one training pass yields.

    Attributes:
        target: normalised voxels, `[B, (1 + C) * Z, Y, X]`, with the features of empty voxels beside occupied ones.
        reconstruction: the decoder's estimate of them.
        background_target: the normalised code of what lies beyond the box, `[B, K, 4]`.
        background: the estimate of it that was read from g.
        grid: the estimates as voxels.
        latents: g (sampled), c and f before quantisation.
        kl: mean KL divergence of g from the unit Gaussian, in nats per scene.
        commitment: squared distance of c and f from their codes.
        code_counts: how often each code occurred, by codebook (`coarse`, `fine`); empty without quantisation.
        changed: estimates from changed latents, a batch for each group of `equal_sizes`; empty without changes.
    """

    target: Float[Tensor, "batch folded y x"]
    reconstruction: Float[Tensor, "batch folded y x"]
    background_target: Float[Tensor, "batch codes 4"]
    background: Float[Tensor, "batch codes 4"]
    grid: VoxelGrid
    latents: SceneLatents
    kl: Float[Tensor, ""]
    commitment: Float[Tensor, ""]
    code_counts: dict[str, Int[Tensor, " codes"]]
    changed: list[Float[Tensor, "items folded changed_y changed_x"]] = field(default_factory=list)


class LatentAutoencoder(ModelMixin, ConfigMixin):
    """V to a global, a coarse and a fine latent, and back.

    Density and features are concatenated and z is folded into channels, so that all networks are 2D CNNs over the
    bird's-eye-view plane. Three encoders give g (a vector, small KL penalty), c (3D, vector-quantised) and f (2D at
    full horizontal size, vector-quantised). The decoder is Table 8's: c -> conv -> MidBlock-CGN -> ResBlocks-CGN ->
    (ResBlocks-CGN, upsample)s -> concatenate f -> conv -> split z, where CGN is group norm with scale and shift from
    g.

    At small sizes V is hard to compress, so two things are added to the paper's. c and f also have linear paths into
    and out of the networks (`linear_paths`): a code of the columns of each block for c, and a code of what c leaves
    over for f. `fit` sets them to the best linear codes, which training then improves on. And ResBlocks may follow the
    concatenation of f (`fusion_blocks`).

    g also carries the scene's code of what lies beyond the box (`VoxelGrid.background`), see `BackgroundPath`.

    A latent is split into groups of `*_code_dim` channels, each of which is one code of the shared codebook; the
    paper's four channels are one group.

    Diffusion models the latents before quantisation; `decode` quantises them first.

    For the paper's ablation of the hierarchy f and g can be left out (`use_fine`, `use_global`). They are then latents
    without channels: nothing is concatenated, group norms have a learned scale and shift of their own, and as nothing
    carries the background's code, every scene has the mean background of the training scenes.

    Args:
        grid_shape: voxels (Z, Y, X); Y and X are multiples of the downsampling.
        feature_channels: C of the voxels.
        background_channels: K of the code of what lies beyond the box.
        aabb: corners of the box in metres.
        global_dim: size of g.
        coarse_channels, coarse_height: c is `[coarse_channels, coarse_height, Y / down, X / down]`.
        fine_channels: f is `[fine_channels, Y, X]`.
        coarse_codes, fine_codes, coarse_code_dim, fine_code_dim: codebook sizes and channels per code.
        use_fine, use_global: False leaves out f or g, and all that belongs to it.
        quantize: False leaves both latents continuous.
        codebook_decay: of the moving averages that are the codebooks.
        encoder_channels: widths of the encoders of g and c, finest first; downsampling is `2 ** (len - 1)`.
        encoder_blocks: ResBlocks at each resolution of the encoders.
        fine_encoder_channels, fine_encoder_blocks: the encoder of f, which keeps the resolution.
        decoder_channels: widths at each resolution, coarsest first, as many as `encoder_channels`.
        decoder_blocks: ResBlocks-CGN at each resolution (Table 8: 3).
        fusion_channels, fusion_blocks: ResBlocks-CGN after the concatenation of f (Table 8: none).
        linear_paths: whether c and f have the linear paths.
        density_transform, gate_alpha: see `VoxelCode`.
    """

    config_name = "config.json"

    @register_to_config
    def __init__(
        self,
        grid_shape: tuple[int, int, int] = (16, 48, 48),
        feature_channels: int = 16,
        background_channels: int = 8,
        aabb: Box = ((-10, -10, -2.5), (10, 10, 4)),
        global_dim: int = 128,
        coarse_channels: int = 8,
        coarse_height: int = 4,
        fine_channels: int = 16,
        coarse_codes: int = 1024,
        fine_codes: int = 128,
        coarse_code_dim: int = 4,
        fine_code_dim: int = 2,
        use_fine: bool = True,
        use_global: bool = True,
        quantize: bool = True,
        codebook_decay: float = 0.95,
        encoder_channels: tuple[int, ...] = (32, 64, 96),
        encoder_blocks: int = 1,
        fine_encoder_channels: int = 48,
        fine_encoder_blocks: int = 1,
        decoder_channels: tuple[int, ...] = (96, 64, 48),
        decoder_blocks: int = 1,
        fusion_channels: int = 64,
        fusion_blocks: int = 1,
        linear_paths: bool = True,
        density_transform: str = "log",
        gate_alpha: float = 0.02,
    ) -> None:
        super().__init__()
        self.downsampling = 2 ** (len(encoder_channels) - 1)
        _check_sizes(self.config, self.downsampling)
        folded = (1 + feature_channels) * grid_shape[0]
        self.register_buffer("box", torch.tensor(aabb, dtype=torch.float32), persistent=False)
        self.voxel_code = VoxelCode(
            feature_channels,
            grid_shape,
            aabb,
            density_transform,  # type: ignore[arg-type]
            gate_alpha=gate_alpha,
        )
        widths = tuple(encoder_channels)
        self.global_encoder = self.fine_encoder = self.fine_codebook = None
        if use_global:
            self.global_encoder = DownsamplingEncoder(folded, widths, 2 * global_dim, encoder_blocks)
        self.coarse_encoder = DownsamplingEncoder(folded, widths, coarse_channels * coarse_height, encoder_blocks)
        if use_fine:
            fine_widths = (fine_encoder_channels,)
            self.fine_encoder = DownsamplingEncoder(folded, fine_widths, fine_channels, fine_encoder_blocks)
        self.coarse_codebook = VectorQuantizer(coarse_code_dim, coarse_codes, codebook_decay)
        if use_fine:
            self.fine_codebook = VectorQuantizer(fine_code_dim, fine_codes, codebook_decay)
        self.decoder = _Decoder(
            coarse_channels * coarse_height,
            self.fine_shape[0],
            folded,
            tuple(decoder_channels),
            decoder_blocks,
            fusion_channels,
            fusion_blocks,
            self.global_dim or None,
        )
        self.linear = None
        if linear_paths:
            self.linear = _LinearPaths(folded, coarse_channels * coarse_height, self.fine_shape[0], self.downsampling)
        self.background_path = BackgroundPath(background_channels, self.global_dim)
        if self.global_encoder is not None:
            self.background_path.reserve(self.global_encoder.conv_out)

    @property
    def grid_shape(self) -> tuple[int, int, int]:
        return tuple(self.config.grid_shape)

    @property
    def feature_channels(self) -> int:
        return self.config.feature_channels

    @property
    def background_channels(self) -> int:
        return self.config.background_channels

    @property
    def aabb(self) -> Float[Tensor, "2 3"]:
        """Corners of the box in metres."""
        return self.box

    @property
    def global_dim(self) -> int:
        """Size of g; 0 without one."""
        return self.config.global_dim if self.config.use_global else 0

    @property
    def coarse_shape(self) -> tuple[int, int, int, int]:
        """Shape of c, (Cc, Zc, Yc, Xc)."""
        _, y, x = self.grid_shape
        down = self.downsampling
        return self.config.coarse_channels, self.config.coarse_height, y // down, x // down

    @property
    def fine_shape(self) -> tuple[int, int, int]:
        """Shape of f, (Cf, Y, X); Cf is 0 without one."""
        return (self.config.fine_channels if self.config.use_fine else 0, *self.grid_shape[1:])

    @property
    def encoding(self) -> dict[str, nn.Module]:
        """All that latents and their codes depend on, by name; the decoder is the rest.

        The linear path of f encodes what that of c leaves over, so c's linear decoder belongs to it.
        """
        parts = {name: getattr(self, name) for name in ("voxel_code", "global_encoder", "coarse_encoder")}
        parts["fine_encoder"] = self.fine_encoder
        if self.linear is not None:
            linear = self.linear
            parts["linear.coarse_encoder"], parts["linear.fine_encoder"] = linear.coarse_encoder, linear.fine_encoder
            parts["linear.coarse_decoder"] = linear.coarse_decoder
        parts["background_path.encoder"] = self.background_path.encoder
        parts |= {f"{name}_codebook": codebook for name, codebook in self.codebooks.items()}
        return {name: part for name, part in parts.items() if part is not None}

    def freeze_encoding(self) -> None:
        """Keeps latents and codes as they are: what follows trains the decoder alone."""
        for part in self.encoding.values():
            part.requires_grad_(False)
        for codebook in self.codebooks.values():
            codebook.frozen = True

    @apply_forward_hook
    def encode(self, grid: VoxelGrid, sample: bool = False) -> SceneLatents:
        """Latents before quantisation.

        Args:
            sample: draw g from its posterior instead of taking the mean.
        """
        voxels = pack_channels_last(self.voxel_code.normalise(grid))
        g, _ = self._encode_global(voxels, self.background_path.normalise(grid), sample)
        coarse = self._encode_coarse(voxels)
        return SceneLatents(g, coarse, self._encode_fine(voxels, self.quantise_coarse(coarse)))

    def _encode_global(
        self,
        voxels: Float[Tensor, "batch folded y x"],
        background: Float[Tensor, "batch codes 4"],
        sample: bool,
        generators: list[torch.Generator] | None = None,
    ) -> tuple[Float[Tensor, "batch global_dim"], Float[Tensor, ""]]:
        """g and its KL divergence."""
        if self.global_encoder is None:
            return voxels.new_zeros(len(voxels), 0).float(), voxels.new_zeros(()).float()
        mean, log_variance = self.global_encoder(voxels).mean(dim=(2, 3)).float().chunk(2, dim=1)
        mean = mean + self.background_path.encode(background).float()
        log_variance = log_variance.clamp(-20, 10)
        g = mean
        if sample:
            noise = randn_tensor(mean.shape, generator=generators, device=mean.device)
            g = mean + noise * (log_variance / 2).exp()
        return g, 0.5 * (mean.square() + log_variance.exp() - 1 - log_variance).sum(dim=1).mean()

    def _encode_coarse(self, voxels: Float[Tensor, "batch folded y x"]) -> Float[Tensor, "batch cc zc yc xc"]:
        coarse = self.coarse_encoder(voxels)
        if self.linear is not None:
            coarse = coarse + self.linear.encode_coarse(voxels)
        return coarse.float().unflatten(1, (self.config.coarse_channels, -1))

    def _encode_fine(
        self, voxels: Float[Tensor, "batch folded y x"], codes: Float[Tensor, "batch cc zc yc xc"]
    ) -> Float[Tensor, "batch cf y x"]:
        """f, given the quantised c."""
        if self.fine_encoder is None:
            return codes.new_zeros(len(voxels), *self.fine_shape)
        fine = self.fine_encoder(voxels)
        if self.linear is not None:
            fine = fine + self.linear.encode_fine(voxels, codes.flatten(1, 2))
        return fine.float()

    @apply_forward_hook
    def quantise(self, latents: SceneLatents) -> SceneLatents:
        """c and f replaced by their nearest codes; unchanged where the model does not quantise."""
        coarse = self.quantise_coarse(latents.coarse)
        return SceneLatents(latents.global_latent, coarse, self._quantise("fine", latents.fine)[0])

    @apply_forward_hook
    def quantise_coarse(self, coarse: Float[Tensor, "batch cc zc yc xc"]) -> Float[Tensor, "batch cc zc yc xc"]:
        """c replaced by its nearest codes."""
        return self._quantise("coarse", coarse)[0]

    @property
    def codebooks(self) -> dict[str, VectorQuantizer]:
        """The codebooks in use, by latent (`coarse`, `fine`)."""
        found = {"coarse": self.coarse_codebook, "fine": self.fine_codebook} if self.config.quantize else {}
        return {name: codebook for name, codebook in found.items() if codebook is not None}

    def code_counts(self, latents: SceneLatents) -> dict[str, Int[Tensor, " codes"]]:
        """How often each code is the nearest one, by codebook (`coarse`, `fine`)."""
        parts = {"coarse": latents.coarse, "fine": latents.fine}
        return {name: codebook.count(codebook(parts[name])[1]) for name, codebook in self.codebooks.items()}

    def _quantise(
        self, name: str, latent: Tensor, move: bool = True
    ) -> tuple[Tensor, Float[Tensor, ""], dict[str, Tensor]]:
        """The quantised latent, its commitment loss, and the codes' indices by the codebook's name, if there is one."""
        if name not in self.codebooks:
            return latent, latent.new_zeros(()), {}
        quantised, indices, commitment = self.codebooks[name](latent, move)
        return quantised, commitment, {name: indices}

    @apply_forward_hook
    def decode(self, latents: SceneLatents, quantise: bool = True) -> VoxelGrid:
        """Voxels of latents, which are quantised first unless they are codes already."""
        codes = self.quantise(latents) if quantise else latents
        background = self.background_path.decode(codes.global_latent).float()
        return self._denormalise(self._decode(codes).float(), background)

    def decoder_features(self, latents: SceneLatents) -> list[Float[Tensor, "batch channels y x"]]:
        """What the decoder makes of latents in its hidden layers, coarsest first; they are quantised first."""
        codes = self.quantise(latents)
        return self.decoder.features(codes.global_latent, *_packed(codes))

    def _denormalise(
        self, voxels: Float[Tensor, "batch folded y x"], background: Float[Tensor, "batch codes 4"]
    ) -> VoxelGrid:
        grid = self.voxel_code.denormalise(voxels, self.aabb)
        return replace(grid, background=self.background_path.denormalise(background))

    def _decode(self, codes: SceneLatents) -> Float[Tensor, "batch folded y x"]:
        coarse, fine = _packed(codes)
        voxels = self.decoder(codes.global_latent, coarse, fine)
        return voxels if self.linear is None else voxels + self.linear.decode(coarse, fine)

    def forward(
        self,
        grid: VoxelGrid,
        sample: bool = True,
        fine_dropout: float = 0.0,
        generators: list[torch.Generator] | None = None,
        changes: Sequence[PlaneChange] = (),
    ) -> LatentReconstruction:
        """One training pass.

        Args:
            sample: draw g from its posterior.
            fine_dropout: probability with which a scene's f is zeroed, so that c learns to stand for the scene alone.
            generators: one per scene, for both; None for torch's own.
            changes: one per scene, of its c and f, which are then decoded once more (see `equivariance.py`).
        """
        voxels = pack_channels_last(self.voxel_code.normalise(grid))
        background_target = self.background_path.normalise(grid)
        g, kl = self._encode_global(voxels, background_target, sample, generators)
        coarse = self._encode_coarse(voxels)
        coarse_codes, commitment, indices = self._quantise("coarse", coarse)
        fine = self._encode_fine(voxels, coarse_codes)
        fine_codes, fine_commitment, fine_indices = self._quantise("fine", fine)
        if fine_dropout > 0:
            fine_codes = fine_codes * (rand_tensor((len(fine), 1, 1, 1), generators, fine.device) >= fine_dropout)
        reconstruction = self._decode(SceneLatents(g, coarse_codes, fine_codes)).float()
        background = self.background_path.decode(g).float()
        latents = SceneLatents(g, coarse, fine)
        return LatentReconstruction(
            self.voxel_code.normalise(grid, dilate=True),
            reconstruction,
            background_target,
            background,
            self._denormalise(reconstruction, background),
            latents,
            kl,
            commitment + fine_commitment,
            {name: self.codebooks[name].count(found) for name, found in (indices | fine_indices).items()},
            [self._decode_changed(latents, changes, items) for items in equal_sizes(changes)],
        )

    def _decode_changed(
        self, latents: SceneLatents, changes: Sequence[PlaneChange], items: Sequence[int]
    ) -> Float[Tensor, "items folded changed_y changed_x"]:
        """What the decoder makes of some scenes' changed c and f, quantised anew by codes that stay, and of their g."""
        coarse, fine = (change_items(part, changes, items) for part in (latents.coarse, latents.fine))
        codes = [self._quantise(name, part, move=False)[0] for name, part in (("coarse", coarse), ("fine", fine))]
        return self._decode(SceneLatents(latents.global_latent[list(items)], *codes)).float()

    @torch.no_grad()
    def fit(self, batches: Sequence[VoxelGrid], density_weight: float = 1.0) -> None:
        """Fits to training voxels what needs no gradient: statistics, the linear paths, and the codebooks.

        Args:
            batches: grids, read several times.
            density_weight: of a density's squared error against that of all features together.
        """
        self.voxel_code.fit(batches)
        self.background_path.fit(batches)
        if self.linear is not None:
            weights = torch.ones(1 + self.feature_channels)
            weights[0] = density_weight * self.feature_channels
            weights = weights.repeat_interleave(self.grid_shape[0])
            self.linear.fit_coarse(self._training_pairs(batches), weights)
            for network in (self.fine_encoder, self.coarse_encoder, self.decoder):
                if network is not None:
                    _set(network.conv_out, torch.zeros_like(network.conv_out.weight), 0.0)
        if self.config.quantize:
            self.coarse_codebook.fit(torch.cat([self.encode(grid).coarse for grid in batches[:CODEBOOK_BATCHES]]))
        if self.linear is not None and self.config.use_fine:
            self.linear.fit_fine(self._training_pairs(batches), weights, self._coarse_codes)
        if self.config.quantize and self.fine_codebook is not None:
            self.fine_codebook.fit(torch.cat([self.encode(grid).fine for grid in batches[:CODEBOOK_BATCHES]]))

    def _training_pairs(self, batches: Sequence[VoxelGrid]) -> Iterator[tuple[Tensor, Tensor]]:
        """What goes into and what shall come out of the latents, turned this way and that where the grid is square."""
        square = self.grid_shape[1] == self.grid_shape[2]
        for i, grid in enumerate(batches):
            turned = grid.rotate90(i) if square else grid
            yield self.voxel_code.normalise(turned), self.voxel_code.normalise(turned, dilate=True)

    def _coarse_codes(self, voxels: Float[Tensor, "batch folded y x"]) -> Float[Tensor, "batch folded_c yc xc"]:
        assert self.linear is not None
        coarse = self.linear.encode_coarse(voxels).unflatten(1, (self.config.coarse_channels, -1))
        return self.quantise_coarse(coarse).flatten(1, 2)


class _LinearPaths(nn.Module):
    """Linear codes of V: of blocks of columns for c, and of the columns of what c leaves over for f.

    Without f (`fine_channels` 0) there is only the first.
    """

    def __init__(self, folded: int, coarse_channels: int, fine_channels: int, downsampling: int) -> None:
        super().__init__()
        self.downsampling = downsampling
        self.coarse_encoder = nn.Conv2d(folded, coarse_channels, downsampling, downsampling)
        self.coarse_decoder = nn.ConvTranspose2d(coarse_channels, folded, downsampling, downsampling)
        self.fine_encoder = self.fine_decoder = None
        if fine_channels:
            self.fine_encoder = nn.Conv2d(folded, fine_channels, 1)
            self.fine_decoder = nn.Conv2d(fine_channels, folded, 1)

    def encode_coarse(self, voxels: Float[Tensor, "batch folded y x"]) -> Float[Tensor, "batch folded_c yc xc"]:
        return self.coarse_encoder(voxels)

    def encode_fine(self, voxels: Tensor, coarse: Float[Tensor, "batch folded_c yc xc"]) -> Tensor:
        """f of what the quantised c leaves over."""
        assert self.fine_encoder is not None
        return self.fine_encoder(voxels - self.coarse_decoder(coarse))

    def decode(self, coarse: Tensor, fine: Tensor) -> Float[Tensor, "batch folded y x"]:
        voxels = self.coarse_decoder(coarse)
        return voxels if self.fine_decoder is None else voxels + self.fine_decoder(fine)

    def fit_coarse(self, pairs: Iterable[tuple[Tensor, Tensor]], weights: Float[Tensor, " folded"]) -> None:
        """Sets the path of c to the best linear code of blocks of `downsampling` x `downsampling` columns."""
        down = self.downsampling
        rows = ((F.pixel_unshuffle(x, down), F.pixel_unshuffle(t, down)) for x, t in pairs)
        inputs, targets = _gather_columns(rows)
        encoder, decoder, mean_input, mean_target = linear_code(
            inputs, targets, self.coarse_encoder.out_channels, weights.repeat_interleave(down * down)
        )
        _set(self.coarse_encoder, encoder.unflatten(1, (-1, down, down)), -encoder @ mean_input)
        # One bias per channel is all a transposed convolution has: the mean over the block.
        bias = mean_target.unflatten(0, (-1, down * down)).mean(1)
        _set(self.coarse_decoder, decoder.T.unflatten(1, (-1, down, down)), bias)

    def fit_fine(
        self,
        pairs: Iterable[tuple[Tensor, Tensor]],
        weights: Float[Tensor, " folded"],
        encode_coarse: Callable[[Tensor], Tensor],
    ) -> None:
        """Sets the path of f to the best linear code of the columns of what c leaves over."""
        assert self.fine_encoder is not None and self.fine_decoder is not None

        def residuals() -> Iterator[tuple[Tensor, Tensor]]:
            for x, t in pairs:
                coarse = self.coarse_decoder(encode_coarse(x))
                yield x - coarse, t - coarse

        inputs, targets = _gather_columns(residuals())
        encoder, decoder, mean_input, mean_target = linear_code(
            inputs, targets, self.fine_encoder.out_channels, weights
        )
        _set(self.fine_encoder, encoder[:, :, None, None], -encoder @ mean_input)
        _set(self.fine_decoder, decoder[:, :, None, None], mean_target)


def rand_tensor(shape: tuple[int, ...], generators: list[torch.Generator] | None, device: torch.device) -> Tensor:
    """Uniform numbers as `randn_tensor` draws normal ones."""
    if generators is None:
        return torch.rand(shape, device=device)
    return torch.cat([torch.rand((1, *shape[1:]), generator=g, device=device) for g in generators])


@torch.no_grad()
def _set(layer: nn.Conv2d | nn.ConvTranspose2d, weight: Tensor, bias: Tensor | float) -> None:
    """Sets a layer's weight and bias."""
    assert layer.bias is not None
    layer.weight.copy_(weight)
    layer.bias.copy_(torch.as_tensor(bias))


def _gather_columns(pairs: Iterable[tuple[Tensor, Tensor]]) -> tuple[Float[Tensor, "n size"], Float[Tensor, "n size"]]:
    """Columns of maps as rows of two matrices, every so many of them, so that memory stays bounded."""
    columns = [tuple(maps.movedim(1, -1).flatten(0, 2) for maps in pair) for pair in pairs]
    total, size = sum(len(x) for x, _ in columns), columns[0][0].shape[1]
    stride = -(-total * size // MAX_FIT_VALUES)
    return tuple(torch.cat([pair[i][::stride] for pair in columns]) for i in range(2))  # type: ignore[return-value]


class _Decoder(nn.Module):
    """Table 8 of the paper, for any sizes."""

    def __init__(
        self,
        coarse_channels: int,
        fine_channels: int,
        out_channels: int,
        channels: tuple[int, ...],
        blocks: int,
        fusion_channels: int,
        fusion_blocks: int,
        condition_dim: int | None,
    ) -> None:
        super().__init__()
        self.conv_in = nn.Conv2d(coarse_channels, channels[0], 3, padding=1)
        self.mid = MidBlock(channels[0], condition_dim)
        self.lowest = _blocks(channels[0], condition_dim, blocks)
        self.levels = nn.ModuleList(_blocks(width, condition_dim, blocks) for width in channels[:-1])
        self.upsamples = nn.ModuleList(map(Upsample, channels[:-1], channels[1:]))
        joined = channels[-1] + fine_channels
        self.fusion_in = nn.Conv2d(joined, fusion_channels, 3, padding=1) if fusion_blocks else nn.Identity()
        self.fusion = _blocks(fusion_channels, condition_dim, fusion_blocks)
        last = fusion_channels if fusion_blocks else joined
        self.norm_out = ConditionalGroupNorm(last, condition_dim) if fusion_blocks else None
        self.conv_out = nn.Conv2d(last, out_channels, 3, padding=1)

    def forward(
        self,
        global_latent: Float[Tensor, "batch dim"],
        coarse: Float[Tensor, "batch coarse yc xc"],
        fine: Float[Tensor, "batch fine y x"],
    ) -> Float[Tensor, "batch out y x"]:
        h = self.features(global_latent, coarse, fine)[-1]
        if self.norm_out is not None:
            h = F.silu(self.norm_out(h, global_latent))
        return self.conv_out(h)

    def features(
        self,
        global_latent: Float[Tensor, "batch dim"],
        coarse: Float[Tensor, "batch coarse yc xc"],
        fine: Float[Tensor, "batch fine y x"],
    ) -> list[Tensor]:
        """Hidden maps: at the resolution of c, after each upsampling, and after f joined."""
        h = self.mid(self.conv_in(coarse), global_latent)
        for block in self.lowest:
            h = block(h, global_latent)
        found = [h]
        for blocks, upsample in zip(self.levels, self.upsamples, strict=True):
            for block in blocks:  # type: ignore[attr-defined]
                h = block(h, global_latent)
            h = upsample(h)
            found.append(h)
        h = self.fusion_in(torch.cat([h, fine.to(h.dtype)], dim=1))
        for block in self.fusion:
            h = block(h, global_latent)
        return [*found, h]


def _packed(codes: SceneLatents) -> tuple[Float[Tensor, "batch coarse yc xc"], Float[Tensor, "batch fine y x"]]:
    """c, its height folded into channels, and f, as the decoder's convolutions are fast with."""
    return pack_channels_last(codes.coarse.flatten(1, 2)), pack_channels_last(codes.fine)


def _blocks(channels: int, condition_dim: int | None, count: int) -> nn.ModuleList:
    return nn.ModuleList(ResBlock(channels, channels, condition_dim) for _ in range(count))


def _check_sizes(config, downsampling: int) -> None:
    _, y, x = config.grid_shape
    if y % downsampling or x % downsampling:
        raise ValueError(f"a grid of {y} x {x} columns cannot be downsampled {downsampling} times")
    if len(config.decoder_channels) != len(config.encoder_channels):
        raise ValueError("encoder_channels and decoder_channels must name the same number of resolutions")
    for channels, code_dim in (
        (config.coarse_channels, config.coarse_code_dim),
        (config.fine_channels, config.fine_code_dim),
    ):
        if channels % code_dim:
            raise ValueError(f"{channels} channels cannot be split into codes of {code_dim}")


def load_latent_autoencoder(folder: Path | str) -> LatentAutoencoder:
    """A trained stage 2, in evaluation mode on the CPU.

    Args:
        folder: what `save_pretrained` wrote, or the training run that contains it.

    Raises:
        UserInputError: if it is missing, truncated, or its weights are not those of its config.
    """
    folder = Path(folder)
    if (folder / MODEL_FOLDER / "config.json").is_file():
        folder = folder / MODEL_FOLDER
    if not (folder / "config.json").is_file():
        raise UserInputError(f"{folder} holds no latent auto-encoder: train one with 'nfldm-train-latent-ae'.")
    config, weights = folder / "config.json", folder / WEIGHTS
    model = build_model(LatentAutoencoder, read_json(config), config, read_safetensors(weights), weights)
    return model.requires_grad_(False)
