"""The processes among which the tests are divided."""

import pytest


@pytest.mark.xdist_group("together")
def test_groups_stay_together(request: pytest.FixtureRequest) -> None:
    """Tests of a group run in one worker, so that what they share is made once: xdist adds the
    group to their names. With a pytest that it doesn't know it adds nothing, and says nothing.
    """
    divided = bool(getattr(request.config.option, "loadgroup", False))
    assert request.node.nodeid.endswith("@together") == divided
