"""Speed on the CPU, as ratios measured in one run: `sum` against torch.sum, exact against fixed order, index_add,
layers of many weights and a Constnet step against PyTorch's own, noise of other kinds against none, the grid of
mlp_replicated.py against one network after the other, --shards against plain data parallel; and which kernels' bits
depend on the number of threads.

    python bench/cpu.py [--out results/bench/cpu.json]      # about 10 minutes on two cores, 1.1 GB

The two sides of a ratio alternate, and the ratio is the median of the pairs' ratios, so that a machine that slows down
for a while slows both. Reach: sum at least 0.9 of torch.sum's throughput, exact at least 0.5 of fixed's, index_add
fixed at most PyTorch's time, a step at most 1.25 times native's, the symmetry measures at most 5 % of a step; the grid
at least 4 times faster, and at least 60 % of the rate of a large matrix product. --only runs one part and leaves the
others' numbers in the file.
"""

import argparse
import functools
import itertools
import json
import os
import pathlib
import statistics
import subprocess
import sys
import tempfile
import time

import torch
from torch import nn
from torch.nn import functional as F

sys.path.insert(0, str(pathlib.Path(__file__).parent.parent))
import ordered_reduce

import common
import constnet
import mlp_replicated


def compare(ours, theirs, seconds=2.0):
    """Median over pairs of time(theirs) / time(ours), and both median times."""
    pairs = []
    for _ in range(3):
        ours(), theirs()
    end = time.perf_counter() + seconds
    while len(pairs) < 7 or (time.perf_counter() < end and len(pairs) < 2000):
        started = time.perf_counter()
        ours()
        between = time.perf_counter()
        theirs()
        pairs.append((between - started, time.perf_counter() - between))
    return statistics.median(b / a for a, b in pairs), *map(statistics.median, zip(*pairs, strict=True))


def sums():
    rows = []
    others = [(exponent, dtype) for dtype in (torch.float64, torch.bfloat16, torch.float16) for exponent in (20, 24)]
    for exponent, dtype in [*((exponent, torch.float32) for exponent in range(20, 29, 2)), *others]:
        x = torch.randn(1 << exponent).to(dtype)
        square = x.view(1 << exponent // 2, -1)
        cases = [("whole", x, None), ("rows", square, 1), ("columns", square, 0)]
        if exponent == 20 and dtype == torch.float32:
            cases += [(f"rows of {n}", x[: len(x) // n * n].view(-1, n), 1) for n in (64, 100, 256, 500, 784)]
        if exponent == 24:
            cases += [("columns of 8", x.view(8, -1), 0)]
        for name, terms, dim in cases:
            ratio, ours, theirs = compare(lambda: ordered_reduce.sum(terms, dim),
                                          lambda: terms.sum() if dim is None else terms.sum(dim))
            kind = "" if dtype == torch.float32 else f"{str(dtype)[6:]}, "
            rows.append({"what": f"sum fixed, {kind}2^{exponent}, {name}", "throughput_of_torch_sum": round(ratio, 3),
                         "microseconds": round(ours * 1e6, 1), "torch_microseconds": round(theirs * 1e6, 1)})
            print(rows[-1], flush=True)
    return rows


def exact():
    rows = []
    for dtype in (torch.float32, torch.float64, torch.bfloat16, torch.float16):
        for shape, dim in (((1 << 20,), None), ((1 << 24,), None), ((4096, 4096), 1), ((4096, 4096), 0),
                           ((1 << 18, 64), 1), ((1 << 20, 8), 1), ((64, 1 << 18), 0), ((8, 1 << 20), 0)):
            x = torch.randn(shape, dtype=torch.float64).to(dtype)   # floats as doubles often add up to ties
            ratio, ours, theirs = compare(lambda: ordered_reduce.sum(x, dim, order="exact"),
                                          lambda: ordered_reduce.sum(x, dim), seconds=1)
            rows.append({"what": f"sum exact, {str(dtype)[6:]}, {' x '.join(map(str, shape))}, dim {dim}",
                         "throughput_of_fixed": round(ratio, 3), "microseconds": round(ours * 1e6, 1),
                         "fixed_microseconds": round(theirs * 1e6, 1)})
            print(rows[-1], flush=True)
    return rows


def index_adds():
    rows, cases = [], []
    for n, size, width in ((1 << 16, 10000, 64), (1 << 16, 10000, 16), (1 << 16, 10000, 256), (1 << 16, 1 << 16, 64),
                           (1 << 12, 1 << 16, 64), (1 << 16, 4, 64), (1 << 16, 1, 512), (1 << 16, 10000, 1),
                           (1 << 20, 100000, 1), (1 << 16, 1 << 16, 1), (1 << 16, 4, 1)):
        shape = (width,) if width > 1 else ()
        given = torch.zeros(size, *shape), 0, torch.randint(size, (n,)), torch.randn(n, *shape)
        cases += [(f"index_add {order}, {n} rows of {width} into {size}",
                   functools.partial(ordered_reduce.index_add, *given, order=order),
                   functools.partial(torch.index_add, *given)) for order in ("fixed", "shuffled", "atomic", "exact")]
    last = torch.zeros(256, 1000), 1, torch.randint(1000, (10000,)), torch.randn(256, 10000)
    cases.append(("index_add fixed, 10000 numbers into 1000 along the last of 256 x 1000",
                  lambda: ordered_reduce.index_add(*last), lambda: torch.index_add(*last)))
    for n, size, width in ((1024, 50000, 256), (8192, 50000, 64), (8192, 1000, 256)):
        words, grad = torch.randint(size, (n,)), torch.randn(n, width)
        weight = torch.randn(size, width, requires_grad=True)
        sides = [functools.partial(torch.autograd.grad, f(words, weight), weight, grad, retain_graph=True)
                 for f in (ordered_reduce.embedding, F.embedding)]
        cases.append((f"backward of embedding fixed, {n} of {size} rows of {width}", *sides))
    for what, *sides in cases:
        ratio, ours, theirs = compare(*sides, seconds=1)
        rows.append({"what": what, "times_torch": round(1 / ratio, 3), "milliseconds": round(ours * 1e3, 3),
                     "torch_milliseconds": round(theirs * 1e3, 3)})
        print(rows[-1], flush=True)
    return rows


def large():
    """Forward and backward of layers of many weights: what counts is their partial gradients' way through memory."""
    rows = []
    cases = [(f"linear, {batch} samples, {inputs} to {outputs}", ordered_reduce.linear, (batch, inputs),
              (outputs, inputs)) for batch, inputs, outputs in
             ((32, 4096, 4096), (8, 9216, 4096), (64, 512, 1000), (1024, 512, 512))]
    convolution = functools.partial(ordered_reduce.conv2d, padding=1)
    cases += [(f"3x3 convolution, 32 samples of 512 x {size} x {size}", convolution, (32, 512, size, size),
               (512, 512, 3, 3)) for size in (1, 2, 4)]
    for what, f, *shapes in cases:
        x, weight = (torch.randn(shape, requires_grad=True) for shape in shapes)
        grad = torch.randn_like(f(x, weight))

        def step(order):
            torch.autograd.grad(f(x, weight, order=order), (x, weight), grad)

        for order in ("fixed", "shuffled", "exact", "atomic"):
            ratio, ours, theirs = compare(lambda: step(order), lambda: step("native"))
            rows.append({"what": f"{order}: {what}", "times_native": round(1 / ratio, 3),
                         "milliseconds": round(ours * 1e3, 2), "native_milliseconds": round(theirs * 1e3, 2)})
            print(rows[-1], flush=True)
    return rows


def noises():
    """A Constnet step of the digits' size in fixed order, with noise in all gradients and without."""
    rows, args = [], constnet.parse_arguments(["--dataset", "digits"])
    x, y = torch.randn(args.batch_size, 1, 8, 8), torch.randint(0, 10, (args.batch_size,))
    model = constnet.Constnet(1, 10, args.blocks, args.widen)
    policy = ordered_reduce.convert(model, splits=args.splits)

    def step(noise):
        policy.noise_now = noise
        model.zero_grad()
        F.cross_entropy(model(x), y).backward()

    for noise in ordered_reduce.noise.NOISES:
        ratio, ours, theirs = compare(lambda: step(noise), lambda: step(None), seconds=6)
        rows.append({"what": f"gradients with noise {noise}, digits size", "times_without": round(1 / ratio, 3),
                     "milliseconds": round(ours * 1e3, 2), "milliseconds_without": round(theirs * 1e3, 2)})
        print(rows[-1], flush=True)
    return rows


def steps():
    rows = []
    for dataset, size in (("digits", 8), ("fashion-mnist", 28)):
        args = constnet.parse_arguments(["--dataset", dataset])
        torch.manual_seed(0)
        x, y = torch.randn(args.batch_size, 1, size, size), torch.randint(0, 10, (args.batch_size,))
        model = constnet.Constnet(1, 10, args.blocks, args.widen)
        constnet.initialise(model, "")
        policy = ordered_reduce.convert(model, splits=args.splits)
        optimizer = torch.optim.SGD(model.parameters(), lr=1e-4, momentum=0.9)

        def step(order):
            policy.now = order
            loss = F.cross_entropy(model(x), y)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()

        for order in ("fixed", "shuffled", "atomic"):
            ratio, ours, theirs = compare(lambda: step(order), lambda: step("native"), seconds=12)
            rows.append({"what": f"step {order}, {dataset} size, G = {args.splits}",
                         "times_native": round(1 / ratio, 3),
                         "milliseconds": round(ours * 1e3, 2), "native_milliseconds": round(theirs * 1e3, 2)})
            print(rows[-1], flush=True)

        symmetry = constnet.Symmetry(model)

        def measures(n=32):
            for _ in range(n):
                symmetry.measure({"step": 0})
            symmetry.flush()

        ratio, *_ = compare(measures, lambda: [step("shuffled") for _ in range(32)], seconds=15)
        rows.append({"what": f"symmetry measures, {dataset} size", "share_of_a_step": round(1 / ratio, 4)})
        print(rows[-1], flush=True)
    return rows


def threads():
    """Which parts of a Constnet step give other bits with one thread than with all: what --resume on another machine,
    or OMP_NUM_THREADS, can change."""
    rows, many = [], torch.get_num_threads()
    for channels, size in ((1, 8), (1, 28), (3, 32)):
        torch.manual_seed(0)
        x, y = torch.randn(64, channels, size, size), torch.randint(0, 10, (64,))
        model = constnet.Constnet(channels, 10)
        constnet.initialise(model, "")
        policy = ordered_reduce.convert(model)
        for order in ("fixed", "shuffled", "native"):
            policy.now, runs = order, []
            for number in (1, many):
                torch.set_num_threads(number)
                seen = {}
                model.zero_grad()
                for name, module in model.named_modules():
                    if not list(module.children()):
                        module.register_forward_hook(lambda _, __, out, name=name: seen.update({name: out.detach()}))
                F.cross_entropy(model(x), y).backward()
                runs.append({**seen, **{f"{name}.grad": p.grad.clone() for name, p in model.named_parameters()}})
            differ = [name for name in runs[0] if not torch.equal(runs[0][name], runs[1][name])]
            rows.append({"what": f"{channels} x {size} x {size} images, {order}", "threads": [1, many],
                         "tensors": len(runs[0]), "other_bits": differ})
            print(rows[-1], flush=True)
    return rows


def mlp_grid(device):
    """mlp_replicated.py's arguments, cells with N = 16 to 256 on 784 inputs, units and data, and the operations of a
    step of one seed, forward and backward of both layers."""
    args = mlp_replicated.parse_arguments(["--dataset", "mnist", "--widths", "16", "32", "64", "128", "256", "--steps",
                                           "60", "--device", device])
    cells = mlp_replicated.grid(args)
    (_, units), = mlp_replicated.rooms(cells, 1 << 20)
    x = torch.randint(0, 256, (2000, 784), dtype=torch.uint8, device=device)
    y = torch.randint(0, 10, (2000,), device=device)
    return args, cells, units, [x, y, x[:250], y[:250], 10], 64 * sum(width * (4 * 784 + 6 * 10) for width, *_ in cells)


def one_network(width, x, y):
    """A function that makes a training step of a network of this width alone."""
    model = nn.Sequential(nn.Linear(784, width, bias=False), nn.ReLU(), nn.Linear(width, 10, bias=False)).to(x.device)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)

    def step():
        index = torch.randint(2000, (64,), device=x.device)
        loss = F.cross_entropy(model(x[index] / 255), y[index])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    return step


def grid():
    """All cells of one seed against a loop of nn.Modules, per step."""
    args, cells, units, data, operations = mlp_grid("cpu")
    square = torch.randn(2048, 2048)
    rates, batched, one_by_one = [], [], 0.0

    def timed(f):
        started = time.perf_counter()
        f()
        return time.perf_counter() - started

    for _ in range(3):
        rates += [2 * 2048 ** 3 / timed(lambda: square @ square) for _ in range(5)]
        ticks = []
        mlp_replicated.train(cells, units, [0], data, args, lambda _: ticks.append(time.perf_counter()))
        batched += [b - a for a, b in itertools.pairwise(ticks[11:])]
    for width, *_ in cells:
        step = one_network(width, *data[:2])
        one_by_one += statistics.median([timed(step) for _ in range(25)][5:])
    seconds, rate = statistics.median(batched), statistics.median(rates)
    rows = [{"what": f"MLP grid, {len(cells)} cells, N = 16 to 256, batch 64",
             "times_faster": round(one_by_one / seconds, 2),
             "share_of_matrix_rate": round(operations / seconds / rate, 3),
             "milliseconds": round(seconds * 1e3, 2), "one_by_one_milliseconds": round(one_by_one * 1e3, 2),
             "matrix_gigaflops": round(rate / 1e9, 1)}]
    print(rows[-1], flush=True)
    return rows


def shards():
    """Two processes with a thread each on the digits: the same bits on any number of processes, against
    DistributedDataParallel."""
    seconds = {"0": [], "2": []}
    with tempfile.TemporaryDirectory() as folder:
        for pair in range(5):
            for number, found in seconds.items():
                out = pathlib.Path(folder, f"{number}-{pair}")
                subprocess.run(
                    [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2",
                     constnet.__file__, "--epochs", "8", "--shards", number, "--device", "cpu", "--out", out],
                    check=True, capture_output=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
                found.append(json.loads((out / "summary.json").read_text())[0]["wall_seconds"])
    ratio = statistics.median(ours / theirs for ours, theirs in zip(seconds["2"], seconds["0"], strict=True))
    rows = [{"what": "constnet.py --shards 2 on two processes, digits", "times_data_parallel": round(ratio, 3),
             "seconds": statistics.median(seconds["2"]), "data_parallel_seconds": statistics.median(seconds["0"])}]
    print(rows[-1], flush=True)
    return rows


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=pathlib.Path, default="results/bench/cpu.json")
    parts = (threads, steps, large, noises, sums, exact, index_adds, grid, shards)
    parser.add_argument("--only", choices=[part.__name__ for part in parts], help="default: all")
    args = parser.parse_args()
    result = json.loads(args.out.read_text()) if args.only and args.out.exists() else {}
    result.update(common.environment(torch.device("cpu")))
    for part in parts:
        if args.only in (None, part.__name__):
            result[part.__name__] = part()
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps(result, indent=1) + "\n")
