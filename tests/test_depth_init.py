"""depth_init.py: the scalings, the variances that signal and gradient take from them, and batched training."""

import json
import math

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

import common
import depth_init
from depth_init import scales

KINDS = [("power", 2.0, 0.0), ("power", 1.0, 0.0), ("power", 3.0, 0.0), ("power", 2.0, 0.4), ("log", 2.0, 0.0)]


@pytest.mark.parametrize("function,n,c", KINDS)
@pytest.mark.parametrize("layers", [2, 3, 12, 54, 300])
@pytest.mark.parametrize("variance", [0.5, 1.0, 22.0, 1e6])
@pytest.mark.parametrize("scaling", ["constant", "increasing", "decreasing"])
def test_the_product_is_the_network_variance(function, n, c, layers, variance, scaling):
    s = scales(layers, scaling, variance, function, n, c)
    assert len(s) == layers and (s > 0).all()
    assert math.isclose(np.log(s).sum(), math.log(variance), abs_tol=1e-9)
    if scaling == "increasing":
        assert (np.diff(s[1 if function == "log" else 0:]) > 0).all()
        assert np.array_equal(s[::-1], scales(layers, "decreasing", variance, function, n, c))


def test_the_papers_network():
    """54 layers, V = 22: a third of the layers lies below one (Section 9), the constant scale is V^(1/L)."""
    s = scales(54, "increasing")
    assert (s < 1).sum() == 18
    k = math.exp(math.lgamma(55) / 54) * 22 ** (-2 / 54)
    assert k == pytest.approx(18.70, abs=0.005)
    np.testing.assert_allclose(s, (np.arange(1, 55) / k) ** 0.5)
    assert scales(54, "constant")[0] == pytest.approx(1.0589, abs=5e-5)
    assert (scales(54, "unit", 22) == 1).all()
    log = scales(54, "increasing", function="log")
    np.testing.assert_allclose(log[1:], np.log(np.arange(2, 55)) / math.log(16.27), rtol=1e-4)


@pytest.mark.parametrize("given,reason", [
    ({"variance": 0}, "variance"), ({"variance": -3}, "variance"), ({"variance": math.nan}, "variance"),
    ({"n": 0}, "increase"), ({"n": -1}, "increase"), ({"c": -0.1}, "lifts"), ({"c": math.inf}, "lifts"),
    ({"c": 2.0}, "no k exists"), ({"c": 1.0, "variance": 1.0}, "no k exists"), ({"layers": 1, "function": "log"}, "layer 1"),
    ({"scaling": "up"}, "unit, constant"), ({"n": 0.001}, "differ by more than"),
])
def test_refused_with_the_reason(given, reason):
    with pytest.raises(ValueError, match=reason):
        scales(**{"layers": 54, "scaling": "increasing", **given})


# ------------------------------------------------------------------------------------------------------- initialisation


def variance_near(weight, expected):
    """Within six standard errors; the fourth moment of a normal is 3, of a uniform 1.8 times the squared variance."""
    return abs(weight.double().square().mean() / expected - 1) < 6 * math.sqrt(2 / weight.numel())


@pytest.mark.parametrize("init", depth_init.INITS)
def test_any_model(init):
    model = nn.Sequential(nn.Conv2d(3, 40, 3), nn.BatchNorm2d(40), nn.Conv2d(40, 60, 3, groups=2), nn.Flatten(),
                          nn.Linear(60, 50), nn.Sequential(nn.Linear(50, 30), nn.ReLU()))
    assert depth_init.depth_scaled_init_(model, init, "increasing", 22.0) is model
    s = scales(3, "increasing", 22.0)
    for layer, fan_in, fan_out, scale in ((model[0], 27, 360, s[0]), (model[2], 180, 540, s[1]), (model[4], 60, 50, s[2]),
                                          (model[5][0], 50, 30, 1.0)):
        expected = scale * (2 / fan_in if init.startswith("he") else 2 / (fan_in + fan_out))
        assert variance_near(layer.weight, expected), layer
        assert (layer.bias == 0).all()
        if init.endswith("uniform"):
            assert layer.weight.abs().max() <= math.sqrt(3 * expected) * 1.00001
    with pytest.raises(ValueError, match="at least two"):
        depth_init.depth_scaled_init_(nn.Linear(2, 2))
    with pytest.raises(ValueError, match="init must be one of"):
        depth_init.depth_scaled_init_(model, "he")


def arguments(*given):
    return depth_init.parse_arguments([*map(str, given), "--device", "cpu"])


def test_an_extreme_product_is_met_as_well():
    assert np.log(scales(54, "increasing", 1e30, n=1000.0)).sum() == pytest.approx(math.log(1e30))
    assert np.log(scales(2, "increasing", 1e10, n=1000.0)).sum() == pytest.approx(math.log(1e10))
    assert np.log(scales(54, "increasing", 22.0, n=1e9)).sum() == pytest.approx(math.log(22))


@pytest.mark.parametrize("layers, halvings", [(3, [1, 2]), (5, [2, 4]), (54, [18, 36]), (55, [19, 37])])
def test_images_halve_after_each_third(layers, halvings):
    args = arguments("--layers", layers, "--width", 2, "--seeds", 1, "--network", "conv")
    model = depth_init.Batched(args, 1, 10, ("he normal", "unit", 22.0, "off"))
    assert [i for i, layer in enumerate(model.layers) if layer.stride == (2, 2)] == halvings


def test_the_theory_of_the_figure_is_what_xaviers_variance_does_too():
    args = arguments("--layers", 6, "--width", 200, "--seeds", 40)
    torch.manual_seed(0)
    arm = depth_init.Arm("xavier normal", "increasing", 22.0, "off")
    rows = depth_init.distributions(depth_init.Batched(args, 200, 10, arm), torch.randn(20, 200, 1, 1),
                                    torch.randint(0, 10, (20,)), {}, 0)
    for quantity, end, expected in zip(("activation", "gradient"), (0, -1), depth_init.theory(arm, 6), strict=True):
        found = np.array([row["mean_square"] for row in rows if row["quantity"] == quantity])
        np.testing.assert_allclose(found / found[end], expected, rtol=0.15)


@pytest.mark.parametrize("scaling", depth_init.SCALINGS)
def test_signal_and_gradient_follow_the_products(scaling):
    """Eqs. 6 and 15: E z_l^2 / E z_1^2 = s_2 ... s_l, and for the gradients s_(l+1) ... s_L from the other end."""
    args = arguments("--layers", 6, "--width", 200, "--seeds", 40)
    torch.manual_seed(0)
    arm = ("he normal", scaling, 22.0, "off")
    model = depth_init.Batched(args, 200, 10, arm)
    rows = depth_init.distributions(model, torch.randn(20, 200, 1, 1), torch.randint(0, 10, (20,)), {}, 0)
    s = scales(6, scaling, 22.0)
    for quantity, theory in (("activation", np.cumprod(s) / s[0]), ("gradient", np.cumprod(s[::-1])[::-1] / s)):
        found = np.array([row["mean_square"] for row in rows if row["quantity"] == quantity])
        found /= found[0] if quantity == "activation" else found[-1]
        np.testing.assert_allclose(found, theory, rtol=0.15)
    found = [row["mean_square"] for row in rows if row["quantity"] == "weight"]
    np.testing.assert_allclose(found, s * 2 / 200, rtol=0.02)


def test_quantiles_are_of_all_images():
    """With 30 seeds of 64 units every 24th value was of every eighth image alone, which are black here."""
    args = arguments("--layers", 2, "--seeds", 30)
    x = torch.rand(256, 20, 1, 1) * (torch.arange(256) % 8 > 0).view(-1, 1, 1, 1)
    model = depth_init.Batched(args, 20, 10, ("he normal", "unit", 1.0, "off"))
    row = depth_init.distributions(model, x, torch.randint(0, 10, (256,)), {}, 0)[1]
    exact = model.layers[0](x.flatten(1).t()[None, :, :, None].repeat(1, 30, 1, 1)).flatten().quantile(torch.tensor([0.25, 0.75]))
    assert row["quantity"] == "activation"
    assert [row["q0.25"], row["q0.75"]] == pytest.approx(exact.tolist(), rel=0.05)


# -------------------------------------------------------------------------------------------------------------- training


def test_black_images():
    args = arguments("--layers", 2, "--seeds", 1, "--epochs", 1, "--batch-size", 8)
    images, labels = torch.zeros(16, 1, 8, 8, dtype=torch.uint8), torch.arange(16) % 10
    rows = depth_init.train(args, depth_init.Arm("he normal", "unit", 1.0, "off"), 0.001, (images, labels, images, labels, 10))[0]
    assert all(np.isfinite(row["test_loss"]) for row in rows)


@pytest.mark.parametrize("network,activation,norm", [("fc", "relu", "off"), ("fc", "tanh", "on"), ("conv", "relu", "on")])
def test_a_seed_trains_as_a_network_of_its_own(network, activation, norm):
    """The batched model against nn.Sequential with the same weights, two steps of SGD."""
    args = arguments("--network", network, "--layers", 3, "--width", 6, "--seeds", 3, "--activation", activation)
    channels, size = (20, 1) if network == "fc" else (2, 8)
    model = depth_init.Batched(args, channels, 5, ("he uniform", "increasing", 4.0, norm))
    alone = []
    for seed in range(3):
        parts = []
        for i, layer in enumerate(model.layers):
            conv = nn.Conv2d(layer.in_channels // 3, layer.out_channels // 3, layer.kernel_size, layer.stride, layer.padding)
            conv.weight.data = layer.weight.data.view(3, *conv.weight.shape)[seed].clone()
            conv.bias.data.zero_()
            parts += [nn.AdaptiveAvgPool2d(1), conv] if i == 3 else [conv]
            if i < 3:
                parts += [nn.BatchNorm2d(6) if norm == "on" else nn.Identity(), nn.ReLU() if activation == "relu" else nn.Tanh()]
        alone.append(nn.Sequential(*parts))
    x, y = torch.rand(16, channels, size, size), torch.randint(0, 5, (16,))
    for both in [(model, None)] + [(net, seed) for seed, net in enumerate(alone)]:
        net, seed = both
        optimizer = torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9)
        for _ in range(2):
            loss = depth_init.losses(model, x, y).sum() if seed is None else F.cross_entropy(net(x).flatten(1), y)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    together = model.eval()(x)
    for seed, net in enumerate(alone):
        torch.testing.assert_close(together[:, seed], net.eval()(x).flatten(1), rtol=1e-3, atol=1e-4)


def test_seeds_do_not_depend_on_their_number():
    few, many = (depth_init.Batched(arguments("--layers", 2, "--seeds", seeds), 4, 3, ("he normal", "unit", 1.0, "off"))
                 for seeds in (2, 5))
    for a, b in zip(few.layers, many.layers, strict=True):
        assert torch.equal(a.weight, b.weight[:len(a.weight)])


def test_claims_from_known_accuracies():
    def rows(values):
        return [{"init": init, "scaling": scaling, "variance": 1.0 if scaling == "unit" else 22.0, "batch_norm": norm,
                 "seed": seed, "epoch": 3, "test_accuracy": value + 0.1 * seed}
                for (init, scaling, norm), value in values.items() for seed in range(6)]

    found = depth_init.claims(rows({("he normal", "increasing", "off"): 50.0, ("he normal", "decreasing", "off"): 30.0,
                                    ("he normal", "constant", "off"): 55.0, ("he normal", "increasing", "on"): 60.0,
                                    ("he normal", "unit", "off"): 44.0}))
    verdicts = {(row["claim"], *(row[arm].split(" / ")[1] for arm in ("better", "worse"))):
                (row["holds"], round(row["difference"], 6)) for row in found}
    assert verdicts == {("increasing beats the others", "increasing", "unit"): ("yes", 6.0),
                        ("increasing beats the others", "increasing", "constant"): ("no", -5.0),
                        ("increasing beats the others", "increasing", "decreasing"): ("yes", 20.0),
                        ("decreasing is worse", "unit", "decreasing"): ("yes", 14.0),
                        ("decreasing is worse", "constant", "decreasing"): ("yes", 25.0),
                        ("batch norm mends a high variance", "increasing", "increasing"): ("yes", 10.0)}


def test_batch_norm_is_asked_about_variances_below_1_too():
    rows = [{"init": "he normal", "scaling": scaling, "variance": 1.0 if scaling == "unit" else 0.5, "batch_norm": norm,
             "seed": seed, "epoch": 3, "test_accuracy": 50.0 + seed + 9 * (norm == "on")}
            for scaling in ("unit", "constant") for norm in ("off", "on") for seed in range(4)]
    assert [(row["claim"], row["holds"], row["difference"]) for row in depth_init.claims(rows) if "batch" in row["claim"]] == [
        ("batch norm mends a high variance", "yes", 9.0)]


def test_claims_are_made_at_every_variance():
    rows = [{"init": "he normal", "scaling": scaling, "variance": variance, "batch_norm": "off", "seed": seed, "epoch": 3,
             "test_accuracy": 90.0 + seed} for scaling, variance in (("unit", 1.0), ("increasing", 1.0), ("increasing", 22.0))
            for seed in range(2)]
    better = [claim["better"] for claim in depth_init.claims(rows) if claim["claim"] == "increasing beats the others"]
    assert better == ["he normal / increasing / 1.0 / off", "he normal / increasing / 22.0 / off"]
    assert depth_init.claims(rows[:2]) == []   # unit alone


def test_the_rate_is_chosen_by_training_loss():
    rows = [{"init": "he normal", "scaling": scaling, "variance": 1.0, "batch_norm": "off", "lr": lr, "seed": seed, "epoch": 2,
             "train_loss": loss, "test_accuracy": 100 * lr}
            for scaling, losses in (("unit", {0.1: [2, 2], 0.2: [1, 2], 0.3: [0, math.nan]}), ("constant", {0.1: [1, 1], 0.2: [2, 2]}))
            for lr, values in losses.items() for seed, loss in enumerate(values)]
    kept, others = depth_init.at_best_rate(rows, rows[::2])
    assert {(row["scaling"], row["lr"]) for row in kept} == {("unit", 0.2), ("constant", 0.1)} and len(kept) == 4
    assert others == [row for row in kept if row["seed"] == 0]


@pytest.mark.parametrize("optimizer,normalize", [("adam", ()), ("sgd", ("--normalize",))])
def test_training_is_plain_and_tested_on_the_test_images(optimizer, normalize):
    images, labels, test_images, test_labels, classes = common.load_data("digits", None)
    args, arm = arguments("--layers", 2, "--width", 8, "--seeds", 2, "--epochs", 2, "--batch-size", 500, "--optimizer", optimizer,
                          *normalize), depth_init.Arm("he normal", "unit", 1.0, "off")
    rows, _ = depth_init.train(args, arm, 0.01, [images, labels, test_images, test_labels, classes])
    mean, std = (images.float().mean(), images.float().std()) if normalize else (0, 16)
    x, test = (images - mean) / std, (test_images - mean) / std
    model = depth_init.Batched(args, 64, 10, arm)
    steps = (torch.optim.Adam(model.parameters(), lr=0.01) if optimizer == "adam" else
             torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9))
    for epoch in (1, 2):
        order, seen = torch.randperm(1438, generator=torch.Generator().manual_seed(epoch)), []
        for index in order[:1000].split(500):
            loss = torch.stack([F.cross_entropy(scores, labels[index]) for scores in model(x[index]).unbind(1)])
            steps.zero_grad()
            loss.sum().backward()
            steps.step()
            seen.append(loss.detach())
        for row in (row for row in rows if row["epoch"] == epoch):
            scores = model(test)[:, row["seed"]]
            assert row["train_loss"] == pytest.approx(torch.stack(seen).mean(0)[row["seed"]].item(), rel=1e-3)
            assert row["test_loss"] == pytest.approx(F.cross_entropy(scores, test_labels).item(), rel=1e-3)
            assert row["test_accuracy"] == pytest.approx(100 * (scores.argmax(1) == test_labels).float().mean().item(), abs=0.6)


def test_evaluation_uses_running_statistics():
    model = depth_init.Batched(arguments("--layers", 2, "--seeds", 2), 64, 10, ("he normal", "unit", 1.0, "on"))
    model(torch.rand(50, 64, 1, 1))
    x, y = torch.rand(700, 64, 1, 1) * torch.rand(700, 1, 1, 1), torch.randint(0, 10, (700,))
    loss, accuracy = depth_init.evaluate(model, x, y, lambda x: x)
    assert model.training
    scores = model.eval()(x)
    assert accuracy == pytest.approx((100 * (scores.argmax(2) == y[:, None]).double().mean(0)).tolist(), abs=0.3)
    assert loss == pytest.approx([F.cross_entropy(scores[:, seed], y).item() for seed in range(2)], rel=1e-4)


def final(scaling, *accuracies, init="he normal", variance=22.0):
    return [{"init": init, "scaling": scaling, "variance": variance, "batch_norm": "off", "seed": seed, "epoch": epoch, "lr": lr,
             "train_loss": lr, "test_accuracy": accuracy * (epoch == 3) * (lr == 0.1)}
            for seed, accuracy in enumerate(accuracies) for epoch in (2, 3) for lr in (0.1, 0.2)]


def test_claims_are_paired_intervals_at_the_last_epoch_and_best_rate():
    found = depth_init.summarise(final("increasing", 50.0, 60.0, 90.0) + final("constant", 49.0, 58.0, 87.0)
                                 + final("constant", 40.0, 41.0, 60.0, init="he uniform"))
    claims = {(row["claim"], row["worse"].split(" / ")[0]): row for row in found["claims"]}
    row = claims["increasing beats the others", "he normal"]
    assert [row[key] for key in ("difference", "low", "high")] == pytest.approx(common.interval([1.0, 2.0, 3.0]))
    assert row["holds"] == "not decided" and row["low"] < 0
    assert claims["normal is better than uniform", "he uniform"]["difference"] == pytest.approx((9 + 17 + 27) / 3)
    assert [arm["test_accuracy"] for arm in found["arms"]] == pytest.approx([200 / 3, 194 / 3, 47])


def test_batch_norm_is_asked_about_the_highest_variance():
    rows = [{"init": "he normal", "scaling": "constant", "variance": variance, "batch_norm": norm, "seed": seed, "epoch": 3,
             "test_accuracy": 50.0 + seed + variance * (norm == "on")} for variance in (2.0, 22.0) for norm in ("off", "on")
            for seed in range(4)]
    assert [row["difference"] for row in depth_init.claims(rows) if "batch" in row["claim"]] == [22.0]


# ------------------------------------------------------------------------------------------------------------ the script

QUICK = ("--layers", 3, "--width", 8, "--epochs", 2, "--seeds", 2, "--init", "he normal")


def test_the_theory_is_drawn_where_it_applies(tmp_path, monkeypatch):
    arm = dict(init="he normal", scaling="unit", variance=1.0, seed=0, lr=0.1)
    drawn = []
    monkeypatch.setattr(depth_init, "theory", lambda arm, *_: drawn.append(arm.batch_norm) or (np.ones(2), np.ones(2)))
    for network, activation, expected in (("fc", "relu", ["off"] * 2), ("conv", "relu", []), ("fc", "tanh", [])):
        rows = [dict(arm, batch_norm=norm, epoch=1, test_accuracy=10.0, train_loss=1.0, lr=lr) for norm in ("off", "on")
                for lr in (0.3, 0.1)]    # alike in six digits: the rate is that of layers.csv
        layers = [dict(arm, batch_norm=norm, epoch=0, layer=layer, quantity=quantity, mean_square=1.0,
                       **{f"q{q}": 0.0 for q in (0.01, 0.25, 0.75, 0.99)})
                  for norm in ("off", "on") for layer in (1, 2) for quantity in ("activation", "gradient", "weight")]
        drawn.clear()
        depth_init.draw_figures(rows, layers, dict(network=network, activation=activation, function="log", n=1.0, c=0.0),
                                tmp_path)
        assert drawn == expected


def test_script_resume_and_plot_only(run, tmp_path):
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    assert run("depth_init.py", *QUICK, "--scaling", "unit", "increasing", "--out", whole).returncode == 0
    assert run("depth_init.py", *QUICK, "--scaling", "unit", "--out", parts).returncode == 0
    done = run("depth_init.py", *QUICK, "--scaling", "unit", "increasing", "--out", parts, "--resume")
    assert done.returncode == 0, done.stderr
    for name in ("metrics.csv", "layers.csv", "summary.json"):
        assert (whole / name).read_bytes() == (parts / name).read_bytes()
    assert len((whole / "metrics.csv").read_text().splitlines()[1:]) == 2 * 2 * 3
    assert len((whole / "layers.csv").read_text().splitlines()[1:]) == 2 * 3 * 3 * 3
    assert len(json.loads((whole / "summary.json").read_text())["arms"]) == 2
    before = [(whole / name).read_bytes() for name in ("curves.png", "layers.png")]
    assert run("depth_init.py", "--plot-only", whole).returncode == 0
    assert [(whole / name).read_bytes() for name in ("curves.png", "layers.png")] == before


def test_torchrun_gives_the_same_files(run, tmp_path):
    arguments = (*QUICK, "--device", "cpu", "--scaling", "unit", "increasing", "--lr", 0.001, 0.003)
    assert run("depth_init.py", *arguments, "--out", tmp_path / "one").returncode == 0
    done = run("depth_init.py", *arguments, "--out", tmp_path / "two", processes=2)
    assert done.returncode == 0, done.stderr
    for name in ("metrics.csv", "layers.csv", "summary.json"):
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes()


def test_divergence_keeps_the_rows(run, tmp_path):
    done = run("depth_init.py", *QUICK, "--scaling", "unit", "--lr", 1e20, "--out", tmp_path / "a")
    assert done.returncode == 3 and "diverged" in done.stderr and (tmp_path / "a" / "metrics.csv").exists(), done.stderr


def test_what_diverges_in_the_last_step_is_no_accuracy(run, tmp_path):
    """The training loss is of before the step, and NaN would be an image of class 0."""
    done = run("depth_init.py", *QUICK, "--scaling", "unit", "constant", "--lr", 1e20, 0.1, "--optimizer", "sgd", "--epochs", 1,
               "--batch-size", 1438, "--out", tmp_path / "a")
    rows = depth_init.common.read_csv(tmp_path / "a" / "metrics.csv", ("init", "scaling", "batch_norm"))
    gone = {(row["scaling"], row["lr"]) for row in rows if row["test_accuracy"] is None}
    assert gone >= {("unit", 1e20), ("constant", 1e20)} and all(math.isfinite(row["train_loss"]) for row in rows if row["epoch"])
    left = json.loads((tmp_path / "a" / "summary.json").read_text())["arms"]
    assert done.returncode == 3 * (len(gone) > 2) and [arm["lr"] for arm in left] == [0.1] * (4 - len(gone))


@pytest.mark.parametrize("given,complaint", [
    (["--batch-norm", "off", "on", "--batch-size", 1], "--batch-norm on"),
    (["--init", "he"], "--init"), (["--scaling", "up"], "--scaling"), (["--variance", 0], "--variance"),
    (["--n", 0], "increase"), (["--c", 2], "no k exists"), (["--layers", 0], "--layers"), (["--seeds", 0], "--seeds"),
    (["--lr", 0], "--lr"), (["--epochs", 0], "--epochs"), (["--variance", 3, 3], "--variance"),
    (["--variance", 22, 22.0000001], "--variance"),   # which metrics.csv could not tell apart
])
def test_bad_arguments_are_one_line_and_exit_2(capsys, given, complaint):
    with pytest.raises(SystemExit) as stopped:
        arguments(*given)
    error = capsys.readouterr().err
    assert stopped.value.code == 2 and complaint in error and error.count("\n") == 1


def test_digits_train():
    *tensors, classes = common.load_data("digits", None)
    args = arguments("--layers", 4, "--epochs", 4, "--seeds", 2)
    rows, _ = depth_init.train(args, depth_init.Arm("he normal", "unit", 1.0, "off"), 0.003, [*tensors, classes])
    assert min(row["test_accuracy"] for row in rows if row["epoch"] == 4) > 70
