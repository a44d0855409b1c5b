"""Print Megatron's own flags, one on each line."""

import argparse

from megatron.training.arguments import add_megatron_arguments

parser = add_megatron_arguments(argparse.ArgumentParser(allow_abbrev=False))
print(*(name for action in parser._actions for name in action.option_strings), sep="\n")
