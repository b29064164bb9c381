"""Folders are written whole or not at all."""

import subprocess
import sys
from pathlib import Path

import pytest

from lightning_lossplug.errors import LossplugError
from lightning_lossplug.export import artifact_folder
from lightning_lossplug.export.folder import MANIFEST


def write(folder: Path, text: str, **options: bool) -> None:
    with artifact_folder(folder, **options) as stage:
        (stage / MANIFEST).write_text(text)
        (stage / "part").mkdir()
        (stage / "part" / "file").write_text(text)


def test_a_new_folder_appears_with_its_parents(tmp_path):
    write(tmp_path / "a" / "b" / "out", "one")
    assert (tmp_path / "a" / "b" / "out" / "part" / "file").read_text() == "one"
    assert [path.name for path in (tmp_path / "a" / "b").iterdir()] == ["out"]


def test_an_empty_folder_is_used(tmp_path):
    (tmp_path / "out").mkdir()
    write(tmp_path / "out", "one")
    assert (tmp_path / "out" / MANIFEST).read_text() == "one"


def test_overwrite_swaps_the_whole_folder(tmp_path):
    write(tmp_path / "out", "one")
    (tmp_path / "out" / "stale").write_text("")
    write(tmp_path / "out", "two", overwrite=True)
    assert {path.name for path in (tmp_path / "out").iterdir()} == {MANIFEST, "part"}
    assert (tmp_path / "out" / MANIFEST).read_text() == "two"
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_an_exception_leaves_what_was_there(tmp_path, error):
    write(tmp_path / "out", "one")

    def fail() -> None:
        with artifact_folder(tmp_path / "out", overwrite=True) as stage:
            (stage / MANIFEST).write_text("half")
            raise error

    with pytest.raises(error):
        fail()
    assert (tmp_path / "out" / MANIFEST).read_text() == "one"
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_an_exception_removes_the_parents_it_made(tmp_path):
    def fail() -> None:
        with artifact_folder(tmp_path / "a" / "out"):
            raise RuntimeError

    with pytest.raises(RuntimeError):
        fail()
    assert list(tmp_path.iterdir()) == []


def test_a_killed_process_leaves_what_was_there(tmp_path):
    write(tmp_path / "out", "one")
    code = (
        "import os, sys; from pathlib import Path; from lightning_lossplug.export import artifact_folder\n"
        f"with artifact_folder(Path({str(tmp_path / 'out')!r}), overwrite=True) as stage:\n"
        f"    (stage / {MANIFEST!r}).write_text('half'); os._exit(9)\n"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 9
    assert (tmp_path / "out" / MANIFEST).read_text() == "one"
    assert (tmp_path / "out" / "part" / "file").read_text() == "one"
    write(tmp_path / "out", "two", overwrite=True)
    assert (tmp_path / "out" / MANIFEST).read_text() == "two"


@pytest.mark.parametrize(
    ("name", "overwrite", "words"),
    [
        ("full", False, "not empty"),
        ("full", True, "no artifact"),
        ("file", True, "is no folder"),
        ("file/x", True, "written"),
    ],
)
def test_places_that_are_refused(tmp_path, name, overwrite, words):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis").write_text("keep")
    (tmp_path / "file").write_text("keep")
    with pytest.raises(LossplugError, match=words):
        write(tmp_path / name, "one", overwrite=overwrite)
    assert (tmp_path / "full" / "thesis").read_text() == (tmp_path / "file").read_text() == "keep"
    assert len(list(tmp_path.iterdir())) == 2
