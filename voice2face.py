# /// script
# requires-python = ">=3.10"
# dependencies = ["torch==2.11.0", "torchaudio==2.11.0", "numpy", "pillow>=10.4"]
# ///
"""voice2face: learn which face belongs to a voice, without a label, and generate faces.

A reference implementation, in one file, of "From Inference to Generation: End-to-end
Fully Self-supervised Generation of Human Face from Speech" (Choi, Park and Lee, ICLR
2020).

The idea
    A speech encoder S reads the raw waveform and a face encoder F reads an image; both
    give an embedding in one space. Speech and face of one clip must match better than
    those of different clips: this is the only supervision. Then a generator G makes a
    face from c = S(s), what the voice tells, and noise z, what it does not tell. The
    discriminator D starts from F, so it knows from its first step who fits whom.

The file
    1 Inference, 2 Generation and 3 Training are the method, in the paper's order.
    4 Evaluation, 5 Figures and reports, 6 Data, 7 Synthetic people (the default
    corpus), 8 Plumbing and 9 Command line serve it. Section 3 uses from them
    `validate` (4), `report` and `plot_figures` (5), `load_model`, `distribute` and
    `Run` (8), which holds device, corpus, batches, log and checkpoints.

Symbols
    paper   here                  shape         meaning
    s       speech                (B, T)        waveforms, 16 kHz, in [-1, 1]
    f       faces, real, fake     (B, 3, H, W)  images, RGB, in [-1, 1]
            speech_emb, face_emb  (B, D)        embeddings S(speech), F(faces)
    c, fe   c, fe                 (N, D)        in tests; c is also the condition of G
    c+, c-  c_pos, c_neg          (B, D)        c of the face's own voice, of another
    z       z                     (B, D)        Gaussian noise
    phi     phi                   (B, D)        face embeddings by D's copy of F
    psi     psi                   (B,)          how real a face looks, for any voice
    V-F     "v-f"                               pick a face for a voice; F-V: reverse

    Dimensions: B batch, K candidates (1 positive, K - 1 negatives), T samples,
    L frames, C channels, H W height and width, M filter taps, D = 128 embedding,
    N identities of a test, n rows of any number, R faces of a gallery, P people,
    E factors, V voices, Z noises per voice, X pixels of a probe. In code F is also
    torch.nn.functional.

Sources
    The method's numbers name their source: [paper §x]; [PASE] Pascual et al. 2019;
    [SincNet] Ravanelli and Bengio 2018; [SNGAN] Miyato and Koyama 2018; [StyleGAN] and
    [StyleGAN2] Karras et al. 2019, 2020; [R1] Mescheder et al. 2018; or [ours].

Where this differs from the paper most (the rest is tagged [ours] where it stands; the
README has the edits that undo most of them, and their measured effects)
    - Our text of the paper lacks its appendices, the numbers of Tables 1 to 3, and
      Eq. 1 and 3 to 6: sizes come from the cited sources, the losses from the prose.
    - The preset `small`, for two CPU cores: 1.5 s of speech in training (6 s in tests,
      where shorter speech is repeated), 64x64 pixels, a sinc layer of stride 8, fewer
      channels, synthetic people. `paper` has the sizes of the paper and its sources.
    - Embeddings are L2-normalised to length 3.5, so Eq. 1 is a softmax of cosines with
      temperature 0.08. Without it F-V, which is not trained, is worse.
    - Waveforms get zero mean and rms 1: offset and loudness are the microphone's.
    - A batch has one random recording of each of B random identities; without identity
      labels each clip counts as one. A clip's negatives are other clips of its batch
      (and process), so each clip is encoded once.
    - G's input and its AdaIN style are both [z, c], with c scaled to length 1: with a
      longer c, z stops controlling the head's tilt.
    - psi reads F's pooled features, not phi(f), and the std of each over the batch.
    - F has no spectral norm, unlike [SNGAN]: with it, z stops controlling the glasses.
    - S is frozen in stage two, its batch norm, too. D's and G's steps share their z.
    - Runs of a test draw windows, images and z anew, not the negatives alone. Speech
      near an image's time is left out only where the file's name tells the time.
    - Oracle, ideal faces and probe are [ours]. Table 2's other methods are not here.
"""

import argparse
import contextlib
import copy
import csv
import datetime
import functools
import glob
import itertools
import json
import math
import os
import re
import sys
import tempfile
import time
import wave
from collections import Counter, defaultdict, namedtuple
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from statistics import NormalDist

import numpy as np
import torch
import torchaudio
from PIL import Image, ImageColor, ImageDraw, ImageOps
from torch import distributed, nn
from torch.nn import functional as F
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

SAMPLE_RATE = 16000  # samples per second of every waveform [PASE]
EMBED_DIM = 128  # D [paper §3.2]
RANK = int(os.environ.get("RANK") or 0)  # of this process, set by torchrun
WORLD_SIZE = int(os.environ.get("WORLD_SIZE") or 1)  # processes, set by torchrun
SILENCE = 1e-4  # std of samples in [-1, 1] that counts as silence [ours]


class UserError(ValueError):
    """A mistake that the user can fix: reported in one line, with exit code 2."""


@contextlib.contextmanager
def explain(problem):
    """Turn an exception inside into a UserError: the problem, then the exception."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        reason = " ".join(str(error).split())  # in one line
        raise UserError(f"{problem}: {type(error).__name__} {reason}") from error


def make_rng(seed):
    """A random generator on the CPU: its numbers are the same for every device."""
    return torch.Generator().manual_seed(seed)


# ==== 1. Inference: two encoders and the K-way loss [paper §3.1] ======================

# The 7 layers after the sinc layer [PASE]: a frame for 160 outputs of that layer.
PASE_KERNELS = (20, 11, 11, 11, 11, 11, 11)
PASE_STRIDES = (10, 2, 1, 2, 1, 2, 2)
PASE_WIDTHS = (1, 2, 2, 4, 4, 8, 8)  # channels / width
MIN_HZ = 50  # lowest cut-off and narrowest band of a sinc filter [SincNet]
HZ_UNIT = 100  # cut-offs are learned in units of 100 Hz [ours]


class SincConv(nn.Module):
    """Band-pass filters; only their two cut-off frequencies are learned [SincNet].

    (B, 1, T) -> (B, C, L) with L = ceil(T / stride), after reflection padding. A filter
    is the difference of two ideal low-pass filters,

        g(t) = 2 high sinc(2 high t) - 2 low sinc(2 low t)

    with sinc(x) = sin(pi x) / (pi x), times a Hamming window, divided by 2 (high - low)
    so that its centre is 1. The cut-offs start about evenly spaced on the mel scale.
    kernel_size is odd, so that there is a centre.
    """

    def __init__(self, channels, kernel_size=251, stride=1):  # 251: [SincNet]
        super().__init__()
        self.padding = kernel_size // 2
        self.stride = stride
        edges = np.array([30, SAMPLE_RATE / 2 - 2 * MIN_HZ])  # Hz [SincNet]
        lowest, highest = 2595 * np.log10(1 + edges / 700)  # the mel scale
        mel = torch.linspace(lowest, highest, channels + 1)  # (C+1,)
        hz = 700 * (10 ** (mel / 2595) - 1)  # (C+1,), back from mel
        # filters() adds MIN_HZ to low and to band: the start is only about even in mel.
        self.low = nn.Parameter(hz[:-1, None] / HZ_UNIT)  # (C, 1)
        self.band = nn.Parameter(hz.diff()[:, None] / HZ_UNIT)  # (C, 1)
        taps = torch.arange(kernel_size) - kernel_size // 2  # (M,)
        window = torch.hamming_window(kernel_size, periodic=False)  # (M,)
        self.register_buffer("times", taps / SAMPLE_RATE, persistent=False)  # s
        self.register_buffer("window", window, persistent=False)

    def filters(self):
        """The impulse responses, (C, M)."""
        nyquist = SAMPLE_RATE / 2
        low = MIN_HZ + HZ_UNIT * self.low.abs()  # (C, 1), Hz
        low = low.clamp(max=nyquist - MIN_HZ)  # leaves room for a band
        high = low + MIN_HZ + HZ_UNIT * self.band.abs()  # (C, 1), Hz
        high = high.clamp(max=nyquist)
        wide = 2 * high * torch.sinc(2 * high * self.times)  # (C, M); sinc(0) is 1
        narrow = 2 * low * torch.sinc(2 * low * self.times)  # (C, M)
        return (wide - narrow) * self.window / (2 * (high - low))  # (C, M)

    def forward(self, x):
        x = F.pad(x, (self.padding, self.padding), mode="reflect")
        return F.conv1d(x, self.filters()[:, None], stride=self.stride)  # (B, C, L)


def l2_normalize(x, scale):
    """(B, D) -> scale x / |x|, so inner products are scale^2 cos(angle) [ours]."""
    return scale * F.normalize(x, dim=1)


class SpeechEncoder(nn.Module):
    """S: waveforms (B, T) -> embeddings (B, D). PASE's encoder, mean, linear map.

    The sinc layer and 7 stacks of convolution [paper §3.1], each with batch norm and a
    PReLU of one slope per channel; reflection padding [PASE], equal on both sides. The
    mean over time and the linear map are [ours]. [PASE] has width 64 and sinc_stride 1.
    """

    def __init__(self, width=64, sinc_stride=1, scale=1.0):
        super().__init__()
        self.scale = scale
        sinc = SincConv(width, stride=sinc_stride)
        layers = [sinc, nn.BatchNorm1d(width), nn.PReLU(width, init=0.0)]  # [PASE]
        channels = width
        for kernel, stride, multiple in zip(PASE_KERNELS, PASE_STRIDES, PASE_WIDTHS):
            out = multiple * width
            layers += [
                nn.ReflectionPad1d((kernel - 1) // 2),
                nn.Conv1d(channels, out, kernel, stride, bias=False),
                nn.BatchNorm1d(out),
                nn.PReLU(out, init=0.0),  # [PASE]
            ]
            channels = out
        self.body = nn.Sequential(*layers)
        self.head = nn.Linear(channels, EMBED_DIM)

    def forward(self, speech):
        offset = speech.mean(1, keepdim=True)  # (B, 1), the microphone's DC offset
        x = speech - offset  # (B, T)
        loudness = x.square().mean(1, keepdim=True).sqrt()  # (B, 1)
        x = x / (loudness + SILENCE)  # SILENCE avoids 0/0
        x = self.body(x[:, None])  # (B, 1, T) -> (B, C, L)
        return l2_normalize(self.head(x.mean(2)), self.scale)  # (B, C) -> (B, D)


class DBlock(nn.Module):
    """Residual block of [SNGAN]'s discriminator: (B, C, H, W) -> (B, C', H/2, W/2).

    With down=False the block keeps C, H and W.
    """

    def __init__(self, channels, out, first=False, down=True):
        super().__init__()
        self.first = first
        self.down = down
        hidden = out if first else channels  # [SNGAN]
        self.conv1 = nn.Conv2d(channels, hidden, 3, padding=1)
        self.conv2 = nn.Conv2d(hidden, out, 3, padding=1)
        self.skip = nn.Conv2d(channels, out, 1) if down else nn.Identity()  # [SNGAN]

    def forward(self, x):
        h = x if self.first else F.relu(x)  # the first block sees pixels, not features
        h = self.conv2(F.relu(self.conv1(h)))  # (B, C', H, W)
        if self.down:
            h = F.avg_pool2d(h, 2)  # (B, C', H/2, W/2)
            x = F.avg_pool2d(x, 2)  # (B, C, H/2, W/2); commutes with the 1x1 conv
        return h + self.skip(x)


class FaceEncoder(nn.Module):
    """F: faces (B, 3, H, W) -> embeddings (B, D). The body of [SNGAN]'s discriminator.

    Blocks halve the side down to 4 and double the channels; one more block keeps both.
    Then come a ReLU, a sum over the 4x4 positions [SNGAN], and a linear map [ours].
    As in [SNGAN] there is no batch norm. [SNGAN] has size 128 and width 64.
    """

    def __init__(self, size=128, width=64, scale=1.0):
        super().__init__()
        self.scale = scale
        self.blocks = nn.Sequential(DBlock(3, width, first=True))
        channels = width
        for _ in range(int(math.log2(size)) - 3):  # from H/2 down to 4
            self.blocks.append(DBlock(channels, 2 * channels))
            channels = 2 * channels
        self.blocks.append(DBlock(channels, channels, down=False))
        self.head = nn.Linear(channels, EMBED_DIM)
        self.apply(init_conv)
        self.to(memory_format=torch.channels_last)  # 1.4 times as fast on a CPU

    def features(self, faces):
        """(B, 3, H, W) -> (B, C), what the linear map and psi read."""
        return F.relu(self.blocks(faces)).sum((2, 3))  # (B, C, 4, 4) -> (B, C)

    def embed(self, faces):
        """(B, 3, H, W) -> (B, D), before L2 normalisation."""
        return self.head(self.features(faces))  # (B, C) -> (B, D)

    def forward(self, faces):
        return l2_normalize(self.embed(faces), self.scale)


def init_conv(module):
    """Glorot-uniform convolutions, with gain sqrt(2) if 3x3 [SNGAN].

    Linear layers keep PyTorch's default initialisation [ours].
    """
    if isinstance(module, nn.Conv2d):
        gain = math.sqrt(2) if module.kernel_size == (3, 3) else 1
        nn.init.xavier_uniform_(module.weight, gain)
        nn.init.zeros_(module.bias)


def sample_candidates(n, k, rng=None):
    """Row numbers (n, K) of each row's candidates: itself, then K - 1 random others.

    All rows stand in a circle, in random order; a row's negatives are the K - 1 rows
    after it. So they differ, and every row is a negative equally often [ours]. Rows are
    clips of different identities [paper §4]. Raises UserError if there are fewer than K
    rows.
    """
    if n < k:
        raise UserError(f"K = {k} needs {k} identities at once, there are {n}")
    order = torch.randperm(n, generator=rng)  # (n,), the row at each place
    place = order.argsort()  # (n,), the place of each row: the inverse
    ahead = torch.arange(k)  # (K,); 0 is the row itself
    return order[(place[:, None] + ahead) % n]  # (n, 1) + (K,) -> (n, K)


def match_logits(speech_emb, face_emb, candidates, direction):
    """Inner products (B, K) of embeddings (B, D), of each row with its K candidates.

    For "v-f" these are <S(s), F(f_j)>, for "f-v" the roles are swapped. Column 0 is the
    positive.
    """
    if direction == "v-f":
        query, keys = speech_emb, face_emb
    else:
        query, keys = face_emb, speech_emb
    return torch.einsum("bd,bkd->bk", query, keys[candidates])  # (B, D), (B, K, D)


def match_loss(logits):
    """Eq. 1: cross-entropy of p(f_j | s) = softmax_j <S(s), F(f_j)>, label 0; -> ()."""
    positive = torch.zeros(len(logits), dtype=torch.long, device=logits.device)  # (B,)
    return F.cross_entropy(logits, positive)


def top1(logits):
    """(B, K) -> (B,): 1 where column 0 is the largest; m equally large get 1/m.

    So an encoder that always gives the same answer scores chance, not 100 %.
    """
    best = logits == logits.max(1, keepdim=True).values  # (B, K)
    return best[:, 0] / best.sum(1).clamp(min=1)  # a row with NaN has no best: 0


# ==== 2. Generation: AdaIN generator, projection discriminator, losses [paper §3.2] ===


class AdaIN(nn.Module):
    """The style (B, 2D) sets mean and std of each channel of x (B, C, H, W) [StyleGAN].

        AdaIN(x, y) = (1 + scale(y)) (x - mean(x)) / std(x) + shift(y)

    mean and std are over H and W; scale and shift are linear in the style y = [z, c].
    The style holds z as well as c [ours], so that z can set colours in every layer.
    """

    def __init__(self, channels):
        super().__init__()
        self.style = nn.Linear(2 * EMBED_DIM, 2 * channels)

    def forward(self, x, style):
        style = self.style(style)[:, :, None, None]  # (B, 2D) -> (B, 2C, 1, 1)
        scale, shift = style.chunk(2, dim=1)  # (B, C, 1, 1) each
        # By sums: F.instance_norm would make a step of gan-train 8 % slower on a CPU.
        area = x.shape[2] * x.shape[3]
        x = x - x.sum((2, 3), keepdim=True) / area  # (B, C, H, W)
        var = (x * x).sum((2, 3), keepdim=True) / area  # (B, C, 1, 1)
        return (1 + scale) * torch.rsqrt(var + 1e-5) * x + shift  # 1e-5: PyTorch's


class GBlock(nn.Module):
    """Residual block of [SNGAN]'s generator: (B, C, H, W) -> (B, C', 2H, 2W).

    AdaIN stands where [SNGAN] has batch norm. [SNGAN] up-samples first; here conv1 and
    skip run before it, on a quarter of the pixels [ours]; it is bilinear [StyleGAN].
    """

    def __init__(self, channels, out):
        super().__init__()
        self.norm1 = AdaIN(channels)
        self.norm2 = AdaIN(out)
        self.conv1 = nn.Conv2d(channels, out, 3, padding=1)
        self.conv2 = nn.Conv2d(out, out, 3, padding=1)
        self.skip = nn.Conv2d(channels, out, 1)

    def forward(self, x, style):
        h = self.conv1(F.relu(self.norm1(x, style)))  # (B, C, H, W) -> (B, C', H, W)
        h = upsample(h)  # (B, C', 2H, 2W)
        h = self.conv2(F.relu(self.norm2(h, style)))
        return h + upsample(self.skip(x))


def upsample(x):
    """(B, C, H, W) -> (B, C, 2H, 2W)."""
    return F.interpolate(x, scale_factor=2, mode="bilinear")


class Generator(nn.Module):
    """G: z (B, D) and c (B, D) -> faces (B, 3, H, W) in [-1, 1].

    A linear map of [z, c] to 4x4 positions, blocks that double the side, tanh [SNGAN];
    AdaIN in each layer [paper §3.2]. [SNGAN] has size 128 and width 64. c is scaled to
    length 1 [ours].
    """

    def __init__(self, size=128, width=64):
        super().__init__()
        doublings = int(math.log2(size)) - 2  # from 4x4
        widths = [width * 2**i for i in range(doublings)]  # 64 128 256 512 1024
        widths = [widths[-1], *reversed(widths)]  # 1024 1024 512 256 128 64 [SNGAN]
        self.first = nn.Linear(2 * EMBED_DIM, widths[0] * 4 * 4)
        self.blocks = nn.ModuleList()
        for channels, out in itertools.pairwise(widths):
            self.blocks.append(GBlock(channels, out))
        self.norm = AdaIN(width)
        self.last = nn.Conv2d(width, 3, 3, padding=1)
        self.apply(init_conv)
        nn.init.xavier_uniform_(self.last.weight, 0.3)  # tanh starts unsaturated [ours]
        self.to(memory_format=torch.channels_last)

    def forward(self, z, c):
        style = torch.cat([z, F.normalize(c)], dim=1)  # (B, D), (B, D) -> (B, 2D)
        x = self.first(style).unflatten(1, (-1, 4, 4))  # (B, 2D) -> (B, C, 4, 4)
        x = x.contiguous(memory_format=torch.channels_last)  # as the weights
        for block in self.blocks:
            x = block(x, style)  # (B, C, H, W) -> (B, C', 2H, 2W)
        x = self.last(F.relu(self.norm(x, style)))  # (B, C, H, W) -> (B, 3, H, W)
        return torch.tanh(x)


def sample_z(n, rng, device):
    """Noise z (n, D)."""
    return torch.randn(n, EMBED_DIM, generator=rng).to(device)


class Discriminator(nn.Module):
    """faces (B, 3, H, W) -> weight * phi (B, D) and psi (B,), the parts of Eq. 2.

    phi starts as the trained F and goes on training [paper §3.2]. psi is one linear
    layer on F's features [SNGAN] and on the std of each over the batch [ours];
    StyleGANs average these to one number.
    """

    def __init__(self, face_encoder, weight=1.0):
        super().__init__()
        self.phi = copy.deepcopy(face_encoder)
        self.psi = nn.Linear(2 * face_encoder.head.in_features, 1)
        self.phi_weight = weight

    def forward(self, faces):
        h = self.phi.features(faces)  # (B, 3, H, W) -> (B, C)
        phi = l2_normalize(self.phi.head(h), self.phi.scale)  # (B, C) -> (B, D)
        variance = h.var(0, correction=0)  # (C,)
        std = torch.sqrt(variance + 1e-4)  # (C,); 1e-4 keeps its gradient finite [ours]
        psi = self.psi(torch.cat([h, std.expand_as(h)], dim=1))  # (B, 2C) -> (B, 1)
        return self.phi_weight * phi, psi[:, 0]


def inner(c, phi):
    """<c, phi>: (B, D), (B, D) -> (B,)."""
    return (c * phi).sum(1)


def logit(c, phi, psi):
    """Eq. 2: g(f, c) = <c, phi> + psi, -> (B,).

    Eq. 3 is the same with c = S(s) and a phi that starts as the trained F. The paper's
    psi reads phi(f), ours the pooled features below it [ours].
    """
    return inner(c, phi) + psi


def gan_loss(loss_name, c_pos, c_neg, out_x, out_y):
    """Eq. 6, -E log A(g_rel) with the sigmoid A: D's and G's loss, -> ().

    out_x and out_y are D's outputs, phi (B, D) and psi (B,), for two batches of faces.
    The loss pushes the logits of x above those of y. D calls it with real faces as x,
    G with generated faces as x (non-saturating).

        Eq. 4, "rel":    g_rel = g(x, c+) - g(y, c+)
        Eq. 5, "relid":  g_rel = g(x, c+) - g(y, c+) + <c+, phi(x)> - <c-, phi(x)>

    The terms that Eq. 5 adds keep D asking who fits whom, which phi would forget [paper
    §3.2]. It is our reading that all terms share one sigmoid, and that the added terms
    are of the generated face in G's loss, of the real one in D's.
    """
    phi_x, psi_x = out_x
    phi_y, psi_y = out_y
    g_rel = logit(c_pos, phi_x, psi_x) - logit(c_pos, phi_y, psi_y)  # (B,)
    if loss_name == "relid":
        g_rel = g_rel + inner(c_pos, phi_x) - inner(c_neg, phi_x)  # (B,)
    return -F.logsigmoid(g_rel).mean()


def r1_penalty(discriminator, real, c):
    """R1 without gamma/2: E |grad_f g(f, c)|^2, -> () [R1].

    Row i of the gradient is that of all logits in the batch with respect to face i.
    Those of other faces depend on face i by psi's std over the batch alone. By the last
    weights of the default with seed 1 they make two thirds of the penalty.
    """
    real = real.detach().requires_grad_(True)
    phi, psi = discriminator(real)
    total = logit(c, phi, psi).sum()
    (gradient,) = torch.autograd.grad(total, real, create_graph=True)  # (B, 3, H, W)
    return gradient.square().sum((1, 2, 3)).mean()


# ==== 3. Training both stages [paper §3, §4] ==========================================

# Settings {flag: (default, meaning, *choices)}; choices where they are few.
SYNTHETIC = "data/synthetic"  # made where it is missing
DIRECTIONS = ("v-f", "f-v")
SEED = (0, "seed of the random numbers")
DEVICE = ("auto", "cpu, cuda, cuda:1, ...; auto is cuda where there is one")
TEST_SETTINGS = {
    "--seed": SEED,
    "--device": DEVICE,
    "--data": (SYNTHETIC, "corpus folder; trainings make this one if it is missing"),
    "--workers": (0, "loader processes; 0: this process loads"),
    "--runs": (5, "runs of a test, each with fresh negatives [paper §4]"),
}
RUN_SETTINGS = {
    **TEST_SETTINGS,
    "--preset": ("small", "sizes for two CPU cores, or the paper's", "small", "paper"),
    "--val-clips": (2000, "identities of a validation at most [ours]"),
    "--save-every": (100, "steps between checkpoints"),
    "--log-every": (50, "steps between lines of the log"),
    "--resume": (False, "continue the run in --out, if there is one"),
}
MATCH_SETTINGS = {
    **RUN_SETTINGS,
    "--out": ("runs/match", "run folder: checkpoints, log, metrics"),
    "--direction": ("v-f", "given a voice pick a face, or the reverse", *DIRECTIONS),
    "--k": (10, "candidates of a matching task in training [paper §4]"),
    "--steps": (1200, "training steps [ours]"),
    "--batch": (32, "clips per step and process [ours]"),
    "--seconds": (1.5, "of speech in a training pair [ours]; 6 in [paper §4]"),
    "--size": (64, "side of a face [ours]; 128 in [paper §2]", 32, 64, 128),
    "--sinc-stride": (8, "of the sinc layer [ours]; 1 in [PASE]", 1, 2, 4, 8),
    "--speech-width": (16, "sinc filters, unit of S's widths [ours]; 64 in [PASE]"),
    "--face-width": (16, "F's first channels [ours]; 64 in [SNGAN]"),
    "--embed-scale": (3.5, "length of an embedding [ours]"),
    "--lr": (0.02, "peak learning rate of SGD [ours]"),
    "--eval-every": (400, "steps between validations"),
}
GAN_SETTINGS = {
    **RUN_SETTINGS,
    "--match": ("runs/match/best.pt", "checkpoint of match-train"),
    "--out": ("runs/gan", "run folder: checkpoint, log, samples, metrics"),
    "--loss": ("relid", "relid: Eq. 5; rel: Eq. 4 [paper §3.2]", "relid", "rel"),
    "--steps": (5000, "training steps, each one of D and one of G [ours]"),
    "--batch": (8, "real faces per step and process [ours]"),
    "--width": (16, "G's last channels [ours]; 64 in [SNGAN]"),
    "--weight": (1.0, "factor of phi(f) in D; 1 in [paper §3.2]"),
    "--lr": (2e-3, "learning rate of G's Adam [ours]"),
    "--d-lr": (1e-3, "learning rate of D's Adam [ours]"),
    "--gamma": (0.5, "weight of R1, gamma/2 E |grad_f g(f, c+)|^2 [ours]"),
    "--ema-decay": (0.998, "of the running average of G's weights [ours]"),
    "--eval-every": (1000, "steps between validations and samples"),
}
# The flags of --preset paper: sizes as in the sources above, the rest [ours].
LONG = "--batch 64 --steps 200000 --eval-every 2000 --save-every 1000"
PAPER_SIZES = "--seconds 6 --size 128 --sinc-stride 1 --speech-width 64 --face-width 64"
PAPER_PRESET = {
    "match-train": f"{LONG} {PAPER_SIZES}",
    "gan-train": f"{LONG} --width 64 --lr 2e-4 --d-lr 2e-4 --ema-decay 0.999",
}
MOMENTUM = 0.9  # of SGD [ours]
GRAD_CLIP = 1.0  # match-train cuts longer gradients to this length [ours]
WARM_UP = 0.1  # share of match-train's steps in which the learning rate rises [ours]
BETAS = (0.0, 0.99)  # of Adam [paper §4]; the values: [StyleGAN]
R1_EVERY = 16  # R1 is computed in each 16th step and counts 16 times [StyleGAN2]


class Model(nn.Module):
    """The networks that a checkpoint holds: S and F; after stage two also G.

    cfg holds match-train's settings, width is gan-train's.
    """

    def __init__(self, cfg, device, width=None):
        super().__init__()
        self.cfg = cfg
        self.device = device
        scale = cfg.embed_scale
        self.speech_encoder = SpeechEncoder(cfg.speech_width, cfg.sinc_stride, scale)
        self.face_encoder = FaceEncoder(cfg.size, cfg.face_width, scale)
        self.generator = Generator(cfg.size, width) if width else None
        self.to(device)

    def forward(self, speech, z):
        """Speech (n, T) or (1, T) and z (n, D) -> faces (n, 3, H, W): G(z, S(s))."""
        c = self.speech_encoder(speech)  # (n, D) or (1, D)
        return self.generator(z, c.expand_as(z))


def make_scheduler(optimizer, steps, warm_up=0.0):
    """Learning rate: linear warm-up, constant, from half-way linear to 0 [ours]."""

    def lr_factor(step):
        rise = (step + 1) / max(1, warm_up * steps)
        fall = 2 - 2 * step / steps
        return min(rise, 1, fall)

    return torch.optim.lr_scheduler.LambdaLR(optimizer, lr_factor)


def match_train(cfg):
    """Train S and F on Eq. 1, without labels; test those that validated best [ours]."""
    if not 2 <= cfg.k <= cfg.batch:
        raise UserError(f"--k {cfg.k}: must be at least 2, at most --batch {cfg.batch}")
    if cfg.seconds < 0.25:  # S's reflection padding needs as much
        raise UserError(f"--seconds {cfg.seconds}: must be at least 0.25")
    run = Run(cfg)
    model = Model(cfg, run.device)
    optimizer = torch.optim.SGD(model.parameters(), cfg.lr, MOMENTUM)  # [paper §4]
    scheduler = make_scheduler(optimizer, cfg.steps, WARM_UP)
    parts = {"model": model, "optimizer": optimizer, "scheduler": scheduler}
    state = run.resume(parts)  # {} for a new run
    best = state.get("best", -1.0)
    speech_net = distribute(model.speech_encoder)
    face_net = distribute(model.face_encoder)

    for step, rng, speech, faces in run.batches(cfg):
        candidates = sample_candidates(len(faces), cfg.k, rng)  # (B, K)
        speech_emb = speech_net(speech)  # (B, T) -> (B, D)
        face_emb = face_net(faces)  # (B, 3, H, W) -> (B, D)
        logits = match_logits(speech_emb, face_emb, candidates, cfg.direction)  # (B, K)
        loss = match_loss(logits)  # Eq. 1: (B, K) -> ()
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), GRAD_CLIP)
        optimizer.step()
        scheduler.step()

        run.log(step, loss=loss, accuracy=100 * top1(logits).mean())
        if run.is_due(step, cfg.eval_every):
            metrics = validate(model, {}, run, step, cfg.runs)  # no generators yet
            model.train()
            # 2-way where fewer than 10 people validate
            score = metrics.get(f"{cfg.direction}/10", metrics[f"{cfg.direction}/2"])
            if score > best:
                best = score
                run.save("best.pt", {"model": model}, step)
        if run.is_due(step, cfg.save_every):
            run.save("last.pt", parts, step, best=best)
    if RANK == 0:
        best_model = load_model(run.folder / "best.pt", "match-train", run.device)
        report(best_model, {}, run.corpus["test"], cfg)


def make_adam(network, lr, steps):
    """Adam [paper §4] and the learning-rate schedule for a network."""
    # fused: on a CPU it saves 12 % of a whole step.
    optimizer = torch.optim.Adam(network.parameters(), lr, BETAS, fused=True)
    return optimizer, make_scheduler(optimizer, steps)


def gan_train(cfg):
    """Train G and D [paper §3.2]; test the running average of G's weights [ours]."""
    if cfg.batch < 2:
        raise UserError("--batch 1: must be at least 2, c- needs another identity")
    if cfg.ema_decay > 1:
        raise UserError(f"--ema-decay {cfg.ema_decay}: must be at most 1")
    run = Run(cfg)
    model = load_model(cfg.match, "match-train", run.device)
    generator = Generator(model.cfg.size, cfg.width).to(run.device)
    discriminator = Discriminator(model.face_encoder, cfg.weight).to(run.device)
    ema = AveragedModel(generator, multi_avg_fn=get_ema_multi_avg_fn(cfg.ema_decay))
    model.generator = ema.module  # the averaged G is never trained, only tested
    g_optimizer, g_scheduler = make_adam(generator, cfg.lr, cfg.steps)
    d_optimizer, d_scheduler = make_adam(discriminator, cfg.d_lr, cfg.steps)
    parts = {"model": model, "ema": ema, "g": generator, "d": discriminator}
    parts |= {"g_optimizer": g_optimizer, "g_scheduler": g_scheduler}
    parts |= {"d_optimizer": d_optimizer, "d_scheduler": d_scheduler}
    cfg.stage_one = vars(model.cfg)  # load_model() rebuilds S and F by it
    run.resume(parts)
    generators = {"generated": model}
    g_net = distribute(generator)
    d_net = distribute(discriminator)

    for step, rng, speech, real in run.batches(model.cfg):  # stage one's sizes
        z = sample_z(len(real), rng, run.device)  # (B, D)
        with torch.no_grad():  # S is frozen [ours], in eval mode
            c_pos = model.speech_encoder(speech)  # c+: (B, T) -> (B, D)
        c_neg = c_pos.roll(1, 0)  # c-: the batch is in random order, identities differ
        fake = g_net(z, c_pos)  # (B, D), (B, D) -> (B, 3, H, W)

        d_real = d_net(real)  # phi (B, D) and psi (B,) of Eq. 2
        d_fake = d_net(fake.detach())
        loss_d = gan_loss(cfg.loss, c_pos, c_neg, d_real, d_fake)  # Eq. 6
        penalty = 0.0
        if step % R1_EVERY == 0:
            penalty = R1_EVERY * cfg.gamma / 2 * r1_penalty(d_net, real, c_pos)
        d_optimizer.zero_grad()
        (loss_d + penalty).backward()
        d_optimizer.step()
        d_scheduler.step()

        # Real scores are those of D's step [ours]: anew they cost 8 % of a step.
        d_real = [x.detach() for x in d_real]
        d_fake = discriminator(fake)  # the updated D; no DDP, as D gets no gradients
        loss_g = gan_loss(cfg.loss, c_pos, c_neg, d_fake, d_real)  # Eq. 6
        g_optimizer.zero_grad()
        loss_g.backward(inputs=list(generator.parameters()))  # no gradients for D
        g_optimizer.step()
        g_scheduler.step()
        ema.update_parameters(generator)

        identity = inner(c_pos - c_neg, d_real[0]).mean()  # > 0: D knows who fits whom
        run.log(step, loss_d=loss_d, loss_g=loss_g, identity=identity)
        if run.is_due(step, cfg.eval_every):
            validate(model, generators, run, step, runs=1)
            plot_figures(model, run.corpus["val"], run.folder / f"samples/{step:06}")
        if run.is_due(step, cfg.save_every):
            run.save("last.pt", parts, step)
    if RANK == 0:
        report(model, generators, run.corpus["test"], cfg)


# ==== 4. Evaluation: K-way tests, QTA 1 to 3, what c and z control [paper §4] =========

# QTA and QLA: the paper's quantitative and qualitative analyses. A test takes one pair
# of each identity; each run draws negatives, windows, images and z anew [ours]. The
# judge is the Model whose S and F score the faces, as a rule that of stage one.
# Generators, {kind of faces: Model}, bring their own S: it makes c for their G.
TEST_BATCH = 32  # pairs that are embedded at once
GALLERY = 5000  # faces among which one is searched, at most [paper §4]


@torch.no_grad()
def embed_split(judge, generators, split, seed, workers):
    """One pair of each identity, as the judge's S and F see it.

    Returns c (N, D); fe {kind of faces: (N, D)}, before L2 normalisation; the N
    identities' rows of labels.csv. Kinds: those of the generators, real and ideal. All
    generators get the same voice and z.
    """
    synthetic = has_factors(split)
    rng = make_rng(seed)
    ideal_rng = np.random.default_rng(seed)
    pairs = PairDataset(split, judge.cfg, TEST_BATCH, seed)
    numbers = range(math.ceil(len(split.names) / TEST_BATCH))
    c = []
    fe = defaultdict(list)
    people = []
    for speech, real, names in load_batches(pairs, numbers, workers, judge.device):
        rows = [split.labels[name] for name in names]
        z = sample_z(len(names), rng, judge.device)  # (B, D)
        images = {}
        for kind, model in generators.items():
            images[kind] = model(speech, z)  # (B, 3, H, W)
        images["real"] = real
        if generators and synthetic:
            ideal = ideal_faces(rows, judge.cfg.size, ideal_rng)
            images["ideal"] = ideal.to(judge.device)
        c.append(judge.speech_encoder(speech).cpu())
        for kind, image in images.items():
            fe[kind].append(judge.face_encoder.embed(image).cpu())
        people += rows
    fe = {kind: torch.cat(batches) for kind, batches in fe.items()}
    return torch.cat(c), fe, people


def k_way(c, fe, genders, seed):
    """Tables 1 and 2: percent right, {"v-f/2": ...}, of embeddings (N, D).

    With /gender the negatives have the positive's gender [ours]. Without K people of
    each gender there is no such score.
    """
    rng = make_rng(seed)
    everybody = np.arange(len(genders))
    by_gender = [np.flatnonzero(genders == gender) for gender in ("female", "male")]
    scores = {}
    for suffix, groups in {"": [everybody], "/gender": by_gender}.items():
        for direction, k in itertools.product(DIRECTIONS, (2, 10)):
            if min(map(len, groups)) < k:
                continue
            hits = []
            for rows in groups:
                candidates = sample_candidates(len(rows), k, rng)  # (n, K)
                logits = match_logits(c[rows], fe[rows], candidates, direction)
                hits.append(top1(logits))
            scores[f"{direction}/{k}{suffix}"] = percent(torch.cat(hits))
    return scores


def percent(hits):
    """(N,) of 0 ... 1 -> their mean in percent."""
    return 100 * hits.float().mean().item()


def preferred(c, first, second):
    """QTA 2: percent of voices that match their face in first better than in second."""
    logits = torch.stack([inner(c, first), inner(c, second)], dim=1)  # (N, 2)
    return percent(top1(logits))


def cosine_distances(c, fe, genders, seed):
    """QTA 1: {"all": (CD(c1, c2), CD(fe1, fe2)), ...}, (n,) each, of random couples.

    Couples of the same and of different gender are from one draw [ours].
    """
    partner = sample_candidates(len(c), 2, make_rng(seed))[:, 1]  # (N,)
    cd_c = 1 - F.cosine_similarity(c, c[partner])  # (N, D) -> (N,)
    cd_fe = 1 - F.cosine_similarity(fe, fe[partner])  # (N, D) -> (N,)
    same = genders == genders[partner]  # (N,)
    known = (genders != "") & (genders[partner] != "")  # (N,)
    couples = {"all": slice(None)}
    if (genders != "").any():
        couples |= {"different": known & ~same, "same": known & same}
    return {name: (cd_c[chosen], cd_fe[chosen]) for name, chosen in couples.items()}


def pearson(x, y):
    """Pearson correlation along dim 0: (n,) -> () or (n, E) -> (E,); 0 if constant."""
    return F.cosine_similarity(x - x.mean(0), y - y.mean(0), dim=0)


def table_3(queries, gallery, seed):
    """QTA 3, Table 3: R@k in percent by three distances in a random gallery.

    queries (N, D) are of generated faces, gallery (N, D) of the real faces of the same
    people, both before L2 normalisation [ours], so that the distances differ. At most
    GALLERY random people, with an image each, serve as both [ours].
    """
    chosen = torch.randperm(len(gallery), generator=make_rng(seed))[:GALLERY]  # (R,)
    queries = queries[chosen]  # (R, D)
    gallery = gallery[chosen]  # (R, D)
    distances = {  # (R, R) each
        "L1": torch.cdist(queries, gallery, p=1.0),
        "L2": torch.cdist(queries, gallery),
        "cosine": -F.normalize(queries) @ F.normalize(gallery).T,
    }
    scores = {}
    for name, distance in distances.items():
        own = distance.diagonal()[:, None]  # (R, 1)
        rank = (distance <= own).sum(1)  # (R, R) -> (R,); 1 is the nearest, NaN gives 0
        for k in (1, 2, 5, 10):
            scores[f"retrieval/{name}/{k}"] = percent((1 <= rank) & (rank <= k))
    return scores


def score_faces(c, fe, kind, genders, seed):
    """The scores of one kind of faces: K-way; of all but the real ones, QTA 1 to 3."""
    unit = {name: F.normalize(x) for name, x in fe.items()}  # (N, D) each
    scores = k_way(c, unit[kind], genders, seed)
    if kind == "real":
        return scores
    if kind == "other":  # QTA 2's second experiment: percent that prefer ours
        scores["preferred"] = preferred(c, unit["generated"], unit["other"])
    else:
        scores["preferred"] = preferred(c, unit[kind], unit["real"])
    distances = cosine_distances(c, unit[kind], genders, seed)
    for couples, (cd_c, cd_fe) in distances.items():
        if len(cd_c) < 2:  # too few for a correlation
            continue
        scores[f"qta1/{couples}/c"] = cd_c.mean().item()
        scores[f"qta1/{couples}/face"] = cd_fe.mean().item()
        scores[f"qta1/{couples}/r"] = pearson(cd_c, cd_fe).item()
    return scores | table_3(fe[kind], fe["real"], seed)


def oracle_scores(people, genders, seed):
    """The best K-way scores that can be expected: of one who knows all true factors.

    By Bayes the candidate with the largest p(f | v) / p(f) is likeliest right, in both
    directions. For standard normals v and f of correlation r its logarithm is

        const + a v f - b v^2 - b f^2 with a = r / (1 - r^2), b = r a / 2:

    the inner product of (a v, -b v^2, 1) and (f, 1, -b f^2), summed over the three
    linked factors. The other gender is impossible.
    """
    r = float(people[0]["link"])
    a = r / (1 - r**2)
    b = r * a / 2
    v = factor_values(people, VOICE_FACTORS[1:])  # (P, 3)
    f = factor_values(people, LINKED)  # (P, 3)
    gender = 2 * factor_values(people, ["gender"]) - 1  # (P, 1)
    one = torch.ones_like(v)  # (P, 3)
    # Three terms of each kind, then 1000 for the same gender, -1000 for the other.
    voices = torch.cat([a * v, -b * v**2, one, 1000 * gender], dim=1)  # (P, 10)
    faces = torch.cat([f, one, -b * f**2, gender], dim=1)  # (P, 10)
    return k_way(voices, faces, genders, seed)


def evaluate(judge, generators, split, cfg, runs):
    """Test a split: metrics, and the same as a table, {kind: {score: text}}.

    Metrics are the split's name and size and {key: mean over runs, key/std: std}. Keys
    of generated faces are like "v-f/2", those of other kinds like "real/v-f/2"; without
    generators real faces have the short keys.
    """
    main_kind = "generated" if generators else "real"
    collected = defaultdict(list)
    counts = []
    for i in range(runs):
        seed = cfg.seed + 1000 * (i + 1)
        c, fe, people = embed_split(judge, generators, split, seed, cfg.workers)
        counts.append(len(people))
        genders = np.array([gender_of(row) for row in people])
        tests = {kind: score_faces(c, fe, kind, genders, seed) for kind in fe}
        if has_factors(split):
            tests["oracle"] = oracle_scores(people, genders, seed)
        for kind, scores in tests.items():
            for name, score in scores.items():
                collected[kind, name].append(score)
    metrics = {
        "data": str(split.folder.parent),
        "split": split.folder.name,
        "people": min(counts),
        "left_out": len(split.names) - min(counts),
        "runs": runs,
    }
    table = defaultdict(dict)
    for (kind, name), scores in collected.items():
        if len(scores) < runs:  # too few people in some run
            continue
        key = name if kind == main_kind else f"{kind}/{name}"
        metrics[key] = rounded(np.mean(scores))
        table[kind][name] = f"{np.mean(scores):.2f}"
        if runs > 1:
            std = np.std(scores, ddof=1)
            metrics[f"{key}/std"] = rounded(std)
            table[kind][name] += f" ± {std:.2f}"
    return metrics, table


def rounded(x):
    """A number for JSON, which has no NaN: None instead."""
    return round(float(x), 3) if math.isfinite(x) else None


def validate(model, generators, run, step, runs):
    """Test at most --val-clips people, without labels; print and return the scores."""
    split = subsample(run.corpus["val"], max(2, run.cfg.val_clips))
    split = split._replace(labels=defaultdict(dict))
    model.eval()
    metrics, _ = evaluate(model, generators, split, run.cfg, runs)
    shown = ("preferred", "v-f/2", "v-f/10", "f-v/2", "f-v/10")
    texts = [f"{key} {metrics[key]} % " for key in shown if key in metrics]
    print(f"step {step} val ", *texts, flush=True)
    return metrics


def pixels(faces):
    """(N, 3, H, W) -> (N, X): shrunk to 32x32, flattened, with a constant 1."""
    small = F.adaptive_avg_pool2d(faces.cpu(), 32)  # (N, 3, 32, 32)
    return F.pad(small.flatten(1), (0, 1), value=1.0)


def fit_probe(faces, targets, noise=0.1):
    """The linear map (X, E) that best reads targets (N, E) off faces (N, 3, H, W).

    Ridge regression, as if pixels had noise of this std [ours], so that the map does
    not rely on fine detail, which generated faces lack.
    """
    x = pixels(faces)  # (N, X)
    # N rows of such noise would add N noise^2 to the diagonal of x.T @ x.
    ridge = len(x) * noise**2 * torch.eye(x.shape[1])  # (X, X)
    return torch.linalg.solve(x.T @ x + ridge, x.T @ targets)  # (X, E)


def sample_people(split, model, count, seed=0):
    """Pairs of at most `count` people: speech (N, T), faces (N, 3, H, W), names."""
    pairs = PairDataset(subsample(split, count), model.cfg, count, seed)
    return next(load_batches(pairs, [0], 0, model.device))


@torch.no_grad()
def control_scores(model, train, test, noises=16):
    """QLA 1 to 3, by eye in the paper: what c and z control, read by a linear probe.

    Returns {column: {factor: score}}; the columns are named below, of generated faces
    unless they say otherwise. What c and z lack to 100 % is their interaction.
    """
    _, faces, names = sample_people(train, model, 1000)
    known = factor_values([train.labels[name] for name in names], FACTORS)  # (P, E)
    probe = fit_probe(faces, known - known.mean(0))  # (X, E)
    speech, faces, names = sample_people(test, model, 400)
    people = [test.labels[name] for name in names]
    truth = factor_values(people, FACTORS)  # (V, E)
    voice = factor_values(people, VOICE_FACTORS)  # (V, 4), in the order of FACTORS[:4]
    real = pixels(faces) @ probe  # (V, E)
    z = sample_z(noises, make_rng(0), model.device)  # (Z, D)
    read = []
    for row in speech.split(1):  # (1, T)
        generated = model(row, z)  # (Z, 3, H, W)
        read.append(pixels(generated) @ probe)  # (Z, E)
    read = torch.stack(read)  # (V, Z, E)

    # Analysis of variance: the mean over z leaves c's effect (and 1/Z of what both do
    # together), the mean over voices z's.
    by_c = read.mean(1).var(0, correction=0)  # (V, Z, E) -> (V, E) -> (E,)
    by_z = read.mean(0).var(0, correction=0)  # (V, Z, E) -> (Z, E) -> (E,)
    total = read.var((0, 1), correction=0)  # (V, Z, E) -> (E,)
    given = voice.repeat_interleave(noises, 0)  # (V Z, 4)
    r = pearson(read[:, :, :4].flatten(0, 1), given)  # (4,)
    r_real = pearson(real[:, :4], voice)  # (4,)
    columns = {
        "c": 100 * by_c / total,  # percent of the variance due to c alone
        "z": 100 * by_z / total,  # due to z alone
        "voice": r,  # correlation with the voice's factor
        "spread": 100 * (1 - r**2),  # variance that the voice's factor does not explain
        "spread/real": 100 * (1 - r_real**2),  # the same of real faces
        "probe": pearson(real, truth),  # correlation with the truth, of real faces
    }
    scores = {}
    for column, values in columns.items():
        scores[column] = dict(zip(FACTORS, map(rounded, values)))
    return scores


# ==== 5. Figures 2 to 6, reports, faces for any recording =============================

PAPER_RESULTS = {  # of other people, hence not comparable [paper §4]
    "f-v/2": "generated 95.14, real 88.47",
    "preferred": "76.65 (Eq. 4: 47.2); Eq. 5 to Eq. 4 79.68",
    "qta1/different/c": "0.46",
    "qta1/same/c": "0.28",
    "qta1/different/face": "0.27",
    "qta1/same/face": "0.15",
}


def to_image(face):
    """(3, H, W) in [-1, 1] -> a PIL image."""
    values = ((face.cpu() + 1) * 127.5).round().byte()
    return Image.fromarray(values.permute(1, 2, 0).numpy())  # (H, W, 3)


def plot_grid(path, titles, rows):
    """Save rows of faces (n, 3, H, W), each 24 pixels of title above 128 of faces."""
    sheet = Image.new("RGB", (132 * len(rows[0]), 152 * len(rows)), "white")
    draw = ImageDraw.Draw(sheet)
    for i, row in enumerate(rows):
        draw.text((4, 152 * i + 4), titles[i], "black", font_size=14)
        for k, face in enumerate(F.interpolate(row, 128)):  # (3, 128, 128)
            sheet.paste(to_image(face), (132 * k + 2, 152 * i + 24))
    make_folder(path.parent)
    sheet.save(path)


def plot_scatter(path, couples):
    """Save Fig. 5, one plot [ours]: y (n,) over x (n,), 0 to 2, of {gender: (x, y)}."""
    sheet = Image.new("RGB", (500, 500), "white")
    draw = ImageDraw.Draw(sheet)
    draw.rectangle((50, 50, 450, 450), outline="black")  # 200 pixels a unit
    draw.text((8, 8), "CD(fe1, fe2)", "black")
    draw.text((390, 475), "CD(c1, c2)", "black")
    for tick in range(3):
        draw.text((47 + 200 * tick, 458), str(tick), "black")
        draw.text((34, 444 - 200 * tick), str(tick), "black")
    colors = {"all": "gray", "different": "steelblue", "same": "darkorange"}
    draw.text((160, 8), "gender: different blue, same orange, unknown gray", "black")
    for gender, (x, y) in couples.items():
        for a, b in zip(50 + 200 * x, 450 - 200 * y):
            draw.circle((a, b), 2, colors[gender])
    sheet.save(path)


@torch.no_grad()
def plot_figures(model, split, folder, seed=0):
    """Save Fig. 2 to 6 of at most 200 people [ours] as folder/fig2.png to fig6.png.

    A row starts with the speaker's own face. Then Fig. 2 changes z, Fig. 3 goes to the
    next speaker's c, Fig. 4 to the next z; Fig. 6 has the real faces that are nearest.
    """
    speech, faces, names = sample_people(split, model, 200, seed)
    c = torch.cat([model.speech_encoder(x) for x in speech.split(TEST_BATCH)])  # (N, D)
    z = sample_z(len(c), make_rng(seed), model.device)  # (N, D)
    generated = model.generator(z, c)  # (N, 3, H, W)
    fe = model.face_encoder(generated)  # (N, D)
    similarity = fe[:6] @ model.face_encoder(faces).T  # (6, N), of those shown
    nearest = similarity.argsort(descending=True)[:, :5]  # (6, 5)
    c1 = c[:6]  # (6, D)
    c2 = c1.roll(-1, 0)
    z1 = z[:6]  # (6, D)
    z2 = z1.roll(-1, 0)
    real = faces[:6]
    steps = [0, 0.2, 0.4, 0.6, 0.8, 1]
    figures = {  # lists of columns (6, 3, H, W)
        "fig2": [model.generator(z_i.expand_as(c1), c1) for z_i in z1],
        "fig3": [model.generator(z1, torch.lerp(c1, c2, t)) for t in steps],
        "fig4": [model.generator(torch.lerp(z1, z2, t), c1) for t in steps],
        "fig6": [generated[:6], *faces[nearest].unbind(1)],
    }
    figures["fig3"].append(real.roll(-1, 0))
    for name, columns in figures.items():
        rows = torch.stack([real, *columns], dim=1)  # (6, n, 3, H, W)
        plot_grid(folder / f"{name}.png", names[:6], rows)
    genders = np.array([gender_of(split.labels[name]) for name in names])
    couples = cosine_distances(c.cpu(), fe.cpu(), genders, seed)
    plot_scatter(folder / "fig5.png", couples)


def make_table(columns):
    """A Markdown table of {column: {row: cell}}; its rows are the first column's."""
    lines = [["", *columns], ["---"] * (len(columns) + 1)]
    for row in next(iter(columns.values())):
        lines.append([row, *[str(cells.get(row, "")) for cells in columns.values()]])
    return "".join("| " + " | ".join(line) + " |\n" for line in lines) + "\n"


def report(judge, generators, split, cfg, control=None):
    """Test; write OUT/metrics.json; print and return the scores as tables."""
    metrics, table = evaluate(judge, generators, split, cfg, cfg.runs)
    table["paper"] = PAPER_RESULTS
    caption = "{data}/{split}: {people} people, {left_out} left out; {runs} runs, ± std"
    text = caption.format(**metrics) + "\n\n" + make_table(table)
    if control:
        text += make_table(control)
        for column, cells in control.items():
            for factor, value in cells.items():
                metrics[f"control/{factor}/{column}"] = value
    path = make_folder(cfg.out) / "metrics.json"
    path.write_text(json.dumps(metrics, indent=1) + "\n")
    print(text, end="", flush=True)
    return text


def match_test(args):
    """Test trained encoders: both directions, K = 2 and 10."""
    model = load_model(args.match, "match-train", find_device(args.device))
    corpus = open_corpus(args.data, {args.split: 2})
    report(model, {}, corpus[args.split], args)


def gan_test(args):
    """Write the paper's tables and figures: report.md, fig2.png ..., metrics.json."""
    device = find_device(args.device)
    model = load_model(args.gan, "gan-train", device)
    size = model.cfg.size
    judge = model
    generators = {"generated": model}
    if args.judge:
        judge = load_model(args.judge, "match-train", device, size)
    if args.other:
        generators["other"] = load_model(args.other, "gan-train", device, size)
    split = open_corpus(args.data, {"test": 2})["test"]
    control = None
    if has_factors(split) and Path(args.data, "train").is_dir():
        # Opened together, train and test have nobody in common.
        train = open_corpus(args.data, {"train": 2, "test": 2})["train"]
        if has_factors(train):
            control = control_scores(model, train, split)
    page = f"# {args.gan}\n\n" + report(judge, generators, split, args, control)
    plot_figures(model, split, Path(args.out), args.seed)
    for number in range(2, 7):
        page += f"![Figure {number}](fig{number}.png)\n\n"
    path = Path(args.out, "report.md")
    path.write_text(page, "utf8", "backslashreplace")
    print(f"{path}: written")


@torch.no_grad()
def generate(args):
    """Generate faces for recordings: a labelled grid, or a folder of PNGs."""
    device = find_device(args.device)
    model = load_model(args.gan, "gan-train", device)
    as_grid = Path(args.out).suffix.lower() == ".png"
    rng = np.random.default_rng(args.seed)
    rows = []
    for i, path in enumerate(args.speech):
        speech = load_speech(path, SPEECH_SECONDS, rng)  # (T,)
        speech = torch.from_numpy(speech)[None].to(device)  # (1, T)
        seed = args.seed if as_grid else args.seed + i  # a grid has one z a column
        z = sample_z(args.n, make_rng(seed), device)  # (n, D)
        faces = model(speech, z)  # (n, 3, H, W)
        if as_grid:
            rows.append(faces)
            continue
        for k, face in enumerate(faces, start=1):
            name = f"{i + 1:04}_{Path(path).stem}_z{k}.png"
            to_image(face).save(make_folder(args.out) / name)
    if as_grid:
        plot_grid(Path(args.out), args.speech, rows)
    print(f"{args.out}: {args.n} faces for each of {len(args.speech)} recordings")


# ==== 6. Data: DATA/{train,val,test}/<identity>/<clip>/*.wav *.jpg, DATA/labels.csv ===

# 1200.jpg was taken 1200 ms into the one recording of its clip; the speech beside it
# leaves out TIME_GUARD before and after that moment.
SPLITS = ("train", "val", "test")
IMAGE_ENDINGS = (".jpg", ".jpeg", ".png")
SPEECH_SECONDS = 6.0  # in tests and for generation [paper §4]
TIME_GUARD = 0.3  # s between an image's moment and its speech [ours]
MIN_SPEECH = 0.5  # s; less speech is a fault [ours]
MIN_SOUND = 0.1  # share of the speech that must not be silent [ours]
MIN_SIDE = 32  # pixels; a smaller face is a fault [ours]
LOADER_TIMEOUT = 120  # s without a batch: a loader process is dead [ours]
GENDERS = {"m": "male", "male": "male", "1": "male"}
GENDERS |= {"f": "female", "female": "female", "w": "female", "0": "female"}

# A part of a corpus: its folder, the names (P,) of its identities, the corpus's labels.
Split = namedtuple("Split", "folder names labels")


def open_corpus(data, least):
    """The splits of a corpus, {name: Split}; least is {name: identities it needs}."""
    labels = read_labels(data)
    corpus = {}
    for split, count in least.items():
        folder = Path(data, split)
        if not folder.is_dir():
            raise UserError(f"{folder}: no such folder, a corpus has train, val, test")
        names = list_folders(folder)
        if len(names) < count:
            raise UserError(f"{folder}: {len(names)} identities, {count} are needed")
        for other in corpus.values():
            for name in np.intersect1d(names, other.names):
                raise UserError(f"{folder / name}: is in another split, too")
        corpus[split] = Split(folder, np.array(names), labels)
    return corpus


def list_folders(path):
    """The names of the folders in a folder, in order, without hidden ones."""
    return sorted(e.name for e in os.scandir(path) if e.is_dir() and e.name[0] != ".")


def subsample(split, count):
    """At most `count` identities of a split, evenly spread, always the same."""
    count = min(count, len(split.names))
    rows = np.linspace(0, len(split.names) - 1, count, dtype=int)
    return split._replace(names=split.names[rows])


def read_labels(data):
    """labels.csv as {identity: {column: text}}, {} for others. Only tests use it."""
    path = Path(data, "labels.csv")
    labels = defaultdict(dict)
    if not os.path.lexists(path):
        return labels
    with explain(f"{path}: must be CSV in UTF-8 with a column 'identity'"):
        lines = path.read_text("utf-8-sig").splitlines()
        rows = csv.DictReader(lines, restval="", skipinitialspace=True)
        rows.fieldnames = [name.strip().lower() for name in rows.fieldnames]
        for row in rows:
            name = row["identity"].strip()
            if not name:
                continue
            first = labels.setdefault(name, row)
            if gender_of(first) != gender_of(row):
                raise UserError(f"{path}: rows of {name} contradict each other")
    return labels


def gender_of(row):
    """The gender in a row of labels.csv: "male", "female", or "" if neither."""
    return GENDERS.get(row.get("gender", "").strip().lower(), "")


def list_pairs(identity):
    """The recordings of an identity with their images: [(recording, {image: moment})].

    A recording's images are those in its folder or, if there are none, as in VoxCeleb
    with VGGFace, all of the identity. An image's name may tell its moment (s) in the
    one recording of its folder; otherwise the moment is None.
    """
    pairs = []
    all_images = {}  # of the identity
    for clip in list_folders(identity):
        files = sorted(Path(identity, clip).iterdir())
        files = [file for file in files if file.name[0] != "."]
        # By stem, so that a.wav and a.WAV are one.
        recordings = {f.stem: f for f in files if f.suffix.lower() == ".wav"}.values()
        images = {}
        for file in files:
            if file.suffix.lower() in IMAGE_ENDINGS:
                timed = len(recordings) == 1 and file.stem.isdecimal()
                images[file] = int(file.stem) / 1000 if timed else None
        all_images |= dict.fromkeys(images)
        pairs += [(file, images) for file in recordings]
    if not (pairs and all_images):
        found = f"{len(pairs)} recordings (wav), {len(all_images)} images (jpg, png)"
        raise UserError(f"{identity}: {found} in its clip folders, both are needed")
    return [(file, images or all_images) for file, images in pairs]


def read_audio(path):
    """All samples of a 16-bit WAV, (T,) in [-1, 1], at SAMPLE_RATE."""
    problem = f"{path}: must be 16-bit WAV, as ffmpeg -i IN -ar 16000 OUT.wav writes"
    with explain(problem), open(path, "rb") as file, wave.open(file) as header:
        if header.getsampwidth() != 2:
            raise wave.Error("not 16-bit")
        frame = np.dtype(("<i2", (header.getnchannels(),)))
        # wave.open has read the header, so file is at the first sample. The size told
        # there may be 0 or wrong. It is right if the name of another chunk (four
        # letters) or of a tag follows; otherwise all is sound, to the end of the file.
        raw = file.read()
        size = header.getnframes() * frame.itemsize
        if size and re.match(rb"[\w ]{4}|ID3|TAG", raw[size : size + 4]):
            raw = raw[:size]
        x = np.frombuffer(raw, frame, len(raw) // frame.itemsize)  # (T, channels)
        x = torch.from_numpy(x.mean(1, dtype=np.float32) / 32768)  # (T,)
        # At odd rates the resampler's filters would cost GB.
        rate = 25 * round(header.getframerate() / 25)
        return torchaudio.functional.resample(x, rate, SAMPLE_RATE).numpy()


def exclude_moment(path, x, moment):
    """The parts of speech x (T,) from before and after an image's moment (s), or [x].

    Speech and face come from different time frames [paper §4]: TIME_GUARD is left out
    on both sides. Parts that are silent or shorter than MIN_SPEECH are left out, too.
    Raises UserError if no part is left, or if the moment is after the end.
    """
    parts = [x]
    if moment is not None:
        if moment > len(x) / SAMPLE_RATE:
            raise UserError(f"{path}: ends before its image's time of {moment} s")
        before = max(0, math.floor((moment - TIME_GUARD) * SAMPLE_RATE))
        after = math.ceil((moment + TIME_GUARD) * SAMPLE_RATE) + 1  # strictly after
        parts = [x[:before], x[after:]]
    least = MIN_SPEECH * SAMPLE_RATE
    parts = [part for part in parts if len(part) >= least and not is_silent(part)]
    if not parts:
        place = "" if moment is None else f" beside its image at {moment} s"
        raise UserError(f"{path}: silent or under {MIN_SPEECH} s{place}")
    return parts


def is_silent(x):
    """Whether fewer than MIN_SOUND of the slices of x (T,) have a sound."""
    sample = x[: len(x) // 350 * 350 : 7]  # each 7th will do for speech; 350 is 7 * 50
    slices = sample.reshape(50, -1)  # (50, T / 350)
    return np.mean(slices.std(1) > SILENCE) < MIN_SOUND


def sample_window(parts, length, rng):
    """A random window of a random part that is long enough, or of the longest part."""
    fitting = [part for part in parts if len(part) >= length]
    part = pick(fitting or [max(parts, key=len)], rng)
    start = rng.integers(max(1, len(part) - length + 1))
    return part[start : start + length]


def pick(items, rng):
    """One of a list at random."""
    return items[rng.integers(len(items))]


def load_speech(path, seconds, rng, moment=None):
    """A random window of speech (T,) at SAMPLE_RATE, beside an image's moment (s).

    Shorter speech is repeated, longer cut at random [paper §4]. Raises UserError where
    there is too little speech, or hardly a sound in it.
    """
    parts = exclude_moment(path, read_audio(path), moment)
    length = round(seconds * SAMPLE_RATE)
    for _ in range(100):  # tries to draw a window that is no pause [ours]
        window = sample_window(parts, length, rng)
        if not is_silent(window):
            break
    return np.resize(window, length)  # repeats it up to this length


def load_face(path, size):
    """A face as uint8 (size, size, 3): upright, RGB, its central square [ours].

    Raises UserError where it is too small or of one colour.
    """
    with explain(f"{path}: not a readable image"), Image.open(path) as image:
        image.draft("RGB", (2 * size, 2 * size))  # decodes a large JPEG at less
        image = ImageOps.exif_transpose(image)
        if image.mode.startswith("I"):  # 16 bits of grey, which convert() would clip
            image = Image.fromarray(np.uint8(np.asarray(image) // 256))
        if image.has_transparency_data:
            white = Image.new("RGBA", image.size, "white")
            image = Image.alpha_composite(white, image.convert("RGBA"))
        image = image.convert("RGB")
    if min(image.size) < MIN_SIDE:
        raise UserError(f"{path}: {image.size} pixels, {MIN_SIDE} a side are needed")
    face = crop_square(image, size)
    if (face == face[0, 0]).all():
        raise UserError(f"{path}: of one colour")
    return face


def crop_square(image, size):
    """The central square of a PIL image as uint8 (size, size, 3)."""
    return np.array(ImageOps.fit(image, (size, size), Image.Resampling.BILINEAR))


def to_faces(images):
    """uint8 (B, H, W, 3) -> faces (B, 3, H, W) in [-1, 1]."""
    return images.permute(0, 3, 1, 2).float() / 127.5 - 1


@dataclass
class PairDataset:
    """Batches of pairs of different identities; each depends on seed and number alone.

    A batch is speech (B, T), faces as uint8 (B, H, W, 3) and names. Pairs that cannot
    be read are left out with a warning. For training (cfg.seconds of speech) identities
    and flips are random, and others replace unreadable ones; for tests (SPEECH_SECONDS)
    everybody comes, in order.
    """

    split: Split
    cfg: argparse.Namespace
    batch: int
    seed: int
    training: bool = False

    def __getitem__(self, number):
        rng = np.random.default_rng([self.seed, number])
        names = self.split.names
        if self.training:
            count = min(2 * self.batch, len(names))  # as many again in reserve [ours]
            names = rng.choice(names, count, replace=False)
        else:
            names = names[number * self.batch : (number + 1) * self.batch]
        pairs = []
        for name in names:
            try:
                pairs.append(self.load_pair(name, rng))
            except (UserError, OSError) as fault:
                print(f"warning: left out: {fault}", file=sys.stderr)
            if len(pairs) == self.batch:
                break
        speech, faces, names = zip(*pairs) if pairs else ([], [], [])
        return np.array(speech), np.array(faces), names

    def load_pair(self, name, rng):
        """Speech (T,), face (H, W, 3), name: a random recording, one of its images."""
        recording, images = pick(list_pairs(self.split.folder / name), rng)
        image, moment = pick(list(images.items()), rng)
        face = load_face(image, self.cfg.size)
        if self.training and rng.random() < 0.5:
            face = face[:, ::-1]  # [ours]
        seconds = self.cfg.seconds if self.training else SPEECH_SECONDS
        return load_speech(recording, seconds, rng, moment), face, name


def load_batches(pairs, numbers, workers, device):
    """Yield speech (B, T), faces (B, 3, H, W) and names of batches by number.

    Raises UserError where a training batch cannot be filled, or after the last batch if
    fewer than two people could be read.
    """
    folder = pairs.split.folder
    count = 0
    loader = torch.utils.data.DataLoader(
        pairs,
        batch_size=None,
        sampler=numbers,
        num_workers=workers,
        timeout=LOADER_TIMEOUT if workers else 0,
    )
    for speech, faces, names in loader:
        if pairs.training and len(names) < pairs.batch:
            raise UserError(f"{folder}: too many unreadable files (run check-data)")
        count += len(names)
        if names:
            yield speech.to(device), to_faces(faces.to(device)), names
    if count < 2:
        raise UserError(f"{folder}: too few people can be read (run check-data)")


def check_data(args):
    """Read all files of a corpus; print what it holds, what is unused or wrong."""
    corpus = open_corpus(args.folder, dict.fromkeys(SPLITS, args.k))
    unused_rows = set(corpus["test"].labels)  # names, without those found below
    used = {Path(args.folder, "labels.csv")}
    faults = []
    for split in corpus.values():
        used |= check_split(split, faults)
        unused_rows -= set(split.names)
        genders = Counter(split.labels[name].get("gender", "") for name in split.names)
        for text, count in genders.items():
            gender = gender_of({"gender": text}) or "unknown"
            print(f"  {count} people of gender {text!r}: {gender}")
    unused = defaultdict(list)
    for depth in range(6):  # a clip's file is at 3; links are followed
        for name in glob.iglob("*/" * depth + "*", root_dir=args.folder):
            path = Path(args.folder, name)
            if path not in used and not path.is_dir():
                unused[f"files {'*/' * depth}*{path.suffix}"].append(path)
    unused["rows of labels.csv"] += unused_rows
    for kind, found in unused.items():
        if found:
            print(f"not used: {len(found)} {kind}, such as {min(found)}")
    print(f"{len(faults)} faults")
    return 1 if faults else 0


def check_split(split, faults):
    """Read a split's files; print what it holds; extend faults; return its files."""
    files = set()
    seconds = []
    times = []
    for name in split.names:
        pairs = attempt(faults, list_pairs, split.folder / name) or []
        for recording, images in pairs:
            for image in sorted(images.keys() - files):
                attempt(faults, load_face, image, MIN_SIDE)
            files.update([recording, *images])
            speech = attempt(faults, read_audio, recording)
            if speech is None:
                seconds.append(0)
                continue
            seconds.append(len(speech) / SAMPLE_RATE)
            for moment in set(images.values()):
                attempt(faults, exclude_moment, recording, speech, moment)
            times += [moment for moment in images.values() if moment is not None]
    counts = f"{len(split.names)} identities, {len(seconds)} recordings"
    counts += f" ({sum(seconds) / 3600:.2f} h), {len(files) - len(seconds)} images"
    print(f"{split.folder.name}: {counts}", flush=True)
    span = f", {min(times)} to {max(times)} s" if times else ""
    print(f"  {len(times)} images with a time{span}")
    return files


def attempt(faults, function, *args):
    """function(*args), or None where it finds a fault, which is printed and noted."""
    try:
        return function(*args)
    except (UserError, OSError) as fault:
        print(f"fault: {fault}", flush=True)
        faults.append(fault)
        return None


# ==== 7. Synthetic people: voices by source and filter, drawn faces [all ours] ========

LINK = 0.72  # correlation of voice and face, chosen for an F-V near the paper's 88 %
LINKED = ("age", "tract", "build")  # and gender, which voice and face share wholly
VOICE_FACTORS = ("gender", "voice_age", "voice_tract", "voice_build")
FACTORS = ("gender", *LINKED, "glasses", "hair", "skin", "background", "tilt")
CLIP_SECONDS = 6
CLIP_IMAGES = 6
FORMANTS = (500, 1500, 2500, 3500)  # Hz, the resonances of an even tube of 17 cm
SIDE = 128  # pixels of a face
HAIR = ("#241e22", "#e2b460")  # from dark to fair
SKIN = ("#ffdabe", "#86583e")  # from light to dark
BACKGROUND = ("#7eb8e2", "#f6b08e")  # from blue to peach
INK = "#221c24"
CLOTHES = "#606ea0"
LIPS = "#ce3e48"
to_uniform = NormalDist().cdf  # standard normals become uniform in 0 ... 1


def sample_voice(rng):
    """A voice: gender (1: male), three standard normals, three factors of its own."""
    voice = {"gender": int(rng.integers(2))}
    for name in LINKED:
        voice["voice_" + name] = rng.normal()
    voice["pitch"] = rng.normal(0, 0.04)
    voice["loudness"] = rng.uniform(0.1, 0.7)
    voice["tempo"] = rng.uniform(4, 6)  # syllables per s
    return voice


def sample_face(voice, link, rng):
    """The factors of a face, from p(face given the voice)."""
    face = {"gender": voice["gender"]}
    for name in LINKED:
        noise = rng.normal()
        face[name] = link * voice["voice_" + name] + math.sqrt(1 - link**2) * noise
    face["glasses"] = max(0, rng.uniform(-1, 1))  # thickness; half have none
    for name in ("hair", "skin", "background"):
        face[name] = rng.random()
    face["tilt"] = rng.uniform(-12, 12)  # degrees
    return face


def synth_speech(voice, rng):
    """A clip of speech, int16 (samples,): a source through a mouth's resonances.

    Gender sets the pitch. Age lowers it and adds breath. A long tract lowers the
    resonances, a sturdy build adds bass. One syllable in seven is a pause.
    """
    age, tract, build = (to_uniform(voice["voice_" + name]) for name in LINKED)
    t = np.arange(CLIP_SECONDS * SAMPLE_RATE) / SAMPLE_RATE  # (samples,), s
    count = int(2 * CLIP_SECONDS * voice["tempo"])  # syllables, more than fit
    starts = np.cumsum(rng.uniform(0.7, 1.3, count)) / voice["tempo"]  # s
    position = np.interp(t, starts, np.arange(count))  # 1.5: half of syllable 1 is over
    syllable = position.astype(int)
    melody = np.interp(t, starts, rng.normal(size=count))
    stress = rng.uniform(0.5, 1, count) * (rng.random(count) > 1 / 7)
    envelope = stress[syllable] * np.sin(np.pi * position) ** 2  # 0 between syllables

    pitch = 115 if voice["gender"] else 220  # Hz
    pitch = pitch * np.exp(voice["pitch"] - 0.3 * age + 0.1 * melody)
    periods = np.floor(np.cumsum(pitch) / SAMPLE_RATE)
    pulses = np.diff(periods, prepend=0)  # 1 where a period begins
    breath = (0.04 + 0.5 * age) * np.diff(rng.normal(size=len(t)), prepend=0)
    f = np.fft.rfftfreq(len(t), 1 / SAMPLE_RATE)  # Hz
    source = np.fft.rfft(pulses / np.sqrt(pitch))
    source *= f / (f + 200) / (1 + 1j * f / 700)  # lips (high-pass), throat (low-pass)
    source *= np.exp(4 * (build - 0.5) / (1 + (f / 400) ** 4))  # up to 17 dB of bass

    for r in np.array(FORMANTS) * (1.35 - 0.7 * tract):  # a longer tube is lower
        source *= r**2 / (r**2 - f**2 + 80j * f)  # each 80 Hz wide
    speech = np.fft.irfft(source)
    speech = envelope * (speech / speech.std() + breath)
    return np.int16(32767 * voice["loudness"] * speech / np.abs(speech).max())


def blend(first, second, t):
    """The colour at t in 0 ... 1 between two colours, in PIL's notation."""
    pairs = zip(ImageColor.getrgb(first), ImageColor.getrgb(second))
    mixed = tuple(int(a + t * (b - a)) for a, b in pairs)
    return f"rgb{mixed}"


def face_ellipses(face, mouth):
    """The ellipses of a face: colour, centre x and y, half width and half height.

    Later ones cover earlier ones. (0, 0) is the image's centre, 1 half its side, y is
    down. Gender shows in hair, brows and lips; age in grey, hairline, eyes and creases;
    tract in a long head; build in neck and shoulders.
    """
    male = face["gender"]
    age, tract, build = (to_uniform(face[name]) for name in LINKED)
    skin = blend(*SKIN, face["skin"])
    shade = blend(skin, INK, 0.2)
    crease = blend(skin, INK, 0.5 * age)
    hair = blend(blend(*HAIR, face["hair"]), "white", 0.5 * age**2)
    dark_hair = blend(hair, INK, 0.3)
    width = 0.62 - 0.28 * tract
    height = 0.46 + 0.24 * tract
    lips = 0.22 + 0.19 * tract
    eye = 0.13 - 0.06 * age
    rim = 0.16 + 0.05 * face["glasses"]
    ellipses = [
        (dark_hair, 0, 0.08, 0 if male else width + 0.2, 0.72),  # women's long hair
        (CLOTHES, 0, 1.22, 0.35 + 0.85 * build, 0.7),
        (shade, 0, 0.5, 0.11 + 0.22 * build, 0.36),  # neck
        (hair, 0, -0.15, width + 0.07, height),
        (skin, 0, 0.1 - 0.14 * age, width, height),
        (crease, 0, -0.36, 0.05 + 0.25 * age, 0.01 + 0.01 * age),  # on the forehead
        (shade, 0, 0.06 + 0.12 * tract, 0.07, 0.06),  # nose
        (blend(skin, LIPS, 0.4 if male else 0.9), 0, lips, 0.2, 0.07 + 0.06 * mouth),
        (skin, 0, lips - 0.05, 0.22, 0.06),  # leaves a smile of the lips
    ]
    for x in (-0.21, 0.21):
        if face["glasses"]:
            ellipses += [(INK, x, -0.1, rim, rim), (skin, x, -0.1, 0.145, 0.145)]
        ellipses += [
            ("white", x, -0.1, 0.115, eye),
            (INK, x, -0.1, 0.075, min(0.09, eye)),  # pupil
            (dark_hair, x, -0.29, 0.13, 0.04 if male else 0.025),  # brow
        ]
    return ellipses


def draw_face(face, mouth):
    """An image (PIL, SIDE x SIDE) of a face, its mouth open by 0 ... 1."""
    background = blend(*BACKGROUND, face["background"])
    image = Image.new("RGB", (2 * SIDE, 3 * SIDE), background)  # with room to tilt
    draw = ImageDraw.Draw(image)
    for color, x, y, rx, ry in face_ellipses(face, mouth):
        box = SIDE * (1 + np.array([x - rx, y - ry, x + rx, y + ry]))
        draw.ellipse(tuple(box), fill=color)
    below = (SIDE, 1.8 * SIDE)  # the centre of the tilt
    bilinear = Image.Resampling.BILINEAR
    image = image.rotate(face["tilt"], bilinear, center=below, fillcolor=background)
    return image.crop((0, 0, 2 * SIDE, 2 * SIDE)).reduce(2)


def ideal_faces(people, size, rng):
    """Faces (N, 3, H, W) of a perfect generator: drawn from p(face given the voice)."""
    images = []
    for row in people:
        voice = {name: float(row[name]) for name in VOICE_FACTORS}
        face = sample_face(voice, float(row["link"]), rng)
        image = draw_face(face, rng.random())
        images.append(crop_square(image, size))
    return to_faces(torch.from_numpy(np.array(images)))


def has_factors(split):
    """Whether labels.csv tells all factors of a split's people: they are synthetic."""
    try:
        people = [split.labels[name] for name in split.names]
        values = factor_values(people, [*FACTORS, *VOICE_FACTORS, "link"])
    except (KeyError, ValueError):
        return False
    link = values[:, -1]  # (P,)
    return bool(values.isfinite().all() and link.min() >= 0 and link.max() < 1)


def factor_values(people, columns):
    """Columns of P rows of labels.csv as numbers, (P, E)."""
    return torch.tensor([[float(row[name]) for name in columns] for row in people])


def write_person(data, seed, i, split):
    """Write the clip of person i of a seed; return their row of labels.csv."""
    rng = np.random.default_rng([seed, i])
    name = f"id{i:05}"
    folder = make_folder(Path(data, split, name, "clip"))
    voice = sample_voice(rng)
    face = sample_face(voice, LINK, rng)
    with wave.open(str(folder / "speech.wav"), "wb") as file:
        file.setnchannels(1)
        file.setsampwidth(2)  # bytes
        file.setframerate(SAMPLE_RATE)
        file.writeframes(synth_speech(voice, rng).tobytes())
    for ms in rng.choice(1000 * CLIP_SECONDS, CLIP_IMAGES, replace=False):
        draw_face(face, rng.random()).save(folder / f"{ms}.jpg", quality=92)
    factors = {key: round(x, 4) for key, x in (voice | face).items()}
    return {"identity": name, "split": split, "link": LINK, **factors}


def make_data(args):
    """Write a synthetic corpus, equal for equal seeds; it appears once it is whole."""
    data = Path(args.folder)
    if data.exists():
        raise UserError(f"{data}: exists already, a new folder is needed")
    if args.identities < 30:
        raise UserError(f"--identities {args.identities}: must be at least 30")
    val = max(10, round(0.06 * args.identities))
    test = max(10, round(0.14 * args.identities))
    train = args.identities - val - test
    splits = np.repeat(SPLITS, [train, val, test])  # (P,)
    with tempfile.TemporaryDirectory(dir=make_folder(data.parent)) as scratch:
        unfinished = Path(scratch, data.name)
        write = functools.partial(write_person, unfinished, args.seed)
        with ProcessPoolExecutor() as pool:
            rows = list(pool.map(write, range(args.identities), splits))
        with open(unfinished / "labels.csv", "w", encoding="utf8", newline="") as file:
            writer = csv.DictWriter(file, rows[0])
            writer.writeheader()
            writer.writerows(rows)
        try:
            unfinished.rename(data)
        except OSError as error:
            raise UserError(f"{data}: cannot be made: {error.strerror}") from error
    print(f"{data}: {args.identities} identities")


# ==== 8. Plumbing: device and processes, checkpoints, resume, log =====================

MAY_CHANGE = {"out", "device", "workers", "save_every", "log_every", "resume"}


def find_device(name):
    """The torch.device of this name; "auto" is a GPU where there is one."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    with explain(f"--device {name}: not here, use cpu or auto"):
        if name == "cuda":  # under torchrun each process has its own
            torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
        return torch.zeros(1, device=name).device


class Run:
    """A training in --out: device, corpus and batches, checkpoints and log.

    Under torchrun each process has its own batches, and GPU if there is one. The first
    one tests and writes.
    """

    def __init__(self, cfg):
        self.cfg = cfg
        cfg.data = str(Path(cfg.data))  # d/ becomes d, which --resume compares
        self.folder = Path(cfg.out)
        self.device = find_device(cfg.device)
        if RANK == 0 and cfg.data == SYNTHETIC and not Path(cfg.data).exists():
            make_data(parse(["make-data", cfg.data]))
        if WORLD_SIZE > 1:  # a day: the others wait while the first makes data or tests
            distributed.init_process_group(timeout=datetime.timedelta(days=1))
        self.corpus = open_corpus(cfg.data, {"train": cfg.batch, "val": 2, "test": 2})
        # Both are only saved, so that --resume can compare them.
        cfg.processes = WORLD_SIZE
        cfg.people = len(self.corpus["train"].names)
        self.step = 0  # the last one in the checkpoint, later in the log
        self.lines = []  # of the log
        self.sums = Counter()  # of the values since the last line of the log
        self.since = time.perf_counter()
        torch.manual_seed(cfg.seed)

    def resume(self, parts):
        """Load OUT/last.pt into parts, as --resume asks, or claim OUT for a new run.

        Returns the checkpoint, {} for a new run.
        """
        state = {}
        last = self.folder / "last.pt"
        if self.cfg.resume and last.exists():
            state = load_checkpoint(last, self.cfg.command, self.device)
            before = state["settings"]
            for key, value in vars(self.cfg).items():
                if key not in MAY_CHANGE and before.get(key) != value:
                    raise UserError(f"{last} is of a run with {key} {before.get(key)}")
            with explain(f"{last}: not whole, or of another version of this file"):
                for key, part in parts.items():
                    part.load_state_dict(state[key])
            self.step = state["step"]
            self.lines = state["log"]
        if RANK == 0:
            self.start_log()
        return state

    def start_log(self):
        """Claim OUT by its log.jsonl, which a resumed run cuts to its checkpoint."""
        log = make_folder(self.folder) / "log.jsonl"
        taken = log.exists() or any(self.folder.glob("*.pt"))
        if taken and not self.cfg.resume:
            raise UserError(f"{self.folder}: holds a run; name another, or --resume")
        with log.open("w" if taken else "x") as file:  # x fails if a file is there
            file.writelines(self.lines)

    def batches(self, cfg):
        """Yield step, random generator, speech and faces of the steps that are left.

        cfg tells the sizes. All depends on seed, step, process and number of processes
        alone: a resumed run draws what it would have drawn.
        """
        seed = self.cfg.seed
        pairs = PairDataset(self.corpus["train"], cfg, self.cfg.batch, seed, True)
        first = self.step * WORLD_SIZE + RANK
        numbers = range(first, self.cfg.steps * WORLD_SIZE, WORLD_SIZE)  # of batches
        batches = load_batches(pairs, numbers, self.cfg.workers, self.device)
        # numbers first: with none left (a finished run is resumed) zip stops before it
        # asks load_batches, which would find too few people.
        for number, (speech, faces, _) in zip(numbers, batches):
            # 10^7 batches a seed; torch's generator takes only 32 bits of this number.
            rng = make_rng(seed * 10**7 + number)
            yield number // WORLD_SIZE + 1, rng, speech, faces

    def is_due(self, step, every):
        """True in the first process at each `every`-th step and at the last one."""
        return RANK == 0 and (step % every == 0 or step == self.cfg.steps)

    def log(self, step, **values):
        """Every --log-every steps print the means since, and add them to log.jsonl."""
        for name, value in values.items():
            self.sums[name] += value.detach()  # stays on the device
        if not self.is_due(step, self.cfg.log_every):
            return
        steps = step - self.step
        seconds = time.perf_counter() - self.since
        line = {"step": step}
        line |= {name: rounded(total / steps) for name, total in self.sums.items()}
        line["clips_per_s"] = rounded(steps * self.cfg.batch * WORLD_SIZE / seconds)
        left = (self.cfg.steps - step) * seconds / steps
        texts = [f"{name} {value} " for name, value in line.items()]
        print(*texts, f"{left:.0f} s left", flush=True)
        self.lines.append(json.dumps(line) + "\n")
        path = self.folder / "log.jsonl"
        with explain(f"{path}: cannot be written"), path.open("a") as file:
            file.write(self.lines[-1])
        self.step = step
        self.sums.clear()
        self.since = time.perf_counter()

    def save(self, name, parts, step, **more):
        """Write a temporary file, then rename it: a kill leaves no half checkpoint."""
        path = self.folder / name
        state = {"settings": vars(self.cfg), "step": step, "log": self.lines, **more}
        for key, part in parts.items():
            state[key] = part.state_dict()
        if not all(x.isfinite().all() for x in state["model"].values()):
            raise UserError(
                f"step {step}: weights are NaN, the run diverged; try a lower --lr"
            )
        with explain(f"{path}: cannot be written; --resume its last whole version"):
            torch.save(state, f"{path}.part")
            os.replace(f"{path}.part", path)


def distribute(network):
    """The network to train with: under torchrun one that averages gradients."""
    if WORLD_SIZE == 1:
        return network
    return nn.parallel.DistributedDataParallel(network)


def load_checkpoint(path, command, device):
    """The dict that a training by this command saved at path."""
    with explain(f"{path}: no checkpoint, or damaged; trainings write them"):
        state = torch.load(path, map_location=device, weights_only=True)  # runs no code
        found = state["settings"]["command"]
    if found != command:
        raise UserError(f"{path}: a checkpoint of {found}, one of {command} is needed")
    return state


def load_model(path, command, device, size=None):
    """The trained networks of a checkpoint, for faces of this size, in eval mode."""
    state = load_checkpoint(path, command, device)
    settings = state["settings"]  # gan-train's have stage_one and width, for G
    cfg = argparse.Namespace(**settings.get("stage_one", settings))
    if size and cfg.size != size:
        raise UserError(f"{path}: has --size {cfg.size}, {size} is needed")
    with explain(f"{path}: of another version of this file; train anew"):
        model = Model(cfg, device, settings.get("width"))
        model.load_state_dict(state["model"])
    return model.eval()


def make_folder(path):
    """The folder `path`, made if missing."""
    folder = Path(path)
    folder.mkdir(parents=True, exist_ok=True)
    return folder


# ==== 9. Command line =================================================================

MATCH_TEST_SETTINGS = {
    **TEST_SETTINGS,
    "--match": GAN_SETTINGS["--match"],
    "--split": ("test", "part of the corpus", *SPLITS),
    "--out": ("runs/match-test", "folder for metrics.json"),
}
GAN_TEST_SETTINGS = {
    **TEST_SETTINGS,
    "--gan": ("runs/gan/last.pt", "checkpoint of gan-train"),
    "--judge": ("", "checkpoint of a match-train: its S and F make the tables"),
    "--other": ("", "checkpoint of a gan-train to compare with [paper §4]"),
    "--out": ("runs/gan/report", "folder for report.md, figures, metrics.json"),
}
GENERATE_SETTINGS = {
    "speech": (None, "recordings"),
    "--gan": GAN_TEST_SETTINGS["--gan"],
    "-n": (8, "faces per recording"),
    "--seed": SEED,
    "--device": DEVICE,
    "--out": ("faces.png", "NAME.png: a labelled grid; else a folder of PNGs"),
}
MAKE_DATA_SETTINGS = {
    "folder": (None, "where to write the corpus"),
    "--seed": SEED,
    "--identities": (2400, "people; 0.06 of them validate, 0.14 test"),
}
CHECK_DATA_SETTINGS = {
    "folder": (None, "a corpus"),
    "--k": (10, "identities that each split needs"),
}
COMMANDS = {
    "match-train": (match_train, MATCH_SETTINGS),
    "gan-train": (gan_train, GAN_SETTINGS),
    "match-test": (match_test, MATCH_TEST_SETTINGS),
    "gan-test": (gan_test, GAN_TEST_SETTINGS),
    "generate": (generate, GENERATE_SETTINGS),
    "make-data": (make_data, MAKE_DATA_SETTINGS),
    "check-data": (check_data, CHECK_DATA_SETTINGS),
}


class Parser(argparse.ArgumentParser):
    """An argparse parser that reports errors as UserErrors, in one line."""

    def error(self, message):  # in place of argparse's
        """Raise a UserError."""
        raise UserError(message)


def add_setting(parser, flag, default, meaning, *choices):
    """Add a setting to a parser: as a flag, or by position if it has no default."""
    if default is None:
        parser.add_argument(flag, nargs="+" if flag == "speech" else None, help=meaning)
    elif default is False:
        parser.add_argument(flag, action="store_true", help=meaning)
    else:
        value_type = type(default)
        text = f"{meaning} (default: {default})"
        parser.add_argument(
            flag, type=value_type, choices=choices or None, default=default, help=text
        )


def parse(argv):
    """The settings of a command line.

    Raises UserError for NaN, a negative number, or a count of 0.
    """
    parser = Parser()
    commands = parser.add_subparsers(dest="command", required=True)
    for command, (function, settings) in COMMANDS.items():
        summary = function.__doc__
        subparser = commands.add_parser(command, help=summary, description=summary)
        for flag, setting in settings.items():
            add_setting(subparser, flag, *setting)
    cfg = parser.parse_args(argv)
    if getattr(cfg, "preset", "") == "paper":
        command, *flags = argv  # a flag of the user's comes last, so it counts
        cfg = parser.parse_args([command, *PAPER_PRESET[command].split(), *flags])
    _, settings = COMMANDS[cfg.command]
    for flag, (default, *_) in settings.items():
        value = getattr(cfg, flag.lstrip("-").replace("-", "_"))
        least = 1 if type(default) is int and default > 0 else 0  # 1 for counts
        if type(value) in (int, float) and not least <= value < 2**32:
            raise UserError(f"{flag} {value}: allowed are {least} to 2^32 - 1")
    return cfg


def main(argv):
    """Run a command; exit code 0, 1 faulty corpus, 2 reported error, 130 Ctrl-C."""
    if RANK > 0:
        sys.stdout = None  # the first process speaks
    try:
        cfg = parse(argv)
        function, _ = COMMANDS[cfg.command]
        return function(cfg) or 0
    except (UserError, OSError) as error:
        problem = error
    except KeyboardInterrupt:
        print("voice2face: stopped; --resume continues a training", file=sys.stderr)
        return 130
    except (MemoryError, RuntimeError) as error:
        # ( and . match what repr puts before DataLoader's message: a bracket, a quote.
        if not re.search(
            r"MemoryError|allocate memory|\(.DataLoader|ProcessPool", repr(error)
        ):
            raise
        problem = "out of memory, or a loader process died or hangs: try smaller sizes "
        problem += "or --batch, fewer --workers, a larger /dev/shm (docker: --shm-size)"
    print(f"voice2face: error: {problem}", file=sys.stderr)
    return 2


if __name__ == "__main__":
    if hasattr(sys.stdout, "reconfigure"):  # not in a notebook, nor where it is closed
        sys.stdout.reconfigure(errors="backslashreplace")  # not every console has UTF-8
    exit_code = main(sys.argv[1:])
    if distributed.is_initialized():  # gloo can crash at a normal exit
        print(end="", flush=True)
        os._exit(exit_code)
    sys.exit(exit_code)
