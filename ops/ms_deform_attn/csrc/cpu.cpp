// Multi-scale deformable attention on the CPU: forward and backward.
//
// A sample (query, head, level, point) reads the four cells around its location. Its cell offsets and weights
// depend on neither the channel nor the output, so they are computed once and the inner loops run over the D
// contiguous channels of a head, which the compiler turns into SIMD code.
#include <ATen/ATen.h>
#include <ATen/Dispatch.h>
#include <ATen/OpMathType.h>
#include <ATen/Parallel.h>
#include <torch/library.h>

#include <cmath>
#include <cstdint>
#include <vector>

namespace {

struct Level {
  int64_t height, width, start;  // start: first token of the level
};

// The four cells around a location. A cell outside the level has weight 0 and offset -1.
template <typename T>
struct Corners {
  int64_t token[4];
  T weight[4];
  T dx, dy;      // fractional position between the cells
  bool outside;  // nothing to read: too far out, or not a number
};

template <typename T>
inline Corners<T> corners_of(T x, T y, const Level& level) {
  Corners<T> c;
  const T px = x * static_cast<T>(level.width) - T(0.5);
  const T py = y * static_cast<T>(level.height) - T(0.5);
  // Written so that NaN fails the test; it also keeps the conversion to an integer defined.
  c.outside = !(px > T(-1) && py > T(-1) && px < static_cast<T>(level.width) && py < static_cast<T>(level.height));
  if (c.outside) return c;
  const T fx = std::floor(px), fy = std::floor(py);
  const int64_t x0 = static_cast<int64_t>(fx), y0 = static_cast<int64_t>(fy);
  c.dx = px - fx;
  c.dy = py - fy;
  const T wx[2] = {T(1) - c.dx, c.dx}, wy[2] = {T(1) - c.dy, c.dy};
  for (int i = 0; i < 4; ++i) {
    const int64_t cx = x0 + (i & 1), cy = y0 + (i >> 1);
    const bool inside = cx >= 0 && cy >= 0 && cx < level.width && cy < level.height;
    c.token[i] = inside ? level.start + cy * level.width + cx : -1;
    c.weight[i] = inside ? wx[i & 1] * wy[i >> 1] : T(0);
  }
  return c;
}

struct Sizes {
  int64_t B, N, heads, D, Q, levels, points;
};

std::vector<Level> levels_of(at::IntArrayRef shapes) {
  std::vector<Level> levels;
  int64_t start = 0;
  for (size_t i = 0; i + 1 < shapes.size(); i += 2) {
    levels.push_back({shapes[i], shapes[i + 1], start});
    start += shapes[i] * shapes[i + 1];
  }
  return levels;
}

// D_FIXED > 0 lets the compiler keep the accumulator in registers and unroll; 0 is the general case.
template <typename scalar_t, typename acc_t, int D_FIXED>
void forward_kernel(const Sizes& s, const std::vector<Level>& levels, const scalar_t* value, const acc_t* location,
                    const acc_t* attention, scalar_t* output) {
  const int64_t D = D_FIXED ? D_FIXED : s.D;
  const int64_t row = s.heads * D, samples = s.levels * s.points;
  // Tasks are (image, query) pairs, heads inside: neighbouring queries read neighbouring cells, which stay in cache.
  at::parallel_for(0, s.B * s.Q, 32, [&](int64_t begin, int64_t end) {
    std::vector<acc_t> scratch(D_FIXED ? 0 : D);
    for (int64_t bq = begin; bq < end; ++bq) {
      const scalar_t* image = value + (bq / s.Q) * s.N * row;
      for (int64_t head = 0; head < s.heads; ++head) {
        acc_t fixed[D_FIXED ? D_FIXED : 1];
        acc_t* acc = D_FIXED ? fixed : scratch.data();
        for (int64_t d = 0; d < D; ++d) acc[d] = acc_t(0);
        const acc_t* loc = location + (bq * s.heads + head) * samples * 2;
        const acc_t* att = attention + (bq * s.heads + head) * samples;
        for (int64_t i = 0; i < samples; ++i) {
          const auto c = corners_of<acc_t>(loc[2 * i], loc[2 * i + 1], levels[i / s.points]);
          if (c.outside) continue;
          for (int k = 0; k < 4; ++k) {
            if (c.token[k] < 0) continue;
            const acc_t w = c.weight[k] * att[i];
            const scalar_t* cell = image + c.token[k] * row + head * D;
            for (int64_t d = 0; d < D; ++d) acc[d] += w * static_cast<acc_t>(cell[d]);
          }
        }
        scalar_t* out = output + bq * row + head * D;
        for (int64_t d = 0; d < D; ++d) out[d] = static_cast<scalar_t>(acc[d]);
      }
    }
  });
}

// A task owns one (image, head, level): the value gradients of that level's cells and the gradients of the
// locations and weights that sample it belong to no other task, so no atomics are needed and the sums run in
// the same order whatever the number of threads.
template <typename scalar_t, typename acc_t, int D_FIXED>
void backward_kernel(const Sizes& s, const std::vector<Level>& levels, const scalar_t* grad_output,
                     const scalar_t* value, const acc_t* location, const acc_t* attention, acc_t* grad_value,
                     acc_t* grad_location, acc_t* grad_attention) {
  const int64_t D = D_FIXED ? D_FIXED : s.D;
  const int64_t row = s.heads * D, samples = s.levels * s.points;
  at::parallel_for(0, s.B * s.heads * s.levels, 1, [&](int64_t begin, int64_t end) {
    std::vector<acc_t> scratch(D_FIXED ? 0 : D);
    acc_t fixed[D_FIXED ? D_FIXED : 1];
    acc_t* grad = D_FIXED ? fixed : scratch.data();
    for (int64_t task = begin; task < end; ++task) {
      const int64_t l = task % s.levels, head = (task / s.levels) % s.heads, b = task / (s.levels * s.heads);
      const Level& level = levels[l];
      const int64_t image = b * s.N * row + head * D;
      for (int64_t q = 0; q < s.Q; ++q) {
        const int64_t bqh = (b * s.Q + q) * s.heads + head;
        for (int64_t d = 0; d < D; ++d) grad[d] = static_cast<acc_t>(grad_output[bqh * D + d]);
        for (int64_t p = 0; p < s.points; ++p) {
          const int64_t i = bqh * samples + l * s.points + p;
          const auto c = corners_of<acc_t>(location[2 * i], location[2 * i + 1], level);
          if (c.outside) continue;
          acc_t dot[4] = {0, 0, 0, 0};  // <grad, value> at the four cells
          for (int k = 0; k < 4; ++k) {
            if (c.token[k] < 0) continue;
            const acc_t w = c.weight[k] * attention[i];
            const scalar_t* cell = value + image + c.token[k] * row;
            acc_t* grad_cell = grad_value + image + c.token[k] * row;
            acc_t sum = 0;
            for (int64_t d = 0; d < D; ++d) {
              sum += grad[d] * static_cast<acc_t>(cell[d]);
              grad_cell[d] += w * grad[d];
            }
            dot[k] = sum;
          }
          const acc_t top = (acc_t(1) - c.dx) * dot[0] + c.dx * dot[1];
          const acc_t bottom = (acc_t(1) - c.dx) * dot[2] + c.dx * dot[3];
          grad_attention[i] = (acc_t(1) - c.dy) * top + c.dy * bottom;
          const acc_t across = (acc_t(1) - c.dy) * (dot[1] - dot[0]) + c.dy * (dot[3] - dot[2]);
          grad_location[2 * i] = attention[i] * across * static_cast<acc_t>(level.width);
          grad_location[2 * i + 1] = attention[i] * (bottom - top) * static_cast<acc_t>(level.height);
        }
      }
    }
  });
}

Sizes sizes_of(const at::Tensor& value, const at::Tensor& location) {
  return {value.size(0),    value.size(1),    value.size(2),   value.size(3),
          location.size(1), location.size(3), location.size(4)};
}

#define DISPATCH_HEAD_DIM(D, ...)                                          \
  switch (D) {                                                             \
    case 8: { constexpr int D_FIXED = 8; __VA_ARGS__; break; }             \
    case 16: { constexpr int D_FIXED = 16; __VA_ARGS__; break; }           \
    case 32: { constexpr int D_FIXED = 32; __VA_ARGS__; break; }           \
    case 64: { constexpr int D_FIXED = 64; __VA_ARGS__; break; }           \
    default: { constexpr int D_FIXED = 0; __VA_ARGS__; break; }            \
  }

at::Tensor forward(const at::Tensor& value, at::IntArrayRef shapes, const at::Tensor& location,
                   const at::Tensor& attention) {
  const auto s = sizes_of(value, location);
  const auto levels = levels_of(shapes);
  auto output = at::empty({s.B, s.Q, s.heads * s.D}, value.options());
  AT_DISPATCH_FLOATING_TYPES_AND2(at::kHalf, at::kBFloat16, value.scalar_type(), "ms_deform_attn_forward", [&] {
    using acc_t = at::opmath_type<scalar_t>;
    constexpr auto acc_type = c10::CppTypeToScalarType<acc_t>::value;
    const auto v = value.contiguous(), loc = location.to(acc_type).contiguous(),
               att = attention.to(acc_type).contiguous();
    DISPATCH_HEAD_DIM(s.D, forward_kernel<scalar_t, acc_t, D_FIXED>(
        s, levels, v.const_data_ptr<scalar_t>(), loc.const_data_ptr<acc_t>(), att.const_data_ptr<acc_t>(),
        output.mutable_data_ptr<scalar_t>()));
  });
  return output;
}

std::tuple<at::Tensor, at::Tensor, at::Tensor> backward(const at::Tensor& grad_output, const at::Tensor& value,
                                                        at::IntArrayRef shapes, const at::Tensor& location,
                                                        const at::Tensor& attention) {
  const auto s = sizes_of(value, location);
  const auto levels = levels_of(shapes);
  at::Tensor grad_value, grad_location, grad_attention;
  AT_DISPATCH_FLOATING_TYPES_AND2(at::kHalf, at::kBFloat16, value.scalar_type(), "ms_deform_attn_backward", [&] {
    using acc_t = at::opmath_type<scalar_t>;
    constexpr auto acc_type = c10::CppTypeToScalarType<acc_t>::value;
    const auto g = grad_output.to(value.scalar_type()).contiguous(), v = value.contiguous(),
               loc = location.to(acc_type).contiguous(), att = attention.to(acc_type).contiguous();
    grad_value = at::zeros(v.sizes(), v.options().dtype(acc_type));
    grad_location = at::zeros(loc.sizes(), loc.options());
    grad_attention = at::zeros(att.sizes(), att.options());
    DISPATCH_HEAD_DIM(s.D, backward_kernel<scalar_t, acc_t, D_FIXED>(
        s, levels, g.const_data_ptr<scalar_t>(), v.const_data_ptr<scalar_t>(), loc.const_data_ptr<acc_t>(),
        att.const_data_ptr<acc_t>(), grad_value.mutable_data_ptr<acc_t>(), grad_location.mutable_data_ptr<acc_t>(),
        grad_attention.mutable_data_ptr<acc_t>()));
  });
  return {grad_value.to(value.scalar_type()), grad_location.to(location.scalar_type()),
          grad_attention.to(attention.scalar_type())};
}

}  // namespace

TORCH_LIBRARY_IMPL(ms_deform_attn, CPU, m) {
  m.impl("forward", &forward);
  m.impl("backward", &backward);
}
