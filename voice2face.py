# /// script
# requires-python = ">=3.10"
# dependencies = ["torch==2.11.0", "torchaudio==2.11.0", "numpy", "pillow>=10.1"]
# ///
"""voice2face: learn which face belongs to which voice, and draw faces for a voice, without a label.

A reference implementation of "From Inference to Generation: End-to-end Fully Self-supervised
Generation of Human Face from Speech" (Choi, Park, Lee; ICLR 2020) in one file.

The idea   A speech encoder S reads the raw waveform, a face encoder F reads a picture; both answer
           with a point of one space. Speech and face of one clip must agree better than those of
           different clips: this is the only supervision. Then a generator G draws a face from
           c = S(s), what the voice tells, and z, noise for all that it does not tell. Its opponent
           D starts from F: it knows from the first step which face fits which voice.

Map        1 Inference, 2 Generation, 3 Training: the method. 4 Evaluation, 5 Figures, 6 Data,
           7 Synthetic people, 8 Plumbing, 9 Command line serve it.

Glossary   paper  here          shape         meaning
           s      speech        (B, T)        waveforms, 16 kHz, in [-1, 1]
           f      faces, real   (B, 3, H, W)  pictures, RGB, in [-1, 1]
           se, fe se, fe        (B, D)        embeddings: S(speech), F(faces)
           c+, c- c_pos, c_neg  (B, D)        se of the face's own voice, of another person's
           z      z             (B, D)        Gaussian noise
           phi    phi           (B, D)        face embeddings by D's copy of F
           psi    psi           (B,)          how real D finds a face, whatever the voice
           K      k                           candidates: 1 positive and K - 1 negatives
           V-F    "v-f"                       pick a face for a voice; F-V is the reverse
           One letter per dimension: B clips, K candidates, T samples, L frames, C channels, M taps
           of a filter, H W pixels, D = 128 embedding, N clips of a test, G a gallery, P people, V
           voices, Z noises, E numbers of a face. In code F is torch.nn.functional.

Sources    [paper §x]; [PASE] Pascual et al. 2019; [SincNet] Ravanelli and Bengio 2018; [SNGAN]
           Miyato and Koyama 2018; [StyleGAN], [StyleGAN2] Karras et al. 2019, 2020; [R1] Mescheder
           et al. 2018; [ours] where the paper is silent. Where this differs, and why:
           - all embeddings have one length, so that Eq. 1's inner product is a cosine times a
             constant: with free lengths training stays on a plateau at first (scale_normalize);
           - a clip's negatives come from its own batch, which encodes each clip once;
           - the waveform's loudness is divided out, being the microphone's (SpeechEncoder);
           - the face encoder has no spectral norm, and a 1x1 layer in every shortcut (DBlock);
           - psi reads what phi's head reads (Discriminator);
           - AdaIN's style is [z, c], in which c has length 1 (AdaIN, Generator);
           - of our text of the paper only Eq. 2 is whole; how we read Eq. 5: relid_loss;
           - the preset `small` hears 1.5 s and sees 64x64 pixels through narrower layers.
"""

import argparse
import concurrent.futures
import copy
import csv
import datetime
import functools
import glob
import itertools
import json
import math
import os
import signal
import sys
import tempfile
import time
import wave
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torchaudio
from PIL import Image, ImageDraw, ImageFont, ImageOps
from torch import distributed, nn
from torch.nn import functional as F

RATE = 16000  # samples per second of every waveform [PASE]
EMBED = 128  # D [paper §3.2]


class UserError(ValueError):
    """What the user can mend, raised wherever input is of no use: one line, exit code 2."""


# ==== 1. Inference: two encoders and the K-way loss   [paper §3.1] ================================

PASE_KERNELS = (251, 20, 11, 11, 11, 11, 11, 11)  # [PASE]; the first is the sinc layer
PASE_STRIDES = (1, 10, 2, 1, 2, 1, 2, 2)  # [PASE]; 160 in all, so that 6 s are 600 frames
PASE_WIDTHS = (1, 1, 2, 2, 4, 4, 8, 8)  # [PASE]; in units of the sinc layer's 64 filters
MIN_HZ = 50  # the least cut-off and the least band of a sinc filter [SincNet]


def pad_same(x, kernel_size):
    """(..., 1, T) -> (..., 1, T + M - 1): reflected ends; stride s leaves ceil(T / s) [PASE]."""
    return F.pad(x, ((kernel_size - 1) // 2, kernel_size // 2, 0, 0), mode="reflect")


class SincConv(nn.Module):
    """Band-pass filters of which only the two cut-offs are learned [SincNet].

    (B, T) -> (B, C, ceil(T / stride)). A filter is the difference of two ideal low-passes,
        g(t) = 2 high sinc(2 high t) - 2 low sinc(2 low t),   sinc(x) = sin(pi x) / (pi x),
    under a Hamming window, divided by 2 (high - low), which makes its centre 1. Cut-offs, in Hz,
    start evenly on the mel scale. Raises ValueError for an even kernel, which has no centre.
    """

    def __init__(self, filters, kernel_size=251, stride=1):
        super().__init__()
        if kernel_size % 2 == 0:
            raise ValueError(f"sinc kernel must be odd, got {kernel_size}")
        self.kernel_size, self.stride = kernel_size, stride
        lowest, highest = (2595 * math.log10(1 + hz / 700) for hz in (30, RATE / 2 - 100))  # mel
        mel = torch.linspace(lowest, highest, filters + 1)  # (C+1,), from 30 Hz on [SincNet]
        hz = 700 * (10 ** (mel / 2595) - 1)  # (C+1,)
        self.low_hz = nn.Parameter(hz[:-1, None])  # (C, 1)
        self.band_hz = nn.Parameter(hz.diff()[:, None])  # (C, 1)
        t = (torch.arange(kernel_size) - kernel_size // 2) / RATE  # s
        self.register_buffer("t", t, persistent=False)  # (M,)
        self.register_buffer("window", torch.hamming_window(kernel_size, periodic=False))  # (M,)

    def filters(self):
        """The impulse responses (C, M)."""
        low = (MIN_HZ + self.low_hz.abs()).clamp(max=RATE / 2 - MIN_HZ)  # (C, 1); open band [ours]
        high = (low + MIN_HZ + self.band_hz.abs()).clamp(max=RATE / 2)  # (C, 1)
        g = 2 * high * torch.sinc(2 * high * self.t) - 2 * low * torch.sinc(2 * low * self.t)
        return g * self.window / (2 * (high - low))  # (C, M); torch.sinc(0) is 1, without 0/0

    def forward(self, x):
        x = pad_same(x[:, None], self.kernel_size)  # (B, T) -> (B, 1, T + M - 1)
        return F.conv1d(x, self.filters()[:, None], stride=self.stride)  # -> (B, C, L)


def scale_normalize(x, scale):
    """Embeddings (B, D) of one length: inner products become scale^2 cos [ours].

    With free lengths Eq. 1 has hardly a gradient at first: a plateau at the loss log K.
    """
    return scale * F.normalize(x.float(), dim=1)  # float: a GPU's layers may answer in bfloat16


class SpeechEncoder(nn.Module):
    """S: waveforms (B, T) -> embeddings (B, D). PASE's encoder, a mean over time, a linear map.

    The sinc layer and 7 convolutions [paper §3.1], each followed by batch norm and a PReLU with a
    slope per channel [PASE]; mean and linear map are [ours]. In PASE width is 64, sinc_stride 1.
    2-D convolutions over one row can have channels last in memory: 13 % of a step on a CPU.
    """

    def __init__(self, width=64, sinc_stride=1, scale=1.0):
        super().__init__()
        self.scale, widths = scale, [width * w for w in PASE_WIDTHS]
        self.convs = nn.ModuleList([SincConv(width, PASE_KERNELS[0], sinc_stride)])
        for i in range(1, len(widths)):
            self.convs.append(nn.Conv2d(widths[i - 1], widths[i], (1, PASE_KERNELS[i]),
                                        (1, PASE_STRIDES[i]), bias=False))  # batch norm has one
        self.norms = nn.ModuleList(nn.BatchNorm2d(w) for w in widths)
        self.acts = nn.ModuleList(nn.PReLU(w, init=0.0) for w in widths)  # [PASE]
        self.head = nn.Linear(widths[-1], EMBED)

    def features(self, x):
        """(B, T) -> (B, C), what the head reads; L = ceil(T / (160 sinc_stride)) in between."""
        x = x / (x.std(1, keepdim=True) + SILENCE)  # loudness is the microphone's [ours]; not 0/0
        x = self.convs[0](x)[:, :, None]  # (B, T) -> (B, C, 1, T / stride)
        x = self.acts[0](self.norms[0](x))
        for conv, norm, act in zip(self.convs[1:], self.norms[1:], self.acts[1:]):
            x = conv(pad_same(x, conv.kernel_size[1]))  # (B, C, 1, L) -> (B, C', 1, L / stride)
            x = act(norm(x))
        return x.mean((2, 3))  # (B, C, 1, L) -> (B, C)

    def forward(self, x):
        return scale_normalize(self.head(self.features(x)), self.scale)  # (B, C) -> (B, D)


class DBlock(nn.Module):
    """Residual block of [SNGAN]'s discriminator: (B, C, H, W) -> (B, C', H/2, W/2), or C', H, W."""

    def __init__(self, channels, out, first=False, down=True):
        super().__init__()
        self.first, self.down, hidden = first, down, out if first else channels  # [SNGAN]
        self.conv1 = nn.Conv2d(channels, hidden, 3, padding=1)
        self.conv2 = nn.Conv2d(hidden, out, 3, padding=1)
        self.skip = nn.Conv2d(channels, out, 1)

    def forward(self, x):
        h = self.conv1(x if self.first else F.relu(x))  # the first block sees pixels, not features
        h = self.conv2(F.relu(h))  # (B, C, H, W) -> (B, C', H, W)
        if self.down:
            h, x = F.avg_pool2d(h, 2), F.avg_pool2d(x, 2)  # H, W -> H/2, W/2
        return h + self.skip(x)  # a 1x1 layer may as well follow the pooling: a quarter of the work


class FaceEncoder(nn.Module):
    """F: faces (B, 3, H, W) -> embeddings (B, D). The body of [SNGAN]'s projection discriminator.

    Blocks halve the side down to 4, one more keeps it; ReLU, a sum over the 4x4 places, a linear
    map [ours]. No batch norm: as a discriminator F is differentiated twice. In [SNGAN] width is 64,
    size 128. Raises ValueError unless size is a power of two from 8 on.
    """

    def __init__(self, size=128, width=64, scale=1.0):
        super().__init__()
        self.scale, downs = scale, count_doublings(size)
        widths = [3] + [width * 2 ** min(i, 4) for i in range(downs)]
        blocks = [DBlock(widths[i], widths[i + 1], first=i == 0) for i in range(downs)]
        self.blocks = nn.Sequential(*blocks, DBlock(widths[-1], widths[-1], down=False))
        self.head = nn.Linear(widths[-1], EMBED)
        init_convs(self)

    def features(self, x):
        """(B, 3, H, W) -> (B, C), what the head reads."""
        return F.relu(self.blocks(x)).sum((2, 3))  # (B, C, 4, 4) -> (B, C)

    def forward(self, x):
        return scale_normalize(self.head(self.features(x)), self.scale)  # (B, C) -> (B, D)


def init_convs(module):
    """Glorot's initialisation, gain sqrt(2) on 3x3 convolutions [SNGAN]."""
    for m in module.modules():
        if isinstance(m, nn.Conv2d):
            nn.init.xavier_uniform_(m.weight, math.sqrt(2) if m.kernel_size == (3, 3) else 1)
            nn.init.zeros_(m.bias)


def count_doublings(size):
    """How often 4 must be doubled to give a side; raises ValueError unless it can."""
    times = int(math.log2(size)) - 2
    if times < 1 or size != 4 * 2**times:
        raise ValueError(f"face size must be a power of two from 8 on, got {size}")
    return times


@torch.no_grad()
def centre_head(encoder, x):
    """Set the head so that each of its D outputs has mean 0 and deviation 1 over a batch [ours].

    A fresh network sends all inputs in nearly one direction, so Eq. 1 would see K equal candidates.
    """
    std, mean = torch.std_mean(encoder.head(encoder.features(x)), 0)  # (B, D) -> (D,), (D,)
    std = std.clamp(min=1e-6)  # of a batch that is all alike
    encoder.head.weight /= std[:, None]
    encoder.head.bias.copy_((encoder.head.bias - mean) / std)


def sample_candidates(rows, k, generator):
    """Columns (rows, K) of each row's candidates: itself, then K - 1 different other rows.

    Rows are clips of different identities, so that negatives are, too [paper §4]. All rows share
    K - 1 random shifts to their negatives, around the end: every other row is equally likely, and
    each is a negative equally often [ours].
    """
    if rows < k:
        raise UserError(f"K = {k} needs {k} identities at once, only {rows} could be read")
    shifts = torch.randperm(rows - 1, generator=generator)[:k - 1] + 1  # (K-1,) of 1 ... rows-1
    shifts = torch.cat([torch.zeros(1, dtype=torch.long), shifts])  # (K,)
    return (torch.arange(rows)[:, None] + shifts) % rows  # (rows, 1) + (K,) -> (rows, K)


def match_logits(speech, faces, candidates, direction):
    """Eq. 1's <S(s), F(f_j)> of each row's K candidates, (B, K): v-f picks a face, f-v a voice.

    p(f_j | s) = softmax_j <S(s), F(f_j)>, and the loss is -log p of column 0, the positive.
    """
    query, keys = (speech, faces) if direction == "v-f" else (faces, speech)  # (B, D), (B, D)
    return torch.einsum("bd,bkd->bk", query, keys[candidates])  # (B, D), (B, K, D) -> (B, K)


def top1(logits):
    """(B, K) -> (B,): 1 where column 0 is the largest; n equally large ones share the point."""
    best = logits == logits.max(1, keepdim=True).values  # (B, K)
    return best[:, 0] / best.sum(1)


# ==== 2. Generation: AdaIN generator, projection discriminator, relidGAN loss   [paper §3.2] ======


class AdaIN(nn.Module):
    """The style sets mean and deviation of each channel [StyleGAN]: x (B, C, H, W), style (B, 2D).

        AdaIN(x, y) = (1 + scale(y)) (x - mean(x)) / std(x) + shift(y),   mean, std over H and W

    scale and shift are linear in the style y = [z, c]. With c alone only c could set a colour, for
    the normalisation wipes out the mean of what comes from below [ours].
    """

    def __init__(self, channels):
        super().__init__()
        self.style = nn.Linear(2 * EMBED, 2 * channels)

    def forward(self, x, style):
        scale, shift = self.style(style)[:, :, None, None].chunk(2, 1)  # (B, 2C) -> 2 (B, C, 1, 1)
        x = x - x.mean((2, 3), keepdim=True)  # (B, C, H, W) - (B, C, 1, 1)
        var = x.square().mean((2, 3), keepdim=True)  # -> (B, C, 1, 1)
        scale = ((1 + scale) * (var + 1e-5).rsqrt()).to(x.dtype)  # a GPU's bfloat16 stays that
        return torch.addcmul(shift, scale, x)  # shift + scale x; keeps channels_last


class GBlock(nn.Module):
    """Residual block of [SNGAN]'s generator: (B, C, H, W), style (B, 2D) -> (B, C', 2H, 2W).

    Up-sampling is bilinear as in [StyleGAN], for nearest-neighbour left stripes; it follows the
    first convolution and the 1x1 layer, in [SNGAN] it is before them: half of the time [ours].
    """

    def __init__(self, channels, out):
        super().__init__()
        self.norm1, self.norm2 = AdaIN(channels), AdaIN(out)
        self.conv1 = nn.Conv2d(channels, out, 3, padding=1)
        self.conv2 = nn.Conv2d(out, out, 3, padding=1)
        self.skip = nn.Conv2d(channels, out, 1)

    def forward(self, x, style):
        h = double(self.conv1(F.relu(self.norm1(x, style))))  # (B, C, H, W) -> (B, C', 2H, 2W)
        h = self.conv2(F.relu(self.norm2(h, style)))
        return h + double(self.skip(x))  # (B, C, H, W) -> (B, C', 2H, 2W)


def double(x):
    """(B, C, H, W) -> (B, C, 2H, 2W); autocast would answer in float32."""
    return F.interpolate(x, scale_factor=2, mode="bilinear").to(x.dtype)


class Generator(nn.Module):
    """G: z (B, D) and c (B, D) -> faces (B, 3, H, W) in [-1, 1].

    A linear map of [z, c] to 4x4 places, blocks that double the side, tanh [SNGAN]; AdaIN in each
    layer [paper §3.2]. In [SNGAN] width is 64, size 128. c is read with the length c_scale, for it
    varies in few directions, z in 128 with variance 1 each [ours].
    """

    def __init__(self, size=128, width=64, c_scale=1.0):
        super().__init__()
        self.c_scale, ups = c_scale, count_doublings(size)
        widths = [width * 2 ** min(i, 4) for i in range(ups, -1, -1)]  # 1024 1024 512 256 128 64
        self.first = nn.Linear(2 * EMBED, widths[0] * 4 * 4)
        self.blocks = nn.ModuleList(GBlock(*pair) for pair in zip(widths, widths[1:]))
        self.norm = AdaIN(widths[-1])
        self.last = nn.Conv2d(widths[-1], 3, 3, padding=1)
        init_convs(self)
        nn.init.xavier_uniform_(self.last.weight, 0.3)  # tanh starts where it has a slope [ours]

    def forward(self, z, c):
        style = torch.cat([z, scale_normalize(c, self.c_scale)], 1)  # (B, D), (B, D) -> (B, 2D)
        x = self.first(style).unflatten(1, (-1, 4, 4))  # (B, 2D) -> (B, C, 4, 4)
        x = x.contiguous(memory_format=torch.channels_last)
        for block in self.blocks:
            x = block(x, style)  # (B, C, H, W) -> (B, C', 2H, 2W)
        x = self.last(F.relu(self.norm(x, style)))  # (B, C, H, W) -> (B, 3, H, W)
        return torch.tanh(x.float())


class Discriminator(nn.Module):
    """faces (B, 3, H, W) -> phi (B, D) and psi (B,), of which Eq. 2 makes g(f, c).

    phi starts as the trained F and goes on training [paper §3.2]. It comes out times `weight`, 1 in
    the paper. psi is linear in what phi's head reads, in the paper in phi(f): from an embedding of
    one length only silhouettes were learned [ours]. Losses take differences: no bias.
    """

    def __init__(self, face_encoder, weight=1.0):
        super().__init__()
        self.phi, self.weight = copy.deepcopy(face_encoder).requires_grad_(True), weight
        self.psi = nn.Linear(face_encoder.head.in_features, 1, bias=False)
        nn.init.normal_(self.psi.weight, std=0.01)  # [ours]

    def forward(self, faces):
        h = self.phi.features(faces)  # (B, 3, H, W) -> (B, C)
        phi = scale_normalize(self.phi.head(h), self.phi.scale)  # (B, C) -> (B, D)
        return self.weight * phi, self.psi(h)[:, 0].float()  # (B, C) -> (B, 1) -> (B,)


def inner(c, phi):
    """<c, phi>: (B, D), (B, D) -> (B,)."""
    return (c * phi).sum(1)


def logit(c, phi, psi):
    """g(f, c) = <c, phi(f)> + psi(f): Eq. 2 with Eq. 3's c = S(s); (B, D), (B, D), (B,) -> (B,)."""
    return inner(c, phi) + psi


def rel_loss(g_real, g_fake):
    """-E log A(g(real, c+) - g(fake, c+)): Eq. 4 in Eq. 6; logits (B,), (B,) -> ().

    A is the sigmoid: -log A(x) = softplus(-x). For G real and fake change places.
    """
    return F.softplus(-(g_real - g_fake)).mean()


def relid_loss(g_real, g_fake, match, mismatch):
    """-E log A(g(real, c+) - g(fake, c+) + <c+, phi(real)> - <c-, phi(real)>): Eq. 5 in Eq. 6.

    All (B,). match = <c+, phi(real)>, which g(real, c+) holds once already, and mismatch =
    <c-, phi(real)> keep D asking who fits whom, which phi would forget [paper §3.2]. Our reading:
    one sigmoid around all terms, as in Eq. 4; for G the fake takes the real face's place in all.
    """
    return F.softplus(-(g_real - g_fake + match - mismatch)).mean()


def r1_penalty(discriminator, faces, c):
    """R1 = E |grad_f g(f, c)|^2 over faces (B, 3, H, W), without gamma / 2: -> () [R1]."""
    faces = faces.detach().requires_grad_(True)
    grad, = torch.autograd.grad(logit(c, *discriminator(faces)).sum(), faces, create_graph=True)
    return grad.square().sum((1, 2, 3)).mean()  # (B, 3, H, W) -> (B,) -> ()


@torch.no_grad()
def update_ema(g_ema, generator, decay):
    """Move the running average of G's weights, which is what is tested, towards G's."""
    for average, new in zip(g_ema.parameters(), generator.parameters()):
        average.lerp_(new, 1 - decay)  # decay average + (1 - decay) new


# ==== 3. Training both stages   [paper §3, §4] ====================================================

DIRECTIONS = ("v-f", "f-v")
SYNTHETIC = "data/synthetic"  # the one corpus that is made where it is missing
MOMENTUM, WEIGHT_DECAY = 0.9, 1e-4  # of SGD [ours]
SINC_LR = 1e4  # learning rate of the sinc cut-offs, being in Hz, in units of the others' [ours]
MAX_NORM = 1.0  # length to which longer gradients are cut [ours]
BETAS = (0.0, 0.99)  # of Adam [StyleGAN]
R1_EVERY = 16  # R1 is computed in each 16th step, times 16 [StyleGAN2]


def setting(default, meaning, low=None, choices=None):
    """A dataclass field with --help text and allowed values: at least `low` or one of `choices`."""
    return field(default=default, metadata=dict(help=meaning, low=low, choices=choices))


@dataclass
class RunSettings:
    """What both training commands may be told: every field is a flag. Defaults: preset `small`."""

    data: str = setting(SYNTHETIC, "corpus folder; this default is made when missing")
    preset: str = setting("small", "for two CPU cores, or as the paper", choices=("small", "paper"))
    seed: int = setting(0, "seed of all that is random", low=0)
    device: str = setting("auto", "cpu, cuda, cuda:1, ...; auto is cuda where there is one")
    workers: int = setting(1, "loader processes; 0 loads in this process", low=0)
    runs: int = setting(5, "runs of a test, with fresh negatives [paper §4]", low=1)
    val_clips: int = setting(2000, "clips of a validation at most, always the same [ours]", low=2)
    save_every: int = setting(100, "steps between checkpoints", low=1)
    log_every: int = setting(50, "steps between log lines", low=1)
    resume: bool = setting(False, "go on with the run in --out, if there is one")


@dataclass
class MatchSettings(RunSettings):
    """Settings of match-train."""

    out: str = setting("runs/match", "run folder: checkpoints, log, metrics")
    direction: str = setting("v-f", "given a voice pick a face, or the reverse", choices=DIRECTIONS)
    k: int = setting(10, "candidates of a matching task in training [paper §4]", low=2)
    steps: int = setting(1500, "training steps [ours]", low=1)
    batch: int = setting(32, "clips per step and process, at least K [ours]", low=2)
    seconds: float = setting(1.5, "length of a speech window [ours]; 6 in [paper §4]")
    size: int = setting(64, "side of a face [ours]; 128 in [paper §2]", choices=(32, 64, 128))
    sinc_stride: int = setting(8, "stride of the sinc layer [ours]; 1 in [PASE]", low=1)
    speech_width: int = setting(16, "sinc filters, unit of S's widths [ours]; 64 in [PASE]", low=1)
    face_width: int = setting(16, "F's first channels, unit of widths [ours]; 64 in [SNGAN]", low=1)
    embed_scale: float = setting(3.5, "length of an embedding [ours]", low=0.1)
    lr: float = setting(0.05, "peak learning rate of SGD [ours]", low=0)
    eval_every: int = setting(300, "steps between validations", low=1)


@dataclass
class GanSettings(RunSettings):
    """Settings of gan-train."""

    match: str = setting("runs/match/best.pt", "checkpoint of match-train: S, F and their sizes")
    out: str = setting("runs/gan", "run folder: checkpoint, log, samples, metrics")
    loss: str = setting("relid", "relid: Eq. 5; rel: Eq. 4 [paper §3.2]", choices=("relid", "rel"))
    steps: int = setting(5000, "training steps, each one of D and one of G [ours]", low=1)
    batch: int = setting(8, "real faces per step and process [ours]", low=2)
    width: int = setting(16, "G's last channels, unit of widths [ours]; 64 in [SNGAN]", low=1)
    weight: float = setting(1.0, "of <c, phi(f)> beside psi(f) [paper §3.2]", low=0)
    c_scale: float = setting(1.0, "length of c as G reads it [ours]", low=1e-6)
    lr: float = setting(2e-3, "learning rate of G's Adam [ours]", low=0)
    d_lr: float = setting(1e-3, "learning rate of D's Adam [ours]", low=0)
    gamma: float = setting(1.0, "R1: gamma/2 E |grad_f g(f, c+)|^2 on real faces [R1]", low=0)
    ema_decay: float = setting(0.998, "of the running average of G's weights [ours]", low=0)
    eval_every: int = setting(500, "steps between validations and samples", low=1)


BIG = dict(batch=64, steps=200_000, eval_every=2000, save_every=1000, log_every=100, workers=8)
PAPER = {  # the presets `paper`: sizes as in the sources above, BIG and the rates [ours]
    "match-train": BIG | dict(seconds=6.0, size=128, sinc_stride=1, speech_width=64, face_width=64),
    "gan-train": BIG | dict(width=64, lr=2e-4, d_lr=2e-4, ema_decay=0.999)}


def make_encoders(cfg, device):
    """Fresh S and F as MatchSettings say, with channels last in memory: faster on a CPU."""
    speech_encoder = SpeechEncoder(cfg.speech_width, cfg.sinc_stride, cfg.embed_scale)
    face_encoder = FaceEncoder(cfg.size, cfg.face_width, cfg.embed_scale)
    return [e.to(device, memory_format=torch.channels_last) for e in (speech_encoder, face_encoder)]


def make_generator(match, cfg, device):
    """A fresh G as both settings say."""
    generator = Generator(match.size, cfg.width, cfg.c_scale)
    return generator.to(device, memory_format=torch.channels_last)


def warm_cosine(step, steps):
    """Share of the peak rate in steps 1, 2, ...: a rise in a tenth, then a cosine [ours]."""
    warm = max(1, steps // 10)
    if step <= warm:
        return step / warm
    return 0.5 * (1 + math.cos(math.pi * (step - 1 - warm) / max(1, steps - warm)))


def late_fall(step, steps):
    """Share of the peak rate in steps 1, 2, ...: down to 0 from half-way on [ours]."""
    return min(1, 2 - 2 * (step - 1) / steps)


def descend(optimizer, loss, share, max_norm=math.inf):
    """One step down the loss at a share of the peak rates, those the optimizer was made with."""
    for group in optimizer.param_groups:
        group["lr"] = share * group.setdefault("peak", group["lr"])  # saved with its state
    optimizer.zero_grad()
    loss.backward()
    if max_norm < math.inf:
        weights = [p for group in optimizer.param_groups for p in group["params"]]
        nn.utils.clip_grad_norm_(weights, max_norm)
    optimizer.step()


def match_train(cfg):
    """Train S and F on Eq. 1, no labels; keep and test the pair that validates best [ours]."""
    machine = Machine(cfg.device)
    corpus = open_corpus(cfg.data, dict(train=cfg.batch, val=2, test=2), machine)
    saved, out = open_run(cfg), Path(cfg.out)
    torch.manual_seed(cfg.seed)
    speech_encoder, face_encoder = make_encoders(cfg, machine.device)
    low_hz, band_hz, *weights = (*speech_encoder.parameters(), *face_encoder.parameters())
    groups = [dict(params=weights, weight_decay=WEIGHT_DECAY),
              dict(params=[low_hz, band_hz], lr=cfg.lr * SINC_LR)]  # the sinc layer's
    optimizer = torch.optim.SGD(groups, cfg.lr, MOMENTUM)  # [paper §4]
    pairs = PairDataset(corpus["train"], cfg, cfg.batch, cfg.seed, shuffle=True)
    if not saved["step"]:
        speech, faces, *_ = next(load_batches(pairs, [0], 0, machine.device))
        centre_head(speech_encoder, speech)
        centre_head(face_encoder, faces)
    model = Model(cfg, speech_encoder, face_encoder)
    parts = dict(speech=speech_encoder, face=face_encoder, optimizer=optimizer)
    restore(parts, saved)
    log, best = Log(cfg, machine, saved["step"]), saved["best"]
    train_s, train_f = machine.wrap(speech_encoder), machine.wrap(face_encoder)

    for step, speech, faces in training_batches(pairs, cfg, log, machine):  # (B, T), (B, 3, H, W)
        rng = step_generator(cfg.seed, step, machine.rank)
        candidates = sample_candidates(len(faces), cfg.k, rng)  # (B, K)
        with machine.autocast:
            se, fe = train_s(speech), train_f(faces)  # (B, T) -> (B, D), (B, 3, H, W) -> (B, D)
        logits = match_logits(se, fe, candidates, cfg.direction)  # (B, D), (B, D) -> (B, K)
        positive = torch.zeros(len(logits), dtype=torch.long, device=logits.device)  # column 0
        loss = F.cross_entropy(logits, positive)  # Eq. 1
        descend(optimizer, loss, warm_cosine(step, cfg.steps), MAX_NORM)

        log.add(step, loss=loss, accuracy=100 * top1(logits).mean())  # written each --log-every
        if machine.is_first and due(step, cfg.eval_every, cfg.steps):
            best = validate_matching(model, corpus["val"], machine, step, best)
            speech_encoder.train(), face_encoder.train()
        if machine.is_first and due(step, cfg.save_every, cfg.steps):
            save_checkpoint(out / "last.pt", parts, cfg, step=step, best=best)
    if machine.is_first:
        report(load_model(out / "best.pt", MatchSettings, machine), corpus["test"], cfg, machine)
    machine.wait()


def gan_train(cfg):
    """Train G and D [paper §3.2]; g_ema, the running average of G, is what is kept and tested."""
    machine = Machine(cfg.device)
    corpus = open_corpus(cfg.data, dict(train=cfg.batch, val=2, test=2), machine)
    saved, out = open_run(cfg), Path(cfg.out)
    trained = (out / "last.pt", GanSettings) if saved["step"] else (cfg.match, MatchSettings)
    match, speech_encoder, face_encoder, *_ = load_model(*trained, machine)
    torch.manual_seed(cfg.seed)
    generator = make_generator(match, cfg, machine.device)
    discriminator = Discriminator(face_encoder, cfg.weight).to(machine.device)
    g_ema = copy.deepcopy(generator)
    g_optimizer = torch.optim.Adam(generator.parameters(), cfg.lr, BETAS)  # [paper §4]
    d_optimizer = torch.optim.Adam(discriminator.parameters(), cfg.d_lr, BETAS)
    model = Model(match, speech_encoder, face_encoder, cfg, g_ema)
    parts = dict(speech=speech_encoder, face=face_encoder, g_ema=g_ema, g=generator,
                 d=discriminator, g_optimizer=g_optimizer, d_optimizer=d_optimizer)
    restore(parts, saved)
    log = Log(cfg, machine, saved["step"])
    train_g, train_d = machine.wrap(generator), machine.wrap(discriminator)
    pairs = PairDataset(corpus["train"], match, cfg.batch, cfg.seed, shuffle=True)

    for step, speech, real in training_batches(pairs, cfg, log, machine):  # (B, T), (B, 3, H, W)
        rng = step_generator(cfg.seed, step, machine.rank)
        z = torch.randn(len(real), EMBED, generator=rng).to(real.device)  # (B, D)
        others = sample_candidates(len(real), 2, rng)[:, 1]  # (B,): somebody else for each
        with machine.autocast:
            with torch.no_grad():  # S is frozen [ours]
                c_pos = speech_encoder(speech)  # c+: (B, T) -> (B, D)
            c_neg = c_pos[others]  # c-: (B, D)
            fake = train_g(z, c_pos)  # (B, D), (B, D) -> (B, 3, H, W)
            phi, psi = train_d(torch.cat([real, fake.detach()]))  # (2B, D), (2B,)
        (phi_real, phi_fake), (psi_real, psi_fake) = phi.chunk(2), psi.chunk(2)
        g_real = logit(c_pos, phi_real, psi_real)  # g(real, c+), Eq. 2 and 3: (B,)
        g_fake = logit(c_pos, phi_fake, psi_fake)  # g(fake, c+)
        match_real, mismatch_real = inner(c_pos, phi_real), inner(c_neg, phi_real)  # (B,), (B,)
        loss_d = (relid_loss(g_real, g_fake, match_real, mismatch_real)  # Eq. 5 in Eq. 6: ()
                  if cfg.loss == "relid" else rel_loss(g_real, g_fake))  # Eq. 4 in Eq. 6: ()
        r1 = r1_penalty(train_d, real, c_pos) if step % R1_EVERY == 0 else 0.0  # ()
        descend(d_optimizer, loss_d + cfg.gamma / 2 * R1_EVERY * r1, late_fall(step, cfg.steps))

        discriminator.requires_grad_(False)  # G's step trains G alone; D has moved: asked anew
        with machine.autocast:
            (phi_fake, psi_fake), (phi_real, psi_real) = discriminator(fake), discriminator(real)
        g_real, g_fake = logit(c_pos, phi_real, psi_real), logit(c_pos, phi_fake, psi_fake)  # (B,)
        match_fake, mismatch_fake = inner(c_pos, phi_fake), inner(c_neg, phi_fake)  # (B,), (B,)
        loss_g = (relid_loss(g_fake, g_real, match_fake, mismatch_fake)  # Eq. 6, non-saturating:
                  if cfg.loss == "relid" else rel_loss(g_fake, g_real))  # real and fake swapped
        descend(g_optimizer, loss_g, late_fall(step, cfg.steps))
        discriminator.requires_grad_(True)
        update_ema(g_ema, generator, cfg.ema_decay)

        log.add(step, loss_d=loss_d, loss_g=loss_g, match_real=match_real.mean(),
                match_fake=match_fake.mean(), mismatch_real=mismatch_real.mean())
        if machine.is_first and due(step, cfg.eval_every, cfg.steps):
            validate_generator(model, corpus["val"], machine, step)
        if machine.is_first and due(step, cfg.save_every, cfg.steps):
            save_checkpoint(out / "last.pt", parts, cfg, step=step, match=asdict(match))
    if machine.is_first:
        report(model, corpus["test"], cfg, machine)
    machine.wait()


# ==== 4. Evaluation: K-way tests [paper §4, Tables 1, 2], their ceiling, QTA 1 to 3, what c, z do =
# A test takes one clip of each identity. Every run draws fresh windows, pictures, negatives and z.
# The judge is the first stage's F, not phi. people: the N clips' rows of labels.csv.

TASKS = list(itertools.product(DIRECTIONS, (2, 10)))  # K of the tests [paper §4]
RANKS = (1, 2, 5, 10)  # of R@k [paper Table 3]
GALLERY = 5000  # faces to retrieve from, at most [paper §4]


class Model(NamedTuple):
    """Trained networks and their settings; the last two are gan-train's."""

    match: MatchSettings
    speech_encoder: nn.Module
    face_encoder: nn.Module
    gan: GanSettings = None
    g_ema: nn.Module = None


@torch.no_grad()
def embed(model, split, seed, machine, workers=0):
    """A pair of each identity: speech (N, D), faces (N, D), identity (N,); eval mode afterwards."""
    pairs, rows = PairDataset(split, model.match, model.match.batch, seed), []
    speech_encoder, face_encoder = model.speech_encoder.eval(), model.face_encoder.eval()
    batches = load_batches(pairs, range(len(pairs)), workers, machine.device)
    for speech, faces, identity, _ in batches:
        se, fe = speech_encoder(speech), face_encoder(faces)  # (B, D), (B, D)
        rows.append((se.cpu(), fe.cpu(), identity))
    return [torch.cat(column) for column in zip(*rows)]


def validate_matching(model, split, machine, step, best):
    """Accuracy (%) of the trained direction, 10-way; a new best goes to best.pt [ours]."""
    cfg, some = model.match, thin(split, max(2, model.match.val_clips // model.match.runs))
    metrics = evaluate(model, some, {}, cfg.runs, cfg.seed, machine, cfg.workers)
    task = f"{cfg.direction}/{10 if len(some.names) >= 10 else 2}"
    if task not in metrics:
        raise UserError(f"{split.folder}: too few of its people can be read (run check-data)")
    print(f"validation after step {step}: {task} {show(metrics, task)} %", flush=True)
    if metrics[task] > best:
        parts = dict(speech=model.speech_encoder, face=model.face_encoder)
        save_checkpoint(Path(cfg.out, "best.pt"), parts, cfg, step=step)
    return max(metrics[task], best)


def validate_generator(model, split, machine, step):
    """Print QTA 2 and draw samples/STEP.png."""
    cfg, folder = model.gan, make_folder(Path(model.gan.out, "samples"))
    metrics = evaluate(model, thin(split, cfg.val_clips), {}, 1, cfg.seed, machine, cfg.workers)
    print(f"validation after step {step}:", *(f"{key} {metrics[key]:.1f} %" for key in
          ("preferred", "f-v/2", "real/f-v/2")), flush=True)
    plot_samples(model, split, folder / f"{step:06}.png", machine)


def matching_scores(speech, faces, people, seed, prefix=""):
    """One run of all tests on embeddings (N, D): {prefix + "v-f/2": percent, ...}.

    With /gender wrong answers are of the right one's gender, and clips without one stay out. A test
    with fewer than K people is left out.
    """
    genders, scores = np.array([row.get("gender") or "" for row in people]), {}
    alike = [torch.from_numpy(np.flatnonzero(genders == g)) for g in sorted({*genders} - {""})]
    for (direction, k), suffix in itertools.product(TASKS, ("", "/gender")):
        hits, generator = [], torch.Generator().manual_seed(seed)
        for rows in alike if suffix else [torch.arange(len(speech))]:
            if len(rows) >= k:
                candidates = sample_candidates(len(rows), k, generator)  # (n, K)
                hits.append(top1(match_logits(speech[rows], faces[rows], candidates, direction)))
        if hits:
            scores[f"{prefix}{direction}/{k}{suffix}"] = 100 * torch.cat(hits).mean().item()
    return scores


def oracle_embeddings(people):
    """What perfect encoders would answer for people with known factors: two of (N, E).

    For standard normals v, f of correlation r the best score for Eq. 1 is
        log p(v, f) / (p(v) p(f)) = const + a v f - b v^2 - b f^2,  a = r / (1 - r^2), b = r a / 2,
    an inner product: <(a v, -b v^2, 1), (f, 1, -b f^2)>, summed over the linked factors. A face of
    the other gender is impossible. No method can expect to do better.
    """
    a, b = LINK / (1 - LINK**2), LINK**2 / (1 - LINK**2) / 2
    v = numbers(people, [f"voice_{name}" for name in LINKED])  # (N, 3)
    f, gender = numbers(people, LINKED), 2 * numbers(people, ["gender"]) - 1  # (N, 3), (N, 1)
    one = torch.ones_like(v)  # (N, 3)
    voices = torch.cat([a * v, -b * v**2, one, 1000 * gender], 1)  # (N, 10)
    return voices, torch.cat([f, one, -b * f**2, gender], 1)  # (N, 10), (N, 10)


def numbers(people, columns):
    """Columns of P rows of labels.csv: (P, E)."""
    return torch.tensor([[float(row[column]) for column in columns] for row in people])


def preference(c, faces, others):
    """QTA 2: how often (%) voices (N, D) fit the first of two faces, (N, D) each, better."""
    return 100 * top1(torch.stack([inner(c, faces), inner(c, others)], 1)).mean().item()  # (N, 2)


def distance_panels(c, fake, people, seed):
    """QTA 1 of N couples: {couples: (CD(c1, c2), CD(F(G(z1, c1)), F(G(z2, c2))))}, (n,) each."""
    other = sample_candidates(len(c), 2, torch.Generator().manual_seed(seed))[:, 1]  # (N,)
    cd_c, cd_f = (1 - F.cosine_similarity(x, x[other]) for x in (c, fake))  # (N, D) -> (N,)
    genders = [row.get("gender") for row in people]
    alike = torch.tensor([genders[i] == genders[j] for i, j in enumerate(other.tolist())])  # (N,)
    panels = {"all couples": (cd_c, cd_f)}
    if all(genders):
        panels |= {"different gender": (cd_c[~alike], cd_f[~alike]),
                   "same gender": (cd_c[alike], cd_f[alike])}
    return {title: panel for title, panel in panels.items() if len(panel[0]) > 2}


def pearson(x, y):
    """Pearson's r of two tensors of one shape."""
    return torch.corrcoef(torch.stack([x.flatten(), y.flatten()]))[0, 1].item()


def recall(distances, name):
    """QTA 3: {name/k: R@k in percent} of distances (G, G), where face i is query i's own."""
    rank = (distances <= distances.diagonal()[:, None]).sum(1)  # (G, G) -> (G,), 1 is the nearest
    return {f"{name}/{k}": 100 * (rank <= k).float().mean().item() for k in RANKS}


@torch.no_grad()
def apply(network, *inputs):
    """network(*inputs), (N, ...), on the CPU, 32 rows at a time on the network's device."""
    device, chunks = next(network.parameters()).device, zip(*(x.split(32) for x in inputs))
    return torch.cat([network(*(x.to(device) for x in chunk)).cpu() for chunk in chunks])


def generate_faces(model, c, z):
    """G(z, c), (N, 3, H, W), on the CPU, of z and c, (N, D) each or one of them (D,) for all."""
    return apply(model.g_ema, *torch.broadcast_tensors(z, c))


def embed_fakes(model, c, seed):
    """F(G(z, c)), (N, D), of N conditions (N, D), on the CPU; z is new for each."""
    z = torch.randn(c.shape, generator=torch.Generator().manual_seed(seed))  # (N, D)
    return apply(model.face_encoder, generate_faces(model, c, z))


def drawn_scores(c, fake, real, people, seed):
    """One run of QTA 1 to 3 and the K-way tests on drawn faces; c, fake, real (N, D) embeddings."""
    scores = {"preferred": preference(c, fake, real)} | matching_scores(c, fake, people, seed)
    for title, (cd_c, cd_f) in distance_panels(c, fake, people, seed).items():
        name = f"qta1/{title.split()[0]}"  # qta1/all, qta1/different, qta1/same
        scores |= {f"{name}/c": cd_c.mean().item(), f"{name}/face": cd_f.mean().item(),
                   f"{name}/r": pearson(cd_c, cd_f)}
    fake, real = fake[:GALLERY], real[:GALLERY]  # (G, D), (G, D)
    scores |= recall(torch.cdist(fake, real, p=1.0), "retrieval/L1")  # (G, G)
    scores |= recall(torch.cdist(fake, real), "retrieval/L2")
    return scores | recall(-F.normalize(fake) @ F.normalize(real).T, "retrieval/cosine")


def evaluate(model, split, labels, runs, seed, machine, workers=0, baseline=None):
    """All scores on a split, in percent: {key: mean, key/std: deviation} over runs.

    Of encoders the K-way tests, and oracle/ where factors are known. Of a generator drawn_scores,
    the K-way tests on true faces as real/, and a second generator's as baseline/.
    """
    found = {}  # {key: a score per run}; a run may lack people for a K
    for seed in range(seed + 1000, seed + 1000 * (runs + 1), 1000):
        with machine.autocast:
            c, real, identity = embed(model, split, seed, machine, workers)  # (N, D), (N, D), (N,)
            fake, other = (embed_fakes(m, c, seed) if m and m.g_ema else None
                           for m in (model, baseline))  # (N, D), with the same z
        people = [labels.get(name, {}) for name in split.names[identity.numpy()]]
        scores = matching_scores(c, real, people, seed, "real/" if model.g_ema else "")
        if all("voice_age" in row for row in people):
            voices, faces = oracle_embeddings(people)  # (N, E), (N, E)
            scores |= matching_scores(voices, faces, people, seed, "oracle/")
            scores |= recall(-voices[:GALLERY] @ faces[:GALLERY].T, "oracle/retrieval")
        if model.g_ema:
            scores |= drawn_scores(c, fake, real, people, seed)
        if baseline:
            scores["over_baseline"] = preference(c, fake, other)
            theirs = drawn_scores(c, other, real, people, seed)
            scores |= {f"baseline/{key}": score for key, score in theirs.items()}
        for key, score in scores.items():
            found.setdefault(key, []).append(score)
    metrics = {key: round(float(np.mean(scores)), 3) for key, scores in found.items()}
    return metrics | {f"{key}/std": round(float(np.std(scores, ddof=1)), 3)
                      for key, scores in found.items() if len(scores) > 1}


def show(metrics, key, digits=1):
    """A metric with its deviation as text; "-" where nothing was measured."""
    std = f" ± {metrics[f'{key}/std']:.{digits}f}" if f"{key}/std" in metrics else ""
    return f"{metrics[key]:.{digits}f}{std}" if key in metrics else "-"


def report(model, split, args, machine):
    """Test as args say (data, out, runs, seed, workers): print a table, write metrics.json."""
    labels = read_labels(args.data)
    metrics = evaluate(model, split, labels, args.runs, args.seed, machine, args.workers)
    columns = {"drawn": "", "true faces": "real/"} if model.g_ema else {"trained": ""}
    columns["oracle"] = "oracle/"
    print("\naccuracy in %", *(f"{title:>14}" for title in (*columns, "chance")))
    for (direction, k), suffix in itertools.product(TASKS, ("", "/gender")):
        keys = [f"{prefix}{direction}/{k}{suffix}" for prefix in columns.values()]
        print(f"{direction.upper()} {k:>2}-way{' same' if suffix else '':5}",
              *(f"{show(metrics, key):>14}" for key in keys), f"{100 / k:14.1f}")
    if model.g_ema:
        print(f"drawn face preferred to the true one: {show(metrics, 'preferred')} %")
    write_json(make_folder(args.out) / "metrics.json", metrics)


def match_test(args):
    """Test trained encoders on one split: both directions, K = 2 and 10."""
    machine = Machine(args.device)
    corpus = open_corpus(args.data, {args.split: 2})
    report(load_model(args.match, MatchSettings, machine), corpus[args.split], args, machine)


# What c and z control [paper QLA 1 to 3, by eye there], as a probe reads it from drawn faces [ours]


def train_probe(split, targets, model, machine, workers, steps=500, batch=64):
    """A network that reads from faces (N, 3, H, W) what is known of people: (N, E).

    F with fresh weights, taught on true faces of P people, targets (P, E): an instrument to look at
    drawn faces with, and the only thing that ever learns from a label.
    """
    torch.manual_seed(0)
    probe = FaceEncoder(model.match.size, model.match.face_width)
    probe.head = nn.Linear(probe.head.in_features, targets.shape[1])
    nn.init.normal_(probe.head.weight, std=1e-3)  # the features, being sums, are large
    probe.to(machine.device, memory_format=torch.channels_last)
    optimizer = torch.optim.Adam(probe.parameters(), 2e-3)
    pairs = PairDataset(split, model.match, min(batch, len(split.names)), 0, shuffle=True)
    pairs.flip = False  # or nothing would tell to which side a head tilts
    batches = load_batches(pairs, range(steps), workers, machine.device)
    for step, (_, faces, identity, _) in enumerate(batches, start=1):
        read = probe.head(probe.features(faces))  # (B, 3, H, W) -> (B, E)
        loss = F.mse_loss(read, targets[identity].to(machine.device))
        descend(optimizer, loss, warm_cosine(step, steps))
    probe.forward = lambda faces: probe.head(probe.features(faces))
    return probe


def variance_shares(read):
    """{"c", "z", "both": share of the variance of (V voices, Z, E) due to it, (E,)}.

    Two-way analysis of variance: the means over z vary by c alone, those over c by z alone.
    """
    total = read.var((0, 1), correction=0)  # (V, Z, E) -> (E,)
    c = read.mean(1).var(0, correction=0) / total  # (V, Z, E) -> (V, E) -> (E,)
    z = read.mean(0).var(0, correction=0) / total  # (V, Z, E) -> (Z, E) -> (E,)
    return {"c": c, "z": z, "both": 1 - c - z}


def control_scores(model, corpus, labels, machine, workers, voices=48, noises=16):
    """{control/<factor>/...}: of what the probe reads in faces drawn of V voices by Z noises.

    c, z, both: percent of the variance; voice: r with what the voice shows; probe: r with the truth
    on unseen true faces.
    """
    known = numbers([labels[name] for name in corpus["train"].names], FACTORS)  # (P, E)
    targets = (known - known.mean(0)) / known.std(0).clamp(min=1e-6)  # (P, E)
    probe = train_probe(corpus["train"], targets, model, machine, workers)
    speech, faces, names = sample_batch(corpus["test"], model.match, 400, 0, machine)
    people, seen = [labels[name] for name in names], apply(probe, faces)  # (N, E)
    z = torch.randn(noises, EMBED, generator=torch.Generator().manual_seed(0))  # (Z, D)
    c = apply(model.speech_encoder, speech[:voices])  # (V, D)
    read = torch.stack([apply(probe, generate_faces(model, one, z)) for one in c])  # (V, Z, E)
    metrics, shares = {}, variance_shares(read)
    for e, name in enumerate(FACTORS):
        metrics |= {f"control/{name}/{of}": 100 * share[e].item() for of, share in shares.items()}
        metrics[f"control/{name}/probe"] = pearson(seen[:, e], numbers(people, [name])[:, 0])
    for e, name in enumerate(["gender", *(f"voice_{name}" for name in LINKED)]):  # as in FACTORS
        voice = numbers(people[:voices], [name]).expand(-1, noises)  # (V, 1) -> (V, Z)
        metrics[f"control/{FACTORS[e]}/voice"] = pearson(read[..., e], voice)
    right = (read[..., 0] > 0) == (numbers(people[:voices], ["gender"]) > 0.5)  # (V, Z), (V, 1)
    metrics["control/gender/right"] = 100 * right.float().mean().item()
    return {key: round(value, 3) for key, value in metrics.items()}


# ==== 5. Figures 2 to 6, the report, faces for any recording ======================================


def to_image(face):
    """(3, H, W) in [-1, 1] -> a PIL picture."""
    pixels = ((face.cpu() + 1) * 127.5).round().clamp(0, 255).byte()
    return Image.fromarray(pixels.permute(1, 2, 0).numpy())  # (3, H, W) -> (H, W, 3)


def plot_grid(path, rows, names, heads, side=128, line=24):
    """A picture of faces: rows of (n, 3, H, W), each under its name, each column under its head."""
    font, cell = ImageFont.load_default(14), side + 4
    size = max(map(len, rows)) * cell, line + len(rows) * (cell + line)
    picture = Image.new("RGB", size, "white")
    draw = ImageDraw.Draw(picture)
    for i, head in enumerate(heads):
        draw.text((i * cell + cell // 2, line // 2), head, "black", font, anchor="mm")
    for j, (faces, name) in enumerate(zip(rows, names)):
        top = line + j * (cell + line)
        draw.text((4, top + line // 2), str(name), (90, 90, 90), font, anchor="lm")
        for i, face in enumerate(faces):
            face = to_image(face).resize((side, side), Image.Resampling.NEAREST)
            picture.paste(face, (i * cell + 2, top + line))
    picture.save(path)


def plot_scatter(path, panels, across, up, side=300, margin=40):
    """Panels {title: (x, y)} side by side, (n,) each; axes from 0 to the largest value of all."""
    font = ImageFont.load_default(13)
    limit = max(v.max().item() for xy in panels.values() for v in xy)
    picture = Image.new("RGB", ((margin + side) * len(panels) + margin, side + 2 * margin), "white")
    draw = ImageDraw.Draw(picture)
    for i, (title, (xs, ys)) in enumerate(panels.items()):
        left, foot = margin + i * (margin + side), margin + side
        draw.rectangle((left, margin, left + side, foot), outline="black")
        for x, y in zip((left + side * xs / limit).tolist(), (foot - side * ys / limit).tolist()):
            draw.ellipse((x - 1.5, y - 1.5, x + 1.5, y + 1.5), (70, 110, 170))
        draw.text((left, margin - 22), f"{title}: up {up}", "black", font)
        draw.text((left, foot + 8), f"across {across}; both 0 to {limit:.2f}", "black", font)
    picture.save(path)


def sample_batch(split, cfg, count, seed, machine):
    """A pair each of `count` people of a split: speech (N, T), faces (N, 3, H, W), names."""
    pairs = PairDataset(thin(split, count), cfg, count, seed)
    speech, faces, identity, _ = next(load_batches(pairs, [0], 0, machine.device))
    return speech, faces, pairs.split.names[identity.numpy()]


def plot_samples(model, split, path, machine, rows=6, columns=7):
    """Figure 2: a voice per row, a z per column, the same at every call; first the true face."""
    speech, faces, names = sample_batch(split, model.match, rows, 0, machine)
    c, faces = apply(model.speech_encoder, speech), faces.cpu()  # (rows, D), (rows, 3, H, W)
    z = torch.randn(columns, EMBED, generator=torch.Generator().manual_seed(0))
    grid = [torch.cat([faces[i:i + 1], generate_faces(model, c[i], z)]) for i in range(len(c))]
    plot_grid(path, grid, names, ["true face", *(f"z {i + 1}" for i in range(columns))])


def plot_report(model, split, labels, out, seed, machine, rows=4, columns=7, top=5):
    """Figures 2 to 6 for a report: voices by z, between voices, between z, distances, retrieval."""
    plot_samples(model, split, out / "grid.png", machine)
    speech, faces, names = sample_batch(split, model.match, 500, seed, machine)
    real, faces = apply(model.face_encoder, faces), faces.cpu()  # (N, D), (N, 3, H, W)
    c = apply(model.speech_encoder, speech)  # (N, D)
    fake = embed_fakes(model, c, seed)  # (N, D)
    z = torch.randn(c.shape, generator=torch.Generator().manual_seed(seed))  # (N, D), that of fake
    t = torch.linspace(0, 1, columns)[:, None]  # (columns, 1), shares of the way
    nearest = (F.normalize(fake) @ F.normalize(real).T).topk(min(top, len(c))).indices  # (N, top)
    shown = np.linspace(0, len(c) - 1, rows + 1, dtype=int)  # some of the voices
    between_voices, between_z, retrieval = [], [], []
    for a, b in zip(shown, shown[1:]):
        own, other = faces[a:a + 1], faces[b:b + 1]  # (1, 3, H, W)
        way = generate_faces(model, torch.lerp(c[a], c[b], t), z[a])  # (columns, 3, H, W)
        between_voices.append(torch.cat([own, way, other]))
        between_z.append(torch.cat([own, generate_faces(model, c[a], torch.lerp(z[a], z[b], t))]))
        drawn = generate_faces(model, c[a:a + 1], z[a:a + 1])  # (1, 3, H, W)
        retrieval.append(torch.cat([own, drawn, faces[nearest[a]]]))
    heads = ["true face", *(f"{100 * share:.0f} %" for share in t[:, 0])]
    plot_grid(out / "between_voices.png", between_voices, names[shown], [*heads, "true face"])
    plot_grid(out / "between_z.png", between_z, names[shown], heads)
    plot_grid(out / "retrieval.png", retrieval, names[shown],
              ["true", "drawn", *(f"nearest {n + 1}" for n in range(top))])
    panels = distance_panels(c, fake, [labels.get(name, {}) for name in names], seed)
    plot_scatter(out / "distances.png", panels, "CD(c1, c2)", "CD(F(G(z1, c1)), F(G(z2, c2)))")


SECTIONS = (  # of the report: title, pictures, how the keys of metrics.json in it start
    ("Tables 1 and 2: matching in percent, of drawn faces, true ones (real/), by an oracle", "",
     ("v-f", "f-v", "real/", "oracle/v-f", "oracle/f-v", "baseline/v-f", "baseline/f-v")),
    ("QTA 2: how often (%) F prefers a drawn face", "",
     ("preferred", "over_baseline", "baseline/preferred")),
    ("Figures 2 to 4: voices by z, between two voices, between two z",
     "grid between_voices between_z", ()),
    ("QTA 1, Figure 5: do like voices get like faces?", "distances",
     ("qta1", "baseline/qta1")),
    ("QTA 3, Table 3, Figure 6: R@k (%), a drawn face looks for its speaker's", "retrieval",
     ("retrieval", "oracle/retrieval", "baseline/retrieval")),
    ("What c and z control", "", ("control",)))
THEIRS = {"real/f-v/2": 88.47, "f-v/2": 95.14, "preferred": 76.65, "baseline/preferred": 47.2,
          "over_baseline": 79.68, "qta1/different/c": 0.46, "qta1/same/c": 0.28,
          "qta1/different/face": 0.27, "qta1/same/face": 0.15}  # [paper §4]


def gan_test(args):
    """Write OUT/report.md with the figures and numbers of section 4, pictures, metrics.json."""
    machine, out, labels = Machine(args.device), make_folder(args.out), read_labels(args.data)
    model = load_model(args.gan, GanSettings, machine)
    baseline = load_model(args.baseline, GanSettings, machine) if args.baseline else None
    if baseline and not model.face_encoder.head.weight.equal(baseline.face_encoder.head.weight):
        raise UserError(f"--baseline {args.baseline}: has other encoders than {args.gan}")
    corpus = open_corpus(args.data, dict(test=3) | (dict(train=2) if labels else {}))
    metrics = evaluate(model, corpus["test"], labels, args.runs, args.seed, machine, args.workers,
                       baseline)
    known = {*FACTORS, *(f"voice_{name}" for name in LINKED)}
    names = np.concatenate([split.names for split in corpus.values()])
    if labels and all(known <= labels.get(name, {}).keys() for name in names):
        metrics |= control_scores(model, corpus, labels, machine, args.workers)
    write_json(out / "metrics.json", metrics)
    plot_report(model, corpus["test"], labels, out, args.seed, machine)
    page = (f"# {args.gan}, people of {args.data}/test\n\n--loss {model.gan.loss}, "
            f"{model.gan.steps} steps; baseline: {args.baseline or 'none'}. Mean ± deviation of "
            f"{args.runs} runs. The paper's numbers are of AVSpeech or VoxCeleb, not comparable.\n")
    for title, pictures, starts in SECTIONS:
        keys = [key for key in metrics if key.startswith(starts) and not key.endswith("/std")]
        page += f"\n## {title}\n\n" + "".join(f"![{p}]({p}.png)\n\n" for p in pictures.split())
        page += "| in metrics.json | here | paper |\n|---|---|---|\n" * bool(keys)
        page += "".join(f"| {key} | {show(metrics, key, 2)} | {THEIRS.get(key, '')} |\n"
                        for key in keys)
    (out / "report.md").write_text(page, encoding="utf8")
    print(f"{out / 'report.md'}: written")


def generate(args, recordings):
    """Draw n faces for each recording: a labelled picture, or a folder with one PNG per face."""
    machine, to_picture = Machine(args.device), args.out.lower().endswith(".png")
    model, rng = load_model(args.gan, GanSettings, machine), np.random.default_rng(args.seed)
    noise, rows = torch.Generator().manual_seed(args.seed), []
    z = torch.randn(args.n, EMBED, generator=noise)  # (n, D)
    for path in recordings:
        speech = torch.from_numpy(load_speech(path, model.match.seconds, rng))[None]  # (1, T)
        if speech.abs().max() < SILENCE:
            raise UserError(f"{path}: silent in the window of --seed {args.seed}, no voice to draw")
        c = apply(model.speech_encoder, speech)  # (1, D)
        rows.append(generate_faces(model, c, z))  # (n, 3, H, W)
        if not to_picture:
            z = torch.randn(args.n, EMBED, generator=noise)  # of its own for each face
    out = make_folder(Path(args.out).parent if to_picture else args.out)
    if to_picture:
        plot_grid(args.out, rows, recordings, [f"z {k + 1}" for k in range(args.n)])
    else:
        for i, k in itertools.product(range(len(rows)), range(args.n)):
            name = f"{i + 1:04}_{Path(recordings[i]).stem}_z{k + 1}.png"
            to_image(rows[i][k]).save(out / name)
    print(f"{args.out}: {args.n} faces for each of {len(rows)} recordings")


# ==== 6. Data: DATA/{train,val,test}/<identity>/<clip>/*.wav *.jpg, DATA/labels.csv   [ours] ======
# A picture whose name is a whole number, 1200.jpg, was taken 1200 ms into its clip's one recording:
# the speech that it is paired with leaves out that moment and GUARD around it.

SPEECH_FILES = (".wav", ".flac", ".mp3", ".m4a", ".aac", ".ogg", ".opus", ".wma")
FACE_FILES = (".jpg", ".jpeg", ".png")
GUARD = 0.3  # s between a picture's moment and its speech, on both sides [ours]
SPARE = 16  # further people who may stand in for a batch's unreadable ones [ours]
MIN_SIDE = 32  # pixels; a smaller face is a fault [ours]
SILENCE = 1e-4  # of full scale 1; a recording that never gets louder is a fault [ours]


class Split(NamedTuple):
    """A part of a corpus: its folder, its identities' names (P,). Files are listed when needed."""

    folder: Path
    names: np.ndarray  # 4 bytes a letter: a million names of 20 letters take 80 MB


def open_corpus(data, least, machine=None):
    """{split: Split} for the splits in `least`, which says how many identities each must have.

    No recording or picture is opened. With `machine`, for training, the synthetic corpus is made
    where it is missing.
    """
    if machine and machine.is_first and data == SYNTHETIC and not Path(data).exists():
        make_data(argparse.Namespace(identities=IDENTITIES, seed=0), data)
    if machine:
        machine.wait()
    read_labels(data)  # a fault there shall not wait for the end of training
    corpus = {}
    for split, count in least.items():
        folder = Path(data, split)
        if not folder.is_dir():
            raise UserError(f"{folder}: no such folder; a corpus is "
                            f"{data}/{{train,val,test}}/<identity>/<clip>/ with *.wav and *.jpg")
        found = (e.name for e in os.scandir(folder) if e.name[0] != "." and e.is_dir())
        names = np.array(sorted(found), dtype=str)
        if len(names) < count:
            raise UserError(f"{folder}: {len(names)} identities, at least {count} are needed: "
                            "as many as --batch for training, 2 for tests")
        for other in corpus.values():
            at = np.searchsorted(other.names, names).clip(max=len(other.names) - 1)  # (P,)
            for name in names[other.names[at] == names][:1]:
                raise UserError(f"{folder / name}: is also in {other.folder}; one split only")
        corpus[split] = Split(folder, names)
    return corpus


def thin(split, count):
    """At most `count` identities of a split, evenly spread, always the same."""
    rows = np.linspace(0, len(split.names) - 1, min(count, len(split.names)), dtype=int)
    return Split(split.folder, split.names[rows])


def read_labels(data):
    """labels.csv as {identity: {column: text}}; {} where there is none. Training never sees it."""
    path = Path(data, "labels.csv")
    if not path.exists():
        return {}
    try:
        with open(path, newline="", encoding="utf-8-sig") as f:
            return {row["identity"]: row for row in csv.DictReader(f)}
    except (UnicodeDecodeError, csv.Error, KeyError) as e:
        raise UserError(f"{path}: must be CSV in UTF-8 with a column 'identity' ({e})") from e


def list_files(identity):
    """An identity's recordings and pictures, <clip>/<file> each."""
    files = sorted(glob.glob("*/*", root_dir=identity))  # leaves out hidden ones
    recordings = [name for name in files if name.lower().endswith(SPEECH_FILES)]
    pictures = [name for name in files if name.lower().endswith(FACE_FILES)]
    if not recordings or not pictures:
        missing = "picture" if recordings else "recording"
        raise UserError(f"{identity}: no {missing} in its clip folders")
    return recordings, pictures


def sample_window(length, window, moment, guard, rng):
    """(start, stop) of a part of a recording that leaves out moment +- guard (None: any part).

    All in samples. Of all windows that fit beside it each is equally likely; where none fits, it is
    the longer side as a whole [paper §4: speech and face from different time frames].
    """
    sides = [(0, length)]
    if moment is not None:
        before, after = (min(length, max(0, t)) for t in (moment - guard, moment + guard + 1))
        sides = [(0, before), (after, length)]
    fits = [max(0, stop - start - window + 1) for start, stop in sides]  # windows in each side
    if not sum(fits):
        return max(sides, key=lambda side: side[1] - side[0])
    i = int(rng.integers(sum(fits)))
    start = i if i < fits[0] else sides[1][0] + i - fits[0]
    return start, start + window


def read_speech(path, choose=lambda length, rate: (0, length)):
    """Samples (T,) of a recording, mono, float32, full scale 1, and its rate in Hz.

    choose(length, rate) -> (start, stop) says which. Of 16-bit WAV only that part is read, all else
    goes through torchaudio.
    """
    try:
        try:
            with wave.open(str(path)) as f:
                if f.getsampwidth() != 2:
                    raise wave.Error("not 16-bit")
                rate, channels = f.getframerate(), f.getnchannels()
                held = os.path.getsize(path) // (2 * channels)  # a stream's header knows no length
                start, stop = choose(min(f.getnframes(), held), rate)
                f.setpos(start)
                raw = f.readframes(stop - start)
                x = np.frombuffer(raw[:len(raw) // (2 * channels) * 2 * channels], "<i2")
                x = x.reshape(-1, channels)  # (T, channels)
                x = x.mean(1, dtype=np.float32) / 32768  # (T, channels) -> (T,)
        except (wave.Error, EOFError):
            x, rate = torchaudio.load(path)  # (channels, T)
            start, stop = choose(x.shape[1], rate)
            x = x[:, start:stop].mean(0).numpy()  # (channels, T) -> (T,)
    except ImportError as e:
        raise UserError(f"{path}: no 16-bit WAV, or damaged; for other formats pip install "
                        "torchcodec and FFmpeg, or ffmpeg -i IN -c:a pcm_s16le OUT.wav") from e
    except Exception as e:  # on a damaged file a decoder raises nearly anything
        raise UserError(f"{path}: not a readable recording ({e})") from e
    if not len(x) or not np.isfinite(x).all():
        raise UserError(f"{path}: no speech in it, or none beside its face's time, or NaN")
    return x, rate


def load_speech(path, seconds, rng, moment=None):
    """A window of a recording, float32 (T,), T = 16000 seconds, beside `moment` (s) if given.

    Shorter speech is repeated, longer cut at a random place [paper §4].
    """
    def choose(length, rate):
        at = None if moment is None else int(moment * rate)
        return sample_window(length, math.ceil(seconds * rate), at, math.ceil(GUARD * rate), rng)

    x, rate = read_speech(path, choose)
    if rate != RATE:
        x = torchaudio.functional.resample(torch.from_numpy(x), rate, RATE).numpy()
    return np.resize(x, round(seconds * RATE))  # np.resize repeats or cuts


def load_face(path, size=None):
    """A face, uint8 (H, W, 3): upright, RGB, its central square resized to `size` (None: all)."""
    try:
        with Image.open(path) as image:
            if size:
                image.draft("RGB", (size, size))  # decodes a large JPEG at a fraction of its size
            face = ImageOps.exif_transpose(image).convert("RGB")
    except Exception as e:  # on a damaged file a decoder raises nearly anything
        raise UserError(f"{path}: not a readable picture ({e})") from e
    if min(face.size) < MIN_SIDE:
        raise UserError(f"{path}: {face.width}x{face.height} pixels, at least {MIN_SIDE} a side")
    return np.array(ImageOps.fit(face, (size, size), Image.Resampling.BILINEAR) if size else face)


class PairDataset:
    """Batches of positive pairs of different identities, pure functions of seed and number:

    pairs[i] is speech (B, T), faces uint8 (B, H, W, 3), identity (B,), rows of split.names, and a
    list of what could not be read. With shuffle, for training [ours]: people drawn at random, faces
    flipped at random, others for who cannot be read. Without, for tests: everybody in order.
    """

    def __init__(self, split, cfg, batch, seed, shuffle=False):
        self.split, self.seconds, self.size = split, cfg.seconds, cfg.size
        self.batch, self.seed, self.shuffle, self.flip = batch, seed, shuffle, shuffle

    def __len__(self):
        return math.ceil(len(self.split.names) / self.batch)

    def __getitem__(self, i):
        rng, people = np.random.default_rng([self.seed, i]), len(self.split.names)
        chosen = range(i * self.batch, min((i + 1) * self.batch, people))
        if self.shuffle:
            chosen = rng.choice(people, min(people, self.batch + SPARE), replace=False)
        rows, faults = [], []
        for identity in chosen:
            try:
                rows.append((*self.load(identity, rng), identity))
            except (UserError, OSError) as e:
                faults.append(str(e))
            if len(rows) == self.batch:
                break
        columns = zip(*rows) if rows else ([], [], [])
        return *(torch.from_numpy(np.array(column)) for column in columns), faults

    def load(self, identity, rng):
        """Speech (T,) and a face (H, W, 3): a random recording, a random picture of its clip.

        Where that clip has no picture, as in VoxCeleb with VGGFace, one of the identity.
        """
        folder = self.split.folder / self.split.names[identity]
        recordings, pictures = list_files(folder)
        speech = recordings[rng.integers(len(recordings))]
        clip = os.path.dirname(speech)
        pictures = [name for name in pictures if os.path.dirname(name) == clip] or pictures
        picture = pictures[rng.integers(len(pictures))]
        alone = sum(os.path.dirname(name) == clip for name in recordings) == 1
        is_time = alone and os.path.dirname(picture) == clip and Path(picture).stem.isdecimal()
        moment = int(Path(picture).stem) / 1000 if is_time else None  # s
        face = load_face(folder / picture, self.size)
        if self.flip and rng.random() < 0.5:
            face = face[:, ::-1]
        return load_speech(folder / speech, self.seconds, rng, moment), face


def load_batches(pairs, batches, workers, device):
    """The batches of these numbers, made ahead by loader processes; faces (B, 3, H, W) in [-1, 1].

    Warns of unreadable files; ends the run where they outnumber what could be read.
    """
    loader = torch.utils.data.DataLoader(
        pairs, batch_size=None, sampler=batches, num_workers=workers,
        worker_init_fn=ignore_ctrl_c, pin_memory=device.type == "cuda")
    bad = read = 0
    for speech, faces, identity, faults in loader:
        for fault in faults:
            print(f"warning: left out: {fault}", file=sys.stderr, flush=True)
        bad, read = bad + len(faults), read + len(identity)
        if bad > SPARE + read or (bad and not read):
            raise UserError(f"too many unreadable files (run check-data), as {faults[-1]}")
        if not len(identity):
            continue  # the last ones of a test
        faces = faces.to(device, non_blocking=True)  # uint8: a quarter of the way
        faces = faces.permute(0, 3, 1, 2).float() / 127.5 - 1  # (B, H, W, 3) -> (B, 3, H, W)
        yield speech.to(device, non_blocking=True), faces, identity, faults


def ignore_ctrl_c(worker):
    """Ctrl-C reaches loader processes, too, but the training process decides."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def check_file(path):
    """Hours of speech in a recording, 0 in a picture."""
    if path.name.lower().endswith(FACE_FILES):
        load_face(path)
        return 0.0
    x, rate = read_speech(path)
    if np.abs(x).max() < SILENCE:
        raise UserError(f"{path}: silent from start to end")
    return len(x) / rate / 3600


def check_data(args, data):
    """Read every file of a corpus; print what it holds and what is wrong with it."""
    corpus, faults = open_corpus(data, dict.fromkeys(("train", "val", "test"), 2)), 0
    for split, (folder, names) in corpus.items():
        hours = []  # of every file that can be read
        for done, name in enumerate(names, start=1):
            try:
                files = sum(list_files(folder / name), [])
            except UserError as e:
                print(f"fault: {e}")
                files, faults = [], faults + 1
            for file in files:
                try:
                    hours.append(check_file(folder / name / file))
                except UserError as e:
                    print(f"fault: {e}")
                    faults += 1
            if done % 1000 == 0:
                print(f"{split}: {done} of {len(names)} identities", flush=True)
        if len(names) < args.k:
            print(f"fault: {folder}: {len(names)} identities, --k {args.k} needs as many")
            faults += 1
        print(f"{split:5}  {len(names)} identities, {len(hours)} files, {sum(hours):.2f} h speech")
    print(f"{faults} faults")
    return bool(faults)


# ==== 7. Synthetic people: voices by source and filter, flat faces, known factors   [all ours] ====

LINK = 0.75  # correlation of what voice and face show of age, tract and build: the default
# match-train is then right in 91 % of V-F and F-V 2-way, the paper in 88.47 (F-V)
LINKED = ("age", "tract", "build")  # and gender, which voice and face share wholly
HAIR = (36, 30, 34), (122, 72, 40), (226, 180, 96)  # a line of colours: black, brown, blond
SKIN = (255, 218, 190), (222, 166, 122), (134, 88, 62)  # light to dark
BACKGROUND = (126, 184, 226), (240, 230, 208), (246, 176, 142)  # blue, sand, peach
INK, WHITE, GREY, BLUE = (34, 28, 36), (255, 255, 255), (236, 236, 240), (56, 60, 110)
LIPS, MOUTH, BLUSH, CREASE = (206, 62, 72), (110, 28, 40), (240, 84, 84), (96, 36, 40)
VOWELS = np.array([  # Hz; a e i o u of men, Peterson and Barney 1952; the fourth formant [ours]
    (730, 1090, 2440, 3400), (530, 1840, 2480, 3500), (270, 2290, 3010, 3600),
    (570, 840, 2410, 3300), (300, 870, 2240, 3300)])
FACTORS = ("gender", *LINKED, "glasses", "hair", "skin", "background", "tilt")  # of a face
IDENTITIES = 2400  # of the default corpus
CLIP_SECONDS, FRAMES = 6, 6  # one clip a person, so that no pair needs to know who is who
FFT, HOP = 1024, 256  # samples of a frame of speech, and between frames
SIDE, OVERSAMPLE = 128, 3  # pixels of a face, drawn larger and averaged
TURN = np.linspace(0, 2 * np.pi, 49)  # a full circle; its first half is the lower one, y being down


def sample_person(rng):
    """All numbers of a person. What voice and face share are pairs of normals, correlation LINK."""
    person = dict(gender=int(rng.integers(2)))  # 1 is male
    for name in LINKED:
        voice, noise = rng.normal(size=2)
        person |= {"voice_" + name: voice, name: LINK * voice + math.sqrt(1 - LINK**2) * noise}
    person |= dict(glasses=int(rng.random() < 0.35), hair=rng.random(), skin=rng.random(),
                   background=rng.random(), tilt=rng.uniform(-12, 12))  # the face's own; degrees
    return person | dict(pitch=rng.normal(0, 0.04), loudness=rng.uniform(0.1, 0.7),
                         tempo=rng.uniform(4, 6))  # the voice's own; syllables per s


def levels(person, side=""):
    """Age, tract and build as evenly spread numbers in 0 ... 1, of the face or the "voice_"."""
    return [0.5 + 0.5 * math.erf(person[side + name] / math.sqrt(2)) for name in LINKED]


def synth_speech(person, rng):
    """A clip of speech, int16 (samples,): pulses of the throat through a mouth's resonances.

    Gender sets the pitch. With age it falls and breath joins; a long tract resonates lower; a
    sturdy build adds bass. Vowels change with the syllables, one in seven of which is a pause.
    """
    n, (age, tract, build) = CLIP_SECONDS * RATE, levels(person, "voice_")
    seconds, count = np.arange(n) / RATE, int(2 * CLIP_SECONDS * person["tempo"])
    ends = np.cumsum(rng.uniform(0.7, 1.3, count)) / person["tempo"]  # of the syllables, s
    tune = np.interp(seconds, ends, rng.normal(size=count))
    f0 = (115 if person["gender"] else 220) * np.exp(person["pitch"] - 0.3 * age + 0.1 * tune)  # Hz
    pulses = np.diff(np.floor(np.cumsum(f0) / RATE), prepend=0) / np.sqrt(f0)  # where periods end
    breath = (0.04 + 0.5 * age) * np.diff(rng.normal(size=n), prepend=0)  # mostly high frequencies
    stress = np.where(rng.random(count) < 1 / 7, 0, rng.uniform(0.5, 1, count))
    part = np.interp(seconds, ends, np.arange(count))  # 1.5: amid syllable 1
    swell = stress[part.astype(int)] * np.sin(np.pi * part) ** 2  # (n,) of every syllable
    starts = np.arange(0, n - HOP, HOP)  # of the L frames
    frames = (pulses * swell)[starts[:, None] + np.arange(2 * HOP)] * np.hanning(2 * HOP + 1)[:-1]
    spectra = np.fft.rfft(frames, FFT).astype(np.complex64)  # (L, FFT/2+1)
    f = np.fft.rfftfreq(FFT, 1 / RATE).astype(np.float32)  # (FFT/2+1,) in Hz
    vowels = 0.5 * VOWELS + 0.5 * VOWELS.mean(0)  # fluent speech falls short of them
    said = vowels[rng.integers(len(VOWELS), size=count)] * (1.3 - 0.6 * tract)  # (count, 4)
    for formant in said.T:
        F2 = np.interp(starts / RATE, ends, formant).astype(np.float32)[:, None] ** 2  # (L, 1)
        spectra *= F2 / (F2 - f**2 + 80j * f)  # a resonance, 80 Hz wide
    spectra *= f / (f + 200) / (1 + 1j * f / 700)  # lips favour high, the throat low frequencies
    spectra *= np.exp(3 * (build - 0.5) / (1 + (f / 400) ** 4))  # up to 13 dB more or less bass
    speech = np.zeros(n + FFT)
    for start, echo in zip(starts, np.fft.irfft(spectra)):
        speech[start:start + FFT] += echo
    speech = speech[:n] / speech.std() + breath * swell
    return np.int16(32767 * person["loudness"] * speech / np.abs(speech).max())


def mix(colors, t):
    """The colour at t in 0 ... 1 on an even line through two or more colours."""
    stops = np.linspace(0, 1, len(colors))
    return tuple(int(np.interp(t, stops, channel)) for channel in zip(*colors))


class Pen:
    """Draws in face coordinates: x right, y down, (0, 0) between the eyes, tilted at the neck."""

    def __init__(self, image, tilt):
        self.draw, self.half = ImageDraw.Draw(image), image.width / 2
        self.cos, self.sin = math.cos(math.radians(tilt)), math.sin(math.radians(tilt))

    def oval(self, color, x, y, rx, up, down=None, powers=(2, 2), bend=0):
        """An oval that reaches `up` above and `down` below (x, y), squarer with larger powers.

        Powers are those of its upper and lower half; bend lifts both ends, as in a smile.
        """
        power = 2 / np.where(np.sin(TURN) < 0, *powers)
        c, s = (np.sign(v) * abs(v) ** power for v in (np.cos(TURN), np.sin(TURN)))
        x = x + rx * c
        y = y + np.where(s < 0, up, down or up) * s - bend * c**2 - 0.8
        points = 1 + x * self.cos - y * self.sin, 1.8 + x * self.sin + y * self.cos
        self.draw.polygon([*zip(*(self.half * p for p in points))], fill=color)


def draw_head(pen, body, person, skin, hair):
    """Hair, jaw by gender, hairline and grey by age, head by tract, neck and shoulders by build."""
    male, (age, tract, build) = person["gender"], levels(person)
    shade, grey = mix((skin, CREASE), 0.25), mix((hair, GREY), age**1.5)
    w, crown, line = 0.61 - 0.23 * tract, 0.63 + 0.2 * tract, 0.3 + 0.27 * age
    if not male:
        pen.oval(mix((hair, INK), 0.3), 0, 0, w + 0.21, crown + 0.04, 0.82, (2.2, 3.5))
    clothes = mix((mix(BACKGROUND, person["background"]), BLUE), 0.6)
    body.oval(clothes, 0, 1.33, 0.46 + 0.66 * build, 0.6 + 0.1 * build, powers=(2.6, 2))
    pen.oval(shade, 0, 0.4, 0.12 + 0.25 * build, 0.3, 0.46, (8, 3))
    if male:
        pen.oval(shade, 0, 0, w + 0.1, 0.13, powers=(5, 5))  # ears
        pen.oval(hair, 0, -0.05, w + 0.07, crown, 0.1, (2.3, 3))
    temples = (0.85 * line, 0.12) if male else (crown, 0.52)
    pen.oval(grey, 0, -0.05, w + 0.07, *temples, (2.3, 3))
    pen.oval(skin, 0, -0.05, w, line, 0.45 + 0.26 * tract, (3, 2.5) if male else (1.8, 2.1))


def draw_features(pen, person, skin, hair):
    """Eyes, brows, nose, cheeks and glasses. Age narrows eyes, greys brows, deepens creases."""
    male, (age, tract, _) = person["gender"], levels(person)
    brow = mix((mix((hair, INK), 0.4), GREY), 0.9 * age**1.5)
    blush = mix((skin, BLUSH), 0.4 * (1 - age))
    crease, thick, open_ = mix((skin, CREASE), 0.75 * age), 0.01 + 0.02 * age, 0.13 - 0.065 * age
    pen.oval(crease, 0, -0.32 - 0.1 * age, 0.02 + 0.27 * age, thick, bend=-0.03)
    for x in (-0.22, 0.22):
        pen.oval(blush, (1.55 - 0.3 * tract) * x, 0.19 + 0.04 * tract, 0.1, 0.08)
        pen.oval(crease, 1.15 * x, 0.15, 0.12, thick, bend=0.06)
        if person["glasses"]:
            pen.oval(INK, x, -0.04, 0.195, 0.195)
            pen.oval(skin, x, -0.04, 0.15, 0.15)
        pen.oval(WHITE, x, -0.04, 0.117, open_)
        pen.oval(INK, x, -0.04, 0.078, min(0.088, open_))
        pen.oval(WHITE, x + 0.026, -0.04 - 0.3 * open_, 0.025, 0.025)
        pen.oval(brow, x, -0.27, 0.13, 0.045 if male else 0.03, bend=-0.05)
    pen.oval(mix((skin, CREASE), 0.3), 0, 0.1 + 0.07 * tract, 0.078, 0.062)
    if person["glasses"]:
        pen.oval(INK, 0, -0.06, 0.05, 0.024, bend=-0.02)  # the bridge


def draw_face(person, opening):
    """A picture (PIL, SIDE x SIDE) of a person with the mouth open by 0 ... 1."""
    skin, hair = mix(SKIN, person["skin"]), mix(HAIR, person["hair"])
    image = Image.new("RGB", (SIDE * OVERSAMPLE,) * 2, mix(BACKGROUND, person["background"]))
    pen, lips = Pen(image, person["tilt"]), mix((skin, LIPS), 0.5 if person["gender"] else 0.9)
    draw_head(pen, Pen(image, 0), person, skin, hair)
    draw_features(pen, person, skin, hair)
    y = 0.32 + 0.1 * levels(person)[1]  # a long tract, a long face
    pen.oval(lips, 0, y, 0.19, 0.04, 0.045 + 0.11 * opening, bend=0.07)
    pen.oval(MOUTH, 0, y + 0.005, 0.14, 0.01, 0.01 + 0.1 * opening, bend=0.055)
    return image.reduce(OVERSAMPLE)


def write_person(data, seed, i, split):
    """Write the clip of person i of a seed; returns their row of labels.csv.

    The mouth opens with the loudness in the 50 ms around the moment, relative to the loudest.
    """
    rng, name = np.random.default_rng([seed, i]), f"id{i:05}"
    person, folder = sample_person(rng), Path(data, split, name, "clip")
    folder.mkdir(parents=True)
    speech = synth_speech(person, rng)
    with wave.open(str(folder / "speech.wav"), "wb") as f:
        f.setparams((1, 2, RATE, 0, "NONE", ""))  # one channel of 2 bytes
        f.writeframes(speech.tobytes())
    energy = np.cumsum(np.pad(speech / 32768, RATE // 40) ** 2)
    loudness = np.sqrt(energy[RATE // 20:] - energy[:-RATE // 20])  # (samples,)
    for moment in rng.choice(1000 * CLIP_SECONDS, FRAMES, replace=False):  # ms
        face = draw_face(person, loudness[moment * RATE // 1000] / loudness.max())
        face.save(folder / f"{moment}.jpg", quality=92)
    return {"identity": name, "split": split} | {key: round(x, 4) for key, x in person.items()}


def make_data(args, data):
    """Write the synthetic corpus, equal for equal seeds; the folder is there once it is whole."""
    data, people = Path(data), args.identities
    if data.exists():
        raise UserError(f"{data}: exists already; make-data fills a new folder only")
    make_folder(data.parent)
    val, test = (max(10, round(share * people)) for share in (0.06, 0.14))
    splits = ["train"] * (people - val - test) + ["val"] * val + ["test"] * test
    with (tempfile.TemporaryDirectory(dir=data.parent) as scratch,
          concurrent.futures.ProcessPoolExecutor(min(16, os.cpu_count())) as pool):
        part = Path(scratch, data.name)
        write = functools.partial(write_person, part, args.seed)
        jobs = pool.map(write, range(people), splits, chunksize=8)
        rows = list(jobs)
        with open(part / "labels.csv", "w", newline="", encoding="utf8") as f:
            writer = csv.DictWriter(f, rows[0])
            writer.writeheader()
            writer.writerows(rows)
        part.rename(data)
    print(f"{data}: {people} identities")


# ==== 8. Plumbing: device, processes and precision; checkpoints and --resume; log =================


class Machine:
    """What a command computes on; device, processes and precision are decided here alone.

    Under torchrun each process has its own GPU, batches and negatives; gradients are averaged, and
    the first one tests and writes. On a GPU that has bfloat16 layers compute in it [ours]; weights
    and R1 stay float32.
    """

    def __init__(self, name):
        self.rank, self.count, native = 0, 1, False
        if distributed.is_torchelastic_launched():
            self.rank, self.count = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
        self.is_first = self.rank == 0
        name = ("cuda" if torch.cuda.is_available() else "cpu") if name == "auto" else name
        name = f"cuda:{os.environ['LOCAL_RANK']}" if name == "cuda" and self.count > 1 else name
        try:
            self.device = torch.zeros(1, device=name).device
        except (RuntimeError, AssertionError) as e:
            reason = str(e).splitlines()[0]
            raise UserError(f"--device {name}: not here, use cpu or auto ({reason})") from e
        if self.device.type == "cuda":
            torch.cuda.set_device(self.device)
            torch.backends.cudnn.benchmark = True  # batches have one shape: try all algorithms
            native = torch.cuda.is_bf16_supported(including_emulation=False)
        self.autocast = torch.autocast(self.device.type, torch.bfloat16, enabled=native)
        if self.count > 1:  # others wait while the first process tests
            distributed.init_process_group(timeout=datetime.timedelta(days=1))

    def wrap(self, module):
        """The module to train with: under torchrun one that averages gradients."""
        return nn.parallel.DistributedDataParallel(module) if self.count > 1 else module

    def wait(self):
        """Wait until all processes are here."""
        if self.count > 1:
            distributed.barrier()


def step_generator(seed, step, rank):
    """torch's random numbers for a step, a pure function of seed, step and process [ours]."""
    bits = np.random.SeedSequence([seed, step, rank]).generate_state(1)
    return torch.Generator().manual_seed(int(bits[0]))


def training_batches(pairs, cfg, log, machine):
    """(step, speech, faces) from where the run stands to its end, steps counted from 1."""
    first, count = log.step * machine.count + machine.rank, machine.count
    numbers = range(first, cfg.steps * count, count)  # every process has its own batches
    batches = load_batches(pairs, numbers, cfg.workers, machine.device)
    for step, (speech, faces, _, faults) in enumerate(batches, start=log.step + 1):
        log.faults += len(faults)
        yield step, speech, faces


def due(step, every, steps):
    """Whether what is done `every` so many steps, and after the last one, is due."""
    return step % every == 0 or step == steps


class Log:
    """Means of a run's numbers over each --log-every steps: printed, and a line of log.jsonl."""

    def __init__(self, cfg, machine, step):
        self.cfg, self.machine, self.step = cfg, machine, step
        self.sums, self.steps, self.since, self.faults = {}, 0, time.time(), 0

    def add(self, step, **values):
        """Count a step; its numbers stay on the device until their line is written."""
        self.steps += 1
        for name, x in values.items():
            self.sums[name] = self.sums.get(name, 0) + x.detach()
        if not (self.machine.is_first and due(step, self.cfg.log_every, self.cfg.steps)):
            return
        rate = self.steps / (time.time() - self.since)  # steps per s, validation included
        line = {name: round(x.item() / self.steps, 4) for name, x in self.sums.items()}
        line["clips_per_s"] = round(rate * self.cfg.batch * self.machine.count, 1)
        line["faults"] = self.faults  # pairs that could not be read
        with open(Path(self.cfg.out, "log.jsonl"), "a", encoding="utf8") as f:
            f.write(json.dumps({"step": step} | line) + "\n")
        text = "  ".join(f"{name} {x:g}" for name, x in line.items())
        left = (self.cfg.steps - step) / rate  # s
        print(f"step {step}/{self.cfg.steps}  {text}  {left:.0f} s left", flush=True)
        self.sums, self.steps, self.since = {}, 0, time.time()


def make_folder(path):
    """The folder `path`, created."""
    Path(path).mkdir(parents=True, exist_ok=True)
    return Path(path)


def write_json(path, content):
    """Write a dict as indented JSON."""
    Path(path).write_text(json.dumps(content, indent=1) + "\n", encoding="utf8")


def save_checkpoint(path, parts, cfg, **more):
    """Write states, settings and more beside `path`, then rename: `path` is whole at any time."""
    for part in parts.values():
        if isinstance(part, nn.Module) and not all(p.isfinite().all() for p in part.parameters()):
            raise UserError(f"step {more['step']}: weights are NaN, the run diverged; try a lower "
                            f"--lr; {path}, if there, is from before")
    state = {name: part.state_dict() for name, part in parts.items()}
    state |= more | dict(kind=type(cfg).__name__, settings=asdict(cfg))
    try:
        torch.save(state, f"{path}.part")
        os.replace(f"{path}.part", path)
    except (OSError, RuntimeError) as e:
        Path(f"{path}.part").unlink(missing_ok=True)
        raise UserError(f"{path}: cannot be written ({str(e).splitlines()[0]}); what was saved "
                        "before is whole: --resume goes on from there") from e


def load_checkpoint(path, kind, device):
    """The dict that a training with settings of this kind saved."""
    try:
        state = torch.load(path, map_location=device, weights_only=True)  # runs no code
        found = state["kind"]
    except FileNotFoundError as e:
        raise UserError(f"{path}: no such checkpoint; match-train and gan-train write them") from e
    except Exception as e:  # on a damaged file torch.load raises nearly anything
        raise UserError(f"{path}: not a checkpoint, or damaged ({type(e).__name__})") from e
    if found != kind.__name__:
        raise UserError(f"{path}: holds {found}, not {kind.__name__}: it is of the other training")
    return state


def restore(parts, state):
    """Load the states of parts from a checkpoint, if they are in it."""
    for name in parts.keys() & state.keys():
        parts[name].load_state_dict(state[name])


MAY_CHANGE = {"out", "device", "workers", "log_every", "save_every", "resume"}


def open_run(cfg):
    """The checkpoint in --out to go on from; step 0 at the beginning."""
    last = make_folder(cfg.out) / "last.pt"
    if not last.exists():
        return dict(step=0, best=-1.0)
    if not cfg.resume:
        raise UserError(f"--out {cfg.out}: holds a run; name another folder, or --resume it")
    state = load_checkpoint(last, type(cfg), "cpu")
    now = asdict(cfg)
    other = [f"{flag(name)} {x}, not {now.get(name)}" for name, x in state["settings"].items()
             if name not in MAY_CHANGE and x != now.get(name)]
    if other:
        raise UserError(f"--resume: the run in {cfg.out} has {', '.join(other)}")
    return state


def load_model(path, kind, machine):
    """The Model of a training with settings of this kind."""
    state = load_checkpoint(path, kind, machine.device)
    try:
        cfg, gan, g_ema = kind(**state["settings"]), None, None
        if kind is GanSettings:
            cfg, gan = MatchSettings(**state["match"]), cfg
    except TypeError as e:
        raise UserError(f"{path}: of another version of this file ({e})") from e
    if gan:
        g_ema = make_generator(cfg, gan, machine.device)
        restore(dict(g_ema=g_ema), state)
    speech_encoder, face_encoder = make_encoders(cfg, machine.device)
    restore(dict(speech=speech_encoder, face=face_encoder), state)
    return Model(cfg, speech_encoder.eval(), face_encoder.eval(), gan, g_ema)


# ==== 9. Command line: the flags of a training are its settings ===================================


def flag(name):
    """A setting's name on the command line."""
    return "-n" if name == "n" else f"--{name.replace('_', '-')}"


def make_parser():
    """The command line: {function: (what it takes, its settings)}, a subcommand each."""
    parser = argparse.ArgumentParser(prog="voice2face.py", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    match, gan = ({f.name: f for f in fields(kind)} for kind in TRAININGS.values())
    test = {name: gan[name] for name in ("data", "seed", "device", "workers", "runs")}
    drawn = dict(gan=setting("runs/gan/last.pt", "checkpoint of gan-train"))
    for function, what, settings in (
            (match_train, "", match), (gan_train, "", gan),
            (match_test, "", test | dict(
                match=gan["match"], out=setting("runs/match-test", "folder for metrics.json"),
                split=setting("test", "part of the corpus", choices=("train", "val", "test")))),
            (gan_test, "", test | drawn | dict(
                out=setting("runs/gan/report", "folder for report.md, pictures, metrics.json"),
                baseline=setting("", "a second checkpoint to compare, as of --loss rel"))),
            (generate, "SPEECH", drawn | dict(
                n=setting(8, "faces per recording", low=1), seed=gan["seed"], device=gan["device"],
                out=setting("faces.png", "NAME.png: a labelled picture, one z a column; else a "
                            "folder: a PNG per face, each of its own z"))),
            (make_data, "DIR", dict(seed=gan["seed"], identities=setting(
                IDENTITIES, "people: 80 % train, 6 % val, 14 % test", low=30))),
            (check_data, "DIR", dict(k=setting(10, "identities that each split needs", low=2)))):
        name, text = function.__name__.replace("_", "-"), function.__doc__.splitlines()[0]
        sub = commands.add_parser(name, help=text, description=text,
                                  usage=f"%(prog)s [--flag value ...] {what}".rstrip())
        if what:
            sub.add_argument("inputs", metavar=what, nargs="+" if what == "SPEECH" else None)
        for key, f in settings.items():
            paper = f", paper: {PAPER[name][key]}" if key in PAPER.get(name, ()) else ""
            text = f"{f.metadata['help']} (default: {f.default}{paper})".replace("%", "%%")
            how = dict(type=type(f.default), choices=f.metadata["choices"])
            if type(f.default) is bool:
                how = dict(action="store_true")
            default = argparse.SUPPRESS if function in TRAININGS else f.default
            sub.add_argument(flag(key), default=default, help=text, **how)
        sub.set_defaults(run=function, flags=settings)
    return parser


TRAININGS = {match_train: MatchSettings, gan_train: GanSettings}


def make_settings(args):
    """args, checked; of a training its settings, the preset's where no flag is given."""
    given = {name: x for name, x in vars(args).items() if name in args.flags}
    for name, value in given.items():
        low = args.flags[name].metadata["low"]
        if low is not None and not value >= low:  # true for NaN, too
            raise UserError(f"{flag(name)} {value}: must be at least {low}")
    if args.run not in TRAININGS:
        return args
    preset = PAPER[args.command] if given.get("preset") == "paper" else {}
    cfg = TRAININGS[args.run](**preset | given)
    if isinstance(cfg, MatchSettings):
        if cfg.batch < cfg.k:
            raise UserError(f"--batch {cfg.batch}: must be at least --k {cfg.k}")
        least = 6 * math.prod(PASE_STRIDES[:-1]) * cfg.sinc_stride / RATE  # s: 6 frames are needed
        if not least <= cfg.seconds <= 60:
            raise UserError(f"--seconds {cfg.seconds}: must be {least:.2f} to 60 here")
    return cfg


def main(argv=None):
    """Run one command; its exit code: 0, 1 faulty corpus, 2 reported error, 130 Ctrl-C."""
    args = make_parser().parse_args(argv)
    if distributed.is_torchelastic_launched() and os.environ["RANK"] != "0":
        sys.stdout = open(os.devnull, "w")  # the first process speaks
    try:
        cfg = make_settings(args)
        inputs = [args.inputs] if "inputs" in args else []  # recordings or DIR
        return int(args.run(cfg, *inputs) or 0)
    except UserError as e:
        error = e
    except OSError as e:
        error = f"{e.filename or 'file'}: {e.strerror or e}"
    except (MemoryError, torch.OutOfMemoryError):
        error = "out of memory, try less at once: smaller sizes, fewer clips or faces"
    except KeyboardInterrupt:
        more = "; --resume goes on" if args.run in TRAININGS else ""
        print(f"voice2face: stopped{more}", file=sys.stderr)
        return 130
    print(f"voice2face: error: {error}", file=sys.stderr)
    return 2


if __name__ == "__main__":
    exit_code = main()
    sys.stdout.flush()
    if distributed.is_initialized():
        os._exit(exit_code)  # gloo's threads abort the usual way out once in twenty times
    sys.exit(exit_code)
