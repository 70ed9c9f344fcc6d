"""A line of `history.jsonl` holds means over the steps since the last one; what is not finite stops a run."""

import json
import math

import pytest
import torch

from components.maskers import BernoulliMasker
from mdm.config import UserError
from mdm.data.pipeline import micro_batch
from mdm.data.settings import LossSettings
from mdm.hardware import Hardware
from mdm.training.history import History, NonFinite, read_history

HERE = Hardware(torch.device("cpu"), 0, 1, False)


@pytest.fixture
def micro(vocabulary, make_batch):
    batch = make_batch(first_index=7)  # of samples 7 to 10: captions given, images generated
    return micro_batch(batch, BernoulliMasker(vocabulary.mask_id), LossSettings(), vocabulary)


def test_a_line_holds_means_over_its_steps(tmp_path, vocabulary, micro):
    history = History(tmp_path / "history.jsonl", HERE, None, 0)
    state = {"step": 0, "tokens": 0, "seconds": 0.0}
    (image,) = vocabulary.ranges_of("image")
    for loss, norm in ((1.0, 1.0), (2.0, 3.0)):
        nelbo = torch.zeros(len(vocabulary.ranges))
        nelbo[image] = loss * 4 * 4 * math.log(2)  # four images of four tokens: so many bits a token
        history.accumulate(nelbo, micro)
        history.count(torch.tensor(loss), torch.tensor(norm), 50, 1.0)
        state |= {"step": state["step"] + 1, "tokens": state["tokens"] + 50}
    history.write(state, vocabulary, 0.1)
    history.close()
    (line,) = read_history(tmp_path / "history.jsonl")
    assert (line["step"], line["tokens"], line["lr"]) == (2, 100, 0.1)
    assert (line["loss"], line["grad_norm"], line["squared_grad_norm"]) == (1.5, 2.0, 5.0)
    assert line["tokens_per_second"] == pytest.approx(50, rel=0.05)  # 100 in 2 seconds, and what the sums took
    assert line["train_bits/image"] == pytest.approx(1.5)
    assert "train_bits/text" not in line  # none was predicted


def test_a_resume_keeps_the_lines_up_to_its_step(tmp_path):
    path = tmp_path / "history.jsonl"
    path.write_text("".join(json.dumps({"step": k}) + "\n" for k in range(1, 6)) + '{"step": 6')
    History(path, HERE, None, 3).close()
    assert [line["step"] for line in read_history(path)] == [1, 2, 3]


@pytest.mark.parametrize(("loss", "norm", "what"), [(math.nan, 1.0, "loss is nan"), (1.0, math.inf, "gradient norm is inf")])
def test_a_loss_or_a_gradient_that_is_not_finite_names_its_step_and_samples(tmp_path, micro, loss, norm, what):
    watch = NonFinite(HERE)
    watch.record(4, [micro], torch.tensor(1.0), torch.tensor(1.0))
    watch.check(tmp_path)
    watch.record(5, [micro], torch.tensor(loss), torch.tensor(norm))
    with pytest.raises(UserError, match=f"step 5: the {what}, on the batch of samples 7 to 10; stopped"):
        watch.check(tmp_path)
