"""Builds ordered_reduce/_C: with the CUDA kernels where PyTorch and nvcc can build them, else for the CPU alone.

ORDERED_REDUCE_CUDA=0 leaves the CUDA kernels out, =1 makes their absence an error. TORCH_CUDA_ARCH_LIST chooses the
targets, from 8.0 on; "8.0;9.0+PTX" unless set.
"""

import os
import re
import shutil
import subprocess
import sys

from setuptools import setup


def toolkit():
    """The folder of the CUDA toolkit, or None. nvcc on PATH may be a wrapper, so it is asked where it lives."""
    if os.environ.get("CUDA_HOME"):
        return os.environ["CUDA_HOME"]
    nvcc = shutil.which("nvcc") or shutil.which("/usr/local/cuda/bin/nvcc")
    if nvcc is None:
        return None
    said = subprocess.run([nvcc, "--dryrun", "-x", "cu", "-c", os.devnull], capture_output=True, text=True).stderr
    top = re.search(r"^#\$ TOP=(.+)$", said, re.MULTILINE)
    return os.path.realpath(top.group(1)) if top else None


def release(home):
    """The toolkit's version, such as "13.0"; "" where its nvcc does not run."""
    try:
        said = subprocess.run([os.path.join(home, "bin", "nvcc"), "--version"], capture_output=True, text=True).stdout
    except OSError:
        return ""
    return "".join(re.findall(r"release ([\d.]+)", said))


home = toolkit()
if home:
    os.environ["CUDA_HOME"] = home   # read by torch.utils.cpp_extension when it is imported
os.environ.setdefault("TORCH_CUDA_ARCH_LIST", "8.0;9.0+PTX")

import torch  # noqa: E402
from torch.utils.cpp_extension import BuildExtension, CppExtension, CUDAExtension  # noqa: E402

wanted = os.environ.get("ORDERED_REDUCE_CUDA", "auto")
missing = ("nvcc was not found" if home is None else
           "this PyTorch is built without CUDA" if torch.version.cuda is None else
           f"{home} is CUDA {version or 'without nvcc'}, and this PyTorch is built for CUDA {torch.version.cuda}"
           if (version := release(home)).split(".")[0] != torch.version.cuda.split(".")[0] else
           "ORDERED_REDUCE_CUDA=0" if wanted == "0" else None)
if missing and wanted == "1":
    sys.exit(f"ORDERED_REDUCE_CUDA=1, but {missing}")
cuda = missing is None
if cuda and (old := re.findall(r"\b[1-7]\.\d|Kepler|Maxwell|Pascal|Volta|Turing", os.environ["TORCH_CUDA_ARCH_LIST"])):
    sys.exit(f"TORCH_CUDA_ARCH_LIST names {old[0]}; CUDA kernels need 8.0 (ORDERED_REDUCE_CUDA=0 leaves them out)")

# No contraction of a*b+c and no fast-math: the additions written in order.h are the additions performed.
# TORCH_TARGET_VERSION keeps to the stable ABI of PyTorch 2.11, whatever PyTorch this is built against. -g0 takes back
# Python's own -g, which doubles the time.
target = ["-DTORCH_TARGET_VERSION=0x020b000000000000", "-std=c++20", "-O3"]
openmp = ["-fopenmp"] if sys.platform == "linux" else []   # backward.cpp; elsewhere its bits may depend on the threads
flags = {"cxx": [*target, "-g0", "-ffp-contract=off", *openmp, *(["-DUSE_CUDA", "-DORDERED_CUDA"] if cuda else [])],
         "nvcc": [*target, "-DUSE_CUDA", "-DORDERED_CUDA", "-fmad=false"]}
extension = (CUDAExtension if cuda else CppExtension)(
    "ordered_reduce._C",
    ["ops.cpp", "cpu.cpp", "exact.cpp", "backward.cpp", *(["cuda.cu", "segments.cu"] if cuda else [])],
    depends=["order.h", "exact.h", "ops.h", "require.h", "sort.h", "twice.h", "launch.h"],
    extra_compile_args=flags,
    extra_link_args=openmp,
    py_limited_api=True,
)


class Build(BuildExtension):
    def run(self):
        super().run()
        if cuda:
            note = f"built with CUDA kernels for {os.environ['TORCH_CUDA_ARCH_LIST']} (toolkit {home})"
        else:
            note = f"CPU-ONLY BUILD, because {missing}. CUDA tensors will raise an error."
        line = "=" * (len(note) + 16)
        text = f"\n{line}\nordered_reduce: {note}\n{line}\n"
        print(text, file=sys.stderr)
        try:   # pip hides a build's output; the terminal shows it all the same
            with open("/dev/tty", "w") as terminal:
                terminal.write(text)
        except OSError:
            pass


# The file is for CPython 3.10 and later (torch.utils.cpp_extension's choice), and so is a wheel that holds it.
setup(ext_modules=[extension], cmdclass={"build_ext": Build}, options={"bdist_wheel": {"py_limited_api": "cp310"}})
