# SPDX-License-Identifier: Apache-2.0
"""The operations on the C++ kernels of ``csrc/``: allocation here, arithmetic in ``fastprompt._C``."""
