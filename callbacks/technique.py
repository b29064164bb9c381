"""The bridge between a Trainer's hooks and the life of a technique."""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar, Generic, TypeVar

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import StochasticWeightAveraging, WeightAveraging
from lightning.pytorch.utilities.model_helpers import is_overridden
from lightning.pytorch.utilities.rank_zero import rank_zero_info, rank_zero_warn
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from lightning_lossplug.callbacks.sharded import refuse_deepspeed
from lightning_lossplug.errors import LossplugError
from lightning_lossplug.schedules import Progress
from lightning_lossplug.surgery.attention import attending_layers
from lightning_lossplug.surgery.chain import unwrap_method, wrap_method
from lightning_lossplug.surgery.plug import plugged_layers
from lightning_lossplug.surgery.select import Selection, require_taken
from lightning_lossplug.technique import Technique

TechniqueT = TypeVar("TechniqueT", bound=Technique[Any])


class TechniqueCallback(Callback, Generic[TechniqueT]):
    """Carries one technique: converts in ``setup``, ticks on real optimizer steps, saves, resumes, cleans up.

    The clock counts steps the optimizer took (a step that a gradient scaler skips doesn't count). A fit that starts
    from step 0 starts the technique anew; a resumed or continued fit goes on. After the fit the layers stay plugged, so
    that ``trainer.test`` sees the compressed model; ``technique.fold(model)`` gives a plain copy.
    """

    told: ClassVar[tuple[str, ...]] = ()  # settings that are shown at their defaults, too

    def __init__(self, technique: TechniqueT) -> None:
        self.technique = technique
        self.step = 0
        self.offset = 0  # optimizer steps the Trainer had taken when the technique started
        self.selection: Selection | None = None
        self._restored = False
        self._ticking = False
        self._handles: list[RemovableHandle] = []

    @property
    def state_key(self) -> str:
        """Identifies the instance among several of its class by the layers it works on."""
        settings = self.technique.settings
        return self._generate_state_key(
            include=getattr(settings, "include", None), exclude=getattr(settings, "exclude", None)
        )

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Converts the layers that exist, and again those that ``configure_model`` builds."""
        self._restored = self._ticking = False
        refuse_deepspeed(trainer, type(self).__name__)
        for other in trainer.callbacks[: trainer.callbacks.index(self)]:  # type: ignore[attr-defined]
            if isinstance(other, (WeightAveraging, StochasticWeightAveraging)):
                raise LossplugError(
                    f"stands after {type(other).__name__} in the callbacks list, which copies the model in setup and "
                    "would miss the converted layers",
                    where=type(self).__name__,
                    remedy=f"Put {type(self).__name__} before {type(other).__name__}",
                )
        builds_later = is_overridden("configure_model", pl_module)
        self._attach(pl_module, may_be_empty=builds_later)
        if builds_later:
            wrap_method(pl_module, "configure_model", self, self._configure_model(pl_module), look_through=False)

    def _configure_model(self, pl_module: LightningModule) -> Any:
        def configure_model(inner: Any) -> None:
            inner()
            self._attach(pl_module, may_be_empty=False)

        return configure_model

    def _attach(self, pl_module: LightningModule, may_be_empty: bool) -> None:
        selection = self.technique.attach(pl_module)
        if not may_be_empty:
            require_taken(selection, type(self).__name__)
        if selection.taken and (self.selection is None or selection.rows() != self.selection.rows()):
            rank_zero_info(f"{type(self).__name__}: {self.describe()}\n{selection.table(compact=True)}")
            self.selection = selection

    def describe(self) -> str:
        """Returns the settings that differ from their defaults, and those that say what it is, for the table."""
        settings = self.technique.settings
        blank = type(settings)()
        pairs = ((f.name, getattr(settings, f.name)) for f in dataclasses.fields(settings))
        shown = ((name, value) for name, value in pairs if name in self.told or value != getattr(blank, name))
        return ", ".join(f"{name}={value!r}" for name, value in shown) or "defaults"

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Hooks the optimizers."""
        names = {id(p) for _, layer in plugged_layers(pl_module) for p in layer.parameters()}
        ours = [o for o in trainer.optimizers if any(id(p) in names for g in o.param_groups for p in g["params"])]
        if not ours:
            raise LossplugError(
                "no optimizer holds a selected weight, so training would never move it",
                where=type(self).__name__,
                remedy="Unfreeze the layers, or select layers that train",
            )
        # A step pre-hook would run before the closure, and so before the backward pass.
        wrap_method(pl_module, "configure_gradient_clipping", self, self._after_clipping(trainer))
        for optimizer in ours:
            self._handles.append(optimizer.register_step_post_hook(self._after_step(trainer, pl_module, ours[0])))

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Finds the place in the schedule: the start, or where the checkpoint left it."""
        self._ticking = True
        if not self._restored and trainer.global_step == 0:
            self.step = self.offset = 0
            self.technique.reset()
        elif not self._restored and self.step == 0:
            self.offset = trainer.global_step
        self.technique.advance(self.progress(trainer, pl_module))
        for callback in trainer.callbacks:  # type: ignore[attr-defined]
            if isinstance(callback, WeightAveraging) and callback._average_model is not None:
                self._keep_buffers(callback._average_model, pl_module)

    def progress(self, trainer: Trainer, pl_module: LightningModule) -> Progress:
        """Returns where the technique stands, on its own clock."""
        if not pl_module.automatic_optimization:
            return Progress(self.step)  # how often a manual step calls which optimizer can't be told
        total = trainer.estimated_stepping_batches
        batches, window = trainer.num_training_batches, trainer.accumulate_grad_batches
        return Progress(
            self.step,
            int(total) - self.offset if total != float("inf") else None,
            batches / window if batches != float("inf") else None,
        )

    def _after_clipping(self, trainer: Trainer) -> Any:
        def configure_gradient_clipping(inner: Any, optimizer: Optimizer, *args: Any, **kwargs: Any) -> None:
            inner(optimizer, *args, **kwargs)
            self._before_step(trainer, optimizer)

        return configure_gradient_clipping

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        """In manual optimization, where Lightning clips nothing: the gradients are final here."""
        if not pl_module.automatic_optimization:
            self._before_step(trainer, optimizer)

    def _before_step(self, trainer: Trainer, optimizer: Optimizer) -> None:
        scaler = getattr(trainer.precision_plugin, "scaler", None)
        fused = scaler is not None and getattr(optimizer, "_step_supports_amp_scaling", False)
        self.technique.before_step(optimizer, float(scaler.get_scale()) if fused else 1.0)  # type: ignore[union-attr]

    def _after_step(self, trainer: Trainer, pl_module: LightningModule, clock: Optimizer) -> Any:
        def after(optimizer: Optimizer, args: Any, kwargs: Any) -> None:
            if not self._ticking:  # to make room for a sharded state that it loads, torch takes a step of its own
                return
            self.technique.after_step(optimizer)
            if optimizer is clock:
                self.step += 1
                self.technique.advance(self.progress(trainer, pl_module))

        return after

    def _keep_buffers(self, average: Any, pl_module: LightningModule) -> None:
        # An average of masks is their union and of scales their blur: the averaged model takes the live ones.
        def update_parameters(inner: Any, model: Any) -> None:
            inner(model)
            live = dict(model.named_modules())
            for name, layer in (*plugged_layers(average.module), *attending_layers(average.module)):
                for theirs, ours in zip(layer.buffers(), live[name].buffers(), strict=True):
                    theirs.copy_(ours)
                for path, transform in layer.named_modules():
                    twin = live[name].get_submodule(path)
                    if hasattr(transform, "mode"):
                        transform.mode = twin.mode

        wrap_method(average, "update_parameters", self, update_parameters)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Logs the technique's signals when the Trainer's loggers are due."""
        every: int = trainer.log_every_n_steps  # type: ignore[attr-defined]
        if every and self.step % every == 0:
            values = {f"{type(self).__name__}/{key}": value for key, value in self.technique.logs().items()}
            pl_module.log_dict(values, on_step=True, on_epoch=False)  # type: ignore[arg-type]

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Warns when the run ended before the schedule."""
        for warning in self.technique.finish():
            rank_zero_warn(warning)

    def state_dict(self) -> dict[str, Any]:
        """The clock, the technique's position, and the settings (for :func:`load_plugged`), in plain types."""
        return {
            "step": self.step,
            "offset": self.offset,
            "technique": self.technique.state_dict(),
            "settings": dataclasses.asdict(self.technique.settings),
            "callback": type(self).__name__,
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restores :meth:`state_dict`; the settings are this object's own."""
        self.step, self.offset = state_dict["step"], state_dict["offset"]
        self.technique.load_state_dict(state_dict["technique"])
        self._restored = True

    def _clean_up(self, trainer: Trainer, pl_module: LightningModule) -> None:
        unwrap_method(pl_module, "configure_model", self)
        unwrap_method(pl_module, "configure_gradient_clipping", self)
        for callback in trainer.callbacks:  # type: ignore[attr-defined]
            if isinstance(callback, WeightAveraging) and callback._average_model is not None:
                unwrap_method(callback._average_model, "update_parameters", self)
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Takes hooks and patches off; the layers stay plugged."""
        self._clean_up(trainer, pl_module)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """The same after an exception, when ``teardown`` is not called."""
        self._clean_up(trainer, pl_module)
