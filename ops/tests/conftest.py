"""What lies beside the package can be imported: the versions of the kernels that the benchmark times."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent / "benchmarks"))
