"""The benchmark of two versions: the checkouts that it runs, and one small comparison."""

import subprocess
import sys

import pytest

from dimaskdino.benchmarks import versions
from dimaskdino.errors import UserError

SMALL = versions.Case("small", "configs/shapes/dimaskdino_r18.yaml", "inference", (64, 64), 1, 2, 2)


def test_a_measurement_imports_the_checkouts_own_packages(tmp_path):
    for package in ("dimaskdino", "ops/ms_deform_attn"):
        (tmp_path / package).mkdir(parents=True)
        (tmp_path / package / "__init__.py").touch()
    program = "import dimaskdino, ms_deform_attn, os; print(dimaskdino.__file__, ms_deform_attn.__file__)"
    found = subprocess.run(
        [sys.executable, "-c", program],
        cwd=tmp_path,
        env=versions.environment_of(tmp_path, 1),
        capture_output=True,
        text=True,
        check=True,
    )
    assert all(str(tmp_path) in file for file in found.stdout.split())


def test_a_commit_is_checked_out_and_removed_again():
    if not (versions.ROOT / ".git").exists():
        pytest.skip("not a git checkout")
    with versions.checked_out("HEAD") as tree:
        assert (tree / "dimaskdino" / "__init__.py").exists()
    assert not tree.exists()
    assert (
        str(tree)
        not in subprocess.run(
            ["git", "worktree", "list"], cwd=versions.ROOT, capture_output=True, text=True, check=True
        ).stdout
    )
    with pytest.raises(UserError, match="no commit 'nowhere' here"), versions.checked_out("nowhere"):
        pass


def test_versions_take_turns(monkeypatch):
    monkeypatch.setattr(versions, "PRECISIONS", ("fp32",))
    [row] = versions.compare(versions.ROOT, [SMALL], [1], 1)
    assert (row["case"], row["precision"], row["threads"]) == ("small", "fp32", 1)
    assert row["gflop"] > 0
    for version in ("before", "now"):
        assert 0 < row[version]["fastest"] <= row[version]["seconds"] <= row[version]["slowest"]
    # no program is faster than the processor
    assert row["gflop"] / row["now"]["fastest"] < 1.2 * row["peak_gflops"]
    assert row["gflop"] / row["product_seconds"] < 1.2 * row["peak_gflops"]
    assert row["product_seconds"] < row["now"]["slowest"]
