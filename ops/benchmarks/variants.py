"""Versions of the CUDA kernels that may be faster on some GPU: `python ops/benchmarks/variants.py FOLDER`.

Writes the source of each into a folder, for `python -m ms_deform_attn.benchmark --kernels NAME=FILE`, which times them
beside the operator's own in one run. A version is a few replacements in the operator's source. Tests run all of them on
the CPU and read their machine code; what a GPU finds faster becomes the operator's own, and the others go.
"""

import sys
from dataclasses import dataclass
from pathlib import Path

from ms_deform_attn.build import SOURCES


@dataclass(frozen=True)
class Variant:
    """A version of the kernels.

    Attributes:
        why: what may make it faster.
        changes: (old, new) pieces of the source; every old piece occurs, and all its occurrences change.
    """

    why: str
    changes: tuple[tuple[str, str], ...]

    def source(self) -> str:
        text = SOURCES["cuda"].read_text()
        for old, new in self.changes:
            assert old in text, old
            text = text.replace(old, new)
        return text


_HAND_OVER = """
// Samples handed round in shared memory: their weights and places, by group and lane. A place that is left free after
// every group keeps the groups of a warp in different banks.
template <typename acc_t>
struct alignas(16) Weights {
  acc_t left, right, top, bottom;  // top and bottom with the attention weight
};

template <int GW, typename acc_t>
__device__ __forceinline__ Corners<acc_t> received(const Weights<acc_t>* weights, const int2* places, int lane) {
  const int at = threadIdx.x / GW * (GW + 1) + lane;
  const auto w = weights[at];
  const auto place = places[at];
  const int token = place.x, beside = place.y & 1, below = place.y >> 1;
  return {{w.top * w.left, w.top * w.right, w.bottom * w.left, w.bottom * w.right},
          {token, token + beside, token + below, token + below + beside},
          place.y >= 0};
}

// What a group of lanes works on.
template <int GW>
struct Work {"""

_HANDED = """      __syncwarp();  // the samples before have been read
      weights[mine_at] = {own.left, own.right, own.top * own.attention, own.bottom * own.attention};
      places[mine_at] = make_int2(own.token, own.steps);
      __syncwarp();
      const int count = min(GW, s.samples - first);"""

_SHARED = """  const Work<GW> work(s, levels, walk);
  __shared__ Weights<acc_t> weights[THREADS + THREADS / GW];
  __shared__ int2 places[THREADS + THREADS / GW];
  const int mine_at = threadIdx.x / GW * (GW + 1) + work.lane;"""

_FORWARD = "__launch_bounds__(THREADS, {})\n    forward_kernel("

VARIANTS = {
    "shared_memory": Variant(
        "two loads from shared memory in place of six shuffles per sample, for a little less L1 cache",
        (
            ("\n// What a group of lanes works on.\ntemplate <int GW>\nstruct Work {", _HAND_OVER),
            ("  const Work<GW> work(s, levels, walk);", _SHARED),
            ("      const int count = min(GW, s.samples - first);", _HANDED),
            ("broadcast<GW>(own, i)", "received<GW>(weights, places, i)"),
        ),
    ),
    "ten_blocks": Variant(
        "forward: a quarter more warps hide more of the time that cells take to come, with 48 registers each",
        ((_FORWARD.format(8), _FORWARD.format(10)),),
    ),
}


def write(folder: Path) -> dict[str, Path]:
    """Write the source of every version. Returns the files by name."""
    folder.mkdir(parents=True, exist_ok=True)
    files = {name: folder / f"{name}.cu" for name in VARIANTS}
    for name, file in files.items():
        file.write_text(VARIANTS[name].source())
    return files


if __name__ == "__main__":
    print("\n".join(f"{name}={file}" for name, file in write(Path(sys.argv[1])).items()))
