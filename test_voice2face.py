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
import functools
import io
import itertools
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
import wave
from dataclasses import fields
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from pytest import approx
from torch.testing import assert_close

import voice2face as v

FILE, COMMANDS = Path(v.__file__), ("match-train", "gan-train")
CPU = SimpleNamespace(device=torch.device("cpu"), autocast=contextlib.nullcontext())  # a v.Machine
TINY = ("--steps 4 --batch 6 --eval-every 2 --log-every 1 --runs 2 --workers 0 --device cpu "
        "--k 4 --seconds 0.25 --size 32 --speech-width 4 --face-width 4").split()
TINY = {"match-train": TINY, "gan-train": [*TINY[:14], "--width", "2"]}
CFG = v.MatchSettings(seconds=0.25, size=32, speech_width=4, face_width=4, batch=32)


def run(*argv):
    """Run a command, which must succeed; training on tiny settings, unless told otherwise."""
    argv = [argv[0], *TINY.get(argv[0], ()), *argv[1:]]
    assert v.main([str(a) for a in argv]) == 0


def refused(capsys, *argv):
    """Run a command that must end with exit code 2 and one line on stderr; returns the line."""
    capsys.readouterr()
    assert v.main([str(a) for a in [argv[0], *TINY.get(argv[0], ()), *argv[1:]]]) == 2
    lines = capsys.readouterr().err.splitlines()
    lines = [line for line in lines if not line.startswith("warning: left out: ")]
    assert len(lines) == 1 and lines[0].startswith("voice2face: error: "), lines
    return lines[0]


def write_wav(path, samples, rate=16000, width=2):
    """PCM from floats (T,) or (T, channels) in [-1, 1]."""
    samples = np.asarray(samples, float)
    with wave.open(str(path), "wb") as f:
        f.setparams((1 if samples.ndim == 1 else samples.shape[1], width, rate, 0, "NONE", ""))
        f.writeframes((samples * 32767).astype(f"<i{width}").tobytes())


def make_clip(folder, sounds, pictures, rate=16000):
    """A clip of {name: samples} and {name: RGB colour or PIL picture}."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, samples in sounds.items():
        write_wav(folder / name, samples, rate)
    for name, face in pictures.items():
        face = Image.new("RGB", (40, 40), face) if isinstance(face, tuple) else face
        face.save(folder / name)


def noise(samples, seed=0):
    """White noise within -0.5 ... 0.5."""
    return np.random.default_rng(seed).uniform(-0.5, 0.5, samples)


def plain_corpus(root, people=12, broken=()):
    """Noise and plain pictures: a clip each, a picture at 500 ms of 1 s; some without sound."""
    for split, i in itertools.product(("train", "val", "test"), range(people)):
        clip = root / split / f"{split}{i}" / "клип 1"
        make_clip(clip, {"речь.wav": noise(16000, i)}, {"500.png": (20 * i, 100, 100)})
        if f"{split}{i}" in broken:
            (clip / "речь.wav").write_bytes(b"nonsense")
    return root


def pairs_of(root, seconds=0.25, batch=1, shuffle=False):
    """A dataset of the identities in a folder."""
    cfg, split = v.MatchSettings(seconds=seconds, size=32), v.Split(root, sorted(os.listdir(root)))
    return v.PairDataset(split._replace(names=np.array(split.names)), cfg, batch, 0, shuffle)


def read_log(out):
    """The lines of a run's log."""
    return [json.loads(line) for line in open(out / "log.jsonl", encoding="utf8")]


def observe(command, out, *argv):
    """Run a tiny training; what can be seen of it, a part of which each setting must change."""
    saves, loaders, printed = [], set(), io.StringIO()

    def save(path, *args, real=v.save_checkpoint, **more):
        saves.append((Path(path).name, more["step"]))
        real(path, *args, **more)

    def load(*args, real=torch.utils.data.DataLoader, **more):
        loaders.add(more["num_workers"])
        return real(*args, **more)

    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(printed):
        patch.setattr(v, "R1_EVERY", 2)
        patch.setattr(v, "save_checkpoint", save)
        patch.setattr(torch.utils.data, "DataLoader", load)
        run(command, "--out", out, *argv)
    state = torch.load(out / "last.pt", weights_only=True)
    parts = ("speech", "face") if command == "match-train" else ("g", "d", "g_ema")
    weights = [t.numpy().tobytes() for part in parts for t in state[part].values()]
    tests = re.findall("^validation.*", printed.getvalue(), re.M)
    return dict(weights=weights, metrics=(out / "metrics.json").read_text(), tests=tests,
                saves=saves, loaders=loaders, log=[line["step"] for line in read_log(out)])


@pytest.fixture(scope="session")
def corpus(tmp_path_factory):
    """A small synthetic corpus: 84 identities, 62 / 10 / 12."""
    root = tmp_path_factory.mktemp("data") / "corpus"
    run("make-data", root, "--identities", 84, "--seed", 3)
    return root


@pytest.fixture(scope="session")
def runs(corpus, tmp_path_factory):
    """{command: (run folder, what was observed)} of both trainings; "other" has another seed."""
    root, match = tmp_path_factory.mktemp("runs"), ()
    found = {}
    for name in ("match-train", "gan-train", "other"):
        match = ("--match", root / "match-train/best.pt") if name == "gan-train" else ()
        seed = ("--seed", 9) if name == "other" else ()
        command = name.replace("other", "match-train")
        found[name] = root / name, observe(command, root / name, "--data", corpus, *match, *seed)
    return found


@pytest.fixture(scope="session")
def trained(runs):
    """The run folder of match-train."""
    return runs["match-train"][0]


@pytest.fixture(scope="session")
def drawn(runs):
    """The run folder of gan-train."""
    return runs["gan-train"][0]


# ---- 1. Inference


def test_sinc_filters_are_numpys_band_passes():
    edges = np.linspace(2595 * np.log10(1 + 30 / 700), 2595 * np.log10(1 + 7900 / 700), 9)
    hz, n, got = 700 * (10 ** (edges / 2595) - 1), np.arange(101) - 50, v.SincConv(8, 101).filters()
    for i in range(8):
        low = 50 + hz[i]
        high = min(low + 50 + hz[i + 1] - hz[i], 8000)
        wide, narrow = (2 * f / 16000 * np.sinc(2 * f / 16000 * n) for f in (high, low))
        expected = (wide - narrow) * np.hamming(101) / (2 * (high - low) / 16000)
        np.testing.assert_allclose(got[i].detach().numpy(), expected, atol=2e-4)
    assert (got[:, 50] == 1).all()


def test_sinc_passes_its_band_and_stops_the_rest():
    layer = v.SincConv(8, 251)
    with torch.no_grad():
        layer.low_hz[:], layer.band_hz[:] = 1950, 950  # 2000 ... 3000 Hz
    tones = torch.tensor([2500, 2200, 2800, 500, 1700, 3300, 6000])[:, None]
    gains = layer(torch.sin(2 * math.pi * tones * torch.arange(8000) / 16000))[:, 0, 2000:6000]
    inside, *others = gains.amax(1).tolist()
    assert others[:2] == approx([inside, inside], rel=0.05) and max(others[2:]) < 0.01 * inside


def test_sinc_edges():
    with pytest.raises(ValueError, match="odd, got 250"):
        v.SincConv(4, 250)
    layer = v.SincConv(4, 31, stride=3).to(torch.float64)
    with torch.no_grad():
        layer.low_hz[:2], layer.band_hz[:2] = 1e5, -1e5  # far outside of 0 ... 8000 Hz
    out = layer(torch.randn(2, 100).double())
    assert out.dtype == layer.t.dtype == torch.float64 and out.shape == (2, 4, 34)
    out.square().sum().backward()
    assert out.isfinite().all() and layer.low_hz.grad.isfinite().all()


def test_published_sizes():
    match, gan = v.PAPER["match-train"], v.PAPER["gan-train"]
    with torch.device("meta"):
        speech = v.SpeechEncoder(match["speech_width"], match["sinc_stride"])
        face, generator = v.FaceEncoder(128, 64), v.Generator(match["size"], gan["width"])
        counts = [sum(p.numel() for p in net.parameters())
                  for net in (speech, face, generator, v.Discriminator(face))]
        face_map = face.blocks(torch.empty(1, 3, 128, 128))
    w, k = [64, 64, 128, 128, 256, 256, 512, 512], [251, 20, 11, 11, 11, 11, 11, 11]
    convs = 2 * 64 + sum(w[i - 1] * w[i] * k[i] for i in range(1, 8))
    expected = [convs + 3 * sum(w) + 512 * 128 + 128]  # batch norm, PReLU; the linear map
    blocks = [(3, 64, 64), (64, 64, 128), (128, 128, 256), (256, 256, 512), (512, 512, 1024),
              (1024, 1024, 1024)]  # 3x3, 3x3 and 1x1 convolutions
    face_count = sum(9 * a * h + h + 9 * h * b + b + a * b + b for a, h, b in blocks)
    expected.append(face_count + 1024 * 128 + 128)
    w = [1024, 1024, 512, 256, 128, 64]  # two 3x3 and a 1x1 convolution, two AdaIN
    blocks = sum(9 * a * b + 9 * b * b + a * b + 3 * b + 257 * 2 * (a + b) for a, b in zip(w, w[1:]))
    expected.append(257 * 1024 * 16 + blocks + 257 * 2 * 64 + 9 * 64 * 3 + 3)
    assert counts == [*expected, expected[1] + 1024] and face_map.shape == (1, 1024, 4, 4)
    lengths, small = [], v.SpeechEncoder(2).eval()
    small.acts[-1].register_forward_hook(lambda act, x, y: lengths.append(y[0, 0].numel()))
    small(torch.randn(1, 96000))
    assert lengths == [600]  # 6 s
    for network, size in itertools.product((v.FaceEncoder, v.Generator), (4, 48, 65)):
        with pytest.raises(ValueError, match=f"power of two from 8 on, got {size}"):
            network(size, 2)


def test_dblock_pools_before_its_shortcut_without_changing_it():
    block, x = v.DBlock(4, 6), torch.randn(2, 4, 8, 8)
    h = block.conv2(torch.relu(block.conv1(torch.relu(x))))
    assert_close(block(x), torch.nn.functional.avg_pool2d(h + block.skip(x), 2))


def test_embeddings_have_one_length_and_a_centred_start():
    torch.manual_seed(0)
    for encoder, x in ((v.SpeechEncoder(4, 8, 3.0), 0.1 * torch.randn(64, 4000)),
                       (v.FaceEncoder(32, 4, 3.0), torch.rand(64, 3, 32, 32) * 2 - 1)):
        before = encoder(x)
        v.centre_head(encoder, x)
        after, head = encoder(x), encoder.head(encoder.features(x))
        assert_close(after.norm(dim=1), torch.full((64,), 3.0))
        assert after.mean(0).norm() < 0.5 < 2 < before.mean(0).norm()  # no longer one direction
        assert head.mean(0).abs().max() < 1e-3 and (head.std(0) - 1).abs().max() < 1e-3


@pytest.mark.parametrize("rows, k", [(10, 5), (4, 4), (12, 2)])
def test_candidates_over_thousands_of_draws(rows, k):
    generator, counts = torch.Generator().manual_seed(0), np.zeros((rows, rows))
    for _ in range(3000):
        candidates = v.sample_candidates(rows, k, generator).numpy()
        assert candidates.shape == (rows, k) and (candidates[:, 0] == np.arange(rows)).all()
        assert all(len(set(row)) == k for row in candidates)  # so none meets itself again
        np.add.at(counts, (np.arange(rows)[:, None], candidates[:, 1:]), 1)
    share = (k - 1) / (rows - 1)
    tolerance = 5 * math.sqrt(3000 * share * (1 - share)) + 1e-9  # 5 sigma of a fair draw
    assert abs(counts[~np.eye(rows, dtype=bool)] - 3000 * share).max() <= tolerance
    with pytest.raises(v.UserError, match=f"K = {rows + 1} needs {rows + 1} identities at once"):
        v.sample_candidates(rows, rows + 1, generator)


@pytest.mark.parametrize("direction", ["v-f", "f-v"])
def test_equation_1_against_a_hand_computation(direction):
    speech, faces = np.random.default_rng(0).normal(size=(2, 5, 8))
    candidates, expected = np.array([[i, (i + 1) % 5, (i + 3) % 5] for i in range(5)]), []
    query, keys = (speech, faces) if direction == "v-f" else (faces, speech)
    for i in range(5):
        products = [math.exp(sum(query[i] * keys[j])) for j in candidates[i]]
        expected.append(-math.log(products[0] / sum(products)))
    logits = v.match_logits(*map(torch.tensor, (speech, faces, candidates)), direction)
    loss = torch.nn.functional.cross_entropy(logits, torch.zeros(5, dtype=torch.long))
    assert loss.item() == approx(np.mean(expected))


def test_equal_candidates_share_the_point():
    logits = torch.tensor([[1.0, 1, 1, 1], [2, 1, 2, 0], [0, 1, 1, 0], [5, 1, 2, 3]])
    assert v.top1(logits).tolist() == [0.25, 0.5, 0, 1]


# ---- 2. Generation


def test_adain_gives_the_styles_mean_and_deviation():
    torch.manual_seed(0)
    layer, x, style = v.AdaIN(5), 3 + 7 * torch.randn(4, 5, 6, 8), torch.randn(4, 2 * v.EMBED)
    scale, shift = layer.style(style).detach().numpy()[..., None, None].reshape(4, 2, 5, 1, 1
                                                                                ).swapaxes(0, 1)
    whitened = x.numpy() - x.numpy().mean((2, 3), keepdims=True)
    expected = (1 + scale) * whitened / whitened.std((2, 3), keepdims=True) + shift
    np.testing.assert_allclose(layer(x, style).detach().numpy(), expected, atol=1e-3)
    far = layer(x + 7000, style).detach().numpy()  # its mean is 1000 deviations away
    np.testing.assert_allclose(far, expected, atol=0.02)
    assert layer(torch.full((4, 5, 4, 4), 1e3), style).isfinite().all()  # no deviation at all


@pytest.mark.parametrize("size", [8, 32, 128])
def test_generator_shape_range_and_both_inputs(size):
    torch.manual_seed(0)
    generator, z, c = v.Generator(size, 2), torch.randn(3, 128), 3.5 * torch.randn(3, 128)
    faces = generator(z, c)
    assert faces.shape == (3, 3, size, size) and faces.abs().max() <= 1
    assert faces.std() > 0.05 and (faces.abs() > 0.95).float().mean() < 0.2  # neither grey nor full
    assert all((other - faces).abs().amax((1, 2, 3)).min() > 0.01
               for other in (generator(z + 1, c), generator(z, -c)))
    assert_close(generator(z, 9 * c), faces)  # c has one length
    assert_close(generator(z[:1], c[:1]), faces[:1])  # no batch statistics


def test_logit_is_equation_2_written_out():
    torch.manual_seed(0)
    face_encoder, faces, c = v.FaceEncoder(16, 2, 3.5), torch.randn(4, 3, 16, 16), torch.randn(4, 128)
    discriminator = v.Discriminator(face_encoder, weight=0.2)
    psi = face_encoder.features(faces) @ discriminator.psi.weight[0]
    expected = torch.stack([0.2 * c[i] @ face_encoder(faces)[i] + psi[i] for i in range(4)])
    assert_close(v.logit(c, *discriminator(faces)), expected, rtol=1e-4, atol=1e-5)
    for mine, theirs in zip(discriminator.phi.parameters(), face_encoder.parameters()):
        assert torch.equal(mine, theirs) and mine is not theirs and mine.requires_grad  # a copy


def test_losses_and_gradients_against_closed_forms():
    numbers = torch.randn(4, 7, dtype=torch.float64) * 3
    real, fake, match, mismatch = numbers.numpy()
    for loss, x in ((v.rel_loss, real - fake), (v.relid_loss, real - fake + match - mismatch)):
        used = [n.clone().requires_grad_(True) for n in numbers][:2 if loss is v.rel_loss else 4]
        value, sigmoid = loss(*used), 1 / (1 + np.exp(-x))
        assert value.item() == approx(-np.log(sigmoid).mean(), rel=1e-9)
        for gradient, sign in zip(torch.autograd.grad(value, used), (-1, 1, -1, 1)):
            np.testing.assert_allclose(gradient.numpy(), sign * (1 - sigmoid) / 7, rtol=1e-9)
        far = [torch.tensor([-1e4]), *[torch.zeros(1)] * (len(used) - 1)]
        assert loss(*far) == 1e4  # where log(sigmoid(x)) would be minus infinity


def test_r1_of_functions_with_known_gradients():
    faces, c, zero = torch.randn(5, 3, 4, 4), torch.arange(5.0)[:, None], torch.zeros(5)
    a = torch.tensor(2.0, requires_grad=True)
    penalty = v.r1_penalty(lambda f: (0 * c, a * f.sum((1, 2, 3))), faces, c)
    assert penalty.item() == approx(4 * 48)  # |a (1, ..., 1)|^2
    assert torch.autograd.grad(penalty, a)[0].item() == approx(2 * 2 * 48)
    penalty = v.r1_penalty(lambda f: (f.square().sum((1, 2, 3))[:, None], zero), faces, c)
    expected = [(2 * i * faces[i]).square().sum().item() for i in range(5)]  # of c |f|^2
    assert penalty.item() == approx(np.mean(expected), rel=1e-5) and not faces.requires_grad


def test_average_follows_the_generator():
    average, new = (torch.nn.Linear(1, 1, bias=False) for _ in range(2))
    average.weight.data.fill_(1.0), new.weight.data.fill_(2.0)
    v.update_ema(average, new, 0.9)
    assert average.weight.item() == approx(0.9 * 1 + 0.1 * 2) and new.weight.item() == 2


# ---- 3. Training


def test_a_match_step_goes_down_equation_1(corpus, tmp_path, monkeypatch):
    seen, losses, logits, descend = [], [], v.match_logits, v.descend
    monkeypatch.setattr(v, "match_logits", lambda *args: seen.append(args) or logits(*args))
    monkeypatch.setattr(v, "descend", lambda optimizer, loss, *rest: descend(
        optimizer, losses.append(loss.item()) or loss, *rest))
    run("match-train", "--data", corpus, "--out", tmp_path, "--eval-every", 9, "--steps", 2)
    for (se, fe, candidates, direction), loss in zip(seen, losses):
        similarity, expected = (se @ fe.T).double().detach().numpy(), []
        for i, row in enumerate(candidates.numpy()):
            assert row[0] == i and len(set(row)) == 4 and direction == "v-f"
            expected.append(np.log(np.exp(similarity[i, row]).sum()) - similarity[i, i])
        assert loss == approx(np.mean(expected), rel=1e-4)


def test_training_lowers_the_loss(corpus, tmp_path):
    run("match-train", "--data", corpus, "--out", tmp_path, "--batch", 24, "--steps", 120,
        "--seconds", 0.5, "--eval-every", 999, "--log-every", 30)
    losses = [line["loss"] for line in read_log(tmp_path)]
    assert len(losses) == 4 and losses[-1] < math.log(4) - 0.15 < losses[0]  # from log K down


def test_the_best_validation_is_what_is_tested(corpus, tmp_path, monkeypatch):
    scores, tested = iter([30.0, 10.0, 20.0]), []
    monkeypatch.setattr(v, "evaluate", lambda *args: {"v-f/10": next(scores)})
    monkeypatch.setattr(v, "report", lambda model, *rest: tested.append(model))
    run("match-train", "--data", corpus, "--out", tmp_path, "--steps", 6, "--save-every", 1)
    best, last = (torch.load(tmp_path / name, weights_only=True) for name in ("best.pt", "last.pt"))
    assert (best["step"], last["step"], last["best"]) == (2, 6, 30.0)
    assert torch.equal(tested[0].face_encoder.head.weight, best["face"]["head.weight"])


def test_learning_rates_rise_and_fall():
    for shares, peak in ((v.warm_cosine, 10), (v.late_fall, 1)):
        rates = [shares(step, 100) for step in range(1, 101)]
        assert max(rates) == rates[peak - 1] == 1 and min(rates) >= 0 and rates[-1] < 0.05


@pytest.mark.parametrize("loss", ["relid", "rel"])
def test_a_gan_step(loss, corpus, trained, tmp_path, monkeypatch):
    """D's step trains D on Eq. 5 or 4, then G's step trains G with real and fake swapped."""
    nets, seen, moved, roles = {}, {}, [], itertools.cycle("dg")

    def draw(net, z, c, real=v.Generator.forward):
        nets["g"], seen["c"], seen["fake"] = net, c, real(net, z, c)
        return seen["fake"]

    def judge(net, faces, real=v.Discriminator.forward):
        nets["d"] = net
        if len(faces) == 12:  # real and fake ones
            assert torch.equal(faces[6:], seen["fake"])
            seen["real"], seen["judge"] = faces[:6], functools.partial(real, net)
        return real(net, faces)

    def sample(rows, k, rng, real=v.sample_candidates):
        seen["others"] = real(rows, k, rng)[:, 1]
        assert (seen["others"] != torch.arange(rows)).all()  # a row is an identity
        return torch.stack([torch.arange(rows), seen["others"]], 1)

    def check(*terms, real=getattr(v, f"{loss}_loss")):
        role, c = next(roles), seen["c"]
        (phi, psi), (phi_fake, psi_fake) = seen["judge"](seen["real"]), seen["judge"](seen["fake"])
        g_real, g_fake = (c * phi).sum(1) + psi, (c * phi_fake).sum(1) + psi_fake
        phi = phi if role == "d" else phi_fake  # whose identity D is asked
        expected = [g_real, g_fake] if role == "d" else [g_fake, g_real]
        expected += [(c * phi).sum(1), (c[seen["others"]] * phi).sum(1)] * (loss == "relid")
        assert_close([t.detach() for t in terms], [t.detach() for t in expected])
        return real(*terms)

    def descend(*args, real=v.descend):
        before = {name: [p.clone() for p in net.parameters()] for name, net in nets.items()}
        real(*args)
        moved.append("".join(name for name, net in nets.items() if not all(
            map(torch.equal, net.parameters(), before[name]))))

    monkeypatch.setattr(v.Generator, "forward", draw)
    monkeypatch.setattr(v.Discriminator, "forward", judge)
    for name, spy in (("sample_candidates", sample), (f"{loss}_loss", check), ("descend", descend),
                      ("validate_generator", lambda *args: None), ("report", lambda *args: None)):
        monkeypatch.setattr(v, name, spy)
    run("gan-train", "--data", corpus, "--match", trained / "best.pt", "--out", tmp_path,
        "--loss", loss)
    assert moved == ["d", "g"] * 4 and next(roles) == "d"


def test_gan_train_keeps_encoders_and_an_average(drawn, trained):
    after = torch.load(drawn / "last.pt", weights_only=True)
    before = torch.load(trained / "best.pt", weights_only=True)
    for part in ("speech", "face"):
        assert all(torch.equal(after[part][key], t) for key, t in before[part].items())
    assert not torch.equal(after["g"]["last.weight"], after["g_ema"]["last.weight"])
    assert not torch.equal(after["d"]["phi.head.weight"], after["face"]["head.weight"])


CHANGES = dict(  # a setting: another value, and what it must change of what observe() sees
    runs=(3, "metrics"), val_clips=(4, "tests"), eval_every=(4, "tests"), save_every=(3, "saves"),
    log_every=(2, "log"), workers=(1, "loaders")) | {
    name: (value, "weights") for name, value in dict(
        seed=1, direction="f-v", k=3, steps=5, batch=8, seconds=0.3, size=64, sinc_stride=7,
        speech_width=6, face_width=6, embed_scale=5.0, lr=0.01, loss="rel", width=3, weight=0.5,
        c_scale=2.0, d_lr=0.01, gamma=5.0, ema_decay=0.5).items()}


@pytest.mark.parametrize("command, name", [
    (command, f.name) for command, kind in zip(COMMANDS, (v.MatchSettings, v.GanSettings))
    for f in fields(kind) if f.name not in ("device", "preset", "out", "resume")])  # see below
def test_every_setting_matters(command, name, runs, corpus, tmp_path):
    data = plain_corpus(tmp_path / "plain") if name == "data" else corpus
    match = runs["other" if name == "match" else "match-train"][0] / "best.pt"
    argv = ["--data", data] + ["--match", match] * (command == "gan-train")
    value, changed = CHANGES.get(name, (None, "weights"))
    argv += [v.flag(name), value] * (name in CHANGES)
    usual, got = runs[command][1], observe(command, tmp_path / "run", *argv)
    assert got[changed] != usual[changed]
    assert changed == "weights" or got["weights"] == usual["weights"]


def test_presets_and_help(capsys):
    def settings(*argv):
        return v.make_settings(v.make_parser().parse_args(argv))

    assert settings("match-train") == v.MatchSettings()
    assert settings("gan-train", "--preset", "paper", "--lr", "0.5") == v.GanSettings(
        **v.PAPER["gan-train"] | dict(preset="paper", lr=0.5))
    for command in (*COMMANDS, "match-test", "gan-test", "generate", "make-data", "check-data"):
        with pytest.raises(SystemExit, match="0"):
            v.main([command, "--help"])
        text = " ".join(capsys.readouterr().out.split())
        assert "(default: " in text
        kind = dict(zip(COMMANDS, (v.MatchSettings, v.GanSettings))).get(command)
        for f in fields(kind) if kind else ():
            assert v.flag(f.name) in text and f"(default: {f.default}" in text
        assert command != "match-train" or "(default: 64, paper: 128)" in text


def test_importing_does_nothing(tmp_path):
    code = f"import sys; sys.path.insert(0, {str(FILE.parent)!r}); import voice2face"
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr, [*tmp_path.iterdir()]) == (0, "", "", [])


# ---- 4. Evaluation


def test_k_way_planted_answers_and_brute_force():
    torch.manual_seed(1)
    same, constant, nobody = torch.randn(600, 128), torch.ones(600, 128), [{}] * 1000
    tests = [(f"{direction}/{k}", k) for direction in ("v-f", "f-v") for k in (2, 10)]
    assert v.matching_scores(same, same, nobody[:600], 0) == {key: 100 for key, _ in tests}
    blind = v.matching_scores(constant, constant, nobody[:600], 0)
    assert blind == {key: approx(100 / k) for key, k in tests}  # ties share the point
    faces = torch.randn(1000, 16)
    speech = (faces + 2 * torch.randn(1000, 16)) * 10 ** torch.randn(1000, 1)  # some are loud
    got = [v.matching_scores(speech, faces, nobody, seed) for seed in range(5)]
    rng, similarity = np.random.default_rng(0), {"v-f": (speech @ faces.T).numpy()}
    similarity["f-v"] = similarity["v-f"].T
    for key, k in tests:
        right = similarity[key[:3]].diagonal()[:, None]
        wrong = (np.arange(1000)[:, None] + 1 + np.argsort(rng.random((1000, 999)))[:, :k - 1]) % 1000
        hits = (np.take_along_axis(similarity[key[:3]], wrong, 1) < right).all(1)
        assert np.mean([row[key] for row in got]) == approx(100 * hits.mean(), abs=5)
    assert got[0]["v-f/10"] > got[0]["f-v/10"] + 10  # the directions differ


def test_same_gender_negatives_on_planted_embeddings():
    """Who knows but the gender scores 3 in 4 among all, and chance among the same gender."""
    genders = np.random.default_rng(0).permutation(["f", "m"] * 300).tolist() + [""] * 100
    people = [{"gender": g} for g in genders]  # nobody knows of the last hundred
    one_hot = torch.tensor([[g == "f", g == "m"] for g in genders]).float()
    rows = [v.matching_scores(one_hot[:600], one_hot[:600], people[:600], i) for i in range(20)]
    assert np.mean([row["v-f/2"] for row in rows]) == approx(75, abs=2)
    assert np.mean([row["f-v/10"] for row in rows]) == approx(20, abs=2)
    row = v.matching_scores(one_hot, one_hot, people, 0, "real/")
    assert row["real/v-f/2/gender"] == approx(50) and row["real/f-v/10/gender"] == approx(10)
    few = v.matching_scores(one_hot[:18], one_hot[:18], people[:18], 0)
    assert "v-f/2/gender" in few and ("v-f/10/gender" in few) == (
        max(genders[:18].count(g) for g in "fm") >= 10)


def test_untrained_networks_score_chance(corpus):
    torch.manual_seed(0)
    split, scores = v.open_corpus(corpus, dict(train=2))["train"], []
    for seed in range(4):
        model = v.Model(CFG, *v.make_encoders(CFG, CPU.device))
        scores.append(v.evaluate(model, split, {}, 2, seed, CPU))
    for key, chance in (("v-f/2", 50), ("f-v/2", 50), ("v-f/10", 10), ("f-v/10", 10)):
        assert np.mean([row[key] for row in scores]) == approx(chance, abs=6)


@pytest.mark.parametrize("link, table", [(0.5, (86.7, 73.1, 43.7, 28.4)),
                                         (0.75, (93.3, 87.3, 65.0, 49.5))])
def test_oracle_is_the_normals_log_ratio_and_scores_the_reference_table(link, table, monkeypatch):
    monkeypatch.setattr(v, "LINK", link)
    rng = np.random.default_rng(0)
    people = [v.sample_person(rng) for _ in range(6000)]
    voices, faces = v.oracle_embeddings(people)
    product = (voices[:40] @ faces[:40].T).double().numpy()
    heard, shown = (np.array([[p[side + name] for name in ("age", "tract", "build")]
                              for p in people[:40]]) for side in ("voice_", ""))
    a, b = heard[:, None], shown[None]  # (40, 1, 3), (1, 40, 3)
    joint = -(a * a - 2 * link * a * b + b * b) / 2 / (1 - link**2)  # of the bivariate normal
    gap = product - (joint + (a * a + b * b) / 2).sum(2)  # but for a constant the log ratio
    gender = np.array([p["gender"] for p in people[:40]])
    same = gender[:, None] == gender
    assert np.ptp(gap[same]) < 2e-3 and gap[~same].max() < gap[same].min() - 500
    scores = [v.matching_scores(voices, faces, people, seed) for seed in range(5)]
    for key, expected in zip(("2", "2/gender", "10", "10/gender"), table):
        assert np.mean([row[f"v-f/{key}"] for row in scores]) == approx(expected, abs=1.2)


def test_preference_and_distances_of_planted_faces():
    c = torch.randn(11, 4)
    assert v.preference(c, c, -c) == 100 and v.preference(c, -c, c) == 0
    assert v.preference(c, torch.cat([c[:4], -c[4:]]), 0 * c) == approx(400 / 11)
    people, counts = [{"gender": str(i % 2)} for i in range(11)], {"same gender": 0}
    by_gender = torch.tensor([[i % 2, 1 - i % 2] for i in range(11)]).float()
    for seed in range(10):
        panels = v.distance_panels(by_gender, -3 * by_gender, people, seed)
        for title, distance in (("same gender", 0), ("different gender", 1)):
            for values in panels[title]:
                assert_close(values, torch.full_like(values, distance))
        counts["same gender"] += len(panels["same gender"][0])
    assert 20 < counts["same gender"] < 90  # of 110 couples
    couples, _ = v.distance_panels(c, c, [{}] * 11, 0)["all couples"]
    assert len(couples) == 11 and couples.min() > 1e-4  # of two people each
    assert [*v.distance_panels(c, c, [{}] * 11, 0)] == ["all couples"]


def test_retrieval_of_planted_answers_and_brute_force():
    torch.manual_seed(0)
    real, fake = torch.randn(60, 8), torch.randn(60, 8)
    perfect = v.drawn_scores(real, real, real, [{}] * 60, 0)
    assert all(perfect[f"retrieval/{d}/1"] == 100 for d in ("L1", "L2", "cosine"))
    assert v.recall(torch.ones(60, 60), "r")["r/10"] == 0  # a constant answer finds nobody
    q, g = fake.numpy()[:, None], real.numpy()[None]
    cosine = (q * g).sum(2) / np.linalg.norm(q, axis=2) / np.linalg.norm(g, axis=2)
    scores = v.drawn_scores(real, fake, real, [{}] * 60, 0)
    for name, d in (("L1", abs(q - g).sum(2)), ("L2", (q - g).__pow__(2).sum(2)), ("cosine", -cosine)):
        for k in (1, 2, 5, 10):
            hits = [i in np.argsort(d[i])[:k] for i in range(60)]
            assert scores[f"retrieval/{name}/{k}"] == approx(100 * np.mean(hits))


def test_variance_shares_of_planted_factors():
    torch.manual_seed(0)
    a, b = torch.randn(30, 1, 2), torch.randn(1, 20, 2)
    a, b = a - a.mean(0), b - b.mean(1, keepdim=True)
    part = 9 * a.square().mean(0)[0] / (9 * a.square().mean(0) + b.square().mean(1))[0]
    for read, c, z, both in ((a + 0 * b, 1, 0, 0), (0 * a + b, 0, 1, 0), (a * b, 0, 0, 1),
                             (3 * a + b, part, 1 - part, 0)):
        shares = v.variance_shares(read)
        for name, expected in (("c", c), ("z", z), ("both", both)):
            np.testing.assert_allclose(shares[name], expected, atol=1e-5)


def test_probe_reads_factors_of_unseen_people(corpus):
    labels, splits = v.read_labels(corpus), v.open_corpus(corpus, dict(train=2, val=2, test=2))
    known = v.numbers([labels[n] for n in splits["train"].names], ["background"])
    probe = v.train_probe(splits["train"], (known - known.mean()) / known.std(),
                          v.Model(CFG, None, None), CPU, 0, steps=80, batch=16)
    _, faces, names = zip(*(v.sample_batch(splits[s], CFG, 99, 0, CPU) for s in ("val", "test")))
    truth = v.numbers([labels[n] for n in np.concatenate(names)], ["background"])
    assert v.pearson(probe(torch.cat(faces)), truth) > 0.7


def test_match_test_repeats_the_metrics(trained, corpus, tmp_path, capsys):
    def metrics(*more):
        run("match-test", "--data", corpus, "--match", trained / "best.pt", "--out", tmp_path,
            "--runs", 2, "--workers", 0, *more)
        return (tmp_path / "metrics.json").read_text()

    usual = (trained / "metrics.json").read_text()
    assert metrics() == usual and "V-F 10-way" in capsys.readouterr().out
    found = json.loads(usual)
    for key in ("v-f/2", "v-f/10", "f-v/2", "f-v/10", "v-f/2/gender"):
        assert {key, f"{key}/std", f"oracle/{key}"} <= found.keys() and 0 <= found[key] <= 100
    assert "v-f/10/gender" not in found  # 12 people have not ten of each gender
    others = {metrics(*more) for more in (("--split", "train"), ("--seed", 5), ("--runs", 1))}
    assert len(others | {usual}) == 4


# ---- 5. Figures, report, faces for any recording


def test_report_names_its_pictures_and_measures_everything(corpus, drawn, trained, tmp_path,
                                                           monkeypatch):
    monkeypatch.setattr(v, "train_probe", functools.partial(v.train_probe, steps=2, batch=8))
    run("gan-test", "--data", corpus, "--gan", drawn / "last.pt", "--out", tmp_path, "--runs", 2,
        "--workers", 0, "--baseline", drawn / "last.pt")
    metrics = json.loads((tmp_path / "metrics.json").read_text())
    page = (tmp_path / "report.md").read_text(encoding="utf8")
    keys = ("preferred over_baseline baseline/preferred qta1/all/r qta1/same/face f-v/10 v-f/10 "
            "qta1/different/c retrieval/L1/1 retrieval/L2/2 retrieval/cosine/10 v-f/2 f-v/2 "
            "baseline/retrieval/L1/5 oracle/retrieval/1 real/v-f/10 oracle/f-v/2 v-f/2/gender")
    for key in keys.split():
        assert f"| {key} | {metrics[key]:.2f} ± {metrics[f'{key}/std']:.2f} |" in page, key
    for name in v.FACTORS:
        shares = [metrics[f"control/{name}/{of}"] for of in ("c", "z", "both")]
        assert sum(shares) == approx(100, abs=0.1) and f"| control/{name}/probe" in page
    assert metrics["over_baseline"] == 50  # of itself
    usual = json.loads((trained / "metrics.json").read_text())  # the same people and windows
    assert all(metrics[f"real/{key}"] == x for key, x in usual.items() if key[:6] != "oracle")
    pictures = re.findall(r"!\[.*?\]\((.*?)\)", page)
    assert sorted(pictures) == sorted(p.name for p in tmp_path.glob("*.png")) and len(pictures) == 5
    assert all(min(Image.open(tmp_path / picture).size) > 100 for picture in pictures)


def test_report_of_people_without_labels(drawn, tmp_path):
    data = plain_corpus(tmp_path / "data", 6)
    run("gan-test", "--data", data, "--gan", drawn / "last.pt", "--out", tmp_path, "--runs", 1)
    metrics = json.loads((tmp_path / "metrics.json").read_text())
    assert "v-f/2" in metrics and "v-f/10" not in metrics and (tmp_path / "report.md").exists()
    assert not [key for key in metrics if key.startswith(("oracle", "control", "qta1/same"))]


def test_fakes_are_embedded_by_the_inference_stages_encoder(drawn):
    model, c = v.load_model(drawn / "last.pt", v.GanSettings, CPU), torch.randn(70, 128)
    z = torch.randn(70, 128, generator=torch.Generator().manual_seed(5))
    expected = model.face_encoder(model.g_ema(z, c)).detach()
    assert_close(v.embed_fakes(model, c, 5), expected, rtol=1e-3, atol=1e-4)


def test_generate_draws_for_any_recording(drawn, tmp_path):
    paths = [tmp_path / name for name in ("low.wav", "high stereo.wav", "短い.wav")]
    write_wav(paths[0], noise(8000 * 2), rate=8000)
    write_wav(paths[1], noise(2 * 44100).reshape(-1, 2), rate=44100)
    write_wav(paths[2], noise(1600, 1))  # less than this generator's window of 0.25 s

    def draw(out, *more):
        run("generate", *paths, "--gan", drawn / "last.pt", "--out", tmp_path / out, "-n", 3, *more)
        return tmp_path / out

    grid = np.asarray(Image.open(draw("new/faces.png")))
    assert grid.shape == (24 + 3 * (132 + 24), 3 * 132, 3)
    assert np.array_equal(grid, Image.open(draw("new/again.png")))
    assert not np.array_equal(grid, Image.open(draw("new/other.png", "--seed", "1")))
    names = [f"{i + 1:04}_{path.stem}_z{k}.png" for i, path in enumerate(paths) for k in (1, 2, 3)]
    assert sorted(p.name for p in draw("faces").iterdir()) == names
    faces = [np.asarray(Image.open(tmp_path / "faces" / name)) for name in names]
    assert {face.shape for face in faces} == {(32, 32, 3)}  # the generator's own size
    assert len({face.tobytes() for face in faces}) == 9
    assert np.array_equal(grid[48:176, 2:130], faces[0].repeat(4, 0).repeat(4, 1))  # no other z 1


# ---- 6. Data


@pytest.mark.parametrize("length, window, moment, guard", [
    (20, 5, None, 2), (20, 5, 7, 0), (20, 5, 9, 2), (20, 5, 0, 2), (20, 5, 19, 2), (20, 5, 40, 2),
    (20, 5, 21, 2), (9, 5, 4, 1), (20, 12, 13, 3), (9, 12, None, 1)])
def test_window_is_uniform_and_avoids_the_moment(length, window, moment, guard):
    held = set() if moment is None else set(range(moment - guard, moment + guard + 1))
    possible = [s for s in range(length - window + 1) if not held & set(range(s, s + window))]
    rng, counts = np.random.default_rng(0), {}
    for _ in range(3000):
        start, stop = v.sample_window(length, window, moment, guard, rng)
        assert 0 <= start < stop <= length and not held & set(range(start, stop))
        counts[start] = counts.get(start, 0) + 1
        longest = max(moment - guard, length - moment - guard - 1) if held else length
        assert stop - start == (window if possible else longest)  # nothing fits: the longer side
    fair = 3000 / max(1, len(possible))
    assert not possible or sorted(counts) == possible
    assert all(abs(n - fair) < 5 * math.sqrt(fair) for n in counts.values())


@pytest.mark.parametrize("rate", [8000, 16000, 44100])
def test_speech_never_holds_the_faces_time(rate, tmp_path):
    """The recording is a ramp, so that a window tells the times it covers; colours tell moments."""
    ramp, moments, seen = np.arange(3 * rate) / (3 * rate), (0, 700, 1500, 2200, 2999), set()
    pictures = {f"{ms}.png": (ms // 12, 0, 0) for ms in moments}
    make_clip(tmp_path / "p/c", {"speech.wav": ramp}, pictures, rate)
    pairs, rng = pairs_of(tmp_path, 0.6), np.random.default_rng(0)
    edge = 0 if rate == 16000 else 400  # where resampling rings
    for _ in range(1000):
        speech, face = pairs.load(0, rng)
        ms = min(moments, key=lambda m: abs(m // 12 - int(face[0, 0, 0])))
        inner = speech[edge:len(speech) - edge] * 3000  # ms
        assert inner.min() > ms + 1000 * v.GUARD - 0.2 or inner.max() < ms - 1000 * v.GUARD + 0.2
        assert np.ptp(inner) > 590 - 125 * edge / 1000
        seen.add(ms)
    assert seen == set(moments) and v.GUARD == 0.3


@pytest.mark.parametrize("sounds, faces", [("c/a.wav c/b.wav", "c"), ("s/a.wav", "f")])
def test_times_only_apply_in_a_clip_with_one_recording(sounds, faces, tmp_path):
    for name in sounds.split():
        make_clip(tmp_path / "p" / name[0], {name[2:]: np.arange(48000) / 48000}, {})
    make_clip(tmp_path / "p" / faces, {}, {"1500.png": (0, 0, 0)})
    pairs, rng = pairs_of(tmp_path, 1.0), np.random.default_rng(0)
    windows = [3 * pairs.load(0, rng)[0] for _ in range(100)]
    assert any(w.min() < 1.4 and w.max() > 1.6 for w in windows)


def test_pairs_stay_within_a_clip_and_half_of_the_faces_are_flipped(tmp_path):
    """Two clips of a person: loudness tells the recording's, colour the face's, a bar its side."""
    for c in range(2):
        pixels = np.full((40, 40, 3), 100 * c, np.uint8)
        pixels[:, :10] = 255
        sound = np.full(8000, 0.2 + 0.4 * c)
        make_clip(tmp_path / f"p/c{c}", {"s.wav": sound}, {"x.png": Image.fromarray(pixels)})
    for shuffle, share in ((True, 0.5), (False, 0)):
        found = [pairs_of(tmp_path, shuffle=shuffle).load(0, np.random.default_rng(i))
                 for i in range(300)]
        clips = [(speech[0] > 0.4, face[16, 16, 0] > 50) for speech, face in found]
        assert set(clips) == {(True, True), (False, False)}
        assert np.mean([face[16, 28, 0] == 255 for _, face in found]) == approx(share, abs=0.15)


def test_pictures_are_drawn_uniformly_among_the_persons_pictures(tmp_path):
    """VoxCeleb speech, VGGFace faces: folders of 9 pictures and of 1."""
    make_clip(tmp_path / "p/s", {"1.wav": noise(8000)}, {})
    for i in range(10):
        make_clip(tmp_path / f"p/f{i // 9}", {}, {f"{i}.png": (20 * i, 0, 0)})
    pairs, rng = pairs_of(tmp_path), np.random.default_rng(0)
    counts = np.bincount([pairs.load(0, rng)[1][0, 0, 0] // 20 for _ in range(1000)], minlength=10)
    assert abs(counts - 100).max() < 5 * math.sqrt(90)


def test_short_speech_is_repeated_and_long_is_cut_at_random(tmp_path):
    rng, short, long, starts = np.random.default_rng(0), noise(1000), noise(20000), set()
    write_wav(tmp_path / "s.wav", short), write_wav(tmp_path / "l.wav", long)
    got = v.load_speech(tmp_path / "s.wav", 0.25, rng)
    np.testing.assert_allclose(got, np.tile(short, 4), atol=1e-4)
    for _ in range(5):
        got = v.load_speech(tmp_path / "l.wav", 0.25, rng)
        start = int(np.argmin([abs(long[s:s + 20] - got[:20]).sum() for s in range(16001)]))
        np.testing.assert_allclose(got, long[start:start + 4000], atol=1e-4)
        starts.add(start)
    assert len(starts) > 1


@pytest.mark.parametrize("rate, channels", [(8000, 1), (16000, 2), (44100, 2), (48000, 6)])
def test_any_rate_and_channel_count_becomes_mono_16_khz(tmp_path, rate, channels):
    tone = 0.5 * np.sin(2 * np.pi * 1000 * np.arange(2 * rate) / rate)
    balance = np.linspace(0, 2, channels) if channels > 1 else np.ones(1)  # its mean is 1
    write_wav(tmp_path / "x.wav", tone[:, None] * balance / 2, rate)
    got = v.load_speech(tmp_path / "x.wav", 1.0, np.random.default_rng(0))
    assert got.shape == (16000,) and got.dtype == np.float32
    assert np.argmax(abs(np.fft.rfft(got[2000:14000] * np.hanning(12000)))) == 750  # 1000 Hz
    assert got[2000:14000].max() == approx(0.25, abs=0.01)


def test_only_the_window_of_a_wav_is_read(tmp_path, monkeypatch):
    write_wav(tmp_path / "long.wav", np.zeros((44100 * 60, 2)), 44100)
    read, readframes = [], wave.Wave_read.readframes
    monkeypatch.setattr(wave.Wave_read, "readframes",
                        lambda f, n: read.append(n) or readframes(f, n))
    assert len(v.load_speech(tmp_path / "long.wav", 1.0, np.random.default_rng(0))) == 16000
    assert read == [44100]


def test_other_formats_go_through_torchaudio(tmp_path, monkeypatch):
    stereo = torch.stack([torch.linspace(-1, 1, 32000), torch.zeros(32000)])
    monkeypatch.setattr(v.torchaudio, "load", lambda path: (stereo, 32000))
    write_wav(tmp_path / "x.wav", noise(99), width=4)
    (tmp_path / "x.mp3").write_bytes(b"ID3")
    for name in ("x.wav", "x.mp3"):
        x, rate = v.read_speech(tmp_path / name, lambda n, rate: (n - rate // 2, n))
        np.testing.assert_allclose(x, stereo.mean(0)[16000:].numpy())
        assert rate == 32000
    monkeypatch.setattr(v.torchaudio, "load", lambda path: exec("import no_such_decoder"))
    with pytest.raises(ValueError, match=r"x\.mp3: .*pip install torchcodec"):
        v.read_speech(tmp_path / "x.mp3")


def test_faces_are_square_cropped_resized_rgb_and_upright(tmp_path):
    wide = np.zeros((40, 80, 3), np.uint8)
    wide[:, 20:60] = (10, 200, 30)  # the central square
    wide[:20, 20:40] = (250, 0, 0)  # its upper left quarter
    Image.fromarray(wide).save(tmp_path / "w.png")
    face = v.load_face(tmp_path / "w.png", 32)
    assert face.shape == (32, 32, 3) and face.dtype == np.uint8 and tuple(face[4, 4]) == (250, 0, 0)
    assert tuple(face[4, 28]) == tuple(face[28, 4]) == (10, 200, 30)
    Image.new("L", (640, 480), 77).save(tmp_path / "g.jpg")
    assert abs(v.load_face(tmp_path / "g.jpg", 32).astype(int) - 77).max() <= 1
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by 90 degrees clockwise
    Image.fromarray(np.rot90(wide)).save(tmp_path / "e.png", exif=exif)
    assert np.array_equal(v.load_face(tmp_path / "e.png", 32), face)


def test_batches_are_a_function_of_seed_and_number_and_of_different_people(corpus):
    split = v.open_corpus(corpus, dict(train=2))["train"]
    make = functools.partial(v.PairDataset, split, CFG, 20)
    for a, b in zip(make(0, shuffle=True)[5][:3], make(0, shuffle=True)[5][:3]):
        assert torch.equal(a, b)
        assert not torch.equal(a, make(1, shuffle=True)[5][("float" not in str(a.dtype)) * 1]
                               if a.dtype == torch.float32 else a + 1)
    batches = [make(0, shuffle=True)[i] for i in range(20)] + [make(1, shuffle=True)[0]]
    assert len({batch[0].numpy().tobytes() for batch in batches}) == 21
    people = [batch[2].tolist() for batch in batches]
    assert all(len(set(row)) == 20 for row in people) and set(sum(people, [])) == set(range(62))
    test = make(0)
    assert [int(i) for n in range(len(test)) for i in test[n][2]] == [*range(62)]
    ahead, here = ([*v.load_batches(test, range(2), workers, CPU.device)] for workers in (1, 0))
    assert all(torch.equal(x, y) for p, q in zip(ahead, here) for x, y in zip(p[:3], q[:3]))
    assert_close(here[0][1], test[0][1].permute(0, 3, 1, 2).float() / 127.5 - 1)


def test_unreadable_people_are_named_replaced_in_training_and_left_out_in_tests(tmp_path, capsys):
    plain_corpus(tmp_path, 30, broken=["train7"])
    shutil.rmtree(tmp_path / "train/train8/клип 1")  # an empty folder is a fault, no end
    split = v.open_corpus(tmp_path, dict(train=30))["train"]
    pairs = v.PairDataset(split, CFG, 15, 0, shuffle=True)
    for _, _, identity, _ in v.load_batches(pairs, range(10), 0, CPU.device):
        names = set(split.names[identity])
        assert len(names) == 15 and not {"train7", "train8"} & names
    warned = capsys.readouterr().err
    assert warned.count("warning: left out: ") == len(warned.splitlines()) > 2
    assert "речь.wav: " in warned and "train8: no recording" in warned
    found = [v.PairDataset(split, CFG, 15, 0)[i] for i in range(2)]
    assert [sum(len(batch[part]) for batch in found) for part in (2, 3)] == [28, 2]


@pytest.mark.parametrize("split, people, broken, said", [
    ("train", 12, 9, "too many unreadable files"), ("train", 6, 1, "K = 6 needs 6 identities"),
    ("val", 10, 1, ""), ("val", 2, 1, "identities"), ("test", 7, 1, "")])
def test_too_few_readable_people_end_the_run_with_one_line(split, people, broken, said, tmp_path,
                                                           capsys):
    """Of a batch, of the batch's size, of K, of two, of a test's last batch; none hangs."""
    broken = [f"{split}{people - 1 - i}" for i in range(broken)]
    data = plain_corpus(tmp_path / "data", 12, broken)
    for i in range(people, 12):
        shutil.rmtree(data / split / f"{split}{i}")
    argv = ["match-train", "--data", data, "--out", tmp_path / "run", "--k", 6]
    if said:
        assert said in refused(capsys, *argv)
    else:
        run(*argv)
        assert f"{broken[0]}" in capsys.readouterr().err


def test_a_corpus_is_opened_by_one_listing_of_each_split(corpus, monkeypatch):
    listed = []
    for name in ("listdir", "scandir"):
        monkeypatch.setattr(v.os, name, lambda path, real=getattr(os, name): (
            listed.append(path), real(path))[1])
    found = v.open_corpus(corpus, dict(train=2, val=2, test=2))
    assert len(listed) == 3 and [len(split.names) for split in found.values()] == [62, 10, 12]
    few, names = v.thin(found["train"], 20).names, found["train"].names
    assert len(set(few)) == 20 and [few[0], few[-1]] == [names[0], names[-1]]


def test_check_data_lists_every_fault(tmp_path, capsys):
    plain_corpus(tmp_path)
    run("check-data", tmp_path)
    out = capsys.readouterr().out
    assert "0 faults" in out and "12 identities, 0.00 h of speech, 12 pictures" in out
    clip = tmp_path / "train/train0/клип 1"
    small = Image.new("RGB", (16, 99))
    make_clip(clip, {"empty.wav": [], "silent.wav": np.zeros(8000)}, {"tiny.png": small})
    cut = (clip / "500.png").read_bytes()[:60]
    for name, content in (("cut.wav", b"RIFF"), ("e.flac", b"no sound"), ("f.jpg", b"no picture"),
                          ("g.png", cut), ("._500.png", b"a hidden file is no data")):
        (clip / name).write_bytes(content)
    (tmp_path / "val/val3/клип 1/речь.wav").unlink()
    (tmp_path / "test/test5/клип 1/500.png").unlink()
    (tmp_path / "test/test6 empty").mkdir()
    assert v.main(["check-data", str(tmp_path)]) == 1
    out = capsys.readouterr().out
    faults = re.findall("^fault: .*", out, re.M)
    for part in ("empty.wav", "cut.wav", "silent.wav: silent", "e.flac", "f.jpg", "g.png",
                 "tiny.png: 16x99", "val3: no recording", "test5: no picture", "test6 empty: no"):
        assert sum(part in fault for fault in faults) == 1, part
    assert len(faults) == 10 and "10 faults" in out


# ---- 7. Synthetic people


def test_make_data_is_deterministic_and_labelled(tmp_path, corpus):
    for name, seed in (("again", 3), ("other", 4)):
        run("make-data", tmp_path / name, "--identities", 30, "--seed", seed)
    for name, equal in (("again", True), ("other", False)):
        files = [p.relative_to(tmp_path / name) for p in (tmp_path / name / "train").glob("*/*/*.wav")]
        assert len(files) == 10  # person i of a seed is one person, however many there are
        for file in files:
            assert ((corpus / file).read_bytes() == (tmp_path / name / file).read_bytes()) == equal
    labels = v.read_labels(corpus)
    for split in ("train", "val", "test"):
        named = {name for name, row in labels.items() if row["split"] == split}
        assert named == {p.name for p in (corpus / split).iterdir()}
    assert {*v.FACTORS, "voice_age", "pitch", "loudness", "tempo"} <= labels["id00000"].keys()


def test_linked_factors_correlate_by_link_and_nothing_else_does():
    rng = np.random.default_rng(0)
    people = [v.sample_person(rng) for _ in range(8000)]
    r = np.corrcoef([[person[name] for person in people] for name in people[0]])
    for (i, a), (j, b) in itertools.combinations(enumerate(people[0]), 2):
        assert r[i, j] == approx(v.LINK if "voice_" + b == a else 0, abs=0.05), (a, b)
    assert np.std([[p["age"], p["voice_age"]] for p in people], 0) == approx([1, 1], abs=0.04)


def test_each_factor_acts_on_its_own_side_only():
    person = v.sample_person(np.random.default_rng(5)) | dict(gender=0, glasses=0)

    def voice(p):
        return v.synth_speech(p, np.random.default_rng(1)).tobytes()

    def face(p):
        return v.draw_face(p, 0.5).tobytes()

    heard = {"gender", "voice_age", "voice_tract", "voice_build", "pitch", "loudness", "tempo"}
    for name, x in person.items():
        changed = person | {name: 0.7 * x + 0.1 if isinstance(x, float) else 1}
        assert (voice(changed) != voice(person)) == (name in heard), name
        assert (face(changed) != face(person)) == (name not in heard or name == "gender"), name


def test_the_mouth_opens_with_loudness(tmp_path, monkeypatch):
    opened = {}

    def draw(person, opening, real=v.draw_face):
        face = real(person, opening)
        face.save = lambda path, **more: opened.setdefault(int(path.stem), opening)
        return face

    monkeypatch.setattr(v, "draw_face", draw)
    v.write_person(tmp_path, 3, 0, "train")
    with wave.open(str(next(tmp_path.glob("*/*/*/*.wav")))) as f:
        power = (np.frombuffer(f.readframes(-1), "<i2") / 32768) ** 2
    rms = np.sqrt(np.convolve(power, np.ones(800) / 800, "same"))  # of the 50 ms around
    assert len(opened) == v.FRAMES and np.ptp([*opened.values()]) > 0.2
    for ms, opening in opened.items():
        assert opening == approx(rms[16 * ms] / rms.max(), abs=0.02)
    wide, shut = ((np.asarray(v.draw_face(v.sample_person(np.random.default_rng(0)), opening))
                   == v.MOUTH).all(2).sum() for opening in (1, 0))
    assert wide > 3 * shut


def test_gender_is_heard_as_pitch():
    base = v.sample_person(np.random.default_rng(0)) | dict(voice_age=-1.0, pitch=0.0)
    for gender, hz in ((0, 210), (1, 110)):
        x = v.synth_speech(base | dict(gender=gender), np.random.default_rng(0)).astype(float)
        auto, lags = np.fft.irfft(abs(np.fft.rfft(x, 2 * len(x))) ** 2), np.arange(53, 228)
        assert 16000 / lags[np.argmax(auto[lags])] == approx(hz, rel=0.25)


# ---- 8. Plumbing: resume, processes, precision


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
        state = torch.load(path, weights_only=True) if path.suffix == ".pt" else path.read_bytes()
        for key in v.MAY_CHANGE if path.suffix == ".pt" else ():
            state["settings"].pop(key, None)
        found |= leaves(state, path.name)
    return found


def differences(a, b):
    """What two runs left that is not equal bit for bit."""
    a, b = left_by(a), left_by(b)
    assert sum(isinstance(x, torch.Tensor) for x in a.values()) > 10 and "metrics.json" in a
    return [key for key in a.keys() | b.keys() if key not in a or key not in b or not (
        torch.equal(a[key], b[key]) if isinstance(a[key], torch.Tensor) else a[key] == b[key])]


@pytest.mark.parametrize("command", COMMANDS)
def test_a_run_stopped_and_resumed_ends_as_one_left_alone(command, corpus, trained, tmp_path,
                                                          monkeypatch, capsys):
    argv = [command, *TINY[command], "--data", corpus, "--steps", 8, "--save-every", 3]
    argv = [str(a) for a in argv + ["--match", trained / "best.pt"] * (command == "gan-train")]
    assert v.main([*argv, "--out", str(tmp_path / "whole")]) == 0
    calls, codes = itertools.count(1), []

    def interrupted(*args, real=v.descend):
        if next(calls) % 7 == 0:
            raise KeyboardInterrupt
        real(*args)

    monkeypatch.setattr(v, "descend", interrupted)
    while not codes or codes[-1]:
        codes.append(v.main([*argv, "--out", str(tmp_path / "part"), "--resume"]))
    assert set(codes[:-1]) == {130} and "--resume goes on" in capsys.readouterr().err
    assert differences(tmp_path / "whole", tmp_path / "part") == []


def child(argv):
    """A process's work: a command, silently."""
    sys.stdout = sys.stderr = open(os.devnull, "w")
    torch.set_num_threads(1)
    sys.exit(v.main(argv))


def kill(times):
    """Kill both trainings at random moments, resume, print whether they end as left alone."""
    torch.set_num_threads(1)  # where there is fork, a child has torch in memory, but no threads
    context = multiprocessing.get_context("fork" if hasattr(os, "fork") else "spawn")
    scratch, different = tempfile.TemporaryDirectory(ignore_cleanup_errors=True), 0
    folder = Path(scratch.name)
    data = plain_corpus(folder / "data")

    def start(command, out, workers):
        argv = [command, *TINY[command], "--data", data, "--steps", 24, "--eval-every", 5, "--runs",
                1, "--save-every", 2, "--workers", workers, "--out", out, "--resume"]
        argv += ["--match", folder / "match-train/best.pt"] * (command == "gan-train")
        process = context.Process(target=child, args=([str(a) for a in argv],))
        process.start()
        return process

    for i in range(times):
        command, out, workers = COMMANDS[2 * i // times], folder / str(i), i % 2
        if not (folder / command).exists():
            begun = time.time()
            start(command, folder / command, workers).join()
            seconds = time.time() - begun
        process = start(command, out, workers)
        time.sleep(random.uniform(0, 0.9 * seconds))
        process.kill(), process.join()
        step = read_log(out)[-1]["step"] if (out / "log.jsonl").exists() else 0
        again = start(command, out, 1 - workers)
        again.join()
        found = ["its exit code"] if again.exitcode else differences(folder / command, out)
        different += bool(found)
        print(f"{command}: ended with {process.exitcode} after step {step} of 24, then resumed: "
              f"{'DIFFERENT in ' + ', '.join(found) if found else 'equal'}", flush=True)
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
    line = refused(capsys, "match-train", "--data", corpus, "--out", tmp_path, "--save-every", 2)
    assert "last.pt: cannot be written" in line and str(fault.args[-1]) in line
    assert torch.load(tmp_path / "last.pt", weights_only=True)["step"] == 2
    assert not [*tmp_path.glob("*.part")]


@pytest.mark.parametrize("command", COMMANDS)
def test_a_diverging_run_says_so_and_saves_no_nan(command, corpus, trained, tmp_path, capsys):
    more = ["--match", trained / "best.pt"] * (command == "gan-train")
    line = refused(capsys, command, "--data", corpus, "--out", tmp_path, "--lr", 1e25, "--steps", 24,
                   "--eval-every", 99, "--save-every", 1, *more)
    assert "weights are NaN, the run diverged" in line and "--lr" in line
    for path in tmp_path.glob("*.pt"):
        saved = leaves(torch.load(path, weights_only=True))
        assert all(x.isfinite().all() for key, x in saved.items() if key.endswith("head.weight"))


def spy_on_descend(patch):
    """A list that gets [gradients, weights] of each step down; none is cut, R1 is in each."""
    seen, descend = [], v.descend

    def spied(optimizer, loss, share, *rest):
        descend(optimizer, loss, share)
        weights = [p for group in optimizer.param_groups for p in group["params"]]
        seen.append([[p.grad.clone() for p in weights], [p.detach().clone() for p in weights]])

    patch.setattr(v, "descend", spied)
    patch.setattr(v, "R1_EVERY", 1)
    return seen


SPY = f"""
import os, sys
sys.path.insert(0, {str(FILE.parent)!r})
import torch, test_voice2face as t
torch.set_num_threads(1)
seen = t.spy_on_descend(t.pytest.MonkeyPatch())
t.run(*sys.argv[2:])
torch.save(seen, f"{{sys.argv[1]}}/rank{{os.environ['RANK']}}.pt")
sys.stdout.flush()
os._exit(0)
"""


@pytest.mark.parametrize("command", COMMANDS)
def test_two_processes_train_on_the_mean_of_their_losses(command, corpus, trained, tmp_path,
                                                         monkeypatch):
    argv = [command, "--data", corpus, "--steps", 3, "--eval-every", 3]
    argv += ["--match", trained / "best.pt", "--d-lr", 0] * (command == "gan-train")
    (tmp_path / "spy.py").write_text(SPY)
    with socket.socket() as port:
        port.bind(("127.0.0.1", 0))
        free = port.getsockname()[1]
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2",
                f"--master-port={free}", tmp_path / "spy.py", tmp_path]
    done = subprocess.run([*torchrun, *map(str, argv), "--out", tmp_path / "run"], timeout=300,
                          capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("step 3/3") == 1 and (tmp_path / "run/metrics.json").exists()
    both = [torch.load(tmp_path / f"rank{rank}.pt") for rank in range(2)]
    one, other = map(leaves, both)  # gradients and weights of every step
    assert len(one) > 100 and all(torch.equal(x, other[key]) for key, x in one.items())
    alone = []
    for rank in range(2):  # what each would have done in the first step without the other
        def as_rank(machine, name, real=v.Machine.__init__, rank=rank):
            real(machine, name)
            machine.rank, machine.is_first = rank, False

        with monkeypatch.context() as patch:
            patch.setattr(v.Machine, "__init__", as_rank)
            alone.append(spy_on_descend(patch))
            run(*argv, "--out", tmp_path / f"alone{rank}")
    for part in range(1 if command == "match-train" else 2):  # D, whose rate is 0, then G
        for mean, a, b in zip(both[0][part][0], alone[0][part][0], alone[1][part][0], strict=True):
            assert_close(mean, (a + b) / 2, rtol=1e-3, atol=1e-5)
            assert not torch.equal(a, b)  # each has its own batch


@pytest.mark.parametrize("command", COMMANDS)
def test_bfloat16_changes_little_and_spares_r1(command, corpus, trained, tmp_path, monkeypatch):
    argv = ["--data", corpus, "--eval-every", 9]
    argv += ["--match", trained / "best.pt"] * (command == "gan-train")
    full, kinds, halved = observe(command, tmp_path / "full", *argv), set(), []

    def native(machine, name, real=v.Machine.__init__):
        real(machine, name)
        machine.autocast = torch.autocast("cpu", torch.bfloat16)

    monkeypatch.setattr(v.Machine, "__init__", native)
    monkeypatch.setattr(v, "r1_penalty", lambda *args, real=v.r1_penalty: halved.append(
        torch.is_autocast_enabled("cpu")) or real(*args))
    hook = torch.nn.modules.module.register_module_forward_hook(
        lambda net, x, y: kinds.add(y.dtype) if isinstance(net, torch.nn.Conv2d) else None)
    half = observe(command, tmp_path / "half", *argv)
    hook.remove()
    for a, b in zip(read_log(tmp_path / "full")[:3], read_log(tmp_path / "half")[:3]):
        for key in a.keys() & {"loss", "loss_d", "loss_g", "match_real", "mismatch_real"}:
            assert b[key] == approx(a[key], rel=0.1, abs=0.1)
    assert torch.bfloat16 in kinds and full["weights"] != half["weights"]
    assert halved == [False] * (2 if command == "gan-train" else 0)
    assert [*map(len, full["weights"])] == [*map(len, half["weights"])]  # weights stay float32


@pytest.mark.parametrize("native", [True, False])
def test_a_gpu_computes_in_bfloat16_only_where_it_is_native(native, monkeypatch):
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", False)
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: None)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported",
                        lambda including_emulation=True: including_emulation or native)  # a T4
    monkeypatch.setattr(v.torch, "zeros", lambda n, device: torch.empty(n, device="meta"))
    monkeypatch.setattr(v.torch, "autocast", lambda kind, dtype, enabled: (kind, dtype, enabled))
    meta = v.Machine("meta")
    assert meta.autocast[2] is False
    fake = SimpleNamespace(device=torch.device("cuda:0"))
    monkeypatch.setattr(v.torch, "zeros", lambda n, device: fake)
    assert v.Machine("cuda").autocast == ("cuda", torch.bfloat16, native)


# ---- 9. Mistakes that people make

MISTAKES = """
match-train --data {mess}/none --out {new} => none.train: no such folder; a corpus is
match-train --data {mess}/no_val --out {new} => val: no such folder
match-train --data {mess}/both --out {new} => test.train0: is also in .*train; one split only
match-train --data {mess}/column --out {new} => labels.csv: must be CSV in UTF-8 with a column
match-train --data {mess}/latin --out {new} => labels.csv: must be CSV in UTF-8
match-train --data {corpus} --out {new} --batch 99 => train: 62 identities, at least 99 are needed
match-train --data {corpus} --out {new} --k 7 => --batch 6: must be at least --k 7
match-train --data {corpus} --out {new} --seconds 0.01 => --seconds 0.01: must be 0.24 to 60
match-train --data {corpus} --out {new} --lr nan => --lr nan: must be at least 0
match-train --data {corpus} --out {new} --device cuda:77 => --device cuda:77: not here, use cpu or
match-train --data {corpus} --out {match} => --out .*: holds a run; name another folder, or --resume
match-train --data {corpus} --out {match} --lr 0.1 --resume => the run in .* has --lr 0.05, not 0.1
match-train --data {corpus} --out {mess}/text --resume => last.pt: not a checkpoint, or damaged
match-train --data {corpus} --out {mess}/cut --resume => last.pt: not a checkpoint, or damaged
match-test --data {corpus} --match {mess}/none.pt => none.pt: no such checkpoint; match-train and
gan-test --data {corpus} --gan {match}/best.pt => best.pt: holds MatchSettings, not GanSettings
generate {mess}/none.wav --gan {gan}/last.pt => none.wav: not a readable recording
generate {mess}/quiet.wav --gan {gan}/last.pt => quiet.wav: silent
generate {mess}/zero.wav --gan {gan}/last.pt => zero.wav: no speech in it
make-data {corpus} => corpus: exists already
""".strip().splitlines()


@pytest.fixture(scope="session")
def mess(tmp_path_factory, trained):
    """A folder of faulty corpora, recordings and checkpoints."""
    root = tmp_path_factory.mktemp("mess")
    for name in ("no_val", "both", "column", "latin"):
        plain_corpus(root / name, 6)
    shutil.rmtree(root / "no_val/val")
    shutil.copytree(root / "both/train/train0", root / "both/test/train0")
    (root / "column/labels.csv").write_text("name;gender\n1;f\n")
    (root / "latin/labels.csv").write_bytes("identity\nRené\n".encode("latin-1"))
    make_clip(root, {"quiet.wav": np.zeros(16000), "zero.wav": []}, {})
    for name, content in (("text", b"hello"), ("cut", (trained / "last.pt").read_bytes()[:9000])):
        (root / name).mkdir()
        (root / name / "last.pt").write_bytes(content)
    return root


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_one_line_that_says_what_and_where(mistake, corpus, trained, drawn, mess,
                                                        tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    argv, said = mistake.split(" => ")
    names = dict(corpus=corpus, match=trained, gan=drawn, mess=mess, new=tmp_path / "new")
    line = refused(capsys, *(part.format(**names) for part in argv.split()))
    assert re.search(said, line), line
    assert not (tmp_path / "new").exists()  # before anything was made


@pytest.mark.parametrize("argv", [
    "match-train --stepps 4", "match-train --size 48", "gan-train --lr x", "gan-train --loss wgan",
    "match-tset", "", "generate"])
def test_what_the_parser_refuses(argv, capsys):
    with pytest.raises(SystemExit, match="2"):
        v.main(argv.split())
    assert "error: " in capsys.readouterr().err


# ---- bench


def bench():
    """Print what the loader and a training step take, and what a large corpus takes to open."""
    with tempfile.TemporaryDirectory() as scratch:
        root = Path(scratch)
        v.main(["make-data", str(root / "few"), "--identities", "200"])
        split, took = v.open_corpus(root / "few", dict(train=2))["train"], []
        cfg = v.MatchSettings(**v.PAPER["match-train"])
        for i in range(12):
            start = time.perf_counter()
            v.PairDataset(split, cfg, cfg.batch, 0, shuffle=True)[i]
            took.append(time.perf_counter() - start)
        rate = cfg.batch / np.median(took[2:])
        print(f"loader, 6 s of WAV and a 128x128 JPEG, one core: {rate:.0f} pairs/s")

        def step_ms(command, name, *more):
            argv = [command, "--data", root / "few", "--out", root / name, "--eval-every", 9999,
                    "--log-every", 5, "--steps", 60, "--runs", 1, *more]
            with contextlib.redirect_stdout(io.StringIO()):
                v.main([str(a) for a in argv])
            rates = [line["clips_per_s"] for line in read_log(root / name)]
            ms = 1000 * v.make_parser().parse_args([command]).flags["batch"].default
            ms /= np.median(rates[2:])
            print(f"{name}: {ms:.0f} ms a step, default {command}, {os.cpu_count()} cores")
            return ms

        ten, two = (step_ms("match-train", f"K = {k}", "--k", k) for k in (10, 2))
        print(f"K = 10 takes {ten / two:.2f} times as long as K = 2")
        step_ms("gan-train", "relid", "--match", root / "K = 10/best.pt")
        for i in range(100_000):
            (root / "many/train" / f"identity{i:06}").mkdir(parents=True)
        start, before = time.time(), peak_mb()
        split = v.open_corpus(root / "many", dict(train=2))["train"]
        print(f"opening 100,000 identities: {time.time() - start:.1f} s; the names take "
              f"{split.names.nbytes / 2**20:.0f} MB, the peak grew by {peak_mb() - before:.0f} MB")


def peak_mb():
    """The most memory that this process has had, in MB (Linux)."""
    import resource  # not on Windows
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


if __name__ == "__main__":
    if sys.argv[1:2] == ["kill"]:
        sys.exit(kill(int(sys.argv[2])))
    sys.exit(bench() if sys.argv[1:2] == ["bench"] else pytest.main([__file__, *sys.argv[1:]]))
