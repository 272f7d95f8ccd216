"""Chapter 8: annotations and a module of one's own."""

import functools
from collections.abc import Callable, Sequence

import numpy as np
import torch
from pycocotools import mask as coco_mask
from torch import Tensor, nn

from dimaskdino.course.checks.compare import Wrong, called, check, compared, expect, random, rectangles
from dimaskdino.course.checks.pictures import draw_errors
from dimaskdino.inspection.look import Look
from dimaskdino.modeling import Detector
from dimaskdino.modeling.bato import Guide
from dimaskdino.modeling.structures import BATOOutput


@check("the first and the last occupied column and row; both belong to the object, so its width is last − first + 1")
def check_annotation(function: Callable[[np.ndarray], tuple[Sequence[float], float]]) -> str:
    """Bounding box [x, y, w, h] and area of a mask (h, w), as COCO's annotations have them."""

    def expected(mask: np.ndarray) -> tuple[Tensor, float]:
        encoded = coco_mask.encode(np.asfortranarray(mask))
        return torch.from_numpy(coco_mask.toBbox(encoded)), float(coco_mask.area(encoded))

    return compared(function, [(mask.byte().numpy(),) for mask in rectangles()], expected)


@check("before, and the gate's part of the difference")
def check_gate(function: Callable[[Tensor, Tensor, float], Tensor]) -> str:
    """Interpolation of tokens between before (gate 0) and after (gate 1)."""
    cases = [(random(2, 3), random(2, 3, seed=1), gate) for gate in (0.0, 1.0, 0.3)]
    return compared(function, cases, torch.lerp)


@check("gate = nn.Parameter(torch.tensor(gate)); both T_bal's tokens and the mask features go through `gated`")
def check_gated_module(module: Callable[[nn.Module, float], nn.Module], look: Look, detector: Detector) -> str:
    """To build: a module from (bato, gate), BATO behind a gate, in the real model and on a real image.

    The model's BATO may be behind a gate already.
    """
    bato = getattr(detector.bato, "bato", detector.bato)
    # copies: gradients cannot go through tensors that inference made
    T_i = look.trace.T_i.with_tokens(look.trace.T_i.tokens.clone())
    F, Q_bal, full = look.trace.mask_features.clone(), look.trace.Q_bal, look.trace.bato
    assert full is not None  # the course's model has BATO
    guide = Guide(Q_bal.content.clone(), detector.decoder.position(Q_bal.boxes.clone()).detach())
    for gate in (0.0, 1.0, 0.25 + 0.5 * float(random(1))):
        replaced = called(module, (bato, gate), copied=False)
        if not isinstance(replaced, nn.Module):
            raise Wrong(f"expected a module, got {type(replaced).__name__}")
        output = called(replaced, (T_i, F, guide, detector.heads, False), copied=False)
        if not isinstance(output, BATOOutput):
            raise Wrong(f"forward returns {type(output).__name__}, but BATO returns a BATOOutput")
        ignored = "they are those of BATO, whatever the gate says"
        tokens, features = full.T_bal.tokens, full.mask_features
        expected, found = torch.lerp(T_i.tokens, tokens, gate), output.T_bal.tokens.detach()
        picture = functools.partial(draw_errors, look, T_i.centres(), found[0], expected[0], "Tokens behind the gate")
        expect(found, expected, {ignored: tokens}, picture, f"gate {gate:.2f}, tokens: ")
        expected, found = torch.lerp(F, features, gate), output.mask_features.detach()
        expect(found, expected, {ignored: features}, where=f"gate {gate:.2f}, mask features: ")
        gates = [p for p in replaced.parameters() if p.numel() == 1 and p.requires_grad]
        total = output.T_bal.tokens.square().sum() + output.mask_features.square().sum()
        gradients = torch.autograd.grad(total, gates, allow_unused=True) if gates and total.requires_grad else (None,)
        if all(gradient is None for gradient in gradients):
            raise Wrong("no gradient reaches the gate: it must be an nn.Parameter that `forward` uses")
    return "the model with an open gate, without BATO where it is closed, and between the two"
