"""What has to be settled before the tests import anything."""

import os
import sys

import torch

# without a GPU, Triton's kernels are tested in its interpreter, which is chosen when Triton is imported
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"
# as in dimaskdino.runs.notebooks: a second less at the start of each worker
sys.modules.setdefault("rfc3987_syntax", None)
