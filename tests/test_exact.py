"""Order "exact": the correctly rounded sum of all terms, as Fraction and math.fsum compute it.

    python tests/test_exact.py [--cases 1000000] [--seed 0] [--device cpu]      # a million sums against the references
"""

import argparse
import contextlib
import math
from fractions import Fraction

import ordered_reduce
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

# significand bits, exponent of the least subnormal, exponent of the first power of two that is too large
FORMATS = {torch.float64: (53, -1074, 1024), torch.float32: (24, -149, 128), torch.bfloat16: (8, -133, 128),
           torch.float16: (11, -24, 16)}


def rounded(value, dtype):
    """A Fraction to the nearest number of the format, ties to even, by integer arithmetic alone."""
    bits, least, limit = FORMATS[dtype]
    size = abs(value)
    if size == 0:
        return 0.0
    exponent = size.numerator.bit_length() - size.denominator.bit_length()
    exponent -= size < Fraction(2) ** exponent
    unit = Fraction(2) ** max(exponent - bits + 1, least)
    size = round(size / unit) * unit                        # round() of a Fraction takes ties to even
    result = math.inf if size >= Fraction(2) ** limit else float(size)
    return -result if value < 0 else result


def reference(values, dtype):
    """The sum of floats as IEEE 754 would give it with one rounding: of finite terms, infinities, NaN, signed zeros."""
    special = {v for v in values if math.isinf(v)}
    if any(math.isnan(v) for v in values) or len(special) == 2:
        return math.nan
    if special:
        return special.pop()
    if values and all(v == 0 and math.copysign(1, v) < 0 for v in values):
        return -0.0
    return rounded(sum(map(Fraction, values)), dtype)


def same(a, b):
    return (a == b and math.copysign(1, a) == math.copysign(1, b)) or (math.isnan(a) and math.isnan(b))


def check(values, dtype, device="cpu"):
    x = torch.tensor(values, dtype=torch.float64).to(dtype).to(device)   # as the format holds them
    expected = reference(x.tolist(), dtype)
    for terms in (x, x[:, None].repeat(1, 16)):             # and as columns side by side
        for result in ordered_reduce.sum(terms, 0, order="exact").flatten().tolist():
            assert same(result, expected), (x.tolist(), dtype, result, expected)


def random_terms(n, generator, dtype):
    """(n,) terms of one of seven kinds, from tame to hostile."""
    bits, least, limit = FORMATS[dtype]

    def scaled(low, high):
        exponents = torch.randint(low, high, (n,), generator=generator)
        return torch.ldexp(1 + torch.rand(n, generator=generator, dtype=torch.float64), exponents) * (
            2 * torch.randint(2, (n,), generator=generator) - 1)

    kind = int(torch.randint(7, (), generator=generator))
    if kind == 0:
        x = torch.randn(n, generator=generator, dtype=torch.float64)
    elif kind == 1:                                         # the whole range of exponents
        x = scaled(least, limit - 1)
    elif kind == 2:                                         # the largest numbers: the partial sums overflow
        x = scaled(limit - 3, limit - 1)
    elif kind == 3:                                         # subnormals
        x = scaled(least, least + bits)
    elif kind == 4:                                         # what cancels but for a little
        x = scaled(-20, 20)
        x[n // 2:2 * (n // 2)] = -x[:n // 2]
        x[-1] = x[-1] * 2.0 ** -bits
    elif kind == 5:                                         # near ties: one, half its last place, and next to nothing
        x = torch.zeros(n, dtype=torch.float64)
        first = torch.randint(2 ** (bits - 1), 2 ** bits, (1,), generator=generator).double()
        x[:3] = torch.cat([first, torch.tensor([0.5, 0.0]).double()])[:n]
        if n > 2:
            little = int(torch.randint(10, min(500, -least // 2) + 1, (), generator=generator))
            x[-1] = (int(torch.randint(3, (), generator=generator)) - 1) * 2.0 ** -little
        x *= 2 * int(torch.randint(2, (), generator=generator)) - 1
    else:                                                   # few different values, zeros of both signs among them
        x = torch.tensor([0.0, -0.0, 1.0, -1.0, 2.0 ** least, 1.5])[torch.randint(6, (n,), generator=generator)].double()
    return x[torch.randperm(n, generator=generator)].to(dtype)


def test_reference_agrees_with_fsum():
    generator = torch.Generator().manual_seed(0)
    for _ in range(300):
        values = random_terms(20, generator, torch.float64).tolist()
        with contextlib.suppress(OverflowError):            # fsum cannot pass through a sum that overflows
            assert math.fsum(values) == reference(values, torch.float64)
    for dtype in FORMATS:                                   # and the rounding with PyTorch's
        for value in random_terms(200, generator, torch.float64).tolist():
            if dtype in (torch.float64, torch.float32):     # the half types are reached through float there
                assert rounded(Fraction(value), dtype) == torch.tensor(value, dtype=torch.float64).to(dtype).item()


@pytest.mark.parametrize("dtype", FORMATS, ids=str)
def test_random_sums(device, dtype):
    generator = torch.Generator().manual_seed(1)
    for n in [1, 2, 3, 7, 8, 9, 33, 300] * 25 + [2047, 2048, 2049, 5000]:
        check(random_terms(n, generator, dtype).tolist(), dtype, device)


@pytest.mark.parametrize("dtype", FORMATS, ids=str)
@settings(max_examples=300, deadline=None)
@given(st.data())
def test_any_sums(dtype, data):
    width = {torch.float64: 64, torch.float32: 32, torch.float16: 16, torch.bfloat16: 32}[dtype]
    value = st.floats(width=width) if data.draw(st.booleans()) else st.floats(width=width, allow_nan=False, allow_infinity=False)
    values = data.draw(st.lists(value, max_size=40))
    check(values + [-v for v in values[:data.draw(st.integers(0, 40))]], dtype)


@pytest.mark.parametrize("dtype", FORMATS, ids=str)
def test_special_values(device, dtype):
    bits, least, limit = FORMATS[dtype]
    huge, tiny, half = 2.0 ** (limit - 1), 2.0 ** least, 2.0 ** (limit - 1 - bits)
    most = 2 * (huge - half)                                # the largest number
    for values in [[], [0.0], [-0.0], [-0.0, -0.0], [-0.0, 0.0], [1.0, -1.0], [-0.0, 1.0, -1.0], [-0.0] * 3000,
                   [huge, huge, -huge], [most, half], [most, half / 2], [most, half, -tiny], [-most, -half, tiny], [huge] * 5000,
                   [huge, huge, -huge, -huge, tiny], [tiny, tiny, tiny], [tiny, -tiny], [huge, tiny, -huge],
                   [math.inf, 1.0], [-math.inf, huge, huge], [math.inf, -math.inf], [math.nan, math.inf], [1.0] * 3000 + [math.nan],
                   [1.0] * 3000 + [-math.inf], [1.0, 2.0 ** -bits], [1.0, 2.0 ** -bits, tiny], [1.0, 2.0 ** -bits, -tiny]]:
        check(values, dtype, device)
    assert ordered_reduce.sum(torch.tensor([1e308, 1e308, -1e308], dtype=torch.float64), order="exact").item() == 1e308


@pytest.mark.parametrize("dtype", FORMATS, ids=str)
def test_every_layout_gives_the_same_sums(device, dtype):
    """Any permutation, split, strides, shape around it and number of threads."""
    generator = torch.Generator().manual_seed(2)
    for terms, outputs in [(3, 70), (40, 300), (300, 9), (9000, 5), (140, 2100)]:
        x = torch.stack([random_terms(terms, generator, dtype) for _ in range(outputs)], 1)
        x[:, 0] = -0.0
        some = list(range(outputs))[::1 + outputs // 20]
        expected = [reference(x[:, o].tolist(), dtype) for o in some]
        x = x.to(device)
        wide = torch.zeros(2 * terms, outputs, 3, dtype=dtype, device=device)
        wide[::2, :, 1] = x
        for view, dim in [(x, 0), (x.t().contiguous(), 1), (x.flip(0), 0), (x[torch.randperm(terms, generator=generator)], 0),
                          (x.t().contiguous().t(), 0), (wide[::2, :, 1], 0), (torch.stack([x, x])[1:], (0, 1))]:
            for number in (1, 3):
                before = torch.get_num_threads()
                try:
                    torch.set_num_threads(number)
                    got = ordered_reduce.sum(view, dim, order="exact", splits=number, seed=number)
                finally:
                    torch.set_num_threads(before)
                assert got.dtype == dtype and got.shape == (outputs,)
                assert all(map(same, got[some].tolist(), expected))


@pytest.mark.parametrize("dtype", FORMATS, ids=str)
def test_many_short_sums(device, dtype):
    check_many(6000, dtype, torch.Generator().manual_seed(5), device)


def test_few_outputs_over_several_threads(device):
    x = torch.randn(1 << 18, 2, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    expected = [math.fsum(column) for column in x.t().tolist()]
    assert ordered_reduce.sum(x.to(device), 0, order="exact").tolist() == expected
    assert ordered_reduce.sum(x.t().contiguous().to(device), 1, order="exact").tolist() == expected
    assert ordered_reduce.sum(x.to(device), order="exact").item() == math.fsum(x.flatten().tolist())


def test_long_sums_that_cancel(device):
    """What is left is as small as the error of the first approximation, which has to be noticed."""
    generator = torch.Generator().manual_seed(4)
    for case in range(400):
        n, spread, left = [512, 700, 2048, 5000][case % 4], [0, 20, 40][case % 3], -60 + case % 40
        x = torch.randn(n, generator=generator, dtype=torch.float64)
        x = torch.ldexp(x, spread * torch.arange(n) // n)                # the largest terms last
        x = torch.cat([x, -x * (1 + torch.ldexp(torch.randn(n, generator=generator, dtype=torch.float64), torch.tensor(left)))])
        x = x[torch.randperm(2 * n, generator=generator)] if case % 2 else x
        assert ordered_reduce.sum(x.to(device), order="exact").item() == math.fsum(x.tolist())


@pytest.mark.parametrize("dtype", FORMATS, ids=str)
def test_the_last_place_of_wider_accumulators(device, dtype):
    """A tie, and two small terms whose difference breaks it: a wider format still holds that or just does not. Many rows
    and columns of the same kind, so that short cuts are taken if ever."""
    bits, wide = FORMATS[dtype][0], {2: 24, 4: 53, 8: 106}[dtype.itemsize]
    last = 2.0 ** (1 - bits)
    for large in (1, 2, 5, 13, 29):
        to_tie = large * last - 2.0 ** ((2 * large - 1).bit_length() - 1 - bits)
        for exponent in range(wide - bits - 12, wide - bits + 5):
            small = 2.0 ** -exponent
            for more in (0, 40):                            # terms that change nothing
                terms = [2 - last] * large + [to_tie, small * (1 + 2 * last), -small * (1 + 3 * last)] + [0.0] * more
                x = torch.tensor([terms], dtype=torch.float64).to(dtype)
                expected = reference(x[0].tolist(), dtype)
                rows = torch.cat([x, -x] * 24).to(device)
                for got in (ordered_reduce.sum(rows, 1, order="exact"),
                            ordered_reduce.sum(rows.t().contiguous(), 0, order="exact")):
                    assert got.tolist() == [expected, -expected] * 24, (terms, dtype)


def check_many(cases, dtype, generator, device):
    """So many sums of up to 40 terms of every kind, 100 in one call: rows, then columns."""
    for _ in range(0, cases, 200):
        n = int(torch.randint(1, 41, (), generator=generator))
        x = torch.stack([random_terms(n, generator, dtype) for _ in range(100)])
        expected = [reference(values, dtype) for values in x.tolist()]
        for got in (ordered_reduce.sum(x.to(device), 1, order="exact"),
                    ordered_reduce.sum(x.t().contiguous().to(device), 0, order="exact")):
            for values, result, wanted in zip(x.tolist(), got.tolist(), expected, strict=True):
                assert same(result, wanted), (values, dtype, result, wanted)
                if dtype == torch.float64:
                    with contextlib.suppress(OverflowError):
                        assert result == math.fsum(values) or math.isnan(result), (values, result)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", type=int, default=1_000_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cpu")
    args = parser.parse_args()
    for number, dtype in enumerate(FORMATS):
        check_many(args.cases // len(FORMATS), dtype, torch.Generator().manual_seed(4 * args.seed + number), args.device)
    print(f"{args.cases} sums are correctly rounded")


if __name__ == "__main__":
    main()
