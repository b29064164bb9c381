"""LegendreTron: a proper loss whose link is learnt with the model."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_lossplug.errors import LossplugError
from lightning_lossplug.losses.base import ClassificationLoss, check_parameter
from lightning_lossplug.registry import register


class PositiveLinear(nn.Linear):
    """Linear layer with weights ``softplus(raw)``, scaled by 1 / fan-in."""

    def forward(self, x: Tensor) -> Tensor:
        """Applies the layer to [R, in_features]."""
        return F.linear(x, F.softplus(self.weight), self.bias) / self.in_features


class ActNorm(nn.Module):
    """Shift and positive scale per unit; the first training batch sets them to zero mean and unit variance."""

    initialised: Tensor

    def __init__(self, features: int, learn_shift: bool = True) -> None:
        super().__init__()
        self.shift = nn.Parameter(torch.zeros(features), requires_grad=learn_shift)
        self.log_scale = nn.Parameter(torch.zeros(features))
        self.register_buffer("initialised", torch.tensor(False))

    def forward(self, x: Tensor) -> Tensor:
        """Normalises [R, features]; a batch of one row has no variance and initialises nothing."""
        if self.training and len(x) > 1 and not bool(self.initialised):
            with torch.no_grad():
                self.shift.copy_(-x.mean(dim=0))
                self.log_scale.copy_(-(x.std(dim=0, correction=0) + 1e-6).log())
                self.initialised.fill_(True)
        return (x + self.shift) * (self.log_scale.exp() + 1e-3)


class ICNN(nn.Module):
    """Input-convex network R^dim -> R: positive weights on the hidden path, free ones from the input."""

    def __init__(self, dim: int, hidden: int, depth: int) -> None:
        super().__init__()
        half = hidden // 2
        self.first = nn.Linear(dim, hidden)
        self.convex = nn.ModuleList(PositiveLinear(hidden, half) for _ in range(depth - 1))
        self.skips = nn.ModuleList(nn.Linear(dim, half) for _ in range(depth - 1))
        self.sides = nn.ModuleList(nn.Linear(dim, half) for _ in range(depth - 1))
        self.norms = nn.ModuleList(ActNorm(half) for _ in range(depth - 1))
        self.last = PositiveLinear(hidden, 1, bias=False)
        self.last_skip = nn.Linear(dim, 1, bias=False)
        self.last_norm = ActNorm(1, learn_shift=False)

    def forward(self, x: Tensor) -> Tensor:
        """Returns the potential [R] of points [R, dim]."""
        z = F.softplus(self.first(x))
        for convex, skip, side, norm in zip(self.convex, self.skips, self.sides, self.norms, strict=True):
            z = torch.cat([F.softplus(norm(convex(z) + skip(x))), F.softplus(side(x))], dim=1)
        return self.last_norm(self.last(z) + self.last_skip(x)).squeeze(1)


class ConvexGradient(nn.Module):
    """Monotone map: the gradient of ``softplus(w1) ICNN(x) + softplus(w0) |x|^2 / 2``."""

    def __init__(self, dim: int, hidden: int, depth: int) -> None:
        super().__init__()
        self.icnn = ICNN(dim, hidden, depth)
        self.w1, self.w0 = nn.Parameter(torch.randn(1)), nn.Parameter(torch.randn(1))

    def forward(self, x: Tensor) -> Tensor:
        """Maps points [R, dim]; also without gradients and in inference mode."""
        outer = torch.is_grad_enabled()
        with torch.inference_mode(False), torch.enable_grad():
            x = x.clone() if outer else x.detach().clone()
            x = x if x.requires_grad else x.requires_grad_()
            potential = F.softplus(self.w1) * self.icnn(x) + F.softplus(self.w0) * x.square().sum(dim=1) / 2
            return torch.autograd.grad(potential.sum(), x, create_graph=outer)[0]


@register(
    "loss",
    "legendretron",
    family="classification",
    paper="LegendreTron: Uprising Proper Multiclass Loss Learning",
    arxiv="2301.11695",
    signature="logits_index",
    needs=("num_classes",),
    stateful=True,
)
class LegendreTron(ClassificationLoss):
    r"""LegendreTron (arXiv 2301.11695): cross-entropy after a learnt monotone map of the scores.

    ``x <- grad_x [softplus(w1) ICNN(x) + softplus(w0) |x|^2 / 2]`` for every block, then the softmax of ``[x, 0]``:
    the loss stays proper whatever the network learns. The module has parameters, which have to be in the optimizer
    (the paper: Adam, 0.01), and predictions have to go through :meth:`predict_proba`. Backward differentiates twice, so
    use float32 or better and leave this module out of ``torch.compile``.

    When: the right loss is unknown and classes are many; small models, where the link's cost doesn't matter.

    Args:
        num_classes: C >= 2. The model gives C - 1 scores, or C logits, whose last one is then subtracted.
        n_blocks: Maps in a row, >= 1.
        hidden: Width of the convex networks, even, >= 2; the paper takes 2 to 4.
        depth: Their number of layers, >= 1.
        l2: Penalty ``l2 / 2`` times the squared norm of this module's parameters, added to every row, >= 0; the paper
            has it on the model's parameters too, which is the optimizer's weight decay.
        weight: Class weights [C].
        ignore_index: Label of rows that are left out.
        reduction: ``none``, ``mean`` or ``sum``.
    """

    def __init__(
        self,
        num_classes: int,
        n_blocks: int = 2,
        hidden: int = 4,
        depth: int = 4,
        l2: float = 0.01,
        weight: Tensor | list[float] | None = None,
        ignore_index: int = -100,
        reduction: str = "mean",
    ) -> None:
        super().__init__(weight, ignore_index, reduction)
        check_parameter(num_classes >= 2, "legendretron", "num_classes", num_classes, ">= 2")
        check_parameter(n_blocks >= 1, "legendretron", "n_blocks", n_blocks, ">= 1")
        check_parameter(hidden >= 2 and hidden % 2 == 0, "legendretron", "hidden", hidden, "even and >= 2")
        check_parameter(depth >= 1, "legendretron", "depth", depth, ">= 1")
        check_parameter(l2 >= 0, "legendretron", "l2", l2, ">= 0")
        self.num_classes, self.l2 = num_classes, l2
        self.blocks = nn.Sequential(*(ConvexGradient(num_classes - 1, hidden, depth) for _ in range(n_blocks)))

    def classes(self, z: Tensor) -> int:
        """The module's own number: the scores may be one fewer."""
        if z.shape[1] not in (self.num_classes - 1, self.num_classes):
            raise LossplugError(
                f"{z.shape[1]} scores for {self.num_classes} classes",
                where="legendretron",
                remedy=f"Expected {self.num_classes - 1} scores or {self.num_classes} logits",
            )
        return self.num_classes

    def log_proba(self, scores: Tensor) -> Tensor:
        """Returns the log-probabilities [R, C] of scores [R, C - 1] or logits [R, C]."""
        x = scores[:, :-1] - scores[:, -1:] if self.classes(scores) == scores.shape[1] else scores
        dtype = next(self.parameters()).dtype
        if dtype not in (torch.float32, torch.float64):
            raise LossplugError(f"the link is {dtype}", where="legendretron", remedy="Keep it in float32 or float64")
        x = self.blocks(x.to(dtype))
        return F.pad(x, (0, 1)).log_softmax(dim=1)

    def predict_proba(self, scores: Tensor) -> Tensor:
        """Returns the class probabilities [R, C]."""
        return self.log_proba(scores).exp()

    def rows(self, z: Tensor, y: Tensor) -> Tensor:
        """Negative log-likelihood after the link, plus the penalty."""
        nll = -self.log_proba(z).to(z.dtype).gather(1, y[:, None]).squeeze(1)
        return nll + self.l2 / 2 * torch.stack([p.square().sum() for p in self.parameters()]).sum()
