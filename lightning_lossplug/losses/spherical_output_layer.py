"""Exact training of an output layer at a cost that doesn't depend on the number of classes."""

from __future__ import annotations

from typing import Literal, get_args

import torch
from torch import Tensor

from lightning_lossplug.errors import LossplugError
from lightning_lossplug.losses.base import FusableLoss, Loss, check_labels, check_parameter
from lightning_lossplug.losses.exchange import gather_rows, world_size
from lightning_lossplug.losses.reduction import reduce_rows
from lightning_lossplug.losses.stats import LogitStats
from lightning_lossplug.registry import register, registry

InvertMode = Literal["woodbury", "exact"]


@register(
    "loss",
    "spherical_output_layer",
    family="classification",
    paper="Efficient Exact Gradient Update for training Deep Networks with Very Large Sparse Targets",
    arxiv="1412.7091",
    signature="embeddings_labels_head",
    needs=("num_classes",),
    stateful=True,
    gather=True,
)
class SphericalOutputLayer(Loss):
    r"""Output layer ``o = W h`` and its loss, with the plain-SGD update at O(d^2) per row (arXiv 1412.7091).

    Works for losses of the spherical family: ``z_loss``, ``spherical_softmax``, ``taylor_softmax``, which depend on
    the outputs only through :math:`o_y`, :math:`\sum_k o_k` and :math:`\sum_k o_k^2`. The layer holds W as
    :math:`V U + 1 \omega^T` with :math:`Q = W^T W` and :math:`W^T 1`; a step changes the small matrices and, of V, the
    rows of the batch's labels. All of them are buffers: the optimizer doesn't see them, ``step`` trains them::

        loss = layer(features, labels)
        loss.backward()
        optimizer.step()  # the network below
        layer.step(lr=0.1)  # this layer; several backwards before it accumulate

    Under ``torch.distributed`` ``step`` exchanges the batches and equals SGD on the gradient averaged over ranks, as
    under DDP; every rank has to call it. Only plain SGD, float32 or float64, no loss scaling.

    When: hundreds of thousands of classes, where neither logits nor a dense update are affordable.

    Args:
        in_features: Width d of the features.
        num_classes: Number of classes.
        loss: Registry name, or a loss object; its class weights, ``ignore_index`` and ``reduction`` hold here too.
        stabilize_every: Steps between repairs of U: singular values outside [0.5, 2] move over to V; if they are more
            than a third, the factors are multiplied out, which costs O(C d^2).
        invert_mode: How :math:`U^{-1}` follows: ``woodbury`` (cheap for batches smaller than d) or ``exact``.
        weight_decay: As in ``torch.optim.SGD``, >= 0.
    """

    V: Tensor
    U: Tensor
    U_inv: Tensor
    omega: Tensor
    Q: Tensor
    wbar: Tensor
    steps: Tensor

    def __init__(
        self,
        in_features: int,
        num_classes: int,
        loss: str | FusableLoss = "z_loss",
        stabilize_every: int = 100,
        invert_mode: str = "woodbury",
        weight_decay: float = 0.0,
    ) -> None:
        built = registry.create("loss", loss) if isinstance(loss, str) else loss
        if not (isinstance(built, FusableLoss) and built.spherical):
            raise LossplugError(
                f"the loss {loss!r} needs more of the outputs than o_y, their sum and their sum of squares",
                where="spherical_output_layer",
                remedy="Use z_loss, spherical_softmax or taylor_softmax",
            )
        super().__init__(built.reduction)
        for name, value in (("in_features", in_features), ("num_classes", num_classes)):
            check_parameter(value >= 1, "spherical_output_layer", name, value, ">= 1")
        check_parameter(stabilize_every >= 1, "spherical_output_layer", "stabilize_every", stabilize_every, ">= 1")
        known = get_args(InvertMode)
        check_parameter(invert_mode in known, "spherical_output_layer", "invert_mode", invert_mode, "woodbury or exact")
        check_parameter(weight_decay >= 0, "spherical_output_layer", "weight_decay", weight_decay, ">= 0")
        self.loss = built
        self.stabilize_every, self.invert_mode, self.weight_decay = stabilize_every, invert_mode, weight_decay
        for name in ("V", "U", "U_inv", "omega", "Q", "wbar"):
            self.register_buffer(name, torch.empty(0))
        self.register_buffer("steps", torch.zeros((), dtype=torch.int64))
        bound = in_features**-0.5
        self.set_weight(torch.empty(num_classes, in_features).uniform_(-bound, bound))
        self._pending: list[tuple[Tensor, ...]] = []

    @torch.no_grad()
    def set_weight(self, weight: Tensor) -> None:
        """Starts from a dense weight [num_classes, in_features]; it is copied.

        Raises:
            LossplugError: The weight has another shape than the layer's.
        """
        if self.V.numel() and weight.shape != self.V.shape:
            raise LossplugError(
                f"weight {tuple(weight.shape)}, expected {tuple(self.V.shape)}", where="spherical_output_layer"
            )
        self.V = weight.detach().clone()
        self.U = torch.eye(weight.shape[1], dtype=weight.dtype, device=weight.device)
        self.U_inv, self.omega = self.U.clone(), weight.new_zeros(weight.shape[1])
        self.Q, self.wbar = weight.T @ weight, weight.sum(dim=0)

    def weight(self) -> Tensor:
        """Returns the dense weight W [num_classes, in_features]."""
        return self.V @ self.U + self.omega

    def logits(self, features: Tensor) -> Tensor:
        """Returns all outputs [..., num_classes], for evaluation."""
        h = features.to(self.V.dtype)
        return (h @ self.U.T) @ self.V.T + (h @ self.omega)[..., None]

    def forward(self, features: Tensor, target: Tensor, *, denominator: Tensor | float | None = None) -> Tensor:
        """Computes the loss and, in training, notes the batch for ``step``.

        Args:
            features: [..., in_features].
            target: Class indices [...].
            denominator: What ``mean`` divides by instead of the summed weights.

        Raises:
            LabelError: A label outside the classes (checked on CPU).
            LossplugError: Shapes or dtypes that don't fit, or the layer was cast to half precision.
        """
        where = "spherical_output_layer"
        if features.shape != (*target.shape, self.V.shape[1]) or target.is_floating_point():
            raise LossplugError(
                f"features {tuple(features.shape)} and targets {tuple(target.shape)} {target.dtype} don't fit",
                where=where,
                remedy=f"Expected features [..., {self.V.shape[1]}] and integer targets [...]",
            )
        if self.V.dtype not in (torch.float32, torch.float64):
            raise LossplugError(f"the layer is {self.V.dtype}", where=where, remedy="Keep it in float32 or float64")
        y = target.reshape(-1)
        check_labels(y, self.V.shape[0], self.loss.ignore_index, where)
        keep = self.loss.kept(y)
        y = torch.where(keep, y, 0).long()
        with torch.autocast(features.device.type, enabled=False):
            h = features.reshape(-1, features.shape[-1]).to(self.V.dtype)
            record = self.training and torch.is_grad_enabled()
            if record and not h.requires_grad:
                h = h.detach().requires_grad_()
            o_y = (self.V[y] * (h @ self.U.T)).sum(dim=1) + h @ self.omega
            o_sum, o_sumsq = h @ self.wbar, (h * (h @ self.Q)).sum(dim=1)
            if record:
                for statistic in (o_y, o_sum, o_sumsq):
                    statistic.retain_grad()
                self._pending.append((h.detach(), y, o_y, o_sum, o_sumsq))
            # The family never looks at lse; zeros keep its place.
            stats = LogitStats(torch.zeros_like(o_y), o_y, self.V.shape[0], o_sum, o_sumsq)
            rows = torch.where(keep, self.loss.from_stats(stats), 0)
            kept = keep.to(h.dtype)
            if self.loss.weight is not None:
                weight = self.loss.weight.to(h)[y]
                rows, kept = rows * weight, kept * weight
            return reduce_rows(rows.reshape(target.shape), kept.sum(), self.reduction, h, denominator)

    @torch.no_grad()
    def step(self, lr: float) -> None:
        """Takes one SGD step on all batches since the last one; those without a backward drop out."""
        batches = [
            (h, y, *(torch.zeros_like(o) if o.grad is None else o.grad for o in outputs))  # a loss may not use the sum
            for h, y, *outputs in self._pending
            if outputs[0].grad is not None
        ]
        self._pending.clear()
        empty = self.V.new_zeros(0)
        columns = list(zip(*batches, strict=True)) or [
            (self.V.new_zeros(0, self.V.shape[1]),),
            (empty.long(),),
            *[(empty,)] * 3,
        ]
        h, y, g_target, g_sum, g_sumsq = gather_rows(*(torch.cat(column) for column in columns))
        ranks = world_size()
        # W <- (1 - lr decay) W - lr G equals a step of lr / shrink, then the scaling.
        shrink = 1 - lr * self.weight_decay
        check_parameter(shrink > 0, "spherical_output_layer", "lr", lr, "below 1 / weight_decay")
        self._update(lr / shrink, h, y, g_target / ranks, g_sum / ranks, 2 * g_sumsq / ranks)
        if shrink != 1:
            for buffer, power in ((self.U, 1), (self.U_inv, -1), (self.omega, 1), (self.Q, 2), (self.wbar, 1)):
                buffer *= shrink**power
        self.steps += 1
        if int(self.steps) % self.stabilize_every == 0:
            self.stabilize()

    def _update(self, lr: float, h: Tensor, y: Tensor, a: Tensor, s: Tensor, g: Tensor) -> None:
        """W -= lr E h for output gradients ``E_j = g_j o_j + a_j e_{y_j} + s_j 1``, in factored form."""
        h_q, total, w_y = h @ self.Q, h @ self.wbar, self.V[y] @ self.U + self.omega
        d_h = g[:, None] * h_q + a[:, None] * w_y + s[:, None] * self.wbar
        cross = torch.outer(g * total, s) + torch.outer(g, a) * (h @ w_y.T) + torch.outer(s, a)
        gram = torch.outer(g, g) * (h_q @ h.T) + self.V.shape[0] * torch.outer(s, s) + cross + cross.T
        gram += torch.outer(a, a) * (y[:, None] == y)
        q_step = h.T @ d_h
        self.Q += lr**2 * (h.T @ gram @ h) - lr * (q_step + q_step.T)
        self.wbar -= lr * h.T @ (g * total + self.V.shape[0] * s + a)
        self.omega -= lr * h.T @ (g * (h @ self.omega) + s)
        b = g[:, None] * h
        self.U -= lr * (self.U @ h.T) @ b
        if self.invert_mode == "exact":
            self.U_inv = torch.linalg.inv(self.U)
        else:
            k = torch.eye(len(h), dtype=h.dtype, device=h.device) - lr * b @ h.T
            self.U_inv += lr * h.T @ torch.linalg.solve(k, b @ self.U_inv)
        self.V.index_add_(0, y, -lr * a[:, None] * (h @ self.U_inv))

    @torch.no_grad()
    def stabilize(self) -> None:
        """Moves singular values of U outside [0.5, 2] over to V, or multiplies the factors out if they are many."""
        left, values, right = torch.linalg.svd(self.U)
        outside = (values < 0.5) | (values > 2)
        count = int(outside.sum())
        if count > len(values) / 3:
            self.set_weight(self.weight())
        elif count:
            moved = left[:, outside]
            self.V += (self.V @ moved) * (values[outside] - 1) @ moved.T
            values = torch.where(outside, 1, values)
            self.U = (left * values) @ right
            self.U_inv = (right.T / values) @ left.T
