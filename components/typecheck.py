"""Run-time checks of shapes and types, by beartype as PEP 484 has it: an int may stand where a float is asked for."""

from collections.abc import Sequence
from types import ModuleType
from typing import Any

from beartype import BeartypeConf, beartype
from jaxtyping import install_import_hook

check: Any = beartype(conf=BeartypeConf(is_pep484_tower=True))  # a decorator


def install(packages: Sequence[str]) -> None:
    """Has every function and dataclass of these packages checked, of what is imported from now on.

    jaxtyping gives compiled files another name while a module of theirs runs, and so to all that this module imports: torch
    and its like, which have no file of that name, would be compiled anew in every process. Here the name is theirs alone.
    """
    finder: Any = install_import_hook(packages, f"{__name__}.check").hook
    found = finder.find_spec

    def find_spec(name: str, *asked: Any) -> Any:
        spec = found(name, *asked) if name != __name__ else None  # imported anew, it is not checked by itself
        if spec is not None:
            _narrow(spec.loader)
        return spec

    finder.find_spec = find_spec


def _narrow(loader: Any) -> None:
    """The loader reads the code of its module under the other name, and runs it under the usual one."""
    under_the_other_name = loader.exec_module

    def exec_module(module: ModuleType) -> None:
        read: list[Any] = []

        def get_code(name: str) -> Any:
            read.append(type(loader).get_code(loader, name))
            return compile("", loader.path, "exec")  # nothing is run yet

        loader.get_code = get_code
        try:
            under_the_other_name(module)
        finally:
            del loader.get_code
        exec(read[0], module.__dict__)

    loader.exec_module = exec_module
