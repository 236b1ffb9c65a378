# SPDX-License-Identifier: Apache-2.0
"""The error types of fastprompt; each message names the argument, what was got, what was expected, and the fix."""


class AttachError(RuntimeError):
    """A model is in a state that does not allow the request (prompts attached twice, handle already detached)."""


class UnsupportedModelError(ValueError):
    """A model lacks a capability that prompts need; the message lists the modules and what each is missing."""


class CheckpointError(RuntimeError):
    """A saved prompt or training state is missing, damaged, or belongs to another model."""


class ImplUnavailableError(RuntimeError):
    """An explicitly requested ``impl=`` cannot run these inputs; the message lists every reason."""


class AssetError(RuntimeError):
    """A downloadable asset is missing, damaged or could not be fetched."""


class DataError(ValueError):
    """A data set cannot be used as asked: empty folder, too few images in a class, unreadable image."""
