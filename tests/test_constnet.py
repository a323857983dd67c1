"""constnet.py: the network is the paper's, the arms differ in the order of additions alone, and runs repeat."""

import argparse
import contextlib
import csv
import hashlib
import importlib.util
import json
import os
import random
import re
import signal
import subprocess
import sys
import time
import types

import numpy as np
import pytest
import torch
from conftest import GPU, ROOT
from torch import nn

import constnet

QUICK = ("--epochs", 1, "--batch-size", 200, "--splits", 4, "--blocks", 6)   # 7 steps; every kind of layer is there


def network(init="abcd", **arguments):
    torch.manual_seed(0)
    model = constnet.Constnet(**{"channels": 3, "classes": 10, **arguments})
    constnet.initialise(model, init)
    return model


def results(directory):
    return json.loads((directory / "summary.json").read_text())


# ------------------------------------------------------------------------------------------- network and measures


def test_architecture_is_the_papers():
    model = network(widen=10)
    blocks = [block for stage in model.stages for block in stage]
    assert len(blocks) == 12 and [block.conv.out_channels for block in blocks] == [160] * 4 + [320] * 4 + [640] * 4
    assert [block.conv.stride[0] for block in blocks] == [1] * 4 + [2, 1, 1, 1] * 2
    assert [i for i, block in enumerate(blocks) if block.shortcut is not None] == [0, 4, 8]
    assert model.stem.out_channels == 16 and model.head.in_features == 640
    convolutions = 3 * 16 * 9 + sum(a * b * 10 + 3 * b * b * 9 for a, b in ((16, 160), (160, 320), (320, 640)))
    norms, head = 2 * (16 + 4 * 160 + 4 * 320 + 3 * 640), 641 * 10
    assert sum(parameter.numel() for parameter in model.parameters()) == convolutions + norms + head


@pytest.mark.parametrize("channels,size", [(1, 8), (1, 28), (3, 32), (3, 65)])
def test_any_image(channels, size):
    assert network(channels=channels)(torch.randn(2, channels, size, size)).shape == (2, 10)


@pytest.mark.parametrize("init", ["", "a", "b", "c", "d", "ab", "abc", "abcd"])
def test_parts_of_table_1(init):
    model = network(init)
    blocks = [block for stage in model.stages for block in stage]
    shortcuts = [block.shortcut.weight for block in blocks if block.shortcut is not None]
    assert all((block.conv.weight == 0).all() == ("a" in init) for block in blocks)
    assert (model.head.weight == 0).all() == ("b" in init)
    assert (constnet.Symmetry(model).summary(0)["distinct_filters"]["stem"] == 1) == ("c" in init)
    assert ((model.stem.weight[:, :, 1, 1] == 1 / 3).all() and (model.stem.weight != 0).sum() == 16 * 3) == ("c" in init)
    assert all((weight == 1 / weight.shape[1]).all() == ("d" in init) for weight in shortcuts)
    for name, module in model.named_modules():            # the rest is He-normal
        if isinstance(module, nn.Conv2d) and module.weight.unique().numel() > 2:
            std, fan_in = module.weight.std().item(), module.weight[0].numel()
            assert abs(std / (2 / fan_in) ** 0.5 - 1) < 5 / module.weight.numel() ** 0.5, name


def test_constnet_passes_the_image_through():
    """With a-d the channels of every layer are equal, and the logits 0."""
    model, x = network(), torch.randn(4, 3, 16, 16)
    features = model.stages(model.stem(x))
    assert torch.equal(features, features[:, :1].expand_as(features)) and features.std() > 0.1
    assert (model(x) == 0).all()


def test_symmetry_measures():
    model = network("")
    weight = model.stages[0][0].conv.weight
    with torch.no_grad():
        weight.copy_(weight[:4].repeat(4, 1, 1, 1))
        model.stem.weight.copy_(model.stem.weight[:1].expand_as(model.stem.weight))
    symmetry = constnet.Symmetry(model)
    rows = [{"step": 0}, {"step": 7}]
    symmetry.measure(rows[0])
    with torch.no_grad():
        model.stem.weight[3, 0, 0, 0] += 1
    symmetry.watch(5)
    symmetry.watch(6)
    symmetry.measure(rows[1])
    symmetry.flush()
    assert symmetry.summary(8)["first_broken_parameter"] == "stages.0.0.conv.weight"
    name = "stages.0.0.conv"
    assert [row["distinct_filters/stem"] for row in rows] == [1, 2]
    assert rows[0]["spread/stem"] == 0 and rows[1]["spread/stem"] > 0
    assert symmetry.first_broken["stem"] == 5 and symmetry.first_broken[name] == 0
    assert rows[0][f"distinct_filters/{name}"] == 4
    numbers = weight.detach().numpy()
    for direction, slices in (("forward", numbers.reshape(16, -1)), ("backward", numbers.swapaxes(0, 1).reshape(16, -1))):
        pairs = np.corrcoef(slices.astype(float))[np.triu_indices(16, 1)]
        assert abs(rows[0][f"{direction}_correlation/{name}"] - pairs.mean()) < 1e-5
    spread = np.linalg.norm(numbers - numbers.mean(0)) / np.linalg.norm(numbers)
    assert abs(rows[0][f"spread/{name}"] - spread) < 1e-5
    assert rows[0]["forward_correlation/stem"] == pytest.approx(1, abs=1e-5)


def test_filters_that_differ_in_few_bits_are_distinct():
    model, name = network("", channels=1, widen=2), "stages.0.1.conv"
    weight = dict(model.named_modules())[name].weight

    def distinct(filters):
        with torch.no_grad():
            weight.copy_(filters.view_as(weight))
        return constnet.Symmetry(model).summary(0)["distinct_filters"][name]

    n, size = len(weight), weight[0].numel()
    one = torch.randn(size)
    signs = torch.ones(n, 1).index_fill_(0, torch.arange(0, n, 2), -1)
    two = one.repeat(n, 1)
    two[1, 3:5] *= -1
    assert distinct(torch.eye(n, size)) == n and distinct(signs * one) == 2 and distinct(two) == 2
    assert distinct(torch.ones(n, size) * 2.0 ** -torch.arange(float(n)).view(n, 1)) == n
    assert distinct(signs * torch.zeros(size)) == 1     # 0.0 and -0.0 are the same weight


def test_augmentation_pads_each_side_by_its_own_eighth():
    torch.manual_seed(0)
    rows, columns = (constnet.augment(torch.ones(4000, 1, *size)).eq(0) for size in ((64, 2), (2, 64)))
    assert not rows.flatten(1).all(1).any() and torch.equal(rows.any(3).any(0), columns.any(2).any(0))


def test_normaliser_and_augmentation():
    images = torch.randint(0, 256, (300, 3, 8, 8), dtype=torch.uint8)
    images[:, 1] //= 4
    x = constnet.normaliser(images)(images)
    torch.testing.assert_close(x.mean((0, 2, 3)), torch.zeros(3), atol=1e-4, rtol=0)
    torch.testing.assert_close(x.std((0, 2, 3), correction=0), torch.ones(3), atol=1e-4, rtol=0)
    torch.manual_seed(0)
    new = constnet.augment(images)
    padded = torch.nn.functional.pad(images, (1,) * 4)
    shifts = [padded[:, :, i:i + 8, j:j + 8] for i in range(3) for j in range(3)]
    match = torch.stack([(new == shift).flatten(1).all(1) for s in shifts for shift in (s, s.flip(3))])
    assert match.any(0).all() and (match.sum(1) > 3).all()     # every image is one of 18, and all 18 are drawn


@pytest.mark.parametrize("schedule,expected", [("constant", [1, 1, 1, 1]), ("step", [1, 0.2, 0.04, 0.008]),
                                               ("cosine", [(1 + np.cos(np.pi * done)) / 2 for done in (0, 0.3, 0.6, 0.8)])])
def test_schedules(schedule, expected):
    args = constnet.parse_arguments(["--schedule", schedule, "--epochs", "200", "--lr", "1", "--warmup", "0"])
    for epoch, rate in zip((0, 60, 120, 160), expected, strict=True):   # 140, 80, 40 epochs to go
        assert constnet.learning_rate(args, 7 * epoch, 7) == pytest.approx(rate)
    args.warmup = 2 / 200                                                # 14 steps
    for step in range(14):
        assert constnet.learning_rate(args, step, 7) == pytest.approx((step + 1) / 14, rel=1e-3)
    assert constnet.learning_rate(args, 60 * 7, 7) == pytest.approx(expected[1])


# ------------------------------------------------------------------------------------------------------- whole runs


def test_the_order_alone_decides(tmp_path, run):
    done = run("constnet.py", "--order", "fixed", "shuffled", "atomic", "--epochs", 2, "--splits", 8, "--out", tmp_path / "a")
    assert done.returncode == 0, done.stderr
    assert "distinct filters" in done.stdout
    fixed, shuffled, atomic = results(tmp_path / "a")
    assert fixed["symmetry"]["kept"] and set(fixed["symmetry"]["distinct_filters"].values()) == {1}
    assert fixed["symmetry"]["first_broken_step"] is None and set(fixed["symmetry"]["spread"].values()) == {0}
    for arm in (shuffled, atomic) if torch.get_num_threads() > 1 else (shuffled,):
        assert not arm["symmetry"]["kept"] and arm["symmetry"]["first_broken_step"] >= 1
        assert arm["symmetry"]["first_broken_parameter"].endswith(".weight")
        most = max(arm["symmetry"]["distinct_filters"].values())
        assert most > (16 if arm is shuffled else 1)      # a race parts as many as it happens to
    with open(tmp_path / "a" / "metrics.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [(row["arm"], int(row["step"])) for row in rows] == [(arm, step) for arm in ("fixed", "shuffled", "atomic")
                                                               for step in range(45)]
    # The arms share weights, data order and augmentation: before the symmetry can break their losses agree.
    first = [row["train_loss"] for row in rows if row["step"] == "1"]
    assert first[0] == first[1] == first[2]
    before = (tmp_path / "a" / "constnet.png").read_bytes()
    (tmp_path / "a" / "constnet.png").unlink()
    assert run("constnet.py", "--plot-only", tmp_path / "a").returncode == 0
    same = (tmp_path / "a" / "constnet.png").read_bytes() == before
    assert same


@pytest.mark.parametrize("arguments", [("--order", "shuffled"), ("--order", "fixed", "--dropout", 0.1, "--mixup", 1),
                                       ("--order", "shuffled", "--augment", "--precision", "bf16")], ids=str)
def test_a_run_repeats_bit_for_bit(tmp_path, run, arguments):
    hashes = []
    for name, threads in (("a", 2), ("b", 2), ("c", 1)):
        done = run("constnet.py", *QUICK, *arguments, "--out", tmp_path / name,
                   env={**os.environ, "OMP_NUM_THREADS": str(threads)})
        assert done.returncode == 0, done.stderr
        hashes.append(results(tmp_path / name)[0]["weights_sha256"])
    assert hashes[0] == hashes[1]
    other = run("constnet.py", *QUICK, *arguments, "--seed", 1, "--out", tmp_path / "d")
    assert other.returncode == 0 and results(tmp_path / "d")[0]["weights_sha256"] != hashes[0]
    if hashes[2] != hashes[0] and "bf16" in arguments:
        pytest.xfail("a library kernel of this CPU depends on the number of threads; bench/cpu.py --only threads names it")
    assert hashes[2] == hashes[0]


def test_dropout_breaks_the_symmetry_of_the_fixed_order(tmp_path, run):
    assert run("constnet.py", *QUICK, "--order", "fixed", "--dropout", 0.1, "--out", tmp_path / "a").returncode == 0
    assert not results(tmp_path / "a")[0]["symmetry"]["kept"]


def test_window_scope_and_layers_place_the_noise(tmp_path, run):
    window = run("constnet.py", *QUICK, "--order-steps", 3, 5, "--out", tmp_path / "a")
    assert window.returncode == 0 and results(tmp_path / "a")[0]["symmetry"]["first_broken_step"] in (4, 5)
    scope = run("constnet.py", *QUICK, "--order-scope", "tensor", "--out", tmp_path / "b")
    assert scope.returncode == 0 and results(tmp_path / "b")[0]["symmetry"]["kept"]
    layer = run("constnet.py", *QUICK, "--order-layers", "stages.1.1.conv", "--out", tmp_path / "c")
    assert layer.returncode == 0
    assert results(tmp_path / "c")[0]["symmetry"]["first_broken_parameter"] == "stages.1.1.conv.weight"


def test_kill_and_resume_ends_with_the_same_bits(tmp_path, run):
    arguments = (*QUICK, "--order", "fixed", "shuffled", "--epochs", 15, "--seed", 0, 1)
    assert run("constnet.py", *arguments, "--out", tmp_path / "whole").returncode == 0
    command = [sys.executable, str(ROOT / "constnet.py"), *map(str, arguments), "--out", str(tmp_path / "cut")]

    def saved():   # the newest file with a state of training
        return max((path.stat().st_mtime_ns for path in (tmp_path / "cut").glob("*-checkpoint.pt")), default=0)

    for attempt in range(4):                              # three kills, each at a random moment after some progress
        before = saved()
        process = subprocess.Popen(command + ["--resume"] * (attempt > 0), stdout=subprocess.DEVNULL,
                                   stderr=subprocess.PIPE, text=True)
        if attempt < 3:
            while process.poll() is None and saved() <= before:
                time.sleep(0.01)
            time.sleep(random.uniform(0, 0.5))
            assert process.poll() is None, process.communicate()[1]
            process.send_signal(signal.SIGKILL)
        _, errors = process.communicate(timeout=300)
        assert process.returncode == (-signal.SIGKILL if attempt < 3 else 0), errors
    for whole, cut in zip(results(tmp_path / "whole"), results(tmp_path / "cut"), strict=True):
        for volatile in ("wall_seconds", "images_per_second"):
            whole.pop(volatile), cut.pop(volatile)
        assert whole == cut
    same = (tmp_path / "whole" / "metrics.csv").read_bytes() == (tmp_path / "cut" / "metrics.csv").read_bytes()
    assert same


def test_finished_weights_are_kept(tmp_path, run):
    assert run("constnet.py", *QUICK, "--order", "fixed", "shuffled", "--out", tmp_path / "a").returncode == 0
    for arm in results(tmp_path / "a"):
        weights = torch.load(tmp_path / "a" / f"{arm['order']}-0.pt", weights_only=True)
        network(channels=1, blocks=6).load_state_dict(weights)
        bits = hashlib.sha256(b"".join(tensor.numpy().tobytes() for tensor in weights.values()))
        assert bits.hexdigest() == arm["weights_sha256"]


def test_interrupt_keeps_the_checkpoint(tmp_path, run):
    process = subprocess.Popen([sys.executable, str(ROOT / "constnet.py"), "--epochs", "400", "--out", str(tmp_path / "a")],
                               stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
                               # heeded also where pytest runs in the background of a script, which ignores it
                               preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL))
    try:
        for _ in range(600):
            if (tmp_path / "a" / "shuffled-0-checkpoint.pt").exists():
                break
            time.sleep(0.1)
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == 130 and "--resume" in errors and "Traceback" not in errors
    assert (tmp_path / "a" / "shuffled-0-checkpoint.pt").exists()


def test_divergence_keeps_the_metrics(tmp_path, run):
    done = run("constnet.py", *QUICK, "--lr", 1e30, "--out", tmp_path / "a")
    assert done.returncode == 3 and "not finite" in done.stderr and "Traceback" not in done.stderr
    assert len((tmp_path / "a" / "metrics.csv").read_text().splitlines()) > 2
    text = (tmp_path / "a" / "summary.json").read_text()
    json.loads(text, parse_constant=pytest.fail)   # NaN and Infinity are not JSON, which other programs refuse


def test_divergence_in_the_last_step_is_noticed(tmp_path, run):
    done = run("constnet.py", "--blocks", 3, "--epochs", 1, "--batch-size", 700, "--init", "none", "--warmup", 0,
               "--schedule", "constant", "--lr", 1e6, "--out", tmp_path / "a")
    assert done.returncode == 3 and results(tmp_path / "a")[0]["diverged"]


def test_one_thread_alone_would_not_race(tmp_path):
    """As torchrun gives to each process: the racing arm takes two, and the others are left with one."""
    before, seen, real = torch.get_num_threads(), {}, constnet.order_additions

    def watched(args, model):
        seen[args.order] = torch.get_num_threads()
        return real(args, model)

    try:
        torch.set_num_threads(1)
        constnet.order_additions = watched
        arguments = (*QUICK, "--blocks", 3, "--device", "cpu", "--order", "fixed", "atomic", "shuffled", "--out", tmp_path / "a")
        assert constnet.main(list(map(str, arguments))) == 0 and torch.get_num_threads() == 1
    finally:
        constnet.order_additions = real
        torch.set_num_threads(before)
        torch.use_deterministic_algorithms(False)
    assert seen == {"fixed": 1, "atomic": 2, "shuffled": 1}


def test_what_is_pruned_after_a_divergence_diverges_too(tmp_path, run):
    done = run("constnet.py", "--prune", 0.5, "--rewind", 30, "--epochs", 2, "--blocks", 3, "--lr", 1e30, "--warmup", 0,
               "--out", tmp_path / "a")
    assert done.returncode == 3, done.stderr
    assert [arm["diverged"] for arm in results(tmp_path / "a")] == [True] * 6


@pytest.mark.parametrize("name,content", [("metrics.csv", ""), ("metrics.csv", "arm,seed\n"), ("summary.json", "[]")])
def test_figures_are_not_drawn_of_nothing(tmp_path, capsys, name, content):
    for file in ("metrics.csv", "summary.json", "config.json"):
        (tmp_path / file).write_bytes((ROOT / "results" / "constnet" / "digits" / file).read_bytes())
    (tmp_path / name).write_text(content)
    with pytest.raises(SystemExit) as stop:
        constnet.main(["--plot-only", str(tmp_path)])
    assert stop.value.code == 2 and "empty" in capsys.readouterr().err and not list(tmp_path.glob("*.png"))


# ------------------------------------------------------------------------------------------------ studies and options


def parsed(*arguments):
    return constnet.parse_arguments(list(map(str, arguments)))


def test_a_dead_network_is_named(tmp_path, monkeypatch, capsys):
    """A stem of zeros: the last ReLU is 0 for every image, and nothing but the head's bias learns."""
    monkeypatch.setattr(constnet, "centre_tap_", lambda weight, factor=1.0: weight.zero_())
    monkeypatch.setattr(torch, "use_deterministic_algorithms", lambda on: None)   # it would stay on
    for out, start, active in (("dead", "abcd", 0), ("alive", "none", 100)):
        arguments = (*QUICK, "--device", "cpu", "--init", start, "--order", "fixed", "--out", tmp_path / out)
        assert constnet.main(list(map(str, arguments))) == 0
        arm, = results(tmp_path / out)
        said = capsys.readouterr().err
        assert ("dead: the last ReLU is 0 everywhere" in said and "fixed, seed 0" in said) == (active == 0)
        assert arm["active"] == 0 if active == 0 else arm["active"] > 20


def test_fixup_block_is_its_formula():
    model = network("", norm="fixup")
    assert not any(isinstance(module, nn.BatchNorm2d) for module in model.modules())
    for number, parameter in enumerate(p for name, p in model.named_parameters() if name.endswith("value")):
        parameter.data.fill_(0.1 * number + 0.5)
    for block in (model.stages[0][0], model.stages[1][0]):
        before, after, scale = (m.value.item() for m in (block.bn, *block.after))
        x = torch.randn(2, block.conv.in_channels, 6, 6)
        skip = x if block.shortcut is None else block.shortcut(x + before)
        torch.testing.assert_close(block(x), skip + scale * (block.conv(torch.relu(x + before)) + after))


def test_leakynet_pair_of_phases_is_the_identity_but_for_the_sign():
    args = parsed("--arch", "leakynet", "--layer-init", "i_iiii_iiii_iiii")
    model, x = constnet.make_network(args, 3, 10).eval(), torch.randn(2, 16, 6, 6)
    pair = nn.Sequential(*model.stages[0][2:])   # two layers of one width; eval: batch norm is x / sqrt(1 + eps)
    torch.testing.assert_close(pair(x), -x, rtol=1e-4, atol=1e-4)
    assert [sum(isinstance(m, nn.BatchNorm2d) for m in block.modules()) for block in model.stages[1]] == [0, 1, 0, 1]
    assert (model.head.weight == 0).all() and args.lr == 0.03


@pytest.mark.parametrize("letter", "hi1")
def test_leakynet_letters(letter):
    weight = torch.empty(32, 16, 3, 3)
    constnet.start_layer_(weight, letter, -100.0)
    if letter == "h":
        assert abs(weight.std().item() / (2 / 1.0001 / 144) ** 0.5 - 1) < 0.05
    else:
        expected = torch.zeros(32, 16, 3, 3)
        for out in range(32):
            expected[out, slice(None) if letter == "1" else out % 16, 1, 1] = -100 / (16 if letter == "1" else 1)
        assert torch.equal(weight, expected)


def test_cutout():
    torch.manual_seed(0)
    zeros = (constnet.cutout(torch.ones(2000, 2, 8, 10), 3) == 0)
    assert torch.equal(zeros[:, 0], zeros[:, 1])
    area = zeros[:, 0].sum((1, 2))
    assert area.max() == 9 and area.min() == 4      # a corner keeps 2 x 2 of the 3 x 3
    inside = zeros[:, 0].double().mean(0)
    assert (inside[1:-1, 1:-1] - 9 / 80).abs().max() < 5 * (9 / 80 / 2000) ** 0.5


def test_proximal_step_and_masks():
    weight = torch.tensor([-2.0, -0.3, 0.0, 0.2, 1.0])
    constnet.soft_threshold_([weight], 0.5)
    torch.testing.assert_close(weight, torch.tensor([-1.5, 0.0, 0.0, 0.0, 0.5]))
    assert constnet.share_not_zero([weight, torch.zeros(5)]) == 20
    weights = [torch.randn(10, 4, 3, 3), torch.randn(10, 4, 1, 1)]
    for weight, mask in zip(weights, constnet.masks_of(weights, "largest", 0.25), strict=True):
        assert mask.sum() == weight.numel() // 4
        assert weight[mask == 1].abs().min() >= weight[mask == 0].abs().max()
    torch.manual_seed(1)
    one, other = (constnet.masks_of(weights, "random", 0.25)[0] for _ in range(2))
    assert one.sum() == 90 and not torch.equal(one, other)


def test_signal_of_constnet_is_the_same_throughout_a_stage():
    data = [torch.randint(0, 256, (64, 3, 8, 8), dtype=torch.uint8), None, None, None, 10]
    rows = constnet.signal_propagation(parsed("--init", "abcd"), "abcd", 0, data)
    for stage in ("0", "1", "2"):
        mine = [row for row in rows if row["layer"].startswith(f"stages.{stage}")]
        assert len(mine) == 4
        for key in ("activation", "gradient"):
            assert len({round(row[key] / mine[0][key], 5) for row in mine}) == 1 and mine[0][key] > 0


def test_table_1_sets_every_row():
    rows = constnet.arms(parsed("--table1"), ["--table1"])
    paper = ["0.01", "0.15 ab", "0.1 abc", "0.01 abc", "0 abc", "0.1 abcd", "0.01 abcd", "0 abcd", "0 abcd", "0 abcd"]
    assert [f"{arm.dropout:g} {arm.init}".strip() for arm in rows.values()] == paper
    assert [arm.order for arm in rows.values()] == ["fixed"] * 8 + ["atomic", "shuffled"]


def test_a_study_is_shared_out_and_writes_its_table(tmp_path, run):
    arguments = (*QUICK, "--device", "cpu", "--table1", "--blocks", 3)
    for name, processes in (("one", 1), ("two", 2)):
        done = run("constnet.py", *arguments, "--out", tmp_path / name, processes=processes)
        assert done.returncode == 0, done.stderr
    table = (tmp_path / "one" / "table1.md").read_text()
    assert sum(line.startswith(f"| {n} |") for n in range(1, 11) for line in table.splitlines()) == 10
    assert "| 8 | 0 | ✓ | ✓ | ✓ | ✓ | fixed | 10.0 |" in table and "| never | 1 |" in table
    hashes = [[arm["weights_sha256"] for arm in results(tmp_path / name) if arm["order"] != "atomic"] for name in ("one", "two")]
    assert hashes[0] == hashes[1] and len(hashes[0]) == 9


def test_a_table_says_what_diverged(tmp_path, monkeypatch, capsys):
    arm = {"dataset": "digits", "epochs": 1, "symmetry": {"kept": True, "distinct_filters": {"stem": 1}}}
    runs = [("row1", 0, 90.0, False), ("row1", 1, 7.5, True), ("row8", 0, 7.5, True)]
    constnet.write_table_1([{**arm, "arm": name, "seed": seed, "test_accuracy": accuracy, "diverged": lost}
                            for name, seed, accuracy, lost in runs], tmp_path)
    cells = [line.split(" | ")[8] for line in capsys.readouterr().out.splitlines() if line.startswith(("| 1 ", "| 8 "))]
    assert cells == ["90.0 (1 of 2 diverged)", " (1 of 1 diverged)"]


def test_pruned_shares_are_drawn_where_they_are(tmp_path, monkeypatch):
    drawn = []
    monkeypatch.setattr(constnet, "by_seed", lambda points, x, y: drawn.append([p[x] for p in points]) or [[1], [1], [1], [1]])
    constnet.draw_pruned([{"arm": name, "test_accuracy": 50.0, "seed": 0} for start in constnet.STARTS for name in
                          (start, f"{start}-largest-1e-05", f"{start}-random-0.02")], tmp_path / "prune.png")
    assert drawn == [pytest.approx([100, 0.001]), [100, 2]] * 2


def test_rows_of_table_1_are_joined(tmp_path, run):
    arguments = (*QUICK, "--device", "cpu", "--blocks", 3, "--out", tmp_path / "a")
    times = set()
    for rows, more in (((8, 1), ()), ((3, 8, 1), ("--resume",))):
        done = run("constnet.py", *arguments, "--table1", *rows, *more)
        assert done.returncode == 0, done.stderr
        times.add((tmp_path / "a" / "done" / "row8-0.json").stat().st_mtime_ns)
        table = (tmp_path / "a" / "table1.md").read_text().splitlines()
        assert [line.split()[1] for line in table[2:] if line.startswith("|")] == [str(row) for row in sorted(rows)]
    assert len(times) == 1


def test_a_row_is_added_to_the_rows_of_a_table_and_to_nothing_else(tmp_path, run):
    arguments = (*QUICK, "--device", "cpu", "--blocks", 3)
    assert run("constnet.py", *arguments, "--table1", 8, "--out", tmp_path / "a").returncode == 0
    assert run("constnet.py", *arguments, "--table1", 3, "--resume", "--out", tmp_path / "a").returncode == 0
    assert [arm["arm"] for arm in results(tmp_path / "a")] == ["row3", "row8"]
    assert json.loads((tmp_path / "a" / "config.json").read_text())["arguments"]["table1"] == [3, 8]
    whole = (tmp_path / "a" / "summary.json").read_bytes()
    forgotten = run("constnet.py", *arguments, "--resume", "--out", tmp_path / "a")
    assert run("constnet.py", *arguments, "--out", tmp_path / "b").returncode == 0
    other = run("constnet.py", *arguments, "--table1", 8, "--resume", "--out", tmp_path / "b")
    for done in (forgotten, other):
        assert done.returncode == 2 and "--table1" in done.stderr and len(done.stderr.splitlines()) == 1, done.stderr
    assert (tmp_path / "a" / "summary.json").read_bytes() == whole


def test_seeds_are_added_to_those_of_a_run(tmp_path, run):
    assert run("constnet.py", *QUICK, "--seed", 2, "--out", tmp_path / "a").returncode == 0
    first = (tmp_path / "a" / "done" / "shuffled-2.json").stat().st_mtime_ns
    for more, seeds in (((), [2]), (("--seed", 0, 2), [2, 0]), ((), [2, 0])):
        done = run("constnet.py", *QUICK, *more, "--resume", "--out", tmp_path / "a")
        assert done.returncode == 0, done.stderr
        assert [arm["seed"] for arm in results(tmp_path / "a")] == seeds
        assert json.loads((tmp_path / "a" / "config.json").read_text())["arguments"]["seed"] == seeds
    assert (tmp_path / "a" / "done" / "shuffled-2.json").stat().st_mtime_ns == first
    assert run("constnet.py", *QUICK, "--out", tmp_path / "b").returncode == 0
    assert results(tmp_path / "b")[0]["weights_sha256"] == results(tmp_path / "a")[1]["weights_sha256"]


def test_a_run_of_another_script_is_refused(tmp_path, capsys):
    (tmp_path / "config.json").write_text('{"arguments": {"dataset": "digits", "seed": 0}}')
    with pytest.raises(SystemExit) as stop:
        constnet.main(["--resume", "--out", str(tmp_path)])
    assert stop.value.code == 2 and "another configuration" in capsys.readouterr().err


def test_a_diverged_arm_stays_so_after_a_kill(tmp_path, monkeypatch):
    """A kill between its last checkpoint and its result."""
    monkeypatch.setattr(sys, "argv", ["constnet.py"])
    args = constnet.parse_arguments(list(map(str, (*QUICK[2:], "--blocks", 3, "--epochs", 4, "--lr", 1e30, "--warmup", 0))))
    (name, arm), = constnet.arms(args, []).items()
    first, second = (constnet.train(arm, name, 0, constnet.common.load_data("digits", ""), tmp_path)["summary"] for _ in "ab")
    assert (tmp_path / f"{name}-0-checkpoint.pt").exists() and first["diverged"] and second["diverged"]
    assert first["steps"] == second["steps"] == 7 and first["weights_sha256"] == second["weights_sha256"]


def test_a_spread_that_overflowed_is_drawn_as_none(tmp_path):
    symmetry = {"distinct_filters": {"stem": 16}, "spread": {"stem": None}, "kept": False, "first_broken_step": 2}
    arm = {"arm": "fixed", "seed": 0, "init": "", "dataset": "digits", "dropout": 0.0, "symmetry": symmetry}
    rows = [{"arm": "fixed", "seed": 0, "step": step, "test_accuracy": 10.0, "spread/stem": spread}
            for step, spread in enumerate((0.0, 0.1, None))]
    constnet.draw_figure(rows, [arm], tmp_path / "constnet.png")
    assert (tmp_path / "constnet.png").exists()


def test_tensorboard_has_all_that_the_csv_has(tmp_path, monkeypatch):
    written = []

    class SummaryWriter(contextlib.nullcontext):   # in the place of a package that need not be there
        def __init__(self, directory):
            super().__init__(self)

        def add_scalar(self, name, value, step):
            written.append((name, value, step))

    monkeypatch.setattr(sys, "argv", ["constnet.py"])
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *rest, find=importlib.util.find_spec:
                        name == "tensorboard" or find(name, *rest))
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", types.SimpleNamespace(SummaryWriter=SummaryWriter))
    arguments = (*QUICK[2:], "--blocks", 3, "--epochs", 3, "--tensorboard", "--out", tmp_path / "a")
    assert constnet.main(list(map(str, arguments))) == 0
    accuracies = [(value, step) for name, value, step in written if name == "test_accuracy/shuffled/seed0"]
    rows = constnet.common.read_csv(tmp_path / "a" / "metrics.csv", text=("arm",))
    assert [step for _, step in accuracies] == [0, 7, 14, 21]
    assert [value for value, _ in accuracies] == pytest.approx([row["test_accuracy"] for row in rows
                                                                if row["test_accuracy"] is not None], rel=1e-5)


def test_the_number_of_processes_is_part_of_a_run(tmp_path, run):
    arguments = (*QUICK, "--device", "cpu", "--blocks", 3, "--out", tmp_path / "a")
    assert run("constnet.py", *arguments, processes=2).returncode == 0
    done = run("constnet.py", *arguments, "--resume")
    assert done.returncode == 2 and "--nproc-per-node 2" in done.stderr
    done = run("constnet.py", *arguments, processes=2)      # refused by the first process, for whom the second waits
    assert done.stderr.count("error: argument --out") == 1 and "broadcast" not in done.stderr


def test_processes_stop_together_where_one_diverged(tmp_path, run):
    """Batch norm's statistics, and so the tests, are each process's own."""
    (tmp_path / "one.py").write_text(f"""import math, sys
sys.path.insert(0, {str(ROOT)!r})
import constnet
evaluate = constnet.evaluate
constnet.evaluate = lambda *given: evaluate(*given) | ({{"test_loss": math.inf}} if constnet.common.RANK else {{}})
sys.exit(constnet.main())
""")
    done = run(tmp_path / "one.py", *QUICK[2:], "--epochs", 2, "--device", "cpu", "--blocks", 3, "--order", "fixed", "--out",
               tmp_path / "a", processes=2)
    assert "diverged" in done.stderr and [arm["diverged"] for arm in results(tmp_path / "a")] == [True], done.stderr


@pytest.mark.skipif(not GPU, reason="needs a CUDA device")
@pytest.mark.parametrize("order", ["fixed", "shuffled"])
def test_a_cuda_graph_trains_to_the_bits_of_its_kernels_alone(tmp_path, run, order):
    """Random images, dropout and a window of the order, which needs two graphs, included."""
    for name, more in (("graph", ("--graph",)), ("alone", ())):
        done = run("constnet.py", *QUICK, "--order", order, "--order-steps", 2, 5, "--augment", "--cutout", 2, "--dropout",
                   0.1, *more, "--out", tmp_path / name)
        assert done.returncode == 0, done.stderr
    (graph,), (alone,) = results(tmp_path / "graph"), results(tmp_path / "alone")
    assert graph["weights_sha256"] == alone["weights_sha256"] and graph["train_loss"] == alone["train_loss"]


@pytest.mark.skipif(not GPU, reason="needs a CUDA device")
def test_a_cuda_graph_mixes_images_and_repeats(tmp_path, run):
    for name in ("a", "b"):
        done = run("constnet.py", *QUICK, "--graph", "--precision", "bf16", "--mixup", 1, "--out", tmp_path / name)
        assert done.returncode == 0, done.stderr
    (a,), (b,) = results(tmp_path / "a"), results(tmp_path / "b")
    assert a["weights_sha256"] == b["weights_sha256"]


def test_pruned_weights_stay_zero_and_the_rest_starts_as_before(tmp_path, run):
    done = run("constnet.py", *QUICK, "--order", "fixed", "--prune", 0.2, "--rewind", 3, "--out", tmp_path / "a")
    assert done.returncode == 0, done.stderr
    found = {arm["arm"]: arm for arm in results(tmp_path / "a")}
    assert list(found) == ["constnet", "standard", "constnet-largest-0.2", "constnet-random-0.2", "standard-largest-0.2",
                           "standard-random-0.2"]
    weights = {name: torch.load(tmp_path / "a" / f"{name}-0.pt", weights_only=True) for name in found}
    name = "stages.1.1.conv.weight"
    kept = weights["standard-largest-0.2"][name] != 0
    dense = weights["standard"][name].abs()
    assert kept.sum() == round(0.2 * kept.numel()) and dense[kept].min() >= dense[~kept].max()
    assert found["standard-random-0.2"]["nonzero"] == pytest.approx(20, abs=0.1) and (tmp_path / "a" / "prune.png").exists()
    with open(tmp_path / "a" / "metrics.csv", newline="") as file:
        assert min(int(row["step"]) for row in csv.DictReader(file) if row["arm"] == "standard-random-0.2") == 3
    (tmp_path / "a" / "done" / "standard-random-0.2-0.json").unlink()
    again = run("constnet.py", *QUICK, "--order", "fixed", "--prune", 0.2, "--rewind", 3, "--resume", "--out", tmp_path / "a")
    assert again.returncode == 0, again.stderr
    hashes = {arm["arm"]: arm["weights_sha256"] for arm in results(tmp_path / "a")}
    assert hashes == {name: arm["weights_sha256"] for name, arm in found.items()}


def test_prox_makes_arms_that_are_sparse(tmp_path, run):
    done = run("constnet.py", *QUICK, "--order", "fixed", "--init", "none", "--prox", 0, 0.3, "--out", tmp_path / "a")
    assert done.returncode == 0, done.stderr
    dense, sparse = results(tmp_path / "a")
    assert dense["arm"] == "fixed-prox0" and dense["nonzero"] == 100 and 0 < sparse["nonzero"] < 90
    assert (tmp_path / "a" / "prox.png").exists()


def test_frozen_parameters_stay(tmp_path, run):
    done = run("constnet.py", *QUICK, "--freeze", "stem.*", "*.shortcut.*", "--nesterov", "--cutout", 2, "--prox", 0.01,
               "--out", tmp_path / "a")
    assert done.returncode == 0, done.stderr
    trained = torch.load(tmp_path / "a" / "shuffled-0.pt", weights_only=True)
    start = network(channels=1, blocks=6).state_dict()
    changed = {name for name in start if not torch.equal(start[name], trained[name])}
    assert "stages.1.1.conv.weight" in changed
    assert {"stem.weight", "stages.1.0.shortcut.weight"} <= start.keys() - changed


def test_figure_2_has_both_starts_on_both_data_sets(tmp_path, run):
    done = run("constnet.py", *QUICK, "--blocks", 3, "--figure2", "digits", "digits", "--out", tmp_path / "a")
    assert done.returncode == 0, done.stderr
    assert [arm["arm"] for arm in results(tmp_path / "a")] == ["digits-constnet", "digits-standard"]
    assert (tmp_path / "a" / "figure2.png").exists()


def test_figure_2_records_each_data_sets_recipe(tmp_path, monkeypatch):
    digits, trained = constnet.common.load_data("digits", ""), {}

    def train(args, name, *_):
        trained[name] = args.lr
        return {"summary": {"arm": name, "active": 1, "diverged": False}, "rows": [{"arm": name}]}

    monkeypatch.setattr(constnet.common, "load_data", lambda *_: digits)
    monkeypatch.setattr(constnet, "train", train)
    monkeypatch.setattr(constnet, "report", lambda directory: None)
    monkeypatch.chdir(tmp_path)
    assert constnet.main(["--figure2", "mnist", "fashion-mnist", "--device", "cpu"]) == 0
    config = json.loads((tmp_path / "runs/constnet/mnist-fashion-mnist-figure2/config.json").read_text())["arguments"]
    assert config["dataset"] == ["mnist", "fashion-mnist"] and config["lr"] == {"mnist": 0.1, "fashion-mnist": 0.05}
    assert trained == {f"{name}-{start}": lr for name, lr in config["lr"].items() for start in constnet.STARTS}


def test_two_processes_train_as_one(tmp_path, run):
    """Without batch norm the mean of two halves' gradients is the whole batch's: the same training but for rounding."""
    arguments = (*QUICK, "--device", "cpu", "--order", "fixed", "--init", "ab", "--norm", "fixup", "--lr", 0.05)
    for name, processes in (("one", 1), ("two", 2)):
        done = run("constnet.py", *arguments, "--out", tmp_path / name, processes=processes)
        assert done.returncode == 0, done.stderr
    (one,), (two,) = results(tmp_path / "one"), results(tmp_path / "two")
    assert sorted(path.name for path in (tmp_path / "one").iterdir()) == sorted(path.name for path in (tmp_path / "two").iterdir())
    assert one.keys() == two.keys() and one["steps"] == two["steps"] == 7
    assert one["train_loss"] == pytest.approx(two["train_loss"], rel=1e-3)
    weights = [torch.load(tmp_path / name / "fixed-0.pt", weights_only=True) for name in ("one", "two")]
    for name, value in weights[0].items():
        torch.testing.assert_close(value, weights[1][name], rtol=1e-2, atol=1e-4)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
def test_two_processes_with_synchronised_batch_norm_train_as_one(tmp_path, run):
    for name, processes, more in (("one", 1, ()), ("two", 2, ("--sync-batch-norm",))):
        done = run("constnet.py", *QUICK, *more, "--order", "fixed", "--init", "ab", "--lr", 0.05, "--out",
                   tmp_path / name, processes=processes)
        assert done.returncode == 0, done.stderr
    (one,), (two,) = results(tmp_path / "one"), results(tmp_path / "two")
    assert one["train_loss"] == pytest.approx(two["train_loss"], rel=1e-2)


def test_shards_have_the_same_bits_on_any_number_of_processes(tmp_path, run):
    arguments = (*QUICK, "--device", "cpu", "--shards", 4, "--dropout", 0.1, "--augment", "--mixup", 1)
    for processes in (1, 2, 4):
        done = run("constnet.py", *arguments, "--out", tmp_path / str(processes), processes=processes,
                   env={**os.environ, "OMP_NUM_THREADS": "1"})
        assert done.returncode == 0, done.stderr
    one, two, four = (results(tmp_path / str(processes))[0] for processes in (1, 2, 4))
    assert one["weights_sha256"] == two["weights_sha256"] == four["weights_sha256"]
    assert one["train_loss"] == two["train_loss"] == four["train_loss"]


def test_shards_add_up_to_the_batch():
    """The mean of the shards' gradients is the batch's, where no batch norm tells the shards apart."""
    model, x = network("", channels=1, norm="fixup"), torch.randn(12, 1, 8, 8)
    y = torch.randint(0, 10, (12,))

    def add_gradient(chosen, purpose):
        loss = nn.functional.cross_entropy(model(x[chosen]), y[chosen])
        loss.backward()
        return loss.detach()

    whole = add_gradient(torch.arange(12), "")
    expected = [parameter.grad.clone() for parameter in model.parameters()]
    loss = constnet.add_shards(model, add_gradient, torch.arange(12).split(3), 0, 1)
    torch.testing.assert_close(loss, whole)
    for parameter, gradient in zip(model.parameters(), expected, strict=True):
        torch.testing.assert_close(parameter.grad, gradient, rtol=1e-3, atol=1e-3 * gradient.abs().max().item())


# ------------------------------------------------------------------------------------------------------ failing well

BAD = [
    (("--dataset", "mnits"), "--dataset.*mnits.*fashion-mnist"), (("--order", "random"), "--order.*random.*shuffled"),
    (("--device", "cpu", "--graph"), "--graph.*on"), (("--table1", 0), "--table1.*0"),
    (("--order", "fixed", "fixed"), "--order"), (("--splits", 0), "--splits.*0"), (("--splits", 65), "--splits.*65.*64"),
    (("--dropout", 1), r"--dropout.*1\.0.*\[0, 1\)"), (("--dropout", -0.1), "--dropout"), (("--init", "abx"), "--init.*a, b, c, d"),
    (("--order-steps", 5, 5), "--order-steps.*5, 5.*empty"), (("--order-layers", "conv9"), "--order-layers.*conv9.*stem"),
    (("--blocks", 10), "--blocks.*10.*multiple of 3"), (("--epochs", 0), "--epochs.*0"), (("--lr", "nan"), "--lr.*nan"),
    (("--seed", 1, 1), "--seed"), (("--device", "tpu"), "--device.*tpu"), (("--batch-size", 5000), "--batch-size.*5000.*1438"),
    (("--precision", "tf32", "--device", "cpu"), "--precision.*tf32"), (("--schedule", "linear"), "--schedule.*linear.*cosine"),
    (("--epochs", "many"), "--epochs.*many"), (("--colour", "red"), "--colour"), (("--momentum", 1), "--momentum"),
    (("--dataset", "mnist", "--data-dir", "/proc/nowhere"), "--data-dir.*mnist.*/proc/nowhere"),
    (("--dataset", "imagefolder", "--data-dir", "/nowhere"), "--data-dir.*/nowhere/train"),
    (("--out", "/proc/nowhere"), "--out.*/proc/nowhere"), (("--plot-only", "/nowhere"), "--plot-only.*/nowhere"),
    (("--resume", "--out", "/nowhere"), "--resume.*/nowhere"), (("--arch", "leakynet", "--layer-init", "1_ii"), "--layer-init.*13 letters"),
    (("--prune", 0), "--prune"), (("--rewind", 3), "--rewind.*--prune"), (("--prox", 1, 1), "--prox.*different"),
    (("--prox", -1), "--prox"), (("--cutout", -1), "--cutout"), (("--figure2", "digits", "x"), "--figure2.*x"),
    (("--freeze", "conv9"), "--freeze.*conv9.*stem.weight"), (("--table1", "--signal"), "--signal.*--table1"),
    (("--momentum", 0, "--nesterov"), "--momentum.*--nesterov"), (("--shards", 3), "--batch-size.*64.*3"),
    (("--freeze", "*"), "--freeze.*left to train"), (("--order-seed", 1 << 63), "--order-seed"), (("--prune", 0.5, 0.5), "--prune"),
    (("--arch", "leakynet", "--table1"), "--arch.*leakynet"), (("--leakynet-study", "--blocks", 6, "--layer-init", "h_hh_hh_hh"), "12"),
    (("--arch", "leakynet", "--norm", "fixup"), "--norm"), (("--leakynet-study", "--norm", "fixup"), "--norm"), (("--table1", "--order", "fixed", "atomic"), "one in a study"),
    (("--plot-only", ""), "--plot-only"), (("--device", "hpu"), "--device.*hpu"),
    (("--shards", 16), "--splits.*8.*4"), (("--warmup", -1), "--warmup.*-1"), (("--sync-batch-norm",), "--sync-batch-norm.*torchrun"),
    (("--table1", 1, "--dropout", 0.5), r"--dropout.*0\.5.*left out"), (("--table1", "--order", "native"), "--order.*left out"),
    (("--figure2", "digits", "digits", "--init", "ab"), "--init.*left out"),
    (("--order-steps", 5000, 6000), "--order-steps.*5000.*528 steps"), (("--prune", 0.5, "--init", "none"), "--init.*left out"),
    (("--arch", "leakynet", "--init", "ab"), "--init.*left out"), (("--layer-init", "h_hhhh_hhhh_hhhh"), "--layer-init.*left out"),
    (("--leakynet-study", "--layer-init", "h_hhhh_hhhh_hhhh"), "--layer-init.*left out"), (("--lr", 1e39), "--lr.*float32"),
    (("--mixup", 1e-50), "--mixup.*0.001"), (("--image-size", 5), "--image-size.*imagefolder"), (("--widen", 1000000), "--widen.*memory"),
    (("--cutout", 10**21), "--cutout"), (("--batch-size", 10**21), "--batch-size"), (("--widen", 10**21), "--widen"),
]


@pytest.mark.parametrize("arguments,named", BAD, ids=lambda value: " ".join(map(str, value)) if isinstance(value, tuple) else "")
def test_bad_input_is_one_line_and_exit_2(tmp_path, monkeypatch, capsys, arguments, named):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["constnet.py"])
    with pytest.raises(SystemExit) as stop:
        sys.exit(constnet.main(list(map(str, arguments))))
    message = capsys.readouterr().err.strip()
    assert stop.value.code == 2 and len(message.splitlines()) == 1
    assert re.search(named, message), message
    assert not list(tmp_path.glob("runs/constnet/*/*"))


def test_a_single_value_per_channel_is_one_line(tmp_path, monkeypatch, capsys):
    images, labels = torch.arange(12, dtype=torch.uint8).view(4, 3, 1, 1), torch.tensor([0, 1, 0, 1])
    monkeypatch.setattr(constnet.common, "load_data", lambda *_: (images, labels, images, labels, 2))
    with pytest.raises(SystemExit) as stop:
        constnet.main(["--batch-size", "1", "--splits", "1", "--blocks", "3", "--out", str(tmp_path / "a")])
    assert stop.value.code == 2 and re.search("--batch-size.*batch norm", capsys.readouterr().err.splitlines()[-1])


@pytest.mark.parametrize("allocate", [
    lambda: torch.empty(1 << 60),
    lambda: constnet.ordered_reduce.sum(torch.zeros(1, 1).expand(1 << 45, 2), 1),
    lambda: constnet.ordered_reduce.sum(torch.zeros(2, 1).expand(2, 1 << 44)),   # a copy
], ids=["PyTorch", "result", "copy"])
def test_too_little_memory_names_what_takes_it(tmp_path, monkeypatch, capsys, allocate):
    monkeypatch.setattr(constnet.common, "work", lambda *_, **__: allocate())
    with pytest.raises(SystemExit) as stop:
        constnet.main([*map(str, QUICK), "--out", str(tmp_path / "a")])
    assert stop.value.code == 2 and "--batch-size, --widen: 200 images" in capsys.readouterr().err.splitlines()[-1]


def test_another_configuration_and_broken_checkpoints_are_refused(tmp_path, run):
    assert run("constnet.py", *QUICK, "--out", tmp_path / "a").returncode == 0

    def files():
        return {path: path.read_bytes() for path in (tmp_path / "a").rglob("*") if path.is_file()}

    whole = files()
    again = run("constnet.py", *QUICK, "--out", tmp_path / "a")
    other = run("constnet.py", *QUICK, "--lr", 0.7, "--resume", "--out", tmp_path / "a")
    assert whole == files()
    done = run("constnet.py", *QUICK, "--resume", "--out", tmp_path / "a")     # nothing left to do: the same results
    assert done.returncode == 0 and whole == files()
    (tmp_path / "a" / "done" / "shuffled-0.json").unlink()
    (tmp_path / "a" / "shuffled-0-checkpoint.pt").write_bytes((tmp_path / "a" / "shuffled-0.pt").read_bytes()[:5000])
    truncated = run("constnet.py", *QUICK, "--resume", "--out", tmp_path / "a")
    (tmp_path / "a" / "shuffled-0-checkpoint.pt").unlink()
    (tmp_path / "a" / "done" / "shuffled-0.json").write_text("{")
    broken = run("constnet.py", *QUICK, "--resume", "--out", tmp_path / "a")
    for done, named in ((again, "--out"), (other, "--lr 0.3"), (truncated, "checkpoint.pt"), (broken, "shuffled-0.json")):
        assert done.returncode == 2 and named in done.stderr and len(done.stderr.strip().splitlines()) == 1, done.stderr


def test_default_directories_are_numbered(tmp_path, run):
    for _ in range(2):
        assert run("constnet.py", *QUICK, cwd=tmp_path).returncode == 0
    assert sorted(path.name for path in (tmp_path / "runs" / "constnet").iterdir()) == ["digits", "digits-2"]


def test_help_explains_every_argument(monkeypatch, capsys):
    actions = []
    add = argparse._ActionsContainer.add_argument

    def note(self, *names, **arguments):
        actions.append(add(self, *names, **arguments))
        return actions[-1]

    monkeypatch.setattr(argparse._ActionsContainer, "add_argument", note)
    with pytest.raises(SystemExit):
        constnet.parse_arguments(["--help"])
    text = capsys.readouterr().out
    assert len(actions) > 40 and text.count("paper") > 8
    modes = ("--table1", "--figure2", "--prune", "--plot-only")   # take values, but are off unless they are given
    for action in actions:
        assert action.option_strings[-1] in text and action.help
        assert "default" in action.help.lower() or action.nargs == 0 or action.option_strings[-1] in modes, action


def test_training_is_plain_sgd_and_tested_on_the_test_images(tmp_path):
    """With dropout and mixup, whose draws are PyTorch's own after the step's seed."""
    data = images, labels, test_images, test_labels, _ = constnet.common.load_data("digits", "")
    args = parsed("--blocks", 3, "--epochs", 3, "--batch-size", 700, "--init", "none", "--order", "fixed", "--dropout", 0.1,
                  "--mixup", 1, "--device", "cpu")
    try:
        found = constnet.train(args_of := constnet.arms(args, [])["fixed"], "fixed", 5, data, tmp_path)
    finally:
        torch.use_deterministic_algorithms(False)
    torch.manual_seed(constnet.draw(5, 0, "weights"))
    model, normalise = constnet.make_network(args_of, 1, 10), constnet.normaliser(images)
    optimizer = torch.optim.SGD(model.parameters(), lr=1, momentum=0.9, weight_decay=5e-4)
    for epoch in range(3):
        order = torch.randperm(1438, generator=torch.Generator().manual_seed(constnet.draw(5, epoch, "data")))
        losses = []
        for step, chosen in enumerate(order[:1400].split(700), start=2 * epoch):
            optimizer.param_groups[0]["lr"] = constnet.learning_rate(args, step, 2)
            torch.manual_seed(constnet.draw(5, step, "step"))
            share = torch.distributions.Beta(1.0, 1.0).sample()
            x, y, other = normalise(images[chosen]), labels[chosen], torch.randperm(700)
            scores = model(share * x + (1 - share) * x[other])
            loss = share * nn.functional.cross_entropy(scores, y) + (1 - share) * nn.functional.cross_entropy(scores, y[other])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        model.eval()
        with torch.no_grad():
            features = model.features(normalise(test_images))
            scores = model.head(features)
        model.train()
        row, = (row for row in found["rows"] if row["epoch"] == epoch + 1)
        assert row["epoch_train_loss"] == pytest.approx(sum(losses) / 2, rel=1e-3)
        assert row["test_loss"] == pytest.approx(nn.functional.cross_entropy(scores, test_labels).item(), rel=1e-2)
        assert row["test_accuracy"] == pytest.approx(100 * (scores.argmax(1) == test_labels).double().mean().item(), abs=0.9)
        assert row["active"] == pytest.approx(100 * (features != 0).double().mean().item(), abs=0.5)
    assert found["summary"]["test_accuracy"] == row["test_accuracy"] and found["summary"]["train_loss"] == row["epoch_train_loss"]


def test_what_is_pruned_starts_from_the_rewound_weights(tmp_path):
    data = constnet.common.load_data("digits", "")
    arm = constnet.arms(parsed("--prune", 0.2, "--device", "cpu"), [])["standard-largest-0.2"]
    trained, rewound = (constnet.make_network(arm, 1, 10) for _ in "ab")
    torch.save(trained.state_dict(), tmp_path / "standard-0.pt")
    torch.save(rewound.state_dict(), tmp_path / "standard-0-rewind.pt")
    model, masks = constnet.start_network(arm, 0, data, tmp_path)
    for weight, mask, start in zip(constnet.conv_weights(model), masks, constnet.conv_weights(rewound), strict=True):
        assert torch.equal(weight, start * mask) and mask.sum() == round(0.2 * mask.numel())


def test_signal_of_the_last_layer_by_hand():
    """A normal form of 64 means over 2x2 places, of which a share is on: 64 share / 4 per image."""
    data = [torch.randint(0, 256, (256, 3, 8, 8), dtype=torch.uint8), None, None, None, 10]
    args = parsed("--init", "none", "--batch-size", 256)
    torch.manual_seed(constnet.draw(0, 0, "weights"))
    with torch.no_grad():
        model = constnet.make_network(args, 3, 10)
        z = model.stages(model.stem(constnet.normaliser(data[0])(data[0])))
    row = constnet.signal_propagation(args, "standard", 0, data)[-1]
    assert row["activation"] == pytest.approx(z.square().mean().item(), rel=1e-3)
    assert row["gradient"] == pytest.approx(64 * (z > 0).double().mean().item() / 4, rel=0.05)


def test_mean_and_range_of_the_seeds():
    rows = [{"epoch": epoch, "y": y} for epoch, y in ((2, 5.0), (1, 1.0), (1, 6.0), (2, None), (1, 2.0))]
    assert constnet.by_seed(rows, "epoch", "y") == [[1, 2], [3.0, 5.0], [1.0, 5.0], [6.0, 5.0]]


def test_a_row_of_table_1_by_hand(tmp_path, capsys):
    runs = [(0, 90.0, None, {"stem": 1, "conv": 1}), (1, 92.0, 3, {"stem": 16, "conv": 4}), (2, 97.0, 2, {"stem": 16, "conv": 8})]
    constnet.write_table_1([{"arm": "row8", "seed": seed, "dataset": "digits", "epochs": 1, "test_accuracy": accuracy, "diverged": False,
                             "symmetry": {"kept": step is None, "first_broken_step": step, "distinct_filters": filters}}
                            for seed, accuracy, step, filters in runs], tmp_path)
    half = 4.30 * 13 ** 0.5 / 3 ** 0.5                        # Student's, of 90, 92, 97
    assert f"| fixed | 10.0 | 93.0 ± {half:.1f} | never, 2, 3 | 1 to 8 |" in capsys.readouterr().out
