"""Models by name: those that ship with the kit, and published checkpoints, downloaded once from their authors' links.

A download lies in the user's cache as a file of this kit. It was converted by `checkpoints.published`, which reads no
code from it.
"""

import contextlib
import hashlib
import json
import shutil
import sys
import urllib.parse
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import filelock
import platformdirs

from dimaskdino.checkpoints.model_files import save_model
from dimaskdino.checkpoints.published import load_published
from dimaskdino.config import Config, load_config
from dimaskdino.utils.errors import UserError, first_line
from dimaskdino.utils.files import read_json_object, write_text
from dimaskdino.utils.progress import progress_bar
from dimaskdino.utils.resources import shipped_models

DRIVE = "https://drive.google.com/file/d/{}/view"
DETREX = "https://github.com/IDEA-Research/detrex-storage/releases/download/maskdino-v0.1.0/{}"
LICENCE = "the authors' code has the licence Apache-2.0; the page of the weights names none"
SECONDS = 30.0  # without a byte from the server
RETRIES = 3
ROOM = 5  # a published file may hold the optimizer's state too, and the converted file lies beside it


@dataclass(frozen=True)
class PublishedModel:
    """A checkpoint of COCO instance segmentation that its authors published.

    Attributes:
        url: where it is downloaded from.
        box, mask: AP on COCO val2017 as published, in percent. This kit has not measured it.
        megabytes: approximate size of the converted file.
        overrides: settings that cannot be inferred from its weights.
        sha256: of the published file, where it is known. The authors publish none.
    """

    url: str
    box: float
    mask: float
    megabytes: int
    overrides: tuple[str, ...] = ()
    sha256: str | None = None


_NO, _BITMASK = ("model.selection.mask_to_box=no",), ("model.selection.mask_to_box=bitmask",)
PUBLISHED = {
    "dimaskdino-r50-coco-12ep": PublishedModel(DRIVE.format("1oQociMQSt_jmQtH3pm92i6zat8Gt83Oh"), 46.9, 42.3, 200),
    "dimaskdino-r50-coco-24ep": PublishedModel(DRIVE.format("1FjoYiwGnrk_bk0nUM7GPeIMGENVLdx7n"), 49.6, 44.8, 200),
    "dimaskdino-r50-coco-50ep": PublishedModel(DRIVE.format("17_SErWYBWWCdYfR6i7OJtcBIlCDES10z"), 51.9, 46.7, 200),
    "maskdino-r50-coco-50ep-hid1024": PublishedModel(
        DETREX.format("maskdino_r50_50ep_300q_hid1024_3sd1_instance_maskenhanced_mask46.1ap_box51.5ap.pth"),
        *(51.5, 46.1, 200),
    ),
    "maskdino-r50-coco-50ep": PublishedModel(
        DETREX.format("maskdino_r50_50ep_300q_hid2048_3sd1_instance_maskenhanced_mask46.3ap_box51.7ap.pth"),
        *(51.7, 46.3, 210),
    ),
    "maskdino-swinl-coco-50ep": PublishedModel(
        DETREX.format("maskdino_swinl_50ep_300q_hid2048_3sd1_instance_mask52.1ap_box58.3ap.pth"),
        *(58.3, 52.1, 900, _NO),
    ),
    "maskdino-swinl-coco-50ep-enhanced": PublishedModel(
        DETREX.format("maskdino_swinl_50ep_300q_hid2048_3sd1_instance_maskenhanced_mask52.3ap_box59.0ap.pth"),
        *(59.0, 52.3, 900, _BITMASK),
    ),
}


def cache_folder() -> Path:
    """The folder of downloaded models."""
    return Path(platformdirs.user_cache_dir("dimaskdino")) / "models"


def cached_file(name: str) -> Path:
    """The converted file of a published model, whether it is there or not."""
    return cache_folder() / f"{name}.safetensors"


def find_model(source: str | Path) -> Path:
    """Find a model by its name or path. A published model that is not in the cache is downloaded.

    Args:
        source: `dimaskdino-shapes` or another shipped model, a name of `PUBLISHED`, or a path. Names come first; a
            folder of the same name is found as `./dimaskdino-shapes`.

    Raises:
        UserError: it is neither a path nor a name, or cannot be downloaded.
    """
    path, name = Path(source), str(source)
    if name in shipped_models():
        return shipped_models()[name]
    if name in PUBLISHED:
        file = cached_file(name)
        return file if file.exists() else _fetch(name, PUBLISHED[name])
    if not path.exists() and not path.suffix and len(path.parts) == 1:
        known = ", ".join([*shipped_models(), *PUBLISHED])
        raise UserError(f"no model '{name}': neither a path nor one of {known}")
    return path


def remove(name: str) -> list[Path]:
    """Delete everything of a published model from the cache, and return what was deleted.

    Raises:
        UserError: it is not the name of a published model.
    """
    if name not in PUBLISHED:
        raise UserError(f"'{name}' is not a downloaded model; those have the names {', '.join(PUBLISHED)}")
    files = sorted(cache_folder().glob(f"{name}.*"))
    for file in files:
        file.unlink()
    return files


def _fetch(name: str, model: PublishedModel) -> Path:
    """Download a published model unless its file lies in the cache already, and convert it."""
    folder, target = cache_folder(), cached_file(name)
    raw = folder / f"{name}.pth"
    folder.mkdir(parents=True, exist_ok=True)
    with _lock(folder / "lock"):
        if target.exists():  # another process was faster
            return target
        digest = _digest(raw) if raw.exists() else download(name, model, raw)
        if model.sha256 not in (None, digest):
            raw.unlink()
            raise UserError(
                f"{name}: the file from {model.url} does not have the recorded SHA-256 and was deleted; run the "
                "command again"
            )
        try:
            trained, _ = load_published(raw, model.overrides)
        except UserError as error:
            raise UserError(f"{error}. To download it again: dimaskdino models --remove {name}") from None
        save_model(target, trained.detector, trained.config, trained.classes, trained.step)
        write_text(folder / f"{name}.json", json.dumps({"url": model.url, "sha256": digest}) + "\n")
        raw.unlink()
    known = "as known" if model.sha256 else "recorded, since the authors publish none"
    print(f"{name}: SHA-256 {digest} ({known}); converted to {target}", file=sys.stderr)
    return target


@contextlib.contextmanager
def _lock(file: Path) -> Iterator[None]:
    """Let one process at a time download; another one says that it waits."""
    lock = filelock.FileLock(file)
    try:
        lock.acquire(blocking=False)
    except filelock.Timeout:
        print("waiting for another process that downloads a model", file=sys.stderr)
        lock.acquire()
    try:
        yield
    finally:
        lock.release()


def _digest(file: Path) -> str:
    with file.open("rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()


def download(name: str, model: PublishedModel, file: Path) -> str:
    """Download the file of a published model, and return its SHA-256. What an earlier attempt received is kept."""
    import gdown  # slow to import
    import requests

    by_hand = f"Download {model.url} in a browser, save it as {file}, and run the same command again"
    free = shutil.disk_usage(file.parent).free
    if free < ROOM * model.megabytes * 10**6:
        raise UserError(f"{name} needs about {ROOM * model.megabytes / 1000:.1f} GB in {file.parent}; free some space")
    print(f"downloading {name} from {model.url} to {file.parent}; {LICENCE}", file=sys.stderr)
    hasher = hashlib.sha256()
    try:
        with progress_bar(description=name, unit="B", unit_scale=True, unit_divisor=1000) as bar:
            gdown.download(
                model.url,
                str(file),
                quiet=True,
                use_cookies=False,
                resume=True,
                timeout=SECONDS,
                retries=RETRIES,
                hasher=hasher,
                progress=_show(bar),
            )
    except (gdown.exceptions.DownloadError, requests.exceptions.RequestException, OSError) as error:
        # gdown repeats the reason of Google Drive in a text of several lines
        cause = (isinstance(error, gdown.exceptions.DownloadError) and error.__context__) or error
        offline = isinstance(cause, requests.exceptions.ConnectionError)
        reason = "there is no connection to the server" if offline else first_line(cause).removesuffix(".")
        raise UserError(f"{name} cannot be downloaded: {reason}. {by_hand}") from None
    with file.open("rb") as opened:
        is_page = opened.read(1) == b"<"
    if is_page:
        file.unlink()
        raise UserError(f"{name} cannot be downloaded: the server answered with a page. {by_hand}")
    return hasher.hexdigest()


def _show(bar: Any) -> Callable[[int, int | None], None]:
    def show(received: int, total: int | None) -> None:
        bar.total = total
        bar.update(received - bar.n)

    return show


def training_data(config: Config) -> str:
    """What a model was trained on, in words: `synthetic drawn shapes: 5 classes`."""
    classes = config.model.classes
    count = f"{classes} class{'es' * (classes != 1)}"
    shapes = config.data.shapes
    if shapes is None:
        return f"{config.data.root.name}: {count}"
    return f"synthetic {'rendered solids' if shapes.rendered else 'drawn shapes'}: {count}"


def catalogue() -> list[list[str]]:
    """Every model that has a name: the rows of a table, the first of which is its header."""
    rows = [["name", "trained on", "size", "published AP", "AP measured here", "source", ""]]
    for name, folder in shipped_models().items():
        stages = read_json_object(folder / "evaluation" / "layers.json")["stages"]
        last = stages[next(reversed(stages))]
        megabytes = sum(file.stat().st_size for file in folder.rglob("*.safetensors")) / 1e6
        measured = f"{last['box']['AP']:.1f} / {last['mask']['AP']:.1f}"
        data = training_data(load_config(folder / "config.yaml"))
        rows.append([name, data, f"{megabytes:.0f} MB", "", measured, "this kit", "here"])
    for name, model in PUBLISHED.items():
        file = cached_file(name)
        megabytes = file.stat().st_size / 1e6 if file.exists() else model.megabytes
        published, server = f"{model.box} / {model.mask}", urllib.parse.urlsplit(model.url).netloc
        state = "here" if file.exists() else "to be downloaded"
        rows.append([name, "COCO: 80 classes", f"{megabytes:.0f} MB", published, "not measured", server, state])
    return rows
