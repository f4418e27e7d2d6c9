"""A pretended GPU: tensors that say cuda:0, hold their numbers on the CPU, and refuse what CUDA would.

A storage is marked as being on the GPU; all views of it are then. What an operation makes of a
marked tensor is marked. Two modes of torch see every call from Python and every operation, the
backward pass included.
"""

import contextlib
from collections import Counter
from unittest import mock

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

GPU, CPU = torch.device("cuda", 0), torch.device("cpu")
MOVES = (torch.ops.aten._to_copy.default, torch.ops.aten.copy_.default)
INDEXES = (
    torch.ops.aten.index.Tensor,
    torch.ops.aten.index_put.default,
    torch.ops.aten.index_put_.default,
    torch.ops.aten._index_put_impl_.default,
)
WAITS = ("_local_scalar_dense", "nonzero", "is_nonzero", "equal", "masked_select", "unique")
own_device = torch.Tensor.device


def is_gpu(x) -> bool:
    """Whether a tensor is on the pretended GPU."""
    return getattr(x.untyped_storage(), "on_gpu", False)


def mark(x, on_gpu: bool = True):
    """Say of a tensor, and of all that share its storage, where it is."""
    if isinstance(x, torch.Tensor):
        x.untyped_storage().on_gpu = on_gpu
    return x


def told_device(x) -> torch.device:
    """What `x.device` gives."""
    return GPU if is_gpu(x) else own_device.__get__(x)


def as_device(x):
    """The device that an argument names, GPU with its index; None if it names none."""
    if isinstance(x, torch.Tensor):
        return told_device(x)
    if isinstance(x, str):
        with contextlib.suppress(RuntimeError):  # a string that is no device
            x = torch.device(x)
    if not isinstance(x, torch.device):
        return None
    if x.type == "cuda" and x.index not in (None, 0):
        raise RuntimeError(f"CUDA error: invalid device ordinal: {x}")
    return GPU if x.type == "cuda" else x


class Calls(TorchFunctionMode):
    """Sees calls from Python: those that name a device, move tensors or read their numbers."""

    def __init__(self, waits: Counter):
        super().__init__()
        self.waits = waits

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs, name = kwargs or {}, getattr(func, "__name__", "")
        on_gpu = bool(args) and isinstance(args[0], torch.Tensor) and is_gpu(args[0])
        if name in ("to", "cpu", "cuda"):
            return self.move(func, name, args, kwargs, on_gpu)
        if on_gpu and name == "numpy":
            raise TypeError("can't convert cuda:0 device type tensor to numpy")
        if on_gpu and name == "tolist":
            self.waits["tolist"] += 1
        if as_device(kwargs.get("device")) == GPU:
            return mark(func(*args, **{**kwargs, "device": CPU}))
        out = func(*args, **kwargs)
        if name == "new_tensor" and on_gpu and kwargs.get("device") is None:
            mark(out)
        return out

    def move(self, func, name: str, args, kwargs, on_gpu: bool):
        """x.to(...), x.cpu() and x.cuda(): a copy where the device is another one."""
        named = [as_device(x) for x in [*args[1:], *kwargs.values()]]
        named = [device for device in named if device] or [told_device(args[0])]
        target = {"cpu": CPU, "cuda": GPU}.get(name, named[0])
        if target.type == "meta":
            return func(*args, **kwargs)
        if name == "to":

            def here(x):
                is_other = isinstance(x, torch.Tensor)
                if is_other:
                    return x.dtype
                return CPU if as_device(x) else x

            rest = [here(x) for x in args[1:]]
            out = func(args[0], *rest, **{key: here(x) for key, x in kwargs.items()})
        else:
            out = args[0]
        if (target == GPU) == on_gpu:
            return out
        if on_gpu:
            self.waits["copy to the CPU"] += 1
        out = out.clone() if out.data_ptr() == args[0].data_ptr() else out
        return mark(out, target == GPU)


class Operations(TorchDispatchMode):
    """Sees operations: refuses those that mix devices, marks what the others make."""

    def __init__(self, waits: Counter):
        super().__init__()
        self.waits = waits

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        given = [x for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)]
        gpu = [x for x in given if is_gpu(x)]
        if gpu:
            self.check(func, args, kwargs, given)
            if func.__name__.startswith(WAITS):
                self.waits[func.__name__] += 1
            is_mask = [x.dtype == torch.bool for x in given[1:]]
            if func in INDEXES and any(is_mask):
                self.waits["index by a mask"] += 1
        out = func(*args, **kwargs)
        if gpu and not (func is MOVES[1] and not is_gpu(args[0])):
            tree_map(mark, out)
        return out

    def check(self, func, args, kwargs, given) -> None:
        """RuntimeError for what CUDA would not do with tensors on different devices."""
        if any(isinstance(x, torch.Generator) for x in tree_leaves((args, kwargs))):
            raise RuntimeError(f"{func}: expected a 'cuda' generator, but found 'cpu'")
        cpu = [x for x in given if not is_gpu(x)]
        if func in MOVES or not cpu:
            return
        first_is_here = not isinstance(args[0], torch.Tensor) or is_gpu(args[0])
        if func in INDEXES and first_is_here:
            values = [x for x in args[2:3] if isinstance(x, torch.Tensor)]
            cpu = [x for x in cpu if any(x is y for y in values) or x.dtype.is_floating_point]
        writes = func.__name__.split(".")[0].endswith("_")
        if any(x.dim() > 0 for x in cpu) or (writes and not first_is_here):
            shapes = [tuple(x.shape) for x in cpu]
            raise RuntimeError(f"{func}: tensors on cuda:0 and cpu, of shapes {shapes}")


def set_device(device) -> None:
    """torch.cuda.set_device, which wants an index."""
    index = torch.cuda._utils._get_device_index(device)
    if index != 0:
        raise RuntimeError("CUDA error: invalid device ordinal")


@contextlib.contextmanager
def fake_cuda():
    """Within it there is one GPU, cuda:0. Gives a Counter of the times that the CPU waited for it."""
    waits = Counter()
    replaced = {
        "is_available": lambda: True,
        "device_count": lambda: 1,
        "current_device": lambda: 0,
        "set_device": set_device,
        "max_memory_allocated": lambda device=None: 2**30,
        "_lazy_init": lambda: None,
    }
    with contextlib.ExitStack() as stack:
        for name, function in replaced.items():
            stack.enter_context(mock.patch.object(torch.cuda, name, function))
        told = {"device": property(told_device), "is_cuda": property(is_gpu)}
        for name, value in told.items():
            stack.enter_context(mock.patch.object(torch.Tensor, name, value, create=True))
        stack.enter_context(Calls(waits))
        stack.enter_context(Operations(waits))
        yield waits
