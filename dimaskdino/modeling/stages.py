"""Names and order of the model's stages: the places where it predicts classes, boxes and, mostly, masks.

`first_selection` → `token_interaction.0`, `.1`, … → `decoder.0`, the decoder's input → `decoder.1`, the first decoder
layer → … → `decoder.L`, the last.
"""

from dimaskdino import config

FIRST_SELECTION = "first_selection"
DECODER_INPUT = "decoder.0"
FIRST_LAYER = "decoder.1"


def token_interaction(number: int) -> str:
    """The stage after a token-interaction layer, counted from 0."""
    return f"token_interaction.{number}"


def decoder(number: int) -> str:
    """The stage after a decoder layer, counted from 1; 0 is the decoder's input."""
    return f"decoder.{number}"


def is_decoder(stage: str) -> bool:
    """Whether a stage belongs to the decoder, its input included."""
    return stage.startswith("decoder.")


def last_layer(cfg: config.Model) -> str:
    """The stage after the last decoder layer."""
    return decoder(cfg.decoder.layers)


def stage_names(cfg: config.Model) -> list[str]:
    """All stages of a model, in order."""
    interaction_layers = (len(cfg.selection.k) - 1) * cfg.selection.token_interaction_layers
    interactions = [token_interaction(i) for i in range(interaction_layers)]
    layers = [decoder(i) for i in range(cfg.decoder.layers + 1)]
    return [FIRST_SELECTION, *interactions, *layers]


def short_name(stage: str) -> str:
    """The name of a stage for the axis of a figure, on two lines where it is long."""
    kind, _, number = stage.partition(".")
    if stage == FIRST_SELECTION:
        return "first\nselection"
    if stage == DECODER_INPUT:
        return "decoder\ninput"
    if kind == "decoder":
        return f"layer {number}"
    if kind == "token_interaction":
        return f"token\ninter. {int(number) + 1}"
    return stage
