"""``python -m tests.examples.installed SCRIPT ARGUMENTS...``: a script that calls ``dip_megatron.install()`` first."""

import runpy
import sys

import dip_megatron
from dip_megatron.megatron.cpu import install_cpu_platform

install_cpu_platform()
dip_megatron.install()
del sys.argv[0]
runpy.run_path(sys.argv[0], run_name="__main__")
