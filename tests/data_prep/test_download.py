"""The download command with a mirror on this machine: layouts that evaluation reads, a kill, one line per mistake."""

import bz2
import hashlib
import io
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
import zipfile
from pathlib import Path

import pytest

from data_prep import download, transfer
from data_prep.cli import run_cli
from data_prep.files import sole_process
from evaluation.tasks.glue import GLUE_TASKS
from tests.data_prep.unruly_server import Served, serving

ROOT = Path(__file__).parents[2]
REAL_MRPC = ROOT.parent / "shared" / "data" / "glue" / "MRPC"

pytestmark = pytest.mark.skipif(not shutil.which("curl"), reason="curl is not installed")


@pytest.fixture
def server(monkeypatch):
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    monkeypatch.setattr(transfer, "FIRST_WAIT_S", 0.01)
    with serving() as server:
        yield server


def names(folder) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def fail(capsys, *argv) -> str:
    """The one line that the command prints when it ends with exit code 2."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        run_cli(download.main, [str(argument) for argument in argv])
    assert stop.value.code == 2
    [line] = [line for line in capsys.readouterr().err.splitlines() if "error: " in line]
    return line


def test_without_curl_the_way_out_is_named(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    assert "curl is not installed" in fail(capsys, "squad", "--output", tmp_path / "squad")
    assert "invalid choice: 'books'" in fail(capsys, "books")
    assert names(tmp_path) == []


# --- Wikipedia


def offer_dump(server, date="20260901", content=b"", status="done", job="articlesmultistreamdump", wiki="xxwiki"):
    """A dump of two article files, an index, and a file that wants to lie elsewhere; returns the article files."""
    start = f"{wiki}-{date}-pages-articles-multistream"
    contents = {f"{start}{n}.xml-p{n}p{n + 1}.bz2": content or bz2.compress(b"<page>%d</page>" % n) for n in (2, 10)}
    listed = {**contents, f"{start}-index10.txt-p10p11.bz2": b"0:1:A", f"{start}/../../../1.xml.bz2": b"evil"}
    facts = {name: {"size": len(text), "sha1": hashlib.sha1(text).hexdigest()} for name, text in listed.items()}
    jobs = {job: {"status": status, "files": facts}, "metahistory7zdump": {"status": "waiting"}}
    server.files[f"/{wiki}/{date}/dumpstatus.json"] = Served(json.dumps({"jobs": jobs}).encode())
    dates = {path.split("/")[2] for path in server.files if path.endswith("dumpstatus.json")} | {"20260820"}
    links = "".join(f'<a href="{date}/">{date}/</a>' for date in dates)
    server.files[f"/{wiki}/"] = Served(f'<a href="../">../</a>{links}<a href="latest/">latest/</a>'.encode())
    for name, text in listed.items():
        server.files[f"/{wiki}/{date}/{name}"] = Served(text)
    return contents


def wikipedia(server, output, *more) -> list[str]:
    return ["wikipedia", "--language", "xx", "--base-url", f"{server.url}/", "--output", str(output), *more]


def test_wikipedia_by_date_and_the_latest_complete_one(server, tmp_path, capsys):
    contents = offer_dump(server)
    offer_dump(server, "20260801", job="articlesdump")
    offer_dump(server, "20260910", status="in-progress")
    download.main(wikipedia(server, tmp_path / "dumps", "--date", "20260901"))
    assert {name: (tmp_path / "dumps" / name).read_bytes() for name in contents} == contents
    assert names(tmp_path / "dumps") == ["sources.json", *sorted(contents)]
    sources = json.loads((tmp_path / "dumps" / "sources.json").read_text())
    for name, content in contents.items():
        assert sources[name] == {f"{server.url}/xxwiki/20260901/{name}": f"sha1:{hashlib.sha1(content).hexdigest()}"}
    printed = capsys.readouterr().out
    assert f"2 of 2 files to fetch into {tmp_path / 'dumps'}, {sum(map(len, contents.values()))} bytes" in printed
    assert printed.index("multistream2.") < printed.index("multistream10.")  # in the order of their numbers
    download.main(wikipedia(server, tmp_path / "dumps"))
    printed = capsys.readouterr().out
    assert printed.count(": reused") == 2 and "20260910 is skipped" in printed
    line = fail(capsys, *wikipedia(server, tmp_path / "dumps", "--date", "20260801"))
    assert "holds xxwiki of 20260901, and a corpus would contain both that and 20260801" in line


def test_mistakes_about_wikipedia(server, tmp_path, capsys):
    offer_dump(server)
    offer_dump(server, "20260910", status="waiting")
    line = fail(capsys, *wikipedia(server, tmp_path / "d", "--date", "20250101"))
    assert f"{server.url}/xxwiki has no complete dump for --date 20250101; choose one of 20260820, 20260901" in line
    server.files["/xxwiki/20260901/dumpstatus.json"].content = b"<html>Sign in</html>"
    for options, reason in (
        (["--date", "20260910"], "no complete dump for --date 20260910"),
        (["--language", "EN"], "'EN' is not the code of a Wikipedia"),
        (["--date", "yesterday"], "'yesterday' is not YYYYMMDD or latest"),
        (["--language", "../x"], "'../x' is not the code of a Wikipedia"),
        (["--language", "yy"], "/yywiki does not exist"),
        (["--date", "20260901"], "is not the status of a dump"),
        (["--base-url", "file:///etc"], "'file:///etc' is not a URL"),
        (["--attempts", "0"], "0 is below 1"),
    ):
        assert reason in fail(capsys, *wikipedia(server, tmp_path / "d", *options))
    assert not (tmp_path / "d").exists()


def test_a_disk_too_small_for_all_files_together(server, tmp_path, capsys, monkeypatch):
    offer_dump(server, content=bytes(800))
    monkeypatch.setattr("shutil.disk_usage", lambda folder: shutil._ntuple_diskusage(2000, 1000, 1000))
    line = fail(capsys, *wikipedia(server, tmp_path))
    assert "needs 1,600 bytes" in line and "1,000 free" in line and names(tmp_path) == []


def test_two_processes_do_not_fetch_into_one_folder(server, tmp_path, capsys):
    offer_dump(server)
    with sole_process(tmp_path):
        assert "another process is working in" in fail(capsys, *wikipedia(server, tmp_path))
    assert names(tmp_path) == []


def test_a_killed_command_is_continued(server, tmp_path):
    contents = offer_dump(server, content=os.urandom(300_000))
    for name in contents:
        server.files[f"/xxwiki/20260901/{name}"].bytes_per_s = 300_000
    argv = wikipedia(server, tmp_path, "--date", "20260901")
    process = subprocess.Popen([sys.executable, "-m", "data_prep.download", *argv], cwd=ROOT, stdout=subprocess.PIPE)
    deadline = time.monotonic() + 20
    while sum(path.stat().st_size for path in tmp_path.glob("*.part")) < 100_000:
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not set(names(tmp_path)) & set(contents)
    for served in server.files.values():
        served.bytes_per_s = 0
    download.main(argv)
    assert {name: (tmp_path / name).read_bytes() for name in contents} == contents
    starts = [headers.get("Range") for path, headers in server.asked if path.endswith(list(contents)[0])]
    assert len(starts) == 2 and starts[0] is None and int(starts[1][6:-1]) >= 100_000


# --- GLUE and SQuAD

MRPC_HEADER = "\ufeffQuality\t#1 ID\t#2 ID\t#1 String\t#2 String"
MRPC_ROWS = [f'{n % 2}\t{n}\t{n + 1}\tfirst {n} " quote\tsecond {n}' for n in range(6)]
IN_DEV = (1, 4)


def zipped(members: dict[str, str | bytes]) -> bytes:
    content = io.BytesIO()
    with zipfile.ZipFile(content, "w", zipfile.ZIP_DEFLATED) as file:
        for name, text in members.items():
            file.writestr(name, text)
    return content.getvalue()


def offer_glue(server, monkeypatch) -> None:
    """Tiny files with GLUE's official names and layouts; their sizes and checksums replace the real ones."""
    contents = {}
    for task, [(path, _, _), *_] in download.GLUE_FILES.items():
        if path.endswith(".zip"):
            tables = {f"{task}/{name}": name for name in download.table_names(task)}
            contents[path] = zipped({f"{task}/": "", **tables, f"{task}/original/x.txt": "x", "__MACOSX/._x": "x"})
    paths = [path for path, _, _ in download.GLUE_FILES["MRPC"]]
    rows = "\n".join([MRPC_HEADER, *MRPC_ROWS]) + "\n"
    ids = "".join(f"{n}\t{n + 1}\n" for n in reversed(IN_DEV))
    contents |= dict(zip(paths, (rows.encode(), rows.encode(), ids.encode()), strict=True))
    contents["glue/data/AX.tsv"] = b"index\tsentence1\tsentence2\n"
    server.files |= {f"/{path}": Served(content) for path, content in contents.items()}
    table = {
        task: [(path, len(contents[path]), hashlib.sha256(contents[path]).hexdigest()) for path, _, _ in files]
        for task, files in download.GLUE_FILES.items()
    }
    monkeypatch.setattr(download, "GLUE_FILES", table)


def glue(server, output, *more) -> list[str]:
    return ["glue", "--base-url", server.url, "--output", str(output), *more]


def test_glue_ends_in_the_layout_that_evaluation_reads(server, tmp_path, monkeypatch, capsys):
    offer_glue(server, monkeypatch)
    download.main(glue(server, tmp_path))
    assert names(tmp_path) == sorted([*download.NINE_TASKS, "downloads", "sources.json"])
    assert names(tmp_path / "RTE") == ["dev.tsv", "original", "train.tsv"]
    folders = {name.lower(): tmp_path / name for name in download.NINE_TASKS} | {"mnli-mm": tmp_path / "MNLI"}
    assert folders.keys() == GLUE_TASKS.keys()
    for name, task in GLUE_TASKS.items():
        for file in (task.train_file, task.dev_file):
            assert (folders[name] / file).is_file()
    num_asked = len(server.asked)
    capsys.readouterr()
    download.main(glue(server, tmp_path, "--tasks", "RTE", "AX", "AX"))  # added to what is there
    assert (tmp_path / "AX" / "AX.tsv").exists() and len(server.asked) == num_asked + 1
    assert f"{tmp_path / 'RTE'}: reused" in capsys.readouterr().out
    assert json.loads((tmp_path / "sources.json").read_text()).keys() == {*download.NINE_TASKS, "AX"}
    tables = {name: (tmp_path / "MRPC" / name).read_text() for name in names(tmp_path / "MRPC")}
    train = [row for n, row in enumerate(MRPC_ROWS) if n not in IN_DEV]
    assert tables["train.tsv"] == "\n".join([MRPC_HEADER, *train]) + "\n"
    assert tables["dev.tsv"] == "\n".join([MRPC_HEADER, *(MRPC_ROWS[n] for n in IN_DEV)]) + "\n"
    assert tables["test.tsv"].splitlines()[:2] == ["index\t#1 ID\t#2 ID\t#1 String\t#2 String", "0" + MRPC_ROWS[0][1:]]


@pytest.mark.skipif(not REAL_MRPC.exists(), reason="MRPC is not beside this repository")
def test_mrpc_from_the_real_rows(tmp_path):
    tables = {name: (REAL_MRPC / f"{name}.tsv").read_bytes() for name in ("train", "dev", "test")}
    header, *dev_rows = tables["dev"].splitlines(keepends=True)
    test_rows = tables["test"].splitlines(keepends=True)[1:]
    contents = {
        "train.txt": header + b"".join(dev_rows) + tables["train"].removeprefix(header),
        "test.txt": header + b"".join(b"0\t" + row.partition(b"\t")[2] for row in test_rows),
        "ids": b"".join(b"\t".join(row.split(b"\t")[1:3]) + b"\n" for row in dev_rows),
    }
    assert [len(content) for content in contents.values()] == [size for _, size, _ in download.GLUE_FILES["MRPC"]]
    paths = [tmp_path / name for name in contents]
    for path, content in zip(paths, contents.values(), strict=True):
        path.write_bytes(content)
    download.build_mrpc(tmp_path / "MRPC", *paths)
    assert {name: (tmp_path / "MRPC" / f"{name}.tsv").read_bytes() for name in tables} == tables
    paths[2].write_bytes(b"1\t2\n")
    with pytest.raises(ValueError, match="lists 1 pairs, and .*train.txt holds 0 of them"):
        download.build_mrpc(tmp_path / "again", *paths)
    assert "again" not in names(tmp_path)


TABLES = {"RTE/train.tsv": "a\tb\n" * 100, "RTE/dev.tsv": "c\td\n"}
ENCRYPTED = zipped(TABLES).replace(b"PK\1\2\x14\x03\x14\0\0\0", b"PK\1\2\x14\x03\x14\0\1\0")
FALSE_SIZE = zipped(TABLES | {"RTE/x": bytes(70_000)}).replace(b"\x70\x11\1\0", b"\x0a\0\0\0")


@pytest.mark.parametrize(
    "content, reason",
    [
        *(
            (zipped(TABLES | {name: "x"}), "outside its folder")
            for name in ("../x", "RTE/../../x", "/tmp/x", "a\\..\\x")
        ),
        (zipped(TABLES | {"zeros": bytes(10_000_000)}), "more than 200 times as much"),
        (zipped({"RTE/train.tsv": "x"}), "holds no RTE/dev.tsv"),
        (b"<html>Please sign in</html>", "damaged or not a zip"),
        (zipped(TABLES)[:-30], "damaged or not a zip"),
        (zipped(TABLES).replace(b"RTE/dev.tsvK", b"RTE/dev.tsv\xff"), "damaged or not a zip"),
        (ENCRYPTED, "damaged or not a zip .*encrypted"),
        (FALSE_SIZE, "damaged or not a zip"),
    ],
)
def test_a_harmful_or_damaged_zip_leaves_nothing(server, tmp_path, capsys, content, reason):
    server.files["/glue/data/RTE.zip"] = Served(content)
    line = fail(capsys, *glue(server, tmp_path / "glue", "--tasks", "RTE", "--no-checksums"))
    assert re.search(reason, line) and "RTE.zip" in line
    assert sorted(str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*")) == [
        "glue",
        "glue/downloads",
        "glue/downloads/RTE.zip",
        "glue/sources.json",
    ]


def test_a_task_with_a_wrong_hash_and_one_put_there_by_hand(server, tmp_path, monkeypatch, capsys):
    offer_glue(server, monkeypatch)
    served = server.files["/glue/data/RTE.zip"]
    good, served.content = served.content, bytes(len(served.content))
    line = fail(capsys, *glue(server, tmp_path, "--tasks", "RTE"))
    assert f"{server.url}/glue/data/RTE.zip: its sha256 is " in line and names(tmp_path) == ["downloads"]
    (tmp_path / "RTE").mkdir()
    assert "RTE exists without train.tsv" in fail(capsys, *glue(server, tmp_path, "--tasks", "RTE"))
    (tmp_path / "RTE").rmdir()
    (tmp_path / "downloads" / "RTE.zip").write_bytes(good)
    download.main(glue(server, tmp_path, "--tasks", "RTE"))
    assert (tmp_path / "RTE" / "dev.tsv").exists()


def test_squad(server, tmp_path, monkeypatch, capsys):
    contents = {f"{part}-v{version}.json": part.encode() for part in ("train", "dev") for version in ("1.1", "2.0")}
    server.files |= {f"/mirror/{name}": Served(content) for name, content in contents.items()}
    argv = ["squad", "--base-url", f"{server.url}/mirror", "--output", str(tmp_path)]
    assert "it has 5 bytes instead of the published 30,288,272" in fail(capsys, *argv)
    assert names(tmp_path) == []
    download.main([*argv, "--no-checksums", "--version", "2.0"])
    assert names(tmp_path) == ["dev-v2.0.json", "sources.json", "train-v2.0.json"]
    download.main([*argv, "--no-checksums"])
    assert {name: (tmp_path / name).read_bytes() for name in contents} == contents
    digest = f"sha256:{hashlib.sha256(b'dev').hexdigest()}"
    sources = json.loads((tmp_path / "sources.json").read_text())
    assert sources["dev-v1.1.json"] == {f"{server.url}/mirror/dev-v1.1.json": digest}
