"""Multi-scale deformable attention (Deformable DETR, arXiv 2010.04159, Eq. 3) for PyTorch.

`ms_deform_attn` is the one function. It runs compiled C++ or CUDA kernels where they have been built
(`python -m ms_deform_attn build`), Triton kernels on GPUs without nvcc, and plain PyTorch elsewhere; `status()` says
which. `install_drop_in()` lets code written for the compiled `MultiScaleDeformableAttention` extension use it.
"""

from ms_deform_attn.build import build, library_path
from ms_deform_attn.drop_in import install_drop_in
from ms_deform_attn.functional import backend, ms_deform_attn, set_backend, status
from ms_deform_attn.reference import flops, ms_deform_attn_reference

__all__ = [
    "backend",
    "build",
    "flops",
    "install_drop_in",
    "library_path",
    "ms_deform_attn",
    "ms_deform_attn_reference",
    "set_backend",
    "status",
]
