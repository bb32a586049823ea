"""What installing gives: the wheel with and without a compiler, the compiled library, and a quiet import."""

import os
import platform
import re
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

import fastsr
from fastsr import _library
from fastsr.info import info
from fastsr.op import OPS

ROOT = Path(__file__).resolve().parents[1]
LIBRARY = Path(fastsr.__file__).with_name("_C.so")


def _wheel(folder: Path, **environment: str) -> tuple[str, list[str], str]:
    """Builds a wheel from a copy of the sources; returns its file name, the files inside, and what was printed."""
    source = folder / "source"
    for name in ("csrc", "fastsr", "kernels"):
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__", "*.so"))
    for name in ("setup.py", "pyproject.toml", "MANIFEST.in", "LICENSE", "README.md"):
        shutil.copy(ROOT / name, source)
    command = [sys.executable, "-m", "pip", "wheel", "-v", "--no-deps", "--no-build-isolation", "-w", folder, source]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | environment)
    assert done.returncode == 0, done.stdout + done.stderr
    (path,) = folder.glob("*.whl")
    return path.name, zipfile.ZipFile(path).namelist(), done.stdout + done.stderr


@pytest.fixture(scope="module")
def setuptools():
    return pytest.importorskip("setuptools", minversion="77")


def test_an_isolated_build_fetches_no_torch_and_no_flag_depends_on_the_machine():
    requires = re.search(r"^requires = \[(.*)\]", (ROOT / "pyproject.toml").read_text(), re.MULTILINE)
    assert requires is not None and "torch" not in requires[1]
    assert "-march=native" not in (ROOT / "setup.py").read_text()


@pytest.mark.parametrize(
    ("environment", "reason"),
    [
        ({"FASTSR_BUILD": "0"}, "FASTSR_BUILD=0"),
        ({"PATH": "", "CXX": ""}, "no C++ compiler was found"),
        ({"CXX": "no-such-compiler"}, "no C++ compiler was found"),
        ({"TORCH_DIR": "no-such-folder"}, "the torch in no-such-folder has no stable ABI headers"),
    ],
)
def test_without_a_compiler_the_wheel_is_python_only_and_says_why(tmp_path, setuptools, environment, reason):
    name, files, printed = _wheel(tmp_path, **environment)
    assert name.endswith("-py3-none-any.whl")
    assert f"without compiled operators: {reason}" in printed
    assert not [f for f in files if f.endswith(".so")]
    for expected in ("fastsr/op.py", "fastsr/py.typed", "fastsr/models/carn.py", "fastsr/kernels/__init__.py"):
        assert expected in files
    packages = {f.split("/")[0] for f in files}
    assert packages == {"fastsr", next(p for p in packages if p.endswith(".dist-info"))}


@pytest.fixture(scope="module")
def compiled(tmp_path_factory, setuptools) -> Path:
    """A wheel with compiled operators of the CPU, built against the torch of the tests."""
    if not sys.platform.startswith("linux") or shutil.which("g++") is None:
        pytest.skip("needs g++ on Linux")
    folder = tmp_path_factory.mktemp("wheel")
    compiler = folder / "c++"  # as the real one, but without optimisation, which takes minutes
    compiler.write_text('#!/bin/sh\nfor a do shift; [ "$a" = -O3 ] && a=-O0; set -- "$@" "$a"; done; exec g++ "$@"\n')
    compiler.chmod(0o755)
    name, files, printed = _wheel(folder, CXX=str(compiler), FASTSR_CUDA="0")
    assert "fastsr/_C.so" in files, printed
    return folder / name


def test_one_wheel_serves_every_python(compiled):
    assert "-py3-none-linux" in compiled.name


ELSEWHERE = """
import sys
import torch, fastsr
from fastsr import _cuda_engine, _library
from fastsr.op import OPS
assert fastsr.__file__.startswith(sys.argv[1]), fastsr.__file__
assert _library.load() is None, _library.load()
torch.manual_seed(0)
def make(*shape):
    t = torch.randn(shape)
    return t.to(memory_format=torch.channels_last) / max(1, t[0].numel()) ** 0.5 if t.dim() == 4 else t
for name in ("conv_act", "rcab", "dense_block"):
    args = list(OPS[name].samples_of(make))[-1]
    with fastsr.use("cpu"):
        made = OPS[name](*args)
    error = (made - OPS[name].eager(*OPS[name]._bind(args))).abs().max().item()
    assert error < 1e-4, (name, error)
    print(name, error)
if sys.argv[2]:
    torch.ops.load_library(sys.argv[2])
    print("_cuda.so", list(torch.ops.fastsr_cuda.struct_sizes()), torch.ops.fastsr_cuda.has_sm90())
"""


def test_the_wheel_works_with_another_torch(compiled, tmp_path):
    """And with another Python: FASTSR_OTHER_PYTHON names one that has a torch, NumPy, safetensors and Pillow."""
    other = os.environ.get("FASTSR_OTHER_PYTHON")
    if not other:
        pytest.skip("FASTSR_OTHER_PYTHON names no other Python with a torch of its own")
    install = [other, "-m", "pip", "install", "-q", "--no-deps", "--no-index", "--target", tmp_path, compiled]
    subprocess.run(install, check=True)
    kept = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    asked = [other, "-c", "import sys, torch; print(torch.__version__, sys.version.split()[0])"]
    version = subprocess.run(asked, capture_output=True, text=True, env=kept, check=True).stdout.strip()
    cuda = LIBRARY.with_name("_cuda.so")
    command = [
        other,
        "-W",
        "error::DeprecationWarning:fastsr",
        "-c",
        ELSEWHERE,
        tmp_path,
        cuda if cuda.is_file() else "",
    ]
    environment = kept | {"PYTHONPATH": str(tmp_path)}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    print(f"built with torch {torch.__version__}, run with torch and Python {version}:\n{done.stdout}")


def test_the_library_needs_nothing_of_libtorch_but_its_stable_abi():
    if not LIBRARY.is_file():
        pytest.skip(_library.load())
    if shutil.which("nm") is None:
        pytest.skip("needs nm")
    done = subprocess.run(["nm", "-DC", "--undefined-only", LIBRARY], capture_output=True, text=True, check=True)
    names = [line.split(maxsplit=1)[1] for line in done.stdout.splitlines()]
    assert any(n.startswith("aoti_torch_") for n in names)
    assert not [n for n in names if "at::" in n or "c10::" in n or "torch::" in n]


def test_the_library_knows_the_processor():
    if _library.load() is not None:
        pytest.skip(_library.load())
    levels = [torch.ops.fastsr_cpu.isa_name(level) for level in range(4)]
    assert levels == ["baseline", "avx2", "avx512", "avx512_bf16"]
    flags = set(Path("/proc/cpuinfo").read_text().split("\nflags", 1)[-1].split("\n", 1)[0].split())
    expected = "baseline"
    if {"avx2", "fma", "f16c"} <= flags:
        expected = "avx2"
        if {"avx512f", "avx512cd", "avx512bw", "avx512dq", "avx512vl", "bmi1", "bmi2"} <= flags:
            expected = "avx512_bf16" if "avx512_bf16" in flags else "avx512"
    assert _library.offered_isa() == expected
    assert _library.isa() == os.environ.get("FASTSR_CPU_ISA", expected)
    with pytest.raises(RuntimeError, match="isa_name: argument 'level': expected a level from 0 to 3, got 4"):
        torch.ops.fastsr_cpu.isa_name(4)


def _level_in(wanted: str) -> list[str]:
    """The level in use, why there is none, and the processor's line of the report, where the environment asks so."""
    code = """
from fastsr import _library, info
print(_library.isa(), _library.load(), next(l for l in info.info().splitlines() if l.startswith("cpu ")), sep="\\n")
"""
    environment = os.environ | {"FASTSR_CPU_ISA": wanted, "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, check=True)
    return done.stdout.splitlines()


def test_the_environment_chooses_a_level():
    if _library.load() is not None:
        pytest.skip(_library.load())
    offered = _library.offered_isa()
    levels = ["baseline", "avx2", "avx512", "avx512_bf16"]
    for level in {"baseline", offered}:
        isa, problem, line = _level_in(level)
        assert (isa, problem) == (level, "None")
        assert f"instruction set: {level} by FASTSR_CPU_ISA, of {offered}" in line
    for level in levels[levels.index(offered) + 1 :]:
        expected = f"FASTSR_CPU_ISA asks for {level}, but this processor or operating system offers {offered}"
        assert _level_in(level)[:2] == ["None", expected]
    isa, problem, line = _level_in("avx1024")
    expected = "FASTSR_CPU_ISA: expected one of baseline, avx2, avx512, avx512_bf16, got 'avx1024'"
    assert (isa, problem) == ("None", expected) and "torch says" in line


BMI = re.compile(r"andn|bextr|blsi|blsmsk|blsr|bzhi|mulx|pdep|pext|rorx|sarx|shlx|shrx|lzcnt|popcnt")
BEYOND = {  # what code of a level may not hold: mnemonics, and registers
    "": (re.compile(rf"v|{BMI.pattern}"), re.compile(r"%[yz]mm|%k[0-7]")),
    "avx2": (BMI, re.compile(r"%zmm|%k[0-7]|%[xy]mm(1[6-9]|[23]\d)")),
    "avx512": (re.compile(r"vdpbf16|vcvtneps|vcvtne2ps"), re.compile(r"%tmm")),
    "avx512_bf16": (re.compile(r"tdp|vpdp"), re.compile(r"%tmm")),
}


def test_no_instruction_is_outside_the_level_of_its_file():
    if not LIBRARY.is_file():
        pytest.skip(_library.load())
    if shutil.which("objdump") is None:
        pytest.skip("needs objdump")
    if platform.machine() != "x86_64":
        pytest.skip(f"no kernels are written for {platform.machine()}")

    def objdump(*options: str) -> Iterator[str]:
        with subprocess.Popen(["objdump", *options, LIBRARY], stdout=subprocess.PIPE, text=True) as process:
            assert process.stdout is not None
            yield from process.stdout
        assert process.returncode == 0

    # Local symbols follow the name of their file; code that several files may share follows an empty name.
    files, file = {}, ""
    for line in objdump("-t"):
        words = line.split()
        if " df *ABS*" in line:
            file = words[5] if len(words) > 5 else ""
        elif len(words) > 4 and words[1:4] == ["l", "F", ".text"]:
            files[words[0]] = file
    if "features.cpp" not in files.values():
        pytest.skip("the library has been stripped of the names of its files")
    counts: dict[str, int] = dict.fromkeys(BEYOND, 0)
    level, function, wrong = "", "", []
    for line in objdump("-d", "-j", ".text", "--no-show-raw-insn"):
        if line.endswith(">:\n"):
            address, function = line.split(maxsplit=1)
            stem = files.get(address, "").removesuffix(".cpp")
            level = next((name for name in BEYOND if name and stem.endswith(f"_{name}")), "")
        elif line.startswith(" ") and "\t" in line:
            instruction = line.split("\t", 1)[1]
            mnemonics, registers = BEYOND[level]
            counts[level] += 1
            if mnemonics.match(instruction) or registers.search(instruction):
                wrong.append(f"{level or 'baseline'}: {instruction.strip()} in {function.strip()}")
    assert not wrong, wrong[:20]
    assert all(count > 1000 for count in counts.values()), counts


def test_a_library_that_does_not_load_is_a_reason_not_a_crash(tmp_path, monkeypatch):
    monkeypatch.setattr(_library, "_PATH", tmp_path / "_C.so")
    load = _library.load.__wrapped__  # without the memory of what was found before
    assert "was not built" in load()
    (tmp_path / "_C.so").write_bytes(b"no library")
    assert "does not load" in load()


@pytest.mark.parametrize("version", ["2.10.1", "1.13.0+cpu"])
def test_an_old_torch_is_refused(monkeypatch, version):
    monkeypatch.setattr(torch, "__version__", version)
    with pytest.raises(ImportError, match=rf"torch 2\.11 or newer, but this is torch {version.split('+')[0]}"):
        _library.require_torch()


@pytest.mark.parametrize("version", ["2.11.0", "2.13.0+cpu", "3.0.0a0+git1234"])
def test_a_new_torch_is_accepted(monkeypatch, version):
    monkeypatch.setattr(torch, "__version__", version)
    _library.require_torch()


def test_import_prints_nothing_and_loads_no_kernels():
    code = "import sys, torch, fastsr; print(hasattr(torch.ops.fastsr_cpu, 'isa'), 'fastsr.kernels' in sys.modules)"
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment)
    assert (done.returncode, done.stdout, done.stderr) == (0, "False False\n", "")


def test_info_names_everything():
    lines = info().splitlines()
    for part in ("fastsr", "python", "torch", "triton", "numpy", "cpu", "_C.so"):
        assert any(line.startswith(part) for line in lines), part
    for name in OPS:
        assert any(line.split()[:1] == [name] and "eager" in line for line in lines), name
    done = subprocess.run([sys.executable, "-m", "fastsr.info"], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0 and done.stdout.startswith("fastsr") and not done.stderr
