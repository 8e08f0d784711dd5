"""Where a kernel can run on this machine, and the checks every kernel makes before launch.

Triton kernels run in one of two ways:

- ``"gpu"``: compiled for the GPU that torch sees.
- ``"interpreter"``: each program is executed by NumPy on the CPU.  Slow, exact,
  and the loads and stores are the real ones, so correctness can be tested anywhere.

Triton chooses between them when *Triton itself* is imported, because its library
functions are decorated then.  Setting ``TRITON_INTERPRET=1`` later leaves half of
it compiled; several parts of torch (``torch.utils.flop_counter``, ``torch._dynamo``)
import Triton on their own.

Imports: labkit.errors only; torch and Triton on use.
"""

from __future__ import annotations

import os
import sys
from dataclasses import replace
from functools import cache, wraps
from importlib.util import find_spec

from labkit.errors import ArgumentError, MissingDependencyError, NoGpuError

__all__ = ["backend", "require_triton", "use_interpreter_if_no_gpu"]

_HOW = (
    "set TRITON_INTERPRET=1 in the environment before Python starts, or call "
    "labkit.kernels.use_interpreter_if_no_gpu() before anything imports Triton "
    "(in a notebook: restart the kernel and run the set-up cell first)"
)


def require_triton(what: str = "this kernel") -> None:
    """Raise unless torch and Triton are installed.

    Parameters
    ----------
    what : name of the thing that needs them, for the message.

    Raises
    ------
    MissingDependencyError
        naming the missing package, how to install it, and what works without it.
    """
    for package, advice in (
        ("torch", "pip install torch"),
        ("triton", "pip install triton (wheels exist for Linux only)"),
    ):
        if find_spec(package) is None:
            raise MissingDependencyError(
                f"{what} needs {package}, which is not installed: {advice}. Without it you still "
                "have the memory and roofline models, the explorers and the recorded figures; with "
                "torch but no Triton also labkit.naive, labkit.memory.measure and labkit.timing."
            )


@cache
def _gpu_visible() -> bool:
    import torch

    return torch.cuda.is_available()


def use_interpreter_if_no_gpu() -> bool:
    """Switch Triton's interpreter on when torch sees no GPU; call it before Triton is imported.

    Returns
    -------
    bool
        True when kernels will run in the interpreter, False when they will be
        compiled or when torch or Triton is not installed.

    Raises
    ------
    NoGpuError
        if there is no GPU and Triton was imported already without the interpreter.
    """
    if find_spec("torch") is None or find_spec("triton") is None:
        return False
    if "triton" in sys.modules:
        if _interpreter_on():
            return True
        if _gpu_visible():
            return False
        raise NoGpuError(f"Triton was imported before its interpreter was switched on: {_HOW}.")
    if not _gpu_visible():
        os.environ["TRITON_INTERPRET"] = "1"
    return os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "on", "yes", "y")


def _interpreter_on() -> bool:
    # Read off what Triton did at import, not off the variable, which may have changed since.
    import triton.language as tl
    from triton.runtime.interpreter import InterpretedFunction

    return isinstance(tl.cdiv, InterpretedFunction)


@cache
def _mend_interpreter() -> None:
    """Let a kernel count to a number that it was given, in Triton 3.6 under NumPy 2.4 and later.

    Its interpreter holds each scalar as an array of one element and makes an index of it with
    ``int()``, which NumPy has come to refuse for arrays that have a dimension.  Triton 3.7 takes
    the dimension off first; so does this.
    """
    from triton.runtime import interpreter

    original = interpreter._patch_lang_tensor

    def patched(tensor, *args, **kwargs):
        original(tensor, *args, **kwargs)
        tensor.__index__ = lambda self: int(self.handle.data.squeeze())

    interpreter._patch_lang_tensor = patched


@cache
def _hasten_interpreter() -> None:
    """Leave out what Triton's interpreter does in vain: kernels run in less than half the time.

    - Each call of a function from a kernel would look through the language for what to replace,
      hundreds of names; the kernel that calls has replaced it all.
    - Each sum and product of integers would be made again in 64 bits, for an assertion that is
      only made with ``debug``.
    - Each value would make the table of NumPy's dtypes anew.
    - Each value, and each type of a block, would describe its shape anew, number by number.
    """
    from triton import language as tl
    from triton.runtime import interpreter

    used = ("_patch_lang", "_LangPatchScope", "_get_np_dtype", "interpreter_builder")
    if not all(hasattr(interpreter, name) for name in used):
        return  # a Triton that we do not know: slower, and as right
    patch, builder = interpreter._patch_lang, interpreter.interpreter_builder
    modules = cache(lambda fn: [x for x in fn.__globals__.values() if x is tl or x is tl.core])

    @wraps(patch)
    def patch_once(fn):
        if modules(fn) and not any(tl.core.is_builtin(x.load) for x in modules(fn)):
            return interpreter._LangPatchScope()  # nothing to restore: who replaced it will
        return patch(fn)

    interpreter._patch_lang = patch_once

    if not builder.options.debug:
        builder.options = replace(builder.options, sanitize_overflow=False)

    numpy_dtype = interpreter._get_np_dtype
    of_scalar = cache(numpy_dtype)

    @wraps(numpy_dtype)
    def remembered(dtype):
        scalar = dtype.element_ty if isinstance(dtype, tl.block_type) else dtype
        return numpy_dtype(scalar) if isinstance(scalar, tl.pointer_type) else of_scalar(scalar)

    interpreter._get_np_dtype = remembered

    _remember_shapes(tl)


def _remember_shapes(tl) -> None:
    """Make what follows from a shape alone once, for Triton's block types and its tensors."""
    block_init, tensor_init = tl.block_type.__init__, tl.tensor.__init__
    types, shapes = {}, {}

    @wraps(block_init)
    def block(self, element_ty, shape):
        plain = type(element_ty) is tl.dtype and all(type(n) is int for n in shape)
        key = (element_ty.name, *shape) if plain else None
        if key in types:
            self.__dict__.update(types[key])
            return
        block_init(self, element_ty, shape)
        if plain:
            types[key] = vars(self).copy()

    @wraps(tensor_init)
    def tensor(self, handle, type):
        key = tuple(type.shape) if type.is_block() else ()
        if key in shapes:
            self.__dict__.update(shapes[key], handle=handle, type=type, dtype=type.scalar)
            return
        tensor_init(self, handle, type)
        if vars(self).keys() == {"handle", "type", "dtype", "shape", "numel"}:
            shapes[key] = {"shape": self.shape, "numel": self.numel}

    tl.block_type.__init__, tl.tensor.__init__ = block, tensor


def backend() -> str:
    """``"gpu"`` or ``"interpreter"``: how a labkit kernel would run now.

    Raises
    ------
    MissingDependencyError
        if torch or Triton is not installed.
    NoGpuError
        if there is no GPU and the interpreter is off; the message says how to switch it on.
    """
    require_triton("labkit.kernels")
    if _interpreter_on():
        _mend_interpreter()
        _hasten_interpreter()
        return "interpreter"
    if _gpu_visible():
        return "gpu"
    raise NoGpuError(
        "torch sees no GPU, and Triton's interpreter is off. To run the kernels on the CPU "
        f"(exact, slow): {_HOW}. Everything that is not a Triton kernel works as it is."
    )


def check_can_launch(name: str, *tensors) -> str:
    """Backend for a launch on ``tensors``; the last check before a kernel is launched.

    Raises
    ------
    ArgumentError
        if a tensor is where the kernel cannot reach it.
    NoGpuError
        if nothing can run the kernel here.
    """
    how = backend()
    for tensor in tensors:
        if how == "gpu" and not tensor.is_cuda:
            raise ArgumentError(
                name,
                str(tensor.device),
                "is the device of a tensor for a kernel that is compiled for the GPU.",
                "Move the tensor with .to('cuda'), or switch the interpreter on: " + _HOW + ".",
            )
    return how


# -- argument checks shared by the kernels ---------------------------------------------------


def check_tensor(argument: str, value, dtypes: tuple, *, dims: int | None = None) -> None:
    """``value`` is a non-empty tensor of one of ``dtypes`` (and of ``dims`` dimensions)."""
    import torch

    if not isinstance(value, torch.Tensor):
        kind = type(value).__name__
        raise ArgumentError(argument, value, f"is a {kind}, not a tensor.", "Pass a torch.Tensor.")
    if value.dtype not in dtypes:
        known = ", ".join(str(d).removeprefix("torch.") for d in dtypes)
        raise ArgumentError(
            argument,
            str(value.dtype).removeprefix("torch."),
            "is a dtype this kernel does not take.",
            f"Pass one of: {known}.",
        )
    shape = tuple(value.shape)
    if dims is not None and value.dim() != dims:
        raise ArgumentError(
            argument, shape, f"has {value.dim()} dimensions.", f"Pass a tensor with {dims}."
        )
    if value.numel() == 0:
        raise ArgumentError(argument, shape, "has no elements.", "Pass a tensor with some.")


def check_contiguous(argument: str, value) -> None:
    """The kernel walks memory in order, so the elements must lie in order."""
    if not value.is_contiguous():
        raise ArgumentError(
            argument,
            f"strides {tuple(value.stride())} for shape {tuple(value.shape)}",
            "is not contiguous, and this kernel measures memory in the order it lies in.",
            "Pass .contiguous().",
        )


def check_same_device(first: str, a, second: str, b) -> None:
    """Both tensors are on one device."""
    if a.device != b.device:
        raise ArgumentError(
            second, str(b.device), f"is not where {first} is ({a.device}).", "Move one of them."
        )


def sm_count(tensor) -> int:
    """Multiprocessors of the tensor's GPU; 4 in the interpreter, where each program costs time."""
    import torch

    if not tensor.is_cuda:
        return 4
    return torch.cuda.get_device_properties(tensor.device).multi_processor_count
