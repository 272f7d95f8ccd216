"""The clocks behind the tables of times: every moment belongs to one part, and nothing is left behind."""

import time

import torch
from small import settings

from dimaskdino.data.speed import measure as measure_loading
from dimaskdino.evaluation.speed import PartClock, measure
from dimaskdino.modeling import Detector, ImageBatch


def test_parts_add_up_to_the_whole(shapes_data):
    torch.manual_seed(0)
    detector = Detector(settings(shapes_data).model).eval()
    batch = ImageBatch.from_images([torch.randint(0, 256, (3, 64, 64))])
    hooks = sum(len(m._forward_hooks) for m in detector.modules())
    started = time.perf_counter()
    with torch.no_grad(), PartClock(detector, torch.device("cpu")) as clock:
        detector(batch)
        with clock.part("sleep"):
            time.sleep(0.05)
    whole = time.perf_counter() - started
    assert 0.05 <= clock.seconds["sleep"] < 0.2
    assert abs(sum(clock.seconds.values()) - whole) < 0.02
    assert {"backbone", "pixel_decoder", "first_selection", "de_imbalance", "decoder", "heads"} <= set(clock.seconds)
    assert sum(len(m._forward_hooks) for m in detector.modules()) == hooks


def test_measurements_name_their_parts(shapes_data):
    config = settings(shapes_data)
    trained = measure(config, "training", 64, 64, 2, 1)
    assert {"matching and losses", "backward", "clipping and optimizer"} <= set(trained.parts)
    assert min(trained.parts.values()) >= 0
    assert "postprocess" in measure(config, "inference", 64, 64, 0, 1).parts
    loading = measure_loading(config, 6)
    assert set(loading["milliseconds_an_image"]) == {"decode", "masks", "decode and masks", "jitter", "collate"}
    assert loading["images_per_second"] > 0
