"""Artifacts: folders of ordinary files that load without this package."""

from lightning_lossplug.export.dense import dense_state, write_safetensors
from lightning_lossplug.export.folder import artifact_folder, clear_target

__all__ = ["artifact_folder", "clear_target", "dense_state", "write_safetensors"]
