"""symmetry.py: the fit on made-up growth, the spread of known weights, equal arms, and the script from end to end."""

import itertools
import json
import math
import statistics

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

import common
import symmetry


def arguments(*given):
    return symmetry.parse_arguments([*map(str, given)])


def digits():
    *tensors, classes = common.load_data("digits", None)
    return [*tensors, classes]


def train(convert, *given, seed=0, p=0):
    """The rows of a run."""
    return run_whole(convert, *given, seed=seed, p=p)[0]


def run_whole(convert, *given, seed=0, p=0):
    torch.use_deterministic_algorithms(True)
    return symmetry.one_run(arguments(*given), digits(), seed, p, convert)


def test_growth_of_an_exponential():
    steps = np.arange(1, 200)
    spreads = np.where(steps < 4, 0, 1e-8 * np.exp(0.11 * (steps - 4.0)))
    found = symmetry.growth(steps, spreads)
    assert (found["first_step"], found["first_spread"]) == (4, 1e-8)
    assert found["rate"] == pytest.approx(0.11, rel=1e-6) and found["r2"] == pytest.approx(1)
    assert found["fit_from"] == 4 + math.ceil(math.log(3) / 0.11) and found["fit_to"] == 4 + math.floor(math.log(1e5) / 0.11)
    assert found["passed"] == 4 + math.ceil(math.log(1e6) / 0.11)
    assert found["predicted"] == pytest.approx(4 + math.log(1e6) / 0.11, rel=1e-5)


def test_growth_after_a_plateau_with_noise():
    """The fit starts after the last spread below three times the first; its error is that of least squares."""
    random, steps = np.random.default_rng(0), np.arange(1, 300)
    error, rates = 0.1, []
    for _ in range(200):
        y = np.maximum(math.log(1e-7), math.log(1e-7) + 0.08 * (steps - 50)) + error * random.standard_normal(len(steps))
        found = symmetry.growth(steps, np.minimum(np.exp(y), 0.5))
        assert 55 < found["fit_from"] < 80 and 0.9 < found["r2"] < 1
        rates.append(found["rate"])
    points = found["fit_to"] - found["fit_from"] + 1
    deviation = error * math.sqrt(12 / points ** 3)
    assert abs(np.mean(rates) - 0.08) < 0.001 and 0.6 * deviation < np.std(rates) < 1.6 * deviation


def test_a_leap_ends_the_fit():
    steps = np.arange(1, 200)
    spreads = 1e-8 * np.exp(0.1 * steps) * np.where(steps < 80, 1, 20)
    found = symmetry.growth(steps, spreads)
    assert found["leap"] == 80 and found["fit_to"] == 79 and found["rate"] == pytest.approx(0.1)
    assert found["predicted"] - found["passed"] == pytest.approx(math.log(20) / 0.1, abs=1)
    assert symmetry.growth(steps, 1e-8 * np.exp(0.1 * steps) * np.where(steps < 80, 1, 5))["leap"] is None


def test_a_leap_at_either_end_of_the_fit_is_seen():
    steps = np.arange(1, 200)
    over_the_end = symmetry.growth(steps, 1e-8 * np.exp(0.1 * steps) * np.where(steps < 100, 1, 1e4))
    assert over_the_end["leap"] == 100 and over_the_end["fit_to"] == 99 and over_the_end["rate"] == pytest.approx(0.1)
    at_once = symmetry.growth(steps, 1e-8 * np.exp(0.01 * steps) * np.where(steps < 80, 1, 20))
    assert at_once["leap"] == 80 and at_once["rate"] is None
    went_away = symmetry.growth(steps, np.where(steps == 2, 0, 1e-8 * np.exp(0.1 * steps)))   # and came again: no leap
    assert went_away["first_step"] == 1 and went_away["leap"] is None and went_away["rate"] == pytest.approx(0.1)


def test_leaps_are_counted_with_and_without_mixed_relus():
    def run(seed, *steps):
        return [{"seed": seed, "step": step, "spread": spread, "mixed": mixed} for step, (spread, mixed) in
                enumerate(steps, 1)]

    rows = (run(0, (0.0, 1), (1.1e-8, 0), (2e-8, 0), (4e-7, 3), (5e-7, 1), (1e-2, 0), (0.5, 9)) +
            run(1, (2e-9, 0), (2e-9, 0)) + run(2, (2e-9, 0)))   # a new run is no step from the last one's end
    assert symmetry.leaps(rows) == {"1e-9": {"mixed": [0, 0], "alike": [1, 0]}, "1e-8": {"mixed": [1, 1], "alike": [1, 0]},
                                    "1e-7": {"mixed": [1, 0], "alike": [1, 1]}}
    assert symmetry.leaps([]) == {}


def test_growth_where_there_is_none():
    assert set(symmetry.growth([1, 2, 3], [0.0, 0.0, 0.0]).values()) == {None}
    found = symmetry.growth([1, 2, 3, 4], [0.0, 1e-9, 1e-9, 0.0])   # it went away again
    assert found["first_step"] == 2 and found["rate"] is None is found["passed"]
    found = symmetry.growth([1, 2, 3], [0.0, 1e-3, 0.5])             # too fast to be fitted
    assert found["passed"] == 3 and found["rate"] is None
    found = symmetry.growth(range(50), np.exp(-0.1 * np.arange(50)) * 1e-5)   # it shrinks
    assert found["predicted"] is None
    assert symmetry.growth(range(20), [1e-9] + [5e-9] * 19)["rate"] is None   # it stays


def test_spread_of_known_weights():
    weight = torch.tensor([[3.0, 0.0], [1.0, 0.0]]).view(2, 1, 1, 2)   # mean (2, 0): off by 1 each
    assert symmetry.spread(weight) == pytest.approx(math.sqrt(2 / 10))
    for channels in (3, 16, 48):   # equal to the bit, whatever the value
        assert symmetry.spread(torch.rand(1, 5, 3, 3).expand(channels, -1, -1, -1)) == 0
    assert symmetry.spread(torch.zeros(4, 2, 3, 3)) == 0
    one_ulp = torch.ones(16, 4, 3, 3)
    one_ulp[0, 0, 0, 0] += 2.0 ** -23
    assert symmetry.spread(one_ulp) == pytest.approx(2.0 ** -23 * math.sqrt(15 / 16 / (16 * 36)), rel=1e-6)


def test_interval():
    values = [1.0, 2.0, 4.0, 5.0]
    assert common.interval([*values, None]) == pytest.approx([3, 3 - 3.18 * math.sqrt(10 / 3) / 2,
                                                                3 + 3.18 * math.sqrt(10 / 3) / 2])
    assert common.interval([2.0]) == [2.0, None, None] and common.interval([None]) == [None] * 3
    random, held = np.random.default_rng(0), 0
    for _ in range(2000):
        _, low, high = common.interval(list(random.standard_normal(12)))
        held += low < 0 < high
    assert abs(held / 2000 - 0.95) < 5 * math.sqrt(0.05 * 0.95 / 2000)


def test_law_and_differences():
    """Made-up arms whose time follows from their size: the rate comes back, whatever they have in common."""
    def rows(arm, seed, size, rate):
        return [{"part": "noise", "arm": arm, "seed": seed, "step": step, "spread": size * math.exp(rate * step), "loss": 1.0,
                 "mixed": 0} for step in range(1, 400)]

    def end(arm, seed):
        return {"part": "noise", "arm": arm, "seed": seed, "stem": 0.0, "conv": 10.0 ** -seed if arm == "a" else 0.0}

    seeds = {0: 0.1, 1: 0.12, 2: 0.09}
    made = [("a", 1e-12, 0), ("b", 1e-6, 0), ("order, G = 8", 1e-7, 0), (symmetry.HARDWARE, 1e-8, 0.01)]
    found = symmetry.summarise([row for seed, rate in seeds.items() for arm, size, more in made
                                for row in rows(arm, seed, size, rate + more)],
                               [end(arm, seed) for seed in seeds for arm, _, _ in made])
    a = found["arms"][0]
    assert a["broken"] == a["parted"] == 3 and a["rate"][0] == pytest.approx(np.mean(list(seeds.values())))
    assert abs(a["predicted_minus_passed"][0]) < 1 and a["first_spread"][0] == pytest.approx(1e-12, rel=0.2)
    assert a["layers"]["conv"]["parted"] == 3 and a["layers"]["conv"]["spread"][0] == pytest.approx(0.1)
    assert a["layers"]["stem"] == {"parted": 0, "spread": [None] * 3} == found["arms"][1]["layers"]["conv"]
    line = found["law"]["all noises"]
    assert line["rate"][0] == pytest.approx(np.mean(list(seeds.values())), rel=0.08) and min(line["r2"]) > 0.97
    assert found["minus order, G = 8"][symmetry.HARDWARE]["rate"] == pytest.approx([0.01] * 3)
    assert found["minus order, G = 8"]["order, G = 8"]["passed"] == [0, 0, 0]


def arm(name, *runs):
    """With runs of (first spread, steps to 1 %)."""
    return {"arm": name, "part": "noise", "runs": {seed: {"first_step": 2, "first_spread": spread, "passed": 2 + steps}
                                                   for seed, (spread, steps) in enumerate(runs)}}


def test_the_law_averages_slopes():
    """Of which one near 0 has no say: the mean of 10 steps, 10 and 0.01 is 6.67, that of the rates 33."""
    slopes = (10, 10, 0.01)
    line = symmetry.law([arm(str(size), *((0.01 * math.exp(-size), slope * size) for slope in slopes)) for size in (8, 9, 12)])
    assert line["steps"][0] == pytest.approx(20.01 / 3) and line["rate"][0] == pytest.approx(3 / 20.01)
    assert line["steps"][1] < 0 and line["rate"][2] is None and line["rate"][1] == pytest.approx(1 / line["steps"][2])
    assert symmetry.law([])["rate"] == [None] * 3


def test_the_law_is_told_without_dropout_too(run, tmp_path):
    done = run("symmetry.py", *QUICK, "--steps", 30, "--lr", 0.4, "--parts", "noise", "--dropout", 0.1, 0.2, 0.3, "--out", tmp_path / "a")
    law = json.loads((tmp_path / "a" / "summary.json").read_text())["law"]
    assert len(law["all noises"]["r2"]) == 2 and law["without dropout"]["r2"] == []
    assert "all noises of a seed" in done.stdout and "without dropout of a seed" not in done.stdout


def test_the_model_starts_as_constnet():
    import constnet

    mine, theirs = symmetry.Constnet(3, 10, 6), constnet.Constnet(3, 10, 6)
    constnet.initialise(theirs, "abcd")
    state = theirs.state_dict()
    assert list(mine.state_dict()) == list(state)
    assert all(torch.equal(value, state[name]) for name, value in mine.state_dict().items())
    for model in (mine, theirs):   # and computes what it computes
        torch.manual_seed(0)
        for parameter in model.parameters():
            torch.nn.init.normal_(parameter, std=0.1)
    x = torch.randn(4, 3, 8, 8)
    torch.testing.assert_close(mine(x), theirs(x))


QUIET = [dict(order="shuffled", splits=2), dict(order="shuffled", splits=1), dict(noise="gaussian", ulps=0),
         dict(order="shuffled", steps=(50, 60))]


@pytest.mark.parametrize("convert", QUIET, ids=str)
def test_arms_without_noise_never_break_and_are_equal(convert):
    rows = train(convert, "--steps", 12)
    assert len(rows) == 12 and all(value == mixed == 0 for _, value, _, mixed in rows)
    assert rows == train({"splits": convert.get("splits", 8)}, "--steps", 12)


@pytest.mark.parametrize("convert,p", [(dict(order="shuffled"), 0), (dict(noise="gaussian", ulps=0.25), 0),
                                       (dict(noise="stochastic"), 0), ({}, 0.01),
                                       (dict(order="shuffled", layers="stages.2.1.conv", steps=(3, 4)), 0)], ids=str)
def test_noise_parts_the_channels_and_repeats(convert, p):
    rows = train(convert, "--steps", 8, p=p)
    assert rows[0][1] == 0 and rows[-1][1] > 0 and rows == train(convert, "--steps", 8, p=p)
    assert rows != train(convert, "--steps", 8, p=p, seed=1)
    quiet = train({}, "--steps", 8)
    assert rows[0] == quiet[0]                       # the same batches and weights at the start
    if "steps" in convert:
        assert rows[:3] == quiet[:3] and rows[4][1] > 0   # or a step later: momentum keeps what a weight's rounding hides
        assert any(train(convert, "--steps", 4, seed=seed)[3][1] > 0 for seed in range(3))


def test_mixed_counts_the_relus_that_are_on_in_some_channels_alone():
    """With dropout the channels part at once; counted here place by place from the inputs themselves."""
    rows, inputs = train({}, "--steps", 10, p=0.3), []
    expected, hook = [], torch.nn.modules.module.register_module_forward_pre_hook(
        lambda module, given: inputs.append(given[0].detach().clone()) if isinstance(module, torch.nn.ReLU) else None)
    try:
        train({}, "--steps", 10, p=0.3)
    finally:
        hook.remove()
    for step in range(len(rows)):
        count = 0
        for x in inputs[7 * step:7 * step + 7]:        # six blocks, and the one before the head
            by_place = x.transpose(0, 1).flatten(1).T.tolist()
            count += sum(len({value > 0 for value in place}) == 2 for place in by_place)
        expected.append(count)
    assert [mixed for *_, mixed in rows] == expected and expected[0] == 0 < expected[-1]


@pytest.mark.parametrize("layer,stages", [("stem", "0"), ("stages.0.1.conv", "0"), ("stages.1.0.conv", "01"),
                                          ("stages.1.1.conv", "1"), ("stages.2.0.conv", "12"), ("head", "2")])
def test_noise_in_one_layer_parts_no_stage_that_it_does_not_touch(layer, stages):
    """A stage's channels are copies of one another, to the bit, until weights from or to them differ."""
    spreads = [*run_whole(dict(order="shuffled", layers=layer), "--steps", 30)[1].values()]
    of_stage = {"0": spreads[:3], "1": spreads[3:6], "2": spreads[6:]}     # with the stem and the shortcuts
    assert [stage for stage, values in of_stage.items() if any(values)] == list(stages)


def test_the_seed_is_the_noises_too():
    noise = dict(noise="gaussian", ulps=0.25)
    assert train(noise, "--steps", 3, seed=1) == train({**noise, "seed": 1}, "--steps", 3, seed=1)
    assert train(noise, "--steps", 3, seed=1) != train({**noise, "seed": 0}, "--steps", 3, seed=1)


def test_a_run_ends_where_symmetry_is_broken():
    rows = train({}, "--steps", 60, p=0.1)
    assert len(rows) < 60 and rows[-1][1] > symmetry.END >= rows[-2][1]


# ------------------------------------------------------------------------------------------------------------ the script

QUICK = ("--blocks", 3, "--steps", 6, "--seeds", 2, "--splits", 2, 8, "--gaussian", -1, "--bit-steps", 1, "--windows", "1:3")


def test_script_resume_and_plot_only(run, tmp_path):
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    done = run("symmetry.py", *QUICK, "--parts", "layers", "windows", "--out", whole)
    assert done.returncode == 0 and "stages.2.0.shortcut" in done.stdout, done.stderr
    assert {"spread.png", "broken.png", "layers.png", "metrics.csv", "layers.csv", "summary.json",
            "config.json"} <= {p.name for p in whole.iterdir()}
    assert run("symmetry.py", *QUICK, "--parts", "windows", "--out", parts).returncode == 0
    (parts / "done" / "windows, 1:3, 1.json").unlink()             # as after a kill
    assert run("symmetry.py", *QUICK, "--parts", "layers", "windows", "--out", parts, "--resume").returncode == 0
    for name in ("metrics.csv", "layers.csv", "summary.json"):
        assert (whole / name).read_bytes() == (parts / name).read_bytes()
    made = json.loads(json.dumps(symmetry.summarise(*symmetry.read_rows(whole))))   # from its files again
    assert made == json.loads((whole / "summary.json").read_text())
    figures = {name: (whole / name).read_bytes() for name in ("spread.png", "layers.png")}
    assert run("symmetry.py", "--plot-only", whole).returncode == 0
    assert all((whole / name).read_bytes() == before for name, before in figures.items())
    assert run("symmetry.py", *QUICK[:-4], "--lr", 0.1, "--out", parts, "--resume").returncode == 2


def test_script_noise_part_and_two_processes(run, tmp_path):
    """Two processes write what one writes, but for hardware order, which differs from run to run."""
    rows, racing = [], {symmetry.HARDWARE, symmetry.RECORDED}
    for processes in (1, 2):
        out = tmp_path / str(processes)
        done = run("symmetry.py", *QUICK, "--device", "cpu", "--parts", "noise", "--out", out, processes=processes)
        assert done.returncode == 0, done.stderr
        rows.append([row for row in common.read_csv(out / "metrics.csv", text=("part", "arm")) if row["arm"] not in racing])
    assert rows[0] == rows[1] and len(rows[0]) == 6 * 2 * 6
    arms = {arm["arm"]: arm for arm in json.loads((tmp_path / "1" / "summary.json").read_text())["arms"]}
    assert arms["order, G = 2"]["parted"] == 0 and arms["order, G = 8"]["parted"] == arms["Gaussian, 2^-1 ulp"]["parted"] == 2
    assert racing < arms.keys() and "one bit at step 1" in arms and "dropout 0.01" in arms


def test_a_replay_that_differs_is_an_error(monkeypatch, capsys):
    real, runs = symmetry.train, iter((0, 1))
    monkeypatch.setattr(symmetry, "train", lambda *given: [next(runs), *real(*given)])
    with pytest.raises(SystemExit) as stop:
        train(dict(order="arrival"), "--steps", 1)
    assert stop.value.code == 2 and "replay" in capsys.readouterr().err


def test_divergence_is_exit_3_and_keeps_the_metrics(run, tmp_path):
    done = run("symmetry.py", *QUICK, "--parts", "windows", "--lr", 1e30, "--out", tmp_path / "a")
    assert done.returncode == 3 and "diverged" in done.stderr and "Traceback" not in done.stderr
    assert (tmp_path / "a" / "metrics.csv").exists()
    last = run("symmetry.py", "--parts", "windows", "--windows", "0:1", "--lr", 1e30, "--steps", 2, "--out", tmp_path / "b")
    assert last.returncode == 3, last.stderr


def test_a_recorded_run_that_diverges_is_replayed_all_the_same():
    assert math.isnan(train(dict(order="arrival"), "--lr", 1e30, "--steps", 20)[-1][1])   # the spread


@pytest.mark.parametrize("given,complaint", [
    (["--splits", 3, 3], "different"), (["--windows", "0:1", "0:1"], "different"),
    (["--dropout", 0.01, 0.010000001], "different"),
    (["--batch-size", 7, "--splits", 2], "--batch-size"), (["--parts", "noises"], "--parts"), (["--splits", 0], "--splits"), (["--splits", 65], "--splits"),
    (["--gaussian", 40], "--gaussian"), (["--bit-steps", -1], "--bit-steps"), (["--bit-layer", "x"], "stages.1.0.conv"),
    (["--dropout", 1], "--dropout"), (["--windows", "3"], "--windows"), (["--windows", "3:3"], "--windows"),
    (["--blocks", 4], "--blocks"), (["--seeds", 0], "--seeds"), (["--steps", 0], "--steps"), (["--lr", "nan"], "--lr"),
    (["--lr", 1e39], "--lr"),
    (["--dataset", "imagenet"], "--dataset"),
])
def test_bad_input_is_one_line_and_exit_2(capsys, given, complaint):
    with pytest.raises(SystemExit) as stopped:
        arguments(*given)
    error = capsys.readouterr().err
    assert stopped.value.code == 2 and complaint in error and error.count("\n") == 1


def test_interval_has_students_quantiles():
    for freedom in range(1, 30):
        values = list(range(freedom + 1))
        mean, _, high = common.interval(values)
        end = (high - mean) / (statistics.stdev(values) / math.sqrt(len(values)))
        x, scale = np.linspace(-end, end, 100_001), math.gamma((freedom + 1) / 2) / math.gamma(freedom / 2)
        density = scale / math.sqrt(freedom * math.pi) * (1 + x * x / freedom) ** (-(freedom + 1) / 2)
        assert density.mean() * 2 * end == pytest.approx(0.95, abs=1e-3), freedom


def test_the_law_counts_from_the_first_spread_over_the_noises_that_passed():
    arms = [arm(str(size), (0.01 * math.exp(-size), 10 * size)) for size in (8, 9, 12)]
    arms[1]["runs"][0].update(first_step=32, passed=32 + 90)           # parted later: what counts is the time from there
    more = [arm("censored", (1e-12, 0)), {**arm("layer", (1e-8, 999)), "part": "layers"}]
    more[0]["runs"][0]["passed"] = None
    line = symmetry.law(arms + more)
    assert line["steps"][0] == pytest.approx(10) and line["r2"] == pytest.approx([1])
    assert symmetry.law(arms[:2])["r2"] == []                          # two points are always on a line
    assert symmetry.law([arm(str(size), (0.01 * math.exp(-size), 10)) for size in (8, 9, 12)])["r2"] == [0]


def test_a_run_that_never_passed_is_in_no_mean_of_its_time():
    rows = [{"part": "noise", "arm": "a", "seed": seed, "step": step, "spread": 1e-9 * math.exp(rate * step), "mixed": 0}
            for seed, rate in enumerate((0.2, 0.09)) for step in range(1, 120)]
    ends = [{"part": "noise", "arm": "a", "seed": seed, "stem": 0.1} for seed in range(2)]
    found, = symmetry.summarise(rows, ends)["arms"]
    runs = found["runs"]
    assert runs[1]["predicted"] > 119 and runs[1]["passed"] is None and (found["broken"], found["parted"]) == (1, 2)
    assert found["passed"] == [runs[0]["passed"], None, None] and found["predicted"] == [runs[0]["predicted"], None, None]
    assert found["rate"][0] == pytest.approx((0.2 + 0.09) / 2)


@pytest.mark.parametrize("points", [symmetry.POINTS - 1, symmetry.POINTS])
def test_a_fit_takes_points(points):
    found = symmetry.growth(range(1, points + 3), [1e-8, *(4e-8 * 2.0 ** i for i in range(points)), 0.5])
    assert found["rate"] == (pytest.approx(math.log(2)) if points == symmetry.POINTS else None)


def test_training_is_plain_sgd():
    rows, (images, labels, *_) = train({}, "--steps", 7, "--batch-size", 500, seed=3, p=0.1), digits()
    x, model = (images.float() - images.float().mean()) / images.float().std(), symmetry.Constnet(1, 10, 6)
    batches, masks = torch.Generator().manual_seed(common.seed_of(3, "batches")), torch.Generator().manual_seed(3)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.2, momentum=0.9, weight_decay=5e-4)
    epochs = [torch.randperm(1438, generator=batches).split(500)[:2] for _ in range(4)]
    for step, chosen in enumerate(itertools.chain(*epochs)):
        scores = model(x[chosen], lambda x: x * (torch.rand(x.shape, generator=masks) >= 0.1) / 0.9)
        loss = F.cross_entropy(scores, labels[chosen])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        spread = max(symmetry.spread(module.weight).item() for module in model.modules() if isinstance(module, nn.Conv2d))
        if step < len(rows):
            assert rows[step][1:3] == pytest.approx([spread, loss.item()], rel=1e-3), step
    assert len(rows) > 4
