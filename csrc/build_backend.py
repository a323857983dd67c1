"""Lets `pip install -e csrc` build against the PyTorch that is already installed.

pip builds in an empty environment of its own, in which torch would have to be downloaded once more. This backend
appends the site-packages of the environment that pip runs for, then behaves as setuptools does.
"""

import os
import sys
import sysconfig

# Inside pip's build environment sys.prefix is still that of the environment being installed into.
sys.path += [path for path in {sysconfig.get_path("purelib"), sysconfig.get_path("platlib")} if path not in sys.path]
# setup.py and ninja are started as children of this process.
os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [os.environ.get("PYTHONPATH"), sysconfig.get_path("purelib")]))

try:
    import torch  # noqa: F401
except ImportError as error:
    sys.exit(f"ordered_reduce is built against an installed PyTorch, and none can be imported ({error}): "
             "run `pip install -r requirements.txt` first")

from setuptools.build_meta import *  # noqa: F403
