"""The COCO configuration on 38 real images of COCO: train, resume, evaluate every stage, predict."""

from pathlib import Path

import pytest
from small import FILE

from dimaskdino import load
from dimaskdino.config import load_config
from dimaskdino.data.coco import CocoDataset
from dimaskdino.evaluation.layerwise_ap import evaluate_layers
from dimaskdino.evaluation.predict import predict_images
from dimaskdino.runs.folder import RunFolder
from dimaskdino.training.trainer import train

TINY_COCO = Path(__file__).parents[2] / "shared" / "data" / "tiny_coco"
COCO = FILE.parents[1] / "coco" / "instance-segmentation" / "dimaskdino_r50_4scale_bs16_12ep.yaml"
# from scratch and on small images, to take a minute instead of hours
CHANGES = [
    *("model.backbone.weights=null", "model.backbone.norm=batch", f"data.root={TINY_COCO}", "data.jitter.size=160"),
    *("data.resize.shortest=160", "data.resize.longest=256", "data.workers=0", "train.batch_size=2"),
    *("train.precision=fp32", "train.log_every=1", "train.checkpoint_every=8", "loss.points=2000"),
    *("optimizer.backbone_lr_factor=1", "optimizer.clip_norm=0.1", "data.jitter.min_scale=0.8"),
]


@pytest.mark.slow
@pytest.mark.skipif(not TINY_COCO.exists(), reason="the folder with 38 images of COCO is not here")
def test_train_resume_evaluate_predict(tmp_path):
    run = RunFolder(tmp_path)
    for steps in (8, 16):  # the second goes on from the first
        config = load_config(COCO, [*CHANGES, f"schedule.steps={steps}"])
        with run.running():
            train(config, run)
    records = [record for record in run.read_metrics() if "loss" in record]  # not that the number of steps changed
    assert [record["step"] for record in records] == list(range(1, 17))
    first, last = (sum(r["loss"] for r in part) / 4 for part in (records[:4], records[-4:]))
    assert last < 0.7 * first

    model = load(tmp_path)
    result = evaluate_layers(model)
    assert list(result.stages)[-1] == "decoder.6"
    assert len(result.stages) == 10
    assert result.images == 6
    sample = CocoDataset(TINY_COCO, "val2017")[0]
    found = predict_images(model, [sample.image])[0]
    assert all(len(instances.scores) == 100 for instances in found.values())
    assert found["decoder.6"].masks.shape == (100, *sample.original_size)
