"""How well scenes can be edited, and how long it takes (docs/editing.md).

    python benchmarks/editing.py --data DATA --output-dir OUT [--what bev resample combine interpolate time pictures]

- `bev`: how far scenes sampled for held-out maps agree with them: IoU of free floor and of walls as level rays from
  the origin find them in V and in the map (`nfldm_ns.metrics.layout`), beside the same with all other maps, and
  beside the held-out scenes themselves after stage 1 and after stages 1 and 2. And what a block of wall that is painted
  into a map changes elsewhere, at the same seed. Generators without maps are skipped there.
- `resample`: PSNR of what is seen outside a resampled region against before, in views that see some of it; LPIPS
  between views into it of different seeds; their KID to the same views of other, unedited scenes.
- `combine`: KID of views across a seam to the same views of other, unedited scenes, with and without harmonisation.
- `interpolate`: LPIPS from frame to frame, and KID of the frames between the ends likewise.
- `time`: seconds of each edit, medians.
- `pictures`: strips of the first seeds, not selected.

Each leaves a JSON in `--output-dir`, and is not measured again where that is there. Needs the weights of FID's
Inception and of LPIPS (`nfldm-weights get fid-inception lpips-vgg`).
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict
from functools import partial
from itertools import pairwise
from typing import Any

import torch
from jaxtyping import Bool
from sampling import fingerprints
from torch import Tensor

from nfldm_ns.editing.scenes import encode_again, encode_real_scene
from nfldm_ns.metrics.images import MAX_PSNR, psnr
from nfldm_ns.metrics.layout import Layout, agreement, map_layout, voxel_layout
from nfldm_ns.reports.report import Table
from nfldm_ns.reports.resources import device_info
from nfldm_ns.scenes.views import Views
from nfldm_ns.scenes.writing import require_writable
from shared.comparisons import stored
from shared.edited_views import (
    ACROSS,
    BLOCK_AT_M,
    BLOCK_M,
    INTO,
    Editor,
    Maps,
    Options,
    combine,
    fingerprint_of,
    harmonise,
    interpolate,
    kid,
    kid_cells,
    mean,
    paint_block,
    resample,
    seen_outside,
    takes_maps,
)
from shared.editing_pictures import draw_pictures
from shared.running import run

SOME = 0.1  # share of a view's pixels from which on it sees something
REAL = "real scenes, stages 1 and 2"
WITH_MAP = "sampled with the map"

# Maps


def measure_bev(editor: Editor) -> dict[str, Any]:
    """Agreement with maps, and what an edit of the map leaves alone."""
    options, collection = editor.options, editor.collection
    maps = Maps.of(collection, options.num_maps)
    given = map_layout(maps.bev, collection.bev_classes, editor.grid.shape[1:], editor.grid.aabb, options.layout)
    found = {name: [] for name in ("real scenes, stage 1", REAL, "sampled without maps")}
    if takes_maps(editor.pipeline):
        found[WITH_MAP] = []
    for i, scene_id in enumerate(maps.scene_ids):
        views = Views.stack([collection.load_scene(scene_id).source])
        with torch.no_grad():  # learned refinement takes gradients of its own
            voxels = editor.stage1.encode(views.to(editor.device))
            decoded = editor.pipeline.latent_autoencoder.decode(editor.pipeline.latent_autoencoder.encode(voxels))
        grids = [voxels, decoded, editor.scene(i).grid]
        if WITH_MAP in found:
            grids.append(editor.sample(options.first_scene + i, maps.bev[i]).grid)
        for layouts, grid in zip(found.values(), grids, strict=True):
            layouts.append(voxel_layout(grid.to("cpu"), options.layout))
        print(f"maps: {i + 1} of {len(maps.scene_ids)}", flush=True)
    rows = {name: compare_with_maps(Layout.cat(layouts), given) for name, layouts in found.items()}
    result: dict[str, Any] = {"num_maps": len(maps.scene_ids), "layout": asdict(options.layout), "rows": rows}
    if WITH_MAP in rows:
        result["way"] = way(rows[WITH_MAP], rows[REAL])
        result["block"] = measure_block(editor, maps, given)
    return result


def compare_with_maps(found: Layout, given: Layout) -> dict[str, float]:
    """Mean IoU of scenes with their own maps, its standard error over scenes, and with all other maps (`shuffled_`)."""
    own = agreement(found, given)
    others = [agreement(found, given.rolled(shift)) for shift in range(1, len(given))]
    result = {}
    for name, values in own.items():
        known = values[~values.isnan()]
        result[name] = float(known.mean())
        result[f"{name}_error"] = float(known.std() / len(known) ** 0.5)
        result[f"shuffled_{name}"] = float(torch.stack([other[name] for other in others]).nanmean())
    return result


def way(sampled: dict[str, float], real: dict[str, float]) -> dict[str, float]:
    """How far sampled scenes are on the way from shuffled maps (0) to real scenes (1)."""
    return {
        name: (sampled[name] - sampled[f"shuffled_{name}"]) / (real[name] - sampled[f"shuffled_{name}"])
        for name in ("floor", "wall")
    }


def measure_block(editor: Editor, maps: Maps, given: Layout) -> dict[str, Any]:
    """What a block of wall in the map changes at the same seed, beside what another seed changes."""
    options, collection = editor.options, editor.collection
    values: dict[str, list[float]] = {}
    for i in range(len(maps.scene_ids)):
        layout = given[i]
        painted = paint_block(maps.bev[i], layout, collection.bev_classes, editor.grid.aabb, options.layout.solid)
        if painted is None:
            continue
        bev, yaw, block = painted
        seed = options.first_scene + i
        scenes = [
            editor.sample(seed, maps.bev[i]),
            editor.sample(seed, bev),
            editor.sample(seed + len(maps.scene_ids), maps.bev[i]),
        ]
        cameras = {"away": editor.cameras([yaw + 90, yaw + 180, yaw + 270]), "toward": editor.cameras([yaw])}
        for side, some in cameras.items():
            first, edited, other = (editor.views(scene, some) for scene in scenes)
            for name, views in (("edited", edited), ("other_seed", other)):
                values.setdefault(f"{name}_{side}_psnr", []).append(float(psnr(views, first).mean()))
                values.setdefault(f"{name}_{side}_lpips", []).append(editor.distance(views, first))
        seen = layout.floor[0] & block
        for name, scene in (("before", scenes[0]), ("after", scenes[1])):
            free = voxel_layout(scene.grid, options.layout).floor[0]
            values.setdefault(f"floor_{name}", []).append(float(free[seen].float().mean()))
        print(f"blocks: {i + 1} of {len(maps.scene_ids)}", flush=True)
    return {"num_scenes": len(next(iter(values.values()), [])), **{name: mean(found) for name, found in values.items()}}


def bev_tables(found: dict[str, Any]) -> list[Table]:
    layout = found["layout"]
    caption = (
        f"IoU of what level rays {layout['band_m'][0]:g} to {layout['band_m'][1]:g} m above the floor find within "
        f"{layout['radius_m']:g} m of the origin with {found['num_maps']} held-out maps. Higher is better."
    )
    rows = []
    for name, values in found["rows"].items():
        cells = [values[f"{kind}{part}{end}"] for part in ("floor", "wall") for kind, end in _OWN_AND_SHUFFLED]
        rows.append([name, *cells])
    if "way" in found:
        floor, wall = (found["way"][part] for part in ("floor", "wall"))
        rows.append(["on the way from shuffled to real", floor, None, None, wall, None, None])
    columns = ["", "floor", "standard error", "floor, other maps", "walls", "standard error", "walls, other maps"]
    tables = [Table(columns, rows, caption)]
    if "block" in found:
        block = found["block"]
        rows = [
            [title, *(block[f"{name}_{side}_{metric}"] for side in ("away", "toward") for metric in ("psnr", "lpips"))]
            for name, title in (("edited", "the block"), ("other_seed", "another seed"))
        ]
        columns = ["what changed", "PSNR of views away (dB)", "LPIPS", "PSNR of the view toward it (dB)", "LPIPS"]
        caption = (
            f"A block of wall of {BLOCK_M:g} x {BLOCK_M:g} m, painted {BLOCK_AT_M:g} m from the origin into "
            f"{block['num_scenes']} maps; of the floor there {100 * block['floor_before']:.0f} % is free before, "
            f"{100 * block['floor_after']:.0f} % after."
        )
        tables.append(Table(columns, rows, caption, digits=(0, 1, 3, 1, 3)))
    return tables


_OWN_AND_SHUFFLED = (("", ""), ("", "_error"), ("shuffled_", ""))

# Regions


def measure_resample(editor: Editor) -> dict[str, Any]:
    """What stays outside of a resampled region, and what comes inside."""
    options, region = editor.options, editor.region
    changed = region.weights(options.seam) > 0
    into = editor.toward(region, INTO)
    outside: dict[str, list[float]] = {"in front": [], "beside": []}
    diversity, resampled = [], []
    for i in range(options.num_scenes):
        scene = editor.scene(i)
        before, depth = editor.look(scene.grid, editor.around)
        kept = dict(zip(outside, seen_outside(depth, editor.around, scene.grid, changed), strict=True))
        variants = []
        for variant in range(options.num_variants):
            edited = resample(editor, i, editor.edit_seed(i * options.num_variants + variant))
            after = editor.views(edited, editor.around)
            for name, values in outside.items():
                values += outside_psnr(before, after, kept[name])
            variants.append(editor.views(edited, into))
        diversity.append(editor.diversity(variants))
        resampled += variants
        print(f"resampling: {i + 1} of {options.num_scenes}", flush=True)
    unedited = [editor.views(editor.scene(i), into) for i in range(2 * options.num_scenes)]
    own, reference = unedited[: options.num_scenes], unedited[options.num_scenes :]
    real = editor.features(reference)
    others = editor.diversity(reference[: options.num_variants])
    return {
        "share": region.share,
        "outside": {
            name: {"views": len(v), "mean": mean(v), "least": min(v), "share_from_35_db": mean([x >= 35 for x in v])}
            for name, v in outside.items()
            if v
        },
        "diversity": {
            "resampled": mean(diversity),
            "other scenes": others,
        },
        "kid": {
            "resampled": kid(real, editor.features(resampled)),
            "not resampled": kid(real, editor.features(own)),
        },
    }


def outside_psnr(before: Tensor, after: Tensor, kept: Bool[Tensor, "views height width"]) -> list[float]:
    """PSNR in dB of the kept pixels of each view that has some of them and some others."""
    values = []
    for first, second, mask in zip(before, after, kept, strict=True):
        if SOME <= float(mask.float().mean()) <= 1 - SOME:
            error = float((first - second).square().mean(dim=0)[mask].mean())
            values.append(min(MAX_PSNR, -10 * math.log10(max(error, 1e-30))))
    return values


def resample_tables(found: dict[str, Any], options: Options) -> list[Table]:
    names = {"in front": "surface before the region", "beside": "ray never enters it"}
    outside = [
        [names[name], values["views"], values["mean"], values["least"], 100 * values["share_from_35_db"]]
        for name, values in found["outside"].items()
    ]
    caption = f"Outside of `{options.region}` (seam {options.seam:g} m), against before, in views that see some of it."
    columns = ["pixels", "views", "mean PSNR (dB)", "least", "views of 35 dB or more (%)"]
    inside = [
        [title, found["diversity"][lpips], *kid_cells(found["kid"][name])]
        for title, name, lpips in (
            ("resampled", "resampled", "resampled"),
            ("not resampled", "not resampled", "other scenes"),
        )
    ]
    inside_caption = (
        f"Views into it: LPIPS between {options.num_variants} seeds (below: between as many scenes), and KID to "
        f"{options.num_scenes} other scenes; {options.num_scenes} scenes are edited."
    )
    return [
        Table(columns, outside, caption, digits=1),
        Table(["", "LPIPS between samples", "KID", "standard error"], inside, inside_caption, digits=(0, 3, 4, 4)),
    ]


def measure_combine(editor: Editor) -> dict[str, Any]:
    """KID of views across seams."""
    options = editor.options
    across = editor.toward(editor.place, ACROSS)
    views: dict[str, list[Tensor]] = {"not combined": [], "joined": [], "harmonised": []}
    for i in range(options.num_scenes):
        joined = combine(editor, i)
        scenes = [editor.scene(i), joined, harmonise(editor, joined, editor.edit_seed(i))]
        for found, scene in zip(views.values(), scenes, strict=True):
            found.append(editor.views(scene, across))
        print(f"combining: {i + 1} of {options.num_scenes}", flush=True)
    others = [editor.scene(options.num_scenes + i) for i in range(options.num_scenes)]
    reference = editor.features([editor.views(scene, across) for scene in others])
    return {"kid": {name: kid(reference, editor.features(found)) for name, found in views.items()}}


def combine_tables(found: dict[str, Any], options: Options) -> list[Table]:
    caption = (
        f"Views across the seam of `{options.place}` ({options.seam:g} m; harmonised with {options.harmonise:g} of the "
        f"steps) to those of {options.num_scenes} other scenes that are not combined; {options.num_scenes} scenes each."
    )
    rows = [[name, *kid_cells(values)] for name, values in found["kid"].items()]
    return [Table(["", "KID", "standard error"], rows, caption, digits=4)]


def measure_interpolate(editor: Editor) -> dict[str, Any]:
    """How evenly scenes change on the way, and how real they look between the ends."""
    options = editor.options
    ends, largest, steps, between = [], [], [], []
    for i in range(options.num_pairs):
        frames = [editor.views(scene, editor.around) for scene in interpolate(editor, i, options.num_frames)]
        changes = [editor.distance(a, b) for a, b in pairwise(frames)]
        ends.append(editor.distance(frames[0], frames[-1]))
        largest.append(max(changes))
        steps.append(mean(changes))
        between += frames[1:-1]
        print(f"interpolating: {i + 1} of {options.num_pairs}", flush=True)
    last = options.num_pairs + 1  # of the ends
    seeds = range(last), range(last, last + options.num_scenes)
    own, reference = (editor.features([editor.views(editor.scene(i), editor.around) for i in some]) for some in seeds)
    return {
        "lpips": {"ends": mean(ends), "mean_step": mean(steps), "largest_step": mean(largest)},
        "kid": {"between": kid(reference, editor.features(between)), "ends": kid(reference, own)},
    }


def interpolate_tables(found: dict[str, Any], options: Options) -> list[Table]:
    lpips, distances = found["lpips"], found["kid"]
    caption = f"{options.num_pairs} ways of {options.num_frames} scenes, seen all around."
    rows = [
        ["LPIPS of the ends", lpips["ends"]],
        ["LPIPS from frame to frame, mean", lpips["mean_step"]],
        ["largest of a way", lpips["largest_step"]],
        [f"KID of frames between to {options.num_scenes} other scenes", distances["between"]["kid"]],
        ["KID of the ends", distances["ends"]["kid"]],
    ]
    return [Table(["", ""], rows, caption, digits=4)]


# Time


def measure_time(editor: Editor) -> dict[str, Any]:
    """Medians of the seconds of each edit, of one scene, without writing it."""
    edits: dict[str, Callable[[], Any]] = {"sampling a scene": lambda: editor.sample(0)}
    if editor.options.data is not None:
        test = editor.collection.split("test")[0]
        bev = editor.collection.load_scene(test).bev
        if takes_maps(editor.pipeline) and bev is not None:
            edits["sampling a scene for a map"] = lambda: editor.sample(0, bev)
        edits["encoding a real scene"] = partial(encode_real_scene, editor.pipeline, editor.collection, test)
    edits["encoding V again"] = lambda: encode_again(editor.pipeline, editor.scene(0))
    edits["resampling a region"] = lambda: resample(editor, 0, editor.edit_seed(0))
    edits["resampling a region, --resamplings 1"] = lambda: resample(editor, 0, editor.edit_seed(0), resamplings=1)
    edits["combining two scenes"] = lambda: combine(editor, 0)
    joined = combine(editor, 0)
    edits[f"harmonising, --harmonise {editor.options.harmonise:g}"] = lambda: harmonise(
        editor, joined, editor.edit_seed(0)
    )
    edits["interpolating, one scene between two"] = lambda: list(interpolate(editor, 0, 3))
    seconds = {}
    for name, edit in edits.items():
        seconds[name] = _median_seconds(edit, editor.options.repeats)
        print(f"{name}: {seconds[name]:.2f} s", flush=True)
    return {"seconds": seconds, "threads": torch.get_num_threads(), "device": device_info()}


def _median_seconds(edit: Callable[[], Any], repeats: int) -> float:
    def seconds() -> float:
        begun = time.perf_counter()
        edit()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        return time.perf_counter() - begun

    return statistics.median([seconds() for _ in range(repeats + 1)][1:])


def time_tables(found: dict[str, Any], options: Options) -> list[Table]:
    caption = f"{found['threads']} CPU threads, {options.num_inference_steps} steps of each latent, medians."
    return [Table(["edit", "seconds"], [[k, v] for k, v in found["seconds"].items()], caption, digits=2)]


# All of it

COMMON = ("num_inference_steps", "first_scene")
DEPENDS = {
    "bev": ("num_maps", "guidance_scale", "layout"),
    "resample": ("num_scenes", "num_variants", "region", "seam"),
    "combine": ("num_scenes", "place", "seam", "harmonise"),
    "interpolate": ("num_scenes", "num_pairs", "num_frames"),
    "time": ("region", "place", "seam", "harmonise", "repeats", "threads"),
}
MEASURE: dict[str, Callable[[Editor], dict[str, Any]]] = {
    "bev": measure_bev,
    "resample": measure_resample,
    "combine": measure_combine,
    "interpolate": measure_interpolate,
    "time": measure_time,
}
TABLES: dict[str, Callable[[dict[str, Any], Options], list[Table]]] = {
    "bev": lambda found, options: bev_tables(found),
    "resample": resample_tables,
    "combine": combine_tables,
    "interpolate": interpolate_tables,
    "time": time_tables,
}


def part_settings(editor: Editor, part: str) -> dict[str, Any]:
    """All that the numbers of a part depend on."""
    options = asdict(editor.options)
    chosen = {name: options[name] for name in (*COMMON, *DEPENDS[part])}
    collection = fingerprint_of(editor.collection) if part in ("bev", "time") and options["data"] else None
    return {"components": fingerprints(editor.pipeline), "collection": collection, **chosen}


def main(options: Options) -> None:
    options.check()
    require_writable(options.output_dir)
    editor = Editor(options)
    for part in MEASURE:
        if part not in options.what:
            continue
        path = options.output_dir / f"{part}.json"
        found = stored(path, part_settings(editor, part), partial(MEASURE[part], editor))
        if part == "bev" and not takes_maps(editor.pipeline):
            print(f"{options.pipeline} takes no maps: scenes sampled with maps are left out.")
        for table in TABLES[part](found, options):
            print("\n" + table.markdown(), flush=True)
    if "pictures" in options.what:
        draw_pictures(editor)


if __name__ == "__main__":
    run(main, Options, __doc__)
