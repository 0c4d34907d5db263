"""Draws streets by Panda3D without a display: colours, planar depth and classes of pinhole cameras.

Runs in MetaDrive's own environment and so imports nothing of this package. The world is in metres, right-handed, z up,
the road at z = 0; poses are OpenGL camera-to-worlds. Light is linear: textures and colours are sRGB, and so are
pictures. Shading is Lambert's, with a sun that throws shadows, a sky that lights from above, and fog that grows
exponentially with distance. Gamma is 2, which is sRGB's but for dark colours, and quick.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from panda3d.core import (
    Camera,
    FrameBufferProperties,
    Geom,
    GeomEnums,
    GeomNode,
    GeomTriangles,
    GeomVertexData,
    GeomVertexFormat,
    GraphicsEngine,
    GraphicsOutput,
    GraphicsPipe,
    GraphicsPipeSelection,
    LMatrix4f,
    MaterialAttrib,
    MatrixLens,
    NodePath,
    OrthographicLens,
    SamplerState,
    Shader,
    Texture,
    TransparencyAttrib,
    WindowProperties,
)

NEAR, FAR = 0.3, 2000.0
SKY_RADIUS = 1500.0
SAMPLES = 3
"""Samples of a pixel along each axis; odd, so that one is at its centre, where depth and class are taken."""
_SHADOW_SIZE = 1024
_SHADOW_REACH = 75.0  # metres around the cameras
_SUN_DISTANCE = 300.0

_VERTEX = """#version 140
uniform mat4 p3d_ModelViewProjectionMatrix;
uniform mat4 p3d_ModelMatrix;
in vec4 p3d_Vertex;
in vec3 p3d_Normal;
in vec4 p3d_Color;
in vec2 p3d_MultiTexCoord0;
out vec3 place;
out vec3 normal;
out vec4 colour;
out vec2 uv;
void main() {
    gl_Position = p3d_ModelViewProjectionMatrix * p3d_Vertex;
    place = (p3d_ModelMatrix * p3d_Vertex).xyz;
    normal = mat3(p3d_ModelMatrix) * p3d_Normal;
    colour = p3d_Color;
    uv = p3d_MultiTexCoord0;
}
"""

_FRAGMENT = """#version 140
uniform sampler2D p3d_Texture0;
uniform sampler2D shadow_map;
uniform mat4 shadow_matrix;
uniform vec4 base_colour;
uniform vec4 surface;  // class / 255, glow, two-sided, 0
uniform vec3 eye;
uniform vec3 sun;
uniform vec3 sun_colour;
uniform vec3 sky_light;
uniform vec3 ground_light;
uniform vec4 fog;  // colour, 1/m
in vec3 place;
in vec3 normal;
in vec4 colour;
in vec2 uv;
out vec4 picture;

float lit() {
    vec4 at = shadow_matrix * vec4(place, 1.0);
    vec3 spot = at.xyz * 0.5 + 0.5;
    if (any(lessThan(spot, vec3(0.0))) || any(greaterThan(spot, vec3(1.0)))) return 1.0;
    return texture(shadow_map, spot.xy).r + 0.0012 < spot.z ? 0.0 : 1.0;
}

void main() {
    vec4 texel = texture(p3d_Texture0, uv);
    if (texel.a < 0.5) discard;
    vec3 albedo = texel.rgb * texel.rgb * colour.rgb * colour.rgb * base_colour.rgb;
    vec3 n = normalize(normal);
    if (dot(n, eye - place) < 0.0 && surface.z > 0.5) n = -n;
    float facing = max(dot(n, sun), 0.0);
    vec3 light = mix(ground_light, sky_light, n.z * 0.5 + 0.5);
    if (facing > 0.0) light += sun_colour * facing * lit();
    vec3 shade = albedo * light + surface.y * albedo;
    float clear = exp(-fog.a * distance(place, eye));
    picture = vec4(sqrt(clamp(mix(fog.rgb, shade, clear), 0.0, 1.0)), surface.x);
}
"""

_SKY = """#version 140
uniform sampler2D p3d_Texture0;
uniform vec3 eye;
uniform vec3 sun;
uniform vec3 sun_colour;
uniform vec3 zenith;
uniform vec3 horizon;
uniform vec4 clouds;  // colour, cover
uniform vec2 drift;
in vec3 place;
out vec4 picture;
void main() {
    vec3 d = normalize(place - eye);
    float up = max(d.z, 0.0);
    vec3 sky = mix(horizon, zenith, pow(up, 0.6));
    float near_sun = max(dot(d, sun), 0.0);
    sky += sun_colour * (0.12 * pow(near_sun, 12.0) + 0.6 * pow(near_sun, 600.0));
    vec2 at = d.xy / (up + 0.12) * 0.11 + drift;
    float puff = texture(p3d_Texture0, at).r * 0.65 + texture(p3d_Texture0, at * 2.3).r * 0.35;
    float cover = smoothstep(1.0 - clouds.a, 1.25 - clouds.a, puff) * smoothstep(0.02, 0.25, up);
    picture = vec4(sqrt(clamp(mix(sky, clouds.rgb, cover * 0.85), 0.0, 1.0)), 0.0);
}
"""

_DEPTH = """#version 140
uniform sampler2D p3d_Texture0;
in vec2 uv;
out vec4 picture;
void main() {
    if (texture(p3d_Texture0, uv).a < 0.5) discard;
    picture = vec4(1.0);
}
"""


class StreetDrawer:
    """Draws what `set_scenery` and `set_vehicles` put into the world.

    Args:
        size: width and height of the pictures in pixels.

    Raises:
        RuntimeError: if OpenGL cannot be had without a display.
    """

    def __init__(self, size: tuple[int, int]) -> None:
        self._size = size
        self._engine = GraphicsEngine.get_global_ptr()
        pipe = GraphicsPipeSelection.get_global_ptr().make_module_pipe("p3headlessgl")
        if pipe is None or not pipe.is_valid():
            raise RuntimeError("Panda3D has no pipe p3headlessgl here")
        self._pipe = pipe
        self._buffer = self._make_buffer("picture", size[0] * SAMPLES, size[1] * SAMPLES, None)
        self._colours, self._depths = Texture("colours"), Texture("depths")
        self._buffer.add_render_texture(self._colours, GraphicsOutput.RTM_copy_ram, GraphicsOutput.RTP_color)
        self._depths.set_format(Texture.F_depth_component)
        self._depths.set_component_type(Texture.T_float)
        self._buffer.add_render_texture(self._depths, GraphicsOutput.RTM_copy_ram, GraphicsOutput.RTP_depth)
        self._world = NodePath("world")
        self._world.set_two_sided(True)  # models are not wound alike
        self._world.set_transparency(TransparencyAttrib.M_none, 1)  # the alpha of a picture holds its classes
        self._camera = self._world.attach_new_node(Camera("eye"))
        self._lens = MatrixLens()
        self._camera.node().set_lens(self._lens)
        self._buffer.make_display_region().set_camera(self._camera)
        self._static, self._moving = self._world.attach_new_node("scenery"), self._world.attach_new_node("vehicles")
        self._make_shadows()
        shader = Shader.make(Shader.SL_GLSL, _VERTEX, _FRAGMENT)
        self._world.set_shader(shader)
        self._sky = _sky_dome()
        self._sky.reparent_to(self._world)
        self._sky.set_shader(Shader.make(Shader.SL_GLSL, _VERTEX, _SKY), 1)
        self._sky.hide(1)
        self._world.set_shader_inputs(base_colour=(1, 1, 1, 1), surface=(0, 0, 0, 0))
        self._models: dict[str, NodePath] = {}

    def _make_buffer(self, name: str, width: int, height: int, host: Any) -> Any:
        properties = FrameBufferProperties()
        properties.set_rgba_bits(8, 8, 8, 8)
        properties.set_depth_bits(24)
        flags = GraphicsPipe.BF_refuse_window
        window = WindowProperties(size=(width, height))
        arguments = (self._pipe, name, 0, properties, window, flags)
        buffer = (
            self._engine.make_output(*arguments)
            if host is None
            else self._engine.make_output(*arguments, host.get_gsg(), host)
        )
        if buffer is None:
            raise RuntimeError("OpenGL gives no buffer to draw into")
        self._engine.open_windows()
        if buffer.get_gsg() is None or not buffer.get_gsg().get_supports_basic_shaders():
            raise RuntimeError("this OpenGL has no shaders")
        buffer.set_clear_color((0, 0, 0, 0))
        buffer.set_active(False)  # MetaDrive renders frames of its own
        return buffer

    def _make_shadows(self) -> None:
        self._shadows = self._make_buffer("shadows", _SHADOW_SIZE, _SHADOW_SIZE, self._buffer)
        self._shadow_map = Texture("shadow map")
        self._shadow_map.set_format(Texture.F_depth_component)
        self._shadow_map.set_minfilter(SamplerState.FT_nearest)
        self._shadow_map.set_magfilter(SamplerState.FT_nearest)
        self._shadows.add_render_texture(self._shadow_map, GraphicsOutput.RTM_bind_or_copy, GraphicsOutput.RTP_depth)
        lens = OrthographicLens()
        lens.set_film_size(2 * _SHADOW_REACH, 2 * _SHADOW_REACH)
        lens.set_near_far(_SUN_DISTANCE - 2 * _SHADOW_REACH, _SUN_DISTANCE + 2 * _SHADOW_REACH)
        node = Camera("sun", lens)
        state = NodePath("state")
        state.set_shader(Shader.make(Shader.SL_GLSL, _VERTEX, _DEPTH), 10)
        node.set_initial_state(state.get_state())
        node.set_camera_mask(1)
        self._sun = self._world.attach_new_node(node)
        self._shadows.make_display_region().set_camera(self._sun)

    def set_scenery(self, meshes: Sequence[Mapping[str, Any]], textures: Mapping[str, np.ndarray]) -> None:
        """Replaces all that stands still.

        Args:
            meshes: each with `vertices` `[V, 3]`, `normals` `[V, 3]`, `uv` `[V, 2]`, `colours` `[V, 3]` (sRGB, 0 to 1),
                `triangles` `[T, 3]`, `texture` (a name, or empty), `label` (its class) and `glow`.
            textures: by name, `[H, W, 4]` of 8 bits, the top row first.
        """
        self._static.get_children().detach()
        loaded = {name: _texture(name, pixels) for name, pixels in textures.items()}
        for mesh in meshes:
            node = self._static.attach_new_node(_geometry(mesh))
            node.set_shader_input("surface", (mesh["label"] / 255, mesh["glow"], 1, 0))
            if mesh["texture"]:
                node.set_texture(loaded[mesh["texture"]])

    def add_model(self, name: str, model: NodePath) -> None:
        """Makes a kind of vehicle of a model that faces along y."""
        for node in model.find_all_matches("**/+GeomNode"):
            _materials_to_inputs(node)
        self._models[name] = model

    def set_vehicles(self, vehicles: Sequence[Mapping[str, Any]]) -> None:
        """Replaces all vehicles: each with `kind`, `x`, `y`, `heading` (radians from x), `paint` and `label`."""
        self._moving.get_children().detach()
        for vehicle in vehicles:
            node = self._models[vehicle["kind"]].copy_to(self._moving)
            node.set_pos(vehicle["x"], vehicle["y"], 0)
            node.set_h(math.degrees(vehicle["heading"]) - 90)
            for part in node.find_all_matches("**/+GeomNode"):
                _paint(part, vehicle["paint"], vehicle["label"])

    def set_light(self, light: Mapping[str, Any], centre: Sequence[float]) -> None:
        """Sun, sky and fog; shadows reach `_SHADOW_REACH` around `centre` (x, y)."""
        sun = np.asarray(light["sun"], dtype=float)
        middle = np.array([*centre[:2], 0.0])
        self._sun.set_pos(*(middle + _SUN_DISTANCE * sun).tolist())
        self._sun.look_at(*middle.tolist())
        to_sun = self._sun.get_transform(self._world).get_inverse().get_mat()
        self._world.set_shader_inputs(
            sun=tuple(sun.tolist()),
            sun_colour=tuple(light["sun_colour"]),
            sky_light=tuple(light["sky_light"]),
            ground_light=tuple(light["ground_light"]),
            fog=(*light["fog_colour"], light["fog_density"]),
            zenith=tuple(light["zenith"]),
            horizon=tuple(light["fog_colour"]),
            clouds=(*light["cloud_colour"], light["cloud_cover"]),
            drift=tuple(light["cloud_drift"]),
            shadow_map=self._shadow_map,
            shadow_matrix=LMatrix4f(to_sun * self._sun.node().get_lens().get_projection_mat()),
        )
        self._shadows.set_active(True)

    def draw(self, poses: np.ndarray, focal_lengths: Sequence[float]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Pictures of cameras whose principal point is the middle of the image.

        Args:
            poses: `[N, 3, 4]`, OpenGL camera-to-world.
            focal_lengths: N, in pixels.

        Returns:
            8-bit colours `[N, H, W, 3]`, planar depths `[N, H, W]` in metres (0 in the sky), classes `[N, H, W]`.
        """
        frames = []
        self._buffer.set_active(True)
        for pose, focal in zip(poses, focal_lengths, strict=True):
            self._aim(pose, focal)
            self._engine.render_frame()
            self._shadows.set_active(False)  # the sun sees the same until light or vehicles change
            frames.append(self._read())
        self._buffer.set_active(False)
        colours, depths, labels = (np.stack(values) for values in zip(*frames, strict=True))
        return colours, depths, labels

    def _aim(self, pose: np.ndarray, focal: float) -> None:
        width, height = self._size
        right, up, back, eye = (pose[:, i] for i in range(4))
        # Panda3D's cameras look along y with z up, and its matrices act on rows.
        rows = [(*right, 0), (*(-back), 0), (*up, 0), (*eye, 1)]
        self._camera.set_mat(LMatrix4f(*(float(v) for row in rows for v in row)))
        self._sky.set_pos(*(float(v) for v in eye))
        self._world.set_shader_input("eye", tuple(float(v) for v in eye))
        a, b = (FAR + NEAR) / (FAR - NEAR), -2 * FAR * NEAR / (FAR - NEAR)
        x, y = 2 * focal / width, 2 * focal / height
        self._lens.set_user_mat(LMatrix4f(x, 0, 0, 0, 0, 0, a, 1, 0, y, 0, 0, 0, 0, b, 0))

    def _read(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        width, height = self._size
        shape = (height * SAMPLES, width * SAMPLES)
        pixels = np.frombuffer(self._colours.get_ram_image_as("RGBA"), np.uint8).reshape(*shape, 4)[::-1]
        buffer = np.frombuffer(self._depths.get_ram_image(), np.float32).reshape(shape)[::-1]
        middle = (slice(SAMPLES // 2, None, SAMPLES),) * 2
        share = buffer[middle].astype(np.float64)
        depth = NEAR * FAR / (FAR - share * (FAR - NEAR))
        colour = pixels[..., :3].reshape(height, SAMPLES, width, SAMPLES, 3).mean(axis=(1, 3)).round().astype(np.uint8)
        return colour, np.where(depth < SKY_RADIUS / 2, depth, 0), pixels[middle][..., 3].copy()


def _geometry(mesh: Mapping[str, Any]) -> GeomNode:
    vertices = np.asarray(mesh["vertices"], np.float32)
    layout = GeomVertexFormat.get_v3n3c4t2()
    data = GeomVertexData("mesh", layout, Geom.UH_static)
    data.unclean_set_num_rows(len(vertices))
    packed = np.dtype([("v", "<f4", 3), ("n", "<f4", 3), ("c", "u1", 4), ("t", "<f4", 2)])
    if layout.get_array(0).get_stride() != packed.itemsize:
        raise RuntimeError("Panda3D lays vertices out in another way than expected")
    rows = np.zeros(len(vertices), packed)
    rows["v"], rows["n"], rows["t"] = vertices, mesh["normals"], mesh["uv"]
    rows["c"][:, :3] = np.round(np.asarray(mesh["colours"]) * 255)
    rows["c"][:, 3] = 255
    memoryview(data.modify_array(0)).cast("B").cast("B")[:] = rows.tobytes()
    triangles = GeomTriangles(Geom.UH_static)
    triangles.set_index_type(GeomEnums.NT_uint32)
    indices = triangles.modify_vertices()
    flat = np.asarray(mesh["triangles"], np.uint32).reshape(-1)
    indices.unclean_set_num_rows(len(flat))
    memoryview(indices).cast("B")[:] = flat.tobytes()
    geometry = Geom(data)
    geometry.add_primitive(triangles)
    node = GeomNode("mesh")
    node.add_geom(geometry)
    return node


def _texture(name: str, pixels: np.ndarray) -> Texture:
    height, width = pixels.shape[:2]
    texture = Texture(name)
    texture.setup_2d_texture(width, height, Texture.T_unsigned_byte, Texture.F_rgba)
    texture.set_ram_image_as(np.ascontiguousarray(pixels[::-1]).tobytes(), "RGBA")
    texture.set_minfilter(SamplerState.FT_linear_mipmap_linear)
    texture.set_magfilter(SamplerState.FT_linear)
    return texture


def _sky_dome() -> NodePath:
    across, up = np.meshgrid(np.linspace(0, 2 * np.pi, 33), np.linspace(-np.pi / 2, np.pi / 2, 17))
    vertices = np.stack([np.cos(up) * np.cos(across), np.cos(up) * np.sin(across), np.sin(up)], -1).reshape(-1, 3)
    corner = (np.arange(16)[:, None] * 33 + np.arange(32)).reshape(-1)
    triangles = np.concatenate(
        [np.stack([corner, corner + 1, corner + 34], -1), np.stack([corner, corner + 34, corner + 33], -1)]
    )
    sky = NodePath(
        _geometry(
            {
                "vertices": SKY_RADIUS * vertices,
                "normals": -vertices,
                "uv": np.zeros((len(vertices), 2)),
                "colours": np.ones((len(vertices), 3)),
                "triangles": triangles,
            }
        )
    )
    sky.set_texture(_texture("clouds", _clouds(256)))
    return sky


def _clouds(size: int) -> np.ndarray:
    """Noise that repeats, from 0 to 255: random waves whose strength falls with their frequency."""
    rng = np.random.default_rng(7)
    frequency = np.hypot(np.fft.fftfreq(size)[:, None], np.fft.fftfreq(size)) * size
    waves = np.exp(2j * np.pi * rng.random((size, size))) / np.maximum(frequency, 1) ** 1.7
    waves[0, 0] = 0
    noise = np.fft.ifft2(waves).real
    order = noise.argsort(axis=None).argsort().reshape(size, size) / size**2
    grey = (255 * order).astype(np.uint8)
    return np.stack([grey, grey, grey, np.full_like(grey, 255)], axis=-1)


_BODY = ("body", "paint", "carpaint")


def _materials_to_inputs(node: NodePath) -> None:
    """Gives each part the base colour of its material by name; one node per material."""
    geometry = node.node()
    for i in range(geometry.get_num_geoms()):
        state = geometry.get_geom_state(i)
        part = GeomNode(geometry.name)
        part.add_geom(geometry.modify_geom(i), state)
        child = node.get_parent().attach_new_node(part)
        child.set_transform(node.get_transform())
        attribute = state.get_attrib(MaterialAttrib.get_class_type())
        material = attribute.get_material() if attribute is not None else None
        colour = material.get_base_color() if material is not None and material.has_base_color() else (1, 1, 1, 1)
        is_body = material is not None and any(word in material.name.lower() for word in _BODY)
        child.set_tag("body", "1" if is_body else "")
        child.set_tag("base", " ".join(f"{v:.6f}" for v in tuple(colour)[:3]))
    node.detach_node()


def _paint(part: NodePath, paint: Sequence[float], label: int) -> None:
    base = [float(v) for v in part.get_tag("base").split()]
    colour = [float(v) ** 2 for v in paint] if part.get_tag("body") else base
    part.set_shader_input("base_colour", (*colour, 1))
    part.set_shader_input("surface", (label / 255, 0, 1, 0))
