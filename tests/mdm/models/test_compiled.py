"""What only compiled code shows: no graph break, no recompilation, and what blocks keep for their backward pass.

Shapes are not checked in compiled code, so the tests of this file run in a process of their own, which the first one starts.
"""

import os
import subprocess
import sys

import pytest
import torch

from mdm.hardware import Hardware, can_compile, compile_blocks

CHECKED = os.environ.get("MDM_TYPECHECK") == "1"
ALONE = pytest.mark.skipif(CHECKED, reason="runs in a process without shape checks")
pytestmark = pytest.mark.skipif(not can_compile(torch.device("cpu")), reason="no C++ compiler")


@pytest.mark.skipif(not CHECKED, reason="it starts the others")
def test_compiled_code_in_a_process_without_shape_checks():
    env = {**os.environ, "MDM_TYPECHECK": "0", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "pytest", "--noconftest", "-n", "0", __file__]  # the conftest turns the checks on
    done = subprocess.run(command, capture_output=True, text=True, env=env, timeout=300)
    assert done.returncode == 0, done.stdout[-3000:]
    assert "5 passed" in done.stdout


@ALONE
def test_no_graph_breaks_and_no_recompilations_over_50_steps(tmp_path):
    """Streams of other lengths, and other counts of masked positions in every step: after a warm-up nothing is compiled."""
    import torch._dynamo as dynamo

    from mdm.config import load
    from mdm.data.pipeline import next_step
    from mdm.recipe import load_recipe
    from tests.recipes.conftest import CONFIG

    recipe = load_recipe("pretrain")
    path = tmp_path / "config.yaml"
    path.write_text(CONFIG.format(output_dir=tmp_path / "out"))
    cfg = load(recipe.Settings, path, ["compile=true", "tokens=1000000", "batch.logical=96", "batch.micro=48"])
    recipe.validate(cfg)
    run = recipe.Pretrain(cfg, Hardware(torch.device("cpu"), 0, 1, False))
    batches, shapes = iter(run.loader), set()
    for _ in range(12):
        run.step(next_step(batches))
    with dynamo.config.patch(error_on_recompile=True):
        for _ in range(50):
            micros = next_step(batches)
            shapes |= {tuple(len(p.index) for p in m.positions) for m in micros}
            run.step(micros)
    assert run.compiled
    assert len(shapes) > 5  # the counts did differ
    assert not dynamo.utils.counters["graph_break"]


@ALONE
@pytest.mark.parametrize("mode", [None, "selective", "full"])
def test_activations_are_near_what_compiled_blocks_keep(mode):
    """Rows long enough for the fused attention; the count leaves out small tensors, and a compiler may keep others."""
    from mdm.models import builders
    from mdm.models.memory import checkpoint_blocks
    from mdm.training.planner import kept_bytes

    model = builders.model(vocab_size=50, max_length=640, width=128, num_layers=4, num_heads=2)
    model.init_weights(torch.Generator().manual_seed(0))
    checkpoint_blocks(model.blocks, mode)
    compile_blocks(model, "true", Hardware(torch.device("cpu"), 0, 1, True))
    own = {p.data_ptr() for p in model.parameters()}
    kept: dict[int, int] = {}

    def keep(tensor):
        if tensor.data_ptr() not in own and tensor.numel() >= 2 * 640 and tensor.numel() % (2 * 640) == 0:
            kept[tensor.data_ptr()] = tensor.numel() * tensor.element_size()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t), torch.autocast("cpu", torch.bfloat16):
        model.hidden(torch.zeros(2, 640, dtype=torch.long))
    found = sum(kept.values()) / (2 * 640)
    one_block = (kept_bytes(model.config, None) - 8 * 128) / 4  # while its backward pass runs: not yet here
    assert found == pytest.approx(kept_bytes(model.config, mode) - (one_block if mode else 0), rel=0.15)


@ALONE
def test_nothing_leaks_through_compiled_blocks_of_two_streams():
    from tests.mdm.models.test_two_stream import assert_no_leak, logits_of, model_of

    model = model_of().float()
    compile_blocks(model, "true", Hardware(torch.device("cpu"), 0, 1, False))
    with torch.no_grad():  # half as much to compile
        assert_no_leak(model, logits_of)
