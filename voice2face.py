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
           7 Synthetic people (the default corpus), 8 Plumbing, 9 Command line serve it.
Glossary   paper  here          shape         meaning
           s      speech        (B, T)        waveforms, 16 kHz, in [-1, 1]
           f      faces, real   (B, 3, H, W)  pictures, RGB, in [-1, 1]
           se, fe se, fe        (B, D)        embeddings: S(speech), F(faces)
           c+, c- c_pos, c_neg  (B, D)        se of the face's own voice, of another person's
           z      z             (B, D)        Gaussian noise
           phi    phi           (B, D)        face embeddings by D's copy of F
           psi    psi           (B,)          how real D finds a face, whatever the voice
           V-F    "v-f"                       pick a face for a voice among K; F-V is the reverse
           One letter per dimension: B clips, K candidates (1 positive, K - 1 negatives), T samples,
           L frames, C channels, M taps or pixels, H W pixels, D = 128 embedding, N clips of a test,
           G a gallery, P people, V voices, Z noises, E factors. E is also a mean, F nn.functional.
Sources    [paper §x]; [PASE] Pascual et al. 2019; [SincNet] Ravanelli and Bengio 2018; [SNGAN]
           Miyato and Koyama 2018; [StyleGAN], [StyleGAN2] Karras et al. 2019, 2020; [R1] Mescheder
           et al. 2018; [ours] where our text of the paper is silent. Where this differs, and why:
           - all embeddings have one length: else training begins on a plateau (scale_normalize);
           - a clip's negatives come from its own batch, which encodes each clip once;
           - the waveform's loudness is divided out, being the microphone's (SpeechEncoder);
           - no spectral norm in F, for R1 bounds D; a 1x1 layer in every shortcut (DBlock);
           - psi, of two layers, sees phi's last map and its spread in the batch (Discriminator);
           - beside R1 its like on drawn faces, R2: eyes and hair come out sooner (r1_penalty);
           - AdaIN's style is [z, c], in which c has length 1 (AdaIN, Generator);
           - our text lacks the appendices and Eq. 1 and 3 to 6: we go by its prose (relid_loss);
           - the preset `small`, for two CPU cores, trains on 1.5 s, 64x64 pixels, narrower layers.
"""

import argparse
import contextlib
import copy
import csv
import datetime
import functools
import glob
import io
import itertools
import json
import math
import os
import sys
import tempfile
import time
import wave
from collections import Counter, namedtuple
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path

import numpy as np
import torch
import torchaudio
from PIL import Image, ImageDraw, ImageOps
from torch import channels_last, distributed, nn
from torch.nn import functional as F

RATE = 16000  # samples per second of every waveform [PASE]
EMBED = 128  # D [paper §3.2]


class UserError(ValueError):
    """What the user can mend, raised wherever input is of no use: one line, exit code 2."""


@contextlib.contextmanager
def as_user_error(what):
    """Whatever fails inside (a decoder raises nearly anything) says `what`, and its own reason."""
    try:
        yield
    except Exception as e:
        raise UserError(f"{what}: {type(e).__name__}: {e}".splitlines()[0]) from e


# ==== 1. Inference: two encoders and the K-way loss   [paper §3.1] ================================
PASE_KERNELS = (251, 20, 11, 11, 11, 11, 11, 11)  # [PASE]; the first is the sinc layer
PASE_STRIDES = (1, 10, 2, 1, 2, 1, 2, 2)  # [PASE]; 160 in all: 6 s are 600 frames
PASE_WIDTHS = (
    1,
    1,
    2,
    2,
    4,
    4,
    8,
    8,
)  # [PASE]; in units of the sinc layer's 64 filters
MIN_HZ = 50  # the least cut-off and the least band of a sinc filter [SincNet]


class SincConv(nn.Module):
    """Band-pass filters of which only the two cut-offs are learned [SincNet].
    (B, 1, 1, T) -> (B, C, 1, L). A filter is the difference of two ideal low-passes,
        g(t) = 2 high sinc(2 high t) - 2 low sinc(2 low t),   sinc(x) = sin(pi x) / (pi x),
    under a Hamming window, divided by 2 (high - low), which makes its centre 1. Cut-offs, in Hz,
    start evenly on the mel scale, plus MIN_HZ. kernel_size is odd, so that there is a centre."""

    def __init__(self, filters, kernel_size=251, stride=1):
        super().__init__()
        self.stride = stride
        lowest, highest = (
            2595 * math.log10(1 + hz / 700) for hz in (30, RATE / 2 - 2 * MIN_HZ)
        )
        mel = torch.linspace(
            lowest, highest, filters + 1
        )  # (C+1,); MIN_HZ is added later
        hz = 700 * (10 ** (mel / 2595) - 1)  # (C+1,)
        self.low_hz = nn.Parameter(hz[:-1, None])  # (C, 1)
        self.band_hz = nn.Parameter(hz.diff()[:, None])  # (C, 1)
        t = (torch.arange(kernel_size) - kernel_size // 2) / RATE  # s
        self.register_buffer("t", t, persistent=False)  # (M,)
        self.register_buffer(
            "window", torch.hamming_window(kernel_size, periodic=False)
        )  # (M,)

    def filters(self):
        """The impulse responses (C, M)."""
        low = (MIN_HZ + self.low_hz.abs()).clamp(
            max=RATE / 2 - MIN_HZ
        )  # (C, 1); room for a band
        high = (low + MIN_HZ + self.band_hz.abs()).clamp(max=RATE / 2)  # (C, 1)
        g = 2 * high * torch.sinc(2 * high * self.t) - 2 * low * torch.sinc(
            2 * low * self.t
        )
        return (
            g * self.window / (2 * (high - low))
        )  # (C, M); torch.sinc(0) is 1, without 0/0

    def forward(self, x):
        return F.conv2d(
            x, self.filters()[:, None, None], stride=(1, self.stride)
        )  # (B, C, 1, L)


def scale_normalize(x, scale):
    """Embeddings (B, D) of one length: inner products become scale^2 cos [ours]."""
    return scale * F.normalize(
        x.float(), dim=1
    )  # float: a GPU's layers may answer in bfloat16


class SpeechEncoder(nn.Module):
    """S: waveforms (B, T) -> embeddings (B, D). PASE's encoder, a mean over time, a linear map.
    The sinc layer and 7 convolutions [paper §3.1], each reflection-padded, then batch norm with
    a PReLU per channel [PASE]; mean and linear map are [ours]. In PASE width is 64, sinc_stride 1.
    Layers are 2-D, of one row, so that channels can be last in memory: faster on a CPU."""

    def __init__(self, width=64, sinc_stride=1, scale=1.0):
        super().__init__()
        self.scale, widths, layers = scale, [width * w for w in PASE_WIDTHS], []
        for i, (kernel, stride) in enumerate(
            zip(PASE_KERNELS, (sinc_stride, *PASE_STRIDES[1:]))
        ):
            pads = (
                (kernel - 1) // 2,
                kernel // 2,
                0,
                0,
            )  # so that stride s leaves ceil(L / s)
            conv = (
                SincConv(width, kernel, stride)
                if i == 0
                else nn.Conv2d(
                    widths[i - 1], widths[i], (1, kernel), (1, stride), bias=False
                )
            )
            layers += [
                nn.ReflectionPad2d(pads),
                conv,
                nn.BatchNorm2d(widths[i]),
                nn.PReLU(widths[i], init=0.0),
            ]  # [PASE]
        self.body, self.head = nn.Sequential(*layers), nn.Linear(widths[-1], EMBED)

    def features(self, x):
        """(B, T) -> (B, C), what the head reads; L = ceil(T / (160 sinc_stride)) in between."""
        x = x - x.mean(1, keepdim=True)  # the microphone's offset [ours]
        rms = (
            x.square().mean(1, keepdim=True).sqrt()
        )  # (B, 1): loudness, the microphone's [ours]
        x = x / (rms + SILENCE)  # not 0/0
        return self.body(x[:, None, None]).mean(
            (2, 3)
        )  # (B, 1, 1, T) -> (B, C, 1, L) -> (B, C)

    def forward(self, x):
        return scale_normalize(
            self.head(self.features(x)), self.scale
        )  # (B, C) -> (B, D)


class DBlock(nn.Module):
    """Residual block of [SNGAN]'s discriminator: (B, C, H, W) -> (B, C', H/2, W/2), or C', H, W."""

    def __init__(self, channels, out, first=False, down=True):
        super().__init__()
        self.first, self.down, hidden = (
            first,
            down,
            (out if first else channels),
        )  # [SNGAN]
        self.conv1 = nn.Conv2d(channels, hidden, 3, padding=1)
        self.conv2 = nn.Conv2d(hidden, out, 3, padding=1)
        self.skip = nn.Conv2d(channels, out, 1) if down else nn.Identity()

    def forward(self, x):
        h = self.conv1(
            x if self.first else F.relu(x)
        )  # the first block sees pixels, not features
        h = self.conv2(F.relu(h))  # -> (B, C', H, W)
        if self.down:
            h, x = F.avg_pool2d(h, 2), F.avg_pool2d(x, 2)  # H, W -> H/2, W/2
        return h + self.skip(x)  # 1x1 layer and pooling commute: a quarter of the work


class FaceEncoder(nn.Module):
    """F: faces (B, 3, H, W) -> embeddings (B, D). The body of [SNGAN]'s projection discriminator.
    Blocks halve the side down to 4, one more keeps it; ReLU, a sum over the 4x4 places [SNGAN], a
    linear map [ours]. No batch norm [SNGAN]."""

    def __init__(self, size=128, width=64, scale=1.0):
        super().__init__()
        self.scale, downs = scale, int(math.log2(size)) - 2
        widths = [3] + [width * 2 ** min(i, 4) for i in range(downs)]
        blocks = [DBlock(widths[i], widths[i + 1], first=i == 0) for i in range(downs)]
        self.blocks = nn.Sequential(*blocks, DBlock(widths[-1], widths[-1], down=False))
        self.head = nn.Linear(widths[-1], EMBED)
        init_convs(self)

    def features(self, x):
        """(B, 3, H, W) -> (B, C), what the head reads."""
        return F.relu(self.blocks(x)).sum((2, 3))  # (B, C, 4, 4) -> (B, C)

    def forward(self, x):
        return scale_normalize(
            self.head(self.features(x)), self.scale
        )  # (B, C) -> (B, D)


def init_convs(module):
    """Glorot's initialisation, gain sqrt(2) on 3x3 convolutions [SNGAN]."""
    for m in module.modules():
        if isinstance(m, nn.Conv2d):
            nn.init.xavier_uniform_(
                m.weight, math.sqrt(2) if m.kernel_size == (3, 3) else 1
            )
            nn.init.zeros_(m.bias)


def sample_candidates(rows, k, generator):
    """Row numbers (rows, K) of each row's candidates: itself, then K - 1 different others.
    Rows are clips of different identities [paper §4]. All share shift 0 and K - 1 random cyclic
    ones: every other row is equally likely, and each a negative equally often [ours]."""
    if rows < k:
        raise UserError(
            f"K = {k} needs {k} identities at once, only {rows} could be read"
        )
    shifts = F.pad(
        torch.randperm(rows - 1, generator=generator)[: k - 1] + 1, (1, 0)
    )  # (K,)
    return (
        torch.arange(rows)[:, None] + shifts
    ) % rows  # (rows, 1) + (K,) -> (rows, K)


def match_logits(speech, faces, candidates, direction):
    """Eq. 1's <S(s), F(f_j)> of each row's K candidates, (B, K): v-f picks a face, f-v a voice.
    p(f_j | s) = softmax_j <S(s), F(f_j)>, and the loss is -log p of column 0, the positive."""
    query, keys = (
        (speech, faces) if direction == "v-f" else (faces, speech)
    )  # (B, D), (B, D)
    return torch.einsum(
        "bd,bkd->bk", query, keys[candidates]
    )  # (B, D), (B, K, D) -> (B, K)


def top1(logits):
    """(B, K) -> (B,): 1 where column 0 is the largest; n equally large ones share the point."""
    best = logits == logits.max(1, keepdim=True).values  # (B, K)
    return best[:, 0] / best.sum(1)


# ==== 2. Generation: AdaIN generator, projection discriminator, relidGAN loss   [paper §3.2] ======
class AdaIN(nn.Module):
    """The style sets mean and deviation of each channel [StyleGAN]: x (B, C, H, W), style (B, 2D).
        AdaIN(x, y) = (1 + scale(y)) (x - mean(x)) / std(x) + shift(y),   mean, std over H and W
    scale and shift are linear in the style y = [z, c]. Were it c alone, z could set no colour: the
    normalisation wipes out the means of all that comes from below, z's part included [ours]."""

    def __init__(self, channels):
        super().__init__()
        self.style = nn.Linear(2 * EMBED, 2 * channels)

    def forward(self, x, style):
        scale, shift = self.style(style)[:, :, None, None].chunk(
            2, 1
        )  # -> two (B, C, 1, 1)
        places = (
            x.shape[2] * x.shape[3]
        )  # sum / places, x * x: faster gradients than mean, square
        x = x - (x.sum((2, 3), keepdim=True) / places).to(
            x.dtype
        )  # (B, C, H, W) - (B, C, 1, 1)
        var = (x * x).sum((2, 3), keepdim=True) / places  # -> (B, C, 1, 1)
        scale = ((1 + scale) * (var + 1e-5).rsqrt()).to(
            x.dtype
        )  # a GPU's bfloat16 stays that
        return torch.addcmul(shift, scale, x)  # shift + scale x; keeps channels_last


class GBlock(nn.Module):
    """Residual block of [SNGAN]'s generator: (B, C, H, W), style (B, 2D) -> (B, C', 2H, 2W).
    Up-sampling is bilinear [StyleGAN]: nearest-neighbour made stripes. [SNGAN] does it first;
    here conv1 and skip run before it, at a quarter of the places, which halves the time [ours]."""

    def __init__(self, channels, out):
        super().__init__()
        self.norm1, self.norm2 = AdaIN(channels), AdaIN(out)
        self.conv1 = nn.Conv2d(channels, out, 3, padding=1)
        self.conv2 = nn.Conv2d(out, out, 3, padding=1)
        self.skip = nn.Conv2d(channels, out, 1)

    def forward(self, x, style):
        h = double(
            self.conv1(F.relu(self.norm1(x, style)))
        )  # (B, C, H, W) -> (B, C', 2H, 2W)
        h = self.conv2(F.relu(self.norm2(h, style)))
        return h + double(self.skip(x))  # (B, C, H, W) -> (B, C', 2H, 2W)


def double(x):
    """(B, C, H, W) -> (B, C, 2H, 2W); autocast would answer in float32."""
    return F.interpolate(x, scale_factor=2, mode="bilinear").to(x.dtype)


class Generator(nn.Module):
    """G: z (B, D) and c (B, D) -> faces (B, 3, H, W) in [-1, 1].
    A linear map of [z, c] to 4x4 places, blocks that double the side, tanh [SNGAN]; AdaIN in each
    layer [paper §3.2]. In [SNGAN] width is 64, size 128. c is scaled to length 1: it varies in
    few directions, in each then about as much as z in one of its 128 [ours]."""

    def __init__(self, size=128, width=64):
        super().__init__()
        ups = int(math.log2(size)) - 2
        widths = [
            width * 2 ** min(i, 4) for i in range(ups, -1, -1)
        ]  # 1024 1024 512 256 128 64
        self.first = nn.Linear(2 * EMBED, widths[0] * 4 * 4)
        self.blocks = nn.ModuleList(GBlock(*pair) for pair in zip(widths, widths[1:]))
        self.norm, self.last = AdaIN(widths[-1]), nn.Conv2d(widths[-1], 3, 3, padding=1)
        init_convs(self)
        nn.init.xavier_uniform_(
            self.last.weight, 0.3
        )  # tanh starts where it has a slope [ours]

    def forward(self, z, c):
        style = torch.cat([z, F.normalize(c)], 1)  # (B, D), (B, D) -> (B, 2D)
        x = self.first(style).unflatten(1, (-1, 4, 4))  # (B, 2D) -> (B, C, 4, 4)
        x = x.contiguous(memory_format=channels_last)
        for block in self.blocks:
            x = block(x, style)  # (B, C, H, W) -> (B, C', 2H, 2W)
        x = self.last(F.relu(self.norm(x, style)))  # (B, C, H, W) -> (B, 3, H, W)
        return torch.tanh(x.float())


class Discriminator(nn.Module):
    """faces (B, 3, H, W) -> weight * phi (B, D) and psi (B,), of which Eq. 2 makes g(f, c).
    phi starts as the trained F and goes on training [paper §3.2]. psi reads the map of 4x4 places:
    with phi(f), as in the paper, G drew silhouettes, with the places' sum worse faces. It reads
    that sum's std in the batch, too, after [StyleGAN2]: else backgrounds mix colours."""

    def __init__(self, face_encoder, weight=1.0):
        super().__init__()
        self.phi, self.weight = copy.deepcopy(face_encoder), weight
        width = face_encoder.head.in_features  # C
        self.psi = nn.Linear(2 * width, 1)

    def forward(self, faces):
        total = self.phi.features(faces)  # (B, 3, H, W) -> (B, C)
        phi = scale_normalize(self.phi.head(total), self.phi.scale)  # (B, C) -> (B, D)
        std = (
            (total.var(0, correction=0) + 1e-4).sqrt().expand_as(total)
        )  # (B, C); 1e-4: no kink
        return self.weight * phi, self.psi(torch.cat([total, std], 1))[
            :, 0
        ].float()  # (B,)


inner = torch.linalg.vecdot  # <c, phi>: (B, D), (B, D) -> (B,)


def logit(c, phi, psi):
    """g(f, c) = <c, phi(f)> + psi(f): Eq. 2 with Eq. 3's c = S(s); (B, D), (B, D), (B,) -> (B,)."""
    return inner(c, phi) + psi


def rel_loss(g_real, g_fake):
    """-E log A(g(real, c+) - g(fake, c+)), A the sigmoid: Eq. 4 in Eq. 6; (B,), (B,) -> ()."""
    return -F.logsigmoid(g_real - g_fake).mean()


def relid_loss(g_real, g_fake, match, mismatch):
    """-E log A(g(real, c+) - g(fake, c+) + <c+, phi(real)> - <c-, phi(real)>): Eq. 5 in Eq. 6.
    All (B,). match is <c+, phi(real)>, which g(real, c+) holds once already; mismatch is
    <c-, phi(real)>. With them D goes on asking who fits whom; phi would forget it [paper §3.2].
    Our reading: one sigmoid around all terms, as in Eq. 4; for G real and fake swap in all four."""
    return -F.logsigmoid(g_real - g_fake + match - mismatch).mean()


def r1_penalty(discriminator, faces, c):
    """E |grad_f of the batch's sum of g|^2: R1 of real faces (B, 3, H, W), R2 of drawn; () [R1]."""
    faces = faces.detach().requires_grad_(True)
    grad = torch.autograd.grad(
        logit(c, *discriminator(faces)).sum(), faces, create_graph=True
    )[0]
    return grad.square().sum((1, 2, 3)).mean()  # (B, 3, H, W) -> (B,) -> ()


# ==== 3. Training both stages   [paper §3, §4] ====================================================
DIRECTIONS, SPLITS = ("v-f", "f-v"), ("train", "val", "test")
SYNTHETIC = "data/synthetic"  # the one corpus that is made where it is missing
SINC_LR = 1e4  # the sinc cut-offs, being in Hz, learn this many times faster [ours]
MOMENTUM, MAX_NORM = 0.9, 1.0  # of SGD; longer gradients are cut to this length [ours]
WARM = 0.1  # share of match-train's steps in which its rate rises [ours]
BETAS = (0.0, 0.99)  # of Adam [paper §4]; the values: [StyleGAN]
R1_EVERY = 16  # R1, R2 are computed in each 16th step, times 16 [StyleGAN2]


def setting(default, meaning, low=None, high=2**31, choices=None):
    """A dataclass field with --help text and allowed values: low to high or one of `choices`."""
    return field(
        default=default,
        metadata=dict(help=meaning, low=low, high=high, choices=choices),
    )


@dataclass
class RunSettings:
    """What both training commands may be told: every field is a flag. Defaults: preset `small`."""

    data: str = setting(SYNTHETIC, "corpus folder; this default is made when missing")
    preset: str = setting(
        "small", "for two CPU cores, or the paper's", choices=("small", "paper")
    )
    seed: int = setting(0, "seed of all that is random", low=0, high=2**32 - 1)
    device: str = setting(
        "auto", "cpu, cuda, cuda:1, ...; auto is cuda where there is one"
    )
    workers: int = setting(
        0, "loader processes; 0: this one loads, faster on two cores", low=0
    )
    runs: int = setting(5, "runs of a test, with fresh negatives [paper §4]", low=1)
    val_clips: int = setting(
        2000, "clips of a validation at most, always the same [ours]", low=2
    )
    save_every: int = setting(100, "steps between checkpoints", low=1)
    log_every: int = setting(50, "steps between log lines", low=1)
    resume: bool = setting(False, "go on with the run in --out, if there is one")


@dataclass
class MatchSettings(RunSettings):
    """Settings of match-train."""

    out: str = setting("runs/match", "run folder: checkpoints, log, metrics")
    direction: str = setting(
        "v-f", "given a voice pick a face, or the reverse", choices=DIRECTIONS
    )
    k: int = setting(10, "candidates of a matching task in training [paper §4]", low=2)
    steps: int = setting(1200, "training steps [ours]", low=1)
    batch: int = setting(32, "clips per step and process, at least K [ours]", low=2)
    seconds: float = setting(
        1.5, "of speech in a training pair [ours]; 6 in [paper §4]", low=0.25
    )
    size: int = setting(
        64, "side of a face [ours]; 128 in [paper §2]", choices=(32, 64, 128)
    )
    sinc_stride: int = setting(
        8, "of the sinc layer [ours]; 1 in [PASE]", choices=(1, 2, 4, 8)
    )
    speech_width: int = setting(
        16, "sinc filters, unit of S's widths [ours]; 64 in [PASE]", low=1
    )
    face_width: int = setting(
        16, "F's first channels, unit of widths [ours]; 64 in [SNGAN]", low=1
    )
    embed_scale: float = setting(3.5, "length of an embedding [ours]", low=0.1)
    lr: float = setting(0.05, "peak learning rate of SGD [ours]", low=0)
    weight_decay: float = setting(
        1e-4, "of SGD, not of the sinc cut-offs [ours]", low=0
    )
    augment: bool = setting(
        False, "vary faces and speech: for a few hundred clips [ours]"
    )
    eval_every: int = setting(400, "steps between validations", low=1)


@dataclass
class GanSettings(RunSettings):
    """Settings of gan-train."""

    match: str = setting(
        "runs/match/best.pt", "checkpoint of match-train: S, F and their sizes"
    )
    out: str = setting("runs/gan", "run folder: checkpoint, log, samples, metrics")
    loss: str = setting(
        "relid", "relid: Eq. 5; rel: Eq. 4 [paper §3.2]", choices=("relid", "rel")
    )
    steps: int = setting(
        6500, "training steps, each one of G and one of D [ours]", low=1
    )
    batch: int = setting(8, "real faces per step and process [ours]", low=2)
    width: int = setting(
        16, "G's last channels, unit of widths [ours]; 64 in [SNGAN]", low=1
    )
    weight: float = setting(
        1.0, "of <c, phi(f)> beside psi(f); 1 in [paper §3.2]", low=0
    )
    lr: float = setting(2e-3, "learning rate of G's Adam [ours]", low=0)
    d_lr: float = setting(1e-3, "learning rate of D's Adam [ours]", low=0)
    gamma: float = setting(
        0.5, "weight of R1 and R2, gamma/2 E |grad_f g(f, c+)|^2 [ours]", low=0
    )
    ema_decay: float = setting(
        0.998, "of the running average of G's weights [ours]", low=0, high=1
    )
    eval_every: int = setting(1000, "steps between validations and samples", low=1)


BIG = dict(
    batch=64, steps=200_000, eval_every=2000, save_every=1000, log_every=100, workers=8
)
PAPER = {  # the presets `paper`: sizes as in the sources above, BIG and the rates [ours]
    MatchSettings: BIG
    | dict(seconds=6.0, size=128, sinc_stride=1, speech_width=64, face_width=64),
    GanSettings: BIG | dict(width=64, lr=2e-4, d_lr=2e-4, ema_decay=0.999),
}


def make_encoders(cfg, device):
    """Fresh S and F as MatchSettings say, with channels last in memory: faster on a CPU."""
    speech_encoder = SpeechEncoder(cfg.speech_width, cfg.sinc_stride, cfg.embed_scale)
    face_encoder = FaceEncoder(cfg.size, cfg.face_width, cfg.embed_scale)
    return [
        e.to(device, memory_format=channels_last)
        for e in (speech_encoder, face_encoder)
    ]


def rate_share(step, steps, rise=0.0):
    """Share of the peak rate: it rises in `rise` of all steps, falls from half-way on [ours]."""
    return min(step / max(1, rise * steps), 1, 2 - 2 * (step - 1) / steps)


def descend(optimizer, loss, share, max_norm=math.inf, keep_graph=False):
    """One step down the loss, of the optimizer's weights alone, at a share of their peak rates.
    keep_graph: another loss will go back through it, too."""
    for group in optimizer.param_groups:
        group["lr"] = share * group.setdefault(
            "peak", group["lr"]
        )  # peak: lr at the first call
    optimizer.zero_grad()
    weights = [p for group in optimizer.param_groups for p in group["params"]]
    loss.backward(inputs=weights, retain_graph=keep_graph)
    if max_norm < math.inf:
        nn.utils.clip_grad_norm_(weights, max_norm)
    optimizer.step()


def match_train(cfg):
    """Train S and F on Eq. 1, no labels; keep and test the pair that validates best [ours]."""
    machine = Machine(cfg.device)
    corpus = open_corpus(cfg.data, dict(train=cfg.batch, val=2, test=2), machine)
    run = Run(cfg, machine)
    torch.manual_seed(cfg.seed)
    speech_encoder, face_encoder = make_encoders(cfg, machine.device)
    model = Model(cfg, speech_encoder, face_encoder)
    low_hz, band_hz, *weights = *speech_encoder.parameters(), *face_encoder.parameters()
    groups = [
        dict(params=weights, weight_decay=cfg.weight_decay),
        dict(params=[low_hz, band_hz], lr=cfg.lr * SINC_LR),
    ]  # sinc's, S's first two
    optimizer = torch.optim.SGD(groups, cfg.lr, MOMENTUM)  # [paper §4]
    pairs = PairDataset(corpus["train"], cfg, cfg.batch, cfg.seed, shuffle=True)
    parts = dict(speech=speech_encoder, face=face_encoder, optimizer=optimizer)
    restore(parts, run.saved, run.last)
    best = run.saved.get("best", -1.0)
    train_s, train_f = machine.wrap(speech_encoder), machine.wrap(face_encoder)

    for rng, speech, faces in run.batches(pairs):  # (B, T), (B, 3, H, W)
        if cfg.augment:
            speech, faces = augment(speech, faces, rng)
        candidates = sample_candidates(len(faces), cfg.k, rng)  # (B, K)
        with machine.autocast:
            se, fe = (
                train_s(speech),
                train_f(faces),
            )  # (B, T) -> (B, D), (B, 3, H, W) -> (B, D)
        logits = match_logits(
            se, fe, candidates, cfg.direction
        )  # (B, D), (B, D) -> (B, K)
        loss = -logits.log_softmax(1)[
            :, 0
        ].mean()  # Eq. 1: (B, K) -> (); column 0 is the positive
        descend(optimizer, loss, rate_share(run.step, cfg.steps, WARM), MAX_NORM)

        run.log(loss=loss, accuracy=100 * top1(logits).mean())
        if run.due(cfg.eval_every):
            score = validate(model, corpus["val"], run, cfg.runs)
            if score > best:
                best = score
                run.save("best.pt", dict(speech=speech_encoder, face=face_encoder))
            (
                speech_encoder.train(),
                face_encoder.train(),
            )  # validation left them in eval mode
        if run.due(cfg.save_every):
            run.save("last.pt", parts, best=best)
    if machine.rank == 0:
        model = load_model(run.folder / "best.pt", MatchSettings, machine)
        report(model, corpus["test"], cfg, machine)


def gan_train(cfg):
    """Train G and D [paper §3.2]; g_ema, the running average of G, is tested and drawn with."""
    machine = Machine(cfg.device)
    corpus = open_corpus(cfg.data, dict(train=cfg.batch, val=2, test=2), machine)
    run = Run(cfg, machine)
    trained = (
        (run.last, GanSettings) if run.step else (cfg.match, MatchSettings)
    )  # both hold S, F
    match_cfg, speech_encoder, face_encoder, *_ = load_model(*trained, machine)
    torch.manual_seed(cfg.seed)
    generator = Generator(match_cfg.size, cfg.width).to(
        machine.device, memory_format=channels_last
    )
    discriminator = Discriminator(face_encoder, cfg.weight).to(machine.device)
    g_ema = copy.deepcopy(generator)
    update_ema = torch.optim.swa_utils.get_ema_multi_avg_fn(cfg.ema_decay)
    g_optimizer = torch.optim.Adam(generator.parameters(), cfg.lr, BETAS, fused=True)
    d_optimizer = torch.optim.Adam(
        discriminator.parameters(), cfg.d_lr, BETAS, fused=True
    )
    model = Model(match_cfg, speech_encoder, face_encoder, cfg, g_ema)
    parts = dict(
        speech=speech_encoder,
        face=face_encoder,
        g_ema=g_ema,
        g=generator,
        d=discriminator,
        g_optimizer=g_optimizer,
        d_optimizer=d_optimizer,
    )
    restore(parts, run.saved, run.last)
    train_g, train_d = machine.wrap(generator), machine.wrap(discriminator)
    pairs = PairDataset(corpus["train"], match_cfg, cfg.batch, cfg.seed, shuffle=True)

    for rng, speech, real in run.batches(pairs):  # (B, T), (B, 3, H, W)
        z = torch.randn(len(real), EMBED, generator=rng).to(real.device)  # (B, D)
        with machine.autocast:
            with torch.no_grad():  # S is frozen [ours]
                c_pos = speech_encoder(speech)  # c+: (B, T) -> (B, D)
            c_neg = c_pos[
                sample_candidates(len(real), 2, rng)[:, 1]
            ]  # c-: (B, D), others' voices
            fake = train_g(z, c_pos)
            phi_real, psi_real = train_d(real)
            phi_fake, psi_fake = train_d(fake.detach())
        g_real = logit(c_pos, phi_real, psi_real)
        g_fake = logit(c_pos, phi_fake, psi_fake)
        match_real = inner(c_pos, phi_real)
        mismatch_real = inner(c_neg, phi_real)
        if cfg.loss == "relid":
            loss_d = relid_loss(g_real, g_fake, match_real, mismatch_real)
        else:
            loss_d = rel_loss(g_real, g_fake)
        penalty = 0.0
        if run.step % R1_EVERY == 0:
            penalty = r1_penalty(train_d, real, c_pos) + r1_penalty(
                train_d, fake, c_pos
            )
        share = rate_share(run.step, cfg.steps)
        descend(d_optimizer, loss_d + cfg.gamma / 2 * R1_EVERY * penalty, share)

        with machine.autocast:
            phi_fake, psi_fake = discriminator(fake)
        g_fake = logit(c_pos, phi_fake, psi_fake)
        match_fake = inner(c_pos, phi_fake)
        mismatch_fake = inner(c_neg, phi_fake)
        if cfg.loss == "relid":
            loss_g = relid_loss(g_fake, g_real.detach(), match_fake, mismatch_fake)
        else:
            loss_g = rel_loss(g_fake, g_real.detach())
        descend(g_optimizer, loss_g, share)
        update_ema([*g_ema.parameters()], [*generator.parameters()], None)

        run.log(
            loss_d=loss_d,
            loss_g=loss_g,
            match_real=match_real.mean(),
            match_fake=match_fake.mean(),
            mismatch_real=mismatch_real.mean(),
        )
        if run.due(cfg.eval_every):
            validate(model, corpus["val"], run)
        if run.due(cfg.save_every):
            run.save("last.pt", parts, match=asdict(match_cfg))
    if machine.rank == 0:
        report(model, corpus["test"], cfg, machine)


# ==== 4. Evaluation: K-way tests [paper §4, Tables 1, 2], their ceiling, QTA 1 to 3, what c, z do =
# QTA, QLA: quantitative, qualitative analyses. A test takes one clip of each identity, a run draws
# negatives, windows, pictures, z anew [ours]. The first stage's F judges. people: N label rows.
GALLERY = 5000  # faces to retrieve from, at most [paper §4]
Model = namedtuple(
    "Model", "match speech_encoder face_encoder gan g_ema", defaults=(None, None)
)


def embed(model, split, seed, machine, workers=0):
    """A pair of each identity: speech (N, D), faces (N, D), identity (N,); eval mode afterwards."""
    pairs, rows = PairDataset(split, model.match, model.match.batch, seed), []
    batches = range(math.ceil(len(split.names) / pairs.batch))
    for speech, faces, who, _ in load_batches(pairs, batches, workers, machine.device):
        rows.append(
            (apply(model.speech_encoder, speech), apply(model.face_encoder, faces), who)
        )
    se, fe, identity = (
        torch.cat(column) for column in zip(*rows)
    )  # (N, D), (N, D), (N,)
    if len(identity) < 2:
        raise UserError(f"{split.folder}: too few people can be read (run check-data)")
    return se, fe, identity


def matching_scores(speech, faces, people, seed, prefix=""):
    """One run of all tests on embeddings (N, D): {prefix + "v-f/2": percent, ...}.
    With /gender wrong answers are of the right one's gender. Fewer than K people: no such test."""
    genders, scores = np.array([row.get("gender") or "" for row in people]), {}
    alike = [
        torch.from_numpy(np.flatnonzero(genders == g))
        for g in sorted({*genders} - {""})
    ]
    generator = torch.Generator().manual_seed(seed)
    for direction, k, suffix in itertools.product(DIRECTIONS, (2, 10), ("", "/gender")):
        hits = []
        for rows in alike if suffix else [torch.arange(len(speech))]:
            if len(rows) >= k:
                rows = rows[
                    torch.randperm(len(rows), generator=generator)
                ]  # names may be grouped
                candidates = sample_candidates(len(rows), k, generator)  # (n, K)
                hits.append(
                    top1(match_logits(speech[rows], faces[rows], candidates, direction))
                )
        if hits:
            scores[f"{prefix}{direction}/{k}{suffix}"] = (
                100 * torch.cat(hits).mean().item()
            )
    return scores


def oracle_embeddings(people):
    """What perfect encoders, which nothing beats but by chance, would answer where factors are
    known: two of (N, E). For standard normals v, f of correlation r the best score for Eq. 1 is
        log p(v, f) / (p(v) p(f)) = const + a v f - b v^2 - b f^2,  a = r / (1 - r^2), b = r a / 2,
    an inner product, <(a v, -b v^2, 1), (f, 1, -b f^2)>; the other gender is impossible."""
    a, b = LINK / (1 - LINK**2), LINK**2 / (1 - LINK**2) / 2
    v = numbers(people, [f"voice_{name}" for name in LINKED])  # (N, 3)
    f, gender = (
        numbers(people, LINKED),
        2 * numbers(people, ["gender"]) - 1,
    )  # (N, 3), (N, 1)
    one = torch.ones_like(v)  # (N, 3)
    voices = torch.cat([a * v, -b * v**2, one, 1000 * gender], 1)  # (N, 10)
    return voices, torch.cat([f, one, -b * f**2, gender], 1)  # (N, 10), (N, 10)


def numbers(people, columns):
    """Columns of P rows of labels.csv: (P, E)."""
    return torch.tensor([[float(row[column]) for column in columns] for row in people])


def distance_panels(c, fake, people, seed):
    """QTA 1 of N couples: {couples: (CD(c1, c2), CD(F(G(z1, c1)), F(G(z2, c2))))}, (n,) each."""
    other = sample_candidates(len(c), 2, torch.Generator().manual_seed(seed))[
        :, 1
    ]  # (N,)
    cd_c, cd_f = (
        1 - F.cosine_similarity(x, x[other]) for x in (c, fake)
    )  # (N, D) -> (N,)
    genders = np.array([row.get("gender") or "" for row in people])
    alike = torch.from_numpy(genders == genders[other])  # (N,)
    masks = {"all": alike | True} | (
        {"different": ~alike, "same": alike} if all(genders) else {}
    )
    return {couples: (cd_c[m], cd_f[m]) for couples, m in masks.items() if m.sum() > 2}


def recall(distances, name):
    """QTA 3, Table 3: {name/k: R@k in percent} of distances (G, G); face i is query i's own."""
    rank = (distances <= distances.diagonal()[:, None]).sum(
        1
    )  # (G, G) -> (G,), 1 is the nearest
    return {
        f"{name}/{k}": 100 * (rank <= k).float().mean().item() for k in (1, 2, 5, 10)
    }


@torch.no_grad()
def apply(network, *inputs):
    """network(*inputs), left in eval mode; answers on the CPU; inputs (N, ...), or one for all."""
    device = next(network.eval().parameters()).device
    chunks = zip(
        *(x.split(32) for x in torch.broadcast_tensors(*inputs))
    )  # 32 rows at a time
    return torch.cat(
        [network(*(x.to(device) for x in chunk)).cpu() for chunk in chunks]
    )


def drawn_scores(c, fake, real, people, seed):
    """One run of QTA 1 to 3, but for 2's comparison of generators, and K-way tests; all (N, D)."""
    preferred = top1(torch.stack([inner(c, fake), inner(c, real)], 1))  # (N, 2) -> (N,)
    scores = {"preferred": 100 * preferred.mean().item()} | matching_scores(
        c, fake, people, seed
    )
    for couples, (cd_c, cd_f) in distance_panels(c, fake, people, seed).items():
        scores |= {
            f"qta1/{couples}/c": cd_c.mean().item(),
            f"qta1/{couples}/face": cd_f.mean().item(),
            f"qta1/{couples}/r": np.corrcoef(cd_c, cd_f)[0, 1],
        }
    fake, real = fake[:GALLERY], real[:GALLERY]  # (G, D), (G, D)
    scores |= recall(torch.cdist(fake, real, p=1.0), "retrieval/L1")  # (G, G)
    scores |= recall(torch.cdist(fake, real), "retrieval/L2")
    return scores | recall(-F.normalize(fake) @ F.normalize(real).T, "retrieval/cosine")


def evaluate(model, split, labels, cfg, runs, machine):
    """All scores on a split: {key: mean, key/std: deviation} over runs.
    With a generator drawn faces have the bare keys, true ones real/; oracle/: of known factors."""
    found, metrics = {}, {}  # {key: a score per run}, {key: a number}
    for seed in range(cfg.seed + 1000, cfg.seed + 1000 * (runs + 1), 1000):
        with machine.autocast:
            c, real, identity = embed(model, split, seed, machine, cfg.workers)
            if model.gan:
                z = torch.randn(
                    c.shape, generator=torch.Generator().manual_seed(seed)
                )  # (N, D)
                fake = apply(model.face_encoder, apply(model.g_ema, z, c))  # (N, D)
        people = [labels.get(name, {}) for name in split.names[identity.numpy()]]
        scores = matching_scores(c, real, people, seed, "real/" if model.gan else "")
        scores |= drawn_scores(c, fake, real, people, seed) if model.gan else {}
        if all("voice_age" in row for row in people):
            voices, faces = oracle_embeddings(people)  # (N, E), (N, E)
            scores |= matching_scores(voices, faces, people, seed, "oracle/")
            scores |= recall(-voices[:GALLERY] @ faces[:GALLERY].T, "oracle/retrieval")
        for key, score in scores.items():
            found.setdefault(key, []).append(score)
    for key, scores in found.items():
        metrics[key] = round(float(np.mean(scores)), 3)
        if len(scores) > 1:
            metrics[f"{key}/std"] = round(float(np.std(scores, ddof=1)), 3)
    return metrics


def validate(model, split, run, runs=1):
    """Print how a training does on at most --val-clips people; return what best.pt is chosen by."""
    metrics = evaluate(
        model, thin(split, run.cfg.val_clips), {}, run.cfg, runs, run.machine
    )
    shown = [
        key
        for key in ("preferred", "v-f/2", "v-f/10", "f-v/2", "f-v/10")
        if key in metrics
    ]
    print(
        f"step {run.step} val",
        *(f" {key} {metrics[key]} %" for key in shown),
        flush=True,
    )
    if model.gan:
        plot_figures(
            model, split, run.folder / f"samples/{run.step:06}.png", run.machine
        )
    return metrics.get(
        f"{model.match.direction}/10", metrics[f"{model.match.direction}/2"]
    )


def fit_probe(faces, targets, noise=0.1):
    """The linear map (M, E) that best reads targets (N, E) off pixels of faces (N, 3, H, W): ridge
    regression, as if pixels had this noise [ours], lest it rely on detail that drawn faces lack."""
    x = pixels(faces)  # (N, M)
    ridge = len(x) * noise**2 * torch.eye(x.shape[1])  # (M, M)
    return torch.linalg.solve(x.T @ x + ridge, x.T @ targets)  # (M, E)


def pixels(faces):
    """(N, 3, H, W) -> (N, M): shrunk to 32 x 32, a row for each, and a 1."""
    return F.pad(F.adaptive_avg_pool2d(faces, 32).flatten(1), (0, 1), value=1.0)


def variance_shares(read):
    """Two-way analysis of variance of (V voices, Z, E): {"c", "z": percent due to it, (E,)}."""
    total = read.var((0, 1), correction=0) / 100  # (V, Z, E) -> (E,)
    return {
        "c": read.mean(1).var(0, correction=0) / total,  # (V, Z, E) -> (V, E) -> (E,)
        "z": read.mean(0).var(0, correction=0) / total,
    }  # (V, Z, E) -> (Z, E) -> (E,)


def control_scores(model, corpus, labels, machine, noises=16):
    """QLA 1 to 3, by eye in the paper: {control/<factor>/...} of what a probe reads in faces drawn
    of V voices by Z noises. c, z: percent of variance; voice: r with it; probe: of true faces."""
    _, faces, names = sample_batch(corpus["train"], model.match, 1000, 0, machine)
    known = numbers([labels[name] for name in names], FACTORS)  # (P, E)
    probe = fit_probe(
        faces.cpu(), known - known.mean(0)
    )  # (M, E); all that learns of labels
    speech, faces, names = sample_batch(corpus["test"], model.match, 400, 0, machine)
    people, seen = (
        [labels[name] for name in names],
        pixels(faces.cpu()) @ probe,
    )  # (V, E)
    z = torch.randn(noises, EMBED, generator=torch.Generator().manual_seed(0))  # (Z, D)
    c = apply(model.speech_encoder, speech)  # (V, D)
    read = torch.stack(
        [pixels(apply(model.g_ema, z, one)) @ probe for one in c]
    )  # (V, Z, E)
    heard, metrics = (
        ["gender", *(f"voice_{name}" for name in LINKED)],
        {},
    )  # as FACTORS begin
    for e, name in enumerate(FACTORS):
        for cause, share in variance_shares(read).items():
            metrics[f"control/{name}/{cause}"] = share[e].item()
        metrics[f"control/{name}/probe"] = np.corrcoef(
            seen[:, e], numbers(people, [name]).T
        )[0, 1]
        if e < len(heard):
            voice = numbers(people, [heard[e]]).expand(-1, noises).flatten()  # (V Z,)
            metrics[f"control/{name}/voice"] = np.corrcoef(
                read[..., e].flatten(), voice
            )[0, 1]
    right = (read[..., 0] > 0) == (numbers(people, ["gender"]) > 0.5)  # (V, Z), (V, 1)
    metrics["control/gender/right"] = 100 * right.float().mean().item()
    return {key: round(value, 3) for key, value in metrics.items()}


# ==== 5. Figures 2 to 6, the reports, faces for any recording =====================================
THEIRS = {
    "real/f-v/2": 88.47,
    "f-v/2": 95.14,
    "preferred": 76.65,
    "qta1/different/c": 0.46,
    "qta1/same/c": 0.28,
    "qta1/different/face": 0.27,
    "qta1/same/face": 0.15,
}  # [paper §4]


def to_image(face):
    """(3, H, W) in [-1, 1] -> a PIL picture."""
    values = ((face.cpu() + 1) * 127.5).round().clamp(0, 255).byte()
    return Image.fromarray(values.permute(1, 2, 0).numpy())  # (3, H, W) -> (H, W, 3)


def plot_grid(path, rows, side=128, line=24):
    """A picture of R rows, each a title over n faces: (title, (., 3, H, W), (., 3, H, W), ...)."""
    faces = [
        F.interpolate(torch.cat(parts), side) for _, *parts in rows
    ]  # (n, 3, side, side)
    faces = nn.utils.rnn.pad_sequence(
        faces, batch_first=True, padding_value=1
    )  # (R, n, 3, H, W)
    faces = F.pad(faces, (2, 2, line, 0), value=1).permute(
        2, 0, 3, 1, 4
    )  # (3, R, H, n, W)
    picture = to_image(faces.flatten(3).flatten(1, 2))  # (3, R H, n W)
    for j, (title, *_) in enumerate(rows):
        ImageDraw.Draw(picture).text(
            (4, j * (side + line) + 4), title, "black", font_size=14
        )
    picture.save(make_folder(Path(path).parent) / Path(path).name)


def sample_batch(split, cfg, count, seed, machine):
    """A pair each of `count` people of a split: speech (N, T), faces (N, 3, H, W), names."""
    pairs = PairDataset(thin(split, count), cfg, count, seed)
    speech, faces, identity, _ = next(load_batches(pairs, [0], 0, machine.device))
    return speech, faces, pairs.split.names[identity.numpy()]


def plot_figures(model, split, path, machine, seed=0, columns=7):
    """Figures 2, 3, 4, 6; 5: faces by z, between voices or z, retrieved; distances, dark: many."""
    speech, faces, names = sample_batch(split, model.match, 200, seed, machine)
    c, real = (
        apply(model.speech_encoder, speech),
        apply(model.face_encoder, faces),
    )  # (N, D) each
    z = torch.randn(c.shape, generator=torch.Generator().manual_seed(seed))  # (N, D)
    fake, true = apply(model.g_ema, z, c), faces.cpu()  # (N, 3, H, W) each
    fe = apply(model.face_encoder, fake)  # (N, D)
    nearest = (fe @ real.T).argsort(1, descending=True)  # (N, N)
    t, shown = (
        torch.linspace(0, 1, columns - 1)[:, None],
        np.linspace(0, len(c) - 1, 6, dtype=int),
    )
    rows = [
        (
            f"{names[a]}: true face; drawn of the voice, by z",
            true[a : a + 1],
            apply(model.g_ema, z[:columns], c[a]),
        )
        for a in shown
    ]
    for a, b in zip(shown[:3], shown[3:]):
        voices, noises = (
            torch.lerp(c[a], c[b], t),
            torch.lerp(z[a], z[b], t),
        )  # (columns - 1, D)
        rows += [
            (
                f"{names[a]}; by one z between two voices; {names[b]}",
                true[a : a + 1],
                apply(model.g_ema, z[a], voices),
                true[b : b + 1],
            ),
            (
                f"{names[a]}; between two z",
                true[a : a + 1],
                apply(model.g_ema, noises, c[a]),
            ),
            (
                f"{names[a]}: true face; a drawn one; the true ones nearest to that",
                true[a : a + 1],
                fake[a : a + 1],
                true[nearest[a, : columns - 1]],
            ),
        ]
    labels, panels = read_labels(split.folder.parent), []
    couples = distance_panels(c, fe, [labels.get(name, {}) for name in names], seed)
    for cd_c, cd_f in couples.values():  # (n,), (n,)
        n, *_ = np.histogram2d(
            2 - cd_f, cd_c, bins=32, range=((0, 2), (0, 2))
        )  # (32, 32)
        panels.append(torch.tensor(1 - 2 * n / n.max()).float().expand(1, 3, -1, -1))
    title = f"{', '.join(couples)} genders: across CD(c1, c2), up that of their drawn faces, 0 to 2"
    plot_grid(path, rows + [(title, *panels)] * bool(panels))


def report(model, split, args, machine, more=()):
    """Test; write the scores and `more` to metrics.json; print and return a table of them."""
    metrics = evaluate(
        model, split, read_labels(args.data), args, args.runs, machine
    ) | dict(more)
    (make_folder(args.out) / "metrics.json").write_text(
        json.dumps(metrics, indent=1) + "\n"
    )
    table = "| in metrics.json | here | paper |\n|---|---|---|\n"
    for key in (key for key in metrics if not key.endswith("/std")):
        std = f" ± {metrics[f'{key}/std']:.2f}" if f"{key}/std" in metrics else ""
        theirs = THEIRS.get(key if "preferred" in metrics else f"real/{key}", "")
        table += f"| {key:24} | {f'{metrics[key]:.2f}{std}':14} | {theirs} |\n"
    print(table, end="", flush=True)
    return table


def match_test(args):
    """Test trained encoders on one split: both directions, K = 2 and 10."""
    machine, corpus = Machine(args.device), open_corpus(args.data, {args.split: 2})
    report(
        load_model(args.match, MatchSettings, machine),
        corpus[args.split],
        args,
        machine,
    )


def gan_test(args):
    """Write OUT/report.md with the figures and numbers of section 4, pictures, metrics.json."""
    machine, out, labels = (
        Machine(args.device),
        make_folder(args.out),
        read_labels(args.data),
    )
    model = load_model(args.gan, GanSettings, machine)
    made = "voice_age" in next(iter(labels.values()), {})
    corpus = open_corpus(args.data, dict(test=3) | (dict(train=2) if made else {}))
    known = all(
        "voice_age" in labels.get(name, {}) for s in corpus.values() for name in s.names
    )
    qla = control_scores(model, corpus, labels, machine) if known else {}
    plot_figures(model, corpus["test"], out / "figures.png", machine, args.seed)
    page = (
        f"# {args.gan}, {args.data}/test\n\n![Figures 2 to 6](figures.png)\n\n"
        f"Mean ± deviation of {args.runs} runs; the paper's are of other people.\n\n"
    )
    (out / "report.md").write_text(
        page + report(model, corpus["test"], args, machine, qla), "utf8"
    )
    print(f"{out / 'report.md'}: written")


def generate(args):
    """Draw n faces for each recording: a labelled picture, or a folder with one PNG per face."""
    model, noise = (
        load_model(args.gan, GanSettings, Machine(args.device)),
        torch.Generator(),
    )
    to_picture, rng, rows = (
        args.out[-4:].lower() == ".png",
        np.random.default_rng(args.seed),
        [],
    )
    for number, path in enumerate(args.inputs, start=1):
        speech = torch.from_numpy(load_speech(path, HEARD, rng))[None]  # (1, T)
        if speech.abs().max() < SILENCE:
            raise UserError(f"{path}: silent where --seed {args.seed} listens")
        noise.manual_seed(
            args.seed if to_picture else args.seed + number
        )  # one z a column
        z = torch.randn(args.n, EMBED, generator=noise)  # (n, D)
        faces = apply(
            model.g_ema, z, apply(model.speech_encoder, speech)
        )  # (n, 3, H, W)
        if to_picture:
            rows.append((path, faces))
            continue
        for k, face in enumerate(faces, start=1):
            to_image(face).save(
                make_folder(args.out) / f"{number:04}_{Path(path).stem}_z{k}.png"
            )
    if to_picture:
        plot_grid(args.out, rows)
    print(f"{args.out}: {args.n} faces for each of {len(args.inputs)} recordings")


# ==== 6. Data: DATA/{train,val,test}/<identity>/<clip>/*.wav *.jpg, DATA/labels.csv   [ours] ======
# 1200.jpg was taken 1200 ms into its clip's one recording: GUARD around that moment is not heard.
SPEECH_FILES = (".wav", ".flac", ".mp3", ".m4a", ".aac", ".ogg", ".opus", ".wma")
FACE_FILES = (".jpg", ".jpeg", ".png")
HEARD = 6.0  # s of speech in tests and drawing, repeated if shorter [paper §4]
GUARD = 0.3  # s between a picture's moment and its speech, on both sides [ours]
SPARE = 16  # further people who may stand in for a batch's unreadable ones [ours]
MIN_SIDE = 32  # pixels; a smaller face is a fault [ours]
SILENCE = 1e-4  # of full scale 1; a recording that never gets louder is a fault [ours]
Split = namedtuple(
    "Split", "folder names"
)  # a part of a corpus; names (P,) of its identities


def open_corpus(data, least, machine=None):
    """{split: Split} of the splits in `least`, which says how many identities each must have.
    With `machine`, for training, the synthetic corpus is made if missing."""
    if machine and machine.rank == 0 and data == SYNTHETIC and not Path(data).exists():
        make_data(argparse.Namespace(identities=IDENTITIES, seed=0, inputs=data))
    if machine and machine.count > 1:
        distributed.barrier()  # for the corpus
    read_labels(data)  # a fault there shall not wait for the end of training
    corpus = {}
    for split, count in least.items():
        folder = Path(data, split)
        if not folder.is_dir():
            raise UserError(
                f"{folder}: no such folder; a corpus is "
                f"{data}/{{train,val,test}}/<identity>/<clip>/ with *.wav and *.jpg"
            )
        names = sorted(
            e.name for e in os.scandir(folder) if e.name[0] != "." and e.is_dir()
        )
        twice = [
            name
            for other in corpus.values()
            for name in np.intersect1d(names, other.names)
        ]
        if twice:
            raise UserError(f"{folder / twice[0]}: is in another split, too")
        if len(names) < count:
            raise UserError(
                f"{folder}: {len(names)} identities, at least {count} are needed: "
                "--batch for training, --k for check-data, a few for tests"
            )
        corpus[split] = Split(folder, np.array(names, dtype=str))
    return corpus


def thin(split, count):
    """At most `count` identities of a split, evenly spread, always the same."""
    rows = np.linspace(0, len(split.names) - 1, min(count, len(split.names)), dtype=int)
    return Split(split.folder, split.names[rows])


def read_labels(data):
    """labels.csv as {identity: {column: text}}; {} where there is none. Training never sees it."""
    path = Path(data, "labels.csv")
    text = path.read_text("utf-8-sig", "replace") if path.exists() else ""
    with as_user_error(f"{path}: must be CSV in UTF-8 with a column 'identity'"):
        rows = [(row["identity"], row) for row in csv.DictReader(io.StringIO(text))]
    return dict(rows)


def list_files(identity):
    """An identity's recordings and pictures, <clip>/<file> each."""
    files = sorted(glob.glob("*/*", root_dir=identity))  # leaves out hidden ones
    kinds = [
        [x for x in files if x.lower().endswith(ends)]
        for ends in (SPEECH_FILES, FACE_FILES)
    ]
    if not all(kinds):
        raise UserError(f"{identity}: no recording or no picture in its clip folders")
    return kinds


def sample_window(length, rate, seconds, moment, rng):
    """(start, stop) of a window of a recording, in samples, outside moment +- GUARD (s; or None).
    Of all windows that fit each is equally likely; where none fits, it is the longer side
    [paper §4: speech and face from different time frames]. None seconds: everything."""
    sides = [(0, length)]
    if moment is not None:
        ends = (
            math.floor((moment - GUARD) * rate),
            math.ceil((moment + GUARD) * rate) + 1,
        )
        before, after = (min(length, max(0, end)) for end in ends)
        sides = [(0, before), (after, length)]
    window = math.ceil(seconds * rate) if seconds else length
    fits = [
        max(0, stop - start - window + 1) for start, stop in sides
    ]  # windows in each side
    if not sum(fits):
        return max(sides, key=lambda side: side[1] - side[0])
    i = int(rng.integers(sum(fits))) if seconds else 0
    start = i if i < fits[0] else sides[1][0] + i - fits[0]
    return start, start + window


def load_speech(path, seconds=None, rng=None, moment=None):
    """A window of a recording, (T,), T = RATE * seconds or all, beside `moment` (s) if given.
    Shorter is repeated, longer cut at random [paper §4]; rates round to 25 Hz: from odd ones
    the resampler's filters would cost GB."""
    with as_user_error(f"{path}: neither 16-bit WAV nor readable by torchaudio"):
        try:
            with wave.open(str(path)) as f:
                if f.getsampwidth() != 2:
                    raise wave.Error("not 16-bit")
                rate, n = f.getframerate(), f.getnchannels()
                held = os.path.getsize(path) // (
                    2 * n
                )  # a stream's header knows no length
                start, stop = sample_window(
                    min(f.getnframes(), held), rate, seconds, moment, rng
                )
                f.setpos(start)
                raw = np.frombuffer(
                    f.readframes(stop - start), "<i2"
                )  # (T n,), or cut short
                x = (
                    raw[: len(raw) // n * n].reshape(-1, n).mean(1, dtype=np.float32)
                    / 32768
                )
        except (wave.Error, EOFError):
            x, rate = torchaudio.load(path)  # (channels, T)
            start, stop = sample_window(x.shape[1], rate, seconds, moment, rng)
            x = x[:, start:stop].mean(0).numpy()  # (channels, T) -> (T,)
        x = torchaudio.functional.resample(
            torch.from_numpy(x), 25 * round(rate / 25), RATE
        ).numpy()
    if not len(x) or not np.isfinite(x).all():
        raise UserError(
            f"{path}: no speech in it, or none beside its face's time, or NaN"
        )
    return (
        np.resize(x, round(seconds * RATE)) if seconds else x
    )  # np.resize repeats or cuts


def load_face(path, size):
    """A face, uint8 (H, W, 3): upright, RGB, its central square resized to `size`."""
    with as_user_error(f"{path}: not a readable picture"), Image.open(path) as image:
        image.draft(
            "RGB", (2 * size, 2 * size)
        )  # a large JPEG: decoded at twice `size` or more
        face = ImageOps.exif_transpose(image).convert("RGB")
    if min(face.size) < MIN_SIDE:
        raise UserError(
            f"{path}: {face.width}x{face.height} pixels, at least {MIN_SIDE} a side"
        )
    return np.array(ImageOps.fit(face, (size, size), Image.Resampling.BILINEAR))


class PairDataset:
    """Batches of pairs of different identities, pure functions of seed and number: speech (B, T),
    faces uint8 (B, H, W, 3), identity (B,), rows of split.names, and faults. With shuffle [ours]:
    people and flips at random, others replace the unreadable; without: all in order."""

    def __init__(self, split, cfg, batch, seed, shuffle=False):
        self.split, self.batch, self.seed, self.shuffle = split, batch, seed, shuffle
        self.size, self.seconds = cfg.size, cfg.seconds if shuffle else HEARD

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
        Where that clip has no picture, as in VoxCeleb with VGGFace, one of the identity."""
        folder = self.split.folder / self.split.names[identity]
        recordings, pictures = list_files(folder)
        speech = rng.choice(recordings)
        clip = os.path.dirname(speech)
        beside = [name for name in pictures if os.path.dirname(name) == clip]
        picture = Path(rng.choice(beside or pictures))
        alone = sum(os.path.dirname(name) == clip for name in recordings) == 1
        moment = (
            int(picture.stem) / 1000
            if beside and alone and picture.stem.isdecimal()
            else None
        )
        face = load_face(folder / picture, self.size)
        step = -1 if self.shuffle and rng.random() < 0.5 else 1  # -1 flips
        return load_speech(folder / speech, self.seconds, rng, moment), face[:, ::step]


def augment(speech, faces, rng):
    """Faces (B, 3, H, W) cut and coloured, speech (B, T) equalised and noisy, at each call anew, so
    that a few hundred clips are not learned by heart; all strengths [ours]."""

    def spread(*shape):
        return (
            2 * torch.rand(len(faces), *shape, generator=rng).to(faces.device) - 1
        )  # in -1 ... 1

    zoom = 0.85 + 0.15 * spread(1, 1)  # (B, 1, 1); 70 to 100 % of the side, anywhere
    cut = torch.cat(
        [zoom * torch.eye(2, device=zoom.device), (1 - zoom) * spread(2, 1)], 2
    )
    grid = F.affine_grid(
        cut, faces.shape, align_corners=False
    )  # (B, 2, 3) -> (B, H, W, 2)
    faces = F.grid_sample(faces, grid, align_corners=False)
    faces = faces * (1 + 0.3 * spread(3, 1, 1)) + 0.3 * spread(
        3, 1, 1
    )  # contrast, light
    spectrum = torch.fft.rfft(speech)  # (B, T) -> (B, T/2+1)
    level = F.interpolate(8 * spread(1, 16), spectrum.shape[1], mode="linear")[
        :, 0
    ]  # dB
    speech = torch.fft.irfft(spectrum * 10 ** (level / 20), speech.shape[1])
    noise = torch.randn(speech.shape, generator=rng).to(speech.device)  # (B, T)
    return speech + (0.1 + 0.1 * spread(1)) * speech.std(1, keepdim=True) * noise, faces


def load_batches(pairs, batches, workers, device):
    """The batches of these numbers, by loader processes or by this one; faces in [-1, 1].
    Warns of unreadable files; ends the run where they outnumber the readable by over SPARE."""
    loader = torch.utils.data.DataLoader(
        pairs,
        batch_size=None,
        sampler=batches,
        num_workers=workers,
        pin_memory=device.type == "cuda",
    )
    bad = read = 0
    for speech, faces, identity, faults in loader:
        sys.stderr.writelines(f"warning: left out: {fault}\n" for fault in faults)
        bad, read = bad + len(faults), read + len(identity)
        if bad > SPARE + read or (bad and not read):
            raise UserError(
                f"too many unreadable files (run check-data), as {faults[-1]}"
            )
        if len(identity):  # none: of the last batch of a test nobody could be read
            faces = faces.to(device, non_blocking=True).permute(
                0, 3, 1, 2
            )  # uint8, (B, 3, H, W)
            yield (
                speech.to(device, non_blocking=True),
                faces.float() / 127.5 - 1,
                identity,
                faults,
            )


def check_file(path):
    """Seconds of speech in it; raises UserError if a file or an identity's folder is of no use."""
    if path.is_dir():
        list_files(path)
    elif path.name.lower().endswith(FACE_FILES):
        load_face(path, MIN_SIDE)
    elif path.name.lower().endswith(SPEECH_FILES):
        x = load_speech(path)
        if np.abs(x).max() < SILENCE:
            raise UserError(f"{path}: silent from start to end")
        return len(x) / RATE
    return 0


def check_data(args):
    """Read every file of a corpus; print what it holds and what is wrong with it."""
    faults = 0
    for split, (folder, names) in open_corpus(
        args.inputs, dict.fromkeys(SPLITS, args.k)
    ).items():
        seconds = 0
        for name in names:
            for path in ("", *glob.glob("*/*", root_dir=folder / name)):
                try:
                    seconds += check_file(folder / name / path)
                except UserError as e:
                    print(f"fault: {e}", flush=True)
                    faults += 1
        print(
            f"{split:5}  {len(names)} identities, {seconds / 3600:.2f} h speech",
            flush=True,
        )
    print(f"{faults} faults")
    return bool(faults)


# ==== 7. Synthetic people: voices by source and filter, flat faces, known factors   [all ours] ====
LINK = 0.72  # correlation of voice and face: match-train then has 90 % (2-way), the paper 88.47
LINKED = ("age", "tract", "build")  # and gender, which voice and face share wholly
HAIR = [(36, 30, 34), (122, 72, 40), (226, 180, 96)]
SKIN = [(255, 218, 190), (222, 166, 122), (134, 88, 62)]
BACKGROUND = [(126, 184, 226), (240, 230, 208), (246, 176, 142)]
INK = (34, 28, 36)
WHITE = (255, 255, 255)
GREY = (236, 236, 240)
CLOTHES = (96, 110, 160)
LIPS = (206, 62, 72)
MOUTH = (110, 28, 40)
VOWELS = np.array(
    [  # Hz; a i u of men, Peterson and Barney 1952; the fourth formant [ours]
        (730, 1090, 2440, 3400),
        (270, 2290, 3010, 3600),
        (300, 870, 2240, 3300),
    ]
)
FACTORS = (
    "gender",
    *LINKED,
    "glasses",
    "hair",
    "skin",
    "background",
    "tilt",
)  # of a face
IDENTITIES = 2400  # of the default corpus
CLIP_SECONDS, FRAMES = (
    6,
    6,
)  # one clip a person, so that no pair needs to know who is who
SIDE, OVERSAMPLE = 128, 2  # pixels of a face, drawn larger and averaged


def sample_person(rng):
    """All numbers of a person. What voice and face share are pairs of normals, correlation LINK."""
    person = dict(gender=int(rng.integers(2)))  # 1 is male
    for name in LINKED:
        voice, noise = rng.normal(size=2)
        person |= {
            "voice_" + name: voice,
            name: LINK * voice + math.sqrt(1 - LINK**2) * noise,
        }
    person |= dict(
        glasses=max(0, rng.uniform(-1, 1)),  # thickness of the rims, half have none
        hair=rng.random(),
        skin=rng.random(),
        background=rng.random(),
        tilt=rng.uniform(-12, 12),
    )  # degrees; all five are the face's own
    return person | dict(
        pitch=rng.normal(0, 0.04),
        loudness=rng.uniform(0.1, 0.7),
        tempo=rng.uniform(4, 6),
    )  # the voice's own; syllables per s


def levels(person, side=""):
    """Age, tract and build as evenly spread numbers in 0 ... 1, of the face, or side="voice_"."""
    return [0.5 + 0.5 * math.erf(person[side + name] / math.sqrt(2)) for name in LINKED]


def synth_speech(person, rng):
    """A clip of speech, int16 (samples,): pulses of the throat through a mouth's resonances.
    Gender sets the pitch. With age it falls and breath joins; a long tract resonates lower; a
    sturdy build adds bass. Vowels change with the syllables, one in seven of which is a pause."""
    n, (age, tract, build) = CLIP_SECONDS * RATE, levels(person, "voice_")
    count, t = (
        int(2 * CLIP_SECONDS * person["tempo"]),
        np.arange(n) / RATE,
    )  # syllables; s
    starts = (
        np.cumsum(rng.uniform(0.7, 1.3, count)) / person["tempo"]
    )  # of the syllables, s
    part = np.interp(
        t, starts, np.arange(count)
    )  # (n,) 1.5: amid syllable 1; 0: not yet begun
    syllable, tune = part.astype(int), np.interp(t, starts, rng.normal(size=count))
    stress = np.where(rng.random(count) < 1 / 7, 0, rng.uniform(0.5, 1, count))
    swell = stress[syllable] * np.sin(np.pi * part) ** 2  # 0 between syllables
    f0 = (115 if person["gender"] else 220) * np.exp(
        person["pitch"] - 0.3 * age + 0.1 * tune
    )  # Hz
    pulses = np.diff(np.floor(np.cumsum(f0) / RATE), prepend=0) / np.sqrt(
        f0
    )  # of equal power
    breath = (0.04 + 0.5 * age) * np.diff(
        rng.normal(size=n), prepend=0
    )  # mostly high frequencies
    f = np.fft.rfftfreq(n, 1 / RATE)  # (n/2+1,) in Hz
    spectrum = np.fft.rfft(pulses) * f / (f + 200) / (1 + 1j * f / 700)  # lips, throat
    spectrum *= np.exp(
        4 * (build - 0.5) / (1 + (f / 400) ** 4)
    )  # up to 17 dB more or less bass
    said, speech = (
        rng.integers(len(VOWELS), size=count)[syllable],
        np.zeros(n),
    )  # (n,), (n,)
    vowels = (
        (VOWELS + 2 * VOWELS.mean(0)) / 3 * (1.35 - 0.7 * tract)
    )  # fluent: near their mean
    rest = 80j * f - f**2  # a resonance at r, 80 Hz wide, is r^2 / (r^2 - f^2 + 80j f)
    for vowel, formants in enumerate(vowels):
        mouth = np.prod(formants**2) / math.prod(r2 + rest for r2 in formants**2)
        speech += (said == vowel) * np.fft.irfft(spectrum * mouth, n)
    speech = swell * (speech / speech.std() + breath)
    return np.int16(32767 * person["loudness"] * speech / np.abs(speech).max())


def level(x):
    return 0.5 + 0.5 * math.erf(x / math.sqrt(2))


def mix(colors, t):
    places = np.linspace(0, 1, len(colors))
    return tuple(int(np.interp(t, places, channel)) for channel in zip(*colors))


def draw_face(person, mouth):
    male = person["gender"]
    age = level(person["age"])
    tract = level(person["tract"])
    build = level(person["build"])
    skin = mix(SKIN, person["skin"])
    background = mix(BACKGROUND, person["background"])
    hair = mix([mix(HAIR, person["hair"]), GREY], 0.6 * age**2)
    shade = mix([skin, INK], 0.2)
    crease = mix([skin, INK], 0.5 * age)
    lips = mix([skin, LIPS], 0.4 if male else 0.9)
    width = 0.62 - 0.28 * tract
    length = 0.46 + 0.24 * tract
    eye = 0.13 - 0.06 * age
    rim = 0.16 + 0.05 * person["glasses"]
    lip_y = 0.22 + 0.19 * tract
    parts = [
        (CLOTHES, 0, 1.3, 0.4 + 0.7 * build, 0.64),
        (shade, 0, 0.5, 0.11 + 0.24 * build, 0.36),
        (hair, 0, -0.15, width + 0.07, length),
        (skin, 0, 0.1 - 0.14 * age, width, length),
        (crease, 0, -0.38, 0.05 + 0.25 * age, 0.01 + 0.01 * age),
        (crease, 0, -0.31, 0.05 + 0.2 * age, 0.01 + 0.01 * age),
        (shade, 0, 0.06 + 0.12 * tract, 0.07, 0.06),
        (lips, 0, lip_y, 0.2, 0.07 + 0.06 * mouth),
        (skin, 0, lip_y - 0.05, 0.22, 0.06),
    ]
    if not male:
        parts.insert(0, (mix([hair, INK], 0.2), 0, 0.08, width + 0.2, 0.72))
    for x in (-0.21, 0.21):
        parts += [
            (crease, 1.1 * x, 0.07, 0.12, 0.05),
            (skin, 1.1 * x, 0.05, 0.12, 0.05),
        ]
        if person["glasses"]:
            parts += [(INK, x, -0.1, rim, rim), (skin, x, -0.1, 0.145, 0.145)]
        parts += [
            (WHITE, x, -0.1, 0.115, eye),
            (INK, x, -0.1, 0.075, min(0.09, eye)),
            (mix([hair, INK], 0.4), x, -0.29, 0.13, 0.04 if male else 0.025),
        ]
    scale = SIDE * OVERSAMPLE / 2
    image = Image.new("RGB", (int(2 * scale), int(2.5 * scale)), background)
    draw = ImageDraw.Draw(image)
    for color, x, y, rx, ry in parts:
        box = np.array([x - rx, y - ry, x + rx, y + ry])
        draw.ellipse([*(scale * (box + 1))], fill=color)
    image = image.rotate(
        person["tilt"],
        Image.Resampling.BILINEAR,
        center=(scale, 1.8 * scale),
        fillcolor=background,
    )
    return image.crop((0, 0, int(2 * scale), int(2 * scale))).reduce(OVERSAMPLE)


def write_person(data, seed, i, split):
    """Write the clip of person i of a seed; returns their row of labels.csv."""
    rng, name = np.random.default_rng([seed, i]), f"id{i:05}"
    person, folder = sample_person(rng), make_folder(Path(data, split, name, "clip"))
    speech = synth_speech(person, rng)
    with wave.open(str(folder / "speech.wav"), "wb") as f:
        f.setparams((1, 2, RATE, 0, "NONE", ""))  # one channel of 2 bytes
        f.writeframes(speech.tobytes())
    for moment in rng.choice(1000 * CLIP_SECONDS, FRAMES, replace=False):  # ms
        face = draw_face(person, rng.random())
        face.save(folder / f"{moment}.jpg", quality=92)
    return {"identity": name, "split": split} | {
        key: round(x, 4) for key, x in person.items()
    }


def make_data(args):
    """Write the synthetic corpus, equal for equal seeds; the folder is there once it is whole."""
    data, people = Path(args.inputs), args.identities
    if data.exists():
        raise UserError(f"{data}: exists already; make-data fills a new folder only")
    val, test = (max(10, round(share * people)) for share in (0.06, 0.14))
    splits = ["train"] * (people - val - test) + ["val"] * val + ["test"] * test
    with (
        tempfile.TemporaryDirectory(dir=make_folder(data.parent)) as scratch,
        ProcessPoolExecutor(min(16, os.cpu_count())) as pool,
    ):
        part = Path(scratch, data.name)
        rows = [
            *pool.map(
                functools.partial(write_person, part, args.seed), range(people), splits
            )
        ]
        lines = [
            ",".join(map(str, row))
            for row in (rows[0], *(row.values() for row in rows))
        ]
        (part / "labels.csv").write_text("\n".join(lines) + "\n", encoding="utf8")
        part.rename(data)
    print(f"{data}: {people} identities")


# ==== 8. Plumbing: device, processes and precision; a run's checkpoint, --resume, log =============
MAY_CHANGE = {
    "out",
    "device",
    "workers",
    "log_every",
    "save_every",
    "resume",
}  # on --resume


class Machine:
    """What a command computes on; device, processes and precision are decided here alone.
    Under torchrun each process has its own GPU, batches and negatives; the first tests and writes.
    On a GPU that has bfloat16, layers compute in it [ours]; weights, R1, R2 stay float32."""

    def __init__(self, name):
        told, native = (
            os.environ if distributed.is_torchelastic_launched() else {},
            False,
        )
        self.rank, self.count = int(told.get("RANK", 0)), int(told.get("WORLD_SIZE", 1))
        name = (
            ("cuda" if torch.cuda.is_available() else "cpu") if name == "auto" else name
        )
        name = f"cuda:{told['LOCAL_RANK']}" if name == "cuda" and told else name
        with as_user_error(f"--device {name}: not here, use cpu or auto"):
            self.device = torch.zeros(1, device=name).device
        if self.device.type == "cuda":
            torch.cuda.set_device(self.device)
            torch.backends.cudnn.benchmark = (
                True  # batches have one shape: try all algorithms
            )
            native = torch.cuda.is_bf16_supported(including_emulation=False)
        self.autocast = torch.autocast(self.device.type, torch.bfloat16, enabled=native)
        if self.count > 1:  # others wait while the first process tests
            distributed.init_process_group(timeout=datetime.timedelta(days=1))

    def wrap(self, module):
        """The module to train with: under torchrun one that averages gradients."""
        return nn.parallel.DistributedDataParallel(module) if self.count > 1 else module


class Run:
    """A training in cfg.out: where it stands, its random numbers, log and checkpoints."""

    def __init__(self, cfg, machine):
        self.cfg, self.machine, self.folder = cfg, machine, make_folder(cfg.out)
        self.sums, self.count, self.since, self.faults = Counter(), 0, time.time(), 0
        self.last = self.folder / "last.pt"
        if self.last.exists() and not cfg.resume:
            raise UserError(
                f"--out {cfg.out}: holds a run; name another folder, or --resume it"
            )
        self.saved = (
            load_checkpoint(self.last, type(cfg), "cpu") if self.last.exists() else {}
        )
        self.step, now = self.saved.get("step", 0), asdict(cfg)
        other = [
            f"{flag(name)} {x}, not {now.get(name)}"
            for name, x in self.saved.get("settings", {}).items()
            if name not in MAY_CHANGE and x != now.get(name)
        ]
        if other:
            raise UserError(f"--resume: the run in {cfg.out} has {', '.join(other)}")

    def batches(self, pairs):
        """(rng, speech, faces) of each step to come; rng is torch's, every process has its own."""
        count = self.machine.count
        mine = range(
            self.step * count + self.machine.rank, self.cfg.steps * count, count
        )
        batches = load_batches(pairs, mine, self.cfg.workers, self.machine.device)
        for number, (speech, faces, _, faults) in zip(mine, batches):
            seed = np.random.SeedSequence([self.cfg.seed, number]).generate_state(1)
            self.step, self.faults = self.step + 1, self.faults + len(faults)
            yield torch.Generator().manual_seed(int(seed[0])), speech, faces

    def due(self, every):
        """Whether the first process shall do what is done `every` so many steps and at the end."""
        return self.machine.rank == 0 and (
            self.step % every == 0 or self.step == self.cfg.steps
        )

    def log(self, **values):
        """Count a step; each --log-every print the means and add them to log.jsonl."""
        self.count += 1
        self.sums.update(
            {name: x.detach() for name, x in values.items()}
        )  # stay on the device
        if not self.due(self.cfg.log_every):
            return
        rate = self.count / (
            time.time() - self.since
        )  # steps per s, validation included
        means = {name: round(x.item() / self.count, 4) for name, x in self.sums.items()}
        clips = round(
            rate * self.cfg.batch * self.machine.count, 1
        )  # of all processes, per s
        line = {"step": self.step, **means, "clips_per_s": clips, "faults": self.faults}
        with open(self.folder / "log.jsonl", "a", encoding="utf8") as f:
            f.write(json.dumps(line) + "\n")
        left = (self.cfg.steps - self.step) / rate  # s
        print(
            *(f"{name} {x:g} " for name, x in line.items()),
            f"{left:.0f} s left",
            flush=True,
        )
        self.sums, self.count, self.since = Counter(), 0, time.time()

    def save(self, name, parts, **more):
        """Write states, settings, step beside the file, then rename: it is whole at any time."""
        path = self.folder / name
        modules = [part for part in parts.values() if isinstance(part, nn.Module)]
        if not all(
            p.isfinite().all() for module in modules for p in module.parameters()
        ):
            raise UserError(
                f"step {self.step}: weights are NaN, the run diverged; try a lower "
                f"--lr; {path}, if there, is from before"
            )
        state = {name: part.state_dict() for name, part in parts.items()} | more
        state |= dict(
            kind=type(self.cfg).__name__, settings=asdict(self.cfg), step=self.step
        )
        content = io.BytesIO()
        torch.save(state, content)
        with as_user_error(
            f"{path}: cannot be written; the one before is whole: --resume it"
        ):
            Path(f"{path}.part").write_bytes(content.getbuffer())
            os.replace(f"{path}.part", path)


def make_folder(path):
    """The folder `path`, created."""
    Path(path).mkdir(parents=True, exist_ok=True)
    return Path(path)


def load_checkpoint(path, kind, device):
    """The dict that a training with settings of this kind saved."""
    with as_user_error(
        f"{path}: no checkpoint, or damaged; match-train and gan-train write them"
    ):
        state = torch.load(path, map_location=device, weights_only=True)  # runs no code
        found = state["kind"]
    if found != kind.__name__:
        raise UserError(
            f"{path}: of the other training, {found}; {kind.__name__} is needed"
        )
    return state


def restore(parts, state, path):
    """Load into parts what the checkpoint at path, read as state, holds of them."""
    with as_user_error(f"{path}: of another version of this file, train anew"):
        for name in parts.keys() & state.keys():
            parts[name].load_state_dict(state[name])


def load_model(path, kind, machine):
    """The Model of a training with settings of this kind."""
    state = load_checkpoint(path, kind, machine.device)
    with as_user_error(f"{path}: of another version of this file, train anew"):
        match = MatchSettings(**state.get("match", state["settings"]))
        gan = GanSettings(**state["settings"]) if kind is GanSettings else None
        g_ema = Generator(match.size, gan.width) if gan else nn.Identity()
        g_ema.to(machine.device, memory_format=channels_last)
        speech_encoder, face_encoder = make_encoders(match, machine.device)
    restore(dict(speech=speech_encoder, face=face_encoder, g_ema=g_ema), state, path)
    return Model(match, speech_encoder.eval(), face_encoder.eval(), gan, g_ema)


# ==== 9. Command line: the flags of a training are its settings ===================================
TRAININGS = {match_train: MatchSettings, gan_train: GanSettings}


def flag(name):
    """A setting's name on the command line."""
    return "-n" if name == "n" else f"--{name.replace('_', '-')}"


def make_parser():
    """The parser: a subcommand for each function, with what it takes and its settings."""
    parser = argparse.ArgumentParser(
        prog="voice2face.py",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    match, gan = ({f.name: f for f in fields(kind)} for kind in TRAININGS.values())
    test = {name: gan[name] for name in ("data", "seed", "device", "workers", "runs")}
    drawn = dict(gan=setting("runs/gan/last.pt", "checkpoint of gan-train"))
    for function, what, settings in (
        (match_train, "", match),
        (gan_train, "", gan),
        (
            match_test,
            "",
            test
            | dict(
                match=gan["match"],
                out=setting("runs/match-test", "folder for metrics.json"),
                split=setting("test", "part of the corpus", choices=SPLITS),
            ),
        ),
        (
            gan_test,
            "",
            test
            | drawn
            | dict(
                out=setting(
                    "runs/gan/report", "folder for report.md, pictures, metrics.json"
                )
            ),
        ),
        (
            generate,
            "SPEECH",
            drawn
            | dict(
                n=setting(8, "faces per recording", low=1, high=1000),
                seed=gan["seed"],
                device=gan["device"],
                out=setting(
                    "faces.png",
                    "NAME.png: a "
                    "labelled picture, one z a column; else a folder: a PNG per face, each of its z",
                ),
            ),
        ),
        (
            make_data,
            "DIR",
            dict(
                seed=gan["seed"],
                identities=setting(
                    IDENTITIES, "people: 80 % train, 6 % val, 14 % test", low=30
                ),
            ),
        ),
        (
            check_data,
            "DIR",
            dict(k=setting(10, "identities that each split needs", low=2)),
        ),
    ):
        text, kind = function.__doc__.splitlines()[0], TRAININGS.get(function)
        sub = commands.add_parser(
            function.__name__.replace("_", "-"), help=text, description=text
        )
        sub.set_defaults(run=function, flags=settings)
        if what:
            sub.add_argument(
                "inputs", metavar=what, nargs="+" if what == "SPEECH" else None
            )
        for key, f in settings.items():
            paper = f", paper: {PAPER[kind][key]}" if key in PAPER.get(kind, ()) else ""
            text = f"{f.metadata['help']} (default: {f.default}{paper})".replace(
                "%", "%%"
            )
            how = dict(type=type(f.default), choices=f.metadata["choices"])
            sub.add_argument(
                flag(key),
                default=argparse.SUPPRESS if kind else f.default,
                help=text,
                **(dict(action="store_true") if f.default is False else how),
            )
    return parser


def make_settings(args):
    """args, checked; of a training its settings, the preset's where no flag is given."""
    given = {name: x for name, x in vars(args).items() if name in args.flags}
    for name, value in given.items():
        low, high = args.flags[name].metadata["low"], args.flags[name].metadata["high"]
        if low is not None and not low <= value <= high:  # NaN is refused, too
            raise UserError(
                f"{flag(name)} {value}: must be at least {low}, at most {high}"
            )
    if args.run not in TRAININGS:
        return args
    kind = TRAININGS[args.run]
    cfg = kind(**(PAPER[kind] if given.get("preset") == "paper" else {}) | given)
    if kind is MatchSettings and cfg.batch < cfg.k:
        raise UserError(f"--batch {cfg.batch}: must be at least --k {cfg.k}")
    return cfg


def main(argv=None):
    """Run one command; its exit code: 0, 1 faulty corpus, 2 reported error, 130 Ctrl-C."""
    args, code = make_parser().parse_args(argv), 2
    if distributed.is_torchelastic_launched() and os.environ["RANK"] != "0":
        sys.stdout = open(os.devnull, "w")  # the first process speaks
    try:
        return int(args.run(make_settings(args)) or 0)
    except UserError as e:
        error = e
    except OSError as e:
        error = f"{e.filename or 'file'}: {e.strerror or e}"
    except (MemoryError, RuntimeError) as e:
        if not any(
            text in repr(e) for text in ("MemoryError", "allocate memory")
        ):  # torch, CPU
            raise
        error = "out of memory, try less at once: smaller sizes, fewer clips or faces"
    except KeyboardInterrupt:
        error, code = "stopped; --resume goes on with a training", 130
    print(f"voice2face: error: {error}", file=sys.stderr)
    return code


if __name__ == "__main__":
    sys.stdout.reconfigure(
        errors="backslashreplace"
    )  # for consoles without, say, Cyrillic
    exit_code = main()
    sys.stdout.flush()
    if distributed.is_initialized():
        os._exit(
            exit_code
        )  # gloo's threads abort the usual way out once in twenty times
    sys.exit(exit_code)
