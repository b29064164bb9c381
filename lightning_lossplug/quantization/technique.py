"""Quantisation-aware training as a technique: which layers, which quantisers, where their scales start."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_lossplug.errors import LossplugError
from lightning_lossplug.quantization.attention import AttentionQuant, Probabilities
from lightning_lossplug.quantization.base import Quantizer
from lightning_lossplug.quantization.bivit import BiViT
from lightning_lossplug.quantization.grid import EPS, check_bits, check_choice, check_range
from lightning_lossplug.quantization.lsq import LSQ
from lightning_lossplug.quantization.self_compress import SelfCompress
from lightning_lossplug.quantization.sharding import keep_new_scales, set_from_weight
from lightning_lossplug.quantization.transform import QuantTransform
from lightning_lossplug.registry import registry
from lightning_lossplug.schedules import Progress
from lightning_lossplug.surgery.attention import find_attention, plug_attention, unplug_attention
from lightning_lossplug.surgery.plug import (
    is_transform_key,
    latent,
    plug,
    plug_input,
    transform_of,
    unplug,
    unplug_input,
)
from lightning_lossplug.surgery.select import (
    Candidate,
    Choice,
    Selection,
    default_exclusions,
    matches,
    select,
)
from lightning_lossplug.surgery.shards import full
from lightning_lossplug.technique import Technique

SEARCHED = ("lsq", "lsq_plus")  # up to 4 bits their steps start at the least squared error
ENDS = ("output layer", "first convolution")  # reasons of default_exclusions that first_last_bits overrides


@dataclass(frozen=True)
class QATSettings:
    """Settings of :class:`QATTechnique`.

    Args:
        bits_w: Bits of the weights: 1, 1.58 or 2 to 8; None leaves them as they are.
        bits_a: Bits of each layer's input, 2 to 8; None leaves it as it is.
        weight: Registry name of the weights' quantiser; None: ``paretoq`` up to 2 bits, ``lsq`` above.
        activation: Registry name of the inputs' quantiser: ``lsq`` learns one step per layer, ``dynamic`` measures one
            per token, which language models need.
        granularity: ``tensor``, ``channel`` or ``group``: what shares a scale of the weights.
        group_size: Weights per group, for ``group``.
        include: Glob patterns of layer paths; None: every product but embeddings and depthwise convolutions. A mapping
            gives every pattern its own bits: ``{"*.mlp.*": "w4a8", "*.attn.*": "w8"}``; the first match counts.
        exclude: Glob patterns that are left out.
        first_last_bits: Bits of the first convolution and the output layer, where ``include`` doesn't name them; None
            leaves them as they are. The step of the images is measured, not learned.
        weight_options: Further parameters of the weights' quantiser. Up to 4 bits ``lsq`` and ``lsq_plus`` get
            ``init="mse"`` unless these say otherwise.
        activation_options: Further parameters of the inputs' quantiser, likewise.
        init_batches: Training batches that set the scales of inputs.
        scale_update: ``multiplicative`` makes an optimizer's step d on a scale s the step d on log s, so s becomes
            s exp(d); ``additive`` leaves it; ``auto`` is multiplicative with optimizers of the Adam kind (those with
            ``betas``), whose steps are as large as the learning rate however small the scale.
        scale_lr: Learning rate of the scales, as a factor of their layer's.
        scale_weight_decay: Weight decay of the scales.
        scale_group: Give scales optimizer groups of their own; without it they stay where the user put them, with
            that group's options.
        attention_bits: Bits of the queries, keys and values that enter the products of attention modules, 1 to 8 (1
            are signs); None leaves attention as it is.
        softmax_bits: Bits of the attention's probabilities, 1 to 8 (1 is BiViT's); None: as ``attention_bits``.
    """

    bits_w: float | None = 8
    bits_a: int | None = 8
    weight: str | None = None
    activation: str = "lsq"
    granularity: str = "channel"
    group_size: int | None = None
    include: list[str] | dict[str, str] | None = None
    exclude: list[str] = field(default_factory=list)
    first_last_bits: int | None = 8
    weight_options: dict[str, Any] = field(default_factory=dict)
    activation_options: dict[str, Any] = field(default_factory=dict)
    init_batches: int = 1
    scale_update: str = "auto"
    scale_lr: float = 1.0
    scale_weight_decay: float = 0.0
    scale_group: bool = True
    attention_bits: int | None = None
    softmax_bits: int | None = None

    def __post_init__(self) -> None:
        where = "QAT"
        check_choice(where, "granularity", self.granularity, ("tensor", "channel", "group"))
        if (self.granularity == "group") != (self.group_size is not None):
            raise LossplugError(
                f"granularity is {self.granularity!r} and group_size {self.group_size!r}",
                where=where,
                remedy="Give group_size with granularity='group', and only then",
            )
        check_choice(where, "scale_update", self.scale_update, ("auto", "additive", "multiplicative"))
        for name in ("scale_lr", "scale_weight_decay"):
            check_range(where, name, getattr(self, name), 0)
        check_range(where, "init_batches", self.init_batches, 1)
        if self.first_last_bits is not None:
            check_range(where, "first_last_bits", self.first_last_bits, 1, 8)
        for bits_w, bits_a in self.patterns().values():
            if bits_w is None and bits_a is None:
                raise LossplugError("nothing is to be quantised", where=where, remedy="Give bits_w, bits_a or both")
            self.build(bits_w, "weight")  # a wrong value is an error now, not when the Trainer starts
            self.build(bits_a, "activation")
        if self.attention_bits is not None:
            self.build_attention()
        elif self.softmax_bits is not None:
            raise LossplugError(
                f"softmax_bits is {self.softmax_bits} and attention_bits null",
                where=where,
                remedy="Give attention_bits",
            )

    def patterns(self) -> dict[str, tuple[float | None, float | None]]:
        """Returns ``{glob: (bits of the weights, bits of the inputs)}``."""
        if isinstance(self.include, dict):
            return {glob: parse_bits(text) for glob, text in self.include.items()}
        return dict.fromkeys(self.include or ["*"], (self.bits_w, self.bits_a))

    def build(
        self, bits: float | None, role: str, axis: int = 0, block_axis: int = -1, own: bool = True
    ) -> Quantizer | None:
        """Builds a quantiser, or returns None for no bits.

        Args:
            bits: Bits.
            role: ``weight`` or ``activation``.
            axis: Axis of the channels.
            block_axis: Axis of the blocks of a block format.
            own: Use the quantiser of the settings; else ``lsq``.

        Raises:
            LossplugError: The quantiser isn't for this role, or has other bits.
        """
        if bits is None:
            return None
        if isinstance(bits, bool) or not isinstance(bits, (int, float)) or not math.isfinite(bits):
            allowed = "1, 1.58 or 2 to 8" if role == "weight" else "2 to 8"
            raise LossplugError(f"the bits of {_plural(role)} are {bits!r}, allowed is {allowed}", where="QAT")
        chosen = self.weight or ("paretoq" if bits <= 2 else "lsq") if role == "weight" else self.activation
        entry = registry.get("quantizer", chosen if own else "lsq")
        if role not in entry.facts["roles"]:
            raise LossplugError(f"{entry.name} is no quantiser of {_plural(role)}", where="QAT")
        known = {parameter.name for parameter in entry.parameters()}
        options: dict[str, Any] = {"role": role, "bits": int(bits) if int(bits) == bits else bits}
        options["axis"] = block_axis if entry.facts.get("blocks") else axis
        if role == "weight":
            options["per_channel"] = self.granularity == "channel"
            options["group_size"] = self.group_size
        else:
            options["init_batches"] = self.init_batches
        if entry.name in SEARCHED and bits <= 4:
            options["init"] = "mse"
        given = (self.weight_options if role == "weight" else self.activation_options) if own else {}
        options = {key: value for key, value in options.items() if key in known}
        quantizer: Quantizer = registry.create("quantizer", entry.name, **(options | given))
        if quantizer.bits != bits:
            raise LossplugError(
                f"{entry.name} makes {quantizer.bits} bits, {bits} are asked for",
                where="QAT",
                remedy=f"Set the bits of {_plural(role)} to {quantizer.bits}, or other {role}_options",
            )
        return quantizer

    def build_attention(self) -> AttentionQuant:
        """Builds the quantisers of one attention module.

        Raises:
            LossplugError: Bits out of range.
        """
        bits = check_bits("QAT", self.attention_bits or 0, 1, 8)
        soft = check_bits("QAT", bits if self.softmax_bits is None else self.softmax_bits, 1, 8)
        own = self.fits(bits, "activation")
        operands: list[Any]
        if bits == 1:
            operands = [BiViT(role="activation") for _ in range(3)]
        else:  # the values are summed over the axis of tokens, which is where a block format has its blocks
            operands = [self.build(bits, "activation", block_axis=axis, own=own) for axis in (-1, -1, -2)]
        query, key, value = operands
        return AttentionQuant(query, key, value, Probabilities(soft, self.init_batches) if soft > 1 else None)

    def fits(self, bits: float, role: str) -> bool:
        """Whether the quantiser of the settings can have these bits."""
        try:
            self.build(bits, role)
        except LossplugError:  # the first and last layers of a 2-bit network, say: its quantiser has no 8 bits
            return False
        return True


def _plural(role: str) -> str:
    return "weights" if role == "weight" else "inputs"


def parse_bits(text: str) -> tuple[float | None, float | None]:
    """Parses ``"w4a8"``, ``"w1.58"`` or ``"a8"``.

    Raises:
        LossplugError: Another form.
    """
    match = re.fullmatch(r"(?:w(\d+(?:\.\d+)?))?(?:a(\d+))?", str(text))
    if match is None or not text:
        raise LossplugError(f"{text!r} says no bits", where="QAT", remedy="Write it like 'w4a8', 'w2' or 'a8'")
    w, a = match.groups()
    return None if w is None else float(w), None if a is None else float(a)


@dataclass
class QuantLayer:
    """One quantised layer."""

    candidate: Candidate
    weight: Quantizer | None
    activation: Quantizer | None
    twins: list[tuple[nn.Module, str]]  # other layers that read the same Parameter

    def quantizers(self) -> list[tuple[str, Quantizer]]:
        """Returns ``(name, quantiser)``."""
        found = (("weight", self.weight), ("input", self.activation))
        return [(f"{self.candidate.name}.{kind}", q) for kind, q in found if q is not None]

    @property
    def latent(self) -> nn.Parameter:
        """The Parameter, before any transform."""
        return latent(self.candidate.layer, self.candidate.parameter)


@dataclass
class AttendedModule:
    """One attention module with quantised operands."""

    module: nn.Module
    transform: AttentionQuant
    owner: nn.Parameter  # the optimizer that has it gets the scales


SettingsT = TypeVar("SettingsT", bound=QATSettings)


class QATTechnique(Technique[SettingsT], Generic[SettingsT]):
    """Weights and inputs of the selected layers pass through quantisers with learned scales.

    Scales are parameters of the plugged layers; :meth:`owners` names them for the optimizer. The weights' scales are
    set when they are first read, the inputs' from the first training batches.
    """

    name = "QAT"

    def __init__(self, settings: SettingsT) -> None:
        super().__init__(settings)
        self.layers: dict[str, QuantLayer] = {}
        self.attention: dict[str, AttendedModule] = {}
        self.attention_left: dict[str, str] = {}  # attention modules that stay as they are, and why
        self.trained = False
        self._before: list[tuple[nn.Parameter, Tensor]] = []  # scales and their values before the step

    def attach(self, model: nn.Module) -> Selection:
        """Plugs the selected layers; see :meth:`Technique.attach`."""
        patterns = self.settings.patterns()
        include = None if self.settings.include is None else list(patterns)
        selection = select(model, include, self.settings.exclude, check=self._check, technique=self.name)
        selection, ends = self._with_ends(model, selection, include)
        for candidate in selection.taken:
            known = self.layers.get(candidate.name)
            if known is not None and known.candidate.layer is candidate.layer:
                continue
            bits_w, bits_a = next(bits for glob, bits in patterns.items() if matches([glob], candidate))
            if candidate.name in ends:
                end = float(self.settings.first_last_bits or 8)
                bits_w, bits_a = bits_w and end, bits_a and end
            layer = self.layers[candidate.name] = self._plug(model, candidate, bits_w, bits_a)
            if ends.get(candidate.name, "").startswith("first convolution") and isinstance(layer.activation, LSQ):
                # Images carry no gradient: to learn their step the backward pass would go on through a whole layer.
                layer.activation.init = self.settings.activation_options.get("init", "minmax")
                layer.activation.s.requires_grad_(False)
        paying = [layer.weight for layer in self.layers.values() if isinstance(layer.weight, SelfCompress)]
        for quantizer in paying:
            quantizer.total_weights = sum(each.own_weights for each in paying)
        if self.settings.attention_bits is not None:
            self._plug_attention(model)
        return selection

    def _plug_attention(self, model: nn.Module) -> None:
        for name, (module, reason) in find_attention(model).items():
            known = self.attention.get(name)
            if known is not None and known.module is module:
                continue
            parameters = ((key, p) for key, p in module.named_parameters() if not is_transform_key(key))
            owner = next((p for _, p in parameters if p.is_floating_point()), None)
            if any(fnmatchcase(name, glob) for glob in self.settings.exclude):
                reason = "excluded"
            elif owner is None:
                reason = reason or "it has no parameter beside which an optimizer could hold its scales"
            if reason is not None or owner is None:
                self.attention_left[name] = str(reason)
                continue
            transform = self.settings.build_attention()
            for operand, quantizer in transform.quantizers():
                quantizer.where = f"{name} ({operand})"
            plug_attention(module, transform, where=name)
            self.attention[name] = AttendedModule(module, transform, owner)

    def _check(self, candidate: Candidate) -> str | None:
        weight = latent(candidate.layer, candidate.parameter)
        return None if weight.is_floating_point() else f"its dtype is {weight.dtype}"

    def _with_ends(
        self, model: nn.Module, selection: Selection, include: list[str] | None
    ) -> tuple[Selection, dict[str, str]]:
        # The first convolution and the output layer are left out by select; here they get bits of their own.
        if self.settings.first_last_bits is None:
            return selection, {}
        reasons = default_exclusions(model)
        choices, ends = [], {}
        for choice in selection.choices:
            candidate = choice.candidate
            reason = reasons.get(id(latent(candidate.layer, candidate.parameter)), "")
            wanted = include is None or matches(include, candidate)
            excluded = matches(self.settings.exclude, candidate)
            if choice.taken or excluded or not wanted or not reason.startswith(ENDS):
                choices.append(choice)
                continue
            ends[candidate.name] = reason
            choices.append(Choice(candidate, True, f"{self.settings.first_last_bits} bits: {reason}"))
        return Selection(tuple(choices)), ends

    def _plug(self, model: nn.Module, candidate: Candidate, bits_w: float | None, bits_a: float | None) -> QuantLayer:
        settings, layer, reduction = self.settings, candidate.layer, candidate.reduction_axis
        own_w = bits_w is None or settings.fits(bits_w, "weight")
        own_a = bits_a is None or settings.fits(bits_a, "activation")
        weight = settings.build(
            bits_w,
            "weight",
            axis=1 if reduction == 0 else 0,
            block_axis=-1 if reduction is None else reduction,
            own=own_w,
        )
        convolution = isinstance(layer, (nn.Conv1d, nn.Conv2d, nn.Conv3d))
        called = candidate.parameter == "weight" and reduction is not None
        # nn.MultiheadAttention reads the weights of its projections itself, so their inputs never pass the layer.
        called = called and type(layer).__name__.removeprefix("Plugged") != "NonDynamicallyQuantizableLinear"
        activation = settings.build(bits_a if called else None, "activation", 0, 1 if convolution else -1, own_a)
        twins: list[tuple[nn.Module, str]] = []
        if weight is not None:
            parameter = latent(layer, candidate.parameter)
            weight.where = f"{candidate.name}.{candidate.parameter}"
            weight.layout.check(parameter.shape, candidate.name)
            transform = QuantTransform(weight)
            plug(layer, transform, parameter=candidate.parameter, where=candidate.name)
            for other in model.modules():
                for name, value in other._parameters.items():
                    if value is parameter and other is not layer:
                        # A tied weight: both readers share the quantiser, or they would compute with two weights.
                        plug(other, transform, parameter=name, where=candidate.name)
                        twins.append((other, name))
            weight.initialize(parameter)
            weight.to(parameter.device)
        if activation is not None:
            activation.where = f"{candidate.name} (input)"
            plug_input(layer, QuantTransform(activation), where=candidate.name)
        return QuantLayer(candidate, weight, activation, twins)

    def quantizers(self) -> Iterator[tuple[str, Quantizer]]:
        """Yields ``(name, quantiser)`` of every weight, input and operand of attention."""
        for layer in self.layers.values():
            yield from layer.quantizers()
        for name, attended in self.attention.items():
            for operand, quantizer in attended.transform.quantizers():
                yield f"{name}.{operand}", quantizer

    def owners(self) -> list[tuple[nn.Parameter, list[nn.Parameter]]]:
        """Returns the weight and the trainable scales of every layer."""
        found = [(layer.latent, [q for _, q in layer.quantizers()]) for layer in self.layers.values()]
        found += [(a.owner, [q for _, q in a.transform.quantizers()]) for a in self.attention.values()]
        return [(owner, [p for q in made for p in q.parameters() if p.requires_grad]) for owner, made in found]

    def named_scales(self) -> dict[str, nn.Parameter]:
        """Returns every trainable scale by the name of its layer."""
        return {
            f"{name}.{key}": parameter
            for name, quantizer in self.quantizers()
            for key, parameter in quantizer.named_parameters()
            if parameter.requires_grad
        }

    def advance(self, progress: Progress) -> None:
        """Moves the quantisers' own schedules; refuses pruned weights on a grid without 0."""
        if progress.step == 0:
            self._check_stack()
        self.trained = self.trained or progress.step > 0
        fraction = progress.fraction if progress.total_steps is not None else 0.0
        for _, quantizer in self.quantizers():
            quantizer.advance(fraction)

    def _check_stack(self) -> None:
        for name, layer in self.layers.items():
            masked = transform_of(layer.candidate.layer, "sparsity", layer.candidate.parameter)
            if masked is not None and layer.weight is not None and not layer.weight.has_zero:
                raise LossplugError(
                    f"{layer.weight.name} at {layer.weight.bits} bits has no level at 0, so pruned weights would not "
                    "stay pruned",
                    where=name,
                    remedy="Use 1.58, 3 or more bits, or exclude the layer from one of the two",
                )

    def after_forward(self, model: nn.Module) -> None:
        """Keeps scales that the forward pass has set, also where parameters are sharded; before the backward pass."""
        keep_new_scales(model, (quantizer for _, quantizer in self.quantizers()))

    @torch.no_grad()
    def before_step(self, optimizer: Optimizer, grad_scale: float = 1.0) -> None:
        """Adds the gradients of the quantisers' own penalties; remembers scales that change by factors."""
        held = {id(p) for group in optimizer.param_groups for p in group["params"]}
        update = self.settings.scale_update
        by_factors = update == "multiplicative" or (update == "auto" and "betas" in optimizer.defaults)
        self._before.clear()
        for _, quantizer in self.quantizers():
            if any(id(p) in held for p in quantizer.parameters()):
                quantizer.add_gradients(grad_scale)
            for name in quantizer.positive if by_factors else ():
                scale = quantizer.get_parameter(name)
                if id(scale) in held and scale.grad is not None:
                    self._before.append((scale, scale.detach().clone()))

    @torch.no_grad()
    def after_step(self, optimizer: Optimizer) -> None:
        """Takes the optimizer's step on those scales as a step of their logarithm."""
        for scale, old in self._before:
            scale.copy_(old * (scale - old).exp())
        self._before.clear()

    def detach(self, model: nn.Module) -> None:
        """Takes the quantisers off; the latent weights stay."""
        for layer in self.layers.values():
            candidate = layer.candidate
            for owner, parameter in ((candidate.layer, candidate.parameter), *layer.twins):
                unplug(owner, "quantization", parameter=parameter)
            unplug_input(candidate.layer, "quantization")
        for attended in self.attention.values():
            unplug_attention(attended.module)
        self.attention.clear()
        self.layers.clear()

    def reset(self) -> None:
        """Sets the weights' scales anew, unless they have been trained."""
        if self.trained:
            return
        for layer in self.layers.values():
            if layer.weight is not None:
                layer.weight.forget()
                set_from_weight(layer.weight, layer.latent)

    def logs(self) -> dict[str, float | Tensor]:
        """Health of the scales: the share that is clamped, and the smallest and largest one."""
        positive = [
            full(quantizer.get_parameter(name)).flatten().float()
            for _, quantizer in self.quantizers()
            for name in quantizer.positive
            if quantizer.ready
        ]
        if not positive:
            return {}
        scales = torch.cat(positive)
        return {
            "scales_clamped": (scales <= EPS).float().mean(),
            "scale_min": scales.min(),
            "scale_max": scales.max(),
        }

    def finish(self) -> list[str]:
        """Names quantisers of inputs that no batch has reached."""
        idle = [n for n, layer in self.layers.items() if layer.activation is not None and not layer.activation.ready]
        idle += [n for n, attended in self.attention.items() if not attended.transform.query.ready]
        if not idle:
            return []
        return [
            f"{self.name}: no training batch passed through {len(idle)} layers, the first is {idle[0]}; their inputs "
            "are not quantised. Exclude them, or set bits_a to null for them"
        ]

    def state_dict(self) -> dict[str, Any]:
        """What is quantised and to how many bits; scales are parameters of the model."""
        layers: dict[str, list[Any]] = {
            name: [layer.weight and layer.weight.bits, layer.activation and layer.activation.bits]
            for name, layer in self.layers.items()
        }
        for name, attended in self.attention.items():
            soft = attended.transform.probabilities
            layers[f"{name} (attention)"] = [attended.transform.query.bits, 1 if soft is None else soft.bits]
        return {"layers": layers, "trained": self.trained}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restores :meth:`state_dict`.

        Raises:
            LossplugError: The checkpoint was made with other layers or bits.
        """
        mine = QATTechnique.state_dict(self)["layers"]
        if state["layers"] != mine:
            other = sorted(n for n in {*mine, *state["layers"]} if mine.get(n) != state["layers"].get(n))[0]
            raise LossplugError(
                f"the checkpoint has bits {state['layers'].get(other)} there, this run {mine.get(other)}",
                where=f"{self.name}: {other}",
                remedy="Resume with the bits, include, exclude and model of the first run",
            )
        self.trained = state["trained"]
