"""The README's code runs as printed."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
BLOCKS = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.S)


def test_the_ten_lines_of_the_first_use_run(tmp_path, monkeypatch):
    block = next(block for block in BLOCKS if "class Yours" in block)
    monkeypatch.chdir(tmp_path)
    names: dict = {}
    exec(block, names)
    from lightning_lossplug.surgery import plugged_layers

    assert names["Yours"] is not None
    assert not list(plugged_layers(names["Yours"]()))


@pytest.mark.parametrize("block", BLOCKS, ids=range(len(BLOCKS)))
def test_every_block_is_python(block):
    compile(block, "README.md", "exec")


def test_the_test_line_is_where_ci_reads_it():
    text = (ROOT / "README.md").read_text()
    after = text.split("<!-- test line -->")[1]
    assert after.lstrip().startswith("```sh\npip install -e")
