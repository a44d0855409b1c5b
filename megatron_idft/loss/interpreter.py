"""Triton's interpreter, which runs the kernels on the CPU in tests, beside today's numpy and in half of the time."""

from typing import Any


def read_loop_bounds_by_item() -> None:
    """Make interpreted loops of Triton before 3.7 work with numpy 2.4 and newer.

    A loop bound is an array of one element there, and `int` of such an array is an error since numpy 2.4. Triton 3.7
    reads its element, as this does. Patched: `_patch_lang_tensor` of triton/runtime/interpreter.py.
    """
    from triton.runtime import interpreter  # noqa: PLC0415  with TRITON_INTERPRET=1 only

    patch_tensor = interpreter._patch_lang_tensor

    def patch_and_read_by_item(tensor: Any, *scope: Any) -> None:
        patch_tensor(tensor, *scope)
        tensor.__index__ = lambda self: int(self.handle.data.item())

    interpreter._patch_lang_tensor = patch_and_read_by_item


def patch_language_once_per_launch() -> None:
    """Skip what the interpreter does again at every call of a device function, for half of a launch's time.

    It replaces the functions of `triton.language` by interpreted ones at a launch, and looks through all of them anew
    when the kernel calls a device function. Of a module whose functions it has replaced in this launch nothing is left
    to do. Patched: `_patch_lang` and `GridExecutor.__call__` of triton/runtime/interpreter.py.
    """
    from triton.runtime import interpreter  # noqa: PLC0415  with TRITON_INTERPRET=1 only

    patch_lang, launch = interpreter._patch_lang, interpreter.GridExecutor.__call__
    patched: set[int] = set()

    def patch_lang_once(function: Any) -> Any:
        module = id(function.__globals__)
        if module in patched:
            return None  # only the launch, which comes first, asks for a scope to restore
        patched.add(module)
        return patch_lang(function)

    def launch_anew(self: Any, *args: Any, **kwargs: Any) -> None:
        patched.clear()
        launch(self, *args, **kwargs)

    interpreter._patch_lang = patch_lang_once
    interpreter.GridExecutor.__call__ = launch_anew
