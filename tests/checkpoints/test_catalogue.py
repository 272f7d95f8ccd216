"""Models by name: the download from a server that behaves as Google Drive does, the cache, and the list."""

import hashlib
import http.server
import json
import re
import shutil
import ssl
import subprocess
import threading
import time
from dataclasses import dataclass, field

import filelock
import pytest
import torch
from golden import read, state_dict

from dimaskdino import UserError, load
from dimaskdino.checkpoints import catalogue
from dimaskdino.checkpoints.catalogue import PublishedModel
from dimaskdino.cli.models import list_models
from dimaskdino.utils.resources import shipped_models

NAME, LINK = "dimaskdino-r50-coco-12ep", "https://drive.google.com/file/d/small-made-up-weights-of-a-test/view"
SMALL = ("model.selection.k=[90,40]", "model.bato.guiding_tokens=12", "model.denoising.queries=30")
FORM = """<html><form id="download-form" action="https://drive.usercontent.google.com/download" method="get">
<input type="hidden" name="id" value="small"><input type="hidden" name="confirm" value="t">
<input type="hidden" name="uuid" value="1"></form></html>"""
QUOTA = '<html><p class="uc-error-subcaption">Too many users have viewed or downloaded this file recently.</p></html>'


@dataclass
class Drive:
    """What the server does.

    Attributes:
        content: the file.
        page: answered instead of the page that asks for confirmation.
        broken: number of bytes after which the connection ends, once per item.
        ranges: the ranges that were asked for.
    """

    content: bytes
    page: str = FORM
    broken: list[int] = field(default_factory=list)
    ranges: list[str | None] = field(default_factory=list)


@pytest.fixture(scope="session")
def certificate(tmp_path_factory):
    """A certificate for Google's names that the tests' own server shows."""
    if shutil.which("openssl") is None:
        pytest.skip("openssl is not installed, which makes the server's certificate")
    folder = tmp_path_factory.mktemp("certificate")
    names = "subjectAltName=DNS:drive.google.com,DNS:drive.usercontent.google.com"
    key = ["-newkey", "rsa:2048", "-nodes", "-keyout", folder / "key.pem", "-out", folder / "certificate.pem"]
    command = ["openssl", "req", "-x509", "-days", "2", "-subj", "/CN=drive", "-addext", names, *key]
    subprocess.run(command, check=True, capture_output=True)
    return folder


@pytest.fixture
def drive(tmp_path, monkeypatch, certificate):
    """A server that stands in for drive.google.com, as a proxy; the cache is an empty folder."""
    state = Drive(bytes(range(256)) * 4000)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate / "certificate.pem", certificate / "key.pem")

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_CONNECT(self):
            self.send_response(200)
            self.end_headers()
            self.connection = context.wrap_socket(self.connection, server_side=True)
            self.rfile, self.wfile = self.connection.makefile("rb"), self.connection.makefile("wb", 0)
            self.close_connection = False

        def do_GET(self):
            if self.headers["Host"] == "drive.google.com":
                self.answer(200, state.page.encode(), {"Content-Type": "text/html"})
                return
            wanted = self.headers.get("Range")
            state.ranges.append(wanted)
            start = int(re.match(r"bytes=(\d+)-", wanted)[1]) if wanted else 0
            headers = {"Content-Type": "application/octet-stream", "Accept-Ranges": "bytes"}
            headers["Content-Disposition"] = 'attachment; filename="model.pth"'
            if wanted:
                headers["Content-Range"] = f"bytes {start}-{len(state.content) - 1}/{len(state.content)}"
            sent = state.content[start : start + state.broken.pop(0)] if state.broken else None
            self.answer(206 if wanted else 200, state.content[start:], headers, sent)

        def answer(self, code, content, headers, sent=None):
            self.send_response(code)
            for key, value in (headers | {"Content-Length": str(len(content))}).items():
                self.send_header(key, value)
            self.end_headers()
            self.wfile.write(content if sent is None else sent)
            self.close_connection = True

        def finish(self):
            super().finish()
            self.connection.close()

        def log_message(self, *arguments):
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setenv("https_proxy", f"http://127.0.0.1:{server.server_address[1]}")
    monkeypatch.setenv("REQUESTS_CA_BUNDLE", str(certificate / "certificate.pem"))
    monkeypatch.delenv("no_proxy", raising=False)
    monkeypatch.setattr(catalogue, "cache_folder", lambda: tmp_path / "cache")
    monkeypatch.setitem(catalogue.PUBLISHED, NAME, PublishedModel(LINK, 46.9, 42.3, 1, SMALL))
    yield state
    server.shutdown()
    server.server_close()


def test_a_name_is_downloaded_once_and_kept_converted(drive, tmp_path, capsys, monkeypatch):
    torch.save({"model": state_dict(read("di_small"))}, tmp_path / "published.pth")
    drive.content = (tmp_path / "published.pth").read_bytes()
    model = load(NAME, device="cpu")
    said = capsys.readouterr().err
    assert len(model.classes) == 7
    assert model.config.model.selection.k == (90, 40)
    assert f"downloading {NAME} from {LINK}" in said
    assert "Apache-2.0" in said
    record = json.loads((tmp_path / "cache" / f"{NAME}.json").read_text())
    assert record == {"url": LINK, "sha256": hashlib.sha256(drive.content).hexdigest()}
    assert f"SHA-256 {record['sha256']} (recorded, since the authors publish none)" in said
    assert {file.name for file in (tmp_path / "cache").iterdir()} == {f"{NAME}.json", f"{NAME}.safetensors", "lock"}
    monkeypatch.setenv("https_proxy", "http://127.0.0.1:9")  # no network from now on
    again = load(NAME, device="cpu")
    assert capsys.readouterr().err == ""
    state = again.detector.state_dict()
    assert all(torch.equal(value, state[key]) for key, value in model.detector.state_dict().items())
    assert list_models() == 0
    assert re.search(rf"{NAME} .* here +\|$", capsys.readouterr().out, re.MULTILINE)
    assert list_models(remove=(NAME,)) == 0
    assert "deleted: " in capsys.readouterr().out
    assert [file.name for file in (tmp_path / "cache").iterdir()] == ["lock"]


def download(folder):
    folder.mkdir(exist_ok=True)
    digest = catalogue.download(NAME, catalogue.PUBLISHED[NAME], folder / "file.pth")
    return digest, (folder / "file.pth").read_bytes()


def test_a_broken_transfer_goes_on_where_it_ended(drive, tmp_path):
    drive.broken = [600_000]
    assert download(tmp_path / "a") == (hashlib.sha256(drive.content).hexdigest(), drive.content)
    assert drive.ranges == [None, "bytes=524288-"]  # whole chunks are kept


def test_a_later_command_goes_on_where_the_first_one_ended(drive, monkeypatch, tmp_path):
    monkeypatch.setattr(catalogue, "RETRIES", 0)
    drive.broken = [600_000]
    with pytest.raises(UserError, match="cannot be downloaded"):
        download(tmp_path / "a")
    assert download(tmp_path / "a") == (hashlib.sha256(drive.content).hexdigest(), drive.content)
    assert drive.ranges[-1] == "bytes=524288-"


@pytest.mark.parametrize(
    ("page", "message"),
    [(QUOTA, "Too many users have viewed"), ("<html>Sign in</html>", "Cannot retrieve the public link")],
)
def test_a_refusal_names_the_link_and_the_place_of_the_file(drive, page, message, tmp_path):
    drive.page = page
    with pytest.raises(UserError, match=message) as raised:
        load(NAME, device="cpu")
    place = tmp_path / "cache" / f"{NAME}.pth"
    assert f"Download {LINK} in a browser, save it as {place}" in str(raised.value)
    assert "\n" not in str(raised.value)
    place.write_bytes(b"something else")
    with pytest.raises(UserError, match=f"cannot be read as a checkpoint.*dimaskdino models --remove {NAME}$"):
        load(NAME, device="cpu")


def test_without_a_network_one_line_says_so(drive, monkeypatch):
    monkeypatch.setenv("https_proxy", "http://127.0.0.1:9")
    monkeypatch.setattr(catalogue, "RETRIES", 0)
    with pytest.raises(
        UserError, match=r"cannot be downloaded: there is no connection to the server\. .* in a browser"
    ) as raised:
        load(NAME, device="cpu")
    assert "\n" not in str(raised.value)


def test_a_file_with_another_checksum_is_deleted(drive, monkeypatch, tmp_path):
    model = catalogue.PUBLISHED[NAME]
    monkeypatch.setitem(catalogue.PUBLISHED, NAME, PublishedModel(model.url, 0, 0, 1, sha256="0" * 64))
    with pytest.raises(UserError, match="does not have the recorded SHA-256"):
        load(NAME, device="cpu")
    assert not list((tmp_path / "cache").glob(f"{NAME}*"))


def test_a_process_that_waits_for_another_one_says_so(drive, tmp_path, capsys):
    (tmp_path / "cache").mkdir()
    cached, held = catalogue.cached_file(NAME), threading.Event()

    def other_process():
        with filelock.FileLock(tmp_path / "cache" / "lock"):
            held.set()
            time.sleep(1)
            shutil.copy(shipped_models()["dimaskdino-shapes"] / "checkpoints" / "model.safetensors", cached)

    threading.Thread(target=other_process).start()
    held.wait()
    assert len(load(NAME, device="cpu").classes) == 5
    assert drive.ranges == []
    assert "waiting for another process" in capsys.readouterr().err


def test_a_full_disk_is_noticed_before_the_download(drive, monkeypatch):
    monkeypatch.setitem(catalogue.PUBLISHED, NAME, PublishedModel(LINK, 0, 0, 10**9))
    with pytest.raises(UserError, match="free some space"):
        load(NAME, device="cpu")
    assert drive.ranges == []


def test_the_list(drive, capsys):
    assert list_models() == 0
    rows = {}
    for line in capsys.readouterr().out.splitlines()[2:-1]:
        name, *cells = (cell.strip() for cell in line.split("|")[1:-1])
        rows[name] = cells
    folder = shipped_models()["dimaskdino-shapes"]
    megabytes = sum(file.stat().st_size for file in folder.rglob("*.safetensors")) / 1e6
    data = "synthetic drawn shapes: 5 classes"
    assert rows["dimaskdino-shapes"] == [data, f"{megabytes:.0f} MB", "", "69.4 / 72.6", "this kit", "here"]
    server, state = "drive.google.com", "to be downloaded"
    assert rows[NAME] == ["COCO: 80 classes", "1 MB", "46.9 / 42.3", "not measured", server, state]
    assert list_models(remove=(NAME,)) == 0
    assert "was not in the cache" in capsys.readouterr().out
    with pytest.raises(UserError, match="not a downloaded model"):
        list_models(remove=("dimaskdino-shapes",))
