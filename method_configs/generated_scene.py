"""nerfstudio method of one generated scene: `nfldm-scene`."""

from __future__ import annotations

from nerfstudio.plugins.types import MethodSpecification

from nfldm_ns.plugin.generated_scene import scene_trainer_config

nfldm_scene = MethodSpecification(
    config=scene_trainer_config(),
    description="NeuralField-LDM: one generated scene (nfldm-sample), to view, render, evaluate and tune.",
)
