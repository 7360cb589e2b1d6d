# /// script
# requires-python = ">=3.10"
# dependencies = ["torch==2.11.0", "torchaudio==2.11.0", "numpy", "pillow"]
# ///
"""voice2face: learn which face belongs to which voice, without a label.

A reference implementation of "From Inference to Generation: End-to-end Fully Self-supervised
Generation of Human Face from Speech" (Choi, Park, Lee; ICLR 2020), in one file. So far the inference
stage: section 3.1 of the paper, its protocol of section 4 and Tables 1 and 2.

The idea   A speech encoder S reads a raw waveform, a face encoder F reads a picture, and both answer
           with a point in the same space. Speech and face of one clip must lie closer together than
           speech and face of different clips: that is the only supervision, and it costs no label.

Map        1. Settings          every number that can be changed, with its meaning and its source
           2. Data              a folder of clips -> batches of (speech, face), checks of such a folder
           3. Synthetic corpus  people with known factors, so that everything runs without any data
           4. Inference         SincConv, SpeechEncoder S, FaceEncoder F, the K-way loss of Eq. 1
           5. Matching protocol the K-way test of section 4 and its oracle
           6. Training          match-train and match-test
           7. Command line

Glossary   paper  here        shape             meaning
           s      speech      (B, T)            waveforms, 16 kHz, in [-1, 1]
           f      faces       (B, 3, H, W)      pictures, RGB, in [-1, 1]
           se     S(s)        (B, D)            speech embeddings; the condition c of the second stage
           fe     F(f)        (B, D)            face embeddings
           K      k           -                 candidates in a matching task: 1 positive, K-1 negatives
           V-F    "v-f"       -                 given a voice, pick the face; F-V is the reverse
           One letter per dimension: B clips, K candidates, T samples, L frames, C channels,
           N taps of a filter, H W pixels, D = 128 embedding.

Sources    [paper §x], [PASE] (Pascual 2019), [SincNet] (Ravanelli 2018), [SNGAN] (Miyato 2018),
           [ours] where the paper is silent. Where this differs from the paper, and why:
           - embeddings are scaled to one length, so that the inner product of Eq. 1 is a cosine times a
             constant: with free lengths the loss first sits on a plateau (see `to_length`);
           - the K-1 negatives of a clip are other clips of its batch, so each clip is encoded once per
             step whatever K is (see `draw_candidates`);
           - the small preset reads 1.5 s and 64x64 pixels with narrower layers, to fit a CPU.

Commands   python voice2face.py match-train              train S and F (makes a synthetic corpus first)
           python voice2face.py match-test               Tables 1 and 2 for a trained pair
           python voice2face.py make-data DIR            write the synthetic corpus
           python voice2face.py check-data DIR           read every file of a corpus, list what is wrong
"""

import argparse
import colorsys
import concurrent.futures
import csv
import functools
import json
import math
import os
import struct
import sys
import time
import wave
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torchaudio
from PIL import Image, ImageChops, ImageDraw, ImageOps
from torch import nn
from torch.nn import functional as F

try:
    import resource
except ImportError:  # Windows
    resource = None

RATE = 16000  # samples per second, of every waveform in this file [PASE]
EMBED = 128  # D, the length of c = S(s) and of F(f) [paper §3.2]
SPLITS = ("train", "val", "test")
SYNTHETIC = "data/synthetic"  # the one folder that match-train fills by itself


class UserError(Exception):
    """A mistake the user can mend: printed as one line, exit code 2."""


# ==================================================================================================
# 1. Settings: a field is a flag; its help says what it means and where its value comes from
# ==================================================================================================


def setting(default, meaning, source="[ours]", choices=None):
    """A dataclass field that carries its own --help text."""
    return field(default=default, metadata={"help": f"{meaning} {source}", "choices": choices})


@dataclass
class MatchSettings:
    """Settings of match-train. The defaults are the preset `small`, PAPER changes some of them."""

    data: str = setting(SYNTHETIC, "corpus folder; this default is made when it is missing")
    out: str = setting("runs/match", "run folder for checkpoints, log and metrics")
    preset: str = setting("small", "small fits two CPU cores, paper is the paper's scale", choices=("small", "paper"))
    direction: str = setting("v-f", "what is trained: a face for a voice, or the reverse", "[paper §3.1]", ("v-f", "f-v"))
    k: int = setting(10, "candidates per matching task in training", "[paper §4]")
    steps: int = setting(1500, "training steps")
    batch: int = setting(32, "clips per step")
    seed: int = setting(0, "seed of weights, batches and candidates")
    device: str = setting("auto", "auto, cpu, cuda, cuda:1, ...")
    workers: int = setting(1, "loader processes; 0 loads in the training process")
    seconds: float = setting(1.5, "length of a speech window (paper: 6)")
    size: int = setting(64, "side of a face in pixels: 32, 64 or 128 (paper: 128)", choices=(32, 64, 128))
    sinc_stride: int = setting(8, "stride of the sinc layer (PASE: 1)")
    speech_width: int = setting(16, "filters of the sinc layer; later layers are multiples (PASE: 64)")
    face_width: int = setting(16, "channels of the first face block; later ones are multiples (SNGAN: 64)")
    length: float = setting(4.5, "length of every embedding: its square is the softmax's largest logit")
    lr: float = setting(0.05, "peak learning rate of SGD, reached after a tenth of the steps, then a cosine to 0")
    momentum: float = setting(0.9, "momentum of SGD")
    weight_decay: float = setting(1e-4, "weight decay of SGD")
    sinc_lr: float = setting(1e4, "learning rate of the sinc cut-offs, relative to lr: they are in Hz, their gradients tiny")
    max_norm: float = setting(1.0, "gradients of all weights together are shortened to this length")
    runs: int = setting(5, "repetitions of the test with fresh windows and negatives", "[paper §4.2]")
    eval_every: int = setting(300, "steps between validations")
    log_every: int = setting(50, "steps between log lines")


PAPER = dict(seconds=6.0, size=128, sinc_stride=1, speech_width=64, face_width=64, steps=200_000,
             eval_every=2000, log_every=100, workers=8)  # widths [PASE] [SNGAN], window [paper §4.1]


@dataclass
class TestSettings:
    """Settings of match-test."""

    data: str = setting(SYNTHETIC, "corpus folder")
    match: str = setting("runs/match/best.pt", "checkpoint written by match-train")
    out: str = setting("runs/match-test", "folder for metrics.json")
    split: str = setting("test", "part of the corpus", choices=SPLITS)
    runs: int = setting(5, "repetitions with fresh windows and negatives", "[paper §4.2]")
    batch: int = setting(64, "clips encoded at once")
    seed: int = setting(0, "seed of windows and negatives")
    device: str = setting("auto", "auto, cpu, cuda, cuda:1, ...")
    workers: int = setting(1, "loader processes")


@dataclass
class MakeSettings:
    """Settings of make-data."""

    identities: int = setting(1000, "people to draw: 80 % train, 6 % val, 14 % test")
    seed: int = setting(0, "seed of every factor")


@dataclass
class CheckSettings:
    """Settings of check-data."""

    k: int = setting(10, "identities that every split must hold, as match-train's --k asks")


# ==================================================================================================
# 2. Data: DATA/{train,val,test}/<identity>/<clip>/*.wav *.jpg, labels.csv   [paper §4.1]
# ==================================================================================================

SPEECH_FILES = (".wav", ".flac", ".mp3", ".m4a", ".aac", ".ogg", ".opus", ".wma")
FACE_FILES = (".jpg", ".jpeg", ".png")
MIN_SIDE = 32  # pixels; a smaller face is a fault [ours]
SILENCE = 1e-4  # a recording that never gets louder, of 1, is a fault [ours]
MAX_FAULTS = 0.01  # share of samples that may fail to decode before a run ends [ours]


class Clip(NamedTuple):
    """One recording: its folder and the names of its speech and face files (either may be empty)."""

    folder: str
    speech: tuple
    faces: tuple


def list_clips(folder):
    """All clips of one identity's folder, by listing it alone."""
    clips = []
    for entry in sorted(os.scandir(folder), key=lambda e: e.name):
        if entry.is_dir():
            names = sorted(os.listdir(entry.path))
            speech = tuple(n for n in names if n.lower().endswith(SPEECH_FILES))
            faces = tuple(n for n in names if n.lower().endswith(FACE_FILES))
            if speech or faces:
                clips.append(Clip(entry.path, speech, faces))
    return clips


def scan_corpus(data, k, splits=SPLITS):
    """List a corpus without opening a file: ({split: {identity: [Clip]}}, [fault, ...])."""
    corpus, faults, home = {}, [], {}
    if not Path(data).is_dir():
        return {}, [f"{data}: no such folder; a corpus is DATA/{{train,val,test}}/<identity>/<clip>/*.wav *.jpg"]
    for split in splits:
        folder = Path(data, split)
        if not folder.is_dir():
            faults.append(f"{folder}: split missing; a corpus has the folders {', '.join(splits)}")
            continue
        corpus[split] = people = {e.name: list_clips(e.path) for e in sorted(os.scandir(folder), key=lambda e: e.name) if e.is_dir()}
        if len(people) < k:
            faults.append(f"{folder}: {len(people)} identities, at least K = {k} are needed")
        for name, clips in people.items():
            for kind, found in (("speech", any(c.speech for c in clips)), ("faces", any(c.faces for c in clips))):
                if not found:
                    faults.append(f"{folder / name}: identity without {kind} "
                                  f"({' '.join(SPEECH_FILES if kind == 'speech' else FACE_FILES)} inside <identity>/<clip>/)")
            if name in home:
                faults.append(f"{folder / name}: identity is also in split {home[name]}; it may be in one only")
            home[name] = split
    return corpus, faults


def open_corpus(data, k, splits=SPLITS):
    """A corpus by its structure alone, {split: {identity: [Clip]}}; raises UserError at the first fault."""
    corpus, faults = scan_corpus(data, k, splits)
    if faults:
        more = f" (and {len(faults) - 1} more: run check-data)" if len(faults) > 1 else ""
        raise UserError(faults[0] + more)
    return corpus


def read_labels(data):
    """labels.csv as {identity: {column: text}}, {} where there is none."""
    path = Path(data, "labels.csv")
    if not path.exists():
        return {}
    with open(path, newline="", encoding="utf8") as f:
        return {row["identity"]: row for row in csv.DictReader(f)}


class Wav(NamedTuple):
    """Where the samples of a PCM or float WAV file are, from its header."""

    rate: int
    channels: int
    width: int  # bytes per sample of one channel
    is_float: bool
    offset: int  # bytes
    length: int  # samples of one channel


def wav_header(f):
    """Parse an open WAV file's chunks. The standard library's reader refuses float and extensible files."""
    riff, channels = f.read(12), 0
    if riff[:4] != b"RIFF" or riff[8:] != b"WAVE":
        raise ValueError("not a WAV file")
    while len(head := f.read(8)) == 8:
        name, size = head[:4], struct.unpack("<I", head[4:])[0]
        if name == b"data":
            if not channels:
                raise ValueError("WAV file whose samples come before their format")
            size = min(size, os.fstat(f.fileno()).st_size - f.tell())  # a streamed file states no true size
            return Wav(rate, channels, bits // 8, code == 3, f.tell(), size // (channels * bits // 8))
        body = f.read(size + size % 2)
        if name == b"fmt ":
            code, channels, rate, _, _, bits = struct.unpack("<HHIIHH", body[:16])
            code = struct.unpack("<H", body[24:26])[0] if code == 0xFFFE else code  # extensible: first of its GUID
            if code not in (1, 3) or bits not in (8, 16, 24, 32, 64) or not channels or not rate:
                raise ValueError(f"WAV of format {code} with {bits} bits; PCM or float is needed")
    raise ValueError("WAV file without samples")


def read_wav(path, choose):
    """Samples (L,) of a WAV file, mono, and its rate; reads from disk only what `choose` asks for."""
    with open(path, "rb") as f:
        wav = wav_header(f)
        start, stop = choose(wav.length, wav.rate)
        f.seek(wav.offset + start * wav.channels * wav.width)
        raw = f.read((stop - start) * wav.channels * wav.width)
    if wav.is_float:
        x = np.frombuffer(raw, f"<f{wav.width}")
    elif wav.width == 3:  # widen 24 bits to 32
        x = np.zeros((len(raw) // 3, 4), np.uint8)
        x[:, 1:] = np.frombuffer(raw, np.uint8).reshape(-1, 3)
        x = x.view("<i4")[:, 0] / np.float32(2**31)
    else:
        x = np.frombuffer(raw, "u1" if wav.width == 1 else f"<i{wav.width}")
        x = x / np.float32(2 ** (8 * wav.width - 1)) - (wav.width == 1)  # 8 bits are unsigned
    return x.reshape(-1, wav.channels).mean(1, dtype=np.float32), wav.rate


def read_other(path, choose):
    """read_wav for every other format: decoded whole by torchaudio, with torchcodec and FFmpeg."""
    try:
        x, rate = torchaudio.load(path)  # (channels, L)
    except ImportError as e:
        raise ValueError("this format needs a decoder: pip install torchcodec and install FFmpeg, "
                         "or convert the file: ffmpeg -i IN OUT.wav") from e
    start, stop = choose(x.shape[1], rate)
    return x[:, start:stop].mean(0).numpy(), rate


def read_speech(path, choose=lambda length, rate: (0, length)):
    """Samples (L,) float32 in [-1, 1] of a recording, mono, and its rate.

    choose(length, rate) -> (start, stop) says which samples; all of them by default. Raises ValueError
    with the path where there is nothing to read: not decodable, empty, NaN.
    """
    try:
        x, rate = (read_wav if path.lower().endswith(".wav") else read_other)(path, choose)
    except Exception as e:  # a damaged file makes a decoder raise nearly anything
        raise ValueError(f"{path}: {e}") from e
    if not len(x):
        raise ValueError(f"{path}: no speech in it")
    if not np.isfinite(x).all():
        raise ValueError(f"{path}: speech with NaN or infinity")
    return x, rate


@functools.lru_cache
def resampler(rate):
    """torchaudio's resampler to 16 kHz; its filter is computed once per rate."""
    return torchaudio.transforms.Resample(rate, RATE)


def draw_window(length, window, moment, rng):
    """(start, stop) of a part of a recording without the sample `moment` (None: any part); all in samples.

    All windows that fit before or after the moment are equally likely; where none fits, the longer side
    is returned whole [paper §4.1: different time frames].
    """
    sides = [(0, length)] if moment is None else [(0, min(moment, length)), (min(moment + 1, length), length)]
    starts = [max(0, stop - start - window + 1) for start, stop in sides]  # how many windows fit each side
    if not sum(starts):
        return max(sides, key=lambda side: side[1] - side[0])
    i = int(rng.integers(sum(starts)))
    start = i if i < starts[0] else sides[1][0] + i - starts[0]
    return start, start + window


def load_speech(path, seconds, rng, moment=None):
    """A window of a recording as float32 (T,), T = seconds * 16000; it never contains `moment` (ms).

    Shorter speech is repeated, longer cut at a random place [paper §4.1]. Raises ValueError, see read_speech.
    """
    x, rate = read_speech(path, lambda length, rate: draw_window(
        length, math.ceil(seconds * rate), None if moment is None else moment * rate // 1000, rng))
    if rate != RATE:
        x = resampler(rate)(torch.from_numpy(x)).numpy()
    return np.resize(x, round(seconds * RATE))  # repeats or cuts


def load_face(path, size=None, flip=False):
    """A face as uint8 (H, W, 3): upright, RGB, its central square resized to `size` (None: as it is).

    Raises ValueError with the path where the picture cannot be decoded or has a side under 32 pixels.
    """
    try:
        with Image.open(path) as image:
            if size:
                image.draft("RGB", (size, size))  # decodes a large JPEG at a fraction of its size
            face = ImageOps.exif_transpose(image).convert("RGB")
    except Exception as e:  # a damaged file makes a decoder raise nearly anything
        raise ValueError(f"{path}: not a readable picture ({e})") from e
    side = min(face.size)
    if side < MIN_SIDE:
        raise ValueError(f"{path}: {face.width}x{face.height} pixels, at least {MIN_SIDE} a side are needed")
    if size:
        left, top = (face.width - side) // 2, (face.height - side) // 2
        face = face.resize((size, size), Image.Resampling.BILINEAR, (left, top, left + side, top + side), 2.0)
    return np.array(ImageOps.mirror(face) if flip else face)


class Batch(NamedTuple):
    """Positive pairs as the loader gives them."""

    speech: torch.Tensor  # (B, T) float32
    faces: torch.Tensor  # (B, H, W, 3) uint8, a quarter of the bytes; `to_device` makes it (B, 3, H, W) in [-1, 1]
    identity: torch.Tensor  # (B,) int64, equal where two pairs show the same person
    faults: list  # what was wrong with files that were replaced by another sample


class Pairs:
    """Batches of positive pairs. Batch i is a pure function of (seed, i): loader processes need no order.

    With shuffle, for training: one random clip each of B random identities, every identity once per epoch,
    faces flipped at random. Without, for tests: clips i * B to (i + 1) * B in order.
    """

    def __init__(self, people, seconds, size, batch, seed, shuffle):
        self.names, self.clips = list(people), list(people.values())
        self.every = [(person, clip) for person, clips in enumerate(self.clips) for clip in range(len(clips))]
        self.seconds, self.size, self.batch, self.seed, self.shuffle = seconds, size, batch, seed, shuffle

    def __len__(self):
        return math.ceil(len(self.every) / self.batch)

    def plan(self, i):
        """[(identity, clip)] of batch i; clip None stands for a random one."""
        if not self.shuffle:
            return self.every[i * self.batch:(i + 1) * self.batch]
        per_epoch = max(1, len(self.clips) // self.batch)
        order = np.random.default_rng([self.seed, i // per_epoch]).permutation(len(self.clips))
        first = i % per_epoch * self.batch
        people = np.resize(order[first:first + self.batch], self.batch)  # repeats people where B exceeds them
        return [(int(person), None) for person in people]

    def __getitem__(self, i):
        rng = np.random.default_rng([self.seed, i, 1])
        todo, rows, faults = self.plan(i)[::-1], [], []
        used = {person for person, _ in todo}
        spare = sorted(rng.permutation(len(self.clips)).tolist(), key=lambda person: person not in used)
        while todo:
            person, clip = todo.pop()
            try:
                rows.append((*self.load(person, clip, rng), person))
            except ValueError as e:
                faults.append(str(e))
                if not spare:
                    return Batch(None, None, None, faults)
                todo.append((spare.pop(), None))  # someone who is not in the batch, as long as there is one
        speech, faces, identity = zip(*rows)
        return Batch(torch.from_numpy(np.stack(speech)), torch.from_numpy(np.stack(faces)), torch.tensor(identity), faults)

    def load(self, person, clip, rng):
        """Speech (T,) and face (H, W, 3) of one identity, from one clip wherever it holds both."""
        clips = self.clips[person]
        clip = pick(clips, rng) if clip is None else clips[clip]
        heard = clip if clip.speech else pick([c for c in clips if c.speech], rng)
        seen = clip if clip.faces else pick([c for c in clips if c.faces], rng)
        face, speech = pick(seen.faces, rng), pick(heard.speech, rng)
        name = face.rpartition(".")[0]  # a whole number is the frame's time in ms
        moment = int(name) if seen is heard and name.isdecimal() else None
        pixels = load_face(f"{seen.folder}/{face}", self.size, flip=self.shuffle and rng.random() < 0.5)
        return load_speech(f"{heard.folder}/{speech}", self.seconds, rng, moment), pixels


def pick(items, rng):
    """A random one of a sequence."""
    return items[rng.integers(len(items))]


def load_batches(pairs, steps, workers):
    """An iterator over the batches of a range of steps, made ahead by worker processes."""
    return torch.utils.data.DataLoader(pairs, batch_size=None, sampler=steps, num_workers=workers,
                                       pin_memory=torch.cuda.is_available(), prefetch_factor=4 if workers else None)


class FaultCounter:
    """Names every unreadable file and ends the run when more than 1 sample in 100 was one."""

    def __init__(self):
        self.seen = self.faults = 0

    def add(self, batch):
        """Count a batch's faults; raises UserError when there are too many."""
        for fault in batch.faults:
            print(f"replaced by another sample: {fault}", file=sys.stderr, flush=True)
        self.faults += len(batch.faults)
        self.seen += 0 if batch.speech is None else len(batch.speech)
        if batch.speech is None or self.faults > MAX_FAULTS * max(self.seen, 1000):
            raise UserError(f"{self.faults} of {self.seen + self.faults} samples could not be read, more than 1 in 100 "
                            f"(run check-data); the last: {batch.faults[-1]}")


def to_device(batch, device):
    """(speech (B, T), faces (B, 3, H, W) in [-1, 1]) on the device."""
    speech = batch.speech.to(device, non_blocking=True)
    faces = batch.faces.to(device, non_blocking=True).permute(0, 3, 1, 2)  # (B, H, W, 3) -> (B, 3, H, W), channels last
    return speech, faces.float() / 127.5 - 1


def most_common(counts):
    """{value: count} as text, the most frequent first."""
    return ", ".join(f"{value} ({n})" for value, n in sorted(counts.items(), key=lambda item: -item[1])[:8]) or "none"


def check_data(data, k=10):
    """Read every file of a corpus, print what is in it and every fault; returns the number of faults."""
    corpus, faults = scan_corpus(data, k)
    clips = [(split, clip) for split, people in corpus.items() for found in people.values() for clip in found]
    hours, rates, sizes = dict.fromkeys(SPLITS, 0.0), {}, {}
    progress = Progress("check-data", len(clips))
    for i, (split, clip) in enumerate(clips):
        for name in clip.speech + clip.faces:
            path = f"{clip.folder}/{name}"
            try:
                if name in clip.faces:
                    h, w, _ = load_face(path).shape
                    sizes[f"{w}x{h}"] = sizes.get(f"{w}x{h}", 0) + 1
                else:
                    x, rate = read_speech(path)
                    rates[rate] = rates.get(rate, 0) + 1
                    hours[split] += len(x) / rate / 3600
                    if np.abs(x).max() < SILENCE:
                        raise ValueError(f"{path}: silent from start to end")
            except ValueError as e:
                faults.append(str(e))
        progress.show(i + 1)
    for split, people in corpus.items():
        found = [clip for clips in people.values() for clip in clips]
        print(f"{split:5}  {len(people)} identities, {len(found)} clips, {sum(len(c.speech) for c in found)} recordings "
              f"({hours[split]:.2f} h), {sum(len(c.faces) for c in found)} faces")
    print("sampling rates in Hz:", most_common(rates))
    print("face sizes in pixels:", most_common(sizes))
    for fault in faults:
        print(f"fault: {fault}")
    print(f"{len(faults)} faults")
    return len(faults)


# ==================================================================================================
# 3. Synthetic corpus: voices by source and filter, drawn faces, known factors   [all of it ours]
# ==================================================================================================

SHARED = {"gender": 2, "age": 4, "tract": 4, "build": 3}  # what voice and face share: factor -> levels
HAIR = [(38, 30, 28), (84, 52, 32), (132, 80, 40), (212, 172, 100), (160, 66, 34), (96, 94, 104)]
SKIN = [(255, 224, 200), (246, 204, 172), (224, 176, 136), (184, 132, 94), (136, 92, 66)]
VOWELS = np.array([  # formants in Hz of a e i o u and the neutral vowel, after Peterson and Barney (1952)
    (730, 1090, 2440, 3400), (530, 1840, 2480, 3500), (270, 2290, 3010, 3600),
    (570, 840, 2410, 3300), (300, 870, 2240, 3300), (500, 1500, 2500, 3500)])
BANDWIDTHS = np.array([60, 90, 120, 170])  # of the formants, Hz
CLIPS, FRAMES, CLIP_SECONDS = 2, 3, 3.0  # clips of an identity, faces of a clip, length of a clip
SIDE, OVERSAMPLE = 128, 3  # pixels of a face, drawn three times as large and averaged
OVAL = np.linspace(0, 2 * np.pi, 48, endpoint=False)


def draw_factors(rng):
    """All hidden factors of one person: shared ones as levels, then those of the face, then of the voice."""
    shared = {name: int(rng.integers(levels)) for name, levels in SHARED.items()}
    face = dict(background=rng.uniform(0, 1), light=rng.uniform(-1, 1), tilt=rng.uniform(-12, 12),
                glasses=int(rng.random() < 0.35), hair=int(rng.integers(len(HAIR))),
                skin=int(rng.integers(len(SKIN))), clothes=rng.uniform(0, 1), iris=int(rng.integers(3)))
    voice = dict(pitch=rng.normal(0, 0.04), loudness=rng.uniform(0.1, 0.7), tempo=rng.uniform(3, 5))
    return shared | face | voice


def shared_levels(person):
    """The shared factors scaled to 0 ... 1: (gender, age, tract, build), gender 1 being male."""
    return [person[name] / (levels - 1) for name, levels in SHARED.items()]


def synth_source(person, L, hop, rng):
    """Excitation (L * hop,) of a speaker, and the times of its syllables in s.

    Glottal pulses follow an intonation; with age they get slower, less regular in time (jitter) and in height
    (shimmer), and breathier. One syllable in seven is a pause.
    """
    n, (male, age, _, _) = L * hop, shared_levels(person)
    seconds = np.arange(n) / RATE
    syllables = np.cumsum(rng.uniform(0.7, 1.3, int(2 * n / RATE * person["tempo"]))) / person["tempo"]
    tune = np.interp(seconds, syllables, rng.normal(size=len(syllables)))
    f0 = (120 if male else 225) * np.exp(person["pitch"] - 0.35 * age + 0.1 * tune)  # Hz
    jitter, shimmer = np.repeat(rng.normal(size=(2, n // 64)), 64, axis=1)  # new every 4 ms
    phase = np.cumsum(f0 * (1 + (0.004 + 0.05 * age**2) * jitter)) / RATE
    pulses = np.diff(np.floor(phase), prepend=0) * np.sqrt(RATE / f0)  # a pulse where a period ends
    pulses *= 1 + (0.02 + 0.3 * age) * shimmer.clip(-2, 2)
    slope = 1 / (1 + 1j * np.fft.rfftfreq(n, 1 / RATE) / 700)  # of the glottal pulses: 6 dB per octave above 700 Hz
    pulses = np.fft.irfft(np.fft.rfft(pulses) * slope, n)
    breath = (0.02 + 0.5 * age) * rng.normal(size=n)
    stress = np.where(rng.random(len(syllables) + 1) < 1 / 7, 0, rng.uniform(0.5, 1, len(syllables) + 1))
    envelope = stress[np.searchsorted(syllables, seconds)]
    fade = np.hanning(1200)  # 75 ms
    return (pulses + breath) * np.convolve(envelope, fade / fade.sum(), "same"), syllables


def synth_speech(person, rng, hop=256, fft=1024):
    """A clip of a person's speech, int16 (samples,): frames of the source filtered by the vocal tract."""
    L, (male, age, tract, build) = int(CLIP_SECONDS * RATE) // hop, shared_levels(person)
    source, syllables = synth_source(person, L, hop, rng)
    frames = np.lib.stride_tricks.sliding_window_view(np.pad(source, (0, 2 * hop)), 2 * hop)[::hop][:L]
    vowels = VOWELS[rng.integers(len(VOWELS), size=len(syllables))]  # what is said
    seconds = np.arange(L) * hop / RATE
    scale = (0.92 if male else 1.06) * (1.14 - 0.28 * tract)  # a long tract resonates lower
    formants = scale * np.stack([np.interp(seconds, syllables, f) for f in vowels.T], 1)  # (L, 4)
    f = np.fft.rfftfreq(fft, 1 / RATE)  # (fft/2+1,)
    response = np.ones((L, len(f)), np.complex64)
    for k, width in enumerate(BANDWIDTHS * (1 + age)):
        F2 = np.float32(formants[:, k:k + 1] ** 2)
        response *= F2 / (F2 - np.float32(f**2) + np.complex64(1j) * np.float32(f * width))  # a resonance per formant
    lips = f / (f + 200)
    chest = 1 + build * (2 * np.exp(-((f - 270) / 80) ** 2) - 0.95 * np.exp(-((f - 900 * scale) / 350) ** 2))
    spectra = np.fft.rfft(frames * np.hanning(2 * hop + 1)[:-1], fft) * response * (lips * chest)
    pieces = np.fft.irfft(spectra, fft).reshape(L, -1, hop)  # (L, fft/hop, hop), to be added at frame + piece
    speech = np.zeros((L + pieces.shape[1], hop))
    for k in range(pieces.shape[1]):
        speech[k:k + L] += pieces[:, k]
    speech = speech[:L].ravel()
    speech = speech / np.abs(speech).max() * person["loudness"] + 0.001 * rng.normal(size=speech.size)
    return np.int16(32767 * speech.clip(-1, 1))


def blend(a, b, t):
    """The colour a share t of the way from a to b."""
    return tuple(int(x + (y - x) * t) for x, y in zip(a, b))


def tint(hue, saturation, value):
    """A colour from numbers in 0 ... 1."""
    return tuple(int(255 * c) for c in colorsys.hsv_to_rgb(hue, saturation, value))


class Pen:
    """Draws in face coordinates, x to the right and y down, (0, 0) between eyes and nose, tilted about the neck."""

    def __init__(self, image, tilt):
        self.draw, self.half = ImageDraw.Draw(image), image.width / 2
        self.cos, self.sin = 1.08 * math.cos(math.radians(tilt)), 1.08 * math.sin(math.radians(tilt))

    def place(self, points):
        """Face coordinates to pixels."""
        return [(self.half * (1 + x * self.cos - (y - 0.8) * self.sin),
                 self.half * (1.88 + x * self.sin + (y - 0.8) * self.cos)) for x, y in points]

    def fill(self, points, color):
        self.draw.polygon(self.place(points), fill=color)

    def line(self, points, color, width):
        self.draw.line(self.place(points), fill=color, width=round(width * self.half), joint="curve")

    def oval(self, x, y, rx, ry, color, chin=0.0, power=2.0):
        """A superellipse, narrowed by the share `chin` at its lower end."""
        c, s = (np.sign(v) * abs(v) ** (2 / power) for v in (np.cos(OVAL), np.sin(OVAL)))
        self.fill(np.stack([x + rx * c * (1 - chin * s.clip(0) ** 2), y + ry * s], 1), color)


def draw_head(pen, person):
    """Hair, neck, ears and head: gender gives hair and jaw, the tract the proportions, build neck and shoulders."""
    male, age, tract, build = shared_levels(person)
    skin, hair = SKIN[person["skin"]], HAIR[person["hair"]]
    dark, w, h = blend(skin, (60, 30, 30), 0.2), 0.55 - 0.12 * tract, 0.58 + 0.12 * tract
    if not male:
        pen.oval(0, 0.12, w + 0.17, 0.86, blend(hair, (0, 0, 0), 0.2), power=2.6)
    neck = 0.12 + 0.2 * build
    pen.oval(0, 1.5 - 0.14 * build, 0.7 + 0.35 * build, 0.72, tint(person["clothes"], 0.45, 0.65))
    pen.fill([(-neck, 0.3), (neck, 0.3), (1.1 * neck, 0.88), (0, 0.96), (-1.1 * neck, 0.88)], dark)
    for x in (-w, w):
        pen.oval(x, 0.02, 0.08, 0.14, dark)
    pen.oval(0, -0.2, w + 0.07, h, hair, power=2.2)
    pen.oval(0, -0.08, w, h, skin, *((0.12, 2.5) if male else (0.28, 2.1)))
    if male:
        turn = np.linspace(0.15, np.pi - 0.15, 24)
        jaw = np.stack([0.97 * w * np.cos(turn) * (1 - 0.12 * np.sin(turn) ** 2), 0.985 * h * np.sin(turn) - 0.08], 1)
        pen.fill([*jaw, (-0.5 * w, 0.26), (0, 0.22), (0.5 * w, 0.26)], blend(skin, (70, 60, 64), 0.22))  # shaved beard
    line = 0.22 - h - 0.12 * age  # the hairline rises with age
    turn = np.linspace(np.pi, 2 * np.pi, 24)
    crown = np.stack([(w + 0.06) * np.cos(turn), (h + 0.07) * np.sin(turn) - 0.14], 1)
    pen.fill([*crown, (0.97 * w, -0.2), (0.72 * w, line + 0.1), (0.1 * w, line), (-0.6 * w, line + 0.13), (-0.97 * w, -0.2)], hair)
    if age:
        crease = blend(skin, (90, 50, 50), 0.55 * age)
        for y in line + 0.16 + 0.09 * np.arange(1 + round(2 * age)):
            pen.line([(-0.5 * w, y + 0.02), (0, y), (0.5 * w, y + 0.02)], crease, 0.022)
        for side in (-1, 1):
            pen.line([(side * 0.13, 0.17), (side * 0.22, 0.28), (side * 0.235, 0.4)], crease, 0.03)
            pen.line([(side * 0.13, 0.05), (side * 0.22, 0.09), (side * 0.32, 0.05)], crease, 0.035)


def draw_features(pen, person):
    """Brows, eyes, nose and glasses: brows whiten and eyes narrow with age."""
    male, age, _, _ = shared_levels(person)
    skin, hair, black = SKIN[person["skin"]], HAIR[person["hair"]], (30, 26, 30)
    iris = [(76, 118, 160), (84, 56, 40), (92, 130, 88)][person["iris"]]
    brow, eye = blend(blend(hair, (0, 0, 0), 0.3), (228, 228, 228), age**2), 0.075 - 0.025 * age
    for side in (-1, 1):
        x = side * 0.215
        pen.oval(x, -0.05, 0.105, eye, (252, 252, 252))
        pen.oval(x, -0.05, 0.052, min(0.055, eye), iris)
        pen.oval(x, -0.05, 0.026, 0.03, black)
        pen.line([(x - 0.11, -0.045), (x - 0.05, -0.05 - eye), (x + 0.05, -0.05 - eye), (x + 0.11, -0.045)],
                 black, 0.02 if male else 0.034)
        pen.line([(x - side * 0.11, -0.185), (x + side * 0.02, -0.225), (x + side * 0.13, -0.19)], brow, 0.062 if male else 0.032)
    shadow = blend(skin, (70, 30, 30), 0.3)
    pen.fill([(-0.03, -0.06), (0.03, -0.06), (0.1, 0.16), (-0.1, 0.16)], shadow)
    pen.oval(0, 0.16, 0.11, 0.06, shadow)
    pen.oval(-0.01, 0.13, 0.05, 0.04, blend(skin, (255, 255, 255), 0.2))
    for side in (-1, 1):
        pen.oval(side * 0.06, 0.18, 0.022, 0.015, blend(skin, (60, 30, 30), 0.7))
    if person["glasses"]:
        for side in (-1, 1):
            pen.line([(side * 0.215 + 0.16 * np.cos(a), 0.125 * np.sin(a) - 0.045) for a in [*OVAL, OVAL[0]]], black, 0.026)
        pen.line([(-0.06, -0.06), (0.06, -0.06)], black, 0.026)


def synth_faces(person, openings):
    """Pictures (PIL, SIDE x SIDE) of one person, one for each mouth opening in 0 ... 1."""
    side = SIDE * OVERSAMPLE
    portrait = Image.new("RGB", (side, side), tint(person["background"], 0.3, 0.95))
    pen = Pen(portrait, person["tilt"])
    draw_head(pen, person)
    draw_features(pen, person)
    ramp = np.linspace(-1, 1, SIDE)
    light = 0.87 + 0.13 * (person["light"] * ramp[None, :] - 0.4 * ramp[:, None])  # (H, W), from one side and above
    light = Image.merge("RGB", [Image.fromarray(np.uint8(255 * light.clip(0, 1)))] * 3)
    lips = blend(SKIN[person["skin"]], (180, 70, 76), 0.9 - 0.45 * shared_levels(person)[0])
    faces = []
    for opening in openings:
        frame = portrait.copy()
        pen = Pen(frame, person["tilt"])
        pen.oval(0, 0.37, 0.15, 0.03 + 0.07 * opening, lips)
        pen.oval(0, 0.37, 0.11, 0.004 + 0.055 * opening, (96, 32, 38))
        faces.append(ImageChops.multiply(frame.reduce(OVERSAMPLE), light))
    return faces


def write_person(data, split, name, seed):
    """Draw one person's factors from the seed and write their clips; returns the row of labels.csv."""
    rng = np.random.default_rng(seed)
    person = draw_factors(rng)
    faces = iter(synth_faces(person, rng.uniform(0, 1, CLIPS * FRAMES)))
    for clip in range(CLIPS):
        folder = Path(data, split, name, f"clip{clip}")
        folder.mkdir(parents=True, exist_ok=True)
        with wave.open(str(folder / "speech.wav"), "wb") as f:
            f.setnchannels(1), f.setsampwidth(2), f.setframerate(RATE)
            f.writeframes(synth_speech(person, rng).tobytes())
        for moment in rng.choice(int(1000 * CLIP_SECONDS), FRAMES, replace=False):  # ms
            next(faces).save(folder / f"{moment}.jpg", quality=92)
    return {"identity": name, "split": split} | {key: round(value, 4) for key, value in person.items()}


def make_data(data, identities, seed):
    """Write the synthetic corpus: 80 % train, 6 % val, 14 % test, and labels.csv last."""
    if identities < 12:
        raise UserError(f"--identities {identities}: at least 12, so that every split has two")
    data, start = Path(data), time.time()
    parts = {"val": max(2, round(0.06 * identities)), "test": max(2, round(0.14 * identities))}
    splits = ["train"] * (identities - sum(parts.values())) + [s for s, n in parts.items() for _ in range(n)]
    names = [f"id{i:05}" for i in range(identities)]
    rows, progress = [], Progress("make-data", identities)
    with concurrent.futures.ProcessPoolExecutor(os.cpu_count()) as pool:
        for row in pool.map(write_person, [data] * identities, splits, names, [[seed, i] for i in range(identities)], chunksize=8):
            rows.append(row)
            progress.show(len(rows))
    with open(data / "labels.csv", "w", newline="", encoding="utf8") as f:
        writer = csv.DictWriter(f, rows[0])
        writer.writeheader()
        writer.writerows(rows)
    print(f"{data}: {identities} identities in {time.time() - start:.0f} s")


# ==================================================================================================
# 4. Inference: two encoders and the K-way loss   [paper §3.1]
# ==================================================================================================

PASE_TAPS = (251, 20, 11, 11, 11, 11, 11, 11)  # [PASE], the sinc layer first
PASE_STRIDES = (1, 10, 2, 1, 2, 1, 2, 2)  # [PASE]; their product, 160, makes 600 frames of 6 s
PASE_WIDTHS = (1, 1, 2, 2, 4, 4, 8, 8)  # [PASE], in units of the sinc layer's filters (64)


def mel(hz):
    """Hz to mel [SincNet]."""
    return 2595 * math.log10(1 + hz / 700)


def pad_same(x, taps):
    """Reflect both ends of (..., T) so that a convolution with stride s gives ceil(T / s) frames."""
    return F.pad(x, ((taps - 1) // 2, taps // 2), mode="reflect")


class SincConv(nn.Module):
    """A bank of band-pass filters of which only the two cut-offs are learned [SincNet].

    (B, T) -> (B, C, ceil(T / stride)). A filter is the difference of two ideal low-passes,
    g(t) = 2 f_high sinc(2 f_high t) - 2 f_low sinc(2 f_low t), cut to `taps` by a Hamming window and
    divided by 2 (f_high - f_low), which makes its centre 1. Raises ValueError for an even number of taps.
    """

    def __init__(self, filters, taps=251, stride=1, rate=RATE, min_low=50, min_band=50):
        super().__init__()
        if taps % 2 == 0:
            raise ValueError(f"sinc kernel must be odd, got {taps}")
        self.taps, self.stride, self.rate, self.min_low, self.min_band = taps, stride, rate, min_low, min_band
        edges = torch.linspace(mel(30), mel(rate / 2 - 100), filters + 1)  # (C+1,) evenly spaced in mel
        hz = 700 * (10 ** (edges / 2595) - 1)
        self.low_hz = nn.Parameter(hz[:-1, None])  # (C, 1)
        self.band_hz = nn.Parameter(hz.diff()[:, None])  # (C, 1)
        half = taps // 2
        self.register_buffer("t", torch.arange(-half, half + 1) / rate, persistent=False)  # (N,) in s
        self.register_buffer("window", torch.hamming_window(taps, periodic=False), persistent=False)  # (N,)

    def filters(self):
        """The impulse responses, (C, N)."""
        low = self.min_low + self.low_hz.abs()  # (C, 1)
        high = (low + self.min_band + self.band_hz.abs()).clamp(max=self.rate / 2)
        g = 2 * high * torch.sinc(2 * high * self.t) - 2 * low * torch.sinc(2 * low * self.t)  # (C, N); sinc(0) is 1
        return g * self.window / (2 * (high - low))

    def forward(self, x):
        x = pad_same(x[:, None], self.taps)  # (B, T) -> (B, 1, T + N - 1)
        return F.conv1d(x, self.filters()[:, None], stride=self.stride)  # (B, C, T/stride)


def to_length(x, length):
    """Scale embeddings (B, D) to one Euclidean length, so that Eq. 1's inner product is length^2 cos [ours].

    With free lengths the K-way loss starts at log K with next to no gradient and both encoders sit on a
    plateau; here length^2 plays the part of an inverse temperature.
    """
    return length * F.normalize(x, dim=1)


class SpeechEncoder(nn.Module):
    """S: waveforms (B, T) -> embeddings (B, D): PASE's encoder, a mean over time and a linear map [PASE] [ours].

    width is the number of sinc filters (64 in PASE), sinc_stride 1 in PASE.
    """

    def __init__(self, width=64, sinc_stride=1, length=1.0):
        super().__init__()
        self.length = length
        widths = [width * w for w in PASE_WIDTHS]
        strides = (sinc_stride,) + PASE_STRIDES[1:]
        layers = [SincConv(width, PASE_TAPS[0], sinc_stride)]
        for i in range(1, 8):
            layers.append(nn.Conv1d(widths[i - 1], widths[i], PASE_TAPS[i], strides[i], bias=False))  # BN has the bias
        self.convs = nn.ModuleList(layers)
        self.norms = nn.ModuleList(nn.BatchNorm1d(w) for w in widths)
        self.acts = nn.ModuleList(nn.PReLU(w, init=0.0) for w in widths)  # one slope per channel [PASE]
        self.head = nn.Linear(widths[-1], EMBED)

    def frames(self, x):
        """(B, T) -> (B, C, L), L = T / 160 with PASE's strides; the loudness is taken out first [ours]."""
        x = x / (x.std(1, keepdim=True) + SILENCE)  # (B, T)
        for conv, norm, act in zip(self.convs, self.norms, self.acts):
            x = x if isinstance(conv, SincConv) else pad_same(x, conv.kernel_size[0])
            x = act(norm(conv(x)))
        return x

    def forward(self, x):
        x = self.frames(x).mean(2)  # (B, C, L) -> (B, C)
        return to_length(self.head(x), self.length)  # (B, C) -> (B, D)


class FaceBlock(nn.Module):
    """Residual block of [SNGAN]'s discriminator: (B, C, H, W) -> (B, C', H/2, W/2), or the same H, W."""

    def __init__(self, channels, out, first=False, down=True):
        super().__init__()
        self.first, self.down = first, down
        self.conv1 = nn.Conv2d(channels, out if first else channels, 3, padding=1)
        self.conv2 = nn.Conv2d(out if first else channels, out, 3, padding=1)
        self.skip = nn.Conv2d(channels, out, 1)

    def forward(self, x):
        h = self.conv1(x if self.first else F.relu(x))
        h = self.conv2(F.relu(h))
        if self.down:
            h, x = F.avg_pool2d(h, 2), F.avg_pool2d(x, 2)  # (B, C, H, W) -> (B, C, H/2, W/2)
        return h + self.skip(x)  # pooling before the 1x1 is the same as after it, and cheaper


class FaceEncoder(nn.Module):
    """F: faces (B, 3, H, W) in [-1, 1] -> embeddings (B, D): the body of [SNGAN]'s projection discriminator.

    Blocks halve the side down to 4, one more keeps it; then ReLU, a sum over the 4x4 positions and a
    linear map [ours]. No batch statistics, so the second stage may differentiate it twice. width is 64 in
    [SNGAN]; size 2^n, at least 8. Glorot-uniform start, gain sqrt(2) on 3x3 [SNGAN].
    """

    def __init__(self, size=128, width=64, length=1.0):
        super().__init__()
        self.length = length
        downs = int(math.log2(size)) - 2
        if size != 4 * 2**downs or downs < 1:
            raise ValueError(f"face size must be 8, 16, 32, 64, 128, ..., got {size}")
        widths = [3] + [width * 2 ** min(i, 4) for i in range(downs)]
        self.blocks = nn.Sequential(*(FaceBlock(widths[i], widths[i + 1], first=i == 0) for i in range(downs)),
                                    FaceBlock(widths[-1], widths[-1], down=False))
        self.head = nn.Linear(widths[-1], EMBED)
        for m in self.modules():
            if isinstance(m, nn.Conv2d):
                nn.init.xavier_uniform_(m.weight, gain=math.sqrt(2) if m.kernel_size == (3, 3) else 1)
                nn.init.zeros_(m.bias)

    def forward(self, x):
        x = F.relu(self.blocks(x)).sum((2, 3))  # (B, C, 4, 4) -> (B, C)
        return to_length(self.head(x), self.length)  # (B, C) -> (B, D)


@torch.no_grad()
def centre_head(encoder, x):
    """Set the head so that the embeddings of a batch start with mean 0 and standard deviation 1 [ours].

    A fresh network sends every input to nearly the same direction; Eq. 1 then sees K equal candidates.
    """
    head, features = encoder.head, []
    hook = head.register_forward_hook(lambda module, inputs, output: features.append(output))
    encoder(x)
    hook.remove()
    std, mean = torch.std_mean(features[0], 0)  # (B, D) -> (D,), (D,)
    head.weight /= std[:, None]
    head.bias.copy_((head.bias - mean) / std)


def draw_candidates(identity, k, generator):
    """Columns (B, K) of each row's candidates: the row itself, then K-1 others of its batch, none twice.

    identity (B,): a negative is never of the row's identity [paper §4.1]. Raises ValueError where a row has
    fewer than K-1 such.
    """
    others = identity[:, None] != identity[None, :]  # (B,) -> (B, B)
    if (fewest := int(others.sum(1).min())) < k - 1:
        raise ValueError(f"K = {k} needs {k - 1} clips of other identities in a batch, one clip has {fewest}")
    keys = torch.rand(others.shape, generator=generator).masked_fill(~others, 2)  # (B, B)
    negatives = keys.topk(k - 1, largest=False).indices  # (B, K-1): those with the smallest random keys
    return torch.cat([torch.arange(len(identity))[:, None], negatives], 1)  # (B, K)


def match_logits(speech, faces, candidates, direction):
    """<S(s), F(f_j)> of each row's candidates, (B, K): speech chooses faces in v-f, faces speech in f-v."""
    sim = speech @ faces.T if direction == "v-f" else faces @ speech.T  # (B, D), (B, D) -> (B, B)
    return sim.gather(1, candidates)  # (B, B) -> (B, K), the positive in column 0


def match_loss(speech, faces, candidates, direction):
    """Eq. 1: the mean of -log p(f_1 | s), p = softmax_j <S(s), F(f_j)>; and the top-1 accuracy in 0 ... 1."""
    logits = match_logits(speech, faces, candidates, direction)
    return F.cross_entropy(logits, torch.zeros_like(candidates[:, 0])), top1(logits.detach()).mean()


def top1(logits):
    """1 where the positive (column 0) is largest, (B, K) -> (B,); n equally large candidates share the point."""
    best = logits == logits.max(1, keepdim=True).values  # (B, K)
    return best[:, 0] / best.sum(1)


# ==================================================================================================
# 5. Matching protocol: K-way tests in both directions, and their ceiling   [paper §4.2, Tables 1-2]
# ==================================================================================================

TEST_KS = (2, 10)  # [paper §4.2]
POOL = 512  # clips among which negatives are drawn at once, so that memory grows with N, not with N^2 [ours]


def k_way(speech, faces, identity, k, direction, generator):
    """Top-1 accuracy in percent of K-way matching over N clips: (N, D), (N, D), (N,) -> float.

    The clips are dealt at random into pools and each clip's negatives come from its own pool, which is as
    good as drawing them from all clips.
    """
    pools = torch.randperm(len(identity), generator=generator).tensor_split(math.ceil(len(identity) / POOL))
    hits = 0.0
    for pool in pools:
        candidates = draw_candidates(identity[pool], k, generator)
        hits += top1(match_logits(speech[pool], faces[pool], candidates, direction)).sum().item()
    return 100 * hits / len(identity)


def matching_row(speech, faces, identity, genders, seed):
    """One run of the protocol, {"v-f/2": percent, ..., "v-f/2/gender": ...}; genders is None or a text per clip.

    With /gender the negatives are of the positive's gender. A test that the clips are too few for is left out.
    """
    groups = {"": [torch.arange(len(identity))]}
    if genders is not None:
        groups["/gender"] = [torch.tensor([i for i, g in enumerate(genders) if g == one]) for one in sorted(set(genders))]
    row = {}
    for suffix, parts in groups.items():
        fewest = min(len(identity[part].unique()) for part in parts)
        for direction in ("v-f", "f-v"):
            for k in (k for k in TEST_KS if k <= fewest):
                generator = torch.Generator().manual_seed(seed)
                hits = [len(part) * k_way(speech[part], faces[part], identity[part], k, direction, generator) for part in parts]
                row[f"{direction}/{k}{suffix}"] = sum(hits) / len(identity)
    return row


@torch.no_grad()
def embed_pairs(encoders, pairs, device, workers, faults):
    """One pair of every clip through both encoders: speech (N, D), faces (N, D), identity (N,), on the CPU."""
    for encoder in encoders:
        encoder.eval()
    rows = []
    for batch in load_batches(pairs, range(len(pairs)), workers):
        faults.add(batch)
        speech, faces = to_device(batch, device)
        rows.append((encoders[0](speech).cpu(), encoders[1](faces).cpu(), batch.identity))
    for encoder in encoders:
        encoder.train()
    return [torch.cat(column) for column in zip(*rows)]


def oracle_embeddings(labels, names, identity):
    """The shared factors of each clip's identity as one-hot rows (N, levels): their inner product counts agreements."""
    rows = [[float(labels[name][f]) == v for f, levels in SHARED.items() for v in range(levels)] for name in names]
    return torch.tensor(rows, dtype=torch.float32)[identity]


def test_matching(encoders, people, labels, cfg, runs, device):
    """The protocol on one split: mean and spread in percent over `runs` fresh windows and negatives, and the oracle's."""
    faults, rows, oracle = FaultCounter(), [], []
    for run in range(runs):
        pairs = Pairs(people, cfg.seconds, cfg.size, cfg.batch, cfg.seed + 1000 * (run + 1), shuffle=False)
        speech, faces, identity = embed_pairs(encoders, pairs, device, cfg.workers, faults)
        known = [all(labels.get(name, {}).get(f) for name in pairs.names) for f in SHARED]  # is a factor known of everyone?
        genders = [labels[pairs.names[i]]["gender"] for i in identity] if known[0] else None
        rows.append(matching_row(speech, faces, identity, genders, run))
        if all(known):
            truth = oracle_embeddings(labels, pairs.names, identity)
            oracle.append(matching_row(truth, truth, identity, genders, run))
    metrics = {}
    for prefix, found in (("", rows), ("oracle/", oracle)):
        for key in found[0] if found else ():
            values = np.array([row[key] for row in found])
            metrics[prefix + key] = round(float(values.mean()), 2)
            metrics[f"{prefix}{key}/std"] = round(float(values.std(ddof=1)), 2) if runs > 1 else 0.0
    return metrics


def print_metrics(metrics):
    """The table of test_matching's metrics, a line per direction and K."""
    print(f"\n{'accuracy in %':22}{'all negatives':>16}{'oracle':>9}{'chance':>9}{'same gender':>16}{'oracle':>9}")
    for direction, task in (("v-f", "V-F, a face for a voice"), ("f-v", "F-V, a voice for a face")):
        for k in TEST_KS:
            key, cells = f"{direction}/{k}", []
            for name in (key, key + "/gender"):
                cells.append(f"{metrics[name]:.1f} +- {metrics[name + '/std']:.1f}" if name in metrics else "-")
                cells.append(f"{metrics['oracle/' + name]:.1f}" if "oracle/" + name in metrics else "-")
            print(f"{direction.upper()} {k:2}-way{'':12}{cells[0]:>16}{cells[1]:>9}{100 / k:9.1f}{cells[2]:>16}{cells[3]:>9}")


# ==================================================================================================
# 6. Training
# ==================================================================================================


class Progress:
    """A line with the time left: rewritten in place on a terminal, a plain line now and then in a file."""

    def __init__(self, name, total):
        self.name, self.total, self.start, self.last = name, total, time.time(), time.time()
        self.terminal = sys.stdout.isatty()

    def show(self, done, text="", always=False):
        """Say that `done` of the total are done; in a file at most every 10 s, unless always."""
        now, end = time.time(), done == self.total
        if always or end or now - self.last > (0.2 if self.terminal else 10):
            self.last = now
            line = f"{self.name} {done}/{self.total}  {text}  {(now - self.start) / max(done, 1) * (self.total - done):.0f} s left"
            print(f"\r{line:110}" if self.terminal else line, end="\n" if end or not self.terminal else "", flush=True)

    def say(self, text):
        """Print a line of its own."""
        print(f"\r{text:110}" if self.terminal else text, flush=True)


class RunLog:
    """log.jsonl of a run, an object per line: step, means since the last line, clips_per_s, peak_memory_gb, faults."""

    def __init__(self, out, steps, device):
        self.file, self.device, self.progress = open(out / "log.jsonl", "w", encoding="utf8"), device, Progress("step", steps)
        self.values, self.clips, self.since = {}, 0, time.time()

    def add(self, clips, **values):
        """Remember a step's numbers as they are: tensors stay on the device until the line is written."""
        self.clips += clips
        for name, value in values.items():
            self.values.setdefault(name, []).append(value.detach())

    def write(self, step, faults):
        """Write the line of a step and show it."""
        line = {"step": step} | {name: round(torch.stack(found).mean().item(), 4) for name, found in self.values.items()}
        line |= {"clips_per_s": round(self.clips / (time.time() - self.since), 1),
                 "peak_memory_gb": round(peak_memory(self.device), 3), "faults": faults}
        self.file.write(json.dumps(line) + "\n")
        self.file.flush()
        self.progress.show(step, "  ".join(f"{k} {v:g}" for k, v in line.items() if k not in ("step", "faults")), always=True)
        self.values, self.clips, self.since = {}, 0, time.time()


def pick_device(name):
    """A torch device from --device; raises UserError where there is no such."""
    name = ("cuda" if torch.cuda.is_available() else "cpu") if name == "auto" else name
    try:
        torch.empty(0, device=name)
    except (RuntimeError, AssertionError) as e:
        raise UserError(f"--device {name}: not available here ({str(e).splitlines()[0]})") from e
    return torch.device(name)


def peak_memory(device):
    """The most memory used so far, in GB: of the GPU, or of this process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e9
    if resource is None:
        return 0.0
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024) / 1e9


def make_encoders(cfg, device):
    """(S, F) as the settings say, freshly initialised."""
    speech = SpeechEncoder(cfg.speech_width, cfg.sinc_stride, cfg.length)
    face = FaceEncoder(cfg.size, cfg.face_width, cfg.length).to(memory_format=torch.channels_last)
    return speech.to(device), face.to(device)


def save_match(path, cfg, encoders, step, accuracy):
    """Write a checkpoint beside `path`, then rename it."""
    state = {"stage": "match", "settings": asdict(cfg), "step": step, "val": accuracy,
             "speech": encoders[0].state_dict(), "face": encoders[1].state_dict()}
    torch.save(state, f"{path}.part")
    os.replace(f"{path}.part", path)


def load_match(path, device):
    """(settings, (S, F)) of a checkpoint of match-train."""
    if not Path(path).is_file():
        raise UserError(f"{path}: no such checkpoint; match-train writes one to OUT/best.pt")
    try:
        state = torch.load(path, map_location=device, weights_only=True)
        cfg = MatchSettings(**state["settings"])
        encoders = make_encoders(cfg, device)
        encoders[0].load_state_dict(state["speech"])
        encoders[1].load_state_dict(state["face"])
    except Exception as e:  # torch.load raises nearly anything on a damaged file
        raise UserError(f"{path}: not a checkpoint of match-train ({str(e).splitlines()[0]})") from e
    return cfg, encoders


def write_json(path, content):
    """Write a dict, indented."""
    Path(path).write_text(json.dumps(content, indent=1) + "\n", encoding="utf8")


def learning_rate(step, cfg):
    """Factor of the peak learning rate: a linear warm-up over a tenth of the steps, then half a cosine to 0 [ours]."""
    warm = max(1, cfg.steps // 10)
    return (step + 1) / warm if step < warm else 0.5 * (1 + math.cos(math.pi * (step - warm) / max(1, cfg.steps - warm)))


def check_settings(cfg):
    """Raise UserError for a setting that cannot work, naming its flag and what is allowed."""
    shortest = 6 * 80 / RATE * cfg.sinc_stride  # s: the last convolution reflects 5 frames, so it needs 6
    rules = (("k", cfg.k >= 2, "at least 2: one positive, one negative"), ("batch", cfg.batch >= cfg.k, f"at least --k, {cfg.k}"),
             ("steps", cfg.steps >= 1, "at least 1"), ("runs", cfg.runs >= 1, "at least 1"), ("workers", cfg.workers >= 0, "0 or more"),
             ("eval_every", cfg.eval_every >= 1, "at least 1"), ("log_every", cfg.log_every >= 1, "at least 1"),
             ("sinc_stride", cfg.sinc_stride >= 1, "at least 1"), ("speech_width", cfg.speech_width >= 1, "at least 1"),
             ("face_width", cfg.face_width >= 1, "at least 1"), ("lr", cfg.lr > 0, "above 0"), ("length", cfg.length > 0, "above 0"),
             ("max_norm", cfg.max_norm > 0, "above 0"), ("seconds", cfg.seconds >= shortest,
              f"at least {shortest:.2f} with --sinc-stride {cfg.sinc_stride}"))
    for name, fine, allowed in rules:
        if not fine:
            raise UserError(f"--{name.replace('_', '-')} {getattr(cfg, name)}: must be {allowed}")


def make_folder(out):
    """Create the folder of --out; raises UserError where that is impossible."""
    try:
        Path(out).mkdir(parents=True, exist_ok=True)
    except OSError as e:
        raise UserError(f"--out {out}: cannot be created ({e.strerror})") from e
    return Path(out)


def match_train(cfg):
    """Train S and F label-free on Eq. 1, keep the best on the validation split, test that one."""
    check_settings(cfg)
    device = pick_device(cfg.device)
    if cfg.data == SYNTHETIC and not Path(cfg.data, "labels.csv").exists():
        make_data(cfg.data, MakeSettings.identities, MakeSettings.seed)
    corpus, labels, out = open_corpus(cfg.data, cfg.k), read_labels(cfg.data), make_folder(cfg.out)
    write_json(out / "settings.json", asdict(cfg))
    torch.manual_seed(cfg.seed)
    generator = torch.Generator().manual_seed(cfg.seed)
    encoders = speech_encoder, face_encoder = make_encoders(cfg, device)
    weights = [weight for encoder in encoders for weight in encoder.parameters()]
    cut_offs = list(speech_encoder.convs[0].parameters())
    optimizer = torch.optim.SGD([{"params": [weight for weight in weights if all(weight is not c for c in cut_offs)]},
                                 {"params": cut_offs, "lr": cfg.lr * cfg.sinc_lr, "weight_decay": 0.0}],
                                cfg.lr, cfg.momentum, weight_decay=cfg.weight_decay)  # [paper §4.1]
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: learning_rate(step, cfg))
    pairs = Pairs(corpus["train"], cfg.seconds, cfg.size, cfg.batch, cfg.seed, shuffle=True)
    log, faults, best = RunLog(out, cfg.steps, device), FaultCounter(), -1.0

    for step, batch in enumerate(load_batches(pairs, range(cfg.steps), cfg.workers), start=1):
        faults.add(batch)
        speech, faces = to_device(batch, device)  # (B, T), (B, 3, H, W)
        if step == 1:
            centre_head(speech_encoder, speech)
            centre_head(face_encoder, faces)
        candidates = draw_candidates(batch.identity, cfg.k, generator).to(device)  # (B, K)
        loss, accuracy = match_loss(speech_encoder(speech), face_encoder(faces), candidates, cfg.direction)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(weights, cfg.max_norm)
        optimizer.step()
        schedule.step()
        log.add(cfg.batch, loss=loss, accuracy=100 * accuracy)
        if step % cfg.log_every == 0 or step == cfg.steps:
            log.write(step, faults.faults)
        if step % cfg.eval_every == 0 or step == cfg.steps:
            score = validate(encoders, corpus["val"], cfg, faults, device)
            log.progress.say(f"validation after step {step}: {cfg.direction.upper()} {cfg.k}-way {score:.1f} %")
            save_match(out / "last.pt", cfg, encoders, step, score)
            if score > best:
                best = score
                save_match(out / "best.pt", cfg, encoders, step, score)

    metrics = test_matching(load_match(out / "best.pt", device)[1], corpus["test"], labels, cfg, cfg.runs, device)
    print_metrics(metrics)
    write_json(out / "metrics.json", metrics)


def validate(encoders, people, cfg, faults, device, draws=20):
    """Accuracy in percent in the trained direction and K: always the same windows, the mean of many draws of negatives."""
    embedded = embed_pairs(encoders, Pairs(people, cfg.seconds, cfg.size, cfg.batch, cfg.seed, shuffle=False), device, cfg.workers, faults)
    generator = torch.Generator().manual_seed(cfg.seed)
    return float(np.mean([k_way(*embedded, cfg.k, cfg.direction, generator) for _ in range(draws)]))


def match_test(args):
    """Tables 1 and 2 for a checkpoint: both directions, K = 2 and 10."""
    device = pick_device(args.device)
    cfg, encoders = load_match(args.match, device)
    corpus = open_corpus(args.data, 2, (args.split,))
    cfg = replace(cfg, batch=args.batch, seed=args.seed, workers=args.workers)
    metrics = test_matching(encoders, corpus[args.split], read_labels(args.data), cfg, args.runs, device)
    print_metrics(metrics)
    write_json(make_folder(args.out) / "metrics.json", metrics)


# ==================================================================================================
# 7. Command line
# ==================================================================================================


def add_flags(parser, settings):
    """One flag per field of a settings dataclass."""
    for f in fields(settings):
        paper = f", in preset paper {PAPER[f.name]}" if settings is MatchSettings and f.name in PAPER else ""
        text = f"{f.metadata['help']} (default {f.default}{paper})".replace("%", "%%")
        parser.add_argument(f"--{f.name.replace('_', '-')}", type=type(f.default), default=argparse.SUPPRESS,
                            choices=f.metadata["choices"], help=text)


def main(argv=None):
    """Run one command; returns the exit code."""
    parser = argparse.ArgumentParser(prog="voice2face.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, settings, text in (("match-train", MatchSettings, "train the speech and the face encoder"),
                                 ("match-test", TestSettings, "Tables 1 and 2 for a trained pair"),
                                 ("make-data", MakeSettings, "write the synthetic corpus"),
                                 ("check-data", CheckSettings, "read a whole corpus and list its faults")):
        command = commands.add_parser(name, help=text, description=text)
        if name in ("make-data", "check-data"):
            command.add_argument("folder", metavar="DIR")
        add_flags(command, settings)
    args = vars(parser.parse_args(argv))
    command = args.pop("command")
    try:
        if command == "match-train":
            match_train(MatchSettings(**{**(PAPER if args.get("preset") == "paper" else {}), **args}))
        elif command == "match-test":
            match_test(TestSettings(**args))
        elif command == "make-data":
            make_data(args.pop("folder"), **asdict(MakeSettings(**args)))
        else:
            return int(check_data(args.pop("folder"), **args) > 0)
    except UserError as e:
        print(f"voice2face: error: {e}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
