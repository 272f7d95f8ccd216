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

_ADDED_AT_ONCE = """            if (VALUE && at.weight[k] != acc_t(0)) {
              acc_t part[VEC];
#pragma unroll
              for (int c = 0; c < VEC; ++c) part[c] = at.weight[k] * grad[c];
              atomic_add<VEC>(row_of(sums, at.token[k], row_bytes_of_sums), part);
            }
"""

_LISTS = """  const unsigned row_bytes_of_sums = static_cast<unsigned>(row) * sizeof(acc_t);
  // The corners of the samples in hand, sorted into buckets by their tokens' last bits, and the gradients of the block.
  constexpr int BUCKETS = 1024, GROUPS = THREADS / GW;
  __shared__ int counts[BUCKETS];
  __shared__ int corner_token[4 * THREADS];
  __shared__ short corner_group[4 * THREADS];
  __shared__ acc_t corner_weight[4 * THREADS];
  __shared__ acc_t grads[THREADS * VEC];
"""

_ADDED_BY_BUCKET = """      if (VALUE) {
        for (int i = threadIdx.x; i < BUCKETS; i += THREADS) counts[i] = 0;
#pragma unroll
        for (int c = 0; c < VEC; ++c) grads[threadIdx.x * VEC + c] = grad[c];
        __syncthreads();
        int token[4], rank[4];  // rank: in its bucket
        acc_t weight[4];
#pragma unroll
        for (int k = 0; k < 4; ++k) {
          const acc_t w = own.attention * (k >> 1 ? own.bottom : own.top) * (k & 1 ? own.right : own.left);
          weight[k] = own.steps >= 0 ? w : acc_t(0);
          token[k] = own.token + (k & 1 ? own.steps & 1 : 0) + (k >> 1 ? own.steps >> 1 : 0);
          if (weight[k] != acc_t(0)) rank[k] = atomicAdd(&counts[token[k] % BUCKETS], 1);
        }
        __syncthreads();
        for (int step = 1; step < BUCKETS; step *= 2) {  // counts become the ends of the buckets
          int before[BUCKETS / THREADS];
          for (int j = 0; j < BUCKETS / THREADS; ++j) {
            const int i = threadIdx.x + j * THREADS;
            before[j] = i >= step ? counts[i - step] : 0;
          }
          __syncthreads();
          for (int j = 0; j < BUCKETS / THREADS; ++j) counts[threadIdx.x + j * THREADS] += before[j];
          __syncthreads();
        }
#pragma unroll
        for (int k = 0; k < 4; ++k) {
          if (weight[k] == acc_t(0)) continue;
          const int bucket = token[k] % BUCKETS, to = (bucket ? counts[bucket - 1] : 0) + rank[k];
          corner_token[to] = token[k];
          corner_weight[to] = weight[k];
          corner_group[to] = static_cast<short>(threadIdx.x / GW);
        }
        __syncthreads();
        for (int bucket = threadIdx.x / GW; bucket < BUCKETS; bucket += GROUPS) {
          const int end = counts[bucket];
          acc_t part[VEC] = {};
          for (int i = bucket ? counts[bucket - 1] : 0; i < end; ++i) {
            const int from = (corner_group[i] * GW + work.lane) * VEC, to = corner_token[i];
#pragma unroll
            for (int c = 0; c < VEC; ++c) part[c] += corner_weight[i] * grads[from + c];
            if (i + 1 < end && corner_token[i + 1] == to) continue;
            if (d < s.D) atomic_add<VEC>(row_of(sums, to, row_bytes_of_sums), part);
#pragma unroll
            for (int c = 0; c < VEC; ++c) part[c] = 0;
          }
        }
        __syncthreads();
      }
      if (!SAMPLES || !work.active || work.lane >= count) continue;"""

VARIANTS = {
    "threads_256": Variant(
        "smaller blocks end more evenly, and leave registers to more of them",
        (
            ("constexpr int THREADS = 512;", "constexpr int THREADS = 256;"),
            ("__launch_bounds__(THREADS, 2)", "__launch_bounds__(THREADS, 4)"),
        ),
    ),
    "shared_memory": Variant(
        "two loads from shared memory in place of six shuffles per sample, for a little less L1 cache",
        (
            ("\n// What a group of lanes works on.\ntemplate <int GW>\nstruct Work {", _HAND_OVER),
            ("  const Work<GW> work(s, levels, walk);", _SHARED),
            ("      const int count = min(GW, s.samples - first);", _HANDED),
            ("broadcast<GW>(own, i)", "received<GW>(weights, places, i)"),
        ),
    ),
    "block_sums": Variant(
        "backward: what a block's queries add to the same cell is summed before it goes to global memory",
        (
            ("  const unsigned row_bytes_of_sums = static_cast<unsigned>(row) * sizeof(acc_t);\n", _LISTS),
            (_ADDED_AT_ONCE, ""),
            ("      if (!SAMPLES || !work.active || work.lane >= count) continue;", _ADDED_BY_BUCKET),
        ),
    ),
    "two_heads": Variant(
        "a block reads both heads of a cache line, which holds two of 32 channels in bf16",
        (
            ("constexpr int GROUPS = THREADS / GW;", "constexpr int GROUPS = THREADS / GW / 2;  // queries"),
            (
                "const int group = threadIdx.x / GW;",
                "const int group = threadIdx.x / GW % GROUPS, half = threadIdx.x / GW / GROUPS;\n"
                "    const int pairs = (s.heads + 1) / 2;",
            ),
            ("head = static_cast<int>(bh % s.heads);", "head = static_cast<int>(bh % pairs) * 2 + half;"),
            ("b = bh / s.heads;", "b = bh / pairs;"),
            ("active = q < s.Q;", "active = q < s.Q && head < s.heads;"),
            (
                "active = x < levels.width[level] && y < levels.height[level];",
                "active = x < levels.width[level] && y < levels.height[level] && head < s.heads;",
            ),
            ("walk_of<THREADS / gw()>", "walk_of<THREADS / gw() / 2>"),
            ("grid_of(walk.blocks * s.B * s.heads)", "grid_of(walk.blocks * s.B * ((s.heads + 1) / 2))"),
        ),
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
