"""Artifacts: folders of ordinary files that load without this package; what 2:4 kernels can use of them."""

from lightning_lossplug.export.dense import dense_state, write_safetensors
from lightning_lossplug.export.folder import artifact_folder, clear_target
from lightning_lossplug.export.hardware import HardwareReport, LayerReport, hardware_report, to_semi_structured
from lightning_lossplug.export.masks import pack_mask, read_masks, unpack_mask, write_masks
from lightning_lossplug.export.onnx_file import OnnxCheck, export_onnx

__all__ = [
    "HardwareReport",
    "LayerReport",
    "OnnxCheck",
    "artifact_folder",
    "clear_target",
    "dense_state",
    "export_onnx",
    "hardware_report",
    "pack_mask",
    "read_masks",
    "to_semi_structured",
    "unpack_mask",
    "write_masks",
    "write_safetensors",
]
