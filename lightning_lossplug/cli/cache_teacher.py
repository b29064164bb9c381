"""``lossplug cache-teacher``: runs a teacher once over training data and stores its logits."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from lightning_lossplug.cli.arguments import new_parser, positive_int
from lightning_lossplug.cli.evaluate import check_device, parse_data, split_data
from lightning_lossplug.cli.output import bytes_text, console, plain, progress, require_writable, table, to_json
from lightning_lossplug.errors import LossplugError, require

EPILOG = """examples:
  lossplug cache-teacher checkpoint:big.ckpt --data DigitsData -o teacher
  lossplug cache-teacher hf:./big --data TextData --data.tokenizer ./big --top-k 64 -o teacher

The same command goes on where a killed one was. Then, in any order and for any number of epochs:
  Distillation("cache:teacher"), and with --top-k: Distillation("cache:teacher", "topk_logits")"""


def run(arguments: list[str]) -> None:
    """Stores logits, prints what they are and how large.

    Raises:
        LossplugError: A teacher or data that can't be read, NaN logits, a folder that holds something else.
    """
    parser = new_parser("cache-teacher", "Logits of a teacher for all training samples, on disk.", EPILOG)
    parser.add_argument("teacher", help="KIND:NAME as in Distillation; lossplug list teachers")
    parser.add_argument("--data", metavar="NAME", help="data module and, as --data.KEY VALUE, its arguments")
    parser.add_argument("--output", "-o", type=Path, required=True, metavar="DIR", help="folder for the logits")
    parser.add_argument("--top-k", type=positive_int, metavar="K", help="store the K largest per row, for vocabularies")
    parser.add_argument("--dtype", help="float32 (default of all logits) or float16 (default with --top-k)")
    parser.add_argument("--shard-mb", type=positive_int, default=256, metavar="MB", help="size of a file (256)")
    parser.add_argument(
        "--option", action="append", default=[], metavar="KEY=VALUE", help="argument of the teacher, num_classes=10 say"
    )
    parser.add_argument("--device", default="cpu", help="cpu (default) or cuda")
    parser.add_argument("--json", action="store_true", help="print the summary as JSON instead of a table")
    data_arguments, rest = split_data(arguments)
    options = parser.parse_args(rest)
    for package in ("lightning", "safetensors"):
        require(package, "lightning", "lossplug cache-teacher")
    if not data_arguments:
        raise LossplugError("there is no data to run the teacher on", remedy="Add --data NAME (lossplug list data)")
    if options.output.exists() and not options.output.is_dir():
        raise LossplugError("is no folder", where=str(options.output), remedy="Choose another --output")
    nearest = next(p for p in (options.output.absolute(), *options.output.absolute().parents) if p.is_dir())
    require_writable(nearest / "teacher_cache.json")
    check_device(options.device)
    from lightning_lossplug.cli.quiet import lightning_output

    with lightning_output():
        manifest = store(options, data_arguments)
    if options.json:
        print(to_json(manifest))
    else:
        _print(manifest, options.output)


def teacher_options(pairs: list[str]) -> dict[str, Any]:
    """Returns the teacher's arguments: values are JSON where they can be, else text.

    Raises:
        LossplugError: One has no ``=``.
    """
    found: dict[str, Any] = {}
    for pair in pairs:
        key, equals, text = pair.partition("=")
        if not equals:
            raise LossplugError(f"--option {pair!r} has no '='", remedy="Write KEY=VALUE")
        try:
            found[key] = json.loads(text)
        except ValueError:
            found[key] = text
    return found


def store(options: Any, data_arguments: list[str]) -> dict[str, Any]:
    """Runs the teacher over the training split in order; returns the manifest."""
    from torch.utils.data import DataLoader

    from lightning_lossplug.callbacks.distillation_base import named_teacher
    from lightning_lossplug.distillation import cache_teacher

    data = parse_data(data_arguments)
    teacher = named_teacher(options.teacher, teacher_options(options.option), "cache-teacher")
    data.prepare_data()
    data.setup("fit")
    loader = data.train_dataloader()
    in_order: DataLoader[Any] = DataLoader(loader.dataset, loader.batch_size, collate_fn=loader.collate_fn)
    with progress() as bar:
        return cache_teacher(
            teacher,
            bar.track(in_order, total=len(in_order), description="caching"),
            options.output,
            k=options.top_k,
            dtype=options.dtype,
            shard_mb=options.shard_mb,
            device=options.device,
        )


def _print(manifest: dict[str, Any], folder: Path) -> None:
    k, classes = manifest["k"], manifest["classes"]
    rows = [
        ("teacher", manifest["teacher"]),
        ("data", manifest["data"]),
        ("samples", f"{manifest['samples']:,}"),
        ("rows", f"{manifest['rows']:,}"),
        ("stored per row", f"{classes} logits" if k is None else f"{k} of {classes} log-probabilities, and the rest"),
        ("size", bytes_text(sum(shard["bytes"] for shard in manifest["shards"]))),
        ("files", f"{len(manifest['shards'])}"),
    ]
    out = console()
    out.print(table(f"teacher logits in {plain(str(folder))}", ["", ""], rows))
    loss = "" if k is None else ', "topk_logits"'
    out.print(f'  Distillation("cache:{folder}"{loss})', soft_wrap=True, markup=False)
