"""Answers what is asked about MetaDrive's streets, one line of JSON after the other; arrays go through files.

`python server.py` runs in MetaDrive's own environment and imports nothing of this package; `simulator.py` talks to it.
MetaDrive makes the road network of a seed and drives its traffic by its own physics and its IDM policy; pictures are
drawn by `drawing.py`, with the models of MetaDrive's vehicles. MetaDrive's y points to the right of x; here, as all
over this package, it points to the left.

A request has a `do`; an answer has `ok`, or `error`:

- `hello` (`size` of pictures): versions, and what draws.
- `layout` (`seed`, `blocks`, `file`): the lanes, as npz: `points` `[P, 2]` along the middles of all lanes, `starts`
  `[L + 1]` into them, `widths` `[L]`, `lines` `[L, 2]` (left and right: 0 none, 1 broken, 2 continuous, 3 kerb) and
  `yellow` `[L, 2]`.
- `traffic` (`seed`, `cars`): cars on lanes, replacing those that were there.
- `step` (`steps` of 0.1 s): the vehicles afterwards.
- `scenery` (`file`, `meshes`): what stands still; arrays `<i>_vertices` and so on, and `texture_<name>`.
- `draw` (`light`, `centre`, `vehicles`, `poses`, `focal_lengths`, `file`): npz of `colours`, `depths`, `labels`.
"""

from __future__ import annotations

import json
import os
import sys
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TextIO

import numpy as np

SPACING = 1.0  # metres between points of a lane, at most
_LINES = {"none": 0, "broken": 1, "continuous": 2, "side": 3}
_ARRAYS = ("vertices", "normals", "uv", "colours", "triangles")
_CLEARANCE = 9.0  # metres between cars on a lane, at least


class Streets:
    """One road network at a time, with its traffic."""

    def __init__(self) -> None:
        self.environment: Any = None
        self.blocks = 0
        self.drawer: Any = None

    def hello(self, size: list[int]) -> dict[str, Any]:
        from importlib.metadata import version

        from drawing import StreetDrawer

        self.drawer = StreetDrawer((size[0], size[1]))
        self._load_models()
        return {"metadrive": version("metadrive-simulator"), "panda3d": version("panda3d")}

    def _load_models(self) -> None:
        from metadrive.component.vehicle.vehicle_type import vehicle_type
        from panda3d.core import Loader, NodePath

        folder = Path(sys.prefix) / "vehicles"
        folder.mkdir(exist_ok=True)
        for kind, vehicle in vehicle_type.items():
            file = folder / f"{kind}.bam"
            if not file.exists():
                _convert(vehicle, file)
            self.drawer.add_model(kind, NodePath(Loader.get_global_ptr().load_sync(str(file))))

    def layout(self, seed: int, blocks: int, file: str) -> dict[str, Any]:
        if self.environment is None or self.blocks != blocks:
            if self.environment is not None:
                self.environment.close()
            self.environment, self.blocks = _make_environment(blocks), blocks
        self.environment.reset(force_seed=seed)
        lanes = list(_lanes(self.environment))
        points = [_middle(lane) for lane in lanes]
        np.savez(
            file,
            points=np.concatenate(points),
            starts=np.cumsum([0, *map(len, points)]),
            widths=[lane.width_at(lane.length / 2) for lane in lanes],
            lines=[[_LINES.get(str(line), 0) for line in lane.line_types] for lane in lanes],
            yellow=[[colour[2] < 0.5 for colour in lane.line_colors] for lane in lanes],
        )
        return {}

    def traffic(self, seed: int, cars: float) -> dict[str, Any]:
        from metadrive.component.vehicle.vehicle_type import vehicle_type
        from metadrive.policy.idm_policy import IDMPolicy

        manager = self.environment.engine.traffic_manager
        manager.clear_objects([vehicle.id for vehicle in manager._traffic_vehicles])
        manager._traffic_vehicles = []
        rng = np.random.default_rng(seed)
        kinds = [kind for kind in ("s", "m", "l", "xl", "default") if kind in vehicle_type]
        blocks = self.environment.engine.current_map.blocks
        ends = [socket for block in (blocks[0], blocks[-1]) for socket in block.get_socket_list()]
        for lane in _lanes(self.environment):
            if any(socket.is_socket_node(lane.index[0]) for socket in ends):
                continue  # MetaDrive finds no destination for cars that begin there
            for at in np.arange(4.0, lane.length - 4.0, _CLEARANCE):
                if rng.random() >= cars or lane.index[0] == ">":  # where the agent stands
                    continue
                where = {"spawn_lane_index": lane.index, "spawn_longitude": float(at), "enable_reverse": False}
                kind = vehicle_type[kinds[int(rng.integers(len(kinds)))]]
                if _is_free(manager._traffic_vehicles, lane.position(at, 0)):
                    car = manager.spawn_object(kind, vehicle_config=where)
                    manager.add_policy(car.id, IDMPolicy, car, int(rng.integers(2**31)))
                    manager._traffic_vehicles.append(car)
        return {"cars": len(manager._traffic_vehicles)}

    def step(self, steps: int) -> dict[str, Any]:
        engine = self.environment.engine
        for _ in range(steps):  # what the environment's own step does, but for the agent's rewards and its end
            engine.before_step({agent: [0.0, -1.0] for agent in self.environment.vehicles})
            engine.step(self.environment.config["decision_repeat"])
            engine.after_step()
        manager = engine.traffic_manager
        return {"vehicles": [_vehicle(car, k) for k, car in enumerate(manager._traffic_vehicles)]}

    def scenery(self, file: str, meshes: list[dict[str, Any]]) -> dict[str, Any]:
        with np.load(file) as arrays:
            prefix = "texture_"
            textures = {name[len(prefix) :]: arrays[name] for name in arrays.files if name.startswith(prefix)}
            whole = [{**mesh, **{key: arrays[f"{i}_{key}"] for key in _ARRAYS}} for i, mesh in enumerate(meshes)]
        self.drawer.set_scenery(whole, textures)
        return {}

    def draw(
        self,
        light: dict[str, Any],
        centre: list[float],
        vehicles: list[dict[str, Any]],
        poses: list[Any],
        focal_lengths: list[float],
        file: str,
    ) -> dict[str, Any]:
        self.drawer.set_vehicles(vehicles)
        self.drawer.set_light(light, centre)
        colours, depths, labels = self.drawer.draw(np.asarray(poses, float), focal_lengths)
        np.savez(file, colours=colours, depths=depths.astype(np.float32), labels=labels)
        return {}


def _convert(vehicle: Any, file: Path) -> None:
    """Puts a vehicle's body and wheels together, in Panda3D's own format, which loads faster than MetaDrive's glTF."""
    import gltf
    from metadrive.engine.asset_loader import AssetLoader
    from panda3d.core import Loader, NodePath

    folder, _, place, _ = vehicle.path
    whole = NodePath("vehicle")

    def add(name: str, position: Any, scale: float) -> None:
        path = AssetLoader.file_path("models", folder, name)
        part = NodePath(gltf.load_model(Loader.get_global_ptr(), path)).copy_to(whole)
        part.set_pos(*position)
        part.set_scale(scale)

    add("vehicle.gltf", place, 1.0)
    for name, along in (("front", vehicle.FRONT_WHEELBASE), ("back", -vehicle.REAR_WHEELBASE)):
        for side in (1, -1):
            hub = (side * vehicle.LATERAL_TIRE_TO_CENTER, along, vehicle.TIRE_RADIUS)
            add(f"right_tire_{name}.gltf", hub, side * float(vehicle.TIRE_MODEL_CORRECT))
    temporary = file.with_name(f".{os.getpid()}_{file.name}")
    whole.write_bam_file(str(temporary))
    temporary.replace(file)


def _make_environment(blocks: int) -> Any:
    from metadrive.component.map.base_map import BaseMap
    from metadrive.envs.metadrive_env import MetaDriveEnv

    BaseMap.MAX_LANE_NUM, BaseMap.MAX_LANE_WIDTH = 2, 3.7  # streets of towns rather than motorways
    return MetaDriveEnv(
        {
            "use_render": False,
            "start_seed": 0,
            "environment_num": 1_000_000,
            "map": blocks,
            "traffic_density": 0.0,
            "traffic_mode": "trigger",
            "random_lane_num": True,
            "random_lane_width": True,
        }
    )


def _lanes(environment: Any) -> Iterator[Any]:
    graph = environment.engine.current_map.road_network.graph
    for start in graph.values():
        for lanes in start.values():
            yield from lanes


def _middle(lane: Any) -> np.ndarray:
    count = max(2, int(np.ceil(lane.length / SPACING)) + 1)
    points = np.array([lane.position(float(s), 0.0) for s in np.linspace(0, lane.length, count)])
    return points * [1, -1]


def _is_free(vehicles: list[Any], spot: np.ndarray) -> bool:
    return all(np.hypot(*(np.asarray(car.position) - spot)) > _CLEARANCE for car in vehicles)


def _vehicle(car: Any, number: int) -> dict[str, Any]:
    from metadrive.component.vehicle.vehicle_type import vehicle_type

    kind = next(name for name, found in vehicle_type.items() if found is type(car))
    x, y = (float(v) for v in car.position)
    size = {"length": float(car.LENGTH), "width": float(car.WIDTH)}
    return {"kind": kind, "number": number, "x": x, "y": -y, "heading": -float(car.heading_theta), **size}


def serve(requests: TextIO, answers: TextIO) -> None:
    """Answers until the requests end."""
    streets = Streets()
    for line in requests:
        request = json.loads(line)
        try:
            answer = {"ok": True, **getattr(streets, request.pop("do"))(**request)}
        except Exception as error:  # any of it is the client's to tell
            traceback.print_exc()
            answer = {"ok": False, "error": f"{type(error).__name__}: {error}"}
        answers.write(json.dumps(answer) + "\n")
        answers.flush()


def main() -> None:
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what MetaDrive prints must not come between the answers
    serve(sys.stdin, answers)


if __name__ == "__main__":
    main()
