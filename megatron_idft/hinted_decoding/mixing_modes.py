"""The modes of mixing.py, for the flags that name them: without torch."""

from typing import Literal, get_args

MixingMode = Literal["linear", "sigmoid", "piecewise", "fixed"]
MIXING_MODES: tuple[MixingMode, ...] = get_args(MixingMode)
