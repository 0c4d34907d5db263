"""Worlds larger than the box that a generator knows: c and f on one canvas, then V tile by tile.

"joint" samples all windows of the canvas together (`diffusion/joint.py`); "outpaint" one window after the other, each
by inpainting given what its neighbours have already, which outpainters are told (`diffusion/outpainting.py`). A world
that is made larger keeps the c and f it has: the new part is sampled with them as known neighbours. Everything is a
function of the settings, so that a killed command goes on.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from jaxtyping import Bool, Float, UInt8
from safetensors.torch import save
from torch import Tensor

from nfldm_ns.autoencoder.checkpoints import read_safetensors
from nfldm_ns.diffusion.bev import to_grid_order
from nfldm_ns.diffusion.flow import initial_scale
from nfldm_ns.diffusion.inpainting import Inpainting
from nfldm_ns.diffusion.joint import JointSampler
from nfldm_ns.diffusion.pipeline import NFLDMPipeline
from nfldm_ns.diffusion.windows import Span, WindowGrid, seed_of_place, slerp
from nfldm_ns.errors import UserInputError
from nfldm_ns.generated.floors import REACH, fill_floor
from nfldm_ns.generated.world_files import WorldDescription
from nfldm_ns.latents.scene_latents import SceneLatents
from nfldm_ns.scenes.voxel_grid import VoxelGrid
from nfldm_ns.scenes.writing import atomic_path

Method = Literal["joint", "outpaint"]
EMPTY_DENSITY = 0.05  # 1/m: how much the features of an empty voxel count where windows are blended
RESAMPLINGS = 2
RIM_SHARE = 3  # an overlap by the rim of a window that its neighbour samples anew, where windows are told what is known
STAGE_NUMBERS = {"coarse": 1, "fine": 2}
Window = tuple[int, int]
Save = Callable[[], None]


@dataclass(frozen=True)
class WorldSettings:
    """What makes a world besides its size and seed.

    Attributes:
        seed: of all noise. The first box has the noise of `nfldm-sample`'s scene of this seed.
        num_inference_steps: of each of the three latents; None for the pipeline's own.
        method: "joint", or "outpaint" window by window.
        stride: largest distance of windows, as a share of a window.
        variety: distance in boxes of places with a scene code of their own, between which it changes slowly; 0 for one
            code everywhere.
        resamplings: of inpainting (`Inpainting`): how often each stretch of steps is walked where neighbours are known;
            None for 2, or 1 of an outpainter.
        guidance_scale: of the pipeline's call.
        fill_floor: whether holes in the floor are filled with the floor around (`fill_floor`).
    """

    seed: int = 0
    num_inference_steps: int | None = None
    method: Method = "joint"
    stride: float = 0.75
    variety: float = 0.0
    resamplings: int | None = None
    guidance_scale: float = 1.0
    fill_floor: bool = True

    def of(self, pipeline: NFLDMPipeline) -> WorldSettings:
        """The same without `None`."""
        steps = pipeline.default_steps if self.num_inference_steps is None else self.num_inference_steps
        walks = pipeline.default_resamplings(RESAMPLINGS) if self.resamplings is None else self.resamplings
        return replace(self, num_inference_steps=steps, resamplings=walks)

    def record(self) -> dict[str, Any]:
        """As JSON."""
        return asdict(self)


@dataclass
class WorldLatents:
    """c and f of a world, as far as they are sampled, and the scene code of each window.

    Attributes:
        codes: `[rows, columns, G + 5 N]`, by window.
        coarse, fine: on the canvas, `[1, Cc, Zc, Yc, Xc]` and `[1, Cf, Y, X]`, before quantisation.
        coarse_done, fine_done: `[Yc, Xc]`, cells that are sampled.
    """

    codes: Float[Tensor, "rows columns code"]
    coarse: Float[Tensor, "1 channels zc yc xc"]
    fine: Float[Tensor, "1 channels y x"]
    coarse_done: Bool[Tensor, "yc xc"]
    fine_done: Bool[Tensor, "yc xc"]

    @property
    def finished(self) -> bool:
        return bool(self.fine_done.all())

    def save(self, path: Path) -> None:
        """Writes one safetensors file in one step."""
        with atomic_path(path) as temporary:
            temporary.write_bytes(save({name: value.cpu().contiguous() for name, value in vars(self).items()}))

    @staticmethod
    def load(path: Path, description: WorldDescription, pipeline: NFLDMPipeline) -> WorldLatents:
        """What `save` wrote.

        Raises:
            UserInputError: if it is missing, damaged, or of another size.
        """
        tensors = read_safetensors(path)
        expected = {name: value.shape for name, value in vars(empty_latents(pipeline, description.windows)).items()}
        if {name: value.shape for name, value in tensors.items()} != expected:
            raise UserInputError(f"{path} has not the latents of this world: make the world again.")
        return WorldLatents(**tensors)


def empty_latents(pipeline: NFLDMPipeline, windows: WindowGrid) -> WorldLatents:
    """A canvas on which nothing is sampled."""
    stage2 = pipeline.latent_autoencoder
    rows, columns = windows.shape
    scale = stage2.downsampling
    nowhere = torch.zeros(rows, columns, dtype=torch.bool)
    return WorldLatents(
        torch.zeros(len(windows.y_starts), len(windows.x_starts), *pipeline.global_denoiser.sample_shape),
        torch.zeros(1, *stage2.coarse_shape[:2], rows, columns),
        torch.zeros(1, stage2.fine_shape[0], rows * scale, columns * scale),
        nowhere,
        nowhere.clone(),
    )


def enlarged_latents(pipeline: NFLDMPipeline, known: WorldLatents, old: WindowGrid, new: WindowGrid) -> WorldLatents:
    """Known latents on a larger canvas, whose windows are those of the old one and further ones."""
    canvas = empty_latents(pipeline, new)
    scale = pipeline.latent_autoencoder.downsampling
    (top, bottom), (left, right) = (tuple(n - o[0] for n in span) for span, o in ((old.y, new.y), (old.x, new.x)))
    canvas.coarse[..., top:bottom, left:right] = known.coarse
    canvas.fine[..., top * scale : bottom * scale, left * scale : right * scale] = known.fine
    canvas.coarse_done[top:bottom, left:right] = True
    canvas.fine_done[top:bottom, left:right] = True
    rows = [new.y_starts.index(start) for start in old.y_starts]
    columns = [new.x_starts.index(start) for start in old.x_starts]
    canvas.codes[torch.tensor(rows)[:, None], torch.tensor(columns)] = known.codes
    return canvas


class WorldSampler:
    """Fills a canvas, and decodes it.

    Args:
        windows: of the whole canvas.
        bev: semantic map of the whole in the order of V, `[H, W]`, at the generator's pixels per box; None for none.
        on_step: called after every denoising step of a stage.
    """

    def __init__(
        self,
        pipeline: NFLDMPipeline,
        windows: WindowGrid,
        settings: WorldSettings,
        bev: UInt8[np.ndarray, "height width"] | None = None,
        on_step: Callable[[], None] | None = None,
    ) -> None:
        self.pipeline, self.windows, self.bev, self.on_step = pipeline, windows, bev, on_step
        self.settings = settings.of(pipeline)
        assert self.settings.num_inference_steps is not None and self.settings.resamplings is not None
        self.steps, self.resamplings = self.settings.num_inference_steps, self.settings.resamplings
        self.temperatures, self.contrasts = tuple(pipeline.config.temperatures), tuple(pipeline.config.contrasts)
        self.device = pipeline._execution_device

    # Conditions and noise

    def maps(self, chosen: list[Window]) -> dict[str, Tensor]:
        """The part of the map that each window sees, as the denoisers want it; nothing without a map."""
        if self.bev is None:
            return {}
        crops = np.stack([self.crop(window) for window in chosen])
        north_up = to_grid_order(torch.from_numpy(crops))
        return {"bev": self.pipeline.prepare_maps(north_up, len(chosen))}

    def crop(self, window: Window) -> UInt8[np.ndarray, "height width"]:
        """A window's part of the map, in the order of V."""
        assert self.bev is not None and self.pipeline.bev_size is not None
        parts = []
        for start, low, size, pixels in zip(
            window, (self.windows.y[0], self.windows.x[0]), self.windows.size, self.pipeline.bev_size, strict=True
        ):
            first = round((start - low) / size * pixels)
            parts.append(slice(first, first + pixels))
        return self.bev[parts[0], parts[1]]

    def place_noise(self, row: int, column: int) -> list[Tensor]:
        """Standard normal noise of g, c and f for a box at a place of the lattice of boxes."""
        seed = seed_of_place(self.settings.seed, row, column)
        return self.pipeline.draw_noise(1, [torch.Generator("cpu").manual_seed(seed)])

    def canvas_noise(self) -> list[Float[Tensor, "1 channels y x"]]:
        """Noise of c and f on the whole canvas, in which each box has its own, wherever the canvas ends."""
        stage2 = self.pipeline.latent_autoencoder
        shapes = [(stage2.coarse_shape[0] * stage2.coarse_shape[1], 1)]
        if self.pipeline.fine_denoiser is not None:
            shapes.append((stage2.fine_shape[0], stage2.downsampling))
        canvases = [torch.zeros(1, channels, *(n * scale for n in self.windows.shape)) for channels, scale in shapes]
        (rows, columns), (y, x) = self.windows.size, (self.windows.y, self.windows.x)
        for row in range(y[0] // rows, -(-y[1] // rows)):
            for column in range(x[0] // columns, -(-x[1] // columns)):
                noise = self.place_noise(row, column)[1:]
                for canvas, own, (_, scale) in zip(canvases, noise, shapes, strict=True):
                    target, source = _overlap((row * rows, column * columns), self.windows, scale)
                    canvas[..., target[0], target[1]] = own.cpu()[..., source[0], source[1]]
        return [canvas.to(self.device, self.pipeline.dtype) for canvas in canvases]

    def code_noise(self, window: Window) -> Float[Tensor, " code"]:
        """Noise of a window's scene code: that of the first box, or between those of the places around."""
        if self.settings.variety == 0:
            return self.place_noise(0, 0)[0][0]
        places = [start / size / self.settings.variety for start, size in zip(window, self.windows.size, strict=True)]
        (row, down), (column, across) = ((int(p // 1), p % 1) for p in places)
        near, far = (
            slerp(self.place_noise(row + i, column)[0][0], self.place_noise(row + i, column + 1)[0][0], across)
            for i in (0, 1)
        )
        return slerp(near, far, down)

    def sample_codes(self, chosen: list[Window]) -> Float[Tensor, "windows code"]:
        """g and the trajectory of some windows."""
        one = self.settings.variety == 0 and self.bev is None
        distinct = chosen[:1] if one else chosen
        denoiser, scheduler = self.pipeline.global_denoiser, self.pipeline.scheduler
        codes = []
        for window in distinct:
            noise = self.code_noise(window)[None] * initial_scale(scheduler) * self.temperatures[0]
            self.pipeline._stage, self.pipeline._guidance_scale = "global", self.settings.guidance_scale
            generator = self._generator(3, *window) if not one else self._generator(3)
            maps = self.maps([window])
            latents = self.pipeline.denoise(denoiser, noise.to(self.device), self.steps, generator, None, **maps)
            codes.append(denoiser.code.inverse(latents.float() * self.contrasts[0]).cpu())
        return torch.cat(codes).expand(len(chosen), -1)

    def _generator(self, *place: int) -> torch.Generator:
        """Of the noise that is added on the way."""
        return torch.Generator(self.device).manual_seed(seed_of_place(self.settings.seed, *place, 1))

    # Sampling

    def fill(self, latents: WorldLatents, new_windows: list[Window], save: Save) -> None:
        """Samples what is not sampled yet, in place.

        Args:
            new_windows: without a scene code, and through which the canvas is sampled.
            save: called when something is done that is worth keeping.
        """
        missing = [w for w in new_windows if not bool(self._code_of(latents, w).any())]
        if missing:
            for window, code in zip(missing, self.sample_codes(missing), strict=True):
                self._code_of(latents, window).copy_(code)
            save()
        if self.settings.method == "joint":
            self._fill_jointly(latents, new_windows, save)
        else:
            self._outpaint(latents, new_windows, save)

    def _code_of(self, latents: WorldLatents, window: Window) -> Tensor:
        return latents.codes[self.windows.y_starts.index(window[0]), self.windows.x_starts.index(window[1])]

    def _fill_jointly(self, latents: WorldLatents, windows: list[Window], save: Save) -> None:
        noise = self.canvas_noise()
        stages = ["coarse"] if self.pipeline.fine_denoiser is None else ["coarse", "fine"]
        codes = torch.stack([self._code_of(latents, window) for window in windows]).to(self.device)
        known = latents.fine_done.clone()
        for stage, start in zip(stages, noise, strict=True):
            if bool(getattr(latents, f"{stage}_done").all()):
                continue
            conditions = {"scene_code": codes, **self.maps(windows)}
            if stage == "fine":
                conditions["coarse"] = self._coarse_codes(latents, windows)
            arguments = (self.pipeline, stage, self.windows, windows, conditions)
            sampler = JointSampler(*arguments, self.settings.guidance_scale, self.on_step)
            inpainting = self._inpainting(latents, ~known) if bool(known.any()) else None
            number = STAGE_NUMBERS[stage]
            temperature = self.temperatures[number]
            generator = self._generator(self.windows.y[0], self.windows.x[0], *self.windows.shape, number)
            found = sampler(start, self.steps, generator, temperature, inpainting, self.contrasts[number]).cpu()
            if stage == "coarse":
                latents.coarse = found.unflatten(1, latents.coarse.shape[1:3])
                latents.coarse_done.fill_(True)
            else:
                latents.fine = found
            if stage == stages[-1]:
                latents.fine_done.fill_(True)
            save()

    def _inpainting(self, latents: WorldLatents, region: Bool[Tensor, "yc xc"], at: Any = ...) -> Inpainting:
        """Samples the cells of a region, of the whole canvas or in a window."""
        scale = self.pipeline.latent_autoencoder.downsampling
        fine = region.repeat_interleave(scale, 0).repeat_interleave(scale, 1)
        code = torch.zeros(1, self.pipeline.latent_autoencoder.global_dim)
        coarse, f = latents.coarse, latents.fine
        if at is not ...:
            (y, x), (fy, fx) = (self.windows.place(at, s) for s in (1, scale))
            coarse, f, region, fine = coarse[..., y, x], f[..., fy, fx], region[y, x], fine[fy, fx]
        parts = SceneLatents(code, coarse, f).to(self.device)
        return Inpainting(parts, region, fine, resamplings=self.resamplings)

    def _coarse_codes(self, latents: WorldLatents, windows: list[Window]) -> Float[Tensor, "windows cc zc yc xc"]:
        crops = []
        for window in windows:
            y, x = self.windows.place(window)
            crops.append(latents.coarse[..., y, x])
        return self.pipeline.latent_autoencoder.quantise_coarse(torch.cat(crops).to(self.device))

    def _outpaint(self, latents: WorldLatents, windows: list[Window], save: Save) -> None:
        noise = self.canvas_noise()
        code_dim = self.pipeline.global_denoiser.sample_shape[0]
        scales = (1, self.pipeline.latent_autoencoder.downsampling)
        for window in windows:
            y, x = self.windows.place(window)
            kept = self._kept(window)
            if bool(latents.fine_done[y, x][kept].all()):
                continue
            fy, fx = self.windows.place(window, scales[1])
            crops = [part[..., rows, columns] for part, (rows, columns) in zip(noise, ((y, x), (fy, fx)), strict=False)]
            known = bool(latents.fine_done[y, x].any())
            maps = None if self.bev is None else to_grid_order(torch.from_numpy(self.crop(window).copy()))
            output = self.pipeline(
                1,
                self._generator(*window, 4),
                self.steps,
                output_type="latent",
                guidance_scale=self.settings.guidance_scale,
                noise=[torch.zeros(1, code_dim), *crops],
                scene_code=self._code_of(latents, window)[None].to(self.device),
                inpainting=self._inpainting(latents, ~latents.fine_done, window) if known else None,
                bev=maps,
                callback_on_step_end=self._report,
            ).latents.to("cpu")
            latents.coarse[..., y, x] = output.coarse
            latents.fine[..., fy, fx] = output.fine
            latents.coarse_done[y, x] |= kept
            latents.fine_done[y, x] |= kept
            save()

    def _kept(self, window: Window) -> Bool[Tensor, "yc xc"]:
        """What of a window its neighbours keep: all but its rim, of which no camera saw much, where theirs is not."""
        kept = torch.ones(self.windows.size, dtype=torch.bool)
        for axis, (start, starts) in enumerate(
            zip(window, (self.windows.y_starts, self.windows.x_starts), strict=True)
        ):
            place, size = starts.index(start), self.windows.size[axis]
            along = kept.movedim(axis, 0)
            if place > 0:
                along[: (starts[place - 1] + size - start) // RIM_SHARE] = False
            if place + 1 < len(starts):
                along[size - (start + size - starts[place + 1]) // RIM_SHARE :] = False
        return kept

    def _report(self, *_: Any) -> dict[str, Any]:
        if self.on_step is not None:
            self.on_step()
        return {}


def _overlap(
    start: tuple[int, int], windows: WindowGrid, scale: int
) -> tuple[tuple[slice, slice], tuple[slice, slice]]:
    """Where the box that starts at a cell lies on the canvas, and which part of the box that is."""
    target, source = [], []
    for first, size, (low, high) in zip(start, windows.size, (windows.y, windows.x), strict=True):
        begin, end = max(first, low), min(first + size, high)
        target.append(slice((begin - low) * scale, (end - low) * scale))
        source.append(slice((begin - first) * scale, (end - first) * scale))
    return (target[0], target[1]), (source[0], source[1])


class WorldDecoder:
    """V of a canvas, tile by tile: each window is decoded as the scene it is, and windows are blended.

    Densities are means by the windows' weights; features likewise, but each counts as much as its density.
    """

    def __init__(self, pipeline: NFLDMPipeline, windows: WindowGrid, latents: WorldLatents) -> None:
        self.pipeline, self.windows, self.latents = pipeline, windows, latents
        self.scale = pipeline.latent_autoencoder.downsampling
        self.axes = windows.axes(self.scale)
        self._decoded = lru_cache(maxsize=3 * len(windows.x_starts) + 3)(self._decode)

    @torch.no_grad()
    def _decode(self, window: Window) -> VoxelGrid:
        stage2 = self.pipeline.latent_autoencoder
        (y, x), (fy, fx) = (self.windows.place(window, scale) for scale in (1, self.scale))
        row, column = self.windows.y_starts.index(window[0]), self.windows.x_starts.index(window[1])
        g, _ = self.pipeline.global_denoiser.split(self.latents.codes[row, column][None])
        parts = SceneLatents(g, self.latents.coarse[..., y, x], self.latents.fine[..., fy, fx])
        return stage2.decode(parts.to(self.pipeline._execution_device)).to("cpu")

    def backgrounds(self) -> Float[Tensor, "rows columns codes 4"] | None:
        """What lies beyond, as each window has it."""
        path = self.pipeline.latent_autoencoder.background_path
        g, _ = self.pipeline.global_denoiser.split(self.latents.codes.flatten(0, 1).to(self.pipeline._execution_device))
        with torch.no_grad():
            codes = path.denormalise(path.decode(g).float())
        return codes.unflatten(0, self.latents.codes.shape[:2]).cpu()

    def tile(self, y: Span, x: Span, aabb: Float[Tensor, "2 3"]) -> VoxelGrid:
        """The voxels of a part of the canvas.

        Args:
            y, x: cells.
            aabb: its corners in metres.
        """
        layers = self.pipeline.latent_autoencoder.grid_shape[0]
        shape = (layers, (y[1] - y[0]) * self.scale, (x[1] - x[0]) * self.scale)
        chosen = self.windows.touching(y, x)
        density = torch.zeros(1, 1, *shape)
        features = torch.zeros(1, self.pipeline.latent_autoencoder.feature_channels, *shape)
        total = torch.zeros(1, 1, *shape)
        for window in chosen:
            grid = self._decoded(window)
            part, source = self._common(window, y, x)
            weight = self._weight(window, y, x)
            share = weight * (grid.density[..., source[0], source[1]] + EMPTY_DENSITY)
            density[..., part[0], part[1]] += weight * grid.density[..., source[0], source[1]]
            features[..., part[0], part[1]] += share * grid.features[..., source[0], source[1]]
            total[..., part[0], part[1]] += share
        if len(chosen) == 1:
            return VoxelGrid(grid.density[..., source[0], source[1]], grid.features[..., source[0], source[1]], aabb)
        return VoxelGrid(density, features / total, aabb)

    def floored_tile(self, y: Span, x: Span, description: WorldDescription) -> VoxelGrid:
        """The same with holes in the floor filled, from beyond the part's border, too."""
        spans = []
        for (low, high), whole, edge in zip(
            (y, x), (self.windows.y, self.windows.x), description.cell[::-1], strict=True
        ):
            halo = math.ceil(REACH / edge)
            spans.append((max(low - halo, whole[0]), min(high + halo, whole[1])))
        wide_y, wide_x = spans
        grid = fill_floor(self.tile(wide_y, wide_x, description.box(wide_y, wide_x)), description.camera_height)
        rows, columns = (
            slice((low - first) * self.scale, (high - first) * self.scale)
            for (low, high), (first, _) in zip((y, x), spans, strict=True)
        )
        return VoxelGrid(grid.density[..., rows, columns], grid.features[..., rows, columns], description.box(y, x))

    def _common(self, window: Window, y: Span, x: Span) -> tuple[tuple[slice, slice], tuple[slice, slice]]:
        """What a window and a part of the canvas share: in the part, and in the window."""
        target, source = [], []
        for start, size, (low, high) in zip(window, self.windows.size, (y, x), strict=True):
            begin, end = max(start, low), min(start + size, high)
            target.append(slice((begin - low) * self.scale, (end - low) * self.scale))
            source.append(slice((begin - start) * self.scale, (end - start) * self.scale))
        return (target[0], target[1]), (source[0], source[1])

    def _weight(self, window: Window, y: Span, x: Span) -> Float[Tensor, "y x"]:
        factors = []
        grids = (self.windows.y_starts, self.windows.x_starts)
        for start, starts, size, span, axis in zip(window, grids, self.windows.size, (y, x), self.axes, strict=True):
            begin, end = max(start, span[0]), min(start + size, span[1])
            first = starts[0]
            factors.append(axis[starts.index(start), (begin - first) * self.scale : (end - first) * self.scale])
        return factors[0][:, None] * factors[1]
