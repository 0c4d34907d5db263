"""Batches of scenes from a collection, in memory or from disk."""

from __future__ import annotations

from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace

import numpy as np
import torch
from jaxtyping import Bool, Int, UInt8
from nerfstudio.cameras.cameras import Cameras
from rich.progress import track
from torch import Tensor

from nfldm_ns.errors import UserInputError
from nfldm_ns.scenes.collection import DEPTH_UNIT_M, Scene, SceneCollection
from nfldm_ns.scenes.views import SceneBatch, Views, rotate_cameras90, sparse_depths

GIB = 1 << 30


@dataclass
class _CompactViews:
    """Views as they are on disk: a quarter of the memory of `Views`."""

    cameras: Cameras
    images: UInt8[Tensor, "views 3 height width"]
    millimetres: Int[Tensor, "views 1 height width"] | None
    masks: Bool[Tensor, "views 1 height width"] | None

    @staticmethod
    def of(views: Views) -> _CompactViews:
        depths = views.depths
        return _CompactViews(
            views.cameras,
            views.images.mul(255).round().byte(),
            None if depths is None else depths.div(DEPTH_UNIT_M).round().to(torch.uint16),
            views.masks,
        )

    def views(self) -> Views:
        depths = None if self.millimetres is None else self.millimetres.float() * DEPTH_UNIT_M
        return Views(self.cameras, self.images.float().div_(255), depths, self.masks)

    @property
    def num_bytes(self) -> int:
        maps = (self.images, self.millimetres, self.masks)
        return sum(tensor.nbytes for tensor in maps if tensor is not None)


class SceneCache:
    """Scenes of a collection, kept in memory up to a limit and read again beyond it.

    Args:
        collection: where they are.
        limit_gib: memory for scenes.
    """

    def __init__(self, collection: SceneCollection, limit_gib: float) -> None:
        self.collection = collection
        self.limit = int(limit_gib * GIB)
        self.num_bytes = 0
        self._scenes: dict[str, tuple[_CompactViews, _CompactViews]] = {}

    def load(self, scene_id: str) -> Scene:
        """One scene; `UserInputError` if one of its files is broken."""
        if scene_id in self._scenes:
            source, target = self._scenes[scene_id]
            return Scene(scene_id, source.views(), target.views())
        scene = self.collection.load_scene(scene_id)
        compact = (_CompactViews.of(scene.source), _CompactViews.of(scene.target))
        size = sum(views.num_bytes for views in compact)
        if self.num_bytes + size <= self.limit:
            self._scenes[scene_id] = compact
            self.num_bytes += size
        return scene

    def preload(self, scene_ids: list[str], num_threads: int) -> None:
        """Reads scenes until the limit is reached, so that a broken file shows before training starts."""
        with ThreadPoolExecutor(num_threads) as pool:
            loaded = pool.map(self.load, scene_ids)
            for _ in track(loaded, "Reading scenes", total=len(scene_ids), transient=True):
                if self.num_bytes >= self.limit:
                    pool.shutdown(cancel_futures=True)
                    return


@dataclass
class SceneSamplerConfig:
    """What a batch of scenes consists of.

    Attributes:
        scenes_per_batch: B.
        num_source_views: views the encoder gets, drawn from the source views; None takes all.
        view_dropout: share of the batches in which it gets fewer, any number from 1 on with equal chances, so that it
            learns to do with any number.
        missing_depth: share of the scenes whose source views lose their depth, so that one model encodes RGB too.
        sparse_depth: share of the scenes whose source views keep it at a few points only, as of a Lidar.
        sparse_points: fewest and most such points of each view; the number is drawn with equal chances per octave.
        num_target_views: views to be rendered, drawn from the target views; None takes all.
        num_extra_targets: further views to be rendered, drawn from the source views.
        quarter_turns: turns every scene by a random multiple of 90 degrees, which a grid can follow exactly.
        seed: batches are a function of the seed and the step.
    """

    scenes_per_batch: int = 2
    num_source_views: int | None = None
    view_dropout: float = 0.0
    missing_depth: float = 0.0
    sparse_depth: float = 0.0
    sparse_points: tuple[int, int] = (32, 1024)
    num_target_views: int | None = None
    num_extra_targets: int = 0
    quarter_turns: bool = True
    seed: int = 0


class SceneSampler:
    """Endless random batches. The batch of a step depends on the seed alone, so that a resumed run continues exactly.

    Every scene comes once per epoch. Scenes and what is drawn from them are one sequence, whatever the number of ranks:
    the batches of all ranks together are the batch of one process with as many scenes.

    Args:
        cache: the scenes.
        scene_ids: those to draw from.
    """

    def __init__(
        self, cache: SceneCache, scene_ids: list[str], config: SceneSamplerConfig, world_size: int = 1, rank: int = 0
    ) -> None:
        self.cache = cache
        self.scene_ids = scene_ids
        self.config = config
        self.world_size = world_size
        self.rank = rank
        self._pool = ThreadPoolExecutor(1)
        self._ahead: tuple[int, Future[SceneBatch]] | None = None
        if config.quarter_turns:
            require_square_box(cache.collection)

    def batch_ids(self, step: int) -> list[str]:
        """The scenes of this rank's batch."""
        return [self._scene_at(position) for position in self._positions(step)]

    def joint_batch_ids(self, step: int) -> list[str]:
        """The scenes of the batches of all ranks."""
        size = self.config.scenes_per_batch * self.world_size
        return [self._scene_at(step * size + i) for i in range(size)]

    def _positions(self, step: int) -> range:
        """Where this rank's scenes stand in the sequence of all scenes of all epochs."""
        size = self.config.scenes_per_batch
        first = (step * self.world_size + self.rank) * size
        return range(first, first + size)

    def _scene_at(self, position: int) -> str:
        epoch, index = divmod(position, len(self.scene_ids))
        order = np.random.default_rng((self.config.seed, epoch)).permutation(len(self.scene_ids))
        return self.scene_ids[order[index]]

    def batch(self, step: int) -> SceneBatch:
        """The batch of a step; the next one is read meanwhile."""
        ahead = self._ahead
        batch = ahead[1].result() if ahead is not None and ahead[0] == step else self._make(step)
        self._ahead = (step + 1, self._pool.submit(self._make, step + 1))
        return batch

    def _make(self, step: int) -> SceneBatch:
        dropout = np.random.default_rng((self.config.seed, step, 2)).random(2)  # alike for all scenes and ranks
        fewer = dropout[1] if dropout[0] < self.config.view_dropout else None
        scenes = []
        for position in self._positions(step):
            random = np.random.default_rng((self.config.seed, position, 1))
            scenes.append(self._draw(self.cache.load(self._scene_at(position)), random, fewer))
        return self.cache.collection.batch(scenes)

    def _draw(self, scene: Scene, random: np.random.Generator, fewer: float | None) -> Scene:
        config = self.config
        count = config.num_source_views or scene.source.shape[0]
        source = _choose(scene.source, count if fewer is None else 1 + int(fewer * count), random)
        source = _drop_depth(source, config, random)
        target = _choose(scene.target, config.num_target_views, random)
        if config.num_extra_targets:
            target = Views.cat([target, _choose(scene.source, config.num_extra_targets, random)])
        if config.quarter_turns:
            turns = int(random.integers(4))
            source, target = (
                replace(views, cameras=rotate_cameras90(views.cameras, turns)) for views in (source, target)
            )
        return Scene(scene.scene_id, source, target)


def _choose(views: Views, count: int | None, random: np.random.Generator) -> Views:
    if count is None or count >= views.shape[0]:
        return views
    return views[torch.from_numpy(np.sort(random.permutation(views.shape[0])[:count]))]


def _drop_depth(views: Views, config: SceneSamplerConfig, random: np.random.Generator) -> Views:
    """Views with all their depth, with that of a few points, or with none."""
    if views.depths is None or not (config.missing_depth or config.sparse_depth):
        return views
    kind, number = random.random(2)
    if kind < config.missing_depth:
        return replace(views, depths=torch.zeros_like(views.depths))
    if kind < config.missing_depth + config.sparse_depth:
        fewest, most = config.sparse_points
        generator = torch.Generator().manual_seed(int(random.integers(2**62)))
        num_points = round(fewest * (most / fewest) ** number)
        return replace(views, depths=sparse_depths(views.depths, num_points, generator))
    return views


def require_square_box(collection: SceneCollection) -> None:
    """Raises `UserInputError` unless the box can be turned by 90 degrees about the origin."""
    low, high = collection.aabb[0, :2], collection.aabb[1, :2]
    if not torch.allclose(low, -high, atol=1e-4) or abs(float(high[0] - high[1])) > 1e-4:
        raise UserInputError(
            f"The box of {collection.root} is not square around the origin, so scenes cannot be turned by 90 degrees: "
            "change aabb in collection.json or train with --pipeline.datamanager.sampling.quarter-turns False."
        )
