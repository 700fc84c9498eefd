"""CUDA tensors that do not exist, and a watch over what is done to them.

torch's FakeTensorMode computes shapes, dtypes and devices, and no numbers. So the project's own code runs as on a
GPU, without one, with any build of torch. A dispatch mode sees every operator and records

    synchronizations   the host waits for the device: `.item()`, `.tolist()`, `nonzero`, a copy to the host,
                       `torch.cuda.synchronize`
    tensors on the CPU an operator that computes on the host, with more than one number
    upcasts            an fp32 tensor as large as a weight, made of one in 4 or 16 bits
    launches           operators that run a kernel on the device
    peak               bytes of live tensors

with the line of the project that asked for it.

What stands in for a GPU: the autograd engine takes the tensors for meta ones, which need no streams, while Python
code sees CUDA. A function that `torch.compile` would fuse counts as one launch, and its temporaries do not exist.
`scaled_dot_product_attention` is the kernel that CUDA would choose. Pages of moments are ordinary fake tensors.
"""

from __future__ import annotations

import sys
import weakref
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
import torch._dynamo  # it compares _make_subclass with its own on import
from torch import Tensor
from torch._subclasses import fake_tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves

from qlora.data import batches
from qlora.kernels import fused
from qlora.quant.library import Params4bit, bnb

ROOT = Path(__file__).parents[1]
CUDA = torch.device("cuda", 0)
STANDS_IN = ("fake_device.py", "fake_cuda.py")
aten = torch.ops.aten
# Operators that wait for the device: how much they return depends on values.
WAITING = {
    aten.nonzero.default, aten.masked_select.default, aten.equal.default,
    aten._unique2.default, aten.unique_dim.default, aten.repeat_interleave.Tensor,
}  # fmt: skip
COPIES = {aten._to_copy.default, aten.copy_.default}
NO_KERNEL = {
    aten.empty.memory_format, aten.empty_strided.default, aten.empty_like.default, aten.new_empty.default,
    aten.new_empty_strided.default, aten._unsafe_view.default, aten.detach.default, aten.lift_fresh.default,
}  # fmt: skip


COLLATE = ("collate_packed", "collate_padded")


class Packed(FakeTensor, Params4bit):
    """A 4-bit weight without storage."""


@dataclass
class Seen:
    """What the operators of one passage did; places are `file:line`.

    Attributes:
        syncs, on_cpu, upcasts: by place and operator.
        launches: by operator.
        peak: bytes of live tensors.
    """

    syncs: Counter[str] = field(default_factory=Counter)
    on_cpu: Counter[str] = field(default_factory=Counter)
    upcasts: Counter[str] = field(default_factory=Counter)
    launches: Counter[str] = field(default_factory=Counter)
    peak: int = 0


class FakeCuda(TorchDispatchMode):
    """Watches operators on fake CUDA tensors, and answers those that ask for values.

    Args:
        weight_size: an fp32 tensor of as many elements is as large as a weight.
    """

    def __init__(self, weight_size: int) -> None:
        super().__init__()
        self.weight_size, self.seen, self.live, self.is_fused = weight_size, Seen(), 0, False
        self._storages: set[int] = set()

    def begin(self) -> None:
        """Start a new passage."""
        self.seen = Seen(peak=self.live)

    def wait(self, name: str) -> None:
        """Record a synchronization."""
        self.seen.syncs[f"{_place()} {name}"] += 1

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if kwargs.get("device") is not None and torch.device(kwargs["device"]).type == "meta":
            kwargs["device"] = CUDA  # the engine's own: it takes our tensors for meta ones
        inputs = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        if func is aten._local_scalar_dense.default:
            if inputs[0].device.type == "cuda":
                self.wait("item")
            return _some_value(inputs[0])
        if func is aten.index.Tensor:
            args = (args[0], [self._positions(index) for index in args[1]], *args[2:])
        if func in WAITING and inputs[0].device.type == "cuda":
            self.wait(func.__name__)
            result = _some_result(func, args, kwargs)
        else:
            result = func(*args, **kwargs)
        if func is aten.scatter_add.default and result.dtype == torch.int64:  # counts: all about equal
            result.share = args[2].numel() // len(result), args[2].numel()
        self._look(func, inputs, [leaf for leaf in tree_leaves(result) if isinstance(leaf, Tensor)])
        return result

    def _positions(self, index: Tensor | None) -> Tensor | None:
        """What an index by a mask is turned into, after waiting for it."""
        if index is None or index.dtype != torch.bool or index.device.type != "cuda":
            return index
        self.wait("index by a mask")
        return index.new_empty(index.numel(), dtype=torch.int64)

    def _look(self, func: Any, inputs: list[Tensor], outputs: list[Tensor]) -> None:
        on_device = [tensor for tensor in outputs if tensor.device.type == "cuda"]
        for tensor in on_device:
            self._count(tensor)
        if self.is_fused:
            return
        comes_from_device = any(tensor.device.type == "cuda" for tensor in inputs)
        if func in COPIES and comes_from_device and any(tensor.device.type == "cpu" for tensor in outputs):
            self.wait("copy to the host")
        returns = func._schema.returns
        is_view = any(r.alias_info is not None and not r.alias_info.is_write for r in returns)
        if is_view or func in NO_KERNEL:
            return
        if on_device or (comes_from_device and not outputs):
            self.seen.launches[func.__name__] += 1
        for tensor in outputs:
            if tensor.device.type == "cpu" and tensor.numel() > 1 and not comes_from_device:
                self.seen.on_cpu[f"{_place()} {func.__name__}"] += 1
        is_wide = any(t.dtype == torch.float32 and t.numel() >= self.weight_size for t in outputs)
        if is_wide and any(self._is_narrow_weight(tensor) for tensor in inputs):
            self.seen.upcasts[f"{_place()} {func.__name__}"] += 1

    def _is_narrow_weight(self, tensor: Tensor) -> bool:
        """Whether a tensor is as large as a weight in 4 bits, two to a byte, or 16."""
        if tensor.dtype == torch.uint8:
            return 2 * tensor.numel() >= self.weight_size
        return tensor.dtype in (torch.bfloat16, torch.float16) and tensor.numel() >= self.weight_size

    def _count(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self._storages:
            return
        size = storage.nbytes()
        self._storages.add(key)
        self.live += size
        if not self.is_fused:
            self.seen.peak = max(self.seen.peak, self.live)

        def free() -> None:
            self._storages.discard(key)
            self.live -= size

        weakref.finalize(storage, free)


def _place() -> str:
    """The innermost line of the project on the stack, and the library's line that it called, if any."""
    frame, library = sys._getframe(2), ""
    while frame is not None:
        file = Path(frame.f_code.co_filename)
        if file.is_relative_to(ROOT / "qlora"):
            place = f"{file.relative_to(ROOT)}:{frame.f_lineno}"
            return f"{place} in {library}" if library else place
        if not library and "torch" not in file.parts and file.name not in STANDS_IN:
            library = f"{file.name}:{frame.f_lineno}"
        frame = frame.f_back  # type: ignore[assignment]
    return library or "?"


def _some_value(tensor: Tensor) -> bool | int | float:
    if tensor.dtype == torch.bool:
        return False
    return 1.0 if tensor.is_floating_point() else 1


def _some_result(func: Any, args: Any, kwargs: Any) -> Any:
    """A result of a plausible size for an operator whose result's size depends on values."""
    x = args[0]
    if func is aten.nonzero.default:
        return x.new_empty(x.numel(), x.dim(), dtype=torch.int64)
    if func is aten.equal.default:
        return True
    raise NotImplementedError(f"the size of {func} is not known here")


# ---- what stands in for a GPU ------------------------------------------------------------------------------


@contextmanager
def fake_cuda(weight_size: int = 1 << 62, compiled: bool = True) -> Iterator[FakeCuda]:
    """Within the block, tensors on "cuda" are fake, and operators on them are watched.

    Args:
        compiled: a function of kernels/fused.py is one launch, as under `torch.compile`; else its operators are.
    """
    watch = FakeCuda(weight_size)
    make = Tensor._make_subclass

    def make_subclass(kind: Any, data: Tensor, requires_grad: bool = False, **options: Any) -> Any:
        # Without the options C++ sees a meta tensor, which needs neither streams nor device guards.
        return make(kind, data, requires_grad, **({} if issubclass(kind, FakeTensor) else options))

    def tolist(tensor: Tensor) -> Any:
        if tensor.device.type == "cuda":
            watch.wait("tolist")
        share, total = getattr(tensor, "share", (1, len(tensor)))
        return [share] * (len(tensor) - 1) + [total - share * (len(tensor) - 1)]

    def one_launch(plain: Callable[..., Any], x: Tensor) -> Callable[..., Any]:
        def run(*arguments: Any) -> Any:
            watch.is_fused, was = True, watch.is_fused
            try:
                result = plain(*arguments)
            finally:
                watch.is_fused = was
            watch.seen.launches[plain.__name__] += 1
            return result

        return run

    def synchronize(device: Any = None) -> None:
        watch.wait("synchronize")

    def paged(*shape: int, dtype: torch.dtype = torch.float32, device: Any = None) -> Tensor:
        pages: Any = torch.empty(*shape, dtype=dtype, device=CUDA)
        pages.is_paged, pages.page_deviceid = True, 0
        return pages

    def nothing(*arguments: Any, **options: Any) -> None:
        return None

    patches = [
        patch.object(Tensor, "_make_subclass", staticmethod(make_subclass)),
        patch.object(FakeTensor, "is_cuda", property(lambda self: self.device.type == "cuda"), create=True),
        patch.object(FakeTensor, "tolist", tolist, create=True),
        patch.object(fake_tensor, "CONSTANT_NUMEL_LIMIT", -1),  # else small ones keep numbers, and go to CUDA
        patch.object(F, "scaled_dot_product_attention", attention),
        patch.object(torch.cuda, "synchronize", synchronize),
        patch.object(bnb.functional, "get_paged", paged),
        patch.object(bnb.functional, "fill", nothing),
        patch.object(bnb.functional, "prefetch_tensor", nothing),
        patch.object(bnb.functional, "is_on_gpu", lambda tensors: True),
    ]
    patches += [patch.object(batches, name, on_host(getattr(batches, name))) for name in COLLATE]
    if compiled:
        patches.append(patch.object(fused, "_for_device", one_launch))
    with ExitStack() as stack:
        for change in patches:
            stack.enter_context(change)
        stack.enter_context(FakeTensorMode(allow_non_fake_inputs=True))
        yield stack.enter_context(watch)


def on_host(function: Callable[..., Any]) -> Callable[..., Any]:
    """The function, computed with numbers: what a run does on the host before the device sees it."""

    def run(*arguments: Any, **options: Any) -> Any:
        with _disable_current_modes():
            return function(*arguments, **options)

    return run


def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """`scaled_dot_product_attention` of 16-bit CUDA tensors: flash without a mask, else the efficient kernel."""
    if attn_mask is None:
        flash = aten._scaled_dot_product_flash_attention
        return flash(query, key, value, dropout_p, is_causal, scale=scale)[0]
    groups = query.shape[1] // key.shape[1]
    if groups > 1:
        key, value = (x.repeat_interleave(groups, dim=1) for x in (key, value))
    mask = attn_mask
    if mask.dtype == torch.bool:
        mask = torch.zeros_like(mask, dtype=query.dtype).masked_fill(~mask, float("-inf"))
    mask = mask.expand(*query.shape[:3], key.shape[2])
    efficient = aten._scaled_dot_product_efficient_attention
    return efficient(query, key, value, mask, query.requires_grad, dropout_p, is_causal, scale=scale)[0]
