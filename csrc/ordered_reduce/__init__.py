"""Floating-point sums whose order of additions is an argument.

    ordered_reduce.sum(x, dim, order="fixed" | "shuffled" | "atomic" | "exact" | "arrival", ...)
    ordered_reduce.index_add(input, dim, index, source, order=...)
    ordered_reduce.conv2d, linear, embedding         PyTorch's layers with ordered weight gradients
    policy = ordered_reduce.convert(model, order="shuffled"); ...; optimizer.step(); policy.step()
    ordered_reduce.noisy(weight, "gaussian", ulps=0.1)   a weight with seeded noise in its gradient; convert(noise=...)
    with ordered_reduce.record(path): ...            writes the orders of all sums in order "arrival" down
    with ordered_reduce.replay(path): ...            gives them back
    ordered_reduce.audit(model, input)               which modules repeat, and treat equal channels equally
    ordered_reduce.audit_training(make, steps)       where a run first fails to repeat or equal channels come apart
    ordered_reduce.cuda_built()                      True where the CUDA kernels were compiled in
"""

from .checks import Report, audit
from .layers import Policy, conv2d, convert, embedding, linear
from .noise import noisy
from .ops import cuda_built, index_add, sum
from .tape import record, replay
from .training import audit_training

__all__ = ["Policy", "Report", "audit", "audit_training", "conv2d", "convert", "cuda_built", "embedding", "index_add",
           "linear", "noisy", "record", "replay", "sum"]
