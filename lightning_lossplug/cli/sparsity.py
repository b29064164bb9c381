"""``lossplug sparsity``: zeros and patterns layer by layer, and what 2:4 kernels can use of them."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from lightning_lossplug.cli.arguments import new_parser
from lightning_lossplug.cli.output import console, plain, table, to_json
from lightning_lossplug.errors import require

EPILOG = """examples:
  lossplug sparsity artifact/
  lossplug sparsity last.ckpt --dtype bfloat16 --backend cutlass --json"""


def run(arguments: list[str]) -> None:
    """Reports.

    Raises:
        LossplugError: Something that can't be read.
    """
    parser = new_parser(
        "sparsity", "Zeros per layer, N:M patterns, and which layers 2:4 kernels can use, or why not.", EPILOG
    )
    parser.add_argument("path", help="a Lightning checkpoint, or a folder for timm or transformers")
    parser.add_argument("--model", help="class of the module, if a checkpoint doesn't say: a short name or dotted path")
    parser.add_argument(
        "--dtype",
        choices=["own", "float16", "bfloat16", "float32"],
        default="float16",
        help="judge as if the weights were of this type (float16); own: as they are",
    )
    parser.add_argument(
        "--backend", choices=["cusparselt", "cutlass"], default="cusparselt", help="whose kernels (cusparselt)"
    )
    parser.add_argument("--json", action="store_true", help="print every layer as JSON instead of the table")
    options = parser.parse_args(arguments)
    require("lightning", "lightning", "lossplug sparsity")
    from lightning_lossplug.cli.quiet import lightning_output

    sys.path.insert(0, str(Path.cwd()))  # the class of a training script in this folder
    try:
        with lightning_output():
            report = _report(options)
    finally:
        sys.path.pop(0)
    if options.json:
        print(to_json({"path": options.path, **report.as_dict()}))
    else:
        _print(report, options)


def _report(options: Any) -> Any:
    import torch

    from lightning_lossplug.export.hardware import hardware_report
    from lightning_lossplug.integrations.evaluation import load_subject

    subject = load_subject(options.path, options.model)
    dtype = None if options.dtype == "own" else getattr(torch, options.dtype)
    return hardware_report(subject.network, dtype=dtype, backend=options.backend)


def _print(report: Any, options: Any) -> None:
    columns = ["layer", "kind", "shape", "zeros", "pattern", "2:4 kernel", "why not"]
    rows = [[plain(cell) for cell in row] for row in report.rows(compact=True)]
    out = console()
    out.print(table(plain(options.path), columns, rows, right=["zeros"]))
    out.print(
        f"{len(report.usable)} of {len(report.layers)} layers fit torch's 2:4 kernels "
        f"({report.backend}, {report.dtype or 'own dtype'}); dense kernels gain nothing from zeros"
    )
