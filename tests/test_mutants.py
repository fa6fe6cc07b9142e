"""The mutants of break_the_patch.py fit what they break, so that `make mutants` means something."""

from __future__ import annotations

from testbed.release import ROOT, UPSTREAM
from tests.break_the_patch import MUTANTS, package


def test_mutants_fit() -> None:
    """Each changes text that its file has, but in the releases that it says lack it."""
    wrong = []
    added = "".join(patch.read_text() for patch in (ROOT / "patches" / "common").iterdir())
    for name, mutant in MUTANTS.items():
        path = (ROOT if mutant.file.startswith("tools/") else package()) / mutant.file
        if not path.exists() and f"+++ b/python/sglang/{mutant.file}" in added:
            # A module that the series of this release does not need.
            continue
        fits = path.exists() and mutant.old in path.read_text()
        if fits == (UPSTREAM in mutant.lacking):
            wrong.append(f"{name}: {mutant.file} has {'' if fits else 'no '}{mutant.old!r}")
    assert not wrong, "\n".join(wrong)
