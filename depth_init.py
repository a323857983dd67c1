"""Depth-scaled initialisation: does a layer's variance that grows with its depth help a deep network to learn?

Pandey, "Incorporating Each Layer Depth Information for Better Initialization Scheme" (arXiv 2509.05018). Layer l of L
gets the variance of He's or Xavier's initialisation times s_l, with the product of all s_l the network variance V. The
paper compares s_l that increase with l, the same in reverse, all equal, and all 1, for 54 layers of 64 units. The
equations of the paper are missing from every copy we found; these are a reconstruction that agrees with its prose
(a third of the layers lies below 1 at V = 22):

    increasing   s_l = (l / k + c)^(1/n), k such that the product is V: for c = 0, k = (L!)^(1/L) V^(-n/L)
                 or, with --function log, s_1 = 1 and s_l = log_k(l) for l >= 2
    decreasing   the same values in reverse order        constant   s_l = V^(1/L)        unit   s_l = 1

    python depth_init.py                                   # digits, a minute or two
    python depth_init.py --dataset cifar10 --epochs 100    # the paper's data; wants a GPU

The initialiser serves any model: depth_scaled_init_(model, "he normal", "increasing", variance=22). All seeds of an arm
train as one batched model; of several --lr each arm counts with the one of the lowest training loss. Every run writes
config.json, metrics.csv (a row per arm, seed and epoch), layers.csv (the distributions per layer, at that rate),
summary.json, curves.png, layers.png, and done/ (every finished arm).
Exit status: 0 done, 2 bad input, 3 an arm diverged (its rows are kept), 130 interrupted (finished arms are kept).
"""

import collections
import itertools
import json
import math
import sys

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F
from tqdm import tqdm

import common

INITS = ("he normal", "he uniform", "xavier normal", "xavier uniform")
Arm = collections.namedtuple("Arm", "init scaling variance batch_norm")
OPTIMIZERS = {"adam": torch.optim.Adam, "sgd": lambda *args, **more: torch.optim.SGD(*args, momentum=0.9, **more)}
SCALINGS = ("unit", "constant", "increasing", "decreasing")
QUANTILES = (0.01, 0.25, 0.5, 0.75, 0.99)
SMALL = dict(epochs=20, seeds=5)
LARGE = dict(epochs=20, seeds=30)
DEFAULTS = {dataset: SMALL if dataset == "digits" else LARGE for dataset in common.DATASETS}


# ---------------------------------------------------------------------------------------------------------- arguments


def parse_arguments(argv=None):
    parser = common.parser(__doc__)
    what = parser.add_argument_group("the arms: every combination is one")
    what.add_argument("--init", nargs="+", default=["he normal", "he uniform"], metavar="INIT",
                      help=f"of {', '.join(map(repr, INITS))}; default: 'he normal' 'he uniform'; paper: all")
    what.add_argument("--scaling", nargs="+", default=list(SCALINGS), metavar="SCALING",
                      help=f"of {', '.join(SCALINGS)}; default and paper: all")
    what.add_argument("--variance", type=float, nargs="+", default=[22.0], metavar="V",
                      help="the network's, the product of all s_l; default and paper: 22")
    what.add_argument("--batch-norm", nargs="+", choices=("off", "on"), default=["off"],
                      help="before every activation: the paper's remedy for late trouble at high variance; default: "
                           "off")

    net = parser.add_argument_group("the network and its scaling")
    net.add_argument("--network", choices=("fc", "conv"), default="fc",
                     help="fully connected; or 3x3 convolutions that halve the image after the first and after the "
                          "second third of the layers, and the image's mean; default: fc")
    net.add_argument("--layers", type=int, default=54, metavar="L",
                     help="before the output layer; default and paper: 54")
    net.add_argument("--width", type=int, default=64, metavar="N", help="units or channels; default and paper: 64")
    net.add_argument("--activation", choices=("relu", "tanh"), default="relu", help="default and paper: relu")
    net.add_argument("--function", choices=("power", "log"), default="power",
                     help="by which s_l grows; log from layer 2 on, since s_1 = 1 lies above s_2 (0.25 at L = 54, V = "
                          "22); default: power; the paper's is lost")
    net.add_argument("--n", type=float, default=2.0, metavar="N",
                     help="of power: s_l = (l / k + c)^(1/N); default: 2")
    net.add_argument("--c", type=float, default=0.0, metavar="C",
                     help="of power, so that no s_l is very low; default: 0")

    how = parser.add_argument_group("data and training")
    common.add_data(how, "paper: cifar10")
    how.add_argument("--normalize", action="store_true",
                     help="inputs of mean 0 and variance 1; default and paper: scaled to [0, 1]")
    how.add_argument("--epochs", type=int, metavar="N", help="default: 20; paper: not given")
    how.add_argument("--batch-size", type=int, default=64, metavar="N", help="images; default: 64; paper: not given")
    how.add_argument("--optimizer", choices=tuple(OPTIMIZERS), default="adam",
                     help="sgd has momentum 0.9; default: adam; paper: not given")
    how.add_argument("--lr", type=float, nargs="+", default=[0.0003], metavar="RATE",
                     help="of several, each arm counts with the one of the lowest final training loss; default: "
                          "0.0003; paper: not given")
    how.add_argument("--seeds", type=int, metavar="COUNT",
                     help="networks of an arm, trained as one; default: 5 on digits, 30 elsewhere")
    common.add_files(parser, "depth_init/DATASET", "finished arms are kept")
    args = parser.parse_args(argv)
    common.check_common(args, DEFAULTS)
    need = common.need
    for name, valid in (("init", INITS), ("scaling", SCALINGS)):
        values = getattr(args, name)
        need(set(values) <= set(valid) and len(set(values)) == len(values), f"--{name}", " ".join(values),
             f"different ones of {', '.join(map(repr, valid))}")
    args.variance = [float(f"{variance:.6g}") for variance in args.variance]   # as metrics.csv has it
    for name in ("variance", "batch_norm", "lr"):
        values = getattr(args, name)
        need(len(set(values)) == len(values), f"--{name}", values, "different values")
    common.at_least_1(args, "epochs", "batch_size", "seeds", "layers", "width")
    need(all(math.isfinite(lr) and lr > 0 for lr in args.lr), "--lr", args.lr, "finite and positive")
    need(args.batch_size > 1 or "on" not in args.batch_norm, "--batch-size", 1, "at least 2 with --batch-norm on")
    for scaling, variance in itertools.product(args.scaling, args.variance):
        try:
            scales(args.layers, scaling, variance, args.function, args.n, args.c)
        except ValueError as error:
            common.fail(f"argument --variance, --function, --n or --c: {error}")
    return args


# ------------------------------------------------------------------------------------------------------ initialisation


def scales(layers, scaling, variance=22.0, function="power", n=2.0, c=0.0):
    """[s_1, ..., s_L], whose product is the network variance V (1 with scaling "unit"): an array (layers,).

    "constant" is V^(1/L) everywhere, "increasing" the function, "decreasing" the same backwards. function "power" is
    s_l = (l / k + c)^(1/n), "log" s_l = log_k(l) (and s_1 = 1), where k makes the product V; n and c are of "power". A
    reconstruction of Sections 4 and 6 to 9 of arXiv 2509.05018, whose equations are lost. Raises ValueError, with the
    reason, where there is no such scaling.
    """
    if scaling not in SCALINGS:
        raise ValueError(f"scaling must be one of {', '.join(SCALINGS)}; got {scaling!r}")
    if not (math.isfinite(variance) and variance > 0):
        raise ValueError(f"the network variance must be finite and positive, as every s_l is; got {variance}")
    depths = np.arange(1, layers + 1)
    if scaling in ("unit", "constant"):
        return np.full(layers, 1.0 if scaling == "unit" else variance ** (1 / layers))
    if function == "log":
        if layers < 2:
            raise ValueError("the logarithm of layer 1 is 0: log needs at least 2 layers")
        logs = np.log(np.log(depths[1:]))   # of ln l, whose sum may be below 0
        log_k = math.exp((logs.sum() - math.log(variance)) / (layers - 1))
        s = np.array([1.0, *(np.log(depths[1:]) / log_k)])
    else:
        if not (math.isfinite(n) and n > 0):
            raise ValueError(f"n must be finite and positive, or s_l would not increase with l; got {n}")
        if not (math.isfinite(c) and c >= 0):
            raise ValueError(f"c must be finite and at least 0, as it lifts the lowest s_l; got {c}")
        if c > 0 and layers / n * math.log(c) >= math.log(variance):
            raise ValueError(f"no k exists: with c = {c} and n = {n} every s_l is above c^(1/n), and their product "
                             f"above 10^{layers / n * math.log10(c):.3g}, which the variance {variance} is not")

        def logs(log_1_k):   # of s_l; their sum grows with log(1 / k), from L/n ln(c) to infinity
            return np.logaddexp(np.log(depths) + log_1_k, math.log(c) if c > 0 else -math.inf) / n

        high = max(1e6, n * (abs(math.log(variance)) + 1))
        low = -high
        for _ in range(100):
            middle = (low + high) / 2
            low, high = (middle, high) if logs(middle).sum() < math.log(variance) else (low, middle)
        if np.abs(logs(high)).max() > 700:
            raise ValueError(f"n = {n} makes the s_l differ by more than a floating-point number can hold")
        s = np.exp(logs(high))
    return s[::-1].copy() if scaling == "decreasing" else s


def draw_(weight, init, fan_in, fan_out, scale, generator=None):
    """Fills weight in place: He's or Xavier's variance times scale, normal or uniform."""
    deviation = math.sqrt(scale * (2 / fan_in if init.startswith("he") else 2 / (fan_in + fan_out)))
    if init.endswith("normal"):
        return weight.normal_(0, deviation, generator=generator)
    return weight.uniform_(-math.sqrt(3) * deviation, math.sqrt(3) * deviation, generator=generator)


@torch.no_grad()
def depth_scaled_init_(model, init="he normal", scaling="increasing", variance=22.0, function="power", n=2.0, c=0.0,
                       generator=None):
    """Initialises the Linear and Conv layers of any model in place, in the order in which the model lists them; returns
    the model.

    All but the last, which gives the output, are scaled by s_1 ... s_L of `scales`, whose arguments scaling, variance,
    function, n and c are; the last has s = 1; biases are 0. init: one of INITS; generator: torch's, of the draws.
    Raises ValueError for an unknown init, for parameters for which no scaling exists, or where the model has no such
    layers.
    """
    if init not in INITS:
        raise ValueError(f"init must be one of {', '.join(INITS)}; got {init!r}")
    layers = [module for module in model.modules() if isinstance(module, (nn.Linear, nn.modules.conv._ConvNd))]
    if len(layers) < 2:
        raise ValueError("the model needs at least two Linear or Conv layers: those but the last are scaled")
    for layer, s in zip(layers, [*scales(len(layers) - 1, scaling, variance, function, n, c), 1.0], strict=True):
        fan_in, fan_out = nn.init._calculate_fan_in_and_fan_out(layer.weight)
        draw_(layer.weight, init, fan_in, fan_out, s, generator)
        if layer.bias is not None:
            layer.bias.zero_()
    return model


# -------------------------------------------------------------------------------------------------------------- model


class Batched(nn.Module):
    """`seeds` networks as one: their layers are the groups of grouped convolutions, (B, seeds * channels, h, w) inside.

    A fully connected network is one of 1x1 convolutions, with the batch in the place of the image's height: (1, seeds *
    units, B, 1). Biases start at 0. A seed's weights do not depend on how many others there are.
    """

    def __init__(self, args, channels, classes, arm):
        super().__init__()
        init, scaling, variance, norm = arm
        seeds, kernel = args.seeds, 1 if args.network == "fc" else 3
        widths = [channels, *[args.width] * args.layers, classes]
        s = [*scales(args.layers, scaling, variance, args.function, args.n, args.c), 1.0]
        generators = [torch.Generator().manual_seed(seed) for seed in range(seeds)]
        self.layers, self.seeds, self.fully_connected = nn.ModuleList(), seeds, args.network == "fc"
        self.activation = torch.relu if args.activation == "relu" else torch.tanh
        for layer, (n_in, n_out) in enumerate(itertools.pairwise(widths)):
            k = 1 if layer == args.layers else kernel
            halves = args.network == "conv" and 0 < layer < args.layers and layer * 3 // args.layers > (
                (layer - 1) * 3 // args.layers)   # the first layer of the second and of the last third
            conv = nn.Conv2d(seeds * n_in, seeds * n_out, k, 2 if halves else 1, padding=k // 2, groups=seeds)
            with torch.no_grad():
                for weight, generator in zip(conv.weight.view(seeds, n_out, n_in, k, k), generators, strict=True):
                    draw_(weight, init, n_in * k * k, n_out * k * k, s[layer], generator)
                conv.bias.zero_()
            self.layers.append(conv)
        self.norms = nn.ModuleList(nn.BatchNorm2d(seeds * args.width) if norm == "on" else nn.Identity()
                                   for _ in range(args.layers))

    def apply_layer(self, layer, x):
        if not self.fully_connected:
            return layer(x)
        weight, bias = (p.view(self.seeds, layer.out_channels // self.seeds, -1) for p in (layer.weight, layer.bias))
        # layer(x) as a batched product, which is several times faster than a grouped convolution
        return torch.baddbmm(bias, weight, x.view(self.seeds, weight.shape[2], -1)).view(1, layer.out_channels, -1, 1)

    def forward(self, x, watched=None):
        """(B, channels, h, w), the same images for all seeds -> (B, seeds, classes); watched gets every z = W a."""
        number = len(x)
        if self.fully_connected:
            x = x.flatten(1).t()[None, :, :, None]
        x = x.repeat(1, self.seeds, 1, 1)
        for layer, norm in zip(self.layers, self.norms, strict=False):
            z = self.apply_layer(layer, x)
            if watched is not None:
                z.retain_grad()
                watched.append(z)
            x = self.activation(norm(z))
        if self.fully_connected:
            return self.apply_layer(self.layers[-1], x).view(self.seeds, -1, number).permute(2, 0, 1)
        return self.layers[-1](x.mean((2, 3), keepdim=True)).view(number, self.seeds, -1)


# ------------------------------------------------------------------------------------------------------------ training


def losses(model, x, y, watched=None):
    """(seeds,) mean cross entropy of a batch."""
    logits = model(x, watched)
    return F.cross_entropy(logits.transpose(1, 2), y[:, None].expand(-1, model.seeds), reduction="none").mean(0)


def distributions(model, x, y, names, when):
    """Rows of layers.csv: weights, activations z = W a before the nonlinearity and their gradients, over all seeds."""
    watched, rows = [], []
    losses(model, x, y, watched).sum().backward()
    model.zero_grad()
    for layer, z in enumerate(watched):
        for quantity, values in (("weight", model.layers[layer].weight), ("activation", z), ("gradient", z.grad)):
            values = values.detach().flatten().double()
            some = values
            if len(values) > 40_000:   # drawn, as every k-th would be of some images or units alone if k divides theirs
                drawn = torch.randint(len(values), (20_000,), generator=torch.Generator().manual_seed(0))
                some = values[drawn.to(values.device)]
            quantiles = torch.quantile(some, torch.tensor(QUANTILES).to(some)).tolist()
            rows.append({**names, "epoch": when, "layer": layer + 1, "quantity": quantity,
                         "mean_square": values.square().mean().item(),
                         **{f"q{q:g}": value for q, value in zip(QUANTILES, quantiles, strict=True)}})
    return rows


@torch.no_grad()
def evaluate(model, images, labels, normalise):
    """(seeds,) test loss and accuracy [%]; None where the loss is not finite: NaN would count as class 0."""
    model.eval()
    total, correct = 0.0, 0
    for x, y in zip(images.split(500), labels.split(500), strict=True):
        logits = model(normalise(x))
        total += F.cross_entropy(logits.transpose(1, 2), y[:, None].expand(-1, model.seeds), reduction="none").sum(0)
        correct += (logits.argmax(2) == y[:, None]).sum(0)
    model.train()
    return (total / len(labels)).tolist(), [100 * right / len(labels) if math.isfinite(loss) else None
                                            for loss, right in zip(total.tolist(), correct.tolist(), strict=True)]


def train(args, arm, lr, data):
    """Rows of metrics.csv and of layers.csv of one arm, all its seeds together."""
    images, labels, test_images, test_labels, classes = data
    mean = images.float().mean((0, 2, 3), keepdim=True) if args.normalize else 0
    deviation = (images.float().std((0, 2, 3), keepdim=True).clamp(min=1e-3) if args.normalize else
                 common.brightest(images))

    def normalise(x):
        return (x.float() - mean) / deviation

    inputs = images[0].numel() if args.network == "fc" else images.shape[1]
    model = Batched(args, inputs, classes, arm).to(images.device)
    optimizer = OPTIMIZERS[args.optimizer](model.parameters(), lr=lr, fused=True)
    names = {**arm._asdict(), "lr": lr}
    probe = normalise(images[:256]), labels[:256]
    rows, layers = [], distributions(model, *probe, names, 0)

    def log(epoch, train_losses):
        test_losses, accuracies = evaluate(model, test_images, test_labels, normalise)
        rows.extend({**names, "seed": seed, "epoch": epoch, "train_loss": train_losses[seed] if train_losses else None,
                     "test_loss": test_losses[seed], "test_accuracy": accuracies[seed]} for seed in range(args.seeds))

    log(0, None)
    for epoch in tqdm(range(1, args.epochs + 1), desc=" ".join(map(str, (*arm, lr))), leave=False,
                      disable=None if common.RANK == 0 else True):
        order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(epoch)).to(images.device)
        total, batches = 0.0, order[:len(order) // args.batch_size * args.batch_size].view(-1, args.batch_size)
        for index in batches:
            loss = losses(model, normalise(images[index]), labels[index])
            optimizer.zero_grad()
            loss.sum().backward()   # the seeds share no weights, so their gradients do not mix
            optimizer.step()
            total = total + loss.detach()
        log(epoch, (total / len(batches)).tolist())
        if epoch in (max(1, args.epochs // 2), args.epochs):
            layers += distributions(model, *probe, names, epoch)
    return rows, layers


# ------------------------------------------------------------------------------------------------------------- results


def arm_of(row):
    return Arm(*(row[key] for key in Arm._fields))


def diverged(row):
    return row["test_accuracy"] is None or not math.isfinite(row["train_loss"])


def at_best_rate(rows, others=()):
    """The rows, and the others, of each arm's learning rate with the lowest mean training loss in the last epoch. The
    test set has no say in it. A rate at which a seed diverged comes last."""
    last, losses = max(row["epoch"] for row in rows), {}
    for row in rows:
        if row["epoch"] == last:
            loss = math.inf if diverged(row) else row["train_loss"]
            losses.setdefault(arm_of(row), {}).setdefault(row["lr"], []).append(loss)
    best = {arm: min(rates, key=lambda lr: sum(rates[lr])) for arm, rates in losses.items()}
    return tuple([row for row in some if row["lr"] == best[arm_of(row)]] for some in (rows, others))


def finals(rows):
    """{arm: final test accuracies by seed}, without the arms of which one has none, since it diverged."""
    last, found = max(row["epoch"] for row in rows), {}
    for row in rows:
        if row["epoch"] == last:
            found.setdefault(arm_of(row), []).append(row["test_accuracy"])
    return {arm: np.array(values) for arm, values in found.items() if None not in values}


def claims(rows):
    """The paper's claims, each as a difference of final test accuracies [points] between arms alike in all else, paired
    by seed. None where the arms were not run."""
    accuracy, found = finals(rows), []
    variances = sorted({arm.variance for arm in accuracy})
    scaled = sorted({arm.variance for arm in accuracy if arm.scaling != "unit"})   # of unit it is 1

    def compare(claim, better, worse):
        if better in accuracy and worse in accuracy:
            mean, low, high = common.interval(accuracy[better] - accuracy[worse])
            found.append({"claim": claim, "better": " / ".join(map(str, better)), "worse": " / ".join(map(str, worse)),
                          "difference": mean, "low": low, "high": high,
                          "holds": "not decided" if low is None or low <= 0 <= high else "yes" if mean > 0 else "no"})

    def arm(init, scaling, variance, norm):
        return init, scaling, 1.0 if scaling == "unit" else variance, norm

    for init, variance, norm in itertools.product(INITS, scaled, ("off", "on")):
        for other in ("unit", "constant", "decreasing"):
            compare("increasing beats the others", (init, "increasing", variance, norm),
                    arm(init, other, variance, norm))
        for other in ("unit", "constant"):
            compare("decreasing is worse", arm(init, other, variance, norm), (init, "decreasing", variance, norm))
    for scaling, variance in itertools.product(SCALINGS, variances):
        compare("normal trains where uniform stalls" if scaling == "unit" else "normal is better than uniform",
                ("he normal", scaling, variance, "off"), ("he uniform", scaling, variance, "off"))
    for init, scaling, variance in itertools.product(INITS, SCALINGS[1:], scaled[-1:]):
        compare("batch norm mends a high variance", (init, scaling, variance, "on"), (init, scaling, variance, "off"))
    return found


def summarise(rows):
    rows, _ = at_best_rate(rows)
    accuracy, rates = finals(rows), {arm_of(row): row["lr"] for row in rows}
    arms = [{**arm._asdict(), "lr": rates[arm], "seeds": len(values),
             **dict(zip(("test_accuracy", "low", "high"), common.interval(values), strict=True))}
            for arm, values in accuracy.items()]
    return {"arms": arms, "claims": claims(rows)}


def theory(arm, layers, *of_scales):
    """Eqs. 6 and 15: the mean squares of z_1 ... z_L relative to z_1's, and of their gradients relative to z_L's. The
    equations are for He's variance, 2 / n; between layers of n units Xavier's is 1 / n, half of it."""
    s = scales(layers, arm.scaling, arm.variance, *of_scales) / (2 if arm.init.startswith("xavier") else 1)
    return np.cumprod(s) / s[0], np.cumprod(s[::-1])[::-1] / s


def draw_figures(rows, layers, config, directory):
    """curves.png: test accuracy and training loss over epochs, mean and 95 % of the seeds; layers.png: mean squares of
    activations and gradients by layer at the start, against the theory where it applies, and the weights' quantiles."""
    plt = common.plot_style()
    rates = {arm_of(row): row["lr"] for row in layers}   # which are of the best rate alone
    rows = [row for row in rows if row["lr"] == rates[arm_of(row)]]
    arms = list(dict.fromkeys(map(arm_of, rows)))
    kinds = list(dict.fromkeys((arm.init, arm.batch_norm) for arm in arms))
    variances = sorted({arm.variance for arm in arms})

    def style(arm):
        name = arm.scaling + (f", V = {arm.variance:g}" if len(variances) > 1 and arm.scaling != "unit" else "")
        return {"color": f"C{SCALINGS.index(arm.scaling)}", "label": name,
                "linestyle": ("-", "--", ":", "-.")[variances.index(arm.variance) % 4]}

    figure, axes = plt.subplots(2, len(kinds), figsize=(4.2 * len(kinds), 6), squeeze=False, sharex=True, sharey="row",
                                layout="constrained")
    for column, kind in enumerate(kinds):
        for arm in (arm for arm in arms if (arm.init, arm.batch_norm) == kind):
            mine = [row for row in rows if arm_of(row) == arm]
            for axis, key in zip(axes[:, column], ("test_accuracy", "train_loss"), strict=True):
                epochs = sorted({row["epoch"] for row in mine if row[key] is not None})
                values = [[row[key] for row in mine if row["epoch"] == epoch and row[key] is not None]
                          for epoch in epochs]
                axis.plot(epochs, [np.mean(v) for v in values], **style(arm))
                axis.fill_between(epochs, *(np.array([np.percentile(v, q) for v in values]) for q in (2.5, 97.5)),
                                  color=style(arm)["color"], alpha=0.12)
        axes[0, column].set(title=f"{kind[0]}, batch norm {kind[1]}", ylabel="" if column else "test accuracy [%]")
        axes[1, column].set(xlabel="epoch", ylabel="" if column else "training loss")
    figure.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside right upper")
    common.save_figure(figure, directory / "curves.png")

    figure, axes = plt.subplots(3, len(kinds), figsize=(4.2 * len(kinds), 9), squeeze=False, sharex=True, sharey="row",
                                layout="constrained")
    for column, kind in enumerate(kinds):
        for arm in (arm for arm in arms if (arm.init, arm.batch_norm) == kind):
            for axis, quantity in zip(axes[:, column], ("activation", "gradient", "weight"), strict=True):
                mine = sorted((row for row in layers if arm_of(row) == arm and row["quantity"] == quantity
                               and row["epoch"] == 0), key=lambda row: row["layer"])
                depths, squares = [row["layer"] for row in mine], np.array([row["mean_square"] for row in mine])
                if quantity == "weight":
                    for key in ("q0.01", "q0.25", "q0.75", "q0.99"):
                        axis.plot(depths, [row[key] for row in mine], **{**style(arm), "linewidth": 0.8})
                    continue
                axis.plot(depths, squares, **style(arm))
                axis.set_yscale("log")
                if kind[1] == "on" or config["network"] == "conv" or config["activation"] != "relu":
                    continue   # of which the equations say nothing
                activation, gradient = theory(arm, len(depths), config["function"], config["n"], config["c"])
                expected = squares[0] * activation if quantity == "activation" else squares[-1] * gradient
                axis.plot(depths, expected, color=style(arm)["color"], linestyle=":", linewidth=1)
        axes[0, column].set(title=f"{kind[0]}, batch norm {kind[1]}")
        axes[2, column].set(xlabel="layer")
    for axis, label in zip(axes[:, 0], ("mean square of z (dotted: theory)", "mean square of its gradient",
                                        "weights: 1, 25, 75, 99 %"), strict=True):
        axis.set_ylabel(label)
    figure.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside right upper")
    common.save_figure(figure, directory / "layers.png")


def report(directory):
    """Figures and tables of a run from its files, so that they can be had again at any time."""
    rows, layers = (common.read_csv(directory / name, text=("init", "scaling", "batch_norm", "quantity"))
                    for name in ("metrics.csv", "layers.csv"))
    config = json.loads((directory / "config.json").read_text())["arguments"]
    summary = json.loads((directory / "summary.json").read_text())
    draw_figures(rows, layers, config, directory)

    def between(row):
        return ("" if row["low"] is None else f"{row['low']:.2f} - {row['high']:.2f}").rjust(18)

    print(f"\n{'init':<16}{'scaling':<12}{'V':>8}{'batch norm':>12}{'rate':>10}"
          f"{'test accuracy [%]':>20}{'95 % interval':>18}")
    for arm in summary["arms"]:
        print(f"{arm['init']:<16}{arm['scaling']:<12}{arm['variance']:>8g}{arm['batch_norm']:>12}{arm['lr']:>10g}"
              f"{arm['test_accuracy']:>20.2f}{between(arm)}")
    print(f"\n{'claim':<36}{'holds':<13}{'points':>8}{'95 % interval':>18}   arms")
    for row in summary["claims"]:
        print(f"{row['claim']:<36}{row['holds']:<13}{row['difference']:>8.2f}{between(row)}"
              f"   {row['better']} against {row['worse']}")


def for_tensorboard(rows, layers):
    """(name, value, step) of every number."""
    for row in rows + layers:
        keys, of = ((("train_loss", "test_loss", "test_accuracy"), f"seed{row['seed']}") if "seed" in row else
                    ([f"q{q:g}" for q in QUANTILES], f"{row['quantity']}-layer{row['layer']}"))
        for key in keys:
            yield f"{key}/{'-'.join(map(str, arm_of(row)))}-{row['lr']:g}/{of}", row[key], row["epoch"]


def main(argv=None):
    args = parse_arguments(argv)
    if args.plot_only is not None:
        with common.finished_run(args.plot_only) as directory:
            return report(directory)
    *tensors, classes = common.load_data(args.dataset, args.data_dir, args.image_size)
    data = [tensor.to(args.device) for tensor in tensors] + [classes]
    if len(data[1]) < args.batch_size:
        common.fail(f"argument --batch-size: {args.batch_size} is more than the {len(data[1])} training images")
    out = common.start_run(args, f"runs/depth_init/{args.dataset}", (*Arm._fields, "lr", "device"))
    grid = map(Arm._make, itertools.product(args.init, args.scaling, args.variance, args.batch_norm))
    arms = dict.fromkeys(arm._replace(variance=1.0) if arm.scaling == "unit" else arm for arm in grid)
    pieces = {" ".join(map(str, (*arm, lr))): (args, arm, lr, data) for arm in arms for lr in args.lr}
    try:
        done = common.work(pieces, train, out)
    except KeyboardInterrupt:
        return common.interrupted(out)
    if not common.first_process():
        return 0
    rows, layers = ([row for found in done.values() for row in found[i]] for i in (0, 1))
    common.write_csv(out / "metrics.csv", rows)
    best, best_layers = at_best_rate(rows, layers)
    common.write_csv(out / "layers.csv", best_layers)
    common.write_json(out / "summary.json", summarise(rows))
    if args.tensorboard:
        common.log_to_tensorboard(out, for_tensorboard(rows, layers))
    report(out)
    print(f"\n{out}/: curves.png, layers.png, metrics.csv, layers.csv, summary.json, config.json, done/")
    gone = dict.fromkeys(arm_of(row) for row in best if row["epoch"] == args.epochs and diverged(row))
    if gone:
        print(f"depth_init.py: diverged: {'; '.join(' '.join(map(str, arm)) for arm in gone)}; try a smaller --lr",
              file=sys.stderr)
    return 3 if gone else 0


if __name__ == "__main__":
    common.run(main)
