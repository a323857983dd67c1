"""The kernels of a GPU alone, without their launches, which on a slow host take longer; bench/gpu.py times whole calls.

    python bench/gpu_kernels.py [kernels] [weight_gradients] [adding] [sorting] [steps]    # a row of JSON for each case

A key is a time in microseconds: four calls captured as a CUDA graph that is replayed ten times. What cannot be captured
(index_add, which raises an error for an index out of range) is the profiler's sum over all kernels, and "wall" is
bench/gpu.py's time of a call with its launches.
"""

import json
import pathlib
import sys

import torch

sys.path[:0] = [str(pathlib.Path(__file__).resolve().parent.parent / folder) for folder in ("", "bench", "csrc")]
import gpu as bench  # noqa: E402
import ordered_reduce  # noqa: E402

STEP = torch.zeros((), dtype=torch.int64, device="cuda")   # a graph reads the step on the device


def say(**row):
    print(json.dumps({key: float(f"{value:.4g}") if isinstance(value, float) else value for key, value in row.items()}),
          flush=True)


def wall(f):
    return bench.median_seconds(f) * 1e6


def alone(f):
    replay = bench.captured(f, 4)
    replay()
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    start.record()
    for _ in range(10):
        replay()
    end.record()
    torch.cuda.synchronize()
    return start.elapsed_time(end) / 40 * 1e3


def profiled(name, f, times=3):
    for _ in range(2):
        f()
    torch.cuda.synchronize()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        for _ in range(times):
            f()
        torch.cuda.synchronize()
    say(what="profile", name=name, total_us=sum(e.device_time_total for e in profile.key_averages()) / times)


def kernels():
    for e in (20, 24, 28):
        x = torch.randn(1 << e, device="cuda")
        square, target = x.view(1 << e // 2, -1), torch.empty_like(x)
        row = {"copy": alone(lambda: target.copy_(x)), "torch_whole": alone(lambda: x.sum()),
               "torch_rows": alone(lambda: square.sum(1)), "torch_cols": alone(lambda: square.sum(0))}
        for order in ("fixed", "shuffled", "atomic", "exact"):
            for name, terms, dim in (("whole", x, None), ("rows", square, 1), ("cols", square, 0)):
                row[f"{order}_{name}"] = alone(lambda: ordered_reduce.sum(terms, dim, order=order, step=STEP))
        narrow = x.view(-1, 4)   # few columns, which are read side by side
        row["torch_narrow"] = alone(lambda: narrow.sum(0))
        row["fixed_narrow"] = alone(lambda: ordered_reduce.sum(narrow, 0))
        say(what="sum", e=e, **row, wall_fixed=wall(lambda: ordered_reduce.sum(x)), wall_torch=wall(lambda: x.sum()),
            wall_copy=wall(lambda: target.copy_(x)))
    for dtype in (torch.float32, torch.float64, torch.bfloat16):
        for shape, dim in (((1 << 26,), None), ((1 << 13, 1 << 13), 1), ((1 << 13, 1 << 13), 0), ((1 << 20, 64), 1)):
            x = torch.randn(shape, device="cuda").to(dtype)
            say(what="exact", dtype=str(dtype), shape=str(shape), dim=dim, torch=alone(lambda: x.sum(dim)),
                fixed=alone(lambda: ordered_reduce.sum(x, dim)),
                exact=alone(lambda: ordered_reduce.sum(x, dim, order="exact")))
    for size, width in ((100000, 64), (1 << 20, 64), (4, 64), (1, 512), (100000, 1), (4, 1)):
        n, shape = 1 << 20, (width,) if width > 1 else ()
        index = torch.randint(size, (n,), device="cuda")
        source, input = torch.randn(n, *shape, device="cuda"), torch.zeros(size, *shape, device="cuda")
        profiled(f"torch.index_add {n} x {width} into {size}", lambda: torch.index_add(input, 0, index, source))
        for order in ("fixed", "shuffled", "atomic", "exact"):
            profiled(f"index_add {order} {n} x {width} into {size}",
                     lambda: ordered_reduce.index_add(input, 0, index, source, order=order))


def weight_gradients():
    """Of 128 images in one call, 8 groups of samples one after the other, and 8 groups of channels in one call."""
    def gradient(grad, x, weight, stride, groups=1):
        return torch.ops.aten.convolution_backward.default(grad, x, weight, None, [stride] * 2, [1, 1], [1, 1], False,
                                                           [0, 0], groups, [False, True, False])[1]

    def beside(t):
        n, channels, height, width = t.shape
        t = t.permute(0, 2, 3, 1).reshape(8, n // 8, height, width, channels).permute(1, 2, 3, 0, 4)
        return t.reshape(n // 8, height, width, 8 * channels).permute(0, 3, 1, 2)

    for dtype, tf32 in ((torch.bfloat16, False), (torch.float32, True), (torch.float32, False)):
        torch.backends.cudnn.allow_tf32 = tf32
        for ci, co, size, stride in ((160, 160, 32, 1), (320, 320, 16, 1), (640, 640, 8, 1),
                                     (16, 160, 32, 1), (160, 320, 32, 2),
                                     (16, 16, 32, 1), (32, 32, 16, 1), (64, 64, 8, 1), (3, 16, 32, 1)):
            out, row = size // stride, {"ci": ci, "co": co, "size": size, "stride": stride}
            x, grad, weight = (torch.randn(shape, device="cuda", dtype=dtype).to(memory_format=torch.channels_last)
                               for shape in ((128, ci, size, size), (128, co, out, out), (co, ci, 3, 3)))
            several, pairs = weight.repeat(8, 1, 1, 1), list(zip(grad.chunk(8), x.chunk(8), strict=True))
            for deterministic in (False, True):
                torch.backends.cudnn.deterministic = deterministic
                end = "_det" * deterministic + "_gpu"
                row["native" + end] = alone(lambda: gradient(grad, x, weight, stride))
                row["loop" + end] = alone(lambda: [gradient(*pair, weight, stride) for pair in pairs])
                row["grouped" + end] = alone(lambda: gradient(beside(grad), beside(x), several, stride, 8))
            say(what="wgrad", dtype=str(dtype)[6:] + "/tf32" * tf32, **row)


def adding():
    for co, ci in ((160, 160), (320, 320), (640, 640), (16, 16)):
        half = [torch.randn(co, ci, 3, 3, device="cuda").bfloat16() for _ in range(8)]
        last = [t.contiguous(memory_format=torch.channels_last) for t in half]
        stacked, like = torch.stack(last), torch.empty(0, device="cuda")
        row = {"stack": alone(lambda: torch.stack(last)), "to": alone(lambda: stacked.float()),
               "sum32_fixed": alone(lambda: ordered_reduce.sum(stacked.float(), 0))}
        for name, partials in (("bf16 cl", last), ("f32 cl", [t.float() for t in last]), ("bf16 contiguous", half)):
            for order, more in (("fixed", ()), ("shuffled", (True, True, 1, STEP, 2))):
                row[f"{name} {order}"] = alone(lambda: torch.ops.ordered_reduce.add_partials(partials, like, *more))
        say(what="add_partials", co=co, ci=ci, **row)


def sorting():
    for size in (100000, 1 << 20, 4, 1):
        index = torch.randint(size, (1 << 20,), device="cuda")
        row = {f"sort_{str(dtype)[6:]}": alone(lambda: index.to(dtype).sort(stable=True))
               for dtype in (torch.int64, torch.int32, torch.int16, torch.uint8) if size <= torch.iinfo(dtype).max}
        say(what="sort", size=size, **row, segments=alone(lambda: torch.ops.ordered_reduce.segments(index, size)))


def steps():
    for width, precision in ((10, "bf16"), (1, "fp32"), (1, "bf16"), (10, "tf32"), (10, "fp32")):
        for order in ("native", "fixed", "shuffled", "atomic"):
            policy, step, _ = bench.network(width, precision, "cuda", 128, 32, order)
            policy.to("cuda")
            say(what="graphed step", width=width, precision=precision, order=order, gpu=alone(step))
            say(what="step", width=width, precision=precision, order=order, wall=wall(step))


for part in sys.argv[1:] or ("kernels", "weight_gradients", "adding", "sorting", "steps"):
    globals()[part]()
