"""The CUDA kernels' source, run thread by thread on the CPU, gives the bits of the CPU implementation, in whatever order
the threads run. It is compiled for this (20 seconds) with the C++ compiler that built the extension."""

import pathlib
import re
import shutil
import subprocess
import sys

import pytest
import torch
from ordered_reduce import ops
from test_sum import DTYPES, same_bits
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils import cpp_extension

CSRC = pathlib.Path(__file__).parent.parent / "csrc"
FIXED, SHUFFLED, ATOMIC, EXACT = range(len(ops.ORDERS))   # as the operators number them

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="cuda_on_cpu.h is written for Linux")


def on_cpu(source):
    """kernel<<<grid, block, 0, stream>>>(arguments); becomes a call of cuda_on_cpu::launch."""
    source = source.replace("<cuda_runtime.h>", '"cuda_on_cpu.h"')
    source = source.replace("torch::stable::accelerator::DeviceGuard", "cuda_on_cpu::DeviceGuard")
    source, launches = re.subn(r"(\w+(?:<[^;{}]*?>)?)<<<(.+?), 0, stream>>>\((.*?)\);",
                               r"cuda_on_cpu::launch(\2, [&] { \1(\3); });", source, flags=re.DOTALL)
    assert launches == source.count("cuda_on_cpu::launch") > 10 and "<<<" not in source
    return source


@pytest.fixture(scope="module")
def emulated(tmp_path_factory):
    """torch.ops of the library, whose CPU implementation is the source of the CUDA kernels."""
    folder = tmp_path_factory.mktemp("cuda_on_cpu")
    (folder / "cuda.cpp").write_text(on_cpu((CSRC / "cuda.cu").read_text()))
    library = (CSRC / "ops.cpp").read_text().replace("_cpu>", "_cuda>").replace("(ordered_reduce,", "(ordered_emulated,")
    library = library.replace('  m.impl("segments"', '  m.impl("add_partials", TORCH_BOX(&ordered::add_partials<ordered::'
                              'add_partials_cuda>));\n  m.impl("segments"')
    library = library.replace('#include "ops.h"', '#include "ops.h"\n#include "cuda_on_cpu.h"')
    library = library.replace('m.def("cuda_built', 'm.def("schedule(int seed) -> ()");\n  m.def("cuda_built')
    library = library.replace('m.impl("cuda_built', 'm.impl("schedule", TORCH_BOX(&cuda_on_cpu::schedule));\n'
                              '  m.impl("cuda_built')
    (folder / "ops.cpp").write_text(library)
    cpp_extension.load("ordered_emulated", [str(folder / "cuda.cpp"), str(folder / "ops.cpp")], is_python_module=False,
                       extra_include_paths=[str(CSRC), str(pathlib.Path(__file__).parent)], build_directory=str(folder),
                       extra_cflags=["-std=c++20", "-O1", "-ffp-contract=off", "-w",
                                     "-DTORCH_TARGET_VERSION=0x020b000000000000"])
    yield torch.ops.ordered_emulated
    torch.ops.ordered_emulated.schedule(0)


@pytest.mark.skipif(not shutil.which("nvcc"), reason="needs nvcc")
def test_device_code_looks_at_the_bits(tmp_path):
    """What the emulation cannot show: nvcc 13.0 takes std::countr_zero and std::countl_zero for constants."""
    (tmp_path / "bits.cu").write_text('#include "exact.h"\n__global__ void bits(uint64_t* x, int* to) {\n'
                                      "  to[0] = ordered::leading_zeros(x[0]), to[1] = ordered::trailing_zeros(uint32_t(x[1]));\n}\n")
    subprocess.run(["nvcc", "-ptx", "-std=c++20", "--expt-relaxed-constexpr", "-arch=sm_90", f"-I{CSRC}", "bits.cu"],
                   cwd=tmp_path, check=True)
    assert {"clz.b64", "brev.b32", "clz.b32"} <= set((tmp_path / "bits.ptx").read_text().split())


# (shape, dims), chosen to meet every branch: rows and columns, short and long groups, one and several pieces.
SHAPES = [((1,), 1), ((31,), 1), ((5000,), 1), ((300_000,), 1), ((7, 1000), 2), ((1000, 7), 1),
          ((40, 300), 2), ((300, 40), 1), ((2100, 33), 1), ((70_000, 9), 1), ((3, 65, 20), 2),
          ((3, 17, 5), 0b101), ((4, 6, 8), -1), ((165, 30_000), 2), ((60, 200), 2), ((90, 100), 2), ((90, 50), 2),
          ((140_000, 3), 1), ((20_000, 2), 1), ((3, 5000, 4), 2)]   # columns beside one another, too few to read as rows


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape, dims", SHAPES, ids=str)
def test_sums_have_the_bits_of_the_cpu(emulated, shape, dims, dtype):
    torch.manual_seed(0)
    x = torch.randn(shape, dtype=torch.float64).to(dtype)
    for seed, (order, per_output, splits) in enumerate([
            (FIXED, True, 1), (FIXED, True, 8), (FIXED, True, 100), (SHUFFLED, True, 8), (SHUFFLED, False, 8),
            (SHUFFLED, True, 100), (EXACT, True, 8)]):
        arguments = (x, dims, False, splits, order, per_output, 5, torch.tensor(3), 2)
        expected = torch.ops.ordered_reduce.sum_forward(*arguments)
        emulated.schedule(seed)
        assert same_bits(emulated.sum_forward(*arguments), expected), (order, per_output, splits)


def test_random_words_are_the_cpus(emulated):
    arguments = (torch.empty(1000, dtype=torch.int64), 1 << 40, torch.tensor(3), 2)
    assert torch.equal(emulated.philox(*arguments), torch.ops.ordered_reduce.philox(*arguments))


@pytest.mark.parametrize("terms", [2000, 700, 100])
def test_exact_of_what_a_gpu_must_not_get_wrong(emulated, terms):
    inf, nan, tiny, huge = float("inf"), float("nan"), 5e-324, 1.7e308
    rows = [[-0.0, -0.0], [-0.0, 0.0], [tiny, -tiny], [tiny, tiny], [huge, huge], [huge, -huge, huge], [inf, 1.0],
            [inf, -inf], [nan, 1.0], [1.0, 1e-30, -1.0], [1e300, 1.0, -1e300]]
    x = torch.full((len(rows), terms), -0.0, dtype=torch.float64)
    for row, some in zip(x, rows, strict=True):
        row[torch.randperm(terms)[:len(some)]] = torch.tensor(some, dtype=torch.float64)
    for y, dims in ((x, 2), (x.T.contiguous(), 1), (x.float(), 2), (x.half().T.contiguous(), 1)):
        emulated.schedule(1)
        arguments = (y, dims, False, 8, EXACT)
        assert same_bits(emulated.sum_forward(*arguments), torch.ops.ordered_reduce.sum_forward(*arguments))


def test_atomic_adds_in_the_order_of_the_blocks(emulated):
    x = torch.randn(100, 3000)
    arguments = (x, 2, False, 8, ATOMIC)
    emulated.schedule(0)
    assert same_bits(emulated.sum_forward(*arguments), torch.ops.ordered_reduce.sum_forward(x, 2, False, 8, FIXED))
    seen = set()
    for seed in range(1, 9):
        emulated.schedule(seed)
        result = emulated.sum_forward(*arguments)
        assert torch.allclose(result, x.sum(1), atol=1e-3)
        seen.add(tuple(result.tolist()))
    assert len(seen) > 1


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_arrival_is_replayed_by_the_cpu(emulated, dtype):
    x, groups = torch.randn(5, 900, 30).to(dtype), 7
    stretches = ops.tape.stretches(5 * 30)
    recorded = set()
    for seed in range(3):
        tickets = torch.full((stretches, groups), -1, dtype=torch.int32)
        emulated.schedule(seed)
        arrived = emulated.sum_by_tickets(x, 2, False, groups, True, tickets)
        assert torch.equal(tickets.sort(1).values, torch.arange(groups, dtype=torch.int32).expand(stretches, -1))
        for library in (torch.ops.ordered_reduce, emulated):
            assert same_bits(library.sum_by_tickets(x, 2, False, groups, False, tickets), arrived)
        recorded.add(tuple(tickets.flatten().tolist()))
    assert len(recorded) == 3


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("rows, terms, width", [(1, 1, 1), (50, 400, 1), (50, 400, 33), (3, 5000, 2), (2000, 300, 5),
                                                (30, 3000, 1), (1, 40_000, 1), (4, 9000, 40), (300, 400, 8), (50, 700, 16),
                                                (5, 40, 1040)])
def test_index_add_has_the_bits_of_the_cpu(emulated, rows, terms, width, dtype):
    torch.manual_seed(0)
    into, source = torch.randn(rows, width).to(dtype), torch.randn(terms, width).to(dtype)
    index = torch.randint(rows, (terms,))
    segments = torch.ops.ordered_reduce.segments(index, rows)
    for seed, (order, per_output, splits) in enumerate([(FIXED, True, 8), (FIXED, True, 3), (FIXED, True, 1),
                                                        (SHUFFLED, True, 8), (SHUFFLED, False, 8),
                                                        (SHUFFLED, True, 20), (EXACT, True, 8)]):
        arguments = (splits, order, per_output, 5, torch.tensor(3), 2)
        emulated.schedule(seed)
        assert same_bits(emulated.index_add(into, index, source, segments, *arguments),
                         torch.ops.ordered_reduce.index_add(into, index, source, None, *arguments)), (order, splits)
    emulated.schedule(1)
    into, source = into.sign(), source.sign()   # whose sums no order rounds, but where bfloat16 rounds them at the end
    raced = emulated.index_add(into, index, source, segments, 8, ATOMIC)
    sums = torch.zeros(rows, width, dtype=torch.float64).index_add(0, index, source.double())
    assert torch.equal(raced, into + sums.to(dtype))


@pytest.mark.parametrize("rows, most", [(1, 1), (9000, 5000 // 64)])   # rows of more than 8 * 8 terms
def test_partial_sums_take_no_more_memory_than_there_can_be(emulated, rows, most):
    into, source, index = torch.zeros(rows, 4), torch.randn(5000, 4), torch.zeros(5000, dtype=torch.int64)
    segments = torch.ops.ordered_reduce.segments(index, rows)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        emulated.index_add(into, index, source, segments, 8, FIXED)
    taken = [event.self_cpu_memory_usage for event in profile.events() if event.name == "aten::empty"]
    assert most * 8 * source[0].nbytes in taken and sum(taken) < source.nbytes


def test_places_out_of_range_are_refused(emulated):
    x, index = torch.ones(10, 2), torch.tensor([0, 2, 2])
    segments = torch.ops.ordered_reduce.segments(index, 10)
    for library in (torch.ops.ordered_reduce, emulated):
        for ticket in (-1, 5):
            tickets = torch.tensor([[0, 1, 2, 3, ticket]], dtype=torch.int32)
            with pytest.raises(RuntimeError, match=f"ticket out of range: {ticket}"):
                library.sum_by_tickets(x, 1, False, 5, False, tickets)
        for place, wrong in ((0, -1), (4, 1), (10, 4), (11, -1), (13, 3)):   # starts, the last of them at 10; positions
            broken = segments.clone()
            broken[place] = wrong
            with pytest.raises(RuntimeError, match="segments must be|index out of range"):
                library.index_add(x, index, x[:3], broken, 8)


@pytest.mark.parametrize("of, to", [(dtype, dtype) for dtype in DTYPES] + [(torch.bfloat16, torch.float32),
                                                                       (torch.float16, torch.float32)], ids=str)
@pytest.mark.parametrize("groups", [1, 2, 5, 6, 8, 9, 64])
def test_partial_sums_of_tensors_of_their_own(emulated, groups, of, to):
    torch.manual_seed(0)
    for shape in ((1,), (12, 10), (16, 8, 3, 3), (5, 7, 3, 3), (6, 4, 1, 1)):
        partials = [torch.randn(shape, dtype=torch.float64).to(of) for _ in range(groups)]
        layouts, likes = [partials], [torch.empty(0, dtype=to)]
        if len(shape) == 4:
            likes.append(torch.empty(shape, dtype=to, memory_format=torch.channels_last))
            layouts.append([partial.contiguous(memory_format=torch.channels_last) for partial in partials])
            layouts.append([partial[1:, 1:] for partial in layouts[1]])
        for layout, like in [(layout, like) for layout in layouts for like in likes]:
            stacked = torch.stack(layout).to(to)
            for order, per_output in ((FIXED, True), (SHUFFLED, True), (SHUFFLED, False)):
                emulated.schedule(groups)
                result = emulated.add_partials(layout, like, order == SHUFFLED, per_output, 5, torch.tensor(3), 2)
                assert same_bits(result, torch.ops.ordered_reduce.sum_forward(stacked, 1, False, groups, order, per_output,
                                                                              5, torch.tensor(3), 2)), (shape, order)
                last = all(t.ndim == 4 and t.is_contiguous(memory_format=torch.channels_last) for t in (layout[0], like))
                assert result.is_contiguous(memory_format=torch.channels_last if last else torch.contiguous_format)
                with FakeTensorMode(allow_non_fake_inputs=True):
                    assert torch.ops.ordered_reduce.add_partials(layout, like).stride() == result.stride()


def test_partial_sums_must_be_alike(emulated):
    a, b = torch.ones(4, 4), torch.ones(4, 4)
    for wrong in ([], [a, b.t()], [a, b[:2]], [a, b.double()], [a] * 65):
        with pytest.raises(RuntimeError, match="add_partials"):
            emulated.add_partials(wrong, a)
    with pytest.raises(RuntimeError, match="add_partials"):
        emulated.add_partials([a, b], a.double())
    with pytest.raises(RuntimeError, match="add_partials"):
        emulated.add_partials([a, b], a.half())


@pytest.mark.parametrize("terms", [2048, 2049, 2055, 2056])   # groups of 256 terms, of 256 and 257, of 257
def test_every_group_is_raced_once(emulated, terms):
    index, source = torch.zeros(terms, dtype=torch.int64), torch.ones(terms, 2)
    segments = torch.ops.ordered_reduce.segments(index, 1)
    assert emulated.index_add(source[:1], index, source, segments, 8, ATOMIC).tolist() == [[1 + terms] * 2]
