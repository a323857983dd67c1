"""Floating-point sums whose order of additions is an argument. See order.h for the definition."""
from .ops import cuda_built, sum
