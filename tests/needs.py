"""What a test may need that a machine lacks: root for namespaces, and Horovod, which `make check` builds."""

from importlib.util import find_spec

import pytest

from launch.emulate_hosts import why_not

needs_namespaces = pytest.mark.skipif(why_not() is not None, reason=str(why_not()))
needs_horovod = pytest.mark.skipif(
    find_spec("horovod") is None, reason="Horovod is not installed: launch/install_horovod.sh"
)
