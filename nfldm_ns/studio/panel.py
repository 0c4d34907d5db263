"""The panel of a generated scene in nerfstudio's viewer; what it does is in `session.py`."""

from __future__ import annotations

import re
import threading
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float
from nerfstudio.viewer.viewer_elements import ViewerControl
from torch import Tensor
from viser import GuiEvent

from nfldm_ns.diffusion.pipeline import NUM_STEPS
from nfldm_ns.editing.resampling import RESAMPLINGS
from nfldm_ns.errors import UserInputError
from nfldm_ns.plugin.generated_scene import GeneratedScenePipeline
from nfldm_ns.plugin.viewer_start import place_client
from nfldm_ns.studio.drawn_map import Rectangle
from nfldm_ns.studio.generator import Generator, Settings
from nfldm_ns.studio.scene_tools import MapCanvas, MarkedBox
from nfldm_ns.studio.session import EXPORTS, IN_THE_BOX, SIDES, StudioScene, StudioSession

if TYPE_CHECKING:
    from nerfstudio.viewer.viewer import Viewer

OUTPUT_DIR = Path("outputs/studio")
WHILE_TRAINING = "Sampling is off while the scene trains: open it with ns-viewer afterwards."
POINT, RECTANGLE = "click: a cell", "drag: a rectangle"
SPECIAL = re.compile(r"([\\`*_{}<>\[\]#|~])")


@dataclass
class StudioOptions:
    """What opens the viewer may say of the panel.

    Attributes:
        generator: by default the one that the scene's record names.
        output_dir: what is kept goes here.
        further: folders of scenes to go through beside the one on show.
    """

    generator: Generator | None = None
    output_dir: Path = OUTPUT_DIR
    further: tuple[Path, ...] = ()


def build_panel(viewer: Viewer, pipeline: GeneratedScenePipeline) -> StudioPanel | None:
    """Puts the panel into a viewer; while a scene trains there is only a sentence."""
    if viewer.trainer is not None:
        viewer.viser_server.gui.add_markdown(WHILE_TRAINING, order=0.0)
        return None
    return StudioPanel(viewer, pipeline, getattr(pipeline, "studio_options", None) or StudioOptions())


class StudioPanel:
    """Elements of the viewer over a `StudioSession`.

    Args:
        viewer: nerfstudio's.
        pipeline: on show.
        options: of whoever opened the viewer.
    """

    def __init__(self, viewer: Viewer, pipeline: GeneratedScenePipeline, options: StudioOptions) -> None:
        self.viewer, self.pipeline = viewer, pipeline
        self.gui = viewer.viser_server.gui
        folder = pipeline.config.model.scene
        assert folder is not None
        scene = pipeline.model.on_show
        self._built, self._refreshing = False, threading.RLock()
        self._said, self._was_running = "", False
        self.session = StudioSession(
            scene, folder.name, options.output_dir, options.generator, folder, self._show, self._refresh
        )
        self.session.add_folders(options.further)
        self.canvas: MapCanvas | None = None
        viewer.pause_train.visible = viewer.resume_train.visible = False  # there is nothing to train
        with self.gui.add_folder("Generate and edit", order=0.0):
            self._build_status()
            tabs = self.gui.add_tab_group()
            with tabs.add_tab("New"):
                self._build_new()
            with tabs.add_tab("Box"):
                self._build_box()
            self._map_tab = tabs.add_tab("Map")
            with self._map_tab:
                self._map_note = self.gui.add_markdown("The generator is not read yet.")
            with tabs.add_tab("Join"):
                self._build_join()
            with tabs.add_tab("Keep"):
                self._build_keep()
        self._built = True
        if self.session.generator.why_not:
            self._say(self.session.generator.why_not)
            self._map_note.content = plain(self.session.generator.why_not)
        else:
            self.session.open_generator()
        self._refresh()

    def _build_status(self) -> None:
        self.status = self.gui.add_markdown("")
        self.bar = self.gui.add_progress_bar(0.0, visible=False, animated=True)
        self.cancel = self.gui.add_button("Cancel", visible=False, color="red")
        self.cancel.on_click(lambda _: self.session.worker.cancel())
        self.chosen = self.gui.add_dropdown("Scene", self._labels())
        self.chosen.on_update(self._guarded(lambda _: self._choose(self.chosen.value)))
        self.stand = self.gui.add_button("Go to its first view")
        self.stand.on_click(lambda event: place_client(event.client, self.pipeline.cameras_on_show()))

    def _build_new(self) -> None:
        gui = self.gui
        self.seed = gui.add_number("Seed", 1, min=0, step=1)
        self.sample = gui.add_button("Sample a scene")
        self.sample.on_click(self._guarded(lambda _: self._sample()))
        self.steps = gui.add_slider("Steps", 1, 100, 1, NUM_STEPS, hint="of each of the three latents")
        self.solver = gui.add_dropdown("Solver", ("its own",))
        self.temperatures = gui.add_vector3(
            "Temperature", (1.0, 1.0, 1.0), min=(0.0,) * 3, max=(2.0,) * 3, step=0.05, hint="of g, c and f"
        )

    def _build_box(self) -> None:
        gui, scene = self.gui, self.session.on_show.scene
        aabb = scene.grid.aabb.cpu().numpy()
        extent = [float(side) for side in aabb[1] - aabb[0]]
        self.box = MarkedBox(self.viewer.viser_server, aabb, self._box_moved)
        self.show_box = gui.add_checkbox("Show the box", False, hint="drag its arrows; it is as high as the scene")
        self.show_box.on_update(lambda _: self.box.show(self.show_box.value))
        self.bring = gui.add_button("Bring it before me")
        self.bring.on_click(self._bring_box)
        self.centre = gui.add_vector2("Middle x, y [m]", self.box.centre, step=0.1)
        self.centre.on_update(self._move_box)
        self.width = gui.add_slider("Size in x [m]", 0.5, extent[0], 0.1, round(self.box.size[0], 1))
        self.depth = gui.add_slider("Size in y [m]", 0.5, extent[1], 0.1, round(self.box.size[1], 1))
        for slider in (self.width, self.depth):
            slider.on_update(lambda _: self.box.resize((self.width.value, self.depth.value)))
        self.box_seed = gui.add_number("Seed", 1, min=0, step=1)
        self.resample = gui.add_button("Resample the box")
        self.resample.on_click(self._guarded(lambda _: self._resample()))
        self.strength = gui.add_slider("Strength", 0.1, 1.0, 0.05, 1.0, hint="below 1 something of it stays")
        self.walks = gui.add_slider(
            "Care", 1, 5, 1, RESAMPLINGS, hint="how often steps are walked, so that it fits around"
        )
        self.seam = gui.add_slider("Seam [m]", 0.0, 3.0, 0.1, 1.0)

    def _build_join(self) -> None:
        gui = self.gui
        x0, y0, x1, y1 = self.session.grid_box
        self.other = gui.add_dropdown("Take from", self._labels())
        self.side = gui.add_dropdown("What is", (*SIDES, IN_THE_BOX))
        self.at = gui.add_slider("x or y [m]", min(x0, y0), max(x1, y1), 0.1, 0.0)
        self.harmony = gui.add_slider("Harmonise", 0.0, 1.0, 0.05, 0.0, hint="how far the seam is sampled anew")
        self.join = gui.add_button("Combine")
        self.join.on_click(self._guarded(lambda _: self._combine()))

    def _build_keep(self) -> None:
        gui, session = self.gui, self.session
        self.keep = gui.add_button("Save the scene", hint=f"to {session.output_dir}")
        self.keep.on_click(self._guarded(lambda _: session.save()))
        self.kind = gui.add_dropdown("Export", tuple(EXPORTS))
        self.export = gui.add_button("Export it")
        self.export.on_click(self._guarded(lambda _: session.export(self.kind.value)))
        self.height = gui.add_slider("Picture height", 64, 1080, 8, 512)
        self.picture = gui.add_button("Take a picture")
        self.picture.on_click(self._guarded(self._take_picture))
        self.folder = gui.add_text("Folder", "", hint="of another scene of this generator")
        self.open = gui.add_button("Open the folder")
        self.open.on_click(self._guarded(lambda _: session.open_scene(Path(self.folder.value))))

    def _build_map(self) -> None:
        """Once the generator has been read, and knows maps."""
        drawn, gui = self.session.map, self.gui
        assert drawn is not None
        self.canvas = MapCanvas(self.viewer.viser_server, drawn, self._paint)
        names = tuple(entry.name for entry in drawn.classes)
        with self._map_tab:
            self.follow = gui.add_checkbox("Follow the map", False, hint="in what is sampled and resampled")
            self.follow.on_update(lambda _: setattr(self.session, "follow_map", self.follow.value))
            self.draw = gui.add_checkbox("Draw", False, hint="on the map over the scene, seen from above")
            self.draw.on_update(self._guarded(self._open_canvas))
            self.brush = gui.add_dropdown("Class", names, names[min(1, len(names) - 1)])
            self.tool = gui.add_dropdown("Pointer", (RECTANGLE, POINT))
            self.tool.on_update(lambda _: self._listen())
            self.undo = gui.add_button("Undo")
            self.undo.on_click(lambda _: self._change_map(drawn.undo))
            self.clear = gui.add_button("Begin anew")
            self.clear.on_click(lambda _: self._change_map(drawn.clear))
            self.upload = gui.add_upload_button("Load a PNG", mime_type="image/png")
            self.upload.on_upload(self._guarded(self._load_map))
            self.download = gui.add_button("Download as PNG")
            self.download.on_click(lambda event: event.client.send_file_download("map.png", drawn.png()))

    def _sample(self) -> None:
        seed = int(self.seed.value)
        self.session.sample(seed, self._settings())
        self.seed.value = seed + 1

    def _resample(self) -> None:
        seed = int(self.box_seed.value)
        self.session.resample(
            self.box.box,
            seed,
            self._settings(),
            strength=self.strength.value,
            resamplings=int(self.walks.value),
            seam_m=self.seam.value,
        )
        self.box_seed.value = seed + 1

    def _combine(self) -> None:
        self.session.combine(
            self._index(self.other.value),
            self.side.value,
            self.at.value,
            self.box.box,
            int(self.box_seed.value),
            self._settings(),
            harmonise=self.harmony.value,
            seam_m=self.seam.value,
        )

    def _settings(self) -> Settings:
        own = self.temperatures.value == self._own_temperatures()
        return Settings(
            int(self.steps.value),
            "" if self.solver.value not in self._solvers() else self.solver.value,
            None if own else self.temperatures.value,
        )

    def _solvers(self) -> tuple[str, ...]:
        generator = self.session.generator
        return tuple(generator.solvers) if generator.ready else ("its own",)

    def _own_temperatures(self) -> tuple[float, ...]:
        generator = self.session.generator
        return tuple(generator.pipeline.config.temperatures) if generator.ready else (1.0, 1.0, 1.0)

    def _take_picture(self, event: GuiEvent) -> None:
        client = event.client
        assert client is not None
        height = int(self.height.value)
        camera = ViewerControl()
        camera._setup(self.viewer)
        seen = camera.get_camera(height, round(height * client.camera.aspect), client.client_id)
        assert seen is not None

        def render() -> Float[Tensor, "height width 3"]:
            with torch.no_grad():
                return self.pipeline.model.get_outputs_for_camera(seen.to(self.pipeline.device))["rgb"]

        self.session.take_picture(render, client.send_file_download)

    def _choose(self, label: str) -> None:
        index = self._index(label)
        if index != self.session.current:
            self.session.choose(index)

    def _box_moved(self) -> None:
        self.centre.value = tuple(round(value, 2) for value in self.box.centre)

    def _bring_box(self, event: GuiEvent) -> None:
        assert event.client is not None
        self.box.bring_before(event.client)
        self._box_moved()
        self.show_box.value = True

    def _move_box(self, event: GuiEvent) -> None:
        if event.client is not None:  # by hand, not by `_box_moved`
            self.box.move(self.centre.value)

    def _open_canvas(self, event: GuiEvent) -> None:
        assert self.canvas is not None
        if self.draw.value and event.client is not None:
            self.canvas.open(event.client, self.tool.value == RECTANGLE)
        else:
            self.canvas.close()

    def _listen(self) -> None:
        if self.canvas is not None and self.canvas.visible:
            self.canvas.listen(self.tool.value == RECTANGLE)

    def _paint(self, rectangle: Rectangle) -> None:
        drawn = self.session.map
        assert drawn is not None
        self._guarded(lambda _: drawn.paint(rectangle, self.brush.value))(None)
        self._follow_what_is_drawn()

    def _change_map(self, change: Callable[[], None]) -> None:
        change()
        assert self.canvas is not None
        self.canvas.refresh()

    def _load_map(self, event: GuiEvent) -> None:
        drawn, file = self.session.map, self.upload.value
        assert drawn is not None
        self._change_map(lambda: drawn.load(file.content, file.name))
        self._follow_what_is_drawn()

    def _follow_what_is_drawn(self) -> None:
        self.session.follow_map = self.follow.value = True

    def _labels(self) -> tuple[str, ...]:
        return tuple(f"{i + 1}: {entry.name}" for i, entry in enumerate(self.session.scenes))

    def _index(self, label: str) -> int:
        return int(label.partition(":")[0]) - 1

    def _guarded(self, act: Callable[[Any], None]) -> Callable[[Any], None]:
        """A callback that says in the panel what was wrong with what it was asked for."""

        def guarded(event: Any) -> None:
            try:
                act(event)
            except UserInputError as error:
                self._say(str(error))

        return guarded

    def _say(self, sentence: str) -> None:
        """Shows a sentence: until something else happens, below the progress of what goes on."""
        with self._refreshing:
            self._said = sentence
            self._show_state()

    def _show(self, entry: StudioScene) -> None:
        """Another scene is on show: its voxels, its cameras."""
        self.pipeline.model.show(entry.scene)
        self.viewer._trigger_rerender()
        shown = self.viewer.hide_images.visible
        first = self.pipeline.datamanager.train_dataset
        views: Any = first if entry.images is None else SceneViews(entry)
        self.viewer.init_scene(views, "completed")
        self.viewer.set_camera_visibility(shown)

    def _refresh(self) -> None:
        """Shows what the session's state is now; from any thread."""
        if self._built:
            with self._refreshing:
                self._show_state()

    def _show_state(self) -> None:
        status = self.session.worker.status
        self.bar.value = 100 * status.share
        self.bar.visible = self.cancel.visible = status.running
        if status.running != self._was_running:
            self._said, self._was_running = "", status.running
        said = plain(self._said or status.message)
        self.status.content = f"**{plain(status.what)}** {status.share:.0%}\n\n{said}" if status.running else said
        if self.session.generator.ready:
            self._generator_is_ready()
        if not status.running:
            self._list_scenes()

    def _list_scenes(self) -> None:
        labels = self._labels()
        for dropdown in (self.chosen, self.other):
            if dropdown.options != labels:
                dropdown.options = labels
        if self.chosen.value != labels[self.session.current]:
            self.chosen.value = labels[self.session.current]

    def _generator_is_ready(self) -> None:
        solvers = self._solvers()
        if self.solver.options == solvers:
            return
        self.solver.options = solvers
        self.temperatures.value = self._own_temperatures()
        pipeline = self.session.generator.pipeline
        for slider, usual, own in (
            (self.steps, NUM_STEPS, pipeline.default_steps),
            (self.walks, RESAMPLINGS, pipeline.default_resamplings(RESAMPLINGS)),
        ):
            if slider.value == usual:  # nobody has moved it
                slider.value = own
        if self.session.map is None:
            self._map_note.content = "This generator was trained without maps."
        else:
            self._map_note.content = "A map seen from above says where floors and walls are to be."
            self._build_map()


class SceneViews:
    """The pictures and cameras of a scene, as far as nerfstudio's viewer draws them."""

    def __init__(self, entry: StudioScene) -> None:
        assert entry.images is not None and entry.scene.cameras is not None
        self._images, self.cameras = entry.images, entry.scene.cameras

    def __len__(self) -> int:
        return len(self._images)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {"image": self._images[index].permute(1, 2, 0)}


def plain(sentence: str) -> str:
    """A sentence for viser's markdown, in which some characters mean something else."""
    return SPECIAL.sub(r"\\\1", sentence)
