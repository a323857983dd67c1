"""Replicated features: two-layer networks whose N hidden units start as copies of K features.

Blumenfeld, Gilboa and Soudry, "Is Feature Diversity Necessary in Neural Network Initialization?", Section 2, Figures 1
and 3. A network of Eq. 1, softmax(W2 relu(W1 x)), starts with the rows of Eq. 2, W1[i] = (1 - noise) * feature[i mod K]
+ noise * own[i]: unit i is a copy of feature i mod K but for the noise lambda. Does a wide network with few features
learn as much as one with many? Figure 1 draws the test error over N for every K, with and without noise, Figure 3 its
spread over the seeds; features.png draws what the paper argues about, the number of units that are still copies.

    python mlp_replicated.py                        # digits, about a minute on two cores
    python mlp_replicated.py --dataset mnist        # the paper's grid up to N = 256, about an hour on two cores
    torchrun --nproc-per-node 2 mlp_replicated.py   # the seeds are shared out over processes, and GPUs

All cells (N, K, noise, dropout) of a seed train together as batched matrix products, on the same batches in the same
order; on the CPU a cell's numbers do not depend on the other cells. Every run writes config.json, metrics.csv (a row
per cell, seed and logged step), summary.json, figure1.png, figure3.png and features.png; seeds/ holds the finished
seeds.
Exit status: 0 done, 2 bad input, 3 a cell diverged (its test error is left empty), 130 interrupted (finished seeds are
kept).
"""

import collections
import itertools
import json
import math
import sys

import numpy as np
import ordered_reduce
import torch
from tqdm import tqdm

import common

TILE = 256        # hidden units of one matrix product: all products have one shape, so that no cell sees its neighbours
SLICE = 250       # test images evaluated at a time
GROWING = ("widths", "features", "noise", "dropout", "seeds")   # what --resume may add to
Cell = collections.namedtuple("Cell", "width features noise dropout")   # of the grid: N, K
SMALL = dict(widths=[8, 16, 32, 64], seeds=10, steps=1500)
PAPER = dict(widths=[8, 16, 32, 64, 128, 256], seeds=30, steps=7500)
DEFAULTS = {dataset: SMALL if dataset == "digits" else PAPER for dataset in common.DATASETS}


# ---------------------------------------------------------------------------------------------------------- arguments


def parse_arguments(argv=None):
    parser = common.parser(__doc__)
    what = parser.add_argument_group("the grid")
    what.add_argument("--widths", type=int, nargs="+", metavar="N",
                      help="hidden units; default: 8 16 32 64 on digits, 8 to 256 elsewhere; paper: a range not given")
    what.add_argument("--features", type=int, nargs="+", metavar="K",
                      help="distinct features at the start, of any number (K need not divide N); cells with K > N are "
                           "left out; default: all powers of two")
    what.add_argument("--noise", type=float, nargs="+", default=[0.0, 0.01], metavar="LAMBDA",
                      help="share in [0, 1] of its own random row in every unit's start (Eq. 2); default and paper: "
                           "0 0.01")
    what.add_argument("--second-layer", choices=("random", "replicated"), default="random",
                      help="random, as the paper has it: back-propagation tells copies apart from the first step on; "
                           "replicated: the columns of W2 are copies like the rows of W1, and it cannot; default: "
                           "random")
    what.add_argument("--dropout", type=float, nargs="+", default=[0.0], metavar="P",
                      help="probabilities in [0, 1) with which hidden units are dropped: the paper's other cause of "
                           "divergence; default and paper: 0")
    what.add_argument("--seeds", type=int, metavar="COUNT",
                      help="runs of every cell, seeds 0 to COUNT - 1; default: 10 on digits, 30 elsewhere; paper: 30")

    how = parser.add_argument_group("data and training")
    common.add_data(how, "paper: mnist; images are flattened and scaled to [0, 1]")
    how.add_argument("--steps", type=int, metavar="N",
                     help="of plain SGD; default: 1500 on digits, 7500 elsewhere; paper: 7500")
    how.add_argument("--batch-size", type=int, default=64, metavar="N",
                     help="images; the rest of an epoch is left out; default: 64; paper: not given")
    how.add_argument("--lr", type=float, default=0.1, metavar="RATE", help="default and paper: 0.1")
    how.add_argument("--order", default="native", metavar="ORDER",
                     help="of the additions in the gradient of W1: native (the matrix product's own), or fixed, "
                          "shuffled, atomic over --splits partial gradients (slower: cell by cell); default: native")
    how.add_argument("--splits", type=int, default=8, metavar="G",
                     help="partial gradients of a batch with --order; must divide the batch size; default: 8")
    how.add_argument("--memory", type=float, metavar="GIB",
                     help="what is trained at once may take this much; default: 60 %% of a GPU's free memory, 0.15 on "
                          "the CPU (one seed of the paper's grid at a time is the fastest: its weights stay in cache)")

    common.add_files(parser, "mlp_replicated/DATASET", "finished cells are kept, and the grid may have grown")
    args = parser.parse_args(argv)
    common.check_common(args, DEFAULTS, args.order == "native" or ordered_reduce.cuda_built())
    check_arguments(args)
    return args


def check_arguments(args):
    need = common.need
    for name in ("noise", "dropout"):   # as metrics.csv keeps them
        setattr(args, name, [float(f"{value:.6g}") for value in getattr(args, name)])
    for name in ("widths", "features", "noise", "dropout"):
        values = getattr(args, name) or []
        need(len(set(values)) == len(values), f"--{name}", values, "different values")
    common.at_least_1(args, "widths")
    if args.features is None:
        args.features = [1 << i for i in range(max(args.widths).bit_length())]
    common.at_least_1(args, "features")
    need(min(args.features) <= max(args.widths), "--features", args.features,
         f"at most the largest width, {max(args.widths)}: the grid is empty")
    need(all(0 <= noise <= 1 for noise in args.noise), "--noise", args.noise, "in [0, 1]")
    need(all(0 <= dropout < 1 for dropout in args.dropout), "--dropout", args.dropout, "in [0, 1)")
    common.at_least_1(args, "seeds", "steps", "batch_size")
    need(0 <= args.lr <= torch.finfo(torch.float32).max, "--lr", args.lr, "at least 0, and finite in float32")
    orders = ("native", "fixed", "shuffled", "atomic")
    need(args.order in orders, "--order", repr(args.order), f"one of {', '.join(orders)}")
    need(args.splits >= 1 and (args.batch_size % args.splits == 0 or args.order == "native"), "--splits", args.splits,
         f"a divisor of the batch size, {args.batch_size}")
    need(args.memory is None or 0 < args.memory < math.inf, "--memory", args.memory, "positive, in GiB")


def grid(args):
    """All cells with K <= N, by width."""
    cells = itertools.product(sorted(args.widths), sorted(args.features), args.noise, args.dropout)
    return [cell for cell in map(Cell._make, cells) if cell.features <= cell.width]


# ------------------------------------------------------------------------------------------- initialisation, measures


def generator(*key, device="cpu"):
    """A stream of random numbers of its own for every key, so that no draw depends on which others were made."""
    return torch.Generator(device).manual_seed(common.seed_of(*key))


def initial_weights(cell, seed, inputs, classes, second_layer="random"):
    """W1 (N, inputs) of Eq. 2 and W2 (classes, N), He-normal. Cells of a seed share what they can: the features (of
    equal K), the units' own rows and W2 (of equal N), so that they compare in pairs. With second_layer "replicated"
    the columns of W2 are copied like the rows of W1."""
    width, features, noise, _ = cell
    copied = torch.arange(width) % features
    he = math.sqrt(2 / inputs)
    feature = he * torch.randn(features, inputs, generator=generator(seed, "features", features))
    own = he * torch.randn(width, inputs, generator=generator(seed, "own", width))
    w2 = math.sqrt(2 / width) * torch.randn(classes, width, generator=generator(seed, "second layer", width))
    return (1 - noise) * feature[copied] + noise * own, w2 if second_layer == "random" else w2[:, copied]


def distinct_units(w1):
    """(cells, N, inputs) -> two counts for every cell: rows that differ bitwise, and rows farther than 1e-3 of their
    length from every row before them."""
    multipliers = torch.randint(-1 << 62, 1 << 62, w1.shape[2:], generator=generator("hash")).to(w1.device) | 1
    hashes = (w1.view(torch.int32) * multipliers).sum(2).sort().values   # equal rows have equal hashes
    bitwise = 1 + (hashes[:, 1:] != hashes[:, :-1]).sum(1)
    rows = w1.double()
    products = rows @ rows.transpose(1, 2)
    lengths = products.diagonal(dim1=1, dim2=2)
    distances = lengths[:, :, None] + lengths[:, None, :] - 2 * products
    close = distances <= 1e-6 * torch.maximum(lengths[:, :, None], lengths[:, None, :])
    return bitwise.tolist(), (w1.shape[1] - close.tril(-1).any(2).sum(1)).tolist()


# ------------------------------------------------------------------------------------------------------------ training


def logged_steps(steps):
    return [0, *(10 ** i for i in range(len(str(steps))) if 10 ** i < steps), steps]


def bytes_per_unit(inputs, batch_size):
    """What a hidden unit takes: its weights, the copies that are made to compare them, its activations."""
    return 12 * inputs + 12 * batch_size + 8 * SLICE


def rooms(cells, memory_units):
    """The cells in consecutive lists that fit, and the units each takes with its last tile filled up."""
    lists, used = [[]], 0
    for cell in cells:
        if used + cell.width > memory_units and lists[-1]:
            lists, used = [*lists, []], 0
        lists[-1].append(cell)
        used += cell.width
    return [(some, -(-sum(cell.width for cell in some) // TILE) * TILE) for some in lists]


@torch.no_grad()
def train(cells, units, seeds, data, args, tick):
    """Trains all the cells for all the seeds together; returns their rows. `data` holds flat uint8 images."""
    x_train, y_train, x_test, y_test, classes = data
    device, inputs, batch, S = x_train.device, x_train.shape[1], args.batch_size, len(seeds)
    scale = 1 / common.brightest(x_train)
    w1 = torch.zeros(S, units, inputs, device=device)   # the units of all cells of a seed, one after the other
    groups, first = [], 0                               # (N, its cells, their first unit, their W2)
    for width, alike in itertools.groupby(cells, key=lambda cell: cell.width):
        alike = list(alike)
        w2 = torch.empty(S, len(alike), classes, width, device=device)
        for (s, seed), (c, cell) in itertools.product(enumerate(seeds), enumerate(alike)):
            w1[s, first + c * width:first + (c + 1) * width], w2[s, c] = initial_weights(
                cell, seed, inputs, classes, args.second_layer)
        groups.append((width, alike, first, w2.flatten(0, 1)))
        first += len(alike) * width
    tiles = w1.view(-1, TILE, inputs)
    hidden, gradient = torch.zeros(2, S, units, batch, device=device)
    drops = {(seed, width): generator(seed, "dropout", width, device=device) for seed in seeds for width, *_ in groups}

    def for_every_tile(x):   # (S, ...) -> (tiles, ...); on the CPU, with one seed, no copy is made
        return x[:, None].expand(S, units // TILE, *x.shape[1:]).reshape(-1, *x.shape[1:])

    def test_errors():
        wrong = [torch.zeros(S, len(alike), device=device) for _, alike, _, _ in groups]
        for i in range(0, len(x_test), SLICE):
            x = (x_test[i:i + SLICE] * scale).t().expand(S, -1, -1)
            h = torch.bmm(tiles, for_every_tile(x)).relu_().view(S, units, -1)
            for total, (width, alike, first, w2) in zip(wrong, groups, strict=True):
                scores = torch.bmm(w2, h[:, first:first + len(alike) * width].reshape(S * len(alike), width, -1))
                total += (scores.argmax(1) != y_test[i:i + SLICE]).sum(1).view(S, -1)
                total.masked_fill_(~scores.isfinite().flatten(1).all(1).view(S, -1), math.nan)
        for total, (width, alike, first, w2) in zip(wrong, groups, strict=True):   # an infinite weight can be hidden
            for w in (w1[:, first:first + len(alike) * width], w2):
                total.masked_fill_(~w.reshape(S, len(alike), -1).isfinite().all(2), math.nan)
        return [(100 * total / len(x_test)).tolist() for total in wrong]

    def log(step):
        errors = test_errors() if step == args.steps else [None] * len(groups)
        for error, (width, alike, first, _) in zip(errors, groups, strict=True):
            for s, seed in enumerate(seeds):
                counts = distinct_units(w1[s, first:first + len(alike) * width].view(len(alike), width, inputs))
                for c, cell in enumerate(alike):
                    rows.append({**cell._asdict(), "seed": seed, "step": step,
                                 "distinct": counts[0][c], "distinct_to_1e-3": counts[1][c],
                                 "test_error": error[s][c] if error and math.isfinite(error[s][c]) else None})

    rows, steps_per_epoch, one = [], len(x_train) // batch, torch.eye(classes, device=device)
    logged = set(logged_steps(args.steps))
    for step in range(args.steps):
        if step in logged:
            log(step)
        if step % steps_per_epoch == 0:
            epoch = step // steps_per_epoch
            order = torch.stack([torch.randperm(len(x_train), generator=generator(seed, "epoch", epoch))
                                 for seed in seeds]).to(device)
        index = order[:, step % steps_per_epoch * batch:][:, :batch]
        x, y = x_train[index] * scale, one[y_train[index]].transpose(1, 2)   # (S, batch, inputs), (S, classes, batch)

        torch.bmm(tiles, for_every_tile(x.transpose(1, 2)), out=hidden.view(-1, TILE, batch)).relu_()
        for width, alike, first, w2 in groups:
            C, place = len(alike), slice(first, first + len(alike) * width)
            h = hidden[:, place].reshape(S * C, width, batch)
            if any(cell.dropout for cell in alike):
                dropout = torch.tensor([cell.dropout for cell in alike], device=device).repeat(S)[:, None, None]
                draws = torch.stack([torch.rand(width, batch, generator=drops[seed, width], device=device)
                                     for seed in seeds]).repeat_interleave(C, 0)
                h = h * (draws >= dropout) / (1 - dropout)
            p = torch.bmm(w2, h).softmax(1)
            p.view(S, C, classes, batch).sub_(y[:, None]).div_(batch)        # the gradient of the mean cross entropy
            back = torch.ops.aten.threshold_backward(torch.bmm(w2.transpose(1, 2), p), h, 0)
            if any(cell.dropout for cell in alike):
                back /= 1 - dropout
            gradient[:, place] = back.view(S, C * width, batch)
            w2.baddbmm_(p, h.transpose(1, 2), alpha=-args.lr)
        if args.order == "native":
            tiles.baddbmm_(gradient.view(-1, TILE, batch), for_every_tile(x), alpha=-args.lr)
        else:
            ordered_update(w1, gradient, x, groups, seeds, step, args)
        tick(len(cells) * S)
    log(args.steps)
    return rows


def ordered_update(w1, gradient, x, groups, seeds, step, args):
    """w1 -= lr * gradient @ x, the partial gradients of `splits` groups of samples added in the chosen order."""
    parts = x.unflatten(1, (args.splits, -1))
    for (s, seed), (width, alike, first, _) in itertools.product(enumerate(seeds), groups):
        for c, cell in enumerate(alike):
            place = slice(first + c * width, first + (c + 1) * width)
            partials = torch.bmm(gradient[s, place].unflatten(1, (args.splits, -1)).transpose(0, 1), parts[s])
            op = common.seed_of(*cell) % (1 << 32)   # a cell has draws of its own
            w1[s, place] -= args.lr * ordered_reduce.sum(partials, 0, order=args.order, splits=args.splits, seed=seed,
                                                         step=step, op=op)


# ------------------------------------------------------------------------------------------------------------- results


def cell_of(row):
    return Cell(*(row[key] for key in Cell._fields))


def table_of_errors(rows):
    """{cell: final test errors [%] by seed}, an array; cells and seeds without one are left out."""
    last = max(row["step"] for row in rows)
    final = [row for row in rows if row["step"] == last and row["test_error"] is not None]
    seeds = sorted({row["seed"] for row in final})
    errors = {}
    for row in final:
        errors.setdefault(cell_of(row), {})[row["seed"]] = row["test_error"]
    return {cell: np.array([by_seed[seed] for seed in seeds]) for cell, by_seed in sorted(errors.items())
            if len(by_seed) == len(seeds)}


def statements(errors):
    """The paper's four statements about Figure 1, each as numbers with a 95 % interval (bootstrap over the seeds).

    Without dropout. They need two noise levels, three widths and three numbers of features; otherwise there are none.
    """
    errors = {cell[:3]: values for cell, values in errors.items() if cell[3] == 0}
    low, high = min((n for _, _, n in errors), default=0), max((n for _, _, n in errors), default=0)
    widths, features = sorted({n for n, _, _ in errors}), sorted({k for _, k, _ in errors})
    seeds = len(next(iter(errors.values()), []))
    if low == high or len(widths) < 3 or len(features) < 3 or any(len(values) != seeds for values in errors.values()):
        return []
    cells = [(n, k) for n, k, noise in errors if noise == low and (n, k, high) in errors]
    if {n for n, _ in cells} != set(widths):   # all others of a width diverged
        return []
    by_k = {k: [n for n in widths if (n, k, low) in errors] for k in features}
    few = [k for k in features
           if k <= max(widths) / 32 and len(by_k[k]) > 1 and all((n, k, low) in errors for n in widths if n >= k)]

    def mean(cell, noise, chosen):
        return errors[(*cell, noise)][chosen].mean()

    def explained(which, chosen):   # share of the variance of the cells' errors that lies between the values of N or K
        values = np.array([mean(cell, low, chosen) for cell in cells])
        means = {v: values[[cell[which] == v for cell in cells]].mean() for v in {cell[which] for cell in cells}}
        return 100 * np.var([means[cell[which]] for cell in cells]) / np.var(values)

    def doubling(place, chosen):    # from one width to the next, features kept
        return np.mean([mean((by_k[k][place + 1], k), low, chosen) - mean((by_k[k][place], k), low, chosen)
                        for k in by_k if len(by_k[k]) >= 3])

    def widest(chosen):             # the better width is chosen on one half of the seeds and compared on the other
        halves, differences = (chosen[chosen % 2 == 0], chosen[chosen % 2 == 1]), []
        for choose, compare in (halves, halves[::-1]) if all(map(len, halves)) else ():
            for k in few:
                best = min(by_k[k][:-1], key=lambda n: mean((n, k), low, choose))
                differences.append(mean((by_k[k][-1], k), low, compare) - mean((best, k), low, compare))
        return np.mean(differences) if differences else math.nan

    def effect(noise, chosen):      # the price of few features
        return np.mean([mean((n, min(k for m, k in cells if m == n)), noise, chosen)
                        - mean((n, max(k for m, k in cells if m == n)), noise, chosen) for n in widths])

    asked = [
        ("1 features predict error best", "variance of the error explained by K alone [%]", lambda c: explained(1, c)),
        ("1 features predict error best", "variance of the error explained by N alone [%]", lambda c: explained(0, c)),
        ("2 width helps small networks", "error, first doubling of the width at the same K [points]",
         lambda c: doubling(0, c)),
        ("2 ... and saturates", "error, last doubling of the width at the same K [points]", lambda c: doubling(-2, c)),
        ("3 widest with few features get worse",
         f"error at N = {widths[-1]} minus the best narrower width's, K <= {max(few, default=0)} [points]", widest),
        ("4 the effect vanishes with noise", f"error with fewest minus most features, noise {low:g} [points]",
         lambda c: effect(low, c)),
        ("4 the effect vanishes with noise", f"error with fewest minus most features, noise {high:g} [points]",
         lambda c: effect(high, c)),
        ("4 the effect vanishes with noise", "what the noise takes off that difference [points]",
         lambda c: effect(low, c) - effect(high, c)),
    ]
    random = np.random.default_rng(0)
    samples = random.integers(seeds, size=(1000, seeds))
    found = []
    for statement, statistic, value in asked:
        draws = np.array([value(sample) for sample in samples])
        draws = draws[np.isfinite(draws)] if np.isfinite(draws).any() else np.zeros(1)
        ends = np.percentile(draws, [2.5, 97.5]).tolist() if seeds > 1 else [None, None]
        found.append({"statement": statement, "statistic": statistic, "value": float(value(np.arange(seeds))),
                      "low": ends[0], "high": ends[1]})
    return [row for row in found if math.isfinite(row["value"])]


def summarise(rows, left_out):
    errors = table_of_errors(rows)
    cells = [{**cell._asdict(), "seeds": len(values), "test_error": float(values.mean()),
              "standard_deviation": float(values.std(ddof=1)) if len(values) > 1 else None}
             for cell, values in errors.items()]
    return {"cells": cells, "cells_left_out": left_out, "statements": statements(errors)}


def draw_figures(rows, directory):
    """figure1.png (mean test error over N, a line for every K), figure3.png (the same with its standard deviation over
    the seeds), features.png (units that are no copies, over training, in the widest network)."""
    plt = common.plot_style()
    errors = table_of_errors(rows)
    conditions = sorted({(cell.noise, cell.dropout) for cell in map(cell_of, rows)})
    features = sorted({row["features"] for row in rows})
    colours = {k: plt.get_cmap("viridis")(i / max(1, len(features) - 1)) for i, k in enumerate(features)}

    def panels(path, draw, **labels):
        figure, axes = plt.subplots(1, len(conditions), figsize=(1.5 + 4.2 * len(conditions), 3.8), sharey=True,
                                    squeeze=False, layout="constrained")
        for axis, (noise, dropout) in zip(axes[0], conditions, strict=True):
            for k in features:
                draw(axis, k, (noise, dropout), {"color": colours[k], "label": f"K = {k}", "marker": "."})
            axis.set(title=f"noise {noise:g}" + (f", dropout {dropout:g}" if dropout else ""), **labels)
            axis.set_yscale("log", base=2 if path == "features.png" else 10)
            axis.yaxis.set_major_formatter("{x:g}")
            axis.yaxis.set_minor_formatter(lambda x, _: f"{x:g}" if f"{x:e}"[0] in "23468" else "")   # 9 and 10 overlap
        figure.legend(*axes[0][0].get_legend_handles_labels(), loc="outside right center")
        common.save_figure(figure, directory / path)

    def error_over_width(bars):
        def draw(axis, k, condition, style):
            mine = [(cell.width, values) for cell, values in errors.items()
                    if cell.features == k and (cell.noise, cell.dropout) == condition]
            if mine:
                widths, values = zip(*mine, strict=True)
                spread = [v.std(ddof=1) if len(v) > 1 else 0 for v in values] if bars else None
                axis.errorbar(widths, [v.mean() for v in values], yerr=spread, capsize=2 if bars else 0, **style)
                axis.set_xscale("log", base=2)
                axis.xaxis.set_major_formatter("{x:.0f}")
        return draw

    widest = max(row["width"] for row in rows)

    def distinct_over_steps(axis, k, condition, style):
        mine = {}
        for row in rows:
            if row["width"] == widest and row["features"] == k and cell_of(row)[2:] == condition:
                mine.setdefault(row["step"], []).append(row)
        if mine:
            steps = sorted(mine)
            for name, line in (("distinct", ":"), ("distinct_to_1e-3", "-")):
                axis.plot(steps, [np.mean([row[name] for row in mine[step]]) for step in steps], linestyle=line,
                          **{**style, "label": style["label"] if line == "-" else None})
            axis.set_xscale("symlog", linthresh=1)
            axis.xaxis.set_major_formatter("{x:g}")

    panels("figure1.png", error_over_width(False), xlabel="hidden units N", ylabel="test error [%]")
    panels("figure3.png", error_over_width(True), xlabel="hidden units N", ylabel="test error [%], standard deviation")
    panels("features.png", distinct_over_steps, xlabel="step",
           ylabel=f"distinct units of {widest} (solid: to 1e-3, dotted: bitwise)")


def report(directory):
    """Figures and tables of a run from its files, so that they can be had again at any time."""
    rows = common.read_csv(directory / "metrics.csv", text=())
    summary = json.loads((directory / "summary.json").read_text())
    draw_figures(rows, directory)
    conditions = sorted({(cell["noise"], cell["dropout"]) for cell in summary["cells"]})
    for noise, dropout in conditions:
        mine = {(cell["width"], cell["features"]): cell["test_error"] for cell in summary["cells"]
                if (cell["noise"], cell["dropout"]) == (noise, dropout)}
        widths, features = (sorted({pair[i] for pair in mine}) for i in (0, 1))
        print(f"\ntest error [%], noise {noise:g}, dropout {dropout:g}\n{'N':>6}" +
              "".join(f"{'K = ' + str(k):>9}" for k in features))
        for n in widths:
            print(f"{n:>6}" + "".join(f"{mine[n, k]:>9.2f}" if (n, k) in mine else f"{'':>9}" for k in features))
    if summary["statements"]:
        print("\nthe paper's statements about Figure 1 (95 % interval over the seeds)")
        for row in summary["statements"]:
            between = "" if row["low"] is None else f" ({row['low']:.2f} to {row['high']:.2f})"
            print(f"  {row['statement']:<38}{row['statistic']}: {row['value']:.2f}{between}")


def main(argv=None):
    args = parse_arguments(argv)
    if args.plot_only is not None:
        with common.finished_run(args.plot_only) as directory:
            return report(directory)
    device = torch.device(args.device)
    *tensors, classes = common.load_data(args.dataset, args.data_dir, args.image_size)
    data = [tensor.flatten(1).to(device) if tensor.ndim > 1 else tensor.to(device) for tensor in tensors] + [classes]
    inputs, cells = data[0].shape[1], grid(args)
    if len(data[0]) < args.batch_size:
        common.fail(f"argument --batch-size: {args.batch_size} is more than the {len(data[0])} training images")
    memory = 2 ** 30 * (args.memory or 0.15)
    if args.memory is None and device.type == "cuda":
        memory = 0.6 * torch.cuda.mem_get_info(device)[0]
    most = int(memory // bytes_per_unit(inputs, args.batch_size))
    if most < max(TILE, cells[-1][0]):
        need = max(TILE, cells[-1][0]) * bytes_per_unit(inputs, args.batch_size) / 2 ** 30
        common.fail(f"argument --memory: {memory / 2 ** 30:.3g} GiB is too small for a network of {cells[-1][0]} "
                    f"units; it takes {need + 0.001:.3f}")

    out = common.start_run(args, f"runs/mlp_replicated/{args.dataset}", (*GROWING, "memory", "device"))
    (out / "seeds").mkdir(exist_ok=True)

    def finished(seed):
        """Rows of the cells that were trained to the end."""
        path = out / "seeds" / f"{seed}.csv"
        try:
            rows = common.read_csv(path, text=()) if path.exists() else []
            ended = {cell_of(row) for row in rows if row["step"] == args.steps}
        except (ValueError, KeyError) as error:
            common.fail(f"argument --resume: {path} is damaged ({error}); delete it to have it worked out again")
        return [row for row in rows if cell_of(row) in ended]

    left_out = len(args.widths) * len(args.features) * len(args.noise) * len(args.dropout) - len(cells)
    missing = {}   # cells still to be trained -> the seeds that miss just these
    for seed in range(common.RANK, args.seeds, common.PROCESSES):
        done = {cell_of(row) for row in finished(seed)}
        missing.setdefault(tuple(cell for cell in cells if cell not in done), []).append(seed)
    missing.pop((), None)
    if common.RANK == 0 and left_out:
        print(f"{left_out} cells of the grid have more features than units and are left out; {len(cells)} remain")
    try:
        with tqdm(total=sum(len(cells) * len(seeds) for cells, seeds in missing.items()) * args.steps, unit="step",
                  smoothing=0.05, disable=None if common.RANK == 0 else True, unit_scale=True) as progress:
            for todo, seeds in missing.items():
                for some, units in rooms(todo, most // TILE * TILE):
                    at_once = max(1, most // units)
                    for i in range(0, len(seeds), at_once):
                        rows = train(some, units, seeds[i:i + at_once], data, args, progress.update)
                        for seed in seeds[i:i + at_once]:
                            common.write_csv(out / "seeds" / f"{seed}.csv",
                                             [*finished(seed), *(row for row in rows if row["seed"] == seed)])
    except KeyboardInterrupt:
        return common.interrupted(out)
    if not common.first_process():
        return 0
    wanted = set(cells)
    rows = sorted((row for seed in range(args.seeds) for row in finished(seed) if cell_of(row) in wanted),
                  key=lambda row: (*cell_of(row), row["seed"], row["step"]))
    common.write_csv(out / "metrics.csv", rows)
    common.write_json(out / "summary.json", summarise(common.read_csv(out / "metrics.csv", text=()), left_out))
    if args.tensorboard:
        common.log_to_tensorboard(out, (
            ("{}/N{}-K{}-noise{:g}-dropout{:g}/seed{}".format(key, *cell_of(row), row["seed"]), row[key], row["step"])
            for row in rows for key in ("distinct", "distinct_to_1e-3", "test_error")))
    report(out)
    print(f"\n{out}/: figure1.png, figure3.png, features.png, metrics.csv, summary.json, config.json, seeds/")
    diverged = sum(row["step"] == args.steps and row["test_error"] is None for row in rows)
    if diverged:
        print(f"mlp_replicated.py: {diverged} runs diverged and have no test error; try a smaller --lr (was {args.lr})",
              file=sys.stderr)
    return 3 if diverged else 0


if __name__ == "__main__":
    common.run(main)
