"""The emulated CUDA kernels under sanitizers, for older GPUs, and with planted bugs that the tests must find."""

import os
import re
import subprocess
import sys
from pathlib import Path

import emulated
import pytest
from ms_deform_attn.build import SOURCES
from sanitizer import address_sanitizer

pytestmark = [pytest.mark.slow, pytest.mark.skipif(not emulated.possible(), reason="needs g++ on Linux")]

OPERATOR_TESTS = Path(__file__).with_name("test_ms_deform_attn.py")


def run_tests(
    check: str, folder: Path, source: str | None = None, which: str = "emulated", **variables: str
) -> subprocess.CompletedProcess:
    """The operator's tests of the emulated kernels, in a process of their own."""
    environment = os.environ | {"EMULATED_CHECK": check, "OMP_NUM_THREADS": "1"} | variables
    if source is not None:
        (folder / "cuda.cu").write_text(source)
        environment |= {"EMULATED_SOURCE": str(folder / "cuda.cu"), "MS_DEFORM_ATTN_CACHE": str(folder)}
    if check == "memory":
        environment |= address_sanitizer("g++")
    options = ["-q", "-s", "-x", "-p", "no:cacheprovider", "-k", which]
    command = [sys.executable, "-m", "pytest", *options, OPERATOR_TESTS]
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=False)


def test_gpus_before_hopper(tmp_path):
    """Four atomic additions of a float in place of one of four."""
    done = run_tests("", tmp_path, EMULATED_ARCHITECTURE="800")
    assert done.returncode == 0, done.stdout[-3000:]


@pytest.mark.parametrize("check", ["memory", "races"])
def test_under_a_sanitizer(check, tmp_path):
    done = run_tests(check, tmp_path)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert " passed" in done.stdout


# name, check that finds it, source, what is put in its place
BUGS = [
    (
        "a shuffle that idle groups skip",
        "",
        "const auto at = broadcast<GW>(own, i);\n        if (!at.inside || !mine) continue;",
        "if (!mine) continue;\n        const auto at = broadcast<GW>(own, i);\n        if (!at.inside) continue;",
    ),
    (
        "a sample right of its level is read",
        "",
        "&& x < s.width && y < s.height)) return s;",
        "&& x < s.width + 1 && y < s.height + 1)) return s;",
    ),
    ("forward: vectors from addresses that are not aligned", "memory", "if (!aligned || s.D", "if (s.D"),
    (
        "backward: vectors from addresses that are not aligned",
        "memory",
        "const bool aligned = aligned_to(cells, VEC * sizeof(scalar_t)) && aligned_to(from, VEC * sizeof(scalar_t));",
        "const bool aligned = true;",
    ),
    (
        "channels beyond the last",
        "memory",
        "const bool mine = work.active && d < s.D;\n    const scalar_t* channels = forgotten(cells",
        "const bool mine = work.active;\n    const scalar_t* channels = forgotten(cells",
    ),
    (
        "an addition that is not atomic",
        "races",
        "for (int i = 0; i < VEC; ++i) atomicAdd(to + i, from[i]);",
        "for (int i = 0; i < VEC; ++i) to[i] += from[i];",
    ),
    (
        "tiles that overlap",
        "races",
        "tile / walk.blocks_across[level] * Tile<GROUPS>::height +",
        "tile / walk.blocks_across[level] * (Tile<GROUPS>::height - 1) +",
    ),
    ("tiles of half the height", "", "height = GROUPS / width;", "height = (GROUPS / width + 1) / 2;"),
    ("a sum over half the lanes", "", "for (int step = GW / 2; step > 0;", "for (int step = GW / 4; step > 0;"),
    (
        "images counted in cells",
        "",
        "bqh = (b * s.Q + (active ? q : 0)) * s.heads + head;",
        "bqh = (b * s.N + (active ? q : 0)) * s.heads + head;",
    ),
    ("deterministic: the first corner left out", "", "i = begin[cell]; i <", "i = begin[cell] + 1; i <"),
    ("deterministic: the last corner left out", "", "= reads ? static_cast", "= reads && k < 3 ? static_cast"),
    (
        "wide heads: later channels overwrite the first",
        "",
        "grad_attention[to] = d0 ? grad_attention[to] + to_attention : to_attention;",
        "grad_attention[to] = to_attention;",
    ),
    (
        "groups without a query write",
        "",
        "if (!SAMPLES || !work.active || work.lane >= count) continue;",
        "if (!SAMPLES || work.lane >= count) continue;",
    ),
    ("output that is never written", "", "if (mine) store<VEC>(output", "if (mine && work.bqh) store<VEC>(output"),
]


@pytest.mark.parametrize(("check", "old", "new"), [x[1:] for x in BUGS], ids=[x[0].replace(" ", "-") for x in BUGS])
def test_a_planted_bug_is_found(check, old, new, tmp_path):
    source = SOURCES["cuda"].read_text()
    assert old in source
    # AddressSanitizer takes minutes for all tests
    which = "emulated and (aligned or odd_sizes)" if check == "memory" else "emulated"
    done = run_tests(check, tmp_path, source.replace(old, new, 1), which)
    assert done.returncode not in (0, 2), done.stdout[-3000:]  # 2: the tests themselves could not run
    signs = {
        "": r"CUDA emulation: |AssertionError",
        "memory": r"AddressSanitizer|runtime error",
        "races": "CUDA emulation: a race",
    }
    assert re.search(signs[check], done.stdout + done.stderr), done.stdout[-3000:] + done.stderr[-3000:]
