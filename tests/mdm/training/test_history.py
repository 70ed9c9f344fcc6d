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
from mdm.pages.report import loss_curves
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


class NotYet(torch.Tensor):
    """A number that is still being computed: to ask for it would wait."""

    asked = 0

    def __float__(self):
        NotYet.asked += 1
        return float(self.as_subclass(torch.Tensor))

    def item(self):
        return float(self)


def test_a_line_holds_what_the_recipe_logs(tmp_path, vocabulary, micro):
    """Means over the steps since the last line; nothing is waited for before one is written."""
    logger = Logger()
    history, state = History(tmp_path / "history.jsonl", HERE, logger, 0), {"step": 0, "tokens": 0, "seconds": 0.0}
    for values in ((1.0, 3.0), (10.0,)):
        for value in values:
            state |= {"step": state["step"] + 1, "tokens": state["tokens"] + 50}
            history.accumulate(torch.zeros(len(vocabulary.ranges)), micro)
            history.count(torch.tensor(1.0), torch.tensor(1.0), 50, 1.0)
            history.log(confidence=torch.tensor(value, requires_grad=True).as_subclass(NotYet), **{"mine/steps": len(values)})
        if values == (1.0, 3.0):
            history.log(rare=math.nan)
        assert NotYet.asked == len(logger.lines)
        assert "confidence" in history.write(state, vocabulary, 0.1)
    history.log(late=7)
    history.validation(state, {"text": 1.0})
    history.close()
    first, second, held_out = read_history(tmp_path / "history.jsonl")
    assert (first["confidence"], first["mine/steps"], first["rare"]) == (2.0, 2.0, None)
    assert second["confidence"] == 10.0
    assert "rare" not in second
    assert held_out == {"step": 3, "tokens": 150, "bits/text": 1.0, "late": 7.0}
    assert logger.lines[0]["confidence"] == 2.0
    assert "rare" not in logger.lines[0]
    assert len(loss_curves(read_history(tmp_path / "history.jsonl"))) > 1000  # a picture, with these too


def test_what_the_ranks_log_is_their_mean(tmp_path, vocabulary):
    class Two(Hardware):
        def gather(self, values):
            return [*values, ("a", 9.0, 2), ("theirs", 4.0, 1)]

    history = History(tmp_path / "history.jsonl", Two(torch.device("cpu"), 0, 1, False), None, 0)
    history.log(a=3)
    history.validation({"step": 1, "tokens": 5}, {})
    (line,) = read_history(tmp_path / "history.jsonl")
    assert (line["a"], line["theirs"]) == (4.0, 4.0)


def test_what_cannot_be_logged_is_said_by_name(tmp_path):
    history = History(tmp_path / "history.jsonl", HERE, None, 0)
    with pytest.raises(ValueError, match="'loss' is what the run itself calls one of its figures; choose another name"):
        history.log(loss=1.0)
    with pytest.raises(ValueError, match=r"mine has the shape \(2,\), and it is to be one number"):
        history.log(mine=torch.zeros(2))


class Logger:
    def __init__(self):
        self.lines = []

    def log_dict(self, line, step):
        self.lines.append(line)

    def close(self):
        pass


def test_a_resume_keeps_the_lines_up_to_its_step(tmp_path):
    path = tmp_path / "history.jsonl"
    path.write_text("".join(json.dumps({"step": k}) + "\n" for k in range(1, 6)) + '{"step": 6')
    History(path, HERE, None, 3).close()
    assert [line["step"] for line in read_history(path)] == [1, 2, 3]


@pytest.mark.parametrize(("loss", "norm", "what"), [(math.nan, 1.0, "loss is nan"), (1.0, math.inf, "gradient norm is inf")])
def test_a_loss_or_a_gradient_that_is_not_finite_names_its_step_and_samples(tmp_path, micro, loss, norm, what):
    watch = NonFinite(HERE, tmp_path / "checkpoints")
    watch.record(4, [micro], torch.tensor(1.0), torch.tensor(1.0))
    watch.check()
    watch.record(5, [micro], torch.tensor(loss), torch.tensor(norm))
    with pytest.raises(UserError, match=f"step 5: the {what}, on the batch of samples 7 to 10; stopped"):
        watch.check()
