r"""EDM2's magnitude-preserving U-Net (Karras et al. 2312.02696, config G) with the sCM paper's changes (Sec. 4.1).

Every layer keeps the mean square of its activations at one: weights have unit norm, sums and concatenations are
rescaled, and there are no biases. The paper changes two things: the positional embedding of t in place of Fourier
features, and adaptive double normalisation of the modulation. Its parameter counts are those of a modulation without
shift. Written from the papers.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Literal

import torch
import torch.nn.functional as nnF
from torch import Tensor, nn

from sclightning.backbones.layers import (
    MPConv2d,
    MPLabelEmbedding,
    MPLinear,
    MPWeight,
    PositionalEmbedding,
    SegmentEmbedding,
    check_inputs,
    is_channels_last,
    load_renamed,
    mp_cat,
    mp_silu,
    mp_sum,
    num_heads,
    pixel_norm,
    resample,
)
from sclightning.ops import cosine_attention


class EDM2(nn.Module):
    r"""Magnitude-preserving U-Net, :math:`F = net(x, t, label, guidance)`; by default of size S for latents.

    Args:
        resolution: Height and width of the images (64 for the latents of 512x512 images).
        in_channels: Channels of the images.
        channels: Channels at the full resolution: XS 128, S 192, M 256, L 320, XL 384, XXL 448.
        channel_mult: Multiplier of the channels per level; each level halves the resolution.
        num_blocks: Residual blocks per level.
        attention_resolutions: Resolutions whose blocks have self-attention.
        head_channels: Channels of one attention head.
        dropout: Dropout probability inside the blocks.
        dropout_resolution: Largest resolution that has dropout; all have it if not given.
        num_classes: Number of class labels; 0 for an unconditional network.
        guidance: Whether the network takes a guidance scale; it has no effect at initialisation.
        segments: Segments of a multi-step consistency model, in which of them ``t`` is the network is told by a learned
            embedding, see :mod:`sclightning.segments`.
        double_norm: Adaptive double normalisation ``norm(x) * pnorm(s)`` (Sec. 4.1) in place of EDM2's ``x * (1 + s)``.
        shift: A separate shift, ``norm(x) * pnorm(s) + pnorm(b)``: the formula of the paper's text, not its counts.
    """

    def __init__(
        self,
        resolution: int = 64,
        in_channels: int = 4,
        channels: int = 192,
        channel_mult: Sequence[int] = (1, 2, 3, 4),
        num_blocks: int = 3,
        attention_resolutions: Sequence[int] = (16, 8),
        head_channels: int = 64,
        dropout: float = 0.0,
        dropout_resolution: int | None = None,
        num_classes: int = 0,
        guidance: bool = False,
        double_norm: bool = True,
        shift: bool = False,
        segments: int = 1,
    ):
        super().__init__()
        if resolution % 2 ** (len(channel_mult) - 1):
            raise ValueError(
                f"Images of {resolution}x{resolution} cannot be halved {len(channel_mult) - 1} times; "
                "give fewer entries in channel_mult."
            )
        if shift and not double_norm:
            raise ValueError("shift=True needs double_norm=True: EDM2's own modulation has no shift.")
        self.resolution, self.in_channels = resolution, in_channels
        self.num_classes, self.guidance, self.double_norm = num_classes, guidance, double_norm

        emb_channels = channels * max(channel_mult)
        self.time_embedding = PositionalEmbedding(channels)
        self.time_linear = MPLinear(channels, emb_channels)
        self.label_embedding = MPLabelEmbedding(num_classes, emb_channels) if num_classes else None
        self.guidance_linear = MPLinear(channels, emb_channels) if guidance else None
        # Zero: the teacher, whose weights come first, knows no guidance. Not a scalar: FSDP2 shards none.
        self.guidance_gain = nn.Parameter(torch.zeros(1)) if guidance else None
        self.segments = segments
        self.segment_embedding = SegmentEmbedding(segments, emb_channels) if segments > 1 else None

        def block(c_in: int, c_out: int, size: int, kind: Literal["encoder", "decoder"], **options) -> Block:
            return Block(
                c_in,
                c_out,
                kind=kind,
                emb_channels=emb_channels,
                head_channels=head_channels,
                dropout=dropout if dropout_resolution is None or size <= dropout_resolution else 0.0,
                double_norm=double_norm,
                shift=shift,
                **options,
            )

        self.encoder, self.decoder = nn.ModuleDict(), nn.ModuleDict()
        width = channels * channel_mult[0]
        self.encoder[f"{resolution}x{resolution}_conv"] = MPConv2d(in_channels + 1, width, 3)
        skips = [width]
        for level, mult in enumerate(channel_mult):
            size = resolution >> level
            if level:
                self.encoder[f"{size}x{size}_down"] = block(width, width, size, "encoder", resample="down")
                skips.append(width)
            for i in range(num_blocks):
                attention = size in attention_resolutions
                name = f"{size}x{size}_block{i}"
                self.encoder[name] = block(width, mult * channels, size, "encoder", attention=attention)
                width = mult * channels
                skips.append(width)

        for level, mult in reversed(list(enumerate(channel_mult))):
            size = resolution >> level
            if level == len(channel_mult) - 1:
                self.decoder[f"{size}x{size}_in0"] = block(width, width, size, "decoder", attention=True)
                self.decoder[f"{size}x{size}_in1"] = block(width, width, size, "decoder")
            else:
                self.decoder[f"{size}x{size}_up"] = block(width, width, size, "decoder", resample="up")
            for i in range(num_blocks + 1):
                attention = size in attention_resolutions
                name = f"{size}x{size}_block{i}"
                c_in = width + skips.pop()
                self.decoder[name] = block(c_in, mult * channels, size, "decoder", attention=attention)
                width = mult * channels
        self.out_conv = MPConv2d(width, in_channels, 3)
        self.out_gain = nn.Parameter(torch.zeros(1))

    def forward(self, x: Tensor, t: Tensor, label: Tensor | None = None, guidance: Tensor | None = None) -> Tensor:
        """Velocity of unit variance.

        Args:
            x: Noisy images of unit variance, shape (B, in_channels, resolution, resolution).
            t: Times in radians, shape (B,), float32.
            label: Class labels, int64 in [-1, num_classes), shape (B,); -1, or None for all, is "no label".
            guidance: Guidance scales, shape (B,), float32; required exactly if the network was made with it.

        Returns:
            F, shape of ``x``.
        """
        check_inputs(self, x, t, label, guidance)
        x = x.to(self.out_gain.dtype)
        emb = self._embed(t, label, guidance).to(x.dtype)

        x = torch.cat([x, torch.ones_like(x[:, :1])], dim=1)  # stands in for the biases
        skips = []
        for name, layer in self.encoder.items():
            x = layer(x) if name.endswith("conv") else layer(x, emb)
            skips.append(x)
        for name, layer in self.decoder.items():
            x = layer(mp_cat(x, skips.pop()) if "block" in name else x, emb)
        return self.out_conv(x) * self.out_gain

    def _embed(self, t: Tensor, label: Tensor | None, guidance: Tensor | None) -> Tensor:
        """Embedding of the conditions, (B, emb_channels), in float32 or wider outside autocast."""
        emb = self.time_linear(self.time_embedding(t) * math.sqrt(2))  # sqrt(2): to unit mean square
        if self.label_embedding is not None:
            label_emb = torch.zeros_like(emb) if label is None else self.label_embedding(label)
            emb = mp_sum(emb, label_emb, 0.5)
        if guidance is not None:
            guidance_emb = self.guidance_linear(self.time_embedding(guidance.to(t.dtype)) * math.sqrt(2))
            emb = emb + guidance_emb * self.guidance_gain
        if self.segment_embedding is not None:
            emb = emb + self.segment_embedding(t)
        return mp_silu(emb)

    def normalize_weights(self) -> None:
        """Forced weight normalisation (EDM2, Eq. 66); to be called after each optimizer step."""
        for module in self.modules():
            if isinstance(module, MPWeight):
                module.normalize_weight()

    def load_edm2(self, state_dict: Mapping[str, Tensor], exact: bool = False) -> list[str]:
        """Load the weights of a published EDM2 network of the same size, for a warm start.

        EDM2's velocity has the opposite sign (Sec. 3, App. B): the output gain is negated. Its logarithmic noise levels
        and Fourier features have no counterpart, nor has its modulation under ``double_norm``: those layers keep their
        initialisation. The name map is in ``docs/networks.md``.

        Args:
            state_dict: Parameters named as in the published networks, with or without the prefix ``unet.``.
            exact: Whether weights that this network has no place for are refused, those of time and uncertainty apart.

        Returns:
            Names of this network's parameters that kept their initialisation.

        Raises:
            ValueError: If a weight is missing or of another shape, as for a network of another size, or has no place.
        """
        fresh = {"time_linear", "guidance_linear", "guidance_gain", "segment_embedding"}
        if self.double_norm:
            fresh.add("modulation")

        def rename(name: str) -> str | None:
            parts = name.split(".")
            return None if fresh & set(parts) else ".".join(_PUBLISHED.get(part, part) for part in parts)

        def convert(name: str, value: Tensor) -> Tensor:
            value = value.reshape(1) if name.endswith("gain") else value  # theirs are scalars
            return -value if name == "out_gain" else value

        source = {name.removeprefix("unet."): value for name, value in state_dict.items()}
        spare = ("*.resample_filter", "logvar_*", "emb_fourier.*", "emb_noise.*")
        kept = load_renamed(self, source, rename, convert, spare if exact else ("*",))
        self.normalize_weights()
        return kept


_PUBLISHED = {
    "encoder": "enc",
    "decoder": "dec",
    "label_embedding": "emb_label",
    "conv0": "conv_res0",
    "conv1": "conv_res1",
    "modulation": "emb_linear",
    "modulation_gain": "emb_gain",
    "skip": "conv_skip",
    "qkv": "attn_qkv",
    "proj": "attn_proj",
}
"""Parts of our parameters' names -> those of the published EDM2 networks; the rest are the same."""


class Block(nn.Module):
    """Residual block of the encoder or the decoder (EDM2, Fig. 21), with optional cosine self-attention.

    The encoder normalises its main path, so that contributions of earlier blocks fade; the decoder does not.
    """

    def __init__(
        self,
        c_in: int,
        c_out: int,
        *,
        kind: Literal["encoder", "decoder"],
        emb_channels: int,
        head_channels: int,
        dropout: float,
        double_norm: bool,
        shift: bool,
        resample: Literal["down", "up"] | None = None,
        attention: bool = False,
    ):
        super().__init__()
        self.kind, self.resample, self.dropout = kind, resample, dropout
        self.heads = num_heads(c_out, head_channels) if attention else 0
        self.conv0 = MPConv2d(c_out if kind == "encoder" else c_in, c_out, 3)
        self.modulation = MPLinear(emb_channels, c_out * (2 if shift else 1))
        self.modulation_gain = None if double_norm else nn.Parameter(torch.zeros(1))
        self.shift = shift
        self.conv1 = MPConv2d(c_out, c_out, 3)
        self.skip = MPConv2d(c_in, c_out, 1) if c_in != c_out else None
        self.qkv = MPConv2d(c_out, 3 * c_out, 1) if attention else None
        self.proj = MPConv2d(c_out, c_out, 1) if attention else None

    def forward(self, x: Tensor, emb: Tensor) -> Tensor:
        """Map (B, c_in, H, W) and the embedding (B, emb_channels) to (B, c_out, H, W)."""
        x = resample(x, self.resample)
        if self.kind == "encoder":
            x = pixel_norm(x if self.skip is None else self.skip(x))
        h = self._modulate(self.conv0(mp_silu(x)), self.modulation(emb))
        h = self.conv1(nnF.dropout(mp_silu(h), self.dropout, self.training))
        if self.kind == "decoder" and self.skip is not None:
            x = self.skip(x)
        x = mp_sum(x, h, 0.3)
        if self.qkv is not None:
            B, C, H, W = x.shape
            qkv = self.qkv(x).reshape(B, self.heads, C // self.heads, 3, H * W)
            attended = cosine_attention(qkv).reshape(B, C, H, W)
            if is_channels_last(x):
                attended = attended.contiguous(memory_format=torch.channels_last)
            x = mp_sum(x, self.proj(attended), 0.3)
        return x.clamp(-256, 256)  # for half precision; never reached in a healthy run

    def _modulate(self, h: Tensor, modulation: Tensor) -> Tensor:
        modulation = modulation[..., None, None]
        if self.modulation_gain is not None:
            return h * (1 + modulation * self.modulation_gain)
        if not self.shift:
            return pixel_norm(h) * pixel_norm(modulation)
        scale, shift = modulation.chunk(2, dim=1)
        return mp_sum(pixel_norm(h) * pixel_norm(scale), pixel_norm(shift), 0.5)
