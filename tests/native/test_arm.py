"""NEON gives the bits of AVX2, with each of its instruction sets, in each weight format: on an emulated arm64 machine.

The library is compiled by Debian's aarch64 compiler, and runs in qemu-user. Speed is not measured.
"""

import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from keifu.native import compiler
from keifu.native.library import INSTRUCTIONS

DRIVER = Path(__file__).parent / "arm_driver.cpp"
QEMU = shutil.which("qemu-aarch64") or shutil.which("qemu-aarch64-static")
FORMATS = 10  # that the driver runs
CPUS = {  # of the emulator, and the instruction sets that are chosen from on each
    "max": ["portable", "neon_dotprod", "neon_i8mm", "neon_bf16"],
    "neoverse-n1": ["portable", "neon_dotprod"],
    "cortex-a57": ["portable"],
}


def build(cross: str, machine: str, folder: Path, *more: str) -> Path:
    """Return the driver, compiled with the library, by its flags and more."""
    folder.mkdir()
    flags = [*compiler.FLAGS, *more, f"-I{compiler.SOURCE}"]

    def compile_one(source: Path) -> str:
        made = str(folder / f"{source.stem}.o")
        own = compiler.own_flags(source, machine)
        subprocess.run([cross, *flags, *own, "-c", str(source), "-o", made], check=True)
        return made

    with ThreadPoolExecutor(2) as pool:
        objects = list(pool.map(compile_one, [*compiler.SOURCE.glob("*.cpp"), DRIVER]))
    program = folder / "driver.exe"  # Windows, too, runs this name
    subprocess.run([cross, "-static", "-pthread", "-o", str(program), *objects], check=True)
    return program


def run(*command: str | Path) -> dict[str, dict[str, str]]:
    """Return the hash of the logits of each instruction set and weight format."""
    printed = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    results: dict[str, dict[str, str]] = {}
    for line in printed.splitlines():
        instructions, name, bits, _ = line.split()
        results.setdefault(INSTRUCTIONS[int(instructions)], {})[name] = bits
    return results


@pytest.mark.skipif(not shutil.which("aarch64-linux-gnu-g++"), reason="there is no compiler for arm64")
@pytest.mark.skipif(not QEMU, reason="there is no qemu-user")
def test_neon_gives_the_bits_of_portable_code(tmp_path: Path) -> None:
    # -O1 compiles in half of the time; the slow test has the library's own flags
    program = build("aarch64-linux-gnu-g++", "aarch64", tmp_path / "arm", "-O1")
    arm = run(str(QEMU), "-cpu", "max", program)
    assert [*arm] == CPUS["max"]
    assert len(arm["portable"]) == FORMATS and len({*arm["portable"].values()}) == FORMATS
    for name in CPUS["max"]:
        assert arm[name] == arm["portable"], name


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.skipif(not shutil.which("aarch64-linux-gnu-g++"), reason="there is no compiler for arm64")
@pytest.mark.skipif(not QEMU, reason="there is no qemu-user")
def test_neon_gives_the_bits_of_avx2(tmp_path: Path) -> None:
    here = run(build("g++", "x86_64", tmp_path / "x86"))
    if "avx2" not in here:
        pytest.skip("this machine has no AVX2")
    assert len(here["avx2"]) == FORMATS and len(set(here["avx2"].values())) == FORMATS
    program = build("aarch64-linux-gnu-g++", "aarch64", tmp_path / "arm")
    for cpu, instructions in CPUS.items():
        arm = run(str(QEMU), "-cpu", cpu, program)
        assert [*arm] == instructions, cpu
        for name in instructions:
            assert arm[name] == here["avx2"], f"{cpu}: {name}"
