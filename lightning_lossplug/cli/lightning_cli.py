"""The LightningCLI behind ``lossplug fit``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI
from lightning.pytorch.loggers import CSVLogger

from lightning_lossplug.callbacks.checkpoint import read_checkpoint
from lightning_lossplug.cli.run_folder import run_folder
from lightning_lossplug.registry import registry

ROOT = "lossplug_runs"
USAGE = "lossplug fit [--config FILE | --recipe NAME] [--KEY VALUE ...]"
DESCRIPTION = (
    "Train by configuration. --recipe NAME takes a packaged one (lossplug list configs); models, data and callbacks "
    "have short names (lossplug list): --model ImageClassifier --data DigitsData --trainer.callbacks+=NMSparsity"
)
KEYWORDS = ("best", "last", "hpc", "registry")  # what the Trainer takes for ckpt_path besides a file


class FitCLI(LightningCLI):
    """LightningCLI with one subcommand, a CSV logger, a ``last`` checkpoint and :class:`ExactResume` by default."""

    folder: Path | None = None
    latest: LightningArgumentParser | None = None

    @classmethod
    def parse(cls, arguments: list[str]) -> FitCLI:
        """Parses the arguments and builds model, data and Trainer, without training.

        Raises:
            LossplugError: A checkpoint to resume from that can't be read; a value a constructor refuses.
        """
        strict = {"exit_on_error": False}
        return cls(
            LightningModule,
            subclass_mode_model=True,
            seed_everything_default=0,
            auto_configure_optimizers=False,
            save_config_kwargs={"overwrite": True},
            trainer_defaults={"default_root_dir": ROOT},
            parser_kwargs={"prog": "lossplug", **strict, "fit": {"description": DESCRIPTION, "usage": USAGE, **strict}},
            args=["fit", *arguments],
        )

    @classmethod
    def known_options(cls) -> list[str]:
        """Returns the keys of the last parser, in dotted form."""
        return [] if cls.latest is None else [a.dest for a in cls.latest._actions if a.dest != "help"]

    @staticmethod
    def subcommands() -> dict[str, set[str]]:
        """``fit`` alone; ``lossplug evaluate`` and ``export`` read the checkpoints."""
        return {"fit": {"model", "train_dataloaders", "val_dataloaders", "datamodule"}}

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Adds ``--exact_resume``."""
        FitCLI.latest = parser
        parser.add_argument(
            "--exact_resume", type=bool, default=True, help="Save and restore what a bit-exact resume needs."
        )

    def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
        """Parses, whatever ``sys.argv`` holds."""
        self.config = parser.parse_args(args)

    def _parse_ckpt_path(self) -> None:
        # The configuration alone decides what is built; the checkpoint only has to be readable, before anything starts.
        path = self.config["fit"].get("ckpt_path")
        if path and not str(path).startswith(KEYWORDS) and "://" not in str(path):
            read_checkpoint(path)

    def _instantiate_trainer(self, config: dict[str, Any], callbacks: list[Callback]) -> Trainer:
        given = config.get("callbacks") or []
        given = list(given) if isinstance(given, (list, tuple)) else [given]
        if config.get("logger") in (None, True):
            config["logger"] = CSVLogger(config.get("default_root_dir") or ROOT, name="")
        wanted = config.get("enable_checkpointing") is not False and not config.get("fast_dev_run")
        if wanted and not any(isinstance(callback, ModelCheckpoint) for callback in given):
            given.append(ModelCheckpoint(save_last=True, filename="{epoch}-{step}"))
        if self.config["fit"]["exact_resume"]:
            exact = registry.get("callback", "ExactResume").load()
            if not any(type(callback) is exact for callback in given):
                given.append(exact())
        config["callbacks"] = given
        return super()._instantiate_trainer(config, callbacks)

    def _run_subcommand(self, subcommand: str) -> None:
        """Nothing yet: :meth:`train` does, outside the errors of parsing."""

    def train(self) -> None:
        """Runs the fit.

        Raises:
            LossplugError: The output folder can't be written, or a mistake that shows in the first step.
            KeyboardInterrupt: Interrupted (Lightning shuts down and exits with 1 otherwise).
        """
        with run_folder(self.trainer) as self.folder:
            try:
                self.trainer.fit(**self._prepare_subcommand_kwargs("fit"))
            except SystemExit:
                if self.trainer.interrupted:
                    raise KeyboardInterrupt from None
                raise
