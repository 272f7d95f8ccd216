// Multi-scale deformable attention on the CPU: forward and backward.
//
// A sample (query, head, level, point) reads the four cells around its location. Its addresses and weights depend on
// neither the channel nor the output: they are computed once, sixteen samples at a time, and the inner loops then run
// over the D contiguous channels of a head in vector registers.
#include <ATen/ATen.h>
#include <ATen/Dispatch.h>
#include <ATen/OpMathType.h>
#include <ATen/Parallel.h>
#include <torch/library.h>

#include <algorithm>
#include <array>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <numeric>
#include <type_traits>
#include <vector>

#ifdef __AVX512F__
#include <immintrin.h>
#endif
#ifdef __linux__
#include <sys/mman.h>
#endif

// parallel_for calls its function in one place for one thread and in another for several. Inlined into both it would be
// compiled twice, with sums and products fused differently, and the results would depend on the number of threads.
#ifdef __clang__
#define ONE_COPY __attribute__((noinline))
#else
#define ONE_COPY __attribute__((noinline, noclone))
#endif

namespace {

// ---------------------------------------------------------------------------------------------- vectors of 64 bytes

// GCC's and Clang's vector extension: one register with AVX-512, two with AVX2, four with NEON.
template <typename T>
struct Lanes;
template <>
struct Lanes<float> {
  using index_t = int32_t;
  typedef float type __attribute__((vector_size(64)));
  typedef int32_t index __attribute__((vector_size(64)));
};
template <>
struct Lanes<double> {
  using index_t = int64_t;
  typedef double type __attribute__((vector_size(64)));
  typedef int64_t index __attribute__((vector_size(64)));
};
template <typename T>
using Vec = typename Lanes<T>::type;
template <typename T>
using Index = typename Lanes<T>::index;
template <typename T>
constexpr int LANES = 64 / sizeof(T);

inline Vec<float> load(const float* p) {
  Vec<float> v;
  std::memcpy(&v, p, sizeof v);
  return v;
}

inline Vec<double> load(const double* p) {
  Vec<double> v;
  std::memcpy(&v, p, sizeof v);
  return v;
}

inline Vec<float> load(const at::BFloat16* p) {
#ifdef __AVX512F__  // in one instruction, where the compiler's own conversion takes four
  const __m256i narrow = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
  return Vec<float>(_mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(narrow), 16)));
#else
  typedef uint16_t Half __attribute__((vector_size(32)));
  typedef uint32_t Full __attribute__((vector_size(64)));
  Half bits;
  std::memcpy(&bits, p, sizeof bits);
  const Full wide = __builtin_convertvector(bits, Full) << 16;
  Vec<float> v;
  std::memcpy(&v, &wide, sizeof v);
  return v;
#endif
}

inline Vec<float> load(const at::Half* p) {
#ifdef __AVX512F__
  return Vec<float>(_mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p))));
#else
  Vec<float> v;
  for (int i = 0; i < 16; ++i) v[i] = static_cast<float>(p[i]);
  return v;
#endif
}

template <typename T>
inline void store(T* p, const Vec<T>& v) {
  std::memcpy(p, &v, sizeof v);
}

inline void store(at::BFloat16* p, const Vec<float>& v) {
  typedef uint16_t Half __attribute__((vector_size(32)));
  typedef uint32_t Full __attribute__((vector_size(64)));
  Full bits;
  std::memcpy(&bits, &v, sizeof bits);
  const Full rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;  // to nearest, ties to even
  const Half half = __builtin_convertvector(v == v ? rounded : Full{} + 0x7fc0, Half);
  std::memcpy(p, &half, sizeof half);
}

inline void store(at::Half* p, const Vec<float>& v) {
#ifdef __AVX512F__
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtps_ph(__m512(v), _MM_FROUND_TO_NEAREST_INT));
#else
  for (int i = 0; i < 16; ++i) p[i] = static_cast<at::Half>(v[i]);
#endif
}

// The sums of four vectors, folded together: about a third of the instructions of four sums on their own.
inline void sums(const Vec<float> (&v)[4], float (&to)[4]) {
  const auto halves = [](const Vec<float>& a, const Vec<float>& b) -> Vec<float> {
    return __builtin_shufflevector(a, b, 0, 1, 2, 3, 4, 5, 6, 7, 16, 17, 18, 19, 20, 21, 22, 23) +
           __builtin_shufflevector(a, b, 8, 9, 10, 11, 12, 13, 14, 15, 24, 25, 26, 27, 28, 29, 30, 31);
  };
  const Vec<float> p = halves(v[0], v[1]), q = halves(v[2], v[3]);  // eight parts of a sum each
  const Vec<float> fours = __builtin_shufflevector(p, q, 0, 1, 2, 3, 8, 9, 10, 11, 16, 17, 18, 19, 24, 25, 26, 27) +
                           __builtin_shufflevector(p, q, 4, 5, 6, 7, 12, 13, 14, 15, 20, 21, 22, 23, 28, 29, 30, 31);
  const Vec<float> twos = fours + __builtin_shufflevector(fours, fours, 2, 3, 0, 1, 6, 7, 4, 5, 10, 11, 8, 9, 14, 15,
                                                          12, 13);
  const Vec<float> ones = twos + __builtin_shufflevector(twos, twos, 1, 0, 3, 2, 5, 4, 7, 6, 9, 8, 11, 10, 13, 12, 15,
                                                         14);
  for (int k = 0; k < 4; ++k) to[k] = ones[4 * k];
}

inline void sums(const Vec<double> (&v)[4], double (&to)[4]) {
  for (int k = 0; k < 4; ++k)
    to[k] = ((v[k][0] + v[k][4]) + (v[k][1] + v[k][5])) + ((v[k][2] + v[k][6]) + (v[k][3] + v[k][7]));
}

// ---------------------------------------------------------------------------------------------- geometry

struct Level {
  int64_t height, width, start;  // start: first token of the level
};

struct Sizes {
  int64_t B, N, heads, D, Q, levels, points;
};

Sizes sizes_of(const at::Tensor& value, const at::Tensor& location) {
  // tokens and queries are numbered in 32 bits
  for (const int64_t n : {value.size(1), location.size(1)})
    TORCH_CHECK(n <= std::numeric_limits<int32_t>::max(), "ms_deform_attn: too large for the CPU kernels: ", n,
                " tokens or queries");
  return {value.size(0),    value.size(1),    value.size(2),   value.size(3),
          location.size(1), location.size(3), location.size(4)};
}

std::vector<Level> levels_of(at::IntArrayRef shapes) {
  std::vector<Level> levels;
  int64_t start = 0;
  for (size_t i = 0; i + 1 < shapes.size(); i += 2) {
    TORCH_CHECK(shapes[i] >= 1 && shapes[i + 1] >= 1,
                "ms_deform_attn: every level needs a height and a width of at least 1, got ", shapes[i], " x ",
                shapes[i + 1]);
    levels.push_back({shapes[i], shapes[i + 1], start});
    start += shapes[i] * shapes[i + 1];
  }
  return levels;
}

// The order in which queries are visited. Where they are the feature cells themselves, the queries of a tile sample
// nearly the same cells of a head, and find them in the cache.
std::vector<int32_t> visiting_order(const Sizes& s, const std::vector<Level>& levels) {
  constexpr int64_t tile = 16;
  std::vector<int32_t> order(s.Q);
  if (s.Q != s.N) {
    std::iota(order.begin(), order.end(), 0);
    return order;
  }
  auto next = order.begin();
  for (const auto& level : levels)
    for (int64_t ty = 0; ty < level.height; ty += tile)
      for (int64_t tx = 0; tx < level.width; tx += tile)
        for (int64_t y = ty; y < std::min(ty + tile, level.height); ++y)
          for (int64_t x = tx; x < std::min(tx + tile, level.width); ++x)
            *next++ = static_cast<int32_t>(level.start + y * level.width + x);
  return order;
}

// (x0, y0, x1, y1, …) in two vectors -> the x of all, the y of all
inline void separate(const Vec<float>& a, const Vec<float>& b, Vec<float>& x, Vec<float>& y) {
  x = __builtin_shufflevector(a, b, 0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30);
  y = __builtin_shufflevector(a, b, 1, 3, 5, 7, 9, 11, 13, 15, 17, 19, 21, 23, 25, 27, 29, 31);
}

inline void separate(const Vec<double>& a, const Vec<double>& b, Vec<double>& x, Vec<double>& y) {
  x = __builtin_shufflevector(a, b, 0, 2, 4, 6, 8, 10, 12, 14);
  y = __builtin_shufflevector(a, b, 1, 3, 5, 7, 9, 11, 13, 15);
}

// LANES samples: where they lie and what they read, computed together.
template <typename T>
struct Samples {
  using index_t = typename Lanes<T>::index_t;

  Vec<T> height, width;              // of each sample's level
  Index<T> start;                    // first token of each sample's level
  Vec<T> left, right, top, bottom;   // linear weights along each axis, 0 outside the level
  Index<T> has_left, has_right, has_top, has_bottom;
  Vec<T> weight[4];  // of the corners in reading order: their products, and the attention weight
  Index<T> token[4];
  Index<T> inside;  // 0: nothing to read, being too far out or not a number

  void set_level(int i, const Level& level) {
    height[i] = static_cast<T>(level.height);
    width[i] = static_cast<T>(level.width);
    start[i] = static_cast<index_t>(level.start);
  }

  // A corner outside its level gets weight 0 and the address of the sample's corner inside it, which is read
  // anyway: no branch, and no value that the sample does not touch can leak in as 0 * NaN.
  void locate(Vec<T> x, Vec<T> y, Vec<T> attention) {
    const Vec<T> zero = {}, one = zero + T(1);
    x = x * width - T(0.5);
    y = y * height - T(0.5);
    // written so that NaN fails; what fails is replaced, which keeps the conversion to integers defined
    inside = (x > -one) & (y > -one) & (x < width) & (y < height);
    x = inside ? x : zero;
    y = inside ? y : zero;
    Vec<T> fx = __builtin_convertvector(__builtin_convertvector(x, Index<T>), Vec<T>);
    Vec<T> fy = __builtin_convertvector(__builtin_convertvector(y, Index<T>), Vec<T>);
    fx = x < fx ? fx - one : fx;  // the conversion rounds towards zero; this makes it the floor
    fy = y < fy ? fy - one : fy;
    has_left = fx >= zero;
    has_right = fx + one < width;
    has_top = fy >= zero;
    has_bottom = fy + one < height;
    left = has_left ? fx + one - x : zero;
    right = has_right ? x - fx : zero;
    top = has_top ? fy + one - y : zero;
    bottom = has_bottom ? y - fy : zero;
    weight[0] = top * left * attention;
    weight[1] = top * right * attention;
    weight[2] = bottom * left * attention;
    weight[3] = bottom * right * attention;
    const Index<T> x0 = __builtin_convertvector(has_left ? fx : zero, Index<T>);
    const Index<T> x1 = __builtin_convertvector(has_right ? fx + one : fx, Index<T>);
    const Index<T> y0 = __builtin_convertvector(has_top ? fy : zero, Index<T>);
    const Index<T> y1 = __builtin_convertvector(has_bottom ? fy + one : fy, Index<T>);
    const Index<T> columns = __builtin_convertvector(width, Index<T>);
    token[0] = start + y0 * columns + x0;
    token[1] = start + y0 * columns + x1;
    token[2] = start + y1 * columns + x0;
    token[3] = start + y1 * columns + x1;
  }

  // From <gradient of the output, cell> of the four corners: gradients of the attention weight and of the location.
  void differentiate(const Vec<T> (&dot)[4], Vec<T> attention, Vec<T>& to_attention, Vec<T>& to_x, Vec<T>& to_y) const {
    const Vec<T> zero = {};
    const Vec<T> upper_step = (has_right ? dot[1] : zero) - (has_left ? dot[0] : zero);
    const Vec<T> lower_step = (has_right ? dot[3] : zero) - (has_left ? dot[2] : zero);
    const Vec<T> upper = left * dot[0] + right * dot[1], lower = left * dot[2] + right * dot[3];
    to_attention = inside ? top * upper + bottom * lower : zero;
    to_x = inside ? attention * width * (top * upper_step + bottom * lower_step) : zero;
    to_y = inside ? attention * height * ((has_bottom ? lower : zero) - (has_top ? upper : zero)) : zero;
  }
};

// Computes n samples from their locations and attention weights into n / LANES (rounded up) of `at`.
template <typename T>
inline void locate(const T* location, const T* attention, int64_t n, Samples<T>* at) {
  constexpr int64_t L = LANES<T>;
  for (int64_t i = 0; i < n; i += L, ++at) {
    T padded[3 * L];
    const T *from = location + 2 * i, *weights = attention + i;
    if (i + L > n) {
      std::fill(padded, padded + 3 * L, T(-2));
      std::copy(from, location + 2 * n, padded);
      std::copy(weights, attention + n, padded + 2 * L);
      from = padded;
      weights = padded + 2 * L;
    }
    Vec<T> x, y;
    separate(load(from), load(from + L), x, y);
    at->locate(x, y, load(weights));
  }
}

// Memory for results, in huge pages where the system grants them on request: results of tens of megabytes come fresh
// from the system at every call, and its 4 KiB pages, faulted in one by one, would cost as much as the computation.
at::Tensor empty_huge(at::IntArrayRef sizes, const at::TensorOptions& options) {
  auto tensor = at::empty(sizes, options);
#ifdef __linux__
  constexpr uintptr_t huge = 2 << 20;
  const auto begin = (reinterpret_cast<uintptr_t>(tensor.data_ptr()) + huge - 1) / huge * huge;
  const auto end = (reinterpret_cast<uintptr_t>(tensor.data_ptr()) + tensor.nbytes()) / huge * huge;
  if (begin < end) madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);  // only advice: may fail
#endif
  return tensor;
}

// What the next query of the same head reads and writes lies a row of all heads further on, which is too far for the
// processor to expect it.
template <int WRITE, typename T>
inline void prefetch(const T* p, int64_t n) {
  for (int64_t i = 0; i < n; i += 64 / static_cast<int64_t>(sizeof(T))) __builtin_prefetch(p + i, WRITE);
}

// Memory that a thread uses for one task after the other.
template <typename T>
struct Scratch {
  at::Tensor memory;

  T* first(int64_t n) {
    if (!memory.defined() || memory.numel() < n)
      memory = empty_huge({n}, at::TensorOptions().dtype(c10::CppTypeToScalarType<T>::value));
    return memory.template mutable_data_ptr<T>();
  }
};

// ---------------------------------------------------------------------------------------------- packing

// The cells of one head lie a row of all heads apart: in caches, such cells compete for a few sets, and their pages for
// the few places of the TLB. Where most cells are read several times, each task copies those of its head into memory of
// its own first, next to each other, in the type in which sums are computed.
bool worth_packing(const Sizes& s) { return s.Q * s.points >= s.N; }

// n cells of D channels, which lie `stride` apart.
template <typename acc_t, typename from_t, typename to_t>
void copy_cells(const from_t* from, int64_t from_stride, to_t* to, int64_t to_stride, int64_t n, int64_t D) {
  constexpr int64_t L = LANES<acc_t>;
  for (int64_t i = 0; i < n; ++i, from += from_stride, to += to_stride) {
    int64_t d = 0;
    for (; d + L <= D; d += L) store(to + d, load(from + d));
    for (; d < D; ++d) to[d] = static_cast<to_t>(from[d]);
  }
}

// ---------------------------------------------------------------------------------------------- forward

// NV vectors of channels of one (query, head). One accumulator a corner: a single one would wait for itself.
template <int NV, typename cell_t, typename scalar_t, typename acc_t>
inline void gather(const Samples<acc_t>* samples, int64_t n, const cell_t* value, int64_t stride,
                   scalar_t* output) {
  Vec<acc_t> acc[4][NV] = {};
  for (int64_t i = 0; i < n; ++i) {
    const auto& at = samples[i / LANES<acc_t>];
    const int lane = i % LANES<acc_t>;
    if (!at.inside[lane]) continue;
    for (int k = 0; k < 4; ++k) {
      const acc_t w = at.weight[k][lane];
      const cell_t* cell = value + at.token[k][lane] * stride;
      for (int v = 0; v < NV; ++v) acc[k][v] += w * load(cell + v * LANES<acc_t>);
    }
  }
  for (int v = 0; v < NV; ++v) store(output + v * LANES<acc_t>, (acc[0][v] + acc[1][v]) + (acc[2][v] + acc[3][v]));
}

// The channels that do not fill a vector.
template <typename cell_t, typename scalar_t, typename acc_t>
inline void gather_rest(const Samples<acc_t>* samples, int64_t n, const cell_t* value,
                        int64_t stride, scalar_t* output, int64_t channels) {
  acc_t acc[LANES<acc_t>] = {};
  for (int64_t i = 0; i < n; ++i) {
    const auto& at = samples[i / LANES<acc_t>];
    const int lane = i % LANES<acc_t>;
    if (!at.inside[lane]) continue;
    for (int k = 0; k < 4; ++k) {
      const acc_t w = at.weight[k][lane];
      const cell_t* cell = value + at.token[k][lane] * stride;
      for (int64_t d = 0; d < channels; ++d) acc[d] += w * static_cast<acc_t>(cell[d]);
    }
  }
  for (int64_t d = 0; d < channels; ++d) output[d] = static_cast<scalar_t>(acc[d]);
}

// The queries [begin, end) of one (image, head). cells: of this head, `stride` apart.
template <typename cell_t, typename scalar_t, typename acc_t>
inline void forward_head(const Sizes& s, const cell_t* cells, int64_t stride, const int32_t* order, int64_t begin,
                         int64_t end, int64_t head, const acc_t* location, const acc_t* attention, scalar_t* output,
                         std::vector<Samples<acc_t>>& at) {
  constexpr int64_t L = LANES<acc_t>;
  constexpr int64_t ahead = 6;
  const int64_t samples = s.levels * s.points;
  for (int64_t i = begin; i < end; ++i) {
    const int64_t qh = order[i] * s.heads + head;
    if (i + ahead < end) {
      const int64_t soon = order[i + ahead] * s.heads + head;
      prefetch<0>(location + soon * samples * 2, samples * 2);
      prefetch<0>(attention + soon * samples, samples);
      prefetch<1>(output + soon * s.D, s.D);
    }
    scalar_t* out = output + qh * s.D;
    locate(location + qh * samples * 2, attention + qh * samples, samples, at.data());
    int64_t d = 0;
    for (; d + 2 * L <= s.D; d += 2 * L) gather<2>(at.data(), samples, cells + d, stride, out + d);
    for (; d + L <= s.D; d += L) gather<1>(at.data(), samples, cells + d, stride, out + d);
    if (d < s.D) gather_rest(at.data(), samples, cells + d, stride, out + d, s.D - d);
  }
}

template <typename scalar_t, typename acc_t>
void forward_kernel(const Sizes& s, const std::vector<Level>& levels, const scalar_t* value, const acc_t* location,
                    const acc_t* attention, scalar_t* output) {
  constexpr int64_t L = LANES<acc_t>;
  const int64_t row = s.heads * s.D, samples = s.levels * s.points;
  const auto order = visiting_order(s, levels);
  const bool packed = worth_packing(s);
  at::parallel_for(0, s.B * s.heads * s.Q, 64, [&](int64_t begin, int64_t end) ONE_COPY {
    std::vector<Samples<acc_t>> at((samples + L - 1) / L);
    for (int64_t i = 0; i < samples; ++i) at[i / L].set_level(i % L, levels[i / s.points]);
    Scratch<acc_t> memory;
    for (int64_t next; begin < end; begin = next) {
      const int64_t bh = begin / s.Q, b = bh / s.heads, head = bh % s.heads;
      next = std::min(end, (bh + 1) * s.Q);
      const scalar_t* of_head = value + b * s.N * row + head * s.D;
      const auto run = [&](const auto* cells, int64_t stride) {
        forward_head(s, cells, stride, order.data(), begin - bh * s.Q, next - bh * s.Q, head,
                     location + b * s.Q * s.heads * samples * 2, attention + b * s.Q * s.heads * samples,
                     output + b * s.Q * row, at);
      };
      if (packed) {
        acc_t* cells = memory.first(s.N * s.D);
        copy_cells<acc_t>(of_head, row, cells, s.D, s.N, s.D);
        run(cells, s.D);
      } else {
        run(of_head, row);
      }
    }
  });
}

at::Tensor forward(const at::Tensor& value, at::IntArrayRef shapes, const at::Tensor& location,
                   const at::Tensor& attention) {
  const auto s = sizes_of(value, location);
  const auto levels = levels_of(shapes);
  auto output = empty_huge({s.B, s.Q, s.heads * s.D}, value.options());
  AT_DISPATCH_FLOATING_TYPES_AND2(at::kHalf, at::kBFloat16, value.scalar_type(), "ms_deform_attn_forward", [&] {
    using acc_t = at::opmath_type<scalar_t>;
    constexpr auto acc_type = c10::CppTypeToScalarType<acc_t>::value;
    const auto v = value.contiguous(), loc = location.to(acc_type).contiguous(),
               att = attention.to(acc_type).contiguous();
    forward_kernel<scalar_t, acc_t>(s, levels, v.const_data_ptr<scalar_t>(), loc.const_data_ptr<acc_t>(),
                                    att.const_data_ptr<acc_t>(), output.mutable_data_ptr<scalar_t>());
  });
  return output;
}

// ---------------------------------------------------------------------------------------------- backward

// The samples of one query in one level: their value gradients are added to the cells, and the products of the cells
// with the gradient of the output are kept for the gradients of locations and weights.
template <int NV, bool VALUE, bool DOTS, typename cell_t, typename scalar_t, typename acc_t>
inline void scatter(const Samples<acc_t>* samples, Vec<acc_t> (*dots)[4], int64_t begin, int64_t end,
                    const scalar_t* grad_output, const cell_t* value, acc_t* grad_value, int64_t stride,
                    int64_t grad_stride) {
  constexpr int L = LANES<acc_t>;
  Vec<acc_t> grad[NV];
  for (int v = 0; v < NV; ++v) grad[v] = load(grad_output + v * L);
  for (int64_t i = begin; i < end; ++i) {
    const auto& at = samples[i / L];
    const int lane = i % L;
    if (!at.inside[lane]) continue;
    int64_t cell[4], grad_cell[4];
    acc_t w[4];
    for (int k = 0; k < 4; ++k) {
      cell[k] = at.token[k][lane] * stride;
      grad_cell[k] = at.token[k][lane] * grad_stride;
      w[k] = at.weight[k][lane];
    }
    // all that is read first, then all that is written: the compiler cannot know that they do not overlap
    if (DOTS) {
      Vec<acc_t> products[4];
      for (int k = 0; k < 4; ++k) {
        products[k] = grad[0] * load(value + cell[k]);
        for (int v = 1; v < NV; ++v) products[k] += grad[v] * load(value + cell[k] + v * L);
      }
      acc_t dot[4];
      sums(products, dot);
      for (int k = 0; k < 4; ++k) dots[i / L][k][lane] += dot[k];
    }
    if (VALUE)
      for (int k = 0; k < 4; ++k)
        for (int v = 0; v < NV; ++v) {
          acc_t* to = grad_value + grad_cell[k] + v * L;
          store(to, load(to) + w[k] * grad[v]);
        }
  }
}

// The channels that do not fill a vector.
template <bool VALUE, bool DOTS, typename cell_t, typename scalar_t, typename acc_t>
inline void scatter_rest(const Samples<acc_t>* samples, Vec<acc_t> (*dots)[4], int64_t begin, int64_t end,
                         const scalar_t* grad_output, const cell_t* value, acc_t* grad_value, int64_t stride,
                         int64_t grad_stride, int64_t channels) {
  constexpr int L = LANES<acc_t>;
  for (int64_t i = begin; i < end; ++i) {
    const auto& at = samples[i / L];
    const int lane = i % L;
    if (!at.inside[lane]) continue;
    for (int k = 0; k < 4; ++k) {
      const acc_t w = at.weight[k][lane];
      const int64_t cell = at.token[k][lane] * stride, grad_cell = at.token[k][lane] * grad_stride;
      acc_t dot = 0;
      for (int64_t d = 0; d < channels; ++d) {
        const acc_t grad = static_cast<acc_t>(grad_output[d]);
        if (DOTS) dot += grad * static_cast<acc_t>(value[cell + d]);
        if (VALUE) grad_value[grad_cell + d] += w * grad;
      }
      if (DOTS) dots[i / L][k][lane] += dot;
    }
  }
}

// The backward pass of one (image, head) and the samples of some levels. cells, grad_cells: from the first of these
// levels on, `stride` and `grad_stride` apart.
template <bool VALUE, bool DOTS, typename cell_t, typename scalar_t, typename acc_t>
struct Backward {
  static constexpr int64_t L = LANES<acc_t>;
  const Sizes& s;
  const std::vector<int32_t>& order;
  const int64_t first_level, n;  // n: samples of a query
  const int64_t block;           // queries whose samples are computed together, so that they fill the lanes
  const int64_t vectors;
  std::vector<Samples<acc_t>> at;
  std::vector<std::array<Vec<acc_t>, 4>> dot_storage;
  std::vector<acc_t> locations, weights;

  Backward(const Sizes& s, const std::vector<Level>& levels, const std::vector<int32_t>& order, int64_t first_level,
           int64_t last_level)
      : s(s), order(order), first_level(first_level), n((last_level - first_level) * s.points),
        block(std::max<int64_t>(1, 64 / std::max<int64_t>(1, n))), vectors((block * n + L - 1) / L), at(vectors),
        dot_storage(vectors), locations(2 * vectors * L), weights(vectors * L) {
    for (int64_t i = 0; i < block * n; ++i) {
      auto level = levels[first_level + i % n / s.points];
      level.start -= levels[first_level].start;
      at[i / L].set_level(i % L, level);
    }
    for (int64_t i = block * n; i < vectors * L; ++i) at[i / L].set_level(i % L, levels[first_level]);
  }

  void run(int64_t b, int64_t head, const cell_t* cells, int64_t stride, acc_t* grad_cells, int64_t grad_stride,
           const scalar_t* grad_output, const acc_t* location, const acc_t* attention, acc_t* grad_location,
           acc_t* grad_attention) {
    const auto dots = reinterpret_cast<Vec<acc_t>(*)[4]>(dot_storage.data());
    const auto qh = [&](int64_t i) { return (b * s.Q + order[i]) * s.heads + head; };
    const auto first_sample = [&](int64_t i) { return qh(i) * s.levels * s.points + first_level * s.points; };
    for (int64_t q0 = 0; q0 < s.Q; q0 += block) {
      const int64_t queries = std::min(block, s.Q - q0);
      for (int64_t j = q0 + block; j < std::min(q0 + 2 * block, s.Q); ++j) {
        const int64_t sample = first_sample(j);
        prefetch<0>(location + 2 * sample, 2 * n);
        prefetch<0>(attention + sample, n);
        prefetch<0>(grad_output + qh(j) * s.D, s.D);
        if (DOTS) {
          prefetch<1>(grad_location + 2 * sample, 2 * n);
          prefetch<1>(grad_attention + sample, n);
        }
      }
      for (int64_t j = 0; j < queries; ++j) {
        std::copy_n(location + 2 * first_sample(q0 + j), 2 * n, locations.data() + 2 * j * n);
        std::copy_n(attention + first_sample(q0 + j), n, weights.data() + j * n);
      }
      locate(locations.data(), weights.data(), queries * n, at.data());
      std::fill(dot_storage.begin(), dot_storage.end(), std::array<Vec<acc_t>, 4>{});
      for (int64_t j = 0; j < queries; ++j) {
        const scalar_t* grad = grad_output + qh(q0 + j) * s.D;
        const auto some = [&](auto scatter, int64_t d) {
          scatter(at.data(), dots, j * n, (j + 1) * n, grad + d, cells + d, grad_cells + d, stride, grad_stride);
        };
        int64_t d = 0;
        for (; d + 2 * L <= s.D; d += 2 * L) some(scatter<2, VALUE, DOTS, cell_t, scalar_t, acc_t>, d);
        for (; d + L <= s.D; d += L) some(scatter<1, VALUE, DOTS, cell_t, scalar_t, acc_t>, d);
        if (d < s.D) some([&](auto... arguments) { scatter_rest<VALUE, DOTS>(arguments..., s.D - d); }, d);
      }
      if (!DOTS) continue;
      for (int64_t i = 0; i < queries * n; i += L) {
        Vec<acc_t> x, y, a;
        at[i / L].differentiate(dots[i / L], load(weights.data() + i), a, x, y);
        store(weights.data() + i, a);
        for (int lane = 0; lane < L; ++lane) {
          locations[2 * (i + lane)] = x[lane];
          locations[2 * (i + lane) + 1] = y[lane];
        }
      }
      for (int64_t j = 0; j < queries; ++j) {
        std::copy_n(locations.data() + 2 * j * n, 2 * n, grad_location + 2 * first_sample(q0 + j));
        std::copy_n(weights.data() + j * n, n, grad_attention + first_sample(q0 + j));
      }
    }
  }
};

// Whether value gradients are added up where they are wanted: where few cells get any, and sums have their type.
template <typename scalar_t, typename acc_t>
bool adds_in_place(const Sizes& s) {
  return std::is_same_v<scalar_t, acc_t> && !worth_packing(s);
}

// A task owns one (image, head), or one level of it where threads would be left without work: the value gradients of
// its cells and the gradients of the locations and weights that sample them belong to no other task, so no atomics are
// needed and the sums run in the same order whatever the number of threads.
template <bool VALUE, bool DOTS, typename scalar_t, typename acc_t>
void backward_kernel(const Sizes& s, const std::vector<Level>& levels, const scalar_t* grad_output,
                     const scalar_t* value, const acc_t* location, const acc_t* attention, scalar_t* grad_value,
                     acc_t* grad_location, acc_t* grad_attention) {
  const int64_t row = s.heads * s.D, heads = s.B * s.heads, threads = at::get_num_threads();
  const int64_t groups = heads % threads == 0 || heads >= 4 * threads ? 1 : s.levels;
  const auto order = visiting_order(s, levels);
  const bool packed = worth_packing(s), direct = adds_in_place<scalar_t, acc_t>(s);
  at::parallel_for(0, heads * groups, 1, [&](int64_t begin, int64_t end) ONE_COPY {
    Scratch<acc_t> cell_memory, grad_memory;
    for (int64_t task = begin; task < end; ++task) {
      const int64_t group = task % groups, head = task / groups % s.heads, b = task / (groups * s.heads);
      const int64_t level = group * s.levels / groups, next_level = (group + 1) * s.levels / groups;
      const int64_t start = levels[level].start, end_token = next_level < s.levels ? levels[next_level].start : s.N;
      const int64_t tokens = end_token - start;
      const int64_t offset = (b * s.N + start) * row + head * s.D;
      acc_t* gradients = nullptr;
      if constexpr (VALUE && std::is_same_v<scalar_t, acc_t>) gradients = grad_value + offset;
      if (VALUE && !direct) {
        gradients = grad_memory.first(tokens * s.D);
        std::fill_n(gradients, tokens * s.D, acc_t(0));
      }
      const auto run = [&](const auto* of_head, int64_t stride) {
        Backward<VALUE, DOTS, std::decay_t<decltype(*of_head)>, scalar_t, acc_t>(s, levels, order, level, next_level)
            .run(b, head, of_head, stride, gradients, direct ? row : s.D, grad_output, location, attention,
                 grad_location, grad_attention);
      };
      if (DOTS && packed) {
        acc_t* cells = cell_memory.first(tokens * s.D);
        copy_cells<acc_t>(value + offset, row, cells, s.D, tokens, s.D);
        run(cells, s.D);
      } else {
        run(value + offset, row);
      }
      if (VALUE && !direct) copy_cells<acc_t>(gradients, s.D, grad_value + offset, row, tokens, s.D);
    }
  });
}

std::tuple<at::Tensor, at::Tensor, at::Tensor> backward(const at::Tensor& grad_output, const at::Tensor& value,
                                                        at::IntArrayRef shapes, const at::Tensor& location,
                                                        const at::Tensor& attention, bool need_value,
                                                        bool need_samples) {
  const auto s = sizes_of(value, location);
  const auto levels = levels_of(shapes);
  at::Tensor grad_value, grad_location, grad_attention;
  AT_DISPATCH_FLOATING_TYPES_AND2(at::kHalf, at::kBFloat16, value.scalar_type(), "ms_deform_attn_backward", [&] {
    using acc_t = at::opmath_type<scalar_t>;
    constexpr auto acc_type = c10::CppTypeToScalarType<acc_t>::value;
    const auto g = grad_output.to(value.scalar_type()).contiguous(), v = value.contiguous(),
               loc = location.to(acc_type).contiguous(), att = attention.to(acc_type).contiguous();
    grad_value = empty_huge(need_value ? v.sizes() : at::IntArrayRef{0}, v.options());
    if (need_value && adds_in_place<scalar_t, acc_t>(s)) grad_value.zero_();
    grad_location = empty_huge(need_samples ? loc.sizes() : at::IntArrayRef{0}, loc.options());
    grad_attention = empty_huge(need_samples ? att.sizes() : at::IntArrayRef{0}, att.options());
    const auto run = [&](auto kernel) {
      kernel(s, levels, g.const_data_ptr<scalar_t>(), v.const_data_ptr<scalar_t>(), loc.const_data_ptr<acc_t>(),
             att.const_data_ptr<acc_t>(), grad_value.mutable_data_ptr<scalar_t>(),
             grad_location.mutable_data_ptr<acc_t>(), grad_attention.mutable_data_ptr<acc_t>());
    };
    if (need_value && need_samples) {
      run(backward_kernel<true, true, scalar_t, acc_t>);
    } else if (need_value) {
      run(backward_kernel<true, false, scalar_t, acc_t>);
    } else if (need_samples) {
      run(backward_kernel<false, true, scalar_t, acc_t>);
    }
  });
  return {grad_value, grad_location.to(location.scalar_type()),
          grad_attention.to(attention.scalar_type())};
}

}  // namespace

TORCH_LIBRARY_IMPL(ms_deform_attn, CPU, m) {
  m.impl("forward", &forward);
  m.impl("backward", &backward);
}
