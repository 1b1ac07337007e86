"""Refuses to build a package without its sources, as a clone without symbolic links has it."""

from pathlib import Path
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface


class CustomBuildHook(BuildHookInterface):  # type: ignore[type-arg]
    def initialize(self, version: str, build_data: dict[str, Any]) -> None:  # noqa: ARG002
        for link in ("chat_ticket", "chat_ticket/protos"):
            if not (Path(self.root) / link).is_dir():
                raise SystemExit(
                    f"clients/python/{link} is no directory: the package would be empty. In the "
                    "repository it is a symbolic link; clone with `git -c core.symlinks=true clone`"
                )
