"""Runs in parallel that a time-out cannot lose, the common options, and the tables.

A run is a dict of plain values that determines its result. Finished runs are written to ``--output`` one by one; the
same command again does only what is missing.
"""

import argparse
import functools
import json
import logging
import multiprocessing
import os
import statistics
import time
import traceback
import warnings
from pathlib import Path

import torch

TRIAL_SEED = 100


def parse(description, argv, epochs, extra=None, batch=256):
    """The options of every script; ``extra(parser)`` adds those of one."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--root", default=None, help="folder with the Fashion-MNIST files; default: Debian's package")
    parser.add_argument("--output", type=Path, required=True, help="JSON file of results, continued if it exists")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--epochs", type=int, default=epochs)
    parser.add_argument("--batch", type=int, default=batch)
    parser.add_argument(
        "--width", type=int, default=32, help="channels of the first convolution; a fourth of the Llama's"
    )
    parser.add_argument("--limit", type=int, default=None, help="samples of each split; default: all")
    parser.add_argument("--jobs", type=int, default=1, help="processes, on one GPU if there is one")
    parser.add_argument("--device", choices=["auto", "cpu", "cuda"], default="auto")
    if extra:
        extra(parser)
    arguments = parser.parse_args(argv)
    if arguments.device == "auto":
        arguments.device = "cuda" if torch.cuda.is_available() else "cpu"
    return arguments


def settings(arguments):
    """The options that belong to every run."""
    return {name: getattr(arguments, name) for name in ("epochs", "batch", "width", "limit")}


def key(run):
    return json.dumps(run, sort_keys=True)


def prepare(threads):
    """Quiet, and no more threads than the processes together have cores."""
    warnings.filterwarnings("ignore")
    for name in ("lightning.pytorch", "lightning.pytorch.utilities.rank_zero", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.ERROR)
    torch.set_num_threads(threads)
    torch.set_float32_matmul_precision("high")
    torch.backends.cudnn.benchmark = True


@functools.cache
def processes(jobs):
    """The pool, kept for all rounds of a script: a process takes many seconds to import and to load the data."""
    threads = max(1, len(os.sched_getaffinity(0)) // jobs)
    return multiprocessing.get_context("spawn").Pool(jobs, prepare, (threads,))


def attempt(work, root, device, run):
    """One run with its seconds; an exception comes back as text, so that it stops no other run."""
    start = time.perf_counter()
    try:
        return {"run": run, "result": work(run, root, device), "seconds": time.perf_counter() - start}
    except Exception:
        return {"run": run, "error": traceback.format_exc()}


def run_all(work, runs, arguments):
    """Does the runs that ``--output`` lacks, writing each as it ends; returns ``{key(run): result}`` of all asked for.

    Raises:
        RuntimeError: Some run failed; the others are done and written.
    """
    path, start = arguments.output, time.perf_counter()
    records = json.loads(path.read_text()) if path.exists() else []
    known = {key(r["run"]) for r in records}
    todo = list({key(run): run for run in runs if key(run) not in known}.values())
    one, failed = functools.partial(attempt, work, arguments.root, arguments.device), []

    def keep(outcomes):
        for done, outcome in enumerate(outcomes, 1):
            took = f"[{done}/{len(todo)}, {time.perf_counter() - start:.0f} s]"
            if "error" in outcome:
                failed.append(outcome)
                print(f"{took} FAILED {key(outcome['run'])}\n{outcome['error']}", flush=True)
                continue
            records.append(outcome)
            part = path.with_suffix(".part")
            part.write_text("[\n" + ",\n".join(json.dumps(r) for r in records) + "\n]\n")
            part.replace(path)
            brief = {k: round(v, 4) for k, v in outcome["result"].items() if isinstance(v, float)}
            print(f"{took} {outcome['seconds']:.1f} s {key(outcome['run'])} -> {brief}", flush=True)

    path.parent.mkdir(parents=True, exist_ok=True)
    if arguments.jobs == 1:
        prepare(torch.get_num_threads())
        keep(map(one, todo))
    elif todo:
        keep(processes(arguments.jobs).imap_unordered(one, todo))
    if failed:
        raise RuntimeError(f"{len(failed)} of {len(todo)} runs failed")
    wanted = {key(run) for run in runs}
    return {key(r["run"]): r["result"] for r in records if key(r["run"]) in wanted}


def tune(work, grids, describe, arguments, score):
    """One trial per setting of every case, on a seed of its own; returns the setting of each with the best score."""
    trials = {case: [describe(case, setting, TRIAL_SEED) for setting in grid] for case, grid in grids.items()}
    results = run_all(work, [run for runs in trials.values() for run in runs], arguments)
    reached = {case: [results[key(run)][score] for run in runs] for case, runs in trials.items()}
    return {case: grids[case][scores.index(max(scores))] for case, scores in reached.items()}


def spread(values, scale=1.0, digits=2):
    """``median [min, max]``."""
    values = [scale * v for v in values]
    return f"{statistics.median(values):.{digits}f} [{min(values):.{digits}f}, {max(values):.{digits}f}]"


def show(title, header, rows, arguments):
    """Prints a markdown table and adds it to the file beside the JSON."""
    lines = [header, ["---"] * len(header), *rows]
    table = "\n".join("| " + " | ".join(map(str, line)) + " |" for line in lines)
    print(f"\n{title}\n\n{table}\n", flush=True)
    with arguments.output.with_suffix(".md").open("a") as file:
        file.write(f"\n{title}\n\n{table}\n")
