"""The pydantic schema of the plugin's section, which Axolotl joins to its own."""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel, field_validator

from str_kernels.integrations.settings import PatchSettings


class StrKernelsArgs(BaseModel):
    """The section ``str_kernels``, which contains ``PatchSettings``."""

    str_kernels: dict[str, Any] | None = None

    @field_validator("str_kernels")
    @classmethod
    def check_settings(cls, section: dict[str, Any] | None) -> dict[str, Any] | None:
        """Check the section as ``PatchSettings`` does, when the file is read."""
        PatchSettings.from_config(section)
        return section
