"""index_add is the sums of the rows with one index, added once; embedding's gradient is index_add."""

import copy

import ordered_reduce
import pytest
import reference
import torch
from test_sum import DTYPES, noise, same_bits
from torch import nn
from torch.nn import functional as F

ORDERS = ["fixed", "shuffled", "atomic", "exact"]
KEYS = dict(seed=3, step=5, op=7)


def expected_rows(input, index, source, order, splits, scope="output"):
    """(rows, width), from the reference's sum of each row's terms."""
    out = input.clone()
    for v in index.unique().tolist():
        terms = source[index == v]
        if order == "exact":
            total = ordered_reduce.sum(terms, 0, order="exact")
        else:
            groups = min(splits, len(terms))
            partials = torch.stack([reference.tree(group) for group in terms.tensor_split(groups)])
            for d in range(terms.shape[1]):
                if order == "shuffled":
                    drawn_for = v * terms.shape[1] + d if scope == "output" else 0
                    partials[:, d] = partials[reference.permutation(groups, *KEYS.values(), drawn_for), d]
            total = partials[0]
            for partial in partials[1:]:
                total = total + partial
        out[v] = input[v] + total
    return out


@pytest.mark.parametrize("order,scope", [("fixed", "output"), ("shuffled", "output"), ("shuffled", "tensor"), ("exact", "output")])
@pytest.mark.parametrize("n,rows,width", [(50, 20, 5), (900, 3, 9), (900, 3, 1), (300, 200, 1), (50, 400, 1), (50, 400, 2), (700, 2, 600), (9000, 2, 33)])
def test_equals_the_reference(device, order, scope, n, rows, width):
    generator = torch.Generator().manual_seed(n)
    index = torch.randint(rows, (n,), generator=generator)
    input, source = noise(rows, width, seed=1), noise(n, width, seed=2)
    for splits in (1, 3, 8):
        got = ordered_reduce.index_add(input.to(device), 0, index.to(device), source.to(device), order=order, splits=splits,
                                       scope=scope, **KEYS)
        assert same_bits(got, expected_rows(input, index, source, order, splits, scope)), splits
        if width > 100:
            break                                           # the reference draws one output after the other


@pytest.mark.parametrize("order", ["fixed", "exact"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_row_is_the_sum_of_its_terms(device, dtype, order):
    """Few and many terms, wide and narrow rows, any number of threads."""
    for n, rows, width in [(30, 50, 4), (4000, 100, 20), (70000, 3, 8), (70000, 3, 1), (70000, 40, 1), (2000, 2, 1100)]:
        index = torch.randint(rows, (n,), generator=torch.Generator().manual_seed(n)).to(device)
        source = noise(n, width, dtype=dtype).to(device)
        expected = torch.stack([ordered_reduce.sum(source[index == v], 0, order=order) for v in range(rows)])
        for threads in (1, 3):
            before = torch.get_num_threads()
            try:
                torch.set_num_threads(threads)
                got = ordered_reduce.index_add(torch.zeros_like(expected), 0, index, source, order=order)
            finally:
                torch.set_num_threads(before)
            assert same_bits(got, torch.zeros_like(expected) + expected)


@pytest.mark.parametrize("order", ["fixed", "shuffled", "exact"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("n,rows,width,hot", [
    (3000, 20000, 3, 0), (3000, 20000, 3, 1000), (3000, 20000, 1, 1000), (40000, 200000, 8, 36000),   # few of the rows
    (39000, 10000, 1, 0), (3000, 1000, 1, 500), (2000, 2000, 1, 2000), (2000, 2000, 1, 2),              # single numbers
    (70003, 17, 1, 0), (70003, 17, 2, 0), (65536, 32, 2, 0), (1, 5, 1, 0),                            # many of a row
    (140000, 4000, 1, 0), (140000, 4000, 2, 30000)])                                                    # some
def test_however_the_cpu_sorts(dtype, order, n, rows, width, hot):
    """The same bits as with an index that is sorted already, and as sum's. hot: so many terms have one index."""
    index = torch.randint(rows, (n,), generator=torch.Generator().manual_seed(n))
    index[torch.randperm(n, generator=torch.Generator().manual_seed(0))[:hot]] = 3
    input, source = noise(rows, width, dtype=dtype, seed=1), noise(n, width, dtype=dtype, seed=2)
    add = torch.ops.ordered_reduce.index_add_forward
    arguments = (8, ordered_reduce.ops.ORDERS.index(order), True, 3, torch.tensor(5), 7)
    got = add(input, index, source, None, *arguments)
    if width > 1:
        assert same_bits(got, add(input, index, source, torch.ops.ordered_reduce.segments(index, rows), *arguments))
    there, times = index.unique(return_counts=True)
    assert same_bits(got.index_fill(0, there, 0), input.index_fill(0, there, 0))
    one_of_each = dict(zip(times.tolist(), there.tolist(), strict=True))   # a row for every number of terms
    most = there[times.argsort(descending=True)[:20]].tolist()
    for v in {*there[:20].tolist(), *most, *one_of_each.values()} if order != "shuffled" else ():
        assert same_bits(got[v], input[v] + ordered_reduce.sum(source[index == v], 0, order=order))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_more_groups_than_a_byte_counts(dtype):
    index = torch.cat([torch.arange(2000), torch.tensor([7, 9, 11, 13]).repeat_interleave(torch.tensor([299, 253, 254, 255]))])
    source, input = noise(len(index), 1, dtype=dtype)[:, 0], noise(2000, 1, dtype=dtype, seed=1)[:, 0]
    got = ordered_reduce.index_add(input, 0, index, source, splits=1000)
    for v in (6, 7, 9, 11, 13):   # of 1, 300, 254, 255 and 256 terms
        assert same_bits(got[v], input[v] + ordered_reduce.sum(source[index == v], splits=1000)), v


def test_a_row_of_no_terms_keeps_its_bits():
    quiet_later = torch.full((9,), 0x7fa00000, dtype=torch.int32).view(torch.float32)   # a signalling NaN
    got = ordered_reduce.index_add(quiet_later, 0, torch.tensor([4]), torch.ones(1))
    assert [v for v in range(9) if got[v].view(torch.int32) != 0x7fa00000] == [4]


@pytest.mark.parametrize("n,size", [(0, 0), (0, 3), (1, 1), (5000, 1), (5000, 3), (100_000, 65_536), (3000, 1 << 20)])
def test_segments_are_where_each_value_stands(device, n, size):
    index = torch.randint(max(size, 1), (n,), generator=torch.Generator().manual_seed(n)).to(device)
    values, position = index.sort(stable=True)
    starts = torch.searchsorted(values, torch.arange(size + 1, device=device))
    assert torch.equal(torch.ops.ordered_reduce.segments(index, size), torch.cat([starts, position]))


def test_segments_on_cuda_leave_out_what_is_out_of_range(device):
    if device == "cpu":
        pytest.skip("the CPU raises")
    index = torch.tensor([2, -1, 0, 3, 2, torch.iinfo(torch.int64).max, torch.iinfo(torch.int64).min], device=device)
    assert torch.ops.ordered_reduce.segments(index, 3).tolist() == [0, 1, 1, 3, 2, 0, 4, 1, 3, 5, 6]
    assert torch.ops.ordered_reduce.segments(index, 0)[0] == 0


def test_one_shared_permutation_is_that_of_sum(device):
    source, index = noise(400, 6).to(device), torch.zeros(400, dtype=torch.int64, device=device)
    got = ordered_reduce.index_add(torch.zeros(2, 6, device=device), 0, index, source, order="shuffled", **KEYS)
    assert same_bits(got[0], ordered_reduce.sum(source, 0, order="shuffled", **KEYS))     # the first row: the same outputs


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_integers_equal_pytorchs_along_every_dimension(device, order, dtype):
    generator = torch.Generator().manual_seed(0)
    for dim in (0, 1, -1):
        input = torch.randint(-3, 4, (5, 6, 7), generator=generator).to(device, dtype)
        shape = list(input.shape)
        shape[dim] = 40
        index = torch.randint(input.shape[dim], (40,), generator=generator).to(device)
        source = torch.randint(-3, 4, shape[::-1], generator=generator).to(device, dtype).permute(2, 1, 0)
        for i in (index, index.int(), torch.stack([index, index - index], 1)[:, 0]):   # one column of a matrix, too
            got = ordered_reduce.index_add(input, dim, i, source, order=order)
            assert got.shape == input.shape and torch.equal(got, torch.index_add(input, dim, i, source))
    one = torch.ones(3, 0, device=device, dtype=dtype)
    assert ordered_reduce.index_add(one, 0, index[:2] % 3, one[:2], order=order).shape == (3, 0)
    none = torch.zeros(0, dtype=torch.int64, device=device)
    assert torch.equal(ordered_reduce.index_add(input, 0, none, input[:0], order=order), input)
    scalar = torch.tensor(2.0, device=device, dtype=dtype)
    assert ordered_reduce.index_add(scalar, 0, torch.tensor(0, device=device), scalar, order=order).item() == 4


def test_a_row_without_terms_and_special_values(device):
    input = torch.tensor([[-0.0, 1.0], [2.0, 3.0]], device=device)
    index, inf = torch.tensor([1, 1], device=device), float("inf")
    for order in ORDERS:
        got = ordered_reduce.index_add(input, 0, index, torch.tensor([[inf, -0.0], [-inf, 1.0]], device=device), order=order)
        assert same_bits(got[0], input[0]) and got[1, 0].isnan() and got[1, 1] == 4
    zeros = torch.full((100,), -0.0, device=device)   # add up to a negative one
    for order in ("fixed", "shuffled", "exact"):
        assert same_bits(ordered_reduce.index_add(zeros[:1], 0, torch.zeros_like(zeros, dtype=torch.long), zeros, order=order),
                         zeros[:1])


def test_atomic_races_over_the_groups_of_a_row(device):
    if device == "cpu" and torch.get_num_threads() < 2:
        pytest.skip("one thread cannot race")
    source, index = noise(1 << 16, 64).to(device), (torch.arange(1 << 16) % 2).to(device)
    runs = {ordered_reduce.index_add(torch.zeros(2, 64, device=device), 0, index, source, order="atomic", splits=64)
            .cpu().numpy().tobytes() for _ in range(50)}
    assert len(runs) > 1


@pytest.mark.parametrize("order", ["fixed", "shuffled", "exact"])
def test_opcheck_gradients_and_compile(device, order):
    index = torch.tensor([2, 0, 2, 2], device=device)
    arguments = (3, ordered_reduce.ops.ORDERS.index(order), True, 1, torch.tensor(2), 3)
    input, source = (torch.randn(n, 2, dtype=torch.float64, device=device, requires_grad=True) for n in (3, 4))
    segments = torch.ops.ordered_reduce.segments(index, 3)
    torch.library.opcheck(torch.ops.ordered_reduce.segments.default, (index, 3))
    torch.library.opcheck(torch.ops.ordered_reduce.index_add.default, (input, index, source, segments, *arguments))
    torch.library.opcheck(torch.ops.ordered_reduce.index_add_forward.default,
                          (input.detach(), index, source.detach(), segments, *arguments))

    def f(input, source):
        return ordered_reduce.index_add(input, 1, index, source, order=order, splits=3).square()

    across = [t.detach().t().contiguous().requires_grad_() for t in (input, source)]
    assert torch.autograd.gradcheck(f, across, check_forward_ad=True) and torch.autograd.gradgradcheck(f, across)
    compiled = torch.compile(f, fullgraph=True, backend="aot_eager")
    assert same_bits(compiled(*across), f(*across))


@pytest.mark.parametrize("arguments,error,named", [
    (dict(dim=2), IndexError, "dim=2"), (dict(dim=0.5), TypeError, "float"), (dict(index=torch.tensor([0, 3])), IndexError, "index 3.*size 3"),
    (dict(index=torch.tensor([-1, 0])), IndexError, "index -1"), (dict(index=torch.zeros(1, 2).long()), IndexError, "vector.*2"),
    (dict(index=torch.tensor([0.0, 1.0])), RuntimeError, "index.*float32"), (dict(index=torch.tensor([0])), RuntimeError, "source"),
    (dict(source=torch.ones(2, 5)), RuntimeError, r"source.*\[2, 5\]"), (dict(source=torch.ones(2, 4).double()), RuntimeError, "float64"),
    (dict(input=torch.tensor(1.0), index=torch.zeros(3).long(), source=torch.ones(3)), RuntimeError, r"source.*\[3\]"),
    (dict(input=torch.ones(3), index=torch.tensor([1]), source=torch.tensor(2.0)), RuntimeError, r"source \[\]"),
    (dict(index=[0, 1]), TypeError, "'index'.*list"), (dict(source=[1.0]), TypeError, "'source'.*list"), (dict(input=torch.ones(3, 4).long()), NotImplementedError, "input.*int64"),
    (dict(source=torch.ones(2, 4, device="meta")), RuntimeError, "meta"), (dict(order="native"), ValueError, "order.*'native'"),
    (dict(order="shuffled", step=torch.tensor(0, device="meta")), RuntimeError, "step on meta and input on cpu"),
    (dict(splits=0), ValueError, "splits.*0"), (dict(order="shuffled", op=-1), ValueError, "op.*-1"),
], ids=lambda value: str(value)[:40])
def test_errors_name_argument_and_value(arguments, error, named):
    good = dict(input=torch.ones(3, 4), dim=0, index=torch.tensor([0, 2]), source=torch.ones(2, 4))
    with pytest.raises(error, match=named):
        ordered_reduce.index_add(**{**good, **arguments})
    ours_alone = named == "meta" or error is NotImplementedError   # before 2.13 PyTorch takes meta
    if not {"order", "splits", "index"} & set(arguments) and not ours_alone:
        with pytest.raises(error):                          # as torch.index_add does
            torch.index_add(**{**good, **arguments})


@pytest.mark.parametrize("order", ORDERS)
def test_more_splits_than_there_are_terms(device, order):
    """As many as the argument takes: of rows, of numbers, and of rows most of which have no terms."""
    for shape, rows in [((3, 2), 4), ((3,), 4), ((3,), 100)]:
        input, index = torch.zeros(rows, *shape[1:], device=device), torch.tensor([1, 1, 0], device=device)
        got = ordered_reduce.index_add(input, 0, index, torch.ones(shape, device=device), order=order,
                                       splits=(1 << 18 if order == "shuffled" else (1 << 63) - 1))
        assert torch.equal(got, torch.index_add(input, 0, index, torch.ones(shape, device=device)))


def test_compiled_programs_check_the_index_too():
    f = torch.compile(lambda i: ordered_reduce.index_add(torch.zeros(3, 4), 0, i, torch.ones(2, 4)), backend="aot_eager")
    with pytest.raises(RuntimeError, match="index out of range: 9"):
        f(torch.tensor([0, 9]))
    with pytest.raises(RuntimeError, match="index out of range: 9"):   # nor can its values be looked at here
        torch.func.vmap(lambda i: ordered_reduce.index_add(torch.zeros(3), 0, i, torch.ones(2)))(torch.tensor([[0, 9]]))


@pytest.mark.parametrize("n,rows,width", [(10, 100, 1), (10, 100, 2), (10, 10, 1), (10, 10, 2), (40000, 2, 1), (9, 2, 0), (9, 0, 2)])
def test_however_the_cpu_sorts_the_index_is_checked(n, rows, width):
    for wrong in (-1, rows, torch.iinfo(torch.int64).min, torch.iinfo(torch.int64).max):
        index = torch.randint(max(rows, 1), (n,))
        index[-1] = wrong
        with pytest.raises(IndexError, match=f"index {wrong} is out of range" if rows else "out of range"):
            ordered_reduce.index_add(torch.ones(rows, width), 0, index, torch.ones(n, width))


@pytest.mark.parametrize("order", [*ORDERS, "native"])
def test_embedding_computes_the_same(device, order):
    weight = torch.randint(-3, 4, (9, 5), device=device).float().requires_grad_()
    words = torch.randint(9, (4, 30), device=device)
    for padding_idx in (None, 2, -1):
        grads = []
        for f, more in ((F.embedding, {}), (ordered_reduce.embedding, dict(order=order))):
            out = f(words, weight, padding_idx, **more)
            grads += [out.detach(), *torch.autograd.grad(out.square().sum(), weight)]
        assert torch.equal(grads[0], grads[2]) and torch.equal(grads[1], grads[3])
    w = torch.randn(9, 2, dtype=torch.float64, device=device, requires_grad=True)
    if order != "native":
        def f(w):
            return ordered_reduce.embedding(words[:1], w, 3, order=order).square()
        assert torch.autograd.gradgradcheck(f, (w,), fast_mode=True, nondet_tol=1e-9)   # atomic does not repeat


def test_convert_takes_embeddings(device):
    class Bag(nn.Module):
        def __init__(self):
            super().__init__()
            self.words, self.head = nn.Embedding(20, 8, padding_idx=1), nn.Linear(8, 3)
            self.sparse = nn.Embedding(20, 8, sparse=True)

        def forward(self, words):
            return self.head(self.words(words).mean(1))

    torch.manual_seed(0)
    model, words = Bag().to(device), torch.randint(20, (16, 50), device=device)
    grads = {}
    for order in ORDERS:
        converted = copy.deepcopy(model)
        policy = ordered_reduce.convert(converted, order=order, layers="words")
        assert policy.layers == ["words"] and list(converted.state_dict()) == list(model.state_dict())
        converted(words).square().sum().backward()
        grads[order] = converted.words.weight.grad
    model(words).square().sum().backward()
    for grad in grads.values():
        torch.testing.assert_close(grad, model.words.weight.grad)
        assert not grad[1].any()
    assert not torch.equal(grads["shuffled"], grads["fixed"])
    assert ordered_reduce.convert(model).layers == ["words", "head"]


def test_embedding_errors_are_pytorchs():
    weight = torch.randn(3, 4, requires_grad=True)
    for f in (F.embedding, ordered_reduce.embedding):
        with pytest.raises(IndexError):
            f(torch.tensor([3]), weight)
        with pytest.raises(AssertionError):
            f(torch.tensor([0]), weight, 3)
        with pytest.raises(AssertionError):
            f(torch.tensor([0]), weight, -4)
    with pytest.raises(NotImplementedError, match="embedding.*weight.*int64"):
        ordered_reduce.embedding(torch.tensor([0]), torch.ones(3, 4, dtype=torch.int64))
    with pytest.raises(ValueError, match="order.*'x'"):
        ordered_reduce.embedding(torch.tensor([0]), weight, order="x")


@pytest.mark.parametrize("padding_idx", [0, -9, 8])
def test_the_row_of_padding_has_no_gradient(padding_idx):
    weight, words = torch.randn(9, 5, requires_grad=True), torch.arange(90) % 9
    got, = torch.autograd.grad(ordered_reduce.embedding(words, weight, padding_idx).sum(), weight)
    assert torch.equal(got, torch.full((9, 5), 10.0).index_fill(0, torch.tensor(padding_idx % 9), 0))


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("rows, n", [(5, 60), (200, 60), (2000, 60)])   # many, some and few of the rows have terms
def test_rows_of_an_input_that_is_copied(order, rows, n):
    torch.manual_seed(0)
    index, source = torch.randint(rows, (n,)), torch.randint(-9, 9, (n, 3)).float()
    number = torch.randint(-9, 9, (1, 3)).float()
    for input in (number.expand(rows, 3), torch.randn(3, rows).round().T, torch.randn(2 * rows, 3).round()[::2]):
        before = input.clone()
        got = ordered_reduce.index_add(input, 0, index, source, order=order)
        assert torch.equal(got, before.index_add(0, index, source)) and torch.equal(input, before)


def test_forward_derivatives_of_one_argument():
    index, input, source = torch.tensor([2, 0, 2, 2]), torch.randn(3, 2), torch.randn(4, 2)
    sums = ordered_reduce.index_add(torch.zeros(3, 2), 0, index, source)
    for f in (torch.index_add, ordered_reduce.index_add):
        assert torch.equal(torch.func.jvp(lambda s, f=f: f(input, 0, index, s), (source,), (source,))[1], sums)
        assert torch.equal(torch.func.jvp(lambda t, f=f: f(t, 0, index, source), (input,), (input,))[1], input)
