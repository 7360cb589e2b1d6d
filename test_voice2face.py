# /// script
# requires-python = ">=3.10"
# dependencies = ["torch==2.11.0", "torchaudio==2.11.0", "numpy", "pillow>=10.1",
#                 "pytest"]
# ///
"""Tests of voice2face.py: parts against independent computations, every command on tiny settings.

    uv run test_voice2face.py          the tests (any pytest option may follow)
    uv run test_voice2face.py kill 40  kill training 40 times at random, compare what it ends with
    uv run test_voice2face.py bench    throughput of the loader and of a training step, printed
"""

import builtins
import csv
import json
import math
import os
import random
import re
import shutil
import signal
import socket
import struct
import subprocess
import sys
import tempfile
import time
import wave
import zipfile
from dataclasses import asdict, fields, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import voice2face as v

try:
    import resource
except ImportError:  # Windows
    resource = None

FILE = Path(v.__file__)
TINY = ["--steps", "4", "--batch", "6", "--k", "4", "--seconds", "0.25", "--size", "32",
        "--sinc-stride", "8", "--speech-width", "4", "--face-width", "4", "--eval-every", "2",
        "--log-every", "1", "--runs", "2", "--workers", "0", "--device", "cpu"]


def write_wav(path, samples, rate=16000, channels=1):
    """16-bit PCM from floats (L,) or (L, channels)."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with wave.open(str(path), "wb") as f:
        f.setnchannels(channels), f.setsampwidth(2), f.setframerate(rate)
        f.writeframes(np.int16(np.asarray(samples) * 32767).tobytes())


def write_face(path, color=(200, 150, 120), side=40):
    """A plain picture."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (side, side), color).save(path)


def noise(samples, seed=0):
    """White noise, float, within -0.5 ... 0.5."""
    return np.random.default_rng(seed).uniform(-0.5, 0.5, samples)


def plain_corpus(root, people=4, splits=v.SPLITS):
    """A corpus of noise and plain pictures: one clip an identity, one frame at 500 ms of 1 s."""
    for split in splits:
        for i in range(people):
            clip = root / split / f"{split}{i}" / "a b"
            write_wav(clip / "speech.wav", noise(16000, i))
            write_face(clip / "500.png", (40 * i, 100, 100))
    return root


@pytest.fixture(scope="session")
def corpus(tmp_path_factory):
    """A small synthetic corpus: 84 identities, 62 / 10 / 12."""
    root = tmp_path_factory.mktemp("data") / "corpus"
    assert v.main(["make-data", str(root), "--identities", "84", "--seed", "3"]) == 0
    return root


@pytest.fixture(scope="session")
def trained(corpus, tmp_path_factory):
    """A run folder of the real command on tiny settings."""
    out = tmp_path_factory.mktemp("run")
    assert v.main(["match-train", "--data", str(corpus), "--out", str(out), *TINY]) == 0
    return out


def refused(capsys, *argv):
    """Run a command that must end with exit code 2 and one line on stderr; returns the line."""
    assert v.main([str(a) for a in argv]) == 2
    lines = capsys.readouterr().err.strip().splitlines()
    lines = [line for line in lines if not line.startswith("replaced by another sample")]
    assert len(lines) == 1 and "Traceback" not in lines[0], lines
    return lines[0]


# ---- SincConv ------------------------------------------------------------------------------------


def numpy_band_pass(low, high, taps, rate):
    """An independent design: difference of two windowed low-passes, centre 1."""
    n = np.arange(taps) - taps // 2
    ideal = (2 * high / rate * np.sinc(2 * high / rate * n)
             - 2 * low / rate * np.sinc(2 * low / rate * n))
    return ideal * np.hamming(taps) / (2 * (high - low) / rate)


def test_sinc_filters_are_numpys_band_passes():
    layer = v.SincConv(8, 101)
    edges = np.linspace(2595 * np.log10(1 + 30 / 700), 2595 * np.log10(1 + 7900 / 700), 9)
    hz = 700 * (10 ** (edges / 2595) - 1)
    got = layer.filters().detach().numpy()
    for i in range(8):
        low = 50 + hz[i]
        high = min(low + 50 + hz[i + 1] - hz[i], 8000)
        np.testing.assert_allclose(got[i], numpy_band_pass(low, high, 101, 16000), atol=2e-4)
    assert np.all(got[:, 50] == 1) and np.isfinite(got).all()


def test_sinc_passes_its_band_and_stops_the_rest():
    layer = v.SincConv(8, 251)
    with torch.no_grad():
        layer.low_hz[:] = 1950
        layer.band_hz[:] = 950  # 2000 ... 3000 Hz
    seconds = torch.arange(8000) / 16000
    def gain(hz):
        return layer(torch.sin(2 * math.pi * hz * seconds)[None])[
            0, 0, 2000:6000].abs().max().item()
    inside = gain(2500)
    assert all(abs(gain(hz) / inside - 1) < 0.05 for hz in (2200, 2800))
    assert all(gain(hz) < 0.01 * inside for hz in (500, 1700, 3300, 6000))


def test_sinc_edges():
    with pytest.raises(ValueError, match="odd, got 250"):
        v.SincConv(4, 250)
    layer = v.SincConv(4, 31, stride=3).to(torch.float64)
    assert (layer.t.dtype == layer.window.dtype == layer(torch.zeros(2, 100).double()).dtype
            == torch.float64)
    assert layer(torch.zeros(2, 100).double()).shape == (2, 4, 34)
    assert {name for name, _ in layer.named_parameters()} == {"low_hz", "band_hz"}
    layer(torch.randn(2, 100).double()).square().sum().backward()
    assert torch.isfinite(layer.low_hz.grad).all() and layer.band_hz.grad.abs().sum() > 0


# ---- encoders ------------------------------------------------------------------------------------


def test_published_speech_encoder():
    assert math.prod(v.PASE_STRIDES) == 160
    encoder = v.SpeechEncoder().eval()
    with torch.no_grad():
        assert encoder.frames(torch.randn(1, 96000)).shape == (1, 512, 600)
        assert encoder(torch.randn(2, 16000)).shape == (2, 128)
    widths, taps = [64, 64, 128, 128, 256, 256, 512, 512], [251, 20, 11, 11, 11, 11, 11, 11]
    convs = 2 * 64 + sum(widths[i - 1] * widths[i] * taps[i] for i in range(1, 8))
    assert sum(p.numel() for p in encoder.parameters()) == convs + 3 * sum(widths) + 512 * 128 + 128


def test_published_face_encoder():
    encoder = v.FaceEncoder()
    blocks = [(3, 64, 64), (64, 64, 128), (128, 128, 256), (256, 256, 512), (512, 512, 1024),
              (1024, 1024, 1024)]
    count = sum(9 * a * h + h + 9 * h * b + b + a * b + b for a, h, b in blocks) + 1024 * 128 + 128
    assert sum(p.numel() for p in encoder.parameters()) == count
    with torch.no_grad():
        assert encoder.blocks(torch.randn(1, 3, 128, 128)).shape == (1, 1024, 4, 4)
    with pytest.raises(ValueError, match="got 48"):
        v.FaceEncoder(48)


def test_face_block_pools_before_its_shortcut_without_changing_it():
    block, x = v.FaceBlock(4, 6), torch.randn(2, 4, 8, 8)
    relu, pool = torch.relu, torch.nn.functional.avg_pool2d
    published = pool(block.conv2(relu(block.conv1(relu(x)))) + block.skip(x), 2)
    torch.testing.assert_close(block(x), published)


def test_embeddings_have_one_length_and_a_centred_start():
    torch.manual_seed(0)
    speech, face = v.SpeechEncoder(4, 8, length=3.0), v.FaceEncoder(32, 4, length=3.0)
    for encoder, x in ((speech, 0.1 * torch.randn(64, 4000)),
                       (face, torch.rand(64, 3, 32, 32) * 2 - 1)):
        before = encoder(x)
        v.centre_head(encoder, x)
        after = encoder(x)
        torch.testing.assert_close(after.norm(dim=1), torch.full((64,), 3.0))
        # one direction for all, then all directions
        assert after.mean(0).norm() < 0.5 < 2 < before.mean(0).norm()


# ---- Eq. 1 and the candidates --------------------------------------------------------------------


@pytest.mark.parametrize("direction", ["v-f", "f-v"])
def test_loss_against_a_hand_computation(direction):
    rng = np.random.default_rng(0)
    speech, faces = rng.normal(size=(2, 5, 8))
    candidates = np.array([[i, (i + 1) % 5, (i + 3) % 5] for i in range(5)])
    total, hits = 0.0, 0
    for i in range(5):
        query, keys = (speech[i], faces) if direction == "v-f" else (faces[i], speech)
        inner = [float(np.dot(query, keys[j])) for j in candidates[i]]
        total -= inner[0] - math.log(sum(math.exp(value) for value in inner))
        hits += inner[0] == max(inner)
    loss, accuracy = v.match_loss(torch.tensor(speech), torch.tensor(faces),
                                  torch.tensor(candidates), direction)
    assert loss.item() == pytest.approx(total / 5) and accuracy.item() == pytest.approx(hits / 5)


def test_equal_candidates_share_the_point():
    logits = torch.tensor([[1.0, 1.0, 1.0, 1.0], [2.0, 1.0, 2.0, 0.0], [0.0, 1.0, 1.0, 0.0],
                           [5.0, 1.0, 2.0, 3.0]])
    assert v.top1(logits).tolist() == [0.25, 0.5, 0.0, 1.0]


def test_candidates_over_thousands_of_draws():
    identity = torch.tensor([0, 0, 1, 2, 3, 4, 5, 5, 5, 6])
    generator, counts = torch.Generator().manual_seed(0), np.zeros((10, 10))
    for _ in range(3000):
        candidates = v.draw_candidates(identity, 5, generator)
        assert (candidates[:, 0] == torch.arange(10)).all()
        assert (identity[candidates[:, 1:]] != identity[:, None]).all()
        assert all(len(set(row)) == 5 for row in candidates.tolist())
        for row, columns in enumerate(candidates[:, 1:].tolist()):
            counts[row, columns] += 1
    others = identity[:, None] != identity[None, :]
    expected = 3000 * 4 / others.sum(1, keepdim=True).numpy()
    # 5 sigma of a fair draw
    assert (abs(counts - expected)[others.numpy()] < 5 * np.sqrt(3000 / 4)).all()
    with pytest.raises(ValueError, match="K = 9 needs 8 clips of other identities per batch, "
                                         "one has 7"):
        v.draw_candidates(identity, 9, generator)


def test_k_way_planted_answers_and_brute_force():
    torch.manual_seed(1)
    identity, generator = torch.arange(600), torch.Generator().manual_seed(0)
    same = v.to_length(torch.randn(600, 128), 3.0)
    constant = torch.ones(600, 128)
    for k in (2, 10):
        for direction in ("v-f", "f-v"):
            assert v.k_way(same, same, identity, k, direction, generator) == 100
            assert v.k_way(constant, same, identity, k, "f-v", generator) == pytest.approx(100 / k)
    speech = torch.randn(1000, 16)
    faces = speech + 2.0 * torch.randn(1000, 16)
    rng, hits = np.random.default_rng(0), 0
    for i in range(1000):
        rivals = rng.choice([j for j in range(1000) if j != i], 9, replace=False)
        hits += float(speech[i] @ faces[i]) > max(float(speech[i] @ faces[j]) for j in rivals)
    assert v.k_way(speech, faces, torch.arange(1000), 10, "v-f",
                   generator) == pytest.approx(hits / 10, abs=6)


def test_k_way_with_few_clips_of_many_is_linear_in_memory():
    x = torch.randn(140_000, 8)
    assert v.k_way(x, x, torch.arange(140_000), 2, "v-f", torch.Generator().manual_seed(0)) > 90


def test_oracle_against_brute_force(corpus):
    labels = v.read_labels(corpus)
    names = [n for n, row in labels.items() if row["split"] == "train"]
    identity = torch.arange(len(names))
    truth = v.oracle_embeddings(labels, names, identity)
    kinds = [tuple(labels[n][f] for f in v.SHARED) for n in names]
    # with one rival the oracle errs half the time when the two are of one kind
    pairs = [(a, b) for a in kinds for b in kinds]
    alike = (sum(a == b for a, b in pairs) - len(kinds)) / (len(pairs) - len(kinds))
    got = np.mean([v.k_way(truth, truth, identity, 2, "v-f", torch.Generator().manual_seed(i))
                   for i in range(40)])
    assert got == pytest.approx(100 * (1 - alike / 2), abs=0.5)


def test_untrained_networks_score_chance(corpus):
    torch.manual_seed(0)
    cfg = v.MatchSettings(seconds=0.25, size=32, sinc_stride=8, speech_width=4, face_width=4,
                          batch=32, workers=0)
    people = v.open_corpus(corpus, 4)["train"]
    scores = [v.evaluate_matching(v.make_encoders(cfg, torch.device("cpu")), people, {}, cfg, 2,
                                  torch.device("cpu")) for _ in range(3)]
    for direction in ("v-f", "f-v"):
        assert np.mean([s[f"{direction}/2"] for s in scores]) == pytest.approx(50, abs=8)
        assert np.mean([s[f"{direction}/10"] for s in scores]) == pytest.approx(10, abs=5)


@pytest.mark.parametrize("count", [[1] * 10, [901] + [1] * 9, [1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11]])
def test_rivals_are_of_other_people_and_fair(count):
    identity = torch.repeat_interleave(torch.arange(len(count)) * 3 + 1, torch.tensor(count))
    generator, met = torch.Generator().manual_seed(0), torch.zeros(len(identity))
    for _ in range(30):
        rivals = v.draw_rivals(identity, 10, generator)
        people = torch.cat([identity[:, None], identity[rivals]], 1)
        assert rivals.shape == (len(identity), 9) and all(len(set(row)) == 10
                                                          for row in people.tolist())
        met += rivals.flatten().bincount(minlength=len(identity))
    assert met.min() > 0 or len(identity) > 500  # every clip of a person serves


def test_same_gender_negatives_on_planted_embeddings():
    """Who knows but the gender scores 3 in 4 among all, and chance among the same gender."""
    genders = ["f", "m"] * 300 + [""] * 100  # nobody knows of the last hundred
    one_hot = torch.tensor([[g == "f", g == "m", g == ""] for g in genders]).float()
    identity = torch.arange(700)
    rows = [v.matching_run(one_hot[:600], one_hot[:600], identity[:600], genders[:600], seed)
            for seed in range(10)]
    assert np.mean([row["v-f/2"] for row in rows]) == pytest.approx(75, abs=2)
    assert np.mean([row["f-v/10"] for row in rows]) == pytest.approx(20, abs=2)
    row = v.matching_run(one_hot, one_hot, identity, genders, 0)
    assert row["v-f/2/gender"] == pytest.approx(50) and row["f-v/10/gender"] == pytest.approx(10)
    few = v.matching_run(one_hot[:30], one_hot[:30], identity[:30], ["f"] * 9 + [""] * 21, 0)
    assert "v-f/2/gender" in few and "v-f/10/gender" not in few


# ---- sampling ------------------------------------------------------------------------------------


@pytest.mark.parametrize("length, window, moment", [
    (20, 5, 7), (20, 5, 0), (20, 5, 19), (20, 5, 40), (20, 5, None), (9, 5, 4), (20, 12, 10)])
def test_window_is_uniform_and_avoids_the_moment(length, window, moment):
    possible = [s for s in range(length - window + 1)
                if moment is None or not s <= moment < s + window]
    rng, counts = np.random.default_rng(0), {}
    for _ in range(4000):
        start, stop = v.draw_window(length, window, moment, rng)
        assert 0 <= start < stop <= length and (moment is None or not start <= moment < stop)
        counts[start] = counts.get(start, 0) + 1
        if possible:
            assert stop - start == window
        else:  # nothing fits: the longer side, whole
            assert stop - start == max(moment, length - moment - 1)
    if possible:
        assert sorted(counts) == possible
        assert all(abs(n - 4000 / len(possible)) < 5 * math.sqrt(4000 / len(possible))
                   for n in counts.values())


def test_speech_window_never_holds_the_faces_time(tmp_path):
    """The recording is a ramp, so that a window tells the times it covers."""
    for i in range(3):
        clip = tmp_path / "train" / f"p{i}" / "c"
        write_wav(clip / "speech.wav", np.arange(48000) / 48000)
        for ms in (0, 700, 1500, 2999):
            # the colour tells the frame
            Image.new("RGB", (40, 40), (ms // 12, 0, 0)).save(Path(clip / f"{ms}.png"))
    pairs = v.Pairs({f"p{i}": v.list_clips(tmp_path / "train" / f"p{i}") for i in range(3)},
                    0.5, 32, 50, 0, shuffle=True)
    seen = set()
    for i in range(40):
        batch = pairs[i]
        for window, face in zip(batch.speech.numpy(), batch.faces.numpy()):
            ms = min((0, 700, 1500, 2999), key=lambda m: abs(m // 12 - int(face[0, 0, 0])))
            first, last = window.min() * 3000, window.max() * 3000  # ms, 16-bit steps are 0.1 ms
            assert not first + 0.2 < ms < last - 0.2 and last - first > 490
            seen.add(ms)
    assert seen == {0, 700, 1500, 2999}


@pytest.mark.parametrize("rate", [8000, 44100])
def test_the_faces_time_is_in_the_recordings_own_rate(tmp_path, rate):
    write_wav(tmp_path / "x.wav", np.arange(2 * rate) / (2 * rate), rate)  # a ramp over 2 s
    for seed in range(30):
        x = v.load_speech(str(tmp_path / "x.wav"), 0.5, np.random.default_rng(seed), 900)
        inner = x[800:-800] * 2  # s; away from the resampler's edges
        assert inner.max() < 0.9 or inner.min() > 0.9


def test_pairs_stay_within_a_clip_and_flip_half_of_the_faces(tmp_path):
    """Two clips a person: loudness tells the recording's, colour the face's, a bar its side."""
    for i in range(12):
        for c in range(2):
            clip = tmp_path / f"p{i}" / f"c{c}"
            write_wav(clip / "s.wav", np.full(8000, 0.2 + 0.4 * c))
            pixels = np.full((40, 40, 3), 100 * c, np.uint8)
            pixels[:, :10] = 255
            Image.fromarray(pixels).save(clip / "face.png")
    people = {f"p{i}": v.list_clips(tmp_path / f"p{i}") for i in range(12)}
    for shuffle in (True, False):
        pairs, flipped = v.Pairs(people, 0.25, 32, 12, 0, shuffle), []
        for batch in (pairs[i] for i in range(40 if shuffle else len(pairs))):
            loud, face = batch.speech[:, 0] > 0.4, batch.faces[:, 16, 16, 0] > 50
            assert torch.equal(loud, face)
            flipped += (batch.faces[:, 16, 28, 0] == 255).tolist()
        assert np.mean(flipped) == (pytest.approx(0.5, abs=0.12) if shuffle else 0)


def test_short_speech_is_repeated_and_long_is_cut(tmp_path):
    rng, short, long = np.random.default_rng(0), noise(1000), noise(20000)
    write_wav(tmp_path / "s.wav", short), write_wav(tmp_path / "l.wav", long)
    got = v.load_speech(str(tmp_path / "s.wav"), 0.25, rng)
    np.testing.assert_allclose(got, np.tile(short, 4), atol=1e-4)
    got = v.load_speech(str(tmp_path / "l.wav"), 0.25, rng)
    start = int(np.argmin([abs(long[s:s + 20] - got[:20]).sum() for s in range(16001)]))
    np.testing.assert_allclose(got, long[start:start + 4000], atol=1e-4)


@pytest.mark.parametrize("rate, channels", [
    (8000, 1), (16000, 2), (22050, 1), (44100, 2), (48000, 6)])
def test_any_rate_and_channel_count_becomes_mono_16_khz(tmp_path, rate, channels):
    n = rate * 2
    tone = 0.5 * np.sin(2 * np.pi * 1000 * np.arange(n) / rate)
    write_wav(tmp_path / "x.wav", np.repeat(tone[:, None], channels, 1), rate, channels)
    got = v.load_speech(str(tmp_path / "x.wav"), 1.0, np.random.default_rng(0))
    assert got.shape == (16000,) and got.dtype == np.float32
    spectrum = abs(np.fft.rfft(got[2000:14000] * np.hanning(12000)))
    assert np.argmax(spectrum) == 750  # 1000 Hz
    assert got[2000:14000].max() == pytest.approx(0.5, abs=0.02)


def riff(code, channels, rate, bits, data, extensible=False, claimed=None):
    """A WAV file's bytes with an odd chunk before its samples, independent of voice2face."""
    head = struct.pack("<HHIIHH", 0xFFFE if extensible else code, channels, rate,
                       rate * channels * bits // 8, channels * bits // 8, bits)
    if extensible:
        head += (struct.pack("<HHIH", 22, bits, 0, code)
                 + bytes.fromhex("000000001000800000aa00389b71"))
    body = (b"WAVEfmt " + struct.pack("<I", len(head)) + head
            + b"LIST" + struct.pack("<I", 3) + b"abc\0")
    return (b"RIFF" + struct.pack("<I", len(body) + 8 + len(data)) + body
            + b"data" + struct.pack("<I", claimed or len(data)) + data)


@pytest.mark.parametrize("extensible", [False, True])
@pytest.mark.parametrize("code, bits", [(1, 8), (1, 16), (1, 24), (1, 32), (3, 32), (3, 64)])
def test_wav_formats(tmp_path, code, bits, extensible):
    values = np.array([0.0, 0.5, -0.5, 0.25, -1.0, 0.75])
    if code == 3:
        data = values.astype(f"<f{bits // 8}").tobytes()
    elif bits == 8:
        data = np.uint8(values * 128 + 128).tobytes()
    else:
        data = b"".join(int(x * 2 ** (bits - 1)).to_bytes(bits // 8, "little", signed=True)
                        for x in values)
    (tmp_path / "x.wav").write_bytes(riff(code, 1, 16000, bits, data, extensible,
                                          claimed=0xFFFFFFFF if extensible else None))
    x, rate = v.read_speech(str(tmp_path / "x.wav"))
    assert rate == 16000 and x.dtype == np.float32
    np.testing.assert_allclose(x, values, atol=1e-6)
    (tmp_path / "y.wav").write_bytes(riff(code, 2, 16000, bits, data, extensible))
    np.testing.assert_allclose(v.read_speech(str(tmp_path / "y.wav"))[0],
                               values.reshape(3, 2).mean(1), atol=1e-6)


def test_only_the_window_is_read(tmp_path, monkeypatch):
    path = tmp_path / "hour.wav"
    path.write_bytes(riff(1, 2, 44100, 16, b"", claimed=3600 * 44100 * 4))
    with open(path, "r+b") as f:
        f.truncate(path.stat().st_size + 3600 * 44100 * 4)  # an hour, sparse
    read, real = [0], builtins.open

    def counting(*args, **kwargs):
        f = real(*args, **kwargs)
        inner = f.read
        class Counted:
            def __enter__(self): return self
            def __exit__(self, *a): f.close()
            def __getattr__(self, name): return getattr(f, name)
            def read(self, n): read[0] += n; return inner(n)
        return Counted()
    monkeypatch.setattr(builtins, "open", counting)
    assert len(v.load_speech(str(path), 1.0, np.random.default_rng(0))) == 16000
    assert 44100 * 4 <= read[0] < 44100 * 4 + 500


def test_faces_are_square_cropped_resized_rgb(tmp_path):
    wide = np.zeros((40, 80, 3), np.uint8)
    wide[:, 20:60] = (10, 200, 30)  # the central square; red-less and bright green
    wide[:20, 20:40] = (250, 0, 0)  # its upper left quarter
    Image.fromarray(wide).save(tmp_path / "w.png")
    face = v.load_face(str(tmp_path / "w.png"), 32)
    assert face.shape == (32, 32, 3) and face.dtype == np.uint8
    assert (tuple(face[4, 4]) == (250, 0, 0)
            and tuple(face[4, 28]) == tuple(face[28, 4]) == (10, 200, 30))
    np.testing.assert_array_equal(v.load_face(str(tmp_path / "w.png"), 32, flip=True),
                                  face[:, ::-1])
    Image.new("L", (64, 64), 77).save(tmp_path / "g.jpg")
    assert abs(v.load_face(str(tmp_path / "g.jpg"), 32).astype(int) - 77).max() <= 1
    batch = v.Batch(torch.zeros(1, 8), torch.from_numpy(face)[None], torch.zeros(1), [])
    faces = v.to_device(batch, torch.device("cpu"))[1]
    assert (faces.shape == (1, 3, 32, 32)
            and faces[0, 0, 4, 4].item() == pytest.approx(250 / 127.5 - 1))
    assert faces.min() >= -1 and faces.max() <= 1


def test_upright_and_16_bit_faces(tmp_path):
    pixels = np.zeros((40, 40, 3), np.uint8)
    pixels[:10] = 200  # a bar on top, once the picture is turned as its EXIF data says
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by 90 degrees clockwise
    Image.fromarray(np.rot90(pixels)).save(tmp_path / "e.png", exif=exif)
    assert v.load_face(str(tmp_path / "e.png"), 32)[2].mean() == 200
    Image.fromarray(np.full((40, 40), 128 * 256, np.uint16)).save(tmp_path / "i.png")
    assert (v.load_face(str(tmp_path / "i.png"), 32) == 128).all()


def test_batches_are_a_function_of_their_number(corpus):
    people = v.open_corpus(corpus, 4)["train"]
    make = lambda seed: v.Pairs(people, 0.25, 32, 20, seed, shuffle=True)  # noqa: E731
    a, b = make(0)[5], make(0)[5]
    assert (torch.equal(a.speech, b.speech) and torch.equal(a.faces, b.faces)
            and torch.equal(a.identity, b.identity))
    assert (not torch.equal(a.speech, make(1)[5].speech)
            and not torch.equal(a.speech, make(0)[6].speech))
    epoch = torch.cat([make(0)[i].identity for i in range(3)])  # 3 batches of 20 from 62 identities
    assert len(epoch.unique()) == 60
    test = v.Pairs(people, 0.25, 32, 20, 0, shuffle=False)
    assert [int(i) for n in range(len(test)) for i in test[n].identity] == list(range(62))


def test_batches_larger_than_the_corpus_keep_enough_negatives(tmp_path):
    plain_corpus(tmp_path, 4)
    people = v.open_corpus(tmp_path, 4)["train"]
    for batch in (4, 5, 7, 8, 11):
        pairs = v.Pairs(people, 0.25, 32, batch, 0, shuffle=True)
        for i in range(20):
            # raises where one row has fewer than 3
            v.draw_candidates(pairs[i].identity, 4, torch.Generator())


def test_speech_and_faces_of_different_folders(tmp_path):
    """VoxCeleb speech, VGGFace faces: any face with any speech of its identity, never another's."""
    for i in range(3):
        for c in range(2):
            write_wav(tmp_path / f"p{i}" / f"s{c}" / "1.wav", np.full(8000, (1 + 2 * i + c) / 10))
        for c in range(3):
            write_face(tmp_path / f"p{i}" / f"f{c}" / f"{100 * c}.png", (50 * i, 20 * c, 0))
    pairs = v.Pairs({f"p{i}": v.list_clips(tmp_path / f"p{i}") for i in range(3)},
                    0.25, 32, 30, 0, shuffle=True)
    met = set()
    for i in range(60):
        batch = pairs[i]
        for speech, face, person in zip(batch.speech, batch.faces, batch.identity.tolist()):
            voice = round(speech[0].item() * 10) - 1
            assert voice // 2 == person == round(face[0, 0, 0].item() / 50)
            met.add((person, voice % 2, round(face[0, 0, 1].item() / 20)))
    assert len(met) == 18


def test_unreadable_files_are_named_replaced_and_counted(tmp_path, capsys):
    plain_corpus(tmp_path, 30, ("train",))
    bad = tmp_path / "train" / "train7" / "a b" / "speech.wav"
    bad.write_bytes(b"nonsense")
    pairs = v.Pairs(v.open_corpus(tmp_path, 4, ("train",))["train"], 0.25, 32, 15, 0, shuffle=True)
    faults = v.FaultCounter()
    for i in range(20):
        batch = pairs[i]
        assert len(batch.speech) == 15 and len(batch.identity.unique()) == 15 and 7 not in [
            int(re.sub(r"\D", "", pairs.names[p])) for p in batch.identity]
        faults.add(batch)
    assert faults.faults == 10 and str(bad) in capsys.readouterr().err
    with pytest.raises(v.UserError, match=r"11 of 326 samples could not be read, "
                                          r"which is too many.*speech\.wav"):
        for i in range(20, 30):
            faults.add(pairs[i])


# ---- the synthetic corpus ------------------------------------------------------------------------


def test_make_data_is_deterministic_and_labelled(tmp_path, corpus):
    v.main(["make-data", str(tmp_path / "again"), "--identities", "84", "--seed", "3"])
    v.main(["make-data", str(tmp_path / "other"), "--identities", "30", "--seed", "4"])
    files = sorted(p.relative_to(corpus) for p in corpus.rglob("*.*"))
    assert len(files) == 1 + 84 * (1 + v.FRAMES)
    assert all((corpus / f).read_bytes() == (tmp_path / "again" / f).read_bytes() for f in files)
    assert (corpus / "labels.csv").read_text() != (tmp_path / "other/labels.csv").read_text()
    labels = v.read_labels(corpus)
    for split in v.SPLITS:
        assert ({n for n, row in labels.items() if row["split"] == split}
                == {p.name for p in (corpus / split).iterdir()})
    assert all({"gender", "age", "tract", "build", "background", "glasses", "pitch", "tempo"}
               <= set(row) for row in labels.values())


def test_each_factor_acts_on_its_own_side_only():
    person = v.draw_factors(np.random.default_rng(5)) | {
        "gender": 0, "age": 1, "tract": 1, "build": 1, "glasses": 0}
    voice = lambda p: v.synth_speech(p, np.random.default_rng(1))  # noqa: E731
    face = lambda p: np.asarray(v.synth_faces(p, [0.5])[0])  # noqa: E731
    for name in person:
        changed = person | {name: person[name] + (0.2 if isinstance(person[name], float) else 1)}
        heard, seen = (not np.array_equal(voice(changed), voice(person)),
                       not np.array_equal(face(changed), face(person)))
        expected = (True, True) if name in v.SHARED else (
            name in ("pitch", "loudness", "tempo"), name not in ("pitch", "loudness", "tempo"))
        assert (heard, seen) == expected, name
    assert face(person).shape == (128, 128, 3)
    assert np.abs(face(person).astype(int)
                  - np.asarray(v.synth_faces(person, [0.9])[0])).max() > 20  # the mouth opens


def test_gender_is_heard_as_pitch():
    rng, base = np.random.default_rng(0), v.draw_factors(np.random.default_rng(0)) | {
        "age": 0, "pitch": 0.0}
    for gender, hz in ((0, 225), (1, 120)):
        x = v.synth_speech(base | {"gender": gender}, rng).astype(float)
        power = np.abs(np.fft.rfft(x, 2 * len(x))) ** 2
        auto = np.fft.irfft(power)
        lags = np.arange(16000 // 300, 16000 // 70)
        assert 16000 / lags[np.argmax(auto[lags])] == pytest.approx(hz, rel=0.25)


# ---- training and the command line ---------------------------------------------------------------


def test_a_few_real_steps_lower_the_loss(corpus, tmp_path):
    v.main(["match-train", "--data", str(corpus), "--out", str(tmp_path), *TINY,
            "--batch", "32", "--steps", "200", "--speech-width", "8", "--face-width", "8",
            "--seconds", "0.5", "--eval-every", "200", "--log-every", "40"])
    losses = [json.loads(line)["loss"] for line in open(tmp_path / "log.jsonl")]
    # from log K downwards
    assert len(losses) == 5 and losses[-1] < math.log(4) - 0.2 < math.log(4) - 0.1 < losses[0]


def test_learning_rate_rises_and_falls():
    rates = [v.learning_rate(i, 100) for i in range(100)]
    assert rates[0] == 0.1 and max(rates) == rates[10] == 1 and rates[99] < 0.001
    assert rates[55] == pytest.approx(0.5)


def test_the_best_validation_is_what_is_tested(corpus, tmp_path, monkeypatch):
    scores, tested = iter([30.0, 10.0, 20.0]), []
    monkeypatch.setattr(v, "validate", lambda encoders, people, *rest: next(scores))
    monkeypatch.setattr(v, "report_matching", lambda encoders, *rest: tested.append(encoders))
    v.main(["match-train", "--data", str(corpus), "--out", str(tmp_path), *TINY, "--steps", "6"])
    best, last = (torch.load(tmp_path / name, weights_only=True) for name in ("best.pt", "last.pt"))
    assert (best["step"], best["val"], last["step"], last["best"]) == (2, 30.0, 6, 30.0)
    assert torch.equal(tested[0][1].head.weight, best["face"]["head.weight"])


def test_validation_leaves_no_trace_in_the_networks(corpus):
    cfg = v.MatchSettings(k=2, seconds=0.25, size=32, speech_width=4, face_width=4, workers=0)
    encoders, people = v.make_encoders(cfg, torch.device("cpu")), v.open_corpus(corpus, 4)["val"]
    before = {k: t.clone() for k, t in encoders[0].state_dict().items()}
    v.validate(encoders, people, cfg, v.FaultCounter(), torch.device("cpu"))
    assert all(torch.equal(t, before[k]) for k, t in encoders[0].state_dict().items())
    assert encoders[0].training and encoders[1].training


def test_run_folder(trained, corpus):
    assert {"settings.json", "log.jsonl", "best.pt", "last.pt", "previous.pt", "metrics.json",
            "examples.png"} == {p.name for p in trained.iterdir()}
    log = [json.loads(line) for line in open(trained / "log.jsonl")]
    assert [line["step"] for line in log] == [1, 2, 3, 4]
    assert all({"loss", "accuracy", "clips_per_s", "peak_memory_gb"} <= set(line) for line in log)
    metrics = json.loads((trained / "metrics.json").read_text())
    for key in ("v-f/2", "v-f/10", "f-v/2", "f-v/10"):
        assert {key, key + "/std", "oracle/" + key} <= set(metrics) and 0 <= metrics[key] <= 100
    assert {"v-f/2/gender", "oracle/f-v/2/gender"} <= set(metrics)
    assert "v-f/10/gender" not in metrics  # 12 test identities have not ten of each gender


def test_match_test_repeats_the_metrics(trained, corpus, tmp_path, capsys):
    argv = ["match-test", "--data", str(corpus), "--match", str(trained / "best.pt"),
            "--out", str(tmp_path), "--runs", "2", "--workers", "0", "--batch", "6"]
    assert v.main(argv) == 0
    assert (json.loads((tmp_path / "metrics.json").read_text())
            == json.loads((trained / "metrics.json").read_text()))
    assert "V-F 10-way" in capsys.readouterr().out
    v.main(argv + ["--split", "train", "--seed", "9"])
    assert (json.loads((tmp_path / "metrics.json").read_text())
            != json.loads((trained / "metrics.json").read_text()))


def fingerprint(out):
    """What a run leaves: weights, log without times, metrics."""
    state = torch.load(out / "last.pt", weights_only=True)
    weights = [round(t.double().sum().item(), 9)
               for key in ("speech", "face") for t in state[key].values()]
    log = [[json.loads(line)[k] for k in ("step", "loss")] for line in open(out / "log.jsonl")]
    return weights, log, (out / "metrics.json").read_text()


def saved_step(out, name="last.pt"):
    """The step of a checkpoint."""
    return torch.load(out / name, weights_only=True)["step"]


CHANGES = dict(direction="f-v", k=3, steps=5, batch=8, seed=1, seconds=0.3, size=64,
               sinc_stride=7, speech_width=6, face_width=6, length=5.0, lr=0.3, momentum=0.5,
               weight_decay=0.1, max_norm=0.01, sinc_lr=1e6, runs=3, eval_every=4, save_every=3,
               log_every=2, preset="paper")


@pytest.mark.parametrize("name", [f.name for f in fields(v.MatchSettings)])
def test_every_setting_matters(name, trained, corpus, tmp_path, monkeypatch, capsys):
    base = v.MatchSettings(**json.loads((trained / "settings.json").read_text()))
    if name in ("data", "device"):
        assert refused(capsys, "match-train", *TINY, f"--{name}", "nowhere")
        return
    if name == "workers":
        made = []
        real = torch.utils.data.DataLoader
        monkeypatch.setattr(torch.utils.data, "DataLoader",
                            lambda *a, **k: made.append(k["num_workers"]) or real(*a, **k))
        v.match_train(replace(base, out=str(tmp_path), workers=2, runs=1))
        assert set(made) == {2}
        assert fingerprint(tmp_path)[:2] == fingerprint(trained)[:2]  # and changes nothing else
        return
    if name == "preset":
        seen = []
        monkeypatch.setattr(v, "match_train", seen.append)
        v.main(["match-train", "--preset", "paper", "--lr", "0.5"])
        assert asdict(seen[0]) == asdict(v.MatchSettings(**v.PAPER["match-train"], preset="paper",
                                                         lr=0.5))
        return
    if name in ("out", "resume"):
        v.match_train(replace(base, out=str(tmp_path / "x y"), resume=name == "resume"))
        # and the same settings give the same run; resume in an empty folder starts one
        assert fingerprint(tmp_path / "x y") == fingerprint(trained)
        return
    v.match_train(replace(base, out=str(tmp_path), **{name: CHANGES[name]}))
    if name == "save_every":
        assert fingerprint(tmp_path) == fingerprint(trained)
        assert saved_step(tmp_path, "previous.pt") == 3
        return
    if name == "eval_every":
        assert capsys.readouterr().out.count("validation after step") == 1
        return
    assert fingerprint(tmp_path) != fingerprint(trained)


def test_default_run_makes_its_corpus_only_there(tmp_path):
    """The real command line in its own process, in an empty folder, with the default --data."""
    code = ("import sys, voice2face as v; v.MakeSettings.identities = 40; "
            f"sys.exit(v.main(['match-train', '--steps', '2', *{TINY[2:]!r}, '--k', '2']))")
    env_path = str(FILE.parent)
    done = subprocess.run(
        [sys.executable, "-c", f"import sys; sys.path.insert(0, {env_path!r}); {code}"],
        cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert ((tmp_path / "data/synthetic/labels.csv").exists()
            and (tmp_path / "runs/match/metrics.json").exists())
    assert "\r" not in done.stdout and "V-F  2-way" in done.stdout
    done = subprocess.run([sys.executable, FILE, "match-train", "--data", "data/missing"],
                          cwd=tmp_path, capture_output=True, text=True)
    assert (done.returncode == 2 and done.stderr.count("\n") == 1
            and "data/missing: no such folder" in done.stderr)
    assert not (tmp_path / "data/missing").exists()


def test_help_shows_meaning_source_and_default(capsys):
    with pytest.raises(SystemExit):
        v.main(["match-train", "--help"])
    text = " ".join(capsys.readouterr().out.split())
    for f in fields(v.MatchSettings):
        assert f"--{f.name.replace('_', '-')}" in text
    assert "candidates of a matching task in training [paper §4] (default: 10)" in text
    assert "(default: 64, paper: 128)" in text


def test_importing_does_nothing(tmp_path):
    code = f"import sys; sys.path.insert(0, {str(FILE.parent)!r}); import voice2face"
    done = subprocess.run([sys.executable, "-c", code],
                          cwd=tmp_path, capture_output=True, text=True)
    assert (done.returncode, done.stdout, list(tmp_path.iterdir())) == (0, "", [])


# ---- errors --------------------------------------------------------------------------------------


def test_structural_faults_stop_match_train_with_one_line(tmp_path, capsys):
    def line(change, *flags):
        root = tmp_path / change.__name__
        plain_corpus(root)
        change(root)
        argv = ["match-train", "--data", root, "--out", tmp_path / "out", *TINY, *flags]
        return refused(capsys, *argv)

    def no_val(root): shutil.rmtree(root / "val")
    def two_splits(root): shutil.copytree(root / "train/train0", root / "test/train0")
    def no_speech(root): (root / "val/val1/a b/speech.wav").unlink()
    def no_faces(root): (root / "test/test2/a b/500.png").unlink()
    def few(root): shutil.rmtree(root / "train/train3")
    def fine(root): pass

    assert ("val: split missing" in line(no_val)
            and "train0: identity is also in train" in line(two_splits))
    assert ("val1: identity without speech" in line(no_speech)
            and "test2: identity without faces" in line(no_faces))
    assert "train: 3 identities, at least K = 4" in line(few)
    assert "--batch 3" in line(fine, "--batch", "3") and "--k 1" in line(fine, "--k", "1")
    assert ("--steps 0" in line(fine, "--steps", "0")
            and "--seconds" in line(fine, "--seconds", "0.001"))
    assert "no such folder" in refused(capsys, "match-train", "--data", tmp_path / "none", *TINY)
    assert not (tmp_path / "out").exists()


def test_bad_flags_and_checkpoints(tmp_path, trained, corpus, capsys):
    assert "--device cuda:7" in refused(capsys, "match-train", "--data", corpus, *TINY,
                                        "--device", "cuda:7")
    assert "no such checkpoint" in refused(capsys, "match-test", "--match", tmp_path / "no.pt")
    for name, content in (("text.pt", b"hello"),
                          ("cut.pt", (trained / "best.pt").read_bytes()[:5000])):
        (tmp_path / name).write_bytes(content)
        assert "not a checkpoint of match-train" in refused(capsys, "match-test",
                                                            "--match", tmp_path / name)
    (tmp_path / "file").write_text("")
    assert "cannot be created" in refused(capsys, "match-train", "--data", corpus, *TINY,
                              "--out", tmp_path / "file" / "run")
    assert "--identities 5: must be at least 30" in refused(capsys, "make-data", tmp_path / "few",
                                                            "--identities", "5")
    assert "exists already" in refused(capsys, "make-data", corpus)
    assert "cannot be created" in refused(capsys, "make-data", tmp_path / "file" / "data")


def test_a_diverging_run_stops_and_says_so(tmp_path, corpus, capsys):
    (tmp_path / "best.pt").write_text("of an earlier run")
    line = refused(capsys, "match-train", "--data", corpus, "--out", tmp_path, *TINY,
                   "--lr", "1e18", "--steps", "8", "--eval-every", "9")
    assert "the run diverged" in line and "--lr" in line
    assert (tmp_path / "best.pt").read_text() == "of an earlier run"  # nothing is lost


def test_labels_that_cannot_be_read_stop_before_training(tmp_path, capsys):
    plain_corpus(tmp_path)
    argv = ["match-train", "--data", tmp_path, "--out", tmp_path / "out", *TINY]
    (tmp_path / "labels.csv").write_text("identity,gender\ntrain0,f\n", encoding="utf-8-sig")
    assert v.read_labels(tmp_path) == {"train0": {"identity": "train0", "gender": "f"}}
    (tmp_path / "labels.csv").write_text("name;gender\n1;f\n")
    assert "labels.csv: needs a column 'identity', found name;gender" in refused(capsys, *argv)
    (tmp_path / "labels.csv").write_bytes("identity\nRené\n".encode("latin-1"))
    assert "labels.csv: not a CSV file in UTF-8" in refused(capsys, *argv)
    assert v.main(["check-data", str(tmp_path), "--k", "2"]) == 1
    assert "fault: " in capsys.readouterr().out and not (tmp_path / "out").exists()


def test_limits_of_flags(tmp_path, corpus, capsys):
    for flag, value in (("--seed", 2**64), ("--seconds", "inf"), ("--seconds", 100),
                        ("--lr", "nan"), ("--device", "meta")):
        line = refused(capsys, "match-train", "--data", corpus, "--out", tmp_path / "o", *TINY,
                       flag, value)
        assert flag in line


def test_missing_decoder_says_what_to_install(tmp_path, monkeypatch):
    def load(path):
        raise ImportError("TorchCodec is required")
    monkeypatch.setattr(v.torchaudio, "load", load)
    (tmp_path / "x.flac").write_bytes(b"fLaC")
    with pytest.raises(ValueError, match=r"x\.flac: .*pip install torchcodec"):
        v.read_speech(str(tmp_path / "x.flac"))


def test_other_formats_go_through_torchaudio(tmp_path, monkeypatch):
    stereo = torch.stack([torch.linspace(-1, 1, 32000), torch.zeros(32000)])
    monkeypatch.setattr(v.torchaudio, "load", lambda path: (stereo, 32000))
    x, rate = v.read_speech(str(tmp_path / "x.mp3"),
                            lambda length, rate: (length - rate // 2, length))
    assert rate == 32000
    np.testing.assert_allclose(x, stereo.mean(0)[16000:].numpy())


def test_check_data_lists_every_fault(tmp_path, capsys):
    plain_corpus(tmp_path, 12)
    assert v.main(["check-data", str(tmp_path)]) == 0
    out = capsys.readouterr().out
    assert ("0 faults" in out and "12 identities" in out and "16000 (36)" in out
            and "40x40 (36)" in out and "in ms: 36 of 36" in out)
    clip = tmp_path / "train" / "train0"
    write_wav(clip / "empty" / "a.wav", [])
    (clip / "cut.d").mkdir()
    (clip / "cut.d" / "b.wav").write_bytes(b"RIFF")
    write_wav(clip / "silent" / "c.wav", np.zeros(8000))
    (clip / "nan").mkdir()
    (clip / "nan" / "d.wav").write_bytes(
        riff(3, 1, 16000, 32, np.array([0.1, np.nan, 0.2], "<f4").tobytes()))
    (clip / "flac").mkdir()
    (clip / "flac" / "e.flac").write_bytes(b"no sound")
    (clip / "pics").mkdir()
    (clip / "pics" / "f.jpg").write_bytes(b"no picture")
    whole = (tmp_path / "train/train1/a b/500.png").read_bytes()
    (clip / "pics" / "g.png").write_bytes(whole[:len(whole) // 2])
    write_face(clip / "pics" / "tiny.png", side=16)
    (clip / "pics" / "._500.png").write_bytes(b"hidden files are no data")
    (clip / "rate").mkdir()
    (clip / "rate" / "h.wav").write_bytes(riff(1, 1, 300, 16, b"ab" * 99))
    (clip / "loud").mkdir()
    (clip / "loud" / "i.wav").write_bytes(riff(3, 1, 16000, 32, np.full(9, 1e38, "<f4").tobytes()))
    (tmp_path / "val/val3/a b/speech.wav").unlink()
    (tmp_path / "test/test5/a b/500.png").unlink()
    shutil.copytree(tmp_path / "train/train2", tmp_path / "val/train2")
    for i in range(6, 12):
        shutil.rmtree(tmp_path / "test" / f"test{i}")
    capsys.readouterr()
    assert v.main(["check-data", str(tmp_path)]) == 1
    faults = [line for line in capsys.readouterr().out.splitlines() if line.startswith("fault: ")]
    for part in ("empty/a.wav", "cut.d/b.wav", "silent/c.wav", "nan/d.wav", "flac/e.flac",
                 "pics/f.jpg", "pics/g.png", "pics/tiny.png", "rate/h.wav: 300 Hz", "loud/i.wav",
                 "val3: identity without speech",
                 "test5: identity without faces", "train2: identity is also",
                 "test: 6 identities"):
        assert sum(part in fault for fault in faults) == 1, part
    assert len(faults) == 14
    shutil.rmtree(tmp_path / "val")
    v.main(["check-data", str(tmp_path)])
    assert "val: split missing" in capsys.readouterr().out


# ---- Generation ----------------------------------------------------------------------------------


TINY_GAN = ["--steps", "4", "--batch", "6", "--width", "2", "--r1-every", "2", "--eval-every", "2",
            "--log-every", "1", "--runs", "2", "--workers", "0", "--device", "cpu"]


@pytest.fixture(scope="session")
def drawn(corpus, trained, tmp_path_factory):
    """A run folder of the real gan-train on tiny settings."""
    out = tmp_path_factory.mktemp("gan")
    assert v.main(["gan-train", "--data", str(corpus), "--match", str(trained / "best.pt"),
                   "--out", str(out), *TINY_GAN]) == 0
    return out


def test_adain_gives_the_styles_mean_and_deviation():
    torch.manual_seed(0)
    layer, x = v.AdaIN(5), 3 + 7 * torch.randn(4, 5, 6, 8)
    style = torch.randn(4, 2 * v.EMBED)
    got = layer(x, style).detach().numpy()
    weight, bias = layer.style.weight.detach().numpy(), layer.style.bias.detach().numpy()
    predicted = style.numpy() @ weight.T + bias
    scale, shift = 1 + predicted[:, :5], predicted[:, 5:]
    np.testing.assert_allclose(got.mean((2, 3)), shift, atol=1e-4)
    np.testing.assert_allclose(got.std((2, 3)), np.abs(scale), rtol=1e-3)
    x = x.numpy()
    by_hand = (x - x.mean((2, 3), keepdims=True)) / x.std((2, 3), keepdims=True)
    np.testing.assert_allclose(got, scale[..., None, None] * by_hand + shift[..., None, None],
                               atol=1e-3)
    flat = layer(torch.full((1, 5, 4, 4), 1e3), style[:1])  # no deviation to divide by
    assert torch.isfinite(flat).all()
    far = layer(torch.from_numpy(x) + 7000, style).detach().numpy()  # mean 1000 deviations away
    np.testing.assert_allclose(far.std((2, 3)), np.abs(scale), rtol=0.01)


@pytest.mark.parametrize("size", [8, 16, 32, 64, 128])
def test_generator_shape_range_and_both_inputs(size):
    torch.manual_seed(0)
    generator = v.Generator(size, 2)
    z, c = torch.randn(3, 128), 3.5 * torch.randn(3, 128)
    faces = generator(z, c)
    assert faces.shape == (3, 3, size, size) and faces.abs().max() <= 1
    assert 0.05 < faces.std() and (faces.abs() > 0.95).float().mean() < 0.2  # neither grey nor full
    for other in (generator(z + 1, c), generator(z, c.flip(0))):
        assert (other - faces).abs().max() > 0.01
    assert torch.allclose(generator(z, 9 * c), faces, atol=1e-6)  # c has one length
    assert torch.allclose(generator(z[:1], c[:1]), faces[:1], atol=1e-5)  # no batch statistics


def test_generator_refuses_other_sizes():
    for size in (4, 48, 100, 65):
        with pytest.raises(ValueError, match=f"power of two from 8 on, got {size}"):
            v.Generator(size, 2)


def test_sizes_and_parameters_of_the_paper_preset():
    cfg, match = (settings(**v.PAPER[name], preset="paper") for name, settings in (
        ("gan-train", v.GanSettings), ("match-train", v.MatchSettings)))
    widths = [1024, 1024, 512, 256, 128, 64]
    count = 256 * widths[0] * 16 + widths[0] * 16  # z and c to 4x4
    for a, b in zip(widths, widths[1:]):
        count += (9 * a * b + b) + (9 * b * b + b) + (a * b + b)  # two 3x3 and a 1x1 convolution
        count += 257 * 2 * a + 257 * 2 * b  # two AdaIN
    count += 257 * 2 * 64 + 9 * 64 * 3 + 3
    with torch.device("meta"):
        generator = v.Generator(match.size, cfg.width)
        face_encoder = v.FaceEncoder(match.size, match.face_width)
    assert sum(p.numel() for p in generator.parameters()) == count == 36_803_843
    discriminator = v.Discriminator(face_encoder)
    assert (sum(p.numel() for p in discriminator.parameters())
            == sum(p.numel() for p in face_encoder.parameters()) + 1024)


def test_logit_is_equation_2_written_out_but_for_what_psi_reads():
    torch.manual_seed(0)
    face_encoder = v.FaceEncoder(16, 2, length=3.5)
    discriminator = v.Discriminator(face_encoder, weight=0.2)
    faces, c = torch.randn(4, 3, 16, 16), torch.randn(4, 128)
    h = face_encoder.features(faces).detach().numpy()
    phi = face_encoder(faces).detach().numpy()
    psi = h @ discriminator.psi.weight.detach().numpy()[0]
    expected = [0.2 * sum(c[i].numpy() * phi[i]) + psi[i] for i in range(4)]
    np.testing.assert_allclose(discriminator(faces, c).detach().numpy(), expected, rtol=1e-4)
    for mine, theirs in zip(discriminator.phi.parameters(), face_encoder.parameters()):
        assert torch.equal(mine, theirs) and mine is not theirs  # a copy
    assert all(p.requires_grad for p in discriminator.parameters())


def test_losses_and_gradients_against_closed_forms():
    rng = np.random.default_rng(0)
    numbers = [torch.tensor(3 * rng.normal(size=7), requires_grad=True) for _ in range(4)]
    own, other, match, mismatch = (n.detach().numpy() for n in numbers)
    sigmoid = lambda x: 1 / (1 + np.exp(-x))
    for loss, x, used in ((v.rel_loss, own - other, numbers[:2]),
                          (v.relid_loss, own - other + match - mismatch, numbers)):
        value = loss(*used)
        assert value.item() == pytest.approx(-np.log(sigmoid(x)).mean(), rel=1e-9)
        for gradient, sign in zip(torch.autograd.grad(value, used), (-1, 1, -1, 1)):
            np.testing.assert_allclose(gradient.numpy(), sign * (1 - sigmoid(x)) / 7, rtol=1e-9)
    for logit in (-1e4, 1e4):  # log(sigmoid(x)) would be minus infinity
        x = torch.tensor([logit], requires_grad=True)
        for value in (v.rel_loss(x, x * 0), v.relid_loss(x, 0 * x, 0 * x, 0 * x)):
            gradient, = torch.autograd.grad(value, x, retain_graph=True)
            assert value.item() == max(0, -logit) and torch.isfinite(gradient).all()


def test_r1_of_functions_with_known_gradients():
    faces = torch.randn(5, 3, 4, 4)
    a = torch.tensor(2.0, requires_grad=True)
    penalty = v.r1_penalty(lambda f, c: a * f.sum((1, 2, 3)), faces, None)
    assert penalty.item() == pytest.approx(4 * 48)  # |a (1, ..., 1)|^2
    assert torch.autograd.grad(penalty, a)[0].item() == pytest.approx(2 * 2 * 48)
    penalty = v.r1_penalty(lambda f, c: (f.square().sum((1, 2, 3)) * c), faces, torch.arange(5))
    expected = [(2 * i * faces[i]).square().sum().item() for i in range(5)]
    assert penalty.item() == pytest.approx(np.mean(expected), rel=1e-5)
    assert not faces.requires_grad


def step_parts(seed=0, **changes):
    """A tiny G and D with optimisers and a batch, as d_step and g_step want them."""
    torch.manual_seed(seed)
    cfg = replace(v.GanSettings(), gamma=3.0, r1_every=4, weight=0.3, **changes)
    generator, face_encoder = v.Generator(16, 2), v.FaceEncoder(16, 2, 3.5)
    discriminator = v.Discriminator(face_encoder, 0.3)
    batch = (torch.randn(6, 3, 16, 16), *(torch.randn(6, 128) for _ in range(3)))
    return cfg, generator, discriminator, batch


def copy_of(module):
    """Its parameters as they are now."""
    return [p.detach().clone() for p in module.parameters()]


def same(module, before):
    """For each parameter whether it is as it was."""
    return [torch.equal(p, q) for p, q in zip(module.parameters(), before)]


@pytest.mark.parametrize("loss", ["relid", "rel"])
def test_each_step_trains_its_own_side_and_logs_what_it_says(loss):
    cfg, generator, discriminator, (faces, c, wrong, z) = step_parts(loss=loss)
    fakes = generator(z, c)
    g_before, d_before = copy_of(generator), copy_of(discriminator)
    real_phi, real_psi = (t.detach() for t in discriminator(faces))
    fake_phi, fake_psi = (t.detach() for t in discriminator(fakes))
    inner = lambda a, b: (a * b).sum(1)
    gap = 0.3 * inner(c, real_phi) + real_psi - 0.3 * inner(c, fake_phi) - fake_psi
    d_term, g_term = (0.3 * (inner(c, phi) - inner(wrong, phi)) * (loss == "relid")
                      for phi in (real_phi, fake_phi))
    optimizer = torch.optim.SGD([*discriminator.parameters()], 0.0)
    got = v.d_step(discriminator, optimizer, faces, fakes, c, wrong, cfg, True)
    expected = torch.log1p(torch.exp(-gap - d_term)).mean().item()
    assert got["loss_d"].item() == pytest.approx(expected, rel=1e-4)
    assert got["match_real"].item() == pytest.approx(inner(c, real_phi).mean().item(), rel=1e-4)
    assert got["match_fake"].item() == pytest.approx(inner(c, fake_phi).mean().item(), rel=1e-4)
    assert got["mismatch_real"].item() == pytest.approx(inner(wrong, real_phi).mean().item(),
                                                        rel=1e-4)
    assert got["r1"].item() == pytest.approx(v.r1_penalty(discriminator, faces, c).item())
    written = [p.grad for p in discriminator.parameters()]
    plain = v.d_step(discriminator, optimizer, faces, fakes, c, wrong, cfg, False)
    assert "r1" not in plain and all(same(discriminator, d_before))  # a rate of 0
    assert all(p.grad is None for p in generator.parameters())
    without = [p.grad.clone() for p in discriminator.parameters()]
    penalty = torch.autograd.grad(v.r1_penalty(discriminator, faces, c),
                                  list(discriminator.parameters()), allow_unused=True)
    for a, b, g in zip(written, without, penalty):
        if g is not None:
            assert torch.allclose(a - b, 3.0 / 2 * 4 * g, atol=1e-4, rtol=1e-3)  # gamma/2, 4 steps

    got = v.g_step(discriminator, torch.optim.SGD(generator.parameters(), 0.1),
                   faces, fakes, c, wrong, cfg)
    assert got["loss_g"].item() == pytest.approx(
        torch.log1p(torch.exp(gap - g_term)).mean().item(), rel=1e-4)
    assert all(same(discriminator, d_before)) and not any(same(generator.blocks, g_before[2:]))
    assert all(torch.equal(p.grad, g) for p, g in zip(discriminator.parameters(), without))
    assert all(p.requires_grad for p in discriminator.parameters())
    g_before = copy_of(generator)
    v.d_step(discriminator, torch.optim.SGD(discriminator.parameters(), 0.1),
             faces, generator(z, c), c, wrong, cfg, False)
    assert all(same(generator, g_before)) and not any(same(discriminator.phi.blocks, d_before))


def test_average_follows_the_generator():
    a, g = (torch.nn.Linear(1, 1, bias=False) for _ in range(2))
    a.weight.data.fill_(1.0), g.weight.data.fill_(2.0)
    v.follow(a, g, 1, 0.9)  # young: 2/11 of the old
    assert a.weight.item() == pytest.approx(2 / 11 * 1 + 9 / 11 * 2)
    v.follow(a, g, 1000, 0.5)
    assert a.weight.item() == pytest.approx((2 / 11 + 18 / 11) / 2 + 1)


def test_gan_run_folder(drawn, trained):
    assert {"settings.json", "log.jsonl", "last.pt", "previous.pt", "metrics.json", "samples"} == {
        p.name for p in drawn.iterdir()}
    assert [p.name for p in sorted((drawn / "samples").iterdir())] == ["000002.png", "000004.png"]
    log = [json.loads(line) for line in open(drawn / "log.jsonl")]
    steps = [line for line in log if "loss_d" in line]
    assert [line["step"] for line in steps] == [1, 2, 3, 4]
    assert all({"loss_g", "match_real", "match_fake", "mismatch_real", "images_per_s",
                "peak_memory_gb"} <= set(line) for line in steps)
    assert ["r1" in line for line in steps] == [False, True, False, True]
    assert [set(line) for line in log if "loss_d" not in line] == 2 * [
        {"step", "val/preferred", "val/f-v/2", "val/real/f-v/2"}]
    metrics = json.loads((drawn / "metrics.json").read_text())
    assert {"preferred", "preferred/std", "f-v/2", "f-v/2/std", "f-v/2/gender"} <= set(metrics)
    matched = json.loads((trained / "metrics.json").read_text())  # the same people, frames, windows
    assert {key: metrics[f"real/{key}"] for key in matched if not key.startswith("oracle")} == {
        key: value for key, value in matched.items() if not key.startswith("oracle")}


def test_speech_and_face_encoder_stay_as_match_train_left_them(drawn, trained):
    after, before = (torch.load(folder / name, weights_only=True) for folder, name in (
        (drawn, "last.pt"), (trained, "best.pt")))
    for mine, theirs in (("speech_encoder", "speech"), ("face_encoder", "face")):
        assert all(torch.equal(after[mine][key], t) for key, t in before[theirs].items())


def test_negatives_are_conditions_of_other_people(trained, tmp_path, monkeypatch):
    seen, chosen, real = [], [], v.draw_candidates
    data = plain_corpus(tmp_path / "data", 3)  # a batch of 6 holds everybody twice

    def choose(identity, k, generator):
        chosen.append((identity, real(identity, k, generator)))
        return chosen[-1][1]

    def step(discriminator, optimizer, faces, fakes, c, wrong, cfg, penalise):
        seen.append((c, wrong))
        return dict(loss_d=torch.zeros(()))

    def other_step(discriminator, optimizer, faces, fakes, c, wrong, cfg):
        assert wrong is seen[-1][1] and c is seen[-1][0]
        return dict(loss_g=torch.zeros(()))

    monkeypatch.setattr(v, "draw_candidates", choose), monkeypatch.setattr(v, "d_step", step)
    monkeypatch.setattr(v, "g_step", other_step)
    v.main(["gan-train", "--data", str(data), "--match", str(trained / "best.pt"),
            "--out", str(tmp_path), *TINY_GAN, "--eval-every", "9"])
    assert len(seen) == 4
    for (c, wrong), (identity, candidates) in zip(seen, chosen, strict=True):
        assert c.shape == wrong.shape == (6, 128)
        for i in range(6):
            j = candidates[i, 1]
            assert identity[i] != identity[j] and torch.equal(wrong[i], c[j])
        assert sorted(identity.tolist()) == [0, 0, 1, 1, 2, 2]


def test_samples_show_the_true_face_and_the_same_voices_and_z(corpus, trained, tmp_path):
    v.main(["gan-train", "--data", str(corpus), "--match", str(trained / "best.pt"),
            "--out", str(tmp_path), *TINY_GAN, "--lr", "0"])
    first, last = (Image.open(p) for p in sorted((tmp_path / "samples").iterdir()))
    assert np.array_equal(first, last)  # only G could have changed it
    pairs = v.Pairs(v.open_corpus(corpus, 2)["val"], 0.25, 32, 6, 0, shuffle=False)
    truth = pairs[0].faces.numpy().repeat(4, 1).repeat(4, 2)
    assert first.height == 24 + 6 * 156
    for i in range(6):
        top = 24 + i * 156 + 24
        assert np.array_equal(np.asarray(first)[top:top + 128, 2:130], truth[i])
    assert len({np.asarray(first)[48:176, 132 * j:132 * j + 132].tobytes() for j in range(8)}) == 8


def test_preference_and_accuracies_on_planted_generators(corpus, drawn, monkeypatch):
    gan = v.load_gan(drawn / "last.pt", torch.device("cpu"))
    people = v.open_corpus(corpus, 2)["test"]

    def measured(fakes):
        monkeypatch.setattr(v, "embed_fakes", fakes)
        return v.evaluate_generator(gan, people, {}, 4, torch.device("cpu"), v.FaultCounter())
    perfect = measured(lambda gan, c, seed: c)
    assert perfect["preferred"] == perfect["f-v/2"] == perfect["v-f/10"] == 100
    worst = measured(lambda gan, c, seed: -c)
    assert worst["preferred"] == worst["f-v/2"] == 0
    constant = measured(lambda gan, c, seed: torch.ones(1, 128).expand_as(c))
    assert constant["v-f/2"] == 50 and constant["v-f/10"] == pytest.approx(10)  # a tie each time
    assert 30 < constant["f-v/2"] < 70


def test_fakes_are_embedded_by_the_inference_stages_encoder(drawn):
    gan, c = v.load_gan(drawn / "last.pt", torch.device("cpu")), torch.randn(13, 128)
    z = torch.randn(13, 128, generator=torch.Generator().manual_seed(5))
    with torch.no_grad():
        expected = gan.face_encoder(gan.generator(z, c))
    assert torch.allclose(v.embed_fakes(gan, c, 5), expected, atol=1e-5)
    assert not gan.speech_encoder.training and not any(
        p.requires_grad for module in gan[2:4] for p in module.parameters())


def test_generate_draws_for_any_recording(drawn, tmp_path):
    paths = [tmp_path / name for name in ("low.wav", "high stereo.wav", "短い.wav", "long.wav")]
    write_wav(paths[0], noise(8000 * 2), rate=8000)
    write_wav(paths[1], noise(2 * 44100).reshape(-1, 2), rate=44100, channels=2)
    write_wav(paths[2], noise(int(0.1 * 16000), 1))  # less than this generator's window of 0.25 s
    write_wav(paths[3], noise(60 * 16000, 2))

    def picture(*more, speech=paths):
        argv = ["generate", *map(str, speech), "--gan", str(drawn / "last.pt"),
                "--out", str(tmp_path / "new" / "faces.png"), *more]
        assert v.main(argv) == 0
        return np.asarray(Image.open(tmp_path / "new" / "faces.png"))

    first = picture("-n", "3")
    assert len(first) == 24 + 4 * (132 + 24)  # 32 pixels a side, enlarged four times
    assert first.shape[1] > 3 * 132  # wide enough for the names
    assert np.array_equal(picture("-n", "3"), first)
    assert not np.array_equal(picture("-n", "3", "--seed", "1"), first)
    assert picture().shape[1] == 8 * 132
    first = first[:, :3 * 132]
    alone = picture("-n", "3", speech=paths[2:3])  # no matter what else is on the list
    assert np.array_equal(alone[48:176, :3 * 132], first[48 + 2 * 156:176 + 2 * 156])


def test_generate_refuses_what_holds_no_voice(drawn, trained, tmp_path, capsys):
    gan = ["--gan", drawn / "last.pt", "--out", tmp_path / "x.png"]
    write_wav(tmp_path / "quiet.wav", np.zeros(16000))
    write_wav(tmp_path / "one.wav", np.ones(1) / 2)
    write_wav(tmp_path / "none.wav", np.zeros(0))
    (tmp_path / "nan.wav").write_bytes(riff(3, 1, 16000, 32, np.full(99, np.nan, "<f4").tobytes()))
    (tmp_path / "text.wav").write_text("hello")
    for name, said in (("quiet", "silent"), ("one", "silent"), ("none", "no speech"),
                       ("nan", "NaN"), ("text", "not a WAV"), ("missing", "no such recording")):
        line = refused(capsys, "generate", tmp_path / f"{name}.wav", *gan)
        assert said in line and f"{name}.wav" in line
    assert not (tmp_path / "x.png").exists()
    for name in ("--beta1", "--beta2", "--decay"):
        assert f"{name} 1.0: must be below 1" in refused(capsys, "gan-train", name, "1")
    write_wav(tmp_path / "good.wav", noise(16000))
    assert " -n 0: must be at least 1" in refused(capsys, "generate", tmp_path / "good.wav", *gan,
                                                 "-n", "0")
    for out in ("x", "x.txt", "x.psd"):
        assert f"--out {out}: must be a .png file" in refused(
            capsys, "generate", tmp_path / "good.wav", *gan[:2], "--out", out)
    (tmp_path / "folder.png").mkdir()
    assert "folder.png" in refused(capsys, "generate", tmp_path / "good.wav", *gan[:2],
                                   "--out", tmp_path / "folder.png")
    pause = np.concatenate([noise(16000), np.zeros(3 * 16000)])
    write_wav(tmp_path / "pause.wav", pause)
    for seed in range(4):  # windows within the pause are passed over
        assert v.main(["generate", str(tmp_path / "pause.wav"), *map(str, gan), "-n", "1",
                       "--seed", str(seed)]) == 0
    assert "no such checkpoint" in refused(capsys, "generate", tmp_path / "good.wav")
    assert "is a checkpoint of match-train, not of gan-train" in refused(
        capsys, "generate", tmp_path / "good.wav", "--gan", trained / "best.pt")
    assert "is a checkpoint of gan-train, not of match-train" in refused(
        capsys, "gan-train", "--data", tmp_path, "--match", drawn / "last.pt")


def test_paper_preset_wants_encoders_of_its_size(trained, corpus, tmp_path, capsys):
    line = refused(capsys, "gan-train", "--data", corpus, "--match", trained / "best.pt",
                   "--out", tmp_path / "out", "--preset", "paper")
    assert "--preset paper" in line and "32 pixels" in line and not (tmp_path / "out").exists()


def test_rates_fall_to_zero_in_the_second_half(corpus, trained, tmp_path, monkeypatch):
    rates, real = [], (v.d_step, v.g_step)
    monkeypatch.setattr(v, "d_step", lambda d, optimizer, *a, **k: rates.append(
        optimizer.param_groups[0]["lr"]) or real[0](d, optimizer, *a, **k))
    monkeypatch.setattr(v, "g_step", lambda d, optimizer, *a: rates.append(
        optimizer.param_groups[0]["lr"]) or real[1](d, optimizer, *a))
    v.main(["gan-train", "--data", str(corpus), "--match", str(trained / "best.pt"), "--out",
            str(tmp_path), *TINY_GAN, "--steps", "8", "--eval-every", "8", "--lr", "4", "--d-lr",
            "0.4"])
    share = [1, 1, 1, 1, 1, 0.75, 0.5, 0.25]
    assert rates[1::2] == pytest.approx([4 * x for x in share])
    assert rates[::2] == pytest.approx([0.4 * x for x in share])


def test_a_nan_stops_the_run_names_step_and_loss_and_keeps_the_checkpoint(
        corpus, trained, tmp_path, monkeypatch, capsys):
    calls, real = [], v.g_step

    def step(discriminator, *args):
        calls.append(1)
        if len(calls) == poisoned:  # the loss of this step is the first to see it
            discriminator.psi.weight.data[0, 0] = math.nan
        return real(discriminator, *args)

    monkeypatch.setattr(v, "g_step", step)
    argv = ["gan-train", "--data", corpus, "--match", trained / "best.pt", "--out", tmp_path,
            *TINY_GAN, "--steps", "6", "--eval-every", "2", "--log-every", "9"]
    poisoned = 3
    line = refused(capsys, *argv)  # the step after it has NaN everywhere
    assert "step 3: loss_g is nan" in line and len(calls) == 4
    saved = torch.load(tmp_path / "last.pt", weights_only=True)
    assert saved["step"] == 2 and all(t.isfinite().all() for t in saved["generator"].values())
    monkeypatch.setattr(v, "g_step", real)
    real_follow = v.follow

    def follow(average, generator, step, decay):  # the last update breaks G, no loss has seen it
        if step == 4:
            generator.last.bias.data[0] = math.nan
        real_follow(average, generator, step, decay)

    monkeypatch.setattr(v, "follow", follow)
    assert "step 4: weights of generator are NaN" in refused(capsys, *argv, "--resume")
    assert torch.load(tmp_path / "last.pt", weights_only=True)["step"] == 2
    assert len(list((tmp_path / "samples").iterdir())) == 1


GAN_CHANGES = dict(loss="rel", steps=5, batch=8, seed=1, width=3, c_length=4.0, weight=0.7, lr=0.01,
                   d_lr=0.01, beta1=0.5, beta2=0.5, gamma=50.0, r1_every=3, decay=0.1, runs=3,
                   eval_every=4, save_every=3, log_every=2)


@pytest.mark.parametrize("name", [f.name for f in fields(v.GanSettings)])
def test_every_setting_of_gan_train_matters(name, drawn, corpus, tmp_path, monkeypatch, capsys):
    def left(out):
        weights = [round(t.double().sum().item(), 6) for t in
                   torch.load(out / "last.pt", weights_only=True)["generator"].values()]
        log = [{k: x for k, x in json.loads(line).items() if "per_s" not in k and "memory" not in k}
               for line in open(out / "log.jsonl")]
        return weights, log, (out / "metrics.json").read_text()

    base = v.GanSettings(**json.loads((drawn / "settings.json").read_text()))
    if name in ("data", "match", "device"):
        assert "nowhere" in refused(capsys, "gan-train", "--data", corpus, "--match", base.match,
                                    *TINY_GAN, "--out", tmp_path, f"--{name}", "nowhere")
    elif name == "preset":
        seen = []
        monkeypatch.setattr(v, "gan_train", seen.append)
        v.main(["gan-train", "--preset", "paper", "--lr", "0.5"])
        assert asdict(seen[0]) == asdict(v.GanSettings(
            **v.PAPER["gan-train"] | dict(preset="paper", lr=0.5)))
    elif name in ("out", "workers", "resume"):  # and the same settings give the same run
        v.gan_train(replace(base, out=str(tmp_path / "x y"), workers=int(name == "workers"),
                            resume=name == "resume"))  # in an empty folder: from the beginning
        assert left(tmp_path / "x y") == left(drawn)
    else:
        if name == "seed":  # of z itself
            drawn_z = []
            monkeypatch.setattr(v.Generator, "forward", lambda self, z, c, real=v.Generator.forward:
                                drawn_z.append(z.clone()) or real(self, z, c))
            for i, seed in enumerate((0, 0, 1)):
                v.gan_train(replace(base, out=str(tmp_path / str(i)), seed=seed, steps=1, runs=1))
            one, two, three = drawn_z[0], drawn_z[len(drawn_z) // 3], drawn_z[-len(drawn_z) // 3]
            assert torch.equal(one, two) and not torch.isclose(one, three).any()
            monkeypatch.undo()
        v.gan_train(replace(base, out=str(tmp_path), **{name: GAN_CHANGES[name]}))
        if name == "save_every":
            assert left(tmp_path) == left(drawn) and saved_step(tmp_path, "previous.pt") == 3
        else:
            assert left(tmp_path) != left(drawn)


# ---- The report ----------------------------------------------------------------------------------


def test_couples_are_of_different_people():
    identity = torch.tensor([0, 0, 0, 0, 1, 2])
    couples = v.draw_couples(identity, 999, torch.Generator().manual_seed(0))
    assert couples.shape == (999, 2) and (identity[couples[:, 0]] != identity[couples[:, 1]]).all()
    seen = {tuple(sorted(couple)) for couple in couples.tolist()}
    assert seen == {(i, 4) for i in range(4)} | {(i, 5) for i in range(4)} | {(4, 5)}


def test_correlation_of_planted_pairs():
    generator = torch.Generator().manual_seed(0)
    identity = torch.arange(100)
    people = identity[v.draw_couples(identity, 1000, generator)]
    x = torch.rand(1000, generator=generator).double()
    assert v.correlation(x, 3 * x + 1, people, 50) == pytest.approx((1, 1, 1))
    assert v.correlation(x, -x, people, 50)[0] == pytest.approx(-1)
    y = x + torch.rand(1000, generator=generator)
    r, low, high = v.correlation(x, y, people)
    assert r == pytest.approx(np.corrcoef(x.numpy(), y.numpy())[0, 1]) and low < r < high
    shuffled = y[torch.randperm(1000, generator=generator)]
    r, low, high = v.correlation(x, shuffled, people)
    assert abs(r) < 0.1 and low < 0 < high
    weight = torch.randint(4, (1000,), generator=generator).double()  # as if repeated
    assert v.pearson(x, y, weight) == pytest.approx(np.corrcoef(
        *(np.repeat(a.numpy(), weight.long().numpy()) for a in (x, y)))[0, 1])


def test_intervals_over_people_are_wider_where_people_repeat():
    generator = torch.Generator().manual_seed(0)
    mood = torch.randn(12, generator=generator).double()  # a person's own, in all of their pairs
    people = v.draw_couples(torch.arange(12), 3000, generator)
    x, y = mood[people].sum(1), mood.flip(0)[people].sum(1) + mood[people].sum(1)
    r, low, high = v.correlation(x, y, people)
    assert high - low > 5 * 2 * 1.96 * (1 - r * r) / math.sqrt(3000)  # as if pairs were independent


def test_the_bootstrap_draws_people(monkeypatch):
    seen = []
    monkeypatch.setattr(v, "pearson", lambda x, y, weight: seen.append(
        tuple(sorted(weight.int().tolist()))) or 0.0)
    v.correlation(torch.rand(3), torch.rand(3), torch.tensor([[4, 7], [4, 9], [7, 9]]), 200)
    # three people once each; one twice, another once; one three times and so no couple
    assert set(seen) == {(1, 1, 1), (0, 0, 2), (0, 0, 0)}


def test_retrieval_of_planted_generators_and_brute_force():
    torch.manual_seed(0)
    gallery, owner = torch.randn(60, 8), torch.arange(60) // 3  # 20 people, 3 faces each
    person = torch.arange(20)
    perfect = v.recall(gallery[::3] + 0.001, person, gallery, owner, "r")
    assert all(perfect[f"r/{d}/{k}"] == 100 for d in v.DISTANCES for k in v.RANKS)
    alone, own = torch.randn(20, 8), torch.arange(20)  # a face each: a constant finds k of 20
    constant = v.recall(torch.ones(20, 8), person, alone, own, "r")
    assert all(constant[f"r/{d}/{k}"] == pytest.approx(100 * k / 20)
               == pytest.approx(v.recall_by_chance(person, own, k))
               for d in v.DISTANCES for k in v.RANKS)
    queries, got = torch.randn(20, 8), {}
    got = v.recall(queries, person, gallery, owner, "r")
    q, g = queries.numpy()[:, None], gallery.numpy()[None]
    cos = (q * g).sum(2) / np.linalg.norm(q, axis=2) / np.linalg.norm(g, axis=2)
    for name, d in (("L1", np.abs(q - g).sum(2)), ("L2", np.square(q - g).sum(2)),
                    ("cosine", -cos)):
        order = np.argsort(d, axis=1)
        for k in v.RANKS:
            hits = [i in owner.numpy()[order[i, :k]] for i in range(20)]
            assert got[f"r/{name}/{k}"] == pytest.approx(100 * np.mean(hits))
    rng = np.random.default_rng(0)
    drawn = np.mean([7 in owner.numpy()[rng.permutation(60)[:5]] for _ in range(20_000)])
    assert v.recall_by_chance(person, owner, 5) == pytest.approx(100 * drawn, abs=1.5)
    owner, person = torch.tensor([0] * 9 + [1]), torch.tensor([0, 1, 1, 1])  # of 10: 9 and 1 faces
    assert v.recall_by_chance(person, owner, 1) == pytest.approx((90 + 10 + 10 + 10) / 4)


def test_a_test_set_of_avspeechs_size_is_evaluable():
    import resource
    torch.manual_seed(0)
    clips, before = 140_000, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    c, identity = torch.randn(clips, 8), torch.arange(clips)
    row = v.matching_run(c, c, identity, [""] * clips, 0)
    assert row["v-f/10"] > 90
    gallery = c[:1000]
    assert v.retrieve(c, identity, gallery, identity[:1000], "cosine")[1][:, 0].sum() == 1000
    v.draw_couples(identity, 2000, torch.Generator())
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1e6  # GB
    assert grown < 2  # their square alone would take 78 GB


def test_variance_shares_of_planted_factors():
    torch.manual_seed(0)
    a, b = torch.randn(30, 1, 2), torch.randn(1, 20, 2)
    shares = v.variance_shares(a + 0 * b)
    assert shares == pytest.approx((1, 0, 0), abs=1e-5)  # z is ignored
    assert v.variance_shares(0 * a + b) == pytest.approx((0, 1, 0), abs=1e-5)
    a, b = a - a.mean(0), b - b.mean(1, keepdim=True)
    assert v.variance_shares(a * b) == pytest.approx((0, 0, 1), abs=1e-5)  # neither by itself
    c, z, both = v.variance_shares(3 * a + b)
    expected = 9 * a.var((0, 1), correction=0).sum() / (
        9 * a.var((0, 1), correction=0).sum() + b.var((0, 1), correction=0).sum())
    assert c == pytest.approx(expected.item()) and c + z + both == pytest.approx(1)


def test_probe_reads_factors_of_unseen_people(corpus):
    labels, columns = v.read_labels(corpus), v.probe_columns()
    row = v.probe_targets(next(iter(labels.values())))
    assert len(row) == max(c.stop for c in columns.values())
    assert sum(c.stop - c.start for c in columns.values()) == len(row)
    first = next(iter(labels.values()))
    assert row[columns["age"]].index(1.0) == int(first["age"]) and sum(row[columns["age"]]) == 1
    people = v.open_corpus(corpus, 2)
    sets = {}
    for split in ("train", "test"):
        names, listed = list(people[split]), v.list_faces(people[split], 6, 9999, 0)
        faces, person = v.load_faces(listed, 32)
        sets[split] = faces, torch.tensor([v.probe_targets(labels[names[i]]) for i in person])
    probe = v.train_probe(*sets["train"], 32, 8, torch.device("cpu"), steps=150)
    read, truth = v.read_factors(probe, v.to_pixels(sets["test"][0], "cpu")), sets["test"][1]
    gender, hue = columns["gender"], columns["background"].start
    assert (read[:, gender].argmax(1) == truth[:, gender].argmax(1)).float().mean() > 0.65
    assert read[:, gender].sum(1).abs().max() < 1e-4  # log-odds
    assert torch.corrcoef(torch.stack([read[:, hue], truth[:, hue]]))[0, 1] > 0.75


def test_faces_are_listed_by_person_and_bad_ones_left_out(tmp_path, capsys):
    plain_corpus(tmp_path, 3, ("test",))
    clip = tmp_path / "test" / "test1" / "a b"
    write_face(clip / "7.png"), (clip / "8.png").write_text("no")
    people = {p.name: v.list_clips(p) for p in sorted((tmp_path / "test").iterdir())}
    listed = v.list_faces(people, 9, 9, 0)
    assert sorted(i for i, _ in listed) == [0, 1, 1, 1, 2]
    assert all(f"test{i}/" in path for i, path in listed)
    assert sorted(i for i, _ in v.list_faces(people, 1, 9, 0)) == [0, 1, 2]
    assert len({v.list_faces(people, 9, 2, seed)[0][0] for seed in range(20)}) == 3
    assert len(v.list_faces(people, 9, 2, 0)) == 2
    faces, person = v.load_faces(listed, 32)
    assert faces.shape == (4, 32, 32, 3)
    assert person.tolist() == [i for i, path in listed if not path.endswith("8.png")]
    assert "left out" in capsys.readouterr().err


def test_reports_need_two_people(drawn, tmp_path, capsys):
    data = plain_corpus(tmp_path / "data", 4)
    argv = ["gan-test", "--data", data, "--gan", drawn / "last.pt", "--out", tmp_path / "o",
            *REPORT]
    with pytest.raises(v.UserError, match="two people"):
        v.draw_couples(torch.tensor([3, 3]), 5, torch.Generator())
    assert "--gallery 1: must be at least 2" in refused(capsys, *argv, "--gallery", "1")
    assert "--runs 1: must be at least 2" in refused(capsys, *argv, "--runs", "1")
    for person in range(4):
        for i in range(3):
            write_face(data / "test" / f"test{person}" / "a b" / f"{i}.png")
    assert "--gallery 2 --each 4: leaves faces of one person" in refused(
        capsys, *argv, "--gallery", "2", "--each", "4")


def test_every_setting_of_gan_test_matters(drawn, trained, tmp_path, capsys):
    data = plain_corpus(tmp_path / "data", 4)
    for person in range(4):
        for i in range(3):
            write_face(data / "test" / f"test{person}" / "a b" / f"{i}.png",
                       (60 * i, 0, 50 * person))

    def metrics(*more):
        assert v.main(["gan-test", "--data", str(data), "--gan", str(drawn / "last.pt"), "--out",
                       str(tmp_path / "o"), *REPORT, *more]) == 0
        return json.loads((tmp_path / "o" / "metrics.json").read_text())

    base = metrics()
    assert metrics() == base and metrics("--workers", "1") == base
    for more in (("--gallery", "3"), ("--each", "3"), ("--couples", "70"), ("--runs", "3"),
                 ("--seed", "1"), ("--versus", str(drawn / "last.pt"))):
        assert metrics(*more) != base, more
    for name in ("gan", "versus", "data", "device"):
        assert "nowhere" in refused(capsys, "gan-test", "--data", data, "--gan", drawn / "last.pt",
                                    "--out", tmp_path / "o", *REPORT, f"--{name}", "nowhere")


def test_ideal_faces_have_their_factors_where_they_belong(monkeypatch):
    faces = v.draw_ideal(3, 4, 32, 0)
    assert faces.shape == (3, 4, 32, 32, 3) and faces.dtype == torch.uint8
    drawn = []
    monkeypatch.setattr(v, "synth_faces", lambda person, openings, real=v.synth_faces:
                        drawn.append(person) or real(person, openings))
    v.draw_ideal(3, 4, 32, 0)
    grid = [drawn[4 * i:4 * i + 4] for i in range(3)]
    for name in drawn[0]:
        for i in range(3):
            for j in range(4):
                other = grid[i][0] if name in v.SHARED else grid[0][j]
                assert grid[i][j][name] == other[name]


def test_claims_on_planted_metrics():
    m = {f"real/{d}/{k}": 95.0 for d in ("v-f", "f-v") for k in (2, 10)} | {
        "f-v/2": 99.0, "f-v/2/std": 2.0, "real/f-v/2/std": 1.0, "preferred": 70.0,
        "preferred/std": 5.0, "versus/preferred": 40.0, "versus/over": 80.0,
        "retrieval/cosine/5": 30.0, "versus/retrieval/cosine/5": 20.0, "qta1/r": 0.5,
        "qta1/r/low": 0.4, "qta1/different/c": 0.5, "qta1/same/c": 0.3, "qta1/different/face": 0.3,
        "qta1/same/face": 0.2} | {f"control/{name}/{by}": 81.0 for name in v.PROBED for by in "cz"}

    def held(changed, losses=("relid", "rel")):
        return [row[2] for row in v.claims(m | changed, losses)]

    assert held({}) == ["yes"] * 8
    for place, changed in enumerate([
            {"real/v-f/10": 10.0}, {"qta1/same/face": 0.4}, {"qta1/r/low": -0.1},
            {"preferred": 54.0, "versus/preferred": 10.0}, {"f-v/2/std": 5.0},
            {"retrieval/cosine/5": 20.0}, {"control/age/c": 79.0}, {"control/hair/z": 79.0}]):
        assert held(changed) == ["yes"] * place + ["no"] + ["yes"] * (7 - place), changed
    assert held({}, ("rel", "relid"))[5] == held({}, ("relid", None))[5] == "not tested"
    assert [row[2] for row in v.claims({}, (None, None))] == ["not tested"] * 8


REPORT = ["--runs", "2", "--couples", "50", "--workers", "0", "--device", "cpu"]


def test_report_fills_every_cell(drawn, corpus, trained, tmp_path, monkeypatch):
    real = v.train_probe
    monkeypatch.setattr(v, "train_probe", lambda *args: real(*args, steps=5))
    assert v.main(["gan-test", "--data", str(corpus), "--gan", str(drawn / "last.pt"), "--versus",
                   str(drawn / "last.pt"), "--out", str(tmp_path), *REPORT]) == 0
    page = (tmp_path / "report.md").read_text(encoding="utf8")
    pictures = re.findall(r"!\[.*?\]\((.*?)\)", page)
    assert len(pictures) == 5 and all((tmp_path / p).stat().st_size > 1000 for p in pictures)
    metrics = json.loads((tmp_path / "metrics.json").read_text())
    assert metrics["versus/over"] == 50 and metrics["versus/preferred"] == metrics["preferred"]
    assert {"qta1/r", "qta1/same/c", "retrieval/L1/1", "versus/retrieval/cosine/10",
            "chance/retrieval/5", "control/tilt/z", "real/f-v/2/gender"} <= set(metrics)
    assert metrics["retrieval/gallery"] == 12 and metrics["retrieval/queries"] == 12
    rows = [row for row in page.splitlines() if row.startswith("|")]
    empty = [row for row in rows if "| - |" in row]  # 12 people have not ten of each gender
    assert all("10-way" in row for row in empty) and "not filled" not in page


def test_report_says_what_it_cannot_fill(drawn, corpus, trained, tmp_path, capsys):
    data = plain_corpus(tmp_path / "data", 4)
    assert v.main(["gan-test", "--data", str(data), "--gan", str(drawn / "last.pt"),
                   "--out", str(tmp_path / "out"), *REPORT]) == 0
    page = (tmp_path / "out" / "report.md").read_text(encoding="utf8")
    assert "no `--versus`: not filled" in page
    assert "labels.csv has not two genders: not filled" in page
    assert "Not filled: labels.csv does not have" in page and page.count("not tested |") == 4
    assert v.main(["match-train", "--data", str(corpus), "--out", str(tmp_path / "m"), *TINY,
                   "--seed", "5"]) == 0
    assert v.main(["gan-train", "--data", str(corpus), "--match", str(tmp_path / "m" / "best.pt"),
                   "--out", str(tmp_path / "g"), *TINY_GAN]) == 0
    assert "other encoders" in refused(
        capsys, "gan-test", "--data", data, "--gan", drawn / "last.pt",
        "--versus", tmp_path / "g" / "last.pt", "--out", tmp_path / "out2")


# ---- Stop and go on ------------------------------------------------------------------------------


def leaves(x, name=""):
    """{path: leaf} of nested dicts, lists and tuples."""
    if not isinstance(x, (dict, list, tuple)):
        return {name: x}
    items = x.items() if isinstance(x, dict) else enumerate(x)
    return {path: leaf for key, y in items for path, leaf in leaves(y, f"{name}/{key}").items()}


def left_by(out):
    """All that a run leaves: tensors of its checkpoints, pictures, metrics, log but for times."""
    found = {}
    for path in (out / "last.pt", out / "best.pt"):
        if path.exists():
            state = torch.load(path, weights_only=True)
            for key in v.MAY_CHANGE:
                state["settings"].pop(key, None)
            if path.name == "last.pt":
                state["counts"] = state["counts"][1:]  # the first is the log's length, with times
            found |= leaves(state, path.name)
    found["log"] = [{k: x for k, x in json.loads(line).items() if "per_s" not in k and "gb" not in k}
                    for line in open(out / "log.jsonl")]
    found["metrics"] = (out / "metrics.json").read_text()
    return found | {p.name: p.read_bytes() for p in out.rglob("*.png")}


def assert_equal_runs(a, b):
    """Bit for bit."""
    a, b = left_by(a), left_by(b)
    assert set(a) == set(b) and any(isinstance(x, torch.Tensor) for x in a.values())
    for key, x in a.items():
        same = torch.equal(x, b[key]) if isinstance(x, torch.Tensor) else x == b[key]
        assert same, key


def tiny(command, corpus, match):
    """A command line of 12 steps, without --out."""
    return [command, "--data", str(corpus),
            *(TINY if command == "match-train" else ["--match", str(match), *TINY_GAN]), "--steps",
            "12", "--eval-every", "5", "--save-every", "4", "--log-every", "3", "--runs", "1"]


@pytest.mark.parametrize("command", ["match-train", "gan-train"])
def test_a_run_stopped_at_each_step_and_validation_equals_one_that_was_not(
        command, corpus, trained, tmp_path, monkeypatch, capsys):
    argv = tiny(command, corpus, trained / "best.pt")
    assert v.main([*argv, "--out", str(tmp_path / "whole")]) == 0
    usual, stops = [signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)], []
    add, test = v.Run.add, v.embed_pairs

    def stop_in_step(run, *args, **values):
        add(run, *args, **values)
        stops.append((run.step, signal.SIGTERM if run.step % 2 else signal.SIGINT))
        os.kill(os.getpid(), stops[-1][1])

    def stop_in_validation(*args):
        if (stops[-1][0], "val") not in stops:
            stops.append((stops[-1][0], "val"))
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(9)  # cut off
        return test(*args)

    monkeypatch.setattr(v.Run, "add", stop_in_step)
    monkeypatch.setattr(v, "embed_pairs", stop_in_validation)
    codes = []
    while not codes or codes[-1]:
        moved = tmp_path / f"part{len(codes)}"  # the folder may move in between
        if codes:
            (tmp_path / f"part{len(codes) - 1}").rename(moved)
        codes.append(v.main([*argv, "--out", str(moved), "--resume"]))
        if stops[-1][1] != "val":
            assert saved_step(moved) == stops[-1][0]
    # 12 steps, and the validations after 5, 10, 12
    assert len(codes) == 16 and set(codes) == {130, 143, 0}
    assert [step for step, what in stops if what != "val"] == list(range(1, 13))
    assert [step for step, what in stops if what == "val"] == [5, 10, 12]
    assert_equal_runs(tmp_path / "whole", moved)
    assert usual == [signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)]
    assert "stopped; the same command with --resume goes on" in capsys.readouterr().err
    # a finished run that is resumed is tested again
    monkeypatch.undo()
    assert v.main([*argv, "--out", str(moved), "--resume"]) == 0
    assert_equal_runs(tmp_path / "whole", moved)


@pytest.mark.parametrize("step", [4, 5, 12])
def test_a_signal_during_a_save_ends_the_run_after_it(step, corpus, tmp_path, monkeypatch):
    """Before the validation that is due after step 5, before the test after step 12."""
    argv, save, seen = tiny("match-train", corpus, None), v.save_checkpoint, []

    def stop(path, *args, **more):
        if path.name == "last.pt" and more["step"] == step:
            os.kill(os.getpid(), signal.SIGTERM)
        save(path, *args, **more)

    monkeypatch.setattr(v, "save_checkpoint", stop)
    monkeypatch.setattr(v, "embed_pairs", lambda *a, real=v.embed_pairs: seen.append(1) or real(*a))
    assert v.main([*argv, "--out", str(tmp_path)]) == 143
    assert saved_step(tmp_path) == step and len(seen) == {4: 0, 5: 0, 12: 2}[step]


def test_ctrl_c_in_a_real_process_with_a_loader(corpus, tmp_path):
    """As a terminal does it: to the whole process group, loaders included."""
    process = subprocess.Popen(
        [sys.executable, FILE, "match-train", "--data", corpus, "--out", tmp_path, *TINY, "--steps",
         "100000", "--eval-every", "100000", "--workers", "1", "--log-every", "10"],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True)
    for line in process.stdout:
        if line.startswith("step 30/"):
            break
    os.killpg(process.pid, signal.SIGINT)
    out, err = process.communicate(timeout=30)
    assert process.returncode == 130 and err.count("\n") == 1 and "--resume" in err
    assert f"stopped after step {saved_step(tmp_path)}" in out


def kill(times, folder, seed=None):
    """Kill real processes at random moments; the runs must end as those that were left alone.

    Each is forked from this one, which has torch in memory but has not used its threads.
    """
    torch.set_num_threads(1)
    seed = seed or random.randrange(10**6)
    rng, numbers = random.Random(seed), [signal.SIGKILL] * 3 + [signal.SIGTERM, signal.SIGINT]
    print(f"{times} kills, seed {seed}")

    def process(argv, log=None):
        pid = os.fork()
        if pid == 0:
            code = 99
            try:
                for stream in (1, 2):
                    os.dup2(os.open(os.devnull, os.O_WRONLY), stream)
                code = v.main(argv)
            finally:
                os._exit(code)
        if log and rng.random() < 0.3:
            time.sleep(rng.uniform(0, seconds))
        elif log:  # until it has written a line of a step to come
            line, after = rng.randrange(steps[-1] if steps else 0, 26), time.time() + 2 * seconds
            while time.time() < after and (log.read_bytes().count(b"\n") if log.exists()
                                           else 0) < line:
                time.sleep(0.001)
            time.sleep(rng.uniform(0, 0.03))
        if log:
            os.kill(pid, rng.choice(numbers))
        return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])

    plain_corpus(folder / "data", 6)
    for command in ("match-train", "gan-train"):
        argv = [*tiny(command, folder / "data", folder / "match-train" / "best.pt"),
                "--steps", "24", "--save-every", "2", "--log-every", "1"]
        kills, runs, started = 0, 0, time.time()
        assert process([*argv, "--out", str(folder / command)]) == 0
        seconds, steps = time.time() - started, []
        while 2 * kills < times:
            out, runs, code = folder / f"{command}{runs}", runs + 1, None
            steps.append(0)
            while code != 0:
                code = process([*argv, "--out", str(out), "--resume", "--workers", str(kills % 2)],
                               out / "log.jsonl" if 2 * kills < times else None)
                assert code in (0, 130, 143, -signal.SIGKILL, -signal.SIGTERM, -signal.SIGINT), code
                kills += code != 0
                names = [name for name in ("last.pt", "previous.pt") if (out / name).exists()]
                steps.append(saved_step(out, names[0]) if names else 0)
            assert_equal_runs(folder / command, out)
        print(f"{command}: {kills} kills in {runs} runs, each bit for bit equal to one left alone; "
              f"steps saved at the kills: {steps}")


def test_runs_killed_at_random_moments_equal_runs_left_alone():
    """A few only: `python test_voice2face.py kill 40` makes more of them."""
    done = subprocess.run([sys.executable, __file__, "kill", "4"], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert sum(int(n) for n in re.findall(r": (\d+) kills", done.stdout)) >= 4


@pytest.fixture
def half(corpus, tmp_path):
    """(command line, folder) of a run stopped after step 8 of 12, and one that was not, `whole`."""
    argv = tiny("match-train", corpus, None)
    assert v.main([*argv, "--out", str(tmp_path / "whole")]) == 0
    add = v.Run.add
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(v.Run, "add", lambda run, *a, **k: add(run, *a, **k) or (
            run.step == 8 and os.kill(os.getpid(), signal.SIGTERM)))
        assert v.main([*argv, "--out", str(tmp_path / "half")]) == 143
    assert [saved_step(tmp_path / "half", n) for n in ("last.pt", "previous.pt")] == [8, 5]
    return [*argv, "--out", str(tmp_path / "half"), "--resume"], tmp_path / "half"


def damage(kind, path):
    """Harm a file as a broken disk, a copy cut short, or a kill between two renames would."""
    content = bytearray(path.read_bytes())
    with zipfile.ZipFile(path) as archive:  # the middle of its largest tensor
        info = max(archive.infolist(), key=lambda info: info.file_size)
    if kind == "missing":
        return path.unlink()
    if kind == "one bit":
        content[info.header_offset + 200 + info.file_size // 2] ^= 1
    elif kind == "zeros":
        content[len(content) // 2:] = bytes(len(content) - len(content) // 2)
    path.write_bytes(content[:len(content) // 2] if kind == "cut" else
                     b"" if kind == "empty" else content)


@pytest.mark.parametrize("kind", ["missing", "cut", "empty", "zeros", "one bit"])
def test_a_damaged_checkpoint_leaves_the_one_before_in_use(kind, half, tmp_path, capsys):
    argv, out = half
    damage(kind, out / "last.pt")
    assert v.main(argv) == 0
    said = capsys.readouterr().err
    assert "last.pt: " in said and f"going on from {out / 'previous.pt'}, step 5" in said
    assert_equal_runs(tmp_path / "whole", out)


def test_two_damaged_checkpoints_are_an_error(half, capsys):
    argv, out = half
    (out / "previous.pt").unlink()
    for harm in (lambda: shutil.copy(out / "best.pt", out / "last.pt"),  # has no state of training
                 lambda: damage("cut", out / "last.pt")):
        harm()
        assert "half/last.pt: not a checkpoint of match-train, or damaged" in refused(capsys, *argv)


def test_a_damaged_checkpoint_never_replaces_the_good_one_before(half, tmp_path, monkeypatch):
    argv, out = half
    damage("cut", out / "last.pt")
    good = (out / "previous.pt").read_bytes()

    def kill_at(n):
        """A kill at the n-th renaming to last.pt or from it."""
        def replace(a, b, real=os.replace, seen=[]):
            if "last.pt" in (Path(a).name, Path(b).name):
                seen.append(b)
                if len(seen) == n:
                    raise SystemExit
            real(a, b)
        monkeypatch.setattr(v.os, "replace", replace)
        with pytest.raises(SystemExit):
            v.main(argv)
        monkeypatch.undo()

    kill_at(1)  # that of the first save after the fallback
    assert (out / "previous.pt").read_bytes() == good
    kill_at(3)  # the second save: last.pt, whole again, is previous.pt, and nothing is last.pt
    assert saved_step(out, "previous.pt") == 8 and not (out / "last.pt").exists()
    assert v.main(argv) == 0
    assert_equal_runs(tmp_path / "whole", out)


def test_a_full_disk_ends_the_run_and_leaves_the_checkpoint(half, tmp_path, capsys):
    argv, out = half
    before, limits = (out / "last.pt").read_bytes(), resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (len(before) // 2, limits[1]))
    try:
        line = refused(capsys, *argv)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    # the validation after step 10 writes both
    assert re.search(r"(best|last)\.pt: cannot be written \(.*\); the checkpoint before", line)
    assert (out / "last.pt").read_bytes() == before and not list(out.glob("*.part"))
    assert v.main(argv) == 0
    assert_equal_runs(tmp_path / "whole", out)


def test_resume_names_settings_that_contradict_and_lets_others_change(half, corpus, tmp_path,
                                                                      capsys):
    argv, out = half
    before = left = (out / "last.pt").read_bytes()
    for change, said in ((["--lr", "0.07", "--k", "5"], "--k 4, not 5, --lr 0.05, not 0.07"),
                         (["--steps", "13"], "--steps 12, not 13"),
                         (["--preset", "paper"], "--preset small, not paper")):
        line = refused(capsys, *argv, *change)
        assert f"--resume: the run in {out} has " in line and said in line
    line = refused(capsys, *[a for a in argv if a != "--resume"])
    assert "holds an unfinished run" in line and "--resume" in line
    assert left == before == (out / "last.pt").read_bytes()
    (tmp_path / "moved").symlink_to(corpus)
    assert v.main([*argv, "--data", str(tmp_path / "moved"), "--workers", "1", "--log-every", "3",
                   "--save-every", "1"]) == 0
    assert_equal_runs(tmp_path / "whole", out)
    assert "holds a finished run" in refused(capsys, *[a for a in argv if a != "--resume"])


def test_gan_resume_wants_the_same_encoders(corpus, trained, drawn, tmp_path, capsys):
    out = tmp_path / "gan"
    shutil.copytree(drawn, out)
    v.main(["match-train", "--data", str(corpus), "--out", str(tmp_path / "m"), *TINY, "--seed",
            "5", "--steps", "1"])
    argv = ["gan-train", "--data", corpus, *TINY_GAN, "--out", out, "--resume", "--match"]
    assert "has other encoders than --match" in refused(capsys, *argv, tmp_path / "m" / "best.pt")
    shutil.copy(trained / "best.pt", tmp_path / "copy.pt")
    assert v.main([str(a) for a in [*argv, tmp_path / "copy.pt"]]) == 0


def test_chance_is_a_function_of_seed_and_batch():
    draw = lambda *a: torch.rand(4, generator=v.step_generator(*a)).tolist()
    assert draw(3, 7) == draw(3, 7)
    seeds = [(3, 7), (3, 8), (4, 7), (3 + 2**32, 7), (7, 3), (2**63 - 1, 7)]
    assert len({tuple(draw(*s)) for s in seeds}) == len(seeds)


@pytest.mark.parametrize("count", [1, 2, 4])
def test_processes_meet_different_people_in_a_step(count, monkeypatch):
    monkeypatch.setattr(v, "processes", lambda: (0, count))
    pairs = v.Pairs({i: [] for i in range(70)}, 1.0, 32, 8, 0, shuffle=True)
    seen = []
    for step in range(40):
        people = [p for i in range(step * count, (step + 1) * count) for p, _ in pairs.plan(i)]
        assert len(set(people)) == 8 * count
        seen += people
    assert min(seen.count(p) for p in range(70)) > 0


def test_a_tensor_goes_to_any_device():
    assert v.send(torch.ones(2), "meta").device.type == "meta"


def test_a_clusters_variables_without_torchrun_change_nothing(trained, corpus, tmp_path,
                                                              monkeypatch):
    for name, value in dict(RANK="1", WORLD_SIZE="2", LOCAL_RANK="1").items():
        monkeypatch.setenv(name, value)
    assert v.main(["match-train", "--data", str(corpus), "--out", str(tmp_path), *TINY]) == 0
    assert fingerprint(tmp_path) == fingerprint(trained)


def test_a_full_disk_is_named_wherever_it_is_met(corpus, tmp_path, capsys):
    (tmp_path / "settings.json").symlink_to("/dev/full")
    line = refused(capsys, "match-train", "--data", corpus, "--out", tmp_path, *TINY)
    assert f"{tmp_path}: No space left on device" in line


def test_other_runtime_errors_are_not_hidden(corpus, tmp_path, monkeypatch):
    monkeypatch.setattr(v, "make_encoders", lambda *args: torch.ones(2) @ torch.ones(3))
    with pytest.raises(RuntimeError):
        v.main(["match-train", "--data", str(corpus), "--out", str(tmp_path), *TINY])


# ---- Every row of the README's tables of bad input -----------------------------------------------


def readme_rows():
    """{what is given: [what is said, as regular expressions]} of the README's section."""
    text = (FILE.parent / "README.md").read_text(encoding="utf8")
    section = text.split("## When something is wrong")[1].split("\n## ")[0]
    rows = [line.strip("| ").split(" | ") for line in section.splitlines() if line[:2] == "| "]
    return {given: [".*".join(map(re.escape, span.split("...")))
                    for span in re.findall(r"`([^`]+)`", said) if "-data" not in span
                    and span != "generate"]
            for given, said in rows if given not in ("You give", "A file")}


class Evil:
    """Its pickle makes a file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


def test_every_row_of_the_readmes_table_of_mistakes(half, corpus, trained, drawn, tmp_path,
                                                    monkeypatch, capsys):
    resume, out = half

    def refuse(*argv):
        return refused(capsys, *argv)

    def match(*more, data=corpus, to=tmp_path / "out"):
        return refuse("match-train", "--data", data, "--out", to, *TINY, *more)

    def parse(*argv):
        with pytest.raises(SystemExit) as end:
            v.main(["match-train", *argv])
        lines = capsys.readouterr().err.splitlines()
        assert end.value.code == 2 and len(lines) == 2 and lines[0].startswith("usage: ")
        return lines[1]

    def with_file(name, content=b""):
        (tmp_path / name).write_bytes(content)
        return tmp_path / name

    def with_folder(name):
        (tmp_path / name).mkdir(parents=True)
        return tmp_path / name

    def changed(change):
        """A corpus in which something is wrong, by match-train and by check-data alike."""
        root = Path(tempfile.mkdtemp(dir=tmp_path))
        change(plain_corpus(root))
        line = match(data=root)
        assert v.main(["check-data", str(root), "--k", "2"]) == 1
        assert line.split(": error: ")[1] in capsys.readouterr().out
        return line

    def damaged():
        copy = tmp_path / "damaged"
        shutil.copytree(out, copy)
        damage("cut", copy / "last.pt")
        assert v.main([str(a).replace(str(out), str(copy)) for a in resume]) == 0
        return capsys.readouterr().err

    def full():
        limits = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (9999, limits[1]))
        try:
            return match(to=tmp_path / "full")
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)

    def code():
        state = torch.load(trained / "best.pt", weights_only=True)
        torch.save(state | {"step": Evil(tmp_path / "ran")}, tmp_path / "evil.pt")
        line = refuse("match-test", "--match", tmp_path / "evil.pt")
        assert not (tmp_path / "ran").exists()
        return line

    def memory():
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(v, "make_encoders", lambda *args: torch.empty(2**50))
            return match()

    def other_encoders():
        assert v.main(["match-train", "--data", str(corpus), "--out", str(tmp_path / "m"), *TINY,
                       "--seed", "5", "--steps", "1"]) == 0
        shutil.copytree(drawn, tmp_path / "g")
        capsys.readouterr()
        return refuse("gan-train", "--data", corpus, *TINY_GAN, "--out", tmp_path / "g", "--resume",
                      "--match", tmp_path / "m" / "best.pt")

    def bad_file(name, content, generates=True):
        """What check-data and, of a recording, generate say; training goes on without it."""
        root = Path(tempfile.mkdtemp(dir=tmp_path))
        path = plain_corpus(root) / "train" / "train0" / "a b" / name
        path.write_bytes(content)
        assert v.main(["check-data", str(root), "--k", "2"]) == 1
        said = capsys.readouterr().out
        assert f"fault: {path}: " in said and "1 faults" in said
        if generates:
            line = refuse("generate", path, "--gan", drawn / "last.pt", "--out", tmp_path / "x.png")
            assert f"{path}: " in line
            said += line
        assert v.main(["match-train", "--data", str(root), "--out", str(root / "run"), *TINY,
                       "--batch", "4", "--k", "2", "--runs", "1"]) == 0
        capsys.readouterr()
        return said

    def floats(*x):
        return riff(3, 1, 16000, 32, np.array(x, "<f4").tobytes())

    def one_sample():
        path = with_file("one.wav", riff(1, 1, 16000, 16, b"ab"))
        return refuse("generate", path, "--gan", drawn / "last.pt", "--out", tmp_path / "x.png")

    def small_picture():
        write_face(tmp_path / "small.png", side=16)
        return bad_file("t.png", (tmp_path / "small.png").read_bytes(), generates=False)

    def no_codec(path):
        raise ImportError("TorchCodec is required")

    monkeypatch.setattr(v.torchaudio, "load", no_codec)
    first = "a b/speech.wav"
    cases = {
        "`--steps 0`, or less": lambda: match("--steps", "0"),
        "a batch smaller than K": lambda: match("--k", "10", "--batch", "9"),
        "a flag or a value that does not exist": lambda: parse("--lrr", "1") + parse("--k", "x"),
        "a device that is not there": lambda: match("--device", "cuda:7"),
        "an `--out` that cannot be created": lambda: match(to=with_file("file") / "run"),
        "an `--out` that cannot be written":
            lambda: match(to=with_folder("locked/settings.json").parent),
        "an `--out` that holds a finished run": lambda: match(to=trained),
        "an `--out` that holds an unfinished run":
            lambda: refuse(*[a for a in resume if a != "--resume"]),
        "`--resume` with other settings": lambda: refuse(*resume, "--lr", "0.07"),
        "`--resume` with another preset": lambda: refuse(*resume, "--preset", "paper"),
        "`--resume` of a `gan-train` with other encoders": other_encoders,
        "`--resume` with a damaged `last.pt`": damaged,
        "a disk that is full": full,
        "a batch or a network that the memory does not hold": memory,
        "a rate at which training diverges": lambda: match("--lr", "1e18", "--steps", "8"),
        "a checkpoint that is not there": lambda: refuse("match-test", "--match", tmp_path / "no.pt"),
        "a checkpoint of the other stage":
            lambda: refuse("match-test", "--match", drawn / "last.pt"),
        "a truncated checkpoint, or another file": lambda: "\n".join(
            refuse("match-test", "--match", with_file("x.pt", content)) for content in
            (b"", b"hello", (trained / "best.pt").read_bytes()[:5000])),
        "a checkpoint with a pickle that would run code": code,
        "`gan-train --preset paper` with smaller encoders":
            lambda: refuse("gan-train", "--match", trained / "best.pt", "--preset", "paper"),
        "a corpus that is not there": lambda: match(data=tmp_path / "nowhere"),
        "a corpus without `val`": lambda: changed(lambda root: shutil.rmtree(root / "val")),
        "K larger than the identities of a split":
            lambda: match("--k", "5", data=plain_corpus(tmp_path / "few")),
        "an identity without speech":
            lambda: changed(lambda root: (root / "val" / "val1" / first).unlink()),
        "an identity without faces":
            lambda: changed(lambda root: (root / "test" / "test2" / "a b/500.png").unlink()),
        "an identity in two splits":
            lambda: changed(lambda root: shutil.copytree(root / "train/train0", root / "test/train0")),
        "`labels.csv` without identities":
            lambda: changed(lambda root: (root / "labels.csv").write_text("name,gender\n1,f\n")),
        "`labels.csv` in Latin-1": lambda: changed(
            lambda root: (root / "labels.csv").write_bytes("identity\nRené\n".encode("latin-1"))),
        "a recording without a sample": lambda: bad_file("x.wav", riff(1, 1, 16000, 16, b"")),
        "a recording that is no recording": lambda: bad_file("x.wav", b"RIFF, but no more"),
        "a recording with NaN, or far louder than full scale": lambda: "".join(
            bad_file("x.wav", floats(0.1, x, 0.2)) for x in (math.nan, math.inf, 1e9)),
        "a recording of 300 Hz": lambda: bad_file("x.wav", riff(1, 1, 300, 16, b"ab" * 99)),
        "an mp3 where torchcodec is not installed": lambda: bad_file("x.mp3", b"ID3"),
        "a recording of silence": lambda: bad_file("x.wav", riff(1, 1, 16000, 16, bytes(32000))),
        "a recording of 1 sample": one_sample,
        "a picture that is none, or cut short": lambda: "".join(
            bad_file("x.jpg", content, generates=False) for content in
            (b"", b"no picture", next(corpus.rglob("*.jpg")).read_bytes()[:2000])),
        "a picture of 16 x 16 pixels": small_picture}
    rows = readme_rows()
    assert set(rows) == set(cases)
    for given, patterns in rows.items():
        output = cases[given]()
        for pattern in patterns:
            assert re.search(pattern, output), (given, pattern, output)
    assert len(patterns) and not (tmp_path / "out" / "metrics.json").exists()


def test_what_is_odd_but_fine(tmp_path, monkeypatch):
    """Sizes, names of any alphabet, silence, one sample; a corpus is opened by listing alone."""
    root = tmp_path / "Ein Ordner für 声音"
    for split in v.SPLITS:
        for i, name in enumerate(("Zoë O'Hara", "Ольга", "李 小龙", "%d $(x)")):
            clip = root / split / f"{split} {name}" / "клип 1"
            write_wav(clip / "речь, 1.wav", (noise(9000), np.zeros(9000), [0.5], noise(50))[i])
            clip.mkdir(exist_ok=True)
            size = ((33, 47), (1000, 40), (40, 1000), (321, 123))[i]
            Image.new("RGB", size, (40 * i, 9, 9)).save(clip / "лицо 顔.png")
    argv = ["--data", str(root), *TINY]
    opened, listed = [], []
    with monkeypatch.context() as patch:
        patch.setattr(builtins, "open", lambda *a, **k: opened.append(a))
        for name in ("listdir", "scandir"):
            patch.setattr(v.os, name, lambda path, real=getattr(os, name): listed.append(
                str(path)) or real(path))
        v.open_corpus(root, 4)
    assert not opened and len(listed) == len(set(listed)) == 3 * (1 + 4 + 4)  # each folder once
    out = tmp_path / "прогон 1"
    assert v.main(["match-train", *argv, "--out", str(out)]) == 0
    assert v.main(["gan-train", "--data", str(root), *TINY_GAN, "--match", str(out / "best.pt"),
                   "--out", str(tmp_path / "gan")]) == 0
    log = [json.loads(line) for line in open(out / "log.jsonl")]
    assert all(math.isfinite(line["loss"]) and line["faults"] == 0 for line in log)


# ---- Several processes ---------------------------------------------------------------------------

SPY = f"""
import os, signal, sys
sys.path.insert(0, {str(FILE.parent)!r})
import torch, voice2face as v
torch.set_num_threads(1)
out, rank, seen = sys.argv[1], os.environ["RANK"], []
add, batches = v.Run.add, v.Run.batches

def spy_batches(run, *args):
    for i, batch in batches(run, *args):
        seen.append((i, batch.identity))
        yield i, batch

def spy_add(run, *args, **values):
    add(run, *args, **values)
    nets = {{name: part for name, part in run.parts.items() if isinstance(part, torch.nn.Module)}}
    torch.save(dict(seen=seen, weights={{n: dict(x.named_parameters()) for n, x in nets.items()}},
                    grads={{n: [p.grad for p in x.parameters()] for n, x in nets.items()}}),
               f"{{out}}/rank{{rank}}-{{run.step}}.pt")
    if os.environ.get("STOP") == f"{{rank}}/{{run.step}}":
        os.kill(os.getpid(), signal.SIGTERM)

def spy_save(*args, **more):
    if os.environ.get("FAIL"):
        raise v.UserError("no room")
    save(*args, **more)

if rank == "1" and "OTHER" in os.environ:
    sys.argv[sys.argv.index("--out") + 1] = os.environ["OTHER"]
v.save_checkpoint, save = spy_save, v.save_checkpoint
v.Run.add, v.Run.batches = spy_add, spy_batches
code = v.main(sys.argv[2:])
sys.stdout.flush()
os._exit(code)
"""


def torchrun(*argv, **env):
    """(exit code, stdout, stderr) of two processes on the CPU, started as the README has it."""
    with socket.socket() as port:
        port.bind(("127.0.0.1", 0))
        free = port.getsockname()[1]
    done = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2",
         f"--master-port={free}", *map(str, argv)], capture_output=True, text=True, timeout=120,
        env=os.environ | {"OMP_NUM_THREADS": "1"} | env)
    return done.returncode, done.stdout, done.stderr


def spied(tmp_path, *argv):
    """[[what rank r had after step s] for both ranks] of a run in two processes."""
    (tmp_path / "spy.py").write_text(SPY)
    code, out, err = torchrun(tmp_path / "spy.py", tmp_path, *argv)
    assert code == 0, err
    steps = len(list(tmp_path.glob("rank0-*.pt")))
    found = [[torch.load(tmp_path / f"rank{r}-{s + 1}.pt") for s in range(steps)] for r in range(2)]
    assert out.count(f"step {steps}/{steps}") == 1  # one of them speaks
    for one, other in zip(*found):
        assert not set(one["seen"][-1][1].tolist()) & set(other["seen"][-1][1].tolist())
        for a, b in ((one["weights"], other["weights"]), (one["grads"], other["grads"])):
            a, b = leaves(a), leaves(b)
            assert all(torch.equal(a[k], b[k]) for k in a if a[k] is not None) and len(a) > 10
    assert [i for i, _ in found[0][-1]["seen"]] == list(range(0, 2 * steps, 2))
    assert [i for i, _ in found[1][-1]["seen"]] == list(range(1, 2 * steps, 2))
    return found


@pytest.fixture(scope="session")
def pair(corpus, trained, tmp_path_factory):
    """{command: (command line up to --out, run folder, what both ranks had after each step)}."""
    found = {}
    for command, more in (("match-train", ["--max-norm", "1e9"]),
                          ("gan-train", ["--d-lr", "0", "--r1-every", "1"])):
        folder = tmp_path_factory.mktemp(command)
        argv = [*tiny(command, corpus, trained / "best.pt"), *more, "--out"]
        found[command] = argv, folder / "o", spied(folder, *argv, folder / "o")
    return found


def close(got, expected):
    """Whether gradients agree, but for rounding."""
    return all(torch.allclose(a, b, atol=1e-5, rtol=1e-3) for a, b in zip(got, expected,
                                                                          strict=True))


def test_two_processes_train_the_encoders_on_the_mean_of_their_losses(corpus, pair):
    _, out, found = pair["match-train"]
    cfg = v.MatchSettings(**json.loads((out / "settings.json").read_text()))
    torch.manual_seed(cfg.seed)
    encoders = v.make_encoders(cfg, torch.device("cpu"))
    pairs = v.Pairs(v.open_corpus(corpus, 4)["train"], cfg.seconds, cfg.size, cfg.batch, 0, True)
    for encoder, x in zip(encoders, v.to_device(pairs[0], "cpu")):
        v.centre_head(encoder, x)
    loss = 0.0
    for i in range(2):  # each with its own negatives and batch statistics
        candidates = v.draw_candidates(pairs[i].identity, cfg.k, v.step_generator(cfg.seed, i))
        embedded = [encoder(x) for encoder, x in zip(encoders, v.to_device(pairs[i], "cpu"))]
        loss = loss + v.match_loss(*embedded, candidates, cfg.direction)[0] / 2
    loss.backward()
    for name, encoder in zip(("speech", "face"), encoders):
        assert close(found[0][0]["grads"][name], [p.grad for p in encoder.parameters()])
    assert {"best.pt", "last.pt", "log.jsonl", "metrics.json"} <= {
        p.name for p in out.iterdir()}


def test_two_processes_train_generator_and_discriminator_on_the_mean_of_their_losses(
        corpus, trained, pair):
    _, out, found = pair["gan-train"]
    cfg, cpu = v.GanSettings(**json.loads((out / "settings.json").read_text())), "cpu"
    match, encoders = v.load_match(trained / "best.pt", torch.device(cpu))
    torch.manual_seed(cfg.seed)
    gan = v.make_gan(cfg, match, encoders, cpu)
    discriminator = v.Discriminator(gan.face_encoder, cfg.weight)
    pairs = v.Pairs(v.open_corpus(corpus, 2)["train"], match.seconds, match.size, cfg.batch, 0, True)
    sums = {"d": 0, "g": 0}
    for i in range(2):
        rng, (speech, faces) = v.step_generator(cfg.seed, i), v.to_device(pairs[i], cpu)
        c = gan.speech_encoder(speech)
        wrong = c[v.draw_candidates(pairs[i].identity, 2, rng)[:, 1]]
        fakes = gan.generator(torch.randn(len(c), v.EMBED, generator=rng), c)
        still = [torch.optim.SGD(x.parameters(), 0.0) for x in (discriminator, gan.generator)]
        v.d_step(discriminator, still[0], faces, fakes, c, wrong, cfg, penalise=True)
        v.g_step(discriminator, still[1], faces, fakes, c, wrong, cfg)
        for name, net in (("d", discriminator), ("g", gan.generator)):
            flat = torch.cat([p.grad.flatten() for p in net.parameters()])
            sums[name] = sums[name] + flat / 2
    for name, expected in sums.items():
        assert close([torch.cat([g.flatten() for g in found[0][0]["grads"][name]])], [expected])


@pytest.mark.parametrize("command", ["match-train", "gan-train"])
def test_two_processes_stop_together_and_go_on(command, pair, tmp_path, capsys):
    (tmp_path / "spy.py").write_text(SPY)
    argv, whole, _ = pair[command]
    run = [tmp_path / "spy.py", tmp_path, *argv, tmp_path / "part", "--resume"]
    code, out, err = torchrun(*run, STOP="1/7")  # the signal reaches one of the two only
    assert code and saved_step(tmp_path / "part") == 7 and "voice2face: stopped" in err, err
    assert "2 processes, not 1" in refused(capsys, *argv, tmp_path / "part", "--resume")
    if command == "match-train":
        code, out, err = torchrun(*run, OTHER=str(tmp_path / "other"))  # a folder of its own
        assert code and "not every process finds step 7 there" in err
    code, out, err = torchrun(*run)
    assert code == 0, err
    assert_equal_runs(whole, tmp_path / "part")


def test_when_one_process_fails_all_end_with_their_lines(corpus, tmp_path):
    (tmp_path / "spy.py").write_text(SPY)
    code, out, err = torchrun(tmp_path / "spy.py", tmp_path, *tiny("match-train", corpus, None),
                              "--out", tmp_path / "run", FAIL="1")  # the first alone saves
    assert code and err.count("error: no room") == 1 and "[rank" not in err, err


# ---- A GPU's way of working, tried on the CPU ----------------------------------------------------


def test_bfloat16_changes_little_and_spares_r1(corpus, trained, tmp_path, monkeypatch):
    kinds, penalty, halved = set(), v.r1_penalty, []
    hook = torch.nn.modules.module.register_module_forward_hook(
        lambda module, x, y: kinds.add(y.dtype) if isinstance(module, torch.nn.Conv2d) else None)
    monkeypatch.setattr(v, "r1_penalty", lambda *args: halved.append(
        torch.is_autocast_enabled("cpu")) or penalty(*args))
    for command in ("match-train", "gan-train"):
        argv, compared = [*tiny(command, corpus, trained / "best.pt"), "--log-every", "1"], 0
        assert v.main([*argv, "--out", str(tmp_path / command)]) == 0
        kinds.clear()
        with monkeypatch.context() as patch:
            patch.setattr(v, "autocast", lambda device: torch.autocast("cpu", torch.bfloat16))
            assert v.main([*argv, "--out", str(tmp_path / f"{command}16")]) == 0
        assert torch.bfloat16 in kinds
        full, half = (left_by(tmp_path / f"{command}{n}") for n in ("", "16"))
        for a, b in zip(full["log"][:4], half["log"][:4], strict=True):
            for key in a.keys() & {"loss", "loss_d", "loss_g", "match_real", "r1"}:
                assert a[key] == pytest.approx(b[key], rel=0.05, abs=0.05)
                compared += a[key] != b[key]
        assert compared
        assert {x.dtype for key, x in half.items()
                if key.endswith(".weight")} == {torch.float32}
    hook.remove()
    kinds.clear()
    hook = torch.nn.modules.module.register_module_forward_hook(
        lambda module, x, y: kinds.add(y.dtype) if isinstance(module, (v.UpBlock, v.AdaIN)) else None)
    with torch.autocast("cpu", torch.bfloat16):
        v.Generator(32, 4)(torch.randn(2, v.EMBED), torch.randn(2, v.EMBED))
    hook.remove()
    assert kinds == {torch.bfloat16}
    assert halved and not any(halved)


class OnDevice(torch.Tensor):
    """Stands for a tensor on a GPU, as all that is computed from it; notes what the host reads."""

    reads = []

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        if func.__name__ in ("item", "tolist", "cpu", "numpy", "nonzero", "equal", "__bool__",
                             "__int__", "__float__", "__index__", "__array__", "__contains__",
                             "masked_select", "is_nonzero", "unique", "__format__", "__repr__"):
            cls.reads.append(func.__name__)
        return super().__torch_function__(func, types, args, kwargs or {})


@pytest.mark.parametrize("command", ["match-train", "gan-train"])
def test_no_step_reads_a_number_from_the_device(command, corpus, trained, tmp_path, monkeypatch):
    counts, add, centre = [], v.Run.add, v.centre_head
    monkeypatch.setattr(v, "send", lambda x, device: x.as_subclass(OnDevice))
    monkeypatch.setattr(v, "centre_head", lambda net, x: centre(net, x.as_subclass(torch.Tensor)))
    monkeypatch.setattr(v.Run, "add", lambda run, *args, **values: (
        add(run, *args, **values), counts.append(len(OnDevice.reads)),
        [OnDevice.reads.append("not on the device") for x in values.values()
         if not isinstance(x, OnDevice)]))
    monkeypatch.setattr(v, "report_matching", lambda *args: None)  # a test may read
    OnDevice.reads.clear()
    late = [word for name in ("log", "eval", "save") for word in (f"--{name}-every", "99")]
    assert v.main([*tiny(command, corpus, trained / "best.pt"), *late, "--steps", "5", "--out",
                   str(tmp_path)]) == 0
    assert counts == [0] * 5 and OnDevice.reads  # the line after the last step reads


# ---- throughput ----------------------------------------------------------------------------------


def bench():
    """Print loader pairs per second and core at paper scale, and a step's cost at K = 2 and 10."""
    torch.set_num_threads(1)
    root = Path(tempfile.mkdtemp())
    for i in range(200):
        write_wav(root / f"p{i}" / "c" / "s.wav", noise(16000 * 10, i))
        pixels = v.synth_faces(v.draw_factors(np.random.default_rng(i)), [0.5])[0]
        pixels.save(root / f"p{i}" / "c" / "5000.jpg", quality=92)
    pairs = v.Pairs({p.name: v.list_clips(p) for p in sorted(root.iterdir())},
                    6.0, 128, 40, 0, shuffle=True)
    rates = []
    for i in range(30):
        start = time.perf_counter()
        pairs[i]
        rates.append(40 / (time.perf_counter() - start))
    shutil.rmtree(root)
    print("loader, 6 s of 16 kHz PCM with a 128x128 JPEG, one core: "
          f"median {np.median(rates[10:]):.0f} pairs/s")
    torch.set_num_threads(2)
    cfg = v.MatchSettings()
    speech_encoder, face_encoder = v.make_encoders(cfg, torch.device("cpu"))
    speech, faces, identity = (torch.randn(cfg.batch, int(16000 * cfg.seconds)),
                               torch.randn(cfg.batch, 3, cfg.size, cfg.size),
                               torch.arange(cfg.batch))
    times = {2: [], 10: []}
    for i in range(40):
        for k in times:
            start = time.perf_counter()
            candidates = v.draw_candidates(identity, k, torch.Generator())
            v.match_loss(speech_encoder(speech), face_encoder(faces), candidates,
                         "v-f")[0].backward()
            times[k].append(time.perf_counter() - start)
    two, ten = (np.median(times[k][5:]) for k in (2, 10))
    print("a step of preset small, forward and backward: "
          f"K = 2 {1000 * two:.0f} ms, K = 10 {1000 * ten:.0f} ms, ratio {ten / two:.3f}")
    bench_parts(speech_encoder, speech, face_encoder, faces)
    with tempfile.TemporaryDirectory() as crowd:
        for i in range(100_000):
            clip = Path(crowd, "train", f"p{i // 10}", f"c{i}")
            clip.mkdir(parents=True)
            (clip / "speech.wav").touch(), (clip / "0.jpg").touch()
        start = time.perf_counter()
        v.open_corpus(crowd, 10, ("train",))
        print(f"opening 100,000 clips: {time.perf_counter() - start:.1f} s")
    bench_analyses()


def median_ms(*functions, times=30):
    """Median time of each function and its backward pass, in ms; taken in turns."""
    found = [[] for _ in functions]
    for _ in range(times + 5):
        for function, took in zip(functions, found):
            start = time.perf_counter()
            function().sum().backward()
            took.append(1000 * (time.perf_counter() - start))
    return [float(np.median(took[5:])) for took in found]


def bench_parts(speech_encoder, speech, face_encoder, faces):
    """Print where a step's time goes, and what 8 outputs at once bring to the sinc layer."""
    heard, seen = median_ms(lambda: speech_encoder(speech), lambda: face_encoder(faces))
    with torch.no_grad():
        start = time.perf_counter()
        for _ in range(20):
            speech_encoder(speech), face_encoder(faces)
        forward = (time.perf_counter() - start) * 50
    print(f"of it S {heard:.0f} ms, F {seen:.0f} ms; both forward alone {forward:.0f} ms")
    for filters, stride, clips in ((16, 8, 32), (16, 1, 32), (64, 1, 8)):
        layer, x = v.SincConv(filters, 251, stride), speech[:clips]
        plain, fast = median_ms(
            lambda: torch.nn.functional.conv1d(v.pad_same(x[:, None], 251),
                                               layer.filters()[:, None], stride=stride),
            lambda: layer(x), times=10)
        print(f"sinc layer, {filters} filters of stride {stride}, {clips} clips: {plain:.0f} ms, "
              f"8 outputs at once {fast:.0f} ms, {plain / fast:.2f} times as fast")


def bench_analyses(clips=140_000):
    """Print what section 4's tests cost for as many clips as AVSpeech's test set has."""
    c, identity, start = v.to_length(torch.randn(clips, 128), 3.5), torch.arange(clips), time.time()
    v.matching_run(c, c.flip(1), identity, ["f", "m"] * (clips // 2), 0)
    matched, start = time.time() - start, time.time()
    for distance in v.DISTANCES:
        v.retrieve(c, identity, c[:5000], identity[:5000], distance)
    print(f"{clips} clips: matching {matched:.0f} s, retrieval among 5,000 by three distances "
          f"{time.time() - start:.0f} s, {v.peak_memory(torch.device('cpu')):.2f} GB")


if __name__ == "__main__":
    if sys.argv[1:2] == ["kill"]:
        with tempfile.TemporaryDirectory() as scratch:
            kill(int(sys.argv[2]), Path(scratch))
    else:
        sys.exit(bench() if sys.argv[1:2] == ["bench"]
                 else pytest.main([__file__, "-q", *sys.argv[1:]]))
