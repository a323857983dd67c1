"""`ordered_reduce.sum` is its definition, and has the properties that the definition promises."""

import math
import shutil

import ordered_reduce
import pytest
import reference
import torch
from conftest import GPU
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.fx.experimental.proxy_tensor import make_fx

DTYPES = (torch.float32, torch.float64, torch.float16, torch.bfloat16)
UNIT = {torch.float32: 2.0**-24, torch.float64: 2.0**-53, torch.float16: 2.0**-11, torch.bfloat16: 2.0**-8}
REPEATABLE = [dict(order="fixed"), dict(order="shuffled", seed=3, step=5, op=7),
              dict(order="shuffled", seed=-1, step=2**31, op=2**32 - 1, scope="tensor")]
SIZES = [1, 2, 3, 8, 31, 32, 33, 255, 256, 257, 1000, 2048, 2049, 16384 * 3 + 5]


def same_bits(a, b):
    """Equal as integers, but for NaN, whose payload is the processor's choice."""
    a, b = a.detach().cpu(), b.detach().cpu()
    integer = {2: torch.int16, 4: torch.int32, 8: torch.int64}[a.element_size()]
    equal = (a.contiguous().view(integer) == b.contiguous().view(integer)) | (a.isnan() & b.isnan())
    return a.shape == b.shape and a.dtype == b.dtype and bool(equal.all())


def noise(*shape, dtype=torch.float32, seed=0):
    """Terms of very different size, so that every other order of additions gives other bits."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(shape, generator=generator, dtype=torch.float64)
    return (x * 2.0 ** torch.randint(-6, 6, shape, generator=generator)).to(dtype)


# --------------------------------------------------------------------------------------------- it is the definition


def test_philox_known_answers():   # the vectors of Random123's kat_vectors
    ones, pi = [0xFFFFFFFF] * 4, [0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344]
    assert reference.philox4x32_10([0] * 4, [0] * 2) == [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]
    assert reference.philox4x32_10(ones, ones[:2]) == [0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD]
    assert reference.philox4x32_10(pi, [0xA4093822, 0x299F31D0]) == [0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1]


@pytest.mark.parametrize("arguments", REPEATABLE, ids=lambda a: "-".join(map(str, a.values())))
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("splits", [1, 2, 3, 8, 70])
def test_equals_the_reference(device, dtype, splits, arguments):
    for terms in SIZES:
        outputs = 5 if terms < 10000 else 2
        x = noise(terms, outputs, dtype=dtype, seed=terms)
        expected = reference.ordered_sum(x, splits, **arguments)
        rows = x.t().contiguous().to(device)
        assert same_bits(ordered_reduce.sum(x.to(device), 0, splits=splits, **arguments), expected), terms
        assert same_bits(ordered_reduce.sum(rows, 1, splits=splits, **arguments), expected), terms
        assert same_bits(ordered_reduce.sum(rows[0], splits=splits, **arguments), expected[0]), terms


@pytest.mark.parametrize("arguments", REPEATABLE, ids=lambda a: "-".join(map(str, a.values())))
def test_many_outputs_equal_the_reference(device, arguments):
    single, double = torch.float32, torch.float64
    for shape, dtype, splits in [((9, 700), single, 8), ((100, 75), single, 8), ((100, 75), double, 8), ((7, 41), double, 8),
                                 ((250, 41), single, 8), ((700, 70), single, 8), ((3000, 300), single, 8),
                                 ((256, 19), single, 8), ((1024, 9), single, 8), ((2048, 9), single, 8),   # groups of whole rows
                                 ((576, 9), single, 9), ((640, 10), double, 5), ((2240, 9), single, 70),
                                 ((784, 41), torch.float16, 8), ((100, 41), torch.bfloat16, 8)]:
        x = noise(*shape, dtype=dtype)
        expected = reference.ordered_sum(x, splits, **arguments)
        assert same_bits(ordered_reduce.sum(x.to(device), 0, splits=splits, **arguments), expected)
        rows = x.t().contiguous().to(device)
        assert same_bits(ordered_reduce.sum(rows, 1, splits=splits, **arguments), expected)
        apart = torch.cat([rows, rows], 1)[:, : len(x)]
        assert same_bits(ordered_reduce.sum(apart, 1, splits=splits, **arguments), expected)


# -------------------------------------------------------------------------------------------------------- accuracy


@settings(max_examples=300, deadline=None)
@given(st.lists(st.floats(-(2.0**90), 2.0**90, width=32), max_size=700), st.integers(1, 40), st.sampled_from(["fixed", "shuffled"]),
       st.sampled_from([torch.float32, torch.float64]), st.integers(0, 2**63 - 1))
def test_error_within_the_bound_of_pairwise_summation(values, splits, order, dtype, seed):
    x = torch.tensor(values, dtype=dtype)
    result = ordered_reduce.sum(x, order=order, splits=splits, seed=seed).item()
    groups = max(1, min(splits, len(values)))
    depth = math.ceil(math.log2(max(1, math.ceil(len(values) / groups)))) + groups - 1
    gamma = depth * UNIT[dtype] / (1 - depth * UNIT[dtype])
    bound = gamma * math.fsum(abs(v) for v in values)
    assert abs(result - math.fsum(values)) <= bound * (1 + 1e-9)


@pytest.mark.parametrize("order", ["fixed", "shuffled", "atomic", "exact", "arrival"])
def test_large_sums_against_float64(device, order):
    x = torch.randn(1 << 21, generator=torch.Generator().manual_seed(0))
    depth = 18 + 7
    for view in (x.view(1, -1), x.view(128, -1), x.view(-1, 128).t(), x.view(16, -1, 16).transpose(1, 2).reshape(256, -1)):
        error = (ordered_reduce.sum(view.to(device), 1, order=order).double().cpu() - view.double().sum(1)).abs()
        assert (error <= depth * 2.0**-24 * view.abs().double().sum(1)).all()


@pytest.mark.parametrize("order", ["fixed", "shuffled", "atomic", "exact", "arrival"])
@settings(max_examples=50, deadline=None)
@given(st.data())
def test_integers_are_exact_in_any_order(order, data):
    shape = data.draw(st.lists(st.integers(0, 9), min_size=1, max_size=4))
    dim = tuple(data.draw(st.sets(st.integers(-len(shape), -1), min_size=1)))
    keepdim, splits = data.draw(st.booleans()), data.draw(st.integers(1, 12))
    dtype = data.draw(st.sampled_from(DTYPES))
    x = torch.randint(-3, 4, shape).permute(data.draw(st.permutations(range(len(shape)))))
    got = ordered_reduce.sum(x.to(dtype), dim, keepdim, order=order, splits=splits)
    # Half types hold integers up to 256 (bfloat16) or 2048 exactly; larger sums are rounded once.
    assert got.shape == x.sum(dim, keepdim).shape and torch.equal(got, x.sum(dim, keepdim).to(dtype))


def test_half_types_are_rounded_once(device):
    x = torch.full((4097,), 1.0, dtype=torch.bfloat16, device=device)
    assert ordered_reduce.sum(x).item() == 4096.0          # 4097 rounded; bfloat16 additions would stop at 256
    assert ordered_reduce.sum(x[:3001], order="shuffled").item() == float(torch.tensor(3001.0).bfloat16())


# ------------------------------------------------------------------------------------------------------- properties


@pytest.mark.parametrize("arguments", REPEATABLE, ids=lambda a: "-".join(map(str, a.values())))
def test_independent_of_threads_strides_and_company(device, arguments):
    x = noise(1000, 6, 50).to(device)
    expected = ordered_reduce.sum(x, 0, **arguments)
    layouts = [x.permute(2, 0, 1).contiguous().permute(1, 2, 0), x.transpose(0, 2).contiguous().transpose(0, 2),
               torch.stack([x, x], 1)[:, 1], x.repeat_interleave(2, 0)[::2], x.flip(0).contiguous().flip(0)]
    for layout in layouts:
        assert same_bits(ordered_reduce.sum(layout, 0, **arguments), expected)
    threads = torch.get_num_threads()
    try:
        for number in (1, 2, 3, 7):
            torch.set_num_threads(number)
            assert same_bits(ordered_reduce.sum(x, 0, **arguments), expected)
            assert same_bits(ordered_reduce.sum(x.flatten(), splits=3), reference.ordered_sum(x.flatten()[:, None], 3)[0])
    finally:
        torch.set_num_threads(threads)
    alone = ordered_reduce.sum(x[:, :1, :1], 0, **arguments)    # output 0 has the same key in any company
    assert same_bits(alone[0, 0], expected[0, 0])
    wide = ordered_reduce.sum(x[:, 0], 0, **arguments)
    assert same_bits(wide, expected[0])


def test_equal_inputs_give_equal_bits_in_any_position(device):
    for terms, outputs in [(100, 13), (64, 27), (1000, 50), (5000, 100)]:
        column = noise(terms, 1).to(device)
        for x in (column.expand(terms, outputs), column.repeat(1, outputs), column.repeat(1, outputs).t().contiguous().t()):
            for arguments in (dict(order="fixed"), dict(order="shuffled", scope="tensor")):
                result = ordered_reduce.sum(x, 0, **arguments)
                assert same_bits(result, result[:1].expand(outputs))
    noisy = ordered_reduce.sum(noise(1000, 1).to(device).expand(1000, 500), 0, order="shuffled")
    assert 2 < len(noisy.unique()) < 500


def test_two_groups_make_no_noise_and_three_do(device):
    x = noise(100, 1000).to(device)
    fixed = ordered_reduce.sum(x, 0, splits=2)
    for order in ("shuffled", "atomic"):
        assert same_bits(ordered_reduce.sum(x, 0, splits=2, order=order), fixed)
    three = ordered_reduce.sum(x, 0, splits=3, order="shuffled")
    assert 0.05 < (three != ordered_reduce.sum(x, 0, splits=3)).float().mean() < 0.95


def test_noise_grows_with_splits():
    """The dial: the spread of the sums of equal terms, in units of the last place, grows about as sqrt(G)."""
    column = torch.randn(4096, 1, generator=torch.Generator().manual_seed(1)).expand(4096, 4000)
    ulp = 2.0 ** (math.floor(math.log2(abs(column[:, 0].double().sum().item()))) - 23)
    spread = [(ordered_reduce.sum(column, 0, order="shuffled", splits=G).double() / ulp).std().item()
              for G in (2, 4, 16, 64, 256)]
    assert spread[0] == 0 and spread == sorted(set(spread))
    assert 2 < spread[4] / spread[2] < 8                     # sqrt(16) = 4


@pytest.mark.parametrize("key", ["seed", "step", "op"])
def test_every_key_counts(key):
    x = noise(64, 300)
    a, b = (ordered_reduce.sum(x, 0, order="shuffled", **{key: value}) for value in (1, 2))
    assert not same_bits(a, b) and same_bits(a, ordered_reduce.sum(x, 0, order="shuffled", **{key: 1}))


def test_whatever_the_default_device():
    x = noise(9, 5)
    expected = ordered_reduce.sum(x, 0, order="shuffled", step=3)
    with torch.device("meta"):
        assert same_bits(ordered_reduce.sum(x, 0, order="shuffled", step=3), expected)


def test_step_as_tensor(device):
    x = noise(64, 300).to(device)
    expected = ordered_reduce.sum(x, 0, order="shuffled", step=9)
    for place in ("cpu", device):
        step = torch.tensor(9, device=place)
        assert same_bits(ordered_reduce.sum(x, 0, order="shuffled", step=step), expected)


def test_permutations_are_uniform():
    """All 6 orders of 3 partial sums, each about as often: chi-squared with 5 degrees of freedom, p = 1e-6 at 35.9."""
    counts = {}
    for output in range(6000):
        order = tuple(reference.permutation(3, 0, 0, 0, output))
        counts[order] = counts.get(order, 0) + 1
    assert len(counts) == 6 and sum((n - 1000) ** 2 / 1000 for n in counts.values()) < 35.9


def test_atomic_stays_within_the_orders(device):
    """Every atomic result is the sum in some order of the groups; on a GPU repeated runs differ."""
    x = noise(3, 2000)
    allowed = torch.stack([x[list(p)][0] + x[list(p)][1] + x[list(p)][2]
                           for p in [(0, 1, 2), (0, 2, 1), (1, 2, 0)]])       # a + b = b + a leaves three sums
    result = ordered_reduce.sum(x.to(device), 0, order="atomic", splits=3).cpu()
    assert (result == allowed).any(0).all()
    if device == "cuda":
        wide = noise(64, 1 << 16).to(device)
        runs = {ordered_reduce.sum(wide, 0, order="atomic", splits=64).cpu().numpy().tobytes() for _ in range(20)}
        assert len(runs) > 1


def test_atomic_races_on_the_cpu():
    if torch.get_num_threads() < 2:
        pytest.skip("one thread cannot race")
    wide = noise(64, 1 << 16)
    runs = {ordered_reduce.sum(wide, 0, order="atomic", splits=64).numpy().tobytes() for _ in range(50)}
    assert len(runs) > 1


@pytest.mark.parametrize("order", ["fixed", "shuffled", "atomic", "exact", "arrival"])
def test_special_values(device, order):
    def total(*values, dtype=torch.float32):
        return ordered_reduce.sum(torch.tensor(values, dtype=dtype, device=device), order=order, splits=3).item()

    inf, nan = math.inf, math.nan
    assert total(1, inf, 2, 3) == inf and total(-inf, 1, 1) == -inf
    assert math.isnan(total(inf, 1, 2, -inf)) and math.isnan(total(1, 2, nan, 4, 5))
    assert total(3e38, 3e38, 0) == inf and total(65504, 65504, dtype=torch.float16) == inf
    assert total() == 0 and math.copysign(1, total()) == 1
    assert math.copysign(1, total(-0.0, -0.0)) == -1 and math.copysign(1, total(-0.0, 0.0)) == 1
    if order != "atomic" or device == "cpu":               # CUDA's atomicAdd flushes subnormals
        assert total(1e-45, 1e-45, 1e-45) == 3 * 2.0**-149


@pytest.mark.parametrize("order", ["fixed", "shuffled", "exact"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_negative_zeros_add_up_to_one(device, dtype, order):
    """Of any number: what fills up vectors must not be a positive zero."""
    for terms in range(1, 2100, 1 if device == "cpu" else 13):
        x = torch.full((2, terms), -0.0, dtype=dtype, device=device)
        sums = [ordered_reduce.sum(x, 1, order=order), ordered_reduce.sum(x[0], order=order),
                ordered_reduce.sum(x.t().contiguous(), 0, order=order)]
        assert all(torch.signbit(s).all() for s in sums), terms


def test_empty_shapes(device):
    assert torch.equal(ordered_reduce.sum(torch.ones(2, 3, device=device), []), torch.tensor(6.0, device=device))
    for shape, dim in [((0,), None), ((0, 3), 0), ((0, 3), 1), ((3, 0, 2), (0, 1)), ((2, 0), 1)]:
        x = torch.empty(shape, device=device)
        expected = x.sum() if dim is None else x.sum(dim)
        assert torch.equal(ordered_reduce.sum(x, dim), expected)
    assert ordered_reduce.sum(torch.tensor(5.0, device=device)).item() == 5
    assert ordered_reduce.sum(torch.tensor(5.0, device=device), -1).item() == 5


def test_indexing_past_two_to_the_31(device):
    far = torch.zeros((1 << 31) + 64, dtype=torch.bfloat16, device=device)      # never touched but in three places
    three = far.as_strided((3,), ((1 << 30) + 20,))
    three.copy_(torch.tensor([1.0, 2.0, 4.0]))
    assert ordered_reduce.sum(three).item() == 7
    many = torch.ones(1, dtype=torch.float64, device=device).expand((1 << 31) + 7)
    assert ordered_reduce.sum(many).item() == (1 << 31) + 7


@pytest.mark.skipif(not GPU, reason="needs a CUDA device")
@settings(max_examples=200, deadline=None)
@given(st.data())
def test_cuda_equals_cpu(data):
    shape = data.draw(st.lists(st.integers(1, 300), min_size=1, max_size=3))
    dim = tuple(data.draw(st.sets(st.integers(0, len(shape) - 1), min_size=1)))
    dtype, order = data.draw(st.sampled_from(DTYPES)), data.draw(st.sampled_from(["fixed", "shuffled"]))
    splits, scope = data.draw(st.integers(1, 100)), data.draw(st.sampled_from(["output", "tensor"]))
    x = noise(*shape, dtype=dtype, seed=data.draw(st.integers(0, 9)))
    x = x.permute(data.draw(st.permutations(range(len(shape)))))
    arguments = dict(order=order, splits=splits, scope=scope, seed=4, step=5, op=6)
    assert same_bits(ordered_reduce.sum(x.cuda(), dim, **arguments), ordered_reduce.sum(x, dim, **arguments))


# ------------------------------------------------------------------------------------------- as a PyTorch operation


@pytest.mark.parametrize("order", ["fixed", "shuffled", "exact"])
def test_opcheck(device, order):
    for shape, dims, keepdim in [((5, 6), 0b1, False), ((2, 3, 4), 0b101, True), ((7,), -1, False), ((0, 3), 0b1, False)]:
        x = torch.randn(shape, device=device, requires_grad=True)
        arguments = (dims, keepdim, 3, ordered_reduce.ops.ORDERS.index(order), True, 1, torch.tensor(2), 3)
        torch.library.opcheck(torch.ops.ordered_reduce.sum.default, (x, *arguments))
        torch.library.opcheck(torch.ops.ordered_reduce.sum_forward.default, (x.detach(), *arguments))


def test_halves_are_converted_as_pytorch_converts_them(device):
    every = torch.arange(-(1 << 15), 1 << 15).short().view(torch.float16).to(device)
    assert same_bits(ordered_reduce.sum(every[:, None], 1), every)
    other = every[torch.randperm(len(every), generator=torch.Generator().manual_seed(0)).to(device)]
    pairs = torch.stack([torch.cat([every, every]), torch.cat([other, other / 1024])])   # ties, subnormals, overflow
    assert same_bits(ordered_reduce.sum(pairs, 0, splits=2), pairs.float().sum(0).half())
    assert same_bits(ordered_reduce.sum(pairs.t().contiguous(), 1, splits=2), pairs.float().sum(0).half())


@pytest.mark.parametrize("dims", [0b100, 1 << 40, -2])
def test_the_operator_refuses_dimensions_that_are_not_there(device, dims):
    with pytest.raises(RuntimeError, match="dims out of range"):
        torch.ops.ordered_reduce.sum_forward(torch.ones(2, 3, device=device), dims, False, 8)


@pytest.mark.parametrize("order", ["shuffled", "exact"])
@pytest.mark.parametrize("dim,keepdim", [(None, False), (1, False), ((0, -1), True)])
def test_gradients(device, dim, keepdim, order):
    x = torch.randn(3, 4, 2, dtype=torch.float64, device=device, requires_grad=True)

    def f(x):
        return ordered_reduce.sum(x.square(), dim, keepdim, order=order, splits=3)

    assert torch.autograd.gradcheck(f, (x,), check_forward_ad=True) and torch.autograd.gradgradcheck(f, (x,))
    torch.testing.assert_close(torch.func.jvp(f, (x.detach(),), (x.detach(),))[1], 2 * f(x))
    with pytest.raises(NotImplementedError, match="forward derivatives of forward"):
        torch.func.jacfwd(torch.func.jacfwd(f))(x.detach())


INDEX = torch.tensor([0, 1, 0, 2, 1])
OBSERVED = {   # f of a tensor (5, 3), as something else runs it than Python and autograd alone
    "vmap": lambda f: lambda x: torch.func.vmap(f)(x.view(5, 3, 1))[..., 0].view_as(x),
    "trace": lambda f: torch.jit.trace(f, torch.ones(5, 3)),
    "trace of a leaf": lambda f: torch.jit.trace(f, torch.ones(5, 3, requires_grad=True)),
    "export": lambda f: torch.export.export(Module(f), (torch.ones(5, 3),)).module(),
    "strict export": lambda f: torch.export.export(Module(f), (torch.ones(5, 3),), strict=True).module(),
    "make_fx": lambda f: make_fx(f)(torch.ones(5, 3)),
    "compiled vmap": lambda f: torch.compile(OBSERVED["vmap"](f), backend="eager")}


class Module(torch.nn.Module):
    def __init__(self, f):
        super().__init__()
        self.f = f

    def forward(self, x):
        return self.f(x)


@pytest.mark.filterwarnings("ignore:There is a performance drop", "ignore:.*torch.jit.trace", "ignore::torch.jit.TracerWarning")
@pytest.mark.parametrize("how", OBSERVED)
@pytest.mark.parametrize("library", [ordered_reduce, torch], ids=["ours", "PyTorch's"])
def test_gradients_where_a_tensor_does_not_say_that_it_wants_one(how, library):
    def total(x):
        return library.sum(x, 0, keepdim=True).expand_as(x)

    def rows(x):
        places = INDEX[:len(x)]
        return library.index_add(torch.zeros(3, x.shape[1]), 0, places, x).index_select(0, places)

    rows_of = {0: 2.0, 1: 2.0, 2: 1.0}
    for f, expected in ((total, torch.full((5, 3), 3.0 if "vmap" in how else 5.0)),
                        (rows, torch.tensor([[rows_of[int(i)]] * 3 for i in INDEX]))):
        if f is rows and "vmap" in how:
            expected = torch.tensor([2.0, 1.0, 2.0]).expand(5, 3)   # of a sample's rows 0, 1, 0
        x = torch.randn(5, 3, requires_grad=True)
        (OBSERVED[how](f)(x) + x).sum().backward()   # + x, so that a gradient that is lost is not the only one
        assert torch.equal(x.grad, expected + 1), f.__name__


@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.skipif(
    shutil.which("g++") is None, reason="inductor needs a C++ compiler"))])
def test_compiles_without_graph_breaks(device, backend):
    @torch.compile(fullgraph=True, backend=backend)
    def f(x, step):
        return (ordered_reduce.sum(x * 2, 0, order="shuffled", step=step) + ordered_reduce.sum(x, (0, 1), True)
                + ordered_reduce.sum(x, 0, order="exact"))

    x, step = noise(40, 30).to(device), torch.tensor(3)
    assert same_bits(f(x, step), f._torchdynamo_orig_callable(x, step))


def test_compiles_once_for_all_steps():
    @torch.compile(fullgraph=True, backend="aot_eager")   # which raises an error after eight of one function
    def f(x, step):
        return ordered_reduce.sum(x, 0, order="shuffled", step=step)

    x = noise(20, 3)
    assert all(same_bits(f(x, step), ordered_reduce.sum(x, 0, order="shuffled", step=step)) for step in range(2, 20))


@pytest.mark.parametrize("arguments,error,named", [
    (dict(order="random"), ValueError, "order.*'random'"), (dict(order="native"), ValueError, "order.*'native'"),
    (dict(scope="layer"), ValueError, "scope.*'layer'"), (dict(splits=0), ValueError, "splits.*0"),
    (dict(splits=-3), ValueError, "splits.*-3"), (dict(order="shuffled", splits=1 << 19), ValueError, "splits.*524288"),
    (dict(step=1 << 32, order="shuffled"), ValueError, "step.*4294967296"), (dict(step=-1), ValueError, "step.*-1"), (dict(step=1.5), TypeError, "float"),
    (dict(splits=8.5), TypeError, "splits.*8.5"), (dict(splits=1 << 63), ValueError, "splits.*9223372036854775808"),
    (dict(seed=1.5), TypeError, "seed.*1.5"), (dict(op=1.5), TypeError, "op.*1.5"), (dict(op=-1), ValueError, "op.*-1"), (dict(seed=1 << 64), ValueError, "seed.*18446744073709551616"),
    (dict(dim=2), IndexError, "dim=2"), (dict(dim=-3), IndexError, "dim=-3"), (dict(dim=(0, 0)), RuntimeError, "dim=0"),
    (dict(x=[1.0, 2.0]), TypeError, "'x'.*list"), (dict(x=torch.ones(3, dtype=torch.int64)), NotImplementedError, "int64"),
    (dict(x=torch.ones(3, dtype=torch.complex64)), NotImplementedError, "complex64"),
    (dict(step=torch.ones(2, dtype=torch.int64)), ValueError, r"step.*\(2,\)"),
    (dict(step=torch.ones(1), order="shuffled"), ValueError, "step.*float32"), (dict(dim=1.0), TypeError, "float"),
    (dict(step=torch.ones((), device="meta", dtype=torch.int64)), RuntimeError, "meta"),
], ids=lambda value: str(value)[:40])
def test_errors_name_argument_and_value(arguments, error, named):
    with pytest.raises(error, match=named):
        ordered_reduce.sum(**{"x": torch.ones(3, 4), **arguments})


@pytest.mark.skipif(ordered_reduce.cuda_built(), reason="the CUDA kernels are built")
def test_cuda_tensor_on_a_cpu_build_says_how_to_rebuild():
    class OnCuda(torch.Tensor):
        is_cuda = True

    with pytest.raises(RuntimeError, match="pip install -e csrc"):
        ordered_reduce.sum(torch.ones(3).as_subclass(OnCuda))
