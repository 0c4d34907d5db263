"""The three denoisers of the hierarchy (paper, Sec. 3.3).

Each predicts, as its scheduler says (velocity by default), from a noisy latent in normalised units: zero mean and unit
variance, with the statistics kept as buffers. Conditions are given in their own units.

`scene_code` is what psi_g models: the global latent g and the camera trajectory, concatenated, `[B, G + 5 N]`.

Denoisers with `bev_classes` also know scenes by a semantic map from above (`bev.py`): `bev [B, H, W]`, class ids in
the order of V, or None for scenes without one; `drop_bev` says which maps are not looked at. Without `bev_classes`
they have no weights for it. Config values of all three:

- bev_classes: how many classes maps have (the largest id + 1); 0 for denoisers without maps.
- bev_size: (height, width) of maps; None without.
- bev_dropout: share of training scenes whose map is dropped, so that one model samples with and without.

psi_c and psi_f with `known_share` are outpainters: of a scene they can be told a part that is known already, `known`,
the latent in its own units, and `known_cells [B, y, x]`, which of its cells are known (`outpainting.py`). These enter
beside the sample, free of noise, together with the mask; without them nothing is known. Config value of both:

- known_share: share of training scenes of which a part is known; 0 for denoisers that cannot be told, which have no
  weights for it.

And one says what they were trained for:

- flow: True where they predict a rectified flow (`flow.py`), and see 1000 t as the timestep; False for a diffusion.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from diffusers import ConfigMixin, ModelMixin, UNet2DConditionModel
from diffusers.configuration_utils import register_to_config
from diffusers.models.embeddings import get_timestep_embedding
from jaxtyping import Bool, Float, Int, Shaped
from torch import Tensor, nn

from nfldm_ns.diffusion.bev import MapEncoder
from nfldm_ns.diffusion.trajectory import CAMERA_DIM, Intrinsics

MIN_STD = 1e-2
TIME_CHANNELS = 128
MAP_CHANNELS = 32  # of the map in the input of psi_c
MAP_CELLS = (6, 6)  # of the map that psi_g sees
KNOWN_WEIGHTS = "unet.conv_in.further."  # how the names of weights begin that outpainters alone have


class Normaliser(nn.Module):
    """Mean and standard deviation of a latent, as buffers.

    Scenes are centred on their cameras, so that latents have a mean of their own at every place (free space near them,
    nothing seen in the corners). Where the spatial size is given, that map is the mean, and a denoiser starts from it
    instead of having to learn it; the standard deviation is one number per channel.

    Args:
        channels: of the latent.
        space: its spatial size, if it has one.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, channels: int, *space: int) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(channels, *space))
        self.register_buffer("std", torch.ones(channels, *[1] * len(space)))

    def fit(self, values: Float[Tensor, "batch channels *space"]) -> None:
        """Computes the statistics; channels that hardly vary are not blown up."""
        mean = values.double().mean(0)
        variance = (values.double() - mean).square().movedim(1, -1).flatten(0, -2).mean(0)
        self.mean.copy_(mean)
        self.std.copy_(variance.sqrt().clamp(min=MIN_STD).view_as(self.std))

    def forward(self, values: Float[Tensor, "batch channels *space"]) -> Float[Tensor, "batch channels *space"]:
        """To normalised units."""
        return (values - self.mean) / self.std

    def inverse(self, values: Float[Tensor, "batch channels *space"]) -> Float[Tensor, "batch channels *space"]:
        """Back to the latent's own units."""
        return values * self.std + self.mean


class _ResidualLayer(nn.Module):
    """Two linear layers with a skip connection, modulated by the time embedding."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width, elementwise_affine=False)
        self.modulation = nn.Linear(width, 2 * width)
        self.linear1 = nn.Linear(width, 2 * width)
        self.linear2 = nn.Linear(2 * width, width)
        nn.init.zeros_(self.linear2.weight)
        nn.init.zeros_(self.linear2.bias)

    def forward(
        self, x: Float[Tensor, "batch width"], time: Float[Tensor, "batch width"]
    ) -> Float[Tensor, "batch width"]:
        scale, shift = self.modulation(time).chunk(2, dim=-1)
        h = self.norm(x) * (1 + scale) + shift
        return x + self.linear2(F.silu(self.linear1(h)))


class GlobalDenoiser(ModelMixin, ConfigMixin):
    """psi_g: residual linear layers with skip connections, on g and the camera trajectory.

    Args:
        global_dim: size of g.
        num_cameras: N cameras in the trajectory; 0 leaves it out.
        intrinsics: fx, fy, cx, cy in pixels of the cameras of a generated scene.
        image_size: (height, width) of their images.
        width, num_layers: network size; the first half of the layers is linked to the second by skip connections.
        bev_classes, bev_size, bev_dropout, flow: see above. What the map says is added to the time embedding.
    """

    config_name = "config.json"

    @register_to_config
    def __init__(
        self,
        global_dim: int = 128,
        num_cameras: int = 8,
        intrinsics: Intrinsics = (51.2, 51.2, 32.0, 32.0),
        image_size: tuple[int, int] = (64, 64),
        width: int = 256,
        num_layers: int = 4,
        bev_classes: int = 0,
        bev_size: tuple[int, int] | None = None,
        bev_dropout: float = 0.0,
        flow: bool = False,
    ) -> None:
        super().__init__()
        if num_layers % 2:
            raise ValueError(f"num_layers must be even, not {num_layers}")
        dim = global_dim + CAMERA_DIM * num_cameras
        self.code = Normaliser(dim)
        self.time = nn.Sequential(nn.Linear(TIME_CHANNELS, width), nn.SiLU(), nn.Linear(width, width), nn.SiLU())
        self.linear_in = nn.Linear(dim, width)
        self.down = nn.ModuleList(_ResidualLayer(width) for _ in range(num_layers // 2))
        self.skips = nn.ModuleList(nn.Linear(2 * width, width) for _ in range(num_layers // 2))
        self.up = nn.ModuleList(_ResidualLayer(width) for _ in range(num_layers // 2))
        self.norm_out = nn.LayerNorm(width)
        self.linear_out = nn.Linear(width, dim)
        nn.init.zeros_(self.linear_out.weight)
        nn.init.zeros_(self.linear_out.bias)
        if bev_classes:
            map_dim = max(8, width // 16)
            self.map_encoder = MapEncoder(bev_classes, MAP_CELLS, map_dim, 2 * map_dim)
            self.project_map = _zeroed(nn.Linear(map_dim * MAP_CELLS[0] * MAP_CELLS[1], width))

    @property
    def sample_shape(self) -> tuple[int, ...]:
        """Shape of one sample, (G + 5 N,)."""
        return (self.config.global_dim + CAMERA_DIM * self.config.num_cameras,)

    def forward(
        self,
        sample: Float[Tensor, "batch code"],
        timestep: Shaped[Tensor, " batch"],
        bev: Int[Tensor, "batch height width"] | None = None,
        drop_bev: Bool[Tensor, " batch"] | None = None,
    ) -> Float[Tensor, "batch code"]:
        """Predicts from a noisy scene code in normalised units."""
        _require_map_fits(self, bev)
        time = self.time(get_timestep_embedding(timestep, TIME_CHANNELS).to(sample.dtype))
        if self.config.bev_classes:
            time = time + self.project_map(F.silu(self.map_encoder(bev, drop_bev, len(sample)).flatten(1)))
        h = self.linear_in(sample)
        kept = []
        for layer in self.down:
            h = layer(h, time)
            kept.append(h)
        for layer, skip in zip(self.up, self.skips, strict=True):
            h = layer(skip(torch.cat([h, kept.pop()], dim=-1)), time)
        return self.linear_out(F.silu(self.norm_out(h)))

    def split(self, scene_code: Float[Tensor, "batch code"]) -> tuple[Tensor, Tensor]:
        """g `[B, G]` and the trajectory `[B, 5 N]` of a scene code."""
        return scene_code.split([self.config.global_dim, CAMERA_DIM * self.config.num_cameras], dim=-1)


class _InputLayer(nn.Conv2d):
    """The first layer of a U-Net with further channels, which count nothing until they have learned something.

    Where none follow it is the layer that was there before, to the bit.

    Args:
        first: that layer, whose parameters stay its own.
        further: how many channels may follow the others.
    """

    def __init__(self, first: nn.Conv2d, further: int) -> None:
        super().__init__(first.in_channels, first.out_channels, 3, padding=1)
        self.weight, self.bias = first.weight, first.bias
        self.further = _zeroed(nn.Conv2d(further, first.out_channels, 3, padding=1, bias=False))

    def forward(self, seen: Float[Tensor, "batch channels y x"]) -> Float[Tensor, "batch width y x"]:
        first = super().forward(seen[:, : self.in_channels])
        return first + self.further(seen[:, self.in_channels :]) if seen.shape[1] > self.in_channels else first


class _UNetDenoiser(ModelMixin, ConfigMixin):
    """What psi_c and psi_f have in common: a U-Net over a latent, the scene code and a semantic map as conditions.

    The scene code is the U-Net's class embedding, whose scale and shift follow each group norm (the paper's conditional
    group norm), and a token of cross-attention; columns of the map are further tokens.
    """

    config_name = "config.json"

    def _add_code(self) -> None:
        """What reads the scene code."""
        self.code = Normaliser(self.config.code_dim)
        self.token = nn.Linear(self.config.code_dim, self.config.context_dim)

    def _add_unet(self, out_channels: int, guide_channels: int) -> None:
        """A U-Net that also sees `guide_channels` beside the sample, and what reads maps, if there are any."""
        config = self.config
        channels, attention = tuple(config.channels), tuple(config.attention)
        self.unet = UNet2DConditionModel(
            in_channels=out_channels + guide_channels,
            out_channels=out_channels,
            block_out_channels=channels,
            down_block_types=tuple("CrossAttnDownBlock2D" if flag else "DownBlock2D" for flag in attention),
            up_block_types=tuple("CrossAttnUpBlock2D" if flag else "UpBlock2D" for flag in reversed(attention)),
            mid_block_type="UNetMidBlock2DCrossAttn",
            layers_per_block=config.layers,
            cross_attention_dim=config.context_dim,
            attention_head_dim=tuple(max(width // config.head_dim, 1) for width in channels),
            norm_num_groups=_groups(channels),
            class_embed_type="projection",
            projection_class_embeddings_input_dim=config.code_dim,
            resnet_time_scale_shift="scale_shift",
        )
        if config.bev_classes:
            cells, width = tuple(config.coarse_shape[2:]), config.context_dim
            self.map_encoder = MapEncoder(config.bev_classes, cells, width, width // 2)

    def _add_known(self) -> None:
        """What reads the known part, if there can be one; last, so that all else begins as without."""
        if self.config.known_share:
            first = self.unet.conv_in
            assert isinstance(first, nn.Conv2d)
            self.unet.conv_in = _InputLayer(first, self.sample_shape[0] + 1)

    def _known_channels(
        self, known: Float[Tensor, "batch channels y x"] | None, cells: Bool[Tensor, "batch y x"] | None
    ) -> Float[Tensor, "batch further y x"] | None:
        """The known part in normalised units, 0 where nothing is known, and its mask; None if nothing is known.

        Raises:
            ValueError: if something is known to a denoiser that cannot be told.
        """
        if known is None or cells is None:
            return None
        if not self.config.known_share:
            raise ValueError(f"{type(self).__name__} was not trained with known parts: leave out known and known_cells")
        normalised = self.latent(known)
        mask = cells[:, None]
        return torch.cat(
            [torch.where(mask, normalised, torch.zeros_like(normalised)), mask.to(normalised.dtype)], dim=1
        )

    def _map_cells(self, bev: Tensor | None, drop_bev: Tensor | None, count: int) -> Tensor | None:
        """What maps say of each column of c, `[B, D, Yc, Xc]`; None for a denoiser without maps."""
        _require_map_fits(self, bev)
        return self.map_encoder(bev, drop_bev, count) if self.config.bev_classes else None

    def _denoise(
        self,
        sample: Float[Tensor, "batch channels y x"],
        guide: Float[Tensor, "batch guides y x"] | None,
        timestep: Shaped[Tensor, " batch"],
        scene_code: Float[Tensor, "batch code"],
        cells: Float[Tensor, "batch dim yc xc"] | None,
        context: Float[Tensor, "batch tokens dim"] | None,
        drop_code: Bool[Tensor, " batch"] | None,
        known: Float[Tensor, "batch further y x"] | None,
    ) -> Float[Tensor, "batch channels y x"]:
        code = self.code(scene_code)
        if drop_code is not None:
            code = torch.where(drop_code[:, None], torch.zeros_like(code), code)
        tokens = [self.token(code)[:, None]]
        tokens += [] if cells is None else [cells.flatten(2).mT]
        tokens += [] if context is None else [context]
        seen = torch.cat([part for part in (sample, guide, known) if part is not None], dim=1)
        return self.unet(seen, timestep, torch.cat(tokens, dim=1), class_labels=code).sample


def _groups(channels: tuple[int, ...]) -> int:
    return next(groups for groups in (32, 16, 8, 4, 2, 1) if all(width % groups == 0 for width in channels))


class CoarseDenoiser(_UNetDenoiser):
    """psi_c: a U-Net over c with z folded into channels, conditioned on the scene code.

    Args:
        coarse_shape: (Cc, Zc, Yc, Xc).
        code_dim: G + 5 N.
        channels: widths at each resolution, finest first; Yc and Xc are multiples of `2 ** (len - 1)`.
        attention: where self- and cross-attention are used; the lowest resolution always has them in the middle.
        layers: residual layers per resolution.
        context_dim: width of the cross-attention's tokens.
        head_dim: channels per attention head.
        condition_dropout: share of training scenes whose code is dropped, for classifier-free guidance. What stands
            for a dropped one are zeros in normalised units: the mean code.
        bev_classes, bev_size, bev_dropout, flow, known_share: see above. The map enters as tokens, one per column of
            c, that cross-attention sees after that of the scene code, and beside the noisy c as further channels.
    """

    @register_to_config
    def __init__(
        self,
        coarse_shape: tuple[int, int, int, int] = (16, 4, 12, 12),
        code_dim: int = 168,
        channels: tuple[int, ...] = (96, 192),
        attention: tuple[bool, ...] = (True, True),
        layers: int = 2,
        context_dim: int = 128,
        head_dim: int = 32,
        condition_dropout: float = 0.0,
        bev_classes: int = 0,
        bev_size: tuple[int, int] | None = None,
        bev_dropout: float = 0.0,
        flow: bool = False,
        known_share: float = 0.0,
    ) -> None:
        super().__init__()
        folded = coarse_shape[0] * coarse_shape[1]
        self.latent = Normaliser(folded, *coarse_shape[2:])
        self._add_code()
        self._add_unet(folded, MAP_CHANNELS * bool(bev_classes))
        if bev_classes:
            self.project_map = nn.Conv2d(context_dim, MAP_CHANNELS, 1)
            nn.init.zeros_(self.unet.conv_in.weight[:, folded:])
        self._add_known()

    @property
    def sample_shape(self) -> tuple[int, ...]:
        """Shape of one sample, (Cc Zc, Yc, Xc)."""
        cc, zc, yc, xc = self.config.coarse_shape
        return cc * zc, yc, xc

    def forward(
        self,
        sample: Float[Tensor, "batch folded yc xc"],
        timestep: Shaped[Tensor, " batch"],
        scene_code: Float[Tensor, "batch code"],
        context: Float[Tensor, "batch tokens dim"] | None = None,
        drop_code: Bool[Tensor, " batch"] | None = None,
        bev: Int[Tensor, "batch height width"] | None = None,
        drop_bev: Bool[Tensor, " batch"] | None = None,
        known: Float[Tensor, "batch folded yc xc"] | None = None,
        known_cells: Bool[Tensor, "batch yc xc"] | None = None,
    ) -> Float[Tensor, "batch folded yc xc"]:
        """Predicts from a noisy c in normalised units, z folded into channels.

        Args:
            context: further tokens for cross-attention.
            drop_code: scenes that are to be predicted without their code.
            known, known_cells: what is known already, in the latent's own units, and where; see above.
        """
        cells = self._map_cells(bev, drop_bev, len(sample))
        guide = None if cells is None else self.project_map(cells)
        told = self._known_channels(known, known_cells)
        return self._denoise(sample, guide, timestep, scene_code, cells, context, drop_code, told)


class FineDenoiser(_UNetDenoiser):
    """psi_f: a U-Net over f, conditioned on the scene code and on c, which is upsampled and concatenated.

    Args:
        fine_shape: (Cf, Y, X).
        coarse_shape: (Cc, Zc, Yc, Xc).
        coarse_channels: channels that c is projected to before it is upsampled.
        code_dim, channels, attention, layers, context_dim, head_dim, condition_dropout: as in `CoarseDenoiser`.
        bev_classes, bev_size, bev_dropout, flow, known_share: see above. Tokens of the map enter as in
            `CoarseDenoiser`, and upsampled as a part of c's guide, together with the share of each class at f's own
            resolution.
    """

    @register_to_config
    def __init__(
        self,
        fine_shape: tuple[int, int, int] = (16, 48, 48),
        coarse_shape: tuple[int, int, int, int] = (16, 4, 12, 12),
        coarse_channels: int = 32,
        code_dim: int = 168,
        channels: tuple[int, ...] = (64, 96, 128),
        attention: tuple[bool, ...] = (False, False, True),
        layers: int = 1,
        context_dim: int = 128,
        head_dim: int = 32,
        condition_dropout: float = 0.0,
        bev_classes: int = 0,
        bev_size: tuple[int, int] | None = None,
        bev_dropout: float = 0.0,
        flow: bool = False,
        known_share: float = 0.0,
    ) -> None:
        super().__init__()
        folded = coarse_shape[0] * coarse_shape[1]
        self.latent = Normaliser(*fine_shape)
        self.coarse = Normaliser(folded, *coarse_shape[2:])
        self._add_code()
        self.project_coarse = nn.Conv2d(folded, coarse_channels, 3, padding=1)
        self._add_unet(fine_shape[0], coarse_channels)
        if bev_classes:
            self.project_map = _zeroed(nn.Conv2d(context_dim, coarse_channels, 1))
            self.project_classes = _zeroed(nn.Conv2d(bev_classes, coarse_channels, 3, padding=1))
        self._add_known()

    @property
    def sample_shape(self) -> tuple[int, ...]:
        """Shape of one sample, (Cf, Y, X)."""
        return tuple(self.config.fine_shape)

    def forward(
        self,
        sample: Float[Tensor, "batch fine y x"],
        timestep: Shaped[Tensor, " batch"],
        scene_code: Float[Tensor, "batch code"],
        coarse: Float[Tensor, "batch cc zc yc xc"],
        context: Float[Tensor, "batch tokens dim"] | None = None,
        drop_code: Bool[Tensor, " batch"] | None = None,
        bev: Int[Tensor, "batch height width"] | None = None,
        drop_bev: Bool[Tensor, " batch"] | None = None,
        known: Float[Tensor, "batch fine y x"] | None = None,
        known_cells: Bool[Tensor, "batch y x"] | None = None,
    ) -> Float[Tensor, "batch fine y x"]:
        """Predicts from a noisy f in normalised units.

        Args:
            coarse: c, quantised: what the decoder will see.
            context: further tokens for cross-attention.
            drop_code: scenes that are to be predicted without their code.
            known, known_cells: what is known already, in the latent's own units, and where; see above.
        """
        size, count = (sample.shape[-2], sample.shape[-1]), len(sample)
        cells = self._map_cells(bev, drop_bev, count)
        guide = self.project_coarse(self.coarse(coarse.flatten(1, 2)))
        if cells is not None:
            guide = guide + self.project_map(cells)
        guide = F.interpolate(guide, size=size, mode="bilinear", align_corners=False)
        if cells is not None:
            guide = guide + self.project_classes(self.map_encoder.areas(bev, size, drop_bev, count))
        told = self._known_channels(known, known_cells)
        return self._denoise(sample, guide, timestep, scene_code, cells, context, drop_code, told)


def _zeroed(layer: nn.Module) -> nn.Module:
    """A layer that adds nothing until it has learned something."""
    for parameter in layer.parameters():
        nn.init.zeros_(parameter)
    return layer


def _require_map_fits(denoiser: GlobalDenoiser | _UNetDenoiser, bev: Tensor | None) -> None:
    size = denoiser.config.bev_size
    if bev is not None and (size is None or tuple(bev.shape[1:]) != tuple(size)):
        raise ValueError(f"maps of {tuple(bev.shape[1:])} cells were given to a denoiser for {size}")
