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

import torch
from PIL import Image

from nfldm_ns.diffusion.pipeline import load_pipeline
from nfldm_ns.models import GENERATOR
from nfldm_ns.scenes.writing import atomic_path, require_writable, write_json
from nfldm_ns.studio.generator import Generator
from nfldm_ns.studio.launch import Studio, first_scene, open_studio
from shared.chromium import Page, find_chromium, open_page
from shared.running import run

WINDOW = (1080, 640)
GIF_SIZE, GIF_COLOURS = (720, 427), 96
SETTLE_S = 3.0
ANSWER = """new Promise(resolve => {
    const button = [...document.querySelectorAll('button')].find(
        e => e.innerText.trim() === %(label)s && e.offsetParent !== null);
    const changed = () => document.body.innerText.includes(%(text)s);
    const begun = performance.now();
    const end = () => resolve(performance.now() - begun);
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
    settle_s: float = SETTLE_S
    """wait for the viewer's fine picture, before one of the page is taken"""


@dataclass
class Film:
    """Pictures of a page, for an animation.

    Args:
        page: that is shown.
        folder: for them.
        settle_s: wait before each.
    """

    page: Page
    folder: Path
    settle_s: float
    frames: list[tuple[Image.Image, int]] = field(default_factory=list)

    def take(self, name: str, show_ms: int = 1200, settle: bool = True) -> None:
        time.sleep(self.settle_s if settle else 0)
        picture = self.page.picture()
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


def answer_ms(page: Page, label: str, text: str) -> float:
    """Milliseconds from a click on a button to a text on the page."""
    return page.evaluate(ANSWER % {"label": json.dumps(label), "text": json.dumps(text)})


def work(studio: Studio, begin: Callable[[], None]) -> dict[str, float]:
    """Seconds of a job and of CPU time, from the click to its end."""
    worker = studio.panel.session.worker
    wall, cpu = time.monotonic(), time.process_time()
    begin()
    while not worker.status.running and time.monotonic() - wall < SETTLE_S:
        time.sleep(0.01)
    worker.wait()
    if worker.status.failed:
        raise RuntimeError(worker.status.message)
    return {"seconds": time.monotonic() - wall, "cpu_seconds": time.process_time() - cpu}


def answers(studio: Studio, page: Page, count: int) -> dict[str, list[float]]:
    """Milliseconds of answers at rest, and while a scene is sampled."""
    page.place_of("Sample a scene")
    found: dict[str, list[float]] = {"at rest": [], "while sampling": []}
    for _ in range(count):
        found["at rest"].append(answer_ms(page, "Sample a scene", "Cancel"))
        time.sleep(0.5)
        found["while sampling"].append(answer_ms(page, "Sample a scene", "is not finished"))
        studio.panel.session.worker.cancel()
        studio.panel.session.worker.wait()
        page.wait_for_text("cancelled, nothing changed")
    return found


def mark_and_resample(studio: Studio, page: Page, film: Film) -> dict[str, float]:
    """A box before the visitor, sampled anew."""
    panel = studio.panel
    page.click("Box")
    page.click("Show the box")
    panel.box.move((0.0, 4.5))
    panel.width.value, panel.depth.value = 5.0, 5.0
    film.take("box")
    measured = work(studio, lambda: page.click("Resample the box"))
    film.take("resampled")
    page.click("Show the box")
    film.take("resampled_without_box", 1800)
    return measured


def draw_and_sample(page: Page, studio: Studio, film: Film) -> dict[str, float]:
    """A map with two rooms and a way between them, and a scene of it."""
    panel = studio.panel
    page.click("Map")
    page.click("Draw")
    film.take("map")
    centre, pixels = page.evaluate("[window.innerWidth / 2, window.innerHeight / 2]"), WINDOW[1] / 16
    for x0, y0, x1, y1 in ((-1, 1, 1, 6), (-5, 3, -2, 6), (-2, 4, -1, 5)):
        corners = [(centre[0] + x * pixels, centre[1] - y * pixels) for x, y in ((x0, y0), (x1, y1))]
        page.drag(corners[0], corners[1])
        film.take("drawn", 500)
    page.click("Draw")
    page.click("New")
    measured = work(studio, lambda: page.click("Sample a scene"))
    page.click("Go to its first view")
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
            film = Film(page, options.output_dir, options.settle_s)
            film.take("first", 1800)
            results["answers_ms"] = times = answers(studio, page, options.answers)
            for name, values in times.items():
                print(f"answer {name}: median {statistics.median(values):.0f} ms, longest {max(values):.0f} ms")
            results["sample"] = work(studio, lambda: page.click("Sample a scene"))
            page.click("Go to its first view")
            film.take("sampled", 1800)
            results["resample"] = mark_and_resample(studio, page, film)
            results["sample by a map"] = draw_and_sample(page, studio, film)
    finally:
        studio.close()
    film.write(options.output_dir / "studio.gif")
    write_json(options.output_dir / "studio.json", results)
    for name in ("first scene", "sample", "resample", "sample by a map"):
        print(f"{name}: {json.dumps(results[name])}")


if __name__ == "__main__":
    run(main, Options, __doc__)
