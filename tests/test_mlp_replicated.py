"""mlp_replicated.py: Eq. 1 and Eq. 2, the batched training against plain PyTorch, and cells that ignore each other."""

import json
import math
import os
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import ordered_reduce
import pytest
import torch
from conftest import ROOT
from torch import nn
from torch.nn import functional as F

import common
import mlp_replicated

QUICK = ("--widths", 4, 8, "--noise", 0, "--seeds", 3, "--steps", 40, "--device", "cpu")   # 7 cells


def digits():
    *tensors, classes = common.load_data("digits", None)
    return [tensor.flatten(1) if tensor.ndim > 1 else tensor for tensor in tensors] + [classes]


def rows(*arguments, seeds=(0,), most=1 << 20):
    """{(cell, seed, step): measures} of a grid on the digits, trained here."""
    args = mlp_replicated.parse_arguments([*map(str, arguments)])
    found = {}
    for cells, units in mlp_replicated.rooms(mlp_replicated.grid(args), most):
        for row in mlp_replicated.train(cells, units, list(seeds), digits(), args, lambda n: None):
            found[mlp_replicated.cell_of(row), row["seed"], row["step"]] = row
    return found


# --------------------------------------------------------------------------------------------- initialisation, measures


@pytest.mark.parametrize("width,features", [(8, 8), (8, 1), (8, 4), (8, 3), (7, 5)])
def test_rows_are_copies_of_the_features(width, features):
    w1, w2 = mlp_replicated.initial_weights((width, features, 0.0, 0.0), 5, 64, 10)
    assert w1.shape == (width, 64) and w2.shape == (10, width)
    assert all(torch.equal(w1[i], w1[i % features]) for i in range(width))
    assert len(w1.unique(dim=0)) == features


def test_noise_blends_the_features_with_the_units_own_rows():
    pure, own, mixed = (mlp_replicated.initial_weights((6, 2, noise, 0.0), 5, 64, 10)[0] for noise in (0.0, 1.0, 0.25))
    torch.testing.assert_close(mixed, 0.75 * pure + 0.25 * own)
    assert len(own.unique(dim=0)) == 6


def test_cells_of_a_seed_share_what_they_can():
    weights = {k: mlp_replicated.initial_weights((8, k, 0.0, 0.0), 1, 64, 10) for k in (2, 4)}
    assert torch.equal(weights[2][1], weights[4][1])
    other = mlp_replicated.initial_weights((16, 2, 0.0, 0.0), 1, 64, 10)
    assert torch.equal(other[0][:2], weights[2][0][:2])
    assert not torch.equal(mlp_replicated.initial_weights((8, 2, 0.0, 0.0), 2, 64, 10)[0], weights[2][0])


def test_variances_are_hes():
    w1, w2 = mlp_replicated.initial_weights((512, 512, 0.0, 0.0), 0, 256, 10)
    for w, fan_in in ((w1, 256), (w2, 512)):   # six standard errors of a variance over w.numel() normal draws
        assert abs(w.var().item() * fan_in / 2 - 1) < 6 * math.sqrt(2 / w.numel())


def test_distinct_units():
    row = torch.randn(100)
    nudged = row.clone()
    nudged[3] = torch.nextafter(row[3], torch.tensor(math.inf))
    almost = row + 5e-4 * row.norm() / 10   # 5e-4 of the row's length away
    apart = row + 2e-3 * row.norm() / 10
    w = torch.stack([torch.stack([row, row, nudged, almost]), torch.stack([row, apart, -row, 2 * row]),
                     torch.stack([row, row, row, row])])
    assert mlp_replicated.distinct_units(w) == ([3, 4, 1], [1, 4, 1])


def test_logged_steps():
    assert mlp_replicated.logged_steps(1) == [0, 1]
    assert mlp_replicated.logged_steps(100) == [0, 1, 10, 100]
    assert mlp_replicated.logged_steps(7500) == [0, 1, 10, 100, 1000, 7500]


# -------------------------------------------------------------------------------------------------------------- training


@pytest.mark.parametrize("order", ["native", "fixed"])
@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_training_is_plain_sgd_on_eq_1(order, dropout):
    """The batched grid against nn.Linear, autograd and torch.optim.SGD."""
    cell, seed, steps, batch = (24, 5, 0.1, dropout), 3, 60, 32
    x_train, y_train, x_test, y_test, classes = digits()
    first, second = nn.Linear(64, 24, bias=False), nn.Linear(24, classes, bias=False)
    w1, w2 = mlp_replicated.initial_weights(cell, seed, 64, classes)
    first.weight.data, second.weight.data = w1, w2
    optimizer = torch.optim.SGD([first.weight, second.weight], lr=0.1)
    masks = mlp_replicated.generator(seed, "dropout", 24)
    epoch = len(x_train) // batch
    for step in range(steps):
        if step % epoch == 0:
            order_of_images = torch.randperm(len(x_train), generator=mlp_replicated.generator(seed, "epoch", step // epoch))
        index = order_of_images[step % epoch * batch:][:batch]
        h = F.relu(first(x_train[index] / 16))
        if dropout:
            h = h * (torch.rand(24, batch, generator=masks) >= dropout).t() / (1 - dropout)
        optimizer.zero_grad()
        F.cross_entropy(second(h), y_train[index]).backward()
        optimizer.step()
    with torch.no_grad():
        error = 100 * (second(F.relu(first(x_test / 16))).argmax(1) != y_test).double().mean().item()
    ours = rows("--widths", 24, "--features", 5, "--noise", 0.1, "--dropout", dropout, "--steps", steps, "--batch-size",
                batch, "--order", order, seeds=[seed])
    assert 1 < error < 60
    assert ours[cell, seed, steps]["test_error"] == pytest.approx(error, abs=1e-4)


def test_a_cell_does_not_depend_on_the_others():
    full = rows("--widths", 4, 8, 32, 64, "--dropout", 0, 0.2, "--steps", 60, seeds=[0, 1])
    for arguments, seeds, most in [(("--widths", 8, "--features", 2, "--noise", 0), [1], 1 << 20),
                                   (("--widths", 64, "--features", 3, 64, "--noise", 0.01), [0], 1 << 20),
                                   (("--widths", 32, "--dropout", 0.2), [1, 0], 1 << 20),
                                   (("--widths", 4, 8, 32, 64, "--dropout", 0, 0.2), [0, 1], 300)]:
        some = rows(*arguments, "--steps", 60, seeds=seeds, most=most)
        shared = set(some) & set(full)
        assert len(shared) >= 4 and all(some[key] == full[key] for key in shared)


@pytest.mark.parametrize("second_layer,order,distinct", [("random", "native", 8), ("replicated", "native", 2),
                                                         ("replicated", "fixed", 2), ("replicated", "shuffled", 8)])
def test_what_makes_copies_part(second_layer, order, distinct):
    """Back-propagation through a random second layer does; through a replicated one, only the order of additions can."""
    found = rows("--widths", 8, "--features", 2, "--noise", 0, "--steps", 10, "--second-layer", second_layer, "--order",
                 order)
    assert [found[(8, 2, 0.0, 0.0), 0, step]["distinct"] for step in (0, 10)] == [2, distinct]


def test_a_replicated_second_layer_has_equal_columns():
    _, w2 = mlp_replicated.initial_weights((8, 3, 0.0, 0.0), 0, 64, 10, "replicated")
    assert all(torch.equal(w2[:, i], w2[:, i % 3]) for i in range(8))


@pytest.mark.parametrize("order", ["fixed", "shuffled"])
def test_ordered_update(order):
    """The chosen order per cell, keyed by the cell alone; equal units part in shuffled and stay equal in fixed."""
    args = mlp_replicated.parse_arguments(["--order", order, "--splits", "8", "--batch-size", "32"])
    x = torch.rand(1, 32, 20)
    one = torch.randn(1, 1, 32).expand(1, 6, 32)   # six units with one and the same gradient
    cells = [(3, 1, 0.0, 0.0), (3, 2, 0.0, 0.0)]
    both, alone = torch.zeros(1, 6, 20), torch.zeros(1, 3, 20)
    mlp_replicated.ordered_update(both, one, x, [(3, cells, 0, None)], [7], 4, args)
    mlp_replicated.ordered_update(alone, one[:, 3:], x, [(3, cells[1:], 0, None)], [7], 4, args)
    torch.testing.assert_close(both, -args.lr * one @ x)
    assert torch.equal(both[:, 3:], alone)
    partials = torch.bmm(one[0, :3].unflatten(1, (8, 4)).transpose(0, 1), x[0].unflatten(0, (8, 4)))
    assert torch.equal(both[0, :3], -args.lr * ordered_reduce.sum(partials, 0)) == (order == "fixed")
    assert len(both[0].unique(dim=0)) == (1 if order == "fixed" else 6)


# --------------------------------------------------------------------------------------------------------- the statements


def synthetic(error, widths=(8, 16, 32, 64), seeds=12):
    random = np.random.default_rng(0)
    return {(n, k, noise, 0.0): error(n, k, noise) + 0.01 * random.standard_normal(seeds)
            for n in widths for k in (1, 2, 4, 8, 16, 32, 64) if k <= n for noise in (0.0, 0.01)}


def value(errors, contains):
    found, = [row for row in mlp_replicated.statements(errors) if contains in row["statistic"]]
    assert found["low"] - 0.01 <= found["value"] <= found["high"] + 0.01   # (of a bounded statistic it may lie outside)
    return found["value"]


def test_one_seed_has_no_interval():
    errors = {(n, k, noise, 0): np.array([float(n + k)]) for n in (8, 16, 32) for k in (1, 2, 4) for noise in (0, 0.1)}
    assert {row["low"] for row in mlp_replicated.statements(errors)} == {None}


def test_statements_find_what_was_put_in():
    only_k = synthetic(lambda n, k, noise: 20 / (1 + k) if noise == 0 else 5)
    assert value(only_k, "by K alone") > 99.9 and value(only_k, "by N alone") < 60
    assert value(only_k, "first doubling") == pytest.approx(0, abs=0.02)
    assert value(only_k, "noise 0.01") == pytest.approx(0, abs=0.02)
    assert value(only_k, "noise 0 ") == pytest.approx(np.mean([10 - 20 / (1 + n) for n in (8, 16, 32, 64)]), abs=0.02)
    only_n = synthetic(lambda n, k, noise: 100 / n + (1 if n == 64 and k <= 2 else 0))
    assert value(only_n, "by N alone") > 98
    assert value(only_n, "first doubling") < value(only_n, "last doubling") - 1
    assert value(only_n, "narrower") == pytest.approx(100 / 64 + 1 - 100 / 32, abs=0.02)


def test_no_statements_about_a_grid_that_cannot_answer():
    assert mlp_replicated.statements(synthetic(lambda n, k, noise: n, widths=(8, 16))) == []
    assert mlp_replicated.statements({}) == []
    one_level_diverged = {cell: errors for cell, errors in synthetic(lambda n, k, noise: n).items() if cell[0] < 64 or cell[2] == 0}
    assert mlp_replicated.statements(one_level_diverged) == []
    apart = {cell: errors for cell, errors in synthetic(lambda n, k, noise: n).items()   # no K of N = 64 at both noises
             if cell[0] < 64 or (cell[1] < 8) == (cell[2] == 0)}
    assert mlp_replicated.statements(apart) == []
    between = {(n, k, 0.005, dropout): errors for (n, k, noise, dropout), errors in synthetic(lambda n, k, noise: n).items() if noise == 0}
    assert mlp_replicated.statements(one_level_diverged | between) == []


def test_few_features_that_one_width_alone_can_hold_are_left_out():
    """16 <= 512 / 32, but no other width of this grid has 16 units or more."""
    errors = {(n, k, noise, 0): np.arange(2.0) + n for n in (4, 8, 512) for k in (1, 8, 16) if k <= n for noise in (0, 0.1)}
    assert value(errors, "narrower") == pytest.approx((512 - 4 + 512 - 8) / 2)


# ------------------------------------------------------------------------------------------------------------ the script


def metrics(directory):
    return (directory / "metrics.csv").read_text()


@pytest.fixture(scope="module")
def reference(tmp_path_factory):
    """An uninterrupted run, to compare with."""
    out = tmp_path_factory.mktemp("reference") / "run"
    subprocess.run([sys.executable, ROOT / "mlp_replicated.py", *map(str, QUICK), "--out", out], check=True)
    return out


def test_a_run_leaves_all_its_files(reference, run):
    names = {"config.json", "metrics.csv", "summary.json", "figure1.png", "figure3.png", "features.png", "seeds"}
    assert names <= {path.name for path in reference.iterdir()}
    summary = json.loads((reference / "summary.json").read_text())
    assert len(summary["cells"]) == 7 and summary["cells_left_out"] == 1
    assert all(cell["seeds"] == 3 and 0 < cell["test_error"] <= 100 for cell in summary["cells"])
    before = {name: (reference / name).read_bytes() for name in names if name.endswith(".png")}
    done = run("mlp_replicated.py", "--plot-only", reference)
    assert done.returncode == 0 and "K = 4" in done.stdout
    assert before == {name: (reference / name).read_bytes() for name in before}


def test_torchrun_gives_the_same_csv(reference, tmp_path, run):
    done = run("mlp_replicated.py", *QUICK, "--out", tmp_path / "run", processes=2)
    assert done.returncode == 0, done.stderr
    assert metrics(tmp_path / "run") == metrics(reference)


def test_killed_and_resumed_without_training_a_finished_seed_again(reference, tmp_path):
    out = tmp_path / "run"
    command = [sys.executable, str(ROOT / "mlp_replicated.py"), *map(str, QUICK), "--out", str(out), "--memory", "0.001"]
    process = subprocess.Popen(command)   # so little memory that one seed trains at a time
    while not (out / "seeds" / "0.csv").exists():
        assert process.poll() is None
        time.sleep(0.001)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    finished = {path: path.stat().st_mtime_ns for path in (out / "seeds").glob("*.csv")}
    assert 1 <= len(finished) < 3
    subprocess.run([*command, "--resume"], check=True)
    assert {path: path.stat().st_mtime_ns for path in finished} == finished
    assert metrics(out) == metrics(reference)


def test_a_grown_grid_keeps_its_finished_cells(reference, tmp_path, run):
    out = tmp_path / "run"
    small = [8 if x == 4 else x for x in QUICK if x != 8]
    assert run("mlp_replicated.py", *small, "--out", out).returncode == 0
    assert run("mlp_replicated.py", *QUICK, "--out", out, "--resume").returncode == 0
    assert metrics(out) == metrics(reference)


def test_a_damaged_seed_is_trained_again_or_named(reference, tmp_path, run):
    out, again = tmp_path / "run", (*QUICK, "--out", tmp_path / "run", "--resume")
    shutil.copytree(reference, out)
    lines = (out / "seeds" / "0.csv").read_text().splitlines(keepends=True)
    (out / "seeds" / "0.csv").write_text("".join(lines[:-1]))
    assert run("mlp_replicated.py", *again).returncode == 0 and metrics(out) == metrics(reference)
    (out / "seeds" / "0.csv").write_text("".join(lines[:-1]) + lines[-1][:3])
    done = run("mlp_replicated.py", *again)
    assert done.returncode == 2 and "0.csv is damaged" in done.stderr and done.stderr.count("\n") == 1


def test_six_digits_of_a_probability_count(tmp_path, run):
    arguments = ("--widths", 4, "--features", 1, "--seeds", 1, "--steps", 3)
    assert run("mlp_replicated.py", *arguments, "--noise", 0, 1 / 3, "--out", tmp_path / "a").returncode == 0
    summary = json.loads((tmp_path / "a" / "summary.json").read_text())
    assert [cell["noise"] for cell in summary["cells"]] == [0, 0.333333]


@pytest.mark.parametrize("arguments,complaint", [
    (["--widths", 0], "--widths"), (["--noise", 0.1, 0.10000001], "different"),
    (["--features", 0], "--features"),
    (["--widths", 4, "--features", 8], "the grid is empty"),
    (["--noise", 1.5], "--noise"),
    (["--noise", "nan"], "--noise"),
    (["--dropout", 1], "--dropout"),
    (["--seeds", 0], "--seeds"),
    (["--steps", 0], "--steps"), (["--lr", 1e39], "--lr"),
    (["--widths", 8, 8], "different"),
    (["--order", "random"], "fixed, shuffled, atomic"),
    (["--order", "fixed", "--splits", 7], "divisor"),
    (["--dataset", "imagenet"], "imagefolder"),
    (["--memory", 0], "--memory"),
])
def test_bad_arguments_are_one_line_and_exit_2(capsys, arguments, complaint):
    with pytest.raises(SystemExit) as stopped:
        mlp_replicated.parse_arguments([*map(str, arguments)])
    error = capsys.readouterr().err
    assert stopped.value.code == 2 and complaint in error and error.count("\n") == 1


@pytest.mark.parametrize("arguments,complaint", [
    (["--memory", 1e-6], "it takes"),
    (["--batch-size", 2000], "1438 training images"),
    (["--resume"], "no run to continue"),
])
def test_what_the_data_do_not_allow_is_one_line_and_exit_2(run, tmp_path, arguments, complaint):
    done = run("mlp_replicated.py", *arguments, "--out", tmp_path / "run")
    assert done.returncode == 2 and complaint in done.stderr and done.stderr.count("\n") == 1, done.stderr
    assert not (tmp_path / "run" / "metrics.csv").exists()


def test_resume_refuses_another_configuration(reference, run):
    done = run("mlp_replicated.py", *QUICK, "--lr", 0.2, "--out", reference, "--resume")
    assert done.returncode == 2 and "--lr 0.1" in done.stderr


def test_scores_that_overflow_are_a_divergence():
    """After one step at this rate the weights are finite, but no score is: the largest NaN would be a guess of class 0."""
    found = rows("--widths", 8, "--features", 2, "--noise", 0, "--lr", 1e25, "--steps", 1)
    assert found[(8, 2, 0.0, 0.0), 0, 1]["test_error"] is None


def test_an_infinite_weight_is_a_divergence(monkeypatch):
    """Even where ReLU hides it: -inf times a pixel that is never 0."""
    data, real = digits(), mlp_replicated.initial_weights
    data[0], data[2] = data[0].clamp(min=1), data[2].clamp(min=1)
    monkeypatch.setattr(mlp_replicated, "initial_weights", lambda *given: (real(*given)[0].fill_(-math.inf), real(*given)[1]))
    args = mlp_replicated.parse_arguments(["--widths", "8", "--features", "2", "--noise", "0", "--lr", "0", "--steps", "1"])
    *_, last = mlp_replicated.train(mlp_replicated.grid(args), mlp_replicated.TILE, [0], data, args, lambda n: None)
    assert last["test_error"] is None


def test_divergence_keeps_the_metrics(run, tmp_path):
    done = run("mlp_replicated.py", *QUICK, "--lr", 1e30, "--out", tmp_path / "run")
    assert done.returncode == 3 and "diverged" in done.stderr
    assert len(metrics(tmp_path / "run").splitlines()) == 1 + 7 * 3 * len(mlp_replicated.logged_steps(40))


def found(errors, contains):
    row, = [row for row in mlp_replicated.statements(errors) if contains in row["statistic"]]
    return row


def test_errors_are_of_the_last_step_by_seed():
    def row(features, seed, step, error, dropout=0.0):
        return dict(width=8, features=features, noise=0.0, dropout=dropout, seed=seed, step=step, test_error=error)

    rows = [row(1, 1, 10, 20.0), row(1, 0, 10, 10.0), row(1, 0, 0, 90.0), row(2, 0, 10, 30.0), row(2, 1, 10, None)]
    table = mlp_replicated.table_of_errors(rows)       # the second cell lacks a seed, which diverged
    assert {cell.features: values.tolist() for cell, values in table.items()} == {1: [10.0, 20.0]}
    cell, = mlp_replicated.summarise(rows, 0)["cells"]
    assert (cell["test_error"], cell["standard_deviation"]) == (15, pytest.approx(50 ** 0.5))


def test_an_interval_is_the_means_and_holds_95_percent():
    """Of independent seeds: the difference of two means of 200 with deviation 1."""
    random = np.random.default_rng(1)
    errors = {(n, k, noise, 0.0): random.standard_normal(200) + 50 for n in (8, 16, 32) for k in (1, 2, 4, 8) for noise in (0.0, 0.1)}
    row = found(errors, "noise 0 ")
    assert row["high"] - row["low"] == pytest.approx(2 * 1.96 * (2 / 200 / 3) ** 0.5, rel=0.15)


def test_doublings_are_the_first_and_the_last_of_features_with_three_widths():
    errors = synthetic(lambda n, k, noise: {8: 40, 16: 30, 32: 25, 64: 24}[n] + 100 * (k == 32) * (n == 64))
    assert found(errors, "first doubling")["value"] == pytest.approx(np.mean([-10] * 4 + [-5]), abs=0.02)   # K = 32 has two widths
    assert found(errors, "last doubling")["value"] == pytest.approx(-1, abs=0.02)


def test_the_better_width_is_not_chosen_on_what_it_is_compared_on():
    """Widths that differ by chance alone: the lowest of eight means of 40 lies 0.22 below another one, but not on other seeds."""
    random = np.random.default_rng(0)
    errors = {(n, k, noise, 0.0): 50 + random.standard_normal(40) for n in (*range(16, 24), 320) for k in range(1, 11)
              for noise in (0.0, 0.1)}
    assert abs(found(errors, "narrower")["value"]) < 0.12


def test_few_features_are_at_most_a_32nd_of_the_width_and_noise_takes_off_what_it_does():
    errors = synthetic(lambda n, k, noise: 30 + 5 * (k == 1) * (noise == 0) + (n == 64) * {1: 1, 2: 3}.get(k, 50))
    assert found(errors, "narrower")["value"] == pytest.approx(2, abs=0.02)
    assert found(errors, "takes off")["value"] == pytest.approx(5, abs=0.02)


def test_statements_are_without_dropout():
    errors = synthetic(lambda n, k, noise: n)
    more = {(*cell[:3], 0.5): values + 100 for cell, values in errors.items()}
    assert mlp_replicated.statements(errors | more) == mlp_replicated.statements(errors)
