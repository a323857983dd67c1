"""The standard list of operations that `python -m ordered_reduce.audit` checks, and that command."""

import argparse
import fnmatch
import json
import pathlib
import platform

import torch
from torch.nn import functional as F

from .checks import Case, Report, rows
from .layers import conv2d, linear
from .ops import cuda_built, sum

CHANNELS = (13, 27, 50, 16, 64, 160)
SAMPLES = 32


def _rows_like(index, source):   # the zeros that an index_add or scatter_add starts from
    return source.new_zeros(20, source.shape[1])


# {name: (function, shape of its output, {tensor: shape})}. In a shape, n and b are the samples (with b, a sample's
# result depends on the others by definition), c the channels, a number itself; <k makes the tensor integers below k.
OPERATIONS = {
    "conv1d": (F.conv1d, "n c 14", dict(input="n c 16", weight="c c 3", bias="c")),
    "conv2d 1x1": (F.conv2d, "n c 7 7", dict(input="n c 7 7", weight="c c 1 1", bias="c")),
    "conv2d 3x3": (lambda **t: F.conv2d(**t, padding=1), "n c 7 7", dict(input="n c 7 7", weight="c c 3 3", bias="c")),
    "conv2d 3x3 stride 2": (lambda **t: F.conv2d(**t, stride=2), "n c 3 3",
                            dict(input="n c 7 7", weight="c c 3 3", bias="c")),
    "conv2d depthwise": (lambda input, weight, bias: F.conv2d(input, weight, bias, groups=len(weight)), "n c 5 5",
                         dict(input="n c 7 7", weight="c 1 3 3", bias="c")),
    "conv_transpose2d": (F.conv_transpose2d, "n c 9 9", dict(input="n c 7 7", weight="c c 3 3", bias="c")),
    "conv3d": (F.conv3d, "n c 2 2 2", dict(input="n c 4 4 4", weight="c c 3 3 3", bias="c")),
    "matmul": (torch.matmul, "n c", dict(input="n c", other="c c")),
    "bmm": (torch.bmm, "n 9 c", dict(input="n 9 c", mat2="n c c")),
    "linear": (F.linear, "n c", dict(input="n c", weight="c c", bias="c")),
    "linear on sequences": (F.linear, "n 9 c", dict(input="n 9 c", weight="c c", bias="c")),
    "batch_norm training": (lambda input, weight, bias: F.batch_norm(input, None, None, weight, bias, training=True),
                            "b c 7 7", dict(input="b c 7 7", weight="c", bias="c")),
    "batch_norm evaluation": (lambda input, mean, var, weight, bias: F.batch_norm(
        input, mean.detach(), 1 + var.detach() ** 2, weight, bias), "n c 7 7",
        dict(input="n c 7 7", mean="c", var="c", weight="c", bias="c")),
    "layer_norm of channels": (lambda input, **t: F.layer_norm(input, input.shape[2:], **t), "n 9 c",
                               dict(input="n 9 c", weight="c", bias="c")),
    "layer_norm of images": (lambda input, **t: F.layer_norm(input, input.shape[1:], **t), "n c 7 7",
                             dict(input="n c 7 7", weight="c 7 7", bias="c 7 7")),
    "rms_norm": (lambda input, weight: F.rms_norm(input, input.shape[2:], weight), "n 9 c",
                 dict(input="n 9 c", weight="c")),
    "group_norm": (lambda **t: F.group_norm(**t, num_groups=1), "n c 7 7", dict(input="n c 7 7", weight="c", bias="c")),
    "instance_norm": (F.instance_norm, "n c 7 7", dict(input="n c 7 7", weight="c", bias="c")),
    "max_pool2d": (lambda input: F.max_pool2d(input, 3, 2), "n c 3 3", dict(input="n c 7 7")),
    "avg_pool2d": (lambda input: F.avg_pool2d(input, 3, 2), "n c 3 3", dict(input="n c 7 7")),
    "adaptive_avg_pool2d": (lambda input: F.adaptive_avg_pool2d(input, 3), "n c 3 3", dict(input="n c 7 7")),
    "adaptive_max_pool2d": (lambda input: F.adaptive_max_pool2d(input, 3), "n c 3 3", dict(input="n c 7 7")),
    "mean of pixels": (lambda input: input.mean((2, 3)), "n c", dict(input="n c 7 7")),
    "mean of batch": (lambda input: input.mean(0), "c", dict(input="b c")),
    "mean of batch and pixels": (lambda input: input.mean((0, 2, 3)), "c", dict(input="b c 7 7")),
    "sum of batch": (lambda input: input.sum(0), "c", dict(input="b c")),
    "sum of batch and pixels": (lambda input: input.sum((0, 2, 3)), "c", dict(input="b c 7 7")),
    "var of batch and pixels": (lambda input: input.var((0, 2, 3)), "c", dict(input="b c 7 7")),
    "norm of pixels": (lambda input: input.norm(dim=(2, 3)), "n c", dict(input="n c 7 7")),
    "cumsum": (lambda input: input.cumsum(1), "n 33 c", dict(input="n 33 c")),
    "cumsum of batch": (lambda input: input.cumsum(0), "b c", dict(input="b c")),
    "logsumexp of batch": (lambda input: input.logsumexp(0), "c", dict(input="b c")),
    "softmax over channels": (lambda input: input.softmax(1), "n c", dict(input="n c")),
    "tanh": (torch.tanh, "n c", dict(input="n c")),
    "exp": (torch.exp, "n c", dict(input="n c")),
    "gelu": (F.gelu, "n c", dict(input="n c")),
    "silu": (F.silu, "n c", dict(input="n c")),
    "index_add": (lambda index, source: _rows_like(index, source).index_add(0, index, source), "20 c",
                  dict(index="b <20", source="b c")),
    "index_put accumulate": (lambda index, source: _rows_like(index, source).index_put((index,), source, True), "20 c",
                             dict(index="b <20", source="b c")),
    "scatter_add": (lambda index, source: _rows_like(index, source).scatter_add(
        0, index[:, None].expand_as(source), source), "20 c", dict(index="b <20", source="b c")),
    "index_select": (lambda index, input: input.index_select(0, index), "n c", dict(index="n <20", input="20 c")),
    "gather": (lambda index, input: input.gather(0, index[:, None].expand(-1, input.shape[1])), "n c",
               dict(index="n <20", input="20 c")),
    "embedding": (F.embedding, "n 9 c", dict(input="n 9 <20", weight="20 c")),
    "embedding_bag": (F.embedding_bag, "n c", dict(input="n 9 <20", weight="20 c")),
    "attention": (F.scaled_dot_product_attention, "n 2 9 c", dict(query="n 2 9 c", key="n 2 9 c", value="n 2 9 c")),
    "attention causal": (lambda **t: F.scaled_dot_product_attention(**t, is_causal=True), "n 2 9 c",
                         dict(query="n 2 9 c", key="n 2 9 c", value="n 2 9 c")),
    "cross_entropy": (F.cross_entropy, "", dict(input="b 10", target="b <10")),
    "nll_loss of images": (F.nll_loss, "", dict(input="b 10 7 7", target="b 7 7 <10")),
    "mse_loss": (F.mse_loss, "", dict(input="b c", target="b c")),
    "smooth_l1_loss": (F.smooth_l1_loss, "", dict(input="b c", target="b c")),
    "binary_cross_entropy_with_logits": (F.binary_cross_entropy_with_logits, "", dict(input="b c", target="b c")),
    "kl_div": (lambda **t: F.kl_div(**t, reduction="batchmean", log_target=True), "", dict(input="b c", target="b c")),
    "ctc_loss": (lambda input, target: F.ctc_loss(input.log_softmax(2).transpose(0, 1), 1 + target,
                                                  [12] * len(input), [4] * len(input)), "",
                 dict(input="b 12 10", target="b 4 <9")),
    "interpolate nearest": (lambda input: F.interpolate(input, scale_factor=2), "n c 8 8", dict(input="n c 4 4")),
    "interpolate bilinear": (lambda input: F.interpolate(input, scale_factor=2, mode="bilinear"), "n c 8 8",
                             dict(input="n c 4 4")),
    "interpolate bicubic": (lambda input: F.interpolate(input, scale_factor=2, mode="bicubic"), "n c 8 8",
                            dict(input="n c 4 4")),
    "grid_sample": (lambda **t: F.grid_sample(**t, align_corners=False), "n c 4 4",
                    dict(input="n c 4 4", grid="n 4 4 2")),
    "pad reflect": (lambda input: F.pad(input, (1, 1, 1, 1), mode="reflect"), "n c 6 6", dict(input="n c 4 4")),
    "ordered_reduce.sum": (lambda input: sum(input, (0, 2, 3)), "c", dict(input="b c 7 7")),
    "ordered_reduce.linear": (linear, "n c", dict(x="n c", weight="c c", bias="c")),
    "ordered_reduce.conv2d 1x1": (conv2d, "n c 7 7", dict(x="n c 7 7", weight="c c 1 1", bias="c")),
    "ordered_reduce.conv2d 3x3": (lambda **t: conv2d(**t, padding=1), "n c 7 7",
                                  dict(x="n c 7 7", weight="c c 3 3", bias="c")),
}


def _draw(shape, channels, generator):
    *sizes, last = shape.split()
    below = int(last[1:]) if last.startswith("<") else None
    sizes = [SAMPLES if s in "nb" else channels if s == "c" else int(s) for s in (sizes if below else [*sizes, last])]
    if below:
        return torch.randint(below, sizes, generator=generator)
    return torch.randn(sizes, generator=generator)


def cases(name, device, seed=0):
    """The Cases of one operation of the list: every number of channels, four-dimensional tensors in both layouts."""
    function, output, tensors = OPERATIONS[name]
    shapes = {"output": output, **tensors}

    def call(then, /, **tensors):
        return then(function(**tensors))

    images = any(shape.startswith(("n c", "b c")) and len(shape.split()) == 4 for shape in tensors.values())
    for channels in CHANNELS if any("c" in shape for shape in shapes.values()) else (None,):
        for layout in (torch.contiguous_format, torch.channels_last) if images else (torch.contiguous_format,):
            generator = torch.Generator().manual_seed(seed)
            drawn = {}
            for tensor, shape in tensors.items():
                t = _draw(shape, channels, generator).to(device)
                t = t.contiguous(memory_format=layout) if t.ndim == 4 else t
                drawn[tensor] = t.requires_grad_(t.is_floating_point())
            label = [f"{channels} channels"] * bool(channels) + ["channels-last"] * (layout is torch.channels_last)
            yield Case(", ".join(label) or "as is", call, drawn,
                       lambda name, t: [d for d, size in enumerate(shapes[name].split()) if size == "c"],
                       lambda name, t: 0 if shapes[name].startswith("n") else None)


def standard(device, pattern="*", seed=0):
    """A Report on the operations of the list whose names match the pattern."""
    ours = device == "cpu" or cuda_built()
    return Report(row for name in OPERATIONS if fnmatch.fnmatchcase(name, pattern)
                  if ours or not name.startswith("ordered_reduce")
                  for row in rows(name, device, cases(name, device, seed), seed))


def main(argv=None):
    """The command line. Exit status 0, or 2 after one line where an argument is wrong."""
    parser = argparse.ArgumentParser(
        prog="python -m ordered_reduce.audit",
        description="Which operations of this machine repeat, treat equal channels equally, and give a sample the same "
                    "bits in any batch and with one thread or two? A table, forward and backward; '-' where a question "
                    "does not apply. Equal channels are copies of one another, and stay copies where 'yes' stands. "
                    "About 2 minutes on two cores.")
    parser.error = lambda message: parser.exit(2, f"{parser.prog}: error: {message}\n")
    parser.add_argument("--device", help="cpu, cuda, cuda:1, ...; default: each device present")
    parser.add_argument("--ops", default="*", metavar="GLOB", help="names of operations, e.g. 'conv*'; default: all")
    parser.add_argument("--seed", type=int, default=0, help="of the random inputs; default: 0")
    parser.add_argument("--json", type=pathlib.Path, metavar="FILE", help="also write the table to this file")
    args = parser.parse_args(argv)
    if not any(fnmatch.fnmatchcase(name, args.ops) for name in OPERATIONS):
        parser.error(f"argument --ops: {args.ops!r} matches none of: {', '.join(OPERATIONS)}")
    if not 0 <= args.seed < 1 << 63:
        parser.error(f"argument --seed: {args.seed} is not valid; it must lie in [0, 2**63)")
    devices = [args.device] if args.device else ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]
    try:
        for device in devices:
            if torch.empty(1, device=device).device.type == "meta":
                raise RuntimeError("it computes nothing")
    except Exception as error:   # every backend that PyTorch has heard of has its own
        said = str(error).partition("\n")[0][:100]
        parser.error(f"argument --device: {device!r} cannot be used ({said}); try cpu")
    try:
        target = args.json.open("w") if args.json else None
    except OSError as error:
        parser.error(f"argument --json: {args.json} cannot be written ({error.strerror})")
    report = Report(row for device in devices for row in standard(device, args.ops, args.seed))
    print(report)
    if target:
        names = {device: torch.cuda.get_device_name(device) if device.startswith("cuda") else
                 f"{platform.machine()}, {torch.backends.cpu.get_cpu_capability()}, {torch.get_num_threads()} threads"
                 for device in devices}
        with target:
            json.dump({"torch": torch.__version__, "devices": names, "seed": args.seed, "channels": CHANNELS,
                       "samples": SAMPLES, "rows": report}, target, indent=1)
            target.write("\n")
