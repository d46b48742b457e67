"""What the tests of the book share: how they start Chromium, and what happens where there is none."""

import os

import pytest

LOOPBACK_ONLY = ["--no-sandbox", "--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1"]  # arguments of Chromium


def missing(what: str):
    """Skips where there is nothing to test with; in continuous integration that is an error."""
    return pytest.fail(what) if os.environ.get("CI") == "true" else pytest.skip(what)
