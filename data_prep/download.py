"""Command line: fetch public corpora and benchmarks from their official places, each file checked.

    python -m data_prep.download wikipedia --language en --date 20260901 --output dumps
    python -m data_prep.download glue --tasks CoLA SST-2 --output glue
    python -m data_prep.download squad --version 1.1 2.0 --output squad

What lies in the output folder afterwards:

    dumps/   enwiki-20260901-pages-articles-multistream1.xml-p1p41242.bz2 ...   as published
    glue/    CoLA/train.tsv dev.tsv test.tsv, MNLI/train.tsv dev_matched.tsv dev_mismatched.tsv ..., AX/AX.tsv
    squad/   train-v1.1.json dev-v1.1.json train-v2.0.json dev-v2.0.json
    sources.json in each of them: name -> URL, digest; glue/downloads/ holds what was unpacked and may be removed

The same command goes on where it was killed and reuses what is there, also a file that was put there by hand; an
output folder may be added to. Only NAME.part and NAME.tmp are unfinished.

Wikipedia's sizes and checksums are those of the dump's own dumpstatus.json. GLUE and SQuAD publish none; the table's
are those that TensorFlow Datasets and Hugging Face's `datasets` recorded when they fetched the same URLs. Of these
AX.tsv and dev-v1.1.json were compared with copies that lay at hand; the others, the names inside the zip files, and
that the places still serve them, were not checked, since this was written without a network. MRPC is put together
from Microsoft's files as by GLUE's own script: its dev rows are those of the published list of ids.
"""

import argparse
import json
import re
import shutil
from collections.abc import Iterable
from pathlib import Path

from data_prep.archives import finished_folder, unpack
from data_prep.cli import read_json, require_space, run_cli, sha256_file, write_json
from data_prep.transfer import NotFound, Patience, RemoteFile, fetch, read_text

WIKIPEDIA_URL = "https://dumps.wikimedia.org"
GLUE_URL = "https://dl.fbaipublicfiles.com"
SQUAD_URL = "https://rajpurkar.github.io/SQuAD-explorer/dataset"

# Jobs of a dump whose files hold the current text of all articles, the first that is there and done.
WIKIPEDIA_JOBS = ("articlesmultistreamdump", "articlesdump")

# Folder -> (path, bytes, sha256) of each file that it is made from.
GLUE_FILES = {
    "CoLA": [("glue/data/CoLA.zip", 376_971, "f212fcd832b8f7b435fb991f101abf89f96b933ab400603bf198960dfc32cbff")],
    "SST-2": [("glue/data/SST-2.zip", 7_439_277, "d67e16fb55739c1b32cdce9877596db1c127dc322d93c082281f64057c16deaa")],
    "MRPC": [
        (
            "senteval/senteval_data/msr_paraphrase_train.txt",
            1_047_044,
            "60a9b09084528f0673eedee2b69cb941920f0b8cd0eeccefc464a98768457f89",
        ),
        (
            "senteval/senteval_data/msr_paraphrase_test.txt",
            441_275,
            "a04e271090879aaba6423d65b94950c089298587d9c084bf9cd7439bd785f784",
        ),
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
NINE_TASKS = [task for task in GLUE_FILES if task != "AX"]  # AX, the diagnostic set, has no labels

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


class _NotDone(ValueError):
    """A dump that is still being made."""


def download_wikipedia(args: argparse.Namespace) -> None:
    if not re.fullmatch(r"[a-z][a-z0-9_-]*", args.language):
        raise ValueError(f"--language {args.language!r} is no code of a Wikipedia such as en, de, zh, simple")
    if not re.fullmatch(r"latest|\d{8}", args.date):
        raise ValueError(f"--date {args.date!r} is neither YYYYMMDD nor latest")
    wiki = f"{args.language.replace('-', '_')}wiki"
    place = f"{args.base_url or WIKIPEDIA_URL}/{wiki}"
    files = find_dump(place, wiki, args.date, args.patience)
    date = re.search(r"-(\d{8})-", files[0].url)[1]
    others = {found[1] for path in args.output.glob("*") if (found := re.match(rf"{wiki}-(\d{{8}})-", path.name))}
    if others - {date}:
        raise ValueError(
            f"{args.output} holds {wiki} of {min(others - {date})}, and that of {date} would be read as well; "
            "go on with that --date or choose another folder"
        )
    require_room_for(files, args.output)
    paths = fetch_all(files, args.output, args.patience)
    record_sources(args.output, {path.name: [(remote, path)] for remote, path in zip(files, paths, strict=True)})


def find_dump(place: str, wiki: str, date: str, patience: Patience) -> list[RemoteFile]:
    """The article files of a dump of that date, or of the latest one that is complete, as its dumpstatus.json says."""
    if date != "latest":
        try:
            return _dump_files(f"{place}/{date}", f"{wiki}-{date}", patience)
        except NotFound as error:
            raise ValueError(
                f"there is no dump {place}/{date}; there are {', '.join(_dump_dates(place, patience))}"
            ) from error
    for date in reversed(_dump_dates(place, patience)):
        try:
            return _dump_files(f"{place}/{date}", f"{wiki}-{date}", patience)
        except (NotFound, _NotDone) as error:
            print(f"{place}/{date} is left out: {error}")
    raise ValueError(f"none of the dumps of {place} is complete; try later")


def _dump_dates(place: str, patience: Patience) -> list[str]:
    """Dates of the folders that the index page links to, oldest first."""
    try:
        page = read_text(f"{place}/", patience)
    except NotFound as error:
        raise ValueError(f"there is no {place}; --language takes codes such as en, de, zh, simple") from error
    dates = sorted(set(re.findall(r'href="(?:[^"]*/)?(\d{8})/?"', page)))
    if not dates:
        raise ValueError(f"{place} lists no dump; name a place with one by --base-url")
    return dates


def _dump_files(place: str, prefix: str, patience: Patience) -> list[RemoteFile]:
    url = f"{place}/dumpstatus.json"
    try:
        jobs = json.loads(read_text(url, patience))["jobs"]
        states = {job: jobs[job]["status"] for job in WIKIPEDIA_JOBS if job in jobs}
        done = [job for job, state in states.items() if state == "done"]
        if not done:
            raise _NotDone(f"{url}: articles are not complete yet ({states}); choose another date, or latest")
        files = {
            name: RemoteFile(
                f"{place}/{name}", info["size"], f"sha1:{info['sha1']}" if "sha1" in info else f"md5:{info['md5']}"
            )
            for name, info in jobs[done[0]]["files"].items()
            if re.fullmatch(
                re.escape(prefix) + r"-pages-articles(-multistream)?\d*\.xml(-p\d+p\d+)?\.(bz2|gz|xz)", name
            )
        }  # without the index of a multistream, and with no name that could lead out of the folder
    except (json.JSONDecodeError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(
            f"{url} is no status of a dump ({error!r}); check --base-url, or choose another date"
        ) from error
    if not files:
        raise ValueError(f"{url} names no article files in {done[0]}; choose another date")
    return [files[name] for name in sorted(files, key=lambda name: [int(n) for n in re.findall(r"\d+", name)])]


def download_glue(args: argparse.Namespace) -> None:
    wanted = {}
    for task in dict.fromkeys(args.tasks):
        if not (args.output / task).exists():
            wanted[task] = remote_files(GLUE_FILES[task], args.base_url or GLUE_URL, args.no_checksums)
        elif missing := [name for name in table_names(task) if not (args.output / task / name).is_file()]:
            raise ValueError(f"{args.output / task} is there without {missing[0]}; move it away to fetch it again")
        else:
            print(f"{args.output / task}: reused")
    downloads = args.output / "downloads"
    require_room_for([remote for remotes in wanted.values() for remote in remotes], downloads)
    for task, remotes in wanted.items():
        folder = args.output / task
        paths = fetch_all(remotes, downloads, args.patience)
        record_sources(args.output, {task: list(zip(remotes, paths, strict=True))})
        if task == "MRPC":
            build_mrpc(folder, *paths)
        elif task == "AX":
            with finished_folder(folder) as temporary:
                shutil.copy(paths[0], temporary)
        else:
            unpack(paths[0], folder, inside=task, required=table_names(task))
        print(f"{folder}: {' '.join(sorted(path.name for path in folder.iterdir()))}")


def table_names(task: str) -> list[str]:
    """The files without which a task's folder is of no use; the names that `evaluation` reads."""
    if task == "AX":
        return ["AX.tsv"]
    return ["train.tsv", "dev_matched.tsv", "dev_mismatched.tsv"] if task == "MNLI" else ["train.tsv", "dev.tsv"]


def build_mrpc(folder: Path, train: Path, test: Path, dev_ids: Path) -> None:
    """GLUE's MRPC: the training file parted by the list of dev ids, the test file without its labels.

    Rows are "Quality, #1 ID, #2 ID, #1 String, #2 String", parted by tabs; a row of the list is two ids.
    """
    ids = {tuple(line.split(b"\t")) for line in _lines(dev_ids)}
    header, *rows = _lines(train)
    parts = {"train.tsv": [header], "dev.tsv": [header]}
    for row in rows:
        parts["dev.tsv" if tuple(row.split(b"\t")[1:3]) in ids else "train.tsv"].append(row)
    if len(parts["dev.tsv"]) - 1 != len(ids):
        raise ValueError(f"{dev_ids} lists {len(ids)} pairs, of which {train} holds {len(parts['dev.tsv']) - 1}")
    parts["test.tsv"] = [b"index\t#1 ID\t#2 ID\t#1 String\t#2 String"]
    for index, row in enumerate(_lines(test)[1:]):
        parts["test.tsv"].append(b"%d\t" % index + row.partition(b"\t")[2])
    with finished_folder(folder) as temporary:
        for name, lines in parts.items():
            (temporary / name).write_bytes(b"\n".join(lines) + b"\n")


def _lines(path: Path) -> list[bytes]:
    return [line.rstrip(b"\r") for line in path.read_bytes().split(b"\n") if line.strip()]


def download_squad(args: argparse.Namespace) -> None:
    files = [file for version in dict.fromkeys(args.version) for file in SQUAD_FILES[version]]
    remotes = remote_files(files, args.base_url or SQUAD_URL, args.no_checksums)
    require_room_for(remotes, args.output)
    paths = fetch_all(remotes, args.output, args.patience)
    record_sources(args.output, {path.name: [(remote, path)] for remote, path in zip(remotes, paths, strict=True)})


def remote_files(files: Iterable[tuple[str, int, str]], base_url: str, no_checksums: bool) -> list[RemoteFile]:
    return [
        RemoteFile(f"{base_url}/{path}") if no_checksums else RemoteFile(f"{base_url}/{path}", size, f"sha256:{sha256}")
        for path, size, sha256 in files
    ]


def fetch_all(remotes: list[RemoteFile], output: Path, patience: Patience) -> list[Path]:
    """Fetch the files into `output`, one after the other, under the last part of their URLs."""
    paths = [output / remote.url.rpartition("/")[2] for remote in remotes]
    for number, (remote, path) in enumerate(zip(remotes, paths, strict=True), 1):
        state = fetch(remote, path, patience)
        print(f"{path}: {state}, {path.stat().st_size:,} bytes ({number} of {len(paths)})")
    return paths


def require_room_for(remotes: list[RemoteFile], output: Path) -> None:
    """Say what is still to come; raise ValueError if the disk has no room for all of it."""
    lacking = 0
    for remote in remotes:
        path = output / remote.url.rpartition("/")[2]
        part = path.with_name(f"{path.name}.part")
        if not path.exists():
            lacking += max((remote.size or 0) - (part.stat().st_size if part.exists() else 0), 0)
    if lacking:
        output.mkdir(parents=True, exist_ok=True)
        print(f"{lacking:,} bytes of {len(remotes)} files still to come into {output}")
        require_space(output, lacking, "what is to come")


def record_sources(output: Path, made: dict[str, list[tuple[RemoteFile, Path]]]) -> None:
    """Write to sources.json where each entry of the folder came from."""
    path = output / "sources.json"
    sources = read_json(path) if path.exists() else {}
    for name, files in made.items():
        sources[name] = {remote.url: remote.digest or f"sha256:{sha256_file(file)}" for remote, file in files}
    write_json(path, sources)


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    common = argparse.ArgumentParser(add_help=False)
    common.add_argument("--output", type=Path, required=True, metavar="DIR", help="folder to fetch into")
    common.add_argument("--base-url", metavar="URL", help="a mirror in place of the official host")
    common.add_argument(
        "--attempts",
        type=int,
        default=Patience().num_attempts,
        metavar="N",
        help="give up after N attempts in a row without a new byte (default: %(default)s)",
    )
    unchecked = argparse.ArgumentParser(add_help=False)
    unchecked.add_argument(
        "--no-checksums",
        action="store_true",
        help="take files of another size and checksum than recorded, if a place has changed them",
    )
    parser = argparse.ArgumentParser(
        prog="python -m data_prep.download",
        description="Fetch public corpora and benchmarks from their official places, resumable, every file checked.",
    )
    commands = parser.add_subparsers(required=True, metavar="wikipedia|glue|squad")
    wikipedia = commands.add_parser("wikipedia", parents=[common], help="the article dump of one language and date")
    wikipedia.add_argument("--language", required=True, metavar="CODE", help="en, de, zh, simple, ...")
    wikipedia.add_argument("--date", default="latest", metavar="YYYYMMDD", help="of the dump (default: latest)")
    wikipedia.set_defaults(run=download_wikipedia)
    glue = commands.add_parser("glue", parents=[common, unchecked], help="GLUE's nine tasks and its diagnostic set")
    glue.add_argument("--tasks", nargs="+", choices=GLUE_FILES, default=NINE_TASKS, help="(default: all but AX)")
    glue.set_defaults(run=download_glue)
    squad = commands.add_parser("squad", parents=[common, unchecked], help="SQuAD 1.1 and 2.0")
    squad.add_argument("--version", nargs="+", choices=SQUAD_FILES, default=list(SQUAD_FILES), help="(default: both)")
    squad.set_defaults(run=download_squad)
    args = parser.parse_args(argv)
    if args.base_url is not None and not re.match(r"https?://[^/]", args.base_url):
        raise ValueError(f"--base-url {args.base_url!r} does not start with https:// or http:// and a host")
    args.base_url = args.base_url and args.base_url.rstrip("/")
    if args.attempts < 1:
        raise ValueError(f"--attempts {args.attempts} must be at least 1")
    args.patience = Patience(args.attempts)
    return args


def main(argv: list[str] | None = None) -> None:
    args = parse_arguments(argv)
    args.run(args)


if __name__ == "__main__":
    run_cli(main)
