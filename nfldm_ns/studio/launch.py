"""Opens nerfstudio's viewer with the panel on a scene, which is sampled first if there is none."""

from __future__ import annotations

import socket
import time
import webbrowser
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from nerfstudio.configs import base_config  # noqa: F401  # before `writer`, as the two import each other
from nerfstudio.utils import writer
from nerfstudio.viewer.viewer import Viewer

from nfldm_ns.diffusion.pipeline import NFLDMPipeline, StepCallback
from nfldm_ns.editing.scenes import write_edited_scene
from nfldm_ns.errors import UserInputError
from nfldm_ns.generated.scene_files import DESCRIPTION, load_generated_scene
from nfldm_ns.plugin.generated_scene import GeneratedScenePipeline
from nfldm_ns.plugin.scene_config import scene_run_config
from nfldm_ns.sampling.scenes import draw_scenes, sampling_record
from nfldm_ns.scenes.writing import require_writable
from nfldm_ns.studio.generator import Generator
from nfldm_ns.studio.panel import StudioOptions, StudioPanel
from nfldm_ns.studio.session import free_path

COMMAND = "nfldm-studio"
FIRST_PORT, NUM_PORTS = 7007, 100
SHUT_DOWN_S = 10.0


@dataclass
class Studio:
    """A viewer that is open.

    Attributes:
        viewer: nerfstudio's.
        panel: in it.
        url: of its page.
    """

    viewer: Viewer
    panel: StudioPanel
    url: str

    def stay_open(self) -> None:
        """Until Ctrl-C."""
        try:
            while True:
                time.sleep(0.2)
        except KeyboardInterrupt:
            print("Closing the viewer.")
        finally:
            self.close()

    def close(self) -> None:
        """Ends the job that runs, and all threads."""
        worker = self.panel.session.worker
        worker.cancel()
        for machine in list(self.viewer.render_statemachines.values()):
            machine.running = False
        worker.wait(SHUT_DOWN_S)
        self.viewer.viser_server.stop()


def first_scene(
    pipeline: NFLDMPipeline,
    source: str,
    output_dir: Path,
    seed: int,
    num_inference_steps: int | None = None,
    callback: StepCallback | None = None,
) -> Path:
    """The folder of a scene to begin with: sampled now, or what the very same call left there before.

    Args:
        source: where the pipeline is from, for the record.
        num_inference_steps: of each latent; None for the pipeline's own.
        callback: of the pipeline's call.

    Raises:
        UserInputError: if the pipeline cannot sample.
    """
    require_writable(output_dir)
    folder = output_dir / f"scene_{seed:06d}"
    record = {"seed": seed, "command": COMMAND, **sampling_record(pipeline, num_inference_steps, source)}
    if (folder / DESCRIPTION).is_file() and load_generated_scene(folder).provenance == record:
        return folder
    folder = free_path(folder)
    scenes = draw_scenes(
        pipeline,
        1,
        seed,
        num_inference_steps=num_inference_steps,
        source=source,
        callback_on_step_end=callback,
        command=COMMAND,
    )
    write_edited_scene(folder, scenes[0])
    return folder


def open_port(port: int | None, host: str) -> int:
    """A port that the viewer can have: the one that is asked for, or the first that is free.

    Raises:
        UserInputError: if something else has it, or has all.
    """
    reason: str | None = None
    tried = range(FIRST_PORT, FIRST_PORT + NUM_PORTS) if port is None else [port]
    for candidate in tried:
        with socket.socket() as listener:
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                listener.bind((host, candidate))
            except OverflowError:
                raise UserInputError(f"There is no port {candidate}: give --port a number below 65536.") from None
            except OSError as error:
                reason = error.strerror
                continue
            return candidate
    which = f"Port {port}" if port is not None else f"Every port from {tried[0]} to {tried[-1]}"
    raise UserInputError(f"{which} of {host} cannot be used ({reason}): give another one with --port.")


def open_studio(
    folders: Sequence[Path],
    output_dir: Path,
    port: int,
    host: str = "127.0.0.1",
    generator: Generator | None = None,
    device: str = "cpu",
    browser: Callable[[str], object] | None = webbrowser.open,
) -> Studio:
    """Opens the viewer.

    Args:
        folders: of scenes; the first is shown.
        output_dir: what is kept goes here.
        port: see `open_port`.
        host: address to listen at.
        generator: samples; by default the one that the first scene's record names.
        device: where the viewer renders.
        browser: called with the page's address; None opens none.

    Raises:
        UserInputError: if a folder is no scene, or the scenes are not of one generator.
    """
    config = scene_run_config(folders[0].resolve())
    config.viewer.websocket_port, config.viewer.websocket_host = port, host
    config.logging.local_writer.enable = False
    pipeline = config.pipeline.setup(device=device, test_mode="test")
    assert isinstance(pipeline, GeneratedScenePipeline)
    pipeline.eval()
    pipeline.studio_options = StudioOptions(generator, output_dir, tuple(folders[1:]))
    writer.setup_local_writer(config.logging, max_iter=config.max_num_iterations)
    viewer = Viewer(
        config.viewer,
        log_filename=config.get_base_dir() / config.viewer.relative_log_filename,
        datapath=pipeline.datamanager.get_datapath(),
        pipeline=pipeline,
    )
    viewer.init_scene(pipeline.datamanager.train_dataset, "completed", pipeline.datamanager.eval_dataset)
    viewer.set_camera_visibility(False)  # they would stand in the middle of the room
    viewer.toggle_cameravis_button()
    panel = pipeline.viewer_panel.panel
    assert isinstance(panel, StudioPanel)
    studio = Studio(viewer, panel, f"http://{'localhost' if host == '0.0.0.0' else host}:{port}")
    if browser is not None:
        browser(studio.url)
    return studio
