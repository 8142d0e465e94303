"""Prompt files: every format gives the same rows; ids, groups and duplicates stay; bad rows are named."""

import json

import pytest

from tasks import prompts
from tasks.prompts import Prompts

ROWS = [
    {"prompt": 'a "red", fox', "prompt_id": "7", "group": "animals"},
    {"prompt": "zwei Äpfel", "prompt_id": "9", "group": "food"},
    {"prompt": 'a "red", fox', "prompt_id": "7", "group": "animals"},
]
WANTED = Prompts(tuple(r["prompt"] for r in ROWS), ("7", "9", "7"), ("animals", "food", "animals"))


def separated(path, mark):
    import csv

    with open(path, "w", newline="") as file:
        writer = csv.writer(file, delimiter=mark)
        writer.writerows([["Prompt", "ID", "Category"], *(list(row.values()) for row in ROWS)])


def parquet(path):
    import pyarrow as pa
    import pyarrow.parquet as pq

    pq.write_table(pa.Table.from_pylist(ROWS), path)


def saved_dataset(path):
    from datasets import Dataset

    Dataset.from_list(ROWS).save_to_disk(path)


WRITERS = {
    "rows.csv": lambda path: separated(path, ","),
    "rows.tsv": lambda path: separated(path, "\t"),
    "rows.jsonl": lambda path: path.write_text("\n".join(json.dumps(row) for row in ROWS)),
    "rows.parquet": parquet,
    "dataset": saved_dataset,
}


@pytest.mark.parametrize("name", WRITERS)
def test_every_format_keeps_order_ids_groups_and_duplicates(tmp_path, name):
    WRITERS[name](tmp_path / name)
    found = prompts.read(str(tmp_path / name))
    assert found == WANTED and found.digest == WANTED.digest


def test_a_text_file_numbers_its_lines(tmp_path):
    (tmp_path / "rows.txt").write_text("\ufeffone\r\ntwo\r\n\r\n", encoding="utf-8")
    assert prompts.read(str(tmp_path / "rows.txt")) == Prompts(("one", "two"), ("0", "1"), ("", ""))


ODD = "a\u2028b\x85c\x0cd\x1ce"  # Python's splitlines cuts at each of these


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("rows.txt", f"{ODD}\ntwo\n"),
        ("rows.csv", f"prompt\n{ODD}\ntwo\n"),
        ("rows.tsv", f"prompt\tid\r\n{ODD}\t0\r\ntwo\t1\r\n"),
        ("rows.jsonl", json.dumps({"prompt": "a\u2028b\x85cde"}, ensure_ascii=False) + '\n"two"\n'),
        ("ROWS.CSV", "Prompt\none\ntwo\n"),
        ("rows.TXT", "one\rtwo\r"),
    ],
)
def test_lines_end_at_newlines_alone_and_the_suffix_may_be_in_capitals(tmp_path, name, text):
    (tmp_path / name).write_bytes(text.encode())
    found = prompts.read(str(tmp_path / name))
    assert len(found) == 2 and found.texts[1] == "two" and found.ids == ("0", "1")


def test_a_cell_in_quotes_may_hold_a_line_end(tmp_path):
    (tmp_path / "rows.csv").write_bytes(b'prompt,id\r\n"a\r\nb",1\r\nc,2\r\n')
    assert prompts.read(str(tmp_path / "rows.csv")) == Prompts(("a\r\nb", "c"), ("1", "2"), ("", ""))


def test_ids_and_groups_that_begin_later_are_kept(tmp_path):
    lines = ['{"prompt": "a"}', '{"prompt": "b", "id": 8}', '{"prompt": "c", "category": "x"}']
    (tmp_path / "rows.jsonl").write_text("\n".join(lines))
    found = prompts.read(str(tmp_path / "rows.jsonl"))
    assert found == Prompts(("a", "b", "c"), ("", "8", ""), ("", "", "x"))


def test_a_column_that_is_there_twice_is_refused_where_it_matters(tmp_path):
    import pyarrow as pa
    import pyarrow.parquet as pq

    pq.write_table(
        pa.Table.from_arrays([pa.array(["a"]), pa.array(["b"])], ["prompt", "prompt"]), tmp_path / "a.parquet"
    )
    (tmp_path / "a.csv").write_text("prompt,note,Prompt ,note\na,x,b,y\n")
    (tmp_path / "b.csv").write_text("prompt,note,note\na,x,y\n")
    for name in ("a.parquet", "a.csv"):
        with pytest.raises(ValueError, match=f"{name} has 2 columns 'prompt'. Keep the one that is meant"):
            prompts.read(str(tmp_path / name))
    assert prompts.read(str(tmp_path / "b.csv")).texts == ("a",)


def test_a_file_that_changed_is_read_again(tmp_path):
    path = tmp_path / "rows.txt"
    path.write_text("one\n")
    before = prompts.read(str(path))
    path.write_text("other words\n")
    assert prompts.read(str(path)).digest != before.digest


BAD = [
    ("rows.txt", "one\n\nthree\n \nfive\n", r"line 2 \(''\), line 4 \(' '\)"),
    ("rows.csv", "prompt,id\na fox,1\n,2\n", r"unlike line 3 \(''\)"),
    ("rows.csv", "prompt,id\na fox, red,1\n", "line 2 has 3 fields, the header 2"),
    ("rows.csv", "words,id\na fox,1\n", "has no column prompt or .*; found: words, id"),
    ("rows.jsonl", '{"prompt": "a"}\n{"prompt": 3}\n', r"unlike line 2 \(3\)"),
    ("rows.jsonl", '{"prompt": "a"}\n{"prompt"\n', "line 2 is not JSON"),
    ("rows.jsonl", '{"prompt": "a"}\n[1]\n', r"line 2 must be an object or a text, got '\[1\]'"),
    ("rows.txt", "\n", "holds no prompts"),
    ("rows.doc", "a", r"ends in '.doc'; allowed: .txt"),
    ("rows.txt", "".join(["a\n"] + ["\n"] * 9 + ["b\n"]), "line 6 .* and 4 more"),
    ("rows.jsonl", '{"prompt": "a"}\n{"prompt": "b\\ud800"}\n', r"rows.jsonl: prompt of line 2 holds half a character"),
    ("rows.jsonl", '{"prompt": "a", "id": "\\udc00"}\n', r"rows.jsonl: id of line 1 holds half a character"),
    ("rows.parquet", "nothing", "cannot be read as Parquet"),
]


@pytest.mark.parametrize(("name", "text", "message"), BAD)
def test_bad_rows_are_named_by_their_numbers(tmp_path, name, text, message):
    (tmp_path / name).write_text(text)
    with pytest.raises(ValueError, match=message):
        prompts.read(str(tmp_path / name))


def test_what_is_not_text_is_refused_with_its_line(tmp_path):
    (tmp_path / "rows.txt").write_bytes(b"one\ntwo \xff\n")
    with pytest.raises(ValueError, match="line 2 is not UTF-8"):
        prompts.read(str(tmp_path / "rows.txt"))


def test_a_file_that_is_not_there_is_refused(tmp_path):
    with pytest.raises(ValueError, match="does not exist. Give a .txt"):
        prompts.read(str(tmp_path / "none.txt"))


def test_a_dataset_with_splits_asks_for_one(tmp_path):
    (tmp_path / "dataset_dict.json").write_text('{"splits": ["train", "test"]}')
    with pytest.raises(ValueError, match="several splits: train, test. Give one of them, .*train"):
        prompts.read(str(tmp_path))


def test_a_folder_that_is_no_dataset_is_refused(tmp_path):
    with pytest.raises(ValueError, match="is no dataset saved with save_to_disk"):
        prompts.read(str(tmp_path))
