"""Building blocks against PyTorch's own."""

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from dimaskdino.modeling import layers
from dimaskdino.modeling.layers import FeedForward, MultiHeadAttention
from dimaskdino.modeling.structures import FeatureLevels


@pytest.mark.parametrize("masked", [False, True])
def test_attention_is_that_of_pytorch(masked):
    torch.manual_seed(0)
    expected = nn.MultiheadAttention(24, 3, batch_first=True)
    torch.manual_seed(0)
    attention = MultiHeadAttention(24, 3)
    assert all(torch.equal(expected.state_dict()[name], value) for name, value in attention.state_dict().items())
    nn.init.normal_(attention.in_proj_bias)
    expected.load_state_dict(attention.state_dict())
    query, key, value = torch.randn(2, 7, 24), torch.randn(2, 5, 24), torch.randn(2, 5, 24)
    forbidden = (torch.rand(7, 5) < 0.4) & (torch.arange(5) > 0) if masked else None
    found = attention(query, key, value, forbidden, need_weights=True)
    wanted = expected(query, key, value, attn_mask=forbidden)
    for a, b in zip(found, wanted, strict=True):
        torch.testing.assert_close(a, b)
    assert attention(query, key, value, forbidden)[1] is None
    found[0].square().sum().backward()
    wanted[0].square().sum().backward()
    for (name, a), b in zip(attention.named_parameters(), expected.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad, msg=name)


class Precisions(TorchDispatchMode):
    """Collects the precisions that the fused attention is computed in."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if "scaled_dot_product" in str(function):
            self.seen.append(args[0].dtype)
        return function(*args, **(kwargs or {}))


def test_attention_trains_in_float32_on_a_cpu_under_autocast():
    torch.manual_seed(0)
    attention, x = MultiHeadAttention(24, 3), torch.randn(2, 7, 24)
    with torch.autocast("cpu", torch.bfloat16), Precisions() as precisions:
        output, _ = attention(x, x, x)
        with torch.no_grad():
            attention(x, x, x)
    assert precisions.seen == [torch.float32, torch.bfloat16]
    assert output.dtype == torch.bfloat16  # of the projection
    torch.testing.assert_close(output.float(), attention(x, x, x)[0], atol=2e-2, rtol=0)


def test_feed_forward_is_the_same_with_and_without_gradients():
    torch.manual_seed(0)
    block, x = FeedForward(8, 16), torch.randn(2, 3, 8)
    expected = block.norm(x + block.linear2(torch.relu(block.linear1(x))))
    torch.testing.assert_close(block(x), expected, atol=0, rtol=0)
    with torch.no_grad():
        torch.testing.assert_close(block(x), expected, atol=0, rtol=0)


def test_feed_forward_of_many_tokens_in_parts(monkeypatch):
    torch.manual_seed(0)
    block, x = FeedForward(8, 16), torch.randn(2, 11, 8, requires_grad=True)
    whole = block(x)
    [gradient] = torch.autograd.grad(whole.square().sum(), x)
    monkeypatch.setattr(layers, "CACHED_TOKENS", 4)
    parts = block(x)
    torch.testing.assert_close(parts, whole)
    torch.testing.assert_close(torch.autograd.grad(parts.square().sum(), x)[0], gradient)


@pytest.mark.parametrize("B", [1, 3])
def test_a_level_is_a_channels_last_map(B):
    """Also by its strides, which is what PyTorch looks at for a batch of one image."""
    levels = FeatureLevels(torch.arange(B * 26 * 4).view(B, 26, 4).float(), ((2, 3), (4, 5)), (8, 4))
    level = levels.map(4)
    assert level.stride()[1:] == (1, 5 * 4, 4)
    assert level.stride(0) >= 4 * 5 * 4
    assert torch.equal(level, levels.tokens[:, 6:].transpose(1, 2).reshape(B, 4, 4, 5))
    assert nn.functional.interpolate(level, (8, 10), mode="bilinear").is_contiguous(memory_format=torch.channels_last)
