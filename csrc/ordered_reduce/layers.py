"""conv2d, linear and embedding whose weight gradient is added up in a chosen order, and `convert`, which puts them into
a model.

The terms of a weight gradient are the samples of the batch. They are cut into G groups, PyTorch's own convolution or
matrix product gives the G partial gradients, and `ordered_reduce.sum` adds those. Everything else (the output, the
input's gradient) is PyTorch's; a bias gradient is summed in fixed order in every order but native. The terms of a
row of an embedding's gradient are the gradients of the places where its number stands: `ordered_reduce.index_add`.
"""

import contextlib
import fnmatch
import functools
import itertools
import numbers
import operator
import threading

import torch
from torch import nn
from torch.nn import functional as F

from .noise import check_noise, noisy
from .ops import ORDERS, SUM_ORDERS, arrival, check_integer, check_order, check_tensor, index_add, order_arguments, sum

# "exact" adds the G partial gradients of a convolution or matrix product exactly, for sum() does that anyway. They are
# rounded by PyTorch's kernels, so that unlike an exact sum of all samples the result is still a function of `splits`.
LAYER_ORDERS = (*SUM_ORDERS, "native")
MOST_APART = 64   # partial gradients that one kernel adds where they lie: Apart::kMost of ../ops.h
NARROW = 64       # most channels of a convolution whose groups of samples a GPU computes in one call, as channel groups
BLOCK = 1 << 21   # bytes of a weight's partial gradients beyond which a CPU makes a few rows of them at a time
# Asked once, since torch.compile of PyTorch 2.11 cannot trace the question.
WITH_AUTOCAST = [device for device in ("cpu", "cuda", "xpu", "mps") if torch.amp.is_autocast_available(device)]
_convolution_backward = torch.ops.aten.convolution_backward.default


def _autocast(x, weight, bias):
    """x and bias as autocast would have them, and the dtype in which the weight is to be used."""
    device, used = x.device.type, weight.dtype
    if device in WITH_AUTOCAST and torch.is_autocast_enabled(device):
        dtype = torch.get_autocast_dtype(device)
        x, bias = (t.to(dtype) if t is not None and t.is_floating_point() and t.dtype != torch.float64 else t
                   for t in (x, bias))
        used = dtype if used != torch.float64 else used
    if used == torch.float64 and x.is_floating_point():   # stochastic rounding has made it float64
        used = x.dtype
    return x, bias, used


def _need_real(function, weight):
    if weight.is_complex():
        raise NotImplementedError(f"ordered_reduce.{function} is not implemented for a weight of dtype {weight.dtype}")


def _pair(value):
    """A stride, padding or dilation as a list of two; of another length as it is, for PyTorch to refuse."""
    value = list(value) if isinstance(value, (tuple, list)) else [operator.index(value)]
    return value * 2 if len(value) == 1 else value   # PyTorch takes (1,), too


def _padded(t, dim):
    """t with its channels, which lie along dim, filled up with zeros to a multiple of 16: the library's kernels may add
    up the last few of another number in another order, and equal channels would differ."""
    missing = -t.shape[dim] % 16
    return F.pad(t, [0, 0] * (t.ndim - 1 - dim) + [0, missing]) if missing else t


def _convolution_gradient(grad, x, weight, conv, which):
    """The gradient of x (which=0) or weight (1) by PyTorch's convolution; conv: stride, padding, dilation, groups."""
    stride, padding, dilation, groups = conv
    return _convolution_backward(grad, x, weight, None, stride, padding, dilation, False, [0, 0], groups,
                                 [which == 0, which == 1, False])[which]


class _Repeating:
    """`with _repeating:` those of cuDNN's kernels that repeat are taken, whatever the user chose for the rest. The
    choice belongs to the process, and backward passes of several devices run side by side: the last gives it back."""

    def __init__(self):
        self.lock, self.inside, self.chosen = threading.Lock(), 0, None

    def __enter__(self):
        cudnn = torch.backends.cudnn
        with self.lock:
            if self.inside == 0:
                self.chosen = cudnn.deterministic, cudnn.benchmark
                cudnn.deterministic, cudnn.benchmark = True, False
            self.inside += 1

    def __exit__(self, *_):
        with self.lock:
            self.inside -= 1
            if self.inside == 0:
                torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark = self.chosen


_repeating = _Repeating()


@functools.cache
def _streams_of(device):
    return [torch.cuda.Stream(device) for _ in range(4)]


def _side_streams(x):
    """Streams to compute a weight gradient on, the first of which has waited for all so far, while a CUDA graph is
    captured: it costs a replay nothing, and neither the input's gradient nor one group fills a large GPU. Else none."""
    if not x.is_cuda or torch.compiler.is_compiling() or not torch.cuda.is_current_stream_capturing():
        return []
    streams = _streams_of(x.device)
    streams[0].wait_stream(torch.cuda.current_stream(x.device))
    return streams


def _side_by_side(f, groups, streams):
    """[f(*group) for group in groups], from the first stream, which is the current one, on all of them."""
    found = []
    for stream in streams[1:]:
        stream.wait_stream(streams[0])
    for number, group in enumerate(groups):
        with torch.cuda.stream(streams[number % len(streams)]) if streams else contextlib.nullcontext():
            found.append(f(*group))
    for stream in streams[1:]:   # what is allocated there is used elsewhere, and there only after another wait
        streams[0].wait_stream(stream)
    return found


_cpu_weight_partials = torch.ops.ordered_reduce.conv2d_weight_partials.default
_cpu_backward = torch.ops.ordered_reduce.conv2d_backward.default


@torch.library.register_fake("ordered_reduce::conv2d_weight_partials")
def _(grad, x, weight, stride, padding, dilation, groups, splits):
    return weight.new_empty(min(splits, x.shape[0]), *weight.shape)


@torch.library.register_fake("ordered_reduce::conv2d_backward")
def _(grad, x, weight, conv, of_x, *_):
    grad_x = _convolution_gradient(grad, x, weight, (conv[:2], conv[2:4], conv[4:6], conv[6]), 0)
    return grad_x if of_x else x.new_empty(0), weight.new_empty(weight.shape)


@torch.library.register_fake("ordered_reduce::linear_weight")
def _(grad, x, *_):
    return x.new_empty(grad.shape[2], x.shape[2])


def _keep_for_partials(ctx, inputs, output):
    grad, x, _, *ctx.conv, _ = inputs
    ctx.save_for_backward(grad, x)


def _backward_of_partials(ctx, partials):   # for a double backward: they are linear in grad and in x
    groups = [(*group, partial) for *group, partial in
              zip(*(t.tensor_split(len(partials)) for t in ctx.saved_tensors), partials, strict=True)]
    return (torch.cat([F.conv2d(x, partial, None, *ctx.conv) for _, x, partial in groups]),
            torch.cat([_convolution_gradient(*group, ctx.conv, 0) for group in groups]), *[None] * 6)


torch.library.register_autograd("ordered_reduce::conv2d_weight_partials", _backward_of_partials,
                                setup_context=_keep_for_partials)


def _beside(t, G):
    """(G n, channels, height, width) -> (n, G channels, height, width), in the same memory format."""
    n, channels, *size = len(t) // G, *t.shape[1:]
    if t.stride(1) == 1:   # channels-last
        t = t.permute(0, 2, 3, 1).reshape(G, n, *size, channels).permute(1, 2, 3, 0, 4)
        return t.reshape(n, *size, G * channels).permute(0, 3, 1, 2)
    return t.reshape(G, n, channels, *size).transpose(0, 1).reshape(n, G * channels, *size)


def _conv2d_weight_partials(grad, x, weight, conv, splits, streams):
    """The weight gradients of G consecutive groups of samples: a tensor (G, *weight.shape) or a list of tensors."""
    if not x.is_cuda and x.shape[0]:
        return _cpu_weight_partials(grad, x, weight, *conv, splits)
    (stride, padding, dilation, groups), shape = conv, weight.shape
    if shape[2:] == (1, 1) and padding == [0, 0] and groups == 1:   # a matrix product: every pixel is a row
        x = x[:, :, ::stride[0], ::stride[1]]
        return _linear_weight_partials(grad.permute(0, 2, 3, 1), x.permute(0, 2, 3, 1), splits)[..., None, None]
    if groups == 1:
        grad, x = _padded(grad, 1), _padded(x, 1)
        weight = weight.new_empty(grad.shape[1], x.shape[1], *shape[2:])   # its values are not used
    G = max(1, min(splits, x.shape[0]))
    with contextlib.nullcontext() if torch.compiler.is_compiling() else _repeating:   # there the user's choice stands
        if groups == 1 and x.shape[0] and x.shape[0] % G == 0 and max(weight.shape[:2]) <= NARROW:
            weight, conv = weight.new_empty(G * len(weight), *weight.shape[1:]), (stride, padding, dilation, G)
            partials = _convolution_gradient(_beside(grad, G), _beside(x, G), weight, conv, 1)
            partials = partials.reshape(G, -1, *weight.shape[1:])
        else:
            samples = zip(grad.tensor_split(G), x.tensor_split(G), strict=True)
            partials = _side_by_side(lambda g, s: _convolution_gradient(g, s, weight, conv, 1), samples, streams)
    return [partial[:shape[0], :shape[1]] for partial in partials]


def _linear_weight_partials(grad, x, splits):
    """(G, out, in): the weight gradients of G consecutive groups of samples (the first dimension)."""
    products = _opaque_products if torch.compiler.is_compiling() else _products
    return products(grad, x, splits)[:, :grad.shape[-1], :x.shape[-1]]


def _is_large(x, weights, order):
    """Whether partial gradients of so many weights are made a few rows at a time: on the CPU, where no threads race."""
    size = min(order[1], len(x)) * weights * x.element_size()
    return size > BLOCK and not x.is_cuda and order[0] in ("fixed", "shuffled", "exact")


def _row_by_row(grad, x, order):
    """The sum of the partial gradients, (out, in), of grad (batch, rows, out) and x (batch, rows, in)."""
    return torch.ops.ordered_reduce.linear_weight(grad, x, *order_arguments(x, *order))


def _products(grad, x, splits):
    batch, G = x.shape[0], max(1, min(splits, x.shape[0]))
    rows = x.shape[:-1].numel() // batch if batch else 0    # of a sample
    if G == 1 and not x.is_cuda and x.dtype.itemsize == 2:   # one such product is cut up by the number of threads
        return _products(grad.float(), x.float(), 1).to(x.dtype)
    grad, x = _padded(grad, grad.ndim - 1), _padded(x, x.ndim - 1)
    if batch % G == 0:
        return torch.bmm(grad.reshape(G, batch // G * rows, grad.shape[-1]).transpose(1, 2),
                         x.reshape(G, batch // G * rows, x.shape[-1]))
    return torch.stack([g.reshape(-1, grad.shape[-1]).t() @ s.reshape(-1, x.shape[-1])
                        for g, s in zip(grad.tensor_split(G), x.tensor_split(G), strict=True)])


# Compiled for any batch, products over a group of one sample read beyond the end of their tensors with PyTorch 2.12 to
# 2.14, which makes sums of them; an operator of one's own it leaves as it is.
@torch.library.custom_op("ordered_reduce::products", mutates_args=())
def _opaque_products(grad: torch.Tensor, x: torch.Tensor, splits: int) -> torch.Tensor:
    return _products(grad, x, splits)


@_opaque_products.register_fake
def _(grad, x, splits):
    return grad.new_empty(max(1, min(splits, x.shape[0])), *(-(-t.shape[-1] // 16) * 16 for t in (grad, x)))


@torch.library.register_fake("ordered_reduce::add_partials")
def _(partials, like, *_):
    last = not like.is_contiguous() and all(
        t.ndim == 4 and t.is_contiguous(memory_format=torch.channels_last) for t in (partials[0], like))
    return torch.empty(partials[0].shape, dtype=like.dtype, device=like.device,
                       memory_format=torch.channels_last if last else torch.contiguous_format)


def _add_partials(partials, samples, like, order, splits, seed, step, op, scope):
    """The sum of G partial gradients, a list of tensors or one (G, ...), in the order, and in the dtype of like, the
    weight; on a GPU in its memory format too, and in one kernel from where they lie, if that can be."""
    first, dtype = partials[0], like.dtype
    if (first.is_cuda and order in ("fixed", "shuffled") and len(partials) <= MOST_APART and first.numel() < 1 << 31
            and not torch.is_grad_enabled()
            and (first.dtype == dtype or (first.dtype.itemsize == 2 and dtype == torch.float32))):
        key = order_arguments(first, "shuffled", splits, seed, step, op, scope)[2:] if order == "shuffled" else ()
        if torch.compiler.is_compiling():   # which may lay the partial gradients out anew: contiguous, in any case
            like = first.new_empty(0, dtype=dtype)
        return torch.ops.ordered_reduce.add_partials(list(partials), like, order == "shuffled", *key)
    partials = torch.stack(partials) if isinstance(partials, list) else partials
    partials = partials.to(dtype)          # half types under autocast: they are added in the weight's own precision
    if order == "arrival":                 # a tape holds the number of samples, to know another batch size by
        return arrival(partials, 1, False, splits, step, op, samples)
    return sum(partials, 0, order=order, splits=splits, seed=seed, step=step, op=op, scope=scope)


# Both backward passes are made of differentiable operations, so double backward works as it does for PyTorch's layers.
class _Conv2d(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, bias, used, conv, order):
        ctx.save_for_backward(x, weight)
        ctx.conv, ctx.order, ctx.bias_dtype = conv, order, None if bias is None else bias.dtype
        return F.conv2d(x, weight.to(used), bias, *conv)

    @staticmethod
    def backward(ctx, grad):
        x, weight = ctx.saved_tensors
        of_x, of_weight, of_bias, *_ = ctx.needs_input_grad
        grad_x, grad_weight, grad_bias = None, None, None
        # On the CPU both at once: calls from Python would be a tenth of a small network's step.
        if (of_weight and not x.is_cuda and len(x) and x.dtype == weight.dtype and ctx.order[0] != "arrival"
                and not torch.is_grad_enabled() and not torch.compiler.is_compiling()):
            stride, padding, dilation, groups = ctx.conv
            pixels, G = grad.shape[2:].numel(), min(ctx.order[1], len(x))
            # What the pixels see must be less than the partial gradients.
            if (groups == 1 and pixels <= 4 and len(x) * pixels <= G * len(weight)
                    and _is_large(x, weight.numel(), ctx.order)):
                seen = F.unfold(x, weight.shape[2:], dilation, padding, stride)
                grad_weight = _row_by_row(grad.flatten(2).mT, seen.mT, ctx.order).view(weight.shape)
                grad_x = _convolution_gradient(grad, x, weight, ctx.conv, 0) if of_x else None
            else:
                grad_x, grad_weight = _cpu_backward(grad, x, weight, [*stride, *padding, *dilation, groups], of_x,
                                                    *order_arguments(x, *ctx.order))
        else:
            used = weight.to(x.dtype)
            streams = _side_streams(x) if of_weight else []
            if of_x:
                grad_x = _convolution_gradient(grad, x, used, ctx.conv, 0)
            if of_weight:
                with torch.cuda.stream(streams[0]) if streams else contextlib.nullcontext():
                    partials = _conv2d_weight_partials(grad, x, used, ctx.conv, ctx.order[1], streams)
                    grad_weight = _add_partials(partials, len(x), weight, *ctx.order)
                if streams:
                    torch.cuda.current_stream(x.device).wait_stream(streams[0])
        if of_bias:
            grad_bias = sum(grad, (0, 2, 3)).to(ctx.bias_dtype)
        return grad_x if of_x else None, grad_weight, grad_bias, None, None, None


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, bias, used, order):
        of_x, of_weight, *_ = ctx.needs_input_grad
        ctx.save_for_backward(x if of_weight else None, weight if of_x else None)   # what backward needs, as PyTorch
        ctx.order, ctx.used, ctx.dtype, ctx.bias_dtype = order, used, weight.dtype, None if bias is None else bias.dtype
        out = F.linear(x, weight.to(used), bias)
        # It may be a view, which could not be changed in place; but an exported program would lose its gradient.
        return out if torch.compiler.is_exporting() else out.detach()

    @staticmethod
    def backward(ctx, grad):
        x, weight = ctx.saved_tensors
        grad_x, grad_weight, grad_bias = None, None, None
        if ctx.needs_input_grad[0]:
            grad_x = grad @ weight.to(ctx.used)
        if ctx.needs_input_grad[1]:
            if (grad.dtype == x.dtype == ctx.dtype and not torch.is_grad_enabled() and not torch.compiler.is_compiling()
                    and x.numel() and _is_large(x, grad.shape[-1] * x.shape[-1], ctx.order)):
                grad_weight = _row_by_row(*(t.reshape(len(t), -1, t.shape[-1]) for t in (grad, x)), ctx.order)
            else:
                like = weight if weight is not None else grad.new_empty(0, dtype=ctx.dtype)
                grad_weight = _add_partials(_linear_weight_partials(grad, x, ctx.order[1]), len(x), like, *ctx.order)
        if ctx.needs_input_grad[2]:
            grad_bias = sum(grad, tuple(range(grad.ndim - 1))).to(ctx.bias_dtype)
        return grad_x, grad_weight, grad_bias, None, None


def conv2d(x, weight, bias=None, stride=1, padding=0, dilation=1, groups=1, *, order="fixed", splits=8, seed=0,
           step=0, op=0, scope="output"):
    """torch.nn.functional.conv2d with the weight gradient's samples added in the given order.

    x is (batch, in, height, width) or (in, height, width), weight (out, in / groups, kh, kw), bias (out,) or None;
    stride, padding and dilation are an int or two, padding "same" or "valid" too. The output, (batch, out, height,
    width) or (out, height, width), and its errors are PyTorch's. The order arguments are those of `ordered_reduce.sum`;
    order="native" is PyTorch's own layer. A wrong one raises ValueError, a complex weight NotImplementedError. (A
    float64 weight, as `noisy` makes it for stochastic rounding, is used in the dtype of x.)
    """
    check_order(order, splits, seed, op, scope, LAYER_ORDERS)
    if order == "native" or weight.numel() == 0 or x.ndim not in (3, 4):   # nothing to add, or PyTorch's error
        return F.conv2d(x, weight, bias, stride, padding, dilation, groups)
    _need_real("conv2d", weight)
    if isinstance(padding, str):
        if (padding not in ("same", "valid") or weight.ndim != 4
                or (padding == "same" and (_pair(stride) != [1, 1] or len(_pair(dilation)) != 2))):
            return F.conv2d(x, weight, bias, stride, padding, dilation, groups)   # PyTorch's error
        padding, same = 0, padding == "same"
        if same:
            high, wide = (d * (k - 1) for d, k in zip(_pair(dilation), weight.shape[2:], strict=True))
            x = F.pad(x, (0, wide % 2, 0, high % 2)) if wide % 2 or high % 2 else x   # as PyTorch does
            padding = high // 2, wide // 2
    x, bias, used = _autocast(x, weight, bias)
    batched = x if x.ndim == 4 else x.unsqueeze(0)
    conv = (_pair(stride), _pair(padding), _pair(dilation), groups)
    out = _Conv2d.apply(batched, weight, bias, used, conv, (order, splits, seed, step, op, scope))
    return out if x.ndim == 4 else out.squeeze(0)


def linear(x, weight, bias=None, *, order="fixed", splits=8, seed=0, step=0, op=0, scope="output"):
    """torch.nn.functional.linear with the weight gradient's samples added in the given order.

    x is (batch, ..., in) or (in,), weight (out, in), bias (out,) or None; the samples are x's first dimension. The
    output, (batch, ..., out) or (out,), and its errors are PyTorch's. The order arguments are those of
    `ordered_reduce.sum`; order="native" is PyTorch's own layer, and sparse or nested x get that in any order. A wrong
    one raises ValueError, a complex weight NotImplementedError. (A float64 weight: see `conv2d`.)
    """
    check_order(order, splits, seed, op, scope, LAYER_ORDERS)
    batch = x.ndim > 0 and x.layout == torch.strided and not x.is_nested   # which can be cut into groups
    if order == "native" or not batch or weight.numel() == 0 or weight.ndim != 2:   # nothing to add, or not a layer's
        return F.linear(x, weight, bias)
    _need_real("linear", weight)
    if bias is not None and bias.shape != weight.shape[:1]:   # PyTorch broadcasts it
        out = linear(x, weight, order=order, splits=splits, seed=seed, step=step, op=op, scope=scope)
        return out + _autocast(x, weight, bias)[1]
    x, bias, used = _autocast(x, weight, bias)
    batched = x if x.ndim > 1 else x.unsqueeze(0)
    out = _Linear.apply(batched, weight, bias, used, (order, splits, seed, step, op, scope))
    return out if x.ndim > 1 else out.squeeze(0)


class _Embedding(torch.autograd.Function):
    @staticmethod
    def forward(ctx, input, weight, padding_idx, order):
        ctx.save_for_backward(input)
        ctx.shape, ctx.padding_idx, ctx.order = weight.shape, padding_idx, order
        return F.embedding(input, weight)

    @staticmethod
    def backward(ctx, grad):
        input, = ctx.saved_tensors
        names = ("order", "splits", "seed", "step", "op", "scope")
        zeros = grad.new_zeros(()).expand(ctx.shape)   # of which index_add makes the result, once
        grad_weight = index_add(zeros, 0, input.reshape(-1), grad.reshape(-1, ctx.shape[1]),
                                **dict(zip(names, ctx.order, strict=True)))
        if ctx.padding_idx is not None:
            grad_weight[ctx.padding_idx] = 0
        return None, grad_weight, None, None


def embedding(input, weight, padding_idx=None, *, order="fixed", splits=8, seed=0, step=0, op=0, scope="output"):
    """torch.nn.functional.embedding with the gradient of weight added up in the given order, by `index_add`.

    input is int64 or int32 of any shape, weight (rows, width); the output is input.shape + (width,). The gradient of
    row padding_idx is 0. The order arguments are those of `ordered_reduce.sum`; order="native" is PyTorch's own, and
    nested input gets that in any order. Errors are PyTorch's; a wrong order argument raises ValueError.
    """
    check_order(order, splits, seed, op, scope, (*ORDERS, "native"))
    if order == "native" or weight.numel() == 0 or input.is_nested:   # nothing to add, or nothing that index_add takes
        return F.embedding(input, weight, padding_idx)
    check_tensor("embedding", "weight", weight)
    if padding_idx is not None:
        if not -weight.shape[0] <= padding_idx < weight.shape[0]:
            raise AssertionError(f"padding_idx must be within num_embeddings ({weight.shape[0]}); got {padding_idx}")
        padding_idx %= weight.shape[0]
    return _Embedding.apply(input, weight, padding_idx, (order, splits, seed, step, op, scope))


class Conv2d(nn.Conv2d):
    """nn.Conv2d whose weight gradient follows self.policy; made by `convert`."""

    def _conv_forward(self, x, weight, bias):
        if weight.dtype == torch.float64 != x.dtype:   # noise makes such weights, whose layer is not of float64
            return super()._conv_forward(x, weight, bias)   # PyTorch's error
        padding = self.padding
        if self.padding_mode != "zeros":   # as nn.Conv2d does: pad first, then none
            x, padding = F.pad(x, self._reversed_padding_repeated_twice, mode=self.padding_mode), 0
        return conv2d(x, self.policy.noisy(weight, self.op), bias, self.stride, padding, self.dilation, self.groups,
                      **self.policy.arguments(self.op))


class Linear(nn.Linear):
    """nn.Linear whose weight gradient follows self.policy; made by `convert`."""

    def forward(self, input):
        if self.weight.dtype == torch.float64 != input.dtype:
            return super().forward(input)   # PyTorch's error, as above
        return linear(input, self.policy.noisy(self.weight, self.op), self.bias, **self.policy.arguments(self.op))


class Embedding(nn.Embedding):
    """nn.Embedding whose weight gradient follows self.policy; made by `convert`."""

    def forward(self, input):
        weight = self.weight
        if self.policy.noise_now == "flip" and self.padding_idx is not None:   # the row that no gradient reaches
            weight = torch.select_scatter(weight, weight[self.padding_idx].detach(), 0, self.padding_idx)
        weight = self.policy.noisy(weight, self.op)   # float64 for stochastic rounding
        return embedding(input, weight, self.padding_idx, **self.policy.arguments(self.op)).to(self.weight.dtype)


def _convertible(module):
    """The class that `convert` gives the module, or None."""
    if isinstance(module, nn.Embedding) and (module.max_norm is not None or module.scale_grad_by_freq or module.sparse):
        return None
    if isinstance(module, (Conv2d, Linear, Embedding)):   # whatever subclass a parametrization has made of it since
        return type(module)
    if "forward" in vars(module) or (isinstance(module, nn.Embedding) and not module.weight.is_floating_point()):
        return None
    return {nn.Conv2d: Conv2d, nn.Linear: Linear, nn.Embedding: Embedding}.get(type(module))


class Policy:
    """The order of additions of a converted model's weight gradients, and noise in them: `convert` makes it, `step`
    advances it.

    Attributes: order, splits, seed, scope, steps, noise, ulps, flips, bit as given to `convert`; layers, the names of
    the converted layers; count, the optimizer steps so far; now and noise_now, the order and noise in force at this
    step. A copy of the model (copy.deepcopy, torch.load of a whole model) has its own: the `policy` of its layers.
    """

    def __init__(self, order="fixed", splits=8, seed=0, scope="output", steps=None, noise=None, ulps=1.0, flips=1.0,
                 bit=0):
        check_order(order, splits, seed, 0, scope, LAYER_ORDERS)
        check_noise(noise, ulps, flips, bit)
        if order == "native" and noise == "stochastic":
            raise ValueError("order must be another than 'native' with noise='stochastic', which rounds its sum")
        pair = isinstance(steps, (tuple, list)) and [isinstance(n, numbers.Integral) for n in steps] == [True, True]
        if steps is not None and not (pair and 0 <= steps[0] < steps[1]):
            raise ValueError(f"steps must be (first, end), integers with 0 <= first < end; got {steps}")
        splits, seed = operator.index(splits), operator.index(seed)
        self.order, self.splits, self.seed, self.scope, self.steps = order, splits, seed, scope, steps
        self.noise, self.ulps, self.flips, self.bit = noise, ulps, flips, bit
        self.layers = []
        # A tensor, not a number, so that torch.compile does not compile every step anew.
        with torch.inference_mode(False):   # wherever the model is made: it changes, on the CPU
            self._step = torch.zeros((), dtype=torch.int64, device="cpu")
        self.load_state_dict({"step": 0})

    def step(self):
        """Call after each optimizer step: the next gradients are drawn for the next step, those of an earlier forward
        pass, too, if its backward pass is yet to come. (For a CUDA graph that is captured by hand, see `to`.)"""
        self.load_state_dict({"step": self.count + 1})

    def to(self, device):
        """Keeps the number of the step on this device; returns self. A captured CUDA graph reads it there at every
        replay; with the number on the CPU it would repeat the draws of the step of its capture. (Where `now` or
        `noise_now` changes, at the ends of `steps`, another graph is needed.)"""
        self._step = self._step.to(device)
        return self

    def state_dict(self):
        """{"step": the optimizer steps so far}: keep it beside the model's and the optimizer's."""
        return {"step": self.count}

    def load_state_dict(self, state):
        """Continues after the step of that state_dict. Raises ValueError for a step below 0 or of 2**32 or more,
        TypeError for one that is no integer."""
        check_integer("step", state["step"])
        if not 0 <= state["step"] < 1 << 32:
            raise ValueError(f"step must lie in [0, 2**32); got {state['step']}")
        self._step.fill_(state["step"])
        self.count = state["step"]
        inside = self.steps is None or self.steps[0] <= self.count < self.steps[1]
        self.now, self.noise_now = (self.order, self.noise) if inside else ("fixed", None)

    def arguments(self, op):
        """The keyword arguments for conv2d and linear at this step."""
        return {"order": self.now, "splits": self.splits, "seed": self.seed, "step": self._step, "op": op,
                "scope": self.scope}

    def noisy(self, weight, op):
        """The weight, with this step's noise in its gradient."""
        return noisy(weight, self.noise_now, ulps=self.ulps, flips=self.flips, bit=self.bit, seed=self.seed,
                     step=self._step, op=op)


def convert(model, order="fixed", splits=8, seed=0, scope="output", layers="*", steps=None, noise=None, ulps=1.0,
            flips=1.0, bit=0):
    """Gives the nn.Conv2d, nn.Linear and nn.Embedding layers of any model ordered weight gradients, in place, with
    noise or without.

    Parameters, names, hooks and state_dict stay as they are. A layer that is converted already follows the new policy.
    A layer that is called several times in a step draws the same order every time. The partial gradients are PyTorch's,
    on a GPU by those of cuDNN's kernels that repeat (in compiled code only under
    torch.use_deterministic_algorithms(True), which the other operations of a GPU need in any case). torch.compile takes
    a converted model, torch.export for its outputs alone: the gradients of an exported program are PyTorch's own, with
    strict=True it has none. torch.func's transforms, forward-mode derivatives, tensor parallelism and the saving of
    torch.jit.trace take one in order "native" alone (the transforms without noise); torch.fx and torch.jit.script do
    not, dynamic quantization passes over its linear layers, FlopCounterMode over the gradients of its convolutions.

    Under autocast to bfloat16 the order makes little noise, and that does not grow: partial gradients of 8 bits are
    mostly added exactly in float32, in whatever order, and the forward pass rounds small differences of weights away.

    In backward the `splits` partial gradients of a layer are in memory together, each as large as the weight: of many
    weights and few samples that, not arithmetic, is what takes the time. (A CPU makes a few rows of them at a time,
    where they are those of a large linear layer or of a convolution to few pixels. A GPU copies the input and gradient
    of a convolution of at most 64 channels, to make all its groups in one call.) Noise takes time, too, "gaussian"
    about as much as a small network's step.

    Args:
      model: any nn.Module. Subclasses of these layers, parametrized layers among them, are left alone, for they may
        compute something else; so are lazy layers that have not seen a batch, weights that no such layer applies (in
        attention, recurrent layers), embeddings with max_norm, scale_grad_by_freq or sparse or of integers, and layers
        whose forward a library has replaced. A layer that the model does not call, but whose weight it hands to a
        function (as torchvision's Swin does in its attention, and weight tying may), is converted to no effect.
      order: "fixed", "shuffled", "atomic", "exact" (but for embeddings, of partial gradients that are rounded),
        "arrival" (not for embeddings) or "native" (PyTorch's own gradient).
      splits, seed, scope: as in `ordered_reduce.sum`; a batch smaller than splits makes fewer groups.
      layers: glob pattern, or list of them, of layer names ("*", "stages.0.*", ["stem", "head"]), each of which
        matches one at least. Others stay as they are. A layer's op, the number its draws are keyed by, is its place
        among all layers of the model, whatever is chosen.
      steps: (first, end), the steps first <= step < end at which `order` and `noise` are in force; "fixed" and none
        outside. None: always.
      noise, ulps, flips, bit: as in `ordered_reduce.noisy`, in the weight gradients of the same layers.

    Returns the Policy; call its step() after each optimizer step. Raises ValueError for a wrong argument or where a
    pattern matches no layer, TypeError for splits or a seed that is no integer and layers that are no strings.
    """
    policy = Policy(order, splits, seed, scope, steps, noise, ulps, flips, bit)
    patterns = [layers] if isinstance(layers, str) or not hasattr(layers, "__iter__") else list(layers)
    if not all(isinstance(pattern, str) for pattern in patterns):
        raise TypeError(f"layers must be a glob pattern or a list of them; got {layers!r}")
    if not patterns:
        raise ValueError("layers names no layer: the list is empty")

    def match(names, pattern):
        return any(fnmatch.fnmatchcase(name, pattern) for name in names)

    candidates = {}   # a layer may have several names
    for name, module in model.named_modules(remove_duplicate=False):
        if _convertible(module):
            candidates.setdefault(module, []).append(name)
    for pattern in patterns:
        if not any(match(names, pattern) for names in candidates.values()):
            known = ", ".join(itertools.chain(*candidates.values())) or "none"
            raise ValueError(f"layers matches no layer: {pattern!r}; the model's layers that can be converted are: "
                             f"{known} (subclasses, parametrized and lazy layers are left alone)")
    chosen = [(op, names[0], module) for op, (module, names) in enumerate(candidates.items())
              if any(match(names, pattern) for pattern in patterns)]
    embeddings = [name for _, name, module in chosen if isinstance(module, nn.Embedding)]
    if order == "arrival" and embeddings:
        raise ValueError(f"order='arrival' is not for embeddings: choose layers without {', '.join(embeddings)}")
    for op, name, module in chosen:
        module.__class__ = _convertible(module)
        module.policy, module.op = policy, op
        policy.layers.append(name)
    return policy
