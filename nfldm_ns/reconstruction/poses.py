"""Where an unposed photo was taken, estimated together with the code of its place (CodeNeRF, Jang & Agapito 2021).

A photo alone fixes no place: whatever is seen can be put anywhere. What tells poses apart is the prior: rooms stand
with their walls along the axes, and around the origin. So every start, a yaw and a position at eye height, gets the
code that stages 1 and 2 encode the photo to from there. It is judged by how likely the denoisers find that and by what
is lost of the photo in it. The best ones are optimised: pose and code together, under rendering and diffusion losses.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch
from jaxtyping import Float
from torch import Tensor

from nfldm_ns.autoencoder.losses import StageOneLossConfig
from nfldm_ns.diffusion.pipeline import NFLDMPipeline
from nfldm_ns.diffusion.trajectory import CAMERA_DIM
from nfldm_ns.generated.cameras import look_along
from nfldm_ns.latents.scene_latents import SceneLatents
from nfldm_ns.reconstruction.fine_tuning import FineTuningConfig, fine_tune, noised_step
from nfldm_ns.reconstruction.given_views import posed
from nfldm_ns.reconstruction.reconstruction import frozen
from nfldm_ns.reconstruction.rendering_guide import RenderingLoss
from nfldm_ns.reconstruction.scene_code import scene_code_of_views
from nfldm_ns.reconstruction.visibility import Visibility, seen_voxels
from nfldm_ns.scenes.rotations import quarter_turn
from nfldm_ns.scenes.views import Views
from nfldm_ns.scenes.voxel_grid import VoxelGrid


@dataclass(frozen=True)
class PoseConfig:
    """How poses are looked for.

    Attributes:
        num_yaws: of the starts, evenly over the circle.
        grid: starts along x and along y.
        spread: of these, in metres from the origin to the outermost.
        height: of the eye over the origin, in metres.
        kept: of the starts, the best ones, that are optimised.
        noise_shares: of the timesteps, at which the prior judges starts.
        learning_rate: of Adam on the pose, in radians and metres.
        prior_mult: weight of the denoisers' error in the scores of starts and of results.
        code: how the code is optimised with it; with 0 steps starts are only judged.
        loss: of rendering.
    """

    num_yaws: int = 8
    grid: int = 3
    spread: float = 1.0
    height: float = 0.0
    kept: int = 2
    noise_shares: tuple[float, ...] = (0.1, 0.3, 0.5)
    learning_rate: float = 0.02
    prior_mult: float = 0.3
    code: FineTuningConfig = field(default_factory=lambda: FineTuningConfig(steps=20))
    loss: StageOneLossConfig = field(default_factory=lambda: StageOneLossConfig(lpips_mult=0.0, depth_mult=0.0))


@dataclass
class PoseEstimate:
    """One pose of a photo.

    Attributes:
        pose: camera-to-world, `[3, 4]`.
        score: rendering loss plus the prior's; the lower the better.
    """

    pose: Float[Tensor, "3 4"]
    score: float


@dataclass(frozen=True)
class PoseError:
    """How far an estimated pose is from the true one.

    Attributes:
        degrees: of the rotation between them, from 0 to 180.
        metres: between their places.
        box_share: these metres over the longest edge of the box.
    """

    degrees: float
    metres: float
    box_share: float


def exponential(tangent: Float[Tensor, " 6"]) -> Float[Tensor, "4 4"]:
    """The rigid motion of an element (rotation in radians, translation in metres) of se(3); differentiable."""
    x, y, z, a, b, c = tangent.unbind()
    zero = torch.zeros_like(x)
    rows = [(zero, -z, y, a), (z, zero, -x, b), (-y, x, zero, c), (zero, zero, zero, zero)]
    return torch.linalg.matrix_exp(torch.stack([torch.stack(row) for row in rows]))


def start_poses(config: PoseConfig) -> Float[Tensor, "starts 3 4"]:
    """Level cameras at all yaws and positions of the starts."""
    line = torch.linspace(-config.spread, config.spread, config.grid) if config.grid > 1 else torch.zeros(1)
    yaws = torch.arange(config.num_yaws) * (2 * math.pi / config.num_yaws)
    yaw, y, x = torch.meshgrid(yaws, line, line, indexing="ij")
    places = torch.stack([x, y, torch.full_like(x, config.height)], dim=-1).reshape(-1, 3)
    return look_along(places, yaw.flatten(), torch.zeros(yaw.numel()))


def pose_error(
    estimated: Float[Tensor, "3 4"], true: Float[Tensor, "3 4"], aabb: Float[Tensor, "2 3"], any_quarter: bool = False
) -> PoseError:
    """The error of a pose.

    Args:
        any_quarter: take the least one over quarter turns of the whole scene about the z axis through the origin: a
            prior that was trained on turned scenes cannot tell these.
    """
    errors = []
    for quarter in range(4 if any_quarter else 1):
        turned = quarter_turn(quarter).to(estimated) @ estimated
        relative = turned[:, :3].double().T @ true[:, :3].double()
        cosine = ((relative.trace() - 1) / 2).clamp(-1, 1)
        metres = float((turned[:, 3] - true[:, 3]).norm())
        longest = float((aabb[1] - aabb[0]).max())
        errors.append(PoseError(math.degrees(float(cosine.arccos())), metres, metres / longest))
    return min(errors, key=lambda error: (error.degrees, error.metres))


def estimate_pose(
    pipeline: NFLDMPipeline, photo: Views, seed: int = 0, config: PoseConfig | None = None
) -> list[PoseEstimate]:
    """Poses of a photo, the likeliest first.

    Args:
        photo: batch shape `[1, 1]`, whatever its pose.
    """
    config = config or PoseConfig()
    generator = torch.Generator().manual_seed(seed)
    noise_seed = int(torch.randint(2**31, (1,), generator=generator))
    scored = [PoseEstimate(pose, score_pose(pipeline, photo, pose, noise_seed, config)) for pose in start_poses(config)]
    best = sorted(scored, key=lambda estimate: estimate.score)[: config.kept]
    if config.code.steps:
        best += [_optimise(pipeline, photo, start.pose, noise_seed, config) for start in best]
    return sorted(best, key=lambda estimate: estimate.score)


@torch.no_grad()
def score_pose(
    pipeline: NFLDMPipeline, photo: Views, pose: Float[Tensor, "3 4"], noise_seed: int, config: PoseConfig
) -> float:
    """Rendering loss after stages 1 and 2, and the denoisers' error at what the photo shows from this pose.

    The noise is the same for all poses.
    """
    views = posed(photo, pose).to(pipeline.device)
    stage1, stage2 = pipeline.scene_autoencoder, pipeline.latent_autoencoder
    grid = stage1.encode(views)
    latents = stage2.encode(grid)
    lost = float(RenderingLoss(stage1, views, config.loss)(stage2.decode(latents)))
    ends = stage1.render(grid, views.cameras).depth[0]
    visibility = Visibility(seen_voxels(views[0].cameras, ends, grid.shape, grid.aabb))
    return lost + config.prior_mult * _prior_error(pipeline, latents, views, visibility, noise_seed, config)


def _prior_error(
    pipeline: NFLDMPipeline,
    latents: SceneLatents,
    views: Views,
    visibility: Visibility,
    noise_seed: int,
    config: PoseConfig,
) -> float:
    """Mean squared error of psi_c's estimates of the cells of c that are seen, and of psi_g's of the scene code."""
    code = scene_code_of_views(pipeline, latents.global_latent, views[0].cameras)
    clean = pipeline.coarse_denoiser.latent(latents.coarse.flatten(1, 2))
    known = visibility.known_cells(pipeline.latent_autoencoder.downsampling)
    known = known if bool(known.any()) else torch.ones_like(known)
    generator = torch.Generator().manual_seed(noise_seed)
    place = pipeline.global_denoiser.code(code)
    trajectory = slice(place.shape[1] - CAMERA_DIM * pipeline.global_denoiser.config.num_cameras, None)
    errors = []
    for share in config.noise_shares:
        noise = torch.randn(clean.shape, generator=generator).to(clean)
        step = noised_step(pipeline, pipeline.coarse_denoiser, "coarse", clean, noise, share, {"scene_code": code})
        error = (step.estimate(step.predict(step.latents)) - clean).square()
        errors.append(error[..., known].mean())
        noise = torch.randn(place.shape, generator=generator).to(place)
        step = noised_step(pipeline, pipeline.global_denoiser, "global", place, noise, share, {})
        error = (step.estimate(step.predict(step.latents)) - place).square()
        if error[:, trajectory].numel():
            errors.append(error[:, trajectory].mean())
    return float(torch.stack(errors).mean())


def _optimise(
    pipeline: NFLDMPipeline, photo: Views, start: Float[Tensor, "3 4"], noise_seed: int, config: PoseConfig
) -> PoseEstimate:
    """Pose and code from a start on, under rendering and diffusion losses; then judged as the starts are."""
    stage1, stage2 = pipeline.scene_autoencoder, pipeline.latent_autoencoder
    views = posed(photo, start).to(pipeline.device)
    with torch.no_grad():
        latents = stage2.encode(stage1.encode(views))
        code = scene_code_of_views(pipeline, latents.global_latent, views[0].cameras)
    tangent, start = torch.zeros(6, device=views.images.device), start.to(views.images)

    def loss(grid: VoxelGrid) -> Tensor:
        return RenderingLoss(stage1, posed(views, moved_pose(start, tangent)), config.loss)(grid)

    generator = torch.Generator().manual_seed(noise_seed)
    with frozen(pipeline):
        fine_tune(pipeline, latents, code, loss, config.code, generator, [(tangent, config.learning_rate)])
    pose = moved_pose(start, tangent).cpu()
    return PoseEstimate(pose, score_pose(pipeline, photo, pose, noise_seed, config))


def moved_pose(pose: Float[Tensor, "3 4"], tangent: Float[Tensor, " 6"]) -> Float[Tensor, "3 4"]:
    """A camera moved by an element of se(3) in its own axes."""
    last = pose.new_tensor([[0.0, 0.0, 0.0, 1.0]])
    return (torch.cat([pose, last]) @ exponential(tangent))[:3]
