"""Does an operation repeat, and does it treat equals equally? `audit` asks that of every module of a model.

The checks compare bits, of the outputs (pass "forward") and of every gradient (pass "gradient of NAME"):

  repeats         the same input gives the same bits in three runs, with PyTorch's generators seeded before each.
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
import numbers
import traceback
from collections.abc import Callable, Mapping

import torch
from torch import nn
from torch.nn.parameter import is_lazy
from torch.utils._pytree import tree_flatten, tree_leaves, tree_map_only, tree_unflatten

from .layers import WITH_AUTOCAST

CHECKS = ("repeats", "equal channels", "batch", "threads")
REPEATS = 3   # runs of the same input, unless told otherwise
TRANSFORMERS = (nn.TransformerEncoder, nn.TransformerDecoder, nn.TransformerEncoderLayer, nn.TransformerDecoderLayer)


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
    function: Callable       # (then, **tensors) -> then(its results, tensors in any nest)
    tensors: dict            # {name: tensor}; those that require a gradient get one
    channels: Callable       # (name, tensor) -> the dimensions along which equal channels must agree
    batch: Callable          # (name, tensor) -> the dimension of the samples, or None
    lenient: tuple = ()      # names whose channels may differ by design: only differences as small as rounding's count
    parts: bool = False      # made of others: of few samples the second draws other random numbers than of many


def bits(t):
    """The bytes of a tensor, of whatever layout in memory."""
    return t.detach().resolve_conj().resolve_neg().contiguous().reshape(-1).view(torch.uint8)


def same_bits(a, b):
    return a.shape == b.shape and torch.equal(bits(a), bits(b))


def difference(a, b):
    """The largest difference, relative to the largest entry of a; NaN where the shapes differ."""
    if a.shape != b.shape:
        return math.nan
    a, b = (t.detach() if t.is_complex() or t.dtype == torch.float64 else t.detach().float() for t in (a, b))
    return ((a - b).abs().max() / a.abs().max().clamp_min(torch.finfo(a.dtype).tiny)).item()


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
    if t.layout != torch.strided or t.ndim < 2 or not t.is_floating_point() or t.numel() == 0:
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


def _dense(t):
    return t.detach().clone() if t.layout == torch.strided else t.detach().to_dense()


def _run(case, tensors, given=None, seed=0):
    """({pass: [tensors]}, the gradients given to the outputs: drawn where none are given; whether a case of parts drew
    anything). Gradients that do not fit the outputs are given to none."""
    leaves = {name: t.detach().clone().requires_grad_(t.requires_grad) for name, t in tensors.items()}

    def differentiate(result):   # while a module has these tensors: a checkpoint runs parts of it once more
        outputs = [t for t in tree_leaves(result) if isinstance(t, torch.Tensor)]
        passes = {"forward": [_dense(t) for t in outputs]}
        values = [float(value) for value in tree_leaves(result) if isinstance(value, numbers.Real)]
        if values:   # beside the tensors
            passes["numbers"] = [torch.tensor(values, dtype=torch.float64)]
        drawn = [torch.randn_like(t) if t.requires_grad else None for t in outputs] if given is None else given
        if [g is not None and g.shape for g in drawn] != [t.requires_grad and t.shape for t in outputs]:
            return passes, drawn
        heads = [(t, g) for t, g in zip(outputs, drawn, strict=True) if t.requires_grad]
        wanted = [name for name, t in leaves.items() if t.requires_grad]
        if heads and wanted:
            got = torch.autograd.grad([t for t, _ in heads], [leaves[name] for name in wanted],
                                      [g.clone() for _, g in heads], allow_unused=True)   # a backward may write to them
            passes |= {f"gradient of {name}": [_dense(g)] for name, g in zip(wanted, got, strict=True) if g is not None}
        return passes, drawn

    def generators():   # asked only where the answer is
        return [torch.get_rng_state(), *torch.cuda.get_rng_state_all()] if case.parts else []

    with seeded(seed), torch.enable_grad():
        before = generators()
        found = case.function(differentiate, **{name: t.clone() for name, t in leaves.items()})   # it may write to them
        return *found, not all(map(torch.equal, before, generators()))


def check(case, seed=0, repeats=REPEATS):
    """{pass: {check: None where it holds, else the case and the difference}}; checks that do not apply are left out."""
    first, gradients, _ = _run(case, case.tensors, seed=seed)
    draws = False
    found = {p: {} for p in first}
    device = next((t.device for t in (*case.tensors.values(), *first["forward"])), torch.device("cpu"))

    def run(tensors=case.tensors, gradients=gradients):
        nonlocal draws
        found, _, draws = _run(case, tensors, gradients, seed)
        return found

    def note(which, p, a, b, where=""):
        if found.setdefault(p, {}).get(which) is None:
            text = ", ".join(filter(None, (case.name, where)))
            found[p][which] = None if same_bits(a, b) else f"{text} ({difference(a, b):.0e})".strip()

    def compare(which, again):
        for p in {**first, **again}:
            if len(first.get(p, ())) != len(again.get(p, ())):   # a random branch: other outputs or gradients
                found.setdefault(p, {})[which] = f"{case.name} (not in every run)".strip()
            else:
                for a, b in zip(first.get(p, ()), again.get(p, ()), strict=True):
                    note(which, p, a, b)

    def named(p):
        return "output" if p == "forward" else p.removeprefix("gradient of ")

    for _ in range(repeats - 1):
        compare("repeats", run())
    if any(checks.get("repeats") for checks in found.values()):
        return found     # every other comparison would find the same

    # What the module refuses, or what only other data lead to, does not apply: here and in smaller batches.
    try:
        equal = run({name: _equalised(t, case.channels(name, t)) for name, t in case.tensors.items()},
                    [g if g is None else _equalised(g, case.channels("output", g)) for g in gradients])
    except Exception:
        equal = {}
    mixed = any(not case.channels("output", t) for t in first["forward"])   # nn.Flatten, losses and the like
    for p in first:
        for t in equal.get(p, ()):
            for dim in case.channels(named(p), t):
                copies, lenient = first_channel(t, dim), mixed or named(p) in case.lenient
                if t.shape[dim] > 1 and not (lenient and difference(t, copies) > rounding(t)):
                    note("equal channels", p, t, copies)

    batched = {name: case.batch(name, t) for name, t in case.tensors.items()}
    sizes = {t.shape[batched[name]] for name, t in case.tensors.items() if batched[name] is not None}
    cut = [case.batch("output", t) is not None for t in first["forward"]]
    if len(sizes) == 1 and any(cut) and not draws:
        whole = sizes.pop()
        # Where an output is one number for the whole batch, a mean, gradients depend on the batch's size by definition.
        asked = [p for p in first if p == "forward" or all(c or g is None for c, g in zip(cut, gradients, strict=True))]
        for few in sorted({n for n in (1, whole // 2 + 1) if n < whole}):
            def part(t, dim, few=few):
                return t if dim is None else t.detach().narrow(dim, 0, few).requires_grad_(t.requires_grad)

            try:
                less = run({name: part(t, batched[name]) for name, t in case.tensors.items()},
                           [g if g is None else part(g, case.batch("output", g)) for g in gradients])
            except Exception:   # or it puts the samples elsewhere
                break
            for p in asked:
                for a, b in zip(first[p], less.get(p, ()), strict=False):
                    dim = case.batch(named(p), a)
                    if dim is not None and part(a, dim).shape == b.shape:
                        note("batch", p, part(a, dim), b, f"{few} of {whole} samples")

    if device.type == "cpu":
        before = torch.get_num_threads()
        try:
            for number in {1, 2} - {before}:
                torch.set_num_threads(number)
                compare("threads", run())
        finally:
            torch.set_num_threads(before)
    return found


def rows(operation, device, cases, seed=0, repeats=REPEATS, one=False):
    """The rows of a Report for one operation, from all its cases; with `one`, all gradients share a row. An operation
    that raises something gives one row of "-"."""
    try:
        found = [check(case, seed, repeats) for case in cases]
    except Exception as error:   # a module run alone may raise anything, and the others are still to be checked
        said = traceback.format_exception_only(error)[0].splitlines()[0]
        return [{"operation": operation, "pass": "forward", "device": device, **dict.fromkeys(CHECKS, "-"),
                 "failures": {"error": [said]}}]
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


class _Then(nn.Module):
    """(then, ...) -> then(module(...)), both with the tensors that torch.func.functional_call puts into the module,
    which runs under this autocast."""

    def __init__(self, module, autocast):
        super().__init__()
        self.module, self.autocast = module, autocast

    def forward(self, then, /, *args, **kwargs):
        with contextlib.ExitStack() as stack:
            for device, (enabled, dtype) in self.autocast.items() - _autocast_now().items():
                stack.enter_context(torch.autocast(device, dtype, enabled))
            result = self.module(*args, **kwargs)
        return then(result)


def _autocast_now():
    """{kind of device: (whether autocast is on there, its dtype)}."""
    return {device: (torch.is_autocast_enabled(device), torch.get_autocast_dtype(device)) for device in WITH_AUTOCAST}


def _copy(module):
    """A copy, with what the module has kept from its calls but without that one's history."""
    kept = [v for m in module.modules() for v in tree_leaves(vars(m)) if isinstance(v, torch.Tensor) and v.grad_fn]
    return copy.deepcopy(module, {id(v): v.detach().clone() for v in kept})


def _copied(module):
    """The same, or the module itself, where it holds what cannot be copied, such as a lock."""
    try:
        return _copy(module)
    except Exception:   # whatever its parts raise
        return module


def each_once(change, nest):
    """The nest with change(t) for every tensor t; one that stands at several places in it still does."""
    return tree_map_only(torch.Tensor, functools.cache(change), nest)


def _module_cases(module, args, kwargs, autocast, container, weight, gradients):
    """The Case of a module on this input, of which all that can have one get a gradient, or those that had in its call.
    A generator, so that `rows` reports what even this raises."""
    flat, spec = tree_flatten((args, kwargs))
    places = {}   # {tensor: where it stands in flat}
    for i, value in enumerate(flat):
        if isinstance(value, torch.Tensor):
            places.setdefault(value, []).append(i)
    module = _copied(module)
    held = {**dict(module.named_parameters()), **dict(module.named_buffers())}

    def read(t):
        able = t.is_floating_point() and t.layout == torch.strided
        return t.detach().requires_grad_(able if gradients else t.requires_grad)

    inputs = {f"input {n}" if n or "input" in held else "input": read(t) for n, t in enumerate(places)}
    some = next(iter(inputs.values()), None)

    def axes(name, t):   # of a parameter: all hold channels, but for the pixels of a convolution's weight
        pixels = isinstance(module.get_submodule(name.rpartition(".")[0]), nn.modules.conv._ConvNd)
        return range(min(2, t.ndim) if pixels else t.ndim) if t.is_floating_point() and t.numel() else ()

    widths = {t.shape[dim] for name, t in held.items() for dim in axes(name, t)}
    widths |= {some.shape[dim] for dim in channel_dims(module, some)} if some is not None else set()
    # Of PyTorch's transformers only the attention inside knows where the samples are.
    where = module.modules() if isinstance(module, TRANSFORMERS) else [module]
    sample = int(next((m.batch_first for m in where if hasattr(m, "batch_first")), True) is False)
    samples = (sample, int(isinstance(module, nn.RNNBase)))   # their dimension; else of hidden states, attention maps
    coupled = weight or any(isinstance(m, nn.modules.batchnorm._BatchNorm) and m.training for m in module.modules())
    size = some.shape[sample] if some is not None and some.ndim > sample and not coupled else None

    def function(then, /, **tensors):
        values = list(flat)
        for name, at in zip(inputs, places.values(), strict=True):
            for i in at:
                values[i] = tensors[name]
        args, kwargs = tree_unflatten(values, spec)
        return torch.func.functional_call(_Then(module, autocast), {f"module.{name}": tensors[name] for name in held},
                                          (then, *args), kwargs)

    def channels(name, t):
        if name in held:
            return axes(name, t)
        if name == "output" and some is not None and some.is_floating_point() and some.ndim != t.ndim:
            return ()
        return [dim for dim in channel_dims(module, t) if t.shape[dim] in widths]

    def batch(name, t):
        return next((dim for dim in samples if name not in held and t.ndim > dim and t.shape[dim] == size), None)

    if some is not None and some.shape.count(size) > 1 and sum(batch(*item) is not None for item in inputs.items()) > 1:
        size = None   # (T, T) masks of T samples: which inputs hold samples cannot be told
    mixes = container or isinstance(module, nn.MultiheadAttention) or getattr(module, "bidirectional", False)
    lenient = (*held, *inputs, "output") if mixes else tuple(held)
    yield Case("", function, {**inputs, **held}, channels, batch, lenient, container)


def audit(model, input, *, device=None, seed=0, repeats=REPEATS):
    """Checks every module of a model, forward and backward, in the mode (training or not) that it is in.

    The model runs once; then every leaf module is run alone on the input it got in its first call, with random
    gradients for its outputs, and put to the checks that are named at the top of this file. A row for the whole model
    follows. Other modules get rows where they fail a check that nothing inside them fails: the culprit is then in the
    code of their forward. It takes about seven runs of every module, also of those made of others (a module within ten
    others runs some seventy times), and copies of it and of what it reads.

    Args:
      model: nn.Module. It is left as it was, since a copy is run (the model itself only where Python cannot copy it,
        with other parameters and buffers: what else it keeps from a call stays then).
      input: its input; a tuple for several positional arguments, a mapping for keyword arguments. It is not written to,
        but for tensors in objects that PyTorch's pytrees do not see into.
        The first dimension is the samples (the second where a module has batch_first=False), the second the channels
        (the last for linear layers, layer norms, embeddings, attention, and three-dimensional tensors that are not a
        1-d convolution's).
      device: "cpu", "cuda", ...: where the model is to be checked; None: where its input is.
      seed: of PyTorch's generators, set before each run: a module that then differs from run to run draws its noise
        elsewhere, or from the order in which threads arrive, or it keeps something from call to call other than in a
        buffer (a counter, a hidden state), which need not keep a training run from repeating.
      repeats: how often each module runs for the first check. "yes" says that so many runs had the same bits: what
        happens in one run of a hundred, as a race may, wants more.

    Returns a Report; print it. Channels may differ by design: in parameter gradients (the rows of an embedding, the
    gates of an LSTM), in modules made of others, in attention, in bidirectional layers, and where an output has no
    dimension of channels, one as long as the first input's or one of a parameter's (losses, nn.GLU, nn.PixelShuffle).
    There only differences as small as rounding's count. A module that mixes its channels in another way gets a "no".

    Besides, "-" stands where a module run alone raises something (the row names it), where its outputs are no tensors
    that PyTorch's pytrees see, where equal channels or fewer samples take another branch, and under "batch" where one
    of several inputs may hold samples or not, another dimension being as long as the batch: (T, T) masks of T samples.
    So it does under "batch" for modules made of others that draw random numbers. Scripted modules have no rows, nor
    have those that are called within torch.func's transforms alone; the modules that they are part of have. Numbers
    that a module returns have a row of their own. Not seen are noise in the hooks of parameters, parameters that a
    module keeps in a list of Python's, and what depends on the clock, such as a seed of whole seconds.

    Raises what the model raises, TypeError where model is no module, and ValueError for a scripted model or a
    DataParallel, where there is no tensor at all, or repeats is no integer of at least 2.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"audit(): argument 'model' must be Module, not {type(model).__name__}")
    if isinstance(model, (torch.jit.ScriptModule, nn.DataParallel)):
        raise ValueError(f"model must be what was scripted or is held in .module; got a {type(model).__name__}")
    if not isinstance(repeats, numbers.Integral) or repeats < 2:
        raise ValueError(f"repeats must be an integer of at least 2; got {repeats!r}")
    args, kwargs = (input if type(input) is tuple else (input,)), {}
    if isinstance(input, Mapping):
        args, kwargs = (), dict(input)
    model = _copied(model) if device is None else _copy(model).to(device)
    if device is not None:
        args, kwargs = each_once(lambda t: t.to(device), (args, kwargs))
    state = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    if not any(isinstance(t, torch.Tensor) for t in (*state.values(), *tree_leaves((args, kwargs)))):
        raise ValueError(f"input must hold a tensor where the model has none; got {input!r}")
    calls = {}

    def fresh(t):   # written to, it leaves t as it is; and so does a backward pass within the model
        return t.detach().requires_grad_(t.requires_grad).clone()

    def given(t):
        return t.detach().clone().requires_grad_(t.requires_grad)

    def remember(name, module, args, kwargs):   # within a transform of torch.func there are no tensors to keep
        if name not in calls and not torch._C._are_functorch_transforms_active():
            calls[name] = *each_once(given, (args, kwargs)), _autocast_now()

    modules, hooks = dict(model.named_modules()), []
    try:
        for name, module in modules.items():
            if not isinstance(module, torch.jit.ScriptModule):   # it takes no such hooks
                hooks.append(module.register_forward_pre_hook(functools.partial(remember, name), with_kwargs=True,
                                                              prepend=True))   # what the model's own hooks are given
        # Gradients for models that differentiate in their forward; a compiler would compile the hooks.
        with seeded(seed), torch.enable_grad(), torch.compiler.set_stance("force_eager"):
            args, kwargs = each_once(fresh, (args, kwargs))
            state = {name: fresh(t) for name, t in state.items() if not is_lazy(t)}
            torch.func.functional_call(model, state, args, kwargs)
    finally:
        for hook in hooks:
            hook.remove()

    found = {}
    within = {name: set(map(id, modules[name].modules())) for name in calls}   # a module may be in several others
    for name in sorted(calls, key=lambda name: len(within[name])):   # the inner ones first
        module, weight = modules[name], "parametrizations" in name.split(".")   # it reads a weight: no samples
        inside = [row for other in found if id(modules[other]) in within[name] for row in found[other]]
        tensors = (*tree_leaves(calls[name]), *module.parameters(), *module.buffers())
        device = next((str(t.device) for t in tensors if isinstance(t, torch.Tensor)), "-")
        for gradients in (True, False):   # an input that wants a gradient cannot become a NumPy array
            cases = _module_cases(module, *calls[name], bool(inside), weight, gradients)
            found[name] = rows(f"{name or 'the whole model'} ({type(module).__name__})", device, cases, seed, repeats,
                               one=bool(inside))
            if "error" not in found[name][0]["failures"]:
                break
        blamed = {check for row in inside for check in row["failures"]}
        if name and inside and all(row["failures"].keys() <= blamed for row in found[name]):
            found[name] = []
    return Report(row for name in [*list(calls)[1:], ""] for row in found.get(name, ()))
