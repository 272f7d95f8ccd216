"""Images, given to `dimaskdino predict` and `dimaskdino data check`."""

import json
import struct
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

from PIL import Image

from bad_inputs.annotations import CONTENT, check
from bad_inputs.table import Place, bad


def predict(place: Place, *images: Path) -> list[Any]:
    return ["predict", place.model, *images, "--output", place.folder / "out", "--device", "cpu"]


def picture(title: str, says: str, name: str, content: Callable[[Place], bytes]) -> None:
    bad(f"image: {title}", rf"skipped: .*{says}", lambda place: predict(place, place.write(name, content(place))))


def png(width: int, height: int, data: bytes = b"") -> bytes:
    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(data)) + chunk(b"IEND", b"")


UNREADABLE = "cannot be read, it may be truncated or no image"
picture("an empty file", UNREADABLE, "a.jpg", lambda place: b"")
picture("a text", UNREADABLE, "a.jpg", lambda place: b"hello")
picture("a web page", UNREADABLE, "a.png", lambda place: b"<html><img src=x onerror=alert(1)></html>")
picture("an archive", UNREADABLE, "a.png", lambda place: b"PK\x03\x04" + bytes(100))
picture("zeros", UNREADABLE, "a.webp", lambda place: bytes(1000))
picture("a cut-off JPEG", UNREADABLE, "a.jpg", lambda place: place.photo.read_bytes()[:600])
picture("only the start of a JPEG", UNREADABLE, "a.jpg", lambda place: place.photo.read_bytes()[:20])
picture("a PNG without pixels", UNREADABLE, "a.png", lambda place: png(10, 10))
picture("a PNG with a broken checksum", UNREADABLE, "a.png", lambda place: png(4, 4, bytes(52))[:-20] + bytes(20))
picture("a PNG that claims 50,000 x 50,000 pixels", UNREADABLE, "a.png", lambda place: png(50_000, 50_000))
picture("a TIFF that is only a header", UNREADABLE, "a.tif", lambda place: b"II*\0\x08\0\0\0")
picture("a BMP that is only a header", UNREADABLE, "a.bmp", lambda place: b"BM" + bytes(20))
bad("image: does not exist", "nothing.jpg does not exist", lambda place: predict(place, place.folder / "nothing.jpg"))
bad(
    "image: a folder without images",
    "no file of the types .jpg",
    lambda place: predict(place, place.data / "annotations"),
)
bad(
    "image: a file of no known type",
    r"skipped: .*notes\.txt",
    lambda place: predict(place, place.write("notes.txt", "x")),
)


def folder_named_like_an_image(place: Place) -> list[Any]:
    (place.folder / "in" / "x.jpg").mkdir(parents=True)
    return predict(place, place.folder / "in")


def broken_link(place: Place) -> list[Any]:
    (place.folder / "in").mkdir()
    (place.folder / "in" / "a.jpg").symlink_to(place.folder / "gone.jpg")
    return predict(place, place.folder / "in")


bad("image: a folder named x.jpg", "no file of the types", folder_named_like_an_image)
bad("image: a broken link", r"skipped: .*a\.jpg does not exist", broken_link)


def checked_image(title: str, says: str, write: Callable[[Path], None]) -> None:
    def make(place: Place) -> list[Any]:
        arguments = check(place, json.dumps(CONTENT))
        write(place.folder / "images" / "train" / "a.png")
        return arguments

    bad(f"image of a dataset: {title}", says, make)


checked_image("missing", "the image .*a.png does not exist", Path.unlink)
checked_image("of another size", r"a.png is 5x5, the annotations say 20x24", lambda p: Image.new("RGB", (5, 5)).save(p))
checked_image(
    "turned on its side", "a.png is 24x20, the annotations say 20x24", lambda p: Image.new("L", (20, 24)).save(p)
)
checked_image("cut off", f"a.png {UNREADABLE}", lambda p: p.write_bytes(p.read_bytes()[:30]))
