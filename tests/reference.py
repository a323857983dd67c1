"""The definition in csrc/order.h once more, in slow and plain Python, written from its words alone."""

import torch

MASK = (1 << 32) - 1


def tree(terms):
    """The fixed tree over a group's terms (n, ...), in their own precision."""
    n, other = terms.shape[0], terms.shape[1:]
    rows = 1
    while rows * 32 < n:
        rows *= 2
    lanes = torch.full((rows * 32, *other), -0.0, dtype=terms.dtype)
    lanes[:n] = terms
    lanes = lanes.reshape(rows, 32, *other)
    while lanes.shape[0] > 1:
        lanes = lanes[0::2] + lanes[1::2]
    lanes = lanes[0]
    while lanes.shape[0] > 1:
        half = lanes.shape[0] // 2
        lanes = lanes[:half] + lanes[half:]
    return lanes[0]


def philox4x32_10(counter, key):
    c, k = list(counter), list(key)
    for _ in range(10):
        p0, p1 = 0xD2511F53 * c[0], 0xCD9E8D57 * c[2]
        c = [(p1 >> 32) ^ c[1] ^ k[0], p1 & MASK, (p0 >> 32) ^ c[3] ^ k[1], p0 & MASK]
        k = [(k[0] + 0x9E3779B9) & MASK, (k[1] + 0xBB67AE85) & MASK]
    return c


def permutation(n, seed, step, op, output):
    order, draw = list(range(n)), 0
    for last in range(n - 1, 0, -1):
        counter = (output & MASK, (output >> 32 & 0xFFFF) | (draw // 4) << 16, step & MASK, op)
        word = philox4x32_10(counter, (seed & MASK, seed >> 32 & MASK))[draw % 4]
        other = word * (last + 1) >> 32
        order[last], order[other] = order[other], order[last]
        draw += 1
    return order


def ordered_sum(terms, splits=8, order="fixed", seed=0, step=0, op=0, scope="output"):
    """(terms, outputs) -> (outputs,)."""
    terms = terms.cpu()
    dtype = terms.dtype
    if dtype in (torch.float16, torch.bfloat16):
        terms = terms.float()
    if terms.shape[0] == 0:
        return torch.zeros(terms.shape[1:], dtype=dtype)
    partials = torch.stack([tree(group) for group in terms.tensor_split(min(splits, terms.shape[0]))])
    if order == "shuffled":
        for output in range(terms.shape[1]):
            drawn_for = output if scope == "output" else 0
            partials[:, output] = partials[permutation(len(partials), seed, step, op, drawn_for), output]
    total = partials[0]
    for partial in partials[1:]:
        total = total + partial
    return total.to(dtype)
