"""How fast the studio answers, how long its work takes, and the animation of it in the documentation.

    python benchmarks/studio.py --output-dir OUT

Opens the studio on a room of the shipped generator and a page in Chromium without a window, whose WebGL runs on the
CPU beside all else. Answers are from a click to what it changes on the page, at rest and while a scene is sampled. Work
is from the click to its end, with the CPU time of the studio, which renders pictures meanwhile.

Writes `studio.json`, `studio.gif` and the pictures that it is made of.
"""

from __future__ import annotations

import json
import socket
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from nfldm_ns.diffusion.pipeline import load_pipeline
from nfldm_ns.models import GENERATOR
from nfldm_ns.scenes.writing import atomic_path, require_writable, write_json
from nfldm_ns.studio.generator import Generator
from nfldm_ns.studio.launch import Studio, first_scene, open_studio
from nfldm_ns.studio.scene_tools import FILL, SCALE
from shared.chromium import Page, find_chromium, open_page
from shared.running import run

WINDOW, TITLE_BAR = (1080, 640), 51
GIF_SIZE, GIF_COLOURS = (720, 393), 64
PATIENCE_S = 60
BOX_M, CARES = 4.0, (1, 3)
MAP_UNITS = 16  # of what is drawn, on each side of the map
DRAWN = (("void", (-6, -6, 6, 6)), ("floor", (-3, -3, 3, 6)), ("floor", (3, 2, 6, 5)), ("step up", (-3, 5, 3, 6)))
CANVAS = """(() => {
    const box = document.querySelector('canvas[data-engine]').getBoundingClientRect();
    return [box.x, box.y, box.width, box.height];
})()"""
SETTLED = "Number((document.body.innerText.match(/Resolution: (\\d+)x/) || [0, 0])[1]) > 200"
ANSWER = """new Promise(resolve => {
    const button = [...document.querySelectorAll('button')].find(
        e => e.innerText.trim() === %(label)s && e.offsetParent !== null);
    const changed = () => document.body.innerText.includes(%(text)s);
    const begun = performance.now();
    const end = () => resolve(performance.now() - begun);
    setTimeout(() => resolve(null), %(patience_ms)d);
    const observer = new MutationObserver(() => { if (changed()) { observer.disconnect(); end(); } });
    observer.observe(document.body, {subtree: true, childList: true, characterData: true, attributes: true});
    button.click();
})"""


@dataclass
class Options:
    """Measure and show the studio."""

    output_dir: Path
    """folder for the results"""
    pipeline: Path = Path(GENERATOR)
    """a trained generator that knows maps"""
    seed: int = 0
    """of the first room; further ones follow"""
    num_inference_steps: int = 30
    """denoising steps"""
    answers: int = 10
    """clicks of each kind"""
    threads: int = 2
    """CPU threads"""
    settle_s: float = 0.7
    """wait before a picture of the page is taken, thrice, beside that for the viewer's fine picture"""


@dataclass
class Film:
    """Pictures of a page, for an animation.

    Args:
        page: that is shown.
        folder: for them.
        settle_s: wait before each.
        settled: whether the viewer is at its fine picture.
    """

    page: Page
    folder: Path
    settle_s: float
    settled: Callable[[], bool]
    frames: list[tuple[Image.Image, int]] = field(default_factory=list)

    def take(self, name: str, show_ms: int = 1200) -> None:
        for _ in range(3):  # the fine picture may be that of before
            time.sleep(self.settle_s)
            end = time.monotonic() + PATIENCE_S
            while not self.settled() and time.monotonic() < end:
                time.sleep(0.1)
            self.page.wait_for(SETTLED)
        picture = self.page.picture()
        picture = picture.crop((0, TITLE_BAR, *picture.size))
        picture.save(self.folder / f"{len(self.frames):02d}_{name}.png")
        self.frames.append((picture, show_ms))

    def write(self, path: Path) -> None:
        """All of them as a GIF."""
        small = [picture.resize(GIF_SIZE, Image.Resampling.LANCZOS) for picture, _ in self.frames]
        paletted = [picture.quantize(GIF_COLOURS, dither=Image.Dither.NONE) for picture in small]
        with atomic_path(path) as temporary:
            paletted[0].save(
                temporary,
                format="GIF",
                save_all=True,
                append_images=paletted[1:],
                duration=[show_ms for _, show_ms in self.frames],
                loop=0,
                optimize=True,
            )


def shows_fine_picture(studio: Studio) -> bool:
    """Whether the viewer has nothing better to render for anybody."""
    machines = list(studio.viewer.render_statemachines.values())
    return all(machine.state == "high" and machine.next_action is None for machine in machines)


def answer_ms(page: Page, label: str, text: str) -> float:
    """Milliseconds from a click on a button to a text on the page."""
    words = {"label": json.dumps(label), "text": json.dumps(text), "patience_ms": 1000 * PATIENCE_S}
    found = page.evaluate(ANSWER % words)
    if found is None:
        raise TimeoutError(f"'{label}' is not answered by '{text}'; the page says: {page.text()[:1000]}")
    return found


def work(studio: Studio, begin: Callable[[], None]) -> dict[str, float]:
    """Seconds of a job and of CPU time, from the click to its end."""
    worker = studio.panel.session.worker
    wall, cpu = time.monotonic(), time.process_time()
    before = worker.status
    begin()
    while worker.status is before and time.monotonic() - wall < PATIENCE_S:
        time.sleep(0.01)
    worker.wait()
    if worker.status.failed:
        raise RuntimeError(worker.status.message)
    return {"seconds": time.monotonic() - wall, "cpu_seconds": time.process_time() - cpu}


def time_callbacks(handle: Any) -> dict[str, list[float]]:
    """Milliseconds of what the server does at each click on a button from now on, by the clock and of a CPU."""
    found: dict[str, list[float]] = {"ms": [], "cpu_ms": []}
    callbacks = list(handle._impl.update_cb)

    def timed(event: Any) -> None:
        wall, cpu = time.perf_counter(), time.thread_time()
        for callback in callbacks:
            callback(event)
        found["ms"].append(1000 * (time.perf_counter() - wall))
        found["cpu_ms"].append(1000 * (time.thread_time() - cpu))

    handle._impl.update_cb[:] = [timed]
    return found


def answers(studio: Studio, page: Page, count: int) -> dict[str, dict[str, list[float]]]:
    """Milliseconds of answers at rest, and while a scene is sampled: on the page, and of the server alone."""
    page.place_of("Sample a scene")
    panel = studio.panel
    steps, panel.steps.value = panel.steps.value, 100  # long enough to ask again meanwhile
    server = time_callbacks(panel.sample)
    on_page: dict[str, list[float]] = {"at rest": [], "while sampling": []}
    for _ in range(count):
        on_page["at rest"].append(answer_ms(page, "Sample a scene", "Cancel"))
        time.sleep(0.5)
        on_page["while sampling"].append(answer_ms(page, "Sample a scene", "is not finished"))
        panel.session.worker.cancel()
        panel.session.worker.wait()
        page.wait_for_text("cancelled, nothing changed")
    panel.steps.value, panel.seed.value = steps, 1
    return {
        name: {
            "page_ms": on_page[name],
            "server_ms": server["ms"][first::2],
            "server_cpu_ms": server["cpu_ms"][first::2],
        }
        for first, name in enumerate(on_page)
    }


def mark_and_resample(studio: Studio, page: Page, film: Film) -> dict[str, dict[str, float]]:
    """A box before the visitor, sampled anew, with several kinds of care."""
    panel = studio.panel
    page.open("Box", "Bring it before me")
    panel.width.value = panel.depth.value = BOX_M
    page.click("Bring it before me")
    film.take("box", 1800)
    found = {}
    for care in CARES:
        panel.chosen.value = panel.chosen.options[1]
        panel.walks.value = care
        panel.box_seed.value = 1
        found[f"care {care}"] = work(studio, lambda: page.click("Resample the box"))
        film.take("resampled", 1400)
    page.click("Show the box")
    film.take("without_the_box", 1400)
    return found


def draw_and_sample(studio: Studio, page: Page, film: Film) -> dict[str, float]:
    """A map of a room with a passage to the east, and a scene of it."""
    panel = studio.panel
    page.open("Map", "Draw")
    page.click("Draw")
    film.take("map")
    left, top, width, height = page.evaluate(CANVAS)
    pixels = height * FILL / MAP_UNITS
    for class_name, (x0, y0, x1, y1) in (part for part in DRAWN if part[0] in panel.brush.options):
        panel.brush.value = class_name
        corners = [(left + width / 2 + x * pixels, top + height / 2 - y * pixels) for x, y in ((x0, y0), (x1, y1))]
        page.drag(corners[0], corners[1])
        film.take("drawn", 700)
    page.click("Draw")
    page.open("New", "Sample a scene")
    measured = work(studio, lambda: page.click("Sample a scene"))
    for client in studio.viewer.viser_server.get_clients().values():
        client.camera.position, client.camera.look_at = ((0.0, -2 * SCALE, 0.0), (0.0, 5 * SCALE, -SCALE))
    film.take("by_the_map", 2500)
    assert panel.session.on_show.bev is not None
    return measured


def main(options: Options) -> None:
    if find_chromium() is None:
        raise SystemExit("error: there is no chromium: install it.")
    torch.set_num_threads(options.threads)
    require_writable(options.output_dir)
    source = str(options.pipeline)
    pipeline = load_pipeline(options.pipeline)
    begun = (time.monotonic(), time.process_time())
    folder = first_scene(pipeline, source, options.output_dir / "scenes", options.seed, options.num_inference_steps)
    results: dict[str, object] = {
        "first scene": {"seconds": time.monotonic() - begun[0], "cpu_seconds": time.process_time() - begun[1]}
    }
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = listener.getsockname()[1]
    generator = Generator(source, "cpu", pipeline)
    studio = open_studio([folder], options.output_dir / "scenes", port, generator=generator, browser=None)
    try:
        with open_page(studio.url, WINDOW) as page:
            page.wait_for_text("Ready.")
            studio.panel.steps.value = options.num_inference_steps
            film = Film(page, options.output_dir, options.settle_s, lambda: shows_fine_picture(studio))
            film.take("first", 1800)
            results["answers_ms"] = times = answers(studio, page, options.answers)
            for name, kinds in times.items():
                shown = {
                    kind: [round(f(values), 1) for f in (statistics.median, max)] for kind, values in kinds.items()
                }
                print(f"answers {name}, median and longest: {json.dumps(shown)}")
            results["sample"] = work(studio, lambda: page.click("Sample a scene"))
            page.click("Go to its first view")
            film.take("sampled", 1800)
            results["resample"] = mark_and_resample(studio, page, film)
            results["sample by a map"] = draw_and_sample(studio, page, film)
    finally:
        studio.close()
    film.write(options.output_dir / "studio.gif")
    write_json(options.output_dir / "studio.json", results)
    for name in ("first scene", "sample", "resample", "sample by a map"):
        print(f"{name}: {json.dumps(results[name])}")


if __name__ == "__main__":
    run(main, Options, __doc__)
