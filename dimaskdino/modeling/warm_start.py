"""De-Imbalance and BATO added to a trained MaskDINO: new modules that begin close to the identity."""

from collections.abc import Collection
from typing import cast

import torch
from torch import nn

from dimaskdino.modeling.bato import BATO
from dimaskdino.modeling.de_imbalance import DeImbalance, SecondSelection, TokenInteractionLayer
from dimaskdino.modeling.detector import Detector
from dimaskdino.modeling.layers import Attention, FeedForward
from dimaskdino.modeling.pixel_decoder import EncoderLayer


@torch.no_grad()
def start_as_identity(detector: Detector, modules: Collection[str]) -> None:
    """Let new modules begin so that the trained ones around them work as before.

    Residual blocks add nothing at first. Norms, and the position MLP of token interaction, are copies of those that the
    tokens passed before. BATO's convolution keeps the mask features, but group norm and ReLU change them, so masks
    after BATO have to be learnt again. Modules of a user's own stay as they are.

    Args:
        detector: its other modules are trained.
        modules: `de_imbalance.second_selections` and `bato`, or one of them.
    """
    de_imbalance, bato = detector.de_imbalance, detector.bato
    if "de_imbalance.second_selections" in modules and isinstance(de_imbalance, DeImbalance):
        for selection in de_imbalance.second_selections:
            if isinstance(selection, SecondSelection):
                _start_selection(selection, de_imbalance.first_selection.norm, detector)
    if "bato" in modules and isinstance(bato, BATO):
        last = cast(EncoderLayer, detector.pixel_decoder.layers[-1])
        _add_nothing(bato.attention, bato.ffn, last.ffn.norm)
        nn.init.dirac_(cast(nn.Conv2d, bato.mask_features[0]).weight)


def _start_selection(selection: SecondSelection, norm: nn.LayerNorm, detector: Detector) -> None:
    for layer in selection.layers:
        interaction = cast(TokenInteractionLayer, layer)
        _add_nothing(interaction.attention, interaction.ffn, norm)
    selection.norm.load_state_dict(detector.heads.norm.state_dict())
    selection.position.load_state_dict(detector.decoder.position_head.state_dict())


def _add_nothing(attention: Attention, ffn: FeedForward, norm: nn.LayerNorm) -> None:
    """Let both blocks return LN(x), with the weights of a norm that x has passed already."""
    for block, last in ((attention, attention.attention.out_proj), (ffn, ffn.linear2)):
        block.norm.load_state_dict(norm.state_dict())
        for parameter in last.parameters():
            nn.init.zeros_(parameter)
