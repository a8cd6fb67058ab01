"""A pretended GPU: a device of its own for torch, whose numbers are computed on the CPU.

``gpu:0`` and ``gpu:1`` do what a CPU wheel's ``cuda`` can't: a step on them computes. An operator
that is given tensors of two devices raises ``Mixed``; ``torch.gpu.waits`` says where the host had to
wait for a device; each device has random numbers and an allocator of its own. Backward passes on
``gpu:0`` run in the device's own thread, as on a real one. There are no streams: nothing is late.

``install`` can't be undone, and has to come before the first backward pass of a process, in which
torch starts its devices' threads: so tests of it run in a process of their own. torch gives them to
``gpu:0`` alone; backward passes on ``gpu:1`` need ``torch.autograd.set_multithreading_enabled(False)``.
An error in what a backward pass computes again (a checkpoint's forward) ends the process.
"""

from __future__ import annotations

import contextlib
import functools
import os
import sys
import weakref
from collections.abc import Iterator
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only
from torch.utils.backend_registration import (
    _DummyBackendModule,
    _setup_privateuseone_for_python_backend,
)

aten = torch.ops.aten
NAME = "gpu"
COUNT = 2  # devices
BYTES = 2**34  # of memory, each
HOST = torch.device("cpu")
SEQUENCES = (list, tuple)
INNER = (os.path.dirname(torch.__file__) + os.sep, __file__)
ABSENT = torch._C.DispatchKeySet(torch._C.DispatchKey.ZeroTensor)
COPY = aten.copy_.default
# What sets an operator apart. It "reads" if the size of its result, or a number of the host's,
# depends on a tensor's values.
SPECIAL = {
    **dict.fromkeys((COPY, aten._to_copy.default), "moves"),
    **dict.fromkeys((aten._local_scalar_dense.default, aten.equal.default), "reads"),
    **dict.fromkeys((aten.nonzero.default, aten.masked_select.default), "reads"),
    **dict.fromkeys((aten._unique2.default, aten.repeat_interleave.Tensor), "reads"),
    **dict.fromkeys(
        (aten.index.Tensor, aten.index_put.default, aten.index_put_.default), "indexes"
    ),
    **dict.fromkeys((aten.cat.default, aten.stack.default), "joins"),
}
# What makes tensors from nothing; all else that does so is made of these.
FACTORIES = {
    "empty.memory_format": aten.empty.memory_format,
    "empty_strided": aten.empty_strided.default,
    "_efficientzerotensor": aten._efficientzerotensor.default,
    "arange": aten.arange.default,
    "arange.start": aten.arange.start,
    "arange.start_step": aten.arange.start_step,
}
# What torch would otherwise make of other operators, which round otherwise; and what it looks for
# among a device's own operators when it makes a tensor of a list.
OWN = {
    "silu_backward": aten.silu_backward.default,
    "_local_scalar_dense": aten._local_scalar_dense.default,
}


class Mixed(RuntimeError):
    """An operator was given tensors of different devices."""


class Allocator:
    """Bytes of the storages that are alive on one device."""

    def __init__(self) -> None:
        self.allocated = self.peak = 0
        self._alive: dict[int, weakref.ref[Any]] = {}

    def see(self, host: Tensor) -> None:
        storage = host.untyped_storage()
        key = storage._cdata
        if key not in self._alive:
            size = storage.nbytes()
            self._alive[key] = weakref.ref(storage, lambda _: self._release(key, size))
            self.allocated += size
            self.peak = max(self.peak, self.allocated)

    def _release(self, key: int, size: int) -> None:
        del self._alive[key]
        self.allocated -= size


class Backend(_DummyBackendModule):
    """``torch.gpu``: what a device's module is asked for.

    Attributes:
        waits: the places, as file and line, where the host has waited for a device.
    """

    _initialized = True  # else torch's checkpoint leaves random states alone

    def __init__(self) -> None:
        self.waits: list[str] = []
        self.allocators = [Allocator() for _ in range(COUNT)]
        self._randomness = [torch.Generator() for _ in range(COUNT)]
        self._current = 0

    def device_count(self) -> int:
        return COUNT

    def current_device(self) -> int:
        return self._current

    @contextlib.contextmanager
    def device(self, device: Any) -> Iterator[None]:
        """Within the block a device without a number is this one."""
        before, self._current = self._current, self.index(device)
        try:
            yield
        finally:
            self._current = before

    def index(self, device: Any = None) -> int:
        """The number of a device, given as torch's functions accept it."""
        found = device if isinstance(device, int | None) else torch.device(device).index
        return self._current if found is None else found

    def manual_seed_all(self, seed: int) -> None:
        for generator in self._randomness:
            generator.manual_seed(seed)

    def get_rng_state(self, device: Any = None) -> Tensor:
        return self._randomness[self.index(device)].get_state()

    def set_rng_state(self, state: Tensor, device: Any = None) -> None:
        self._randomness[self.index(device)].set_state(state)

    @contextlib.contextmanager
    def drawing(self, device: torch.device) -> Iterator[None]:
        """Within the block the CPU draws a device's random numbers."""
        before = torch.get_rng_state()
        torch.set_rng_state(self.get_rng_state(device))
        try:
            yield
        finally:
            self.set_rng_state(torch.get_rng_state(), device)
            torch.set_rng_state(before)

    def get_device_name(self, device: Any = None) -> str:
        return f"pretended GPU {self.index(device)}"

    def mem_get_info(self, device: Any = None) -> tuple[int, int]:
        return BYTES - self.allocators[self.index(device)].allocated, BYTES

    def max_memory_allocated(self, device: Any = None) -> int:
        return self.allocators[self.index(device)].peak

    max_memory_reserved = max_memory_allocated

    def reset_peak_memory_stats(self, device: Any = None) -> None:
        allocator = self.allocators[self.index(device)]
        allocator.peak = allocator.allocated

    def empty_cache(self) -> None:
        """There is no cache."""

    def synchronize(self, device: Any = None) -> None:
        self.wait()

    def wait(self, times: int = 1) -> None:
        """Note the innermost place that is neither torch's nor of this file."""
        if not times:
            return
        frame: Any = sys._getframe(1)
        while frame.f_back and frame.f_code.co_filename.startswith(INNER):
            frame = frame.f_back
        self.waits += times * [f"{frame.f_code.co_filename}:{frame.f_lineno}"]

    def get_amp_supported_dtype(self) -> list[torch.dtype]:
        return [torch.bfloat16, torch.float16]  # transformers asks, to switch autocast off


backend = Backend()


class Generator(torch.Generator):
    """A generator that knows the device it is for. Its numbers are the CPU's."""

    # by address: an operator is given another object for the same generator
    known: ClassVar[Any] = weakref.WeakValueDictionary()

    def __new__(cls, device: Any = HOST) -> Generator:
        made = super().__new__(cls, HOST)
        made._device = numbered(device)
        cls.known[made._cdata] = made
        return made

    @property
    def device(self) -> torch.device:
        return self._device


class DeviceTensor(Tensor):
    """A tensor of a pretended device.

    Attributes:
        host: its values, which nothing but this file may look at.
    """

    host: Tensor

    @staticmethod
    def __new__(cls, host: Tensor, device: torch.device) -> DeviceTensor:
        zero = host._is_zerotensor()  # an absent tangent: no memory, and products with it are none
        made = Tensor._make_wrapper_subclass(
            cls,
            host.size(),
            strides=host.stride(),
            storage_offset=host.storage_offset(),
            dtype=host.dtype,
            device=device,
            _extra_dispatch_keys=ABSENT if zero else None,
        )
        made.host = host
        if not zero:
            backend.allocators[device.index].see(host)
        return made

    def __repr__(self, **_: Any) -> str:
        return f"{self.host!r} on {self.device}"

    def __reduce_ex__(self, protocol: Any) -> Any:
        return self.host.__reduce_ex__(protocol)  # ``loading`` moves it back

    def untyped_storage(self) -> torch.UntypedStorage:
        return self.host.untyped_storage()

    def tolist(self) -> Any:
        backend.wait()
        return self.host.tolist()

    @property
    def data(self) -> Tensor:
        return Tensor.data.__get__(self)

    @data.setter
    def data(self, value: DeviceTensor) -> None:
        Tensor.data.__set__(self, value)
        self.host = value.host

    __torch_function__ = torch._C._disabled_torch_function_impl

    @classmethod
    def __torch_dispatch__(
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        return run(func, *args, **(kwargs or {}))


def numbered(device: Any) -> torch.device:
    """A device with its number, if it is one of the pretended."""
    device = torch.device(device)
    return torch.device(NAME, backend.index(device)) if device.type == NAME else device


def run(func: Any, *args: Any, **kwargs: Any) -> Any:
    """An operator of a device, computed by the CPU."""
    given: list[Tensor] = []
    plain = [_host(value, given) for value in args]
    named = {name: _host(value, given) for name, value in kwargs.items()}
    there = [t for t in given if type(t) is DeviceTensor]
    target = there[0].device if there else HOST
    if named.get("device") is not None:
        target = numbered(named["device"])
        named["device"] = HOST if target.type == NAME else target
    pinned = named.pop("pin_memory", False)
    kind, draws, writes = _nature(func)
    if kind == "moves":
        _note_move(func, args, kwargs, target)
    elif len(given) > 1:
        _refuse_mixed(func, given, args[1] if kind == "indexes" else (), kind, writes)
    if kind == "reads":
        backend.wait()
    if draws:
        with _randomness(func, target, named.get("generator")):
            result = func(*plain, **named)
    else:
        result = func(*plain, **named)
    if func is COPY:
        return args[0]
    if target.type == NAME:
        return _device(result, target, there if writes else [])
    if pinned:
        result.pinned = True
    return result


@functools.cache
def _nature(func: Any) -> tuple[str | None, bool, bool]:
    """What is special about an operator, whether it draws random numbers, and whether it writes to
    what it is given."""
    draws = torch.Tag.nondeterministic_seeded in func.tags
    return SPECIAL.get(func), draws, func._schema.is_mutable


def _host(value: Any, given: list[Tensor]) -> Any:
    """A value as the CPU gets it; tensors in it are added to ``given``."""
    if type(value) is DeviceTensor:
        given.append(value)
        return value.host
    if isinstance(value, Tensor):
        given.append(value)
    elif isinstance(value, SEQUENCES):
        return type(value)([_host(part, given) for part in value])
    return value


def _device(value: Any, device: torch.device, written: list[DeviceTensor]) -> Any:
    """A result as the device hands it out: what was written to, or new."""
    if isinstance(value, Tensor):
        found = next((t for t in written if t.host is value), None)
        if found is None:
            return DeviceTensor(value, device)
        assert found.shape == value.shape, "a pretended GPU can't resize a tensor in place"
        return found
    if isinstance(value, SEQUENCES):
        return type(value)([_device(part, device, written) for part in value])
    return value


def _randomness(func: Any, target: torch.device, generator: Any) -> Any:
    """What an operator draws from: the generator it was given, or the device's own."""
    if generator is None and target.type == NAME:
        return backend.drawing(target)
    known = Generator.known.get(generator._cdata, generator) if generator is not None else None
    if known is not None and known.device != target:
        raise Mixed(f"{func}: a generator of {known.device} for {target}")
    return contextlib.nullcontext()


def _note_move(func: Any, args: Any, kwargs: dict[str, Any], target: torch.device) -> None:
    """The host waits for what it copies from or to a device, unless it is told not to; from a device
    to memory that isn't pinned it waits all the same."""
    source, goal, pinned = args[0].device, target, kwargs.get("pin_memory", False)
    asked = kwargs.get("non_blocking", False)
    if func is COPY:
        source, goal, pinned = args[1].device, args[0].device, getattr(args[0], "pinned", False)
        asked = asked or args[2:] == (True,)
    if HOST in (source, goal) and not (asked and (goal != HOST or pinned)):
        backend.wait()


def _refuse_mixed(func: Any, given: list[Tensor], indices: Any, kind: Any, writes: bool) -> None:
    """A single number of the host's may meet a device, as a scalar does, unless it is written to or
    joined. So may indices, at the cost of a copy; the host waits for that, as it does for the number
    of a mask's places."""
    devices = {t.device for t in given}
    indices = [t for t in indices if t is not None]
    backend.wait(sum(t.device == HOST or t.dtype == torch.bool for t in indices))
    if len(devices) == 1:
        return
    wrong = [
        t
        for t in given
        if t.device == HOST
        and (t.dim() or kind == "joins" or (writes and t is given[0]))
        and not any(t is index for index in indices)
    ]
    if wrong or len(devices - {HOST}) > 1:
        shapes = ", ".join(f"{tuple(t.shape)} on {t.device}" for t in given)
        raise Mixed(f"{func} of {shapes}")


def loading(load: Any) -> Any:
    """``torch.load`` that moves what it has read to a pretended device, if it is asked to."""

    def loaded(file: Any, map_location: Any = None, **options: Any) -> Any:
        if map_location is None or torch.device(map_location).type != NAME:
            return load(file, map_location, **options)
        return tree_map_only(Tensor, lambda t: t.to(map_location), load(file, HOST, **options))

    return loaded


@functools.cache
def install() -> tuple[torch.device, ...]:
    """Let torch have the devices, for the rest of the process."""
    _setup_privateuseone_for_python_backend(NAME, backend)
    torch._C._set_only_lift_cpu_tensors(True)  # lists become tensors on the host and then move
    torch.__future__.set_swap_module_params_on_conversion(True)  # parameters that are tied stay so
    install.library = torch.library.Library("aten", "IMPL")  # its kernels live as long
    for name, func in (FACTORIES | OWN).items():
        install.library.impl(name, functools.partial(run, func), "PrivateUse1")
    torch.Generator, torch.load = Generator, loading(torch.load)
    torch.backends.cuda.enable_flash_sdp(False)  # no fused kernels: on the CPU neither, to compare
    torch.backends.cuda.enable_mem_efficient_sdp(False)
    return tuple(torch.device(NAME, index) for index in range(COUNT))
