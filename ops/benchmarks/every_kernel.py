"""Call every GPU kernel of the operator once, for a profiler: `ncu --set full python ops/benchmarks/every_kernel.py`.

Forward and backward, CUDA and Triton, float32 and bfloat16, with the samples of one image's encoder.
"""

import torch
from ms_deform_attn import backend, ms_deform_attn
from ms_deform_attn.benchmark import LEVELS, Workload
from ms_deform_attn.functional import available


def main(device: str, backends: tuple[str, ...]) -> None:
    """Call forward and backward of every backend on a device."""
    for dtype in ("float32", "bfloat16"):
        tensors = [x.requires_grad_() for x in Workload("encoder", "near", 1, dtype).inputs(device)]
        for name in filter(available, backends):
            with backend(name):
                ms_deform_attn(tensors[0], LEVELS, *tensors[1:]).sum().backward()


if __name__ == "__main__":
    main("cuda", ("cuda", "triton"))
    torch.cuda.synchronize()
