"""A GPU that is not there: this process takes one for present, and tensors on it have shapes and no
numbers.

What the host computes is computed; what is asked of the device is noted, operation by operation.
Nothing can be read back: a host that waits for the device is noted too, with the line that does.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import shutil
import subprocess
import traceback
from collections import Counter
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import torch._subclasses.fake_tensor as fake_tensor
import torch.distributed as dist
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

SOURCE = Path(__file__).with_name("device.cpp")
aten: Any = torch.ops.aten


def build(folder: Path) -> Path | None:
    """Compile `device.cpp` against this torch, once for both; None without a compiler."""
    name = hashlib.sha256(SOURCE.read_bytes() + torch.__version__.encode()).hexdigest()[:16]
    library, root = folder / f"device-{name}.so", Path(torch.__file__).parent
    compiler = shutil.which("g++")
    if library.exists() or compiler is None:
        return library if library.exists() else None
    ours = library.with_suffix(f".{os.getpid()}")  # others may build it at this moment
    words = [compiler, "-std=c++20", "-shared", "-fPIC", f"-I{root}/include", str(SOURCE)]
    libraries = [f"-L{root}/lib", "-lc10", "-ltorch_cpu", "-o", str(ours)]
    subprocess.run([*words, *libraries], check=True, timeout=600)
    ours.replace(library)
    return library


class Device(TorchDispatchMode):
    """What is asked of the device from here on.

    Attributes:
        launches: operations that write memory of the device, in their order. A kernel each, or
            several; views are none.
        waits: where the host has waited for the device.
        pageable: where memory was copied to the device that is not pinned: the host waits then,
            if there is much of it.
    """

    def __init__(self) -> None:
        super().__init__()
        self.launches: list[str] = []
        self.waits: list[str] = []
        self.pageable: list[str] = []
        self._mode = FakeTensorMode(allow_non_fake_inputs=True)
        self._pinned: list[Tensor] = []  # keeps them: their addresses are theirs

    @classmethod
    def is_infra_mode(cls) -> bool:
        """So that torch.compile compiles below it."""
        return True

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        leaves = tree_leaves((args, kwargs))
        tensors = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
        there = any(isinstance(tensor, FakeTensor) for tensor in tensors)
        target = any(isinstance(leaf, torch.device) and leaf.type == "cuda" for leaf in leaves)
        if not there and not target:
            return self._on_the_host(func, args, kwargs)
        if func is aten._local_scalar_dense.default:
            self.waits.append(f"a number is read at {_line()}")
            return 0
        if there:
            with self._mode:
                found = func(*args, **kwargs)
        else:
            found = self._sent(func, args, kwargs)
        made = [leaf for leaf in tree_leaves(found) if isinstance(leaf, Tensor)]
        if there and any(tensor.device.type == "cpu" for tensor in made):
            self.waits.append(f"{func} copies to the host at {_line()}")
        given = {tensor.untyped_storage()._cdata for tensor in tensors}
        anew = any(tensor.untyped_storage()._cdata not in given for tensor in made)
        if func._schema.is_mutable or (anew and "empty" not in func._schema.name):
            self.launches.append(func._schema.name.partition("::")[2])
        return found

    def _on_the_host(self, func: Any, args: Any, kwargs: Any) -> Any:
        if func is aten._pin_memory.default:
            self._pinned.append(args[0].clone())
            return self._pinned[-1]
        pinned = kwargs.pop("pin_memory", False)
        found = func(*args, **kwargs)
        if pinned:
            self._pinned.append(found)
        return found

    def _sent(self, func: Any, args: Any, kwargs: Any) -> Any:
        if func is not aten._to_copy.default:
            with self._mode:
                return func(*args, **kwargs)
        (source,) = args
        memory = source.untyped_storage().data_ptr()
        if all(memory != pinned.untyped_storage().data_ptr() for pinned in self._pinned):
            self.pageable.append(f"{source.numel()} numbers at {_line()}")
        with self._mode:
            return torch.empty(source.shape, dtype=kwargs.get("dtype") or source.dtype, device=0)

    def marks(self) -> tuple[int, int, int]:
        """How much is noted so far."""
        return len(self.launches), len(self.waits), len(self.pageable)

    def between(self, low: tuple[int, int, int], high: tuple[int, int, int]) -> dict[str, Any]:
        """What was noted between two marks: each operation with its number, and the lines."""
        launches, waits, pageable = (
            noted[a:b]
            for noted, a, b in zip(
                (self.launches, self.waits, self.pageable), low, high, strict=True
            )
        )
        return {"launches": dict(Counter(launches)), "waits": waits, "pageable": pageable}


def _line() -> str:
    """The innermost line of ours, or of DeepSpeed's, that is at work."""
    for frame in reversed(traceback.extract_stack()):
        if any(part in frame.filename for part in ("/runner/", "/span_kernels/", "/deepspeed/run")):
            return f"{Path(frame.filename).name}:{frame.lineno}: {frame.line}"
    return "no line of ours"


def install(library: Path) -> Device:
    """Let this process, whatever it has imported, have one GPU. There is no way back."""
    ctypes.CDLL(str(library)).arm()
    torch._C._set_only_lift_cpu_tensors(True)  # torch.tensor(..., device="cuda") asks the device
    device = Device()
    _pretend_cuda(device)
    _pretend_memory()
    from deepspeed.accelerator import set_accelerator
    from deepspeed.accelerator.cuda_accelerator import CUDA_Accelerator

    set_accelerator(CUDA_Accelerator())
    return device


def _pretend_cuda(device: Device) -> None:
    def set_device(index: Any) -> None:
        index = index if isinstance(index, int) else torch.device(index).index
        if index:
            raise RuntimeError(f"CUDA error: invalid device ordinal ({index} of 1)")

    def waits(*_: Any) -> None:
        device.waits.append(f"a synchronisation at {_line()}")

    stream = SimpleNamespace(
        device=torch.device("cuda", 0),
        wait_stream=lambda other: None,
        synchronize=waits,
        record_event=lambda event=None: None,
    )
    event = SimpleNamespace(record=lambda *_: None, query=lambda: True, synchronize=waits)
    size = 141 * 2**30
    answers: dict[str, Any] = {
        "is_available": True,
        "is_initialized": True,
        "_lazy_init": None,
        "device_count": 1,
        "current_device": 0,
        "get_device_capability": (9, 0),
        "get_device_name": "H200 (not there)",
        "is_bf16_supported": True,
        "mem_get_info": (size, size),
        "get_device_properties": SimpleNamespace(
            name="H200 (not there)",
            major=9,
            minor=0,
            total_memory=size,
            multi_processor_count=132,
            warp_size=32,
            regs_per_multiprocessor=65536,
            max_threads_per_multi_processor=2048,
        ),
        "manual_seed_all": None,
        "get_rng_state": torch.zeros(16, dtype=torch.uint8),
        "set_rng_state": None,
        "empty_cache": None,
        "memory_allocated": 0,
        "max_memory_allocated": 0,
        "memory_reserved": 0,
        "max_memory_reserved": 0,
        "reset_peak_memory_stats": None,
        "current_stream": stream,
        "default_stream": stream,
        "Stream": stream,
        "Event": event,
        "stream": nullcontext(),
    }
    for name, answer in answers.items():
        setattr(torch.cuda, name, lambda *_, _answer=answer, **__: _answer)
    torch._C._cuda_getDevice = lambda: 0  # type: ignore[attr-defined]
    torch.cuda.set_device = set_device
    torch.cuda.synchronize = waits
    for name in ("range_push", "range_pop"):
        setattr(torch.cuda.nvtx, name, lambda *_: None)
    fake_tensor.init_gpu_context = lambda _: None


def _pretend_memory() -> None:
    Tensor.record_stream = lambda self, stream: None  # type: ignore[method-assign]
    # Views of one memory have places in it, also where there is none.
    FakeTensor.data_ptr = lambda self: (  # type: ignore[method-assign]
        (self.untyped_storage()._cdata << 40) + self.storage_offset() * self.element_size()
    )

    def apply(self: nn.Module, function: Any, recurse: bool = True) -> nn.Module:
        # As on a device, where parameters stay the objects that they are. torch swaps them.
        for child in self.children() if recurse else ():
            child._apply(function)
        for held in (self._parameters, self._buffers):
            for name, tensor in held.items():
                if tensor is None:
                    continue
                with torch.no_grad():
                    made = function(tensor)
                if isinstance(tensor, nn.Parameter) and isinstance(tensor, FakeTensor):
                    tensor.data = made
                elif isinstance(tensor, nn.Parameter):
                    held[name] = nn.Parameter(made, tensor.requires_grad)
                else:
                    held[name] = made
        return self

    nn.Module._apply = apply  # type: ignore[method-assign]


def pretend_group(rank: int, world: int) -> dict[str, Any]:
    """Let a process group come to be at once, with no other rank; returns what NCCL is told of."""
    told: dict[str, Any] = {}
    init, new = dist.init_process_group, dist.new_group

    def init_process_group(backend: str, **options: Any) -> None:
        told.update(options, backend=backend)
        init("fake", store=FakeStore(), rank=rank, world_size=world)

    dist.init_process_group = init_process_group
    dist.new_group = lambda *ranks, **_: new(*ranks, backend="fake")
    return told
