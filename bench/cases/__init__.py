# SPDX-License-Identifier: Apache-2.0
"""One file a case; each defines ``build(device) -> Case``."""
