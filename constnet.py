"""Constnet: a deep network whose weights all start constant, trained with the order of additions switched on and off.

Blumenfeld, Gilboa and Soudry, "Is Feature Diversity Necessary in Neural Network Initialization?", Section 3, Figure 2
and Table 1. All channels of a layer start equal, so they stay equal unless something tells them apart. The paper found
that the non-deterministic additions of a GPU suffice. Here that order is an argument: with the same order for all
weights (fixed, or one permutation shared by a layer) the channels stay copies of one another, and the network hardly
learns; with an order drawn for every weight (shuffled) or left to racing threads (atomic) they part, and it learns.

    python constnet.py --order fixed shuffled atomic          # digits, about a minute on two cores
    python constnet.py --dataset cifar100 --dropout 0         # the paper's network, in shuffled order; wants a GPU
    python constnet.py --table1 --seed 0 1 2                  # Table 1 and its footnote, beside the paper's numbers
    torchrun --nproc-per-node 4 constnet.py --dataset cifar10     # data parallel; a study's runs are shared out instead

The sections below: arguments, the two networks, symmetry measures, training, the studies (Table 1, Figure 2, LeakyNet,
pruning, signal propagation), results. Every run writes config.json, metrics.csv (a row per arm, seed and step, up to
step 500, then per epoch), summary.json, constnet.png, the weights of every finished arm as ARM-SEED.pt (--prune also
those that it rewinds to, ARM-SEED-rewind.pt), and, while an arm runs, ARM-SEED.csv and ARM-SEED-checkpoint.pt; --signal
writes signal.csv and signal.png instead.
Exit status: 0 done, 2 bad input, 3 diverged (the metrics are kept), 130 interrupted (the checkpoint is kept).
"""

import argparse
import fnmatch
import functools
import hashlib
import json
import math
import sys
import time

import ordered_reduce
import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.utils import prune
from tqdm import tqdm

import common

STEPS_WATCHED = 500   # steps from the first one on of which every one gets a row in metrics.csv
SAVE_SECONDS = 30     # a checkpoint is written when the last one is this old, and after an epoch unless writing the
                      # last one took more than a tenth of the time since

# The paper's recipe on the CIFAR sets (mixup, weight decay and batch size are those of the code base that it builds on;
# the warm-up is ours: without one the constant network of width 10 dies at once); elsewhere one that a CPU
# finishes in minutes.
SMALL = dict(epochs=1, batch_size=64, lr=0.1, weight_decay=5e-4, widen=1, schedule="cosine", warmup=1 / 6, mixup=0.0,
             augment=False)
PAPER = dict(epochs=200, batch_size=128, lr=0.1, weight_decay=5e-4, widen=10, schedule="step", warmup=0.02, mixup=1.0,
             augment=True)
DEFAULTS = {"digits": {**SMALL, "epochs": 24, "lr": 0.3}, "mnist": SMALL, "fashion-mnist": {**SMALL, "lr": 0.05},
            "cifar10": PAPER, "cifar100": PAPER, "imagefolder": {**SMALL, "augment": True}}


# ---------------------------------------------------------------------------------------------------------- arguments


def parse_arguments(argv, more=()):
    """The arguments, checked; `more` are appended to the command line."""
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
    what.add_argument("--arch", choices=("constnet", "leakynet"), default="constnet",
                      help="leakynet is the second network of the ICML version: no skips, leaky ReLU (0.01); default: "
                           "constnet")
    what.add_argument("--layer-init", default="1_ii11_ii11_ii11", metavar="LETTERS",
                      help="leakynet: how the stem and every layer starts: h random (He), i identity, 1 the mean of "
                           "its inputs; default: 1_ii11_ii11_ii11")
    what.add_argument("--norm", choices=("batch", "fixup"), default="batch",
                      help="of constnet's blocks: batch norm, or none but a scalar bias before and after the "
                           "convolution and a scalar factor (Fixup); default and paper: batch")
    what.add_argument("--freeze", nargs="+", default=[], metavar="GLOB",
                      help="parameters that are not trained, such as 'stem.*'; default: none")
    what.add_argument("--dropout", type=float, default=0.0, metavar="P",
                      help="probability in [0, 1) with which the input of a block's convolution (leakynet: the "
                           "output) is dropped, the paper's other symmetry breaker; default: 0; paper: 0 to 0.15")

    how = parser.add_argument_group("how it is trained",
                                    "on the CIFAR sets what the paper leaves open is as in the code base it builds on")
    how.add_argument("--epochs", type=int, metavar="N", help=f"{defaults('epochs')}; paper: 200")
    how.add_argument("--batch-size", type=int, metavar="N",
                     help=f"images; the rest of an epoch is left out; {defaults('batch_size')}")
    how.add_argument("--lr", type=float, metavar="RATE",
                     help=f"SGD's learning rate; {defaults('lr')}; 0.03 with leakynet; paper: 0.1")
    how.add_argument("--schedule", choices=("step", "cosine", "constant"),
                     help="of the learning rate: step multiplies it by 0.2 after 30 %%, 60 %% and 80 %% of the epochs "
                          f"(the authors' 140, 80 and 40 of 200 to go), cosine ends at 0; {defaults('schedule')}")
    how.add_argument("--warmup", type=float, metavar="SHARE",
                     help="share of the epochs in which the schedule's rate is multiplied by what grows from 0 to 1 in "
                          "equal steps; default: 0.02 on cifar10 and cifar100, 0 with leakynet, 1/6 elsewhere; paper: "
                          "none")
    how.add_argument("--momentum", type=float, default=0.9, metavar="M", help="default: 0.9")
    how.add_argument("--nesterov", action="store_true", help="Nesterov's momentum")
    how.add_argument("--weight-decay", type=float, metavar="D", help=defaults("weight_decay"))
    how.add_argument("--mixup", type=float, metavar="ALPHA",
                     help="mix every image and label with another's, by a share drawn once a step (by each "
                          f"process and shard) from Beta(ALPHA, ALPHA); 0 is off; {defaults('mixup')}; paper: used, "
                          "value not given")
    how.add_argument("--augment", action=argparse.BooleanOptionalAction,
                     help="random crop after padding by an eighth of the size, random horizontal flip; "
                          f"{defaults('augment')}")
    how.add_argument("--cutout", type=int, default=0, metavar="PIXELS",
                     help="side of a square at a random place of every image that is set to 0; default: 0, off")
    how.add_argument("--prox", type=float, nargs="+", default=[0.0], metavar="LAMBDA",
                     help="after every step, pull the weights of convolutions by rate * LAMBDA to 0 and no further "
                          "(soft threshold), so that they stay sparse; several values are arms; default: 0, off")
    how.add_argument("--seed", type=int, nargs="+", metavar="S",
                     help="of weights, data order, augmentation, dropout; several are run one by one; --resume adds "
                          "them to the run's; default: 0, with --resume none")
    how.add_argument("--precision", choices=("fp32", "tf32", "bf16"), default="fp32",
                     help="of convolutions and products: fp32; tf32 (CUDA); bf16 (autocast, in which the order of "
                          "additions hardly matters: results/constnet). Weights are float32; default: fp32")

    how.add_argument("--graph", action="store_true",
                     help="on a GPU: capture the gradient of a batch as one CUDA graph, whose kernels are launched "
                          "together, for a small network is bound by their launches")
    how.add_argument("--compile", action="store_true",
                     help="torch.compile the network: faster on a GPU after a minute or more; other bits than without")
    how.add_argument("--shards", type=int, default=0, metavar="S",
                     help="cut every batch into S parts with batch norms of their own and add their gradients in "
                          "fixed order: the same bits on 1, 2, ... S processes; default: 0, off (torchrun then "
                          "averages in the order of its library)")
    how.add_argument("--sync-batch-norm", action="store_true",
                     help="torchrun on GPUs: batch norm over the images of all processes, as one process would have "
                          "it; default: each over its own")

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
                       help="layers the order is applied to, the others are fixed (with native: PyTorch's): stem, "
                            "stages.S.B.conv, stages.S.0.shortcut, head (S, B from 0); default: *")
    order.add_argument("--order-steps", type=int, nargs=2, metavar=("FIRST", "END"),
                       help="steps FIRST <= step < END at which these layers have the order, fixed before and after; "
                            "default: all")

    group = parser.add_argument_group("studies: one of them, several arms each")
    study = group.add_mutually_exclusive_group()
    study.add_argument("--table1", type=int, nargs="*", metavar="ROW",
                       help="the eight rows of Table 1, with all orders fixed, the ninth of its footnote (all "
                            "constant, no dropout, atomic) and ours, the same shuffled; or these rows alone, to which "
                            "--resume can add others")
    study.add_argument("--figure2", nargs=2, metavar="DATASET",
                       help="Constnet and the standard initialisation, dropout 0.01, on two data sets")
    study.add_argument("--leakynet-study", action="store_true", help="the authors' seven choices of --layer-init")
    study.add_argument("--prune", type=float, nargs="+", metavar="KEEP",
                       help="train, keep this share of the weights of each convolution, rewind and train again: the "
                            "largest weights against a random choice, for Constnet and the standard initialisation")
    study.add_argument("--signal", action="store_true",
                       help="train nothing: mean squares of activations and gradients by layer at the start, for "
                            "--init and the standard initialisation")
    group.add_argument("--rewind", type=int, default=0, metavar="STEP",
                       help="of --prune: the step of the first training that the second starts from; default: 0")

    common.add_files(parser, "constnet/DATASET, of a study DATASET-STUDY", "to the same bits; finished arms are kept")
    args = parser.parse_args([*argv, *more])
    args.seed = args.seed or ([] if args.resume else [0])
    args.arch = "leakynet" if args.leakynet_study else args.arch
    if args.arch == "leakynet":   # the authors'
        args.lr = 0.03 if args.lr is None else args.lr
        args.warmup = 0.0 if args.warmup is None else args.warmup
    common.check_common(args, DEFAULTS, ordered_reduce.cuda_built())
    check_arguments(args)
    for name in (*SETS.get(study_of(args), ()), "init" if args.arch == "leakynet" else "layer_init"):
        common.need(getattr(args, name) == parser.get_default(name), f"--{name}", getattr(args, name),
                    "left out: the study sets it, or it is of the other --arch")
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
    need(not args.leakynet_study or args.blocks == 12, "--blocks", args.blocks, "12 for the authors' seven choices")
    letters = args.layer_init.replace("_", "")
    fits = set(letters) <= set("hi1") and len(letters) == 1 + args.blocks
    need(fits or args.arch == "constnet", "--layer-init", repr(args.layer_init),
         f"{1 + args.blocks} letters of h, i, 1, one for the stem and one for each of --blocks {args.blocks}")
    common.at_least_1(args, "widen", "epochs", "batch_size")
    need(0 <= args.dropout < 1, "--dropout", args.dropout, "in [0, 1)")
    need(0 <= args.momentum < 1, "--momentum", args.momentum, "in [0, 1)")
    need(args.momentum > 0 or not args.nesterov, "--momentum", args.momentum, "above 0 with --nesterov")
    for name in ("prox", "prune"):   # arms are named by them
        values = getattr(args, name) or []
        need(len({f"{value:g}" for value in values}) == len(values), f"--{name}", values, "different to six digits")
    need(all(0 < keep < 1 for keep in args.prune or ()), "--prune", args.prune, "shares in (0, 1)")
    need(args.rewind >= 0 and (args.rewind == 0 or args.prune), "--rewind", args.rewind, "at least 0, with --prune")
    rows = args.table1 or []
    need(all(1 <= row <= len(TABLE_1) for row in rows) and len(set(rows)) == len(rows), "--table1", rows,
         f"different rows from 1 to {len(TABLE_1)}")
    need(0 <= args.cutout < 1 << 31, "--cutout", args.cutout, "in [0, 2**31)")
    for dataset in args.figure2 or ():
        need(dataset in common.DATASETS, "--figure2", dataset, f"two of {', '.join(common.DATASETS)}")
    need(0 <= args.warmup <= 1, "--warmup", args.warmup, "in [0, 1]")
    for name in ("lr", "weight_decay", "mixup", "prox"):
        value = getattr(args, name)
        need(all(0 <= v <= torch.finfo(torch.float32).max for v in (value if name == "prox" else [value])), f"--{name}",
             value, "at least 0, and finite in float32")
    need(args.mixup == 0 or args.mixup >= 0.001, "--mixup", args.mixup, "0 or at least 0.001")
    need(args.arch == "constnet" or study_of(args) in ("", "leakynet_study", "signal"), "--arch", args.arch,
         "constnet for this study, which is of its --init")
    need(args.arch == "constnet" or args.norm == "batch", "--norm", args.norm, "batch with leakynet")
    need(not study_of(args) or len(args.order) == len(args.prox) == 1, "--order, --prox", "several", "one in a study")
    need(-1 << 63 <= args.order_seed < 1 << 63, "--order-seed", args.order_seed, "a signed 64-bit number")
    processes = 1 if study_of(args) else common.PROCESSES
    need(args.shards >= 0 and args.shards % processes == 0, "--shards", args.shards,
         f"0 or a multiple of the {processes} processes")
    need(not args.sync_batch_norm or (processes > 1 and device.type == "cuda" and not args.shards),
         "--sync-batch-norm", "on", "left out but under torchrun on GPUs, without --shards and studies")
    parts = args.shards or processes
    need(args.batch_size % parts == 0, "--batch-size", args.batch_size, f"a multiple of {parts}, its parts")
    need(1 <= args.splits <= args.batch_size // parts, "--splits", args.splits,
         f"from 1 to the batch size, {args.batch_size // parts}: a group needs a sample")
    if args.order_steps is not None:
        need(0 <= args.order_steps[0] < args.order_steps[1], "--order-steps", args.order_steps,
             "FIRST END with 0 <= FIRST < END: the window would be empty")
    need(not args.graph or (device.type == "cuda" and not args.compile and not args.shards and processes == 1),
         "--graph", "on", "left out but on a GPU, without --compile, --shards and several processes on one arm")
    need(args.precision != "tf32" or device.type == "cuda", "--precision", "tf32", "fp32 or bf16 on the CPU")


def study_of(args):
    """The name of the study, or "" for a plain run."""
    studies = ("table1", "figure2", "leakynet_study", "prune", "signal")
    return next((name for name in studies if getattr(args, name) not in (None, False)), "")


def default_directory(args):
    study = study_of(args)
    return f"runs/constnet/{'-'.join(args.figure2 or [args.dataset])}{study and '-' + study}"


# -------------------------------------------------------------------------------------------------------- the networks


class Block(nn.Module):
    """x -> shortcut(x) + conv(relu(bn(x))): the skip bypasses one convolution; a 1x1 shortcut is applied to bn(x).

    With Fixup, x -> shortcut(x) + scale * (conv(relu(x + bias)) + bias), the shortcut applied to x + bias.
    """

    def __init__(self, channels_in, channels, stride, dropout, norm):
        super().__init__()
        self.bn = nn.BatchNorm2d(channels_in) if norm == "batch" else Scalar(0.0)
        self.conv = nn.Conv2d(channels_in, channels, 3, stride, padding=1, bias=False)
        self.dropout = nn.Dropout(dropout)
        self.after = nn.Identity() if norm == "batch" else nn.Sequential(Scalar(0.0), Scalar(1.0))
        self.shortcut = None
        if stride != 1 or channels_in != channels:
            self.shortcut = nn.Conv2d(channels_in, channels, 1, stride, bias=False)

    def forward(self, x):
        normal = self.bn(x)
        skip = x if self.shortcut is None else self.shortcut(normal)
        return skip + self.after(self.conv(self.dropout(F.relu(normal))))


class Scalar(nn.Module):
    """Adds a trained number that starts at 0, or multiplies by one that starts at 1."""

    def __init__(self, start):
        super().__init__()
        self.value, self.start = nn.Parameter(torch.tensor(start)), start

    def forward(self, x):
        return x * self.value if self.start else x + self.value


class Constnet(nn.Module):
    """Stem of 16 channels, three stages of 16 w, 32 w, 64 w channels (the last two halve the image), linear head:
    (n, channels, height, width) -> (n, classes), and `features` (n, 64 w), the pooled input of the head."""

    def __init__(self, channels, classes, blocks=12, widen=1, dropout=0.0, norm="batch"):
        super().__init__()
        self.stem = nn.Conv2d(channels, 16, 3, padding=1, bias=False)
        self.stages = stages(blocks, widen, lambda number, *shape: Block(*shape, dropout, norm))
        self.head = nn.Linear(64 * widen, classes)

    def features(self, x):
        return F.relu(self.stages(channels_last(self.stem(x)))).mean((2, 3))

    def forward(self, x):
        return self.head(self.features(x))


def channels_last(x):
    """x, on a GPU with the channels of a pixel side by side, the layout of tensor cores, which all that is computed
    from it has then too. (It would take a tenth off a step on a CPU, but there PyTorch's batch norm then gives other
    bits with another number of threads.)"""
    return x.contiguous(memory_format=torch.channels_last) if x.is_cuda else x


def stages(blocks, widen, block):
    """The stages of both networks; block(number, channels in, channels, stride) makes a block."""
    width, made, number = 16, [], 0
    for stage in range(3):
        row = []
        for place in range(blocks // 3):
            row.append(block(number, width, 16 * widen << stage, 2 if stage and not place else 1))
            width, number = 16 * widen << stage, number + 1
        made.append(nn.Sequential(*row))
    return nn.Sequential(*made)


LEAK = 0.01   # of LeakyNet's ReLU


class LeakyBlock(nn.Module):
    """x -> leaky_relu(conv(x)), then batch norm in every second block: see LeakyNet."""

    def __init__(self, number, channels_in, channels, stride, dropout):
        super().__init__()
        self.phase = -1 if number % 2 else 1
        self.conv = nn.Conv2d(channels_in, channels, 3, stride, padding=1, bias=False)
        self.dropout = nn.Dropout(dropout)
        self.bn = nn.BatchNorm2d(channels) if self.phase < 0 else nn.Identity()

    def forward(self, x):
        return self.bn(self.dropout(F.leaky_relu(self.conv(x), LEAK)))


class LeakyNet(nn.Module):
    """The ICML version's network without skips: layers of phase +1 and -1 in turn. A layer of phase -1 that starts with
    -1 / leak times the identity undoes the leaky ReLU before it, but for the sign."""

    def __init__(self, channels, classes, layer_init, blocks=12, widen=1, dropout=0.0):
        super().__init__()
        self.stem = nn.Conv2d(channels, 16, 3, padding=1, bias=False)
        self.stages = stages(blocks, widen, lambda *shape: LeakyBlock(*shape, dropout))
        self.head = nn.Linear(64 * widen, classes)
        layers = [(self.stem, 1)] + [(block.conv, block.phase) for stage in self.stages for block in stage]
        for (layer, phase), letter in zip(layers, layer_init.replace("_", ""), strict=True):
            start_layer_(layer.weight, letter, 1.0 if phase > 0 else -1 / LEAK)
        nn.init.zeros_(self.head.weight)
        nn.init.zeros_(self.head.bias)

    def features(self, x):
        return F.leaky_relu(self.stages(channels_last(self.stem(x))), LEAK).mean((2, 3))

    def forward(self, x):
        return self.head(self.features(x))


@torch.no_grad()
def start_layer_(weight, letter, factor):
    """h: He-normal; 1: the mean of the inputs, i: output o is input o modulo their number, both times factor."""
    if letter == "h":
        nn.init.kaiming_normal_(weight, LEAK)
    elif letter == "1":
        centre_tap_(weight, factor)
    else:
        out, height, width = torch.arange(weight.shape[0]), *weight.shape[2:]
        weight.zero_()[out, out % weight.shape[1], height // 2, width // 2] = factor


def make_network(args, channels, classes):
    """The network of these arguments, initialised from PyTorch's global generator."""
    if args.arch == "leakynet":
        return LeakyNet(channels, classes, args.layer_init, args.blocks, args.widen, args.dropout)
    model = Constnet(channels, classes, args.blocks, args.widen, args.dropout, args.norm)
    initialise(model, args.init)
    return model


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


def centre_tap_(weight, factor=1.0):
    """factor / input channels in the middle of every filter, 0 elsewhere: each output is the mean of the inputs."""
    height, width = weight.shape[2:]
    weight.zero_()[:, :, height // 2, width // 2] = factor / weight.shape[1]


# --------------------------------------------------------------------------------------------------- symmetry measures


class Symmetry:
    """How far the output channels of each convolution are from being copies of one another.

    The head is left out: its outputs are the classes. A measure is many small operations, so the weights of several
    steps are stored and measured together, layers of one shape at a time: layer by layer it takes four times as long
    and more, which would be over a tenth of a small network's step. Nothing waits for the device before `flush`.
    """

    def __init__(self, model):
        self.weights = {name: module.weight for name, module in model.named_modules() if isinstance(module, nn.Conv2d)}
        self.by_shape = {}                                # names of the layers, by shape
        for name, weight in self.weights.items():
            self.by_shape.setdefault(weight.shape, []).append(name)
        self.first_broken = dict.fromkeys(self.weights)   # None: not yet
        self.rows = []                                    # whose weights are stored, but not measured
        self.measured = []                                # (rows, layers, measures) that the rows do not have yet
        self.watched = []                                 # (step, layers, whether each is broken) not looked at yet
        stem, size = self.weights["stem"], sum(weight.numel() for weight in self.weights.values())
        self.stored = stem.new_empty(max(1, min(16, (1 << (28 if stem.is_cuda else 22)) // size)), size)
        # To compute in: new memory takes a CPU longer than what is computed in it.
        most = max(len(names) * shape.numel() for shape, names in self.by_shape.items())
        self.scratch = stem.new_empty(len(self.stored) * most)
        # Two filters are taken for equal where a random linear form of their bits agrees. The highest bits, sign and
        # exponent, are mixed into the lowest before: where no others differ, it is wrong once in 2^24, else in 2^32.
        longest = max(weight[0].numel() for weight in self.weights.values())
        generator = torch.Generator().manual_seed(0)
        form = torch.randint(-1 << 31, 1 << 31, (longest,), generator=generator, dtype=torch.int32) | 1
        self.form = form.to(self.weights["stem"].device)

    @torch.no_grad()
    def watch(self, step):
        """Notes the layers whose filters have come apart after `step` steps, where no row is measured; costs nothing
        once all have."""
        whole = [name for name, first in self.first_broken.items() if first is None]
        if whole:
            apart = [(weight != weight[:1]).any() for weight in map(self.weights.get, whole)]
            self.watched.append((step, whole, torch.stack(apart)))

    def note(self, step, names):
        for name in names:   # not in the order of the steps
            first = self.first_broken[name]
            self.first_broken[name] = step if first is None else min(step, first)

    @torch.no_grad()
    def measure(self, row):
        """By the next `flush` the row has {measure/layer: value}, and its tensors are numbers."""
        weights = [self.weights[name].flatten() for names in self.by_shape.values() for name in names]
        torch.cat(weights, out=self.stored[len(self.rows)])
        self.rows.append(row)
        if len(self.rows) == len(self.stored):
            self.measure_stored()

    @torch.no_grad()
    def measure_stored(self):
        """The measures of the weights that are stored, on the device."""
        sizes = [len(names) * shape.numel() for shape, names in self.by_shape.items()]
        stored = self.stored[: len(self.rows)].add_(0.0).split(sizes, 1)   # which makes 0.0 of -0.0
        for (shape, names), weight in zip(self.by_shape.items(), stored, strict=True):
            weight = weight.view(len(self.rows), len(names), *shape)   # (steps, layers, out, in, height, width)
            filters = weight.flatten(3)
            scratch = self.scratch[: filters.numel()].view(filters.shape)
            bits, mixed = filters.view(torch.int32), scratch.view(torch.int32)
            torch.bitwise_right_shift(bits, 23, out=mixed)
            mixed.bitwise_and_(0x1FF).bitwise_xor_(bits).mul_(self.form[: filters.shape[3]])
            form = mixed.sum(3, dtype=torch.int32).sort(2).values
            distinct = 1 + (form[..., 1:] != form[..., :-1]).sum(2)
            size = filters.norm(dim=(2, 3))
            apart = torch.sub(filters, filters.mean(2, keepdim=True), out=scratch).norm(dim=(2, 3))
            measures = {"distinct_filters": distinct, "spread": (apart / size).where((distinct > 1) & (size > 0), 0.0),
                        "forward_correlation": mean_correlation(weight, self.scratch),
                        "backward_correlation": mean_correlation(weight.transpose(2, 3), self.scratch)}
            self.measured.append((self.rows, names, measures))
        self.rows = []

    def flush(self):
        """Waits for the device; all rows, and first_broken, are complete then."""
        if self.rows:
            self.measure_stored()
        for step, names, apart in self.watched:
            self.note(step, (name for name, broken in zip(names, apart.tolist(), strict=True) if broken))
        for rows, names, measures in self.measured:
            for measure, values in measures.items():
                for row, found in zip(rows, values.tolist(), strict=True):
                    for name, value in zip(names, found, strict=True):
                        row[f"{measure}/{name}"] = None if value != value else value
            for row in rows:
                row.update({key: float(value) for key, value in row.items() if isinstance(value, torch.Tensor)})
                self.note(row["step"], (name for name in names if row[f"distinct_filters/{name}"] > 1))
        self.watched.clear(), self.measured.clear()

    def summary(self, step):
        self.measure(last := {"step": step})
        self.flush()
        broken = {step: name for name, step in reversed(self.first_broken.items()) if step is not None}
        first = min(broken, default=None)
        return {"kept": not broken, "first_broken_step": first,
                "first_broken_parameter": f"{broken[first]}.weight" if broken else None,
                "distinct_filters": {name: last[f"distinct_filters/{name}"] for name in self.weights},
                "spread": {name: last[f"spread/{name}"] for name in self.weights}}


def mean_correlation(slices, scratch):
    """(steps, layers, n, m, height, width) -> (steps, layers): mean Pearson correlation of all pairs of the n slices,
    without forming the pairs: with slices z centred and of norm one, |sum z|^2 = n + the sum over ordered pairs. NaN
    where a slice is constant. scratch: memory for as many numbers."""
    n = slices.shape[2]
    z = scratch[: slices.numel()].view(slices.shape).copy_(slices).flatten(3)
    z -= z.mean(3, keepdim=True)
    total = ((1 / z.norm(dim=-1))[..., None, :] @ z).square().sum((-2, -1))
    return (total - n) / (n * (n - 1)) if n > 1 else torch.full_like(total, math.nan)


# --------------------------------------------------------------------------------------------------------- the studies

# Constant parts, dropout, order, the paper's test accuracy [%] on CIFAR-10: Table 1, its footnote, and ours.
TABLE_1 = (("", 0.01, "fixed", 95.2), ("ab", 0.15, "fixed", 95.5), ("abc", 0.1, "fixed", 95.3),
           ("abc", 0.01, "fixed", 95.3), ("abc", 0.0, "fixed", 95.0), ("abcd", 0.1, "fixed", 95.2),
           ("abcd", 0.01, "fixed", 95.3), ("abcd", 0.0, "fixed", 10.0), ("abcd", 0.0, "atomic", "as a random start"),
           ("abcd", 0.0, "shuffled", None))
LEAKYNETS = ("h_hhhh_hhhh_hhhh", "i_iiii_iiii_iiii", "1_iiii_iiii_iiii", "1_iiii_11ii_iiii", "1_iiii_1111_iiii",
             "1_ii11_ii11_ii11", "1_1111_1111_1111")   # the authors' seven
STARTS = {"constnet": "abcd", "standard": ""}
SETS = {"table1": ("init", "dropout", "order"), "figure2": ("init", "dropout"), "prune": ("init",),
        "leakynet_study": ("layer_init",)}   # the arguments that a study sets for its arms


def arms(args, argv):
    """{name: its arguments} of a plain run (every --order and --prox) or of a study."""
    def arm(args=args, **other):
        own = {"order": args.order[0], "prox": args.prox[0], "mask": None}
        return argparse.Namespace(**{**vars(args), **own, **other})

    if args.table1 is not None:
        return {f"row{number}": arm(init=init, dropout=dropout, order=order)
                for number, (init, dropout, order, _) in enumerate(TABLE_1, start=1)
                if not args.table1 or number in args.table1}
    if args.leakynet_study:
        return {letters: arm(layer_init=letters) for letters in LEAKYNETS}
    if args.figure2:   # with the defaults of each data set
        return {f"{dataset}-{start}": arm(parse_arguments(argv, ["--dataset", dataset]), init=init, dropout=0.01)
                for dataset in args.figure2 for start, init in STARTS.items()}
    if args.signal:
        return {"standard": arm(init="", layer_init="h" * (args.blocks + 1)),
                (args.layer_init if args.arch == "leakynet" else args.init or "standard"): arm()}
    if args.prune:
        dense = {start: arm(init=init) for start, init in STARTS.items()}
        return dense | {f"{start}-{mask}-{keep:g}": arm(init=init, dense=start, mask=mask, keep=keep)
                        for start, init in STARTS.items() for mask in ("largest", "random") for keep in args.prune}
    return {order + (f"-prox{prox:g}" if len(args.prox) > 1 else ""): arm(order=order, prox=prox)
            for order in args.order for prox in args.prox}


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
    high, wide = max(1, height // 8), max(1, width // 8)
    rows = torch.arange(height, device=x.device) + torch.randint(0, 2 * high + 1, (n, 1), device=x.device)
    columns = torch.arange(width, device=x.device).expand(n, width)
    columns = torch.where(torch.rand(n, 1, device=x.device) < 0.5, columns.flip(1), columns)
    columns = columns + torch.randint(0, 2 * wide + 1, (n, 1), device=x.device)
    image, channel = torch.arange(n, device=x.device).view(-1, 1, 1, 1), torch.arange(channels, device=x.device)
    padded = F.pad(x, (wide, wide, high, high))
    return padded[image, channel.view(1, -1, 1, 1), rows[:, None, :, None], columns[:, None, None, :]]


def cutout(x, size):
    """Sets a size x size square of every image to 0; its centre is anywhere in the image (DeVries and Taylor, 2017)."""
    n, _, height, width = x.shape
    top, left = (torch.randint(0, side, (n, 1), device=x.device) - size // 2 for side in (height, width))
    rows, columns = torch.arange(height, device=x.device), torch.arange(width, device=x.device)
    inside = [(line >= first) & (line < first + size) for line, first in ((rows, top), (columns, left))]
    return x.masked_fill((inside[0][:, :, None] & inside[1][:, None, :])[:, None], 0.0)


def learning_rate(args, step, steps_per_epoch):
    """The rate of --schedule at this step (from 0), in the warm-up times a share that grows with every step; the
    milestones are the authors' 60, 120 and 160 of 200 epochs."""
    steps = args.epochs * steps_per_epoch
    done, warmup = step / steps, args.warmup * steps
    rate = args.lr * min(1.0, (step + 1) / warmup) if warmup else args.lr
    if args.schedule == "step":
        return rate * 0.2 ** sum(done >= milestone for milestone in (0.3, 0.6, 0.8))
    return rate * (0.5 * (1 + math.cos(math.pi * done)) if args.schedule == "cosine" else 1)


@torch.no_grad()
def evaluate(model, images, labels, normalise, autocast):
    """The columns of metrics.csv that come from the test images.

    active is the share of the head's inputs that are not 0 [%]. No batch norm stands before the last ReLU, so that one
    step too far can put it at 0 everywhere: then no gradient reaches any weight, and the network is dead.
    """
    model.eval()
    loss = correct = active = 0
    some = max(1, min(1000, (1 << 20) // images[0, 0].numel()))   # fewer of large images
    for x, y in zip(images.split(some), labels.split(some), strict=True):
        with autocast():
            features = model.features(normalise(x))
            logits = model.head(features).float()
        loss += F.cross_entropy(logits, y, reduction="sum")
        correct += (logits.argmax(1) == y).sum()
        active += (features != 0).float().mean() * len(y)
    model.train()
    return {"test_loss": float(loss) / len(labels), "test_accuracy": 100 * int(correct) / len(labels),
            "active": 100 * float(active) / len(labels)}


def conv_weights(model):
    return [module.weight for module in model.modules() if isinstance(module, nn.Conv2d)]


@torch.no_grad()
def soft_threshold_(weights, by):
    """The proximal step of by * |w|: each weight goes by this much towards 0 and no further (Bach et al., 2012)."""
    for weight in weights:
        weight.copy_(weight.sign() * (weight.abs() - by).clamp(min=0) + 0.0)   # + 0.0: all zeros are the same bits


def share_not_zero(weights):
    """Of all weights together [%]."""
    return 100 * float(sum((weight != 0).sum() for weight in weights)) / sum(weight.numel() for weight in weights)


@torch.no_grad()
def masks_of(weights, kind, keep):
    """For every weight the mask of the share to keep: its largest values, or a random choice."""
    method = {"largest": prune.L1Unstructured, "random": prune.RandomUnstructured}[kind](1 - keep)
    return [method.compute_mask(weight, torch.ones_like(weight)) for weight in weights]


def add_shards(model, add_gradient, shards, rank, processes):
    """Sets the gradients to the mean over the shards of a batch, added in fixed order whatever the number of processes
    that share them; returns the mean loss. Batch norm's running statistics are those of the first shard."""
    parameters, found = [p for p in model.parameters() if p.requires_grad], []
    each = len(shards) // processes
    for number in range(rank * each, (rank + 1) * each):
        for parameter in parameters:
            parameter.grad = None
        loss = add_gradient(shards[number], f"shard {number}")
        found.append(torch.cat([loss.view(1), *(p.grad.flatten() for p in parameters)]))
        if number == rank * each:
            statistics = [buffer.clone() for buffer in model.buffers()]
    found = torch.stack(found)
    if processes > 1:
        gathered = [torch.empty_like(found) for _ in range(processes)]
        torch.distributed.all_gather(gathered, found)
        found = torch.cat(gathered)
    loss, *gradients = (ordered_reduce.sum(found, 0) / len(shards)).split([1, *(p.numel() for p in parameters)])
    for parameter, gradient in zip(parameters, gradients, strict=True):
        parameter.grad = gradient.view_as(parameter)
    for buffer, first in zip(model.buffers(), statistics, strict=True):
        buffer.copy_(first)
        if processes > 1:
            torch.distributed.broadcast(buffer, 0)
    return loss.view(())


class Graph:
    """The gradient of a batch as a CUDA graph: a call copies its arguments to where the captured kernels read them,
    launches all of these at once, and gives the parameters the gradients that they have written.

    f(chosen, share) adds the gradient of these images to the parameters' and returns the loss.
    """

    def __init__(self, f, model, chosen):
        self.chosen, self.share = chosen.clone(), chosen.new_ones((), dtype=torch.float32)
        before = [buffer.clone() for buffer in model.buffers()]
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):   # what libraries do at a first call cannot be captured
            for _ in range(2):
                f(self.chosen, self.share)
        torch.cuda.current_stream().wait_stream(stream)
        for buffer, value in zip(model.buffers(), before, strict=True):
            buffer.copy_(value)
        for parameter in model.parameters():
            parameter.grad = None         # so that the captured kernels write the gradients and do not add to them
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph):
            self.loss = f(self.chosen, self.share)
        self.gradients = [(parameter, parameter.grad) for parameter in model.parameters()]

    def __call__(self, chosen, share):
        self.chosen.copy_(chosen)
        self.share.fill_(share)
        self.graph.replay()
        for parameter, gradient in self.gradients:
            parameter.grad = gradient
        return self.loss.clone()


def start_network(args, seed, data, out):
    """The network of an arm at its start, on the device of the data, and the masks of its convolutions' weights: none,
    or of --prune, from the trained weights of args.dense, which starts where that training was at step --rewind."""
    torch.manual_seed(draw(seed, 0, "weights"))
    model, device, masks = make_network(args, data[0].shape[1], data[4]), data[0].device, []
    if args.mask:
        dense = common.load_checkpoint(out / f"{args.dense}-{seed}.pt", "--prune")
        model.load_state_dict(dense)
        torch.manual_seed(draw(seed, 0, "mask"))
        masks = [mask.to(device) for mask in masks_of(conv_weights(model), args.mask, args.keep)]
        model.load_state_dict(common.load_checkpoint(out / f"{args.dense}-{seed}-rewind.pt", "--prune"))
    model.train().to(device, memory_format=torch.channels_last if device.type == "cuda" else torch.preserve_format)
    with torch.no_grad():
        for weight, mask in zip(conv_weights(model), masks, strict=bool(masks)):
            weight.mul_(mask)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(not any(fnmatch.fnmatchcase(name, pattern) for pattern in args.freeze))
    return model, masks


def order_additions(args, model):
    """The policy of the model's weight gradients. In every arm but native nothing but the chosen additions may vary
    from run to run."""
    torch.use_deterministic_algorithms(args.order != "native")
    torch.backends.cudnn.deterministic = args.order != "native"
    torch.utils.deterministic.fill_uninitialized_memory = False
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = args.precision == "tf32"
    if args.order != "native":
        ordered_reduce.convert(model, "fixed", args.splits)
    return ordered_reduce.convert(model, args.order, args.splits, args.order_seed, args.order_scope, args.order_layers,
                                  args.order_steps)


def weights_sha256(model):
    """Of all parameters and buffers, in the order of state_dict, as bytes."""
    bits = hashlib.sha256()
    for tensor in model.state_dict().values():
        bits.update(tensor.cpu().contiguous().numpy().tobytes())
    return bits.hexdigest()


def train(args, name, seed, data, out):
    """One arm: args as arms() gives them, where order and prox are its own. Continues from its checkpoint in out where
    there is one.

    Returns {"summary": the arm's object in summary.json, "rows": those of metrics.csv}; its weights go to
    out/NAME-SEED.pt. With several processes each takes its part of every batch (DistributedDataParallel).
    """
    images, labels, test_images, test_labels, _ = data
    device, batch, run = images.device, args.batch_size, f"{name}-{seed}"
    if args.order == "atomic" and device.type == "cpu" and torch.get_num_threads() == 1:
        torch.set_num_threads(2)   # one thread, as torchrun gives to each process, cannot race
        try:
            return train(args, name, seed, data, out)
        finally:
            torch.set_num_threads(1)
    rank, processes = (0, 1) if study_of(args) else (common.RANK, common.PROCESSES)   # a study's process works alone
    normalise = normaliser(images)

    model, masks = start_network(args, seed, data, out)
    weights, policy = conv_weights(model), order_additions(args, model)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=args.lr, momentum=args.momentum,
                                weight_decay=args.weight_decay, nesterov=args.nesterov)
    symmetry = Symmetry(model)

    def autocast():
        return torch.autocast(device.type, torch.bfloat16, enabled=args.precision == "bf16")

    steps_per_epoch = len(labels) // batch
    step = first = args.rewind if args.mask else 0
    seconds, rows, losses, logged, diverged = 0.0, [], [], 0, False
    checkpoint = out / f"{run}-checkpoint.pt"
    if checkpoint.exists():
        state = common.load_checkpoint(checkpoint, "--resume")
        if "diverged" not in state:
            common.fail(f"argument --resume: {checkpoint} is none, or of an older version; delete it to train this arm "
                        "anew")
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        step, seconds, rows, losses = state["step"], state["seconds"], state["rows"], state["losses"]
        symmetry.first_broken, diverged, logged = state["first_broken"], state["diverged"], state["logged"]
    else:
        rows.append({"arm": name, "seed": seed, "step": step, "epoch": step / steps_per_epoch,
                     **evaluate(model, test_images, test_labels, normalise, autocast),
                     "nonzero": share_not_zero(weights)})
        symmetry.measure(rows[-1])
    policy.load_state_dict({"step": step})
    policy.to(device if args.graph else "cpu")
    if args.sync_batch_norm:
        model = nn.SyncBatchNorm.convert_sync_batchnorm(model)
    forward = model if processes == 1 or args.shards else nn.parallel.DistributedDataParallel(model)
    forward = torch.compile(forward) if args.compile else forward

    def log():
        nonlocal logged
        if args.tensorboard and rank == 0:
            common.log_to_tensorboard(out, (
                (f"{key}/{row['arm']}/seed{row['seed']}", value, row["step"]) for row in rows[logged:]
                for key, value in row.items() if isinstance(value, (int, float)) and key not in ("step", "seed")))
            logged = len(rows)

    def save():
        symmetry.flush()
        log()
        state = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "step": step, "rows": rows,
                 "seconds": seconds + time.perf_counter() - started, "losses": [float(loss) for loss in losses],
                 "first_broken": symmetry.first_broken, "diverged": diverged, "logged": logged}
        common.save_atomically(checkpoint, lambda path: torch.save(state, path))
        common.write_csv(out / f"{run}.csv", rows)

    def save_weights(path):
        if rank == 0:
            state = {key: tensor.cpu() for key, tensor in model.state_dict().items()}
            common.save_atomically(path, lambda temporary: torch.save(state, temporary))

    def add_gradient(chosen, share):
        """Adds the gradient of the loss of these images to the parameters'; returns the loss. share: mixup's."""
        x, y = images[chosen], labels[chosen]
        x = normalise(augment(x) if args.augment else x)
        x = cutout(x, args.cutout) if args.cutout else x
        with autocast():
            if args.mixup:
                other = torch.randperm(len(y), device=device)
                logits = forward(share * x + (1 - share) * x[other]).float()
                loss = share * F.cross_entropy(logits, y) + (1 - share) * F.cross_entropy(logits, y[other])
            else:
                logits = forward(x).float()
                loss = F.cross_entropy(logits, y)
        loss.backward()
        return loss.detach()

    graphs = {}

    def gradient(chosen, purpose):
        """add_gradient with the random numbers of this step, as a graph or without."""
        add = add_gradient
        if args.graph:   # a graph holds one order
            add = graphs[policy.now] = graphs.get(policy.now) or Graph(add_gradient, model, chosen)
        if args.augment or args.mixup or args.dropout or args.cutout:
            torch.manual_seed(draw(seed, step, purpose))
        return add(chosen, float(torch.distributions.Beta(args.mixup, args.mixup).sample()) if args.mixup else 1.0)

    started = saved = time.perf_counter()
    data_order, saving = None, 0.0   # saving: seconds that the last checkpoint took
    progress = tqdm(total=args.epochs * steps_per_epoch, initial=step, unit="step", smoothing=0.05, desc=run,
                    leave=False, disable=None if common.RANK == 0 else True)
    while step < args.epochs * steps_per_epoch and not diverged:
        if args.prune and not args.mask and step == args.rewind:
            save_weights(out / f"{run}-rewind.pt")
        epoch, within = divmod(step, steps_per_epoch)
        if within == 0 or data_order is None:
            generator = torch.Generator().manual_seed(draw(seed, epoch, "data"))
            data_order = torch.randperm(len(labels), generator=generator).to(device)
        chosen = data_order[within * batch:(within + 1) * batch]
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(args, step, steps_per_epoch)
        optimizer.zero_grad()
        if args.shards:
            loss = add_shards(model, gradient, chosen.split(batch // args.shards), rank, processes)
        else:
            loss = gradient(chosen.chunk(processes)[rank], f"step {rank}" if rank else "step")
            if processes > 1:
                torch.distributed.all_reduce(loss)
                loss /= processes
        for weight, mask in zip(weights, masks, strict=bool(masks)):
            if weight.grad is not None:
                weight.grad.mul_(mask)   # so that a weight left out stays 0, and so does its momentum
        optimizer.step()
        if args.prox:
            soft_threshold_([w for w in weights if w.requires_grad], optimizer.param_groups[0]["lr"] * args.prox)
        policy.step()
        step += 1
        losses.append(loss)
        progress.update()

        last_of_epoch = step % steps_per_epoch == 0
        if step <= STEPS_WATCHED or last_of_epoch:
            row = {"arm": name, "seed": seed, "step": step, "epoch": step / steps_per_epoch,
                   "lr": optimizer.param_groups[0]["lr"]}
            if step <= STEPS_WATCHED:
                row["train_loss"] = loss
            symmetry.measure(row)
            if last_of_epoch:
                row["epoch_train_loss"] = sum(map(float, losses)) / len(losses)
                row |= evaluate(model, test_images, test_labels, normalise, autocast)
                row["nonzero"] = share_not_zero(weights)
                losses.clear()
                progress.set_postfix(test=f"{row['test_accuracy']:.1f} %", refresh=False)
                diverged = not (math.isfinite(row["epoch_train_loss"]) and math.isfinite(row["test_loss"]))
                if processes > 1:   # whose batch norms differ, and so their tests; all of them go on, or none
                    anywhere = torch.tensor(float(diverged), device=device)
                    torch.distributed.all_reduce(anywhere)
                    diverged = anywhere.item() > 0
            rows.append(row)
        else:
            symmetry.watch(step)
        now = time.perf_counter()
        if rank == 0 and (now - saved > SAVE_SECONDS or (last_of_epoch and now - saved > 10 * saving)):
            save()
            saved = time.perf_counter()
            saving = saved - now
    progress.close()
    if args.prune and not args.mask and step <= args.rewind:   # diverged before: what is masked then starts from there
        save_weights(out / f"{run}-rewind.pt")
    symmetry.flush()
    log()
    seconds += time.perf_counter() - started
    save_weights(out / f"{run}.pt")
    tested = [row for row in rows if "test_accuracy" in row][-1]
    train_loss = tested["epoch_train_loss"]
    summary = {"arm": name, "order": args.order, "splits": args.splits, "scope": args.order_scope,
               "dropout": args.dropout, "init": args.layer_init if args.arch == "leakynet" else args.init, "seed": seed,
               "dataset": args.dataset, "epochs": args.epochs, "steps": step, "test_accuracy": tested["test_accuracy"],
               "train_loss": train_loss if math.isfinite(train_loss) else None, "diverged": diverged,
               "nonzero": tested["nonzero"], "active": tested["active"], "symmetry": symmetry.summary(step),
               "weights_sha256": weights_sha256(model), "wall_seconds": round(seconds, 2),
               "images_per_second": round((step - first) * batch / seconds, 1)}
    return {"summary": summary, "rows": rows}


# -------------------------------------------------------------------------------------------------- signal propagation


def signal_propagation(args, name, seed, data):
    """Rows of signal.csv: for every layer's output its mean square over a batch of training images, and the squared
    length of the gradient there of a random linear form of the pooled features, per image (the loss has none where the
    head starts at 0)."""
    torch.manual_seed(draw(seed, 0, "weights"))
    model, seen = make_network(args, data[0].shape[1], data[4]).to(data[0].device), {}
    blocks = {f"stages.{s}.{b}": block for s, stage in enumerate(model.stages) for b, block in enumerate(stage)}

    def keep(layer, module, given, output):
        seen[layer] = output

    for layer, module in {"stem": model.stem, **blocks}.items():
        module.register_forward_hook(functools.partial(keep, layer))
    model.head.register_forward_pre_hook(lambda _, given: seen.update(pooled=given[0]))
    model(normaliser(data[0])(data[0][:args.batch_size]))
    for output in seen.values():
        output.retain_grad()
    seen["pooled"].backward(torch.randn_like(seen["pooled"]))
    return [{"arm": name, "seed": seed, "layer": layer, "activation": float(output.detach().square().mean()),
             "gradient": float(output.grad.square().sum() / len(output))}
            for layer, output in seen.items() if layer != "pooled"]


# ------------------------------------------------------------------------------------------------------------- results


def print_table(summary):
    """One line per arm, then, of at most six, the distinct filters of every layer."""
    wide = max(10, *(len(arm["arm"]) + 1 for arm in summary))
    print(f"\n{'arm':<{wide}}{'seed':>5}{'test accuracy':>15}{'train loss':>12}{'not zero':>10}"
          f"{'channels differ from':>22}{'seconds':>9}")
    for arm in summary:
        broken = "never" if arm["symmetry"]["kept"] else f"step {arm['symmetry']['first_broken_step']}"
        loss = "diverged" if arm["diverged"] else f"{arm['train_loss']:.3f}"
        print(f"{arm['arm']:<{wide}}{arm['seed']:>5}{arm['test_accuracy']:>13.1f} %{loss:>12}{arm['nonzero']:>8.1f} %"
              f"{broken:>22}{arm['wall_seconds']:>9.1f}")
    if len(summary) <= 6:
        print(f"\n{'distinct filters':<24}" + "".join(f"{arm['arm']:>{wide}}" for arm in summary))
        for layer in summary[0]["symmetry"]["distinct_filters"]:
            print(f"{layer:<24}" + "".join(f"{arm['symmetry']['distinct_filters'].get(layer, ''):>{wide}}"
                                           for arm in summary))


def write_table_1(summary, directory):
    """table1.md: the paper's table with our numbers beside its own."""
    lines = ["| row | drop rate | a | b | c | d | order | paper, CIFAR-10 | ours, " + summary[0]["dataset"] +
             " [%] | channels differ from step | distinct filters of the least diverse layer |", "|---" * 11 + "|"]
    for number, (init, dropout, order, paper) in enumerate(TABLE_1, start=1):
        mine = [arm for arm in summary if arm["arm"] == f"row{number}"]
        if mine:
            lost = sum(arm["diverged"] for arm in mine)
            mean, low, _ = common.interval([arm["test_accuracy"] for arm in mine if not arm["diverged"]])
            steps = sorted({-1 if arm["symmetry"]["kept"] else arm["symmetry"]["first_broken_step"] for arm in mine})
            least = [min(arm["symmetry"]["distinct_filters"].values()) for arm in mine]
            lines.append(f"| {number} | {dropout:g} | " + " | ".join("✓" if part in init else "✗" for part in "abcd") +
                         f" | {order} | {'(ours)' if paper is None else paper} | " +
                         (f"{mean:.1f}" if mean is not None else "") +
                         (f" ± {mean - low:.1f}" if low is not None else "") +
                         (f" ({lost} of {len(mine)} diverged)" if lost else "") + " | " +
                         ", ".join("never" if step < 0 else str(step) for step in steps) +
                         f" | {min(least)}{f' to {max(least)}' if max(least) > min(least) else ''} |")
    seeds = len({arm["seed"] for arm in summary})
    lines += ["", f"{seeds} seed{'s' * (seeds > 1)}, {summary[0]['epochs']} epochs; mean and 95 % interval over the "
              "seeds. The paper does not say how the additions of rows 1 to 7 were ordered; here they are fixed."]
    common.save_atomically(directory / "table1.md", lambda path: path.write_text("\n".join(lines) + "\n"))
    print("\n" + "\n".join(lines))


def draw_figure(rows, summary, path):
    """Test accuracy, spread of the widest-spread layer, and distinct filters by layer at the end."""
    plt = common.plot_style()
    figure, (accuracy, spread, filters) = plt.subplots(1, 3, figsize=(12, 3.4), layout="constrained")
    arms = list(dict.fromkeys(arm["arm"] for arm in summary))
    for number, arm in enumerate(summary):
        mine = [row for row in rows if (row["arm"], row["seed"]) == (arm["arm"], arm["seed"])]
        which = arms.index(arm["arm"])
        style = {"color": f"C{which % 10}", "linestyle": ("-", "--", ":", "-.")[which % 4],
                 "label": arm["arm"] if arm["arm"] not in [other["arm"] for other in summary[:number]] else None}
        tested = [row for row in mine if row["test_accuracy"] is not None]
        accuracy.plot([row["step"] for row in tested], [row["test_accuracy"] for row in tested], marker=".", **style)
        layers = arm["symmetry"]["distinct_filters"]
        largest = [max(row[f"spread/{layer}"] or 0 for layer in layers) for row in mine]   # none where it overflowed
        spread.plot([row["step"] for row in mine], [value or math.nan for value in largest], **style)
        filters.plot(range(len(layers)), list(layers.values()), marker=".", **style)
    if not any(value > 0 for line in spread.get_lines() for value in line.get_ydata()):
        spread.text(0.5, 0.5, "no channel ever differed", transform=spread.transAxes, ha="center")
        spread.set_yticks([])
    else:
        spread.set_yscale("log")
    title = ", ".join(dict.fromkeys(arm["dataset"] for arm in summary))
    for label, values in (("start:", {arm["init"] or "none" for arm in summary}),
                          ("dropout", {f"{arm['dropout']:g}" for arm in summary})):
        title += f", {label} {min(values)}" if len(values) == 1 else ""
    accuracy.set(xlabel="step", ylabel="test accuracy [%]", ylim=(0, 100), title=title)
    spread.set(xlabel="step", title="spread of a layer's filters, |W - mean| / |W|, largest")
    filters.set(title="distinct filters at the end", xticks=range(len(layers)))
    filters.set_yscale("log", base=2)
    filters.yaxis.set_major_formatter("{x:.0f}")
    filters.set_xticklabels([layer.replace("stages.", "") for layer in layers], rotation=90, fontsize=6)
    if len(arms) > 3:
        figure.legend(*accuracy.get_legend_handles_labels(), fontsize=7, loc="outside right upper")
    else:
        accuracy.legend()
    common.save_figure(figure, path)


def by_seed(rows, x, y):
    """[x values], [mean of y], [lowest], [highest] over the seeds, of the rows that have a y."""
    found = {}
    for row in rows:
        if row[y] is not None:
            found.setdefault(row[x], []).append(row[y])
    return [sorted(found), *([f(found[key]) for key in sorted(found)] for f in (lambda v: sum(v) / len(v), min, max))]


def draw_figure_2(rows, datasets, path):
    """Figure 2: test accuracy over epochs, mean and range of the seeds."""
    figure, axes = common.plot_style().subplots(1, 2, figsize=(9, 3.4), layout="constrained")
    for axis, dataset in zip(axes, datasets, strict=True):
        for which, (start, label) in enumerate((("constnet", "Constnet"), ("standard", "standard initialisation"))):
            x, mean, low, high = by_seed([row for row in rows if row["arm"] == f"{dataset}-{start}"], "epoch",
                                         "test_accuracy")
            axis.plot(x, mean, color=f"C{which}", label=label, marker=".")
            axis.fill_between(x, low, high, color=f"C{which}", alpha=0.2)
        axis.set(xlabel="epoch", ylabel="test accuracy [%]", title=dataset)
    axes[0].legend()
    common.save_figure(figure, path)


def draw_pruned(summary, path):
    """Test accuracy over the share of weights kept, for both starts and both masks; all weights at 100 %."""
    figure, axis = common.plot_style().subplots(figsize=(5.5, 3.8), layout="constrained")
    for which, start in enumerate(STARTS):
        for kind, line in (("largest", "-"), ("random", "--")):
            prefix = f"{start}-{kind}-"
            points = [{"keep": 100, "accuracy": arm["test_accuracy"]} for arm in summary if arm["arm"] == start]
            points += [{"keep": 100 * float(arm["arm"].removeprefix(prefix)), "accuracy": arm["test_accuracy"]}
                       for arm in summary if arm["arm"].startswith(prefix)]
            x, mean, low, high = by_seed(points, "keep", "accuracy")
            axis.plot(x, mean, line, color=f"C{which}", marker=".", label=f"{start}, {kind} weights kept")
            axis.fill_between(x, low, high, color=f"C{which}", alpha=0.12)
    axis.set(xscale="log", xlabel="weights kept in every convolution [%]", ylabel="test accuracy [%]")
    axis.set_xticks(x, [f"{keep:g}" for keep in x])
    axis.minorticks_off()
    axis.legend(fontsize=7, handlelength=4)
    common.save_figure(figure, path)


def draw_sparse(rows, path):
    """--prox: test accuracy, and the share of weights of convolutions that are not zero, over the epochs."""
    figure, axes = common.plot_style().subplots(1, 2, figsize=(9, 3.4), layout="constrained")
    for which, arm in enumerate(dict.fromkeys(row["arm"] for row in rows)):
        for axis, key in zip(axes, ("test_accuracy", "nonzero"), strict=True):
            x, mean, low, high = by_seed([row for row in rows if row["arm"] == arm], "epoch", key)
            axis.plot(x, mean, color=f"C{which % 10}", label=arm, marker=".")
            axis.fill_between(x, low, high, color=f"C{which % 10}", alpha=0.15)
    axes[0].set(xlabel="epoch", ylabel="test accuracy [%]")
    axes[1].set(xlabel="epoch", ylabel="weights of convolutions that are not 0 [%]")
    figure.legend(*axes[1].get_legend_handles_labels(), loc="outside upper center", ncols=4)
    common.save_figure(figure, path)


def draw_signal(rows, path):
    """Signal propagation: mean squares by layer, mean and range of the seeds."""
    figure, axes = common.plot_style().subplots(1, 2, figsize=(9, 3.8), layout="constrained")
    layers = list(dict.fromkeys(row["layer"] for row in rows))
    for which, arm in enumerate(dict.fromkeys(row["arm"] for row in rows)):
        for axis, key in zip(axes, ("activation", "gradient"), strict=True):
            mine = [{**row, "place": layers.index(row["layer"])} for row in rows if row["arm"] == arm]
            x, mean, low, high = by_seed(mine, "place", key)
            axis.plot(x, mean, color=f"C{which}", marker=".", label=arm)
            axis.fill_between(x, low, high, color=f"C{which}", alpha=0.15)
    for axis, title in zip(axes, ("mean square of the output", "squared gradient of a random form of the features"),
                           strict=True):
        axis.set(yscale="log", title=title, xticks=range(len(layers)))
        axis.set_xticklabels([layer.replace("stages.", "") for layer in layers], rotation=90, fontsize=7)
    axes[0].legend()
    common.save_figure(figure, path)


def report(directory):
    """Figures and tables of a run from its files, so that they can be had again at any time."""
    arguments = json.loads((directory / "config.json").read_text())["arguments"]
    if arguments["signal"]:
        return draw_signal(common.read_csv(directory / "signal.csv", text=("arm", "layer")), directory / "signal.png")
    summary = json.loads((directory / "summary.json").read_text())
    rows = common.read_csv(directory / "metrics.csv", text=("arm",))
    if not summary:
        raise ValueError("its summary.json is empty")
    draw_figure(rows, summary, directory / "constnet.png")
    print_table(summary)
    if arguments["table1"] is not None:   # [] is all rows
        write_table_1(summary, directory)
    if arguments.get("figure2"):
        draw_figure_2(rows, arguments["figure2"], directory / "figure2.png")
    if arguments.get("prune"):
        draw_pruned(summary, directory / "prune.png")
    if arguments.get("prox", [0.0]) != [0.0]:
        draw_sparse(rows, directory / "prox.png")
    return None


def main(argv=None):
    argv = sys.argv[1:] if argv is None else argv
    args = parse_arguments(argv)
    if args.plot_only is not None:
        with common.finished_run(args.plot_only) as directory:
            return report(directory)
    joined = ("seed",)
    if args.resume:   # seeds and rows are added to those of the run
        earlier = common.arguments_of(common.run_directory(args.out, default_directory(args), True))
        if isinstance(earlier.get("seed"), list):   # another script's run is refused below
            args.seed = list(dict.fromkeys([*earlier["seed"], *args.seed]))
        rows = earlier.get("table1")
        if rows is not None and args.table1 is not None:
            args.table1 = sorted({*rows, *args.table1}) if rows and args.table1 else []   # [] is all rows
            joined = ("seed", "table1")

    @functools.cache
    def load(dataset):
        *tensors, classes = common.load_data(dataset, args.data_dir, args.image_size)
        try:
            return [tensor.to(args.device) for tensor in tensors] + [classes]
        except torch.OutOfMemoryError:
            common.fail(f"argument --image-size, --device: the images of {dataset} do not fit in the device's memory")

    todo = arms(args, argv)
    for arm in todo.values():   # what does not fit the data or the model is found before anything is written
        images, labels, *_, classes = load(arm.dataset)
        if len(labels) < arm.batch_size:
            common.fail(f"argument --batch-size: {arm.batch_size} is more than the {len(labels)} training images")
        steps = arm.epochs * (len(labels) // arm.batch_size)
        common.need(arm.rewind < steps, "--rewind", arm.rewind, "less than the steps of a training")
        common.need(arm.order_steps is None or arm.order_steps[0] < steps, "--order-steps", arm.order_steps,
                    f"such that the first is one of a training's {steps} steps")
        try:
            torch.empty(64 * arm.widen, 64 * arm.widen, 9)   # the largest weight, before the others fill the memory
            model = make_network(arm, images.shape[1], classes)
            ordered_reduce.convert(model, layers=arm.order_layers)
        except ValueError as error:
            common.fail(f"argument --order-layers: {error}")
        except RuntimeError:
            common.fail(f"argument --widen: a network of width {arm.widen} does not fit in memory")
        names = [name for name, _ in model.named_parameters()]
        for pattern in args.freeze:
            common.need(fnmatch.filter(names, pattern), "--freeze", repr(pattern), f"a pattern of {', '.join(names)}")
        frozen = {name for pattern in args.freeze for name in fnmatch.filter(names, pattern)}
        common.need(len(frozen) < len(names), "--freeze", " ".join(args.freeze), "such that something is left to train")

    study = study_of(args)
    # Whose number has a say in the bits: that of torchrun's processes that train one arm together.
    args.nproc_per_node = common.PROCESSES if common.PROCESSES > 1 and not study and not args.shards else None
    recorded = args
    if args.figure2:   # each data set has its own recipe
        each = {name: {arm.dataset: getattr(arm, name) for arm in todo.values()} for name in SMALL}
        recorded = argparse.Namespace(**{**vars(args), "dataset": args.figure2, **each})
    out = common.start_run(recorded, default_directory(args), may_differ=joined)
    try:
        if args.signal:
            found = common.work({f"{name}-{seed}": (arm, name, seed, load(arm.dataset))
                                 for name, arm in todo.items() for seed in args.seed}, signal_propagation, out)
        else:
            found = {}
            for masked in (False, True):   # what is pruned was trained before
                found |= common.work({f"{name}-{seed}": (arm, name, seed, load(arm.dataset), out)
                                      for name, arm in todo.items() for seed in args.seed if bool(arm.mask) == masked},
                                     train, out, share=bool(study))
    except KeyboardInterrupt:
        return common.interrupted(out)
    except ValueError as error:
        if "more than 1 value per channel" not in str(error):
            raise
        common.fail(f"argument --batch-size: with {args.batch_size} of images so small a channel of the last stage has "
                    "one value alone, which batch norm cannot normalise; try a larger one")
    except RuntimeError as error:
        if not common.out_of_memory(error):
            raise
        common.fail(f"argument --batch-size, --widen: {args.batch_size} images at width {args.widen} do not fit in "
                    f"memory; try --batch-size {max(1, args.batch_size // 2)}, "
                    f"--widen {max(1, args.widen // 2)} or --precision bf16")
    if not common.first_process():
        return 0
    if args.signal:
        common.write_csv(out / "signal.csv", [row for rows in found.values() for row in rows])
        report(out)
        print(f"{out}/: signal.png, signal.csv, config.json")
        return 0
    summary = [run["summary"] for run in found.values()]
    common.write_json(out / "summary.json", summary)
    common.write_csv(out / "metrics.csv", [row for run in found.values() for row in run["rows"]])
    for name in found:
        for kind in (".csv", "-checkpoint.pt"):
            (out / (name + kind)).unlink(missing_ok=True)
    report(out)
    print(f"\n{out}/: metrics.csv, summary.json, config.json, ARM-SEED.pt (weights), "
          + ", ".join(sorted(path.name for path in [*out.glob("*.png"), *out.glob("table1.md")])))
    dead, diverged = [], []
    for arm in summary:
        of = todo[arm["arm"]]
        if arm["active"] == 0:
            dead.append(f"{arm['arm']}, seed {arm['seed']} (--warmup {of.warmup:g}, --lr {of.lr:g})")
        if arm["diverged"]:
            diverged.append(f"{arm['arm']}, seed {arm['seed']}, at step {arm['steps']} (--lr {of.lr:g})")
    if dead:
        print(f"constnet.py: dead: the last ReLU is 0 everywhere, so no gradient reaches a weight: {'; '.join(dead)}; "
              "try a longer --warmup or a smaller --lr", file=sys.stderr)
    if diverged:
        print(f"constnet.py: diverged: the loss is not finite: {'; '.join(diverged)}; try a smaller --lr; metrics: "
              f"{out}/metrics.csv", file=sys.stderr)
    return 3 if diverged else 0


if __name__ == "__main__":
    common.run(main)
