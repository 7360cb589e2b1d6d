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
import os
import random
import re
import shutil
import subprocess
import sys
import tempfile
import time
import timeit
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
from torch.utils._pytree import tree_leaves

import voice2face as v

torch.set_num_threads(1)  # networks this small are no faster on more
os.environ["OMP_NUM_THREADS"] = "1"  # in the processes started here, too
FILE = Path(v.__file__)
KINDS = {"match-train": v.MatchSettings, "gan-train": v.GanSettings}
CPU = SimpleNamespace(
    device=torch.device("cpu"), autocast=contextlib.nullcontext()
)  # a v.Machine
TINY = (
    "--steps 4 --batch 6 --eval-every 2 --log-every 1 --runs 2 --workers 0 --device cpu "
    "--k 4 --seconds 0.25 --size 32 --speech-width 4 --face-width 4"
).split()
TINY = {"match-train": TINY, "gan-train": [*TINY[:14], "--width", "2"]}
CFG = v.MatchSettings(seconds=0.25, size=32, speech_width=4, face_width=4, batch=32)


def run(*argv, code=0):
    """Run a command and assert its exit code; training on tiny settings, unless told otherwise."""
    assert (
        v.main([str(a) for a in (argv[0], *TINY.get(argv[0], ()), *argv[1:])]) == code
    )


def refused(capsys, *argv):
    """The one line on stderr of a command that must end with exit code 2."""
    capsys.readouterr()
    run(*argv, code=2)
    lines = [
        x
        for x in capsys.readouterr().err.splitlines()
        if not x.startswith("warning: left")
    ]
    assert len(lines) == 1 and lines[0].startswith("voice2face: error: "), lines
    return lines[0]


def write_wav(path, samples, rate=16000, width=2):
    """PCM from floats (T,) or (T, channels) in [-1, 1]; an int is a length of noise."""
    if isinstance(samples, int):
        samples = np.random.default_rng(samples).uniform(-0.5, 0.5, samples)
    samples = np.asarray(samples, float)
    with wave.open(str(path), "wb") as f:
        f.setparams(
            (1 if samples.ndim == 1 else samples.shape[1], width, rate, 0, "NONE", "")
        )
        f.writeframes((samples * 32767).astype(f"<i{width}").tobytes())


def make_clip(folder, sounds, pictures, rate=16000):
    """A clip of {name: samples} and {name: RGB colour or PIL picture}."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, samples in sounds.items():
        write_wav(folder / name, samples, rate)
    for name, face in pictures.items():
        face = Image.new("RGB", (40, 40), face) if isinstance(face, tuple) else face
        face.save(folder / name)


def plain_corpus(root, people=12, broken=()):
    """Noise and plain pictures: a clip each, a picture at 500 ms of 1 s; some without sound."""
    for split, i in itertools.product(("train", "val", "test"), range(people)):
        clip = root / split / f"{split}{i}" / "клип 1"
        make_clip(clip, {"речь.wav": 16000 + i}, {"500.png": (20 * i, 100, 100)})
        if f"{split}{i}" in broken:
            (clip / "речь.wav").write_bytes(b"nonsense")
    return root


def pairs_of(root, seconds=0.25, batch=1, shuffle=False):
    """A dataset of the identities in a folder."""
    cfg, split = (
        v.MatchSettings(seconds=seconds, size=32),
        v.Split(root, sorted(os.listdir(root))),
    )
    return v.PairDataset(
        split._replace(names=np.array(split.names)), cfg, batch, 0, shuffle
    )


def read_log(out):
    """The lines of a run's log."""
    return [json.loads(line) for line in open(out / "log.jsonl", encoding="utf8")]


def observe(command, out, *argv):
    """Run a tiny training; what can be seen of it, a part of which each setting must change."""
    saves, loaders, printed = [], set(), io.StringIO()
    loader, save = torch.utils.data.DataLoader, v.Run.save
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(printed):
        patch.setattr(v, "R1_EVERY", 2)
        patch.setattr(
            v.Run,
            "save",
            lambda run, name, *args, **more: save(
                run, name, *args, **more, **saves.append((name, run.step)) or {}
            ),
        )
        patch.setattr(
            torch.utils.data,
            "DataLoader",
            lambda *args, **more: loader(
                *args, **more, **loaders.add(more["num_workers"]) or {}
            ),
        )
        run(command, "--out", out, *argv)
    state = torch.load(out / "last.pt", weights_only=True)
    parts = ("speech", "face") if command == "match-train" else ("g", "d", "g_ema")
    return dict(
        weights=[t.numpy().tobytes() for part in parts for t in state[part].values()],
        metrics=(out / "metrics.json").read_text(),
        saves=saves,
        loaders=loaders,
        tests=re.findall("^step . val.*", printed.getvalue(), re.M),
        log=[line["step"] for line in read_log(out)],
    )


@pytest.fixture(scope="session")
def corpus(tmp_path_factory):
    """A small synthetic corpus: 84 identities, 62 / 10 / 12."""
    root = tmp_path_factory.mktemp("data") / "corpus"
    run("make-data", root, "--identities", 84, "--seed", 3)
    return root


@pytest.fixture(scope="session")
def runs(corpus, tmp_path_factory):
    """The folders of a run of match-train and of gan-train, and what was seen of both."""
    root = tmp_path_factory.mktemp("runs")
    match, gan = root / "match", root / "gan"
    seen = {"match-train": observe("match-train", match, "--data", corpus)}
    seen["gan-train"] = observe(
        "gan-train", gan, "--data", corpus, "--match", match / "best.pt"
    )
    return SimpleNamespace(match=match, gan=gan, seen=seen)


# ---- 1. Inference
def test_sinc_filters_are_numpys_band_passes():
    edges = np.linspace(
        2595 * np.log10(1 + 30 / 700), 2595 * np.log10(1 + 7900 / 700), 9
    )
    hz, n, layer = (
        700 * (10 ** (edges / 2595) - 1),
        np.arange(101) - 50,
        v.SincConv(8, 101),
    )
    for i, got in enumerate(layer.filters().detach().numpy()):
        low, high = 50 + hz[i], min(100 + hz[i + 1], 8000)
        wide, narrow = (2 * f / 16000 * np.sinc(2 * f / 16000 * n) for f in (high, low))
        expected = (wide - narrow) * np.hamming(101) / (2 * (high - low) / 16000)
        np.testing.assert_allclose(got, expected, atol=2e-4)


def test_sinc_passes_its_band_and_stops_the_rest():
    layer = v.SincConv(1, 251)
    layer.low_hz.data[:], layer.band_hz.data[:] = 1950, 950  # 2000 ... 3000 Hz
    tones = torch.tensor([2500, 2200, 2800, 500, 1700, 3300, 6000])[:, None]
    sines = torch.sin(2 * math.pi * tones * torch.arange(8000) / 16000)
    gains = layer(sines[:, None, None])[:, 0, 0, 2000:6000]
    inside, *others = gains.amax(1).tolist()
    assert (
        others[:2] == approx([inside, inside], rel=0.05)
        and max(others[2:]) < 0.01 * inside
    )


def test_sinc_edges():
    layer = v.SincConv(4, 31, stride=3).to(torch.float64)
    layer.low_hz.data[:2], layer.band_hz.data[:2] = (
        1e5,
        -1e5,
    )  # far outside of 0 ... 8000 Hz
    out = layer(torch.randn(2, 1, 1, 130).double())
    assert out.dtype == layer.t.dtype == torch.float64 and out.shape == (2, 4, 1, 34)
    out.square().sum().backward()
    assert out.isfinite().all() and layer.low_hz.grad.isfinite().all()


def test_published_sizes():
    with torch.device("meta"):
        face = v.FaceEncoder(128, v.PAPER[v.MatchSettings]["face_width"])
        nets = v.SpeechEncoder(64, 1), face, v.Generator(128, 64), v.Discriminator(face)
    w, k = (
        [64, 64, 128, 128, 256, 256, 512, 512],
        [251, 20, 11, 11, 11, 11, 11, 11],
    )  # [PASE]
    convs = 2 * 64 + sum(w[i - 1] * w[i] * k[i] for i in range(1, 8))
    blocks = [
        (3, 64, 64),
        *((w, w, 2 * w) for w in (64, 128, 256, 512)),
        (1024, 1024, 1024),
    ]
    count = sum(
        9 * a * h + h + 9 * h * b + b + a * b + b for a, h, b in blocks
    )  # [SNGAN]
    assert [sum(p.numel() for p in net.parameters()) for net in nets] == [
        convs + 3 * sum(w) + 513 * 128,
        count + 1025 * 128,
        36_803_843,
        count + 1025 * 128 + 17 * 1024**2 + 1024 + 1024,
    ]  # psi: 16 places and the deviations
    lengths, small = [], v.SpeechEncoder(2).eval()
    small.body[-1].register_forward_hook(
        lambda act, x, y: lengths.append(y[0, 0].numel())
    )
    assert small(torch.randn(1, 96000)).shape == (1, 128) and lengths == [600]  # 6 s


def test_dblock_pools_before_its_shortcut_without_changing_it():
    block, x = v.DBlock(4, 6), torch.randn(2, 4, 8, 8)
    h = block.conv2(torch.relu(block.conv1(torch.relu(x))))
    assert_close(block(x), torch.nn.functional.avg_pool2d(h + block.skip(x), 2))


def test_embeddings_have_one_length_and_a_centred_start():
    torch.manual_seed(0)
    for encoder, x in (
        (v.SpeechEncoder(4, 8, 3.0), 0.1 * torch.randn(64, 4000)),
        (v.FaceEncoder(32, 4, 3.0), torch.rand(64, 3, 32, 32) * 2 - 1),
    ):
        assert encoder(x).mean(0).norm() > 2  # all in nearly one direction
        v.centre_head(encoder, x)
        after, std = encoder(x), encoder.head(encoder.features(x)).std(0)
        assert_close(after.norm(dim=1), torch.full((64,), 3.0))
        assert after.mean(0).norm() < 0.5 and (std - 1).abs().max() < 1e-3


@pytest.mark.parametrize("rows, k", [(10, 5), (4, 4), (12, 2)])
def test_candidates_over_thousands_of_draws(rows, k):
    generator, counts, share = torch.Generator().manual_seed(0), 0, (k - 1) / (rows - 1)
    for _ in range(3000):
        candidates = v.sample_candidates(rows, k, generator)
        assert (
            candidates.shape == (rows, k)
            and (candidates[:, 0] == torch.arange(rows)).all()
        )
        counts = counts + torch.nn.functional.one_hot(candidates, rows).sum(1)
        assert all(
            len(set(row)) == k for row in candidates.tolist()
        )  # none meets itself again
    gap = (counts - 3000 * share)[~torch.eye(rows, dtype=bool)].abs().max().item()
    assert gap <= 5 * math.sqrt(3000 * share * (1 - share))  # 5 sigma of a fair draw
    with pytest.raises(
        v.UserError, match=f"K = {rows + 1} needs {rows + 1} identities at once"
    ):
        v.sample_candidates(rows, rows + 1, generator)


@pytest.mark.parametrize("direction", ["v-f", "f-v"])
def test_equation_1_against_a_hand_computation(direction):
    speech, faces = torch.randn(2, 5, 8).double()
    candidates, expected = (
        torch.tensor([[i, (i + 1) % 5, (i + 3) % 5] for i in range(5)]),
        [],
    )
    query, keys = (speech, faces) if direction == "v-f" else (faces, speech)
    for i, row in enumerate(candidates):
        products = [math.exp(sum(query[i] * keys[j])) for j in row]
        expected.append(-math.log(products[0] / sum(products)))
    loss = (
        -v.match_logits(speech, faces, candidates, direction)
        .log_softmax(1)[:, 0]
        .mean()
    )
    assert loss.item() == approx(np.mean(expected))
    ties = torch.tensor([[1.0, 1, 1, 1], [2, 1, 2, 0], [0, 1, 1, 0], [5, 1, 2, 3]])
    assert v.top1(ties).tolist() == [
        0.25,
        0.5,
        0,
        1,
    ]  # equal candidates share the point


# ---- 2. Generation
def test_adain_gives_the_styles_mean_and_deviation():
    torch.manual_seed(0)
    layer, x, style = (
        v.AdaIN(5),
        3 + 7 * torch.randn(4, 5, 6, 8),
        torch.randn(4, 2 * v.EMBED),
    )
    scale, shift = (
        layer.style(style)[:, :5, None, None],
        layer.style(style)[:, 5:, None, None],
    )
    std, mean = torch.std_mean(x, (2, 3), correction=0, keepdim=True)
    expected = (1 + scale) * (x - mean) / std + shift
    assert_close(layer(x, style), expected, atol=1e-3, rtol=0)
    assert_close(
        layer(x + 7000, style), expected, atol=0.02, rtol=0
    )  # 1000 deviations away
    assert (
        layer(torch.full((4, 5, 4, 4), 1e3), style).isfinite().all()
    )  # no deviation at all


@pytest.mark.parametrize("size", [8, 32, 128])
def test_generator_shape_range_and_both_inputs(size):
    torch.manual_seed(0)
    generator, z, c = (
        v.Generator(size, 2),
        torch.randn(3, 128),
        3.5 * torch.randn(3, 128),
    )
    faces = generator(z, c)
    assert faces.shape == (3, 3, size, size) and faces.abs().max() <= 1
    assert (
        faces.std() > 0.05 and (faces.abs() > 0.95).float().mean() < 0.2
    )  # neither grey nor full
    assert all(
        (x - faces).abs().max() > 0.01 for x in (generator(z + 1, c), generator(z, -c))
    )
    assert_close(generator(z, 9 * c), faces)  # c has one length
    assert_close(generator(z[:1], c[:1]), faces[:1])  # no batch statistics


def test_logit_is_equation_2_written_out():
    torch.manual_seed(0)
    face_encoder, faces = (
        v.FaceEncoder(16, 2, 3.5),
        torch.randn(4, 3, 16, 16, requires_grad=True),
    )
    discriminator, c = v.Discriminator(face_encoder, weight=0.2), torch.randn(4, 128)
    (first, _, last), places = discriminator.psi, torch.relu(face_encoder.blocks(faces))
    spread = (
        (places.sum((2, 3)).std(0, correction=0).square() + 1e-4).sqrt().expand(4, -1)
    )
    hidden = (
        torch.cat([places.flatten(1), spread], 1) @ first.weight.T + first.bias
    )  # (4, C)
    psi = torch.where(hidden > 0, hidden, 0.2 * hidden) @ last.weight[0]
    expected = torch.stack(
        [0.2 * c[i] @ face_encoder(faces)[i] + psi[i] for i in range(4)]
    )
    found = v.logit(c, *discriminator(faces))
    assert_close(found, expected, rtol=1e-4, atol=1e-5)
    assert_close(*(torch.autograd.grad(x.sum(), faces)[0] for x in (found, expected)))
    for mine, theirs in zip(discriminator.phi.parameters(), face_encoder.parameters()):
        assert (
            torch.equal(mine, theirs) and mine is not theirs and mine.requires_grad
        )  # a copy


def test_losses_and_gradients_against_closed_forms():
    numbers = torch.randn(4, 7, dtype=torch.float64) * 3
    real, fake, match, mismatch = numbers.numpy()
    for loss, x in (
        (v.rel_loss, real - fake),
        (v.relid_loss, real - fake + match - mismatch),
    ):
        used = [n.clone().requires_grad_(True) for n in numbers][
            : 2 if loss is v.rel_loss else 4
        ]
        value, sigmoid = loss(*used), 1 / (1 + np.exp(-x))
        assert value.item() == approx(-np.log(sigmoid).mean(), rel=1e-9)
        for gradient, sign in zip(torch.autograd.grad(value, used), (-1, 1, -1, 1)):
            np.testing.assert_allclose(
                gradient.numpy(), sign * (1 - sigmoid) / 7, rtol=1e-9
            )
        far = [torch.tensor([-1e4]), *[torch.zeros(1)] * (len(used) - 1)]
        assert loss(*far) == 1e4  # where log(sigmoid(x)) would be minus infinity


def test_r1_of_functions_with_known_gradients():
    faces, c, zero = torch.randn(5, 3, 4, 4), torch.arange(5.0)[:, None], torch.zeros(5)
    a = torch.tensor(2.0, requires_grad=True)  # of a c |f|^2
    penalty = v.r1_penalty(
        lambda f: (a * f.square().sum((1, 2, 3))[:, None], zero), faces, c
    )
    expected = np.mean([(2 * 2 * i * faces[i]).square().sum().item() for i in range(5)])
    assert penalty.item() == approx(expected, rel=1e-5) and not faces.requires_grad
    assert torch.autograd.grad(penalty, a)[0].item() == approx(
        expected, rel=1e-5
    )  # 2 a / a^2 is 1


# ---- 3. Training
def test_a_match_step_goes_down_equation_1(corpus, tmp_path, monkeypatch):
    seen, losses, used, logits, descend = [], [], [], v.match_logits, v.descend
    monkeypatch.setattr(
        v, "match_logits", lambda *args: seen.append(args) or logits(*args)
    )
    monkeypatch.setattr(
        v,
        "descend",
        lambda optimizer, loss, *rest: descend(
            used.append(optimizer) or optimizer,
            losses.append(loss.item()) or 1000 * loss,
            *rest,
        ),
    )
    run(
        "match-train",
        "--data",
        corpus,
        "--out",
        tmp_path,
        "--eval-every",
        9,
        "--steps",
        2,
    )
    for (se, fe, candidates, direction), loss in zip(seen, losses):
        similarity = (se @ fe.T).double().detach().numpy()
        assert all(
            row[0] == i and len(set(row)) == 4
            for i, row in enumerate(candidates.tolist())
        )
        total = np.exp(np.take_along_axis(similarity, candidates.numpy(), 1)).sum(1)
        expected = (np.log(total) - similarity.diagonal()).mean()
        assert loss == approx(expected, rel=1e-4) and direction == "v-f"
    assert not torch.equal(seen[0][2], seen[1][2])  # each step has negatives of its own
    steep = [
        p.grad for group in used[-1].param_groups for p in group["params"]
    ]  # of 1000 losses
    assert torch.nn.utils.get_total_norm(steep).item() == approx(
        v.MAX_NORM, rel=1e-4
    )  # is cut


@pytest.mark.parametrize("loss", ["relid", "rel"])
def test_a_gan_step(loss, corpus, runs, tmp_path, monkeypatch):
    """D's loss is Eq. 5 or 4, G's swaps real and fake; G steps, then D from the same faces."""
    nets, seen, moved, average, shares = {}, {}, [], [], []
    roles, judge = itertools.cycle("dg"), v.Discriminator.forward

    def spied_generator(net, z, c, real=v.Generator.forward):
        nets["g"], seen["c"], seen["real"], seen["fake"] = net, c, None, real(net, z, c)
        return seen["fake"]

    def spied_discriminator(net, faces):
        nets["d"] = net
        seen["real"] = (
            faces if seen["real"] is None else seen["real"]
        )  # D sees them first
        return judge(net, faces)

    def spied_loss(*terms, real=getattr(v, f"{loss}_loss")):
        role, c = next(roles), seen["c"]
        order = (
            ("real", "fake") if role == "d" else ("fake", "real")
        )  # the first's identity counts
        (phi, psi), (phi2, psi2) = (judge(nets["d"], seen[x]) for x in order)
        expected = [(c * phi).sum(1) + psi, (c * phi2).sum(1) + psi2]
        if loss == "relid":
            others = (
                (phi @ c.T - terms[3][:, None]).abs().argmin(1)
            )  # whose condition c- is
            assert (others != torch.arange(6)).all()  # a row is an identity
            expected += [(c * phi).sum(1), (c[others] * phi).sum(1)]
        assert_close([*terms], expected)
        return seen.update({role: real(*terms)}) or seen[role]

    def spied_descend(*args, real=v.descend, **kwargs):
        before = {
            name: [p.clone() for p in net.parameters()] for name, net in nets.items()
        }
        average[:] = average or [nets["g"].last.weight.detach().clone()]
        shares.append(args[2])
        role = "gd"[len(moved) % 2]
        r1_r2 = sum(
            v.r1_penalty(nets["d"], seen[x], seen["c"]) for x in ("real", "fake")
        )
        assert_close(
            args[1], seen[role] + 2 * 0.5 / 2 * r1_r2 * (len(moved) % 4 == 3)
        )  # lazily
        real(*args, **kwargs)
        moved.append(
            [
                name
                for name, net in nets.items()
                if not all(map(torch.equal, net.parameters(), before[name]))
            ]
        )
        if role == "g":
            average[0] = 0.998 * average[0] + 0.002 * nets["g"].last.weight.detach()

    monkeypatch.setattr(v.Generator, "forward", spied_generator)
    monkeypatch.setattr(v.Discriminator, "forward", spied_discriminator)
    monkeypatch.setattr(v, f"{loss}_loss", spied_loss)
    (
        monkeypatch.setattr(v, "descend", spied_descend),
        monkeypatch.setattr(v, "R1_EVERY", 2),
    )
    monkeypatch.setattr(
        v, "evaluate", lambda *args: json.loads(runs.seen["gan-train"]["metrics"])
    )
    match = runs.match / "best.pt"
    run(
        "gan-train",
        "--data",
        corpus,
        "--match",
        match,
        "--out",
        tmp_path,
        "--loss",
        loss,
    )
    after, before = (
        torch.load(x, weights_only=True) for x in (tmp_path / "last.pt", match)
    )
    assert shares == [1, 1, 1, 1, 1, 1, 0.5, 0.5]  # of the rates
    assert moved == [["g"], ["d"]] * 4 and all(
        torch.equal(t, after[part][key])
        for part in ("speech", "face")
        for key, t in before[part].items()
    )  # S and F are frozen
    assert_close(after["g_ema"]["last.weight"], average[0], rtol=0, atol=1e-6)
    assert (after["g"]["last.weight"] - average[0]).abs().max() > 1e-3


def test_best_is_what_validated_best_and_rates_rise_and_fall(
    corpus, tmp_path, monkeypatch
):
    scores = [3.0, 5.0, 4.0, 5.0]
    monkeypatch.setattr(v, "validate", lambda *args: scores.pop(0))
    run("match-train", "--data", corpus, "--out", tmp_path, "--eval-every", 1)
    kept = [
        torch.load(tmp_path / f"{name}.pt", weights_only=True)
        for name in ("best", "last")
    ]
    assert (kept[0]["step"], kept[1]["step"], kept[1]["best"]) == (2, 4, 5.0)
    shares = [v.rate_share(step, 20, 0.1) for step in range(1, 21)]
    np.testing.assert_allclose(
        shares, [0.5, *[1] * 10, *np.arange(9, 0, -1) / 10], rtol=1e-12
    )


CHANGES = (
    dict(  # a setting: another value, and what it must change of what observe() sees
        runs=(3, "metrics"),
        val_clips=(4, "tests"),
        eval_every=(4, "tests"),
        save_every=(3, "saves"),
        log_every=(2, "log"),
        workers=(1, "loaders"),
    )
    | {
        name: (value, "weights")
        for name, value in dict(
            seed=1,
            direction="f-v",
            k=3,
            steps=5,
            batch=8,
            seconds=0.3,
            size=64,
            sinc_stride=4,
            speech_width=6,
            face_width=6,
            embed_scale=5.0,
            lr=0.01,
            loss="rel",
            width=3,
            weight=0.5,
            d_lr=0.01,
            gamma=5.0,
            ema_decay=0.5,
            augment=True,
            weight_decay=0.1,
        ).items()
    }
)


@pytest.mark.parametrize(
    "command, name",
    [
        (command, f.name)
        for command, kind in KINDS.items()
        for f in fields(kind)
        if f.name not in ("device", "preset", "out", "resume")
    ],
)  # these have tests of their own
def test_every_setting_matters(command, name, runs, corpus, tmp_path):
    data = plain_corpus(tmp_path / "plain") if name == "data" else corpus
    match = runs.match / ("last.pt" if name == "match" else "best.pt")
    argv = ["--data", data] + ["--match", match] * (command == "gan-train")
    value, changed = CHANGES.get(name, (None, "weights"))
    argv += ([v.flag(name)] + [value] * (value is not True)) * (name in CHANGES)
    usual, got = runs.seen[command], observe(command, tmp_path / "run", *argv)
    assert got[changed] != usual[changed]
    assert changed == "weights" or got["weights"] == usual["weights"]


def test_presets_help_and_flags(capsys):
    argv = ["gan-train", "--preset", "paper", "--lr", "0.5"]
    assert v.make_settings(v.make_parser().parse_args(argv)) == v.GanSettings(
        **v.PAPER[v.GanSettings] | dict(preset="paper", lr=0.5)
    )
    for command in (
        *KINDS,
        "match-test",
        "gan-test",
        "generate",
        "make-data",
        "check-data",
    ):
        with pytest.raises(SystemExit, match="0"):
            v.main([command, "--help"])
        text = " ".join(capsys.readouterr().out.split())
        shown = fields(KINDS[command]) if command in KINDS else ()
        assert "(default: " in text and all(
            v.flag(f.name) in text and f"(default: {f.default}" in text for f in shown
        )
    for argv in (
        "match-train --stepps 4",
        "match-train --size 48",
        "gan-train --lr x",
        "generate",
    ):
        with pytest.raises(SystemExit, match="2"):
            v.main(argv.split())


def test_augment_cuts_colours_equalises_and_adds_noise():
    n, rng, t = 200, torch.Generator().manual_seed(0), torch.arange(8000) / 8000
    across, tone = torch.linspace(-1, 1, 64), torch.sin(2 * math.pi * 1000 * t)
    speech, faces = v.augment(tone.expand(n, -1), across.expand(n, 3, 64, 64), rng)
    line = faces[
        :, :, 10, 1:-1
    ]  # (n, 3, 62): still a line; its slope is zoom times contrast
    slope, centre = (
        line.diff(dim=-1) * 31.5,
        line.mean(-1),
    )  # centre: place, contrast and light
    assert (
        slope.std(-1).max() < 1e-3
        and slope.std(0).min() > 0.1
        and centre.std(0).min() > 0.1
    )
    assert 0.48 < slope.min() < 0.6 and 1.2 < slope.max() < 1.31
    assert 0.3 < centre.abs().max() <= 0.3 * 1.3 + 0.3
    level = 2 / 8000 * (speech * tone).sum(1)  # of the tone: up to 8 dB more or less
    rest = (
        (speech - level[:, None] * tone).std(1) / tone.std() / level
    )  # of the noise: 0 to 0.2
    assert 0.39 < level.min() < 0.6 and 1.7 < level.max() < 2.52
    assert 0 <= rest.min() < 0.03 and 0.15 < rest.max() < 0.22


def test_importing_does_nothing(tmp_path):
    code = f"import sys; sys.path.insert(0, {str(FILE.parent)!r}); import voice2face"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, capture_output=True
    )
    assert (done.returncode, done.stdout + done.stderr, [*tmp_path.iterdir()]) == (
        0,
        b"",
        [],
    )


# ---- 4. Evaluation
def test_k_way_planted_answers_and_brute_force():
    torch.manual_seed(1)
    same, nobody, rng = torch.randn(1000, 16), [{}] * 1000, np.random.default_rng(0)
    perfect, blind = (
        v.matching_scores(x, same, nobody, 0) for x in (same, torch.ones(1000, 16))
    )
    speech = (same + 2 * torch.randn(1000, 16)) * 10 ** torch.randn(
        1000, 1
    )  # some are loud
    got = [v.matching_scores(speech, same, nobody, seed) for seed in range(5)]
    for direction, k in itertools.product(("v-f", "f-v"), (2, 10)):
        key, similarity = f"{direction}/{k}", (speech @ same.T).numpy()
        wrong = [rng.choice(999, k - 1, replace=False) for _ in range(1000)]
        hits = [
            row[i] > row[w + (w >= i)].max()
            for i, (row, w) in enumerate(
                zip(similarity if direction == "v-f" else similarity.T, wrong)
            )
        ]
        assert np.mean([row[key] for row in got]) == approx(100 * np.mean(hits), abs=5)
        assert (
            perfect[key] > 99 and direction == "v-f" or blind[key] == approx(100 / k)
        )  # ties


def test_names_in_the_order_of_a_factor_do_not_widen_the_deviation():
    angle = torch.linspace(0, 2 * math.pi, 301)[:300] + torch.tensor(
        [[0.0], [0.5]]
    )  # (2, 300)
    speech, faces = torch.stack(
        [angle.cos(), angle.sin()], 2
    )  # (300, 2) each, 0.5 apart
    scores = [
        v.matching_scores(speech, faces, [{}] * 300, seed)["v-f/2"]
        for seed in range(20)
    ]
    assert (
        80 < np.mean(scores) < 88 and np.std(scores) < 5
    )  # with one shift for all: 0 or 100


def test_same_gender_negatives_on_planted_embeddings():
    """Who knows but the gender scores 3 in 4 among all, and chance among the same gender."""
    genders = [*np.random.default_rng(0).permutation(["f", "m"] * 300), *[""] * 100]
    people = [{"gender": g} for g in genders]  # nobody knows of the last hundred
    one_hot = torch.tensor([[g == "f", g == "m"] for g in genders]).float()
    rows = [
        v.matching_scores(one_hot[:600], one_hot[:600], people[:600], i)
        for i in range(20)
    ]
    for key, expected in (("v-f/2", 75), ("f-v/10", 20)):
        assert np.mean([row[key] for row in rows]) == approx(expected, abs=2)
    row = v.matching_scores(one_hot, one_hot, people, 0, "real/")
    assert row["real/v-f/2/gender"] == approx(50) and row[
        "real/f-v/10/gender"
    ] == approx(10)


@pytest.mark.parametrize(
    "link, table", [(0.5, (86.7, 73.1, 43.7, 28.4)), (0.75, (93.3, 87.3, 65.0, 49.5))]
)  # simulated elsewhere
def test_oracle_is_the_normals_log_ratio_and_scores_the_reference_table(
    link, table, monkeypatch
):
    monkeypatch.setattr(v, "LINK", link)
    rng = np.random.default_rng(0)
    people = [v.sample_person(rng) for _ in range(20000)]
    voices, faces = v.oracle_embeddings(people)
    gender, *numbers = (
        np.array([person[name] for person in people[:40]])
        for name in (
            "gender",
            "voice_age",
            "voice_tract",
            "voice_build",
            "age",
            "tract",
            "build",
        )
    )
    a, b = (
        np.array(numbers[:3])[:, :, None],
        np.array(numbers[3:])[:, None],
    )  # (3, 40, 1 or 40)
    joint = (
        -(a * a - 2 * link * a * b + b * b) / 2 / (1 - link**2)
    )  # of the bivariate normal
    ratio, same = (joint + (a * a + b * b) / 2).sum(0), gender[:, None] == gender
    gap = (voices[:40] @ faces[:40].T).double().numpy() - ratio  # a constant
    assert np.ptp(gap[same]) < 2e-3 and gap[~same].max() < gap[same].min() - 500
    scores = [v.matching_scores(voices, faces, people, seed) for seed in range(5)]
    for key, expected in zip(("2", "2/gender", "10", "10/gender"), table):
        assert np.mean([row[f"v-f/{key}"] for row in scores]) == approx(
            expected, abs=1.2
        )


def test_preference_and_distances_of_planted_faces():
    c, genders = torch.randn(40, 4), [i // 7 % 2 for i in range(40)]
    for fake, real, expected in (
        (c, -c, 100),
        (-c, c, 0),
        (torch.cat([c[:10], -c[10:]]), 0 * c, 25),
    ):
        assert v.drawn_scores(c, fake, real, [{}] * 40, 0)["preferred"] == approx(
            expected
        )
    one_hot, people = torch.eye(2)[genders], [{"gender": str(g)} for g in genders]
    panels = [
        v.distance_panels(one_hot, -3 * one_hot, people, seed) for seed in range(10)
    ]
    for title, distance in (("same", 0), ("different", 1)):
        x, y = (
            torch.cat(rows) for rows in zip(*(p[title] for p in panels if title in p))
        )
        assert (
            len(x) > 50
            and (x - distance).abs().max() < 1e-6 > (y - distance).abs().max()
        )
    panels = v.distance_panels(c, c, [{}] * 40, 0)
    assert [*panels] == ["all"] and panels["all"][0].min() > 1e-4  # of two people


def test_retrieval_of_planted_answers_and_brute_force():
    real, fake = torch.randn(2, 60, 8, generator=torch.Generator().manual_seed(0))
    perfect, scores = (
        v.drawn_scores(real, x, real, [{}] * 60, 0) for x in (real, fake)
    )
    assert (
        v.recall(torch.ones(60, 60), "r")["r/10"] == 0
    )  # a constant answer finds nobody
    q, g = fake.numpy()[:, None], real.numpy()[None]
    cosine = (q * g).sum(2) / np.linalg.norm(q, axis=2) / np.linalg.norm(g, axis=2)
    for name, d in (
        ("L1", abs(q - g).sum(2)),
        ("L2", ((q - g) ** 2).sum(2)),
        ("cosine", -cosine),
    ):
        for k in (1, 2, 5, 10):
            hits = [i in np.argsort(d[i])[:k] for i in range(60)]
            assert scores[f"retrieval/{name}/{k}"] == approx(100 * np.mean(hits))
            assert perfect[f"retrieval/{name}/{k}"] == 100


def test_variance_shares_of_planted_factors():
    torch.manual_seed(0)
    a, b = torch.randn(30, 1, 1), torch.randn(1, 20, 1)
    a, b = (a - a.mean()) / a.std(correction=0), (b - b.mean()) / b.std(correction=0)
    for read, *expected in (
        (a + 0 * b, 100, 0),
        (0 * a + b, 0, 100),
        (a * b, 0, 0),
        (3 * a + b, 90, 10),
    ):
        shares = v.variance_shares(read)
        assert [shares[name].item() for name in ("c", "z")] == approx(
            expected, abs=1e-3
        )


def test_probe_is_ridge_regression_and_reads_unseen_people(corpus):
    x, y = (
        0.02 * torch.rand(40, 3, 32, 32),
        torch.randn(40, 2),
    )  # so dim that the ridge matters
    flat = np.c_[x.flatten(1).double().numpy(), np.ones(40)]
    dual = flat.T @ np.linalg.solve(
        flat @ flat.T + 40 * 0.01 * np.eye(40), y.double().numpy()
    )
    np.testing.assert_allclose(v.fit_probe(x, y), dual, atol=0.01 * abs(dual).max())
    labels, splits = v.read_labels(corpus), v.open_corpus(corpus, dict(train=2, test=2))
    (x, known), (others, truth) = (
        (faces, v.numbers([labels[name] for name in names], ["background"]))
        for _, faces, names in (
            v.sample_batch(split, CFG, 99, 0, CPU) for split in splits.values()
        )
    )
    read = v.pixels(others) @ v.fit_probe(x, known - known.mean())
    assert np.corrcoef(read[:, 0], truth[:, 0])[0, 1] > 0.9


def test_match_test_repeats_the_metrics(runs, corpus, tmp_path):
    usual, found = runs.seen["match-train"]["metrics"], []
    for more in ((), ("--split", "train"), ("--seed", 5), ("--runs", 1)):
        run(
            "match-test",
            "--data",
            corpus,
            "--match",
            runs.match / "best.pt",
            "--out",
            tmp_path,
            "--runs",
            2,
            "--workers",
            0,
            *more,
        )
        found.append((tmp_path / "metrics.json").read_text())
    assert found[0] == usual and len(set(found)) == 4
    for key in ("v-f/2", "v-f/10", "f-v/2", "f-v/10", "v-f/2/gender"):
        assert {key, f"{key}/std", f"oracle/{key}"} <= json.loads(usual).keys()


def test_control_scores_of_a_generator_that_shows_planted_factors(monkeypatch):
    """A face is a row of numbers. S hears the voice's; G shows them, then the first five of z."""

    def picture(values):  # (n, 9) -> (n, 3, 32, 32)
        return torch.nn.functional.pad(values[:, None, None], (0, 23, 0, 31)).expand(
            -1, 3, -1, -1
        )

    class Shown(torch.nn.Linear):
        def forward(self, x, c=None):
            return (
                x if c is None else picture(torch.cat([3 * c[:, :4] - 1, x[:, :5]], 1))
            )

    rng, heard = (
        np.random.default_rng(0),
        ["gender", *(f"voice_{name}" for name in v.LINKED)],
    )
    labels = {str(i): v.sample_person(rng) for i in range(400)}
    voices, faces = (
        v.numbers(labels.values(), x) for x in (heard + 124 * ["pitch"], v.FACTORS)
    )
    monkeypatch.setattr(
        v, "sample_batch", lambda *args: (voices, picture(faces), labels)
    )
    model = v.Model(None, Shown(1, 1), None, None, Shown(1, 1))
    scores = v.control_scores(model, dict(train=None, test=None), labels, CPU)
    assert scores["control/gender/right"] == 100
    for e, name in enumerate(v.FACTORS):
        due = [scores[f"control/{name}/{cause}"] for cause in "cz"]
        assert due == approx([100, 0] if e < 4 else [0, 100], abs=2), name
        assert (
            min(
                scores[f"control/{name}/{x}"] for x in ("probe", "voice")[: 1 + (e < 4)]
            )
            > 0.98
        )


# ---- 5. Figures, report, faces for any recording
def test_report_names_its_picture_and_measures_everything(corpus, runs, tmp_path):
    argv = [
        "gan-test",
        "--gan",
        runs.gan / "last.pt",
        "--workers",
        0,
        "--runs",
        2,
        "--data",
    ]
    run(*argv, corpus, "--out", tmp_path)
    metrics = json.loads((tmp_path / "metrics.json").read_text())
    page = (tmp_path / "report.md").read_text(encoding="utf8")
    for key in (
        "preferred qta1/all/r qta1/all/face f-v/10 v-f/10 qta1/all/c retrieval/L1/1 "
        "retrieval/L2/2 retrieval/cosine/10 v-f/2 v-f/2/gender oracle/retrieval/1 "
        "real/v-f/10 oracle/f-v/2"
    ).split():
        text = f"{metrics[key]:.2f} ± {metrics[f'{key}/std']:.2f}"
        assert f"| {key:24} | {text:14} |" in page, key
    assert all(
        f"| control/{name}/{of} " in page for name in v.FACTORS for of in ("c", "probe")
    )
    usual = json.loads(
        runs.seen["match-train"]["metrics"]
    )  # the same people and windows
    assert all(
        metrics[f"real/{key}"] == x for key, x in usual.items() if key[:6] != "oracle"
    )
    assert "](figures.png)" in page and (tmp_path / "figures.png").exists()
    model, split = (
        v.load_model(runs.gan / "last.pt", v.GanSettings, CPU),
        v.open_corpus(corpus, dict(test=2))["test"],
    )
    check_figures(model, split)
    v.plot_figures(
        model, v.thin(split, 2), tmp_path / "few.png", CPU
    )  # no couples to plot
    assert Image.open(tmp_path / "few.png").size == (8 * 132, 15 * 152)
    run(
        *argv, plain_corpus(tmp_path / "plain"), "--out", tmp_path / "r"
    )  # without labels
    page = (tmp_path / "r/report.md").read_text(encoding="utf8")
    assert "| preferred  " in page and not re.findall("control/|qta1/same", page)


def check_figures(model, split):
    """The rows of plot_figures: planted distances, known ends between two z or c, order by F."""
    panel, rows = (torch.full((9,), 0.3), torch.full((9,), 0.6)), []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            v,
            "plot_grid",
            lambda path, found: rows.extend(torch.cat(parts) for _, *parts in found),
        )
        patch.setattr(v, "distance_panels", lambda *args: {"all": panel})
        v.plot_figures(model, split, None, CPU)
    for row, end in (
        (6, rows[3][1]),
        (7, rows[7][-1]),
    ):  # drawn faces begin with row 0's first
        assert_close(rows[row][1], rows[0][1]), assert_close(rows[row][6], end)
        assert not torch.equal(rows[row][3], rows[row][1])
    like = (
        v.apply(model.face_encoder, rows[8][2:])
        @ v.apply(model.face_encoder, rows[8][1:2])[0]
    )
    assert (
        torch.equal(like, like.sort(descending=True).values)
        and len(rows) == 6 + 3 * 3 + 1
    )
    assert (rows[-1][0, 0] < 0).nonzero().tolist() == [
        [22, 4]
    ]  # up and across, 16 bins for 1


def test_generate_draws_for_any_recording(runs, tmp_path, monkeypatch):
    paths = [tmp_path / name for name in ("短い.wav", "high stereo.wav", "low.wav")]
    seen, load = [], v.load_speech
    monkeypatch.setattr(
        v,
        "load_speech",
        lambda path, seconds, *more: seen.append(seconds) or load(path, seconds, *more),
    )
    write_wav(paths[0], 1600)  # shorter than what is heard
    write_wav(paths[1], np.random.default_rng(0).uniform(-0.5, 0.5, (44100, 2)), 44100)
    write_wav(paths[2], 8000 * 2, 8000)
    for out, seed in (("new/a.png", 0), ("new/b.png", 1), ("faces", 0)):
        run(
            "generate",
            *paths,
            "--gan",
            runs.gan / "last.pt",
            "--out",
            tmp_path / out,
            "-n",
            3,
            "--seed",
            seed,
        )
    grid, other = (np.asarray(Image.open(tmp_path / f"new/{x}.png")) for x in "ab")
    assert (
        grid.shape == (3 * 152, 396, 3)
        and not np.array_equal(grid, other)
        and {*seen} == {6}
    )
    names = [
        f"{i + 1:04}_{path.stem}_z{k}.png"
        for i, path in enumerate(paths)
        for k in (1, 2, 3)
    ]
    assert sorted(os.listdir(tmp_path / "faces")) == names
    faces = [np.asarray(Image.open(tmp_path / "faces" / name)) for name in names]
    assert {x.shape for x in faces} == {(32, 32, 3)} and len(
        {x.tobytes() for x in faces}
    ) == 9
    assert np.array_equal(
        other[24:152, 2:130], faces[0].repeat(4, 0).repeat(4, 1)
    )  # z of seed 1


# ---- 6. Data
@pytest.mark.parametrize(
    "length, window, moment, guard",
    [
        (20, 5, None, 2),
        (20, 5, 7, 0),
        (20, 5, 9, 2),
        (20, 5, 0, 2),
        (20, 5, 19, 2),
        (20, 5, 40, 2),
        (20, 5, 21, 2),
        (9, 5, 4, 1),
        (20, 12, 13, 3),
        (9, 12, None, 1),
    ],
)
def test_window_is_uniform_and_avoids_the_moment(
    length, window, moment, guard, monkeypatch
):
    monkeypatch.setattr(v, "GUARD", guard)
    held = set() if moment is None else set(range(moment - guard, moment + guard + 1))
    possible = [
        s for s in range(length - window + 1) if not held & set(range(s, s + window))
    ]
    longest = max(moment - guard, length - moment - guard - 1) if held else length
    rng, counts = np.random.default_rng(0), {}
    for _ in range(3000):
        start, stop = v.sample_window(length, 1, window, moment, rng)  # at 1 Hz
        assert 0 <= start < stop <= length and not held & set(range(start, stop))
        assert stop - start == (
            window if possible else longest
        )  # nothing fits: the longer side
        counts[start] = counts.get(start, 0) + 1
    fair = 3000 / len(counts)
    assert (sorted(counts) == possible or not possible) and all(
        abs(n - fair) < 5 * math.sqrt(fair) for n in counts.values()
    )


@pytest.mark.parametrize("rate", [8000, 16000, 44100])
def test_speech_never_holds_the_faces_time(rate, tmp_path):
    """The recording is a ramp, so that a window tells the times it covers; colours tell moments."""
    ramp, moments, seen = (
        np.arange(3 * rate) / (3 * rate),
        (0, 700, 1500, 2200, 2999),
        set(),
    )
    pictures = {f"{ms}.png": (ms // 12, 0, 0) for ms in moments}
    make_clip(tmp_path / "p/c", {"a.wav": ramp}, pictures, rate)
    pairs, rng = pairs_of(tmp_path, 0.6, shuffle=True), np.random.default_rng(0)
    for speech, face in (pairs.load(0, rng) for _ in range(1000)):
        ms = min(moments, key=lambda t: abs(t // 12 - int(face[0, 0, 0])))
        inner = (
            speech if rate == 16000 else speech[400:-400]
        )  # resampling rings at the edges
        first, last = 3000 * inner.min(), 3000 * inner.max()  # ms
        assert (first > ms + 299.8 or last < ms - 299.8) and last - first > 540
        seen.add(ms)
    assert seen == set(moments) and v.GUARD == 0.3


@pytest.mark.parametrize("sounds, faces", [("c/a.wav c/b.wav", "c"), ("s/a.wav", "f")])
def test_times_only_apply_in_a_clip_with_one_recording(sounds, faces, tmp_path):
    for name in sounds.split():
        make_clip(tmp_path / "p" / name[0], {name[2:]: np.arange(48000) / 48000}, {})
    for i in range(
        10
    ):  # pictures elsewhere, in folders of 9 and of 1, have equal chances
        folder = tmp_path / "p" / (faces if faces == "c" else f"f{i // 9}")
        make_clip(folder, {}, {f"{1500 + i}.png": (20 * i, 0, 0)})
    pairs, rng = pairs_of(tmp_path, 1.0, shuffle=True), np.random.default_rng(0)
    speech, pictures = zip(*(pairs.load(0, rng) for _ in range(1000)))
    held = [3 * x.min() < 1.4 and 3 * x.max() > 1.6 for x in speech]
    counts = np.bincount([x[0, 0, 0] // 20 for x in pictures], minlength=10)
    assert np.mean(held) == approx(0.4, abs=0.1) and abs(
        counts - 100
    ).max() < 5 * math.sqrt(90)


def test_pairs_stay_within_a_clip_and_half_of_the_faces_are_flipped(tmp_path):
    """Two clips of a person: loudness tells the recording's, colour the face's, a bar its side."""
    for c in range(2):
        face = Image.new("RGB", (40, 40), (100 * c, 0, 0))
        face.paste((255, 0, 0), (0, 0, 10, 40))
        make_clip(
            tmp_path / f"p/c{c}",
            {"s.wav": np.full(8000, 0.2 + 0.4 * c)},
            {"x.png": face},
        )
    for shuffle, share in ((True, 0.5), (False, 0)):
        pairs, rng = pairs_of(tmp_path, shuffle=shuffle), np.random.default_rng(0)
        found = [
            (speech[0] > 0.4, *face[16, [16, 28], 0])
            for speech, face in (pairs.load(0, rng) for _ in range(300))
        ]
        assert {(loud, colour > 50) for loud, colour, _ in found} == {
            (True, True),
            (False, False),
        }
        assert len(pairs.load(0, rng)[0]) == (
            4000 if shuffle else 96000
        )  # 0.25 s, in tests 6 s
        assert np.mean([side == 255 for *_, side in found]) == approx(share, abs=0.15)


def test_short_speech_is_repeated_and_of_long_only_a_random_window_is_read(
    tmp_path, monkeypatch
):
    rng, read, frames = np.random.default_rng(0), [], wave.Wave_read.readframes
    monkeypatch.setattr(
        wave.Wave_read, "readframes", lambda f, n: read.append(n) or frames(f, n)
    )
    samples = rng.uniform(-0.5, 0.5, 20000)
    (
        write_wav(tmp_path / "s.wav", samples[:1000]),
        write_wav(tmp_path / "l.wav", samples),
    )
    got = v.load_speech(tmp_path / "s.wav", 0.25, rng)
    np.testing.assert_allclose(got, np.tile(samples[:1000], 4), atol=1e-4)
    cuts = [v.load_speech(tmp_path / "l.wav", 0.25, rng) for _ in range(5)]
    header = bytearray((tmp_path / "l.wav").read_bytes())
    header[40:44] = b"\xff" * 4  # as in a stream, whose length was not known
    (tmp_path / "s.wav").write_bytes(header)
    cuts += [v.load_speech(tmp_path / "s.wav", 0.25, rng) for _ in range(5)]
    starts = [int(np.correlate(samples, cut, "valid").argmax()) for cut in cuts]
    assert len(set(starts)) == 10 and read == [1000] + 10 * [4000]
    assert all(
        abs(samples[s : s + 4000] - cut).max() < 1e-4 for s, cut in zip(starts, cuts)
    )


@pytest.mark.parametrize(
    "rate, channels", [(8000, 1), (16000, 2), (44101, 2), (48000, 6)]
)
def test_any_rate_and_channel_count_becomes_mono_16_khz(tmp_path, rate, channels):
    tone = 0.25 * np.sin(2 * np.pi * 1000 * np.arange(2 * rate) / rate)
    balance = (
        np.linspace(0, 2, channels) if channels > 1 else np.ones(1)
    )  # its mean is 1
    write_wav(tmp_path / "x.wav", tone[:, None] * balance, rate)
    got = v.load_speech(tmp_path / "x.wav", 1.0, np.random.default_rng(0))[2000:14000]
    assert (
        got.dtype == np.float32
        and got.max() == approx(0.25, abs=0.01)
        and len(got) == 12000
    )
    assert np.argmax(abs(np.fft.rfft(got * np.hanning(12000)))) == 750  # 1000 Hz


def test_other_formats_go_through_torchaudio(tmp_path, monkeypatch):
    stereo = torch.stack([torch.linspace(-1, 1, 32000), torch.zeros(32000)])
    monkeypatch.setattr(v.torchaudio, "load", lambda path: (stereo, 32000))
    write_wav(tmp_path / "32-bit.wav", 99, width=4)
    (tmp_path / "x.mp3").write_bytes(b"ID3")
    for name in ("32-bit.wav", "x.mp3"):
        x = v.load_speech(tmp_path / name)
        assert np.allclose(
            x, v.torchaudio.functional.resample(stereo.mean(0), 32000, 16000)
        )
    monkeypatch.setattr(
        v.torchaudio, "load", lambda path: exec("import no_such_decoder")
    )
    with pytest.raises(
        v.UserError, match=r"x\.mp3: neither 16-bit WAV nor readable by torchaudio"
    ):
        v.load_speech(tmp_path / "x.mp3")


def test_faces_are_square_cropped_resized_rgb_and_upright(tmp_path):
    wide, exif = np.zeros((40, 80, 3), np.uint8), Image.Exif()
    wide[:, 20:60] = (10, 200, 30)  # the central square
    wide[:20, 20:40] = (250, 0, 0)  # its upper left quarter
    exif[0x0112] = 6  # to be turned by 90 degrees clockwise
    Image.fromarray(wide).save(tmp_path / "w.png")
    Image.fromarray(np.rot90(wide)).save(tmp_path / "e.png", exif=exif)
    Image.new("L", (640, 480), 77).save(tmp_path / "g.jpg")
    face, turned, grey = (
        v.load_face(tmp_path / name, 32) for name in ("w.png", "e.png", "g.jpg")
    )
    assert (
        face.shape == (32, 32, 3)
        and face.dtype == np.uint8
        and tuple(face[4, 4]) == (250, 0, 0)
    )
    assert tuple(face[4, 28]) == tuple(face[28, 4]) == (10, 200, 30)
    assert np.array_equal(turned, face) and abs(grey.astype(int) - 77).max() <= 1
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)
    Image.fromarray(noise).save(tmp_path / "n.jpg")  # twice as large: decoded in full
    full = Image.open(tmp_path / "n.jpg").resize((32, 32), Image.Resampling.BILINEAR)
    assert np.array_equal(v.load_face(tmp_path / "n.jpg", 32), full)


def test_batches_are_a_function_of_seed_and_number_and_of_different_people(corpus):
    make = functools.partial(
        v.PairDataset, v.open_corpus(corpus, dict(train=2))["train"], CFG, 20
    )
    batches = [make(seed, shuffle=True)[i] for seed in (0, 1) for i in range(20)]
    assert len({batch[0].numpy().tobytes() for batch in batches}) == 40
    assert all(map(torch.equal, make(1, shuffle=True)[3][:3], batches[23][:3]))
    people = [batch[2].tolist() for batch in batches]
    assert all(len(set(row)) == 20 for row in people) and set(sum(people, [])) == set(
        range(62)
    )
    ahead, test = ([*v.load_batches(make(0), range(4), i, CPU.device)] for i in (1, 0))
    assert all(
        torch.equal(x, y) for p, q in zip(ahead, test) for x, y in zip(p[:3], q[:3])
    )
    assert torch.cat([batch[2] for batch in test]).tolist() == [
        *range(62)
    ]  # everybody in order
    assert_close(test[0][1], make(0)[0][1].permute(0, 3, 1, 2).float() / 127.5 - 1)


def test_unreadable_people_are_named_replaced_in_training_and_left_out_in_tests(
    tmp_path, capsys
):
    plain_corpus(tmp_path, 30, broken=["train7"])
    shutil.rmtree(
        tmp_path / "train/train8/клип 1"
    )  # an empty folder is a fault, no end
    split = v.open_corpus(tmp_path, dict(train=30))["train"]
    for shuffle, sizes in ((True, [15] * 10), (False, [15, 13])):
        pairs = v.PairDataset(split, CFG, 15, 0, shuffle)
        batches = v.load_batches(pairs, range(len(sizes)), 0, CPU.device)
        people = [set(split.names[identity]) for _, _, identity, _ in batches]
        assert sorted(map(len, people)) == sorted(sizes)
        assert not {"train7", "train8"} & set.union(*people)
        warned = capsys.readouterr().err
        assert warned.count("warning: left out: ") == len(warned.splitlines())
        assert "речь.wav: " in warned and "train8: no recording" in warned


@pytest.mark.parametrize(
    "split, people, broken, said",
    [
        ("train", 12, 12, "too many unreadable files"),
        ("train", 6, 1, "K = 6 needs 6 identities"),
        ("val", 10, 1, ""),
        ("val", 2, 1, "val: too few people can be read"),
        ("test", 7, 1, ""),
    ],
)  # the last is alone in its batch; of 9 the 2-way test chooses
def test_too_few_readable_people_end_with_a_line(
    split, people, broken, said, tmp_path, capsys
):
    broken = [f"{split}{people - 1 - i}" for i in range(broken)]
    data = plain_corpus(tmp_path / "data", 12, broken)
    for i in range(people, 12):
        shutil.rmtree(data / split / f"{split}{i}")
    argv = ["match-train", "--data", data, "--out", tmp_path / "run", "--k", 6]
    assert said in refused(capsys, *argv) if said else run(*argv) is None


def test_check_data_lists_every_fault(tmp_path, capsys):
    clip = plain_corpus(tmp_path) / "train/train0/клип 1"
    run("check-data", tmp_path)
    assert "\n0 faults" in capsys.readouterr().out
    small = Image.new("RGB", (16, 99))
    make_clip(
        clip, {"empty.wav": [], "silent.wav": np.zeros(8000)}, {"tiny.png": small}
    )
    for name in (
        "cut.wav",
        "e.flac",
        "f.jpg",
        "g.png",
        "._500.png",
    ):  # hidden files are no data
        (clip / name).write_bytes((clip / "500.png").read_bytes()[:60])
    (tmp_path / "val/val3/клип 1/речь.wav").unlink()
    (tmp_path / "test/test5/клип 1/500.png").unlink()
    (tmp_path / "test/test6 empty").mkdir()
    run("check-data", tmp_path, code=1)
    out = capsys.readouterr().out
    for part in (
        "empty.wav",
        "cut.wav",
        "silent.wav: silent",
        "e.flac",
        "f.jpg",
        "g.png",
        "tiny.png: 16x99",
        "val3: no recording",
        "test5: no recording",
        "test6 empty: no",
    ):
        assert len(re.findall(f"^fault: .*{part}", out, re.M)) == 1, part
    assert "\n10 faults" in out and out.count("fault: ") == 10


# ---- 7. Synthetic people
def test_make_data_is_deterministic_and_labelled(tmp_path, corpus):
    for name, seed in (("again", 3), ("other", 4)):
        run("make-data", tmp_path / name, "--identities", 30, "--seed", seed)
        files = [
            p.relative_to(tmp_path / name)
            for p in tmp_path.glob(f"{name}/train/*/*/*.wav")
        ]
        equal = [
            (corpus / x).read_bytes() == (tmp_path / name / x).read_bytes()
            for x in files
        ]
        assert (
            equal == [seed == 3] * 10
        )  # person i of a seed is one person, however many there are
    labels = v.read_labels(corpus)
    for split in ("train", "val", "test"):
        named = {name for name, row in labels.items() if row["split"] == split}
        assert named == {p.name for p in (corpus / split).iterdir()}
    assert {*v.FACTORS, "voice_age", "pitch", "loudness", "tempo"} <= labels[
        "id00000"
    ].keys()


def test_linked_factors_correlate_by_link_and_nothing_else_does():
    rng = np.random.default_rng(0)
    people = [v.sample_person(rng) for _ in range(8000)]
    r = np.corrcoef([[person[name] for person in people] for name in people[0]])
    for (i, a), (j, b) in itertools.combinations(enumerate(people[0]), 2):
        assert r[i, j] == approx(v.LINK if "voice_" + b == a else 0, abs=0.05), (a, b)
    assert np.std([[p["age"], p["voice_age"]] for p in people], 0) == approx(
        [1, 1], abs=0.04
    )


def test_each_factor_acts_on_its_own_side_only():
    person = v.sample_person(np.random.default_rng(5)) | dict(gender=0, glasses=0)
    heard = {
        "gender",
        "voice_age",
        "voice_tract",
        "voice_build",
        "pitch",
        "loudness",
        "tempo",
    }
    for name, x in person.items():
        both = person, person | {name: 0.7 * x + 0.1 if isinstance(x, float) else 1}
        voices = {v.synth_speech(p, np.random.default_rng(1)).tobytes() for p in both}
        assert (len(voices) == 2) == (name in heard), name
        faces = {v.draw_face(p, 0.5).tobytes() for p in both}
        assert (len(faces) == 2) == (name not in heard or name == "gender"), name
    speech = v.synth_speech(person | dict(voice_tract=0), np.random.default_rng(1))
    f = abs(
        np.fft.rfft(speech)
    )  # 6 numbers per Hz; speech falls with f, but resounds around F2
    assert f[7800:9000].mean() > f[4800:6000].mean()


def test_the_mouth_opens_with_loudness(tmp_path, monkeypatch):
    opened, draw = {}, v.draw_face
    monkeypatch.setattr(
        v,
        "draw_face",
        lambda person, opening: SimpleNamespace(
            save=lambda path, **_: opened.update({int(path.stem): opening})
        ),
    )
    v.write_person(tmp_path, 3, 0, "train")
    with wave.open(str(next(tmp_path.glob("*/*/*/*.wav")))) as f:
        power = (np.frombuffer(f.readframes(-1), "<i2") / 32768) ** 2
    rms = np.sqrt(np.convolve(power, np.ones(800) / 800, "same"))  # of the 50 ms around
    assert len(opened) == v.FRAMES and np.ptp([*opened.values()]) > 0.2
    assert all(
        x == approx(rms[16 * ms] / rms.max(), abs=0.02) for ms, x in opened.items()
    )
    faces = [
        np.asarray(draw(v.sample_person(np.random.default_rng(0)), x)) for x in (0, 1)
    ]
    assert (faces[1] == v.MOUTH).all(2).sum() > 3 * (faces[0] == v.MOUTH).all(2).sum()


# ---- 8. Plumbing: resume, processes, precision
def left_by(out):
    """Whatever a run leaves, but for its log, which holds times: {file: its content}."""
    found = {p.name: p.read_bytes() for p in out.rglob("*.*") if p.name != "log.jsonl"}
    for name in found.keys() & {"last.pt", "best.pt"}:
        state = torch.load(out / name, weights_only=True)
        state["settings"] = [
            x for x in state["settings"].items() if x[0] not in v.MAY_CHANGE
        ]
        found[name] = [
            x.numpy().tobytes() if isinstance(x, torch.Tensor) else x
            for x in tree_leaves(state)
        ]
    assert len(found["last.pt"]) > 20 and "metrics.json" in found
    return found


def kill(times):
    """Kill both trainings at random moments, resume, print whether they end as left alone."""
    folder, equal = Path(tempfile.mkdtemp()), []
    data, match = plain_corpus(folder / "data"), folder / "match-train/best.pt"

    def start(command, out, workers):
        argv = [
            FILE,
            command,
            *TINY[command],
            "--data",
            data,
            "--steps",
            24,
            "--eval-every",
            5,
            "--save-every",
            2,
            "--workers",
            workers,
            "--out",
            out,
            "--resume",
        ]
        argv += ["--match", match] * (command == "gan-train")
        return subprocess.Popen(
            [sys.executable, *map(str, argv)], stdout=subprocess.DEVNULL
        )

    for i in range(times):
        command, out = [*KINDS][2 * i // times], folder / str(i)
        if not (folder / command).exists():
            start(command, folder / command, 1).wait()
        process, step, log = (
            start(command, out, i % 2),
            random.randrange(24),
            out / "log.jsonl",
        )
        while process.poll() is None and step > (
            log.exists() and log.read_bytes().count(b"\n")
        ):
            time.sleep(0.001)
        time.sleep(random.uniform(0, 0.03))  # a step takes about as long
        process.kill(), process.wait()
        code = start(command, out, (i + 1) % 2).wait()
        equal.append(code == 0 and left_by(out) == left_by(folder / command))
        print(
            f"{command}: ended with {process.returncode} after step {step} of 24, then resumed: "
            f"{'equal' if equal[-1] else 'DIFFERENT'}",
            flush=True,
        )
    print(f"{times} kills, {sum(equal)} equal")
    shutil.rmtree(folder, ignore_errors=True)
    return int(not all(equal))


def test_runs_killed_at_random_moments_end_as_runs_left_alone():
    assert (
        kill(2) == 0
    )  # a few only: `python test_voice2face.py kill 20` makes more of them


def test_a_full_disk_keeps_the_checkpoint_before(corpus, runs, tmp_path, capsys):
    def full(path, content, write=Path.write_bytes):
        if path.name == "last.pt.part" and path.with_suffix("").exists():
            write(path, bytes(content)[:99])
            raise OSError(28, "disk full")  # as write() does, without a name
        write(path, content)

    argv = ["match-train", "--data", corpus, "--out", tmp_path, "--save-every", 2]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Path, "write_bytes", full)
        assert re.search(
            "last.pt: cannot be written.*disk full", refused(capsys, *argv)
        )
    assert torch.load(tmp_path / "last.pt", weights_only=True)["step"] == 2
    run(*argv, "--resume")
    assert left_by(tmp_path) == left_by(
        runs.match
    )  # nothing half written is left, either


@pytest.mark.parametrize("command", KINDS)
def test_a_diverging_run_says_so_and_saves_no_nan(
    command, corpus, runs, tmp_path, capsys
):
    more = ["--match", runs.match / "best.pt"] * (command == "gan-train")
    assert "weights are NaN, the run diverged; try a lower --lr" in refused(
        capsys,
        command,
        "--data",
        corpus,
        "--out",
        tmp_path,
        "--lr",
        2e9,
        "--steps",
        24,
        "--eval-every",
        99,
        "--save-every",
        1,
        *more,
    )
    for state in (
        torch.load(path, weights_only=True) for path in tmp_path.glob("*.pt")
    ):
        assert all(
            t.isfinite().all()
            for part in ("speech", "face", "g", "g_ema", "d")
            for t in state.get(part, {}).values()
        )


def spy_on_descend(patch):
    """A list that gets the gradients of each step down; none is cut, R1 is in each."""
    seen, descend = [], v.descend
    patch.setattr(v, "R1_EVERY", 1)
    patch.setattr(
        v,
        "descend",
        lambda optimizer, loss, share, *_, **keep: (
            descend(optimizer, loss, share, **keep),
            seen.append(
                [
                    p.grad.clone()
                    for group in optimizer.param_groups
                    for p in group["params"]
                ]
            ),
        ),
    )
    return seen


SPY = f"""import os, sys
sys.path.insert(0, {str(FILE.parent)!r})
import torch, test_voice2face as t
patch, numbers, get = t.pytest.MonkeyPatch(), set(), t.v.PairDataset.__getitem__
patch.setattr(t.v.PairDataset, "__getitem__", lambda pairs, i: (
    pairs.shuffle and numbers.add(i), get(pairs, i))[1])
seen = t.spy_on_descend(patch)
t.run(*sys.argv[2:])
torch.save([numbers, *seen], f"{{sys.argv[1]}}/rank{{os.environ['RANK']}}.pt")
sys.stdout.flush()
os._exit(0)"""


@pytest.mark.parametrize("command", KINDS)
def test_two_processes_train_on_their_mean_loss(
    command, corpus, runs, tmp_path, monkeypatch
):
    (tmp_path / "spy.py").write_text(SPY)
    argv = [command, "--data", corpus, "--steps", 3, "--eval-every", 3]
    argv += ["--match", runs.match / "best.pt"] * (command == "gan-train")
    torchrun = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc_per_node=2",
        tmp_path / "spy.py",
        tmp_path,
        *map(str, argv),
        "--out",
        tmp_path / "run",
    ]
    done = subprocess.run(torchrun, text=True, capture_output=True)
    assert done.returncode == 0 and done.stdout.count(" s left") == 3, (
        done.stderr
    )  # one speaks
    (numbers, *one), (more, *other) = (
        torch.load(tmp_path / f"rank{rank}.pt") for rank in (0, 1)
    )
    assert numbers | more == set(range(6)) and numbers & more <= {
        0
    }  # all begin alike with 0
    assert len(one) >= 3 and all(map(torch.equal, tree_leaves(one), tree_leaves(other)))
    alone, init = [], v.Machine.__init__
    for rank in range(
        2
    ):  # what each would have done in the first step without the other
        with monkeypatch.context() as patch:
            patch.setattr(
                v.Machine,
                "__init__",
                lambda machine, name: (
                    init(machine, name),
                    vars(machine).update(rank=rank),
                )[0],
            )
            alone.append(spy_on_descend(patch))
            run(*argv, "--out", tmp_path / f"alone{rank}")
    for i in range(1 if command == "match-train" else 2):  # G, then D
        for mean, a, b in zip(one[i], alone[0][i], alone[1][i], strict=True):
            assert_close(mean, (a + b) / 2, rtol=1e-3, atol=1e-5)
            assert not torch.equal(a, b)  # each has its own batch


@pytest.mark.parametrize("command", KINDS)
def test_bfloat16_changes_little_and_spares_r1(
    command, corpus, runs, tmp_path, monkeypatch
):
    halved, init, penalty = [], v.Machine.__init__, v.r1_penalty
    bfloat16 = dict(autocast=torch.autocast("cpu", torch.bfloat16))
    monkeypatch.setattr(
        v.Machine,
        "__init__",
        lambda machine, name: (init(machine, name), vars(machine).update(bfloat16))[0],
    )
    monkeypatch.setattr(
        v,
        "r1_penalty",
        lambda *args: halved.append(torch.is_autocast_enabled("cpu")) or penalty(*args),
    )
    more = ["--match", runs.match / "best.pt"] * (command == "gan-train")
    full, half = runs.seen[command], observe(command, tmp_path, "--data", corpus, *more)
    for a, b in zip(read_log(runs.gan if more else runs.match)[:3], read_log(tmp_path)):
        assert all(
            b[key] == approx(a[key], rel=0.1, abs=0.1)
            for key in a.keys()
            & {"loss", "loss_d", "loss_g", "match_real", "mismatch_real"}
        )
    assert full["weights"] != half["weights"] and halved == [False] * 4 * bool(more)
    assert [*map(len, full["weights"])] == [
        *map(len, half["weights"])
    ]  # weights stay float32


@pytest.mark.parametrize("native", [True, False])
def test_a_gpu_computes_in_bfloat16_only_where_it_is_native(native, monkeypatch):
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", False)
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: None)
    monkeypatch.setattr(
        torch.cuda,
        "is_bf16_supported",
        lambda including_emulation=True: including_emulation or native,
    )  # a T4
    monkeypatch.setattr(
        v.torch, "zeros", lambda n, device: SimpleNamespace(device=torch.device(device))
    )
    monkeypatch.setattr(
        v.torch, "autocast", lambda kind, dtype, enabled: (kind, dtype, enabled)
    )
    assert v.Machine("cuda").autocast == ("cuda", torch.bfloat16, native)


MISTAKES = """
match-train --data {mess}/none --out {new} => none.train: no such folder; a corpus is
match-train --data {mess}/both --out {new} => test.train0: is in another split, too
match-train --data {mess}/column --out {new} => labels.csv: must be CSV in UTF-8 with a column
match-train --data {corpus} --out {new} --batch 99 => train: 62 identities, at least 99 are needed
match-train --data {corpus} --out {new} --k 7 => --batch 6: must be at least --k 7
match-train --data {corpus} --out {new} --seconds nan => --seconds nan: must be at least 0.25
match-train --data {corpus} --out {new} --seed 4294967296 => --seed .* at most 4294967295
match-train --data {corpus} --out {new} --device cuda:77 => --device cuda:77: not here, use cpu or
match-train --data {corpus} --out {match} => --out .*: holds a run; name another folder, or --resume
match-train --data {corpus} --out {match} --lr 0.1 --resume => the run in .* has --lr 0.05, not 0.1
match-train --data {corpus} --out {mess}/cut --resume => last.pt: no checkpoint, or damaged
match-train --data {corpus} --out {mess}/big --speech-width 2000000 => out of memory, try less
match-test --data {corpus} --match {mess}/none.pt --out {new} => none.pt: no checkpoint
match-test --data {corpus} --match {mess}/old.pt --out {new} => old.pt: of another version
gan-test --data {corpus} --gan {match}/best.pt --out {mess} => best.pt: of the other
generate {mess}/quiet.wav --gan {gan}/last.pt --out {new} => quiet.wav: silent
""".strip().splitlines()


@pytest.fixture(scope="session")
def mess(tmp_path_factory, runs):
    """A folder of faulty corpora, a silent recording and a checkpoint cut short."""
    root = tmp_path_factory.mktemp("mess")
    for name in ("both", "column", "cut"):
        plain_corpus(root / name, 6)
    shutil.copytree(root / "both/train/train0", root / "both/test/train0")
    write_wav(root / "quiet.wav", np.zeros(16000))
    (root / "column/labels.csv").write_text("name;gender\n1;f\n")
    old = torch.load(runs.match / "best.pt", weights_only=True)
    torch.save(old | dict(speech={"other": old["step"]}), root / "old.pt")
    (root / "cut/last.pt").write_bytes((runs.match / "last.pt").read_bytes()[:9000])
    return root


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_one_line_that_says_where(
    mistake, corpus, runs, mess, tmp_path, capsys
):
    argv, said = mistake.split(" => ")
    names = dict(
        corpus=corpus, match=runs.match, gan=runs.gan, mess=mess, new=tmp_path / "new"
    )
    line = refused(capsys, *(part.format(**names) for part in argv.split()))
    assert re.search(said, line), line
    assert not (tmp_path / "new").exists()  # before anything was made


def bench():
    """Print what the loader and a training step take, and what a large corpus takes to open."""
    torch.set_num_threads(os.cpu_count())
    root = Path(tempfile.mkdtemp())
    run("make-data", root / "few", "--identities", 200)
    split, cfg = v.open_corpus(root / "few", dict(train=2)), v.PAPER[v.MatchSettings]
    pairs = v.PairDataset(split["train"], v.MatchSettings(**cfg), 64, 0, shuffle=True)
    seconds = min(timeit.repeat(lambda: pairs[0], number=1, repeat=9))
    print(
        f"6 s of WAV and a 128x128 JPEG, one core: {64 / seconds:.0f} pairs/s at best"
    )
    for name, *more in (
        ["match-train"],
        ["gan-train", "--match", f"{root}/match-train/best.pt"],
    ):
        with contextlib.redirect_stdout(io.StringIO()):
            v.main(
                [
                    name,
                    "--data",
                    f"{root}/few",
                    "--out",
                    f"{root}/{name}",
                    "--eval-every",
                    "9999",
                    "--log-every",
                    "5",
                    "--steps",
                    "60",
                    "--runs",
                    "1",
                    *more,
                ]
            )
        rate = np.median([line["clips_per_s"] for line in read_log(root / name)[2:]])
        print(f"{name}: {1000 * KINDS[name]().batch / rate:.0f} ms a default step")
    for i in range(100_000):
        (root / f"many/train/identity{i:06}").mkdir(parents=True)
    seconds = timeit.timeit(
        lambda: v.open_corpus(root / "many", dict(train=2)), number=1
    )
    print(f"opening 100,000 identities: {seconds:.1f} s")
    shutil.rmtree(root)


if __name__ == "__main__":
    if sys.argv[1:2] == ["kill"]:
        sys.exit(kill(int(sys.argv[2])))
    sys.exit(
        bench()
        if sys.argv[1:2] == ["bench"]
        else pytest.main([__file__, *sys.argv[1:]])
    )
