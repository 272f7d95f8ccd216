"""Chapter 8: annotations and a module of one's own."""

from collections.abc import Callable, Sequence

import numpy as np
import torch
from pycocotools import mask as coco_mask
from torch import Tensor, nn

from dimaskdino.course.checks.pictures import draw_errors
from dimaskdino.course.checks.verdicts import (
    CheckResult,
    called,
    compared,
    difference,
    random,
    rectangles,
    right,
    wrong,
)
from dimaskdino.inspection.look import Look
from dimaskdino.modeling import Detector
from dimaskdino.modeling.bato import Guide
from dimaskdino.modeling.structures import BATOOutput


def check_annotation(function: Callable[[np.ndarray], tuple[Sequence[float], float]]) -> CheckResult:
    """Bounding box [x, y, w, h] and area of a mask (h, w), as COCO's annotations have them."""
    masks = []
    for top, left, height, width in rectangles():
        mask = np.zeros((8, 8), np.uint8)
        mask[top : top + height, left : left + width] = 1
        masks.append((mask,))
    hint = "the first and the last occupied column and row; both belong to the object, so its width is last − first + 1"

    def expected(mask: np.ndarray) -> tuple[Tensor, float]:
        encoded = coco_mask.encode(np.asfortranarray(mask))
        return torch.from_numpy(coco_mask.toBbox(encoded)), float(coco_mask.area(encoded))

    return compared(function, masks, expected, hint)


def check_gate(function: Callable[[Tensor, Tensor, float], Tensor]) -> CheckResult:
    """Interpolation of tokens between before (gate 0) and after (gate 1)."""
    cases = [(random(2, 3), random(2, 3, seed=1), gate) for gate in (0.0, 1.0, 0.3)]
    return compared(function, cases, torch.lerp, "before, and the gate's part of the difference")


def check_gated_module(module: Callable[[nn.Module, float], nn.Module], look: Look, detector: Detector) -> CheckResult:
    """To build: BATO behind a gate, in the real model, on a real image.

    Args:
        module: the student's class: a module from (bato, gate).
        look: an image.
        detector: the model; its BATO may be behind a gate already.
    """
    hint = "gate = nn.Parameter(torch.tensor(gate)); both T_bal's tokens and the mask features go through `gated`"
    bato = detector.bato
    bato = getattr(bato, "bato", bato)
    assert bato is not None
    # copies: gradients cannot go through tensors that inference made
    T_i = look.trace.T_i.with_tokens(look.trace.T_i.tokens.clone())
    F, Q_bal = look.trace.mask_features.clone(), look.trace.Q_bal
    guide = Guide(Q_bal.content.clone(), detector.decoder.position(Q_bal.boxes.clone()).detach())
    full = look.trace.bato
    assert full is not None
    for gate in (0.0, 1.0, 0.25 + 0.5 * float(random(1))):
        replaced = called(module, (bato, gate), hint, copied=False)
        if replaced is None:
            return CheckResult(False)
        if not isinstance(replaced, nn.Module):
            return wrong(module, f"expected a module, got {type(replaced).__name__}", hint)
        output = called(replaced, (T_i, F, guide, detector.heads, False), hint, copied=False)
        if output is None:
            return CheckResult(False)
        if not isinstance(output, BATOOutput):
            return wrong(module, f"forward gives {type(output).__name__}, where BATO gives its output's record", hint)
        for name, before, after, found in (
            ("tokens", T_i.tokens, full.T_bal.tokens, output.T_bal.tokens),
            ("mask features", F, full.mask_features, output.mask_features),
        ):
            problem = difference(found.detach(), torch.lerp(before, after, gate))
            if problem is None:
                continue
            if difference(found.detach(), after) is None:
                problem = "they are those of BATO, whatever the gate says"
            picture = None
            if name == "tokens" and found.shape == before.shape:
                far = (found.detach() - torch.lerp(before, after, gate)).norm(dim=-1)[0]
                picture = draw_errors(look, T_i.centres(), far, f"Tokens with the gate at {gate:.2f}")
            return wrong(module, f"gate {gate:.2f}, {name}: {problem}", hint, picture)
        gates = [p for p in replaced.parameters() if p.numel() == 1 and p.requires_grad]
        total = output.T_bal.tokens.square().sum() + output.mask_features.square().sum()
        gradients = torch.autograd.grad(total, gates, allow_unused=True) if gates and total.requires_grad else (None,)
        if all(gradient is None for gradient in gradients):
            return wrong(module, "no gradient reaches the gate: it must be an nn.Parameter that `forward` uses", hint)
    return right(module, "is BATO with the gate open, the model without it with the gate closed, and can be trained")
