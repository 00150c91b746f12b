"""docs/performance.md is what the saved results say."""

import shutil

from benchmarks import document


def test_the_page_is_made_of_the_saved_results(monkeypatch, tmp_path, capsys):
    committed = document.PAGE.read_text(encoding="utf-8")
    shutil.copy(document.PAGE, tmp_path)
    monkeypatch.setattr(document, "PAGE", tmp_path / document.PAGE.name)
    monkeypatch.setattr(document, "FIGURES", tmp_path / "figures")
    document.main()
    assert (tmp_path / document.PAGE.name).read_text(encoding="utf-8") == committed, "run python -m benchmarks.document"
    drawn = {path.name for path in (tmp_path / "figures").iterdir()}
    assert drawn == {path.name for path in (document.RESULTS.parents[1] / "docs/figures").iterdir()}
    assert all(f"figures/{name}" in committed for name in drawn)
