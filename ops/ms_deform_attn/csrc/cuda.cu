// Multi-scale deformable attention on NVIDIA GPUs: forward, backward, and a deterministic backward.
//
// A group of GW lanes of a warp computes one (query, head); each lane holds VEC neighbouring channels, so that the
// group reads a cell in accesses of 16 bytes a lane. The addresses and weights of GW samples are computed at a time, one
// by each lane, and handed round by shuffles: they stay in registers, and the whole L1 cache is left to the cells.
// Where the queries are the feature cells themselves, a block takes a tile of them for one head: neighbours sample
// nearly the same cells, and the L1 cache serves them about four times as fast as the L2 cache would.
#include <ATen/ATen.h>
#include <ATen/Dispatch.h>
#include <ATen/OpMathType.h>
#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>
#include <torch/library.h>

#include <algorithm>
#include <cstdint>
#include <limits>
#include <type_traits>

namespace {

constexpr int THREADS = 128;
constexpr int MAX_LEVELS = 64;
constexpr unsigned WHOLE_WARP = 0xffffffff;

struct Levels {
  int count;
  int height[MAX_LEVELS], width[MAX_LEVELS], start[MAX_LEVELS];  // start: first token of the level
};

struct Sizes {
  int64_t B, N, Q;
  int heads, D, points, samples;
};

// How a block's number becomes queries: tiles of the levels, or runs of queries.
struct Walk {
  bool tiled;
  int64_t blocks;  // of one (image, head)
  int64_t first_block[MAX_LEVELS];
  int blocks_across[MAX_LEVELS];
};

template <int GROUPS>
struct Tile {
  static constexpr int width = GROUPS >= 128 ? 16 : GROUPS >= 32 ? 8 : 4;
  static constexpr int height = GROUPS / width;
};

// ---------------------------------------------------------------------------------------------- memory

template <typename scalar_t, int VEC>
struct alignas(sizeof(scalar_t) * VEC) Pack {
  scalar_t channel[VEC];
};

// A pointer of which the compiler knows no origin. It would otherwise compute every address from the first pointer on,
// in 64 bits; so it adds one product of 32-bit numbers to this one.
template <typename T>
__device__ __forceinline__ T* forgotten(T* pointer) {
#ifdef __CUDACC__
  asm("" : "+l"(pointer));
  __builtin_assume(__isGlobal(pointer));
#endif
  return pointer;
}

// The row of a token, `row_bytes` long. sizes_of() makes sure that 32 bits hold both factors.
template <typename T>
__device__ __forceinline__ T* row_of(T* base, int token, unsigned row_bytes) {
  using Byte = std::conditional_t<std::is_const_v<T>, const char, char>;
  const uint64_t offset = static_cast<uint64_t>(static_cast<unsigned>(token)) * row_bytes;
  return reinterpret_cast<T*>(reinterpret_cast<Byte*>(base) + offset);
}

// A bfloat16 is the upper half of a float: two of them become floats by a shift and a mask.
template <int VEC>
__device__ __forceinline__ void load(const c10::BFloat16* from, float (&to)[VEC]) {
  if constexpr (VEC % 2 == 0) {
    const auto pairs = *reinterpret_cast<const Pack<unsigned, VEC / 2>*>(from);
#pragma unroll
    for (int i = 0; i < VEC / 2; ++i) {
      to[2 * i] = __uint_as_float(pairs.channel[i] << 16);
      to[2 * i + 1] = __uint_as_float(pairs.channel[i] & 0xffff0000u);
    }
  } else {
#pragma unroll
    for (int i = 0; i < VEC; ++i) to[i] = static_cast<float>(from[i]);
  }
}

template <int VEC, typename scalar_t, typename acc_t>
__device__ __forceinline__ void load(const scalar_t* from, acc_t (&to)[VEC]) {
  const auto pack = *reinterpret_cast<const Pack<scalar_t, VEC>*>(from);
#pragma unroll
  for (int i = 0; i < VEC; ++i) to[i] = static_cast<acc_t>(pack.channel[i]);
}

template <int VEC, typename scalar_t, typename acc_t>
__device__ __forceinline__ void store(scalar_t* to, const acc_t (&from)[VEC]) {
  Pack<scalar_t, VEC> pack;
#pragma unroll
  for (int i = 0; i < VEC; ++i) pack.channel[i] = static_cast<scalar_t>(from[i]);
  *reinterpret_cast<Pack<scalar_t, VEC>*>(to) = pack;
}

template <int VEC, typename acc_t>
__device__ __forceinline__ void atomic_add(acc_t* to, const acc_t (&from)[VEC]) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  if constexpr (std::is_same_v<acc_t, float> && VEC == 4) {  // one request of 16 bytes instead of four
    atomicAdd(reinterpret_cast<float4*>(to), make_float4(from[0], from[1], from[2], from[3]));
    return;
  }
#endif
#pragma unroll
  for (int i = 0; i < VEC; ++i) atomicAdd(to + i, from[i]);
}

// ---------------------------------------------------------------------------------------------- samples

// Where one sample lies and what it reads.
template <typename acc_t>
struct Sample {
  acc_t left, right, top, bottom;  // linear weights along each axis, 0 outside the level
  acc_t width, height, attention;
  int token;     // the corner left above, or the nearest one inside the level
  int steps;     // to the corners beside and below: step_x | step_y << 1; negative: nothing to read
  bool has_left, has_right, has_top, has_bottom;
};

// A corner outside its level gets weight 0 and the address of a corner inside it, which is read anyway: no branch, and
// no value that the sample does not touch can leak in as 0 * NaN.
template <typename acc_t>
__device__ __forceinline__ Sample<acc_t> locate(acc_t x, acc_t y, acc_t attention, const Levels& levels, int level) {
  Sample<acc_t> s{};
  const int h = levels.height[level], w = levels.width[level];
  s.width = static_cast<acc_t>(w);
  s.height = static_cast<acc_t>(h);
  x = x * s.width - acc_t(0.5);
  y = y * s.height - acc_t(0.5);
  s.steps = -1;
  if (!(x > acc_t(-1) && y > acc_t(-1) && x < s.width && y < s.height)) return s;  // written so that NaN fails
  const acc_t fx = floor(x), fy = floor(y);
  const int x0 = static_cast<int>(fx), y0 = static_cast<int>(fy);
  s.has_left = x0 >= 0;
  s.has_right = x0 + 1 < w;
  s.has_top = y0 >= 0;
  s.has_bottom = y0 + 1 < h;
  s.left = s.has_left ? fx + acc_t(1) - x : acc_t(0);
  s.right = s.has_right ? x - fx : acc_t(0);
  s.top = s.has_top ? fy + acc_t(1) - y : acc_t(0);
  s.bottom = s.has_bottom ? y - fy : acc_t(0);
  s.attention = attention;
  s.token = levels.start[level] + max(y0, 0) * w + max(x0, 0);
  s.steps = (s.has_left && s.has_right ? 1 : 0) | (s.has_top && s.has_bottom ? w << 1 : 0);
  return s;
}

// The part of a sample that every lane of its group needs, taken from the lane that computed it.
template <typename acc_t>
struct Corners {
  acc_t weight[4];  // with the attention weight
  int token[4];
  bool inside;
};

template <int GW, typename acc_t>
__device__ __forceinline__ Corners<acc_t> broadcast(const Sample<acc_t>& s, int lane) {
  const acc_t left = __shfl_sync(WHOLE_WARP, s.left, lane, GW), right = __shfl_sync(WHOLE_WARP, s.right, lane, GW);
  const acc_t top = __shfl_sync(WHOLE_WARP, s.top * s.attention, lane, GW);
  const acc_t bottom = __shfl_sync(WHOLE_WARP, s.bottom * s.attention, lane, GW);
  const int token = __shfl_sync(WHOLE_WARP, s.token, lane, GW), steps = __shfl_sync(WHOLE_WARP, s.steps, lane, GW);
  const int beside = steps & 1, below = steps >> 1;
  return {{top * left, top * right, bottom * left, bottom * right},
          {token, token + beside, token + below, token + below + beside},
          steps >= 0};
}

// What a group of lanes works on.
template <int GW>
struct Work {
  static constexpr int GROUPS = THREADS / GW;
  int lane;           // in its group
  int head;
  int64_t b, bqh;     // bqh: (image, query, head), counted through
  bool active;        // groups without a query go along, for the shuffles of their warp

  __device__ Work(const Sizes& s, const Levels& levels, const Walk& walk) {
    lane = threadIdx.x % GW;
    const int group = threadIdx.x / GW;
    const int64_t block = blockIdx.x % walk.blocks, bh = blockIdx.x / walk.blocks;
    head = static_cast<int>(bh % s.heads);
    b = bh / s.heads;
    int64_t q = block * GROUPS + group;
    active = q < s.Q;
    if (walk.tiled) {
      int level = levels.count - 1;
      while (block < walk.first_block[level]) --level;
      const int tile = static_cast<int>(block - walk.first_block[level]);
      const int x = tile % walk.blocks_across[level] * Tile<GROUPS>::width + group % Tile<GROUPS>::width;
      const int y = tile / walk.blocks_across[level] * Tile<GROUPS>::height + group / Tile<GROUPS>::width;
      active = x < levels.width[level] && y < levels.height[level];
      q = levels.start[level] + static_cast<int64_t>(y) * levels.width[level] + x;
    }
    bqh = (b * s.Q + (active ? q : 0)) * s.heads + head;
  }

  template <typename acc_t>
  __device__ __forceinline__ Sample<acc_t> sample(const Sizes& s, const Levels& levels, const acc_t* location,
                                                  const acc_t* attention, int i) const {
    if (!active || i >= s.samples) {
      Sample<acc_t> nothing{};
      nothing.steps = -1;
      return nothing;
    }
    const int64_t at = bqh * s.samples + i;
    return locate(location[2 * at], location[2 * at + 1], attention[at], levels, i / s.points);
  }
};

// ---------------------------------------------------------------------------------------------- forward

template <typename scalar_t, typename acc_t, int VEC, int GW>
__global__ void __launch_bounds__(THREADS, 8)
    forward_kernel(const Sizes s, const __grid_constant__ Levels levels, const __grid_constant__ Walk walk,
                   const scalar_t* __restrict__ value, const acc_t* __restrict__ location,
                   const acc_t* __restrict__ attention, scalar_t* __restrict__ output) {
  const Work<GW> work(s, levels, walk);
  const int row = s.heads * s.D;
  const unsigned row_bytes = static_cast<unsigned>(row) * sizeof(scalar_t);
  const scalar_t* cells = value + work.b * s.N * row + work.head * s.D;
  for (int d0 = 0; d0 < s.D; d0 += GW * VEC) {  // once, unless the head is very wide
    const int d = d0 + work.lane * VEC;
    const bool mine = work.active && d < s.D;
    const scalar_t* channels = forgotten(cells + d);
    acc_t acc[VEC] = {};
    for (int first = 0; first < s.samples; first += GW) {
      const auto own = work.sample(s, levels, location, attention, first + work.lane);
      const int count = min(GW, s.samples - first);
#pragma unroll 4
      for (int i = 0; i < count; ++i) {
        const auto at = broadcast<GW>(own, i);
        if (!at.inside || !mine) continue;
        acc_t cell[4][VEC];
#pragma unroll
        for (int k = 0; k < 4; ++k) load<VEC>(row_of(channels, at.token[k], row_bytes), cell[k]);
#pragma unroll
        for (int k = 0; k < 4; ++k)
#pragma unroll
          for (int c = 0; c < VEC; ++c) acc[c] += at.weight[k] * cell[k][c];
      }
    }
    if (mine) store<VEC>(output + work.bqh * s.D + d, acc);
  }
}

// ---------------------------------------------------------------------------------------------- backward

template <typename scalar_t, typename acc_t, int VEC, int GW, bool VALUE, bool SAMPLES>
__global__ void __launch_bounds__(THREADS, 8)
    backward_kernel(const Sizes s, const __grid_constant__ Levels levels, const __grid_constant__ Walk walk,
                    const scalar_t* __restrict__ grad_output, const scalar_t* __restrict__ value,
                    const acc_t* __restrict__ location, const acc_t* __restrict__ attention,
                    acc_t* __restrict__ grad_value, acc_t* __restrict__ grad_location,
                    acc_t* __restrict__ grad_attention) {
  const Work<GW> work(s, levels, walk);
  const int row = s.heads * s.D;
  const unsigned row_bytes = static_cast<unsigned>(row) * sizeof(scalar_t);
  const unsigned row_bytes_of_sums = static_cast<unsigned>(row) * sizeof(acc_t);
  const int64_t image = work.b * s.N * row + work.head * s.D;
  for (int d0 = 0; d0 < s.D; d0 += GW * VEC) {
    const int d = d0 + work.lane * VEC;
    const bool mine = work.active && d < s.D;
    const scalar_t* channels = forgotten(value + image + d);
    acc_t* sums = forgotten(grad_value + image + d);
    acc_t grad[VEC] = {};
    if (mine) load<VEC>(grad_output + work.bqh * s.D + d, grad);
    for (int first = 0; first < s.samples; first += GW) {
      const auto own = work.sample(s, levels, location, attention, first + work.lane);
      acc_t dots[4] = {};  // <grad, cell> at the corners of this lane's own sample
      const int count = min(GW, s.samples - first);
#pragma unroll 2
      for (int i = 0; i < count; ++i) {
        const auto at = broadcast<GW>(own, i);
        acc_t dot[4] = {};
        if (at.inside && mine) {
#pragma unroll
          for (int k = 0; k < 4; ++k) {
            if (SAMPLES) {
              acc_t cell[VEC];
              load<VEC>(row_of(channels, at.token[k], row_bytes), cell);
#pragma unroll
              for (int c = 0; c < VEC; ++c) dot[k] += grad[c] * cell[c];
            }
            if (VALUE && at.weight[k] != acc_t(0)) {
              acc_t part[VEC];
#pragma unroll
              for (int c = 0; c < VEC; ++c) part[c] = at.weight[k] * grad[c];
              atomic_add<VEC>(row_of(sums, at.token[k], row_bytes_of_sums), part);
            }
          }
        }
        if (SAMPLES) {
#pragma unroll
          for (int k = 0; k < 4; ++k) {
#pragma unroll
            for (int step = GW / 2; step > 0; step /= 2) dot[k] += __shfl_xor_sync(WHOLE_WARP, dot[k], step, GW);
            if (i == work.lane) dots[k] = dot[k];
          }
        }
      }
      if (!SAMPLES || !work.active || work.lane >= count) continue;
      const acc_t zero = 0;
      const acc_t upper = own.left * dots[0] + own.right * dots[1], lower = own.left * dots[2] + own.right * dots[3];
      const acc_t upper_step = (own.has_right ? dots[1] : zero) - (own.has_left ? dots[0] : zero);
      const acc_t lower_step = (own.has_right ? dots[3] : zero) - (own.has_left ? dots[2] : zero);
      const acc_t to_attention = own.top * upper + own.bottom * lower;
      const acc_t to_x = own.attention * own.width * (own.top * upper_step + own.bottom * lower_step);
      const acc_t to_y = own.attention * own.height * ((own.has_bottom ? lower : zero) - (own.has_top ? upper : zero));
      const int64_t to = work.bqh * s.samples + first + work.lane;
      // the same thread comes back to the same place for the next channels
      grad_attention[to] = d0 ? grad_attention[to] + to_attention : to_attention;
      grad_location[2 * to] = d0 ? grad_location[2 * to] + to_x : to_x;
      grad_location[2 * to + 1] = d0 ? grad_location[2 * to + 1] + to_y : to_y;
    }
  }
}

// The deterministic gradient of the values lists, for one image, which cell each corner of each sample reads and with
// what weight. Sorted by cell, with a stable sort, the list gives every cell its sum in a fixed order.
template <typename acc_t>
__global__ void list_corners(const Sizes s, const __grid_constant__ Levels levels, const acc_t* location,
                             const acc_t* attention, int64_t b, int* key, acc_t* weight) {
  const int64_t i = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;  // (query, head, sample)
  if (i >= s.Q * s.heads * s.samples) return;
  const int64_t at = b * s.Q * s.heads * s.samples + i;
  const int head = static_cast<int>(i / s.samples % s.heads);
  const auto own = locate(location[2 * at], location[2 * at + 1], attention[at], levels,
                          static_cast<int>(i % s.samples) / s.points);
  const int beside = own.steps & 1, below = own.steps >> 1;
  for (int k = 0; k < 4; ++k) {
    const acc_t w = own.attention * (k >> 1 ? own.bottom : own.top) * (k & 1 ? own.right : own.left);
    const bool reads = own.steps >= 0 && w != acc_t(0);
    const int token = own.token + (k & 1 ? beside : 0) + (k >> 1 ? below : 0);
    key[4 * i + k] = reads ? static_cast<int>(head * s.N) + token : static_cast<int>(s.heads * s.N);
    weight[4 * i + k] = w;
  }
}

// One warp sums what one (head, cell) receives; `begin` says where its corners lie in the sorted list.
template <typename scalar_t, typename acc_t>
__global__ void sum_corners(const Sizes s, const scalar_t* grad_output, int64_t b, const int64_t* order,
                            const int64_t* begin, const acc_t* weight, acc_t* grad_value) {
  const int64_t cell = (static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x) / 32;
  if (cell >= s.heads * s.N) return;
  const int64_t head = cell / s.N, token = cell % s.N;
  for (int d = threadIdx.x % 32; d < s.D; d += 32) {
    acc_t sum = 0;
    for (int64_t i = begin[cell]; i < begin[cell + 1]; ++i) {
      const int64_t corner = order[i], qh = corner / (4 * s.samples);
      sum += weight[corner] * static_cast<acc_t>(grad_output[(b * s.Q * s.heads + qh) * s.D + d]);
    }
    grad_value[((b * s.N + token) * s.heads + head) * s.D + d] = sum;
  }
}

// ---------------------------------------------------------------------------------------------- host

Sizes sizes_of(const at::Tensor& value, const at::Tensor& location) {
  const auto small = [](int64_t n, const char* name) {
    TORCH_CHECK(n <= std::numeric_limits<int>::max(), "ms_deform_attn: too large for the CUDA kernels: ", name, " = ", n);
    return static_cast<int>(n);
  };
  small(value.size(1), "N");
  small(value.size(2) * value.size(3) * static_cast<int64_t>(sizeof(double)) / 2, "heads * D * 4");  // row_of()
  return {value.size(0), value.size(1), location.size(1), small(value.size(2), "heads"), small(value.size(3), "D"),
          small(location.size(4), "points"), small(location.size(3) * location.size(4), "levels * points")};
}

Levels levels_of(at::IntArrayRef shapes) {
  TORCH_CHECK(shapes.size() / 2 <= MAX_LEVELS, "ms_deform_attn: the CUDA kernels take at most ", MAX_LEVELS,
              " levels, got ", shapes.size() / 2);
  Levels levels{};
  levels.count = static_cast<int>(shapes.size() / 2);
  int64_t start = 0;
  for (int i = 0; i < levels.count; ++i) {
    TORCH_CHECK(shapes[2 * i] >= 1 && shapes[2 * i + 1] >= 1,
                "ms_deform_attn: every level needs a height and a width of at least 1, got ", shapes[2 * i], " x ",
                shapes[2 * i + 1]);
    levels.height[i] = static_cast<int>(shapes[2 * i]);
    levels.width[i] = static_cast<int>(shapes[2 * i + 1]);
    levels.start[i] = static_cast<int>(start);
    start += shapes[2 * i] * shapes[2 * i + 1];
  }
  return levels;
}

template <int GROUPS>
Walk walk_of(const Sizes& s, const Levels& levels) {
  Walk walk{};
  walk.tiled = s.Q == s.N;
  walk.blocks = (s.Q + GROUPS - 1) / GROUPS;
  if (walk.tiled) {
    walk.blocks = 0;
    for (int i = 0; i < levels.count; ++i) {
      const int across = (levels.width[i] + Tile<GROUPS>::width - 1) / Tile<GROUPS>::width;
      const int down = (levels.height[i] + Tile<GROUPS>::height - 1) / Tile<GROUPS>::height;
      walk.first_block[i] = walk.blocks;
      walk.blocks_across[i] = across;
      walk.blocks += static_cast<int64_t>(across) * down;
    }
  }
  return walk;
}

unsigned grid_of(int64_t blocks) {
  TORCH_CHECK(blocks <= std::numeric_limits<int>::max(), "ms_deform_attn: too many queries for one launch: ", blocks,
              " blocks");
  return static_cast<unsigned>(blocks);
}

// Calls `run` with the channels a lane holds and the lanes of a group. A head that does not divide into vectors, or
// memory that is not aligned to them, goes channel by channel.
template <int VEC, typename Run>
void with_layout(const Sizes& s, bool aligned, Run run) {
  using std::integral_constant;
  if (!aligned || s.D % VEC != 0) {
    run(integral_constant<int, 1>{}, integral_constant<int, 32>{});
  } else if (s.D <= 4 * VEC) {
    run(integral_constant<int, VEC>{}, integral_constant<int, 4>{});
  } else if (s.D <= 8 * VEC) {
    run(integral_constant<int, VEC>{}, integral_constant<int, 8>{});
  } else {
    run(integral_constant<int, VEC>{}, integral_constant<int, 16>{});
  }
}

bool aligned_to(const void* pointer, size_t bytes) { return reinterpret_cast<uintptr_t>(pointer) % bytes == 0; }

at::Tensor forward(const at::Tensor& value, at::IntArrayRef shapes, const at::Tensor& location,
                   const at::Tensor& attention) {
  const c10::cuda::CUDAGuard guard(value.device());
  const auto s = sizes_of(value, location);
  const auto levels = levels_of(shapes);
  auto output = at::empty({s.B, s.Q, static_cast<int64_t>(s.heads) * s.D}, value.options());
  if (output.numel() == 0) return output;
  const auto stream = c10::cuda::getCurrentCUDAStream();
  AT_DISPATCH_FLOATING_TYPES_AND2(at::kHalf, at::kBFloat16, value.scalar_type(), "ms_deform_attn_forward", [&] {
    using acc_t = at::opmath_type<scalar_t>;
    constexpr auto acc_type = c10::CppTypeToScalarType<acc_t>::value;
    constexpr int VEC = 16 / sizeof(scalar_t);
    const auto v = value.contiguous(), loc = location.to(acc_type).contiguous(),
               att = attention.to(acc_type).contiguous();
    const auto* cells = v.const_data_ptr<scalar_t>();
    with_layout<VEC>(s, aligned_to(cells, 16), [&](auto vec, auto gw) {
      const auto walk = walk_of<THREADS / gw()>(s, levels);
      forward_kernel<scalar_t, acc_t, vec(), gw()><<<grid_of(walk.blocks * s.B * s.heads), THREADS, 0, stream>>>(
          s, levels, walk, cells, loc.const_data_ptr<acc_t>(), att.const_data_ptr<acc_t>(),
          output.mutable_data_ptr<scalar_t>());
      C10_CUDA_KERNEL_LAUNCH_CHECK();
    });
  });
  return output;
}

template <typename scalar_t, typename acc_t>
void deterministic_grad_value(const Sizes& s, const Levels& levels, const at::Tensor& grad_output,
                              const at::Tensor& location, const at::Tensor& attention, at::Tensor& grad_value) {
  const int64_t cells = s.heads * s.N, samples = s.Q * s.heads * s.samples;
  TORCH_CHECK(cells < std::numeric_limits<int>::max(), "ms_deform_attn: too many cells for the deterministic backward: ",
              cells);
  const auto stream = c10::cuda::getCurrentCUDAStream();
  const auto key = at::empty({4 * samples}, location.options().dtype(at::kInt));
  const auto weight = at::empty({4 * samples}, location.options());
  const auto bounds = at::arange(cells + 1, key.options());
  for (int64_t b = 0; b < s.B; ++b) {
    list_corners<acc_t><<<grid_of((samples + 255) / 256), 256, 0, stream>>>(
        s, levels, location.const_data_ptr<acc_t>(), attention.const_data_ptr<acc_t>(), b,
        key.mutable_data_ptr<int>(), weight.mutable_data_ptr<acc_t>());
    C10_CUDA_KERNEL_LAUNCH_CHECK();
    const auto [sorted, order] = at::sort(key, /*stable=*/true, /*dim=*/0, /*descending=*/false);
    const auto begin = at::searchsorted(sorted, bounds);
    sum_corners<scalar_t, acc_t><<<grid_of((cells * 32 + 255) / 256), 256, 0, stream>>>(
        s, grad_output.const_data_ptr<scalar_t>(), b, order.template const_data_ptr<int64_t>(),
        begin.template const_data_ptr<int64_t>(), weight.const_data_ptr<acc_t>(), grad_value.mutable_data_ptr<acc_t>());
    C10_CUDA_KERNEL_LAUNCH_CHECK();
  }
}

std::tuple<at::Tensor, at::Tensor, at::Tensor> backward(const at::Tensor& grad_output, const at::Tensor& value,
                                                        at::IntArrayRef shapes, const at::Tensor& location,
                                                        const at::Tensor& attention, bool need_value,
                                                        bool need_samples) {
  const c10::cuda::CUDAGuard guard(value.device());
  const auto s = sizes_of(value, location);
  const auto levels = levels_of(shapes);
  const auto stream = c10::cuda::getCurrentCUDAStream();
  at::Tensor grad_value, grad_location, grad_attention;
  AT_DISPATCH_FLOATING_TYPES_AND2(at::kHalf, at::kBFloat16, value.scalar_type(), "ms_deform_attn_backward", [&] {
    using acc_t = at::opmath_type<scalar_t>;
    constexpr auto acc_type = c10::CppTypeToScalarType<acc_t>::value;
    // Of the gradients, not of the values: what is added to memory is acc_t, and 16 bytes of it make one request.
    constexpr int VEC = 16 / sizeof(acc_t);
    const auto g = grad_output.to(value.scalar_type()).contiguous(), v = value.contiguous(),
               loc = location.to(acc_type).contiguous(), att = attention.to(acc_type).contiguous();
    grad_value = at::zeros(need_value ? v.sizes() : at::IntArrayRef{0}, v.options().dtype(acc_type));
    // every sample is written, if there is anything to sum over
    const bool anything = g.numel() > 0 && s.samples > 0;
    const auto made = [&](const at::Tensor& like) {
      if (!need_samples) return at::zeros({0}, like.options());
      return anything ? at::empty(like.sizes(), like.options()) : at::zeros(like.sizes(), like.options());
    };
    grad_location = made(loc);
    grad_attention = made(att);
    if (!anything) return;
    const auto* from = g.const_data_ptr<scalar_t>();
    const auto* cells = v.const_data_ptr<scalar_t>();
    const auto launch = [&](auto with_value, auto with_samples) {
      const bool aligned = aligned_to(cells, VEC * sizeof(scalar_t)) && aligned_to(from, VEC * sizeof(scalar_t));
      with_layout<VEC>(s, aligned, [&](auto vec, auto gw) {
        const auto walk = walk_of<THREADS / gw()>(s, levels);
        backward_kernel<scalar_t, acc_t, vec(), gw(), with_value(), with_samples()>
            <<<grid_of(walk.blocks * s.B * s.heads), THREADS, 0, stream>>>(
                s, levels, walk, from, cells, loc.const_data_ptr<acc_t>(), att.const_data_ptr<acc_t>(),
                grad_value.mutable_data_ptr<acc_t>(), grad_location.mutable_data_ptr<acc_t>(),
                grad_attention.mutable_data_ptr<acc_t>());
        C10_CUDA_KERNEL_LAUNCH_CHECK();
      });
    };
    const bool deterministic = need_value && at::globalContext().deterministicAlgorithms();
    if (deterministic) deterministic_grad_value<scalar_t, acc_t>(s, levels, g, loc, att, grad_value);
    if (need_value && !deterministic && need_samples) {
      launch(std::true_type{}, std::true_type{});
    } else if (need_value && !deterministic) {
      launch(std::true_type{}, std::false_type{});
    } else if (need_samples) {
      launch(std::false_type{}, std::true_type{});
    }
  });
  return {grad_value.to(value.scalar_type()), grad_location.to(location.scalar_type()),
          grad_attention.to(attention.scalar_type())};
}

}  // namespace

TORCH_LIBRARY_IMPL(ms_deform_attn, CUDA, m) {
  m.impl("forward", &forward);
  m.impl("backward", &backward);
}
