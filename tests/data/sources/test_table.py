import bz2
import gzip
import io
import lzma
import os
import zipfile

import pytest

from polyvit_fast.data.sources.table import open_text, read_rows


def rows(tmp_path, content, name="t.csv"):
    path = tmp_path / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return list(read_rows(str(path)))


def zipped(content):
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("xl/workbook.xml", content)
    return file.getvalue()


def test_rows_with_their_lines(tmp_path):
    assert rows(tmp_path, "path,label\r\na,0\r\n\r\n b ,1 \r\n") == [(2, "a", "0"), (4, " b ", "1")]
    for name in ("t.tsv", "t.TSV"):
        assert rows(tmp_path, "Label\tPath\n0\ta,b\n", name) == [(2, "a,b", "0")]


def test_a_row_of_several_lines_counts_by_its_first(tmp_path):
    assert rows(tmp_path, 'path,label\n"a\nb",0\nc,1\n') == [(2, "a\nb", "0"), (4, "c", "1")]


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-32"])
def test_encodings_with_a_mark(tmp_path, encoding):
    assert rows(tmp_path, "path,label\nété.jpg,1\n".encode(encoding)) == [(2, "été.jpg", "1")]


@pytest.mark.parametrize("mark", ["utf-16-le", "utf-16-be"])
def test_either_order_of_utf_16(tmp_path, mark):
    assert rows(tmp_path, "\ufeffpath,label\nx.jpg,1\n".encode(mark)) == [(2, "x.jpg", "1")]


@pytest.mark.parametrize("encoding", ["utf-16-le", "utf-16-be"])
def test_utf_16_without_a_mark_is_reported(tmp_path, encoding):
    with pytest.raises(
        ValueError, match=r"t.csv, line 1: it holds NUL characters, as UTF-16 without a byte-order mark does; save the table as"
    ):
        rows(tmp_path, "path,label\nx.jpg,1\n".encode(encoding))


@pytest.mark.parametrize(
    ("pack", "message"),
    [
        (gzip.compress, r"it is compressed \(gzip\); unpack it"),
        (bz2.compress, r"it is compressed \(bzip2\); unpack it"),
        (lzma.compress, r"it is compressed \(xz\); unpack it"),
        (zipped, r"it is a spreadsheet \(.xlsx, .ods\) or a ZIP archive; save it as text, a table as CSV"),
    ],
)
def test_what_is_no_text_is_reported_as_what_it_is(tmp_path, pack, message):
    with pytest.raises(ValueError, match=rf"^manifest {tmp_path}/t.csv: {message}"):
        rows(tmp_path, pack(b"path,label\nx.jpg,1\n"))


@pytest.mark.parametrize(
    ("name", "text", "hint"),
    [
        ("t.csv", "path\tlabel\na\t0\n", "tabs: give it a name that ends in .tsv"),
        ("t.txt", "size\tLabels\tPath\n1\t0\ta\n", "tabs: give it a name that ends in .tsv"),
        ("t.csv", "path;label\na;0\n", "semicolons: save it with commas"),
        ("t.csv", '"path";"label"\n"a";"0"\n', "semicolons: save it with commas"),
        ("t.csv", "path|label\na|0\n", "vertical bars: save it with commas"),
        ("t.tsv", "path,label\na,0\n", "commas: give it a name that ends in .csv"),
    ],
)
def test_another_separator_is_suspected(tmp_path, name, text, hint):
    with pytest.raises(ValueError, match=rf"{name}, line 1: .*; its columns seem to be separated by {hint}$"):
        rows(tmp_path, text, name)


def test_no_separator_is_suspected_where_none_would_do(tmp_path):
    with pytest.raises(ValueError, match=r"it names file;class$"):
        rows(tmp_path, "file;class\na;0\n")


def test_utf_16_that_is_cut_is_reported(tmp_path):
    with pytest.raises(ValueError, match=r"t.csv, line \d: it is not text in the encoding of its first bytes"):
        rows(tmp_path, "path,label\nx.jpg,1\n".encode("utf-16")[:-1])


def test_bytes_that_are_no_utf_8_are_kept(tmp_path):
    assert rows(tmp_path, b"path,label\ncaf\xe9,1\n") == [(2, os.fsdecode(b"caf\xe9"), "1")]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            'path,label\na,0\n"b,1\nc,1\nd,0\n',
            r"line 3: a double quote is opened there and not closed where its cell ends \(line 5: unexpected",
        ),
        ('path,label\n"b,1', r"line 2: a double quote is opened there"),
        ('path,label\n"b,1\nc,1\n"d",0\n', r"line 2: a double quote is opened there .*\(line 4: ',' expected"),
        ('path,label\n"b,1\n' + "c,1\n" * 50_000, r"line 2: a double quote is opened there .*field larger than field limit"),
        ('path,label\n"a\nb",0\n"c\nd","0\ne,1\n', r"line 5: a double quote is opened there .*\(line 6: unexpected"),
        ('path,label\n"a""b\nc","0\ne,1\n', r"line 3: a double quote is opened there .*\(line 4: unexpected"),
        ('"path,label\na,0\n', r"line 1: a double quote is opened there"),
        ('path,label\na,0\n"b"c,1\n', r"t.csv, line 3: ',' expected after '\"'"),
        ("path,label,Label\na,0,1\n", r"line 1: 2 columns are named label; rename those that are not meant"),
        ("path,labels,path\na,0,b\n", r"line 1: 2 columns are named path"),
        ("path;label\na;0\n", r"line 1: the columns must be named, .* it names path;label"),
    ],
)
def test_faults_are_reported_with_the_line_where_they_begin(tmp_path, text, message):
    with pytest.raises(ValueError, match=message):
        rows(tmp_path, text)


def test_what_is_no_file_is_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(ValueError, match=rf"manifest {tmp_path}/pipe: not a regular file"):
        list(read_rows(str(tmp_path / "pipe")))
    with pytest.raises(ValueError, match=rf"classes {tmp_path}: Is a directory"):
        open_text(str(tmp_path), "classes")
