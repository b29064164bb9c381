"""Smooth adversarial comp-sum loss: a margin loss plus the worst change of the margins near the input."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from lightning_lossplug.errors import LossplugError
from lightning_lossplug.losses.base import ClassificationLoss, Loss, check_labels, check_parameter, upcast
from lightning_lossplug.losses.comp_sum import comp_sum
from lightning_lossplug.losses.stats import logit_stats
from lightning_lossplug.registry import register
from lightning_lossplug.surgery.modes import evaluating


def margin_change(z: Tensor, perturbed: Tensor, y: Tensor) -> Tensor:
    """Returns the L2 norm [R] of the change of the margins ``z_y - z_k`` from ``z`` to ``perturbed`` [R, C]."""
    change = perturbed - z
    return ((change.gather(1, y[:, None]) - change).square().sum(dim=1) + 1e-12).sqrt()


class _Rows(ClassificationLoss):
    row_inputs = ("change",)

    def __init__(self, tau: float, rho: float, nu: float, **options: Any) -> None:
        super().__init__(**options)
        self.tau, self.rho, self.nu = tau, rho, nu

    def rows(self, z: Tensor, y: Tensor, *, change: Tensor | None = None) -> Tensor:
        clean = comp_sum(logit_stats(z / self.rho, y).nll, self.tau)
        return clean if change is None else clean + self.nu * change


@register(
    "loss",
    "smooth_adversarial_comp_sum",
    family="classification",
    paper="Cross-Entropy Loss Functions: Theoretical Analysis and Applications",
    arxiv="2304.07288",
    aliases=("adv_comp_sum",),
    signature="model_inputs_index",
    needs=("model",),
)
class SmoothAdversarialCompSum(Loss):
    r"""Smooth adversarial comp-sum loss (arXiv 2304.07288), called with the model: ``loss(model, x, y)``.

    :math:`l = \Phi_\tau\big(\sum_{k \ne y} e^{-\Delta_k(x) / \rho}\big)
    + \nu \max_{\|x' - x\| \le \epsilon} \|\Delta(x') - \Delta(x)\|_2` with the margins :math:`\Delta_k = z_y - z_k`.
    The first term is ``comp_sum`` of the logits over rho. For :math:`\nu \ge \sqrt{C-1} / \rho` the loss bounds the
    rho-margin adversarial loss. The maximum is sought by projected gradient ascent from a small random offset, in eval
    mode; one pass over ``[x, x']`` in the model's own mode then gives the loss. The paper's norm penalty on the weights
    is the optimizer's weight decay. Written from the construction in the paper, without code to compare with; the
    attack's defaults are the usual ones for images in [0, 1], not the paper's.

    When: classifiers that have to withstand small changes of the input.

    Args:
        tau: Exponent of ``comp_sum``, >= 0.
        rho: Margin scale > 0.
        nu: Weight of the worst change, >= 0; at 0 there is no attack.
        eps: Radius of the attack in the input's units, > 0.
        step_size: Of one ascent step, > 0.
        steps: Ascent steps, >= 1.
        norm: ``"inf"`` or 2.
        bounds: Smallest and largest legal input value, or None.
        weight: Class weights [C].
        ignore_index: Label of rows that are left out.
        reduction: ``none``, ``mean`` or ``sum``.
    """

    def __init__(
        self,
        tau: float = 1.0,
        rho: float = 1.0,
        nu: float = 1.0,
        eps: float = 8 / 255,
        step_size: float = 2 / 255,
        steps: int = 10,
        norm: str | float = "inf",
        bounds: tuple[float, float] | None = None,
        weight: Tensor | list[float] | None = None,
        ignore_index: int = -100,
        reduction: str = "mean",
    ) -> None:
        super().__init__(reduction)
        where = "smooth_adversarial_comp_sum"
        check_parameter(tau >= 0, where, "tau", tau, ">= 0")
        check_parameter(rho > 0, where, "rho", rho, "> 0")
        check_parameter(nu >= 0, where, "nu", nu, ">= 0")
        check_parameter(eps > 0, where, "eps", eps, "> 0")
        check_parameter(step_size > 0, where, "step_size", step_size, "> 0")
        check_parameter(steps >= 1, where, "steps", steps, ">= 1")
        check_parameter(str(norm) in ("inf", "2", "2.0"), where, "norm", norm, "'inf' or 2")
        self.nu, self.eps, self.step_size, self.steps, self.bounds = nu, eps, step_size, steps, bounds
        self.infinite = str(norm) == "inf"
        self.loss = _Rows(tau, rho, nu, weight=weight, ignore_index=ignore_index, reduction=reduction)

    def forward(self, model: nn.Module, inputs: Tensor, target: Tensor, **options: Any) -> Tensor:
        """Computes the loss.

        Args:
            model: Maps inputs [N, *] to logits [N, C].
            inputs: [N, *], floating.
            target: Class indices [N].
            options: As in :meth:`ClassificationLoss.forward`.

        Raises:
            LossplugError: The inputs are not floating, or shapes don't fit.
        """
        if not inputs.is_floating_point() or target.shape != inputs.shape[:1]:
            raise LossplugError(
                f"inputs {tuple(inputs.shape)} {inputs.dtype} and targets {tuple(target.shape)} don't fit",
                where="smooth_adversarial_comp_sum",
                remedy="Expected floating inputs [N, *] and class indices [N]",
            )
        options.setdefault("reduction", self.reduction)
        if self.nu == 0 or not len(inputs):
            return self.loss(model(inputs), target, **options)
        y = torch.where(self.loss.kept(target, options.get("ignore_index")), target, 0)
        logits, perturbed = model(torch.cat([inputs, self.attack(model, inputs, y)])).chunk(2)
        with torch.autocast(logits.device.type, enabled=False):
            change = margin_change(upcast(logits), upcast(perturbed), y)
            return self.loss(logits, target, change=change, **options)

    def attack(self, model: nn.Module, inputs: Tensor, y: Tensor) -> Tensor:
        """Returns inputs within the radius that change the margins at labels ``y`` most; the model's state stays."""
        x = inputs.detach()
        with evaluating(model), torch.enable_grad():
            with torch.no_grad():
                z = upcast(model(x))
            check_labels(y, z.shape[1], 0, "smooth_adversarial_comp_sum")
            # At the clean input the norm has no gradient: start a little beside it.
            delta = self._project(x, 0.1 * self.eps * (2 * torch.rand_like(x) - 1))
            for _ in range(self.steps):
                delta.requires_grad_()
                change = margin_change(z, upcast(model(x + delta)), y)
                (grad,) = torch.autograd.grad(change.sum(), delta)
                step = grad.sign() if self.infinite else grad / self._length(grad).clamp_min(1e-12)
                delta = self._project(x, delta.detach() + self.step_size * step)
        return x + delta

    def _length(self, delta: Tensor) -> Tensor:
        return delta.flatten(1).norm(dim=1).view(-1, *[1] * (delta.ndim - 1))

    def _project(self, x: Tensor, delta: Tensor) -> Tensor:
        if self.infinite:
            delta = delta.clamp(-self.eps, self.eps)
        else:
            delta = delta * (self.eps / self._length(delta).clamp_min(1e-12)).clamp_max(1)
        return delta if self.bounds is None else (x + delta).clamp(*self.bounds) - x
