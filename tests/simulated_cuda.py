"""A simulated GPU, for machines without one: `with simulated_cuda() as gpu`.

Tensors on `cuda` then hold their numbers on the CPU, so that decoding and training run as a whole
and give real numbers. An operation that mixes devices fails as it does on a GPU, `gpu.waits` lists
what the host waited for, and `torch.cuda.CUDAGraph` records and replays. Not simulated: a GPU's own
kernels, its memory, streams and autocast.

A tensor is a wrapper around its numbers. To torch's C++ code its device is `meta`, which needs no
support for CUDA there; all Python code sees `cuda:0`. Every operation comes to `SimulatedGpu.run`.
"""

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from functools import cache
from types import SimpleNamespace
from unittest.mock import patch

import torch
from torch import Tag, Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

GPU = torch.device("cuda", 0)
CPU = torch.device("cpu")
_aten = torch.ops.aten
_INDEXING = {_aten.index.Tensor, _aten.index_put.default, _aten.index_put_.default}
_FROM_DATA = {torch.tensor, torch.as_tensor, Tensor.new_tensor}
_active: "SimulatedGpu | None" = None


class GpuTensor(Tensor):
    """`numbers`: the same tensor on the CPU."""

    @staticmethod
    def __new__(cls, numbers: Tensor):
        layout = {
            "strides": numbers.stride(),
            "storage_offset": numbers.storage_offset(),
            "dtype": numbers.dtype,
        }
        return Tensor._make_wrapper_subclass(cls, numbers.shape, device="meta", **layout)

    def __init__(self, numbers: Tensor) -> None:
        self.numbers = numbers

    device = property(lambda self: GPU)
    is_cuda = property(lambda self: True)
    is_meta = property(lambda self: False)
    __torch_function__ = torch._C._disabled_torch_function_impl

    def __repr__(self, **_: object) -> str:
        return f"{self.numbers!r} on {GPU}"

    @classmethod
    def __torch_dispatch__(cls, operation, types, args=(), kwargs=None):
        assert _active is not None, "a tensor of a simulated GPU outlived it"
        return _active.run(operation, args, kwargs or {})


class SimulatedGpu:
    def __init__(self) -> None:
        self.waits: list[str] = []  # for what the host waited, and where
        self.replays = 0
        self.tape: list[tuple] | None = None  # the operations of the graph that is being captured

    def run(self, operation, args, kwargs):
        """One operation, by the rules of CUDA."""
        leaves = [*_leaves(args), *_leaves(kwargs.values())]
        tensors = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
        placed = [isinstance(tensor, GpuTensor) for tensor in tensors]
        target = next((leaf for leaf in leaves if isinstance(leaf, torch.device)), None)
        decomposes, is_view, is_mutable, *_ = _facts(operation)
        # A build for CUDA asks the driver for such memory
        if operation is _aten._pin_memory.default:
            return args[0].clone()
        if operation is _aten._to_copy.default:
            return self._copied(args[0], kwargs)
        if (
            operation is _aten.empty_like.default
            and any(placed)
            and (device := kwargs.get("device"))
            and not _on_gpu(device)
        ):
            # What transformers makes on `meta`, the GPU here, has its numbers already: it leaves
            # the place on the host empty.
            return _numbers(args[0]).clone()
        if operation is _aten.copy_.default and any(placed) and not all(placed):
            if not placed[0]:
                self._wait("a copy to the host")
            elif not (args[2] if len(args) > 2 else kwargs.get("non_blocking", False)):
                self._wait("a copy from the host")
        elif any(placed) or _on_gpu(target):
            if decomposes:  # in inference mode such operations come as a whole
                with _Operations():
                    return operation.decompose(*args, **kwargs)
            self._check(operation, args, tensors)
        else:
            return operation(*args, **kwargs)
        as_view = is_view and not args[0].is_inference()  # so it is normal, in inference mode too
        own = [tensor for tensor in tensors if isinstance(tensor, GpuTensor)] if is_mutable else []
        # What changes a tensor returns the same one
        changed = {id(tensor.numbers): tensor for tensor in own}
        args = _mapped(_numbers, args)
        kwargs = {name: _mapped(_numbers, value) for name, value in kwargs.items()}
        found = operation(*args, **kwargs)
        if self.tape is not None:
            self.tape.append((operation, args, kwargs, found))
        with torch.inference_mode(False) if as_view else nullcontext():
            return _mapped(
                lambda made: changed[id(made)] if id(made) in changed else _placed(made), found
            )

    def from_host(self, tensor: Tensor) -> GpuTensor:
        """A tensor of Python's numbers, for which torch waits."""
        self._wait("numbers of the host")
        return GpuTensor(tensor)

    def synchronize(self, *_: object) -> None:
        self._wait("synchronize")

    def _copied(self, source, kwargs):
        to_gpu = (
            isinstance(source, GpuTensor)
            if kwargs.get("device") is None
            else _on_gpu(kwargs["device"])
        )
        if isinstance(source, GpuTensor) and not to_gpu:
            self._wait("a copy to the host")
        elif to_gpu and not isinstance(source, GpuTensor) and not kwargs.get("non_blocking"):
            self._wait("a copy from the host")
        numbers = _numbers(source)
        kept = {
            name: value
            for name, value in kwargs.items()
            if name not in ("device", "non_blocking", "pin_memory")
        }
        found = _aten._to_copy.default(numbers, **kept)
        if self.tape is not None and to_gpu:
            assert isinstance(source, GpuTensor), (
                "a graph would replay the copy of memory of the host that is gone"
            )
            self.tape.append((_aten._to_copy.default, (numbers,), kept, found))
        return GpuTensor(found) if to_gpu else found

    def _check(self, operation, args, tensors) -> None:
        (_, _, is_mutable, is_pointwise, waits), indexes = _facts(operation), operation in _INDEXING
        if (
            operation is _aten.native_layer_norm.default
            and len({tensor.dtype for tensor in tensors}) > 1
        ):
            raise RuntimeError(
                f"expected scalar type {tensors[0].dtype} but found {tensors[1].dtype}"
            )
        for tensor in tensors:
            if isinstance(tensor, GpuTensor):
                if indexes and tensor is not args[0] and tensor.dtype in (torch.bool, torch.uint8):
                    self._wait("a mask as index")
            elif indexes and isinstance(args[0], GpuTensor):
                if tensor.dim():
                    self._wait("indices of the host")
            elif tensor.dim() or not is_pointwise or (tensor is args[0] and is_mutable):
                raise RuntimeError(
                    f"Expected all tensors to be on the same device, but {operation} found one of shape "
                    f"{list(tensor.shape)} on {tensor.device} among those on {GPU}"
                )
        if waits and not indexes:
            self._wait(str(operation))

    def _wait(self, what: str) -> None:
        if self.tape is not None:
            raise RuntimeError(f"operation not permitted when stream is capturing: {what}")
        frame = sys._getframe()
        while frame.f_back is not None and "layerskip_core" not in frame.f_code.co_filename:
            frame = frame.f_back
        self.waits.append(f"{what} at {frame.f_code.co_filename}:{frame.f_lineno}")


def _placed(made: object) -> object:
    return GpuTensor(made) if isinstance(made, Tensor) else made


@cache
def _facts(operation) -> tuple[bool, bool, bool, bool, bool]:
    """Whether it decomposes, gives a view, changes an argument, is pointwise, and waits: for
    numbers that its result, or the shape of it, depends on.
    """
    tags = {*operation.tags}
    waits = bool({Tag.data_dependent_output, Tag.dynamic_output_shape} & tags)
    return (
        operation._can_decompose(),
        operation.is_view,
        operation._schema.is_mutable,
        Tag.pointwise in tags,
        waits,
    )


def _leaves(value: object) -> Iterator[object]:
    """As torch's tree_leaves, in a fraction of the time."""
    for part in value:
        if isinstance(part, (list, tuple)):
            yield from _leaves(part)
        else:
            yield part


def _mapped(function: Callable[[object], object], value: object) -> object:
    if isinstance(value, (list, tuple)):
        return type(value)([_mapped(function, part) for part in value])
    return function(value)


def _numbers(leaf: object) -> object:
    return (
        leaf.numbers
        if isinstance(leaf, GpuTensor)
        else CPU
        if isinstance(leaf, torch.device)
        else leaf
    )


def _on_gpu(device: torch.device | None) -> bool:
    """C++ code that makes a tensor beside another one asks for `meta`."""
    return device is not None and device.type in ("cuda", "meta")


class _Operations(TorchDispatchMode):
    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        assert _active is not None
        return _active.run(operation, args, kwargs or {})


class _Calls(TorchFunctionMode):
    """Calls that C++ code would finish without an operation that can be seen."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        assert _active is not None
        args = [_indexed(value) for value in args]
        kwargs = {name: _indexed(value) for name, value in (kwargs or {}).items()}
        generator = kwargs.get("generator")
        device = kwargs.get("device")
        if generator is not None and device is not None:
            assert _on_gpu(generator.device) == _on_gpu(torch.device(device)), (
                f"a generator on {generator.device}"
            )
        if function in _FROM_DATA:
            device = kwargs.pop("device", None)
            beside = args[0] if function is Tensor.new_tensor else None
            if isinstance(beside, GpuTensor) or _on_gpu(
                None if device is None else torch.device(device)
            ):
                data = args[1:] if function is Tensor.new_tensor else args
                if isinstance(data[0], Tensor):
                    return data[0].to(GPU, **kwargs)
                if beside is not None:
                    kwargs.setdefault("dtype", beside.dtype)
                return _active.from_host(torch.tensor(*data, **kwargs))
            if device is not None:
                kwargs["device"] = device
        if function is Tensor.backward:  # in which Python code may run again
            with self:
                return torch.autograd.backward(*args, kwargs.pop("gradient", None), **kwargs)
        if function is Tensor.tolist and isinstance(args[0], GpuTensor):
            return args[0].cpu().tolist()
        if function in (Tensor.__getitem__, Tensor.__setitem__) and isinstance(args[0], GpuTensor):
            whole = args[1] if isinstance(args[1], tuple) else (args[1],)
            parts = tuple(
                _active.from_host(torch.tensor(part)) if isinstance(part, list) else part
                for part in whole
            )
            args = (args[0], parts if isinstance(args[1], tuple) else parts[0], *args[2:])
        result = function(*args, **kwargs)
        if isinstance(result, Tensor) and not isinstance(result, GpuTensor):
            assert not result.is_meta, f"{function} made a tensor without numbers"
        return result


def _indexed(value: object) -> object:
    """`cuda` as `cuda:0`: the CPU's build of torch does not know which GPU is the current one."""
    return GPU if isinstance(value, (str, torch.device)) and str(value) == "cuda" else value


_Generator = torch.Generator


class _Generators(type(_Generator)):
    def __instancecheck__(cls, other: object) -> bool:
        return isinstance(other, _Generator)


class GpuGenerator(_Generator, metaclass=_Generators):
    """Draws the CPU's numbers, on either device."""

    def __new__(cls, device="cpu"):
        made = super().__new__(cls, CPU)
        made.place = torch.device(device)
        return made

    device = property(lambda self: self.place)


class _Event:
    def __init__(self, **_: object) -> None:
        self.at = 0.0

    def record(self, *_: object) -> None:
        self.at = time.perf_counter()

    def elapsed_time(self, later: "_Event") -> float:
        return 1e3 * (later.at - self.at)


class _Graph:
    """What was captured did not run: its results have numbers only after a replay."""

    def __init__(self) -> None:
        self.tape: list[tuple] = []

    def replay(self) -> None:
        assert _active is not None
        _active.replays += 1
        with torch.inference_mode(), _below_modes():
            for operation, args, kwargs, results in self.tape:
                again = _leaves([operation(*args, **kwargs)])
                for old, new in zip(_leaves([results]), again, strict=True):
                    if _is_new(old, args, kwargs):
                        old.copy_(new)


@contextmanager
def _below_modes() -> Iterator[None]:
    with torch.utils._python_dispatch._disable_current_modes(), torch._C.DisableTorchFunction():
        yield


def _is_new(made: object, args: object, kwargs: object) -> bool:
    """Whether an operation made a tensor, instead of changing one or giving a view of it."""
    leaves = _leaves([*args, *kwargs.values()])
    given = {leaf.untyped_storage().data_ptr() for leaf in leaves if isinstance(leaf, Tensor)}
    return isinstance(made, Tensor) and made.untyped_storage().data_ptr() not in given


@contextmanager
def _capture(graph: _Graph, **_: object) -> Iterator[None]:
    assert _active is not None and _active.tape is None
    _active.tape = graph.tape
    try:
        yield
    finally:
        _active.tape = None
    for _, args, kwargs, results in graph.tape:
        for made in _leaves([results]):
            if _is_new(made, args, kwargs):
                with torch.inference_mode(), _below_modes():
                    made.fill_(-1)


def _forget_devices() -> None:
    """What transformers remembers of this machine."""
    remembered = vars(sys.modules.get("transformers.utils.import_utils", torch))
    for name, function in remembered.items():
        if name.startswith("is_torch_") and hasattr(function, "cache_clear"):
            function.cache_clear()


@contextmanager
def simulated_cuda() -> Iterator[SimulatedGpu]:
    global _active
    assert _active is None
    properties = SimpleNamespace(
        name="simulated", total_memory=1 << 34, major=8, minor=0, multi_processor_count=1
    )
    gpu = SimulatedGpu()
    nothing = {name: lambda *_, **__: None for name in (
        "_lazy_init", "set_device", "empty_cache", "manual_seed", "manual_seed_all", "reset_peak_memory_stats"
    )}  # fmt: skip
    answers = {
        "is_available": True, "device_count": 1, "current_device": 0, "max_memory_allocated": 1 << 20,
        "memory_allocated": 1 << 20,
        "get_device_name": "simulated", "get_device_properties": properties, "get_device_capability": (8, 0),
        "is_bf16_supported": True, "is_current_stream_capturing": False,
        "graph_pool_handle": (0, 1),
    }  # fmt: skip
    called = {name: lambda *_, answer=answer, **__: answer for name, answer in answers.items()}
    classes = {
        "Event": _Event, "device": lambda *_: nullcontext(), "Stream": type("Stream", (), {"__init__": lambda *_: None}),
        "current_stream": lambda *_: None, "CUDAGraph": _Graph, "graph": _capture, "synchronize": gpu.synchronize,
    }  # fmt: skip
    with ExitStack() as stack:
        stack.enter_context(patch.multiple(torch.cuda, **nothing, **called, **classes))
        stack.enter_context(patch.object(torch, "Generator", GpuGenerator))
        # Accelerate asks for the device, the optimizer whether the device's stream is recorded: in
        # C++, in PyTorch's build for CUDA.
        stream = SimpleNamespace(is_capturing=lambda: False)
        stack.enter_context(
            patch.multiple(
                torch.accelerator,
                current_accelerator=lambda *_, **__: torch.device("cuda"),
                current_stream=lambda *_: stream,
            )
        )
        swaps = torch.__future__.get_swap_module_params_on_conversion()
        torch.__future__.set_swap_module_params_on_conversion(True)  # tied parameters stay tied
        stack.callback(torch.__future__.set_swap_module_params_on_conversion, swaps)
        stack.callback(_forget_devices)
        _forget_devices()
        _active = gpu
        try:
            with _Operations(), _Calls():
                yield gpu
        finally:
            _active = None
