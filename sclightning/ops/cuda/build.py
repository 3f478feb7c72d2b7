"""Building and loading the CUDA extension: with nvcc, on first use or by ``python -m sclightning.ops.cuda.build``.

The library has a plain C interface, so one binary serves every version of PyTorch. It is kept in
``~/.cache/sclightning`` (or ``SCLIGHTNING_CACHE``) under a name that holds the architecture, a hash of the source and
the version of nvcc; the same string is compiled into it, which tells a foreign file of that name.
"""

import contextlib
import ctypes
import fcntl
import hashlib
import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

SOURCES = Path(__file__).parent.parent / "csrc"
ARCH = "sm_90a"
FLAGS = ["-std=c++17", "-O3", "-Xcompiler", "-fPIC"]


def find_nvcc() -> str | None:
    """The CUDA compiler: of ``CUDA_HOME``, on the path, or where NVIDIA's installer puts it; None if there is none."""
    home = os.environ.get("CUDA_HOME")
    places = [home and shutil.which("nvcc", path=f"{home}/bin"), shutil.which("nvcc"), "/usr/local/cuda/bin/nvcc"]
    return next((nvcc for nvcc in places if nvcc and os.access(nvcc, os.X_OK)), None)


def cache() -> Path:
    """Folder of the built libraries."""
    home = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(os.environ.get("SCLIGHTNING_CACHE") or Path(home) / "sclightning")


def source_hash(sources: Path = SOURCES) -> str:
    """Hash of all sources and of the flags they are compiled with."""
    digest = hashlib.sha256(" ".join(FLAGS).encode())
    for file in sorted(sources.iterdir()):
        digest.update(file.name.encode() + b"\0" + file.read_bytes() + b"\0")
    return digest.hexdigest()[:16]


def build_name(nvcc: str, arch: str = ARCH) -> str:
    """Name of the build: architecture, hash of the source, version of the compiler."""
    output = subprocess.run([nvcc, "--version"], capture_output=True, text=True, check=True).stdout
    return f"attention-{arch}-{source_hash()}-nvcc{re.search(r'V([0-9.]+)', output)[1]}"


def compile_library(nvcc: str, to: Path, name: str, arch: str = ARCH) -> str:
    """Compile the sources side by side and link them to the library ``to``; returns what the compiler said.

    Raises:
        RuntimeError: With the compiler's message, if it fails.
    """
    target = f"-gencode=arch={arch.replace('sm', 'compute')},code={arch}"  # -arch=sm_90a lets newer nvcc add sm_90
    flags = [*FLAGS, target, "-Xptxas", "-v", f'-DSCLIGHTNING_BUILD="{name}"']
    with tempfile.TemporaryDirectory() as folder:
        objects = {file: f"{folder}/{file.stem}.o" for file in sorted(SOURCES.glob("*.cu"))}
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
        jobs = [subprocess.Popen([nvcc, *flags, "-c", file, "-o", o], **pipes) for file, o in objects.items()]
        said = "".join(job.communicate()[0] for job in jobs)
        if not any(job.returncode for job in jobs):
            link = subprocess.run([nvcc, target, "-shared", *objects.values(), "-o", f"{folder}/library.so"], **pipes)
            said += link.stdout
            if link.returncode == 0:
                partial = to.with_suffix(f".{os.getpid()}")
                shutil.copy(f"{folder}/library.so", partial)
                partial.replace(to)  # whole or not at all, for whoever looks meanwhile
                return said
    raise RuntimeError(f"{nvcc} failed to build sclightning's CUDA extension:\n{said}")


def open_library(path: Path, device: str = "cuda") -> ctypes.CDLL:
    """The library at ``path`` with its signatures; ``device`` is the type of the memory that its functions read.

    Raises:
        OSError: If it is no library, or not the build that its name says.
    """
    library = ctypes.CDLL(str(path))
    library.device = device
    library.sclightning_build.restype = ctypes.c_char_p
    for function in (library.sclightning_attention, library.sclightning_cosine):
        function.restype, function.argtypes = ctypes.c_char_p, [ctypes.c_void_p, ctypes.c_void_p]
    if (found := library.sclightning_build().decode()) != path.stem:
        raise OSError(f"{path} is a build of something else ({found}): delete it.")
    return library


@contextlib.contextmanager
def _lock(folder: Path):
    """One process of a machine builds at a time; the others find the result."""
    with open(folder / "lock", "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def load() -> ctypes.CDLL:
    """The built library, compiled now if it is not in the cache.

    Raises:
        RuntimeError: If there is no compiler and no build of these sources, or if compiling fails.
        OSError: If the library does not load.
    """
    nvcc, folder = find_nvcc(), cache()
    if nvcc is None:
        builds = sorted(folder.glob(f"attention-{ARCH}-{source_hash()}-nvcc*.so"))
        if not builds:
            raise RuntimeError("no nvcc was found (CUDA_HOME, PATH, /usr/local/cuda), and no build of these sources")
        return open_library(builds[-1])
    name = build_name(nvcc)
    path = folder / f"{name}.so"
    folder.mkdir(parents=True, exist_ok=True)
    with _lock(folder):
        if path.exists():
            with contextlib.suppress(OSError, AttributeError):  # foreign: built anew below
                return open_library(path)
        print(f"sclightning: building CUDA kernels with {nvcc} (about 10 s, once): {path}", file=sys.stderr, flush=True)
        compile_library(nvcc, path, name)
    return open_library(path)


if __name__ == "__main__":
    print(load()._name)
