"""Models of learned orders generate: log rates of slots, samplers that read them, what is refused, folders."""

from functools import partial

import pytest
import torch
from torch.testing import assert_close

from components.samplers import Ancestral, Blocks, Confidence, FirstHitting, LearnedRates, PerModality
from components.tokenizers.image import GreyPatchTokenizer
from components.tokenizers.text import TextTokenizer
from mdm.data.processor import Processor
from mdm.evaluation.harness import HarnessModel
from mdm.generation.canvas import Canvas, SlotLogits, local_ids
from mdm.generation.defaults import Defaults
from mdm.generation.generate import allowed_ids, generate, prepare
from mdm.generation.rates import LogRates
from mdm.hardware import Hardware
from mdm.models import builders
from mdm.models.folder import export, load_model

CPU = Hardware(torch.device("cpu"), 0, 1, True)
PROMPTS = [{"text": "a seven"}, {"text": "a handwritten seven"}, {"text": "two"}]


@pytest.fixture(scope="module")
def processor():
    text = TextTokenizer.train(["a handwritten seven"] * 20, vocab_size=270)
    return Processor.build({"text": text, "image": GreyPatchTokenizer(8, 4, 2)}, {"text": 12, "image": 4})


@pytest.fixture(scope="module")
def models(processor):
    made = {}
    for orders in ("learned", "learned_by_token"):
        model = builders.model(processor.vocabulary.size, 64, 32, 2, 2, orders=orders)
        model.init_weights(torch.Generator().manual_seed(0))
        with torch.no_grad():
            for name, p in model.named_parameters():
                if "score" in name or name == "order.bias":
                    p.normal_(0, 1, generator=torch.Generator().manual_seed(1))
        made[orders] = model.eval()
    return made


@pytest.mark.parametrize("orders", ["learned", "learned_by_token"])
@pytest.mark.parametrize("task", ["text_to_image", "text"])
def test_logits_are_log_rates_of_what_a_slot_was_trained_with(processor, models, orders, task):
    model, vocabulary = models[orders], processor.vocabulary
    given = prepare(processor, task, PROMPTS if task != "text" else [{}] * 3, processor.canvas)
    batch, fill = given.batch, given.generate
    allowed = allowed_ids(vocabulary, batch, fill, ())
    slots = Canvas.of(batch.tokens, fill, local_ids(allowed[fill], vocabulary.mask_id))
    fn = LogRates.around(SlotLogits.of(model, slots, batch, copies=2), batch, vocabulary)
    shown = batch.tokens.masked_fill(fill, vocabulary.mask_id)
    with torch.no_grad():
        found = fn(shown.repeat(2, 1))
        for row in (0, 2):
            assert_close(fn.select(torch.tensor([row]))(shown[row : row + 1]), found[row : row + 1], atol=1e-5, rtol=1e-5)
            length = int((batch.document[row] >= 0).sum())
            z = shown[row, :length][None]
            log_p = vocabulary.restrict(model(z), batch.id_range[row, :length][None]).log_softmax(-1)[0]
            where = batch.maskable[row].nonzero()[:, 0]
            if orders == "learned":
                score = model.order.noisy(model.hidden(z))[0, where]
                level = (score - score.mean()).sigmoid()
                log_rate = (0.7 + 0.65 * (level - level.mean())).log()
            else:
                log_rate = (log_p[where].exp() @ model.order().exp()).log()
                log_p = (log_p + model.order()).log_softmax(-1)
            rates = found[row][slots.slots[row]].masked_fill(~allowed[row, where][:, slots.ids], -torch.inf)
            assert_close(rates.logsumexp(-1), log_rate, atol=1e-4, rtol=1e-4)
            assert_close(rates.log_softmax(-1), log_p[where][:, slots.ids], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("orders", ["learned", "learned_by_token"])
def test_every_kind_of_sampler_and_guidance_generates(processor, models, orders):
    make = partial(generate, models[orders], processor, "text_to_image", PROMPTS)
    for sampler in (LearnedRates(), LearnedRates(num_steps=3), Confidence(num_steps=2), None):
        assert make(sampler, 1.0).tokens.shape[0] == 3
    alone = generate(models[orders], processor, "text_to_image", PROMPTS[:2], LearnedRates(num_steps=3), 1.0)
    assert torch.equal(make(LearnedRates(num_steps=3), 1.0).tokens[:2, : alone.tokens.shape[1]], alone.tokens)
    assert (make(LearnedRates(), 0.0).forwards == 4).all()


def test_what_a_model_did_not_learn_is_refused(processor, models):
    plain = builders.model(processor.vocabulary.size, 64, 32, 2, 2)
    for sampler in (LearnedRates(), Blocks(LearnedRates(num_steps=2), 2), PerModality([Confidence(), LearnedRates()])):
        with pytest.raises(ValueError, match="LearnedRates asks when a position's turn is, and this model did not learn that"):
            generate(plain, processor, "text_to_image", PROMPTS, sampler)
    with pytest.raises(ValueError, match=r"cache 'dual' keeps .* a model of learned orders .* set cache=off"):
        generate(models["learned"], processor, "text_to_image", PROMPTS, Blocks(LearnedRates(), 2), cache="dual")


def test_defaults_read_the_rates_with_as_many_steps():
    one = {"sampler": {"_component_": "Ancestral", "num_steps": 5, "top_p": 0.9}}
    sure = {"sampler": {"_component_": "Confidence"}}
    defaults, modalities = Defaults({}).on_top({"image": one, "image_to_text": sure}, "x"), ("text", "image")
    assert defaults.of("text_to_image", modalities, learned_orders=True).sampler == LearnedRates(num_steps=5, top_p=0.9)
    assert defaults.of("text", modalities, learned_orders=True).sampler == LearnedRates()
    assert defaults.of("image_to_text", modalities, learned_orders=True).sampler == Confidence()
    both = defaults.of("joint_text_image", modalities, learned_orders=True).sampler
    assert both == PerModality([LearnedRates(), LearnedRates(num_steps=5, top_p=0.9)])
    assert defaults.of("text_to_image", modalities).sampler == Ancestral(num_steps=5, top_p=0.9)
    assert defaults.of("text", modalities).sampler == FirstHitting()


@pytest.mark.parametrize("orders", ["learned", "learned_by_token"])
def test_a_folder_keeps_what_was_learned_and_the_harness_takes_its_bound(processor, models, orders, tmp_path):
    model = models[orders]
    export(tmp_path, model, processor, CPU)
    again, _ = load_model(tmp_path)
    assert again.config == model.config
    assert all(torch.equal(again.state_dict()[name], value) for name, value in model.state_dict().items())
    made = [generate(m, processor, "text_to_image", PROMPTS, LearnedRates(num_steps=2), 0.0).tokens for m in (model, again)]
    assert torch.equal(*made)
    plain = builders.model(processor.vocabulary.size, 64, 32, 2, 2)
    plain.load_state_dict({k: v for k, v in model.state_dict().items() if not k.startswith("order.")})
    bounds = [HarnessModel(m, processor, draws=64) for m in (model, plain)]
    ids = processor.encode("text", "a seven").tolist()
    learned, masked = (h.log_likelihood(*h.row([], ids)) for h in bounds)
    assert learned < 0
    assert learned != pytest.approx(masked, rel=1e-3)
    exact = [HarnessModel(m, processor, "left_to_right").log_likelihood(*bounds[0].row([], ids)) for m in (model, plain)]
    assert exact[0] == pytest.approx(exact[1], rel=1e-5)


def test_a_vocabulary_that_grows_has_rates_of_1(processor, models):
    model = builders.model(processor.vocabulary.size, 64, 32, 2, 2, orders="learned_by_token")
    model.load_state_dict(models["learned_by_token"].state_dict())
    model.grow(processor.vocabulary.size + 3)
    assert_close(model.order()[-3:], torch.zeros(3))
    assert_close(model.order()[:-3], models["learned_by_token"].order())
