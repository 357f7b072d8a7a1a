"""The tests of Hugging Face directories share tables of configurations."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
