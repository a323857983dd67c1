"""Noise in weight gradients: seeded, of the size asked for, and nowhere else."""

import copy
import math
import shutil

import numpy as np
import ordered_reduce
import pytest
import reference
import torch
from ordered_reduce import noise
from test_layers import gradients, network
from torch import nn
from torch.nn import functional as F

KINDS = [dict(noise="gaussian", ulps=0.5), dict(noise="gaussian", ulps=100.0), dict(noise="stochastic"),
         dict(noise="flip", flips=3), dict(noise="flip", flips=20, bit=12)]


def gradient(values, *arguments, **options):
    """What comes out for a gradient of these values, in float32 (stochastic: given in float64)."""
    weight = torch.zeros(values.shape, device=values.device, requires_grad=True)
    out = ordered_reduce.noisy(weight, *arguments, **options)
    return torch.autograd.grad(out, weight, values.to(out.dtype))[0]


def ulp(x):
    """Of float32, in float64, from its definition."""
    return torch.exp2(torch.frexp(x.double().abs())[1].double() - 24)


def moved(got, values):
    """By how many ulps of the values each entry moved."""
    return (got.double() - values.double()) / ulp(values)


def test_philox_is_the_definitions(device):
    for seed, step, op in [(0, 0, 0), (-5, 3, 7), (1 << 62, (1 << 32) - 1, (1 << 32) - 1)]:
        words = noise._philox(5, seed, torch.tensor(step), op, device)
        key = seed & reference.MASK, (seed >> 32 & reference.MASK) ^ 1 << 31
        assert words.t().tolist() == [reference.philox4x32_10((i, 0, step, op), key) for i in range(5)]


def test_keys_may_be_numpys(device):
    values = torch.rand(100, device=device) + 1
    expected = gradient(values, "gaussian", seed=3, step=2, op=1)
    assert torch.equal(gradient(values, "gaussian", seed=np.int32(3), step=np.int64(2), op=np.uint8(1)), expected)
    with pytest.raises(TypeError):
        gradient(values, "gaussian", op=1.5)


@pytest.mark.parametrize("ulps", [0.0, 2.0 ** -10, 0.1, 0.5, 1.0, 30.0])
def test_gaussian_has_the_size_asked_for(device, ulps):
    n = 1 << 18
    values = (torch.rand(n, generator=torch.Generator().manual_seed(0)) / 2 + 1.25).to(device)   # one ulp for all
    values[::2] *= -2.0 ** -30
    by = moved(gradient(values, "gaussian", ulps=ulps, seed=3), values).cpu()
    assert torch.equal(by, by.round())
    # z / 2 ulp is rounded at random: the variance of that is the mean of f (1 - f), f the fraction.
    z = torch.randn(1 << 22, dtype=torch.float64, generator=torch.Generator().manual_seed(1)) * ulps
    variance = ulps ** 2 + float((z.frac().abs() * (1 - z.frac().abs())).mean())
    assert abs(by.mean()) <= 5 * math.sqrt(variance / n)
    fourth = float(by.pow(4).mean())
    assert abs(by.square().mean() - variance) <= 5 * math.sqrt(2 * max(fourth, variance) / n)
    if 0 < ulps < 0.2:   # hardly ever by two
        share, expected = float((by != 0).double().mean()), ulps * math.sqrt(2 / math.pi)
        assert abs(share - expected) <= 5 * math.sqrt(expected / n)
    if ulps == 0:
        assert torch.equal(gradient(values, "gaussian", ulps=ulps), values)


def test_gaussian_is_normal(device):
    values = torch.ones(1 << 18, device=device)
    z = moved(gradient(values, "gaussian", ulps=1e4), values).cpu() / 1e4
    for level in (-3.0, -1.0, 0.0, 0.5, 2.0):
        p = 0.5 * math.erfc(-level / math.sqrt(2))
        assert abs((z < level).double().mean() - p) < 5 * math.sqrt(p * (1 - p) / len(z)) + 1e-4


def test_stochastic_rounding_is_to_a_neighbour_and_right_on_average(device):
    n, x = 1 << 16, torch.tensor([1 + 0.3 * 2 ** -23, -1 - 0.75 * 2 ** -23, 1 - 0.1 * 2 ** -24, 5.0, 1e-46, 0.0],
                                 dtype=torch.float64, device=device)
    got = gradient(x.repeat(n, 1), "stochastic").cpu()
    x = x.cpu()
    for column, value, low, high in zip(got.double().t(), x.tolist(),
                                        [1, -1 - 2 ** -23, 1 - 2 ** -24, 5, 0, 0],
                                        [1 + 2 ** -23, -1, 1, 5, 2 ** -149, 0], strict=True):
        assert set(column.tolist()) == {low, high}
        p = (value - low) / (high - low) if high > low else 0.0
        assert abs((column == high).double().mean() - p) < 5 * math.sqrt(p * (1 - p) / n) or high == low


def test_stochastic_rounds_the_sum_of_the_orders_partial_sums(device):
    """8 partial sums in float64, then one rounding: every entry is a neighbour of that sum."""
    torch.manual_seed(0)
    x, layer = torch.randn(64, 50, device=device), nn.Linear(50, 40).to(device)
    g = torch.randn(64, 40, device=device)
    parts = torch.stack([a.t() @ b for a, b in zip(g.split(8), x.split(8), strict=True)]).double()
    ordered_reduce.convert(layer, noise="stochastic")
    got, = torch.autograd.grad(layer(x), layer.weight, g)
    error = (got.double() - parts.sum(0)) / ulp(got)
    assert got.dtype == torch.float32 and error.abs().max() < 1.01 and error.abs().max() > 0.6   # not to the nearest


@pytest.mark.parametrize("bit", [0, 5, 22, 23, 31])
def test_a_flip_is_one_bit_of_one_entry(device, bit):
    torch.manual_seed(0)
    values = torch.randn(40, 25, device=device)
    places = set()
    for step in range(50):
        got = gradient(values, "flip", bit=bit, step=step)
        changed = got.view(torch.int32) ^ values.view(torch.int32)
        assert sorted(set(changed.flatten().tolist())) == sorted([0, (1 << bit) - (1 << 32) * (bit == 31)])
        assert (changed != 0).sum() == 1
        places.add(int(changed.flatten().nonzero()))
    assert len(places) > 40 and min(places) < 200 < 800 < max(places)   # of 1,000, evenly


def test_number_of_flips(device):
    values = torch.ones(1 << 16, device=device)
    assert torch.equal(gradient(values, "flip", flips=0), values)
    assert int((gradient(values, "flip", flips=7) != 1).sum()) == 7
    flipped = [int((gradient(values, "flip", flips=2.25, step=step) != 1).sum()) for step in range(1000)]
    assert set(flipped) == {2, 3} and abs(flipped.count(3) / 1000 - 0.25) < 5 * math.sqrt(0.25 * 0.75 / 1000)
    assert gradient(torch.ones(0, 3, device=device), "flip").shape == (0, 3)
    one = torch.ones(1, device=device)   # drawn again, it flips back
    assert [bool(gradient(one, "flip", flips=flips) == 1) for flips in range(5)] == [True, False, True, False, True]


def test_bfloat16_weights(device):
    weight = torch.ones(1 << 14, dtype=torch.bfloat16, device=device, requires_grad=True)
    for options, sizes in [(dict(noise="gaussian", ulps=0.1), {0, 1}), (dict(noise="flip", flips=5, bit=6), {0, 64})]:
        got, = torch.autograd.grad(ordered_reduce.noisy(weight, **options), weight, torch.full_like(weight, 1.25))
        assert got.dtype == torch.bfloat16
        assert set(((got.double() - 1.25) * 2 ** 7).abs().unique().tolist()) == sizes


def test_special_values(device):
    values = torch.tensor([math.inf, -math.inf, math.nan, 3.4028234663852886e38, 0.0, *[-0.0] * 20], device=device)
    for options in (dict(noise="gaussian", ulps=0.5), dict(noise="stochastic")):
        got = gradient(values, **options)
        torch.testing.assert_close(got, values, equal_nan=True, rtol=0, atol=0)
        assert torch.equal(got.signbit(), values.signbit())


@pytest.mark.parametrize("arguments", KINDS, ids=str)
def test_seeded_and_keyed(device, arguments):
    """The same again for the same key, on any device and in any memory layout, and other draws for another key."""
    torch.manual_seed(0)
    values = torch.randn(64, 48, dtype=torch.float64).to(device)
    key = dict(seed=1, step=2, op=3)
    got = gradient(values, **arguments, **key)
    assert torch.equal(got, gradient(values, **arguments, **key))
    assert torch.equal(got, gradient(values, **arguments, **{**key, "step": torch.tensor(2)}))
    assert torch.equal(got, gradient(values.t().contiguous().t(), **arguments, **key))
    assert torch.equal(got.cpu(), gradient(values.cpu(), **arguments, **key))
    for other in (dict(seed=2), dict(seed=1 + (1 << 32)), dict(step=3), dict(op=4)):
        assert not torch.equal(got, gradient(values, **arguments, **{**key, **other}))


@pytest.mark.parametrize("arguments", KINDS, ids=str)
def test_nothing_outside_the_window(device, arguments):
    torch.manual_seed(0)
    model = network().to(device)
    x = torch.randn(16, 3, 9, 9, device=device)
    ordered_reduce.convert(model)
    quiet = gradients(model, x)
    policy = ordered_reduce.convert(model, layers=["2", "7"], steps=(1, 3), **arguments)
    seen = []
    for step in range(4):
        got = gradients(model, x)
        differ = {name for name in got if not torch.equal(got[name], quiet[name])}
        assert differ == ({"2.weight", "7.weight"} if 1 <= step < 3 else set()), step
        seen.append(got)
        policy.step()
    assert not torch.equal(seen[1]["2.weight"], seen[2]["2.weight"])
    policy.load_state_dict({"step": 1})
    assert all(torch.equal(value, seen[1][name]) for name, value in gradients(model, x).items())


@pytest.mark.parametrize("arguments", [dict(noise="gaussian", ulps=0), dict(noise="flip", flips=0), dict(noise=None)],
                         ids=str)
@pytest.mark.parametrize("order", ["fixed", "shuffled", "native"])
def test_no_noise_is_the_order_alone(device, order, arguments):
    torch.manual_seed(0)
    model = network().to(device)
    x = torch.randn(16, 3, 9, 9, device=device)
    ordered_reduce.convert(model, order=order)
    expected = gradients(model, x)
    ordered_reduce.convert(model, order=order, **arguments)
    assert all(torch.equal(value, expected[name]) for name, value in gradients(model, x).items())


@pytest.mark.parametrize("arguments", KINDS, ids=str)
def test_autocast(device, arguments):
    torch.manual_seed(0)
    model = network().to(device)
    quiet, x = copy.deepcopy(model), torch.randn(16, 3, 9, 9, device=device)
    ordered_reduce.convert(quiet)
    ordered_reduce.convert(model, **arguments)
    found = []
    for m in (quiet, model):
        with torch.autocast(device, torch.bfloat16):
            out = m(x)
        out.float().square().sum().backward()
        assert out.dtype == torch.bfloat16 and m[0].weight.grad.dtype == torch.float32
        found.append((out, m[0].weight.grad))
    assert torch.equal(found[0][0], found[1][0])
    # Float32 holds most sums of eight bfloat16 numbers exactly: there is nothing to round, whatever the order.
    assert torch.equal(found[0][1], found[1][1]) == (arguments["noise"] == "stochastic")
    torch.testing.assert_close(found[1][1], found[0][1], rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("arguments", KINDS[:4], ids=str)
def test_double_backward_is_pytorchs(device, arguments):
    """The noise is a constant: the gradient of the gradient is the layer's own."""
    def penalty(**convert):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(), nn.Linear(36, 2)).to(device)
        x = torch.randn(8, 3, 5, 5, device=device)
        if convert:
            ordered_reduce.convert(model, **convert)
        first = torch.autograd.grad(model(x).square().sum(), list(model.parameters()), create_graph=True)
        sum(g.square().sum() for g in first).backward()
        return [p.grad for p in model.parameters()]

    for got, expected in zip(penalty(**arguments), penalty(), strict=True):
        assert got.dtype == torch.float32
        torch.testing.assert_close(got, expected, rtol=1e-3, atol=1e-2)


@pytest.mark.parametrize("arguments", KINDS, ids=str)
def test_compiles_once_for_all_steps(device, arguments):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(), nn.Linear(36, 2)).to(device)
    policy = ordered_reduce.convert(model, **arguments)
    x = torch.randn(8, 3, 5, 5, device=device)
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    for _ in range(3):
        expected = gradients(model, x)
        model.zero_grad()
        compiled(x).square().sum().backward()
        assert all(torch.equal(p.grad, expected[name]) for name, p in model.named_parameters())
        policy.step()
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1


@pytest.mark.skipif(shutil.which("g++") is None, reason="inductor needs a C++ compiler")
@pytest.mark.parametrize("arguments", KINDS, ids=str)
def test_compiled_half_types_get_the_same_noise(device, arguments):
    """Inductor computes them in float32, of which nextafter would be another number."""
    def f(weight):
        return ordered_reduce.noisy(weight, **arguments, seed=1, step=2)

    torch._dynamo.reset()
    compiled = torch.compile(f, fullgraph=True)
    weight = torch.zeros(1000, dtype=torch.bfloat16, device=device, requires_grad=True)
    given = torch.linspace(1, 2, 1000, device=device).to(f(weight).dtype)
    eager, got = (torch.autograd.grad(g(weight), weight, given)[0] for g in (f, compiled))
    assert torch.equal(got, eager) and not torch.equal(eager, given.to(eager.dtype))


@pytest.mark.parametrize("arguments", [dict(noise="gaussian"), dict(noise="stochastic")], ids=str)
def test_batched_gradients_are_those_one_by_one(device, arguments):
    weight, given = torch.zeros(4, 5, device=device, requires_grad=True), torch.rand(3, 4, 5, device=device)
    out = ordered_reduce.noisy(weight, **arguments)
    given = given.to(out.dtype)
    together = torch.autograd.grad(out, weight, given, is_grads_batched=True)[0]
    out = ordered_reduce.noisy(weight, **arguments)
    assert torch.equal(together, torch.stack([torch.autograd.grad(out, weight, g, retain_graph=True)[0] for g in given]))


@pytest.mark.parametrize("arguments,named", [
    (dict(noise="normal"), "noise.*'normal'"), (dict(noise="gaussian", ulps=-1), "ulps.*-1"),
    (dict(noise="gaussian", ulps=math.nan), "ulps.*nan"), (dict(noise="flip", flips=math.inf), "flips.*inf"),
    (dict(noise="flip", bit=-1), "bit.*-1"), (dict(noise="flip", bit=64), "bit.*64"),
    (dict(noise="stochastic", order="native"), "order.*'native'"),
], ids=str)
def test_errors(arguments, named):
    with pytest.raises(ValueError, match=named):
        ordered_reduce.convert(network(), **arguments)


def test_keys_are_checked():
    for key in (dict(seed=1 << 64), dict(op=-1), dict(op=1 << 32)):
        with pytest.raises(ValueError, match=next(iter(key))):
            ordered_reduce.noisy(torch.ones(2), "gaussian", **key)


def test_flips_leave_the_padding_alone():
    model = torch.nn.Sequential(torch.nn.Embedding(3, 4, padding_idx=1))
    for order in ("fixed", "native"):
        ordered_reduce.convert(model, order=order, noise="flip", flips=2000, bit=20)
        model(torch.tensor([0, 1, 2])).sum().backward()
        assert not model[0].weight.grad[1].any() and (model[0].weight.grad != 1).sum() > 4


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64], ids=str)
def test_flips_do_not_depend_on_the_default_dtype(dtype):
    """And flips=1 is one for certain: of this seed and these steps the draw is 2**32 - 1, or nearly."""
    weight = torch.zeros(10, requires_grad=True)
    before = torch.get_default_dtype()
    try:
        torch.set_default_dtype(dtype)
        for step in (76123552, 80318378, 1):
            weight.grad = None
            ordered_reduce.noisy(weight, "flip", step=step).backward(torch.ones(10, dtype=torch.float32))
            assert int((weight.grad != 1).sum()) == 1
    finally:
        torch.set_default_dtype(before)


def test_errors_of_dtype():
    for weight in (torch.ones(2).to(torch.float8_e4m3fn), torch.ones(2).cfloat(), torch.ones(2).long()):
        with pytest.raises(NotImplementedError, match=str(weight.dtype)):
            ordered_reduce.noisy(weight, "flip")
    x, double = torch.randn(2, 3), nn.Linear(3, 4).double()
    with pytest.raises(ValueError, match=r"bit.*\[0, 32\).*float32.*40"):
        ordered_reduce.noisy(torch.ones(2), "flip", bit=40)
    for kind in ("gaussian", "stochastic"):
        ordered_reduce.convert(double, noise=kind)
        with pytest.raises(NotImplementedError, match="float64"):
            double(x.double())
    ordered_reduce.convert(double, noise="flip", bit=60)
    double(x.double()).sum().backward()
    assert F.linear(x.double(), double.weight).isfinite().all() and double.weight.grad.dtype == torch.float64


@pytest.mark.parametrize("noise", ["gaussian", "stochastic", "flip"])
def test_embeddings_have_noise_as_well(noise):
    gradients = []
    for chosen in (None, noise, noise):
        torch.manual_seed(0)
        model = torch.nn.Sequential(torch.nn.Embedding(50, 8))
        ordered_reduce.convert(model, noise=chosen, flips=20)
        out = model(torch.randint(0, 50, (400,)))
        assert out.dtype == torch.float32
        (out * torch.randn(400, 8)).sum().backward()
        gradients.append(model[0].weight.grad)
    assert torch.equal(gradients[1], gradients[2]) and not torch.equal(gradients[0], gradients[1])
    torch.testing.assert_close(gradients[0], gradients[1], rtol=1e-5, atol=1e-5)


def test_uniforms_are_neither_0_nor_1(monkeypatch):
    for word in (0, (1 << 32) - 1):
        monkeypatch.setattr(noise, "_philox", lambda count, *key, word=word: torch.full((4, count), word))
        u = noise._uniforms(5, 0, 0, 0, "cpu")
        assert u.shape == (5,) and (u > 0).all() and (u < 1).all()


def test_normal_draws_are_independent():
    n = 1 << 17
    z = moved(gradient(torch.ones(2 * n), "gaussian", ulps=1e4), torch.ones(2 * n)) / 1e4
    for a, b in ((z[:n], z[n:]), (z[:-1], z[1:])):
        for f in (lambda t: t, torch.square):
            assert abs(float(torch.corrcoef(torch.stack([f(a), f(b)]))[0, 1])) < 5 / math.sqrt(n)


def test_flips_reach_every_entry_of_a_large_gradient():
    at = (gradient(torch.ones(1 << 20), "flip", flips=4096) != 1).nonzero()[:, 0]
    for divisor in (2, 16):
        counts = (at % divisor).bincount(minlength=divisor).double()
        assert (counts - counts.mean()).abs().max() < 6 * math.sqrt(float(counts.mean()))


def test_a_flip_by_chance_is_anywhere():
    values, places = torch.ones(1000), []
    for step in range(1000):
        places += (gradient(values, "flip", flips=0.1, step=step) != 1).nonzero()[:, 0].tolist()
    assert 50 < len(places) < 150 and min(places) < 200 and max(places) > 800


@pytest.mark.parametrize("arguments, named", [
    (dict(noise="normal"), "noise.*'normal'"), (dict(noise="gaussian", ulps=-1), "ulps.*-1"),
    (dict(noise="flip", flips=math.inf), "flips.*inf"), (dict(noise="flip", bit=1.5), r"bit.*1\.5"),
    (dict(noise="flip", bit=-1), "bit.*-1"), (dict(noise="flip", bit=32), r"bit.*\[0, 32\).*32")], ids=str)
def test_noisy_checks_its_arguments(arguments, named):
    with pytest.raises(ValueError, match=named):
        ordered_reduce.noisy(torch.ones(2), **arguments)
    with pytest.raises(RuntimeError, match="step on meta and weight on cpu"):
        ordered_reduce.noisy(torch.ones(2), "flip", step=torch.tensor(0, device="meta"))
