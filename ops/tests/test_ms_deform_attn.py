"""The operator against a loop over every sample, and every backend against the reference."""

import math
import os
import subprocess
import sys

import emulated
import ms_deform_attn
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from ms_deform_attn import flops, install_drop_in
from ms_deform_attn.benchmark import Workload, _errors, _implementations, measure
from ms_deform_attn.build import compiler
from ms_deform_attn.functional import available
from sanitizer import address_sanitizer

SHAPES = [(5, 7), (3, 4), (1, 1)]
DEVICES = {
    "reference": "cpu",
    "cpu": "cpu",
    "triton": "cuda" if torch.cuda.is_available() else "cpu",
    "cuda": "cuda",
    "emulated": "cpu",  # the CUDA kernels, in plain C++
}


def marked(name):
    """A backend that is skipped where it cannot run, with the reason."""
    if name == "emulated":
        runs = emulated.possible()
    else:
        runs = available(name) and (DEVICES[name] == "cpu" or torch.cuda.is_available())
    return pytest.param(name, marks=pytest.mark.skipif(not runs, reason=f"no {name} kernels or no device for them"))


def backend(name):
    """`ms_deform_attn.backend`, and the emulated CUDA kernels as one more."""
    return emulated.emulated() if name == "emulated" else ms_deform_attn.backend(name)


needs_cpu_kernels = pytest.mark.skipif(not available("cpu"), reason="CPU kernels are not built (no compiler here)")
KERNELS = [marked("cpu"), marked("triton"), marked("cuda"), marked("emulated")]
BACKENDS = ["reference", *KERNELS]


def raw_operator(name, direction):
    """A backend's operator as it is registered: "forward" or "backward"."""
    prefix = f"{name}_" if name in ("triton", "emulated") else ""
    if name == "emulated":
        emulated.load()
    return getattr(torch.ops.ms_deform_attn, prefix + direction)


def inputs(B=2, Q=6, heads=2, D=4, points=3, shapes=SHAPES, dtype=torch.float64, seed=0):
    g = torch.Generator().manual_seed(seed)
    N, levels = sum(h * w for h, w in shapes), len(shapes)
    value = torch.randn(B, N, heads, D, generator=g, dtype=dtype)
    locations = torch.rand(B, Q, heads, levels, points, 2, generator=g, dtype=dtype) * 1.4 - 0.2
    weights = torch.rand(B, Q, heads, levels, points, generator=g, dtype=dtype)
    return value, shapes, locations, weights


def results(name, value, shapes, locations, weights):
    """Output and gradients of a backend, on the CPU."""
    tensors = [x.detach().to(DEVICES[name]).requires_grad_() for x in (value, locations, weights)]
    with backend(name):
        output = ms_deform_attn.ms_deform_attn(tensors[0], shapes, *tensors[1:])
        grads = torch.autograd.grad(output.sin().sum(), tensors)
    return [x.detach().cpu() for x in (output, *grads)]


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
    torch.testing.assert_close(results(name, *arguments)[0], by_loop(*arguments))


@needs_cpu_kernels
@pytest.mark.parametrize("levels", [1, 4, 5])
@pytest.mark.parametrize("points", [1, 3, 4, 8])
@pytest.mark.parametrize("D", [1, 30, 32, 64, 71])
def test_gradients_are_those_of_finite_differences(D, points, levels):
    shapes = [(5, 7), (3, 4), (1, 1), (2, 1), (1, 6)][:levels]
    value, _, locations, weights = inputs(B=1, Q=3, D=D, points=points, shapes=shapes)
    tensors = [x.requires_grad_() for x in (value, locations, weights)]
    with backend("cpu"):
        assert torch.autograd.gradcheck(
            lambda v, loc, w: ms_deform_attn.ms_deform_attn(v, shapes, loc, w), tensors, fast_mode=True
        )


@pytest.mark.parametrize("name", [marked("cpu"), marked("emulated")])
@settings(deadline=None, max_examples=30)
@given(
    st.integers(0, 3),
    st.integers(0, 9),
    st.integers(1, 5),
    st.sampled_from([1, 3, 8, 16, 24, 30, 32, 40, 64, 71]),
    st.integers(1, 9),
    st.lists(st.tuples(st.integers(1, 9), st.integers(1, 9)), min_size=1, max_size=5),
    st.sampled_from([torch.float32, torch.float64]),
)
def test_kernels_equal_the_reference(name, B, Q, heads, D, points, shapes, dtype):
    value, _, locations, weights = inputs(B, Q, heads, D, points, shapes)
    arguments = value.to(dtype), shapes, locations.to(dtype), weights.to(dtype)
    for kernel, reference in zip(results(name, *arguments), results("reference", *arguments), strict=True):
        if reference.numel():  # roundings of the largest terms, which may cancel in a number
            assert (kernel - reference).abs().max() <= 64 * torch.finfo(dtype).eps * reference.abs().max()


@pytest.mark.parametrize("name", KERNELS)
@pytest.mark.parametrize(
    ("B", "Q", "D", "points", "shapes"),
    [
        (0, 5, 4, 2, SHAPES),
        (2, 0, 4, 2, SHAPES),
        (2, 97, 30, 3, SHAPES),
        (129, 1, 8, 1, [(2, 3)]),
        (1, 5, 71, 8, SHAPES),
        (1, 48, 32, 4, SHAPES),  # as many queries as cells: taken in tiles
        (2, 3, 71, 1, SHAPES),  # fewer samples than cells: these are read where they lie
    ],
)
def test_odd_sizes(name, B, Q, D, points, shapes):
    arguments = inputs(B, Q, 2, D, points, shapes)
    for kernel, reference in zip(results(name, *arguments), results("reference", *arguments), strict=True):
        torch.testing.assert_close(kernel, reference)


@pytest.mark.parametrize("name", KERNELS)
@pytest.mark.parametrize(("dtype", "roundings"), [(torch.float32, 64), (torch.bfloat16, 2), (torch.float16, 2)])
@pytest.mark.parametrize("Q", [50, 9])  # each cell read often, and few cells read
def test_precision(name, Q, dtype, roundings):
    value, shapes, locations, weights = inputs(Q=Q, D=32, dtype=dtype)
    # sampled far enough from the lines between cell centres, where the gradient of a location jumps
    position = locations.double() * torch.tensor([[w, h] for h, w in shapes])[:, None]
    position = position.floor() + (position - position.floor()).clamp(0.1, 0.9) + 0.5
    locations = (position / torch.tensor([[w, h] for h, w in shapes])[:, None]).float()
    exact = results("reference", value.double(), shapes, locations.double(), weights.double())
    for found, truth in zip(results(name, value, shapes, locations, weights), exact, strict=True):
        assert found.dtype == (torch.float32 if found.shape == locations.shape else dtype)
        # sin() of the test adds one rounding of the output to what comes back
        assert (found.double() - truth).abs().max() / truth.abs().max() <= (roundings + 1) * torch.finfo(dtype).eps


@pytest.mark.slow
@needs_cpu_kernels
@pytest.mark.parametrize("locations", ["near", "uniform"])
def test_encoder_scale_is_within_1e_5_of_float64(locations):
    errors = _errors(Workload("encoder", locations, 1, "float32"), "cpu", dict(_implementations("cpu")))
    assert all(error["cpu"] < 1e-5 for error in errors.values())


@needs_cpu_kernels
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("Q", [300, 9])  # each cell read often, and few cells read
def test_the_number_of_threads_changes_nothing(Q, dtype):
    arguments = inputs(Q=Q, D=32, dtype=dtype)
    found, threads = [], torch.get_num_threads()
    try:
        for number in (1, 2, 3):
            torch.set_num_threads(number)
            found.append(results("cpu", *arguments))
    finally:
        torch.set_num_threads(threads)
    for other in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found[0], other, strict=True))


@needs_cpu_kernels
@pytest.mark.skipif(sys.platform != "linux", reason="OpenMP is used on Linux")
def test_the_kernels_are_compiled_with_threads():
    # without OpenMP's parallel regions, ATen's parallel_for, which is compiled in, is a plain loop
    library = ms_deform_attn.library_path("cpu").read_bytes()
    assert b"GOMP_parallel" in library or b"__kmpc_fork_call" in library


@pytest.mark.parametrize("name", [marked("cuda"), marked("emulated")])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("Q", [60, 48])  # 48: as many queries as cells
def test_deterministic_gradients_of_the_cuda_kernels(name, dtype, Q):
    """Bit for bit equal from call to call, and those of the reference."""
    arguments = inputs(Q=Q, D=30, dtype=dtype)
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    try:
        first, second = results(name, *arguments), results(name, *arguments)
    finally:
        torch.use_deterministic_algorithms(before)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    exact = results("reference", *(x.double() if isinstance(x, torch.Tensor) else x for x in arguments))
    for found, truth in zip(first[:2], exact[:2], strict=True):
        assert (found.double() - truth).abs().max() / truth.abs().max() <= 64 * torch.finfo(found.dtype).eps
    others = [results(name, *arguments)[1] for _ in range(4)]  # by atomic additions, in whatever order
    assert dtype == torch.bfloat16 or any(not torch.equal(others[0], x) for x in others[1:])


@pytest.mark.parametrize("name", KERNELS)
def test_locations_that_are_nowhere_contribute_nothing(name):
    nowhere = torch.tensor([torch.nan, torch.inf, -torch.inf, 1e30, -1e30, -2.0, 3.0])
    value, shapes, locations, weights = inputs(Q=len(nowhere) + 2, dtype=torch.float32)
    lost = locations.clone()
    lost[:, : len(nowhere)] = nowhere.view(-1, 1, 1, 1, 1)
    whole = results(name, value, shapes, locations, weights)
    found = results(name, value, shapes, lost, weights)
    torch.testing.assert_close(found[0][:, len(nowhere) :], whole[0][:, len(nowhere) :])
    assert all(x.isfinite().all() for x in found)
    for i in (0, 2, 3):  # output, and gradients of locations and weights
        assert (found[i][:, : len(nowhere)] == 0).all()


@pytest.mark.parametrize("name", KERNELS)
def test_locations_on_borders_and_outside(name):
    value, shapes, _, _ = inputs(B=1, D=8)
    axis = torch.tensor([-2, -0.3, -0.05, 0, 1 / 14, 0.5, 13 / 14, 1, 1.05, 1.3, 3], dtype=torch.float64)
    locations = torch.cartesian_prod(axis, axis).view(1, -1, 1, 1, 1, 2).repeat(1, 1, 2, 3, 2, 1)
    weights = torch.rand(locations.shape[:-1], dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    found, truth = (results(x, value, shapes, locations, weights) for x in (name, "reference"))
    for i in (0, 1, 3):  # on a border the gradient of a location jumps: both sides are right
        torch.testing.assert_close(found[i], truth[i])


@pytest.mark.parametrize("name", KERNELS)
def test_nan_in_cells_that_are_not_sampled_does_not_leak(name):
    value, shapes, locations, weights = inputs(dtype=torch.float32, shapes=[(4, 4)], points=1)
    value[:, 15] = torch.nan
    locations[...] = 0.25  # between cells of the first quarter
    assert all(x.isfinite().all() for x in results(name, value, shapes, locations, weights))
    locations[...] = -5.0
    value[...] = torch.nan
    assert all(x.isfinite().all() for x in results(name, value, shapes, locations, weights))


@pytest.mark.parametrize("name", KERNELS)
def test_inputs_that_are_not_contiguous_or_aligned(name):
    value, shapes, locations, weights = inputs(dtype=torch.float32, D=32)
    truth = results("reference", value, shapes, locations[:, :1].expand_as(locations), weights)
    twisted = value.transpose(1, 2).contiguous().transpose(1, 2)
    shifted = torch.empty(value.numel() + 1)[1:].view_as(value).copy_(value)
    assert shifted.data_ptr() % 16
    for other in (twisted, shifted):
        device = DEVICES[name]
        tensors = [x.to(device).requires_grad_() for x in (other, locations[:, :1].expand_as(locations), weights)]
        with backend(name):
            output = ms_deform_attn.ms_deform_attn(tensors[0], torch.tensor(shapes), *tensors[1:])
            grads = torch.autograd.grad(output.sin().sum(), tensors)
        for found, expected in zip((output, *grads), truth, strict=True):
            torch.testing.assert_close(found.cpu(), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", KERNELS)
def test_only_the_gradients_that_are_needed(name):
    value, shapes, locations, weights = inputs()
    everything = results(name, value, shapes, locations, weights)[1:]
    backward = raw_operator(name, "backward")
    flat = [x for shape in shapes for x in shape]
    device = DEVICES[name]
    for need_value, need_samples in ((True, False), (False, True), (False, False)):
        needs = need_value, need_samples, need_samples
        tensors = [x.to(device).requires_grad_(n) for x, n in zip((value, locations, weights), needs, strict=True)]
        with backend(name):
            output = ms_deform_attn.ms_deform_attn(tensors[0], shapes, *tensors[1:])
        grad_output = output.detach().cos()
        raw = backward(grad_output, *tensors[:1], flat, *tensors[1:], need_value, need_samples)
        assert [x.numel() > 0 for x in raw] == [need_value, need_samples, need_samples]
        for x, grad, expected in zip(tensors, raw, everything, strict=True):
            if x.requires_grad:
                found = torch.autograd.grad(output.sin().sum(), x, retain_graph=True)[0]
                torch.testing.assert_close(found.cpu(), expected)
                torch.testing.assert_close(grad.cpu(), expected)


@pytest.mark.parametrize("name", [marked("cpu"), marked("cuda"), marked("emulated")])
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # in opcheck itself
def test_registration(name):
    value, shapes, locations, weights = (x if isinstance(x, list) else x.to(DEVICES[name]) for x in inputs())
    flat = [x for shape in shapes for x in shape]
    tensors = [x.requires_grad_() for x in (value, locations, weights)]
    forward, backward = raw_operator(name, "forward").default, raw_operator(name, "backward").default
    torch.library.opcheck(forward, (tensors[0], flat, tensors[1], tensors[2]))
    grad = torch.ones(2, 6, 8, dtype=torch.float64, device=value.device)
    plain = [x.detach() for x in tensors]
    for needs in ((True, True), (True, False), (False, True)):
        torch.library.opcheck(backward, (grad, plain[0], flat, *plain[1:], *needs))


class Attend(torch.nn.Module):
    def forward(self, value, locations, weights):
        return ms_deform_attn.ms_deform_attn(value, SHAPES, locations, weights).relu()


@pytest.mark.parametrize("name", ["reference", marked("cpu")])
def test_compile_in_one_graph(name):
    value, _, locations, weights = inputs(dtype=torch.float32)
    tensors = [x.requires_grad_() for x in (value, locations, weights)]
    torch.compiler.reset()
    with backend(name):
        compiled = torch.compile(Attend(), fullgraph=True, backend="aot_eager")
        output, expected = compiled(*tensors), Attend()(*tensors)
        torch.testing.assert_close(output, expected)
        grads = zip(
            torch.autograd.grad(output.sum(), tensors), torch.autograd.grad(expected.sum(), tensors), strict=True
        )
        for a, b in grads:
            torch.testing.assert_close(a, b)


@needs_cpu_kernels
def test_export_with_a_batch_size_left_open():
    value, _, locations, weights = inputs(dtype=torch.float32)
    batch = torch.export.Dim("batch", min=1, max=64)
    with backend("cpu"):
        program = torch.export.export(Attend(), (value, locations, weights), dynamic_shapes=({0: batch},) * 3)
    assert "ms_deform_attn.forward" in str(program.graph)
    value, _, locations, weights = inputs(B=5, dtype=torch.float32)
    torch.testing.assert_close(program.module()(value, locations, weights), Attend()(value, locations, weights))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda v, s, x, w: (v[0], s, x, w), r"value must be \(B, N, heads, D\)"),
        (lambda v, s, x, w: (v, s[:2], x, w), "47 cells, value has N = 48"),
        # 48 cells all the same: kernels would read outside a level without cells
        (
            lambda v, s, x, w: (v, [(48, 1), (0, 3), (0, 4)], x, w),
            r"level 2 of spatial_shapes is \(0, 3\); each side must",
        ),
        (lambda v, s, x, w: (v, [(-8, -5), (4, 1), (2, 2)], x, w), r"level 1 of spatial_shapes is \(-8, -5\)"),
        (
            lambda v, s, x, w: (v, torch.tensor([(48, 1), (3, 0), (4, 0)]), x, w),
            r"level 2 of spatial_shapes is \(3, 0\)",
        ),
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


@pytest.mark.parametrize("name", [marked("cpu"), marked("emulated")])
def test_kernels_that_are_called_directly_refuse_levels_without_cells(name):
    value, _, locations, weights = inputs(dtype=torch.float32)
    for shapes in ([48, 1, 0, 3, 0, 4], [-8, -5, 4, 1, 2, 2]):
        with pytest.raises(RuntimeError, match="every level needs a height and a width of at least 1"):
            raw_operator(name, "forward")(value, shapes, locations, weights)
        with pytest.raises(RuntimeError, match="every level needs a height and a width of at least 1"):
            raw_operator(name, "backward")(value.flatten(2)[:, :6], value, shapes, locations, weights, True, True)


def test_status_says_what_runs():
    with backend("reference"):
        assert "reference, as chosen" in ms_deform_attn.status("cpu")
    assert ("compiled CPU" in ms_deform_attn.status("cpu")) == available("cpu")
    assert ("python -m ms_deform_attn build" in ms_deform_attn.status("cpu")) != available("cpu")
    with pytest.raises(ValueError, match="backend must be one of auto, reference, cpu, cuda, triton"):
        ms_deform_attn.set_backend("cuda9")


def test_a_backend_that_cannot_run_says_why(monkeypatch):
    if not available("cuda"):
        with pytest.raises(RuntimeError, match="CUDA kernels are not built: run 'python -m ms_deform_attn build'"):
            ms_deform_attn.set_backend("cuda")
    if not torch.cuda.is_available():
        monkeypatch.delenv("TRITON_INTERPRET")
        with backend("triton"), pytest.raises(RuntimeError, match="needs a GPU"):
            ms_deform_attn.ms_deform_attn(*inputs())


def test_flops_count_four_multiply_adds_a_sample_and_channel():
    assert flops(torch.Size((2, 6, 2, 3, 3, 2)), 4) == 2 * 4 * 2 * 6 * 2 * 3 * 3 * 4


@pytest.mark.parametrize("name", BACKENDS)
def test_drop_in_for_the_compiled_extension(name):
    install_drop_in()
    import MultiScaleDeformableAttention as Extension

    value, shapes, locations, weights = inputs()
    truth = results("reference", value, shapes, locations, weights)
    value, locations, weights = (x.to(DEVICES[name]) for x in (value, locations, weights))
    on_device = torch.tensor(shapes, device=value.device)
    starts = torch.tensor([0, 35, 47], device=value.device)
    with backend(name):
        for _ in range(2):
            output = Extension.ms_deform_attn_forward(value, on_device, starts, locations, weights, 64)
            torch.testing.assert_close(output.cpu(), truth[0])
        grads = Extension.ms_deform_attn_backward(value, on_device, starts, locations, weights, output.cos(), 64)
        for grad, expected in zip(grads, truth[1:], strict=True):
            torch.testing.assert_close(grad.cpu(), expected)
        on_device[:2] = on_device[:2].flip(1)  # written to in place: not what was copied to the host before
        turned = Extension.ms_deform_attn_forward(value, on_device, starts, locations, weights, 64)
    assert not torch.equal(turned.cpu(), truth[0])


@pytest.mark.parametrize("name", BACKENDS)
def test_drop_in_for_shapes_made_under_inference_mode(name):
    """Tensors made there have no version counter."""
    install_drop_in()
    import MultiScaleDeformableAttention as Extension

    value, shapes, locations, weights = inputs()
    truth = results("reference", value, shapes, locations, weights)[0]
    with torch.inference_mode(), backend(name):
        moved = (x.to(DEVICES[name]) for x in (value, torch.tensor(shapes), torch.zeros(3), locations, weights))
        value, on_device, starts, locations, weights = moved
        output = Extension.ms_deform_attn_forward(value, on_device, starts, locations, weights, 64)
        torch.testing.assert_close(output.cpu(), truth)
        on_device[:2] = on_device[:2].flip(1)
        turned = Extension.ms_deform_attn_forward(value, on_device, starts, locations, weights, 64)
    assert not torch.equal(turned.cpu(), truth)


@needs_cpu_kernels
def test_benchmark_measures_every_implementation():
    implementations = dict(_implementations("cpu"))
    rows = list(measure(Workload("decoder", "near", 1, "float32"), "cpu", implementations, 1, 1e10))
    assert [row.direction for row in rows] == ["forward", "forward+backward"]
    for row in rows:
        assert set(row.milliseconds) == {"reference", "cpu"}
        assert all(ms > 0 for ms in row.milliseconds.values())
        assert max(row.error.values()) < 1e-4


@pytest.mark.slow
@pytest.mark.skipif(compiler("cpu") is None, reason="needs a C++ compiler")
def test_two_versions_of_the_kernels_are_built_in_one_process(tmp_path):
    script = (
        "import sys; from pathlib import Path; from ms_deform_attn import build\n"
        "for name in ('one', 'two'):\n"
        "    source = Path(sys.argv[1], f'{name}.cpp')\n"
        "    source.write_text(f'extern \"C\" int {name}() {{ return 1; }}')\n"
        "    assert build('cpu', source=source).exists()\n"
    )
    environment = os.environ | {"MS_DEFORM_ATTN_CACHE": str(tmp_path)}
    subprocess.run([sys.executable, "-c", script, str(tmp_path)], env=environment, check=True)


@pytest.mark.slow
@pytest.mark.skipif(compiler("cuda") is None or torch.version.cuda is None, reason="no nvcc, or torch without CUDA")
def test_the_cuda_kernels_compile_and_load(tmp_path):
    environment = os.environ | {"MS_DEFORM_ATTN_CACHE": str(tmp_path), "TORCH_CUDA_ARCH_LIST": "9.0"}
    script = (
        "import torch; from ms_deform_attn import build; from ms_deform_attn.functional import available\n"
        "build('cuda'); assert available('cuda')\n"
        "for name in ('forward', 'backward'):\n"
        "    assert torch._C._dispatch_has_kernel_for_dispatch_key(f'ms_deform_attn::{name}', 'CUDA')\n"
    )
    subprocess.run([sys.executable, "-c", script], env=environment, check=True)


@pytest.mark.slow
@pytest.mark.skipif(compiler("cpu") is None or sys.platform != "linux", reason="needs a compiler with AddressSanitizer")
def test_the_cpu_kernels_under_address_sanitizer(tmp_path):
    sanitizer = address_sanitizer(compiler("cpu"))
    if not sanitizer:
        pytest.skip("the compiler has no AddressSanitizer")
    script = (
        "import importlib, sys\n"
        "build = importlib.import_module('ms_deform_attn.build')\n"
        "build.CPU_FLAGS = ('-O1', '-g', '-march=native', '-fopenmp', '-fsanitize=address')\n"
        "build.build('cpu')\n"
        "import pytest\n"
        "names = 'odd_sizes or nowhere or borders or leak or aligned or needed or definition or precision'\n"
        f"sys.exit(pytest.main(['-q', '-x', '-p', 'no:cacheprovider', '-k', f'({{names}}) and cpu', {__file__!r}]))\n"
    )
    environment = os.environ | {"MS_DEFORM_ATTN_CACHE": str(tmp_path)} | sanitizer
    run = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout[-3000:] + run.stderr[-3000:]
    assert " passed" in run.stdout
    assert "AddressSanitizer" not in run.stderr
