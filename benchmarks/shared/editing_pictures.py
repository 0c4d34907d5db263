"""Labelled strips of edits, of the first seeds, as `benchmarks/editing.py` draws them."""

from __future__ import annotations

import torch
from jaxtyping import Float
from PIL import Image
from torch import Tensor

from nfldm_ns.editing.region import Region
from nfldm_ns.editing.resampling import resample_region
from nfldm_ns.editing.scenes import encode_real_scene
from nfldm_ns.generated.scene_files import GeneratedScene
from nfldm_ns.metrics.layout import map_layout
from nfldm_ns.reports.galleries import bev_colors, density_from_above, image_grid, write_png
from shared.edited_views import Editor, Maps, combine, harmonise, interpolate, paint_block, takes_maps

VARIANTS = 3
FRAMES = 7
COLORS = 128  # of a picture: palettes keep it small
TILE = 128
SIDES = {"north": 90.0, "east": 0.0, "south": 270.0, "west": 180.0}

Picture = Float[Tensor, "3 height width"]


def draw_pictures(editor: Editor) -> None:
    """Writes `resample.png`, `combine.png` and `interpolate.png`; with data and a generator of maps also `bev.png`."""
    strips = {"resample": draw_resample(editor), "combine": draw_combine(editor), "interpolate": draw_ways(editor)}
    if editor.options.data is not None and takes_maps(editor.pipeline):
        strips["bev"] = draw_bev(editor)
    for name, picture in strips.items():
        path = editor.options.output_dir / f"{name}.png"
        write_png(path, picture.quantize(COLORS))
        print(f"{path}: {path.stat().st_size / 1000:.0f} kB", flush=True)


def above(scene: GeneratedScene, region: Region) -> Picture:
    """A scene from above, north up, its region in red."""
    density = density_from_above(scene.grid)[0]
    red = torch.tensor([0.9, 0.1, 0.1])[:, None, None]
    return torch.where(region.columns.flip(0), 0.5 * density + 0.5 * red, density)


def front(editor: Editor, scene: GeneratedScene, region: Region) -> Picture:
    """What is seen toward the middle of a region."""
    return editor.views(scene, editor.toward(region, (0.0,)))[0]


def draw_resample(editor: Editor) -> Image.Image:
    """Sampled scenes, and with data one real place, whose region is sampled anew."""
    region, options = editor.region, editor.options
    scenes = {f"seed {options.first_scene + i}": editor.scene(i) for i in range(options.picture_rows)}
    if options.data is not None:
        test = editor.collection.split("test")[0]
        scenes["a real\nplace"] = encode_real_scene(editor.pipeline, editor.collection, test)
    columns: dict[str, list[Picture]] = {"from above": [], "before": []}
    for scene in scenes.values():
        columns["from above"].append(above(scene, region))
        columns["before"].append(front(editor, scene, region))
        for i in range(VARIANTS):
            seed = editor.edit_seed(i)
            settings = {"seam_m": options.seam, "num_inference_steps": editor.steps}
            edited = resample_region(editor.pipeline, scene, region, seed, **settings)
            columns.setdefault(f"sampled anew: {i + 1}", []).append(front(editor, edited, region))
    return image_grid(columns, list(scenes), TILE)


def draw_combine(editor: Editor) -> Image.Image:
    """Pairs of scenes, joined and harmonised, with the seam in the middle of the view."""
    place, options = editor.place, editor.options
    side = editor.toward(place, (45.0,))
    columns: dict[str, list[Picture]] = {n: [] for n in ("first", "second", "where", "joined", "harmonised", "above")}
    for i in range(options.picture_rows):
        joined = combine(editor, i)
        second = editor.scene((i + 1) % options.num_scenes)
        grown = harmonise(editor, joined, editor.edit_seed(i))
        for name, scene in (("first", editor.scene(i)), ("second", second), ("joined", joined), ("harmonised", grown)):
            columns[name].append(editor.views(scene, side)[0])
        columns["where"].append(above(joined, place))
        columns["above"].append(density_from_above(grown.grid)[0])
    return image_grid(columns, [f"seed {options.first_scene + i}" for i in range(options.picture_rows)], TILE)


def draw_ways(editor: Editor) -> Image.Image:
    """Frames of the ways between scenes, seen by one camera."""
    options = editor.options
    camera = editor.cameras([0.0])
    rows = [
        [editor.views(scene, camera)[0] for scene in interpolate(editor, i, FRAMES)]
        for i in range(options.picture_rows)
    ]
    columns = {f"{i}/{FRAMES - 1}": [row[i] for row in rows] for i in range(FRAMES)}
    seeds = [options.first_scene + i for i in range(options.picture_rows)]
    return image_grid(columns, [f"{seed} to {seed + 1}" for seed in seeds], TILE)


def draw_bev(editor: Editor) -> Image.Image:
    """Held-out maps and what is sampled for them; below each the same with a block of wall painted into the map."""
    options, classes = editor.options, editor.collection.bev_classes
    maps = Maps.of(editor.collection, options.num_maps)
    given = map_layout(maps.bev, classes, editor.grid.shape[1:], editor.grid.aabb, options.layout)
    columns: dict[str, list[Picture]] = {name: [] for name in ("map", "from above", *SIDES)}
    labels = []
    for i in range(min(options.picture_rows, len(maps.scene_ids))):
        painted = paint_block(maps.bev[i], given[i], classes, editor.grid.aabb, options.layout.solid)
        for bev, label in ((maps.bev[i], f"map {i}"), (None if painted is None else painted[0], "with a\nblock")):
            if bev is None:
                continue
            scene = editor.sample(options.first_scene + i, bev)
            views = editor.views(scene, editor.cameras(list(SIDES.values())))
            columns["map"].append(bev_colors(bev, classes))
            columns["from above"].append(density_from_above(scene.grid)[0])
            for name, view in zip(SIDES, views, strict=True):
                columns[name].append(view)
            labels.append(label)
    return image_grid(columns, labels, TILE)
