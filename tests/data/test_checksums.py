import pytest

from wbdit_diffusers.data.checksums import check_recorded


def test_a_file_that_changes_is_refused(tmp_path):
    (tmp_path / "a.gz").write_text("published")
    for _ in range(2):
        check_recorded(tmp_path, "a.gz", "https://example.org/a.gz")
    (tmp_path / "a.gz").write_text("another")
    with pytest.raises(ValueError, match="a.gz is not the file that came first: .*Remove both if you trust"):
        check_recorded(tmp_path, "a.gz", "https://example.org/a.gz")
