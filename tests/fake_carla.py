"""What a recording needs of CARLA's Python API, over rooms whose pictures are known."""

from __future__ import annotations

import math
import types
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from tests.synthetic import BoxRoom, level_cameras


@dataclass
class Location:
    x: float = 0.0
    y: float = 0.0
    z: float = 0.0


@dataclass
class Rotation:
    pitch: float = 0.0
    yaw: float = 0.0
    roll: float = 0.0


@dataclass
class Transform:
    location: Location = field(default_factory=Location)
    rotation: Rotation = field(default_factory=Rotation)

    def get_matrix(self) -> list[list[float]]:
        """As CARLA's own code has it."""
        cy, sy = math.cos(math.radians(self.rotation.yaw)), math.sin(math.radians(self.rotation.yaw))
        cr, sr = math.cos(math.radians(self.rotation.roll)), math.sin(math.radians(self.rotation.roll))
        cp, sp = math.cos(math.radians(self.rotation.pitch)), math.sin(math.radians(self.rotation.pitch))
        return [
            [cp * cy, cy * sp * sr - sy * cr, -cy * sp * cr - sy * sr, self.location.x],
            [cp * sy, sy * sp * sr + cy * cr, -sy * sp * cr + cy * sr, self.location.y],
            [sp, -cp * sr, cp * cr, self.location.z],
            [0.0, 0.0, 0.0, 1.0],
        ]


class Blueprint:
    def __init__(self, name: str) -> None:
        self.id, self.attributes = name, dict.fromkeys(("image_size_x", "image_size_y", "fov"), "")

    def has_attribute(self, key: str) -> bool:
        return key in self.attributes

    def set_attribute(self, key: str, value: str) -> None:
        self.attributes[key] = value


class Actor:
    def __init__(self, world: World, blueprint: Blueprint) -> None:
        self.world, self.blueprint, self.transform = world, blueprint, Transform()
        self.callback: Callable[[Any], None] | None = None
        world.actors.append(self)

    def set_transform(self, transform: Transform) -> None:
        self.transform = transform

    def set_autopilot(self, _: bool) -> None:
        pass

    def listen(self, callback: Callable[[Any], None]) -> None:
        self.callback = callback

    def stop(self) -> None:
        self.callback = None

    def destroy(self) -> None:
        self.world.actors.remove(self)

    def picture(self, frame: int) -> Any:
        """BGRA: colours, or depth as a share of 1000 m in 24 bits, the lowest in red."""
        attributes, where = self.blueprint.attributes, self.transform
        size = int(attributes["image_size_x"])
        eye = torch.tensor([[where.location.x, -where.location.y, where.location.z]])
        yaw = torch.tensor([math.radians(-where.rotation.yaw)])
        views = self.world.room.render(level_cameras(eye, yaw, size, math.radians(float(attributes["fov"]))))
        pixels = np.full((size, size, 4), 255, np.uint8)
        if self.blueprint.id.endswith("rgb"):
            pixels[..., 2::-1] = views.images[0].mul(255).round().byte().permute(1, 2, 0).numpy()
        else:
            number = np.round(views.depths[0, 0].double().numpy() / 1000 * (256**3 - 1)).astype(np.int64)
            for channel, shift in ((2, 0), (1, 8), (0, 16)):
                pixels[..., channel] = number >> shift & 255
        return types.SimpleNamespace(frame=frame, transform=where, width=size, height=size, raw_data=pixels.tobytes())


@dataclass
class World:
    town: str
    room: BoxRoom
    spots: list[Transform]
    actors: list[Actor] = field(default_factory=list)
    settings: Any = field(
        default_factory=lambda: types.SimpleNamespace(synchronous_mode=False, fixed_delta_seconds=None)
    )
    frame: int = 100
    weathers: list[str] = field(default_factory=list)
    silent: bool = False

    def get_map(self) -> Any:
        return types.SimpleNamespace(name=f"Carla/Maps/{self.town}", get_spawn_points=lambda: self.spots)

    def get_settings(self) -> Any:
        return types.SimpleNamespace(**vars(self.settings))

    def apply_settings(self, settings: Any) -> None:
        self.settings = settings

    def get_blueprint_library(self) -> Any:
        return types.SimpleNamespace(find=Blueprint, filter=lambda _: [Blueprint("vehicle.a"), Blueprint("vehicle.b")])

    def spawn_actor(self, blueprint: Blueprint, _: Transform) -> Actor:
        return Actor(self, blueprint)

    def try_spawn_actor(self, blueprint: Blueprint, _: Transform) -> Actor | None:
        return Actor(self, blueprint) if len(self.actors) % 2 == 0 else None

    def set_weather(self, name: str) -> None:
        self.weathers.append(name)

    def tick(self) -> int:
        assert self.settings.synchronous_mode and self.settings.fixed_delta_seconds
        self.frame += 1
        for actor in list(self.actors):
            if actor.callback is not None and not self.silent:
                actor.callback(actor.picture(self.frame))
        return self.frame


def server(worlds: dict[str, World], versions: tuple[str, str] = ("0.9.15", "0.9.15"), fails: str = "") -> Any:
    """A module like CARLA's, whose every client sees these worlds."""
    state = {"world": next(iter(worlds.values()))}

    class Client:
        def __init__(self, host: str, port: int) -> None:
            pass

        def set_timeout(self, _: float) -> None:
            pass

        def get_client_version(self) -> str:
            return versions[0]

        def get_server_version(self) -> str:
            if fails:
                raise RuntimeError(fails)
            return versions[1]

        def get_world(self) -> World:
            return state["world"]

        def load_world(self, town: str) -> World:
            state["world"] = worlds[town]
            return state["world"]

        def get_available_maps(self) -> list[str]:
            return [f"/Game/Carla/Maps/{town}" for town in worlds]

        def get_trafficmanager(self) -> Any:
            ignore = lambda _: None  # noqa: E731
            return types.SimpleNamespace(set_synchronous_mode=ignore, set_random_device_seed=ignore)

    presets = types.SimpleNamespace(ClearNoon="ClearNoon", WetSunset="WetSunset")
    return types.SimpleNamespace(
        Client=Client, Transform=Transform, Location=Location, Rotation=Rotation, WeatherParameters=presets
    )
