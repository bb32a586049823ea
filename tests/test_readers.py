"""README's table of formats is the readers' own, and what they say of themselves holds."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from fastsr.checkpoints import FORMATS
from fastsr.checkpoints.__main__ import table
from fastsr.models import NETWORKS

README = Path(__file__).resolve().parents[1] / "README.md"


def test_readme_holds_the_generated_table():
    _, begin, rest = README.read_text().partition("<!-- formats -->\n")
    shown, end, _ = rest.partition("\n<!-- /formats -->")
    assert begin and end, "README has no <!-- formats --> ... <!-- /formats -->"
    assert shown == table(), "README's table is old; put the output of `python -m fastsr.checkpoints` there"


def test_the_command_prints_the_table():
    made = subprocess.run([sys.executable, "-m", "fastsr.checkpoints"], capture_output=True, text=True, check=True)
    assert made.stdout == table() + "\n"


@pytest.mark.parametrize("reader", FORMATS, ids=lambda reader: reader.__name__.rpartition(".")[2])
def test_readers_describe_themselves(reader):
    assert reader.DESCRIPTION and "|" not in reader.DESCRIPTION + reader.SEEN
    assert set(reader.NETWORKS) <= {network.name for network in NETWORKS} | {"all"}
    assert all(ending == ending.lower() and ending.startswith(".") for ending in reader.ENDINGS)
    assert "real file" in reader.SEEN


def test_every_ending_is_one_readers():
    endings = [ending for reader in FORMATS for ending in reader.ENDINGS]
    assert len(endings) == len(set(endings))
