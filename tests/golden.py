"""The recorded cases of `tests/fixtures/golden`: weights, images and models, made as their README describes."""

import json
import re
import zlib
from pathlib import Path

import numpy as np
import torch

from dimaskdino import config
from dimaskdino.checkpoints.published import convert_state
from dimaskdino.modeling import Detector

FOLDER = Path(__file__).parent / "fixtures" / "golden"

# the models that the recorded options are changes of
_DI = config.Model()
_MASKDINO = config.Model(
    selection=config.Selection(k=(300,)), bato=config.BATO(enabled=False), decoder=config.Decoder(layers=6)
)
_THREE_LEVELS = config.Model(
    pixel_decoder=config.PixelDecoder(levels=3, ffn_dim=1024),
    selection=config.Selection(k=(300,), mask_to_box="bitmask"),
    bato=config.BATO(enabled=False),
    decoder=config.Decoder(layers=9),
)
_FIVE_LEVELS = config.Model(
    pixel_decoder=config.PixelDecoder(levels=5, finest="res2"),
    selection=config.Selection(k=(300,), mask_to_box="bitmask"),
    bato=config.BATO(enabled=False),
    decoder=config.Decoder(layers=3),
)
_SMALL = config.Model(
    classes=7,
    pixel_decoder=config.PixelDecoder(layers=2, ffn_dim=128),
    selection=config.Selection(k=(90, 40)),
    decoder=config.Decoder(layers=3, ffn_dim=96),
    bato=config.BATO(guiding_tokens=12),
    denoising=config.Denoising(queries=30),
)
MODELS = {
    "di_r50": _DI,
    "di_small": _SMALL,
    "loss_small": _SMALL,
    "maskdino_4level": _MASKDINO,
    "maskdino_3s": _THREE_LEVELS,
    "maskdino_5level": _FIVE_LEVELS,
}


def read(case: str) -> dict:
    return json.loads((FOLDER / f"{case}.json").read_text())


def parameter(key: str, shape: list[int], seed: int) -> torch.Tensor:
    rng = np.random.RandomState((zlib.crc32(key.encode()) + seed) % 2**32)
    size = int(np.prod(shape))
    x = rng.standard_normal(size).reshape(shape)
    last = key.rsplit(".", 1)[-1]
    if last == "num_batches_tracked":
        x = np.zeros(shape)
    elif last == "running_var":
        x = 1 + 0.1 * np.abs(x)
    elif len(shape) >= 2:
        if not any(word in key for word in ("label_enc", "level_embed", "embedding")):
            gain = 2**0.5 if key.startswith("backbone.") else 1
            x = x * gain / np.sqrt(np.prod(shape[1:]))
    else:
        x = 1 + 0.1 * x if last == "weight" else 0.02 * x
    return torch.from_numpy(np.asarray(x)).float()


def state_dict(record: dict) -> dict[str, torch.Tensor]:
    return {
        entry["key"]: parameter(entry.get("alias_of", entry["key"]), entry["shape"], record["seed"])
        for entry in record["state_dict"]
    }


def image(height: int, width: int, seed: int) -> torch.Tensor:
    rng = np.random.RandomState(seed)
    yy, xx = np.mgrid[0:height, 0:width].astype(np.float64)
    channels = []
    for _ in range(3):
        total = np.zeros((height, width))
        for _ in range(6):
            a, b, p = rng.uniform(-0.12, 0.12), rng.uniform(-0.12, 0.12), rng.uniform(0, 6.283)
            total += np.sin(a * xx + b * yy + p)
        channels.append(np.clip(np.round(127.5 + 25 * total), 0, 255))
    return torch.from_numpy(np.stack(channels)).float()


def detector(case: str) -> Detector:
    """The case's model with its synthetic weights, every parameter set and every published key accounted for."""
    model = Detector(MODELS[case])
    conversion = convert_state(state_dict(read(case)))
    missing = set(model.state_dict()) - set(conversion.state)
    surplus = set(conversion.state) - set(model.state_dict())
    assert not missing, sorted(missing)
    assert not surplus, sorted(surplus)
    model.load_state_dict(conversion.state)
    return model.eval()


def detectron2_names(state: dict[str, torch.Tensor]) -> dict[str, np.ndarray]:
    """torchvision's ResNet under detectron2's names, as arrays."""
    names = {}
    for key, value in state.items():
        if "num_batches" in key:
            continue
        name = re.sub(r"^layer(\d)", lambda m: f"res{int(m[1]) + 1}", key)
        name = re.sub(r"^(conv1|bn1)", r"stem.\1", name)
        name = re.sub(r"bn(\d)", r"conv\1.norm", name).replace("downsample.0", "shortcut")
        name = name.replace("downsample.1", "shortcut.norm").replace("fc.", "stem.fc.")
        names[name] = value.numpy()
    return names
