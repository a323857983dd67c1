"""Constnet: a deep network whose weights all start constant, trained with the order of additions switched on and off.

Blumenfeld, Gilboa and Soudry, "Is Feature Diversity Necessary in Neural Network Initialization?", Section 3, Figure 2
and Table 1. All channels of a layer start equal, so they stay equal unless something tells them apart. The paper found
that the non-deterministic additions of a GPU suffice. Here that order is an argument: with the same order for all
weights (fixed, or one permutation shared by a layer) the channels stay copies of one another, and the network hardly
learns; with an order drawn for every weight (shuffled) or left to racing threads (atomic) they part, and it learns.

    python constnet.py --order fixed shuffled atomic          # digits, about a minute on two cores
    python constnet.py --dataset cifar100 --dropout 0         # the paper's run; wants a GPU

Every run writes config.json, metrics.csv (a row per arm, seed and step), summary.json, constnet.png, checkpoint.pt and
the weights of every finished arm as ORDER-SEED.pt.
Exit status: 0 done, 2 bad input, 3 diverged (the metrics are kept), 130 interrupted (the checkpoint is kept).
"""

import argparse
import csv
import functools
import hashlib
import itertools
import json
import math
import os
import pathlib
import sys
import time

import ordered_reduce
import torch
from torch import nn
from torch.nn import functional as F
from tqdm import tqdm

import common

STEPS_WATCHED = 500   # steps from the first one on of which every one gets a row in metrics.csv
SAVE_SECONDS = 30     # within an epoch a checkpoint is written when the last one is this old

# The paper's recipe on the CIFAR sets (mixup, weight decay and batch size are those of the code base that it builds
# on); elsewhere one that a CPU finishes in minutes.
SMALL = dict(epochs=1, batch_size=64, lr=0.2, weight_decay=5e-4, widen=1, schedule="cosine", mixup=0.0, augment=False)
PAPER = dict(epochs=200, batch_size=128, lr=0.1, weight_decay=5e-4, widen=10, schedule="step", mixup=1.0, augment=True)
DEFAULTS = {"digits": {**SMALL, "epochs": 24}, "mnist": SMALL, "fashion-mnist": {**SMALL, "lr": 0.05},
            "cifar10": PAPER, "cifar100": PAPER, "imagefolder": {**SMALL, "lr": 0.02, "augment": True}}


# ---------------------------------------------------------------------------------------------------------- arguments


def parse_arguments(argv=None):
    parser = common.parser(__doc__)

    def defaults(name):
        values = {}
        for dataset, recipe in DEFAULTS.items():
            values.setdefault(recipe[name], []).append(dataset)
        return "default: " + "; ".join(f"{value} on {', '.join(sets)}" for value, sets in values.items())

    what = parser.add_argument_group("what is trained")
    common.add_data(what, "paper: cifar10, cifar100")
    what.add_argument("--init", default="abcd", metavar="LETTERS",
                      help="the parts of the network that start constant (Table 1): a, the residual blocks' "
                           "convolutions at 0; b, the final layer at 0; c, the first convolution with 1 / input "
                           "channels in the centre tap, 0 elsewhere; d, the 1x1 shortcuts likewise. What is not named "
                           "is He-normal; 'none' for the standard initialisation. Default: abcd (Constnet)")
    what.add_argument("--blocks", type=int, default=12, metavar="N",
                      help="residual blocks, each of one convolution, in 3 stages; a multiple of 3; default: 12, as in "
                           "the paper")
    what.add_argument("--widen", type=int, metavar="W",
                      help=f"stages have 16 W, 32 W and 64 W channels; {defaults('widen')}; paper: 10")
    what.add_argument("--dropout", type=float, default=0.0, metavar="P",
                      help="probability in [0, 1) with which the input of a block's convolution is dropped, the "
                           "paper's other symmetry breaker; default: 0; paper: 0 to 0.15")

    how = parser.add_argument_group("how it is trained")
    how.add_argument("--epochs", type=int, metavar="N", help=f"{defaults('epochs')}; paper: 200")
    how.add_argument("--batch-size", type=int, metavar="N",
                     help=f"images; the rest of an epoch is left out; {defaults('batch_size')}")
    how.add_argument("--lr", type=float, metavar="RATE", help=f"SGD's learning rate; {defaults('lr')}; paper: 0.1")
    how.add_argument("--schedule", choices=("step", "cosine", "constant"),
                     help="of the learning rate: step multiplies it by 0.2 after 30 %%, 60 %% and 80 %% of the epochs "
                          f"(the authors' 140, 80 and 40 of 200 to go), cosine ends at 0; {defaults('schedule')}")
    how.add_argument("--momentum", type=float, default=0.9, metavar="M", help="default: 0.9")
    how.add_argument("--weight-decay", type=float, metavar="D", help=defaults("weight_decay"))
    how.add_argument("--mixup", type=float, metavar="ALPHA",
                     help="mix every image and label with another's, by a share drawn once a step from Beta(ALPHA, "
                          f"ALPHA); 0 is off; {defaults('mixup')}; paper: used, value not given")
    how.add_argument("--augment", action=argparse.BooleanOptionalAction,
                     help="random crop after padding by an eighth of the size, random horizontal flip; "
                          f"{defaults('augment')}")
    how.add_argument("--seed", type=int, nargs="+", default=[0], metavar="S",
                     help="of weights, data order, augmentation, dropout; several are run one by one; default: 0")
    how.add_argument("--precision", choices=("fp32", "tf32", "bf16"), default="fp32",
                     help="of convolutions and products: fp32; tf32 (CUDA); bf16 (autocast). Weights are float32; "
                          "default: fp32")

    order = parser.add_argument_group("the order of additions in the weight gradients")
    order.add_argument("--order", nargs="+", default=["shuffled"], metavar="ORDER",
                       help="one or several arms that differ in nothing else: fixed (index order), shuffled (drawn "
                            "from a seed for every weight), atomic (racing threads, does not repeat), native (PyTorch "
                            "as it is: the paper's setting on a GPU). In all but native all else is deterministic, "
                            "and all but native and atomic repeat bit for bit. Default: shuffled")
    order.add_argument("--splits", type=int, default=8, metavar="G",
                       help="partial gradients of a batch whose additions are ordered; 2 makes no noise; default: 8")
    order.add_argument("--order-scope", choices=("output", "tensor"), default="output",
                       help="shuffled: a permutation for every weight, or one for all weights of a layer (which "
                            "cannot break the symmetry); default: output")
    order.add_argument("--order-seed", type=int, default=0, metavar="S", help="of the permutations; default: 0")
    order.add_argument("--order-layers", nargs="+", default=["*"], metavar="GLOB",
                       help="layers the order is applied to, the others are fixed: stem, stages.S.B.conv, "
                            "stages.S.0.shortcut, head (S, B from 0); default: *")
    order.add_argument("--order-steps", type=int, nargs=2, metavar=("FIRST", "END"),
                       help="steps FIRST <= step < END at which the order is applied, fixed before and after; "
                            "default: all")

    common.add_files(parser, "constnet/DATASET", "to the same bits; finished arms are kept")
    args = parser.parse_args(argv)
    common.check_common(args, DEFAULTS)
    check_arguments(args)
    return args


def check_arguments(args):
    need, device = common.need, torch.device(args.device)
    orders = ("fixed", "shuffled", "atomic", "native")
    for order in args.order:
        need(order in orders, "--order", repr(order), f"one or several of {', '.join(orders)}")
    need(len(set(args.order)) == len(args.order), "--order", " ".join(args.order), "different arms")
    need(len(set(args.seed)) == len(args.seed), "--seed", args.seed, "different seeds")
    need(all(0 <= seed < 1 << 31 for seed in args.seed), "--seed", args.seed, "in [0, 2**31)")
    args.init = "".join(sorted(set(args.init))) if args.init != "none" else ""
    need(set(args.init) <= set("abcd"), "--init", repr(args.init), "letters of a, b, c, d, or 'none'")
    need(args.blocks >= 3 and args.blocks % 3 == 0, "--blocks", args.blocks, "a positive multiple of 3")
    common.at_least_1(args, "widen", "epochs", "batch_size")
    need(0 <= args.dropout < 1, "--dropout", args.dropout, "in [0, 1)")
    need(0 <= args.momentum < 1, "--momentum", args.momentum, "in [0, 1)")
    for name in ("lr", "weight_decay", "mixup"):
        value = getattr(args, name)
        need(math.isfinite(value) and value >= 0, f"--{name}", value, "finite and at least 0")
    need(1 <= args.splits <= args.batch_size, "--splits", args.splits,
         f"from 1 to the batch size, {args.batch_size}: a group needs a sample")
    if args.order_steps is not None:
        need(0 <= args.order_steps[0] < args.order_steps[1], "--order-steps", args.order_steps,
             "FIRST END with 0 <= FIRST < END: the window would be empty")
    need(device.type == "cpu" or ordered_reduce.cuda_built(), "--device", args.device,
         "cpu, since ordered_reduce was built without CUDA kernels (put nvcc on PATH and `pip install -e csrc` again)")
    need(args.precision != "tf32" or device.type == "cuda", "--precision", "tf32", "fp32 or bf16 on the CPU")


# -------------------------------------------------------------------------------------------------------------- model


class Block(nn.Module):
    """x -> shortcut(x) + conv(relu(bn(x))): the skip bypasses one convolution; a 1x1 shortcut is applied to bn(x)."""

    def __init__(self, channels_in, channels, stride, dropout):
        super().__init__()
        self.bn = nn.BatchNorm2d(channels_in)
        self.conv = nn.Conv2d(channels_in, channels, 3, stride, padding=1, bias=False)
        self.dropout = nn.Dropout(dropout)
        self.shortcut = None
        if stride != 1 or channels_in != channels:
            self.shortcut = nn.Conv2d(channels_in, channels, 1, stride, bias=False)

    def forward(self, x):
        normal = self.bn(x)
        skip = x if self.shortcut is None else self.shortcut(normal)
        return skip + self.conv(self.dropout(F.relu(normal)))


class Constnet(nn.Module):
    """Stem of 16 channels, three stages of 16 w, 32 w, 64 w channels (the last two halve the image), linear head."""

    def __init__(self, channels, classes, blocks=12, widen=1, dropout=0.0):
        super().__init__()
        self.stem = nn.Conv2d(channels, 16, 3, padding=1, bias=False)
        width, stages = 16, []
        for stage in range(3):
            stage_blocks = []
            for block in range(blocks // 3):
                stage_blocks.append(Block(width, 16 * widen << stage, 2 if stage and not block else 1, dropout))
                width = 16 * widen << stage
            stages.append(nn.Sequential(*stage_blocks))
        self.stages = nn.Sequential(*stages)
        self.head = nn.Linear(width, classes)

    def forward(self, x):
        return self.head(F.relu(self.stages(self.stem(x))).mean((2, 3)))


@torch.no_grad()
def initialise(model, parts):
    """He-normal, but for the parts of Table 1 that start constant."""
    for module in model.modules():
        if isinstance(module, (nn.Conv2d, nn.Linear)):
            nn.init.kaiming_normal_(module.weight)
            if module.bias is not None:
                module.bias.zero_()
    blocks = [block for stage in model.stages for block in stage]
    if "a" in parts:
        for block in blocks:
            block.conv.weight.zero_()
    if "b" in parts:
        model.head.weight.zero_()
    if "c" in parts:
        centre_tap_(model.stem.weight)
    if "d" in parts:
        for block in blocks:
            if block.shortcut is not None:
                centre_tap_(block.shortcut.weight)


def centre_tap_(weight):
    """1 / input channels in the middle of every filter, 0 elsewhere: each output is the mean of the inputs."""
    height, width = weight.shape[2:]
    weight.zero_()[:, :, height // 2, width // 2] = 1 / weight.shape[1]


# --------------------------------------------------------------------------------------------------- symmetry measures


class Symmetry:
    """How far the output channels of each convolution are from being copies of one another.

    The head is left out: its outputs are the classes. A measure is many small operations, so the weights of several
    steps are kept and measured together; nothing waits for the device before that.
    """

    def __init__(self, model):
        self.weights = {name: module.weight for name, module in model.named_modules() if isinstance(module, nn.Conv2d)}
        self.first_broken = dict.fromkeys(self.weights, -1)
        self.kept = []                                    # (row, weights) not measured yet
        self.most_kept = max(1, min(16, (1 << 22) // sum(weight.numel() for weight in self.weights.values())))
        # Two filters are taken for equal where a random linear form of their bits agrees: wrong once in 2^32.
        longest = max(weight[0].numel() for weight in self.weights.values())
        generator = torch.Generator().manual_seed(0)
        form = torch.randint(-1 << 31, 1 << 31, (longest,), generator=generator, dtype=torch.int32) | 1
        self.form = form.to(self.weights["stem"].device)

    @torch.no_grad()
    def watch(self, step):
        """Notes the layers whose filters have come apart after `step` steps; costs nothing once all have."""
        for name, weight in self.weights.items():
            if self.first_broken[name] < 0 and not torch.equal(weight, weight[:1].expand_as(weight)):
                self.first_broken[name] = step

    @torch.no_grad()
    def measure(self, row):
        """Adds {measure/layer: value} to the row, now or by the next `flush`."""
        self.kept.append((row, [weight.detach().clone() for weight in self.weights.values()]))
        if len(self.kept) == self.most_kept:
            self.flush()

    @torch.no_grad()
    def flush(self):
        for number, name in enumerate(self.weights if self.kept else ()):
            weight = torch.stack([weights[number] for _, weights in self.kept])   # (steps, out, in, height, width)
            filters = weight.flatten(2)
            form = (filters.view(torch.int32) * self.form[: filters.shape[2]]).sum(2, dtype=torch.int32).sort(1).values
            distinct = 1 + (form[:, 1:] != form[:, :-1]).sum(1)
            spread = (filters - filters.mean(1, keepdim=True)).norm(dim=(1, 2)) / filters.norm(dim=(1, 2))
            measures = {"distinct_filters": distinct, "spread": spread.where(distinct > 1, 0.0),
                        "forward_correlation": mean_correlation(filters),
                        "backward_correlation": mean_correlation(weight.transpose(1, 2).flatten(2))}
            for measure, values in measures.items():
                for (row, _), value in zip(self.kept, values.tolist(), strict=True):
                    row[f"{measure}/{name}"] = None if value != value else value
        self.kept.clear()

    def summary(self):
        self.measure(last := {})
        self.flush()
        broken = {step: name for name, step in reversed(self.first_broken.items()) if step >= 0}
        first = min(broken, default=None)
        return {"kept": not broken, "first_broken_step": first,
                "first_broken_parameter": f"{broken[first]}.weight" if broken else None,
                "distinct_filters": {name: last[f"distinct_filters/{name}"] for name in self.weights},
                "spread": {name: last[f"spread/{name}"] for name in self.weights}}


def mean_correlation(slices):
    """(steps, n, m) -> (steps,): mean Pearson correlation of all pairs of the n slices, without forming the pairs: with
    slices z centred and of norm one, |sum z|^2 = n + the sum over ordered pairs. NaN where a slice is constant."""
    n = slices.shape[1]
    z = slices - slices.mean(2, keepdim=True)
    total = (z / z.norm(dim=2, keepdim=True)).sum(1).square().sum(1)
    return (total - n) / (n * (n - 1)) if n > 1 else torch.full_like(total, math.nan)


# ------------------------------------------------------------------------------------------------------------ training


def draw(seed, number, purpose):
    """A generator seed that differs for every run, step (or epoch) and purpose, so that step t needs no history."""
    return int.from_bytes(hashlib.sha256(f"{seed} {number} {purpose}".encode()).digest()[:7], "little")


def normaliser(images):
    """uint8 images -> float, with mean 0 and variance 1 in every channel of the training images (from exact counts)."""
    counts = torch.stack([torch.bincount(channel.flatten(), minlength=256) for channel in images.unbind(1)]).double()
    share, value = counts / counts.sum(1, keepdim=True), torch.arange(256, device=images.device, dtype=torch.float64)
    mean = (share * value).sum(1)
    std = (share * (value - mean[:, None]).square()).sum(1).sqrt().clamp(min=1e-3)
    mean, std = mean.float()[:, None, None], std.float()[:, None, None]
    return lambda x: (x.float() - mean) / std


def augment(x):
    """Random crop after zero padding by an eighth of the size (the usual 4 of 32 pixels), random horizontal flip."""
    n, channels, height, width = x.shape
    pad = max(1, height // 8)
    rows = torch.arange(height, device=x.device) + torch.randint(0, 2 * pad + 1, (n, 1), device=x.device)
    columns = torch.arange(width, device=x.device).expand(n, width)
    columns = torch.where(torch.rand(n, 1, device=x.device) < 0.5, columns.flip(1), columns)
    columns = columns + torch.randint(0, 2 * pad + 1, (n, 1), device=x.device)
    image, channel = torch.arange(n, device=x.device).view(-1, 1, 1, 1), torch.arange(channels, device=x.device)
    return F.pad(x, (pad,) * 4)[image, channel.view(1, -1, 1, 1), rows[:, None, :, None], columns[:, None, None, :]]


def learning_rate(args, epoch):
    """At an epoch, which may be a fraction."""
    done = epoch / args.epochs
    if args.schedule == "step":
        return args.lr * 0.2 ** sum(done >= milestone for milestone in (0.3, 0.6, 0.8))
    return args.lr * (0.5 * (1 + math.cos(math.pi * done)) if args.schedule == "cosine" else 1)


@torch.no_grad()
def evaluate(model, images, labels, normalise, autocast):
    model.eval()
    loss = correct = 0
    for x, y in zip(images.split(1000), labels.split(1000), strict=True):
        with autocast():
            logits = model(normalise(x)).float()
        loss += F.cross_entropy(logits, y, reduction="sum")
        correct += (logits.argmax(1) == y).sum()
    model.train()
    return float(loss) / len(labels), 100 * int(correct) / len(labels)


class Diverged(Exception):
    """What happened, and the rows of metrics.csv so far."""


def train(args, order, seed, data, state, save, progress):
    """One arm. state is what `save` was last given, or None; returns the arm's object in summary.json, its rows and
    its weights."""
    images, labels, test_images, test_labels, classes = data
    device, batch = images.device, args.batch_size
    normalise = normaliser(images)

    torch.manual_seed(draw(seed, 0, "weights"))
    model = Constnet(images.shape[1], classes, args.blocks, args.widen, args.dropout)
    initialise(model, args.init)
    model.to(device).train()

    # In every arm but native nothing but the chosen additions may vary from run to run.
    torch.use_deterministic_algorithms(order != "native")
    torch.backends.cudnn.deterministic = order != "native"
    torch.utils.deterministic.fill_uninitialized_memory = False
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = args.precision == "tf32"
    if order != "native":
        ordered_reduce.convert(model, "fixed", args.splits)
    policy = ordered_reduce.convert(model, order, args.splits, args.order_seed, args.order_scope, args.order_layers,
                                    args.order_steps)
    optimizer = torch.optim.SGD(model.parameters(), lr=args.lr, momentum=args.momentum, weight_decay=args.weight_decay)
    symmetry = Symmetry(model)

    def autocast():
        return torch.autocast(device.type, torch.bfloat16, enabled=args.precision == "bf16")

    steps_per_epoch = len(labels) // batch
    step, seconds, rows, losses = 0, 0.0, [], []
    if state is None:
        symmetry.watch(0)
        test_loss, test_accuracy = evaluate(model, test_images, test_labels, normalise, autocast)
        rows.append({"arm": order, "seed": seed, "step": 0, "epoch": 0.0, "test_loss": test_loss,
                     "test_accuracy": test_accuracy})
        symmetry.measure(rows[-1])
    else:
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        policy.load_state_dict({"step": state["step"]})
        step, seconds, rows, losses = state["step"], state["seconds"], state["rows"], state["losses"]
        symmetry.first_broken = state["first_broken"]
        progress.update(step)

    def snapshot():
        symmetry.flush()
        return {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "step": step, "rows": rows,
                "seconds": seconds + time.perf_counter() - started, "losses": [float(loss) for loss in losses],
                "first_broken": symmetry.first_broken}

    started = saved = time.perf_counter()
    while step < args.epochs * steps_per_epoch:
        epoch, within = divmod(step, steps_per_epoch)
        if within == 0 or state is not None:
            generator = torch.Generator().manual_seed(draw(seed, epoch, "data"))
            data_order, state = torch.randperm(len(labels), generator=generator).to(device), None
        if args.augment or args.mixup or args.dropout:
            torch.manual_seed(draw(seed, step, "step"))
        chosen = data_order[within * batch:(within + 1) * batch]
        x, y = images[chosen], labels[chosen]
        x = normalise(augment(x) if args.augment else x)
        with autocast():
            if args.mixup:
                share = float(torch.distributions.Beta(args.mixup, args.mixup).sample())
                other = torch.randperm(batch)
                logits = model(share * x + (1 - share) * x[other]).float()
                loss = share * F.cross_entropy(logits, y) + (1 - share) * F.cross_entropy(logits, y[other])
            else:
                logits = model(x).float()
                loss = F.cross_entropy(logits, y)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(args, step / steps_per_epoch)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        policy.step()
        step += 1
        losses.append(loss.detach())
        progress.update()

        symmetry.watch(step)
        last_of_epoch = step % steps_per_epoch == 0
        if step <= STEPS_WATCHED or last_of_epoch:
            row = {"arm": order, "seed": seed, "step": step, "epoch": step / steps_per_epoch,
                   "lr": optimizer.param_groups[0]["lr"]}
            symmetry.measure(row)
            if step <= STEPS_WATCHED:
                row["train_loss"] = float(losses[-1])
            if last_of_epoch:
                row["epoch_train_loss"] = sum(map(float, losses)) / len(losses)
                tested = evaluate(model, test_images, test_labels, normalise, autocast)
                row["test_loss"], row["test_accuracy"] = tested
                losses.clear()
                progress.set_postfix(test=f"{row['test_accuracy']:.1f} %", refresh=False)
            rows.append(row)
            if not math.isfinite(row.get("epoch_train_loss", row.get("train_loss", 0.0))):
                symmetry.flush()
                raise Diverged(f"the loss of arm {order}, seed {seed} is not finite at step {step}", rows)
        if last_of_epoch or time.perf_counter() - saved > SAVE_SECONDS:
            save(snapshot())
            saved = time.perf_counter()
    symmetry.flush()
    seconds += time.perf_counter() - started
    bits = hashlib.sha256()
    for tensor in model.state_dict().values():
        bits.update(tensor.cpu().contiguous().numpy().tobytes())
    last = rows[-1]
    return {"order": order, "splits": args.splits, "scope": args.order_scope, "dropout": args.dropout,
            "init": args.init, "seed": seed, "dataset": args.dataset, "epochs": args.epochs, "steps": step,
            "test_accuracy": last["test_accuracy"], "train_loss": last["epoch_train_loss"],
            "symmetry": symmetry.summary(), "weights_sha256": bits.hexdigest(), "wall_seconds": round(seconds, 2),
            "images_per_second": round(step * batch / seconds, 1)}, rows, model.state_dict()


# ------------------------------------------------------------------------------------------------------------- results


def print_table(summary):
    """One line per arm, then the distinct filters of every layer."""
    print(f"\n{'order':<10}{'seed':>5}{'test accuracy':>15}{'train loss':>12}{'channels differ from':>26}"
          f"{'seconds':>9}")
    for arm in summary:
        broken = "never" if arm["symmetry"]["kept"] else f"step {arm['symmetry']['first_broken_step']}"
        print(f"{arm['order']:<10}{arm['seed']:>5}{arm['test_accuracy']:>13.1f} %{arm['train_loss']:>12.3f}{broken:>26}"
              f"{arm['wall_seconds']:>9.1f}")
    print(f"\n{'distinct filters':<24}" + "".join(f"{arm['order']:>10}" for arm in summary))
    for layer in summary[0]["symmetry"]["distinct_filters"]:
        print(f"{layer:<24}" + "".join(f"{arm['symmetry']['distinct_filters'][layer]:>10}" for arm in summary))


def draw_figure(rows, summary, path):
    """Test accuracy, spread of the widest-spread layer, and distinct filters by layer at the end."""
    plt = common.plot_style()
    figure, (accuracy, spread, filters) = plt.subplots(1, 3, figsize=(12, 3.4), layout="constrained")
    arms = list(dict.fromkeys(arm["order"] for arm in summary))
    for number, arm in enumerate(summary):
        mine = [row for row in rows if row["arm"] == arm["order"] and int(row["seed"]) == arm["seed"]]
        which = arms.index(arm["order"])
        style = {"color": f"C{which}", "linestyle": ("-", "--", ":", "-.")[which],
                 "label": arm["order"] if arm["order"] not in [other["order"] for other in summary[:number]] else None}
        tested = [row for row in mine if row["test_accuracy"]]
        accuracy.plot([int(row["step"]) for row in tested], [float(row["test_accuracy"]) for row in tested], marker=".",
                      **style)
        layers = arm["symmetry"]["distinct_filters"]
        largest = [max(float(row[f"spread/{layer}"]) for layer in layers) for row in mine]
        spread.plot([int(row["step"]) for row in mine], [value or math.nan for value in largest], **style)
        filters.plot(range(len(layers)), list(layers.values()), marker=".", **style)
    if not any(value > 0 for line in spread.get_lines() for value in line.get_ydata()):
        spread.text(0.5, 0.5, "no channel ever differed", transform=spread.transAxes, ha="center")
    else:
        spread.set_yscale("log")
    accuracy.set(xlabel="step", ylabel="test accuracy [%]", ylim=(0, 100),
                 title=f"{summary[0]['dataset']}, constant parts: {summary[0]['init'] or 'none'}, "
                       f"dropout {summary[0]['dropout']:g}")
    spread.set(xlabel="step", title="spread of a layer's filters, |W - mean| / |W|, largest")
    filters.set(title="distinct filters at the end", xticks=range(len(layers)))
    filters.set_yscale("log", base=2)
    filters.yaxis.set_major_formatter("{x:.0f}")
    filters.set_xticklabels([layer.replace("stages.", "") for layer in layers], rotation=90, fontsize=6)
    accuracy.legend()
    common.save_atomically(path, lambda temporary: figure.savefig(temporary, format="png"))
    plt.close(figure)


def log_to_tensorboard(directory, rows):
    from torch.utils.tensorboard import SummaryWriter

    with SummaryWriter(directory) as board:
        for row in rows:
            for key, value in row.items():
                if isinstance(value, (int, float)) and key not in ("step", "seed"):
                    board.add_scalar(f"{key}/{row['arm']}/seed{row['seed']}", value, row["step"])


def report(directory):
    """Figure and table of a run from its files, so that they can be had again at any time."""
    directory = pathlib.Path(directory)
    try:
        summary = json.loads((directory / "summary.json").read_text())
        with open(directory / "metrics.csv", newline="") as file:
            rows = list(csv.DictReader(file))
    except (OSError, ValueError) as error:
        common.fail(f"argument --plot-only: {directory} holds no finished run ({error})")
    draw_figure(rows, summary, directory / "constnet.png")
    print_table(summary)


def main(argv=None):
    args = parse_arguments(argv)
    if args.plot_only:
        return report(args.plot_only)
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    *tensors, classes = common.load_data(args.dataset, args.data_dir, args.image_size)
    data = [tensor.to(args.device) for tensor in tensors] + [classes]
    if len(data[1]) < args.batch_size:
        common.fail(f"argument --batch-size: {args.batch_size} is more than the {len(data[1])} training images")
    try:   # what does not fit the model is found before anything is written
        probe = Constnet(data[0].shape[1], classes, args.blocks, args.widen)
        ordered_reduce.convert(probe, layers=args.order_layers)
    except ValueError as error:
        common.fail(f"argument --order-layers: {error}")

    out = common.start_run(args, f"runs/constnet/{args.dataset}")
    done = {"summary": [], "rows": [], "running": None}
    if args.resume and (out / "checkpoint.pt").exists():
        done = common.load_checkpoint(out / "checkpoint.pt", "--resume")
    logged = len(done["rows"]) + len(done["running"]["rows"] if done["running"] else [])

    def save(running):
        done["running"] = running
        common.save_atomically(out / "checkpoint.pt", lambda path: torch.save(done, path))
        rows = done["rows"] + (running["rows"] if running else [])
        common.write_csv(out / "metrics.csv", rows)
        if args.tensorboard:
            nonlocal logged
            log_to_tensorboard(out / "tensorboard", rows[logged:])
            logged = len(rows)

    runs = list(itertools.product(args.order, args.seed))
    status = 0
    try:
        with tqdm(total=len(runs) * args.epochs * (len(data[1]) // args.batch_size), unit="step", smoothing=0.05,
                  disable=None) as progress:
            progress.update(len(done["summary"]) * args.epochs * (len(data[1]) // args.batch_size))
            for order, seed in runs[len(done["summary"]):]:
                progress.set_description(f"{order}, seed {seed}")
                summary, rows, weights = train(args, order, seed, data, done["running"], save, progress)
                common.save_atomically(out / f"{order}-{seed}.pt", functools.partial(torch.save, weights))
                done["summary"].append(summary)
                done["rows"] += rows
                save(None)
                common.write_json(out / "summary.json", done["summary"])
    except Diverged as error:
        message, rows = error.args
        common.write_csv(out / "metrics.csv", done["rows"] + rows)
        print(f"constnet.py: diverged: {message}; try a smaller --lr (was {args.lr}); metrics so far: "
              f"{out}/metrics.csv", file=sys.stderr)
        status = 3
    except KeyboardInterrupt:
        status = common.interrupted(out)
    if done["summary"]:
        report(out)
        print(f"\n{out}/: constnet.png, metrics.csv, summary.json, config.json, checkpoint.pt, ORDER-SEED.pt (weights)")
    return status


if __name__ == "__main__":
    sys.exit(main())
