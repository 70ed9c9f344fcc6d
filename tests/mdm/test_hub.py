"""Pushing and loading back, with a folder in the hub's place."""

import shutil

import pytest
import torch

from mdm import hub
from mdm.config import UserError, find_config
from mdm.hub import model_card, push
from mdm.models import builtin
from mdm.models.folder import load_model
from tests.recipes.conftest import CONFIG, in_process, mdm


class Shelf:
    """Keeps what is uploaded in a folder, as the hub would."""

    def __init__(self, folder):
        self.folder, self.private = folder, None

    def create_repo(self, name, private, exist_ok):
        self.private = private

    def upload_folder(self, repo_id, folder_path, commit_message):
        return shutil.copytree(folder_path, self.folder / repo_id)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    folder = tmp_path_factory.mktemp("hub")
    (folder / "pretrain.yaml").write_text(CONFIG.format(output_dir=folder / "out"))
    mdm("run", "pretrain", "--config", folder / "pretrain.yaml", "tokens=1000")
    (folder / "out" / "metrics.json").write_text('{"text_to_image_accuracy": 0.5, "seconds": 12.0, "before": {}}')
    return folder / "out"


def test_the_card_says_what_the_run_was(trained):
    card = model_card(trained, "me/tiny", "mit")
    assert card.startswith("---\nlicense: mit\n")
    assert "A masked diffusion model of text and image: 2 layers of width 32" in card
    assert "| digits | `components.data.digits.digits` split: test | 67% | text_to_image 1, image_to_text 1 |" in card
    assert "| text to image accuracy | 0.5 |" in card
    assert "mdm generate checkpoint=hub:me/tiny" in card
    assert "tokens in" in card
    assert "lr: 0.001" in card


def test_what_is_pushed_loads_to_the_same_model(trained, tmp_path, monkeypatch):
    (trained / "overview.png").write_bytes(b"a picture")
    shelf = Shelf(tmp_path)
    push(trained, "me/tiny", api=shelf)
    assert shelf.private
    assert (tmp_path / "me/tiny/README.md").read_text() == model_card(trained, "me/tiny", "apache-2.0")
    assert (tmp_path / "me/tiny/overview.png").is_file()
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda name, **_: str(tmp_path / name))
    (model, processor), (again, loaded) = load_model(trained), load_model("hub:me/tiny")
    tokens = torch.randint(0, 50, (1, 9))
    assert torch.equal(model(tokens), again(tokens))
    assert loaded.vocabulary == processor.vocabulary


def test_what_the_hub_refuses_is_one_sentence(trained, monkeypatch):
    class Closed(Shelf):
        def create_repo(self, name, private, exist_ok):
            raise OSError("no connection\nmore of it")

    with pytest.raises(UserError, match=r"repo=me/tiny: cannot be pushed \(no connection\)"):
        push(trained, "me/tiny", api=Closed(None))


def test_a_repo_without_an_owner_is_refused_and_a_card_is_printed(trained, capsys):
    from mdm.config import find_config

    words = [f"checkpoint={trained}", "card=true"]
    with pytest.raises(UserError, match="repo: expected OWNER/NAME, got 'tiny'"):
        in_process("push", find_config("push"), *words, "repo=tiny")
    in_process("push", find_config("push"), *words, "repo=me/tiny")
    assert "# me/tiny" in capsys.readouterr().out


def test_a_run_is_written_into_the_library_and_opened_from_there(trained, tmp_path, monkeypatch):
    monkeypatch.setattr(builtin, "FOLDER", tmp_path)
    monkeypatch.setattr(hub, "FOLDER", tmp_path)
    (trained / "model" / "defaults.yaml").write_text("text: {sampler: {_component_: components.samplers.FirstHitting}}\n")
    in_process("push", find_config("push"), f"checkpoint={trained}", "repo=builtin:mine")
    model, processor = load_model("builtin:mine")
    original, _ = load_model(trained)
    assert model.embedding.weight.dtype == torch.bfloat16
    for name, value in original.state_dict().items():
        kept = value if name.endswith(".scale") else value.bfloat16()  # gains stay in float32
        assert torch.equal(model.state_dict()[name], kept), name
    assert processor.vocabulary.digest() == load_model(trained)[1].vocabulary.digest()
    assert "mdm generate checkpoint=builtin:mine task=" in (tmp_path / "mine" / "README.md").read_text()
    for name in ("defaults.yaml", "training.json", "examples/examples.jsonl"):
        assert (tmp_path / "mine" / name).is_file(), name
    with pytest.raises(UserError, match="checkpoint=builtin:other: the library has no such model; it has builtin:mine"):
        load_model("builtin:other")
    with pytest.raises(UserError, match="repo: builtin:a/b takes a run's model, under a name like builtin:quickstart"):
        in_process("push", find_config("push"), f"checkpoint={trained}", "repo=builtin:a/b")
