# /// script
# requires-python = ">=3.10"
# dependencies = ["torch==2.11.0", "torchaudio==2.11.0", "numpy", "pillow>=10.1"]
# ///
"""voice2face: learn which face belongs to which voice, and draw faces for a voice, without a label.

A reference implementation of "From Inference to Generation: End-to-end Fully Self-supervised
Generation of Human Face from Speech" (Choi, Park, Lee; ICLR 2020) in one file: both stages (paper
§3) and the figures and tables of its §4.

The idea   A speech encoder S reads the raw waveform, a face encoder F reads a picture, and both
           answer with a point of one space. Speech and face of one clip must agree better than
           speech and face of different clips: this is the only supervision, and it costs no label.
           A corpus with several clips per person, as VoxCeleb, also says which clips are no
           negatives of each other; the paper calls that case not strictly self-supervised.
           Then a generator G draws a face from c = S(s), what the voice tells, and z, noise that
           stands for all it does not tell. Its opponent D starts from F, so it knows from the first
           step which face fits which voice, and has yet to learn which are drawn.

Map        1. Settings          the numbers a user may change, their meaning and their source
           2. Data              a folder of clips -> batches of (speech, face); checks of the folder
           3. Synthetic corpus  people with known factors, so that all of it runs without any data
           4. Inference         SincConv, SpeechEncoder S, FaceEncoder F, the K-way loss (Eq. 1)
           5. Generation        AdaIN, Generator G, Discriminator D (Eq. 2, 3), losses (Eq. 4 to 6)
           6. Training          both stages; checkpoints, --resume, torchrun
           7. Analyses          K-way tests and their ceiling (Tables 1, 2), QTA 1 to 3, pictures,
                                what c and z control
           8. Command line

Glossary   paper  here        shape          meaning
           s      speech      (B, T)         waveforms, 16 kHz, in [-1, 1]
           f      faces       (B, 3, H, W)   pictures, RGB, in [-1, 1]; fakes are drawn ones
           se     S(speech)   (B, D)         speech embeddings
           fe     F(faces)    (B, D)         face embeddings
           K      k                          a matching task's candidates: 1 positive, K-1 negatives
           V-F    "v-f"                      given a voice, pick its face; F-V is the reverse
           c, c+  c           (B, D)         the condition: se of the voice that goes with the face
           c-     wrong       (B, D)         that of somebody else's voice
           z      z           (B, D)         Gaussian noise
           phi    phi(faces)  (B, D)         face embeddings by the copy of F inside D
           psi    psi         (B,)           what D thinks of a face whatever the voice
           One letter per dimension: B clips, K candidates, T samples, L frames, C channels, N taps
           of a filter, H W pixels, D = 128 embedding; in section 7 N clips, P people, Q queries, G
           gallery faces, V voices, Z noises, E numbers that describe a face's factors.
           In code F is torch.nn.functional.

Sources    [paper §x]; [PASE] Pascual et al. 2019; [SincNet] Ravanelli and Bengio 2018; [SNGAN]
           Miyato and Koyama 2018; [StyleGAN], [StyleGAN2] Karras et al. 2019, 2020; [R1] Mescheder
           et al. 2018; [ours] where the paper is silent. Where this differs, and why:
           - all embeddings have one length, so Eq. 1's inner product is a cosine times a constant;
             with free lengths the loss stays on a plateau at first (`to_length`, `centre_head`);
           - a clip's K-1 negatives come from its own batch: whatever K is, a step encodes each clip
             once (`draw_candidates`);
           - the waveform's loudness is divided out, being the microphone's (`SpeechEncoder`);
           - the face encoder has no spectral norm, and a learned 1x1 layer in every shortcut;
           - a test run draws fresh windows and frames beside fresh negatives;
           - <c, phi> has a weight below 1, and G reads a short c, in both presets: otherwise all of
             a face follows c, and z is ignored (`Discriminator`, `Generator`);
           - psi reads what phi's head reads, in the paper phi(f); AdaIN's style, which the paper
             leaves open, is [z, c] (same places);
           - of the text that we have only Eq. 2 is whole; how we read Eq. 5 is in `relid_loss`;
           - the preset `small` hears 1.5 s and sees 64x64 pixels through narrower layers, its sinc
             layer with stride 8, to fit a CPU.
           As in the paper, match-train learns with SGD, gan-train with Adam.

Commands   python voice2face.py match-train        train S and F on a synthetic corpus unless --data
           python voice2face.py match-test         test a trained pair in both directions
           python voice2face.py gan-train          train G and D on a trained pair
           python voice2face.py gan-test           write a report with all of section 4
           python voice2face.py generate A.wav     draw faces for a recording
           python voice2face.py make-data DIR      write the synthetic corpus
           python voice2face.py check-data DIR     read every file of a corpus, list what is wrong
"""

import argparse
import colorsys
import concurrent.futures
import copy
import csv
import datetime
import functools
import itertools
import json
import math
import os
import signal
import struct
import sys
import tempfile
import time
import wave
import zipfile
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torchaudio
from PIL import Image, ImageChops, ImageDraw, ImageFont, ImageOps
from torch import distributed, nn
from torch.nn import functional as F

RATE = 16000  # samples per second of every waveform [PASE]
EMBED = 128  # D [paper §3.2]
SPLITS = ("train", "val", "test")
PRESETS, DIRECTIONS = ("small", "paper"), ("v-f", "f-v")
SYNTHETIC = "data/synthetic"  # the one corpus that match-train makes by itself


class UserError(ValueError):
    """A mistake that the user can mend: one line on stderr and exit code 2."""


# ==== 1. Settings: every field is a flag, and --help shows its meaning, source and default ========


def setting(default, meaning, source="[ours]", low=None, choices=None):
    """A dataclass field with --help text and allowed values: at least `low` or one of `choices`."""
    return field(default=default,
                 metadata=dict(help=f"{meaning} {source}", low=low, choices=choices))


@dataclass
class MatchSettings:
    """Settings of match-train; the defaults are the preset `small`."""

    data: str = setting(SYNTHETIC, "corpus folder; this default is made when missing")
    out: str = setting("runs/match", "run folder: checkpoints, log, metrics")
    preset: str = setting("small", "small: two CPU cores; paper: its scale", choices=PRESETS)
    direction: str = setting("v-f", "v-f: learn to pick a face for a voice; f-v: the reverse",
                             "[paper §3.1]", choices=DIRECTIONS)
    k: int = setting(10, "candidates of a matching task in training", "[paper §4]", low=2)
    steps: int = setting(1500, "training steps", low=1)
    batch: int = setting(32, "clips per step and process, at least K", low=2)
    seed: int = setting(0, "seed of weights, batches and candidates", low=0)
    device: str = setting("auto", "cpu, cuda, cuda:1, ...; auto is cuda where there is one")
    workers: int = setting(1, "loader processes; 0 loads in the training process", low=0)
    seconds: float = setting(1.5, "length of a speech window; 6 in [paper §4]")
    size: int = setting(64, "side of a face in pixels; 128 in [paper §2]", choices=(32, 64, 128))
    sinc_stride: int = setting(8, "stride of the sinc layer; 1 in [PASE]", low=1)
    speech_width: int = setting(16, "sinc filters, the unit of all widths; 64 in [PASE]", low=1)
    face_width: int = setting(16, "channels of block 1, unit of all widths; 64 in [SNGAN]", low=1)
    length: float = setting(3.5, "length of an embedding; its square is the largest logit", low=0.1)
    lr: float = setting(0.05, "peak learning rate of SGD", low=0)
    sinc_lr: float = setting(1e4, "that of the sinc cut-offs, being in Hz, in units of lr", low=0)
    momentum: float = setting(0.9, "momentum of SGD", low=0)
    weight_decay: float = setting(1e-4, "weight decay of SGD, but for the sinc cut-offs", low=0)
    max_norm: float = setting(1.0, "length to which longer gradients are cut", low=1e-6)
    runs: int = setting(5, "runs of the final test, each with fresh negatives", "[paper §4]", low=1)
    eval_every: int = setting(300, "steps between validations", low=1)
    save_every: int = setting(100, "steps between checkpoints; each validation has one", low=1)
    resume: bool = setting(False, "go on with the run in --out, if there is one")
    log_every: int = setting(50, "steps between log lines", low=1)


@dataclass
class GanSettings:
    """Settings of gan-train; the defaults are the preset `small`."""

    data: str = setting(SYNTHETIC, "corpus folder; this default is made when missing")
    match: str = setting("runs/match/best.pt", "checkpoint of match-train: S, F and their sizes")
    out: str = setting("runs/gan", "run folder: checkpoint, log, samples, metrics")
    preset: str = setting("small", "small: two CPU cores; paper: its scale", choices=PRESETS)
    loss: str = setting("relid", "relid: Eq. 5; rel: Eq. 4, without mismatched identities",
                        "[paper §3.2]", choices=("relid", "rel"))
    steps: int = setting(5000, "training steps, each one of D and one of G", low=1)
    batch: int = setting(8, "real faces per step and process", low=2)
    seed: int = setting(0, "seed of weights, batches, z and c-", low=0)
    device: str = setting("auto", "cpu, cuda, cuda:1, ...; auto is cuda where there is one")
    workers: int = setting(1, "loader processes; 0 loads in the training process", low=0)
    width: int = setting(16, "channels of G's last block, unit of all widths; 64 in [SNGAN]", low=1)
    c_length: float = setting(1.0, "length of c as G reads it; z has about sqrt(128)", low=1e-6)
    weight: float = setting(0.08, "of <c, phi(f)> beside psi; 1 in the paper", low=0)
    lr: float = setting(2e-3, "learning rate of G's Adam", low=0)
    d_lr: float = setting(1e-3, "learning rate of D's Adam", low=0)
    beta1: float = setting(0.0, "Adam's decay of the mean gradient", "[StyleGAN]", low=0)
    beta2: float = setting(0.99, "Adam's decay of the squared gradient", "[StyleGAN]", low=0)
    gamma: float = setting(1.0, "R1: gamma/2 E |grad_f g(f, c+)|^2 on real faces", low=0)
    r1_every: int = setting(16, "R1 is computed each n-th step, times n", "[StyleGAN2]", low=1)
    decay: float = setting(0.998, "of the running average of G, which is what is tested", low=0)
    runs: int = setting(5, "final test's runs, each with new z and negatives", "[paper §4]", low=1)
    eval_every: int = setting(500, "steps between validations and samples", low=1)
    save_every: int = setting(100, "steps between checkpoints; each validation has one", low=1)
    resume: bool = setting(False, "go on with the run in --out, if there is one")
    log_every: int = setting(100, "steps between log lines", low=1)


BIG = dict(batch=64, steps=200_000, eval_every=2000, save_every=1000, log_every=100, workers=8)
PAPER = {  # the presets `paper`: sizes as in the sources above, BIG and the rates [ours]
    "match-train": BIG | dict(seconds=6.0, size=128, sinc_stride=1, speech_width=64, face_width=64),
    "gan-train": BIG | dict(width=64, lr=2e-4, d_lr=2e-4, decay=0.999)}


@dataclass
class GenerateSettings:
    """Settings of generate."""

    gan: str = setting("runs/gan/last.pt", "checkpoint of gan-train")
    n: int = setting(8, "faces per recording", low=1)
    seed: int = setting(0, "seed of z and of the window of long recordings", low=0)
    out: str = setting("faces.png", "the picture: a row per recording, a column per z")
    device: str = setting("auto", "cpu, cuda, cuda:1, ...; auto is cuda where there is one")


@dataclass
class TestSettings:
    """Settings of match-test."""

    data: str = setting(SYNTHETIC, "corpus folder")
    match: str = setting("runs/match/best.pt", "checkpoint of match-train")
    out: str = setting("runs/match-test", "folder for metrics.json")
    split: str = setting("test", "part of the corpus", choices=SPLITS)
    runs: int = setting(5, "runs, each with fresh negatives", "[paper §4]", low=1)
    batch: int = setting(32, "clips encoded at once", low=1)
    seed: int = setting(0, "seed of windows and negatives", low=0)
    device: str = setting("auto", "cpu, cuda, cuda:1, ...; auto is cuda where there is one")
    workers: int = setting(1, "loader processes; 0 loads in this process", low=0)


@dataclass
class ReportSettings:
    """Settings of gan-test."""

    data: str = setting(SYNTHETIC, "corpus folder: its split `test`, and `train` for the probe")
    gan: str = setting("runs/gan/last.pt", "checkpoint of gan-train")
    versus: str = setting("", "checkpoint of a second one on the same encoders, as by --loss rel")
    out: str = setting("runs/gan/report", "folder for report.md, its pictures and metrics.json")
    gallery: int = setting(5000, "maximum number of faces to retrieve from", "[paper §4]", low=2)
    each: int = setting(1, "maximum number of them of one person", low=1)
    couples: int = setting(2000, "pairs of voices whose distances are compared", low=10)
    runs: int = setting(5, "runs, each with fresh z and negatives", "[paper §4]", low=2)
    seed: int = setting(0, "seed of windows, z and negatives", low=0)
    device: str = setting("auto", "cpu, cuda, cuda:1, ...; auto is cuda where there is one")
    workers: int = setting(1, "loader processes; 0 loads in this process", low=0)


@dataclass
class MakeSettings:
    """Settings of make-data."""

    identities: int = setting(1000, "people: 80 % for training, 6 % validation, 14 % test", low=30)
    seed: int = setting(0, "seed of every factor", low=0)


@dataclass
class CheckSettings:
    """Settings of check-data."""

    k: int = setting(10, "identities that every split must hold: the K of match-train", low=2)


# ==== 2. Data: DATA/{train,val,test}/<identity>/<clip>/*.wav *.jpg, DATA/labels.csv   [ours] ======
# A face named by a whole number, 1200.jpg, was taken 1200 ms into its clip's recording: the speech
# that it is paired with then leaves that moment out. A face of any other name goes with any speech.

SPEECH_FILES = (".wav", ".flac", ".mp3", ".m4a", ".aac", ".ogg", ".opus", ".wma")
FACE_FILES = (".jpg", ".jpeg", ".png")
MIN_SIDE = 32  # pixels; a smaller face is a fault [ours]
MIN_RATE, MAX_RATE = 4000, 192_000  # Hz [ours]
MAX_SAMPLE = 100.0  # where full scale is 1; a float recording beyond it is a fault [ours]
SILENCE = 1e-4  # of 1; a recording that never gets louder is a fault [ours]
MAX_FAULTS = 0.01  # share of the samples that may turn out unreadable before a run ends [ours]


class Clip(NamedTuple):
    """One recording: its folder and the names of its speech and face files; one may be empty."""

    folder: str
    speech: tuple
    faces: tuple


def subfolders(folder):
    """{name: path} of the folders in a folder, sorted."""
    found = sorted(os.scandir(folder), key=lambda e: e.name)
    return {e.name: e.path for e in found if e.is_dir() and not e.name.startswith(".")}


def list_clips(folder):
    """The clips of one identity, by listing its folder alone."""
    clips = []
    for path in subfolders(folder).values():
        names = sorted(name for name in os.listdir(path) if not name.startswith("."))
        clip = Clip(path, tuple(name for name in names if name.lower().endswith(SPEECH_FILES)),
                    tuple(name for name in names if name.lower().endswith(FACE_FILES)))
        if clip.speech or clip.faces:
            clips.append(clip)
    return clips


def scan_corpus(data, k, splits=SPLITS):
    """A corpus by structure, no file opened: {split: {identity: [Clip]}} and a list of faults."""
    if not Path(data).is_dir():
        return {}, [f"{data}: no such folder; a corpus is {data}/{{train,val,test}}/"
                    "<identity>/<clip>/ with *.wav and *.jpg"]
    corpus, faults, home = {}, [], {}
    for split in splits:
        folder = Path(data, split)
        if not folder.is_dir():
            faults.append(f"{folder}: split missing; needed are the folders {', '.join(splits)}")
            continue
        corpus[split] = {name: list_clips(path) for name, path in subfolders(folder).items()}
        if len(corpus[split]) < k:
            faults.append(f"{folder}: {len(corpus[split])} identities, at least K = {k} are needed")
        for name, clips in corpus[split].items():
            for part, kinds in (("speech", SPEECH_FILES), ("faces", FACE_FILES)):
                if not any(getattr(clip, part) for clip in clips):
                    faults.append(f"{folder / name}: identity without {part}; "
                                  f"looked for {' '.join(kinds)} in its clip folders")
            if name in home:
                faults.append(f"{folder / name}: identity is also in {home[name]}; one split only")
            home[name] = split
    return corpus, faults


def open_corpus(data, k, splits=SPLITS):
    """{split: {identity: [Clip]}}; raises UserError at a structural fault."""
    corpus, faults = scan_corpus(data, k, splits)
    if faults:
        more = f" (and {len(faults) - 1} more faults: run check-data)" if len(faults) > 1 else ""
        raise UserError(faults[0] + more)
    return corpus


def read_labels(data):
    """labels.csv as {identity: {column: text}}; {} where there is none. Training never sees it."""
    path = Path(data, "labels.csv")
    if not path.exists():
        return {}
    try:
        with open(path, newline="", encoding="utf-8-sig") as f:
            rows = list(csv.DictReader(f))
    except (UnicodeDecodeError, csv.Error) as e:
        raise UserError(f"{path}: not a CSV file in UTF-8 ({e})") from e
    if rows and "identity" not in rows[0]:
        raise UserError(f"{path}: needs a column 'identity', found {', '.join(map(str, rows[0]))}")
    return {row["identity"]: row for row in rows}


WAV_TYPES = {(1, 8): "u1", (1, 16): "<i2", (1, 24): "<i4", (1, 32): "<i4",  # PCM
             (3, 32): "<f4", (3, 64): "<f8"}  # float; (format, bits) -> NumPy's type


def read_wav(path, choose):
    """Samples (T,) of a WAV file, mono, and its rate; only what `choose` asks for is read.

    choose: see read_speech. Raises LookupError for what is neither PCM nor float.

    The standard library's reader refuses float and, before Python 3.12, multi-channel 24-bit files.
    """
    with open(path, "rb") as f:
        riff, kind = f.read(12), None
        if riff[:4] + riff[8:] != b"RIFFWAVE":
            raise ValueError("not a WAV file")
        while len(head := f.read(8)) == 8 and head[:4] != b"data":
            size = struct.unpack("<4xI", head)[0]
            body = f.read(size + size % 2)
            if head[:4] == b"fmt ":
                code, channels, rate, bits = struct.unpack("<HHI6xH", body[:16])
                kind = (struct.unpack("<24xH", body[:26])[0] if code == 0xFFFE else code), bits
        if len(head) < 8 or not kind:
            raise ValueError("WAV file without samples")
        if kind not in WAV_TYPES or not channels:
            raise LookupError(f"WAV format {kind[0]} with {bits} bits is neither PCM nor float")
        left = os.fstat(f.fileno()).st_size - f.tell()  # a stream's header has no true size
        size, width = min(struct.unpack("<4xI", head)[0], left), channels * bits // 8  # bytes
        start, stop = choose(size // width, rate)
        f.seek(start * width, os.SEEK_CUR)
        raw = f.read((stop - start) * width)
    if kind == (1, 24):  # put each 3 bytes on top of a zero byte: 32 bits
        raw = np.insert(np.frombuffer(raw, np.uint8).reshape(-1, 3), 0, 0, axis=1).tobytes()
    x = np.frombuffer(raw, WAV_TYPES[kind])
    if x.dtype == np.uint8:
        x = x.astype(np.float32) / 128 - 1  # 8 bits are unsigned
    elif x.dtype.kind == "i":
        x = x / np.float32(2 ** (8 * x.itemsize - 1))
    return x.reshape(-1, channels).mean(1, dtype=np.float32), rate


def read_other(path, choose):
    """read_wav for every other format: decoded whole by torchaudio with torchcodec and FFmpeg."""
    try:
        x, rate = torchaudio.load(path)  # (channels, T)
    except ImportError as e:
        raise ValueError("this format needs a decoder: pip install torchcodec and install FFmpeg, "
                         "or convert the file: ffmpeg -i IN OUT.wav") from e
    start, stop = choose(x.shape[1], rate)
    return x[:, start:stop].mean(0).numpy(), rate


def read_speech(path, choose=lambda length, rate: (0, length)):
    """Samples (T,) of a recording, mono, float32, full scale 1, and its rate in Hz.

    choose(length, rate) -> (start, stop) says which samples, all by default. Raises ValueError with
    the path where they are of no use: undecodable, none, NaN, far too loud, an unlikely rate.
    """
    try:
        try:
            x, rate = (read_wav if path.lower().endswith(".wav") else read_other)(path, choose)
        except LookupError:  # mu-law and the like
            x, rate = read_other(path, choose)
    except Exception as e:  # on a damaged file a decoder raises nearly anything
        raise ValueError(f"{path}: {' '.join(str(e).split())}") from e
    if not len(x):
        raise ValueError(f"{path}: no speech in it, or none beside its face's time")
    if not (np.abs(x) < MAX_SAMPLE).all():  # false for NaN, too
        raise ValueError(f"{path}: speech with NaN or samples far outside -1 ... 1")
    if not MIN_RATE <= rate <= MAX_RATE:
        raise ValueError(f"{path}: {rate} Hz, allowed are {MIN_RATE} to {MAX_RATE}")
    return x, rate


@functools.lru_cache
def resampler(rate):
    """torchaudio's resampler to 16 kHz, in steps of 25 Hz [ours]: else thousands of filters."""
    return torchaudio.transforms.Resample(round(rate / 25) * 25, RATE)


def draw_window(length, window, moment, rng):
    """(start, stop) of a part of a recording that leaves out a moment (None: any part), in samples.

    All windows that fit before or after the moment are equally likely; where none fits, it is the
    longer side as a whole [paper §4: speech and face from different time frames].
    """
    moment = length if moment is None else min(moment, length)
    sides = [(0, moment), (min(moment + 1, length), length)]
    fits = [max(0, stop - start - window + 1) for start, stop in sides]  # windows inside each side
    if not sum(fits):
        return max(sides, key=lambda side: side[1] - side[0])
    i = int(rng.integers(sum(fits)))
    start = i if i < fits[0] else sides[1][0] + i - fits[0]
    return start, start + window


def load_speech(path, seconds, rng, moment=None):
    """A window of a recording, float32 (T,), T = 16000 seconds, that leaves out `moment` (ms).

    Shorter speech is repeated, longer cut at a random place [paper §4]. Raises as read_speech does.
    """
    def choose(length, rate):
        skip = None if moment is None else moment * rate // 1000
        return draw_window(length, math.ceil(seconds * rate), skip, rng)

    x, rate = read_speech(path, choose)
    if rate != RATE:
        x = resampler(rate)(torch.from_numpy(x)).numpy()
    return np.resize(x, round(seconds * RATE))  # np.resize repeats or cuts


def load_face(path, size=None, flip=False):
    """A face, uint8 (H, W, 3): upright, RGB, its central square resized to `size` (None: as it is).

    Raises ValueError with the path where it cannot be decoded or has a side under 32 pixels.
    """
    try:
        with Image.open(path) as image:
            if size:
                image.draft("RGB", (size, size))  # decodes a large JPEG at a fraction of its size
            if image.mode.startswith("I"):  # 16 bits a pixel
                image = Image.fromarray(np.uint8(np.asarray(image) >> 8))
            face = ImageOps.exif_transpose(image).convert("RGB")
    except Exception as e:  # on a damaged file a decoder raises nearly anything
        raise ValueError(f"{path}: not a readable picture ({e})") from e
    if min(face.size) < MIN_SIDE:
        raise ValueError(f"{path}: {face.width}x{face.height} pixels, "
                         f"at least {MIN_SIDE} a side needed")
    if size:
        face = ImageOps.fit(face, (size, size), Image.Resampling.BILINEAR)
    return np.array(ImageOps.mirror(face) if flip else face)


class Batch(NamedTuple):
    """Positive pairs as the loader gives them."""

    speech: torch.Tensor  # (B, T) float32
    faces: torch.Tensor  # (B, H, W, 3) uint8; to_device makes them (B, 3, H, W) in [-1, 1]
    identity: torch.Tensor  # (B,) int64, equal where two pairs are of one person
    faults: list  # of unreadable files; all else is None where nothing could replace them


class Pairs:
    """Batches of positive pairs: pairs[i] is batch i, fixed by seed, i and number of processes.

    With shuffle, for training [ours]: a random clip each of B different people, dealt anew when
    they no longer fill a batch, faces flipped at random. Without, for tests: clips from i * B on.
    """

    def __init__(self, people, seconds, size, batch, seed, shuffle):
        self.names, self.clips = list(people), list(people.values())
        self.every = [(i, clip) for i, clips in enumerate(self.clips) for clip in clips]
        self.seconds, self.size, self.batch = seconds, size, batch
        self.seed, self.shuffle = seed, shuffle

    def __len__(self):
        return math.ceil(len(self.every) / self.batch)

    def plan(self, i):
        """[(person, clip)] of batch i; clip None stands for a random one."""
        if not self.shuffle:
            return self.every[i * self.batch:(i + 1) * self.batch]
        count = processes()[1]  # each takes a batch, of other people if there are enough
        per_epoch = max(1, len(self.clips) // (count * self.batch) * count)
        order = np.random.default_rng([self.seed, i // per_epoch]).permutation(len(self.clips))
        first = i % per_epoch * self.batch
        people = np.resize(order[first:first + self.batch], self.batch)  # repeats a small corpus
        return [(int(person), None) for person in people]

    def substitutes(self, person, used, rng):
        """Who may stand in for an unreadable pair: the person, then others, strangers first."""
        if len(self.clips[person]) > 1:
            yield from [(person, None)] * 5
        order = rng.permutation(len(self.clips)).tolist()
        yield from ((p, None) for p in sorted(order, key=lambda p: p in used)[:20])

    def __getitem__(self, i):
        plan, rows, faults = self.plan(i), [], []
        used = {person for person, _ in plan}
        for n, wanted in enumerate(plan, start=i * self.batch):
            rng = np.random.default_rng([self.seed, n, 1])
            for person, clip in itertools.chain([wanted], self.substitutes(wanted[0], used, rng)):
                try:
                    rows.append((*self.load(person, clip, rng), person))
                    used.add(person)
                    break
                except ValueError as e:
                    faults.append(str(e))
            else:
                return Batch(None, None, None, faults)
        speech, faces, identity = zip(*rows)
        return Batch(torch.from_numpy(np.stack(speech)), torch.from_numpy(np.stack(faces)),
                     torch.tensor(identity), faults)

    def load(self, person, clip, rng):
        """Speech (T,) and face (H, W, 3) of one person, from one clip wherever that holds both."""
        clip = clip or pick(self.clips[person], rng)
        heard = clip if clip.speech else pick([c for c in self.clips[person] if c.speech], rng)
        seen = clip if clip.faces else pick([c for c in self.clips[person] if c.faces], rng)
        face, speech = pick(seen.faces, rng), pick(heard.speech, rng)
        moment = frame_time(face) if seen is heard else None
        flip = self.shuffle and rng.random() < 0.5
        return (load_speech(f"{heard.folder}/{speech}", self.seconds, rng, moment),
                load_face(f"{seen.folder}/{face}", self.size, flip))


def frame_time(name):
    """The time in ms that a face file's name tells, None where it is not a whole number."""
    stem = name.rpartition(".")[0]
    return int(stem) if stem.isascii() and stem.isdecimal() else None


def pick(items, rng):
    """A random one of a sequence."""
    return items[rng.integers(len(items))]


def load_batches(pairs, batches, workers):
    """An iterator over the batches of a range, made ahead by processes that stay to its end."""
    return torch.utils.data.DataLoader(
        pairs, batch_size=None, sampler=batches, num_workers=workers, worker_init_fn=heed_no_signal,
        prefetch_factor=4 if workers else None, pin_memory=torch.cuda.is_available())


def heed_no_signal(worker):
    """Ctrl-C and SIGTERM reach loader processes, too, but the training process decides."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)


def step_generator(seed, i):
    """torch's random numbers for batch i, a pure function of (seed, i): no state to lose [ours]."""
    bits = np.random.SeedSequence([seed, i, 2]).generate_state(1)  # 32: torch reads no more
    return torch.Generator().manual_seed(int(bits[0]))


def send(x, device):
    """A tensor on the device; from pinned memory, so that the host need not wait for a GPU."""
    on_gpu = torch.device(device).type == "cuda"
    return x.pin_memory().to(device, non_blocking=True) if on_gpu else x.to(device)


def to_device(batch, device):
    """speech (B, T) and faces (B, 3, H, W) in [-1, 1] of a batch, on the device."""
    return send(batch.speech, device), to_pixels(batch.faces, device)


def to_pixels(faces, device):
    """Faces uint8 (B, H, W, 3) as (B, 3, H, W) in [-1, 1], on the device, channels last."""
    return send(faces, device).permute(0, 3, 1, 2).float() / 127.5 - 1  # -> (B, 3, H, W)


class FaultCounter:
    """Names replaced files; ends a run at over 10 and 1 % of samples, or where none replaces."""

    def __init__(self):
        self.seen = self.faults = 0

    def add(self, batch):
        """Count a batch; raises UserError when there were too many faults."""
        for fault in batch.faults if batch.speech is not None else ():
            print(f"replaced by another sample: {fault}", file=sys.stderr, flush=True)
        self.faults += len(batch.faults)
        self.seen += len(batch.faults) + (0 if batch.speech is None else len(batch.speech))
        if batch.speech is None or self.faults > MAX_FAULTS * max(self.seen, 1000):
            raise UserError(f"{self.faults} of {self.seen} samples could not be read, which is too "
                            f"many (run check-data); the last: {batch.faults[-1]}")


def check_data(args, data):
    """Read all files of a corpus once, print what it holds and all faults; returns their number."""
    corpus, faults = scan_corpus(data, args.k)
    try:
        read_labels(data)
    except UserError as e:
        faults.append(str(e))
    clips = [(split, c) for split, people in corpus.items()
             for found in people.values() for c in found]
    hours, rates, sizes, timed = dict.fromkeys(SPLITS, 0.0), {}, {}, 0
    for split, clip in progress("check-data", clips, len(clips)):
        for name in clip.speech + clip.faces:
            path = f"{clip.folder}/{name}"
            try:
                if name.lower().endswith(FACE_FILES):
                    h, w, _ = load_face(path).shape
                    sizes[f"{w}x{h}"] = sizes.get(f"{w}x{h}", 0) + 1
                    timed += bool(clip.speech) and frame_time(name) is not None
                    continue
                x, rate = read_speech(path)
                rates[rate] = rates.get(rate, 0) + 1
                hours[split] += len(x) / rate / 3600
                if np.abs(x).max() < SILENCE:
                    raise ValueError(f"{path}: silent from start to end")
            except ValueError as e:
                faults.append(str(e))
    for split, people in corpus.items():
        found = [clip for clips in people.values() for clip in clips]
        print(f"{split:5}  {len(people)} identities, {len(found)} clips, "
              f"{sum(len(c.speech) for c in found)} recordings ({hours[split]:.2f} h), "
              f"{sum(len(c.faces) for c in found)} faces")
    for what, counts in (("sampling rates in Hz", rates), ("face sizes in pixels", sizes)):
        common = sorted(counts.items(), key=lambda item: -item[1])[:8]
        print(f"{what}: {', '.join(f'{value} ({n})' for value, n in common) or 'none'}")
    print(f"faces beside speech, named by their time in ms: {timed} of {sum(sizes.values())}")
    print(*(f"fault: {fault}" for fault in faults), f"{len(faults)} faults", sep="\n")
    return len(faults)


# ==== 3. Synthetic corpus: voices by source and filter, drawn faces, known factors   [all ours] ===

SHARED = {"gender": 2, "age": 4, "tract": 4, "build": 3}  # factors of both voice and face: levels
HAIR = [(38, 30, 28), (84, 52, 32), (132, 80, 40), (212, 172, 100), (160, 66, 34), (96, 94, 104)]
SKIN = [(255, 224, 200), (246, 204, 172), (224, 176, 136), (184, 132, 94), (136, 92, 66)]
IRIS = [(76, 118, 160), (84, 56, 40), (92, 130, 88)]
BLACK, SHADOW = (30, 26, 30), (66, 30, 30)
VOWELS = np.array([  # Hz; a e i o u of men, Peterson and Barney 1952; F4, neutral [ours]
    (730, 1090, 2440, 3400), (530, 1840, 2480, 3500), (270, 2290, 3010, 3600),
    (570, 840, 2410, 3300), (300, 870, 2240, 3300), (500, 1500, 2500, 3500)])
BANDWIDTHS = np.array([60, 90, 120, 170])  # of the formants, Hz
CLIP_SECONDS, FRAMES = 6.0, 6  # one clip a person, so that no pair needs to know who is who
SIDE, OVERSAMPLE = 128, 3  # pixels of a face, drawn three times as large and averaged
HOP, FFT = 256, 1024  # samples between frames of speech, and in a frame with its echo
TURN = np.linspace(0, 2 * np.pi, 49)  # a full circle; its first half is the lower one, y being down


def draw_factors(rng):
    """All hidden factors of a person: the shared ones (levels), the face's and the voice's."""
    shared = {name: int(rng.integers(levels)) for name, levels in SHARED.items()}
    face = dict(background=rng.uniform(0, 1), light=rng.uniform(-1, 1), tilt=rng.uniform(-12, 12),
                glasses=int(rng.random() < 0.35), hair=int(rng.integers(len(HAIR))),
                skin=int(rng.integers(len(SKIN))), iris=int(rng.integers(len(IRIS))),
                clothes=rng.uniform(0, 1))
    voice = dict(pitch=rng.normal(0, 0.04), loudness=rng.uniform(0.1, 0.7), tempo=rng.uniform(3, 5))
    return shared | face | voice  # what is said, and the mouth's opening, change within the clip


def shared_levels(person):
    """The shared factors as numbers in 0 ... 1: gender (1 is male), age, tract, build."""
    return [person[name] / (levels - 1) for name, levels in SHARED.items()]


def synth_source(person, L, rng):
    """What the throat sends into the vocal tract, (L * HOP,), and the times of the syllables in s.

    Glottal pulses follow an intonation. With age they get slower, less regular in time (jitter) and
    in height (shimmer), and breathier. One syllable in seven is a pause.
    """
    n, (male, age, _, _) = L * HOP, shared_levels(person)
    seconds = np.arange(n) / RATE
    count = int(2 * n / RATE * person["tempo"])
    syllables = np.cumsum(rng.uniform(0.7, 1.3, count)) / person["tempo"]
    tune = np.interp(seconds, syllables, rng.normal(size=count))
    f0 = (120 if male else 225) * np.exp(person["pitch"] - 0.35 * age + 0.1 * tune)  # Hz
    jitter, shimmer = np.repeat(rng.normal(size=(2, n // 64)), 64, axis=1)  # new every 4 ms
    periods = np.cumsum(f0 * (1 + (0.004 + 0.05 * age**2) * jitter)) / RATE
    pulses = np.diff(np.floor(periods), prepend=0) * np.sqrt(RATE / f0)  # one where a period ends
    pulses *= 1 + (0.02 + 0.3 * age) * shimmer.clip(-2, 2)
    slope = 1 / (1 + 1j * np.fft.rfftfreq(n, 1 / RATE) / 700)  # glottis: -6 dB/octave from 700 Hz
    pulses = np.fft.irfft(np.fft.rfft(pulses) * slope, n)
    breath = (0.02 + 0.8 * age) * rng.normal(size=n)
    stress = np.where(rng.random(count + 1) < 1 / 7, 0, rng.uniform(0.5, 1, count + 1))
    fade = np.hanning(1200)  # 75 ms
    loudness = np.convolve(stress[np.searchsorted(syllables, seconds)], fade / fade.sum(), "same")
    return (pulses + breath) * loudness, syllables


def synth_speech(person, rng):
    """A clip of speech, int16 (samples,): short frames of the source, filtered one by one."""
    L, (male, age, tract, build) = int(CLIP_SECONDS * RATE) // HOP, shared_levels(person)
    source, syllables = synth_source(person, L, rng)
    frames = np.lib.stride_tricks.sliding_window_view(np.pad(source, (0, 2 * HOP)), 2 * HOP)
    spectra = np.fft.rfft(frames[::HOP][:L] * np.hanning(2 * HOP + 1)[:-1], FFT)  # (L, FFT/2+1)
    vowels = VOWELS[rng.integers(len(VOWELS), size=len(syllables))]  # what is said
    scale = (0.92 if male else 1.06) * (1.14 - 0.28 * tract)  # a long tract resonates lower
    f = np.fft.rfftfreq(FFT, 1 / RATE).astype(np.float32)  # (FFT/2+1,) in Hz
    for formant, width in zip(vowels.T, BANDWIDTHS * (1 + age)):
        F2 = (scale * np.interp(np.arange(L) * HOP / RATE, syllables, formant))[:, None] ** 2
        spectra *= F2 / (F2 - f**2 + 1j * f * width)  # a resonance at the formant; F2 is (L, 1)
    spectra *= f / (f + 200)  # the lips send out high frequencies better
    bass, throat = np.exp(-((f - 270) / 80) ** 2), np.exp(-((f - 900 * scale) / 350) ** 2)
    spectra *= 1 + build * (2 * bass - 0.95 * throat)  # a sturdy body adds bass, damps the throat
    pieces = np.fft.irfft(spectra, FFT).reshape(L, -1, HOP)  # frame l's piece k sounds in hop l + k
    speech = np.zeros((L + pieces.shape[1], HOP))
    for k in range(pieces.shape[1]):
        speech[k:k + L] += pieces[:, k]
    speech = speech[:L].ravel()
    speech *= person["loudness"] / np.abs(speech).max()
    return np.int16(32767 * (speech + 0.001 * rng.normal(size=speech.size)).clip(-1, 1))


def blend(a, b, t):
    """The colour that lies a share t of the way from a to b."""
    return tuple(int(x + (y - x) * t) for x, y in zip(a, b))


def tint(hue, saturation, value):
    """A colour from three numbers in 0 ... 1."""
    return tuple(int(255 * x) for x in colorsys.hsv_to_rgb(hue, saturation, value))


class Pen:
    """Draws in face coordinates: x right, y down, (0, 0) at the nose, tilted about the neck."""

    def __init__(self, image, tilt):
        self.draw, self.half = ImageDraw.Draw(image), image.width / 2
        self.cos, self.sin = (1.08 * f(math.radians(tilt)) for f in (math.cos, math.sin))

    def place(self, points):
        """Face coordinates to pixels."""
        return [(self.half * (1 + x * self.cos - (y - 0.8) * self.sin),
                 self.half * (1.88 + x * self.sin + (y - 0.8) * self.cos)) for x, y in points]

    def fill(self, color, points):
        """A filled polygon."""
        self.draw.polygon(self.place(points), fill=color)

    def line(self, color, width, points):
        """An open line."""
        self.draw.line(self.place(points), color, round(width * self.half), joint="curve")

    def oval(self, color, x, y, rx, ry, chin=0.0, power=2.0):
        """A filled superellipse, narrowed by the share `chin` at its lower end."""
        c, s = (np.sign(v) * abs(v) ** (2 / power) for v in (np.cos(TURN), np.sin(TURN)))
        self.fill(color, np.stack([x + rx * c * (1 - chin * s.clip(0) ** 2), y + ry * s], 1))


def draw_head(pen, person):
    """Hair, jaw, beard (gender), head shape (tract), neck, shoulders (build), wrinkles (age)."""
    male, age, tract, build = shared_levels(person)
    skin, hair = SKIN[person["skin"]], HAIR[person["hair"]]
    dark, w, h = blend(skin, SHADOW, 0.2), 0.55 - 0.12 * tract, 0.58 + 0.12 * tract
    if not male:
        long = 0.9 - 0.35 * age  # hair gets shorter
        pen.oval(blend(hair, BLACK, 0.25), 0, long - 0.76, w + 0.19 - 0.06 * age, long, power=2.6)
    neck = 0.12 + 0.2 * build
    pen.oval(tint(person["clothes"], 0.45, 0.65), 0, 1.5 - 0.14 * build, 0.7 + 0.35 * build, 0.72)
    pen.fill(dark, [(-neck, 0.3), (neck, 0.3), (1.1 * neck, 0.88), (0, 0.96), (-1.1 * neck, 0.88)])
    for x in (-w, w):
        pen.oval(dark, x, 0.02, 0.08, 0.14)  # ears
    pen.oval(hair, 0, -0.2, w + 0.07, h, power=2.2)
    pen.oval(skin, 0, -0.08, w, h, *((0.12, 2.5) if male else (0.28, 2.1)))
    if male:  # shaved, but not this morning
        turn = np.linspace(0.15, np.pi - 0.15, 24)
        jaw = (0.97 * w * np.cos(turn) * (1 - 0.12 * np.sin(turn) ** 2),
               0.985 * h * np.sin(turn) - 0.08)
        cheeks = (-0.5 * w, 0.26), (0, 0.22), (0.5 * w, 0.26)
        pen.fill(blend(skin, (70, 60, 64), 0.22), [*zip(*jaw), *cheeks])
    line = 0.24 - h - 0.22 * age  # the hairline climbs with age
    crown = (w + 0.06) * np.cos(TURN[24:]), (h + 0.07) * np.sin(TURN[24:]) - 0.14
    pen.fill(hair, [*zip(*crown), (0.97 * w, -0.2), (0.72 * w, line + 0.1), (0.1 * w, line),
                    (-0.6 * w, line + 0.13), (-0.97 * w, -0.2)])
    crease = blend(skin, (90, 50, 50), 0.25 + 0.45 * age)
    for y in line + 0.16 + 0.09 * np.arange(round(3 * age)):
        pen.line(crease, 0.028, [(-0.5 * w, y + 0.02), (0, y), (0.5 * w, y + 0.02)])
    for side in (-1, 1) if age else ():
        pen.line(crease, 0.036, [(side * 0.13, 0.17), (side * 0.22, 0.28), (side * 0.235, 0.4)])
        pen.line(crease, 0.045, [(side * 0.13, 0.05), (side * 0.22, 0.09), (side * 0.32, 0.05)])


def draw_features(pen, person):
    """Eyes, brows, nose and glasses; with age eyes get narrow and brows white."""
    male, age, _, _ = shared_levels(person)
    skin, iris = SKIN[person["skin"]], IRIS[person["iris"]]
    brow = blend(blend(HAIR[person["hair"]], BLACK, 0.4), (228, 228, 228), age**2)
    y, open_ = -0.05, 0.08 - 0.035 * age
    for side in (-1, 1):
        x = side * 0.215
        pen.oval((252, 252, 252), x, y, 0.105, open_)
        pen.oval(iris, x, y, 0.052, min(0.055, open_))
        pen.oval(BLACK, x, y, 0.026, 0.03)
        lid = (x - 0.11, y), (x - 0.05, y - open_), (x + 0.05, y - open_), (x + 0.11, y)
        pen.line(BLACK, 0.02 if male else 0.034, lid)
        arch = (x - side * 0.11, -0.185), (x + side * 0.02, -0.225), (x + side * 0.13, -0.19)
        pen.line(brow, 0.062 if male else 0.032, arch)
    pen.fill(blend(skin, SHADOW, 0.3), [(-0.03, -0.06), (0.03, -0.06), (0.1, 0.16), (-0.1, 0.16)])
    pen.oval(blend(skin, SHADOW, 0.3), 0, 0.16, 0.11, 0.06)
    pen.oval(blend(skin, (255, 255, 255), 0.2), -0.01, 0.13, 0.05, 0.04)
    for x in (-0.06, 0.06):
        pen.oval(blend(skin, SHADOW, 0.7), x, 0.18, 0.022, 0.015)  # nostrils
    if person["glasses"]:
        for x in (-0.215, 0.215):
            pen.line(BLACK, 0.026, [*zip(x + 0.16 * np.cos(TURN), 0.125 * np.sin(TURN) - 0.045)])
        pen.line(BLACK, 0.026, [(-0.06, -0.06), (0.06, -0.06)])


def synth_faces(person, openings):
    """Pictures (PIL, SIDE x SIDE) of one person, one per mouth opening in 0 ... 1."""
    side = SIDE * OVERSAMPLE
    portrait = Image.new("RGB", (side, side), tint(person["background"], 0.3, 0.95))
    pen = Pen(portrait, person["tilt"])
    draw_head(pen, person)
    draw_features(pen, person)
    ramp = np.linspace(-1, 1, SIDE)
    light = 0.87 + 0.13 * (person["light"] * ramp - 0.4 * ramp[:, None])  # (H, W), slanting down
    light = Image.merge("RGB", [Image.fromarray(np.uint8(255 * light.clip(0, 1)))] * 3)
    lips = blend(SKIN[person["skin"]], (180, 70, 76), 0.45 if person["gender"] else 0.9)
    faces = []
    for opening in openings:
        frame = portrait.copy()
        pen = Pen(frame, person["tilt"])
        pen.oval(lips, 0, 0.37, 0.15, 0.03 + 0.07 * opening)
        pen.oval((96, 32, 38), 0, 0.37, 0.11, 0.004 + 0.055 * opening)
        faces.append(ImageChops.multiply(frame.reduce(OVERSAMPLE), light))
    return faces


def write_person(data, seed, i, split):
    """Draw person i of a seed and write their clip; returns their row of labels.csv."""
    rng, name = np.random.default_rng([seed, i]), f"id{i:05}"
    person = draw_factors(rng)
    folder = Path(data, split, name, "clip")
    folder.mkdir(parents=True)
    with wave.open(str(folder / "speech.wav"), "wb") as f:
        f.setparams((1, 2, RATE, 0, "NONE", ""))  # one channel of 2 bytes
        f.writeframes(synth_speech(person, rng).tobytes())
    moments = rng.choice(int(1000 * CLIP_SECONDS), FRAMES, replace=False)  # ms
    for moment, face in zip(moments, synth_faces(person, rng.uniform(0, 1, FRAMES))):
        face.save(folder / f"{moment}.jpg", quality=92)
    return {"identity": name, "split": split} | {key: round(x, 4) for key, x in person.items()}


def make_data(args, data):
    """Write the synthetic corpus, equal for equal seeds; the folder is there once it is whole."""
    data, identities, started = Path(data), args.identities, time.time()
    if data.exists():
        raise UserError(f"{data}: exists already; make-data fills a new folder only")
    make_folder(data.parent)
    val, test = (max(10, round(share * identities)) for share in (0.06, 0.14))
    splits = ["train"] * (identities - val - test) + ["val"] * val + ["test"] * test
    with tempfile.TemporaryDirectory(dir=data.parent) as scratch:
        part = Path(scratch, data.name)
        with concurrent.futures.ProcessPoolExecutor(min(16, os.cpu_count())) as pool:
            write = functools.partial(write_person, part, args.seed)
            jobs = pool.map(write, range(identities), splits, chunksize=8)
            rows = list(progress("make-data", jobs, identities))
        with open(part / "labels.csv", "w", newline="", encoding="utf8") as f:
            writer = csv.DictWriter(f, rows[0])
            writer.writeheader()
            writer.writerows(rows)
        part.rename(data)
    print(f"{data}: {identities} identities in {time.time() - started:.0f} s")


# ==== 4. Inference: two encoders and the K-way loss   [paper §3.1] ================================

PASE_TAPS = (251, 20, 11, 11, 11, 11, 11, 11)  # [PASE]; the first is the sinc layer
PASE_STRIDES = (1, 10, 2, 1, 2, 1, 2, 2)  # [PASE]; 160 in all, so that 6 s are 600 frames
PASE_WIDTHS = (1, 1, 2, 2, 4, 4, 8, 8)  # [PASE]; in units of the sinc layer's 64 filters
MIN_HZ = 50  # the least cut-off and the least band of a sinc filter [SincNet]


def pad_same(x, taps):
    """(..., H, T) -> (..., H, T + N - 1): reflected ends; stride s leaves ceil(T / s) [PASE]."""
    return F.pad(x, ((taps - 1) // 2, taps // 2, 0, 0), mode="reflect")


class SincConv(nn.Module):
    """Band-pass filters of which only the two cut-offs are learned [SincNet].

    (B, T) -> (B, C, ceil(T / stride)). A filter is the difference of two ideal low-passes,
        g(t) = 2 high sinc(2 high t) - 2 low sinc(2 low t),   sinc(x) = sin(pi x) / (pi x),
    under a Hamming window, divided by 2 (high - low), which makes its centre 1. What is learned, in
    Hz, is added to the least cut-off and band; it starts evenly on the mel scale. Raises ValueError
    for an even number of taps, which has no centre.
    """

    def __init__(self, filters, taps=251, stride=1):
        super().__init__()
        if taps % 2 == 0:
            raise ValueError(f"sinc kernel must be odd, got {taps}")
        self.taps, self.stride = taps, stride
        limits = 30, RATE / 2 - 100  # Hz [SincNet]
        first, last = (2595 * math.log10(1 + hz / 700) for hz in limits)  # mel
        edges = 700 * (10 ** (torch.linspace(first, last, filters + 1) / 2595) - 1)  # (C+1,) in Hz
        self.low_hz = nn.Parameter(edges[:-1, None])  # (C, 1)
        self.band_hz = nn.Parameter(edges.diff()[:, None])  # (C, 1)
        t = (torch.arange(taps) - taps // 2) / RATE  # (N,) in s
        self.register_buffer("t", t, persistent=False)
        self.register_buffer("window", torch.hamming_window(taps, periodic=False), persistent=False)

    def filters(self):
        """The impulse responses (C, N)."""
        low = MIN_HZ + self.low_hz.abs()  # (C, 1)
        low = low.clamp(max=RATE / 2 - MIN_HZ)  # keeps every band open [ours]
        high = (low + MIN_HZ + self.band_hz.abs()).clamp(max=RATE / 2)  # (C, 1)
        g = 2 * high * torch.sinc(2 * high * self.t) - 2 * low * torch.sinc(2 * low * self.t)
        return g * self.window / (2 * (high - low))  # (C, N); torch.sinc(0) is 1, without 0/0

    def forward(self, x):
        # p neighbouring outputs at once: each filter in p shifts, p times the stride. The sums are
        # the same. On two CPU cores 1.5 times as fast for 16 filters, no faster for 64; not tried
        # on a GPU [ours].
        s, p, L = self.stride, 8 if x.device.type == "cpu" else 1, -(-x.shape[1] // self.stride)
        g = self.filters()  # (C, N)
        g = torch.stack([F.pad(g, (i * s, (p - 1 - i) * s)) for i in range(p)], 1)  # (C, p, N + ..)
        x = F.pad(pad_same(x[:, None], self.taps), (0, -L % p * s))  # (B, T) -> (B, 1, T + N + ..)
        y = F.conv1d(x, g.flatten(0, 1)[:, None], stride=p * s)  # (B, C p, L / p)
        y = y.unflatten(1, (-1, p)).permute(0, 3, 2, 1)  # (B, L / p, p, C)
        return y.flatten(1, 2)[:, :L].mT  # (B, C, L)


def to_length(x, length):
    """Embeddings (B, D) scaled to one Euclidean length: inner products become length^2 cos [ours].

    length^2 is the inverse temperature of Eq. 1's softmax. With free lengths the loss starts at
    log K with hardly a gradient.
    """
    return length * F.normalize(x.float(), dim=1)  # a GPU's layers may answer in bfloat16


class SpeechEncoder(nn.Module):
    """S: waveforms (B, T) -> embeddings (B, D). PASE's encoder, a mean over time, a linear map.

    The sinc layer and 7 convolutions [paper §3.1], each followed by batch norm and a PReLU with a
    slope per channel [PASE]; mean and linear map are [ours]. In PASE width is 64, sinc_stride 1.
    The convolutions over time are written as 2-D ones over a single row, for these can have the
    channels last in memory: 1.15 times as fast here.
    """

    def __init__(self, width=64, sinc_stride=1, length=1.0):
        super().__init__()
        self.length, widths = length, [width * w for w in PASE_WIDTHS]
        self.convs = nn.ModuleList([SincConv(width, PASE_TAPS[0], sinc_stride)])
        for i in range(1, len(widths)):  # no bias: batch norm has one
            self.convs.append(nn.Conv2d(widths[i - 1], widths[i], (1, PASE_TAPS[i]),
                                        (1, PASE_STRIDES[i]), bias=False))
        self.norms = nn.ModuleList(nn.BatchNorm2d(w) for w in widths)
        self.acts = nn.ModuleList(nn.PReLU(w, init=0.0) for w in widths)  # [PASE]
        self.head = nn.Linear(widths[-1], EMBED)

    def frames(self, x):
        """(B, T) -> (B, C, L), L = ceil(T / (160 sinc_stride))."""
        x = self.convs[0](x)[:, :, None]  # (B, T) -> (B, C, 1, T / stride)
        x = self.acts[0](self.norms[0](x))
        for conv, norm, act in zip(self.convs[1:], self.norms[1:], self.acts[1:]):
            x = conv(pad_same(x, conv.kernel_size[1]))  # (B, C, 1, L) -> (B, C', 1, L / stride)
            x = act(norm(x))
        return x[:, :, 0]

    def features(self, x):
        """(B, T) -> (B, C), what the head reads."""
        x = x / (x.std(1, keepdim=True) + SILENCE)  # the loudness is the microphone's [ours]
        return self.frames(x).mean(2)  # (B, C, L) -> (B, C)

    def forward(self, x):
        return to_length(self.head(self.features(x)), self.length)  # (B, C) -> (B, D)


class FaceBlock(nn.Module):
    """Residual block of [SNGAN]'s discriminator: (B, C, H, W) -> (B, C', H/2, W/2), or C', H, W."""

    def __init__(self, channels, out, first=False, down=True):
        super().__init__()
        self.first, self.down = first, down
        hidden = out if first else channels
        self.conv1 = nn.Conv2d(channels, hidden, 3, padding=1)
        self.conv2 = nn.Conv2d(hidden, out, 3, padding=1)
        self.skip = nn.Conv2d(channels, out, 1)

    def forward(self, x):
        h = self.conv1(x if self.first else F.relu(x))  # the first block sees pixels, not features
        h = self.conv2(F.relu(h))  # (B, C, H, W) -> (B, C', H, W)
        if self.down:
            h, x = F.avg_pool2d(h, 2), F.avg_pool2d(x, 2)  # H, W -> H/2, W/2
        return h + self.skip(x)  # a 1x1 layer may as well follow the pooling: a quarter of the work


def init_convs(module):
    """Glorot's initialisation, gain sqrt(2) on 3x3 convolutions [SNGAN]."""
    for m in module.modules():
        if isinstance(m, nn.Conv2d):
            nn.init.xavier_uniform_(m.weight, math.sqrt(2) if m.kernel_size == (3, 3) else 1)
            nn.init.zeros_(m.bias)


def doublings(size):
    """How often 4 must be doubled to give a side; raises ValueError unless it can."""
    times = int(math.log2(size)) - 2
    if times < 1 or size != 4 * 2**times:
        raise ValueError(f"face size must be a power of two from 8 on, got {size}")
    return times


class FaceEncoder(nn.Module):
    """F: faces (B, 3, H, W) -> embeddings (B, D). The body of [SNGAN]'s projection discriminator.

    Blocks halve the side down to 4, one more keeps it; ReLU and a sum over the 4x4 places; a linear
    map [ours]. No batch norm: the second stage makes F a discriminator and differentiates it twice.
    In [SNGAN] width is 64, size 128. Raises ValueError unless size is a power of two from 8 on.
    """

    def __init__(self, size=128, width=64, length=1.0):
        super().__init__()
        self.length, downs = length, doublings(size)
        widths = [3] + [width * 2 ** min(i, 4) for i in range(downs)]
        blocks = [FaceBlock(widths[i], widths[i + 1], first=i == 0) for i in range(downs)]
        self.blocks = nn.Sequential(*blocks, FaceBlock(widths[-1], widths[-1], down=False))
        self.head = nn.Linear(widths[-1], EMBED)
        init_convs(self)

    def features(self, x):
        """(B, 3, H, W) -> (B, C), what the head reads."""
        return F.relu(self.blocks(x)).sum((2, 3))  # (B, C, 4, 4) -> (B, C)

    def forward(self, x):
        return to_length(self.head(self.features(x)), self.length)  # (B, C) -> (B, D)


@torch.no_grad()
def centre_head(encoder, x):
    """Set the head so that its outputs for a batch have mean 0 and deviation 1 throughout [ours].

    A fresh network sends all inputs in nearly one direction, so Eq. 1 would see K equal candidates.
    """
    head = encoder.head
    std, mean = torch.std_mean(head(encoder.features(x)), 0)  # (B, D) -> (D,), (D,)
    std = std.clamp(min=1e-6)  # of a batch that is all alike
    head.weight /= std[:, None]
    head.bias.copy_((head.bias - mean) / std)


def draw_candidates(identity, k, generator):
    """Columns (B, K) of each row's candidates: itself, then K-1 others of its batch, none twice.

    identity (B,): a negative is never of the row's identity [paper §4]. Raises UserError where a
    row has fewer than K-1 such.
    """
    others = identity[:, None] != identity[None, :]  # (B,) -> (B, B)
    if (fewest := int(others.sum(1).min())) < k - 1:
        raise UserError(f"K = {k} needs {k - 1} clips of other identities per batch, "
                        f"one has {fewest}")
    keys = torch.rand(others.shape, generator=generator).masked_fill(~others, 2)  # (B, B)
    negatives = keys.topk(k - 1, largest=False).indices  # (B, K-1), those with the smallest keys
    return torch.cat([torch.arange(len(identity))[:, None], negatives], 1)  # (B, K)


def match_logits(speech, faces, candidates, direction):
    """<S(s), F(f_j)> of each row's candidates, (B, K): v-f picks among faces, f-v among voices."""
    sim = speech @ faces.T if direction == "v-f" else faces @ speech.T  # (B, D), (B, D) -> (B, B)
    return sim.gather(1, candidates)  # (B, B) -> (B, K), the positive in column 0


def match_loss(speech, faces, candidates, direction):
    """Eq. 1: p(f_j | s) = softmax_j <S(s), F(f_j)>, the mean of -log p(f_0 | s); accuracy 0-1."""
    logits = match_logits(speech, faces, candidates, direction)  # (B, K)
    return F.cross_entropy(logits, torch.zeros_like(candidates[:, 0])), top1(logits.detach()).mean()


def top1(logits):
    """(B, K) -> (B,): 1 where column 0 is the largest; n equally large ones share the point."""
    best = logits == logits.max(1, keepdim=True).values  # (B, K)
    return best[:, 0] / best.sum(1)


# ==== 5. Generation: AdaIN generator, projection discriminator, relidGAN loss   [paper §3.2] ======


class AdaIN(nn.Module):
    """The style sets mean and deviation of each channel [StyleGAN]: x (B, C, H, W), style (B, 2D).

        AdaIN(x, y) = (1 + scale(y)) (x - mean(x)) / std(x) + shift(y),   mean, std over H and W

    scale and shift are linear in the style y; 1 + scale starts near 1.
    """

    def __init__(self, channels):
        super().__init__()
        self.style = nn.Linear(2 * EMBED, 2 * channels)

    def forward(self, x, style):
        scale, shift = self.style(style)[:, :, None, None].chunk(2, 1)  # (B, 2C) -> 2 (B, C, 1, 1)
        x = x - x.mean((2, 3), keepdim=True)  # (B, C, H, W) - (B, C, 1, 1)
        var = x.square().mean((2, 3), keepdim=True)  # -> (B, C, 1, 1)
        scale = ((1 + scale) * (var + 1e-5).rsqrt()).to(x.dtype)  # a GPU's bfloat16 stays that
        return torch.addcmul(shift, scale, x)  # keeps channels_last


class UpBlock(nn.Module):
    """Residual block of [SNGAN]'s generator: (B, C, H, W), style (B, 2D) -> (B, C', 2H, 2W).

    Up-sampling is bilinear, as in [StyleGAN]: nearest-neighbour left stripes of alternating rows.
    It follows the first convolution and the 1x1 layer, where [SNGAN] has them after it: half of
    the time [ours].
    """

    def __init__(self, channels, out):
        super().__init__()
        self.norm1, self.norm2 = AdaIN(channels), AdaIN(out)
        self.conv1 = nn.Conv2d(channels, out, 3, padding=1)
        self.conv2 = nn.Conv2d(out, out, 3, padding=1)
        self.skip = nn.Conv2d(channels, out, 1)

    def forward(self, x, style):
        h = self.up(self.conv1(F.relu(self.norm1(x, style))))  # (B, C, H, W) -> (B, C', 2H, 2W)
        h = self.conv2(F.relu(self.norm2(h, style)))
        return h + self.up(self.skip(x))  # (B, C, H, W) -> (B, C', 2H, 2W)

    @staticmethod
    def up(x):
        """(B, C, H, W) -> (B, C, 2H, 2W); in bfloat16, too, which autocast would end here."""
        return F.interpolate(x, scale_factor=2, mode="bilinear").to(x.dtype)


class Generator(nn.Module):
    """G: z (B, D) and c (B, D) -> faces (B, 3, H, W) in [-1, 1].

    A linear map of [z, c] to 4x4 places, blocks that double the side, tanh [SNGAN]; AdaIN in each
    layer [paper §3.2]. Its style is [z, c], too: with c alone only c could set a colour, for AdaIN
    wipes out the mean of what comes from below [ours]. In [SNGAN] width is 64, size 128.

    c_length: the length of c as G reads it. z has variance 1 in each of its 128 directions; c has
    80 % of its variance in the few that speech and face share, here four. At z's length each of
    those had 25 times the variance of one of z, and G drew even the background from c [ours].
    Raises ValueError unless size is a power of two from 8 on.
    """

    def __init__(self, size=128, width=64, c_length=1.0):
        super().__init__()
        self.c_length, ups = c_length, doublings(size)
        widths = [width * 2 ** min(i, 4) for i in range(ups, -1, -1)]  # 1024 1024 512 256 128 64
        self.first = nn.Linear(2 * EMBED, widths[0] * 4 * 4)
        self.blocks = nn.ModuleList(UpBlock(*pair) for pair in zip(widths, widths[1:]))
        self.norm = AdaIN(widths[-1])
        self.last = nn.Conv2d(widths[-1], 3, 3, padding=1)
        init_convs(self)
        nn.init.xavier_uniform_(self.last.weight, 0.3)  # tanh starts where it has a slope [ours]

    def forward(self, z, c):
        style = torch.cat([z, to_length(c, self.c_length)], 1)  # (B, D), (B, D) -> (B, 2D)
        x = self.first(style).unflatten(1, (-1, 4, 4))  # (B, 2D) -> (B, C, 4, 4)
        x = x.contiguous(memory_format=torch.channels_last)
        for block in self.blocks:
            x = block(x, style)  # (B, C, H, W) -> (B, C', 2H, 2W)
        x = self.last(F.relu(self.norm(x, style)))  # (B, C, H, W) -> (B, 3, H, W)
        return torch.tanh(x.float())


class Discriminator(nn.Module):
    """g(f, c) = weight <c, phi(f)> + psi(f): faces (B, 3, H, W), c (B, D) -> logits (B,).

    Eq. 2 with Eq. 3's c = S(s); phi starts as the trained F and goes on training [paper §3.2]. The
    sigmoid A of D = A(g) is in the losses. The paper's weight is 1; confident encoders have inner
    products of up to length^2, here 12, beside a psi of about 1, which alone tells real from drawn:
    hence less [ours]. psi is linear in what phi's head reads: from phi(f), all of one length, only
    silhouettes were learned [ours]. It needs no bias, for the losses take differences.
    """

    def __init__(self, face_encoder, weight=1.0):
        super().__init__()
        self.phi, self.weight = copy.deepcopy(face_encoder).requires_grad_(True), weight
        self.psi = nn.Linear(face_encoder.head.in_features, 1, bias=False)
        nn.init.normal_(self.psi.weight, std=0.01)  # [ours]

    def forward(self, faces, c=None):
        """g(f, c); without c what it is made of, phi(f) (B, D) and psi (B,)."""
        h = self.phi.features(faces)  # (B, 3, H, W) -> (B, C)
        phi, psi = to_length(self.phi.head(h), self.phi.length), self.psi(h)[:, 0].float()
        return (phi, psi) if c is None else self.weight * inner(c, phi) + psi


def inner(c, phi):
    """<c, phi>: (B, D), (B, D) -> (B,)."""
    return (c * phi).sum(1)


def rel_loss(own, other):
    """-E log A(g(own, c+) - g(other, c+)): Eq. 4 in Eq. 6; logits (B,), (B,) -> ().

    D's side has own = real and other = fake, G's the reverse. -log A(x) = softplus(-x).
    """
    return F.softplus(-(own - other)).mean()


def relid_loss(own, other, match, mismatch):
    """-E log A(g(own, c+) - g(other, c+) + <c+, phi(own)> - <c-, phi(own)>): Eq. 5 in Eq. 6.

    All (B,); own and other as in rel_loss, match and mismatch with g's weight. They say how well a
    face fits its voice and another person's: without them phi forgets who fits whom [paper §3.2].
    Our reading: one sigmoid around all terms, as in Eq. 4; on G's side the fake takes the real
    face's place, in the mismatch, too.
    """
    return F.softplus(-(own - other + match - mismatch)).mean()


def r1_penalty(discriminator, faces, c):
    """R1 = E |grad_f g(f, c+)|^2 over real faces, without gamma / 2: -> () [R1]."""
    faces = faces.detach().requires_grad_(True)
    grad, = torch.autograd.grad(discriminator(faces, c).sum(), faces, create_graph=True)
    return grad.square().sum((1, 2, 3)).mean()  # (B, 3, H, W) -> (B,) -> ()


def adversarial_loss(kind, own, other, match, mismatch):
    """The loss that --loss names."""
    return relid_loss(own, other, match, mismatch) if kind == "relid" else rel_loss(own, other)


def d_step(discriminator, optimizer, faces, fakes, c, wrong, cfg, penalise):
    """Train D on real and drawn faces (B, 3, H, W), c+ and c- (B, D); {name: number to log}.

    With `penalise` R1 joins, times r1_every for the steps without it [StyleGAN2]; on a GPU it is
    spared from bfloat16, for it differentiates gradients.
    """
    with autocast(faces.device):
        phi, psi = discriminator(torch.cat([faces, fakes.detach()]))  # (2B, D), (2B,)
    (phi_real, phi_fake), (psi_real, psi_fake) = phi.chunk(2), psi.chunk(2)
    match_real, match_fake = inner(c, phi_real), inner(c, phi_fake)  # (B,), (B,)
    mismatch, w = inner(wrong, phi_real), cfg.weight
    loss = adversarial_loss(cfg.loss, w * match_real + psi_real, w * match_fake + psi_fake,
                            w * match_real, w * mismatch)
    numbers = dict(loss_d=loss, match_real=match_real.mean(), match_fake=match_fake.mean(),
                   mismatch_real=mismatch.mean())
    optimizer.zero_grad()
    if penalise:
        numbers["r1"] = r1_penalty(discriminator, faces, c)
        loss = loss + cfg.gamma / 2 * cfg.r1_every * numbers["r1"]
    loss.backward()
    optimizer.step()
    return numbers


def g_step(discriminator, optimizer, faces, fakes, c, wrong, cfg):
    """Train G, whose faces `fakes` are, to look more real and fit c+ better than the real ones."""
    discriminator.requires_grad_(False)
    with autocast(faces.device):
        (phi, psi), real = discriminator(fakes), discriminator(faces, c)  # (B, D), (B,); (B,)
    match, mismatch = cfg.weight * inner(c, phi), cfg.weight * inner(wrong, phi)
    loss = adversarial_loss(cfg.loss, match + psi, real, match, mismatch)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    discriminator.requires_grad_(True)
    return dict(loss_g=loss)


@torch.no_grad()
def follow(average, generator, step, decay):
    """Move the average of G towards G."""
    decay = min(decay, (1 + step) / (10 + step))  # a young average forgets faster [ours]
    for mean, new in zip(average.parameters(), generator.parameters()):
        mean.lerp_(new, 1 - decay)


# ==== 6. Training =================================================================================


def progress(name, items, total):
    """Passes items on and says how many are done and how long the rest takes: on a terminal in
    place, in a file every 10 s.
    """
    started = shown = time.time()
    terminal = sys.stdout.isatty()
    for done, item in enumerate(items, start=1):
        yield item
        now = time.time()
        if done == total or now - shown > (0.2 if terminal else 10):
            shown, left = now, (now - started) / done * (total - done)
            print(f"{name} {done}/{total}  {left:.0f} s left    ", flush=True,
                  end="\r" if terminal and done < total else "\n")


def peak_memory(device):
    """The most memory in use so far in GB, of the GPU or of this process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e9
    try:
        import resource
    except ImportError:  # Windows
        return 0.0
    unit = 1 if sys.platform == "darwin" else 1024  # bytes
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e9


class Run:
    """A training run in its folder: deals batches, logs, saves, validates, may be stopped any time.

    `parts` are the modules, optimisers and schedules that training changes, `more` goes into the
    checkpoint. All chance is a pure function of seed, batch number and number of processes: parts,
    step, best validation and log are the whole state. Under torchrun each process has a Run, and
    the first one writes; the losses and faults in the log are its own.
    """

    def __init__(self, command, cfg, device, parts, state=None, unit="clips", **more):
        self.cfg, self.device, self.parts, self.unit = cfg, device, parts, unit
        (self.rank, self.count), self.out = processes(), Path(cfg.out)
        self.fixed = dict(command=command, settings=asdict(cfg), processes=self.count, **more)
        self.step, self.best, self.values, self.clips = 0, -1.0, [], 0
        self.faults, self.since, self.signal, self.saved = FaultCounter(), time.time(), 0, True
        length = 0  # of log.jsonl in bytes
        if state:
            for name, part in parts.items():
                part.load_state_dict(state[name])
            self.step, self.best, self.values = state["step"], state["best"], state["values"]
            length, self.faults.seen, self.faults.faults = state["counts"]
        self.started, self.first = time.time(), self.step
        self.spare = not state or state["spare"]  # whether last.pt, if any, is worth keeping
        if largest(self.step) != -largest(-self.step):
            raise UserError(f"--out {cfg.out}: not every process finds step {largest(self.step)} "
                            "there; all need the same folder")
        if self.rank == 0:
            write_json(self.out / "settings.json", asdict(cfg))
            self.file = open(self.out / "log.jsonl", "ab")
            self.file.truncate(min(length, self.file.tell()))  # what follows is written again

    def batches(self, pairs, check):
        """(number, batch) from where the run stands to its end; check() validates in between."""
        todo = range(self.step * self.count + self.rank, self.cfg.steps * self.count, self.count)
        usual = {number: signal.signal(number, self.note)
                 for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            if self.step:
                self.validate(check)  # last.pt is from before it
            for i, batch in zip(todo, load_batches(pairs, todo, self.cfg.workers)):
                self.faults.add(batch)
                self.saved = False
                yield i, batch
                self.pause()
                self.validate(check)
        finally:
            for number, handler in usual.items():
                signal.signal(number, handler)

    def note(self, number, frame):
        """Ctrl-C or SIGTERM: a step in progress is finished and saved first."""
        self.signal = number
        if self.saved:
            raise KeyboardInterrupt(number)

    def add(self, clips, **values):
        """Count a step and keep its numbers as they are: read when their line is written."""
        self.step, self.clips = self.step + 1, self.clips + clips * self.count
        self.values.append((self.step, {name: x.detach() for name, x in values.items()}))

    def due(self, every):
        """Whether what is done `every` so many steps, and after the last one, is due."""
        return self.step % every == 0 or self.step == self.cfg.steps

    def pause(self):
        """After a step: write its line, save, stop, where due; all processes stop together."""
        cfg = self.cfg
        if self.due(cfg.log_every) or self.due(cfg.eval_every):
            self.write()
        if self.due(cfg.save_every) or self.due(cfg.eval_every):
            self.save()
        if stop := largest(self.signal):
            if not self.saved:
                self.save()
            print(f"stopped after step {self.step}", flush=True)
            raise KeyboardInterrupt(stop)

    def validate(self, check):
        """Validate, in the first process, where that is due."""
        if self.due(self.cfg.eval_every) and self.rank == 0:
            check()
            self.since = time.time()  # clips_per_s is of training alone

    def means(self):
        """{name: mean since the last line}; raises UserError at the first NaN or infinity."""
        found = {}
        for step, values in self.values:
            for name, x in values.items():
                found.setdefault(name, []).append(x.item())
                if not math.isfinite(found[name][-1]):
                    raise diverged(f"step {step}: {name} is {found[name][-1]}")
        return {name: round(sum(numbers) / len(numbers), 4) for name, numbers in found.items()}

    def write(self):
        """Write and show the log line of this step."""
        line = {"step": self.step} | self.means() | {
            f"{self.unit}_per_s": round(self.clips / (time.time() - self.since), 1),
            "peak_memory_gb": round(peak_memory(self.device), 3), "faults": self.faults.faults}
        self.record(line)
        text = "  ".join(f"{name} {value:g}" for name, value in line.items() if name != "step")
        each = (time.time() - self.started) / (self.step - self.first)  # s
        left = each * (self.cfg.steps - self.step)
        print(f"step {self.step}/{self.cfg.steps}  {text}  {left:.0f} s left", flush=True)
        self.values, self.clips, self.since = [], 0, time.time()

    def record(self, line):
        """Add a line to log.jsonl."""
        if self.rank == 0:
            self.file.write(json.dumps(line).encode() + b"\n")
            self.file.flush()

    def save(self):
        """Write last.pt; the one before it stays as previous.pt."""
        self.means()
        for name, part in self.parts.items():
            if isinstance(part, nn.Module) and not all(x.isfinite().all()
                                                       for x in part.parameters()):
                raise diverged(f"step {self.step}: weights of {name} are NaN")
        if self.rank == 0:
            previous = self.out / "previous.pt" if self.spare else None
            save_checkpoint(self.out / "last.pt", self.parts, previous, **self.fixed,
                            step=self.step, best=self.best, values=self.values,
                            counts=(self.file.tell(), self.faults.seen, self.faults.faults))
        self.saved = self.spare = True


def diverged(where):
    """The UserError of a run that has met NaN or infinity."""
    return UserError(f"{where}: the run diverged, try a lower --lr; "
                     "its checkpoints, if any, are from before")


def processes():
    """(this process's number, how many there are): (0, 1) unless torchrun started them."""
    if not distributed.is_torchelastic_launched():
        return 0, 1
    return int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])


def largest(x):
    """The largest of the whole numbers x that the processes call this with."""
    x = torch.tensor(x)
    if processes()[1] > 1:
        distributed.all_reduce(x, distributed.ReduceOp.MAX)
    return int(x)


def pick_device(name):
    """The torch device of --device; raises UserError where there is no such.

    Under torchrun `cuda` is the process's own GPU, and the processes join here: what is on the CPU
    travels between them by gloo, what is on a GPU by nccl.
    """
    name = ("cuda" if torch.cuda.is_available() else "cpu") if name == "auto" else name
    if name == "cuda":
        name = f"cuda:{os.environ['LOCAL_RANK'] if processes()[1] > 1 else 0}"
    try:
        torch.zeros(1, device=name).item()
    except (RuntimeError, AssertionError) as e:
        reason = str(e).splitlines()[0]
        raise UserError(f"--device {name}: not available here, use cpu or auto ({reason})") from e
    if name.startswith("cuda"):
        torch.cuda.set_device(name)  # so that nothing of this process lands on GPU 0
    torch.backends.cudnn.benchmark = True  # batches have one shape: it pays to try all algorithms
    if processes()[1] > 1:
        distributed.init_process_group(
            "cpu:gloo,cuda:nccl" if name.startswith("cuda") else "gloo",
            timeout=datetime.timedelta(days=1))  # the others wait while the first one validates
    return torch.device(name)


def autocast(device):
    """On a GPU layers compute in bfloat16, where it is fastest [ours]; weights stay float32."""
    return torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda")


def share(module):
    """The module to train with: under torchrun one that averages gradients over the processes.

    All start with the first one's weights and, as their gradients are equal, keep equal ones. Each
    has its own batches and takes negatives, and batch norm its statistics, from its own batch
    alone: K - 1 negatives of a random batch are as random as of all of them, and a batch is large
    enough to estimate mean and variance over all its frames; the running ones are the first's.
    """
    return nn.parallel.DistributedDataParallel(module) if processes()[1] > 1 else module


def make_folder(out):
    """The folder `out`, created; raises UserError where that fails."""
    try:
        Path(out).mkdir(parents=True, exist_ok=True)
    except OSError as e:
        raise UserError(f"folder {out}: cannot be created ({e.strerror})") from e
    return Path(out)


def write_json(path, content):
    """Write a dict as indented JSON."""
    Path(path).write_text(json.dumps(content, indent=1) + "\n", encoding="utf8")


def make_encoders(cfg, device):
    """Fresh (S, F) as the settings say."""
    speech_encoder = SpeechEncoder(cfg.speech_width, cfg.sinc_stride, cfg.length).to(device)
    face_encoder = FaceEncoder(cfg.size, cfg.face_width, cfg.length).to(device)
    return [e.to(memory_format=torch.channels_last)  # S 1.15, F 1.5 times as fast on a CPU
            for e in (speech_encoder, face_encoder)]


def save_checkpoint(path, parts, previous=None, **more):
    """Write states and more beside `path`, then rename: `path` is whole or missing at any time.

    The file it replaces stays as `previous`. Raises UserError where it cannot be written.
    """
    part = Path(f"{path}.part")
    try:
        with open(part, "wb") as f:
            torch.save({name: p.state_dict() for name, p in parts.items()} | more, f)
            f.flush()
            os.fsync(f.fileno())  # on the disk before it has the name
    except (OSError, RuntimeError) as e:
        part.unlink(missing_ok=True)
        raise UserError(f"{path}: cannot be written ({str(e).splitlines()[0]}); the checkpoint "
                        "before it, if any, is whole: --resume goes on from there") from e
    if previous and path.exists():
        os.replace(path, previous)
    os.replace(part, path)


def load_checkpoint(path, device, command, build=lambda state: state):
    """build(state) of a checkpoint that `command` wrote; raises UserError where it is none."""
    if not Path(path).is_file():
        raise UserError(f"{path}: no such checkpoint; {command} writes them")
    try:
        with zipfile.ZipFile(path) as archive:
            if archive.testzip():  # sums of the bytes, which torch.load does not look at
                raise ValueError
        state = torch.load(path, map_location=device, weights_only=True)  # runs no code
        if state["command"] != command:
            raise UserError(f"{path}: is a checkpoint of {state['command']}, not of {command}")
        return build(state)
    except (UserError, torch.OutOfMemoryError):
        raise
    except Exception as e:  # on a damaged file torch.load raises nearly anything
        raise UserError(f"{path}: not a checkpoint of {command}, or damaged "
                        f"({type(e).__name__})") from e


MAY_CHANGE = {"data", "match", "out", "device", "workers", "log_every", "save_every", "resume"}


def open_run(cfg, command):
    """The state in --out to go on from, None at the beginning.

    Raises UserError where --out holds a run without --resume, or one of other settings: only paths,
    for folders may be moved, and what has no part in the result may change.
    """
    out, faults = make_folder(cfg.out), []
    found = [path for path in (out / "last.pt", out / "previous.pt") if path.exists()]
    finished = (out / "metrics.json").exists()
    if not cfg.resume and (found or finished):
        raise UserError(f"--out {out}: holds {'a finished' if finished else 'an unfinished'} "
                        "run; name another folder, delete this one, or go on with --resume")
    for path in found:
        try:
            state = load_checkpoint(path, "cpu", command, lambda s: s["counts"] and s)  # no best.pt
        except UserError as e:
            faults.append(str(e))
            continue
        if path.name != "last.pt":
            reason = faults[0] if faults else f"{out / 'last.pt'}: missing"
            print(f"{reason}; going on from {path}, step {state['step']}", file=sys.stderr)
        now = asdict(cfg)
        wrong = [f"{flag(name)} {value}, not {now.get(name)}"
                 for name, value in state["settings"].items()
                 if name not in MAY_CHANGE and value != now.get(name)]
        if state["processes"] != processes()[1]:
            wrong.append(f"{state['processes']} processes, not {processes()[1]}")
        if wrong:
            raise UserError(f"--resume: the run in {out} has {', '.join(wrong)}")
        return state | {"spare": path.name == "last.pt"}
    if faults:
        raise UserError(faults[0])
    return None


def load_match(path, device):
    """(MatchSettings, (S, F)) of a checkpoint of match-train; raises UserError where it is none."""
    def build(state):
        cfg = MatchSettings(**state["settings"])
        encoders = make_encoders(cfg, device)
        for encoder, name in zip(encoders, ("speech", "face")):
            encoder.load_state_dict(state[name])
        return cfg, encoders

    return load_checkpoint(path, device, "match-train", build)


class Gan(NamedTuple):
    """What draws faces and judges them: both settings, S and F of match-train, the average of G."""

    cfg: GanSettings
    match: MatchSettings
    speech_encoder: nn.Module
    face_encoder: nn.Module
    generator: nn.Module


def make_gan(cfg, match, encoders, device):
    """S and F frozen, a fresh G as the settings say; match also says how pairs are loaded."""
    speech_encoder, face_encoder = (e.eval().requires_grad_(False) for e in encoders)
    generator = Generator(match.size, cfg.width, cfg.c_length)
    return Gan(cfg, replace(match, batch=cfg.batch, workers=cfg.workers), speech_encoder,
               face_encoder, generator.to(device, memory_format=torch.channels_last))


def load_gan(path, device):
    """The Gan of a checkpoint of gan-train; raises UserError where it is none."""
    def build(state):
        match = MatchSettings(**state["match"])
        cfg = GanSettings(**state["settings"] | {"steps": state["step"]})  # those it has had
        gan = make_gan(cfg, match, make_encoders(match, device), device)
        for name, module in zip(Gan._fields[2:], gan[2:]):
            module.load_state_dict(state[name])
        return gan

    return load_checkpoint(path, device, "gan-train", build)


def learning_rate(step, steps):
    """Share of the peak rate: up in a line over the first tenth, then down half a cosine [ours]."""
    warm = max(1, steps // 10)
    if step < warm:
        return (step + 1) / warm
    return 0.5 * (1 + math.cos(math.pi * (step - warm) / max(1, steps - warm)))


def make_optimizer(encoders, cfg):
    """SGD [paper §4]; the sinc cut-offs, being in Hz, have their own rate and no weight decay."""
    cut_offs = list(encoders[0].convs[0].parameters())
    others = [p for encoder in encoders for p in encoder.parameters()
              if all(p is not c for c in cut_offs)]
    groups = [dict(params=others), dict(params=cut_offs, lr=cfg.lr * cfg.sinc_lr, weight_decay=0.0)]
    optimizer = torch.optim.SGD(groups, cfg.lr, cfg.momentum, weight_decay=cfg.weight_decay)
    return optimizer, torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda i: learning_rate(i, cfg.steps))


def validate(encoders, people, cfg, faults, device, draws=20):
    """Accuracy (%) of the trained task: always the same windows, a mean over draws of negatives."""
    embedded = embed_pairs(encoders, people, cfg, cfg.seed, device, faults)
    for encoder in encoders:
        encoder.train()
    generator = torch.Generator().manual_seed(cfg.seed)
    return np.mean([k_way(*embedded, cfg.k, cfg.direction, generator)
                    for _ in range(draws)]).item()


def find_corpus(cfg, k):
    """The corpus --data and its labels; the synthetic one is made where it is missing."""
    rank, count = processes()
    if rank == 0 and cfg.data == SYNTHETIC and not Path(cfg.data).exists():
        make_data(MakeSettings, cfg.data)  # the class holds the defaults
    if count > 1:
        distributed.barrier()
    return open_corpus(cfg.data, k), read_labels(cfg.data)


def match_train(cfg):
    """Train S and F label-free on Eq. 1; keep and test the pair that validates best [ours]."""
    device = pick_device(cfg.device)
    corpus, labels = find_corpus(cfg, cfg.k)
    state, out = open_run(cfg, "match-train"), Path(cfg.out)
    torch.manual_seed(cfg.seed)
    encoders = speech_encoder, face_encoder = make_encoders(cfg, device)
    optimizer, schedule = make_optimizer(encoders, cfg)
    pairs = Pairs(corpus["train"], cfg.seconds, cfg.size, cfg.batch, cfg.seed, shuffle=True)
    weights = dict(speech=speech_encoder, face=face_encoder)
    run = Run("match-train", cfg, device, weights | dict(optimizer=optimizer, schedule=schedule),
              state)

    def check():
        val = validate(encoders, corpus["val"], cfg, run.faults, device)
        print(f"validation after step {run.step}: {cfg.direction} {cfg.k}-way {val:.1f} %",
              flush=True)
        if val > run.best:
            run.best = val
            save_checkpoint(out / "best.pt", weights, step=run.step, val=val, **run.fixed)

    if not run.step and (first := pairs[0]).speech is not None:
        for encoder, x in zip(encoders, to_device(first, device)):
            centre_head(encoder, x)
    shared = [share(encoder) for encoder in encoders]
    for i, batch in run.batches(pairs, check):
        candidates = draw_candidates(batch.identity, cfg.k, step_generator(cfg.seed, i))  # (B, K)
        with autocast(device):  # (B, T) -> (B, D), (B, 3, H, W) -> (B, D)
            speech, faces = (encoder(x) for encoder, x in zip(shared, to_device(batch, device)))
        loss, hits = match_loss(speech, faces, send(candidates, device), cfg.direction)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_([p for e in encoders for p in e.parameters()], cfg.max_norm)
        optimizer.step()
        schedule.step()
        run.add(cfg.batch, loss=loss, accuracy=100 * hits)

    if run.rank == 0:
        _, encoders = load_match(out / "best.pt", device)
        report_matching(encoders, corpus["test"], labels, cfg, cfg.runs, out, device)
    largest(0)  # all processes stay until the first one is done


def report_matching(encoders, people, labels, cfg, runs, out, device):
    """Print the tests' table and write metrics.json and examples.png."""
    metrics = evaluate_matching(encoders, people, labels, cfg, runs, device)
    print_table(metrics, {"trained": "", "oracle": "oracle/"})
    write_json(out / "metrics.json", metrics)
    draw_examples(encoders, people, cfg, out / "examples.png", device)


def match_test(args):
    """Test a trained pair on one split: both directions, K = 2 and 10 [paper Tables 1 and 2]."""
    device = pick_device(args.device)
    cfg, encoders = load_match(args.match, device)
    cfg = replace(cfg, batch=args.batch, seed=args.seed, workers=args.workers)
    people = open_corpus(args.data, min(TEST_KS), (args.split,))[args.split]
    labels, out = read_labels(args.data), make_folder(args.out)
    report_matching(encoders, people, labels, cfg, args.runs, out, device)


def gan_train(cfg):
    """Train G and D [paper §3.2] on a frozen S [ours]; gan.generator, G's average, is tested."""
    device = pick_device(cfg.device)
    match, encoders = load_match(cfg.match, device)
    side = PAPER["match-train"]["size"]
    if cfg.preset == "paper" and match.size != side:
        raise UserError(f"--preset paper: needs encoders of {side} pixels, {cfg.match} is of "
                        f"{match.size} pixels; train it with match-train --preset paper")
    corpus, labels = find_corpus(cfg, 2)
    state, out = open_run(cfg, "gan-train"), Path(cfg.out)
    if state and any(not torch.equal(x.cpu(), state["face_encoder"][name])
                     for name, x in encoders[1].state_dict().items()):
        raise UserError(f"--resume: the run in {out} has other encoders than --match {cfg.match}")
    samples = make_folder(out / "samples")
    torch.manual_seed(cfg.seed)
    gan = make_gan(cfg, match, encoders, device)
    generator = copy.deepcopy(gan.generator)
    discriminator = Discriminator(gan.face_encoder, cfg.weight).to(device)
    betas = (cfg.beta1, cfg.beta2)
    g_optimizer = torch.optim.Adam(generator.parameters(), cfg.lr, betas)  # [paper §4]
    d_optimizer = torch.optim.Adam(discriminator.parameters(), cfg.d_lr, betas)
    schedules = [torch.optim.lr_scheduler.LambdaLR(o, lambda i: min(1, 2 - 2 * i / cfg.steps))
                 for o in (g_optimizer, d_optimizer)]  # down to 0 in the second half [ours]
    pairs = Pairs(corpus["train"], match.seconds, match.size, cfg.batch, cfg.seed, shuffle=True)
    parts = dict(zip(Gan._fields[2:], gan[2:])) | dict(
        g=generator, d=discriminator, g_optimizer=g_optimizer, d_optimizer=d_optimizer,
        g_schedule=schedules[0], d_schedule=schedules[1])
    run = Run("gan-train", cfg, device, parts, state, "images", match=asdict(match))

    def check():
        val = evaluate_generator(gan, corpus["val"], {}, 1, device, run.faults)
        val = {name: val[name] for name in ("preferred", "f-v/2", "real/f-v/2") if name in val}
        run.record({"step": run.step} | {f"val/{name}": value for name, value in val.items()})
        print(f"validation after step {run.step}:",
              *(f"{name} {value:.1f} %" for name, value in val.items()), sep="  ", flush=True)
        draw_samples(gan, corpus["val"], samples / f"{run.step:06}.png", device)

    shared_g, shared_d = share(generator), share(discriminator)
    for i, batch in run.batches(pairs, check):
        speech, faces = to_device(batch, device)  # (B, T), (B, 3, H, W)
        rng = step_generator(cfg.seed, i)
        others = send(draw_candidates(batch.identity, 2, rng)[:, 1], device)  # (B,)
        z = send(torch.randn(len(faces), EMBED, generator=rng), device)  # (B, D)
        with autocast(device):
            with torch.no_grad():
                c = gan.speech_encoder(speech)  # c+: (B, T) -> (B, D)
            fakes = shared_g(z, c)  # (B, D), (B, D) -> (B, 3, H, W); both steps use them
        wrong = c[others]  # c-: (B, D)
        numbers = d_step(shared_d, d_optimizer, faces, fakes, c, wrong, cfg,
                         penalise=(run.step + 1) % cfg.r1_every == 0)
        numbers |= g_step(discriminator, g_optimizer, faces, fakes, c, wrong, cfg)
        for schedule in schedules:
            schedule.step()
        follow(gan.generator, generator, run.step + 1, cfg.decay)
        run.add(len(faces), **numbers)

    if run.rank == 0:
        metrics = evaluate_generator(gan, corpus["test"], labels, cfg.runs, device, FaultCounter())
        print_table(metrics, {"generated face": "", "true face": "real/"})
        print(f"generated face preferred to the true one: {show(metrics, 'preferred')} %")
        write_json(out / "metrics.json", metrics)
    largest(0)  # all processes stay until the first one is done


# ==== 7. Analyses: K-way matching [paper §4, Tables 1 and 2] and its ceiling [ours], QTA, figures =
# A row of Table 1 is a training (--direction v-f or f-v) on a corpus of one clip per identity, a
# row of Table 2 one on VoxCeleb with VGGFace.

TEST_KS = (2, 10)  # [paper §4]
TASKS = list(itertools.product(DIRECTIONS, TEST_KS))
CHUNK = 4096  # clips handled at once: memory grows with their number, not with its square [ours]


def draw_rivals(identity, k, generator):
    """K-1 negatives (N, K-1) for each of N clips: of different people, never of the clip's own."""
    _, person, count = torch.unique(identity, return_inverse=True, return_counts=True)  # (N,), (P,)
    people = torch.cat([person[:, None], torch.zeros(len(person), k - 1, dtype=torch.long)], 1)
    again = torch.zeros_like(people, dtype=torch.bool)  # (N, K), who is to be drawn
    again[:, 1:] = True
    while again.any():
        people[again] = torch.randint(len(count), (int(again.sum()),), generator=generator)
        again = (people[:, :, None] == people[:, None, :]).tril(-1).any(2)  # drawn before in a row
    clips, first = person.argsort(), count.cumsum(0) - count  # clips by person, first of each
    chosen = (torch.rand(people.shape, generator=generator) * count[people]).long()  # which of them
    return clips[first[people] + chosen][:, 1:]


def k_way(speech, faces, identity, k, direction, generator):
    """Top-1 accuracy of K-way matching over N clips, in percent: (N, D), (N, D), (N,) -> float."""
    query, keys = (speech, faces) if direction == "v-f" else (faces, speech)
    rivals = draw_rivals(identity, k, generator)  # (N, K-1)
    candidates = torch.cat([torch.arange(len(identity))[:, None], rivals], 1)  # (N, K)
    hits = [top1((q[:, None] * keys[rows]).sum(2))  # (n, 1, D), (n, K, D) -> (n, K) -> (n,)
            for q, rows in zip(query.split(CHUNK), candidates.split(CHUNK))]
    return 100 * torch.cat(hits).sum().item() / len(identity)


def matching_run(speech, faces, identity, genders, seed, prefix=""):
    """One run of all tests: {prefix + "v-f/2": percent, ...}; genders are N texts.

    With /gender the negatives are of the positive's gender, and clips without one ("") stay out. A
    test that has fewer than K people is left out.
    """
    parts = {"": [torch.arange(len(identity))],
             "/gender": [torch.tensor([i for i, g in enumerate(genders) if g == gender])
                         for gender in sorted(set(genders) - {""})]}
    row = {}
    for direction, k in TASKS:
        for suffix, groups in parts.items():
            groups = [group for group in groups if len(identity[group].unique()) >= k]
            scores, generator = [], torch.Generator().manual_seed(seed)
            for group in groups:
                pairs = speech[group], faces[group], identity[group]
                scores.append(len(group) * k_way(*pairs, k, direction, generator))
            if groups:
                row[f"{prefix}{direction}/{k}{suffix}"] = sum(scores) / sum(map(len, groups))
    return row


@torch.no_grad()
def embed_pairs(encoders, people, cfg, seed, device, faults):
    """A pair of every clip, encoded: speech (N, D), faces (N, D), identity (N,), on the CPU.

    Leaves the encoders in eval mode.
    """
    pairs = Pairs(people, cfg.seconds, cfg.size, cfg.batch, seed, shuffle=False)
    speech_encoder, face_encoder = (encoder.eval() for encoder in encoders)
    rows = []
    for batch in load_batches(pairs, range(len(pairs)), cfg.workers):
        faults.add(batch)
        speech, faces = to_device(batch, device)
        rows.append((speech_encoder(speech).cpu(), face_encoder(faces).cpu(), batch.identity))
    return [torch.cat(column) for column in zip(*rows)]


def oracle_embeddings(labels, names, identity):
    """The shared factors of N clips as one-hot rows: inner products count those that agree."""
    rows = [[labels[name][f] == str(level)
             for f, levels in SHARED.items() for level in range(levels)] for name in names]
    return torch.tensor(rows, dtype=torch.float32)[identity]


def genders_of(labels, people, identity):
    """The gender of N clips' people as labels.csv has it, "" where it has none."""
    genders = [labels.get(name, {}).get("gender") or "" for name in people]
    return [genders[i] for i in identity]


def evaluate_matching(encoders, people, labels, cfg, runs, device):
    """All tests on a split, in percent: mean and /std over runs; oracle/ where factors are known.

    Every run draws fresh windows, frames and negatives. The oracle sees the shared factors and
    guesses among candidates that share them all: nobody can expect to do better.
    """
    rows, faults = [], FaultCounter()
    for run in range(runs):
        seed = cfg.seed + 1000 * (run + 1)
        speech, faces, identity = embed_pairs(encoders, people, cfg, seed, device, faults)
        genders = genders_of(labels, people, identity)
        row = matching_run(speech, faces, identity, genders, seed)
        if all(factor in labels.get(name, {}) for factor in SHARED for name in people):
            truth = oracle_embeddings(labels, people, identity)
            row |= matching_run(truth, truth, identity, genders, seed, "oracle/")
        rows.append(row)
    return mean_and_std(rows)


def mean_and_std(rows):
    """{key: mean, key/std: deviation} over the runs' rows; a run may lack people for a K."""
    metrics = {}
    for key in rows[0]:
        values = [row[key] for row in rows if key in row]
        metrics[key] = round(np.mean(values), 2)
        metrics[f"{key}/std"] = round(np.std(values, ddof=1), 2) if len(values) > 1 else 0.0
    return metrics


def show(metrics, key, sign="+-", unit="", digits=1):
    """A metric with its deviation, if it has one, as text; "-" where nothing was measured."""
    std = f" {sign} {metrics[key + '/std']:.1f}" if f"{key}/std" in metrics else ""
    return f"{metrics[key]:.{digits}f}{std}{unit}" if key in metrics else "-"


def print_table(metrics, columns):
    """Accuracies: a line per test, a column per {title: prefix of its keys}, and chance."""
    titles = "".join(f"{title:>18}" for title in columns)
    print(f"\n{'accuracy in %':22}{titles}{'chance':>9}")
    for (direction, k), suffix in itertools.product(TASKS, ("", "/gender")):
        key, note = f"{direction}/{k}{suffix}", " same gender" if suffix else ""
        cells = "".join(f"{show(metrics, prefix + key):>18}" for prefix in columns.values())
        print(f"{direction.upper()} {k:>2}-way{note:12}{cells}{100 / k:9.1f}")


@torch.no_grad()
def draw_examples(encoders, people, cfg, path, device, rows=4):
    """Picture the V-F task: a voice per row, K faces, over each p(f_j | s) of Eq. 1."""
    most, generator = max(TEST_KS), torch.Generator().manual_seed(cfg.seed)
    batch = Pairs(people, cfg.seconds, cfg.size, min(max(most, cfg.batch), len(people)), cfg.seed,
                  shuffle=True)[0]
    k = min(most, len(batch.identity.unique()))
    candidates = draw_candidates(batch.identity, k, generator)  # (B, K)
    embedded = [net.eval()(x).cpu() for net, x in zip(encoders, to_device(batch, device))]
    chances = match_logits(*embedded, candidates, "v-f").softmax(1)  # (B, K)
    faces, grid, notes = to_pixels(batch.faces, "cpu"), [], []  # (B, 3, H, W)
    for columns, chance in list(zip(candidates, chances))[:rows]:
        order = torch.randperm(k, generator=generator).tolist()
        grid.append(faces[columns[order]])  # (K, 3, H, W)
        notes.append([f"{100 * chance[j]:.0f} %{', its own' if j == 0 else ''}" for j in order])
    draw_grid(path, grid, notes, ["p(face | voice)"])


@torch.no_grad()
def draw_fakes(gan, c, z):
    """G(z, c), (n, 3, H, W), on the CPU, of z and c, (n, D) each or one of them (D,) for all."""
    device = next(gan.generator.parameters()).device
    z, c = torch.broadcast_tensors(z, c)
    return gan.generator(z.to(device), c.to(device)).cpu()


@torch.no_grad()
def embed_fakes(gan, c, seed):
    """F(G(z, c)), (N, D), of N conditions (N, D), on the CPU; z is new for each."""
    device = next(gan.generator.parameters()).device
    z = torch.randn(c.shape, generator=torch.Generator().manual_seed(seed))  # (N, D)
    chunks = [(z.to(device), c.to(device)) for z, c in zip(z.split(32), c.split(32))]
    return torch.cat([gan.face_encoder(gan.generator(z, c)).cpu() for z, c in chunks])


def evaluate_generator(gan, people, labels, runs, device, faults, versus=None):
    """QTA 2 on a split, in percent: mean and /std over runs with fresh z, windows and negatives.

    preferred: F finds that the generated face fits the voice better than the true one; f-v/2: given
    a generated face, F and S pick its voice [paper §4]. The other tests of matching_run, and all of
    them on true faces as real/..., stand beside these [ours].
    """
    rows, encoders = [], (gan.speech_encoder, gan.face_encoder)
    for run in range(runs):
        seed = gan.cfg.seed + 1000 * (run + 1)
        c, real, identity = embed_pairs(encoders, people, gan.match, seed, device, faults)
        fake = embed_fakes(gan, c, seed)  # (N, D), as c and real are
        genders = genders_of(labels, people, identity)
        row = {"preferred": preference(c, fake, real)}
        if versus:  # another generator on the same encoders, with the same z
            other = embed_fakes(versus, c, seed)
            row |= {"versus/preferred": preference(c, other, real),
                    "versus/over": preference(c, fake, other)}
        rows.append(row | matching_run(c, fake, identity, genders, seed)
                    | matching_run(c, real, identity, genders, seed, "real/"))
    return mean_and_std(rows)


def preference(c, faces, others):
    """How often (%) voices (N, D) fit the first of two faces, (N, D) each, better [paper §4]."""
    return 100 * top1(torch.stack([inner(c, faces), inner(c, others)], 1)).mean().item()  # (N, 2)


def draw_grid(path, rows, names, heads, least=128):
    """A picture of faces: rows of (n, 3, H, W), each under its name, each column under its head.

    A name may be a list, too: one for each face. Faces smaller than `least` pixels are enlarged by
    a whole factor, each pixel becoming a square.
    """
    font, side = ImageFont.load_default(14), rows[0].shape[-1]
    side *= max(1, least // side)
    cell, line = side + 4, 24
    names = [[name] if isinstance(name, str) else name for name in names]
    width = max([max(map(len, rows)) * cell, *(int(font.getlength(name[0])) + 8 for name in names)])
    picture = Image.new("RGB", (width, line + len(rows) * (cell + line)), "white")
    draw = ImageDraw.Draw(picture)
    for i, head in enumerate(heads):
        draw.text((i * cell + cell // 2, line // 2), head, "black", font, anchor="mm")
    for j, (faces, name) in enumerate(zip(rows, names)):
        top = line + j * (cell + line)
        for i, text in enumerate(name):
            draw.text((4 + i * cell, top + line // 2), text, (90, 90, 90), font, anchor="lm")
        pixels = ((faces.cpu() + 1) * 127.5).round().clamp(0, 255).byte().permute(0, 2, 3, 1)
        for i, face in enumerate(pixels.numpy()):  # (n, H, W, 3)
            face = Image.fromarray(face).resize((side, side), Image.Resampling.NEAREST)
            picture.paste(face, (i * cell + 2, top + line))
    picture.save(path)


@torch.no_grad()
def draw_samples(gan, people, path, device, rows=6, columns=7):
    """Draw the same voices with the same z at every call; the first column is the true face."""
    some = dict(list(people.items())[::max(1, len(people) // rows)][:rows])
    pairs = Pairs(some, gan.match.seconds, gan.match.size, rows, gan.cfg.seed, shuffle=False)
    pairs.every = [(i, None) for i in range(len(some))]  # a random clip of each
    batch, z = pairs[0], torch.randn(columns, EMBED, generator=torch.Generator().manual_seed(0))
    if batch.speech is None:
        return  # unreadable
    c = gan.speech_encoder(send(batch.speech, device)).cpu()  # (rows, T) -> (rows, D)
    faces = to_pixels(batch.faces, "cpu")  # (rows, 3, H, W)
    grid = [torch.cat([faces[i:i + 1], draw_fakes(gan, c[i], z)]) for i in range(len(c))]
    names = [f"the voice of {pairs.names[i]}" for i in batch.identity]
    draw_grid(path, grid, names, ["true face", *(f"z {i + 1}" for i in range(columns))])


def generate(args, recordings):
    """Draw n faces for each recording: a row per recording, the same z down each column."""
    device = pick_device(args.device)
    gan = load_gan(args.gan, device)
    c = torch.stack([encode_recording(gan, path, args.seed, device) for path in recordings])
    z = torch.randn(args.n, EMBED, generator=torch.Generator().manual_seed(args.seed))  # (n, D)
    rows = [draw_fakes(gan, one, z) for one in c]  # (n, 3, H, W) each
    make_folder(Path(args.out).parent)
    draw_grid(args.out, rows, recordings, [f"z {i + 1}" for i in range(args.n)])
    print(f"{args.out}: {args.n} faces for each of {len(rows)} recordings")


@torch.no_grad()
def encode_recording(gan, path, seed, device):
    """c = S(s), (D,), of any recording; raises UserError where there is nothing to hear."""
    if not Path(path).is_file():
        raise UserError(f"{path}: no such recording")
    rng = np.random.default_rng(seed)
    try:
        for _ in range(20):  # one window may be a pause
            speech = load_speech(path, gan.match.seconds, rng)  # (T,)
            if np.ptp(speech) > SILENCE:
                return gan.speech_encoder(torch.from_numpy(speech)[None].to(device))[0].cpu()
    except ValueError as e:
        raise UserError(str(e)) from e
    raise UserError(f"{path}: silent, there is no voice to draw a face for")


# ---- gan-test: the figures and tables of section 4 from one command ------------------------------

RANKS, DISTANCES = (1, 2, 5, 10), ("L1", "L2", "cosine")  # [paper Table 3]
PROBED = {**SHARED, "glasses": 2, "hair": len(HAIR), "skin": len(SKIN), "background": "hue",
          "clothes": "hue", "light": "line", "tilt": "line"}  # what a face shows: levels or kind


def draw_couples(identity, count, generator):
    """Pairs of clips, (count, 2), whose people differ; identity (N,)."""
    if len(identity.unique()) < 2:
        raise UserError("a report needs clips of two people at least")
    couples = torch.empty(0, 2, dtype=torch.long)
    while len(couples) < count:
        new = torch.randint(len(identity), (count, 2), generator=generator)
        couples = torch.cat([couples, new[identity[new[:, 0]] != identity[new[:, 1]]]])
    return couples[:count]


def pearson(x, y, weight):
    """Pearson's r of (n,) and (n,), each pair counted `weight` (n,) times."""
    x, y = (v - (weight * v).sum() / weight.sum() for v in (x, y))
    return ((weight * x * y).sum()
            / ((weight * x * x).sum() * (weight * y * y).sum()).sqrt()).item()


def correlation(x, y, people, draws=1000, seed=0):
    """r of (n,) and (n,) and its 95 % interval; people (n, 2) are who each pair is of.

    The bootstrap draws people, not pairs, for pairs that share a person are not independent.
    """
    generator, (_, people) = torch.Generator().manual_seed(seed), people.unique(return_inverse=True)
    count, rs = int(people.max()) + 1, []
    for _ in range(draws):
        times = torch.randint(count, (count,), generator=generator).bincount(minlength=count)
        rs.append(pearson(x, y, times[people].prod(1).double()))  # (n, 2) -> (n,)
    return pearson(x, y, torch.ones(len(x)).double()), *np.nanquantile(rs, (0.025, 0.975)).tolist()


def qta1(gan, c, identity, genders, count, seed):
    """Cosine distances CD(c1, c2) and CD(F(G(z1, c1)), F(G(z2, c2))), (n,) each, of n couples.

    Beside them their people (n, 2) and whether the couple is of one gender: 1, 0, or -1, unknown.
    """
    couples = draw_couples(identity, count, torch.Generator().manual_seed(seed))  # (n, 2)
    first, second = c[couples[:, 0]], c[couples[:, 1]]  # (n, D)
    fakes = embed_fakes(gan, first, seed + 1), embed_fakes(gan, second, seed + 2)
    same = [-1 if not (genders[i] and genders[j]) else int(genders[i] == genders[j])
            for i, j in couples.tolist()]
    return (1 - F.cosine_similarity(first, second).double(),
            1 - F.cosine_similarity(*fakes).double(), identity[couples], torch.tensor(same))


def retrieve(queries, person, gallery, owner, distance, top=max(RANKS)):
    """The `top` nearest of the gallery (G, D) to queries (Q, D), (Q, top), and which are of their
    person, (Q, top); person (Q,), owner (G,).
    """
    nearest = []
    for q in queries.split(256):
        d = (1 - F.normalize(q) @ F.normalize(gallery).T if distance == "cosine"
             else torch.cdist(q, gallery, p=1.0 if distance == "L1" else 2.0))  # (q, G)
        nearest.append(d.topk(min(top, len(gallery)), largest=False).indices)
    nearest = torch.cat(nearest)  # (Q, top)
    return nearest, owner[nearest] == person[:, None]


def recall(queries, person, gallery, owner, prefix):
    """{prefix/distance/k: R@k in percent}: a face of the right person is among the k nearest."""
    row = {}
    for distance in DISTANCES:
        found = retrieve(queries, person, gallery, owner, distance)[1]  # (Q, top)
        row |= {f"{prefix}/{distance}/{k}": 100 * found[:, :k].any(1).float().mean().item()
                for k in RANKS}
    return row


def recall_by_chance(person, owner, k):
    """R@k in percent of a random order: one less the chance to miss all m faces of the speaker."""
    k, faces = min(k, len(owner)), owner.bincount(minlength=int(person.max()) + 1)
    misses = sum(math.comb(len(owner) - m, k) for m in faces[person].tolist())
    return 100 * (1 - misses / math.comb(len(owner), k) / len(person))


def list_faces(people, each, limit, seed):
    """At most `each` faces a person and `limit` in all, drawn at random: [(person, path)]."""
    faces, rng, everybody = [], np.random.default_rng(seed), list(people.values())
    for i in rng.permutation(len(everybody)).tolist():
        own = [f"{clip.folder}/{name}" for clip in everybody[i] for name in clip.faces]
        faces += [(i, own[j]) for j in rng.permutation(len(own))[:each]]
    return faces[:limit]


def load_faces(listed, size):
    """The readable ones of listed faces, uint8 (N, H, W, 3), and whose they are, (N,)."""
    faces, person = [], []
    for i, path in listed:
        try:
            faces.append(load_face(path, size))
            person.append(i)
        except ValueError as e:
            print(f"left out: {e}", file=sys.stderr)
    if not faces:
        raise UserError(f"none of {len(listed)} faces could be read (run check-data)")
    return torch.from_numpy(np.stack(faces)), torch.tensor(person)


def probe_targets(row):
    """The factors of a row of labels.csv as E numbers: one-hot levels, a hue's angle, a line."""
    target = []
    for name, kind in PROBED.items():
        x = float(row[name])
        if kind == "hue":
            target += [math.sqrt(2) * math.cos(2 * math.pi * x),
                       math.sqrt(2) * math.sin(2 * math.pi * x)]
        elif kind == "line":
            target.append(math.sqrt(3) * x / (12 if name == "tilt" else 1))  # range to variance 1
        else:
            target += [float(level == int(x)) for level in range(kind)]
    return target


def probe_columns():
    """{factor: slice of its numbers in probe_targets}."""
    widths = [{"hue": 2, "line": 1}.get(kind, kind) for kind in PROBED.values()]
    ends = itertools.accumulate(widths)
    return {name: slice(end - n, end) for name, n, end in zip(PROBED, widths, ends)}


def train_probe(faces, targets, size, width, device, steps=500, batch=64):
    """A network that reads all factors from faces uint8 (N, H, W, 3), learned from targets (N, E).

    It is F with fresh weights and another head: an instrument to look at generated faces with, the
    only thing here that ever sees a label in training. Its settings are [ours].
    """
    torch.manual_seed(0)
    probe = FaceEncoder(size, width).to(device, memory_format=torch.channels_last)
    probe.head = nn.Linear(probe.head.in_features, targets.shape[1]).to(device)
    nn.init.normal_(probe.head.weight, std=1e-3)  # the features, being sums, are large
    optimizer = torch.optim.Adam(probe.parameters(), 2e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, steps)
    for step in range(steps):
        rows = torch.randint(len(faces), (batch,))
        out, loss = probe.head(probe.features(to_pixels(faces[rows], device))), 0.0
        for name, cols in probe_columns().items():
            goal = targets[rows][:, cols].to(device)
            loss = loss + (F.mse_loss(out[:, cols], goal) if isinstance(PROBED[name], str)
                           else F.cross_entropy(out[:, cols], goal))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    return probe.eval()


@torch.no_grad()
def read_factors(probe, faces):
    """What the probe reads from faces (N, 3, H, W), (N, E): of a level its logit, centred.

    Probabilities would jump between levels and make an interaction of two causes that add up.
    """
    out = torch.cat([probe.head(probe.features(f)).cpu() for f in faces.split(64)])
    for name, cols in probe_columns().items():
        if not isinstance(PROBED[name], str):
            out[:, cols] -= out[:, cols].mean(1, keepdim=True)
    return out


def variance_shares(read):
    """(share due to c, share due to z, share due to both) of what was read, (V voices, Z, E).

    Two-way analysis of variance: the means over z vary by c alone, those over c by z alone.
    """
    total = read.var((0, 1), correction=0).sum()
    c = read.mean(1).var(0, correction=0).sum() / total
    z = read.mean(0).var(0, correction=0).sum() / total
    return c.item(), z.item(), (1 - c - z).item()


def draw_scatter(path, panels, across, up, side=300):
    """Panels (title, x, y) side by side, points within axes from 0 to the largest value of all."""
    font, left, top, foot = ImageFont.load_default(13), 46, 62, 52
    limit = max(0.2, math.ceil(5 * max(v.max().item() for _, *xy in panels for v in xy)) / 5)
    ticks = np.arange(0, limit + 1e-6, 0.2 if limit <= 1.2 else 0.5)
    width, height = left + side + 24, top + side + foot
    picture = Image.new("RGB", (width * len(panels), height), "white")
    draw = ImageDraw.Draw(picture)
    for i, (title, xs, ys) in enumerate(panels):
        x0, foot_y = i * width + left, top + side
        for x, y in zip((x0 + side * xs / limit).tolist(), (foot_y - side * ys / limit).tolist()):
            draw.ellipse((x - 1.5, y - 1.5, x + 1.5, y + 1.5), (70, 110, 170))
        draw.rectangle((x0, top, x0 + side, foot_y), outline="black")
        for tick in ticks:
            x, y = x0 + side * tick / limit, foot_y - side * tick / limit
            draw.line((x, foot_y, x, foot_y + 5), "black"), draw.line((x0 - 5, y, x0, y), "black")
            draw.text((x, foot_y + 8), f"{tick:.1f}", "black", font, anchor="ma")
            draw.text((x0 - 8, y), f"{tick:.1f}", "black", font, anchor="rm")
        draw.text((x0, 10), title, "black", font)
        draw.text((i * width + 8, top - 24), up, (90, 90, 90), font)
        draw.text((x0 + side / 2, foot_y + 28), across, (90, 90, 90), font, anchor="ma")
    picture.save(path)


def draw_report(gan, c, faces, first, out, seed, rows=4, columns=7):
    """Figures 2 to 4: voices by z, between two voices, between two z; c (N, D).

    faces uint8 (G, H, W, 3) are true ones, first (N,) says which of them shows a voice's speaker.
    """
    def true(i):
        return to_pixels(faces[first[i]][None], "cpu")  # (1, 3, H, W)

    def row(i, c, z):  # the true face of voice i, then G(z, c): (1 + columns, 3, H, W)
        return torch.cat([true(i), draw_fakes(gan, c, z)])

    t = torch.linspace(0, 1, columns)[:, None]  # shares of the way
    z = torch.randn(max(columns, rows + 1), EMBED, generator=torch.Generator().manual_seed(seed))
    chosen = torch.arange(len(c))[::max(1, len(c) // (2 * rows))][:2 * rows].tolist()
    couples = list(zip(chosen[::2], chosen[1::2]))
    shares = [f"{100 * share:.0f} %" for share in t[:, 0]]
    draw_grid(out / "grid.png", [row(i, c[i], z[:columns]) for i in chosen],
              [f"voice {i}" for i in chosen],
              ["true face", *(f"z {k + 1}" for k in range(columns))])
    draw_grid(out / "between_voices.png",
              [torch.cat([row(i, torch.lerp(c[i], c[j], t), z[0]), true(j)]) for i, j in couples],
              [f"voice {i} to voice {j}" for i, j in couples], ["true face", *shares, "true face"])
    draw_grid(out / "between_z.png",
              [row(i, c[i], torch.lerp(z[k], z[k + 1], t)) for k, (i, _) in enumerate(couples)],
              [f"voice {i}, z {k + 1} to z {k + 2}" for k, (i, _) in enumerate(couples)],
              ["true face", *shares])


def draw_retrieval(gan, c, person, faces, first, gallery, owner, out, seed, rows=6, top=5):
    """Figure 6: true face, generated one, the `top` nearest true ones by cosine distance."""
    some = torch.arange(len(c))[::max(1, len(c) // rows)][:rows]
    z = torch.randn(len(some), EMBED, generator=torch.Generator().manual_seed(seed))
    drawn, queries = draw_fakes(gan, c[some], z), embed_fakes(gan, c[some], seed)  # the same z
    nearest, right = retrieve(queries, person[some], gallery, owner, "cosine", top)
    hits = [[str(k) for k, hit in enumerate(row, 1) if hit] for row in right.tolist()]
    grid = [torch.cat([to_pixels(faces[first[i]][None], "cpu"), face[None],
                       to_pixels(faces[found], "cpu")])
            for i, face, found in zip(some, drawn, nearest)]  # rows of (2 + top, 3, H, W)
    draw_grid(out / "retrieval.png", grid,
              [f"voice {i}, the speaker is found at: {', '.join(hit) or 'none'}"
               for i, hit in zip(some.tolist(), hits)],
              ["true face", "generated", *(f"nearest {k + 1}" for k in range(top))])


def draw_ideal(voices, noises, size, seed):
    """Faces uint8 (V, Z, H, W, 3) as a perfect generator would draw them.

    The corpus's own program draws them: shared factors by row, all others by column, and how far
    the mouth is open at random.
    """
    rng = np.random.default_rng(seed)
    rows, columns = ([draw_factors(rng) for _ in range(n)] for n in (voices, noises))
    faces = [[synth_faces(z | {name: c[name] for name in SHARED}, [rng.uniform()])[0]
              for z in columns] for c in rows]
    return torch.from_numpy(np.array([[np.asarray(face.resize((size, size))) for face in row]
                                      for row in faces]))


def control_table(gan, c, corpus, labels, device, voices=48, noises=16):
    """{control/factor/...: percent}: the probe's skill on unseen true faces; the shares of c, z and
    both; as ideal, the share of the right one of c and z in a perfect generator's faces; as spread,
    the variance of the generated faces, of that of the perfect generator's. All [ours].
    """
    loaded = []
    for people in (corpus["train"], corpus["test"]):
        faces, person = load_faces(list_faces(people, FRAMES, 5000, gan.cfg.seed), gan.match.size)
        targets = torch.tensor([probe_targets(labels[name]) for name in people])  # (P, E)
        loaded.append((faces, targets[person]))
    probe = train_probe(*loaded[0], gan.match.size, gan.match.face_width, device)
    real, truth = loaded[1]  # uint8 (N, H, W, 3), (N, E)
    read = torch.cat([read_factors(probe, to_pixels(f, device)) for f in real.split(64)])  # (N, E)
    c = c[torch.linspace(0, len(c) - 1, min(voices, len(c))).long()]  # (V, D)
    z = torch.randn(noises, EMBED, generator=torch.Generator().manual_seed(gan.cfg.seed))  # (Z, D)
    drawn = torch.stack([read_factors(probe, draw_fakes(gan, one, z).to(device)) for one in c])
    ideal = torch.stack([read_factors(probe, to_pixels(faces, device)) for faces in
                         draw_ideal(len(c), noises, gan.match.size, gan.cfg.seed)])  # (V, Z, E)
    metrics = {}
    for name, cols in probe_columns().items():
        fake, best, seen, true = (x[..., cols] for x in (drawn, ideal, read, truth))
        if isinstance(PROBED[name], str):
            skill = 1 - (seen - true).square().mean() / true.var(0).mean()  # R^2
        else:
            skill = (seen.argmax(1) == true.argmax(1)).float().mean()
        found = dict(zip(("c", "z", "both"), variance_shares(fake)), probe=skill.item(),
                     ideal=variance_shares(best)[0 if name in SHARED else 1],
                     spread=(fake.var((0, 1)).sum() / best.var((0, 1)).sum()).item())
        metrics |= {f"control/{name}/{key}": round(100 * share, 1) for key, share in found.items()
                    if math.isfinite(share)}  # no shares where one face only is drawn
    return metrics


def gan_test(args):
    """Write OUT/report.md with every figure and number of section 4, its pictures, metrics.json."""
    device, out = pick_device(args.device), make_folder(args.out)
    gan = load_gan(args.gan, device)
    versus = load_gan(args.versus, device) if args.versus else None
    if versus and not torch.equal(versus.face_encoder.head.weight, gan.face_encoder.head.weight):
        raise UserError(f"--versus {args.versus}: was trained on other encoders than {args.gan}")
    gan.cfg.seed, gan.match.workers = args.seed, args.workers
    labels = read_labels(args.data)
    known = any(set(PROBED) <= set(row) for row in labels.values())
    corpus = open_corpus(args.data, 2, ("train", "test") if known else ("test",))
    try:
        [probe_targets(labels[name]) for people in corpus.values() for name in people]
    except (KeyError, ValueError, TypeError):  # somebody's factors are missing
        known = False
    people, faults = corpus["test"], FaultCounter()
    metrics = evaluate_generator(gan, people, labels, args.runs, device, faults, versus)

    encoders = gan.speech_encoder, gan.face_encoder
    c, _, identity = embed_pairs(encoders, people, gan.match, args.seed, device, faults)
    genders = genders_of(labels, people, identity)
    cd_c, cd_f, couple, same = qta1(gan, c, identity, genders, args.couples, args.seed)
    r, low, high = correlation(cd_c, cd_f, couple)
    if math.isfinite(r):  # not with two people: all distances are the same
        metrics |= {"qta1/r": r, "qta1/r/low": low, "qta1/r/high": high}
    panels = [("all couples", cd_c, cd_f)]
    for key, wanted, title in (("different", 0, "different gender"), ("same", 1, "same gender")):
        if (rows := same == wanted).any():
            panels.append((title, cd_c[rows], cd_f[rows]))
            metrics |= {f"qta1/{key}/c": cd_c[rows].mean().item(),
                        f"qta1/{key}/face": cd_f[rows].mean().item()}
    draw_scatter(out / "distances.png", panels, "CD(c1, c2)", "CD(F(G(z1, c1)), F(G(z2, c2)))")

    listed = list_faces(people, args.each, args.gallery, args.seed)
    faces, owner = load_faces(listed, gan.match.size)  # (G, H, W, 3), (G,): whose each is
    with torch.no_grad():
        gallery = torch.cat([gan.face_encoder(to_pixels(f, device)).cpu() for f in faces.split(64)])
    asked = torch.isin(identity, owner)  # voices whose speaker is in the gallery
    c, identity = c[asked], identity[asked]
    if len(identity.unique()) < 2:
        raise UserError(f"--gallery {args.gallery} --each {args.each}: leaves faces of one person")
    for prefix, generator in (("", gan), ("versus/", versus))[:2 if versus else 1]:
        queries = [embed_fakes(generator, c, args.seed + run) for run in range(args.runs)]
        metrics |= mean_and_std([recall(q, identity, gallery, owner, prefix + "retrieval")
                                 for q in queries])
    metrics |= {f"chance/retrieval/{k}": recall_by_chance(identity, owner, k) for k in RANKS}
    metrics |= {"retrieval/gallery": len(owner), "retrieval/queries": len(c),
                "retrieval/each": args.each}

    face_of = {person: i for i, person in enumerate(owner.tolist())}
    first = torch.tensor([face_of[person] for person in identity.tolist()])  # (N,)
    draw_report(gan, c, faces, first, out, args.seed)
    draw_retrieval(gan, c, identity, faces, first, gallery, owner, out, args.seed)
    if known:
        metrics |= control_table(gan, c, corpus, labels, device)
    metrics = {key: round(value, 3) for key, value in metrics.items()}
    write_json(out / "metrics.json", metrics)
    (out / "report.md").write_text(report_page(metrics, args, gan, versus), encoding="utf8")
    print(f"{out / 'report.md'}: written")


def claims(m, losses):
    """[(claim of the paper, what was found, whether it held)] by metrics m; losses of both runs.

    A claim holds if each of its numbers is more than what stands beside it: by more than the sum of
    both deviations.
    """
    def more(a, b):
        return m[a] - m.get(f"{a}/std", 0) > (m[b] + m.get(f"{b}/std", 0) if b in m else b)

    rows = {
        "Unseen people are matched above chance, in both directions after training one":
            [(f"real/{d}/{k}", 100 / k) for d, k in TASKS if k == 2 or f"real/{d}/{k}" in m],
        "Voices of one gender have closer conditions, and closer faces are drawn for them":
            [(f"qta1/different/{of}", f"qta1/same/{of}") for of in ("c", "face")],
        "Like voices get like faces: r > 0": [("qta1/r", 0), ("qta1/r/low", 0)],
        "F prefers the generated face to the true one": [("preferred", 50)],
        "Generated faces tell their voice better than true ones": [("f-v/2", "real/f-v/2")],
        "Eq. 5 serves better than Eq. 4: in preference, head to head, in retrieval":
            [("preferred", "versus/preferred"), ("versus/over", 50),
             ("retrieval/cosine/5", "versus/retrieval/cosine/5")],
        "c moves gender, age and shape: 80 % of the variance":
            [(f"control/{name}/c", 79.95) for name in SHARED],
        "z moves background, hair, tilt and glasses: 80 % of the variance":
            [(f"control/{name}/z", 79.95) for name in ("background", "hair", "tilt", "glasses")]}
    found = []
    for claim, pairs in rows.items():
        keys = [key for pair in pairs for key in pair if isinstance(key, str)]
        tested = m.keys() >= set(keys) and (losses == ("relid", "rel") or "Eq. 5" not in claim)
        held = ("yes" if all(more(*pair) for pair in pairs) else "no") if tested else "not tested"
        numbers = ", ".join(f"{key} {m[key]:.4g}" for key in keys if key in m)
        found.append((claim, numbers or "-", held))
    return found


def report_page(metrics, args, gan, versus):
    """The report as Markdown: each figure and number of section 4 beside the paper's."""
    cell = functools.partial(show, metrics, sign="±", unit=" %")
    number = functools.partial(show, metrics, digits=3)
    def table(head, *rows):
        return "\n".join("| " + " | ".join(map(str, row)) + " |"
                         for row in (head, ["---"] * len(head), *rows))

    other = (f"`{args.versus}`, `--loss {versus.cfg.loss}`, {versus.cfg.steps} steps"
             if versus else "none was given (`--versus`)")
    two = {"qta1/same/c", "qta1/different/c"} <= set(metrics)
    no_gender = "" if two else " (labels.csv has not two genders: not filled)"
    no_versus = "" if versus else " (no `--versus`: not filled)"
    control = "Not filled: labels.csv does not have the factors of the synthetic corpus."
    if "control/age/c" in metrics:
        control = table(["Factor", "right on true faces", "due to c", "due to z", "due to both",
                         "perfect generator", "variance"], *(
            [name, *(cell(f"control/{name}/{key}") for key in ("probe", "c", "z", "both")),
             cell(f"control/{name}/ideal") + (" c" if name in SHARED else " z"),
             cell(f"control/{name}/spread")] for name in PROBED))
    return f"""# Report on {args.gan}

Generator: `--loss {gan.cfg.loss}`, {gan.cfg.steps} steps; encoders: trained {gan.match.direction},
K = {gan.match.k}. Compared with: {other}. People of `{args.data}/test`, none of whom
was trained on. Distances and matching use the inference stage's F. ± is the deviation over
{args.runs} runs with fresh windows, frames, z and negatives (in retrieval: fresh z). The paper's
numbers are of AVSpeech or VoxCeleb: another corpus, not comparable. A cell with "-" lacks people
for its K, or what is named beside it.

## Tables 1 and 2: matching, of true and of generated faces

Given a voice, pick its face among K (V-F), or the reverse. Same gender: so are the wrong answers.

{table(["Test", "true faces", "same gender", "generated", "same gender", "chance", "paper"],
       *([f"{d.upper()} {k}-way", cell(f"real/{d}/{k}"), cell(f"real/{d}/{k}/gender"),
          cell(f"{d}/{k}"), cell(f"{d}/{k}/gender"), f"{100 / k:.0f} %",
          "88.47 % true, 95.14 % generated" if (d, k) == ("f-v", 2) else ""] for d, k in TASKS))}

## QTA 2: which face fits the voice better, by F

Faces as good as their rival would be preferred in 50 %. F is the judge, and what it does not see
does not count; the paper adds that true faces are more varied than generated ones.

{table(["Preferred", "here", "paper"],
       ["this face to the true one", cell("preferred"), "76.65 % (relid)"],
       ["--versus's to the true one" + no_versus, cell("versus/preferred"), "47.2 % (rel)"],
       ["this face to --versus's" + no_versus, cell("versus/over"), "79.68 %"])}

## Figures 2 to 4: voices by z, then from one voice to another with one z, then from z to z

![grid](grid.png)
![between two voices](between_voices.png)
![between two z](between_z.png)

## Figure 5: do like voices get like faces?

The cosine distance CD of two voices' conditions, against that of the faces drawn for them, each
with its own z. Pearson's r = {number("qta1/r")}, 95 % interval {number("qta1/r/low")} to
{number("qta1/r/high")} (bootstrap over people).

![distances](distances.png)

{table(["Mean CD" + no_gender, "different gender", "same gender", "paper"],
       ["of conditions", number("qta1/different/c"), number("qta1/same/c"), "0.46 -> 0.28"],
       ["of generated faces", number("qta1/different/face"), number("qta1/same/face"),
        "0.27 -> 0.15"])}

## Table 3 and Figure 6: retrieval

A generated face looks for its speaker among {metrics["retrieval/gallery"]:.0f} true faces, at most
{args.each} a person (5,000 in the paper; how many a person it
does not say, and the numbers of its Table 3 are not in our text). R@k: a face of the
speaker is among the k nearest. All embeddings have one length: L2 and cosine order alike.

{table(["", *(f"R@{k}" for k in RANKS)],
       *([f"{name}, {d}", *(cell(f"{prefix}retrieval/{d}/{k}") for k in RANKS)]
         for prefix, name in (("", "this generator"), ("versus/", "--versus" + no_versus))
         for d in DISTANCES),
       ["chance", *(cell(f"chance/retrieval/{k}") for k in RANKS)])}

![retrieval](retrieval.png)

## What c and z control

A network that learned to read each factor from true faces (right on unseen ones: the share of
levels, or R² of hues and lines) reads generated ones, over a grid of voices and z. Of the variance
of what it reads (of levels: logits), the share that voices make alone, z alone, and only both
together. Perfect generator: the share of c or z where the corpus's own program draws the grid;
variance: the total here, in percent of that program's.

{control}

## The paper's claims on this corpus

By these generators, one training seed each. "More" and "better": a difference of means above the
sum of their deviations, where there are such. Numbers by their names in metrics.json.

{table(["Claim", "Found", "Held"], *claims(metrics, (gan.cfg.loss, versus and versus.cfg.loss)))}
"""


# ==== 8. Command line =============================================================================

COMMANDS = {"match-train": MatchSettings, "match-test": TestSettings, "gan-train": GanSettings,
            "gan-test": ReportSettings, "generate": GenerateSettings, "make-data": MakeSettings,
            "check-data": CheckSettings}  # match-train runs match_train, and so on


def flag(name):
    """A field's name on the command line."""
    return "-n" if name == "n" else f"--{name.replace('_', '-')}"


def make_parser():
    """The command line: a subcommand per entry of COMMANDS, a flag per field of its settings."""
    parser = argparse.ArgumentParser(prog="voice2face.py", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, settings in COMMANDS.items():
        text = globals()[name.replace("-", "_")].__doc__.splitlines()[0]
        what = {"generate": "SPEECH", "make-data": "DIR", "check-data": "DIR"}.get(name, "")
        command = commands.add_parser(name, help=text, description=text,
                                      usage=f"%(prog)s [--flag value ...] {what}".rstrip())
        if what:
            command.add_argument("inputs", metavar=what, nargs="+" if what == "SPEECH" else None,
                                 help="recording" if what == "SPEECH" else "corpus folder")
        for f in fields(settings):
            paper = PAPER.get(name, {}).get(f.name)
            paper = f", paper: {paper}" if paper else ""
            text = f"{f.metadata['help']} (default: {f.default}{paper})".replace("%", "%%")
            kind = (dict(action="store_true") if f.type is bool else
                    dict(type=f.type, choices=f.metadata["choices"]))
            command.add_argument(flag(f.name), default=argparse.SUPPRESS, help=text, **kind)
    return parser


def check_settings(cfg):
    """Raise UserError for a value that cannot work, with its flag and what is allowed."""
    def rule(name, holds, allowed):
        if not holds:
            raise UserError(f"{flag(name)} {getattr(cfg, name)}: must be {allowed}")

    for f in fields(cfg):
        low = f.metadata["low"]
        rule(f.name, low is None or getattr(cfg, f.name) >= low, f"at least {low}")
        rule(f.name, f.type not in (int, float) or abs(getattr(cfg, f.name)) < 2**63, "below 2^63")
    for name in {"beta1", "beta2", "decay"} & set(vars(cfg)):
        rule(name, getattr(cfg, name) < 1, "below 1")
    if isinstance(cfg, GenerateSettings):
        rule("out", cfg.out.lower().endswith(".png"), "a .png file")
    if isinstance(cfg, MatchSettings):
        rule("batch", cfg.batch >= cfg.k, f"at least --k {cfg.k}")
        frame = math.prod(PASE_STRIDES[:-1]) * cfg.sinc_stride  # samples, before the last layer,
        shortest = 6 * frame / RATE  # s; which needs 6 frames, for it reflects 5
        rule("seconds", shortest <= cfg.seconds <= 60,
             f"{shortest:.2f} to 60 at this --sinc-stride")


def main(argv=None):
    """Run one command; its exit code: 0, 1 faulty corpus, 2 reported error, 128 + n at signal n."""
    if hasattr(sys.stdout, "reconfigure"):  # a path may hold what a terminal cannot print
        sys.stdout.reconfigure(errors="backslashreplace")
    args = vars(make_parser().parse_args(argv))
    command = args.pop("command")
    inputs = [args.pop("inputs")] if "inputs" in args else []  # DIR or recordings
    if args.get("preset") == "paper":
        args = PAPER[command] | args
    cfg = COMMANDS[command](**args)
    rank, count = processes()
    if rank:
        sys.stdout = open(os.devnull, "w")  # the first one speaks
    try:
        check_settings(cfg)
        if count > 1 and not command.endswith("-train"):
            raise UserError(f"{command}: runs in one process, without torchrun")
        faults = globals()[command.replace("-", "_")](cfg, *inputs)  # of check-data alone
        return 1 if faults else 0
    except UserError as e:
        error = e
    except OSError as e:
        error = f"{e.filename or getattr(cfg, 'out', 'file')}: {e.strerror or e}"
    except (RuntimeError, MemoryError) as e:
        signs = "to allocate", "allocate memory", "out of memory", "DataLoader worker (pid"
        if isinstance(e, MemoryError) or any(sign in str(e) for sign in signs):  # or was killed
            error = f"out of memory, try less at once ({e}".splitlines()[0] + ")"
        elif count > 1 and (isinstance(e, distributed.DistError) or "gloo" in str(e)):
            error = "another process ended first"
        else:
            raise
    except KeyboardInterrupt as e:
        more = "; the same command with --resume goes on" if hasattr(cfg, "resume") else ""
        print(f"voice2face: stopped{more}", file=sys.stderr)
        return 128 + (e.args[0] if e.args else signal.SIGINT)
    finally:
        if distributed.is_initialized():
            distributed.destroy_process_group()
    print(f"voice2face: error: {error}", file=sys.stderr)
    return 2


if __name__ == "__main__":
    exit_code = main()
    sys.stdout.flush()
    if processes()[1] > 1:
        os._exit(exit_code)  # gloo's threads abort the usual way out once in twenty times
    sys.exit(exit_code)
