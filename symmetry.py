"""How long until symmetry breaks, as a function of the size of the noise?

A network whose channels all start equal (constnet.py's, in small) learns one feature until some noise parts the
channels. Here the noise is varied: additions in an order drawn for every weight, over G partial sums; one bit of one
weight's gradient, flipped once; Gaussian noise of 2^-20 to 1 ulp of every weight's gradient; stochastic rounding;
dropout; hardware order (racing threads), and hardware order recorded, and checked to repeat on replay. All else is
equal: the weights at the start, and for one seed the batches. How far the channels are apart is the spread,
||W - mean over output channels|| / ||W||, of the convolution where it is largest. From how far the first noise parts
them it grows about exponentially; at 1 % the symmetry counts as broken. (Noise well below an ulp moves few weights, by
an ulp each, so that the first spread goes about with the noise's square root, not with its size.)

    python symmetry.py                     # digits, one seed: three minutes of a core, shared out over the cores
    python symmetry.py --seeds 10          # with intervals, as in results/symmetry
    python symmetry.py --parts noise       # the noises alone; layers: order noise in one layer; windows: at few steps

Every run writes config.json, metrics.csv (a row per part, arm, seed and step), layers.csv (the spread of every
convolution when a run ends), summary.json, spread.png, broken.png and layers.png. Runs end where the spread passes 3 %:
nothing is left to measure.
Exit status: 0 done, 2 bad input, 3 diverged (the metrics are kept), 130 interrupted (finished runs are kept).
"""

import itertools
import json
import math
import sys
import tempfile
import threading

import numpy as np
import ordered_reduce
import torch
from torch import nn
from torch.nn import functional as F

import common

PARTS = ("noise", "layers", "windows")
SPLITS = 8            # partial sums of arms that are not about their number
BROKEN, END = 1e-2, 3e-2   # spread at which symmetry counts as broken, at which a run ends
FIT = (3.0, 1e-3)     # the rate is fitted from this multiple of the first spread to this spread
LEAP = 10.0           # growth in one step at which a fit ends
POINTS = 5            # fewest steps for a fit
SEEDED, HARDWARE, RECORDED = (f"{kind}, G = {SPLITS}" for kind in ("order", "hardware order", "recorded order"))
RECORDING = threading.Lock()   # a process has one tape


# ---------------------------------------------------------------------------------------------------------- arguments


def parse_arguments(argv=None):
    parser = common.parser(__doc__)
    what = parser.add_argument_group("noise")
    what.add_argument("--parts", nargs="+", default=list(PARTS), metavar="PART",
                      help="noise (all arms below, in all layers and steps), layers (order noise in one layer alone), "
                           "windows (order noise at few steps); default: all")
    what.add_argument("--splits", type=int, nargs="+", default=[2, 3, 8, 64], metavar="G",
                      help="partial sums added in random order; 2 makes no noise; default: 2 3 8 64")
    what.add_argument("--gaussian", type=int, nargs="+", default=[-20, -15, -10, -5, 0], metavar="E",
                      help="Gaussian noise with a standard deviation of 2^E ulp of the gradient; default: -20 -15 -10 "
                           "-5 0")
    what.add_argument("--bit-steps", type=int, nargs="+", default=[1, 20], metavar="STEP",
                      help="the last bit of one weight's gradient is flipped at this step (counted from 0) and never "
                           "again; default: 1 20")
    what.add_argument("--bit-layer", default="stages.1.0.conv", metavar="LAYER",
                      help="whose weight; default: stages.1.0.conv")
    what.add_argument("--dropout", type=float, nargs="+", default=[0.01], metavar="P",
                      help="probability with which inputs of the blocks' convolutions are dropped; default: 0.01")
    what.add_argument("--windows", nargs="+", default=["0:1", "1:2", "5:6", "20:21", "40:41"], metavar="A:B",
                      help=f"steps A <= step < B with order noise (G = {SPLITS}), in fixed order before and after; "
                           "default: 0:1 1:2 5:6 20:21 40:41")

    how = parser.add_argument_group("training: SGD with momentum 0.9 and weight decay 5e-4 at a constant rate")
    common.add_data(how, "not from a paper")
    how.add_argument("--blocks", type=int, default=6, metavar="N",
                     help="residual blocks of one convolution, a multiple of 3: they make 3 stages of 16, 32 and 64 "
                          "channels; default: 6")
    how.add_argument("--seeds", type=int, default=1, metavar="COUNT",
                     help="of batches and noise, the same for every arm; default: 1")
    how.add_argument("--steps", type=int, default=200, metavar="N", help="at most; default: 200")
    how.add_argument("--batch-size", type=int, default=64, metavar="N", help="images; default: 64")
    how.add_argument("--lr", type=float, default=0.2, metavar="RATE", help="default: 0.2")
    common.add_files(parser, "symmetry/DATASET", "finished runs are kept")
    args = parser.parse_args(argv)
    common.check_common(args, cuda=ordered_reduce.cuda_built())
    need = common.need
    need(set(args.parts) <= set(PARTS), "--parts", " ".join(args.parts), f"of {', '.join(PARTS)}")
    common.at_least_1(args, "splits", "seeds", "steps", "batch_size")
    need(args.batch_size >= SPLITS, "--batch-size", args.batch_size, f"at least {SPLITS}: a group needs a sample")
    need(max(args.splits) <= args.batch_size or "noise" not in args.parts, "--splits", args.splits,
         f"at most the batch size, {args.batch_size}: a group needs a sample")
    need(min(args.gaussian) >= -30 and max(args.gaussian) <= 20, "--gaussian", args.gaussian, "exponents in [-30, 20]")
    need(min(args.bit_steps) >= 0, "--bit-steps", args.bit_steps, "at least 0")
    need(all(0 <= p < 1 for p in args.dropout), "--dropout", args.dropout, "in [0, 1)")
    need(args.blocks >= 3 and args.blocks % 3 == 0, "--blocks", args.blocks, "a positive multiple of 3")
    need(0 < args.lr <= torch.finfo(torch.float32).max, "--lr", args.lr, "positive, and finite in float32")
    for name in ("splits", "gaussian", "bit_steps", "dropout", "windows"):
        values = [f"{value:g}" if name == "dropout" else value for value in getattr(args, name)]   # arms' names
        need(len(set(values)) == len(values), f"--{name}", " ".join(map(str, values)), "different values")
    for window in args.windows:
        a, _, b = window.partition(":")
        need(a.isdecimal() and b.isdecimal() and int(a) < int(b), "--windows", window, "A:B with 0 <= A < B")
    names = layer_names(args.blocks)
    need(args.bit_layer in names, "--bit-layer", args.bit_layer, f"one of {', '.join(names)}")
    return args


def arms(args):
    """(part, arm, probability of dropout, what is given to ordered_reduce.convert) of every arm."""
    if "noise" in args.parts:
        for splits in args.splits:
            yield "noise", f"order, G = {splits}", 0, dict(order="shuffled", splits=splits)
        yield "noise", HARDWARE, 0, dict(order="atomic")
        yield "noise", RECORDED, 0, dict(order="arrival")
        yield "noise", "stochastic rounding", 0, dict(noise="stochastic")
        for exponent in args.gaussian:
            yield "noise", f"Gaussian, 2^{exponent} ulp", 0, dict(noise="gaussian", ulps=2.0 ** exponent)
        for step in args.bit_steps:
            yield "noise", f"one bit at step {step}", 0, dict(noise="flip", layers=args.bit_layer,
                                                              steps=(step, step + 1))
        for p in args.dropout:
            yield "noise", f"dropout {p:g}", p, {}
    if "layers" in args.parts:
        for layer in layer_names(args.blocks):
            yield "layers", layer, 0, dict(order="shuffled", layers=layer)
    if "windows" in args.parts:
        for window in args.windows:
            yield "windows", window, 0, dict(order="shuffled", steps=tuple(map(int, window.split(":"))))


# -------------------------------------------------------------------------------------------------------------- model


class Block(nn.Module):
    """x -> shortcut(x) + conv(dropout(relu(bn(x)))); a 1x1 shortcut, where the width changes, is applied to bn(x)."""

    def __init__(self, channels_in, channels, stride):
        super().__init__()
        self.bn = nn.BatchNorm2d(channels_in)
        self.conv = nn.Conv2d(channels_in, channels, 3, stride, padding=1, bias=False)
        self.shortcut = nn.Conv2d(channels_in, channels, 1, stride, bias=False) if stride > 1 else None
        self.relu = nn.ReLU()

    def forward(self, x, dropout):
        normal = self.bn(x)
        return (x if self.shortcut is None else self.shortcut(normal)) + self.conv(dropout(self.relu(normal)))


class Constnet(nn.Module):
    """constnet.py's at width 1: every residual convolution and the head 0, all else the mean of its inputs."""

    def __init__(self, channels, classes, blocks):
        super().__init__()
        self.stem = nn.Conv2d(channels, 16, 3, padding=1, bias=False)
        self.stages = nn.ModuleList(nn.ModuleList(
            Block(16 << max(0, stage - (block == 0)), 16 << stage, 2 if stage and block == 0 else 1)
            for block in range(blocks // 3)) for stage in range(3))
        self.relu = nn.ReLU()
        self.head = nn.Linear(64, classes)
        with torch.no_grad():
            for parameter in (*self.stem.parameters(), *self.head.parameters()):
                parameter.zero_()
            self.stem.weight[:, :, 1, 1] = 1 / channels
            for block in (block for stage in self.stages for block in stage):
                block.conv.weight.zero_()
                if block.shortcut is not None:
                    block.shortcut.weight.fill_(1 / block.shortcut.weight.shape[1])

    def forward(self, x, dropout=lambda x: x):
        x = self.stem(x)
        for stage in self.stages:
            for block in stage:
                x = block(x, dropout)
        return self.head(self.relu(x).mean((2, 3)))


def layer_names(blocks):
    return [name for name, module in Constnet(1, 1, blocks).named_modules()
            if isinstance(module, (nn.Conv2d, nn.Linear))]


# ------------------------------------------------------------------------------------------------------------ training


def spread(weight):
    """||W - mean over output channels|| / ||W||; 0 where W is 0. In float64, where the mean of equal float32 values is
    that value, so that equal channels have a spread of exactly 0."""
    filters = weight.detach().double().flatten(1)
    return (filters - filters.mean(0)).norm() / filters.norm().clamp(min=1e-300)


def train(args, data, seed, p, convert):
    """([step, largest spread of a convolution, loss before the step, mixed] from step 1 to the end of the run;
    {convolution: its spread then}). mixed: how many inputs of ReLUs, in all images and places of the step's batch, are
    positive in some channels and not in others."""
    images, labels, _, _, classes = data
    pixels = images.double()
    mean, std = float(pixels.mean()), float(pixels.std())
    model = Constnet(images.shape[1], classes, args.blocks).to(images.device)
    ordered_reduce.convert(model, splits=SPLITS)
    policy = ordered_reduce.convert(model, **{"splits": SPLITS, "seed": seed, **convert})
    optimizer = torch.optim.SGD(model.parameters(), lr=args.lr, momentum=0.9, weight_decay=5e-4)
    weights = {name: module.weight for name, module in model.named_modules() if isinstance(module, nn.Conv2d)}
    batches, masks = torch.Generator().manual_seed(common.seed_of(seed, "batches")), torch.Generator().manual_seed(seed)

    def dropout(x):   # from a generator of its own: runs in other threads do not disturb it
        return x * (torch.rand(x.shape, generator=masks) >= p).to(x.device) / (1 - p) if p else x

    mixed = []

    def count_mixed(relu, inputs):
        positive = inputs[0] > 0
        mixed.append((positive.any(1) & ~positive.all(1)).sum())

    for module in model.modules():
        if isinstance(module, nn.ReLU):
            module.register_forward_pre_hook(count_mixed)

    rows, order, per_epoch = [], None, len(labels) // args.batch_size
    for step in range(args.steps):
        if step % per_epoch == 0:
            order = torch.randperm(len(labels), generator=batches).to(images.device)
        chosen = order[step % per_epoch * args.batch_size:][:args.batch_size]
        loss = F.cross_entropy(model((images[chosen] - mean) / std, dropout), labels[chosen])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        policy.step()
        spreads, loss = torch.stack([*map(spread, weights.values())]), loss.item()
        largest = spreads.max().item()
        rows.append([step + 1, largest, loss, torch.stack(mixed).sum().item()])
        mixed.clear()
        if not (math.isfinite(loss) and largest <= END):   # a spread of infinite weights is NaN
            break
    return rows, dict(zip(weights, spreads.tolist(), strict=True))


def one_run(args, data, seed, p, convert):
    """train with one thread, so that runs share the cores; racing takes two. What was recorded is replayed with one."""
    run, order = (args, data, seed, p, convert), convert.get("order")
    torch.set_num_threads(2 if order in ("atomic", "arrival") else 1)
    try:
        if order != "arrival":
            return train(*run)
        with RECORDING, tempfile.TemporaryDirectory() as folder:
            with ordered_reduce.record(f"{folder}/tape"):
                found = train(*run)
            torch.set_num_threads(1)
            with ordered_reduce.replay(f"{folder}/tape"):
                if repr(train(*run)) != repr(found):   # as text, in which NaN equals NaN
                    common.fail(f"argument --image-size: the replay of {RECORDED}, seed {seed}, is another run, as at "
                                "this size PyTorch has other bits on one thread than on two; try another size")
            return found
    finally:
        torch.set_num_threads(1)


# ------------------------------------------------------------------------------------------------------------- results


def growth(steps, spreads):
    """What one run tells: first_step and first_spread (not 0), rate [1 / step] and r2 of the straight line through
    (step, ln spread) over the steps from fit_from to fit_to, passed (the first step above BROKEN), and predicted, the
    step where exponential growth at that rate from the first spread on gets there. None where there is no such thing.

    The fit takes the steps after the last spread below FIT[0] times the first one, up to the first above FIT[1], or up
    to a leap: a step on the way, its first and its last included, that multiplies the spread by more than LEAP. There a
    ReLU's input, all but equal in the channels, has changed its sign in some of them alone; or, where next to no weight
    had moved before, others follow. At a leap to begin with there is no fit.
    """
    steps, spreads = np.asarray(steps), np.asarray(spreads)
    found = dict.fromkeys(["first_step", "first_spread", "rate", "r2", "fit_from", "fit_to", "leap", "passed",
                           "predicted"])
    broken = np.flatnonzero(spreads)
    if not len(broken):
        return found
    first = broken[0]
    found.update(first_step=int(steps[first]), first_spread=float(spreads[first]))
    found["passed"] = next((int(step) for step, value in zip(steps, spreads, strict=True) if value > BROKEN), None)
    end = next(iter(np.flatnonzero(spreads > FIT[1])), len(spreads))
    start = max([first, *np.flatnonzero(spreads[:end] < FIT[0] * spreads[first])]) + 1
    leap = next((i for i in range(start, min(end + 1, len(spreads))) if spreads[i] > LEAP * spreads[i - 1] > 0), None)
    if leap:
        found["leap"], end = int(steps[leap]), leap
    x, y = steps[start:end], np.log(spreads[start:end])
    if len(y) < POINTS or not np.ptp(y):
        return found
    rate, at_0 = np.polyfit(x, y, 1)
    found.update(rate=float(rate), r2=float(1 - (y - at_0 - rate * x).var() / y.var()), fit_from=int(x[0]),
                 fit_to=int(x[-1]))
    if rate > 0:
        found["predicted"] = found["first_step"] + math.log(BROKEN / found["first_spread"]) / float(rate)
    return found


def law(summary):
    """Is the time set by the first spread alone? Over the noises of one seed, a straight line through (ln(BROKEN /
    first spread), steps from the first spread to BROKEN): the interval over the seeds of its slope, in steps, its
    inverse, a rate, and each R^2. The slopes are averaged, not the rates, whose mean one slope near 0 would make. A
    noise that did not get to BROKEN is not in it, which leaves out the slowest."""
    slopes, fits = [], []
    for seed in sorted({seed for arm in summary for seed in arm["runs"]}):
        runs = [arm["runs"][seed] for arm in summary if arm["part"] == "noise" and seed in arm["runs"]]
        runs = [run for run in runs if run["passed"]]
        if len(runs) > 2:
            x = np.log([BROKEN / run["first_spread"] for run in runs])
            y = np.array([run["passed"] - run["first_step"] for run in runs])
            slope, at_0 = np.polyfit(x, y, 1)
            slopes.append(float(slope))
            fits.append(float(1 - (y - at_0 - slope * x).var() / y.var()) if np.ptp(y) else 0.0)
    steps = common.interval(slopes)
    rate = [1 / value if value and value > 0 else None for value in (steps[0], steps[2], steps[1])]
    return {"steps": steps, "rate": rate, "r2": fits}


def differences(summary):
    """{arm: intervals over the seeds of what its rate and passed have more than SEEDED's in the same seed}."""
    seeded = next((arm["runs"] for arm in summary if arm["arm"] == SEEDED), {})
    return {arm["arm"]: {key: common.interval([run[key] - seeded[seed][key] for seed, run in arm["runs"].items()
                                        if seed in seeded and None not in (run[key], seeded[seed][key])])
                         for key in ("rate", "passed")} for arm in summary if arm["part"] == "noise"}


def leaps(rows):
    """Do leaps come from ReLUs that are on in some channels alone? {decade of the spread before a step: [steps, leaps
    among them] with such a ReLU (mixed) and without (alike)}, up to FIT[1]."""
    found = {}
    for before, row in itertools.pairwise(rows):
        if row["step"] == before["step"] + 1 and 0 < before["spread"] <= FIT[1]:
            decade = found.setdefault(math.floor(math.log10(before["spread"])), {"mixed": [0, 0], "alike": [0, 0]})
            which = decade["mixed" if row["mixed"] else "alike"]
            which[0] += 1
            which[1] += row["spread"] > LEAP * before["spread"]
    return {f"1e{decade}": found[decade] for decade in sorted(found)}


def geometric(values):
    """common.interval of the geometric mean; values of 0 are left out."""
    return [math.exp(value) if value is not None else None
            for value in common.interval([math.log(value) for value in values if value])]


def summarise(rows, ends):
    """An object per part and arm: what `growth` finds in each seed, intervals over the seeds, and by layer in how many
    seeds its channels were apart when the run ended, and how far; then comparisons."""
    runs, layers = {}, [key for key in ends[0] if key not in ("part", "arm", "seed")]
    for row in rows:
        runs.setdefault((row["part"], row["arm"]), {}).setdefault(row["seed"], []).append(row)
    summary = []
    for (part, arm), seeds in runs.items():
        found = {seed: growth([row["step"] for row in mine], [row["spread"] for row in mine])
                 for seed, mine in seeds.items()}
        both = [run for run in found.values() if run["passed"] and run["predicted"]]
        last = [end for end in ends if (end["part"], end["arm"]) == (part, arm)]
        summary.append({
            "part": part, "arm": arm, "seeds": len(found),
            "parted": sum(run["first_step"] is not None for run in found.values()),
            "broken": sum(run["passed"] is not None for run in found.values()),
            "leaps": sum(run["leap"] is not None for run in found.values()),
            "first_spread": geometric([run["first_spread"] for run in found.values()]),
            **{key: common.interval([run[key] for run in found.values()]) for key in ("rate", "r2", "passed")},
            "predicted": common.interval([run["predicted"] for run in both]),
            "predicted_minus_passed": common.interval([run["predicted"] - run["passed"] for run in both]),
            "layers": {layer: {"parted": sum(end[layer] > 0 for end in last),
                               "spread": geometric([end[layer] for end in last])} for layer in layers},
            "runs": found})
    # Dropout's first spread is a thousand times any other's: a line through all is one from it to them.
    laws = {"all noises": law(summary), "without dropout": law([arm for arm in summary if "dropout" not in arm["arm"]])}
    return {"arms": summary, "law": laws, "leaps": leaps(rows), f"minus {SEEDED}": differences(summary)}


def draw_figures(rows, summary, directory):
    plt = common.plot_style()

    def curves(axis, part):
        which = [arm["arm"] for arm in summary if arm["part"] == part]
        colors = plt.get_cmap("turbo")(np.linspace(0.05, 0.95, len(which)))
        for color, arm in zip(colors, which, strict=True):
            for seed in sorted({row["seed"] for row in rows}):
                mine = [row for row in rows if (row["part"], row["arm"], row["seed"]) == (part, arm, seed)]
                axis.plot([row["step"] for row in mine], [row["spread"] or math.nan for row in mine], color=color,
                          linewidth=0.8, alpha=0.7, label=arm if seed == 0 else None)
        axis.axhline(BROKEN, color="0.4", linewidth=0.8, linestyle="--")
        axis.set(yscale="log", xlabel="step", title=part, ylabel="spread, |W - mean| / |W|, largest")
        axis.legend(fontsize=7, ncols=3, loc="upper center", bbox_to_anchor=(0.5, -0.12))

    parts = list(dict.fromkeys(arm["part"] for arm in summary))
    figure, axes = plt.subplots(1, len(parts), figsize=(6 * len(parts), 5.5), squeeze=False, sharey=True,
                                layout="constrained")
    for axis, part in zip(axes[0], parts, strict=True):
        curves(axis, part)
    common.save_figure(figure, directory / "spread.png")

    figure, (by_size, by_prediction) = plt.subplots(1, 2, figsize=(11, 4.2), layout="constrained")
    noises = [arm for arm in summary if arm["part"] == "noise"] or summary
    for which, arm in enumerate(noises):
        style = dict(linestyle="none", marker="osD^v<>P*X"[which // 10 % 10], color=f"C{which % 10}", label=arm["arm"])
        runs = [run for run in arm["runs"].values() if run["passed"]]
        by_size.plot([run["first_spread"] for run in runs], [run["passed"] for run in runs], **style)
        runs = [run for run in runs if run["predicted"]]
        by_prediction.plot([run["passed"] for run in runs], [run["predicted"] for run in runs], **style)
    by_size.set(xscale="log", xlabel="first spread", ylabel=f"step at which the spread passes {BROKEN:.0%}")
    figure.legend(*by_size.get_legend_handles_labels(), fontsize=7, loc="outside right upper")
    ends = [run[key] for arm in noises for run in arm["runs"].values() for key in ("passed", "predicted") if run[key]]
    by_prediction.axline((min(ends, default=0),) * 2, slope=1, color="0.4", linewidth=0.8, linestyle="--")
    by_prediction.set(xlabel="step, measured", ylabel=f"first step + ln({BROKEN} / first spread) / rate")
    common.save_figure(figure, directory / "broken.png")

    layers = list(summary[0]["layers"])
    means = np.array([[arm["layers"][layer]["spread"][0] or math.nan for layer in layers] for arm in summary])
    figure, axis = plt.subplots(figsize=(8, 1.2 + 0.3 * len(summary)), layout="constrained")
    axis.imshow(np.log10(means), cmap="viridis", vmin=-10, vmax=0, aspect="auto")
    for (row, column), mean in np.ndenumerate(means):
        axis.text(column, row, "0" if math.isnan(mean) else f"{mean:.0e}", ha="center", va="center", fontsize=7,
                  color="white" if mean < 1e-4 else "black")
    axis.set_xticks(range(len(layers)), layers, rotation=30, ha="right")
    axis.set_yticks(range(len(summary)), [f"{arm['part']}: {arm['arm']}" for arm in summary])
    axis.grid(False)
    axis.set_title("spread of each layer when a run ends, geometric mean over the seeds in which it is not 0;\n"
                   "0: equal channels in every seed", fontsize=9)
    common.save_figure(figure, directory / "layers.png")


def read_rows(directory):
    """What `summarise` takes."""
    return [common.read_csv(directory / name, text=("part", "arm")) for name in ("metrics.csv", "layers.csv")]


def report(directory):
    """Figures and tables of a run from its files, so that they can be had again at any time."""
    rows, _ = read_rows(directory)
    found = json.loads((directory / "summary.json").read_text())
    summary = found["arms"]
    if not summary:
        raise ValueError("its summary.json is empty")
    draw_figures(rows, summary, directory)

    def cell(value, digits):
        mean, low, high = value
        if mean is None:
            return ""
        return f"{mean:.{digits}g}" + (f" ({low:.{digits}g}, {high:.{digits}g})" if None not in (low, high) else "")

    for part in dict.fromkeys(arm["part"] for arm in summary):
        print(f"\n{part}: mean and 95 % interval over the seeds that have it\n{'':<24}{'broken':>8}{'first spread':>30}"
              f"{'rate [1/step]':>26}{'R²':>7}{'step of 1 %':>22}{'predicted':>22}")
        for arm in summary:
            if arm["part"] == part:
                r2 = "" if arm["r2"][0] is None else f"{arm['r2'][0]:.3f}"
                print(f"{arm['arm']:<24}{arm['broken']:>3} of {arm['seeds']}{cell(arm['first_spread'], 2):>30}"
                      f"{cell(arm['rate'], 3):>26}{r2:>7}{cell(arm['passed'], 3):>22}{cell(arm['predicted'], 3):>22}")
    for which, line in found["law"].items():
        if line["steps"][0] is not None:
            print(f"\n{which} of a seed that got to 1 %, steps to there against ln(1 / first spread): slope "
                  f"{cell(line['steps'], 3)} steps, its inverse {cell(line['rate'], 3)} per step, "
                  f"R² {', '.join(f'{r2:.2f}' for r2 in line['r2'])}")
    print(f"\nsteps that multiply the spread by more than {LEAP:g}, by the spread before\n{'from':<8}"
          f"{'a ReLU on in some channels alone':>36}{'none':>18}")
    for decade, kinds in found["leaps"].items():
        mixed, alike = (f"{leapt} of {steps}" for steps, leapt in (kinds["mixed"], kinds["alike"]))
        print(f"{decade:<8}{mixed:>36}{alike:>18}")
    for arm, more in found[f"minus {SEEDED}"].items():
        if arm != SEEDED and more["passed"][0] is not None:
            print(f"{arm} minus {SEEDED}: rate {cell(more['rate'], 2)}, step of 1 % {cell(more['passed'], 3)}")


def main(argv=None):
    args = parse_arguments(argv)
    if args.plot_only is not None:
        with common.finished_run(args.plot_only) as directory:
            return report(directory)
    *tensors, classes = common.load_data(args.dataset, args.data_dir, args.image_size)
    if len(tensors[1]) < args.batch_size:
        common.fail(f"argument --batch-size: {args.batch_size} is more than the {len(tensors[1])} training images")
    data = [tensor.to(args.device) for tensor in tensors] + [classes]
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = False

    out = common.start_run(args, f"runs/symmetry/{args.dataset}",
                           ("parts", "splits", "gaussian", "bit_steps", "dropout", "windows", "seeds", "device"))
    pieces = {f"{part}, {arm}, {seed}": (args, data, seed, p, convert)
              for part, arm, p, convert in arms(args) for seed in range(args.seeds)}
    workers = 1 if args.device.startswith("cuda") else torch.get_num_threads()
    try:
        done = common.work(pieces, one_run, out, workers)
    except KeyboardInterrupt:
        return common.interrupted(out)
    if not common.first_process():
        return 0
    rows, ends = [], []
    for part, arm, _, _ in arms(args):
        for seed in range(args.seeds):
            steps, spreads = done[f"{part}, {arm}, {seed}"]
            run = {"part": part, "arm": arm, "seed": seed}
            rows += [{**run, "step": step, "spread": value, "loss": loss, "mixed": mixed}
                     for step, value, loss, mixed in steps]
            ends.append({**run, **spreads})
    common.write_csv(out / "metrics.csv", rows)
    common.write_csv(out / "layers.csv", ends)
    diverged = [row for row in rows if not (math.isfinite(row["loss"]) and math.isfinite(row["spread"]))]
    if diverged:
        print("symmetry.py: diverged: {part}, {arm}, seed {seed}: loss or spread is not finite at step {step}; ".format(
            **diverged[0]) + f"try a smaller --lr (was {args.lr}); metrics: {out}/metrics.csv", file=sys.stderr)
        return 3
    rows, ends = read_rows(out)   # as they are there, so that the summary can be had from them again
    common.write_json(out / "summary.json", summarise(rows, ends))
    if args.tensorboard:
        common.log_to_tensorboard(out, ((f"{key}/{row['part']}/{row['arm']}/seed{row['seed']}", row[key], row["step"])
                                        for row in rows for key in ("spread", "loss")))
    report(out)
    print(f"\n{out}/: spread.png, broken.png, layers.png, metrics.csv, layers.csv, summary.json, config.json")
    return 0


if __name__ == "__main__":
    common.run(main)
