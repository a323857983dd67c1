"""Floating-point sums whose order of additions is an argument.

    ordered_reduce.sum(x, dim, order="fixed" | "shuffled" | "atomic" | "exact", ...)
    ordered_reduce.index_add(input, dim, index, source, order=...)
    ordered_reduce.conv2d, linear, embedding         PyTorch's layers with ordered weight gradients
    policy = ordered_reduce.convert(model, order="shuffled"); ...; optimizer.step(); policy.step()
    ordered_reduce.cuda_built()                      True where the CUDA kernels were compiled in
"""

from .layers import Policy, conv2d, convert, embedding, linear
from .ops import cuda_built, index_add, sum

__all__ = ["Policy", "conv2d", "convert", "cuda_built", "embedding", "index_add", "linear", "sum"]
