"""The tests of GGUF share a table of Configs."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
