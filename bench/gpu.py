"""One command for a machine with a CUDA device: builds the extension, runs the CUDA tests and compute-sanitizer over
the small ones, and measures, all in one run, `sum` against a device-to-device copy, the ordered layers against the
matrix rate and native's, a Constnet step of every order against native's, and images per second at width 10.

    python bench/gpu.py [--out results/gpu]        # under 8 minutes

Writes gpu.json and gpu.md there; what was skipped stands in both, with the reason. Reach: sum fixed at least 0.9 of the
bandwidth of a copy at 2^28 float32; a step fixed or shuffled at most 1.10 times native's. Exit status 2: no CUDA
device.
"""

import argparse
import importlib.util
import json
import pathlib
import re
import shutil
import statistics
import subprocess
import sys
import time

import torch
from torch.nn import functional as F

ROOT = pathlib.Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))


def shell(*command, seconds):
    """(exit status or None where the time ran out, last lines of the output)"""
    try:
        done = subprocess.run(command, cwd=ROOT, timeout=seconds, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                              text=True)
        return done.returncode, done.stdout.strip().splitlines()[-12:]
    except subprocess.TimeoutExpired as stopped:
        return None, [f"stopped after {stopped.timeout} seconds"]


def build():
    started = time.perf_counter()
    status, lines = shell(sys.executable, "-m", "pip", "install", "-q", "--no-build-isolation", "--no-deps", "-e",
                          "csrc", seconds=240)
    return {"exit_status": status, "seconds": round(time.perf_counter() - started, 1), "last_lines": lines}


def tests():
    if not importlib.util.find_spec("hypothesis"):
        return {"skipped": "hypothesis is not installed"}
    status, lines = shell(sys.executable, "-m", "pytest", "-q", "-x", "tests/test_sum.py", "tests/test_layers.py", "-k",
                          "cuda", seconds=200)
    return {"exit_status": status, "last_lines": lines}


def sanitizer():
    tool = shutil.which("compute-sanitizer") or "/usr/local/cuda/bin/compute-sanitizer"
    if not pathlib.Path(tool).exists():
        return {"skipped": "compute-sanitizer is not installed"}
    program = ("import torch, ordered_reduce\n"
               "for shape in ((), (1,), (1000,), (37, 501), (3, 4, 65)):\n"
               "    x = torch.randn(shape, device='cuda')\n"
               "    for order in ('fixed', 'shuffled', 'atomic'):\n"
               "        for dim in (None, *range(x.ndim)):\n"
               "            ordered_reduce.sum(x, dim, order=order, splits=70)\n"
               "            ordered_reduce.sum(x.double(), dim, order=order, splits=3)\n"
               "torch.cuda.synchronize()\n")
    found = {}
    for check in ("memcheck", "racecheck"):
        status, lines = shell(tool, "--tool", check, "--error-exitcode", "9", sys.executable, "-c", program, seconds=60)
        found[check] = {"exit_status": status, "last_lines": lines[-3:]}
    return found


def median_seconds(f, seconds=1.0):
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


def layers(device, batch=128, size=32, widths=(160, 320, 640)):
    """Forward and backward of the convolutions of Constnet x10, against the rate of a large matrix product."""
    import ordered_reduce

    square = torch.randn(8192 if device == "cuda" else 512, device=device).expand(8192 if device == "cuda" else 512, -1)
    square = square.contiguous()
    rate = 2 * len(square) ** 3 / median_seconds(lambda: square @ square)
    rows = [{"what": "matrix product, float32", "teraflops": rate / 1e12}]
    for stage, width in enumerate(widths):
        x = torch.randn(batch, width, size >> stage, size >> stage, device=device, requires_grad=True)
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


def steps(device, widths=(1, 10), batch=128, size=32):
    """A Constnet training step on CIFAR-sized images, and what it makes in images per second."""
    import ordered_reduce

    import constnet

    rows = []
    for width in widths:
        for precision in ("fp32", "tf32", "bf16"):
            torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = precision != "fp32"
            torch.manual_seed(0)
            model = constnet.Constnet(3, 10, widen=width).to(device)
            constnet.initialise(model, "")
            policy = ordered_reduce.convert(model, "fixed", 8)
            optimizer = torch.optim.SGD(model.parameters(), lr=1e-4, momentum=0.9)
            x = torch.randn(batch, 3, size, size, device=device)
            y = torch.randint(0, 10, (batch,), device=device)

            def step(order):
                policy.now = order
                with torch.autocast(device, torch.bfloat16, enabled=precision == "bf16"):
                    loss = F.cross_entropy(model(x).float(), y)
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()

            native = median_seconds(lambda: step("native"), 2.0)
            for order in ("native", "fixed", "shuffled", "atomic"):
                ours = native if order == "native" else median_seconds(lambda: step(order), 2.0)
                rows.append({"what": f"step {order}, width {width}, batch {batch}, {precision}",
                             "times_native": ours / native, "images_per_second": batch / ours})
    return rows


def table(result):
    """The rows of all parts as Markdown, what was skipped, and the parts' exit statuses."""
    lines = [f"{result['device']}, torch {result['torch']}, commit {result['git_commit']}", ""]
    for part in ("build", "tests", "sanitizer"):
        lines.append(f"* {part}: {json.dumps(result[part])}")
    for part in ("sums", "layers", "steps"):
        if isinstance(result[part], dict):
            lines += ["", f"* {part}: skipped, {result[part]['skipped']}"]
            continue
        columns = list(dict.fromkeys(key for row in result[part] for key in row))
        lines += ["", "| " + " | ".join(columns) + " |", "|---" * len(columns) + "|"]
        for row in result[part]:
            cells = [row.get(key, "") for key in columns]
            lines.append("| " + " | ".join(f"{c:.3g}" if isinstance(c, float) else str(c) for c in cells) + " |")
    return re.sub(r"/\S+/", "", "\n".join(lines)) + "\n"   # no paths of the machine


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=pathlib.Path, default=ROOT / "results" / "gpu")
    args = parser.parse_args()
    if not torch.cuda.is_available():
        print("bench/gpu.py: error: there is no CUDA device here; bench/cpu.py measures the CPU", file=sys.stderr)
        return 2
    result = {"build": build()}
    import ordered_reduce

    import common

    result.update(common.environment(torch.device("cuda")))
    for part in (tests, sanitizer):
        result[part.__name__] = part()
        print(part.__name__, result[part.__name__], flush=True)
    for part in (sums, layers, steps):
        built = ordered_reduce.cuda_built()
        result[part.__name__] = part("cuda") if built else {"skipped": "ordered_reduce has no CUDA kernels"}
        print(part.__name__, "done", flush=True)
        args.out.mkdir(parents=True, exist_ok=True)
        (args.out / "gpu.json").write_text(json.dumps(result, indent=1) + "\n")
    (args.out / "gpu.md").write_text(table(result))
    print(table(result))
    return 0


if __name__ == "__main__":
    sys.exit(main())
