"""What travels is data: each file of a stranger's is given a harmless attack, which must not run, reach a file elsewhere, or
take memory that nothing vouches for."""

import contextlib
import json
import os
import shutil
import sys

import pytest
import torch

from components.data.bad import BadSample
from components.data.shards import INDEX, TokenShards
from components.files import inside, read_inside, read_json, require
from components.samplers import Ancestral, Blocks, Confidence, PerModality
from components.schedules import Cosine
from components.tokenizers.image import GreyPatchTokenizer
from components.vocabulary import Vocabulary
from mdm.config import UserError
from mdm.config.names import NAMES, full_path
from mdm.config.trust import check_travelled, trust_run
from mdm.data.processor import Processor, saved_tokenizer
from mdm.generation.defaults import Defaults, _require_sampler
from mdm.models.folder import load_model
from mdm.pages import comparison
from mdm.recipe import exit_on_user_error
from mdm.studies import page as study_page
from tests.recipes.conftest import untrained  # noqa: F401


@pytest.fixture(autouse=True)
def nothing_is_trusted():
    trust_run({})
    yield
    trust_run({})


@pytest.fixture
def folder(untrained, tmp_path):  # noqa: F811
    """A stranger's model."""
    shutil.copytree(untrained / "model", tmp_path / "model")
    return tmp_path / "model"


def edit(path, change):
    found = json.loads(path.read_text())
    change(found)
    path.write_text(json.dumps(found))


def attack(ran):
    return {"_component_": "os.system", "command": f"touch {ran}"}


def test_a_tokenizer_of_a_checkpoint_that_is_not_ours_does_not_run(folder, tmp_path):
    edit(folder / "processor.json", lambda p: p["tokenizers"].update(text=attack(tmp_path / "RAN")))
    with pytest.raises(UserError, match=r"tokenizers\.text names 'os\.system', which is none .* trust=true"):
        load_model(folder)
    assert not (tmp_path / "RAN").exists()


@pytest.mark.parametrize(
    "node",
    [
        {"_component_": "components.tokenizers.audio.Codec2Tokenizer", "x": {"_component_": "os.system", "command": "true"}},
        {"_component_": "components.tokenizers.audio.Codec2Tokenizer", "x": [{"_component_": "os.system", "command": "true"}]},
        {"_component_": "components.tokenizers.text.tiktoken.os.system", "command": "true"},
        {"_component_": "components.data.sources.Folder", "path": ".", "kind": "text"},
        {"_component_": "mdm.cli.main"},
        {"_component_": ["os.system"]},
        {"_component_": None},
        {"_component_": "os.evil.Codec2Tokenizer"},
    ],
    ids=str,
)
def test_no_other_way_leads_to_a_function(node, folder):
    with pytest.raises(UserError, match=r"_component_ must be a name|none of the library's own"):
        check_travelled(node, "tokenizers.audio", folder / "processor.json", {"Codec2Tokenizer": NAMES["Codec2Tokenizer"]})


def test_a_hub_model_is_no_more_trusted_than_a_folder(folder, tmp_path, monkeypatch):
    edit(folder / "processor.json", lambda p: p["tokenizers"].update(text=attack(tmp_path / "RAN")))
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda *args, **kwargs: str(folder))
    with pytest.raises(UserError, match="none of the library's own"):
        load_model("hub:some/one")
    assert not (tmp_path / "RAN").exists()


def test_token_shards_name_no_function_either(folder, tmp_path):
    edit(folder / "processor.json", lambda p: p["tokenizers"].update(image=attack(tmp_path / "RAN")))
    with pytest.raises(UserError, match="none of the library's own"):
        saved_tokenizer(str(folder), "image")
    assert not (tmp_path / "RAN").exists()


def test_defaults_name_samplers_alone(folder, tmp_path):
    path = folder / "defaults.yaml"
    path.write_text(f"image: {{sampler: {{_component_: os.system, command: touch {tmp_path / 'RAN'}}}}}\n")
    with pytest.raises(UserError, match=r"image\.sampler names 'os\.system'"):
        Defaults.beside(folder)
    scale = f"{{_component_: os.system, command: touch {tmp_path / 'RAN'}}}"
    path.write_text(f"image: {{sampler: {{_component_: Confidence}}, guidance_scale: {scale}}}\n")
    with pytest.raises(UserError, match=r"image\.guidance_scale names 'os\.system'"):
        Defaults.beside(folder)
    assert not (tmp_path / "RAN").exists()


def test_defaults_read_neither_the_environment_nor_another_file(folder, monkeypatch, tmp_path):
    monkeypatch.setenv("SECRET", "42")
    (tmp_path / "other.yaml").write_text("text: {sampler: {_component_: Confidence}}\n")
    path = folder / "defaults.yaml"
    path.write_text("image: {sampler: {_component_: Confidence, num_steps: '${oc.env:SECRET}'}}\n")
    with pytest.raises(UserError, match=r"num_steps must be int, got '\$\{oc\.env:SECRET\}'"):
        Defaults.beside(folder)
    path.write_text(f"base: {tmp_path / 'other.yaml'}\n")
    with pytest.raises(UserError, match="base must hold a sampler"):
        Defaults.beside(folder)


def test_what_unfolds_without_end_is_refused_at_once(folder):
    bomb = "a0: &a0 [x, x]\n" + "".join(f"a{i}: &a{i} [*a{i - 1}, *a{i - 1}]\n" for i in range(1, 60))
    (folder / "defaults.yaml").write_text("image: {sampler: {_component_: Confidence, rank_by: *a59}}\n")
    with pytest.raises(UserError, match="is not valid YAML"):
        Defaults.beside(folder)
    nested = "image:\n  sampler:\n    _component_: Confidence\n    rank_by:\n"
    (folder / "defaults.yaml").write_text(nested + "".join(f"      {line}\n" for line in bomb.splitlines()))
    with pytest.raises(UserError, match="has more than 10,000 values"):
        Defaults.beside(folder)
    deep = []
    for _ in range(5000):
        deep = [deep]
    with pytest.raises(UserError, match="nested too deeply"):
        check_travelled(deep, "k", folder / "f", {})
    with pytest.raises(UserError, match="k must be plain, got object"):
        check_travelled(object(), "k", folder / "f", {})


@pytest.mark.parametrize(
    "name", ["../x", "a/../../x", "/etc/passwd", "..", "C:\\x", "C:x", "..\\x", "\\\\host\\x", "a\0b", "", None, 3]
)
def test_no_file_name_leaves_its_folder(name, tmp_path):
    with pytest.raises(ValueError, match=r"leads out of the folder|is no file name"):
        inside(tmp_path, name)


def test_a_name_inside_the_folder_is_its_file(tmp_path):
    assert inside(tmp_path, "a/b.txt") == tmp_path / "a" / "b.txt"
    assert inside(tmp_path, "a..b") == tmp_path / "a..b"


def test_a_tokenizer_file_is_of_the_checkpoint_s_own_folder(folder, tmp_path):
    (tmp_path / "elsewhere.tiktoken").write_text((folder / "text.tiktoken").read_text())
    edit(folder / "processor.json", lambda p: p["tokenizers"]["text"].update(path="../elsewhere.tiktoken"))
    with pytest.raises(UserError, match=r"tokenizers\.text\.path: .* leads out of the folder"):
        load_model(folder)
    edit(folder / "processor.json", lambda p: p["tokenizers"]["text"].update(path="text.tiktoken", subfolder="../x"))
    with pytest.raises(UserError, match=r"tokenizers\.text\.subfolder: .* leads out of the folder"):
        load_model(folder)


@pytest.fixture
def shards(tmp_path):
    from components.data.shards import write_shard

    out = tmp_path / "shards"
    out.mkdir()
    digest, size = write_shard(out / "shard_00000.safetensors", [{"image": torch.tensor([0, 4, 80])}], ["image"])
    about = {"file": "shard_00000.safetensors", "count": 1, "sha256": digest, "bytes": size}
    (out / INDEX).write_text(json.dumps({"samples": 1, "codebooks": {"image": [81]}, "corrupt": [], "shards": [about]}))
    return out


def test_shards_are_files_of_their_folder_with_codes_of_their_codebooks(shards):
    assert TokenShards(str(shards))[0]["image"].tolist() == [0, 4, 80]
    edit(shards / INDEX, lambda i: i["codebooks"].update(image=[80]))
    with pytest.raises(BadSample, match=r"image from 0 to 3: a code is outside its codebook of \(80,\)"):
        TokenShards(str(shards))[0]
    edit(shards / INDEX, lambda i: i["shards"][0].update(file="../shards/shard_00000.safetensors"))
    with pytest.raises(ValueError, match="leads out of the folder"):
        TokenShards(str(shards))
    edit(shards / INDEX, lambda i: i["shards"][0].update(file=3))
    with pytest.raises(ValueError, match="file must be str, got 3"):
        TokenShards(str(shards))


@pytest.mark.parametrize(
    ("file", "change", "message"),
    [
        ("config.json", lambda c: c.update(max_length=10**12), "model.max_length 1000000000000 is more than any model's"),
        ("config.json", lambda c: c.update(num_layers=10**12), "model.num_layers 1000000000000 (x 1 experts) is more"),
        ("config.json", lambda c: c.update(num_layers=2), "1 layers, num_layers = 2"),
        ("config.json", lambda c: c.update(vocab_size=10**12), "the embedding is of shape"),
        ("config.json", lambda c: c.update(width=10**6, num_heads=10**4), "the embedding is of shape"),
        ("config.json", lambda c: c.update(num_experts=10**9), "model.num_layers 1 (x 1000000000 experts) is more"),
        ("config.json", lambda c: c.update(num_experts=2), "weights and config.json do not match"),
        ("config.json", lambda c: c.update(widht=32), "unknown key 'checkpoint"),
        ("config.json", lambda c: c.update(width="32"), "config.json.width must be int, got '32'"),
        ("vocabulary.json", lambda v: v["ranges"][0].update(size=10**12), "is not a vocabulary"),
        ("vocabulary.json", lambda v: v["ranges"][-1].update(size=10**12), "has codebooks of"),
        ("vocabulary.json", lambda v: v["ranges"][0].update(start=-1), "is not a vocabulary"),
        ("vocabulary.json", lambda v: v.update(special_ids=[10**12] * len(v["specials"])), "its vocabulary"),
        ("vocabulary.json", lambda v: v.update(specials=["mask"]), "is not a vocabulary"),
        ("processor.json", lambda p: p["tokenizers"]["image"].update(patch=10**5, size=10**6), "image tokenizer"),
        ("processor.json", lambda p: p["tokenizers"].pop("text"), "vocabulary.json the modalities"),
        ("processor.json", lambda p: p["canvas"].update(image="16"), "image must be int, got '16'"),
        (
            "processor.json",
            lambda p: p["canvas"].update(image=10**12),
            "and its tokenizer makes 16",
        ),
        ("processor.json", lambda p: p["canvas"].update(text=10**12), "canvas.text = 1000000000000, and the model has 128"),
        ("processor.json", lambda p: p["canvas"].update(image=17), "canvas.image = 17, and its tokenizer makes 16"),
    ],
    ids=lambda x: x if isinstance(x, str) else "",
)
def test_what_a_file_says_is_checked_before_memory_is_taken(folder, file, change, message):
    edit(folder / file, change)
    with pytest.raises(UserError) as error:
        load_model(folder)
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_a_quantized_model_names_no_attribute_of_torch(folder):
    (folder / "quantization.json").write_text(json.dumps({"scheme": "int8_weight_only", "dtype": "load", "device": "cpu"}))
    with pytest.raises(UserError, match="dtype 'load' is not one of bfloat16, float32"):
        load_model(folder)


def test_a_huge_number_of_grey_levels_is_not_computed():
    with pytest.raises(ValueError, match="the codes at most"):
        GreyPatchTokenizer(size=10**6, patch=10**5, levels=2)


def test_json_is_an_object_of_a_sensible_size(tmp_path):
    path = tmp_path / "x.json"
    for content, message in (
        (b"[" * 100_000, "is nested too deeply"),
        (b"[1]", "must hold keys and values, got list"),
        (b"\xff\xfe\x00", "is not JSON"),
        (b'{"a": ' + b"1" * 5000 + b"}", "is not JSON"),
        (b'{"a": 1}' + b" " * 100, "has 108 bytes, more than the 100"),
    ):
        path.write_bytes(content)
        with pytest.raises(ValueError, match=message):
            read_json(path, 100 if len(content) == 108 else 10**6)
    path.write_bytes(b"\xef\xbb\xbf" + b'{"a": 1}')
    assert read_json(path) == {"a": 1}


OWN = """
from components.tokenizers.image import GreyPatchTokenizer

class Tiles(GreyPatchTokenizer):
    @classmethod
    def made(cls, size):
        return cls(size, 2, 3)

    @classmethod
    def _hidden(cls, size, patch, levels):
        return cls(size, patch, levels)

    def save(self, folder):
        return {"_component_": "owntiles.Tiles", "size": self.size, "patch": self.patch, "levels": self.levels}

def built(size, patch, levels):
    return Tiles(size, patch, levels)

def other(size, patch, levels):
    return Tiles(size, patch, levels)
"""


@pytest.fixture
def own(folder, tmp_path, monkeypatch):
    """A checkpoint with a tokenizer of its author's own class."""
    (tmp_path / "owntiles.py").write_text(OWN)
    monkeypatch.syspath_prepend(str(tmp_path))
    node = {"_component_": "owntiles.Tiles", "size": 8, "patch": 2, "levels": 3}
    edit(folder / "processor.json", lambda p: p["tokenizers"].update(image=node))
    return folder


def test_an_own_class_loads_where_it_is_trusted_and_is_named(own, capsys):
    with pytest.raises(UserError, match=r"names 'owntiles\.Tiles', which is none of the library's own"):
        load_model(own)
    _, processor = load_model(own, trust=True)
    assert type(processor.tokenizers["image"]).__name__ == "Tiles"
    load_model(own, trust=True)
    said = [line for line in capsys.readouterr().out.splitlines() if "names owntiles.Tiles, which is run out of " in line]
    assert len(said) == 1  # once, with the file: another of that name may stand on the path
    assert said[0].endswith("owntiles.py")


def test_an_own_class_whose_file_is_elsewhere_is_asked_for(folder):
    node = {"_component_": "absenttiles.Tiles", "size": 8}
    edit(folder / "processor.json", lambda p: p["tokenizers"].update(image=node))
    with pytest.raises(UserError, match=r"no absenttiles\.py here; run this in the folder of .*PYTHONPATH=FOLDER"):
        load_model(folder, trust=True)


def test_whose_tokenizer_it_is_and_what_file_is_sought_is_said_however_it_is_trusted(folder, tmp_path, monkeypatch):
    """Not at all, by the run's own config, by the command; and where the file is there, and what it imports is not."""
    node = {"_component_": "absenttiles.Tiles", "size": 8}
    edit(folder / "processor.json", lambda p: p["tokenizers"].update(image=node))
    whose = rf"{folder / 'processor.json'}: tokenizers\.image names 'absenttiles\.Tiles'"
    with pytest.raises(UserError, match=rf"{whose}.* trust=true, and have absenttiles\.py in this folder or in PYTHONPATH="):
        load_model(folder)
    trust_run({"tokenizers": {"image": node}})
    with pytest.raises(
        UserError, match=rf"{whose}, and there is no absenttiles\.py here; .* beside the config, or set PYTHONPATH="
    ):
        load_model(folder)
    trust_run({})
    monkeypatch.syspath_prepend(str(tmp_path))
    (tmp_path / "absenttiles.py").write_text("import nowhere_to_be_found\n")
    with pytest.raises(UserError, match=r"processor.json: .*absenttiles imports nowhere_to_be_found, which is not installed"):
        load_model(folder, trust=True)


@pytest.mark.parametrize("named", ["owntiles.Tiles", "owntiles.Tiles.made"])
def test_a_class_that_the_config_names_is_trusted_in_its_run(own, named, capsys):
    trust_run({"tokenizers": {"image": {"_component_": named, "size": 8}}})
    assert type(load_model(own)[1].tokenizers["image"]).__name__ == "Tiles"
    assert "trust" not in capsys.readouterr().out
    edit(own / "processor.json", lambda p: p["tokenizers"]["image"].update(_component_="owntiles.GreyPatchTokenizer"))
    with pytest.raises(UserError, match="none of the library's own"):  # the same module, another class
        load_model(own)


def test_trust_of_a_command_is_of_everything_in_it_and_ends_with_it(own):
    trust_run({}, everything=True)
    assert type(load_model(own)[1].tokenizers["image"]).__name__ == "Tiles"
    trust_run({})
    with pytest.raises(UserError, match="none of the library's own"):
        load_model(own)


@pytest.mark.parametrize(
    ("named", "asked", "trusted"),
    [
        ("owntiles.Tiles", "owntiles.Tiles._hidden", False),
        ("owntiles.Tiles", "owntiles.Tiles.made", True),
        ("owntiles.Tiles.made", "owntiles.Tiles.other", True),
        ("owntiles.built", "owntiles", False),
        ("owntiles.built", "owntiles.other", False),
        ("owntiles.built", "owntiles.built", True),
        ("owntiles.built", "owntiles.built.other", False),
        ("TextTokenizer.train", "components.tokenizers.text.TextTokenizer.named", True),
        ("owntiles.gone", "owntiles.gone.made", False),
    ],
)
def test_a_name_is_trusted_with_its_class_alone(own, named, asked, trusted):
    trust_run({"some": [{"list": {"_component_": named}}]})
    with contextlib.nullcontext() if trusted else pytest.raises(UserError, match="none of the library's own"):
        assert check_travelled({"_component_": asked}, "k", own / "f", {}) == {"_component_": asked}


def test_what_a_run_has_written_it_reads_back(own, tmp_path):
    _, processor = load_model(own, trust=True)
    trust_run({})
    processor.save(tmp_path / "again")
    assert type(Processor.load(tmp_path / "again").tokenizers["image"]).__name__ == "Tiles"
    trust_run({})
    with pytest.raises(UserError, match="none of the library's own"):
        Processor.load(tmp_path / "again")


def test_every_name_of_the_table_is_there():
    from mdm.config import locate

    for name, path in NAMES.items():
        assert callable(locate(path, name)), name
        assert full_path(name) == path == full_path(path)


def test_a_path_of_ours_that_has_moved_is_found_by_its_name():
    assert full_path("mdm.oldroom.ImageJudge") == "mdm.evaluation.judges.ImageJudge"
    assert full_path("components.words.TextTokenizer.from_ranks") == NAMES["TextTokenizer.from_ranks"]
    assert full_path("mine.ImageJudge") == "mine.ImageJudge"
    assert full_path("mdm.evaluation.judges.Nothing") == "mdm.evaluation.judges.Nothing"
    assert (
        full_path("mdm.models.transformer") == "mdm.models.transformer"
    )  # a module that is there, though a builder has its name
    assert full_path("components.samplers.confidence.Confidence") == "components.samplers.confidence.Confidence"


def test_a_page_shows_files_of_its_samples_alone_and_escapes_what_it_shows(tmp_path):
    (tmp_path / "secret.png").write_bytes(b"secret")
    samples = tmp_path / "run" / "samples" / "text_to_image"
    samples.mkdir(parents=True)
    line = {"given_text": "<script>alert(1)</script>", "image": "../../../secret.png", "text": 3}
    (samples / "outputs.jsonl").write_text(json.dumps(line) + "\n")
    (tmp_path / "run" / "metrics.json").write_text(json.dumps({"<img src=x onerror=alert(2)>": 1.0}))
    comparison.page(tmp_path / "page.html", "<b>t</b>", {"<i>run</i>": tmp_path / "run"})
    page = (tmp_path / "page.html").read_text()
    assert "c2VjcmV0" not in page  # "secret" in base64
    assert "leads out of the folder" in page
    for tag in ("<script>", "<img src=x", "<i>run", "<b>t"):
        assert tag not in page


def test_a_vocabulary_is_read_back(tmp_path):
    vocabulary = Vocabulary.build({"text": (7,), "audio": (4, 3)}, ["text", "audio"], tasks=("text",)).grown(
        {"image": (5,)}, []
    )
    vocabulary.save(tmp_path / "v.json")
    assert Vocabulary.load(tmp_path / "v.json") == vocabulary


@pytest.mark.parametrize("where", [lambda bad: {"qk_norm": bad}, lambda bad: {"width": [bad]}], ids=["table", "list"])
def test_a_config_of_a_model_imports_nothing(folder, tmp_path, monkeypatch, where):
    (tmp_path / "evilmodule.py").write_text(f"open({str(tmp_path / 'RAN')!r}, 'w')\ndef build(): pass\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    edit(folder / "config.json", lambda c: c.update(where({"_component_": "evilmodule.build"})))
    with pytest.raises(UserError, match="must be a number or a word, got"):
        load_model(folder)
    assert "evilmodule" not in sys.modules
    assert not (tmp_path / "RAN").exists()


@pytest.mark.parametrize(
    ("node", "message"),
    [
        (
            {"_component_": "VQImageTokenizer", "path": None, "size": 8, "config": {"num_vq_embeddings": 10**10}},
            "names no path",
        ),
        ({"_component_": "NeuralAudioTokenizer", "family": "mimi", "config": {"hidden_size": 10**6}}, "names no path"),
        ({"_component_": "VQImageTokenizer", "path": "some/name", "size": 8}, "some/name is not there"),
        ({"_component_": "GreyPatchTokenizer", "size": -8, "patch": 2, "levels": 3}, "size -8 is not a multiple"),
        ({"_component_": "GreyPatchTokenizer", "size": 0}, "size 0 is not a multiple"),
        ({"_component_": "JsonTokenizer", "path": "vocabulary.json", "reserved": [5]}, "is not a tokenizer.json"),
        ({"_component_": "FSQImageTokenizer", "path": "fsq"}, "levels must be whole numbers"),
    ],
)
def test_a_tokenizer_that_states_what_it_does_not_hold_is_refused_in_one_line(folder, node, message):
    (folder / "fsq").mkdir()
    (folder / "fsq" / "config.json").write_text(json.dumps({"kind": "image", "patch": 2, "levels": 5}))
    edit(folder / "processor.json", lambda p: p["tokenizers"].update(image=node))
    for opened in (lambda: load_model(folder), lambda: saved_tokenizer(str(folder), "image")):
        with pytest.raises(UserError, match=message):
            opened()


def test_a_learned_tokenizer_takes_no_more_memory_than_its_weights_have(tmp_path):
    from safetensors.torch import save_file

    from components.tokenizers.fsq import FSQAutoencoder, FSQConfig
    from components.tokenizers.image_vq import VQImageTokenizer

    FSQAutoencoder(FSQConfig(kind="image", patch=2, width=8)).save(tmp_path / "fsq")
    edit(tmp_path / "fsq" / "config.json", lambda c: c.update(width=2**13, patch=2**10, size=2**10))
    with pytest.raises(ValueError, match=r"holds fewer numbers than config\.json describes"):
        FSQAutoencoder.load(tmp_path / "fsq")
    edit(tmp_path / "fsq" / "config.json", lambda c: c.update(width=8, patch=4, size=8))
    with pytest.raises(ValueError, match=r"weights and config\.json do not match"):
        FSQAutoencoder.load(tmp_path / "fsq")
    (tmp_path / "vq").mkdir()
    (tmp_path / "vq" / "config.json").write_text(json.dumps({"num_vq_embeddings": 10**11}))
    save_file({"a": torch.zeros(3)}, tmp_path / "vq" / "diffusion_pytorch_model.safetensors")
    with pytest.raises(ValueError, match=r"its config states 30\d,\d{3},\d{3},\d{3} numbers, and its weights have"):
        VQImageTokenizer(str(tmp_path / "vq"), 8)


@pytest.mark.parametrize("files", ["[" * 100_000, '[[1, 2], ["a", 3]]', "1", "null", "{"])
def test_what_the_weights_say_of_the_other_files_may_be_anything(folder, files):
    from safetensors.torch import load_file, save_file

    save_file(load_file(folder / "model.safetensors"), folder / "model.safetensors", metadata={"files": files})
    with pytest.raises(UserError, match=r"what model\.safetensors says of the other files cannot be read"):
        load_model(folder)


@pytest.mark.parametrize(
    ("sampler", "message"),
    [
        ("{_component_: Confidence, num_steps: 1000000000000}", "1000000000000 is beyond 1,000,000"),
        ("{_component_: Confidence, temperature: .nan}", "nan is beyond"),
        ("{_component_: Ancestral, schedule: 5}", "5 is no schedule: it lacks complete"),
        ("{_component_: Ancestral, schedule: null}", "None is no schedule"),
        ("{_component_: Linear}", "is no sampler: it lacks step"),
        ("{_component_: Blocks, sampler: 5, block_length: 4}", "5 is no sampler"),
        ("{_component_: Blocks, sampler: {_component_: Confidence}, block_length: {_component_: Linear}}", "TypeError"),
    ],
)
def test_defaults_hold_what_can_sample(folder, sampler, message):
    (folder / "defaults.yaml").write_text(f"image: {{sampler: {sampler}}}\n")
    with pytest.raises(UserError, match=f"{message}|Type-check error"):  # the suite's own checks may be first
        Defaults.beside(folder)


def test_defaults_name_a_sampler_in_short_and_nothing_that_is_not_ours(folder, tmp_path, monkeypatch):
    """Wherever a name stands in a component's place: it is looked up in the table before anything is imported."""
    (folder / "defaults.yaml").write_text(
        "image: {sampler: Confidence, guidance_scale: LinearScale}\n"
        "text: {sampler: {_component_: Ancestral, num_steps: 1k, schedule: Cosine}}\n"
    )
    own = Defaults.beside(folder)
    assert repr(own.of("text_to_image", ["text", "image"]).sampler).startswith("Confidence(")
    assert own.of("text", ["text", "image"]).sampler == Ancestral(num_steps=1000, schedule=Cosine())
    (tmp_path / "theirs.py").write_text("raise SystemExit('it is run')")
    monkeypatch.syspath_prepend(tmp_path)
    for given in (
        "sampler: theirs.Own",
        "sampler: Confidence, guidance_scale: theirs.Own",
        "sampler: {_component_: theirs.Own}",
    ):
        (folder / "defaults.yaml").write_text(f"image: {{{given}}}\n")
        with pytest.raises(UserError, match="which is none of the library's own"):
            Defaults.beside(folder)
    (folder / "defaults.yaml").write_text("image: {sampler: {_component_: Ancestral, schedule: theirs.Own}}\n")
    with pytest.raises(UserError, match="which is none of the library's own"):
        Defaults.beside(folder)


@pytest.mark.parametrize("schedule", ["Linear", None, 5])
def test_a_sampler_has_a_schedule_inside_others_too(schedule):
    sampler = Ancestral(num_steps=4)
    _require_sampler(PerModality([Blocks(sampler, 4), Confidence()]), "k")
    object.__setattr__(sampler, "schedule", schedule)
    with pytest.raises(UserError, match=f"k: {schedule!r} is no schedule: it lacks"):
        _require_sampler(PerModality([Confidence(), Blocks(sampler, 4)]), "k")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda i: i["shards"][0].update(count=10**12), "1000000000000 samples in"),
        (lambda i: i["shards"][0].update(count=-1), "-1 samples in"),
        (lambda i: i["shards"][0].update(count=2), r"image.offsets is I64 of shape \[2\], and index.json says 2 samples"),
        (lambda i: i["codebooks"].update(image=5), "image must be list, got 5"),
        (lambda i: i["codebooks"].update(image=[]), "the codebooks of image must be sizes"),
        (lambda i: i["codebooks"].update(image=["a"]), "the codebooks of image must be sizes"),
        (lambda i: i["codebooks"].update(audio=[3]), "does not contain tensor audio.codes"),
    ],
)
def test_an_index_of_shards_says_what_is_in_them(shards, change, message):
    edit(shards / INDEX, change)
    with pytest.raises(ValueError, match=message):
        TokenShards(str(shards))[0]


@pytest.fixture
def run(tmp_path):
    """A stranger's run, to be shown as a page."""
    (tmp_path / "run" / "samples" / "text").mkdir(parents=True)
    (tmp_path / "run" / "metrics.json").write_text("{}")
    (tmp_path / "secret.png").write_bytes(b"secret")
    return tmp_path / "run"


def test_a_page_follows_no_link_out_of_the_samples(run, tmp_path):
    for name, to in (("a.png", tmp_path / "secret.png"), ("b.png", "/dev/zero"), ("c.png", "own.png")):
        os.symlink(to, run / "samples" / "text" / name)
    (run / "samples" / "text" / "own.png").write_bytes(b"own")
    lines = "".join(json.dumps({"image": f"{name}.png"}) + "\n" for name in ("a", "b", "c", "gone"))
    (run / "samples" / "text" / "outputs.jsonl").write_text(lines)
    comparison.page(tmp_path / "page.html", "t", {"run": run})
    page = (tmp_path / "page.html").read_text()
    assert "c2VjcmV0" not in page  # "secret" in base64
    assert "b3du" in page  # "own"
    assert page.count("is a link that leads out of the folder") == 2


@pytest.mark.parametrize(
    "line",
    [
        '{"step": 1, "bits/a": 1, "tokens": "x"}',
        '{"step": 1, "bits/a": {}, "tokens": {}}',
        '{"step": 1, "bits/a": 1, "tokens": 1' + "0" * 400 + "}",
        '{"step": 1, "bits/a": -1e308, "tokens": 1}\n{"step": 2, "bits/a": 1e308, "tokens": 2}',
        '{"step": 1, "bits/\\ud800 $\\\\frac": 1, "tokens": 5}',
    ],
)
def test_a_page_of_any_history_is_written(run, tmp_path, line):
    (run / "history.jsonl").write_text(line + "\n")
    (run / "metrics.json").write_text('{"huge": 1' + "0" * 400 + "}")
    (run / "samples" / "text" / "outputs.jsonl").write_text('5\n{"text": "\\ud800"}\n')
    comparison.page(tmp_path / "page.html", "t", {"run": run})
    assert (tmp_path / "page.html").stat().st_size > 1000


def test_only_so_many_panels_are_drawn(run, tmp_path):
    (run / "history.jsonl").write_text(json.dumps({"step": 1, "tokens": 1, **{f"bits/{i}": 1.0 for i in range(2000)}}))
    comparison.page(tmp_path / "page.html", "t", {"run": run})


def test_a_study_of_any_cells_is_a_page_or_one_line(tmp_path):
    import datetime

    import pyarrow
    from pyarrow import parquet

    (tmp_path / "finding.md").write_bytes(b"# t\n\n\xff")
    (tmp_path / "figure.png").write_bytes(b"png")

    def page(**columns):
        parquet.write_table(pyarrow.table(columns), tmp_path / "runs.parquet")
        return study_page.write_page(tmp_path).read_text()

    cells = {"cell": ["a"], "b": [b"</script>"], "d": [datetime.datetime(2020, 1, 1)], "n": [[float("nan")]], "t": [True]}
    assert page(**cells).count("</script>") == 1
    with pytest.raises(UserError, match=r"a row of runs\.parquet has no cell"):
        page(x=[1])
    for cell in ("../a", "a" * 5000, "a\0"):
        with pytest.raises(UserError):
            page(cell=[cell])
    (tmp_path / "runs.parquet").write_bytes(b"PAR1")
    with pytest.raises(UserError, match=r"runs\.parquet cannot be read"):
        study_page.write_page(tmp_path)
    (tmp_path / "secret").write_bytes(b"secret")
    (tmp_path / "study").mkdir()
    for name in ("runs.parquet", "finding.md"):
        shutil.copy(tmp_path / "finding.md", tmp_path / "study" / name)
    parquet.write_table(pyarrow.table({"cell": ["a"]}), tmp_path / "study" / "runs.parquet")
    os.symlink(tmp_path / "secret", tmp_path / "study" / "figure.png")
    with pytest.raises(UserError, match="is a link that leads out of the folder"):
        study_page.write_page(tmp_path / "study")


def test_what_a_stranger_s_file_is_cited_with_cannot_move_the_cursor(capsys, monkeypatch):
    monkeypatch.setattr("mdm.recipe.leave", sys.exit)

    def work():
        raise UserError("the file \x1b[2J\u202e says")

    with pytest.raises(SystemExit):
        exit_on_user_error(work)
    assert capsys.readouterr().err == "mdm: the file \\x1b[2J\\u202e says\n"


def test_a_value_of_a_file_is_of_its_kind_and_is_cited_in_short(tmp_path, monkeypatch):
    with pytest.raises(ValueError, match="a must be int, got True"):
        require({"a": True}, "f", a=int)
    with pytest.raises(ValueError, match=r"a must be int, got 'x{56}\.\.\.$"):
        require({"a": "x" * 100}, "f", a=int)
    (tmp_path / "a.png").write_bytes(b"12345")
    assert read_inside(tmp_path, "a.png") == b"12345"
    monkeypatch.setattr("components.files.MAX_SHOWN", 4)
    with pytest.raises(ValueError, match="has 5 bytes, more than the 4 that are shown"):
        read_inside(tmp_path, "a.png")
