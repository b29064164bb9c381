"""One pass of a model over all calibration batches at once, stopping at every layer.

Each batch runs in a thread of its own that waits in front of a layer until the others have arrived too; only one thread
works at any time. So a layer can be changed after its inputs are known and before its outputs are computed, in one
forward pass of the whole model, whatever its structure.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

Stop = tuple[str, dict[int, Tensor]]


class _Abandoned(BaseException):
    """Unwinds a thread whose pass is no longer wanted."""


class _Run(threading.Thread):
    def __init__(self, call: Callable[[], Any]) -> None:
        super().__init__(daemon=True)
        self.call = call
        self.turn, self.back = threading.Semaphore(0), threading.Semaphore(0)
        self.at: tuple[str, Tensor] | None = None
        self.error: BaseException | None = None
        self.abandoned = False

    def run(self) -> None:
        self.turn.acquire()
        try:
            if not self.abandoned:
                with torch.no_grad():  # the mode belongs to the thread
                    self.call()
        except _Abandoned:
            pass
        except BaseException as error:
            self.error = error
        self.at = None
        self.back.release()

    def pause(self, name: str, x: Tensor) -> None:
        """Called in the thread: hands the turn back and waits for the next."""
        self.at = (name, x)
        self.back.release()
        self.turn.acquire()
        if self.abandoned:
            raise _Abandoned

    def advance(self) -> None:
        """Called from outside: lets the thread work until its next layer or its end."""
        self.turn.release()
        self.back.acquire()
        if self.error is not None:
            raise self.error


def stream(
    model: nn.Module, layers: Mapping[str, nn.Module], batches: list[Any], forward: Callable[[nn.Module, Any], Any]
) -> Iterator[Stop]:
    """Yields ``(layer, {batch: input})`` in the order of the computation; a batch may leave a layer out.

    What the caller does to the layer between two steps is what the batches go on with. A layer that is called again in
    the same pass doesn't stop again. In front of different layers, the one that comes first in ``layers`` is next.

    Args:
        model: In eval mode.
        layers: Modules of the model by name, in its order.
        batches: Calibration batches.
        forward: Computes the model on a batch.
    """
    order = {name: i for i, name in enumerate(layers)}
    finished: set[str] = set()

    def hook(name: str) -> Callable[..., None]:
        def stop(layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            run = threading.current_thread()
            if isinstance(run, _Run) and run in runs and name not in finished:
                run.pause(name, args[0] if args else next(iter(kwargs.values())))

        return stop

    # In front of every other hook: the input is the raw one, before any quantiser of inputs.
    handles = [
        layer.register_forward_pre_hook(hook(name), prepend=True, with_kwargs=True) for name, layer in layers.items()
    ]
    runs = [_Run(lambda batch=batch: forward(model, batch)) for batch in batches]  # type: ignore[misc]
    try:
        for run in runs:
            run.start()
            run.advance()
        while any(run.at for run in runs):
            name = min((run.at[0] for run in runs if run.at), key=order.__getitem__)
            there = {i: run for i, run in enumerate(runs) if run.at and run.at[0] == name}
            yield name, {i: run.at[1] for i, run in there.items() if run.at}
            finished.add(name)
            for run in there.values():
                run.advance()
    finally:
        for handle in handles:
            handle.remove()
        for run in runs:
            run.abandoned = True
            run.turn.release()
        for run in runs:
            if run.is_alive():
                run.join()
