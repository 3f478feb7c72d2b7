"""Layers of the networks, each safe under forward-mode AD, eager and compiled (Sec. 4.1)."""

import fnmatch
import inspect
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import torch
import torch.nn.functional as nnF
from torch import Tensor, nn

from sclightning.ops import conv2d, linear
from sclightning.parallelize import local
from sclightning.segments import segment_index

# Activations take numbers through these overloads: `x * 0.5` is a product of two tensors, and under forward-mode AD
# PyTorch makes a zero tangent for the number and works out its shape in Python, a millisecond that an eager jvp waits.
aten = torch.ops.aten


class PositionalEmbedding(nn.Module):
    r"""Positional embedding of the time itself, with no factor 1000 in front (Sec. 4.1).

    Frequencies are :math:`10^{4\,\cdot\,(-k/(n-1))}`, k = 0 … n-1, n half the channels: smooth in t, unlike Fourier
    features of large scale, and so is the tangent of a network that starts with it.

    Args:
        channels: Width of the embedding, even.
    """

    def __init__(self, channels: int):
        super().__init__()
        if channels < 4 or channels % 2:
            raise ValueError(f"A positional embedding has {channels} channels; it needs an even number from 4 up.")
        self.half = channels // 2

    def forward(self, t: Tensor) -> Tensor:
        """Embed times (B,) as (B, channels) in float32 or wider, of mean square 1/2."""
        # Not a buffer: a module in half precision would round the frequencies.
        k = torch.arange(self.half, dtype=t.dtype, device=t.device)
        angles = t[:, None] * 10_000 ** (-k / (self.half - 1))
        return torch.cat([angles.cos(), angles.sin()], dim=1)


class GroupNorm(nn.Module):
    """Group normalisation whose affine part is an explicit multiplication and addition, modulated or not.

    ``nn.GroupNorm`` inside ``torch.func.jvp`` inside ``torch.compile`` fails (pytorch#160508, #197090).

    Args:
        channels: Number of channels; groups are of 4 channels at least and 32 in number at most.
        eps: Added to the variance.
    """

    def __init__(self, channels: int, eps: float = 1e-6):
        super().__init__()
        self.groups = math.gcd(min(32, max(channels // 4, 1)), channels)
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(channels))
        self.bias = nn.Parameter(torch.zeros(channels))

    def forward(self, x: Tensor, scale: Tensor | None = None, shift: Tensor | None = None) -> Tensor:
        """Normalise (B, C, H, W) over groups of channels and all positions, in float32 or wider.

        Args:
            x: Images.
            scale: Factor of what comes out, shape (B, C).
            shift: Added to it then, shape (B, C).
        """
        weight, bias = self.weight, self.bias
        if scale is not None:
            weight, bias = weight * scale, bias * scale
        if shift is not None:
            bias = bias + shift
        return group_norm(x, self.groups, self.eps, weight, bias)


def group_norm(x: Tensor, groups: int, eps: float, weight: Tensor | None = None, bias: Tensor | None = None) -> Tensor:
    """Group normalisation of (B, C, ...), in float32 or wider, with affine part (C,) or (B, C).

    All that a channel needs comes to two numbers, a factor and a shift; forward, backward and tangent then look at the
    images once for their sums, which is one kernel when compiled, and once to apply them. The price is a difference of
    squares: where a channel's mean is 30 times its spread it is exact to 2e-5, at 300 times to 3e-3.
    """
    positions, wide = tuple(range(2, x.ndim)), x.to(torch.promote_types(x.dtype, torch.float32))

    def over_group(channel: Tensor) -> Tensor:
        # Over positions, then over the few channels: one step for both is slow in channels-last, forward and backward.
        return channel.unflatten(1, (groups, -1)).mean(2, keepdim=True).expand(-1, -1, x.shape[1] // groups).flatten(1)

    channel, square = (y.mean(positions) if positions else y for y in (wide, wide.square()))
    mean = over_group(channel)
    # Of two parts, within and between channels: only the first is a difference, and rounding may make it negative.
    variance = over_group((square - channel.square()).clamp_min(0) + (channel - mean).square())
    scale = torch.rsqrt(variance + eps)
    if weight is not None:
        scale = scale * weight
    shift = -mean * scale if bias is None else bias - mean * scale
    everywhere = (..., *[None] * len(positions))
    return (wide * scale[everywhere] + shift[everywhere]).to(x.dtype)


def pixel_norm(x: Tensor, eps: float = 1e-8) -> Tensor:
    r"""Pixel normalisation :math:`x / \sqrt{\mathrm{mean}_c\,x^2 + \epsilon}` over dimension 1 (PGGAN; Sec. 4.1).

    The norm is taken in float32 or wider: half precision has no 1e-8, and no square of 256. Only ``x`` and the norms
    are kept for the backward pass.
    """
    wide = torch.promote_types(x.dtype, torch.float32)
    norm = torch.linalg.vector_norm(x, dim=1, keepdim=True, dtype=wide)
    mean_square = aten.div.Scalar(norm.square(), x.shape[1])
    return x * torch.rsqrt(aten.add.Scalar(mean_square, eps)).to(x.dtype)


class LabelEmbedding(nn.Module):
    """Linear embedding of class labels; label -1 embeds to zero, which is how a label is dropped for guidance.

    Args:
        num_classes: Number of classes.
        channels: Width of the embedding.
    """

    def __init__(self, num_classes: int, channels: int):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(num_classes, channels))

    def forward(self, label: Tensor) -> Tensor:
        """Embed labels (B,) of int64 in [-1, num_classes) as (B, channels)."""
        return self.weight[label.clamp_min(0)] * (label >= 0).to(self.weight.dtype)[:, None]


class SegmentEmbedding(nn.Module):
    """Learned embedding of the segment that a time is in; zero at first, since the teacher has none.

    A function of t that is as smooth as the time embedding cannot jump where one segment ends and another starts.

    Args:
        segments: Number of segments, see :mod:`sclightning.segments`.
        channels: Width of the embedding.
    """

    def __init__(self, segments: int, channels: int):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(segments, channels))

    def forward(self, t: Tensor) -> Tensor:
        """Embed times (B,) as (B, channels)."""
        return self.weight[segment_index(t, len(self.weight))]


class AdaptiveWeight(nn.Module):
    r"""Adaptive weight :math:`w_\phi(t)` of the objective (Sec. 4.1, App. D), a linear map of the positional embedding.

    With an L2-normalised tangent it must come to about :math:`\log D` (8 for CIFAR-10), flat in t: hence the bias.

    Args:
        channels: Width of the embedding.
    """

    def __init__(self, channels: int = 128):
        super().__init__()
        self.embedding = PositionalEmbedding(channels)
        self.linear = nn.Linear(channels, 1)
        nn.init.zeros_(self.linear.weight)
        nn.init.zeros_(self.linear.bias)

    def forward(self, t: Tensor) -> Tensor:
        """Weight of each time (B,), in float32."""
        # No linear: autocast would make it one of half precision.
        return (self.embedding(t) * self.linear.weight.float()).sum(1) + self.linear.bias.float()


def check_inputs(network: nn.Module, x: Tensor, t: Tensor, label: Tensor | None, guidance: Tensor | None) -> None:
    """Refuse inputs that break the contract of a backbone, in one sentence.

    Args:
        network: Has the attributes ``resolution``, ``in_channels``, ``num_classes`` and ``guidance``.
        x: Noisy images, shape (B, in_channels, resolution, resolution).
        t: Times in radians, shape (B,), float32 or float64.
        label: Class labels, shape (B,), int64 in [-1, num_classes).
        guidance: Guidance scales, shape (B,).

    Raises:
        TypeError: If ``x``, ``t`` or ``label`` has the wrong dtype.
        ValueError: If a shape is wrong, a label out of range, or a condition missing or superfluous.
    """
    expected = (network.in_channels, network.resolution, network.resolution)
    if x.shape[1:] != expected:
        raise ValueError(
            f"The network takes images of shape {expected}, not {tuple(x.shape[1:])}; "
            "set in_channels and resolution to those of the data."
        )
    weight = next(network.parameters())
    if x.dtype == torch.float64 != weight.dtype:
        raise TypeError(
            f"Images are float64 but the network's weights are {weight.dtype}; "
            "pass float32 images, or convert the network with .double()."
        )
    if t.dtype not in (torch.float32, torch.float64) or t.shape != x.shape[:1]:
        raise (TypeError if t.shape == x.shape[:1] else ValueError)(
            f"Times are {t.dtype} of shape {tuple(t.shape)}; "
            f"pass float32 radians of shape ({len(x)},), one per image, whatever the network's precision."
        )
    if (guidance is not None) != network.guidance:
        raise ValueError(
            f"The network was made with guidance={network.guidance}, but guidance was "
            f"{'missing' if network.guidance else 'given'}; pass a scale per sample exactly if it was."
        )
    if label is None:
        return
    if not network.num_classes:
        raise ValueError("The network has num_classes=0, but labels were given; set num_classes or drop them.")
    if label.dtype != torch.int64 or label.shape != x.shape[:1]:
        raise (TypeError if label.shape == x.shape[:1] else ValueError)(
            f"Labels are {label.dtype} of shape {tuple(label.shape)}; pass int64 of shape ({len(x)},), one per image."
        )
    # Only on the CPU: elsewhere looking at the values would make the host wait (there the lookup itself fails).
    if label.device.type == "cpu" and not torch.compiler.is_compiling():
        wrong = label[(label < -1) | (label >= network.num_classes)]
        if len(wrong):
            raise ValueError(
                f"Label {wrong[0].item()} is out of range; labels are -1 (none) to {network.num_classes - 1} "
                "for this network, so set num_classes to that of the data."
            )


def check_conditions(network: nn.Module, x: Tensor, t: Tensor, conditions: Mapping[str, Any]) -> None:
    """Refuse conditions for which a network's ``forward`` has no argument, in one sentence.

    Raises:
        ValueError: If there is such a condition, or no argument for the time.
    """
    if network._forward_pre_hooks:  # which may change what the forward is given
        return
    try:
        inspect.signature(network.forward).bind(x, t, **conditions)
    except TypeError as error:
        given = ", ".join(["x", "t", *(f"{name}={name}" for name in conditions)])
        raise ValueError(
            f"{type(network).__name__} is called as net({given}), which its forward does not take ({error}); give it "
            "these arguments (docs/extending.md), or use data without labels."
        ) from error


def load_renamed(
    network: nn.Module,
    state_dict: Mapping[str, Tensor],
    rename: Callable[[str], str | None],
    convert: Callable[[str, Tensor], Tensor],
    spare: Sequence[str] = ("*",),
) -> list[str]:
    """Copy weights that go by other names.

    Args:
        network: Network to fill.
        state_dict: Tensors by their names.
        rename: Maps a parameter's name to the one in ``state_dict``, or to None where it has no counterpart.
        convert: Maps (parameter's name, tensor) to the tensor in the network's layout.
        spare: Patterns of names in ``state_dict`` that need no place in the network, by default all.

    Returns:
        Names of the parameters without counterpart, which stay as they are.

    Raises:
        ValueError: If a tensor is missing, of another shape or without a place; nothing is copied then.
    """
    tensors, kept, left = {}, [], set(state_dict)
    for name, parameter in network.named_parameters():
        theirs = rename(name)
        if theirs is None:
            kept.append(name)
        elif theirs not in state_dict:
            raise ValueError(
                f"The state dict has no {theirs}, the counterpart of {name}; "
                "it must be that of a network with the same resolutions, blocks and conditions."
            )
        else:
            tensors[name] = convert(name, state_dict[theirs].detach())
            left.discard(theirs)
            if tensors[name].shape != parameter.shape:
                raise ValueError(
                    f"{theirs} gives a shape of {tuple(tensors[name].shape)} for {name}, expected "
                    f"{tuple(parameter.shape)}; make the network with the size of the published one."
                )
    homeless = sorted(name for name in left if not any(fnmatch.fnmatch(name, pattern) for pattern in spare))
    if homeless:
        raise ValueError(
            f"The state dict has {homeless[0]}, for which the network has no place; make it with double_norm: false "
            "and the conditions and attention_resolutions of the published one."
        )
    network.load_state_dict(tensors, strict=False)
    return kept


def num_heads(channels: int, head_channels: int) -> int:
    """Heads of attention over ``channels``.

    Raises:
        ValueError: If the channels do not divide into heads.
    """
    if channels % head_channels:
        raise ValueError(
            f"Attention over {channels} channels does not divide into heads of {head_channels}; choose head_channels "
            "that divides channels times every entry of channel_mult with attention."
        )
    return channels // head_channels


def resample(x: Tensor, mode: Literal["down", "up"] | None) -> Tensor:
    """Halve images (B, C, H, W) by averaging 2x2 pixels, double them by repeating pixels, or leave them."""
    if mode == "down":
        return nnF.avg_pool2d(x, 2)
    if mode == "up":
        # Not interpolate, whose gradient Inductor adds up atom by atom.
        B, C, H, W = x.shape
        if is_channels_last(x):
            pixels = x.permute(0, 2, 3, 1)[:, :, None, :, None].expand(-1, -1, 2, -1, 2, -1)
            return pixels.reshape(B, 2 * H, 2 * W, C).permute(0, 3, 1, 2)
        return x[:, :, :, None, :, None].expand(-1, -1, -1, 2, -1, 2).reshape(B, C, 2 * H, 2 * W)
    return x


def is_channels_last(x: Tensor) -> bool:
    """Whether images (B, C, H, W) lie in memory as (B, H, W, C)."""
    return x.is_contiguous(memory_format=torch.channels_last) and not x.is_contiguous()


def mp_silu(x: Tensor) -> Tensor:
    r"""Magnitude-preserving SiLU, :math:`\mathrm{silu}(x)/0.596`: unit mean square for x ~ N(0, 1) (EDM2, Eq. 81)."""
    return aten.div.Scalar(nnF.silu(x), 0.596)


def mp_sum(a: Tensor, b: Tensor, weight: float) -> Tensor:
    r"""Magnitude-preserving sum :math:`((1-w)\,a + w\,b)/\sqrt{(1-w)^2 + w^2}` (EDM2, Eq. 88).

    Args:
        a: Main path, of unit mean square.
        b: Branch of the same shape, of unit mean square and uncorrelated with ``a``.
        weight: Share w of the branch, in [0, 1].
    """
    norm = math.hypot(1 - weight, weight)
    return aten.mul.Scalar(a, (1 - weight) / norm) + aten.mul.Scalar(b, weight / norm)


def mp_cat(a: Tensor, b: Tensor) -> Tensor:
    """Magnitude-preserving concatenation over dimension 1; both weigh the same whatever their width (EDM2, Eq. 103)."""
    n_a, n_b = a.shape[1], b.shape[1]
    half = math.sqrt((n_a + n_b) / 2)
    return torch.cat([aten.mul.Scalar(x, half / math.sqrt(n)) for x, n in ((a, n_a), (b, n_b))], dim=1)


class MPWeight(nn.Module):
    r"""A weight whose rows (one per output) have unit norm where they are used (EDM2, Eq. 47).

    The stored weight is normalised in the forward pass, with gradient; :meth:`normalize_weight` also rewrites it after
    each optimizer step, so that the effective learning rate does not decay as the weight grows (EDM2, Eq. 66). That is
    not done in the forward pass, where a copy in place would break forward-mode AD.

    Args:
        shape: Shape of the weight, outputs first.
    """

    def __init__(self, *shape: int):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(shape))
        self.normalize_weight()

    @torch.no_grad()
    def normalize_weight(self) -> None:
        """Forced weight normalisation: rescale each row of the stored weight to unit mean square."""
        # FSDP2 shards by rows, so that a device's own rows are all it needs.
        weight = local(self.weight)
        weight.copy_(_unit_mean_square(weight))

    def effective_weight(self, dtype: torch.dtype) -> Tensor:
        """Weight of unit-norm rows, computed in float32 or wider, in ``dtype``."""
        return (_unit_mean_square(self.weight) * self.weight[0].numel() ** -0.5).to(dtype)


class MPLinear(MPWeight):
    """Magnitude-preserving linear map without bias.

    Args:
        c_in: Input features.
        c_out: Output features.
    """

    def __init__(self, c_in: int, c_out: int):
        super().__init__(c_out, c_in)

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, c_in) to (B, c_out)."""
        return linear(x, self.effective_weight(x.dtype))


class MPLabelEmbedding(MPWeight):
    """Magnitude-preserving embedding of class labels: a linear map of one-hot vectors; label -1 embeds to zero.

    Args:
        num_classes: Number of classes.
        channels: Width of the embedding.
    """

    def __init__(self, num_classes: int, channels: int):
        super().__init__(channels, num_classes)

    def forward(self, label: Tensor) -> Tensor:
        """Embed labels (B,) of int64 in [-1, num_classes) as (B, channels), of unit mean square over the classes."""
        rows = _unit_mean_square(self.weight).t()[label.clamp_min(0)]
        return rows * (label >= 0).to(rows.dtype)[:, None]


class MPConv2d(MPWeight):
    """Magnitude-preserving convolution of stride 1, padded to the same size, without bias.

    Args:
        c_in: Input channels.
        c_out: Output channels.
        kernel: Height and width of the filters, odd.
    """

    def __init__(self, c_in: int, c_out: int, kernel: int):
        super().__init__(c_out, c_in, kernel, kernel)

    def forward(self, x: Tensor) -> Tensor:
        """Convolve (B, c_in, H, W) to (B, c_out, H, W)."""
        return conv2d(x, self.effective_weight(x.dtype), padding=self.weight.shape[-1] // 2)


def _unit_mean_square(weight: Tensor) -> Tensor:
    wide = weight.to(torch.promote_types(weight.dtype, torch.float32))
    return pixel_norm(wide.flatten(1)).view_as(wide)
