"""Where torch.compile can work, and compiling a model block by block."""

from __future__ import annotations

import sysconfig
from pathlib import Path
from typing import Any

import torch

from mdm.config import UserError
from mdm.hardware.graphs import cuda_graph
from mdm.hardware.processes import Hardware


def can_compile(device: torch.device) -> bool:
    """Whether torch.compile can work here: on a CPU it needs a C++ compiler and Python's headers."""
    if device.type != "cpu":
        return True
    from torch._inductor import cpp_builder, exc

    try:
        cpp_builder.get_cpp_compiler()
    except exc.InvalidCxxCompiler:
        return False
    return (Path(sysconfig.get_path("include")) / "Python.h").is_file()  # what it compiles includes Python's headers


def check_compile(setting: str, sampling_on: str | None = None) -> None:
    """Raises UserError for another value (YAML's booleans arrive as "True" and "False").

    sampling_on: the setting `device` of a recipe that samples, and so may record graphs
    """
    choices = ("auto", "true", "false") if sampling_on is None else ("auto", "true", "false", "graphs")
    if setting.lower() not in choices:
        raise UserError(f"compile: {setting!r} is not one of {', '.join(choices)}")
    if setting.lower() == "graphs" and (sampling_on == "cpu" or not torch.cuda.is_available()):
        raise UserError("compile: graphs records CUDA graphs, and there is no CUDA device; set compile=auto")


COMPILING = "The model's blocks are compiled before the first step: half a minute to a minute, in which nothing else happens."


def compile_blocks(model: Any, setting: str, hw: Hardware) -> bool:
    """Compiles each transformer block ("auto": where it can be done; "true", "false"): equal blocks share one graph.

    Lengths differ from stream to stream, so the graph is made for any of them. "graphs" also records the passes of sampling.
    """
    check_compile(setting, hw.device.type)
    if setting.lower() == "graphs":
        model.recorder = cuda_graph
    able = can_compile(hw.device)
    if setting.lower() == "true" and not able:
        raise UserError("compile: true was asked for, and there is no C++ compiler with Python's headers; set compile=auto")
    if hw.copies > 1:  # torch 2.13 does not trace split weights at lengths that vary
        hw.say("Blocks that are split (mesh.tensor) are not compiled: they run eagerly.")
        return False
    if setting.lower() == "false" or not able:
        if setting == "auto":
            hw.say("No C++ compiler (or no Python headers) found: the model runs eagerly, about a third slower.")
        return False
    for block in (*model.blocks, *model.order_blocks):
        block.compile(dynamic=True)
    return True
