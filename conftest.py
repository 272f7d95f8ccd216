"""What has to be settled before the tests import anything."""

import os
import sys

# one thread per worker: all tests together are fastest so, and with two threads oneDNN 3.12 (PyTorch 2.14) corrupts
# memory in the gradient of some 1×1 convolutions with 8 channels, which the smallest backbones of the tests have
os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch

# without a GPU, Triton's kernels are tested in its interpreter, which is chosen when Triton is imported
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"
# as in dimaskdino.runs.notebooks: a second less at the start of each worker
sys.modules.setdefault("rfc3987_syntax", None)
