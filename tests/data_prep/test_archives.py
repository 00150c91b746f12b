"""Archives that want to write elsewhere, or more than they say, write nothing."""

import io
import shutil
import stat
import struct
import tarfile
import zipfile

import pytest

from data_prep.archives import MAX_MEMBERS, unpack

TABLES = {"QQP/train.tsv": b"a\tb\n" * 100, "QQP/dev.tsv": b"c\td\n", "QQP/original/notes.txt": b"n"}


def make_zip(path, members: dict, **options):
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED, **options) as file:
        for name, content in members.items():
            file.writestr(name, content)
    return path


def make_tar(path, *members: tarfile.TarInfo):
    with tarfile.open(path, "w:gz") as file:
        for member in members:
            file.addfile(member, io.BytesIO(bytes(member.size)))
    return path


def tar_member(name: str, kind: bytes = tarfile.REGTYPE, size: int = 0, target: str = "") -> tarfile.TarInfo:
    member = tarfile.TarInfo(name)
    member.type, member.size, member.linkname = kind, size, target
    return member


def refuse(archive, tmp_path, reason: str, **options) -> None:
    """Unpacking fails for that reason, and not a file or folder more lies there."""
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(ValueError, match=reason) as raised:
        unpack(archive, tmp_path / "out", **options)
    assert archive.name in str(raised.value)
    assert sorted(tmp_path.rglob("*")) == before


def test_a_folder_of_an_archive_appears_whole(tmp_path):
    archive = make_zip(tmp_path / "a.zip", {**TABLES, "__MACOSX/QQP/x": b"no", "QQP/empty/": b""})
    (tmp_path / "out.tmp").mkdir()
    (tmp_path / "out.tmp" / "of a killed run").touch()
    unpack(archive, tmp_path / "out", inside="QQP", required=["train.tsv", "dev.tsv"])
    found = {f"QQP/{p.relative_to(tmp_path / 'out')}": p.read_bytes() for p in (tmp_path / "out").rglob("*.*")}
    assert found == TABLES
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.zip", "out"]


def test_a_tar_too(tmp_path):
    archive = make_tar(tmp_path / "a.tar.gz", tar_member("d", tarfile.DIRTYPE), tar_member("d/x", size=5))
    unpack(archive, tmp_path / "out")
    assert (tmp_path / "out" / "d" / "x").read_bytes() == bytes(5)


@pytest.mark.parametrize("name", ["../x", "a/../../x", "/tmp/x", "a\\..\\x", ".."])
def test_names_outside_the_folder(tmp_path, name):
    refuse(make_zip(tmp_path / "a.zip", {**TABLES, name: b"evil"}), tmp_path, "outside its folder")
    refuse(make_tar(tmp_path / "a.tar.gz", tar_member("good"), tar_member(name)), tmp_path, "outside its folder")
    # Also when what is wanted of the archive lies elsewhere.
    refuse(make_zip(tmp_path / "a.zip", {**TABLES, name: b"evil"}), tmp_path, "outside its folder", inside="QQP")


def test_links_and_devices(tmp_path):
    link = zipfile.ZipInfo("link")
    link.external_attr = (stat.S_IFLNK | 0o777) << 16
    refuse(make_zip(tmp_path / "a.zip", {link: "/etc"}), tmp_path, "'link', which is no plain file")
    for kind in (tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.CHRTYPE, tarfile.BLKTYPE, tarfile.FIFOTYPE):
        archive = make_tar(tmp_path / "a.tar.gz", tar_member("odd", kind, target="/etc"), tar_member("odd/passwd"))
        refuse(archive, tmp_path, "'odd', which is no plain file")


def test_the_same_name_twice(tmp_path):
    with pytest.warns(UserWarning, match="Duplicate"), zipfile.ZipFile(tmp_path / "a.zip", "w") as file:
        file.writestr("x", "1")
        file.writestr("x", "2")
    refuse(tmp_path / "a.zip", tmp_path, "'x' twice")


def test_bombs(tmp_path):
    refuse(make_zip(tmp_path / "a.zip", {"zeros": bytes(10_000_000)}), tmp_path, "would unpack to 10,000,000 bytes")
    refuse(make_tar(tmp_path / "a.tar.gz", tar_member("zeros", size=10_000_000)), tmp_path, "at most 200 times as much")
    refuse(make_zip(tmp_path / "a.zip", {str(i): b"" for i in range(MAX_MEMBERS + 1)}), tmp_path, "in 10,001 members")


@pytest.mark.parametrize("announced", [10, 150_000])
def test_a_size_that_is_not_true(tmp_path, announced):
    """More is never written than was announced; that the rest is missing or left over is told."""
    archive = make_zip(tmp_path / "a.zip", {"x": bytes(range(256)) * 400})
    raw = archive.read_bytes()
    true, false = struct.pack("<L", 102_400), struct.pack("<L", announced)
    assert raw.count(true) == 2  # in the member's own header and in the directory
    archive.write_bytes(raw.replace(true, false))
    refuse(archive, tmp_path, "is damaged|holds another number")


def test_a_disk_without_room(tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: shutil._ntuple_diskusage(1000, 900, 100))
    refuse(make_zip(tmp_path / "a.zip", TABLES), tmp_path, "unpacking a.zip needs 405 bytes .* has 100 free")


def test_what_is_no_archive_or_damaged(tmp_path):
    archive = tmp_path / "a.zip"
    archive.write_text("<html>Please sign in</html>")
    refuse(archive, tmp_path, "is damaged or no zip or tar archive")
    raw = make_zip(archive, TABLES).read_bytes()
    archive.write_bytes(raw[:46] + b"\xff\xff" + raw[48:])
    refuse(archive, tmp_path, "is damaged")
    raw = make_tar(tmp_path / "b.tar.gz", tar_member("x", size=100_000)).read_bytes()
    (tmp_path / "b.tar.gz").write_bytes(raw[:-40])
    refuse(tmp_path / "b.tar.gz", tmp_path, "is damaged")


def test_what_is_wanted_is_not_inside(tmp_path):
    archive = make_zip(tmp_path / "a.zip", TABLES)
    refuse(archive, tmp_path, "holds no MNLI/train.tsv", inside="MNLI", required=["train.tsv"])
