"""The peers learn from the kit's batches and detect at the image's original size."""

import json

import pytest
import torch
from small import settings

from dimaskdino.config import dump_config
from dimaskdino.data.coco import Record
from dimaskdino.data.dataloader import batches, evaluation_dataset, evaluation_loader, training_dataset, training_loader
from dimaskdino.evaluation.coco_ap import average_precision, read_truth
from dimaskdino.evaluation.detections import Detections
from dimaskdino.modeling.backbone import ResNet
from tools.benchmarks import peers

SMALL = ("data.resize.shortest=96", "data.resize.longest=96", "data.jitter.size=96", "model.backbone.width=16")


def small_peer(name, config):
    if name == "mask2former":
        pytest.importorskip("transformers", reason="pip install transformers")
    torch.manual_seed(0)
    return peers.PEERS[name](config)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # of transformers about itself
@pytest.mark.parametrize("name", peers.PEERS)
def test_a_peer_learns_one_batch_and_detects_at_the_images_size(name, shapes_data):
    config = settings(shapes_data, *SMALL)
    peer = small_peer(name, config).train()
    source = batches(training_loader(training_dataset(config), config, 0, 0, 1))
    batch = next(source)
    source.close()
    optimizer = peers.build_optimizer(peer, 1e-3)
    rates = {group["lr"]: sum(p.numel() for p in group["params"]) for group in optimizer.param_groups}
    backbone = next(module for module in peer.modules() if isinstance(module, ResNet))
    assert rates[1e-4] == sum(p.numel() for p in backbone.parameters())
    losses = [peers.step_of(peer, optimizer, batch) for _ in range(15)]
    assert losses[-1] < 0.8 * losses[0]
    data = evaluation_dataset(config)
    tested = next(iter(batches(evaluation_loader(data, config, [[0, 1]]))))
    with torch.inference_mode():
        found = peer.eval().detect(tested, 20)
    assert len(found) == 2
    for instances, size in zip(found, tested.original_sizes, strict=True):
        assert size == (64, 64)
        assert instances.query_masks.size == size
        assert len(instances.scores) <= 100
        if len(instances.scores):
            assert int(instances.labels.max()) < config.model.classes
            assert float(instances.boxes.max()) <= 64


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", peers.PEERS)
def test_a_peer_that_knows_the_objects_scores_full_marks(name, shapes_data, monkeypatch):
    """The way from a peer's own outputs to AP loses nothing but resolution."""
    config = settings(shapes_data, *SMALL)
    peer = small_peer(name, config).eval()
    data = evaluation_dataset(config)
    plain = evaluation_dataset(config)
    plain.transform = Record.sample
    found = []
    for position in range(len(data)):
        batch = next(iter(batches(evaluation_loader(data, config, [[position]]))))
        sample = plain[position]
        count, boxes = len(sample.labels), sample.boxes * 96 / 64
        if name == "mask_rcnn":
            inside = torch.nn.functional.interpolate(sample.masks[:, None].float(), (28, 28))
            for i, (x0, y0, x1, y1) in enumerate(sample.boxes.int().tolist()):
                cut = sample.masks[i, y0:y1, x0:x1].float()
                inside[i] = torch.nn.functional.interpolate(cut[None, None], (28, 28), mode="nearest")[0]
            result = {"boxes": boxes, "labels": sample.labels + 1, "scores": torch.full((count,), 0.9), "masks": inside}
            monkeypatch.setattr(peer.model, "forward", lambda images, result=result: [result])
        else:
            logits = torch.full((1, count, config.model.classes + 1), -20.0)
            logits[0, torch.arange(count), sample.labels] = 20.0
            masks = torch.nn.functional.interpolate(sample.masks[None].float(), (96, 96)) * 40 - 20
            outputs = peers.SimpleNamespace(class_queries_logits=logits, masks_queries_logits=masks)
            monkeypatch.setattr(peer.model, "forward", lambda pixels, outputs=outputs: outputs)
        with torch.inference_mode():
            (instances,) = peer.detect(batch, 20)
        found.append(Detections.of(batch.image_ids[0], instances, data.category_ids))
    joined, truth = Detections.joined(found), read_truth(data.annotations_file)
    assert average_precision(truth, joined.boxes, "box").AP > 90
    assert average_precision(truth, joined.masks, "mask").AP > 70


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_a_training_of_a_peer_leaves_its_record(shapes_data, tmp_path, capsys):
    config = settings(shapes_data, *SMALL)
    (tmp_path / "config.yaml").write_text(dump_config(config))
    peers.train("mask_rcnn", str(tmp_path / "config.yaml"), tmp_path / "peer", 3)
    record = json.loads((tmp_path / "peer" / "result.json").read_text())
    assert record["steps"] == 3
    assert 0 <= record["box"] <= 100
    assert (tmp_path / "peer" / "weights.pt").exists()
    assert record["peak_memory"] > 100e6
