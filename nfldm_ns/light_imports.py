"""Imports of diffusers, and of what it needs, that take only what is used.

A few packages of diffusers import all of their modules at once, among them dozens of transformers of other models, and
`diffusers.utils.torch_utils` imports torch's compiler for one decorator: ten seconds of CPU time before a scene is
sampled. Here these packages import their modules when they are asked for them, as diffusers' own outer packages do, and
the compiler is imported when something is compiled. To save a model, all of torch.distributed.tensor and sympy would
be imported, to see that none of its weights is sharded. All names stay where they are and what they are; packages whose
`__init__.py` does more than to import, and other versions of diffusers that do it otherwise, are left as they are.
"""

from __future__ import annotations

import ast
import contextlib
import functools
import importlib
import sys
from collections.abc import Callable, Iterator, Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder, SourceFileLoader
from importlib.util import find_spec
from types import ModuleType
from typing import Any

LAZY_PACKAGES = (
    "diffusers.hooks",
    "diffusers.models.autoencoders",
    "diffusers.models.transformers",
    "diffusers.models.unets",
)
COMPILER = "torch._dynamo"
SHARDED, ASK_FOR_SHARDS = "torch.distributed.tensor", ("_get_unique_id", "get_torch_storage_size")
SCHEDULERS = "diffusers.schedulers.scheduling_"
OF_SCIPY = ("scipy.integrate", "scipy.stats")
TRANSFORMERS = "transformers"
MODELS = "transformers.modeling_utils"
PEFT = "peft"
LATER_CLASSES = ("AutoImageProcessor", "PreTrainedModel")
_allowed: list[Any] = []  # what diffusers let into graphs before there was a compiler


class _LazyPackage(SourceFileLoader):
    """Makes a package that imports its modules when names of them are asked for."""

    def exec_module(self, module: ModuleType) -> None:
        origins = lazy_names(self.get_source(module.__name__) or "")
        if origins is None:
            super().exec_module(module)
            return
        package = module.__name__

        def find(name: str) -> Any:
            if name not in origins:
                raise AttributeError(f"module {package!r} has no attribute {name!r}")
            submodule, original = origins[name]
            value = getattr(importlib.import_module(f"{package}.{submodule}"), original)
            setattr(module, name, value)
            return value

        module.__getattr__ = find  # type: ignore[method-assign]
        module.__all__ = list(origins)  # type: ignore[attr-defined]


def lazy_names(source: str) -> dict[str, tuple[str, str]] | None:
    """The module and the name in it of each name that an `__init__.py` imports from its own modules.

    Returns:
        None if the file does anything else, so that it has to be run.
    """
    names: dict[str, tuple[str, str]] = {}
    statements = list(ast.parse(source).body)
    while statements:
        statement = statements.pop(0)
        if isinstance(statement, ast.If) and ast.unparse(statement.test) == "is_torch_available()":
            if statement.orelse:
                return None
            statements = [*statement.body, *statements]
        elif isinstance(statement, ast.ImportFrom) and statement.level == 1 and statement.module:
            if any(alias.name == "*" for alias in statement.names):
                return None
            names |= {alias.asname or alias.name: (statement.module, alias.name) for alias in statement.names}
        elif not (isinstance(statement, ast.ImportFrom) and ast.unparse(statement).endswith("is_torch_available")):
            return None
    return names


class _Around(Loader):
    """Runs a module by its own loader, with something before and after."""

    def __init__(self, loader: Loader, around: Callable[[Loader, ModuleType], None]) -> None:
        self._loader, self._around = loader, around

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self._loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        self._around(self._loader, module)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._loader, name)


class _LaterModule(ModuleType):
    """Stands for a module until something of it is asked for that it does not know itself."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        if sys.modules.get(self.__name__) is self:
            del sys.modules[self.__name__]
        return getattr(importlib.import_module(self.__name__), name)


@contextlib.contextmanager
def _standing_in(*stand_ins: _LaterModule) -> Iterator[None]:
    """Lets imports find stand-ins in the place of modules that are not there yet."""
    used = [stand_in for stand_in in stand_ins if stand_in.__name__ not in sys.modules]
    sys.modules.update({stand_in.__name__: stand_in for stand_in in used})
    try:
        yield
    finally:
        for stand_in in used:
            if sys.modules.get(stand_in.__name__) is stand_in:
                del sys.modules[stand_in.__name__]


def _is_there(name: str) -> bool:
    return not isinstance(sys.modules.get(name), _LaterModule | None)


# torch's compiler


def _without_compiler(loader: Loader, module: ModuleType) -> None:
    """Runs a module whose decorators alone want the compiler."""
    stand_in = _LaterModule(COMPILER)
    stand_in.allow_in_graph = _allow_later  # type: ignore[attr-defined]
    stand_in.disable = _disable_later  # type: ignore[attr-defined]
    with _standing_in(stand_in):
        loader.exec_module(module)
    compiled = vars(module).get("is_compiled_module")
    if compiled is not None:

        @functools.wraps(compiled)
        def is_compiled_module(candidate: Any) -> bool:
            return _is_there(COMPILER) and compiled(candidate)  # without the compiler nothing is compiled

        module.is_compiled_module = is_compiled_module  # type: ignore[attr-defined]


def _allow_later(function: Any) -> Any:
    """`torch._dynamo.allow_in_graph`, once there is a compiler."""
    _allowed.append(function)
    return function


def _disable_later(function: Any = None, recursive: bool = True, **options: Any) -> Any:
    """`torch._dynamo.disable`, once there is a compiler, as torch itself does it for its optimisers."""
    if function is None:
        return functools.partial(_disable_later, recursive=recursive, **options)
    disabled = None

    @functools.wraps(function)
    def run(*args: Any, **kwargs: Any) -> Any:
        nonlocal disabled
        if disabled is None and _is_there(COMPILER):
            disabled = sys.modules[COMPILER].disable(function, recursive, **options)
        return (disabled or function)(*args, **kwargs)

    return run


def _allow_now(loader: Loader, module: ModuleType) -> None:
    """Runs the compiler's package, and tells it what diffusers let into graphs before."""
    loader.exec_module(module)
    while _allowed:
        module.allow_in_graph(_allowed.pop(0))  # type: ignore[attr-defined]


# torch's sharded tensors


def _without_sharded_tensors(loader: Loader, module: ModuleType) -> None:
    """Runs a module that asks of every tensor it saves whether it is sharded: none is before there are such tensors."""
    loader.exec_module(module)
    for name in ASK_FOR_SHARDS:
        if name in vars(module):
            setattr(module, name, _not_asking(vars(module)[name]))


def _not_asking(function: Callable[[Any], Any]) -> Callable[[Any], Any]:
    @functools.wraps(function)
    def run(tensor: Any) -> Any:
        if SHARDED in sys.modules:
            return function(tensor)
        sys.modules[SHARDED] = None  # type: ignore[assignment]  # an import of it fails at once
        try:
            return function(tensor)
        finally:
            sys.modules.pop(SHARDED, None)

    return run


# transformers and scipy


class _LaterClass(type):
    """Stands for a class of transformers until it is made, called or asked for something."""

    def _found(cls) -> Any:
        return getattr(importlib.import_module(TRANSFORMERS), cls.__name__)

    def __getattr__(cls, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return getattr(cls._found(), name)

    def __call__(cls, *args: Any, **kwargs: Any) -> Any:
        return cls._found()(*args, **kwargs)

    def __instancecheck__(cls, instance: Any) -> bool:
        return MODELS in sys.modules and isinstance(instance, cls._found())

    def __subclasscheck__(cls, subclass: type) -> bool:
        return MODELS in sys.modules and issubclass(subclass, cls._found())


def _without_transformers(loader: Loader, module: ModuleType) -> None:
    """Runs a module that wants classes of transformers only to know their objects, or to read them from files.

    Where peft is installed diffusers imports it, and it makes use of these classes at once: then all is as it is.
    """
    if find_spec(PEFT) is not None:
        loader.exec_module(module)
        return
    transformers = importlib.import_module(TRANSFORMERS)
    later = {name: _LaterClass(name, (), {}) for name in LATER_CLASSES if name not in vars(transformers)}
    vars(transformers).update(later)
    try:
        loader.exec_module(module)
    finally:
        for name, stand_in in later.items():
            if vars(transformers).get(name) is stand_in:
                del vars(transformers)[name]


def _without_scipy(loader: Loader, module: ModuleType) -> None:
    """Runs a scheduler, which needs scipy for rare kinds of schedules, and finds it when it does."""
    with _standing_in(*map(_LaterModule, OF_SCIPY)):
        loader.exec_module(module)


AROUND = {
    "diffusers.utils.torch_utils": _without_compiler,
    "diffusers.hooks.group_offloading": _without_compiler,
    "diffusers.loaders.lora_base": _without_transformers,
    "diffusers.loaders.single_file_utils": _without_transformers,
    "diffusers.pipelines.pipeline_loading_utils": _without_transformers,
    "diffusers.pipelines.pipeline_utils": _without_compiler,
    COMPILER: _allow_now,
    "huggingface_hub.serialization._torch": _without_sharded_tensors,
}


def _around(name: str) -> Callable[[Loader, ModuleType], None] | None:
    return _without_scipy if name.startswith(SCHEDULERS) else AROUND.get(name)


class LightImports(MetaPathFinder):
    """Finds the modules above before Python's own finders do."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        around = _around(fullname)
        if around is None and fullname not in LAZY_PACKAGES:
            return None
        spec = PathFinder.find_spec(fullname, path, target)
        if spec is None or type(spec.loader) is not SourceFileLoader:
            return spec
        if around is None:
            spec.loader = _LazyPackage(spec.loader.name, spec.loader.path)
        else:
            spec.loader = _Around(spec.loader, around)
        return spec


def import_lightly() -> None:
    """Lets everything that is imported from now on import diffusers this way."""
    if not any(isinstance(finder, LightImports) for finder in sys.meta_path):
        sys.meta_path.insert(0, LightImports())
