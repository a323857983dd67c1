"""common.py: its loaders, on small files in the original formats, its run directory, and the pieces of a run."""

import argparse
import csv
import gzip
import hashlib
import os
import pathlib
import pickle
import struct

import numpy as np
import ordered_reduce
import pytest
import torch
from PIL import Image
from torchvision import datasets

import common


def md5(path):
    return hashlib.md5(path.read_bytes()).hexdigest()


@pytest.fixture
def cifar(tmp_path, monkeypatch):
    """Writes CIFAR-10 or CIFAR-100 as its authors do, ten images a file, and tells torchvision the checksums."""
    def write(name):
        cls, folder = {"cifar10": (datasets.CIFAR10, "cifar-10-batches-py"), "cifar100": (datasets.CIFAR100, "cifar-100-python")}[name]
        (tmp_path / folder).mkdir()
        random, label = np.random.default_rng(0), "labels" if name == "cifar10" else "fine_labels"
        contents = {}
        for part in ("train_list", "test_list"):
            entries = []
            for file, _ in getattr(cls, part):
                images = random.integers(0, 256, (10, 3072), dtype=np.uint8)
                labels = random.integers(0, common.CLASSES[name], 10).tolist()
                (tmp_path / folder / file).write_bytes(pickle.dumps({"data": images, label: labels}, protocol=2))
                entries.append([file, md5(tmp_path / folder / file)])
                contents.setdefault(part, []).append((images.reshape(10, 3, 32, 32), labels))
            monkeypatch.setattr(cls, part, entries)
        key = cls.meta["key"]
        meta = tmp_path / folder / cls.meta["filename"]
        meta.write_bytes(pickle.dumps({key: [f"class {i}" for i in range(common.CLASSES[name])]}, protocol=2))
        monkeypatch.setattr(cls, "meta", {**cls.meta, "md5": md5(meta)})
        return contents, tmp_path / folder / cls.test_list[0][0]
    return write


@pytest.mark.parametrize("name", ["cifar10", "cifar100"])
def test_cifar(cifar, tmp_path, name):
    contents, _ = cifar(name)
    images, labels, test_images, test_labels, classes = common.load_data(name, tmp_path)
    assert classes == common.CLASSES[name] and images.dtype == torch.uint8 and labels.dtype == torch.int64
    for part, x, y in (("train_list", images, labels), ("test_list", test_images, test_labels)):
        assert np.array_equal(x.numpy(), np.concatenate([pictures for pictures, _ in contents[part]]))
        assert y.tolist() == sum((numbers for _, numbers in contents[part]), [])


@pytest.mark.parametrize("damage", ["missing", "truncated", "changed"])
def test_damaged_cifar_is_one_line(cifar, tmp_path, capsys, monkeypatch, damage):
    _, file = cifar("cifar10")
    monkeypatch.setattr(datasets.CIFAR10, "url", "http://127.0.0.1:9/cifar.tar.gz")   # no network
    content = file.read_bytes()
    file.unlink() if damage == "missing" else file.write_bytes(content[:100] if damage == "truncated" else b"x" + content[1:])
    with pytest.raises(SystemExit) as stop:
        common.load_data("cifar10", tmp_path)
    message = capsys.readouterr().err.strip()
    assert stop.value.code == 2 and len(message.splitlines()) == 1
    assert "--data-dir" in message and "cifar10" in message and str(tmp_path) in message


@pytest.mark.parametrize("name", ["mnist", "fashion-mnist"])
def test_idx_files(tmp_path, capsys, name):
    raw = tmp_path / {"mnist": "MNIST", "fashion-mnist": "FashionMNIST"}[name] / "raw"
    raw.mkdir(parents=True)
    expected = []
    for part, n in (("train", 12), ("t10k", 5)):
        images = np.random.default_rng(n).integers(0, 256, (n, 28, 28), dtype=np.uint8)
        labels = np.arange(n, dtype=np.uint8) % 10
        for kind, array, magic in (("images-idx3", images, 2051), ("labels-idx1", labels, 2049)):
            header = struct.pack(f">{1 + array.ndim}i", magic, *array.shape)
            (raw / f"{part}-{kind}-ubyte").write_bytes(header + array.tobytes())
            with gzip.open(raw / f"{part}-{kind}-ubyte.gz", "wb") as file:
                file.write(header + array.tobytes())
        expected += [images[:, None], labels]
    got = common.load_data(name, tmp_path)
    assert all(np.array_equal(a.numpy(), b) for a, b in zip(got[:4], expected, strict=True))
    images, labels = (raw / f"t10k-{kind}-ubyte" for kind in ("images-idx3", "labels-idx1"))
    whole, right = (gzip.decompress(pathlib.Path(f"{path}.gz").read_bytes()) for path in (images, labels))
    for wrong_images, wrong_labels, said in (
            (b"\0\0\x08\x03\0\0\0\x05short", right, "damaged"), (gzip.compress(whole), right, "damaged"),
            (whole, b"<html>", "damaged"), (whole, right[:-1] + b"\xc8", "do not belong together"),
            (b"\0\0\x08\x03" + struct.pack(">iii", len(right) - 9, 28, 28) + bytes(784 * (len(right) - 9)), right,
             "do not belong together")):
        images.write_bytes(wrong_images), labels.write_bytes(wrong_labels)
        with pytest.raises(SystemExit) as stop:
            common.load_data(name, tmp_path)
        error = capsys.readouterr().err
        assert stop.value.code == 2 and said in error and len(error.splitlines()) == 1


def test_digits():
    images, labels, test_images, test_labels, classes = common.load_data("digits", None)
    assert images.shape == (1438, 1, 8, 8) and test_images.shape == (359, 1, 8, 8) and classes == 10
    assert torch.cat([images, test_images]).max() == 16 and torch.cat([labels, test_labels]).bincount().min() == 174


@pytest.mark.parametrize("mode,channels", [("RGB", 3), ("L", 1)])
def test_image_folder(tmp_path, capsys, mode, channels):
    random = np.random.default_rng(0)
    for part, n in (("train", 6), ("test", 3)):
        for name in ("cat", "dog"):
            (tmp_path / part / name).mkdir(parents=True)
            for i in range(n):
                pixels = random.integers(0, 256, (12, 10, 3)[: 3 if mode == "RGB" else 2], dtype=np.uint8)
                Image.fromarray(pixels).save(tmp_path / part / name / f"{i}.png")
    images, labels, test_images, test_labels, classes = common.load_data("imagefolder", tmp_path)
    assert images.shape == (12, channels, 12, 10) and test_images.shape == (6, channels, 12, 10) and classes == 2
    assert sorted(labels.tolist()) == [0] * 6 + [1] * 6 != labels.tolist()   # mixed: a part of it has all classes
    dog = np.asarray(Image.open(tmp_path / "test" / "dog" / "2.png")).reshape(12, 10, channels).transpose(2, 0, 1)
    assert [label for image, label in zip(test_images.numpy(), test_labels, strict=True)
            if np.array_equal(image, dog)] == [1]
    assert len(list(tmp_path.glob("imagefolder-*.pt"))) == 1               # decoded once
    again = common.load_data("imagefolder", tmp_path)
    assert torch.equal(again[0], images) and len(list(tmp_path.glob("imagefolder-*.pt"))) == 1
    assert common.load_data("imagefolder", tmp_path, 8)[0].shape == (12, channels, 8, 8)
    (tmp_path / "test" / "dog" / "9.png").write_bytes(b"not an image")
    with pytest.raises(SystemExit) as stop:
        common.load_data("imagefolder", tmp_path)
    assert stop.value.code == 2 and "9.png" in capsys.readouterr().err
    (tmp_path / "test" / "dog" / "9.png").unlink()
    for damage in (lambda path: path.write_bytes(b"not an image"), lambda path: path.unlink() or path.symlink_to("/nowhere")):
        damage(tmp_path / "train" / "cat" / "0.png")
        with pytest.raises(SystemExit) as stop:
            common.load_data("imagefolder", tmp_path)
        error = capsys.readouterr().err
        assert stop.value.code == 2 and "cannot be read" in error and error.count("\n") == 1


@pytest.mark.parametrize("name", ["a", "b"])
def test_a_broken_chunk_is_one_line(tmp_path, capsys, name):   # Pillow raises a SyntaxError
    for part in ("train", "test"):
        (tmp_path / part / "cat").mkdir(parents=True)
        for each in "ab":
            Image.fromarray(np.zeros((4, 4, 3), np.uint8)).save(tmp_path / part / "cat" / f"{each}.png")
    broken = tmp_path / "train" / "cat" / f"{name}.png"
    data = bytearray(broken.read_bytes())
    at = data.index(b"IDAT")
    data[at - 4:at] = (5).to_bytes(4, "big")
    broken.write_bytes(data)
    with pytest.raises(SystemExit) as stop:
        common.load_data("imagefolder", tmp_path)
    assert stop.value.code == 2 and ("cannot be read" if name == "a" else "b.png") in capsys.readouterr().err


def test_images_of_sixteen_bits_are_refused(tmp_path, capsys):
    for part in ("train", "test"):
        (tmp_path / part / "cat").mkdir(parents=True)
        Image.fromarray(np.full((4, 4), 30000, np.uint16)).save(tmp_path / part / "cat" / "a.png")
    with pytest.raises(SystemExit) as stop:
        common.load_data("imagefolder", tmp_path, 4)
    error = capsys.readouterr().err
    assert stop.value.code == 2 and "a.png" in error and "8 bits" in error


def test_what_does_not_fit_is_one_line(tmp_path, capsys):
    for part in ("train", "test"):
        (tmp_path / part / "cat").mkdir(parents=True)
        Image.fromarray(np.zeros((4, 4, 3), np.uint8)).save(tmp_path / part / "cat" / "a.png")
    with pytest.raises(SystemExit) as stop:
        common.load_data("imagefolder", tmp_path, 10**7)
    assert stop.value.code == 2 and "--image-size" in capsys.readouterr().err


def test_a_full_disk_leaves_the_old_file(tmp_path, capsys):
    path = tmp_path / "file"
    path.write_text("old")

    def write(temporary):
        temporary.write_text("half of it")
        raise RuntimeError("unexpected pos")   # torch.save's

    with pytest.raises(SystemExit) as stop:
        common.run(lambda: common.save_atomically(path, write))
    error = capsys.readouterr().err
    assert stop.value.code == 2 and "--resume" in error and error.count("\n") == 1
    assert path.read_text() == "old" and list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("kept", ["done", "seeds"])
def test_results_of_another_run_are_not_taken_for_new(tmp_path, capsys, kept):
    (tmp_path / kept).mkdir()
    for resume in (False, True):
        with pytest.raises(SystemExit) as stop:
            common.run_directory(tmp_path, "", resume)
        assert stop.value.code == 2 and "no config.json" in capsys.readouterr().err
    (tmp_path / "config.json").touch()
    with pytest.raises(SystemExit) as stop:
        common.run_directory(tmp_path, "", False)
    assert stop.value.code == 2 and "holds a run already" in capsys.readouterr().err
    with pytest.raises(SystemExit) as stop:
        common.run_directory(tmp_path / ("a" * 300), "", False)
    assert stop.value.code == 2 and "cannot write into" in capsys.readouterr().err


def test_the_newest_run_is_not_the_one_drawn_last(tmp_path):
    for number, name in enumerate(("digits", "digits-2")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text("{}")
        os.utime(tmp_path / name / "config.json", (number, number))
    (tmp_path / "digits" / "figure.png").touch()
    assert common.run_directory(None, tmp_path / "digits", True) == tmp_path / "digits-2"


@pytest.mark.parametrize("dataset,figure2,own", [("mnist", None, False), ("imagefolder", None, True),
                                                 ("digits", ["mnist", "cifar10"], False), ("digits", ["digits", "imagefolder"], True)])
def test_a_run_is_of_one_folder_of_images(tmp_path, capsys, dataset, figure2, own):
    def start(data_dir, resume):
        return common.start_run(argparse.Namespace(dataset=dataset, figure2=figure2, data_dir=data_dir, device="cpu",
                                                   out=tmp_path / "run", resume=resume), "")

    assert start("here", False) == start("here", True) == tmp_path / "run"
    if own:
        with pytest.raises(SystemExit):
            start("there", True)
        assert "made with --data-dir here" in capsys.readouterr().err
    else:
        assert start("there", True) == tmp_path / "run"


def test_processes_share_out_what_is_left(tmp_path, monkeypatch):
    """The second of two processes, where the first and third of four pieces were done before."""
    (tmp_path / "done").mkdir()
    for name in "ac":
        common.write_json(tmp_path / "done" / f"{name}.json", [0])
    monkeypatch.setattr(common, "RANK", 1)
    monkeypatch.setattr(common, "PROCESSES", 2)
    monkeypatch.setattr(torch.distributed, "barrier", lambda: common.write_json(tmp_path / "done" / "b.json", [1]))
    did = []
    found = common.work({name: (name,) for name in "abcd"}, lambda name: did.append(name) or [2], tmp_path)
    assert did == ["d"] and found == {"a": [0], "b": [1], "c": [0], "d": [2]}


def test_too_little_memory_is_one_line(capsys):
    for allocate in (lambda: torch.empty(1 << 60), lambda: ordered_reduce.sum(torch.zeros(1, 1).expand(1 << 45, 2), 1)):
        with pytest.raises(SystemExit) as stop:
            common.run(allocate)
        error = capsys.readouterr().err
        assert stop.value.code == 2 and "not enough memory" in error and error.count("\n") == 1
    with pytest.raises(RuntimeError, match="another"):
        common.run(lambda: exec("raise RuntimeError('another')"))


def test_one_process_draws_again(monkeypatch):
    monkeypatch.setattr(common, "RANK", 1)
    with pytest.raises(SystemExit) as stop, common.finished_run("anywhere"):
        raise AssertionError
    assert stop.value.code == 0


@pytest.mark.parametrize("error, said", [(csv.Error("field larger than field limit"), "damaged"),
                                         (common.Unwritable("a.png could not be written"), "--plot-only: a.png")])
def test_what_hinders_a_drawing_is_one_line(capsys, error, said):
    with pytest.raises(SystemExit) as stop, common.finished_run("anywhere"):
        raise error
    found = capsys.readouterr().err
    assert stop.value.code == 2 and said in found and len(found.splitlines()) == 1


def test_ctrl_c_outside_of_training_is_one_line(capsys):
    def main():
        raise KeyboardInterrupt

    with pytest.raises(SystemExit) as stop:
        common.run(main)
    assert stop.value.code == 130 and capsys.readouterr().err.endswith("interrupted\n")
    with pytest.raises(SystemExit) as stop:
        common.run(lambda: 3)
    assert stop.value.code == 3
