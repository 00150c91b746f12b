"""Command line: fetch public corpora and benchmarks from their official hosts and check every file.

    python -m data_prep.download wikipedia --language en --date 20260901 --output dumps
    python -m data_prep.download glue --tasks CoLA SST-2 --output glue
    python -m data_prep.download squad --version 1.1 2.0 --output squad

They write:

    dumps/   enwiki-20260901-pages-articles-multistream1.xml-p1p41242.bz2 ...   as published
    glue/    CoLA/train.tsv dev.tsv test.tsv, MNLI/train.tsv dev_matched.tsv dev_mismatched.tsv ..., AX/AX.tsv
    squad/   train-v1.1.json dev-v1.1.json train-v2.0.json dev-v2.0.json
    sources.json in each of them: name -> URL, digest; glue/downloads/ holds the archives and may be removed

The same command continues an interrupted download and reuses finished files, including those put there by hand.
Unfinished ones are named NAME.part or NAME.tmp.

The sizes and digests of a Wikipedia dump come from its dumpstatus.json. GLUE and SQuAD publish none; the tables below
hold those that TensorFlow Datasets and Hugging Face's `datasets` recorded for the same URLs. AX.tsv and dev-v1.1.json
were compared with local copies. The other digests, the names inside the zip files and the hosts were not checked,
because this was written without a network.
"""

import json
import lzma
import os
import re
import shutil
import sys
import zipfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from data_prep.cli import at_least, matching, option, parse, run_cli
from data_prep.files import finished_file, read_json, require_space, sha256_file, sole_process, sync_folder, write_json
from data_prep.transfer import NotFound, RemoteFile, fetch, read_text, require_curl

# The jobs of a dump that hold the current text of all articles. The first complete one is taken.
WIKIPEDIA_JOBS = ("articlesmultistreamdump", "articlesdump")
ARTICLES = r"-pages-articles(-multistream)?\d*\.xml(-p\d+p\d+)?\.(bz2|gz|xz)"  # not the index of a multistream dump

MAX_RATIO = 200  # of unpacked to packed size; tables of text stay below 20, a zip bomb reaches 1,000
_DAMAGED = (zipfile.BadZipFile, zlib.error, lzma.LZMAError, EOFError, NotImplementedError, RuntimeError)

# Folder -> (path, bytes, sha256) of each file from which it is made.
_PARAPHRASES = "senteval/senteval_data/msr_paraphrase"
GLUE_FILES = {
    "CoLA": [("glue/data/CoLA.zip", 376_971, "f212fcd832b8f7b435fb991f101abf89f96b933ab400603bf198960dfc32cbff")],
    "SST-2": [("glue/data/SST-2.zip", 7_439_277, "d67e16fb55739c1b32cdce9877596db1c127dc322d93c082281f64057c16deaa")],
    "MRPC": [
        (f"{_PARAPHRASES}_train.txt", 1_047_044, "60a9b09084528f0673eedee2b69cb941920f0b8cd0eeccefc464a98768457f89"),
        (f"{_PARAPHRASES}_test.txt", 441_275, "a04e271090879aaba6423d65b94950c089298587d9c084bf9cd7439bd785f784"),
        ("glue/data/mrpc_dev_ids.tsv", 6_222, "971d7767d81b997fd9060ade0ec23c4fc31cbb226a55d1bd4a1bac474eb81dc7"),
    ],
    "STS-B": [("glue/data/STS-B.zip", 802_872, "e60a6393de5a8b5b9bac5020a1554b54e3691f9d600b775bd131e613ac179c85")],
    "QQP": [
        ("glue/data/QQP-clean.zip", 41_696_084, "40e7c862c04eb26ee04b67fd900e76c45c6ba8e6d8fab4f8f1f8072a1a3fbae0")
    ],
    "MNLI": [("glue/data/MNLI.zip", 312_783_507, "e7c1d896d26ed6caf700110645df426cc2d8ebf02a5ab743d5a5c68ac1c83633")],
    "QNLI": [("glue/data/QNLIv2.zip", 10_627_589, "e634e78627a29adaecd4f955359b22bf5e70f2cbd93b493f2d624138a0c0e5f5")],
    "RTE": [("glue/data/RTE.zip", 697_150, "6bf86de103ecd335f3441bd43574d23fef87ecc695977a63b82d5efb206556ee")],
    "WNLI": [("glue/data/WNLI.zip", 28_999, "ae0e8e4d16f4d46d4a0a566ec7ecceccfd3fbfaa4a7a4b4e02848c0f2561ac46")],
    "AX": [("glue/data/AX.tsv", 222_257, "0e13510b1bb14436ff7e2ee82338f0efb0133ecf2e73507a697dc210db3f05fd")],
}
NINE_TASKS = tuple(task for task in GLUE_FILES if task != "AX")  # AX, the diagnostic set, has no labels

SQUAD_FILES = {
    "1.1": [
        ("train-v1.1.json", 30_288_272, "3527663986b8295af4f7fcdff1ba1ff3f72d07d61a20f487cb238a6ef92fd955"),
        ("dev-v1.1.json", 4_854_279, "95aa6a52d5d6a735563366753ca50492a658031da74f301ac5238b03966972c9"),
    ],
    "2.0": [
        ("train-v2.0.json", 42_123_633, "68dcfbb971bd3e96d5b46c7177b16c1a4e7d4bdef19fb204502738552dede002"),
        ("dev-v2.0.json", 4_370_528, "80a5225e94905956a6446d296ca1093975c4d3b3260f1d6c8f68bc2ab77182d8"),
    ],
}

UNCHECKED = "accept files whose size or checksum differs from the recorded one, if a host has changed them"
CODE = matching("[a-z][a-z0-9_-]*", "the code of a Wikipedia such as en, de, zh, simple")
DATE = matching(r"latest|\d{8}", "YYYYMMDD or latest")


def _mirror_of(host: str) -> str:
    """The option --base-url of a command whose files come from `host`."""
    is_url = matching("https?://[^/].*", "a URL with http:// or https:// and a host")
    return option("the host, or a mirror with the same paths", default=host, type=is_url, metavar="URL")


@dataclass(frozen=True, kw_only=True)
class TransferOptions:
    """The options of all three commands."""

    output: Path = option("folder to fetch into", metavar="DIR")
    attempts: int = option(
        "failures in a row without a new byte before giving up", default=8, type=at_least(1), metavar="N"
    )


@dataclass(frozen=True, kw_only=True)
class WikipediaOptions(TransferOptions):
    """Fetch the article dump of one language and date."""

    language: str = option("en, de, zh, simple, ...", type=CODE, metavar="CODE")
    date: str = option("date of the dump", default="latest", type=DATE, metavar="YYYYMMDD")
    base_url: str = _mirror_of("https://dumps.wikimedia.org")


@dataclass(frozen=True, kw_only=True)
class GlueOptions(TransferOptions):
    """Fetch GLUE's nine tasks, or its diagnostic set AX."""

    tasks: tuple[str, ...] = option("tasks to fetch", default=NINE_TASKS, choices=tuple(GLUE_FILES), metavar="TASK")
    base_url: str = _mirror_of("https://dl.fbaipublicfiles.com")
    no_checksums: bool = option(UNCHECKED, default=False)


@dataclass(frozen=True, kw_only=True)
class SquadOptions(TransferOptions):
    """Fetch SQuAD 1.1 and 2.0."""

    version: tuple[str, ...] = option("versions to fetch", default=tuple(SQUAD_FILES), choices=tuple(SQUAD_FILES))
    base_url: str = _mirror_of("https://rajpurkar.github.io/SQuAD-explorer/dataset")
    no_checksums: bool = option(UNCHECKED, default=False)


class NotComplete(ValueError):
    """The dump is not finished yet."""


def download_wikipedia(options: WikipediaOptions) -> None:
    """Fetch a dump. Raises ValueError if the folder holds another dump, since a corpus would contain both."""
    output, wiki = options.output, f"{options.language.replace('-', '_')}wiki"
    files = find_dump(f"{options.base_url.rstrip('/')}/{wiki}", wiki, options.date, options.attempts)
    found = re.search(r"-(\d{8})-", files[0].url)[1]
    others = {match[1] for path in output.glob("*") if (match := re.match(rf"{wiki}-(\d{{8}})-", path.name))} - {found}
    if others:
        raise ValueError(
            f"{output} holds {wiki} of {min(others)}, and a corpus would contain both that and {found}; "
            "continue with that --date or choose another folder"
        )
    fetch_files(files, output, options.attempts)


def find_dump(place: str, wiki: str, date: str, attempts: int) -> list[RemoteFile]:
    """The article files of the complete dump of `date`, or of the newest if "latest". ValueError if there is none."""
    for candidate in reversed(_dump_dates(place, attempts)) if date == "latest" else [date]:
        try:
            return _dump_files(f"{place}/{candidate}", f"{wiki}-{candidate}", attempts)
        except (NotFound, NotComplete) as error:
            print(f"{place}/{candidate} is skipped: {error}")
    dates = ", ".join(_dump_dates(place, attempts))
    raise ValueError(f"{place} has no complete dump for --date {date}; choose one of {dates}, or try again later")


def _dump_dates(place: str, attempts: int) -> list[str]:
    """The dates of the folders that the index page links to, oldest first."""
    try:
        page = read_text(f"{place}/", attempts)
    except NotFound as error:
        raise ValueError(f"{place} does not exist; --language takes codes such as en, de, zh, simple") from error
    dates = sorted(set(re.findall(r'href="(?:[^"]*/)?(\d{8})/?"', page)))
    if not dates:
        raise ValueError(f"{place} lists no dumps; name a mirror that does with --base-url")
    return dates


def _dump_files(place: str, prefix: str, attempts: int) -> list[RemoteFile]:
    """The article files that a dump's dumpstatus.json lists, in the order of their numbers."""
    url = f"{place}/dumpstatus.json"
    text = read_text(url, attempts)
    try:
        jobs = json.loads(text)["jobs"]
        states = {job: jobs[job]["status"] for job in WIKIPEDIA_JOBS if job in jobs}
        complete = [job for job, state in states.items() if state == "done"]
        if not complete:
            raise NotComplete(f"{url}: the articles are not complete yet ({states}); choose another date, or latest")
        files = {
            name: RemoteFile(f"{place}/{name}", info["size"], f"sha1:{info['sha1']}")
            for name, info in jobs[complete[0]]["files"].items()
            if re.fullmatch(re.escape(prefix) + ARTICLES, name)  # so no name can lead out of the folder
        }
    except (json.JSONDecodeError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(
            f"{url} is not the status of a dump ({error!r}); check --base-url, or choose another date"
        ) from error
    if not files:
        raise ValueError(f"{url} lists no article files in {complete[0]}; choose another date")
    return [files[name] for name in sorted(files, key=lambda name: [int(n) for n in re.findall(r"\d+", name)])]


def download_glue(options: GlueOptions) -> None:
    """Make the folder of each task that is missing. The archives stay in `downloads`."""
    output, downloads, wanted = options.output, options.output / "downloads", {}
    for task in dict.fromkeys(options.tasks):
        if not (output / task).exists():
            wanted[task] = remote_files(GLUE_FILES[task], options)
        elif missing := [name for name in table_names(task) if not (output / task / name).is_file()]:
            raise ValueError(f"{output / task} exists without {missing[0]}; move it away to fetch it again")
        else:
            print(f"{output / task}: reused")
    with sole_process(output):
        require_room([remote for remotes in wanted.values() for remote in remotes], downloads)
        for task, remotes in wanted.items():
            paths = [fetch(remote, downloads / remote.name, options.attempts) for remote in remotes]
            record_sources(output, {task: remotes}, downloads)
            if task == "MRPC":
                build_mrpc(output / task, *paths)
            elif task == "AX":
                with finished_folder(output / task) as temporary:
                    shutil.copy(paths[0], temporary)
            else:
                unpack(paths[0], output / task)
            print(f"{output / task}: {' '.join(sorted(path.name for path in (output / task).iterdir()))}")


def download_squad(options: SquadOptions) -> None:
    """Fetch the training and dev files of each version."""
    files = [file for version in dict.fromkeys(options.version) for file in SQUAD_FILES[version]]
    fetch_files(remote_files(files, options), options.output, options.attempts)


def table_names(task: str) -> list[str]:
    """The files that a task's folder must hold; `evaluation` reads them by these names."""
    if task == "AX":
        return ["AX.tsv"]
    return ["train.tsv", "dev_matched.tsv", "dev_mismatched.tsv"] if task == "MNLI" else ["train.tsv", "dev.tsv"]


def unpack(archive: Path, folder: Path) -> None:
    """Make `folder` atomically from the folder of the same name in a zip.

    Raises ValueError for a damaged zip, a member whose path leads out of the folder, an unpacked size above MAX_RATIO
    times the archive's or above the free disk space, and a missing table. zipfile itself never writes more bytes than a
    member's header states, and never creates links.
    """
    try:
        with zipfile.ZipFile(archive) as file:
            members = {PurePosixPath(info.filename): info for info in file.infolist()}
            for path in members:
                if path.is_absolute() or ".." in path.parts or "\\" in str(path):
                    raise ValueError(f"{archive} holds {str(path)!r}, outside its folder; nothing was unpacked")
            size, packed = sum(info.file_size for info in members.values()), archive.stat().st_size
            if size > MAX_RATIO * packed:
                raise ValueError(
                    f"{archive} has {packed:,} bytes and would unpack to {size:,}, more than {MAX_RATIO} times as "
                    "much; nothing was unpacked"
                )
            tables = [PurePosixPath(folder.name, name) for name in table_names(folder.name)]
            if missing := [path for path in tables if path not in members]:
                raise ValueError(f"{archive} holds no {missing[0]}; remove it and fetch it again")
            require_space(folder.parent, size, f"unpacking {archive.name}")
            with finished_folder(folder) as temporary:
                for path, info in members.items():
                    if not info.is_dir() and path.parts[:1] == (folder.name,):
                        target = temporary.joinpath(*path.parts[1:])
                        target.parent.mkdir(parents=True, exist_ok=True)
                        with file.open(info) as source, finished_file(target) as content:
                            shutil.copyfileobj(source, content)
    except _DAMAGED as error:
        raise ValueError(f"{archive} is damaged or not a zip ({error}); remove it and fetch it again") from error


@contextmanager
def finished_folder(folder: Path) -> Iterator[Path]:
    """Yield a temporary folder to fill. It is renamed to `folder` at the end, or removed after an exception."""
    temporary = folder.with_name(f"{folder.name}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)  # left by a killed process
    temporary.mkdir()
    try:
        yield temporary
        os.rename(temporary, folder)
        sync_folder(folder.parent)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def build_mrpc(folder: Path, train: Path, test: Path, dev_ids: Path) -> None:
    """Make GLUE's MRPC from Microsoft's files, as GLUE's own script does.

    Rows of the training file whose pair of ids is in `dev_ids` form the dev set; labels of the test set are removed.
    Rows are "Quality, #1 ID, #2 ID, #1 String, #2 String", separated by tabs.
    """
    ids = {tuple(line.split(b"\t")) for line in _lines(dev_ids)}
    header, *rows = _lines(train)
    parts = {"train.tsv": [header], "dev.tsv": [header]}
    for row in rows:
        parts["dev.tsv" if tuple(row.split(b"\t")[1:3]) in ids else "train.tsv"].append(row)
    if (num_found := len(parts["dev.tsv"]) - 1) != len(ids):
        raise ValueError(f"{dev_ids} lists {len(ids)} pairs, and {train} holds {num_found} of them")
    unlabelled = [b"%d\t" % index + row.partition(b"\t")[2] for index, row in enumerate(_lines(test)[1:])]
    parts["test.tsv"] = [b"index\t#1 ID\t#2 ID\t#1 String\t#2 String", *unlabelled]
    with finished_folder(folder) as temporary:
        for name, lines in parts.items():
            (temporary / name).write_bytes(b"\n".join(lines) + b"\n")


def _lines(path: Path) -> list[bytes]:
    return [line.rstrip(b"\r") for line in path.read_bytes().split(b"\n") if line.strip()]


def remote_files(files: list[tuple[str, int, str]], options: GlueOptions | SquadOptions) -> list[RemoteFile]:
    """The files of a table (path, bytes, sha256) on their host, without size and digest after --no-checksums."""
    host = options.base_url.rstrip("/")
    if options.no_checksums:
        return [RemoteFile(f"{host}/{path}") for path, _, _ in files]
    return [RemoteFile(f"{host}/{path}", size, f"sha256:{sha256}") for path, size, sha256 in files]


def fetch_files(remotes: list[RemoteFile], output: Path, attempts: int) -> None:
    """Fetch files into `output` and record their sources."""
    with sole_process(output):
        require_room(remotes, output)
        for remote in remotes:
            fetch(remote, output / remote.name, attempts)
        record_sources(output, {remote.name: [remote] for remote in remotes}, output)


def require_room(remotes: list[RemoteFile], folder: Path) -> None:
    """Print how much is missing in `folder`, and raise ValueError if its disk has too little space for that."""
    missing = [remote for remote in remotes if not (folder / remote.name).exists()]
    parts = [path for remote in missing if (path := folder / f"{remote.name}.part").exists()]
    num_bytes = sum(remote.size or 0 for remote in missing) - sum(path.stat().st_size for path in parts)
    if missing:
        folder.mkdir(parents=True, exist_ok=True)
        print(f"{len(missing)} of {len(remotes)} files to fetch into {folder}, {num_bytes:,} bytes")
        require_space(folder, num_bytes, "the download")


def record_sources(output: Path, made: dict[str, list[RemoteFile]], downloads: Path) -> None:
    """Add URL and digest of each entry's files to sources.json; the digest is the published one or else the sha256."""
    path = output / "sources.json"
    sources = read_json(path) if path.exists() else {}
    for name, remotes in made.items():
        sources[name] = {file.url: file.digest or f"sha256:{sha256_file(downloads / file.name)}" for file in remotes}
    write_json(path, sources)


COMMANDS = {
    "wikipedia": (WikipediaOptions, download_wikipedia),
    "glue": (GlueOptions, download_glue),
    "squad": (SquadOptions, download_squad),
}


@dataclass(frozen=True, kw_only=True)
class DownloadOptions:
    """Fetch public corpora and benchmarks from their official hosts, check every file, and continue interrupted
    transfers. Needs curl. `python -m data_prep.download wikipedia --help` lists the options of a command.
    """

    command: str = option("what to fetch", flags=("command",), choices=tuple(COMMANDS))


def main(argv: list[str] | None = None) -> None:
    argv = sys.argv[1:] if argv is None else argv
    command = parse(DownloadOptions, "data_prep.download", argv[:1]).command
    options_class, download = COMMANDS[command]
    options = parse(options_class, f"data_prep.download {command}", argv[1:])
    require_curl()
    download(options)


if __name__ == "__main__":
    run_cli(main)
