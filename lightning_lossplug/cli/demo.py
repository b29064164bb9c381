"""``lossplug demo``: the main job in under three minutes, on data that needs no download."""

from __future__ import annotations

import logging
import platform
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lightning_lossplug.cli.arguments import new_parser, positive_int
from lightning_lossplug.cli.output import bytes_text, console, progress, table, to_json, write_text
from lightning_lossplug.errors import LossplugError, require

if TYPE_CHECKING:
    from lightning_lossplug.cli.demo_runs import Outcome

RESULTS, PICTURE, ARTIFACT = "results.json", "comparison.png", "artifact"


def run(arguments: list[str]) -> None:
    """Trains dense and compressed, compares, exports.

    Raises:
        LossplugError: A missing optional package, or an output folder that can't be written.
    """
    parser = new_parser(
        "demo",
        "Train a small timm vision transformer on scikit-learn's digits: dense, 2:4 and 1:16; compare and export.",
    )
    parser.add_argument(
        "--output", "-o", type=Path, default=Path("lossplug_demo"), metavar="DIR", help="default: lossplug_demo"
    )
    parser.add_argument("--epochs", type=positive_int, default=25, help="passes over the data per run (25)")
    parser.add_argument("--seed", type=int, default=0, help="of weights, data order and split (0)")
    options = parser.parse_args(arguments)
    for package, extra in (("lightning", "lightning"), ("timm", "timm"), ("sklearn", "vision"), ("matplotlib", "cli")):
        require(package, extra, "lossplug demo")
    from lightning_lossplug.cli.quiet import lightning_output
    from lightning_lossplug.cli.run_folder import require_folder

    output = options.output
    if output.exists() and not output.is_dir():
        raise LossplugError("is no folder", where=str(output), remedy="Choose another --output")
    if output.is_dir() and any(output.iterdir()) and not (output / RESULTS).is_file():
        raise LossplugError("the folder holds other files", where=str(output), remedy="Choose another --output")
    require_folder(output.absolute())
    started = time.perf_counter()
    with lightning_output(logging.ERROR):
        outcomes = _train(options)
        output.mkdir(parents=True, exist_ok=True)
        loaded = _export(outcomes[-1], output / ARTIFACT)
    _finish(outcomes, loaded, options, started)


def _train(options: Any) -> list[Outcome]:
    from lightning_lossplug.cli.demo_runs import VARIANTS, train

    outcomes = []
    with progress() as bar:
        for variant in VARIANTS:
            task = bar.add_task(f"{variant.name:<18}", total=None)

            def report(
                step: int, total: int, accuracy: float | None, task: Any = task, name: str = variant.name
            ) -> None:
                shown = f"{name:<18}" + ("" if accuracy is None else f" accuracy {accuracy:6.1%}")
                bar.update(task, completed=step, total=total, description=shown)

            outcomes.append(
                train(variant, epochs=options.epochs, seed=options.seed, root=options.output, report=report)
            )
    return outcomes


def _export(outcome: Outcome, folder: Path) -> dict[str, Any]:
    """Exports a run for timm and loads it in a process without this package."""
    import torch

    from lightning_lossplug.cli.foreign_load import load_elsewhere
    from lightning_lossplug.integrations import DigitsData
    from lightning_lossplug.integrations.artifact import export_artifact
    from lightning_lossplug.surgery import fold

    data = DigitsData(batch_size=512, seed=0)
    data.setup("test")
    preprocessing = {"mean": [data.mean], "std": [data.std], "crop_pct": 1.0, "interpolation": "bilinear"}
    export_artifact(
        outcome.module,
        folder,
        techniques=outcome.techniques,
        overwrite=True,
        data_config=preprocessing,
        source="lossplug demo",
    )
    x, y = next(iter(data.test_dataloader()))
    with torch.inference_mode():
        logits = fold(outcome.module)(x)
    return load_elsewhere(folder, x, y, logits)


def _finish(outcomes: Sequence[Outcome], loaded: dict[str, Any], options: Any, started: float) -> None:
    import torch

    from lightning_lossplug.cli.demo_plot import draw

    output = options.output
    threads, machine = torch.get_num_threads(), platform.machine()
    title = f"timm vision transformer on scikit-learn's digits, {options.epochs} epochs, seed {options.seed}"
    draw(outcomes, output / PICTURE, title)
    seconds = time.perf_counter() - started
    results = {
        "command": "demo",
        "epochs": options.epochs,
        "seed": options.seed,
        "seconds": round(seconds, 1),
        "threads": threads,
        "machine": machine,
        "torch": torch.__version__,
        "runs": [_record(outcome, outcomes[0]) for outcome in outcomes],
        "artifact": {"folder": ARTIFACT, "run": outcomes[-1].variant.name, "loaded_without_package": loaded},
    }
    write_text(output / RESULTS, to_json(results) + "\n")
    columns = ["run", "test accuracy", "calibration error", "zeros, all weights", "nominal size", "time", "step"]
    rows = []
    for record in results["runs"]:
        rows.append(
            (
                record["name"],
                f"{record['accuracy']:.1%}",
                f"{record['calibration_error']:.3f}",
                f"{record['sparsity']:.1%}",
                f"{bytes_text(record['nominal_bytes'])} ({record['nominal_bytes'] / record['bytes']:.0%})",
                f"{record['seconds']:.1f} s",
                f"x {record['step_ratio']:.2f}",
            )
        )
    out = console()
    out.print(table(title, columns, rows, right=columns[1:]))
    for outcome in outcomes[1:]:
        out.print(f"[dim]{outcome.variant.name + ':':<18} {outcome.variant.code}[/dim]")
    out.print()
    out.print(f"picture   {output / PICTURE}\nnumbers   {output / RESULTS}", markup=False, soft_wrap=True)
    out.print(
        f"artifact  {output / ARTIFACT} ({outcomes[-1].variant.name})\n"
        "          loaded by timm in a process that can't import this package: "
        f"{loaded['tensors']} tensors, strict keys, largest difference of the logits {loaded['max_difference']:.1g}",
        markup=False,
        soft_wrap=True,
    )
    out.print(f"[dim]{seconds:.0f} s on {threads} threads[/dim]")


def _record(outcome: Outcome, dense: Outcome) -> dict[str, Any]:
    return {
        "name": outcome.variant.name,
        "callbacks": outcome.variant.code,
        **outcome.metrics,
        **outcome.numbers,
        "seconds": round(outcome.seconds, 2),
        "step_ms": round(outcome.step_ms, 3),
        "step_ratio": round(outcome.step_ms / dense.step_ms, 3),
        "layers": outcome.layers,
        "curves": outcome.curves,
    }
