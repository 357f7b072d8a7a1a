"""NEON gives the bits of AVX2, with and without dot products, in each weight format: on an emulated arm64 machine.

The library is compiled by Debian's aarch64 compiler, and runs in qemu-user. Speed is not measured.
"""

import shutil
import subprocess
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from keifu.native import compiler

DRIVER = Path(__file__).parent / "arm_driver.cpp"
FORMATS = 10  # that the driver runs
PORTABLE, AVX2, DOTPROD = 0, 1, 6


def run(cross: str, machine: str, emulator: Sequence[str], folder: Path) -> dict[int, dict[str, str]]:
    """Return the hash of the logits of each instruction set and weight format."""
    folder.mkdir()
    flags = [*compiler.FLAGS, f"-I{compiler.SOURCE}"]

    def compile_one(source: Path) -> str:
        made = str(folder / f"{source.stem}.o")
        own = compiler.own_flags(source, machine)
        subprocess.run([cross, *flags, *own, "-c", str(source), "-o", made], check=True)
        return made

    with ThreadPoolExecutor(2) as pool:
        objects = list(pool.map(compile_one, [*compiler.SOURCE.glob("*.cpp"), DRIVER]))
    program = folder / "driver"
    subprocess.run([cross, "-static", "-pthread", "-o", str(program), *objects], check=True)
    printed = subprocess.run([*emulator, str(program)], check=True, capture_output=True, text=True).stdout
    results: dict[int, dict[str, str]] = {}
    for line in printed.splitlines():
        instructions, name, bits, _ = line.split()
        results.setdefault(int(instructions), {})[name] = bits
    return results


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.skipif(not shutil.which("aarch64-linux-gnu-g++"), reason="there is no compiler for arm64")
@pytest.mark.skipif(not shutil.which("qemu-aarch64"), reason="there is no qemu-user")
def test_neon_gives_the_bits_of_avx2(tmp_path: Path) -> None:
    here = run("g++", "x86_64", (), tmp_path / "x86")
    if AVX2 not in here:
        pytest.skip("this machine has no AVX2")
    arm = run("aarch64-linux-gnu-g++", "aarch64", ("qemu-aarch64", "-cpu", "max"), tmp_path / "arm")
    assert arm.keys() == {PORTABLE, DOTPROD}
    assert len(here[AVX2]) == FORMATS and len(set(here[AVX2].values())) == FORMATS
    assert arm[PORTABLE] == here[AVX2]
    assert arm[DOTPROD] == here[AVX2]
