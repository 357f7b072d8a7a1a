"""Script that runs pip and ends it before the first build, so that no code of a source archive ever runs.

Usage: python -P pip_without_builds.py FILE COPY ARGUMENTS...

`pip download` downloads a source archive, checks its hash and unpacks it. Then it starts a child process with the
archive's build backend to get metadata. The audit hook of this script runs before a child process is created. It copies
the archive FILE, which pip has opened by then, to COPY and ends pip.
"""

import os
import runpy
import shutil
import sys

NEW_PROCESS = {"subprocess.Popen", "os.exec", "os.fork", "os.forkpty", "os.posix_spawn", "os.spawn", "os.system"}


def main() -> None:
    """Run pip with the arguments after FILE and COPY."""
    name, copy, *arguments = sys.argv[1:]
    opened: list[str] = []

    def end_before_build(event: str, values: tuple) -> None:
        """Copy the archive and end this process if pip is about to start Python, or has unpacked the archive."""
        if event == "open" and isinstance(values[0], str) and os.path.basename(values[0]) == name:
            opened.append(values[0])
        elif event in NEW_PROCESS and (opened or sys.executable in repr(values)):
            if opened:
                shutil.copyfile(opened[-1], copy)
            os._exit(0)

    sys.addaudithook(end_before_build)
    sys.argv = ["pip", *arguments]
    runpy.run_module("pip", run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    main()
