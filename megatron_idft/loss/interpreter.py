"""Triton's interpreter, which runs the kernels on the CPU in tests, beside today's numpy."""

from typing import Any


def read_loop_bounds_by_item() -> None:
    """Make interpreted loops of Triton before 3.7 work with numpy 2.4 and newer.

    A loop bound is an array of one element there, and `int` of such an array is an error since numpy 2.4. Triton 3.7
    reads its element, as this does. Patched: `_patch_lang_tensor` of triton/runtime/interpreter.py.
    """
    from triton.runtime import interpreter

    patch_tensor = interpreter._patch_lang_tensor

    def patch_and_read_by_item(tensor: Any, *scope: Any) -> None:
        patch_tensor(tensor, *scope)
        tensor.__index__ = lambda self: int(self.handle.data.item())

    interpreter._patch_lang_tensor = patch_and_read_by_item
