"""Write the number of bad inputs of each kind."""

import json
from pathlib import Path

from bad_inputs import counts

file = Path(__file__).parents[2] / "docs" / "measurements" / "bad_inputs.json"
file.write_text(json.dumps(counts(), indent=1) + "\n")
print(f"written: {file}")
