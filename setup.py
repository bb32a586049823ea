"""Builds csrc/ into fastsr/_C.so and fastsr/_cuda.so; everything else about the package is in pyproject.toml.

The libraries use the LibTorch stable ABI only, so one build serves every torch from 2.11 on and every Python: they
carry no Python tag, and torch is needed for its headers alone, so that a torch without CUDA will do. Without a C++
compiler, or without torch in the target environment, the package installs as Python only, says so, and every operator
runs its eager definition. Without nvcc it installs without the CUDA kernels, and says that.

FASTSR_BUILD=0   install Python only
CXX=...          the compiler (default: the first of g++, clang++, c++ on PATH)
TORCH_DIR=...    the folder of the torch package to take headers from
FASTSR_CUDA=0|1  leave the CUDA kernels out, or insist on them (default: they are built if nvcc is found)
CUDACXX=...      nvcc (default: that of CUDA_HOME, on PATH, or in /usr/local/cuda)
FASTSR_CUDA_ARCHS=80;90a   GPU architectures; others run from the first one's PTX, compiled when it is first used

A file is compiled for the instruction set that the end of its name says (LEVELS); every other file must run anywhere.
"""

from __future__ import annotations

import os
import platform
import shlex
import shutil
import site
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from setuptools import Extension, find_packages, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).parent.resolve()
TORCH_TARGET = "0x020b000000000000"  # torch 2.11: nothing newer of the stable ABI is used
FLAGS = ["-O3", "-std=c++20", "-fPIC", "-fvisibility=hidden", "-Wall", "-Wextra", "-Wno-unused-parameter"]
AVX2 = ["-mavx2", "-mfma", "-mf16c"]
AVX512 = [f"-mavx512{part}" for part in ("f", "dq", "cd", "bw", "vl")]
AVX512 += [*AVX2, "-mbmi", "-mbmi2", "-mprefer-vector-width=512"]
# Kernels may contract and reorder traps, but NaN and infinity keep their meaning: no -ffast-math.
# GCC 12 warns of intrinsics that leave a register undefined on purpose.
KERNEL = [
    "-fno-math-errno",
    "-fno-trapping-math",
    "-ffp-contract=fast",
    "-Wno-maybe-uninitialized",
    "-Wno-uninitialized",
]
LEVELS = {"_avx2": AVX2 + KERNEL, "_avx512": AVX512 + KERNEL, "_avx512_bf16": [*AVX512, "-mavx512bf16", *KERNEL]}


CUDA_ARCHS = "80;90a"
CUDA_LIBRARY = "fastsr._cuda"
NVCC_FLAGS = ["-O3", "-std=c++20", "-Xcompiler", "-fPIC,-fvisibility=hidden,-Wall"]


def find_torch() -> Path | None:
    """Folder of the torch installed where fastsr is going to be, found without importing it.

    An isolated build hides the environment's packages from sys.path, but not from site.getsitepackages.
    """
    if "TORCH_DIR" in os.environ:
        return Path(os.environ["TORCH_DIR"])
    prefixes = [sys.prefix]
    config = Path(sys.prefix, "pyvenv.cfg")
    if config.exists() and "include-system-site-packages = true" in config.read_text():
        prefixes.append(sys.base_prefix)
    folders = [*site.getsitepackages(prefixes), site.getusersitepackages(), *sys.path]
    return next((Path(f, "torch") for f in folders if f and Path(f, "torch", "version.py").is_file()), None)


def find_compiler() -> list[str] | None:
    names = [os.environ["CXX"]] if os.environ.get("CXX") else ["g++", "clang++", "c++"]
    return next((shlex.split(name) for name in names if shutil.which(shlex.split(name)[0])), None)


def find_nvcc() -> str | None:
    candidates = [os.environ.get("CUDACXX"), shutil.which("nvcc"), "/usr/local/cuda/bin/nvcc"]
    if os.environ.get("CUDA_HOME"):
        candidates.insert(1, os.path.join(os.environ["CUDA_HOME"], "bin", "nvcc"))
    return next((name for name in candidates if name and shutil.which(name)), None)


def find_cudart(nvcc: str) -> Path | None:
    """Folder of the static CUDA runtime. nvcc is asked, as it may be a script that starts another."""
    said = subprocess.run([nvcc, "-dryrun", "-c", "x.cu"], capture_output=True, text=True).stderr
    tops = [line.partition("=")[2].strip() for line in said.splitlines() if line.startswith("#$ TOP=")]
    folders = [Path(top, lib) for top in tops for lib in ("lib64", "lib", "targets/x86_64-linux/lib")]
    return next((folder for folder in folders if (folder / "libcudart_static.a").is_file()), None)


def no_cuda_because() -> str | None:
    """Why csrc/cuda is not compiled here; None when it is. Raises SystemExit when it has to be."""
    wanted = os.environ.get("FASTSR_CUDA", "")
    if wanted == "0":
        return "FASTSR_CUDA=0"
    nvcc = find_nvcc()
    if nvcc is None:
        reason = "no nvcc was found (set CUDACXX or CUDA_HOME)"
    elif find_cudart(nvcc) is None:
        reason = f"{nvcc} comes without libcudart_static.a"
    else:
        return None
    if wanted == "1":
        raise SystemExit(f"fastsr: FASTSR_CUDA=1, but {reason}")
    return reason


def cuda_archs() -> list[str]:
    return os.environ.get("FASTSR_CUDA_ARCHS", CUDA_ARCHS).replace(",", ";").split(";")


def gencodes(source: str) -> list[str]:
    """The targets of a CUDA file: Hopper's own instructions exist for 90a alone. The first brings its PTX along."""
    archs = [a for a in cuda_archs() if a == "90a" or not Path(source).stem.endswith("_sm90")]
    codes = {a: f"[sm_{a},compute_{a}]" if a == archs[0] and a.isdigit() else f"sm_{a}" for a in archs}
    return [f"-gencode=arch=compute_{a},code={codes[a]}" for a in archs]


def cuda_sources() -> list[str]:
    files = sorted(str(p.relative_to(ROOT)) for p in (ROOT / "csrc" / "cuda").rglob("*") if p.suffix in (".cu", ".cpp"))
    return [source for source in files if not source.endswith(".cu") or gencodes(source)]


def level_flags(source: str) -> list[str] | None:
    """The flags of the instruction set in a file's name; None for a file without one."""
    return next((flags for suffix, flags in LEVELS.items() if Path(source).stem.endswith(suffix)), None)


def python_only_because() -> str | None:
    """Why csrc/ is not compiled here; None when it is."""
    if os.environ.get("FASTSR_BUILD") == "0":
        return "FASTSR_BUILD=0"
    if not sys.platform.startswith("linux"):
        return f"compiled operators are for Linux, this is {sys.platform}"
    if find_compiler() is None:
        return "no C++ compiler was found (set CXX, or install g++)"
    torch = find_torch()
    if torch is None:
        return "torch is not installed in this environment (install torch first, then fastsr again)"
    if (
        not (torch / "include/torch/csrc/stable/library.h").is_file()
        or not (torch / "include/torch/headeronly").is_dir()
    ):
        return f"the torch in {torch} has no stable ABI headers (fastsr needs torch 2.11 or newer)"
    return None


class BuildLibrary(build_ext):
    """Compiles each Extension into a plain shared library for torch.ops.load_library."""

    def get_ext_filename(self, fullname: str) -> str:
        return fullname.replace(".", os.sep) + ".so"  # no Python ABI inside, hence no Python tag

    def copy_extensions_to_source(self) -> None:
        # Renaming leaves the library that a running program has mapped as it is; writing over it would not.
        for ext in self.extensions:
            library = ROOT / self.get_ext_filename(ext.name)
            fresh = library.with_name(f".{library.name}.{os.getpid()}")
            shutil.copyfile(Path(self.build_lib, self.get_ext_filename(ext.name)), fresh)
            fresh.replace(library)

    def build_extension(self, ext: Extension) -> None:
        import fcntl  # exists on Linux, and python_only_because() has sent everything else away

        cxx, torch = find_compiler(), find_torch()
        assert cxx is not None and torch is not None  # python_only_because() found both
        objects = Path(self.build_temp).resolve()
        library = Path(self.get_ext_fullpath(ext.name)).resolve()
        library.parent.mkdir(parents=True, exist_ok=True)
        objects.mkdir(parents=True, exist_ok=True)
        includes = [f"-I{ROOT / 'csrc'}", f"-I{torch / 'include'}", f"-DTORCH_TARGET_VERSION={TORCH_TARGET}"]
        # Messages of torch's check macros carry the path of the source, or of torch's header.
        prefixes = [f"-ffile-prefix-map={ROOT}/=", f"-ffile-prefix-map={torch / 'include'}/="]
        compile_ = [*cxx, *FLAGS, *prefixes, *includes]
        # Named explicitly because torch's own libraries are loaded privately, out of reach for an unlinked symbol.
        libraries = [f"-L{torch / 'lib'}", "-Wl,--no-as-needed", "-ltorch_cpu"]
        hopper = ["-DFASTSR_SM90"] if "90a" in cuda_archs() else []
        nvcc = [find_nvcc(), *NVCC_FLAGS, *hopper, f"-I{ROOT / 'csrc'}"]
        if ext.name == CUDA_LIBRARY:
            compile_ += hopper
            # torch brings libtorch_cuda along where it exists; the stream is asked of that.
            libraries += ["-ltorch", "-Wl,--as-needed", f"-L{find_cudart(str(nvcc[0]))}"]
            libraries += ["-lcudart_static", "-ldl", "-lrt", "-lpthread"]

        commands = {}  # object -> (source, what compiles it)
        # Files for any processor come first: of two copies of one inline function the linker takes the first.
        for source in sorted(ext.sources, key=lambda s: (level_flags(s) is not None, s)):
            target = objects / (source.replace("/", "_") + ".o")
            words = [*nvcc, *gencodes(source)] if source.endswith(".cu") else [*compile_, *(level_flags(source) or [])]
            commands[target] = ROOT / source, words
        fresh = library.with_name(f".{library.name}.{os.getpid()}")
        link = [*cxx, "-shared", "-o", str(fresh), *map(str, commands), *libraries]
        try:
            with open(objects / "lock", "w") as lock:
                fcntl.flock(lock, fcntl.LOCK_EX)  # two builds in one folder take turns
                if shutil.which("ninja"):
                    self._run_ninja(objects, commands)
                else:
                    jobs = [[*words, "-c", str(s), "-o", str(target)] for target, (s, words) in commands.items()]
                    with ThreadPoolExecutor(os.cpu_count()) as pool:
                        list(pool.map(self._run, jobs))
                self._run(link)
                fresh.replace(library)
        except subprocess.CalledProcessError as error:
            raise SystemExit(
                f"fastsr: compiling csrc/ failed ({error}).\n"
                "With FASTSR_BUILD=0 in the environment it installs without compiled operators, with FASTSR_CUDA=0 "
                "without those for CUDA."
            ) from error
        finally:
            fresh.unlink(missing_ok=True)

    def _run_ninja(self, objects, commands) -> None:
        def text(words) -> str:
            return shlex.join(map(str, words)).replace("$", "$$")

        def path(p) -> str:
            return str(p).replace("$", "$$").replace(" ", "$ ").replace(":", "$:")

        lines = ["rule cxx\n  command = $words -MMD -MF $out.d -c $in -o $out\n  depfile = $out.d\n  deps = gcc"]
        for target, (source, words) in commands.items():
            lines.append(f"build {path(target)}: cxx {path(source)}\n  words = {text(words)}")
        (objects / "build.ninja").write_text("\n".join(lines) + "\n")
        self._run(["ninja", "-C", str(objects)])

    def _run(self, command: list[str]) -> None:
        print(shlex.join(command), flush=True)
        subprocess.run(command, check=True)


class Wheel(bdist_wheel):
    def get_tag(self) -> tuple[str, str, str]:
        _, _, platform = super().get_tag()
        return "py3", "none", platform


reason = python_only_because()
if reason is not None:
    print(f"fastsr: installing Python only, without compiled operators: {reason}", file=sys.stderr)

sources = sorted(str(p.relative_to(ROOT)) for p in (ROOT / "csrc" / "cpu").rglob("*.cpp"))
if platform.machine().lower() not in ("x86_64", "amd64"):  # the library then says that it has no kernels
    sources = [source for source in sources if level_flags(source) is None]
extensions = [Extension("fastsr._C", sources)]
if reason is None:
    no_cuda = no_cuda_because()
    if no_cuda is None:
        extensions.append(Extension(CUDA_LIBRARY, cuda_sources()))
    else:
        print(f"fastsr: leaving out the CUDA kernels: {no_cuda}", file=sys.stderr)
setup(
    packages=[*find_packages(include=["fastsr", "fastsr.*"]), "fastsr.kernels"],
    package_dir={"fastsr.kernels": "kernels"},  # a top-level `kernels` would shadow the published package of that name
    ext_modules=[] if reason is not None else extensions,
    cmdclass={"build_ext": BuildLibrary, "bdist_wheel": Wheel},
)
