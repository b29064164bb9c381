"""What ``import lightning_lossplug`` adds to ``import torch``, in seconds: median of fresh processes.

Run: python tests/benchmarks/bench_import.py [--limit 0.3]
"""

import argparse
import statistics
import subprocess
import sys

PROBE = """
import time, torch
start = time.perf_counter()
import lightning_lossplug
print(time.perf_counter() - start)
import sys
loaded = {m.split('.')[0] for m in sys.modules}
extra = loaded & {'lightning', 'pytorch_lightning', 'timm', 'transformers', 'torchmetrics', 'rich', 'matplotlib'}
assert not extra, f'imported with the package: {sorted(extra)}'
"""


def main() -> int:
    """Measures, prints, and fails above the limit."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--limit", type=float, default=None, help="seconds; exit 1 above it")
    arguments = parser.parse_args()
    command = [sys.executable, "-c", PROBE]
    seconds = [
        float(subprocess.run(command, check=True, capture_output=True, text=True).stdout) for _ in range(arguments.runs)
    ]
    median = statistics.median(seconds)
    print(f"import lightning_lossplug after torch: median {median:.4f} s of {arguments.runs} processes")
    return int(arguments.limit is not None and median > arguments.limit)


if __name__ == "__main__":
    raise SystemExit(main())
