"""docs/conformance.md, "The field, graded", is what the run gives.

`python -m tests.peer.grade` prints the tables. docs/verification.md says where the checkouts are
looked for; a program that is not there is skipped.
"""

from __future__ import annotations

import pytest

pytestmark = [pytest.mark.peer, pytest.mark.filterwarnings("default")]
pytest.importorskip("transformers")
pytest.importorskip("peft")

from scalabl_ref.verify.conformance import KIT_VERSION  # noqa: E402

from .field import PROGRAMS  # noqa: E402
from .field.official import step_with  # noqa: E402
from .grade import Graded, disagrees, grade, kit, on_page, section, tables  # noqa: E402


@pytest.fixture(scope="module", params=PROGRAMS)
def program(request):
    """(its name, itself)"""
    with PROGRAMS[request.param]() as program:
        if isinstance(program, str):
            pytest.skip(program)
        yield request.param, program


def test_the_page_says_what_the_run_gives(program):
    name, theirs = program
    found, said = grade(theirs), on_page(name)
    assert found.unexplained == []
    for field in Graded._fields:
        assert getattr(said, field) == getattr(found, field), field


def test_no_convention_of_a_step_can_be_left_out(program):
    """Each that the page names is needed for the numbers that the program gives."""
    _, theirs = program
    for difference in theirs.differences:
        if difference.level != "training step":
            continue
        (case,) = (c for c in kit() if c.level == "training step" and difference.explains(c))
        got, names = theirs.answers(case), difference.words.split("; ")
        assert disagrees(case, difference, got) == []
        for name in names:
            rest = step_with(*(other for other in names if other != name))
            assert disagrees(case, difference._replace(expected=rest), got), name


def test_the_page_has_these_programs_and_this_kit():
    assert f"the cases of kit version {KIT_VERSION}:" in section()
    about, grades, *_ = tables()
    assert [row[0] for row in about[1:]] == grades[0][1:] == list(PROGRAMS)
