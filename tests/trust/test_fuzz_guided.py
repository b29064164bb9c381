"""The nightly form of the fuzz tests: guided by coverage, ``LOSSPLUG_FUZZ_SECONDS`` per reader (default: 20)."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest
from test_fuzz_readers import READERS

SECONDS = int(os.environ.get("LOSSPLUG_FUZZ_SECONDS", "20"))


@pytest.mark.slow
@pytest.mark.timeout(2 * SECONDS + 300)
@pytest.mark.skipif(
    importlib.util.find_spec("atheris") is None, reason="needs the package atheris (pip install atheris)"
)
@pytest.mark.parametrize("reader", [*READERS, "recipe"])
def test_no_input_does_more_than_a_line(reader, tmp_path):
    script = Path(__file__).with_name("fuzz_guided.py")
    command = [sys.executable, str(script), reader, str(tmp_path / "corpus"), f"-max_total_time={SECONDS}"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]
    print(next(line for line in reversed(done.stderr.splitlines()) if line.startswith("Done")))
