# /// script
# requires-python = ">=3.10"
# dependencies = ["torch==2.11.0", "torchaudio==2.11.0", "numpy", "pillow>=10.1", "pytest"]
# ///
"""Tests of voice2face.py: parts against independent computations, every command on tiny settings.

    uv run test_voice2face.py          the tests (any pytest option may follow)
    uv run test_voice2face.py kill 20  kill training 20 times at random, resume, compare the ends
    uv run test_voice2face.py bench    speed of the loader, of a training step, of a large corpus
"""

import contextlib
import copy
import csv
import functools
import io
import json
import math
import multiprocessing
import os
import random
import re
import shutil
import socket
import subprocess
import sys
import tempfile
import time
import types
import wave
from dataclasses import asdict, fields
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import voice2face as v

FILE = Path(v.__file__)
CPU = v.Machine("cpu")
FAST = ["--steps", "4", "--batch", "6", "--eval-every", "2", "--log-every", "1", "--runs", "2",
        "--workers", "0", "--device", "cpu"]
TINY = {"match-train": [*FAST, "--k", "4", "--seconds", "0.25", "--size", "32",
                        "--speech-width", "4", "--face-width", "4"],
        "gan-train": [*FAST, "--width", "2"]}
KINDS = {"match-train": v.MatchSettings, "gan-train": v.GanSettings}
CFG = v.MatchSettings(seconds=0.25, size=32, speech_width=4, face_width=4, batch=32)


def write_wav(path, samples, rate=16000, bits=16):
    """PCM from floats (T,) or (T, channels) in [-1, 1]."""
    samples, path = np.asarray(samples, float), Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    with wave.open(str(path), "wb") as f:
        f.setnchannels(1 if samples.ndim == 1 else samples.shape[1])
        f.setsampwidth(bits // 8), f.setframerate(rate)
        f.writeframes((samples * 32767).astype("<i2" if bits == 16 else "<i4").tobytes())


def write_face(path, color=(200, 150, 120), size=(40, 40)):
    """A plain picture."""
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, color).save(path)


def noise(samples, seed=0):
    """White noise within -0.5 ... 0.5."""
    return np.random.default_rng(seed).uniform(-0.5, 0.5, samples)


def plain_corpus(root, people=6, splits=("train", "val", "test")):
    """Noise and plain pictures: a clip each, a picture at 500 ms of 1 s, names of any alphabet."""
    for split in splits:
        for i in range(people):
            clip = root / split / f"{split}{i}" / "клип 1"
            write_wav(clip / "речь.wav", noise(16000, i))
            write_face(clip / "500.png", (20 * i, 100, 100))
    return root


def split_of(root, people):
    """The v.Split of a folder of identities."""
    return v.Split(Path(root), np.array(people))


@pytest.fixture(scope="session")
def corpus(tmp_path_factory):
    """A small synthetic corpus: 84 identities, 62 / 10 / 12."""
    root = tmp_path_factory.mktemp("data") / "corpus"
    assert v.main(["make-data", str(root), "--identities", "84", "--seed", "3"]) == 0
    return root


def observe(command, out, *argv):
    """Run a tiny training; what can be seen of it, each setting of which must change a part."""
    saves, loaders, printed = [], set(), io.StringIO()
    save, loader = v.save_checkpoint, torch.utils.data.DataLoader

    def noted_save(path, *args, **more):
        saves.append((Path(path).name, more["step"]))
        save(path, *args, **more)

    def noted_loader(*args, **more):
        loaders.add(more["num_workers"])
        return loader(*args, **more)

    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(printed):
        patch.setattr(v, "R1_EVERY", 2)
        patch.setattr(v, "save_checkpoint", noted_save)
        patch.setattr(torch.utils.data, "DataLoader", noted_loader)
        argv = [command, *TINY[command], "--out", out, *argv]
        assert v.main([str(a) for a in argv]) == 0
    state = torch.load(out / "last.pt", weights_only=True)
    parts = ("speech", "face") if command == "match-train" else ("g", "d", "g_ema")
    weights = [t.numpy().tobytes() for part in parts for t in state[part].values()]
    log = [json.loads(line) for line in open(out / "log.jsonl")]
    tests = [line for line in printed.getvalue().splitlines() if line.startswith("validation")]
    return dict(weights=b"".join(weights), metrics=(out / "metrics.json").read_text(), tests=tests,
                saves=saves, loaders=loaders, log=[line["step"] for line in log])


@pytest.fixture(scope="session")
def runs(corpus, tmp_path_factory):
    """{command: (run folder, what was observed)} of both trainings; "other" has another seed."""
    root, found = tmp_path_factory.mktemp("runs"), {}
    for name, command, argv in (
            ("match-train", "match-train", ()), ("other", "match-train", ("--seed", 9)),
            ("gan-train", "gan-train", ("--match", root / "match-train/best.pt"))):
        found[name] = root / name, observe(command, root / name, "--data", corpus, *argv)
    return found


@pytest.fixture(scope="session")
def trained(runs):
    """The run folder of match-train."""
    return runs["match-train"][0]


@pytest.fixture(scope="session")
def drawn(runs):
    """The run folder of gan-train."""
    return runs["gan-train"][0]


def refused(capsys, *argv):
    """Run a command that must end with exit code 2 and one line on stderr; returns the line."""
    capsys.readouterr()
    assert v.main([str(a) for a in argv]) == 2
    lines = capsys.readouterr().err.splitlines()
    lines = [line for line in lines if not line.startswith("warning: left out: ")]
    assert len(lines) == 1 and lines[0].startswith("voice2face: error: "), lines
    return lines[0]


# ---- 1. Inference --------------------------------------------------------------------------------


def test_sinc_filters_are_numpys_band_passes():
    layer = v.SincConv(8, 101)
    edges = np.linspace(2595 * np.log10(1 + 30 / 700), 2595 * np.log10(1 + 7900 / 700), 9)
    hz, n, got = 700 * (10 ** (edges / 2595) - 1), np.arange(101) - 50, layer.filters()
    for i in range(8):
        low = 50 + hz[i]
        high = min(low + 50 + hz[i + 1] - hz[i], 8000)
        ideal = [2 * f / 16000 * np.sinc(2 * f / 16000 * n) for f in (high, low)]
        expected = (ideal[0] - ideal[1]) * np.hamming(101) / (2 * (high - low) / 16000)
        np.testing.assert_allclose(got[i].detach().numpy(), expected, atol=2e-4)
    assert (got[:, 50] == 1).all()


def test_sinc_passes_its_band_and_stops_the_rest():
    layer, seconds = v.SincConv(8, 251), torch.arange(8000) / 16000
    with torch.no_grad():
        layer.low_hz[:] = 1950
        layer.band_hz[:] = 950  # 2000 ... 3000 Hz

    def gain(hz):
        wave_ = torch.sin(2 * math.pi * hz * seconds)[None]
        return layer(wave_)[0, 0, 2000:6000].abs().max().item()

    inside = gain(2500)
    assert all(abs(gain(hz) / inside - 1) < 0.05 for hz in (2200, 2800))
    assert all(gain(hz) < 0.01 * inside for hz in (500, 1700, 3300, 6000))


def test_sinc_edges():
    with pytest.raises(ValueError, match="odd, got 250"):
        v.SincConv(4, 250)
    layer = v.SincConv(4, 31, stride=3).to(torch.float64)
    out = layer(torch.randn(2, 100).double())
    assert out.dtype == layer.t.dtype == layer.window.dtype == torch.float64
    assert out.shape == (2, 4, 34)
    assert {name for name, _ in layer.named_parameters()} == {"low_hz", "band_hz"}
    with torch.no_grad():
        layer.low_hz[:], layer.band_hz[:] = 1e5, -1e5  # far outside of 0 ... 8000 Hz
    layer(torch.randn(2, 100).double()).square().sum().backward()
    assert layer.filters().isfinite().all() and layer.low_hz.grad.isfinite().all()


def parameters(module):
    """How many numbers a module learns."""
    return sum(p.numel() for p in module.parameters())


def test_published_speech_encoder():
    encoder, lengths = v.SpeechEncoder().eval(), []
    assert math.prod(v.PASE_STRIDES) == 160
    encoder.acts[-1].register_forward_hook(lambda act, x, y: lengths.append(y.shape))
    with torch.no_grad():
        assert encoder(torch.randn(1, 96000)).shape == (1, 128)
    assert lengths[0][1] == 512 and math.prod(lengths[0][2:]) == 600  # 6 s are 600 frames
    widths, sizes = [64, 64, 128, 128, 256, 256, 512, 512], [251, 20, 11, 11, 11, 11, 11, 11]
    convs = 2 * 64 + sum(widths[i - 1] * widths[i] * sizes[i] for i in range(1, 8))
    assert parameters(encoder) == convs + 3 * sum(widths) + 512 * 128 + 128


def test_published_face_encoder():
    encoder = v.FaceEncoder()
    blocks = [(3, 64, 64), (64, 64, 128), (128, 128, 256), (256, 256, 512), (512, 512, 1024),
              (1024, 1024, 1024)]
    count = sum(9 * a * h + h + 9 * h * b + b + a * b + b for a, h, b in blocks) + 1024 * 128 + 128
    assert parameters(encoder) == count
    with torch.no_grad():
        assert encoder.blocks(torch.randn(1, 3, 128, 128)).shape == (1, 1024, 4, 4)


def test_published_generator_and_discriminator():
    gan, match = (KINDS[name](**v.PAPER[name], preset="paper") for name in ("gan-train",
                                                                          "match-train"))
    assert (match.size, match.seconds, match.sinc_stride) == (128, 6, 1)
    widths = [1024, 1024, 512, 256, 128, 64]
    count = 256 * widths[0] * 16 + widths[0] * 16  # z and c to 4x4
    for a, b in zip(widths, widths[1:]):
        count += (9 * a * b + b) + (9 * b * b + b) + (a * b + b)  # two 3x3 and a 1x1 convolution
        count += 257 * 2 * a + 257 * 2 * b  # two AdaIN
    count += 257 * 2 * 64 + 9 * 64 * 3 + 3
    with torch.device("meta"):
        generator, face_encoder = v.Generator(match.size, gan.width), v.FaceEncoder()
        discriminator = v.Discriminator(face_encoder)
    assert parameters(generator) == count
    assert parameters(discriminator) == parameters(face_encoder) + 1024


@pytest.mark.parametrize("network", [v.FaceEncoder, v.Generator])
@pytest.mark.parametrize("size", [4, 48, 65, 100])
def test_networks_refuse_sizes_that_are_no_power_of_two(network, size):
    with pytest.raises(ValueError, match=f"power of two from 8 on, got {size}"):
        network(size, 2)


def test_dblock_pools_before_its_shortcut_without_changing_it():
    block, x = v.DBlock(4, 6), torch.randn(2, 4, 8, 8)
    h = block.conv2(torch.relu(block.conv1(torch.relu(x))))
    published = torch.nn.functional.avg_pool2d(h + block.skip(x), 2)
    torch.testing.assert_close(block(x), published)


def test_embeddings_have_one_length_and_a_centred_start():
    torch.manual_seed(0)
    for encoder, x in ((v.SpeechEncoder(4, 8, 3.0), 0.1 * torch.randn(64, 4000)),
                       (v.FaceEncoder(32, 4, 3.0), torch.rand(64, 3, 32, 32) * 2 - 1)):
        before = encoder(x)
        v.centre_head(encoder, x)
        after = encoder(x)
        torch.testing.assert_close(after.norm(dim=1), torch.full((64,), 3.0))
        assert after.mean(0).norm() < 0.5 < 2 < before.mean(0).norm()  # no longer one direction
        head = encoder.head(encoder.features(x))
        assert head.mean(0).abs().max() < 1e-3 and (head.std(0) - 1).abs().max() < 1e-3


def test_speech_is_heard_whatever_its_loudness():
    encoder, x = v.SpeechEncoder(4, 8).eval(), torch.randn(2, 4000)
    torch.testing.assert_close(encoder(x), encoder(0.02 * x), rtol=0.01, atol=1e-3)


@pytest.mark.parametrize("rows, k", [(10, 5), (4, 4), (12, 2)])
def test_candidates_over_thousands_of_draws(rows, k):
    generator, counts = torch.Generator().manual_seed(0), np.zeros((rows, rows))
    for _ in range(3000):
        candidates = v.sample_candidates(rows, k, generator).numpy()
        assert candidates.shape == (rows, k)
        assert (candidates[:, 0] == np.arange(rows)).all()
        assert all(len(set(row)) == k for row in candidates)  # so none meets itself again
        np.add.at(counts, (np.arange(rows)[:, None], candidates[:, 1:]), 1)
    others, share = ~np.eye(rows, dtype=bool), (k - 1) / (rows - 1)
    tolerance = 5 * np.sqrt(3000 * share * (1 - share)) + 1e-9  # 5 sigma of a fair draw
    assert (abs(counts - 3000 * share)[others] <= tolerance).all()


def test_candidates_need_k_rows():
    with pytest.raises(v.UserError, match="K = 10 needs 10 identities at once, only 9"):
        v.sample_candidates(9, 10, torch.Generator())


@pytest.mark.parametrize("direction", ["v-f", "f-v"])
def test_equation_1_against_a_hand_computation(direction):
    speech, faces = np.random.default_rng(0).normal(size=(2, 5, 8))
    candidates, total = np.array([[i, (i + 1) % 5, (i + 3) % 5] for i in range(5)]), 0.0
    query, keys = (speech, faces) if direction == "v-f" else (faces, speech)
    for i in range(5):
        products = [float(np.dot(query[i], keys[j])) for j in candidates[i]]
        total -= products[0] - math.log(sum(math.exp(p) for p in products))
    logits = v.match_logits(*map(torch.tensor, (speech, faces, candidates)), direction)
    loss = torch.nn.functional.cross_entropy(logits, torch.zeros(5, dtype=torch.long))
    assert loss.item() == pytest.approx(total / 5)


def test_equal_candidates_share_the_point():
    logits = torch.tensor([[1.0, 1, 1, 1], [2, 1, 2, 0], [0, 1, 1, 0], [5, 1, 2, 3]])
    assert v.top1(logits).tolist() == [0.25, 0.5, 0, 1]


# ---- 2. Generation -------------------------------------------------------------------------------


def test_adain_gives_the_styles_mean_and_deviation():
    torch.manual_seed(0)
    layer, x = v.AdaIN(5), 3 + 7 * torch.randn(4, 5, 6, 8)
    style = torch.randn(4, 2 * v.EMBED)
    got = layer(x, style).detach().numpy()
    weight, bias = layer.style.weight.detach().numpy(), layer.style.bias.detach().numpy()
    predicted, x = style.numpy() @ weight.T + bias, x.numpy()
    scale, shift = 1 + predicted[:, :5], predicted[:, 5:]
    by_hand = (x - x.mean((2, 3), keepdims=True)) / x.std((2, 3), keepdims=True)
    expected = scale[..., None, None] * by_hand + shift[..., None, None]
    np.testing.assert_allclose(got, expected, atol=1e-3)
    flat = layer(torch.full((1, 5, 4, 4), 1e3), style[:1])  # no deviation to divide by
    assert flat.isfinite().all()
    far = layer(torch.from_numpy(x) + 7000, style).detach().numpy()  # mean 1000 deviations away
    np.testing.assert_allclose(far.std((2, 3)), np.abs(scale), rtol=0.01)


@pytest.mark.parametrize("size", [8, 32, 128])
def test_generator_shape_range_and_both_inputs(size):
    torch.manual_seed(0)
    generator, z, c = v.Generator(size, 2), torch.randn(3, 128), 3.5 * torch.randn(3, 128)
    faces = generator(z, c)
    assert faces.shape == (3, 3, size, size) and faces.abs().max() <= 1
    assert faces.std() > 0.05 and (faces.abs() > 0.95).float().mean() < 0.2  # neither grey nor full
    for other in (generator(z + 1, c), generator(z, c.flip(0))):
        assert (other - faces).abs().max() > 0.01
    torch.testing.assert_close(generator(z, 9 * c), faces)  # c has one length
    torch.testing.assert_close(generator(z[:1], c[:1]), faces[:1])  # no batch statistics


def test_logit_is_equation_2_written_out():
    torch.manual_seed(0)
    face_encoder = v.FaceEncoder(16, 2, 3.5)
    discriminator = v.Discriminator(face_encoder, weight=0.2)
    faces, c = torch.randn(4, 3, 16, 16), torch.randn(4, 128)
    h, phi = (f(faces).detach().numpy() for f in (face_encoder.features, face_encoder))
    psi = h @ discriminator.psi.weight.detach().numpy()[0]
    expected = [0.2 * sum(c[i].numpy() * phi[i]) + psi[i] for i in range(4)]
    got = v.logit(c, *discriminator(faces)).detach().numpy()
    np.testing.assert_allclose(got, expected, rtol=1e-4)
    for mine, theirs in zip(discriminator.phi.parameters(), face_encoder.parameters()):
        assert torch.equal(mine, theirs) and mine is not theirs  # a copy
    assert all(p.requires_grad for p in discriminator.parameters())


def test_losses_and_gradients_against_closed_forms():
    rng = np.random.default_rng(0)
    numbers = [torch.tensor(3 * rng.normal(size=7), requires_grad=True) for _ in range(4)]
    real, fake, match, mismatch = (n.detach().numpy() for n in numbers)
    for loss, x, used in ((v.rel_loss, real - fake, numbers[:2]),
                          (v.relid_loss, real - fake + match - mismatch, numbers)):
        value, sigmoid = loss(*used), 1 / (1 + np.exp(-x))
        assert value.item() == pytest.approx(-np.log(sigmoid).mean(), rel=1e-9)
        for gradient, sign in zip(torch.autograd.grad(value, used), (-1, 1, -1, 1)):
            np.testing.assert_allclose(gradient.numpy(), sign * (1 - sigmoid) / 7, rtol=1e-9)
    for logit in (-1e4, 1e4):  # log(sigmoid(x)) would be minus infinity
        x = torch.tensor([logit], requires_grad=True)
        for value in (v.rel_loss(x, 0 * x), v.relid_loss(x, 0 * x, 0 * x, 0 * x)):
            assert value.item() == max(0, -logit)
            assert torch.autograd.grad(value, x)[0].isfinite().all()


def test_r1_of_functions_with_known_gradients():
    faces, c = torch.randn(5, 3, 4, 4), torch.zeros(5, 1)
    a = torch.tensor(2.0, requires_grad=True)
    penalty = v.r1_penalty(lambda f: (c, a * f.sum((1, 2, 3))), faces, c)
    assert penalty.item() == pytest.approx(4 * 48)  # |a (1, ..., 1)|^2
    assert torch.autograd.grad(penalty, a)[0].item() == pytest.approx(2 * 2 * 48)
    c = torch.arange(5.0)[:, None]
    linear = torch.zeros(5)
    penalty = v.r1_penalty(lambda f: (f.square().sum((1, 2, 3))[:, None], linear), faces, c)
    expected = [(2 * i * faces[i]).square().sum().item() for i in range(5)]  # of c |f|^2
    assert penalty.item() == pytest.approx(np.mean(expected), rel=1e-5)
    assert not faces.requires_grad


def test_average_follows_the_generator():
    average, new = (torch.nn.Linear(1, 1, bias=False) for _ in range(2))
    average.weight.data.fill_(1.0), new.weight.data.fill_(2.0)
    v.update_ema(average, new, 0.9)
    assert average.weight.item() == pytest.approx(0.9 * 1 + 0.1 * 2) and new.weight.item() == 2


# ---- 3. Training ---------------------------------------------------------------------------------


def test_a_match_step_goes_down_equation_1(corpus, tmp_path, monkeypatch):
    seen, match_logits, descend = [], v.match_logits, v.descend
    monkeypatch.setattr(v, "match_logits", lambda *args: seen.append(args) or match_logits(*args))
    losses = []
    monkeypatch.setattr(v, "descend", lambda optimizer, loss, *rest: (
        losses.append(loss.item()), descend(optimizer, loss, *rest)))
    observe("match-train", tmp_path, "--data", corpus, "--eval-every", "9", "--steps", "2")
    for (se, fe, candidates, direction), loss in zip(seen, losses):
        similarity, expected = (se @ fe.T).double().detach().numpy(), []
        for i, row in enumerate(candidates.numpy()):
            assert row[0] == i and len(set(row)) == 4 and direction == "v-f"
            expected.append(np.log(np.exp(similarity[i, row]).sum()) - similarity[i, i])
        assert loss == pytest.approx(np.mean(expected), rel=1e-4)


def test_training_lowers_the_loss(corpus, tmp_path):
    argv = ["match-train", "--data", corpus, "--out", tmp_path, *TINY["match-train"], "--batch",
            "32", "--steps", "150", "--seconds", "0.5", "--eval-every", "999", "--log-every", "30"]
    assert v.main([str(a) for a in argv]) == 0
    losses = [json.loads(line)["loss"] for line in open(tmp_path / "log.jsonl")]
    assert len(losses) == 5 and losses[-1] < math.log(4) - 0.15 < losses[0]  # from log K down


def test_the_best_validation_is_what_is_tested(corpus, tmp_path, monkeypatch):
    scores, tested = iter([30.0, 10.0, 20.0]), []
    monkeypatch.setattr(v, "evaluate", lambda *args: {"v-f/10": next(scores)})
    monkeypatch.setattr(v, "report", lambda model, *rest: (
        tested.append(model), (tmp_path / "metrics.json").write_text("")))
    observe("match-train", tmp_path, "--data", corpus, "--steps", "6")
    best, last = (torch.load(tmp_path / name, weights_only=True) for name in ("best.pt", "last.pt"))
    assert (best["step"], last["step"], last["best"]) == (2, 6, 30.0)
    assert torch.equal(tested[0].face_encoder.head.weight, best["face"]["head.weight"])


@pytest.mark.parametrize("shares, peak", [(v.warm_cosine, 10), (v.late_fall, 1)])
def test_learning_rates_rise_and_fall(shares, peak):
    rates = [shares(step, 100) for step in range(1, 101)]
    assert max(rates) == rates[peak - 1] == 1 and min(rates) >= 0 and rates[-1] < 0.05
    assert rates[50:] == sorted(rates[50:], reverse=True)


@pytest.mark.parametrize("loss", ["relid", "rel"])
def test_a_gan_step(loss, corpus, trained, tmp_path, monkeypatch):
    """D's step trains D on Eq. 5 or 4, G's step G, with real and fake swapped; S and F stay."""
    nets, inputs, trains, compared = {}, {}, [], []
    monkeypatch.setattr(v, "make_generator", lambda *args, make=v.make_generator: (
        nets.setdefault("g", make(*args))))
    monkeypatch.setattr(v, "Discriminator", lambda *args, make=v.Discriminator: (
        nets.setdefault("d", make(*args))))
    monkeypatch.setattr(v, "load_model", lambda *args, load=v.load_model: (
        (lambda model: nets.update(s=model[1], f=model[2]) or model)(load(*args))))
    monkeypatch.setattr(v, "validate_generator", lambda *args: None)
    sample = v.sample_candidates

    def spied_descend(optimizer, value, share, *rest, descend=v.descend):
        before = {name: copy.deepcopy(net.state_dict()) for name, net in nets.items()}
        descend(optimizer, value, share, *rest)
        trains.append({name for name, net in nets.items() for key, t in net.state_dict().items()
                       if not torch.equal(t, before[name][key])})

    def spied_candidates(rows, k, generator):
        candidates = sample(rows, k, generator)
        inputs["others"] = candidates[:, 1].tolist()
        assert all(i != j for i, j in enumerate(inputs["others"]))  # a row is an identity
        if "hooked" not in inputs:
            nets["g"].register_forward_hook(lambda net, args, fake: inputs.update(
                c=args[1], fake=fake.detach()))
            nets["d"].register_forward_pre_hook(lambda net, args: inputs.setdefault(
                "real", args[0][:rows].detach()))
            inputs["hooked"] = True
        inputs.pop("real", None)
        return candidates

    def spied_loss(*terms, real_loss=getattr(v, f"{loss}_loss")):
        (real, fake), c = (nets["d"](inputs[name]) for name in ("real", "fake")), inputs["c"]
        g_real, g_fake = ((c * phi).sum(1) + psi for phi, psi in (real, fake))
        for_d = len(compared) % 2 == 0
        phi = (real if for_d else fake)[0]
        mismatch = (c[inputs["others"]] * phi).sum(1)
        expected = [*((g_real, g_fake) if for_d else (g_fake, g_real)), (c * phi).sum(1), mismatch]
        for got, by_hand in zip(terms, expected[:4 if loss == "relid" else 2], strict=True):
            torch.testing.assert_close(got, by_hand, rtol=1e-3, atol=1e-4)
        compared.append(for_d)
        return real_loss(*terms)

    monkeypatch.setattr(v, "descend", spied_descend)
    monkeypatch.setattr(v, "sample_candidates", spied_candidates)
    monkeypatch.setattr(v, f"{loss}_loss", spied_loss)
    monkeypatch.setattr(v, "report", lambda *args: (tmp_path / "metrics.json").write_text(""))
    observe("gan-train", tmp_path, "--data", corpus, "--match", trained / "best.pt",
            "--loss", loss, "--steps", "3")
    assert trains == 3 * [{"d"}, {"g"}] and compared == 3 * [True, False]


def test_gan_train_keeps_encoders_and_an_average(drawn, trained):
    after, before = (torch.load(path, weights_only=True)
                     for path in (drawn / "last.pt", trained / "best.pt"))
    for part in ("speech", "face"):
        assert all(torch.equal(after[part][key], t) for key, t in before[part].items())
    assert not torch.equal(after["g"]["last.weight"], after["g_ema"]["last.weight"])
    phi = after["d"]["phi.head.weight"]
    assert not torch.equal(phi, after["face"]["head.weight"])  # phi goes on training


CHANGES = dict(  # a setting: another value, and what it must change of what observe() sees
    seed=(1, "weights"), workers=(1, "loaders"), runs=(3, "metrics"), val_clips=(4, "tests"),
    save_every=(3, "saves"), log_every=(2, "log"), direction=("f-v", "weights"), k=(3, "weights"),
    steps=(5, "weights"), batch=(8, "weights"), seconds=(0.3, "weights"), size=(64, "weights"),
    sinc_stride=(7, "weights"), speech_width=(6, "weights"), face_width=(6, "weights"),
    embed_scale=(5.0, "weights"), lr=(0.01, "weights"), eval_every=(4, "tests"),
    loss=("rel", "weights"), width=(3, "weights"), weight=(0.5, "weights"),
    c_scale=(2.0, "weights"), d_lr=(0.01, "weights"), gamma=(5.0, "weights"),
    ema_decay=(0.5, "weights"))


@pytest.mark.parametrize("command, name", [
    (command, f.name) for command, kind in KINDS.items() for f in fields(kind)
    if f.name not in ("device", "preset", "out", "resume")])  # these have tests of their own
def test_every_setting_matters(command, name, runs, corpus, tmp_path):
    usual = runs[command][1]
    data = plain_corpus(tmp_path / "plain") if name == "data" else corpus
    match = runs["other" if name == "match" else "match-train"][0] / "best.pt"
    argv = ["--data", data] + ["--match", match] * (command == "gan-train")
    changed = "weights"
    if name in CHANGES:
        value, changed = CHANGES[name]
        argv += [v.flag(name), value]
    got = observe(command, tmp_path / "run", *argv)
    assert got[changed] != usual[changed]
    if changed != "weights":
        assert got["weights"] == usual["weights"]


def test_presets_and_help(capsys):
    def settings(*argv):
        return v.make_settings(v.make_parser().parse_args(argv))

    assert settings("match-train") == v.MatchSettings()
    assert settings("gan-train", "--preset", "paper", "--lr", "0.5") == v.GanSettings(
        **v.PAPER["gan-train"] | dict(preset="paper", lr=0.5))
    paper = settings("match-train", "--preset", "paper")
    assert (paper.speech_width, paper.face_width, paper.size, paper.seconds) == (64, 64, 128, 6)
    for command in ("match-train", "gan-train", "match-test", "gan-test", "generate", "make-data",
                    "check-data"):
        with pytest.raises(SystemExit) as end:
            v.main([command, "--help"])
        text = " ".join(capsys.readouterr().out.split())
        assert end.value.code == 0 and "(default: " in text
        for f in fields(KINDS[command]) if command in KINDS else ():
            assert v.flag(f.name) in text and f"(default: {f.default}" in text
    assert "(default: runs/match/best.pt)" in text or command != "gan-train"


def test_importing_does_nothing(tmp_path):
    code = f"import sys; sys.path.insert(0, {str(FILE.parent)!r}); import voice2face"
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr, [*tmp_path.iterdir()]) == (0, "", "", [])


# ---- 4. Evaluation -------------------------------------------------------------------------------


def average(scores, key):
    """The mean of a key over dicts."""
    return np.mean([row[key] for row in scores])


def test_k_way_planted_answers_and_brute_force():
    torch.manual_seed(1)
    same, constant, nobody = torch.randn(600, 128), torch.ones(600, 128), [{}] * 1000
    keys = [f"{direction}/{k}" for direction in ("v-f", "f-v") for k in (2, 10)]
    perfect = v.matching_scores(same, same, nobody[:600], 0)
    assert perfect == dict.fromkeys(keys, 100)
    blind = v.matching_scores(constant, constant, nobody[:600], 0)
    assert blind == {key: pytest.approx(100 / int(key[4:])) for key in keys}  # ties share a point
    speech = torch.randn(1000, 16)
    faces = speech + 2.0 * torch.randn(1000, 16)
    speech = speech * torch.rand(1000, 1)  # so that the directions differ
    got = [v.matching_scores(speech, faces, nobody, seed) for seed in range(5)]
    rng = np.random.default_rng(0)
    for key in keys:
        query, answers = (speech, faces) if key < "v" else (faces, speech)
        if key.startswith("v-f"):
            query, answers = speech, faces
        similarity, hits = (query @ answers.T).numpy(), 0
        for i in range(1000):
            wrong = rng.choice(999, int(key[4:]) - 1, replace=False)
            wrong += wrong >= i
            hits += similarity[i, i] > similarity[i, wrong].max()
        assert average(got, key) == pytest.approx(hits / 10, abs=5)


def test_same_gender_negatives_on_planted_embeddings():
    """Who knows but the gender scores 3 in 4 among all, and chance among the same gender."""
    genders = ["f", "m"] * 300 + [""] * 100  # nobody knows of the last hundred
    one_hot = torch.tensor([[g == "f", g == "m"] for g in genders]).float()
    people = [{"gender": g} for g in genders]
    rows = [v.matching_scores(one_hot[:600], one_hot[:600], people[:600], i) for i in range(20)]
    assert average(rows, "v-f/2") == pytest.approx(75, abs=2)
    assert average(rows, "f-v/10") == pytest.approx(20, abs=2)
    row = v.matching_scores(one_hot, one_hot, people, 0, "real/")
    assert row["real/v-f/2/gender"] == pytest.approx(50)
    assert row["real/f-v/10/gender"] == pytest.approx(10)
    few = v.matching_scores(one_hot[:30], one_hot[:30], [*people[:16], *[{}] * 14], 0)
    assert "v-f/2/gender" in few and "v-f/10/gender" not in few  # eight of each


def test_untrained_networks_score_chance(corpus):
    torch.manual_seed(0)
    split, scores = v.open_corpus(corpus, dict(train=2))["train"], []
    for seed in range(4):
        model = v.Model(CFG, *v.make_encoders(CFG, CPU.device))
        scores.append(v.evaluate(model, split, {}, 2, seed, CPU))
    for direction in ("v-f", "f-v"):
        assert average(scores, f"{direction}/2") == pytest.approx(50, abs=8)
        assert average(scores, f"{direction}/10") == pytest.approx(10, abs=5)


@pytest.mark.parametrize("link, table", [(0.5, (86.7, 73.1, 43.7, 28.4)),
                                         (0.75, (93.3, 87.3, 65.0, 49.5))])
def test_oracle_is_the_normals_log_ratio_and_scores_the_reference_table(link, table, monkeypatch):
    monkeypatch.setattr(v, "LINK", link)
    rng = np.random.default_rng(0)
    people = [v.sample_person(rng) for _ in range(6000)]
    voices, faces = v.oracle_embeddings(people)
    names, product = ("age", "tract", "build"), (voices[:40] @ faces[:40].T).numpy()
    for i in range(40):
        ratio = []
        for j in range(40):
            pairs = [(people[i]["voice_" + n], people[j][n]) for n in names]
            joint = sum(-(a * a - 2 * link * a * b + b * b) / 2 / (1 - link**2) for a, b in pairs)
            ratio.append(joint + sum((a * a + b * b) / 2 for a, b in pairs))
        same = [j for j in range(40) if people[i]["gender"] == people[j]["gender"]]
        gap = product[i, same] - np.array(ratio)[same]  # a constant
        np.testing.assert_allclose(gap, gap[0], atol=2e-3)
        assert max(product[i][j] for j in range(40) if j not in same) < product[i, same].min() - 500
    scores = [v.matching_scores(voices, faces, people, seed) for seed in range(5)]
    for key, expected in zip(("2", "2/gender", "10", "10/gender"), table):
        assert average(scores, f"v-f/{key}") == pytest.approx(expected, abs=1.2)


def test_preference_of_planted_faces():
    c = torch.randn(50, 8)
    assert v.preference(c, c, -c) == 100 and v.preference(c, -c, c) == 0
    assert v.preference(c, c, c) == 50
    mixed = torch.cat([c[:20], -c[20:]])
    assert v.preference(c, mixed, 0 * c) == pytest.approx(40)


def test_distances_of_planted_couples():
    people = [{"gender": i % 2} for i in range(10)] + [{"gender": 1}]
    people = [{"gender": str(row["gender"])} for row in people]
    c = torch.tensor([[row["gender"] == "0", row["gender"] == "1"] for row in people]).float()
    seen = {"same gender": 0, "different gender": 0}
    for seed in range(10):
        panels = v.distance_panels(c, -3 * c, people, seed)
        for title, distance in (("same gender", 0), ("different gender", 1)):
            for values in panels[title]:
                torch.testing.assert_close(values, torch.full_like(values, distance))
            seen[title] += len(values)
        assert len(panels["all couples"][0]) == 11
    assert min(seen.values()) > 10 and sum(seen.values()) == 110
    assert [*v.distance_panels(c, c, [{}] * 11, 0)] == ["all couples"]
    unique = torch.randn(11, 4)
    assert v.distance_panels(unique, unique, people, 0)["all couples"][0].min() > 1e-4  # two people


def test_retrieval_of_planted_answers_and_brute_force():
    torch.manual_seed(0)
    gallery, queries = torch.randn(60, 8), torch.randn(60, 8)
    own = torch.cdist(gallery + 0.001, gallery)
    assert v.recall(own, "r") == {f"r/{k}": 100 for k in (1, 2, 5, 10)}
    assert v.recall(own.roll(1, 1), "r")["r/1"] == 0
    assert v.recall(torch.ones(60, 60), "r")["r/10"] == 0  # a constant answer finds nobody
    distances = torch.cdist(queries, gallery)
    order, got = np.argsort(distances.numpy(), axis=1), v.recall(distances, "r")
    for k in (1, 2, 5, 10):
        assert got[f"r/{k}"] == pytest.approx(100 * np.mean([i in order[i, :k] for i in range(60)]))


def test_drawn_scores_measure_by_three_distances():
    torch.manual_seed(0)
    real, fake = torch.randn(30, 8), torch.randn(30, 8)
    q, g = fake.numpy()[:, None], real.numpy()[None]
    cosine = (q * g).sum(2) / np.linalg.norm(q, axis=2) / np.linalg.norm(g, axis=2)
    scores = v.drawn_scores(real, fake, real, [{}] * 30, 0)
    for name, d in (("L1", np.abs(q - g).sum(2)), ("L2", np.square(q - g).sum(2)),
                    ("cosine", -cosine)):
        rank = (d <= np.diag(d)[:, None]).sum(1)
        assert scores[f"retrieval/{name}/5"] == pytest.approx(100 * np.mean(rank <= 5))


def test_variance_shares_of_planted_factors():
    torch.manual_seed(0)
    a, b = torch.randn(30, 1, 2), torch.randn(1, 20, 2)
    a, b = a - a.mean(0), b - b.mean(1, keepdim=True)
    for read, c, z, both in ((a + 0 * b, 1, 0, 0), (0 * a + b, 0, 1, 0), (a * b, 0, 0, 1)):
        shares = v.variance_shares(read)
        for name, expected in (("c", c), ("z", z), ("both", both)):
            np.testing.assert_allclose(shares[name], expected, atol=1e-5)
    shares, by_c, by_z = v.variance_shares(3 * a + b), 9 * a.square().mean(0), b.square().mean(1)
    torch.testing.assert_close(shares["c"], (by_c / (by_c + by_z))[0])


def test_probe_reads_factors_of_unseen_people(corpus):
    labels, splits = v.read_labels(corpus), v.open_corpus(corpus, dict(train=2, val=2, test=2))
    model, name = v.Model(CFG, None, None), ["background"]
    known = v.numbers([labels[n] for n in splits["train"].names], name)
    probe = v.train_probe(splits["train"], (known - known.mean()) / known.std(), model, CPU, 0,
                          steps=80, batch=16)
    faces, truth = [], []
    for split in ("val", "test"):
        _, seen, names = v.sample_batch(splits[split], CFG, 99, 0, CPU)
        faces.append(seen), truth.extend(labels[n] for n in names)
    assert v.pearson(probe(torch.cat(faces)), v.numbers(truth, name)) > 0.7


def test_match_test_repeats_the_metrics(trained, corpus, tmp_path, capsys):
    def metrics(*more):
        argv = ["match-test", "--data", corpus, "--match", trained / "best.pt", "--out", tmp_path,
                "--runs", "2", "--workers", "0", *more]
        assert v.main([str(a) for a in argv]) == 0
        return (tmp_path / "metrics.json").read_text()

    usual = (trained / "metrics.json").read_text()
    assert metrics() == usual and "V-F 10-way" in capsys.readouterr().out
    found = json.loads(usual)
    for key in ("v-f/2", "v-f/10", "f-v/2", "f-v/10", "v-f/2/gender"):
        assert {key, f"{key}/std", f"oracle/{key}"} <= found.keys() and 0 <= found[key] <= 100
    assert "v-f/10/gender" not in found  # 12 people have not ten of each gender
    assert metrics("--split", "train") != usual and metrics("--seed", "5") != usual
    assert len({metrics("--runs", "1"), metrics("--runs", "3"), usual}) == 3


# ---- 5. Figures, report, faces for any recording -------------------------------------------------


def test_report_names_its_pictures_and_measures_everything(corpus, drawn, trained, tmp_path,
                                                           monkeypatch):
    monkeypatch.setattr(v, "train_probe", functools.partial(v.train_probe, steps=2, batch=8))
    argv = ["gan-test", "--data", corpus, "--gan", drawn / "last.pt", "--out", tmp_path / "r",
            "--runs", "2", "--workers", "0", "--baseline", drawn / "last.pt"]
    assert v.main([str(a) for a in argv]) == 0
    metrics, page = (json.loads((tmp_path / "r/metrics.json").read_text()),
                     (tmp_path / "r/report.md").read_text(encoding="utf8"))
    keys = ["preferred", "over_baseline", "baseline/preferred", "qta1/all/r", "qta1/same/face",
            "qta1/different/c", "baseline/retrieval/L1/5", "oracle/retrieval/1", "real/v-f/10"]
    keys += [f"retrieval/{d}/{k}" for d in ("L1", "L2", "cosine") for k in (1, 2, 5, 10)]
    keys += [f"{a}{d}/2" for a in ("", "real/", "oracle/") for d in ("v-f", "f-v")]
    keys += ["v-f/10", "f-v/10", "v-f/2/gender", "real/v-f/2/gender"]
    for key in keys:
        assert f"| {key} | {metrics[key]:.2f} ± {metrics[f'{key}/std']:.2f} |" in page
    for name in v.FACTORS:
        shares = [metrics[f"control/{name}/{of}"] for of in ("c", "z", "both")]
        assert sum(shares) == pytest.approx(100, abs=0.1) and f"| control/{name}/probe" in page
    assert metrics["over_baseline"] == 50  # of itself
    usual = json.loads((trained / "metrics.json").read_text())
    assert all(metrics[f"real/{key}"] == x for key, x in usual.items() if key[:6] != "oracle")
    pictures = re.findall(r"!\[.*?\]\((.*?)\)", page)
    assert len(pictures) == 5 == len([*(tmp_path / "r").glob("*.png")])
    for picture in pictures:
        assert min(Image.open(tmp_path / "r" / picture).size) > 100


def test_report_of_people_without_labels(drawn, tmp_path):
    data = plain_corpus(tmp_path / "data")
    argv = ["gan-test", "--data", data, "--gan", drawn / "last.pt", "--out", tmp_path / "r",
            "--runs", "1", "--workers", "0"]
    assert v.main([str(a) for a in argv]) == 0
    metrics = json.loads((tmp_path / "r/metrics.json").read_text())
    assert "v-f/2" in metrics and "v-f/10" not in metrics  # six people
    assert not [key for key in metrics if key.startswith(("oracle", "control", "qta1/same"))]


def test_fakes_are_embedded_by_the_inference_stages_encoder(drawn):
    model, c = v.load_model(drawn / "last.pt", v.GanSettings, CPU), torch.randn(70, 128)
    z = torch.randn(70, 128, generator=torch.Generator().manual_seed(5))
    with torch.no_grad():
        expected = model.face_encoder(model.g_ema(z, c))
    torch.testing.assert_close(v.embed_fakes(model, c, 5), expected, rtol=1e-3, atol=1e-4)


def test_generate_draws_for_any_recording(drawn, tmp_path):
    paths = [tmp_path / name for name in ("low.wav", "high stereo.wav", "短い.wav")]
    write_wav(paths[0], noise(8000 * 2), rate=8000)
    write_wav(paths[1], noise(2 * 44100).reshape(-1, 2), rate=44100)
    write_wav(paths[2], noise(1600, 1))  # less than this generator's window of 0.25 s

    def draw(out, *more):
        argv = ["generate", *paths, "--gan", drawn / "last.pt", "--out", tmp_path / out, "-n", "3"]
        assert v.main([str(a) for a in [*argv, *more]]) == 0
        return tmp_path / out

    grid = np.asarray(Image.open(draw("new/faces.png")))
    assert grid.shape == (24 + 3 * (132 + 24), 3 * 132, 3)
    assert np.array_equal(grid, Image.open(draw("new/again.png")))
    assert not np.array_equal(grid, Image.open(draw("new/other.png", "--seed", "1")))
    folder = draw("faces")
    names = [f"{i + 1:04}_{path.stem}_z{k}.png" for i, path in enumerate(paths) for k in (1, 2, 3)]
    assert sorted(p.name for p in folder.iterdir()) == names
    faces = [np.asarray(Image.open(folder / name)) for name in names]
    assert {face.shape for face in faces} == {(32, 32, 3)}  # the generator's own size
    assert len({face.tobytes() for face in faces}) == 9
    shown = np.asarray(faces[0]).repeat(4, 0).repeat(4, 1)
    assert np.array_equal(grid[48:176, 2:130], shown)  # z 1 of the first voice is in both


# ---- 6. Data -------------------------------------------------------------------------------------


@pytest.mark.parametrize("length, window, moment, guard", [
    (20, 5, None, 2), (20, 5, 7, 0), (20, 5, 9, 2), (20, 5, 0, 2), (20, 5, 19, 2), (20, 5, 40, 2),
    (20, 5, 21, 2), (9, 5, 4, 1), (20, 12, 13, 3), (9, 12, None, 1)])
def test_window_is_uniform_and_avoids_the_moment(length, window, moment, guard):
    held = set() if moment is None else set(range(moment - guard, moment + guard + 1))
    possible = [s for s in range(length - window + 1) if not held & set(range(s, s + window))]
    rng, counts = np.random.default_rng(0), {}
    for _ in range(4000):
        start, stop = v.sample_window(length, window, moment, guard, rng)
        assert 0 <= start < stop <= length and not held & set(range(start, stop))
        counts[start] = counts.get(start, 0) + 1
        if possible:
            assert stop - start == window
        else:  # nothing fits: the longer side, whole
            before, after = (moment - guard, length - moment - guard - 1) if held else (length, 0)
            assert stop - start == max(before, after)
    if possible:
        fair = 4000 / len(possible)
        assert sorted(counts) == possible
        assert all(abs(n - fair) < 5 * math.sqrt(fair) for n in counts.values())


@pytest.mark.parametrize("rate", [8000, 16000, 44100])
def test_speech_never_holds_the_faces_time(rate, tmp_path):
    """The recording is a ramp, so that a window tells the times it covers; colours tell moments."""
    moments = (0, 700, 1500, 2200, 2999)
    clip = tmp_path / "p" / "c"
    write_wav(clip / "speech.wav", np.arange(3 * rate) / (3 * rate), rate)
    for ms in moments:
        write_face(clip / f"{ms}.png", (ms // 12, 0, 0))
    cfg = v.MatchSettings(seconds=0.6, size=32)
    pairs, rng, seen = v.PairDataset(split_of(tmp_path, ["p"]), cfg, 1, 0), np.random.default_rng(0), set()
    edge = 0 if rate == 16000 else 400  # where resampling rings
    for _ in range(1000):
        speech, face = pairs.load(0, rng)
        ms = min(moments, key=lambda m: abs(m // 12 - int(face[0, 0, 0])))
        inner = speech[edge:len(speech) - edge] * 3000  # ms
        assert inner.min() > ms + 300 - 0.2 or inner.max() < ms - 300 + 0.2
        assert inner.max() - inner.min() > 590 - 125 * edge / 1000
        seen.add(ms)
    assert seen == set(moments)


def test_times_only_apply_in_a_clip_with_one_recording(tmp_path):
    """Two recordings, or a picture of another clip: its whole-number name is no time."""
    for name in ("a.wav", "b.wav"):
        write_wav(tmp_path / "two" / "c" / name, np.arange(48000) / 48000)
    write_face(tmp_path / "two" / "c" / "1500.png")
    write_wav(tmp_path / "apart" / "speech" / "a.wav", np.arange(48000) / 48000)
    write_face(tmp_path / "apart" / "faces" / "1500.png")
    cfg = v.MatchSettings(seconds=1.0, size=32)
    pairs, rng = v.PairDataset(split_of(tmp_path, ["two", "apart"]), cfg, 1, 0), np.random.default_rng(0)
    for identity in (0, 1):
        windows = [pairs.load(identity, rng)[0] * 3 for _ in range(100)]
        assert any(w.min() < 1.4 and w.max() > 1.6 for w in windows)


def test_pairs_stay_within_a_clip_and_flip_half_of_the_faces(tmp_path):
    """Two clips a person: loudness tells the recording's, colour the face's, a bar its side."""
    for c in range(2):
        clip = tmp_path / "p" / f"c{c}"
        write_wav(clip / "s.wav", np.full(8000, 0.2 + 0.4 * c))
        pixels = np.full((40, 40, 3), 100 * c, np.uint8)
        pixels[:, :10] = 255
        Image.fromarray(pixels).save(clip / "face.png")
    for shuffle in (True, False):
        pairs, flipped, met = v.PairDataset(split_of(tmp_path, ["p"]), CFG, 1, 0, shuffle), [], set()
        for i in range(300):
            speech, face = pairs.load(0, np.random.default_rng(i))
            assert (speech[0] > 0.4) == (face[16, 16, 0] > 50)
            flipped.append(face[16, 28, 0] == 255)
            met.add(bool(speech[0] > 0.4))
        assert met == {True, False}
        assert np.mean(flipped) == (pytest.approx(0.5, abs=0.15) if shuffle else 0)


def test_pictures_are_drawn_uniformly_among_the_persons_pictures(tmp_path):
    """VoxCeleb speech, VGGFace faces: folders of 9 and 1 pictures."""
    write_wav(tmp_path / "p" / "s" / "1.wav", noise(8000))
    for i in range(10):
        write_face(tmp_path / "p" / f"f{i // 9}" / f"{i}.png", (20 * i, 0, 0))
    pairs, rng, counts = v.PairDataset(split_of(tmp_path, ["p"]), CFG, 1, 0), np.random.default_rng(0), [0] * 10
    for _ in range(1000):
        counts[round(int(pairs.load(0, rng)[1][0, 0, 0]) / 20)] += 1
    assert all(abs(n - 100) < 5 * math.sqrt(90) for n in counts)


def test_short_speech_is_repeated_and_long_is_cut(tmp_path):
    rng, short, long = np.random.default_rng(0), noise(1000), noise(20000)
    write_wav(tmp_path / "s.wav", short), write_wav(tmp_path / "l.wav", long)
    got = v.load_speech(tmp_path / "s.wav", 0.25, rng)
    np.testing.assert_allclose(got, np.tile(short, 4), atol=1e-4)
    starts = set()
    for _ in range(5):
        got = v.load_speech(tmp_path / "l.wav", 0.25, rng)
        start = int(np.argmin([abs(long[s:s + 20] - got[:20]).sum() for s in range(16001)]))
        np.testing.assert_allclose(got, long[start:start + 4000], atol=1e-4)
        starts.add(start)
    assert len(starts) > 1


@pytest.mark.parametrize("rate, channels", [(8000, 1), (16000, 2), (44100, 2), (48000, 6)])
def test_any_rate_and_channel_count_becomes_mono_16_khz(tmp_path, rate, channels):
    tone = 0.5 * np.sin(2 * np.pi * 1000 * np.arange(2 * rate) / rate)
    write_wav(tmp_path / "x.wav", tone[:, None] * np.linspace(0, 2, channels or 1)
              if channels > 1 else tone, rate)  # the mean of all channels is the tone
    got = v.load_speech(tmp_path / "x.wav", 1.0, np.random.default_rng(0))
    assert got.shape == (16000,) and got.dtype == np.float32
    spectrum = abs(np.fft.rfft(got[2000:14000] * np.hanning(12000)))
    assert np.argmax(spectrum) == 750  # 1000 Hz
    assert got[2000:14000].max() == pytest.approx(0.5, abs=0.02)


def test_only_the_window_of_a_wav_is_read(tmp_path, monkeypatch):
    with wave.open(str(tmp_path / "hour.wav"), "wb") as f:
        f.setparams((2, 2, 44100, 0, "NONE", ""))
        for _ in range(60):
            f.writeframes(bytes(44100 * 4 * 60))
    read, readframes = [], wave.Wave_read.readframes
    monkeypatch.setattr(wave.Wave_read, "readframes",
                        lambda f, n: read.append(n) or readframes(f, n))
    assert len(v.load_speech(tmp_path / "hour.wav", 1.0, np.random.default_rng(0))) == 16000
    assert read == [44100]


def test_other_formats_go_through_torchaudio(tmp_path, monkeypatch):
    stereo = torch.stack([torch.linspace(-1, 1, 32000), torch.zeros(32000)])
    monkeypatch.setattr(v.torchaudio, "load", lambda path: (stereo, 32000))
    write_wav(tmp_path / "x.wav", noise(99), bits=32)
    (tmp_path / "x.mp3").write_bytes(b"ID3")
    for name in ("x.wav", "x.mp3"):
        x, rate = v.read_speech(tmp_path / name, lambda n, rate: (n - rate // 2, n))
        np.testing.assert_allclose(x, stereo.mean(0)[16000:].numpy())
        assert rate == 32000

    def no_decoder(path):
        raise ImportError("TorchCodec is required")

    monkeypatch.setattr(v.torchaudio, "load", no_decoder)
    with pytest.raises(ValueError, match=r"x\.mp3: .*pip install torchcodec"):
        v.read_speech(tmp_path / "x.mp3")


def test_faces_are_square_cropped_resized_rgb_and_upright(tmp_path):
    wide = np.zeros((40, 80, 3), np.uint8)
    wide[:, 20:60] = (10, 200, 30)  # the central square
    wide[:20, 20:40] = (250, 0, 0)  # its upper left quarter
    Image.fromarray(wide).save(tmp_path / "w.png")
    face = v.load_face(tmp_path / "w.png", 32)
    assert face.shape == (32, 32, 3) and face.dtype == np.uint8
    assert tuple(face[4, 4]) == (250, 0, 0)
    assert tuple(face[4, 28]) == tuple(face[28, 4]) == (10, 200, 30)
    Image.new("L", (640, 480), 77).save(tmp_path / "g.jpg")
    assert abs(v.load_face(tmp_path / "g.jpg", 32).astype(int) - 77).max() <= 1
    pixels, exif = np.zeros((40, 40, 3), np.uint8), Image.Exif()
    pixels[:10] = 200  # a bar on top, once the picture is turned as its EXIF data says
    exif[0x0112] = 6  # to be turned by 90 degrees clockwise
    Image.fromarray(np.rot90(pixels)).save(tmp_path / "e.png", exif=exif)
    assert v.load_face(tmp_path / "e.png", 32)[2].mean() == 200
    write_face(tmp_path / "small.png", size=(31, 99))
    with pytest.raises(ValueError, match=r"small\.png: 31x99 pixels, at least 32"):
        v.load_face(tmp_path / "small.png", 32)


def test_batches_are_a_function_of_seed_and_number_and_of_different_people(corpus):
    split = v.open_corpus(corpus, dict(train=2))["train"]
    make = functools.partial(v.PairDataset, split, CFG, 20)
    a, b = make(0, shuffle=True)[5], make(0, shuffle=True)[5]
    assert all(torch.equal(x, y) for x, y in zip(a[:3], b[:3])) and a[3] == []
    for other in (make(1, shuffle=True)[5], make(0, shuffle=True)[6]):
        assert not torch.equal(a[0], other[0]) and not torch.equal(a[2], other[2])
    seen = set()
    for i in range(20):
        people = make(0, shuffle=True)[i][2].tolist()
        assert len(set(people)) == 20
        seen |= set(people)
    assert seen == set(range(62))
    test = make(0)
    assert [int(i) for n in range(len(test)) for i in test[n][2]] == [*range(62)]
    ahead, here = ([batch[:3] for batch in v.load_batches(test, range(2), workers, CPU.device)]
                   for workers in (1, 0))
    assert all(torch.equal(x, y) for p, q in zip(ahead, here) for x, y in zip(p, q))
    assert here[0][1].shape == (20, 3, 32, 32) and here[0][1].abs().max() <= 1
    expected = test[0][1].permute(0, 3, 1, 2).float() / 127.5 - 1
    torch.testing.assert_close(here[0][1], expected)


def damage(root, split, *people):
    """Make the recordings of some people of plain_corpus unreadable."""
    for i in people:
        (root / split / f"{split}{i}" / "клип 1" / "речь.wav").write_bytes(b"nonsense")


def test_unreadable_people_are_named_replaced_in_training_and_left_out_in_tests(tmp_path, capsys):
    plain_corpus(tmp_path, 30, ["train"])
    damage(tmp_path, "train", 7)
    shutil.rmtree(tmp_path / "train/train8")
    (tmp_path / "train/train8").mkdir()  # a dead video's empty folder is such a fault, not an end
    split = v.open_corpus(tmp_path, dict(train=30))["train"]
    pairs = v.PairDataset(split, CFG, 15, 0, shuffle=True)
    for _, _, identity, _ in v.load_batches(pairs, range(10), 0, CPU.device):
        names = set(split.names[identity])
        assert len(names) == 15 and not {"train7", "train8"} & names
    warned = capsys.readouterr().err
    assert warned.count("warning: left out: ") == len(warned.splitlines()) > 2
    assert "речь.wav: " in warned and "train8: no recording" in warned
    found = [v.PairDataset(split, CFG, 15, 0)[i] for i in range(2)]
    assert sum(len(batch[2]) for batch in found) == 28
    assert sum(len(batch[3]) for batch in found) == 2


def test_too_many_unreadable_files_end_the_run(tmp_path, capsys):
    data, argv = plain_corpus(tmp_path / "data", 12), ["--out", tmp_path / "run"]
    damage(data, "train", *range(9))
    line = refused(capsys, "match-train", "--data", data, *argv, *TINY["match-train"])
    assert "too many unreadable files (run check-data)" in line and "речь.wav" in line


@pytest.mark.parametrize("split, people, code", [("train", 6, 2), ("val", 10, 0), ("val", 2, 2),
                                                 ("test", 7, 0)])
def test_a_split_that_falls_short_by_one_unreadable_file_never_hangs(split, people, code, tmp_path,
                                                                     capsys):
    """train of exactly the batch, val of exactly K, val of two, a test's last batch of one."""
    data = plain_corpus(tmp_path / "data", 12)
    for i in range(people, 12):
        shutil.rmtree(data / split / f"{split}{i}")
    damage(data, split, people - 1)
    argv = ["match-train", "--data", data, "--out", tmp_path / "run", *TINY["match-train"],
            "--batch", "6", "--k", "6"]
    if code:
        assert refused(capsys, *argv)
    else:
        assert v.main([str(a) for a in argv]) == 0
        assert f"{split}{people - 1}" in capsys.readouterr().err


def test_a_corpus_is_opened_by_one_listing_of_each_split(corpus, monkeypatch):
    listed, scandir = [], os.scandir
    for name in ("listdir", "scandir"):
        monkeypatch.setattr(v.os, name, lambda path, real=getattr(os, name): listed.append(
            str(path)) or real(path))
    found = v.open_corpus(corpus, dict(train=2, val=2, test=2))
    assert len(listed) == 3 and [len(split.names) for split in found.values()] == [62, 10, 12]
    assert v.thin(found["train"], 5).names[[0, 4]].tolist() == found["train"].names[[0, 61]].tolist()
    assert len(set(v.thin(found["train"], 20).names)) == 20 and len(v.thin(found["val"], 99)[1]) == 10


def test_check_data_lists_every_fault(tmp_path, capsys):
    plain_corpus(tmp_path, 12)
    assert v.main(["check-data", str(tmp_path)]) == 0
    out = capsys.readouterr().out
    assert "0 faults" in out and "12 identities, 0.00 h of speech, 12 pictures" in out
    clip = tmp_path / "train" / "train0" / "клип 1"
    write_wav(clip / "empty.wav", [])
    (clip / "cut.wav").write_bytes(b"RIFF")
    write_wav(clip / "silent.wav", np.zeros(8000))
    (clip / "e.flac").write_bytes(b"no sound")
    (clip / "f.jpg").write_bytes(b"no picture")
    whole = (clip / "500.png").read_bytes()
    (clip / "g.png").write_bytes(whole[:len(whole) // 2])
    write_face(clip / "tiny.png", size=(16, 99))
    (clip / "._500.png").write_bytes(b"a hidden file is no data")
    (tmp_path / "val/val3/клип 1/речь.wav").unlink()
    (tmp_path / "test/test5/клип 1/500.png").unlink()
    (tmp_path / "test/test6 empty").mkdir()
    assert v.main(["check-data", str(tmp_path)]) == 1
    out = capsys.readouterr().out
    faults = [line for line in out.splitlines() if line.startswith("fault: ")]
    for part in ("empty.wav", "cut.wav", "silent.wav: silent", "e.flac", "f.jpg", "g.png",
                 "tiny.png: 16x99", "val3: no recording", "test5: no picture", "test6 empty: no"):
        assert sum(part in fault for fault in faults) == 1, part
    assert len(faults) == 10 and "10 faults" in out


# ---- 7. Synthetic people -------------------------------------------------------------------------


def test_make_data_is_deterministic_and_labelled(tmp_path, corpus):
    for name, seed in (("again", 3), ("other", 4)):
        argv = ["make-data", tmp_path / name, "--identities", "30", "--seed", seed]
        assert v.main([str(a) for a in argv]) == 0
    files = [p.relative_to(tmp_path / "again") for p in (tmp_path / "again").rglob("*.*")
             if p.parent.parent.parent.name == "train"]
    assert len(files) == 10 * (1 + v.FRAMES)  # person i of a seed is one person, however many
    assert all((corpus / f).read_bytes() == (tmp_path / "again" / f).read_bytes() for f in files)
    assert not any((tmp_path / "other" / f).exists() and (corpus / f).read_bytes()
                   == (tmp_path / "other" / f).read_bytes() for f in files)
    labels = v.read_labels(corpus)
    for split in ("train", "val", "test"):
        named = {name for name, row in labels.items() if row["split"] == split}
        assert named == {p.name for p in (corpus / split).iterdir()}
    assert {*v.FACTORS, "voice_age", "pitch", "loudness", "tempo"} <= labels["id00000"].keys()


def test_linked_factors_correlate_by_link_and_nothing_else_does():
    rng = np.random.default_rng(0)
    people = [v.sample_person(rng) for _ in range(8000)]
    names = [*people[0]]
    r = np.corrcoef([[person[name] for person in people] for name in names])
    for (i, a), (j, b) in ((x, y) for x in enumerate(names) for y in enumerate(names) if x < y):
        linked = b == a.removeprefix("voice_") and a != b
        assert r[i, j] == pytest.approx(v.LINK if linked else 0, abs=0.05), (a, b)
    assert all(abs(np.std([p[n] for p in people]) - 1) < 0.04 for n in ("age", "voice_age"))


def test_each_factor_acts_on_its_own_side_only():
    person = v.sample_person(np.random.default_rng(5)) | dict(gender=0, glasses=0)

    def voice(p):
        return v.synth_speech(p, np.random.default_rng(1)).tobytes()

    def face(p):
        return v.draw_face(p, 0.5).tobytes()

    heard = {"gender", "voice_age", "voice_tract", "voice_build", "pitch", "loudness", "tempo"}
    for name, x in person.items():
        changed = person | {name: x + (0.3 if isinstance(x, float) else 1)}
        assert (voice(changed) != voice(person)) == (name in heard), name
        assert (face(changed) != face(person)) == (name not in heard or name == "gender"), name


def test_the_mouth_opens_with_loudness(corpus):
    opening, loud = [], []
    for clip in sorted((corpus / "train").glob("*/clip"))[:20]:
        with wave.open(str(clip / "speech.wav")) as f:
            speech = np.frombuffer(f.readframes(-1), "<i2") / 32768
        rms = [speech[max(0, i - 400):i + 400].std() for i in range(0, len(speech), 16)]
        for path in clip.glob("*.jpg"):
            pixels = np.asarray(Image.open(path)).astype(int)
            opening.append((abs(pixels - v.MOUTH).sum(2) < 60).sum())
            loud.append(rms[int(path.stem)] / max(rms))
    assert np.corrcoef(opening, loud)[0, 1] > 0.8


def test_gender_is_heard_as_pitch():
    base = v.sample_person(np.random.default_rng(0)) | dict(voice_age=-1.0, pitch=0.0)
    for gender, hz in ((0, 210), (1, 110)):
        x = v.synth_speech(base | dict(gender=gender), np.random.default_rng(0)).astype(float)
        auto = np.fft.irfft(np.abs(np.fft.rfft(x, 2 * len(x))) ** 2)
        lags = np.arange(16000 // 300, 16000 // 70)
        assert 16000 / lags[np.argmax(auto[lags])] == pytest.approx(hz, rel=0.25)


# ---- 8. Plumbing: resume, processes, precision ---------------------------------------------------


def leaves(x, name=""):
    """{path: leaf} of nested dicts, lists and tuples."""
    if not isinstance(x, (dict, list, tuple)):
        return {name: x}
    items = x.items() if isinstance(x, dict) else enumerate(x)
    return {path: leaf for key, y in items for path, leaf in leaves(y, f"{name}/{key}").items()}


def left_by(out):
    """Whatever a run leaves, but for its log, which holds times: {name: tensor, number, bytes}."""
    found = {}
    for path in sorted(p for p in out.rglob("*.*") if p.name != "log.jsonl"):
        if path.suffix == ".pt":
            state = torch.load(path, weights_only=True)
            for key in v.MAY_CHANGE:
                state["settings"].pop(key, None)
            found |= leaves(state, path.name)
        else:
            found[path.name] = path.read_bytes()
    return found


def differences(a, b):
    """What two runs left that is not equal bit for bit."""
    a, b = left_by(a), left_by(b)
    assert sum(isinstance(x, torch.Tensor) for x in a.values()) > 10 and "metrics.json" in a
    return [key for key in a.keys() | b.keys() if key not in a or key not in b or not (
        torch.equal(a[key], b[key]) if isinstance(a[key], torch.Tensor) else a[key] == b[key])]


def long_run(command, data, match, *more):
    """A command line of 24 steps, without --out."""
    argv = [command, "--data", data, *TINY[command], "--steps", "24", "--eval-every", "5",
            "--save-every", "2", "--runs", "1", *more]
    return [str(a) for a in argv + ["--match", match] * (command == "gan-train")]


@pytest.mark.parametrize("command", ["match-train", "gan-train"])
def test_a_run_stopped_at_any_step_and_resumed_ends_as_one_left_alone(
        command, corpus, trained, tmp_path, monkeypatch, capsys):
    argv = long_run(command, corpus, trained / "best.pt", "--steps", "8", "--save-every", "3")
    assert v.main([*argv, "--out", str(tmp_path / "whole")]) == 0
    calls, codes = [0], []

    def interrupted(*args, descend=v.descend):
        calls[0] += 1
        if calls[0] % 7 == 0:  # ctrl-C, in the middle of a step of the gan
            raise KeyboardInterrupt
        descend(*args)

    monkeypatch.setattr(v, "descend", interrupted)
    while not codes or codes[-1]:
        codes.append(v.main([*argv, "--out", str(tmp_path / "part"), "--resume"]))
    assert codes[:-1] == [130] * (len(codes) - 1) and len(codes) > 1
    assert "--resume goes on" in capsys.readouterr().err
    assert differences(tmp_path / "whole", tmp_path / "part") == []
    assert v.main([*argv, "--out", str(tmp_path / "part"), "--resume"]) == 0  # only tests again
    assert differences(tmp_path / "whole", tmp_path / "part") == []


def child(argv):
    """A process's work: a command, silently."""
    sys.stdout = sys.stderr = open(os.devnull, "w")
    torch.set_num_threads(1)
    sys.exit(v.main(argv))


def kill(times):
    """Kill both trainings at random moments, resume them, print whether they end as left alone.

    Where there is fork, a child has torch in memory but this process has not used its threads.
    """
    torch.set_num_threads(1)
    context = multiprocessing.get_context("fork" if hasattr(os, "fork") else "spawn")
    different = 0

    def start(argv, out):
        process = context.Process(target=child, args=([*argv, "--out", str(out), "--resume"],))
        process.start()
        return process

    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as scratch:
        folder, match = Path(scratch), Path(scratch, "match-train", "best.pt")
        data = plain_corpus(folder / "data", 12)
        for n, command in enumerate(2 * ["match-train"] + 2 * ["gan-train"]):
            argv, whole = long_run(command, data, match, "--workers", n % 2), folder / command
            if not whole.exists():
                process, begun = start(argv, whole), time.time()
                process.join()
                seconds = time.time() - begun
            for i in range(n % 4, times, 4):
                out = folder / f"{command}{i}"
                process = start(argv, out)
                time.sleep(random.uniform(0, 0.95 * seconds))
                process.kill(), process.join()
                log, last = out / "log.jsonl", out / "last.pt"
                step = log.read_bytes().count(b"\n") if log.exists() else 0
                saved = torch.load(last, weights_only=True)["step"] if last.exists() else 0
                again = start(argv, out)
                again.join()
                found = ["exit code"] if again.exitcode else differences(whole, out)
                different += bool(found)
                print(f"{command}: exit code {process.exitcode} after step {step}, {saved} saved: "
                      f"{'DIFFERENT ' + ' '.join(found) if found else 'equal'}", flush=True)
    print(f"{times} kills, {different} different")
    return int(different > 0)


def test_runs_killed_at_random_moments_end_as_runs_left_alone():
    """A few only: `python test_voice2face.py kill 20` makes more of them."""
    done = subprocess.run([sys.executable, __file__, "kill", "4"], capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout.count(": equal") == 4, done.stdout + done.stderr


@pytest.mark.parametrize("fault", [OSError(28, "No space left on device"),
                                   RuntimeError("PytorchStreamWriter failed writing file")])
def test_a_full_disk_keeps_the_checkpoint_before(fault, corpus, tmp_path, monkeypatch, capsys):
    def full(state, path, save=torch.save):
        if state["step"] == 4 and "last" in str(path):
            Path(path).write_bytes(b"half of it")
            raise fault
        save(state, path)

    monkeypatch.setattr(v.torch, "save", full)
    argv = ["match-train", "--data", corpus, "--out", tmp_path, *TINY["match-train"]]
    line = refused(capsys, *argv, "--save-every", "2")
    assert "last.pt: cannot be written" in line and str(fault.args[-1]) in line
    assert torch.load(tmp_path / "last.pt", weights_only=True)["step"] == 2
    assert not [*tmp_path.glob("*.part")]


@pytest.mark.parametrize("command, rate", [("match-train", "1e18"), ("gan-train", "1e30")])
def test_a_diverging_run_says_so_and_saves_no_nan(command, rate, corpus, trained, tmp_path, capsys):
    argv = long_run(command, corpus, trained / "best.pt", "--eval-every", "99", "--save-every", "1")
    line = refused(capsys, *argv, "--out", tmp_path, "--lr", rate)
    assert "weights are NaN, the run diverged" in line and "--lr" in line
    if (tmp_path / "last.pt").exists():
        saved = leaves(torch.load(tmp_path / "last.pt", weights_only=True))
        assert all(x.isfinite().all() for key, x in saved.items() if key.endswith("weight"))


def torchrun(*argv):
    """(exit code, stdout, stderr) of two processes on the CPU."""
    with socket.socket() as port:
        port.bind(("127.0.0.1", 0))
        free = port.getsockname()[1]
    done = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2",
         f"--master-port={free}", *map(str, argv)], capture_output=True, text=True, timeout=300,
        env=os.environ | {"OMP_NUM_THREADS": "1"})
    return done.returncode, done.stdout, done.stderr


SPY = f"""
import os, sys
sys.path.insert(0, {str(FILE.parent)!r})
import torch, test_voice2face as t
torch.set_num_threads(1)
seen = t.spy_on_descend()
code = t.v.main(sys.argv[2:])
torch.save(seen, f"{{sys.argv[1]}}/rank{{os.environ['RANK']}}.pt")
sys.stdout.flush()
os._exit(code)
"""


def spy_on_descend(patch=None):
    """A list that gets [gradients, weights] of each step down; steps are not cut, R1 in each."""
    seen, descend = [], v.descend
    patch = patch or pytest.MonkeyPatch()

    def spied(optimizer, loss, share, *rest):
        descend(optimizer, loss, share)
        weights = [p for group in optimizer.param_groups for p in group["params"]]
        seen.append([[p.grad.clone() for p in weights], [p.detach().clone() for p in weights]])

    patch.setattr(v, "descend", spied)
    patch.setattr(v, "R1_EVERY", 1)
    return seen


@pytest.mark.parametrize("command", ["match-train", "gan-train"])
def test_two_processes_train_on_the_mean_of_their_losses(command, corpus, trained, tmp_path,
                                                         monkeypatch):
    argv = [command, "--data", corpus, *TINY[command], "--steps", "3", "--eval-every", "3"]
    argv += ["--match", trained / "best.pt", "--d-lr", "0"] * (command == "gan-train")
    (tmp_path / "spy.py").write_text(SPY)
    code, out, err = torchrun(tmp_path / "spy.py", tmp_path, *argv, "--out", tmp_path / "run")
    assert code == 0, err
    assert out.count("step 3/3") == 1 and (tmp_path / "run/metrics.json").exists()  # one speaks
    both = [torch.load(tmp_path / f"rank{rank}.pt") for rank in range(2)]
    one, other = map(leaves, both)
    assert len(one) > 100 and all(torch.equal(x, other[key]) for key, x in one.items())
    alone, init = [], v.Machine.__init__
    for rank in range(2):  # what each would have done without the other, in the first step
        def as_rank(machine, name):
            init(machine, name)
            machine.rank, machine.is_first = rank, False

        with monkeypatch.context() as patch:
            patch.setattr(v.Machine, "__init__", as_rank)
            alone.append(spy_on_descend(patch))
            assert v.main([str(a) for a in [*argv, "--out", tmp_path / f"alone{rank}"]]) == 0
    for part in range(1 if command == "match-train" else 2):  # D, whose rate is 0, then G
        for mean, a, b in zip(both[0][part][0], alone[0][part][0], alone[1][part][0], strict=True):
            torch.testing.assert_close(mean, (a + b) / 2, rtol=1e-3, atol=1e-5)
            assert not torch.equal(a, b) or not a.any()  # each has its own batch


@pytest.mark.parametrize("command", ["match-train", "gan-train"])
def test_bfloat16_changes_little_and_spares_r1(command, corpus, trained, tmp_path, monkeypatch):
    kinds, halved, init, penalty = set(), [], v.Machine.__init__, v.r1_penalty
    more = ["--match", trained / "best.pt"] if command == "gan-train" else []

    def native(machine, name):
        init(machine, name)
        machine.autocast = torch.autocast("cpu", torch.bfloat16)

    observe(command, tmp_path / "full", "--data", corpus, "--eval-every", "9", *more)
    monkeypatch.setattr(v.Machine, "__init__", native)
    monkeypatch.setattr(v, "r1_penalty", lambda *args: halved.append(
        torch.is_autocast_enabled("cpu")) or penalty(*args))
    hook = torch.nn.modules.module.register_module_forward_hook(
        lambda net, x, y: kinds.add(y.dtype) if isinstance(net, torch.nn.Conv2d) else None)
    observe(command, tmp_path / "half", "--data", corpus, "--eval-every", "9", *more)
    hook.remove()
    full, half = ([json.loads(line) for line in open(tmp_path / name / "log.jsonl")]
                  for name in ("full", "half"))
    keys = [key for key in full[0] if key.startswith(("loss", "match", "mismatch"))]
    for a, b in zip(full[:3], half[:3]):
        assert [b[key] for key in keys] == pytest.approx([a[key] for key in keys], rel=.1, abs=.1)
    assert full != half and torch.bfloat16 in kinds
    assert halved == [False] * (2 if command == "gan-train" else 0)
    state = leaves(torch.load(tmp_path / "half/last.pt", weights_only=True))
    assert {x.dtype for key, x in state.items() if key.endswith("weight")} == {torch.float32}


@pytest.mark.parametrize("native", [True, False])
def test_a_gpu_computes_in_bfloat16_only_where_it_is_native(native, monkeypatch):
    asked = []
    monkeypatch.setattr(v.torch, "zeros", lambda *args, device: types.SimpleNamespace(
        device=torch.device(device)))
    monkeypatch.setattr(v.torch, "autocast", lambda kind, dtype, enabled: (kind, dtype, enabled))
    monkeypatch.setattr(torch.cuda, "set_device", asked.append)
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", False)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True:
                        including_emulation or native)  # a T4 emulates it
    machine = v.Machine("cuda")
    assert machine.autocast == ("cuda", torch.bfloat16, native) and asked == [machine.device]


# ---- 9. Mistakes that people make ----------------------------------------------------------------


def mistakes():
    """{name: (what the line says, a function of (folder, corpus, match run, gan run): argv)}."""
    def train(*more, data=None, out="new"):
        return lambda root, corpus, match, gan: [
            "match-train", *TINY["match-train"], "--data", data and root / data or corpus,
            "--out", match if out == "taken" else root / out, *more]

    def planted(change, *argv):
        def make(root, corpus, match, gan):
            data = plain_corpus(root / "data")
            change(data)
            return [*(argv or ["match-train"]), *TINY["match-train"][not argv and 0:0 if argv else
                    None], *([] if argv else ["--out", root / "new", "--data"]), data]
        return make

    def draw(name, samples=None):
        def make(root, corpus, match, gan):
            if samples is not None:
                write_wav(root / name, samples)
            return ["generate", root / name, "--gan", gan / "last.pt", "--out", root / "x.png"]
        return make

    def two_splits(data):
        shutil.copytree(data / "train/train0", data / "test/train0")

    def no_identity(data):
        (data / "labels.csv").write_text("name;gender\n1;f\n")

    def latin(data):
        (data / "labels.csv").write_bytes("identity\nRené\n".encode("latin-1"))

    return {
        "no corpus": (r"none.train: no such folder; a corpus is", train(data="none")),
        "no val": (r"val: no such folder", planted(lambda data: shutil.rmtree(data / "val"))),
        "two splits": (r"test.train0: is also in .*train; one split only", planted(two_splits)),
        "few people": (r"train: 62 identities, at least 99", train("--batch", "99")),
        "labels": (r"labels.csv: must be CSV in UTF-8 with a column 'identity'",
                   planted(no_identity)),
        "latin-1": (r"labels.csv: must be CSV in UTF-8", planted(latin)),
        "k": (r"--batch 6: must be at least --k 7", train("--k", "7")),
        "too short": (r"--seconds 0.01: must be 0.24 to 60", train("--seconds", "0.01")),
        "no number": (r"--lr nan: must be at least 0", train("--lr", "nan")),
        "no steps": (r"--steps 0: must be at least 1", train("--steps", "0")),
        "no such gpu": (r"--device cuda:77: not here, use cpu or auto",
                        train("--device", "cuda:77")),
        "no device": (r"--device tpuu: not here", train("--device", "tpuu")),
        "out is taken": (r"--out .*: holds a run; name another folder, or --resume", train(
            out="taken")),
        "other settings": (r"--resume: the run in .* has --lr 0.05, not 0.1", train(
            "--resume", "--lr", "0.1", out="taken")),
        "no checkpoint": (r"none.pt: no such checkpoint; match-train and gan-train write them",
                          lambda root, *rest: ["match-test", "--match", root / "none.pt",
                                               "--data", rest[0]]),
        "other training": (r"best.pt: holds MatchSettings, not GanSettings", lambda root, corpus,
                           match, gan: ["gan-test", "--gan", match / "best.pt", "--data", corpus,
                                        "--out", root / "r"]),
        "no recording": (r"none.wav: not a readable recording", draw("none.wav")),
        "silent": (r"quiet.wav: silent", draw("quiet.wav", np.zeros(16000))),
        "no sound": (r"zero.wav: no speech in it", draw("zero.wav", [])),
        "data exists": (r"corpus: exists already", lambda root, corpus, *rest: [
            "make-data", corpus]),
        "no file": (r"missing: no such folder", lambda root, *rest: [
            "check-data", root / "missing"]),
    }


@pytest.mark.parametrize("name", mistakes())
def test_a_mistake_is_one_line_that_says_what_and_where(name, corpus, trained, drawn, tmp_path,
                                                        capsys):
    said, argv = mistakes()[name]
    line = refused(capsys, *argv(tmp_path, corpus, trained, drawn))
    assert re.search(said, line), line
    assert not (tmp_path / "new").exists()  # before anything was made


@pytest.mark.parametrize("argv", [
    ["match-train", "--stepps", "4"], ["match-train", "--size", "48"], ["gan-train", "--lr", "x"],
    ["gan-train", "--loss", "wgan"], ["match-tset"], [], ["generate"]])
def test_what_the_parser_refuses(argv, capsys):
    with pytest.raises(SystemExit) as end:
        v.main(argv)
    assert end.value.code == 2 and "error: " in capsys.readouterr().err


@pytest.mark.parametrize("content", [b"hello", b"", "cut"])
def test_a_damaged_checkpoint_is_one_line(content, trained, corpus, tmp_path, capsys):
    whole = (trained / "last.pt").read_bytes()
    (tmp_path / "last.pt").write_bytes(whole[:9000] if content == "cut" else content)
    line = refused(capsys, "match-train", *TINY["match-train"], "--data", corpus, "--out", tmp_path,
                   "--resume")
    assert "last.pt: not a checkpoint, or damaged" in line
    assert [p.name for p in tmp_path.iterdir()] == ["last.pt"]


# ---- bench ---------------------------------------------------------------------------------------


def bench():
    """Print what the loader and a training step take, and what a large corpus takes to open."""
    import resource
    cores = os.cpu_count()
    with tempfile.TemporaryDirectory() as scratch:
        root = Path(scratch)
        assert v.main(["make-data", str(root / "few"), "--identities", "200"]) == 0
        split = v.open_corpus(root / "few", dict(train=2))["train"]
        paper = v.MatchSettings(**v.PAPER["match-train"])
        pairs, took = v.PairDataset(split, paper, paper.batch, 0, shuffle=True), []
        for i in range(12):
            start = time.perf_counter()
            pairs[i]
            took.append(time.perf_counter() - start)
        rate = paper.batch / np.median(took[2:])
        print(f"loader, 6 s of WAV and a 128x128 JPEG, one core: {rate:.0f} pairs/s")

        def step_ms(name, command, *more):
            argv = [command, "--data", root / "few", "--out", root / name, "--eval-every", "9999",
                    "--log-every", "5", "--steps", "60", "--runs", "1", *more]
            with contextlib.redirect_stdout(io.StringIO()):
                assert v.main([str(a) for a in argv]) == 0
            rates = [json.loads(line)["clips_per_s"] for line in open(root / name / "log.jsonl")]
            ms = 1000 * KINDS[command]().batch / np.median(rates[2:])
            print(f"{name}: {ms:.0f} ms a step of the default {command}, {cores} cores", flush=True)
            return ms

        ten, two = step_ms("K = 10", "match-train"), step_ms("K = 2", "match-train", "--k", "2")
        print(f"K = 10 takes {ten / two:.2f} times as long as K = 2")
        step_ms("relid", "gan-train", "--match", root / "K = 10" / "best.pt")
        for i in range(100_000):
            (root / "many" / "train" / f"identity{i:06}").mkdir(parents=True)
        start, before = time.time(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        split = v.open_corpus(root / "many", dict(train=2))["train"]
        grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
        print(f"opening 100,000 identities: {time.time() - start:.1f} s, the names take "
              f"{split.names.nbytes / 2**20:.0f} MB, the process grew by {grown:.0f} MB")


if __name__ == "__main__":
    if sys.argv[1:2] == ["kill"]:
        sys.exit(kill(int(sys.argv[2])))
    sys.exit(bench() if sys.argv[1:2] == ["bench"] else pytest.main([__file__, "-q", *sys.argv[1:]]))
