"""Library of the native code: taken from the wheel, or compiled at first use and cached; and its ctypes binding, the
structs and functions of source/keifu_native.h.

One library has code for all instruction sets and chooses among them at run time. Its file name is a hash of the source,
the flags, the system and the machine type (in the cache also of the compiler's version), so a change of any of them
causes a new build. A file next to it has the hash of its bytes: a damaged library is detected and built again.
"""

import ctypes
import os
import sys
from contextlib import suppress
from ctypes import POINTER, Structure, c_char_p, c_float, c_int32, c_int64, c_void_p
from functools import cache as once
from pathlib import Path
from typing import Any

from keifu import files, folders, locks
from keifu.errors import UserError, unknown
from keifu.native import compiler
from keifu.native.checks import Checks
from keifu.native.compiler import Unavailable

PREBUILT = Path(__file__).parent / "prebuilt"  # only in a wheel; packaging/wheel.py creates it
VARIABLE = "KEIFU_NATIVE"
INSTRUCTIONS = (
    "portable", "avx2", "avx_vnni", "avx512", "avx512_bf16", "amx", "neon_dotprod", "neon_i8mm", "neon_bf16",
)  # fmt: skip
BF16, INT8, INT4, INT4_MIN, INT4_SUPER, INT6_SUPER, INT8_64, INT4_64, F32 = range(9)


class Matrix(Structure):
    """A packed matrix and its bias."""

    _fields_ = [("format", c_int32), ("rows", c_int64), ("columns", c_int64), ("data", c_void_p), ("bias", c_void_p)]


class Norm(Structure):
    """A normalisation. Kind 0 means no norm."""

    _fields_ = [("kind", c_int32), ("eps", c_float), ("weight", c_void_p), ("bias", c_void_p)]


class Expert(Structure):
    """The feed-forward network of one expert."""

    _fields_ = [(name, Matrix) for name in ("gate", "up", "down")]


class Layer(Structure):
    """A block of attention and feed-forward."""

    _fields_ = [
        *((name, Matrix) for name in ("query", "key", "value", "out", "gate", "up", "down")),
        *((name, Matrix) for name in ("cross_query", "cross_out")),
        *((name, Norm) for name in ("attention_norm", "post_attention_norm", "feedforward_norm")),
        *((name, Norm) for name in ("post_feedforward_norm", "query_norm", "key_norm")),
        *((name, Norm) for name in ("all_queries_norm", "all_keys_norm", "cross_norm")),
        *((name, c_int32) for name in ("parallel", "norm_after", "activation", "window", "bidirectional")),
        ("attention_scale", c_float),
        ("rotary_frequencies", c_void_p),
        ("rotary_pairs", c_int32),
        ("rotary_interleaved", c_int32),
        ("rotary_magnitude", c_float),
        ("sinks", c_void_p),
        *((name, c_float) for name in ("gate_slope", "gate_limit")),
        ("router", Matrix),
        ("experts", POINTER(Expert)),
        *((name, c_int32) for name in ("n_experts", "n_chosen", "normalised")),
    ]


class ModelDescription(Structure):
    """A causal Transformer."""

    _fields_ = [
        *((name, c_int32) for name in ("dim", "n_heads", "n_kv_heads", "head_dim", "vocab_size", "n_layers")),
        ("embedding", Matrix),
        ("embedding_scale", c_float),
        ("positions", c_void_p),
        ("context_length", c_int32),
        ("layers", POINTER(Layer)),
        ("norm", Norm),
        ("head", Matrix),
        ("logit_scale", c_float),
        ("logit_softcap", c_float),
        ("source_length", c_int32),
    ]


class Batch(Structure):
    """The new tokens of some sequences, and the buffers for their logits."""

    _fields_ = [
        ("n_tokens", c_int32),
        *((name, c_void_p) for name in ("tokens", "positions", "sequences")),
        ("n_sequences", c_int32),
        ("table_width", c_int32),
        ("block_tables", c_void_p),
        ("n_sources", c_int32),
        ("source_width", c_int32),
        *((name, c_void_p) for name in ("source_tables", "source_lengths", "sources")),
        ("n_wanted", c_int32),
        ("wanted", c_void_p),
        *((name, c_void_p) for name in ("logits", "inputs")),
    ]


_RESULTS = {
    "last_error": c_char_p, "packed_size": c_int64, "cache_bytes": c_int64, "create": c_void_p, "check": c_float,
    "check_name": c_char_p,
}  # fmt: skip
_ARGUMENTS = {
    **dict.fromkeys(("last_error", "best_instructions", "instructions", "available_threads", "threads", "checks"), ()),
    **dict.fromkeys(("has_instructions", "use_instructions", "use_threads", "gguf_format", "check_name"), (c_int32,)),
    "check": (c_int32, c_int32),
    "packed_size": (c_int32, c_int64, c_int64),
    "pack": (c_int32, c_int32, c_void_p, c_int64, c_int64, c_int64, c_void_p),
    "repack_gguf": (c_int32, c_void_p, c_int64, c_int64, c_void_p),
    "unpack": (c_int32, c_void_p, c_int64, c_int64, c_int64, c_int64, c_void_p),
    "cache_bytes": (POINTER(ModelDescription), c_int32, c_int32),
    "create": (POINTER(ModelDescription), c_int32, c_int32, c_int32),
    "destroy": (c_void_p,),
    "copy_block": (c_void_p, c_int32, c_int32),
    **dict.fromkeys(("read_block", "write_block"), (c_void_p, c_int32, c_void_p)),
    "store_source": (c_void_p, c_int32, c_void_p, c_void_p, c_int32, c_void_p),
    "forward": (c_void_p, POINTER(Batch)),
}


class Library:
    """The functions of the C header without their prefix: `library.call("pack", ...)`. key: the name of its file, a
    hash of everything that it was built from."""

    def __init__(self, path: str):
        self.key = Path(path).stem
        self._functions: dict[str, Any] = {}
        loaded = ctypes.CDLL(path)
        for name, arguments in _ARGUMENTS.items():
            function = loaded[f"keifu_{name}"]
            function.argtypes, function.restype = arguments, _RESULTS.get(name, c_int32)
            self._functions[name] = function
        self.checks = Checks(self.call, Path(path), INSTRUCTIONS)

    def call(self, name: str, *arguments: Any) -> Any:
        """Call a function and return its result. Raises UserError with the library's message if the call fails."""
        result = self._functions[name](*arguments)
        if result == -1 or result is None:
            raise UserError(self._functions["last_error"]().decode())
        return result

    def gguf_format(self, ggml_type: int) -> int | None:
        """Return the native format that stores blocks of this GGML type without loss; None if there is none."""
        format = self._functions["gguf_format"](ggml_type)
        return None if format < 0 else format

    def destroy(self, model: int) -> None:
        """Free a model's caches."""
        self._functions["destroy"](model)


def open_library() -> Library:
    """Load the library, compiled if necessary, and select the instructions that KEIFU_NATIVE names, or the best that
    this CPU has and that pass the check on it.

    Raises `Unavailable` if KEIFU_NATIVE is "off" or names instructions that the CPU lacks, or if there is no library.
    Raises UserError for an unknown value of KEIFU_NATIVE.
    """
    set_name = os.environ.get(VARIABLE, "")
    if switched_off():
        raise Unavailable(f"{VARIABLE} is off")
    if set_name and set_name not in INSTRUCTIONS:
        raise unknown(f"{VARIABLE} called", set_name, [*INSTRUCTIONS, "off"])
    library = _loaded()
    if isinstance(library, Unavailable):
        raise library
    best = library.call("best_instructions")
    which = INSTRUCTIONS.index(set_name) if set_name else best
    if not library.call("has_instructions", which):
        raise Unavailable(f"{VARIABLE} is {set_name}, and the best that this CPU has is {INSTRUCTIONS[best]}")
    library.call("use_instructions", library.checks.usable(which, is_forced=bool(set_name)))
    return library


def instructions_in_use() -> str | None:
    """Return the name of the instruction set in use; None if the library is not loaded, or not available."""
    library = _loaded() if _loaded.cache_info().currsize and not switched_off() else None
    return INSTRUCTIONS[library.call("instructions")] if isinstance(library, Library) else None


def is_open() -> bool:
    """Return whether `open_library` answers at once: the library is loaded or known to be unavailable, so nothing has
    to be compiled.
    """
    return switched_off() or _loaded.cache_info().currsize > 0


def numbers_of(struct: Structure) -> list[Any]:
    """Return the numbers of a struct and of those inside it, without pointers."""
    fields = [(kind, getattr(struct, name)) for name, kind, *_ in struct._fields_]
    plain = [value for kind, value in fields if kind in (c_int32, c_int64, c_float)]
    return [*plain, *(numbers_of(value) for _, value in fields if isinstance(value, Structure))]


def use_threads(count: int) -> None:
    """Set the number of threads of the native code, if it is available."""
    library = None if switched_off() else _loaded()
    if isinstance(library, Library):
        library.call("use_threads", count)


def switched_off() -> bool:
    """Return whether KEIFU_NATIVE is "off"."""
    return os.environ.get(VARIABLE) == "off"


@once
def _loaded() -> Library | Unavailable:
    """Return the library, or the reason why there is none; later calls return the same."""
    if sys.byteorder != "little":
        return Unavailable("it is written for CPUs that put the lower byte first")
    if ready := prebuilt():
        with suppress(OSError):  # built for a newer system: compilation may still work
            return Library(str(ready))
    try:
        return Library(str(build()))
    except Unavailable as reason:
        return reason
    except OSError as error:
        return Unavailable(f"the library that was built does not load: {error}")


def prebuilt() -> Path | None:
    """Return the wheel's library if it exists, is undamaged and matches this source; otherwise None."""
    library = PREBUILT / f"{compiler.source_key()}.so"
    return library if _is_whole(library) else None


def build() -> Path:
    """Return the cached library. Compile it if the cache has no undamaged one.

    One process compiles; others wait for it. Raises `Unavailable` if there is no compiler, if compilation fails, or if
    the cache cannot be written.
    """
    command = compiler.find_compiler()
    library = folders.cache() / "native" / f"{compiler.source_key(compiler.version_of(command))}.so"
    try:
        with locks.locked(library):
            if not _is_whole(library):
                print("Building the native step, once: some seconds.", file=sys.stderr, flush=True)
                with files.replacing(library) as temporary:
                    compiler.compile_to(temporary, command)
                files.write_atomic(library.with_suffix(".sha256"), files.sha256(library))
    except OSError as error:
        raise Unavailable(f"{library.parent} cannot be written ({error.strerror})") from error
    return library


def _is_whole(library: Path) -> bool:
    """Return whether the library exists and its bytes have the hash that was stored when it was built."""
    digest = library.with_suffix(".sha256")
    return library.exists() and digest.exists() and digest.read_text() == files.sha256(library)


@once
def say_why(reason: str) -> None:
    """Print once why PyTorch generates instead of the native code."""
    print(f"PyTorch generates, not the native step: {reason}.", file=sys.stderr, flush=True)
