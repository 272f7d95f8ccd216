"""`python -m ms_deform_attn build` compiles the kernels; `python -m ms_deform_attn` says what is in use.

`build` makes the CPU kernels and, where torch can use a GPU and nvcc is found, the CUDA kernels.
`build cpu` and `build cuda` make one of them; `--verbose` shows the compiler at work.
"""

import subprocess
import sys

import torch

from ms_deform_attn import build, status
from ms_deform_attn.build import compiler


def main() -> int:
    arguments = [x for x in sys.argv[1:] if x != "--verbose"]
    if arguments in ([], ["status"]):
        print(status())
        return 0
    if arguments[0] != "build" or arguments[1:] not in ([], ["cpu"], ["cuda"]):
        print(__doc__, file=sys.stderr)
        return 2
    devices = arguments[1:] or ["cpu", *(["cuda"] if torch.cuda.is_available() and compiler("cuda") else [])]
    failed = False
    for device in devices:
        try:
            path = build(device, verbose="--verbose" in sys.argv)
            print(f"ms_deform_attn: {device.upper()} kernels at {path}")
        except (OSError, RuntimeError, subprocess.SubprocessError) as error:
            print(f"ms_deform_attn: {error}", file=sys.stderr)
            failed = True
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
