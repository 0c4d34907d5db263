"""What baselines are made of, by the names of their options; a new part is a file and a line here."""

from __future__ import annotations

from nfldm_ns.autoencoder.renderers import RENDERERS
from nfldm_ns.baselines.cameras import CameraBank, CameraModel, PoseDecoder
from nfldm_ns.baselines.options import GeneratorName
from nfldm_ns.baselines.scene_generator import SceneGenerator
from nfldm_ns.baselines.triplane_generator import TriplaneGenerator
from nfldm_ns.baselines.voxel_generator import VoxelGenerator

GENERATORS: dict[GeneratorName, type[SceneGenerator]] = {"voxels": VoxelGenerator, "triplane": TriplaneGenerator}
CAMERAS: dict[str, type[CameraModel]] = {"bank": CameraBank, "decoder": PoseDecoder}
COMPONENT_CLASSES = {
    "generator": tuple(GENERATORS.values()),
    "cameras": tuple(CAMERAS.values()),
    "scene_autoencoder": tuple(RENDERERS.values()),
}
"""Classes that a pipeline's components may be of."""
