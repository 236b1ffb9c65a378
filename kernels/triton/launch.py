# SPDX-License-Identifier: Apache-2.0
"""A kernel launch as data: what a launcher runs is what the compile gate compiles, and what a later call repeats."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from threading import Lock
from typing import Any

import torch
import triton
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from triton.compiler import CompiledKernel

from . import configs
from .configs import INTERPRET, Config

#: Bytes between the parts of a workspace: what a GPU's allocator aligns to, and more than Triton asks about.
ALIGNMENT = 256

#: Plans that are kept before all are forgotten; a model has some, an application with ever new lengths many.
MOST_PLANS = 4096


@dataclass(frozen=True)
class Launch:
    """One kernel with its arguments, compile-time constants and configuration."""

    kernel: Any
    programs: int
    arguments: dict[str, Any]
    constants: dict[str, Any]
    config: Config

    def options(self) -> dict[str, Any]:
        """Compiler options; fusing a * b + c is named, since Triton's default for it is about to change."""
        return {"num_warps": self.config.warps, "num_stages": self.config.stages, "enable_fp_fusion": True}


class Step:
    """A launch whose tensors are numbers in a list: those of a call, or their addresses."""

    def __init__(self, launch: Launch, number: Callable[[Tensor], int]):
        self.launch = launch
        values = launch.arguments | launch.constants
        self.template = [values[name] for name in launch.kernel.arg_names]
        self.places: list[tuple[int, int]] = []
        self.tuples: list[tuple[int, list[int | None]]] = []
        for place, value in enumerate(self.template):
            if isinstance(value, Tensor):
                self.places.append((place, number(value)))
            elif isinstance(value, tuple) and any(isinstance(x, Tensor) for x in value):
                self.tuples.append((place, [None if x is None else number(x) for x in value]))
        for place in [*dict(self.places), *dict(self.tuples)]:
            self.template[place] = None
        self.compiled: Callable | None = None

    def arguments(self, tensors: Sequence[Any]) -> list:
        """The arguments in the kernel's order."""
        found = self.template.copy()
        for place, i in self.places:
            found[place] = tensors[i]
        for place, several in self.tuples:
            found[place] = tuple(None if i is None else tensors[i] for i in several)
        return found

    def first(self, tensors: Sequence[Tensor]) -> None:
        """Launch by Triton's own path, which compiles the kernel for these arguments or finds it."""
        grid = (self.launch.programs, 1, 1)
        options = {} if INTERPRET else self.launch.options()
        kernel = self.launch.kernel[grid](*self.arguments(tensors), **options)
        if isinstance(kernel, CompiledKernel):
            self.compiled = kernel[grid]


class Plan:
    """What one call allocates and launches, for any tensors of one signature."""

    def __init__(self, make: Callable, tensors: Sequence[Tensor | None], settings: tuple, device: torch.device):
        inputs = [None if x is None else _shape_of(x) for x in tensors]
        with configs.planning_for(device), _AllocatesOnly():
            outputs, launches = make(*inputs, *settings)
        self.outputs = [(x.shape, x.stride(), x.dtype) for x in outputs]
        self.device, self.workspace = device, 0
        # Storage -> number of a tensor, bytes that it begins in the workspace: what is no input and no output.
        self._owners = {_owner(x): i for i, x in enumerate((*inputs, *outputs)) if x is not None}
        self._count = len(inputs) + len(outputs)
        #: Further pointers: of which input or output (None: the workspace), bytes from there, dtype.
        self.others: list[tuple[int | None, int, torch.dtype]] = []
        self._starts: dict[int, int] = {}
        known = [None if x is None else (_owner(x), x.dtype) for x in (*inputs, *outputs)]
        self.steps = [Step(x, lambda t: self._number(t, known)) for x in launches if x.programs]

    def _number(self, x: Tensor, known: list) -> int:
        """Where the pointer of ``x`` is among all pointers of a call."""
        owner, offset = _owner(x), int(x.storage_offset()) * x.element_size()
        source = self._owners.get(owner)
        if source is not None and not offset and known[source] == (owner, x.dtype):
            return source
        if source is None:
            if owner not in self._starts:
                self._starts[owner] = self.workspace
                # What is empty has an address, too.
                self.workspace += -(-max(1, x.untyped_storage().nbytes()) // ALIGNMENT) * ALIGNMENT
            offset += self._starts[owner]
        pointer = (source, offset, x.dtype)
        if pointer not in self.others:
            self.others.append(pointer)
        return self._count + self.others.index(pointer)

    def run(self, inputs: Sequence[Tensor | None], addresses: list[int]) -> list[Tensor]:
        """Allocate and launch; ``addresses`` are those of the inputs."""
        device = self.device
        outputs = [torch.empty_strided(*shape, dtype=dtype, device=device) for *shape, dtype in self.outputs]
        workspace = torch.empty(self.workspace, dtype=torch.uint8, device=device) if self.workspace else None
        if INTERPRET:
            tensors = self.tensors(inputs, outputs, workspace)
            for step in self.steps:
                step.first(tensors)
            return outputs
        driver = triton.runtime.driver.active
        current = driver.get_current_device()
        if device.index is not None and device.index != current:
            with torch.cuda.device(device):
                self._launch(inputs, outputs, workspace, addresses, driver.get_current_stream(device.index))
        else:
            self._launch(inputs, outputs, workspace, addresses, driver.get_current_stream(current))
        return outputs

    def _launch(self, inputs, outputs, workspace, addresses: list[int], stream: int) -> None:
        addresses += [x.data_ptr() for x in outputs]
        if self.others:
            begin = 0 if workspace is None else workspace.data_ptr()
            addresses += [(begin if i is None else addresses[i]) + offset for i, offset, _ in self.others]
        for step in self.steps:
            if step.compiled is None:
                step.first(self.tensors(inputs, outputs, workspace))
            else:
                step.compiled(*step.arguments(addresses), stream=stream)

    def tensors(self, inputs: Sequence, outputs: Sequence, workspace: Any) -> list[Any]:
        """A tensor for every address, in their order."""
        found = [*inputs, *outputs]
        return found + [_view(workspace if i is None else found[i], offset, x) for i, offset, x in self.others]


_plans: dict[tuple, Plan] = {}
#: Backward passes run in a thread of each device, and which device is planned for is a global.
_planning = Lock()


def launch(make: Callable, tensors: Sequence[Any], settings: tuple = ()) -> list[Tensor]:
    """Run the launches that ``make(*tensors, *settings)`` plans, and return the tensors that it allocates for results.

    ``tensors`` may hold None behind the first.
    ``make`` returns those tensors and the list of launches. It sees tensors without memory and may do nothing with
    them but allocate and view, so that what it plans depends on shapes, strides, dtypes and settings alone: it runs
    once for all calls that agree in these (and in which addresses are multiples of 16, which Triton compiles for).
    """
    addresses = []
    device = tensors[0].device
    key: list[Any] = [make, settings, device, configs.stamp]
    for x in tensors:
        if x is None:
            addresses.append(0)
            key.append(None)
        else:
            address = x.data_ptr()
            addresses.append(address)
            key += (x.shape, x.stride(), x.dtype, address & 15 == 0)
    signature = tuple(key)
    plan = _plans.get(signature)
    if plan is None:
        with _planning:
            if len(_plans) >= MOST_PLANS:
                _plans.clear()
            plan = _plans[signature] = Plan(make, tensors, settings, device)
    return plan.run(tensors, addresses)


class _AllocatesOnly(TorchDispatchMode):
    """Refuses what would be computed once and missed by every later call."""

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        if not op.is_view and "empty" not in op.__name__:
            raise RuntimeError(f"a plan may only allocate and view tensors, not call {op}")
        return op(*args, **(kwargs or {}))


def _shape_of(x: Tensor) -> Tensor:
    return torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device="meta")


def _owner(x: Tensor) -> int:
    return x.untyped_storage()._cdata


def _view(x: Tensor, offset: int, dtype: torch.dtype) -> Tensor:
    """A tensor of ``dtype`` that begins ``offset`` bytes behind ``x``, for its address alone."""
    whole = torch.empty(0, dtype=dtype, device=x.device)
    begin = x.storage_offset() * x.element_size() + offset
    return whole.set_(x.untyped_storage(), begin // whole.element_size(), (1,), (1,))


def upcast(dtype: torch.dtype) -> bool:
    """The interpreter computes with the bit patterns of bfloat16; there it must be float32 from the load on."""
    return bool(INTERPRET) and dtype == torch.bfloat16


def split(dtype: torch.dtype) -> bool:
    """Whether tiles that need no mask have a loop of their own.

    Beside products of float32 a mask is nothing, and twice the code takes twice as long to compile.
    """
    return bool(INTERPRET) or dtype.itemsize == 2
