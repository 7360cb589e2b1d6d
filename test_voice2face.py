# /// script
# requires-python = ">=3.10"
# dependencies = ["torch==2.11.0", "torchaudio==2.11.0", "numpy", "pillow>=10.4", "pytest"]
# ///
"""Tests of voice2face.py: parts against independent computations, then each command.

uv run test_voice2face.py          the tests (any pytest option may follow)
uv run test_voice2face.py kill 20  kill training 20 times, resume, compare the ends
uv run test_voice2face.py bench    speed of the loader at the paper's sizes
"""

import itertools
import json
import math
import os
import random
import re
import runpy
import shutil
import subprocess
import sys
import tempfile
import time
import timeit
import wave
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from pytest import approx
from torch.nn import functional as F
from torch.testing import assert_close

import voice2face as v

torch.set_num_threads(1)  # networks this small are no faster on more
os.environ["OMP_NUM_THREADS"] = "1"  # in the processes started here, too
FILE = Path(v.__file__)
v.R1_EVERY = 2  # tiny runs are too short for the usual one
TRAININGS = ("match-train", "gan-train")
TINY = "--steps 4 --batch 6 --eval-every 2 --log-every 1 --runs 2 --device cpu"
TINY_SIZES = "--k 4 --seconds 0.25 --size 32 --speech-width 4 --face-width 4"
TINY_FLAGS = {"match-train": f"{TINY} {TINY_SIZES}", "gan-train": f"{TINY} --width 2"}
CFG = SimpleNamespace(size=32, seconds=0.25)  # of a PairDataset
CPU = torch.device("cpu")


def seeded(seed=0):
    return np.random.default_rng(seed)


def run(*argv):
    return v.main([str(x) for x in argv])


def tiny(command, data, out, *more):
    """The command line of a training on tiny settings."""
    return [command, *TINY_FLAGS[command].split(), "--data", data, "--out", out, *more]


def refused(capsys, *argv):
    """The one line on stderr of a command that must end with exit code 2."""
    capsys.readouterr()
    assert run(*argv) == 2
    lines = capsys.readouterr().err.splitlines()
    (line,) = [x for x in lines if not x.startswith("warning: left out")]
    assert line.startswith("voice2face: error: ")
    return line


def load(path):
    return torch.load(path, weights_only=True)


def read_log(out):
    return [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]


def read_metrics(out):
    return json.loads((out / "metrics.json").read_text())


def noise(length, seed=0):
    return seeded(seed).uniform(-0.5, 0.5, length)


def write_wav(path, samples, rate=16000, width=2):
    samples = np.asarray(samples, float)
    channels = 1 if samples.ndim == 1 else samples.shape[1]
    with wave.open(str(path), "wb") as file:
        file.setparams((channels, width, rate, 0, "NONE", ""))
        file.writeframes((samples * 32767).astype(f"<i{width}").tobytes())


def write_image(path, color, mode="RGB", size=(40, 40)):
    image = Image.new(mode, size, color)
    image.paste("black", (0, 0, 2, 2))  # of one colour it would be refused
    image.save(path)


@pytest.fixture
def wav(tmp_path):
    """A recording of a second of noise."""
    write_wav(tmp_path / "s.wav", noise(16000))
    return tmp_path / "s.wav"


def make_clip(folder, sounds, colors, rate=16000):
    """A clip of {name: samples} and {name: colour of a picture}."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, samples in sounds.items():
        write_wav(folder / name, samples, rate)
    for name, color in colors.items():
        write_image(folder / name, color)


def plain_corpus(root, people=12):
    """Noise and plain pictures: a clip each, with a picture at 500 ms of 1.5 s."""
    for split in v.SPLITS:
        for i in range(people):
            clip = root / split / f"{split}{i}" / "клип 1"
            color = (20 * i + 20, 100, 100)
            make_clip(clip, {"речь.wav": noise(24000, i)}, {"500.png": color})
    return root


def pairs_of(root, training, batch=1, seed=0, cfg=CFG):
    names = np.array(sorted(os.listdir(root)))
    return v.PairDataset(v.Split(root, names, {}), cfg, batch, seed, training)


@pytest.fixture(scope="session")
def corpus(tmp_path_factory):
    """A small synthetic corpus: 84 identities, 62 / 10 / 12."""
    root = tmp_path_factory.mktemp("data") / "corpus"
    run("make-data", root, "--identities=84", "--seed=3")
    return root


@pytest.fixture(scope="session")
def plain(tmp_path_factory):
    return plain_corpus(tmp_path_factory.mktemp("plain"))


@pytest.fixture(scope="session")
def match_run(corpus, tmp_path_factory):
    out = tmp_path_factory.mktemp("match")
    assert run(*tiny("match-train", corpus, out)) == 0
    return out


@pytest.fixture(scope="session")
def argv(corpus, match_run):
    """A function that gives the command line of a tiny training."""

    def line(command, out, *more):
        if command == "gan-train":
            more = ("--match", match_run / "best.pt", *more)
        return tiny(command, corpus, out, *more)

    return line


@pytest.fixture(scope="session")
def gan_run(argv, tmp_path_factory):
    out = tmp_path_factory.mktemp("gan")
    assert run(*argv("gan-train", out)) == 0
    return out


@pytest.fixture(scope="session")
def usual(match_run, gan_run):
    return {"match-train": match_run, "gan-train": gan_run}


# ---- Inference and generation --------------------------------------------------------


def test_sinc_filters_are_numpys_band_passes():
    edges = 700 * (np.geomspace(1 + 30 / 700, 1 + 7900 / 700, 9) - 1)  # even in mel
    t = (np.arange(101) - 50) / 8000
    filters = v.SincConv(8, 101).filters().detach().numpy()
    low = 50 + edges[:-1, None]
    high = np.minimum(low + 50 + np.diff(edges)[:, None], 8000)
    wide = high * np.sinc(high * t)
    narrow = low * np.sinc(low * t)
    expected = (wide - narrow) * np.hamming(101) / (high - low)
    np.testing.assert_allclose(filters, expected, atol=2e-4)


# Counted by formulas from PASE's layers and SNGAN's blocks; F's last block keeps its
# input, G's norms read 256 numbers, D adds to F a linear layer on 2 * 1024 numbers.
PUBLISHED = {"S": 5_830_528, "F": 29_148_032, "G": 36_803_843, "D": 29_150_081}


def test_networks_have_the_published_number_of_parameters():
    networks = {"F": v.FaceEncoder(128, 64), "G": v.Generator(128, 64)}
    networks["S"] = v.SpeechEncoder(64, 1)
    networks["D"] = v.Discriminator(networks["F"])
    for name, network in networks.items():
        assert sum(x.numel() for x in network.parameters()) == PUBLISHED[name], name


def test_six_seconds_of_speech_give_pases_600_frames():
    assert v.SpeechEncoder(2).body(torch.randn(1, 1, 96000)).shape == (1, 16, 600)


@pytest.mark.parametrize("place, side", [(1, 4), (-1, 8)])
def test_dblock_pools_before_its_skip_but_the_last_does_not(place, side):
    block = v.FaceEncoder(32, 4).blocks[place]
    x = torch.randn(2, block.conv1.in_channels, 8, 8)
    h = block.skip(x) + block.conv2(torch.relu(block.conv1(torch.relu(x))))
    assert_close(block(x), F.adaptive_avg_pool2d(h, side))


def test_embeddings_have_one_length():
    speech_emb = v.SpeechEncoder(4, 8, 3.5)(torch.randn(8, 4000))
    face_emb = v.FaceEncoder(32, 4, 3.5)(torch.randn(8, 3, 32, 32))
    lengths = torch.cat([speech_emb, face_emb]).norm(dim=1)
    assert lengths.tolist() == approx([3.5] * 16)


@pytest.mark.parametrize("loudness, offset", [(1, -0.5), (0.2, 0), (5, 0)])
def test_speech_encoder_ignores_a_microphones_offset_and_loudness(loudness, offset):
    """In training mode, where batch norm keeps embeddings of a batch apart."""
    torch.manual_seed(0)
    encoder = v.SpeechEncoder(4, 8)
    speech = 0.1 * torch.randn(8, 16000)
    changed = speech.clone()
    changed[::2] = loudness * speech[::2] + offset
    before = encoder(speech)
    assert F.cosine_similarity(before, encoder(changed)).min() > 0.999
    assert F.cosine_similarity(before, before.roll(1, 0)).min() < 0.9


@pytest.mark.parametrize("n, k", [(10, 5), (4, 4), (12, 2)])
def test_candidates_over_thousands_of_draws(n, k):
    """Each other row is drawn equally often, within some 5 deviations."""
    rng = v.make_rng(0)
    counts = torch.zeros(n, n)
    for _ in range(3000):
        candidates = v.sample_candidates(n, k, rng)
        assert candidates[:, 0].tolist() == list(range(n))
        chosen = F.one_hot(candidates, n).sum(1)
        assert chosen.max() == 1  # no repeats
        assert (chosen.sum(0) == k).all()
        counts += chosen
    with pytest.raises(v.UserError):
        v.sample_candidates(k - 1, k)
    expected = torch.full((n, n), (k - 1) / (n - 1)).fill_diagonal_(1)
    assert_close(counts / 3000, expected, rtol=0, atol=0.045)


@pytest.mark.parametrize("direction", v.DIRECTIONS)
def test_logits_are_inner_products_of_the_query_with_its_candidates(direction):
    speech, faces = torch.randn(2, 5, 8)
    candidates = v.sample_candidates(5, 3)
    logits = v.match_logits(speech, faces, candidates, direction)
    similarity = speech @ faces.T if direction == "v-f" else faces @ speech.T
    assert_close(logits, similarity.gather(1, candidates))


def test_match_loss_is_equation_1():
    logits = torch.randn(5, 3)
    losses = []
    for row in logits.tolist():
        losses.append(math.log(sum(map(math.exp, row))) - row[0])
    assert v.match_loss(logits).item() == approx(np.mean(losses))


def test_equally_good_candidates_share_a_hit():
    logits = torch.tensor([[5, 1, 2, 3], [1, 2, 0, 0], [1, 1, 1, 1]])
    assert v.top1(logits).tolist() == [1, 0, 0.25]
    assert not v.top1(math.nan * logits).any()


def test_adain_gives_mean_and_deviation_of_the_style():
    layer = v.AdaIN(5)
    x = 3 + 7 * torch.randn(4, 5, 6, 8)
    style = torch.randn(4, 2 * v.EMBED_DIM)
    wanted = layer.style(style)[:, :, None, None]
    std, mean = torch.std_mean(x, (2, 3), correction=0, keepdim=True)
    expected = (1 + wanted[:, :5]) * (x - mean) / std + wanted[:, 5:]
    assert_close(layer(x, style), expected, atol=1e-3, rtol=0)


@pytest.mark.parametrize("size", [8, 32, 128])
def test_generator_uses_z_and_the_direction_of_c_alone(size):
    torch.manual_seed(0)
    generator = v.Generator(size, 2)
    z, c = torch.randn(2, 3, 128)
    faces = generator(z, c)
    assert faces.shape == (3, 3, size, size)
    assert 0.05 < faces.std() < faces.abs().max() <= 1
    assert (generator(z + 1, c) - faces).abs().max() > 0.01
    assert (generator(z, -c) - faces).abs().max() > 0.01
    assert_close(generator(z, 9 * c), faces)
    assert_close(generator(z[:1], c[:1]), faces[:1])  # no batch statistics


def test_logit_is_equation_2_written_out():
    torch.manual_seed(0)
    face_encoder = v.FaceEncoder(16, 2, 3.5)
    discriminator = v.Discriminator(face_encoder, weight=0.2)
    faces = torch.randn(4, 3, 16, 16)
    c = torch.randn(4, 128)
    features = torch.relu(face_encoder.blocks(faces)).sum((2, 3))
    std = (features.var(0, correction=0) + 1e-4).sqrt()
    known = torch.cat([features, std.expand(4, -1)], dim=1)
    psi = known @ discriminator.psi.weight[0] + discriminator.psi.bias
    match = (c * face_encoder(faces)).sum(1)
    assert_close(v.logit(c, *discriminator(faces)), 0.2 * match + psi)


@pytest.mark.parametrize("kind, identity", [("rel", 0), ("relid", 1)])
def test_gan_loss_is_equation_4_or_5_in_6(kind, identity):
    c_pos, c_neg, phi, phi_2 = torch.randn(4, 7, 4).double()
    psi, psi_2 = torch.randn(2, 7).double()
    gap = (c_pos * (phi - phi_2)).sum(1) + psi - psi_2
    gap += identity * ((c_pos - c_neg) * phi).sum(1)
    loss = v.gan_loss(kind, c_pos, c_neg, (phi, psi.requires_grad_()), (phi_2, psi_2))
    loss.backward()
    assert_close(loss, (1 + (-gap).exp()).log().mean())
    assert_close(psi.grad, -torch.sigmoid(-gap) / 7)


def test_r1_is_the_mean_squared_gradient_of_the_logit():
    """Of a c |f|^2 the gradient is 2 a c f."""
    a = torch.tensor(2.0, requires_grad=True)
    faces = torch.randn(5, 3, 4, 4)
    c = torch.arange(5.0)[:, None]

    def discriminator(f):
        return a * f.square().sum((1, 2, 3))[:, None], torch.zeros(5)

    penalty = v.r1_penalty(discriminator, faces, c)
    expected = (16 * c[:, 0] ** 2 * faces.square().sum((1, 2, 3))).mean()
    assert_close(penalty.detach(), expected)
    penalty.backward()
    assert_close(a.grad, expected)  # d(a^2)/da = 2 a, which is a^2 for a = 2


# ---- Training -----------------------------------------------------------------------


def gradients(loss, weights):
    return torch.autograd.grad(loss, weights, retain_graph=True, materialize_grads=True)


def copies(tensors):
    return [x.detach().clone() for x in tensors]


def spy_steps(patch):
    """Optimizers' weights; before each step the gradients, copies of all weights."""
    seen = SimpleNamespace(weights=[], gradients=[], values=[])
    make_scheduler = v.make_scheduler

    def record(optimizer, *_):
        weights = optimizer.param_groups[0]["params"]
        seen.gradients.append(copies(x.grad for x in weights))
        seen.values.append([copies(x) for x in seen.weights])

    def spied(optimizer, *args):
        seen.weights.append(optimizer.param_groups[0]["params"])
        optimizer.register_step_pre_hook(record)
        return make_scheduler(optimizer, *args)

    patch.setattr(v, "make_scheduler", spied)
    return seen


def test_match_train_goes_down_equation_1(argv, tmp_path, monkeypatch):
    """In its first step of SGD, whose momentum is empty."""
    match_logits = v.match_logits
    drawn = []
    wanted = []
    seen = spy_steps(monkeypatch)

    def spied(speech, faces, candidates, direction):
        logits = match_logits(speech, faces, candidates, direction)
        if speech.requires_grad:  # in training
            drawn.append(candidates)
            wanted.append(gradients(v.match_loss(logits), seen.weights[0]))
        return logits

    monkeypatch.setattr(v, "match_logits", spied)
    run(*argv("match-train", tmp_path, "--lr=0.01"))
    cut = min(1, v.GRAD_CLIP / torch.nn.utils.get_total_norm(wanted[0]))
    (before,), (after,) = seen.values[:2]
    for x, y, gradient in zip(before, after, wanted[0]):
        assert_close(y, x - 0.01 * cut * gradient, rtol=1e-4, atol=1e-6)
    assert not torch.equal(drawn[0], drawn[1])


def test_best_is_what_validated_best(argv, tmp_path, monkeypatch):
    scores = iter([3.0, 5.0, 4.0, 5.0])

    def validate(model, generators, run, step, runs):
        return {"f-v/2": next(scores), "v-f/2": step}

    monkeypatch.setattr(v, "validate", validate)
    run(*argv("match-train", tmp_path, "--eval-every=1", "--direction=f-v"))
    assert load(tmp_path / "best.pt")["step"] == 2


def test_learning_rate_rises_stays_and_falls():
    optimizer = torch.optim.SGD([torch.zeros(1)], 1.0)
    (factor,) = v.make_scheduler(optimizer, 20, 0.1).lr_lambdas
    rates = [factor(step) for step in range(20)]
    fall = np.arange(9, 0, -1) / 10
    np.testing.assert_allclose(rates, [0.5, *[1] * 10, *fall], rtol=1e-12)


@pytest.fixture(scope="module")
def gan_steps(argv, match_run, tmp_path_factory):
    """Steps of gan-train; batches and z; terms and gradients of D and G in turn."""
    gan_loss = v.gan_loss
    r1_penalty = v.r1_penalty
    batches = v.Run.batches

    def spied_batches(*args):
        for step, rng, speech, real in batches(*args):
            z = v.sample_z(6, rng.clone_state(), CPU)
            seen.batches.append((z, speech, real))
            yield step, rng, speech, real

    def spied_loss(*terms):
        loss = gan_loss(*terms)
        seen.terms.append(terms)
        own = seen.weights[len(seen.terms) % 2]  # D's and G's in turn
        seen.wanted.append(gradients(loss, own))
        return loss

    def spied_penalty(*args):
        penalty = r1_penalty(*args)
        seen.penalties.append(gradients(penalty, seen.weights[1]))
        return penalty

    out = tmp_path_factory.mktemp("gan_steps")
    with pytest.MonkeyPatch.context() as patch:
        seen = spy_steps(patch)
        for name in ["batches", "terms", "wanted", "penalties"]:
            setattr(seen, name, [])
        patch.setattr(v, "gan_loss", spied_loss)
        patch.setattr(v, "r1_penalty", spied_penalty)
        patch.setattr(v.Run, "batches", spied_batches)
        run(*argv("gan-train", out, "--weight=0.5"))
    seen.state = load(out / "last.pt")
    seen.match = v.load_model(match_run / "best.pt", "match-train", CPU)
    return seen


def test_d_compares_real_faces_with_those_made_of_their_own_voice(gan_steps):
    """In the first step, when D's phi is still F."""
    z, speech, real = gan_steps.batches[0]
    kind, c_pos, c_neg, d_real, d_fake = gan_steps.terms[0]
    generator = v.Generator(32, 2)
    stepped = gan_steps.values[0][0]  # what G's optimizer moves, G alone
    for weight, value in zip(generator.parameters(), stepped, strict=True):
        weight.data = value
    fake = generator(z, c_pos)
    assert kind == "relid"
    assert (c_neg != c_pos).any(1).all()
    assert_close(c_neg.sort(0).values, c_pos.sort(0).values)
    assert_close(c_pos, gan_steps.match.speech_encoder(speech))
    assert_close(d_real[0], 0.5 * gan_steps.match.face_encoder(real))
    assert_close(d_fake[0], 0.5 * gan_steps.match.face_encoder(fake))


def test_g_gets_ds_terms_with_swapped_roles(gan_steps):
    """The real ones as D saw them; the fake ones by the D that has just learned."""
    d_real, d_fake = gan_steps.terms[0][3:]
    g_first, g_second = gan_steps.terms[1][3:]
    assert torch.equal(g_second[0], d_real[0])
    assert torch.equal(g_second[1], d_real[1])
    assert not torch.equal(g_first[0], d_fake[0])


def test_d_and_g_step_along_their_losses_and_d_at_times_along_r1(gan_steps):
    """With R1 in each second step, which counts twice; gamma is 0.5."""
    wanted = gan_steps.wanted[:3]
    pairs = zip(wanted[2], gan_steps.penalties[0])
    wanted[2] = [x + 2 * 0.5 / 2 * r1 for x, r1 in pairs]
    for got, expected in zip(gan_steps.gradients, wanted):
        assert_close(got, list(expected), rtol=1e-3, atol=1e-6)


def test_s_and_f_are_frozen_in_gan_train(gan_steps, match_run):
    before = load(match_run / "best.pt")
    for name, weight in before["model"].items():
        assert torch.equal(gan_steps.state["model"][name], weight)


def test_the_average_of_g_is_a_running_average(gan_steps):
    """Of G's weights after each step."""
    ends = [values[0][0] for values in gan_steps.values[2::2]]
    ends.append(gan_steps.state["g"]["first.weight"])
    average = ends[0]
    for weight in ends[1:]:
        average = 0.998 * average + 0.002 * weight
    kept = gan_steps.state["model"]["generator.first.weight"]
    assert_close(kept, average, rtol=0, atol=1e-6)


def left_by(out):
    """The metrics and the weights that a run leaves."""
    state = load(out / "last.pt")
    parts = [*state["model"].values(), *state.get("g", {}).values()]
    weights = [x.numpy().tobytes() for x in parts]
    steps = [line["step"] for line in read_log(out)]
    return {"metrics": read_metrics(out), "weights": weights, "steps": steps}


MATCH_FLAGS = (
    "--seed=1 --direction=f-v --k=3 --steps=5 --batch=8 --seconds=0.3 --size=64 "
    "--sinc-stride=4 --speech-width=6 --face-width=6 --embed-scale=5 --lr=0.01 "
    "--data={plain} --runs=3"
)
GAN_FLAGS = (
    "--seed=1 --loss=rel --steps=5 --batch=8 --width=3 --weight=0.5 --lr=0.01 "
    "--d-lr=0.01 --gamma=5 --ema-decay=0.5 --data={plain} --runs=3"
)
FLAGS = [("match-train", flag) for flag in MATCH_FLAGS.split()]
FLAGS += [("gan-train", flag) for flag in GAN_FLAGS.split()]


@pytest.mark.parametrize("command, flag", FLAGS)
def test_a_setting_matters(command, flag, argv, usual, plain, tmp_path):
    run(*argv(command, tmp_path, flag.format(plain=plain)))
    what = "metrics" if flag == "--runs=3" else "weights"
    assert left_by(tmp_path)[what] != left_by(usual[command])[what]


@pytest.mark.parametrize("command", TRAININGS)
def test_times_of_a_training(command, argv, tmp_path, monkeypatch, capsys):
    save = torch.save
    saved = []

    def spied(state, path):
        if "last.pt" in path:
            saved.append(state["step"])
        save(state, path)

    monkeypatch.setattr(torch, "save", spied)
    flags = "--steps=5 --eval-every=3 --save-every=2 --log-every=4"
    run(*argv(command, tmp_path, *flags.split()))
    assert saved == [2, 4, 5]
    assert [line["step"] for line in read_log(tmp_path)] == [4, 5]
    assert re.findall(r"step (\d) val", capsys.readouterr().out) == ["3", "5"]


@pytest.mark.parametrize("command", TRAININGS)
def test_flags_come_before_the_preset_and_the_preset_before_defaults(command):
    cfg = v.parse([command, "--preset", "paper", "--lr", "0.5"])
    expected = v.parse([command, *v.PAPER_PRESET[command].split()])
    assert vars(cfg) == {**vars(expected), "preset": "paper", "lr": 0.5}


@pytest.mark.parametrize("command", v.COMMANDS)
def test_help_tells_each_setting_and_its_default(command, capsys):
    with pytest.raises(SystemExit, match="0"):
        run(command, "--help")
    text = " ".join(capsys.readouterr().out.split())
    for default, meaning, *_ in v.COMMANDS[command][1].values():
        assert (f"{meaning} (default: {default})" if default else meaning) in text


def test_importing_does_nothing(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    runpy.run_path(FILE)
    assert capsys.readouterr() == ("", "")
    assert not os.listdir(tmp_path)


# ---- Evaluation, figures, reports ----------------------------------------------------


def nobody(count):
    return np.full(count, "")


@pytest.mark.parametrize("key", ["v-f/2", "v-f/10", "f-v/2", "f-v/10"])
def test_k_way_is_the_chance_to_beat_random_others(key):
    """Some voices are loud, so that the directions differ."""
    torch.manual_seed(1)
    faces = torch.randn(1000, 16)
    speech = (faces + 2 * torch.randn(1000, 16)) * 10 ** torch.randn(1000, 1)
    similarity = speech @ faces.T if key[0] == "v" else faces @ speech.T
    beaten = (similarity < similarity.diagonal()[:, None]).sum(1)
    chances = (beaten / 999) ** (int(key[4:]) - 1)
    scores = v.k_way(speech, faces, nobody(1000), 0)
    assert scores[key] == approx(100 * chances.mean().item(), abs=4)
    assert len(scores) == 4  # none by gender, which nobody tells


def test_who_knows_the_gender_alone_scores_chance_among_the_same_gender():
    genders = seeded().permutation(["female", "male"] * 300)
    one_hot = torch.eye(2)[(genders == "male").astype(int)]
    scores = v.k_way(one_hot, one_hot, genders, 0)
    keys = ["v-f/2", "f-v/10", "v-f/2/gender", "f-v/10/gender"]
    assert [scores[key] for key in keys] == approx([75, 20, 50, 10], abs=3)


def simulate(count, link=v.LINK):
    """Rows of labels.csv of synthetic people, as numbers."""
    rng = seeded()
    rows = []
    for _ in range(count):
        voice = v.sample_voice(rng)
        rows.append({"link": link, **voice, **v.sample_face(voice, link, rng)})
    return rows


# Percent right of v-f/2, v-f/2/gender, v-f/10, v-f/10/gender, simulated elsewhere.
TABLE = [(0.5, [86.7, 73.1, 43.7, 28.4]), (0.75, [93.3, 87.3, 65.0, 49.5])]


@pytest.mark.parametrize("link, table", TABLE)
def test_oracle_scores_the_reference_table(link, table):
    people = simulate(20000, link)
    genders = np.where([row["gender"] for row in people], "male", "female")
    scores = v.oracle_scores(people, genders, 0)
    keys = ["v-f/2", "v-f/2/gender", "v-f/10", "v-f/10/gender"]
    assert [scores[key] for key in keys] == approx(table, abs=1.2)


def test_who_knows_the_factors_does_not_prefer_real_to_ideal_faces(monkeypatch):
    people = simulate(3000, 0.5)  # not v.LINK
    drawn = []

    def draw_face(face, mouth):
        drawn.append(face)
        return Image.new("RGB", (64, 64))

    monkeypatch.setattr(v, "draw_face", draw_face)
    assert v.ideal_faces(people, 32, seeded(1)).shape == (3000, 3, 32, 32)
    speech = v.factor_values(people, v.VOICE_FACTORS[1:])
    ideal = v.factor_values(drawn, v.LINKED)
    real = v.factor_values(people, v.LINKED)
    assert v.preferred(speech, ideal, real) == approx(50, abs=5)


def test_distances_of_couples_of_the_same_and_of_different_gender():
    genders = np.array(["male", "male", "female"] * 20)
    one_hot = torch.eye(2)[(genders == "male").astype(int)]
    couples = v.cosine_distances(one_hot, -3 * one_hot, genders, 0)
    assert len(couples["all"][0]) == 60
    assert torch.cat(couples["same"]).abs().max() < 1e-6
    assert (torch.cat(couples["different"]) - 1).abs().max() < 1e-6
    genders[0] = ""  # unknown: out of its couple, and of that whose partner it is
    couples = v.cosine_distances(one_hot, one_hot, genders, 0)
    assert len(couples["same"][0]) + len(couples["different"][0]) == 58


def test_table_3_is_brute_force_by_three_distances():
    torch.manual_seed(0)
    queries = torch.randn(60, 1, 8)
    gallery = queries[:, 0] + 2 * torch.randn(60, 8)
    distances = {
        "L1": (queries - gallery).abs().sum(2),
        "L2": (queries - gallery).norm(dim=2),
        "cosine": -F.cosine_similarity(queries, gallery, dim=2),
    }
    scores = v.table_3(queries[:, 0], gallery, 0)
    for name, k in itertools.product(distances, (1, 2, 5, 10)):
        nearest = distances[name].argsort(1)[:, :k]
        hits = [i in nearest[i] for i in range(60)]
        assert scores[f"retrieval/{name}/{k}"] == approx(100 * np.mean(hits))


def test_table_3_draws_a_gallery_for_each_seed(monkeypatch):
    """Of two faces: nobody finds a NaN (half of them), nor one of two equal faces."""
    monkeypatch.setattr(v, "GALLERY", 2)
    faces = torch.ones(60, 1)
    faces[30:] = math.nan
    found = {v.table_3(faces, faces, seed)["retrieval/L1/1"] for seed in range(9)}
    assert found == {0, 50}


def test_one_couple_has_no_correlation():
    eye = torch.eye(3)
    kinds = {"generated": eye, "real": eye}
    genders = np.array(["male", "male", ""])
    scores = v.score_faces(eye, kinds, "generated", genders, 0)
    assert "qta1/different/r" not in scores


def test_faces_of_another_generator_lose_where_the_models_are_preferred():
    faces = torch.randn(60, 8)
    kinds = {"generated": faces, "other": -faces, "real": faces}
    scores = v.score_faces(faces, kinds, "other", nobody(60), 0)
    assert scores["preferred"] == 100


class FakeModel(SimpleNamespace):
    __call__ = v.Model.forward


def test_a_judge_scores_what_each_generator_made_of_its_own_c(plain):
    def network(n):
        """S gives n, G draws c, F gives a pixel and 10 n."""
        model = FakeModel(cfg=CFG, device=CPU)
        model.speech_encoder = lambda x: torch.full((len(x), 128), n)
        model.generator = lambda z, c: c[:, :1, None, None].expand(-1, 3, 32, 32)
        model.face_encoder = SimpleNamespace(embed=lambda x: x[:, 0, 0] + 10 * n)
        return model

    split = v.open_corpus(plain, {"val": 2})["val"]
    generators = {"generated": network(1.0), "other": network(3.0)}
    c, faces, _ = v.embed_split(network(2.0), generators, split, 0, 0)
    assert c.unique().tolist() == [2]
    assert faces["generated"].unique().tolist() == [21]
    assert faces["other"].unique().tolist() == [23]


def test_probe_is_ridge_regression():
    """Its dual form; the pictures are so dim that the ridge matters."""
    faces = 0.02 * torch.rand(40, 3, 32, 32)
    targets = torch.randn(40, 2)
    x = np.c_[faces.flatten(1).double().numpy(), np.ones(40)]
    dual = np.linalg.solve(x @ x.T + 40 * 0.01 * np.eye(40), targets.numpy())
    limit = 0.01 * abs(x.T @ dual).max()
    np.testing.assert_allclose(v.fit_probe(faces, targets), x.T @ dual, atol=limit)


def test_control_scores_of_a_generator_that_shows_planted_factors(monkeypatch):
    """A face is a row of 9 numbers: four of the voice's, four of z, one of both."""

    def picture(values):
        row = F.pad(values[:, None, None], (0, 23, 0, 31))  # (n, 1, 32, 32)
        return row.expand(-1, 3, -1, -1)

    def model(c, z):
        c = c.expand_as(z)
        both = c[:, 1:2] * z[:, :1]
        return picture(torch.cat([3 * c[:, :4] - 1, z[:, :4], both], dim=1))

    model.device = CPU
    people = simulate(400)
    voices = F.pad(v.factor_values(people, v.VOICE_FACTORS), (0, 124))
    batch = (voices, picture(v.factor_values(people, v.FACTORS)), range(400))
    monkeypatch.setattr(v, "sample_people", lambda *args: batch)
    split = SimpleNamespace(labels=people)
    scores = v.control_scores(model, split, split)
    c = list(scores["c"].values())
    z = list(scores["z"].values())
    assert c[:8] == approx([100] * 4 + [0] * 4, abs=2)
    assert c[8] < 20
    assert z == approx([0] * 4 + [100] * 4 + [0], abs=2)
    assert min(scores["probe"].values()) > 0.98
    assert scores["voice"]["age"] > 0.98
    assert scores["spread/real"]["age"] == approx(100 * (1 - v.LINK**2), abs=9)


def test_metrics_are_means_and_deviations_over_runs(corpus, monkeypatch):
    """Of scores that all runs have, with the people of the smallest run."""
    model = SimpleNamespace(eval=lambda: None)
    scores = iter([{"x": 1.0}, {"x": 4.0, "y": 1.0}])
    people = iter([[{}] * 3, [{}] * 4])
    monkeypatch.setattr(v, "score_faces", lambda *args: next(scores))
    monkeypatch.setattr(v, "embed_split", lambda *args: (0, ["real"], next(people)))
    cfg = SimpleNamespace(seed=0, workers=0, val_clips=4)
    tested = SimpleNamespace(corpus=v.open_corpus(corpus, {"val": 2}), cfg=cfg)
    metrics = v.validate(model, {}, tested, 1, 2)
    facts = {"data": str(corpus), "split": "val", "people": 3, "left_out": 1, "runs": 2}
    assert metrics == {**facts, "x": 2.5, "x/std": 2.121}


def test_match_test_repeats_the_metrics_of_the_training(corpus, match_run, tmp_path):
    argv = ["--data", corpus, "--match", match_run / "best.pt", "--out", tmp_path]
    run("match-test", *argv, "--runs=2")
    assert read_metrics(tmp_path) == read_metrics(match_run)


def test_report_shows_all_metrics_and_figures(corpus, match_run, gan_run, tmp_path):
    gan = gan_run / "last.pt"
    argv = ["--gan", gan, "--other", gan, "--judge", match_run / "best.pt", "--runs=2"]
    assert run("gan-test", *argv, "--data", corpus, "--out", tmp_path) == 0
    page = (tmp_path / "report.md").read_text()
    metrics = read_metrics(tmp_path)
    keys = "preferred qta1/all/r ideal/preferred oracle/f-v/2 v-f/2/gender"
    assert set(keys.split()) <= metrics.keys()
    assert metrics["other/preferred"] == 50  # it was the same generator
    assert metrics["real/v-f/2"] == read_metrics(match_run)["v-f/2"]
    assert "| generated | other | real | ideal | oracle | paper |" in page
    for row, first in re.findall(r"^\| (\S+) \| (-?\d+\.\d+)", page, re.MULTILINE):
        value = metrics.get(row, metrics.get(f"control/{row}/c"))
        assert float(first) == approx(value, abs=0.006), row
    for number in range(2, 7):
        assert f"](fig{number}.png)" in page
        assert (tmp_path / f"fig{number}.png").exists()


def test_a_corpus_without_training_people_can_be_tested(corpus, gan_run, tmp_path):
    shutil.copytree(corpus / "test", tmp_path / "data/test")
    shutil.copy(corpus / "labels.csv", tmp_path / "data")
    argv = ["--gan", gan_run / "last.pt", "--out", tmp_path, "--runs=1"]
    assert run("gan-test", "--data", tmp_path / "data", *argv) == 0


@pytest.fixture(scope="module")
def figures(tmp_path_factory):
    """A folder of them: red is 20, 40, 60 or 80, one each of four people, green z."""

    def generator(z, c):
        color = torch.cat([40 / 255 * c[:, :1] - 1, z[:, :2] / 4], dim=1)
        return color[:, :, None, None].expand(-1, 3, 32, 32)

    def face_encoder(faces):
        number = 6.4 * faces[:, 0, 16, 16] + 6.4
        return F.one_hot(number.long()).float()

    model = SimpleNamespace(cfg=CFG, device=CPU)
    model.speech_encoder = lambda x: torch.arange(1.0, 5)[:, None].expand(-1, 128)
    model.face_encoder = face_encoder
    model.generator = generator
    folder = plain_corpus(tmp_path_factory.mktemp("figures"), 4)
    v.plot_figures(model, v.open_corpus(folder, {"val": 4})["val"], folder)
    return folder


def colors(path):
    """Red and green amid the faces of a grid, (columns, rows) each."""
    sheet = np.array(Image.open(path), int).T
    return sheet[:2, 68::132, 88::152]


ROWS = [20, 40, 60, 80]
NEXT = [40, 60, 80, 20]


def test_figure_2_shows_a_voice_a_row_and_a_z_a_column(figures):
    red, green = colors(figures / "fig2.png")
    assert (red == ROWS).all()
    assert (green.T == green[:, 0]).all()
    assert len({*green[:, 0]}) == 5  # of the real face, of four z


def test_figure_3_goes_to_the_next_voice_with_one_z(figures):
    red, green = colors(figures / "fig3.png")
    between = np.linspace(ROWS, NEXT, 6)
    np.testing.assert_allclose(red, [ROWS, *between, NEXT], atol=1)
    assert (green[1:7] == green[1]).all()


def test_figure_4_goes_to_the_next_z_with_one_voice(figures):
    red, green = colors(figures / "fig4.png")
    assert (red == ROWS).all()
    assert (green[6] == np.roll(green[1], -1)).all()
    assert len({*green[1]}) == 4


def test_figure_5_has_the_distance_of_voices_on_its_x_axis(figures):
    """Which is 0, as all c have one direction; that of faces is not."""
    sheet = np.array(Image.open(figures / "fig5.png"))
    _, x = (sheet[52:440] == 128).all(2).nonzero()  # the gray points
    assert {*x} == {48, 49, 50, 51, 52}


def test_figure_6_shows_a_face_of_the_voice_then_the_nearest_real_ones(figures):
    red, _ = colors(figures / "fig6.png")
    assert (red[:3] == ROWS).all()


def test_generate_draws_a_grid_or_a_file_for_each_face(gan_run, tmp_path):
    """For one recording in stereo, a short one of a low rate, the first again."""
    paths = [tmp_path / "stereo.wav", tmp_path / "短い.wav", tmp_path / "stereo.wav"]
    write_wav(paths[0], noise((44100, 2)), 44100)
    write_wav(paths[1], noise(9000), 8000)
    for out in ("a.png", "new/faces"):
        argv = ("--gan", gan_run / "last.pt", "--out", tmp_path / out, "-n", 3)
        assert run("generate", *paths, *argv) == 0
    sheet = np.asarray(Image.open(tmp_path / "a.png"))
    assert sheet.shape == (3 * 152, 3 * 132, 3)
    first, other, again = sheet.reshape(3, 152, -1)[:, 24:]
    assert not np.array_equal(first, other)  # of one z, but not of one c
    assert np.array_equal(first, again)
    names = sorted(os.listdir(tmp_path / "new/faces"))
    faces = [Image.open(tmp_path / "new/faces" / name) for name in names]
    assert names[2:4] == ["0001_stereo_z3.png", "0002_短い_z1.png"]
    assert len({face.tobytes() for face in faces}) == 9  # each of its own z


# ---- Data and synthetic people ------------------------------------------------------


# A moment, the first and the last start of a window of 5 s that spares it by 3 s.
WINDOWS = [(None, 0, 15), (7, 11, 15), (0, 4, 15), (19, 0, 11), (20, 0, 12)]


@pytest.mark.parametrize("moment, first, last", WINDOWS)
def test_a_window_is_any_that_spares_the_moment(moment, first, last, monkeypatch):
    """Of 20 samples at 1 Hz."""
    monkeypatch.setattr(v, "SAMPLE_RATE", 1)
    monkeypatch.setattr(v, "TIME_GUARD", 3)
    rng = seeded()
    monkeypatch.setattr(v, "is_silent", lambda x: False)
    parts = v.exclude_moment("", range(20), moment)
    found = {v.sample_window(parts, 5, rng) for _ in range(400)}
    assert found == {range(i, i + 5) for i in range(first, last + 1)}


@pytest.mark.parametrize("rate", [8000, 16000, 44100])
def test_speech_never_holds_the_faces_time(rate, tmp_path):
    """The recording is a ramp, so that speech tells its times, colours a face's."""
    ramp = np.arange(3 * rate) / (3 * rate)
    colors = {f"{ms}.png": (ms // 12, 99, 0) for ms in (0, 700, 1500, 2200, 2999)}
    make_clip(tmp_path / "p/c", {"a.wav": ramp}, colors, rate)
    pairs = pairs_of(tmp_path, training=True)
    for i in range(200):
        speech, faces, _ = pairs[i]
        moment = 12 * int(faces[0, 16, 16, 0]) / 1000
        heard = 3 * speech[0, 400:-400]  # resampling rings at the edges
        assert heard.min() > moment + 0.299 or heard.max() < moment - 0.287


def test_times_apply_in_a_clip_with_one_recording_only(tmp_path, monkeypatch):
    """p has two in a clip, q one and the image in another."""
    make_clip(tmp_path / "p/c", {"a.wav": [], "b.wav": []}, {"1500.png": (99, 0, 0)})
    make_clip(tmp_path / "q/s", {"a.wav": []}, {})
    make_clip(tmp_path / "q/f", {}, {"1500.png": (99, 0, 0)})
    monkeypatch.setattr(v, "load_speech", lambda *args: args[3])
    for name in "pq":
        moment, _, _ = pairs_of(tmp_path, training=True).load_pair(name, seeded())
        assert moment is None


def test_pairs_stay_within_a_clip_and_half_of_the_faces_are_flipped(tmp_path):
    """Loudness tells the recording's clip, colour the face's, a corner its side."""
    for i in (1, 2):
        sound = noise(8000) * i / 2
        make_clip(tmp_path / f"p/c{i}", {"s.wav": sound}, {"x.png": (100 * i, 0, 0)})
    pairs = pairs_of(tmp_path, training=True)
    flipped = []
    for i in range(200):
        speech, (face,), _ = pairs[i]
        assert (speech.max() > 0.3) == (face[16, 16, 0] > 150)
        flipped.append(face[0, 0, 0] > face[0, -1, 0])
    assert np.mean(flipped) == approx(0.5, abs=0.15)


def test_short_speech_is_repeated(wav):
    speech = v.load_speech(wav, 2.0, seeded())
    np.testing.assert_allclose(speech, np.tile(noise(16000), 2), atol=1e-4)


@pytest.mark.parametrize("told", [0, 999, 0xFFFFFFFF])
def test_a_files_own_length_counts_whatever_its_header_says(told, wav):
    content = bytearray(wav.read_bytes())
    content[40:44] = told.to_bytes(4, "little")
    wav.write_bytes(content)
    assert len(v.read_audio(wav)) == 16000


def test_a_chunk_after_the_samples_is_no_sound(wav):
    wav.write_bytes(wav.read_bytes() + b"id3 " + bytes([0, 128, 0, 0]) * 9000)
    assert len(v.read_audio(wav)) == 16000


@pytest.mark.parametrize("rate, channels", [(8000, 1), (16000, 2), (44101, 6)])
def test_any_rate_and_channels_become_mono_16_khz(tmp_path, rate, channels):
    """The mean of tones of 1000 Hz, of amplitudes 0.5, 0.25, 0.125, ..."""
    tone = np.sin(2 * np.pi * 1000 * np.arange(rate) / rate)
    levels = 0.5 ** np.arange(1, channels + 1)
    write_wav(tmp_path / "x.wav", tone[:, None] * levels, rate)
    speech = v.read_audio(tmp_path / "x.wav")[2000:14000]
    expected = np.sin(np.arange(12000) * np.pi / 8) * levels.mean()
    np.testing.assert_allclose(speech, expected, atol=0.03)


TONE = np.sin(np.arange(16000) / 9)
CLICK = np.eye(1, 16000, 99)[0]
UNHEARD = [0 * TONE, 0 * TONE + 0.5, CLICK, TONE[:160], np.stack([TONE, -TONE], 1)]


@pytest.mark.parametrize("samples", UNHEARD)
def test_speech_without_a_sound_is_refused(samples, tmp_path):
    write_wav(tmp_path / "x.wav", samples)
    with pytest.raises(v.UserError, match="x.wav: silent or under 0.5 s"):
        v.load_speech(tmp_path / "x.wav", 6.0, seeded())


def test_speech_only_at_the_faces_time_is_a_fault():
    x = np.zeros(48000)
    x[20000:28000] = noise(8000)
    with pytest.raises(v.UserError, match="silent or under 0.5 s beside .* 1.5 s"):
        v.exclude_moment("", x, 1.5)


def test_a_window_is_no_pause(tmp_path):
    """Where a second of 9 has a sound."""
    write_wav(tmp_path / "x.wav", np.r_[np.zeros(128000), TONE])
    for seed in range(20):
        assert v.load_speech(tmp_path / "x.wav", 1.0, seeded(seed)).any()


def test_a_face_is_the_upright_central_square(tmp_path):
    pixels = seeded().integers(0, 256, (32, 80, 3), np.uint8)
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by 90 degrees clockwise
    Image.fromarray(np.rot90(pixels)).save(tmp_path / "x.png", exif=exif)
    assert np.array_equal(v.load_face(tmp_path / "x.png", 32), pixels[:, 24:56])


COLORS = [("L", 77, 77), ("I;16", 77 * 256, 77), ("RGBA", (0, 0, 0, 0), 255)]


@pytest.mark.parametrize("mode, color, value", COLORS)
def test_any_mode_becomes_rgb(mode, color, value, tmp_path):
    """16 bits are scaled, what is transparent becomes white."""
    write_image(tmp_path / "x.png", color, mode)
    assert v.load_face(tmp_path / "x.png", 32)[16, 16].tolist() == [value] * 3


def test_labels_are_read_as_spreadsheets_write_them(tmp_path):
    text = (
        "\ufeffIdentity, gender\n\nann, f\n,m\n,,\nbob,Male\nbob,MALE,x\nkim,1\nlee\n"
    )
    (tmp_path / "labels.csv").write_text(text, encoding="utf8")
    labels = v.read_labels(tmp_path)
    genders = {name: v.gender_of(row) for name, row in labels.items()}
    assert genders == {"ann": "female", "bob": "male", "kim": "male", "lee": ""}


@pytest.mark.parametrize("fault", ["link=1", "link=-1", "age=nan", "link="])
def test_people_with_a_faulty_factor_are_not_synthetic(fault):
    name, value = fault.split("=")
    labels = [{**simulate(1)[0], name: value}]
    assert not v.has_factors(v.Split("", [0], labels))


def test_a_batch_depends_on_seed_and_number_alone(corpus):
    batches = []
    for seed in (0, 1, 1):
        pairs = pairs_of(corpus / "train", True, 20, seed)
        batches += [pairs[0], pairs[1]]
    assert len({speech.tobytes() for speech, _, _ in batches}) == 4
    assert np.array_equal(batches[3][1], batches[5][1])
    assert all(len(set(names)) == 20 for _, _, names in batches)


@pytest.mark.parametrize("workers", [0, 1])
def test_everybody_is_tested_in_order(corpus, workers):
    pairs = pairs_of(corpus / "train", False, 20)
    batches = list(v.load_batches(pairs, range(4), workers, CPU))
    assert [name for batch in batches for name in batch[2]] == list(pairs.split.names)


@pytest.mark.parametrize("training, sizes", [(True, [10, 10]), (False, [9, 1])])
def test_who_is_unreadable_is_replaced_or_left_out(training, sizes, tmp_path, capsys):
    folder = plain_corpus(tmp_path) / "train"
    (folder / "train7/клип 1/речь.wav").write_bytes(b"nonsense")
    shutil.rmtree(folder / "train8/клип 1")
    pairs = pairs_of(folder, training, 10)
    batches = [names for _, _, names in v.load_batches(pairs, [0, 1], 0, CPU)]
    assert [len(names) for names in batches] == sizes
    for names in batches:
        assert not {"train7", "train8"} & set(names)
    assert "warning: left out: " in capsys.readouterr().err


def test_a_dead_loader_process_is_one_line(argv, tmp_path, capsys, monkeypatch):
    def loader(pairs, num_workers, timeout, **_):
        assert (num_workers, timeout) == (2, v.LOADER_TIMEOUT)
        raise RuntimeError("DataLoader timed out")
        yield

    monkeypatch.setattr(torch.utils.data, "DataLoader", loader)
    line = refused(capsys, *argv("match-train", tmp_path, "--workers=2"))
    assert re.search("fewer --workers.*/dev/shm", line)


FAULTS = (
    "empty.wav cut.wav silent.wav:.silent e.WAV f.jpg tiny.png.*32.a.side "
    "plain.png:.of.one.colour речь.wav:.ends.before.its.image's.time.of.9.0.s "
    "val3:.0.recordings test5:.*.0.images"
)


def test_check_data_lists_each_fault_and_all_that_is_unused(tmp_path, capsys):
    first, second = sorted((plain_corpus(tmp_path) / "train").glob("train[01]/*"))
    sounds = {"empty.wav": [], "silent.wav": [0] * 8000}
    make_clip(first, sounds, {"plain.png": (0, 0, 0)})
    make_clip(second, {}, {"9000.png": (9, 9, 9)})
    write_image(first / "tiny.png", (9, 9, 9), size=(16, 99))
    for name in ["cut.wav", "e.WAV", "f.jpg", "._x.jpg", "notes.txt"]:
        (first / name).write_bytes(b"nonsense")
    linked = (tmp_path / "val/val1").rename(tmp_path / "elsewhere")
    (tmp_path / "val/val1").symlink_to(linked)
    (linked / "клип 1/other.webp").write_bytes(b"")
    (tmp_path / "val/val3/клип 1/речь.wav").unlink()
    (tmp_path / "test/test5/клип 1/500.png").unlink()
    (tmp_path / "test/stray.jpg").symlink_to(first / "500.png")
    (tmp_path / "test/lost.jpg").symlink_to("nowhere")
    (tmp_path / "labels.csv").write_text("identity,gender\ntrain0,f\nnobody,m\n")
    assert run("check-data", tmp_path) == 1
    out = capsys.readouterr().out
    for fault in FAULTS.split():
        assert len(re.findall(f"fault: .*{fault}", out)) == 1, fault
    assert re.search("train: 12 identities, 16 recordings .*, 16 images", out)
    assert "\n10 faults" in out
    assert out.count("not used: 1 files */*/*/*.") == 4
    assert "not used: 2 files */*.jpg, such as" in out
    assert "not used: 1 rows of labels.csv, such as nobody" in out


@pytest.mark.parametrize("seed, equal", [(3, True), (4, False)])
def test_a_person_depends_on_seed_and_number_alone(seed, equal, corpus, tmp_path):
    v.write_person(tmp_path, seed, 1, "train")
    for path in tmp_path.glob("train/id00001/clip/*.wav"):
        usual = corpus / path.relative_to(tmp_path)
        assert (usual.read_bytes() == path.read_bytes()) == equal


def test_linked_factors_correlate_by_link_and_nothing_else_does():
    people = simulate(20000)
    columns = {name: [row[name] for row in people] for name in people[0]}
    del columns["link"]
    for a, b in itertools.combinations(sorted(columns), 2):
        linked = f"voice_{a}" == b
        r = np.corrcoef(columns[a], columns[b])[0, 1]
        assert r == approx(v.LINK if linked else 0, abs=0.03), (a, b)


VOICE = {**v.sample_voice(seeded(5)), "gender": 0}
FACE = {**v.sample_face(VOICE, v.LINK, seeded(5)), "glasses": 0}


@pytest.mark.parametrize("name", sorted({**VOICE, **FACE}))
def test_a_factor_acts_on_its_own_side_only(name):
    person = {**VOICE, **FACE}
    changed = {**person, name: 0.5 * person[name] + 0.4}
    speech = [v.synth_speech(x, seeded(1)).tobytes() for x in (person, changed)]
    faces = [v.draw_face(x, 0.5).tobytes() for x in (person, changed)]
    assert (speech[0] == speech[1]) == (name not in VOICE)
    assert (faces[0] == faces[1]) == (name not in FACE)


def test_the_seed_reaches_the_random_numbers_of_a_step(argv, tmp_path):
    draws = set()
    for seed in range(3):
        cfg = v.parse([*map(str, argv("match-train", tmp_path, "--seed", seed))])
        rng = next(v.Run(cfg).batches(cfg))[1]
        draws.add(torch.rand(1, generator=rng).item())
    assert len(draws) == 3


def test_a_run_begun_with_resume_claims_its_folder(argv, tmp_path, capsys):
    line = argv("match-train", tmp_path)
    v.Run(v.parse([*map(str, line), "--resume"])).resume({})
    assert "holds a run" in refused(capsys, *line)


@pytest.mark.parametrize("command", TRAININGS)
def test_a_full_disk_keeps_the_last_save(command, argv, usual, tmp_path, capsys):
    """And the run resumes to the same end as one left alone."""
    save = torch.save

    def full(state, path):
        if path.endswith("last.pt.part") and state["step"] > 2:
            raise OSError(28, "disk full")
        save(state, path)

    line = argv(command, tmp_path, "--save-every=2")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "save", full)
        assert re.search("last.pt: .*disk full", refused(capsys, *line))
    assert load(tmp_path / "last.pt")["step"] == 2
    assert run(*line, "--resume") == 0
    assert left_by(tmp_path) == left_by(usual[command])


@pytest.mark.parametrize("command", TRAININGS)
def test_a_diverging_run_says_so_and_saves_no_nan(command, argv, tmp_path, capsys):
    flags = ["--lr=2e9", "--steps=24", "--eval-every=99", "--save-every=1"]
    line = refused(capsys, *argv(command, tmp_path, *flags))
    assert "weights are NaN, the run diverged; try a lower --lr" in line
    for value in load(tmp_path / "last.pt")["model"].values():
        assert value.isfinite().all()


SPY = f"""import os, sys
sys.path.insert(0, {str(FILE.parent)!r})
import torch, test_voice2face as t
t.v.R1_EVERY = 1
t.v.GRAD_CLIP = float('inf')
seen = t.spy_steps(t.pytest.MonkeyPatch())
code = t.run(*sys.argv[2:])
torch.save(seen.gradients, sys.argv[1] + os.environ["RANK"])
os._exit(code)"""


STILL = {"match-train": ["--lr=0"], "gan-train": ["--lr=0", "--d-lr=0"]}


@pytest.mark.parametrize("command", TRAININGS)
def test_two_processes_average_gradients(command, argv, tmp_path, monkeypatch):
    """Of the pairs that one process sees in two steps; no step moves a weight."""
    (tmp_path / "spy.py").write_text(SPY)
    flags = ["--steps=2", *STILL[command]]
    line = argv(command, tmp_path / "run", *flags)
    torchrun = f"{sys.executable} -m torch.distributed.run --standalone --nproc_per_node=2".split()
    torchrun += [tmp_path / "spy.py", tmp_path / "rank", *map(str, line)]
    done = subprocess.run(torchrun, check=True, text=True, capture_output=True)
    assert done.stdout.count(" s left") == 2  # one speaks
    first, second = (load(tmp_path / f"rank{rank}") for rank in (0, 1))
    assert_close(first, second, rtol=0, atol=0)
    monkeypatch.setattr(v, "R1_EVERY", 1)
    monkeypatch.setattr(v, "GRAD_CLIP", math.inf)
    alone = spy_steps(monkeypatch).gradients
    run(*argv(command, tmp_path / "alone", *flags))
    half = len(alone) // 2  # a step of match-train has one, of gan-train D's and G's
    for i in range(half):
        for mean, x, y in zip(first[i], alone[i], alone[half + i]):
            assert_close(mean, (x + y) / 2, rtol=1e-3, atol=1e-5)


def test_ctrl_c_ends_with_130(monkeypatch, plain):
    def stop(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(v, "open_corpus", stop)
    assert run("check-data", plain) == 130


MISTAKES = """
match-train --data {mess}/none => none.train: no such folder
match-train --data {mess}/both => test.train0: is in another split, too
match-train --data {mess}/column => labels.csv: must be CSV in UTF-8 with a column
match-train --data {mess}/clash => rows of train0 contradict each other
match-train --batch 99 => train: 62 identities, 99
match-train --k 7 => --k 7: must be at least 2, at most --batch 6
match-train --seconds nan => --seconds nan: allowed are 0 to 2
match-train --steps 0 => --steps 0: allowed are 1 to 2
match-train --size 48 => argument --size: invalid choice
match-train --device cuda:77 => --device cuda:77: not here, use cpu or auto
match-train --out {match} => holds a run; name another, or --resume
match-train --out {mess}/swap => holds a run; name another, or --resume
match-train --out {match} --lr 0.1 --resume => last.pt .* lr 0.02
match-train --out {mess}/grown --resume => last.pt .* people 61
match-train --out {mess}/cut --resume => last.pt: no checkpoint, or damaged
match-train --out {mess}/swap --resume => last.pt: not whole, or of another version
match-train --out {mess}/column/labels.csv/x => Not a directory: .*labels.csv
match-train --out {mess}/big --speech-width 2000000 => out of memory, .* smaller sizes
match-train --data {mess}/broken => too many unreadable files
match-train --data {mess}/few => val: too few people can be read
gan-train --ema-decay 1.5 => --ema-decay 1.5: must be at most 1
gan-train --match {gan}/last.pt => a checkpoint of gan-train, one of match-train is
gan-test --gan {match}/best.pt => a checkpoint of match-train, one of gan-train is
gan-test --gan {gan}/last.pt --judge {mess}/size.pt => size.pt: has --size 64, 32 is
generate {mess}/quiet.wav --gan {gan}/last.pt => quiet.wav: silent
generate {mess}/x.mp3 --gan {gan}/last.pt => x.mp3: must be 16-bit WAV
generate {mess}/32bit.wav --gan {gan}/last.pt => 32bit.wav: .* Error not 16-bit
generate {mess}/x.mp3 -n 0 => error: -n 0: allowed are 1 to 2
make-data {mess} => exists already
check-data {mess}/both --k 7 => train: 6 identities, 7
""".strip().splitlines()


@pytest.fixture(scope="session")
def mess(tmp_path_factory, match_run):
    """A folder of faulty corpora, a silent recording and damaged checkpoints."""
    root = tmp_path_factory.mktemp("mess")
    for name in ["both", "column", "clash", "cut", "swap", "broken", "few"]:
        plain_corpus(root / name, 6)
    shutil.copytree(root / "both/train/train0", root / "both/test/train0")
    for path in (*root.glob("broken/train/*/*/*"), *root.glob("few/val/*[1-5]/*/*")):
        path.write_bytes(b"nonsense")
    write_wav(root / "quiet.wav", np.zeros(16000))
    (root / "x.mp3").write_bytes(b"ID3")
    write_wav(root / "32bit.wav", noise(16000), width=4)
    (root / "column/labels.csv").write_text("name;gender\n1;f\n")
    (root / "clash/labels.csv").write_text("identity,gender\ntrain0,f\ntrain0,m\n")
    state = load(match_run / "last.pt")
    state["settings"]["people"] -= 1
    torch.save(state, v.make_folder(root / "grown") / "last.pt")
    state["settings"]["size"] = 64
    torch.save(state, root / "size.pt")
    (root / "cut/last.pt").write_bytes((match_run / "last.pt").read_bytes()[:9000])
    shutil.copy(match_run / "best.pt", root / "swap/last.pt")
    return root


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_one_line(mistake, argv, usual, mess, tmp_path, capsys):
    line, said = mistake.split(" => ")
    names = {"match": usual["match-train"], "gan": usual["gan-train"], "mess": mess}
    command, *flags = line.format(**names).split()
    out = tmp_path / "new"
    if command in TRAININGS:
        flags = argv(command, out, *flags)[1:]
    elif command not in ("make-data", "check-data"):
        flags += ["--out", out]
    assert re.search(said, refused(capsys, command, *flags))
    assert not list(tmp_path.glob("new/*.pt"))


def start(command, folder, name, workers):
    """A process that trains, or goes on training, in folder/name."""
    flags = f"--resume --steps=24 --save-every=2 --eval-every=12 --workers={workers}"
    flags = flags.split()
    if command == "gan-train":
        flags += ["--match", folder / "match-train/best.pt"]
    line = tiny(command, folder / "data", folder / str(name), *flags)
    line = [sys.executable, FILE, *map(str, line)]
    return subprocess.Popen(line, stdout=subprocess.DEVNULL)


def kill(times):
    """Kill both trainings at random, resume, print whether they end as left alone."""
    folder = Path(tempfile.mkdtemp())
    plain_corpus(folder / "data")
    equal = 0
    for i in range(times):
        command = TRAININGS[2 * i // times]
        if not (folder / command).exists():
            start(command, folder, command, 1).wait()
        process = start(command, folder, i, i % 2)
        step = random.randrange(24)
        log = folder / str(i) / "log.jsonl"
        while process.poll() is None:
            time.sleep(random.uniform(0, 0.03))  # a step takes about as long
            if log.exists() and log.read_bytes().count(b"\n") >= step:
                process.kill()
        start(command, folder, i, (i + 1) % 2).wait()
        equal += left_by(folder / str(i)) == left_by(folder / command)
        print(f"{command} killed at step {step}: {equal} of {i + 1} equal", flush=True)
    shutil.rmtree(folder, ignore_errors=True)
    return int(equal < times)


def test_runs_killed_at_random_moments_end_as_runs_left_alone():
    """One only: `python test_voice2face.py kill 20` makes more of them."""
    assert kill(1) == 0


def bench():
    """Print what the loader takes; trainings print clips_per_s."""
    root = Path(tempfile.mkdtemp(), "few")
    run("make-data", root, "--identities=200")
    cfg = v.parse(["match-train", "--preset=paper"])
    pairs = pairs_of(root / "train", True, 64, cfg=cfg)
    seconds = timeit.timeit(lambda: pairs[0], number=9)
    print(f"loader: {9 * 64 / seconds:.0f} pairs/s on one core")
    shutil.rmtree(root)


if __name__ == "__main__":
    command, *more = sys.argv[1:] or [""]
    if command == "kill":
        sys.exit(kill(int(more[0])))
    sys.exit(bench() if command == "bench" else pytest.main([__file__, *sys.argv[1:]]))
