"""`audit_training`: where does a training run first fail to repeat, where do equal channels first come apart, and how
little noise in the order of additions is enough for that?"""

import contextlib
import functools
import glob
import hashlib
import math
import numbers
import time
import warnings
import weakref

import torch
from torch import nn
from torch.nn.parameter import is_lazy
from torch.utils._pytree import tree_leaves

from .checks import bits, channel_dims, difference, first_channel, rounding, same_bits, seeded
from .layers import Policy, _convertible, convert


def _sides(t):
    """{dimension: whether the outputs or the inputs of a layer lie along it} of a parameter."""
    return {dim: side for dim, side in enumerate(("out", "in")) if dim < t.ndim}


class _Hook:
    """A hook that neither a copy of its module takes along nor a file that the module is saved to."""

    def __init__(self, call):
        self.call = call

    def __call__(self, *args):
        return self.call(*args)

    def __reduce__(self):
        return _Hook, (_nothing,)


def _nothing(*args):
    return None


@contextlib.contextmanager
def _watching(model, see):
    """While open, see(module, pass, tensor, sides) is told, in the order of their computation, what the model and every
    leaf module read, what those write, the gradients of both, and the gradients of parameters."""
    hooks = []

    def look(name, module, what, side, seen, held, t):
        """t as it is handed on. A list or a dict that holds it is the caller's: there it must stay the same tensor."""
        sides = dict.fromkeys(channel_dims(module, t), side)
        if id(t) not in seen:
            see(name, what, t, sides)
            seen[id(t)] = t
            plain = t.layout == torch.strided and not t.is_nested
            if plain and not held and t.requires_grad and torch.is_grad_enabled():
                # A view for every reader: the gradient that arrives is this reader's alone.
                seen[id(t)] = view = t.view_as(t)
                view.__dict__.update(t.__dict__)
                view.register_hook(lambda g: see(name, f"gradient of {what}", g, sides))
        return seen[id(t)]

    def each(look, value):
        if isinstance(value, torch.Tensor):
            return look(False, value)
        if type(value) is tuple or hasattr(value, "_make"):
            values = [each(look, v) for v in value]
            return tuple(values) if type(value) is tuple else value._make(values)
        for t in tree_leaves(value):
            if isinstance(t, torch.Tensor):
                look(True, t)
        return value

    def watch(name, module):
        def before(module, args, kwargs):
            see_it = functools.partial(look, name, module, "input", "in", {})
            return each(see_it, args), {key: each(see_it, value) for key, value in kwargs.items()}

        def after(module, args, output):
            return each(functools.partial(look, name, module, "output", "out", {}), output)

        hooks.extend([module.register_forward_pre_hook(_Hook(before), with_kwargs=True),
                      module.register_forward_hook(_Hook(after))])

    def read(module, args, kwargs):
        for t in tree_leaves((args, kwargs)):
            if isinstance(t, torch.Tensor):
                see("", "input", t, {})

    def accumulated(module, what, p):
        if p.grad is not None:   # a hook of the user's may have used it up
            see(module, f"gradient of {what}", p.grad, _sides(p))

    try:
        for name, module in model.named_modules():
            parts = {part for part, _ in module.named_children()} - {"parametrizations"}
            if isinstance(module, torch.jit.ScriptModule):   # it takes no such hooks
                continue
            if not parts or isinstance(module, nn.MultiheadAttention):
                watch(name, module)
            elif module is model:
                hooks.append(module.register_forward_pre_hook(_Hook(read), with_kwargs=True))
        for name, p in model.named_parameters():
            if p.requires_grad and not is_lazy(p):
                module, _, what = name.rpartition(".")
                hooks.append(p.register_post_accumulate_grad_hook(functools.partial(accumulated, module, what)))
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _made(make):
    """make()'s model and step, checked."""
    made = make()
    pair = isinstance(made, (tuple, list)) and len(made) == 2
    if not (pair and isinstance(made[0], nn.Module) and callable(made[1])):
        raise ValueError(f"make must return a Module and a function of the step's number; got {made!r:.100}")
    return made


def _train(make, steps, see, seed):
    """A run of make()'s; see(step, module, pass, tensor, sides) is told of everything, first of the initial weights.
    Returns a weak reference to the model."""
    with seeded(seed):
        model, step = _made(make)
        now = 0

        def weights(what):
            for name, t in (*model.named_parameters(), *model.named_buffers()):
                if not is_lazy(t):   # until its first input gives it a shape
                    sides = _sides(t) if isinstance(t, nn.Parameter) else {}
                    see(now, name.rpartition(".")[0], what + name.rpartition(".")[2], t, sides)

        weights("initial ")
        with _watching(model, lambda *event: see(now, *event)):
            for now in range(steps):
                step(now)
                weights("")
    return weakref.ref(model)


def _narrowest(n, suffices):
    """(first, end), 0 <= first < end <= n, that suffices and in which neither end can move. suffices(0, n) must hold,
    and suffices(a, b) must imply that all windows around it suffice."""
    no, end = 0, n
    while no + 1 < end:
        middle = (no + end) // 2
        no, end = (no, middle) if suffices(0, middle) else (middle, end)
    first, no = 0, end
    while first + 1 < no:
        middle = (first + no) // 2
        first, no = (middle, no) if suffices(middle, end) else (first, middle)
    return first, end


def _smallest_window(make, steps, order, splits, seed, spread):
    def run(layers, window):
        """The parameters after a run with `order` in the given layers and steps, fixed elsewhere."""
        with seeded(seed):
            model, step = _made(make)
            convert(model)
            policy = convert(model, order, splits, seed, layers=[glob.escape(name) for name in layers], steps=window)
            for number in range(steps):
                step(number)
                policy.step()
        return {name: p.detach() for name, p in model.named_parameters()}

    def apart(t, dim):
        differ = not same_bits(t, first_channel(t, dim))
        if not differ or not spread:   # norms of very small and very large numbers say nothing
            return differ
        return ((t - t.mean(dim, keepdim=True)).norm() / t.norm()).item() >= spread

    with seeded(seed):
        names = [name for name, module in make()[0].named_modules() if _convertible(module)
                 and not (order == "arrival" and isinstance(module, nn.Embedding))]
    if not names:
        return None
    quiet = run(names, (steps, steps + 1))
    kept = [(name, dim) for name, p in quiet.items() for dim in _sides(p)
            if p.shape[dim] > 1 and same_bits(p, first_channel(p, dim))]

    def suffices(layers, window):
        after = run(layers, window)
        return any(apart(after[name], dim) for name, dim in kept)

    if not kept or not suffices(names, (0, steps)):
        return None
    first, end = _narrowest(len(names), lambda a, b: suffices(names[a:b], (0, steps)))
    return {"layers": names[first:end], "steps": _narrowest(steps, lambda a, b: suffices(names[first:end], (a, b)))}


def audit_training(make, steps, *, order="shuffled", splits=8, seed=0, spread=0.0):
    """Looks for the first places where a training run does not repeat and where equal channels come apart.

    The run is made twice and watched: what every leaf module reads and writes, the gradients of both, the gradients of
    the parameters and the parameters and buffers after every step, in the order of their computation (of tensors in
    lists and dicts no gradients). The second run begins in another second of the clock, for seeds that come from it.
    For the window it is made about 2 log2(layers) + 2 log2(steps) times more, with all layers that `convert` knows
    converted.

    Not seen are tensors whose bytes PyTorch does not show (sparse ones, those within torch.func's transforms), the
    gradients that a hook of yours has used up before, those of lazy parameters, and what scripted modules read and
    write; the parameters after each step are. What torch.compile would compile is run as it is written. All runs are
    made in this process: what differs between processes only, as the order of a set of strings does unless
    PYTHONHASHSEED is set, goes unnoticed.

    Args:
      make: () -> (model, step), both new and in the same state at every call; step(i) does training step i (forward,
        backward, optimizer) on the same batch every time. PyTorch's generators are seeded before each call.
      steps: the number of steps of a run.
      order, splits, seed: the noise whose smallest window is sought, as in `convert`; seed is the generators' as well.
      spread: channels count as broken by a window where at the end of the run ||W - mean over channels|| / ||W|| of
        some parameter has reached this; 0: where a bit differs.

    Returns a dict of three, each None where there is nothing to report:
      "repeats": {"step", "module", "pass"}, the first tensor that had other bits in the second run. An "initial ..."
        pass is a parameter or buffer before training: its initialisation is not seeded; "input" of module "", which is
        the model: the batches are not the same.
      "apart": {"step", "module", "pass", "difference"}, the first tensor whose channels were copies and no longer are,
        and by how much, relative to its largest entry. "input" and "gradient of output" stand for what is computed
        between modules. Channels whose first difference exceeds the square root of the precision are taken to differ
        by design (classes, the colours of an image), unless a module keeps its input's shape, the input's channels
        are copies, and the output's are not (dropout).
      "window": {"layers": [names], "steps": (first, end)}, so that convert(model, order, layers=..., steps=...) with
        `fixed` everywhere else breaks channels that stay copies without it. The layers are consecutive ones of
        model.named_modules(), narrowed with the order in force at all steps; then the steps are narrowed. Neither end
        of either can move further. Both are found by bisection, which assumes monotony: that a window around a
        sufficient window suffices. There may be other windows, shorter ones too. None also where no channels stay
        copies without noise, where no layer can be converted (to "arrival" no embedding can), or, with a warning,
        where the run raises something once layers are converted.

    Raises ValueError for a wrong argument, TypeError for splits or a seed that is no integer, and what make and step
    raise.
    """
    if not isinstance(steps, numbers.Integral) or steps < 1:
        raise ValueError(f"steps must be an integer of at least 1; got {steps!r}")
    if not isinstance(spread, numbers.Real) or not 0 <= spread < math.inf:
        raise ValueError(f"spread must be finite and at least 0; got {spread!r}")
    Policy(order, splits, seed)   # refuses wrong arguments before the work is done
    events, differ, equal_input, graded = [], set(), {}, set()
    repeats = apart = None

    def digest(step, module, what, t):
        try:
            found = hashlib.blake2b(bits(t.detach().cpu()).numpy(), digest_size=8).digest()
        except RuntimeError:   # PyTorch has no bytes to show
            found = None
        return step, module, what, found

    def first_run(step, module, what, t, sides):
        nonlocal apart
        events.append(digest(step, module, what, t))
        readable = events[-1][-1] is not None
        if what.startswith("gradient of "):
            graded.add((module, what.removeprefix("gradient of ")))
        # After a step: what a gradient of unequal channels does, by design, may be small beside the weight.
        weight = what not in ("input", "output") and not what.startswith(("initial ", "gradient of "))
        for dim, side in sides.items() if readable and apart is None else ():
            t = t.detach()
            copies = t.shape[dim] < 2 or same_bits(t, first_channel(t, dim))
            if what == "input":
                equal_input[module] = t.shape if copies else None
            if copies or (module, side) in differ or (weight and (module, what) not in graded):
                continue
            size = difference(t, first_channel(t, dim))
            if size <= rounding(t) or (what == "output" and equal_input.get(module) == t.shape):
                apart = {"step": step, "module": module, "pass": what, "difference": size}
                return
            differ.add((module, side))

    def second_run(step, module, what, t, sides):
        nonlocal repeats
        if repeats is None and digest(step, module, what, t) != next(rest, None):
            repeats = {"step": step, "module": module, "pass": what}

    with torch.compiler.set_stance("force_eager"):   # a compiler would compile the hooks into what it makes
        second_of_start = int(time.time())
        first = _train(make, steps, first_run, seed)
        rest = iter(events)
        while int(time.time()) == second_of_start:
            time.sleep(0.01)
        second = _train(make, steps, second_run, seed)
        if first() is not None and first() is second():
            raise ValueError("make must return a new model at every call; got the same one twice")
        try:
            window = _smallest_window(make, steps, order, splits, seed, spread)
        except Exception as error:   # make and step ran twice without it: they cannot be run with layers converted
            warnings.warn(f"no window was sought: the run with converted layers raises {error!r}", stacklevel=2)
            window = None
    return {"repeats": repeats, "apart": apart, "window": window}
