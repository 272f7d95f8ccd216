"""Exported files give the detections of the model on real images, of other sizes than the example's."""

import subprocess
import sys

import pytest
import torch
from small import trained_file

import dimaskdino
from dimaskdino.data.images import load_image
from dimaskdino.interop.export import Exportable, export, well_separated
from dimaskdino.modeling import ImageBatch, postprocess
from dimaskdino.utils.errors import UserError

SHIPPED = ("dimaskdino-shapes", "maskdino-shapes")


@pytest.fixture(scope="module")
def images(shapes_data) -> list[torch.Tensor]:
    """Two batches of scenes, the second cut to another size that is no multiple of 32."""
    files = sorted((shapes_data / "images" / "train").iterdir())[:4]
    whole = torch.stack([load_image(file) for file in files]).float()
    larger = torch.nn.functional.interpolate(whole, scale_factor=2.0, mode="bilinear")
    return [larger, larger[:1, :, :101, :90]]


def test_scores_that_rounding_may_exchange():
    scores = torch.tensor([0.9, 0.5, 0.5, 0.3, 0.299999, 0.1, 0.05])
    assert well_separated(scores).tolist() == [True, False, False, False, False, True, False]


@pytest.mark.parametrize("stage", ["decoder.1", None])
@pytest.mark.parametrize("name", SHIPPED)
def test_the_graph_gives_the_detections_of_postprocess(name, stage, images):
    model = dimaskdino.load(name)
    module = Exportable(model.detector, stage or model.stages[-1], 30).eval()
    for batch in images:
        size = (batch.shape[-2], batch.shape[-1])
        with torch.inference_mode():
            boxes, scores, labels, masks = module(batch)
            seen = ImageBatch.from_images(list(batch))
            predicted = model.detector(seen).stages[stage or model.stages[-1]]
        expected = postprocess(predicted, seen.sizes, seen.padded_size, [size] * len(batch), 30)
        for i, wanted in enumerate(expected):
            torch.testing.assert_close(scores[i], wanted.scores, atol=1e-5, rtol=0)
            rows = well_separated(wanted.scores)
            assert rows[:5].any()
            torch.testing.assert_close(boxes[i][rows], wanted.boxes[rows], atol=1e-3, rtol=0)
            assert torch.equal(labels[i][rows], wanted.labels[rows])
            assert torch.equal(masks[i][rows], wanted.masks[rows])


@pytest.mark.slow
@pytest.mark.parametrize("suffix", [".onnx", ".pt2"])
def test_an_exported_file_is_equal_to_the_model(suffix, images, tmp_path):
    model, path = dimaskdino.load("dimaskdino-shapes"), tmp_path / f"model{suffix}"
    if suffix == ".onnx":
        onnxruntime = pytest.importorskip("onnxruntime", reason="pip install 'dimaskdino[onnx]'")
        pytest.importorskip("onnxscript", reason="pip install 'dimaskdino[onnx]'")
    # a process of its own, since the type checks of the tests refuse the symbols that stand for sizes
    command = [sys.executable, "-m", "dimaskdino", "export", "dimaskdino-shapes", path, "--detections", "20"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "compared with the model: boxes differ by at most" in done.stdout
    assert [file.name for file in tmp_path.iterdir()] == [path.name]
    if suffix == ".onnx":
        assert {node.domain for node in onnx_nodes(path)} == {""}  # plain operators only
        assert not [node.op_type for node in onnx_nodes(path) if "Sequence" in node.op_type]  # OpenVINO has none
        session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
        found = [[torch.from_numpy(x) for x in session.run(None, {"images": batch.numpy()})] for batch in images]
    else:
        images = [images[0], images[0][:1, :, :96]]  # sides that are multiples of 32
        found = run_by_torch_alone(path, images)
    module = Exportable(model.detector, model.stages[-1], 20).eval()
    for batch, (boxes, scores, labels, masks) in zip(images, found, strict=True):
        with torch.inference_mode():
            wanted = module(batch)
        torch.testing.assert_close(scores, wanted[1], atol=1e-4, rtol=0)
        for i in range(len(batch)):
            rows = well_separated(wanted[1][i], 1e-4)
            assert rows[:5].any()
            torch.testing.assert_close(boxes[i][rows], wanted[0][i][rows], atol=1e-2, rtol=0)
            assert torch.equal(labels[i][rows], wanted[2][i][rows])
            assert float((masks[i][rows] != wanted[3][i][rows]).float().mean()) < 1e-4


def run_by_torch_alone(path, images):
    """Outputs of a file of torch.export, in a process that imports nothing else."""
    torch.save(images, path.with_name("images.pt"))
    code = (
        "import sys, torch\n"
        f"module = torch.export.load({str(path)!r}).module()\n"
        f"images = torch.load({str(path.with_name('images.pt'))!r})\n"
        f"torch.save([module(batch) for batch in images], {str(path.with_name('outputs.pt'))!r})\n"
        "assert not {'dimaskdino', 'ms_deform_attn'} & set(sys.modules)\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
    return torch.load(path.with_name("outputs.pt"))


def onnx_nodes(path):
    import onnx

    return onnx.load(path).graph.node


def test_what_cannot_be_exported(shapes_data, tmp_path):
    model = dimaskdino.load(trained_file(tmp_path / "model.safetensors", shapes_data))
    with pytest.raises(UserError, match=r"the file must end in \.onnx, or in \.pt2"):
        export(model, tmp_path / "model.engine")
    with pytest.raises(UserError, match=r"no masks at the stage 'decoder\.9'; those with masks are .*decoder\.1"):
        export(model, tmp_path / "model.onnx", stage="decoder.9")
    assert [file.name for file in tmp_path.iterdir()] == ["model.safetensors"]
