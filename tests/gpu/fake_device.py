"""A pretended GPU on a CPU build of PyTorch: host tensors are real, tensors on the device have shapes only.

    with pretend("cuda") as device:
        ...
    device.peak, device.read_back

An operation that mixes devices raises, and so does reading a value of the device into Python, such as `bool(x.any())`.
Copies to the host are recorded in `read_back`. fp64 on the device raises, because MPS has none. Storages on the device
are counted, so that a network of 24 GB can be tried on any machine. Operations in streams raise where one uses memory
of another without waiting for it (`fake_streams`).
"""

import contextlib
import ctypes
import sys
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from unittest import mock

import torch
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.nn.attention import SDPBackend
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

from tests.gpu.fake_streams import Streams

TYPES = {"cuda": 1, "mps": 13, "meta": 14}  # c10::DeviceType
ATEN = torch.ops.aten
CARD = 80 << 30
"""Bytes of the pretended card."""


IMAGE, FLAGS = torch.uint8, torch.bool
"""Dtypes that are read back besides captured values: pixels, and whether latents are finite."""

UNAVAILABLE = "there is a GPU, or this PyTorch does not show its device guards"


def available() -> bool:
    """Return whether a device can be pretended here."""
    try:
        guards()
    except OSError:
        return False
    return not torch.cuda.is_available()


def captured(device: "FakeDevice") -> list[tuple[int, ...]]:
    """Return the shapes of what was read back besides images and one tensor of flags. Fails for any other dtype."""
    dtypes = [dtype for _, dtype in device.read_back]
    assert set(dtypes) <= {IMAGE, FLAGS, torch.float32}
    assert dtypes.count(IMAGE) == dtypes.count(FLAGS) == 1
    return [shape for shape, dtype in device.read_back if dtype == torch.float32]


class _Shapes(FakeTensorMode):
    @property
    def avoid_device_init(self) -> bool:
        """Whether constants are kept off the device. PyTorch asks if there is CUDA, which is pretended here."""
        return True


class FakeDevice(TorchDispatchMode):
    """Counts what is on the device and what is read back.

    live, peak: bytes of the storages on the device, now and at most. pinned: bytes of pinned memory that was taken.
    read_back: shape and dtype of each copy to the host, in order. moved: the same of each copy to the device.
    """

    def __init__(self, kind: str, size: int = CARD):
        super().__init__()
        self.kind, self.size, self.streams, self.pinned = kind, size, Streams(), 0
        self.live = self.peak = 0
        self.read_back: list[tuple[tuple[int, ...], torch.dtype]] = []
        self.moved: list[tuple[tuple[int, ...], torch.dtype]] = []
        self._fake = _Shapes(allow_non_fake_inputs=True)
        self._sizes: dict[int, int] = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func is torch.ops.prim.device.default:
            return args[0].fake_device
        leaves = tree_leaves((args, kwargs))
        here = any(isinstance(x, FakeTensor) for x in leaves)
        if kwargs.get("pin_memory"):
            return self._pin(func(*args, **{**kwargs, "pin_memory": False}))
        if not here and not any(isinstance(x, torch.device) and x.type == self.kind for x in leaves):
            return func(*args, **kwargs)
        if func is ATEN._fused_sdp_choice.default:
            masked = (args[3:4] or (kwargs.get("attn_mask"),))[0] is not None
            return (SDPBackend.EFFICIENT_ATTENTION if masked else SDPBackend.FLASH_ATTENTION).value
        if func is ATEN.scaled_dot_product_attention.default:
            return self._attention(*args, **kwargs)
        if func._can_decompose() and torch.is_inference_mode_enabled():  # composite operators arrive whole then
            with self:
                return func.decompose(*args, **kwargs)
        with self._fake:
            result = func(*args, **kwargs)
        self._order(func, args, kwargs, leaves)
        if not here:
            self.moved += [(tuple(x.shape), x.dtype) for x in leaves if isinstance(x, torch.Tensor)]
        return tree_map(self._counted, result)

    def _pin(self, tensor: torch.Tensor) -> torch.Tensor:
        self.pinned += tensor.untyped_storage().nbytes()
        self.streams.pinned(tensor.untyped_storage()._cdata)
        return tensor

    def _order(self, func, args, kwargs, leaves) -> None:
        """Note what an operation reads and writes. Views do neither."""
        if func.is_view:
            return
        written = [
            value
            for i, argument in enumerate(func._schema.arguments)
            if argument.alias_info is not None and argument.alias_info.is_write
            for value in tree_leaves(args[i] if i < len(args) else kwargs.get(argument.name))
        ]
        tensors, targets = (
            [x.untyped_storage()._cdata for x in part if isinstance(x, torch.Tensor)] for part in (leaves, written)
        )
        self.streams.operation(tensors, targets)

    def _attention(self, q, k, v, attn_mask=None, dropout_p=0.0, is_causal=False, *, scale=None, enable_gqa=False):
        """What a recent card runs: flash without a mask, the memory-efficient kernel with one."""
        with self:
            if attn_mask is None:
                return ATEN._scaled_dot_product_flash_attention(q, k, v, dropout_p, is_causal, scale=scale)[0]
            mask = attn_mask.expand(*q.shape[:3], k.shape[2])
            return ATEN._scaled_dot_product_efficient_attention(q, k, v, mask, False, dropout_p, is_causal)[0]

    def _counted(self, x):
        if not isinstance(x, FakeTensor):
            return x
        if x.device.type != self.kind:
            self.read_back.append((tuple(x.shape), x.dtype))
            return torch.zeros(x.shape, dtype=x.dtype)
        if x.dtype in (torch.float64, torch.complex128):
            raise TypeError(f"{x.dtype} of shape {tuple(x.shape)} on the device, which has no fp64")
        storage = x.untyped_storage()
        if storage._cdata not in self._sizes:
            self._sizes[storage._cdata] = storage.nbytes()
            self.live += storage.nbytes()
            self.peak = max(self.peak, self.live)
            self.streams.allocated(storage._cdata)
            weakref.finalize(storage, self._freed, storage._cdata)
        return x

    def _freed(self, key: int) -> None:
        self.live -= self._sizes.pop(key, 0)
        self.streams.freed(key)


@contextlib.contextmanager
def pretend(kind: str, size: int = CARD) -> Iterator[FakeDevice]:
    """Give this machine a device of a kind, "cuda" or "mps", while the block runs. size: its bytes."""
    device = FakeDevice(kind, size)
    used = lambda *_: (size - device.live, size)  # noqa: E731
    stream, event = device.streams.classes()
    changes: dict[str, object] = {
        "torch.Tensor.to": _with_index(torch.Tensor.to, torch.device(kind, 0)),
        "torch.tensor": _on_host_first(torch.tensor),
        "torch.as_tensor": _on_host_first(torch.as_tensor),
        "torch.cuda._lazy_init": lambda: None,
        "torch.cuda.is_available": lambda: kind == "cuda",
        "torch.cuda.device_count": lambda: int(kind == "cuda"),
        "torch.cuda.get_device_name": lambda *_: "a pretended card",
        "torch.cuda.synchronize": lambda *_: None,
        "torch.cuda.mem_get_info": used,
        "torch.cuda.Event": event,
        "torch.cuda.Stream": stream,
        "torch.cuda.stream": device.streams.using,
        "torch.cuda.current_stream": lambda *_: device.streams.every[0],
        "torch.cuda.empty_cache": lambda: None,
        "torch.Tensor.record_stream": lambda *_: None,
        "torch.backends.mps.is_available": lambda: kind == "mps",
        "torch.mps.is_available": lambda: kind == "mps",
        "torch.mps.recommended_max_memory": lambda: size,
        "torch.mps.driver_allocated_memory": lambda: device.live,
    }
    with contextlib.ExitStack() as stack:
        stack.enter_context(_guard(kind))
        for name, value in changes.items():
            stack.enter_context(mock.patch(name, value))
        stack.enter_context(device)
        yield device


def _on_host_first(make: Callable) -> Callable:
    """`torch.tensor` allocates on the device in C++, where no mode sees it."""

    def made(data, *, dtype=None, device=None, **options):
        result = make(data, dtype=dtype, **options)
        return result if device is None else result.to(device)

    return made


def _with_index(to: Callable, device: torch.device) -> Callable:
    """`x.to("cuda")` asks the device guard for the current index, and `_guard` would answer with the meta device."""

    def moved(x, *args, **options):
        args = [device if arg in (device.type, torch.device(device.type)) else arg for arg in args]
        if options.get("device") in (device.type, torch.device(device.type)):
            options["device"] = device
        return to(x, *args, **options)

    return moved


@contextlib.contextmanager
def _guard(kind: str) -> Iterator[None]:
    """PyTorch asks for a device guard when a tensor is indexed or moved. A CPU build has none: that of meta serves."""
    registry = guards()
    before = registry[TYPES[kind]]
    registry[TYPES[kind]] = registry[TYPES["meta"]]
    try:
        yield
    finally:
        registry[TYPES[kind]] = before


def guards() -> ctypes.Array:
    """Return PyTorch's table of device guards, a pointer for each device type. Raises OSError where it is not found."""
    library = {"darwin": "libc10.dylib", "win32": "c10.dll"}.get(sys.platform, "libc10.so")
    symbol = "_ZN3c104impl26device_guard_impl_registryE"
    try:
        return (ctypes.c_void_p * 21).in_dll(ctypes.CDLL(str(Path(torch.__file__).parent / "lib" / library)), symbol)
    except ValueError as error:
        raise OSError(str(error)) from error
