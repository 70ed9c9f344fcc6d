"""Where a run may write."""

from mdm.training.output import check_output_dir


def test_processes_that_look_at_once_leave_the_folder_to_each_other(tmp_path, monkeypatch):
    """One that removed it again would do so while another writes there; one alone leaves nothing behind."""
    check_output_dir(str(tmp_path / "new" / "run"))
    assert not (tmp_path / "new").exists()
    monkeypatch.setenv("RANK", "1")
    check_output_dir(str(tmp_path / "new" / "run"))
    assert not list((tmp_path / "new" / "run").iterdir())
