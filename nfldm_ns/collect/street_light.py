"""The light of a street scene, by a seed: where the sun stands, its colour, the sky's, the clouds and the fog."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

SUN_ELEVATIONS = {
    "noon": (45, 70),
    "afternoon": (22, 45),
    "evening": (6, 16),
    "overcast": (30, 60),
    "fog": (12, 35),
    "dusk": (3, 7),
}
"""Least and greatest height of the sun in degrees, by what kind of light it is."""
_SHARES = (0.22, 0.24, 0.18, 0.16, 0.1, 0.1)


@dataclass(frozen=True)
class StreetLight:
    """Colours are linear, not sRGB; 1 makes a white surface white.

    Attributes:
        kind: of `SUN_ELEVATIONS`.
        sun: unit vector towards it, z up.
        sky_light, ground_light: on what faces up and down; what faces aside gets their mean.
        fog_colour: also that of the horizon; `fog_density` is 1/m.
        cloud_cover: from 0 to 1; `cloud_drift` moves the clouds.
    """

    kind: str
    sun: tuple[float, ...]
    sun_colour: tuple[float, ...]
    sky_light: tuple[float, ...]
    ground_light: tuple[float, ...]
    fog_colour: tuple[float, ...]
    fog_density: float
    zenith: tuple[float, ...]
    cloud_colour: tuple[float, ...]
    cloud_cover: float
    cloud_drift: tuple[float, ...]


def street_light(rng: np.random.Generator) -> StreetLight:
    """Draws the light of one scene."""
    kind = str(rng.choice(list(SUN_ELEVATIONS), p=_SHARES))
    elevation, azimuth = np.radians(rng.uniform(*SUN_ELEVATIONS[kind])), rng.uniform(0, 2 * np.pi)
    sun = (np.cos(elevation) * np.cos(azimuth), np.cos(elevation) * np.sin(azimuth), np.sin(elevation))
    values = _COLOURS[kind]
    strength = rng.uniform(0.85, 1.1)

    def colour(name: str, spread: float = 0.06) -> tuple[float, ...]:
        return _floats(np.clip(strength * np.array(values[name]) * (1 + rng.normal(0, spread, 3)), 0, 2))

    def between(name: str) -> float:
        low, high = values[name]
        return float(rng.uniform(low, high))

    return StreetLight(
        kind=kind,
        sun=_floats(sun),
        sun_colour=colour("sun"),
        sky_light=colour("sky"),
        ground_light=colour("ground"),
        fog_colour=colour("horizon"),
        fog_density=between("fog"),
        zenith=colour("zenith"),
        cloud_colour=colour("clouds", 0.03),
        cloud_cover=between("cover"),
        cloud_drift=_floats(rng.uniform(0, 1, 2)),
    )


def _floats(values: Any) -> tuple[float, ...]:
    return tuple(round(float(v), 5) for v in values)


_COLOURS: dict[str, dict[str, tuple[float, ...]]] = {
    "noon": {
        "sun": (0.95, 0.9, 0.8),
        "sky": (0.34, 0.4, 0.5),
        "ground": (0.17, 0.16, 0.14),
        "horizon": (0.58, 0.7, 0.85),
        "zenith": (0.1, 0.24, 0.6),
        "clouds": (0.9, 0.9, 0.92),
        "fog": (0.0005, 0.003),
        "cover": (0.0, 0.5),
    },
    "afternoon": {
        "sun": (0.95, 0.82, 0.6),
        "sky": (0.28, 0.33, 0.42),
        "ground": (0.15, 0.13, 0.11),
        "horizon": (0.68, 0.7, 0.72),
        "zenith": (0.12, 0.25, 0.52),
        "clouds": (0.9, 0.86, 0.8),
        "fog": (0.001, 0.004),
        "cover": (0.0, 0.55),
    },
    "evening": {
        "sun": (1.0, 0.52, 0.2),
        "sky": (0.2, 0.21, 0.28),
        "ground": (0.12, 0.09, 0.08),
        "horizon": (0.85, 0.45, 0.22),
        "zenith": (0.13, 0.16, 0.34),
        "clouds": (0.8, 0.45, 0.3),
        "fog": (0.002, 0.006),
        "cover": (0.1, 0.6),
    },
    "overcast": {
        "sun": (0.08, 0.08, 0.08),
        "sky": (0.5, 0.52, 0.55),
        "ground": (0.2, 0.2, 0.2),
        "horizon": (0.55, 0.57, 0.6),
        "zenith": (0.42, 0.45, 0.5),
        "clouds": (0.55, 0.56, 0.58),
        "fog": (0.002, 0.007),
        "cover": (0.7, 0.95),
    },
    "fog": {
        "sun": (0.2, 0.19, 0.17),
        "sky": (0.42, 0.43, 0.44),
        "ground": (0.22, 0.22, 0.21),
        "horizon": (0.6, 0.61, 0.62),
        "zenith": (0.5, 0.52, 0.55),
        "clouds": (0.6, 0.6, 0.6),
        "fog": (0.015, 0.035),
        "cover": (0.2, 0.6),
    },
    "dusk": {
        "sun": (0.18, 0.1, 0.1),
        "sky": (0.12, 0.14, 0.24),
        "ground": (0.06, 0.06, 0.08),
        "horizon": (0.32, 0.22, 0.28),
        "zenith": (0.03, 0.05, 0.14),
        "clouds": (0.2, 0.16, 0.24),
        "fog": (0.003, 0.008),
        "cover": (0.1, 0.6),
    },
}
