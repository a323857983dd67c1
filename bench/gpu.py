"""One command for a machine with a CUDA device: builds the extension, runs the CUDA tests and compute-sanitizer over
small cases, and measures, all in one run, `sum` against a device-to-device copy, exact against fixed order, index_add
against PyTorch's two, the ordered layers against the matrix rate and native's, a Constnet step of every order against
native's (as a CUDA graph and kernel by kernel), images per second at width 10, the MLP grid against one network after
the other; audits the blocks of a Constnet of width 10, and trains the README's first command.

    python bench/gpu.py [--out results/gpu]        # 8 minutes at most: what comes too late is skipped
    python bench/gpu.py --only training compiled   # what was skipped; the step under torch.compile, some minutes more

Writes gpu.json and gpu.md there after every part; what was skipped stands in both, with the reason. --only runs some
parts and keeps the others' numbers. Reach: sum fixed at least 0.9 of the bandwidth of a copy at 2^28 float32, exact at
least 0.5 of fixed's throughput, index_add fixed at most 2 times PyTorch's atomic one, a step fixed or shuffled at most
1.10 times native's. Exit status 2: no CUDA device.
"""

import argparse
import collections
import importlib.util
import itertools
import json
import math
import os
import pathlib
import re
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time

import torch
from torch.nn import functional as F

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent))
sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent / "csrc"))   # what is installed meanwhile
import common

ROOT = pathlib.Path(common.__file__).parent
END = time.perf_counter() + (math.inf if any(word.startswith("--only") for word in sys.argv) else 470)


def shell(*command, seconds, **environment):
    """(exit status or None where the time ran out, last lines of the output)"""
    seconds = max(1, min(seconds, END - time.perf_counter()))
    with subprocess.Popen(command, cwd=ROOT, env={**os.environ, **environment}, stdout=subprocess.PIPE,
                          stderr=subprocess.STDOUT, text=True, start_new_session=True) as process:
        try:
            said, status = process.communicate(timeout=seconds)[0], process.returncode
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)   # what it started as well
            said, status = process.communicate()[0] + f"\nstopped after {seconds:.0f} seconds", None
    return status, re.sub(r"/\S+/", "", said).strip().splitlines()[-24:]   # no paths of the machine


def build():
    started = time.perf_counter()
    target = "{}.{}".format(*torch.cuda.get_device_capability())   # this device alone takes half as long
    status, lines = shell(sys.executable, "-m", "pip", "install", "-q", "--no-build-isolation", "--no-deps", "-e",
                          "csrc", seconds=240, **{"TORCH_CUDA_ARCH_LIST": target, **os.environ})
    return {"exit_status": status, "seconds": round(time.perf_counter() - started, 1), "last_lines": lines}


def tests():
    if not importlib.util.find_spec("hypothesis"):
        return {"skipped": "hypothesis is not installed"}
    several = ("-n", "8") if importlib.util.find_spec("xdist") else ()
    status, lines = shell(sys.executable, "-m", "pytest", "-q", "--no-header", "--tb=line", "--disable-warnings",
                          "-rfE", "--maxfail=30", *several, "tests", "-k", "cuda and not cuda_on_cpu", seconds=200)
    return {"exit_status": status, "last_lines": lines}


def sanitizer():
    tool = shutil.which("compute-sanitizer") or "/usr/local/cuda/bin/compute-sanitizer"
    if not pathlib.Path(tool).exists():
        return {"skipped": "compute-sanitizer is not installed"}
    program = ("import torch, ordered_reduce\n"
               "for shape in ((), (1,), (1000,), (37, 501), (3, 4, 65)):\n"
               "    x = torch.randn(shape, device='cuda')\n"
               "    for order in ('fixed', 'shuffled', 'atomic', 'exact'):\n"
               "        for dim in (None, *range(x.ndim)):\n"
               "            ordered_reduce.sum(x, dim, order=order, splits=70)\n"
               "            ordered_reduce.sum(x.double(), dim, order=order, splits=3)\n"
               "for n, rows, width in ((300, 9, 17), (3000, 1, 16), (500, 200, 64), (4000, 2, 1)):\n"
               "    x, index = torch.randn(n, width, device='cuda'), torch.randint(rows, (n,), device='cuda')\n"
               "    for order in ('fixed', 'shuffled', 'atomic', 'exact'):\n"
               "        ordered_reduce.index_add(x[:rows], 0, index, x, order=order)\n"
               "for dtype in (torch.float32, torch.bfloat16):\n"
               "    some = [torch.randn(48, 40, 3, 3, device='cuda', dtype=dtype) for _ in range(9)]\n"
               "    for partials in (some, [t.contiguous(memory_format=torch.channels_last) for t in some[:8]]):\n"
               "        torch.ops.ordered_reduce.add_partials(partials, x, True)\n"
               "ordered_reduce.sum(x, 0, order='arrival')\n"
               "torch.cuda.synchronize()\n")
    found = {}
    for check in ("memcheck", "racecheck"):
        status, lines = shell(tool, "--tool", check, "--error-exitcode", "9", sys.executable, "-c", program, seconds=60)
        found[check] = {"exit_status": status, "last_lines": lines[-3:]}
    return found


def median_seconds(f, seconds=0.2):
    """Median over runs of f, each timed alone between two synchronisations."""
    times = []
    for _ in range(3):
        f()
    end = time.perf_counter() + seconds
    while len(times) < 5 or (time.perf_counter() < end and len(times) < 500):
        torch.cuda.synchronize()
        started = time.perf_counter()
        f()
        torch.cuda.synchronize()
        times.append(time.perf_counter() - started)
    return statistics.median(times)


def sums(device, largest=28):
    import ordered_reduce

    rows = []
    for exponent in range(20, largest + 1, 4):
        x = torch.randn(1 << exponent, device=device)
        target, square = torch.empty_like(x), x.view(1 << exponent // 2, -1)
        copy = 2 * x.nbytes / median_seconds(lambda: target.copy_(x))   # a copy reads and writes
        for name, terms, dim in (("whole", x, None), ("rows", square, 1), ("columns", square, 0)):
            native = x.nbytes / median_seconds(lambda: terms.sum() if dim is None else terms.sum(dim))
            for order in ("fixed", "shuffled", "atomic"):
                ours = x.nbytes / median_seconds(lambda: ordered_reduce.sum(terms, dim, order=order))
                rows.append({"what": f"sum {order}, 2^{exponent} float32, {name}", "gigabytes_per_second": ours / 1e9,
                             "of_the_copy": ours / copy, "of_torch_sum": ours / native})
    return rows


def exact(device, largest=26):
    import ordered_reduce

    rows = []
    for dtype in (torch.float32, torch.float64, torch.bfloat16):
        for shape, dim in (((1 << largest,), None), ((1 << largest // 2, 1 << largest // 2), 1),
                           ((1 << largest // 2, 1 << largest // 2), 0), ((1 << largest - 6, 64), 1)):
            x = torch.randn(shape, device=device).to(dtype)
            fixed = median_seconds(lambda: ordered_reduce.sum(x, dim))
            ours = median_seconds(lambda: ordered_reduce.sum(x, dim, order="exact"))
            rows.append({"what": f"sum exact, {str(dtype)[6:]}, {' x '.join(map(str, shape))}, dim {dim}",
                         "gigabytes_per_second": x.nbytes / ours / 1e9, "throughput_of_fixed": fixed / ours})
    return rows


def index_adds(device, scale=1):
    """Against torch.index_add, which races on a GPU, and its deterministic mode."""
    import ordered_reduce

    rows = []
    for n, size, width in ((1 << 20, 100000, 64), (1 << 20, 1 << 20, 64), (1 << 20, 4, 64), (1 << 20, 1, 512),
                           (1 << 20, 100000, 1), (1 << 20, 4, 1)):
        n, shape = n // scale, (width,) if width > 1 else ()
        index = torch.randint(size, (n,), device=device)
        source, input = torch.randn(n, *shape, device=device), torch.zeros(size, *shape, device=device)
        atomic = median_seconds(lambda: torch.index_add(input, 0, index, source))
        torch.use_deterministic_algorithms(True)
        deterministic = median_seconds(lambda: torch.index_add(input, 0, index, source))
        torch.use_deterministic_algorithms(False)
        for order in ("fixed", "shuffled", "atomic", "exact"):
            ours = median_seconds(lambda: ordered_reduce.index_add(input, 0, index, source, order=order))
            rows.append({"what": f"index_add {order}, {n} rows of {width} into {size}", "milliseconds": ours * 1e3,
                         "times_torch_atomic": ours / atomic, "times_torch_deterministic": ours / deterministic})
    return rows


def layers(device, batch=128, size=32, widths=(160, 320, 640)):
    """Forward and backward of the convolutions of Constnet x10, against the rate of a large matrix product."""
    import ordered_reduce

    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    square = torch.randn(8192 if device == "cuda" else 512, device=device).expand(8192 if device == "cuda" else 512, -1)
    square = square.contiguous()
    rate = 2 * len(square) ** 3 / median_seconds(lambda: square @ square)
    rows = [{"what": "matrix product, float32", "teraflops": rate / 1e12}]
    for stage, width in enumerate(widths):
        x = torch.randn(batch, width, size >> stage, size >> stage, device=device)
        x = x.contiguous(memory_format=torch.channels_last).requires_grad_()
        weight = torch.randn(width, width, 3, 3, device=device, requires_grad=True)
        operations = 6 * batch * (size >> stage) ** 2 * width ** 2 * 9

        def run(order):
            out = ordered_reduce.conv2d(x, weight, padding=1, order=order)
            torch.autograd.grad(out.sum(), (x, weight))

        native = median_seconds(lambda: run("native"))
        for order in ("fixed", "shuffled", "atomic"):
            ours = median_seconds(lambda: run(order))
            rows.append({"what": f"conv2d {width} channels, {size >> stage} pixels, {order}",
                         "times_native": ours / native, "of_the_matrix_rate": operations / ours / rate})
    return rows


def network(width, precision, device, batch, size, order):
    """(policy, a function that makes a training step of a Constnet on CIFAR-sized images, its model). PyTorch's own
    operations are deterministic but for order native, as constnet.py has it."""
    import ordered_reduce

    import constnet

    torch.use_deterministic_algorithms(order != "native")
    torch.backends.cudnn.deterministic = order != "native"
    torch.utils.deterministic.fill_uninitialized_memory = False
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = precision != "fp32"
    torch.manual_seed(0)
    model = constnet.Constnet(3, 10, widen=width)
    constnet.initialise(model, "")
    model.to(device, memory_format=torch.channels_last)   # as constnet.py has it
    policy = ordered_reduce.convert(model, order, 8)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-4, momentum=0.9)
    x = torch.randn(batch, 3, size, size, device=device)
    y = torch.randint(0, 10, (batch,), device=device)

    def step(forward=model):
        with torch.autocast(device, torch.bfloat16, enabled=precision == "bf16"):
            loss = F.cross_entropy(forward(x).float(), y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        policy.step()

    return policy, step, model


def captured(f, times=1):
    """A function that replays a CUDA graph of f, so many times over."""
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        for _ in range(3):
            f()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(times):
            f()
    return graph.replay


def steps(device, widths=(1, 10), batch=128, size=32):
    """A Constnet training step, and what it makes in images per second."""
    rows = []
    for width in widths:
        for precision in ("fp32", "tf32", "bf16"):
            for how in ("graph", "kernel by kernel"):
                native = None
                for order in ("native", "fixed", "shuffled", "atomic"):
                    policy, step, _ = network(width, precision, device, batch, size, order)
                    policy.to(device)
                    ours = median_seconds(captured(step) if how == "graph" else step, 0.3)
                    native = native or ours
                    rows.append({"what": f"step {order}, width {width}, batch {batch}, {precision}, {how}",
                                 "times_native": ours / native, "images_per_second": batch / ours})
    return rows


def channels(device, width=10, batch=128, size=16):
    """Which passes of Constnet's blocks in fixed order tell equal channels apart, or do not repeat."""
    import ordered_reduce

    rows = []
    for precision in ("fp32", "tf32", "bf16"):
        _, _, model = network(width, precision, device, batch, size, "fixed")
        for s, stage in enumerate(model.stages):
            for b, block in enumerate(stage[:2]):
                side = size >> max(0, s - (b == 0))
                x = torch.randn(batch, block.conv.in_channels, side, side, device=device)
                with torch.autocast(device, torch.bfloat16, enabled=precision == "bf16"):
                    found = ordered_reduce.audit(block, x.contiguous(memory_format=torch.channels_last))
                rows += [{"what": f"{precision}, stages.{s}.{b}, {row['operation']}, {row['pass']}",
                          **{check: "; ".join(cases) for check, cases in row["failures"].items()
                             if check in ("repeats", "equal channels")}}
                         for row in found if "no" in (row["repeats"], row["equal channels"])]
    return rows or [{"what": "everything repeats and treats equal channels equally"}]


def compiled(device, width=10, batch=128, size=32):
    """The same in bf16, compiled: constnet.py --compile."""
    rows, native = [], None
    for order in ("native", "fixed", "shuffled"):
        torch.compiler.reset()
        _, step, model = network(width, "bf16", device, batch, size, order)
        forward, started = torch.compile(model), time.perf_counter()
        step(forward)
        first = time.perf_counter() - started
        ours = median_seconds(lambda: step(forward), 1.0)
        native = native or ours
        rows.append({"what": f"compiled step {order}, width {width}, batch {batch}, bf16",
                     "times_native": ours / native, "images_per_second": batch / ours, "seconds_to_compile": first})
    return rows


def grid(device, seeds=30):
    """All cells of mlp_replicated.py's grid and all seeds in one training, against one after the other, per step."""
    import cpu

    import mlp_replicated

    args, cells, units, data, operations = cpu.mlp_grid(device)
    ticks = []

    def tick(_):
        torch.cuda.synchronize()
        ticks.append(time.perf_counter())

    mlp_replicated.train(cells, units, range(seeds), data, args, tick)
    together = statistics.median(b - a for a, b in itertools.pairwise(ticks[11:]))
    counts = collections.Counter(width for width, *_ in cells)
    one_by_one = seeds * sum(count * median_seconds(cpu.one_network(width, *data[:2]))
                             for width, count in counts.items())
    torch.backends.cuda.matmul.allow_tf32 = False
    square = torch.randn(8192, 512 if device == "cuda" else 8, device=device)
    rate = 2 * 8192 ** 2 * square.shape[1] / median_seconds(lambda: square @ square.t())
    return [{"what": f"MLP grid, {seeds} seeds of {len(cells)} cells, N = 16 to 256, batch 64, float32",
             "times_faster": one_by_one / together, "milliseconds": together * 1e3,
             "share_of_matrix_rate": seeds * operations / together / rate}]


def training(device, *more):
    """The first command of the README, and whether fixed and shuffled repeat bit for bit."""
    def run(folder, *arguments):
        status, lines = shell(sys.executable, "constnet.py", "--device", device, *more, *arguments, "--out", folder,
                              seconds=150)
        return json.loads(pathlib.Path(folder, "summary.json").read_text()) if status == 0 else lines

    with tempfile.TemporaryDirectory() as folder:
        found = run(f"{folder}/run", "--order", "native", "fixed", "shuffled", "atomic")
        again = run(f"{folder}/again", "--order", "fixed", "shuffled")
    if not found or not isinstance(found[0], dict) or not isinstance(again[0], dict):
        return {"skipped": f"it failed: {[run for run in (found, again) if not run or isinstance(run[0], str)]}"}
    shas = {arm["order"]: arm["weights_sha256"] for arm in again}
    return [{"what": f"constnet.py, digits, {arm['order']}", "test_accuracy": arm["test_accuracy"],
             "distinct_filters": sum(arm["symmetry"]["distinct_filters"].values()),
             "first_broken_step": arm["symmetry"]["first_broken_step"], "seconds": arm["wall_seconds"],
             "repeats": shas[arm["order"]] == arm["weights_sha256"] if arm["order"] in shas else ""} for arm in found]


def table(result):
    """The rows of all parts as Markdown, what was skipped, and the parts' exit statuses."""
    lines = [f"{result['device']}, torch {result['torch']}, commit {result['git_commit']}", ""]
    lines += [f"* {part}: {json.dumps(found)}" for part, found in result.items() if isinstance(found, dict)]
    for rows in result.values():
        if not isinstance(rows, list):
            continue
        columns = list(dict.fromkeys(key for row in rows for key in row))
        lines += ["", "| " + " | ".join(columns) + " |", "|---" * len(columns) + "|"]
        for row in rows:
            cells = [row.get(key, "") for key in columns]
            lines.append("| " + " | ".join(f"{c:.3g}" if isinstance(c, float) else str(c) for c in cells) + " |")
    return "\n".join(lines) + "\n"


PARTS = (build, tests, sanitizer, sums, exact, index_adds, layers, steps, channels, grid, training)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=pathlib.Path, default=ROOT / "results" / "gpu")
    parser.add_argument("--only", nargs="+", choices=[part.__name__ for part in (*PARTS, compiled)],
                        help="default: all but compiled")
    args = parser.parse_args()
    if not torch.cuda.is_available():
        print("bench/gpu.py: error: there is no CUDA device here; bench/cpu.py measures the CPU", file=sys.stderr)
        return 2
    args.out.mkdir(parents=True, exist_ok=True)
    file = args.out / "gpu.json"
    result = json.loads(file.read_text()) if args.only and file.exists() else {}
    result.update(common.environment(torch.device("cuda")))
    for part in (*PARTS, compiled):
        name = part.__name__
        if name not in args.only if args.only else part is compiled:
            continue
        started = time.perf_counter()
        if started > END - 30:
            result[name] = {"skipped": f"no time was left: --only {name}"}
        elif part in (build, tests, sanitizer):
            result[name] = part()
        else:
            try:
                import ordered_reduce
                missing = None if ordered_reduce.cuda_built() else "ordered_reduce has no CUDA kernels"
            except ImportError as error:
                missing = str(error)
            result[name] = {"skipped": missing} if missing else part("cuda")
        torch.use_deterministic_algorithms(False)   # what network() has set
        torch.backends.cudnn.deterministic = False
        print(f"{name}: {time.perf_counter() - started:.0f} seconds", flush=True)
        file.write_text(json.dumps(result, indent=1) + "\n")
        (args.out / "gpu.md").write_text(table(result))
    print(table(result))
    return 0


if __name__ == "__main__":
    sys.exit(main())
