"""Fuzzes one reader of weight files for as long as you like, guided by coverage (needs `pip install atheris`).

    python tests/fuzz/fuzz_checkpoints.py READER CORPUS_FOLDER [-max_total_time=3600 and other options of libFuzzer]

READER is a module of fastsr.checkpoints (caffe, tensorflow, pytorch, ...). An empty or missing folder is filled with
the small files FILES of tests/test_fuzz_<READER>.py (pytorch: of test_fuzz_pickle.py). Anything but a mapping or a
CheckpointError is a finding: it is printed, and the file that led to it is left in the current folder as crash-*.
"""

from __future__ import annotations

import importlib
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path

import atheris

with atheris.instrument_imports(include=["fastsr.checkpoints"]):
    from fastsr.checkpoints.errors import CheckpointError

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

# Inputs that begin with 0xff are put inside a checksum, which would keep nearly all others out.
WRAPPED = {
    "npz": lambda data: importlib.import_module("pytorch_files").archive({"a.npy": data}),
    "pytorch": lambda data: importlib.import_module("pytorch_files").zipped(data, {"0": bytes(48)}),
    "tensorflow": lambda data: importlib.import_module("tensorflow_files").table([data]),
}
INSIDE = {"npz": "ARRAYS", "pytorch": "PROGRAMS"}  # what the tests damage inside of such


def main() -> None:
    reader, folder = sys.argv[1], Path(sys.argv[2])
    read = importlib.import_module(f"fastsr.checkpoints.{reader}").read
    folder.mkdir(parents=True, exist_ok=True)
    if not any(folder.iterdir()):
        tests = importlib.import_module(f"test_fuzz_{'pickle' if reader == 'pytorch' else reader}")
        inside = [b"\xff" + data for data in getattr(tests, INSIDE.get(reader, ""), [])]
        for i, data in enumerate([*tests.FILES, *inside]):
            (folder / f"seed-{i}").write_bytes(data)
    path = Path(tempfile.mkdtemp()) / "weights"

    def one(data: bytes) -> None:
        wrap = WRAPPED.get(reader)
        path.write_bytes(wrap(data[1:]) if wrap and data[:1] == b"\xff" else data)
        try:
            content = read(path)
        except CheckpointError:
            return
        assert isinstance(content, Mapping)

    atheris.Setup([sys.argv[0], str(folder), *sys.argv[3:]], one)
    atheris.Fuzz()


if __name__ == "__main__":
    main()
