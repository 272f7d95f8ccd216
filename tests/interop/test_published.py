"""Published state dicts: every key goes somewhere, aliases agree, unknown keys are an error."""

import pytest
import torch
from golden import MODELS, read, state_dict

from dimaskdino.errors import UserError
from dimaskdino.interop.published import convert_state
from dimaskdino.modeling import Detector


@pytest.mark.parametrize("case", ["di_small", "maskdino_4level", "maskdino_3s"])
def test_every_key_is_accounted_for(case):
    published = state_dict(read(case))
    conversion = convert_state(published)
    assert set(conversion.renamed) | set(conversion.ignored) == set(published)
    assert conversion.ignored == ["criterion.empty_weight"]
    shapes = {key: value.shape for key, value in Detector(MODELS[case]).state_dict().items()}
    assert {key: value.shape for key, value in conversion.state.items()} == shapes


def test_aliases_that_differ_are_an_error():
    published = state_dict(read("di_small"))
    published["sem_seg_head.predictor.decoder.norm.weight"] = torch.zeros(256)
    with pytest.raises(UserError, match=r"should be another name of the tensor heads\.norm\.weight"):
        convert_state(published)


def test_unknown_keys_are_an_error():
    with pytest.raises(UserError, match=r"1 keys are not known .* first sem_seg_head\.something"):
        convert_state({"sem_seg_head.something": torch.zeros(1)})
