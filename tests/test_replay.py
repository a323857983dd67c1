"""Order "arrival", and its tapes: hardware's own order of additions, written down and given back."""

import contextlib
import gzip
import json
import math
import os
import subprocess
import sys
import threading

import ordered_reduce
import pytest
import reference
import torch
from conftest import GPU
from ordered_reduce import tape
from test_sum import DTYPES, noise, same_bits


def arrival(x, dim=0, splits=8, **arguments):
    return ordered_reduce.sum(x, dim, order="arrival", splits=splits, **arguments)


@pytest.fixture
def path(tmp_path):
    return tmp_path / "run.tape"


@pytest.fixture(autouse=True)
def threads():
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def sums(path):
    """[(entry, tickets (stretches, groups))] of a tape, read from its description alone."""
    data, found = gzip.decompress(path.read_bytes()), []
    at = data.index(b"\n") + 1

    def number(size):
        nonlocal at
        at += size
        return int.from_bytes(data[at - size:at], "little")

    while at < len(data):
        terms, groups, op, step, dtype, dimensions = map(number, (8, 8, 4, 8, 1, 1))
        shape = tuple(number(8) for _ in range(dimensions))
        tickets = [number(1 if groups <= 256 else 4) for _ in range(math.ceil(math.prod(shape) / 32) * groups)]
        dtype = ["float32", "float64", "float16", "bfloat16"][dtype]
        found.append(((shape, dtype, terms, groups, op, step), torch.tensor(tickets).view(-1, groups)))
    return found


def by_tickets(terms, tickets):
    """The sum over dimension 0 by the words of order.h: the groups of the tree, one after the other as they arrived."""
    wide = terms.float() if terms.dtype in (torch.float16, torch.bfloat16) else terms
    partials = torch.stack([reference.tree(group) for group in wide.tensor_split(tickets.shape[1])])
    order = tickets.repeat_interleave(32, 0)[:terms.shape[1]].t()
    partials = partials.gather(0, order)
    total = partials[0]
    for partial in partials[1:]:
        total = total + partial
    return total.to(terms.dtype)


@pytest.mark.parametrize("shape", [(1, 1), (2, 33), (8, 1000), (37, 70), (300, 3), (2100, 40), (70000, 5)], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_sum_adds_its_groups_in_the_order_of_their_tickets(device, path, dtype, shape):
    for layout in ("rows", "columns", "apart"):
        x = noise(*shape, dtype=dtype).to(device)
        x = {"rows": x, "columns": x.t().contiguous().t(), "apart": x.repeat_interleave(2, 1)[:, ::2]}[layout]
        with ordered_reduce.record(path):
            total = arrival(x)
        ((entry, tickets),) = sums(path)
        assert entry == (shape[1:], str(dtype)[6:], shape[0], min(8, shape[0]), 0, 0)
        assert torch.equal(tickets.sort(1)[0], torch.arange(tickets.shape[1]).expand_as(tickets))   # permutations
        assert same_bits(total, by_tickets(x.cpu(), tickets))
        with ordered_reduce.replay(path):
            assert same_bits(arrival(x), total)


def test_a_tape_is_obeyed(device, path):
    """Tickets that no hardware drew, in every layout and of more groups than a byte can number."""
    generator = torch.Generator().manual_seed(0)
    for outer, terms, inner, splits in [(1, 40, 100, 8), (3, 40, 50, 8), (70, 300, 1, 300), (5, 600, 7, 300)]:
        x = noise(outer, terms, inner).to(device)
        groups, outputs = min(splits, terms), outer * inner
        tickets = torch.stack([torch.randperm(groups, generator=generator) for _ in range(math.ceil(outputs / 32))])
        with ordered_reduce.record(path):
            tape.keep(tape.Sum((outer, inner), "float32", terms, groups, 0, 0), tickets)
        with ordered_reduce.replay(path):
            total = arrival(x, 1, splits)
        rows = x.cpu().transpose(0, 1).reshape(terms, outputs)
        assert same_bits(total, by_tickets(rows, tickets).view(outer, inner))
        assert not same_bits(total, ordered_reduce.sum(x, 1, splits=splits))
        with ordered_reduce.record(path):      # and those that it draws
            total = arrival(x, 1, splits)
        assert same_bits(total, by_tickets(rows, sums(path)[0][1]).view(outer, inner))


@pytest.mark.skipif(not GPU, reason="needs a CUDA device")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_tape_of_a_cuda_run_replays_on_the_cpu(path, dtype):
    x = noise(300, 2000, dtype=dtype)
    with ordered_reduce.record(path):
        total = arrival(x.cuda(), splits=64)
    with ordered_reduce.replay(path):
        assert same_bits(arrival(x, splits=64), total)


def test_hardware_really_races(path):
    if torch.get_num_threads() < 2:
        pytest.skip("one thread cannot race")
    x = noise(64, 1 << 16)
    assert len({arrival(x, splits=64).numpy().tobytes() for _ in range(50)}) > 1

    def stretches_differ():
        with ordered_reduce.record(path):
            arrival(x, splits=64)
        return len(sums(path)[0][1].unique(dim=0)) > 1

    assert any(stretches_differ() for _ in range(50))


def test_one_thread_arrives_in_fixed_order():
    torch.set_num_threads(1)
    x = noise(64, 1000)
    assert same_bits(arrival(x), ordered_reduce.sum(x, 0))


def test_empty_and_scalar(device, path):
    shapes = [((0,), None), ((0, 3), 0), ((0, 3), 1), ((3, 0, 2), (0, 1)), ((), None), ((), -1), ((4,), 0)]
    with ordered_reduce.record(path):
        first = [arrival(torch.ones(shape, device=device), dim) for shape, dim in shapes]
    with ordered_reduce.replay(path):
        again = [arrival(torch.ones(shape, device=device), dim) for shape, dim in shapes]
    for (shape, dim), a, b in zip(shapes, first, again, strict=True):
        expected = torch.ones(shape).sum() if dim is None else torch.ones(shape).sum(dim)
        assert same_bits(a, expected) and same_bits(b, expected)


def test_gradients(device):
    torch.set_num_threads(1)   # gradcheck wants the same bits twice
    x = torch.randn(3, 4, 2, dtype=torch.float64, device=device, requires_grad=True)
    for dim, keepdim in [(None, False), (1, False), ((0, -1), True)]:
        def f(x, dim=dim, keepdim=keepdim):
            return arrival(x.square(), dim, 3, keepdim=keepdim)

        assert torch.autograd.gradcheck(f, (x,), nondet_tol=1e-12)
        assert torch.autograd.gradgradcheck(f, (x,), nondet_tol=1e-12)


# ------------------------------------------------------------------------------------------------- training runs

def train(device, steps=6, width=16, batch=24, autocast=False, window=None, **policy):
    """The weights after a few steps."""
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Conv2d(3, width, 3), torch.nn.ReLU(), torch.nn.Conv2d(width, 32, 3), torch.nn.ReLU(),
                                torch.nn.Flatten(), torch.nn.Linear(32 * 16, 10)).to(device)
    policy = ordered_reduce.convert(model, "arrival", steps=window, **policy)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    x, y = torch.randn(batch, 3, 8, 8).to(device), torch.randint(10, (batch,)).to(device)
    for _ in range(steps):
        optimizer.zero_grad()
        with torch.autocast(device, torch.bfloat16, enabled=autocast):
            loss = torch.nn.functional.cross_entropy(model(x), y)
        loss.backward()
        optimizer.step()
        policy.step()
    return torch.cat([p.detach().cpu().flatten() for p in model.parameters()])


@pytest.mark.parametrize("autocast", [False, True])
def test_a_recorded_run_replays_bit_for_bit(device, path, autocast):
    with ordered_reduce.record(path):
        weights = train(device, autocast=autocast)
    assert [entry[4:] for entry, _ in sums(path)] == [(op, step) for step in range(6) for op in (2, 1, 0)]
    assert {entry[2:4] for entry, _ in sums(path)} == {(24, 8)}
    for threads in (1, 2) if device == "cpu" else (1,):
        torch.set_num_threads(threads)
        with ordered_reduce.replay(path):
            assert same_bits(train(device, autocast=autocast), weights)


def test_two_runs_differ_and_a_tape_tells_them_apart(tmp_path):
    if torch.get_num_threads() < 2:
        pytest.skip("one thread cannot race")
    run = dict(steps=2, width=256, splits=24)   # on a busy machine small sums are over before the second thread wakes
    runs = {}
    for number in range(50):
        with ordered_reduce.record(tmp_path / str(number)):
            runs[train("cpu", **run).numpy().tobytes()] = number
        if len(runs) == 2:
            break
    assert len(runs) == 2
    for weights, number in runs.items():
        with ordered_reduce.replay(tmp_path / str(number)):
            assert train("cpu", **run).numpy().tobytes() == weights


def test_a_window_of_steps_is_all_that_is_recorded(device, path):
    with ordered_reduce.record(path):
        weights = train(device, 4, layers=["0", "2"], window=(1, 3))
    assert [entry[4:] for entry, _ in sums(path)] == [(1, 1), (0, 1), (1, 2), (0, 2)]
    with ordered_reduce.replay(path):
        assert same_bits(train(device, 4, layers=["0", "2"], window=(1, 3)), weights)


def test_a_model_without_memory_has_no_tickets(path):
    with torch.device("meta"):
        layer = torch.nn.Linear(4, 3)
        ordered_reduce.convert(layer, "arrival")
        with ordered_reduce.record(path):
            layer(torch.randn(5, 4)).sum().backward()
    assert layer.weight.grad.shape == (3, 4) and layer.weight.grad.is_meta


def test_embeddings_are_refused():
    model = torch.nn.Sequential(torch.nn.Embedding(5, 3), torch.nn.Linear(3, 2))
    with pytest.raises(ValueError, match="order='arrival' is not for embeddings.* 0"):
        ordered_reduce.convert(model, "arrival")
    assert type(model[1]) is torch.nn.Linear
    assert ordered_reduce.convert(model, "arrival", layers="1").layers == ["1"]
    with pytest.raises(ValueError, match="order.*'arrival'"):
        ordered_reduce.embedding(torch.tensor([1]), torch.ones(5, 3), order="arrival")
    with pytest.raises(ValueError, match="order.*'arrival'"):
        ordered_reduce.index_add(torch.ones(5), 0, torch.tensor([1]), torch.ones(1), order="arrival")


def test_compiled_code_breaks_its_graph(path):
    torch._dynamo.reset()
    model = torch.nn.Linear(20, 30)
    policy = ordered_reduce.convert(torch.nn.Sequential(model), "arrival")
    x = torch.randn(16, 20)
    expected = torch.nn.functional.linear(x, model.weight, model.bias).square().sum()
    expected, = torch.autograd.grad(expected, model.weight)

    def gradients(**options):
        torch._dynamo.reset()
        policy.load_state_dict({"step": 0})
        compiled, result = torch.compile(model, backend="aot_eager", **options), []
        for _ in range(3):
            model.zero_grad()
            compiled(x).square().sum().backward()
            result.append(model.weight.grad.clone())
            policy.step()
        return result

    with ordered_reduce.record(path):
        first = gradients()
    assert [entry[4:] for entry, _ in sums(path)] == [(0, 0), (0, 1), (0, 2)]
    with ordered_reduce.replay(path):
        again = gradients()
    for a, b in zip(first, again, strict=True):
        assert same_bits(a, b)
        torch.testing.assert_close(a, expected)
    with pytest.raises(Exception, match="cannot be compiled"):
        gradients(fullgraph=True)


# ------------------------------------------------------------------------------------------------------ refusals

@pytest.mark.parametrize("other,named", [
    (dict(width=32), "sum 2 has float32 outputs of shape .*this run's has float32 outputs of shape"),       # another model
    (dict(batch=32), "sum 1 has .* of 24 terms.*this run's has .* of 32 terms"),
    (dict(splits=6), "sum 1 has .* in 8 groups.*in 6 groups"),
    (dict(steps=1), "tape .* has more sums than the 3 of this run; the next has .*step 1"),
    (dict(steps=3), "ends after 6 sums, but this run makes another: .*step 2"),
    (dict(layers="0"), "sum 1 has .*op 2.*this run's has .*op 0"), (dict(window=(1, 2)), "step 0.*step 1"),
], ids=str)
def test_a_tape_of_another_run_is_refused(device, path, other, named):
    with ordered_reduce.record(path):
        train(device, 2)
    with pytest.raises(RuntimeError, match=named), ordered_reduce.replay(path):
        train(device, **{"steps": 2, **other})
    with ordered_reduce.replay(path):      # and the tape is closed: another can be opened
        train(device, 2)


def test_a_broken_tape_is_refused(path):
    x = noise(64, 5000)
    with ordered_reduce.record(path):
        for _ in range(4):
            arrival(x)

    def replayed():
        with ordered_reduce.replay(path):
            for _ in range(4):
                arrival(x)

    replayed()
    whole = path.read_bytes()
    for cut in (len(whole) - 1, len(whole) // 2):
        path.write_bytes(whole[:cut])
        with pytest.raises((RuntimeError, ValueError), match="run.tape is .*broken"):
            replayed()
    middle = len(whole) // 2
    path.write_bytes(whole[:middle] + bytes([whole[middle] ^ 1]) + whole[middle + 1:])
    with pytest.raises((RuntimeError, ValueError), match="run.tape"):   # by what it says, or by its checksum
        replayed()
    for cut in (10, 60):   # whole files that end within the first sum's entry, or within its tickets
        with gzip.open(path, "wb") as file:
            file.write(json.dumps(tape.HEADER).encode() + b"\n" + gzip.decompress(whole).split(b"\n", 1)[1][:cut])
        with pytest.raises(RuntimeError, match="run.tape is broken after sum 0: it ends within"):
            replayed()
    for changed, named in [({"version": 1}, "'version': 1"), ({"stretch": 64}, "'stretch': 64")]:
        with gzip.open(path, "wb") as file:
            file.write(json.dumps({**tape.HEADER, **changed}).encode() + b"\n")
        with pytest.raises(ValueError, match=f"path.*{named}"):
            replayed()
    for content in (b"no tape", b"", gzip.compress(b"no tape"), gzip.compress(b"")):
        path.write_bytes(content)
        with pytest.raises(ValueError, match="path must be a tape.*run.tape"):
            replayed()
    path.unlink()
    with pytest.raises(FileNotFoundError):
        replayed()


def test_a_tape_of_another_shape_or_dtype_is_refused(path):
    """Of as many outputs, terms and groups."""
    def gradient(shape, dtype=torch.float32):
        weight = torch.zeros(shape, dtype=dtype, requires_grad=True)
        ordered_reduce.linear(torch.ones(16, shape[1], dtype=dtype), weight, order="arrival").sum().backward()

    with ordered_reduce.record(path):
        gradient((4, 8))
    for other, named in [(dict(shape=(8, 4)), r"shape \[4, 8\].*shape \[8, 4\]"),
                         (dict(shape=(4, 8), dtype=torch.float64), "float32 outputs.*float64 outputs")]:
        with pytest.raises(RuntimeError, match=named), ordered_reduce.replay(path):
            gradient(**other)


def test_a_full_disk_closes_the_tape(path, monkeypatch):
    def full(self):
        raise OSError("no space left")

    with pytest.raises(OSError, match="no space left"), ordered_reduce.record(path):
        ordered_reduce.sum(noise(8, 40), 1, order="arrival")
        monkeypatch.setattr(tape._Recorder, "flush", full)
    assert not tape.is_open()
    ordered_reduce.sum(noise(8, 40), 1, order="arrival")


@pytest.mark.parametrize("part", [0, 0.5, 1])
def test_an_interrupt_while_a_tape_is_written_leaves_a_tape(path, monkeypatch, part):
    monkeypatch.setattr(tape, "_WAITING", 1)     # every sum is written at once
    x, done = noise(8, 40), []

    class Interrupted:
        def __init__(self, file):
            self.file = file

        def __getattr__(self, name):
            return getattr(self.file, name)

        def write(self, data):
            if len(done) != 3:
                return self.file.write(data)
            self.file.write(data[:int(part * len(data))])
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt), ordered_reduce.record(path):
        file = tape._tape.file = Interrupted(tape._tape.file)
        try:
            while True:
                done.append(arrival(x))
        finally:
            tape._tape.file = file.file          # the interrupt came once
    with ordered_reduce.replay(path):
        assert all(same_bits(arrival(x), total) for total in done)
        arrival(x)                               # that sum had been made, too


def test_a_killed_process_leaves_a_tape(path):
    code = ("import os, sys, torch, ordered_reduce\nx = torch.ones(64, 1 << 16)\nwith ordered_reduce.record(sys.argv[1]):\n"
            "    for _ in range(500): ordered_reduce.sum(x, 0, order='arrival')\n    os._exit(1)")   # 16 kB a sum
    assert subprocess.run([sys.executable, "-c", code, str(path)], timeout=120).returncode == 1
    assert 400 < len(sums(path)) <= 500


def test_tickets_that_are_no_permutation_are_refused(path):
    with ordered_reduce.record(path):
        tape.keep(tape.Sum((40,), "float32", 8, 8, 0, 0), torch.zeros(2, 8))
    with pytest.raises(RuntimeError, match="sum 1: its tickets are not a permutation of 8 groups"), ordered_reduce.replay(path):
        arrival(noise(8, 40))


def test_of_two_threads_one_opens_a_tape(tmp_path):
    for attempt in range(20):
        start, inside, refused = threading.Barrier(2), threading.Barrier(2), []

        def one(number, start=start, inside=inside, refused=refused, attempt=attempt):
            start.wait()
            try:
                with ordered_reduce.record(tmp_path / f"{attempt}-{number}"):
                    inside.wait()       # until the other has been refused, or is inside, too
            except RuntimeError as error:
                refused.append(str(error))
                inside.wait()

        both = [threading.Thread(target=one, args=(number,)) for number in range(2)]
        for thread in both:
            thread.start()
        for thread in both:
            thread.join()
        assert len(refused) == 1 and "open already" in refused[0]


def test_tapes_do_not_nest_and_an_exception_closes_them(path, tmp_path):
    with ordered_reduce.record(path):
        for other in (ordered_reduce.record, ordered_reduce.replay):
            with pytest.raises(RuntimeError, match="run.tape is open already"), other(tmp_path / "other"):
                pass
    assert not (tmp_path / "other").exists()
    with pytest.raises(KeyError), ordered_reduce.record(path):
        arrival(noise(8, 40))
        raise KeyError
    arrival(noise(8, 40))
    assert len(sums(path)) == 1
    with ordered_reduce.replay(path):
        arrival(noise(8, 40))


FORKS = """
import os, sys, ordered_reduce, torch
x = torch.ones(64, 5000)
for opened in (ordered_reduce.record, ordered_reduce.replay):
    with opened(sys.argv[1]):
        ordered_reduce.sum(x, 0, order="arrival")
        child = os.fork()
        ordered_reduce.sum(x, 0, order="arrival")
        if child:
            assert os.waitpid(child, 0) == (child, 0)
        else:
            with ordered_reduce.record(sys.argv[2]):   # it may have a tape of its own
                ordered_reduce.sum(x, 0, order="arrival")
            if sys.argv[3] == "fails":
                sys.exit()    # leaves the `with` as a worker that fails does
    if not child:
        os._exit(0)
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.parametrize("child", ["fails", "ends"])
def test_a_forked_process_leaves_the_tape_alone(path, tmp_path, child):
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}   # OpenMP's threads do not survive a fork
    subprocess.run([sys.executable, "-c", FORKS, str(path), str(tmp_path / "own"), child], check=True, timeout=120,
                   env=environment)
    assert len(sums(path)) == 2 and len(sums(tmp_path / "own")) == 1


def test_other_orders_and_sums_outside_are_not_recorded(path):
    x = noise(8, 40)
    arrival(x)
    with ordered_reduce.record(path):
        for order in ("fixed", "shuffled", "atomic", "exact"):
            ordered_reduce.sum(x, 0, order=order)
    arrival(x)
    assert sums(path) == []


def test_after_an_error_nothing_is_read(path):
    """Even where the program goes on."""
    with ordered_reduce.record(path):
        for width in (40, 50):
            arrival(noise(64, width))
    said = "its sum 2 has .* shape .50.*this run's has .* shape .41."
    with pytest.raises(RuntimeError, match=said), ordered_reduce.replay(path):
        for width in (40, 41, 50):
            with contextlib.nullcontext() if width == 40 else pytest.raises(RuntimeError, match=said):
                arrival(noise(64, width))


@pytest.mark.parametrize("groups", [255, 256, 257])
def test_how_groups_are_numbered(path, groups):
    tickets, x = torch.randperm(groups, generator=torch.Generator().manual_seed(0))[None], noise(300, 7)
    with ordered_reduce.record(path):
        tape.keep(tape.Sum((7,), "float32", 300, groups, 0, 0), tickets)
    assert len(gzip.decompress(path.read_bytes()).split(b"\n", 1)[1]) == 30 + 8 + groups * (1 if groups <= 256 else 4)
    with ordered_reduce.replay(path):
        assert same_bits(arrival(x, splits=groups), by_tickets(x, tickets))


def test_a_changed_byte_raises_nothing_else(path):
    with ordered_reduce.record(path):
        arrival(noise(8, 40))
    whole = path.read_bytes()
    for at in range(len(whole)):     # some bytes say nothing, such as the time
        path.write_bytes(whole[:at] + bytes([whole[at] ^ 255]) + whole[at + 1:])
        with contextlib.suppress(RuntimeError, ValueError), ordered_reduce.replay(path):
            arrival(noise(8, 40))


def test_an_unknown_dtype_is_refused(path):
    with ordered_reduce.record(path):
        arrival(noise(8, 40))
    data = bytearray(gzip.decompress(path.read_bytes()))
    data[data.index(b"\n") + 29] = 9
    path.write_bytes(gzip.compress(data))
    with pytest.raises(RuntimeError, match="sum 1 has unknown outputs"), ordered_reduce.replay(path):
        arrival(noise(8, 40))
