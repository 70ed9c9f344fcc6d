"""The list of deliberate breakages stays alive: each is still a change of the code as it is, and its tests are there."""

import re

from tests.mutations import MUTATIONS, ROOT


def test_every_breakage_is_found_once_in_its_file():
    """Where this fails, code was rewritten: write the snippet in tests/mutations.py anew, so that it breaks the same thing."""
    texts = {m.file: (ROOT / m.file).read_text() for m in MUTATIONS}
    assert not [f"{m.file}: {m.name}" for m in MUTATIONS if texts[m.file].count(m.old) != 1 or m.old == m.new]


def test_there_are_enough_of_them_and_each_has_its_own_name_and_tests():
    assert len(MUTATIONS) >= 100
    assert len({(m.file, m.name) for m in MUTATIONS}) == len(MUTATIONS)
    for path in {p for m in MUTATIONS for p in m.paths}:
        file, _, name = path.partition("::")
        assert (ROOT / file).is_file(), path
        assert not name or re.search(rf"^def {name}\(", (ROOT / file).read_text(), re.MULTILINE), path
