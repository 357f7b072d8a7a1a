"""Build hook of the wheel: compile the native step into it, or leave that to the first use.

KEIFU_WHEEL=native makes a wheel of this platform, or fails; KEIFU_WHEEL=pure makes one of any platform. Without it, a
machine with a C++ compiler makes a wheel of its platform, and any other machine makes a pure one.
"""

import hashlib
import importlib.util
import os
import platform
import sys
import sysconfig
from pathlib import Path
from tempfile import TemporaryDirectory
from types import ModuleType
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface

VARIABLE = "KEIFU_WHEEL"
COMPILER = "src/keifu/native/compiler.py"


class NativeLibrary(BuildHookInterface):
    """Hook that adds the compiled library, its hash and the platform's tag to a wheel."""

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        """Add the library; an editable install has none, because its source may change."""
        if version == "editable":
            return
        choice = os.environ.get(VARIABLE, "")
        if choice not in ("", "native", "pure"):
            raise ValueError(f"{VARIABLE} is {choice!r}: give native, pure, or nothing.")
        self._folder = TemporaryDirectory()
        try:
            library = compiled(Path(self.root), Path(self._folder.name)) if choice != "pure" else None
        except Exception as error:  # a class of the loaded file: without a compiler, or where it fails
            if choice == "native" or type(error).__name__ != "Unavailable":
                raise
            self.app.display_warning(f"The wheel has no native step, which is compiled at first use: {error}.")
            library = None
        if library is not None:
            for file in (library, library.with_suffix(".sha256")):
                build_data["force_include"][str(file)] = f"keifu/native/prebuilt/{file.name}"
            build_data["pure_python"] = False
            build_data["tag"] = f"py3-none-{platform_tag()}"

    def finalize(self, version: str, build_data: dict[str, Any], artifact_path: str) -> None:
        """Remove the compiled files."""
        if version != "editable":
            self._folder.cleanup()


def compiled(root: Path, folder: Path) -> Path:
    """Return the library, compiled in the folder, with a file of its hash next to it."""
    compiler = load_compiler(root)
    library = folder / f"{compiler.source_key()}.so"
    compiler.compile_to(library, compiler.find_compiler())
    library.with_suffix(".sha256").write_bytes(hashlib.sha256(library.read_bytes()).hexdigest().encode())
    return library


def load_compiler(root: Path) -> ModuleType:
    """Return the module that compiles, without the package: torch is not in a build's environment."""
    spec = importlib.util.spec_from_file_location("keifu_compiler", root / COMPILER)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def platform_tag() -> str:
    """Return the tag of this machine; on macOS with the system's version that the compiler builds for.

    Python may be built for two kinds of machine there, the library is for one.
    """
    if sys.platform == "darwin":
        target = os.environ.get("MACOSX_DEPLOYMENT_TARGET") or platform.mac_ver()[0]
        return f"macosx_{target.split('.')[0]}_0_{platform.machine()}"
    return sysconfig.get_platform().replace("-", "_").replace(".", "_")
