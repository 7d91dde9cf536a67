"""The patch inside training programs that make model and trainer themselves.

``PatchCallback`` serves any trainer that takes transformers' callbacks, such as LLaMA-Factory's;
``str_kernels.integrations.axolotl`` is a plugin for Axolotl. Neither program is imported.
"""

from str_kernels.integrations.callback import PatchCallback
from str_kernels.integrations.settings import PatchSettings

__all__ = ["PatchCallback", "PatchSettings"]
