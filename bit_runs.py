"""Runs tests on the bits of parameters: do the parameters of a network look like independent draws?

The last part of the slides on Hanin and Rolnick, "How to Start Training" (NeurIPS 2018), Table 3: every float32
parameter of a layer, in its order of storage, gives 32 sequences of bits, one for each place. The Wald-Wolfowitz test
counts the runs of equal bits; z is their number's distance from the mean of independent draws in standard deviations.
Table 3 takes the largest |z| of a trained ResNet-18's layers, and the mean |z| of images, where bits are anything but
independent. Question 1 of the slides: can trained parameters be told from untrained ones?

    python bit_runs.py                                      # question 1 on the digits, half a minute on two cores
    python bit_runs.py --model resnet18 --weights DEFAULT   # Table 3 (the weights are downloaded)
    python bit_runs.py --checkpoint runs/constnet/digits/shuffled-0.pt

Every run writes config.json, metrics.csv (a row per layer and bit), summary.json and bit_runs.png.
Exit status: 0 done, 2 bad input, 3 a network diverged (its rows are kept), 130 interrupted.
"""

import hashlib
import inspect
import itertools
import json
import math
import pathlib
import statistics
import sys
import threading

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

import common

STARTING = threading.Lock()   # one network at a time draws its weights, from the process's generator
EXACT = 200   # bits: up to this length p-values are exact, above the normal approximation serves
GROUPS = {"fraction 0-7": range(0, 8), "fraction 8-15": range(8, 16), "fraction 16-22": range(16, 23),
          "exponent": range(23, 31), "sign": range(31, 32)}   # bits of a float32, 0 the least significant
TYPES = tuple(f"{layer} {part}" for layer in ("convolution", "fully connected", "batch norm")
              for part in ("weight", "bias"))


# ---------------------------------------------------------------------------------------------------------- arguments


def parse_arguments(argv=None):
    parser = common.parser(__doc__)
    what = parser.add_argument_group("whose parameters; by default networks before and after training (question 1)")
    what.add_argument("--checkpoint", metavar="FILE",
                      help="a file of torch.save with a state_dict, alone or inside other containers, as constnet.py "
                           "writes it; it is loaded as plain tensors, no code in it is run")
    what.add_argument("--model", metavar="NAME", help="a model of torchvision, such as resnet18; paper: resnet18")
    what.add_argument("--weights", metavar="NAME",
                      help="the torchvision model's trained weights, such as DEFAULT, downloaded where absent; "
                           "default: untrained")

    data = parser.add_argument_group("images, for comparison and for training")
    common.add_data(data, "paper: ImageNet's validation images")
    data.add_argument("--images", type=int, default=1000, metavar="N",
                      help="training images whose bits are tested, one sequence each, as float32 in [0, 1]; default: "
                           "1000")

    how = parser.add_argument_group("training (question 1)")
    how.add_argument("--seeds", type=int, default=20, metavar="COUNT",
                     help="networks, each tested before and after training; default: 20")
    how.add_argument("--steps", type=int, default=300, metavar="N", help="of SGD with momentum 0.9; default: 300")
    how.add_argument("--batch-size", type=int, default=64, metavar="N", help="images; default: 64")
    how.add_argument("--lr", type=float, default=0.05, metavar="RATE", help="default: 0.05")
    common.add_files(parser, "bit_runs/NAME", "finished networks are kept")
    args = parser.parse_args(argv)
    common.check_common(args)
    need = common.need
    common.at_least_1(args, "images", "seeds", "steps", "batch_size")
    need(0 < args.lr <= torch.finfo(torch.float32).max, "--lr", args.lr, "positive, and finite in float32")
    need(args.checkpoint != "", "--checkpoint", "''", "the name of a file")
    need(not (args.checkpoint and args.model), "--model", args.model, "given without --checkpoint")
    need(args.model or not args.weights, "--weights", args.weights, "given with --model")
    return args


# ----------------------------------------------------------------------------------------------------------- the test


def exact_p_value(n, ones, runs):
    """The probability, over all orders of the bits, of a number of runs at least as far from its mean."""
    zeros = n - ones
    mean = 1 + 2 * ones * zeros / n

    def ways(r):   # of arranging the bits in r runs (Wald and Wolfowitz, 1940, Eqs. 2.3, 2.4)
        half = r // 2
        if r % 2 == 0:
            return 2 * math.comb(ones - 1, half - 1) * math.comb(zeros - 1, half - 1)
        return (math.comb(ones - 1, half) * math.comb(zeros - 1, half - 1)
                + math.comb(ones - 1, half - 1) * math.comb(zeros - 1, half))

    as_far = [r for r in range(2, n + 1) if abs(r - mean) >= abs(runs - mean) - 1e-9]
    return min(1.0, sum(map(ways, as_far)) / math.comb(n, ones))


def runs_test(bits):
    """Wald and Wolfowitz, "On a Test Whether Two Samples are from the Same Population" (1940), of every row.

    bits: (sequences, n) of 0 and 1. Returns for each row (ones, runs, z, p), z = (runs - mean) / standard deviation
    given the number of ones, p two-sided; z and p are None where all bits are equal or n < 2: there is nothing to test.
    """
    n, results = bits.shape[1], []
    ones = bits.sum(1, dtype=torch.int64).tolist()
    runs = (1 + (bits[:, 1:] != bits[:, :-1]).sum(1)).tolist()
    for one, run in zip(ones, runs, strict=True):
        if one in (0, n):
            results.append((one, run, None, None))
            continue
        pairs = 2 * one * (n - one)
        variance = pairs * (pairs - n) / (n * n * (n - 1))
        # Two bits of which one is set make two runs, always: a variance of 0 and no evidence.
        z = (run - 1 - pairs / n) / math.sqrt(variance) if variance else 0.0
        p = exact_p_value(n, one, run) if n <= EXACT else math.erfc(abs(z) / math.sqrt(2))
        results.append((one, run, z, p))
    return results


def bits_of(values, bits=range(32)):
    """float32 of any shape -> (32, n) bits, or these alone, row 0 the least significant, in the order of the index."""
    words = values.contiguous().view(torch.int32).flatten()
    return words >> torch.tensor(list(bits), device=words.device)[:, None] & 1


def layers_of(state):
    """(name, type, tensor) of every float32 parameter of a state_dict whose kind of layer its shape and neighbours
    tell: a batch norm has running statistics, a fully connected layer's weight has two dimensions."""
    for name, tensor in state.items():
        prefix, _, last = name.rpartition(".")
        weight = state.get(f"{prefix}.weight" if prefix else "weight")   # of a bias, too
        if (last not in ("weight", "bias") or weight is None or tensor.dtype != torch.float32 or tensor.is_meta
                or tensor.layout != torch.strided):
            continue
        dimensions = weight.ndim
        if f"{prefix}.running_mean" in state:
            yield name, f"batch norm {last}", tensor
        elif dimensions >= 2:
            yield name, f"{'fully connected' if dimensions == 2 else 'convolution'} {last}", tensor


def layer_rows(state, **labels):
    """A row per layer and bit."""
    rows = []
    for name, kind, tensor in layers_of(state):
        for bit in range(32):   # one by one, which takes a large layer less memory
            (ones, runs, z, p), = runs_test(bits_of(tensor, [bit]))
            rows.append({**labels, "layer": name, "type": kind, "bit": bit, "n": tensor.numel(), "ones": ones,
                         "runs": runs, "z": z, "p": p})
    return rows


# ------------------------------------------------------------------------------------------- where parameters come from


def load_state(path):
    """The first state_dict with weights of layers in a file, however deep it lies in dicts and lists."""
    def search(value):
        if isinstance(value, dict):
            state = {k: v for k, v in value.items() if isinstance(v, torch.Tensor) and isinstance(k, str)}
            if any(True for _ in layers_of(state)):
                return state
            value = list(value.values())
        return next(filter(None, map(search, value)), None) if isinstance(value, (list, tuple)) else None

    state = search(common.load_checkpoint(path, "--checkpoint"))
    if not state:
        common.fail(f"argument --checkpoint: {path} holds no float32 weights of layers; name a file with a state_dict")
    return state


def torchvision_state(name, weights):
    from torchvision import models

    if name not in models.list_models():
        common.fail(f"argument --model: torchvision has no model {name!r}; choose one of "
                    "torchvision.models.list_models()")
    torch.manual_seed(0)
    try:
        build = models.get_model_builder(name)
        backbone = {"weights_backbone": None} if "weights_backbone" in inspect.signature(build).parameters else {}
        return build(weights=weights, **backbone).state_dict()   # whose backbone would be a trained one otherwise
    except (KeyError, ValueError) as error:
        common.fail(f"argument --weights: {name} has no weights {weights!r} ({error}); try DEFAULT")
    except Exception as error:   # damaged files raise anything
        if not weights:
            raise
        common.fail(f"argument --weights: they could not be downloaded, or are damaged in {torch.hub.get_dir()} "
                    f"({common.one_line(error)}); save them elsewhere and use --checkpoint")


class Network(nn.Module):
    """All layer types of Table 3: three convolutions with batch norm and ReLU, the average of the image, one layer."""

    def __init__(self, channels, classes, width=32):
        super().__init__()
        layers = []
        for i, stride in enumerate((1, 2, 2)):
            layers += [nn.Conv2d(width if i else channels, width, 3, stride, padding=1, bias=False),
                       nn.BatchNorm2d(width), nn.ReLU()]
        self.features = nn.Sequential(*layers)
        self.head = nn.Linear(width, classes)

    def forward(self, x):
        return self.head(self.features(x).mean((2, 3)))


def before_and_after(args, data, seed):
    """Rows of a network, He-normal at the start, before and after training, and its test accuracy [%], None where
    training diverged."""
    images, labels, test_images, test_labels, classes = data
    scale = 1 / common.brightest(images)
    with STARTING:
        torch.manual_seed(seed)
        model = Network(images.shape[1], classes)
        for module in model.modules():
            if isinstance(module, (nn.Conv2d, nn.Linear)):
                nn.init.kaiming_normal_(module.weight)
    model.to(images.device)
    rows = layer_rows(model.state_dict(), arm="before", seed=seed)
    optimizer = torch.optim.SGD(model.parameters(), lr=args.lr, momentum=0.9)
    generator = torch.Generator().manual_seed(seed)
    for _ in range(args.steps):
        index = torch.randint(len(images), (args.batch_size,), generator=generator).to(images.device)
        optimizer.zero_grad()
        loss = F.cross_entropy(model(images[index] * scale), labels[index])
        loss.backward()
        optimizer.step()
    rows += layer_rows(model.state_dict(), arm="after", seed=seed)
    model.eval()
    with torch.no_grad():
        logits = torch.cat([model(x * scale) for x in test_images.split(1000)])
    right = (logits.argmax(1) == test_labels).double().mean().item()
    return rows, 100 * right if logits.isfinite().all() else None


# ------------------------------------------------------------------------------------------------------------- results


def table_3(rows):
    """Per layer type and group of bits: layers, tests, largest |z|, smallest p times the number of tests (Bonferroni),
    which holds the chance that one of independent layers looks so by accident below itself."""
    table = []
    for kind in TYPES:
        mine = [row for row in rows if row["type"] == kind]
        for group, bits in GROUPS.items():
            tested = [row for row in mine if row["bit"] in bits and row["z"] is not None]
            if mine:
                table.append({"type": kind, "bits": group, "tests": len(tested),
                              "layers": len({(row["seed"], row["layer"]) for row in mine}),
                              "largest_z": max((abs(row["z"]) for row in tested), default=None),
                              "corrected_p": min([1.0] + [row["p"] * len(tested) for row in tested])})
    return table


def told_apart(rows):
    """Question 1. Per group of bits: the share of pairs (one untrained, one trained network) in which the trained one
    has the larger root mean square z over its weights of convolutions and fully connected layers, ties counted half
    (the area under the ROC curve: 0.5 is chance), with a 95 % bootstrap interval over the networks, each drawn before
    and after training at once. (It says nothing where the area is 0 or 1, as that of every sample then is.) Also per
    bit."""
    def score(arm, seed, bits):
        z = [row["z"] for row in rows if row["arm"] == arm and row["seed"] == seed and row["bit"] in bits
             and row["z"] is not None and row["type"] in ("convolution weight", "fully connected weight")]
        return math.sqrt(sum(x * x for x in z) / len(z)) if z else 0.0

    def area(before, after):
        return float(np.mean(np.sign(after[:, None] - before[None, :]) / 2 + 0.5))

    seeds = sorted({row["seed"] for row in rows})
    random, found = np.random.default_rng(0), []
    for group, bits in [*GROUPS.items(), *((f"bit {bit}", [bit]) for bit in range(32))]:
        before, after = (np.array([score(arm, seed, bits) for seed in seeds]) for arm in ("before", "after"))
        samples = [area(before[drawn], after[drawn]) for drawn in random.integers(len(seeds), size=(1000, len(seeds)))]
        low, high = map(float, np.percentile(samples, [2.5, 97.5])) if len(seeds) > 1 else (None, None)
        found.append({"bits": group, "area": area(before, after), "low": low, "high": high,
                      "rms_z_before": float(before.mean()), "rms_z_after": float(after.mean())})
    return found


def image_z(images, number):
    """Mean |z| over the bits of the first images, each a sequence of float32 pixels in [0, 1] in row order."""
    scale, z = 1 / common.brightest(images), []
    for image in images[:number]:
        z += [abs(row[2]) for row in runs_test(bits_of(image * scale)) if row[2] is not None]
    return {"images": min(number, len(images)), "pixels": images[0].numel(),
            "mean_z": sum(z) / len(z) if z else None}


def draw_figure(rows, path):
    """Every layer's |z| by bit, and for question 1 the shift from before to after."""
    plt = common.plot_style()
    arms = list(dict.fromkeys(row["arm"] for row in rows))
    kinds = [kind for kind in TYPES if any(row["type"] == kind and row["z"] is not None for row in rows)] or TYPES[:1]
    largest = max((abs(row["z"]) for row in rows if row["z"] is not None), default=0)
    figure, axes = plt.subplots(1, len(kinds), figsize=(1 + 3.2 * len(kinds), 3.4), sharey=True, squeeze=False,
                                layout="constrained")
    for axis, kind in zip(axes[0], kinds, strict=True):
        for which, arm in enumerate(arms):
            points = [(row["bit"] + 0.3 * which - 0.15 * (len(arms) - 1), abs(row["z"])) for row in rows
                      if row["type"] == kind and row["arm"] == arm and row["z"] is not None]
            if points:
                axis.plot(*zip(*points, strict=True), ".", color=f"C{which}", alpha=0.5, markersize=3, label=arm)
        for bits in (7.5, 15.5, 22.5, 30.5):
            axis.axvline(bits, color="0.7", linewidth=0.8)
        axis.axhline(1.96, color="0.4", linewidth=0.8, linestyle="--")
        axis.set(title=kind, xlabel="bit (0-22 fraction, 23-30 exponent, 31 sign)")
        if largest > 20:
            axis.set_yscale("symlog", linthresh=10)
            ticks = [0, 5, *(m * 10 ** e for e in range(1, 7) for m in (1, 2, 5))]
            axis.set_yticks([tick for tick in ticks if tick <= largest])
            axis.yaxis.set_major_formatter("{x:g}")
    axes[0][0].set_ylabel("|z| of the number of runs (dashed: 5 % level)")
    axes[0][0].legend(markerscale=3)
    common.save_figure(figure, path)


def report(directory):
    """Figure and tables of a run from its files, so that they can be had again at any time."""
    rows = common.read_csv(directory / "metrics.csv", text=("arm", "layer", "type"))
    summary = json.loads((directory / "summary.json").read_text())
    draw_figure(rows, directory / "bit_runs.png")
    for arm, table in summary["table"].items():
        print(f"\nlargest |z| of {arm} (smallest p, times the number of tests)")
        print(f"{'':<24}{'layers':>7}" + "".join(f"{group:>18}" for group in GROUPS))
        for kind in dict.fromkeys(row["type"] for row in table):
            mine = [row for row in table if row["type"] == kind]
            cells = ["all equal" if row["largest_z"] is None else f"{row['largest_z']:.3f} ({row['corrected_p']:.1g})"
                     for row in mine]
            print(f"{kind:<24}{mine[0]['layers']:>7}" + "".join(f"{cell:>18}" for cell in cells))
    images = summary["images"]
    if images["mean_z"] is not None:
        print(f"\nmean |z| of {images['images']} images of {images['pixels']} values: {images['mean_z']:.3f}")
    if "told_apart" in summary:
        networks, accuracy = summary["networks"], summary["test_accuracy"]
        print(f"\ncan trained networks be told from untrained ones? ({networks} of each, test accuracy after "
              f"training {'-' if accuracy is None else f'{accuracy:.1f} %'})\n"
              f"{'bits':<16}{'area under ROC':>15}{'95 % interval':>18}{'rms z before':>14}{'after':>8}")
        for row in summary["told_apart"][:len(GROUPS)]:
            between = "" if row["low"] is None else f"{row['low']:.3f} - {row['high']:.3f}"
            print(f"{row['bits']:<16}{row['area']:>15.3f}{between:>18}"
                  f"{row['rms_z_before']:>14.2f}{row['rms_z_after']:>8.2f}")
        print("where the area is 0 or 1 the interval, a bootstrap's, says nothing")


def main(argv=None):
    args = parse_arguments(argv)
    if args.plot_only is not None:
        with common.finished_run(args.plot_only) as directory:
            return report(directory)
    state, name = None, args.dataset
    if args.checkpoint:
        state, name = load_state(args.checkpoint), pathlib.Path(args.checkpoint).stem
        args.checkpoint_sha256 = hashlib.sha256(pathlib.Path(args.checkpoint).read_bytes()).hexdigest()   # for --resume
    elif args.model:
        state, name = torchvision_state(args.model, args.weights), args.model
    *tensors, classes = common.load_data(args.dataset, args.data_dir, args.image_size)
    data = [tensor.to(args.device) for tensor in tensors] + [classes]

    out = common.start_run(args, f"runs/bit_runs/{name}", ("seeds", "device"))
    if state:
        pieces, do = {name: (state,)}, lambda state: (layer_rows(state, arm=name, seed=0), None)
    else:
        pieces, do = {f"seed {seed}": (args, data, seed) for seed in range(args.seeds)}, before_and_after
    try:
        # Each on one thread: the bits of PyTorch's gradients depend on the number of threads.
        done = common.work(pieces, do, out, 1 if args.device.startswith("cuda") else torch.get_num_threads())
    except KeyboardInterrupt:
        return common.interrupted(out)
    except ValueError as error:
        if "more than 1 value per channel" not in str(error):
            raise
        common.fail(f"argument --batch-size: with {args.batch_size} of images so small a channel has one value alone, "
                    "which batch norm cannot normalise; try a larger one")
    if not common.first_process():
        return 0
    found, accuracies = zip(*done.values(), strict=True)
    rows = list(itertools.chain(*found))
    summary = {"table": {arm: table_3([row for row in rows if row["arm"] == arm])
                         for arm in dict.fromkeys(row["arm"] for row in rows)},
               "images": image_z(data[0], args.images)}
    if not state:
        trained = {seed: accuracy for seed, accuracy in enumerate(accuracies) if accuracy is not None}
        summary.update(seeds=args.seeds, networks=len(trained),
                       test_accuracy=statistics.fmean(trained.values()) if trained else None,
                       told_apart=told_apart([row for row in rows if row["seed"] in trained]) if trained else [])
    common.write_csv(out / "metrics.csv", rows)
    common.write_json(out / "summary.json", summary)
    if args.tensorboard:
        common.log_to_tensorboard(out, ((f"z/{row['arm']}/seed{row['seed']}/{row['layer']}", row["z"], row["bit"])
                                        for row in rows))
    report(out)
    print(f"\n{out}/: bit_runs.png, metrics.csv, summary.json, config.json")
    if not state and len(trained) < args.seeds:
        print(f"bit_runs.py: diverged: {args.seeds - len(trained)} of {args.seeds} networks; try a smaller --lr (was "
              f"{args.lr})", file=sys.stderr)
        return 3
    return 0


if __name__ == "__main__":
    common.run(main)
