"""A scene collection for nerfstudio: one of its scenes as a dataset (`nfldm-scenes`)."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from nerfstudio.data.dataparsers.base_dataparser import DataParser, DataParserConfig, DataparserOutputs
from nerfstudio.data.scene_box import SceneBox
from nerfstudio.plugins.registry_dataparser import DataParserSpecification

from nfldm_ns.errors import UserInputError, exit_on_bad_input
from nfldm_ns.scenes.collection import DEPTH_UNIT_M, SceneCollection, read_transforms


@dataclass
class SceneCollectionDataParserConfig(DataParserConfig):
    """A scene of a collection made by nfldm-collect."""

    _target: type = field(default_factory=lambda: SceneCollectionDataParser)
    """target class to instantiate"""
    data: Path = Path()
    """Folder with collection.json."""
    scene: str | None = None
    """Id of the scene; the first of the test split if not given."""


class SceneCollectionDataParser(DataParser):
    """Gives one scene: its source views as `train` split, its target views as `val` and `test`.

    Poses and scale stay as they are: metres, z up. So any nerfstudio method trains on any scene of a collection, and
    our own datamanager shows one scene in the viewer while it trains on all.
    """

    config: SceneCollectionDataParserConfig

    def collection(self) -> SceneCollection:
        """The collection on disk; `UserInputError` if there is none."""
        if self.config.data == Path():
            raise UserInputError("No data were given: name the folder of a scene collection with --data.")
        return SceneCollection.open(self.config.data)

    def scene_id(self, collection: SceneCollection) -> str:
        """The chosen scene, by default the first that nothing is trained on."""
        if self.config.scene is None:
            return (collection.splits["test"] or collection.scene_ids)[0]
        if self.config.scene not in collection.scene_ids:
            raise UserInputError(
                f"{collection.root} has no scene '{self.config.scene}': choose one of those in its collection.json."
            )
        return self.config.scene

    @exit_on_bad_input()
    def _generate_dataparser_outputs(
        self, split: str = "train", scene_id: str | None = None, **kwargs
    ) -> DataparserOutputs:
        collection = self.collection()
        return scene_outputs(collection, scene_id or self.scene_id(collection), split)


def scene_outputs(collection: SceneCollection, scene_id: str, split: str) -> DataparserOutputs:
    """One scene as nerfstudio wants it.

    Args:
        split: "train" gives the source views, "val" and "test" the target views.

    Raises:
        UserInputError: if the scene's description is broken.
    """
    folder = collection.scene_dir(scene_id)
    transforms = read_transforms(folder)
    names = transforms.source_names if split == "train" else transforms.target_names
    frames = [transforms.frames[name] for name in names]
    with_depth = all("depth_file_path" in frame for frame in frames)
    with_masks = all("mask_path" in frame for frame in frames)
    return DataparserOutputs(
        image_filenames=[folder / name for name in names],
        mask_filenames=[folder / frame["mask_path"] for frame in frames] if with_masks else None,
        cameras=transforms.cameras(names, collection.image_size),
        scene_box=SceneBox(aabb=collection.aabb.clone()),
        metadata={
            "depth_filenames": [folder / frame["depth_file_path"] for frame in frames] if with_depth else None,
            "depth_unit_scale_factor": DEPTH_UNIT_M,
            "near": collection.near,
            "far": collection.far,
            "image_size": collection.image_size[::-1],
            **_focal_lengths(list(transforms.frames.values())),
        },
    )


def _focal_lengths(frames: list[dict[str, Any]]) -> dict[str, float | None]:
    """The smallest and, where they differ, the largest horizontal focal length of a scene, in pixels."""
    found = [float(frame["fl_x"]) for frame in frames]
    return {"focal_length": min(found), "max_focal_length": max(found) if max(found) > min(found) else None}


SceneCollectionDataParserSpecification = DataParserSpecification(
    config=SceneCollectionDataParserConfig(), description="One scene of a scene collection (nfldm-collect)"
)
