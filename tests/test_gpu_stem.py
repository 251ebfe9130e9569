"""test_stem once more, with every tensor on a GPU."""

import pytest
from test_stem import *  # noqa: F403  the tests themselves

pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("on_gpu")]
