"""Largest differences to the recorded outputs of the published implementations, as a record for the docs.

python tests/measure_golden.py docs/measurements/golden.json
"""

import json
import sys
from pathlib import Path

import numpy as np
import torch
from golden import FOLDER, detector, image, read
from scipy.optimize import linear_sum_assignment

from dimaskdino.modeling import ImageBatch

CASES = ("di_r50", "di_small", "maskdino_4level", "maskdino_3s", "maskdino_5level")


def differences(case: str) -> dict[str, float]:
    """Largest absolute difference over all stages: class logits, mask logits, boxes relative to the image."""
    record, recorded = read(case), dict(np.load(FOLDER / f"{case}.npz"))
    batch = ImageBatch.from_images([image(i["height"], i["width"], i["image_seed"]) for i in record["images"]])
    with torch.no_grad():
        stages = detector(case)(batch).stages
    worst = {"class_logits": 0.0, "mask_logits": 0.0, "boxes": 0.0}
    for name, stage in stages.items():
        for b in range(len(record["images"])):
            ours = stage.class_logits[b].numpy(), stage.boxes[b].numpy()
            theirs = recorded[f"{name}.pred_logits"][b], recorded[f"{name}.pred_boxes"][b]
            joined = [np.hstack([logits, 10 * boxes]) for logits, boxes in (ours, theirs)]
            rows, columns = linear_sum_assignment(np.abs(joined[0][:, None] - joined[1][None]).max(-1))
            for key, a, c in zip(("class_logits", "boxes"), ours, theirs, strict=True):
                worst[key] = max(worst[key], float(np.abs(a[rows] - c[columns]).max()))
            if stage.has_masks:
                wanted = rows[np.argsort(columns)][recorded[f"{name}.mask_rows"][b]]
                masks = stage.mask_logits()[b, wanted][:, ::2, ::2].numpy()
                worst["mask_logits"] = max(
                    worst["mask_logits"], float(np.abs(masks - recorded[f"{name}.pred_masks"][b]).max())
                )
    return worst


if __name__ == "__main__":
    result = {case: differences(case) for case in CASES}
    Path(sys.argv[1]).write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result, indent=1))
