"""What every experiment needs and none is about: arguments, data on the device, the run directory, plot style."""

import argparse
import concurrent.futures
import contextlib
import csv
import datetime
import hashlib
import importlib.util
import json
import math
import os
import pathlib
import statistics
import subprocess
import sys

import numpy as np
import torch
from tqdm import tqdm

PROCESSES = int(os.environ.get("WORLD_SIZE", 1))   # as torchrun sets them
RANK = int(os.environ.get("RANK", 0)) if PROCESSES > 1 else 0
DATASETS = ("digits", "mnist", "fashion-mnist", "cifar10", "cifar100", "imagefolder")
STUDENT = (12.71, 4.30, 3.18, 2.78, 2.57, 2.45, 2.36, 2.31, 2.26)   # its 97.5 % points, by degrees of freedom
NO_CUDA = ("ordered_reduce was built without CUDA kernels (put nvcc on PATH and `pip install -e csrc "
           "--force-reinstall --no-deps`)")
CLASSES = {"digits": 10, "mnist": 10, "fashion-mnist": 10, "cifar10": 10, "cifar100": 100}


class Unwritable(OSError):
    """A file could not be written."""


def fail(message):
    """One line, exit status 2: bad input. The message names the argument and what would be valid."""
    print(f"{os.path.basename(sys.argv[0])}: error: {message}", file=sys.stderr)
    raise SystemExit(2)


def need(good, option, value, valid):
    """Fails unless good, naming the argument, its value and what would be valid."""
    if not good:
        fail(f"argument {option.replace('_', '-')}: {value} is not valid; it must be {valid}")


def at_least_1(args, *names):
    """Fails unless these arguments, numbers or lists of numbers, are at least 1, and no more than a tensor can have."""
    for name in names:
        value = getattr(args, name)
        numbers = value if isinstance(value, list) else [value]
        need(min(numbers) >= 1 and max(numbers) < 1 << 31, f"--{name}", value, "at least 1, and below 2**31")


def interrupted(out):
    """What to do after Ctrl-C; returns the exit status."""
    print(f"\n{os.path.basename(sys.argv[0])}: interrupted; continue with the same arguments and --resume --out {out}",
          file=sys.stderr)
    return 130


def out_of_memory(error):
    """Whether there was too little memory. Of ordered_reduce's operators that is a RuntimeError with PyTorch's words,
    or before PyTorch 2.13 with the name of what failed."""
    signs = ("DefaultCPUAllocator", "CUDA out of memory", "aten::new_empty", "aoti_torch_empty_strided")
    return isinstance(error, (MemoryError, torch.OutOfMemoryError)) or any(sign in str(error) for sign in signs)


def run(main):
    """Exits with the status that main returns, 130 after Ctrl-C while data are loaded or results drawn, or 2 where disk
    or memory are full."""
    try:
        sys.exit(main())
    except Unwritable as error:
        fail(f"argument --out: {error}; make room and continue with --resume, or name another directory")
    except (MemoryError, RuntimeError) as error:
        if not out_of_memory(error):
            raise
        fail(f"not enough memory ({one_line(error)}); try smaller sizes")
    except KeyboardInterrupt:
        print(f"\n{os.path.basename(sys.argv[0])}: interrupted", file=sys.stderr)
        sys.exit(130)


def parser(description):
    """argparse with wide help and one-line errors."""
    class Help(argparse.RawDescriptionHelpFormatter):
        def __init__(self, prog):
            super().__init__(prog, max_help_position=32, width=110)

    made = argparse.ArgumentParser(description=description, formatter_class=Help, allow_abbrev=False)
    made.error = fail
    return made


def add_data(group, paper):
    """--dataset, --data-dir, --image-size, --device; `paper` says what the paper used."""
    group.add_argument("--dataset", default="digits", metavar="NAME",
                       help="digits (1,797 images of 8x8, included), mnist, fashion-mnist, cifar10, cifar100 "
                            f"(downloaded where absent) or imagefolder; default: digits; {paper}")
    group.add_argument("--data-dir", default="downloads", metavar="DIR",
                       help="where torchvision's data sets lie or go; for imagefolder the folder that holds "
                            "train/<class>/ and test/<class>/; default: downloads")
    group.add_argument("--image-size", type=int, metavar="PIXELS",
                       help="imagefolder: resize images to this many pixels square; default: the first image's size")
    group.add_argument("--device", default="auto", metavar="DEVICE",
                       help="auto (cuda where there is one), cpu, cuda, cuda:1; default: auto")


def add_files(parser, name, kept):
    """--out, --resume, --plot-only, --tensorboard; `kept` says what a resumed run does not do again."""
    group = parser.add_argument_group("files")
    group.add_argument("--out", metavar="DIR", help=f"default: runs/{name}, with -2, -3, ... where that exists")
    group.add_argument("--resume", action="store_true", help=f"continue the run in --out (default: the newest): {kept}")
    group.add_argument("--plot-only", metavar="DIR",
                       help="draw the figures and print the table of a run again, from its files")
    group.add_argument("--tensorboard", action="store_true",
                       help="also log to DIR/tensorboard (pip install tensorboard)")


def _reads_folder(args):
    return "imagefolder" in (args.dataset, *(getattr(args, "figure2", None) or ()))


def check_common(args, defaults=None, cuda=True):
    """Checks what add_data and add_files added, fills in the defaults of the data set, and joins torchrun's processes.
    cuda: whether the experiment could use a GPU."""
    need(args.dataset in DATASETS, "--dataset", repr(args.dataset), f"one of {', '.join(DATASETS)}")
    for name, value in (defaults or {}).get(args.dataset, {}).items():
        if getattr(args, name) is None:
            setattr(args, name, value)
    need(args.image_size is None or (_reads_folder(args) and args.image_size >= 1), "--image-size", args.image_size,
         "at least 1, and is for imagefolder alone")
    if args.device == "auto":
        args.device = "cuda" if cuda and torch.cuda.is_available() else "cpu"
        if not cuda and torch.cuda.is_available():
            print(f"note: on the CPU; a GPU is here, but {NO_CUDA}", file=sys.stderr)
    if args.device == "cuda" and PROCESSES > 1:
        args.device = f"cuda:{os.environ['LOCAL_RANK']}"
    try:
        device = torch.device(args.device)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError, ImportError) as error:
        fail(f"argument --device: {args.device!r} cannot be used ({str(error).splitlines()[0][:100]}); try cpu")
    need(device.type in ("cpu", "cuda"), "--device", repr(args.device), "auto, cpu or cuda")
    need(cuda or device.type == "cpu", "--device", args.device, f"cpu, since {NO_CUDA}")
    if PROCESSES > 1 and not torch.distributed.is_initialized():
        if device.type == "cuda":
            torch.cuda.set_device(device)
        both = device.type == "cuda" and torch.distributed.is_nccl_available()
        # Processes that share out runs wait for one another as long as a run takes.
        torch.distributed.init_process_group("cpu:gloo,cuda:nccl" if both else "gloo",
                                             timeout=datetime.timedelta(days=30))
    need(not args.tensorboard or importlib.util.find_spec("tensorboard"), "--tensorboard", "it",
         "installed first: pip install tensorboard")


def load_data(dataset, data_dir, image_size=None):
    """(train images, train labels, test images, test labels, classes): uint8 (n, channels, height, width), int64.

    digits (every fifth image is test) comes with this repository; the torchvision sets are read from data_dir and
    downloaded into it where they are absent; imagefolder is any data_dir/{train,test}/<class>/ tree of images, decoded
    once, mixed (it comes by class) and cached beside it, resized to image_size (default: the first image's). Bad data:
    one line and exit 2. Of torchrun's processes the first of a machine goes ahead, since it may have to download.
    """
    follows = PROCESSES > 1 and os.environ["LOCAL_RANK"] != "0"
    if follows:
        torch.distributed.barrier()
    loaded = _load_data(dataset, data_dir, image_size)
    if PROCESSES > 1 and not follows:
        torch.distributed.barrier()
    return loaded


def _load_data(dataset, data_dir, image_size):
    if dataset == "digits":
        digits = np.load(pathlib.Path(__file__).parent / "data" / "digits.npz")
        images, labels = torch.from_numpy(digits["images"])[:, None], torch.from_numpy(digits["labels"]).long()
        test = torch.arange(len(labels)) % 5 == 4
        return images[~test], labels[~test], images[test], labels[test], 10
    if dataset == "imagefolder":
        return _image_folder(pathlib.Path(data_dir), image_size)
    from torchvision import datasets

    name = {"mnist": "MNIST", "fashion-mnist": "FashionMNIST", "cifar10": "CIFAR10", "cifar100": "CIFAR100"}[dataset]
    split = []
    for train in (True, False):
        try:
            data = getattr(datasets, name)(data_dir, train=train, download=True)
        except Exception as error:   # damaged files raise anything
            fail(f"argument --data-dir: {dataset} in {data_dir} is missing or damaged and could not be downloaded "
                 f"({one_line(error)}); delete damaged files, or name the folder that holds it")
        images, labels = torch.as_tensor(data.data), torch.as_tensor(data.targets).long()
        if len(images) != len(labels) or not 0 <= labels.min() <= labels.max() < CLASSES[dataset]:
            fail(f"argument --data-dir: the images and labels of {dataset} in {data_dir} do not belong together; "
                 "delete them, or name the folder that holds it")
        images = images[:, None] if images.ndim == 3 else images.permute(0, 3, 1, 2)
        split += [images.contiguous(), labels]
    return *split, CLASSES[dataset]


def brightest(images):
    """The largest value of uint8 images, to divide them by; 1 of black ones."""
    return max(1.0, float(images.max()))


def _open_image(path):
    """A file of 8 bits a channel, in RGB."""
    from PIL import Image

    with Image.open(path) as image:
        if image.mode[0] in "IF":   # Pillow would make white of what is brighter than 255
            raise ValueError(f"its mode is {image.mode}: more than 8 bits a channel")
        return image.convert("RGB")


def _image_folder(root, image_size):
    from torchvision import datasets
    from torchvision.transforms.functional import pil_to_tensor

    try:
        splits = [datasets.ImageFolder(root / part, loader=_open_image) for part in ("train", "test")]
    except (OSError, RuntimeError) as error:
        fail(f"argument --data-dir: imagefolder needs {root}/train/<class>/ and {root}/test/<class>/ "
             f"({one_line(error)})")
    if splits[0].classes != splits[1].classes:
        fail(f"argument --data-dir: {root}/train and {root}/test must hold the same classes")
    files = [path for split in splits for path, _ in split.samples]
    try:
        size = (image_size, image_size) if image_size else splits[0].loader(files[0]).size[::-1]
        stamp = "mixed" + "".join(f"{path}{os.stat(path).st_size}{os.stat(path).st_mtime_ns}" for path in files)
    except Exception as error:   # Pillow's, of broken files, are of many kinds
        fail(f"argument --data-dir: an image in {root} cannot be read ({one_line(error)})")
    stamp = hashlib.sha256(os.fsencode(stamp)).hexdigest()[:16]
    cache = root / f"imagefolder-{size[0]}x{size[1]}-{stamp}.pt"
    if cache.exists():
        return *load_checkpoint(cache, "--data-dir")["data"], len(splits[0].classes)
    data = []
    for split in splits:
        try:
            images = torch.empty((len(split), 3, *size), dtype=torch.uint8)
        except RuntimeError:
            fail(f"argument --image-size: {len(split)} images of {size[1]}x{size[0]} pixels do not fit in memory")
        for i, (path, _) in enumerate(split.samples):
            try:
                images[i] = pil_to_tensor(split.loader(path).resize(size[::-1]))
            except Exception as error:
                fail(f"argument --data-dir: {path} is no readable image ({one_line(error)})")
        mixed = torch.randperm(len(split), generator=torch.Generator().manual_seed(0))
        data += [images[mixed], torch.tensor(split.targets)[mixed]]
    if all((images == images[:, :1]).all() for images in data[::2]):   # grey images have one channel
        data[::2] = [images[:, :1].contiguous() for images in data[::2]]
    try:
        save_atomically(cache, lambda path: torch.save({"data": data}, path))
    except OSError as error:
        print(f"note: the decoded images are not cached ({one_line(error)})", file=sys.stderr)
    return *data, len(splits[0].classes)


def one_line(error):
    """An exception as part of one line."""
    return " ".join(f"{type(error).__name__}: {error}".split())[:200]


def save_atomically(path, write):
    """write(temporary path), flush it to disk, rename it to path: a kill leaves the old file or the new one. Where the
    disk is full the old one stays, and Unwritable is raised."""
    temporary = pathlib.Path(f"{path}.tmp")
    try:
        write(temporary)
        with open(temporary, "rb") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except (OSError, RuntimeError) as error:   # the latter is torch.save's
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise Unwritable(f"{path} could not be written ({one_line(error)})") from error


def write_json(path, value):
    save_atomically(path, lambda temporary: temporary.write_text(json.dumps(value, indent=1) + "\n"))


def write_csv(path, rows):
    """Tidy CSV of a list of dicts; the columns are the union of the keys, numbers have six digits, None is empty."""
    columns = list(dict.fromkeys(key for row in rows for key in row))

    def write(temporary):
        with open(temporary, "w", newline="") as file:
            writer = csv.writer(file, lineterminator="\n")
            writer.writerow(columns)
            writer.writerows([f"{v:.6g}" if isinstance(v, float) else v for v in map(row.get, columns)]
                             for row in rows)

    save_atomically(path, write)


def read_csv(path, text):
    """The rows of such a CSV. The columns that text names are strings, all others int, float, or None where empty.
    Raises ValueError where a row is cut or there is none."""
    def value(field):
        return None if field == "" else int(field) if field.lstrip("-").isdecimal() else float(field)

    with open(path, newline="") as file:
        rows = list(csv.DictReader(file))
    if not rows:
        raise ValueError(f"{path} is empty")
    if any(None in row or None in row.values() for row in rows):
        raise ValueError(f"{path} has a row of another length than its head")
    return [{key: field if key in text else value(field) for key, field in row.items()} for row in rows]


@contextlib.contextmanager
def finished_run(directory):
    """`with finished_run(args.plot_only) as directory:` to report from a run's files; one line and exit 2 where that
    fails. Of torchrun's processes the first does it."""
    if RANK:
        sys.exit(0)
    try:
        yield pathlib.Path(directory)
    except Unwritable as error:
        fail(f"argument --plot-only: {error}")
    except (OSError, ValueError, LookupError, TypeError, AttributeError, csv.Error) as error:
        fail(f"argument --plot-only: {directory} holds no finished run, or a damaged one ({one_line(error)})")


def load_checkpoint(path, argument):
    """torch.load of tensors and plain containers alone; one line and exit 2 where the file is no such thing."""
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:   # a file of another kind can raise anything
        fail(f"argument {argument}: {path} is missing, truncated or no checkpoint ({one_line(error)})"
             + "; delete it to start anew" * (argument != "--checkpoint"))


def run_directory(out, default, resume):
    """The directory of this run: out, or default with -2, -3, ... where that exists; a new run never writes into an old
    one's. With resume it is out, or the newest of the default ones."""
    path = pathlib.Path(out or default)
    try:
        taken = [path, *path.parent.glob(f"{path.name}-[0-9]*")] if not out else [path]
        taken = sorted((old for old in taken if (old / "config.json").exists()),   # --plot-only leaves that file alone
                       key=lambda old: os.path.getmtime(old / "config.json"))
        if out and not taken and any((path / kept).exists() for kept in ("done", "seeds")):
            fail(f"argument --out: {path} holds results, but no config.json that says of what; name another directory")
        if resume:
            return taken[-1] if taken else fail(f"argument --resume: there is no run to continue in {path}; leave "
                                                "--resume out to start one")
        if out and taken:
            fail(f"argument --out: {path} holds a run already; add --resume to continue it, or name another directory")
        number = 2
        while not out and path.exists():
            path, number = pathlib.Path(f"{default}-{number}"), number + 1
        path.mkdir(parents=True, exist_ok=True)
        (path / ".writable").touch()
        (path / ".writable").unlink()
    except OSError as error:
        fail(f"argument --out: cannot write into {path} ({one_line(error)}); name another directory")
    return path


def arguments_of(directory):
    """The arguments that the run in this directory was made with; one line and exit 2 where they cannot be read."""
    try:
        return dict(json.loads((directory / "config.json").read_text())["arguments"])
    except (OSError, ValueError, LookupError, TypeError) as error:
        return fail(f"argument --resume: {directory / 'config.json'} is damaged ({one_line(error)}); start another run")


def start_run(args, default, may_differ=()):
    """The directory of this run, with its config.json. A resumed run has the arguments it was made with, but for
    may_differ and what decides no number; otherwise: one line and exit 2. torchrun's processes get one directory.

    A GPU is asked to repeat itself and for full precision; an experiment may ask for something else after this.
    """
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.backends.cudnn.deterministic = True
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    made = [None]
    try:
        if RANK == 0:
            made = [_start_run(args, default, may_differ)]
    finally:   # the others would wait for what the first refuses
        if PROCESSES > 1:
            torch.distributed.broadcast_object_list(made)
    return made[0] or sys.exit(2)


def _start_run(args, default, may_differ):
    out = run_directory(args.out, default, args.resume)
    # torchvision's sets are the same wherever they lie; a folder of images is its own.
    unrecorded = ("out", "resume", "plot_only", "tensorboard", *(() if _reads_folder(args) else ("data_dir",)))
    arguments = {key: value for key, value in vars(args).items() if key not in unrecorded}
    arguments["device"] = torch.device(args.device).type   # torchrun numbers them
    if args.resume:
        was = arguments_of(out)
        other = [f"--{key.replace('_', '-')} {was.get(key)}" for key, value in arguments.items()
                 if key not in may_differ and was.get(key) != value]
        if other:
            fail(f"argument --resume: {out} is a run of another configuration, made with {', '.join(other)}")
        if was == arguments:
            return out
    write_json(out / "config.json", {"arguments": arguments, "command": " ".join(sys.argv),
                                     **environment(torch.device(args.device))})
    return out


def work(pieces, do, out, workers=1, share=True):
    """{name: do(*piece)} of pieces, {name: piece}; results are lists and dicts of numbers and strings.

    A result is kept in out/done/NAME.json as soon as it is there, and is not worked out again. torchrun's processes
    share the pieces, or, with share=False, work on each together. `workers` threads, each with one CPU thread of
    PyTorch's, where do spends its time in large operations.
    """
    (out / "done").mkdir(exist_ok=True)
    paths = {name: out / "done" / f"{name}.json" for name in pieces}

    left = [name for name in pieces if not paths[name].exists()]
    if PROCESSES > 1:
        torch.distributed.barrier()   # all have looked before one is done

    def one(name):
        result = do(*pieces[name])
        if share or RANK == 0:
            write_json(paths[name], result)

    mine = left[RANK::PROCESSES] if share else left
    with concurrent.futures.ThreadPoolExecutor(workers, initializer=torch.set_num_threads, initargs=(1,)) as pool:
        through = pool.map if workers > 1 else map
        for _ in tqdm(through(one, mine), total=len(mine), disable=None if RANK == 0 else True):
            pass
    if PROCESSES > 1:
        torch.distributed.barrier()
    found = {}
    for name, path in paths.items():
        try:
            found[name] = json.loads(path.read_text())
            if not found[name]:
                raise ValueError("it is empty")
        except ValueError as error:
            fail(f"argument --resume: {path} is damaged ({one_line(error)}); delete it to have it worked out again")
    return found


def first_process():
    """Leaves torchrun's other processes; whether this is the first of them, which writes the results."""
    if PROCESSES > 1:
        torch.distributed.barrier()
        torch.distributed.destroy_process_group()
    return RANK == 0


def interval(values):
    """[mean, low, high]: Student's 95 % interval; low and high are None for one value, all for none."""
    values = [value for value in values if value is not None]
    if len(values) < 2:
        return [*values, None, None, None][:3]
    mean, freedom = statistics.fmean(values), len(values) - 1
    student = STUDENT[freedom - 1] if freedom <= len(STUDENT) else 1.96 + 2.65 / freedom
    half = student * statistics.stdev(values) / math.sqrt(len(values))
    return [mean, mean - half, mean + half]


def environment(device):
    """What a result depends on besides the arguments, for config.json."""
    try:
        commit = subprocess.run(["git", "describe", "--always", "--dirty"], cwd=pathlib.Path(__file__).parent,
                                capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        commit = None
    name = (torch.cuda.get_device_name(device) if device.type == "cuda" else
            f"{torch.get_num_threads()} CPU threads, {torch.backends.cpu.get_cpu_capability()}")
    return {"python": sys.version.split()[0], "torch": torch.__version__, "device": name, "git_commit": commit}


def seed_of(*key):
    """A seed for every key, so that no draw depends on which others were made."""
    return int.from_bytes(hashlib.sha256(repr(key).encode()).digest()[:7], "little")


def log_to_tensorboard(directory, points):
    """points: (name, value, step); those without a value are left out."""
    from torch.utils.tensorboard import SummaryWriter

    with SummaryWriter(directory / "tensorboard") as board:
        for name, value, step in points:
            if value is not None:
                board.add_scalar(name, value, step)


def save_figure(figure, path):
    save_atomically(path, lambda temporary: figure.savefig(temporary, format="png"))
    plot_style().close(figure)


def plot_style():
    """matplotlib without a display, in this project's style; returns pyplot."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    plt.rcParams.update({"figure.dpi": 120, "axes.grid": True, "grid.alpha": 0.3, "axes.spines.top": False,
                         "axes.spines.right": False, "legend.frameon": False, "font.size": 9})
    return plt
