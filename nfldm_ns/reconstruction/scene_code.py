"""The scene code of a place of which a few images are given: g, and the cameras that a scene of the generator has."""

from __future__ import annotations

import math

import torch
from diffusers.utils.torch_utils import randn_tensor
from jaxtyping import Float
from nerfstudio.cameras.cameras import Cameras
from torch import Tensor

from nfldm_ns.diffusion.flow import initial_scale
from nfldm_ns.diffusion.guiding import Guide
from nfldm_ns.diffusion.inpainting import NoiseLevels, stretches
from nfldm_ns.diffusion.pipeline import NFLDMPipeline
from nfldm_ns.diffusion.trajectory import cameras_to_trajectory
from nfldm_ns.generated.cameras import look_along
from nfldm_ns.scenes.views import make_cameras, view_yaws


def cameras_around(given: Cameras, count: int) -> Cameras:
    """`count` cameras that look around as evenly as they can with the given ones among them.

    The directions divide the circle from the first given camera on, counter-clockwise. Each further given one takes the
    place of the nearest direction that is free, with its own intrinsics; all others stand level at the mean of the
    given places and have the intrinsics of the first.

    Args:
        given: batch shape `[N]`, of one size; those beyond `count` are left out.
    """
    given = given.to("cpu")
    yaws = view_yaws(given)
    around = yaws[0] + torch.arange(count) * (2 * math.pi / count)
    centre = given.camera_to_worlds[:, :3, 3].mean(0)
    poses = look_along(centre.expand(count, 3), around, torch.zeros(count))
    lenses = [getattr(given, name).reshape(-1) for name in ("fx", "fy", "cx", "cy")]
    intrinsics = torch.stack([values[0].expand(count) for values in lenses])
    free = torch.ones(count, dtype=torch.bool)
    for i in range(min(len(yaws), count)):
        apart = (around - yaws[i] + math.pi).remainder(2 * math.pi) - math.pi
        place = int(torch.where(free, apart.abs(), torch.inf).argmin())
        poses[place], free[place] = given.camera_to_worlds[i], False
        intrinsics[:, place] = torch.stack([values[i] for values in lenses])
    height, width = (int(getattr(given, name).reshape(-1)[0]) for name in ("height", "width"))
    fx, fy, cx, cy = intrinsics
    return make_cameras(poses, fx, fy, cx, cy, height, width)


def scene_code_of_views(
    pipeline: NFLDMPipeline, global_latent: Float[Tensor, "1 global_dim"], cameras: Cameras
) -> Float[Tensor, "1 code"]:
    """g, and the trajectory of cameras around the given ones."""
    count = pipeline.global_denoiser.config.num_cameras
    if not count:
        return global_latent
    trajectory = cameras_to_trajectory(cameras_around(cameras, count))[None]
    return torch.cat([global_latent, trajectory.to(global_latent)], dim=1)


@torch.no_grad()
def sample_scene_code(
    pipeline: NFLDMPipeline,
    scene_code: Float[Tensor, "1 code"],
    strength: float,
    num_inference_steps: int,
    generator: torch.Generator,
    guide: Guide | None = None,
) -> Float[Tensor, "1 code"]:
    """A scene code that psi_g finds likely, near a given one: noised and denoised again (SDEdit, Meng et al. 2022).

    What stage 2 makes of the few voxels that few images show is no g that the other denoisers know.

    Args:
        strength: share of the denoising steps; 0 keeps the code, 1 keeps nothing of it.
    """
    if strength == 0:
        return scene_code
    denoiser, scheduler = pipeline.global_denoiser, pipeline.scheduler
    clean = denoiser.code(scene_code.to(denoiser.device)).to(denoiser.dtype)
    scheduler.set_timesteps(num_inference_steps, device=clean.device)
    levels = NoiseLevels.of(scheduler)
    steps = [i for part in stretches(len(scheduler.timesteps), scheduler.order, 1, strength) for i in part]
    noise = randn_tensor(clean.shape, generator=generator, device=clean.device, dtype=clean.dtype)
    whole = steps[0] == 0
    latents = noise * initial_scale(scheduler) if whole else levels.add(clean, noise, steps[0])
    with pipeline.sampling("global", guide=guide):
        for step in steps:
            latents = pipeline.denoise_step(denoiser, latents, scheduler.timesteps[step], generator, {})
    return denoiser.code.inverse(latents.float())
