"""Captures as people have them: every key and format is used, or refused in a sentence."""

from __future__ import annotations

import json
import math
import os
import re
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import torch
from PIL import Image

from nfldm_ns.collect.checking import check_collection, turned_images
from nfldm_ns.collect.formats.nerfstudio import read_capture
from nfldm_ns.collect.undistortion import undistort, undistorted_mask
from nfldm_ns.commands.collect import main
from nfldm_ns.errors import UserInputError
from nfldm_ns.scenes.collection import SceneCollection, read_transforms
from nfldm_ns.scenes.image_files import open_image, read_depth_file, read_rgb, rgb_image
from nfldm_ns.scenes.views import Views
from nfldm_ns.scenes.writing import write_scene
from tests.synthetic import AABB, BoxRoom, surround_cameras

BOX = [str(v) for corner in AABB for v in corner]
SIZE = 48


@pytest.fixture
def views() -> Views:
    generator = torch.Generator().manual_seed(1)
    return BoxRoom.random(generator).render(surround_cameras(12, SIZE, generator))


@pytest.fixture
def capture(views: Views, tmp_path: Path) -> Path:
    """A good capture, as another tool would leave it."""
    folder = tmp_path / "hall"
    write_scene(folder, views, views[:0])
    change(folder, lambda content: [content.pop(f"{split}_filenames") for split in ("train", "val", "test")])
    return folder


def change(folder: Path, edit) -> None:
    path = folder / "transforms.json"
    content = json.loads(path.read_text())
    edit(content)
    path.write_text(json.dumps(content))


def set_everywhere(content: dict, **values: Any) -> None:
    """At the top and in no frame."""
    for frame in content["frames"]:
        for key in values:
            frame.pop(key, None)
    content.update(values)


def run(root: Path, captures: list[Path], *options: str) -> int:
    command = ["import", str(root), "--scenes", *map(str, captures), "--image-size", "24", "24", "--box", *BOX]
    with pytest.raises(SystemExit) as end:
        main([*command, *options])
    return int(end.value.code or 0)


def imported(root: Path, capture: Path, *options: str) -> Views:
    assert run(root, [capture], *options) == 0
    return SceneCollection.open(root).load_scene(capture.name).source


class TestImages:
    def test_16_bit_grey_keeps_its_brightness(self, tmp_path: Path) -> None:
        values = np.array([[0, 257 * 100], [65535, 257 * 7]], np.uint16)
        Image.fromarray(values).save(tmp_path / "grey.png")
        assert np.array_equal(read_rgb(tmp_path / "grey.png", "x")[..., 0], [[0, 100], [255, 7]])

    def test_orientation_is_honoured(self, tmp_path: Path) -> None:
        picture = np.arange(6, dtype=np.uint8).reshape(2, 3) * 40
        exif = Image.Exif()
        exif[0x0112] = 6  # shown after a quarter turn clockwise
        Image.fromarray(picture).save(tmp_path / "a.png", exif=exif)
        assert np.array_equal(read_rgb(tmp_path / "a.png", "x")[..., 0], np.rot90(picture, -1))

    def test_transparent_is_white_in_every_mode(self, tmp_path: Path) -> None:
        clear = Image.new("RGBA", (2, 1), (200, 0, 0, 0))
        clear.putpixel((1, 0), (200, 0, 0, 255))
        for name, image in {"rgba": clear, "la": clear.convert("LA")}.items():
            image.save(tmp_path / f"{name}.png")
            assert read_rgb(tmp_path / f"{name}.png", "x")[0, 0].tolist() == [255, 255, 255]
        palette = Image.fromarray(np.array([[0, 1]], np.uint8), "P")
        palette.putpalette([9, 9, 9, 50, 60, 70])
        palette.save(tmp_path / "p.png", transparency=0)
        assert read_rgb(tmp_path / "p.png", "x")[0].tolist() == [[255, 255, 255], [50, 60, 70]]

    def test_cmyk_and_black_and_white(self, tmp_path: Path) -> None:
        Image.new("CMYK", (8, 8), (0, 255, 255, 0)).save(tmp_path / "a.jpg")
        assert np.abs(read_rgb(tmp_path / "a.jpg", "x").astype(int) - [255, 0, 0]).max() < 8
        Image.fromarray(np.array([[True, False]])).save(tmp_path / "b.png")
        assert read_rgb(tmp_path / "b.png", "x")[0, :, 0].tolist() == [255, 0]

    def test_of_a_phone_s_photo_the_first_picture_is_read(self, tmp_path: Path) -> None:
        photo, smaller = Image.new("RGB", (32, 32), (200, 40, 40)), Image.new("RGB", (16, 16))
        photo.save(tmp_path / "a.jpg", format="MPO", save_all=True, append_images=[smaller])
        with Image.open(tmp_path / "a.jpg") as image:
            assert image.format == "MPO" and image.n_frames == 2
        pixels = read_rgb(tmp_path / "a.jpg", "x").astype(int)
        assert pixels.shape == (32, 32, 3) and np.abs(pixels - [200, 40, 40]).max() < 8

    def test_damaged_exif_data_are_a_sentence(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        def fail(image: Image.Image) -> None:
            raise SyntaxError("not a TIFF file")

        Image.new("RGB", (4, 4)).save(tmp_path / "a.jpg")
        monkeypatch.setattr("PIL.ImageOps.exif_transpose", fail)
        with pytest.raises(UserInputError, match="EXIF data of .*a.jpg are damaged .*: remove or repair"):
            read_rgb(tmp_path / "a.jpg", "x")

    def test_what_is_no_picture_is_a_sentence(self, tmp_path: Path) -> None:
        frames = [Image.new("L", (4, 4), value) for value in (0, 255)]
        frames[0].save(tmp_path / "moving.gif", save_all=True, append_images=frames[1:])
        (tmp_path / "text.png").write_text("no")
        Image.new("F", (4, 4)).save(tmp_path / "float.tiff")
        for name, message in (
            ("moving.gif", "holds 2 pictures"),
            ("text.png", "not a readable image .*: mend it"),
            ("none.png", "is missing: mend it"),
            ("float.tiff", "mode F"),
        ):
            with pytest.raises(UserInputError, match=message):
                path = tmp_path / name
                rgb_image(open_image(path, "mend it"), path)


class TestDepthFiles:
    def test_openexr(self, tmp_path: Path) -> None:
        depth = np.array([[0.5, 3.25], [np.inf, -1.0]], np.float32)
        os.environ["OPENCV_IO_ENABLE_OPENEXR"] = "1"
        cv2.imwrite(str(tmp_path / "one.exr"), depth)
        cv2.imwrite(str(tmp_path / "three.exr"), np.stack([depth] * 3, axis=-1))
        cv2.imwrite(str(tmp_path / "colours.exr"), np.random.default_rng(0).random((2, 2, 3), np.float32))
        (tmp_path / "cut.exr").write_bytes((tmp_path / "one.exr").read_bytes()[:40])
        for name in ("one", "three"):
            assert read_depth_file(tmp_path / f"{name}.exr").tolist() == [[0.5, 3.25], [0.0, 0.0]]
        with pytest.raises(UserInputError, match="no depth of one channel"):
            read_depth_file(tmp_path / "colours.exr")
        with pytest.raises(UserInputError, match="no readable OpenEXR file"):
            read_depth_file(tmp_path / "cut.exr")

    def test_all_formats_hold_the_same(self, tmp_path: Path) -> None:
        depth = np.array([[0, 1500, 2500], [300, 40, 65535]], np.uint16)
        Image.fromarray(depth).save(tmp_path / "d.png")
        Image.fromarray(depth).save(tmp_path / "d16.tiff")
        Image.fromarray(depth.astype(np.float32)).save(tmp_path / "d.tiff")
        np.save(tmp_path / "d.npy", depth[..., None].astype(np.float32))
        np.savez(tmp_path / "d.npz", depth=depth)
        for path in sorted(tmp_path.iterdir()):
            assert np.array_equal(read_depth_file(path), depth), path.name

    def test_what_is_not_finite_or_negative_is_unknown(self, tmp_path: Path) -> None:
        np.save(tmp_path / "d.npy", np.array([[np.nan, np.inf, -1.0, 2.0]]))
        assert read_depth_file(tmp_path / "d.npy").tolist() == [[0, 0, 0, 2]]

    @pytest.mark.parametrize(
        ("name", "message"),
        [("rgb.png", "mode RGB"), ("two.npz", "holds 2 arrays"), ("cut.npz", "no readable array"), ("o.npy", "array")],
    )
    def test_others_are_a_sentence(self, tmp_path: Path, name: str, message: str) -> None:
        Image.new("RGB", (4, 4)).save(tmp_path / "rgb.png")
        np.savez(tmp_path / "two.npz", a=np.zeros(1), b=np.zeros(1))
        (tmp_path / "cut.npz").write_bytes((tmp_path / "two.npz").read_bytes()[:40])
        np.save(tmp_path / "o.npy", np.array([{}]), allow_pickle=True)
        with pytest.raises(UserInputError, match=message):
            read_depth_file(tmp_path / name)


class TestKeys:
    def test_angles_stand_for_focal_lengths_and_extensions_are_found(self, capture: Path, tmp_path: Path) -> None:
        def blender(content: dict) -> None:
            for frame in content["frames"]:
                for key in ("fl_x", "fl_y", "cx", "cy", "w", "h", "depth_file_path"):
                    frame.pop(key, None)
                frame["file_path"] = "./" + frame["file_path"].removesuffix(".png")
            content["camera_angle_x"] = math.pi / 2

        change(capture, blender)
        cameras = imported(tmp_path / "out", capture).cameras
        for name in ("fx", "fy", "cx", "cy"):
            torch.testing.assert_close(getattr(cameras, name), torch.full((8, 1), 12.0))

    def test_intrinsics_scale_with_the_image_as_a_whole(self, capture: Path, tmp_path: Path) -> None:
        before = imported(tmp_path / "a", capture).cameras
        keys = ("fl_x", "fl_y", "cx", "cy", "w", "h")
        change(capture, lambda c: [frame.update({k: frame[k] * 4 for k in keys}) for frame in c["frames"]])
        after = imported(tmp_path / "b", capture).cameras
        torch.testing.assert_close(after.fx, before.fx)
        torch.testing.assert_close(after.cx, before.cx)

    def test_of_a_turned_photo_pixels_and_intrinsics_agree(self, capture: Path, tmp_path: Path) -> None:
        upright = imported(tmp_path / "a", capture)
        exif = Image.Exif()
        exif[0x0112] = 6
        for path in (capture / "images").iterdir():
            with Image.open(path) as image:
                turned = image.transpose(Image.Transpose.ROTATE_90)
            turned.save(path, exif=exif)
        after = imported(tmp_path / "b", capture)
        assert torch.equal(after.images, upright.images)
        torch.testing.assert_close(after.cameras.fx, upright.cameras.fx)

    def test_backslashes(self, capture: Path, tmp_path: Path) -> None:
        before = imported(tmp_path / "a", capture)

        def windows(content: dict) -> None:
            for frame in content["frames"]:
                for key in ("file_path", "depth_file_path"):
                    frame[key] = frame[key].replace("/", "\\")

        change(capture, windows)
        after = imported(tmp_path / "b", capture)
        assert torch.equal(after.images, before.images) and torch.equal(after.depths, before.depths)

    def test_null_is_as_good_as_absent(self, capture: Path, tmp_path: Path) -> None:
        before = imported(tmp_path / "a", capture)
        nothing = dict.fromkeys(("k1", "w", "h", "mask_path", "distortion_params", "camera_model"))
        change(capture, lambda content: [frame.update(nothing) for frame in content["frames"]])
        after = imported(tmp_path / "b", capture)
        torch.testing.assert_close(after.cameras.fx, before.cameras.fx)

    def test_applied_scale_is_undone(self, capture: Path, tmp_path: Path) -> None:
        before = imported(tmp_path / "a", capture)

        def shrink(content: dict) -> None:
            content["applied_scale"] = 0.1
            for frame in content["frames"]:
                pose = np.array(frame["transform_matrix"])
                pose[:3, 3] *= 0.1
                frame["transform_matrix"] = pose.tolist()

        change(capture, shrink)
        after = imported(tmp_path / "b", capture)
        torch.testing.assert_close(after.cameras.camera_to_worlds, before.cameras.camera_to_worlds, atol=1e-5, rtol=0)

    def test_the_unit_of_depth_may_stand_in_the_file(self, capture: Path, tmp_path: Path) -> None:
        before = imported(tmp_path / "a", capture)
        change(capture, lambda content: content.update(depth_unit_scale_factor=0.002))
        torch.testing.assert_close(imported(tmp_path / "b", capture).depths, before.depths * 2)
        same = imported(tmp_path / "c", capture, "--depth-unit-scale", "0.001")
        torch.testing.assert_close(same.depths, before.depths)

    def test_the_unit_of_depth_may_stand_in_frames(self, capture: Path, tmp_path: Path) -> None:
        before = imported(tmp_path / "a", capture)
        change(capture, lambda c: [frame.update(depth_unit_scale_factor=0.002) for frame in c["frames"]])
        torch.testing.assert_close(imported(tmp_path / "b", capture).depths, before.depths * 2)

    def test_a_null_depth_path_is_no_depth(self, capture: Path, tmp_path: Path) -> None:
        change(capture, lambda c: [frame.update(depth_file_path=None) for frame in c["frames"]])
        assert imported(tmp_path / "out", capture).depths is None
        assert SceneCollection.open(tmp_path / "out").load_scene("hall").source.depths is None

    def test_keys_that_are_not_known_are_told(self, capture: Path, tmp_path: Path, capsys) -> None:
        def add(content: dict) -> None:
            content.update(aabb_scale=16, integer_depth_scale=0.001, applied_scale=None)
            content["frames"][1].update(sharpness=3.0, depth_path="d.png")

        change(capture, add)
        assert read_capture(capture).unread == ("integer_depth_scale", "depth_path")
        assert run(tmp_path / "out", [capture]) == 0
        assert (
            "Not read, for nothing is known of such keys: 'integer_depth_scale', 'depth_path'"
            in capsys.readouterr().out
        )

    def test_lenses_that_are_said_to_be_none_are_no_lenses(self, capture: Path) -> None:
        change(capture, lambda c: c.update(rolling_shutter=[0, 0, 0, 0], latlong=False, omega=0.0))
        assert read_capture(capture).unread == ()

    def test_splits_of_the_file_are_kept(self, capture: Path, tmp_path: Path) -> None:
        names = [frame["file_path"] for frame in json.loads((capture / "transforms.json").read_text())["frames"]]
        change(capture, lambda content: content.update(train_filenames=names[4:], test_filenames=names[:4]))
        root = tmp_path / "out"
        assert run(root, [capture]) == 0
        scene = SceneCollection.open(root).load_scene("hall")
        targets = np.stack([np.asarray(Image.open(capture / n).resize((24, 24), Image.Resampling.BOX)) for n in names])
        shown = scene.target.images.mul(255).round().byte().permute(0, 2, 3, 1).numpy()
        assert np.array_equal(shown, targets[:4])

    def test_depth_of_another_size_than_its_image(self, capture: Path, tmp_path: Path) -> None:
        before = imported(tmp_path / "a", capture)
        for path in (capture / "depths").iterdir():
            depth = np.asarray(Image.open(path))
            Image.fromarray(depth[1::2, 1::2]).save(path)  # the pixels that are looked at
        assert torch.equal(imported(tmp_path / "b", capture).depths, before.depths)

    @pytest.mark.parametrize(
        ("edit", "message"),
        [
            (lambda c: c["frames"][3].update(k1=[0.1]), "k1 of the frame images/.* is \\[0.1\\] .*valid number"),
            (lambda c: c["frames"][3].update(w="64"), "w of the frame images/"),
            (lambda c: c["frames"][3].pop("transform_matrix"), "lacks transform_matrix of the frame images/"),
            (lambda c: c["frames"].append("x"), "content of frame 12 .* is 'x'"),
            (lambda c: c.update(frames=[]), "frames in .* is \\[\\]"),
            (lambda c: c["frames"][1].update(transform_matrix=[[1, 2], [3, 4]]), "transform_matrix of the frame"),
            (
                lambda c: c["frames"][1].update(file_path=c["frames"][0]["file_path"]),
                "Two frames .* have the file_path",
            ),
            (lambda c: c["frames"][1].update(mask_path="m.png"), "m.png is missing: restore it or remove mask_path"),
            (
                lambda c: c["frames"][2].update(mask_path=c["frames"][2]["file_path"]),
                "mode RGB, but a mask must be grey",
            ),
            (lambda c: c.update(fisheye_crop_radius=0.1), "Nothing of .*/images/.* is left of its mask or fisheye"),
            (
                lambda c: c["frames"][1].update(rolling_shutter=[0, 0, 0.1, 0]),
                "has rolling_shutter, of a lens or shutter",
            ),
            (lambda c: c.update(latlong=True), "has latlong, of a lens or shutter"),
            (lambda c: c["frames"][1].update(depth_file_path=7), "depth_file_path of the frame images/.* is 7"),
            (lambda c: c["frames"][1].update(file_path="a\0b"), "no file can have this name"),
            (lambda c: c.update(camera_model="EQUIRECTANGULAR"), "is EQUIRECTANGULAR: only OpenCV's"),
            (lambda c: c.update(k4=0.1), "has k4, k5 or k6"),
            (lambda c: set_everywhere(c, h=36), "another aspect: is it turned or cropped"),
            (lambda c: c["frames"][0].pop("cx"), "cx or cy is missing"),
            (lambda c: c["frames"][2].pop("depth_file_path"), "give all of them one, or none"),
            (lambda c: c.update(train_filenames=["images/none.png"]), "lists images/none.png in train_filenames"),
            (lambda c: c["frames"][0].update(depth_file_path="d.exr"), "d.exr is missing: restore it or remove"),
        ],
    )
    def test_what_cannot_be_used_is_one_sentence(self, capture, tmp_path, capsys, edit, message) -> None:
        change(capture, edit)
        before = {path: path.read_bytes() for path in capture.rglob("*") if path.is_file()}
        assert run(tmp_path / "out", [capture]) == 2
        error = capsys.readouterr().err
        assert error.count("error: ") == 1 and "Traceback" not in error
        assert re.search(message, " ".join(error.split())), error
        assert not (tmp_path / "out").exists() and not list(tmp_path.glob(".*"))
        assert before == {path: path.read_bytes() for path in capture.rglob("*") if path.is_file()}


class TestMasks:
    def write_masks(self, capture: Path, mask: np.ndarray, *indices: int) -> None:
        """The mask of these frames, by default of all."""
        Image.fromarray(mask).save(capture / "mask.png")

        def name(content: dict) -> None:
            for i in indices or range(len(content["frames"])):
                content["frames"][i]["mask_path"] = "mask.png"

        change(capture, name)

    @pytest.mark.parametrize("kind", [np.uint8, bool, np.uint16])
    def test_masked_pixels_stay_masked_and_the_rest_as_it_was(self, capture: Path, tmp_path: Path, kind) -> None:
        before = imported(tmp_path / "a", capture)
        mask = np.ones((SIZE, SIZE), kind)
        mask[:11, 20:] = 0  # half of a new pixel's row
        self.write_masks(capture, mask)
        after = imported(tmp_path / "b", capture)
        expected = np.ones((24, 24), bool)
        expected[:6, 10:] = False
        assert np.array_equal(after.masks[:, 0], np.broadcast_to(expected, (8, 24, 24)))
        assert torch.equal(after.images, before.images)
        assert torch.equal(after.depths, before.depths * after.masks)

    def test_frames_without_a_mask_are_valid_and_captures_without_any_have_none(self, capture, tmp_path) -> None:
        assert imported(tmp_path / "a", capture).masks is None
        assert not (tmp_path / "a" / "scenes" / "hall" / "masks").exists()
        mask = np.ones((SIZE, SIZE), np.uint8)
        mask[:, :4] = 0
        self.write_masks(capture, mask, 0)
        root = tmp_path / "b"
        assert run(root, [capture]) == 0
        scene = SceneCollection.open(root).load_scene("hall")
        masked = (~Views.cat([scene.source, scene.target]).masks).flatten(1).float().mean(1)
        assert sorted(masked.tolist()) == [0.0] * 11 + [pytest.approx(1 / 12)]

    def test_of_a_turned_photo_the_mask_may_be_turned_alike(self, capture: Path, tmp_path: Path) -> None:
        mask = np.ones((SIZE, SIZE), np.uint8)
        mask[:12] = 0
        self.write_masks(capture, mask)
        upright = imported(tmp_path / "a", capture)
        exif = Image.Exif()
        exif[0x0112] = 6
        with Image.open(capture / "mask.png") as image:
            turned = image.transpose(Image.Transpose.ROTATE_90)
        turned.save(capture / "mask.png", exif=exif)
        assert torch.equal(imported(tmp_path / "b", capture).masks, upright.masks)

    def test_masks_of_half_the_size_and_of_another_aspect(self, capture: Path, tmp_path: Path, capsys) -> None:
        mask = np.ones((SIZE // 2, SIZE // 2), np.uint8)
        mask[5] = 0
        self.write_masks(capture, mask)
        assert np.array_equal(imported(tmp_path / "a", capture).masks[0, 0], mask > 0)
        self.write_masks(capture, mask[:20])
        assert run(tmp_path / "b", [capture]) == 2
        assert "mask.png is 24 x 20, another aspect than its image's 48 x 48" in capsys.readouterr().err

    def test_a_mask_of_everything_is_one_sentence(self, capture: Path, tmp_path: Path, capsys) -> None:
        self.write_masks(capture, np.zeros((SIZE, SIZE), np.uint8))
        assert run(tmp_path / "out", [capture]) == 2
        error = capsys.readouterr().err
        assert error.count("error: ") == 1 and "is left of its mask" in error and not (tmp_path / "out").exists()

    def test_what_lies_beyond_the_crop_radius_is_masked(self, capture: Path, tmp_path: Path) -> None:
        keys = ("fl_x", "fl_y", "cx", "cy", "w", "h")
        change(capture, lambda c: [frame.update({k: frame[k] * 4 for k in keys}) for frame in c["frames"]])
        change(capture, lambda c: c.update(fisheye_crop_radius=4 * 20.0))  # in the pixels of w and h
        rows, columns = np.mgrid[:SIZE, :SIZE] + 0.5 - SIZE / 2
        seen = (np.hypot(columns, rows) <= 20).reshape(24, 2, 24, 2).all(axis=(1, 3))
        masks = imported(tmp_path / "out", capture).masks
        assert np.array_equal(masks[3, 0], seen) and 0.4 < seen.mean() < 0.55

    @pytest.mark.parametrize("fisheye", [False, True])
    def test_masks_are_undistorted_with_their_images(self, fisheye: bool) -> None:
        """No pixel that is called valid holds any of the colour under the mask."""
        image = np.zeros((72, 96, 3), np.uint8)
        mask = np.ones((72, 96), bool)
        mask[20:40, 10:50] = False
        image[~mask] = 255
        distortion = (0.05, -0.01, 0, 0, 0, 0) if fisheye else (-0.2, 0.05, 0, 0, 0, 0)
        flat, _, moved, _ = undistort(image, None, mask, TestLenses.INTRINSICS, distortion, fisheye, "here")
        assert moved is not None and flat[moved].max() == 0
        assert float((flat[~moved] == 255).mean()) > 0.75

    def test_pixels_that_no_lens_saw_are_masked(self) -> None:
        across, down = (values.astype(np.float32) for values in np.meshgrid(np.arange(6) - 1.0, np.arange(4)))
        moved = undistorted_mask(np.ones((4, 6), bool), across, down)
        assert not moved[:, 0].any() and moved[:, 1:].all()
        assert undistorted_mask(np.ones((4, 6), bool), across + 1, down) is None


class TestLenses:
    INTRINSICS = np.array([60.0, 60.0, 48.0, 36.0])

    def dots(self, distortion: tuple[float, ...], fisheye: bool) -> tuple[np.ndarray, np.ndarray]:
        """An image of dots at given directions, as a distorted lens shows them."""
        points = np.array([[x, y, 1.0] for x in (-0.4, 0.0, 0.4) for y in (-0.3, 0.0, 0.3)])
        fx, fy, cx, cy = self.INTRINSICS
        matrix = np.array([[fx, 0, cx - 0.5], [0, fy, cy - 0.5], [0, 0, 1]])
        k1, k2, k3, k4, p1, p2 = distortion
        if fisheye:
            lens, zero = np.array([k1, k2, k3, k4]), np.zeros((3, 1))
            pixels, _ = cv2.fisheye.projectPoints(points[:, None], zero, zero, matrix, lens)
        else:
            pixels, _ = cv2.projectPoints(points, np.zeros(3), np.zeros(3), matrix, np.array([k1, k2, p1, p2, k3]))
        rows, columns = np.mgrid[:72, :96]
        image = np.zeros((72, 96), np.float64)
        for x, y in pixels.reshape(-1, 2):
            image += np.exp(-((columns - x) ** 2 + (rows - y) ** 2) / 2)
        return points, (image.clip(0, 1) * 255).astype(np.uint8)[..., None].repeat(3, axis=2)

    @pytest.mark.parametrize(
        ("distortion", "fisheye"),
        [
            ((-0.2, 0.05, 0, 0, 0.003, -0.002), False),
            ((0.1, 0, 0.01, 0, 0, 0), False),
            ((0.05, -0.01, 0, 0, 0, 0), True),
        ],
    )
    def test_directions_are_where_a_pinhole_shows_them(self, distortion, fisheye) -> None:
        points, image = self.dots(distortion, fisheye)
        flat, depth, _, (fx, fy, cx, cy) = undistort(
            image, np.full((72, 96), 2.0), None, self.INTRINSICS, distortion, fisheye, "here"
        )
        assert fx == pytest.approx(fy) and set(np.unique(depth)) <= {0, 2}
        seen = 0
        for x, y, _ in points:
            column, row = fx * x + cx - 0.5, fy * y + cy - 0.5
            if not (4 < column < 91 and 4 < row < 67):
                continue
            seen += 1
            around = flat[round(row) - 3 : round(row) + 4, round(column) - 3 : round(column) + 4, 0].astype(float)
            offsets = np.arange(-3, 4)
            centre = [(around.sum(1) * offsets).sum(), (around.sum(0) * offsets).sum()] / around.sum()
            assert centre[0] + round(row) == pytest.approx(row, abs=0.35)
            assert centre[1] + round(column) == pytest.approx(column, abs=0.35)
        assert seen >= 5

    def test_a_pinhole_stays_as_it_is(self) -> None:
        image = np.zeros((4, 4, 3), np.uint8)
        same, *none, intrinsics = undistort(image, None, None, self.INTRINSICS, (0.0,) * 6, False, "here")
        assert same is image and none == [None, None] and intrinsics is self.INTRINSICS

    def test_a_lens_that_makes_no_sense_is_a_sentence(self) -> None:
        with pytest.raises(UserInputError, match="The lens of here cannot be undone"):
            undistort(
                np.zeros((72, 96, 3), np.uint8), None, None, self.INTRINSICS, (-50.0, 900, 0, 0, 0, 0), False, "here"
            )

    def test_distortion_of_the_frame_counts_before_that_of_the_file(self, capture: Path) -> None:
        change(capture, lambda c: (c.update(distortion_params=[0.1, 0, 0, 0]), c["frames"][0].update(k1=0.2)))
        frames = read_capture(capture).frames
        assert frames[0].lens.distortion == (0.2, 0, 0, 0, 0, 0)
        assert frames[1].lens.distortion == (0.1, 0, 0, 0, 0, 0)


class TestCheck:
    def test_turned_images_show(self, views: Views) -> None:
        assert turned_images(views) is None
        for turn in (1, 2, 3):
            turned = Views(views.cameras, torch.rot90(views.images, -turn, (-2, -1)), views.depths)
            assert turned_images(turned) == 90 * turn

    def test_pixels_that_are_not_square_show(self, capture: Path, tmp_path: Path) -> None:
        assert run(tmp_path / "out", [capture]) == 0
        path = tmp_path / "out" / "scenes" / "hall" / "transforms.json"
        content = json.loads(path.read_text())
        content["frames"][2]["fl_x"] *= 1.8
        path.write_text(json.dumps(content))
        problems = " ".join(check_collection(SceneCollection.open(tmp_path / "out")).all_problems)
        assert "pixels are not square" in problems and "focal lengths differ" in problems


def test_two_frames_of_one_name_in_a_collection(capture: Path) -> None:
    change(capture, lambda content: content["frames"].append(content["frames"][0]))
    with pytest.raises(UserInputError, match="Two frames of .* have the file_path"):
        read_transforms(capture)
