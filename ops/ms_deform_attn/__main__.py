"""`python -m ms_deform_attn build` compiles the kernels; `python -m ms_deform_attn` says what is in use."""

import sys

from ms_deform_attn import build, status


def main() -> int:
    arguments = sys.argv[1:]
    if arguments == ["build"]:
        try:
            path = build()
        except RuntimeError as error:
            print(f"ms_deform_attn: {error}", file=sys.stderr)
            return 1
        print(f"ms_deform_attn: CPU kernels at {path}")
        return 0
    if arguments in ([], ["status"]):
        print(status())
        return 0
    print(__doc__, file=sys.stderr)
    return 2


if __name__ == "__main__":
    sys.exit(main())
