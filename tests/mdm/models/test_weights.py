"""Which weights of a folder are read: what the index names, else the one file; anything more, or less, is named."""

import json

import pytest
import safetensors.torch
import torch

from mdm.config import UserError, read_json
from mdm.models.folder import load_model
from mdm.models.weights import WEIGHT_INDEX, one_precision, read_weights
from tests.mdm.models.test_open_models import CONFIGS, LLADA, VOCAB, write


def ours(folder, **shape):
    """A model of ours with random weights, as a recipe exports it: text and images; returns it."""
    from components.tokenizers.image import GreyPatchTokenizer
    from components.tokenizers.text import TextTokenizer
    from mdm.data.processor import Processor
    from mdm.hardware import Hardware
    from mdm.models.folder import export
    from mdm.models.transformer import MaskedDiffusionModel, ModelConfig

    tokenizers = {"text": TextTokenizer.train(["a seven"], vocab_size=258), "image": GreyPatchTokenizer(8, 2, 3)}
    processor = Processor.build(tokenizers, {"text": 8, "image": 16})
    shape = {"width": 32, "num_layers": 2, "num_heads": 4, "max_length": 64, **shape}
    model = MaskedDiffusionModel(ModelConfig(vocab_size=processor.vocabulary.size, **shape))
    model.init_weights(torch.Generator().manual_seed(0))
    export(folder, model, processor, Hardware(torch.device("cpu"), 0, 1, False))
    return model.eval()


TOKENS = torch.randint(0, VOCAB, (2, 7), generator=torch.Generator().manual_seed(0))


def sharded(folder, state, count=2):
    """The weights of a folder as shards with an index, in the place of the one file; returns the index."""
    names = sorted(state)
    parts = [names[i::count] for i in range(count)]
    files = [f"model-{i + 1:05d}-of-{count:05d}.safetensors" for i in range(count)]
    for file, own in zip(files, parts, strict=True):
        safetensors.torch.save_file({name: state[name] for name in own}, folder / file)
    index = {"metadata": {}, "weight_map": {name: file for file, own in zip(files, parts, strict=True) for name in own}}
    (folder / WEIGHT_INDEX).write_text(json.dumps(index))
    (folder / "model.safetensors").unlink()
    return index


@pytest.mark.parametrize("kind", CONFIGS)
def test_shards_are_the_model_that_their_index_names(kind, tmp_path):
    state = write(tmp_path, CONFIGS[kind])
    expected = load_model(tmp_path)[0](TOKENS)
    sharded(tmp_path, state)
    assert torch.equal(load_model(tmp_path)[0](TOKENS), expected)


@pytest.mark.parametrize("more", ["model.safetensors", "model-00003-of-00003.safetensors", "adapter_model.safetensors"])
def test_another_weights_file_beside_the_shards_is_named(more, tmp_path):
    other = write(tmp_path, LLADA, seed=1)
    sharded(tmp_path, write(tmp_path, LLADA))
    safetensors.torch.save_file(other, tmp_path / more)
    with pytest.raises(UserError, match=rf"{more} lie there too, and model\.safetensors\.index\.json does not name them"):
        load_model(tmp_path)


def test_two_files_without_an_index_are_named(tmp_path):
    sharded(tmp_path, write(tmp_path, LLADA))
    (tmp_path / WEIGHT_INDEX).unlink()
    with pytest.raises(UserError, match=r"model-00001-of-00002\.safetensors, model-00002-of-00002\.safetensors lie there"):
        load_model(tmp_path)


def test_a_missing_shard_and_a_tensor_that_is_not_where_the_index_says_are_named(tmp_path):
    state = write(tmp_path, LLADA)
    index = sharded(tmp_path, state)
    name = "model.transformer.ln_f.weight"
    shard = tmp_path / index["weight_map"][name]
    own = safetensors.torch.load_file(shard)
    for changed, what in (({k: v for k, v in own.items() if k != name}, "lacks"), ({**own, "more": own[name].clone()}, "has")):
        safetensors.torch.save_file(changed, shard)
        with pytest.raises(UserError, match=f"{shard.name} {what} {name if what == 'lacks' else 'more'}, and"):
            load_model(tmp_path)
    shard.unlink()
    with pytest.raises(UserError, match=rf"names {shard.name}, not there; is the download complete\?"):
        load_model(tmp_path)


@pytest.mark.parametrize("file", ["../model.safetensors", "/etc/model.safetensors", "sub/m.safetensors", "m.bin", "", 7, None])
def test_an_index_names_files_of_its_own_folder(file, tmp_path):
    index = sharded(tmp_path / "in", write(tmp_path / "in", LLADA))
    safetensors.torch.save_file({"a": torch.zeros(1)}, tmp_path / "model.safetensors")
    index["weight_map"]["model.transformer.ln_f.weight"] = file
    (tmp_path / "in" / WEIGHT_INDEX).write_text(json.dumps(index))
    with pytest.raises(UserError, match=r"ln_f\.weight lies in .*, which is not the name of a \.safetensors file beside it"):
        load_model(tmp_path / "in")


def test_the_hubs_cache_of_links_to_blobs_loads(tmp_path):
    """snapshots/REVISION/NAME -> ../../blobs/DIGEST, as huggingface_hub lays it out."""
    state = write(tmp_path / "plain", LLADA)
    expected = load_model(tmp_path / "plain")[0](TOKENS)
    sharded(tmp_path / "plain", state)
    blobs, snapshot = tmp_path / "hub" / "blobs", tmp_path / "hub" / "snapshots" / "abc"
    blobs.mkdir(parents=True)
    snapshot.mkdir(parents=True)
    for i, path in enumerate(sorted((tmp_path / "plain").iterdir())):
        path.rename(blobs / f"{i:x}")
        (snapshot / path.name).symlink_to(f"../../blobs/{i:x}")
    assert torch.equal(load_model(snapshot)[0](TOKENS), expected)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"[1]", "must hold keys and values, got list"),
        (b"", "is not JSON: Expecting value"),
        (b"[" * 100_000, "is nested too deeply"),
        ('{"é": 1}'.encode("utf-16"), "can't decode byte"),
        (b'{"a": ' + b"1" * 5000 + b"}", "Exceeds the limit"),
    ],
)
def test_json_that_is_no_object_is_one_line(content, message, tmp_path):
    (tmp_path / "config.json").write_bytes(content)
    with pytest.raises(UserError, match=message) as caught:
        read_json(tmp_path / "config.json")
    assert "\n" not in str(caught.value)
    (tmp_path / "config.json").write_bytes(b"\xef\xbb\xbf" + '{"é": 1}'.encode())
    assert read_json(tmp_path / "config.json") == {"é": 1}  # a byte order mark is no content


@pytest.mark.parametrize("kind", CONFIGS)
def test_tensors_of_several_precisions_become_the_widest_of_them(kind, tmp_path):
    state = write(tmp_path, CONFIGS[kind])
    mixed = {
        name: value.to([torch.bfloat16, torch.float16, torch.float32][i % 3]) for i, (name, value) in enumerate(state.items())
    }
    safetensors.torch.save_file({name: value.float() for name, value in mixed.items()}, tmp_path / "model.safetensors")
    expected = load_model(tmp_path)[0](TOKENS)
    safetensors.torch.save_file(mixed, tmp_path / "model.safetensors")
    assert torch.equal(load_model(tmp_path)[0](TOKENS), expected)


def test_one_precision_stays_and_integers_are_named():
    bf16 = {"a.weight": torch.ones(2).bfloat16(), "norm.scale": torch.ones(2)}
    assert {k: v.dtype for k, v in one_precision(bf16, "it").items()} == {
        "a.weight": torch.bfloat16,
        "norm.scale": torch.float32,
    }
    with pytest.raises(UserError, match=r"it: a\.weight is of int8, not of floating-point numbers; is the model quantized\?"):
        one_precision({"a.weight": torch.ones(2).to(torch.int8)}, "it")


@pytest.mark.parametrize("name", ["config.json", "text.tiktoken"])
def test_a_file_of_another_run_beside_our_own_weights_is_named(name, tmp_path):
    """A base of rotations or a merge of the BPE has no shape that would give it away."""
    ours(tmp_path)
    load_model(tmp_path)
    text = (tmp_path / name).read_text()
    (tmp_path / name).write_text(text.replace('"rope_base": 10000', '"rope_base": 20000') if name[0] == "c" else text[::-1][1:])
    with pytest.raises(UserError, match=name):
        load_model(tmp_path)
    (tmp_path / name).write_text(text)
    (tmp_path / "more.safetensors").write_bytes((tmp_path / "model.safetensors").read_bytes())
    with pytest.raises(UserError, match=r"model\.safetensors, more\.safetensors lie there"):
        load_model(tmp_path)
    (tmp_path / "more.safetensors").unlink()
    (tmp_path / "quantization.json").write_text(json.dumps({"scheme": "int8_dynamic", "dtype": "float32", "device": "cpu"}))
    with pytest.raises(UserError, match=r"do not match: blocks\.0\.attn\.q_proj\.weight\..* is missing"):
        load_model(tmp_path)
    assert read_weights(tmp_path)[1]["files"]
