"""The audit finds what is planted, and nothing where nothing is."""

import collections
import copy
import dataclasses
import json
import math
import subprocess
import sys
import threading
import time
import typing

import numpy as np
import ordered_reduce
import pytest
import torch
from ordered_reduce import operations
from ordered_reduce.checks import CHECKS, channel_dims
from ordered_reduce.training import _narrowest
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

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


def test_takes_a_mapping_that_is_no_dict():
    x = torch.randn(4, 16)
    report = ordered_reduce.audit(nn.Bilinear(16, 16, 2), collections.UserDict(input1=x, input2=x))
    assert {row["pass"] for row in report} >= {"forward", "gradient of weight"}


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
    (["--ops", "nothing"], "--ops: 'nothing'"), (["--device", "tpu9"], "--device: 'tpu9'"), (["--device", "hpu"], "--device: 'hpu'"),
    (["--seed", "-1"], "--seed: -1"),
    (["--json", "/no/such/folder/x"], "--json: /no/such/folder/x"), (["--verbose"], "--verbose")], ids=str)
def test_bad_input_is_one_line_and_exit_status_2(arguments, named, capsys):
    with pytest.raises(SystemExit) as stopped:
        operations.main(arguments)
    said = capsys.readouterr()
    assert stopped.value.code == 2 and said.out == "" and said.err.count("\n") == 1 and named in said.err


# ---------------------------------------------------------------------------------------------- modules of every kind


class Do(nn.Module):
    """do(self, *inputs), with parameters, modules and numbers by name."""

    def __init__(self, do, **held):
        super().__init__()
        self.do, self.calls = do, 0
        for name, value in held.items():
            setattr(self, name, nn.Parameter(value) if isinstance(value, torch.Tensor) else value)

    def forward(self, *inputs, **named):
        self.calls += 1
        return self.do(self, *inputs, **named)


@dataclasses.dataclass
class Answer:
    value: torch.Tensor


class Answers(collections.OrderedDict):
    pass


def failures(report, check):
    return [(row["operation"], row["pass"], row["failures"][check]) for row in report if check in row["failures"]]


@pytest.mark.parametrize("answer", [lambda x: None, Answer, lambda x: Answers(value=x)])
def test_an_output_that_cannot_be_seen_gets_a_row_of_dashes(answer):
    silent = Do(lambda self, x: answer(x * self.scale), scale=torch.ones(16))
    model = Do(lambda self, x: (self.silent(x), self.linear(x))[1], silent=silent, linear=nn.Linear(16, 16))
    report = ordered_reduce.audit(model, torch.randn(6, 16))
    (row,) = rows_of(report, "silent (Do)").values()
    assert [row[check] for check in CHECKS] == ["-"] * 4 and not row["failures"]
    assert rows_of(report, "linear (Linear)")["gradient of weight"]["repeats"] == "yes"


@pytest.mark.parametrize("do", [
    lambda self, x: self.linear(x) if self.calls % 2 else x * self.scale, lambda self, x: x[:, :1 + self.calls % 2] * self.scale[:1],
    lambda self, x: (x * self.scale,) * (1 + self.calls % 2)], ids=["branch", "shape", "number of outputs"])
def test_a_structure_that_varies_does_not_repeat(do):
    report = ordered_reduce.audit(Do(do, linear=nn.Linear(16, 16), scale=torch.ones(16)), torch.randn(6, 16))
    whole = rows_of(report, "the whole model (Do)")
    assert len(whole) > 1 and all(row["repeats"] == "no" for row in whole.values())


def experts(self, x):
    chosen, out = x[:, :3].argmax(1), torch.zeros_like(x)
    for number, expert in enumerate(self.experts):
        if (chosen == number).any():
            out[chosen == number] = expert(x[chosen == number])
    return out


def test_branches_that_depend_on_the_data():
    """Where channels are equal, or samples fewer, other experts get a gradient."""
    x = torch.randn(6, 16)
    x[:, :3] = torch.eye(3)[[1, 2, 1, 2, 0, 0]]
    model = Do(experts, experts=nn.ModuleList(nn.Linear(16, 16) for _ in range(3)))
    adaptive = nn.AdaptiveLogSoftmaxWithLoss(16, 20, [5, 10])
    for routed, input in ((model, x), (adaptive, (x, torch.tensor([1, 7, 12, 3, 8, 15])))):
        report = ordered_reduce.audit(routed, input)
        assert {row["repeats"] for row in report} == {"yes"} and not failures(report, "error")
        assert report[-1]["operation"].startswith("the whole model") and report[-1]["pass"] == "gradients"


@pytest.mark.parametrize("error", [AssertionError(), KeyError("x"), ZeroDivisionError("by 0"), TypeError("a\nb"), RuntimeError()], ids=repr)
def test_what_a_module_raises_alone_stands_in_its_row(error):
    def once(self, x):
        if self.calls > 1:
            raise error
        return x

    def six(self, x):
        assert len(x) == 6 and x.std(1).min() > 0    # refuses fewer samples, and equal channels
        return x * 2

    report = ordered_reduce.audit(nn.Sequential(Do(once), Do(six), nn.ReLU()), torch.randn(6, 16))
    (row,) = rows_of(report, "0 (Do)").values()
    assert row["repeats"] == "-" and row["failures"]["error"][0].startswith(type(error).__name__)
    assert "\n" not in row["failures"]["error"][0]
    for row in rows_of(report, "1 (Do)").values():
        assert [row[check] for check in CHECKS] == ["yes", "-", "-", "yes"]
    assert rows_of(report, "2 (ReLU)")["forward"]["batch"] == "yes"


def test_leaves_what_the_model_writes_to(device):
    model = nn.Embedding(9, 16, max_norm=0.5).to(device)
    before = model.weight.detach().clone()
    ordered_reduce.audit(model, torch.arange(9, device=device))
    assert torch.equal(model.weight, before)
    for x in (torch.ones(6, 16, device=device), torch.ones(6, 16, device=device, requires_grad=True)):
        report = ordered_reduce.audit(Do(lambda self, x: x.mul_(2)), x)
        assert torch.equal(x, torch.ones_like(x)) and not failures(report, "error")


def test_models_that_differentiate_in_their_forward(device):
    def forces(self, x):
        energy = self.linear(x.requires_grad_()).square().sum()
        return torch.autograd.grad(energy, x, create_graph=True)[0]

    model = Do(forces, linear=nn.Linear(16, 3)).to(device)
    report = ordered_reduce.audit(model, torch.randn(6, 16, device=device))
    assert {row["repeats"] for row in report} == {"yes"} and report[-1]["pass"] == "gradients"
    assert model.linear.weight.grad is None


def attention(size, **named):
    x = torch.randn(6, size, 16)
    return nn.MultiheadAttention(16, 2, batch_first=True), dict(query=x, key=x, value=x, **named)


def images(*channels):
    return torch.randn(6, *channels)


def largest(report, check):
    """The largest difference that the table shows."""
    return max([float(row["failures"][check][0].split("(")[1].strip(")")) for row in report if check in row["failures"]], default=0)


@pytest.mark.parametrize("make", [
    lambda: attention(5, key_padding_mask=torch.randn(6, 5)), lambda: attention(16, key_padding_mask=torch.randn(6, 16)),
    lambda: (nn.LSTM(16, 8, bidirectional=True), images(5, 16)), lambda: (nn.Bilinear(16, 12, 7), (images(16), images(12))),
    lambda: (Do(lambda self, x: x * self.scale + self.place, place=images(5, 16)[:1], scale=torch.randn(1, 1, 16)), images(5, 16)),
    lambda: (Do(lambda self, x: F.layer_norm(x, (5, 16), self.weight), weight=images(16)[:5]), images(5, 16)), lambda: (nn.PixelShuffle(2), images(16, 4, 4)), lambda: (nn.GLU(1), images(16)),
    lambda: (nn.Sequential(nn.ConstantPad1d(1, 0.0), nn.ReflectionPad1d(1)), images(16, 7)),
    lambda: (Do(lambda self, x, y: self.loss(x * 1, y), loss=nn.CrossEntropyLoss()), (images(10), torch.arange(6)))], ids=[
        "attention", "square attention", "LSTM", "Bilinear", "places", "LayerNorm", "PixelShuffle", "GLU", "padding", "loss"])
def test_channels_that_differ_by_design_are_no_failure(make):
    torch.manual_seed(0)
    report = ordered_reduce.audit(*make())
    assert report and not failures(report, "error") and largest(report, "equal channels") < 1e-6


def test_equal_channels_are_asked_of_what_holds_them():
    """The parameter's own channels, in a third dimension, and an attention's output."""
    torch.manual_seed(0)
    report = ordered_reduce.audit(Do(lambda self, x: x + self.place, place=torch.randn(1, 5, 16)), images(5, 16))
    assert {row["equal channels"] for row in report} == {"yes"}
    assert [row["equal channels"] for row in ordered_reduce.audit(*attention(5))[:2]] == ["yes"] * 2


def encoder(**options):
    return nn.TransformerEncoder(nn.TransformerEncoderLayer(16, 2, 32, 0.0, **options), 1, enable_nested_tensor=bool(options))


@pytest.mark.parametrize("make", [
    lambda: (encoder().layers[0], images(5, 16)), lambda: (encoder(), images(5, 16)),
    lambda: (Do(lambda self, x, mask: F.scaled_dot_product_attention(x, x, x, mask)), (images(6, 16), images(6))),
    lambda: (Do(lambda self, x: (x * 1, x.square().mean())), images(16)),
    lambda: (nn.utils.parametrizations.spectral_norm(nn.Linear(16, 20)), images(16)),
    lambda: (nn.utils.parametrize.register_parametrization(nn.Linear(16, 20), "weight", Do(lambda self, w: w - w.mean(0))), images(16))], ids=[
        "layer", "encoder", "mask", "mean", "spectral norm", "parametrization"])
def test_what_is_no_sample_is_not_cut(make):
    torch.manual_seed(0)
    report = ordered_reduce.audit(*make())
    assert report and not failures(report, "error") and largest(report, "batch") < 1e-6


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
def test_nested_tensors_end_no_audit():
    report = ordered_reduce.audit(encoder(batch_first=True).eval().requires_grad_(False),
                                  dict(src=images(5, 16), src_key_padding_mask=torch.arange(5).expand(6, 5) > 2))
    assert failures(report, "error") and rows_of(report, "the whole model (TransformerEncoder)")["forward"]["repeats"] == "yes"


def test_inputs_of_every_kind():
    x = torch.randn(6, 16)
    rows = rows_of(ordered_reduce.audit(Do(lambda self, x: x * self.input, input=torch.randn(16)), x), "the whole model (Do)")
    assert list(rows) == ["forward", "gradient of input 0", "gradient of input"]
    packed = nn.utils.rnn.pack_padded_sequence(images(5, 16), [5, 5, 4, 3, 2, 1], batch_first=True)
    sparse = Do(lambda self, a, x: a @ self.linear(x), linear=nn.Linear(16, 16))
    for model, input in ((nn.LSTM(16, 8), packed), (nn.Embedding(9, 16, sparse=True), torch.arange(9)), (sparse, (torch.eye(6).to_sparse(), x)),
                         (nn.Linear(16, 16, dtype=torch.complex64), x.cfloat()), (nn.LazyLinear(16), x)):
        report = ordered_reduce.audit(model, input)
        assert {row["repeats"] for row in report} == {"yes"}, report
    conjugate = ordered_reduce.audit(Do(lambda self, x: (x * self.calls).conj()), x.cfloat())
    assert [row["repeats"] for row in conjugate] == ["no"]
    with pytest.raises(ValueError, match="input must hold a tensor.* got 3"):
        ordered_reduce.audit(Do(lambda self, x: x), 3)


def jitter(self, x):
    return x + 1e-6 * torch.from_numpy(self.generator.normal(size=x.shape)).float()


def test_a_number_that_varies_is_named():
    sampled = Do(lambda self, x: (x * 1, self.generator.random()), generator=np.random.default_rng())
    model = Do(lambda self, x: self.linear(x) * (1 + self.sampled(x)[1]), sampled=sampled, linear=nn.Linear(16, 16))
    report = ordered_reduce.audit(model, torch.randn(6, 16))
    rows = rows_of(report, "sampled (Do)")
    assert rows["numbers"]["repeats"] == "no" and rows["forward"]["repeats"] == "yes"


def test_what_is_shared_is_blamed_alone():
    noise = Do(jitter, generator=np.random.default_rng())
    blocks = [Do(lambda self, x: self.noise(self.linear(x)), noise=noise, linear=nn.Linear(16, 16)) for _ in range(2)]
    report = ordered_reduce.audit(nn.Sequential(*blocks), torch.randn(6, 16))
    assert {row["operation"] for row in report if row["repeats"] == "no"} == {"0.noise (Do)", "the whole model (Sequential)"}


def test_a_models_own_hooks_run_once():
    model = nn.Sequential(nn.Linear(16, 16), nn.Linear(16, 4))
    model[0].register_forward_pre_hook(lambda module, args: (args[0]["x"],))
    report = ordered_reduce.audit(model, ({"x": torch.randn(6, 16)},))
    assert not failures(report, "error") and rows_of(report, "0 (Linear)")["gradient of weight"]["repeats"] == "yes"


def test_transforms_of_torch_func_end_no_audit():
    model = Do(lambda self, x: torch.func.vmap(torch.func.grad(lambda row: self.net(row).sum()))(x),
               net=nn.Sequential(nn.Linear(16, 8), nn.Tanh(), nn.Linear(8, 1)))
    report = ordered_reduce.audit(model, torch.randn(6, 16))
    assert report and not failures(report, "repeats")


def test_two_dropouts_are_no_matter_of_the_batch():
    block = Do(lambda self, x: self.b(self.a(x)), a=nn.Dropout(), b=nn.Dropout())
    report = ordered_reduce.audit(nn.Sequential(nn.ReLU(), block), torch.randn(6, 16))
    assert not failures(report, "batch") and rows_of(report, "1.b (Dropout)")["forward"]["batch"] == "yes"


class Doubled(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, grad):
        return grad.mul_(2)


def test_a_backward_may_write_to_its_gradient():
    report = ordered_reduce.audit(nn.Sequential(nn.Linear(16, 16), Do(lambda self, x: Doubled.apply(x))), torch.randn(6, 16))
    assert not failures(report, "repeats")


@pytest.mark.filterwarnings("ignore:.*weight_norm")
def test_a_device_may_be_named_for_any_model():
    model = nn.Sequential(nn.utils.weight_norm(nn.Linear(16, 4)))
    model(torch.randn(6, 16))
    assert ordered_reduce.audit(model, torch.randn(6, 16), device="cpu")


@pytest.mark.filterwarnings("ignore:.*torch.jit")
@pytest.mark.parametrize("wrap", [torch.jit.script, nn.DataParallel])
def test_what_cannot_be_looked_into_is_refused(wrap):
    with pytest.raises(ValueError, match="model must be"):
        ordered_reduce.audit(wrap(nn.Linear(4, 4)), torch.ones(2, 4))


def test_the_command_does_not_hide_the_function():
    code = "import ordered_reduce.audit, ordered_reduce as o; from ordered_reduce import audit; assert audit is o.audit; o.audit.__code__"
    assert subprocess.run([sys.executable, "-W", "error", "-c", code]).returncode == 0


@pytest.mark.filterwarnings("ignore:.*torch.jit.script")
def test_scripted_parts_are_looked_at_from_without():
    model = nn.Sequential(nn.Linear(16, 16), torch.jit.script(nn.ReLU()), nn.Flatten())
    report = ordered_reduce.audit(model, X)
    assert rows_of(report, "the whole model (Sequential)") and rows_of(report, "2 (Flatten)") and not failures(report, "repeats")
    assert ordered_reduce.audit_training(plain(lambda: copy.deepcopy(model), X), 1)["repeats"] is None
    assert not any(module._forward_pre_hooks for module in model.modules())


def test_checkpoints_run_again_with_the_tensors_of_the_run():
    """And not with those of the model, when autograd asks for what they have not kept."""
    def checkpointed(self, x):
        return checkpoint(lambda y: self.norm(torch.tanh(y @ self.weight)), x, use_reentrant=False)

    model = Do(checkpointed, weight=torch.randn(16, 16), norm=nn.BatchNorm1d(16))
    whole = rows_of(ordered_reduce.audit(model, X), "the whole model (Do)")
    assert whole["gradients"]["repeats"] == "yes" and model.norm.num_batches_tracked == 0
    leaf = Do(lambda self, x: checkpoint(lambda y: torch.tanh(y @ self.weight), x, use_reentrant=False), weight=torch.randn(16, 16))
    assert {row["equal channels"] for row in ordered_reduce.audit(leaf, X)} == {"yes"}


def hidden_state(self, x):
    self.state = torch.tanh(self.linear(x) + (0 if self.state is None else self.state[0])), 1
    return self.state[0]


def moving_average(self, x):
    self.state = x.mean(0) if self.state is None else 0.5 * self.state + 0.5 * x.mean(0)
    return x - self.state


@pytest.mark.parametrize("do", [hidden_state, moving_average])
def test_what_a_module_keeps_from_its_calls(do):
    """Stays out of the model, and out of what is said of other modules."""
    model = nn.Sequential(Do(do, state=None, linear=nn.Linear(16, 16)), nn.Linear(16, 4))
    report = ordered_reduce.audit(model, X)
    assert model[0].state is None and model[0].calls == 0 and not failures(report, "error")
    guilty = {where for where, _, _ in failures(report, "repeats")}
    assert guilty == ({"0 (Do)", "the whole model (Sequential)"} if do is hidden_state else set())


def test_what_cannot_be_copied_is_run_itself():
    model = Do(lambda self, x: x * self.scale, scale=torch.ones(16), lock=threading.Lock())
    assert {row["repeats"] for row in ordered_reduce.audit(model, X)} == {"yes"} and model.calls > 0
    assert torch.equal(model.scale, torch.ones(16)) and model.scale.grad is None


def test_more_repeats_find_what_is_rare():
    model = Do(lambda self, x: x * (ULP if self.calls % 8 == 0 else 1.0))
    assert [ordered_reduce.audit(model, X, repeats=n)[0]["repeats"] for n in (3, 12)] == ["yes", "no"]
    for wrong in (1, 2.5, "3"):
        with pytest.raises(ValueError, match=f"repeats must be an integer of at least 2; got {wrong!r}"):
            ordered_reduce.audit(model, X, repeats=wrong)


def test_a_module_that_is_given_no_tensor_has_a_row():
    noise = Do(lambda self, n: torch.randn(n, 16, generator=self.generator), generator=torch.Generator())
    report = ordered_reduce.audit(Do(lambda self, x: self.linear(x + self.noise(len(x))), noise=noise, linear=nn.Linear(16, 4)), X)
    assert {where for where, _, _ in failures(report, "repeats")} == {"noise (Do)", "the whole model (Do)"}


def test_inputs_become_numpy_arrays():
    def augment(self, x):
        return torch.from_numpy(x.numpy() * self.generator.normal(1, 0.1))

    report = ordered_reduce.audit(nn.Sequential(Do(augment, generator=np.random.default_rng(0)), nn.Linear(16, 4)), X)
    assert not failures(report, "error") and {where for where, _, _ in failures(report, "repeats")} == {
        "0 (Do)", "the whole model (Sequential)"}
    assert rows_of(report, "1 (Linear)")["gradient of input"]["repeats"] == "yes"


def test_one_tensor_given_twice_is_one_tensor():
    """PyTorch's attention takes another way then."""
    def same(self, q, k):
        assert q is k
        return self.linear(q)

    model = Do(lambda self, x: self.same(x, k=x), same=Do(same, linear=nn.Linear(16, 16)))
    report = ordered_reduce.audit(model, X)
    assert not failures(report, "error") and "gradient of weight" in rows_of(report, "same.linear (Linear)")
    assert ordered_reduce.audit_training(plain(lambda: copy.deepcopy(model), X), 1)["repeats"] is None
    leaf = rows_of(ordered_reduce.audit(Do(lambda self, q, k: q * 2 if q is k else q), (X, X)), "the whole model (Do)")
    assert list(leaf) == ["forward", "gradient of input"]


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
    assert other_data["repeats"] == {"step": 0, "module": "", "pass": "input"}

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
    with pytest.raises(ValueError, match="steps must be an integer of at least 1; got 0"):
        ordered_reduce.audit_training(symmetric(device), 0)


def plain(build, x, loss=lambda y: y.abs().square().mean(), prepare=lambda model: None):
    """make() of a run of steps without an optimizer object."""
    def make():
        torch.manual_seed(0)
        model = build()
        prepare(model)

        def step(number):
            loss(model(x)).backward()
            with torch.no_grad():
                for p in model.parameters():
                    if p.grad is not None:
                        p -= 0.1 * p.grad
                        p.grad = None

        return model, step
    return make


def optimizer_in_backward(model):
    def use_up(p):
        with torch.no_grad():
            p -= 0.1 * p.grad
        p.grad = None

    for p in model.parameters():
        p.register_post_accumulate_grad_hook(use_up)


def per_sample():
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 2)), torch.randn(6, 8)

    def loss(parameters, x):
        return torch.func.functional_call(model, parameters, (x[None],)).square().mean()

    def step(number):
        parameters = {name: p.detach() for name, p in model.named_parameters()}
        gradients = torch.func.vmap(torch.func.grad(loss), (None, 0))(parameters, x)
        with torch.no_grad():
            for name, p in model.named_parameters():
                p -= 0.1 * gradients[name].mean(0)

    return model, step


X, TOKENS, NOTHING = torch.randn(6, 16), torch.randint(9, (6, 4)), {"repeats": None, "apart": None, "window": None}
ROWS = Do(lambda self, a: torch.sparse.mm(a, torch.ones(16, 3)))


@pytest.mark.filterwarnings("ignore:no window was sought", "ignore:Sparse CSR")
@pytest.mark.parametrize("make,order", [
    (plain(lambda: nn.Linear(16, 16), X, prepare=optimizer_in_backward), "shuffled"),
    (plain(lambda: nn.Embedding(9, 16, sparse=True), TOKENS), "shuffled"),
    (plain(lambda: nn.Sequential(ROWS, nn.Linear(3, 4)), torch.eye(16).to_sparse().requires_grad_()), "shuffled"),
    (per_sample, "shuffled"), (plain(lambda: nn.Sequential(nn.LazyLinear(16), nn.Linear(16, 4)), X), "shuffled"),
    (plain(lambda: nn.LSTM(16, 8), X, loss=lambda y: y[0].sum()), "shuffled"),
    (plain(lambda: nn.Sequential(nn.Embedding(9, 16), nn.Linear(16, 4)), TOKENS), "arrival"),
    (plain(lambda: nn.Linear(16, 16, dtype=torch.complex64), X.cfloat()), "shuffled")], ids=[
        "optimizer in backward", "sparse gradient", "sparse input", "torch.func", "lazy", "LSTM", "arrival and embedding", "complex"])
def test_training_of_every_kind_is_watched(make, order):
    assert ordered_reduce.audit_training(make, 2, order=order) == NOTHING


def test_training_without_layers_to_convert_is_answered():
    class Noisy(nn.LSTM):
        def forward(self, x):
            return super().forward(x)[0] + 1e-6 * torch.randn(1, generator=generator)

    generator = torch.Generator()
    generator.seed()
    found = ordered_reduce.audit_training(plain(lambda: Noisy(16, 8), X), 1)
    assert found["repeats"] == {"step": 0, "module": "", "pass": "output"} and found["window"] is None


def test_training_with_copies_of_nan_and_a_wrong_order():
    build = plain(lambda: nn.Sequential(Do(lambda self, x: x * torch.nan), nn.Linear(16, 4)), torch.ones(6, 16, requires_grad=True))
    assert ordered_reduce.audit_training(build, 1) == NOTHING
    with pytest.raises(ValueError, match="order must be one of .* got 'bogus'"):
        ordered_reduce.audit_training(lambda: pytest.fail("it ran"), 1, order="bogus")


def training(model, x=None, loss=lambda out: out.square().mean()):
    def make():
        made = model()
        optimizer = torch.optim.SGD(made.parameters(), lr=0.1)

        def step(number):
            optimizer.zero_grad()
            loss(made(torch.randn(6, 16) if x is None else x())).backward()
            optimizer.step()

        return made, step

    return make


def test_training_hands_on_what_modules_write_to():
    def gated(self, x, aux, cache):
        out = x * self.scale
        aux.append(out.square().mean() * (1 + self.generator.random()))
        cache["x"] = x
        return out

    def model():
        gate = Do(gated, scale=torch.ones(16), generator=np.random.default_rng())
        return Do(lambda self, x: (self.linear(self.gate(x, aux := [], cache := {})) + cache["x"], aux), gate=gate,
                  linear=nn.Linear(16, 16))

    make = training(model, loss=lambda out: out[0].square().mean() + sum(out[1]))
    assert ordered_reduce.audit_training(make, 2)["repeats"] == {"step": 0, "module": "gate", "pass": "gradient of scale"}


def test_training_tells_batches_from_a_models_own_noise():
    generator = np.random.default_rng()

    def own():
        return Do(lambda self, x: self.linear(jitter(self, x)), linear=nn.Linear(16, 4), generator=generator)

    def parametrized():
        return nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Linear(16, 16)), nn.Linear(16, 4))

    def batch():
        return torch.randn(6, 16) + generator.random()

    audit = ordered_reduce.audit_training
    assert audit(training(own), 2)["repeats"] == {"step": 0, "module": "linear", "pass": "input"}
    assert audit(training(own, batch), 2)["repeats"] == {"step": 0, "module": "", "pass": "input"}
    assert audit(training(lambda: nn.Linear(16, 4), batch), 2)["repeats"] == {"step": 0, "module": "", "pass": "input"}
    assert audit(training(parametrized, batch), 2)["repeats"] == {"step": 0, "module": "", "pass": "input"}


def test_training_notices_a_seed_of_whole_seconds():
    def model():
        torch.manual_seed(int(time.time()))
        return nn.Linear(16, 4)

    assert ordered_reduce.audit_training(training(model), 1)["repeats"]["pass"].startswith("initial ")


def test_training_judges_no_weight_whose_gradient_it_has_not_seen():
    def make():   # a constant scale, whose gradient differs from channel to channel by design
        model = Do(lambda self, x: self.linear(F.gelu(x * self.scale)), scale=torch.ones(16), linear=nn.Linear(16, 4))

        def step(number):
            gradients = torch.autograd.grad(model(torch.randn(6, 16)).square().mean(), list(model.parameters()))
            with torch.no_grad():
                for p, grad in zip(model.parameters(), gradients, strict=True):
                    p.sub_(1e-3 * grad)

        return model, step

    assert ordered_reduce.audit_training(make, 2)["apart"] is None


def test_training_may_save_its_model_and_mark_its_tensors(tmp_path):
    def marked(self, x):
        out = x * self.scale
        out.tag = 3
        return out

    model = nn.Sequential(Do(marked, scale=torch.ones(16)), nn.Linear(16, 4))
    tags = []

    def make():
        made = copy.deepcopy(model)

        def step(number):
            tags.append(made[0](torch.ones(2, 16)).tag)
            torch.save(made[1], tmp_path / "model.pt")
            made(torch.randn(6, 16)).square().mean().backward()

        return made, step

    assert ordered_reduce.audit_training(make, 1)["repeats"] is None and set(tags) == {3}


def test_training_names_a_buffer():
    """Which no gradient tells of."""
    generator = torch.Generator()
    generator.seed()

    def make():
        model, step = plain(lambda: nn.Sequential(nn.Linear(16, 16), nn.BatchNorm1d(16)), X)()

        def noisy(number):
            step(number)
            if number == 1:
                model[1].running_mean += torch.randn(16, generator=generator)
        return model, noisy

    assert ordered_reduce.audit_training(make, 3)["repeats"] == {"step": 1, "module": "1", "pass": "running_mean"}
    start = plain(lambda: nn.BatchNorm1d(16), X, prepare=lambda model: model.running_var.uniform_(generator=generator))
    assert ordered_reduce.audit_training(start, np.int64(1))["repeats"] == {"step": 0, "module": "", "pass": "initial running_var"}


@pytest.mark.parametrize("make,steps,said", [
    (lambda: nn.Linear(2, 2), 1, "make must return a Module and a function of the step's number; got Linear"),
    (lambda: (print, nn.Linear(2, 2)), 1, "make must return a Module"), (lambda: (ROWS, print), 1, "the same one twice"),
    (None, 2.5, "steps must be an integer of at least 1; got 2.5"), (None, "3", "steps must be .* got '3'")], ids=range(5))
def test_training_refuses_wrong_arguments(make, steps, said):
    with pytest.raises(ValueError, match=said):
        ordered_reduce.audit_training(make, steps)


@pytest.mark.filterwarnings("error:Dynamo")
def test_what_is_compiled():
    """Is audited as it is, but that a run with hooks in it, in training all, is as it is written."""
    compiled = []

    def backend(graph, inputs):
        compiled.append(graph)
        return graph.forward

    run = plain(lambda: torch.compile(nn.Sequential(nn.Linear(16, 16), nn.Dropout(0.5)), backend=backend), X)
    assert ordered_reduce.audit_training(run, 2)["repeats"] is None and not compiled
    report = ordered_reduce.audit(run()[0], X)
    assert compiled and {row["repeats"] for row in report} == {"yes"} and not failures(report, "error")


# ------------------------------------------------------------------------------------------- what must not go unnoticed


def test_a_module_runs_under_the_autocast_of_its_call():
    class Reduced(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(16, 16), nn.Linear(16, 16)
            self.jitter = Do(lambda self, x: jitter(self, x) if torch.is_autocast_enabled("cpu") else x,
                             generator=np.random.default_rng())
            self.outside = Do(lambda self, x: (seen.add((torch.is_autocast_enabled("cpu"), x.dtype)), x * 1)[1])

        def forward(self, x):
            with torch.autocast("cpu", torch.bfloat16):
                y = self.jitter(self.b(self.a(x)))
                with torch.autocast("cpu", enabled=False):
                    return self.outside(y.float())

    for outer in (False, True):
        seen = set()
        with torch.autocast("cpu", torch.bfloat16, enabled=outer):
            report = ordered_reduce.audit(Reduced(), X)
        assert {row["operation"] for row in report if row["repeats"] == "no"} == {"jitter (Do)", "the whole model (Reduced)"}
        assert not failures(report, "error")
        assert seen == {(False, torch.float32)}


def test_channels_of_layer_norms_are_last():
    for norm in (nn.LayerNorm(16), nn.RMSNorm(16)):
        assert channel_dims(norm, torch.ones(2, 3, 4, 16)) == (3,)


def test_every_run_has_the_seed():
    seeds = []

    def make():
        seeds.append(torch.initial_seed())
        model = nn.Linear(16, 4)
        return model, lambda number: model(X).sum().backward()

    ordered_reduce.audit_training(make, 1, seed=7)
    ordered_reduce.audit(Do(lambda self, x: (seeds.append(torch.initial_seed()), x * 1)[1]), X, seed=7)
    assert len(seeds) > 8 and set(seeds) == {7}


@pytest.mark.parametrize("few", [1, 7])
def test_two_smaller_batches_are_tried(few):
    row = ordered_reduce.audit(Do(lambda self, x: x * (ULP if len(x) == few else 1.0)), torch.randn(12, 16))[0]
    assert row["batch"] == "no" and row["failures"]["batch"][0].startswith(f"{few} of 12 samples")


def test_one_case_that_fails_is_enough(monkeypatch):
    monkeypatch.setitem(operations.OPERATIONS, "planted", (lambda input: torch.cat(
        [input[:, :1] * (ULP if input.shape[1] == 27 else 1.0), input[:, 1:]], 1), "n c", dict(input="n c")))
    row = operations.standard("cpu", "planted")[0]
    assert row["equal channels"] == "no" and len(row["failures"]["equal channels"]) == 1


def test_batch_norm_in_evaluation_has_samples():
    assert [ordered_reduce.audit(m, X)[0]["batch"] for m in (nn.BatchNorm1d(16), nn.BatchNorm1d(16).eval())] == ["-", "yes"]


class Pair(typing.NamedTuple):
    value: torch.Tensor
    other: torch.Tensor


def test_gradients_of_named_tuples_are_watched():
    first = Do(lambda self, x: Pair(x * self.scale, x.detach()), scale=torch.ones(16))
    both = Do(lambda self, x: UnequalBackward.apply(self.first(x).value), first=first)
    found = ordered_reduce.audit_training(symmetric("cpu", extra=[both]), 1)
    assert found["apart"].items() >= {"step": 0, "module": "6.first", "pass": "gradient of output"}.items()


def test_attention_is_watched():
    generator = torch.Generator()
    generator.seed()

    class Noisy(nn.MultiheadAttention):
        def forward(self, x):
            return super().forward(x, x, x)[0] + 1e-6 * torch.randn(1, generator=generator)

    make = plain(lambda: nn.Sequential(Noisy(16, 2), nn.Linear(16, 4)), X)
    assert ordered_reduce.audit_training(make, 1)["repeats"] == {"step": 0, "module": "0", "pass": "output"}


def test_the_models_own_order_is_not_the_windows():
    quiet = ordered_reduce.audit_training(symmetric("cpu"), 6)["window"]
    for layers in (["0", "6"], ["2", "4"]):
        own = symmetric("cpu", lambda model, layers=layers: ordered_reduce.convert(model, "shuffled", seed=1, layers=layers))
        assert ordered_reduce.audit_training(own, 6)["window"] == quiet


def test_the_windows_seed_is_the_calls(monkeypatch):
    given, convert = [], ordered_reduce.training.convert
    monkeypatch.setattr(ordered_reduce.training, "convert", lambda model, *arguments, **named: (
        given.append(arguments[1:]), convert(model, *arguments, **named))[1])
    ordered_reduce.audit_training(symmetric("cpu"), 2, splits=5, seed=7)
    assert {some for some in given if some} == {(5, 7)}


def test_steps_are_narrowed_for_the_layers_that_are_named():
    def make():
        torch.manual_seed(0)
        model = nn.ModuleDict({name: nn.Linear(8, 16) for name in "ab"})
        for p in model.parameters():
            nn.init.constant_(p, 0.1)
        x, y = torch.randn(24, 8), torch.randn(24, 1)

        def step(number):   # a learns from step 2 on, b from the first
            model.zero_grad()
            sum((model[name](x) * y).sum() for name in ("ab" if number >= 2 else "b")).backward()
            with torch.no_grad():
                for p in model.parameters():
                    p -= 0.1 * p.grad if p.grad is not None else 0

        return model, step

    assert ordered_reduce.audit_training(make, 4)["window"] == {"layers": ["a"], "steps": (2, 3)}


@pytest.mark.parametrize("scale", [1, 1e-30, 1e25])
def test_a_window_of_weights_whose_norm_is_no_number(scale):
    torch.manual_seed(0)
    start, x = torch.randn(1, 8), torch.randn(24, 8)

    def make():
        model = nn.Sequential(nn.Linear(8, 16, bias=False))
        with torch.no_grad():
            model[0].weight.copy_((start * scale).expand(16, 8))

        def step(number):
            model.zero_grad()
            (model(x).sum() * scale).backward()
            with torch.no_grad():
                model[0].weight -= 0.5 * model[0].weight.grad

        return model, step

    assert ordered_reduce.audit_training(make, 2)["window"] == {"layers": ["0"], "steps": (0, 1)}


@pytest.mark.parametrize("spread", [-0.1, math.nan, math.inf, "x", None])
def test_spread_is_checked(spread):
    with pytest.raises(ValueError, match="spread must be finite and at least 0; got"):
        ordered_reduce.audit_training(lambda: pytest.fail("it ran"), 1, spread=spread)


def test_what_differs_by_design_stays_so():
    deep = plain(lambda: nn.Sequential(nn.Linear(16, 16), nn.Tanh(), nn.Linear(16, 4)), X)
    assert ordered_reduce.audit_training(deep, 1)["apart"] is None
    make = plain(lambda: nn.Sequential(Do(lambda self, x: x[:, :1] + torch.arange(16) * 1e-6 ** (self.calls - 1)), nn.Linear(16, 4)), X)
    assert ordered_reduce.audit_training(make, 2)["apart"] is None
