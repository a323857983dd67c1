"""Does an operation repeat, and does it treat equals equally? `audit` asks that of every module of a model.

The checks compare bits, of the outputs (pass "forward") and of every gradient (pass "gradient of NAME"):

  repeats         the same input gives the same bits, run after run, with PyTorch's generators seeded before each.
  equal channels  inputs, weights and output gradients whose channels are copies give results whose channels are copies.
  batch           the first samples of a batch get the same bits when the others are left out.
  threads         one thread and two give the same bits (asked of the CPU alone).

Repeatable is not the same as treating equals equally: a kernel may compute the last few channels in another way.
"""

import contextlib
import copy
import dataclasses
import functools
import math
from collections.abc import Callable

import torch
from torch import nn
from torch.utils._pytree import tree_flatten, tree_leaves, tree_map_only, tree_unflatten

CHECKS = ("repeats", "equal channels", "batch", "threads")
REPEATS = 3   # runs of the same input


class Report(list):
    """What an audit found; print it for a table. A list of dicts, one for each operation, pass and device:

    "operation", "pass", "device"; under each name of CHECKS "yes", "no" or "-" (does not apply); and "failures":
    {check: the cases that failed, each with the largest difference, relative to the largest entry}. The table shows the
    first of them.
    """

    def __str__(self):
        head = ("operation", "pass", "device", *CHECKS, "first failure")
        lines = [head, *((*(row[key] for key in head[:-1]), "; ".join(f"{check}: {cases[0]}" for check, cases in
                                                                      row["failures"].items())) for row in self)]
        widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
        return "\n".join("  ".join(map(str.ljust, line, widths)).rstrip() for line in lines)


@dataclasses.dataclass
class Case:
    """One operation on one set of tensors. `channels` and `batch` are asked with the name of a tensor, "output" for the
    results, and with the tensor itself or its gradient."""
    name: str                # what a failure is called by
    function: Callable       # of the tensors, by keyword; returns tensors in any nest
    tensors: dict            # {name: tensor}; those that require a gradient get one
    channels: Callable       # (name, tensor) -> the dimensions along which equal channels must agree
    batch: Callable          # (name, tensor) -> the dimension of the samples, or None
    lenient: tuple = ()      # names whose channels may differ by design: only differences as small as rounding's count


def same_bits(a, b):
    def bits(t):
        return t.detach().contiguous().reshape(-1).view(torch.uint8)

    return a.shape == b.shape and torch.equal(bits(a), bits(b))


def difference(a, b):
    """The largest difference, relative to the largest entry of a; NaN where the shapes differ."""
    if a.shape != b.shape:
        return math.nan
    a, b = a.detach().double(), b.detach().double()
    return ((a - b).abs().max() / a.abs().max().clamp_min(1e-300)).item()


def rounding(t):
    """The largest relative difference that is taken for rounding: cancellation may have cost half of the digits."""
    return torch.finfo(t.dtype).eps ** 0.5


def first_channel(t, dim):
    """t with every channel replaced by the first: a view."""
    return t.narrow(dim, 0, 1).expand_as(t)


def channel_dims(module, t):
    """The dimension of an input or output of the module that holds its channels: (dim,), or () where there is none."""
    last = isinstance(module, (nn.Linear, nn.Bilinear, nn.LayerNorm, nn.RMSNorm, nn.Embedding, nn.EmbeddingBag,
                               nn.MultiheadAttention, nn.RNNBase))
    second = isinstance(module, (nn.modules.conv._ConvNd, nn.modules.batchnorm._NormBase, nn.GroupNorm, nn.MaxPool1d,
                                 nn.AvgPool1d, nn.AdaptiveAvgPool1d, nn.AdaptiveMaxPool1d))
    if t.ndim < 2 or not t.is_floating_point() or t.numel() == 0:
        return ()
    return (t.ndim - 1,) if last or (t.ndim == 3 and not second) else (1,)


@contextlib.contextmanager
def seeded(seed):
    """PyTorch's generators seeded, and afterwards as they were."""
    with torch.random.fork_rng(range(torch.cuda.device_count())):
        torch.manual_seed(seed)
        yield


def _equalised(t, dims):
    """A copy of t, laid out as t is, whose channels are copies of the first."""
    first = functools.reduce(first_channel, dims, t.detach())
    return torch.empty_like(t).copy_(first).requires_grad_(t.requires_grad)


def _run(case, tensors, gradients=None, seed=0):
    """({pass: [tensors]}, the gradients given to the outputs: drawn where none are given)."""
    leaves = {name: t.detach().clone().requires_grad_(t.requires_grad) for name, t in tensors.items()}
    with seeded(seed), torch.enable_grad():
        result = case.function(**{name: t.clone() for name, t in leaves.items()})   # clones: it may write to them
        outputs = [t for t in tree_leaves(result) if isinstance(t, torch.Tensor)]
        passes = {"forward": [t.detach().clone() for t in outputs]}
        if gradients is None:
            gradients = [torch.randn_like(t) if t.requires_grad else None for t in outputs]
        heads = [(t, g) for t, g in zip(outputs, gradients, strict=True) if t.requires_grad]
        wanted = [name for name, t in leaves.items() if t.requires_grad]
        if heads and wanted:
            got = torch.autograd.grad([t for t, _ in heads], [leaves[name] for name in wanted], [g for _, g in heads],
                                      allow_unused=True)
            passes |= {f"gradient of {name}": [g] for name, g in zip(wanted, got, strict=True) if g is not None}
    return passes, gradients


def check(case, seed=0):
    """{pass: {check: None where it holds, else the case and the difference}}; checks that do not apply are left out."""
    first, gradients = _run(case, case.tensors, seed=seed)
    found = {p: {} for p in first}
    device = next(iter(case.tensors.values())).device

    def run(tensors=case.tensors, gradients=gradients):
        return _run(case, tensors, gradients, seed)[0]

    def note(which, p, a, b, where=""):
        if found[p].get(which) is None:
            text = ", ".join(filter(None, (case.name, where)))
            found[p][which] = None if same_bits(a, b) else f"{text} ({difference(a, b):.0e})".strip()

    def compare(which, ours, theirs):
        for p in first:
            for a, b in zip(ours[p], theirs[p], strict=True):
                note(which, p, a, b)

    def named(p):
        return "output" if p == "forward" else p.removeprefix("gradient of ")

    for _ in range(REPEATS - 1):
        compare("repeats", first, run())
    if any(checks["repeats"] for checks in found.values()):
        return found     # every other comparison would find the same

    equal = run({name: _equalised(t, case.channels(name, t)) for name, t in case.tensors.items()},
                [g if g is None else _equalised(g, case.channels("output", g)) for g in gradients])
    mixed = any(t.numel() > 1 and not case.channels("output", t) for t in first["forward"])   # nn.Flatten and the like
    for p, results in equal.items():
        for t in results:
            for dim in case.channels(named(p), t):
                copies, lenient = first_channel(t, dim), mixed or named(p) in case.lenient
                if t.shape[dim] > 1 and not (lenient and difference(t, copies) > rounding(t)):
                    note("equal channels", p, t, copies)

    batched = {name: case.batch(name, t) for name, t in case.tensors.items()}
    sizes = {t.shape[batched[name]] for name, t in case.tensors.items() if batched[name] is not None}
    if len(sizes) == 1 and any(case.batch("output", t) is not None for t in first["forward"]):
        whole = sizes.pop()
        for few in sorted({n for n in (1, whole // 2 + 1) if n < whole}):
            def part(t, dim, few=few):
                return t if dim is None else t.detach().narrow(dim, 0, few).requires_grad_(t.requires_grad)

            try:
                less = run({name: part(t, batched[name]) for name, t in case.tensors.items()},
                           [g if g is None else part(g, case.batch("output", g)) for g in gradients])
            except (RuntimeError, ValueError, IndexError):   # it puts the samples elsewhere, or refuses fewer
                break
            for p in first:
                for a, b in zip(first[p], less[p], strict=True):
                    if case.batch(named(p), a) is not None:
                        note("batch", p, part(a, case.batch(named(p), a)), b, f"{few} of {whole} samples")

    if device.type == "cpu":
        before = torch.get_num_threads()
        try:
            for number in {1, 2} - {before}:
                torch.set_num_threads(number)
                compare("threads", first, run())
        finally:
            torch.set_num_threads(before)
    return found


def rows(operation, device, cases, seed=0, one=False):
    """The rows of a Report for one operation, from all its cases; with `one`, all gradients share a row. An operation
    that PyTorch refuses gives one row of "-"."""
    try:
        found = [check(case, seed) for case in cases]
    except (RuntimeError, TypeError, ValueError, IndexError) as error:
        return [{"operation": operation, "pass": "forward", "device": device, **dict.fromkeys(CHECKS, "-"),
                 "failures": {"error": [str(error).splitlines()[0]]}}]
    result = {}
    for p, checks in [(p, checks) for passes in found for p, checks in passes.items()]:
        name = "gradients" if one and p != "forward" else p
        row = result.setdefault(name, {"operation": operation, "pass": name, "device": device,
                                       **dict.fromkeys(CHECKS, "-"), "failures": {}})
        for which, failure in checks.items():
            if failure:
                row["failures"].setdefault(which, []).append(failure if name == p else f"{p} {failure}")
            row[which] = "no" if failure or row[which] == "no" else "yes"
    return list(result.values())


def _module_case(module, args, kwargs, container):
    flat, spec = tree_flatten((args, kwargs))
    places = [i for i, value in enumerate(flat) if isinstance(value, torch.Tensor)]
    inputs = {"input" if n == 0 else f"input {n}": flat[i] for n, i in enumerate(places)}
    held = {**dict(module.named_parameters()), **dict(module.named_buffers())}
    sample = int(getattr(module, "batch_first", True) is False)   # the dimension of the samples; of hidden states, 1
    samples = (sample, 1) if isinstance(module, nn.RNNBase) else (sample,)
    coupled = any(isinstance(m, nn.modules.batchnorm._BatchNorm) and m.training for m in module.modules())
    some = next(iter(inputs.values()), None)
    size = some.shape[sample] if some is not None and some.ndim > sample and not coupled else None

    def function(**tensors):
        values = list(flat)
        for name, i in zip(inputs, places, strict=True):
            values[i] = tensors[name]
        args, kwargs = tree_unflatten(values, spec)
        return torch.func.functional_call(module, {name: tensors[name] for name in held}, args, kwargs)

    def channels(name, t):
        if name in held:   # a weight is (out, in, ...), any other parameter (channels, ...)
            return range(min(2, t.ndim)) if t.is_floating_point() and t.numel() else ()
        if name == "output" and some is not None and some.is_floating_point() and some.ndim != t.ndim:
            return ()
        return channel_dims(module, t)

    def batch(name, t):
        return next((dim for dim in samples if name not in held and t.ndim > dim and t.shape[dim] == size), None)

    for t in inputs.values():
        t.requires_grad_(t.is_floating_point())
    lenient = (*held, *inputs, "output") if container else tuple(held)
    return Case("", function, {**inputs, **held}, channels, batch, lenient)


def audit(model, input, *, device=None, seed=0):
    """Checks every module of a model, forward and backward, in the mode (training or not) that it is in.

    The model runs once; then every leaf module is run alone on the input it got, with random gradients for its outputs,
    and put to the checks that are named at the top of this file. A row for the whole model follows. Other modules get
    rows where they fail a check that nothing inside them fails: the culprit is then in the code of their forward. It
    takes about seven runs of every module, and a copy of what each of them reads.

    Args:
      model: nn.Module. It is left as it was: parameters, buffers and PyTorch's generators do not change.
      input: its input; a tuple for several positional arguments, a dict for keyword arguments. The first dimension is
        the samples (the second where a module has batch_first=False), the second the channels (the last for linear
        layers, layer norms, embeddings, attention, and three-dimensional tensors that are not a 1-d convolution's).
      device: "cpu", "cuda", ...: where a copy of the model is to be checked; None: where its input is.
      seed: of PyTorch's generators, set before each run: a module that then differs from run to run draws its noise
        elsewhere, or from the order in which threads arrive.

    Returns a Report; print it. Channels of parameter gradients may differ by design (the rows of an embedding, the
    gates of an LSTM): there, and in modules made of others, only differences as small as rounding's count. Raises what
    the model raises, and TypeError where model is no module.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"audit(): argument 'model' must be Module, not {type(model).__name__}")
    args, kwargs = ((), input) if isinstance(input, dict) else (input if isinstance(input, tuple) else (input,), {})
    if device is not None:
        model = copy.deepcopy(model).to(device)
        args, kwargs = tree_map_only(torch.Tensor, lambda t: t.to(device), (args, kwargs))
    calls = {}

    def remember(name, module, args, kwargs):
        calls.setdefault(name, tree_map_only(torch.Tensor, lambda t: t.detach().clone(), (args, kwargs)))

    modules = dict(model.named_modules())
    hooks = [module.register_forward_pre_hook(functools.partial(remember, name), with_kwargs=True)
             for name, module in modules.items()]
    try:
        with seeded(seed), torch.no_grad():
            buffers = {name: t.clone() for name, t in model.named_buffers()}
            torch.func.functional_call(model, buffers, args, kwargs)
    finally:
        for hook in hooks:
            hook.remove()

    found = {}
    for name in reversed(calls):   # the inner ones first
        inside = [row for other in found if other.startswith(f"{name}." if name else "") for row in found[other]]
        case = _module_case(modules[name], *calls[name], container=bool(inside))
        if case.tensors:
            label = f"{name or 'the whole model'} ({type(modules[name]).__name__})"
            found[name] = rows(label, str(next(iter(case.tensors.values())).device), [case], seed, one=bool(inside))
        blamed = {check for row in inside for check in row["failures"]}
        if name and inside and all(row["failures"].keys() <= blamed for row in found[name]):
            found[name] = []
    return Report(row for name in [*list(calls)[1:], ""] for row in found.get(name, ()))
