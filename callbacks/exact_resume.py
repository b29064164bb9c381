"""Random states and half-collected gradients in the checkpoint: a resumed run is the run that was killed."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from lightning.fabric.plugins import CheckpointIO, TorchCheckpointIO
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.strategies import ModelParallelStrategy
from lightning.pytorch.trainer.states import TrainerFn
from torch import Tensor
from torch.distributed.tensor import DTensor

from lightning_lossplug.callbacks.folder_lock import FolderLocks
from lightning_lossplug.callbacks.safe_checkpoints import SafeCheckpointIO, verify_checkpoint
from lightning_lossplug.callbacks.sharded import refuse_deepspeed
from lightning_lossplug.errors import LossplugError
from lightning_lossplug.surgery.chain import unwrap_method, wrap_method


class ExactResume(Callback):
    """Makes a run that was killed and resumed from its last checkpoint give the weights of a run never killed.

    Lightning restores weights, optimizers, schedules and counters. This callback adds what it leaves out:

    * the states of Python's, NumPy's, PyTorch's and, on CUDA, the device's random generator, of every process; they are
      saved with each checkpoint and restored when the resumed training starts, so dropout, mixup and drop-path continue
      where they were;
    * the gradients of an unfinished accumulation (``accumulate_grad_batches``), if a checkpoint falls between two
      micro-batches, of every process: as many bytes as the weights, times the processes, in such checkpoints only;
    * the position of the training loader, where Lightning 2.6 saves it but does not load it, because
      ``configure_optimizers`` read ``trainer.estimated_stepping_batches``.

    Checkpoints are written and checked by :class:`SafeCheckpointIO`, unless the Trainer was given another plugin: a
    kill, a full disk or a lost machine leaves the old file or the new one, and a damaged one is refused by its name.
    While a fit runs its folders of checkpoints are locked: a second run that would write there stops before its first
    step. The lock dies with the process, so a killed run can be resumed at once.

    The data itself has to come in a repeatable order, from a loader that saves its position with ``state_dict`` and
    ``load_state_dict``, such as ``lightning_lossplug.integrations.ResumableLoader``, which the built-in data modules
    use. The order of a plain shuffled ``DataLoader`` is drawn anew: such a run can be resumed between epochs, but not
    bit by bit. On CUDA, PyTorch's own determinism settings apply as well. Put the callback last in the list: what
    callbacks after it draw in ``on_train_start`` comes on top. Checkpoints written while an exception is handled
    (``OnExceptionCheckpoint``) hold the random state inside the interrupted step and are not exact.

    Raises:
        LossplugError: Another run is writing its checkpoints into the same folder. When resuming: the checkpoint was
            written by another number of processes, or on another kind of device (per-process states cannot be mapped,
            so this is an error, never a new seed); training is resumed in mid-epoch and its loader does not save its
            position; or the checkpoint falls between two micro-batches of a model with sharded parameters, whose
            gradients are not kept. To go on without exactness, leave the callback out.
    """

    def __init__(self) -> None:
        self._saved: dict[str, Any] | None = None
        self._io: CheckpointIO | None = None  # the Trainer's own, while a safe one stands in for it
        self._folders = FolderLocks()

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Adds the states of all processes; every process gets here, rank 0 writes the file."""
        local = {
            "random": random_state(pl_module.device),
            "gradients": _unfinished_gradients(trainer, pl_module),
        }
        ranks = [local]
        if dist.is_initialized():
            ranks = [{}] * dist.get_world_size()
            dist.all_gather_object(ranks, local)
        # into the place of state_dict(), which is not given the Trainer: Lightning then reports a resume without this
        # callback
        checkpoint["callbacks"][self.state_key] = {"device": pl_module.device.type, "ranks": ranks}
        _count_the_epoch(checkpoint["loops"]["fit_loop"])

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Forgets what an earlier run left, and makes checkpoint files safe."""
        if stage == "fit":
            refuse_deepspeed(trainer, "ExactResume")
        self._saved = None
        strategy = trainer.strategy
        if self._io is None and type(strategy.checkpoint_io) is TorchCheckpointIO:
            self._io, strategy.checkpoint_io = strategy.checkpoint_io, SafeCheckpointIO()
            if isinstance(strategy, ModelParallelStrategy):  # it reads files without its plugin
                wrap_method(strategy, "load_checkpoint", self, _verified)  # type: ignore[arg-type]

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Locks the folders of checkpoints, which all callbacks have chosen by now."""
        self._folders.take(trainer)

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Keeps the states until training starts; validating from a checkpoint changes no random state."""
        if trainer.state.fn == TrainerFn.FITTING:
            self._saved = checkpoint["callbacks"].get(self.state_key)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Restores the states, just before the first batch of the resumed run is fetched."""
        saved, self._saved = self._saved, None
        if saved is None:
            return
        _check(trainer, pl_module, saved)
        mine = saved["ranks"][trainer.global_rank]
        parameters = dict(pl_module.named_parameters())
        for name, gradient in mine["gradients"].items():
            parameters[name].grad = gradient.to(parameters[name].device)
        fit_loop = trainer.fit_loop
        if fit_loop._combined_loader is not None and fit_loop._combined_loader_states_to_load:
            fit_loop._combined_loader._load_state_dicts(fit_loop._combined_loader_states_to_load)
            fit_loop._combined_loader_states_to_load = []
            iter(fit_loop._data_fetcher)  # type: ignore[arg-type]  # the iterator made before knows nothing of them
        set_random_state(mine["random"], pl_module.device)  # last: making an iterator draws from the generator

    def _clean_up(self, trainer: Trainer) -> None:
        self._folders.release()
        if self._io is not None:
            trainer.strategy.checkpoint_io, self._io = self._io, None
            unwrap_method(trainer.strategy, "load_checkpoint", self)  # type: ignore[arg-type]

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Puts the Trainer's own writer of checkpoints back."""
        self._clean_up(trainer)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """The same after an exception, when ``teardown`` is not called."""
        self._clean_up(trainer)


def _count_the_epoch(loops: dict[str, Any]) -> None:
    """Counts the epoch that is under way as begun, in the saved progress of the loops.

    Lightning 2.6 forgets to in a run that was resumed at the end of the epoch before. From a checkpoint of that run's
    last batch it would train the epoch once more.
    """
    batches = loops["epoch_loop.batch_progress"]["total"]
    if batches["completed"] == batches["processed"] - 1:  # saved at the end of a batch
        for epochs in (loops["epoch_progress"]["total"], loops["epoch_progress"]["current"]):
            if epochs["ready"] == epochs["processed"]:
                epochs["ready"] += 1
                epochs["started"] += 1


def _verified(inner: Callable[..., Any], checkpoint_path: str | Path, *args: Any, **kwargs: Any) -> Any:
    verify_checkpoint(checkpoint_path)
    return inner(checkpoint_path, *args, **kwargs)


def random_state(device: torch.device) -> dict[str, Any]:
    """Returns the states of the global random generators as plain types and tensors (safe for ``weights_only``)."""
    numpy: dict[str, Any] = dict(np.random.get_state(legacy=False))
    numpy["state"] = {
        "key": torch.from_numpy(numpy["state"]["key"].astype(np.int64)),
        "pos": int(numpy["state"]["pos"]),
    }
    state: dict[str, Any] = {
        "python": random.getstate(),
        "numpy": numpy,
        "torch": torch.get_rng_state(),
    }
    if device.type == "cuda":
        state["cuda"] = torch.cuda.get_rng_state(device)
    return state


def set_random_state(state: dict[str, Any], device: torch.device) -> None:
    """Puts the global random generators into states returned by :func:`random_state`."""
    version, internal, gauss_next = state["python"]
    random.setstate((version, tuple(internal), gauss_next))
    numpy = state["numpy"]
    key = numpy["state"]["key"].numpy().astype(np.uint32)
    np.random.set_state({**numpy, "state": {"key": key, "pos": numpy["state"]["pos"]}})
    torch.set_rng_state(state["torch"].cpu())
    if device.type == "cuda":
        torch.cuda.set_rng_state(state["cuda"].cpu(), device)


def _unfinished_gradients(trainer: Trainer, pl_module: LightningModule) -> dict[str, Tensor] | None:
    """Gradients of an accumulation that is under way; None if they belong to sharded parameters."""
    done = _batches_done(trainer)
    if done % trainer.accumulate_grad_batches == 0 or done == trainer.num_training_batches:
        return {}
    gradients = {n: p.grad for n, p in pl_module.named_parameters() if p.grad is not None}
    if any(isinstance(parameter, DTensor) for parameter in pl_module.parameters()):
        return None
    return {name: gradient.detach().cpu().clone() for name, gradient in gradients.items()}


def _check(trainer: Trainer, pl_module: LightningModule, saved: dict[str, Any]) -> None:
    leave_out = "or leave ExactResume out of the callbacks to go on inexactly"
    if len(saved["ranks"]) != trainer.world_size:
        raise LossplugError(
            f"the checkpoint was written by {len(saved['ranks'])} processes, the run now has {trainer.world_size}",
            where="ExactResume",
            remedy=f"Resume with {len(saved['ranks'])} processes, {leave_out}",
        )
    if saved["device"] != pl_module.device.type:
        raise LossplugError(
            f"the checkpoint was written on {saved['device']}, the run is now on {pl_module.device.type}",
            where="ExactResume",
            remedy=f"Resume on {saved['device']}, {leave_out}",
        )
    if saved["ranks"][trainer.global_rank]["gradients"] is None:
        raise LossplugError(
            "the checkpoint falls between two micro-batches, and gradients of sharded parameters are not kept",
            where="ExactResume",
            remedy=f"Take a checkpoint written after an optimizer step, {leave_out}",
        )
    done, of = _batches_done(trainer), trainer.num_training_batches
    loaders = trainer.fit_loop._combined_loader.flattened if trainer.fit_loop._combined_loader else []
    forgetful = [type(loader).__name__ for loader in loaders if not hasattr(loader, "load_state_dict")]
    if 0 < done < of and forgetful:
        raise LossplugError(
            f"training is resumed after batch {done} of {of}, and its {forgetful[0]} does not save its position",
            where="ExactResume",
            remedy=f"Use lightning_lossplug.integrations.ResumableLoader, {leave_out}",
        )


def _batches_done(trainer: Trainer) -> int:
    return trainer.fit_loop.epoch_loop.batch_progress.current.processed  # type: ignore[attr-defined]
