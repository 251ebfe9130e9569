"""What a node saved, on a GPU: written over where nobody holds it, and left alone where somebody does."""

import pytest
from test_ownership import (
    test_what_a_caller_reads_of_what_a_node_saved_stays,  # noqa: F401  the tests themselves
    test_what_a_hook_keeps_of_what_a_node_saved_stays,  # noqa: F401
    test_what_a_node_saved_is_written_over_where_nobody_holds_it,  # noqa: F401
)

pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("on_gpu")]
