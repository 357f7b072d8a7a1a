"""`python -m keifu` is `keifu`.

Python puts the current folder first on its path for `-m`: a `random.py` there would be imported. keifu removes it.
"""

import os
import sys
from contextlib import suppress

with suppress(OSError):  # the current folder may be gone
    if not sys.flags.safe_path and sys.path[0] == os.getcwd() != os.path.dirname(os.path.dirname(__file__)):
        del sys.path[0]

from keifu.cli import main  # noqa: E402 (the path must be safe before)

if __name__ == "__main__":
    main()
