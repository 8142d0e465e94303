"""The networks of EDM: DDPM++ and NCSN++ (Song et al.), and ADM (Dhariwal and Nichol), with the published names.

Notation: ``levels`` are resolutions from the image's down; ``emb`` is what a block is told of noise level and label.

Reference: Song et al. 2021, "Score-Based Generative Modeling through Stochastic Differential Equations", appendix H;
    Dhariwal and Nichol 2021, "Diffusion Models Beat GANs on Image Synthesis"; Karras et al. 2022, "Elucidating the
    Design Space of Diffusion-Based Generative Models", appendix F.6.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import conv2d, conv_transpose2d, group_norm, linear, scaled_dot_product_attention, silu


@dataclass(frozen=True)
class Design:
    """What makes a network; the defaults are DDPM++'s.

    Attributes:
        kind: SongUNet (DDPM++, NCSN++) or DhariwalUNet (ADM).
        size: H and W of an image.
        channels: C of an image.
        label_dim: labels, 0 for none.
        augment_dim: inputs that say how training images were changed; zero in sampling, so their weights are not kept.
        width: channels of the first level.
        multiples: channels of every level in units of ``width``.
        emb_multiple: channels of ``emb`` in units of ``width``.
        blocks: blocks of a level on the way down; one more on the way up.
        attention: resolutions whose blocks have self-attention.
        embedding: positional or fourier, of the noise level.
        noise_multiple: channels of that embedding in units of ``width``.
        encoder: standard, skip or residual: whether smaller versions of the image enter lower levels.
        decoder: standard or skip: whether every level adds to the output.
        taps: the separable filter between resolutions.
    """

    kind: str
    size: int
    channels: int
    label_dim: int = 0
    augment_dim: int = 0
    width: int = 128
    multiples: tuple[int, ...] = (1, 2, 2, 2)
    emb_multiple: int = 4
    blocks: int = 4
    attention: tuple[int, ...] = (16,)
    embedding: str = "positional"
    noise_multiple: int = 1
    encoder: str = "standard"
    decoder: str = "standard"
    taps: tuple[float, ...] = (1, 1)

    @property
    def song(self) -> bool:
        """Whether blocks are those of DDPM++ and NCSN++, and not ADM's."""
        return self.kind == "SongUNet"


class Affine(nn.Module):
    """x W^T + b."""

    def __init__(self, inputs: int, outputs: int, bias: bool = True) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(outputs, inputs))
        self.bias = nn.Parameter(torch.empty(outputs)) if bias else None

    def forward(self, x: Tensor) -> Tensor:
        return linear(x, self.weight, self.bias)


class Norm(nn.Module):
    """Group normalisation with at most 32 groups of at least 4 channels."""

    def __init__(self, channels: int, eps: float) -> None:
        super().__init__()
        self.groups, self.eps = min(32, channels // 4), eps
        self.weight, self.bias = nn.Parameter(torch.empty(channels)), nn.Parameter(torch.empty(channels))

    def forward(self, x: Tensor) -> Tensor:
        return group_norm(x, self.groups, self.weight, self.bias, self.eps)


class Conv(nn.Module):
    """A convolution (none where ``kernel`` is 0) after a change of resolution (none where ``change`` is empty).

    With ``filter_last`` the convolution comes first, on a border wide enough for the filter behind it.
    """

    def __init__(
        self, inputs: int, outputs: int, kernel: int, change: str = "", taps: tuple[float, ...] = (1, 1),
        filter_last: bool = False,
    ) -> None:  # fmt: skip
        super().__init__()
        self.change, self.filter_last = change, filter_last
        self.weight = nn.Parameter(torch.empty(outputs, inputs, kernel, kernel)) if kernel else None
        self.bias = nn.Parameter(torch.empty(outputs)) if kernel else None
        self.register_buffer("resample_filter", torch.empty(1, 1, len(taps), len(taps)) if change else None)
        self._border = (len(taps) - 1) // 2

    def _resampled(self, x: Tensor, border: int) -> Tensor:
        channels = x.shape[1]
        kernel = self.resample_filter.expand(channels, 1, -1, -1)  # type: ignore[operator]
        if self.change == "up":
            return conv_transpose2d(x, 4 * kernel, stride=2, padding=border, groups=channels)
        return conv2d(x, kernel, stride=2, padding=border, groups=channels)

    def forward(self, x: Tensor) -> Tensor:
        if self.filter_last and self.weight is not None:
            padding = self.weight.shape[-1] // 2 + self._border
            x = self._resampled(conv2d(x, self.weight, padding=padding), 0)
            return x if self.bias is None else x + self.bias[:, None, None]
        if self.change:
            x = self._resampled(x, self._border)
        return x if self.weight is None else conv2d(x, self.weight, self.bias, padding=self.weight.shape[-1] // 2)


class Block(nn.Module):
    """A residual block, told ``emb``, with a change of resolution and self-attention where asked for."""

    def __init__(self, design: Design, inputs: int, outputs: int, change: str = "", attention: bool = False) -> None:
        super().__init__()
        song, eps = design.song, 1e-6 if design.song else 1e-5
        self.inputs, self.outputs, self.scales = inputs, outputs, not song
        self.gain = math.sqrt(0.5) if song else 1.0
        self.heads = 0 if not attention else 1 if song else outputs // 64
        self.norm0, self.norm1 = Norm(inputs, eps), Norm(outputs, eps)
        self.conv0 = Conv(inputs, outputs, 3, change, design.taps)
        self.affine = Affine(design.width * design.emb_multiple, outputs * (2 if self.scales else 1))
        self.conv1 = Conv(outputs, outputs, 3)
        kernel = 1 if inputs != outputs or (song and change) else 0
        self.skip = Conv(inputs, outputs, kernel, change, design.taps) if kernel or change else None
        if self.heads:
            self.norm2, self.qkv = Norm(outputs, eps), Conv(outputs, 3 * outputs, 1)
            self.proj = Conv(outputs, outputs, 1)

    def forward(self, x: Tensor, emb: Tensor) -> Tensor:
        h, told = self.conv0(silu(self.norm0(x))), self.affine(emb)[:, :, None, None]
        if self.scales:
            scale, shift = told.chunk(2, dim=1)
            h = self.norm1(h) * (1 + scale) + shift
        else:
            h = self.norm1(h + told)
        x = (self.conv1(silu(h)) + (x if self.skip is None else self.skip(x))) * self.gain
        return (x + self.proj(self._attended(x))) * self.gain if self.heads else x

    def _attended(self, x: Tensor) -> Tensor:
        rows, channels, height, width = x.shape
        mixed = self.qkv(self.norm2(x)).view(rows, self.heads, channels // self.heads, 3, height * width)
        q, k, v = (part.transpose(2, 3) for part in mixed.unbind(dim=3))  # (B, heads, H W, C / heads)
        return scaled_dot_product_attention(q, k, v).transpose(2, 3).reshape(x.shape)


class Fourier(nn.Module):
    """The frequencies of NCSN++'s embedding of noise levels: drawn once, and kept with the weights."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.register_buffer("freqs", torch.empty(channels // 2))

    def forward(self, level: Tensor) -> Tensor:
        return torch.outer(level, 2 * math.pi * self.freqs)  # type: ignore[operator, arg-type]


class Positional(nn.Module):
    """The frequencies 10000^(-i / (n - 1)), or ADM's, which stop one short."""

    def __init__(self, channels: int, reaches_end: bool) -> None:
        super().__init__()
        self.count, self.last = channels // 2, channels // 2 - reaches_end

    def forward(self, level: Tensor) -> Tensor:
        exponents = torch.arange(self.count, dtype=torch.float32, device=level.device) / self.last
        return torch.outer(level, 1e-4**exponents)


class Network(nn.Module):
    """F(x, c_noise, label): the raw network inside of EDM's preconditioning.

    Args:
        design: what it is made of.
    """

    def __init__(self, design: Design) -> None:
        super().__init__()
        self.design, song = design, design.song
        noise, emb = design.width * design.noise_multiple, design.width * design.emb_multiple
        self.map_noise = Fourier(noise) if design.embedding == "fourier" else Positional(noise, song)
        label = Affine(design.label_dim, noise if song else emb, bias=song) if design.label_dim else None
        self.map_label = label
        self.map_layer0, self.map_layer1 = Affine(noise, emb), Affine(emb, emb)
        self.enc = nn.ModuleDict()
        widths: list[int] = []
        self._encoder(widths)
        self.dec = nn.ModuleDict()
        last = self._decoder(widths)
        if not song:
            self.out_norm, self.out_conv = Norm(last, 1e-5), Conv(last, design.channels, 3)

    def _encoder(self, widths: list[int]) -> None:
        d = self.design
        now, side = d.channels, d.channels
        for level, multiple in enumerate(d.multiples):
            name = f"{d.size >> level}x{d.size >> level}"
            if level == 0:
                now = d.width * (1 if d.song else multiple)
                self.enc[f"{name}_conv"] = Conv(d.channels, now, 3)
            else:
                self.enc[f"{name}_down"] = Block(d, now, now, "down")
                if d.encoder == "skip":
                    self.enc[f"{name}_aux_down"] = Conv(side, side, 0, "down", d.taps)
                    self.enc[f"{name}_aux_skip"] = Conv(side, now, 1)
                elif d.encoder == "residual":
                    self.enc[f"{name}_aux_residual"] = Conv(side, now, 3, "down", d.taps, filter_last=True)
                    side = now
            widths.append(now)
            for i in range(d.blocks):
                before, now = now, d.width * multiple
                self.enc[f"{name}_block{i}"] = Block(d, before, now, attention=d.size >> level in d.attention)
                widths.append(now)

    def _decoder(self, widths: list[int]) -> int:
        d, now = self.design, widths[-1]
        lowest = len(d.multiples) - 1
        for level in range(lowest, -1, -1):
            name, attends = f"{d.size >> level}x{d.size >> level}", d.size >> level in d.attention
            if level == lowest:
                self.dec[f"{name}_in0"] = Block(d, now, now, attention=True)
                self.dec[f"{name}_in1"] = Block(d, now, now)
            else:
                self.dec[f"{name}_up"] = Block(d, now, now, "up")
            for i in range(d.blocks + 1):
                before, now = now + widths.pop(), d.width * d.multiples[level]
                # DDPM++ attends only in the last block of a level on the way up, ADM in all of them.
                here = attends and (not d.song or i == d.blocks)
                self.dec[f"{name}_block{i}"] = Block(d, before, now, attention=here)
            if d.song and (d.decoder == "skip" or level == 0):
                if d.decoder == "skip" and level < lowest:
                    self.dec[f"{name}_aux_up"] = Conv(d.channels, d.channels, 0, "up", d.taps)
                self.dec[f"{name}_aux_norm"] = Norm(now, 1e-6)
                self.dec[f"{name}_aux_conv"] = Conv(now, d.channels, 3)
        return now

    def _told(self, level: Tensor, label: Tensor | None) -> Tensor:
        """``emb``, (B, D)."""
        angles, song = self.map_noise(level), self.design.song
        waves = (angles.sin(), angles.cos()) if song else (angles.cos(), angles.sin())
        emb = torch.cat(waves, dim=1)
        if song:
            if self.map_label is not None:
                assert label is not None
                emb = emb + self.map_label(label * math.sqrt(self.design.label_dim))
            return silu(self.map_layer1(silu(self.map_layer0(emb))))
        emb = self.map_layer1(silu(self.map_layer0(emb)))
        return silu(emb if self.map_label is None else emb + self.map_label(label))

    def forward(self, x: Tensor, level: Tensor, label: Tensor | None = None) -> Tensor:
        """The network's answer, (B, C, H, W).

        Args:
            x: scaled states, (B, C, H, W) float32.
            level: c_noise, (B,) float32.
            label: one-hot, (B, label_dim) float32, all zero for none; None where there are no labels.
        """
        emb, image = self._told(level, label), x
        kept: list[Tensor] = []
        for name, part in self.enc.items():
            if name.endswith("aux_down"):
                image = part(image)
            elif name.endswith("aux_skip"):
                x = kept[-1] = x + part(image)
            elif name.endswith("aux_residual"):
                x = kept[-1] = image = (x + part(image)) / math.sqrt(2)
            else:
                x = part(x, emb) if isinstance(part, Block) else part(x)
                kept.append(x)
        output: Tensor | None = None
        for name, part in self.dec.items():
            if name.endswith("aux_up"):
                output = part(output)
            elif name.endswith("aux_norm"):
                normed = silu(part(x))
            elif name.endswith("aux_conv"):
                output = part(normed) if output is None else output + part(normed)
            else:
                x = part(x if x.shape[1] == part.inputs else torch.cat([x, kept.pop()], dim=1), emb)
        return output if output is not None else self.out_conv(silu(self.out_norm(x)))


def build(design: Design) -> nn.Module:
    """The network without numbers: its weights must all be given."""
    with torch.device("meta"):
        return Network(design)


def precondition(sigma: Tensor, sigma_data: float) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """``c_skip, c_out, c_in`` and ``c_noise`` of noise levels, each like ``sigma``.

    The denoiser is ``c_skip x + c_out F(c_in x; c_noise)``; at sigma = 0 it is the identity, whatever F is.

    Reference: Karras et al. 2022, equation 7 and table 1.
    """
    total = sigma**2 + sigma_data**2
    c_out = sigma * sigma_data / total.sqrt()
    c_noise = sigma.clamp(min=1e-30).log() / 4  # finite at 0, where c_out hides the answer
    return sigma_data**2 / total, c_out, 1 / total.sqrt(), c_noise


def fields(data: dict[str, Any]) -> dict[str, Any]:
    """Fields of a design from plain data, whose lists become tuples."""
    return {name: tuple(value) if isinstance(value, list) else value for name, value in data.items()}
