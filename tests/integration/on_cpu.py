"""Run a Megatron script behind the CPU shim: `on_cpu.py SCRIPT <its flags>`."""

import runpy
import sys

from megatron_idft.integration.platform import cpu

cpu.enable()
script = sys.argv[1]
sys.argv = [script, *cpu.add_flags(sys.argv[2:], "on_cpu")]
runpy.run_path(script, run_name="__main__")
