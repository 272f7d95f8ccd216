"""Progress in a pipe: lines of their own, as often as was asked for, and no carriage return."""

import io

from dimaskdino.utils import progress
from dimaskdino.utils.progress import progress_bar


def lines(text: str) -> list[str]:
    assert "\r" not in text
    assert "\n\n" not in text
    return text.splitlines()


def test_a_pipe_gets_a_line_per_record(capsys):
    bar = progress_bar(total=6, description="training", log_by_hand=True)
    for step in range(1, 7):
        bar.update()
        if step % 2 == 0:
            bar.set_postfix(loss=f"{step}.00")
        if step == 3:
            bar.write("step 3: validated")
    bar.close()
    out = capsys.readouterr()
    assert out.out == "step 3: validated\n"
    counts = [line.split(",")[0] for line in lines(out.err)]
    assert counts == ["training: 0 of 6", "training: 2 of 6", "training: 4 of 6", "training: 6 of 6"]
    assert "loss=4.00" in out.err
    assert out.err.endswith("left\n")


def test_a_pipe_gets_a_line_now_and_then(capsys, monkeypatch):
    monkeypatch.setattr(progress, "PIPE_SECONDS", 0.0)
    assert list(progress_bar([1, 2, 3], "reading")) == [1, 2, 3]
    assert [line.split(",")[0] for line in lines(capsys.readouterr().err)][-1] == "reading: 3 of 3"
    monkeypatch.setattr(progress, "PIPE_SECONDS", 30.0)
    assert list(progress_bar(iter([1, 2, 3]), "video", unit="frame")) == [1, 2, 3]
    first, last = lines(capsys.readouterr().err)
    assert (first.split(",")[0], last.split(",")[0]) == ("video: 0", "video: 3")
    assert "left" not in last  # the number of frames is not known


class OutStream(io.StringIO):
    """Standard error in a notebook."""

    __module__ = "ipykernel.iostream"


def test_a_notebook_gets_one_bar_that_is_updated(monkeypatch):
    monkeypatch.setattr(progress.sys, "stderr", OutStream())
    assert list(progress_bar([1, 2, 3], "reading", mininterval=0)) == [1, 2, 3]
    text = progress.sys.stderr.getvalue()
    assert text.count("\r") >= 3
    assert text.count("\n") == 1


def test_a_notebook_whose_errors_go_to_a_pipe_gets_lines(monkeypatch):
    monkeypatch.setattr(progress.sys, "stderr", OutStream())
    monkeypatch.setenv(progress.PIPED, "1")
    assert list(progress_bar([1, 2, 3], "reading")) == [1, 2, 3]
    assert [line.split(",")[0] for line in lines(progress.sys.stderr.getvalue())] == [
        "reading: 0 of 3",
        "reading: 3 of 3",
    ]
