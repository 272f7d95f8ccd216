"""The operator against a loop over every sample, and every backend against the reference."""

import math

import ms_deform_attn
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from ms_deform_attn import backend, flops, ms_deform_attn_reference
from ms_deform_attn.functional import _loaded

SHAPES = [(5, 7), (3, 4), (1, 1)]
needs_kernels = pytest.mark.skipif(not _loaded("cpu"), reason="CPU kernels are not built (no compiler here)")
BACKENDS = ["reference", pytest.param("cpu", marks=needs_kernels)]


def inputs(B=2, Q=6, heads=2, D=4, points=3, shapes=SHAPES, dtype=torch.float64, seed=0):
    g = torch.Generator().manual_seed(seed)
    N, levels = sum(h * w for h, w in shapes), len(shapes)
    value = torch.randn(B, N, heads, D, generator=g, dtype=dtype)
    locations = torch.rand(B, Q, heads, levels, points, 2, generator=g, dtype=dtype) * 1.4 - 0.2
    weights = torch.rand(B, Q, heads, levels, points, generator=g, dtype=dtype)
    return value, shapes, locations, weights


def by_loop(value, shapes, locations, weights):
    """One sample after the other, as the definition says."""
    B, _, heads, D = value.shape
    Q, points = locations.shape[1], locations.shape[4]
    output = torch.zeros(B, Q, heads, D, dtype=value.dtype)
    starts = [sum(h * w for h, w in shapes[:i]) for i in range(len(shapes))]
    for b in range(B):
        for q in range(Q):
            for m in range(heads):
                for level, (h, w) in enumerate(shapes):
                    for p in range(points):
                        x, y = (locations[b, q, m, level, p] * torch.tensor([w, h]) - 0.5).tolist()
                        for cy in (math.floor(y), math.floor(y) + 1):
                            for cx in (math.floor(x), math.floor(x) + 1):
                                if 0 <= cx < w and 0 <= cy < h:
                                    part = (1 - abs(x - cx)) * (1 - abs(y - cy))
                                    cell = value[b, starts[level] + cy * w + cx, m]
                                    output[b, q, m] += weights[b, q, m, level, p] * part * cell
    return output.flatten(2)


@pytest.mark.parametrize("name", BACKENDS)
def test_definition(name):
    arguments = inputs()
    with backend(name):
        torch.testing.assert_close(ms_deform_attn.ms_deform_attn(*arguments), by_loop(*arguments))


@pytest.mark.parametrize("name", BACKENDS)
@pytest.mark.parametrize(
    ("D", "points", "shapes"), [(1, 1, [(4, 4)]), (30, 3, SHAPES), (32, 4, SHAPES), (71, 2, SHAPES)]
)
def test_gradients(name, D, points, shapes):
    value, shapes, locations, weights = inputs(B=1, Q=3, D=D, points=points, shapes=shapes)
    tensors = [x.requires_grad_() for x in (value, locations, weights)]
    with backend(name):
        assert torch.autograd.gradcheck(
            lambda v, loc, w: ms_deform_attn.ms_deform_attn(v, shapes, loc, w), tensors, fast_mode=True
        )


@needs_kernels
@settings(deadline=None, max_examples=60)
@given(
    st.integers(0, 3),
    st.integers(0, 9),
    st.integers(1, 5),
    st.sampled_from([1, 3, 8, 16, 30, 32, 64, 71]),
    st.integers(1, 5),
    st.lists(st.tuples(st.integers(1, 9), st.integers(1, 9)), min_size=1, max_size=5),
)
def test_kernels_equal_the_reference(B, Q, heads, D, points, shapes):
    results = []
    for name in ("reference", "cpu"):
        value, _, locations, weights = inputs(B, Q, heads, D, points, shapes)
        tensors = [x.requires_grad_() for x in (value, locations, weights)]
        with backend(name):
            output = ms_deform_attn.ms_deform_attn(value, shapes, locations, weights)
        results.append([output, *torch.autograd.grad(output.sin().sum(), tensors)])
    for reference, kernel in zip(*results, strict=True):
        torch.testing.assert_close(kernel, reference)


@needs_kernels
@pytest.mark.parametrize(("dtype", "roundings"), [(torch.float32, 64), (torch.bfloat16, 2), (torch.float16, 2)])
def test_precision(dtype, roundings):
    value, shapes, locations, weights = inputs(Q=50, D=32, dtype=dtype)
    exact = ms_deform_attn_reference(value.double(), shapes, locations.double(), weights.double())
    with backend("cpu"):
        found = ms_deform_attn.ms_deform_attn(value, shapes, locations, weights)
    assert found.dtype == dtype
    error = (found.double() - exact).abs().max() / exact.abs().max()
    assert error <= roundings * torch.finfo(dtype).eps


@needs_kernels
def test_the_number_of_threads_changes_nothing():
    value, shapes, locations, weights = inputs(Q=300, D=32, dtype=torch.float32)
    results, threads = [], torch.get_num_threads()
    try:
        for number in (1, 2, 3):
            torch.set_num_threads(number)
            tensors = [x.detach().requires_grad_() for x in (value, locations, weights)]
            with backend("cpu"):
                output = ms_deform_attn.ms_deform_attn(tensors[0], shapes, *tensors[1:])
            results.append([output, *torch.autograd.grad(output.sum(), tensors)])
    finally:
        torch.set_num_threads(threads)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


@needs_kernels
def test_locations_that_are_nowhere_contribute_nothing():
    value, shapes, locations, weights = inputs(dtype=torch.float32)
    for bad in (torch.nan, torch.inf, -torch.inf, 1e30, -1e30, -2.0, 3.0):
        lost = locations.clone()
        lost[:, 0] = bad
        tensors = [x.clone().requires_grad_() for x in (value, lost, weights)]
        with backend("cpu"):
            output = ms_deform_attn.ms_deform_attn(tensors[0], shapes, *tensors[1:])
            whole = ms_deform_attn.ms_deform_attn(value, shapes, locations, weights)
        assert (output[:, 0] == 0).all()
        torch.testing.assert_close(output[:, 1:], whole[:, 1:])
        output.sum().backward()
        assert all(x.grad.isfinite().all() for x in tensors)
        assert (tensors[1].grad[:, 0] == 0).all()


@needs_kernels
def test_nan_in_cells_that_are_not_sampled_does_not_leak():
    value, shapes, locations, weights = inputs(dtype=torch.float32, shapes=[(4, 4)], points=1)
    value[:, 15] = torch.nan
    locations[...] = 0.25  # between cells of the first quarter
    with backend("cpu"):
        assert ms_deform_attn.ms_deform_attn(value, shapes, locations, weights).isfinite().all()


@needs_kernels
def test_inputs_that_are_not_contiguous():
    value, shapes, locations, weights = inputs(dtype=torch.float32)
    twisted = value.transpose(1, 2).contiguous().transpose(1, 2)
    expanded = locations[:, :1].expand(-1, 6, -1, -1, -1, -1)
    with backend("cpu"):
        found = ms_deform_attn.ms_deform_attn(twisted, torch.tensor(shapes), expanded, weights)
    torch.testing.assert_close(found, ms_deform_attn_reference(value, shapes, expanded.contiguous(), weights))


@needs_kernels
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # in opcheck itself
def test_registration():
    value, shapes, locations, weights = inputs()
    flat = [x for shape in shapes for x in shape]
    tensors = [x.requires_grad_() for x in (value, locations, weights)]
    torch.library.opcheck(torch.ops.ms_deform_attn.forward.default, (tensors[0], flat, tensors[1], tensors[2]))
    grad = torch.ones(2, 6, 8, dtype=torch.float64)
    plain = [x.detach() for x in tensors]
    torch.library.opcheck(torch.ops.ms_deform_attn.backward.default, (grad, plain[0], flat, plain[1], plain[2], True, True))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda v, s, x, w: (v[0], s, x, w), r"value must be \(B, N, heads, D\)"),
        (lambda v, s, x, w: (v, s[:2], x, w), "47 cells, value has N = 48"),
        (lambda v, s, x, w: (v, s, x[:, :, :1], w), r"sampling_locations must be \(B=2, Q, heads=2, levels=3"),
        (lambda v, s, x, w: (v, s, x[..., :1], w), "must end in 2"),
        (lambda v, s, x, w: (v, s, x, w[:, :1]), r"attention_weights must be \(2, 6, 2, 3, 3\)"),
        (lambda v, s, x, w: (v.long(), s, x, w), "value must be floating point"),
        (lambda v, s, x, w: (v, s, x.to("meta"), w), "sampling_locations is on meta"),
    ],
)
def test_mistakes_name_the_argument(change, message):
    with pytest.raises((ValueError, TypeError), match=message):
        ms_deform_attn.ms_deform_attn(*change(*inputs()))


def test_status_says_what_runs():
    with backend("reference"):
        assert "reference" in ms_deform_attn.status()
    assert ("compiled" in ms_deform_attn.status()) == _loaded("cpu")
    with pytest.raises(ValueError, match="backend must be"):
        ms_deform_attn.set_backend("cuda9")


def test_flops_count_four_multiply_adds_a_sample_and_channel():
    assert flops(torch.Size((2, 6, 2, 3, 3, 2)), 4) == 2 * 4 * 2 * 6 * 2 * 3 * 3 * 4
