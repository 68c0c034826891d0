"""Speeds up Triton's interpreter, in which kernels run where there is no GPU.

The operations stay the interpreter's own. What it does around them is done once, or in bulk.
"""

import functools
import inspect

import numpy as np
import triton.language as tl
from triton.runtime import interpreter


def speed_up():
    """Replace the interpreter's slowest functions in this process, from now on."""
    if not hasattr(interpreter, "_LangPatchScope"):
        return  # a version of Triton that is built otherwise
    interpreter._get_np_dtype = numpy_dtypes(interpreter._get_np_dtype)
    interpreter._patch_builtin = patch_builtins
    patch_once_a_launch()
    interpreter.ScanOps.generic_scan = scan


def numpy_dtypes(of):
    """`of`, which builds a table at each call, remembering its results."""
    of = functools.cache(of)

    def numpy_dtype(dtype):
        is_pointer = isinstance(dtype.scalar, tl.pointer_type)
        return np.dtype(np.uint64) if is_pointer else of(dtype.scalar)

    return numpy_dtype


@functools.cache
def builtins(package):
    members = inspect.getmembers(package)
    return [(name, member) for name, member in members if tl.core.is_builtin(member)]


def patch_builtins(package, builder, scope):
    """Patch what the interpreter would find in the package by looking at every member again."""
    for name, member in builtins(package):
        interpreter._patch_attr(package, name, member, builder, scope)


def patch_once_a_launch():
    """The interpreter patches `triton.language` at every call of one jitted function by another."""
    patch, restore = interpreter._patch_lang, interpreter._LangPatchScope.restore
    patched = set()

    @functools.cache
    def languages(function):
        return frozenset({"tl", "core"} & function.__globals__.keys())

    def patch_new(function):
        if languages(function) in patched:
            return None  # what a launch restores is in the scope of its kernel, its first function
        patched.add(languages(function))
        return patch(function)

    def restore_all(scope):
        patched.clear()
        restore(scope)

    interpreter._patch_lang = patch_new
    interpreter._LangPatchScope.restore = restore_all


def scan(self, inputs):
    """An associative scan in log2(n) steps of whole blocks, as on a device.

    The interpreter's own combines element by element.
    """
    data = inputs[0].handle.data
    n = data.shape[self.axis]
    place = np.arange(n).reshape([-1 if i == self.axis else 1 for i in range(data.ndim)])
    step = 1
    while step < n:
        earlier = [self.to_tensor(np.roll(x.handle.data, step, self.axis), x.dtype) for x in inputs]
        both = self.combine_fn.fn(*earlier, *inputs)
        both = both if isinstance(both, tuple) else (both,)
        inputs = [
            self.to_tensor(np.where(place >= step, new.handle.data, old.handle.data), old.dtype)
            for new, old in zip(both, inputs)
        ]
        step *= 2
    return inputs
