"""The command line against a mirror on this machine: layouts that our readers read, a kill, mistakes in one line."""

import bz2
import hashlib
import io
import json
import os
import signal
import subprocess
import sys
import time
import zipfile
from pathlib import Path

import pytest

from data_prep import download
from data_prep.cli import run_cli
from data_prep.transfer import Patience
from evaluation.classification import read_examples
from evaluation.glue import GLUE_TASKS
from tests.data_prep.unruly_server import Served, serving

ROOT = Path(__file__).parents[2]
REAL_MRPC = ROOT.parent / "shared" / "data" / "glue" / "MRPC"


@pytest.fixture
def server(monkeypatch):
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    monkeypatch.setattr(download, "Patience", lambda num_attempts=8: Patience(num_attempts, 0.01))
    with serving() as server:
        yield server


def fail(capsys, *argv) -> str:
    """The one line that the command line tells, with exit code 2."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        run_cli(download.main, [str(argument) for argument in argv])
    assert stop.value.code == 2
    errors = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1
    return errors[0]


def names(folder) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


# --- Wikipedia


def offer_dump(server, date="20260901", content=b"", status="done", job="articlesmultistreamdump", wiki="xxwiki"):
    """A dump of two article files, an index, and a file that wants to lie elsewhere; returns the article files."""
    start = f"{wiki}-{date}-pages-articles-multistream"
    contents = {f"{start}{n}.xml-p{n}p{n + 1}.bz2": content or bz2.compress(b"<page>%d</page>" % n) for n in (2, 10)}
    listed = {**contents, f"{start}-index10.txt-p10p11.bz2": b"0:1:A", f"{start}/../../../1.xml.bz2": b"evil"}
    facts = {
        name: {"size": len(content), "sha1": hashlib.sha1(content).hexdigest(), "url": f"/elsewhere/{name}"}
        for name, content in listed.items()
    }
    jobs = {job: {"status": status, "files": facts}, "metahistory7zdump": {"status": "waiting"}}
    server.files[f"/{wiki}/{date}/dumpstatus.json"] = Served(json.dumps({"jobs": jobs}).encode())
    dates = {path.split("/")[2] for path in server.files if path.endswith("dumpstatus.json")} | {"20260820"}
    links = "".join(f'<a href="{date}/">{date}/</a>' for date in dates)
    server.files[f"/{wiki}/"] = Served(f'<a href="../">../</a>{links}<a href="latest/">latest/</a>'.encode())
    for name, content in listed.items():
        server.files[f"/{wiki}/{date}/{name}"] = Served(content)
    return contents


def wikipedia(server, output, *more) -> list[str]:
    return ["wikipedia", "--language", "xx", "--base-url", f"{server.url}/", "--output", str(output), *more]


def test_wikipedia_by_date(server, tmp_path, capsys):
    contents = offer_dump(server)
    download.main(wikipedia(server, tmp_path / "dumps", "--date", "20260901"))
    assert {name: (tmp_path / "dumps" / name).read_bytes() for name in contents} == contents
    assert names(tmp_path / "dumps") == ["sources.json", *sorted(contents)]
    sources = json.loads((tmp_path / "dumps" / "sources.json").read_text())
    for name, content in contents.items():
        assert sources[name] == {f"{server.url}/xxwiki/20260901/{name}": f"sha1:{hashlib.sha1(content).hexdigest()}"}
    told = capsys.readouterr().out
    assert f"{sum(map(len, contents.values()))} bytes of 2 files still to come" in told
    assert told.index("multistream2.") < told.index("multistream10.")  # in the order of their numbers
    num_asked = len(server.asked)
    download.main(wikipedia(server, tmp_path / "dumps", "--date", "20260901"))
    assert capsys.readouterr().out.count(": reused, ") == 2
    assert len(server.asked) == num_asked + 1  # the status alone


def test_the_latest_dump_is_the_last_complete_one(server, tmp_path, capsys):
    offer_dump(server, "20260801")
    expected = offer_dump(server, "20260901", job="articlesdump")
    offer_dump(server, "20260910", status="in-progress")
    download.main(wikipedia(server, tmp_path))
    assert names(tmp_path) == ["sources.json", *sorted(expected)]
    assert "20260910 is left out" in capsys.readouterr().out
    told = fail(capsys, *wikipedia(server, tmp_path, "--date", "20260801"))
    assert "holds xxwiki of 20260901, and that of 20260801 would be read as well" in told


def test_mistakes_about_wikipedia(server, tmp_path, capsys):
    offer_dump(server)
    offer_dump(server, "20260910", status="waiting")
    told = fail(capsys, *wikipedia(server, tmp_path / "d", "--date", "20250101"))
    assert told.endswith(f"no dump {server.url}/xxwiki/20250101; there are 20260820, 20260901, 20260910")
    assert "not complete yet" in fail(capsys, *wikipedia(server, tmp_path / "d", "--date", "20260910"))
    assert "'yesterday' is neither" in fail(capsys, *wikipedia(server, tmp_path / "d", "--date", "yesterday"))
    assert "no code of a Wikipedia" in fail(capsys, *wikipedia(server, tmp_path / "d", "--language", "../x"))
    assert "there is no " in fail(capsys, *wikipedia(server, tmp_path / "d", "--language", "yy"))
    server.files["/xxwiki/20260901/dumpstatus.json"].content = b"<html>Sign in</html>"
    assert "is no status of a dump" in fail(capsys, *wikipedia(server, tmp_path / "d", "--date", "20260901"))
    assert "does not start with https://" in fail(capsys, "squad", "--base-url", "file:///etc", "--output", tmp_path)
    assert "must be at least 1" in fail(capsys, "squad", "--attempts", "0", "--output", tmp_path)
    assert not (tmp_path / "d").exists()


def test_a_disk_too_small_for_all_files_together(server, tmp_path, capsys, monkeypatch):
    contents = offer_dump(server, content=bytes(800))
    usage = type("usage", (), {"free": 1000})
    monkeypatch.setattr("shutil.disk_usage", lambda folder: usage)
    told = fail(capsys, *wikipedia(server, tmp_path))
    assert "needs 1,600 bytes" in told and "1,000 free" in told
    assert not set(names(tmp_path)) & set(contents)


def test_killed_and_given_again(server, tmp_path):
    """SIGKILL in mid-transfer, twice; the third run ends with the same bytes and fetched none of them again."""
    content = os.urandom(600_000)
    contents = offer_dump(server, content=content)
    for name in contents:
        server.files[f"/xxwiki/20260901/{name}"].bytes_per_s = 300_000
    argv = wikipedia(server, tmp_path, "--date", "20260901")
    for _ in range(2):
        process = subprocess.Popen(
            [sys.executable, "-m", "data_prep.download", *argv], cwd=ROOT, stdout=subprocess.PIPE
        )
        before = sum(path.stat().st_size for path in tmp_path.glob("*.part"))
        deadline = time.monotonic() + 20
        while sum(path.stat().st_size for path in tmp_path.glob("*.part")) < before + 100_000:
            assert process.poll() is None and time.monotonic() < deadline
            time.sleep(0.02)
        process.send_signal(signal.SIGKILL)
        process.wait()
        assert not set(names(tmp_path)) & set(contents)
    for served in server.files.values():
        served.bytes_per_s = 0
    download.main(argv)
    assert {name: (tmp_path / name).read_bytes() for name in contents} == contents
    first = f"/xxwiki/20260901/{list(contents)[0]}"
    starts = [int(headers.get("Range", "bytes=0-")[6:-1]) for path, headers in server.asked if path == first]
    assert len(starts) == 3 and 0 == starts[0] < starts[1] < starts[2]


# --- GLUE

HEADERS = {
    "SST-2": "sentence\tlabel",
    "STS-B": "index\tgenre\tsentence1\tsentence2\tscore",
    "QQP": "id\tqid1\tqid2\tquestion1\tquestion2\tis_duplicate",
    "MNLI": "index\tsentence1\tsentence2\tlabel1\tgold_label",
    "QNLI": "index\tquestion\tsentence\tlabel",
    "RTE": "index\tsentence1\tsentence2\tlabel",
    "WNLI": "index\tsentence1\tsentence2\tlabel",
}
LABELS = {"STS-B": "2.5", "MNLI": "neutral", "QNLI": "entailment", "RTE": "entailment"}
MRPC_HEADER = "\ufeffQuality\t#1 ID\t#2 ID\t#1 String\t#2 String"
MRPC_ROWS = [f'{n % 2}\t{n}\t{n + 1}\tfirst {n} " quote\tsecond {n}' for n in range(6)]
IN_DEV = (1, 4)


def zipped(members: dict[str, str]) -> bytes:
    content = io.BytesIO()
    with zipfile.ZipFile(content, "w", zipfile.ZIP_DEFLATED) as file:
        for name, text in members.items():
            file.writestr(name, text)
    return content.getvalue()


def offer_glue(server, monkeypatch) -> None:
    """Tiny files of GLUE's official names and layouts, their sizes and checksums in place of the real ones."""
    contents = {}
    for task, [(path, _, _), *_] in download.GLUE_FILES.items():
        if path.endswith(".zip"):
            row = "\t".join(
                [*(f"text {n}" for n in range(HEADERS.get(task, "\t\t\t").count("\t"))), LABELS.get(task, "1")]
            )
            table = "gj04\t1\t\tA sentence.\n" if task == "CoLA" else f"{HEADERS[task]}\n{row}\n{row}\n"
            dev = ["dev_matched.tsv", "dev_mismatched.tsv"] if task == "MNLI" else ["dev.tsv"]
            tables = {f"{task}/{name}": table for name in ["train.tsv", *dev]}
            contents[path] = zipped({f"{task}/": "", **tables, f"{task}/original/x.txt": "x", "__MACOSX/._x": "x"})
    paths = [path for path, _, _ in download.GLUE_FILES["MRPC"]]
    rows = "\n".join([MRPC_HEADER, *MRPC_ROWS]) + "\n"
    ids = "".join(f"{n}\t{n + 1}\n" for n in reversed(IN_DEV))
    contents |= dict(zip(paths, (rows.encode(), rows.encode(), ids.encode()), strict=True))
    contents["glue/data/AX.tsv"] = b"index\tsentence1\tsentence2\n"
    for path, content in contents.items():
        server.files[f"/{path}"] = Served(content)
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
    folders = {name.lower(): tmp_path / name for name in download.NINE_TASKS} | {"mnli-mm": tmp_path / "MNLI"}
    assert folders.keys() == GLUE_TASKS.keys()
    for name, task in GLUE_TASKS.items():
        for file in (task.train_file, task.dev_file):
            assert read_examples(folders[name] / file, task)
    num_asked = len(server.asked)
    capsys.readouterr()
    download.main(glue(server, tmp_path, "--tasks", "RTE", "AX", "AX"))  # added to what is there
    assert (tmp_path / "AX" / "AX.tsv").exists() and len(server.asked) == num_asked + 1
    assert f"{tmp_path / 'RTE'}: reused" in capsys.readouterr().out
    assert json.loads((tmp_path / "sources.json").read_text()).keys() == {*download.NINE_TASKS, "AX"}


def test_mrpc_is_parted_by_its_ids(server, tmp_path, monkeypatch, capsys):
    offer_glue(server, monkeypatch)
    download.main(glue(server, tmp_path, "--tasks", "MRPC"))
    tables = {name: (tmp_path / "MRPC" / name).read_text() for name in names(tmp_path / "MRPC")}
    train = [row for n, row in enumerate(MRPC_ROWS) if n not in IN_DEV]
    assert tables["train.tsv"] == "\n".join([MRPC_HEADER, *train]) + "\n"
    assert tables["dev.tsv"] == "\n".join([MRPC_HEADER, *(MRPC_ROWS[n] for n in IN_DEV)]) + "\n"
    assert tables["test.tsv"].splitlines()[:2] == ["index\t#1 ID\t#2 ID\t#1 String\t#2 String", "0" + MRPC_ROWS[0][1:]]
    (tmp_path / "ids").write_text("1\t2\n77\t78\n")
    with pytest.raises(ValueError, match="lists 2 pairs, of which .*train.txt holds 1"):
        texts = [tmp_path / "downloads" / f"msr_paraphrase_{name}.txt" for name in ("train", "test")]
        download.build_mrpc(tmp_path / "again", *texts, tmp_path / "ids")
    assert not (tmp_path / "again").exists()


@pytest.mark.skipif(not REAL_MRPC.exists(), reason="MRPC is not beside this repository")
def test_mrpc_of_the_real_rows(tmp_path):
    tables = {name: (REAL_MRPC / f"{name}.tsv").read_bytes() for name in ("train", "dev", "test")}
    header, *dev_rows = tables["dev"].splitlines(keepends=True)
    (tmp_path / "train.txt").write_bytes(header + b"".join(dev_rows) + tables["train"].removeprefix(header))
    (tmp_path / "ids").write_bytes(b"".join(b"\t".join(row.split(b"\t")[1:3]) + b"\n" for row in dev_rows))
    test_rows = tables["test"].splitlines(keepends=True)[1:]
    (tmp_path / "test.txt").write_bytes(header + b"".join(b"0\t" + row.partition(b"\t")[2] for row in test_rows))
    sizes = {path: size for path, size, _ in download.GLUE_FILES["MRPC"]}
    made = [tmp_path / name for name in ("train.txt", "test.txt", "ids")]
    assert [path.stat().st_size for path in made] == list(sizes.values())
    download.build_mrpc(tmp_path / "MRPC", *made)
    assert {name: (tmp_path / "MRPC" / f"{name}.tsv").read_bytes() for name in tables} == tables


def test_a_task_that_goes_wrong_leaves_no_folder(server, tmp_path, monkeypatch, capsys):
    offer_glue(server, monkeypatch)
    good = server.files["/glue/data/RTE.zip"].content
    server.files["/glue/data/RTE.zip"].content = bytes(len(good))
    assert "its sha256 is" in fail(capsys, *glue(server, tmp_path, "--tasks", "RTE"))
    server.files["/glue/data/RTE.zip"].content = zipped({"RTE/train.tsv": "x", "../evil": "x"})
    told = fail(capsys, *glue(server, tmp_path, "--tasks", "RTE", "--no-checksums"))
    assert "wants to write '../evil'" in told and names(tmp_path) == ["downloads", "sources.json"]
    (tmp_path / "downloads" / "RTE.zip").unlink()
    server.files["/glue/data/RTE.zip"].content = zipped({"RTE/train.tsv": "x"})
    assert "holds no RTE/dev.tsv" in fail(capsys, *glue(server, tmp_path, "--tasks", "RTE", "--no-checksums"))
    (tmp_path / "downloads" / "RTE.zip").unlink()
    (tmp_path / "RTE").mkdir()
    assert "is there without train.tsv" in fail(capsys, *glue(server, tmp_path, "--tasks", "RTE"))
    (tmp_path / "RTE").rmdir()
    del server.files["/glue/data/RTE.zip"]
    assert f"{server.url}/glue/data/RTE.zip does not exist" in fail(capsys, *glue(server, tmp_path, "--tasks", "RTE"))
    (tmp_path / "downloads" / "RTE.zip").write_bytes(good)  # put there by hand
    download.main(glue(server, tmp_path, "--tasks", "RTE"))
    assert (tmp_path / "RTE" / "dev.tsv").exists()


# --- SQuAD


def test_squad(server, tmp_path, monkeypatch, capsys):
    contents = {f"{part}-v{version}.json": part.encode() for part in ("train", "dev") for version in ("1.1", "2.0")}
    for name, content in contents.items():
        server.files[f"/mirror/{name}"] = Served(content)
    argv = ["squad", "--base-url", f"{server.url}/mirror", "--output", str(tmp_path)]
    assert "announces 5 bytes where 30,288,272 are published" in fail(capsys, *argv)
    assert names(tmp_path) == []
    download.main([*argv, "--no-checksums", "--version", "2.0"])
    assert names(tmp_path) == ["dev-v2.0.json", "sources.json", "train-v2.0.json"]
    download.main([*argv, "--no-checksums"])
    assert {name: (tmp_path / name).read_bytes() for name in contents} == contents
    sources = json.loads((tmp_path / "sources.json").read_text())
    digest = f"sha256:{hashlib.sha256(b'dev').hexdigest()}"
    assert sources["dev-v1.1.json"] == {f"{server.url}/mirror/dev-v1.1.json": digest}
