"""Length scales: how initialisation and architecture decide whether a deep network starts to train.

Hanin and Rolnick, "How to Start Training: The Effect of Initialization and Architecture" (NeurIPS 2018). M_l =
|act_l|^2 / n_l is the mean square length of layer l's n_l activations. Two failures: (FM1) the mean of M_l grows or
falls exponentially with depth, unless weights have variance 2 / fan-in; (FM2) its variance over the layers grows with
the sum of the reciprocals of the widths, whatever the weights. In residual networks f_l = f_(l-1) + eta_l g_l(f_(l-1))
the length grows with the sum of the scales eta. A network whose lengths are far off starts to train late or never.

    python length_scales.py                          # all four parts on the digits, about two minutes
    python length_scales.py --dataset mnist          # the paper's data
    python length_scales.py --parts lengths          # Figure 1a alone, no training: half a minute

Draws and seeds are batched. Every run writes config.json, metrics.csv (a row per part, setting, depth and quantity),
summary.json, and of the parts it has figure1.png, figure2.png and fm2.png.
Exit status: 0 done, 2 bad input, 130 interrupted (finished parts are kept).
"""

import itertools
import json
import math

import numpy as np
import torch
from torch.nn import functional as F

import common

INITS = ("he normal", "he uniform", "he normal truncated", "2x he normal", "xavier normal", "xavier uniform", "pytorch")
CUT = 2.0   # standard deviations at which the truncated normal ends, as Keras and PyTorch cut it
# The variance that is left of a standard normal between -CUT and CUT.
LEFT = 1 - CUT * math.sqrt(2 / math.pi) * math.exp(-CUT * CUT / 2) / math.erf(CUT / math.sqrt(2))
BASES = (1.0, 0.9, 0.75, 0.5)   # b of eta_l = b^l, Figure 2
TARGET = 20                     # test accuracy [%] that counts as having started
PARTS = ("lengths", "start", "variance", "residual")   # functions of these names, below
SMALL = dict(start_depths=[5, 10, 20, 40], seeds=5, cap=200, lr=0.05)
LARGE = dict(start_depths=[10, 20, 40, 70, 100], seeds=10, cap=1000, lr=0.01)
DEFAULTS = {dataset: SMALL if dataset == "digits" else LARGE for dataset in common.DATASETS}


# ---------------------------------------------------------------------------------------------------------- arguments


def parse_arguments(argv=None):
    parser = common.parser(__doc__)
    what = parser.add_argument_group("what is measured")
    what.add_argument("--parts", nargs="+", default=list(PARTS), metavar="PART",
                      help="lengths (Figure 1a), start (1b), variance (FM2), residual (2a and b); default: all")
    what.add_argument("--inits", nargs="+", default=list(INITS), metavar="INIT",
                      help=f"of {', '.join(repr(init) for init in INITS)}; default: all")
    what.add_argument("--depths", type=int, nargs="+", default=[5, 10, 20, 40, 70, 100], metavar="D",
                      help="layers, each as wide as the network is deep; default: 5 10 20 40 70 100; paper: to 100")
    what.add_argument("--start-depths", type=int, nargs="+", metavar="D",
                      help="the same for the networks that are trained (Figure 1b); default: 5 10 20 40 on digits, 10 "
                           "20 40 70 100 elsewhere; paper: to 100")
    what.add_argument("--draws", type=int, default=1000, metavar="N",
                      help="networks for every point of a length; default: 1000")
    what.add_argument("--modules", type=int, nargs="+", default=[1, 5, 10, 20, 30, 40], metavar="L",
                      help="residual modules of width 5; default: 1 5 10 20 30 40")

    how = parser.add_argument_group("training to the start")
    common.add_data(how, "paper: mnist; images are flattened and scaled to [0, 1]")
    how.add_argument("--seeds", type=int, metavar="COUNT",
                     help="networks trained for every point; default: 5 on digits, 10 elsewhere; paper: 100 for "
                          "residual networks")
    how.add_argument("--lr", type=float, metavar="RATE",
                     help="of plain SGD; default: 0.05 on digits, 0.01 elsewhere; paper: not given")
    how.add_argument("--batch-size", type=int, default=64, metavar="N", help="images; default: 64")
    how.add_argument("--cap", type=int, metavar="STEPS",
                     help=f"steps after which a network that has not reached {TARGET} %% test accuracy counts as "
                          "capped; default: 200 on digits, 1000 elsewhere")
    how.add_argument("--every", type=int, default=10, metavar="STEPS", help="steps between two tests; default: 10")
    how.add_argument("--seed", type=int, default=0, metavar="S", help="of all draws; default: 0")
    common.add_files(parser, "length_scales/DATASET", "finished settings are kept")
    args = parser.parse_args(argv)
    common.check_common(args, DEFAULTS)
    need = common.need
    for name, valid in (("parts", PARTS), ("inits", INITS)):
        values = getattr(args, name)
        need(set(values) <= set(valid) and len(set(values)) == len(values), f"--{name}", " ".join(values),
             f"different ones of {', '.join(map(repr, valid))}")
    common.at_least_1(args, "depths", "start_depths", "modules")
    common.at_least_1(args, "draws", "seeds", "cap", "every", "batch_size")
    need(math.isfinite(args.lr) and args.lr > 0, "--lr", args.lr, "finite and positive")
    return args


# ------------------------------------------------------------------------------------------------------ initialisation


def stream(args, *key):
    """Random numbers of its own for every setting, so that no draw depends on what else is measured."""
    return torch.Generator(args.device).manual_seed(common.seed_of(args.seed, *key))


def deviation(init, n_in, n_out):
    """Standard deviation of the weights before any truncation; of all initialisations but pytorch's."""
    # The slides have 1 / (n_in + n_out) for Xavier's normal weights and 2 / (n_in + n_out) for uniform ones. The first
    # is a slip: Glorot and Bengio's variance is the second, whatever the distribution.
    return math.sqrt(2 / (n_in + n_out) if init.startswith("xavier") else (4 if init.startswith("2x") else 2) / n_in)


def initial_layer(init, draws, n_in, n_out, generator):
    """(draws, n_out, n_in) weights and (draws, n_out, 1) biases of a layer; biases are 0 but for pytorch's default."""
    weight = torch.empty(draws, n_out, n_in, device=generator.device)
    bias = torch.zeros(draws, n_out, 1, device=generator.device)
    if init == "pytorch":   # nn.Linear.reset_parameters
        bound = n_in ** -0.5
        return weight.uniform_(-bound, bound, generator=generator), bias.uniform_(-bound, bound, generator=generator)
    scale = deviation(init, n_in, n_out)
    if init.endswith("uniform"):
        return weight.uniform_(-math.sqrt(3) * scale, math.sqrt(3) * scale, generator=generator), bias
    if init == "he normal truncated":   # the inverse of the distribution function
        edge = math.erf(CUT / math.sqrt(2))
        return weight.uniform_(-edge, edge, generator=generator).erfinv_().mul_(math.sqrt(2) * scale), bias
    return weight.normal_(0, scale, generator=generator), bias


def expected_length(init, widths):
    """[E M_0 = 1, E M_1, ...] of a ReLU network with these widths (the input's first), exactly: symmetric weights make
    E relu(z)^2 = E z^2 / 2, and E z^2 = n_in Var(w) M + Var(b)."""
    lengths = [1.0]
    for n_in, n_out in itertools.pairwise(widths):
        if init == "pytorch":
            lengths.append(lengths[-1] / 6 + 1 / (6 * n_in))
            continue
        factor = {"he normal truncated": LEFT, "2x he normal": 2.0}.get(init, 1.0)
        lengths.append(lengths[-1] * factor * (n_in / (n_in + n_out) if init.startswith("xavier") else 1.0))
    return lengths


@torch.no_grad()
def lengths(init, widths, draws, generator):
    """(draws, layers) lengths M_1 ... M_d, from an input with M_0 = 1.

    Normal weights of variance v give outputs that are, whatever the input x, independent and normal with variance
    v |x|^2: these are drawn instead, the same distribution from n numbers in place of n^2.
    """
    act = torch.ones(draws, widths[0], 1, device=generator.device)
    found = []
    for n_in, n_out in itertools.pairwise(widths):
        if init.endswith(" normal"):
            z = torch.empty(draws, n_out, 1, device=act.device).normal_(generator=generator)
            act = torch.relu(z * deviation(init, n_in, n_out) * act.norm(dim=1, keepdim=True))
        else:
            w, b = initial_layer(init, draws, n_in, n_out, generator)
            act = torch.relu(torch.baddbmm(b, w, act))
        found.append(act.square().mean((1, 2)))
    return torch.stack(found, 1)


# ------------------------------------------------------------------------------------------------------------- training


def steps_to_start(parameters, forward, data, args, generator):
    """Trains all seeds together; returns for each the first tested step with TARGET % test accuracy, or None.

    forward(parameters, x) maps (1 or seeds, inputs, images) to (seeds, classes, images); a seed has its own batches.
    """
    images, labels, test_images, test_labels, _ = data
    seeds, scale = parameters[0].shape[0], 1 / common.brightest(images)
    parameters = [p.requires_grad_() for p in parameters]
    test = (test_images[:1000] * scale).t()[None]   # enough to tell 20 % from 10 %
    started = [None] * seeds
    for step in range(args.cap + 1):
        if step % args.every == 0 or step == args.cap:
            with torch.no_grad():
                scores = forward(parameters, test)   # the largest of NaNs would be the first, a guess of class 0
                right = (scores.isfinite().all(1) & (scores.argmax(1) == test_labels[:1000])).double().mean(1) * 100
            started = [step if seen is None and accuracy >= TARGET else seen
                       for seen, accuracy in zip(started, right.tolist(), strict=True)]
            if None not in started:
                break
        index = torch.randint(len(images), (seeds, args.batch_size), generator=generator, device=images.device)
        loss = F.cross_entropy(forward(parameters, (images[index] * scale).transpose(1, 2)), labels[index],
                               reduction="none").mean(1).sum()   # the seeds' gradients do not mix
        gradients = torch.autograd.grad(loss, parameters)
        with torch.no_grad():
            for p, g in zip(parameters, gradients, strict=True):
                p -= args.lr * g
    return started


def fully_connected(init, widths, inputs, classes, seeds, generator):
    """Parameters (seeds, ...) of a ReLU network with these hidden widths, and its forward pass."""
    sizes, parameters = [inputs, *widths, classes], []
    for n_in, n_out in itertools.pairwise(sizes):
        parameters += initial_layer(init, seeds, n_in, n_out, generator)

    def forward(parameters, act):
        for i in range(0, len(parameters), 2):
            act = parameters[i] @ act + parameters[i + 1]
            act = act.relu() if i + 2 < len(parameters) else act
        return act

    return parameters, forward


def residual(base, modules, inputs, classes, seeds, generator, width=5):
    """The same for a He-initialised network f_l = f_(l-1) + b^l relu(W_l f_(l-1)) between a linear layer with a ReLU,
    f_0, and a linear layer."""
    sizes = [(inputs, width), *[(width, width)] * modules, (width, classes)]
    parameters = [initial_layer("he normal", seeds, *size, generator)[0] for size in sizes]

    def forward(parameters, x):
        f = (parameters[0] @ x).relu()
        for module, w in enumerate(parameters[1:-1], start=1):
            f = f + base ** module * (w @ f).relu()
        return parameters[-1] @ f

    return parameters, forward


# ------------------------------------------------------------------------------------------------------------ the parts


def mean_row(part, setting, depth, quantity, values, theory=None, x=None):
    """Mean of values and the central 95 % of them; `x` is what the figure draws it over, depth unless given."""
    values = np.asarray(values, dtype=float)
    return {"part": part, "setting": setting, "depth": depth, "x": depth if x is None else x, "quantity": quantity,
            "n": len(values), "mean": float(values.mean()), "low": float(np.percentile(values, 2.5)),
            "high": float(np.percentile(values, 97.5)), "theory": theory, "capped": None,
            "standard_error": float(values.std(ddof=1)) / math.sqrt(len(values)) if len(values) > 1 else None}


def start_row(part, setting, depth, started, args, data, x=None):
    """Mean epochs to TARGET %; networks that did not get there count with the cap, and are counted."""
    epochs = [(args.cap if step is None else step) * args.batch_size / len(data[0]) for step in started]
    row = mean_row(part, setting, depth, "epochs to 20 %", epochs, x=x)
    return {**row, "capped": sum(step is None for step in started)}


def part_lengths(args, data):
    """Figure 1a: M_d over the depth d, width equal to depth."""
    def rows(generator, init, depth):
        widths = [depth] * (depth + 1)
        found, at_once = [], max(1, 2_000_000 // depth ** 2)   # 8 MB of weights at a time
        for first in range(0, args.draws, at_once):
            found.append(lengths(init, widths, min(at_once, args.draws - first), generator)[:, -1])
        return [mean_row("lengths", init, depth, "M_d", torch.cat(found).cpu(), expected_length(init, widths)[-1])]

    return [(init, depth, rows) for init in args.inits for depth in args.depths]


def part_start(args, data):
    """Figure 1b: epochs until training has started, width equal to depth."""
    def rows(generator, init, depth):
        network = fully_connected(init, [depth] * depth, data[0].shape[1], data[4], args.seeds, generator)
        return [start_row("start", init, depth, steps_to_start(*network, data, args, generator), args, data)]

    return [(init, depth, rows) for init in args.inits for depth in args.start_depths]


def architectures(depth):
    """Hidden widths of FM2's networks, by name: of equal depth, with different sums of reciprocals."""
    widths = {f"constant {n}": [n] * depth for n in (5, 10, 20, 40, 80)}
    for low, high in ((5, 80), (10, 40)):
        widths[f"alternating {low}, {high}"] = [low if layer % 2 else high for layer in range(depth)]
        widths[f"widening {low} to {high}"] = np.linspace(low, high, depth).round().astype(int).tolist()
    return widths


def part_variance(args, data):
    """FM2: variance over the layers of M_1 ... M_d against the sum of 1 / n_l, He normal, and the time to start."""
    def rows(generator, name, depth):
        widths = architectures(depth)[name]
        reciprocals = sum(1 / n for n in widths)
        found = lengths("he normal", [widths[0], *widths], args.draws, generator).double().cpu()
        # A layer multiplies the length by 2 mean(relu(g)^2), g standard normal, which has mean 1 and variance 5 / n_l.
        # So E M_l M_m is the product of 1 + 5 / n over the layers up to the lower of the two. (Where the sum of 1 / n
        # passes about 1/2 this mean comes from networks too rare to be among the draws: theirs falls short of it.)
        second = np.cumprod([1 + 5 / n for n in widths])
        theory = second.mean() - second[np.minimum.outer(np.arange(depth), np.arange(depth))].mean()
        network = fully_connected("he normal", widths, data[0].shape[1], data[4], args.seeds, generator)
        return [mean_row("variance", name, depth, "variance over layers", found.var(1, unbiased=False), theory,
                         x=reciprocals),
                start_row("variance", name, depth, steps_to_start(*network, data, args, generator), args, data,
                          x=reciprocals)]

    return [(name, 30, rows) for name in architectures(30)]


def part_residual(args, data):
    """Figure 2: growth of |f_L|^2 with the sum of the scales, and the time to start."""
    def rows(generator, setting, modules):
        base = float(setting.removeprefix("b = "))
        scales = [base ** module for module in range(1, modules + 1)]
        f = torch.rand(args.draws, 5, 1, generator=generator, device=args.device)   # not negative, as pixels
        f /= f.norm(dim=1, keepdim=True)
        for eta in scales:
            f = f + eta * torch.relu(initial_layer("he normal", args.draws, 5, 5, generator)[0] @ f)
        network = residual(base, modules, data[0].shape[1], data[4], args.seeds, generator)
        # E |f + eta g(f)|^2 = |f|^2 (1 + 2 eta c / sqrt(pi) + eta^2), c the mean of f in units of |f| / sqrt(n), which
        # lies in [0, 1] as no activation is negative. The bounds are products over the modules.
        return [{**mean_row("residual", setting, modules, "|f_L|^2", f.square().sum((1, 2)).cpu(), x=sum(scales)),
                 "bound_low": math.prod(1 + eta * eta for eta in scales),
                 "bound_high": math.prod(1 + 2 * eta / math.sqrt(math.pi) + eta * eta for eta in scales)},
                start_row("residual", setting, modules, steps_to_start(*network, data, args, generator), args, data,
                          x=sum(scales))]

    return [(f"b = {base:g}", modules, rows) for base in BASES for modules in args.modules]


# ------------------------------------------------------------------------------------------------------------- results


def read_rows(directory):
    return common.read_csv(directory / "metrics.csv", text=("part", "setting", "quantity"))


def draw_figures(rows, directory):
    plt = common.plot_style()

    def panels(name, parts):
        parts = [(part, quantity, draw) for part, quantity, draw in parts
                 if any(row["part"] == part and row["quantity"] == quantity for row in rows)]
        if not parts:
            return (directory / name).unlink(missing_ok=True)   # of a run that had them
        figure, axes = plt.subplots(1, len(parts), figsize=(1.3 + 5 * len(parts), 3.8), squeeze=False,
                                    layout="constrained")
        for axis, (part, quantity, draw) in zip(axes[0], parts, strict=True):
            mine = [row for row in rows if row["part"] == part and row["quantity"] == quantity]
            for which, setting in enumerate(dict.fromkeys(row["setting"] for row in mine)):
                draw(axis, sorted((row for row in mine if row["setting"] == setting), key=lambda row: row["x"]),
                     {"color": f"C{which}", "label": setting, "marker": "."})
            if mine[0]["capped"] is not None:
                networks, capped = (sum(row[key] for row in mine) for key in ("n", "capped"))
                axis.set_title(f"{networks - capped:.0f} of {networks:.0f} networks started", fontsize=9)
                # From 0, else the panel magnifies one network where all others are capped.
                axis.set_ylim(0, 1.05 * max(row["high"] for row in mine) or 1)
        figure.legend(*axes[0][0].get_legend_handles_labels(), fontsize=7, loc="outside right upper")
        common.save_figure(figure, directory / name)

    def column(rows, key):
        return [row[key] for row in rows]

    def measured(axis, rows, style, ylabel, xlabel, theory):
        axis.plot(column(rows, "x"), column(rows, "mean"), **style)
        axis.fill_between(column(rows, "x"), column(rows, "low"), column(rows, "high"), color=style["color"],
                          alpha=0.12)
        for key in theory:
            axis.plot(column(rows, "x"), column(rows, key), color=style["color"], linestyle=":", linewidth=1)
        axis.set(yscale="log", xlabel=xlabel, ylabel=ylabel)

    def length(axis, rows, style):
        measured(axis, rows, style, "M_d (dotted: exact mean; shade: 95 % of networks)", "depth d = width", ["theory"])
        axis.set_ylim(1e-12, 1e12)

    def growth(axis, rows, style):
        measured(axis, rows, style, "|f_L|² (dotted: bounds of its mean)", "sum of the scales",
                 ["bound_low", "bound_high"])

    def variance(axis, rows, style):
        measured(axis, rows, {**style, "linestyle": "none"}, "variance of M over the layers (x: exact mean)",
                 "sum of 1 / width", [])
        axis.plot(column(rows, "x"), column(rows, "theory"), "x", color=style["color"])

    def start(xlabel):
        def draw(axis, rows, style):
            below, above = ([abs(row[end] - row["mean"]) for row in rows] for end in ("low", "high"))
            axis.errorbar(column(rows, "x"), column(rows, "mean"), yerr=[below, above], capsize=2, linewidth=1, **style)
            capped = [row for row in rows if row["capped"]]
            axis.plot(column(capped, "x"), column(capped, "mean"), "o", markerfacecolor="none", color=style["color"])
            axis.set(xlabel=xlabel, ylabel=f"epochs to {TARGET} % test accuracy (ring: some capped)")
        return draw

    panels("figure1.png", [("lengths", "M_d", length), ("start", "epochs to 20 %", start("depth = width"))])
    panels("figure2.png", [("residual", "|f_L|^2", growth),
                           ("residual", "epochs to 20 %", start("sum of the scales"))])
    panels("fm2.png", [("variance", "variance over layers", variance),
                       ("variance", "epochs to 20 %", start("sum of 1 / width"))])


def correlation(rows, part, quantity, key):
    """Spearman's rank correlation between a column and the mean, over the part's settings, or None."""
    mine = [row for row in rows if row["part"] == part and row["quantity"] == quantity]
    if len(mine) < 3:
        return None
    x, y = (np.array([row[k] for row in mine]) for k in (key, "mean"))
    ranks = [(v[:, None] > v[None, :]).sum(1) + (v[:, None] == v[None, :]).sum(1) / 2 for v in (x, y)]
    return float(np.corrcoef(*ranks)[0, 1]) if min(np.ptp(rank) for rank in ranks) else None


def summarise(rows):
    exact = [row for row in rows if row["theory"] is not None and row["standard_error"]   # not 0: float32 ended there
             and math.isfinite(row["standard_error"])]
    return {
        "means_within_4_standard_errors_of_theory": [
            sum(abs(row["mean"] - row["theory"]) <= 4 * row["standard_error"] for row in exact),
            len(exact)],
        "residual_means_between_the_bounds": [
            sum(row["bound_low"] <= row["mean"] <= row["bound_high"] for row in rows if row.get("bound_low")),
            sum(bool(row.get("bound_low")) for row in rows)],
        "rank_correlation": {
            "variance over layers, sum of 1 / width": correlation(rows, "variance", "variance over layers", "x"),
            "epochs to 20 %, sum of 1 / width": correlation(rows, "variance", "epochs to 20 %", "x"),
            "|f_L|^2, sum of the scales": correlation(rows, "residual", "|f_L|^2", "x"),
            "epochs to 20 % of residual networks, sum of the scales":
                correlation(rows, "residual", "epochs to 20 %", "x"),
        }}


def report(directory):
    """Figures and table of a run from its files, so that they can be had again at any time."""
    rows, summary = read_rows(directory), json.loads((directory / "summary.json").read_text())
    draw_figures(rows, directory)
    for part, quantity in dict.fromkeys((row["part"], row["quantity"]) for row in rows):
        mine = [row for row in rows if (row["part"], row["quantity"]) == (part, quantity)]
        print(f"\n{part}: {quantity}\n{'':<22}{'depth':>6}{'mean':>12}{'95 % from':>12}{'to':>12}"
              f"{'exact mean':>12}{'capped':>12}")
        for row in mine:
            theory = "" if row["theory"] is None else f"{row['theory']:.4g}"
            capped = "" if row["capped"] is None else f"{row['capped']:.0f} of {row['n']:.0f}"
            print(f"{row['setting']:<22}{row['depth']:>6.0f}{row['mean']:>12.4g}{row['low']:>12.4g}{row['high']:>12.4g}"
                  f"{theory:>12}{capped:>12}")
    print("\n" + json.dumps(summary, indent=1))


def main(argv=None):
    args = parse_arguments(argv)
    if args.plot_only is not None:
        with common.finished_run(args.plot_only) as directory:
            return report(directory)
    *tensors, classes = common.load_data(args.dataset, args.data_dir, args.image_size)
    data = [tensor.flatten(1).to(args.device) if tensor.ndim > 1 else tensor.to(args.device) for tensor in tensors]
    data += [classes]
    largest = 100 * data[3][:1000].bincount().max().item() / len(data[3][:1000])
    common.need(largest < TARGET or args.parts == ["lengths"], "--dataset",
                f"{args.dataset}, whose largest class has {largest:.3g} % of the images that are tested,",
                f"of classes of less than {TARGET} %: a guess would count as a start")
    out = common.start_run(args, f"runs/length_scales/{args.dataset}", ("parts", "inits", "depths", "start_depths",
                                                                        "modules", "device"))
    pieces = {f"{part}, {setting}, {depth}": (part, setting, depth, measure)
              for part in args.parts for setting, depth, measure in globals()[f"part_{part}"](args, data)}

    def piece(part, setting, depth, measure):
        return measure(stream(args, part, setting, depth), setting, depth)

    try:
        done = common.work(pieces, piece, out, 1 if args.device.startswith("cuda") else torch.get_num_threads())
    except KeyboardInterrupt:
        return common.interrupted(out)
    if not common.first_process():
        return 0
    common.write_csv(out / "metrics.csv", [row for rows in done.values() for row in rows])
    rows = read_rows(out)
    common.write_json(out / "summary.json", summarise(rows))
    if args.tensorboard:
        common.log_to_tensorboard(out, ((f"{row['part']}/{row['quantity']}/{row['setting']}", row["mean"], row["depth"])
                                        for row in rows))
    report(out)
    print(f"\n{out}/: " + ", ".join(sorted(path.name for path in out.glob("*.png")))
          + ", metrics.csv, summary.json, config.json")
    return 0


if __name__ == "__main__":
    common.run(main)
