"""Tables and folders of texts: the three formats, the oddities of real files, and errors with file and line."""

import pytest

from evaluation.tasks.rows import read_rows, text_files


def write(folder, name, content):
    path = folder / name
    path.write_bytes(content.encode())
    return path


def test_byte_order_mark_crlf_blank_lines_and_odd_line_breaks(tmp_path):
    path = write(tmp_path, "a.tsv", '\ufeffsentence\tlabel\r\n" lone quote\x85\u2028here\t1\r\n\r\nb\t0'.encode())
    assert list(read_rows(path)) == [
        (2, {"sentence": '" lone quote\x85\u2028here', "label": "1"}),
        (4, {"sentence": "b", "label": "0"}),
    ]


def test_a_quoted_csv_field_may_hold_line_breaks(tmp_path):
    path = write(tmp_path, "a.csv", '\ufeffsentence,label\r\n"two\r\nlines",1\r\nb,0\r\n')
    assert [row["sentence"] for _, row in read_rows(path)] == ["two\r\nlines", "b"]


def test_the_line_of_a_row_is_where_it_begins(tmp_path):
    path = write(tmp_path, "a.csv", 'sentence,label\n"two\n\nlines",1\n\n,0\n"say ""no"", he\tsaid",1')
    assert [line for line, _ in read_rows(path)] == [2, 6, 7]
    assert list(read_rows(path))[2][1]["sentence"] == 'say "no", he\tsaid'
    write(tmp_path, "a.csv", 'sentence,label\n"two\nlines",1\n"never closed,1\nb,0\n')
    with pytest.raises(ValueError, match=r"a.csv:4: unexpected end of data; correct the quotation marks"):
        list(read_rows(path))
    write(tmp_path, "a.csv", 'sentence,label\nb,0\n"two\nlines",1,2\n')
    with pytest.raises(ValueError, match=r"a.csv:3: the row has 3 fields and the header 2"):
        list(read_rows(path))


def test_a_long_cell(tmp_path):
    path = write(tmp_path, "a.csv", f'sentence,label\n"{"x" * 200_000}",1\n')
    assert [len(row["sentence"]) for _, row in read_rows(path)] == [200_000]


@pytest.mark.parametrize(
    ("name", "header", "separator"),
    [
        *(
            ("a.csv", '"sentence";"label"', "';'"),
            ("a.csv", '"sentence, long";label', "';'"),
            ("a.csv", "sep=;", "';'"),
        ),
        *(("a.csv", "sentence\tlabel", r"'\\t'"), ("a.csv", "sentence|label", r"'\|'")),
        *(("a.tsv", '"sentence";"label"', "';'"), ("a.tsv", "sentence,label", "','")),
    ],
)
def test_another_separator_is_named(tmp_path, name, header, separator):
    path = write(tmp_path, name, f"{header}\n{header}\n")
    with pytest.raises(ValueError, match=rf"{name}:1: the columns are separated by {separator}, in a .{name[2:]} file"):
        list(read_rows(path))


def test_a_missing_file_says_what_the_folder_holds(tmp_path):
    write(tmp_path, "train.subset.tsv", "sentence\tlabel\na\tx\n")
    with pytest.raises(ValueError, match=r"train.tsv does not exist; the folder holds train.subset.tsv"):
        list(read_rows(tmp_path / "train.tsv"))


def test_texts_of_a_label_at_any_depth_and_in_capitals(tmp_path):
    for name in ("pos/a.TXT", "pos/more/even/b.txt", "neg/c.txt", "neg/.hidden/d.md", "neg/.DS_Store", "urls.md"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        write(tmp_path, name, name)
    rows = {where: row["label"] for where, row in read_rows(tmp_path)}
    assert rows == {"neg/c.txt": "neg", "pos/a.TXT": "pos", "pos/more/even/b.txt": "pos"}


def test_no_file_of_a_label_is_left_out_silently(tmp_path):
    with pytest.raises(ValueError, match="has no subfolders; .*such as .*/pos"):
        text_files(tmp_path)
    (tmp_path / "pos/sub").mkdir(parents=True)
    with pytest.raises(ValueError, match="pos holds no text"):
        text_files(tmp_path)
    write(tmp_path, "pos/a.txt", "a")
    for name in ("pos/b.md", "pos/sub/c.txt.gz"):
        write(tmp_path, name, "b")
    with pytest.raises(ValueError, match="pos holds 2 other files, such as b.md"):
        text_files(tmp_path)
    for path in (tmp_path / "pos/b.md", tmp_path / "pos/sub/c.txt.gz"):
        path.unlink()
    (tmp_path / "pos/link").symlink_to(tmp_path / "pos", target_is_directory=True)
    with pytest.raises(ValueError, match="pos holds 1 other files, such as link"):
        text_files(tmp_path)
    (tmp_path / "pos/link").unlink()
    assert text_files(tmp_path) == [tmp_path / "pos/a.txt"]
