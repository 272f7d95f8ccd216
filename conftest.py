"""Settings that must be made before the tests import PyTorch and Triton."""

import os

# one thread per worker is fastest for all tests together, and with two threads oneDNN 3.12 (PyTorch 2.14) corrupts
# memory in the gradient of some 1×1 convolutions with 8 channels, which the smallest backbones of the tests have
os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch

# without a GPU, Triton's kernels run in its interpreter, which is chosen when Triton is imported
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"
