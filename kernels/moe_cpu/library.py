"""Compile this folder's C files for the processor at hand, once, and load them: `library()`.

The shared object is kept in `~/.cache/moe-lab/cpu` (or `$MOE_CPU_CACHE`) under a name that follows from the sources, the
compiler and the processor. Only a C compiler is needed (`$CC`, cc, gcc or clang), no headers of Python's or torch's.
"""

import ctypes
import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path

import torch

FOLDER = Path(__file__).parent
_FLAGS = ("-O3", "-march=native", "-fno-math-errno", "-fno-trapping-math", "-std=gnu11", "-fPIC", "-Wall")


def _flags() -> tuple[str, ...]:
    """What every file is compiled with; `$MOE_CPU_FLAGS` comes last, as in `-march=haswell` for a machine without AVX-512."""
    return (*_FLAGS, *os.environ.get("MOE_CPU_FLAGS", "").split())


class CannotCompile(RuntimeError):
    """There is no C compiler, or it refused; the message says which and what it said."""


def _compiler() -> str:
    for name in (os.environ.get("CC"), "cc", "gcc", "clang"):
        if name and (found := shutil.which(name)):
            return found
    raise CannotCompile("no C compiler was found (looked for $CC, cc, gcc, clang)")


def _processor() -> str:
    """What -march=native depends on, as far as can be told without asking the compiler."""
    cpuinfo = Path("/proc/cpuinfo")
    if not cpuinfo.exists():
        return platform.processor()
    lines = cpuinfo.read_text(encoding="utf-8").splitlines()
    return "\n".join(sorted({line for line in lines if line.startswith(("flags", "Features", "model name"))}))


def _openmp() -> Path | None:
    """The OpenMP library that torch has loaded: with it the kernels share torch's threads; without they have one."""
    return next(iter(sorted((Path(torch.__file__).parent / "lib").glob("libgomp*.so*"))), None)


def _run(command: list[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise CannotCompile(f"{' '.join(command)} failed:\n{done.stderr[-2000:]}")


def _build(target: Path, compiler: str, sources: list[Path]) -> None:
    """Compile the files at the same time, and link them."""
    openmp = _openmp()
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent) as folder, ThreadPoolExecutor() as pool:
        objects = [str(Path(folder) / f"{source.stem}.o") for source in sources]
        made = str(Path(folder) / target.name)
        flags = [*_flags(), "-fopenmp"] if openmp else _flags()
        commands = [[compiler, *flags, "-c", str(s), "-o", o] for s, o in zip(sources, objects, strict=True)]
        list(pool.map(_run, commands))
        # -fopenmp is left out here: it would link the compiler's own OpenMP, a second pool of threads
        _run([compiler, "-shared", *objects, "-o", made, *([str(openmp)] if openmp else [])])
        os.replace(made, target)  # whole or not at all, also where two processes compile at once


@cache
def library() -> ctypes.CDLL:
    """The compiled kernels; raises CannotCompile. The first call on a machine takes some seconds."""
    sources = sorted(FOLDER.glob("*.c"))
    compiler = _compiler()
    texts = [path.read_bytes() for path in (*sources, *sorted(FOLDER.glob("*.h")))]
    named = "\n".join((compiler, *_flags(), str(_openmp()), _processor())).encode()
    key = hashlib.sha256(b"\0".join((*texts, named))).hexdigest()[:16]
    folder = Path(os.environ.get("MOE_CPU_CACHE", "~/.cache/moe-lab/cpu")).expanduser()
    target = folder / f"kernels-{key}.so"
    if not target.exists():
        _build(target, compiler, sources)
    return ctypes.CDLL(str(target))
