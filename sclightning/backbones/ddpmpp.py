"""DDPM++ (Song et al., Score SDE) in EDM's settings, with the sCM paper's embedding and normalisation (Sec. 4.1).

With the default arguments it is the paper's CIFAR-10 network; smaller arguments make networks for small images.
"""

import math
from collections.abc import Mapping, Sequence

import torch
import torch.nn.functional as nnF
from torch import Tensor, nn

from sclightning.backbones.layers import (
    GroupNorm,
    LabelEmbedding,
    PositionalEmbedding,
    SegmentEmbedding,
    check_inputs,
    load_renamed,
    num_heads,
    pixel_norm,
    resample,
)
from sclightning.ops import Conv2d, Linear, jvp_attention


class DDPMpp(nn.Module):
    r"""U-Net of residual blocks, :math:`F = net(x, t, label, guidance)`.

    Args:
        resolution: Height and width of the images.
        in_channels: Channels of the images.
        channels: Channels at the full resolution.
        channel_mult: Multiplier of the channels per level; each level halves the resolution.
        num_blocks: Residual blocks per level.
        attention_resolutions: Resolutions whose blocks have self-attention.
        head_channels: Channels of one attention head; all channels in one head if not given.
        dropout: Dropout probability inside the blocks.
        dropout_resolution: Largest resolution that has dropout; all have it if not given.
        num_classes: Number of class labels; 0 for an unconditional network.
        guidance: Whether the network takes a guidance scale.
        augment_dim: Width of EDM's augmentation condition, passed as ``augment``; 0 for none.
        segments: Segments of a multi-step consistency model, in which of them ``t`` is the network is told by a learned
            embedding, see :mod:`sclightning.segments`.
        double_norm: Adaptive double normalisation ``norm(x) * pnorm(s) + pnorm(b)`` (Sec. 4.1) in place of the stock
            additive modulation ``norm(x + b)``.
        input_skip: Whether the noisy image times a learned function of the embedding is added to the output, under
            autocast in float32. Where the data is certain, as in a black background, F is a multiple of the noisy image
            less a constant, which the network otherwise carries through its norms and nonlinearities. Not in the
            paper's network.
    """

    def __init__(
        self,
        resolution: int = 32,
        in_channels: int = 3,
        channels: int = 128,
        channel_mult: Sequence[int] = (2, 2, 2),
        num_blocks: int = 4,
        attention_resolutions: Sequence[int] = (16,),
        head_channels: int | None = None,
        dropout: float = 0.0,
        dropout_resolution: int | None = None,
        num_classes: int = 0,
        guidance: bool = False,
        augment_dim: int = 0,
        double_norm: bool = True,
        segments: int = 1,
        input_skip: bool = False,
    ):
        super().__init__()
        if resolution % 2 ** (len(channel_mult) - 1):
            raise ValueError(
                f"Images of {resolution}x{resolution} cannot be halved {len(channel_mult) - 1} times; "
                "give fewer entries in channel_mult."
            )
        self.resolution, self.in_channels = resolution, in_channels
        self.num_classes, self.guidance, self.double_norm = num_classes, guidance, double_norm
        self.augment_dim = augment_dim

        self.time_embedding = PositionalEmbedding(channels)
        self.label_embedding = LabelEmbedding(num_classes, channels) if num_classes else None
        self.guidance_embedding = Linear(channels, channels, bias=False) if guidance else None
        self.augment_embedding = Linear(augment_dim, channels, bias=False) if augment_dim else None
        if guidance:
            nn.init.zeros_(self.guidance_embedding.weight)  # the teacher, whose weights come first, knows no guidance
        self.segments = segments
        self.segment_embedding = SegmentEmbedding(segments, channels) if segments > 1 else None
        self.map_layer0 = _xavier(Linear(channels, 4 * channels))
        self.map_layer1 = _xavier(Linear(4 * channels, 4 * channels))

        def block(c_in: int, c_out: int, size: int, resample: str | None = None, attention: bool = False) -> Block:
            return Block(
                c_in,
                c_out,
                emb_channels=4 * channels,
                resample=resample,
                attention=attention,
                head_channels=head_channels,
                dropout=dropout if dropout_resolution is None or size <= dropout_resolution else 0.0,
                double_norm=double_norm,
            )

        self.encoder, self.decoder = nn.ModuleDict(), nn.ModuleDict()
        self.encoder[f"{resolution}x{resolution}_conv"] = _xavier(Conv2d(in_channels, channels, 3, padding=1))
        width, skips = channels, [channels]
        for level, mult in enumerate(channel_mult):
            size = resolution >> level
            if level:
                self.encoder[f"{size}x{size}_down"] = block(width, width, size, resample="down")
                skips.append(width)
            for i in range(num_blocks):
                attention = size in attention_resolutions
                self.encoder[f"{size}x{size}_block{i}"] = block(width, mult * channels, size, attention=attention)
                width = mult * channels
                skips.append(width)

        for level, mult in reversed(list(enumerate(channel_mult))):
            size = resolution >> level
            if level == len(channel_mult) - 1:
                self.decoder[f"{size}x{size}_in0"] = block(width, width, size, attention=True)
                self.decoder[f"{size}x{size}_in1"] = block(width, width, size)
            else:
                self.decoder[f"{size}x{size}_up"] = block(width, width, size, resample="up")
            for i in range(num_blocks + 1):
                attention = i == num_blocks and size in attention_resolutions
                c_in = width + skips.pop()
                self.decoder[f"{size}x{size}_block{i}"] = block(c_in, mult * channels, size, attention=attention)
                width = mult * channels
        self.out_norm = GroupNorm(width)
        self.out_conv = _xavier(Conv2d(width, in_channels, 3, padding=1), gain=1e-5)
        self.input_gain = _xavier(Linear(4 * channels, 1), gain=0.0) if input_skip else None

    def forward(
        self,
        x: Tensor,
        t: Tensor,
        label: Tensor | None = None,
        guidance: Tensor | None = None,
        augment: Tensor | None = None,
    ) -> Tensor:
        """Velocity of unit variance.

        Args:
            x: Noisy images of unit variance, shape (B, in_channels, resolution, resolution).
            t: Times in radians, shape (B,), float32.
            label: Class labels, int64 in [-1, num_classes), shape (B,); -1, or None for all, is "no label".
            guidance: Guidance scales, shape (B,), float32; required exactly if the network was made with it.
            augment: Augmentation condition, shape (B, augment_dim); zeros, the images as they are, if not given.

        Returns:
            F, shape of ``x``.
        """
        check_inputs(self, x, t, label, guidance)
        if augment is not None and self.augment_embedding is None:
            raise ValueError("The network has augment_dim=0, but augment was given; set augment_dim or drop it.")
        x = x.to(self.out_conv.weight.dtype)
        emb = self.time_embedding(t).to(x.dtype)
        if label is not None:
            emb = emb + self.label_embedding(label)
        if guidance is not None:
            emb = emb + self.guidance_embedding(self.time_embedding(guidance).to(x.dtype))
        if self.segment_embedding is not None:
            emb = emb + self.segment_embedding(t).to(x.dtype)
        if self.augment_embedding is not None:  # zeros rather than nothing: DDP wants a gradient of every parameter
            augment = x.new_zeros(len(x), self.augment_dim) if augment is None else augment
            emb = emb + self.augment_embedding(augment.to(x.dtype))
        emb = nnF.silu(self.map_layer1(nnF.silu(self.map_layer0(emb))))

        noisy, skips = x, []
        for name, layer in self.encoder.items():
            x = layer(x) if name.endswith("conv") else layer(x, emb)
            skips.append(x)
        for name, layer in self.decoder.items():
            x = layer(torch.cat([x, skips.pop()], dim=1) if "block" in name else x, emb)
        x = self.out_conv(nnF.silu(self.out_norm(x)))
        return x if self.input_gain is None else x + self.input_gain(emb)[..., None, None] * noisy

    def load_edm(self, state_dict: Mapping[str, Tensor], exact: bool = False) -> list[str]:
        """Load the weights of a published EDM network of DDPM++ architecture, for a warm start.

        EDM's velocity has the opposite sign (App. B): the last convolution is negated. EDM's network was shown
        log(sigma)/4 where ours is shown t, so it has to be trained on; without ``double_norm`` only that is new. The
        name map is in ``docs/networks.md``.

        Args:
            state_dict: Parameters named as in the published networks, with or without the prefix ``model.``.
            exact: Whether weights that this network has no place for are refused, those of the augmentation apart.

        Returns:
            Names of this network's parameters that kept their initialisation.

        Raises:
            ValueError: If a weight is missing or of another shape, as for a network of another size, or has no place.
        """

        def rename(name: str) -> str | None:
            parts = name.split(".")
            fresh = ("guidance_embedding", "segment_embedding", "input_gain")
            if parts[0] in fresh or (self.double_norm and "modulation" in parts):
                return None
            return ".".join(_PUBLISHED.get(part, part) for part in parts).replace(
                "out_", f"dec.{self.resolution}x{self.resolution}_aux_"
            )

        def convert(name: str, value: Tensor) -> Tensor:
            if name.startswith("out_conv"):
                return -value
            if name == "map_layer0.weight":  # theirs takes the sines first
                return value.roll(value.shape[1] // 2, dims=1)
            if name == "augment_embedding.weight":  # and what is added to them in that order
                return value.roll(value.shape[0] // 2, dims=0)
            if name == "label_embedding.weight":  # theirs is a linear map of one-hot vectors times sqrt(num_classes)
                return (value.t() * math.sqrt(self.num_classes)).roll(value.shape[0] // 2, dims=1)
            if ".qkv." in name:  # channels of theirs are (head, component, q/k/v), of ours (q/k/v, head, component)
                heads = self.get_submodule(name.rsplit(".", 2)[0]).heads
                return value.unflatten(0, (heads, -1, 3)).movedim(2, 0).flatten(0, 2)
            return value

        source = {name.removeprefix("model."): value for name, value in state_dict.items()}
        if "map_label.bias" in source:  # theirs is added to every embedding, labelled or not
            shift = source["map_layer0.weight"] @ source.pop("map_label.bias")
            source["map_layer0.bias"] = source["map_layer0.bias"] + shift
        return load_renamed(self, source, rename, convert, ("*.resample_filter", "map_augment.*") if exact else ("*",))


_PUBLISHED = {
    "encoder": "enc",
    "decoder": "dec",
    "label_embedding": "map_label",
    "augment_embedding": "map_augment",
    "modulation": "affine",
}
"""Parts of our parameters' names -> those of the published EDM networks; the rest are the same but for the output's."""


class Block(nn.Module):
    """Residual block: norm, convolution, modulation by the embedding, convolution, optional self-attention."""

    def __init__(
        self,
        c_in: int,
        c_out: int,
        *,
        emb_channels: int,
        resample: str | None,
        attention: bool,
        head_channels: int | None,
        dropout: float,
        double_norm: bool,
    ):
        super().__init__()
        self.resample, self.dropout, self.double_norm = resample, dropout, double_norm
        self.heads = num_heads(c_out, head_channels or c_out) if attention else 0
        self.norm0 = GroupNorm(c_in)
        self.conv0 = _xavier(Conv2d(c_in, c_out, 3, padding=1))
        self.modulation = _xavier(Linear(emb_channels, c_out * (2 if double_norm else 1)))
        self.norm1 = GroupNorm(c_out)
        self.conv1 = _xavier(Conv2d(c_out, c_out, 3, padding=1), gain=1e-5)
        self.skip = _xavier(Conv2d(c_in, c_out, 1)) if resample or c_in != c_out else None
        self.norm2 = GroupNorm(c_out) if attention else None
        self.qkv = _xavier(Conv2d(c_out, 3 * c_out, 1), gain=math.sqrt(0.2)) if attention else None
        self.proj = _xavier(Conv2d(c_out, c_out, 1), gain=1e-5) if attention else None

    def forward(self, x: Tensor, emb: Tensor) -> Tensor:
        h = self.modulate(self.conv0(resample(nnF.silu(self.norm0(x)), self.resample)), emb)
        h = self.conv1(nnF.dropout(nnF.silu(h), self.dropout, self.training))
        x = resample(x, self.resample)
        x = (h + (x if self.skip is None else self.skip(x))) * math.sqrt(0.5)
        if self.qkv is not None:
            B, C, H, W = x.shape
            qkv = self.qkv(self.norm2(x)).reshape(B, 3, self.heads, C // self.heads, H * W).transpose(3, 4)
            attended = jvp_attention(*qkv.unbind(1)).transpose(2, 3).reshape(B, C, H, W)
            x = (x + self.proj(attended)) * math.sqrt(0.5)
        return x

    def modulate(self, h: Tensor, emb: Tensor) -> Tensor:
        """Norm of the activations (B, C, H, W) with the embedding's say in it (Sec. 4.1); override it for another."""
        modulation = self.modulation(emb)
        if not self.double_norm:
            return self.norm1(h + modulation[..., None, None])
        scale, shift = modulation.chunk(2, dim=1)
        return self.norm1(h, pixel_norm(scale), pixel_norm(shift))


def _xavier(layer: nn.Linear | nn.Conv2d, gain: float = 1.0) -> nn.Linear | nn.Conv2d:
    nn.init.xavier_uniform_(layer.weight, gain)
    nn.init.zeros_(layer.bias)
    return layer
