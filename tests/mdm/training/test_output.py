"""Where a run may write."""

from pathlib import Path

from components.places import place
from mdm.training.output import check_output_dir


def test_processes_that_look_at_once_leave_the_folder_to_each_other(tmp_path, monkeypatch):
    """One that removed it again would do so while another writes there; one alone leaves nothing behind."""
    check_output_dir(str(tmp_path / "new" / "run"))
    assert not (tmp_path / "new").exists()
    monkeypatch.setenv("RANK", "1")
    check_output_dir(str(tmp_path / "new" / "run"))
    assert not list((tmp_path / "new" / "run").iterdir())


def test_each_process_tries_a_file_of_its_own_and_leaves_none(tmp_path, monkeypatch):
    tried, write = [], Path.write_text
    monkeypatch.setattr(Path, "write_text", lambda self, text: tried.append(self.name) or write(self, text))
    for rank in ("0", "1"):
        monkeypatch.setenv("RANK", rank)
        check_output_dir(str(tmp_path / "run"))
    assert len(set(tried)) == 2
    far = place(f"memory://{tmp_path}/run")
    check_output_dir(str(far), far=True)
    assert not list(far.fs.find(far.path))
