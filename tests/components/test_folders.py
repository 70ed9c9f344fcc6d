"""A folder as people have it: captions in tables, in names of folders or not at all; a part of it held out."""

import json

import numpy as np
import pytest
import soundfile
from PIL import Image

from components.data.bad import BadSample, drawn
from components.data.folders.splits import part
from components.data.sources import Folder, Jsonl, hugging_face


def texts(source):
    """By the name of the file, its text; of a bad sample, why."""
    names = (source.name_of(i).rsplit("/", 1)[-1] for i in range(len(source)))
    return {n: s.why if isinstance(s, BadSample) else s.get("text") for n, s in zip(names, drawn(source), strict=True)}


@pytest.fixture
def pictures(tmp_path):
    """a.png, b.jpg and sub/c.png, without captions."""
    (tmp_path / "sub").mkdir()
    for name in ("a.png", "b.jpg", "sub/c.png"):
        Image.new("RGB", (4, 4)).save(tmp_path / name)
    return tmp_path


TABLES = {
    "names of columns": ("x.csv", "file_name,text\na.png,one\nb.jpg,two\nsub/c.png,three\n", {}),
    "Excel's, of a German": ("x.csv", "\ufeffFile;Caption\r\na.png;one\r\nb.jpg;two\r\nc.png;three\r\n", {}),
    "no names, no endings": ("x.csv", "a,one\nb,two\nc,three", {}),
    "quotes": ("x.csv", '"image","text"\n"a.png","one"\nb.jpg,two\nc,three\n', {}),
    "LJSpeech": ("metadata.csv", "a|one, of 1|one\nb|two|two\nc|three|three\n", {}),
    "Common Voice": ("x.tsv", "client\tpath\tsentence\nq\ta.png\tone\nq\tb.jpg\ttwo\nq\tc.png\tthree\n", {}),
    "Windows": ("x.csv", "path,label\n.\\a.png,one\nb.jpg,two\nsub\\c.png,three\n", {}),
    "columns of one's own": ("x.csv", "n,said,text\na,one,0\nb,two,0\nc,three,0\n", {"file": "n", "text": "said"}),
}


@pytest.mark.parametrize("case", TABLES)
def test_a_table_gives_captions(pictures, case, capsys):
    name, table, columns = TABLES[case]
    (pictures / name).write_text(table)
    found = texts(Folder(str(pictures), "image", captions=name, columns=columns))
    assert found == {"a.png": "one, of 1" if case == "LJSpeech" else "one", "b.jpg": "two", "c.png": "three"}
    assert capsys.readouterr().out == ""


def test_a_quote_in_ljspeech_is_a_quote(pictures):
    (pictures / "metadata.csv").write_text('a|"one\nb|two"\nc|three\n')
    assert texts(Folder(str(pictures), "image", captions="metadata.csv")) == {
        "a.png": '"one',
        "b.jpg": 'two"',
        "c.png": "three",
    }


def test_a_row_is_a_sample_and_what_does_not_match_is_said(pictures, capsys):
    """Captions of one image are samples of their own (Flickr's captions.txt); a row without a file is bad."""
    (pictures / "captions.txt").write_text("image,caption\na.png,one\na.png,again\nb.jpg,\nd.png,gone\n")
    source = Folder(str(pictures), "image", captions="captions.txt")
    why = [s.why if isinstance(s, BadSample) else s["text"] for s in drawn(source)]
    assert why == ["one", "again", "its caption: text is empty", "file not found"]
    assert "1 image file(s) that the table does not name, the first is sub/c.png" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("table", "options", "message"),
    [
        ("only\none\n", {}, r"its first line has one column \('only'\); it needs a file and a text"),
        (
            "n,caption\na,one\n",
            {},
            r"which of its columns is the file\? Set columns: \{file: \.\.\.\} to one of \['n', 'caption'\]",
        ),
        ("n,text\na,one\n", {"columns": {"file": "m"}}, "has no column 'm'; it has n, text"),
        ("n,text\na,one\n", {"columns": {"name": "n"}}, "columns: 'name' is neither file nor text"),
        ("file,text\n", {}, "holds no row but the names of its columns"),
        ("", {"captions": "y.csv"}, "captions: there is no y.csv in"),
        ("", {"captions": "all.jsonl"}, "is not beside, folder, null or a table .*; of a .jsonl make a Jsonl source"),
        ("", {"captions": "folder", "columns": {"file": "n"}}, "columns are of a table, and captions is 'folder'"),
        ("", {"captions": "folder"}, "captions: folder, and a.png lies in none"),
        ("", {"captions": "beside"}, "its caption a.txt is missing; captions may also be x.csv, folder .*, or null for none"),
        ("", {"captions": None, "split": "train", "held_out": 1}, "held_out must be a share between 0 and 1, got 1"),
    ],
)
def test_a_mistake_is_a_sentence(pictures, table, options, message):
    (pictures / "x.csv").write_text(table)
    with pytest.raises(ValueError, match=message):
        Folder(str(pictures), "image", **{"captions": "x.csv", **options})


def test_classes_are_captions_of_a_folder_and_of_a_dataset_alike(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    for i, name in enumerate(("wild_rose", "lily")):
        (tmp_path / "flowers" / name).mkdir(parents=True)
        Image.new("L", (4, 4), i).save(tmp_path / "flowers" / name / f"{i}.png")
    expected = ["lily", "wild rose"]
    path = str(tmp_path / "flowers")
    assert [s["text"] for s in Folder(path, "image", captions="folder")] == expected
    dataset = hugging_face(path, text="label", image="image")
    assert sorted(s["text"] for s in dataset) == expected
    assert sorted(s["text"] for s in hugging_face(path, text="label", image="image", streaming=True)) == expected


def test_without_captions_a_sample_has_no_text(pictures):
    assert [sorted(s) for s in Folder(str(pictures), "image", captions=None)] == [["image"]] * 3
    soundfile.write(pictures / "a.wav", np.zeros(80), 8000)
    (sample,) = Folder(str(pictures), "audio", captions=None)
    assert sorted(sample) == ["audio", "sample_rate"]


def test_what_lies_there_instead_is_said(tmp_path, capsys):
    for name in ("a.heic", "b.HEIC", "c.csv"):
        (tmp_path / name).touch()
    with pytest.raises(ValueError, match=r"no image files \(\.png, .*\) in .*; it holds 2 \.heic, 1 \.csv"):
        Folder(str(tmp_path), "image")
    (tmp_path / "a.txt").write_text("x")
    (tmp_path / "b.pdf").touch()
    Folder(str(tmp_path), "text")
    assert "1 .pdf not read as text, the first is b.pdf; convert them" in capsys.readouterr().out


# what is held out


def test_the_parts_of_a_split_are_a_function_of_names_alone():
    names = [f"{i}.png" for i in range(100)]
    train, held_out = part(names, "train", 0.1), part(names, "validation", 0.1)
    assert sorted(train + held_out) == part(names, None, 0.1) == list(range(100))
    assert len(held_out) == 10
    chosen = {names[i] for i in held_out}
    again = [*names[::-1], "new.png"]
    assert len(chosen ^ {again[i] for i in part(again, "validation", 0.1)}) <= 2
    assert {(names * 2)[i] for i in part(names * 2, "validation", 0.1)} == chosen
    assert [len(part(names[:2], split, 0.1)) for split in ("train", "validation")] == [1, 1]
    assert len(part(names[:2], "train", 0.99)) == 1
    with pytest.raises(ValueError, match="one sample alone cannot be split"):
        part(names[:1] * 5, "train", 0.1)


def test_captions_of_one_image_are_on_one_side(tmp_path):
    for i in range(10):
        Image.new("L", (4, 4), i).save(tmp_path / f"{i}.png")
    rows = [{"image": f"{i}.png", "text": f"{i} {k}"} for k in range(3) for i in range(10)]
    (tmp_path / "all.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (tmp_path / "all.csv").write_text("\n".join(f"{r['image']},{r['text']}" for r in rows))
    sides = []
    for split in ("train", "validation"):
        lines = Jsonl(str(tmp_path / "all.jsonl"), split=split, held_out=0.2)
        table = Folder(str(tmp_path), "image", captions="all.csv", split=split, held_out=0.2)
        assert sorted(s["text"] for s in lines) == sorted(s["text"] for s in table)
        sides.append({s["text"].split()[0] for s in lines})
    assert [len(side) for side in sides] == [8, 2]
    assert not sides[0] & sides[1]


def test_a_line_of_a_table_ends_at_its_end_alone(pictures):
    """U+2028 and the like stand in captions that come from the web."""
    for name, mark in (("x.csv", ","), ("x.tsv", "\t")):
        (pictures / name).write_text(f"file{mark}text\na.png{mark}one\u2028more\nb.jpg{mark}two\x85\x0bmore\nc{mark}three\n")
        assert texts(Folder(str(pictures), "image", captions=name)) == {
            "a.png": "one\u2028more",
            "b.jpg": "two\x85\x0bmore",
            "c.png": "three",
        }


@pytest.mark.parametrize(("row", "line"), [('a.png,"one', 4), (f"a.png,{'x' * 200_000}", 2)])
def test_a_table_that_cannot_be_parted_names_its_line(pictures, row, line):
    """A quote that does not close would swallow all rows behind it."""
    (pictures / "x.csv").write_text(f"file,text\n{row}\nb.jpg,two\nc.png,three\n")
    with pytest.raises(ValueError, match=rf"x\.csv, line {line}: "):
        Folder(str(pictures), "image", captions="x.csv")


@pytest.mark.parametrize(
    ("file", "named"), [("cafe\u0301", "caf\u00e9"), ("caf\u00e9", "cafe\u0301")]
)  # as a Mac writes it, and not
def test_a_file_is_found_however_its_accents_are_written(pictures, file, named):
    Image.new("L", (4, 4)).save(pictures / f"{file}.png")
    (pictures / "x.csv").write_text(f"file,text\n{named}.png,one\na,two\n")
    assert list(texts(Folder(str(pictures), "image", captions="x.csv")).values()) == ["one", "two"]


def test_a_name_that_two_folders_have_is_none_of_their_files(pictures):
    for folder in ("one", "two"):
        (pictures / folder).mkdir()
        Image.new("L", (4, 4)).save(pictures / folder / "same.png")
    (pictures / "x.csv").write_text("file,text\nsame.png,which\ntwo/same.png,this\na.png,two\n")
    found = Folder(str(pictures), "image", captions="x.csv")
    assert {file.relative_to(pictures).as_posix() for file in found.files} == {"same.png", "two/same.png", "a.png"}
    with pytest.raises(BadSample, match=r"same\.png: file not found"):
        found[found.files.index(pictures / "same.png")]


def test_a_table_may_name_a_file_elsewhere(pictures, tmp_path_factory):
    other = tmp_path_factory.mktemp("elsewhere") / "o.png"
    Image.new("L", (4, 4)).save(other)
    (pictures / "x.csv").write_text(f"file,text\n{other},one\na.png,two\n/none.png,three\n")
    assert texts(Folder(str(pictures), "image", captions="x.csv")) == {
        "o.png": "one",
        "a.png": "two",
        "none.png": "file not found",
    }


def test_what_is_held_out_is_drawn_and_not_the_first_of_its_kind():
    names = [f"{kind}/{i:02d}.png" for kind in ("cat", "dog") for i in range(50)]
    held = [names[i] for i in part(names, "validation", 0.2)]
    assert len(held) == 20
    assert {name.partition("/")[0] for name in held} == {"cat", "dog"}
    assert held != sorted(names)[:20]
