"""A bad sample of any source is named and keeps its place; the others are the same from whatever they were brought in."""

import io
import json
import tarfile

import numpy as np
import pytest
import soundfile
from PIL import Image
from torch.testing import assert_close

from components.data import sources
from components.data.bad import BadSample, Refused, drawn, name_of, usable
from components.data.images import read_image
from components.data.indexed import Iterated
from components.data.sources import Folder, Jsonl, adapted, hugging_face


def described(source):
    """Texts of a source's samples; of the bad ones the part of the name behind the last slash, and why."""
    return [str(s).rsplit("/", 1)[-1] if isinstance(s, BadSample) else s["text"] for s in drawn(source)]


def png(image):
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()


def grey(level):
    return png(Image.new("L", (8, 8), level))


# folders


@pytest.fixture
def photos(tmp_path):
    """Nine files of which 1 to 6 cannot be used, each for a reason of its own."""
    folder = tmp_path / "photos"
    folder.mkdir()
    for i in range(9):
        (folder / f"{i}.png").write_bytes(b"nothing" if i == 1 else grey(i)[: 45 if i == 2 else None])
        captions = {3: None, 4: b" \n", 5: "Käse".encode("latin-1"), 6: "ab".encode("utf-16-le"), 7: b"\xef\xbb\xbfseven\r\n"}
        if captions.get(i, b"") is not None:
            (folder / f"{i}.txt").write_bytes(captions.get(i, f"caption {i}".encode()))
    return folder


def test_a_bad_file_of_a_folder_keeps_its_place_and_is_named(photos, capsys):
    source = Folder(str(photos), "image")
    assert described(source) == [
        "caption 0",
        "1.png: it is no image of a known format",
        "2.png: it cannot be read as image: image file is truncated",
        "3.png: its caption 3.txt is missing",
        "4.png: its caption 4.txt: text is empty",
        "5.png: its caption 5.txt: it is not UTF-8 (byte 0xe4 at 1); save it as UTF-8",
        "6.png: its caption 6.txt: it holds NUL characters: UTF-16 without a byte order mark, or no text; save it as UTF-8",
        "seven",
        "caption 8",
    ]
    assert [s["image"].getpixel((0, 0)) for s in usable(source)] == [0, 7, 8]
    first = f"{photos / '1.png'}: it is no image of a known format"
    assert capsys.readouterr().out.splitlines() == [
        f"{photos}: skipped 6 corrupt of 9 files, the first is {first}",
        f"left out 6 bad samples, the first is {first}",
    ]
    with pytest.raises(ValueError, match=r"corrupt file .*1\.png: it is no .* \(on_corrupt: skip leaves such files out\)"):
        Folder(str(photos), "image", on_corrupt="refuse")


def test_a_folder_takes_every_format_that_is_read_and_names_captions_of_others(tmp_path, capsys):
    """A .gif or .tif is read as well as a .png; a .heic is not, and is not left out without a word. ._x is macOS's own."""
    formats = ["png", "jpg", "jpeg", "webp", "bmp", "gif", "tif", "TIFF", "avif"]
    for i, suffix in enumerate(formats):
        Image.new("L", (4, 4), 255).save(tmp_path / f"{i}.{suffix}")
        (tmp_path / f"{i}.txt").write_text(suffix)
    for name in ("9.heic", "._0.png", "._0.txt"):
        (tmp_path / name).write_bytes(b"\0\5\x16\7")
    (tmp_path / "9.txt").write_text("of another kind")
    (tmp_path / ".trash").mkdir()
    (tmp_path / ".trash" / "0.png").write_bytes(b"")
    source = Folder(str(tmp_path), "image")
    assert described(source) == formats
    assert {sample["image"].getpixel((0, 0)) for sample in source} <= {255, (255, 255, 255)}
    taken = ".png, .jpg, .jpeg, .webp, .bmp, .gif, .tif, .tiff, .avif"
    assert capsys.readouterr().out.splitlines() == [
        f"{tmp_path}: 1 .heic not read as image, the first is 9.heic; convert them",
        f"{tmp_path}: 1 caption(s) beside no image file ({taken}), the first is 9.txt",
    ]
    Folder(str(tmp_path), "text")
    assert capsys.readouterr().out == ""


def test_a_document_may_have_a_byte_order_mark_and_is_not_empty(tmp_path):
    for name, data in (("a", "\ufeffKäse\n".encode()), ("b", "Käse\r\nx".encode("utf-16")), ("c", b"\n"), ("d", b"\xff")):
        (tmp_path / f"{name}.txt").write_bytes(data)
    assert described(Folder(str(tmp_path), "text")) == [
        "Käse\n",
        "Käse\nx",
        "c.txt: text is empty",
        "d.txt: it is not UTF-8 (byte 0xff at 0); save it as UTF-8",
    ]


def test_a_large_folder_is_not_read_at_the_start_unless_that_is_asked_for(tmp_path, monkeypatch):
    for i in range(100):
        (tmp_path / f"{i:03d}.txt").write_text("x" if i != 50 else "")
    read = []
    monkeypatch.setattr(sources, "read_text", lambda file: read.append(file.name) or file.read_text())
    assert len(Folder(str(tmp_path), "text")) == 100
    assert (len(read), read[0], read[-1]) == (16, "000.txt", "099.txt")
    with pytest.raises(ValueError, match=r"corrupt file .*050\.txt: text is empty"):
        Folder(str(tmp_path), "text", on_corrupt="refuse")
    for file in tmp_path.iterdir():
        file.write_text("")
    with pytest.raises(ValueError, match=r"all 16 files looked at in .* are corrupt as text, the first is .*000\.txt: text is"):
        Folder(str(tmp_path), "text")


# JSONL


BAD_LINES = {
    "null": "it must hold keys and values, got null",
    "7": "it must hold keys and values, got int",
    '["a"]': "it must hold keys and values, got list",
    '{"text": null}': "text must be a string, got null",
    '{"text": 7}': "text must be a string, got int",
    '{"text": ""}': "text is empty",
    '{"text": "\\ud800"}': "text holds half a character ('\\ud800', a lone surrogate)",
    '{"text": "a", "image": null}': "image must be a string, got null",
    '{"text": "a", "image": "absent.png"}': "absent.png: file not found",
    '{"text": "a", "image": "broken.png"}': "broken.png: it is no image of a known format",
    '{"text": "a", "image": "."}': ": it cannot be read as image: Is a directory",
    '{"text": "a", "audio": "broken.png"}': "broken.png: it cannot be read as audio: Format not recognised.",
    '{"label": 3}': "it has no field of prompt, text, image, audio; it has label",
    "{}": "it has no field of prompt, text, image, audio; it has none",
    '{"text": "a"': "it is not JSON: Expecting ',' delimiter at character 13",
}


@pytest.mark.parametrize("line", BAD_LINES)
def test_a_bad_line_is_named_and_keeps_its_place(tmp_path, line):
    (tmp_path / "broken.png").write_bytes(b"nothing")
    (tmp_path / "a.jsonl").write_text(f'{{"text": "one"}}\n\n{line}\n{{"text": "two"}}')
    why = BAD_LINES[line]
    source = Jsonl(str(tmp_path / "a.jsonl"))
    one, bad, two = drawn(source)
    assert (one, two) == ({"text": "one"}, {"text": "two"})
    assert (bad.name, bad.why.removeprefix(tmp_path.name)) == (f"{tmp_path / 'a.jsonl'}, line 3", why)
    with pytest.raises(ValueError, match=r"corrupt line .*a\.jsonl, line 3: .*on_corrupt: skip leaves such lines out"):
        Jsonl(str(tmp_path / "a.jsonl"), on_corrupt="refuse")


def test_bad_lines_are_counted_at_the_start(tmp_path, capsys):
    (tmp_path / "a.jsonl").write_bytes(b'\xef\xbb\xbf{"text": "a\xe2\x80\xa8b"}\r\n{"text": "\xff"}\r\nnull\r\n')
    source = Jsonl(str(tmp_path))
    assert capsys.readouterr().out == (
        f"{tmp_path}: skipped 2 corrupt of 3 lines, the first is {tmp_path / 'a.jsonl'}, line 2: it is not UTF-8 "
        "(byte 0xff at 10); save it as UTF-8\n"
    )
    assert [s["text"] for s in usable(source)] == ["a\u2028b"]


def test_a_prompt_may_be_empty_and_a_missing_field_is_named(tmp_path):
    rows = [{"q": "", "a": "x"}, {"a": "x"}, {"q": "why", "a": None}]
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, rows)))
    source = Jsonl(str(tmp_path / "a.jsonl"), {"prompt": "q", "text": "a"}, template="Q: {}")
    assert source[0] == {"prompt": "Q: ", "text": "x"}
    assert [str(b).rsplit("/")[-1] for b in drawn(source) if isinstance(b, BadSample)] == [
        "a.jsonl, line 2: it has no field 'q'; it has a",
        "a.jsonl, line 3: a must be a string, got null",
    ]


# Hugging Face


def pictures():
    """Each a picture of its own kind: on its side, transparent, 16 bits, CMYK, a palette."""
    board = Image.fromarray((np.indices((12, 16)).sum(axis=0) % 2 * 255).astype(np.uint8)).convert("RGB")
    exif = Image.Exif()
    exif[0x0112] = 6
    on_nothing = Image.new("RGBA", (12, 16))
    on_nothing.paste((0, 0, 0, 255), (3, 3, 9, 9))
    kinds = {
        "upright": (Image.linear_gradient("L").resize((16, 12)), "TIFF", {"exif": exif}),
        "transparent": (on_nothing, "PNG", {}),
        "sixteen": (Image.fromarray((np.arange(256) * 257).astype(np.uint16).reshape(16, 16)), "PNG", {}),
        "cmyk": (board.convert("CMYK"), "TIFF", {}),
        "palette": (board.convert("P"), "PNG", {}),
    }
    found = {}
    for name, (image, kind, options) in kinds.items():
        buffer = io.BytesIO()
        image.save(buffer, kind, **options)
        found[name] = buffer.getvalue()
    return found


@pytest.fixture
def dataset(tmp_path):
    """A function that saves rows, with their images as bytes, and returns the folder."""
    import datasets

    def save(rows, decode=True, **features):
        made = datasets.Dataset.from_list(rows)
        for column, feature in features.items():
            made = made.cast_column(column, feature)
        made.save_to_disk(str(tmp_path / "set"))
        return str(tmp_path / "set")

    return save


@pytest.mark.parametrize("streaming", [False, True])
def test_an_image_is_the_same_from_a_file_a_dataset_and_the_api(dataset, streaming):
    import datasets

    found = pictures()
    path = dataset([{"text": k, "image": {"bytes": v, "path": None}} for k, v in found.items()], image=datasets.Image())
    for sample in hugging_face(path, image="image", size=8, streaming=streaming):
        direct = read_image(found[sample["text"]], 8)
        assert sample["image"].mode == direct.mode
        assert_close(np.asarray(sample["image"]), np.asarray(direct))
        with Image.open(io.BytesIO(found[sample["text"]])) as opened:
            (through,) = adapted([{"image": opened}], size=8)
            assert_close(np.asarray(through["image"]), np.asarray(direct))


@pytest.mark.parametrize("streaming", [False, True])
def test_a_bad_row_is_named_by_its_dataset_and_index(dataset, streaming):
    import datasets

    rows = [{"text": "a", "image": {"bytes": grey(0), "path": None}}]
    rows += [{"text": t, "image": {"bytes": b, "path": None}} for t, b in ((None, grey(1)), ("", grey(2)), ("c", b"x"))]
    rows += [{"text": "d", "image": None}, {"text": "e", "image": {"bytes": grey(5), "path": None}}]
    path = dataset(rows, image=datasets.Image())
    source = hugging_face(path, image="image", streaming=streaming)
    assert described(source) == [
        "a",
        "set, sample 1: text must be a string, got null",
        "set, sample 2: text is empty",
        "set, sample 3: image: it is no image of a known format",
        "set, sample 4: image: it is missing",
        "e",
    ]
    refused = hugging_face(path, image="image", streaming=streaming, on_corrupt="refuse")
    with pytest.raises(ValueError, match=r"corrupt sample .*set, sample 1: text must be a string, got null") as error:
        list(drawn(refused))
    assert not isinstance(error.value, BadSample)


@pytest.mark.parametrize("streaming", [False, True])
def test_a_broken_clip_is_left_to_the_draw_where_clips_have_a_longest(dataset, streaming):
    import datasets

    def wav(seconds):
        buffer = io.BytesIO()
        soundfile.write(buffer, np.full(int(8000 * seconds), 0.1), 8000, format="WAV")
        return {"bytes": buffer.getvalue(), "path": None}

    clips = {"short": wav(0.1), "long": wav(0.3), "broken": {"bytes": b"RIFFx", "path": None}, "absent": None}
    path = dataset([{"text": k, "audio": v} for k, v in clips.items()], audio=datasets.Audio(decode=False))
    assert described(hugging_face(path, audio="audio", streaming=streaming, max_seconds=0.2)) == [
        "short",
        "set, sample 1: audio: it cannot be read as audio: Format not recognised.",
        "set, sample 2: audio: it is missing",
    ]


def test_a_stream_goes_on_behind_a_bad_sample_and_keeps_the_numbers(dataset):
    path = dataset([{"text": "" if i % 4 == 1 else f"{i}"} for i in range(12)])
    source = hugging_face(path, streaming=True)
    whole = described(source)
    assert whole[:3] == ["0", "set, sample 1: text is empty", "2"]
    for stop in (1, 2, 7):
        source.load_state_dict(None)
        rows = iter(source)
        for _ in range(stop):
            next(rows)
        state = source.state_dict()
        again = hugging_face(path, streaming=True)
        again.load_state_dict(state)
        assert described(again) == whole[stop:]
    source.load_state_dict(None)
    assert described(source) == whole


def test_a_stream_that_cannot_be_read_on_ends_in_one_line():
    def rows():
        yield {"text": "a"}
        raise OSError("the shard\nis cut")

    with pytest.raises(ValueError, match=r"^mine, sample 1 and what follows cannot be read: the shard is cut$"):
        list(Iterated(rows(), lambda row, name: row, "mine"))


def test_an_adapted_source_passes_bad_samples_on_and_finds_its_own(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"text": "a"}\nnull\n{"text": "b"}\n{"text": "c"}')
    source = adapted(Jsonl(str(tmp_path / "a.jsonl")), size=8, count=3)
    assert (len(source), described(source)) == (3, ["a", "a.jsonl, line 2: it must hold keys and values, got null", "b"])
    with pytest.raises(IndexError):
        source[3]
    clips = [{"text": "n", "audio": np.array([0, np.nan]), "sample_rate": 8000}, {"text": "r", "audio": np.zeros(8)}]
    assert described(adapted(clips, sample_rate=16000)) == [
        "list, sample 0: it holds NaN or infinite samples",
        "list, sample 1: its audio has no sample_rate",
    ]
    streamed = adapted(s for s in (*clips, BadSample("mine.wav", "it is cut"), {"text": "t"}))
    assert [str(s) if isinstance(s, BadSample) else s["text"] for s in streamed] == ["n", "r", "mine.wav: it is cut", "t"]
    pcm = adapted([{"audio": np.array([0, 16384], np.int16), "sample_rate": 8000}], sample_rate=8000)
    assert pcm[0]["audio"].tolist() == [0, 0.5]


# WebDataset


def shard(path, files):
    with tarfile.open(path, "w") as tar:
        for name, content in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))


@pytest.mark.parametrize("streaming", [False, True])
def test_a_bad_sample_of_a_webdataset_is_named_by_shard_and_key(tmp_path, monkeypatch, streaming):
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    files = {f"{i}.{end}": data for i in range(8) for end, data in (("png", grey(i)), ("txt", f"t{i}".encode()))}
    ask = {"text": "txt", "image": "png", "streaming": streaming}
    changes = {
        "missing_early": ({"1.png": None}, {1: "sample 1: png: it is missing"}),  # while columns are guessed
        "missing_late": ({"6.png": None, "7.txt": None}, {6: "sample 6: png: it is missing", 7: "sample 7: txt must be a"}),
        "broken": ({"2.png": b"nothing"}, {2: "sample 2: png: it is no image of a known format"}),
    }
    for name, (change, bad) in changes.items():
        changed = {k: v for k, v in {**files, **change}.items() if v is not None}
        shard(tmp_path / f"{name}.tar", changed)
        source = hugging_face("webdataset", data_files=str(tmp_path / f"{name}.tar"), **ask)
        found = described(source)
        assert len(found) == 8
        for i, said in enumerate(found):
            assert said.startswith(f"{name}.tar, {bad[i]}" if i in bad else f"t{i}")
        assert all(int(s["text"][1]) == s["image"].getpixel((0, 0)) for s in usable(source))


@pytest.mark.parametrize("streaming", [False, True])
def test_the_key_of_a_webdataset_ends_at_its_first_dot(tmp_path, monkeypatch, streaming):
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    ask = {"path": "webdataset", "streaming": streaming}
    files = {f"{i}.{end}": data for i in range(6) for end, data in (("png", grey(i)), ("txt", b"t"))}
    dotted = {"22.05.png": grey(9), "22.05.txt": b"dotted"}
    shard(tmp_path / "some.tar", {**files, **dotted})
    source = hugging_face(text="txt", image="png", data_files=str(tmp_path / "some.tar"), **ask)
    assert described(source) == ["t"] * 6 + ["some.tar, sample 22: txt must be a string, got null"]
    shard(tmp_path / "all.tar", dotted)
    with pytest.raises(ValueError, match=r"no column 'txt' for text; it has .*05\.png, 05\.txt; of a\.b\.png in a WebDataset"):
        hugging_face(text="txt", image="png", data_files=str(tmp_path / "all.tar"), **ask)
    (right,) = usable(hugging_face(text="05.txt", image="05.png", data_files=str(tmp_path / "all.tar"), **ask))
    assert (right["text"], right["image"].getpixel((0, 0))) == ("dotted", 9)
    whole = (tmp_path / "some.tar").read_bytes()
    (tmp_path / "cut.tar").write_bytes(whole[: whole.index(b"1.png") + 600])
    with pytest.raises(ValueError, match=r"^webdataset.* cannot be read: unexpected end of data$"):
        list(drawn(hugging_face(text="txt", image="png", data_files=str(tmp_path / "cut.tar"), **ask)))


def test_a_sample_that_is_found_bad_later_is_named_by_its_source(photos, dataset, tmp_path):
    """A tokenizer that refuses a sample does not know what it is given: whoever draws it asks the source."""
    folder = Folder(str(photos), "image")
    assert name_of(folder, 8) == str(photos / "8.png") == name_of(adapted(folder, size=8), 8)
    (tmp_path / "a.jsonl").write_text('\n{"text": "a"}\n\n{"text": "b"}')
    assert name_of(Jsonl(str(tmp_path / "a.jsonl")), 1) == f"{tmp_path / 'a.jsonl'}, line 4"
    path = dataset([{"text": "a"}])
    assert name_of(hugging_face(path), 0) == f"{path}, sample 0"
    assert name_of(adapted([{"text": "a"}]), 0) == "list, sample 0"


def test_a_refused_sample_ends_the_draw_of_whoever_leaves_bad_ones_out(dataset):
    source = hugging_face(dataset([{"text": "a"}, {"text": ""}]), on_corrupt="refuse")
    with pytest.raises(Refused, match="set, sample 1: text is empty"):
        list(usable(source))
