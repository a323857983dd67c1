"""The audit finds what is planted, and nothing where nothing is."""

import json
import subprocess
import sys

import ordered_reduce
import pytest
import torch
from ordered_reduce import operations
from ordered_reduce.checks import CHECKS
from ordered_reduce.training import _narrowest
from torch import nn
from torch.nn import functional as F

ULP = 1 + 2.0**-22


class Planted(nn.Module):
    """x + 0.1, but for what is planted."""

    def __init__(self, kind):
        super().__init__()
        self.kind, self.generator = kind, torch.Generator()
        self.generator.seed()
        self.scale = nn.Parameter(torch.full((16,), 0.5))

    def forward(self, x):
        if self.kind == "repeats":
            x = x + 1e-6 * torch.randn(x.shape, generator=self.generator).to(x.device)
        if self.kind == "equal channels":
            x = torch.cat([x[:, :1] * ULP, x[:, 1:]], 1)
        if (self.kind == "batch" and len(x) < 8) or (self.kind == "threads" and torch.get_num_threads() == 1):
            x = x * ULP
        return x + self.scale.view(-1, 1, 1)


class Block(nn.Module):   # the culprit is in the code between the modules
    def __init__(self):
        super().__init__()
        self.conv, self.generator = nn.Conv2d(16, 16, 1), torch.Generator()
        self.generator.seed()

    def forward(self, x):
        return self.conv(x) + 1e-6 * torch.randn(x.shape, generator=self.generator).to(x.device)


def rows_of(report, operation):
    return {row["pass"]: row for row in report if row["operation"] == operation}


@pytest.mark.parametrize("kind", [*CHECKS, None])
def test_finds_a_planted_culprit_of_each_kind(device, kind):
    if kind == "threads" and device == "cuda":
        pytest.skip("the number of threads is asked of the CPU alone")
    model = nn.Sequential(nn.Conv2d(3, 16, 1), Planted(kind), nn.ReLU(inplace=True), nn.Flatten()).to(device)
    report = ordered_reduce.audit(model, torch.randn(12, 3, 5, 5, device=device))
    rows = rows_of(report, "1 (Planted)")
    assert list(rows) == ["forward", "gradient of input", "gradient of scale"]
    asked = CHECKS if device == "cpu" else CHECKS[:-1]
    assert [check for check in asked if rows["forward"][check] == "no"] == [kind] * bool(kind)
    assert all(rows["forward"][check] == "yes" for check in asked if kind not in (check, "repeats"))
    assert list(rows["forward"]["failures"]) == [kind] * bool(kind)
    for other in ("2 (ReLU)", "3 (Flatten)"):
        assert all(row[check] in ("yes", "-") for row in rows_of(report, other).values() for check in CHECKS), other
    table = str(report).splitlines()
    assert len(table) == 1 + len(report) and len({line.index(" cpu" if device == "cpu" else " cuda") for line in table[1:]}) == 1


def test_names_the_module_whose_own_code_is_to_blame(device):
    model = nn.Sequential(nn.Conv2d(3, 16, 1), nn.Sequential(Block(), nn.ReLU())).to(device)
    report = ordered_reduce.audit(model, torch.randn(4, 3, 5, 5, device=device))
    guilty = {row["operation"] for row in report if row["repeats"] == "no"}
    assert guilty == {"1.0 (Block)", "the whole model (Sequential)"}
    assert rows_of(report, "1.0.conv (Conv2d)")["gradient of weight"]["repeats"] == "yes"
    assert not rows_of(report, "1 (Sequential)")          # fails as well, but only because of what is inside


def test_leaves_the_model_as_it_was(device):
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(inplace=True), nn.Dropout(0.5)).to(device)
    x = torch.randn(6, 3, 5, 5, device=device)
    before, state, untouched = {k: v.clone() for k, v in model.state_dict().items()}, torch.get_rng_state(), x.clone()
    threads = torch.get_num_threads()
    report = ordered_reduce.audit(model, x)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items()) and torch.equal(x, untouched)
    assert torch.equal(torch.get_rng_state(), state) and torch.get_num_threads() == threads
    assert not any(module._forward_pre_hooks for module in model.modules()) and model[0].weight.grad is None
    dropout = rows_of(report, "3 (Dropout)")["forward"]
    assert dropout["repeats"] == "yes" and dropout["equal channels"] == "no"   # seeded; and what the paper says of it


def test_takes_sequences_and_several_inputs(device):
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.embedding, self.lstm = nn.Embedding(9, 16), nn.LSTM(16, 16, batch_first=True)
            self.attention = nn.MultiheadAttention(16, 2, batch_first=True)

        def forward(self, tokens, scale):
            x = self.lstm(self.embedding(tokens))[0]
            return self.attention(x, x, x)[0] * scale

    model, tokens = Model().to(device), torch.randint(9, (8, 5), device=device)
    reports = [ordered_reduce.audit(model, given) for given in ((tokens, 2.0), {"tokens": tokens, "scale": 2.0})]
    assert reports[0] == reports[1]
    assert {row["operation"].split()[0] for row in reports[0]} == {"embedding", "lstm", "attention", "the"}
    assert all(row["repeats"] == "yes" for row in reports[0] if row["pass"] == "forward")
    assert rows_of(reports[0], "lstm (LSTM)")["forward"]["batch"] != "-"
    with pytest.raises(TypeError, match="model"):
        ordered_reduce.audit(F.relu, tokens)


def test_fixed_order_repeats_and_treats_equal_channels_equally(device, monkeypatch):
    monkeypatch.setattr(operations, "CHANNELS", (9, 13, 50))
    for name in [name for name in operations.OPERATIONS if name.startswith("ordered_reduce")]:
        for row in operations.standard(device, name):
            assert row["repeats"] == "yes", row
            if "weight" in row["pass"] or "bias" in row["pass"] or name == "ordered_reduce.sum":   # the rest is PyTorch's
                assert row["equal channels"] == "yes" and row["threads"] == ("yes" if device == "cpu" else "-"), row


def test_the_standard_list(device, monkeypatch):
    """Every operation runs and repeats its shapes' promise; its gradients have the shapes that are declared."""
    monkeypatch.setattr(operations, "CHANNELS", (3,))
    monkeypatch.setattr(operations, "SAMPLES", 2)
    for name, (_, _, tensors) in operations.OPERATIONS.items():
        if device == "cpu" or ordered_reduce.cuda_built() or not name.startswith("ordered_reduce"):
            rows = operations.standard(device, name)
            assert rows[0]["pass"] == "forward" and not any("error" in row["failures"] for row in rows), rows
            floating = [t for t, shape in tensors.items() if "<" not in shape and t not in ("mean", "var")]
            assert [row["pass"] for row in rows[1:]] == [f"gradient of {t}" for t in floating]


def test_command_line(tmp_path):
    done = subprocess.run([sys.executable, "-W", "error", "-m", "ordered_reduce.audit", "--device", "cpu", "--ops",
                           "mean of batch", "--json", tmp_path / "audit.json"], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0 and done.stderr == ""
    saved = json.loads((tmp_path / "audit.json").read_text())
    assert str(ordered_reduce.Report(saved["rows"])) == done.stdout.rstrip("\n")
    assert [(row["operation"], row["pass"]) for row in saved["rows"]] == [
        ("mean of batch", "forward"), ("mean of batch", "gradient of input")]


@pytest.mark.parametrize("arguments,named", [
    (["--ops", "nothing"], "--ops: 'nothing'"), (["--device", "tpu9"], "--device: 'tpu9'"), (["--seed", "-1"], "--seed: -1"),
    (["--json", "/no/such/folder/x"], "--json: /no/such/folder/x"), (["--verbose"], "--verbose")], ids=str)
def test_bad_input_is_one_line_and_exit_status_2(arguments, named, capsys):
    with pytest.raises(SystemExit) as stopped:
        operations.main(arguments)
    said = capsys.readouterr()
    assert stopped.value.code == 2 and said.out == "" and said.err.count("\n") == 1 and named in said.err


def test_the_command_does_not_hide_the_function():
    code = "import ordered_reduce.audit, ordered_reduce as o; from ordered_reduce import audit; assert audit is o.audit; o.audit.__code__"
    assert subprocess.run([sys.executable, "-W", "error", "-c", code]).returncode == 0


# ----------------------------------------------------------------------------------------------------- training runs


def symmetric(device, prepare=lambda model: None, extra=(), batches=lambda: None):
    """make() of a network whose hidden channels are all copies."""
    def make():
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 16), nn.Tanh(), nn.Linear(16, 16), nn.Tanh(),
                              *extra, nn.Linear(16, 4))
        for name, p in model.named_parameters():
            with torch.no_grad():
                p.copy_(p[:1].clone() if name == "0.weight" else torch.full_like(p, 0.05 * (p.ndim - 1)))
        model.to(device)
        ordered_reduce.convert(model)
        policy = prepare(model)
        x, y = torch.randn(24, 8, device=device), torch.randint(4, (24,), device=device)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.5)

        def step(number):
            optimizer.zero_grad()
            F.cross_entropy(model(x if batches() is None else x + batches()), y).backward()
            optimizer.step()
            if policy:
                policy.step()

        return model, step
    return make


def test_training_names_layer_and_step_of_the_noise(device):
    quiet = ordered_reduce.audit_training(symmetric(device), 6)
    assert quiet["repeats"] is None and quiet["apart"] is None
    for layer, first in (("2", 3), ("4", 1)):
        noisy = symmetric(device, lambda model, layer=layer, first=first: ordered_reduce.convert(
            model, "shuffled", seed=1, layers=layer, steps=(first, first + 1)))
        found = ordered_reduce.audit_training(noisy, 6)
        difference = found["apart"].pop("difference")
        assert found["apart"] == {"step": first, "module": layer, "pass": "gradient of weight"} and 0 < difference < 1e-5
        assert found["repeats"] is None and found["window"] == quiet["window"]    # sought with a policy of its own


def test_smallest_window_suffices_and_is_smallest(device):
    make = symmetric(device)

    def broken(layers, steps):
        model, step = make()
        policy = ordered_reduce.convert(model, "shuffled", layers=layers, steps=steps)
        for number in range(6):
            step(number)
            policy.step()
        return any(not torch.equal(w, w.narrow(dim, 0, 1).expand_as(w))
                   for w, dim in ((model[0].weight, 0), (model[2].weight, 0), (model[2].weight, 1), (model[4].weight, 0),
                                  (model[4].weight, 1), (model[6].weight, 1)))

    window = ordered_reduce.audit_training(make, 6)["window"]
    layers, (first, end) = window["layers"], window["steps"]
    assert broken(layers, (first, end)) and not broken(["0", "2", "4", "6"], (6, 7))
    assert end - first == 1 or not (broken(layers, (first + 1, end)) or broken(layers, (first, end - 1)))
    assert len(layers) == 1 or not (broken(layers[1:], (0, 6)) or broken(layers[:-1], (0, 6)))
    assert ordered_reduce.audit_training(make, 2, splits=2)["window"] is None     # a + b = b + a: no noise, no window
    assert ordered_reduce.audit_training(make, 2, spread=2.0)["window"] is None   # two steps do not part them as far


def test_narrowest_window_against_all_windows():
    for n in range(1, 9):
        for first in range(n):
            for end in range(first + 1, n + 1):
                assert _narrowest(n, lambda a, b: a <= first and b >= end) == (first, end)   # noqa: B023
        for width in range(1, n + 1):                      # any window of this width: one of them is named
            a, b = _narrowest(n, lambda a, b: b - a >= width)   # noqa: B023
            assert b - a == width


def test_training_names_what_does_not_repeat(device):
    generator = torch.Generator()
    generator.seed()

    def random(*shape):
        return torch.randn(shape, generator=generator).to(device)

    class Noise(nn.Module):
        def forward(self, x):
            return x + 1e-6 * random(*x.shape)

    found = ordered_reduce.audit_training(symmetric(device, extra=[Noise()]), 2)
    assert found["repeats"] == {"step": 0, "module": "6", "pass": "output"}
    assert found["apart"].items() >= {"step": 0, "module": "6", "pass": "output"}.items()
    other_data = ordered_reduce.audit_training(symmetric(device, batches=lambda: random(1)), 2)
    assert other_data["repeats"] == {"step": 0, "module": "0", "pass": "input"}

    def other_weights(model):
        model[2].weight.data += random(1)

    found = ordered_reduce.audit_training(symmetric(device, other_weights), 2)
    assert found["repeats"] == {"step": 0, "module": "2", "pass": "initial weight"}


class UnequalBackward(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, grad):
        return torch.cat([grad[:, :1] * ULP, grad[:, 1:]], 1)


class Unequal(nn.Module):
    def forward(self, x):
        return UnequalBackward.apply(x)


class Fork(nn.Module):   # two readers of one tensor
    def __init__(self):
        super().__init__()
        self.even, self.odd = nn.Identity(), Unequal()

    def forward(self, x):
        return self.even(x) + self.odd(x)


def test_backward_culprits_are_told_from_the_other_readers_of_a_tensor(device):
    found = ordered_reduce.audit_training(symmetric(device, extra=[Fork()]), 1)
    assert found["apart"].items() >= {"step": 0, "module": "6.odd", "pass": "gradient of input"}.items()
    report = ordered_reduce.audit(Fork().to(device), torch.randn(4, 16, device=device, requires_grad=True))
    assert [(row["operation"], row["pass"]) for row in report if row["equal channels"] == "no"] == [
        ("odd (Unequal)", "gradient of input"), ("the whole model (Fork)", "gradients")]


def test_training_names_dropout_though_its_difference_is_large(device):
    found = ordered_reduce.audit_training(symmetric(device, extra=[nn.Dropout(0.1)]), 2)
    assert found["repeats"] is None and found["apart"].items() >= {"step": 0, "module": "6", "pass": "output"}.items()
    with pytest.raises(ValueError, match="steps must be at least 1; got 0"):
        ordered_reduce.audit_training(symmetric(device), 0)
