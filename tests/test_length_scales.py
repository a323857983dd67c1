"""length_scales.py: lengths against their exact expectations, batched training against plain PyTorch, and the script."""

import json
import math

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

import common
import length_scales


def generator(seed=0):
    return torch.Generator("cpu").manual_seed(seed)


def near(values, expected, errors=5):
    """The mean lies within five of its standard errors."""
    return abs(values.mean() - expected) < errors * values.std() / math.sqrt(len(values))


def arguments(*given):
    return length_scales.parse_arguments([*map(str, given), "--device", "cpu"])


@pytest.mark.parametrize("init", length_scales.INITS)
@pytest.mark.parametrize("widths", [[30] * 6, [10, 40, 20, 40, 10]])
def test_mean_lengths_are_the_exact_ones_at_every_depth(init, widths):
    found = length_scales.lengths(init, widths, 20_000, generator()).double()
    for layer, expected in enumerate(length_scales.expected_length(init, widths)[1:]):
        assert near(found[:, layer], expected), (layer, found[:, layer].mean(), expected)


def test_what_the_expectations_are():
    for init in ("he normal", "he uniform"):
        assert length_scales.expected_length(init, [7] * 5) == [1] * 5
    powers = [2 ** layer for layer in range(5)]
    assert length_scales.expected_length("2x he normal", [7] * 5) == powers
    assert length_scales.expected_length("xavier normal", [7] * 5) == [1 / power for power in powers]
    x = np.linspace(-2, 2, 100_001)
    density = np.exp(-x * x / 2)
    assert math.isclose(length_scales.LEFT, (x * x * density).sum() / density.sum(), rel_tol=1e-4)


@pytest.mark.parametrize("init", ["he normal", "2x he normal", "xavier normal"])
def test_the_short_cut_for_normal_weights_has_the_distribution_of_whole_matrices(init):
    n_in, n_out, draws = 12, 20, 20_000
    short = length_scales.lengths(init, [n_in, n_out], draws, generator())[:, 0].double()
    w, _ = length_scales.initial_layer(init, draws, n_in, n_out, generator(1))
    whole = torch.relu(w @ torch.ones(n_in, 1)).square().mean((1, 2)).double()
    assert near(short, whole.mean(), 7) and near(short.square(), whole.square().mean(), 7)
    spread = (short - short.mean()).square()
    assert near(spread / short.mean() ** 2, 5 / n_out)   # as the theory of FM2 has it


@pytest.mark.parametrize("init", length_scales.INITS)
def test_weights_have_their_variance_and_bounds(init):
    w, b = length_scales.initial_layer(init, 50, 40, 60, generator())
    assert w.shape == (50, 60, 40) and b.shape == (50, 60, 1)
    variance = {"he normal": 2 / 40, "he uniform": 2 / 40, "he normal truncated": length_scales.LEFT * 2 / 40,
                "2x he normal": 4 / 40, "xavier normal": 2 / 100, "xavier uniform": 2 / 100, "pytorch": 1 / 120}[init]
    assert near(w.flatten().double().square(), variance)
    if init == "he normal truncated":
        assert w.abs().max() <= 2 * math.sqrt(2 / 40) * (1 + 1e-5)
    if init.endswith("uniform"):
        assert w.abs().max() <= math.sqrt(3 * variance) * (1 + 1e-5)
    if init == "pytorch":
        linear = nn.Linear(40, 60)
        for ours, theirs in ((w, linear.weight), (b, linear.bias)):
            assert 0.95 < ours.abs().max() * math.sqrt(40) <= 1.00001 and theirs.abs().max() * math.sqrt(40) <= 1.00001
    else:
        assert (b == 0).all()


def test_variance_over_layers_is_the_exact_one():
    args = arguments("--parts", "variance", "--draws", 20_000, "--cap", 1, "--seeds", 1)
    data = [*random_images(), 10]
    for name, _, rows in length_scales.part_variance(args, data):
        if sum(1 / n for n in length_scales.architectures(6)[name]) < 0.4:   # beyond, the mean has too heavy a tail
            variance, _ = rows(generator(), name, 6)
            assert abs(variance["mean"] - variance["theory"]) < 5 * variance["standard_error"], name


def random_images(n=200, inputs=12, classes=10):
    draws = generator()
    images = torch.randint(0, 256, (n, inputs), dtype=torch.uint8, generator=draws)
    return images, torch.randint(0, classes, (n,), generator=draws), images, torch.randint(0, classes, (n,), generator=draws)


def test_residual_lengths_lie_between_the_bounds():
    args = arguments("--parts", "residual", "--draws", 5000, "--cap", 1, "--seeds", 1, "--modules", 1, 3, 10)
    for setting, modules, rows in length_scales.part_residual(args, [*random_images(), 10]):
        length, _ = rows(generator(), setting, modules)
        assert length["bound_low"] - 4 * length["standard_error"] < length["mean"] < (
            length["bound_high"] + 4 * length["standard_error"])
        assert 1 < length["bound_low"] < length["bound_high"]


# -------------------------------------------------------------------------------------------------------------- training


def test_batched_training_is_plain_sgd(monkeypatch):
    """Two seeds of a network with biases, against nn.Linear and torch.optim.SGD."""
    monkeypatch.setattr(length_scales, "TARGET", 101)   # never reached
    args, data = arguments("--cap", 25, "--every", 10, "--lr", 0.1, "--batch-size", 16), [*random_images(), 10]
    parameters, forward = length_scales.fully_connected("pytorch", [8, 9], 12, 10, 2, generator())
    models = []
    for seed in range(2):
        model = nn.Sequential(nn.Linear(12, 8), nn.ReLU(), nn.Linear(8, 9), nn.ReLU(), nn.Linear(9, 10))
        for p, batched in zip(model.parameters(), parameters, strict=True):
            p.data = batched[seed].clone().view_as(p)
        models.append(model)
    draws = generator(5)
    for _ in range(26):   # steps 0 to the cap
        index = torch.randint(200, (2, 16), generator=draws)
        for model, i in zip(models, index, strict=True):
            optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
            F.cross_entropy(model(data[0][i] / data[0].max()), data[1][i]).backward()
            optimizer.step()
            optimizer.zero_grad()
    assert length_scales.steps_to_start(parameters, forward, data, args, generator(5)) == [None, None]
    for seed, model in enumerate(models):
        for p, batched in zip(model.parameters(), parameters, strict=True):
            torch.testing.assert_close(batched[seed].view_as(p), p, rtol=1e-4, atol=1e-5)


def test_residual_forward():
    parameters, forward = length_scales.residual(0.5, 2, 12, 10, 3, generator())
    x = torch.rand(3, 12, 4)
    f = torch.relu(parameters[0] @ x)
    f = f + 0.5 * torch.relu(parameters[1] @ f)
    f = f + 0.25 * torch.relu(parameters[2] @ f)
    assert torch.equal(forward(parameters, x), parameters[3] @ f)


def test_digits_start_with_he_and_not_with_half_the_variance():
    *tensors, classes = common.load_data("digits", None)
    data = [tensor.flatten(1) if tensor.ndim > 1 else tensor for tensor in tensors] + [classes]
    args = arguments("--cap", 300, "--seeds", 4, "--lr", 0.05)
    started = {init: length_scales.steps_to_start(
        *length_scales.fully_connected(init, [40] * 30, 64, 10, 4, generator()), data, args, generator())
        for init in ("he normal", "xavier normal")}
    assert sum(step is not None for step in started["he normal"]) >= 3
    assert started["xavier normal"] == [None] * 4


def test_a_network_is_tested_once_more_at_the_cap():
    *tensors, classes = common.load_data("digits", None)
    data = [tensor.flatten(1) if tensor.ndim > 1 else tensor for tensor in tensors] + [classes]
    found = length_scales.steps_to_start(*length_scales.fully_connected("he normal", [40] * 5, 64, 10, 4, generator()), data,
                                         arguments("--cap", 200, "--every", 300, "--lr", 0.05), generator())
    assert found.count(200) >= 3


def test_means_where_float32_ends_are_not_compared():
    row = dict(part="lengths", quantity="M_d", theory=1.0, mean=1.0, bound_low=None)
    rows = [{**row, "standard_error": error} for error in (0.1, 0.0, None, math.nan, math.inf)]
    assert length_scales.summarise(rows)["means_within_4_standard_errors_of_theory"] == [1, 1]


@pytest.mark.parametrize("labels,share", [([0, 1, 2, 3, 4] * 2, 20), ([0, 1, 2, 3, 4, 5, 6, 7, 7, 7], 30)])
def test_a_start_is_more_than_guessing(capsys, monkeypatch, tmp_path, labels, share):
    """A constant guess is as good as the largest class is large, however many others there are."""
    images, labels = torch.zeros(10, 1, 4, 4, dtype=torch.uint8), torch.tensor(labels)
    monkeypatch.setattr(common, "load_data", lambda *_: (images, labels, images, labels, 10))
    with pytest.raises(SystemExit):
        length_scales.main(["--parts", "start", "--start-depths", "2", "--cap", "1", "--out", str(tmp_path / "a")])
    error = capsys.readouterr().err
    assert f"{share} % of the images" in error and error.count("\n") == 1


def test_a_network_that_diverged_has_not_started():
    images, _, _, _ = random_images()
    zeros = torch.zeros(200, dtype=torch.int64)
    found = length_scales.steps_to_start([torch.full((2, 1, 1), math.nan)], lambda p, x: p[0] + torch.zeros(2, 10, x.shape[2]),
                                         [images, zeros, images, zeros, 10], arguments("--cap", 1), generator())
    assert found == [None, None]


# ------------------------------------------------------------------------------------------------------------ the script

QUICK = ("--draws", 20, "--seeds", 2, "--cap", 20, "--depths", 3, 5, "--start-depths", 3, 5,
         "--modules", 1, 2, "--inits", "he normal", "pytorch")


def test_script_resume_and_plot_only(run, tmp_path):
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    assert run("length_scales.py", *QUICK, "--out", whole).returncode == 0
    assert {"figure1.png", "figure2.png", "fm2.png", "metrics.csv", "summary.json", "config.json"} <= {
        path.name for path in whole.iterdir()}
    assert run("length_scales.py", *QUICK, "--parts", "lengths", "--out", parts).returncode == 0
    first = (parts / "metrics.csv").read_text().splitlines()
    done = run("length_scales.py", *QUICK, "--parts", "residual", "--out", parts, "--resume")   # the lengths are left out
    assert done.returncode == 0 and not (parts / "figure1.png").exists() and "figure1" not in done.stdout
    done = run("length_scales.py", *QUICK, "--out", parts, "--resume")
    assert done.returncode == 0, done.stderr
    rows = [length_scales.read_rows(out) for out in (whole, parts)]
    assert len(first) == 5 and len(rows[0]) == 4 + 4 + 18 + 16
    assert rows[0] == rows[1]
    assert json.loads((whole / "summary.json").read_text())["residual_means_between_the_bounds"][1] == 8
    before = (whole / "figure1.png").read_bytes()
    assert run("length_scales.py", "--plot-only", whole).returncode == 0
    assert (whole / "figure1.png").read_bytes() == before


@pytest.mark.parametrize("given,complaint", [
    (["--parts", "length"], "--parts"), (["--inits", "he"], "'he normal'"), (["--depths", 0], "--depths"),
    (["--modules", 0], "--modules"), (["--draws", 0], "--draws"), (["--seeds", 0], "--seeds"), (["--cap", 0], "--cap"),
    (["--lr", 0], "--lr"), (["--dataset", "imagenet"], "--dataset"),
])
def test_bad_input_is_one_line_and_exit_2(capsys, given, complaint):
    with pytest.raises(SystemExit) as stopped:
        arguments(*given)
    error = capsys.readouterr().err
    assert stopped.value.code == 2 and complaint in error and error.count("\n") == 1


@pytest.mark.parametrize("share,started", [(20, 0), (19, None)])
def test_a_start_is_the_first_test_with_20_percent_of_the_test_images(share, started):
    """Of networks that always guess class 0 and 9, which no training image has."""
    images, test_labels = torch.zeros(100, 1), (torch.arange(100) >= share).long()
    guess = F.one_hot(torch.tensor([0, 9]), 10)[:, :, None]
    found = length_scales.steps_to_start([torch.zeros(2, 1, 1)], lambda p, x: p[0] + guess * torch.ones(2, 1, x.shape[2]),
                                         [images, torch.ones(100).long(), images, test_labels, 10],
                                         arguments("--cap", 3, "--every", 1), generator())
    assert found == [started, None]


def test_rows_of_known_numbers():
    row = length_scales.mean_row("lengths", "x", 3, "M_d", range(101))
    assert (row["mean"], row["low"], row["high"], row["x"]) == (50, 2.5, 97.5, 3)
    assert row["standard_error"] == pytest.approx(math.sqrt(101 * 102 / 12 / 101))   # variance n (n + 1) / 12 of 1 ... n
    args = arguments("--cap", 200, "--batch-size", 64)
    row = length_scales.start_row("start", "x", 3, [10, None, None], args, [torch.zeros(100), None, torch.zeros(7)], x=0.5)
    assert (row["mean"], row["capped"], row["n"], row["x"]) == (pytest.approx(410 / 3 * 0.64), 2, 3, 0.5)


def test_rank_correlation():
    def rank(x, y):
        rows = [dict(part="variance", quantity="q", x=a, mean=b, high=-b) for a, b in zip(x, y, strict=True)]
        return length_scales.correlation(rows, "variance", "q", "x")

    assert rank([1, 2, 9], [1, 5, 6]) == pytest.approx(1) and rank([1, 2, 9], [3, 2, 1]) == pytest.approx(-1)
    assert rank([1, 2, 3, 4], [7, 7, 8, 9]) == pytest.approx(0.9 ** 0.5)             # ties share their rank
    assert rank([1, 2, 3], [5, 5, 5]) is None is rank([1, 2], [1, 2])


def test_what_is_near_the_theory_and_between_the_bounds():
    row = dict(part="lengths", quantity="M_d", theory=1.0, standard_error=0.1, bound_low=None)
    rows = [{**row, "mean": mean} for mean in (0.65, 1.35, 1.5, 0.5)]
    rows += [{**row, "theory": None, "bound_low": 1.0, "bound_high": 2.0, "mean": mean, "high": 9.0} for mean in (0.9, 1.5, 2.1)]
    found = length_scales.summarise(rows)
    assert found["means_within_4_standard_errors_of_theory"] == [2, 4] and found["residual_means_between_the_bounds"] == [1, 3]


def test_lengths_are_of_the_last_layer_and_drawn_over_what_explains_them():
    data = [*random_images(), 10]
    args = arguments("--parts", "lengths", "--inits", "2x he normal", "--depths", 4, "--draws", 5000, "--cap", 1, "--seeds", 1)
    (init, depth, rows), = length_scales.part_lengths(args, data)
    row, = rows(generator(), init, depth)
    assert row["theory"] == 2 ** 4 and abs(row["mean"] - 16) < 5 * row["standard_error"]
    for part, setting, depth, x in ((length_scales.part_variance, "constant 5", 30, 6), (length_scales.part_residual, "b = 0.5", 2, 0.75)):
        rows = {setting: rows for setting, _, rows in part(args, data)}[setting]
        assert [row["x"] for row in rows(generator(), setting, depth)] == pytest.approx([x, x])
