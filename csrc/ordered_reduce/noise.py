"""Noise of a known size in a weight's gradient, drawn from a seed: what the noise of an order of additions is compared
with. Philox4x32-10 of ../order.h gives the draws, the same integers on every device."""

import math
import numbers
import operator

import torch

from .ops import DTYPES, check_key, order_arguments

NOISES = ("gaussian", "stochastic", "flip")
_INTEGERS = {2: torch.int16, 4: torch.int32, 8: torch.int64}   # by bytes


def _philox(count, seed, step, op, device):
    """(4, count) words in [0, 2**32), a function of their place and (seed, step, op). The key differs in one bit from
    that of the permutations, so noise and order of one seed are independent."""
    like = torch.empty(count, dtype=torch.int64, device=device)
    return torch.ops.ordered_reduce.philox(like, seed ^ -1 << 63, step, op)


@torch.library.register_fake("ordered_reduce::philox")
def _(like, *_):
    return like.new_empty(4, len(like))


def _uniforms(count, *key):
    """count numbers of (0, 1), float64."""
    return (_philox(-(-count // 4), *key).flatten()[:count].double() + 0.5) / (1 << 32)


def _round_stochastically(x, dtype, uniform):
    """float64 x in dtype, one of its two neighbours there, so that the mean over draws is x itself."""
    near = x.to(dtype)
    off = x - near.double()
    other = torch.nextafter(near, torch.where(off > 0, math.inf, -math.inf).to(dtype))
    return torch.where(uniform < off.abs() / (other.double() - near.double()).abs(), other, near)


def _perturb(grad, dtype, noise, ulps, flips, bit, *key):
    """grad, one dimension, with the noise, in dtype."""
    n, key = len(grad), (*key, grad.device)
    if noise == "stochastic":
        return _round_stochastically(grad, dtype, _uniforms(n, *key))
    if noise == "gaussian":
        half = -(-n // 2)
        u = _uniforms(4 * half, *key).view(4, half)
        # Box and Muller, 1958. (Of math.pi torch.compile(dynamic=True) would make an unknown, and fail.)
        radius, angle = (-2 * u[0].log()).sqrt(), 6.283185307179586 * u[1]
        normal = torch.cat([radius * angle.cos(), radius * angle.sin()])[:n]
        size = grad.abs()
        ulp = torch.nextafter(size, torch.full_like(size, math.inf)).double() - size.double()
        moved = (grad.double() + ulps * normal * ulp).where((size > 0) & ulp.isfinite(), grad.double())
        return _round_stochastically(moved, dtype, u[2:].flatten()[:n])
    words = _philox(math.ceil(flips) if n else 0, *key)
    chosen = ((words[0] >> 16) * n + ((words[0] & 0xFFFF) * n >> 16)) >> 16   # words[0] * n >> 32, of any n
    chance = flips - torch.arange(words.shape[1], device=grad.device, dtype=torch.float64)   # 1 or more: certain
    drawn = words[1] < chance * (1 << 32)
    integer = _INTEGERS[grad.element_size()]
    times = torch.zeros(n, dtype=integer, device=grad.device).index_add(0, chosen, drawn.to(integer))
    return (grad.contiguous().view(integer) ^ (times & 1) << bit).view(dtype)


# Compiled, half types are float32 throughout, whose ulp is not theirs; an operator of one's own is left as it is.
@torch.library.custom_op("ordered_reduce::perturb", mutates_args=())
def _opaque_perturb(grad: torch.Tensor, dtype: torch.dtype, noise: str, ulps: float, flips: float, bit: int, seed: int,
                    step: torch.Tensor, op: int) -> torch.Tensor:
    return _perturb(grad, dtype, noise, ulps, flips, bit, seed, step, op)


@_opaque_perturb.register_fake
def _(grad, dtype, *_):
    return grad.new_empty(grad.shape, dtype=dtype)


class _Perturb(torch.autograd.Function):
    """Noise is added to a gradient: the gradient of that is handed on as it is."""

    @staticmethod
    def forward(ctx, grad, dtype, *arguments):
        ctx.dtype, ctx.arguments = grad.dtype, 1 + len(arguments)
        perturb = _opaque_perturb if torch.compiler.is_compiling() else _perturb
        return perturb(grad.reshape(-1), dtype, *arguments).view(grad.shape)

    @staticmethod
    def backward(ctx, grad):
        return grad.to(ctx.dtype), *[None] * ctx.arguments


class _Noisy(torch.autograd.Function):
    @staticmethod
    def forward(ctx, weight, noise, *arguments):
        ctx.arguments = weight.dtype, noise, *arguments
        return weight.double() if noise == "stochastic" else weight.view_as(weight)

    @staticmethod
    def backward(ctx, grad):
        return _Perturb.apply(grad, *ctx.arguments), *[None] * (len(ctx.arguments) - 1)


def check_noise(noise, ulps, flips, bit):
    """Raises ValueError naming the argument, its value and what would be valid."""
    if noise not in (None, *NOISES):
        raise ValueError(f"noise must be None or one of {', '.join(NOISES)}; got {noise!r}")
    for name, value in (("ulps", ulps), ("flips", flips)):
        if not 0 <= value < math.inf:
            raise ValueError(f"{name} must be finite and at least 0; got {value}")
    if not isinstance(bit, numbers.Integral) or not 0 <= bit < 64:
        raise ValueError(f"bit must be an integer in [0, 64); got {bit}")


def noisy(weight, noise, *, ulps=1.0, flips=1.0, bit=0, seed=0, step=0, op=0):
    """The weight, with noise in its gradient: the same for the same (seed, step, op) in every run and on any device.

      gaussian    every entry g of the gradient becomes g + ulps * z ulp(g), z standard normal, rounded stochastically
                  to the weight's dtype. Well below 1, ulps is therefore a probability: g moves by an ulp with
                  probability ulps * sqrt(2 / pi), and its mean stays g.
      stochastic  the last sum of the gradient is taken in float64 and rounded stochastically to the weight's dtype: to
                  one of the two nearest values, so that the mean is the sum. Its noise lies below an ulp as that of an
                  order of additions does (rounding to bfloat16 would make 2**16 times as much; on the rounding see
                  Croci et al., "Stochastic rounding", 2022). The weight comes back in float64 for this: give it to an
                  ordered layer, which computes in the dtype of its input.
      flip        `flips` entries, drawn independently, have one bit flipped: bit 0, the last of the fraction, is an
                  ulp. What a fraction asks for is flipped by chance: flips=0.01 is one flip in a hundred steps. An
                  entry drawn twice flips back.

    Args:
      weight: floating-point tensor of any shape; of at most 32 bits with gaussian and stochastic, which round from
        float64.
      seed, step, op: 64-bit, 32-bit, 32-bit keys of the draws; step may be a one-element int64 tensor.

    But for flips, zero, infinite and NaN entries stay what they are: zeros in any order add up to zero, too. (CPU and
    GPU may differ in the last float64 bit of a normal draw, which changes a rounding once in about 2**50 draws.) A
    batched backward pass (is_grads_batched=True) has no flips. Raises ValueError for noise, ulps, flips, bit, seed or
    op, NotImplementedError for the weight's dtype.
    """
    check_noise(noise, ulps, flips, bit)
    check_key(seed, op)
    if noise is None:
        return weight
    bits = 8 * weight.element_size()
    if weight.dtype not in DTYPES or (bits == 64 and noise != "flip"):
        raise NotImplementedError(f"noise={noise!r} is not implemented for weights of dtype {weight.dtype}: give it "
                                  "float32, float16 or bfloat16" + " or float64" * (noise == "flip"))
    if bit >= bits:
        raise ValueError(f"bit must lie in [0, {bits}) for weights of dtype {weight.dtype}; got {bit}")
    key = order_arguments(weight, "shuffled", 1, seed, step, op, "output", "weight")[3:]
    seed, step, op = (k if isinstance(k, (int, torch.Tensor)) else operator.index(k) for k in key)
    return _Noisy.apply(weight, noise, ulps, flips, bit, seed, step, op)
