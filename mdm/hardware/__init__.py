"""Where a run happens: device and precision, compiler, CUDA graphs; one process, or many, laid out in a mesh.

processes   what a process is, and what all of them agree on
mesh        how processes are laid out
sharding    FSDP2 and tensor parallelism over the mesh
compiling   torch.compile, block by block
graphs      CUDA graphs of sampling
"""

from mdm.hardware.compiling import COMPILING, can_compile, check_compile, compile_blocks
from mdm.hardware.graphs import Recorded, Recorder, cuda_graph, recorded
from mdm.hardware.mesh import MeshSettings, number_of_processes, supposing
from mdm.hardware.processes import (
    Hardware,
    barrier,
    check_hardware,
    cpu_name,
    fast_bf16,
    hardware,
    multiplies_float8,
)
from mdm.hardware.sharding import local, parallelize, reshard, shard, sync_gradients, whole

__all__ = [
    "COMPILING",
    "Hardware",
    "MeshSettings",
    "Recorded",
    "Recorder",
    "barrier",
    "can_compile",
    "check_compile",
    "check_hardware",
    "compile_blocks",
    "cpu_name",
    "cuda_graph",
    "fast_bf16",
    "hardware",
    "local",
    "multiplies_float8",
    "number_of_processes",
    "parallelize",
    "recorded",
    "reshard",
    "shard",
    "supposing",
    "sync_gradients",
    "whole",
]
