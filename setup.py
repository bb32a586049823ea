"""Builds csrc/ into fastsr/_C.so; everything else about the package is in pyproject.toml.

The library uses the LibTorch stable ABI only, so one build serves every torch from 2.11 on and every Python: it carries
no Python tag, and torch is needed for its headers alone. Without a C++ compiler, or without torch in the target
environment, the package installs as Python only, says so, and every operator runs its eager definition.

FASTSR_BUILD=0   install Python only
CXX=...          the compiler (default: the first of g++, clang++, c++ on PATH)
TORCH_DIR=...    the folder of the torch package to take headers from
"""

from __future__ import annotations

import os
import shlex
import shutil
import site
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, find_packages, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).parent.resolve()
TORCH_TARGET = "0x020b000000000000"  # torch 2.11: nothing newer of the stable ABI is used
FLAGS = ["-O3", "-std=c++20", "-fPIC", "-fvisibility=hidden", "-Wall", "-Wextra", "-Wno-unused-parameter"]


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

    def build_extension(self, ext: Extension) -> None:
        cxx, torch = find_compiler(), find_torch()
        assert cxx is not None and torch is not None  # python_only_because() found both
        objects = Path(self.build_temp).resolve()
        library = Path(self.get_ext_fullpath(ext.name)).resolve()
        library.parent.mkdir(parents=True, exist_ok=True)
        includes = [f"-I{ROOT / 'csrc'}", f"-I{torch / 'include'}", f"-DTORCH_TARGET_VERSION={TORCH_TARGET}"]
        # Messages of torch's check macros carry the path of the source, or of torch's header.
        prefixes = [f"-ffile-prefix-map={ROOT}/=", f"-ffile-prefix-map={torch / 'include'}/="]
        compile_ = [*cxx, *FLAGS, *prefixes, *includes]
        # Named explicitly because torch's own libraries are loaded privately, out of reach for an unlinked symbol.
        libraries = [f"-L{torch / 'lib'}", "-Wl,--no-as-needed", "-ltorch_cpu"]

        pairs = [(ROOT / source, objects / (source.replace("/", "_") + ".o")) for source in ext.sources]
        objects.mkdir(parents=True, exist_ok=True)
        try:
            if shutil.which("ninja"):
                self._run_ninja(objects, pairs, library, compile_, [*cxx, "-shared"], libraries)
            else:
                for source, target in pairs:
                    self._run([*compile_, "-c", str(source), "-o", str(target)])
                self._run([*cxx, "-shared", "-o", str(library), *(str(target) for _, target in pairs), *libraries])
        except subprocess.CalledProcessError as error:
            raise SystemExit(
                f"fastsr: compiling csrc/ failed ({error}).\n"
                "With FASTSR_BUILD=0 in the environment it installs without compiled operators."
            ) from error

    def _run_ninja(self, objects, pairs, library, compile_, link, libraries) -> None:
        def text(words) -> str:
            return shlex.join(map(str, words)).replace("$", "$$")

        def path(p) -> str:
            return str(p).replace("$", "$$").replace(" ", "$ ").replace(":", "$:")

        lines = [
            f"rule cxx\n  command = {text(compile_)} -MMD -MF $out.d -c $in -o $out\n  depfile = $out.d\n  deps = gcc",
            f"rule link\n  command = {text(link)} -o $out $in {text(libraries)}",
            *(f"build {path(target)}: cxx {path(source)}" for source, target in pairs),
            f"build {path(library)}: link {' '.join(path(target) for _, target in pairs)}",
        ]
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
setup(
    packages=[*find_packages(include=["fastsr", "fastsr.*"]), "fastsr.kernels"],
    package_dir={"fastsr.kernels": "kernels"},  # a top-level `kernels` would shadow the published package of that name
    ext_modules=[] if reason is not None else [Extension("fastsr._C", sources)],
    cmdclass={"build_ext": BuildLibrary, "bdist_wheel": Wheel},
)
