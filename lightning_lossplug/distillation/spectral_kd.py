"""Features compared in space and in frequency, rare frequencies of the image counting more."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_lossplug.distillation.base import DistillationLoss
from lightning_lossplug.errors import LossplugError
from lightning_lossplug.losses.checks import check_floating, check_number, upcast
from lightning_lossplug.registry import register


def spectrum_weights(image: Tensor, size: Sequence[int], alpha: float = -1.0, eps: float = 1e-3) -> Tensor:
    r"""Returns :math:`(|\mathrm{DFT}_2(x_0)| + \epsilon)^\alpha` [N, 1, H, W/2 + 1] of images resized to ``size``.

    The magnitude is the mean over the image's channels; the transform is orthonormal.
    """
    resized = F.interpolate(upcast(image), tuple(size), mode="bilinear", align_corners=False)
    magnitude = torch.fft.rfft2(resized, norm="ortho").abs().mean(dim=1, keepdim=True)
    return (magnitude + eps).pow(alpha)


def spectral_distance(student: Tensor, teacher: Tensor, weights: Tensor | float = 1.0) -> Tensor:
    r"""Returns the mean over all entries of :math:`w\,|\mathrm{DFT}_2(s) - \mathrm{DFT}_2(t)|^2` of maps [N, C, H, W].

    With weights of 1 it is the mean squared difference (Parseval). The half of the spectrum that real maps repeat is
    counted twice instead of computed.
    """
    square = torch.fft.rfft2(student - teacher, norm="ortho").abs().square() * weights
    width = student.shape[-1]
    twice = torch.full((square.shape[-1],), 2.0, dtype=square.dtype, device=square.device)
    twice[0] = 1.0
    if width % 2 == 0:
        twice[-1] = 1.0
    return (square * twice).sum() / student.numel()


@register(
    "loss",
    "spectral_kd",
    family="distillation",
    paper="Diffusion Probabilistic Model Made Slim",
    arxiv="2211.17106",
    signature="features_teacher_image",
)
class SpectralKD(DistillationLoss):
    r"""Frequency-aware distillation of a denoiser: spatial and spectral differences of maps of all scales.

    :math:`\sum_i \lambda_s\,\overline{(s_i - t_i)^2} + \lambda_f\,\overline{w_i |\hat s_i - \hat t_i|^2}`, with
    :math:`w_i = (|\hat x_0| + \epsilon)^\alpha` of the clean image at the size of level i: what the image has little
    of counts more. A trained 1x1 convolution aligns channels where they differ (made by :meth:`build`). The source's
    code was not found: the mean over entries and ``eps`` are choices made here. The network's wavelet gating is not
    part of it.

    Use it beside the diffusion loss, on the student's and teacher's blocks of equal scale.

    Args:
        lambda_s: Weight >= 0 of the spatial part.
        lambda_f: Weight >= 0 of the spectral part.
        alpha: Exponent; -1 is the inverse magnitude, 0 the plain spectrum.
        eps: Added to the magnitude, > 0.
    """

    def __init__(self, lambda_s: float = 0.1, lambda_f: float = 0.1, alpha: float = -1.0, eps: float = 1e-3) -> None:
        super().__init__()
        self.lambda_s = check_number("spectral_kd", "lambda_s", lambda_s, least=0)
        self.lambda_f = check_number("spectral_kd", "lambda_f", lambda_f, least=0)
        self.alpha = check_number("spectral_kd", "alpha", alpha)
        self.eps = check_number("spectral_kd", "eps", eps, above=0)
        self.connectors = nn.ModuleDict()

    def build(self, student: Sequence[Tensor], teacher: Sequence[Tensor]) -> None:
        """Makes the convolutions of the levels whose channels differ."""
        for i, (s, t) in enumerate(zip(student, teacher, strict=True)):
            if s.shape[1] != t.shape[1] and str(i) not in self.connectors:
                self.connectors[str(i)] = nn.Conv2d(s.shape[1], t.shape[1], 1).to(s.device)

    def forward(self, student: Sequence[Tensor], teacher: Sequence[Tensor], image: Tensor) -> Tensor:
        """Computes the loss of maps [N, C, H, W] of each level, given the clean images [N, c, H', W'].

        Raises:
            LossplugError: Numbers or shapes that don't fit.
        """
        if len(student) != len(teacher) or not student:
            raise LossplugError(
                f"{len(student)} features of the student, {len(teacher)} of the teacher", where="spectral_kd"
            )
        check_floating("spectral_kd", image=image)
        values = []
        with torch.autocast(image.device.type, enabled=False):
            for i, (s, t) in enumerate(zip(student, teacher, strict=True)):
                s, t = upcast(s), upcast(t.detach())
                if str(i) in self.connectors:
                    s = self.connectors[str(i)](s.to(next(self.connectors.parameters()).dtype))
                if s.shape != t.shape:
                    raise LossplugError(
                        f"features {tuple(s.shape)} and {tuple(t.shape)} differ",
                        where="spectral_kd",
                        remedy="Choose levels of one size, and call build() where channels differ",
                    )
                weights = spectrum_weights(image.detach(), s.shape[2:], self.alpha, self.eps).to(s)
                values.append(self.lambda_s * F.mse_loss(s, t) + self.lambda_f * spectral_distance(s, t, weights))
        return torch.stack(values).sum()
