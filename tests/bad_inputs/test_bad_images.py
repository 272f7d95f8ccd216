"""Images that cannot be read, given to `dimaskdino predict`."""

import struct
import zlib

import pytest


def png(width: int, height: int, data: bytes = b"") -> bytes:
    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(data)) + chunk(b"IEND", b"")


FILES = {
    "an empty file": ("a.jpg", b""),
    "a text": ("a.jpg", b"hello"),
    "a web page": ("a.png", b"<html><img src=x onerror=alert(1)></html>"),
    "an archive": ("a.png", b"PK\x03\x04" + bytes(100)),
    "zeros": ("a.webp", bytes(1000)),
    "a PNG without pixels": ("a.png", png(10, 10)),
    "a PNG with a broken checksum": ("a.png", png(4, 4, bytes(52))[:-20] + bytes(20)),
    "a PNG that claims 50,000 x 50,000 pixels": ("a.png", png(50_000, 50_000)),
    "a TIFF that is only a header": ("a.tif", b"II*\0\x08\0\0\0"),
    "a BMP that is only a header": ("a.bmp", b"BM" + bytes(20)),
}


@pytest.fixture
def predict(place, refused):
    return lambda says, path: refused(says, "predict", place.model, path, "--output", "out", "--device", "cpu")


def test_files_that_are_no_images(place, predict):
    photo = place.photo.read_bytes()
    contents = FILES | {"a JPEG cut off": ("c.jpg", photo[:600]), "the start of a JPEG": ("d.jpg", photo[:20])}
    for number, (name, content) in enumerate(contents.values()):
        place.write(f"in/{number}{name}", content)
    lines = predict("skipped: .*cannot be read, it may be truncated or no image", place.folder / "in")
    assert len(lines) == len(contents)


def test_a_file_that_does_not_exist(predict):
    predict("nothing.jpg does not exist", "nothing.jpg")


def test_a_folder_without_images(place, predict):
    predict("no file of the types .jpg", place.data / "annotations")


def test_a_file_of_no_known_type(place, predict):
    predict(r"skipped: .*notes\.txt", place.write("notes.txt", "x"))


def test_a_folder_named_like_an_image(place, predict):
    (place.folder / "in" / "x.jpg").mkdir(parents=True)
    predict("no file of the types", place.folder / "in")


def test_a_broken_link(place, predict):
    (place.folder / "in").mkdir()
    (place.folder / "in" / "a.jpg").symlink_to("gone.jpg")
    predict(r"skipped: .*a\.jpg does not exist", place.folder / "in")
