"""bit_runs.py: the runs test against enumeration and a fair coin, the bits of float32, and what the tables count."""

import itertools
import json
import math
import os
import struct

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torchvision import models

import bit_runs


def runs(bits):
    return 1 + sum(a != b for a, b in itertools.pairwise(bits))


@pytest.mark.parametrize("n", [2, 3, 5, 9, 12])
def test_mean_variance_and_p_value_against_enumeration(n):
    """All orders of the bits, one by one."""
    for ones in range(1, n):
        everything = [runs([i in chosen for i in range(n)]) for chosen in itertools.combinations(range(n), ones)]
        mean = sum(everything) / len(everything)
        deviation = math.sqrt(sum((r - mean) ** 2 for r in everything) / len(everything))
        for seen in set(everything):
            bits = next(bits for bits in itertools.product((0, 1), repeat=n) if sum(bits) == ones and runs(bits) == seen)
            (counted, found, z, p), = bit_runs.runs_test(torch.tensor([bits]))
            assert (counted, found) == (ones, seen)
            assert z == pytest.approx((seen - mean) / deviation if deviation else 0, abs=1e-12)
            as_far = sum(abs(r - mean) >= abs(seen - mean) - 1e-9 for r in everything)
            assert p == pytest.approx(as_far / len(everything))


def test_nothing_to_test():
    assert bit_runs.runs_test(torch.zeros(1, 5, dtype=torch.int32)) == [(0, 1, None, None)]
    assert bit_runs.runs_test(torch.ones(1, 5, dtype=torch.int32)) == [(5, 1, None, None)]
    assert bit_runs.runs_test(torch.ones(1, 1, dtype=torch.int32)) == [(1, 1, None, None)]
    assert bit_runs.runs_test(torch.tensor([[0, 1]])) == [(1, 2, 0.0, 1.0)]


@pytest.mark.parametrize("probability", [0.5, 0.1])
def test_z_of_a_coin_is_standard_normal(probability):
    count = 4000
    bits = (torch.rand(count, 1000, generator=torch.Generator().manual_seed(1)) < probability).int()
    z, p = (torch.tensor(column) for column in list(zip(*bit_runs.runs_test(bits), strict=True))[2:])
    assert abs(z.mean()) < 5 / math.sqrt(count)                       # five standard errors
    assert abs(z.var() - 1) < 5 * math.sqrt(2 / count)
    for level in (0.01, 0.05, 0.5):
        assert abs((p < level).float().mean() - level) < 5 * math.sqrt(level * (1 - level) / count) + 0.005


def test_a_long_run_and_an_alternation_are_both_found():
    blocks, stripes = torch.tensor([[0] * 500 + [1] * 500]), torch.tensor([[0, 1] * 500])
    (_, _, low, p), (_, _, high, q) = *bit_runs.runs_test(blocks), *bit_runs.runs_test(stripes)
    assert low < -30 and high > 30 and p < 1e-200 and q < 1e-200


def test_bits_of_floats():
    values = [1.0, -2.5, 3e-41, math.inf]
    bits = bit_runs.bits_of(torch.tensor(values))
    for i, value in enumerate(values):
        word, = struct.unpack("<I", struct.pack("<f", value))
        assert [int(b) for b in bits[:, i]] == [word >> k & 1 for k in range(32)]


def test_layer_types():
    class Odd(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.norm, self.plain = nn.Conv2d(2, 3, 3), nn.BatchNorm2d(3), nn.LayerNorm(3)
            self.head, self.half = nn.Linear(3, 4), nn.Linear(3, 4).half()
            self.scale = nn.Parameter(torch.ones(3))

    state = {**Odd().state_dict(), "bias": torch.ones(3), "normed.bias": torch.ones(3), "sparse.weight": torch.eye(3).to_sparse(),
             "meta.weight": torch.ones(3, 3, device="meta")}   # a bias alone has no kind, the last two have no bits
    kinds = {name: kind for name, kind, _ in bit_runs.layers_of(state)}
    assert kinds == {"conv.weight": "convolution weight", "conv.bias": "convolution bias",
                     "norm.weight": "batch norm weight", "norm.bias": "batch norm bias",
                     "head.weight": "fully connected weight", "head.bias": "fully connected bias"}
    rows = bit_runs.layer_rows(Odd().state_dict(), arm="x", seed=0)
    assert len(rows) == 6 * 32
    ones = [row for row in rows if row["layer"] == "norm.weight"]   # all weights 1.0: every bit is constant
    assert all(row["z"] is None and row["ones"] in (0, 3) for row in ones)


def table_row(rows, kind, group):
    row, = [row for row in bit_runs.table_3(rows) if (row["type"], row["bits"]) == (kind, group)]
    return row


def test_table_3_takes_the_largest_and_corrects_for_the_number_of_tests():
    rows = [{"arm": "x", "seed": 0, "layer": layer, "type": "convolution weight", "bit": bit, "z": z, "p": p}
            for layer, bit, z, p in [("a", 0, 1.0, 0.3), ("a", 7, -2.0, 0.04), ("b", 0, 0.5, 0.6), ("b", 8, 9.0, 1e-9),
                                     ("b", 7, None, None)]]
    assert table_row(rows, "convolution weight", "fraction 0-7") == {
        "type": "convolution weight", "bits": "fraction 0-7", "layers": 2, "tests": 3, "largest_z": 2.0,
        "corrected_p": pytest.approx(0.12)}
    assert table_row(rows, "convolution weight", "sign")["largest_z"] is None


def test_told_apart_by_what_differs():
    def rows(sign_after):
        return [{"arm": arm, "seed": seed, "layer": "w", "type": "convolution weight", "bit": bit,
                 "z": (sign_after if arm == "after" and bit == 31 else 1.0) + 0.01 * ((seed * 7 + bit) % 5), "p": 0.5}
                for arm in ("before", "after") for seed in range(8) for bit in range(32)]

    found = {row["bits"]: row for row in bit_runs.told_apart(rows(5.0))}
    assert found["sign"]["area"] == found["bit 31"]["area"] == 1 and found["sign"]["low"] == 1
    assert found["exponent"]["area"] == 0.5 and found["bit 3"]["area"] == 0.5
    assert {row["bits"]: row for row in bit_runs.told_apart(rows(0.0))}["sign"]["area"] == 0


def test_the_bootstrap_draws_pairs():
    """z goes from seed to seed by far more than training adds: drawn in pairs before and after hardly differ in their order,
    drawn apart they would lie anywhere."""
    rows = [{"arm": arm, "seed": seed, "layer": "w", "type": "convolution weight", "bit": bit, "p": 0.5,
             "z": seed + (0.5 if arm == "after" else 0)} for arm in ("before", "after") for seed in range(8) for bit in range(32)]
    found = bit_runs.told_apart(rows)[0]
    assert found["area"] == 36 / 64 and 0 < found["high"] - found["low"] < 0.15


def test_images_are_no_coin():
    random = torch.randint(0, 256, (20, 1, 40, 40), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    smooth = torch.arange(1600, dtype=torch.float32).div(1600 / 255).to(torch.uint8).view(1, 1, 40, 40).expand(20, -1, -1, -1)
    assert bit_runs.image_z(random, 20)["mean_z"] < 1.5 < 5 < bit_runs.image_z(smooth.contiguous(), 20)["mean_z"]


# ------------------------------------------------------------------------------------------------------------ the script

QUICK = ("--seeds", 2, "--steps", 10, "--images", 20)


def test_question_1_and_resume(run, tmp_path):
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    assert run("bit_runs.py", *QUICK, "--out", whole).returncode == 0
    assert run("bit_runs.py", "--seeds", 1, *QUICK[2:], "--out", parts).returncode == 0
    done = run("bit_runs.py", *QUICK, "--out", parts, "--resume")
    assert done.returncode == 0 and "told from untrained" in done.stdout
    assert (whole / "metrics.csv").read_bytes() == (parts / "metrics.csv").read_bytes()
    summary = json.loads((whole / "summary.json").read_text())
    assert summary == json.loads((parts / "summary.json").read_text())
    assert len(summary["told_apart"]) == 5 + 32 and set(summary["table"]) == {"before", "after"}
    figure = (whole / "bit_runs.png").read_bytes()
    assert run("bit_runs.py", "--plot-only", whole).returncode == 0
    assert (whole / "bit_runs.png").read_bytes() == figure


def test_numbers_do_not_depend_on_threads_or_processes(run, tmp_path):
    for out, processes, threads in (("a", 1, "1"), ("b", 1, "3"), ("c", 2, "1")):
        done = run("bit_runs.py", "--seeds", 3, "--steps", 60, "--images", 5, "--out", tmp_path / out, processes=processes,
                   env={**os.environ, "OMP_NUM_THREADS": threads})
        assert done.returncode == 0, done.stderr
    assert len({(tmp_path / out / "metrics.csv").read_bytes() for out in "abc"}) == 1


def test_a_single_value_per_channel_is_one_line(monkeypatch, tmp_path, capsys):
    images, labels = torch.arange(12, dtype=torch.uint8).view(4, 3, 1, 1), torch.tensor([0, 1, 0, 1])
    monkeypatch.setattr(bit_runs.common, "load_data", lambda *_: (images, labels, images, labels, 2))
    with pytest.raises(SystemExit) as stop:
        bit_runs.main(["--batch-size", "1", "--seeds", "1", "--steps", "1", "--out", str(tmp_path / "a")])
    assert stop.value.code == 2 and "--batch-size" in capsys.readouterr().err.splitlines()[-1]


def test_black_images(monkeypatch):
    assert bit_runs.image_z(torch.zeros(4, 1, 8, 8, dtype=torch.uint8), 4) is not None


def test_checkpoints_and_models(run, tmp_path):
    model = nn.Sequential(nn.Conv2d(1, 8, 3), nn.BatchNorm2d(8), nn.Flatten(), nn.Linear(8, 10))
    optimizer = torch.optim.Adam(model.parameters())
    model(torch.randn(2, 1, 3, 3)).sum().backward()
    optimizer.step()
    torch.save({"optimizer": optimizer.state_dict(), "step": torch.tensor(3), "ema": torch.ones(3, 3), 7: [1],
                "running": {"model": model.state_dict()}}, tmp_path / "deep.pt")
    done = run("bit_runs.py", "--checkpoint", tmp_path / "deep.pt", "--out", tmp_path / "a")
    assert done.returncode == 0 and "batch norm weight" in done.stdout and "all equal" in done.stdout
    done = run("bit_runs.py", "--model", "squeezenet1_1", "--images", 5, "--out", tmp_path / "b")
    assert done.returncode == 0 and "convolution weight" in done.stdout, done.stderr


def test_resume_refuses_a_checkpoint_that_was_replaced(run, tmp_path):
    arguments = "bit_runs.py", "--checkpoint", tmp_path / "a.pt", "--images", 5, "--out", tmp_path / "out"
    for number, more in enumerate(((), ("--resume",))):
        torch.save({"weight": torch.randn(4, 4)}, tmp_path / "a.pt")
        done = run(*arguments, *more)
        assert done.returncode == (0, 2)[number], done.stderr
    assert "--checkpoint-sha256" in done.stderr


def test_an_untrained_model_has_no_trained_backbone(monkeypatch):
    from torchvision import models

    monkeypatch.setattr(torch.hub, "load_state_dict_from_url", lambda *_, **__: pytest.fail("a download"))
    monkeypatch.setattr(models._api.WeightsEnum, "get_state_dict", lambda *_, **__: pytest.fail("a download"))
    assert "backbone.conv1.weight" in bit_runs.torchvision_state("fcn_resnet50", None)


def test_weights_without_a_bit_that_varies(run, tmp_path):
    torch.save({"weight": torch.ones(4, 4)}, tmp_path / "ones.pt")
    done = run("bit_runs.py", "--checkpoint", tmp_path / "ones.pt", "--images", 5, "--out", tmp_path / "a")
    assert done.returncode == 0 and "all equal" in done.stdout, done.stderr


def test_networks_that_diverged_are_not_told_apart(monkeypatch, tmp_path, capsys):
    """Of three networks the second diverges: the others alone are counted, before training, too."""
    real = bit_runs.before_and_after
    monkeypatch.setattr(bit_runs, "before_and_after",
                        lambda args, data, seed: (real(args, data, seed)[0], None if seed == 1 else 50.0))
    assert bit_runs.main([*map(str, ("--seeds", 3, "--steps", 2, "--images", 5, "--out", tmp_path / "a"))]) == 3
    summary = json.loads((tmp_path / "a" / "summary.json").read_text())
    rows = bit_runs.common.read_csv(tmp_path / "a" / "metrics.csv", text=("arm", "layer", "type"))
    alone = bit_runs.told_apart([row for row in rows if row["seed"] != 1])
    assert summary["networks"] == 2 and len(rows) % 3 == 0 and "2 of each" in capsys.readouterr().out
    assert [row["rms_z_before"] for row in summary["told_apart"]] == pytest.approx([row["rms_z_before"] for row in alone], rel=1e-4)


def test_divergence_is_exit_3_and_one_seed_has_no_interval(run, tmp_path):
    one = tmp_path / "one"
    assert run("bit_runs.py", "--seeds", 1, "--steps", 1, "--images", 5, "--out", one).returncode == 0
    assert json.loads((one / "summary.json").read_text())["told_apart"][0]["low"] is None
    done = run("bit_runs.py", "--seeds", 1, "--steps", 20, "--images", 5, "--lr", 1e30, "--out", tmp_path / "a")
    assert done.returncode == 3 and "diverged: 1 of 1" in done.stderr and "Traceback" not in done.stderr
    last = run("bit_runs.py", "--seeds", 1, "--steps", 1, "--images", 5, "--lr", 1e38, "--out", tmp_path / "b")
    assert last.returncode == 3, last.stderr
    assert json.loads((tmp_path / "a" / "summary.json").read_text())["told_apart"] == []
    (tmp_path / "a" / "metrics.csv").write_bytes((tmp_path / "a" / "metrics.csv").read_bytes()[:1000])
    (tmp_path / "a" / "done" / "seed 0.json").write_text("null")
    for arguments, named in ((("--plot-only", tmp_path / "a"), "another length"),
                             (("--seeds", 1, "--steps", 20, "--images", 5, "--lr", 1e30, "--out", tmp_path / "a", "--resume"),
                              "seed 0.json is damaged")):
        done = run("bit_runs.py", *arguments)
        assert done.returncode == 2 and named in done.stderr and done.stderr.count("\n") == 1, done.stderr
    (tmp_path / "a" / "config.json").write_text("{}")
    done = run("bit_runs.py", "--out", tmp_path / "a", "--resume")
    assert done.returncode == 2 and "config.json is damaged" in done.stderr and done.stderr.count("\n") == 1, done.stderr


class Trap:
    def __reduce__(self):
        return print, ("code in the file was run",)


def test_code_in_a_checkpoint_is_not_run(run, tmp_path):
    torch.save({"model": Trap()}, tmp_path / "trap.pt")
    done = run("bit_runs.py", "--checkpoint", tmp_path / "trap.pt", "--out", tmp_path / "a")
    assert done.returncode == 2 and "code in the file" not in done.stdout and done.stderr.count("\n") == 1


@pytest.mark.parametrize("arguments,complaint", [
    (["--weights", "DEFAULT"], "--weights"), (["--checkpoint", ""], "--checkpoint"),
    (["--model", "resnet18", "--checkpoint", "x"], "without --checkpoint"),
    (["--seeds", 0], "--seeds"), (["--steps", 0], "--steps"), (["--images", 0], "--images"), (["--lr", "nan"], "--lr"),
    (["--lr", 1e39], "--lr"), (["--batch-size", 1 << 31], "--batch-size"),
    (["--dataset", "imagenet"], "--dataset"),
])
def test_bad_arguments_are_one_line_and_exit_2(capsys, arguments, complaint):
    with pytest.raises(SystemExit) as stopped:
        bit_runs.parse_arguments([*map(str, arguments)])
    error = capsys.readouterr().err
    assert stopped.value.code == 2 and complaint in error and error.count("\n") == 1


@pytest.mark.parametrize("arguments,complaint", [(["--checkpoint", "absent.pt"], "absent.pt"),
                                                 (["--model", "resnet1"], "no model"),
                                                 (["--model", "resnet18", "--weights", "BEST"], "BEST")])
def test_what_does_not_exist_is_one_line_and_exit_2(capsys, tmp_path, arguments, complaint):
    with pytest.raises(SystemExit) as stopped:
        bit_runs.main([*arguments, "--out", str(tmp_path / "a")])
    error = capsys.readouterr().err
    assert stopped.value.code == 2 and complaint in error and error.count("\n") == 1
    assert not (tmp_path / "a").exists()


def test_training_is_plain_sgd_and_tested_on_the_test_images(monkeypatch):
    images, labels, test_images, test_labels, classes = bit_runs.common.load_data("digits", None)
    args, states, real = bit_runs.parse_arguments(["--steps", "30", "--device", "cpu"]), [], bit_runs.layer_rows
    monkeypatch.setattr(bit_runs, "layer_rows", lambda state, **labels: states.append(
        {name: value.clone() for name, value in state.items()}) or real(state, **labels))
    _, accuracy = bit_runs.before_and_after(args, [images, labels, test_images, test_labels, classes], 3)
    model = bit_runs.Network(1, 10)
    model.load_state_dict(states[0])
    for name, value in states[0].items():
        if value.ndim > 1:       # normal, of He's variance
            fan_in = value[0].numel()
            assert abs(value.square().mean() * fan_in / 2 - 1) < 5 * (2 / value.numel()) ** 0.5, name
            assert abs(value.pow(4).mean() * fan_in ** 2 / 4 - 3) < 5 * (96 / value.numel()) ** 0.5, name
    optimizer, draws = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9), torch.Generator().manual_seed(3)
    for _ in range(30):
        index = torch.randint(1438, (64,), generator=draws)
        optimizer.zero_grad()
        F.cross_entropy(model(images[index] / 16), labels[index]).backward()
        optimizer.step()
    torch.testing.assert_close(model.state_dict(), states[1], rtol=1e-2, atol=1e-3)
    right = model.eval()(test_images / 16).argmax(1) == test_labels
    assert accuracy == pytest.approx(100 * right.double().mean().item(), abs=0.6)


def test_what_tells_networks_apart_is_the_root_mean_square_of_weights():
    rows = [{"arm": arm, "seed": seed, "layer": kind, "type": kind, "bit": 31, "z": z, "p": 0.5} for seed in range(2)
            for arm, values in (("before", (3.0, 3.0, 9.0)), ("after", (0.0, 5.0, 0.0)))
            for kind, z in zip(("convolution weight", "fully connected weight", "batch norm bias"), values, strict=True)]
    found, = (row for row in bit_runs.told_apart(rows) if row["bits"] == "sign")
    assert (found["area"], found["rms_z_before"], found["rms_z_after"]) == (1, 3, pytest.approx(12.5 ** 0.5))


def test_table_3_counts_layers_of_every_seed():
    rows = [{"seed": seed, "layer": "a", "type": "convolution bias", "bit": 0, "z": 1.0, "p": 0.3} for seed in range(3)]
    assert bit_runs.table_3(rows)[0]["layers"] == 3


def test_pixels_are_between_0_and_1():
    images = torch.randint(0, 256, (2, 1, 20, 20), dtype=torch.uint8).clamp_(max=254)
    images[1, 0, 0, 0] = 255                     # the brightest of all images, not of each
    z = [abs(z) for image in images for *_, z, _ in bit_runs.runs_test(bit_runs.bits_of(image * (1 / 255))) if z is not None]
    assert bit_runs.image_z(images, 2) == {"images": 2, "pixels": 400, "mean_z": pytest.approx(sum(z) / len(z))}


@pytest.mark.parametrize("error", [RuntimeError("PytorchStreamReader failed\nreading zip archive"), EOFError(), OSError("no net")], ids=repr)
def test_weights_that_cannot_be_read_are_one_line(monkeypatch, capsys, error):
    def build(weights, weights_backbone=None):
        raise error

    monkeypatch.setattr(models, "get_model_builder", lambda name: build)
    with pytest.raises(SystemExit) as stop:
        bit_runs.torchvision_state("resnet18", "DEFAULT")
    said = capsys.readouterr().err
    assert stop.value.code == 2 and "--weights" in said and "--checkpoint" in said and len(said.splitlines()) == 1
