"""The C library that a wheel built with POLYVIT_AOT=1 holds, seen from Python."""

from collections.abc import Iterator
from ctypes import CDLL, POINTER, Structure, c_char_p, c_int, c_int32, c_int64, c_size_t, c_void_p
from pathlib import Path

from polyvit_kernels.aot.jobs import format_limits

PATH = Path(__file__).parents[1] / "lib" / "libpolyvit_kernels.so"
"""Where the wheel puts it, together with its header."""


HEADINGS = ("op", "dtype", "gpu", "tokens", "features", "kernel", "warps", "registers", "shared", "bytes", "constants")


class LibraryParameter(Structure):
    """polyvit_parameter."""

    _fields_ = [("name", c_char_p), ("type", c_char_p), ("multiple", c_int32)]


class LibraryConstant(Structure):
    """polyvit_constant."""

    _fields_ = [("name", c_char_p), ("value", c_char_p)]


class LibraryKernel(Structure):
    """polyvit_kernel."""

    _fields_ = [
        ("name", c_char_p),
        ("arch", c_int32),
        ("num_warps", c_int32),
        ("shared_bytes", c_int32),
        ("num_registers", c_int32),
        ("num_parameters", c_int32),
        ("num_constants", c_int32),
        ("parameters", POINTER(LibraryParameter)),
        ("constants", POINTER(LibraryConstant)),
        ("image", c_void_p),
        ("image_bytes", c_size_t),
    ]


class LibraryEntry(Structure):
    """polyvit_row."""

    _fields_ = [
        ("op", c_char_p),
        ("dtype", c_char_p),
        ("backend", c_char_p),
        ("arch", c_int32),
        ("min_tokens", c_int32),
        ("max_tokens", c_int32),
        ("max_features", c_int32),
        ("num_kernels", c_int32),
        ("kernels", POINTER(POINTER(LibraryKernel))),
    ]


def load(path: Path = PATH) -> CDLL:
    """The library with its functions' types set. Raises FileNotFoundError where the install has none."""
    if not path.exists():
        raise FileNotFoundError(
            f"there is no {path}: this polyvit-fast was built without its C library (POLYVIT_AOT=1 pip wheel --no-deps .)"
        )
    library = CDLL(str(path))
    for name, result, *arguments in (
        ("polyvit_kernels_error", c_char_p),
        ("polyvit_kernels_count", c_size_t),
        ("polyvit_kernels_entry", POINTER(LibraryEntry), c_size_t),
        ("polyvit_kernels_find", POINTER(LibraryEntry), c_char_p, c_char_p, c_int, c_int64, c_int64),
        ("polyvit_kernels_choose", POINTER(LibraryKernel), POINTER(LibraryEntry), c_char_p, c_char_p),
        ("polyvit_kernels_constant", c_int64, POINTER(LibraryKernel), c_char_p, c_int64),
        ("polyvit_kernels_arch", c_int),
        ("polyvit_kernels_load", c_int, POINTER(LibraryKernel)),
    ):
        function = getattr(library, name)
        function.restype, function.argtypes = result, arguments
    return library


def rows(library: CDLL) -> Iterator[LibraryEntry]:
    """The library's table."""
    for index in range(library.polyvit_kernels_count()):
        yield library.polyvit_kernels_entry(index).contents


def describe(entry: LibraryEntry) -> Iterator[tuple[str, ...]]:
    """`HEADINGS` of each of a row's kernels."""
    sizes = (format_limits(entry.min_tokens, entry.max_tokens), format_limits(entry.max_features))
    for index in range(entry.num_kernels):
        kernel = entry.kernels[index].contents
        numbers = (kernel.num_warps, kernel.num_registers, kernel.shared_bytes, kernel.image_bytes)
        constants = (kernel.constants[i] for i in range(kernel.num_constants))
        text = " ".join(f"{constant.name.decode()}={constant.value.decode()}" for constant in constants)
        yield (entry.op.decode(), entry.dtype.decode(), f"sm_{entry.arch}", *sizes, kernel.name.decode(), *map(str, numbers), text)
