"""`sum` and `index_add` with the order of additions as an argument. Every order is defined in ../order.h, exact.h."""

import importlib.machinery
import math
import numbers
import operator
import pathlib

import torch
from torch.autograd import forward_ad

from . import tape

ORDERS = ("fixed", "shuffled", "atomic", "exact")
SUM_ORDERS = (*ORDERS, "arrival")
SCOPES = ("output", "tensor")
DTYPES = (torch.float32, torch.float64, torch.float16, torch.bfloat16)
MOST_SHUFFLED = 1 << 18   # 16 bits of the Philox counter number its 4-word blocks

_built = [path for path in sorted(pathlib.Path(__file__).parent.glob("_C.*"))
          if path.name.endswith(tuple(importlib.machinery.EXTENSION_SUFFIXES))]
if not _built:
    raise ImportError("ordered_reduce is not compiled: run `pip install -e csrc` in the environment that has PyTorch")
torch.ops.load_library(_built[0])


_cuda_built = torch.ops.ordered_reduce.cuda_built()   # asked once: torch.compile cannot trace one that gives a bool


def cuda_built():
    """True where the CUDA kernels were compiled in."""
    return _cuda_built


def check_order(order, splits, seed, op, scope, orders=ORDERS):
    """Raises ValueError, TypeError for what is no integer, naming the argument, its value and what would be valid."""
    if order not in orders:
        raise ValueError(f"order must be one of {', '.join(orders)}; got {order!r}")
    if scope not in SCOPES:
        raise ValueError(f"scope must be one of {', '.join(SCOPES)}; got {scope!r}")
    if type(splits) is not int:   # a call more takes a percent of a small sum's time
        check_integer("splits", splits)
    if not 1 <= splits < 1 << 63:
        raise ValueError(f"splits must lie in [1, 2**63); got {splits}")
    if order == "shuffled" and splits > MOST_SHUFFLED:
        raise ValueError(f"splits must be at most {MOST_SHUFFLED} with order='shuffled'; got {splits}")
    check_key(seed, op)


def check_integer(name, value):
    if not isinstance(value, (numbers.Integral, torch.SymInt)):
        raise TypeError(f"{name} must be an integer; got {value!r}")


def check_key(seed, op):
    """Raises ValueError, TypeError for what is no integer, naming the argument, its value and what would be valid."""
    if not type(op) is type(seed) is int:
        check_integer("op", op), check_integer("seed", seed)
    if not 0 <= op < 1 << 32:
        raise ValueError(f"op must lie in [0, 2**32); got {op}")
    if not -1 << 63 <= seed < 1 << 63:
        raise ValueError(f"seed must be a signed 64-bit integer; got {seed}")


def check_tensor(function, name, x):
    """Raises where x is no tensor, not of a dtype that can be summed, or on CUDA without the CUDA kernels."""
    if not isinstance(x, torch.Tensor):
        raise TypeError(f"{function}(): argument '{name}' must be Tensor, not {type(x).__name__}")
    if x.dtype not in DTYPES:
        raise NotImplementedError(f"ordered_reduce.{function} is not implemented for {name} of dtype {x.dtype}: give "
                                  "it a floating-point tensor (float32, float64, float16 or bfloat16)")
    if x.is_cuda and not cuda_built():
        raise RuntimeError(f"ordered_reduce was built for the CPU alone, but {name} is on CUDA: put nvcc on PATH (or "
                           "set CUDA_HOME) and run `pip install -e csrc --force-reinstall --no-deps`")


def order_arguments(x, order, splits, seed, step, op, scope, name="x"):
    """The order arguments of a sum of x, which errors call name, as the operators take them. An argument more takes
    longer: few for fixed."""
    key = _step(step, order, name, x)
    return (splits,) if order == "fixed" else (splits, ORDERS.index(order), scope == "output", seed, key, op)


def _step(step, order, name, x):
    """step as the operators take it."""
    if not isinstance(step, (int, torch.Tensor)):
        step = operator.index(step)   # not of an int, of which torch.compile would take the value
    if isinstance(step, int):
        if not 0 <= step < 1 << 32:
            raise ValueError(f"step must lie in [0, 2**32); got {step}")
        return torch.full((), step, dtype=torch.int64, device="cpu") if order == "shuffled" else None
    if step.dtype != torch.int64 or step.numel() != 1:
        raise ValueError("step must be an int or a tensor of one int64; got a tensor of shape "
                         f"{tuple(step.shape)} and dtype {step.dtype}")
    if step.device.type != "cpu" and step.device != x.device:
        raise RuntimeError("Expected all tensors to be on the same device, but found step on "
                           f"{step.device} and {name} on {x.device}")
    return step


def _mask(dim, ndim):
    """The dimensions to sum as the operators take them, since a list takes longer than a small sum: bit d is d's. (-1
    is all.)"""
    if isinstance(dim, int) and 0 <= dim < ndim:
        return 1 << dim
    mask = 0
    for d in _dims(dim, ndim):
        mask |= 1 << d
    return mask


def _dims(dim, ndim):
    given = list(dim) if isinstance(dim, (tuple, list)) else [dim]
    if not given:
        return list(range(ndim))
    dims, low, high = [], -max(ndim, 1), max(ndim, 1) - 1
    for d in map(operator.index, given):
        if not low <= d <= high:
            raise IndexError(f"Dimension out of range (expected to be in range of [{low}, {high}], but got dim={d})")
        d = d % max(ndim, 1)
        if d in dims:
            raise RuntimeError(f"dim={d} appears multiple times in the list of dims {dim}")
        dims.append(d)
    return dims if ndim else []


def sum(x, dim=None, keepdim=False, *, order="fixed", splits=8, seed=0, step=0, op=0, scope="output"):
    """Sum of x over dim, with the order of the additions as an argument.

    The terms of one output, in index order, are cut into `splits` consecutive groups as torch.tensor_split cuts them
    (fewer where there are fewer terms). Each group is summed by a fixed pairwise tree; then the groups' partial sums
    are added one after the other:

      fixed      in index order. The same bits in every run, on any device, with any threads, strides or shape around.
      shuffled   in a random permutation, a function of (seed, step, op) and, with scope "output", of the position of
                 the output in the result; with scope "tensor" all outputs share one permutation. The same bits for
                 the same arguments, on any device.
      atomic     as hardware gets to them: atomicAdd on CUDA, threads racing on the CPU. Not repeatable, on purpose.
      exact      not at all: the sum of all terms without rounding, then rounded once to the dtype of x (to nearest,
                 ties to even). The same bits for any order of the terms, on any device; splits, seed, step, op and
                 scope do not matter. Nothing overflows on the way; infinities, NaN and signed zeros as IEEE 754 adds
                 them.
      arrival    in the order in which workers (threads, blocks of a GPU) were done with them: a race as in atomic, but
                 every 32 consecutive outputs share an order, so that it can be kept: under `record` it is written to a
                 file, under `replay` read from one; else it does not repeat. One thread arrives in fixed order.
                 torch.compile leaves it out of its graphs, and raises an error with fullgraph=True.

    Args:
      x: floating-point tensor of any shape and strides. float16 and bfloat16 are accumulated in float32 (exact:
        exactly) and rounded once. A sum of nothing is 0; NaN and infinity propagate.
      dim: int, tuple of ints, or None for all dimensions, as in torch.sum.
      keepdim: keep the summed dimensions with size 1.
      splits: G, the number of groups; 2 cannot make noise (a + b = b + a), from 3 on it grows as about sqrt(G). Of a
        sum to few outputs a CPU keeps up to 256 bytes (float64: 512) for every group.
      seed, step, op: 64-bit, 32-bit, 32-bit keys of the permutation. step may be a one-element int64 tensor, so that a
        compiled program can advance it; one on the device of x is read there, which a captured CUDA graph needs.
      scope: "output" or "tensor".

    PyTorch cannot give derivatives of an operator like this to torch.func.grad, jacrev and hessian (torch.autograd,
    torch.func.vmap and forward derivatives work, with "arrival" torch.autograd alone); and torch.set_flush_denormal is
    a setting of a thread, with which sums of subnormal numbers depend on the number of threads, PyTorch's too.

    Returns the sum, with the dtype and device of x. The error is at most
    gamma(ceil(log2(longest group)) + G - 1) * sum(|x|), gamma(k) = k u / (1 - k u): pairwise summation's, then the
    G - 1 ordered additions (Higham, Accuracy and Stability of Numerical Algorithms, 2nd ed., section 4.2). Of an exact
    sum it is half a unit in the last place.

    Raises TypeError where x is no tensor or splits, seed, step or op no integer, NotImplementedError for the dtype of
    x, IndexError for dim, ValueError for order, splits, seed, step, op or scope, RuntimeError for a step on another
    device, or for a CUDA tensor where the CUDA kernels were not built.
    """
    check_tensor("sum", "x", x)
    check_order(order, splits, seed, op, scope, SUM_ORDERS)
    dims = -1 if dim is None else _mask(dim, x.ndim)
    if order == "arrival":
        return arrival(x, dims, keepdim, splits, step, op)
    call = _sum if (x.requires_grad and torch.is_grad_enabled()) or _observed(x) else _sum_forward
    if forward_ad._current_level >= 0:
        key = order_arguments(x, order, splits, seed, step, op, scope)
        return _with_tangents(lambda x: _sum(x, dims, keepdim, *key), x)
    if order == "fixed" and type(step) is int and 0 <= step < 1 << 32:   # most often; each call here is a percent
        return call(x, dims, keepdim, splits)
    return call(x, dims, keepdim, *order_arguments(x, order, splits, seed, step, op, scope))


def _with_tangents(f, *tensors):
    """f(*tensors) and its forward derivative: f is linear, so that is f of the tangents. Of nested levels only the
    innermost can be seen from here, so that those are refused."""
    transforms = torch._C._functorch.get_interpreter_stack() or ()
    if [level.key() for level in transforms].count(torch._C._functorch.TransformType.Jvp) > 1:
        raise NotImplementedError("ordered_reduce: forward derivatives of forward derivatives are not implemented")
    pairs = [forward_ad.unpack_dual(t) for t in tensors]
    value = f(*(pair.primal for pair in pairs))
    if all(pair.tangent is None for pair in pairs):
        return value
    return forward_ad.make_dual(value, f(*(torch.zeros_like(pair.primal) if pair.tangent is None else pair.tangent
                                           for pair in pairs)))


# One kernel under two names: PyTorch enters Python for an operator that has a derivative, which takes longer than a
# small sum does.
_sum, _sum_forward = torch.ops.ordered_reduce.sum.default, torch.ops.ordered_reduce.sum_forward.default


def _observed(*tensors):
    """Whether a transform of torch.func, a batched backward pass, a tracer or an exporter looks on. There a tensor need
    not say that it wants a gradient: only the operator with a derivative is right."""
    transformed = torch._C._are_functorch_transforms_active()
    if torch.compiler.is_compiling():   # an export, too
        return transformed or torch.compiler.is_exporting()
    return (transformed or torch._C._get_tracing_state() is not None or torch._C._len_torch_dispatch_stack() > 0
            or any(map(torch._C._functorch.is_legacy_batchedtensor, tensors)))


def _shape(x, dims, keepdim=True):
    """The shape of a sum over dims, a mask."""
    return [1 if dims >> d & 1 else size for d, size in enumerate(x.shape) if keepdim or not dims >> d & 1]


@torch.library.register_fake("ordered_reduce::sum")
@torch.library.register_fake("ordered_reduce::sum_forward")
def _(x, dims, keepdim, *order):
    return x.new_empty(_shape(x, dims, keepdim))


def _setup_context(ctx, inputs, output):
    x, dims = inputs[:2]
    ctx.shape, ctx.kept = x.shape, _shape(x, dims)


def _backward(ctx, grad):   # every term has derivative 1, whatever the order
    return grad.reshape(ctx.kept).expand(ctx.shape), *[None] * 8


torch.library.register_autograd("ordered_reduce::sum", _backward, setup_context=_setup_context)


def index_add(input, dim, index, source, *, order="fixed", splits=8, seed=0, step=0, op=0, scope="output"):
    """torch.index_add with the order of the additions as an argument.

    The terms of one row of the result (one index along dim) are the rows of source with that index, in source's order.
    They are reduced as `sum` would reduce them over dim, with as many groups, and what that gives, rounded to the
    dtype, is added to the row of input: input + sum. A row without terms is input's. The draws of "shuffled" are keyed
    by an output's position in the result with dim moved to the front. (Along another dimension than the first, input
    and source are copied, which on a CPU may take several times as long as torch.index_add.)

    Args:
      input: floating-point tensor of any shape and strides, with one dimension at least.
      dim: int, the dimension of the index.
      index: (n,) int64 or int32, each in [0, input.size(dim)).
      source: of input's dtype and shape, but for size n along dim.
      order, splits, seed, step, op, scope: as in `sum`; but there is no "arrival".

    Returns the result, with the shape, dtype and device of input. Raises what torch.index_add raises for wrong
    arguments, and what `sum` raises for the order arguments. An index out of range is an IndexError, on CUDA too, which
    waits for the device; in a compiled program it is a RuntimeError, and there or in a captured one on CUDA its term is
    left out.
    """
    check_tensor("index_add", "input", input)
    check_tensor("index_add", "source", source)
    check_order(order, splits, seed, op, scope)
    if not isinstance(index, torch.Tensor):
        raise TypeError(f"index_add(): argument 'index' must be Tensor, not {type(index).__name__}")
    if input.ndim == 0 and source.ndim == 0:   # as vectors of one element
        return index_add(input.reshape(-1), dim, index, source.reshape(-1), order=order, splits=splits, seed=seed,
                         step=step, op=op, scope=scope).reshape(())
    if input.ndim == 0:
        raise RuntimeError("index_add(): source must have no dimensions as input has none, but got source "
                           f"{list(source.shape)}")
    dim, = _dims(operator.index(dim), input.ndim)
    if index.ndim > 1:
        raise IndexError(f"index_add(): Index is supposed to be a vector, but got dim: {index.ndim}")
    if index.dtype not in (torch.int64, torch.int32):
        raise RuntimeError(f"index_add(): Expected dtype int32/int64 for index, but got {index.dtype}")
    if input.dtype != source.dtype:
        raise RuntimeError(f"index_add(): self (input) and source must have the same scalar type, but got "
                           f"{input.dtype} and {source.dtype}")
    if not input.device == index.device == source.device:
        raise RuntimeError(f"Expected all tensors to be on the same device, but found input on {input.device}, index "
                           f"on {index.device} and source on {source.device}")
    if [*input.shape[:dim], index.numel(), *input.shape[dim + 1:]] != list(source.shape):
        raise RuntimeError("index_add(): source must have the shape of input but for the size of index along dim, but "
                           f"got input {list(input.shape)}, index {list(index.shape)}, source {list(source.shape)}, "
                           f"dim {dim}")
    rows, index = input.shape[dim], index.reshape(-1).long().contiguous()
    segments = torch.ops.ordered_reduce.segments(index, rows) if index.is_cuda else None
    # A compiled program cannot raise for a value, and a captured one cannot look at it: there the kernels leave out
    # what is not in range. (The CPU's always raise.) segments[rows] is how many lie in range.
    if (index.is_cuda and not torch.compiler.is_compiling() and not torch.cuda.is_current_stream_capturing()
            and segments[rows].item() != len(index)):
        _check_range(index, dim, rows)
    differentiated = torch.is_grad_enabled() and (input.requires_grad or source.requires_grad)
    call = _index_add if differentiated or _observed(input, source) else _index_add_forward
    x, terms = (input, source) if dim == 0 else (input.movedim(dim, 0), source.movedim(dim, 0))
    key = order_arguments(input, order, splits, seed, step, op, scope, "input")
    try:
        if forward_ad._current_level >= 0:
            result = _with_tangents(lambda x, terms: _index_add(x, index, terms, segments, *key), x, terms)
        else:
            result = call(x, index, terms, segments, *key)
    except RuntimeError:
        if not index.is_cuda:
            _check_range(index, dim, rows)
        raise
    return result if dim == 0 else result.movedim(0, dim)


def _check_range(index, dim, rows):
    if torch._C._functorch.is_batchedtensor(index):   # whose values cannot be looked at
        return
    for extreme in torch.stack(index.aminmax()).tolist() if index.numel() else ():
        if not 0 <= extreme < rows:
            raise IndexError(f"index_add(): index {extreme} is out of range for dimension {dim} with size "
                             f"{rows}") from None


_index_add = torch.ops.ordered_reduce.index_add.default
_index_add_forward = torch.ops.ordered_reduce.index_add_forward.default


@torch.library.register_fake("ordered_reduce::segments")
def _(index, size):
    return index.new_empty(size + 1 + index.shape[0])


@torch.library.register_fake("ordered_reduce::index_add")
@torch.library.register_fake("ordered_reduce::index_add_forward")
def _(input, *_):
    return input.new_empty(input.shape)


torch.library.register_autograd(
    "ordered_reduce::index_add", lambda ctx, grad: (grad, None, grad.index_select(0, *ctx.saved_tensors), *[None] * 7),
    setup_context=lambda ctx, inputs, output: ctx.save_for_backward(inputs[1]))


@torch.library.register_fake("ordered_reduce::sum_by_tickets")
def _(x, dims, keepdim, *_):
    return x.new_empty(_shape(x, dims, keepdim))


class _Arrival(torch.autograd.Function):
    """The operator writes to its tickets, and torch.library gives no derivative to one that writes."""

    @staticmethod
    def forward(ctx, x, *arguments):
        _setup_context(ctx, (x, *arguments), None)
        return torch.ops.ordered_reduce.sum_by_tickets.default(x, *arguments)

    @staticmethod
    def backward(ctx, grad):
        return _backward(ctx, grad)[0], *[None] * 5


def arrival(x, dims, keepdim, splits, step, op, terms=None):
    """sum(order="arrival") with the dimensions checked. terms: how many the tape is to say that an output has."""
    _step(step, "arrival", "x", x)
    if torch.compiler.is_compiling():   # breaks the graph
        raise RuntimeError("order='arrival' cannot be compiled: its tickets are kept by Python")
    count = math.prod(size for d, size in enumerate(x.shape) if dims >> d & 1)
    shape, groups = tuple(_shape(x, dims, False)), min(splits, count)
    entry = tape.Sum(shape, str(x.dtype)[6:], count if terms is None else terms, groups, op,
                     int(step) if tape.is_open() else 0)
    tickets = torch.empty(tape.stretches(math.prod(shape)), groups, dtype=torch.int32, device=x.device)
    take = x.is_meta or not tape.given(entry, tickets)
    out = _Arrival.apply(x, dims, keepdim, splits, take, tickets)
    if take and not x.is_meta:   # where nothing arrives
        tape.keep(entry, tickets)
    return out
