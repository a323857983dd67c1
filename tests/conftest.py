import pathlib
import subprocess
import sys

import ordered_reduce
import pytest
import torch

ROOT = pathlib.Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))   # constnet, common

GPU = torch.cuda.is_available() and ordered_reduce.cuda_built()
cuda = pytest.param("cuda", marks=pytest.mark.skipif(
    not GPU, reason="needs a CUDA device" if ordered_reduce.cuda_built() else "ordered_reduce is a CPU-only build"))


@pytest.fixture(params=["cpu", cuda])
def device(request):
    return request.param


@pytest.fixture(autouse=True)
def deterministic_cudnn(monkeypatch):
    """Else the library's partial gradients may differ from run to run before their order of additions matters."""
    monkeypatch.setattr(torch.backends.cudnn, "deterministic", True)
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)


@pytest.fixture
def run():
    """run("constnet.py", "--epochs", 1, ...) -> the finished process, its output as text; processes: torchrun's."""
    def run(script, *arguments, processes=1, **options):
        several = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
        return subprocess.run([sys.executable, *(several if processes > 1 else ()), str(ROOT / script),
                               *map(str, arguments)], capture_output=True, text=True, timeout=600, **options)
    return run
