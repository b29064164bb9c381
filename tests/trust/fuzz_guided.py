"""Coverage-guided fuzzing of everything that reads files from elsewhere; needs the package atheris.

``fuzz_guided.py READER FOLDER [libFuzzer options]`` feeds changed files to one reader of ``test_fuzz_readers.py``, or
to ``recipe``. A file's checksums are made right again, so that what lies behind them is reached. Anything but a value
or a one-line LossplugError is a finding: libFuzzer writes the input into the present folder and ends with an error.

    pip install atheris
    python tests/trust/fuzz_guided.py packed /tmp/corpus -max_total_time=300
"""

import json
import os
import struct
import sys
import tempfile
from pathlib import Path

import atheris

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests"), str(ROOT / "tests" / "trust")]
WATCHED = ["untrusted", "export", "distillation.cache_files", "distillation.teacher_cache", "kv_cache", "cli.recipe"]
WATCHED += ["integrations.packed", "integrations.kv_cache.double_sparsity", "callbacks.checkpoint", "quantization"]
with atheris.instrument_imports(include=[f"lightning_lossplug.{name}" for name in WATCHED] + ["yaml"]):
    from test_fuzz_readers import READERS, outcome
    from test_fuzz_recipes import VALID
    from test_fuzz_recipes import outcome as read_text

    from lightning_lossplug.untrusted import seal


def sealed(content: bytes) -> bytes:
    """JSON, or a safetensors file whose metadata hold JSON, with the checksum that its entries have now."""
    try:
        if content[:1] == b"{":
            plain = json.loads(content)
            plain.pop("sha256", None)
            return json.dumps(seal(plain)).encode()
        (length,) = struct.unpack("<Q", content[:8])
        header = json.loads(content[8 : 8 + length])
        texts = header["__metadata__"]
        for key, text in texts.items():
            if text[:1] == "{":
                plain = json.loads(text)
                plain.pop("sha256", None)
                texts[key] = json.dumps(seal(plain))
        new = json.dumps(header).encode()
        return struct.pack("<Q", len(new)) + new + content[8 + length :]
    except Exception:  # no longer of that form: fed as it is
        return content


def main() -> None:
    """Writes a valid file of every kind into the corpus and fuzzes."""
    name, corpus, *options = sys.argv[1:]
    place = Path(tempfile.mkdtemp())
    os.makedirs(corpus, exist_ok=True)
    if name == "recipe":
        for number, text in enumerate(VALID):
            (Path(corpus) / f"valid-{number}").write_text(text)

        def one(content: bytes) -> None:
            read_text(content, place, build=True)

    else:
        write, read = READERS[name]
        write(place / "valid")
        found = sorted(path for path in (place / "valid").rglob("*") if path.is_file())
        files = {path.relative_to(place / "valid").as_posix(): path.read_bytes() for path in found}
        names = sorted(files)
        for number, file in enumerate(names):  # the first byte says which file it is, and whether it is sealed
            for flag in (0, 128):
                (Path(corpus) / f"valid-{number}-{flag}").write_bytes(bytes([number | flag]) + files[file])

        def one(content: bytes) -> None:
            first, rest = (content[0], content[1:]) if content else (0, b"")
            file = names[first % 128 % len(names)]
            outcome({**files, file: sealed(rest) if first & 128 else rest}, read, place / "read")

    (place / "read").mkdir(exist_ok=True)
    atheris.Setup([sys.argv[0], corpus, "-rss_limit_mb=4096", "-timeout=30", *options], one)
    atheris.Fuzz()


if __name__ == "__main__":
    main()
