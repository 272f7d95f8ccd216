// Python binding of the original kernel for the benchmark, which is compiled from mmcv's sources.
#include <torch/extension.h>

at::Tensor ms_deform_attn_cuda_forward(const at::Tensor& value, const at::Tensor& shapes, const at::Tensor& starts,
                                       const at::Tensor& locations, const at::Tensor& weights, const int im2col_step);
void ms_deform_attn_cuda_backward(const at::Tensor& value, const at::Tensor& shapes, const at::Tensor& starts,
                                  const at::Tensor& locations, const at::Tensor& weights,
                                  const at::Tensor& grad_output, at::Tensor& grad_value, at::Tensor& grad_locations,
                                  at::Tensor& grad_weights, const int im2col_step);

PYBIND11_MODULE(TORCH_EXTENSION_NAME, m) {
  m.def("forward", &ms_deform_attn_cuda_forward);
  m.def("backward", &ms_deform_attn_cuda_backward);
}
