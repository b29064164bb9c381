"""Loading a timm folder in a process that can't import this package."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from torch import Tensor

from lightning_lossplug.errors import LossplugError
from lightning_lossplug.export.dense import write_safetensors

# Runs isolated (-I: no PYTHONPATH, no script folder). The finder makes an installed copy of the package unimportable.
SCRIPT = """
import importlib.abc, json, sys

class Blocker(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "lightning_lossplug":
            raise ImportError("blocked: " + name)

sys.meta_path.insert(0, Blocker())
try:
    import lightning_lossplug
except ImportError:
    pass
else:
    sys.exit("the package could be imported")
import safetensors.torch, timm, torch
folder, probe = sys.argv[1:]
probe = safetensors.torch.load_file(probe)
model = timm.create_model("local-dir:" + folder, pretrained=True).eval()
weights = safetensors.torch.load_file(folder + "/model.safetensors")
model.load_state_dict(weights, strict=True)
with torch.inference_mode():
    logits = model(probe["x"])
print(json.dumps({
    "max_difference": float((logits - probe["logits"]).abs().max()),
    "accuracy": float((logits.argmax(1) == probe["y"]).float().mean()),
    "tensors": len(weights),
}))
"""


def load_elsewhere(folder: Path, x: Tensor, y: Tensor, logits: Tensor) -> dict[str, Any]:
    """Loads a timm folder strictly in another process without this package, and compares its logits.

    Args:
        folder: The artifact.
        x: Images.
        y: Their classes.
        logits: What the folded network here gives for them.

    Returns:
        ``max_difference`` of the logits, ``accuracy`` on the images, ``tensors`` that were loaded.

    Raises:
        LossplugError: It doesn't load.
    """
    with tempfile.TemporaryDirectory() as scratch:
        probe = Path(scratch) / "probe.safetensors"
        write_safetensors({"x": x.contiguous(), "y": y.contiguous(), "logits": logits.contiguous()}, probe)
        command = [sys.executable, "-I", "-c", SCRIPT, str(folder), str(probe)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        reason = (done.stderr.strip().splitlines() or ["no message"])[-1]
        raise LossplugError(f"the artifact doesn't load without this package: {reason}", where=str(folder))
    return json.loads(done.stdout.strip().splitlines()[-1])
